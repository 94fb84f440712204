//! Artifacts over one store, without a server around them.

use std::{path::PathBuf, time::Duration};

use bytes::Bytes;
use futures_util::TryStreamExt as _;

use super::{
    super::{
        Artifacts, Limits, Parts,
        model::{Artifact, Spec, Upload},
    },
    rows,
};
use crate::{
    blob::{Digest, Store, hash::Hasher, testing::TestServer},
    clock::Clock,
    db::{Db, testing},
    error::{Error, Reason, Result},
    id::{ArtifactId, Entropy, Namespace, TaskId},
    keys::{Grant, Principal, Signer},
};

pub struct World {
    pub artifacts: Artifacts,
    pub db: Db,
    pub clock: Clock,
    dir: tempfile::TempDir,
    server: Option<TestServer>,
}

impl World {
    pub async fn files() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::files(&dir.path().join("artifacts")).await.unwrap();
        Self::over(dir, store, None).await
    }

    pub async fn bucket() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let server = TestServer::start(&dir.path().join("s3")).await;
        let store = Store::test_bucket(server.addr).await;
        Self::over(dir, store, Some(server)).await
    }

    pub async fn over(dir: tempfile::TempDir, store: Store, server: Option<TestServer>) -> Self {
        let (clock, db) = (Clock::manual(), testing::open(dir.path()).await);
        let artifacts = Artifacts::new(parts(&db, store, &clock));
        Self { artifacts, db, clock, dir, server }
    }

    /// The same data after the process died: whatever was in memory is gone.
    pub async fn restart(self) -> Self {
        let store = match &self.server {
            None => Store::files(&self.dir.path().join("artifacts")).await.unwrap(),
            Some(server) => Store::test_bucket(server.addr).await,
        };
        let artifacts = Artifacts::new(parts(&self.db, store, &self.clock));
        Self { artifacts, ..self }
    }

    pub async fn put(&self, name: &str, bytes: &Bytes) -> Artifact {
        self.artifacts.put(&caller("a"), spec(name), bytes.clone()).await.unwrap()
    }

    pub async fn upload(&self, spec: Spec, bytes: &Bytes) -> Result<Artifact> {
        let upload = self.artifacts.begin(&caller("a"), spec).await?;
        self.send(upload, 0, bytes).await
    }

    /// Sends everything from `offset` on, in pieces of all sizes.
    pub async fn send(&self, upload: Upload, offset: u64, bytes: &Bytes) -> Result<Artifact> {
        let mut receiver = self.artifacts.receive(upload, offset).await?;
        for piece in pieces(&bytes.slice(offset as usize..)) {
            receiver.write(piece).await?;
        }
        receiver.finish().await
    }

    pub async fn bytes(&self, artifact: &Artifact) -> Result<Bytes> {
        self.range(artifact, 0, None).await
    }

    pub async fn range(
        &self,
        artifact: &Artifact,
        offset: u64,
        limit: Option<u64>,
    ) -> Result<Bytes> {
        let pieces = self.artifacts.read(artifact, offset, limit).await?;
        let pieces: Vec<Bytes> = pieces.try_collect().await.map_err(Error::storage)?;
        Ok(pieces.concat().into())
    }

    pub async fn listed(&self) -> Vec<ArtifactId> {
        let listed = self.artifacts.list(&"a".into(), Default::default(), None, 100).await;
        listed.unwrap().into_iter().map(|artifact| artifact.id).collect()
    }

    /// Files that hold bytes of artifacts, whole or not.
    pub fn stored(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut dirs = vec![self.dir.path().join("artifacts"), self.dir.path().join("s3")];
        while let Some(dir) = dirs.pop() {
            let Ok(entries) = std::fs::read_dir(dir) else { continue };
            for entry in entries.map(Result::unwrap) {
                let path = entry.path();
                // What the server of the bucket keeps for itself begins with a dot.
                let own = entry.file_name().to_string_lossy().starts_with('.');
                if path.is_dir() {
                    dirs.push(path);
                } else if !own || entry.file_name().to_string_lossy().contains(".part-") {
                    found.push(path);
                }
            }
        }
        found
    }

    pub async fn run_task(&self, attempt: u32, state: &str) -> TaskId {
        let task = TaskId::new(self.clock.now(), &Entropy::seeded(u64::from(attempt) + 99));
        let state = state.to_owned();
        let insert = self.db.write(move |tx| {
            Box::pin(async move { rows::insert_task(tx, task, attempt, &state).await })
        });
        insert.await.unwrap();
        task
    }
}

pub fn parts(db: &Db, store: Store, clock: &Clock) -> Parts {
    Parts {
        db: db.clone(),
        store,
        clock: clock.clone(),
        entropy: Entropy::system(),
        signer: Signer::new(&[7; 32], clock.clone()),
        limits: Limits {
            max_size: 64 << 20,
            max_per_namespace: 200 << 20,
            max_uploads: 3,
            ttl: Duration::ZERO,
            upload_ttl: Duration::from_hours(24),
        },
        public_url: String::new(),
    }
}

pub fn caller(namespace: &str) -> Principal {
    Principal { namespace: Namespace::from(namespace), ..Principal::local() }
}

pub fn attempt(task: TaskId, attempt: u32) -> Principal {
    Principal { grant: Some(Grant::Attempt(task, attempt)), ..caller("a") }
}

pub fn spec(name: &str) -> Spec {
    Spec {
        name: name.into(),
        kind: "text".into(),
        mime_type: "text/plain".into(),
        size: None,
        digest: None,
        ttl: None,
    }
}

pub fn announced(name: &str, bytes: &Bytes) -> Spec {
    Spec { size: Some(bytes.len() as u64), digest: Some(digest(bytes)), ..spec(name) }
}

pub fn digest(bytes: &[u8]) -> Digest {
    let mut hasher = Hasher::default();
    hasher.update(bytes);
    hasher.finish()
}

/// Bytes that do not repeat soon.
pub fn noise(n_bytes: usize, seed: u64) -> Bytes {
    let entropy = Entropy::seeded(seed);
    let mut bytes = vec![0; n_bytes];
    entropy.fill(&mut bytes);
    bytes.into()
}

pub fn pieces(bytes: &Bytes) -> Vec<Bytes> {
    let (mut rest, mut pieces, mut n) = (bytes.clone(), Vec::new(), 1);
    while !rest.is_empty() {
        pieces.push(rest.split_to(rest.len().min(n)));
        n = (n * 7) % 3_000_000 + 1;
    }
    pieces
}

pub fn reason<T: std::fmt::Debug>(result: Result<T>) -> Reason {
    result.unwrap_err().reason()
}
