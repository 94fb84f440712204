//! Runners by what they serve.
//!
//! Runners with the same namespace, models and labels form a profile; only labels that some
//! class requires count, so that a label that tells every runner from every other, such as a
//! host name, makes no profile of its own.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use super::{
    core::Core,
    model::{ModelPattern, RunnerSupply, SupplyKey, SupplyState},
    policy::{self, Ring},
    slab::Slab,
};
use crate::id::{Namespace, RunnerId};

/// A label.
type Label = (String, String);

/// What makes runners alike.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Spec {
    namespace: Namespace,
    models: Vec<ModelPattern>,
    labels: Vec<Label>,
}

/// Runners that are alike.
#[derive(Debug)]
pub(super) struct Profile {
    spec: Spec,
    /// Connected runners.
    members: u32,
    /// Slots of all.
    pub slots: u32,
    /// Slots of those that are ready.
    pub ready_slots: u32,
    /// Free credits.
    pub free: u32,
    /// Free credits of runners at other servers.
    pub far_free: u32,
    /// Runners with free credits: load, when last served, key.
    idle: BTreeSet<(u32, u64, SupplyKey)>,
    /// Classes that they serve.
    pub classes: HashSet<u32>,
    /// What is next here.
    pub ring: Ring,
    /// What is next in the backlog.
    pub far: Ring,
    /// Its key among the active ones.
    active: Option<Active>,
}

/// Load of its best runner, how much else it could do, id.
type Active = (u32, u32, u32);

impl Profile {
    /// How much the runners can do; those that can do little are served first.
    pub(super) fn flexibility(&self) -> u32 {
        let any = self.spec.models.contains(&ModelPattern::Any);
        if any { u32::MAX } else { self.spec.models.len() as u32 }
    }

    /// Whether tasks of the namespace may run there.
    pub(super) fn admits(&self, namespace: &Namespace) -> bool {
        self.spec.namespace.as_str() == Namespace::DEFAULT || self.spec.namespace == *namespace
    }

    /// Whether a model may run there.
    pub(super) fn serves(&self, model: &str, version: Option<&str>) -> bool {
        self.spec.models.iter().any(|pattern| pattern.matches(model, version))
    }

    /// The models that are named there; `None` for any.
    pub(super) fn models(&self) -> Option<impl Iterator<Item = &str>> {
        let any = self.spec.models.contains(&ModelPattern::Any);
        (!any).then(|| self.spec.models.iter().filter_map(ModelPattern::model))
    }

    /// Versions of a model that are named there.
    pub(super) fn versions<'a>(&'a self, model: &'a str) -> impl Iterator<Item = &'a str> {
        self.spec.models.iter().filter_map(move |pattern| match pattern {
            ModelPattern::Version(own, version) if own == model => Some(version.as_str()),
            _ => None,
        })
    }

    pub(super) fn has_label(&self, key: &str, value: &str) -> bool {
        let found = self.spec.labels.binary_search_by(|(k, v)| (&**k, &**v).cmp(&(key, value)));
        found.is_ok()
    }
}

/// A runner.
#[derive(Debug)]
pub(super) struct Supply {
    pub profile: u32,
    namespace: Namespace,
    models: Vec<ModelPattern>,
    labels: BTreeMap<String, String>,
    pub slots: u32,
    /// Slots that take work, of runners at another server.
    ready_slots: u32,
    /// Whether it stands for runners at another server.
    pub far: bool,
    pub runner: RunnerId,
    /// As announced.
    free: u32,
    /// Matches between decision and assignment.
    in_flight: u32,
    pub state: SupplyState,
    /// When it was last served, in decisions.
    served: u64,
    /// How the profile counts it now.
    counted: Counted,
}

#[derive(Clone, Copy, Debug, Default)]
struct Counted {
    idle: Option<(u32, u64)>,
    free: u32,
    far_free: u32,
    ready_slots: u32,
}

impl Supply {
    /// What it says of itself: namespace, models and labels.
    pub(super) fn kind(&self) -> (&Namespace, &[ModelPattern], &BTreeMap<String, String>) {
        (&self.namespace, &self.models, &self.labels)
    }

    /// Credits that a match may take.
    pub(super) fn available(&self) -> u32 {
        match self.state {
            SupplyState::Ready => self.free.saturating_sub(self.in_flight),
            SupplyState::Draining | SupplyState::Paused => 0,
        }
    }
}

/// All runners.
#[derive(Debug, Default)]
pub(super) struct Supplies {
    pub by_key: HashMap<SupplyKey, Supply>,
    pub profiles: Slab<Profile>,
    ids: HashMap<Spec, u32>,
    by_model: HashMap<String, Vec<u32>>,
    any_model: Vec<u32>,
    /// Profiles with free credits and work, best first.
    active: BTreeSet<Active>,
    /// Labels that classes require, with how many do.
    required: HashMap<Label, u32>,
    carriers: HashMap<Label, HashSet<SupplyKey>>,
    by_runner: HashMap<(Namespace, RunnerId), SupplyKey>,
    decisions: u64,
    made: u64,
}

impl Supplies {
    /// Profiles that may serve a model, whatever the version.
    pub(super) fn candidates(&self, model: &str) -> impl Iterator<Item = u32> {
        let named = self.by_model.get(model).map(Vec::as_slice).unwrap_or_default();
        named.iter().chain(&self.any_model).copied()
    }

    /// Whether a profile's runners have the labels. Of labels that no class requires yet the
    /// profile knows nothing: they count as had when some runner has them.
    pub(super) fn has_labels(&self, profile: &Profile, labels: &BTreeMap<String, String>) -> bool {
        labels.iter().all(|(key, value)| {
            let label = (key.clone(), value.clone());
            if self.required.contains_key(&label) {
                profile.has_label(key, value)
            } else {
                self.carriers.contains_key(&label)
            }
        })
    }

    /// The connected runner of that name, as a task of `namespace` would find it.
    pub(super) fn find(&self, home: &Namespace, runner: &RunnerId) -> Option<SupplyKey> {
        self.by_runner.get(&(home.clone(), runner.clone())).copied()
    }

    /// Namespace and name of a runner.
    pub(super) fn name(&self, key: SupplyKey) -> Option<(Namespace, RunnerId)> {
        let supply = self.by_key.get(&key)?;
        Some((supply.namespace.clone(), supply.runner.clone()))
    }

    /// The profile to serve next.
    pub(super) fn next(&self) -> Option<u32> {
        self.active.first().map(|(_, _, id)| *id)
    }

    /// Its least loaded runner.
    pub(super) fn least_loaded(&self, profile: u32) -> Option<SupplyKey> {
        self.profiles[profile].idle.first().map(|(_, _, key)| *key)
    }

    /// Brings a profile's place among the active ones up to date.
    pub(super) fn refresh(&mut self, id: u32) {
        let profile = &mut self.profiles[id];
        let flexibility = profile.flexibility();
        let wanted = match profile.idle.first() {
            Some((load, ..)) if !profile.ring.is_empty() => Some((*load, flexibility, id)),
            _ => None,
        };
        if wanted == profile.active {
            return;
        }
        if let Some(key) = std::mem::replace(&mut profile.active, wanted) {
            self.active.remove(&key);
        }
        self.active.extend(wanted);
    }

    /// Takes a credit.
    pub(super) fn take(&mut self, key: SupplyKey) {
        self.decisions += 1;
        let decisions = self.decisions;
        self.update(key, |supply| {
            supply.in_flight += 1;
            supply.served = decisions;
        });
    }

    /// Changes a runner and recounts it. Nothing happens when it has gone.
    fn update(&mut self, key: SupplyKey, change: impl FnOnce(&mut Supply)) {
        if let Some(supply) = self.by_key.get_mut(&key) {
            change(supply);
            self.recount(key);
        }
    }

    fn recount(&mut self, key: SupplyKey) {
        let Some(supply) = self.by_key.get_mut(&key) else { return };
        let available = supply.available();
        let counted = if supply.far {
            Counted { far_free: available, ready_slots: supply.ready_slots, ..Counted::default() }
        } else {
            let load = || (policy::load(available, supply.slots), supply.served);
            Counted {
                idle: (available > 0).then(load),
                free: available,
                far_free: 0,
                ready_slots: if supply.state == SupplyState::Ready { supply.slots } else { 0 },
            }
        };
        let id = supply.profile;
        let profile = &mut self.profiles[id];
        profile.count(key, std::mem::replace(&mut supply.counted, counted), counted);
        self.refresh(id);
    }
}

impl Profile {
    fn count(&mut self, key: SupplyKey, before: Counted, after: Counted) {
        if before.idle != after.idle {
            if let Some((load, served)) = before.idle {
                self.idle.remove(&(load, served, key));
            }
            self.idle.extend(after.idle.map(|(load, served)| (load, served, key)));
        }
        self.free = self.free - before.free + after.free;
        self.far_free = self.far_free - before.far_free + after.far_free;
        self.ready_slots = self.ready_slots - before.ready_slots + after.ready_slots;
    }
}

impl Core {
    pub(super) fn runner_up(&mut self, up: RunnerSupply) {
        let name = (up.namespace.clone(), up.runner.clone());
        self.supplies.by_runner.insert(name, up.key);
        self.supply_up(up, None);
    }

    /// Runners at another server, which no match takes.
    pub(super) fn far_runners_up(&mut self, up: RunnerSupply, ready_slots: u32) {
        self.supply_up(up, Some(ready_slots));
    }

    fn supply_up(&mut self, up: RunnerSupply, far: Option<u32>) {
        let old = self.take_down(up.key);
        let (free, in_flight, state) = old.map_or((0, 0, SupplyState::Ready), |supply| {
            (supply.free, supply.in_flight, supply.state)
        });
        let mut models = up.models;
        models.sort_unstable();
        models.dedup();
        for (key, value) in &up.labels {
            let label = (key.clone(), value.clone());
            self.supplies.carriers.entry(label).or_default().insert(up.key);
        }
        let supply = Supply {
            profile: 0,
            namespace: up.namespace,
            models,
            labels: up.labels,
            slots: up.slots,
            ready_slots: far.unwrap_or_default(),
            far: far.is_some(),
            runner: up.runner,
            free,
            in_flight,
            state,
            served: 0,
            counted: Counted::default(),
        };
        self.supplies.by_key.insert(up.key, supply);
        self.attach(up.key);
    }

    pub(super) fn runner_down(&mut self, key: SupplyKey) {
        self.take_down(key);
    }

    pub(super) fn runner_credits(&mut self, key: SupplyKey, free: u32, state: SupplyState) {
        self.supplies.update(key, |supply| {
            supply.free = free;
            supply.state = state;
        });
    }

    pub(super) fn assigned(&mut self, key: SupplyKey, free: u32, state: SupplyState) {
        self.supplies.update(key, |supply| {
            supply.free = free;
            supply.state = state;
            supply.in_flight = supply.in_flight.saturating_sub(1);
        });
    }

    pub(super) fn give_back(&mut self, key: SupplyKey) {
        self.supplies.update(key, |supply| {
            supply.in_flight = supply.in_flight.saturating_sub(1);
        });
    }

    fn take_down(&mut self, key: SupplyKey) -> Option<Supply> {
        self.detach(key);
        let supply = self.supplies.by_key.remove(&key)?;
        for (name, value) in &supply.labels {
            let label = (name.clone(), value.clone());
            if let Some(carriers) = self.supplies.carriers.get_mut(&label) {
                carriers.remove(&key);
                if carriers.is_empty() {
                    self.supplies.carriers.remove(&label);
                }
            }
        }
        let name = (supply.namespace.clone(), supply.runner.clone());
        if self.supplies.by_runner.get(&name) == Some(&key) {
            self.supplies.by_runner.remove(&name);
        }
        Some(supply)
    }

    /// Puts a runner into its profile.
    fn attach(&mut self, key: SupplyKey) {
        let supply = &self.supplies.by_key[&key];
        let labels = supply.labels.iter().map(|(key, value)| (key.clone(), value.clone()));
        let labels = labels.filter(|label| self.supplies.required.contains_key(label)).collect();
        let (namespace, models) = (supply.namespace.clone(), supply.models.clone());
        let slots = supply.slots;
        let spec = Spec { namespace, models, labels };
        let id = match self.supplies.ids.get(&spec) {
            Some(id) => *id,
            None => self.add_profile(&spec),
        };
        let profile = &mut self.supplies.profiles[id];
        profile.members += 1;
        profile.slots += slots;
        if let Some(supply) = self.supplies.by_key.get_mut(&key) {
            supply.profile = id;
        }
        self.supplies.recount(key);
    }

    /// Takes a runner out of its profile.
    fn detach(&mut self, key: SupplyKey) {
        let Some(supply) = self.supplies.by_key.get_mut(&key) else { return };
        let (id, slots) = (supply.profile, supply.slots);
        let before = std::mem::take(&mut supply.counted);
        let profile = &mut self.supplies.profiles[id];
        profile.count(key, before, Counted::default());
        profile.slots -= slots;
        profile.members -= 1;
        let empty = profile.members == 0;
        self.supplies.refresh(id);
        if empty {
            self.remove_profile(id);
        }
    }

    fn add_profile(&mut self, spec: &Spec) -> u32 {
        self.supplies.made += 1;
        let profile = Profile {
            spec: spec.clone(),
            members: 0,
            slots: 0,
            ready_slots: 0,
            free: 0,
            far_free: 0,
            idle: BTreeSet::new(),
            classes: HashSet::new(),
            ring: Ring::new(self.supplies.made),
            far: Ring::new(!self.supplies.made),
            active: None,
        };
        let id = self.supplies.profiles.insert(profile);
        self.supplies.ids.insert(spec.clone(), id);
        if spec.models.contains(&ModelPattern::Any) {
            self.supplies.any_model.push(id);
        } else {
            for model in models(spec) {
                self.supplies.by_model.entry(model.to_owned()).or_default().push(id);
            }
        }
        for class in self.classes_for(&spec.models) {
            self.connect(id, class);
        }
        self.offer_all_far(id);
        id
    }

    fn remove_profile(&mut self, id: u32) {
        let Some(profile) = self.supplies.profiles.remove(id) else { return };
        self.supplies.ids.remove(&profile.spec);
        self.supplies.any_model.retain(|other| *other != id);
        for model in models(&profile.spec) {
            if let Some(ids) = self.supplies.by_model.get_mut(model) {
                ids.retain(|other| *other != id);
                if ids.is_empty() {
                    self.supplies.by_model.remove(model);
                }
            }
        }
        for class in profile.classes {
            self.classes[class].profiles.retain(|other| *other != id);
        }
    }

    /// Counts the labels that a new class requires, and tells apart the runners that have them.
    pub(super) fn require_labels(&mut self, labels: &BTreeMap<String, String>) {
        for (key, value) in labels {
            let label = (key.clone(), value.clone());
            let count = self.supplies.required.entry(label.clone()).or_default();
            *count += 1;
            if *count > 1 {
                continue;
            }
            let carriers = self.supplies.carriers.get(&label);
            let carriers: Vec<_> = carriers.into_iter().flatten().copied().collect();
            for key in carriers {
                self.detach(key);
                self.attach(key);
            }
        }
    }

    /// The reverse, when the class has gone. Runners stay told apart until they come anew.
    pub(super) fn release_labels(&mut self, labels: &BTreeMap<String, String>) {
        for (key, value) in labels {
            let label = (key.clone(), value.clone());
            if let Some(count) = self.supplies.required.get_mut(&label) {
                *count -= 1;
                if *count == 0 {
                    self.supplies.required.remove(&label);
                }
            }
        }
    }
}

/// Models named by a profile, each once.
fn models(spec: &Spec) -> BTreeSet<&str> {
    spec.models.iter().filter_map(ModelPattern::model).collect()
}
