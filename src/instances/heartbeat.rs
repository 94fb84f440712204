//! The loop that shows the others that this instance is there, and takes the locks that nobody
//! holds.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::{Phase, Standing, standing::Lock, store};
use crate::{
    clock::Clock,
    db::Db,
    error::{Error, Result},
    faults::{self, Fault},
    id::InstanceId,
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
    /// Writes one heartbeat, and takes what locks there are. In vain after an interval, since the
    /// next one may find a better connection.
    ///
    /// That the instance is there is one thing, and which locks it has another: a lock may be waited
    /// for, and servers that wait are no deader than others.
    pub async fn run_once(&self) -> Result<()> {
        let Some(id) = self.standing.id() else { return Ok(()) };
        let sent = self.clock.mono();
        let draining = self.leaving.is_cancelled();
        let silent = self.standing.dead_after();
        let (address, clock) = (self.address.clone(), self.clock.clone());
        let write = self.db.write_first(move |tx| {
            Box::pin(async move {
                let before = clock.mono();
                let version = env!("CARGO_PKG_VERSION");
                let time = store::beat(tx, id, version, &address, draining).await?;
                if !faults::planted(Fault::TrustOwnClock) {
                    clock.follow(time, before, clock.mono());
                }
                store::n_others(tx, id, silent).await
            })
        });
        let n_others = self.in_time(write).await?;
        self.standing.renewed(sent, n_others);
        if let Err(error) = self.take_locks(id, draining).await {
            // Those that it has lapse by themselves.
            tracing::debug!(%error, "no locks were taken; trying again with the next heartbeat");
        }
        Ok(())
    }

    /// Takes the locks that nobody else has, or gives all away. Those of others are not touched, so
    /// that nobody waits for them.
    async fn take_locks(&self, id: InstanceId, draining: bool) -> Result<()> {
        let sent = self.clock.mono();
        let lasts = self.standing.lock_ttl();
        let mut free = Vec::new();
        if !draining {
            let read = self.db.read(move |tx| Box::pin(store::held_by_others(tx, id)));
            let taken = self.in_time(read).await?;
            free.extend(Lock::ALL.into_iter().filter(|lock| !taken.contains(lock.name())));
            if free.is_empty() {
                self.standing.took(sent, &[]);
                return Ok(());
            }
        }
        let write = self.db.write_first(move |tx| {
            Box::pin(async move {
                let mut locks = Vec::new();
                if draining {
                    store::release(tx, id).await?;
                }
                for lock in free {
                    if let Some(epoch) = store::take(tx, lock, id, lasts).await? {
                        locks.push((lock, epoch));
                    }
                }
                Ok(locks)
            })
        });
        let locks = self.in_time(write).await?;
        self.standing.took(sent, &locks);
        Ok(())
    }

    async fn in_time<T>(&self, call: impl Future<Output = Result<T>>) -> Result<T> {
        let bound = self.standing.interval().max(Duration::from_millis(200));
        tokio::select! {
            answered = call => answered,
            () = self.clock.sleep(bound) => {
                Err(Error::storage(format!("no answer within {bound:?}")))
            }
        }
    }

    /// Writes heartbeats for ever, and a last one when the instance leaves.
    pub async fn run(self, last_call: CancellationToken) -> anyhow::Result<()> {
        let mut told = Phase::Good;
        while !last_call.is_cancelled() {
            let began = self.clock.mono();
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
            let next = match done {
                // However long its locks took.
                Ok(()) => began + self.standing.interval(),
                Err(error) => {
                    tracing::warn!(%error, "no heartbeat was written; trying again");
                    self.clock.mono() + AGAIN.min(self.standing.interval() / 2)
                }
            };
            tokio::select! {
                () = self.clock.sleep_until(next) => {}
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
