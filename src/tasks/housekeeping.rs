//! What grows old: remembered `request_ids`.

use std::time::Duration;

use super::store;
use crate::{
    clock::{Clock, Micros},
    db::Db,
    error::Result,
};

/// Between two rounds.
const EVERY: Duration = Duration::from_mins(10);
/// Rows deleted in one transaction, so that none waits long behind it.
const CHUNK: u32 = 1000;

/// Forgets `request_ids` that no longer count; returns how many.
pub async fn run_once(db: &Db, now: Micros) -> Result<u64> {
    let before = now - store::REQUEST_ID_TTL;
    let mut n_forgotten = 0;
    loop {
        let forget = db.write(move |tx| {
            Box::pin(async move { store::forget_requests(tx, before, CHUNK).await })
        });
        let n_chunk = forget.await?;
        n_forgotten += n_chunk;
        if n_chunk < u64::from(CHUNK) {
            return Ok(n_forgotten);
        }
    }
}

/// Forgets now and then, for ever.
pub async fn run(db: Db, clock: Clock) -> anyhow::Result<()> {
    loop {
        clock.sleep(EVERY).await;
        if let Err(error) = run_once(&db, clock.now()).await {
            tracing::warn!(%error, "old request_ids are kept until the next round");
        }
    }
}
