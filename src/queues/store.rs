//! Pauses as rows.

use crate::{
    db::{FromRow, Row, Sql, Statement, Tx},
    error::Result,
    id::Namespace,
    queue::Pause,
};

/// A paused queue.
pub struct Paused {
    /// Tenant.
    pub namespace: Namespace,
    /// `owner/name`.
    pub model: String,
    /// Who, why, when.
    pub pause: Pause,
}

impl FromRow for Paused {
    fn from_row(row: &Row) -> Result<Self> {
        Ok(Self {
            namespace: row.get(0)?,
            model: row.get(1)?,
            pause: Pause { by: row.get(2)?, reason: row.get(3)?, time: row.get(4)? },
        })
    }
}

const LIST: Sql =
    Sql::new("SELECT namespace, model, paused_by, reason, pause_time FROM queue_pauses");

/// All pauses of all namespaces.
pub async fn list(tx: &mut Tx) -> Result<Vec<Paused>> {
    tx.query(LIST).all().await
}

const PUT: Sql = Sql::new(
    "INSERT INTO queue_pauses (namespace, model, paused_by, reason, pause_time)
     VALUES ($1, $2, $3, $4, $5)
     ON CONFLICT (namespace, model) DO UPDATE SET
         paused_by = excluded.paused_by, reason = excluded.reason,
         pause_time = excluded.pause_time",
);

/// Writes a pause, in place of an earlier one.
pub async fn put(tx: &mut Tx, namespace: &Namespace, model: &str, pause: &Pause) -> Result<()> {
    let put = tx.query(PUT).bind(namespace).bind(model);
    put.bind(&pause.by).bind(&pause.reason).bind(pause.time).run().await.map(drop)
}

const DELETE: Sql = Sql::new("DELETE FROM queue_pauses WHERE namespace = $1 AND model = $2");

/// Ends a pause, if there is one.
pub async fn delete(tx: &mut Tx, namespace: &Namespace, model: &str) -> Result<()> {
    tx.query(DELETE).bind(namespace).bind(model).run().await.map(drop)
}

/// Statements of this file.
pub const STATEMENTS: &[Statement] =
    &[Statement::Query(LIST), Statement::Query(PUT), Statement::Query(DELETE)];
