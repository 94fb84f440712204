//! A task in the words of the job routes.

use serde_json::{Value, json};

use crate::{
    json,
    pb::{self, TaskState, task_event::Body},
};

/// Word for a state.
pub fn status(state: TaskState) -> &'static str {
    match state {
        TaskState::Unspecified | TaskState::Queued => "PENDING",
        TaskState::Running => "RUNNING",
        TaskState::Succeeded => "COMPLETE",
        TaskState::Cancelled => "CANCELLED",
        TaskState::Failed | TaskState::Expired | TaskState::DeadLettered => "ERROR",
    }
}

/// States that a word stands for.
pub fn states(word: &str) -> Option<&'static [TaskState]> {
    Some(match word {
        "PENDING" => &[TaskState::Queued],
        "RUNNING" => &[TaskState::Running],
        "COMPLETE" => &[TaskState::Succeeded],
        "CANCELLED" => &[TaskState::Cancelled],
        "ERROR" => &[TaskState::Failed, TaskState::Expired, TaskState::DeadLettered],
        _ => return None,
    })
}

/// A job.
pub struct Job<'t> {
    /// Its task.
    pub task: &'t pb::Task,
    /// Place in the queue from 1; 0 when it is not there.
    pub position: u64,
    /// The stage that its latest attempt is in.
    pub stage: Option<&'t pb::StageEvent>,
}

impl Job<'_> {
    /// The job as JSON.
    pub fn json(&self) -> Value {
        let task = self.task;
        let spec = task.spec.clone().unwrap_or_default();
        let (model, version) = match spec.model.split_once('@') {
            Some((model, version)) => (model, Some(version)),
            None => (spec.model.as_str(), None),
        };
        let object = |value: Option<&prost_types::Struct>| {
            Value::Object(value.map(json::map_from_struct).unwrap_or_default())
        };
        let updated = [task.create_time, task.start_time, task.end_time].into_iter().flatten();
        let updated = updated.max_by_key(|time| (time.seconds, time.nanos));
        json!({
            "id": task.task_id,
            "job_id": task.task_id,
            "model_id": model,
            "version_id": version,
            "runner_id": Some(&task.runner_id).filter(|id| !id.is_empty()),
            "status": status(task.state()),
            "stage": self.stage.map(|stage| &stage.name),
            "queue_position": self.position,
            "attempt": task.attempt,
            "payload": object(spec.input.as_ref()),
            "options": object(spec.params.as_ref()),
            "labels": spec.labels,
            "artifacts": artifacts(&task.artifacts),
            "error": error(task.error.as_ref()),
            "created_at": time(task.create_time),
            "started_at": time(task.start_time),
            "finished_at": time(task.end_time),
            "updated_at": time(updated),
        })
    }

    /// How it stands, in short.
    pub fn status_json(&self) -> Value {
        json!({
            "task_id": self.task.task_id,
            "status": status(self.task.state()),
            "stage": self.stage.map(|stage| &stage.name),
            "progress": self.stage.and_then(|stage| stage.progress),
            "detail": self.stage.map(|stage| &stage.detail),
            "queue_position": self.position,
            "error": error(self.task.error.as_ref()),
        })
    }
}

/// The stage of the latest attempt, while it runs.
pub fn stage(events: &[pb::TaskEvent]) -> Option<&pb::StageEvent> {
    events.iter().rev().find_map(|event| match &event.body {
        Some(Body::Stage(stage)) => Some(Some(stage)),
        Some(Body::AttemptStarted(_) | Body::Queued(_) | Body::Ended(_)) => Some(None),
        _ => None,
    })?
}

/// An entry of the timeline.
pub fn entry(event: &pb::TaskEvent) -> Value {
    let (status, message, detail) = match &event.body {
        Some(Body::Queued(queued)) => {
            let before = error(queued.previous_error.as_ref());
            ("PENDING", queued.summary.clone(), json!({"previous_error": before}))
        }
        Some(Body::AttemptStarted(started)) => {
            let message = format!("attempt {} runs on `{}`", event.attempt, started.runner_id);
            let detail = json!({"runner_id": started.runner_id, "node_id": started.node_id});
            ("RUNNING", message, detail)
        }
        Some(Body::Stage(stage)) => {
            let detail = json!({"progress": stage.progress});
            (stage.name.as_str(), stage.detail.clone(), detail)
        }
        Some(Body::Artifact(file)) => ("ARTEFACT", file.name.clone(), artifact(file)),
        Some(Body::Gap(gap)) => ("GAP", gap.reason.clone(), json!({})),
        Some(Body::Ended(ended)) => {
            let detail = json!({"error": error(ended.error.as_ref())});
            (status(ended.state()), ended.summary.clone(), detail)
        }
        // The timeline has no others.
        Some(Body::Token(_) | Body::Log(_) | Body::Metrics(_)) | None => {
            ("", String::new(), json!({}))
        }
    };
    json!({
        "id": event.sequence,
        "attempt": event.attempt,
        "status": status,
        "message": message,
        "detail": detail,
        "created_at": time(event.time),
    })
}

/// The result of a complete job.
pub fn result(task: &pb::Task, result: pb::TaskResult) -> Value {
    let pb::TaskResult { task_id, result, text, text_truncated, usage, artifacts: files } = result;
    let usage = usage.unwrap_or_default();
    json!({
        "job_id": task_id,
        "status": status(task.state()),
        "result": Value::Object(result.as_ref().map(json::map_from_struct).unwrap_or_default()),
        "text": text,
        "text_truncated": text_truncated,
        "artifacts": artifacts(&files),
        "usage": {"tokens_in": usage.tokens_in, "tokens_out": usage.tokens_out},
    })
}

/// The text of a complete job: its tokens, or else the text of its result.
pub fn text(result: pb::TaskResult) -> String {
    if !result.text.is_empty() {
        return result.text;
    }
    let mut map = result.result.as_ref().map(json::map_from_struct).unwrap_or_default();
    match map.remove("text") {
        Some(Value::String(text)) => text,
        _ => String::new(),
    }
}

/// A job in the words of a queue.
pub fn request(task: &pb::Task, position: u64) -> Value {
    let status = match task.state() {
        TaskState::Unspecified | TaskState::Queued => "IN_QUEUE",
        TaskState::Running => "IN_PROGRESS",
        _ => "COMPLETED",
    };
    let mut request = json!({"request_id": task.task_id, "status": status});
    match status {
        "IN_QUEUE" => request["queue_position"] = position.into(),
        "COMPLETED" => {
            request["artifacts"] = artifacts(&task.artifacts);
            let result = task.result.as_ref().map(json::map_from_struct);
            request["result"] = result.map_or(Value::Null, Value::Object);
            request["error"] = error(task.error.as_ref());
        }
        _ => {}
    }
    request
}

fn artifacts(artifacts: &[pb::ArtifactEvent]) -> Value {
    artifacts.iter().map(artifact).collect()
}

fn artifact(artifact: &pb::ArtifactEvent) -> Value {
    json!({
        "name": artifact.name,
        "type": artifact.r#type,
        "url": artifact.url,
        "size_bytes": artifact.size_bytes,
        "mime_type": artifact.mime_type,
        "sha256": artifact.sha256,
        "expires_at": time(artifact.expires_at),
    })
}

fn error(error: Option<&pb::TaskError>) -> Value {
    error.map_or(Value::Null, |error| json!({"reason": error.reason, "message": error.message}))
}

fn time(time: Option<prost_types::Timestamp>) -> Option<String> {
    time.map(|time| time.to_string())
}
