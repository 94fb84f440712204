//! The state machine: pure, and the only place that moves a task's state.
//!
//! ```text
//!            Start                Finish(success)
//!  QUEUED ----------> RUNNING ----------------------> SUCCEEDED
//!    ^                   |  Finish(failure), TimeOut
//!    |  retry, Lose,     +-------------------------> FAILED | DEAD_LETTERED
//!    +--- hand-back -----+  Orphan: as Lose; Resume: another server holds it
//!  QUEUED, RUNNING -- Cancel --> CANCELLED      -- Expire --> EXPIRED
//!  QUEUED -- Evict --> FAILED
//! ```

#[cfg(test)]
mod tests;

use std::time::Duration;

use crate::tasks::model::{Failure, State, Task, Usage};
use crate::{
    clock::Micros,
    error::{Reason, reason_name},
    faults::{self, Fault},
    id::{InstanceId, Namespace, RunnerId},
};

/// Attempts that may be lost with their runners before the task counts as poison.
pub const MAX_LOST: u32 = 5;
/// Attempts that may be handed back.
pub const MAX_HANDED_BACK: u32 = 20;
/// Longest wait before another attempt that a runner may ask for.
pub const MAX_RETRY_AFTER: Duration = Duration::from_hours(1);
/// Sequences reserved for an attempt when it starts.
pub const FIRST_RESERVATION: u64 = 1024;

/// What happens to a task.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A runner gets the lease.
    Start {
        /// Runner.
        runner: RunnerId,
        /// Its host.
        node: String,
        /// Its engine.
        engine: String,
        /// Version of the engine.
        engine_version: String,
        /// Server that the runner is connected to; `None` where there is one server only.
        instance: Option<InstanceId>,
        /// A `not_before` that the queue has seen pass by the monotonic clock: where the wall clock
        /// was set back, it may lie ahead of it once more.
        waited: Option<Micros>,
    },
    /// The runner came back with the attempt, to this server or another.
    Resume {
        /// Attempt.
        attempt: u32,
        /// Runner, which must be the one that got the lease.
        runner: RunnerId,
        /// The only namespace that the runner serves; `None` when it serves all.
        serves: Option<Namespace>,
        /// Server that it is connected to now.
        instance: InstanceId,
    },
    /// The server that held the runner's session is dead, and the runner came back to no other.
    Orphan {
        /// Attempt.
        attempt: u32,
        /// That server.
        instance: Option<InstanceId>,
        /// For people.
        reason: String,
    },
    /// The runner ended the attempt.
    Finish {
        /// Attempt.
        attempt: u32,
        /// How.
        outcome: Outcome,
        /// What it used.
        usage: Usage,
    },
    /// The runner was lost.
    Lose {
        /// Attempt.
        attempt: u32,
        /// For people.
        reason: String,
    },
    /// The attempt ran longer than it may.
    TimeOut {
        /// Attempt.
        attempt: u32,
    },
    /// Somebody cancels.
    Cancel {
        /// As given.
        reason: String,
        /// Name of the caller's key.
        by: String,
    },
    /// A time limit of the task passed.
    Expire(Limit),
    /// Dropped from a full queue.
    Evict {
        /// Limit that was reached, such as `model_queue_limit`.
        policy_label: String,
    },
}

/// How an attempt ended, as the runner tells it.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// With a result, a JSON object as text.
    Success(Option<String>),
    /// With an error.
    Failure {
        /// The error.
        failure: Failure,
        /// Shortest wait before another attempt, as far as the runner knows; at most
        /// [`MAX_RETRY_AFTER`] counts.
        retry_after: Duration,
    },
    /// Not executed to the end, through no fault of its own.
    HandBack(String),
}

impl From<Failure> for Outcome {
    fn from(failure: Failure) -> Self {
        Self::Failure { failure, retry_after: Duration::ZERO }
    }
}

/// A time limit of a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Limit {
    /// Must have ended.
    Deadline,
    /// Must have started.
    StartTimeout,
}

/// A timeline entry that the server makes.
#[derive(Clone, Debug, PartialEq)]
pub enum Entry {
    /// Waits for a runner.
    Queued {
        /// Earliest start.
        not_before: Option<Micros>,
        /// Why the previous attempt ended.
        previous: Option<Failure>,
    },
    /// An attempt began.
    AttemptStarted {
        /// Runner.
        runner: RunnerId,
        /// Its host.
        node: String,
        /// Its engine.
        engine: String,
        /// Version of the engine.
        engine_version: String,
    },
    /// Entries up to this one are lost for good.
    Gap {
        /// First lost sequence.
        first: u64,
    },
    /// The end; the task has the rest.
    Ended,
}

/// What is known of the sequences in use when an event is applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Highest sequence in use.
    pub head: u64,
    /// Sequences above `head` and below this one may have been shown to readers and are lost; this one
    /// was not, and takes the entry that says so.
    pub in_doubt: Option<u64>,
}

/// A move: the row as it will be and the entries to append.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// The row.
    pub task: Task,
    /// Entries with their sequences, which follow each other (a gap stands for its range).
    pub entries: Vec<(u64, Entry)>,
}

/// Why an event does not apply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rejected {
    /// The attempt is not the one that holds the lease.
    LeaseLost,
    /// The task has ended.
    Ended,
    /// The task is not waiting.
    NotQueued,
    /// The time for it has not come.
    NotDue,
}

/// Applies `event` to `task` at `now`. `unit` is random in `0..1`, for the backoff.
pub fn apply(
    task: &Task,
    event: &Event,
    now: Micros,
    head: Head,
    unit: f64,
) -> Result<Change, Rejected> {
    let mut next = Next::new(task, now, head);
    match event {
        Event::Start { runner, node, engine, engine_version, instance, waited } => {
            if task.state != State::Queued {
                return Err(if task.state == State::Running {
                    Rejected::NotQueued
                } else {
                    Rejected::Ended
                });
            }
            if task.not_before.is_some_and(|at| now < at && *waited != Some(at)) {
                return Err(Rejected::NotDue);
            }
            if due(task, Limit::Deadline, now) || due(task, Limit::StartTimeout, now) {
                return Err(Rejected::Ended);
            }
            next.start(runner, node, engine, engine_version);
            next.task.instance = *instance;
        }
        Event::Resume { attempt, runner, serves, instance } => {
            check_lease(task, *attempt)?;
            let serves = serves.as_ref().is_none_or(|serves| *serves == task.namespace);
            if task.runner.as_ref() != Some(runner) || !serves {
                return Err(Rejected::LeaseLost);
            }
            next.task.instance = Some(*instance);
        }
        Event::Orphan { attempt, instance, reason } => {
            check_lease(task, *attempt)?;
            if task.instance != *instance {
                return Err(Rejected::LeaseLost);
            }
            next.lose(reason);
        }
        Event::Finish { attempt, outcome, usage } => {
            check_lease(task, *attempt)?;
            next.task.usage = Some(*usage);
            match outcome {
                Outcome::Success(result) => next.end(State::Succeeded, result.clone(), None),
                Outcome::Failure { failure, retry_after } => {
                    next.fail(failure.clone(), *retry_after, unit);
                }
                Outcome::HandBack(reason) => next.hand_back(reason),
            }
        }
        Event::Lose { attempt, reason } => {
            check_lease(task, *attempt)?;
            next.lose(reason);
        }
        Event::TimeOut { attempt } => {
            check_lease(task, *attempt)?;
            let limit = task.spec.execution_timeout.as_secs_f64();
            next.fail(
                failure(
                    Reason::ExecutionTimeout,
                    format!("the attempt ran longer than its execution timeout of {limit} s"),
                    true,
                ),
                Duration::ZERO,
                unit,
            );
        }
        Event::Cancel { reason, by } => {
            check_open(task)?;
            let message = if reason.is_empty() {
                "cancelled".to_owned()
            } else {
                format!("cancelled: {reason}")
            };
            let mut error = failure(Reason::Cancelled, message, false);
            error.metadata.insert("cancelled_by".into(), by.clone());
            next.end(State::Cancelled, None, Some(error));
        }
        Event::Expire(limit) => {
            check_open(task)?;
            if !due(task, *limit, now) {
                return Err(Rejected::NotDue);
            }
            let error = match limit {
                Limit::Deadline => failure(Reason::DeadlineExceeded, "the deadline passed", false),
                Limit::StartTimeout => failure(
                    Reason::StartTimeout,
                    "no attempt started within the start timeout",
                    false,
                ),
            };
            next.end(State::Expired, None, Some(error));
        }
        Event::Evict { policy_label } => {
            check_open(task)?;
            if task.state != State::Queued {
                return Err(Rejected::NotQueued);
            }
            let mut error = failure(
                Reason::QueueFullDropLru,
                "dropped from a full queue for a task of at least its priority",
                true,
            );
            error.metadata.insert("policy_label".into(), policy_label.clone());
            next.end(State::Failed, None, Some(error));
        }
    }
    Ok(next.into_change())
}

/// The first entry of a new task.
pub fn first_entry(task: &Task) -> (u64, Entry) {
    (1, Entry::Queued { not_before: task.not_before, previous: None })
}

/// When a limit passes; `None` when the task has no such limit (any more).
pub fn limit_time(task: &Task, limit: Limit) -> Option<Micros> {
    match limit {
        Limit::Deadline => task.spec.deadline,
        Limit::StartTimeout if task.attempt == 0 => {
            task.spec.start_timeout.map(|after| task.create_time + after)
        }
        Limit::StartTimeout => None,
    }
}

fn due(task: &Task, limit: Limit, now: Micros) -> bool {
    limit_time(task, limit).is_some_and(|at| now >= at)
}

/// Fails unless `attempt` holds the lease.
pub fn check_lease(task: &Task, attempt: u32) -> Result<(), Rejected> {
    let holds = task.attempt == attempt || faults::planted(Fault::SkipFencing);
    if task.state == State::Running && holds { Ok(()) } else { Err(Rejected::LeaseLost) }
}

fn check_open(task: &Task) -> Result<(), Rejected> {
    let ended = task.state.is_terminal() && !faults::planted(Fault::MoveEndedTasks);
    if ended { Err(Rejected::Ended) } else { Ok(()) }
}

fn failure(reason: Reason, message: impl Into<String>, retryable: bool) -> Failure {
    Failure {
        reason: reason_name(reason).to_owned(),
        message: message.into(),
        retryable,
        metadata: Default::default(),
    }
}

/// The row and entries in the making.
struct Next {
    task: Task,
    now: Micros,
    head: u64,
    entries: Vec<(u64, Entry)>,
}

impl Next {
    fn new(task: &Task, now: Micros, head: Head) -> Self {
        // A clock set back must not make a time go backwards within a task.
        let now = now.max(task.create_time).max(task.start_time.unwrap_or_default());
        let mut next = Self { task: task.clone(), now, head: head.head, entries: Vec::new() };
        let in_doubt = head.in_doubt.filter(|_| !faults::planted(Fault::ReuseShownSequences));
        if let Some(last) = in_doubt.filter(|last| *last > head.head) {
            let first = head.head + 1;
            next.head = last;
            next.entries.push((last, Entry::Gap { first }));
        }
        next
    }

    fn append(&mut self, entry: Entry) -> u64 {
        self.head += 1;
        self.entries.push((self.head, entry));
        self.head
    }

    fn start(&mut self, runner: &RunnerId, node: &str, engine: &str, engine_version: &str) {
        let base = self.append(Entry::AttemptStarted {
            runner: runner.clone(),
            node: node.to_owned(),
            engine: engine.to_owned(),
            engine_version: engine_version.to_owned(),
        });
        self.task.state = State::Running;
        if self.task.attempt == 0 || !faults::planted(Fault::RepeatAttemptNumbers) {
            self.task.attempt += 1;
        }
        self.task.start_time = Some(self.now);
        self.task.not_before = None;
        self.task.runner = Some(runner.clone());
        self.task.base_sequence = base;
        self.task.reserved_sequence = base + FIRST_RESERVATION;
    }

    fn fail(&mut self, failure: Failure, retry_after: Duration, unit: f64) {
        self.task.failed += 1;
        let retry = &self.task.spec.retry;
        let allowed = failure.retryable
            && (retry.retry_on.is_empty() || retry.retry_on.contains(&failure.reason));
        if !allowed {
            self.end(State::Failed, None, Some(failure));
        } else if self.task.failed >= retry.max_attempts
            && !faults::planted(Fault::RetryWithoutLimit)
        {
            self.end(State::DeadLettered, None, Some(failure));
        } else {
            let wait = retry.backoff(self.task.failed, unit).max(retry_after.min(MAX_RETRY_AFTER));
            self.requeue(failure, Some(wait));
        }
    }

    fn lose(&mut self, reason: &str) {
        self.task.lost += 1;
        let error = failure(Reason::RunnerLost, reason, true);
        if self.task.lost >= MAX_LOST {
            self.end(State::DeadLettered, None, Some(error));
        } else {
            self.requeue(error, None);
        }
    }

    fn hand_back(&mut self, reason: &str) {
        let error = failure(Reason::HandedBack, reason, true);
        if faults::planted(Fault::CountHandBacks) {
            return self.fail(error, Duration::ZERO, 0.0);
        }
        self.task.handed_back += 1;
        if self.task.handed_back >= MAX_HANDED_BACK {
            self.end(State::DeadLettered, None, Some(error));
        } else {
            self.requeue(error, None);
        }
    }

    fn requeue(&mut self, previous: Failure, wait: Option<Duration>) {
        let not_before = wait.map(|wait| self.now + wait);
        self.task.state = State::Queued;
        self.task.instance = None;
        self.task.not_before = not_before;
        self.append(Entry::Queued { not_before, previous: Some(previous) });
    }

    fn end(&mut self, state: State, result: Option<String>, error: Option<Failure>) {
        self.task.state = state;
        self.task.instance = None;
        self.task.end_time = Some(self.now);
        self.task.not_before = None;
        self.task.result = result;
        self.task.error = error;
        self.append(Entry::Ended);
    }

    fn into_change(mut self) -> Change {
        self.task.last_sequence = self.head;
        self.task.reserved_sequence = self.task.reserved_sequence.max(self.head);
        self.task.revision += 1;
        Change { task: self.task, entries: self.entries }
    }
}
