//! SQL of the `tasks` and `request_ids` tables: rows in, rows out, many at a time.

pub mod reads;
pub mod transcripts;

use std::time::Duration;

use sqlx::{FromRow, Row, sqlite::SqliteRow};

use crate::{
    clock::Micros,
    db::{Bulk, Script, Tx, Values},
    error::{Error, Result},
    faults::{self, Fault},
    id::{Namespace, TaskId},
    tasks::model::{Spec, Task},
};

/// How long a `request_id` is remembered.
pub const REQUEST_ID_TTL: Duration = Duration::from_hours(24);

macro_rules! columns {
    () => {
        "id, namespace, model, version, input, params, priority, labels, required_labels, \
         deadline, start_timeout, execution_timeout, retry, seed, session_id, request_id, \
         retry_of, retried_by, traceparent, create_time, state, revision, attempt, failed, lost, \
         handed_back, start_time, end_time, not_before, runner_id, base_sequence, last_sequence, \
         reserved_sequence, result, error, usage"
    };
}
pub(super) use columns;

/// A row of the table, in the order of `columns!`.
pub(super) struct TaskRow(pub Task);

impl FromRow<'_, SqliteRow> for TaskRow {
    fn from_row(row: &SqliteRow) -> Result<Self, sqlx::Error> {
        let micros = |duration: i64| Duration::from_micros(duration.unsigned_abs());
        let spec = Spec {
            model: row.try_get(2)?,
            version: row.try_get(3)?,
            input: row.try_get(4)?,
            params: row.try_get(5)?,
            priority: row.try_get(6)?,
            labels: json(row, 7)?,
            required_labels: json(row, 8)?,
            deadline: row.try_get(9)?,
            start_timeout: row.try_get::<Option<i64>, _>(10)?.map(micros),
            execution_timeout: micros(row.try_get(11)?),
            retry: json(row, 12)?,
            seed: row.try_get::<i64, _>(13)? as u64,
            session: row.try_get(14)?,
        };
        Ok(Self(Task {
            id: parsed(row, 0)?,
            namespace: row.try_get::<String, _>(1)?.into(),
            spec,
            request_id: row.try_get(15)?,
            retry_of: optional_id(row, 16)?,
            retried_by: optional_id(row, 17)?,
            traceparent: row.try_get(18)?,
            create_time: row.try_get(19)?,
            state: parsed(row, 20)?,
            revision: row.try_get::<i64, _>(21)? as u64,
            attempt: row.try_get(22)?,
            failed: row.try_get(23)?,
            lost: row.try_get(24)?,
            handed_back: row.try_get(25)?,
            start_time: row.try_get(26)?,
            end_time: row.try_get(27)?,
            not_before: row.try_get(28)?,
            runner: row.try_get::<Option<String>, _>(29)?.map(Into::into),
            base_sequence: row.try_get::<i64, _>(30)? as u64,
            last_sequence: row.try_get::<i64, _>(31)? as u64,
            reserved_sequence: row.try_get::<i64, _>(32)? as u64,
            result: row.try_get(33)?,
            error: optional_json(row, 34)?,
            usage: optional_json(row, 35)?,
        }))
    }
}

fn decode_error(
    index: usize,
    source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> sqlx::Error {
    sqlx::Error::ColumnDecode { index: index.to_string(), source: source.into() }
}

fn parsed<T>(row: &SqliteRow, index: usize) -> Result<T, sqlx::Error>
where
    T: std::str::FromStr,
    T::Err: std::error::Error + Send + Sync + 'static,
{
    row.try_get::<&str, _>(index)?.parse().map_err(|error: T::Err| decode_error(index, error))
}

fn optional_id(row: &SqliteRow, index: usize) -> Result<Option<TaskId>, sqlx::Error> {
    let text: Option<&str> = row.try_get(index)?;
    text.map(|text| text.parse().map_err(|error: uuid::Error| decode_error(index, error)))
        .transpose()
}

fn json<T: serde::de::DeserializeOwned>(row: &SqliteRow, index: usize) -> Result<T, sqlx::Error> {
    serde_json::from_str(row.try_get(index)?).map_err(|error| decode_error(index, error))
}

fn optional_json<T: serde::de::DeserializeOwned>(
    row: &SqliteRow,
    index: usize,
) -> Result<Option<T>, sqlx::Error> {
    let text: Option<&str> = row.try_get(index)?;
    text.map(|text| serde_json::from_str(text).map_err(|error| decode_error(index, error)))
        .transpose()
}

fn to_json<T: serde::Serialize>(value: &T) -> Result<String> {
    serde_json::to_string(value).map_err(Error::internal)
}

/// JSON list of ids, for `IN (SELECT value FROM json_each(..))`.
fn id_list(ids: &[TaskId]) -> Result<String> {
    to_json(&ids)
}

/// The tasks with these ids, in no order; unknown ids are absent.
pub async fn load(tx: &mut Tx, ids: &[TaskId]) -> Result<Vec<Task>> {
    if ids.is_empty() {
        return Ok(Vec::new());
    }
    let rows: Vec<TaskRow> = sqlx::query_as(concat!(
        "SELECT ",
        columns!(),
        " FROM tasks WHERE id IN (SELECT value FROM json_each($1))"
    ))
    .bind(id_list(ids)?)
    .fetch_all(tx.conn())
    .await?;
    Ok(rows.into_iter().map(|row| row.0).collect())
}

/// Adds new tasks.
pub fn insert(script: &mut Script, tasks: &[&Task]) -> Result<()> {
    static INSERT: Bulk = Bulk::new(
        concat!("INSERT INTO tasks (", columns!(), ") SELECT * FROM (VALUES "),
        36,
        ") WHERE column1 IS NOT NULL",
    );
    script.add_rows(&INSERT, tasks, |row, task| {
        let spec = &task.spec;
        row.bind(task.id.to_string())
            .bind(task.namespace.as_str().to_owned())
            .bind(spec.model.clone())
            .bind(spec.version.clone())
            .bind(spec.input.clone())
            .bind(spec.params.clone())
            .bind(spec.priority)
            .bind(to_json(&spec.labels)?)
            .bind(to_json(&spec.required_labels)?)
            .bind(spec.deadline)
            .bind(spec.start_timeout.map(|timeout| timeout.as_micros() as i64))
            .bind(spec.execution_timeout.as_micros() as i64)
            .bind(to_json(&spec.retry)?)
            .bind(spec.seed as i64)
            .bind(spec.session.clone())
            .bind(task.request_id.clone())
            .bind(task.retry_of.map(|id| id.to_string()))
            .bind(task.retried_by.map(|id| id.to_string()))
            .bind(task.traceparent.clone())
            .bind(task.create_time);
        bind_moving(row, task)
    })
}

/// Writes what moved. Each row must still be at the revision that the move was made from.
pub fn update(script: &mut Script, tasks: &[(u64, &Task)]) -> Result<()> {
    static UPDATE: Bulk = Bulk::new(
        "WITH moved (id, was, state, revision, attempt, failed, lost, handed_back, start_time,
                     end_time, not_before, runner_id, base_sequence, last_sequence,
                     reserved_sequence, result, error, usage) AS (VALUES ",
        18,
        ")
         UPDATE tasks SET
             state = m.state, revision = m.revision, attempt = m.attempt, failed = m.failed,
             lost = m.lost, handed_back = m.handed_back, start_time = m.start_time,
             end_time = m.end_time, not_before = m.not_before, runner_id = m.runner_id,
             base_sequence = m.base_sequence, last_sequence = m.last_sequence,
             reserved_sequence = max(tasks.reserved_sequence, m.reserved_sequence),
             result = m.result, error = m.error, usage = m.usage
         FROM moved m WHERE tasks.id = m.id AND tasks.revision = m.was",
    );
    script.add_rows_exactly(&UPDATE, tasks, |row, (was, task)| {
        row.bind(task.id.to_string()).bind(*was as i64);
        bind_moving(row, task)
    })
}

/// The columns that move, in the order of `columns!`.
fn bind_moving(row: &mut Values, task: &Task) -> Result<()> {
    row.bind(task.state.as_str())
        .bind(task.revision as i64)
        .bind(task.attempt)
        .bind(task.failed)
        .bind(task.lost)
        .bind(task.handed_back)
        .bind(task.start_time)
        .bind(task.end_time)
        .bind(task.not_before)
        .bind(task.runner.as_ref().map(|runner| runner.as_str().to_owned()))
        .bind(task.base_sequence as i64)
        .bind(task.last_sequence as i64)
        .bind(task.reserved_sequence as i64)
        .bind(task.result.clone())
        .bind(task.error.as_ref().map(to_json).transpose()?)
        .bind(task.usage.as_ref().map(to_json).transpose()?);
    Ok(())
}

/// Raises the reservations of running attempts, as (task, attempt, highest sequence).
pub fn reserve(script: &mut Script, reservations: &[(TaskId, u32, u64)]) -> Result<()> {
    static RESERVE: Bulk = Bulk::new(
        "WITH wanted (id, attempt, reserved) AS (VALUES ",
        3,
        ")
         UPDATE tasks SET reserved_sequence = max(tasks.reserved_sequence, w.reserved)
         FROM wanted w WHERE tasks.id = w.id AND tasks.attempt = w.attempt",
    );
    script.add_rows(&RESERVE, reservations, |row, (task, attempt, reserved)| {
        row.bind(task.to_string()).bind(*attempt).bind(*reserved as i64);
        Ok(())
    })
}

/// Links ended tasks to the tasks that retry them, as (ended, new).
pub fn link_retries(script: &mut Script, links: &[(TaskId, TaskId)]) {
    for (ended, new) in links {
        script
            .add("UPDATE tasks SET retried_by = ?, revision = revision + 1 WHERE id = ?")
            .bind(new.to_string())
            .bind(ended.to_string());
    }
}

/// A remembered submit.
#[derive(Clone, Debug)]
pub struct Request {
    /// Namespace.
    pub namespace: Namespace,
    /// Idempotency key.
    pub request_id: String,
    /// Task that it made.
    pub task: TaskId,
    /// SHA-256 of the request.
    pub digest: [u8; 32],
    /// When.
    pub create_time: Micros,
}

/// The remembered submits among these, as (namespace, `request_id`), not older than `since`.
pub async fn find_requests(
    tx: &mut Tx,
    keys: &[(&str, &str)],
    since: Micros,
) -> Result<Vec<Request>> {
    if keys.is_empty() {
        return Ok(Vec::new());
    }
    let rows: Vec<(String, String, String, Vec<u8>, Micros)> = sqlx::query_as(
        "SELECT r.namespace, r.request_id, r.task_id, r.digest, r.create_time
         FROM json_each($1) k JOIN request_ids r
           ON r.namespace = k.value ->> 0 AND r.request_id = k.value ->> 1
         WHERE r.create_time >= $2",
    )
    .bind(to_json(&keys)?)
    .bind(since)
    .fetch_all(tx.conn())
    .await?;
    rows.into_iter()
        .map(|(namespace, request_id, task, digest, create_time)| {
            Ok(Request {
                namespace: namespace.into(),
                request_id,
                task: task.parse().map_err(Error::internal)?,
                digest: digest.try_into().map_err(|_| Error::internal("a digest of 32 bytes"))?,
                create_time,
            })
        })
        .collect()
}

/// Remembers submits; one that is too old to count is replaced.
pub fn insert_requests(script: &mut Script, requests: &[Request]) -> Result<()> {
    static INSERT: Bulk = Bulk::new(
        "INSERT INTO request_ids (namespace, request_id, task_id, digest, create_time)
         SELECT * FROM (VALUES ",
        5,
        ") WHERE column1 IS NOT NULL
         ON CONFLICT (namespace, request_id) DO UPDATE SET
            task_id = excluded.task_id, digest = excluded.digest,
            create_time = excluded.create_time",
    );
    if faults::planted(Fault::ForgetRequestIds) {
        return Ok(());
    }
    script.add_rows(&INSERT, requests, |row, request| {
        row.bind(request.namespace.as_str().to_owned())
            .bind(request.request_id.clone())
            .bind(request.task.to_string())
            .bind(request.digest.to_vec())
            .bind(request.create_time);
        Ok(())
    })
}

/// Forgets submits older than `before`, at most `limit`; returns how many.
pub async fn forget_requests(tx: &mut Tx, before: Micros, limit: u32) -> Result<u64> {
    let done = sqlx::query(
        "DELETE FROM request_ids WHERE (namespace, request_id) IN (
             SELECT namespace, request_id FROM request_ids WHERE create_time < $1 LIMIT $2)",
    )
    .bind(before)
    .bind(limit)
    .execute(tx.conn())
    .await?;
    Ok(done.rows_affected())
}

/// Runner-made entries with contiguous sequences.
#[derive(Clone, Debug)]
pub struct SegmentRow {
    /// Task.
    pub task: TaskId,
    /// Attempt.
    pub attempt: u32,
    /// First sequence.
    pub first: u64,
    /// Last sequence.
    pub last: u64,
    /// Length-delimited frames.
    pub frames: bytes::Bytes,
}

/// Adds segments; one that is there already is left as it is.
pub fn insert_segments(script: &mut Script, segments: &[SegmentRow]) -> Result<()> {
    static INSERT: Bulk = Bulk::new(
        "INSERT INTO segments (task_id, attempt, first_sequence, last_sequence, frames)
         SELECT * FROM (VALUES ",
        5,
        ") WHERE column1 IS NOT NULL
         ON CONFLICT (task_id, first_sequence) DO UPDATE SET
            last_sequence = excluded.last_sequence, frames = excluded.frames
            WHERE excluded.last_sequence > segments.last_sequence",
    );
    script.add_rows(&INSERT, segments, |row, segment| {
        row.bind(segment.task.to_string())
            .bind(segment.attempt)
            .bind(segment.first as i64)
            .bind(segment.last as i64)
            .bind(segment.frames.to_vec());
        Ok(())
    })
}

/// Deletes an ended task and what hangs on it.
pub fn delete(script: &mut Script, id: TaskId) {
    for sql in [
        "DELETE FROM tasks WHERE id = ?",
        "DELETE FROM task_events WHERE task_id = ?",
        "DELETE FROM segments WHERE task_id = ?",
        "DELETE FROM transcripts WHERE task_id = ?",
    ] {
        script.add(sql).bind(id.to_string());
    }
}
