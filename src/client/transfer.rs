//! Files to artifacts and back, over broken connections.
//!
//! An upload is announced with its digest first, so that one that was cut off, by whatever, goes on
//! where it was when the same file is put again. A download is written beside its place, goes on
//! likewise, and gets its name once its digest is right.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::{Bytes, BytesMut};
use futures_util::{Stream, StreamExt as _, stream};
use sha2::{Digest as _, Sha256};
use tokio::{
    fs::{File, OpenOptions},
    io::{AsyncRead, AsyncReadExt as _, AsyncSeekExt as _, AsyncWriteExt as _},
};
use tonic::Status;

use super::{Client, patience::Patience};
use crate::pb::{self, upload_artifact_request::Part};

/// Bytes in one message.
const PIECE: usize = 512 << 10;
/// Bytes that are hashed before others have a turn.
const HASHED_AT_ONCE: usize = 8 << 20;
/// Longest name of a file in most file systems, less what goes around it.
const LONGEST_NAME: usize = 200;

/// What a transfer does at the moment, and how many bytes it has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// The file is read to find its digest.
    Hashing(u64),
    /// Bytes are on their way.
    Moving(u64),
}

/// Hears of progress.
pub type Listener = Arc<dyn Fn(Progress) + Send + Sync>;

/// Why a file was not moved.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// The server refused, or cannot be reached any more.
    #[error("{}", .0.message())]
    Call(#[from] Status),
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The bytes that came are not those of the artifact.
    #[error("the bytes that came are not those of artifact {0}; they were deleted, get it again")]
    Damaged(String),
}

impl TransferError {
    fn file(path: &Path) -> impl Fn(io::Error) -> Self {
        move |source| Self::File { path: path.to_owned(), source }
    }
}

/// What an upload reads, again and again where it must.
enum Source<'a> {
    File(&'a Path),
    Bytes(Bytes),
}

impl Source<'_> {
    /// What is left from a position on.
    async fn open(&self, offset: u64) -> Result<Box<dyn AsyncRead + Send + Unpin>, TransferError> {
        match self {
            Self::File(path) => {
                let wrong = TransferError::file(path);
                let mut file = File::open(path).await.map_err(&wrong)?;
                file.seek(io::SeekFrom::Start(offset)).await.map_err(&wrong)?;
                Ok(Box::new(file))
            }
            Self::Bytes(bytes) => {
                let skipped = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
                Ok(Box::new(io::Cursor::new(bytes.slice(skipped..))))
            }
        }
    }
}

impl Client {
    /// Makes an artifact of a file. `spec` needs neither size nor digest. Goes on where an earlier
    /// call for the same file and `spec` was cut off, and while the server or its storage is away,
    /// as long as [patience](Self::with_patience) lasts.
    pub async fn put_file(
        &self,
        path: &Path,
        mut spec: pb::ArtifactSpec,
        heard: Listener,
    ) -> Result<pb::Artifact, TransferError> {
        let wrong = TransferError::file(path);
        let mut file = File::open(path).await.map_err(&wrong)?;
        let (size, digest) = {
            let heard = heard.clone();
            hash(&mut file, move |n| heard(Progress::Hashing(n))).await.map_err(&wrong)?
        };
        spec.size_bytes = Some(size);
        spec.sha256 = hex::encode(digest);
        self.put_announced(&Source::File(path), spec, &heard, Patience::new(self)).await
    }

    /// Makes an artifact of bytes in memory, with the patience of [`put_file`](Self::put_file).
    pub async fn put_bytes(
        &self,
        bytes: Bytes,
        mut spec: pb::ArtifactSpec,
        heard: Listener,
    ) -> Result<pb::Artifact, TransferError> {
        spec.size_bytes = Some(bytes.len() as u64);
        spec.sha256 = hex::encode(Sha256::digest(&bytes));
        // Nothing need be announced where all goes well.
        let put = self.put_stream(io::Cursor::new(bytes.clone()), spec.clone(), heard.clone());
        let error = match put.await {
            Err(TransferError::Call(error)) => error,
            ended => return ended,
        };
        let mut patience = Patience::new(self);
        patience.bear(error).await?;
        self.put_announced(&Source::Bytes(bytes), spec, &heard, patience).await
    }

    /// Makes an artifact of whatever comes, which cannot be resumed.
    pub async fn put_stream(
        &self,
        source: impl AsyncRead + Send + Unpin + 'static,
        spec: pb::ArtifactSpec,
        heard: Listener,
    ) -> Result<pb::Artifact, TransferError> {
        let first = Part::Spec(spec);
        let mut artifacts = self.artifacts();
        let sent = artifacts.upload_artifact(parts(first, source, 0, heard)).await;
        Ok(sent?.into_inner())
    }

    /// Puts what `spec` has size and digest of.
    async fn put_announced(
        &self,
        source: &Source<'_>,
        spec: pb::ArtifactSpec,
        heard: &Listener,
        mut patience: Patience<'_>,
    ) -> Result<pb::Artifact, TransferError> {
        let upload = loop {
            let (mut artifacts, spec) = (self.artifacts(), Some(spec.clone()));
            match self.once(artifacts.create_upload(pb::CreateUploadRequest { spec })).await {
                Ok(upload) => break upload,
                Err(error) => patience.bear(error).await?,
            }
        };
        let (id, size) = (&upload.upload_id, spec.size_bytes());
        let (mut offset, mut known) = (upload.received_bytes, true);
        loop {
            let tried = if known {
                heard(Progress::Moving(offset));
                self.go_on(source, id, (offset, size), heard).await
            } else {
                match self.received(id).await {
                    Ok(received) => {
                        if received > offset {
                            patience.renew();
                        }
                        (offset, known) = (received, true);
                        continue;
                    }
                    Err(error) => Err(error.into()),
                }
            };
            match tried {
                Err(TransferError::Call(error)) => patience.bear(error).await?,
                ended => return ended,
            }
            known = false;
        }
    }

    /// Sends what an upload lacks, or completes it.
    async fn go_on(
        &self,
        source: &Source<'_>,
        id: &str,
        (offset, size): (u64, u64),
        heard: &Listener,
    ) -> Result<pb::Artifact, TransferError> {
        let mut artifacts = self.artifacts();
        if offset >= size && size > 0 {
            let request = pb::CompleteUploadRequest { upload_id: id.to_owned() };
            return Ok(self.once(artifacts.complete_upload(request)).await?);
        }
        let first = Part::Upload(pb::UploadPosition { upload_id: id.to_owned(), offset });
        let rest = source.open(offset).await?;
        let sent = artifacts.upload_artifact(parts(first, rest, offset, heard.clone())).await;
        Ok(sent?.into_inner())
    }

    async fn received(&self, id: &str) -> Result<u64, Status> {
        let mut artifacts = self.artifacts();
        let request = pb::GetUploadRequest { upload_id: id.to_owned() };
        Ok(self.once(artifacts.get_upload(request)).await?.received_bytes)
    }

    /// What is known of an artifact, with the patience of a transfer.
    pub async fn find_artifact(&self, id: &str) -> Result<pb::Artifact, Status> {
        let mut patience = Patience::new(self);
        loop {
            let mut artifacts = self.artifacts();
            let request = pb::GetArtifactRequest { artifact_id: id.to_owned() };
            match self.once(artifacts.get_artifact(request)).await {
                Err(error) => patience.bear(error).await?,
                found => return found,
            }
        }
    }

    /// Writes the bytes of an artifact to a file, which is replaced when it is there; goes on where
    /// an earlier call was cut off, and while the server or its storage is away, as long as
    /// [patience](Self::with_patience) lasts.
    pub async fn get_file(
        &self,
        artifact: &pb::Artifact,
        path: &Path,
        heard: Listener,
    ) -> Result<(), TransferError> {
        let partial = partial(path, &artifact.artifact_id);
        let wrong = TransferError::file(&partial);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let mut file = options.open(&partial).await.map_err(&wrong)?;
        let mut hasher = Sha256::new();
        let mut there = 0;
        let size = artifact.size_bytes;
        if file.metadata().await.map_err(&wrong)?.len() <= size {
            let heard = heard.clone();
            (there, hasher) =
                hash_on(&mut file, move |n| heard(Progress::Hashing(n))).await.map_err(&wrong)?;
        } else {
            file.set_len(0).await.map_err(&wrong)?;
        }
        let mut pieces = self.fetch(artifact, there);
        loop {
            match pieces.next().await {
                Ok(None) => break,
                Ok(Some(data)) => {
                    hasher.update(&data);
                    file.write_all(&data).await.map_err(&wrong)?;
                    there += data.len() as u64;
                    heard(Progress::Moving(there));
                }
                Err(error) => {
                    file.flush().await.map_err(&wrong)?;
                    return Err(error.into());
                }
            }
        }
        file.flush().await.map_err(&wrong)?;
        if there != size || hex::encode(hasher.finalize()) != artifact.sha256 {
            tokio::fs::remove_file(&partial).await.map_err(&wrong)?;
            return Err(TransferError::Damaged(artifact.artifact_id.clone()));
        }
        file.sync_all().await.map_err(&wrong)?;
        tokio::fs::rename(&partial, path).await.map_err(TransferError::file(path))
    }

    /// The bytes of an artifact from a position on, over broken connections.
    pub fn fetch(&self, artifact: &pb::Artifact, offset: u64) -> Pieces<'_> {
        Pieces {
            client: self,
            id: artifact.artifact_id.clone(),
            there: offset,
            size: artifact.size_bytes,
            stream: None,
            patience: Patience::new(self),
        }
    }
}

/// The bytes of an artifact as they come; asked for again from where they broke off, as long as
/// [patience](Client::with_patience) lasts.
pub struct Pieces<'a> {
    client: &'a Client,
    id: String,
    there: u64,
    size: u64,
    stream: Option<tonic::Streaming<pb::DownloadArtifactResponse>>,
    patience: Patience<'a>,
}

impl Pieces<'_> {
    /// The next bytes; none at the end.
    ///
    /// # Errors
    /// With what the server said last.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Status> {
        while self.there < self.size {
            match self.piece().await {
                Ok(Some(data)) => {
                    self.patience.renew();
                    self.there += data.len() as u64;
                    return Ok(Some(data));
                }
                Ok(None) => return Ok(None),
                Err(error) => {
                    self.stream = None;
                    self.patience.bear(error).await?;
                }
            }
        }
        Ok(None)
    }

    async fn piece(&mut self) -> Result<Option<Bytes>, Status> {
        let stream = match &mut self.stream {
            Some(stream) => stream,
            none => {
                let (artifact_id, offset) = (self.id.clone(), self.there);
                let request = pb::DownloadArtifactRequest { artifact_id, offset, limit: 0 };
                let opened = self.client.artifacts().download_artifact(request).await?;
                none.insert(opened.into_inner())
            }
        };
        Ok(stream.message().await?.map(|piece| piece.data))
    }
}

/// Where a download is until it is whole.
fn partial(path: &Path, id: &str) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let name: String = name.chars().take(LONGEST_NAME / 4).collect();
    path.with_file_name(format!(".{name}.{id}.part"))
}

/// The messages of an upload. A source that fails ends them early, so that the server misses bytes.
fn parts(
    first: Part,
    source: impl AsyncRead + Send + Unpin + 'static,
    offset: u64,
    heard: Listener,
) -> impl Stream<Item = pb::UploadArtifactRequest> + Send + 'static {
    let message = |part| pb::UploadArtifactRequest { part: Some(part) };
    let rest = stream::unfold((source, offset), move |(mut source, at)| {
        let heard = heard.clone();
        async move {
            let piece = read_piece(&mut source).await.ok().filter(|piece| !piece.is_empty())?;
            let at = at + piece.len() as u64;
            heard(Progress::Moving(at));
            Some((message(Part::Data(piece)), (source, at)))
        }
    });
    stream::iter([message(first)]).chain(rest)
}

/// The next bytes, as many as a message has; fewer at the end.
async fn read_piece(source: &mut (impl AsyncRead + Unpin)) -> io::Result<Bytes> {
    let mut piece = BytesMut::with_capacity(PIECE);
    while piece.len() < PIECE {
        if source.read_buf(&mut piece).await? == 0 {
            break;
        }
    }
    Ok(piece.freeze())
}

async fn hash(file: &mut File, heard: impl Fn(u64)) -> io::Result<(u64, [u8; 32])> {
    let (size, hasher) = hash_on(file, heard).await?;
    Ok((size, hasher.finalize().into()))
}

/// Size and unfinished hash of what is in a file; its position is the end then.
async fn hash_on(file: &mut File, heard: impl Fn(u64)) -> io::Result<(u64, Sha256)> {
    let (mut hasher, mut n_bytes) = (Sha256::new(), 0);
    file.set_max_buf_size(HASHED_AT_ONCE);
    let mut buffer = BytesMut::with_capacity(PIECE);
    loop {
        buffer.clear();
        if file.read_buf(&mut buffer).await? == 0 {
            return Ok((n_bytes, hasher));
        }
        hasher.update(&buffer);
        n_bytes += buffer.len() as u64;
        heard(n_bytes);
        // Hashing keeps the thread: others get their turn.
        tokio::task::yield_now().await;
    }
}
