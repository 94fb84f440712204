//! The database: one writer, several readers, transactions as the unit of work.
//!
//! SQLite in WAL mode with `synchronous=FULL`: a commit is on stable storage before it is
//! acknowledged. All writes pass through one connection, so a read-then-write is never
//! upgraded and never meets `SQLITE_BUSY`. After an I/O error the connection is not trusted:
//! it is closed and the file is opened anew, which recovers from the log. Knows no table but
//! the migrator's.

mod admin;
mod bulk;
pub mod page;
mod script;

use std::{
    future::Future,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use sqlx::{
    ConnectOptions, Connection, SqliteConnection,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous},
};
use tokio::sync::{Semaphore, watch};

pub use admin::{Status, backup, migrate, status};
pub use bulk::{Bulk, chunks};
pub use script::{Script, Values};

use crate::{
    error::{Error, Kind, Reason, Result},
    faults::{self, Fault},
};

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

/// A database; clones share it.
#[derive(Clone)]
pub struct Db(Arc<Inner>);

struct Inner {
    options: SqliteConnectOptions,
    path: PathBuf,
    /// `None` while in use elsewhere, lost to a cancelled caller, or not trusted any more.
    writer: tokio::sync::Mutex<Option<SqliteConnection>>,
    readers: Mutex<Vec<SqliteConnection>>,
    reader_slots: Semaphore,
    healthy: watch::Sender<bool>,
    headroom: AtomicU64,
    /// Statements block the thread: no time passes in a simulation while they run.
    blocking: bool,
}

/// A transaction, or for reads a connection.
pub struct Tx(SqliteConnection);

impl Tx {
    /// The connection, for `sqlx::query(..).execute(tx.conn())`.
    pub fn conn(&mut self) -> &mut SqliteConnection {
        &mut self.0
    }
}

/// A transaction that writes.
pub struct Write<'a> {
    db: &'a Db,
    slot: tokio::sync::MutexGuard<'a, Option<SqliteConnection>>,
    tx: Option<Tx>,
    begun: bool,
}

impl Write<'_> {
    /// The transaction.
    ///
    /// # Panics
    /// Never: it is there until `self` is consumed.
    pub fn tx(&mut self) -> &mut Tx {
        self.tx.as_mut().expect("there until the transaction ends")
    }

    /// Commits: what was written is on stable storage afterwards.
    pub async fn commit(mut self) -> Result<()> {
        if self.begun
            && let Err(error) = sqlx::query(COMMIT).execute(self.tx().conn()).await
        {
            return refused(self.distrust(error));
        }
        self.release();
        Ok(())
    }

    /// Runs a script and commits, or undoes everything. Begin, script and commit are one message
    /// where the script is small and no answer must be looked at before the commit.
    pub async fn commit_with(mut self, mut script: Script) -> Result<()> {
        if script.is_empty() {
            return self.commit().await;
        }
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
            Err(error) => refused(self.rollback(error).await),
        }
    }

    /// Undoes everything, because of `error`.
    pub async fn rollback(mut self, error: Error) -> Error {
        if error.reason() == Reason::StorageUnavailable {
            return self.distrust(error);
        }
        if self.begun
            && let Err(error) = sqlx::query("ROLLBACK").execute(self.tx().conn()).await
        {
            return self.distrust(error);
        }
        self.release();
        error
    }

    /// Leaves the connection to the next writer.
    fn release(mut self) {
        *self.slot = self.tx.take().map(|tx| tx.0);
    }

    /// Drops the connection, which undoes what it did; the next writer opens the file anew.
    fn distrust(self, error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
        self.db.set_healthy(false);
        Error::storage(error)
    }
}

impl Db {
    /// Opens the database at `path`, making it when it is missing, and migrates it.
    pub async fn open(path: &Path) -> Result<Self> {
        let db = Self::connect(path).await?;
        db.migrate_now().await?;
        Ok(db)
    }

    /// As [`open`](Self::open), for a simulation: statements take no simulated time, and
    /// nothing is synced.
    pub fn open_simulated(path: &Path) -> Result<Self> {
        let db = futures_executor::block_on(Self::connect_as(path, true))?;
        futures_executor::block_on(db.migrate_now())?;
        Ok(db)
    }

    /// Opens the database at `path` as it is.
    pub async fn connect(path: &Path) -> Result<Self> {
        Self::connect_as(path, false).await
    }

    async fn connect_as(path: &Path, blocking: bool) -> Result<Self> {
        let synchronous = if blocking || faults::planted(Fault::UnsyncedCommits) {
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
        let writer = open_connection(&options).await?;
        Ok(Self(Arc::new(Inner {
            options,
            path: path.to_owned(),
            writer: tokio::sync::Mutex::new(Some(writer)),
            readers: Mutex::default(),
            reader_slots: Semaphore::new(READERS),
            healthy: watch::Sender::new(true),
            headroom: AtomicU64::new(HEADROOM),
            blocking,
        })))
    }

    /// Drives work on the database to its end: in a simulation without letting time pass.
    pub async fn drive<T>(&self, work: impl Future<Output = T>) -> T {
        if self.0.blocking { futures_executor::block_on(work) } else { work.await }
    }

    /// Begins a transaction. One writer runs at a time. Dropped without
    /// [`commit`](Write::commit), everything it did is undone.
    pub async fn begin(&self) -> Result<Write<'_>> {
        let mut write = self.prepare().await?;
        match sqlx::query(BEGIN).execute(write.tx().conn()).await {
            Ok(_) => {
                write.begun = true;
                Ok(write)
            }
            Err(error) => Err(write.distrust(error)),
        }
    }

    /// As [`begin`](Self::begin), but the transaction begins with
    /// [`Write::commit_with`]. What is read before that is what a transaction would read: nobody else
    /// writes meanwhile.
    pub async fn prepare(&self) -> Result<Write<'_>> {
        let mut slot = self.0.writer.lock().await;
        let conn = match slot.take() {
            Some(conn) => Ok(conn),
            None => open_connection(&self.0.options).await,
        };
        match conn {
            Ok(conn) => Ok(Write { db: self, slot, tx: Some(Tx(conn)), begun: false }),
            Err(error) => {
                self.set_healthy(false);
                Err(error)
            }
        }
    }

    /// Runs `f` in a transaction: committed, and synced, when `f` is `Ok`, else rolled back.
    pub async fn write<T, F>(&self, f: F) -> Result<T>
    where
        F: for<'t> FnOnce(&'t mut Tx) -> BoxFuture<'t, Result<T>> + Send,
        T: Send,
    {
        let work = async {
            let mut write = self.begin().await?;
            match f(write.tx()).await {
                Ok(value) => write.commit().await.map(|()| value),
                Err(error) => Err(write.rollback(error).await),
            }
        };
        self.drive(work).await
    }

    /// Runs `f` on a reading connection. Each statement sees what was committed before it.
    pub async fn read<T, F>(&self, f: F) -> Result<T>
    where
        F: for<'t> FnOnce(&'t mut Tx) -> BoxFuture<'t, Result<T>> + Send,
        T: Send,
    {
        self.drive(self.read_now(f)).await
    }

    async fn read_now<T, F>(&self, f: F) -> Result<T>
    where
        F: for<'t> FnOnce(&'t mut Tx) -> BoxFuture<'t, Result<T>> + Send,
        T: Send,
    {
        let _slot = self.0.reader_slots.acquire().await.map_err(Error::internal)?;
        let pooled = self.0.readers.lock().pop();
        let conn = match pooled {
            Some(conn) => conn,
            None => open_connection(&reader(&self.0.options)).await?,
        };
        let mut tx = Tx(conn);
        let result = f(&mut tx).await;
        if !matches!(&result, Err(error) if error.reason() == Reason::StorageUnavailable) {
            self.0.readers.lock().push(tx.0);
        }
        result
    }

    /// Whether the last write worked and there is room for more.
    pub fn healthy(&self) -> watch::Receiver<bool> {
        self.0.healthy.subscribe()
    }

    /// Refuses when nothing new should be accepted; what runs may still end.
    pub fn check_admission(&self) -> Result<()> {
        if *self.0.healthy.borrow() {
            return Ok(());
        }
        Err(Error::new(
            Kind::Unavailable,
            Reason::StorageUnavailable,
            "storage is failing or full; nothing was accepted",
        )
        .retry_after(Duration::from_secs(1)))
    }

    /// Finds out whether storage works: enough free space and, where `healthy` is false, a
    /// write that reaches the disk. Called twice a second by [`watch_health`].
    pub async fn probe(&self) -> bool {
        let free = rustix::fs::statvfs(self.0.path.parent().unwrap_or(Path::new(".")))
            .map(|stat| stat.f_bavail.saturating_mul(stat.f_frsize));
        let room = matches!(free, Ok(free) if free >= self.0.headroom.load(Ordering::Relaxed))
            && self.0.path.exists();
        let works =
            if room && !*self.0.healthy.borrow() { self.touch().await.is_ok() } else { room };
        self.set_healthy(works);
        works
    }

    /// Sets the free space below which nothing new is accepted.
    pub fn set_headroom(&self, bytes: u64) {
        self.0.headroom.store(bytes, Ordering::Relaxed);
    }

    async fn touch(&self) -> Result<()> {
        self.write(|tx| {
            Box::pin(async move {
                sqlx::query(
                    "INSERT INTO settings (name, value) VALUES ('probe', x'00')
                     ON CONFLICT (name) DO UPDATE SET value = excluded.value",
                )
                .execute(tx.conn())
                .await?;
                Ok(())
            })
        })
        .await
    }

    fn set_healthy(&self, healthy: bool) {
        let healthy = healthy || faults::planted(Fault::ReadyWithoutStorage);
        self.0.healthy.send_if_modified(|current| {
            let changed = *current != healthy;
            if changed && healthy {
                tracing::info!("storage works again");
            } else if changed {
                tracing::error!(path = %self.0.path.display(), "storage is failing or full");
            }
            *current = healthy;
            changed
        });
    }

    /// Closes all connections after a last checkpoint.
    pub async fn close(&self) {
        self.0.reader_slots.close();
        let readers = std::mem::take(&mut *self.0.readers.lock());
        for reader in readers {
            // Closing a reader writes nothing that could be lost.
            let _ = reader.close().await;
        }
        if let Some(writer) = self.0.writer.lock().await.take()
            && let Err(error) = writer.close().await
        {
            tracing::warn!(%error, "the database was not closed cleanly; it will recover");
        }
    }
}

/// Probes storage twice a second, for ever.
pub async fn watch_health(db: Db, clock: crate::clock::Clock) -> anyhow::Result<()> {
    loop {
        clock.sleep(Duration::from_millis(500)).await;
        db.probe().await;
    }
}

/// The outcome of what could not be committed.
fn refused(error: Error) -> Result<()> {
    if faults::planted(Fault::AckFailedCommits) { Ok(()) } else { Err(error) }
}

/// Options of a connection that reads.
fn reader(writer: &SqliteConnectOptions) -> SqliteConnectOptions {
    writer.clone().read_only(true).pragma("cache_size", READER_CACHE)
}

async fn open_connection(options: &SqliteConnectOptions) -> Result<SqliteConnection> {
    options.connect().await.map_err(Error::storage)
}

impl From<sqlx::Error> for Error {
    /// A statement failed: the storage's fault, or a defect of ours.
    fn from(error: sqlx::Error) -> Self {
        match &error {
            sqlx::Error::Database(database) if !database.is_unique_violation() => {
                // SQLite's extended codes carry the primary code in their low byte:
                // 7 NOMEM, 8 READONLY, 10 IOERR, 11 CORRUPT, 13 FULL, 14 CANTOPEN.
                let code = database.code().and_then(|code| code.parse::<u32>().ok()).unwrap_or(0);
                match code & 0xff {
                    5..=8 | 10 | 11 | 13 | 14 => Self::storage(error),
                    _ => Self::internal(error),
                }
            }
            sqlx::Error::Io(_) | sqlx::Error::WorkerCrashed => Self::storage(error),
            _ => Self::internal(error),
        }
    }
}
