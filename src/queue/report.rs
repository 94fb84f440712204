//! What the servers of an installation tell each other of their runners, for numbers and
//! explanations. Nothing is started by it.
//!
//! Runners elsewhere are supplies here too, without a credit that a match could take: so whatever
//! asks which runners there are finds them.

use std::collections::{BTreeMap, HashMap};

use super::{
    core::Core,
    estimate::Service,
    model::{ModelPattern, QueuePart, Report, RunnerSupply, Runners, SupplyKey, SupplyState},
};
use crate::{
    clock::Mono,
    id::{Namespace, RunnerId},
};

/// Kinds of runners that a server tells of; with more, their labels are left out.
const KINDS: usize = 512;

/// What tells supplies elsewhere apart: the server, and the kind of its runners.
type Kind = (String, String, Vec<String>, BTreeMap<String, String>);

/// What was told here.
#[derive(Debug, Default)]
pub(super) struct Elsewhere {
    supplies: HashMap<Kind, (SupplyKey, u32, u32)>,
    n_keys: u64,
    /// Service times of models that nobody here has measured.
    pub services: HashMap<String, Service>,
}

impl Core {
    /// What there is to tell.
    pub(super) fn report(&self, now: Mono) -> Report {
        let mut kinds: BTreeMap<_, (u32, u32, u32)> = BTreeMap::new();
        for labelled in [true, false] {
            kinds.clear();
            for supply in self.supplies.by_key.values().filter(|supply| !supply.far) {
                let (namespace, models, labels) = supply.kind();
                let labels = if labelled { labels.clone() } else { BTreeMap::new() };
                let models: Vec<String> = models.iter().map(ToString::to_string).collect();
                let (slots, ready, free) =
                    kinds.entry((namespace.to_string(), models, labels)).or_default();
                *slots += supply.slots;
                *ready += if supply.state == SupplyState::Ready { supply.slots } else { 0 };
                *free += supply.available();
            }
            if kinds.len() <= KINDS {
                break;
            }
        }
        let runners =
            kinds.into_iter().map(|((namespace, models, labels), (slots, ready, free))| Runners {
                namespace,
                models,
                labels,
                slots,
                ready_slots: ready,
                free,
            });
        let queues = self.buckets.iter().map(|(_, bucket)| QueuePart {
            namespace: self.namespaces[bucket.namespace].name.to_string(),
            model: bucket.model.clone(),
            running: bucket.running,
            start_rate: bucket.starts.per_second(now),
        });
        let queues = queues.filter(|part| part.running > 0 || part.start_rate > 0.001);
        let services = self.services.iter().filter_map(|(model, service)| {
            service.known().map(|(mean, variance)| (model.clone(), (mean, variance)))
        });
        Report {
            runners: runners.collect(),
            queues: queues.collect(),
            services: services.collect(),
        }
    }

    /// Takes over what the other servers told, by their names.
    pub(super) fn set_elsewhere(&mut self, told: &HashMap<String, Report>) {
        let mut before = std::mem::take(&mut self.elsewhere.supplies);
        for (server, report) in told {
            for runners in &report.runners {
                let Runners { namespace, models, labels, slots, ready_slots, free } = runners;
                let kind = (server.clone(), namespace.clone(), models.clone(), labels.clone());
                let known = before
                    .remove(&kind)
                    .filter(|(_, has, ready)| (has, ready) == (slots, ready_slots));
                let key = known.map_or_else(|| self.far_supply(runners, server), |(key, ..)| key);
                self.runner_credits(key, *free, SupplyState::Ready);
                self.elsewhere.supplies.insert(kind, (key, *slots, *ready_slots));
            }
        }
        for (key, ..) in before.into_values() {
            self.runner_down(key);
        }
        for (_, bucket) in self.buckets.iter_mut() {
            (bucket.far_running, bucket.far_rate) = (0, 0.0);
        }
        self.elsewhere.services.clear();
        for report in told.values() {
            for part in &report.queues {
                let namespace = self.namespace(&Namespace::from(part.namespace.as_str()));
                let bucket = self.bucket(namespace, &part.model);
                self.buckets[bucket].far_running += part.running;
                self.buckets[bucket].far_rate += part.start_rate;
            }
            for (model, (mean, variance)) in &report.services {
                let service = Service::measured(*mean, *variance);
                self.elsewhere.services.insert(model.clone(), service);
            }
        }
    }

    fn far_supply(&mut self, runners: &Runners, server: &str) -> SupplyKey {
        // Sessions here count up from the other end.
        self.elsewhere.n_keys += 1;
        let key = SupplyKey(u64::MAX - self.elsewhere.n_keys);
        self.far_runners_up(
            RunnerSupply {
                key,
                namespace: Namespace::from(runners.namespace.as_str()),
                models: runners.models.iter().map(|text| ModelPattern::parse(text)).collect(),
                labels: runners.labels.clone(),
                slots: runners.slots,
                runner: RunnerId::from(server),
            },
            runners.ready_slots,
        );
        key
    }
}
