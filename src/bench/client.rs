//! Calls of `TaskService` that the load generators make.

use bytes::Bytes;
use prost_types::{Struct, Value, value::Kind};

use super::wire::{self, Connection, Receiver};
use crate::pb::{
    BatchSubmitTasksRequest, BatchSubmitTasksResponse, StreamTaskRequest, SubmitTaskRequest,
    SubmitTaskResponse, TaskSpec, batch_submit_tasks_response::outcome,
};

/// Path of `SubmitTask`.
pub const SUBMIT: &str = "/baton.v1.TaskService/SubmitTask";
/// Path of `GetTask`.
pub const GET: &str = "/baton.v1.TaskService/GetTask";
/// Path of `CancelTask`.
pub const CANCEL: &str = "/baton.v1.TaskService/CancelTask";
const BATCH: &str = "/baton.v1.TaskService/BatchSubmitTasks";
const STREAM: &str = "/baton.v1.TaskService/StreamTask";

/// A request for a task whose input is one text of `bytes` bytes behind `mark`.
pub fn submission(model: &str, mark: &str, bytes: usize) -> SubmitTaskRequest {
    let text = format!("{mark}{}", "x".repeat(bytes.saturating_sub(mark.len())));
    let value = Value { kind: Some(Kind::StringValue(text)) };
    let input = Struct { fields: [("p".to_owned(), value)].into() };
    let spec = TaskSpec { model: model.to_owned(), input: Some(input), ..TaskSpec::default() };
    SubmitTaskRequest { spec: Some(spec), request_id: String::new() }
}

/// Submits a task and returns its id.
pub async fn submit(connection: &Connection, framed: Bytes) -> anyhow::Result<String> {
    let answer = connection.unary_framed(SUBMIT, framed).await?;
    let mut id = String::new();
    wire::fields(&answer, |number, task, _| {
        if number == 1 {
            wire::fields(task, |number, value, _| {
                if number == 1 {
                    id = String::from_utf8_lossy(value).into_owned();
                }
            });
        }
    });
    anyhow::ensure!(!id.is_empty(), "the answer names no task");
    Ok(id)
}

/// Submits tasks of a model in batches and returns their ids.
pub async fn submit_many(
    connection: &Connection,
    model: &str,
    count: usize,
) -> anyhow::Result<Vec<String>> {
    let mut ids = Vec::with_capacity(count);
    while ids.len() < count {
        let batch = (count - ids.len()).min(500);
        let requests = (0..batch).map(|_| submission(model, "", 32)).collect();
        let batch = BatchSubmitTasksRequest { requests };
        let answer: BatchSubmitTasksResponse = connection.unary(BATCH, &batch).await?;
        for outcome in answer.outcomes {
            match outcome.outcome {
                Some(outcome::Outcome::Accepted(SubmitTaskResponse {
                    task: Some(task), ..
                })) => {
                    ids.push(task.task_id);
                }
                other => anyhow::bail!("a task was refused: {other:?}"),
            }
        }
    }
    Ok(ids)
}

/// Opens a task's stream.
pub async fn stream_task(
    connection: &Connection,
    task_id: &str,
    from_sequence: u64,
) -> anyhow::Result<Receiver> {
    let (mut sender, mut receiver) = connection.call(STREAM).await?;
    let request =
        StreamTaskRequest { task_id: task_id.to_owned(), from_sequence, ..Default::default() };
    sender.send(wire::framed(&request))?;
    sender.finish()?;
    receiver.accepted().await?;
    Ok(receiver)
}
