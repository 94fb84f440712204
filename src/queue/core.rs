//! The queue's state, without locks or clocks.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    time::Duration,
};

use super::model::{
    Entry, Estimate, Limits, Match, Pause, QueueStats, RunnerSupply, SupplyKey, SupplyState,
    Waiting,
};
use crate::{
    clock::{Micros, Mono},
    error::Result,
    id::{Namespace, TaskId},
};

#[derive(Debug)]
struct Runner {
    supply: RunnerSupply,
    free: u32,
    in_flight: u32,
    state: SupplyState,
}

/// The queue's state.
#[derive(Debug)]
pub(super) struct Core {
    limits: Limits,
    entries: HashMap<TaskId, Entry>,
    order: BTreeSet<(i64, TaskId)>,
    runners: BTreeMap<SupplyKey, Runner>,
    pauses: HashMap<(Namespace, String), Pause>,
}

#[expect(clippy::unused_self, clippy::needless_pass_by_ref_mut, reason = "to be measured")]
impl Core {
    pub(super) fn new(limits: Limits) -> Self {
        let (entries, order, runners, pauses) = Default::default();
        Self { limits, entries, order, runners, pauses }
    }
    fn rank(&self, entry: &Entry) -> (i64, TaskId) {
        let step = self.limits.ageing_step.as_micros() as i64;
        (entry.create_time.0 - i64::from(entry.priority) * step, entry.id)
    }
    #[expect(clippy::unnecessary_wraps, reason = "to be bounded")]
    pub(super) fn admit(&mut self, _: &Namespace, _: &str, _: i32) -> Result<Option<Entry>> {
        Ok(None)
    }
    pub(super) fn release(&mut self, _: &Namespace, _: &str) {}
    pub(super) fn push(&mut self, entry: Entry, _: Micros) {
        self.remove(entry.id);
        self.order.insert(self.rank(&entry));
        self.entries.insert(entry.id, entry);
    }
    pub(super) fn remove(&mut self, id: TaskId) -> Option<Entry> {
        let entry = self.entries.remove(&id)?;
        self.order.remove(&self.rank(&entry));
        Some(entry)
    }
    pub(super) fn contains(&self, id: TaskId) -> bool {
        self.entries.contains_key(&id)
    }
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }
    pub(super) fn started(&mut self, _: &Namespace, _: &str, _: Duration, _: Mono) {}
    pub(super) fn resumed(&mut self, _: &Namespace, _: &str) {}
    pub(super) fn finished(&mut self, _: &Namespace, _: &str, _: Duration, _: bool) {}
    pub(super) fn estimate(&self, _: &Entry, _: Micros) -> Estimate {
        Estimate::default()
    }
    pub(super) fn explain(&self, _: TaskId, _: Micros) -> Option<Waiting> {
        None
    }
    pub(super) fn stats(&self, _: &Namespace, model: &str, _: Micros, _: Mono) -> QueueStats {
        QueueStats { model: model.into(), ..QueueStats::default() }
    }
    pub(super) fn list(&self, _: &Namespace, _: Micros, _: Mono) -> Vec<QueueStats> {
        Vec::new()
    }
    pub(super) fn set_paused(&mut self, ns: &Namespace, model: &str, pause: Option<Pause>) {
        let key = (ns.clone(), model.to_owned());
        match pause {
            Some(pause) => self.pauses.insert(key, pause),
            None => self.pauses.remove(&key),
        };
    }
    pub(super) fn runner_up(&mut self, supply: RunnerSupply) {
        let state = SupplyState::Ready;
        self.runners.insert(supply.key, Runner { supply, free: 0, in_flight: 0, state });
    }
    pub(super) fn runner_credits(&mut self, key: SupplyKey, free: u32, state: SupplyState) {
        if let Some(runner) = self.runners.get_mut(&key) {
            (runner.free, runner.state) = (free, state);
        }
    }
    pub(super) fn assigned(&mut self, key: SupplyKey, free: u32, state: SupplyState) {
        self.runner_credits(key, free, state);
        self.give_back(key);
    }
    pub(super) fn give_back(&mut self, key: SupplyKey) {
        if let Some(runner) = self.runners.get_mut(&key) {
            runner.in_flight = runner.in_flight.saturating_sub(1);
        }
    }
    pub(super) fn runner_down(&mut self, key: SupplyKey) {
        self.runners.remove(&key);
    }
    pub(super) fn next_delayed(&self) -> Option<Micros> {
        None
    }
    pub(super) fn take_matches(&mut self, now: Micros, max: usize) -> Vec<Match> {
        let mut matches = Vec::new();
        let order: Vec<_> = self.order.iter().map(|(_, id)| *id).collect();
        for id in order {
            let free = |r: &Runner| r.state == SupplyState::Ready && r.free > r.in_flight;
            if matches.len() >= max || !self.runners.values().any(free) {
                break;
            }
            let entry = &self.entries[&id];
            let paused = self.pauses.contains_key(&(entry.namespace.clone(), entry.model.clone()));
            if paused || entry.not_before.is_some_and(|at| now < at) {
                continue;
            }
            let fits = |r: &Runner| {
                free(r)
                    && (r.supply.namespace.as_str() == Namespace::DEFAULT
                        || r.supply.namespace == entry.namespace)
                    && r.supply
                        .models
                        .iter()
                        .any(|m| m.matches(&entry.model, entry.version.as_deref()))
                    && entry.required_labels.iter().all(|(k, v)| r.supply.labels.get(k) == Some(v))
            };
            let Some((key, runner)) = self.runners.iter_mut().find(|(_, r)| fits(r)) else {
                continue;
            };
            runner.in_flight += 1;
            let runner = *key;
            matches.extend(self.remove(id).map(|entry| Match { entry, runner }));
        }
        matches
    }
}
