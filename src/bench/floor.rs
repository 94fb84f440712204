//! The floor of durable tasks: their whole life in SQLite through sqlx, `synchronous = FULL`,
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
    let file = spec.dir.join("floor.db");
    let options = SqliteConnectOptions::from_str(&format!("sqlite:{}", file.display()))?
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full);
    let mut connection = SqliteConnection::connect_with(&options).await?;
    for sql in [
        "CREATE TABLE task (id BLOB PRIMARY KEY, state INTEGER NOT NULL, payload BLOB NOT NULL) WITHOUT ROWID",
        "CREATE INDEX ready ON task (id) WHERE state = 0",
    ] {
        sqlx::query(sql).execute(&mut connection).await?;
    }
    // Wide enough for all that submitters can have under way: submit, claim and complete.
    let (steps, queue) = mpsc::channel(spec.submitters * 8);
    let completed = Rc::new(RefCell::new(0_u64));
    let (all, everything) = oneshot::channel();
    let writer = tokio::task::spawn_local(write(connection, queue, Rc::clone(&completed), all));

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
    mut connection: SqliteConnection,
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
        let mut tx = connection.begin_with("BEGIN IMMEDIATE").await?;
        insert(&mut tx, rows).await?;
        update(&mut tx, claims, "UPDATE task SET state = 1 WHERE state = 0 AND id IN (").await?;
        *completed.borrow_mut() += completions.len() as u64;
        update(&mut tx, completions, "UPDATE task SET state = 2 WHERE state = 1 AND id IN (")
            .await?;
        tx.commit().await?;
        for answer in answers {
            let _ = answer.send(());
        }
    }
    let _ = all.send(());
    Ok(())
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
