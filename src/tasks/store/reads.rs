//! Reads of tasks, each within a namespace but those of the server itself.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use bytes::Bytes;

use super::{TaskRow, columns};
use crate::{
    clock::Micros,
    db::{FromRow, Json, Row, Sql, Statement, Tx},
    error::{Error, Result},
    id::{InstanceId, Namespace, TaskId},
    tasks::{
        model::{State, Task},
        state::Limit,
    },
};

const FIND: Sql =
    Sql::new(concat!("SELECT ", columns!(), " FROM tasks WHERE id = $1 AND namespace = $2"));

/// The task, if it is in the namespace.
pub async fn find(tx: &mut Tx, namespace: &Namespace, id: TaskId) -> Result<Option<Task>> {
    let row: Option<TaskRow> = tx.query(FIND).bind(id).bind(namespace).first().await?;
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

/// A list, but for what the engines write differently. Ids are made of the creation time, so the
/// page is a range of the index.
macro_rules! list {
    ($in_states:literal, $with_labels:literal) => {
        concat!(
            "SELECT ",
            columns!(),
            " FROM tasks t WHERE namespace = $1 AND id < $2
                AND (",
            $in_states,
            " OR $3 IS NULL) AND (model = $4 OR $4 IS NULL) AND (version = $5 OR $5 IS NULL)
                AND (create_time >= $6 OR $6 IS NULL) AND (create_time < $7 OR $7 IS NULL)
                AND (session_id = $8 OR $8 IS NULL)
                AND (NOT $9 OR retried_by IS NULL)
                AND ",
            $with_labels,
            " ORDER BY id DESC LIMIT $11"
        )
    };
}

const LIST: Sql = Sql::each(
    list!(
        "state IN (SELECT value FROM json_each($3))",
        "NOT EXISTS (
           SELECT 1 FROM json_each($10) wanted
           WHERE NOT EXISTS (SELECT 1 FROM json_each(t.labels) have
                             WHERE have.key = wanted.key AND have.value = wanted.value))"
    ),
    list!("state = ANY ($3)", "t.labels @> $10::jsonb"),
);

/// Tasks of a namespace, newest first, older than `cursor`.
pub async fn list(
    tx: &mut Tx,
    namespace: &Namespace,
    filter: &Filter,
    cursor: Option<TaskId>,
    limit: u32,
) -> Result<Vec<Task>> {
    let states: Vec<String> = filter.states.iter().map(|state| state.as_str().to_owned()).collect();
    let rows: Vec<TaskRow> = tx
        .query(LIST)
        .bind(namespace)
        .bind(cursor.unwrap_or(TaskId::MAX))
        .bind(Some(states).filter(|states| !states.is_empty()))
        .bind(filter.model.as_ref())
        .bind(filter.version.as_ref())
        .bind(filter.after)
        .bind(filter.before)
        .bind(filter.session.as_ref())
        .bind(filter.exclude_retried)
        .bind(Json::of(&filter.labels)?)
        .bind(limit)
        .all()
        .await?;
    Ok(rows.into_iter().map(|row| row.0).collect())
}

const RUNNING: Sql = Sql::new(concat!(
    "SELECT ",
    columns!(),
    " FROM tasks WHERE state = 'RUNNING' AND id > $1 AND (instance_id = $3 OR $3 IS NULL)
      ORDER BY id LIMIT $2"
));

/// RUNNING tasks of all namespaces in the order of their ids, after one: those whose runners an
/// instance holds, or all.
pub async fn running_page(
    tx: &mut Tx,
    instance: Option<InstanceId>,
    after: Option<TaskId>,
    limit: u32,
) -> Result<Vec<Task>> {
    let after = after.unwrap_or(TaskId::MIN);
    let query = tx.query(RUNNING).bind(after).bind(limit).bind(instance);
    let rows: Vec<TaskRow> = query.all().await?;
    Ok(rows.into_iter().map(|row| row.0).collect())
}

const HELD_BY: Sql =
    Sql::new("SELECT id, attempt FROM tasks WHERE state = 'RUNNING' AND instance_id = $1");

/// RUNNING tasks whose runners an instance holds, with their attempts.
pub async fn held_by(tx: &mut Tx, instance: InstanceId) -> Result<Vec<(TaskId, u32)>> {
    tx.query(HELD_BY).bind(instance).all().await
}

/// Where a task is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Whereabouts {
    /// Task.
    pub id: TaskId,
    /// State.
    pub state: State,
    /// Latest attempt.
    pub attempt: u32,
    /// Grows with every change of the row.
    pub revision: u64,
    /// Highest sequence of a timeline event.
    pub last_sequence: u64,
    /// Server that holds the runner, while it runs.
    pub instance: Option<InstanceId>,
}

const WHEREABOUTS: Sql = Sql::each(
    "SELECT id, state, attempt, revision, last_sequence, instance_id FROM tasks
     WHERE id IN (SELECT value FROM json_each($1))",
    "SELECT id, state, attempt, revision, last_sequence, instance_id FROM tasks WHERE id = ANY ($1)",
);

/// Where tasks are; those that do not exist are absent.
pub async fn whereabouts(tx: &mut Tx, ids: &[TaskId]) -> Result<Vec<Whereabouts>> {
    tx.query(WHEREABOUTS).bind(ids).all().await
}

impl FromRow for Whereabouts {
    fn from_row(row: &Row) -> Result<Self> {
        Ok(Self {
            id: row.get(0)?,
            state: row.parse(1)?,
            attempt: row.get(2)?,
            revision: row.get::<i64>(3)? as u64,
            last_sequence: row.get::<i64>(4)? as u64,
            instance: row.get(5)?,
        })
    }
}

macro_rules! last_stored {
    ($ids:literal) => {
        concat!(
            "SELECT w.id, (SELECT s.last_sequence FROM segments s WHERE s.task_id = w.id
                           ORDER BY s.first_sequence DESC LIMIT 1)
             FROM ",
            $ids
        )
    };
}

const LAST_STORED: Sql = Sql::each(
    last_stored!("(SELECT value AS id FROM json_each($1)) w"),
    last_stored!("unnest($1::uuid[]) AS w (id)"),
);

/// The last sequence of each task's stored segments; tasks without any are absent.
pub async fn last_stored(tx: &mut Tx, ids: &[TaskId]) -> Result<HashMap<TaskId, u64>> {
    if ids.is_empty() {
        return Ok(HashMap::new());
    }
    let rows: Vec<(TaskId, Option<i64>)> = tx.query(LAST_STORED).bind(ids).all().await?;
    Ok(rows.into_iter().filter_map(|(id, last)| Some((id, last? as u64))).collect())
}

macro_rules! orphans {
    ($now:literal) => {
        concat!(
            "SELECT id, state, attempt, revision, last_sequence, instance_id FROM tasks t
             WHERE state = 'RUNNING' AND NOT EXISTS (
                 SELECT 1 FROM instances i
                 WHERE i.id = t.instance_id AND i.heartbeat_time >= ",
            $now,
            " - $1)
             ORDER BY id LIMIT $2"
        )
    };
}

const ORPHANS: Sql = Sql::each(
    orphans!("(SELECT now FROM server_clock)"),
    orphans!("(extract(epoch FROM clock_timestamp()) * 1000000)::bigint"),
);

/// RUNNING tasks whose instance was not heard of for so long, by the database's clock.
pub async fn orphans(tx: &mut Tx, silent: Duration, limit: u32) -> Result<Vec<Whereabouts>> {
    tx.query(ORPHANS).bind(silent.as_micros() as i64).bind(limit).all().await
}

const OVERDUE: Sql = Sql::new(
    "SELECT id, CAST(0 AS BIGINT) FROM tasks
     WHERE state IN ('QUEUED', 'RUNNING') AND deadline IS NOT NULL AND deadline <= $1
     UNION ALL
     SELECT id, CAST(1 AS BIGINT) FROM tasks
     WHERE state = 'QUEUED' AND attempt = 0 AND start_timeout IS NOT NULL
       AND create_time + start_timeout <= $1
     LIMIT $2",
);

/// Open tasks a limit of which has passed.
pub async fn overdue(tx: &mut Tx, now: Micros, limit: u32) -> Result<Vec<(TaskId, Limit)>> {
    let rows: Vec<(TaskId, i64)> = tx.query(OVERDUE).bind(now).bind(limit).all().await?;
    let which = |kind| if kind == 0 { Limit::Deadline } else { Limit::StartTimeout };
    Ok(rows.into_iter().map(|(id, kind)| (id, which(kind))).collect())
}

const ENDED: Sql = Sql::new(
    "SELECT id FROM tasks
     WHERE id > $1 AND id < $2 AND end_time < $3
       AND state NOT IN ('QUEUED', 'RUNNING', 'DEAD_LETTERED')
     ORDER BY id LIMIT $4",
);
const DEAD: Sql = Sql::new(
    "SELECT id FROM tasks
     WHERE id > $1 AND id < $2 AND end_time < $3 AND state = 'DEAD_LETTERED'
     ORDER BY id LIMIT $4",
);

/// Which tasks have ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// All but dead letters.
    Done,
    /// Dead letters.
    Dead,
}

/// Tasks that ended before a time, in the order of their ids, after one.
pub async fn ended_page(
    tx: &mut Tx,
    which: Ended,
    before: Micros,
    after: Option<TaskId>,
    limit: u32,
) -> Result<Vec<TaskId>> {
    let sql = match which {
        Ended::Done => ENDED,
        Ended::Dead => DEAD,
    };
    // What ended before then was made before then.
    let query = tx.query(sql).bind(after.unwrap_or(TaskId::MIN)).bind(TaskId::first_at(before));
    let rows: Vec<(TaskId,)> = query.bind(before).bind(limit).all().await?;
    Ok(rows.into_iter().map(|(id,)| id).collect())
}

const SEGMENTS: Sql = Sql::new(
    "SELECT last_sequence, frames FROM segments WHERE task_id = $1 AND attempt = $2
     ORDER BY first_sequence",
);

/// Segments of a running attempt, oldest first: their last sequence and frames.
pub async fn segments(tx: &mut Tx, task: TaskId, attempt: u32) -> Result<Vec<(u64, Bytes)>> {
    let rows: Vec<(i64, Bytes)> = tx.query(SEGMENTS).bind(task).bind(attempt).all().await?;
    Ok(rows.into_iter().map(|(last, frames)| (last as u64, frames)).collect())
}

const ARTIFACTS: Sql = Sql::new(
    "SELECT frame FROM task_events WHERE task_id = $1 AND kind = 'artifact'
     ORDER BY sequence LIMIT 1000",
);

/// Frames of the artifacts that a task listed, oldest first.
pub async fn artifacts(tx: &mut Tx, task: TaskId) -> Result<Vec<Bytes>> {
    let rows: Vec<(Bytes,)> = tx.query(ARTIFACTS).bind(task).all().await?;
    Ok(rows.into_iter().map(|(frame,)| frame).collect())
}

const SEGMENTS_AFTER: Sql = Sql::new(
    "SELECT first_sequence, frames FROM segments
     WHERE task_id = $1 AND last_sequence > $2 ORDER BY first_sequence LIMIT $3",
);

/// Segments with entries after a sequence, oldest first: their first sequence and frames.
pub async fn segments_after(
    tx: &mut Tx,
    task: TaskId,
    after: u64,
    limit: u32,
) -> Result<Vec<(u64, Bytes)>> {
    let after = i64::try_from(after).unwrap_or(i64::MAX);
    let rows: Vec<(i64, Bytes)> =
        tx.query(SEGMENTS_AFTER).bind(task).bind(after).bind(limit).all().await?;
    Ok(rows.into_iter().map(|(first, frames)| (first as u64, frames)).collect())
}

/// Statements of this file.
pub const STATEMENTS: &[Statement] = &[
    Statement::Query(FIND),
    Statement::Query(LIST),
    Statement::Query(RUNNING),
    Statement::Query(HELD_BY),
    Statement::Query(WHEREABOUTS),
    Statement::Query(LAST_STORED),
    Statement::Query(ORPHANS),
    Statement::Query(OVERDUE),
    Statement::Query(ENDED),
    Statement::Query(DEAD),
    Statement::Query(SEGMENTS),
    Statement::Query(ARTIFACTS),
    Statement::Query(SEGMENTS_AFTER),
];
