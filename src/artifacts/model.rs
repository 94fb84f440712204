//! Artifacts and uploads as the server knows them.

use std::time::Duration;

use crate::{
    blob::{Checkpoint, Digest, Key, Upload as Bytes},
    clock::Micros,
    id::{ArtifactId, Namespace, TaskId, UploadId},
};

/// Complete bytes with a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Artifact {
    /// Identifier.
    pub id: ArtifactId,
    /// Tenant.
    pub namespace: Namespace,
    /// For people.
    pub name: String,
    /// Media type.
    pub mime_type: String,
    /// Type, digest and generation: where the bytes are.
    pub key: Key,
    /// In bytes.
    pub size: u64,
    /// Who made it.
    pub origin: Origin,
    /// Made.
    pub create_time: Micros,
    /// Deleted then; with its task when `None`, or never.
    pub expire_time: Option<Micros>,
}

/// Who makes an artifact.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// Name of the credential.
    pub by: String,
    /// The attempt, where its token is the credential.
    pub attempt: Option<(TaskId, u32)>,
}

/// What an artifact shall be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    /// For people.
    pub name: String,
    /// Kind of content; a prefix of the store.
    pub kind: String,
    /// Media type.
    pub mime_type: String,
    /// In bytes, where announced.
    pub size: Option<u64>,
    /// Of the bytes, where announced.
    pub digest: Option<Digest>,
    /// Lives this long.
    pub ttl: Option<Duration>,
}

/// Bytes on their way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Upload {
    /// Identifier.
    pub id: UploadId,
    /// Tenant.
    pub namespace: Namespace,
    /// What they shall be.
    pub spec: Spec,
    /// Who began it.
    pub origin: Origin,
    /// Began.
    pub create_time: Micros,
    /// Ends by itself.
    pub expire_time: Micros,
    /// Bytes that are safe.
    pub received: u64,
    /// How to go on.
    pub checkpoint: Option<Checkpoint>,
    /// What it became.
    pub artifact: Option<ArtifactId>,
}

impl Upload {
    /// As the store of bytes wants it.
    pub fn bytes(&self) -> Bytes {
        let Spec { digest, size, .. } = self.spec;
        Bytes { id: self.id.0, digest, place: None, size }
    }
}

/// What a collection deleted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    /// Artifacts.
    pub artifacts: u64,
    /// Uploads.
    pub uploads: u64,
    /// Bytes of artifacts, as files.
    pub files: u64,
    /// Their size.
    pub bytes: u64,
}
