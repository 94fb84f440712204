//! The log of one task: its latest entries, each encoded once, and once more where a reader asks
//! for another encoding.
//!
//! Entries are in the order of their sequences without holes; an entry that stands for
//! a lost range has the sequence of the range's end. In memory is the range
//! `before + 1 ..= head`, of which `..= durable` is on stable storage too and may be
//! dropped from the front at any time.

use std::{
    collections::VecDeque,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use bytes::{Bytes, BytesMut};
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;

use super::{
    Books,
    attempt::Live,
    far::Far,
    subscriber::{Ready, Subscriber},
    wake::{Ticket, Waiting},
};
use crate::{
    faults::{self, Fault},
    id::TaskId,
    twin::{Charge, Twin},
};

/// What keeping a frame costs besides its bytes and its twin.
const OVERHEAD: usize = size_of::<Entry>() + 8;

/// The log of one task.
#[derive(Debug)]
pub struct Log {
    task: TaskId,
    books: Arc<Books>,
    inner: Mutex<Inner>,
    pub(super) readers: AtomicUsize,
    /// Something became durable, or an attempt began, froze, thawed or ended.
    pub(super) progress: Notify,
}

/// An entry as its readers get it.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Its sequence.
    pub sequence: u64,
    /// Its bytes.
    pub frame: Bytes,
    /// Its second encoding; there is one once a reader has asked for it.
    pub twin: Option<Arc<Twin>>,
}

impl Entry {
    /// An entry without a twin.
    pub fn new(sequence: u64, frame: Bytes) -> Self {
        Self { sequence, frame, twin: None }
    }
}

#[derive(Debug, Default)]
pub(super) struct Inner {
    pub(super) kept: Kept,
    sealed: bool,
    pub(super) live: Option<Live>,
    /// In the list of dirty logs.
    pub(super) dirty: bool,
    /// Bytes appended since the recorder last took some.
    pub(super) fresh: usize,
    /// In the list of logs that may be idle.
    idle: bool,
    /// Frames are written here one behind the other and split off.
    pub(super) buffer: BytesMut,
    pub(super) waiting: Waiting,
    pub(super) far: Far,
}

/// The entries in memory.
#[derive(Debug, Default)]
pub(super) struct Kept {
    entries: VecDeque<Entry>,
    /// Whether the sequences below mean anything yet.
    pub(super) known: bool,
    /// The last sequence that is not in memory because it is older.
    before: u64,
    /// The last sequence.
    pub(super) head: u64,
    /// The last sequence on stable storage.
    pub(super) durable: u64,
    bytes: usize,
    /// Of these, those above `durable`.
    pub(super) unrecorded: usize,
    /// Counts the twins; there is one once there was a twin.
    twins: Option<Arc<Charge>>,
}

impl Log {
    pub(super) fn new(task: TaskId, books: Arc<Books>) -> Self {
        Self {
            task,
            books,
            inner: Mutex::default(),
            readers: AtomicUsize::new(0),
            progress: Notify::new(),
        }
    }

    /// The task.
    pub fn task(&self) -> TaskId {
        self.task
    }

    /// Sequence of the last entry; `None` while nothing was published here.
    pub fn head(&self) -> Option<u64> {
        let inner = self.lock();
        inner.kept.known.then_some(inner.kept.head)
    }

    /// Appends entries of the server that were committed, in the order of their
    /// sequences; those that are there already are skipped. It ends the attempt, if
    /// one lives: what that one appended is in storage by the same commit. `end` seals
    /// the log; publishing more opens it again.
    pub fn publish(&self, frames: &[(u64, Bytes)], end: bool) {
        let (woken, idle) = {
            let mut guard = self.lock();
            let Inner { kept, sealed, live, idle, waiting, .. } = &mut *guard;
            let mut added = 0;
            for (sequence, frame) in frames {
                if !kept.known {
                    kept.start_after(sequence - 1);
                }
                if *sequence > kept.head {
                    *live = None;
                    *sealed = false;
                    added += kept.push(*sequence, frame.clone());
                }
            }
            *sealed |= end;
            if live.is_none() {
                let recorded = kept.make_durable(kept.head);
                // What was added now never counted as unrecorded.
                self.books.unrecorded.fetch_sub(recorded, Relaxed);
            }
            self.books.bytes.fetch_add(added, Relaxed);
            self.trim(kept);
            (waiting.wake(), !std::mem::replace(idle, true))
        };
        woken.send(&self.books.fan_out);
        self.progress.notify_waiters();
        if idle {
            self.books.idle.lock().push(self.task);
        }
    }

    /// A reader of what follows `after`.
    pub fn subscribe(self: &Arc<Self>, after: u64) -> Subscriber {
        Subscriber::new(self.clone(), after)
    }

    /// Adds what follows the cursor to `out`, with twins where these are wanted; when nothing
    /// does yet, calls `wait`.
    pub(super) fn read(
        &self,
        cursor: &mut u64,
        seen: &mut u64,
        out: &mut VecDeque<Entry>,
        twins: bool,
        wait: impl FnOnce(&mut Waiting),
    ) -> Option<Ready> {
        let mut inner = self.lock();
        let Inner { kept, sealed, live, waiting, far, .. } = &mut *inner;
        if far.has_stirred(seen) {
            return Some(Ready::Stirred);
        }
        if !kept.known || *cursor >= kept.head {
            if kept.known && *sealed {
                return Some(Ready::End);
            }
            wait(waiting);
            if live.is_none() {
                far.want(&self.books.far, self.task);
            }
            return None;
        }
        if *cursor < kept.before && faults::planted(Fault::SkipForLaggards) {
            *cursor = kept.before;
        }
        if *cursor < kept.before {
            return Some(Ready::Behind);
        }
        let from = kept.position_after(*cursor);
        let mut room = self.books.limits.batch_bytes;
        let mut taken = 0;
        for Entry { sequence, frame, .. } in kept.entries.range(from..) {
            taken += 1;
            *cursor = *sequence;
            if room <= frame.len() {
                break;
            }
            room -= frame.len();
        }
        if twins {
            kept.make_twins(from..from + taken, &self.books.twins);
            out.extend(kept.entries.range(from..from + taken).cloned());
            self.trim(kept);
        } else {
            let plain = |entry: &Entry| Entry::new(entry.sequence, entry.frame.clone());
            out.extend(kept.entries.range(from..from + taken).map(plain));
        }
        Some(Ready::Frames)
    }

    pub(super) fn leave(&self, ticket: &Ticket) {
        self.lock().waiting.leave(ticket);
        self.mark_idle();
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock()
    }

    pub(super) fn books(&self) -> &Books {
        &self.books
    }

    /// Drops durable frames from the front down to the bound of one log.
    pub(super) fn trim(&self, kept: &mut Kept) {
        let excess = kept.weight().saturating_sub(self.books.limits.log_bytes);
        if excess > 0 && !faults::planted(Fault::KeepEveryFrame) {
            self.books.bytes.fetch_sub(kept.drop_durable(excess).0, Relaxed);
        }
    }

    /// Forgets what is in memory: everything up to `sequence` is in storage.
    pub(super) fn skip_to(&self, kept: &mut Kept, sequence: u64) {
        self.books.bytes.fetch_sub(kept.bytes, Relaxed);
        self.books.unrecorded.fetch_sub(kept.unrecorded, Relaxed);
        *kept = Kept::default();
        kept.start_after(sequence);
    }

    /// Drops durable frames until about `bytes` are freed; returns what was.
    pub(super) fn evict(&self, bytes: usize) -> usize {
        let (frames, twins) = self.lock().kept.drop_durable(bytes);
        self.books.bytes.fetch_sub(frames, Relaxed);
        frames + twins
    }

    /// How gladly its frames are dropped.
    pub(super) fn weight(&self) -> (bool, usize) {
        let inner = self.lock();
        (inner.sealed, inner.kept.weight() - inner.kept.unrecorded)
    }

    /// Has [`Relay::evict`](super::Relay::evict) look at it.
    pub(super) fn mark_idle(&self) {
        let marked = std::mem::replace(&mut self.lock().idle, true);
        if !marked {
            self.books.idle.lock().push(self.task);
        }
    }

    /// Whether the log has nothing left to do and may be dropped. Has itself looked at
    /// again where nothing else will.
    pub(super) fn retire(&self, unused: bool) -> bool {
        {
            let mut inner = self.lock();
            // The end of a live attempt is published here.
            inner.idle = inner.live.is_none() && !unused;
            if !inner.idle {
                return inner.live.is_none();
            }
        }
        self.books.idle.lock().push(self.task);
        false
    }
}

impl Inner {
    /// Whether the end was published.
    pub(super) fn is_sealed(&self) -> bool {
        self.sealed
    }

    pub(super) fn seal(&mut self) {
        self.sealed = true;
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        let kept = &self.inner.get_mut().kept;
        self.books.bytes.fetch_sub(kept.bytes, Relaxed);
        self.books.unrecorded.fetch_sub(kept.unrecorded, Relaxed);
    }
}

impl Kept {
    /// Says where entries begin; all before are in storage.
    pub(super) fn start_after(&mut self, sequence: u64) {
        self.known = true;
        self.before = sequence;
        self.head = sequence;
        self.durable = sequence;
    }

    /// Appends an entry; returns what it costs.
    pub(super) fn push(&mut self, sequence: u64, frame: Bytes) -> usize {
        debug_assert!(self.known && sequence > self.head, "entries come in order");
        let cost = frame.len() + OVERHEAD;
        self.bytes += cost;
        self.head = sequence;
        self.entries.push_back(Entry::new(sequence, frame));
        cost
    }

    /// The entries after a sequence.
    pub(super) fn after(&self, sequence: u64) -> impl Iterator<Item = &Entry> {
        self.entries.range(self.position_after(sequence)..)
    }

    /// Where the entries after a sequence begin.
    fn position_after(&self, sequence: u64) -> usize {
        // Only lost ranges make an entry stand elsewhere than its sequence says.
        let guess = (sequence - self.before.min(sequence)) as usize;
        match self.entries.get(guess) {
            Some(found) if found.sequence == sequence + 1 => guess,
            _ => self.entries.partition_point(|found| found.sequence <= sequence),
        }
    }

    /// Sees to it that the entries at these positions have twins.
    fn make_twins(&mut self, positions: Range<usize>, all: &Arc<Charge>) {
        let charge = self.twins.get_or_insert_with(|| Arc::new(Charge::within(all)));
        for entry in self.entries.range_mut(positions) {
            entry.twin.get_or_insert_with(|| Twin::new(charge));
        }
    }

    /// Bytes of the entries with their twins.
    fn weight(&self) -> usize {
        self.bytes + self.twins.as_ref().map_or(0, |twins| twins.bytes())
    }

    /// Everything up to `through` is on stable storage now; returns what these entries
    /// counted as unrecorded.
    pub(super) fn make_durable(&mut self, through: u64) -> usize {
        if through <= self.durable {
            return 0;
        }
        let recorded = if through == self.head {
            self.unrecorded
        } else {
            let entries = self.after(self.durable);
            entries.take_while(|entry| entry.sequence <= through).map(cost).sum()
        };
        self.unrecorded -= recorded;
        self.durable = through;
        recorded
    }

    /// Drops durable entries from the front until about `bytes` are freed; returns what frames
    /// and their twins were of that. Twins are counted by themselves.
    fn drop_durable(&mut self, bytes: usize) -> (usize, usize) {
        let (mut freed, mut twins) = (0, 0);
        while freed + twins < bytes {
            match self.entries.pop_front_if(|entry| entry.sequence <= self.durable) {
                Some(entry) => {
                    freed += cost(&entry);
                    twins += entry.twin.as_ref().map_or(0, |twin| twin.bytes());
                    self.before = entry.sequence;
                }
                None => break,
            }
        }
        self.bytes -= freed;
        if self.entries.is_empty() {
            self.entries = VecDeque::new();
        }
        (freed, twins)
    }
}

fn cost(entry: &Entry) -> usize {
    entry.frame.len() + OVERHEAD
}
