//! The backlog: tasks that wait where any of several servers can start them.
//!
//! Servers on one database may share a Redis. What waits then lies in its streams, in a lane for
//! each namespace, model, version, set of required labels and priority, and a server's own
//! [`Queue`] holds only what is about to start there.
//!
//! ```text
//!  commit ──told──► [`writer`] ──add, delay, ack, remove──►  Redis  ◄──add── [`reconciler`] ◄── rows
//!                                                              │  ▲
//!  queue ◄──entries── [`feed`] ◄──pull──────────────────────── ┘  └── [`upkeep`]: what is due, what
//!    │                   ▲ free credits                               a silent server had, what
//!    └── dispatch ── a start is a conditional update of the row ──►   cannot start here
//! ```
//!
//! - Redis has ids and hints. The rows are the truth: whatever is lost in Redis, a restart or
//!   `FLUSHALL` included, the [`reconciler`] adds anew; whatever is there twice or in vain is
//!   refused by the ledger when it is to start, and then taken out.
//! - A task that finds a free runner when it is accepted starts in the same commit and never lies
//!   here. Where the limits are far it is accepted without a word to Redis.
//! - A server fetches no more than its free credits, and gives back what it could not start within
//!   [`HOLD`]. What a server that died had fetched, others take over after `queue.ack_timeout`.
//! - While Redis does not answer, tasks are accepted as ever, and each server starts what it finds
//!   in the database: in order of acceptance, by its own queue's policy within a window, and with
//!   lost races when several look at the same rows. What waits is counted there too ([`count`]).
//!
//! [`writer`]: Backlog::write
//! [`feed`]: Backlog::feed
//! [`upkeep`]: Backlog::look_after
//! [`reconciler`]: Backlog::reconcile

mod admission;
mod convert;
mod count;
mod feed;
mod reconcile;
#[cfg(test)]
mod tests;
mod upkeep;
mod write;

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::sync::Notify;

use self::{
    admission::{Shares, Sources},
    count::Counter,
};
use crate::{
    clock::{Clock, Mono},
    db::Db,
    error::{Error, Kind, Reason},
    id::TaskId,
    queue::{Inlet, LaneSpec, Limits, Queue},
    redis::{self, Bells, Consumer, Delivery, Lane, Redis, Work},
    supervisor::Supervisor,
};

/// How long a server keeps what it fetched and cannot start.
pub const HOLD: Duration = Duration::from_secs(1);

/// What can be set.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Bounds of the queues, which hold over all servers.
    pub limits: Limits,
    /// What a server fetched and did not start within this time, others take over.
    pub ack_timeout: Duration,
    /// How long dead letters are listed.
    pub dead_letter_ttl: Duration,
}

/// The backlog as one server sees it; clones share it.
#[derive(Clone)]
pub struct Backlog(Arc<Inner>);

struct Inner {
    redis: Redis,
    work: Work,
    consumer: Consumer,
    db: Db,
    queue: Queue,
    clock: Clock,
    settings: Settings,
    /// The writer's, as long as it runs.
    inlet: tokio::sync::Mutex<Inlet>,
    /// Rung when more may start here.
    hungry: Arc<Notify>,
    /// Fetched, and neither started nor given back.
    held: Mutex<HashMap<TaskId, Held>>,
    /// Started while Redis did not answer, and not acknowledged.
    owed: Mutex<Vec<Delivery>>,
    /// The lanes there are, by name.
    lanes: Mutex<HashMap<Arc<str>, (Lane, LaneSpec)>>,
    /// What may be accepted without asking Redis for room.
    shares: Arc<Mutex<Shares>>,
    /// What may be accepted while Redis cannot say.
    counter: Arc<Counter>,
    /// Whether Redis lacks something until a comparison has ended.
    lacking: Arc<AtomicBool>,
    /// Whether Redis may lack something that it was to be told.
    behind: AtomicBool,
    /// Rung when it does.
    compare: Notify,
}

struct Held {
    delivery: Delivery,
    since: Mono,
}

impl Backlog {
    /// The backlog of a server that nobody else is named like, and the server's queue.
    pub fn open(
        redis: &Redis,
        db: Db,
        clock: Clock,
        name: &str,
        settings: Settings,
    ) -> (Queue, Self) {
        let work = redis.work();
        let limits = &settings.limits;
        let shares = Arc::new(Mutex::new(Shares::default()));
        let counter = Arc::new(Counter::new(db.clone(), clock.clone(), limits.clone()));
        let lacking = Arc::new(AtomicBool::new(false));
        let admit = admission::by(Sources {
            redis: redis.clone(),
            limits: limits.clone(),
            clock: clock.clone(),
            shares: shares.clone(),
            counter: counter.clone(),
            lacking: lacking.clone(),
        });
        let (queue, inlet) = Queue::shared(settings.limits.clone(), clock.clone(), admit);
        let backlog = Self(Arc::new(Inner {
            redis: redis.clone(),
            consumer: work.consumer(name),
            work,
            db,
            queue: queue.clone(),
            clock,
            settings,
            hungry: inlet.hungry(),
            inlet: tokio::sync::Mutex::new(inlet),
            held: Mutex::default(),
            owed: Mutex::default(),
            lanes: Mutex::default(),
            shares,
            counter,
            lacking,
            behind: AtomicBool::new(false),
            compare: Notify::new(),
        }));
        (queue, backlog)
    }

    /// Starts its loops.
    pub fn start(&self, bells: &Bells, supervisor: &Supervisor) {
        supervisor.spawn_flushing_loop("backlog", self.clone().write(supervisor.last_call()));
        supervisor.spawn_loop("backlog feed", self.clone().feed(bells.clone(), supervisor.token()));
        supervisor.spawn_loop("backlog upkeep", self.clone().look_after());
        supervisor.spawn_loop("backlog notes", self.clone().compare_notes());
        supervisor.spawn_loop("backlog mover", self.clone().move_due());
        supervisor.spawn_loop("backlog reconciler", self.clone().reconcile());
    }

    /// Whether Redis answers.
    fn is_up(&self) -> bool {
        self.0.redis.health().borrow().is_up()
    }

    /// Notes that Redis may lack something.
    fn fell_behind(&self) {
        self.0.behind.store(true, Ordering::SeqCst);
        self.0.lacking.store(true, Ordering::SeqCst);
        self.0.compare.notify_one();
    }
}

/// An error of Redis, for the log.
#[expect(clippy::needless_pass_by_value, reason = "it stands in `map_err`")]
fn untold(error: redis::Error) -> Error {
    Error::new(Kind::Unavailable, Reason::StorageUnavailable, error.to_string())
}
