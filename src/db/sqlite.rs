//! The embedded engine: SQLite in WAL mode with `synchronous=FULL`.
//!
//! A commit is on stable storage before it is acknowledged. All writes pass through one
//! connection, so a read-then-write is never upgraded and never meets `SQLITE_BUSY`. After an
//! I/O error the connection is not trusted: it is closed and the file is opened anew, which
//! recovers from the log.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use sqlx::{
    ConnectOptions, Connection, SqliteConnection,
    migrate::Migrator,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous},
};
use tokio::sync::Semaphore;

use super::{
    Health, Script, Simulated, Tx, Way,
    migrations::{self, Migrations},
    simulated::in_time,
};
use crate::{
    error::{Error, Reason, Result},
    faults::{self, Fault},
};

static MIGRATOR: Migrator = sqlx::migrate!("migrations/sqlite");

/// Readers at once: reads are short, and SQLite's are blocking calls on a thread each.
const READERS: usize = 4;

/// Pages that the writer keeps, as `PRAGMA cache_size`. SQLite looks through all of them at the end of
/// a transaction that split a page, which 64 MiB made a quarter of its time; what is not here is in the
/// page cache of the operating system.
const WRITER_CACHE: &str = "-4096";

/// Pages that a reader keeps: it drops them all when the database has changed.
const READER_CACHE: &str = "-1024";

/// Free space below which nothing new is accepted, so that what runs can still end.
const HEADROOM: u64 = 32 << 20;

/// Takes the writer's lock at once, so that a read is never upgraded.
const BEGIN: &str = "BEGIN IMMEDIATE";
const COMMIT: &str = "COMMIT";

/// The database's clock, in microseconds, as statements read it: `SELECT now FROM server_clock`.
const CLOCK: &str = "CREATE TEMP VIEW server_clock AS
    SELECT CAST(unixepoch('now', 'subsec') * 1000000 AS INTEGER) AS now";
/// The same, which a simulation sets.
const SET_CLOCK: &str = "CREATE TEMP TABLE server_clock (now INTEGER NOT NULL);
    INSERT INTO temp.server_clock VALUES (0)";

/// A database file and its connections.
pub(super) struct Sqlite {
    options: SqliteConnectOptions,
    path: PathBuf,
    /// `None` while in use elsewhere, lost to a cancelled caller, or not trusted any more.
    writer: tokio::sync::Mutex<Option<SqliteConnection>>,
    readers: Mutex<Vec<SqliteConnection>>,
    reader_slots: Semaphore,
    headroom: AtomicU64,
    health: Arc<Health>,
    /// Whose clock counts, in a simulation.
    way: Option<Arc<dyn Way>>,
}

/// A transaction that writes.
pub struct Write<'a> {
    db: &'a Sqlite,
    slot: tokio::sync::MutexGuard<'a, Option<SqliteConnection>>,
    tx: Option<Tx>,
    begun: bool,
}

impl Write<'_> {
    pub(super) fn tx(&mut self) -> &mut Tx {
        self.tx.as_mut().expect("there until the transaction ends")
    }

    pub(super) async fn commit(mut self) -> Result<()> {
        if self.begun
            && let Err(error) = self.execute(COMMIT).await
        {
            return Err(self.distrust(error));
        }
        self.release();
        Ok(())
    }

    /// Begin, script and commit are one message where the script is small and no answer must be
    /// looked at before the commit.
    pub(super) async fn commit_with(mut self, mut script: Script) -> Result<()> {
        if script.is_empty() {
            return self.commit().await;
        }
        self.db.tell_time(self.tx()).await?;
        if !self.begun {
            script.put_first(BEGIN);
            self.begun = true;
        }
        let whole = !script.is_checked();
        if whole {
            script.put_last(COMMIT);
        }
        match script.run(self.tx()).await {
            Ok(()) if whole => {
                self.release();
                Ok(())
            }
            Ok(()) => self.commit().await,
            Err(error) => Err(self.rollback(error).await),
        }
    }

    pub(super) async fn rollback(mut self, error: Error) -> Error {
        if error.reason() == Reason::StorageUnavailable {
            return self.distrust(error);
        }
        if self.begun
            && let Err(error) = self.execute("ROLLBACK").await
        {
            return self.distrust(error);
        }
        self.release();
        error
    }

    async fn execute(&mut self, text: &'static str) -> Result<(), sqlx::Error> {
        let Some(Tx::Sqlite(conn)) = &mut self.tx else { return Ok(()) };
        sqlx::query(text).execute(conn).await.map(drop)
    }

    /// Leaves the connection to the next writer.
    fn release(mut self) {
        *self.slot = self.tx.take().and_then(connection);
    }

    /// Drops the connection, which undoes what it did; the next writer opens the file anew.
    fn distrust(self, error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
        self.db.health.set(false);
        Error::storage(error)
    }
}

impl Sqlite {
    /// Opens the file as it is, making it when it is missing. For a simulation nothing is synced.
    pub(super) async fn connect(
        path: &Path,
        simulated: Option<&Simulated>,
        health: Arc<Health>,
    ) -> Result<Self> {
        let synchronous = if simulated.is_some() || faults::planted(Fault::UnsyncedCommits) {
            SqliteSynchronous::Off
        } else {
            SqliteSynchronous::Full
        };
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(synchronous)
            .foreign_keys(true)
            .busy_timeout(Duration::from_secs(5))
            .pragma("wal_autocheckpoint", "4000")
            .pragma("journal_size_limit", "67108864")
            .pragma("cache_size", WRITER_CACHE)
            .pragma("temp_store", "memory")
            .statement_cache_capacity(256)
            .disable_statement_logging();
        let way = simulated.and_then(|simulated| simulated.way.clone());
        let writer = open_with_clock(&options, way.is_some()).await?;
        Ok(Self {
            options,
            path: path.to_owned(),
            writer: tokio::sync::Mutex::new(Some(writer)),
            readers: Mutex::default(),
            reader_slots: Semaphore::new(READERS),
            headroom: AtomicU64::new(HEADROOM),
            health,
            way,
        })
    }

    pub(super) async fn begin(&self) -> Result<Write<'_>> {
        let mut write = self.prepare().await?;
        match write.execute(BEGIN).await {
            Ok(()) => {
                write.begun = true;
                Ok(write)
            }
            Err(error) => Err(write.distrust(error)),
        }
    }

    /// The transaction begins with its first write.
    pub(super) async fn prepare(&self) -> Result<Write<'_>> {
        let mut slot = in_time(self.writer.lock()).await;
        let conn = match slot.take() {
            Some(conn) => Ok(conn),
            None => open_with_clock(&self.options, self.way.is_some()).await,
        };
        match conn {
            Ok(conn) => {
                let mut tx = Tx::Sqlite(conn);
                self.tell_time(&mut tx).await?;
                Ok(Write { db: self, slot, tx: Some(tx), begun: false })
            }
            Err(error) => {
                self.health.set(false);
                Err(error)
            }
        }
    }

    /// A reading connection, and the right to use it.
    pub(super) async fn reader(&self) -> Result<(tokio::sync::SemaphorePermit<'_>, Tx)> {
        let slot = in_time(self.reader_slots.acquire()).await.map_err(Error::internal)?;
        let pooled = self.readers.lock().pop();
        let conn = match pooled {
            Some(conn) => conn,
            None => open_with_clock(&reader(&self.options), self.way.is_some()).await?,
        };
        let mut tx = Tx::Sqlite(conn);
        self.tell_time(&mut tx).await?;
        Ok((slot, tx))
    }

    /// Sets a connection's clock, in a simulation.
    async fn tell_time(&self, tx: &mut Tx) -> Result<()> {
        const SQL: super::Sql = super::Sql::each("UPDATE temp.server_clock SET now = $1", "");
        let Some(way) = &self.way else { return Ok(()) };
        tx.query(SQL).bind(way.now()).run().await.map(drop)
    }

    /// Takes a reading connection back.
    pub(super) fn return_reader(&self, tx: Tx) {
        self.readers.lock().extend(connection(tx));
    }

    /// Whether the file is there with enough room to write.
    pub(super) fn has_room(&self) -> bool {
        let free = rustix::fs::statvfs(self.path.parent().unwrap_or(Path::new(".")))
            .map(|stat| stat.f_bavail.saturating_mul(stat.f_frsize));
        matches!(free, Ok(free) if free >= self.headroom.load(Ordering::Relaxed))
            && self.path.exists()
    }

    /// Sets the free space below which nothing new is accepted.
    pub(super) fn set_headroom(&self, bytes: u64) {
        self.headroom.store(bytes, Ordering::Relaxed);
    }

    /// Applies what is pending, or with `dry_run` only looks; returns what there was before.
    pub(super) async fn migrate(&self, dry_run: bool) -> Result<Migrations> {
        let mut slot = self.writer.lock().await;
        let Some(conn) = slot.as_mut() else {
            return Err(Error::storage("the database was closed"));
        };
        let versioned =
            "SELECT EXISTS (SELECT 1 FROM sqlite_master WHERE name = '_sqlx_migrations')";
        let versioned: bool = sqlx::query_scalar(versioned).fetch_one(&mut *conn).await?;
        let columns = "SELECT m.name || '.' || c.name FROM sqlite_master m
                       JOIN pragma_table_info(m.name) c WHERE m.type = 'table'";
        let columns: Vec<String> = sqlx::query_scalar(columns).fetch_all(&mut *conn).await?;
        let found = migrations::look(&MIGRATOR, conn, versioned, &columns).await?;
        if !dry_run {
            migrations::apply(&MIGRATOR, conn, &found).await?;
        }
        Ok(found)
    }

    /// How commits reach the disk; `wal` is right.
    pub(super) async fn journal_mode(&self) -> Result<String> {
        let mut slot = self.writer.lock().await;
        let Some(conn) = slot.as_mut() else {
            return Err(Error::storage("the database was closed"));
        };
        Ok(sqlx::query_scalar("PRAGMA journal_mode").fetch_one(&mut *conn).await?)
    }

    /// Closes all connections after a last checkpoint.
    pub(super) async fn close(&self) {
        self.reader_slots.close();
        let readers = std::mem::take(&mut *self.readers.lock());
        for reader in readers {
            // Closing a reader writes nothing that could be lost.
            let _ = reader.close().await;
        }
        if let Some(writer) = self.writer.lock().await.take()
            && let Err(error) = writer.close().await
        {
            tracing::warn!(%error, "the database was not closed cleanly; it will recover");
        }
    }
}

/// The last migration that this binary has.
pub(super) fn last_migration() -> i64 {
    MIGRATOR.iter().last().map_or(0, |last| last.version)
}

/// A reading connection to a file that may be in use.
pub(super) async fn open_read_only(path: &Path) -> Result<SqliteConnection> {
    let options = SqliteConnectOptions::new()
        .filename(path)
        .read_only(true)
        .busy_timeout(Duration::from_secs(5))
        .disable_statement_logging();
    open_connection(&options).await
}

/// A connection to a file that nobody else writes to.
pub(super) async fn open_alone(path: &Path) -> Result<SqliteConnection> {
    let options = SqliteConnectOptions::new()
        .filename(path)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .foreign_keys(true)
        .disable_statement_logging();
    open_connection(&options).await
}

/// Options of a connection that reads.
fn reader(writer: &SqliteConnectOptions) -> SqliteConnectOptions {
    writer.clone().read_only(true).pragma("cache_size", READER_CACHE)
}

#[cfg_attr(not(feature = "postgres"), expect(clippy::unnecessary_wraps, reason = "one engine"))]
fn connection(tx: Tx) -> Option<SqliteConnection> {
    match tx {
        Tx::Sqlite(conn) => Some(conn),
        #[cfg(feature = "postgres")]
        Tx::Postgres(_) => None,
    }
}

/// A connection whose statements may ask for the time.
async fn open_with_clock(options: &SqliteConnectOptions, sets: bool) -> Result<SqliteConnection> {
    let mut conn = open_connection(options).await?;
    let clock = if sets { SET_CLOCK } else { CLOCK };
    sqlx::raw_sql(clock).execute(&mut conn).await.map_err(Error::storage)?;
    Ok(conn)
}

async fn open_connection(options: &SqliteConnectOptions) -> Result<SqliteConnection> {
    options.connect().await.map_err(Error::storage)
}
