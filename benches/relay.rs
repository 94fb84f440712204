//! What the relay costs: a token appended, handed to its reader, shown to an audience.

use std::{
    collections::VecDeque,
    hint::black_box,
    sync::Arc,
    task::{Context, Poll, Waker},
};

use baton::{
    id::TaskId,
    relay::{Encoded, Entry, Limits, Log, Ready, Relay, Subscriber},
};
use bytes::BufMut;
use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use uuid::Uuid;

/// About the frame of a token of eight letters.
const FRAME: [u8; 32] = [b't'; 32];

/// Recorded after this many tokens, so that memory stays bounded as in a server.
const RECORD_EVERY: u64 = 4096;

/// A log with a live attempt.
struct Feed {
    log: Arc<Log>,
    next: u64,
}

impl Feed {
    fn new(relay: &Relay, task: u128) -> Self {
        let log = relay.open(TaskId(Uuid::from_u128(task)));
        log.publish(&[(1, "started".into())], false);
        log.begin_attempt(1, 1, u64::MAX);
        Self { log, next: 1 }
    }

    fn append(&mut self, count: usize) {
        let appended = self.log.append(1, self.next, count, |_, _, _, buffer| {
            buffer.put_slice(&FRAME);
            Encoded::Token
        });
        self.next = appended.map_or(self.next, |appended| appended.next_index);
        if self.next % RECORD_EVERY < count as u64 {
            self.record();
        }
    }

    fn record(&self) {
        if let Some(segment) = self.log.take_unrecorded() {
            self.log.recorded(segment.last, 0);
        }
    }
}

fn drain(reader: &mut Subscriber, out: &mut VecDeque<Entry>) -> usize {
    let mut n_frames = 0;
    let mut cx = Context::from_waker(Waker::noop());
    while let Poll::Ready(Ready::Frames) = reader.poll_fill(&mut cx, out, false) {
        n_frames += out.len();
        out.clear();
    }
    n_frames
}

fn token(c: &mut Criterion) {
    let mut group = c.benchmark_group("relay/token");
    group.throughput(Throughput::Elements(1));
    let relay = Relay::new(Limits::default());
    let mut feed = Feed::new(&relay, 1);
    group.bench_function("append", |b| b.iter(|| feed.append(1)));

    let mut feed = Feed::new(&relay, 2);
    let mut reader = feed.log.subscribe(0);
    let mut out = VecDeque::new();
    group.bench_function("append_and_read", |b| {
        b.iter(|| {
            feed.append(1);
            black_box(drain(&mut reader, &mut out))
        });
    });
    group.finish();
}

fn step(c: &mut Criterion) {
    let mut group = c.benchmark_group("relay/step");
    for n_tasks in [50_u64, 200] {
        group.throughput(Throughput::Elements(n_tasks));
        let relay = Relay::new(Limits::default());
        let mut feeds: Vec<Feed> =
            (0..n_tasks).map(|task| Feed::new(&relay, u128::from(task))).collect();
        let mut readers: Vec<Subscriber> = feeds.iter().map(|feed| feed.log.subscribe(0)).collect();
        let mut out = VecDeque::new();
        group.bench_function(BenchmarkId::from_parameter(n_tasks), |b| {
            b.iter(|| {
                for feed in &mut feeds {
                    feed.append(1);
                }
                for reader in &mut readers {
                    black_box(drain(reader, &mut out));
                }
            });
        });
    }
    group.finish();
}

fn bulk(c: &mut Criterion) {
    const COUNT: usize = 512;
    let mut group = c.benchmark_group("relay/bulk");
    group.throughput(Throughput::Elements(COUNT as u64));
    let relay = Relay::new(Limits::default());
    let mut feed = Feed::new(&relay, 1);
    let mut reader = feed.log.subscribe(0);
    let mut out = VecDeque::new();
    group.bench_function("append_and_read_512", |b| {
        b.iter(|| {
            feed.append(COUNT);
            black_box(drain(&mut reader, &mut out))
        });
    });
    group.finish();
}

/// Publishing to an audience that waits; waking it is the loop's work and not measured.
fn audience(c: &mut Criterion) {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().build() else { return };
    let mut group = c.benchmark_group("relay/publish_to_waiting");
    for n_readers in [0_u64, 1, 100, 10_000] {
        let relay = Relay::new(Limits::default());
        let mut feed = Feed::new(&relay, 1);
        let mut readers: Vec<Subscriber> = (0..n_readers).map(|_| feed.log.subscribe(0)).collect();
        let mut out = VecDeque::new();
        let mut fan_out = Box::pin(relay.fan_out());
        let mut cx = Context::from_waker(Waker::noop());
        let _guard = runtime.enter();
        group.bench_function(BenchmarkId::from_parameter(n_readers), |b| {
            b.iter_batched(
                || {
                    // The loop wakes whom the last round handed it; then everybody waits anew.
                    while fan_out.as_mut().poll(&mut cx).is_ready() {}
                    for reader in &mut readers {
                        drain(reader, &mut out);
                    }
                    Vec::<()>::new()
                },
                |_| feed.append(1),
                BatchSize::PerIteration,
            );
        });
    }
    group.finish();
}

criterion_group!(benches, token, step, bulk, audience);
criterion_main!(benches);
