//! SQL of the `task_events` table.

use bytes::Bytes;

use crate::{
    clock::Micros,
    db::{Bulk, Script, Tx},
    error::Result,
    id::{Namespace, TaskId},
};

/// An entry to append.
#[derive(Debug, Clone)]
pub struct NewEvent {
    /// Task.
    pub task: TaskId,
    /// Its namespace.
    pub namespace: Namespace,
    /// Position in the task's stream.
    pub sequence: u64,
    /// Name of the body's field, such as `queued`.
    pub kind: &'static str,
    /// When.
    pub time: Micros,
    /// Encoded event.
    pub frame: Bytes,
}

/// An entry as a watcher reads it.
#[derive(Debug, Clone)]
pub struct Event {
    /// Order of commits.
    pub position: i64,
    /// Task.
    pub task: TaskId,
    /// Position in the task's stream.
    pub sequence: u64,
    /// Encoded event.
    pub frame: Bytes,
}

/// Appends entries. A sequence that is there already is left as it is: what the recorder
/// repeats after an unknown commit is the same entry.
pub fn append(script: &mut Script, events: &[NewEvent]) -> Result<()> {
    static INSERT: Bulk = Bulk::new(
        "INSERT INTO task_events (task_id, namespace, sequence, kind, time, frame)
         SELECT * FROM (VALUES ",
        6,
        ") WHERE column1 IS NOT NULL
         ON CONFLICT (task_id, sequence) DO NOTHING",
    );
    script.add_rows(&INSERT, events, |row, event| {
        row.bind(event.task.to_string())
            .bind(event.namespace.as_str().to_owned())
            .bind(event.sequence as i64)
            .bind(event.kind)
            .bind(event.time)
            .bind(event.frame.to_vec());
        Ok(())
    })
}

/// A task's entries with sequences above `after`, oldest first.
pub async fn list(tx: &mut Tx, task: TaskId, after: u64, limit: u32) -> Result<Vec<Event>> {
    let rows: Vec<(i64, String, i64, Vec<u8>)> = sqlx::query_as(
        "SELECT position, task_id, sequence, frame FROM task_events
         WHERE task_id = $1 AND sequence > $2 ORDER BY sequence LIMIT $3",
    )
    .bind(task.to_string())
    .bind(i64::try_from(after).unwrap_or(i64::MAX))
    .bind(limit)
    .fetch_all(tx.conn())
    .await?;
    rows.into_iter().map(event).collect()
}

/// The position of the newest entry of all; 0 when there is none.
pub async fn newest(tx: &mut Tx) -> Result<i64> {
    let position: Option<i64> =
        sqlx::query_scalar("SELECT max(position) FROM task_events").fetch_one(tx.conn()).await?;
    Ok(position.unwrap_or(0))
}

/// A namespace's entries above a position, in the order of their commits, with the highest
/// position that was looked at.
pub async fn after(
    tx: &mut Tx,
    namespace: &Namespace,
    position: i64,
    filter: &Filter,
    limit: u32,
) -> Result<Vec<Event>> {
    let rows: Vec<(i64, String, i64, Vec<u8>)> = sqlx::query_as(
        "SELECT e.position, e.task_id, e.sequence, e.frame
         FROM task_events e JOIN tasks t ON t.id = e.task_id
         WHERE e.position > $1 AND e.namespace = $2
           AND ($3 IS NULL OR t.model = $3) AND ($4 IS NULL OR t.session_id = $4)
           AND NOT EXISTS (
             SELECT 1 FROM json_each($5) wanted
             WHERE NOT EXISTS (SELECT 1 FROM json_each(t.labels) have
                               WHERE have.key = wanted.key AND have.value = wanted.value))
         ORDER BY e.position LIMIT $6",
    )
    .bind(position)
    .bind(namespace.as_str().to_owned())
    .bind(filter.model.clone())
    .bind(filter.session.clone())
    .bind(filter.labels.clone())
    .bind(limit)
    .fetch_all(tx.conn())
    .await?;
    rows.into_iter().map(event).collect()
}

/// Which tasks a watcher follows.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// `owner/name`.
    pub model: Option<String>,
    /// Session.
    pub session: Option<String>,
    /// JSON object of the labels that a task must have.
    pub labels: String,
}

fn event((position, task, sequence, frame): (i64, String, i64, Vec<u8>)) -> Result<Event> {
    let task = task.parse().map_err(crate::error::Error::internal)?;
    Ok(Event { position, task, sequence: sequence as u64, frame: frame.into() })
}
