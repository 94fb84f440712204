//! Lanes of a backlog that several servers share: what waits there, and what of it to fetch.
//!
//! The queue of a server that is not alone holds only what is about to start there. All else waits
//! in the backlog, in lanes of one queue, one priority and one kind of runner each. Of each lane
//! the queue knows what comes next and how much there is, a little late. From that and from the
//! free credits it decides what to fetch, by the policy that decides what to start: each profile
//! of runners has a second [`Ring`] for these lanes. No more is fetched than can start at once, so
//! that no task waits at a server whose runners are busy while another's are idle.
//!
//! [`Ring`]: super::policy::Ring

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
};

use super::{
    core::Core,
    delays::{Due, Moment},
    model::{Entry, Fetch, LaneSpec, LaneState, Match},
    policy::{self, Rank},
    slab::Slab,
};
use crate::{clock::Micros, id::TaskId};

/// The lanes of the backlog.
#[derive(Debug, Default)]
pub(super) struct Far {
    lanes: Slab<FarLane>,
    by_name: HashMap<Arc<str>, u32>,
    /// Profiles that were charged for what is being fetched, by lane.
    asked: HashMap<u32, Vec<u32>>,
    /// Tasks that are being accepted and did not find a runner.
    pub aside: HashMap<TaskId, Entry>,
}

#[derive(Debug)]
struct FarLane {
    spec: LaneSpec,
    namespace: u32,
    bucket: u32,
    state: LaneState,
}

impl FarLane {
    /// How many of its tasks have a better rank, when they were accepted evenly between the first
    /// and the last.
    fn before(&self, rank: Rank, step: i64) -> u64 {
        let LaneState { next: Some(first), last: Some(last), waiting, .. } = self.state else {
            return 0;
        };
        let until = policy::create_time_at(rank, self.spec.priority, step);
        let (part, whole) = (until.0.saturating_sub(first.0), last.0.saturating_sub(first.0));
        if part <= 0 {
            return 0;
        }
        if part > whole {
            return waiting;
        }
        (waiting.saturating_sub(1) as f64 * part as f64 / whole as f64).round() as u64
    }
}

impl Core {
    /// Takes over which lanes there are.
    pub(super) fn set_far_lanes(&mut self, specs: Vec<LaneSpec>) {
        let named: HashSet<&Arc<str>> = specs.iter().map(|spec| &spec.name).collect();
        let gone: Vec<u32> = self
            .far
            .by_name
            .iter()
            .filter(|(name, _)| !named.contains(name))
            .map(|(_, id)| *id)
            .collect();
        for id in gone {
            self.remove_far_lane(id);
        }
        for spec in specs {
            if !self.far.by_name.contains_key(&spec.name) {
                self.add_far_lane(spec);
            }
        }
    }

    fn add_far_lane(&mut self, spec: LaneSpec) {
        let namespace = self.namespace(&spec.namespace);
        let bucket = self.bucket(namespace, &spec.model);
        self.require_labels(&spec.required_labels);
        let name = spec.name.clone();
        let state = LaneState::default();
        let id = self.far.lanes.insert(FarLane { spec, namespace, bucket, state });
        self.far.by_name.insert(name, id);
        self.buckets[bucket].far.push(id);
    }

    fn remove_far_lane(&mut self, id: u32) {
        let profiles = self.far_profiles(id);
        let Some(lane) = self.far.lanes.remove(id) else { return };
        for profile in profiles {
            self.supplies.profiles[profile].far.correct(lane.namespace, id, None);
        }
        self.far.by_name.remove(&lane.spec.name);
        self.buckets[lane.bucket].far.retain(|other| *other != id);
        self.release_labels(&lane.spec.required_labels);
    }

    /// Matches tasks that are being accepted, unless others are before them in the backlog; puts
    /// aside what is not matched.
    pub(super) fn place_shared(
        &mut self,
        entries: impl IntoIterator<Item = Entry>,
        now: Moment,
        max: usize,
    ) -> Vec<Match> {
        let mut tried = Vec::new();
        for entry in entries {
            if Due::of(&entry, now).is_some() || self.is_behind(&entry) {
                self.far.aside.insert(entry.id, entry);
            } else {
                tried.push(entry.id);
                self.push(entry, now);
            }
        }
        let matches = if tried.is_empty() { Vec::new() } else { self.take_matches(now, max) };
        for id in tried {
            if let Some(entry) = self.remove(id) {
                self.far.aside.insert(id, entry);
            }
        }
        matches
    }

    /// Whether the runners that would run a task have others in the backlog.
    fn is_behind(&self, entry: &Entry) -> bool {
        let mut free = self.matching(entry).filter(|profile| profile.free > 0).peekable();
        free.peek().is_none() || free.any(|profile| !profile.far.is_empty())
    }

    /// Takes over what a lane holds.
    pub(super) fn set_far_state(&mut self, name: &str, state: LaneState) {
        let Some(id) = self.far.by_name.get(name).copied() else { return };
        self.far.lanes[id].state = state;
        if state.next.is_some() {
            self.offer_far(id);
            return;
        }
        let namespace = self.far.lanes[id].namespace;
        for profile in self.far_profiles(id) {
            self.supplies.profiles[profile].far.correct(namespace, id, None);
        }
    }

    /// Notes that a lane got work; false for a lane that is not known.
    pub(super) fn far_rang(&mut self, name: &str, now: Micros) -> bool {
        let Some(id) = self.far.by_name.get(name).copied() else { return false };
        let state = &mut self.far.lanes[id].state;
        state.waiting += 1;
        state.oldest.get_or_insert(now);
        state.next.get_or_insert(now);
        state.last = Some(now);
        self.offer_far(id);
        true
    }

    /// Tasks of the queue's account, delayed ones included.
    pub(super) fn set_far_depths(&mut self, depths: &HashMap<(String, String), u64>) {
        let ids: Vec<u32> = self.buckets.iter().map(|(id, _)| id).collect();
        for id in ids {
            let bucket = &self.buckets[id];
            let name = self.namespaces[bucket.namespace].name.as_str().to_owned();
            let depth = depths.get(&(name, bucket.model.clone())).copied();
            self.buckets[id].far_depth = depth.unwrap_or(0);
        }
    }

    /// Lanes that have work, as far as is known here.
    #[cfg(test)]
    pub(super) fn far_lanes_with_work(&self) -> usize {
        self.far.lanes.iter().filter(|(_, lane)| lane.state.next.is_some()).count()
    }

    /// Tasks of all queues.
    pub(super) fn far_depth(&self) -> u64 {
        self.buckets.iter().map(|(_, bucket)| bucket.far_depth).sum()
    }

    /// Profiles whose runners can run the lane's tasks.
    fn far_profiles(&self, id: u32) -> Vec<u32> {
        let FarLane { spec, .. } = &self.far.lanes[id];
        let candidates = self.supplies.candidates(&spec.model);
        candidates.filter(|profile| self.can_fetch(*profile, spec)).collect()
    }

    fn can_fetch(&self, profile: u32, spec: &LaneSpec) -> bool {
        let profile = &self.supplies.profiles[profile];
        profile.admits(&spec.namespace)
            && profile.serves(&spec.model, spec.version.as_deref())
            && spec.required_labels.iter().all(|(key, value)| profile.has_label(key, value))
    }

    /// Best rank of a lane that may be served.
    fn far_head(&self, id: u32) -> Option<Rank> {
        let lane = &self.far.lanes[id];
        if self.buckets[lane.bucket].pause.is_some() {
            return None;
        }
        let next = lane.state.next?;
        Some(policy::rank(next, lane.spec.priority, TaskId::MIN, self.step))
    }

    /// Tells all runners that match a lane of its head.
    pub(super) fn offer_far(&mut self, id: u32) {
        for profile in self.far_profiles(id) {
            self.offer_far_to(profile, id);
        }
    }

    fn offer_far_to(&mut self, profile: u32, id: u32) {
        let Some(head) = self.far_head(id) else { return };
        let namespace = self.far.lanes[id].namespace;
        let weight = self.namespaces[namespace].weight;
        self.supplies.profiles[profile].far.offer(namespace, weight, id, head);
    }

    /// Tells a new profile of all lanes.
    pub(super) fn offer_all_far(&mut self, profile: u32) {
        let ids: Vec<u32> = self.far.lanes.iter().map(|(id, _)| id).collect();
        for id in ids {
            if self.can_fetch(profile, &self.far.lanes[id].spec) {
                self.offer_far_to(profile, id);
            }
        }
    }

    /// Decides what to fetch: as much as can start at once, up to `max`. Whoever fetches says what
    /// came with [`fetched`](Self::fetched), lane by lane.
    pub(super) fn plan_fetch(&mut self, max: u32) -> Vec<Fetch> {
        let mut profiles: Vec<(u32, u32)> = self
            .supplies
            .profiles
            .iter()
            .filter(|(_, profile)| profile.free > 0 && !profile.far.is_empty())
            .map(|(id, profile)| (profile.flexibility(), id))
            .collect();
        // Those that can do little first: what they leave, others can do.
        profiles.sort_unstable();
        let mut picked: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        let mut left = max;
        for (_, profile) in profiles {
            let free = self.supplies.profiles[profile].free;
            let free = free.saturating_sub(self.startable(profile)).min(left);
            for _ in 0..free {
                let Some((namespace, lane)) = self.pick_far(profile, &picked) else { break };
                let weight = self.namespaces[namespace].weight;
                self.supplies.profiles[profile].far.charge(namespace, weight);
                picked.entry(lane).or_default().push(profile);
                left -= 1;
            }
        }
        let mut plan = Vec::with_capacity(picked.len());
        for (lane, profiles) in picked {
            let name = self.far.lanes[lane].spec.name.clone();
            plan.push(Fetch { lane: name, most: profiles.len() as u32 });
            self.far.asked.insert(lane, profiles);
        }
        plan
    }

    /// The next lane for the runners of a profile.
    fn pick_far(&mut self, profile: u32, picked: &BTreeMap<u32, Vec<u32>>) -> Option<(u32, u32)> {
        loop {
            let (namespace, lane, noted) = self.supplies.profiles[profile].far.first()?;
            let n_picked = picked.get(&lane).map_or(0, |profiles| profiles.len() as u64);
            let more = n_picked < self.far.lanes[lane].state.waiting.max(1);
            let head = self.far_head(lane).filter(|_| more);
            if head == Some(noted) {
                return Some((namespace, lane));
            }
            self.supplies.profiles[profile].far.correct(namespace, lane, head);
        }
    }

    /// Models whose tasks could start here now, as far as runners name them; `None` for any.
    pub(super) fn startable_models(&self) -> Option<Vec<String>> {
        let mut models = BTreeSet::new();
        for (_, profile) in self.supplies.profiles.iter().filter(|(_, profile)| profile.free > 0) {
            models.extend(profile.models()?.map(str::to_owned));
        }
        Some(models.into_iter().collect())
    }

    /// Lanes whose tasks could start here now, and how many tasks could.
    pub(super) fn fetchable(&self) -> (Vec<Arc<str>>, u32) {
        let free = |id: &u32| self.supplies.profiles[*id].free > 0;
        let lanes = self.far.lanes.iter().filter(|(id, lane)| {
            self.buckets[lane.bucket].pause.is_none() && self.far_profiles(*id).iter().any(free)
        });
        let names = lanes.map(|(_, lane)| lane.spec.name.clone()).collect();
        (names, self.free().saturating_sub(u32::try_from(self.len()).unwrap_or(u32::MAX)))
    }

    /// Says what came of a fetch: what did not come is not charged.
    pub(super) fn fetched(&mut self, name: &str, n_tasks: u32) {
        let Some(lane) = self.far.by_name.get(name).copied() else { return };
        let asked = self.far.asked.remove(&lane).unwrap_or_default();
        let namespace = self.far.lanes[lane].namespace;
        for profile in asked.into_iter().skip(n_tasks as usize) {
            if let Some(profile) = self.supplies.profiles.get_mut(profile) {
                profile.far.refund(namespace);
            }
        }
    }

    /// Tasks here that the runners of a profile can start.
    fn startable(&self, profile: u32) -> u32 {
        if self.entries.is_empty() {
            return 0;
        }
        let profile = &self.supplies.profiles[profile];
        let lanes = profile.classes.iter().flat_map(|class| &self.classes[*class].lanes);
        let lanes = lanes.filter(|(namespace, lane)| {
            profile.admits(&self.namespaces[**namespace].name)
                && self.buckets[self.lanes[**lane].bucket].pause.is_none()
        });
        u32::try_from(lanes.map(|(_, lane)| self.lanes[*lane].len()).sum::<usize>())
            .unwrap_or(u32::MAX)
    }

    /// How many tasks of a bucket wait in the backlog with a better rank.
    pub(super) fn far_before(&self, bucket: u32, rank: Rank) -> u64 {
        let lanes = self.buckets[bucket].far.iter().map(|id| &self.far.lanes[*id]);
        lanes.map(|lane| lane.before(rank, self.step)).sum()
    }

    /// What waits in the backlog for a bucket: startable, delayed, and since when the oldest does.
    pub(super) fn far_counts(&self, bucket: u32) -> (u64, u64, Option<Micros>) {
        let bucket = &self.buckets[bucket];
        let states = || bucket.far.iter().map(|id| &self.far.lanes[*id].state);
        let entries: u64 = states().map(|state| state.entries).sum();
        let waiting = states().map(|state| state.waiting).sum();
        let oldest = states().filter(|state| state.waiting > 0).filter_map(|state| state.oldest);
        (waiting, bucket.far_depth.saturating_sub(entries), oldest.min())
    }
}
