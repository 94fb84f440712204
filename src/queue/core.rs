//! The queue's state, without locks or clocks: tasks in lanes, lanes in classes.
//!
//! A class is what decides who may run a task: model, version and required labels. A lane is
//! one namespace's part of a class, a bucket is one namespace's part of a model: what people
//! call a queue, and what bounds, pauses and numbers belong to.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use super::{
    delays::{Delays, Due, Moment},
    estimate::{Rate, Service},
    far::Far,
    lane::Lane,
    model::{Entry, Limits, Match, ModelPattern, Pause, SupplyKey},
    policy::{self, Rank},
    report::Elsewhere,
    sessions::Sessions,
    slab::Slab,
    supply::Supplies,
};
use crate::id::{Namespace, TaskId};

/// Empty lanes and buckets that are kept before a clean-up looks for them.
const TIDY_AT: usize = 4_096;

/// The queue's state.
#[derive(Debug)]
pub(super) struct Core {
    pub limits: Limits,
    pub step: i64,
    pub entries: HashMap<TaskId, Waiter>,
    delays: Delays,
    pub namespaces: Slab<Tenant>,
    namespace_ids: HashMap<Namespace, u32>,
    pub buckets: Slab<Bucket>,
    pub classes: Slab<Class>,
    class_ids: HashMap<Spec, u32>,
    classes_by_model: HashMap<String, Vec<u32>>,
    pub lanes: Slab<Lane>,
    /// What waits in a backlog that other servers share.
    pub far: Far,
    /// What other servers told of themselves.
    pub elsewhere: Elsewhere,
    pub supplies: Supplies,
    pub services: HashMap<String, Service>,
    /// Buckets of the tasks that run.
    pub running: HashMap<TaskId, u32>,
    sessions: Sessions,
    tidy_at: usize,
}

/// An entry and where it waits.
#[derive(Debug)]
pub(super) struct Waiter {
    pub entry: Entry,
    pub bucket: u32,
    /// Its lane; `None` while delayed.
    pub lane: Option<u32>,
    /// When it may start, while delayed.
    due: Option<Due>,
}

/// A namespace.
#[derive(Debug)]
pub(super) struct Tenant {
    pub name: Namespace,
    pub weight: u32,
    /// Tasks that wait, and admissions held.
    pub waiting: u64,
    pub held: u64,
    pub buckets: HashMap<String, u32>,
}

/// One namespace's part of a model.
#[derive(Debug)]
pub(super) struct Bucket {
    pub namespace: u32,
    pub model: String,
    pub lanes: Vec<u32>,
    /// Its lanes in the backlog, and how much waits there.
    pub far: Vec<u32>,
    pub far_depth: u64,
    /// Tasks that run elsewhere, and how many start there per second.
    pub far_running: u64,
    pub far_rate: f64,
    /// Tasks that wait, delayed ones included, and admissions held.
    pub waiting: u64,
    pub held: u64,
    pub delayed: u64,
    pub running: u64,
    pub pause: Option<Pause>,
    pub starts: Rate,
}

/// What decides who may run a task.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Spec {
    pub model: String,
    pub version: Option<String>,
    pub labels: Arc<BTreeMap<String, String>>,
}

/// Tasks that the same runners may run.
#[derive(Debug)]
pub(super) struct Class {
    pub spec: Spec,
    /// Profiles of runners that match, whatever their namespace.
    pub profiles: Vec<u32>,
    /// By namespace.
    pub lanes: HashMap<u32, u32>,
}

impl Core {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            step: i64::try_from(limits.ageing_step.as_micros()).unwrap_or(i64::MAX),
            limits,
            entries: HashMap::new(),
            delays: Delays::default(),
            namespaces: Slab::default(),
            namespace_ids: HashMap::new(),
            buckets: Slab::default(),
            classes: Slab::default(),
            class_ids: HashMap::new(),
            classes_by_model: HashMap::new(),
            lanes: Slab::default(),
            far: Far::default(),
            elsewhere: Elsewhere::default(),
            supplies: Supplies::default(),
            services: HashMap::new(),
            running: HashMap::new(),
            sessions: Sessions::default(),
            tidy_at: TIDY_AT,
        }
    }

    pub(super) fn contains(&self, id: TaskId) -> bool {
        self.entries.contains_key(&id)
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Credits that are free.
    pub(super) fn free(&self) -> u32 {
        self.supplies.profiles.iter().map(|(_, profile)| profile.free).sum()
    }

    pub(super) fn push(&mut self, entry: Entry, now: Moment) {
        self.remove(entry.id);
        let namespace = self.namespace(&entry.namespace);
        let bucket = self.bucket(namespace, &entry.model);
        self.namespaces[namespace].waiting += 1;
        self.buckets[bucket].waiting += 1;
        let id = entry.id;
        let due = Due::of(&entry, now);
        self.entries.insert(id, Waiter { entry, bucket, lane: None, due });
        if let Some(due) = due {
            self.buckets[bucket].delayed += 1;
            self.delays.insert(due, id);
        } else {
            self.enlist(id);
        }
    }

    pub(super) fn remove(&mut self, id: TaskId) -> Option<Entry> {
        let Waiter { entry, bucket, lane, due } = self.entries.remove(&id)?;
        if let Some(lane) = lane {
            self.lanes[lane].remove(entry.create_time, entry.priority, id);
        } else if let Some(due) = due {
            self.delays.remove(due, id);
            self.buckets[bucket].delayed -= 1;
        }
        let bucket = &mut self.buckets[bucket];
        bucket.waiting -= 1;
        self.namespaces[bucket.namespace].waiting -= 1;
        Some(entry)
    }

    pub(super) fn set_paused(&mut self, namespace: &Namespace, model: &str, pause: Option<Pause>) {
        let namespace = self.namespace(namespace);
        let bucket = self.bucket(namespace, model);
        self.buckets[bucket].pause = pause;
        for lane in self.buckets[bucket].lanes.clone() {
            self.offer(lane);
        }
        for lane in self.buckets[bucket].far.clone() {
            self.offer_far(lane);
        }
    }

    pub(super) fn pauses(&self) -> Vec<(Namespace, String, Pause)> {
        let paused = self.buckets.iter().filter_map(|(_, bucket)| {
            let namespace = self.namespaces[bucket.namespace].name.clone();
            Some((namespace, bucket.model.clone(), bucket.pause.clone()?))
        });
        paused.collect()
    }

    /// Decides: up to `max` tasks with their runners.
    pub(super) fn take_matches(&mut self, now: Moment, max: usize) -> Vec<Match> {
        self.promote(now);
        let mut matches = Vec::new();
        while matches.len() < max {
            let Some(profile) = self.supplies.next() else { break };
            let Some((namespace, id)) = self.pick(profile) else {
                self.supplies.refresh(profile);
                continue;
            };
            let Some(entry) = self.remove(id) else { break };
            if Due::of(&entry, now).is_some() {
                // The wall clock went back since it was found due.
                self.push(entry, now);
                continue;
            }
            let Some(runner) = self.choose(profile, &entry) else { break };
            self.supplies.take(runner);
            if let Some(session) = &entry.session
                && let Some(name) = self.supplies.name(runner)
            {
                self.sessions.note(&entry.namespace, session, name);
            }
            let home = self.supplies.by_key[&runner].profile;
            let weight = self.namespaces[namespace].weight;
            self.supplies.profiles[home].ring.charge(namespace, weight);
            matches.push(Match { entry, runner });
        }
        matches
    }

    /// The next task for the runners of a profile.
    fn pick(&mut self, profile: u32) -> Option<(u32, TaskId)> {
        loop {
            let (namespace, lane, noted) = self.supplies.profiles[profile].ring.first()?;
            let head = self.head(lane);
            match head {
                Some(rank) if rank == noted => return Some((namespace, rank.1)),
                _ => self.supplies.profiles[profile].ring.correct(namespace, lane, head),
            }
        }
    }

    /// The runner for a task that a profile is to serve: the one that last ran the session if
    /// it has room, else the least loaded.
    fn choose(&mut self, profile: u32, entry: &Entry) -> Option<SupplyKey> {
        let least_loaded = self.supplies.least_loaded(profile);
        let Some(session) = &entry.session else { return least_loaded };
        let Some((home, runner)) = self.sessions.find(&entry.namespace, session) else {
            return least_loaded;
        };
        let warm = self.supplies.find(home, runner).filter(|key| {
            let supply = &self.supplies.by_key[key];
            let profile = &self.supplies.profiles[supply.profile];
            supply.available() > 0
                && profile.admits(&entry.namespace)
                && profile.serves(&entry.model, entry.version.as_deref())
                && self.supplies.has_labels(profile, &entry.required_labels)
        });
        warm.or(least_loaded)
    }

    /// Best rank of a lane that may be served.
    fn head(&self, lane: u32) -> Option<Rank> {
        let lane = &self.lanes[lane];
        if self.buckets[lane.bucket].pause.is_some() { None } else { lane.head() }
    }

    /// Moves delayed tasks whose time has come into their lanes.
    fn promote(&mut self, now: Moment) {
        while let Some(id) = self.delays.pop(now) {
            if let Some(waiter) = self.entries.get_mut(&id) {
                waiter.entry.waited_out = matches!(waiter.due.take(), Some(Due::Rested(_)));
                self.buckets[waiter.bucket].delayed -= 1;
                self.enlist(id);
            }
        }
    }

    fn enlist(&mut self, id: TaskId) {
        let Some(waiter) = self.entries.get(&id) else { return };
        let (bucket, entry) = (waiter.bucket, &waiter.entry);
        let (create_time, priority) = (entry.create_time, entry.priority);
        let spec = Spec {
            model: entry.model.clone(),
            version: entry.version.clone(),
            labels: entry.required_labels.clone(),
        };
        let lane = self.lane(bucket, spec);
        if let Some(waiter) = self.entries.get_mut(&id) {
            waiter.lane = Some(lane);
        }
        if self.lanes[lane].insert(create_time, priority, id) {
            self.offer(lane);
        }
    }

    /// Tells all runners that match a lane of its head.
    fn offer(&mut self, id: u32) {
        let Some(head) = self.head(id) else { return };
        let lane = &self.lanes[id];
        let tenant = &self.namespaces[lane.namespace];
        for profile in &self.classes[lane.class].profiles {
            if self.supplies.profiles[*profile].admits(&tenant.name) {
                let ring = &mut self.supplies.profiles[*profile].ring;
                ring.offer(lane.namespace, tenant.weight, id, head);
                self.supplies.refresh(*profile);
            }
        }
    }

    pub(super) fn find_namespace(&self, name: &Namespace) -> Option<u32> {
        self.namespace_ids.get(name).copied()
    }

    pub(super) fn namespace(&mut self, name: &Namespace) -> u32 {
        if let Some(id) = self.namespace_ids.get(name) {
            return *id;
        }
        let weight = self.limits.weights.get(name).copied().unwrap_or(1).max(1);
        let (waiting, held, buckets) = (0, 0, HashMap::new());
        let id =
            self.namespaces.insert(Tenant { name: name.clone(), weight, waiting, held, buckets });
        self.namespace_ids.insert(name.clone(), id);
        id
    }

    pub(super) fn find_bucket(&self, namespace: &Namespace, model: &str) -> Option<u32> {
        let namespace = self.find_namespace(namespace)?;
        self.namespaces[namespace].buckets.get(model).copied()
    }

    pub(super) fn bucket(&mut self, namespace: u32, model: &str) -> u32 {
        if let Some(id) = self.namespaces[namespace].buckets.get(model) {
            return *id;
        }
        self.tidy();
        let id = self.buckets.insert(Bucket {
            namespace,
            model: model.to_owned(),
            lanes: Vec::new(),
            far: Vec::new(),
            far_depth: 0,
            far_running: 0,
            far_rate: 0.0,
            waiting: 0,
            held: 0,
            delayed: 0,
            running: 0,
            pause: None,
            starts: Rate::default(),
        });
        self.namespaces[namespace].buckets.insert(model.to_owned(), id);
        id
    }

    fn lane(&mut self, bucket: u32, spec: Spec) -> u32 {
        let class = match self.class_ids.get(&spec) {
            Some(class) => *class,
            None => self.add_class(spec),
        };
        let namespace = self.buckets[bucket].namespace;
        if let Some(lane) = self.classes[class].lanes.get(&namespace) {
            return *lane;
        }
        let lane = self.lanes.insert(Lane::new(class, namespace, bucket, self.step));
        self.classes[class].lanes.insert(namespace, lane);
        self.buckets[bucket].lanes.push(lane);
        lane
    }

    fn add_class(&mut self, spec: Spec) -> u32 {
        self.require_labels(&spec.labels);
        let (profiles, lanes) = (Vec::new(), HashMap::new());
        let id = self.classes.insert(Class { spec: spec.clone(), profiles, lanes });
        self.classes_by_model.entry(spec.model.clone()).or_default().push(id);
        let candidates: Vec<u32> = self.supplies.candidates(&spec.model).collect();
        self.class_ids.insert(spec, id);
        for profile in candidates {
            self.connect(profile, id);
        }
        id
    }

    /// Classes of the models that patterns name.
    pub(super) fn classes_for(&self, patterns: &[ModelPattern]) -> BTreeSet<u32> {
        if patterns.contains(&ModelPattern::Any) {
            return self.classes.iter().map(|(id, _)| id).collect();
        }
        let models = patterns.iter().filter_map(ModelPattern::model);
        models.filter_map(|model| self.classes_by_model.get(model)).flatten().copied().collect()
    }

    /// Makes a profile serve a class if they match.
    pub(super) fn connect(&mut self, profile: u32, class: u32) {
        let spec = &self.classes[class].spec;
        let runners = &self.supplies.profiles[profile];
        if !runners.serves(&spec.model, spec.version.as_deref())
            || !spec.labels.iter().all(|(key, value)| runners.has_label(key, value))
        {
            return;
        }
        self.supplies.profiles[profile].classes.insert(class);
        self.classes[class].profiles.push(profile);
        for (namespace, lane) in &self.classes[class].lanes {
            let tenant = &self.namespaces[*namespace];
            if let Some(head) = self.head(*lane)
                && self.supplies.profiles[profile].admits(&tenant.name)
            {
                let ring = &mut self.supplies.profiles[profile].ring;
                ring.offer(*namespace, tenant.weight, *lane, head);
            }
        }
        self.supplies.refresh(profile);
    }

    /// Drops lanes, classes and buckets that nothing uses, once there are many.
    fn tidy(&mut self) {
        if self.lanes.len() + self.buckets.len() < self.tidy_at {
            return;
        }
        let empty: Vec<u32> =
            self.lanes.iter().filter(|(_, lane)| lane.is_empty()).map(|(id, _)| id).collect();
        for id in empty {
            self.remove_lane(id);
        }
        let unused = |bucket: &Bucket| {
            bucket.lanes.is_empty()
                && bucket.far.is_empty()
                && bucket.waiting + bucket.held + bucket.running == 0
                && bucket.pause.is_none()
        };
        let buckets: Vec<u32> =
            self.buckets.iter().filter(|(_, bucket)| unused(bucket)).map(|(id, _)| id).collect();
        for id in buckets {
            if let Some(bucket) = self.buckets.remove(id) {
                self.namespaces[bucket.namespace].buckets.remove(&bucket.model);
            }
        }
        self.tidy_at = TIDY_AT.max(2 * (self.lanes.len() + self.buckets.len()));
    }

    fn remove_lane(&mut self, id: u32) {
        let Some(lane) = self.lanes.remove(id) else { return };
        self.buckets[lane.bucket].lanes.retain(|other| *other != id);
        for profile in self.classes[lane.class].profiles.clone() {
            self.supplies.profiles[profile].ring.correct(lane.namespace, id, None);
            self.supplies.refresh(profile);
        }
        let class = &mut self.classes[lane.class];
        class.lanes.remove(&lane.namespace);
        if !class.lanes.is_empty() {
            return;
        }
        let Some(class) = self.classes.remove(lane.class) else { return };
        for profile in class.profiles {
            self.supplies.profiles[profile].classes.remove(&lane.class);
        }
        if let Some(ids) = self.classes_by_model.get_mut(&class.spec.model) {
            ids.retain(|other| *other != lane.class);
            if ids.is_empty() {
                self.classes_by_model.remove(&class.spec.model);
            }
        }
        self.class_ids.remove(&class.spec);
        self.release_labels(&class.spec.labels);
    }

    /// Rank of an entry.
    pub(super) fn rank(&self, entry: &Entry) -> Rank {
        policy::rank(entry.create_time, entry.priority, entry.id, self.step)
    }
}
