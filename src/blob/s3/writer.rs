//! One upload into a bucket: in parts that the bucket shows to nobody, until all have come and are
//! wanted.

use std::sync::Arc;

use aws_sdk_s3::primitives::ByteStream;
use bytes::{Bytes, BytesMut};
use futures_util::{FutureExt as _, future::BoxFuture};

use super::{
    super::{
        Digest, Error,
        fs::blocking,
        hash::Hasher,
        store::{Checkpoint, Claim, Key, Multipart, Upload},
    },
    Bucket, MOST_AT_ONCE, failed,
};

/// Size of a part, which is what a writer keeps in memory twice. Buckets take parts from 5 MiB.
const PART: u64 = 8 << 20;
/// Parts of an upload of announced size; buckets take ten times as many.
const MOST_PARTS: u64 = 1_000;
/// Size of a part where the size of the whole is not known.
const PART_OF_UNKNOWN: u64 = 16 << 20;

/// What a part on its way gives back.
type Arrived = Result<(Hasher, String), Error>;

/// Writes one upload, part by part. At most one part is on its way while the next one comes in.
pub struct Writer {
    bucket: Bucket,
    upload: Upload,
    part_size: usize,
    buffer: BytesMut,
    /// Of the parts that have arrived; away with the part that is on its way.
    hasher: Option<Hasher>,
    multipart: Option<Multipart>,
    flight: Option<BoxFuture<'static, Arrived>>,
    claim: Arc<Claim>,
}

impl Writer {
    /// Begins an upload, or goes on with one from a checkpoint.
    pub(in super::super) fn new(
        bucket: Bucket,
        upload: Upload,
        checkpoint: Option<Checkpoint>,
        claim: Arc<Claim>,
    ) -> Self {
        let part_size = match upload.size {
            Some(size) => PART.max(size.div_ceil(MOST_PARTS).next_multiple_of(1 << 20)),
            None => PART_OF_UNKNOWN,
        };
        // Without parts nothing of it is in the bucket.
        let checkpoint = checkpoint.filter(|checkpoint| checkpoint.multipart.is_some());
        let (hasher, multipart) =
            checkpoint.map_or_else(Default::default, |c| (c.hasher, c.multipart));
        Self {
            bucket,
            upload,
            part_size: usize::try_from(part_size).unwrap_or(usize::MAX),
            buffer: BytesMut::new(),
            hasher: Some(hasher),
            multipart,
            flight: None,
            claim,
        }
    }

    pub(in super::super) async fn write(
        &mut self,
        bytes: Bytes,
    ) -> Result<Option<Checkpoint>, Error> {
        self.buffer.extend_from_slice(&bytes);
        let mut checkpoint = None;
        while self.buffer.len() >= self.part_size {
            let arrived = self.landed().await?;
            checkpoint = arrived.or(checkpoint);
            let part = self.buffer.split_to(self.part_size).freeze();
            self.send(part).await?;
        }
        // Lets the part on its way go on; whoever writes next looks again.
        if let Some(flight) = &mut self.flight
            && let Some(arrived) = std::future::poll_fn(|cx| {
                std::task::Poll::Ready(match flight.poll_unpin(cx) {
                    std::task::Poll::Ready(arrived) => Some(arrived),
                    std::task::Poll::Pending => None,
                })
            })
            .await
        {
            self.flight = None;
            checkpoint = Some(self.note(arrived?));
        }
        Ok(checkpoint)
    }

    /// Waits for the part on its way.
    async fn landed(&mut self) -> Result<Option<Checkpoint>, Error> {
        let Some(flight) = self.flight.take() else { return Ok(None) };
        let arrived = flight.await?;
        Ok(Some(self.note(arrived)))
    }

    fn note(&mut self, (hasher, tag): (Hasher, String)) -> Checkpoint {
        if let Some(multipart) = &mut self.multipart {
            multipart.tags.push(tag);
        }
        self.hasher = Some(hasher.clone());
        Checkpoint { hasher, multipart: self.multipart.clone() }
    }

    async fn send(&mut self, part: Bytes) -> Result<(), Error> {
        let lost = || Error::Bucket("an earlier part failed".into());
        if self.multipart.is_none() {
            let object = match &self.upload.place {
                Some(key) => self.bucket.object(key),
                None => self.bucket.staged(self.upload.id),
            };
            self.multipart = Some(self.bucket.begin(object).await?);
        }
        let multipart = self.multipart.as_ref().ok_or_else(lost)?;
        let mut hasher = self.hasher.take().ok_or_else(lost)?;
        let number = i32::try_from(multipart.tags.len() + 1).unwrap_or(i32::MAX);
        let upload = self.bucket.0.client.upload_part().bucket(&self.bucket.0.name);
        let upload = upload.key(&multipart.object).upload_id(&multipart.id).part_number(number);
        self.flight = Some(Box::pin(async move {
            let (hasher, part) = blocking(move || {
                hasher.update(&part);
                Ok((hasher, part))
            })
            .await?;
            let sent = upload.body(ByteStream::from(part)).send().await.map_err(failed)?;
            Ok((hasher, sent.e_tag().unwrap_or_default().to_owned()))
        }));
        Ok(())
    }

    pub(in super::super) async fn pause(mut self) -> Result<Option<Checkpoint>, Error> {
        self.landed().await?;
        let (hasher, multipart) = (self.hasher.unwrap_or_default(), self.multipart);
        Ok(multipart.map(|multipart| Checkpoint { hasher, multipart: Some(multipart) }))
    }

    pub(in super::super) async fn finish(mut self) -> Result<(Digest, u64, End), Error> {
        self.landed().await?;
        let rest = std::mem::take(&mut self.buffer).freeze();
        if self.multipart.is_none() {
            let (digest, size) = (digest_of(rest.clone()).await?, rest.len() as u64);
            let kept = Kept::Small(rest);
            return Ok((digest, size, End { bucket: self.bucket, kept, _claim: self.claim }));
        }
        if !rest.is_empty() {
            self.send(rest).await?;
            self.landed().await?;
        }
        let hasher = self.hasher.unwrap_or_default();
        let size = hasher.length();
        let kept = Kept::Parts(self.multipart.unwrap_or_default(), size);
        Ok((hasher.finish(), size, End { bucket: self.bucket, kept, _claim: self.claim }))
    }
}

async fn digest_of(bytes: Bytes) -> Result<Digest, Error> {
    blocking(move || {
        let mut hasher = Hasher::default();
        hasher.update(&bytes);
        Ok(hasher.finish())
    })
    .await
}

/// A whole upload that the bucket does not show yet.
pub struct End {
    bucket: Bucket,
    kept: Kept,
    _claim: Arc<Claim>,
}

enum Kept {
    /// In memory.
    Small(Bytes),
    /// In parts, of so many bytes.
    Parts(Multipart, u64),
}

impl End {
    pub(in super::super) async fn keep(self, key: &Key) -> Result<(), Error> {
        match self.kept {
            Kept::Small(bytes) => self.bucket.put(key, bytes).await,
            Kept::Parts(multipart, size) => {
                let direct = multipart.object == self.bucket.object(key);
                if !direct && size > MOST_AT_ONCE {
                    self.bucket.abort(&multipart).await?;
                    return Err(Error::TooLarge(MOST_AT_ONCE));
                }
                if let Err(error) = self.bucket.complete(&multipart).await {
                    // It may have been completed before, by a call that did not get to say so.
                    let object = multipart.object.clone();
                    if self.bucket.size_at(object).await? != Some(size) {
                        let kept = self.bucket.size(key).await? == Some(size);
                        return if kept { Ok(()) } else { Err(error) };
                    }
                }
                if direct {
                    return Ok(());
                }
                self.bucket.copy(&multipart.object, key).await?;
                if self.bucket.is_staged(&multipart.object) {
                    self.bucket.delete_object(multipart.object).await?;
                }
                Ok(())
            }
        }
    }

    pub(in super::super) async fn discard(self) -> Result<(), Error> {
        match self.kept {
            Kept::Small(_) => Ok(()),
            Kept::Parts(multipart, _) => self.bucket.abort(&multipart).await,
        }
    }
}
