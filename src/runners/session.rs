//! A runner's session: what outlives its connections. Control messages under way, credits,
//! the attempts it holds, and what it has to be told about their events.
//!
//! Plain data under the registry's lock; it neither waits nor spawns.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::{
    clock::{Micros, Mono},
    error::{Error, Kind, Reason, Result, reason_name},
    id::{Namespace, RunnerId},
    pb,
    queue::{ModelPattern, RunnerSupply, SupplyKey, SupplyState},
    runners::{
        cancels::Cancels,
        commands::{Action, Commands},
        model::{Announcement, Fence, LeaseAck, Leave, Offer, Profile, ToRunner, Trouble},
        protocol::{Credits, HeldDigest, Inbox, Outbox, feature},
    },
};

/// Control messages that a runner may leave unacknowledged.
const MAX_UNACKED: usize = 16_384;
/// Ends of attempts that are remembered, so that a Finish that is resent is answered.
const MAX_FINISHED: usize = 4096;
/// Attempts with something to tell, while nobody reads it.
const MAX_TOLD: usize = 16_384;
/// Heartbeats with a wrong digest, while attempts come and go, after which it is asked.
const PATIENCE: u32 = 3;

/// One connection's hold on a session; the newest wins.
#[derive(Clone, Debug, Default)]
pub struct Link {
    ended: CancellationToken,
    why: Arc<Mutex<Option<Error>>>,
}

impl Link {
    /// Ends the connection: cleanly without an error.
    pub fn end(&self, why: Option<Error>) {
        if !self.ended.is_cancelled() {
            *self.why.lock() = why;
            self.ended.cancel();
        }
    }

    /// Completes when the connection is to end.
    pub async fn ended(&self) {
        self.ended.cancelled().await;
    }

    /// Whether the connection is to end.
    pub fn is_ended(&self) -> bool {
        self.ended.is_cancelled()
    }

    /// Why it is to end; for whoever writes the last word.
    pub fn take_why(&self) -> Option<Error> {
        self.why.lock().take()
    }

    /// Whether both are the same connection.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.why, &other.why)
    }
}

/// How the runner is connected.
#[derive(Clone, Debug)]
pub enum Attached {
    /// Not, since then.
    No(Mono),
    /// By a stream.
    Stream(Link),
    /// By calls of Poll, the latest of which this is.
    Poll(Link),
}

impl Attached {
    /// The connection, if there is one.
    pub fn link(&self) -> Option<&Link> {
        match self {
            Self::No(_) => None,
            Self::Stream(link) | Self::Poll(link) => Some(link),
        }
    }
}

/// The Output side.
#[derive(Debug, Default)]
pub struct Output {
    /// The stream, if there is one.
    pub link: Option<Link>,
    /// Rung when there may be something to tell.
    pub bell: Arc<Notify>,
    /// Highest seq of the stream that was read.
    pub read_seq: u64,
    told: BTreeMap<Fence, LeaseAck>,
}

impl Output {
    /// Has an end acknowledged.
    pub fn finished(&mut self, fence: Fence) {
        self.tell(fence, |ack| ack.finished = true);
    }

    /// Has trouble told; it stands until the stream has it.
    pub fn trouble(&mut self, fence: Fence, trouble: Trouble) {
        self.tell(fence, |ack| ack.trouble = Some(trouble));
    }

    /// Has stable events acknowledged.
    pub fn durable(&mut self, fence: Fence, index: u64) {
        self.tell(fence, |ack| ack.acked_index = ack.acked_index.max(index));
    }

    fn tell(&mut self, fence: Fence, tell: impl FnOnce(&mut LeaseAck)) {
        // Without a stream there is nobody to tell: the runner sends again when it is back.
        if self.link.is_some() {
            let empty = LeaseAck { fence, acked_index: 0, finished: false, trouble: None };
            tell(self.told.entry(fence).or_insert(empty));
        }
    }

    /// Takes what there is to tell.
    pub fn take(&mut self) -> Vec<LeaseAck> {
        std::mem::take(&mut self.told).into_values().collect()
    }

    /// Whether too much waits, since the runner does not read.
    pub fn is_overfull(&self) -> bool {
        self.told.len() > MAX_TOLD
    }

    /// Whether there is something to tell.
    pub fn is_empty(&self) -> bool {
        self.told.is_empty()
    }
}

/// A session.
#[derive(Debug)]
pub struct Session {
    /// Its name in the queue; unique in this process.
    pub key: SupplyKey,
    /// Its name on the wire; hard to guess.
    pub id: Arc<str>,
    /// Tenant of the runner.
    pub namespace: Namespace,
    /// Who the runner is.
    pub profile: Arc<Profile>,
    /// When it began.
    pub connect_time: Micros,
    /// Last sign of life, for leases.
    pub heard: Mono,
    /// Last sign of life, for people.
    pub heartbeat_time: Micros,
    /// How often the runner came back.
    pub n_reconnects: u32,
    /// How the runner is connected now.
    pub attached: Attached,
    /// Rung when there may be something to send.
    pub bell: Arc<Notify>,
    /// Control messages to the runner.
    pub outbox: Outbox<ToRunner>,
    /// Control messages from it.
    pub inbox: Inbox,
    /// What it would take.
    pub credits: Credits,
    /// Whether it takes work, as it says itself.
    pub leave: Leave,
    /// What operators ask of it.
    pub commands: Commands,
    /// Attempts that it is to stop.
    pub cancels: Cancels,
    /// Load of its host.
    pub load: f64,
    /// Tasks whose leases it holds.
    pub held: BTreeSet<crate::id::TaskId>,
    /// Its events.
    pub output: Output,
    finished: VecDeque<Fence>,
    /// Grows whenever attempts come or go.
    changes: u64,
    /// `changes` at the latest heartbeat, and how many in a row had a wrong digest.
    suspicion: (u64, u32),
    /// Seq of the `InventoryRequest` that is not answered yet. It is numbered, so its answer comes,
    /// perhaps late.
    inventory_asked: Option<u64>,
}

impl Session {
    /// A session that begins now.
    pub fn new(
        key: SupplyKey,
        id: Arc<str>,
        namespace: Namespace,
        profile: Profile,
        (now, mono): (Micros, Mono),
    ) -> Self {
        Self {
            key,
            id,
            namespace,
            profile: Arc::new(profile),
            connect_time: now,
            heard: mono,
            heartbeat_time: now,
            n_reconnects: 0,
            attached: Attached::No(mono),
            bell: Arc::new(Notify::new()),
            outbox: Outbox::default(),
            inbox: Inbox::default(),
            credits: Credits::default(),
            leave: Leave::default(),
            commands: Commands::default(),
            cancels: Cancels::default(),
            load: 0.0,
            held: BTreeSet::new(),
            output: Output::default(),
            finished: VecDeque::new(),
            changes: 0,
            suspicion: (0, 0),
            inventory_asked: None,
        }
    }

    /// The runner gave a sign of life.
    pub fn hear(&mut self, now: Micros, mono: Mono) {
        self.heard = mono;
        self.heartbeat_time = now;
    }

    /// Makes `attached` the only connection.
    pub fn attach(&mut self, attached: Attached) {
        // A runner that polls has calls under way at once: the earlier one just returns.
        let both_poll =
            matches!((&self.attached, &attached), (Attached::Poll(_), Attached::Poll(_)));
        let before = std::mem::replace(&mut self.attached, attached);
        if let Some(link) = before.link() {
            link.end((!both_poll).then(superseded));
        }
        self.outbox.rewind();
        self.bell.notify_one();
    }

    /// Makes `link` the only Output stream; what was told on an earlier one is told again.
    pub fn attach_output(&mut self, link: Link) {
        if let Some(before) = self.output.link.replace(link) {
            before.end(Some(superseded()));
        }
        self.output.read_seq = 0;
        self.output.bell.notify_one();
    }

    /// Fails unless `link` is the present connection.
    pub fn check(&self, link: &Link) -> Result<()> {
        match self.attached.link() {
            Some(present) if present.is(link) => Ok(()),
            _ => Err(superseded()),
        }
    }

    /// Sends a control message, now or when the runner is back; returns its seq. A runner that
    /// never acknowledges is told to come back.
    pub fn say(&mut self, message: ToRunner) -> u64 {
        let seq = self.outbox.push(message);
        if self.outbox.n_unacked() > MAX_UNACKED
            && let Some(link) = self.attached.link()
        {
            link.end(Some(overloaded("control messages are not acknowledged")));
        }
        self.bell.notify_one();
        seq
    }

    /// Tells the runner to stop an attempt that it holds no lease of any more.
    pub fn cancel(
        &mut self,
        fence: Fence,
        reason: Reason,
        detail: String,
        grace: Duration,
        now: Micros,
    ) {
        let reason = reason_name(reason);
        let seq = self.say(ToRunner::Cancel { fence, reason, detail, grace });
        if self.profile.understands(feature::STOPPED) {
            self.cancels.tell(fence, seq, now, grace);
        }
    }

    /// Whether the queue may hand work out to it: as it says itself, and as commands that it has
    /// not answered yet ask it to.
    pub fn mode(&self) -> SupplyState {
        let (mut drain, mut pause) = (self.leave.draining, self.leave.paused);
        for action in self.commands.open() {
            drain |= matches!(action, Action::Drain { .. });
            pause |= matches!(action, Action::Pause);
        }
        match (drain, pause) {
            (true, _) => SupplyState::Draining,
            (false, true) => SupplyState::Paused,
            (false, false) => SupplyState::Ready,
        }
    }

    /// Takes what the runner offers now; whether its models have changed.
    pub fn offer(&mut self, offer: Offer) -> bool {
        let Offer { models, engine_version, engine_params, leave } = offer;
        self.leave = leave;
        let changed = self.profile.models != models;
        let profile = Arc::make_mut(&mut self.profile);
        (profile.models, profile.engine_version) = (models, engine_version);
        profile.engine_params = engine_params;
        changed
    }

    /// Takes the load that the runner measured.
    pub fn measured(&mut self, load: f64, gpus: Vec<pb::Gpu>) {
        self.load = load;
        // The first release's agents name the processors in Hello alone.
        if !gpus.is_empty() && self.profile.node.gpus != gpus {
            Arc::make_mut(&mut self.profile).node.gpus = gpus;
        }
    }

    /// The runner as the queue sees it.
    pub fn supply(&self) -> RunnerSupply {
        let profile = &self.profile;
        RunnerSupply {
            key: self.key,
            namespace: self.namespace.clone(),
            models: profile.models.iter().map(|model| ModelPattern::parse(model)).collect(),
            labels: profile.labels.clone(),
            slots: profile.slots,
            runner: profile.runner.clone(),
        }
    }

    /// Takes an announcement of credits; false when it is an old one.
    pub fn announce(&mut self, said: Announcement) -> bool {
        // A runner may not offer more than it has.
        let free = said.free_slots.min(self.profile.slots);
        self.credits.announce(said.revision, free, said.as_of_seq)
    }

    /// Attempts that the queue may hand out to it now.
    pub fn free(&self) -> u32 {
        match self.attached {
            Attached::No(_) => 0,
            Attached::Stream(_) | Attached::Poll(_) => self.credits.available(),
        }
    }

    /// It holds one more.
    pub fn hold(&mut self, fence: Fence) {
        self.held.insert(fence.task);
        self.changes += 1;
    }

    /// It holds one less.
    pub fn release(&mut self, fence: Fence) {
        self.held.remove(&fence.task);
        self.changes += 1;
    }

    /// An attempt ended as the runner said, on stable storage.
    pub fn finished(&mut self, fence: Fence) {
        if self.finished.len() >= MAX_FINISHED {
            self.finished.pop_front();
        }
        self.finished.push_back(fence);
    }

    /// Whether the attempt ended as the runner said.
    pub fn has_finished(&self, fence: Fence) -> bool {
        self.finished.iter().rev().any(|ended| *ended == fence)
    }

    /// Judges a heartbeat's digest against that of the attempts it should hold; true when the
    /// runner is to be asked what it holds.
    ///
    /// A digest may be wrong because messages are under way, so a change since the latest
    /// heartbeat buys it some patience.
    pub fn suspects(&mut self, said: HeldDigest, expected: HeldDigest) -> bool {
        let (changes, n_wrong) = self.suspicion;
        if said == expected {
            self.suspicion = (self.changes, 0);
            return false;
        }
        let n_wrong = n_wrong + 1;
        self.suspicion = (self.changes, n_wrong);
        let sure = (n_wrong > 1 && changes == self.changes) || n_wrong >= PATIENCE;
        sure && self.inventory_asked.is_none()
    }

    /// Asks what the runner holds.
    pub fn ask_inventory(&mut self) {
        self.inventory_asked = Some(self.say(ToRunner::InventoryRequest));
    }

    /// An inventory has come. It says nothing of what was assigned after the seq returned: it may
    /// have been made long ago.
    pub fn inventory_came(&mut self) -> u64 {
        self.suspicion = (self.changes, 0);
        self.inventory_asked.take().unwrap_or(0)
    }

    /// State in lists.
    pub fn is_connected(&self) -> bool {
        self.attached.link().is_some()
    }
}

/// Another connection of the same session took over.
pub fn superseded() -> Error {
    Error::new(Kind::Aborted, Reason::Conflict, "a newer connection of this runner took over")
}

/// Another process of the same name took over.
pub fn taken_over(runner: &RunnerId) -> Error {
    let message = format!("another process took over the name of runner `{runner}`");
    Error::new(Kind::AlreadyExists, Reason::AlreadyExists, message)
}

/// The runner does not keep up its side.
pub fn overloaded(message: &str) -> Error {
    Error::new(Kind::ResourceExhausted, Reason::Overloaded, message)
        .with("policy_label", "runner_unread")
}
