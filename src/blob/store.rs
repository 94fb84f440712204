//! Where artifacts' bytes lie: local files or a bucket, with one behaviour.
//!
//! Bytes arrive as an *upload*, under a name that the server made, and nobody sees them. Once their
//! digest is known and wanted, they are *kept* under it, whole, in one step. Whoever keeps the
//! references deletes what nobody refers to any more.

use std::{collections::HashSet, fmt, path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::stream::BoxStream;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

#[cfg(feature = "s3")]
use super::s3::{self, Bucket};
use super::{
    Blobs, Digest, Error,
    files::{self, Files},
    hash::Hasher,
};

/// The bytes of a blob, in order.
pub type Pieces = BoxStream<'static, Result<Bytes, Error>>;

/// The place of complete bytes: a kind, which is a prefix of its own, their digest, and which of
/// the times it is that these bytes are kept.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// Letters, digits and dashes.
    pub kind: String,
    /// Of the bytes.
    pub digest: Digest,
    /// Hexadecimal digits that no two times have in common, so that whoever deletes what was kept
    /// once, however late, deletes nothing that was kept since. Empty for bytes of versions that had
    /// none.
    pub generation: String,
}

impl Key {
    /// The part of the key that follows the kind, as one word.
    pub fn name(&self) -> String {
        match self.generation.as_str() {
            "" => self.digest.to_string(),
            generation => format!("{}-{generation}", self.digest),
        }
    }

    /// The key of that kind and name; `None` when none has such a name.
    pub fn named(kind: &str, name: &str) -> Option<Self> {
        let (digest, generation) = match name.split_once('-') {
            Some((digest, generation)) if !generation.is_empty() => (digest, generation),
            Some(_) => return None,
            None => (name, ""),
        };
        let is_sound = generation.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        let digest = digest.parse().ok().filter(|_| is_sound)?;
        Some(Self { kind: kind.to_owned(), digest, generation: generation.to_owned() })
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.name();
        write!(f, "{}/{}/{}", self.kind, &name[..2], &name[2..])
    }
}

/// Bytes that are to come.
#[derive(Clone, Debug)]
pub struct Upload {
    /// Its name.
    pub id: Uuid,
    /// Of the bytes, when it was announced.
    pub digest: Option<Digest>,
    /// Where they will be kept, when that is known already: a bucket takes their parts there.
    pub place: Option<Key>,
    /// Their number, when it was announced.
    pub size: Option<u64>,
}

/// How far an upload has come: what a resumption needs to know, on stable storage before the
/// checkpoint is given out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// Of the bytes that are safe.
    pub(super) hasher: Hasher,
    /// Parts of a bucket's multipart upload.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) multipart: Option<Multipart>,
}

impl Checkpoint {
    /// Number of bytes that are safe.
    pub fn received(&self) -> u64 {
        self.hasher.length()
    }
}

/// What a bucket knows of an upload of several parts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Multipart {
    /// The bucket's name for it.
    pub id: String,
    /// Where its object will be.
    pub object: String,
    /// The bucket's tags of the parts that it has, in order.
    pub tags: Vec<String>,
}

/// One HTTP request that puts the whole of an upload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Presigned {
    /// Method.
    pub method: String,
    /// Where to.
    pub url: String,
    /// Headers that are part of the signature.
    pub headers: Vec<(String, String)>,
}

/// Where artifacts' bytes lie; clones share it.
#[derive(Clone)]
pub struct Store {
    kind: Kind,
    /// Uploads that a writer is open on.
    open: Arc<Mutex<HashSet<Uuid>>>,
}

#[derive(Clone)]
enum Kind {
    Files(Files),
    #[cfg(feature = "s3")]
    Bucket(Bucket),
}

/// Keeps other writers from an upload for as long as anything can still be written to it.
#[derive(Debug)]
pub(super) struct Claim {
    open: Arc<Mutex<HashSet<Uuid>>>,
    id: Uuid,
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.open.lock().remove(&self.id);
    }
}

impl Store {
    /// A directory of files, made when it is missing. One process uses it at a time.
    pub async fn files(root: &Path) -> Result<Self, Error> {
        Ok(Self { kind: Kind::Files(Files::open(root).await?), open: Arc::default() })
    }

    /// A bucket; refused when it cannot be reached or does not exist.
    #[cfg(feature = "s3")]
    pub async fn bucket(settings: &s3::Settings) -> Result<Self, Error> {
        Ok(Self {
            kind: Kind::Bucket(Box::pin(Bucket::open(settings)).await?),
            open: Arc::default(),
        })
    }

    /// The directory of files as it is, for reads beside the process that uses it.
    pub fn look_into(root: &Path) -> Self {
        Self { kind: Kind::Files(Files::look_into(root)), open: Arc::default() }
    }

    /// Blobs of another owner in the same bucket, below a prefix of their own; `None` where there
    /// is no bucket.
    pub fn blobs_beside(&self, name: &'static str) -> Option<Blobs> {
        match &self.kind {
            Kind::Files(_) => {
                let _ = name;
                None
            }
            #[cfg(feature = "s3")]
            Kind::Bucket(bucket) => Some(Blobs::bucket(bucket.clone(), name)),
        }
    }

    /// A bucket of the server that tests start.
    #[cfg(all(test, feature = "s3"))]
    pub(crate) async fn test_bucket(addr: std::net::SocketAddr) -> Self {
        let bucket = Box::pin(Bucket::open_test(addr, "some/prefix")).await.expect("a bucket");
        Self { kind: Kind::Bucket(bucket), open: Arc::default() }
    }

    /// Begins an upload, or goes on with one from a checkpoint.
    pub async fn open(
        &self,
        upload: Upload,
        checkpoint: Option<Checkpoint>,
    ) -> Result<Writer, Error> {
        if !self.open.lock().insert(upload.id) {
            return Err(Error::Busy(upload.id));
        }
        let claim = Arc::new(Claim { open: self.open.clone(), id: upload.id });
        Ok(match &self.kind {
            Kind::Files(files) => {
                Writer::File(Box::new(files.writer(&upload, checkpoint, claim).await?))
            }
            #[cfg(feature = "s3")]
            Kind::Bucket(bucket) => {
                Writer::Bucket(Box::new(s3::Writer::new(bucket.clone(), upload, checkpoint, claim)))
            }
        })
    }

    /// Keeps bytes that are in memory; they are on stable storage when this returns.
    pub async fn put(&self, key: &Key, bytes: Bytes) -> Result<(), Error> {
        match &self.kind {
            Kind::Files(files) => files.put(key, bytes).await,
            #[cfg(feature = "s3")]
            Kind::Bucket(bucket) => Box::pin(bucket.put(key, bytes)).await,
        }
    }

    /// Removes whatever there is of an upload.
    pub async fn remove(
        &self,
        upload: &Upload,
        checkpoint: Option<Checkpoint>,
    ) -> Result<(), Error> {
        if self.open.lock().contains(&upload.id) {
            return Err(Error::Busy(upload.id));
        }
        match &self.kind {
            Kind::Files(files) => {
                let _ = checkpoint;
                files.remove(upload.id).await
            }
            #[cfg(feature = "s3")]
            Kind::Bucket(bucket) => Box::pin(bucket.remove(upload.id, checkpoint)).await,
        }
    }

    /// A request with which somebody else puts the whole of an upload of announced size and
    /// digest; `None` where the store takes no requests, or not so large ones.
    pub async fn presign(
        &self,
        upload: &Upload,
        expires_in: Duration,
    ) -> Result<Option<Presigned>, Error> {
        match &self.kind {
            Kind::Files(_) => {
                let _ = (upload, expires_in);
                Ok(None)
            }
            #[cfg(feature = "s3")]
            Kind::Bucket(bucket) => Box::pin(bucket.presign(upload, expires_in)).await,
        }
    }

    /// Whether others put bytes here by themselves, with presigned requests.
    pub fn takes_requests(&self) -> bool {
        !matches!(self.kind, Kind::Files(_))
    }

    /// Whether an upload that knows its place is written there from the beginning.
    pub fn writes_in_place(&self) -> bool {
        !matches!(self.kind, Kind::Files(_))
    }

    /// What a presigned request has put: its size, and its digest as the bucket checked it or as it
    /// was read here. `None` when nothing was put.
    pub async fn inspect(&self, upload: &Upload) -> Result<Option<(u64, Digest)>, Error> {
        match &self.kind {
            Kind::Files(_) => {
                let _ = upload;
                Ok(None)
            }
            #[cfg(feature = "s3")]
            Kind::Bucket(bucket) => Box::pin(bucket.inspect(upload.id)).await,
        }
    }

    /// Keeps what a presigned request has put.
    pub async fn promote(&self, upload: &Upload, key: &Key) -> Result<(), Error> {
        match &self.kind {
            Kind::Files(_) => {
                let _ = upload;
                Err(Error::NotFound(key.digest))
            }
            #[cfg(feature = "s3")]
            Kind::Bucket(bucket) => Box::pin(bucket.promote(upload.id, key)).await,
        }
    }

    /// `length` bytes of a blob from `offset`; not checked against the digest.
    pub async fn read(&self, key: &Key, offset: u64, length: u64) -> Result<Pieces, Error> {
        match &self.kind {
            Kind::Files(files) => files.read(key, offset, length).await,
            #[cfg(feature = "s3")]
            Kind::Bucket(bucket) => Box::pin(bucket.read(key, offset, length)).await,
        }
    }

    /// Size of a blob; `None` when there is none.
    pub async fn size(&self, key: &Key) -> Result<Option<u64>, Error> {
        match &self.kind {
            Kind::Files(files) => files.size(key).await,
            #[cfg(feature = "s3")]
            Kind::Bucket(bucket) => Box::pin(bucket.size(key)).await,
        }
    }

    /// Deletes a blob; says whether it was there, where the store knows.
    pub async fn delete(&self, key: &Key) -> Result<(), Error> {
        match &self.kind {
            Kind::Files(files) => files.delete(key).await,
            #[cfg(feature = "s3")]
            Kind::Bucket(bucket) => Box::pin(bucket.delete(key)).await,
        }
    }
}

/// Takes the bytes of one upload, with little memory however many they are.
pub enum Writer {
    /// Into a file.
    File(Box<files::Writer>),
    /// Into a bucket.
    #[cfg(feature = "s3")]
    Bucket(Box<s3::Writer>),
}

impl Writer {
    /// Takes the next bytes. Now and then more of them have become safe, and the checkpoint to
    /// note is returned.
    pub async fn write(&mut self, bytes: Bytes) -> Result<Option<Checkpoint>, Error> {
        match self {
            Self::File(writer) => writer.write(bytes).await,
            #[cfg(feature = "s3")]
            Self::Bucket(writer) => Box::pin(writer.write(bytes)).await,
        }
    }

    /// Stops before the end, and makes as much safe as can be.
    pub async fn pause(self) -> Result<Option<Checkpoint>, Error> {
        match self {
            Self::File(writer) => writer.pause().await.map(Some),
            #[cfg(feature = "s3")]
            Self::Bucket(writer) => Box::pin(writer.pause()).await,
        }
    }

    /// All bytes have come.
    pub async fn finish(self) -> Result<Sealed, Error> {
        Ok(match self {
            Self::File(writer) => {
                let (digest, size, end) = writer.finish().await?;
                Sealed { digest, size, end: End::File(end) }
            }
            #[cfg(feature = "s3")]
            Self::Bucket(writer) => {
                let (digest, size, end) = Box::pin(writer.finish()).await?;
                Sealed { digest, size, end: End::Bucket(Box::new(end)) }
            }
        })
    }
}

/// An upload whose bytes have all come and that nobody can see yet.
pub struct Sealed {
    /// SHA-256 of the bytes.
    pub digest: Digest,
    /// Number of the bytes.
    pub size: u64,
    end: End,
}

enum End {
    File(files::End),
    #[cfg(feature = "s3")]
    Bucket(Box<s3::End>),
}

impl Sealed {
    /// Keeps the bytes, whole, on stable storage. The digest of `key` must be theirs.
    pub async fn keep(self, key: &Key) -> Result<(), Error> {
        match self.end {
            End::File(end) => end.keep(key).await,
            #[cfg(feature = "s3")]
            End::Bucket(end) => Box::pin(end.keep(key)).await,
        }
    }

    /// Removes the bytes.
    pub async fn discard(self) -> Result<(), Error> {
        match self.end {
            End::File(end) => end.discard().await,
            #[cfg(feature = "s3")]
            End::Bucket(end) => Box::pin(end.discard()).await,
        }
    }
}
