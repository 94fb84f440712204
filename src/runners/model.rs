//! What the runner protocol says, parsed: names of attempts, who a runner is, and the control
//! messages of both sides.

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use super::commands::{Action, Progress, Refusal};
use crate::{
    id::{RunnerId, TaskId},
    pb,
    tasks::model::Task,
};

/// The fencing token: one attempt of one task.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fence {
    /// The task.
    pub task: TaskId,
    /// The attempt, from 1.
    pub attempt: u32,
}

impl fmt::Display for Fence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.task, self.attempt)
    }
}

/// Who a runner is and what it can do, as its latest Hello and Offer say.
#[derive(Clone, Debug, PartialEq)]
pub struct Profile {
    /// Its name.
    pub runner: RunnerId,
    /// Made anew at each start of its process.
    pub instance: String,
    /// Its host, as operators see it.
    pub node: pb::Node,
    /// Most attempts at once.
    pub slots: u32,
    /// Labels that tasks may require.
    pub labels: BTreeMap<String, String>,
    /// Pools that it belongs to.
    pub pools: Vec<String>,
    /// Models that it serves, as it wrote them.
    pub models: Vec<String>,
    /// Its engine.
    pub engine: String,
    /// Version of the engine.
    pub engine_version: String,
    /// Version of the agent.
    pub agent_version: String,
    /// Features that it understands.
    pub features: Vec<String>,
    /// Parameters of its engine that were set by command.
    pub engine_params: prost_types::Struct,
}

impl Profile {
    /// Whether it understands a feature.
    pub fn understands(&self, feature: &str) -> bool {
        self.features.iter().any(|known| known == feature)
    }
}

/// What a runner offers, in place of what it said before.
#[derive(Clone, Debug, PartialEq)]
pub struct Offer {
    /// Models that it serves, as it wrote them.
    pub models: Vec<String>,
    /// Version of the engine.
    pub engine_version: String,
    /// Parameters of its engine that were set by command.
    pub engine_params: prost_types::Struct,
    /// Whether it takes work.
    pub leave: Leave,
}

/// Why a runner takes no work, as it says itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leave {
    /// It is paused.
    pub paused: bool,
    /// It drains.
    pub draining: bool,
}

/// The first message of a connection.
#[derive(Clone, Debug, PartialEq)]
pub struct Hello {
    /// Who it is.
    pub profile: Profile,
    /// Whether it takes work.
    pub leave: Leave,
    /// Session to go on with.
    pub session: Option<String>,
    /// Oldest and newest protocol version spoken.
    pub versions: (u32, u32),
    /// Attempts that it holds.
    pub inventory: Vec<Held>,
    /// Its first credits.
    pub credits: Option<Announcement>,
    /// Highest seq of the server that it processed in `session`.
    pub ack: u64,
}

/// An attempt that a runner holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// Which.
    pub fence: Fence,
    /// Index of its latest event; 0 before the first.
    pub last_index: u64,
    /// Lowest index that can still be resent; 0 when nothing is kept.
    pub first_kept_index: u64,
    /// Whether its Finish was made.
    pub finished: bool,
}

/// An announcement of credits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Announcement {
    /// Grows with every announcement.
    pub revision: u64,
    /// Attempts that it would take now, besides those held.
    pub free_slots: u32,
    /// Seq of the last Assign that was seen when counting.
    pub as_of_seq: u64,
}

/// A control message of the runner, after Hello.
#[derive(Clone, Debug, PartialEq)]
pub struct FromRunner {
    /// Its number; 0 when it is never resent.
    pub seq: u64,
    /// Highest seq of the server that the runner processed.
    pub ack: u64,
    /// What it says.
    pub body: Said,
}

/// What a runner says.
#[derive(Clone, Debug, PartialEq)]
pub enum Said {
    /// It takes an assignment.
    Accept(Fence),
    /// It declines one, with the reason.
    Refuse(Fence, String),
    /// It is alive.
    Heartbeat {
        /// Digest of the attempts held.
        digest: u64,
        /// Load of its host.
        load: f64,
        /// Graphics processors and their load.
        gpus: Vec<pb::Gpu>,
    },
    /// How much more it would take.
    Credits(Announcement),
    /// It works on a command.
    CommandAccepted(String),
    /// So much of a command is done.
    CommandProgress(String, Progress),
    /// A command ended; why, when it failed.
    CommandDone(String, Option<Refusal>),
    /// What it offers now.
    Offer(Offer),
    /// Nothing of a cancelled attempt runs any more, so long after it was told.
    Stopped(Fence, Duration),
    /// All that it holds.
    Inventory(Vec<Held>),
    /// It leaves for good, with the reason.
    Bye(String),
}

/// What the server says.
#[derive(Clone, Debug)]
pub enum ToRunner {
    /// Execute an attempt.
    Assign {
        /// The task, running.
        task: Arc<Task>,
        /// Credential for unary calls of the attempt.
        token: String,
    },
    /// Stop one.
    Cancel {
        /// Which.
        fence: Fence,
        /// Name of the reason.
        reason: &'static str,
        /// For people.
        detail: String,
        /// The work must have stopped after this long.
        grace: Duration,
    },
    /// Do as an operator asks.
    Command {
        /// Unique in the session.
        id: String,
        /// What.
        action: Action,
    },
    /// Say what is held.
    InventoryRequest,
    /// What to do with what is held.
    Reconciliation(Vec<Verdict>),
}

/// What to do with an attempt that a runner holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Which.
    pub fence: Fence,
    /// First index to send again; `None` to drop the attempt.
    pub resume_from: Option<u64>,
}

/// The server's answer to Hello.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// Protocol version to speak.
    pub version: u32,
    /// The session.
    pub session: Arc<str>,
    /// Whether the session of Hello goes on.
    pub resumed: bool,
    /// What to do with each attempt of the inventory.
    pub verdicts: Vec<Verdict>,
    /// Highest seq of the runner that was processed.
    pub last_seq: u64,
    /// Features of the runner that are used.
    pub features: Vec<String>,
}

/// Consecutive events of one attempt, and perhaps its end.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// Which.
    pub fence: Fence,
    /// Index of the first event.
    pub first_index: u64,
    /// The events, as they came: the hot path converts nothing.
    pub events: Vec<pb::RunnerEvent>,
    /// The end.
    pub finish: Option<pb::Finish>,
}

/// What became of an attempt's events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseAck {
    /// Which.
    pub fence: Fence,
    /// All up to this index is on stable storage; 0 for none.
    pub acked_index: u64,
    /// The end is on stable storage.
    pub finished: bool,
    /// Trouble.
    pub trouble: Option<Trouble>,
}

/// Why events were not taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// The lease has ended: stop that work.
    LeaseLost,
    /// Send again from this index.
    Missing {
        /// First index to send again.
        resend_from: u64,
    },
    /// An event is malformed; the attempt ends as failed.
    Invalid(String),
}
