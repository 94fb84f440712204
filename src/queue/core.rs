//! The queue's state, without locks or clocks.

use std::{collections::HashMap, time::Duration};

use super::model::{
    Entry, Estimate, Limits, Match, Pause, QueueStats, RunnerSupply, SupplyKey, SupplyState,
    Waiting,
};
use crate::{
    clock::{Micros, Mono},
    error::Result,
    id::{Namespace, TaskId},
};

/// The queue's state.
#[derive(Debug)]
#[expect(dead_code, reason = "filled in next")]
pub(super) struct Core {
    limits: Limits,
    entries: HashMap<TaskId, Entry>,
}

#[expect(clippy::unused_self, clippy::needless_pass_by_ref_mut, reason = "filled in next")]
impl Core {
    pub(super) fn new(limits: Limits) -> Self {
        Self { limits, entries: HashMap::new() }
    }
    #[expect(clippy::unnecessary_wraps, reason = "filled in next")]
    pub(super) fn admit(&mut self, _: &Namespace, _: &str, _: i32) -> Result<Option<Entry>> {
        Ok(None)
    }
    pub(super) fn release(&mut self, _: &Namespace, _: &str) {}
    pub(super) fn push(&mut self, entry: Entry, _: Micros) {
        self.entries.insert(entry.id, entry);
    }
    pub(super) fn remove(&mut self, id: TaskId) -> Option<Entry> {
        self.entries.remove(&id)
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
    pub(super) fn set_paused(&mut self, _: &Namespace, _: &str, _: Option<Pause>) {}
    pub(super) fn runner_up(&mut self, _: RunnerSupply) {}
    pub(super) fn runner_credits(&mut self, _: SupplyKey, _: u32, _: SupplyState) {}
    pub(super) fn assigned(&mut self, _: SupplyKey, _: u32, _: SupplyState) {}
    pub(super) fn give_back(&mut self, _: SupplyKey) {}
    pub(super) fn runner_down(&mut self, _: SupplyKey) {}
    pub(super) fn next_delayed(&self) -> Option<Micros> {
        None
    }
    pub(super) fn take_matches(&mut self, _: Micros, _: usize) -> Vec<Match> {
        Vec::new()
    }
}
