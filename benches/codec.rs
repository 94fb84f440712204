//! What the bytes of a token cost: an entry encoded, decoded, put into a segment and cut out
//! again, and a runner's message decoded.

use std::hint::black_box;

use baton::{
    clock::Micros,
    events::frame,
    pb,
    relay::{frames, put_frame},
};
use bytes::{Bytes, BytesMut};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use prost::Message as _;

const NOW: Micros = Micros(1_767_225_600_123_456);
const TASK: &str = "019b76da-a800-7000-8000-0123456789ab";

fn token(sequence: u64) -> Bytes {
    let mut buf = BytesMut::new();
    frame::put_token(&mut buf, sequence, NOW, 1, " token", sequence);
    buf.freeze()
}

fn entries(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("entry");
    let mut buf = BytesMut::with_capacity(1 << 20);
    group.bench_function("encode", |b| {
        b.iter(|| {
            buf.clear();
            frame::put_token(&mut buf, black_box(70_000), NOW, 1, black_box(" token"), 69_998);
        });
    });
    let bytes = token(70_000);
    group.bench_function("decode", |b| {
        b.iter(|| pb::TaskEvent::decode(black_box(&bytes[..])));
    });
    group.finish();
}

fn segments(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("segment");
    let tokens: Vec<Bytes> = (1..=1000).map(token).collect();
    group.throughput(Throughput::Elements(1000));
    let mut buf = BytesMut::with_capacity(1 << 16);
    group.bench_function("put", |b| {
        b.iter(|| {
            buf.clear();
            for token in &tokens {
                put_frame(&mut buf, token);
            }
        });
    });
    let segment = buf.clone().freeze();
    group.bench_function("cut", |b| {
        b.iter(|| {
            frames(black_box(&segment).clone()).map(|f| f.map_or(0, |f| f.len())).sum::<usize>()
        });
    });
    group.finish();
}

fn runner_messages(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("output");
    for leases in [1_u64, 50] {
        let event = pb::RunnerEvent {
            body: Some(pb::runner_event::Body::Token(" token".into())),
            elapsed_us: 1_234_567,
        };
        let lease = pb::LeaseEvents {
            task_id: TASK.into(),
            attempt: 1,
            first_index: 70_000,
            events: vec![event],
            finish: None,
        };
        let message = pb::OutputRequest {
            seq: 7,
            hello: None,
            leases: vec![lease; leases as usize],
            credits: None,
        };
        let bytes = Bytes::from(message.encode_to_vec());
        group.throughput(Throughput::Elements(leases));
        group.bench_with_input(BenchmarkId::new("decode", leases), &bytes, |b, bytes| {
            b.iter(|| pb::OutputRequest::decode(black_box(bytes.clone())));
        });
    }
    group.finish();
}

criterion_group!(benches, entries, segments, runner_messages);
criterion_main!(benches);
