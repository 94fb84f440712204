//! The in-process queue: which tasks wait, which runners have room, and what goes where.
//!
//! The queue holds no truth. It is filled from the database at start, nudged after commits and
//! repaired by the dispatch sweep; a lost, doubled or ghost entry is harmless, since a start is
//! decided by the database. It calls nobody: those who act on it wait for [`Queue::changed`].
//!
//! Where several servers share their tasks, the queue of each holds what is about to start there;
//! all else waits in a backlog that they share. The queue tells it of what happened after each
//! commit ([`Told`]), and decides what to fetch from it.

mod admission;
mod core;
mod delays;
mod estimate;
mod explain;
mod far;
mod lane;
mod model;
mod outlet;
mod policy;
mod report;
mod sessions;
mod slab;
mod supply;
#[cfg(test)]
mod tests;

use std::{collections::HashMap, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc};

pub use self::{
    admission::Full,
    model::{
        Entry, Estimate, Fetch, FullPolicy, LaneSpec, LaneState, Limits, Match, ModelPattern,
        Pause, QueuePart, QueueStats, Report, Revocation, RunnerSupply, Runners, SupplyKey,
        SupplyState, WaitReason, Waiting,
    },
    outlet::{Admit, Asked, Inlet, Told},
};
use self::{core::Core, delays::Moment, outlet::Outlet};
use crate::{
    clock::{Clock, Micros},
    error::{Reason, Result},
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
    /// Where tasks wait that other servers may start too.
    outlet: Option<Outlet>,
}

/// Leave to add one task. Hold it until the task is accepted; dropped without
/// [`done`](Admission::done), the evicted task returns to the queue.
#[derive(Debug)]
#[must_use]
pub struct Admission {
    queue: Queue,
    held: Option<Held>,
    evicted: Option<TaskId>,
}

/// What an admission holds until it is dropped.
#[derive(Debug)]
enum Held {
    /// Room in this queue, and the entry that left for it.
    Here { namespace: Namespace, model: String, evicted: Option<Entry> },
    /// Room in the backlog, for this task.
    Shared(TaskId),
}

impl Admission {
    /// The task that must leave for it, to be ended with `QUEUE_FULL_DROP_LRU`; it is out of
    /// the queue already.
    pub fn evict(&self) -> Option<TaskId> {
        self.evicted
    }

    /// Says that the eviction is durable and the task pushed; which it is, since a request may turn
    /// out to be that of an older task.
    pub fn done(mut self, accepted: TaskId) {
        match &mut self.held {
            Some(Held::Here { evicted, .. }) => *evicted = None,
            Some(Held::Shared(task)) if *task == accepted => self.held = None,
            Some(Held::Shared(_)) | None => {}
        }
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        match self.held.take() {
            Some(Held::Here { namespace, model, evicted }) => {
                self.queue.0.core.lock().release(&namespace, &model);
                if let Some(entry) = evicted {
                    self.queue.push(entry);
                }
            }
            Some(Held::Shared(task)) => self.queue.tell(Told::Released(task)),
            None => {}
        }
    }
}

impl Queue {
    /// An empty queue.
    pub fn new(limits: Limits, clock: Clock) -> Self {
        Self::with(limits, clock, None)
    }

    /// An empty queue that shares its tasks with those of other servers, and what it tells of
    /// them. Bounds are then `admit`'s.
    pub fn shared(limits: Limits, clock: Clock, admit: Arc<Admit>) -> (Self, Inlet) {
        let (outlet, inlet) = outlet::pair(admit);
        (Self::with(limits, clock, Some(outlet)), inlet)
    }

    fn with(limits: Limits, clock: Clock, outlet: Option<Outlet>) -> Self {
        let (revoke, revoked) = mpsc::channel(REVOCATIONS);
        Self(Arc::new(Inner {
            core: Mutex::new(Core::new(limits)),
            clock,
            changed: Notify::new(),
            revoke,
            revoked: Mutex::new(Some(revoked)),
            outlet,
        }))
    }

    /// Whether it shares its tasks with the queues of other servers.
    pub fn is_shared(&self) -> bool {
        self.0.outlet.is_some()
    }

    /// Asks for room for one task. Refuses with `QUEUE_FULL`; under [`FullPolicy::DropOldest`]
    /// it makes room instead where a task of no higher priority waits.
    pub async fn admit(&self, asked: Asked) -> Result<Admission> {
        if let Some(outlet) = &self.0.outlet {
            let held = Some(Held::Shared(asked.task));
            let mut admission = Admission { queue: self.clone(), held, evicted: None };
            match outlet.admit(asked).await {
                Ok(evicted) => admission.evicted = evicted,
                Err(error) if error.reason() == Reason::QueueFull => {
                    admission.held = None;
                    return Err(error);
                }
                // Room may be held all the same.
                Err(error) => return Err(error),
            }
            return Ok(admission);
        }
        let Asked { namespace, model, priority, .. } = asked;
        let evicted = self.0.core.lock().admit(&namespace, &model, priority)?;
        let id = evicted.as_ref().map(|entry| entry.id);
        let held = Some(Held::Here { namespace, model, evicted });
        Ok(Admission { queue: self.clone(), held, evicted: id })
    }

    /// Says that a task waits, as was committed: here, or where other servers find it too.
    pub fn wait(&self, entry: Entry) {
        match &self.0.outlet {
            Some(outlet) => outlet.tell(Told::Waits(Box::new(entry))),
            None => self.push(entry),
        }
    }

    /// Says that the acceptance of a task is committed. If it was put aside, it waits from now on
    /// where other servers find it too.
    pub fn accepted(&self, id: TaskId) {
        let Some(outlet) = &self.0.outlet else { return };
        let entry = self.0.core.lock().far.aside.remove(&id);
        if let Some(entry) = entry {
            outlet.tell(Told::Waits(Box::new(entry)));
        }
    }

    /// Says that a task waits no more, or never did: it ended, or cannot be started.
    pub fn gone(&self, id: TaskId) {
        self.remove(id);
        self.tell(Told::Gone(id));
    }

    /// Says that a task's attempts are used up.
    pub fn dead(&self, task: TaskId, reason: &str) {
        if let Some(outlet) = &self.0.outlet {
            outlet.tell(Told::Dead { task, reason: reason.to_owned() });
        }
    }

    fn tell(&self, told: Told) {
        if let Some(outlet) = &self.0.outlet {
            outlet.tell(told);
        }
    }

    fn changed_supply(&self) {
        self.0.changed.notify_one();
        if let Some(outlet) = &self.0.outlet {
            outlet.hungry();
        }
    }

    /// Adds a task here, or replaces the entry of that id. Never refuses: bounds are [`admit`]'s.
    ///
    /// [`admit`]: Queue::admit
    pub fn push(&self, entry: Entry) {
        self.0.core.lock().push(entry, Moment::of(&self.0.clock));
        self.0.changed.notify_one();
    }

    /// Adds many tasks under one lock.
    pub fn push_all(&self, entries: impl IntoIterator<Item = Entry>) {
        let now = Moment::of(&self.0.clock);
        let mut core = self.0.core.lock();
        for entry in entries {
            core.push(entry, now);
        }
        drop(core);
        self.0.changed.notify_one();
    }

    /// Adds tasks that are being accepted and decides before anybody else can take them: up to
    /// `max` matches, which may be of tasks that waited already.
    ///
    /// In a shared queue tasks behind others in the backlog are not matched; what is not matched
    /// is put aside until [`accepted`](Queue::accepted).
    pub fn place(&self, entries: impl IntoIterator<Item = Entry>, max: usize) -> Vec<Match> {
        let now = Moment::of(&self.0.clock);
        let mut core = self.0.core.lock();
        let matches = if self.is_shared() {
            core.place_shared(entries, now, max)
        } else {
            for entry in entries {
                core.push(entry, now);
            }
            core.take_matches(now, max)
        };
        drop(core);
        if matches.len() == max {
            self.0.changed.notify_one();
        }
        matches
    }

    /// Removes a task from here; false when it was not there.
    pub fn remove(&self, id: TaskId) -> bool {
        let mut core = self.0.core.lock();
        core.remove(id).is_some() | core.far.aside.remove(&id).is_some()
    }

    /// Whether the task waits here.
    pub fn contains(&self, id: TaskId) -> bool {
        self.0.core.lock().contains(id)
    }

    /// Tasks that wait here, delayed ones included.
    pub fn len(&self) -> usize {
        self.0.core.lock().len()
    }

    /// Tasks that wait, those of other servers included where they share them.
    pub fn waiting(&self) -> u64 {
        let core = self.0.core.lock();
        if self.is_shared() { core.far_depth() } else { core.len() as u64 }
    }

    /// Whether nothing waits here.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes some tasks out, with those of their entries that were here.
    pub fn take(&self, ids: &[TaskId]) -> Vec<Entry> {
        let mut core = self.0.core.lock();
        ids.iter().filter_map(|id| core.remove(*id)).collect()
    }

    /// Takes out those that are not to be kept.
    pub fn take_unless(&self, keep: impl Fn(TaskId) -> bool) -> Vec<Entry> {
        let mut core = self.0.core.lock();
        let ids: Vec<TaskId> = core.entries.keys().copied().filter(|id| !keep(*id)).collect();
        ids.into_iter().filter_map(|id| core.remove(id)).collect()
    }

    /// Takes out all that waits here.
    pub fn take_all(&self) -> Vec<Entry> {
        self.take_unless(|_| false)
    }

    /// Counts a task as running, and into the start rate.
    pub fn started(&self, namespace: &Namespace, model: &str, id: TaskId) {
        self.0.core.lock().started(namespace, model, id, self.0.clock.mono());
        self.tell(Told::Gone(id));
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

    /// Why a task waits; `None` when it does not wait, as far as is known here.
    pub fn explain(&self, entry: &Entry) -> Option<Waiting> {
        let now = self.0.clock.now();
        let core = self.0.core.lock();
        if self.is_shared() {
            return Some(core.explain(entry, now));
        }
        core.entries.get(&entry.id).map(|waiter| core.explain(&waiter.entry, now))
    }

    /// Takes over which lanes the backlog has.
    pub fn set_far_lanes(&self, specs: Vec<LaneSpec>) {
        self.0.core.lock().set_far_lanes(specs);
    }

    /// Takes over what lanes of the backlog hold.
    pub fn set_far_states<'a>(&self, states: impl IntoIterator<Item = (&'a str, LaneState)>) {
        let mut core = self.0.core.lock();
        for (lane, state) in states {
            core.set_far_state(lane, state);
        }
    }

    /// Lanes of the backlog that have work, as far as is known here.
    #[cfg(test)]
    pub fn far_lanes_with_work(&self) -> usize {
        self.0.core.lock().far_lanes_with_work()
    }

    /// Takes over how many tasks of each namespace and model wait in the backlog, delayed ones
    /// included.
    pub fn set_far_depths(&self, depths: &HashMap<(String, String), u64>) {
        self.0.core.lock().set_far_depths(depths);
    }

    /// Notes that a lane of the backlog got work; false for one that is not known.
    pub fn far_rang(&self, lane: &str) -> bool {
        self.0.core.lock().far_rang(lane, self.0.clock.now())
    }

    /// What other servers should know of this one.
    pub fn report(&self) -> Report {
        self.0.core.lock().report(self.0.clock.mono())
    }

    /// Takes over what other servers said of themselves, by their names.
    pub fn set_elsewhere(&self, told: &HashMap<String, Report>) {
        self.0.core.lock().set_elsewhere(told);
    }

    /// Decides what to fetch from the backlog: as much as can start at once, up to `max`.
    pub fn plan_fetch(&self, max: u32) -> Vec<Fetch> {
        self.0.core.lock().plan_fetch(max)
    }

    /// Lanes of the backlog whose tasks could start here now, and how many tasks could.
    pub fn fetchable(&self) -> (Vec<Arc<str>>, u32) {
        self.0.core.lock().fetchable()
    }

    /// Says how many tasks came of a fetch.
    pub fn fetched(&self, lane: &str, n_tasks: u32) {
        self.0.core.lock().fetched(lane, n_tasks);
    }

    /// Whether a runner here could run the task.
    pub fn is_served(&self, entry: &Entry) -> bool {
        self.0.core.lock().matching(entry).next().is_some()
    }

    /// Models whose tasks could start here now, as far as runners name them; `None` for any.
    pub fn startable_models(&self) -> Option<Vec<String>> {
        self.0.core.lock().startable_models()
    }

    /// Attempts that the runners here would take.
    pub fn free(&self) -> u32 {
        self.0.core.lock().free()
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
        self.changed_supply();
    }

    /// The queues that are paused.
    pub fn pauses(&self) -> Vec<(Namespace, String, Pause)> {
        self.0.core.lock().pauses()
    }

    /// Adds a runner, without credits; replaces the one with its key.
    pub fn runner_up(&self, supply: RunnerSupply) {
        self.0.core.lock().runner_up(supply);
    }

    /// Sets how many attempts the runner would take, those not counted that are in flight
    /// between [`take_matches`](Queue::take_matches) and [`assigned`](Queue::assigned).
    pub fn runner_credits(&self, key: SupplyKey, free: u32, state: SupplyState) {
        self.0.core.lock().runner_credits(key, free, state);
        self.changed_supply();
    }

    /// The assignment of a match was sent: sets the credits, and the match is no longer in
    /// flight.
    pub fn assigned(&self, key: SupplyKey, free: u32, state: SupplyState) {
        self.0.core.lock().assigned(key, free, state);
        self.changed_supply();
    }

    /// A match came to nothing: its credit is free again.
    pub fn give_back(&self, key: SupplyKey) {
        self.0.core.lock().give_back(key);
        self.changed_supply();
    }

    /// Removes a runner.
    pub fn runner_down(&self, key: SupplyKey) {
        self.0.core.lock().runner_down(key);
    }

    /// Completes when a match may have become possible since the last call.
    pub async fn changed(&self) {
        self.0.changed.notified().await;
    }

    /// Decides: up to `max` tasks with their runners, best first. Takes the tasks out and the
    /// credits with them.
    pub fn take_matches(&self, now: Micros, max: usize) -> Vec<Match> {
        let now = Moment { wall: now, mono: self.0.clock.mono() };
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
