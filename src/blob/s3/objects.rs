//! Objects of a bucket by their names below its prefix.

use bytes::{Bytes, BytesMut};
use futures_util::TryStreamExt as _;

use super::{Bucket, failed};
use crate::{
    blob::{Digest, Error},
    clock::Micros,
};

impl Bucket {
    fn named(&self, name: &str) -> String {
        format!("{}{name}", self.0.prefix)
    }

    pub(in crate::blob) async fn put_object(&self, name: &str, bytes: Bytes) -> Result<(), Error> {
        self.put_at(self.named(name), bytes).await
    }

    pub(in crate::blob) async fn object_size(&self, name: &str) -> Result<Option<u64>, Error> {
        self.size_at(self.named(name)).await
    }

    /// `length` bytes from `offset`, all of them; `digest` is what the object is.
    pub(in crate::blob) async fn object_range(
        &self,
        name: &str,
        digest: Digest,
        offset: u64,
        length: u64,
    ) -> Result<Bytes, Error> {
        // Servers refuse numbers that they cannot hold.
        let most = i64::MAX.unsigned_abs();
        if offset.checked_add(length).is_none_or(|end| end > most) {
            return Err(Error::NotFound(digest));
        }
        let pieces = match self.get(self.named(name), offset, length).await {
            Err(Error::NotFound(_)) => return Err(Error::NotFound(digest)),
            pieces => pieces?,
        };
        let add = |mut bytes: BytesMut, piece: Bytes| async move {
            bytes.extend_from_slice(&piece);
            Ok(bytes)
        };
        let bytes = pieces.try_fold(BytesMut::new(), add).await?;
        if bytes.len() as u64 == length { Ok(bytes.freeze()) } else { Err(Error::NotFound(digest)) }
    }

    pub(in crate::blob) async fn remove_object(&self, name: &str) -> Result<(), Error> {
        self.delete_object(self.named(name)).await
    }

    /// Objects whose names begin so, and when each was put last.
    pub(in crate::blob) async fn list(&self, name: &str) -> Result<Vec<(String, Micros)>, Error> {
        let list = self.0.client.list_objects_v2().bucket(&self.0.name).prefix(self.named(name));
        let mut pages = list.into_paginator().send();
        let mut found = Vec::new();
        while let Some(page) = pages.next().await {
            for object in page.map_err(failed)?.contents() {
                let name = object.key().and_then(|key| key.strip_prefix(&self.0.prefix));
                let put =
                    object.last_modified().and_then(|time| time.secs().checked_mul(1_000_000));
                if let (Some(name), Some(put)) = (name, put) {
                    found.push((name.to_owned(), Micros(put)));
                }
            }
        }
        Ok(found)
    }
}
