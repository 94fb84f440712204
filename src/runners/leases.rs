//! Live leases: who holds which attempt, and until when. All on monotonic time.
//!
//! Plain data under the registry's lock. A lease leaves the table only after the store has
//! ended the attempt, or was told so.

use std::{
    collections::{BTreeSet, HashMap, HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use crate::{
    clock::{Micros, Mono},
    id::{Namespace, RunnerId, TaskId},
    pb,
    queue::SupplyKey,
    relay::Log,
    runners::{events::weight, model::Fence},
    tasks::{model::Usage, state::Outcome},
};

/// Revocations that came before their assignment are kept this long.
const EARLY_FOR: Duration = Duration::from_mins(1);

/// Why an attempt is about to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// As the runner said; its word stands until the store has it.
    Finish,
    /// The server gave it up; the store is being told.
    Lose,
    /// It ran too long; the store is being told.
    TimeOut,
}

/// The right to execute one attempt.
#[derive(Debug)]
pub struct Lease {
    /// Which attempt.
    pub fence: Fence,
    /// Tenant of the task.
    pub namespace: Namespace,
    /// Name of the runner.
    pub runner: RunnerId,
    /// When the attempt started; its events are dated from there.
    pub start_time: Micros,
    /// The task's log.
    pub log: Arc<Log>,
    /// Session that holds it; none after a restart, until the runner is back.
    pub holder: Option<SupplyKey>,
    /// When it ends without a holder.
    pub orphaned_until: Mono,
    /// When the execution timeout ends it.
    pub times_out: Mono,
    /// Seq of its Assign; 0 when the runner has had it from an earlier session.
    pub assign_seq: u64,
    /// Whether the runner has spoken of it.
    pub accepted: bool,
    /// Set while the store is being told of the end.
    pub ending: Option<Ending>,
    /// Earliest time of another attempt to tell the store.
    pub retry_at: Mono,
    /// Events that the log does not take yet.
    pub backlog: Backlog,
    /// The end, to be told to the store once all events are in the log, with the index that
    /// would come next.
    pub finish: Option<(u64, Outcome, Usage)>,
    /// Highest index acknowledged on the present Output stream.
    pub announced: u64,
    /// Until then a resend is not asked for again.
    pub resend_asked_until: Mono,
    /// The index that the last request for a resend named; 0 before the first.
    pub resend_asked_from: u64,
    /// Whether the log was seen without the attempt.
    pub stale: bool,
}

impl Lease {
    /// Whether the runner is known to have it.
    pub fn is_reached(&self, acked_seq: u64) -> bool {
        self.accepted || self.assign_seq <= acked_seq
    }
}

/// Consecutive events that wait for the log.
#[derive(Debug, Default)]
pub struct Backlog {
    first_index: u64,
    events: VecDeque<pb::RunnerEvent>,
    bytes: usize,
}

impl Backlog {
    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.events.is_empty()
    }

    /// Memory that it takes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Index that comes next; `None` when it is empty.
    pub fn next_index(&self) -> Option<u64> {
        (!self.is_empty()).then(|| self.first_index + self.events.len() as u64)
    }

    /// Appends events, skipping those that are there; gives back the index to send from when
    /// some are missing before.
    pub fn push(
        &mut self,
        first_index: u64,
        events: impl IntoIterator<Item = pb::RunnerEvent>,
    ) -> Result<(), u64> {
        let next = self.next_index().unwrap_or(first_index);
        if first_index > next {
            return Err(next);
        }
        if self.is_empty() {
            self.first_index = first_index;
        }
        let skip = usize::try_from(next - first_index).unwrap_or(usize::MAX);
        for event in events.into_iter().skip(skip) {
            self.bytes += weight(&event);
            self.events.push_back(event);
        }
        Ok(())
    }

    /// What waits, with the index of the first.
    pub fn waiting(&mut self) -> (u64, &[pb::RunnerEvent]) {
        (self.first_index, self.events.make_contiguous())
    }

    /// Drops the first `n`.
    pub fn taken(&mut self, n: usize) {
        for event in self.events.drain(..n.min(self.events.len())) {
            self.bytes -= weight(&event);
        }
        self.first_index += n as u64;
    }

    /// Drops everything.
    pub fn clear(&mut self) {
        *self = Self::default();
    }
}

/// All live leases.
#[derive(Debug, Default)]
pub struct Leases {
    by_task: HashMap<TaskId, Lease>,
    /// Execution timeouts, soonest first; entries of ended leases are skipped.
    timeouts: BTreeSet<(Mono, TaskId)>,
    orphans: BTreeSet<TaskId>,
    early: HashSet<Fence>,
    early_order: VecDeque<(Mono, Fence)>,
}

impl Leases {
    /// Number of leases.
    pub fn len(&self) -> usize {
        self.by_task.len()
    }

    /// The live lease of an attempt.
    pub fn find(&self, fence: Fence) -> Option<&Lease> {
        self.by_task.get(&fence.task).filter(|lease| lease.fence == fence)
    }

    /// The live lease of an attempt, to change it.
    pub fn find_mut(&mut self, fence: Fence) -> Option<&mut Lease> {
        self.by_task.get_mut(&fence.task).filter(|lease| lease.fence == fence)
    }

    /// The live lease of a task.
    pub fn of_task(&self, task: TaskId) -> Option<&Lease> {
        self.by_task.get(&task)
    }

    /// The live lease of a task, to change it.
    pub fn of_task_mut(&mut self, task: TaskId) -> Option<&mut Lease> {
        self.by_task.get_mut(&task)
    }

    /// All leases.
    pub fn iter(&self) -> impl Iterator<Item = &Lease> {
        self.by_task.values()
    }

    /// All leases, to change them.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Lease> {
        self.by_task.values_mut()
    }

    /// Adds a lease. One of an earlier attempt is gone by then in the store, and is returned.
    pub fn insert(&mut self, lease: Lease) -> Option<Lease> {
        let before = self.remove_task(lease.fence.task);
        self.timeouts.insert((lease.times_out, lease.fence.task));
        if lease.holder.is_none() {
            self.orphans.insert(lease.fence.task);
        }
        self.by_task.insert(lease.fence.task, lease);
        before
    }

    /// Removes the lease of an attempt.
    pub fn remove(&mut self, fence: Fence) -> Option<Lease> {
        self.find(fence)?;
        self.remove_task(fence.task)
    }

    fn remove_task(&mut self, task: TaskId) -> Option<Lease> {
        let lease = self.by_task.remove(&task)?;
        self.timeouts.remove(&(lease.times_out, task));
        self.orphans.remove(&task);
        Some(lease)
    }

    /// Gives a lease to a session, or takes it away until `orphaned_until`.
    pub fn set_holder(&mut self, task: TaskId, holder: Option<SupplyKey>, orphaned_until: Mono) {
        let Some(lease) = self.by_task.get_mut(&task) else { return };
        lease.holder = holder;
        lease.orphaned_until = orphaned_until;
        if holder.is_some() {
            self.orphans.remove(&task);
        } else {
            self.orphans.insert(task);
        }
    }

    /// Leases without a holder.
    pub fn orphans(&self) -> impl Iterator<Item = &Lease> {
        self.orphans.iter().filter_map(|task| self.by_task.get(task))
    }

    /// Takes leases whose execution timeout has passed; they are given again only if
    /// [`retry_timeout`](Self::retry_timeout) says so.
    pub fn take_timed_out(&mut self, now: Mono) -> Vec<Fence> {
        let mut due = Vec::new();
        while let Some((at, task)) = self.timeouts.first().copied() {
            if at > now {
                break;
            }
            self.timeouts.remove(&(at, task));
            due.extend(self.by_task.get(&task).map(|lease| lease.fence));
        }
        due
    }

    /// Looks at a timeout again at `at`, since the store did not take it.
    pub fn retry_timeout(&mut self, fence: Fence, at: Mono) {
        if let Some(lease) = self.by_task.get_mut(&fence.task).filter(|l| l.fence == fence) {
            self.timeouts.remove(&(lease.times_out, fence.task));
            lease.times_out = at;
            self.timeouts.insert((at, fence.task));
        }
    }

    /// Remembers that an attempt was revoked before its assignment came.
    pub fn revoked_early(&mut self, fence: Fence, now: Mono) {
        while let Some((at, fence)) = self.early_order.front().copied() {
            if at > now {
                break;
            }
            self.early_order.pop_front();
            self.early.remove(&fence);
        }
        if self.early.insert(fence) {
            self.early_order.push_back((now + EARLY_FOR, fence));
        }
    }

    /// Whether an attempt was revoked before its assignment came.
    pub fn was_revoked(&self, fence: Fence) -> bool {
        self.early.contains(&fence)
    }
}
