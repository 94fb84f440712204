//! What commands did, and what is read out of the events that they carry.

use std::sync::Arc;

use crate::{
    clock::Micros,
    error::Reason,
    tasks::{
        model::{State, Task},
        state::Event,
    },
};

/// What a command did, to be told after the commit.
pub(super) enum Effect {
    /// A task was accepted.
    Accepted(Arc<Task>),
    /// A running attempt may use more sequences, or is held by this server now.
    Kept(Arc<Task>),
    /// An attempt began.
    Started {
        /// The task as it was.
        was: Arc<Task>,
        /// The task as it is.
        now: Arc<Task>,
    },
    /// An attempt ended and another will follow.
    Requeued {
        /// The task as it was.
        was: Arc<Task>,
        /// The task as it is.
        now: Arc<Task>,
        /// Who caused it.
        cause: Cause,
    },
    /// The task ended.
    Ended {
        /// The task as it was.
        was: Arc<Task>,
        /// The task as it is.
        now: Arc<Task>,
        /// Who caused it.
        cause: Cause,
    },
}

/// Whether the runner must be told that its lease ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cause {
    /// It ended the attempt itself.
    Runner,
    /// Somebody else did, for this reason.
    Other(Reason),
}

/// Fills in what only the server knows: how long the attempt took.
pub(super) fn count_usage(was: &Task, task: &mut Task, now: Micros) {
    if was.state == State::Running && task.state != State::Running {
        let mut usage = task.usage.unwrap_or_default();
        usage.execution = now.since(was.start_time.unwrap_or(now));
        task.usage = Some(usage);
    }
}

/// The attempt that an event names.
pub(super) fn attempt_of(event: &Event) -> Option<u32> {
    match event {
        Event::Finish { attempt, .. }
        | Event::Lose { attempt, .. }
        | Event::Resume { attempt, .. }
        | Event::Orphan { attempt, .. }
        | Event::TimeOut { attempt } => Some(*attempt),
        Event::Start { .. } | Event::Cancel { .. } | Event::Expire(_) | Event::Evict { .. } => None,
    }
}

/// Whether only the server that holds the runner's session may say so.
pub(super) fn is_holders(event: &Event) -> bool {
    matches!(event, Event::Finish { .. } | Event::Lose { .. } | Event::TimeOut { .. })
}

/// Who causes what an event causes.
pub(super) fn cause_of(event: &Event) -> Cause {
    match event {
        Event::Finish { .. } | Event::Start { .. } | Event::Resume { .. } => Cause::Runner,
        Event::Lose { .. } | Event::Orphan { .. } => Cause::Other(Reason::LeaseLost),
        Event::TimeOut { .. } => Cause::Other(Reason::ExecutionTimeout),
        Event::Cancel { .. } => Cause::Other(Reason::Cancelled),
        Event::Expire(_) => Cause::Other(Reason::DeadlineExceeded),
        Event::Evict { .. } => Cause::Other(Reason::QueueFullDropLru),
    }
}
