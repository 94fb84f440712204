//! Room in the queues, over all servers: counted in Redis where it changes. While Redis cannot be
//! asked, or lacks what it held, the rows are counted ([`Counter`]).
//!
//! Room is asked for before the commit, unless there is plenty: while a queue is far from its
//! limits, each server may accept a small share of the room that was left at its last look, so that
//! a submit does not wait for Redis. The shares of [`SERVERS`] servers over [`LOOKS`] looks fit into
//! that room, so that limits hold however they interleave.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;

use super::{convert, count::Counter};
use crate::{
    clock::{Clock, Mono},
    error::Result,
    id::TaskId,
    queue::{Admit, Asked, Full, FullPolicy, Limits},
    redis::{Promise, Redis, Room, Work},
};

/// How long room is kept for a task whose commit is on its way.
const KEEP: Duration = Duration::from_mins(1);

/// How long a submit waits for Redis to say whether there is room.
const WAIT: Duration = Duration::from_millis(500);

/// Servers whose shares fit into the room that is left.
const SERVERS: u64 = 16;

/// Looks until what was accepted is counted, at most: commits take far less time.
const LOOKS: u64 = 4;

/// With less room than this, each task asks.
const PLENTY: u64 = 4096;

/// After this long without a look, each task asks.
const STALE: Duration = Duration::from_secs(3);

/// What may be accepted without asking.
#[derive(Default)]
pub(super) struct Shares {
    looked: Option<Mono>,
    /// Tasks of each queue, and of each namespace.
    depths: HashMap<(String, String), u64>,
    totals: HashMap<String, u64>,
    /// Accepted without asking since then.
    taken: HashMap<(String, String), u64>,
    taken_in: HashMap<String, u64>,
}

impl Shares {
    /// Begins anew from what was counted.
    pub(super) fn renew(&mut self, depths: &HashMap<(String, String), u64>, now: Mono) {
        self.looked = Some(now);
        self.depths.clone_from(depths);
        self.totals.clear();
        for ((namespace, _), depth) in depths {
            *self.totals.entry(namespace.clone()).or_default() += depth;
        }
        self.taken.clear();
        self.taken_in.clear();
    }

    /// Takes a share for one task, if there is one.
    fn take(&mut self, asked: &Asked, limits: &Limits, now: Mono) -> bool {
        if self.looked.is_none_or(|at| now.since(at) > STALE) {
            return false;
        }
        let namespace = asked.namespace.to_string();
        let queue = (namespace.clone(), asked.model.clone());
        let total = self.totals.get(&namespace).copied().unwrap_or(0);
        let depth = self.depths.get(&queue).copied().unwrap_or(0);
        let (taken, taken_in) =
            (self.taken.entry(queue).or_default(), self.taken_in.entry(namespace).or_default());
        if *taken >= share(limits.max_per_model, depth)
            || *taken_in >= share(limits.max_per_namespace, total)
        {
            return false;
        }
        *taken += 1;
        *taken_in += 1;
        true
    }
}

fn share(limit: u64, depth: u64) -> u64 {
    let room = limit.saturating_sub(depth);
    if room < PLENTY { 0 } else { room / (SERVERS * LOOKS) }
}

/// What room is granted by.
pub(super) struct Sources {
    pub redis: Redis,
    pub limits: Limits,
    pub clock: Clock,
    pub shares: Arc<Mutex<Shares>>,
    pub counter: Arc<Counter>,
    /// Whether Redis lacks something that it was to be told, or held: its numbers are too low.
    pub lacking: Arc<AtomicBool>,
}

/// Grants room: out of this server's shares, by Redis, or by the database.
pub(super) fn by(sources: Sources) -> Arc<Admit> {
    let Sources { redis, limits, clock, shares, counter, lacking } = sources;
    let (work, health, limits) = (redis.work(), redis.health(), Arc::new(limits));
    Arc::new(move |asked| {
        let counter = counter.clone();
        if lacking.load(Ordering::Acquire) || !health.borrow().is_up() {
            return Box::pin(async move { counter.admit(&asked).await });
        }
        if shares.lock().take(&asked, &limits, clock.mono()) {
            return Box::pin(std::future::ready(Ok(None)));
        }
        let (work, limits) = (work.clone(), limits.clone());
        Box::pin(async move {
            let asking = reserve(&work, &limits, &asked);
            match tokio::time::timeout(WAIT, asking).await {
                Ok(Ok(Some(granted))) => Ok(granted.evicted),
                Ok(Err(full)) => Err(full),
                Ok(Ok(None)) | Err(_) => {
                    tracing::warn!("Redis did not say whether there is room; rows are counted");
                    counter.admit(&asked).await
                }
            }
        })
    })
}

/// Room that Redis keeps.
struct Granted {
    /// What is to leave for it.
    evicted: Option<TaskId>,
}

/// Asks Redis; `None` when it does not say.
async fn reserve(work: &Work, limits: &Limits, asked: &Asked) -> Result<Option<Granted>> {
    let Asked { task, namespace, model, priority } = asked;
    let lane = convert::plain_lane(namespace, model, *priority)?;
    let promise = Promise {
        lane: &lane,
        id: &task.to_string(),
        limit: limits.max_per_model,
        group_limit: limits.max_per_namespace,
        evict: match limits.when_full {
            FullPolicy::Reject => None,
            FullPolicy::DropOldest => Some(lane.band()),
        },
    };
    let room = match work.reserve(&[promise], KEEP).await {
        Ok(rooms) => rooms.into_iter().next(),
        Err(error) => {
            tracing::debug!(%error, "no room was promised");
            None
        }
    };
    match room {
        None => Ok(None),
        // What cannot be read names no task that could be ended; it is out of the queue.
        Some(Room::Promised { evicted }) => {
            Ok(Some(Granted { evicted: evicted.and_then(|id| id.parse().ok()) }))
        }
        Some(Room::AccountFull(depth)) => {
            Err(Full::Model(model).error(limits.max_per_model, depth))
        }
        Some(Room::GroupFull(depth)) => {
            Err(Full::Namespace(namespace).error(limits.max_per_namespace, depth))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::Namespace;

    fn asked(model: &str) -> Asked {
        let namespace = Namespace::from("a");
        Asked { task: TaskId::MAX, namespace, model: model.into(), priority: 0 }
    }

    #[test]
    fn shares_are_small_lapse_and_end_before_a_limit_is_near() {
        let limits =
            Limits { max_per_model: 64_000, max_per_namespace: 96_000, ..Limits::default() };
        let mut shares = Shares::default();
        let start = Mono::default();
        assert!(!shares.take(&asked("m"), &limits, start), "nothing is known yet");
        let count = |shares: &mut Shares, model: &str| {
            (0..10_000).take_while(|_| shares.take(&asked(model), &limits, start)).count()
        };
        shares.renew(&HashMap::new(), start);
        assert_eq!(count(&mut shares, "m"), 1000, "a 64th");
        assert_eq!(count(&mut shares, "n"), 500, "of the namespace there is less");
        let queue = |model: &str| ("a".to_owned(), model.to_owned());
        shares.renew(&[(queue("m"), 61_000), (queue("n"), 1_000)].into(), start);
        assert_eq!(count(&mut shares, "m"), 0);
        assert_eq!(count(&mut shares, "n"), 34_000 / 64);
        shares.renew(&HashMap::new(), start);
        assert!(!shares.take(&asked("m"), &limits, start + STALE * 2));
    }
}
