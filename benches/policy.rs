//! What a scheduling decision costs with 10,000 runners and 1,000,000 queued tasks.
//!
//! Each measured turn is the whole life of a decision in steady state: a runner's credit comes
//! back, the queue decides, the assignment is noted, and a new task joins the queue.

use std::{collections::BTreeMap, hint::black_box, sync::Arc, time::Duration};

use baton::{
    clock::{Clock, Micros},
    id::{Namespace, RunnerId, TaskId},
    queue::{Entry, Limits, ModelPattern, Queue, RunnerSupply, SupplyKey, SupplyState},
};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use uuid::Uuid;

const RUNNERS: u64 = 10_000;
const TASKS: u64 = 1_000_000;
const NAMESPACES: u64 = 50;

/// A queue in steady state, and what the next task is made from.
struct Fleet {
    queue: Queue,
    clock: Clock,
    models: u64,
    next: u64,
    state: u64,
}

impl Fleet {
    /// `served` says which models a runner serves.
    fn new(models: u64, served: impl Fn(&mut Self, u64) -> Vec<ModelPattern>) -> Self {
        let clock = Clock::manual();
        let queue = Queue::new(
            Limits { max_per_model: TASKS, max_per_namespace: TASKS, ..Limits::default() },
            clock.clone(),
        );
        let mut fleet = Self { queue, clock, models, next: 0, state: 1 };
        for key in 0..RUNNERS {
            let models = served(&mut fleet, key);
            let labels = BTreeMap::from([("host".to_owned(), format!("node-{key}"))]);
            fleet.queue.runner_up(RunnerSupply {
                key: SupplyKey(key),
                namespace: Namespace::from(Namespace::DEFAULT),
                models,
                labels,
                slots: 8,
                runner: RunnerId::from(format!("runner-{key}")),
            });
        }
        for _ in 0..TASKS {
            fleet.submit();
        }
        fleet
    }

    fn random(&mut self, below: u64) -> u64 {
        self.state = self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.state >> 33) % below
    }

    fn model(n: u64) -> String {
        format!("owner/model-{n}")
    }

    fn submit(&mut self) {
        self.next += 1;
        let n = self.next;
        // Some tasks are urgent, some can wait; most are neither.
        let priority = match self.random(20) {
            0 => 10,
            1 => -10,
            _ => 0,
        };
        let (namespace, model) = (self.random(NAMESPACES), self.random(self.models));
        self.queue.push(Entry {
            id: TaskId(Uuid::from_u128(u128::from(n) << 64 | u128::from(self.state))),
            namespace: Namespace::from(format!("tenant-{namespace}")),
            model: Self::model(model),
            version: None,
            required_labels: Arc::default(),
            priority,
            create_time: Micros(self.clock.now().0 + n as i64 * 10),
            not_before: None,
            deadline: None,
            session: None,
            attempt: 0,
            waited_out: false,
        });
    }

    /// One credit comes back and is used; the task is replaced.
    fn turn(&mut self) {
        let key = SupplyKey(self.random(RUNNERS));
        self.queue.runner_credits(key, 1, SupplyState::Ready);
        let matches = self.queue.take_matches(self.clock.now(), 1);
        for found in black_box(matches) {
            self.queue.assigned(found.runner, 0, SupplyState::Ready);
            self.submit();
        }
    }

    /// A thousand credits come back at once, as after a stall.
    fn burst(&mut self) {
        for _ in 0..1_000 {
            let key = SupplyKey(self.random(RUNNERS));
            self.queue.runner_credits(key, 1, SupplyState::Ready);
        }
        let matches = self.queue.take_matches(self.clock.now(), 1_000);
        for found in black_box(matches) {
            self.queue.assigned(found.runner, 0, SupplyState::Ready);
            self.submit();
        }
    }
}

fn decisions(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("decision");
    group.throughput(Throughput::Elements(1));
    group.warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(3));
    group.sample_size(20);

    let mut fleet = Fleet::new(100, |_, key| vec![ModelPattern::Model(Fleet::model(key % 100))]);
    group.bench_function("one_model_each", |bencher| bencher.iter(|| fleet.turn()));
    group.throughput(Throughput::Elements(1_000));
    group.bench_function("one_model_each_burst_of_1000", |bencher| bencher.iter(|| fleet.burst()));
    group.throughput(Throughput::Elements(1));
    drop(fleet);

    let mut fleet = Fleet::new(100, |_, _| vec![ModelPattern::Any]);
    group.bench_function("every_model_each", |bencher| bencher.iter(|| fleet.turn()));
    drop(fleet);

    // Nearly every runner differs from every other in what it serves.
    let mut fleet = Fleet::new(100, |fleet, _| {
        (0..4).map(|_| ModelPattern::Model(Fleet::model(fleet.random(100)))).collect()
    });
    group.bench_function("four_random_models_each", |bencher| bencher.iter(|| fleet.turn()));

    let late = Entry {
        id: TaskId(Uuid::from_u128(u128::MAX)),
        namespace: Namespace::from("tenant-1"),
        model: Fleet::model(1),
        version: None,
        required_labels: Arc::default(),
        priority: 0,
        create_time: Micros(i64::MAX / 2),
        not_before: None,
        deadline: None,
        session: None,
        attempt: 0,
        waited_out: false,
    };
    group.bench_function("estimate", |bencher| bencher.iter(|| fleet.queue.estimate(&late)));
    group.finish();
}

criterion_group!(benches, decisions);
criterion_main!(benches);
