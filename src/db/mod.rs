//! The database: transactions as the unit of work, on one engine or another.
//!
//! A store writes its statements once; [`Tx::query`] runs them on the engine that is there, and
//! a [`Script`] gathers what one transaction writes, so that it is sent together. A commit is on
//! stable storage before it is acknowledged. Knows no table but the migrator's.

mod admin;
mod bulk;
mod facts;
mod migrations;
pub mod page;
#[cfg(feature = "postgres")]
mod postgres;
mod row;
mod script;
mod simulated;
mod sqlite;
mod statement;
#[cfg(test)]
pub mod testing;
pub mod transfer;
mod value;
mod write;

use std::{
    future::Future,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use futures_util::future::BoxFuture;
#[cfg(feature = "postgres")]
use sqlx::PgConnection;
use sqlx::SqliteConnection;
use tokio::sync::watch;

pub use admin::{Location, Status, backup, migrate, restore, servers, status};
pub use bulk::{Bulk, Type};
pub use facts::{Facts, OLDEST_POSTGRES, facts};
#[cfg(feature = "postgres")]
pub use postgres::SETTINGS as POSTGRES_SETTINGS;
pub use row::{Column, FromRow, Row};
pub use script::Script;
pub use simulated::{Simulated, Way, in_time};
pub use statement::{Query, Sql, Statement};
pub use value::{Bind, Json, Value, Values};
pub use write::{Write, is_unknown};

#[cfg(feature = "postgres")]
use self::postgres::Postgres;
use self::{
    sqlite::Sqlite,
    write::{Unknown, Writing},
};
use crate::{
    error::{Error, Kind, Reason, Result},
    faults::{self, Fault},
    id::Entropy,
};

/// Which engine keeps the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// A file of this process.
    Sqlite,
    /// A server that others share.
    Postgres,
}

/// A database; clones share it.
#[derive(Clone)]
pub struct Db(Arc<Inner>);

struct Inner {
    backend: Backend,
    health: Arc<Health>,
    /// How this server reaches it, in a simulation.
    simulated: Option<Simulated>,
}

enum Backend {
    Sqlite(Box<Sqlite>),
    #[cfg(feature = "postgres")]
    Postgres(Arc<Postgres>),
}

/// Whether the last write worked and there is room for more.
struct Health {
    healthy: watch::Sender<bool>,
    /// Names the database in the log.
    name: String,
}

impl Health {
    fn new(name: String) -> Arc<Self> {
        Arc::new(Self { healthy: watch::Sender::new(true), name })
    }

    fn set(&self, healthy: bool) {
        let healthy = healthy || faults::planted(Fault::ReadyWithoutStorage);
        self.healthy.send_if_modified(|current| {
            let changed = *current != healthy;
            if changed && healthy {
                tracing::info!("storage works again");
            } else if changed {
                tracing::error!(database = %self.name, "storage is failing or full");
            }
            *current = healthy;
            changed
        });
    }
}

/// A transaction, or for reads a connection.
pub enum Tx {
    #[doc(hidden)]
    Sqlite(SqliteConnection),
    #[cfg(feature = "postgres")]
    #[doc(hidden)]
    Postgres(PgConnection),
}

impl Db {
    /// Opens the file at `path`, making it when it is missing, and migrates it.
    pub async fn open(path: &Path) -> Result<Self> {
        let db = Self::connect(path).await?;
        db.migrate_now().await?;
        Ok(db)
    }

    /// As [`open`](Self::open), for a simulation: statements take no simulated time, and
    /// nothing is synced.
    pub fn open_simulated(simulated: Simulated) -> Result<Self> {
        let db =
            futures_executor::block_on(Self::connect_as(simulated.path.clone(), Some(simulated)))?;
        futures_executor::block_on(db.migrate_now())?;
        Ok(db)
    }

    /// Opens a database and migrates it. A server's is used by at most so many connections.
    pub async fn open_at(at: &Location, connections: usize, entropy: &Entropy) -> Result<Self> {
        migrate(at).await?;
        Self::connect_at(at, connections, entropy).await
    }

    /// Opens a database as it is.
    #[cfg_attr(
        not(feature = "postgres"),
        expect(unused_variables, reason = "what a server's database needs")
    )]
    pub async fn connect_at(at: &Location, connections: usize, entropy: &Entropy) -> Result<Self> {
        match at {
            Location::File(path) => Self::connect(path).await,
            #[cfg(feature = "postgres")]
            Location::Url(url) => {
                let health = Health::new(at.to_string());
                // The lock of this process must be no other's.
                let fence = entropy.u64().cast_signed();
                let postgres = Postgres::connect(url, connections, fence, health.clone()).await?;
                let backend = Backend::Postgres(Arc::new(postgres));
                Ok(Self(Arc::new(Inner { backend, health, simulated: None })))
            }
            #[cfg(not(feature = "postgres"))]
            Location::Url(_) => Err(admin::without_postgres()),
        }
    }

    /// Opens the file at `path` as it is.
    pub async fn connect(path: &Path) -> Result<Self> {
        Self::connect_as(path.to_owned(), None).await
    }

    async fn connect_as(path: PathBuf, simulated: Option<Simulated>) -> Result<Self> {
        let health = Health::new(path.display().to_string());
        let sqlite = Sqlite::connect(&path, simulated.as_ref(), health.clone()).await?;
        let backend = Backend::Sqlite(Box::new(sqlite));
        Ok(Self(Arc::new(Inner { backend, health, simulated })))
    }

    /// Which engine it is.
    pub fn engine(&self) -> Engine {
        match &self.0.backend {
            Backend::Sqlite(_) => Engine::Sqlite,
            #[cfg(feature = "postgres")]
            Backend::Postgres(_) => Engine::Postgres,
        }
    }

    /// Whether other servers write to it too: all of a server's database do, and those that share a
    /// file in a simulation.
    pub fn is_shared(&self) -> bool {
        self.engine() == Engine::Postgres || self.way().is_some()
    }

    /// An empty script for it.
    pub fn script(&self) -> Script {
        Script::new(self.engine(), self.is_shared())
    }

    fn way(&self) -> Option<&dyn Way> {
        self.0.simulated.as_ref()?.way.as_deref()
    }

    /// In a simulation, the way to the database.
    async fn arrive(&self) -> Result<()> {
        let Some(way) = self.way() else { return Ok(()) };
        let arrived = simulated::in_time(way.go()).await;
        if arrived.is_err() {
            self.0.health.set(false);
        }
        arrived
    }

    /// In a simulation, the way back with the outcome of a commit.
    async fn answered(&self, done: Result<()>) -> Result<()> {
        if done.is_ok()
            && let Err(error) = self.arrive().await
        {
            return Err(Error::storage(Unknown(error)));
        }
        done
    }

    /// Drives work on the database to its end: in a simulation without letting time pass.
    pub async fn drive<T>(&self, work: impl Future<Output = T>) -> T {
        if self.0.simulated.is_some() { simulated::at_once(work).await } else { work.await }
    }

    /// Begins a transaction.
    pub async fn begin(&self) -> Result<Write<'_>> {
        self.arrive().await?;
        let writing = match &self.0.backend {
            Backend::Sqlite(sqlite) => sqlite.begin().await.map(Writing::Sqlite),
            #[cfg(feature = "postgres")]
            Backend::Postgres(postgres) => {
                postgres.begin(postgres.write_slot().await?).await.map(Writing::Postgres)
            }
        }?;
        Ok(Write { writing, db: self })
    }

    /// As [`begin`](Self::begin), but the transaction begins with [`Write::commit_with`]: what is
    /// read before that may have been changed by others when it does.
    pub async fn prepare(&self) -> Result<Write<'_>> {
        self.arrive().await?;
        let writing = match &self.0.backend {
            Backend::Sqlite(sqlite) => sqlite.prepare().await.map(Writing::Sqlite),
            #[cfg(feature = "postgres")]
            Backend::Postgres(postgres) => {
                postgres.prepare(postgres.write_slot().await?).await.map(Writing::Postgres)
            }
        }?;
        Ok(Write { writing, db: self })
    }

    /// Begins a transaction when the last one that [`prepare`](Self::prepare) began has ended,
    /// whatever became of its connection: what it wrote is to be seen, or was undone.
    pub async fn begin_after_last(&self) -> Result<Write<'_>> {
        self.arrive().await?;
        let writing = match &self.0.backend {
            Backend::Sqlite(sqlite) => sqlite.begin().await.map(Writing::Sqlite),
            #[cfg(feature = "postgres")]
            Backend::Postgres(postgres) => {
                let write = postgres.prepare(postgres.write_slot().await?).await?;
                write.begin_alone().await.map(Writing::Postgres)
            }
        }?;
        Ok(Write { writing, db: self })
    }

    /// Runs `f` in a transaction: committed, and synced, when `f` is `Ok`, else rolled back.
    pub async fn write<T, F>(&self, f: F) -> Result<T>
    where
        F: for<'t> FnOnce(&'t mut Tx) -> BoxFuture<'t, Result<T>> + Send + 'static,
        T: Send + 'static,
    {
        // Large, so that it is not to be a part of all that ever writes.
        match &self.0.backend {
            Backend::Sqlite(_) => {
                let work = async { self.begin().await?.transact(f).await };
                Box::pin(self.drive(work)).await
            }
            #[cfg(feature = "postgres")]
            Backend::Postgres(postgres) => {
                let slot = postgres.write_slot().await?;
                let (db, at) = (self.clone(), postgres.clone());
                let work = async move {
                    let writing = Writing::Postgres(at.begin(slot).await?);
                    Write { writing, db: &db }.transact(f).await
                };
                postgres.see_through(work).await
            }
        }
    }

    /// As [`write`](Self::write), ahead of all others: for what keeps this server among others, so that
    /// none that has much to write is taken for dead. Undone when the caller leaves.
    pub async fn write_first<T, F>(&self, f: F) -> Result<T>
    where
        F: for<'t> FnOnce(&'t mut Tx) -> BoxFuture<'t, Result<T>> + Send + 'static,
        T: Send + 'static,
    {
        match &self.0.backend {
            Backend::Sqlite(_) => self.write(f).await,
            #[cfg(feature = "postgres")]
            Backend::Postgres(postgres) => {
                let slot = postgres.first_slot().await?;
                let writing = Writing::Postgres(postgres.begin(slot).await?);
                Box::pin(Write { writing, db: self }.transact(f)).await
            }
        }
    }

    /// Runs `f` on a reading connection. Each statement sees what was committed before it.
    pub async fn read<T, F>(&self, f: F) -> Result<T>
    where
        F: for<'t> FnOnce(&'t mut Tx) -> BoxFuture<'t, Result<T>> + Send + 'static,
        T: Send + 'static,
    {
        match &self.0.backend {
            Backend::Sqlite(sqlite) => {
                let work = async {
                    self.arrive().await?;
                    let (slot, mut tx) = sqlite.reader().await?;
                    let result = f(&mut tx).await;
                    if !is_storage_failure(&result) {
                        sqlite.return_reader(tx);
                    }
                    drop(slot);
                    self.arrive().await?;
                    result
                };
                Box::pin(self.drive(work)).await
            }
            #[cfg(feature = "postgres")]
            Backend::Postgres(postgres) => {
                let slot = postgres.read_slot().await?;
                let at = postgres.clone();
                let work = async move {
                    let mut reader = at.reader(slot).await?;
                    let result = postgres::limited(f(&mut reader.tx)).await;
                    if is_storage_failure(&result) {
                        at.forget_idle();
                    } else {
                        at.return_reader(reader);
                    }
                    result
                };
                postgres.see_through(work).await
            }
        }
    }

    /// Whether the last write worked and there is room for more.
    pub fn healthy(&self) -> watch::Receiver<bool> {
        self.0.health.healthy.subscribe()
    }

    /// Refuses when nothing new should be accepted; what runs may still end.
    pub fn check_admission(&self) -> Result<()> {
        if *self.0.health.healthy.borrow() {
            return Ok(());
        }
        Err(Error::new(
            Kind::Unavailable,
            Reason::StorageUnavailable,
            "storage is failing or full; nothing was accepted",
        )
        .retry_after(Duration::from_secs(1)))
    }

    /// Finds out whether storage works: enough free space, or a server that answers, and, where
    /// it did not work before, a write that reaches the disk. Called twice a second by [`watch_health`].
    pub async fn probe(&self) -> bool {
        let room = match &self.0.backend {
            Backend::Sqlite(sqlite) => sqlite.has_room() && self.arrive().await.is_ok(),
            #[cfg(feature = "postgres")]
            Backend::Postgres(postgres) => postgres.answers().await,
        };
        let was_healthy = *self.0.health.healthy.borrow();
        let works = if room && !was_healthy { self.touch().await.is_ok() } else { room };
        self.0.health.set(works);
        works
    }

    /// Sets the free space below which nothing new is accepted.
    pub fn set_headroom(&self, bytes: u64) {
        match &self.0.backend {
            Backend::Sqlite(sqlite) => sqlite.set_headroom(bytes),
            // The server's disk is its operator's.
            #[cfg(feature = "postgres")]
            Backend::Postgres(_) => {}
        }
    }

    async fn touch(&self) -> Result<()> {
        self.write(|tx| {
            Box::pin(async move { tx.query(TOUCH).bind(vec![0]).run().await.map(drop) })
        })
        .await
    }

    /// Has the engine look at statements without running them; returns those that it refuses,
    /// with the reason.
    pub async fn check(&self, statements: &[Statement]) -> Result<Vec<(&'static str, String)>> {
        let engine = self.engine();
        let mut texts = Vec::new();
        for statement in statements {
            match (statement, engine) {
                (Statement::Query(sql), Engine::Sqlite) => texts.push(sql.sqlite),
                (Statement::Query(sql), Engine::Postgres) => texts.push(sql.postgres),
                (Statement::Rows(bulk), _) => {
                    texts.extend([bulk.text(engine, 1), bulk.text(engine, 64)]);
                }
            }
        }
        texts.retain(|text| !text.is_empty());
        let check = self.read(|tx| {
            Box::pin(async move {
                let mut refused = Vec::new();
                for text in texts {
                    if let Err(error) = tx.prepare(text).await {
                        refused.push((text, error.to_string()));
                    }
                }
                Ok(refused)
            })
        });
        check.await
    }

    /// Closes all connections.
    pub async fn close(&self) {
        match &self.0.backend {
            Backend::Sqlite(sqlite) => sqlite.close().await,
            #[cfg(feature = "postgres")]
            Backend::Postgres(postgres) => postgres.close().await,
        }
    }
}

/// A write that changes nothing that counts.
const TOUCH: Sql = Sql::new(
    "INSERT INTO settings (name, value) VALUES ('probe', $1)
     ON CONFLICT (name) DO UPDATE SET value = excluded.value",
);

/// Statements of this kernel.
pub const STATEMENTS: &[Statement] =
    &[Statement::Query(TOUCH), Statement::Query(admin::COPY), Statement::Query(admin::CHECK)];

/// Probes storage twice a second, for ever.
pub async fn watch_health(db: Db, clock: crate::clock::Clock) -> anyhow::Result<()> {
    loop {
        clock.sleep(Duration::from_millis(500)).await;
        db.probe().await;
    }
}

fn is_storage_failure<T>(result: &Result<T>) -> bool {
    matches!(result, Err(error) if error.reason() == Reason::StorageUnavailable)
}

impl From<sqlx::Error> for Error {
    /// A statement failed: the storage's fault, or a defect of ours.
    fn from(error: sqlx::Error) -> Self {
        match &error {
            #[cfg(feature = "postgres")]
            sqlx::Error::Database(database)
                if database.try_downcast_ref::<sqlx::postgres::PgDatabaseError>().is_some() =>
            {
                postgres::from_database(error)
            }
            sqlx::Error::Database(database) if !database.is_unique_violation() => {
                // SQLite's extended codes carry the primary code in their low byte:
                // 7 NOMEM, 8 READONLY, 10 IOERR, 11 CORRUPT, 13 FULL, 14 CANTOPEN.
                let code = database.code().and_then(|code| code.parse::<u32>().ok()).unwrap_or(0);
                match code & 0xff {
                    5..=8 | 10 | 11 | 13 | 14 => Self::storage(error),
                    _ => Self::internal(error),
                }
            }
            sqlx::Error::Io(_) | sqlx::Error::WorkerCrashed | sqlx::Error::Tls(_) => {
                Self::storage(error)
            }
            _ => Self::internal(error),
        }
    }
}
