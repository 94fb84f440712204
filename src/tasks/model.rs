//! What a task is, free of wire and storage types.

use std::{collections::BTreeMap, fmt, str::FromStr, time::Duration};

use serde::{Deserialize, Serialize};

use crate::{
    clock::Micros,
    id::{InstanceId, Namespace, RunnerId, TaskId},
};

/// State of a task; only [`state::apply`](super::state::apply) moves it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum State {
    /// Waits for a runner, a backoff or its `not_before`.
    Queued,
    /// An attempt holds the lease.
    Running,
    /// Ended with a result.
    Succeeded,
    /// Ended with an error that no retry was allowed for.
    Failed,
    /// Ended by a cancel.
    Cancelled,
    /// Ended by its deadline or start timeout.
    Expired,
    /// Attempts used up; may be redriven, as a new task.
    DeadLettered,
}

impl State {
    /// Every state.
    pub const ALL: [Self; 7] = [
        Self::Queued,
        Self::Running,
        Self::Succeeded,
        Self::Failed,
        Self::Cancelled,
        Self::Expired,
        Self::DeadLettered,
    ];

    /// Whether nothing follows.
    pub fn is_terminal(self) -> bool {
        !matches!(self, Self::Queued | Self::Running)
    }

    /// Name in rows, logs and messages.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "QUEUED",
            Self::Running => "RUNNING",
            Self::Succeeded => "SUCCEEDED",
            Self::Failed => "FAILED",
            Self::Cancelled => "CANCELLED",
            Self::Expired => "EXPIRED",
            Self::DeadLettered => "DEAD_LETTERED",
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A text that names no state.
#[derive(Debug, thiserror::Error)]
#[error("`{0}` is not a task state")]
pub struct UnknownState(String);

impl FromStr for State {
    type Err = UnknownState;
    fn from_str(s: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|state| state.as_str() == s).ok_or(UnknownState(s.into()))
    }
}

/// When a failed attempt is followed by another.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RetryPolicy {
    /// Attempts that may fail by the task's own fault; at least 1.
    pub max_attempts: u32,
    /// Wait before the second attempt.
    pub initial_backoff: Duration,
    /// Longest wait.
    pub max_backoff: Duration,
    /// Growth from wait to wait; at least 1.
    pub multiplier: f64,
    /// Share of each wait that is random, 0 to 1.
    pub jitter: f64,
    /// Reasons that allow another attempt; empty means all retryable ones.
    pub retry_on: Vec<String>,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            max_attempts: 3,
            initial_backoff: Duration::from_secs(1),
            max_backoff: Duration::from_mins(1),
            multiplier: 2.0,
            jitter: 0.2,
            retry_on: Vec::new(),
        }
    }
}

impl RetryPolicy {
    /// The wait after the `failures`th failure (from 1); `unit` is random in `0..1`.
    pub fn backoff(&self, failures: u32, unit: f64) -> Duration {
        let exponent = i32::try_from(failures.saturating_sub(1)).unwrap_or(i32::MAX);
        let full = self.initial_backoff.as_secs_f64() * self.multiplier.powi(exponent);
        let capped = full.min(self.max_backoff.as_secs_f64());
        Duration::from_secs_f64(capped * (1.0 - self.jitter * unit))
    }
}

/// What the client asked for; never changes.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    /// `owner/name`.
    pub model: String,
    /// Version; `None` when any will do.
    pub version: Option<String>,
    /// JSON object, as text.
    pub input: String,
    /// JSON object, as text; `{}` for none.
    pub params: String,
    /// -100 to 100; higher first.
    pub priority: i32,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Labels that the runner must have.
    pub required_labels: BTreeMap<String, String>,
    /// Must end by then.
    pub deadline: Option<Micros>,
    /// Must start this long after the submit.
    pub start_timeout: Option<Duration>,
    /// Longest attempt.
    pub execution_timeout: Duration,
    /// Retries.
    pub retry: RetryPolicy,
    /// Sampler's seed; below 2^63, so that it fits a row.
    pub seed: u64,
    /// Session.
    pub session: Option<String>,
}

impl Spec {
    /// The same work once more at `now`: a deadline that has passed would end it at once.
    #[must_use]
    pub fn again(&self, now: Micros) -> Self {
        Self { deadline: self.deadline.filter(|deadline| *deadline > now), ..self.clone() }
    }
}

/// Why an attempt or a task did not succeed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Name of an error reason.
    pub reason: String,
    /// For people.
    pub message: String,
    /// Whether another attempt could help.
    pub retryable: bool,
    /// Facts.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
}

/// What the last attempt used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Input tokens.
    pub tokens_in: u64,
    /// Output tokens.
    pub tokens_out: u64,
    /// Start of the attempt to its end.
    pub execution: Duration,
    /// Start of the attempt to its first token.
    pub first_token: Option<Duration>,
}

/// A task: the row.
#[derive(Clone, Debug, PartialEq)]
pub struct Task {
    /// Id.
    pub id: TaskId,
    /// Tenant.
    pub namespace: Namespace,
    /// What was asked for.
    pub spec: Spec,
    /// State.
    pub state: State,
    /// Latest attempt; 0 before the first. Never reset.
    pub attempt: u32,
    /// Attempts that failed by the task's own fault.
    pub failed: u32,
    /// Attempts lost with their runner.
    pub lost: u32,
    /// Attempts handed back.
    pub handed_back: u32,
    /// Accepted.
    pub create_time: Micros,
    /// Start of the latest attempt.
    pub start_time: Option<Micros>,
    /// Ended.
    pub end_time: Option<Micros>,
    /// Earliest start.
    pub not_before: Option<Micros>,
    /// Runner of the latest attempt.
    pub runner: Option<RunnerId>,
    /// Server that holds the session of that runner; `None` where there is one server only.
    pub instance: Option<InstanceId>,
    /// Sequence of the latest attempt's `attempt_started`; events of the attempt follow it.
    pub base_sequence: u64,
    /// Highest sequence of a timeline event.
    pub last_sequence: u64,
    /// No sequence above this one was ever shown to a reader.
    pub reserved_sequence: u64,
    /// JSON object, as text.
    pub result: Option<String>,
    /// Error of an end without success.
    pub error: Option<Failure>,
    /// What it used.
    pub usage: Option<Usage>,
    /// Grows by one with every change of the row.
    pub revision: u64,
    /// Idempotency key.
    pub request_id: Option<String>,
    /// The task that this one retries.
    pub retry_of: Option<TaskId>,
    /// The task that retries this one.
    pub retried_by: Option<TaskId>,
    /// W3C trace context of the submit.
    pub traceparent: Option<String>,
}
