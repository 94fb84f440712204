//! Logs whose entries are made on another server: what readers here wait for, and how it comes.
//!
//! Such a log is a cache of what storage has or will have. It is fed with frames as they come over
//! the wire, or its readers are *stirred*: told to look at storage. Frames that were lost on the
//! way leave no hole, since the log then begins anew behind them and readers find the rest in
//! storage.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering::Relaxed},
};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::{Log, Relay, log::Inner};
use crate::{
    faults::{self, Fault},
    id::TaskId,
};

/// What a log knows of other servers.
#[derive(Debug, Default)]
pub(super) struct Far {
    /// How often readers were told to look at storage.
    stirs: u64,
    /// In the list of wanted logs.
    wanted: bool,
    /// Whether frames came from another server: storage may lag behind what is here.
    pub(super) fed: bool,
}

/// Tasks whose readers wait for what is not made here.
#[derive(Debug, Default)]
pub(super) struct Wanted {
    /// Whether anybody takes them.
    on: AtomicBool,
    tasks: Mutex<Vec<TaskId>>,
    came: Notify,
}

impl Far {
    /// Whether the log was stirred since `seen`.
    pub(super) fn has_stirred(&self, seen: &mut u64) -> bool {
        std::mem::replace(seen, self.stirs) != self.stirs
    }

    /// A reader waits and no attempt lives here.
    pub(super) fn want(&mut self, list: &Wanted, task: TaskId) {
        if list.on.load(Relaxed) && !std::mem::replace(&mut self.wanted, true) {
            list.tasks.lock().push(task);
            list.came.notify_one();
        }
    }
}

impl Relay {
    /// From now on, keeps a list of the tasks whose readers wait for what is not made here.
    pub fn follow_far(&self) {
        self.0.books.far.on.store(true, Relaxed);
    }

    /// Waits for such tasks, and takes them. For one waiter.
    pub async fn wanted(&self) -> Vec<TaskId> {
        loop {
            let tasks = std::mem::take(&mut *self.0.books.far.tasks.lock());
            if !tasks.is_empty() {
                return tasks;
            }
            self.0.books.far.came.notified().await;
        }
    }
}

impl Log {
    /// Has every reader look at storage once.
    pub fn stir(&self) {
        let woken = {
            let mut inner = self.lock();
            inner.far.stirs += 1;
            inner.waiting.wake()
        };
        woken.send(&self.books().fan_out);
    }

    pub(super) fn stirs(&self) -> u64 {
        self.lock().far.stirs
    }

    /// Number of readers.
    pub fn n_readers(&self) -> usize {
        self.readers.load(Relaxed)
    }

    /// Whether readers wait, or will, for what is not made here. If not, they are listed again by
    /// [`Relay::wanted`] when they do.
    pub fn is_wanted(&self) -> bool {
        let mut inner = self.lock();
        inner.far.wanted = self.n_readers() > 0 && inner.live.is_none() && !inner.is_sealed();
        inner.far.wanted
    }

    /// Whether frames came from another server: storage may lag behind what is here.
    pub fn is_fed(&self) -> bool {
        self.lock().far.fed
    }

    /// Whether an attempt lives here.
    pub fn is_live(&self) -> bool {
        self.lock().live.is_some()
    }

    /// Says where entries begin, unless that is known: those up to `durable` are in storage.
    /// Whether it was not.
    pub fn start_at(&self, durable: u64) -> bool {
        let woken = {
            let mut inner = self.lock();
            let Inner { kept, live, waiting, .. } = &mut *inner;
            if kept.known || live.is_some() {
                return false;
            }
            kept.start_after(durable);
            waiting.wake()
        };
        woken.send(&self.books().fan_out);
        true
    }

    /// Says that nothing follows: the end is here, or in storage.
    pub fn seal(&self) {
        let woken = {
            let mut inner = self.lock();
            if inner.live.is_some() {
                return;
            }
            inner.seal();
            inner.waiting.wake()
        };
        woken.send(&self.books().fan_out);
        self.mark_idle();
    }

    /// The attempt has gone to another server, or was ended by one: what is not on stable storage
    /// is dropped, and readers look there.
    pub fn let_go(&self, attempt: u32) {
        let woken = {
            let mut inner = self.lock();
            let Inner { kept, live, far, waiting, .. } = &mut *inner;
            if !live.as_ref().is_some_and(|live| live.is(attempt)) {
                return;
            }
            *live = None;
            let durable = kept.durable;
            self.skip_to(kept, durable);
            far.stirs += 1;
            waiting.wake()
        };
        woken.send(&self.books().fan_out);
        self.progress.notify_waiters();
        self.mark_idle();
    }

    /// What comes next follows `after`: what is missing up to there is in storage.
    pub fn catch_up(&self, after: u64) {
        let mut inner = self.lock();
        let Inner { kept, live, .. } = &mut *inner;
        if kept.known && kept.head < after && !faults::planted(Fault::PassOverEntries) {
            *live = None;
            self.skip_to(kept, after);
        }
    }

    /// Takes frames that another server sent: all entries from `first` on, with their sequences.
    /// Nothing changes while an attempt lives here, or after the end.
    pub fn feed(self: &Arc<Self>, first: u64, frames: &[(u64, Bytes)]) {
        let woken = {
            let mut inner = self.lock();
            let Inner { kept, live, far, waiting, .. } = &mut *inner;
            if live.is_some() || frames.is_empty() {
                return;
            }
            let skips = !kept.known || kept.head + 1 < first;
            if skips && !faults::planted(Fault::FeedGaps) {
                self.skip_to(kept, first.saturating_sub(1));
            }
            let mut added = 0;
            for (sequence, frame) in frames.iter().filter(|(sequence, _)| *sequence >= first) {
                if *sequence > kept.head {
                    added += kept.push(*sequence, frame.clone());
                }
            }
            far.fed = true;
            // They may be dropped: storage has them, or will.
            kept.make_durable(kept.head);
            self.books().bytes.fetch_add(added, Relaxed);
            self.trim(kept);
            waiting.wake()
        };
        woken.send(&self.books().fan_out);
        self.mark_idle();
    }
}
