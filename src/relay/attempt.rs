//! What a live attempt adds to its log: entries that the runner numbers, kept until
//! they are on stable storage.
//!
//! The runner's event `i` (from 1) has the sequence `base + i`, so that what it sends
//! again after a crash lands on the same numbers. No sequence from `reserved` on is shown
//! to anybody; `reserved` itself is kept back for the entry that stands for a lost range.

use std::sync::{Arc, atomic::Ordering::Relaxed};

use bytes::BytesMut;
use tokio::sync::Notify;

use super::{
    Log,
    log::{Entry, Inner, Kept},
    segment::{MAX_PREFIX, SegmentData, put_frame},
    wake::Woken,
};
use crate::faults::{self, Fault};

/// Fewest sequences reserved ahead.
const MIN_RESERVE: u64 = 1024;

/// Most sequences reserved ahead.
const MAX_RESERVE: u64 = 1 << 20;

/// Sizes of the buffer that frames are written into.
const MIN_BUFFER: usize = 256;
const MAX_BUFFER: usize = 16 << 10;

/// What an encoder wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoded {
    /// A token: the next gets the next token index.
    Token,
    /// An entry that belongs on the timeline too.
    Timeline,
    /// Any other entry.
    Other,
}

/// What became of events that were taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Appended {
    /// Index that comes next.
    pub next_index: u64,
    /// How many of the events offered are there now, duplicates included. When fewer
    /// than offered, the log is full or its reservation used up: offer the rest again
    /// after [`Log::watch`] or [`Log::room`] says so.
    pub accepted: usize,
}

/// Why no event was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// The attempt is not the live one.
    WrongAttempt,
    /// The attempt is about to end.
    Frozen,
    /// Events before the first one are missing.
    Missing {
        /// Index to send from.
        expected_index: u64,
    },
}

/// A log at rest, for the transaction that ends its attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frozen {
    /// Sequence of the last entry; 0 while nothing was published here.
    pub head: u64,
    /// What is not on stable storage yet.
    pub rest: Option<SegmentData>,
    /// Tokens of the attempt.
    pub tokens: u64,
    /// After a restart: readers may have seen sequences above `head` and below this one that are
    /// not here. They must not be given to other entries; this one is free for the entry that
    /// declares them lost.
    pub in_doubt: Option<u64>,
}

/// The live attempt of a log.
#[derive(Debug)]
pub(super) struct Live {
    number: u32,
    base: u64,
    reserved: u64,
    tokens: u64,
    frozen: bool,
    /// The sequence behind those that may have been shown before a restart, while some of them are
    /// not here yet.
    in_doubt: Option<u64>,
    /// Sequences of unrecorded entries that belong on the timeline.
    timeline: Vec<u64>,
    /// Last sequence of the segment that is being recorded.
    taken: Option<u64>,
    watcher: Option<Arc<Notify>>,
}

impl Log {
    /// Takes events of `attempt` from now on. `base` is the sequence of its
    /// `attempt_started`, which is published already; entries below `reserved` may be
    /// shown.
    pub fn begin_attempt(&self, attempt: u32, base: u64, reserved: u64) {
        self.start_attempt(attempt, base, base, 0, reserved, None);
    }

    /// As [`begin_attempt`](Self::begin_attempt) after a restart: of the attempt's
    /// entries, those up to `durable` are in storage, `tokens` of them tokens. Those up to
    /// `reserved` may have been shown and are in doubt, until the runner says what it
    /// sent ([`settle`](Self::settle)). Nothing changes when the attempt lives here already.
    pub fn resume_attempt(
        &self,
        attempt: u32,
        base: u64,
        durable: u64,
        tokens: u64,
        reserved: u64,
    ) {
        let in_doubt = (reserved > durable + 1).then_some(reserved);
        self.start_attempt(attempt, base, durable, tokens, reserved, in_doubt);
    }

    /// The runner has sent events up to `last_index` so far: once these are here, nothing
    /// is in doubt.
    pub fn settle(&self, attempt: u32, last_index: u64) {
        let mut inner = self.lock();
        let Inner { kept, live, .. } = &mut *inner;
        if let Ok(live) = live_attempt(live, attempt) {
            // No reader has seen the one behind the last that was sent.
            live.in_doubt = live.in_doubt.map(|behind| behind.min(live.base + last_index + 1));
            live.clear_doubt(kept.head);
        }
    }

    fn start_attempt(
        &self,
        attempt: u32,
        base: u64,
        durable: u64,
        tokens: u64,
        reserved: u64,
        in_doubt: Option<u64>,
    ) {
        let woken = {
            let mut inner = self.lock();
            if inner.live.as_ref().is_some_and(|live| live.number == attempt) {
                return;
            }
            let fed = std::mem::take(&mut inner.far.fed);
            if !inner.kept.known || inner.kept.head < durable || fed {
                self.skip_to(&mut inner.kept, durable);
            }
            inner.live = Some(Live {
                number: attempt,
                base,
                reserved,
                tokens,
                frozen: false,
                in_doubt,
                timeline: Vec::new(),
                taken: None,
                watcher: None,
            });
            // A reader may be behind a head that was unknown until now.
            inner.waiting.wake()
        };
        woken.send(&self.books().fan_out);
        self.progress.notify_waiters();
    }

    /// Appends events of the runner, `first_index` being the runner's index of the first
    /// of `count`. Those that are there already are skipped. `encode(i, sequence,
    /// token_index, buffer)` appends the frame of event `i` (from 0) to the buffer,
    /// whatever that holds already.
    pub fn append(
        self: &Arc<Self>,
        attempt: u32,
        first_index: u64,
        count: usize,
        mut encode: impl FnMut(usize, u64, u64, &mut BytesMut) -> Encoded,
    ) -> Result<Appended, Refused> {
        let limits = &self.books().limits;
        let (appended, added, woken, dirtied, urgent) = {
            let mut guard = self.lock();
            let Inner { kept, live, buffer, dirty, fresh, waiting, .. } = &mut *guard;
            let live = live_attempt(live, attempt)?;
            if live.frozen {
                return Err(Refused::Frozen);
            }
            let next_index = kept.head + 1 - live.base;
            let first_index = if faults::planted(Fault::TakeGappedEvents) {
                first_index.min(next_index)
            } else {
                first_index
            };
            if first_index > next_index {
                return Err(Refused::Missing { expected_index: next_index });
            }

            let skipped = usize::try_from(next_index - first_index).unwrap_or(count).min(count);
            let mut accepted = skipped;
            let mut added = 0;
            let crowded = self.books().unrecorded.load(Relaxed) >= limits.total_bytes;
            while accepted < count && live.left(kept.head) > 0 {
                let full = kept.unrecorded >= limits.unrecorded_bytes;
                if full || (crowded && kept.unrecorded > 0) {
                    break;
                }
                if buffer.capacity() < MIN_BUFFER / 4 {
                    let size = (kept.unrecorded / 2).clamp(MIN_BUFFER, MAX_BUFFER);
                    *buffer = BytesMut::with_capacity(size);
                }
                let sequence = kept.head + 1;
                match encode(accepted, sequence, live.tokens, buffer) {
                    Encoded::Token => live.tokens += 1,
                    Encoded::Timeline => live.timeline.push(sequence),
                    Encoded::Other => {}
                }
                let cost = kept.push(sequence, buffer.split().freeze());
                kept.unrecorded += cost;
                added += cost;
                accepted += 1;
            }

            live.clear_doubt(kept.head);
            let short = accepted < count || live.left(kept.head) < MIN_RESERVE / 4;
            *fresh += added;
            let urgent = short || *fresh >= limits.hurry_log_bytes;
            let dirtied = (added > 0 || short) && !std::mem::replace(dirty, true);
            let woken = if added > 0 { waiting.wake() } else { Woken::default() };
            let next_index = kept.head + 1 - live.base;
            self.books().bytes.fetch_add(added, Relaxed);
            self.books().unrecorded.fetch_add(added, Relaxed);
            self.trim(kept);
            (Appended { next_index, accepted }, added, woken, dirtied, urgent)
        };
        woken.send(&self.books().fan_out);
        if dirtied {
            self.books().dirty.lock().push(self.clone());
            self.books().dirtied.notify_one();
        }
        let fresh = self.books().fresh.fetch_add(added, Relaxed) + added;
        if added > 0 && (urgent || fresh >= limits.hurry_bytes) || dirtied && urgent {
            self.books().hurried.notify_one();
        }
        Ok(appended)
    }

    /// Takes no more events, since a transaction is about to end the attempt. To be
    /// followed by [`publish`](Self::publish) or [`thaw`](Self::thaw).
    pub fn freeze(&self, attempt: u32) -> Frozen {
        let mut inner = self.lock();
        let Inner { kept, live, .. } = &mut *inner;
        match live_attempt(live, attempt) {
            Ok(live) => {
                live.frozen = !faults::planted(Fault::LeakIntoEnds);
                let rest = (kept.head > kept.durable).then(|| self.segment(kept, live));
                let Live { tokens, in_doubt, .. } = *live;
                Frozen { head: kept.head, rest, tokens, in_doubt }
            }
            Err(_) => Frozen { head: kept.head, rest: None, tokens: 0, in_doubt: None },
        }
    }

    /// Takes events again, since the transaction failed.
    pub fn thaw(self: &Arc<Self>, attempt: u32) {
        let watcher = {
            let mut inner = self.lock();
            let Ok(live) = live_attempt(&mut inner.live, attempt) else { return };
            live.frozen = false;
            live.watcher.clone()
        };
        self.mark_dirty();
        self.made_progress(watcher);
    }

    /// What is not on stable storage yet, for the recorder; `None` when there is nothing,
    /// when the last answer's fate is open, or while the log is frozen. Without frames
    /// when only the reservation is to grow.
    pub fn take_unrecorded(&self) -> Option<SegmentData> {
        let mut inner = self.lock();
        inner.dirty = false;
        inner.fresh = 0;
        let Inner { kept, live, .. } = &mut *inner;
        let live = live.as_mut().filter(|live| !live.frozen && live.taken.is_none())?;
        let mut segment = self.segment(kept, live);
        let count = kept.head - kept.durable;
        let left = live.left(kept.head);
        if left < (2 * count).max(MIN_RESERVE / 2) {
            let ahead = (4 * count).clamp(MIN_RESERVE, MAX_RESERVE);
            segment.reserve_to = Some(live.reserved.max(kept.head + ahead));
        }
        if count == 0 && segment.reserve_to.is_none() {
            return None;
        }
        live.taken = Some(kept.head);
        Some(segment)
    }

    /// The segment taken last is on stable storage: everything up to `through`, and with
    /// it the row that reserves the sequences up to `reserved`.
    pub fn recorded(self: &Arc<Self>, through: u64, reserved: u64) {
        let (watcher, more) = {
            let mut inner = self.lock();
            let Inner { kept, live, .. } = &mut *inner;
            // The attempt may have ended meanwhile, and another begun.
            let Some(live) = live.as_mut().filter(|live| live.taken == Some(through)) else {
                return;
            };
            live.taken = None;
            live.reserved = live.reserved.max(reserved);
            live.timeline.retain(|sequence| *sequence > through);
            let recorded = kept.make_durable(through);
            self.books().unrecorded.fetch_sub(recorded, Relaxed);
            self.trim(kept);
            (live.watcher.clone(), kept.head > kept.durable)
        };
        if more {
            self.mark_dirty();
        }
        self.made_progress(watcher);
    }

    /// The segment taken last, up to `through`, did not reach storage; it will be taken
    /// again.
    pub fn not_recorded(self: &Arc<Self>, through: u64) {
        if let Some(live) = &mut self.lock().live {
            live.taken.take_if(|taken| *taken == through);
        }
        self.mark_dirty();
    }

    /// Highest index of the attempt's events that is on stable storage; `None` when the
    /// attempt does not live here.
    pub fn durable_index(&self, attempt: u32) -> Option<u64> {
        let mut inner = self.lock();
        let Inner { kept, live, .. } = &mut *inner;
        let live = live_attempt(live, attempt).ok()?;
        if faults::planted(Fault::AckUnrecordedEvents) {
            return Some(kept.head.saturating_sub(live.base));
        }
        Some(kept.durable.saturating_sub(live.base))
    }

    /// Index of the attempt's event that comes next; `None` when the attempt does not live
    /// here.
    pub fn next_index(&self, attempt: u32) -> Option<u64> {
        let mut inner = self.lock();
        let Inner { kept, live, .. } = &mut *inner;
        let live = live_attempt(live, attempt).ok()?;
        Some(kept.head + 1 - live.base)
    }

    /// Has `watcher` notified whenever the attempt's durable index grows, or events may be
    /// offered again. It replaces an earlier one.
    pub fn watch(&self, attempt: u32, watcher: Arc<Notify>) {
        if let Ok(live) = live_attempt(&mut self.lock().live, attempt) {
            live.watcher = Some(watcher);
        }
    }

    /// Waits until the attempt's events up to `index` are on stable storage; hurries the
    /// recorder.
    pub async fn durable(self: &Arc<Self>, attempt: u32, index: u64) -> Result<(), Refused> {
        loop {
            let progress = self.progress.notified();
            tokio::pin!(progress);
            progress.as_mut().enable();
            let durable = self.durable_index(attempt).ok_or(Refused::WrongAttempt)?;
            if durable >= index {
                return Ok(());
            }
            self.books().hurried.notify_one();
            progress.await;
        }
    }

    /// Waits until the attempt takes at least one more event.
    pub async fn room(self: &Arc<Self>, attempt: u32) -> Result<(), Refused> {
        loop {
            let progress = self.progress.notified();
            tokio::pin!(progress);
            progress.as_mut().enable();
            {
                let mut inner = self.lock();
                let Inner { kept, live, .. } = &mut *inner;
                let live = live_attempt(live, attempt)?;
                let full = kept.unrecorded >= self.books().limits.unrecorded_bytes;
                if !live.frozen && !full && live.left(kept.head) > 0 {
                    return Ok(());
                }
            }
            progress.await;
        }
    }

    /// Has the recorder look at the log.
    fn mark_dirty(self: &Arc<Self>) {
        let marked = std::mem::replace(&mut self.lock().dirty, true);
        if !marked {
            self.books().dirty.lock().push(self.clone());
            self.books().dirtied.notify_one();
        }
    }

    fn made_progress(&self, watcher: Option<Arc<Notify>>) {
        self.progress.notify_waiters();
        if let Some(watcher) = watcher {
            watcher.notify_one();
        }
    }

    fn segment(&self, kept: &Kept, live: &Live) -> SegmentData {
        let size: usize =
            kept.after(kept.durable).map(|entry| entry.frame.len() + MAX_PREFIX).sum();
        let mut frames = BytesMut::with_capacity(size);
        let mut timeline = Vec::with_capacity(live.timeline.len());
        for Entry { sequence, frame, .. } in kept.after(kept.durable) {
            put_frame(&mut frames, frame);
            if live.timeline.binary_search(sequence).is_ok() {
                timeline.push((*sequence, frame.clone()));
            }
        }
        SegmentData {
            task: self.task(),
            attempt: live.number,
            first: kept.durable + 1,
            last: kept.head,
            frames: frames.freeze(),
            timeline,
            reserve_to: None,
        }
    }
}

impl Live {
    /// Whether it is that attempt.
    pub(super) fn is(&self, attempt: u32) -> bool {
        self.number == attempt
    }

    /// How many more entries may be shown.
    fn left(&self, head: u64) -> u64 {
        self.reserved.saturating_sub(head + 1)
    }

    fn clear_doubt(&mut self, head: u64) {
        self.in_doubt = self.in_doubt.filter(|behind| *behind > head + 1);
    }
}

fn live_attempt(live: &mut Option<Live>, attempt: u32) -> Result<&mut Live, Refused> {
    live.as_mut().filter(|live| live.number == attempt).ok_or(Refused::WrongAttempt)
}
