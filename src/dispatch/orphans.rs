//! What instances leave behind when they die: attempts whose runners came back to no other, and
//! time limits that nobody watches. One instance at a time looks for them.

use std::time::Duration;

use crate::{
    clock::Clock,
    db::Db,
    error::{Reason, Result},
    faults::{self, Fault},
    instances::{Duty, Heartbeat, Mandate, Standing},
    tasks::{ledger::Ledger, reads, state::Event},
};

/// Between two looks; less where leases are short. With [`LATE`] and a commit it stays below the
/// second within which a limit holds.
const EVERY: Duration = Duration::from_millis(400);
/// Attempts lost, or limits passed, at once.
const AT_ONCE: u32 = 500;
/// A limit that passed so long ago is watched by nobody.
const LATE: Duration = Duration::from_millis(400);
/// Looks between two at instances that are long gone.
const FORGET_EVERY: u32 = 9000;

/// Ends what dead instances left behind.
pub struct Orphans {
    /// Truth.
    pub db: Db,
    /// Ends attempts.
    pub ledger: Ledger,
    /// Time.
    pub clock: Clock,
    /// This instance.
    pub standing: Standing,
    /// The right to lose orphans.
    pub orphans: Duty,
    /// The right to end what is overdue.
    pub limits: Duty,
}

impl Orphans {
    /// Loses attempts whose instances are dead, and ends tasks whose limits have passed; returns
    /// how many of each.
    pub async fn run_once(&self) -> Result<(usize, usize)> {
        let mut done = (0, 0);
        // After an outage of the database all instances seem dead, until they had time to show
        // that they are not.
        let settled = self.standing.good_for() > 2 * self.standing.interval();
        if settled
            && !faults::planted(Fault::LeaveOrphans)
            && let Some(mandate) = self.orphans.mandate()
        {
            done.0 = self.lose(&mandate).await?;
        }
        if let Some(mandate) = self.limits.mandate() {
            done.1 = self.expire(&mandate).await?;
        }
        Ok(done)
    }

    async fn lose(&self, mandate: &Mandate) -> Result<usize> {
        let silent = if faults::planted(Fault::OrphanLiving) {
            Duration::ZERO
        } else {
            self.standing.dead_after()
        };
        let read = self
            .db
            .read(move |tx| Box::pin(async move { reads::orphans(tx, silent, AT_ONCE).await }));
        let events = read.await?.into_iter().map(|orphan| {
            let reason = match orphan.instance {
                Some(instance) => format!(
                    "server {instance} was not heard of for {silent:?}, and the runner did not \
                     come back to another"
                ),
                None => "no server holds its runner".to_owned(),
            };
            let (attempt, instance) = (orphan.attempt, orphan.instance);
            (orphan.id, Event::Orphan { attempt, instance, reason })
        });
        self.end(mandate, events.collect()).await
    }

    async fn expire(&self, mandate: &Mandate) -> Result<usize> {
        // Whoever watches them comes first.
        let now = self.clock.now() - LATE;
        let read =
            self.db.read(move |tx| Box::pin(async move { reads::overdue(tx, now, AT_ONCE).await }));
        let events = read.await?.into_iter().map(|(id, limit)| (id, Event::Expire(limit)));
        self.end(mandate, events.collect()).await
    }

    async fn end(
        &self,
        mandate: &Mandate,
        events: Vec<(crate::id::TaskId, Event)>,
    ) -> Result<usize> {
        if events.is_empty() {
            return Ok(0);
        }
        let mut n_ended = 0;
        for answer in self.ledger.apply_for(mandate, events).await {
            match answer {
                Ok(_) => n_ended += 1,
                // Somebody was faster.
                Err(error)
                    if matches!(
                        error.reason(),
                        Reason::LeaseLost | Reason::StateConflict | Reason::NotFound
                    ) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(n_ended)
    }

    /// Looks for ever.
    pub async fn run(self) -> anyhow::Result<()> {
        let every = EVERY.min(self.standing.interval());
        let mut n_looks = 0;
        loop {
            self.clock.sleep(every).await;
            match self.run_once().await {
                Ok((0, 0)) => {}
                Ok((orphans, overdue)) => {
                    tracing::warn!(orphans, overdue, "ended what other servers left behind");
                }
                Err(error) => tracing::warn!(%error, "what other servers left behind waits"),
            }
            n_looks += 1;
            if u32::is_multiple_of(n_looks, FORGET_EVERY)
                && let Err(error) = Heartbeat::forget(&self.db).await
            {
                tracing::debug!(%error, "servers that are gone are forgotten later");
            }
        }
    }
}
