//! The floor of durable tasks: their whole life in the store through sqlx, every commit synced,
//! group commit of what waits, and no RPC, no runner, no checks.
//!
//! A direct binding on a writer thread is two to four times cheaper than sqlx; what is measured
//! here is the floor of the library that the product uses.

use std::{cell::RefCell, rc::Rc, str::FromStr as _};

use anyhow::Context as _;
use futures_util::future::try_join_all;
use serde::{Deserialize, Serialize};
use sqlx::{
    Connection as _, SqliteConnection,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous},
};
use tokio::sync::{mpsc, oneshot};

use super::{
    figures::{Latency, histogram},
    process::{cpu_us, now_ns},
};

/// What to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Spec {
    /// An empty directory.
    pub dir: std::path::PathBuf,
    /// An empty database of Postgres, instead of SQLite.
    pub database_url: Option<String>,
    /// Submitters in closed loops.
    pub submitters: usize,
    /// Length of the span in which tasks are submitted.
    pub seconds: f64,
    /// Bytes of payload of a task.
    pub payload: usize,
}

/// What came of it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Outcome {
    /// Whole lives a second.
    pub rate: f64,
    /// Processor time per task, in microseconds.
    pub cpu_us: f64,
    /// From the submit to its answer.
    pub ack: Latency,
}

enum Step {
    Submit { id: [u8; 16], payload: Vec<u8>, done: oneshot::Sender<()> },
    Claim([u8; 16]),
    Complete([u8; 16]),
}

/// Rows of one statement: few shapes, so that each is prepared once.
const CHUNKS: [usize; 3] = [64, 8, 1];

/// Runs whole lives.
pub async fn run(spec: Spec) -> anyhow::Result<Outcome> {
    let store = Store::open(&spec).await?;
    // Wide enough for all that submitters can have under way: submit, claim and complete.
    let (steps, queue) = mpsc::channel(spec.submitters * 8);
    let completed = Rc::new(RefCell::new(0_u64));
    let (all, everything) = oneshot::channel();
    let writer = tokio::task::spawn_local(write(store, queue, Rc::clone(&completed), all));

    let ack = Rc::new(RefCell::new(histogram()));
    let (from, cpu) = (now_ns(), cpu_us(std::process::id()));
    let until = from + (spec.seconds * 1e9) as u64;
    let loops = (0..spec.submitters).map(|at| {
        let (steps, ack, payload) = (steps.clone(), Rc::clone(&ack), vec![7; spec.payload]);
        tokio::task::spawn_local(async move {
            let mut count = 0_u64;
            while now_ns() < until {
                let sent = now_ns();
                let mut id = [0; 16];
                id[..8].copy_from_slice(&sent.to_be_bytes());
                id[8..].copy_from_slice(&(at as u64).to_be_bytes());
                let (done, answer) = oneshot::channel();
                steps.send(Step::Submit { id, payload: payload.clone(), done }).await?;
                answer.await?;
                let _ = ack.borrow_mut().record(now_ns() - sent);
                count += 1;
            }
            anyhow::Ok(count)
        })
    });
    let mut submitted = 0;
    for count in try_join_all(loops).await? {
        submitted += count?;
    }
    drop(steps);
    everything.await.context("the writer stopped")?;
    let seconds = (now_ns() - from) as f64 / 1e9;
    writer.await??;
    anyhow::ensure!(*completed.borrow() == submitted, "a task was not completed");
    Ok(Outcome {
        rate: submitted as f64 / seconds,
        cpu_us: (cpu_us(std::process::id()) - cpu) as f64 / submitted.max(1) as f64,
        ack: (&*ack.borrow()).into(),
    })
}

async fn write(
    mut store: Store,
    mut queue: mpsc::Receiver<Step>,
    completed: Rc<RefCell<u64>>,
    all: oneshot::Sender<()>,
) -> anyhow::Result<()> {
    let mut open = true;
    let mut steps = Vec::new();
    let mut next: Vec<Step> = Vec::new();
    while open || !next.is_empty() {
        steps.append(&mut next);
        if steps.is_empty() {
            open = queue.recv_many(&mut steps, 1024).await > 0;
        } else {
            while let Ok(step) = queue.try_recv() {
                steps.push(step);
            }
        }
        let (mut rows, mut claims, mut completions) = (Vec::new(), Vec::new(), Vec::new());
        let mut answers = Vec::new();
        for step in steps.drain(..) {
            match step {
                Step::Submit { id, payload, done } => {
                    next.push(Step::Claim(id));
                    rows.push((id, payload));
                    answers.push(done);
                }
                Step::Claim(id) => {
                    next.push(Step::Complete(id));
                    claims.push(id);
                }
                Step::Complete(id) => completions.push(id),
            }
        }
        *completed.borrow_mut() += completions.len() as u64;
        store.commit(rows, claims, completions).await?;
        for answer in answers {
            let _ = answer.send(());
        }
    }
    let _ = all.send(());
    Ok(())
}

/// Where the tasks are.
enum Store {
    Sqlite(SqliteConnection),
    #[cfg(feature = "postgres")]
    Postgres(sqlx::PgConnection),
}

/// Makes the table; the type of bytes is the engine's.
macro_rules! tables {
    ($bytes:literal) => {
        [
            concat!(
                "CREATE TABLE task (id ",
                $bytes,
                " PRIMARY KEY, state INTEGER NOT NULL, payload ",
                $bytes,
                " NOT NULL)"
            ),
            "CREATE INDEX ready ON task (id) WHERE state = 0",
        ]
    };
}

impl Store {
    async fn open(spec: &Spec) -> anyhow::Result<Self> {
        #[cfg(feature = "postgres")]
        if let Some(url) = &spec.database_url {
            let mut connection = sqlx::PgConnection::connect(url).await?;
            for sql in tables!("BYTEA") {
                sqlx::query(sql).execute(&mut connection).await?;
            }
            return Ok(Self::Postgres(connection));
        }
        let file = spec.dir.join("floor.db");
        let options = SqliteConnectOptions::from_str(&format!("sqlite:{}", file.display()))?
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full);
        let mut connection = SqliteConnection::connect_with(&options).await?;
        let [table, index] = tables!("BLOB");
        sqlx::query(sqlx::AssertSqlSafe(format!("{table} WITHOUT ROWID")))
            .execute(&mut connection)
            .await?;
        sqlx::query(index).execute(&mut connection).await?;
        Ok(Self::Sqlite(connection))
    }

    async fn commit(
        &mut self,
        rows: Vec<([u8; 16], Vec<u8>)>,
        claims: Vec<[u8; 16]>,
        completions: Vec<[u8; 16]>,
    ) -> sqlx::Result<()> {
        match self {
            Self::Sqlite(connection) => {
                const CLAIM: &str = "UPDATE task SET state = 1 WHERE state = 0 AND id IN (";
                const COMPLETE: &str = "UPDATE task SET state = 2 WHERE state = 1 AND id IN (";
                let mut tx = connection.begin_with("BEGIN IMMEDIATE").await?;
                insert(&mut tx, rows).await?;
                update(&mut tx, claims, CLAIM).await?;
                update(&mut tx, completions, COMPLETE).await?;
                tx.commit().await
            }
            #[cfg(feature = "postgres")]
            Self::Postgres(connection) => {
                const INSERT: &str = "INSERT INTO task (id, state, payload)
                    SELECT id, 0, payload FROM unnest($1::bytea[], $2::bytea[]) AS r (id, payload)";
                const CLAIM: &str = "UPDATE task SET state = 1 WHERE state = 0 AND id = ANY ($1)";
                const COMPLETE: &str =
                    "UPDATE task SET state = 2 WHERE state = 1 AND id = ANY ($1)";
                let list =
                    |ids: Vec<[u8; 16]>| ids.iter().map(|id| id.to_vec()).collect::<Vec<_>>();
                let (ids, payloads): (Vec<_>, Vec<_>) =
                    rows.into_iter().map(|(id, payload)| (id.to_vec(), payload)).unzip();
                let mut tx = connection.begin().await?;
                if !ids.is_empty() {
                    sqlx::query(INSERT).bind(ids).bind(payloads).execute(&mut *tx).await?;
                }
                for (ids, sql) in [(claims, CLAIM), (completions, COMPLETE)] {
                    if !ids.is_empty() {
                        sqlx::query(sql).bind(list(ids)).execute(&mut *tx).await?;
                    }
                }
                tx.commit().await
            }
        }
    }
}

/// Cuts rows into chunks of [`CHUNKS`].
fn chunks<T>(mut rows: &[T]) -> impl Iterator<Item = &[T]> {
    std::iter::from_fn(move || {
        let size = CHUNKS.into_iter().find(|size| *size <= rows.len())?;
        let (chunk, rest) = rows.split_at(size);
        rows = rest;
        Some(chunk)
    })
}

async fn insert(
    connection: &mut SqliteConnection,
    rows: Vec<([u8; 16], Vec<u8>)>,
) -> sqlx::Result<()> {
    for chunk in chunks(&rows) {
        let mut query = sqlx::QueryBuilder::new("INSERT INTO task (id, state, payload) ");
        query.push_values(chunk, |mut row, (id, payload)| {
            row.push_bind(&id[..]).push("0").push_bind(&payload[..]);
        });
        query.build().persistent(true).execute(&mut *connection).await?;
    }
    Ok(())
}

async fn update(
    connection: &mut SqliteConnection,
    ids: Vec<[u8; 16]>,
    sql: &'static str,
) -> sqlx::Result<()> {
    for chunk in chunks(&ids) {
        let mut query = sqlx::QueryBuilder::new(sql);
        let mut list = query.separated(", ");
        for id in chunk {
            list.push_bind(&id[..]);
        }
        list.push_unseparated(")");
        query.build().persistent(true).execute(&mut *connection).await?;
    }
    Ok(())
}
