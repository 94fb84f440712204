//! The artifacts of an attempt: those that it reads, and those that it makes.
//!
//! Bytes go over a connection of their own, so that they hold back neither tokens nor heartbeats,
//! with the attempt's token, which opens nothing else and dies with the lease. The runner never
//! sees a credential of the storage behind the server.
//!
//! While the server or its storage is away, an attempt goes on trying for as long as it holds its
//! lease: a cancel, a revocation, or a lost lease drops the attempt, and its transfer with it.

use std::{fmt, path::Path, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use tokio::sync::OnceCell;
use tonic::{Code, Status, transport::Channel};

use super::{connection::Connector, engine::Failure};
use crate::{
    client::{Client, Listener, Progress, TransferError},
    clock::Clock,
    error::{Reason, reason_name},
    grpc::status,
    id::Entropy,
    pb,
    runners::protocol::Backoff,
};

/// Bound of the first wait for a connection.
const FIRST_WAIT: Duration = Duration::from_millis(100);
/// Bound of the longest.
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// The way that the bytes of all attempts take; clones share it.
#[derive(Clone)]
pub struct Way(Arc<Inner>);

struct Inner {
    connector: Connector,
    channel: OnceCell<Channel>,
    clock: Clock,
    entropy: Entropy,
}

impl Way {
    /// Not connected before the first file.
    pub fn new(connector: Connector, clock: Clock, entropy: Entropy) -> Self {
        Self(Arc::new(Inner { connector, channel: OnceCell::new(), clock, entropy }))
    }

    /// The files of an attempt with that token.
    pub fn files(&self, token: &str) -> Files {
        Files { way: self.clone(), token: token.into() }
    }
}

/// The artifacts of one attempt.
#[derive(Clone)]
pub struct Files {
    way: Way,
    token: Arc<str>,
}

impl fmt::Debug for Files {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Files")
    }
}

impl Files {
    /// What is known of an artifact that the task reads or has made.
    pub async fn get(&self, id: &str) -> Result<pb::Artifact, Failure> {
        let found = self.client().await?.find_artifact(id).await;
        found.map_err(|error| failure("read", id, &error))
    }

    /// The bytes of an artifact, if they are not more than `limit`.
    pub async fn read(&self, id: &str, limit: u64) -> Result<Bytes, Failure> {
        let artifact = self.get(id).await?;
        if artifact.size_bytes > limit {
            let message = format!(
                "artifact {id} has {} bytes, more than the {limit} that are taken here",
                artifact.size_bytes
            );
            return Err(Failure::input(message));
        }
        let client = self.client().await?;
        let mut pieces = client.fetch(&artifact, 0);
        let mut bytes = BytesMut::new();
        while let Some(piece) = pieces.next().await.map_err(|error| failure("read", id, &error))? {
            bytes.extend_from_slice(&piece);
        }
        if bytes.len() as u64 != artifact.size_bytes {
            let (came, size) = (bytes.len(), artifact.size_bytes);
            let message = format!("{came} of the {size} bytes of artifact {id} came");
            return Err(Failure::new(Reason::EngineError, true, message));
        }
        Ok(bytes.freeze())
    }

    /// Writes the bytes of an artifact to a file, checked; goes on where it was cut off before.
    pub async fn save(&self, id: &str, path: &Path) -> Result<pb::Artifact, Failure> {
        let artifact = self.get(id).await?;
        let saved = self.client().await?.get_file(&artifact, path, unheard()).await;
        saved.map_err(|error| moved("save", id, &error))?;
        Ok(artifact)
    }

    /// Makes an artifact of bytes. It is output of the task once it is listed, with
    /// [`Emitter::artifact`](super::emitter::Emitter::artifact).
    pub async fn put(&self, spec: pb::ArtifactSpec, bytes: Bytes) -> Result<pb::Artifact, Failure> {
        let client = self.client().await?;
        let name = spec.name.clone();
        let put = client.put_bytes(bytes, spec, unheard()).await;
        put.map_err(|error| moved("put", &name, &error))
    }

    /// As [`put`](Self::put), of a file; goes on where it was cut off before.
    pub async fn put_file(
        &self,
        spec: pb::ArtifactSpec,
        path: &Path,
    ) -> Result<pb::Artifact, Failure> {
        let client = self.client().await?;
        let name = spec.name.clone();
        let put = client.put_file(path, spec, unheard()).await;
        put.map_err(|error| moved("put", &name, &error))
    }

    /// The way to the server, as soon as there is one.
    async fn client(&self) -> Result<Client, Failure> {
        let way = &self.way.0;
        let mut backoff = Backoff::new(FIRST_WAIT, LONGEST_WAIT);
        let channel = loop {
            match way.channel.get_or_try_init(|| (way.connector)()).await {
                Ok(channel) => break channel,
                Err(error) => {
                    tracing::debug!("no connection for files: {error:#}");
                    way.clock.sleep(backoff.next(way.entropy.unit())).await;
                }
            }
        };
        let token = Some(&*self.token).filter(|token| !token.is_empty());
        let client = Client::over(channel.clone(), token);
        let client = client.map_err(|error| {
            Failure::new(Reason::EngineError, true, format!("no connection for files: {error}"))
        })?;
        Ok(client.with_patience(Duration::MAX))
    }
}

/// Nobody watches a runner's transfers.
fn unheard() -> Listener {
    Arc::new(|_: Progress| {})
}

fn moved(doing: &str, what: &str, error: &TransferError) -> Failure {
    match error {
        TransferError::Call(status) => failure(doing, what, status),
        TransferError::File { .. } | TransferError::Damaged(_) => {
            Failure::new(Reason::EngineError, true, format!("cannot {doing} {what}: {error}"))
        }
    }
}

fn failure(doing: &str, what: &str, error: &Status) -> Failure {
    let message = format!("cannot {doing} artifact {what}: {}", error.message());
    let reason = status::error_reason(error).map(|(reason, _)| reason);
    match error.code() {
        Code::NotFound | Code::InvalidArgument => Failure::input(message),
        _ if reason.as_deref() == Some(reason_name(Reason::LeaseLost)) => {
            Failure::new(Reason::LeaseLost, false, message)
        }
        Code::PermissionDenied | Code::Unauthenticated | Code::ResourceExhausted => {
            Failure::new(Reason::EngineError, false, message)
        }
        _ => Failure::new(Reason::EngineError, true, message),
    }
}
