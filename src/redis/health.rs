//! Whether Redis answers, and whether its data are still those that were there before.

use std::time::Duration;

use tokio::sync::broadcast::error::RecvError;

use super::{Error, Redis, Result, script::Args};
use crate::clock::Mono;

/// How often Redis is looked at. A loss that no pull has found is found so late at most.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Whether Redis answers.
#[derive(Clone, Debug, PartialEq)]
pub enum Health {
    /// It does.
    Up {
        /// Time of the last answer.
        latency: Duration,
    },
    /// It does not.
    Down {
        /// Since when, by the monotonic clock.
        since: Mono,
        /// What was last tried in vain.
        problem: String,
    },
}

impl Health {
    /// Whether it answers.
    pub fn is_up(&self) -> bool {
        matches!(self, Self::Up { .. })
    }
}

/// What tells one set of data from another.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Facts {
    /// Lasts as long as the data.
    era: String,
    /// Lasts as long as the process: one that comes back, or takes over, may lack what came last.
    process: String,
}

impl Redis {
    /// Looks once: whether it answers, and whether data were lost since.
    pub(super) async fn look(&self) -> Result<()> {
        let inner = &self.0;
        let before = inner.clock.mono();
        let outcome = self.facts().await;
        match outcome {
            Ok(facts) => {
                let latency = inner.clock.mono().since(before);
                if !inner.health.borrow().is_up() {
                    tracing::info!("Redis answers again");
                }
                inner.health.send_replace(Health::Up { latency });
                self.compare(&facts);
                Ok(())
            }
            Err(error) => {
                let since = match &*inner.health.borrow() {
                    Health::Down { since, .. } => *since,
                    Health::Up { .. } => {
                        tracing::warn!(%error, "Redis does not answer");
                        before
                    }
                };
                inner.health.send_replace(Health::Down { since, problem: error.to_string() });
                Err(error)
            }
        }
    }

    /// Looks again soon when an answer came from other data than were known.
    pub(super) fn saw_era(&self, era: &str) {
        let mut known = self.0.era.lock();
        if known.era != era {
            // Empty: nobody has named the new data yet. The next look does.
            era.clone_into(&mut known.era);
            drop(known);
            self.lost("the data are others than before");
        }
    }

    pub(super) fn watch_health(&self) {
        let redis = self.clone();
        let mut reconnects = redis.0.line.reconnects();
        // Not ended by the last call, after which others still write: the connection closes when
        // nobody has it any more.
        self.0.supervisor.spawn_loop("redis health", async move {
            loop {
                tokio::select! {
                    () = redis.0.clock.sleep(LOOK_EVERY) => {}
                    event = reconnects.recv() => {
                        if matches!(event, Err(RecvError::Closed)) {
                            redis.0.clock.sleep(LOOK_EVERY).await;
                        }
                    }
                }
                // The outcome is told by `health`.
                redis.look().await.ok();
            }
        });
    }

    async fn facts(&self) -> Result<Facts> {
        let new = format!("{:016x}", self.0.entropy.u64());
        let era = self.run(&self.0.scripts.era, Args::default().text(&new));
        let info = self.info(Some("server"));
        let (era, info) = tokio::join!(era, info);
        let info = info.map_err(Error::command("info"))?;
        let process = info.lines().find_map(|line| line.strip_prefix("run_id:"));
        Ok(Facts { era: era?.text()?, process: process.unwrap_or_default().trim().to_owned() })
    }

    fn compare(&self, now: &Facts) {
        let mut known = self.0.era.lock();
        let before = std::mem::replace(&mut *known, now.clone());
        drop(known);
        if before == *now || before == Facts::default() {
            return;
        }
        if before.process != now.process {
            self.lost("it is another process than before");
        } else if !before.era.is_empty() {
            self.lost("the data are others than before");
        }
    }

    fn lost(&self, why: &str) {
        tracing::warn!(why, "Redis may have lost what it held; it is to be filled again");
        self.0.losses.send_modify(|losses| *losses += 1);
    }
}
