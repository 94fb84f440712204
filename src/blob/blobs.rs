//! Blobs of one owner: in a directory of its own, or in a bucket that several servers share.

use bytes::Bytes;

#[cfg(feature = "s3")]
use super::s3::Bucket;
use super::{Digest, Error, fs::Directory};
use crate::clock::Micros;

/// Where blobs are kept; clones share it.
#[derive(Clone, Debug)]
pub struct Blobs(Kind);

#[derive(Clone, Debug)]
enum Kind {
    Directory(Directory),
    /// Below a prefix of its own.
    #[cfg(feature = "s3")]
    Bucket(Bucket, &'static str),
}

/// A blob that is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Its name.
    pub digest: Digest,
    /// When it was put last, where somebody else than the owner may have put it.
    pub put: Option<Micros>,
}

impl Blobs {
    /// Opens the directory `root`, making it when it is missing. One process uses it at a time.
    pub async fn open(root: impl Into<std::path::PathBuf>) -> Result<Self, Error> {
        Directory::open(root.into()).await.map(|directory| Self(Kind::Directory(directory)))
    }

    /// The directory `root` as it is, for reads beside the process that uses it.
    pub fn look_into(root: impl Into<std::path::PathBuf>) -> Self {
        Self(Kind::Directory(Directory::look_into(root.into())))
    }

    #[cfg(feature = "s3")]
    pub(super) fn bucket(bucket: Bucket, name: &'static str) -> Self {
        Self(Kind::Bucket(bucket, name))
    }

    /// Whether several servers may use them at a time.
    pub fn is_shared(&self) -> bool {
        match &self.0 {
            Kind::Directory(_) => false,
            #[cfg(feature = "s3")]
            Kind::Bucket(..) => true,
        }
    }

    /// Keeps `bytes`; they are on stable storage when this returns.
    pub async fn put(&self, bytes: Bytes) -> Result<Digest, Error> {
        match &self.0 {
            Kind::Directory(directory) => directory.put(bytes).await,
            #[cfg(feature = "s3")]
            Kind::Bucket(bucket, name) => {
                let digest = digest_of(&bytes);
                // Also when it is there: that makes it new again for who collects.
                Box::pin(bucket.put_object(&object(name, digest), bytes)).await?;
                Ok(digest)
            }
        }
    }

    /// The whole blob, checked against its digest.
    pub async fn get(&self, digest: Digest) -> Result<Bytes, Error> {
        match &self.0 {
            Kind::Directory(directory) => directory.get(digest).await,
            #[cfg(feature = "s3")]
            Kind::Bucket(bucket, name) => {
                let object = object(name, digest);
                let size = Box::pin(bucket.object_size(&object)).await?;
                let size = size.ok_or(Error::NotFound(digest))?;
                let bytes = Box::pin(bucket.object_range(&object, digest, 0, size)).await?;
                if digest_of(&bytes) != digest {
                    return Err(Error::Damaged(digest));
                }
                Ok(bytes)
            }
        }
    }

    /// `length` bytes of a blob from `offset`; not checked against the digest.
    pub async fn range(&self, digest: Digest, offset: u64, length: u64) -> Result<Bytes, Error> {
        match &self.0 {
            Kind::Directory(directory) => directory.range(digest, offset, length).await,
            #[cfg(feature = "s3")]
            Kind::Bucket(bucket, name) => {
                Box::pin(bucket.object_range(&object(name, digest), digest, offset, length)).await
            }
        }
    }

    /// Deletes a blob, if it is there.
    pub async fn delete(&self, digest: Digest) -> Result<(), Error> {
        match &self.0 {
            Kind::Directory(directory) => directory.delete(digest).await.map(drop),
            #[cfg(feature = "s3")]
            Kind::Bucket(bucket, name) => {
                Box::pin(bucket.remove_object(&object(name, digest))).await
            }
        }
    }

    /// The blobs whose digest begins with `shard`.
    pub async fn list(&self, shard: u8) -> Result<Vec<Listed>, Error> {
        match &self.0 {
            Kind::Directory(directory) => {
                let digests = directory.list(shard).await?;
                Ok(digests.into_iter().map(|digest| Listed { digest, put: None }).collect())
            }
            #[cfg(feature = "s3")]
            Kind::Bucket(bucket, name) => {
                let below = format!("{name}/{}/", hex::encode([shard]));
                let found = Box::pin(bucket.list(&below)).await?;
                let blob = |(object, put): (String, Micros)| {
                    let rest = object.strip_prefix(&below)?;
                    let digest = format!("{}{rest}", hex::encode([shard])).parse().ok()?;
                    Some(Listed { digest, put: Some(put) })
                };
                Ok(found.into_iter().filter_map(blob).collect())
            }
        }
    }
}

#[cfg(feature = "s3")]
fn object(name: &str, digest: Digest) -> String {
    let digest = digest.to_string();
    format!("{name}/{}/{}", &digest[..2], &digest[2..])
}

#[cfg(feature = "s3")]
fn digest_of(bytes: &[u8]) -> Digest {
    use sha2::Digest as _;
    Digest(sha2::Sha256::digest(bytes).into())
}

#[cfg(all(test, feature = "s3"))]
mod tests {
    use super::*;
    use crate::blob::{Store, testing::TestServer};

    #[tokio::test]
    async fn blobs_in_a_bucket_are_kept_found_listed_and_deleted_as_in_a_directory() {
        let dir = tempfile::tempdir().unwrap();
        let server = TestServer::start(dir.path()).await;
        let store = Store::test_bucket(server.addr).await;
        let here = Blobs::open(dir.path().join("blobs")).await.unwrap();
        for (blobs, in_bucket) in
            [(store.blobs_beside("transcripts").unwrap(), true), (here, false)]
        {
            let digest = blobs.put("abc".into()).await.unwrap();
            assert_eq!(blobs.put("abc".into()).await.unwrap(), digest);
            assert_eq!(blobs.get(digest).await.unwrap(), "abc");
            assert_eq!(blobs.range(digest, 1, 2).await.unwrap(), "bc");
            for (offset, length) in [(2, 2), (3, 1), (u64::MAX, 2)] {
                let beyond = blobs.range(digest, offset, length).await;
                assert!(matches!(beyond, Err(Error::NotFound(_))), "{offset} {beyond:?}");
            }
            let listed = blobs.list(digest.0[0]).await.unwrap();
            let [Listed { digest: found, put }] = listed[..] else { panic!("{listed:?}") };
            assert_eq!((found, put.is_some()), (digest, in_bucket));
            assert_eq!(blobs.list(!digest.0[0]).await.unwrap(), []);
            blobs.delete(digest).await.unwrap();
            blobs.delete(digest).await.unwrap();
            assert!(matches!(blobs.get(digest).await, Err(Error::NotFound(_))));
            assert_eq!(blobs.list(digest.0[0]).await.unwrap(), []);
        }
    }
}
