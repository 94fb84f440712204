//! What grows old: remembered `request_ids`, and ended tasks by the operator's policy.

use std::time::Duration;

use super::{
    reads::{self, Ended},
    store,
};
use crate::{
    clock::{Clock, Micros},
    db::Db,
    error::Result,
    instances::{Duty, Mandate},
};

/// Between two rounds.
const EVERY: Duration = Duration::from_mins(10);
/// Rows deleted in one transaction, so that none waits long behind it.
const CHUNK: u32 = 1000;
/// Tasks deleted in one transaction, with what hangs on them.
const TASKS: u32 = 200;

/// How long ended tasks are kept; for ever when unset.
#[derive(Clone, Copy, Debug, Default)]
pub struct Retention {
    /// Ended tasks, dead letters excepted.
    pub ended_tasks: Option<Duration>,
    /// Dead letters.
    pub dead_letters: Option<Duration>,
}

/// What was deleted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    /// Ended tasks.
    pub tasks: u64,
    /// Dead letters.
    pub dead_letters: u64,
    /// Remembered `request_ids`.
    pub request_ids: u64,
}

/// Deletes what is old enough.
pub async fn run_once(
    db: &Db,
    now: Micros,
    retention: Retention,
    mandate: &Mandate,
) -> Result<Collected> {
    let mut collected =
        Collected { request_ids: forget_requests(db, now, mandate).await?, ..Collected::default() };
    if let Some(kept) = retention.ended_tasks {
        collected.tasks = delete_ended(db, Ended::Done, now - kept, mandate).await?;
    }
    if let Some(kept) = retention.dead_letters {
        collected.dead_letters = delete_ended(db, Ended::Dead, now - kept, mandate).await?;
    }
    Ok(collected)
}

/// Forgets `request_ids` that no longer count; returns how many.
async fn forget_requests(db: &Db, now: Micros, mandate: &Mandate) -> Result<u64> {
    let before = now - store::REQUEST_ID_TTL;
    let mut n_forgotten = 0;
    loop {
        let mandate = mandate.clone();
        let forget = db.write(move |tx| {
            Box::pin(async move {
                mandate.check(tx).await?;
                store::forget_requests(tx, before, CHUNK).await
            })
        });
        let n_chunk = forget.await?;
        n_forgotten += n_chunk;
        if n_chunk < u64::from(CHUNK) {
            return Ok(n_forgotten);
        }
    }
}

/// Deletes tasks that ended before a time; returns how many. Their transcripts, which nothing
/// refers to then, are collected by the archiver.
async fn delete_ended(db: &Db, which: Ended, before: Micros, mandate: &Mandate) -> Result<u64> {
    let mut after = None;
    let mut n_deleted = 0;
    loop {
        let read = db.read(move |tx| {
            Box::pin(async move { reads::ended_page(tx, which, before, after, TASKS).await })
        });
        let page = read.await?;
        let Some(last) = page.last() else { return Ok(n_deleted) };
        after = Some(*last);
        n_deleted += page.len() as u64;
        let mut script = db.script();
        store::delete(&mut script, &page)?;
        let mandate = mandate.clone();
        let delete = db.write(move |tx| {
            Box::pin(async move {
                mandate.check(tx).await?;
                script.run(tx).await
            })
        });
        delete.await?;
    }
}

/// Deletes what is old enough now and then, for ever.
pub async fn run(db: Db, clock: Clock, retention: Retention, duty: Duty) -> anyhow::Result<()> {
    loop {
        clock.sleep(EVERY).await;
        let Some(mandate) = duty.mandate() else { continue };
        match run_once(&db, clock.now(), retention, &mandate).await {
            Ok(collected) if collected != Collected::default() => {
                tracing::info!(?collected, "old rows were deleted");
            }
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "old rows are kept until the next round"),
        }
    }
}
