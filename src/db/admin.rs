//! What an operator does to the database: migrate, look, back up, restore.

use std::{
    fmt,
    fs::File,
    io,
    path::{Path, PathBuf},
};

use super::{Backend, Db, Engine, Sql, migrations::Migrations};
use crate::error::{Error, Kind, Reason, Result};

/// Where a database is.
#[derive(Clone, PartialEq, Eq)]
pub enum Location {
    /// A file of SQLite.
    File(PathBuf),
    /// A server's database, with its password.
    Url(String),
}

impl fmt::Display for Location {
    /// Without the password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            #[cfg(feature = "postgres")]
            Self::Url(url) => f.write_str(&super::postgres::place(url)),
            #[cfg(not(feature = "postgres"))]
            Self::Url(_) => f.write_str("a database server"),
        }
    }
}

impl fmt::Debug for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What is in a database.
#[derive(Debug, Clone)]
pub struct Status {
    /// Which engine keeps it.
    pub engine: Engine,
    /// Migrations that this binary has, as (version, name).
    pub known: Vec<(i64, String)>,
    /// Versions applied.
    pub applied: Vec<i64>,
    /// Whether there are tables without a version record, which a migration would adopt.
    pub legacy: bool,
    /// Size in bytes; of a file without its log.
    pub size_bytes: u64,
    /// SQLite's journal mode, where `wal` is right; `synchronous_commit` of Postgres.
    pub durability: String,
}

impl Status {
    /// Versions that this binary has and the database has not.
    pub fn pending(&self) -> Vec<i64> {
        self.known.iter().map(|(v, _)| *v).filter(|v| !self.applied.contains(v)).collect()
    }
}

impl Db {
    /// Applies what is pending.
    pub(super) async fn migrate_now(&self) -> Result<()> {
        match &self.0.backend {
            Backend::Sqlite(sqlite) => sqlite.migrate(false).await.map(drop),
            #[cfg(feature = "postgres")]
            Backend::Postgres(_) => Ok(()),
        }
    }
}

/// Applies what is pending.
pub async fn migrate(at: &Location) -> Result<()> {
    match at {
        Location::File(path) => Db::open(path).await?.close().await,
        #[cfg(feature = "postgres")]
        Location::Url(url) => drop(super::postgres::migrate::run(url, false).await?),
        #[cfg(not(feature = "postgres"))]
        Location::Url(_) => return Err(without_postgres()),
    }
    Ok(())
}

/// Looks at a database that may be in use.
pub async fn status(at: &Location) -> Result<Status> {
    match at {
        Location::File(path) => {
            require(path)?;
            let db = Db::connect(path).await?;
            let looked = match &db.0.backend {
                Backend::Sqlite(sqlite) => {
                    (sqlite.migrate(true).await?, sqlite.journal_mode().await?)
                }
                #[cfg(feature = "postgres")]
                Backend::Postgres(_) => return Err(Error::internal("a file of Postgres")),
            };
            db.close().await;
            let (found, mode) = looked;
            let size = std::fs::metadata(path).map_or(0, |meta| meta.len());
            Ok(status_of(Engine::Sqlite, found, size, mode))
        }
        #[cfg(feature = "postgres")]
        Location::Url(url) => {
            let found = super::postgres::migrate::run(url, true).await?;
            let (size, sync) = super::postgres::migrate::size(url).await?;
            Ok(status_of(Engine::Postgres, found, size, sync))
        }
        #[cfg(not(feature = "postgres"))]
        Location::Url(_) => Err(without_postgres()),
    }
}

/// Connections that servers have to a server's database; of a file, see its directory's lock.
pub async fn servers(at: &Location) -> Result<u64> {
    match at {
        Location::File(_) => Ok(0),
        #[cfg(feature = "postgres")]
        Location::Url(url) => super::postgres::migrate::servers(url).await,
        #[cfg(not(feature = "postgres"))]
        Location::Url(_) => Err(without_postgres()),
    }
}

fn status_of(engine: Engine, found: Migrations, size_bytes: u64, durability: String) -> Status {
    let Migrations { known, applied, legacy } = found;
    Status { engine, known, applied, legacy: legacy.is_some(), size_bytes, durability }
}

/// Makes the whole of a database one file.
pub(super) const COPY: Sql = Sql::each("VACUUM INTO $1", "");

/// Finds damage.
pub(super) const CHECK: Sql = Sql::each("PRAGMA quick_check(1)", "");

/// Writes a consistent copy of a database, which may be in use, to `to`; refuses to overwrite.
/// Returns its size. Of a server's database it is an archive of `pg_dump`.
pub async fn backup(at: &Location, to: &Path) -> Result<u64> {
    if to.exists() {
        return Err(Error::new(
            Kind::AlreadyExists,
            Reason::AlreadyExists,
            format!("`{}` exists already; name a new file", to.display()),
        ));
    }
    match at {
        Location::File(path) => {
            require(path)?;
            let db = Db::connect(path).await?;
            let target = to.display().to_string();
            db.read(|tx| {
                Box::pin(async move { tx.query(COPY).bind(target).run().await.map(drop) })
            })
            .await?;
            db.close().await;
        }
        #[cfg(feature = "postgres")]
        Location::Url(url) => super::postgres::dump::backup(url, to).await?,
        #[cfg(not(feature = "postgres"))]
        Location::Url(_) => return Err(without_postgres()),
    }
    let file = File::open(to).map_err(Error::storage)?;
    file.sync_all().map_err(Error::storage)?;
    Ok(file.metadata().map_err(Error::storage)?.len())
}

/// Puts a backup where there is no database yet; no server may run there.
pub async fn restore(at: &Location, from: &Path) -> Result<()> {
    match at {
        Location::File(path) => restore_file(path, from).await,
        #[cfg(feature = "postgres")]
        Location::Url(url) => super::postgres::dump::restore(url, from).await,
        #[cfg(not(feature = "postgres"))]
        Location::Url(_) => Err(without_postgres()),
    }
}

async fn restore_file(path: &Path, from: &Path) -> Result<()> {
    if path.exists() {
        return Err(Error::new(
            Kind::AlreadyExists,
            Reason::AlreadyExists,
            format!("there is a database at {}; move it away first", path.display()),
        ));
    }
    require(from)?;
    let beside = path.with_extension("db.restoring");
    let copied = copy_synced(from, &beside).map_err(Error::storage);
    let checked = match copied {
        Ok(()) => check(&beside).await,
        Err(error) => Err(error),
    };
    if let Err(error) = checked {
        // It is ours, and of no use.
        let _ = std::fs::remove_file(&beside);
        return Err(error);
    }
    let placed = std::fs::rename(&beside, path).and_then(|()| {
        File::open(path.parent().unwrap_or(Path::new("."))).and_then(|dir| dir.sync_all())
    });
    placed.map_err(Error::storage)
}

fn copy_synced(from: &Path, to: &Path) -> io::Result<()> {
    io::copy(&mut File::open(from)?, &mut File::create(to)?)?;
    File::open(to)?.sync_all()
}

/// Refuses a file that is damaged or that this binary does not understand.
async fn check(path: &Path) -> Result<()> {
    let db = Db::connect(path).await?;
    let read = db.read(|tx| Box::pin(async move { tx.query(CHECK).one::<(String,)>().await }));
    let (found,) = read.await?;
    db.close().await;
    if found != "ok" {
        return Err(Error::storage(format!("the backup is damaged: {found}")));
    }
    let found = status(&Location::File(path.to_owned())).await?;
    if found.applied.is_empty() {
        return Err(Error::storage("the file is not a backup of a database of baton"));
    }
    Ok(())
}

fn require(path: &Path) -> Result<()> {
    if path.exists() {
        return Ok(());
    }
    Err(Error::not_found("database", path.display()))
}

/// The answer of a binary that knows files only.
#[cfg(not(feature = "postgres"))]
pub(super) fn without_postgres() -> Error {
    Error::new(
        Kind::Unimplemented,
        Reason::Unimplemented,
        "this binary was built without the feature `postgres`; leave database.url empty",
    )
}
