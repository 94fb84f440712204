//! The ledger: this server's only writer of task state.
//!
//! A loop takes every command that waits, loads the rows concerned, applies the state machine
//! to them in order, writes rows and entries in one transaction, and answers after the commit.
//! So a commit is shared by whatever came in while the last one was being synced, and nothing
//! waits for a timer. After the commit it tells the relay, the queue, the timers and the tail;
//! each of those can lose what it was told, and a sweep makes it good.
//!
//! Other servers may write to the same database. Whatever a batch decides, it decides from rows
//! at certain revisions: it moves a row only from that revision, holds rows that it relies on
//! without moving them, and remembers a `request_id` only if nobody did meanwhile. If any of
//! that fails, nothing of the batch is done, and it is decided anew from rows read again. Every
//! change of a row raises its revision, the reservation of sequences too: so whoever ends an
//! attempt that runs elsewhere knows how far its sequences may have been shown.
//!
//! If the connection is lost during a commit, the ledger finds out what became of it before it
//! answers.

mod batch;
mod effect;
mod load;
mod open;
mod publish;
mod refused;
#[cfg(test)]
mod rivals;
mod script;
mod starts;
#[cfg(test)]
pub(crate) mod tests;

use std::{sync::Arc, time::Duration};

use tokio::sync::{mpsc, oneshot};

use self::{batch::Batch, open::OpenTasks};
pub use self::{publish::queue_entry, refused::lease_lost, starts::Starter};
use super::{
    model::{Spec, State, Task},
    state,
    timers::Timers,
};
use crate::{
    blob::Blobs,
    clock::{Clock, Micros},
    db::{self, Db},
    error::{Error, Reason, Result},
    events::Tail,
    faults::{self, Fault},
    id::{Entropy, InstanceId, Namespace, RunnerId, TaskId},
    instances::{Mandate, Standing, hints::Hints},
    queue::Queue,
    relay::{Relay, SegmentData},
    telemetry::Metrics,
};

/// Commands that may wait: enough for every call that the server takes at once.
const WAITING: usize = 8192;
/// Most commands in one transaction, so that none waits long for its neighbours.
const BATCH: usize = 512;
/// How often a batch is decided anew because other servers were faster, before its commands are
/// tried one by one.
const TRIES: usize = 4;
/// How long the fate of a commit is looked for.
const READ_BACK: Duration = Duration::from_mins(1);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(200);

/// A task to accept.
#[derive(Clone, Debug)]
pub struct NewTask {
    /// Id, where something refers to the task before it is accepted.
    pub id: Option<TaskId>,
    /// Tenant.
    pub namespace: Namespace,
    /// What is asked for.
    pub spec: Spec,
    /// Earliest start.
    pub not_before: Option<Micros>,
    /// Idempotency key.
    pub request_id: Option<String>,
    /// SHA-256 of the request.
    pub digest: [u8; 32],
    /// The ended task that it retries.
    pub retry_of: Option<TaskId>,
    /// W3C trace context.
    pub traceparent: Option<String>,
}

impl NewTask {
    /// The task that it makes.
    fn task(&self, id: TaskId, now: Micros) -> Task {
        Task {
            id,
            namespace: self.namespace.clone(),
            spec: self.spec.clone(),
            state: State::Queued,
            attempt: 0,
            failed: 0,
            lost: 0,
            handed_back: 0,
            create_time: now,
            start_time: None,
            end_time: None,
            not_before: self.not_before,
            runner: None,
            instance: None,
            base_sequence: 0,
            last_sequence: 1,
            reserved_sequence: 1,
            result: None,
            error: None,
            usage: None,
            revision: 1,
            request_id: self.request_id.clone(),
            retry_of: self.retry_of,
            retried_by: None,
            traceparent: self.traceparent.clone(),
        }
    }
}

/// An accepted task.
#[derive(Clone, Debug)]
pub struct Submitted {
    /// The task, as it is now.
    pub task: Arc<Task>,
    /// Whether this call made it, rather than an earlier one with the same `request_id`.
    pub new: bool,
}

/// An attempt to start.
#[derive(Clone, Debug)]
pub struct Start {
    /// Task.
    pub task: TaskId,
    /// Runner that gets the lease.
    pub runner: RunnerId,
    /// Its host.
    pub node: String,
    /// Its engine.
    pub engine: String,
    /// Version of the engine.
    pub engine_version: String,
    /// The backoff that the queue has seen pass.
    pub waited: Option<Micros>,
}

/// An attempt that a runner says it holds.
#[derive(Clone, Debug)]
pub struct Claim {
    /// Task.
    pub task: TaskId,
    /// Attempt.
    pub attempt: u32,
    /// The runner.
    pub runner: RunnerId,
    /// The only namespace that it serves; `None` when it serves all.
    pub serves: Option<Namespace>,
}

/// What a command asks for.
#[derive(Debug)]
enum Ask {
    Submit(Box<NewTask>),
    Apply(TaskId, state::Event),
    /// As `Apply`, by whoever holds a lock.
    ApplyFor(TaskId, state::Event, Mandate),
    Record(Vec<SegmentData>),
    Delete(Namespace, TaskId),
}

/// What a command gets.
#[derive(Clone, Debug)]
enum Answer {
    Submitted(Submitted),
    Applied(Arc<Task>),
    Recorded(Vec<TaskId>),
    Done,
}

#[derive(Debug)]
struct Command {
    ask: Ask,
    reply: oneshot::Sender<Result<Answer>>,
}

/// A handle to the ledger; clones share it.
#[derive(Clone, Debug)]
pub struct Ledger {
    commands: mpsc::Sender<Command>,
    /// Rows that readers may be given: none where other servers write too.
    readable: Option<OpenTasks>,
    instance: Option<InstanceId>,
}

/// What the loop works with.
#[derive(Clone)]
pub struct Parts {
    /// Truth.
    pub db: Db,
    /// Archived transcripts.
    pub blobs: Blobs,
    /// Time.
    pub clock: Clock,
    /// Ids and jitter.
    pub entropy: Entropy,
    /// Live streams.
    pub relay: Relay,
    /// Waiting tasks.
    pub queue: Queue,
    /// Time limits.
    pub timers: Timers,
    /// Followers of the timeline.
    pub tail: Tail,
    /// Figures.
    pub metrics: Metrics,
    /// This server among others.
    pub standing: Standing,
    /// What it tells them.
    pub hints: Hints,
}

/// The loop's own end.
pub struct Writer {
    commands: mpsc::Receiver<Command>,
    parts: Parts,
    /// Rows of open tasks, as this loop knows them.
    open: OpenTasks,
    starter: Option<Starter>,
}

/// Makes a ledger.
pub fn new(parts: Parts) -> (Ledger, Writer) {
    let (sender, commands) = mpsc::channel(WAITING);
    let open = OpenTasks::default();
    let alone = !parts.db.is_shared() || faults::planted(Fault::ReadAtHand);
    (
        Ledger {
            commands: sender,
            readable: alone.then(|| open.clone()),
            instance: parts.standing.id(),
        },
        Writer { commands, parts, open, starter: None },
    )
}

impl Ledger {
    /// An open task as it was committed last, without a look into the database; `None` when
    /// its row is not at hand.
    pub fn open_task(&self, id: TaskId) -> Option<Arc<Task>> {
        self.readable.as_ref()?.get(id)
    }

    /// Accepts tasks; each has its own outcome.
    pub async fn submit(&self, new: Vec<NewTask>) -> Vec<Result<Submitted>> {
        let asks = new.into_iter().map(|new| Ask::Submit(Box::new(new)));
        self.ask_all(asks, |answer| match answer {
            Answer::Submitted(submitted) => Some(submitted),
            _ => None,
        })
        .await
    }

    /// Starts attempts; each has its own outcome. Refused when the task does not wait any more.
    pub async fn start(&self, starts: Vec<Start>) -> Vec<Result<Arc<Task>>> {
        let asks = starts.into_iter().map(|start| {
            let (task, event) = start.into_event(self.instance);
            Ask::Apply(task, event)
        });
        self.ask_all(asks, applied).await
    }

    /// Applies an event to a task: `LEASE_LOST` when it names an attempt that does not hold the
    /// lease, `STATE_CONFLICT` when the task has ended.
    pub async fn apply(&self, id: TaskId, event: state::Event) -> Result<Arc<Task>> {
        let mut answers = self.ask_all([Ask::Apply(id, event)], applied).await;
        answers.pop().unwrap_or_else(|| Err(lost()))
    }

    /// As [`apply`](Self::apply) to many tasks, in the name of a lock: nothing is done once another
    /// server has it. Each has its own outcome.
    pub async fn apply_for(
        &self,
        mandate: &Mandate,
        events: Vec<(TaskId, state::Event)>,
    ) -> Vec<Result<Arc<Task>>> {
        let asks =
            events.into_iter().map(|(task, event)| Ask::ApplyFor(task, event, mandate.clone()));
        self.ask_all(asks, applied).await
    }

    /// Takes over attempts whose runner has come back to this server; those that it may go on
    /// with are returned. Their logs are not there yet.
    ///
    /// # Errors
    /// When storage fails, so that nothing is known.
    pub async fn resume(&self, claims: Vec<Claim>) -> Result<Vec<Arc<Task>>> {
        let Some(instance) = self.instance else { return Ok(Vec::new()) };
        let asks = claims.into_iter().map(|claim| {
            let Claim { task, attempt, runner, serves } = claim;
            Ask::Apply(task, state::Event::Resume { attempt, runner, serves, instance })
        });
        let mut resumed = Vec::new();
        for answer in self.ask_all(asks, applied).await {
            match answer {
                Ok(task) => resumed.push(task),
                Err(error) if error.reason() == Reason::LeaseLost => {}
                Err(error) => return Err(error),
            }
        }
        Ok(resumed)
    }

    /// Keeps runner-made entries and reservations of running attempts. What belongs to an
    /// attempt that has ended, here or on another server, is left out; returns whose that is.
    pub async fn record(&self, segments: Vec<SegmentData>) -> Result<Vec<TaskId>> {
        let left_out = |answer| match answer {
            Answer::Recorded(left_out) => Some(left_out),
            _ => None,
        };
        let mut answers = self.ask_all([Ask::Record(segments)], left_out).await;
        answers.pop().unwrap_or_else(|| Err(lost()))
    }

    /// Deletes an ended task.
    pub async fn delete(&self, namespace: Namespace, id: TaskId) -> Result<()> {
        let mut answers = self.ask_all([Ask::Delete(namespace, id)], |_| Some(())).await;
        answers.pop().unwrap_or_else(|| Err(lost()))
    }

    async fn ask_all<T>(
        &self,
        asks: impl IntoIterator<Item = Ask>,
        take: impl Fn(Answer) -> Option<T>,
    ) -> Vec<Result<T>> {
        let mut replies = Vec::new();
        for ask in asks {
            let (reply, answer) = oneshot::channel();
            // When the loop is gone the reply is dropped with the command.
            let _ = self.commands.send(Command { ask, reply }).await;
            replies.push(answer);
        }
        let mut answers = Vec::with_capacity(replies.len());
        for reply in replies {
            let answer = reply.await.unwrap_or_else(|_| Err(lost()));
            answers.push(answer.and_then(|answer| take(answer).ok_or_else(lost)));
        }
        answers
    }
}

/// The task that a submit at `now` would make, for an estimate.
pub fn prospect(new: &NewTask, now: Micros) -> Task {
    new.task(TaskId::MAX, now)
}

fn applied(answer: Answer) -> Option<Arc<Task>> {
    match answer {
        Answer::Applied(task) => Some(task),
        _ => None,
    }
}

fn lost() -> Error {
    Error::storage("the ledger stopped before the commit")
}

impl Writer {
    /// Serves commands until all handles are gone.
    pub async fn run(mut self) -> anyhow::Result<()> {
        let mut commands = Vec::with_capacity(BATCH);
        while self.run_once(&mut commands).await {}
        Ok(())
    }

    /// Waits for commands and serves those that wait; false when all handles are gone.
    async fn run_once(&mut self, commands: &mut Vec<Command>) -> bool {
        if self.commands.recv_many(commands, BATCH).await == 0 {
            return false;
        }
        let batch = self.decide(std::mem::take(commands)).await;
        if let Some((commands, error)) = batch {
            // One command's row was refused; the others shall not suffer for it.
            tracing::error!(error = ?error, "a batch was refused; committing one by one");
            for command in commands {
                if let Some((commands, error)) = self.decide(vec![command]).await {
                    self.fail(Batch::new(commands), &error);
                }
            }
        }
        true
    }

    /// Commits and publishes a batch. Returns the commands that should be tried by themselves,
    /// or of which the only one was refused.
    async fn decide(&mut self, mut commands: Vec<Command>) -> Option<(Vec<Command>, Error)> {
        let mut tries = 0;
        loop {
            let mut batch = Batch::new(commands);
            let error = match self.commit(&mut batch).await {
                Ok(()) => {
                    self.publish(batch);
                    return None;
                }
                Err(error) => error,
            };
            tries += 1;
            if error.reason() == Reason::StorageUnavailable {
                self.fail(batch, &error);
                return None;
            }
            if error.reason() != Reason::Conflict || tries == TRIES {
                return Some((batch.into_commands(), error));
            }
            tracing::debug!(%error, "another server was faster; deciding anew");
            batch.ids().for_each(|id| self.open.remove(id));
            commands = batch.into_commands();
        }
    }

    async fn commit(&mut self, batch: &mut Batch) -> Result<()> {
        let db = self.parts.db.clone();
        db.drive(self.commit_now(batch)).await
    }

    async fn commit_now(&mut self, batch: &mut Batch) -> Result<()> {
        let began = self.parts.clock.mono();
        let db = self.parts.db.clone();
        let mut write = db.prepare().await?;
        let script = async {
            batch.load(write.tx(), &self.open, &self.parts.standing).await?;
            batch.apply(&self.parts);
            if batch.is_doubtful(&self.parts.standing) {
                return Err(refused::stale());
            }
            self.start_accepted(batch, write.tx()).await?;
            if faults::planted(Fault::AckBeforeCommit) {
                publish::answer(batch);
            }
            batch.script(db.script())
        };
        let done = match script.await {
            Ok(script) => write.commit_with(script).await,
            Err(error) => Err(write.rollback(error).await),
        };
        let done = match done {
            Err(error) if db::is_unknown(&error) => self.read_back(batch, error).await,
            done => done,
        };
        if let Err(error) = done {
            self.undo_starts(batch);
            return Err(error);
        }
        let took = self.parts.clock.mono().since(began);
        self.parts.metrics.ledger_batch.observe(batch.len() as f64);
        self.parts.metrics.ledger_commit_seconds.observe(took.as_secs_f64());
        Ok(())
    }

    /// Finds out what became of a commit during which the connection was lost.
    async fn read_back(&self, batch: &Batch, unknown: Error) -> Result<()> {
        if faults::planted(Fault::TrustUnknownCommits) {
            return Ok(());
        }
        let clock = &self.parts.clock;
        let began = clock.mono();
        loop {
            let stored = async {
                let mut write = self.parts.db.begin_after_last().await?;
                let stored = batch.is_stored(write.tx()).await;
                match stored {
                    Ok(stored) => write.commit().await.map(|()| stored),
                    Err(error) => Err(write.rollback(error).await),
                }
            };
            match stored.await {
                Ok(true) => return Ok(()),
                Ok(false) => return Err(unknown),
                Err(error) if clock.mono().since(began) > READ_BACK => {
                    return Err(Error::new(
                        error.kind(),
                        error.reason(),
                        "storage was lost during the commit; look before you try again",
                    )
                    .caused_by(error));
                }
                Err(_) => db::in_time(clock.sleep(LOOK)).await,
            }
        }
    }

    /// Answers a batch that was not committed. Its fate may be unknown after an I/O error, so
    /// nothing that was at hand is trusted.
    fn fail(&mut self, batch: Batch, error: &Error) {
        tracing::error!(error = ?error, commands = batch.len(), "nothing was committed");
        self.open.clear();
        batch.fail(error);
    }
}
