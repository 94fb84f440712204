//! What several servers share in Redis: queues of work, streams of frames, doorbells.
//!
//! It knows no noun of the domain and holds no truth. Everything here can be gone at any moment;
//! whoever keeps the truth watches [`Redis::losses`], asks [`Work::known`] and adds anew.
//!
//! ```text
//!  queues                                            everything begins with the prefix
//!    q:{lane}      stream, group `baton`   i = id, a = attempt, d = data      the work that waits
//!    known         hash    id -> attempt, place, lane     each id once, whatever is done how often
//!    depth, groups hash    account -> ids known           counted where `known` changes
//!    delayed, data zset by due time, hash                 what may not run yet
//!    reserved      zset by lapse time                     room promised to what is not added yet
//!    lanes, info   zset by last use, hash                 which lanes there are, and for whom
//!    given         set of lanes                           where something was given back
//!    dead          stream                                 what was given up, for those who look
//!    bell          channel                                names a lane when it gets work
//!  between servers
//!    f:{inbox}     stream                                 frames on their way to one server
//!    c:{channel}   channel                                doorbells
//!    notes:{board} hash, zset by lapse time               what servers say of themselves
//!    turn:{what}   text that lapses                       somebody does it already
//!  era             id that lasts as long as these data
//! ```
//!
//! A *lane* is `account:variant:band`: whose limit counts, who can do the work, how urgent it is.
//! Accounts that begin alike up to their first slash are a *group*, which has a limit as well.
//! One script changes all keys that belong together, so an id is in one place or in none, and
//! `depth` is right whenever anybody looks. Each script may run twice: an id that is known with
//! the same or a later attempt is not added again.
//!
//! # What becomes of an item
//!
//! ```text
//!              delay                move_due
//!            ┌───────► delayed ───────────────┐
//!  reserve ──┤                                ▼     pull             ack
//!            └──────────────── add ────────► lane ───────► delivered ───────► gone
//!                                             ▲               │
//!                                             └───────────────┘ give_back; claim when its
//!                                                               consumer is silent
//! ```
//!
//! - A stream is never trimmed: an entry goes when it is acknowledged, removed, or replaced by a
//!   later attempt.
//! - A delivery whose answer was lost is found by its consumer at the next pull
//!   ([`Consumer`] compares what it holds with what the server says), and by others through
//!   [`Consumer::claim`].
//! - A group that is gone while its stream is there begins anew at the first entry: all is
//!   delivered again, and acknowledged by those who find it done.
//! - With `maxmemory` and an eviction policy keys vanish one by one; [`Work::known`] looks at the
//!   entries themselves and so finds that too.
//!
//! # Connections
//!
//! One connection carries all commands, pipelined. One more carries the subscriptions of
//! [`Bells`], and one each [`Inbox`] that waits for frames: a read that waits would hold up what
//! is behind it. Work is waited for with a doorbell and not with a blocking read, since what a
//! given-up read of a group takes is delivered to nobody.
//!
//! Only a single server or one with replicas is spoken to, at the address of its primary: scripts
//! touch keys of several slots.

mod bells;
mod consumer;
mod health;
mod inbox;
mod lane;
mod notes;
mod script;
mod settings;
#[cfg(test)]
pub mod testing;
#[cfg(test)]
mod tests;
pub mod wire;
mod work;

use std::{sync::Arc, time::Duration};

use fred::prelude::{ErrorKind, Value};
use parking_lot::Mutex;
use tokio::sync::watch;

pub use self::{
    bells::{Bell, Bells, Listener},
    consumer::{Consumer, Delivery},
    health::Health,
    inbox::{Fit, Inbox, Mail, Parcel, Reading},
    lane::{Lane, LaneInfo},
    settings::Settings,
    work::{Item, LaneStats, Moved, Position, Promise, Room, Work},
};
use self::{
    health::Facts,
    script::Scripts,
    wire::{Call, Fred, Line, Purpose, Wire},
};
use crate::{clock::Clock, id::Entropy, supervisor::Supervisor};

/// What goes wrong with Redis. Messages name no credentials.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A setting that cannot be right.
    #[error("the Redis {field} {problem}")]
    Settings {
        /// Which.
        field: &'static str,
        /// What is wrong, and what would be right.
        problem: String,
    },
    /// There is no Redis there, or one that cannot be used.
    #[error("cannot use Redis at {address}: {problem}")]
    Unusable {
        /// Host, port, and database.
        address: String,
        /// Why, and what to do.
        problem: String,
    },
    /// A command was not answered, or with an error. It may have been carried out.
    #[error("Redis did not do `{command}`: {problem}")]
    Command {
        /// Which.
        command: &'static str,
        /// Why.
        problem: String,
    },
    /// An answer that makes no sense.
    #[error(
        "Redis answered `{command}` in an unexpected way; does another program write its keys?"
    )]
    Reply {
        /// To which command.
        command: &'static str,
    },
}

impl Error {
    fn command(command: &'static str) -> impl Fn(fred::error::Error) -> Self {
        move |error| Self::Command { command, problem: error.to_string() }
    }
}

/// Result of speaking to Redis.
pub type Result<T> = std::result::Result<T, Error>;

/// What a server says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Server {
    /// Such as `7.0.15`.
    pub version: String,
    /// The policy by which it forgets keys when its memory is full, if it does.
    pub evicts: Option<String>,
}

/// The connection; clones share it.
#[derive(Clone)]
pub struct Redis(Arc<Inner>);

struct Inner {
    line: Arc<dyn Line>,
    wire: Arc<dyn Wire>,
    settings: Settings,
    scripts: Scripts,
    server: Mutex<Server>,
    health: watch::Sender<Health>,
    losses: watch::Sender<u64>,
    /// Of the data that were there when somebody last looked.
    era: Mutex<Facts>,
    clock: Clock,
    entropy: Entropy,
    supervisor: Supervisor,
}

impl Redis {
    /// Connects, and refuses what cannot be used: a malformed or wrong address, a wrong password,
    /// a server that is too old, a replica. From then on a lost connection is made again for as
    /// long as the process lasts.
    pub async fn connect(
        settings: Settings,
        clock: Clock,
        entropy: Entropy,
        supervisor: &Supervisor,
    ) -> Result<Self> {
        let wire = Arc::new(Fred::new(&settings)?);
        Self::connect_over(wire, settings, clock, entropy, supervisor).await
    }

    /// As [`connect`](Self::connect), over connections of another make.
    pub async fn connect_over(
        wire: Arc<dyn Wire>,
        settings: Settings,
        clock: Clock,
        entropy: Entropy,
        supervisor: &Supervisor,
    ) -> Result<Self> {
        let address = settings.address()?;
        let unusable = |problem| Error::Unusable { address: address.clone(), problem };
        let line = wire
            .connect(Purpose::Commands)
            .await
            .map_err(|error| unusable(explained(&error, settings.connect_timeout)))?;
        let redis = Self(Arc::new(Inner {
            line,
            wire,
            settings,
            scripts: Scripts::new(),
            server: Mutex::default(),
            health: watch::Sender::new(Health::Up { latency: Duration::ZERO }),
            losses: watch::Sender::new(0),
            era: Mutex::new(Facts::default()),
            clock,
            entropy,
            supervisor: supervisor.clone(),
        }));
        match redis.check_server().await {
            Ok(server) => *redis.0.server.lock() = server,
            Err(problem) => {
                redis.0.line.end().await;
                return Err(unusable(problem));
            }
        }
        redis.look().await?;
        redis.watch_health();
        Ok(redis)
    }

    /// Whether Redis answers.
    pub fn health(&self) -> watch::Receiver<Health> {
        self.0.health.subscribe()
    }

    /// Grows when data were lost, or may have been: other data were found, or another server
    /// process. Whoever keeps the truth compares then.
    pub fn losses(&self) -> watch::Receiver<u64> {
        self.0.losses.subscribe()
    }

    /// Where it is, for people: host, port and database.
    pub fn address(&self) -> String {
        self.0.settings.address().unwrap_or_default()
    }

    /// The queues.
    pub fn work(&self) -> Work {
        Work::new(self.clone())
    }

    fn key(&self, name: &str) -> String {
        format!("{}{name}", self.0.settings.prefix)
    }

    /// A further connection. It ends with the supervisor's last call.
    async fn dedicated(&self, purpose: Purpose) -> Result<Arc<dyn Line>> {
        let line = self.0.wire.connect(purpose).await.map_err(Error::command("connect"))?;
        let (end, open) = (self.0.supervisor.last_call(), line.clone());
        self.0.supervisor.spawn_flushing_loop("redis connection", async move {
            end.cancelled().await;
            open.end().await;
            Ok(())
        });
        Ok(line)
    }

    /// What the server says of itself, or of one part.
    async fn info(
        &self,
        part: Option<&'static str>,
    ) -> std::result::Result<String, fred::error::Error> {
        let args = part.into_iter().map(Value::from_static_str).collect();
        let answer = self.0.line.call(Call::new("INFO", args)).await?;
        answer.convert()
    }

    /// What the server said of itself when it was connected to.
    pub fn server(&self) -> Server {
        self.0.server.lock().clone()
    }

    /// What cannot be used, as a sentence.
    async fn check_server(&self) -> std::result::Result<Server, String> {
        let info = self
            .info(None)
            .await
            .map_err(|error| explained(&error, self.0.settings.command_timeout))?;
        let field = |name: &str| {
            info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap_or("")
        };
        let version = field("redis_version");
        let major: u32 = version.split('.').next().and_then(|text| text.parse().ok()).unwrap_or(0);
        if major < 7 {
            return Err(format!("it is version {version}; 7.0 or later is needed"));
        }
        if field("role") == "slave" {
            return Err(format!(
                "it is a replica of {}:{}, which cannot be written to; give the primary's address",
                field("master_host"),
                field("master_port")
            ));
        }
        if field("cluster_enabled") == "1" {
            return Err("it is part of a Redis Cluster; a single server is needed".into());
        }
        let policy = field("maxmemory_policy");
        let evicts = field("maxmemory") != "0" && policy != "noeviction";
        if evicts {
            tracing::warn!(
                policy,
                "Redis evicts keys when its memory is full: set maxmemory-policy to noeviction, \
                 or queued work is found again only by the sweep"
            );
        }
        Ok(Server { version: version.to_owned(), evicts: evicts.then(|| policy.to_owned()) })
    }
}

/// Why a first connection failed, in words that lead on.
fn explained(error: &fred::error::Error, bound: Duration) -> String {
    let text = error.details();
    if text.contains("WRONGPASS") || text.contains("NOAUTH") || text.contains("AUTH") {
        return format!("{text}; check user and password in its URL");
    }
    match error.kind() {
        ErrorKind::Timeout => format!("no answer within {bound:?}; check host, port and firewall"),
        ErrorKind::IO => format!("{text}; check host and port, and whether it runs"),
        ErrorKind::Tls => format!("{text}; rediss:// needs a server that speaks TLS"),
        _ => text.to_owned(),
    }
}
