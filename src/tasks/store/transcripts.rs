//! SQL of what readers of a task's stream find in storage: `segments`, `transcripts`, and
//! `task_events` as far as readers of one task need it.

use futures_util::TryStreamExt;

use crate::{
    blob::Digest,
    db::{Bulk, Tx, chunks},
    error::{Error, Result},
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

/// Entries of the timeline after a sequence.
pub async fn entries(tx: &mut Tx, task: TaskId, after: u64, limit: u32) -> Result<Vec<Entry>> {
    let rows: Vec<(i64, String, Vec<u8>)> = sqlx::query_as(
        "SELECT sequence, kind, frame FROM task_events
         WHERE task_id = $1 AND sequence > $2 ORDER BY sequence LIMIT $3",
    )
    .bind(task.to_string())
    .bind(integer(after))
    .bind(limit)
    .fetch_all(tx.conn())
    .await?;
    let entry = |(sequence, kind, frame): (i64, String, Vec<u8>)| Entry {
        sequence: sequence as u64,
        role: match kind.as_str() {
            "gap" => Role::Gap,
            "ended" => Role::Ended,
            _ => Role::Plain,
        },
        frame,
    };
    Ok(rows.into_iter().map(entry).collect())
}

/// Sequence of a task's last entry of the timeline, and whether it is its end; `None` when
/// there is no such task.
pub async fn last_entry(tx: &mut Tx, task: TaskId) -> Result<Option<(u64, bool)>> {
    let row: Option<(i64, String)> = sqlx::query_as(
        "SELECT sequence, kind FROM task_events WHERE task_id = $1 ORDER BY sequence DESC LIMIT 1",
    )
    .bind(task.to_string())
    .fetch_optional(tx.conn())
    .await?;
    Ok(row.map(|(sequence, kind)| (sequence as u64, kind == "ended")))
}

/// Segments that hold what follows a sequence, until there are `bytes` of them.
pub async fn segments(
    tx: &mut Tx,
    task: TaskId,
    after: u64,
    bytes: usize,
) -> Result<(Vec<Segment>, bool)> {
    // The first may begin before the sequence, the others follow it.
    let mut rows = sqlx::query_as::<_, (i64, i64, Vec<u8>)>(
        "SELECT first_sequence, last_sequence, frames FROM segments
         WHERE task_id = $1 AND last_sequence > $2 AND first_sequence >= coalesce(
             (SELECT max(first_sequence) FROM segments
              WHERE task_id = $1 AND first_sequence <= $2 + 1), 0)
         ORDER BY first_sequence",
    )
    .bind(task.to_string())
    .bind(integer(after))
    .fetch(tx.conn());
    let mut segments = Vec::new();
    let mut size = 0;
    while let Some((first, last, frames)) = rows.try_next().await? {
        size += frames.len();
        segments.push(Segment { first: first as u64, last: last as u64, frames });
        if size >= bytes {
            return Ok((segments, true));
        }
    }
    Ok((segments, false))
}

/// The archived transcript of a task.
pub async fn transcript(tx: &mut Tx, task: TaskId) -> Result<Option<Transcript>> {
    let row: Option<(String, i64, i64, i64, i64)> = sqlx::query_as(
        r#"SELECT blob, "offset", length, first_sequence, last_sequence
           FROM transcripts WHERE task_id = $1"#,
    )
    .bind(task.to_string())
    .fetch_optional(tx.conn())
    .await?;
    row.map(|(blob, offset, length, first, last)| {
        Ok(Transcript {
            task,
            blob: blob.parse().map_err(Error::internal)?,
            offset: offset as u64,
            length: length as u64,
            first: first as u64,
            last: last as u64,
        })
    })
    .transpose()
}

/// Ended tasks that have segments still, after a task in the order of ids.
pub async fn unarchived(tx: &mut Tx, after: Option<TaskId>, limit: u32) -> Result<Vec<TaskId>> {
    // Steps from task to task through the index, past the many segments of each.
    let rows: Vec<String> = sqlx::query_scalar(
        "WITH RECURSIVE owners (id) AS (
             SELECT min(task_id) FROM segments WHERE task_id > $1
             UNION ALL
             SELECT (SELECT min(task_id) FROM segments WHERE task_id > owners.id)
             FROM owners WHERE owners.id IS NOT NULL)
         SELECT owners.id FROM owners CROSS JOIN tasks ON tasks.id = owners.id
         WHERE tasks.state NOT IN ('QUEUED', 'RUNNING') LIMIT $2",
    )
    .bind(after.map(|task| task.to_string()).unwrap_or_default())
    .bind(limit)
    .fetch_all(tx.conn())
    .await?;
    rows.iter().map(|id| id.parse().map_err(Error::internal)).collect()
}

/// Puts transcripts in the place of their tasks' segments; tasks deleted meanwhile get none.
pub async fn archive(tx: &mut Tx, transcripts: &[Transcript]) -> Result<()> {
    static INSERT: Bulk = Bulk::new(
        r#"INSERT INTO transcripts
             (task_id, blob, "offset", length, first_sequence, last_sequence)
           SELECT * FROM (VALUES "#,
        6,
        ") WHERE EXISTS (SELECT 1 FROM tasks WHERE id = column1)",
    );
    static DELETE: Bulk = Bulk::new("DELETE FROM segments WHERE task_id IN (VALUES ", 1, ")");
    for chunk in chunks(transcripts) {
        let mut insert = sqlx::query(INSERT.text(chunk.len()));
        let mut delete = sqlx::query(DELETE.text(chunk.len()));
        for transcript in chunk {
            insert = insert
                .bind(transcript.task.to_string())
                .bind(transcript.blob.to_string())
                .bind(integer(transcript.offset))
                .bind(integer(transcript.length))
                .bind(integer(transcript.first))
                .bind(integer(transcript.last));
            delete = delete.bind(transcript.task.to_string());
        }
        insert.execute(tx.conn()).await?;
        delete.execute(tx.conn()).await?;
    }
    Ok(())
}

/// Whether a transcript lies in the blob.
pub async fn is_referenced(tx: &mut Tx, blob: Digest) -> Result<bool> {
    Ok(sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM transcripts WHERE blob = $1)")
        .bind(blob.to_string())
        .fetch_one(tx.conn())
        .await?)
}

fn integer(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
