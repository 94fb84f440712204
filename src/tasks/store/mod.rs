//! SQL of the `tasks` and `request_ids` tables: rows in, rows out, many at a time.

pub mod queued;
pub mod reads;
pub mod transcripts;

use std::time::Duration;

use crate::{
    clock::Micros,
    db::{Bulk, FromRow, Json, Row, Script, Sql, Statement, Tx, Type, Values},
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
         reserved_sequence, result, error, usage, instance_id"
    };
}
pub(super) use columns;

/// A row of the table, in the order of `columns!`.
pub(super) struct TaskRow(pub Task);

impl FromRow for TaskRow {
    fn from_row(row: &Row) -> Result<Self> {
        let micros = |duration: i64| Duration::from_micros(duration.unsigned_abs());
        let spec = Spec {
            model: row.get(2)?,
            version: row.get(3)?,
            input: row.get(4)?,
            params: row.get(5)?,
            priority: row.get(6)?,
            labels: row.json(7)?,
            required_labels: row.json(8)?,
            deadline: row.get(9)?,
            start_timeout: row.get::<Option<i64>>(10)?.map(micros),
            execution_timeout: micros(row.get(11)?),
            retry: row.json(12)?,
            seed: row.get::<i64>(13)? as u64,
            session: row.get(14)?,
        };
        Ok(Self(Task {
            id: row.get(0)?,
            namespace: row.get(1)?,
            spec,
            request_id: row.get(15)?,
            retry_of: row.get(16)?,
            retried_by: row.get(17)?,
            traceparent: row.get(18)?,
            create_time: row.get(19)?,
            state: row.parse(20)?,
            revision: row.get::<i64>(21)? as u64,
            attempt: row.get(22)?,
            failed: row.get(23)?,
            lost: row.get(24)?,
            handed_back: row.get(25)?,
            start_time: row.get(26)?,
            end_time: row.get(27)?,
            not_before: row.get(28)?,
            runner: row.get::<Option<String>>(29)?.map(Into::into),
            base_sequence: row.get::<i64>(30)? as u64,
            last_sequence: row.get::<i64>(31)? as u64,
            reserved_sequence: row.get::<i64>(32)? as u64,
            result: row.get(33)?,
            error: row.optional_json(34)?,
            usage: row.optional_json(35)?,
            instance: row.get(36)?,
        }))
    }
}

const LOAD: Sql = Sql::each(
    concat!("SELECT ", columns!(), " FROM tasks WHERE id IN (SELECT value FROM json_each($1))"),
    concat!("SELECT ", columns!(), " FROM tasks WHERE id = ANY ($1)"),
);

/// The tasks with these ids, in no order; unknown ids are absent.
pub async fn load(tx: &mut Tx, ids: &[TaskId]) -> Result<Vec<Task>> {
    if ids.is_empty() {
        return Ok(Vec::new());
    }
    let rows: Vec<TaskRow> = tx.query(LOAD).bind(ids).all().await?;
    Ok(rows.into_iter().map(|row| row.0).collect())
}

const TASK_COLUMNS: &[Type] = {
    use Type::{Id, Int, Json, Text};
    &[
        Id, Text, Text, Text, Json, Json, Int, Json, Json, Int, Int, Int, Json, Int, Text, Text,
        Id, Id, Text, Int, Text, Int, Int, Int, Int, Int, Int, Int, Int, Text, Int, Int, Int, Json,
        Json, Json, Id,
    ]
};

static INSERT: Bulk = Bulk::together(
    concat!("WITH new (", columns!(), ") AS ("),
    TASK_COLUMNS,
    concat!(") INSERT INTO tasks (", columns!(), ") SELECT * FROM new WHERE id IS NOT NULL"),
);

/// Adds new tasks.
pub fn insert(script: &mut Script, tasks: &[&Task]) -> Result<()> {
    script.add_rows(&INSERT, tasks, |row, task| {
        let spec = &task.spec;
        row.bind(task.id)
            .bind(&task.namespace)
            .bind(spec.model.clone())
            .bind(spec.version.clone())
            .bind(Json(spec.input.clone()))
            .bind(Json(spec.params.clone()))
            .bind(spec.priority)
            .bind(Json::of(&spec.labels)?)
            .bind(Json::of(&spec.required_labels)?)
            .bind(spec.deadline)
            .bind(spec.start_timeout.map(|timeout| timeout.as_micros() as i64))
            .bind(spec.execution_timeout.as_micros() as i64)
            .bind(Json::of(&spec.retry)?)
            .bind(spec.seed as i64)
            .bind(spec.session.clone())
            .bind(task.request_id.clone())
            .bind(task.retry_of)
            .bind(task.retried_by)
            .bind(task.traceparent.clone())
            .bind(task.create_time);
        bind_moving(row, task)
    })
}

const MOVED_COLUMNS: &[Type] = {
    use Type::{Id, Int, Json, Text};
    &[
        Id, Int, Text, Int, Int, Int, Int, Int, Int, Int, Int, Text, Int, Int, Int, Json, Json,
        Json, Id,
    ]
};

static UPDATE: Bulk = Bulk::together(
    "WITH moved (id, was, state, revision, attempt, failed, lost, handed_back, start_time,
                 end_time, not_before, runner_id, base_sequence, last_sequence,
                 reserved_sequence, result, error, usage, instance_id) AS (",
    MOVED_COLUMNS,
    ")
     UPDATE tasks SET
         state = m.state, revision = m.revision, attempt = m.attempt, failed = m.failed,
         lost = m.lost, handed_back = m.handed_back, start_time = m.start_time,
         end_time = m.end_time, not_before = m.not_before, runner_id = m.runner_id,
         base_sequence = m.base_sequence, last_sequence = m.last_sequence,
         reserved_sequence = m.reserved_sequence,
         result = m.result, error = m.error, usage = m.usage, instance_id = m.instance_id
     FROM moved m WHERE tasks.id = m.id AND tasks.revision = m.was",
);

/// Writes what moved. Each row must still be at the revision that the move was made from.
pub fn update(script: &mut Script, tasks: &[(u64, &Task)]) -> Result<()> {
    script.add_rows_exactly(&UPDATE, tasks, |row, (was, task)| {
        row.bind(task.id).bind(*was as i64);
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
        .bind(task.result.clone().map(Json))
        .bind(task.error.as_ref().map(Json::of).transpose()?)
        .bind(task.usage.as_ref().map(Json::of).transpose()?)
        .bind(task.instance);
    Ok(())
}

static FENCE: Bulk = Bulk::holding(
    "WITH relied (id, was) AS (",
    &[Type::Id, Type::Int],
    ")
     SELECT 1 FROM tasks JOIN relied r ON tasks.id = r.id WHERE tasks.revision = r.was",
    " FOR SHARE OF tasks",
);

/// Holds rows that a transaction relies on without moving them, as (task, revision): each must
/// still be at its revision, and stays there until the transaction ends.
pub fn fence(script: &mut Script, relied: &[(TaskId, u64)]) -> Result<()> {
    script.add_fence(&FENCE, relied, |row, (task, revision)| {
        row.bind(*task).bind(*revision as i64);
        Ok(())
    })
}

static HOLD_ENDS: Bulk = Bulk::holding(
    "WITH ends (id, was) AS (",
    &[Type::Id, Type::Int],
    ")
     SELECT 1 FROM tasks JOIN ends e ON tasks.id = e.id WHERE tasks.revision = e.was",
    " FOR UPDATE OF tasks",
);
// A statement of its own, which sees what was committed while the one before it waited.
static CHECK_ENDS: Bulk = Bulk::new(
    "WITH ends (id, last) AS (",
    &[Type::Id, Type::Int],
    ")
     SELECT 1 FROM ends e WHERE e.last =
        (SELECT coalesce(max(s.last_sequence), 0) FROM segments s WHERE s.task_id = e.id)",
);

/// Holds the rows of attempts that another server runs and that end now, as (task, revision, last
/// stored sequence): nothing more of theirs may have been stored.
pub fn fence_ends(script: &mut Script, ends: &[(TaskId, u64, u64)]) -> Result<()> {
    script.add_fence(&HOLD_ENDS, ends, |row, (task, revision, _)| {
        row.bind(*task).bind(*revision as i64);
        Ok(())
    })?;
    script.add_fence(&CHECK_ENDS, ends, |row, (task, _, last)| {
        row.bind(*task).bind(*last as i64);
        Ok(())
    })
}

static LINK_RETRIES: Bulk = Bulk::new(
    "WITH links (ended, was, new) AS (",
    &[Type::Id, Type::Int, Type::Id],
    ")
     UPDATE tasks SET retried_by = l.new, revision = revision + 1
     FROM links l WHERE tasks.id = l.ended AND tasks.revision = l.was",
);

/// Links ended tasks to the tasks that retry them, as (ended, revision, new); each ended task at
/// most once, and still at its revision.
pub fn link_retries(script: &mut Script, links: &[(TaskId, u64, TaskId)]) -> Result<()> {
    script.add_rows_exactly(&LINK_RETRIES, links, |row, (ended, was, new)| {
        row.bind(*ended).bind(*was as i64).bind(*new);
        Ok(())
    })
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

macro_rules! find_requests {
    ($pairs:literal) => {
        concat!(
            "SELECT r.namespace, r.request_id, r.task_id, r.digest, r.create_time FROM ",
            $pairs,
            " JOIN request_ids r ON r.namespace = k.value ->> 0 AND r.request_id = k.value ->> 1"
        )
    };
}

const FIND_REQUESTS: Sql = Sql::each(
    find_requests!("json_each($1) k"),
    find_requests!("jsonb_array_elements($1::jsonb) AS k (value)"),
);

/// The remembered submits among these, as (namespace, `request_id`), however old.
pub async fn find_requests(tx: &mut Tx, keys: &[(&str, &str)]) -> Result<Vec<Request>> {
    if keys.is_empty() {
        return Ok(Vec::new());
    }
    tx.query(FIND_REQUESTS).bind(Json::of(&keys)?).all().await
}

impl FromRow for Request {
    fn from_row(row: &Row) -> Result<Self> {
        let digest: Vec<u8> = row.get(3)?;
        Ok(Self {
            namespace: row.get(0)?,
            request_id: row.get(1)?,
            task: row.get(2)?,
            digest: digest.try_into().map_err(|_| Error::internal("a digest of 32 bytes"))?,
            create_time: row.get(4)?,
        })
    }
}

static REMOVE_REQUESTS: Bulk = Bulk::new(
    "WITH old (namespace, request_id, task_id) AS (",
    &[Type::Text, Type::Text, Type::Id],
    ")
     DELETE FROM request_ids
     WHERE (namespace, request_id) IN (SELECT namespace, request_id FROM old)
       AND task_id IN (SELECT task_id FROM old)",
);

/// Forgets submits that no longer count.
pub fn remove_requests(script: &mut Script, requests: &[Request]) -> Result<()> {
    script.add_rows(&REMOVE_REQUESTS, requests, |row, request| {
        row.bind(&request.namespace).bind(&request.request_id).bind(request.task);
        Ok(())
    })
}

static INSERT_REQUESTS: Bulk = Bulk::together(
    "WITH new (namespace, request_id, task_id, digest, create_time) AS (",
    &[Type::Text, Type::Text, Type::Id, Type::Bytes, Type::Int],
    ")
     INSERT INTO request_ids (namespace, request_id, task_id, digest, create_time)
     SELECT * FROM new WHERE namespace IS NOT NULL
     ON CONFLICT (namespace, request_id) DO NOTHING",
);

/// Remembers submits. None may be remembered already, by another server in the meantime.
pub fn insert_requests(script: &mut Script, requests: &[Request]) -> Result<()> {
    if faults::planted(Fault::ForgetRequestIds) {
        return Ok(());
    }
    let bind = |row: &mut Values, request: &Request| {
        row.bind(&request.namespace)
            .bind(&request.request_id)
            .bind(request.task)
            .bind(request.digest.to_vec())
            .bind(request.create_time);
        Ok(())
    };
    if faults::planted(Fault::RememberUnchecked) {
        return script.add_rows(&INSERT_REQUESTS, requests, bind);
    }
    script.add_rows_if_alone(&INSERT_REQUESTS, requests, bind)
}

const FORGET_REQUESTS: Sql = Sql::new(
    "DELETE FROM request_ids WHERE (namespace, request_id) IN (
         SELECT namespace, request_id FROM request_ids WHERE create_time < $1 LIMIT $2)",
);

/// Forgets submits older than `before`, at most `limit`; returns how many.
pub async fn forget_requests(tx: &mut Tx, before: Micros, limit: u32) -> Result<u64> {
    tx.query(FORGET_REQUESTS).bind(before).bind(limit).run().await
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

static INSERT_SEGMENTS: Bulk = Bulk::together(
    "WITH new (task_id, attempt, first_sequence, last_sequence, frames) AS (",
    &[Type::Id, Type::Int, Type::Int, Type::Int, Type::Bytes],
    ")
     INSERT INTO segments (task_id, attempt, first_sequence, last_sequence, frames)
     SELECT * FROM new WHERE task_id IS NOT NULL
     ON CONFLICT (task_id, first_sequence) DO UPDATE SET
        last_sequence = excluded.last_sequence, frames = excluded.frames
        WHERE excluded.last_sequence > segments.last_sequence",
);

/// Adds segments; one that is there already is left as it is, unless it is shorter. No two may begin at
/// the same place.
pub fn insert_segments(script: &mut Script, segments: &[&SegmentRow]) -> Result<()> {
    script.add_rows(&INSERT_SEGMENTS, segments, |row, segment| {
        row.bind(segment.task)
            .bind(segment.attempt)
            .bind(segment.first as i64)
            .bind(segment.last as i64)
            .bind(&segment.frames);
        Ok(())
    })
}

static DELETE_TASKS: Bulk = Bulk::new("DELETE FROM tasks WHERE id IN (", &[Type::Id], ")");
static DELETE_EVENTS: Bulk =
    Bulk::new("DELETE FROM task_events WHERE task_id IN (", &[Type::Id], ")");
static DELETE_SEGMENTS: Bulk =
    Bulk::new("DELETE FROM segments WHERE task_id IN (", &[Type::Id], ")");
static DELETE_TRANSCRIPTS: Bulk =
    Bulk::new("DELETE FROM transcripts WHERE task_id IN (", &[Type::Id], ")");

/// Deletes ended tasks and what hangs on them.
pub fn delete(script: &mut Script, ids: &[TaskId]) -> Result<()> {
    for bulk in [&DELETE_TASKS, &DELETE_EVENTS, &DELETE_SEGMENTS, &DELETE_TRANSCRIPTS] {
        script.add_rows(bulk, ids, |row, id| {
            row.bind(*id);
            Ok(())
        })?;
    }
    Ok(())
}

/// Statements of this file.
pub const STATEMENTS: &[Statement] = &[
    Statement::Query(LOAD),
    Statement::Rows(&INSERT),
    Statement::Rows(&UPDATE),
    Statement::Rows(&FENCE),
    Statement::Rows(&HOLD_ENDS),
    Statement::Rows(&CHECK_ENDS),
    Statement::Rows(&LINK_RETRIES),
    Statement::Query(FIND_REQUESTS),
    Statement::Rows(&REMOVE_REQUESTS),
    Statement::Rows(&INSERT_REQUESTS),
    Statement::Query(FORGET_REQUESTS),
    Statement::Rows(&INSERT_SEGMENTS),
    Statement::Rows(&DELETE_TASKS),
    Statement::Rows(&DELETE_EVENTS),
    Statement::Rows(&DELETE_SEGMENTS),
    Statement::Rows(&DELETE_TRANSCRIPTS),
];
