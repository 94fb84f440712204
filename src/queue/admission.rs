//! Bounds: how much may wait, and who leaves when it is too much.

use std::time::Duration;

use super::{
    core::Core,
    model::{Entry, FullPolicy},
};
use crate::{
    error::{Error, Kind, Reason, Result},
    faults::{self, Fault},
    id::Namespace,
};

/// When a refused submit should be tried again.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// What is full.
#[derive(Clone, Copy, Debug)]
pub enum Full<'a> {
    /// The queue of a model.
    Model(&'a str),
    /// All queues of a namespace.
    Namespace(&'a Namespace),
}

impl Full<'_> {
    /// `QUEUE_FULL`, with the numbers that are in the way.
    pub fn error(self, limit: u64, depth: u64) -> Error {
        let (label, what) = match self {
            Self::Model(model) => ("queue.per_model", format!("queue of `{model}`")),
            Self::Namespace(namespace) => {
                ("queue.per_namespace", format!("namespace `{namespace}`"))
            }
        };
        let message = format!("the {what} is full: {depth} tasks wait, {limit} may");
        Error::new(Kind::ResourceExhausted, Reason::QueueFull, message)
            .with("policy_label", label)
            .with("limit", limit)
            .with("depth", depth)
            .retry_after(RETRY_AFTER)
    }
}

impl Core {
    /// Holds room for one task; returns the entry that had to leave for it.
    pub(super) fn admit(
        &mut self,
        namespace: &Namespace,
        model: &str,
        priority: i32,
    ) -> Result<Option<Entry>> {
        let tenant = self.namespace(namespace);
        let bucket = self.bucket(tenant, model);
        let in_model = self.buckets[bucket].waiting + self.buckets[bucket].held;
        let in_namespace = self.namespaces[tenant].waiting + self.namespaces[tenant].held;
        let model_full = in_model >= self.limits.max_per_model;
        let full = model_full || in_namespace >= self.limits.max_per_namespace;
        let full = full && !faults::planted(Fault::AdmitWithoutLimit);
        let evicted = match self.limits.when_full {
            _ if !full => None,
            FullPolicy::DropOldest => {
                let lowest = if model_full {
                    self.lowest(std::iter::once(bucket))
                } else {
                    self.lowest(self.namespaces[tenant].buckets.values().copied())
                };
                lowest.filter(|(low, ..)| *low <= priority).and_then(|(.., id)| self.remove(id))
            }
            FullPolicy::Reject => None,
        };
        if full && evicted.is_none() {
            return Err(if model_full {
                Full::Model(model).error(self.limits.max_per_model, in_model)
            } else {
                Full::Namespace(namespace).error(self.limits.max_per_namespace, in_namespace)
            });
        }
        self.buckets[bucket].held += 1;
        self.namespaces[tenant].held += 1;
        Ok(evicted)
    }

    /// Gives up the room that was held.
    pub(super) fn release(&mut self, namespace: &Namespace, model: &str) {
        // A bucket with held room is never dropped.
        if let Some(bucket) = self.find_bucket(namespace, model) {
            let bucket = &mut self.buckets[bucket];
            bucket.held = bucket.held.saturating_sub(1);
            let tenant = &mut self.namespaces[bucket.namespace];
            tenant.held = tenant.held.saturating_sub(1);
        }
    }

    /// The oldest of the lowest priority that may start, in some buckets.
    fn lowest(
        &self,
        buckets: impl Iterator<Item = u32>,
    ) -> Option<(i32, crate::clock::Micros, crate::id::TaskId)> {
        buckets
            .flat_map(|bucket| &self.buckets[bucket].lanes)
            .filter_map(|lane| self.lanes[*lane].lowest())
            .min()
    }
}
