//! Room in the queues while Redis cannot say what waits: it does not answer, or lacks what it held.
//!
//! The rows are counted now and then, and each server accepts its part of the room that they leave.
//! What the others accept meanwhile it cannot know; so the parts of all servers over [`LOOKS`] counts
//! fit into that room. They come to no less than a fortieth of the limit, so that a queue fills up: a
//! limit is exceeded by a twentieth at most. A queue whose limit is so small that parts are less than
//! one task counts as full a little early.

use std::{
    collections::{HashMap, HashSet},
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use crate::{
    clock::{Clock, Mono},
    db::Db,
    error::Result,
    id::TaskId,
    queue::{Asked, Full, FullPolicy, Limits},
    tasks::queued,
};

/// How long a count is good.
const GOOD: Duration = Duration::from_millis(250);

/// How long one is good that leaves no room.
const GOOD_WHEN_FULL: Duration = Duration::from_millis(50);

/// Of the time, a part of one in so many goes into counting at most.
const PAUSE: u32 = 10;

/// Counts until what a server accepted is in the counts of all.
const LOOKS: u64 = 2;

/// The floor of all parts together, as a part of the limit.
const FLOOR: u64 = 20;

/// Tasks from which one that must leave is chosen.
const VICTIMS: u32 = 64;

/// Counts rows, and says who may be accepted.
pub(super) struct Counter {
    db: Db,
    clock: Clock,
    limits: Limits,
    /// Servers that share the queues, this one included.
    pub(super) n_servers: AtomicU64,
    /// One looks, the others wait for what it sees.
    last: tokio::sync::Mutex<Option<Count>>,
}

/// What was counted.
struct Count {
    at: Mono,
    took: Duration,
    /// Tasks of each queue, and of each namespace.
    depths: HashMap<(String, String), u64>,
    totals: HashMap<String, u64>,
    /// Accepted here since then, and between the count before and then, whose commits may have come
    /// after it.
    taken: Taken,
    before: Taken,
}

/// What was accepted here.
#[derive(Default)]
struct Taken {
    queues: HashMap<(String, String), u64>,
    namespaces: HashMap<String, u64>,
    /// In the place of these.
    evicted: HashSet<TaskId>,
}

/// What is left for this server of the room below a limit.
fn part(limit: u64, waiting: u64, n_servers: u64) -> u64 {
    let room = limit.saturating_sub(waiting);
    if n_servers <= 1 {
        return room;
    }
    let parts = n_servers * LOOKS;
    (room / parts).max(limit / (FLOOR * parts)).min(room)
}

impl Count {
    /// Takes room for one task, if there is some.
    fn take<'a>(
        &mut self,
        asked: &'a Asked,
        limits: &Limits,
        n_servers: u64,
    ) -> Result<(), (Full<'a>, u64, u64)> {
        let namespace = asked.namespace.to_string();
        let queue = (namespace.clone(), asked.model.clone());
        let known = |map: &HashMap<_, u64>, key: &_| map.get(key).copied().unwrap_or(0);
        let depth = known(&self.depths, &queue);
        let waiting = depth + known(&self.before.queues, &queue);
        let taken = self.taken.queues.entry(queue).or_default();
        if *taken >= part(limits.max_per_model, waiting, n_servers) {
            return Err((Full::Model(&asked.model), limits.max_per_model, depth + *taken));
        }
        let total = self.totals.get(&namespace).copied().unwrap_or(0);
        let waiting = total + self.before.namespaces.get(&namespace).copied().unwrap_or(0);
        let taken_in = self.taken.namespaces.entry(namespace).or_default();
        if *taken_in >= part(limits.max_per_namespace, waiting, n_servers) {
            let full = Full::Namespace(&asked.namespace);
            return Err((full, limits.max_per_namespace, total + *taken_in));
        }
        *taken += 1;
        *taken_in += 1;
        Ok(())
    }
}

impl Counter {
    pub(super) fn new(db: Db, clock: Clock, limits: Limits) -> Self {
        let last = tokio::sync::Mutex::new(None);
        Self { db, clock, limits, n_servers: AtomicU64::new(1), last }
    }

    /// Takes over how many servers there are, this one included.
    pub(super) fn set_servers(&self, n_servers: u64) {
        self.n_servers.store(n_servers, Relaxed);
    }

    /// Grants room for a task; returns the task that is to leave for it.
    ///
    /// # Errors
    /// `QUEUE_FULL`; or that of the database.
    pub(super) async fn admit(&self, asked: &Asked) -> Result<Option<TaskId>> {
        let n_servers = self.n_servers.load(Relaxed);
        let mut last = self.last.lock().await;
        for good in [GOOD, GOOD_WHEN_FULL] {
            let count = self.count(&mut last, good).await?;
            if count.take(asked, &self.limits, n_servers).is_ok() {
                return Ok(None);
            }
        }
        let count = self.count(&mut last, GOOD).await?;
        let Err((full, limit, depth)) = count.take(asked, &self.limits, n_servers) else {
            return Ok(None);
        };
        if self.limits.when_full == FullPolicy::DropOldest
            && depth >= limit
            && let Some(victim) = self.victim(count, asked, full).await?
        {
            count.taken.evicted.insert(victim);
            return Ok(Some(victim));
        }
        Err(full.error(limit, depth))
    }

    /// The last count, if it is good, or a new one.
    async fn count<'a>(
        &self,
        last: &'a mut Option<Count>,
        good: Duration,
    ) -> Result<&'a mut Count> {
        let begun = self.clock.mono();
        let before = match last.take() {
            Some(count) if begun.since(count.at) < good.max(count.took * PAUSE) => {
                return Ok(last.insert(count));
            }
            before => before.map(|count| count.taken).unwrap_or_default(),
        };
        let read = self.db.read(|tx| Box::pin(async move { queued::queued_counts(tx).await }));
        let mut depths = HashMap::new();
        let mut totals = HashMap::new();
        for (namespace, model, depth) in read.await? {
            *totals.entry(namespace.clone()).or_default() += depth;
            depths.insert((namespace, model), depth);
        }
        let took = self.clock.mono().since(begun);
        let taken = Taken::default();
        Ok(last.insert(Count { at: begun, took, depths, totals, taken, before }))
    }

    /// The oldest of the lowest priority, if that is not above the asked one's.
    async fn victim(&self, count: &Count, asked: &Asked, full: Full<'_>) -> Result<Option<TaskId>> {
        let (namespace, priority) = (asked.namespace.clone(), asked.priority);
        let model = match full {
            Full::Model(model) => Some(model.to_owned()),
            Full::Namespace(_) => None,
        };
        let now = self.clock.now();
        let read = self.db.read(move |tx| {
            Box::pin(async move {
                let model = model.as_deref();
                queued::lowest_queued(tx, &namespace, model, priority, now, VICTIMS).await
            })
        });
        let gone = [&count.taken.evicted, &count.before.evicted];
        let mut found = read.await?.into_iter();
        Ok(found.find(|id| gone.iter().all(|gone| !gone.contains(id))))
    }
}

#[cfg(test)]
mod tests {
    use super::part;

    #[test]
    fn the_parts_of_all_servers_fit_into_the_room_but_for_a_twentieth_of_the_limit() {
        assert_eq!(
            [part(20, 0, 1), part(20, 19, 1), part(20, 20, 1), part(20, 21, 1)],
            [20, 1, 0, 0]
        );
        for limit in [1, 7, 20, 1_500, 1_000_000] {
            for waiting in [0, limit / 3, limit - 1, limit, limit + 9] {
                for n_servers in 2..20 {
                    let all = part(limit, waiting, n_servers) * n_servers * super::LOOKS;
                    let room = limit.saturating_sub(waiting);
                    assert!(all <= room + limit / 20, "{limit} {waiting} {n_servers}: {all}");
                    assert!(room > 0 || all == 0);
                }
            }
        }
        assert_eq!(part(1_500, 1_499, 3), 1, "it fills up");
    }
}
