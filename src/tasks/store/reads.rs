//! Reads of tasks, each within a namespace but those of the server itself.

use std::{collections::BTreeMap, sync::Arc};

use sqlx::FromRow;

use super::{TaskRow, columns};
use crate::{
    clock::Micros,
    db::Tx,
    error::{Error, Result},
    id::{Namespace, TaskId},
    queue,
    tasks::{
        model::{State, Task},
        state::Limit,
    },
};

/// The task, if it is in the namespace.
pub async fn find(tx: &mut Tx, namespace: &Namespace, id: TaskId) -> Result<Option<Task>> {
    let row: Option<TaskRow> = sqlx::query_as(concat!(
        "SELECT ",
        columns!(),
        " FROM tasks WHERE id = $1 AND namespace = $2"
    ))
    .bind(id.to_string())
    .bind(namespace.as_str().to_owned())
    .fetch_optional(tx.conn())
    .await?;
    Ok(row.map(|row| row.0))
}

/// The task, which must be in the namespace.
pub async fn get(tx: &mut Tx, namespace: &Namespace, id: TaskId) -> Result<Task> {
    find(tx, namespace, id).await?.ok_or_else(|| Error::not_found("task", id))
}

/// Which tasks a list has.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Any of these states; empty means all.
    pub states: Vec<State>,
    /// `owner/name`.
    pub model: Option<String>,
    /// Version that the task asked for.
    pub version: Option<String>,
    /// All of these labels.
    pub labels: BTreeMap<String, String>,
    /// Created at or after.
    pub after: Option<Micros>,
    /// Created before.
    pub before: Option<Micros>,
    /// Session.
    pub session: Option<String>,
    /// Without tasks that were retried.
    pub exclude_retried: bool,
}

/// Tasks of a namespace, newest first, older than `cursor`.
pub async fn list(
    tx: &mut Tx,
    namespace: &Namespace,
    filter: &Filter,
    cursor: Option<&str>,
    limit: u32,
) -> Result<Vec<Task>> {
    let states: Option<Vec<&str>> =
        Some(filter.states.iter().map(|state| state.as_str()).collect::<Vec<_>>())
            .filter(|states| !states.is_empty());
    let states = states.map(|states| serde_json::json!(states).to_string());
    // Ids are made of the creation time, so the page is a range of the index.
    let rows: Vec<TaskRow> = sqlx::query_as(concat!(
        "SELECT ",
        columns!(),
        " FROM tasks t WHERE namespace = $1 AND id < $2
            AND ($3 IS NULL OR state IN (SELECT value FROM json_each($3)))
            AND ($4 IS NULL OR model = $4) AND ($5 IS NULL OR version = $5)
            AND ($6 IS NULL OR create_time >= $6) AND ($7 IS NULL OR create_time < $7)
            AND ($8 IS NULL OR session_id = $8)
            AND (NOT $9 OR retried_by IS NULL)
            AND NOT EXISTS (
              SELECT 1 FROM json_each($10) wanted
              WHERE NOT EXISTS (SELECT 1 FROM json_each(t.labels) have
                                WHERE have.key = wanted.key AND have.value = wanted.value))
          ORDER BY id DESC LIMIT $11"
    ))
    .bind(namespace.as_str().to_owned())
    .bind(cursor.unwrap_or("~").to_owned())
    .bind(states)
    .bind(filter.model.clone())
    .bind(filter.version.clone())
    .bind(filter.after)
    .bind(filter.before)
    .bind(filter.session.clone())
    .bind(filter.exclude_retried)
    .bind(serde_json::json!(filter.labels).to_string())
    .bind(limit)
    .fetch_all(tx.conn())
    .await?;
    Ok(rows.into_iter().map(|row| row.0).collect())
}

/// A waiting task without its payload.
#[derive(Clone, Debug)]
pub struct Waiting {
    /// How the queue sees it.
    pub entry: queue::Entry,
    /// Must have started by then.
    pub start_by: Option<Micros>,
}

impl Waiting {
    /// Its time limits.
    pub fn limits(&self) -> impl Iterator<Item = (Micros, TaskId, Limit)> {
        let id = self.entry.id;
        let deadline = self.entry.deadline.map(|at| (at, id, Limit::Deadline));
        let start_by = self.start_by.map(|at| (at, id, Limit::StartTimeout));
        deadline.into_iter().chain(start_by)
    }
}

#[derive(FromRow)]
struct WaitingRow {
    id: String,
    namespace: String,
    model: String,
    version: Option<String>,
    required_labels: String,
    priority: i32,
    create_time: Micros,
    not_before: Option<Micros>,
    deadline: Option<Micros>,
    start_timeout: Option<i64>,
    session_id: Option<String>,
    attempt: u32,
}

/// QUEUED tasks of all namespaces in the order of their ids, after one.
pub async fn waiting_page(tx: &mut Tx, after: Option<TaskId>, limit: u32) -> Result<Vec<Waiting>> {
    let rows: Vec<WaitingRow> = sqlx::query_as(
        "SELECT id, namespace, model, version, required_labels, priority, create_time, not_before,
                deadline, start_timeout, session_id, attempt
         FROM tasks WHERE state = 'QUEUED' AND id > $1 ORDER BY id LIMIT $2",
    )
    .bind(after.map(|id| id.to_string()).unwrap_or_default())
    .bind(limit)
    .fetch_all(tx.conn())
    .await?;
    // Most tasks share their few label sets.
    let none = Arc::new(BTreeMap::new());
    rows.into_iter()
        .map(|row| {
            let required_labels = match row.required_labels.as_str() {
                "{}" => none.clone(),
                labels => Arc::new(serde_json::from_str(labels).map_err(Error::internal)?),
            };
            let start_by = row.start_timeout.filter(|_| row.attempt == 0);
            Ok(Waiting {
                start_by: start_by.map(|after| Micros(row.create_time.0.saturating_add(after))),
                entry: queue::Entry {
                    id: row.id.parse().map_err(Error::internal)?,
                    namespace: row.namespace.into(),
                    model: row.model,
                    version: row.version,
                    required_labels,
                    priority: row.priority,
                    create_time: row.create_time,
                    not_before: row.not_before,
                    deadline: row.deadline,
                    session: row.session_id,
                    attempt: row.attempt,
                },
            })
        })
        .collect()
}

/// QUEUED tasks of all namespaces in the order of their ids, after one: what the queue should
/// know.
pub async fn queued_page(
    tx: &mut Tx,
    after: Option<TaskId>,
    limit: u32,
) -> Result<Vec<queue::Entry>> {
    let page = waiting_page(tx, after, limit).await?;
    Ok(page.into_iter().map(|waiting| waiting.entry).collect())
}

/// How many tasks are QUEUED, in all namespaces.
pub async fn queued_count(tx: &mut Tx) -> Result<u64> {
    let count: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM tasks WHERE state = 'QUEUED'")
        .fetch_one(tx.conn())
        .await?;
    Ok(count.unsigned_abs())
}

/// RUNNING tasks of all namespaces in the order of their ids, after one.
pub async fn running_page(tx: &mut Tx, after: Option<TaskId>, limit: u32) -> Result<Vec<Task>> {
    let rows: Vec<TaskRow> = sqlx::query_as(concat!(
        "SELECT ",
        columns!(),
        " FROM tasks WHERE state = 'RUNNING' AND id > $1 ORDER BY id LIMIT $2"
    ))
    .bind(after.map(|id| id.to_string()).unwrap_or_default())
    .bind(limit)
    .fetch_all(tx.conn())
    .await?;
    Ok(rows.into_iter().map(|row| row.0).collect())
}

/// Segments of a running attempt, oldest first: their last sequence and frames.
pub async fn segments(tx: &mut Tx, task: TaskId, attempt: u32) -> Result<Vec<(u64, bytes::Bytes)>> {
    let rows: Vec<(i64, Vec<u8>)> = sqlx::query_as(
        "SELECT last_sequence, frames FROM segments WHERE task_id = $1 AND attempt = $2
         ORDER BY first_sequence",
    )
    .bind(task.to_string())
    .bind(attempt)
    .fetch_all(tx.conn())
    .await?;
    Ok(rows.into_iter().map(|(last, frames)| (last as u64, frames.into())).collect())
}

/// Frames of the artifacts that a task listed, oldest first.
pub async fn artifacts(tx: &mut Tx, task: TaskId) -> Result<Vec<bytes::Bytes>> {
    let rows: Vec<(Vec<u8>,)> = sqlx::query_as(
        "SELECT frame FROM task_events WHERE task_id = $1 AND kind = 'artifact'
         ORDER BY sequence LIMIT 1000",
    )
    .bind(task.to_string())
    .fetch_all(tx.conn())
    .await?;
    Ok(rows.into_iter().map(|(frame,)| frame.into()).collect())
}

/// Segments with entries after a sequence, oldest first: their first sequence and frames.
pub async fn segments_after(
    tx: &mut Tx,
    task: TaskId,
    after: u64,
    limit: u32,
) -> Result<Vec<(u64, bytes::Bytes)>> {
    let rows: Vec<(i64, Vec<u8>)> = sqlx::query_as(
        "SELECT first_sequence, frames FROM segments
         WHERE task_id = $1 AND last_sequence > $2 ORDER BY first_sequence LIMIT $3",
    )
    .bind(task.to_string())
    .bind(i64::try_from(after).unwrap_or(i64::MAX))
    .bind(limit)
    .fetch_all(tx.conn())
    .await?;
    Ok(rows.into_iter().map(|(first, frames)| (first as u64, frames.into())).collect())
}
