//! SQL of the table `uploads`.

use std::time::Duration;

use sqlx::{FromRow, Row as _, sqlite::SqliteRow};

use super::{int, origin, parse, parse_optional, size};
use crate::{
    artifacts::model::{Spec, Upload},
    blob::Checkpoint,
    clock::Micros,
    db::Tx,
    error::{Error, Result},
    id::{ArtifactId, Namespace, UploadId},
};

impl FromRow<'_, SqliteRow> for Upload {
    fn from_row(row: &SqliteRow) -> Result<Self, sqlx::Error> {
        let announced: Option<i64> = row.try_get("size_bytes")?;
        let ttl: Option<i64> = row.try_get("ttl")?;
        let checkpoint: Option<&str> = row.try_get("checkpoint")?;
        let checkpoint = checkpoint.map(serde_json::from_str).transpose().map_err(|source| {
            sqlx::Error::ColumnDecode { index: "checkpoint".into(), source: Box::new(source) }
        })?;
        Ok(Self {
            id: parse(row, "id")?,
            namespace: row.try_get::<String, _>("namespace")?.into(),
            spec: Spec {
                name: row.try_get("name")?,
                kind: row.try_get("type")?,
                mime_type: row.try_get("mime_type")?,
                size: announced.and_then(|size| u64::try_from(size).ok()),
                digest: parse_optional(row, "sha256")?,
                ttl: ttl.and_then(|ttl| u64::try_from(ttl).ok()).map(Duration::from_micros),
            },
            origin: origin(row)?,
            create_time: row.try_get("create_time")?,
            expire_time: row.try_get("expire_time")?,
            received: size(row, "received")?,
            checkpoint,
            artifact: parse_optional(row, "artifact_id")?,
        })
    }
}

/// Adds an upload of which nothing has come.
pub async fn insert(tx: &mut Tx, upload: &Upload) -> Result<()> {
    let (task, attempt) = upload.origin.attempt.unzip();
    let ttl = upload.spec.ttl.map(|ttl| i64::try_from(ttl.as_micros()).unwrap_or(i64::MAX));
    sqlx::query(
        "INSERT INTO uploads (id, namespace, name, type, mime_type, size_bytes, sha256, ttl,
         task_id, attempt, created_by, create_time, expire_time, received)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, 0)",
    )
    .bind(upload.id.to_string())
    .bind(upload.namespace.as_str())
    .bind(&upload.spec.name)
    .bind(&upload.spec.kind)
    .bind(&upload.spec.mime_type)
    .bind(upload.spec.size.map(int))
    .bind(upload.spec.digest.map(|digest| digest.to_string()))
    .bind(ttl)
    .bind(task.map(|task| task.to_string()))
    .bind(attempt.unwrap_or(0))
    .bind(&upload.origin.by)
    .bind(upload.create_time)
    .bind(upload.expire_time)
    .execute(tx.conn())
    .await?;
    Ok(())
}

/// The upload, which must be in the namespace and not have expired.
pub async fn get(tx: &mut Tx, namespace: &Namespace, id: UploadId, now: Micros) -> Result<Upload> {
    sqlx::query_as("SELECT * FROM uploads WHERE id = $1 AND namespace = $2 AND expire_time > $3")
        .bind(id.to_string())
        .bind(namespace.as_str())
        .bind(now)
        .fetch_optional(tx.conn())
        .await?
        .ok_or_else(|| Error::not_found("upload", id))
}

/// An upload that was announced in the same words by the same caller and is not complete.
pub async fn find_alike(tx: &mut Tx, wanted: &Upload, now: Micros) -> Result<Option<Upload>> {
    let (task, attempt) = wanted.origin.attempt.unzip();
    let found = sqlx::query_as(
        "SELECT * FROM uploads WHERE namespace = $1 AND sha256 = $2 AND size_bytes = $3
         AND name = $4 AND type = $5 AND mime_type = $6 AND created_by = $7
         AND COALESCE(task_id, '') = $8 AND attempt = $9 AND expire_time > $10
         AND artifact_id IS NULL ORDER BY id LIMIT 1",
    )
    .bind(wanted.namespace.as_str())
    .bind(wanted.spec.digest.map(|digest| digest.to_string()))
    .bind(wanted.spec.size.map(int))
    .bind(&wanted.spec.name)
    .bind(&wanted.spec.kind)
    .bind(&wanted.spec.mime_type)
    .bind(&wanted.origin.by)
    .bind(task.map(|task| task.to_string()).unwrap_or_default())
    .bind(attempt.unwrap_or(0))
    .bind(now)
    .fetch_optional(tx.conn())
    .await?;
    Ok(found)
}

/// Uploads of a namespace that are not complete.
pub async fn count_open(tx: &mut Tx, namespace: &Namespace, now: Micros) -> Result<u64> {
    let n: i64 = sqlx::query_scalar(
        "SELECT COUNT(*) FROM uploads
         WHERE namespace = $1 AND artifact_id IS NULL AND expire_time > $2",
    )
    .bind(namespace.as_str())
    .bind(now)
    .fetch_one(tx.conn())
    .await?;
    Ok(u64::try_from(n).unwrap_or(0))
}

/// Notes how far it has come.
pub async fn note(tx: &mut Tx, id: UploadId, checkpoint: Option<&Checkpoint>) -> Result<()> {
    let received = checkpoint.map_or(0, Checkpoint::received);
    let text = checkpoint.map(serde_json::to_string).transpose().map_err(Error::internal)?;
    sqlx::query(
        "UPDATE uploads SET received = $2, checkpoint = $3 WHERE id = $1 AND artifact_id IS NULL",
    )
    .bind(id.to_string())
    .bind(int(received))
    .bind(text)
    .execute(tx.conn())
    .await?;
    Ok(())
}

/// Notes what it became; `false` when it is gone or was completed by somebody else.
pub async fn complete(tx: &mut Tx, id: UploadId, artifact: ArtifactId, size: u64) -> Result<bool> {
    let done = sqlx::query(
        "UPDATE uploads SET artifact_id = $2, received = $3, checkpoint = NULL
         WHERE id = $1 AND artifact_id IS NULL",
    )
    .bind(id.to_string())
    .bind(artifact.to_string())
    .bind(int(size))
    .execute(tx.conn())
    .await?;
    Ok(done.rows_affected() > 0)
}

/// Deletes the row of an upload.
pub async fn delete(tx: &mut Tx, id: UploadId) -> Result<()> {
    sqlx::query("DELETE FROM uploads WHERE id = $1")
        .bind(id.to_string())
        .execute(tx.conn())
        .await?;
    Ok(())
}

/// Uploads that have expired.
pub async fn expired(tx: &mut Tx, now: Micros, limit: u32) -> Result<Vec<Upload>> {
    let uploads = sqlx::query_as("SELECT * FROM uploads WHERE expire_time <= $1 LIMIT $2")
        .bind(now)
        .bind(limit)
        .fetch_all(tx.conn())
        .await?;
    Ok(uploads)
}
