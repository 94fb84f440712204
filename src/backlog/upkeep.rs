//! What time brings: delayed tasks that are due, work that others left lying, work that cannot
//! start here, and what nobody uses any more.

use std::time::Duration;

use super::{Backlog, HOLD, untold};
use crate::{
    error::{Error, Result},
    faults::{self, Fault},
    id::TaskId,
    queue::Report,
    redis::Lane,
};

/// How often what is fetched is looked at.
const EVERY: Duration = Duration::from_millis(500);

/// Longest pause of the mover, which other servers' delayed tasks depend on too.
const MOVE_EVERY: Duration = Duration::from_millis(250);

/// Delayed tasks moved at once.
const MOVED: u32 = 256;

/// How often unused lanes and consumers are looked for, and depths added up.
const TIDY_EVERY: Duration = Duration::from_mins(1);

/// Consumers that were silent for so long, and hold nothing, are gone.
const CONSUMER_TTL: Duration = Duration::from_mins(10);

/// Lanes that were unused for so long, and hold nothing, are gone.
const LANE_TTL: Duration = Duration::from_hours(1);

/// The board on which servers tell of themselves.
const BOARD: &str = "servers";

/// How often they do, and how long it counts.
const TELL_EVERY: Duration = Duration::from_secs(1);
const TELL_TTL: Duration = Duration::from_secs(5);

impl Backlog {
    /// Tells the others of this server and hears of them, for ever.
    pub(super) async fn compare_notes(self) -> anyhow::Result<()> {
        loop {
            if self.is_up()
                && let Err(error) = self.compare_notes_once().await
            {
                tracing::debug!(%error, "other servers were not told of this one");
            }
            self.0.clock.sleep(TELL_EVERY).await;
        }
    }

    pub(super) async fn compare_notes_once(&self) -> Result<()> {
        let inner = &self.0;
        let note = serde_json::to_vec(&inner.queue.report()).map_err(Error::internal)?;
        let name = inner.consumer.name();
        inner.redis.put_note(BOARD, name, note.into(), TELL_TTL).await.map_err(untold)?;
        let mut notes = inner.redis.notes(BOARD).await.map_err(untold)?;
        notes.remove(name);
        let n_others = notes.len() as u64;
        // What another version says in another way is left out.
        let told = notes
            .into_iter()
            .filter_map(|(name, note)| Some((name, serde_json::from_slice::<Report>(&note).ok()?)));
        let told = told.collect();
        inner.counter.set_servers(1 + n_others);
        inner.queue.set_elsewhere(&told);
        Ok(())
    }

    /// Gives back, takes over and tidies up, for ever.
    pub(super) async fn look_after(self) -> anyhow::Result<()> {
        let clock = self.0.clock.clone();
        let (mut claimed, mut tidied) = (clock.mono(), clock.mono());
        loop {
            clock.sleep(EVERY).await;
            if !self.is_up() {
                continue;
            }
            let now = clock.mono();
            let outcome = async {
                if !self.0.owed.lock().is_empty() {
                    self.tell([]).await;
                }
                self.give_back().await?;
                self.hand_out().await?;
                if now.since(claimed) >= self.0.settings.ack_timeout / 4
                    && !faults::planted(Fault::LeaveFetched)
                {
                    claimed = now;
                    self.claim().await?;
                }
                if now.since(tidied) >= TIDY_EVERY {
                    tidied = now;
                    self.tidy().await?;
                }
                Ok::<_, Error>(())
            };
            if let Err(error) = outcome.await {
                tracing::warn!(%error, "the backlog was not looked after");
            }
        }
    }

    /// Gives back what could not start here for a while.
    pub(super) async fn give_back(&self) -> Result<u64> {
        let now = self.0.clock.mono();
        let late: Vec<TaskId> = {
            let held = self.0.held.lock();
            let late = held.iter().filter(|(_, held)| now.since(held.since) >= HOLD);
            late.map(|(id, _)| *id).collect()
        };
        if late.is_empty() {
            return Ok(0);
        }
        // What is not in the queue is being started.
        let taken = self.0.queue.take(&late);
        let deliveries: Vec<_> = {
            let mut held = self.0.held.lock();
            taken.iter().filter_map(|entry| held.remove(&entry.id)).collect()
        };
        let deliveries: Vec<_> = deliveries.into_iter().map(|held| held.delivery).collect();
        self.0.consumer.give_back(&deliveries).await.map_err(untold)
    }

    /// Puts where others find it what waits here and was not fetched: kept since Redis did not take
    /// it, or not started after all.
    async fn hand_out(&self) -> Result<()> {
        let strays = {
            let held = self.0.held.lock();
            self.0.queue.take_unless(|id| held.contains_key(&id))
        };
        let outcome = self.add(&strays).await;
        if outcome.is_err() {
            self.0.queue.push_all(strays);
        }
        outcome
    }

    /// Takes over what others had for too long, as far as it can start here.
    pub(super) async fn claim(&self) -> Result<usize> {
        let (names, most) = self.0.queue.fetchable();
        let lanes: Vec<Lane> = {
            let known = self.0.lanes.lock();
            names.iter().filter_map(|name| Some(known.get(name)?.0.clone())).collect()
        };
        if lanes.is_empty() {
            return Ok(0);
        }
        let idle = self.0.settings.ack_timeout;
        let claimed = self.0.consumer.claim(&lanes, idle, most as usize).await.map_err(untold)?;
        if !claimed.is_empty() {
            let n_tasks = claimed.len();
            tracing::warn!(n_tasks, "took over tasks that another server had fetched and left");
        }
        self.take(claimed).await
    }

    async fn tidy(&self) -> Result<()> {
        self.0.work.tidy(CONSUMER_TTL, LANE_TTL).await.map_err(untold)?;
        if self.0.work.recount().await.map_err(untold)? {
            tracing::warn!("the depths of the queues did not add up and were counted anew");
        }
        Ok(())
    }

    /// Moves delayed tasks that are due, for ever.
    pub(super) async fn move_due(self) -> anyhow::Result<()> {
        loop {
            let mut pause = MOVE_EVERY;
            if self.is_up() && !faults::planted(Fault::LeaveDelayed) {
                match self.0.work.move_due(MOVED).await {
                    Ok(moved) => pause = moved.next.unwrap_or(pause).min(pause),
                    Err(error) => tracing::debug!(%error, "delayed tasks were not moved"),
                }
            }
            self.0.clock.sleep(pause.max(Duration::from_millis(5))).await;
        }
    }
}
