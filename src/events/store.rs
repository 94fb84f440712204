//! SQL of the `task_events` table.
//!
//! `position` orders entries for watchers: on SQLite, where one ledger appends at a time, it follows
//! the order of commits. On Postgres a lower position may become visible after a higher one, so a
//! watcher keeps a snapshot of the database instead, and what it reads next is what a later
//! snapshot shows and that one does not ([`Place`]). What numbers a task's own entries, `sequence`,
//! is right in any case, since it is given under the revision of the task's row.

use bytes::Bytes;

use crate::{
    clock::Micros,
    db::{Bulk, Engine, FromRow, Json, Row, Script, Sql, Statement, Tx, Type},
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

static APPEND: Bulk = Bulk::together(
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

/// How far a watcher has read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// Up to a position, where positions follow the order of commits.
    Position(i64),
    /// What a snapshot shows; where a page was full, the snapshot that is being read and the last
    /// position of the page.
    Snapshot {
        /// All that this one shows was read.
        seen: String,
        /// This one is being read, behind that position.
        reading: Option<(String, i64)>,
    },
}

const NEWEST: Sql = Sql::new("SELECT max(position) FROM task_events");
const SNAPSHOT: Sql = Sql::each("", "SELECT pg_current_snapshot()::text");

async fn newest(tx: &mut Tx) -> Result<i64> {
    let (position,): (Option<i64>,) = tx.query(NEWEST).one().await?;
    Ok(position.unwrap_or(0))
}

async fn snapshot(tx: &mut Tx) -> Result<String> {
    Ok(tx.query(SNAPSHOT).one::<(String,)>().await?.0)
}

/// Behind all entries that are committed.
pub async fn end(tx: &mut Tx) -> Result<Place> {
    match tx.engine() {
        Engine::Sqlite => newest(tx).await.map(Place::Position),
        Engine::Postgres => Ok(Place::Snapshot { seen: snapshot(tx).await?, reading: None }),
    }
}

const AFTER: Sql = Sql::each(
    "SELECT e.position, e.task_id, e.sequence, e.frame
     FROM task_events e JOIN tasks t ON t.id = e.task_id
     WHERE e.position > $1 AND e.namespace = $2
       AND (t.model = $3 OR $3 IS NULL) AND (t.session_id = $4 OR $4 IS NULL)
       AND NOT EXISTS (
           SELECT 1 FROM json_each($5) wanted
           WHERE NOT EXISTS (SELECT 1 FROM json_each(t.labels) have
                             WHERE have.key = wanted.key AND have.value = wanted.value))
     ORDER BY e.position LIMIT $6",
    "",
);

const BETWEEN: Sql = Sql::each(
    "",
    "SELECT e.position, e.task_id, e.sequence, e.frame
     FROM task_events e JOIN tasks t ON t.id = e.task_id
     WHERE e.position > $1 AND e.namespace = $2
       AND (t.model = $3 OR $3 IS NULL) AND (t.session_id = $4 OR $4 IS NULL)
       AND t.labels @> $5::jsonb
       AND e.xid >= pg_snapshot_xmin($7::text::pg_snapshot)
       AND NOT pg_visible_in_snapshot(e.xid, $7::text::pg_snapshot)
       AND pg_visible_in_snapshot(e.xid, $8::text::pg_snapshot)
     ORDER BY e.position LIMIT $6",
);

/// A namespace's entries behind a place, at most `limit`, and the place behind them. Entries of a
/// task come in the order of their sequences, and each is found once.
pub async fn after(
    tx: &mut Tx,
    namespace: &Namespace,
    place: Place,
    filter: &Filter,
    limit: u32,
) -> Result<(Vec<Event>, Place)> {
    let labels = Json(filter.labels.clone());
    let (model, session) = (filter.model.as_ref(), filter.session.as_ref());
    match place {
        Place::Position(after) => {
            // Positions up to here are committed: there is one writer.
            let newest = newest(tx).await?;
            let query = tx.query(AFTER).bind(after).bind(namespace).bind(model).bind(session);
            let page: Vec<Event> = query.bind(labels).bind(limit).all().await?;
            let last = page.last().map(|event| event.position);
            let place = match last {
                Some(last) if page.len() == limit as usize => last,
                last => last.unwrap_or(after).max(newest),
            };
            Ok((page, Place::Position(place)))
        }
        Place::Snapshot { seen, reading } => {
            let (now, after) = match reading {
                Some(reading) => reading,
                None => (snapshot(tx).await?, 0),
            };
            let query = tx.query(BETWEEN).bind(after).bind(namespace).bind(model).bind(session);
            let query = query.bind(labels).bind(limit).bind(&seen).bind(&now);
            let page: Vec<Event> = query.all().await?;
            let last = page.last().map(|event| event.position);
            let place = match last {
                Some(last) if page.len() == limit as usize => {
                    Place::Snapshot { seen, reading: Some((now, last)) }
                }
                _ => Place::Snapshot { seen: now, reading: None },
            };
            Ok((page, place))
        }
    }
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
    Statement::Query(SNAPSHOT),
    Statement::Query(AFTER),
    Statement::Query(BETWEEN),
];
