//! What a decision of the state function costs.

use std::{collections::BTreeMap, hint::black_box, time::Duration};

use baton::{
    clock::Micros,
    id::{Entropy, Namespace, TaskId},
    tasks::{
        model::{RetryPolicy, Spec, State, Task, Usage},
        state::{Change, Event, Head, Outcome, Rejected, apply},
    },
};
use criterion::{Criterion, criterion_group, criterion_main};

const NOW: Micros = Micros(1_767_225_600_000_000);

fn queued() -> Task {
    Task {
        id: TaskId::new(NOW, &Entropy::seeded(1)),
        namespace: Namespace::from("default"),
        spec: Spec {
            model: "bench/model".into(),
            version: None,
            input: format!("{{\"prompt\":\"{}\"}}", "x".repeat(200)),
            params: "{}".into(),
            priority: 0,
            labels: BTreeMap::new(),
            required_labels: BTreeMap::new(),
            deadline: None,
            start_timeout: None,
            execution_timeout: Duration::from_mins(10),
            retry: RetryPolicy::default(),
            seed: 0,
            session: None,
        },
        state: State::Queued,
        attempt: 0,
        failed: 0,
        lost: 0,
        handed_back: 0,
        create_time: NOW,
        start_time: None,
        end_time: None,
        not_before: None,
        runner: None,
        instance: None,
        base_sequence: 0,
        last_sequence: 1,
        reserved_sequence: 1,
        result: None,
        error: None,
        usage: None,
        revision: 1,
        request_id: None,
        retry_of: None,
        retried_by: None,
        traceparent: None,
    }
}

fn decide(task: &Task, event: &Event) -> Result<Change, Rejected> {
    apply(task, event, NOW, Head { head: task.last_sequence, in_doubt: None }, 0.5)
}

fn decisions(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("state");
    let start = Event::Start {
        runner: "runner".into(),
        node: "node".into(),
        engine: "scripted".into(),
        engine_version: "1".into(),
        instance: None,
        waited: None,
    };
    let waiting = queued();
    group.bench_function("start", |b| {
        b.iter(|| decide(black_box(&waiting), black_box(&start)));
    });
    let running = decide(&waiting, &start).expect("a waiting task starts").task;
    let outcome = Outcome::Success(Some("{}".into()));
    let finish = Event::Finish { attempt: 1, outcome, usage: Usage::default() };
    group.bench_function("finish", |b| {
        b.iter(|| decide(black_box(&running), black_box(&finish)));
    });
    let lose = Event::Lose { attempt: 1, reason: "silent".into() };
    group.bench_function("lose", |b| b.iter(|| decide(black_box(&running), black_box(&lose))));
    let late = Event::Lose { attempt: 7, reason: "silent".into() };
    group.bench_function("refuse", |b| b.iter(|| decide(black_box(&running), black_box(&late))));
    group.finish();
}

criterion_group!(benches, decisions);
criterion_main!(benches);
