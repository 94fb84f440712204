//! The cluster engine: Postgres, shared by any number of servers.
//!
//! Nothing here relies on being the only writer. What a transaction writes depends on rows that
//! may have been read long before it began; each such row is written only if it is still at the
//! revision that was read, and the transaction is undone with `CONFLICT` if one is not.
//!
//! A connection that is lost during COMMIT leaves the outcome unknown. The ledger's transactions
//! hold an advisory lock of this process, so that whoever begins the next one waits until the
//! old one has ended on the server, whatever became of its connection; then the ledger reads
//! back what it wrote. The error says so: [`is_unknown`](super::is_unknown).
//!
//! Calls have a limit: a server that does not answer is as good as one that is gone.

pub(super) mod dump;
mod error;
pub(super) mod facts;
pub(super) mod migrate;
#[cfg(test)]
mod tests;
pub(super) mod transfer;
pub(super) mod value;

use std::{
    future::Future,
    sync::{Arc, atomic::AtomicU64, atomic::Ordering},
    time::Duration,
};

use parking_lot::Mutex;
use sqlx::{
    AssertSqlSafe, ConnectOptions as _, Connection as _, PgConnection, postgres::PgConnectOptions,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::task::TaskTracker;
use tracing::Instrument as _;

pub(super) use self::error::from_database;
use super::{Health, OLDEST_POSTGRES as OLDEST, Script, Tx, write::Unknown};
use crate::error::{Error, Kind, Reason, Result};

/// Connections that write: the ledger's, and a few for what is rare.
const WRITERS: usize = 3;

/// One for what keeps this server among others, and one for looks at the server's health.
const APART: usize = 2;

/// Longest time for a connection to be made.
const CONNECT: Duration = Duration::from_secs(5);

/// Longest time for a transaction or a read.
const CALL: Duration = Duration::from_secs(15);

/// Longest time for a look at the server's health.
const LOOK: Duration = Duration::from_millis(450);

/// At the end, how long what is under way may go on: nobody waits for it any more.
const LAST: Duration = Duration::from_secs(1);

/// What every connection asks of the server. Its own limits are above ours: they end what a
/// client that vanished has left behind. Every statement finds its rows by an index, and its plan is
/// made once, while tables are still empty: what looks best then reads all of them later.
pub const SETTINGS: [(&str, &str); 7] = [
    ("statement_timeout", "20s"),
    ("lock_timeout", "10s"),
    ("idle_in_transaction_session_timeout", "10s"),
    ("jit", "off"),
    ("enable_seqscan", "off"),
    ("enable_hashjoin", "off"),
    ("enable_mergejoin", "off"),
];

/// A database and its connections.
pub(super) struct Postgres {
    options: PgConnectOptions,
    /// Raised when a connection is found broken: those made before are not used any more.
    era: AtomicU64,
    writers: Arc<Reserve>,
    readers: Arc<Reserve>,
    /// For writes that must not wait for others, or for a connection to be made: one at a time.
    first: Arc<Reserve>,
    /// For looks at the health, which must not wait for others.
    probe: tokio::sync::Mutex<Option<PgConnection>>,
    /// What is under way, with or without its caller.
    calls: TaskTracker,
    /// Begins a transaction that waits for the end of this process's last one.
    begin_alone: String,
    health: Arc<Health>,
}

/// The connections of one kind of work, which waits for no other kind.
struct Reserve {
    turns: Arc<Semaphore>,
    idle: Mutex<Vec<PgConnection>>,
}

/// The right to one connection of a reserve.
pub(super) struct Slot {
    reserve: Arc<Reserve>,
    _turn: OwnedSemaphorePermit,
}

/// A transaction that writes.
pub struct Write<'a> {
    db: &'a Postgres,
    slot: Slot,
    tx: Option<Tx>,
    era: u64,
    begun: bool,
}

/// A connection for reads. What is found on it may be older than the call by no more than the
/// time that it took.
pub(super) struct Reader {
    pub(super) tx: Tx,
    slot: Slot,
    era: u64,
}

impl Reserve {
    fn new(connections: usize) -> Arc<Self> {
        Arc::new(Self { turns: Arc::new(Semaphore::new(connections)), idle: Mutex::default() })
    }

    /// A slot, when it is this caller's turn.
    async fn slot(self: &Arc<Self>) -> Result<Slot> {
        let turn = self.turns.clone().acquire_owned().await.map_err(Error::internal)?;
        Ok(Slot { reserve: self.clone(), _turn: turn })
    }
}

impl Write<'_> {
    pub(super) fn tx(&mut self) -> &mut Tx {
        self.tx.as_mut().expect("there until the transaction ends")
    }

    async fn execute(&mut self, text: &str) -> Result<(), sqlx::Error> {
        let Some(Tx::Postgres(conn)) = &mut self.tx else { return Ok(()) };
        sqlx::raw_sql(AssertSqlSafe(text)).execute(conn).await.map(drop)
    }

    pub(super) async fn begin(mut self) -> Result<Self> {
        match limited(self.execute("BEGIN")).await {
            Ok(()) => {
                self.begun = true;
                Ok(self)
            }
            Err(error) => Err(self.rollback(error).await),
        }
    }

    /// Begins with the lock of this process: its last transaction has ended then.
    pub(super) async fn begin_alone(mut self) -> Result<Self> {
        self.begun = true;
        let text = self.db.begin_alone.clone();
        match limited(self.execute(&text)).await {
            Ok(()) => Ok(self),
            Err(error) => Err(self.rollback(error).await),
        }
    }

    pub(super) async fn commit(mut self) -> Result<()> {
        if self.begun
            && let Err(error) = limited(self.execute("COMMIT")).await
        {
            self.distrust();
            // A refusal is an outcome.
            let refused = error.reason() == Reason::Conflict;
            return Err(if refused { error } else { Error::storage(Unknown(error)) });
        }
        self.release();
        Ok(())
    }

    pub(super) async fn commit_with(self, script: Script) -> Result<()> {
        if script.is_empty() {
            return self.commit().await;
        }
        let mut write = if self.begun { self } else { self.begin_alone().await? };
        match limited(script.run(write.tx())).await {
            Ok(()) => write.commit().await,
            Err(error) => Err(write.rollback(error).await),
        }
    }

    pub(super) async fn rollback(mut self, error: Error) -> Error {
        if error.reason() == Reason::StorageUnavailable
            || self.begun && limited(self.execute("ROLLBACK")).await.is_err()
        {
            self.distrust();
        } else {
            self.release();
        }
        error
    }

    /// Leaves the connection to others.
    fn release(mut self) {
        if let Some(tx) = self.tx.take() {
            self.db.give_back(&self.slot, tx, self.era);
        }
    }

    /// Drops the connection, which undoes what it did, and others that may be as bad.
    fn distrust(self) {
        self.db.distrust();
    }
}

impl Postgres {
    /// Connects, and finds out whether the server keeps what it acknowledges.
    pub(super) async fn connect(
        url: &str,
        connections: usize,
        fence: i64,
        health: Arc<Health>,
    ) -> Result<Self> {
        let options = options(url)?.options(SETTINGS);
        let db = Self {
            options,
            era: AtomicU64::new(0),
            writers: Reserve::new(WRITERS),
            readers: Reserve::new(connections.saturating_sub(WRITERS + APART).max(1)),
            first: Reserve::new(1),
            probe: tokio::sync::Mutex::new(None),
            calls: TaskTracker::new(),
            begin_alone: format!("BEGIN; SELECT pg_advisory_xact_lock({fence})"),
            health,
        };
        let conn = db.open_connection().await?;
        db.writers.idle.lock().push(conn);
        Ok(db)
    }

    async fn open_connection(&self) -> Result<PgConnection> {
        connect(&self.options).await
    }

    async fn connection(&self, slot: &Slot) -> Result<Tx> {
        let idle = slot.reserve.idle.lock().pop();
        match idle {
            Some(conn) => Ok(Tx::Postgres(conn)),
            None => self.open_connection().await.map(Tx::Postgres),
        }
    }

    fn give_back(&self, slot: &Slot, tx: Tx, era: u64) {
        if let Tx::Postgres(conn) = tx
            && era == self.era.load(Ordering::Relaxed)
        {
            slot.reserve.idle.lock().push(conn);
        }
    }

    fn reserves(&self) -> [&Reserve; 3] {
        [&self.writers, &self.first, &self.readers]
    }

    /// Has connections made anew: those of before are as good as one that was found broken.
    pub(super) fn forget_idle(&self) {
        self.era.fetch_add(1, Ordering::Relaxed);
        for reserve in self.reserves() {
            reserve.idle.lock().clear();
        }
    }

    fn distrust(&self) {
        self.forget_idle();
        self.health.set(false);
    }

    /// The right to a connection that writes, when it is this caller's turn.
    pub(super) async fn write_slot(&self) -> Result<Slot> {
        self.writers.slot().await
    }

    /// The right to the connection of writes that go ahead of all others.
    pub(super) async fn first_slot(&self) -> Result<Slot> {
        self.first.slot().await
    }

    /// The right to a connection for reads, when it is this caller's turn.
    pub(super) async fn read_slot(&self) -> Result<Slot> {
        self.readers.slot().await
    }

    pub(super) async fn begin(&self, slot: Slot) -> Result<Write<'_>> {
        self.prepare(slot).await?.begin().await
    }

    /// The transaction begins with [`Write::commit_with`].
    pub(super) async fn prepare(&self, slot: Slot) -> Result<Write<'_>> {
        let era = self.era.load(Ordering::Relaxed);
        match self.connection(&slot).await {
            Ok(tx) => Ok(Write { db: self, slot, tx: Some(tx), era, begun: false }),
            Err(error) => {
                // Those that there are may be sound.
                self.health.set(false);
                Err(error)
            }
        }
    }

    /// A connection for reads.
    pub(super) async fn reader(&self, slot: Slot) -> Result<Reader> {
        let era = self.era.load(Ordering::Relaxed);
        let tx = self.connection(&slot).await?;
        Ok(Reader { tx, slot, era })
    }

    /// Takes a reading connection back.
    pub(super) fn return_reader(&self, reader: Reader) {
        self.give_back(&reader.slot, reader.tx, reader.era);
    }

    /// Whether the server answers at once and takes writes.
    pub(super) async fn answers(&self) -> bool {
        let mut slot = self.probe.lock().await;
        let look = async {
            let mut conn = match slot.take() {
                Some(conn) => conn,
                None => self.open_connection().await?,
            };
            let standby: bool =
                sqlx::query_scalar("SELECT pg_is_in_recovery()").fetch_one(&mut conn).await?;
            *slot = Some(conn);
            Ok::<_, Error>(!standby)
        };
        matches!(tokio::time::timeout(LOOK, look).await, Ok(Ok(true)))
    }

    /// Does work to its end, also when the caller leaves meanwhile: a connection that is left in the
    /// midst of a call can only be closed, and callers that lose patience with a slow server would
    /// have it make one connection after the other.
    pub(super) async fn see_through<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        match self.calls.spawn(work.in_current_span()).await {
            Ok(done) => done,
            Err(ended) => match ended.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(_) => Err(Error::storage("this process is ending")),
            },
        }
    }

    /// Begins nothing more, gives what is under way a moment to end, and closes the connections.
    pub(super) async fn close(&self) {
        self.reserves().into_iter().for_each(|reserve| reserve.turns.close());
        self.calls.close();
        if tokio::time::timeout(LAST, self.calls.wait()).await.is_err() {
            tracing::warn!(
                calls = self.calls.len(),
                "calls to the database are left to their fate"
            );
        }
        let mut idle = Vec::from_iter(self.probe.lock().await.take());
        for reserve in self.reserves() {
            idle.append(&mut reserve.idle.lock());
        }
        for conn in idle {
            // Nothing is under way on it that could be lost.
            let _ = tokio::time::timeout(LOOK, conn.close()).await;
        }
    }
}

/// What a URL says.
pub(super) fn options(url: &str) -> Result<PgConnectOptions> {
    let options: PgConnectOptions = url.parse().map_err(|error| {
        Error::invalid(
            "database.url",
            "is no URL of a database; write postgres://USER:PASSWORD@HOST:PORT/DATABASE",
        )
        .caused_by(Box::<dyn std::error::Error + Send + Sync>::from(error))
    })?;
    let named =
        if url.contains("application_name") { options } else { options.application_name("baton") };
    Ok(named.statement_cache_capacity(256).disable_statement_logging())
}

/// The URL without its password, for people.
pub fn place(url: &str) -> String {
    let Some((head, rest)) = url.split_once("://") else { return "a database".to_owned() };
    let rest = rest.split('?').next().unwrap_or_default();
    match rest.rsplit_once('@') {
        Some((user, host)) => {
            let user = user.split(':').next().unwrap_or_default();
            format!("{head}://{user}@{host}")
        }
        None => format!("{head}://{rest}"),
    }
}

/// Makes a connection to a server that keeps what it acknowledges.
pub(super) async fn connect(options: &PgConnectOptions) -> Result<PgConnection> {
    let connecting = tokio::time::timeout(CONNECT, options.connect()).await;
    let mut conn = match connecting {
        Ok(Ok(conn)) => conn,
        Ok(Err(error)) => return Err(Error::storage(error)),
        Err(_) => return Err(Error::storage(format!("no connection within {CONNECT:?}"))),
    };
    let version = conn.server_version_num().unwrap_or(0) / 10_000;
    if version < OLDEST {
        return Err(Error::new(
            Kind::FailedPrecondition,
            Reason::StateConflict,
            format!("the server is PostgreSQL {version}; baton needs {OLDEST} or newer"),
        ));
    }
    let (sync, fsync): (String, String) =
        sqlx::query_as("SELECT current_setting('synchronous_commit'), current_setting('fsync')")
            .fetch_one(&mut conn)
            .await?;
    if sync == "off" {
        return Err(Error::new(
            Kind::FailedPrecondition,
            Reason::StateConflict,
            "synchronous_commit is off, so that the server may lose what it acknowledged; set it \
             to on: ALTER DATABASE … SET synchronous_commit = on",
        ));
    }
    if fsync == "off" {
        tracing::warn!("the server runs with fsync=off: a power cut may lose acknowledged tasks");
    }
    Ok(conn)
}

/// Awaits what must not take longer than [`CALL`].
pub(super) async fn limited<T, E: Into<Error>>(
    call: impl Future<Output = Result<T, E>>,
) -> Result<T> {
    match tokio::time::timeout(CALL, call).await {
        Ok(outcome) => outcome.map_err(Into::into),
        Err(_) => Err(Error::storage(format!("no answer within {CALL:?}"))),
    }
}
