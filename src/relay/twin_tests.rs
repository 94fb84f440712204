//! Claims about the second encodings that readers share.

use std::{
    collections::VecDeque,
    sync::Arc,
    task::{Context, Poll, Waker},
};

use bytes::{BufMut, Bytes};
use uuid::Uuid;

use super::*;
use crate::twin::{Twin, Variant, collect, offer};

const LIMITS: Limits = Limits {
    log_bytes: 20_000,
    total_bytes: 50_000,
    unrecorded_bytes: 100_000,
    hurry_log_bytes: 1_000,
    hurry_bytes: 1_000,
    batch_bytes: 500,
};

fn running(relay: &Relay, task: u128) -> Arc<Log> {
    let log = relay.open(TaskId(Uuid::from_u128(task)));
    log.publish(&[(1, "started".into())], false);
    log.begin_attempt(1, 1, u64::MAX);
    log
}

fn append(log: &Arc<Log>, count: usize) {
    let next = log.next_index(1).unwrap();
    let appended = log.append(1, next, count, |_, sequence, _, buffer| {
        buffer.put_slice(format!("token {sequence}").as_bytes());
        Encoded::Token
    });
    assert_eq!(appended.unwrap().accepted, count);
}

fn read(reader: &mut Subscriber, twins: bool) -> Vec<Entry> {
    let (mut all, mut out) = (Vec::new(), VecDeque::new());
    let mut cx = Context::from_waker(Waker::noop());
    while let Poll::Ready(Ready::Frames) = reader.poll_fill(&mut cx, &mut out, twins) {
        all.extend(out.drain(..));
    }
    all
}

/// Encodes as a reader does: three times the size.
fn encode(entry: &Entry) -> Bytes {
    let (mut offers, twin) = (Vec::new(), entry.twin.as_ref().expect("a twin"));
    collect(&mut offers, || offer(&entry.frame, twin, Variant::Plain));
    offers[0].encoding(|message| Some(message.repeat(3).into())).unwrap()
}

fn twins(entries: &[Entry]) -> Vec<&Arc<Twin>> {
    entries.iter().filter_map(|entry| entry.twin.as_ref()).collect()
}

#[test]
fn readers_that_want_twins_share_them_and_the_others_have_none() {
    let relay = Relay::new(LIMITS);
    let log = running(&relay, 1);
    let (mut one, mut two, mut plain) = (log.subscribe(0), log.subscribe(0), log.subscribe(0));
    append(&log, 10);
    assert_eq!(twins(&read(&mut plain, false)).len(), 0);
    let (one, two) = (read(&mut one, true), read(&mut two, true));
    assert_eq!((one.len(), two.len()), (11, 11));
    assert!(twins(&one).len() == 11 && twins(&two).len() == 11);
    assert!(twins(&one).iter().zip(twins(&two)).all(|(one, two)| Arc::ptr_eq(one, two)));
    let encoded: Vec<Bytes> = one.iter().map(encode).collect();
    assert_eq!(encoded[1], "token 2token 2token 2");
    // The very bytes, not only their like.
    assert!(two.iter().map(encode).zip(&encoded).all(|(two, one)| two.as_ptr() == one.as_ptr()));
    assert_eq!(twins(&read(&mut log.subscribe(0), false)).len(), 0);
}

#[test]
fn twins_count_as_memory_and_go_with_their_entries() {
    let relay = Relay::new(LIMITS);
    let log = running(&relay, 1);
    let mut reader = log.subscribe(0);
    let plain = {
        append(&log, 10);
        relay.stats().bytes
    };
    let entries = read(&mut reader, true);
    let encoded: usize = entries.iter().map(|entry| encode(entry).len()).sum();
    assert!(relay.stats().bytes >= plain + encoded, "{} {plain}", relay.stats().bytes);
    drop(entries);
    for _ in 0..1_000 {
        append(&log, 10);
        let entries = read(&mut reader, true);
        assert_eq!(entries.len(), 10);
        assert!(entries.iter().all(|entry| !encode(entry).is_empty()));
        drop(entries);
        let segment = log.take_unrecorded().unwrap();
        log.recorded(segment.last, 0);
        assert!(relay.stats().bytes <= LIMITS.log_bytes + 10 * 400, "{:?}", relay.stats());
    }
    log.publish(&[(log.head().unwrap() + 1, "ended".into())], true);
    drop((log, reader));
    drop(relay.dirty());
    relay.evict();
    assert_eq!(relay.stats(), Stats::default());
}

#[test]
fn the_bound_of_all_logs_holds_for_twins_too() {
    let relay = Relay::new(LIMITS);
    let logs: Vec<_> = (1..=8).map(|task| running(&relay, task)).collect();
    for log in &logs {
        append(log, 60);
        log.recorded(log.take_unrecorded().unwrap().last, 0);
        let entries = read(&mut log.subscribe(0), true);
        assert!(entries.iter().all(|entry| !encode(entry).is_empty()));
    }
    assert!(relay.stats().bytes > LIMITS.total_bytes, "{:?}", relay.stats());
    relay.evict();
    assert!(relay.stats().bytes <= LIMITS.total_bytes, "{:?}", relay.stats());
    let kept: usize = logs.iter().map(|log| read(&mut log.subscribe(0), false).len()).sum();
    assert!(kept > 0, "no more is dropped than must be");
}
