//! What an operator does to the database: migrate, look, back up.

use std::path::Path;

use sqlx::migrate::{Migrate, MigrateError, Migrator};

use super::{Backend, Db, Sql};
use crate::error::{Error, Kind, Reason, Result};

static MIGRATOR: Migrator = sqlx::migrate!("migrations/sqlite");

/// What is in the database file.
#[derive(Debug, Clone)]
pub struct Status {
    /// Migrations that this binary has, as (version, name).
    pub known: Vec<(i64, String)>,
    /// Versions applied.
    pub applied: Vec<i64>,
    /// Size of the file in bytes, without its log.
    pub size_bytes: u64,
    /// SQLite's journal mode; `wal` is right.
    pub journal_mode: String,
}

impl Status {
    /// Versions that this binary has and the file has not.
    pub fn pending(&self) -> Vec<i64> {
        self.known.iter().map(|(v, _)| *v).filter(|v| !self.applied.contains(v)).collect()
    }
}

impl Db {
    /// Applies what is pending.
    pub(super) async fn migrate_now(&self) -> Result<()> {
        let Backend::Sqlite(sqlite) = &self.0.backend;
        let mut slot = sqlite.writer.lock().await;
        let Some(conn) = slot.as_mut() else {
            return Err(Error::storage("the database was closed"));
        };
        MIGRATOR.run(&mut *conn).await.map_err(refused)
    }
}

/// Applies what is pending.
pub async fn migrate(path: &Path) -> Result<Status> {
    let db = Db::open(path).await?;
    let status = status_of(&db, path).await?;
    db.close().await;
    Ok(status)
}

/// Looks at a database that may be in use.
pub async fn status(path: &Path) -> Result<Status> {
    require(path)?;
    let db = Db::connect(path).await?;
    let status = status_of(&db, path).await?;
    db.close().await;
    Ok(status)
}

/// Writes a consistent copy of a database, which may be in use, to `to`; refuses to overwrite.
pub async fn backup(path: &Path, to: &Path) -> Result<u64> {
    require(path)?;
    if to.exists() {
        return Err(Error::new(
            Kind::AlreadyExists,
            Reason::AlreadyExists,
            format!("`{}` exists already; name a new file", to.display()),
        ));
    }
    let db = Db::connect(path).await?;
    let target = to.display().to_string();
    db.read(|tx| {
        Box::pin(async move {
            const COPY: Sql = Sql::new("VACUUM INTO $1");
            tx.query(COPY).bind(target).run().await.map(drop)
        })
    })
    .await?;
    db.close().await;
    let file = std::fs::File::open(to).map_err(Error::storage)?;
    file.sync_all().map_err(Error::storage)?;
    Ok(file.metadata().map_err(Error::storage)?.len())
}

fn require(path: &Path) -> Result<()> {
    if path.exists() {
        return Ok(());
    }
    Err(Error::not_found("database", path.display()))
}

async fn status_of(db: &Db, path: &Path) -> Result<Status> {
    let known = MIGRATOR.iter().map(|m| (m.version, m.description.to_string())).collect();
    let Backend::Sqlite(sqlite) = &db.0.backend;
    let mut slot = sqlite.writer.lock().await;
    let Some(conn) = slot.as_mut() else { return Err(Error::storage("the database was closed")) };
    let journal_mode: String =
        sqlx::query_scalar("PRAGMA journal_mode").fetch_one(&mut *conn).await?;
    conn.ensure_migrations_table(&MIGRATOR.table_name).await.map_err(refused)?;
    let applied = conn.list_applied_migrations(&MIGRATOR.table_name).await.map_err(refused)?;
    Ok(Status {
        known,
        applied: applied.into_iter().map(|m| m.version).collect(),
        size_bytes: std::fs::metadata(path).map_or(0, |meta| meta.len()),
        journal_mode,
    })
}

fn refused(error: MigrateError) -> Error {
    match error {
        MigrateError::VersionMissing(version) => Error::new(
            Kind::FailedPrecondition,
            Reason::StateConflict,
            format!(
                "the database has migration {version}, which this binary does not know; \
                 run the newer binary that made it, or restore a backup"
            ),
        ),
        MigrateError::VersionMismatch(version) => Error::new(
            Kind::FailedPrecondition,
            Reason::StateConflict,
            format!("migration {version} of the database differs from this binary's"),
        ),
        other => Error::storage(other),
    }
}
