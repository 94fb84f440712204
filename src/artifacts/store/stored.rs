//! SQL of the table `artifact_bytes`: which bytes are, or may be, in the store.

use super::int;
use crate::{blob::Key, clock::Micros, db::Tx, error::Result};

/// Notes that somebody is about to keep these bytes, or to refer to them. Nobody deletes them for a
/// while afterwards. `false` when they are being deleted at this moment.
pub async fn touch(tx: &mut Tx, key: &Key, size: u64, now: Micros) -> Result<bool> {
    let touched = sqlx::query(
        "INSERT INTO artifact_bytes (type, sha256, size_bytes, deleting, touch_time)
         VALUES ($1, $2, $3, 0, $4) ON CONFLICT (type, sha256) DO UPDATE
         SET touch_time = excluded.touch_time WHERE artifact_bytes.deleting = 0",
    )
    .bind(&key.kind)
    .bind(key.digest.to_string())
    .bind(int(size))
    .bind(now)
    .execute(tx.conn())
    .await?;
    Ok(touched.rows_affected() > 0)
}

/// Notes that they are referred to now; `false` when somebody deletes them, or has.
pub async fn confirm(tx: &mut Tx, key: &Key, now: Micros) -> Result<bool> {
    let confirmed = sqlx::query(
        "UPDATE artifact_bytes SET touch_time = $3
         WHERE type = $1 AND sha256 = $2 AND deleting = 0",
    )
    .bind(&key.kind)
    .bind(key.digest.to_string())
    .bind(now)
    .execute(tx.conn())
    .await?;
    Ok(confirmed.rows_affected() > 0)
}

/// Bytes that no artifact has and that nobody touched since `before`, and those whose deletion was
/// begun and not ended. They are marked: from now on nobody may refer to them.
pub async fn condemn(tx: &mut Tx, before: Micros, limit: u32) -> Result<Vec<(Key, u64)>> {
    let rows: Vec<(String, String, i64)> = sqlx::query_as(
        "UPDATE artifact_bytes SET deleting = 1 WHERE (type, sha256) IN (
             SELECT b.type, b.sha256 FROM artifact_bytes b
             WHERE b.touch_time <= $1 AND NOT EXISTS (
                 SELECT 1 FROM artifacts a WHERE a.type = b.type AND a.sha256 = b.sha256)
             LIMIT $2)
         RETURNING type, sha256, size_bytes",
    )
    .bind(before)
    .bind(limit)
    .fetch_all(tx.conn())
    .await?;
    let keys = rows.into_iter().filter_map(|(kind, digest, size)| {
        Some((Key { kind, digest: digest.parse().ok()? }, u64::try_from(size).unwrap_or(0)))
    });
    Ok(keys.collect())
}

/// Notes that they were deleted.
pub async fn forget(tx: &mut Tx, key: &Key) -> Result<()> {
    sqlx::query("DELETE FROM artifact_bytes WHERE type = $1 AND sha256 = $2 AND deleting = 1")
        .bind(&key.kind)
        .bind(key.digest.to_string())
        .execute(tx.conn())
        .await?;
    Ok(())
}
