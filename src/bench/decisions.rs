//! The dispatch policy without anything around it: how long one decision takes while a million
//! tasks wait for ten thousand runners.

use std::{collections::BTreeMap, sync::Arc};

use serde::{Deserialize, Serialize};

use super::process::{now_ns, rss_kib};
use crate::{
    clock::{Clock, Micros},
    id::{Entropy, Namespace, RunnerId, TaskId},
    queue::{Entry, Limits, ModelPattern, Queue, RunnerSupply, SupplyKey, SupplyState},
};

/// The size of the case.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Spec {
    /// Runners, of four slots each.
    pub runners: u64,
    /// Tasks that wait.
    pub tasks: usize,
    /// Decisions to make.
    pub decisions: usize,
}

/// What came of it.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Outcome {
    /// One decision, its share of everything included, in microseconds.
    pub decision_us: f64,
    /// Adding one task, in microseconds.
    pub push_us: f64,
    /// Memory of the queue per waiting task, in bytes.
    pub bytes_per_task: f64,
    /// Longest single call of `take_matches` with up to 64 matches, in microseconds.
    pub longest_us: f64,
}

const MODELS: u64 = 100;
const NAMESPACES: usize = 20;
const SLOTS: u32 = 4;

/// Fills a queue, then lets runners come free one by one in a scattered order.
pub fn run(spec: Spec) -> Outcome {
    let clock = Clock::system();
    let entropy = Entropy::seeded(7);
    let limits =
        Limits { max_per_model: u64::MAX, max_per_namespace: u64::MAX, ..Limits::default() };
    let queue = Queue::new(limits, clock.clone());
    let namespaces: Vec<Namespace> =
        (0..NAMESPACES).map(|at| Namespace::from(format!("team-{at}"))).collect();
    let labels = Arc::new(BTreeMap::new());
    let before = rss_kib(std::process::id());
    let now = clock.now();
    let entries: Vec<Entry> = (0..spec.tasks)
        .map(|at| Entry {
            id: TaskId::new(now, &entropy),
            namespace: namespaces[at % NAMESPACES].clone(),
            model: format!("bench/model-{}", (at as u64 * 7919) % MODELS),
            version: None,
            required_labels: Arc::clone(&labels),
            priority: (at % 5) as i32,
            create_time: Micros(now.0 - ((spec.tasks - at) as i64)),
            not_before: None,
            deadline: None,
            session: None,
            attempt: 0,
            waited_out: false,
        })
        .collect();
    let start = now_ns();
    for entry in entries {
        queue.push(entry);
    }
    let push_us = (now_ns() - start) as f64 / 1e3 / spec.tasks as f64;
    let grown = rss_kib(std::process::id()).saturating_sub(before);

    for key in 0..spec.runners {
        queue.runner_up(RunnerSupply {
            key: SupplyKey(key),
            namespace: Namespace::from("default"),
            models: vec![ModelPattern::parse(&format!("bench/model-{}", key % MODELS))],
            labels: BTreeMap::new(),
            slots: SLOTS,
            runner: RunnerId::from(format!("runner-{key}")),
        });
        queue.runner_credits(SupplyKey(key), 0, SupplyState::Ready);
    }
    let (mut made, mut spent, mut longest) = (0, 0, 0);
    let mut next = 0_u64;
    while made < spec.decisions {
        let start = now_ns();
        for _ in 0..16 {
            // A stride that shares no factor with the number of runners visits all of them.
            next = (next + 7919) % spec.runners;
            queue.runner_credits(SupplyKey(next), SLOTS, SupplyState::Ready);
        }
        let one = now_ns();
        let matches = queue.take_matches(clock.now(), 64);
        let done = now_ns();
        longest = longest.max(done - one);
        if matches.is_empty() {
            break;
        }
        for found in &matches {
            queue.assigned(found.runner, 0, SupplyState::Ready);
        }
        spent += now_ns() - start;
        made += matches.len();
    }
    Outcome {
        decision_us: spent as f64 / 1e3 / made.max(1) as f64,
        push_us,
        bytes_per_task: grown as f64 * 1024.0 / spec.tasks as f64,
        longest_us: longest as f64 / 1e3,
    }
}
