//! What this server did, told to Redis after the commit.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use bytes::Bytes;
use tokio_util::sync::CancellationToken;

use super::{Backlog, convert, untold};
use crate::{
    error::Result,
    id::TaskId,
    queue::{Entry, Told},
    redis::{Delivery, Item},
};

/// Most that is told at once.
const BATCH: usize = 512;

/// Tasks that wait in this server's queue while Redis does not answer. Beyond that they are found
/// in the database.
pub(super) const KEPT: usize = 10_000;

/// What a batch comes to: of each task, what was said last.
#[derive(Default)]
struct Batch {
    waits: HashMap<TaskId, Entry>,
    gone: HashSet<TaskId>,
    released: Vec<TaskId>,
    dead: Vec<(TaskId, String)>,
    acks: Vec<Delivery>,
}

impl Backlog {
    /// Tells Redis what this server did, until the last call; then gives back what it holds.
    pub(super) async fn write(self, last_call: CancellationToken) -> anyhow::Result<()> {
        let mut inlet = self.0.inlet.lock().await;
        let mut told = Vec::with_capacity(BATCH);
        loop {
            tokio::select! {
                biased;
                n_told = inlet.told.recv_many(&mut told, BATCH) => if n_told == 0 { break },
                () = last_call.cancelled() => break,
            }
            if inlet.take_missed() {
                self.fell_behind();
            }
            self.tell(told.drain(..)).await;
        }
        drop(inlet);
        self.leave().await;
        Ok(())
    }

    /// Tells what was said, or keeps it here when Redis does not answer.
    pub(super) async fn tell(&self, told: impl IntoIterator<Item = Told>) {
        let batch = self.sort(told);
        if self.is_up() {
            match self.send(&batch).await {
                Ok(()) => return,
                Err(error) => tracing::warn!(%error, "Redis was not told of some tasks"),
            }
        }
        self.fell_behind();
        self.0.owed.lock().extend(batch.acks);
        let queue = &self.0.queue;
        let room = KEPT.saturating_sub(queue.len());
        queue.push_all(batch.waits.into_values().take(room));
    }

    fn sort(&self, told: impl IntoIterator<Item = Told>) -> Batch {
        let acks = std::mem::take(&mut *self.0.owed.lock());
        let mut batch = Batch { acks, ..Batch::default() };
        let mut held = self.0.held.lock();
        for told in told {
            match told {
                Told::Waits(entry) => {
                    batch.gone.remove(&entry.id);
                    batch.waits.insert(entry.id, *entry);
                }
                Told::Gone(id) => {
                    batch.waits.remove(&id);
                    match held.remove(&id) {
                        Some(held) => batch.acks.push(held.delivery),
                        None => drop(batch.gone.insert(id)),
                    }
                }
                Told::Released(id) => batch.released.push(id),
                Told::Dead { task, reason } => batch.dead.push((task, reason)),
            }
        }
        batch
    }

    async fn send(&self, batch: &Batch) -> Result<()> {
        let inner = &self.0;
        let texts = |ids: &mut dyn Iterator<Item = &TaskId>| -> Vec<String> {
            ids.map(ToString::to_string).collect()
        };
        let (gone, released) = (texts(&mut batch.gone.iter()), texts(&mut batch.released.iter()));
        let gone: Vec<_> = gone.iter().map(String::as_str).collect();
        let released: Vec<_> = released.iter().map(String::as_str).collect();
        let dead = texts(&mut batch.dead.iter().map(|(id, _)| id));
        let reasons = batch.dead.iter().map(|(_, reason)| Bytes::from(reason.clone()));
        let dead: Vec<_> = dead.iter().map(String::as_str).zip(reasons).collect();
        let ttl = inner.settings.dead_letter_ttl;
        tokio::try_join!(
            async {
                if batch.acks.is_empty() { Ok(()) } else { inner.consumer.ack(&batch.acks).await }
            },
            async { inner.work.remove(&gone).await.map(drop) },
            async { inner.work.release(&released).await.map(drop) },
            async { inner.work.bury(&dead, ttl).await },
        )
        .map_err(untold)?;
        self.add(batch.waits.values()).await
    }

    /// Adds tasks that wait: those that may start now to their lanes, others until they may.
    pub(super) async fn add<'a>(&self, entries: impl IntoIterator<Item = &'a Entry>) -> Result<()> {
        let now = self.0.clock.now();
        let (mut ready, mut later): (Vec<Item>, Vec<(Item, Duration)>) = Default::default();
        for entry in entries {
            let item = convert::item(entry)?;
            match entry.not_before.filter(|time| *time > now) {
                Some(time) => later.push((item, time.since(now))),
                None => ready.push(item),
            }
        }
        let work = &self.0.work;
        tokio::try_join!(
            async { if ready.is_empty() { Ok(0) } else { work.add(&ready).await } },
            async { if later.is_empty() { Ok(0) } else { work.delay(&later).await } },
        )
        .map(drop)
        .map_err(untold)
    }

    /// Gives back what it holds, for the end of the process.
    async fn leave(&self) {
        let waiting = self.0.queue.take_all();
        let lanes: Vec<_> = self.0.lanes.lock().values().map(|(lane, _)| lane.clone()).collect();
        let left = async {
            self.add(&waiting).await?;
            self.0.consumer.leave(&lanes).await.map_err(untold)
        };
        if let Err(error) = left.await {
            tracing::warn!(%error, "others get what this server had fetched only after a while");
        }
    }
}
