//! Errors of commands that do not apply.

use crate::{
    error::{Error, Kind, Reason},
    id::TaskId,
    tasks::{model::Task, state::Rejected},
};

/// The one answer to anything that comes under a lease that has ended.
pub fn lease_lost(id: TaskId, attempt: u32) -> Error {
    Error::new(
        Kind::FailedPrecondition,
        Reason::LeaseLost,
        format!("attempt {attempt} of task `{id}` does not hold the lease; stop that work"),
    )
    .with("task_id", id)
    .with("attempt", attempt)
}

/// Rows that were at hand may be behind the database.
pub(super) fn stale() -> Error {
    Error::new(Kind::Aborted, Reason::Conflict, "it may have changed meanwhile; looking again")
}

pub(super) fn refused(task: &Task, rejected: Rejected, attempt: Option<u32>) -> Error {
    let conflict = |message: String| Error::state_conflict("task", task.id, task.state, message);
    match rejected {
        Rejected::LeaseLost => lease_lost(task.id, attempt.unwrap_or(task.attempt)),
        Rejected::Ended => conflict(format!("task `{}` has ended: {}", task.id, task.state)),
        Rejected::NotQueued => {
            conflict(format!("task `{}` does not wait: {}", task.id, task.state))
        }
        Rejected::NotDue => {
            conflict(format!("the time for it has not come for task `{}`", task.id))
        }
    }
}
