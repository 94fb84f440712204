//! From bytes to an artifact: checked against what was announced, kept, and only then listed.

use std::time::Duration;

use bytes::Bytes;

use super::{
    Artifacts,
    model::{Artifact, Origin, Spec, Upload},
    store::{self, Lease, stored, uploads},
};
use crate::{
    blob::{self, Digest, Key, Presigned, hash::Hasher},
    clock::Micros,
    db::Tx,
    error::{Error, Kind, Reason, Result},
    faults::{self, Fault},
    id::{ArtifactId, Namespace, UploadId},
    keys::{Claims, Grant, Principal},
};

/// A request that puts bytes lives this long.
const REQUEST_TTL: Duration = Duration::from_mins(15);

/// Where the whole of an upload can be put, until when.
pub struct Target {
    /// The request.
    pub request: Presigned,
    /// Works until then.
    pub expire_time: Micros,
}

impl Artifacts {
    /// Begins an upload. One that the caller announced in the same words goes on instead.
    pub async fn begin(&self, caller: &Principal, spec: Spec) -> Result<Upload> {
        self.0.db.check_admission()?;
        self.check_size(spec.size.unwrap_or(0))?;
        let now = self.0.clock.now();
        let upload = Upload {
            id: UploadId::new(now, &self.0.entropy),
            namespace: caller.namespace.clone(),
            spec,
            origin: Self::origin(caller),
            create_time: now,
            expire_time: now + self.0.limits.upload_ttl,
            received: 0,
            checkpoint: None,
            artifact: None,
        };
        let artifacts = self.clone();
        let begun = self.0.db.write(move |tx| {
            Box::pin(async move {
                check_lease(tx, &upload.namespace, &upload.origin, Lease::Held).await?;
                if upload.spec.digest.is_some()
                    && let Some(found) = uploads::find_alike(tx, &upload, now).await?
                {
                    return Ok(found);
                }
                artifacts.check_room(tx, &upload.namespace, upload.spec.size.unwrap_or(0)).await?;
                let most = artifacts.0.limits.max_uploads;
                if uploads::count_open(tx, &upload.namespace, now).await? >= most {
                    let message = format!(
                        "the namespace has {most} uploads that are not complete; complete or delete some"
                    );
                    return Err(refused("uploads", message));
                }
                uploads::insert(tx, &upload).await?;
                Ok(upload)
            })
        });
        begun.await
    }

    /// An upload that the caller may go on with.
    pub async fn upload(&self, caller: &Principal, id: UploadId) -> Result<Upload> {
        caller.check_upload(id)?;
        let (namespace, attempt) = (caller.namespace.clone(), caller.attempt());
        let now = self.0.clock.now();
        let read = self.0.db.read(move |tx| {
            Box::pin(async move {
                let upload = uploads::get(tx, &namespace, id, now).await?;
                if attempt.is_some() && upload.origin.attempt != attempt {
                    return Err(Error::not_found("upload", id));
                }
                Ok(upload)
            })
        });
        read.await
    }

    /// Whether the caller's namespace has the bytes of an upload already.
    pub async fn has_bytes(&self, upload: &Upload) -> Result<bool> {
        let Some(digest) = upload.spec.digest else { return Ok(false) };
        let (namespace, kind) = (upload.namespace.clone(), upload.spec.kind.clone());
        let read = self.0.db.read(move |tx| {
            Box::pin(async move { store::has_bytes(tx, &namespace, &kind, digest).await })
        });
        read.await
    }

    /// Where the whole of an upload can be put with one request.
    pub async fn target(&self, caller: &Principal, upload: &Upload) -> Result<Option<Target>> {
        let now = self.0.clock.now();
        let expire_time = (now + REQUEST_TTL).min(upload.expire_time);
        if self.0.store.takes_requests() {
            let expires_in = expire_time.since(now);
            let request = self.0.store.presign(&upload.bytes(), expires_in).await;
            return Ok(request.map_err(unwritable)?.map(|request| Target { request, expire_time }));
        }
        let token = self.0.signer.sign(&Claims {
            namespace: upload.namespace.clone(),
            grant: Grant::Upload(upload.id),
            key_id: caller.key_id.clone(),
            expire_time,
        });
        let base = &self.0.public_url;
        let request = Presigned {
            method: "PUT".into(),
            url: format!("{base}/v1/uploads/{}/content?access_token={token}", upload.id),
            headers: Vec::new(),
        };
        Ok(Some(Target { request, expire_time }))
    }

    /// Makes an artifact of bytes that are in memory.
    pub async fn put(&self, caller: &Principal, spec: Spec, bytes: Bytes) -> Result<Artifact> {
        self.0.db.check_admission()?;
        let mut hasher = Hasher::default();
        hasher.update(&bytes);
        let (digest, size) = (hasher.finish(), bytes.len() as u64);
        check_announced(&spec, digest, size)?;
        let new = self.new_artifact(&caller.namespace, &spec, Self::origin(caller), digest, size);
        self.commit(new, None, async |key| self.0.store.put(&key, bytes).await).await
    }

    /// Makes an artifact of an upload whose bytes are there; returns the same one ever after.
    pub async fn complete(&self, caller: &Principal, id: UploadId) -> Result<Artifact> {
        let upload = self.upload(caller, id).await?;
        if let Some(artifact) = upload.artifact {
            return self.get_own(&upload.namespace, artifact).await;
        }
        if self.has_bytes(&upload).await?
            && let (Some(digest), Some(size)) = (upload.spec.digest, upload.spec.size)
        {
            // From here on nobody deletes them; they may have been deleted until here.
            let there = async |key| match self.0.store.size(&key).await? {
                Some(found) if found == size => Ok(()),
                _ => Err(blob::Error::NotFound(digest)),
            };
            return self.finish(&upload, digest, size, there).await;
        }
        if upload.spec.size == Some(upload.received) {
            // All of it came in pieces, and whoever sent it did not get to its end.
            let sealed = self.open(&upload).await?.finish().await.map_err(unwritable)?;
            return self.seal(&upload, sealed).await;
        }
        let bytes = upload.bytes();
        let Some((size, digest)) = self.0.store.inspect(&bytes).await.map_err(unwritable)? else {
            let size = upload.spec.size.unwrap_or(0);
            let message = format!(
                "{} of {size} bytes of upload `{id}` are there; put the rest first",
                upload.received
            );
            return Err(Error::state_conflict("upload", id, "INCOMPLETE", message));
        };
        if let Err(error) = check_announced(&upload.spec, digest, size) {
            // What is wrong is not kept; the right bytes may still come.
            self.0.store.remove(&bytes, None).await.map_err(unwritable)?;
            return Err(error);
        }
        let promote = async |key| self.0.store.promote(&bytes, &key).await;
        self.finish(&upload, digest, size, promote).await
    }

    /// Ends an upload that nobody completed.
    pub async fn abandon(&self, caller: &Principal, id: UploadId) -> Result<()> {
        let upload = match self.upload(caller, id).await {
            Err(error) if error.kind() == Kind::NotFound => return Ok(()),
            found => found?,
        };
        let removed = self.0.store.remove(&upload.bytes(), upload.checkpoint.clone()).await;
        removed.map_err(unwritable)?;
        self.0.db.write(move |tx| Box::pin(async move { uploads::delete(tx, id).await })).await
    }

    /// Makes an artifact of an upload that came in pieces, or says what is wrong with it.
    pub(super) async fn seal(&self, upload: &Upload, sealed: blob::Sealed) -> Result<Artifact> {
        let (digest, size) = (sealed.digest, sealed.size);
        if let Err(error) = check_announced(&upload.spec, digest, size) {
            sealed.discard().await.map_err(unwritable)?;
            self.note(upload.id, None).await?;
            return Err(error);
        }
        self.finish(upload, digest, size, async |key| sealed.keep(&key).await).await
    }

    /// A writer that goes on where the upload is.
    pub(super) async fn open(&self, upload: &Upload) -> Result<blob::Writer> {
        let mut bytes = upload.bytes();
        if let Some(digest) = upload.spec.digest.filter(|_| self.0.store.writes_in_place()) {
            let new = self.new_key(&upload.spec.kind, digest);
            let (size, now) = (upload.spec.size.unwrap_or(0), self.0.clock.now());
            let touch = self
                .0
                .db
                .write(move |tx| Box::pin(async move { stored::touch(tx, new, size, now).await }));
            bytes.place = Some(touch.await?);
        }
        let opened = self.0.store.open(bytes, upload.checkpoint.clone()).await;
        opened.map_err(unwritable)
    }

    /// A key of bytes that are in no store.
    fn new_key(&self, kind: &str, digest: Digest) -> Key {
        let generation = format!("{:016x}", self.0.entropy.u64());
        Key { kind: kind.to_owned(), digest, generation }
    }

    /// Notes how far an upload has come.
    pub(super) async fn note(
        &self,
        id: UploadId,
        checkpoint: Option<blob::Checkpoint>,
    ) -> Result<()> {
        let note = self.0.db.write(move |tx| {
            Box::pin(async move { uploads::note(tx, id, checkpoint.as_ref()).await })
        });
        note.await
    }

    async fn finish(
        &self,
        upload: &Upload,
        digest: Digest,
        size: u64,
        keep: impl AsyncFnOnce(Key) -> Result<(), blob::Error>,
    ) -> Result<Artifact> {
        let (spec, origin) = (&upload.spec, upload.origin.clone());
        let new = self.new_artifact(&upload.namespace, spec, origin, digest, size);
        match self.commit(new, Some(upload.id), keep).await {
            // Somebody else completed it at the same time.
            Err(error) if error.reason() == Reason::Conflict => {
                let (namespace, id, now) =
                    (upload.namespace.clone(), upload.id, self.0.clock.now());
                let row = self.0.db.read(move |tx| {
                    Box::pin(async move { uploads::get(tx, &namespace, id, now).await })
                });
                match row.await?.artifact {
                    Some(artifact) => self.get_own(&upload.namespace, artifact).await,
                    None => Err(error),
                }
            }
            committed => committed,
        }
    }

    async fn get_own(&self, namespace: &Namespace, id: ArtifactId) -> Result<Artifact> {
        let namespace = namespace.clone();
        let read = self
            .0
            .db
            .read(move |tx| Box::pin(async move { store::get_any(tx, &namespace, id).await }));
        read.await
    }

    pub(super) fn new_artifact(
        &self,
        namespace: &Namespace,
        spec: &Spec,
        origin: Origin,
        digest: Digest,
        size: u64,
    ) -> Artifact {
        let now = self.0.clock.now();
        // The output of a task lives as long as its task.
        let default = Some(self.0.limits.ttl).filter(|ttl| !ttl.is_zero());
        let default = default.filter(|_| origin.attempt.is_none());
        Artifact {
            id: ArtifactId::new(now, &self.0.entropy),
            namespace: namespace.clone(),
            name: spec.name.clone(),
            mime_type: spec.mime_type.clone(),
            key: self.new_key(&spec.kind, digest),
            size,
            origin,
            create_time: now,
            expire_time: spec.ttl.or(default).map(|ttl| now + ttl),
        }
    }

    /// Keeps the bytes of `new` at their key, then lists it.
    pub(super) async fn commit(
        &self,
        mut new: Artifact,
        upload: Option<UploadId>,
        keep: impl AsyncFnOnce(Key) -> Result<(), blob::Error>,
    ) -> Result<Artifact> {
        self.check_size(new.size)?;
        new.key = self.reserve(&new).await?;
        keep(new.key.clone()).await.map_err(unwritable)?;
        let artifacts = self.clone();
        let listed = self.0.db.write(move |tx| {
            Box::pin(async move {
                check_lease(tx, &new.namespace, &new.origin, Lease::Held).await?;
                artifacts.check_room(tx, &new.namespace, new.size).await?;
                let now = artifacts.0.clock.now();
                if !stored::confirm(tx, &new.key, new.size, now).await? {
                    // What was kept after it was condemned, somebody must delete again.
                    stored::discard(tx, &new.key, now).await?;
                    return Ok(None);
                }
                if let Some(upload) = upload
                    && !uploads::complete(tx, upload, new.id, new.size).await?
                {
                    let message = format!("upload `{upload}` ended at the same time");
                    return Err(Error::new(Kind::Aborted, Reason::Conflict, message));
                }
                store::insert(tx, &new).await?;
                Ok(Some(new))
            })
        });
        listed.await?.ok_or_else(too_slow)
    }

    /// Makes sure that the bytes to be kept have a row, and that nobody deletes them; returns their
    /// key.
    async fn reserve(&self, new: &Artifact) -> Result<Key> {
        let (artifacts, new) = (self.clone(), new.clone());
        let touch = self.0.db.write(move |tx| {
            Box::pin(async move {
                check_lease(tx, &new.namespace, &new.origin, Lease::Held).await?;
                artifacts.check_room(tx, &new.namespace, new.size).await?;
                stored::touch(tx, new.key, new.size, artifacts.0.clock.now()).await
            })
        });
        touch.await
    }

    /// Refuses what is larger than an artifact may be.
    pub(super) fn check_size(&self, size: u64) -> Result<()> {
        let most = self.0.limits.max_size;
        if size <= most {
            return Ok(());
        }
        let message = format!("an artifact may have at most {most} bytes");
        Err(Error::new(Kind::ResourceExhausted, Reason::MessageTooLarge, message)
            .with("limit_bytes", most))
    }

    async fn check_room(&self, tx: &mut Tx, namespace: &Namespace, more: u64) -> Result<()> {
        let most = self.0.limits.max_per_namespace;
        if most == 0 {
            return Ok(());
        }
        let used = store::hold_usage(tx, namespace).await?;
        if used.saturating_add(more) <= most {
            return Ok(());
        }
        let message = format!(
            "the namespace keeps {used} of {most} bytes, and {more} more do not fit; delete artifacts"
        );
        Err(refused("artifact_bytes", message))
    }
}

fn refused(policy: &'static str, message: String) -> Error {
    Error::new(Kind::ResourceExhausted, Reason::AdmissionReject, message)
        .with("policy_label", policy)
        .retry_after(Duration::from_mins(1))
}

fn too_slow() -> Error {
    let message = "the bytes took so long to be kept that they are deleted again; try again";
    Error::new(Kind::Unavailable, Reason::Conflict, message).retry_after(Duration::from_secs(1))
}

/// An attempt makes and reads artifacts only while it holds its lease.
pub(super) async fn check_lease(
    tx: &mut Tx,
    namespace: &Namespace,
    origin: &Origin,
    lease: Lease,
) -> Result<()> {
    let Some((task, attempt)) = origin.attempt else { return Ok(()) };
    if store::runs(tx, namespace, (task, attempt), lease).await? {
        return Ok(());
    }
    let message = format!("the lease of `{task}/{attempt}` has ended; stop that work");
    Err(Error::new(Kind::FailedPrecondition, Reason::LeaseLost, message)
        .with("task_id", task)
        .with("attempt", attempt))
}

/// Refuses bytes that are not those that were announced.
fn check_announced(spec: &Spec, digest: Digest, size: u64) -> Result<()> {
    if faults::planted(Fault::ListUnverifiedUploads) {
        return Ok(());
    }
    if let Some(expected) = spec.size.filter(|expected| *expected != size) {
        return Err(mismatch("size_bytes", expected, size));
    }
    match spec.digest {
        Some(expected) if expected != digest => Err(mismatch("sha256", expected, digest)),
        _ => Ok(()),
    }
}

/// Bytes differ from what was announced.
pub(super) fn mismatch(
    field: &str,
    expected: impl std::fmt::Display,
    found: impl std::fmt::Display,
) -> Error {
    let message = format!("{field}: {expected} was announced and {found} came; nothing was kept");
    Error::new(Kind::InvalidArgument, Reason::DigestMismatch, message)
        .with("expected", expected)
        .with("found", found)
}

/// The store of bytes did not take or give any.
pub(super) fn unwritable(error: blob::Error) -> Error {
    match error {
        blob::Error::Busy(id) => {
            let message =
                format!("upload `{id}` is being written by another call; wait for it to end");
            Error::state_conflict("upload", id, "BUSY", message)
        }
        blob::Error::TooLarge(most) => {
            let what = format!("must be announced for more than {most} bytes");
            Error::invalid("spec.sha256", what)
        }
        error => Error::storage(error),
    }
}

/// The bytes of an artifact could not be read.
pub(super) fn unreadable(id: ArtifactId, error: blob::Error) -> Error {
    match error {
        blob::Error::NotFound(_) | blob::Error::Damaged(_) => super::damaged(id).caused_by(error),
        error => Error::storage(error),
    }
}
