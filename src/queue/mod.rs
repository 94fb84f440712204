//! The in-process queue: which tasks wait, which runners have room, and what goes where.
//!
//! The queue holds no truth. It is filled from the database at start, nudged after commits and
//! repaired by the dispatch sweep; a lost, doubled or ghost entry is harmless, since a start is
//! decided by the database. It calls nobody: those who act on it wait for [`Queue::changed`].

mod admission;
mod core;
mod estimate;
mod explain;
mod lane;
mod model;
mod policy;
mod sessions;
mod slab;
mod supply;
#[cfg(test)]
mod tests;

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc};

use self::core::Core;
pub use self::model::{
    Entry, Estimate, FullPolicy, Limits, Match, ModelPattern, Pause, QueueStats, Revocation,
    RunnerSupply, SupplyKey, SupplyState, WaitReason, Waiting,
};
use crate::{
    clock::{Clock, Micros},
    error::Result,
    faults::{self, Fault},
    id::{Namespace, TaskId},
};

/// Revocations waiting for their reader: more than attempts run at once on one server; what
/// does not fit is found by the runners' heartbeat digests.
const REVOCATIONS: usize = 65_536;

/// The queue; clones share it.
#[derive(Clone, Debug)]
pub struct Queue(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    core: Mutex<Core>,
    clock: Clock,
    changed: Notify,
    revoke: mpsc::Sender<Revocation>,
    revoked: Mutex<Option<mpsc::Receiver<Revocation>>>,
}

/// Leave to add one task. Hold it until after [`Queue::push`]; dropped without
/// [`done`](Admission::done), the evicted task returns to the queue.
#[derive(Debug)]
#[must_use]
pub struct Admission {
    queue: Queue,
    namespace: Namespace,
    model: String,
    evicted: Option<Entry>,
}

impl Admission {
    /// The task that must leave for it, to be ended with `QUEUE_FULL_DROP_LRU`; it is out of
    /// the queue already.
    pub fn evict(&self) -> Option<TaskId> {
        self.evicted.as_ref().map(|entry| entry.id)
    }

    /// Says that the eviction is durable and the task pushed.
    pub fn done(mut self) {
        self.evicted = None;
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        self.queue.0.core.lock().release(&self.namespace, &self.model);
        if let Some(entry) = self.evicted.take() {
            self.queue.push(entry);
        }
    }
}

impl Queue {
    /// An empty queue.
    pub fn new(limits: Limits, clock: Clock) -> Self {
        let (revoke, revoked) = mpsc::channel(REVOCATIONS);
        Self(Arc::new(Inner {
            core: Mutex::new(Core::new(limits)),
            clock,
            changed: Notify::new(),
            revoke,
            revoked: Mutex::new(Some(revoked)),
        }))
    }

    /// Asks for room for one task. Refuses with `QUEUE_FULL`; under [`FullPolicy::DropOldest`]
    /// it makes room instead where a task of no higher priority waits.
    pub fn admit(&self, namespace: &Namespace, model: &str, priority: i32) -> Result<Admission> {
        let evicted = self.0.core.lock().admit(namespace, model, priority)?;
        let (namespace, model) = (namespace.clone(), model.to_owned());
        Ok(Admission { queue: self.clone(), namespace, model, evicted })
    }

    /// Adds a task, or replaces the entry of that id. Never refuses: bounds are [`admit`]'s.
    ///
    /// [`admit`]: Queue::admit
    pub fn push(&self, entry: Entry) {
        self.0.core.lock().push(entry, self.0.clock.now());
        self.0.changed.notify_one();
    }

    /// Adds many tasks under one lock.
    pub fn push_all(&self, entries: impl IntoIterator<Item = Entry>) {
        let now = self.0.clock.now();
        let mut core = self.0.core.lock();
        for entry in entries {
            core.push(entry, now);
        }
        drop(core);
        self.0.changed.notify_one();
    }

    /// Adds tasks and decides before anybody else can take them: up to `max` matches, which may
    /// be of tasks that waited already.
    pub fn place(&self, entries: impl IntoIterator<Item = Entry>, max: usize) -> Vec<Match> {
        let now = self.0.clock.now();
        let mut core = self.0.core.lock();
        for entry in entries {
            core.push(entry, now);
        }
        let matches = core.take_matches(now, max);
        drop(core);
        if matches.len() == max {
            self.0.changed.notify_one();
        }
        matches
    }

    /// Removes a task; false when it was not there.
    pub fn remove(&self, id: TaskId) -> bool {
        self.0.core.lock().remove(id).is_some()
    }

    /// Whether the task waits here.
    pub fn contains(&self, id: TaskId) -> bool {
        self.0.core.lock().contains(id)
    }

    /// Tasks that wait here, delayed ones included.
    pub fn len(&self) -> usize {
        self.0.core.lock().len()
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Counts a task as running, and into the start rate.
    pub fn started(&self, namespace: &Namespace, model: &str, id: TaskId) {
        self.0.core.lock().started(namespace, model, id, self.0.clock.mono());
    }

    /// Counts a task found running in the database; nothing changes when it is known to run.
    pub fn resumed(&self, namespace: &Namespace, model: &str, id: TaskId) {
        self.0.core.lock().resumed(namespace, model, id);
    }

    /// Says that a task runs no more, however its attempt ended. Only the time of attempts that
    /// succeeded goes into the estimates.
    pub fn finished(&self, model: &str, id: TaskId, execution: Duration, succeeded: bool) {
        self.0.core.lock().finished(model, id, execution, succeeded);
    }

    /// When a task like this would start, were it added now; or when it starts, if it waits.
    pub fn estimate(&self, entry: &Entry) -> Estimate {
        self.0.core.lock().estimate(entry, self.0.clock.now())
    }

    /// What is to be expected of a task like this that starts now.
    pub fn estimate_started(&self, entry: &Entry) -> Estimate {
        self.0.core.lock().estimate_at(0, entry, self.0.clock.now())
    }

    /// Why a task waits; `None` when it does not wait here.
    pub fn explain(&self, id: TaskId) -> Option<Waiting> {
        self.0.core.lock().explain(id, self.0.clock.now())
    }

    /// The queue of a model; an empty one when nothing is known of it.
    pub fn stats(&self, namespace: &Namespace, model: &str) -> QueueStats {
        let (now, mono) = (self.0.clock.now(), self.0.clock.mono());
        self.0.core.lock().stats(namespace, model, now, mono)
    }

    /// The queues of a namespace that hold tasks, have running ones, or are paused; by model.
    pub fn list(&self, namespace: &Namespace) -> Vec<QueueStats> {
        let (now, mono) = (self.0.clock.now(), self.0.clock.mono());
        self.0.core.lock().list(namespace, now, mono)
    }

    /// Stops handing out tasks of a model, or starts again.
    pub fn set_paused(&self, namespace: &Namespace, model: &str, pause: Option<Pause>) {
        self.0.core.lock().set_paused(namespace, model, pause);
        self.0.changed.notify_one();
    }

    /// Adds a runner, without credits; replaces the one with its key.
    pub fn runner_up(&self, supply: RunnerSupply) {
        self.0.core.lock().runner_up(supply);
    }

    /// Sets how many attempts the runner would take, those not counted that are in flight
    /// between [`take_matches`](Queue::take_matches) and [`assigned`](Queue::assigned).
    pub fn runner_credits(&self, key: SupplyKey, free: u32, state: SupplyState) {
        self.0.core.lock().runner_credits(key, free, state);
        self.0.changed.notify_one();
    }

    /// The assignment of a match was sent: sets the credits, and the match is no longer in
    /// flight.
    pub fn assigned(&self, key: SupplyKey, free: u32, state: SupplyState) {
        self.0.core.lock().assigned(key, free, state);
        self.0.changed.notify_one();
    }

    /// A match came to nothing: its credit is free again.
    pub fn give_back(&self, key: SupplyKey) {
        self.0.core.lock().give_back(key);
        self.0.changed.notify_one();
    }

    /// Removes a runner.
    pub fn runner_down(&self, key: SupplyKey) {
        self.0.core.lock().runner_down(key);
    }

    /// Completes when a match may have become possible since the last call.
    pub async fn changed(&self) {
        self.0.changed.notified().await;
    }

    /// When the next delayed task may start.
    pub fn next_delayed(&self) -> Option<Micros> {
        self.0.core.lock().next_delayed()
    }

    /// Decides: up to `max` tasks with their runners, best first. Takes the tasks out and the
    /// credits with them.
    pub fn take_matches(&self, now: Micros, max: usize) -> Vec<Match> {
        let matches = self.0.core.lock().take_matches(now, max);
        if matches.len() == max {
            self.0.changed.notify_one();
        }
        matches
    }

    /// Tells whoever holds the lease that the attempt must stop.
    pub fn revoke(&self, revocation: Revocation) {
        if faults::planted(Fault::CancelUntold) {
            return;
        }
        if let Err(error) = self.0.revoke.try_send(revocation) {
            tracing::warn!(%error, "revocation dropped; the runner's heartbeat will find out");
        }
    }

    /// The receiver of revocations; `None` when it was taken before.
    pub fn revocations(&self) -> Option<mpsc::Receiver<Revocation>> {
        self.0.revoked.lock().take()
    }
}
