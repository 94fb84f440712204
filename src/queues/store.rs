//! Pauses as rows.

use sqlx::FromRow;

use crate::{clock::Micros, db::Tx, error::Result, id::Namespace, queue::Pause};

/// A paused queue.
pub struct Paused {
    /// Tenant.
    pub namespace: Namespace,
    /// `owner/name`.
    pub model: String,
    /// Who, why, when.
    pub pause: Pause,
}

#[derive(FromRow)]
struct PauseRow {
    namespace: String,
    model: String,
    paused_by: String,
    reason: String,
    pause_time: Micros,
}

/// All pauses of all namespaces.
pub async fn list(tx: &mut Tx) -> Result<Vec<Paused>> {
    let rows: Vec<PauseRow> =
        sqlx::query_as("SELECT namespace, model, paused_by, reason, pause_time FROM queue_pauses")
            .fetch_all(tx.conn())
            .await?;
    let paused = |row: PauseRow| Paused {
        namespace: row.namespace.into(),
        model: row.model,
        pause: Pause { by: row.paused_by, reason: row.reason, time: row.pause_time },
    };
    Ok(rows.into_iter().map(paused).collect())
}

/// Writes a pause, in place of an earlier one.
pub async fn put(tx: &mut Tx, namespace: &Namespace, model: &str, pause: &Pause) -> Result<()> {
    sqlx::query(
        "INSERT INTO queue_pauses (namespace, model, paused_by, reason, pause_time)
         VALUES ($1, $2, $3, $4, $5)
         ON CONFLICT (namespace, model) DO UPDATE SET
             paused_by = excluded.paused_by, reason = excluded.reason,
             pause_time = excluded.pause_time",
    )
    .bind(namespace.as_str())
    .bind(model)
    .bind(&pause.by)
    .bind(&pause.reason)
    .bind(pause.time)
    .execute(tx.conn())
    .await?;
    Ok(())
}

/// Ends a pause, if there is one.
pub async fn delete(tx: &mut Tx, namespace: &Namespace, model: &str) -> Result<()> {
    sqlx::query("DELETE FROM queue_pauses WHERE namespace = $1 AND model = $2")
        .bind(namespace.as_str())
        .bind(model)
        .execute(tx.conn())
        .await?;
    Ok(())
}
