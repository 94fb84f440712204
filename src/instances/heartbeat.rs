//! The loop that shows the others that this instance is there, and takes the locks that nobody
//! holds.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::{Phase, Standing, standing::Lock, store};
use crate::{
    clock::Clock,
    db::Db,
    error::{Error, Result},
};

/// Wait before a heartbeat that failed is tried again; less where leases are short.
const AGAIN: Duration = Duration::from_millis(500);
/// Instances that were last heard of so long ago are forgotten.
const FORGOTTEN: Duration = Duration::from_hours(24);

/// Writes heartbeats.
pub struct Heartbeat {
    /// Where.
    pub db: Db,
    /// Time.
    pub clock: Clock,
    /// Whose.
    pub standing: Standing,
    /// Where the instance listens, for people.
    pub address: String,
    /// Cancelled when the instance leaves: it gives its locks away.
    pub leaving: CancellationToken,
}

impl Heartbeat {
    /// Writes one heartbeat and takes what locks there are. In vain after an interval, since the
    /// next one may find a better connection.
    pub async fn run_once(&self) -> Result<()> {
        let Some(id) = self.standing.id() else { return Ok(()) };
        let sent = self.clock.mono();
        let draining = self.leaving.is_cancelled();
        let (lasts, silent) = (self.standing.lock_ttl(), self.standing.dead_after());
        let (address, clock) = (self.address.clone(), self.clock.clone());
        let write = self.db.write(move |tx| {
            Box::pin(async move {
                let before = clock.mono();
                let version = env!("CARGO_PKG_VERSION");
                let time = store::beat(tx, id, version, &address, draining).await?;
                clock.follow(time, before, clock.mono());
                let n_others = store::n_others(tx, id, silent).await?;
                let mut locks = Vec::new();
                if draining {
                    store::release(tx, id).await?;
                    return Ok((locks, n_others));
                }
                for lock in Lock::ALL {
                    if let Some(epoch) = store::take(tx, lock, id, lasts).await? {
                        locks.push((lock, epoch));
                    }
                }
                Ok((locks, n_others))
            })
        });
        let bound = self.standing.interval().max(Duration::from_millis(200));
        let (locks, n_others) = tokio::select! {
            written = write => written?,
            () = self.clock.sleep(bound) => {
                return Err(Error::storage(format!("no answer within {bound:?}")));
            }
        };
        self.standing.renewed(sent, &locks, n_others);
        Ok(())
    }

    /// Writes heartbeats for ever, and a last one when the instance leaves.
    pub async fn run(self, last_call: CancellationToken) -> anyhow::Result<()> {
        let mut told = Phase::Good;
        while !last_call.is_cancelled() {
            let done = self.run_once().await;
            let phase = self.standing.phase();
            if phase != told {
                told = phase;
                match phase {
                    Phase::Good => tracing::info!("the database is within reach again"),
                    Phase::Cut => tracing::error!(
                        "out of the database's reach: no work is handed out, runners are sent \
                         elsewhere"
                    ),
                    Phase::Over => tracing::error!(
                        "out of the database's reach for too long: all leases are let go"
                    ),
                }
            }
            let wait = match done {
                Ok(()) => self.standing.interval(),
                Err(error) => {
                    tracing::warn!(%error, "no heartbeat was written; trying again");
                    AGAIN.min(self.standing.interval() / 2)
                }
            };
            tokio::select! {
                () = self.clock.sleep(wait) => {}
                () = last_call.cancelled() => {}
            }
        }
        // Runners have the whole time from now on to come back elsewhere.
        if let Err(error) = self.run_once().await {
            tracing::warn!(%error, "the last heartbeat was not written");
        }
        Ok(())
    }

    /// Forgets instances that are long gone; returns how many.
    pub async fn forget(db: &Db) -> Result<u64> {
        db.write(|tx| Box::pin(store::forget(tx, FORGOTTEN))).await
    }
}
