//! SQL of what readers of a task's stream find in storage: `segments`, `transcripts`, and
//! `task_events` as far as readers of one task need it.

use std::ops::ControlFlow;

use crate::{
    blob::Digest,
    db::{Bulk, FromRow, Row, Script, Sql, Statement, Tx, Type},
    error::Result,
    id::TaskId,
};

/// What an entry of the timeline means for the order of the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Follows the entry before it.
    Plain,
    /// Stands for all sequences since the entry before it.
    Gap,
    /// Is the last.
    Ended,
}

/// An entry of the timeline.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Sequence.
    pub sequence: u64,
    /// Role.
    pub role: Role,
    /// Encoded event.
    pub frame: Vec<u8>,
}

/// Runner-made entries with the contiguous sequences from `first` on.
#[derive(Clone, Debug)]
pub struct Segment {
    /// Sequence of the first.
    pub first: u64,
    /// Sequence of the last.
    pub last: u64,
    /// Length-delimited frames.
    pub frames: Vec<u8>,
}

/// Where the transcript of an ended task lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transcript {
    /// The task.
    pub task: TaskId,
    /// The blob.
    pub blob: Digest,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// Lowest sequence.
    pub first: u64,
    /// Highest sequence.
    pub last: u64,
}

const ENTRIES: Sql = Sql::new(
    "SELECT sequence, kind, frame FROM task_events
     WHERE task_id = $1 AND sequence > $2 ORDER BY sequence LIMIT $3",
);

/// Entries of the timeline after a sequence.
pub async fn entries(tx: &mut Tx, task: TaskId, after: u64, limit: u32) -> Result<Vec<Entry>> {
    tx.query(ENTRIES).bind(task).bind(integer(after)).bind(limit).all().await
}

impl FromRow for Entry {
    fn from_row(row: &Row) -> Result<Self> {
        Ok(Self {
            sequence: row.get::<i64>(0)? as u64,
            role: match row.get::<String>(1)?.as_str() {
                "gap" => Role::Gap,
                "ended" => Role::Ended,
                _ => Role::Plain,
            },
            frame: row.get(2)?,
        })
    }
}

const LAST_ENTRY: Sql = Sql::new(
    "SELECT sequence, kind FROM task_events WHERE task_id = $1 ORDER BY sequence DESC LIMIT 1",
);

/// Sequence of a task's last entry of the timeline, and whether it is its end; `None` when
/// there is no such task.
pub async fn last_entry(tx: &mut Tx, task: TaskId) -> Result<Option<(u64, bool)>> {
    let row: Option<(i64, String)> = tx.query(LAST_ENTRY).bind(task).first().await?;
    Ok(row.map(|(sequence, kind)| (sequence as u64, kind == "ended")))
}

// The first may begin before the sequence, the others follow it.
const SEGMENTS: Sql = Sql::new(
    "SELECT first_sequence, last_sequence, frames FROM segments
     WHERE task_id = $1 AND last_sequence > $2 AND first_sequence >= coalesce(
         (SELECT max(first_sequence) FROM segments
          WHERE task_id = $1 AND first_sequence <= $2 + 1), 0)
     ORDER BY first_sequence",
);

/// Segments that hold what follows a sequence, until there are `bytes` of them; and whether
/// there are.
pub async fn segments(
    tx: &mut Tx,
    task: TaskId,
    after: u64,
    bytes: usize,
) -> Result<(Vec<Segment>, bool)> {
    let mut segments = Vec::new();
    let mut size = 0;
    let rows = tx.query(SEGMENTS).bind(task).bind(integer(after));
    let enough = rows.each(|segment: Segment| {
        size += segment.frames.len();
        segments.push(segment);
        if size >= bytes { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    let enough = enough.await?;
    Ok((segments, enough))
}

impl FromRow for Segment {
    fn from_row(row: &Row) -> Result<Self> {
        Ok(Self {
            first: row.get::<i64>(0)? as u64,
            last: row.get::<i64>(1)? as u64,
            frames: row.get(2)?,
        })
    }
}

const TRANSCRIPT: Sql = Sql::new(
    r#"SELECT task_id, blob, "offset", length, first_sequence, last_sequence
       FROM transcripts WHERE task_id = $1"#,
);

/// The archived transcript of a task.
pub async fn transcript(tx: &mut Tx, task: TaskId) -> Result<Option<Transcript>> {
    tx.query(TRANSCRIPT).bind(task).first().await
}

impl FromRow for Transcript {
    fn from_row(row: &Row) -> Result<Self> {
        Ok(Self {
            task: row.get(0)?,
            blob: row.parse(1)?,
            offset: row.get::<i64>(2)? as u64,
            length: row.get::<i64>(3)? as u64,
            first: row.get::<i64>(4)? as u64,
            last: row.get::<i64>(5)? as u64,
        })
    }
}

// Steps from task to task through the index, past the many segments of each.
const UNARCHIVED: Sql = Sql::new(
    "WITH RECURSIVE owners (id) AS (
         SELECT (SELECT task_id FROM segments WHERE task_id > $1 ORDER BY task_id LIMIT 1)
         UNION ALL
         SELECT (SELECT task_id FROM segments WHERE task_id > owners.id
                 ORDER BY task_id LIMIT 1)
         FROM owners WHERE owners.id IS NOT NULL)
     SELECT owners.id FROM owners CROSS JOIN tasks
     WHERE tasks.id = owners.id AND tasks.state NOT IN ('QUEUED', 'RUNNING') LIMIT $2",
);

/// Ended tasks that have segments still, after a task in the order of ids.
pub async fn unarchived(tx: &mut Tx, after: Option<TaskId>, limit: u32) -> Result<Vec<TaskId>> {
    let after = after.unwrap_or(TaskId::MIN);
    let rows: Vec<(TaskId,)> = tx.query(UNARCHIVED).bind(after).bind(limit).all().await?;
    Ok(rows.into_iter().map(|(id,)| id).collect())
}

static ARCHIVE: Bulk = Bulk::new(
    "WITH new (task_id, blob, start, length, first_sequence, last_sequence) AS (",
    &[Type::Id, Type::Text, Type::Int, Type::Int, Type::Int, Type::Int],
    r#")
     INSERT INTO transcripts (task_id, blob, "offset", length, first_sequence, last_sequence)
     SELECT * FROM new WHERE EXISTS (SELECT 1 FROM tasks WHERE tasks.id = new.task_id)"#,
);
static DELETE_SEGMENTS: Bulk =
    Bulk::new("DELETE FROM segments WHERE task_id IN (", &[Type::Id], ")");

/// Puts transcripts in the place of their tasks' segments; tasks deleted meanwhile get none.
pub fn archive(script: &mut Script, transcripts: &[Transcript]) -> Result<()> {
    script.add_rows(&ARCHIVE, transcripts, |row, transcript| {
        row.bind(transcript.task)
            .bind(transcript.blob.to_string())
            .bind(integer(transcript.offset))
            .bind(integer(transcript.length))
            .bind(integer(transcript.first))
            .bind(integer(transcript.last));
        Ok(())
    })?;
    script.add_rows(&DELETE_SEGMENTS, transcripts, |row, transcript| {
        row.bind(transcript.task);
        Ok(())
    })
}

const IS_REFERENCED: Sql = Sql::new("SELECT EXISTS (SELECT 1 FROM transcripts WHERE blob = $1)");

/// Whether a transcript lies in the blob.
pub async fn is_referenced(tx: &mut Tx, blob: Digest) -> Result<bool> {
    let (referenced,) = tx.query(IS_REFERENCED).bind(blob.to_string()).one().await?;
    Ok(referenced)
}

fn integer(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// Statements of this file.
pub const STATEMENTS: &[Statement] = &[
    Statement::Query(ENTRIES),
    Statement::Query(LAST_ENTRY),
    Statement::Query(SEGMENTS),
    Statement::Query(TRANSCRIPT),
    Statement::Query(UNARCHIVED),
    Statement::Rows(&ARCHIVE),
    Statement::Rows(&DELETE_SEGMENTS),
    Statement::Query(IS_REFERENCED),
];
