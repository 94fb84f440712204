//! SQL of the tables `api_keys` and `settings`.

use super::{Scope, Scopes};
use crate::{
    clock::Micros,
    db::{FromRow, Row, Sql, Statement, Tx},
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

macro_rules! columns {
    () => {
        "id, namespace, display_name, secret_hash, scopes, create_time, expire_time, \
         revoke_time, last_used_time"
    };
}

impl FromRow for Key {
    fn from_row(row: &Row) -> Result<Self> {
        Ok(Self {
            id: row.get(0)?,
            namespace: row.get(1)?,
            display_name: row.get(2)?,
            secret_hash: row.get(3)?,
            scopes: read_scopes(&row.json::<Vec<String>>(4)?)?,
            create_time: row.get(5)?,
            expire_time: row.get(6)?,
            revoke_time: row.get(7)?,
            last_used_time: row.get(8)?,
        })
    }
}

fn read_scopes(names: &[String]) -> Result<Scopes> {
    let scope = |name: &String| {
        Scope::find(name).ok_or_else(|| Error::internal(format!("no scope `{name}`")))
    };
    names.iter().map(scope).collect()
}

fn scopes_text(scopes: Scopes) -> String {
    let names: Vec<_> = scopes.iter().map(|scope| format!("\"{}\"", scope.as_str())).collect();
    format!("[{}]", names.join(","))
}

const INSERT: Sql = Sql::new(
    "INSERT INTO api_keys (id, namespace, display_name, secret_hash, scopes, create_time,
     expire_time) VALUES ($1, $2, $3, $4, $5, $6, $7)",
);

/// Adds a key.
pub async fn insert(tx: &mut Tx, key: &Key) -> Result<()> {
    let insert = tx.query(INSERT).bind(&key.id).bind(&key.namespace).bind(&key.display_name);
    let insert = insert.bind(&key.secret_hash[..]).bind(scopes_text(key.scopes));
    insert.bind(key.create_time).bind(key.expire_time).run().await.map(drop)
}

const FIND: Sql = Sql::new(concat!("SELECT ", columns!(), " FROM api_keys WHERE id = $1"));

/// The key of that id, in any namespace: for authentication only.
pub async fn find(tx: &mut Tx, id: &str) -> Result<Option<Key>> {
    tx.query(FIND).bind(id).first().await
}

const LIST: Sql = Sql::new(concat!(
    "SELECT ",
    columns!(),
    " FROM api_keys
     WHERE (namespace = $1 OR $1 IS NULL) AND (create_time, id) < ($2, $3)
     ORDER BY create_time DESC, id DESC LIMIT $4"
));

/// Keys from `before` on, newest first; of one namespace, or of all.
pub async fn list(
    tx: &mut Tx,
    namespace: Option<&Namespace>,
    before: Option<(Micros, String)>,
    limit: u32,
) -> Result<Vec<Key>> {
    let (time, id) = before.unwrap_or((Micros(i64::MAX), String::new()));
    tx.query(LIST).bind(namespace).bind(time).bind(id).bind(limit).all().await
}

const REVOKE: Sql = Sql::new(concat!(
    "UPDATE api_keys SET revoke_time = COALESCE(revoke_time, $3)
     WHERE id = $1 AND (namespace = $2 OR $2 IS NULL) RETURNING ",
    columns!()
));

/// Revokes a key for good and returns it; one that was revoked before keeps its time.
pub async fn revoke(
    tx: &mut Tx,
    namespace: Option<&Namespace>,
    id: &str,
    now: Micros,
) -> Result<Key> {
    let revoked = tx.query(REVOKE).bind(id).bind(namespace).bind(now).first().await?;
    revoked.ok_or_else(|| Error::not_found("key", id))
}

const REVOKED_SINCE: Sql = Sql::new("SELECT id FROM api_keys WHERE revoke_time >= $1");

/// Ids of keys revoked since `since`.
pub async fn revoked_since(tx: &mut Tx, since: Micros) -> Result<Vec<String>> {
    let ids: Vec<(String,)> = tx.query(REVOKED_SINCE).bind(since).all().await?;
    Ok(ids.into_iter().map(|(id,)| id).collect())
}

const TOUCH: Sql = Sql::new("UPDATE api_keys SET last_used_time = $2 WHERE id = $1");

/// Notes when a key was used last.
pub async fn touch(tx: &mut Tx, id: &str, used: Micros) -> Result<()> {
    tx.query(TOUCH).bind(id).bind(used).run().await.map(drop)
}

const COUNT: Sql = Sql::new("SELECT COUNT(*) FROM api_keys");

/// Whether no key was ever made.
pub async fn is_empty(tx: &mut Tx) -> Result<bool> {
    let (n,): (i64,) = tx.query(COUNT).one().await?;
    Ok(n == 0)
}

const PUT_SETTING: Sql =
    Sql::new("INSERT INTO settings (name, value) VALUES ($1, $2) ON CONFLICT (name) DO NOTHING");
const SETTING: Sql = Sql::new("SELECT value FROM settings WHERE name = $1");

/// The value of a setting, put there first if it is missing.
pub async fn setting(tx: &mut Tx, name: &str, initial: &[u8]) -> Result<Vec<u8>> {
    tx.query(PUT_SETTING).bind(name).bind(initial).run().await?;
    let (value,) = tx.query(SETTING).bind(name).one().await?;
    Ok(value)
}

/// Statements of this file.
pub const STATEMENTS: &[Statement] = &[
    Statement::Query(INSERT),
    Statement::Query(FIND),
    Statement::Query(LIST),
    Statement::Query(REVOKE),
    Statement::Query(REVOKED_SINCE),
    Statement::Query(TOUCH),
    Statement::Query(COUNT),
    Statement::Query(PUT_SETTING),
    Statement::Query(SETTING),
];
