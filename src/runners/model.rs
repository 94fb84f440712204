//! What the runner protocol says, parsed: names of attempts, who a runner is, and the control
//! messages of both sides.

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

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

/// Who a runner is and what it can do, as its latest Hello says.
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
}

/// The first message of a connection.
#[derive(Clone, Debug, PartialEq)]
pub struct Hello {
    /// Who it is.
    pub profile: Profile,
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
    /// It is alive and holds so many attempts, with this digest.
    Heartbeat {
        /// Digest of the attempts held.
        digest: u64,
    },
    /// How much more it would take.
    Credits(Announcement),
    /// It works on a command.
    CommandAccepted(String),
    /// A command ended, with an error's text when it failed.
    CommandDone(String, Option<String>),
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
    /// Take no more work.
    Drain {
        /// Unique in the session.
        command: String,
        /// Attempts still held by then are handed back.
        deadline: Duration,
        /// Hand back at once.
        hand_back: bool,
        /// Leave when done.
        exit: bool,
    },
    /// Pause or go on.
    Pause {
        /// Unique in the session.
        command: String,
        /// Which of both.
        paused: bool,
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
