//! The queue's promises, one by one.

mod far;
mod random;

use std::collections::{BTreeMap, HashMap};

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
        waited_out: false,
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

/// Asks for room for a task.
fn admit(queue: &Queue, namespace: &Namespace, model: &str, priority: i32) -> Result<Admission> {
    let (namespace, model) = (namespace.clone(), model.to_owned());
    let asked = Asked { task: id(99), namespace, model, priority };
    futures_executor::block_on(queue.admit(asked))
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
    clock.advance(Duration::from_secs(11));
    assert_eq!(take(&queue, &clock), [0_u64; 0], "no runner yet");
    clock.set_wall(EPOCH);
    ready(&queue, runner(1, &["*"], 1), 1);
    assert_eq!(take(&queue, &clock), [0_u64; 0]);
    clock.set_wall(due);
    assert_eq!(take(&queue, &clock), [1]);
}

#[test]
fn a_backoff_lasts_as_long_as_it_was_to_last_wherever_the_wall_clock_is_set() {
    let (queue, clock) = queue(Limits::default());
    ready(&queue, runner(1, &["*"], 4), 4);
    let retry = |n, clock: &Clock| {
        let due = clock.now() + Duration::from_secs(10);
        Entry { not_before: Some(due), attempt: 1, ..entry(n) }
    };
    clock.set_wall(EPOCH + Duration::from_hours(2));
    queue.push(retry(1, &clock));
    clock.set_wall(EPOCH);
    clock.advance(Duration::from_secs(5));
    // Set back once, the clock is no measure for those that come later either.
    queue.push(retry(2, &clock));
    assert_eq!(take(&queue, &clock), [0_u64; 0]);
    clock.set_wall(EPOCH + Duration::from_hours(1));
    assert_eq!(take(&queue, &clock), [0_u64; 0], "ahead of both by the wall clock");
    clock.advance(Duration::from_secs(5));
    let matches = queue.take_matches(clock.now(), 9);
    assert_eq!(matches.len(), 1);
    let Entry { id: first, waited_out, .. } = matches[0].entry;
    assert_eq!((first, waited_out), (id(1), true));
    // What came to nothing does not wait again.
    clock.set_wall(EPOCH);
    queue.push(matches[0].entry.clone());
    queue.give_back(matches[0].runner);
    assert_eq!(take(&queue, &clock), [1]);
    clock.advance(Duration::from_secs(5));
    assert_eq!(take(&queue, &clock), [2]);
}

#[test]
fn a_full_queue_refuses_and_says_so() {
    let (queue, _) = queue(Limits { max_per_model: 2, max_per_namespace: 3, ..Limits::default() });
    let ns = Namespace::from("default");
    for n in 0..2 {
        let admission = admit(&queue, &ns, "a/m", 0).unwrap();
        queue.push(entry(n));
        admission.done(id(99));
    }
    let error = admit(&queue, &ns, "a/m", 100).unwrap_err();
    assert_eq!(error.reason(), Reason::QueueFull);
    assert!(error.metadata().contains(&("policy_label", "queue.per_model".into())));
    assert!(error.retry_delay().is_some());
    let held = admit(&queue, &ns, "b/m", 0).unwrap();
    let error = admit(&queue, &ns, "b/m", 0).unwrap_err();
    assert!(error.metadata().contains(&("policy_label", "queue.per_namespace".into())));
    drop(held);
    let other = admit(&queue, &Namespace::from("x"), "a/m", 0).unwrap();
    assert_eq!(other.evict(), None, "another namespace's queue is its own");
    admit(&queue, &ns, "b/m", 0).unwrap().done(id(99));
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
    let admission = admit(&queue, &ns, "a/m", 0).unwrap();
    assert_eq!(admission.evict(), Some(id(2)));
    drop(admission);
    assert!(queue.contains(id(2)), "an admission that came to nothing evicts nothing");
    let admission = admit(&queue, &ns, "a/m", 0).unwrap();
    queue.push(entry(4));
    admission.done(id(99));
    assert!(!queue.contains(id(2)) && queue.len() == 3);
    let error = admit(&queue, &ns, "a/m", -1).unwrap_err();
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
    let wanted = Entry { deadline: Some(clock.now() + Duration::from_mins(1)), ..entry(100) };
    assert_eq!(queue.estimate(&wanted).predicted_start, None, "nobody serves it");
    ready(&queue, runner(1, &["a/m"], 4), 4);
    let estimate = queue.estimate(&wanted);
    assert_eq!(estimate.predicted_start, Some(Duration::ZERO), "a slot is free");
    assert_eq!(estimate.on_time_probability, None, "nothing was measured");
    queue.runner_credits(SupplyKey(1), 0, SupplyState::Ready);
    queue.push_all((0..19).map(entry));
    assert_eq!(queue.estimate(&wanted).predicted_start, None);
    for _ in 0..50 {
        queue.started(&ns, "a/m", id(0));
        queue.finished("a/m", id(0), Duration::from_secs(10), true);
    }
    let estimate = queue.estimate(&wanted);
    assert_eq!(estimate.position, 20);
    assert_eq!(estimate.predicted_start, Some(Duration::from_secs(50)), "20 ends at 4 per 10 s");
    let late = Entry { deadline: Some(clock.now() + Duration::from_secs(30)), ..wanted.clone() };
    let early = Entry { deadline: Some(clock.now() + Duration::from_mins(5)), ..wanted.clone() };
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
    let why = |n| queue.explain(&entry(n)).unwrap().reason;
    queue.push(entry(1));
    assert_eq!(why(1), WaitReason::NoRunnerForModel);
    ready(&queue, runner(1, &["a/m@1"], 1), 0);
    queue.push(Entry { version: Some("2".into()), ..entry(2) });
    assert_eq!(why(2), WaitReason::NoRunnerForModel);
    assert_eq!(queue.explain(&entry(2)).unwrap().evidence["connected_versions"], "1");
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
    let waiting = queue.explain(&entry(1)).unwrap();
    assert_eq!(waiting.reason, WaitReason::QueuePaused);
    assert!(waiting.summary.contains("maintenance") && waiting.next_step.contains("resume"));
    assert_eq!(queue.explain(&entry(77)), None);
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
    queue.started(&ns, "a/m", id(0));
    queue.resumed(&ns, "a/m", id(0));
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
