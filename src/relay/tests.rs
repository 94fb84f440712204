//! Claims about the relay as a whole, against a model of the ledger and of storage.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    task::{Context, Poll, Waker},
};

use bytes::{BufMut, Bytes};
use proptest::prelude::*;
use uuid::Uuid;

use super::*;

const TASK: TaskId = TaskId(Uuid::nil());

/// So small that everything is evicted, refused and reserved all the time.
const TIGHT: Limits = Limits {
    log_bytes: 900,
    total_bytes: 700,
    unrecorded_bytes: 1_500,
    hurry_log_bytes: 300,
    hurry_bytes: 300,
    batch_bytes: 40,
};

pub(super) fn append(
    log: &Arc<Log>,
    attempt: u32,
    first: u64,
    count: usize,
) -> Result<Appended, Refused> {
    log.append(attempt, first, count, |_, sequence, token, buffer| {
        buffer.put_slice(token_text(attempt, sequence, token).as_bytes());
        if sequence % 5 == 0 { Encoded::Timeline } else { Encoded::Token }
    })
}

fn token_text(attempt: u32, sequence: u64, _token: u64) -> String {
    format!("token {sequence} of attempt {attempt}")
}

fn poll(reader: &mut Subscriber) -> Poll<(Ready, VecDeque<(u64, Bytes)>)> {
    let mut out = VecDeque::new();
    let ready = reader.poll_fill(&mut Context::from_waker(Waker::noop()), &mut out, false);
    ready.map(|ready| (ready, out.into_iter().map(|entry| (entry.sequence, entry.frame)).collect()))
}

#[derive(Clone, Debug)]
enum Op {
    Append { back: u64, count: usize },
    AppendBeyond,
    AppendStale,
    Take,
    Recorded,
    NotRecorded,
    Evict,
    Subscribe { share: u8 },
    Read { reader: usize },
    EndAttempt { commits: bool },
    Restart { runner_returns: bool, ends_at_once: bool },
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (0_u64..4, 1_usize..40).prop_map(|(back, count)| Op::Append { back, count }),
        1 => Just(Op::AppendBeyond),
        1 => Just(Op::AppendStale),
        3 => Just(Op::Take),
        3 => Just(Op::Recorded),
        1 => Just(Op::NotRecorded),
        2 => Just(Op::Evict),
        2 => any::<u8>().prop_map(|share| Op::Subscribe { share }),
        8 => (0_usize..8).prop_map(|reader| Op::Read { reader }),
        1 => any::<bool>().prop_map(|commits| Op::EndAttempt { commits }),
        1 => any::<(bool, bool)>().prop_map(|(runner_returns, ends_at_once)| {
            Op::Restart { runner_returns, ends_at_once }
        }),
    ]
}

/// A reader with what it has seen last.
struct Reader {
    inner: Subscriber,
    ended: bool,
}

/// The ledger and storage around one log.
struct World {
    relay: Relay,
    log: Arc<Log>,
    attempt: u32,
    base: u64,
    reserved: u64,
    /// What is on stable storage.
    stored: BTreeMap<u64, Bytes>,
    /// First sequence of each lost range by its last.
    gaps: BTreeMap<u64, u64>,
    /// Everything that anybody was ever shown.
    shown: BTreeMap<u64, Bytes>,
    taken: Option<SegmentData>,
    readers: Vec<Reader>,
}

impl World {
    fn new() -> Self {
        let relay = Relay::new(TIGHT);
        let mut world = Self {
            log: relay.open(TASK),
            relay,
            attempt: 0,
            base: 0,
            reserved: 0,
            stored: BTreeMap::new(),
            gaps: BTreeMap::new(),
            shown: BTreeMap::new(),
            taken: None,
            readers: Vec::new(),
        };
        world.commit(1, "queued", false);
        world.start();
        world
    }

    fn head(&self) -> u64 {
        self.log.head().unwrap_or(0)
    }

    fn durable(&self) -> u64 {
        *self.stored.last_key_value().unwrap().0
    }

    /// Commits an entry of the server and publishes it.
    fn commit(&mut self, sequence: u64, text: &str, end: bool) {
        let frame = Bytes::from(format!("{text} {sequence}"));
        self.stored.insert(sequence, frame.clone());
        self.log.publish(&[(sequence, frame.clone())], end);
        // Publishing twice changes nothing.
        self.log.publish(&[(sequence, frame)], end);
    }

    fn start(&mut self) {
        self.attempt += 1;
        self.base = self.durable() + 1;
        self.reserved = self.base + 30;
        self.commit(self.base, "started", false);
        self.log.begin_attempt(self.attempt, self.base, self.reserved);
    }

    fn store(&mut self, segment: &SegmentData) {
        let frames: Vec<Bytes> = frames(segment.frames.clone()).map(Option::unwrap).collect();
        assert_eq!(frames.len() as u64, segment.last + 1 - segment.first);
        for (sequence, frame) in (segment.first..).zip(frames) {
            if let Some(before) = self.stored.insert(sequence, frame.clone()) {
                assert_eq!(before, frame, "stored bytes never change");
            }
            let on_timeline = segment.timeline.iter().any(|(listed, _)| *listed == sequence);
            assert_eq!(on_timeline, sequence % 5 == 0);
        }
        assert!(self.stored.keys().all(|sequence| *sequence <= self.reserved.max(self.base)));
    }

    fn end_attempt(&mut self, commits: bool, last: bool) {
        let frozen = self.log.freeze(self.attempt);
        assert_eq!(frozen, self.log.freeze(self.attempt), "freezing twice is freezing once");
        assert_eq!(append(&self.log, self.attempt, 1, 1), Err(Refused::Frozen));
        assert_eq!(self.log.take_unrecorded(), None);
        if !commits {
            self.log.thaw(self.attempt);
            return;
        }
        if let Some(rest) = &frozen.rest {
            self.store(rest);
        }
        let mut head = frozen.head;
        if let Some(in_doubt) = frozen.in_doubt {
            self.gaps.insert(in_doubt, head + 1);
            self.commit(in_doubt, "gap", false);
            head = in_doubt;
        }
        if last {
            self.commit(head + 1, "ended", true);
        } else {
            self.commit(head + 1, "queued", false);
            self.start();
        }
    }

    /// A crash: what is not stored is gone, and readers come back with what they have.
    fn restart(&mut self, runner_returns: bool, ends_at_once: bool) {
        let cursors: Vec<u64> = self.readers.iter().map(|reader| reader.inner.cursor()).collect();
        let sent = self.log.next_index(self.attempt).unwrap() - 1;
        self.readers.clear();
        self.taken = None;
        self.relay = Relay::new(TIGHT);
        self.log = self.relay.open(TASK);
        self.readers = cursors.into_iter().map(|cursor| self.reader(cursor)).collect();
        let durable = self.durable();
        self.log.resume_attempt(self.attempt, self.base, durable, 0, self.reserved);
        if runner_returns {
            self.log.settle(self.attempt, sent);
            if ends_at_once {
                // Before the runner has sent again what readers may have seen.
                self.end_attempt(true, false);
                return;
            }
            let mut next = self.log.next_index(self.attempt).unwrap();
            while next <= sent {
                let count = (sent + 1 - next) as usize;
                let appended = append(&self.log, self.attempt, next, count).unwrap();
                next = appended.next_index;
                self.take();
                self.recorded();
            }
            assert_eq!(self.log.freeze(self.attempt).in_doubt, None);
            self.log.thaw(self.attempt);
        } else {
            self.end_attempt(true, false);
        }
    }

    fn reader(&self, after: u64) -> Reader {
        Reader { inner: self.log.subscribe(after), ended: false }
    }

    /// A reader that comes with a share of the stream behind it.
    fn subscribe(&mut self, share: u8) {
        let after = self.head() * u64::from(share) / 255;
        // A reader cannot have stopped inside of a lost range.
        let inside = self.gaps.iter().find(|(last, first)| (**first..**last).contains(&after));
        let after = inside.map_or(after, |(_, first)| first - 1);
        self.readers.push(self.reader(after));
    }

    fn take(&mut self) {
        match &self.taken {
            None => self.taken = self.log.take_unrecorded(),
            Some(taken) if taken.attempt == self.attempt => {
                assert_eq!(self.log.take_unrecorded(), None, "one segment at a time");
            }
            // The recorder asks nothing before it knows the fate of what it took.
            Some(_) => {}
        }
    }

    fn recorded(&mut self) {
        let Some(segment) = self.taken.take() else { return };
        if segment.attempt == self.attempt {
            self.reserved = self.reserved.max(segment.reserve_to.unwrap_or(0));
            self.store(&segment);
        }
        self.log.recorded(segment.last, segment.reserve_to.unwrap_or(0));
    }

    fn read(&mut self, which: usize) -> bool {
        let bound = self.reserved.max(self.durable());
        let Some(reader) = self.readers.get_mut(which) else { return false };
        let before = reader.inner.cursor();
        let mut entries: Vec<(u64, Bytes)> = Vec::new();
        match poll(&mut reader.inner) {
            Poll::Pending => return false,
            Poll::Ready((Ready::Frames, frames)) => entries.extend(frames),
            Poll::Ready((Ready::End, _)) => reader.ended = true,
            Poll::Ready((Ready::Behind | Ready::Stirred, _)) => {
                let stored = self.stored.range(before + 1..).take(3);
                entries.extend(stored.map(|(sequence, frame)| (*sequence, frame.clone())));
                assert!(!entries.is_empty(), "storage has what memory has not");
            }
        }
        let mut cursor = before;
        for (sequence, frame) in entries {
            let first = self.gaps.get(&sequence).copied().unwrap_or(sequence);
            assert!(first <= cursor + 1 && sequence > cursor, "{cursor} then {sequence}");
            assert!(sequence <= bound, "not reserved");
            let shown = self.shown.entry(sequence).or_insert_with(|| frame.clone());
            assert_eq!(*shown, frame, "bytes once shown never change");
            cursor = sequence;
        }
        reader.inner.seek(cursor);
        assert_eq!(reader.inner.cursor(), cursor);
        !reader.ended
    }

    fn apply(&mut self, op: &Op) {
        match *op {
            Op::Append { back, count } => {
                let next = self.log.next_index(self.attempt).unwrap();
                let first = next.saturating_sub(back).max(1);
                let appended = append(&self.log, self.attempt, first, count).unwrap();
                assert!(appended.accepted <= count);
                assert!(appended.next_index >= next);
                assert_eq!(
                    appended.next_index.max(first + appended.accepted as u64),
                    appended.next_index
                );
                assert!(self.head() <= self.reserved.max(self.base));
            }
            Op::AppendBeyond => {
                let expected_index = self.log.next_index(self.attempt).unwrap();
                let refused = append(&self.log, self.attempt, expected_index + 1, 1);
                assert_eq!(refused, Err(Refused::Missing { expected_index }));
            }
            Op::AppendStale => {
                for attempt in [self.attempt - 1, self.attempt + 1] {
                    assert_eq!(append(&self.log, attempt, 1, 1), Err(Refused::WrongAttempt));
                }
            }
            Op::Take => self.take(),
            Op::Recorded => self.recorded(),
            Op::NotRecorded => {
                if let Some(segment) = self.taken.take() {
                    self.log.not_recorded(segment.last);
                    assert!(!self.relay.dirty().is_empty());
                }
            }
            Op::Evict => self.relay.evict(),
            Op::Subscribe { share } => {
                if self.readers.len() < 8 {
                    self.subscribe(share);
                }
            }
            Op::Read { reader } => {
                self.read(reader);
            }
            Op::EndAttempt { commits } => self.end_attempt(commits, false),
            Op::Restart { runner_returns, ends_at_once } => {
                self.restart(runner_returns, ends_at_once);
            }
        }
    }

    fn finish(mut self) {
        self.readers.push(self.reader(0));
        self.end_attempt(true, true);
        let end = self.durable();
        // Whoever comes after the seal gets the rest as well, whatever memory has of it.
        for share in [0, 60, 128, 250, 255] {
            self.subscribe(share);
            self.relay.evict();
        }
        for which in 0..self.readers.len() {
            while self.read(which) {}
            assert!(self.readers[which].ended, "a sealed log ends for every reader");
            assert_eq!(self.readers[which].inner.cursor(), end);
        }
        self.taken = None;
        self.readers.clear();
        self.log = Relay::new(TIGHT).open(TASK);
        self.relay.dirty();
        self.relay.evict();
        assert_eq!(self.relay.stats(), Stats::default(), "nothing is left behind");
    }
}

proptest! {
    #[test]
    fn whatever_happens_every_reader_gets_the_same_contiguous_entries(
        ops in prop::collection::vec(op(), 0..120),
    ) {
        let mut world = World::new();
        for op in &ops {
            world.apply(op);
        }
        world.finish();
    }
}

fn running() -> (Relay, Arc<Log>) {
    let relay = Relay::new(TIGHT);
    let log = relay.open(TASK);
    log.publish(&[(1, "queued".into()), (2, "started".into())], false);
    log.begin_attempt(1, 2, 10_000);
    (relay, log)
}

pub(super) fn record(log: &Arc<Log>) -> usize {
    let Some(segment) = log.take_unrecorded() else { return 0 };
    log.recorded(segment.last, segment.reserve_to.unwrap_or(0));
    segment.frames.len()
}

#[test]
fn doubled_events_are_skipped_and_missing_ones_refused() {
    let (_relay, log) = running();
    assert_eq!(append(&log, 1, 1, 3), Ok(Appended { next_index: 4, accepted: 3 }));
    assert_eq!(append(&log, 1, 1, 3), Ok(Appended { next_index: 4, accepted: 3 }));
    assert_eq!(append(&log, 1, 2, 4), Ok(Appended { next_index: 6, accepted: 4 }));
    assert_eq!(append(&log, 1, 7, 1), Err(Refused::Missing { expected_index: 6 }));
    assert_eq!(log.head(), Some(7));
}

#[test]
fn a_reader_that_reads_nothing_costs_bounded_memory_and_resumes() {
    let (relay, log) = running();
    let mut idle = log.subscribe(0);
    let mut next = 1;
    for _ in 0..2_000 {
        next = append(&log, 1, next, 4).unwrap().next_index;
        record(&log);
        assert!(relay.stats().bytes <= TIGHT.log_bytes + 4 * 200);
    }
    assert_eq!(poll(&mut idle), Poll::Ready((Ready::Behind, VecDeque::new())));
    idle.seek(next + 1);
    let Poll::Pending = poll(&mut idle) else { panic!("the cursor is at the head") };
    append(&log, 1, next, 1).unwrap();
    let Poll::Ready((Ready::Frames, frames)) = poll(&mut idle) else { panic!("woken") };
    assert_eq!(frames[0].0, next + 2);
}

#[test]
fn a_log_that_storage_does_not_take_takes_no_more_until_it_does() {
    let (relay, log) = running();
    let mut next = 1;
    loop {
        let appended = append(&log, 1, next, 10).unwrap();
        next = appended.next_index;
        if appended.accepted < 10 {
            break;
        }
    }
    assert!(relay.stats().unrecorded_bytes < TIGHT.unrecorded_bytes + 200);
    assert_eq!(append(&log, 1, next, 1).unwrap().accepted, 0);
    assert_eq!(relay.dirty().len(), 1);
    assert!(record(&log) > 0);
    assert_eq!(relay.stats().unrecorded_bytes, 0);
    assert_eq!(log.durable_index(1), Some(next - 1));
    assert_eq!(append(&log, 1, next, 1).unwrap().accepted, 1);
}

#[test]
fn nothing_is_shown_beyond_the_reservation() {
    let (relay, log) = running();
    log.publish(&[(3, "queued".into()), (4, "started".into())], false);
    log.begin_attempt(2, 4, 4);
    assert_eq!(append(&log, 2, 1, 5), Ok(Appended { next_index: 1, accepted: 0 }));
    let dirty = relay.dirty();
    let segment = dirty[0].take_unrecorded().unwrap();
    assert!(segment.frames.is_empty() && segment.last + 1 == segment.first);
    let reserve_to = segment.reserve_to.unwrap();
    assert!(reserve_to >= 4 + 1024);
    dirty[0].recorded(segment.last, reserve_to);
    assert_eq!(append(&log, 2, 1, 5).unwrap().accepted, 5);
}

#[test]
fn a_log_leaves_memory_when_nothing_is_left_to_do() {
    let (relay, log) = running();
    let reader = log.subscribe(0);
    append(&log, 1, 1, 1).unwrap();
    drop(log);
    drop(relay.dirty());
    relay.evict();
    assert_eq!(relay.stats().logs, 1, "its attempt lives");
    relay.find(TASK).unwrap().publish(&[(4, "ended".into())], true);
    relay.evict();
    assert_eq!(relay.stats().logs, 1, "it has a reader");
    drop(reader);
    relay.evict();
    assert_eq!(relay.stats(), Stats::default());
    drop(relay.open(TASK));
    relay.evict();
    assert_eq!(relay.stats(), Stats::default(), "opened, and left without a word");
}

#[tokio::test]
async fn a_large_audience_is_woken_by_the_loop() {
    let (relay, log) = running();
    let wait = |_| {
        let mut reader = log.subscribe(2);
        async move { reader.next().await }
    };
    let audience = futures_util::future::join_all((0..1_000).map(wait));
    let publish = async {
        tokio::task::yield_now().await;
        append(&log, 1, 1, 1).unwrap();
    };
    let woken = async { tokio::join!(audience, publish).0 };
    let woken = tokio::select! {
        woken = woken => woken,
        () = relay.fan_out() => unreachable!("it runs for ever"),
    };
    assert!(woken.iter().all(|next| *next == woken[0]));
}

#[tokio::test]
async fn an_acknowledgement_waits_for_storage_and_hurries_it() {
    let (relay, log) = running();
    append(&log, 1, 1, 3).unwrap();
    let recorder = async {
        relay.dirty_notified().await;
        relay.hurried().await;
        for log in relay.dirty() {
            record(&log);
        }
    };
    let (acknowledged, ()) = tokio::join!(log.durable(1, 3), recorder);
    assert_eq!(acknowledged, Ok(()));
    log.publish(&[(6, "ended".into())], true);
    assert_eq!(log.durable(1, 3).await, Err(Refused::WrongAttempt));
}
