//! Promises about what is fetched from a backlog that servers share.

use std::collections::HashMap;

use super::*;

fn shared(limits: Limits) -> (Queue, Inlet, Clock) {
    let clock = Clock::manual();
    let admit: Arc<Admit> = Arc::new(|_| Box::pin(async { Ok(None) }));
    let (queue, inlet) = Queue::shared(limits, clock.clone(), admit);
    (queue, inlet, clock)
}

fn lane(namespace: &str, model: &str, priority: i32) -> LaneSpec {
    LaneSpec {
        name: format!("{namespace}/{model}:any:{priority}").into(),
        namespace: Namespace::from(namespace),
        model: model.into(),
        version: None,
        required_labels: Arc::default(),
        priority,
    }
}

fn holds(waiting: u64, since_ms: u64) -> LaneState {
    let since = EPOCH + Duration::from_millis(since_ms);
    let (next, last) = (Some(since), Some(since + Duration::from_secs(1)));
    LaneState { next, last, waiting, entries: waiting, oldest: Some(since) }
}

/// What is planned, by lane.
fn plan(queue: &Queue) -> HashMap<String, u32> {
    let fetches = queue.plan_fetch(1000);
    fetches.into_iter().map(|fetch| (fetch.lane.to_string(), fetch.most)).collect()
}

#[test]
fn no_more_is_fetched_than_can_start() {
    let (queue, _inlet, clock) = shared(Limits::default());
    let (mine, other) = (lane("default", "a/m", 0), lane("default", "b/m", 0));
    queue.set_far_lanes(vec![mine.clone(), other.clone()]);
    queue.set_far_states([(&*mine.name, holds(100, 0)), (&*other.name, holds(100, 0))]);
    assert_eq!(plan(&queue), [].into(), "without runners");
    ready(&queue, runner(1, &["a/m"], 8), 3);
    assert_eq!(plan(&queue), [(mine.name.to_string(), 3)].into());
    queue.fetched(&mine.name, 2);
    queue.push_all([entry(1), entry(2)]);
    assert_eq!(plan(&queue), [(mine.name.to_string(), 1)].into(), "two are about to start");
    queue.fetched(&mine.name, 0);
    assert_eq!(queue.take_matches(clock.now(), 9).len(), 2);
    assert_eq!(plan(&queue), [(mine.name.to_string(), 1)].into());
    queue.fetched(&mine.name, 0);
    queue.set_far_states([(&*mine.name, LaneState::default())]);
    assert_eq!(plan(&queue), [].into(), "it is empty");
    assert!(queue.far_rang(&mine.name));
    assert!(!queue.far_rang("default/c/m:any:0"));
    assert_eq!(plan(&queue), [(mine.name.to_string(), 1)].into(), "it rang");
    queue.set_far_lanes(vec![other.clone()]);
    assert_eq!(plan(&queue), [].into(), "it is gone");
}

#[test]
fn more_urgent_lanes_come_first_until_age_makes_up_for_it() {
    let (queue, _inlet, _) = shared(Limits::default());
    let lanes = [lane("default", "a/m", 0), lane("default", "a/m", 1)];
    queue.set_far_lanes(lanes.to_vec());
    ready(&queue, runner(1, &["a/m"], 8), 1);
    let [low, high] = lanes.map(|lane| lane.name);
    queue.set_far_states([(&*low, holds(5, 0)), (&*high, holds(5, 29_000))]);
    assert_eq!(plan(&queue), [(high.to_string(), 1)].into());
    queue.fetched(&high, 0);
    queue.set_far_states([(&*high, holds(5, 31_000))]);
    assert_eq!(plan(&queue), [(low.to_string(), 1)].into());
}

#[test]
fn namespaces_are_fetched_by_weight() {
    let weights = [(Namespace::from("heavy"), 3)].into();
    let (queue, _inlet, _) = shared(Limits { weights, ..Limits::default() });
    let lanes = [lane("heavy", "a/m", 0), lane("light", "a/m", 0)];
    queue.set_far_lanes(lanes.to_vec());
    ready(&queue, runner(1, &["a/m"], 400), 40);
    let [heavy, light] = lanes.map(|lane| lane.name);
    let full = || queue.set_far_states([(&*heavy, holds(999, 0)), (&*light, holds(999, 0))]);
    full();
    let planned = plan(&queue);
    assert!((29..=31).contains(&planned[&*heavy]), "{planned:?}");
}

#[test]
fn what_did_not_come_is_not_charged() {
    let (queue, _inlet, _) = shared(Limits::default());
    let lanes = [lane("one", "a/m", 0), lane("other", "a/m", 0)];
    queue.set_far_lanes(lanes.to_vec());
    ready(&queue, runner(1, &["a/m"], 4), 1);
    let [one, other] = lanes.map(|lane| lane.name);
    let next = || {
        queue.set_far_states([(&*one, holds(9, 0)), (&*other, holds(9, 0))]);
        plan(&queue).into_keys().next().unwrap()
    };
    let first = next();
    queue.fetched(&first, 0);
    assert_eq!(next(), first, "its turn still");
    queue.fetched(&first, 1);
    assert_ne!(next(), first);
}

#[test]
fn a_place_is_counted_over_the_backlog() {
    let (queue, _inlet, _) = shared(Limits::default());
    let lanes = [lane("default", "a/m", 0), lane("default", "a/m", 1), lane("other", "a/m", 0)];
    queue.set_far_lanes(lanes.to_vec());
    for lane in &lanes {
        queue.set_far_states([(&*lane.name, holds(11, 1_000))]);
    }
    let place = |n, priority| queue.estimate(&Entry { priority, ..entry(n) }).position;
    assert_eq!(place(2_000, 0), 11 + 11, "the last of its lane, behind the more urgent");
    assert_eq!(place(2_001, 0), 11 + 12, "a new one");
    assert_eq!(place(1_500, 0), 11 + 6);
    assert_eq!(place(1_000, 1), 1);
    assert_eq!(place(1_000, -1), 23);
    let stats = queue.stats(&Namespace::from("default"), "a/m");
    assert_eq!((stats.depth, stats.delayed), (22, 0));
    let depths = [(("default".to_owned(), "a/m".to_owned()), 25)].into();
    queue.set_far_depths(&depths);
    let stats = queue.stats(&Namespace::from("default"), "a/m");
    assert_eq!((stats.depth, stats.delayed), (22, 3));
    assert_eq!(queue.waiting(), 25);
}

#[test]
fn labels_versions_and_pauses_decide_what_is_fetched() {
    let (queue, _inlet, _) = shared(Limits::default());
    let required = LaneSpec {
        name: "labelled".into(),
        required_labels: Arc::new(labels(&[("gpu", "h100")])),
        ..lane("default", "a/m", 0)
    };
    let version =
        LaneSpec { name: "version".into(), version: Some("2".into()), ..lane("default", "a/m", 0) };
    let secret = LaneSpec { name: "other".into(), ..lane("other", "a/m", 0) };
    ready(&queue, runner(1, &["a/m@1"], 4), 4);
    queue.set_far_lanes(vec![required, version, secret]);
    let full = || {
        queue.set_far_states(["labelled", "version", "other"].map(|name| (name, holds(1, 0))));
    };
    full();
    // Runners of `default` serve every namespace.
    assert_eq!(plan(&queue), [("other".to_owned(), 1)].into());
    queue.fetched("other", 0);
    let gpu = RunnerSupply { labels: labels(&[("gpu", "h100")]), ..runner(2, &["a/m@2"], 4) };
    let home = Namespace::from("mine");
    ready(&queue, RunnerSupply { namespace: home, ..runner(3, &["a/m"], 4) }, 4);
    ready(&queue, gpu, 4);
    full();
    assert_eq!(plan(&queue).len(), 3);
    let pause = Pause { by: "me".into(), reason: String::new(), time: EPOCH };
    queue.set_paused(&Namespace::from("default"), "a/m", Some(pause));
    full();
    assert_eq!(plan(&queue), [("other".to_owned(), 1)].into());
    queue.set_paused(&Namespace::from("default"), "a/m", None);
    assert_eq!(plan(&queue).len(), 2, "what was paused, again");
}

#[test]
fn what_is_accepted_starts_at_once_unless_others_are_before_it() {
    let (queue, mut inlet, clock) = shared(Limits::default());
    ready(&queue, runner(1, &["a/m"], 8), 2);
    assert_eq!(queue.place([entry(1)], 9).len(), 1);
    queue.accepted(id(1));
    assert!(inlet.told.try_recv().is_err(), "it starts");
    let spec = lane("default", "a/m", 0);
    queue.set_far_lanes(vec![spec.clone()]);
    queue.set_far_states([(&*spec.name, holds(1, 0))]);
    assert_eq!(queue.place([entry(2)], 9).len(), 0);
    assert_eq!(queue.take_matches(clock.now(), 9).len(), 0, "nobody takes it before the commit");
    queue.accepted(id(2));
    assert_eq!(inlet.told.try_recv().unwrap(), Told::Waits(Box::new(entry(2))));
    queue.set_far_states([(&*spec.name, LaneState::default())]);
    let tomorrow = Some(clock.now() + Duration::from_hours(24));
    let later = Entry { not_before: tomorrow, ..entry(3) };
    assert_eq!(queue.place([entry(4), later, entry(5)], 9).len(), 1);
    // The commit failed.
    assert!(queue.remove(id(3)) && queue.remove(id(5)));
    queue.accepted(id(3));
    assert!(inlet.told.try_recv().is_err());
    assert!(queue.is_empty());
}

#[test]
fn runners_elsewhere_count_and_get_nothing_from_here() {
    let (queue, _inlet, clock) = shared(Limits::default());
    let there = shared(Limits::default()).0;
    let labelled = RunnerSupply { labels: labels(&[("gpu", "h100")]), ..runner(1, &["a/m"], 4) };
    ready(&there, labelled, 3);
    ready(&there, runner(2, &["a/m"], 2), 0);
    there.started(&Namespace::from("default"), "a/m", id(7));
    let told = serde_json::to_vec(&there.report()).unwrap();
    let told = serde_json::from_slice(&told).unwrap();
    queue.set_elsewhere(&[("there".to_owned(), told)].into());
    let namespace = Namespace::from("default");
    let stats = queue.stats(&namespace, "a/m");
    assert_eq!((stats.slots, stats.free_slots, stats.running), (6, 3, 1));
    queue.push(entry(1));
    assert_eq!(queue.take_matches(clock.now(), 9).len(), 0);
    assert_eq!(queue.free(), 0);
    assert_eq!(queue.explain(&entry(1)).unwrap().reason, WaitReason::Starting);
    let needs = Entry { required_labels: Arc::new(labels(&[("gpu", "a100")])), ..entry(2) };
    assert_eq!(queue.explain(&needs).unwrap().reason, WaitReason::NoRunnerWithLabels);
    assert_eq!(queue.report().runners, [], "what others told is not told again");
    queue.set_elsewhere(&HashMap::new());
    assert_eq!(queue.stats(&namespace, "a/m").slots, 0);
    assert_eq!(queue.explain(&entry(1)).unwrap().reason, WaitReason::NoRunnerForModel);
}
