//! SQL of the tables `api_keys` and `settings`.

use sqlx::{FromRow, Row as _, sqlite::SqliteRow};

use super::{Scope, Scopes};
use crate::{
    clock::Micros,
    db::Tx,
    error::{Error, Result},
    id::Namespace,
};

/// An API key: the row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    /// Public part of the key's text.
    pub id: String,
    /// Tenant that it acts in.
    pub namespace: Namespace,
    /// Name for people.
    pub display_name: String,
    /// SHA-256 of the secret part.
    pub secret_hash: Vec<u8>,
    /// What it may do.
    pub scopes: Scopes,
    /// Made.
    pub create_time: Micros,
    /// Stops working.
    pub expire_time: Option<Micros>,
    /// Was revoked.
    pub revoke_time: Option<Micros>,
    /// Last use, to the minute.
    pub last_used_time: Option<Micros>,
}

impl FromRow<'_, SqliteRow> for Key {
    fn from_row(row: &SqliteRow) -> Result<Self, sqlx::Error> {
        Ok(Self {
            id: row.try_get("id")?,
            namespace: row.try_get::<String, _>("namespace")?.into(),
            display_name: row.try_get("display_name")?,
            secret_hash: row.try_get("secret_hash")?,
            scopes: read_scopes(row.try_get("scopes")?)?,
            create_time: row.try_get("create_time")?,
            expire_time: row.try_get("expire_time")?,
            revoke_time: row.try_get("revoke_time")?,
            last_used_time: row.try_get("last_used_time")?,
        })
    }
}

fn read_scopes(text: &str) -> Result<Scopes, sqlx::Error> {
    let wrong = |error: Box<dyn std::error::Error + Send + Sync>| sqlx::Error::ColumnDecode {
        index: "scopes".into(),
        source: error,
    };
    let names: Vec<String> = serde_json::from_str(text).map_err(|error| wrong(error.into()))?;
    names
        .iter()
        .map(|name| Scope::find(name).ok_or_else(|| wrong(format!("no scope `{name}`").into())))
        .collect()
}

fn scopes_text(scopes: Scopes) -> String {
    let names: Vec<_> = scopes.iter().map(|scope| format!("\"{}\"", scope.as_str())).collect();
    format!("[{}]", names.join(","))
}

/// Adds a key.
pub async fn insert(tx: &mut Tx, key: &Key) -> Result<()> {
    sqlx::query(
        "INSERT INTO api_keys (id, namespace, display_name, secret_hash, scopes, create_time,
         expire_time) VALUES ($1, $2, $3, $4, $5, $6, $7)",
    )
    .bind(&key.id)
    .bind(key.namespace.as_str())
    .bind(&key.display_name)
    .bind(&key.secret_hash)
    .bind(scopes_text(key.scopes))
    .bind(key.create_time)
    .bind(key.expire_time)
    .execute(tx.conn())
    .await?;
    Ok(())
}

/// The key of that id, in any namespace: for authentication only.
pub async fn find(tx: &mut Tx, id: &str) -> Result<Option<Key>> {
    let key = sqlx::query_as("SELECT * FROM api_keys WHERE id = $1")
        .bind(id)
        .fetch_optional(tx.conn())
        .await?;
    Ok(key)
}

/// Keys from `before` on, newest first; of one namespace, or of all.
pub async fn list(
    tx: &mut Tx,
    namespace: Option<&Namespace>,
    before: Option<(Micros, String)>,
    limit: u32,
) -> Result<Vec<Key>> {
    let (time, id) = before.unwrap_or((Micros(i64::MAX), String::new()));
    let keys = sqlx::query_as(
        "SELECT * FROM api_keys
         WHERE ($1 IS NULL OR namespace = $1) AND (create_time, id) < ($2, $3)
         ORDER BY create_time DESC, id DESC LIMIT $4",
    )
    .bind(namespace.map(Namespace::as_str))
    .bind(time)
    .bind(id)
    .bind(limit)
    .fetch_all(tx.conn())
    .await?;
    Ok(keys)
}

/// Revokes a key for good and returns it; one that was revoked before keeps its time.
pub async fn revoke(
    tx: &mut Tx,
    namespace: Option<&Namespace>,
    id: &str,
    now: Micros,
) -> Result<Key> {
    sqlx::query_as(
        "UPDATE api_keys SET revoke_time = COALESCE(revoke_time, $3)
         WHERE id = $1 AND ($2 IS NULL OR namespace = $2) RETURNING *",
    )
    .bind(id)
    .bind(namespace.map(Namespace::as_str))
    .bind(now)
    .fetch_optional(tx.conn())
    .await?
    .ok_or_else(|| Error::not_found("key", id))
}

/// Ids of keys revoked since `since`.
pub async fn revoked_since(tx: &mut Tx, since: Micros) -> Result<Vec<String>> {
    let ids = sqlx::query_scalar("SELECT id FROM api_keys WHERE revoke_time >= $1")
        .bind(since)
        .fetch_all(tx.conn())
        .await?;
    Ok(ids)
}

/// Notes when a key was used last.
pub async fn touch(tx: &mut Tx, id: &str, used: Micros) -> Result<()> {
    sqlx::query("UPDATE api_keys SET last_used_time = $2 WHERE id = $1")
        .bind(id)
        .bind(used)
        .execute(tx.conn())
        .await?;
    Ok(())
}

/// Whether no key was ever made.
pub async fn is_empty(tx: &mut Tx) -> Result<bool> {
    let n: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM api_keys").fetch_one(tx.conn()).await?;
    Ok(n == 0)
}

/// The value of a setting, put there first if it is missing.
pub async fn setting(tx: &mut Tx, name: &str, initial: &[u8]) -> Result<Vec<u8>> {
    sqlx::query("INSERT INTO settings (name, value) VALUES ($1, $2) ON CONFLICT (name) DO NOTHING")
        .bind(name)
        .bind(initial)
        .execute(tx.conn())
        .await?;
    let value = sqlx::query_scalar("SELECT value FROM settings WHERE name = $1")
        .bind(name)
        .fetch_one(tx.conn())
        .await?;
    Ok(value)
}
