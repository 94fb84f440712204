//! Dispatch: matches become attempts.
//!
//! The loop takes matches out of the queue, has the ledger start the attempts, and hands them to
//! the runners' sessions. Starts of one round are committed while the next round is decided:
//! their entries and credits are out of the queue meanwhile. A task that finds a free runner
//! when it is accepted does not come here: the ledger starts it in the same commit, by the
//! [`starter`]. What a nudge lost, the [`Sweep`] finds.

mod holdings;
mod orphans;
mod sweep;
#[cfg(test)]
mod tests;

use std::{sync::Arc, time::Duration};

use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

pub use self::{holdings::Holdings, orphans::Orphans, sweep::Sweep};
use crate::{
    clock::Clock,
    error::Reason,
    queue::{Match, Queue},
    runners::Registry,
    supervisor::Supervisor,
    tasks::ledger::{Ledger, Start, Starter},
};

/// Matches decided at once.
const ROUND: usize = 256;
/// Rounds being committed at once: one in the ledger, one waiting for it, one spare.
const ROUNDS: usize = 3;
/// Longest pause without a look: delayed tasks start within this time, also when the wall
/// clock jumps.
const LOOK: Duration = Duration::from_millis(200);
/// Pause of a round that storage refused, before its tasks are offered again.
const REFUSED: Duration = Duration::from_millis(250);

/// What the loop works with.
#[derive(Clone)]
pub struct Dispatcher {
    /// Waiting tasks and the runners' credits.
    pub queue: Queue,
    /// Starts attempts.
    pub ledger: Ledger,
    /// Sends them out.
    pub registry: Registry,
    /// Time.
    pub clock: Clock,
    /// Spawns rounds.
    pub supervisor: Supervisor,
}

impl Dispatcher {
    /// Dispatches until the server drains.
    pub async fn run(self) -> anyhow::Result<()> {
        let rounds = Arc::new(Semaphore::new(ROUNDS));
        loop {
            let permit = rounds.clone().acquire_owned().await?;
            if !self.registry.may_assign() {
                drop(permit);
                self.clock.sleep(LOOK).await;
                continue;
            }
            let matches = self.queue.take_matches(self.clock.now(), ROUND);
            if matches.is_empty() {
                drop(permit);
                tokio::select! {
                    () = self.queue.changed() => {}
                    () = self.clock.sleep(LOOK) => {}
                }
                continue;
            }
            let dispatcher = self.clone();
            self.supervisor.spawn("dispatch round", async move {
                dispatcher.start(matches).await;
                drop(permit);
            });
        }
    }

    /// Decides and starts one round; returns how many matches there were.
    pub async fn run_once(&self) -> usize {
        let matches = self.queue.take_matches(self.clock.now(), ROUND);
        let n_matches = matches.len();
        self.start(matches).await;
        n_matches
    }

    async fn start(&self, matches: Vec<Match>) {
        let mut starts = Vec::with_capacity(matches.len());
        let mut started = Vec::with_capacity(matches.len());
        for matched in matches {
            let start = start_of(&self.registry, &matched);
            let Match { entry, runner } = matched;
            let Some(start) = start else {
                // It left since the match was made.
                self.queue.give_back(runner);
                self.queue.push(entry);
                continue;
            };
            starts.push(start);
            started.push((entry, runner));
        }
        if starts.is_empty() {
            return;
        }
        let answers = self.ledger.start(starts).await;
        let mut refused = Vec::new();
        for ((entry, runner), answer) in started.into_iter().zip(answers) {
            match answer {
                Ok(task) => self.registry.assign(runner, task),
                // What ended or runs has no business here; what storage refused has.
                Err(error)
                    if matches!(error.reason(), Reason::StorageUnavailable | Reason::Conflict) =>
                {
                    refused.push((entry, runner));
                }
                Err(error) => {
                    tracing::debug!(task.id = %entry.id, %error, "not started");
                    self.queue.give_back(runner);
                    self.queue.gone(entry.id);
                }
            }
        }
        if refused.is_empty() {
            return;
        }
        tracing::warn!(n_tasks = refused.len(), "storage refused to start tasks; trying again");
        self.clock.sleep(REFUSED).await;
        let (entries, runners): (Vec<_>, Vec<_>) = refused.into_iter().unzip();
        for runner in runners {
            self.queue.give_back(runner);
        }
        self.queue.push_all(entries);
    }
}

/// Starts tasks in the commit that accepts them, until `draining` is cancelled.
pub fn starter(registry: &Registry, draining: CancellationToken) -> Starter {
    let (known, sent) = (registry.clone(), registry.clone());
    Starter {
        // Nothing new is assigned by a server that is on its way out.
        start: Box::new(
            move |matched| {
                if draining.is_cancelled() { None } else { start_of(&known, matched) }
            },
        ),
        assign: Box::new(move |runner, task| sent.assign(runner, task)),
    }
}

/// The start that a match stands for, if its runner is still there.
fn start_of(registry: &Registry, matched: &Match) -> Option<Start> {
    let supply = registry.supply(matched.runner)?;
    let entry = &matched.entry;
    Some(Start {
        task: entry.id,
        waited: entry.not_before.filter(|_| entry.waited_out),
        runner: supply.runner,
        node: supply.node,
        engine: supply.engine,
        engine_version: supply.engine_version,
    })
}
