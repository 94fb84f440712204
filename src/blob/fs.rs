//! Blobs as files: `<root>/ab/cd…`, by the hexadecimal digits of the digest.
//!
//! A blob is written to a temporary file, synced, renamed to its name, and the directory
//! synced: a name that is there has all its bytes. What a crash left in `tmp` is removed
//! when the directory is opened. Files are opened without following links.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
};

use bytes::Bytes;
use sha2::{Digest as _, Sha256};

use super::{Digest, Error};

/// A directory of blobs; clones share it.
#[derive(Clone, Debug)]
pub(super) struct Directory(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    root: PathBuf,
    temporary: AtomicU64,
}

impl Directory {
    /// The directory `root` as it is.
    pub(super) fn look_into(root: PathBuf) -> Self {
        Self(Arc::new(Inner { root, temporary: AtomicU64::new(0) }))
    }

    /// Opens the directory `root`, making it when it is missing.
    pub(super) async fn open(root: PathBuf) -> Result<Self, Error> {
        blocking(move || {
            let tmp = root.join("tmp");
            make_dir(&root)?;
            match fs::remove_dir_all(&tmp) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
                _ => {}
            }
            make_dir(&tmp)?;
            sync_dir(&root)?;
            Ok(Self(Arc::new(Inner { root, temporary: AtomicU64::new(0) })))
        })
        .await
    }

    /// Keeps `bytes`; they are on stable storage when this returns. Keeping what is kept
    /// already costs no write.
    pub(super) async fn put(&self, bytes: Bytes) -> Result<Digest, Error> {
        let inner = self.0.clone();
        blocking(move || inner.put(&bytes)).await
    }

    /// The whole blob, checked against its digest.
    pub(super) async fn get(&self, digest: Digest) -> Result<Bytes, Error> {
        let inner = self.0.clone();
        blocking(move || {
            let mut bytes = Vec::new();
            inner.file(digest)?.read_to_end(&mut bytes)?;
            if Sha256::digest(&bytes)[..] != digest.0 {
                return Err(Error::Damaged(digest));
            }
            Ok(bytes.into())
        })
        .await
    }

    /// `length` bytes of a blob from `offset`; not checked against the digest.
    pub(super) async fn range(
        &self,
        digest: Digest,
        offset: u64,
        length: u64,
    ) -> Result<Bytes, Error> {
        let inner = self.0.clone();
        blocking(move || {
            let mut file = inner.file(digest)?;
            let end = offset.checked_add(length).filter(|end| match file.metadata() {
                Ok(metadata) => *end <= metadata.len(),
                Err(_) => false,
            });
            if end.is_none() {
                return Err(Error::NotFound(digest));
            }
            let length = usize::try_from(length).map_err(|_| Error::NotFound(digest))?;
            let mut bytes = vec![0; length];
            file.seek(SeekFrom::Start(offset))?;
            file.read_exact(&mut bytes)?;
            Ok(bytes.into())
        })
        .await
    }

    /// Deletes a blob; says whether it was there.
    pub(super) async fn delete(&self, digest: Digest) -> Result<bool, Error> {
        let inner = self.0.clone();
        blocking(move || match fs::remove_file(inner.path(digest)) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error.into()),
        })
        .await
    }

    /// The blobs whose digest begins with `shard`.
    pub(super) async fn list(&self, shard: u8) -> Result<Vec<Digest>, Error> {
        let inner = self.0.clone();
        blocking(move || {
            let shard = hex::encode([shard]);
            let entries = match fs::read_dir(inner.root.join(&shard)) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
                entries => entries?,
            };
            let mut digests = Vec::new();
            for entry in entries {
                let name = entry?.file_name();
                // Files of other origin are left alone.
                let Some(name) = name.to_str() else { continue };
                digests.extend(format!("{shard}{name}").parse::<Digest>().ok());
            }
            Ok(digests)
        })
        .await
    }
}

impl Inner {
    fn put(&self, bytes: &[u8]) -> Result<Digest, Error> {
        let digest = Digest(Sha256::digest(bytes).into());
        let path = self.path(digest);
        let dir = path.parent().unwrap_or(&self.root);
        // What is there may be damaged, so its name alone says nothing.
        let mut kept = Vec::new();
        let found = self.file(digest).and_then(|mut file| Ok(file.read_to_end(&mut kept)?));
        if found.is_ok() && kept == bytes {
            // Whoever renamed it may not have synced the directory yet.
            sync_dir(dir)?;
            return Ok(digest);
        }

        let number = self.temporary.fetch_add(1, Relaxed);
        let temporary = self.root.join("tmp").join(number.to_string());
        let written = write_synced(&temporary, bytes).and_then(|()| {
            if !dir.is_dir() {
                make_dir(dir)?;
                sync_dir(&self.root)?;
            }
            fs::rename(&temporary, &path)?;
            sync_dir(dir)
        });
        if let Err(error) = written {
            // What cannot be removed now is removed when the directory is next opened.
            let _ = fs::remove_file(&temporary);
            return Err(error.into());
        }
        Ok(digest)
    }

    fn file(&self, digest: Digest) -> Result<File, Error> {
        let no_follow = rustix::fs::OFlags::NOFOLLOW.bits() as i32;
        match OpenOptions::new().read(true).custom_flags(no_follow).open(self.path(digest)) {
            Ok(file) => Ok(file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(Error::NotFound(digest)),
            Err(error) => Err(error.into()),
        }
    }

    fn path(&self, digest: Digest) -> PathBuf {
        let name = digest.to_string();
        let (shard, rest) = name.split_at(2);
        self.root.join(shard).join(rest)
    }
}

/// Whether small file system work is done by whoever asks for it.
static AT_ONCE: AtomicBool = AtomicBool::new(false);

/// From now on, has this process do small file system work on the thread that asks for it. For a
/// simulation: no time passes there meanwhile, and other threads would decide what comes first.
pub fn work_at_once() {
    AT_ONCE.store(true, Relaxed);
}

/// Runs file system work off the runtime's thread.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    if AT_ONCE.load(Relaxed) {
        return work();
    }
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => Err(Error::Io(io::Error::other(error))),
    }
}

pub(super) fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

pub(super) fn make_dir(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

pub(super) fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blob::InvalidDigest;

    async fn blobs() -> (tempfile::TempDir, Directory) {
        let dir = tempfile::tempdir().unwrap();
        let blobs = Directory::open(dir.path().join("blobs")).await.unwrap();
        (dir, blobs)
    }

    #[tokio::test]
    async fn a_blob_is_found_by_its_digest_whole_and_in_parts() {
        let (_dir, blobs) = blobs().await;
        let digest = blobs.put("abc".into()).await.unwrap();
        assert_eq!(
            digest.to_string(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        assert_eq!(blobs.get(digest).await.unwrap(), "abc");
        assert_eq!(blobs.range(digest, 1, 2).await.unwrap(), "bc");
        assert_eq!(blobs.list(0xba).await.unwrap(), [digest]);
        assert!(blobs.list(0xbb).await.unwrap().is_empty());
        assert!(matches!(blobs.range(digest, 2, 2).await, Err(Error::NotFound(_))));
        assert!(matches!(blobs.range(digest, u64::MAX, 2).await, Err(Error::NotFound(_))));
    }

    #[tokio::test]
    async fn the_same_bytes_are_kept_once_and_deleted_once() {
        let (_dir, blobs) = blobs().await;
        let digest = blobs.put("abc".into()).await.unwrap();
        assert_eq!(blobs.put("abc".into()).await.unwrap(), digest);
        assert!(blobs.delete(digest).await.unwrap());
        assert!(!blobs.delete(digest).await.unwrap());
        assert!(matches!(blobs.get(digest).await, Err(Error::NotFound(_))));
    }

    #[tokio::test]
    async fn a_flipped_bit_is_noticed() {
        let (dir, blobs) = blobs().await;
        let digest = blobs.put("abc".into()).await.unwrap();
        let name = digest.to_string();
        fs::write(dir.path().join("blobs").join(&name[..2]).join(&name[2..]), "abb").unwrap();
        assert!(matches!(blobs.get(digest).await, Err(Error::Damaged(_))));
        blobs.put("abc".into()).await.unwrap();
        assert_eq!(blobs.get(digest).await.unwrap(), "abc");
    }

    #[tokio::test]
    async fn what_a_crash_left_half_written_is_gone_after_a_restart() {
        let (dir, blobs) = blobs().await;
        let digest = blobs.put("abc".into()).await.unwrap();
        let left = dir.path().join("blobs/tmp/7");
        fs::write(&left, "half").unwrap();
        drop(blobs);
        let blobs = Directory::open(dir.path().join("blobs")).await.unwrap();
        assert!(!left.exists());
        assert_eq!(blobs.get(digest).await.unwrap(), "abc");
    }

    #[tokio::test]
    async fn a_link_planted_in_the_directory_is_not_followed() {
        let (dir, blobs) = blobs().await;
        let digest = blobs.put("abc".into()).await.unwrap();
        let name = digest.to_string();
        let path = dir.path().join("blobs").join(&name[..2]).join(&name[2..]);
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", &path).unwrap();
        assert!(matches!(blobs.get(digest).await, Err(Error::Io(_))));
    }

    #[test]
    fn only_digests_are_names() {
        for name in ["", "..", "../../etc/passwd", &"a".repeat(63), &"A".repeat(64)] {
            assert_eq!(name.parse::<Digest>(), Err(InvalidDigest));
        }
        assert!("a".repeat(64).parse::<Digest>().is_ok());
    }
}
