//! Logs that are made on another server.

use std::{
    collections::VecDeque,
    sync::Arc,
    task::{Context, Poll, Waker},
};

use bytes::Bytes;
use futures_util::FutureExt as _;

use super::*;

const TASK: TaskId = TaskId::MIN;

fn frames(sequences: impl IntoIterator<Item = u64>) -> Vec<(u64, Bytes)> {
    sequences.into_iter().map(|sequence| (sequence, Bytes::from(sequence.to_string()))).collect()
}

/// What a reader finds now; the sequences of frames.
fn poll(reader: &mut Subscriber) -> Poll<(Ready, Vec<u64>)> {
    let mut out = VecDeque::new();
    let ready = reader.poll_fill(&mut Context::from_waker(Waker::noop()), &mut out, false);
    ready.map(|ready| (ready, out.into_iter().map(|entry| entry.sequence).collect()))
}

fn append(log: &Arc<Log>, first: u64, count: usize) -> Result<Appended, Refused> {
    log.append(1, first, count, |_, sequence, _, buffer| {
        buffer.extend_from_slice(sequence.to_string().as_bytes());
        Encoded::Token
    })
}

#[test]
fn frames_that_were_lost_on_the_way_leave_no_hole() {
    let log = Relay::default().open(TASK);
    let mut reader = log.subscribe(2);
    assert!(log.start_at(2));
    assert!(!log.start_at(9));
    assert_eq!(poll(&mut reader), Poll::Pending);
    log.feed(3, &frames(3..=4));
    // Twice, and in part.
    log.feed(2, &frames(2..=5));
    assert_eq!(poll(&mut reader), Poll::Ready((Ready::Frames, vec![3, 4, 5])));
    log.feed(8, &frames(8..=9));
    assert_eq!(poll(&mut reader), Poll::Ready((Ready::Behind, vec![])));
    reader.seek(7);
    assert_eq!(poll(&mut reader), Poll::Ready((Ready::Frames, vec![8, 9])));
    log.seal();
    assert_eq!(poll(&mut reader), Poll::Ready((Ready::End, vec![])));
}

#[test]
fn an_attempt_that_is_let_go_leaves_what_is_stored() {
    let log = Relay::default().open(TASK);
    log.publish(&frames(1..=2), false);
    log.begin_attempt(1, 2, 1000);
    append(&log, 1, 3).unwrap();
    let segment = log.take_unrecorded().unwrap();
    log.recorded(segment.last, 1000);
    append(&log, 4, 2).unwrap();
    let mut reader = log.subscribe(0);
    assert_eq!(poll(&mut reader), Poll::Ready((Ready::Frames, vec![1, 2, 3, 4, 5, 6, 7])));
    log.let_go(2);
    assert_eq!(poll(&mut reader), Poll::Pending, "another attempt's");
    log.let_go(1);
    assert_eq!(append(&log, 6, 1), Err(Refused::WrongAttempt));
    assert_eq!(log.take_unrecorded(), None);
    assert_eq!(poll(&mut reader), Poll::Ready((Ready::Stirred, vec![])));
    assert_eq!(poll(&mut reader), Poll::Pending);
    // What comes from elsewhere again is known already.
    log.feed(6, &frames(6..=8));
    assert_eq!(poll(&mut reader), Poll::Ready((Ready::Frames, vec![8])));
}

#[test]
fn what_was_fed_does_not_count_as_stored_when_the_attempt_comes_here() {
    let log = Relay::default().open(TASK);
    log.start_at(2);
    log.feed(3, &frames(3..=6));
    let mut reader = log.subscribe(6);
    log.resume_attempt(1, 2, 4, 2, 1000);
    assert_eq!((log.durable_index(1), log.next_index(1)), (Some(2), Some(3)));
    append(&log, 3, 3).unwrap();
    assert_eq!(poll(&mut reader), Poll::Ready((Ready::Frames, vec![7])));
}

#[test]
fn what_another_server_added_meanwhile_is_not_skipped() {
    let log = Relay::default().open(TASK);
    log.publish(&frames([1]), false);
    let mut reader = log.subscribe(1);
    // Elsewhere an attempt ran and was lost; here the next one begins.
    log.catch_up(1030);
    log.publish(&frames([1031]), false);
    assert_eq!(poll(&mut reader), Poll::Ready((Ready::Behind, vec![])));
}

#[test]
fn a_task_is_wanted_once_while_somebody_waits_and_nothing_is_made_here() {
    let relay = Relay::default();
    let log = relay.open(TASK);
    let mut reader = log.subscribe(1);
    assert_eq!(poll(&mut reader), Poll::Pending);
    relay.follow_far();
    for _ in 0..2 {
        assert_eq!(poll(&mut reader), Poll::Pending);
    }
    assert_eq!(relay.wanted().now_or_never(), Some(vec![TASK]));
    assert_eq!(relay.wanted().now_or_never(), None);
    assert!(log.is_wanted());
    log.begin_attempt(1, 1, 1000);
    assert!(!log.is_wanted());
    assert_eq!(poll(&mut reader), Poll::Pending);
    assert_eq!(relay.wanted().now_or_never(), None, "it is made here");
    log.let_go(1);
    drop(reader);
    assert!(!log.is_wanted(), "nobody reads it");
}
