//! All sessions and leases of this process, under one lock, and what other slices ask of them.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use futures_util::future::BoxFuture;
use parking_lot::{Mutex, MutexGuard};

use super::{
    RunnerLimits,
    ends::End,
    events,
    leases::{Backlog, Lease, Leases},
    model::{Fence, ToRunner},
    roster::Roster,
    session::Session,
};
use crate::{
    clock::{Clock, Micros, Mono},
    error::Result,
    faults::{self, Fault},
    id::{Entropy, Namespace, RunnerId, TaskId},
    instances::{Phase, Standing},
    keys::Receipts,
    pb,
    queue::{Queue, Revocation, SupplyKey},
    relay::Relay,
    supervisor::Supervisor,
    tasks::{ledger::Claim, model::Task, state::Event},
    telemetry::Metrics,
};

/// Applies an event to a task, durably.
pub type Apply = Arc<dyn Fn(TaskId, Event) -> BoxFuture<'static, Result<Arc<Task>>> + Send + Sync>;
/// Reads a task; an error when it does not exist.
pub type Get = Arc<dyn Fn(TaskId) -> BoxFuture<'static, Result<Task>> + Send + Sync>;
/// Takes over the attempts that a runner holds and that other servers had; those that go on, with
/// their logs where storage left off. An error when storage does not answer.
pub type Resume =
    Arc<dyn Fn(Vec<Claim>) -> BoxFuture<'static, Result<Vec<Arc<Task>>>> + Send + Sync>;
/// Makes the credential of a task's running attempt.
pub type Token = Arc<dyn Fn(&Task) -> String + Send + Sync>;

/// What runners need of the slices that keep tasks and keys.
#[derive(Clone)]
pub struct Ports {
    /// The ledger.
    pub apply: Apply,
    /// Reads of tasks.
    pub get: Get,
    /// Attempt tokens.
    pub token: Token,
    /// Opens the receipts of artifacts.
    pub receipts: Receipts,
    /// Attempts of other servers; `None` where there are no others.
    pub resume: Option<Resume>,
    /// This server among others.
    pub standing: Standing,
    /// What servers show each other; `None` where there are no others.
    pub roster: Option<Roster>,
    /// Where cancels are counted.
    pub metrics: Metrics,
}

impl Ports {
    /// Says what is wrong with an event of an attempt.
    pub(super) fn faults(&self, fence: Fence) -> impl Fn(&pb::RunnerEvent) -> Option<String> {
        move |event| events::fault(&self.receipts, fence, event)
    }
}

/// What dispatch has to know of a runner to start an attempt there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Supply {
    /// Its name.
    pub runner: RunnerId,
    /// Its host.
    pub node: String,
    /// Its engine.
    pub engine: String,
    /// Version of the engine.
    pub engine_version: String,
}

/// Sessions and leases; clones share them.
#[derive(Clone)]
pub struct Registry(Arc<Inner>);

struct Inner {
    limits: RunnerLimits,
    clock: Clock,
    entropy: Entropy,
    queue: Queue,
    relay: Relay,
    supervisor: Supervisor,
    ports: Ports,
    state: Mutex<State>,
}

/// What the lock guards.
#[derive(Default)]
pub(super) struct State {
    pub sessions: HashMap<SupplyKey, Session>,
    pub by_id: HashMap<Arc<str>, SupplyKey>,
    pub by_runner: BTreeMap<(Namespace, RunnerId), SupplyKey>,
    pub leases: Leases,
    last_key: u64,
}

impl State {
    /// A key that was never used.
    pub fn next_key(&mut self) -> SupplyKey {
        self.last_key += 1;
        SupplyKey(self.last_key)
    }

    /// The session that holds an attempt.
    pub fn holder_of(&mut self, fence: Fence) -> Option<&mut Session> {
        let key = self.leases.find(fence)?.holder?;
        self.sessions.get_mut(&key)
    }

    /// Forgets a lease.
    pub fn release(&mut self, fence: Fence) -> Option<Lease> {
        let lease = self.leases.remove(fence)?;
        if let Some(session) = lease.holder.and_then(|key| self.sessions.get_mut(&key)) {
            session.release(fence);
        }
        Some(lease)
    }

    /// Forgets the lease of an earlier attempt, which ended unheard: its session is not to answer
    /// for the next one, which another may hold.
    pub fn supersede(&mut self, task: TaskId) {
        if let Some(fence) = self.leases.of_task(task).map(|lease| lease.fence)
            && !faults::planted(Fault::KeepSuperseded)
        {
            self.release(fence);
        }
    }
}

impl Registry {
    /// A registry without runners.
    pub fn new(
        limits: RunnerLimits,
        clock: Clock,
        entropy: Entropy,
        queue: Queue,
        relay: Relay,
        supervisor: Supervisor,
        ports: Ports,
    ) -> Self {
        let state = Mutex::default();
        Self(Arc::new(Inner { limits, clock, entropy, queue, relay, supervisor, ports, state }))
    }

    /// Takes over attempts that ran when the server stopped: their leases have a fresh time to
    /// live, within which their runners come back with them.
    pub fn adopt(&self, running: Vec<Arc<Task>>) {
        let (now, mono) = self.times();
        let mut state = self.lock();
        for task in running {
            let mut lease = self.lease(&task, now, mono);
            if !faults::planted(Fault::EndLeasesAtStart) {
                lease.orphaned_until = mono + self.limits().lease_ttl;
            }
            lease.accepted = true;
            state.supersede(task.id);
            state.leases.insert(lease);
        }
    }

    /// Whether work may be handed out.
    pub fn may_assign(&self) -> bool {
        self.ports().standing.phase() == Phase::Good
    }

    /// Who is behind a key; `None` when its session has ended, or nothing may be handed out.
    pub fn supply(&self, key: SupplyKey) -> Option<Supply> {
        if !self.may_assign() {
            return None;
        }
        let state = self.lock();
        let profile = &state.sessions.get(&key)?.profile;
        Some(Supply {
            runner: profile.runner.clone(),
            node: profile.node.node_id.clone(),
            engine: profile.engine.clone(),
            engine_version: profile.engine_version.clone(),
        })
    }

    /// Hands an attempt that was started in the store to its runner. If the runner is gone by
    /// now, the attempt is handed back.
    pub fn assign(&self, key: SupplyKey, task: Arc<Task>) {
        let fence = Fence { task: task.id, attempt: task.attempt };
        let (now, mono) = self.times();
        let token = (self.ports().token)(&task);
        let mut state = self.lock();
        if state.leases.was_revoked(fence) {
            self.queue().give_back(key);
            return;
        }
        let mut lease = self.lease(&task, now, mono);
        state.supersede(task.id);
        let State { sessions, leases, .. } = &mut *state;
        let Some(session) = sessions.get_mut(&key).filter(|session| session.is_connected()) else {
            leases.insert(lease);
            self.queue().give_back(key);
            self.spawn_end(&mut state, fence, End::HandBack("its runner left".into()));
            return;
        };
        lease.log.watch(fence.attempt, session.output.bell.clone());
        let seq = session.say(ToRunner::Assign { task, token });
        session.credits.assigned(seq);
        session.hold(fence);
        lease.holder = Some(key);
        lease.assign_seq = seq;
        leases.insert(lease);
        self.queue().assigned(key, session.free(), session.mode());
    }

    /// Tells runners about attempts that the store has ended, for ever.
    pub async fn run_revocations(self) -> anyhow::Result<()> {
        let Some(mut revocations) = self.queue().revocations() else {
            anyhow::bail!("revocations are taken already");
        };
        while let Some(revocation) = revocations.recv().await {
            self.revoke(revocation);
        }
        anyhow::bail!("the queue is gone")
    }

    /// Tells the runner to stop an attempt that the store has ended.
    pub fn revoke(&self, revocation: Revocation) {
        let fence = Fence { task: revocation.task, attempt: revocation.attempt };
        let mono = self.mono();
        let mut state = self.lock();
        let Some(lease) = state.release(fence) else {
            state.leases.revoked_early(fence, mono);
            return;
        };
        if let Some(session) = lease.holder.and_then(|key| state.sessions.get_mut(&key)) {
            self.cancel(session, fence, revocation.reason, revocation.detail);
        }
    }

    /// Number of runners with a session, and of leases.
    pub fn counts(&self) -> (usize, usize) {
        let state = self.lock();
        (state.sessions.len(), state.leases.len())
    }

    /// Whether a runner of `runner_namespace` may execute tasks of `namespace`.
    pub(super) fn serves(runner_namespace: &Namespace, namespace: &Namespace) -> bool {
        runner_namespace.as_str() == Namespace::DEFAULT || runner_namespace == namespace
    }

    /// Tells the queue what a session would take.
    pub(super) fn publish_credits(&self, session: &Session) {
        self.queue().runner_credits(session.key, session.free(), session.mode());
    }

    fn lease(&self, task: &Task, now: Micros, mono: Mono) -> Lease {
        let start_time = task.start_time.unwrap_or(now);
        let left = (start_time + task.spec.execution_timeout).since(now);
        Lease {
            fence: Fence { task: task.id, attempt: task.attempt },
            namespace: task.namespace.clone(),
            runner: task.runner.clone().unwrap_or_else(|| "".into()),
            start_time,
            log: self.relay().open(task.id),
            holder: None,
            orphaned_until: mono,
            // Never more than the whole timeout, should the wall clock have been set back.
            times_out: mono + left.min(task.spec.execution_timeout),
            assign_seq: 0,
            accepted: false,
            ending: None,
            retry_at: mono,
            backlog: Backlog::default(),
            finish: None,
            announced: 0,
            resend_asked_until: mono,
            resend_asked_from: 0,
            stale: false,
        }
    }

    pub(super) fn times(&self) -> (Micros, Mono) {
        (self.0.clock.now(), self.mono())
    }

    /// Now, for leases: whatever becomes of the wall clock, they last as long as they should.
    pub(super) fn mono(&self) -> Mono {
        if faults::planted(Fault::LeasesByWallClock) {
            return Mono(Duration::from_micros(self.0.clock.now().0.unsigned_abs()));
        }
        self.0.clock.mono()
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock()
    }

    /// Times and bounds.
    pub fn limits(&self) -> &RunnerLimits {
        &self.0.limits
    }

    pub(super) fn clock(&self) -> &Clock {
        &self.0.clock
    }

    pub(super) fn entropy(&self) -> &Entropy {
        &self.0.entropy
    }

    pub(super) fn queue(&self) -> &Queue {
        &self.0.queue
    }

    pub(super) fn relay(&self) -> &Relay {
        &self.0.relay
    }

    pub(super) fn supervisor(&self) -> &Supervisor {
        &self.0.supervisor
    }

    pub(super) fn ports(&self) -> &Ports {
        &self.0.ports
    }
}
