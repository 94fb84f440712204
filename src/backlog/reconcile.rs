//! The rows against Redis: what waits by the rows and is not in Redis is added, so that Redis may
//! lose anything at any time.
//!
//! Servers take turns, and whoever knows of a loss compares at once. Any may do it at any time, several
//! at once too: an id that is there with the same or a later attempt is not added again. So a turn is
//! a word in Redis that lapses soon, and not a lock of the database, which a dead server would hold
//! for longer than a lost task may take.

use std::{collections::BTreeSet, sync::atomic::Ordering, time::Duration};

use super::{Backlog, untold};
use crate::{
    error::Result,
    faults::{self, Fault},
    id::TaskId,
    queue::Entry,
    tasks::queued,
};

/// Rows compared at once.
const PAGE: u32 = 500;

/// Between two looks whether it is this server's turn.
const EVERY: Duration = Duration::from_millis(2_500);

/// How long nobody else has a turn. With the pause and the walk it stays below the ten seconds that a
/// lost task may take, also when the server dies that has it.
const TURN: Duration = Duration::from_secs(2);

/// What the turns are called.
const NAME: &str = "reconcile";

/// From this many tasks on, a walk is left out while the numbers agree.
const MANY: u64 = 20_000;

/// Turns left out in a row at most.
const LEFT_OUT: u32 = 12;

/// Walks until Redis is searched for what does not wait any more.
const SEARCH_EVERY: u32 = 6;

impl Backlog {
    /// Compares now and then, and at once when Redis may have lost something.
    pub(super) async fn reconcile(self) -> anyhow::Result<()> {
        let clock = self.0.clock.clone();
        let mut losses = self.0.redis.losses();
        let (mut left_out, mut walks, mut suspects) = (0, 0_u32, BTreeSet::new());
        loop {
            tokio::select! {
                changed = losses.changed() => {
                    changed?;
                    self.fell_behind();
                }
                () = self.0.compare.notified() => {}
                () = clock.sleep(EVERY) => {}
            }
            if !self.is_up() {
                // Told of again when Redis answers.
                clock.sleep(Duration::from_millis(250)).await;
                continue;
            }
            let behind = self.0.behind.swap(false, Ordering::SeqCst);
            let turn = self.0.redis.take_turn(NAME, TURN).await;
            if !behind && !turn.unwrap_or(false) {
                continue;
            }
            if !behind && left_out < LEFT_OUT && self.numbers_agree().await.unwrap_or(false) {
                left_out += 1;
                continue;
            }
            left_out = 0;
            if faults::planted(Fault::NeverReconcile) {
                continue;
            }
            match self.compare().await {
                Ok(0) => {}
                Ok(n_tasks) => tracing::warn!(n_tasks, "tasks were missing in Redis"),
                Err(error) => {
                    tracing::warn!(%error, "Redis was not compared with the database");
                    self.0.behind.store(true, Ordering::SeqCst);
                    continue;
                }
            }
            self.0.lacking.store(false, Ordering::SeqCst);
            if self.0.behind.load(Ordering::SeqCst) {
                self.0.lacking.store(true, Ordering::SeqCst);
            }
            walks = walks.wrapping_add(1);
            if walks.is_multiple_of(SEARCH_EVERY)
                && let Err(error) = self.drop_ghosts(&mut suspects).await
            {
                tracing::debug!(%error, "Redis was not searched for tasks that do not wait");
            }
        }
    }

    /// Whether there are many tasks, and Redis knows of as many as wait.
    async fn numbers_agree(&self) -> Result<bool> {
        let depths = self.0.work.depths().await.map_err(untold)?;
        let known: u64 = depths.values().sum();
        if known < MANY {
            return Ok(false);
        }
        let count = self.0.db.read(|tx| Box::pin(async move { queued::queued_count(tx).await }));
        Ok(count.await? <= known)
    }

    /// Adds what waits by the rows and is not in Redis; returns how many tasks those are.
    pub(super) async fn compare(&self) -> Result<usize> {
        let (mut after, mut n_tasks) = (None, 0);
        loop {
            let read = self.0.db.read(move |tx| {
                Box::pin(async move { queued::queued_page(tx, after, PAGE).await })
            });
            let page = read.await?;
            let Some(last) = page.last() else { return Ok(n_tasks) };
            after = Some(last.id);
            let ids: Vec<String> = page.iter().map(|entry| entry.id.to_string()).collect();
            let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
            let known = self.0.work.known(&ids).await.map_err(untold)?;
            let missing: Vec<&Entry> = page
                .iter()
                .zip(known)
                .filter(|(entry, known)| known.is_none_or(|attempt| attempt < entry.attempt))
                .filter(|(entry, _)| entry.attempt == 0 || !faults::planted(Fault::ForgetRetries))
                .map(|(entry, _)| entry)
                .collect();
            n_tasks += missing.len();
            self.add(missing).await?;
        }
    }

    /// Takes out what two searches in a row found in Redis and not waiting by the rows: it counts to
    /// the limits. What is promised room only lapses by itself.
    pub(super) async fn drop_ghosts(&self, suspects: &mut BTreeSet<TaskId>) -> Result<()> {
        let work = &self.0.work;
        let (mut cursor, mut found) = ("0".to_owned(), BTreeSet::new());
        loop {
            let (next, ids) = work.ids(&cursor, PAGE).await.map_err(untold)?;
            let ids: Vec<TaskId> = ids.iter().filter_map(|id| id.parse().ok()).collect();
            let asked = ids.clone();
            let read = self
                .0
                .db
                .read(move |tx| Box::pin(async move { queued::queued_among(tx, &asked).await }));
            let queued: BTreeSet<TaskId> = read.await?.into_iter().collect();
            found.extend(ids.into_iter().filter(|id| !queued.contains(id)));
            if next == "0" {
                break;
            }
            cursor = next;
        }
        let again: Vec<String> = found.intersection(suspects).map(ToString::to_string).collect();
        let again: Vec<&str> = again.iter().map(String::as_str).collect();
        let known = work.known(&again).await.map_err(untold)?;
        let ghosts: Vec<&str> = again
            .iter()
            .zip(known)
            .filter(|(_, known)| known.is_some())
            .map(|(id, _)| *id)
            .collect();
        if !ghosts.is_empty() {
            tracing::info!(n_tasks = ghosts.len(), "tasks in Redis did not wait any more");
        }
        work.remove(&ghosts).await.map_err(untold)?;
        *suspects = found;
        Ok(())
    }
}
