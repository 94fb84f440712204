//! Artifacts: complete, immutable bytes with a name, kept once for each digest.
//!
//! ```text
//!  announced ──► bytes come (upload: row, nobody sees it) ──► digest and size are those announced
//!                                                                        │ touch: a row for the bytes
//!                                                                        ▼
//!  listed ◄── one transaction: lease held, room left, row ◄── bytes kept under their digest
//! ```
//!
//! Invariants: a row of `artifacts` is written after its bytes are kept, whole, on stable storage; no
//! bytes are kept that `artifact_bytes` has no row of; bytes are deleted only after their row went to
//! `artifact_garbage`, and nobody ever refers to those again. What an attempt made is accepted in a
//! transaction that sees the attempt hold its lease. Names are for people and are never part of a path.

mod collect;
mod convert;
mod keep;
pub mod model;
mod receive;
mod service;
pub mod store;
#[cfg(test)]
#[cfg(feature = "s3")]
mod tests;

use std::{sync::Arc, time::Duration};

pub use self::{convert::references, receive::Receiver, service::Service};
use self::{
    model::{Artifact, Origin},
    store::{Filter, Lease},
};
use crate::{
    blob::{Digest, Pieces, Store, hash::Hasher},
    clock::Clock,
    db::Db,
    error::{Error, Kind, Reason, Result},
    id::{ArtifactId, Entropy, Namespace, TaskId},
    keys::{Claims, Grant, Principal, Receipts, Signer},
};

/// A shared link lives at most this long.
const LONGEST_LINK: Duration = Duration::from_hours(7 * 24);

/// What artifacts may use up.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Largest artifact.
    pub max_size: u64,
    /// Bytes of a namespace; 0 for any number.
    pub max_per_namespace: u64,
    /// Uploads of a namespace that are not complete.
    pub max_uploads: u64,
    /// An artifact of no task, without a lifetime of its own, lives this long; 0 for ever.
    pub ttl: Duration,
    /// An upload must be completed within this time.
    pub upload_ttl: Duration,
}

/// What artifacts are made of.
pub struct Parts {
    /// Rows.
    pub db: Db,
    /// Bytes.
    pub store: Store,
    /// Time.
    pub clock: Clock,
    /// Ids.
    pub entropy: Entropy,
    /// Links, upload tokens and receipts.
    pub signer: Signer,
    /// Limits.
    pub limits: Limits,
    /// What links begin with, without a slash at the end; empty for paths.
    pub public_url: String,
}

/// Artifacts; clones share them.
#[derive(Clone)]
pub struct Artifacts(Arc<Parts>);

impl Artifacts {
    /// Puts the parts together.
    pub fn new(parts: Parts) -> Self {
        Self(Arc::new(parts))
    }

    /// Seals what attempts made.
    pub fn receipts(&self) -> Receipts {
        self.0.signer.receipts()
    }

    /// An artifact that the caller may see. An attempt sees what its task made and what it reads.
    pub async fn get(&self, caller: &Principal, id: ArtifactId) -> Result<Artifact> {
        caller.check_artifact(id)?;
        let (namespace, origin) = (caller.namespace.clone(), Self::origin(caller));
        let now = self.0.clock.now();
        let read = self.0.db.read(move |tx| {
            Box::pin(async move {
                let Some((task, _)) = origin.attempt else {
                    return store::get(tx, &namespace, id, now).await;
                };
                keep::check_lease(tx, &namespace, &origin, Lease::Seen).await?;
                // What a task reads stays for as long as it needs it.
                let artifact = store::get_any(tx, &namespace, id).await?;
                let made = artifact.origin.attempt.is_some_and(|(maker, _)| maker == task);
                if made || store::reads(tx, id, task).await? {
                    return Ok(artifact);
                }
                Err(Error::not_found("artifact", id))
            })
        });
        read.await
    }

    /// `limit` bytes from `offset`, or all that follow; a whole artifact is checked on its way.
    pub async fn read(
        &self,
        artifact: &Artifact,
        offset: u64,
        limit: Option<u64>,
    ) -> Result<Pieces> {
        let left = artifact.size.checked_sub(offset).ok_or_else(|| {
            let what = format!("{offset} is beyond the end, {}", artifact.size);
            Error::invalid("offset", what)
        })?;
        let length = limit.map_or(left, |limit| limit.min(left));
        let pieces = self.0.store.read(&artifact.key, offset, length).await;
        let pieces = pieces.map_err(|error| keep::unreadable(artifact.id, error))?;
        Ok(if length == artifact.size { checked(pieces, artifact) } else { pieces })
    }

    /// Size and digest of what is stored of an artifact; no digest when nothing is.
    pub async fn inspect(&self, artifact: &Artifact) -> Result<(u64, Option<Digest>)> {
        use futures_util::TryStreamExt as _;
        let (store, key) = (&self.0.store, &artifact.key);
        let Some(size) = store.size(key).await.map_err(keep::unwritable)? else {
            return Ok((0, None));
        };
        let mut pieces = store.read(key, 0, size).await.map_err(keep::unwritable)?;
        let mut hasher = Hasher::default();
        while let Some(piece) = pieces.try_next().await.map_err(keep::unwritable)? {
            hasher.update(&piece);
        }
        Ok((hasher.length(), Some(hasher.finish())))
    }

    /// Artifacts of the caller's namespace, newest first.
    pub async fn list(
        &self,
        namespace: &Namespace,
        filter: Filter,
        cursor: Option<String>,
        limit: u32,
    ) -> Result<Vec<Artifact>> {
        let (namespace, now) = (namespace.clone(), self.0.clock.now());
        let cursor = cursor.map(|id| id.parse()).transpose().map_err(|_| {
            Error::invalid("page_token", "is not a token of this list; use next_page_token")
        })?;
        let list = self.0.db.read(move |tx| {
            Box::pin(async move { store::list(tx, &namespace, &filter, cursor, limit, now).await })
        });
        list.await
    }

    /// Deletes an artifact, unless a task reads it that has not ended; says whether it was there.
    pub async fn delete(&self, namespace: &Namespace, id: ArtifactId) -> Result<bool> {
        let (namespace, now) = (namespace.clone(), self.0.clock.now());
        let delete = self.0.db.write(move |tx| {
            Box::pin(async move {
                match store::get_any(tx, &namespace, id).await {
                    Err(error) if error.kind() == Kind::NotFound => return Ok(false),
                    found => found?,
                };
                if store::delete(tx, id, now).await? {
                    return Ok(true);
                }
                let Some(task) = store::reader(tx, id, now).await? else { return Ok(false) };
                let message = format!("artifact `{id}` is read by task `{task}`, which has not ended; cancel that task or wait");
                Err(Error::state_conflict("artifact", id, "IN_USE", message))
            })
        });
        delete.await
    }

    /// A link that opens one artifact, and when it stops working.
    pub fn share(
        &self,
        caller: &Principal,
        artifact: &Artifact,
        ttl: Duration,
    ) -> Result<(String, crate::clock::Micros)> {
        if ttl.is_zero() || ttl > LONGEST_LINK {
            return Err(Error::invalid("ttl", "must be more than zero, at most 7 days"));
        }
        let expire_time = self.0.clock.now() + ttl;
        let token = self.0.signer.sign(&Claims {
            namespace: caller.namespace.clone(),
            grant: Grant::Artifact(artifact.id),
            key_id: caller.key_id.clone(),
            expire_time,
        });
        Ok((format!("{}?access_token={token}", self.url(artifact.id)), expire_time))
    }

    /// Where the bytes of an artifact are.
    fn url(&self, id: ArtifactId) -> String {
        format!("{}/v1/artifacts/{id}/content", self.0.public_url)
    }

    /// Notes, before it is accepted, what a task reads; refused when one is not there.
    pub async fn refer(
        &self,
        namespace: &Namespace,
        task: TaskId,
        ids: Vec<ArtifactId>,
    ) -> Result<()> {
        let (namespace, now) = (namespace.clone(), self.0.clock.now());
        let refer = self.0.db.write(move |tx| {
            Box::pin(async move {
                for id in ids {
                    store::refer(tx, &namespace, id, task, now).await?;
                }
                Ok(())
            })
        });
        refer.await
    }

    /// Who makes what the caller makes.
    fn origin(caller: &Principal) -> Origin {
        Origin { by: caller.name.clone(), attempt: caller.attempt() }
    }
}

/// Pieces that end with an error when together they are not the artifact.
fn checked(pieces: Pieces, artifact: &Artifact) -> Pieces {
    use futures_util::{StreamExt as _, stream};
    let wanted = artifact.key.digest;
    let state = Some((pieces, Hasher::default()));
    let checked = stream::unfold(state, move |state| async move {
        let (mut pieces, mut hasher) = state?;
        match pieces.next().await {
            Some(Ok(piece)) => {
                hasher.update(&piece);
                Some((Ok(piece), Some((pieces, hasher))))
            }
            Some(Err(error)) => Some((Err(error), None)),
            None if hasher.finish() == wanted => None,
            None => Some((Err(crate::blob::Error::Damaged(wanted)), None)),
        }
    });
    checked.boxed()
}

/// The stored bytes are not the artifact's any more.
fn damaged(id: ArtifactId) -> Error {
    let message = format!("the stored bytes of artifact `{id}` are damaged");
    Error::new(Kind::Internal, Reason::ArtifactDamaged, message).with("artifact_id", id)
}
