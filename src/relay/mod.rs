//! The token relay: one append-only log per task, which any number of readers follow.
//!
//! It owns the frames of running tasks in memory, in the order of their sequences,
//! each encoded once, and once more for the readers that want another encoding. It knows task ids, sequences and bytes; neither protobuf nor
//! what a task is, nor storage.
//!
//! A reader is a cursor ([`Subscriber`]): it costs no memory while it reads nothing, and
//! publishing does not look at it. What it has not read may be dropped from memory
//! once it is on stable storage; the reader is then told to read it there
//! ([`Next::Behind`]).
//!
//! A reader never misses an entry if it opens the log first, then reads storage, then
//! follows the log: what was committed before is in storage, what is published later
//! is in the log.

mod attempt;
mod far;
#[cfg(test)]
mod far_tests;
#[cfg(test)]
mod hurry_tests;
mod log;
mod segment;
mod subscriber;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod thread_tests;
#[cfg(test)]
mod twin_tests;
mod wake;

use std::{
    collections::{HashMap, hash_map},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use parking_lot::Mutex;
use tokio::sync::Notify;

pub use self::{
    attempt::{Appended, Encoded, Frozen, Refused},
    log::{Entry, Log},
    segment::{SegmentData, frames, put_frame},
    subscriber::{Next, Ready, Subscriber},
};
use crate::{id::TaskId, twin::Charge};

/// Memory bounds.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of one log above which frames on stable storage are dropped.
    pub log_bytes: usize,
    /// Bytes of all logs above which frames on stable storage are dropped, and above
    /// which logs take no more until some are.
    pub total_bytes: usize,
    /// Bytes of one log not yet on stable storage above which it takes no more.
    pub unrecorded_bytes: usize,
    /// Bytes appended to one log since it was last recorded, at which the recorder is hurried.
    pub hurry_log_bytes: usize,
    /// The same of all logs together.
    pub hurry_bytes: usize,
    /// Bytes that a subscriber is handed at once; at least one frame.
    pub batch_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            log_bytes: 1 << 20,
            total_bytes: 256 << 20,
            unrecorded_bytes: 4 << 20,
            hurry_log_bytes: 256 << 10,
            hurry_bytes: 4 << 20,
            batch_bytes: 32 << 10,
        }
    }
}

/// What the relay holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Logs.
    pub logs: usize,
    /// Bytes of their frames and of these' twins, with the cost of keeping them.
    pub bytes: usize,
    /// Of these, bytes not yet on stable storage.
    pub unrecorded_bytes: usize,
    /// Subscribers.
    pub subscribers: usize,
}

/// All logs; clones share them.
#[derive(Clone, Debug)]
pub struct Relay(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    logs: Mutex<HashMap<TaskId, Arc<Log>>>,
    books: Arc<Books>,
}

/// What logs tell the relay. Its locks are taken last and never across another.
#[derive(Debug)]
struct Books {
    limits: Limits,
    bytes: AtomicUsize,
    /// Bytes of the twins of frames.
    twins: Arc<Charge>,
    unrecorded: AtomicUsize,
    /// Bytes appended since the recorder last asked for dirty logs.
    fresh: AtomicUsize,
    subscribers: AtomicUsize,
    /// Logs with frames to record, each once.
    dirty: Mutex<Vec<Arc<Log>>>,
    dirtied: Notify,
    hurried: Notify,
    /// Logs that may have nothing left to do, each once.
    idle: Mutex<Vec<TaskId>>,
    fan_out: wake::FanOut,
    /// Logs whose readers wait for what is not made here, each once; not kept by a server alone.
    far: far::Wanted,
}

impl Relay {
    /// An empty relay.
    pub fn new(limits: Limits) -> Self {
        let books = Arc::new(Books {
            limits,
            bytes: AtomicUsize::new(0),
            twins: Arc::default(),
            unrecorded: AtomicUsize::new(0),
            fresh: AtomicUsize::new(0),
            subscribers: AtomicUsize::new(0),
            dirty: Mutex::default(),
            dirtied: Notify::new(),
            hurried: Notify::new(),
            idle: Mutex::default(),
            fan_out: wake::FanOut::default(),
            far: far::Wanted::default(),
        });
        Self(Arc::new(Shared { logs: Mutex::default(), books }))
    }

    /// The log of a task, made when there is none: for readers, and for the start of
    /// an attempt.
    pub fn open(&self, task: TaskId) -> Arc<Log> {
        let log = match self.0.logs.lock().entry(task) {
            hash_map::Entry::Occupied(entry) => return entry.get().clone(),
            hash_map::Entry::Vacant(entry) => {
                entry.insert(Arc::new(Log::new(task, self.0.books.clone()))).clone()
            }
        };
        // Its opener may leave without a word.
        log.mark_idle();
        log
    }

    /// The log of a task, when there is one. Publishing needs no other: a reader that
    /// opens the log later finds in storage what was committed before.
    pub fn find(&self, task: TaskId) -> Option<Arc<Log>> {
        self.0.logs.lock().get(&task).cloned()
    }

    /// Logs with frames that are not on stable storage, each once; the caller takes
    /// them with [`Log::take_unrecorded`].
    pub fn dirty(&self) -> Vec<Arc<Log>> {
        self.0.books.fresh.store(0, Relaxed);
        std::mem::take(&mut *self.0.books.dirty.lock())
    }

    /// Completes when [`dirty`](Self::dirty) has something to give. For one waiter.
    pub async fn dirty_notified(&self) {
        while self.0.books.dirty.lock().is_empty() {
            self.0.books.dirtied.notified().await;
        }
    }

    /// Completes when recording should not wait for its interval: much is unrecorded,
    /// or a log must have more sequences reserved. For one waiter.
    pub async fn hurried(&self) {
        self.0.books.hurried.notified().await;
    }

    /// Drops logs that have nothing left to do and, over the bound of all logs, frames
    /// that are on stable storage.
    pub fn evict(&self) {
        let idle = std::mem::take(&mut *self.0.books.idle.lock());
        if !idle.is_empty() {
            let mut logs = self.0.logs.lock();
            for task in idle {
                let hash_map::Entry::Occupied(entry) = logs.entry(task) else { continue };
                // Under the map's lock nobody gets at a log that only the map holds.
                let unused = Arc::strong_count(entry.get()) == 1;
                if entry.get().retire(unused) {
                    entry.remove();
                }
            }
        }

        let total = self.0.books.limits.total_bytes;
        let held = self.0.books.held();
        if held <= total {
            return;
        }
        // Some room, so that the next frame does not cause the next sweep.
        let mut excess = held - total + total / 8;
        let mut logs: Vec<_> = self.0.logs.lock().values().cloned().collect();
        // Whoever follows a sealed log has the least to gain from memory; then the
        // largest, which are dear to keep and rarely followed closely.
        logs.sort_by_cached_key(|log| std::cmp::Reverse(log.weight()));
        for log in logs {
            excess = excess.saturating_sub(log.evict(excess));
            if excess == 0 {
                break;
            }
        }
    }

    /// Wakes the readers of logs that many follow, so that publishing need not; runs
    /// for ever. Without it publishing wakes them all itself.
    pub async fn fan_out(&self) {
        self.0.books.fan_out.run().await;
    }

    /// What is held now.
    pub fn stats(&self) -> Stats {
        let books = &self.0.books;
        Stats {
            logs: self.0.logs.lock().len(),
            bytes: books.held(),
            unrecorded_bytes: books.unrecorded.load(Relaxed),
            subscribers: books.subscribers.load(Relaxed),
        }
    }
}

impl Books {
    /// Bytes that all logs hold.
    fn held(&self) -> usize {
        self.bytes.load(Relaxed) + self.twins.bytes()
    }
}

impl Default for Relay {
    fn default() -> Self {
        Self::new(Limits::default())
    }
}
