//! The runner protocol's bookkeeping, pure and shared by server and agent: numbered control
//! messages with acknowledgement and resend, credits, the digest of attempts held, version
//! negotiation and backoff. It knows neither streams nor time; the head of `runners.proto` is
//! its law.

use std::{collections::VecDeque, ops::RangeInclusive, time::Duration};

use sha2::{Digest, Sha256};

use crate::id::TaskId;

/// Protocol versions that this build speaks.
pub const VERSIONS: RangeInclusive<u32> = 1..=1;

/// What one side understands beyond the protocol's first release; the head of `runners.proto`
/// says what each means.
pub mod feature {
    /// Models are loaded and unloaded by command.
    pub const APPLY: &str = "apply";
    /// What is loaded is loaded anew by command.
    pub const RELOAD: &str = "reload";
    /// Parameters of the engine are set by command.
    pub const TUNE: &str = "tune";
    /// What the runner offers is told when it changes.
    pub const OFFER: &str = "offer";
    /// Commands tell how far they are.
    pub const PROGRESS: &str = "progress";
    /// The end of a cancelled attempt is told.
    pub const STOPPED: &str = "stopped";

    /// All that this build understands.
    pub const ALL: [&str; 6] = [APPLY, RELOAD, TUNE, OFFER, PROGRESS, STOPPED];
}

/// The newest version that both sides speak; `None` when there is none.
pub fn negotiate(peer_min: u32, peer_max: u32) -> Option<u32> {
    let newest = peer_max.min(*VERSIONS.end());
    (newest >= peer_min && newest >= *VERSIONS.start()).then_some(newest)
}

/// Control messages of one side: numbered from 1, kept until acknowledged, handed out in order
/// to whatever stream there is, and again after a reconnect.
#[derive(Debug)]
pub struct Outbox<T> {
    /// Seq of the first of `kept`.
    first: u64,
    kept: VecDeque<T>,
    /// Seq that the present stream gets next.
    cursor: u64,
}

impl<T> Default for Outbox<T> {
    fn default() -> Self {
        Self { first: 1, kept: VecDeque::new(), cursor: 1 }
    }
}

impl<T> Outbox<T> {
    /// Appends a message and returns its seq.
    pub fn push(&mut self, message: T) -> u64 {
        self.kept.push_back(message);
        self.last_seq()
    }

    /// The next message for the present stream, with its seq.
    pub fn next_unsent(&mut self) -> Option<(u64, &T)> {
        let seq = self.cursor;
        let message = self.kept.get(usize::try_from(seq - self.first).ok()?)?;
        self.cursor += 1;
        Some((seq, message))
    }

    /// Whether the present stream has something to send.
    pub fn has_unsent(&self) -> bool {
        self.cursor <= self.last_seq()
    }

    /// Forgets everything up to `seq`. Numbers that were acknowledged before or never given are
    /// without effect.
    pub fn ack(&mut self, seq: u64) {
        let seq = seq.min(self.last_seq());
        while self.first <= seq {
            self.kept.pop_front();
            self.first += 1;
        }
        self.cursor = self.cursor.max(self.first);
    }

    /// A new stream begins: everything unacknowledged is sent again.
    pub fn rewind(&mut self) {
        self.cursor = self.first;
    }

    /// Highest seq given out; 0 before the first.
    pub fn last_seq(&self) -> u64 {
        self.first + self.kept.len() as u64 - 1
    }

    /// Highest seq that the peer acknowledged.
    pub fn acked_seq(&self) -> u64 {
        self.first - 1
    }

    /// Messages kept, oldest first, with their seq.
    pub fn unacked(&self) -> impl Iterator<Item = (u64, &T)> {
        (self.first..).zip(&self.kept)
    }

    /// Number of messages kept.
    pub fn n_unacked(&self) -> usize {
        self.kept.len()
    }
}

/// What to do with a message that arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// Process it.
    New,
    /// It was processed before.
    Duplicate,
    /// It carries no number: process it; it is never resent.
    Unnumbered,
    /// The peer skipped a number: end the stream, so that it resends.
    Missing {
        /// Seq that should have come.
        expected: u64,
    },
}

/// The receiving side: knows what was processed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Inbox {
    last: u64,
}

impl Inbox {
    /// Judges a message by its seq.
    pub fn receive(&mut self, seq: u64) -> Received {
        match seq {
            0 => Received::Unnumbered,
            seq if seq <= self.last => Received::Duplicate,
            seq if seq == self.last + 1 => {
                self.last = seq;
                Received::New
            }
            _ => Received::Missing { expected: self.last + 1 },
        }
    }

    /// Highest seq processed: what `ack` says to the peer.
    pub fn last(&self) -> u64 {
        self.last
    }
}

/// The server's account of a runner's credits: what was announced last, less the Assigns that
/// the announcement had not seen.
#[derive(Debug, Default)]
pub struct Credits {
    announced: Option<u64>,
    free: u32,
    /// Seqs of Assigns that no announcement has seen.
    unseen: VecDeque<u64>,
}

impl Credits {
    /// Takes an announcement; false when a newer one was seen.
    pub fn announce(&mut self, revision: u64, free_slots: u32, as_of_seq: u64) -> bool {
        if self.announced.is_some_and(|seen| revision <= seen) {
            return false;
        }
        self.announced = Some(revision);
        self.free = free_slots;
        while self.unseen.front().is_some_and(|seq| *seq <= as_of_seq) {
            self.unseen.pop_front();
        }
        true
    }

    /// Counts an Assign that was given the number `seq`.
    pub fn assigned(&mut self, seq: u64) {
        self.unseen.push_back(seq);
    }

    /// Attempts that the runner would take now.
    pub fn available(&self) -> u32 {
        self.free.saturating_sub(u32::try_from(self.unseen.len()).unwrap_or(u32::MAX))
    }
}

/// Digest of a set of attempts: order does not matter, and adding twice removes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HeldDigest(pub u64);

impl HeldDigest {
    /// Adds an attempt, or removes it.
    pub fn toggle(&mut self, task: TaskId, attempt: u32) {
        let hash = Sha256::digest(format!("{task}:{attempt}"));
        let mut first = [0; 8];
        first.copy_from_slice(&hash[..8]);
        self.0 ^= u64::from_be_bytes(first);
    }
}

impl FromIterator<(TaskId, u32)> for HeldDigest {
    fn from_iter<I: IntoIterator<Item = (TaskId, u32)>>(held: I) -> Self {
        let mut digest = Self::default();
        for (task, attempt) in held {
            digest.toggle(task, attempt);
        }
        digest
    }
}

/// Full-jitter backoff: each wait is random between nothing and a bound that doubles up to a cap.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    initial: Duration,
    max: Duration,
    n_failures: u32,
}

impl Backoff {
    /// A backoff whose first bound is `initial` and whose last is `max`.
    pub fn new(initial: Duration, max: Duration) -> Self {
        Self { initial, max, n_failures: 0 }
    }

    /// The wait after one more failure; `unit` is random in `0..1`.
    pub fn next(&mut self, unit: f64) -> Duration {
        let bound =
            self.initial.saturating_mul(1_u32.checked_shl(self.n_failures).unwrap_or(u32::MAX));
        self.n_failures = (self.n_failures + 1).min(31);
        bound.min(self.max).mul_f64(unit.clamp(0.0, 1.0))
    }

    /// Starts over, after a success.
    pub fn reset(&mut self) {
        self.n_failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;

    #[derive(Clone, Debug)]
    enum Step {
        /// The sender has something to say.
        Push,
        /// The sender writes one message to the stream.
        Write,
        /// The link delivers one message, perhaps twice.
        Deliver { twice: bool },
        /// The receiver's ack reaches the sender.
        Ack,
        /// The link breaks: what is under way is lost; Hello and Welcome exchange acks.
        Reconnect,
        /// The same, and the ack is an old one.
        ReconnectWithStaleAck,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => Just(Step::Push),
            4 => Just(Step::Write),
            4 => any::<bool>().prop_map(|twice| Step::Deliver { twice }),
            2 => Just(Step::Ack),
            1 => Just(Step::Reconnect),
            1 => Just(Step::ReconnectWithStaleAck),
        ]
    }

    proptest! {
        #[test]
        fn every_control_message_arrives_exactly_once_in_order(
            steps in prop::collection::vec(step(), 0..400),
        ) {
            let mut outbox = Outbox::default();
            let mut inbox = Inbox::default();
            let mut link: VecDeque<(u64, u64)> = VecDeque::new();
            let mut delivered = Vec::new();
            let mut pushed = 0_u64;
            let mut receive = |inbox: &mut Inbox, (seq, value): (u64, u64)| {
                match inbox.receive(seq) {
                    Received::New => delivered.push(value),
                    Received::Duplicate => {}
                    other => panic!("an ordered link gave {other:?}"),
                }
            };
            let mut stale = 0;
            for step in steps {
                match step {
                    Step::Push => {
                        pushed += 1;
                        prop_assert_eq!(outbox.push(pushed), pushed);
                    }
                    Step::Write => {
                        link.extend(outbox.next_unsent().map(|(seq, value)| (seq, *value)));
                    }
                    Step::Deliver { twice } => {
                        if let Some(message) = link.pop_front() {
                            receive(&mut inbox, message);
                            if twice {
                                receive(&mut inbox, message);
                            }
                        }
                    }
                    Step::Ack => {
                        stale = inbox.last();
                        outbox.ack(inbox.last());
                    }
                    Step::Reconnect => {
                        link.clear();
                        outbox.ack(inbox.last());
                        outbox.rewind();
                    }
                    Step::ReconnectWithStaleAck => {
                        link.clear();
                        outbox.ack(stale);
                        outbox.rewind();
                    }
                }
                prop_assert!(outbox.acked_seq() <= inbox.last());
            }
            link.clear();
            outbox.rewind();
            while let Some((seq, value)) = outbox.next_unsent() {
                receive(&mut inbox, (seq, *value));
            }
            outbox.ack(inbox.last());
            prop_assert_eq!(delivered, (1..=pushed).collect::<Vec<_>>());
            prop_assert_eq!(outbox.n_unacked(), 0);
        }

        #[test]
        fn credits_never_exceed_what_the_runner_can_take(
            // Each step: the server assigns (true) or the runner sees what is under way,
            // perhaps finishing some, and announces.
            steps in prop::collection::vec((any::<bool>(), 0_u32..4, any::<bool>()), 0..200),
            slots in 1_u32..8,
        ) {
            let mut credits = Credits::default();
            let (mut seq, mut seen, mut held, mut revision) = (0_u64, 0_u64, 0_u32, 1_u64);
            let mut late: Option<(u64, u32, u64)> = None;
            prop_assert!(credits.announce(revision, slots, 0));
            for (assign, finish, delay) in steps {
                if assign {
                    if credits.available() > 0 {
                        seq += 1;
                        credits.assigned(seq);
                    }
                } else {
                    held += u32::try_from(seq - seen).unwrap();
                    seen = seq;
                    held -= finish.min(held);
                    revision += 1;
                    let now = (revision, slots - held, seen);
                    let first = if delay { late.replace(now) } else { Some(now) };
                    if let Some((revision, free, as_of)) = first {
                        credits.announce(revision, free, as_of);
                    }
                    if !delay && let Some((old, free, as_of)) = late.take() {
                        prop_assert!(!credits.announce(old, free, as_of));
                    }
                }
                let under_way = u32::try_from(seq - seen).unwrap();
                prop_assert!(held + under_way + credits.available() <= slots);
            }
        }
    }

    #[test]
    fn a_skipped_number_is_noticed_and_changes_nothing() {
        let mut inbox = Inbox::default();
        assert_eq!(inbox.receive(1), Received::New);
        assert_eq!(inbox.receive(3), Received::Missing { expected: 2 });
        assert_eq!(inbox.receive(2), Received::New);
        assert_eq!(inbox.receive(0), Received::Unnumbered);
        assert_eq!(inbox.last(), 2);
    }

    #[test]
    fn an_ack_of_what_was_never_sent_is_without_effect() {
        let mut outbox = Outbox::default();
        outbox.push('a');
        outbox.ack(u64::MAX);
        assert_eq!((outbox.acked_seq(), outbox.push('b')), (1, 2));
        assert_eq!(outbox.next_unsent(), Some((2, &'b')));
    }

    #[test]
    fn versions_meet_at_the_newest_common_one() {
        assert_eq!(negotiate(1, 1), Some(1));
        assert_eq!(negotiate(0, 9), Some(1));
        assert_eq!(negotiate(2, 9), None);
        assert_eq!(negotiate(0, 0), None);
        assert_eq!(negotiate(5, 1), None);
    }

    #[test]
    fn the_digest_is_of_the_set() {
        let (a, b) = (TaskId(Uuid::from_u128(1)), TaskId(Uuid::from_u128(2)));
        let set: HeldDigest = [(a, 1), (b, 1)].into_iter().collect();
        assert_eq!(set, [(b, 1), (a, 1)].into_iter().collect());
        assert_ne!(set, [(a, 2), (b, 1)].into_iter().collect());
        assert_eq!(HeldDigest::from_iter([]), HeldDigest(0));
        // Of `printf 00000000-0000-0000-0000-000000000001:1 | sha256sum`.
        assert_eq!([(a, 1)].into_iter().collect::<HeldDigest>(), HeldDigest(0x52af_f933_662a_757c));
    }

    #[test]
    fn backoff_doubles_to_its_cap_and_starts_over() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(1));
        let bounds: Vec<_> = (0..5).map(|_| backoff.next(1.0).as_millis()).collect();
        assert_eq!(bounds, [100, 200, 400, 800, 1000]);
        assert!((0..100).all(|_| backoff.next(1.0) <= Duration::from_secs(1)));
        backoff.reset();
        assert_eq!(backoff.next(0.5), Duration::from_millis(50));
    }
}
