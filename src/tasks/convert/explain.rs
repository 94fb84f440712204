//! Why a task is where it is.

use crate::{
    clock::Micros,
    error::{Error, Kind, Reason},
    pb::{self, task_explanation::Reason as Why},
    queue::{WaitReason, Waiting},
    tasks::model::{State, Task},
};

/// The one dominant reason; `waiting` is the queue's, for a task that waits.
pub fn explain(task: &Task, waiting: Option<Waiting>) -> pb::TaskExplanation {
    let mut explanation = pb::TaskExplanation {
        task_id: task.id.to_string(),
        state: super::state(task.state).into(),
        ..Default::default()
    };
    match (task.state, waiting) {
        (State::Queued, Some(waiting)) => {
            explanation.set_reason(reason(waiting.reason));
            explanation.summary = waiting.summary;
            explanation.next_step = waiting.next_step;
            explanation.evidence = waiting.evidence.into_iter().collect();
        }
        // It left the queue a moment ago, or a sweep will put it there.
        (State::Queued, None) => {
            explanation.set_reason(Why::Starting);
            "it is about to be handed to a runner".clone_into(&mut explanation.summary);
        }
        (State::Running, _) => {
            explanation.set_reason(Why::Running);
            let runner = task.runner.as_ref().map(ToString::to_string).unwrap_or_default();
            explanation.summary = format!("attempt {} runs on `{runner}`", task.attempt);
            explanation.evidence.insert("runner_id".to_owned(), runner);
        }
        _ => ended(task, &mut explanation),
    }
    let facts = [
        ("attempt", task.attempt),
        ("failed_attempts", task.failed),
        ("lost_attempts", task.lost),
        ("handed_back_attempts", task.handed_back),
    ];
    for (name, value) in facts.into_iter().filter(|(_, value)| *value > 0) {
        explanation.evidence.insert(name.to_owned(), value.to_string());
    }
    explanation
}

fn ended(task: &Task, explanation: &mut pb::TaskExplanation) {
    explanation.set_reason(Why::Ended);
    let end = task.end_time.unwrap_or(task.create_time);
    let seconds = |from: Micros| end.since(from).as_secs_f64();
    let (whole, last) = (seconds(task.create_time), seconds(task.start_time.unwrap_or(end)));
    explanation.summary = task.error.as_ref().map_or_else(
        || format!("done {whole:.3} s after its submit; its attempt took {last:.3} s"),
        |error| error.message.clone(),
    );
    if let Some(error) = &task.error {
        explanation.evidence.insert("reason".to_owned(), error.reason.clone());
        explanation.evidence.extend(error.metadata.clone());
    }
    match (task.state, task.retried_by) {
        (_, Some(by)) => {
            explanation.evidence.insert("retried_by".to_owned(), by.to_string());
        }
        (State::Succeeded, None) => {}
        (_, None) => {
            explanation.next_step =
                format!("look at its timeline, then: baton task retry {}", task.id);
        }
    }
}

fn reason(reason: WaitReason) -> Why {
    match reason {
        WaitReason::QueuePaused => Why::QueuePaused,
        WaitReason::NotBefore => Why::NotBefore,
        WaitReason::Backoff => Why::Backoff,
        WaitReason::NoRunnerForModel => Why::NoRunnerForModel,
        WaitReason::NoRunnerWithLabels => Why::NoRunnerWithLabels,
        WaitReason::RunnersDraining => Why::RunnersDraining,
        WaitReason::BehindOthers => Why::BehindOthers,
        WaitReason::NoFreeSlot => Why::NoFreeSlot,
        WaitReason::Starting => Why::Starting,
    }
}

/// The error of asking for a result that there is not.
pub fn no_result(task: &Task) -> Error {
    let message = match &task.error {
        Some(error) => format!("task `{}` is {}: {}", task.id, task.state, error.message),
        None => format!("task `{}` is {}; it has no result yet", task.id, task.state),
    };
    let error = Error::new(Kind::FailedPrecondition, Reason::StateConflict, message)
        .with("resource", "task")
        .with("id", task.id)
        .with("state", task.state);
    match &task.error {
        Some(failure) => error.with("task_error_reason", &failure.reason),
        None => error,
    }
}
