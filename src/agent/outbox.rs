//! What the runner owes the server: the events of each attempt held, kept until they
//! are acknowledged, and the credits that change with them.
//!
//! Engines append through an [`Emitter`]; whoever carries events away (the Output
//! stream, or calls in poll mode) pulls with [`Outbox::take`] everything that is ready
//! of all attempts. It knows no stream and no time; a waker tells the carrier that there
//! is something. An engine whose attempt holds `max_unacked_bytes` waits, alone.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    task::Waker,
};

use futures_util::task::AtomicWaker;
use parking_lot::Mutex;
use prost::Message as _;
use tokio::sync::Notify;

use super::emitter::{Emitter, Stopped};
use crate::{
    clock::{Clock, Mono},
    id::TaskId,
    pb::{self, runner_event::Body},
    runners::protocol::HeldDigest,
};

/// An attempt's fencing token.
pub type Key = (TaskId, u32);

/// Bytes that an event is counted with besides its text.
pub(super) const OVERHEAD: usize = 16;

/// Unacknowledged bytes of an attempt until a server says otherwise.
const DEFAULT_LIMIT: usize = 1 << 20;

/// What is ready to be carried away.
#[derive(Debug, Default)]
pub struct Batch {
    /// Events, by attempt.
    pub leases: Vec<pb::LeaseEvents>,
    /// Credits, when a Finish in this batch changed them.
    pub credits: Option<pb::Credits>,
}

/// An attempt that is held, as figures.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// The attempt.
    pub key: Key,
    /// Index of its latest event; 0 before the first.
    pub last_index: u64,
    /// Lowest index that can still be resent.
    pub first_kept: u64,
    /// Whether its Finish was made.
    pub finished: bool,
}

/// The events of all attempts held; clones share them.
#[derive(Clone, Debug)]
pub struct Outbox(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    carrier: AtomicWaker,
}

#[derive(Debug)]
struct State {
    lanes: HashMap<Key, Lane>,
    /// Attempts with something unsent, each once, in the order to serve them.
    ready: VecDeque<Key>,
    limit: usize,
    digest: HeldDigest,
    slots: u32,
    busy: u32,
    accepting: bool,
    revision: u64,
    /// Seq of the last Assign that was seen.
    as_of: u64,
    /// A Finish waits whose message shall carry credits.
    credits_due: bool,
    /// The present carrier; one that was superseded gets nothing.
    carrier: u64,
}

#[derive(Debug)]
struct Lane {
    /// Credential for calls that concern this attempt.
    token: String,
    /// Index of the first of `kept`.
    first: u64,
    kept: VecDeque<(pb::RunnerEvent, usize)>,
    /// Index that goes next to the present carrier.
    cursor: u64,
    bytes: usize,
    finish: Option<pb::Finish>,
    finish_sent: bool,
    ready: bool,
    begun: Mono,
    first_token: Option<Mono>,
    room: Arc<Notify>,
}

impl Lane {
    fn next_index(&self) -> u64 {
        self.first + self.kept.len() as u64
    }

    fn has_unsent(&self) -> bool {
        self.cursor < self.next_index() || (self.finish.is_some() && !self.finish_sent)
    }

    /// Everything unsent, up to `room` bytes but at least one event.
    fn take(&mut self, key: Key, room: usize) -> (pb::LeaseEvents, usize) {
        let mut taken = 0;
        let mut lease = pb::LeaseEvents {
            task_id: key.0.to_string(),
            attempt: key.1,
            first_index: self.cursor,
            events: Vec::new(),
            finish: None,
        };
        let from = usize::try_from(self.cursor - self.first).unwrap_or(usize::MAX);
        for (event, bytes) in self.kept.range(from.min(self.kept.len())..) {
            if taken > 0 && taken + bytes > room {
                return (lease, taken);
            }
            taken += bytes;
            lease.events.push(event.clone());
            self.cursor += 1;
        }
        if let Some(finish) = &self.finish {
            taken += OVERHEAD + finish.encoded_len();
            lease.finish = Some(finish.clone());
            self.finish_sent = true;
        }
        (lease, taken)
    }
}

impl State {
    fn mark_ready(&mut self, key: Key) {
        if let Some(lane) = self.lanes.get_mut(&key)
            && lane.has_unsent()
            && !std::mem::replace(&mut lane.ready, true)
        {
            self.ready.push_back(key);
        }
    }

    fn credits(&mut self) -> pb::Credits {
        self.revision += 1;
        self.credits_due = false;
        let free_slots = if self.accepting { self.slots.saturating_sub(self.busy) } else { 0 };
        pb::Credits { revision: self.revision, free_slots, as_of_seq: self.as_of }
    }
}

impl Outbox {
    /// An empty outbox of a runner with `slots`.
    pub fn new(slots: u32) -> Self {
        let state = State {
            lanes: HashMap::new(),
            ready: VecDeque::new(),
            limit: DEFAULT_LIMIT,
            digest: HeldDigest::default(),
            slots,
            busy: 0,
            accepting: true,
            revision: 0,
            as_of: 0,
            credits_due: false,
            carrier: 0,
        };
        Self(Arc::new(Shared { state: Mutex::new(state), carrier: AtomicWaker::new() }))
    }

    /// Begins an attempt, which occupies a slot until [`finish`](Self::finish) or
    /// [`free`](Self::free). `token` is its credential for unary calls.
    pub fn begin(&self, key: Key, token: String, clock: Clock) -> Emitter {
        let room = Arc::new(Notify::new());
        let lane = Lane {
            token,
            first: 1,
            kept: VecDeque::new(),
            cursor: 1,
            bytes: 0,
            finish: None,
            finish_sent: false,
            ready: false,
            begun: clock.mono(),
            first_token: None,
            room: room.clone(),
        };
        let mut state = self.0.state.lock();
        state.busy += 1;
        state.digest.toggle(key.0, key.1);
        state.lanes.insert(key, lane);
        Emitter::new(self.clone(), key, room, clock)
    }

    /// Takes what is ready for `carrier`, up to about `max_bytes`; attempts that `skip` names
    /// stay. `None` when nothing is ready.
    pub fn take(
        &self,
        carrier: u64,
        max_bytes: usize,
        mut skip: impl FnMut(Key) -> bool,
    ) -> Option<Batch> {
        let state = &mut *self.0.state.lock();
        if carrier != state.carrier {
            return None;
        }
        let mut batch = Batch::default();
        let mut left = max_bytes;
        for _ in 0..state.ready.len() {
            let Some(key) = state.ready.pop_front() else { break };
            let Some(lane) = state.lanes.get_mut(&key) else { continue };
            if skip(key) {
                state.ready.push_back(key);
                continue;
            }
            let (lease, taken) = lane.take(key, left);
            left = left.saturating_sub(taken);
            if !lease.events.is_empty() || lease.finish.is_some() {
                batch.leases.push(lease);
            }
            lane.ready = lane.has_unsent();
            if lane.ready {
                state.ready.push_back(key);
            }
            if left == 0 {
                break;
            }
        }
        if batch.leases.is_empty() {
            return None;
        }
        if state.credits_due && batch.leases.iter().any(|lease| lease.finish.is_some()) {
            batch.credits = Some(state.credits());
        }
        Some(batch)
    }

    /// Whether something is ready that `skip` does not name; else `waker` is woken when
    /// something may be.
    pub fn poll_ready(&self, waker: &Waker, mut skip: impl FnMut(Key) -> bool) -> bool {
        self.0.carrier.register(waker);
        let state = self.0.state.lock();
        let unsent = |key: &Key| state.lanes.get(key).is_some_and(Lane::has_unsent);
        state.ready.iter().any(|key| unsent(key) && !skip(*key))
    }

    /// Whether `carrier` is the present one.
    pub fn is_carrier(&self, carrier: u64) -> bool {
        self.0.state.lock().carrier == carrier
    }

    /// Ends an attempt with what the server shall be told; its slot is free. Without
    /// effect when the attempt is not held or has ended.
    pub fn finish(&self, key: Key, mut finish: pb::Finish, now: Mono) {
        let mut state = self.0.state.lock();
        let Some(lane) = state.lanes.get_mut(&key).filter(|lane| lane.finish.is_none()) else {
            return;
        };
        let usage = finish.usage.get_or_insert_default();
        usage.execution_time = now.since(lane.begun).try_into().ok();
        usage.time_to_first_token =
            lane.first_token.and_then(|first| first.since(lane.begun).try_into().ok());
        lane.finish = Some(finish);
        state.busy = state.busy.saturating_sub(1);
        state.credits_due = true;
        state.mark_ready(key);
        drop(state);
        self.0.carrier.wake();
    }

    /// Forgets an attempt. Its slot stays taken until [`free`](Self::free) when it had not
    /// finished: its engine may still be stopping. Returns whether that is so.
    pub fn forget(&self, key: Key) -> bool {
        let mut state = self.0.state.lock();
        let Some(lane) = state.lanes.remove(&key) else { return false };
        state.digest.toggle(key.0, key.1);
        lane.room.notify_one();
        lane.finish.is_none()
    }

    /// Frees the slot of an attempt that was forgotten while its engine ran.
    pub fn free(&self) {
        let mut state = self.0.state.lock();
        state.busy = state.busy.saturating_sub(1);
    }

    /// Events up to `index` are on stable storage.
    pub fn ack(&self, key: Key, index: u64) {
        let mut state = self.0.state.lock();
        let Some(lane) = state.lanes.get_mut(&key) else { return };
        while lane.first <= index {
            let Some((_, bytes)) = lane.kept.pop_front() else { break };
            lane.bytes -= bytes;
            lane.first += 1;
        }
        lane.cursor = lane.cursor.max(lane.first);
        lane.room.notify_one();
    }

    /// Sends again from `index`. False when the server wants what was given up, so that
    /// the attempt cannot go on.
    #[must_use]
    pub fn resend(&self, key: Key, index: u64) -> bool {
        let mut state = self.0.state.lock();
        let Some(lane) = state.lanes.get_mut(&key) else { return true };
        if index < lane.first {
            return false;
        }
        lane.cursor = index.min(lane.next_index());
        lane.finish_sent = false;
        state.mark_ready(key);
        drop(state);
        self.0.carrier.wake();
        true
    }

    /// Sends again what is kept of an attempt.
    pub fn resend_kept(&self, key: Key) {
        let mut state = self.0.state.lock();
        if let Some(lane) = state.lanes.get_mut(&key) {
            lane.cursor = lane.first;
            lane.finish_sent = false;
        }
        state.mark_ready(key);
        drop(state);
        self.0.carrier.wake();
    }

    /// A new carrier begins, in place of the one before: everything unacknowledged is sent
    /// again.
    pub fn new_carrier(&self) -> u64 {
        let mut state = self.0.state.lock();
        state.carrier += 1;
        let carrier = state.carrier;
        let keys: Vec<Key> = state.lanes.keys().copied().collect();
        for key in keys {
            if let Some(lane) = state.lanes.get_mut(&key) {
                lane.cursor = lane.first;
                lane.finish_sent = false;
            }
            state.mark_ready(key);
        }
        drop(state);
        self.0.carrier.wake();
        carrier
    }

    /// Bounds each attempt's unacknowledged bytes.
    pub fn set_limit(&self, bytes: u64) {
        let mut state = self.0.state.lock();
        state.limit = usize::try_from(bytes).unwrap_or(usize::MAX).max(OVERHEAD);
        for lane in state.lanes.values() {
            lane.room.notify_one();
        }
    }

    /// Whether slots that are free are offered.
    pub fn set_accepting(&self, accepting: bool) {
        self.0.state.lock().accepting = accepting;
    }

    /// An Assign with this seq was seen.
    pub fn saw_assign(&self, seq: u64) {
        self.0.state.lock().as_of = seq;
    }

    /// A new announcement of credits.
    pub fn credits(&self) -> pb::Credits {
        self.0.state.lock().credits()
    }

    /// Starts the announcements of a new session.
    pub fn new_session(&self) {
        let mut state = self.0.state.lock();
        state.as_of = 0;
    }

    /// Slots that are free, offered or not.
    pub fn free_slots(&self) -> u32 {
        let state = self.0.state.lock();
        state.slots.saturating_sub(state.busy)
    }

    /// Whether an attempt is held.
    pub fn holds(&self, key: Key) -> bool {
        self.0.state.lock().lanes.contains_key(&key)
    }

    /// Number and digest of the attempts held.
    pub fn digest(&self) -> (u32, u64) {
        let state = self.0.state.lock();
        (u32::try_from(state.lanes.len()).unwrap_or(u32::MAX), state.digest.0)
    }

    /// Whether no attempt is held.
    pub fn is_empty(&self) -> bool {
        self.0.state.lock().lanes.is_empty()
    }

    /// The attempts held, in the order of their tasks.
    pub fn inventory(&self) -> Vec<Held> {
        let state = self.0.state.lock();
        let mut held: Vec<Held> = state
            .lanes
            .iter()
            .map(|(key, lane)| Held {
                key: *key,
                last_index: lane.next_index() - 1,
                first_kept: lane.first,
                finished: lane.finish.is_some(),
            })
            .collect();
        held.sort_unstable_by_key(|held| held.key);
        held
    }

    /// The credential for calls that concern an attempt.
    pub fn token(&self, key: Key) -> Option<String> {
        self.0.state.lock().lanes.get(&key).map(|lane| lane.token.clone())
    }

    /// Appends an event; the attempt's buffer being full gives it back.
    pub(super) fn push(
        &self,
        key: Key,
        mut event: pb::RunnerEvent,
        bytes: usize,
        now: Mono,
    ) -> Result<Option<pb::RunnerEvent>, Stopped> {
        let mut state = self.0.state.lock();
        let limit = state.limit;
        let lane = state.lanes.get_mut(&key).filter(|lane| lane.finish.is_none()).ok_or(Stopped)?;
        if lane.bytes > 0 && lane.bytes + bytes > limit {
            return Ok(Some(event));
        }
        if lane.first_token.is_none() && matches!(event.body, Some(Body::Token(_))) {
            lane.first_token = Some(now);
        }
        event.elapsed_us = u64::try_from(now.since(lane.begun).as_micros()).unwrap_or(u64::MAX);
        lane.bytes += bytes;
        lane.kept.push_back((event, bytes));
        let wake = !lane.ready;
        if wake {
            state.mark_ready(key);
        }
        drop(state);
        if wake {
            self.0.carrier.wake();
        }
        Ok(None)
    }
}

#[cfg(test)]
#[path = "outbox_tests.rs"]
mod tests;
