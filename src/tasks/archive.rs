//! The loop that moves what runners made out of the database once a task has ended.
//!
//! The segments of many ended tasks are packed into one blob, with one sync; then, in one
//! transaction, each task's row says where its transcript lies and its segments go. A blob
//! that no row refers to, since a crash came between or its tasks were deleted, is collected.
//! The directory of these blobs belongs to this loop alone. In a bucket, which several servers
//! share, one server at a time packs and collects, by a lock whose epoch the rows are written
//! under, and a blob is left alone for a while. No blob is like another: a deletion that is carried
//! out late, of a server that lost the lock, never meets one that was put since.
//!
//! A transcript is a sequence of records: first sequence, number of frames, and length of the
//! frames, each a varint, then the length-delimited frames.

use std::{
    sync::atomic::{AtomicU8, Ordering::Relaxed},
    time::Duration,
};

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::transcripts::{self, Segment, Transcript};
use crate::{
    blob::{self, Blobs, Digest},
    clock::Clock,
    db::Db,
    error::{Error, Result},
    id::{Entropy, TaskId},
    instances::{Duty, Mandate},
};

/// Bytes after which a blob is closed.
const PACK: usize = 8 << 20;

/// Tasks archived in one transaction.
const TASKS: u32 = 256;

/// Bytes of a transcript read at once.
const WINDOW: u64 = 256 << 10;

/// A blob that somebody else than this process may have put is no orphan before this time: its row
/// may be on its way.
const SETTLED: Duration = Duration::from_hours(1);

/// Time between two looks for ended tasks.
const INTERVAL: Duration = Duration::from_secs(2);

/// The same where each look may cost calls of a bucket, and makes an object there.
const SHARED_INTERVAL: Duration = Duration::from_secs(10);

/// Bytes at the beginning of a blob that make it like no other.
const NONCE: usize = 16;

/// Moves transcripts of ended tasks to blobs.
pub struct Archiver {
    db: Db,
    blobs: Blobs,
    clock: Clock,
    entropy: Entropy,
    duty: Duty,
    /// Which blobs are looked at next.
    shard: AtomicU8,
}

impl Archiver {
    /// An archiver that has `blobs` for itself while it has the `duty`.
    pub fn new(db: Db, blobs: Blobs, clock: Clock, entropy: Entropy, duty: Duty) -> Self {
        Self { db, blobs, clock, entropy, duty, shard: AtomicU8::new(0) }
    }

    /// Archives and collects for ever. Failures are tried again at the next look.
    pub async fn run(self) -> anyhow::Result<()> {
        let interval = if self.blobs.is_shared() { SHARED_INTERVAL } else { INTERVAL };
        loop {
            self.clock.sleep(interval).await;
            let Some(mandate) = self.duty.mandate() else { continue };
            if let Err(error) = self.run_once(&mandate).await {
                tracing::warn!(%error, cause = ?std::error::Error::source(&error), "transcripts wait to be archived");
            }
        }
    }

    /// Archives what has ended, and collects one 256th of the blobs; returns how many
    /// transcripts were moved.
    pub async fn run_once(&self, mandate: &Mandate) -> Result<usize> {
        let mut n_moved = 0;
        loop {
            let n_tasks = self.archive_some(mandate).await?;
            n_moved += n_tasks;
            if n_tasks == 0 {
                break;
            }
        }
        self.collect(self.shard.fetch_add(1, Relaxed)).await?;
        Ok(n_moved)
    }

    /// Archives as many ended tasks as one blob holds; returns how many.
    async fn archive_some(&self, mandate: &Mandate) -> Result<usize> {
        let mut nonce = [0; NONCE];
        self.entropy.fill(&mut nonce);
        let read = self.db.read(move |tx| {
            Box::pin(async move {
                let mut pack = BytesMut::from(&nonce[..]);
                let mut places = Vec::new();
                for task in transcripts::unarchived(tx, None, TASKS).await? {
                    let (segments, _) = transcripts::segments(tx, task, 0, usize::MAX).await?;
                    places.extend(put_transcript(&mut pack, task, &segments));
                    if pack.len() >= PACK {
                        break;
                    }
                }
                Ok((pack.freeze(), places))
            })
        });
        let (pack, mut places) = read.await?;
        if places.is_empty() {
            return Ok(0);
        }
        let blob = self.blobs.put(pack).await.map_err(Error::storage)?;
        for place in &mut places {
            place.blob = blob;
        }
        let n_tasks = places.len();
        let mut script = self.db.script();
        transcripts::archive(&mut script, &places)?;
        let mandate = mandate.clone();
        let write = self.db.write(move |tx| {
            Box::pin(async move {
                mandate.check(tx).await?;
                script.run(tx).await
            })
        });
        write.await?;
        Ok(n_tasks)
    }

    /// Deletes the blobs of a shard that nothing refers to; returns how many.
    pub async fn collect(&self, shard: u8) -> Result<usize> {
        let listed = self.blobs.list(shard).await.map_err(Error::storage)?;
        let before = self.clock.now() - SETTLED;
        let settled = listed.into_iter().filter(|blob| blob.put.is_none_or(|put| put < before));
        let kept: Vec<_> = settled.map(|blob| blob.digest).collect();
        if kept.is_empty() {
            return Ok(0);
        }
        let read = self.db.read(|tx| {
            Box::pin(async move {
                let mut orphans = Vec::new();
                for blob in kept {
                    if !transcripts::is_referenced(tx, blob).await? {
                        orphans.push(blob);
                    }
                }
                Ok(orphans)
            })
        });
        let orphans = read.await?;
        for blob in &orphans {
            self.blobs.delete(*blob).await.map_err(Error::storage)?;
        }
        Ok(orphans.len())
    }
}

/// Appends a task's transcript to a pack; the blob is not known yet.
fn put_transcript(pack: &mut BytesMut, task: TaskId, segments: &[Segment]) -> Option<Transcript> {
    let (first, last) = (segments.first()?.first, segments.last()?.last);
    let offset = pack.len() as u64;
    for segment in segments {
        prost::encoding::encode_varint(segment.first, pack);
        prost::encoding::encode_varint(segment.last + 1 - segment.first, pack);
        prost::encoding::encode_varint(segment.frames.len() as u64, pack);
        pack.put_slice(&segment.frames);
    }
    let length = pack.len() as u64 - offset;
    Some(Transcript { task, blob: Digest([0; 32]), offset, length, first, last })
}

/// How far a reader got in a transcript.
#[derive(Clone, Copy, Debug, Default)]
pub struct Place {
    /// Where the records lie that were read last.
    at: u64,
    /// Where those after them begin.
    next: u64,
    /// Last sequence of those that were read.
    last: u64,
}

/// The next records that hold something after a sequence, and the place to go on from.
pub async fn read_records(
    blobs: &Blobs,
    transcript: &Transcript,
    after: u64,
    place: Place,
) -> Result<(Vec<Segment>, Place), blob::Error> {
    let mut at = if after >= place.last { place.next } else { place.at };
    let mut window = WINDOW;
    let mut records = Vec::new();
    while records.is_empty() && at < transcript.length {
        let size = window.min(transcript.length - at);
        let mut bytes = blobs.range(transcript.blob, transcript.offset + at, size).await?;
        let start = at;
        let mut last = 0;
        while let Some(record) = take_record(&mut bytes) {
            at = start + size - bytes.len() as u64;
            last = record.last;
            if record.last > after {
                records.push(record);
            }
        }
        if at == start {
            if start + size == transcript.length {
                return Err(blob::Error::Damaged(transcript.blob));
            }
            // A record larger than the window.
            window *= 4;
            continue;
        }
        if !records.is_empty() {
            return Ok((records, Place { at: start, next: at, last }));
        }
    }
    Ok((records, Place { at, next: at, last: after }))
}

/// Takes a whole record from the front.
fn take_record(bytes: &mut Bytes) -> Option<Segment> {
    let mut rest = bytes.clone();
    let first = prost::encoding::decode_varint(&mut rest).ok()?;
    let count = prost::encoding::decode_varint(&mut rest).ok()?;
    let length = usize::try_from(prost::encoding::decode_varint(&mut rest).ok()?).ok()?;
    if rest.remaining() < length {
        return None;
    }
    let frames = rest.split_to(length).to_vec();
    *bytes = rest;
    Some(Segment { first, last: first.checked_add(count)?.checked_sub(1)?, frames })
}
