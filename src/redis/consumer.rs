//! The side of the queues that takes work. A consumer knows what it holds, so that a delivery
//! whose answer was lost comes again, and one that it holds does not.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use parking_lot::Mutex;

use super::{
    Lane, Redis, Result,
    script::{Args, Reply},
};

/// Deliveries in one run of a script.
const CHUNK: usize = 256;

/// One who takes work, such as a server; clones share it.
#[derive(Clone)]
pub struct Consumer {
    redis: Redis,
    name: Arc<str>,
    held: Arc<Mutex<HashMap<Lane, BTreeSet<String>>>>,
    doubts: Arc<Doubts>,
}

/// Whether the server may count more as delivered than came here: while an answer is awaited, and
/// when it never came.
#[derive(Default)]
struct Doubts {
    raised: AtomicU64,
    settled: AtomicU64,
}

impl Doubts {
    fn raise(&self) -> u64 {
        self.raised.fetch_add(1, Ordering::AcqRel) + 1
    }

    /// Settles the doubt of this number; it is the last one unless others were raised meanwhile.
    fn settle(&self, doubt: u64) {
        if self.raised.load(Ordering::Acquire) == doubt {
            self.settled.store(doubt, Ordering::Release);
        }
    }

    /// Doubts raised so far, when not all of them are settled.
    fn open(&self) -> Option<u64> {
        let raised = self.raised.load(Ordering::Acquire);
        (self.settled.load(Ordering::Acquire) != raised).then_some(raised)
    }
}

/// An item that was delivered. It stays so until it is acknowledged or given back, or until others
/// take it over since the consumer was silent for too long.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delivery {
    /// From which lane.
    pub lane: Lane,
    /// Which entry of the lane.
    pub entry: String,
    /// Id of the item.
    pub id: String,
    /// Which attempt.
    pub attempt: u32,
    /// As it was added.
    pub data: Bytes,
}

impl Consumer {
    pub(super) fn new(redis: Redis, name: &str) -> Self {
        Self { redis, name: name.into(), held: Arc::default(), doubts: Arc::default() }
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Takes up to `most` items: those of the first lane first, and of each lane those that were
    /// given back, then the oldest. Does not wait for any; [`Work::bell`](super::Work::bell) does.
    ///
    /// An item may be delivered twice, here and elsewhere. After an error, or when the future was
    /// dropped, the next call also returns what the server delivered meanwhile, over `most` if
    /// need be.
    pub async fn pull(&self, lanes: &[Lane], most: usize) -> Result<Vec<Delivery>> {
        let wants: Vec<_> = lanes.iter().map(|lane| (lane.clone(), most)).collect();
        self.pull_each(&wants, most).await
    }

    /// As [`pull`](Self::pull), with a bound for each lane too.
    pub async fn pull_each(&self, wants: &[(Lane, usize)], most: usize) -> Result<Vec<Delivery>> {
        let lanes: Vec<Lane> = wants.iter().map(|(lane, _)| lane.clone()).collect();
        let lanes = lanes.as_slice();
        let mut deliveries = Vec::new();
        if let Some(doubts) = self.doubts.open() {
            let args = Args::default().text(&self.name).texts(lanes.iter().map(Lane::as_str));
            let reply = self.redis.run(&self.redis.0.scripts.own, args).await?;
            self.take(lanes, reply, &mut deliveries)?;
            self.doubts.settle(doubts);
        }
        let most = most.saturating_sub(deliveries.len());
        if most == 0 {
            return Ok(deliveries);
        }
        let mut args = Args::default().text(&self.name).number(most as u64);
        for (lane, most) in wants {
            args = args.text(lane.as_str()).number(*most as u64);
        }
        // Until the answer is here; a dropped future leaves it so.
        let doubt = self.doubts.raise();
        let mut reply = self.redis.run(&self.redis.0.scripts.pull, args).await?;
        let era = reply.text()?;
        let renewed = reply.number()?;
        if renewed > 0 {
            tracing::warn!(renewed, "consumer groups were gone; what was delivered comes again");
        }
        self.take(lanes, reply, &mut deliveries)?;
        self.doubts.settle(doubt);
        self.redis.saw_era(&era);
        Ok(deliveries)
    }

    /// Takes over up to `most` items that other consumers have had for longer than `idle` without
    /// a word. What this one has itself counts as said anew.
    pub async fn claim(
        &self,
        lanes: &[Lane],
        idle: Duration,
        most: usize,
    ) -> Result<Vec<Delivery>> {
        let mut deliveries = Vec::new();
        let idle = u64::try_from(idle.as_millis()).unwrap_or(u64::MAX);
        let args = Args::default().text(&self.name).number(most as u64).number(idle);
        let args = args.texts(lanes.iter().map(Lane::as_str));
        let doubt = self.doubts.raise();
        let reply = self.redis.run(&self.redis.0.scripts.claim, args).await?;
        self.take(lanes, reply, &mut deliveries)?;
        self.doubts.settle(doubt);
        Ok(deliveries)
    }

    /// Ends deliveries: the work has begun elsewhere, or is not to be done. On an error they may
    /// come again.
    pub async fn ack(&self, deliveries: &[Delivery]) -> Result<()> {
        self.let_go(deliveries);
        for chunk in deliveries.chunks(CHUNK) {
            let mut args = Args::default();
            for delivery in chunk {
                args = args.text(delivery.lane.as_str()).text(&delivery.entry).text(&delivery.id);
            }
            let doubt = self.doubts.raise();
            self.redis.run(&self.redis.0.scripts.ack, args).await?;
            self.doubts.settle(doubt);
        }
        Ok(())
    }

    /// Gives deliveries back. They keep their place, and whoever pulls next from their lane gets
    /// them. Returns how many were still this consumer's.
    pub async fn give_back(&self, deliveries: &[Delivery]) -> Result<u64> {
        self.let_go(deliveries);
        let mut given = 0;
        for chunk in deliveries.chunks(CHUNK) {
            let mut args = Args::default().text(&self.name);
            for delivery in chunk {
                args = args.text(delivery.lane.as_str()).text(&delivery.entry);
            }
            let doubt = self.doubts.raise();
            let mut reply = self.redis.run(&self.redis.0.scripts.give, args).await?;
            given += reply.number()?.max(0) as u64;
            self.doubts.settle(doubt);
        }
        Ok(given)
    }

    /// Gives back all that it has in these lanes, and is known no more. For the end of a process.
    pub async fn leave(&self, lanes: &[Lane]) -> Result<u64> {
        self.held.lock().clear();
        let mut given = 0;
        for chunk in lanes.chunks(CHUNK) {
            let args = Args::default().text(&self.name).texts(chunk.iter().map(Lane::as_str));
            let mut reply = self.redis.run(&self.redis.0.scripts.leave, args).await?;
            given += reply.number()?.max(0) as u64;
        }
        Ok(given)
    }

    /// How many deliveries it holds.
    pub fn n_held(&self) -> usize {
        self.held.lock().values().map(BTreeSet::len).sum()
    }

    fn let_go(&self, deliveries: &[Delivery]) {
        let mut held = self.held.lock();
        for delivery in deliveries {
            if let Some(entries) = held.get_mut(&delivery.lane) {
                entries.remove(&delivery.entry);
                if entries.is_empty() {
                    held.remove(&delivery.lane);
                }
            }
        }
    }

    /// Reads deliveries, and keeps those that are new to it.
    fn take(&self, lanes: &[Lane], mut reply: Reply, into: &mut Vec<Delivery>) -> Result<()> {
        let mut held = self.held.lock();
        while !reply.is_empty() {
            let index = reply.number()?;
            let (entry, id) = (reply.text()?, reply.text()?);
            let attempt = u32::try_from(reply.number()?).map_err(|_| reply.unexpected())?;
            let data = reply.bytes()?;
            let lane = usize::try_from(index - 1).ok().and_then(|index| lanes.get(index));
            let lane = lane.ok_or_else(|| reply.unexpected())?;
            if held.entry(lane.clone()).or_default().insert(entry.clone()) {
                into.push(Delivery { lane: lane.clone(), entry, id, attempt, data });
            }
        }
        Ok(())
    }
}
