//! The sweep behind the nudges: tasks that wait in the database and that the queue does not
//! know are put back, so that the queue may lose anything at any time.
//!
//! A task on its way, between a match and its start or between a commit and its push, is also
//! unknown for a moment. So a task is put back only when a second look, a little later, finds
//! it still waiting and still unknown. That saves work only: a ghost entry would be refused by
//! the ledger.

use std::{collections::BTreeSet, time::Duration};

use crate::{
    clock::Clock,
    db::Db,
    error::{Error, Reason, Result},
    id::TaskId,
    queue::{Entry, Queue},
    tasks::queued,
};

/// Rows read at once.
const PAGE: u32 = 500;
/// Time between walks. With the second look and the walks themselves it stays below the ten
/// seconds that a lost task may take.
const EVERY: Duration = Duration::from_secs(5);
/// Time between a walk and its second look.
const SECOND_LOOK: Duration = Duration::from_secs(1);
/// From this many tasks on, a walk is left out while the numbers agree.
const MANY: usize = 20_000;
/// Walks left out in a row at most.
const LEFT_OUT: u32 = 12;

/// Compares the database with the queue.
pub struct Sweep {
    db: Db,
    queue: Queue,
    clock: Clock,
    left_out: u32,
}

impl Sweep {
    /// A sweep over a database and a queue.
    pub fn new(db: Db, queue: Queue, clock: Clock) -> Self {
        Self { db, queue, clock, left_out: 0 }
    }

    /// Sweeps until the server drains.
    pub async fn run(mut self) -> anyhow::Result<()> {
        loop {
            self.clock.sleep(EVERY).await;
            match self.run_once().await {
                Ok(0) => {}
                Ok(n_tasks) => tracing::warn!(n_tasks, "tasks were missing in the queue"),
                Err(error) if error.reason() == Reason::StorageUnavailable => {
                    tracing::debug!(%error, "queue not compared with the database");
                }
                Err(error) => tracing::warn!(%error, "queue not compared with the database"),
            }
        }
    }

    /// One walk and, if it missed something, a second look; returns how many tasks were put
    /// back.
    pub async fn run_once(&mut self) -> Result<usize> {
        let known = self.queue.len();
        if known >= MANY && self.left_out < LEFT_OUT {
            let waiting =
                self.db.read(|tx| Box::pin(async move { queued::queued_count(tx).await })).await?;
            if waiting <= known as u64 {
                self.left_out += 1;
                return Ok(0);
            }
        }
        self.left_out = 0;
        let suspects: BTreeSet<TaskId> =
            self.unknown(None, None).await?.into_iter().map(|entry| entry.id).collect();
        let (Some(first), Some(last)) = (suspects.first(), suspects.last()) else { return Ok(0) };
        self.clock.sleep(SECOND_LOOK).await;
        let mut lost = self.unknown(Some(*first), Some(*last)).await?;
        lost.retain(|entry| suspects.contains(&entry.id));
        let n_tasks = lost.len();
        self.queue.push_all(lost);
        Ok(n_tasks)
    }

    /// Waiting tasks that the queue does not know, in a range of ids, ends included.
    async fn unknown(&self, first: Option<TaskId>, last: Option<TaskId>) -> Result<Vec<Entry>> {
        let mut after = first.map(before);
        let mut unknown = Vec::new();
        loop {
            let page = self
                .db
                .read(move |tx| Box::pin(async move { queued::queued_page(tx, after, PAGE).await }))
                .await?;
            let Some(end) = page.last().map(|entry| entry.id) else { return Ok(unknown) };
            after = Some(end);
            unknown.extend(page.into_iter().filter(|entry| {
                last.is_none_or(|last| entry.id <= last) && !self.queue.contains(entry.id)
            }));
            if last.is_some_and(|last| end >= last) {
                return Ok::<_, Error>(unknown);
            }
        }
    }
}

/// The id just before one.
fn before(id: TaskId) -> TaskId {
    TaskId(uuid::Uuid::from_u128(id.0.as_u128().saturating_sub(1)))
}
