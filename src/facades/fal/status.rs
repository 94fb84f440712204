//! How a request stands, in the words of the queue API.

use std::time::Duration;

use serde_json::{Value, json};

use super::refusal::Refusal;
use crate::{
    facades::{
        standing::{self, Standing},
        wire::InProcess,
    },
    pb::{self, TaskState, task_event::Body},
};

/// Where a request is found.
#[derive(Clone, Debug)]
pub struct Place {
    /// Address of the request's result, below which the others are.
    pub url: String,
    /// The request.
    pub id: String,
}

impl Place {
    /// How it stands: `status` with what belongs to it.
    fn status(&self, status: &str) -> Value {
        let Self { url, id } = self;
        json!({
            "status": status,
            "request_id": id,
            "response_url": url,
            "status_url": format!("{url}/status"),
            "cancel_url": format!("{url}/cancel"),
        })
    }

    /// It waits; `ahead` others come before it.
    pub fn in_queue(&self, ahead: u64) -> Value {
        let mut status = self.status("IN_QUEUE");
        status["queue_position"] = ahead.into();
        status
    }

    /// It runs.
    pub fn in_progress(&self, logs: Value) -> Value {
        let mut status = self.status("IN_PROGRESS");
        status["logs"] = logs;
        status
    }

    /// It has ended, well or not.
    pub fn completed(&self, task: &pb::Task, logs: Value) -> Value {
        let mut status = self.status("COMPLETED");
        status["logs"] = logs;
        let time = task.usage.and_then(|usage| usage.execution_time);
        let time = time.and_then(|time| Duration::try_from(time).ok());
        status["metrics"] = match time {
            Some(time) => json!({"inference_time": time.as_secs_f64()}),
            None => json!({}),
        };
        if let Some(error) = &task.error {
            let refusal = Refusal::ended(task.state(), error);
            status["error"] = refusal.message().into();
            status["error_type"] = refusal.kind().into();
        }
        status
    }
}

/// How many requests come before the one at this position, which counts from 1.
pub fn ahead(position: u64) -> u64 {
    position.saturating_sub(1)
}

/// The task, if it is one of this app.
pub async fn find(client: &InProcess, app: &str, id: &str) -> Result<pb::Task, Refusal> {
    let request = pb::GetTaskRequest { task_id: id.to_owned() };
    let task = client.tasks().get_task(request).await?.into_inner();
    let base = |model: &str| model.split('@').next().unwrap_or_default().to_owned();
    let model = task.spec.as_ref().map(|spec| base(&spec.model)).unwrap_or_default();
    if model != base(app) {
        return Err(Refusal::not_found(format!("`{app}` has no request `{id}`")));
    }
    Ok(task)
}

/// How a request stands now, with its log lines where they are wanted, and whether it has ended.
pub async fn now(
    client: &InProcess,
    place: &Place,
    task: pb::Task,
    with_logs: bool,
) -> Result<(bool, Value), Refusal> {
    let Standing { task, position, lines } = standing::now(client, task, with_logs).await?;
    let logs = if with_logs { lines.iter().filter_map(line).collect() } else { Value::Null };
    Ok(match task.state() {
        TaskState::Queued => (false, place.in_queue(ahead(position))),
        TaskState::Running => (false, place.in_progress(logs)),
        _ => (true, place.completed(&task, logs)),
    })
}

/// The log line that an event is, if it is one. Stages are lines too: that is how these clients
/// show progress.
pub fn line(event: &pb::TaskEvent) -> Option<Value> {
    let (level, message) = match &event.body {
        Some(Body::Log(log)) => {
            let level = match log.level() {
                pb::log_event::Level::Debug => "DEBUG",
                pb::log_event::Level::Warn => "WARN",
                pb::log_event::Level::Error => "ERROR",
                _ => "INFO",
            };
            (level, log.message.clone())
        }
        Some(Body::Stage(stage)) => {
            let progress =
                stage.progress.map(|share| format!(" {:.0}%", share * 100.0)).unwrap_or_default();
            let detail = if stage.detail.is_empty() { "" } else { ": " };
            ("INFO", format!("{}{progress}{detail}{}", stage.name, stage.detail))
        }
        _ => return None,
    };
    let time = event.time.map(|time| time.to_string());
    Some(json!({"timestamp": time, "level": level, "source": "USER", "message": message}))
}
