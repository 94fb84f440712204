//! SQL of the tables `artifacts`, `artifact_inputs` and `artifact_usage`. Reads of `tasks` whether
//! an attempt runs and whether a task is there, within the transaction that depends on it.

pub mod stored;
pub mod uploads;

use std::time::Duration;

use sqlx::{FromRow, Row as _, sqlite::SqliteRow};

use super::model::{Artifact, Origin};
use crate::{
    blob::{Digest, Key},
    clock::Micros,
    db::Tx,
    error::{Error, Result},
    id::{ArtifactId, Namespace, TaskId},
};

/// A reference to a task that was never accepted counts this long.
const UNACCEPTED: Duration = Duration::from_hours(1);

/// Reads a text as whatever it says.
fn parse<T>(row: &SqliteRow, column: &str) -> Result<T, sqlx::Error>
where
    T: std::str::FromStr,
    T::Err: std::error::Error + Send + Sync + 'static,
{
    row.try_get::<&str, _>(column)?.parse().map_err(|source| sqlx::Error::ColumnDecode {
        index: column.into(),
        source: Box::new(source),
    })
}

fn parse_optional<T>(row: &SqliteRow, column: &str) -> Result<Option<T>, sqlx::Error>
where
    T: std::str::FromStr,
    T::Err: std::error::Error + Send + Sync + 'static,
{
    match row.try_get::<Option<&str>, _>(column)? {
        Some(_) => parse(row, column).map(Some),
        None => Ok(None),
    }
}

fn size(row: &SqliteRow, column: &str) -> Result<u64, sqlx::Error> {
    Ok(u64::try_from(row.try_get::<i64, _>(column)?).unwrap_or(0))
}

fn origin(row: &SqliteRow) -> Result<Origin, sqlx::Error> {
    let attempt: u32 = row.try_get("attempt")?;
    let task = parse_optional(row, "task_id")?;
    Ok(Origin { by: row.try_get("created_by")?, attempt: task.map(|task| (task, attempt)) })
}

/// A number of bytes as a column holds it.
fn int(size: u64) -> i64 {
    i64::try_from(size).unwrap_or(i64::MAX)
}

impl FromRow<'_, SqliteRow> for Artifact {
    fn from_row(row: &SqliteRow) -> Result<Self, sqlx::Error> {
        Ok(Self {
            id: parse(row, "id")?,
            namespace: row.try_get::<String, _>("namespace")?.into(),
            name: row.try_get("name")?,
            mime_type: row.try_get("mime_type")?,
            key: Key { kind: row.try_get("type")?, digest: parse::<Digest>(row, "sha256")? },
            size: size(row, "size_bytes")?,
            origin: origin(row)?,
            create_time: row.try_get("create_time")?,
            expire_time: row.try_get("expire_time")?,
        })
    }
}

/// Adds an artifact; its bytes must be kept already, see [`stored::touch`].
pub async fn insert(tx: &mut Tx, artifact: &Artifact) -> Result<()> {
    let (task, attempt) = artifact.origin.attempt.unzip();
    sqlx::query(
        "INSERT INTO artifacts (id, namespace, name, type, mime_type, size_bytes, sha256, task_id,
         attempt, created_by, create_time, expire_time)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)",
    )
    .bind(artifact.id.to_string())
    .bind(artifact.namespace.as_str())
    .bind(&artifact.name)
    .bind(&artifact.key.kind)
    .bind(&artifact.mime_type)
    .bind(int(artifact.size))
    .bind(artifact.key.digest.to_string())
    .bind(task.map(|task| task.to_string()))
    .bind(attempt.unwrap_or(0))
    .bind(&artifact.origin.by)
    .bind(artifact.create_time)
    .bind(artifact.expire_time)
    .execute(tx.conn())
    .await?;
    sqlx::query(
        "INSERT INTO artifact_usage (namespace, artifacts, bytes) VALUES ($1, 1, $2)
         ON CONFLICT (namespace) DO UPDATE
         SET artifacts = artifact_usage.artifacts + 1, bytes = artifact_usage.bytes + $2",
    )
    .bind(artifact.namespace.as_str())
    .bind(int(artifact.size))
    .execute(tx.conn())
    .await?;
    Ok(())
}

/// Bytes that a namespace keeps.
pub async fn usage(tx: &mut Tx, namespace: &Namespace) -> Result<u64> {
    let bytes: Option<i64> =
        sqlx::query_scalar("SELECT bytes FROM artifact_usage WHERE namespace = $1")
            .bind(namespace.as_str())
            .fetch_optional(tx.conn())
            .await?;
    Ok(bytes.and_then(|bytes| u64::try_from(bytes).ok()).unwrap_or(0))
}

/// The artifact, which must be in the namespace, expired or not.
pub async fn get_any(tx: &mut Tx, namespace: &Namespace, id: ArtifactId) -> Result<Artifact> {
    sqlx::query_as("SELECT * FROM artifacts WHERE id = $1 AND namespace = $2")
        .bind(id.to_string())
        .bind(namespace.as_str())
        .fetch_optional(tx.conn())
        .await?
        .ok_or_else(|| Error::not_found("artifact", id))
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

/// Whether the namespace has an artifact with these bytes.
pub async fn has_bytes(tx: &mut Tx, namespace: &Namespace, key: &Key) -> Result<bool> {
    let n: i64 = sqlx::query_scalar(
        "SELECT COUNT(*) FROM artifacts WHERE type = $1 AND sha256 = $2 AND namespace = $3",
    )
    .bind(&key.kind)
    .bind(key.digest.to_string())
    .bind(namespace.as_str())
    .fetch_one(tx.conn())
    .await?;
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

/// Artifacts of a namespace, newest first, older than `cursor`.
pub async fn list(
    tx: &mut Tx,
    namespace: &Namespace,
    filter: &Filter,
    cursor: Option<&str>,
    limit: u32,
    now: Micros,
) -> Result<Vec<Artifact>> {
    let artifacts = sqlx::query_as(
        "SELECT * FROM artifacts WHERE namespace = $1 AND id < $2
         AND ($3 IS NULL OR task_id = $3) AND ($4 IS NULL OR type = $4)
         AND ($5 IS NULL OR name = $5) AND (expire_time IS NULL OR expire_time > $6)
         ORDER BY id DESC LIMIT $7",
    )
    .bind(namespace.as_str())
    // Above every id.
    .bind(cursor.unwrap_or("g"))
    .bind(filter.task.map(|task| task.to_string()))
    .bind(&filter.kind)
    .bind(&filter.name)
    .bind(now)
    .bind(limit)
    .fetch_all(tx.conn())
    .await?;
    Ok(artifacts)
}

/// Deletes an artifact; says whether it was there.
pub async fn delete(tx: &mut Tx, id: ArtifactId) -> Result<bool> {
    let gone: Option<(String, i64)> =
        sqlx::query_as("DELETE FROM artifacts WHERE id = $1 RETURNING namespace, size_bytes")
            .bind(id.to_string())
            .fetch_optional(tx.conn())
            .await?;
    let Some((namespace, bytes)) = gone else { return Ok(false) };
    sqlx::query(
        "UPDATE artifact_usage SET artifacts = artifacts - 1, bytes = bytes - $2
         WHERE namespace = $1",
    )
    .bind(namespace)
    .bind(bytes)
    .execute(tx.conn())
    .await?;
    sqlx::query("DELETE FROM artifact_inputs WHERE artifact_id = $1")
        .bind(id.to_string())
        .execute(tx.conn())
        .await?;
    Ok(true)
}

/// Whether that attempt holds its lease.
pub async fn runs(tx: &mut Tx, namespace: &Namespace, task: TaskId, attempt: u32) -> Result<bool> {
    let n: i64 = sqlx::query_scalar(
        "SELECT COUNT(*) FROM tasks
         WHERE id = $1 AND namespace = $2 AND attempt = $3 AND state = 'RUNNING'",
    )
    .bind(task.to_string())
    .bind(namespace.as_str())
    .bind(attempt)
    .fetch_one(tx.conn())
    .await?;
    Ok(n > 0)
}

/// Notes that a task which is about to be accepted reads an artifact.
pub async fn refer(tx: &mut Tx, id: ArtifactId, task: TaskId, now: Micros) -> Result<()> {
    sqlx::query(
        "INSERT INTO artifact_inputs (artifact_id, task_id, create_time) VALUES ($1, $2, $3)
         ON CONFLICT (artifact_id, task_id) DO NOTHING",
    )
    .bind(id.to_string())
    .bind(task.to_string())
    .bind(now)
    .execute(tx.conn())
    .await?;
    Ok(())
}

/// Whether the task reads the artifact.
pub async fn reads(tx: &mut Tx, id: ArtifactId, task: TaskId) -> Result<bool> {
    let n: i64 = sqlx::query_scalar(
        "SELECT COUNT(*) FROM artifact_inputs WHERE artifact_id = $1 AND task_id = $2",
    )
    .bind(id.to_string())
    .bind(task.to_string())
    .fetch_one(tx.conn())
    .await?;
    Ok(n > 0)
}

/// A task that reads the artifact and has not ended, or is about to be accepted.
pub async fn reader(tx: &mut Tx, id: ArtifactId, now: Micros) -> Result<Option<String>> {
    let task = sqlx::query_scalar(
        "SELECT i.task_id FROM artifact_inputs i LEFT JOIN tasks t ON t.id = i.task_id
         WHERE i.artifact_id = $1
         AND (t.state IN ('QUEUED', 'RUNNING') OR (t.id IS NULL AND i.create_time > $2)) LIMIT 1",
    )
    .bind(id.to_string())
    .bind(now - UNACCEPTED)
    .fetch_optional(tx.conn())
    .await?;
    Ok(task)
}

/// Artifacts that nothing keeps: expired, or made by a task that is gone. None that a task reads
/// which has not ended.
pub async fn condemned(tx: &mut Tx, now: Micros, limit: u32) -> Result<Vec<ArtifactId>> {
    let ids: Vec<String> = sqlx::query_scalar(
        "SELECT a.id FROM artifacts a
         WHERE (a.expire_time <= $1 OR (a.task_id IS NOT NULL
             AND NOT EXISTS (SELECT 1 FROM tasks t WHERE t.id = a.task_id)))
         AND NOT EXISTS (SELECT 1 FROM artifact_inputs i LEFT JOIN tasks t ON t.id = i.task_id
             WHERE i.artifact_id = a.id
             AND (t.state IN ('QUEUED', 'RUNNING') OR (t.id IS NULL AND i.create_time > $2)))
         LIMIT $3",
    )
    .bind(now)
    .bind(now - UNACCEPTED)
    .bind(limit)
    .fetch_all(tx.conn())
    .await?;
    Ok(ids.iter().filter_map(|id| id.parse().ok()).collect())
}

/// Forgets references of tasks that were never accepted or are gone.
pub async fn forget_references(tx: &mut Tx, now: Micros) -> Result<()> {
    sqlx::query(
        "DELETE FROM artifact_inputs WHERE create_time <= $1
         AND NOT EXISTS (SELECT 1 FROM tasks t WHERE t.id = artifact_inputs.task_id)",
    )
    .bind(now - UNACCEPTED)
    .execute(tx.conn())
    .await?;
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    //! Rows of tasks, as far as artifacts look at them.

    use super::*;

    /// A task of namespace `a` in that state.
    pub async fn insert_task(tx: &mut Tx, task: TaskId, attempt: u32, state: &str) -> Result<()> {
        sqlx::query(
            "INSERT INTO tasks (id, namespace, model, input, params, priority, labels,
             required_labels, execution_timeout, retry, seed, create_time, state, revision, attempt,
             failed, lost, handed_back, base_sequence, last_sequence, reserved_sequence)
             VALUES ($1, 'a', 'm/m', '{}', '{}', 0, '{}', '{}', 1, '{}', 1, 1, $2, 1, $3,
             0, 0, 0, 0, 0, 0)",
        )
        .bind(task.to_string())
        .bind(state)
        .bind(attempt)
        .execute(tx.conn())
        .await?;
        Ok(())
    }

    /// The task ends.
    pub async fn end_task(tx: &mut Tx, task: TaskId) -> Result<()> {
        let end = sqlx::query("UPDATE tasks SET state = 'SUCCEEDED' WHERE id = $1");
        end.bind(task.to_string()).execute(tx.conn()).await?;
        Ok(())
    }

    /// The task is deleted.
    pub async fn delete_task(tx: &mut Tx, task: TaskId) -> Result<()> {
        let delete = sqlx::query("DELETE FROM tasks WHERE id = $1");
        delete.bind(task.to_string()).execute(tx.conn()).await?;
        Ok(())
    }
}
