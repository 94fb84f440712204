//! SQL of the tables `artifacts`, `artifact_inputs` and `artifact_usage`. Reads of `tasks` whether
//! an attempt runs and whether a task is there, within the transaction that depends on it.
//!
//! What a write depends on it holds: where others write at the same time, a statement locks the
//! row, and those after it see what was committed until then.

pub mod stored;
pub mod uploads;

use std::time::Duration;

use super::model::{Artifact, Origin};
use crate::{
    blob::{Digest, Key},
    clock::Micros,
    db::{FromRow, Row, Sql, Statement, Tx},
    error::{Error, Result},
    id::{ArtifactId, Namespace, TaskId},
};

/// A reference to a task that was never accepted counts this long.
const UNACCEPTED: Duration = Duration::from_hours(1);

/// A number of bytes as a column holds it.
fn int(size: u64) -> i64 {
    i64::try_from(size).unwrap_or(i64::MAX)
}

/// Who made it: the task, the attempt, and the credential's name, in that order.
fn origin(row: &Row, first: usize) -> Result<Origin> {
    let (task, attempt): (Option<TaskId>, u32) = (row.get(first)?, row.get(first + 1)?);
    Ok(Origin { by: row.get(first + 2)?, attempt: task.map(|task| (task, attempt)) })
}

macro_rules! columns {
    () => {
        "id, namespace, name, type, mime_type, size_bytes, sha256, task_id, attempt, created_by, \
         create_time, expire_time, generation"
    };
}

impl FromRow for Artifact {
    fn from_row(row: &Row) -> Result<Self> {
        Ok(Self {
            id: row.get(0)?,
            namespace: row.get(1)?,
            name: row.get(2)?,
            mime_type: row.get(4)?,
            key: Key { kind: row.get(3)?, digest: row.parse(6)?, generation: row.get(12)? },
            size: row.get(5)?,
            origin: origin(row, 7)?,
            create_time: row.get(10)?,
            expire_time: row.get(11)?,
        })
    }
}

const INSERT: Sql = Sql::new(concat!(
    "INSERT INTO artifacts (",
    columns!(),
    ") VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)"
));
const ADD_USAGE: Sql = Sql::new(
    "INSERT INTO artifact_usage (namespace, artifacts, bytes) VALUES ($1, 1, $2)
     ON CONFLICT (namespace) DO UPDATE
     SET artifacts = artifact_usage.artifacts + 1, bytes = artifact_usage.bytes + excluded.bytes",
);

/// Adds an artifact; its bytes must be kept already, see [`stored::touch`].
pub async fn insert(tx: &mut Tx, artifact: &Artifact) -> Result<()> {
    let (task, attempt) = artifact.origin.attempt.unzip();
    let insert = tx.query(INSERT).bind(artifact.id).bind(&artifact.namespace).bind(&artifact.name);
    let insert = insert.bind(&artifact.key.kind).bind(&artifact.mime_type).bind(int(artifact.size));
    let insert = insert.bind(artifact.key.digest.to_string()).bind(task).bind(attempt.unwrap_or(0));
    let insert = insert.bind(&artifact.origin.by).bind(artifact.create_time);
    insert.bind(artifact.expire_time).bind(&artifact.key.generation).run().await?;
    let add = tx.query(ADD_USAGE).bind(&artifact.namespace).bind(int(artifact.size));
    add.run().await.map(drop)
}

const USAGE: Sql = Sql::each(
    "SELECT bytes FROM artifact_usage WHERE namespace = $1",
    "INSERT INTO artifact_usage (namespace, artifacts, bytes) VALUES ($1, 0, 0)
     ON CONFLICT (namespace) DO UPDATE SET bytes = artifact_usage.bytes RETURNING bytes",
);

/// Bytes that a namespace keeps, and no other transaction adds any until this one ends.
pub async fn hold_usage(tx: &mut Tx, namespace: &Namespace) -> Result<u64> {
    let bytes: Option<(u64,)> = tx.query(USAGE).bind(namespace).first().await?;
    Ok(bytes.map_or(0, |(bytes,)| bytes))
}

const GET: Sql =
    Sql::new(concat!("SELECT ", columns!(), " FROM artifacts WHERE id = $1 AND namespace = $2"));

/// The artifact, which must be in the namespace, expired or not.
pub async fn get_any(tx: &mut Tx, namespace: &Namespace, id: ArtifactId) -> Result<Artifact> {
    let found = tx.query(GET).bind(id).bind(namespace).first().await?;
    found.ok_or_else(|| Error::not_found("artifact", id))
}

/// The artifact, which must be in the namespace and not have expired.
pub async fn get(
    tx: &mut Tx,
    namespace: &Namespace,
    id: ArtifactId,
    now: Micros,
) -> Result<Artifact> {
    let artifact = get_any(tx, namespace, id).await?;
    match artifact.expire_time {
        Some(time) if time <= now => Err(Error::not_found("artifact", id)),
        _ => Ok(artifact),
    }
}

const HAS_BYTES: Sql =
    Sql::new("SELECT COUNT(*) FROM artifacts WHERE type = $1 AND sha256 = $2 AND namespace = $3");

/// Whether the namespace has an artifact with these bytes.
pub async fn has_bytes(
    tx: &mut Tx,
    namespace: &Namespace,
    kind: &str,
    digest: Digest,
) -> Result<bool> {
    let count = tx.query(HAS_BYTES).bind(kind).bind(digest.to_string()).bind(namespace);
    let (n,): (i64,) = count.one().await?;
    Ok(n > 0)
}

/// Which artifacts a list has.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Made by this task.
    pub task: Option<TaskId>,
    /// Of this type.
    pub kind: Option<String>,
    /// Of this name.
    pub name: Option<String>,
}

const LIST: Sql = Sql::new(concat!(
    "SELECT ",
    columns!(),
    " FROM artifacts WHERE namespace = $1 AND id < $2
     AND (task_id = $3 OR $3 IS NULL) AND (type = $4 OR $4 IS NULL)
     AND (name = $5 OR $5 IS NULL) AND (expire_time IS NULL OR expire_time > $6)
     ORDER BY id DESC LIMIT $7"
));

/// Artifacts of a namespace, newest first, older than `cursor`.
pub async fn list(
    tx: &mut Tx,
    namespace: &Namespace,
    filter: &Filter,
    cursor: Option<ArtifactId>,
    limit: u32,
    now: Micros,
) -> Result<Vec<Artifact>> {
    let list = tx.query(LIST).bind(namespace).bind(cursor.unwrap_or(ArtifactId::MAX));
    let list = list.bind(filter.task).bind(filter.kind.clone()).bind(filter.name.clone());
    list.bind(now).bind(limit).all().await
}

/// What a task reads that has not ended, or is about to be accepted.
macro_rules! read_by {
    ($artifact:literal, $unaccepted:literal) => {
        concat!(
            "FROM artifact_inputs i LEFT JOIN tasks t ON t.id = i.task_id
             WHERE i.artifact_id = ",
            $artifact,
            " AND (t.state IN ('QUEUED', 'RUNNING') OR (t.id IS NULL AND i.create_time > ",
            $unaccepted,
            "))"
        )
    };
}

const HOLD: Sql = Sql::each(
    "SELECT id FROM artifacts WHERE id = $1",
    "SELECT id FROM artifacts WHERE id = $1 FOR UPDATE",
);
const DELETE: Sql = Sql::new(concat!(
    "DELETE FROM artifacts WHERE id = $1 AND NOT EXISTS (SELECT 1 ",
    read_by!("artifacts.id", "$2"),
    ") RETURNING namespace, size_bytes"
));
const SUBTRACT_USAGE: Sql = Sql::new(
    "UPDATE artifact_usage SET artifacts = artifacts - 1, bytes = bytes - $2 WHERE namespace = $1",
);
const FORGET_INPUTS: Sql = Sql::new("DELETE FROM artifact_inputs WHERE artifact_id = $1");

/// Deletes an artifact, unless it is gone or a task reads it that has not ended; says whether it
/// did.
pub async fn delete(tx: &mut Tx, id: ArtifactId, now: Micros) -> Result<bool> {
    // Whoever is about to read it has said so when it is held, and the next statement sees it.
    let held: Option<(ArtifactId,)> = tx.query(HOLD).bind(id).first().await?;
    if held.is_none() {
        return Ok(false);
    }
    let delete = tx.query(DELETE).bind(id).bind(now - UNACCEPTED);
    let gone: Option<(Namespace, i64)> = delete.first().await?;
    let Some((namespace, bytes)) = gone else { return Ok(false) };
    tx.query(SUBTRACT_USAGE).bind(&namespace).bind(bytes).run().await?;
    tx.query(FORGET_INPUTS).bind(id).run().await?;
    Ok(true)
}

const RUNS: Sql = Sql::new(
    "SELECT id FROM tasks WHERE id = $1 AND namespace = $2 AND attempt = $3 AND state = 'RUNNING'",
);
const HOLD_LEASE: Sql = Sql::each(
    RUNS.sqlite,
    "SELECT id FROM tasks WHERE id = $1 AND namespace = $2 AND attempt = $3 AND state = 'RUNNING'
     FOR SHARE",
);

/// What a transaction does with a lease that it found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lease {
    /// It looks.
    Seen,
    /// It writes what counts only under the lease, which does not end before it does.
    Held,
}

/// Whether that attempt holds its lease.
pub async fn runs(
    tx: &mut Tx,
    namespace: &Namespace,
    (task, attempt): (TaskId, u32),
    lease: Lease,
) -> Result<bool> {
    let sql = if lease == Lease::Held { HOLD_LEASE } else { RUNS };
    let found = tx.query(sql).bind(task).bind(namespace).bind(attempt).first::<(TaskId,)>();
    Ok(found.await?.is_some())
}

const HOLD_INPUT: Sql = Sql::each(
    "SELECT id FROM artifacts
     WHERE id = $1 AND namespace = $2 AND (expire_time IS NULL OR expire_time > $3)",
    "SELECT id FROM artifacts
     WHERE id = $1 AND namespace = $2 AND (expire_time IS NULL OR expire_time > $3) FOR SHARE",
);
const REFER: Sql = Sql::new(
    "INSERT INTO artifact_inputs (artifact_id, task_id, create_time) VALUES ($1, $2, $3)
     ON CONFLICT (artifact_id, task_id) DO NOTHING",
);

/// Notes that a task which is about to be accepted reads an artifact, which must be in the namespace
/// and not have expired.
pub async fn refer(
    tx: &mut Tx,
    namespace: &Namespace,
    id: ArtifactId,
    task: TaskId,
    now: Micros,
) -> Result<()> {
    let hold = tx.query(HOLD_INPUT).bind(id).bind(namespace).bind(now);
    let held: Option<(ArtifactId,)> = hold.first().await?;
    if held.is_none() {
        return Err(Error::not_found("artifact", id));
    }
    tx.query(REFER).bind(id).bind(task).bind(now).run().await.map(drop)
}

const READS: Sql =
    Sql::new("SELECT COUNT(*) FROM artifact_inputs WHERE artifact_id = $1 AND task_id = $2");

/// Whether the task reads the artifact.
pub async fn reads(tx: &mut Tx, id: ArtifactId, task: TaskId) -> Result<bool> {
    let (n,): (i64,) = tx.query(READS).bind(id).bind(task).one().await?;
    Ok(n > 0)
}

const READER: Sql = Sql::new(concat!("SELECT i.task_id ", read_by!("$1", "$2"), " LIMIT 1"));

/// A task that reads the artifact and has not ended, or is about to be accepted.
pub async fn reader(tx: &mut Tx, id: ArtifactId, now: Micros) -> Result<Option<TaskId>> {
    let task: Option<(TaskId,)> = tx.query(READER).bind(id).bind(now - UNACCEPTED).first().await?;
    Ok(task.map(|(task,)| task))
}

macro_rules! condemned {
    () => {
        concat!(
            "SELECT a.id, a.namespace FROM artifacts a
             WHERE (a.expire_time <= $1 OR (a.task_id IS NOT NULL
                 AND NOT EXISTS (SELECT 1 FROM tasks m WHERE m.id = a.task_id)))
             AND NOT EXISTS (SELECT 1 ",
            read_by!("a.id", "$2"),
            ") LIMIT $3"
        )
    };
}

const CONDEMNED: Sql =
    Sql::each(condemned!(), concat!(condemned!(), " FOR UPDATE OF a SKIP LOCKED"));

/// Artifacts that nothing keeps: expired, or made by a task that is gone. None that a task reads
/// which has not ended.
pub async fn condemned(tx: &mut Tx, now: Micros, limit: u32) -> Result<Vec<ArtifactId>> {
    let find = tx.query(CONDEMNED).bind(now).bind(now - UNACCEPTED).bind(limit);
    let mut found: Vec<(ArtifactId, Namespace)> = find.all().await?;
    // In one order for all: two collectors do not wait for each other.
    found.sort_unstable_by(|(_, a), (_, b)| a.as_str().cmp(b.as_str()));
    Ok(found.into_iter().map(|(id, _)| id).collect())
}

const FORGET_REFERENCES: Sql = Sql::new(
    "DELETE FROM artifact_inputs WHERE create_time <= $1
     AND NOT EXISTS (SELECT 1 FROM tasks t WHERE t.id = artifact_inputs.task_id)",
);

/// Forgets references of tasks that were never accepted or are gone.
pub async fn forget_references(tx: &mut Tx, now: Micros) -> Result<()> {
    tx.query(FORGET_REFERENCES).bind(now - UNACCEPTED).run().await.map(drop)
}

/// Statements of this file.
pub const STATEMENTS: &[Statement] = &[
    Statement::Query(INSERT),
    Statement::Query(ADD_USAGE),
    Statement::Query(USAGE),
    Statement::Query(GET),
    Statement::Query(HAS_BYTES),
    Statement::Query(LIST),
    Statement::Query(HOLD),
    Statement::Query(DELETE),
    Statement::Query(SUBTRACT_USAGE),
    Statement::Query(FORGET_INPUTS),
    Statement::Query(RUNS),
    Statement::Query(HOLD_LEASE),
    Statement::Query(HOLD_INPUT),
    Statement::Query(REFER),
    Statement::Query(READS),
    Statement::Query(READER),
    Statement::Query(CONDEMNED),
    Statement::Query(FORGET_REFERENCES),
];
