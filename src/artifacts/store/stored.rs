//! SQL of the table `artifact_bytes`: which bytes are, or may be, in the store.

use super::int;
use crate::{
    blob::Key,
    clock::Micros,
    db::{Sql, Statement, Tx},
    error::Result,
};

const TOUCH: Sql = Sql::new(
    "INSERT INTO artifact_bytes (type, sha256, size_bytes, deleting, touch_time)
     VALUES ($1, $2, $3, 0, $4) ON CONFLICT (type, sha256) DO UPDATE
     SET touch_time = excluded.touch_time WHERE artifact_bytes.deleting = 0",
);

/// Notes that somebody is about to keep these bytes, or to refer to them. Nobody deletes them for a
/// while afterwards. `false` when they are being deleted at this moment.
pub async fn touch(tx: &mut Tx, key: &Key, size: u64, now: Micros) -> Result<bool> {
    let touch = tx.query(TOUCH).bind(&key.kind).bind(key.digest.to_string());
    Ok(touch.bind(int(size)).bind(now).run().await? > 0)
}

const CONFIRM: Sql = Sql::new(
    "UPDATE artifact_bytes SET touch_time = $3 WHERE type = $1 AND sha256 = $2 AND deleting = 0",
);

/// Notes that they are referred to now; `false` when somebody deletes them, or has.
pub async fn confirm(tx: &mut Tx, key: &Key, now: Micros) -> Result<bool> {
    let confirm = tx.query(CONFIRM).bind(&key.kind).bind(key.digest.to_string()).bind(now);
    Ok(confirm.run().await? > 0)
}

/// The time is asked for twice: of rows that were touched by a transaction that committed while this
/// one waited for them, only the outer condition sees the new one.
const CONDEMN: Sql = Sql::new(
    "UPDATE artifact_bytes SET deleting = 1 WHERE touch_time <= $1 AND (type, sha256) IN (
         SELECT b.type, b.sha256 FROM artifact_bytes b
         WHERE b.touch_time <= $1 AND NOT EXISTS (
             SELECT 1 FROM artifacts a WHERE a.type = b.type AND a.sha256 = b.sha256)
         LIMIT $2)
     RETURNING type, sha256, size_bytes",
);

/// Bytes that no artifact has and that nobody touched since `before`, and those whose deletion was
/// begun and not ended. They are marked: from now on nobody may refer to them.
pub async fn condemn(tx: &mut Tx, before: Micros, limit: u32) -> Result<Vec<(Key, u64)>> {
    let rows: Vec<(String, String, u64)> = tx.query(CONDEMN).bind(before).bind(limit).all().await?;
    let keys = rows.into_iter().filter_map(|(kind, digest, size)| {
        Some((Key { kind, digest: digest.parse().ok()? }, size))
    });
    Ok(keys.collect())
}

const FORGET: Sql =
    Sql::new("DELETE FROM artifact_bytes WHERE type = $1 AND sha256 = $2 AND deleting = 1");

/// Notes that they were deleted.
pub async fn forget(tx: &mut Tx, key: &Key) -> Result<()> {
    let forget = tx.query(FORGET).bind(&key.kind).bind(key.digest.to_string());
    forget.run().await.map(drop)
}

/// Statements of this file.
pub const STATEMENTS: &[Statement] = &[
    Statement::Query(TOUCH),
    Statement::Query(CONFIRM),
    Statement::Query(CONDEMN),
    Statement::Query(FORGET),
];
