//! Why a task waits: one dominant reason, its evidence, and what to do about it.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    core::Core,
    model::{Entry, WaitReason, Waiting},
    supply::Profile,
};
use crate::clock::Micros;

impl Core {
    pub(super) fn explain(&self, entry: &Entry, now: Micros) -> Waiting {
        let (id, model) = (entry.id, &entry.model);
        let bucket = self.find_bucket(&entry.namespace, model);
        let mut evidence = BTreeMap::from([("model", model.clone())]);
        let wait = now.since(entry.create_time);
        evidence.insert("waited_ms", wait.as_millis().to_string());

        if let Some(pause) = bucket.and_then(|bucket| self.buckets[bucket].pause.as_ref()) {
            evidence.insert("paused_by", pause.by.clone());
            evidence.insert("pause_reason", pause.reason.clone());
            evidence.insert("pause_time_us", pause.time.0.to_string());
            let why = if pause.reason.is_empty() { "no reason given" } else { &pause.reason };
            let summary = format!("the queue of `{model}` is paused by {} ({why})", pause.by);
            let next = format!("resume it: baton queue resume {model}");
            return waiting(WaitReason::QueuePaused, summary, next, evidence);
        }
        if let Some(time) = entry.not_before.filter(|time| !entry.waited_out && *time > now) {
            let rest = time.since(now);
            evidence.insert("not_before_us", time.0.to_string());
            evidence.insert("remaining_ms", rest.as_millis().to_string());
            evidence.insert("attempts", entry.attempt.to_string());
            let seconds = rest.as_secs_f64();
            return if entry.attempt > 0 {
                let attempt = entry.attempt;
                let summary = format!(
                    "it waits {seconds:.1} s more before it tries again after attempt {attempt}"
                );
                let next = format!("see why the attempt failed: baton task events {id}");
                waiting(WaitReason::Backoff, summary, next, evidence)
            } else {
                let summary = format!("it may start in {seconds:.1} s, as the submit asked");
                waiting(WaitReason::NotBefore, summary, String::new(), evidence)
            };
        }
        self.explain_supply(entry, evidence)
    }

    fn explain_supply(
        &self,
        entry: &Entry,
        mut evidence: BTreeMap<&'static str, String>,
    ) -> Waiting {
        let model = &entry.model;
        let named = entry.version.as_ref().map_or(model.clone(), |v| format!("{model}@{v}"));
        let admitted = || {
            let profiles = self.supplies.candidates(model).map(|id| &self.supplies.profiles[id]);
            profiles.filter(|profile| profile.admits(&entry.namespace))
        };
        let serving =
            || admitted().filter(|profile| profile.serves(model, entry.version.as_deref()));
        let slots = |profiles: &[&Profile]| profiles.iter().map(|p| p.slots).sum::<u32>();

        if serving().next().is_none() {
            let versions: BTreeSet<&str> = admitted().flat_map(|p| p.versions(model)).collect();
            let versions = versions.into_iter().collect::<Vec<_>>().join(", ");
            let summary = if versions.is_empty() {
                format!("no connected runner serves `{named}`")
            } else {
                format!("no connected runner serves `{named}`; connected versions: {versions}")
            };
            if !versions.is_empty() {
                evidence.insert("connected_versions", versions);
            }
            let next = format!(
                "start one: baton runner start --engine openai --upstream http://127.0.0.1:8000/v1 --model {named}"
            );
            return waiting(WaitReason::NoRunnerForModel, summary, next, evidence);
        }
        let matching: Vec<&Profile> = self.matching(entry).collect();
        if matching.is_empty() {
            let labels: Vec<String> =
                entry.required_labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
            let labels = labels.join(", ");
            evidence.insert("required_labels", labels.clone());
            let all: Vec<&Profile> = serving().collect();
            evidence.insert("slots_without_labels", slots(&all).to_string());
            let summary = format!("runners serve `{named}`, but none has the labels {labels}");
            let next = "start a runner with these labels, or submit without them".to_owned();
            return waiting(WaitReason::NoRunnerWithLabels, summary, next, evidence);
        }
        evidence.insert("slots", slots(&matching).to_string());
        let ready: u32 = matching.iter().map(|profile| profile.ready_slots).sum();
        if ready == 0 {
            let summary = format!("every runner that serves `{named}` is draining or paused");
            let next = "wait for them to come back, or start another runner".to_owned();
            return waiting(WaitReason::RunnersDraining, summary, next, evidence);
        }
        let free: u32 = matching.iter().map(|profile| profile.free + profile.far_free).sum();
        let position = self.position(entry);
        evidence.insert("free_slots", free.to_string());
        evidence.insert("queue_position", position.to_string());
        if free > 0 {
            let summary = "it is about to be handed to a runner".to_owned();
            return waiting(WaitReason::Starting, summary, String::new(), evidence);
        }
        let next = "wait, raise its priority, or start more runners".to_owned();
        if position > 1 {
            let ahead = position - 1;
            let tasks = if ahead == 1 { "task is" } else { "tasks are" };
            let summary = format!("all {ready} slots are busy and {ahead} {tasks} ahead");
            return waiting(WaitReason::BehindOthers, summary, next, evidence);
        }
        let summary = format!("it is the next; all {ready} slots are busy");
        waiting(WaitReason::NoFreeSlot, summary, next, evidence)
    }
}

fn waiting(
    reason: WaitReason,
    summary: String,
    next_step: String,
    evidence: BTreeMap<&'static str, String>,
) -> Waiting {
    let evidence = evidence.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
    Waiting { reason, summary, next_step, evidence }
}
