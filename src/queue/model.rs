//! What the queue is told and what it answers; no behaviour beyond small accessors.

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};

use crate::{
    clock::Micros,
    error::Reason,
    id::{Namespace, RunnerId, TaskId},
};

/// A task that waits: what scheduling needs to know of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The task.
    pub id: TaskId,
    /// Tenant.
    pub namespace: Namespace,
    /// `owner/name`.
    pub model: String,
    /// Wanted version; `None` when any will do.
    pub version: Option<String>,
    /// Labels that the runner must have.
    pub required_labels: Arc<BTreeMap<String, String>>,
    /// -100 to 100; higher first.
    pub priority: i32,
    /// When the task was accepted.
    pub create_time: Micros,
    /// Earliest start, by the wall clock.
    pub not_before: Option<Micros>,
    /// Must end by then.
    pub deadline: Option<Micros>,
    /// Session.
    pub session: Option<String>,
    /// Attempts made so far; above 0 a `not_before` is a backoff.
    pub attempt: u32,
    /// Whether the queue has seen that backoff pass, by the monotonic clock.
    pub waited_out: bool,
}

/// Names one connection's worth of supply; never used again after [`runner_down`].
///
/// [`runner_down`]: super::Queue::runner_down
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SupplyKey(pub u64);

/// Which tasks a runner takes by their model: `*`, `owner/name` (any version) or
/// `owner/name@version` (that version, and tasks that name none).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ModelPattern {
    /// Every model.
    Any,
    /// Every version of a model.
    Model(String),
    /// One version of a model.
    Version(String, String),
}

impl ModelPattern {
    /// Reads `*`, `owner/name` or `owner/name@version`.
    pub fn parse(text: &str) -> Self {
        match text.split_once('@') {
            _ if text == "*" => Self::Any,
            Some((model, version)) => Self::Version(model.into(), version.into()),
            None => Self::Model(text.into()),
        }
    }

    /// The model that it names; `None` for every model.
    pub fn model(&self) -> Option<&str> {
        match self {
            Self::Any => None,
            Self::Model(model) | Self::Version(model, _) => Some(model),
        }
    }

    /// Whether a task for `model`, and `version` if it names one, may run there.
    pub fn matches(&self, model: &str, version: Option<&str>) -> bool {
        match self {
            Self::Any => true,
            Self::Model(own) => own == model,
            Self::Version(own, v) => own == model && version.is_none_or(|version| version == v),
        }
    }
}

impl fmt::Display for ModelPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("*"),
            Self::Model(model) => f.write_str(model),
            Self::Version(model, version) => write!(f, "{model}@{version}"),
        }
    }
}

/// A runner as the queue sees it.
#[derive(Clone, Debug)]
pub struct RunnerSupply {
    /// Its key.
    pub key: SupplyKey,
    /// Its namespace; runners of [`Namespace::DEFAULT`] serve every namespace.
    pub namespace: Namespace,
    /// What it serves.
    pub models: Vec<ModelPattern>,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Attempts that it runs at once.
    pub slots: u32,
    /// Its stable name; session affinity survives a new key by it.
    pub runner: RunnerId,
}

/// Whether a runner takes work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SupplyState {
    /// It does, as its credits allow.
    Ready,
    /// It leaves and takes none.
    Draining,
    /// It takes none for now.
    Paused,
}

/// One decision: this task goes to that runner. The entry has left the queue and one credit
/// of the runner is in flight until [`assigned`](super::Queue::assigned) or
/// [`give_back`](super::Queue::give_back).
#[derive(Clone, Debug)]
pub struct Match {
    /// The task.
    pub entry: Entry,
    /// The runner.
    pub runner: SupplyKey,
}

/// A lane of the backlog that servers share: tasks of one queue and priority that the same runners
/// can run, oldest first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaneSpec {
    /// Its name.
    pub name: Arc<str>,
    /// Tenant.
    pub namespace: Namespace,
    /// `owner/name`.
    pub model: String,
    /// Wanted version; `None` when any will do.
    pub version: Option<String>,
    /// Labels that a runner must have.
    pub required_labels: Arc<BTreeMap<String, String>>,
    /// -100 to 100.
    pub priority: i32,
}

/// What a lane holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LaneState {
    /// When the task that comes next was accepted; `None` when none waits.
    pub next: Option<Micros>,
    /// When the youngest task was.
    pub last: Option<Micros>,
    /// Tasks that no server has taken.
    pub waiting: u64,
    /// All tasks, those with a server and not started included.
    pub entries: u64,
    /// Since when the oldest is in the lane.
    pub oldest: Option<Micros>,
}

/// What to fetch from the backlog.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fetch {
    /// From which lane.
    pub lane: Arc<str>,
    /// Most tasks.
    pub most: u32,
}

/// What a server says of itself, for the others' numbers and explanations.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Its runners.
    pub runners: Vec<Runners>,
    /// Its part of the queues.
    pub queues: Vec<QueuePart>,
    /// Service time by model: mean and variance, in seconds and their square.
    pub services: BTreeMap<String, (f64, f64)>,
}

/// Runners of one server that are alike.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Runners {
    /// Their namespace.
    pub namespace: String,
    /// What they serve, as announced.
    pub models: Vec<String>,
    /// Their labels.
    pub labels: BTreeMap<String, String>,
    /// Slots of all.
    pub slots: u32,
    /// Slots of those that take work.
    pub ready_slots: u32,
    /// Free ones among these.
    pub free: u32,
}

/// One server's part of a queue.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct QueuePart {
    /// Tenant.
    pub namespace: String,
    /// `owner/name`.
    pub model: String,
    /// Tasks that run there.
    pub running: u64,
    /// Tasks started per second.
    pub start_rate: f64,
}

/// Who paused a queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pause {
    /// Name of the caller.
    pub by: String,
    /// Why, as given.
    pub reason: String,
    /// When.
    pub time: Micros,
}

/// A queue: the waiting tasks of one model in one namespace.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct QueueStats {
    /// `owner/name`.
    pub model: String,
    /// Tasks that may start now.
    pub depth: u64,
    /// Tasks that wait for their `not_before`.
    pub delayed: u64,
    /// Tasks that run.
    pub running: u64,
    /// How long the oldest startable task has waited.
    pub oldest_wait: Option<Duration>,
    /// Tasks started per second, over the last minute or so.
    pub start_rate: f64,
    /// Slots of connected runners that serve the model in this namespace.
    pub slots: u32,
    /// Free ones among them.
    pub free_slots: u32,
    /// Most tasks that may wait.
    pub limit: u64,
    /// Set while paused.
    pub pause: Option<Pause>,
}

/// When a task would start, by measured service times.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Estimate {
    /// Place among the waiting tasks of its model and namespace, from 1.
    pub position: u64,
    /// Time until it starts; `None` while nothing was measured or nobody serves it.
    pub predicted_start: Option<Duration>,
    /// Probability that it ends before its deadline; `None` without one.
    pub on_time_probability: Option<f64>,
}

/// Why a task waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaitReason {
    /// Its queue is paused.
    QueuePaused,
    /// Its `not_before` has not come.
    NotBefore,
    /// It waits out the backoff after a failed attempt.
    Backoff,
    /// No connected runner serves the model, or none that version.
    NoRunnerForModel,
    /// Runners serve the model, none has the labels.
    NoRunnerWithLabels,
    /// Matching runners are draining or paused.
    RunnersDraining,
    /// Other tasks are ahead.
    BehindOthers,
    /// It is the next, all slots are busy.
    NoFreeSlot,
    /// It is about to be handed out.
    Starting,
}

/// The one dominant reason why a task waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// The reason.
    pub reason: WaitReason,
    /// One line for people.
    pub summary: String,
    /// What to do about it; empty when nothing needs doing.
    pub next_step: String,
    /// Facts behind the reason.
    pub evidence: BTreeMap<String, String>,
}

/// An attempt that must stop: told to the runner that holds its lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Revocation {
    /// The task.
    pub task: TaskId,
    /// The attempt.
    pub attempt: u32,
    /// Why.
    pub reason: Reason,
    /// For people.
    pub detail: String,
}

/// What happens to a submit when its queue is full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FullPolicy {
    /// The submit is refused.
    #[default]
    Reject,
    /// The oldest task of the lowest priority leaves, if its priority is not above the new one's.
    DropOldest,
}

/// Bounds and weights.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Most tasks that wait for one model in one namespace.
    pub max_per_model: u64,
    /// Most tasks that wait in one namespace.
    pub max_per_namespace: u64,
    /// What happens when one of them is reached.
    pub when_full: FullPolicy,
    /// One step of priority is worth this much waiting.
    pub ageing_step: Duration,
    /// Shares of namespaces under contention; 1 for those not named.
    pub weights: BTreeMap<Namespace, u32>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_per_model: 1_000_000,
            max_per_namespace: 2_000_000,
            when_full: FullPolicy::Reject,
            ageing_step: Duration::from_secs(30),
            weights: BTreeMap::new(),
        }
    }
}
