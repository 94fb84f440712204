//! Content-addressed bytes: kept under the SHA-256 of what they are, complete or not at
//! all.
//!
//! Knows no task, and no name but a digest: a name that a user chose never gets here.
//! Blobs are never changed, so readers need no lock; what nobody refers to any more is
//! deleted by whoever keeps the references.

mod blobs;
mod files;
mod fs;
pub mod hash;
#[cfg(feature = "s3")]
pub mod s3;
mod store;
#[cfg(all(test, feature = "s3"))]
pub(crate) mod testing;

use std::{fmt, io, str::FromStr};

pub use blobs::{Blobs, Listed};
pub use fs::work_at_once;
pub use store::{Checkpoint, Key, Pieces, Presigned, Sealed, Store, Upload, Writer};

/// The SHA-256 of a blob, which is its name.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(pub [u8; 32]);

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text that is not 64 lower-case hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a SHA-256 in lower-case hexadecimal digits")]
pub struct InvalidDigest;

impl FromStr for Digest {
    type Err = InvalidDigest;
    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let mut digest = [0; 32];
        if s.bytes().any(|byte| byte.is_ascii_uppercase()) {
            return Err(InvalidDigest);
        }
        hex::decode_to_slice(s, &mut digest).map_err(|_| InvalidDigest)?;
        Ok(Self(digest))
    }
}

/// Why a blob could not be kept or given.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No blob has this digest, or it has not as many bytes as were asked for.
    #[error("blob {0} does not exist or is cut off")]
    NotFound(Digest),
    /// The bytes found are not those of the digest.
    #[error("blob {0} is damaged")]
    Damaged(Digest),
    /// Another writer is at this upload.
    #[error("upload {0} is being written")]
    Busy(uuid::Uuid),
    /// One request of the bucket moves no more than this many bytes, and the digest, which makes
    /// that unnecessary, was not announced.
    #[error("a digest must be announced for more than {0} bytes")]
    TooLarge(u64),
    /// The bucket failed or cannot be reached.
    #[error("the bucket failed: {0}")]
    Bucket(String),
    /// The file system failed.
    #[error("the blob directory failed")]
    Io(#[from] io::Error),
}
