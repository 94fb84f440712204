//! The outbox, alone.

use std::time::Duration;

use futures_util::FutureExt as _;
use proptest::prelude::*;

use super::{Emitter, Key, OVERHEAD, Outbox, Stopped};
use crate::{
    clock::{Clock, Micros},
    id::{Entropy, TaskId},
    pb::{self, finish::Outcome, runner_event::Body},
};

fn key(n: u64) -> Key {
    (TaskId::new(Micros(1_000_000), &Entropy::seeded(n)), 1)
}

fn success() -> pb::Finish {
    pb::Finish { outcome: Some(Outcome::Success(pb::Success::default())), usage: None }
}

fn say(emitter: &Emitter, text: &str) -> Option<Result<(), Stopped>> {
    emitter.token(text).now_or_never()
}

/// A lease of a message as index, texts joined, and whether it ends the attempt.
fn gist(lease: &pb::LeaseEvents) -> (u64, String, bool) {
    let text = lease.events.iter().map(|event| match &event.body {
        Some(Body::Token(text)) => text.as_str(),
        other => panic!("{other:?}"),
    });
    (lease.first_index, text.collect(), lease.finish.is_some())
}

#[test]
fn one_batch_carries_what_is_ready_of_all_attempts() {
    let outbox = Outbox::new(3);
    let clock = Clock::manual();
    let emitters: Vec<_> =
        (0..3).map(|n| outbox.begin(key(n), String::new(), clock.clone())).collect();
    for emitter in &emitters {
        say(emitter, "a").unwrap().unwrap();
    }
    say(&emitters[0], "b").unwrap().unwrap();
    outbox.finish(key(1), success(), clock.mono());
    let batch = outbox.take(0, 1 << 20, |_| false).unwrap();
    let gists: Vec<_> = batch.leases.iter().map(gist).collect();
    assert_eq!(gists, [(1, "ab".into(), false), (1, "a".into(), true), (1, "a".into(), false)]);
    assert_eq!(batch.credits.unwrap().free_slots, 1);
    assert!(outbox.take(0, 1 << 20, |_| false).is_none());
    say(&emitters[2], "c").unwrap().unwrap();
    let batch = outbox.take(0, 1 << 20, |_| false).unwrap();
    assert_eq!(gist(&batch.leases[0]), (2, "c".into(), false));
    assert!(batch.credits.is_none(), "credits travel with a Finish alone");
}

#[test]
fn batches_are_bounded_and_fair() {
    let outbox = Outbox::new(2);
    let clock = Clock::manual();
    let emitters: Vec<_> =
        (0..2).map(|n| outbox.begin(key(n), String::new(), clock.clone())).collect();
    for text in ["a", "b", "c"] {
        for emitter in &emitters {
            say(emitter, text).unwrap().unwrap();
        }
    }
    let mut gists = Vec::new();
    while let Some(batch) = outbox.take(0, 2 * (OVERHEAD + 1), |_| false) {
        gists.push(batch.leases.iter().map(gist).collect::<Vec<_>>());
    }
    assert_eq!(
        gists,
        [
            vec![(1, "ab".into(), false)],
            vec![(1, "ab".into(), false)],
            vec![(3, "c".into(), false), (3, "c".into(), false)],
        ]
    );
}

#[test]
fn a_long_token_is_cut_and_keeps_its_bytes() {
    let outbox = Outbox::new(1);
    let emitter = outbox.begin(key(1), String::new(), Clock::manual());
    let text = "\u{20ac}".repeat(50_000);
    say(&emitter, &text).unwrap().unwrap();
    let batch = outbox.take(0, usize::MAX, |_| false).unwrap();
    assert_eq!(batch.leases[0].events.len(), 3);
    assert_eq!(gist(&batch.leases[0]).1, text);
}

#[test]
fn events_tell_when_they_were_made_and_finish_what_it_took() {
    let outbox = Outbox::new(1);
    let clock = Clock::manual();
    let emitter = outbox.begin(key(1), String::new(), clock.clone());
    clock.advance(Duration::from_micros(70));
    say(&emitter, "a").unwrap().unwrap();
    clock.advance(Duration::from_micros(30));
    outbox.finish(key(1), success(), clock.mono());
    let lease = outbox.take(0, usize::MAX, |_| false).unwrap().leases.remove(0);
    assert_eq!(lease.events[0].elapsed_us, 70);
    let usage = lease.finish.unwrap().usage.unwrap();
    assert_eq!(usage.execution_time.unwrap().nanos, 100_000);
    assert_eq!(usage.time_to_first_token.unwrap().nanos, 70_000);
}

#[test]
fn an_attempt_that_is_forgotten_refuses_its_engine() {
    let outbox = Outbox::new(1);
    let emitter = outbox.begin(key(1), String::new(), Clock::manual());
    assert!(outbox.forget(key(1)), "it was running");
    assert_eq!(say(&emitter, "late"), Some(Err(Stopped)));
    assert_eq!(outbox.free_slots(), 0, "its engine may still be stopping");
    outbox.free();
    assert_eq!(outbox.free_slots(), 1);
    assert_eq!(outbox.digest(), (0, 0));
}

#[test]
fn a_carrier_that_was_superseded_gets_nothing() {
    let outbox = Outbox::new(1);
    let emitter = outbox.begin(key(1), String::new(), Clock::manual());
    say(&emitter, "a").unwrap().unwrap();
    let carrier = outbox.new_carrier();
    assert!(outbox.take(carrier - 1, usize::MAX, |_| false).is_none());
    assert!(outbox.take(carrier, usize::MAX, |_| false).is_some());
}

#[derive(Clone, Debug)]
enum Step {
    Say,
    Finish,
    /// A batch of so many bytes is taken and reaches the server, or is lost.
    Carry {
        bytes: usize,
        lost: bool,
    },
    /// The server acknowledges a share of what it has.
    Ack(prop::sample::Index),
    /// The carrier breaks.
    Break,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => Just(Step::Say),
        1 => Just(Step::Finish),
        4 => (1..200_usize, prop::bool::weighted(0.1))
            .prop_map(|(bytes, lost)| Step::Carry { bytes, lost }),
        2 => any::<prop::sample::Index>().prop_map(Step::Ack),
        1 => Just(Step::Break),
    ]
}

proptest! {
    /// A server that drops doubled events and asks for missing ones ends with every event
    /// once, whatever is lost; the buffer never holds more than its limit.
    #[test]
    fn every_event_arrives_once_in_order(steps in prop::collection::vec(step(), 0..300)) {
        let (outbox, clock, key) = (Outbox::new(1), Clock::manual(), key(1));
        outbox.set_limit(200);
        let emitter = outbox.begin(key, String::new(), clock.clone());
        let mut carrier = 0;
        let (mut said, mut has, mut finished) = (0_u64, Vec::new(), false);
        let deliver = |batch: super::Batch, has: &mut Vec<String>, finished: &mut bool| {
            for lease in batch.leases {
                if lease.first_index > has.len() as u64 + 1 {
                    assert!(outbox.resend(key, has.len() as u64 + 1));
                    continue;
                }
                let skip = has.len() - (lease.first_index as usize - 1);
                for event in lease.events.into_iter().skip(skip) {
                    let Some(Body::Token(text)) = event.body else { panic!() };
                    has.push(text);
                }
                *finished |= lease.finish.is_some();
            }
        };
        let mut ended = false;
        for step in steps {
            match step {
                Step::Say if !ended => {
                    if say(&emitter, &said.to_string()).is_some() {
                        said += 1;
                    } else {
                        let (held, ..) = outbox.digest();
                        prop_assert_eq!(held, 1);
                    }
                }
                Step::Say => {}
                Step::Finish => {
                    ended = true;
                    outbox.finish(key, success(), clock.mono());
                }
                Step::Carry { bytes, lost } => {
                    if let Some(batch) = outbox.take(carrier, bytes, |_| false)
                        && !lost
                    {
                        deliver(batch, &mut has, &mut finished);
                    }
                }
                Step::Ack(share) => outbox.ack(key, share.index(has.len() + 1) as u64),
                Step::Break => carrier = outbox.new_carrier(),
            }
            let held = &outbox.inventory()[0];
            let kept = held.last_index + 1 - held.first_kept;
            prop_assert!(kept * (OVERHEAD as u64 + 1) <= 200 + OVERHEAD as u64);
            prop_assert_eq!(held.last_index, said);
        }
        outbox.finish(key, success(), clock.mono());
        while !finished {
            carrier = outbox.new_carrier();
            while let Some(batch) = outbox.take(carrier, 64, |_| false) {
                deliver(batch, &mut has, &mut finished);
            }
        }
        prop_assert_eq!(has, (0..said).map(|n| n.to_string()).collect::<Vec<_>>());
    }
}
