//! The queue's promises, checked against a brute-force reading of them.

use std::collections::{BTreeMap, HashMap};

use proptest::prelude::*;

use super::*;
use crate::{
    clock::EPOCH,
    error::Reason,
    id::{Entropy, RunnerId},
};

fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

fn id(n: u64) -> TaskId {
    TaskId(uuid::Uuid::from_u128(u128::from(n) + 1))
}

fn entry(n: u64) -> Entry {
    Entry {
        id: id(n),
        namespace: Namespace::from("default"),
        model: "a/m".into(),
        version: None,
        required_labels: Arc::default(),
        priority: 0,
        create_time: EPOCH + Duration::from_millis(n),
        not_before: None,
        deadline: None,
        session: None,
        attempt: 0,
    }
}

fn runner(key: u64, models: &[&str], slots: u32) -> RunnerSupply {
    RunnerSupply {
        key: SupplyKey(key),
        namespace: Namespace::from("default"),
        models: models.iter().map(|text| ModelPattern::parse(text)).collect(),
        labels: BTreeMap::new(),
        slots,
        runner: RunnerId::from(format!("r{key}")),
    }
}

fn queue(limits: Limits) -> (Queue, Clock) {
    let clock = Clock::manual();
    (Queue::new(limits, clock.clone()), clock)
}

fn ready(queue: &Queue, supply: RunnerSupply, free: u32) {
    let key = supply.key;
    queue.runner_up(supply);
    queue.runner_credits(key, free, SupplyState::Ready);
}

fn take(queue: &Queue, clock: &Clock) -> Vec<u64> {
    let matches = queue.take_matches(clock.now(), usize::MAX);
    matches.into_iter().map(|found| found.entry.id.0.as_u128() as u64 - 1).collect()
}

#[derive(Clone, Debug)]
enum Op {
    Push { ns: usize, model: usize, version: bool, label: usize, priority: i32, delay: u64 },
    Remove(usize),
    Up { home: usize, models: usize, label: usize, slots: u32 },
    Credits { runner: usize, free: u32, state: u8 },
    Down(usize),
    Assigned { match_: usize, free: u32 },
    GiveBack(usize),
    Pause { ns: usize, model: usize, on: bool },
    Advance(u64),
    Wall(i64),
    Take(usize),
}

const NAMESPACES: [&str; 3] = ["default", "x", "y"];
const MODELS: [&str; 3] = ["a/m", "a/n", "b/m"];
const SERVED: [&[&str]; 5] = [&["*"], &["a/m"], &["a/m@1", "a/n"], &["b/m", "a/m@2"], &["a/n"]];
const LABELS: [&[(&str, &str)]; 3] = [&[], &[("gpu", "h200")], &[("gpu", "h200"), ("zone", "e")]];

fn op() -> impl Strategy<Value = Op> {
    let push = (0..3_usize, 0..3_usize, any::<bool>(), 0..3_usize, -3..4_i32, 0..40_u64).prop_map(
        |(ns, model, version, label, priority, delay)| Op::Push {
            ns,
            model,
            version,
            label,
            priority,
            delay: delay.saturating_sub(30),
        },
    );
    let up = (0..3_usize, 0..5_usize, 0..3_usize, 1..5_u32)
        .prop_map(|(home, models, label, slots)| Op::Up { home, models, label, slots });
    prop_oneof![
        8 => push,
        1 => any::<usize>().prop_map(Op::Remove),
        2 => up,
        4 => (any::<usize>(), 0..5_u32, 0..8_u8)
            .prop_map(|(runner, free, state)| Op::Credits { runner, free, state }),
        1 => any::<usize>().prop_map(Op::Down),
        2 => (any::<usize>(), 0..4_u32).prop_map(|(match_, free)| Op::Assigned { match_, free }),
        2 => any::<usize>().prop_map(Op::GiveBack),
        1 => (0..3_usize, 0..3_usize, any::<bool>())
            .prop_map(|(ns, model, on)| Op::Pause { ns, model, on }),
        1 => (0..20_u64).prop_map(Op::Advance),
        1 => (-20..20_i64).prop_map(Op::Wall),
        4 => prop_oneof![Just(usize::MAX), 1..3_usize].prop_map(Op::Take),
    ]
}

/// What the test believes.
#[derive(Default)]
struct Model {
    waiting: HashMap<TaskId, Entry>,
    runners: Vec<(RunnerSupply, u32, u32, SupplyState)>,
    paused: HashMap<(String, String), bool>,
    in_flight: Vec<SupplyKey>,
}

impl Model {
    fn available(&self, key: SupplyKey) -> u32 {
        let found = self.runners.iter().find(|runner| runner.0.key == key);
        found.map_or(0, |(_, free, flying, state)| match state {
            SupplyState::Ready => free.saturating_sub(*flying),
            _ => 0,
        })
    }

    fn suits(entry: &Entry, supply: &RunnerSupply) -> bool {
        (supply.namespace.as_str() == "default" || supply.namespace == entry.namespace)
            && supply.models.iter().any(|p| p.matches(&entry.model, entry.version.as_deref()))
            && entry.required_labels.iter().all(|(k, v)| supply.labels.get(k) == Some(v))
    }

    fn startable(&self, entry: &Entry, now: Micros) -> bool {
        let queue = (entry.namespace.to_string(), entry.model.clone());
        entry.not_before.is_none_or(|time| time <= now)
            && !self.paused.get(&queue).copied().unwrap_or(false)
    }

    fn land(&mut self, index: usize, free: Option<u32>) -> Option<(SupplyKey, SupplyState)> {
        if self.in_flight.is_empty() {
            return None;
        }
        let key = self.in_flight.remove(index % self.in_flight.len());
        let found = self.runners.iter_mut().find(|runner| runner.0.key == key)?;
        found.2 -= 1;
        found.1 = free.unwrap_or(found.1);
        Some((key, found.3))
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Work-conserving, credits kept, matches right, pauses hold, nothing early, order of rank.
    #[test]
    fn every_decision_keeps_the_promises(ops in prop::collection::vec(op(), 1..120)) {
        let limits = Limits { ageing_step: Duration::from_secs(2), ..Limits::default() };
        let (queue, clock) = queue(limits);
        let mut model = Model::default();
        let mut next = 0_u64;
        for op in ops {
            match op {
                Op::Push { ns, model: name, version, label, priority, delay } => {
                    next += 1;
                    let now = clock.now();
                    let new = Entry {
                        namespace: Namespace::from(NAMESPACES[ns]),
                        model: MODELS[name].into(),
                        version: version.then(|| "1".into()),
                        required_labels: Arc::new(labels(LABELS[label])),
                        priority,
                        create_time: now,
                        not_before: (delay > 0).then(|| now + Duration::from_secs(delay)),
                        ..entry(next)
                    };
                    model.waiting.insert(new.id, new.clone());
                    queue.push(new);
                }
                Op::Remove(n) => {
                    let id = id(n as u64 % (next + 1));
                    prop_assert_eq!(queue.remove(id), model.waiting.remove(&id).is_some());
                }
                Op::Up { home, models, label, slots } => {
                    next += 1;
                    let supply = RunnerSupply {
                        namespace: Namespace::from(NAMESPACES[home]),
                        labels: labels(LABELS[label]),
                        ..runner(next, SERVED[models], slots)
                    };
                    model.runners.push((supply.clone(), 0, 0, SupplyState::Ready));
                    queue.runner_up(supply);
                }
                Op::Credits { runner, free, state } if !model.runners.is_empty() => {
                    let index = runner % model.runners.len();
                    let state = match state {
                        0 => SupplyState::Draining,
                        1 => SupplyState::Paused,
                        _ => SupplyState::Ready,
                    };
                    let found = &mut model.runners[index];
                    (found.1, found.3) = (free, state);
                    queue.runner_credits(found.0.key, free, state);
                }
                Op::Down(n) if !model.runners.is_empty() => {
                    let index = n % model.runners.len();
                    let (gone, ..) = model.runners.remove(index);
                    queue.runner_down(gone.key);
                }
                Op::Assigned { match_, free } => {
                    if let Some((key, state)) = model.land(match_, Some(free)) {
                        queue.assigned(key, free, state);
                    }
                }
                Op::GiveBack(n) => {
                    if let Some((key, _)) = model.land(n, None) {
                        queue.give_back(key);
                    }
                }
                Op::Pause { ns, model: name, on } => {
                    let key = (NAMESPACES[ns].to_owned(), MODELS[name].to_owned());
                    let pause =
                        on.then(|| Pause { by: "t".into(), reason: String::new(), time: EPOCH });
                    queue.set_paused(&Namespace::from(NAMESPACES[ns]), MODELS[name], pause);
                    model.paused.insert(key, on);
                }
                Op::Advance(seconds) => clock.advance(Duration::from_secs(seconds)),
                Op::Wall(seconds) => {
                    clock.set_wall(Micros(clock.now().0 + seconds * 1_000_000));
                }
                Op::Take(max) => {
                    let now = clock.now();
                    let matches = queue.take_matches(now, max);
                    prop_assert!(matches.len() <= max);
                    let complete = matches.len() < max;
                    let mut last: HashMap<_, (i64, TaskId)> = HashMap::new();
                    for found in matches {
                        let known = model.waiting.remove(&found.entry.id);
                        prop_assert_eq!(known.as_ref(), Some(&found.entry));
                        prop_assert!(model.startable(&found.entry, now));
                        prop_assert!(model.available(found.runner) > 0, "credit exceeded");
                        let runner =
                            model.runners.iter_mut().find(|r| r.0.key == found.runner).unwrap();
                        prop_assert!(Model::suits(&found.entry, &runner.0));
                        runner.2 += 1;
                        model.in_flight.push(found.runner);
                        let e = found.entry;
                        let rank = (e.create_time.0 - i64::from(e.priority) * 2_000_000, e.id);
                        let class = (e.namespace, e.model, e.version, e.required_labels);
                        let before = last.insert(class, rank);
                        prop_assert!(before.is_none_or(|before| before < rank), "out of order");
                    }
                    if complete {
                        for (supply, ..) in &model.runners {
                            let idle = model.available(supply.key) > 0;
                            let work = |e: &&Entry| {
                                model.startable(e, now) && Model::suits(e, supply)
                            };
                            let left = model.waiting.values().find(work);
                            prop_assert!(!idle || left.is_none(), "{supply:?} idle, {left:?} waits");
                        }
                    }
                }
                Op::Credits { .. } | Op::Down(_) => {}
            }
            prop_assert_eq!(queue.len(), model.waiting.len());
        }
    }

}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Namespaces with a backlog share the runners by weight, whatever the credits' timing.
    #[test]
    fn backlogs_are_served_by_weight(
        weights in prop::collection::vec(1_u32..6, 2..5),
        grants in prop::collection::vec(1_u32..9, 20..120),
    ) {
        let name = |n: usize| Namespace::from(format!("ns{n}"));
        let by_name = weights.iter().enumerate().map(|(n, w)| (name(n), *w)).collect();
        let (queue, clock) = queue(Limits { weights: by_name, ..Limits::default() });
        ready(&queue, runner(1, &["*"], 8), 0);
        let mut n = 0;
        for (index, _) in weights.iter().enumerate() {
            for k in 0..1_000_u64 {
                n += 1;
                let model = if k % 2 == 0 { "a/m" } else { "b/m" };
                queue.push(Entry { namespace: name(index), model: model.into(), ..entry(n) });
            }
        }
        let mut served = vec![0_u32; weights.len()];
        for free in grants {
            queue.runner_credits(SupplyKey(1), free, SupplyState::Ready);
            for found in queue.take_matches(clock.now(), usize::MAX) {
                let index = (0..weights.len()).find(|n| name(*n) == found.entry.namespace);
                served[index.unwrap()] += 1;
                queue.assigned(SupplyKey(1), 0, SupplyState::Ready);
            }
        }
        for (i, a) in weights.iter().enumerate() {
            for (j, b) in weights.iter().enumerate() {
                let (a, b) = (f64::from(*a), f64::from(*b));
                let gap = (f64::from(served[i]) / a - f64::from(served[j]) / b).abs();
                prop_assert!(gap <= 1.01 / a + 1.01 / b, "{served:?} for {weights:?}");
            }
        }
    }

    /// However many urgent tasks keep coming, a task starts once its age makes up for them.
    #[test]
    fn ageing_bounds_the_wait(low in -100_i32..0, high in 0_i32..=100, rate in 1_u64..4) {
        let step = Duration::from_secs(1);
        let (queue, clock) = queue(Limits { ageing_step: step, ..Limits::default() });
        ready(&queue, runner(1, &["*"], 1), 0);
        let mut n = 0;
        let mut push = |priority| {
            n += 1;
            queue.push(Entry { priority, create_time: clock.now(), ..entry(n) });
        };
        push(low);
        let mut waited = 0;
        loop {
            (0..rate).for_each(|_| push(high));
            queue.runner_credits(SupplyKey(1), rate as u32, SupplyState::Ready);
            let started = take(&queue, &clock);
            started.iter().for_each(|_| queue.assigned(SupplyKey(1), 0, SupplyState::Ready));
            if started.contains(&1) {
                break;
            }
            clock.advance(Duration::from_secs(1));
            waited += 1;
            prop_assert!(waited <= high - low + 2, "starved");
        }
    }
}

#[test]
fn higher_priority_starts_first_until_age_makes_up_for_it() {
    let (queue, clock) = queue(Limits::default());
    ready(&queue, runner(1, &["a/m"], 8), 0);
    queue.push(Entry { priority: 0, ..entry(0) });
    queue.push(Entry { priority: 1, ..entry(29_000) });
    queue.push(Entry { priority: 1, ..entry(31_000) });
    queue.runner_credits(SupplyKey(1), 8, SupplyState::Ready);
    assert_eq!(take(&queue, &clock), [29_000, 0, 31_000]);
}

#[test]
fn a_session_returns_to_its_runner_while_that_has_room() {
    let (queue, clock) = queue(Limits::default());
    for key in 1..=8 {
        ready(&queue, runner(key, &["a/m"], 4), 4);
    }
    let talk = |n| Entry { session: Some("s".into()), ..entry(n) };
    queue.push(talk(1));
    let first = queue.take_matches(clock.now(), 1)[0].runner;
    queue.assigned(first, 3, SupplyState::Ready);
    for n in 2..5 {
        queue.push(talk(n));
        let found = queue.take_matches(clock.now(), 1);
        assert_eq!(found[0].runner, first);
        queue.assigned(first, 4 - n as u32, SupplyState::Ready);
    }
    queue.push(talk(9));
    let other = queue.take_matches(clock.now(), 1)[0].runner;
    assert_ne!(other, first, "a full runner must not hold the task back");
}

#[test]
fn a_session_finds_its_runner_again_after_a_reconnect() {
    let (queue, clock) = queue(Limits::default());
    for key in 1..=4 {
        ready(&queue, runner(key, &["a/m"], 4), 4);
    }
    queue.push(Entry { session: Some("s".into()), ..entry(1) });
    let SupplyKey(first) = queue.take_matches(clock.now(), 1)[0].runner;
    queue.runner_down(SupplyKey(first));
    let back = RunnerSupply { key: SupplyKey(99), ..runner(first, &["a/m"], 4) };
    ready(&queue, back, 1);
    queue.push(Entry { session: Some("s".into()), ..entry(2) });
    assert_eq!(queue.take_matches(clock.now(), 1)[0].runner, SupplyKey(99));
}

#[test]
fn tasks_spread_over_the_least_loaded_runners() {
    let (queue, clock) = queue(Limits::default());
    for key in 1..=4 {
        let mut supply = runner(key, &["a/m"], 4);
        // A label of its own must not hide a runner from the choice.
        supply.labels = labels(&[("host", &key.to_string())]);
        ready(&queue, supply, 4);
    }
    queue.push_all((0..12).map(entry));
    let mut load = HashMap::new();
    for found in queue.take_matches(clock.now(), usize::MAX) {
        *load.entry(found.runner).or_insert(0) += 1;
    }
    assert_eq!(load.values().copied().collect::<Vec<_>>(), [3; 4]);
}

#[test]
fn specialised_runners_are_used_before_those_that_can_do_anything() {
    let (queue, clock) = queue(Limits::default());
    ready(&queue, runner(1, &["*"], 1), 1);
    ready(&queue, runner(2, &["a/m"], 1), 1);
    queue.push(entry(1));
    assert_eq!(queue.take_matches(clock.now(), 9)[0].runner, SupplyKey(2));
}

#[test]
fn a_task_is_not_started_early_after_the_clock_went_back() {
    let (queue, clock) = queue(Limits::default());
    let due = clock.now() + Duration::from_secs(10);
    queue.push(Entry { not_before: Some(due), ..entry(1) });
    assert_eq!(queue.next_delayed(), Some(due));
    clock.advance(Duration::from_secs(11));
    assert_eq!(take(&queue, &clock), [0_u64; 0], "no runner yet");
    clock.set_wall(EPOCH);
    ready(&queue, runner(1, &["*"], 1), 1);
    assert_eq!(take(&queue, &clock), [0_u64; 0]);
    assert_eq!(queue.next_delayed(), Some(due));
    clock.set_wall(due);
    assert_eq!(take(&queue, &clock), [1]);
}

#[test]
fn a_full_queue_refuses_and_says_so() {
    let (queue, _) = queue(Limits { max_per_model: 2, max_per_namespace: 3, ..Limits::default() });
    let ns = Namespace::from("default");
    for n in 0..2 {
        let admission = queue.admit(&ns, "a/m", 0).unwrap();
        queue.push(entry(n));
        admission.done();
    }
    let error = queue.admit(&ns, "a/m", 100).unwrap_err();
    assert_eq!(error.reason(), Reason::QueueFull);
    assert!(error.metadata().contains(&("policy_label", "queue.per_model".into())));
    assert!(error.retry_delay().is_some());
    let held = queue.admit(&ns, "b/m", 0).unwrap();
    let error = queue.admit(&ns, "b/m", 0).unwrap_err();
    assert!(error.metadata().contains(&("policy_label", "queue.per_namespace".into())));
    drop(held);
    let other = queue.admit(&Namespace::from("x"), "a/m", 0).unwrap();
    assert_eq!(other.evict(), None, "another namespace's queue is its own");
    queue.admit(&ns, "b/m", 0).unwrap().done();
}

#[test]
fn under_drop_the_oldest_of_the_lowest_priority_leaves() {
    let limits =
        Limits { max_per_model: 3, when_full: FullPolicy::DropOldest, ..Limits::default() };
    let (queue, _) = queue(limits);
    let ns = Namespace::from("default");
    for (n, priority) in [(1, 5), (2, 0), (3, 0)] {
        queue.push(Entry { priority, ..entry(n) });
    }
    let admission = queue.admit(&ns, "a/m", 0).unwrap();
    assert_eq!(admission.evict(), Some(id(2)));
    drop(admission);
    assert!(queue.contains(id(2)), "an admission that came to nothing evicts nothing");
    let admission = queue.admit(&ns, "a/m", 0).unwrap();
    queue.push(entry(4));
    admission.done();
    assert!(!queue.contains(id(2)) && queue.len() == 3);
    let error = queue.admit(&ns, "a/m", -1).unwrap_err();
    assert_eq!(error.reason(), Reason::QueueFull, "nothing of lower priority waits");
}

#[test]
fn the_position_counts_only_the_own_queue() {
    let (queue, _) = queue(Limits::default());
    for n in 0..10 {
        queue.push(entry(n));
        queue.push(Entry { namespace: Namespace::from("x"), ..entry(n + 100) });
        queue.push(Entry { model: "b/m".into(), ..entry(n + 200) });
    }
    assert_eq!(queue.estimate(&entry(3)).position, 4);
    assert_eq!(queue.estimate(&entry(50)).position, 11);
    assert_eq!(queue.estimate(&Entry { priority: 9, ..entry(50) }).position, 1);
}

#[test]
fn estimates_follow_measured_service_times() {
    let (queue, clock) = queue(Limits::default());
    let ns = Namespace::from("default");
    let wanted = Entry { deadline: Some(clock.now() + Duration::from_secs(60)), ..entry(100) };
    assert_eq!(queue.estimate(&wanted).predicted_start, None, "nobody serves it");
    ready(&queue, runner(1, &["a/m"], 4), 4);
    let estimate = queue.estimate(&wanted);
    assert_eq!(estimate.predicted_start, Some(Duration::ZERO), "a slot is free");
    assert_eq!(estimate.on_time_probability, None, "nothing was measured");
    queue.runner_credits(SupplyKey(1), 0, SupplyState::Ready);
    queue.push_all((0..19).map(entry));
    assert_eq!(queue.estimate(&wanted).predicted_start, None);
    for _ in 0..50 {
        queue.started(&ns, "a/m", Duration::ZERO);
        queue.finished(&ns, "a/m", Duration::from_secs(10), true);
    }
    let estimate = queue.estimate(&wanted);
    assert_eq!(estimate.position, 20);
    assert_eq!(estimate.predicted_start, Some(Duration::from_secs(50)), "20 ends at 4 per 10 s");
    let late = Entry { deadline: Some(clock.now() + Duration::from_secs(30)), ..wanted.clone() };
    let early = Entry { deadline: Some(clock.now() + Duration::from_secs(300)), ..wanted.clone() };
    let on_time = |entry: &Entry| queue.estimate(entry).on_time_probability.unwrap();
    assert!(on_time(&late) < 0.01 && on_time(&early) > 0.99);
    assert!((on_time(&wanted) - 0.5).abs() < 0.1);
    let pause = Pause { by: "me".into(), reason: String::new(), time: EPOCH };
    queue.set_paused(&ns, "a/m", Some(pause));
    assert_eq!(queue.estimate(&wanted).predicted_start, None);
}

#[test]
fn an_explanation_names_the_dominant_reason() {
    let (queue, clock) = queue(Limits::default());
    let ns = Namespace::from("default");
    let why = |n| queue.explain(id(n)).unwrap().reason;
    queue.push(entry(1));
    assert_eq!(why(1), WaitReason::NoRunnerForModel);
    ready(&queue, runner(1, &["a/m@1"], 1), 0);
    queue.push(Entry { version: Some("2".into()), ..entry(2) });
    assert_eq!(why(2), WaitReason::NoRunnerForModel);
    assert_eq!(queue.explain(id(2)).unwrap().evidence["connected_versions"], "1");
    assert_eq!(why(1), WaitReason::NoFreeSlot);
    let picky = Arc::new(labels(&[("gpu", "h200")]));
    queue.push(Entry { required_labels: picky, ..entry(3) });
    assert_eq!(why(3), WaitReason::NoRunnerWithLabels);
    queue.push(entry(4));
    assert_eq!(why(4), WaitReason::BehindOthers);
    queue.runner_credits(SupplyKey(1), 1, SupplyState::Ready);
    assert_eq!(why(1), WaitReason::Starting);
    queue.runner_credits(SupplyKey(1), 1, SupplyState::Draining);
    assert_eq!(why(1), WaitReason::RunnersDraining);
    let later = Some(clock.now() + Duration::from_secs(5));
    queue.push(Entry { not_before: later, ..entry(5) });
    queue.push(Entry { not_before: later, attempt: 1, ..entry(6) });
    assert_eq!((why(5), why(6)), (WaitReason::NotBefore, WaitReason::Backoff));
    let pause = Pause { by: "me".into(), reason: "maintenance".into(), time: EPOCH };
    queue.set_paused(&ns, "a/m", Some(pause));
    let waiting = queue.explain(id(1)).unwrap();
    assert_eq!(waiting.reason, WaitReason::QueuePaused);
    assert!(waiting.summary.contains("maintenance") && waiting.next_step.contains("resume"));
    assert_eq!(queue.explain(id(77)), None);
}

#[test]
fn numbers_of_a_queue_add_up() {
    let (queue, clock) = queue(Limits::default());
    let ns = Namespace::from("default");
    ready(&queue, runner(1, &["a/m"], 4), 1);
    ready(&queue, runner(2, &["b/m"], 4), 4);
    queue.push_all((0..3).map(entry));
    queue.push(Entry { not_before: Some(clock.now() + Duration::from_secs(9)), ..entry(9) });
    clock.advance(Duration::from_secs(5));
    assert_eq!(take(&queue, &clock), [0]);
    queue.started(&ns, "a/m", Duration::ZERO);
    queue.assigned(SupplyKey(1), 0, SupplyState::Ready);
    let stats = queue.stats(&ns, "a/m");
    assert_eq!((stats.depth, stats.delayed, stats.running), (2, 1, 1));
    assert_eq!((stats.slots, stats.free_slots), (4, 0));
    assert_eq!(stats.oldest_wait, Some(Duration::from_millis(4_999)));
    assert!(stats.start_rate > 0.0);
    assert_eq!(queue.list(&ns).len(), 1);
    assert_eq!(queue.list(&Namespace::from("x")), []);
}

#[test]
fn many_kinds_of_tasks_leave_nothing_behind() {
    let (queue, clock) = queue(Limits::default());
    ready(&queue, runner(1, &["*"], 1), u32::MAX);
    let entropy = Entropy::seeded(1);
    for n in 0..12_000_u64 {
        let label = (n.to_string(), entropy.u64().to_string());
        let required_labels = Arc::new(BTreeMap::from([label]));
        queue.push(Entry { model: format!("a/{n}"), required_labels, ..entry(n) });
        queue.remove(id(n));
        queue.push(Entry { model: format!("b/{n}"), ..entry(n) });
        assert_eq!(take(&queue, &clock).len(), 1);
    }
    let core = queue.0.core.lock();
    assert!(core.lanes.len() + core.buckets.len() < 10_000);
}

#[tokio::test]
async fn a_nudge_before_the_wait_is_not_lost() {
    let (queue, _) = queue(Limits::default());
    queue.push(entry(1));
    queue.changed().await;
    let mut revocations = queue.revocations().unwrap();
    assert!(queue.revocations().is_none());
    let stop =
        Revocation { task: id(1), attempt: 1, reason: Reason::Cancelled, detail: String::new() };
    queue.revoke(stop.clone());
    assert_eq!(revocations.recv().await, Some(stop));
}
