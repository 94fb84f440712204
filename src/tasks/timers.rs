//! Time limits of open tasks: deadlines and start timeouts, by the wall clock.
//!
//! Rebuilt from the rows at start. A limit whose task has ended costs one look when it is due.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use parking_lot::Mutex;

use super::{
    ledger::Ledger,
    model::Task,
    state::{self, Event, Limit},
};
use crate::{
    clock::{Clock, Micros},
    error::Reason,
    id::TaskId,
};

/// How often due limits are looked for: limits hold within 1 s, also when the wall clock jumps.
const TICK: Duration = Duration::from_millis(200);
/// Limits handled at once.
const AT_ONCE: usize = 1024;
/// Wait before a limit whose commit failed is tried again.
const RETRY: Duration = Duration::from_millis(500);

/// Limits to come; clones share them.
#[derive(Clone, Debug, Default)]
pub struct Timers(Arc<Mutex<BTreeSet<(Micros, TaskId, Limit)>>>);

impl Timers {
    /// Watches the limits of an open task.
    pub fn watch(&self, task: &Task) {
        for limit in [Limit::Deadline, Limit::StartTimeout] {
            if let Some(at) = state::limit_time(task, limit) {
                self.add(at, task.id, limit);
            }
        }
    }

    /// Watches one limit.
    pub fn add(&self, at: Micros, task: TaskId, limit: Limit) {
        self.0.lock().insert((at, task, limit));
    }

    fn take_due(&self, now: Micros) -> Vec<(Micros, TaskId, Limit)> {
        let mut limits = self.0.lock();
        let mut due = Vec::new();
        while due.len() < AT_ONCE
            && let Some(first) = limits.first()
            && first.0 <= now
        {
            due.extend(limits.pop_first());
        }
        due
    }

    /// Expires what is due at `now`.
    pub async fn run_once(&self, ledger: &Ledger, now: Micros) {
        loop {
            let due = self.take_due(now);
            if due.is_empty() {
                return;
            }
            let expiries = due.iter().map(|(_, task, limit)| async move {
                match ledger.apply(*task, Event::Expire(*limit)).await {
                    Ok(_) => {}
                    // It ended, or a start timeout was met by a start.
                    Err(error) if error.reason() == Reason::NotFound => {}
                    Err(error) if error.reason() == Reason::StateConflict => {}
                    Err(error) => {
                        tracing::warn!(task.id = %task, %error, "a time limit waits for storage");
                        self.add(now + RETRY, *task, *limit);
                    }
                }
            });
            futures_util::future::join_all(expiries).await;
        }
    }

    /// Expires what is due, for ever.
    pub async fn run(self, ledger: Ledger, clock: Clock) -> anyhow::Result<()> {
        loop {
            clock.sleep(TICK).await;
            self.run_once(&ledger, clock.now()).await;
        }
    }
}
