//! Artifacts' bytes as local files: `<root>/blobs/<kind>/ab/cd…-<generation>`, uploads as
//! `<root>/uploads/<id>`.
//!
//! An upload is written in the background while more of it comes, synced, renamed to its name, and
//! the directory synced: a name that is there has all its bytes. Files are opened without following
//! links.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use tokio::task::JoinHandle;
use uuid::Uuid;

use super::{
    Digest, Error,
    fs::{blocking, make_dir, sync_dir, write_synced},
    hash::Hasher,
    store::{Checkpoint, Claim, Key, Pieces, Upload},
};

/// Bytes that are written, or read, at once.
const BATCH: usize = 1 << 20;
const PIECE: usize = 256 << 10;
/// Bytes after which a file is synced and a checkpoint given out.
const SYNC_EVERY: u64 = 32 << 20;

/// A directory of files; clones share it.
#[derive(Clone, Debug)]
pub(super) struct Files(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    root: PathBuf,
    temporary: AtomicU64,
}

impl Files {
    pub(super) async fn open(root: &Path) -> Result<Self, Error> {
        let root = root.to_owned();
        blocking(move || {
            // What a crash left of small files; uploads are known to whoever began them.
            match fs::remove_dir_all(root.join("tmp")) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
                _ => {}
            }
            for name in ["", "tmp", "uploads", "blobs"] {
                make_dir(&root.join(name))?;
            }
            sync_dir(&root)?;
            Ok(Self(Arc::new(Inner { root, temporary: AtomicU64::new(0) })))
        })
        .await
    }

    pub(super) fn look_into(root: &Path) -> Self {
        Self(Arc::new(Inner { root: root.to_owned(), temporary: AtomicU64::new(0) }))
    }

    pub(super) async fn writer(
        &self,
        upload: &Upload,
        checkpoint: Option<Checkpoint>,
        claim: Arc<Claim>,
    ) -> Result<Writer, Error> {
        let inner = self.0.clone();
        let path = inner.upload(upload.id);
        let wanted = checkpoint.map(|checkpoint| checkpoint.hasher).unwrap_or_default();
        let opening = path.clone();
        let work = blocking(move || {
            let mut file = options().write(true).create(true).truncate(false).open(&opening)?;
            // Bytes that are not there any more must come again.
            let hasher =
                if file.metadata()?.len() < wanted.length() { Hasher::default() } else { wanted };
            file.set_len(hasher.length())?;
            file.seek(SeekFrom::End(0))?;
            let safe = hasher.clone();
            Ok(Work { file, hasher, safe, _claim: claim })
        })
        .await?;
        let noted = work.safe.length();
        Ok(Writer { inner, path, chunks: Vec::new(), buffered: 0, work: At::Rest(work), noted })
    }

    pub(super) async fn put(&self, key: &Key, bytes: Bytes) -> Result<(), Error> {
        let (inner, key) = (self.0.clone(), key.clone());
        blocking(move || {
            let name = inner.temporary.fetch_add(1, Relaxed).to_string();
            let temporary = inner.root.join("tmp").join(name);
            write_synced(&temporary, &bytes)?;
            inner.rename(&temporary, &key)
        })
        .await
    }

    pub(super) async fn remove(&self, id: Uuid) -> Result<(), Error> {
        let path = self.0.upload(id);
        blocking(move || Ok(absent_is_fine(fs::remove_file(path))?)).await
    }

    pub(super) async fn read(&self, key: &Key, offset: u64, length: u64) -> Result<Pieces, Error> {
        let (path, digest) = (self.0.blob(key), key.digest);
        let file = blocking(move || {
            let mut file = open_blob(&path, digest)?;
            let whole = file.metadata()?.len();
            if offset.checked_add(length).is_none_or(|end| end > whole) {
                return Err(Error::NotFound(digest));
            }
            file.seek(SeekFrom::Start(offset))?;
            Ok(file)
        })
        .await?;
        let pieces = stream::try_unfold((file, length), |(mut file, left)| async move {
            if left == 0 {
                return Ok(None);
            }
            let n = usize::try_from(left).unwrap_or(PIECE).min(PIECE);
            let (piece, file) = blocking(move || {
                let mut piece = vec![0; n];
                file.read_exact(&mut piece)?;
                Ok((Bytes::from(piece), file))
            })
            .await?;
            Ok(Some((piece, (file, left - n as u64))))
        });
        Ok(pieces.boxed())
    }

    pub(super) async fn size(&self, key: &Key) -> Result<Option<u64>, Error> {
        let (path, digest) = (self.0.blob(key), key.digest);
        blocking(move || match open_blob(&path, digest) {
            Ok(file) => Ok(Some(file.metadata()?.len())),
            Err(Error::NotFound(_)) => Ok(None),
            Err(error) => Err(error),
        })
        .await
    }

    pub(super) async fn delete(&self, key: &Key) -> Result<(), Error> {
        let path = self.0.blob(key);
        blocking(move || Ok(absent_is_fine(fs::remove_file(path))?)).await
    }
}

impl Inner {
    fn upload(&self, id: Uuid) -> PathBuf {
        self.root.join("uploads").join(id.as_hyphenated().to_string())
    }

    fn blob(&self, key: &Key) -> PathBuf {
        self.root.join("blobs").join(key.to_string())
    }

    /// Gives a synced file its final name.
    fn rename(&self, from: &Path, key: &Key) -> Result<(), Error> {
        let path = self.blob(key);
        let (kind, shard) = (self.root.join("blobs").join(&key.kind), path.parent());
        let shard = shard.unwrap_or(&kind);
        if !shard.exists() {
            make_dir(shard)?;
            sync_dir(&kind)?;
            sync_dir(&self.root.join("blobs"))?;
        }
        fs::rename(from, &path)?;
        sync_dir(shard)?;
        Ok(())
    }
}

fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.mode(0o600).custom_flags(rustix::fs::OFlags::NOFOLLOW.bits() as i32);
    options
}

fn open_blob(path: &Path, digest: Digest) -> Result<File, Error> {
    match options().read(true).open(path) {
        Ok(file) => Ok(file),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(Error::NotFound(digest)),
        Err(error) => Err(error.into()),
    }
}

fn absent_is_fine(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Writes one upload. At most one batch is being written while the next one comes in.
pub struct Writer {
    inner: Arc<Inner>,
    path: PathBuf,
    chunks: Vec<Bytes>,
    buffered: usize,
    work: At,
    /// Bytes of the last checkpoint.
    noted: u64,
}

/// The file, and what is known of the bytes in it.
struct Work {
    file: File,
    hasher: Hasher,
    /// Of the bytes that are synced.
    safe: Hasher,
    _claim: Arc<Claim>,
}

enum At {
    Rest(Work),
    /// Kept busy by a batch.
    Write(JoinHandle<io::Result<Work>>),
    /// After a failure.
    Nowhere,
}

impl Work {
    fn write(&mut self, chunks: &[Bytes]) -> io::Result<()> {
        for chunk in chunks {
            self.hasher.update(chunk);
            self.file.write_all(chunk)?;
        }
        if self.hasher.length() - self.safe.length() >= SYNC_EVERY {
            self.sync()?;
        }
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        self.file.sync_all()?;
        self.safe = self.hasher.clone();
        Ok(())
    }
}

impl Writer {
    pub(super) async fn write(&mut self, bytes: Bytes) -> Result<Option<Checkpoint>, Error> {
        self.buffered += bytes.len();
        self.chunks.push(bytes);
        if self.buffered < BATCH {
            return Ok(None);
        }
        let safe = self.flush().await?;
        if safe.length() <= self.noted {
            return Ok(None);
        }
        self.noted = safe.length();
        Ok(Some(Checkpoint { hasher: safe, multipart: None }))
    }

    /// Has everything buffered written in the background; returns what was safe before.
    async fn flush(&mut self) -> Result<Hasher, Error> {
        let mut work = self.rest().await?;
        let safe = work.safe.clone();
        let chunks = std::mem::take(&mut self.chunks);
        self.buffered = 0;
        self.work = At::Write(tokio::task::spawn_blocking(move || {
            work.write(&chunks)?;
            Ok(work)
        }));
        Ok(safe)
    }

    async fn rest(&mut self) -> Result<Work, Error> {
        match std::mem::replace(&mut self.work, At::Nowhere) {
            At::Rest(work) => Ok(work),
            At::Write(writing) => Ok(writing.await.map_err(io::Error::other)??),
            At::Nowhere => Err(io::Error::other("an earlier write failed").into()),
        }
    }

    /// Everything written and synced.
    async fn settle(&mut self) -> Result<Work, Error> {
        self.flush().await?;
        let mut work = self.rest().await?;
        blocking(move || {
            work.sync()?;
            Ok(work)
        })
        .await
    }

    pub(super) async fn pause(mut self) -> Result<Checkpoint, Error> {
        let work = self.settle().await?;
        Ok(Checkpoint { hasher: work.safe, multipart: None })
    }

    pub(super) async fn finish(mut self) -> Result<(Digest, u64, End), Error> {
        let work = self.settle().await?;
        let (inner, path) = (self.inner.clone(), self.path.clone());
        let size = work.hasher.length();
        Ok((work.hasher.clone().finish(), size, End { inner, path, _work: work }))
    }
}

/// A whole upload in its file.
pub struct End {
    inner: Arc<Inner>,
    path: PathBuf,
    _work: Work,
}

impl End {
    pub(super) async fn keep(self, key: &Key) -> Result<(), Error> {
        let key = key.clone();
        blocking(move || self.inner.rename(&self.path, &key)).await
    }

    pub(super) async fn discard(self) -> Result<(), Error> {
        blocking(move || Ok(absent_is_fine(fs::remove_file(&self.path))?)).await
    }
}
