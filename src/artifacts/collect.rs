//! What nobody needs any more is deleted: expired artifacts, those of tasks that are gone, uploads
//! that nobody completed, and bytes that no artifact has.
//!
//! Any number of collectors may run at once, be held up between any two steps, and die:
//!
//! - Bytes are kept under their digest and a *generation*, drawn when their row of `artifact_bytes` is
//!   made, and no other row ever has it.
//! - To condemn is one transaction: the row goes from `artifact_bytes` to `artifact_garbage`. A commit
//!   that refers to the bytes wrote the row before, and then it is not condemned; or it comes after,
//!   finds no row of its generation and lists nothing.
//! - Only what is garbage is deleted, and the row of garbage goes when the store has answered. Whoever
//!   died before is followed by whoever comes next.
//! - The same bytes may come again at any time: they get another row, another generation and another
//!   place. A deletion that was sent for garbage, however late it is carried out and however often,
//!   deletes a place where nobody looks any more, and nobody writes.

use std::time::Duration;

use super::{
    Artifacts,
    model::Collected,
    store::{self, stored, uploads},
};
use crate::{blob, error::Result, instances::Duty};

/// Between two rounds.
const EVERY: Duration = Duration::from_mins(1);
/// Rows of one transaction, so that none waits long behind it.
const CHUNK: u32 = 200;
/// Bytes that no artifact has are left alone for so long after somebody was about to refer to
/// them: longer than it takes to keep them.
const GRACE: Duration = Duration::from_mins(30);

impl Artifacts {
    /// One round.
    pub async fn collect(&self) -> Result<Collected> {
        let uploads = self.collect_uploads().await?;
        let artifacts = self.collect_artifacts().await?;
        let (files, bytes) = self.collect_bytes().await?;
        Ok(Collected { artifacts, uploads, files, bytes })
    }

    /// Rounds for ever.
    pub async fn run(self, duty: Duty) -> anyhow::Result<()> {
        loop {
            self.0.clock.sleep(EVERY).await;
            // One server alone, so that nothing is asked for twice.
            if duty.mandate().is_none() {
                continue;
            }
            match self.collect().await {
                Ok(Collected { artifacts: 0, uploads: 0, files: 0, .. }) => {}
                Ok(done) => tracing::info!(
                    artifacts = done.artifacts,
                    uploads = done.uploads,
                    files = done.files,
                    bytes = done.bytes,
                    "artifacts collected"
                ),
                Err(error) => {
                    tracing::warn!(%error, cause = ?std::error::Error::source(&error), "artifacts are collected in the next round");
                }
            }
        }
    }

    async fn collect_uploads(&self) -> Result<u64> {
        let now = self.0.clock.now();
        let mut n_ended = 0;
        loop {
            let expired = self
                .0
                .db
                .read(move |tx| Box::pin(async move { uploads::expired(tx, now, CHUNK).await }));
            let mut n_chunk = 0;
            for upload in expired.await? {
                // Also when it was completed: its request may have been used once more.
                let removed = self.0.store.remove(&upload.bytes(), upload.checkpoint.clone()).await;
                match removed {
                    Err(blob::Error::Busy(_)) => continue,
                    removed => removed.map_err(super::keep::unwritable)?,
                }
                let id = upload.id;
                let delete = self
                    .0
                    .db
                    .write(move |tx| Box::pin(async move { uploads::delete(tx, id).await }));
                delete.await?;
                n_chunk += 1;
                n_ended += u64::from(upload.artifact.is_none());
            }
            if n_chunk == 0 {
                return Ok(n_ended);
            }
        }
    }

    async fn collect_artifacts(&self) -> Result<u64> {
        let mut n_deleted = 0;
        loop {
            let now = self.0.clock.now();
            let delete = self.0.db.write(move |tx| {
                Box::pin(async move {
                    let condemned = store::condemned(tx, now, CHUNK).await?;
                    for id in &condemned {
                        store::delete(tx, *id, now).await?;
                    }
                    if condemned.is_empty() {
                        store::forget_references(tx, now).await?;
                    }
                    Ok(condemned.len() as u64)
                })
            });
            match delete.await? {
                0 => return Ok(n_deleted),
                n_chunk => n_deleted += n_chunk,
            }
        }
    }

    async fn collect_bytes(&self) -> Result<(u64, u64)> {
        self.condemn_bytes().await?;
        let (mut n_files, mut n_bytes) = (0, 0);
        loop {
            let find =
                self.0.db.read(move |tx| Box::pin(async move { stored::garbage(tx, CHUNK).await }));
            let garbage = find.await?;
            if garbage.is_empty() {
                return Ok((n_files, n_bytes));
            }
            for key in garbage {
                // A row is made before its bytes come, and some never do.
                let size = self.0.store.size(&key).await.map_err(super::keep::unwritable)?;
                self.0.store.delete(&key).await.map_err(super::keep::unwritable)?;
                let forget = self
                    .0
                    .db
                    .write(move |tx| Box::pin(async move { stored::forget(tx, &key).await }));
                if let (true, Some(size)) = (forget.await?, size) {
                    n_files += 1;
                    n_bytes += size;
                }
            }
        }
    }

    async fn condemn_bytes(&self) -> Result<()> {
        loop {
            let now = self.0.clock.now();
            let condemn = self.0.db.write(move |tx| {
                Box::pin(async move { stored::condemn(tx, now - GRACE, CHUNK, now).await })
            });
            if condemn.await? == 0 {
                return Ok(());
            }
        }
    }
}
