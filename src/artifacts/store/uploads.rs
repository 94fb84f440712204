//! SQL of the table `uploads`.

use std::time::Duration;

use super::{int, origin};
use crate::{
    artifacts::model::{Spec, Upload},
    blob::Checkpoint,
    clock::Micros,
    db::{FromRow, Row, Sql, Statement, Tx},
    error::{Error, Result},
    id::{ArtifactId, Namespace, UploadId},
};

macro_rules! announced {
    () => {
        "id, namespace, name, type, mime_type, size_bytes, sha256, ttl, task_id, attempt, \
         created_by, create_time, expire_time, received"
    };
}

macro_rules! select {
    ($tail:literal) => {
        concat!("SELECT ", announced!(), ", checkpoint, artifact_id FROM uploads ", $tail)
    };
}

impl FromRow for Upload {
    fn from_row(row: &Row) -> Result<Self> {
        let ttl: Option<u64> = row.get(7)?;
        Ok(Self {
            id: row.get(0)?,
            namespace: row.get(1)?,
            spec: Spec {
                name: row.get(2)?,
                kind: row.get(3)?,
                mime_type: row.get(4)?,
                size: row.get(5)?,
                digest: row.optional_parse(6)?,
                ttl: ttl.map(Duration::from_micros),
            },
            origin: origin(row, 8)?,
            create_time: row.get(11)?,
            expire_time: row.get(12)?,
            received: row.get(13)?,
            checkpoint: row.optional_json(14)?,
            artifact: row.get(15)?,
        })
    }
}

const INSERT: Sql = Sql::new(concat!(
    "INSERT INTO uploads (",
    announced!(),
    ") VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, 0)"
));

/// Adds an upload of which nothing has come.
pub async fn insert(tx: &mut Tx, upload: &Upload) -> Result<()> {
    let (task, attempt) = upload.origin.attempt.unzip();
    let spec = &upload.spec;
    let ttl = spec.ttl.map(|ttl| i64::try_from(ttl.as_micros()).unwrap_or(i64::MAX));
    let insert = tx.query(INSERT).bind(upload.id).bind(&upload.namespace).bind(&spec.name);
    let insert = insert.bind(&spec.kind).bind(&spec.mime_type).bind(spec.size.map(int));
    let insert = insert.bind(spec.digest.map(|digest| digest.to_string())).bind(ttl);
    let insert = insert.bind(task).bind(attempt.unwrap_or(0)).bind(&upload.origin.by);
    insert.bind(upload.create_time).bind(upload.expire_time).run().await.map(drop)
}

const GET: Sql = Sql::new(select!("WHERE id = $1 AND namespace = $2 AND expire_time > $3"));

/// The upload, which must be in the namespace and not have expired.
pub async fn get(tx: &mut Tx, namespace: &Namespace, id: UploadId, now: Micros) -> Result<Upload> {
    let found = tx.query(GET).bind(id).bind(namespace).bind(now).first().await?;
    found.ok_or_else(|| Error::not_found("upload", id))
}

const FIND_ALIKE: Sql = Sql::new(select!(
    "WHERE namespace = $1 AND sha256 = $2 AND size_bytes = $3
     AND name = $4 AND type = $5 AND mime_type = $6 AND created_by = $7
     AND (task_id = $8 OR (task_id IS NULL AND $8 IS NULL)) AND attempt = $9
     AND expire_time > $10 AND artifact_id IS NULL ORDER BY id LIMIT 1"
));

/// An upload that was announced in the same words by the same caller and is not complete.
pub async fn find_alike(tx: &mut Tx, wanted: &Upload, now: Micros) -> Result<Option<Upload>> {
    let (task, attempt) = wanted.origin.attempt.unzip();
    let spec = &wanted.spec;
    let find = tx.query(FIND_ALIKE).bind(&wanted.namespace);
    let find = find.bind(spec.digest.map(|digest| digest.to_string())).bind(spec.size.map(int));
    let find = find.bind(&spec.name).bind(&spec.kind).bind(&spec.mime_type).bind(&wanted.origin.by);
    find.bind(task).bind(attempt.unwrap_or(0)).bind(now).first().await
}

const COUNT_OPEN: Sql = Sql::new(
    "SELECT COUNT(*) FROM uploads
     WHERE namespace = $1 AND artifact_id IS NULL AND expire_time > $2",
);

/// Uploads of a namespace that are not complete.
pub async fn count_open(tx: &mut Tx, namespace: &Namespace, now: Micros) -> Result<u64> {
    let (n,) = tx.query(COUNT_OPEN).bind(namespace).bind(now).one().await?;
    Ok(n)
}

const NOTE: Sql = Sql::new(
    "UPDATE uploads SET received = $2, checkpoint = $3 WHERE id = $1 AND artifact_id IS NULL",
);

/// Notes how far it has come.
pub async fn note(tx: &mut Tx, id: UploadId, checkpoint: Option<&Checkpoint>) -> Result<()> {
    let received = checkpoint.map_or(0, Checkpoint::received);
    let text = checkpoint.map(serde_json::to_string).transpose().map_err(Error::internal)?;
    tx.query(NOTE).bind(id).bind(int(received)).bind(text).run().await.map(drop)
}

const COMPLETE: Sql = Sql::new(
    "UPDATE uploads SET artifact_id = $2, received = $3, checkpoint = NULL
     WHERE id = $1 AND artifact_id IS NULL",
);

/// Notes what it became; `false` when it is gone or was completed by somebody else.
pub async fn complete(tx: &mut Tx, id: UploadId, artifact: ArtifactId, size: u64) -> Result<bool> {
    let complete = tx.query(COMPLETE).bind(id).bind(artifact).bind(int(size));
    Ok(complete.run().await? > 0)
}

const DELETE: Sql = Sql::new("DELETE FROM uploads WHERE id = $1");

/// Deletes the row of an upload.
pub async fn delete(tx: &mut Tx, id: UploadId) -> Result<()> {
    tx.query(DELETE).bind(id).run().await.map(drop)
}

const EXPIRED: Sql = Sql::new(select!("WHERE expire_time <= $1 LIMIT $2"));

/// Uploads that have expired.
pub async fn expired(tx: &mut Tx, now: Micros, limit: u32) -> Result<Vec<Upload>> {
    tx.query(EXPIRED).bind(now).bind(limit).all().await
}

/// Statements of this file.
pub const STATEMENTS: &[Statement] = &[
    Statement::Query(INSERT),
    Statement::Query(GET),
    Statement::Query(FIND_ALIKE),
    Statement::Query(COUNT_OPEN),
    Statement::Query(NOTE),
    Statement::Query(COMPLETE),
    Statement::Query(DELETE),
    Statement::Query(EXPIRED),
];
