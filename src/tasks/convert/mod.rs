//! Tasks to the wire; [`request`] has the way back.

pub mod explain;
pub mod request;

use std::time::Duration;

use bytes::Bytes;

use super::{
    model::{Failure, State, Task, Usage},
    state::Entry,
};
use crate::{
    clock::Micros,
    error::{Error, Result},
    events::frame::{self, timestamp},
    json,
    pb::{self, task_event::Body},
};

/// Name of an entry's kind in rows.
pub fn kind(entry: &Entry) -> &'static str {
    match entry {
        Entry::Queued { .. } => "queued",
        Entry::AttemptStarted { .. } => "attempt_started",
        Entry::Gap { .. } => "gap",
        Entry::Ended => "ended",
    }
}

/// Name of the kind of an encoded event.
pub fn kind_of(frame: &Bytes) -> &'static str {
    match pb::Frame::new(frame.clone()).event().ok().and_then(|event| event.body) {
        Some(Body::Queued(_)) => "queued",
        Some(Body::AttemptStarted(_)) => "attempt_started",
        Some(Body::Stage(_)) => "stage",
        Some(Body::Token(_)) => "token",
        Some(Body::Log(_)) => "log",
        Some(Body::Metrics(_)) => "metrics",
        Some(Body::Artifact(_)) => "artifact",
        Some(Body::Gap(_)) => "gap",
        Some(Body::Ended(_)) => "ended",
        None => "unknown",
    }
}

/// Encodes an entry that `task`, as it is after the change, appends.
pub fn encode(sequence: u64, time: Micros, task: &Task, entry: &Entry) -> Bytes {
    let body = match entry {
        Entry::Queued { not_before, previous } => Body::Queued(pb::QueuedEvent {
            task_id: task.id.to_string(),
            not_before: not_before.map(timestamp),
            previous_error: previous.as_ref().map(failure),
            summary: previous.as_ref().map_or_else(
                || "waiting for a runner".to_owned(),
                |previous| format!("attempt {} ended: {}", task.attempt, previous.message),
            ),
        }),
        Entry::AttemptStarted { runner, node, engine, engine_version } => {
            Body::AttemptStarted(pb::AttemptStartedEvent {
                runner_id: runner.to_string(),
                node_id: node.clone(),
                engine: engine.clone(),
                engine_version: engine_version.clone(),
            })
        }
        Entry::Gap { first } => Body::Gap(pb::GapEvent {
            first_sequence: *first,
            reason: "lost with the server and the runner that held them".to_owned(),
        }),
        Entry::Ended => Body::Ended(pb::EndedEvent {
            state: state(task.state).into(),
            result: task.result.as_deref().and_then(json::struct_from_text),
            error: task.error.as_ref().map(failure),
            usage: task.usage.as_ref().map(usage),
            summary: summary(task),
        }),
    };
    frame::encode(sequence, time, task.attempt, body)
}

fn summary(task: &Task) -> String {
    let took = task.end_time.unwrap_or_default().since(task.create_time).as_secs_f64();
    match &task.error {
        Some(error) => format!("{} after {took:.1} s: {}", task.state, error.message),
        None => format!("{} after {took:.1} s", task.state),
    }
}

/// A state on the wire.
pub fn state(state: State) -> pb::TaskState {
    match state {
        State::Queued => pb::TaskState::Queued,
        State::Running => pb::TaskState::Running,
        State::Succeeded => pb::TaskState::Succeeded,
        State::Failed => pb::TaskState::Failed,
        State::Cancelled => pb::TaskState::Cancelled,
        State::Expired => pb::TaskState::Expired,
        State::DeadLettered => pb::TaskState::DeadLettered,
    }
}

/// States of a filter.
pub fn states(field: &str, values: &[i32]) -> Result<Vec<State>> {
    values
        .iter()
        .map(|value| match pb::TaskState::try_from(*value) {
            Ok(pb::TaskState::Queued) => Ok(State::Queued),
            Ok(pb::TaskState::Running) => Ok(State::Running),
            Ok(pb::TaskState::Succeeded) => Ok(State::Succeeded),
            Ok(pb::TaskState::Failed) => Ok(State::Failed),
            Ok(pb::TaskState::Cancelled) => Ok(State::Cancelled),
            Ok(pb::TaskState::Expired) => Ok(State::Expired),
            Ok(pb::TaskState::DeadLettered) => Ok(State::DeadLettered),
            Ok(pb::TaskState::Unspecified) | Err(_) => {
                Err(Error::invalid(field, format!("{value} is no task state")))
            }
        })
        .collect()
}

/// An error on the wire.
pub fn failure(failure: &Failure) -> pb::TaskError {
    pb::TaskError {
        reason: failure.reason.clone(),
        message: failure.message.clone(),
        retryable: failure.retryable,
        metadata: failure.metadata.clone().into_iter().collect(),
    }
}

/// Usage on the wire.
pub fn usage(usage: &Usage) -> pb::Usage {
    pb::Usage {
        tokens_in: usage.tokens_in,
        tokens_out: usage.tokens_out,
        execution_time: Some(duration(usage.execution)),
        time_to_first_token: usage.first_token.map(duration),
    }
}

/// A duration on the wire.
pub fn duration(duration: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: duration.as_secs() as i64,
        nanos: duration.subsec_nanos() as i32,
    }
}

/// What a view of a task leaves out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum View {
    /// Nothing.
    Full,
    /// The result, as in lists.
    Basic,
}

/// A task on the wire.
pub fn task(task: &Task, view: View, artifacts: Vec<pb::ArtifactEvent>) -> pb::Task {
    let result = match view {
        View::Full => task.result.as_deref().and_then(json::struct_from_text),
        View::Basic => None,
    };
    pb::Task {
        task_id: task.id.to_string(),
        spec: Some(spec(task)),
        state: state(task.state).into(),
        attempt: task.attempt,
        failed_attempts: task.failed,
        lost_attempts: task.lost,
        handed_back_attempts: task.handed_back,
        create_time: Some(timestamp(task.create_time)),
        start_time: task.start_time.map(timestamp),
        end_time: task.end_time.map(timestamp),
        not_before: task.not_before.map(timestamp),
        runner_id: task.runner.as_ref().map(ToString::to_string).unwrap_or_default(),
        result,
        error: task.error.as_ref().map(failure),
        usage: task.usage.as_ref().filter(|_| task.state.is_terminal()).map(usage),
        last_sequence: task.last_sequence,
        request_id: task.request_id.clone().unwrap_or_default(),
        retry_of: task.retry_of.map(|id| id.to_string()).unwrap_or_default(),
        artifacts,
        retried_by: task.retried_by.map(|id| id.to_string()).unwrap_or_default(),
    }
}

fn spec(task: &Task) -> pb::TaskSpec {
    let spec = &task.spec;
    pb::TaskSpec {
        model: match &spec.version {
            Some(version) => format!("{}@{version}", spec.model),
            None => spec.model.clone(),
        },
        input: json::struct_from_text(&spec.input),
        params: (spec.params != "{}").then(|| json::struct_from_text(&spec.params)).flatten(),
        priority: spec.priority,
        labels: spec.labels.clone(),
        required_labels: spec.required_labels.clone(),
        deadline: spec.deadline.map(timestamp),
        start_timeout: spec.start_timeout.map(duration),
        execution_timeout: Some(duration(spec.execution_timeout)),
        retry: Some(pb::RetryPolicy {
            max_attempts: spec.retry.max_attempts,
            initial_backoff: Some(duration(spec.retry.initial_backoff)),
            max_backoff: Some(duration(spec.retry.max_backoff)),
            multiplier: spec.retry.multiplier,
            jitter: Some(spec.retry.jitter),
            retry_on: spec.retry.retry_on.clone(),
        }),
        not_before: None,
        delay: None,
        seed: Some(spec.seed),
        session_id: spec.session.clone().unwrap_or_default(),
        require_on_time: false,
    }
}
