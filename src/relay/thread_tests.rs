//! The relay under threads: what no single-threaded model shows, such as a wake-up that is lost.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::{BufMut, Bytes};
use parking_lot::Mutex;
use uuid::Uuid;

use super::*;

const EVENTS: u64 = 2_000;
/// Memory for a few events only, so that readers are sent to storage all the time.
const TIGHT: Limits = Limits {
    log_bytes: 900,
    total_bytes: 700,
    unrecorded_bytes: 1_500,
    hurry_log_bytes: 300,
    hurry_bytes: 300,
    batch_bytes: 40,
};

/// What is on stable storage.
type Stored = Arc<Mutex<BTreeMap<u64, Bytes>>>;

fn text(sequence: u64) -> Bytes {
    format!("entry {sequence}").into()
}

/// Stores what logs have to record, until it is dropped.
async fn record(relay: Relay, stored: Stored) {
    loop {
        relay.dirty_notified().await;
        for log in relay.dirty() {
            let Some(segment) = log.take_unrecorded() else { continue };
            store(&stored, &segment);
            tokio::task::yield_now().await;
            log.recorded(segment.last, segment.reserve_to.unwrap_or(0));
        }
        relay.evict();
    }
}

fn store(stored: &Stored, segment: &SegmentData) {
    let entries = frames(segment.frames.clone()).map(Option::unwrap);
    stored.lock().extend((segment.first..).zip(entries));
}

/// Appends all events, in pieces of changing size, and seals the log.
async fn append(log: Arc<Log>, stored: Stored) {
    let (mut next, mut size) = (1, 1);
    while next <= EVENTS {
        size = size % 7 + 1;
        let count = size.min((EVENTS + 1 - next) as usize);
        let appended = log.append(1, next, count, |_, sequence, _, buffer| {
            buffer.put_slice(&text(sequence));
            Encoded::Token
        });
        next = appended.unwrap().next_index;
        log.room(1).await.unwrap();
    }
    let frozen = log.freeze(1);
    if let Some(rest) = frozen.rest {
        store(&stored, &rest);
    }
    let end = (frozen.head + 1, text(frozen.head + 1));
    stored.lock().insert(end.0, end.1.clone());
    log.publish(&[end], true);
}

/// Follows the log from a position to its end; returns where that was.
async fn read(log: Arc<Log>, stored: Stored, after: u64) -> u64 {
    let mut reader = log.subscribe(after);
    let mut cursor = after;
    loop {
        let entries: Vec<_> = match reader.next().await {
            Next::Frames(entries) => entries,
            Next::Behind | Next::Stirred => {
                let stored = stored.lock();
                stored.range(cursor + 1..).take(5).map(|(at, text)| (*at, text.clone())).collect()
            }
            Next::End => return cursor,
        };
        assert!(!entries.is_empty(), "nothing follows {cursor}, neither in memory nor stored");
        for (sequence, entry) in entries {
            assert_eq!((sequence, entry), (cursor + 1, text(cursor + 1)));
            cursor = sequence;
        }
        reader.seek(cursor);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn readers_on_other_threads_miss_nothing_and_sleep_through_no_end() {
    for round in 0..20_u64 {
        let relay = Relay::new(TIGHT);
        let log = relay.open(TaskId(Uuid::from_u128(u128::from(round))));
        let stored = Stored::default();
        stored.lock().extend([(1, text(1)), (2, text(2))]);
        log.publish(&[(1, text(1)), (2, text(2))], false);
        log.begin_attempt(1, 2, EVENTS * 2);
        let mut work = tokio::task::JoinSet::new();
        for reader in 0..8 {
            let (log, stored) = (log.clone(), stored.clone());
            work.spawn(async move {
                // They come at different times, and some from further on.
                for _ in 0..reader * round {
                    tokio::task::yield_now().await;
                }
                let after = (reader % 3) * log.head().unwrap_or(0) / 2;
                assert_eq!(read(log, stored, after).await, EVENTS + 3);
            });
        }
        let recording = record(relay.clone(), stored.clone());
        work.spawn(append(log, stored));
        let all = tokio::time::timeout(Duration::from_secs(20), work.join_all());
        tokio::select! {
            done = all => assert!(done.is_ok(), "round {round}: somebody sleeps for ever"),
            () = recording => unreachable!("it runs for ever"),
        }
    }
}
