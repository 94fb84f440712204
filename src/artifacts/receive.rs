//! The bytes of an upload as they come, with its progress noted now and then.

use bytes::Bytes;

use super::{
    Artifacts,
    keep::{mismatch, unwritable},
    model::{Artifact, Upload},
};
use crate::{
    blob::Writer,
    error::{Error, Kind, Reason, Result},
    id::UploadId,
    keys::Principal,
};

/// Takes the bytes of one upload. Dropped before its end, what was noted is kept, for whoever goes
/// on.
pub struct Receiver {
    artifacts: Artifacts,
    upload: Upload,
    writer: Writer,
    /// Bytes that have come, safe or not.
    received: u64,
}

impl Artifacts {
    /// Goes on with an upload of the caller: from its beginning, or from where it is.
    pub async fn resume(&self, caller: &Principal, id: UploadId, offset: u64) -> Result<Receiver> {
        self.0.db.check_admission()?;
        let upload = self.upload(caller, id).await?;
        if let Some(artifact) = upload.artifact {
            let message = format!("upload `{id}` is complete: it is artifact `{artifact}`");
            return Err(Error::state_conflict("upload", id, "COMPLETE", message));
        }
        self.receive(upload, offset).await
    }

    /// Takes the bytes of an upload from `offset` on.
    pub async fn receive(&self, mut upload: Upload, offset: u64) -> Result<Receiver> {
        if offset == 0 {
            upload.checkpoint = None;
        } else if offset != upload.received {
            let what = format!(
                "must be 0 or {}, the received_bytes of the upload, not {offset}",
                upload.received
            );
            return Err(Error::invalid("upload.offset", what));
        }
        let writer = self.open(&upload).await?;
        Ok(Receiver { artifacts: self.clone(), upload, writer, received: offset })
    }
}

impl Receiver {
    /// Takes the next bytes.
    pub async fn write(&mut self, bytes: Bytes) -> Result<()> {
        self.received += bytes.len() as u64;
        self.artifacts.check_size(self.received)?;
        if let Some(size) = self.upload.spec.size.filter(|size| self.received > *size) {
            return Err(mismatch("size_bytes", size, self.received));
        }
        if let Some(checkpoint) = self.writer.write(bytes).await.map_err(unwritable)? {
            self.artifacts.note(self.upload.id, Some(checkpoint)).await?;
        }
        Ok(())
    }

    /// Keeps as much as can be kept of what came, for whoever goes on.
    pub async fn pause(self) -> Result<u64> {
        let checkpoint = self.writer.pause().await.map_err(unwritable)?;
        let received = checkpoint.as_ref().map_or(0, crate::blob::Checkpoint::received);
        self.artifacts.note(self.upload.id, checkpoint).await?;
        Ok(received)
    }

    /// All bytes have come: makes the artifact.
    pub async fn finish(self) -> Result<Artifact> {
        if let Some(size) = self.upload.spec.size.filter(|size| self.received < *size) {
            let (id, came) = (self.upload.id, self.received);
            let kept = self.pause().await?;
            let message = format!("{came} of {size} bytes of upload `{id}` came; go on at {kept}");
            return Err(Error::new(Kind::InvalidArgument, Reason::DigestMismatch, message)
                .with("expected", size)
                .with("found", came));
        }
        let sealed = self.writer.finish().await.map_err(unwritable)?;
        self.artifacts.seal(&self.upload, sealed).await
    }
}
