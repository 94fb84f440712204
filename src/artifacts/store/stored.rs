//! SQL of the tables `artifact_bytes`, which bytes are, or may be, in the store and wanted, and
//! `artifact_garbage`, which are to be deleted.
//!
//! A row of bytes has a generation, which is part of their key. It is made with the row and goes
//! with it into the garbage, never to be used again: see [`crate::artifacts::Artifacts::collect`].

use super::int;
use crate::{
    blob::Key,
    clock::Micros,
    db::{FromRow, Row, Sql, Statement, Tx},
    error::Result,
};

/// A row that a server of a version without generations marked loses its bytes to that server.
const TOUCH: Sql = Sql::new(
    "INSERT INTO artifact_bytes (type, sha256, size_bytes, generation, deleting, touch_time)
     VALUES ($1, $2, $3, $4, 0, $5) ON CONFLICT (type, sha256) DO UPDATE
     SET touch_time = excluded.touch_time, deleting = 0,
         generation = CASE artifact_bytes.deleting
             WHEN 0 THEN artifact_bytes.generation ELSE excluded.generation END
     RETURNING generation",
);

/// Notes that somebody is about to keep these bytes, or to refer to them, and returns where. Nobody
/// deletes them for a while afterwards. `new` has the generation that they get where there is none
/// yet: one that was never used.
pub async fn touch(tx: &mut Tx, new: Key, size: u64, now: Micros) -> Result<Key> {
    let touch = tx.query(TOUCH).bind(&new.kind).bind(new.digest.to_string()).bind(int(size));
    let (generation,) = touch.bind(&new.generation).bind(now).one().await?;
    Ok(Key { generation, ..new })
}

const CONFIRM: Sql = Sql::new(
    "UPDATE artifact_bytes SET size_bytes = $4, touch_time = $5
     WHERE type = $1 AND sha256 = $2 AND generation = $3 AND deleting = 0",
);

/// Notes that they are referred to now, and how many they are; `false` when they were condemned.
pub async fn confirm(tx: &mut Tx, key: &Key, size: u64, now: Micros) -> Result<bool> {
    let confirm = tx.query(CONFIRM).bind(&key.kind).bind(key.digest.to_string());
    let confirm = confirm.bind(&key.generation).bind(int(size)).bind(now);
    Ok(confirm.run().await? > 0)
}

/// The time is asked for twice: of rows that were touched by a transaction that committed while this
/// one waited for them, only the outer condition sees the new one.
const CONDEMN: Sql = Sql::new(
    "DELETE FROM artifact_bytes WHERE touch_time <= $1 AND (type, sha256) IN (
         SELECT b.type, b.sha256 FROM artifact_bytes b
         WHERE b.touch_time <= $1 AND NOT EXISTS (
             SELECT 1 FROM artifacts a WHERE a.type = b.type AND a.sha256 = b.sha256)
         AND NOT EXISTS (
             SELECT 1 FROM uploads u WHERE u.type = b.type AND u.sha256 = b.sha256
             AND u.checkpoint IS NOT NULL)
         LIMIT $2)
     RETURNING type, sha256, generation",
);

impl FromRow for Key {
    fn from_row(row: &Row) -> Result<Self> {
        Ok(Self { kind: row.get(0)?, digest: row.parse(1)?, generation: row.get(2)? })
    }
}

/// Moves bytes that no artifact has, that no upload is on its way to and that nobody touched since
/// `before`, to the garbage; says how many there were.
pub async fn condemn(tx: &mut Tx, before: Micros, limit: u32, now: Micros) -> Result<u64> {
    let found: Vec<Key> = tx.query(CONDEMN).bind(before).bind(limit).all().await?;
    for key in &found {
        discard(tx, key, now).await?;
    }
    Ok(found.len() as u64)
}

const DISCARD: Sql = Sql::new(
    "INSERT INTO artifact_garbage (type, sha256, generation, condemn_time)
     VALUES ($1, $2, $3, $4) ON CONFLICT (type, sha256, generation) DO NOTHING",
);

/// Adds bytes to the garbage, which must have no row any more.
pub async fn discard(tx: &mut Tx, key: &Key, now: Micros) -> Result<()> {
    let discard = tx.query(DISCARD).bind(&key.kind).bind(key.digest.to_string());
    discard.bind(&key.generation).bind(now).run().await.map(drop)
}

const GARBAGE: Sql = Sql::new(
    "SELECT type, sha256, generation FROM artifact_garbage
     ORDER BY type, sha256, generation LIMIT $1",
);

/// Bytes that are to be deleted.
pub async fn garbage(tx: &mut Tx, limit: u32) -> Result<Vec<Key>> {
    tx.query(GARBAGE).bind(limit).all().await
}

const FORGET: Sql =
    Sql::new("DELETE FROM artifact_garbage WHERE type = $1 AND sha256 = $2 AND generation = $3");

/// Notes that they were deleted; `false` when somebody else did before.
pub async fn forget(tx: &mut Tx, key: &Key) -> Result<bool> {
    let forget = tx.query(FORGET).bind(&key.kind).bind(key.digest.to_string());
    Ok(forget.bind(&key.generation).run().await? > 0)
}

/// Statements of this file.
pub const STATEMENTS: &[Statement] = &[
    Statement::Query(TOUCH),
    Statement::Query(CONFIRM),
    Statement::Query(CONDEMN),
    Statement::Query(DISCARD),
    Statement::Query(GARBAGE),
    Statement::Query(FORGET),
];
