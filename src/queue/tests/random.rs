//! Random histories against a brute-force reading of the promises.

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;

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
            for _ in 0..rate {
                push(high);
            }
            queue.runner_credits(SupplyKey(1), rate as u32, SupplyState::Ready);
            let started = take(&queue, &clock);
            for _ in &started {
                queue.assigned(SupplyKey(1), 0, SupplyState::Ready);
            }
            if started.contains(&1) {
                break;
            }
            clock.advance(Duration::from_secs(1));
            waited += 1;
            prop_assert!(waited <= high - low + 2, "starved");
        }
    }

    /// Nobody starves: whatever keeps coming, from whomever, a task starts once those of its own
    /// namespace that rank before it have had the namespace's share.
    #[test]
    fn a_task_waits_no_longer_than_its_rank_and_its_share_explain(
        weights in prop::collection::vec(1_u32..5, 2..5),
        before in prop::collection::vec((any::<usize>(), any::<bool>(), -5_i32..=5), 0..60),
        flood in prop::collection::vec((any::<usize>(), any::<bool>(), -5_i32..=5), 1..40),
        own in any::<usize>(),
        priority in -5_i32..=5,
        per_tick in 1_usize..5,
        free in 1_u32..6,
    ) {
        const STEP: Duration = Duration::from_secs(1);
        let name = |n: usize| Namespace::from(format!("ns{n}"));
        let by_name = weights.iter().enumerate().map(|(n, w)| (name(n), *w)).collect();
        let (queue, clock) = queue(Limits { weights: by_name, ageing_step: STEP, ..Limits::default() });
        ready(&queue, runner(1, &["*"], 8), 0);
        let own = own % weights.len();
        let rank = |create_time: Micros, priority: i32, n: u64| {
            (create_time.0 - i64::from(priority) * STEP.as_micros() as i64, id(n))
        };
        let marked = before.len() as u64 + 1;
        let marked_rank = rank(clock.now(), priority, marked);
        let mut n = 0;
        // Adds a task; 1 when it ranks before the marked one in its namespace.
        let mut push = |(namespace, other, priority): (usize, bool, i32)| {
            n += 1;
            let namespace = namespace % weights.len();
            let (create_time, model) = (clock.now(), if other { "b/m" } else { "a/m" });
            queue.push(Entry {
                namespace: name(namespace),
                model: model.into(),
                priority,
                create_time,
                ..entry(n)
            });
            u32::from(namespace == own && rank(create_time, priority, n) < marked_rank)
        };
        let mut n_ahead: u32 = before.into_iter().map(&mut push).sum();
        push((own, false, priority));
        let mut flood = flood.into_iter().cycle();
        let mut n_served = 0;
        loop {
            queue.runner_credits(SupplyKey(1), free, SupplyState::Ready);
            let started = take(&queue, &clock);
            n_served += started.len();
            for _ in &started {
                queue.assigned(SupplyKey(1), 0, SupplyState::Ready);
            }
            if started.contains(&marked) {
                break;
            }
            // Its share of all services, and a turn of each namespace to begin and to end with.
            let share = f64::from(weights.iter().sum::<u32>()) / f64::from(weights[own]);
            let explained = f64::from(n_ahead + 2) * share + 2.0 * weights.len() as f64;
            prop_assert!(n_served as f64 <= explained, "{n_served} were served before it");
            clock.advance(STEP);
            n_ahead += flood.by_ref().take(per_tick).map(&mut push).sum::<u32>();
        }
    }
}
