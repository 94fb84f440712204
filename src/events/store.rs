//! SQL of the `task_events` table.
//!
//! `position` orders entries for watchers: it follows the order of commits as long as one ledger
//! appends at a time, which holds on SQLite and for one server on Postgres. Among several, a
//! lower position may become visible after a higher one; what numbers a task's own entries,
//! `sequence`, is right in any case, since it is given under the revision of the task's row.

use bytes::Bytes;

use crate::{
    clock::Micros,
    db::{Bulk, FromRow, Json, Row, Script, Sql, Statement, Tx, Type},
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

static APPEND: Bulk = Bulk::new(
    "WITH new (task_id, namespace, sequence, kind, time, frame) AS (",
    &[Type::Id, Type::Text, Type::Int, Type::Text, Type::Int, Type::Bytes],
    ")
     INSERT INTO task_events (task_id, namespace, sequence, kind, time, frame)
     SELECT * FROM new WHERE task_id IS NOT NULL
     ON CONFLICT (task_id, sequence) DO NOTHING",
);

/// Appends entries. A sequence that is there already is left as it is: what the recorder
/// repeats after an unknown commit is the same entry.
pub fn append(script: &mut Script, events: &[NewEvent]) -> Result<()> {
    script.add_rows(&APPEND, events, |row, event| {
        row.bind(event.task)
            .bind(&event.namespace)
            .bind(event.sequence as i64)
            .bind(event.kind)
            .bind(event.time)
            .bind(&event.frame);
        Ok(())
    })
}

const LIST: Sql = Sql::new(
    "SELECT position, task_id, sequence, frame FROM task_events
     WHERE task_id = $1 AND sequence > $2 ORDER BY sequence LIMIT $3",
);

/// A task's entries with sequences above `after`, oldest first.
pub async fn list(tx: &mut Tx, task: TaskId, after: u64, limit: u32) -> Result<Vec<Event>> {
    let after = i64::try_from(after).unwrap_or(i64::MAX);
    tx.query(LIST).bind(task).bind(after).bind(limit).all().await
}

const FRAME: Sql = Sql::new("SELECT frame FROM task_events WHERE task_id = $1 AND sequence = $2");

/// Whether this very entry is there.
pub async fn is_stored(tx: &mut Tx, event: &NewEvent) -> Result<bool> {
    let query = tx.query(FRAME).bind(event.task).bind(event.sequence as i64);
    let found: Option<(Bytes,)> = query.first().await?;
    Ok(found.is_some_and(|(frame,)| frame == event.frame))
}

const NEWEST: Sql = Sql::new("SELECT max(position) FROM task_events");

/// The position of the newest entry of all; 0 when there is none.
pub async fn newest(tx: &mut Tx) -> Result<i64> {
    let (position,): (Option<i64>,) = tx.query(NEWEST).one().await?;
    Ok(position.unwrap_or(0))
}

/// What follows a position, but for what the engines write differently.
macro_rules! after {
    ($with_labels:literal) => {
        concat!(
            "SELECT e.position, e.task_id, e.sequence, e.frame
             FROM task_events e JOIN tasks t ON t.id = e.task_id
             WHERE e.position > $1 AND e.namespace = $2
               AND (t.model = $3 OR $3 IS NULL) AND (t.session_id = $4 OR $4 IS NULL)
               AND ",
            $with_labels,
            " ORDER BY e.position LIMIT $6"
        )
    };
}

const AFTER: Sql = Sql::each(
    after!(
        "NOT EXISTS (
           SELECT 1 FROM json_each($5) wanted
           WHERE NOT EXISTS (SELECT 1 FROM json_each(t.labels) have
                             WHERE have.key = wanted.key AND have.value = wanted.value))"
    ),
    after!("t.labels @> $5::jsonb"),
);

/// A namespace's entries above a position, in the order of their commits, with the highest
/// position that was looked at.
pub async fn after(
    tx: &mut Tx,
    namespace: &Namespace,
    position: i64,
    filter: &Filter,
    limit: u32,
) -> Result<Vec<Event>> {
    tx.query(AFTER)
        .bind(position)
        .bind(namespace)
        .bind(filter.model.as_ref())
        .bind(filter.session.as_ref())
        .bind(Json(filter.labels.clone()))
        .bind(limit)
        .all()
        .await
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

impl FromRow for Event {
    fn from_row(row: &Row) -> Result<Self> {
        Ok(Self {
            position: row.get(0)?,
            task: row.get(1)?,
            sequence: row.get::<i64>(2)? as u64,
            frame: row.get(3)?,
        })
    }
}

/// Statements of this file.
pub const STATEMENTS: &[Statement] = &[
    Statement::Rows(&APPEND),
    Statement::Query(LIST),
    Statement::Query(FRAME),
    Statement::Query(NEWEST),
    Statement::Query(AFTER),
];
