//! Numbers: rates, service times, and what they say about a start.

use std::time::Duration;

use super::{
    core::Core,
    model::{Entry, Estimate, QueueStats},
    supply::Profile,
};
use crate::{
    clock::{Micros, Mono},
    id::{Namespace, TaskId},
};

/// Time constant of the start rate, in seconds.
const RATE_WINDOW: f64 = 60.0;

/// Weight of the newest service time once there are many.
const SERVICE_WEIGHT: f64 = 0.05;

/// Lanes and profiles that an estimate looks at; with more, it is coarser.
const LOOKED_AT: usize = 256;

/// Events per second, fading.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Rate {
    value: f64,
    at: Mono,
}

impl Rate {
    fn faded(&self, now: Mono) -> f64 {
        self.value * (-now.since(self.at).as_secs_f64() / RATE_WINDOW).exp()
    }

    fn count(&mut self, now: Mono) {
        *self = Self { value: self.faded(now) + 1.0, at: now };
    }

    pub(super) fn per_second(&self, now: Mono) -> f64 {
        self.faded(now) / RATE_WINDOW
    }
}

/// Service time of a model: mean and variance, fading.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Service {
    count: u64,
    mean: f64,
    variance: f64,
}

impl Service {
    /// One that others measured.
    pub(super) fn measured(mean: f64, variance: f64) -> Self {
        Self { count: 1, mean, variance }
    }

    /// Mean and variance, once something was measured.
    pub(super) fn known(&self) -> Option<(f64, f64)> {
        (self.count > 0).then_some((self.mean, self.variance))
    }

    fn add(&mut self, seconds: f64) {
        self.count += 1;
        let weight = (1.0 / self.count as f64).max(SERVICE_WEIGHT);
        let delta = seconds - self.mean;
        self.mean += weight * delta;
        self.variance = (1.0 - weight) * (self.variance + weight * delta * delta);
    }
}

impl Core {
    pub(super) fn started(&mut self, namespace: &Namespace, model: &str, id: TaskId, now: Mono) {
        let bucket = self.resumed(namespace, model, id);
        self.buckets[bucket].starts.count(now);
    }

    pub(super) fn resumed(&mut self, namespace: &Namespace, model: &str, id: TaskId) -> u32 {
        let namespace = self.namespace(namespace);
        let bucket = self.bucket(namespace, model);
        if self.running.insert(id, bucket).is_none() {
            self.buckets[bucket].running += 1;
        }
        bucket
    }

    pub(super) fn finished(
        &mut self,
        model: &str,
        id: TaskId,
        execution: Duration,
        succeeded: bool,
    ) {
        // A bucket with running tasks is never dropped.
        if let Some(bucket) = self.running.remove(&id) {
            self.buckets[bucket].running -= 1;
        }
        if succeeded {
            self.services.entry(model.to_owned()).or_default().add(execution.as_secs_f64());
        }
    }

    /// Place of an entry among the waiting tasks of its bucket, from 1.
    pub(super) fn position(&self, entry: &Entry) -> u64 {
        let Some(bucket) = self.find_bucket(&entry.namespace, &entry.model) else { return 1 };
        let rank = self.rank(entry);
        let lanes = self.buckets[bucket].lanes.iter().take(LOOKED_AT);
        let here = lanes.map(|lane| self.lanes[*lane].before(rank) as u64).sum::<u64>();
        1 + here + self.far_before(bucket, rank)
    }

    /// Profiles that would serve an entry.
    pub(super) fn matching<'a>(
        &'a self,
        entry: &'a Entry,
    ) -> impl Iterator<Item = &'a Profile> + 'a {
        self.supplies
            .candidates(&entry.model)
            .map(|id| &self.supplies.profiles[id])
            .filter(|profile| {
                profile.admits(&entry.namespace)
                    && profile.serves(&entry.model, entry.version.as_deref())
                    && self.supplies.has_labels(profile, &entry.required_labels)
            })
            .take(LOOKED_AT)
    }

    pub(super) fn estimate(&self, entry: &Entry, now: Micros) -> Estimate {
        self.estimate_at(self.position(entry), entry, now)
    }

    /// As [`estimate`](Self::estimate), for a task at that position; 0 is one that has its slot.
    pub(super) fn estimate_at(&self, position: u64, entry: &Entry, now: Micros) -> Estimate {
        let mut estimate = Estimate { position, ..Estimate::default() };
        let bucket = self.find_bucket(&entry.namespace, &entry.model);
        if bucket.is_some_and(|bucket| self.buckets[bucket].pause.is_some()) {
            return estimate;
        }
        let (mut slots, mut free, mut rivals) = (0_u64, 0_u64, 0_u64);
        let own = self.find_namespace(&entry.namespace);
        for profile in self.matching(entry) {
            slots += u64::from(profile.ready_slots);
            free += u64::from(profile.free + profile.far_free);
            let others = profile.ring.rivals(own).max(profile.far.rivals(own));
            rivals = rivals.max(others);
        }
        if slots == 0 {
            return estimate;
        }
        let delay = entry.not_before.map_or(0.0, |time| time.since(now).as_secs_f64());
        let service = self.services.get(&entry.model).filter(|service| service.count > 0);
        let service = service.or_else(|| self.elsewhere.services.get(&entry.model));
        let weight = own.map_or(1, |id| u64::from(self.namespaces[id].weight));
        let servers = slots as f64 * weight as f64 / (weight + rivals) as f64;
        // Tasks that must end before it starts.
        let ends = position.saturating_sub(free) as f64;
        let (start, spread) = match service {
            _ if ends == 0.0 => (delay, 0.0),
            Some(service) => (
                delay.max(ends * service.mean / servers),
                ends * service.variance / (servers * servers),
            ),
            None => return estimate,
        };
        estimate.predicted_start = Some(Duration::try_from_secs_f64(start).unwrap_or_default());
        if let (Some(deadline), Some(service)) = (entry.deadline, service) {
            let slack = (deadline.0 - now.0) as f64 / 1e6 - start - service.mean;
            // Service times are never known better than to a tenth.
            let floor = (0.1 * service.mean).powi(2) + 1e-6;
            let deviation = (spread + service.variance).max(floor).sqrt();
            estimate.on_time_probability = Some(normal_cdf(slack / deviation));
        }
        estimate
    }

    pub(super) fn stats(
        &self,
        namespace: &Namespace,
        model: &str,
        now: Micros,
        mono: Mono,
    ) -> QueueStats {
        let mut stats = QueueStats {
            model: model.to_owned(),
            limit: self.limits.max_per_model,
            ..QueueStats::default()
        };
        for id in self.supplies.candidates(model) {
            let profile = &self.supplies.profiles[id];
            if profile.admits(namespace) {
                stats.slots += profile.slots;
                stats.free_slots += profile.free + profile.far_free;
            }
        }
        let Some(bucket) = self.find_bucket(namespace, model) else { return stats };
        let (far, far_delayed, far_oldest) = self.far_counts(bucket);
        let bucket = &self.buckets[bucket];
        let oldest = bucket.lanes.iter().filter_map(|lane| self.lanes[*lane].oldest());
        let oldest = oldest.chain(far_oldest).min();
        stats.depth = bucket.lanes.iter().map(|lane| self.lanes[*lane].len() as u64).sum();
        stats.depth += far;
        stats.delayed = bucket.delayed + far_delayed;
        stats.running = bucket.running + bucket.far_running;
        stats.oldest_wait = oldest.map(|time| now.since(time));
        stats.start_rate = bucket.starts.per_second(mono) + bucket.far_rate;
        stats.pause.clone_from(&bucket.pause);
        stats
    }

    pub(super) fn list(&self, namespace: &Namespace, now: Micros, mono: Mono) -> Vec<QueueStats> {
        let Some(tenant) = self.find_namespace(namespace) else { return Vec::new() };
        let mut queues: Vec<QueueStats> = self.namespaces[tenant]
            .buckets
            .values()
            .map(|id| &self.buckets[*id])
            .filter(|bucket| {
                bucket.waiting + bucket.running + bucket.far_running + bucket.far_depth > 0
                    || bucket.pause.is_some()
            })
            .map(|bucket| self.stats(namespace, &bucket.model, now, mono))
            .collect();
        queues.sort_unstable_by(|a, b| a.model.cmp(&b.model));
        queues
    }
}

/// Probability that a standard normal variable is at most `x`, to about 1e-7.
fn normal_cdf(x: f64) -> f64 {
    // Abramowitz and Stegun 26.2.17.
    let t = 1.0 / (1.0 + 0.231_641_9 * x.abs());
    let poly = t
        * (0.319_381_530
            + t * (-0.356_563_782
                + t * (1.781_477_937 + t * (-1.821_255_978 + t * 1.330_274_429))));
    let tail = (-x * x / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt() * poly;
    if x >= 0.0 { 1.0 - tail } else { tail }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_normal_distribution_is_close() {
        for (x, p) in [(0.0, 0.5), (1.0, 0.841_344_7), (-1.96, 0.024_997_9), (4.0, 0.999_968_3)] {
            assert!((normal_cdf(x) - p).abs() < 1e-6, "{x}");
        }
    }

    #[test]
    fn service_times_follow_a_change() {
        let mut service = Service::default();
        for _ in 0..100 {
            service.add(1.0);
        }
        assert!((service.mean - 1.0).abs() < 1e-9 && service.variance < 1e-9);
        for _ in 0..200 {
            service.add(3.0);
        }
        assert!((service.mean - 3.0).abs() < 0.01, "{service:?}");
    }

    #[test]
    fn a_steady_rate_is_found_and_fades() {
        let mut rate = Rate::default();
        let mut now = Mono::default();
        for _ in 0..3_000 {
            now = now + Duration::from_millis(100);
            rate.count(now);
        }
        assert!((rate.per_second(now) - 10.0).abs() < 0.2);
        assert!(rate.per_second(now + Duration::from_mins(10)) < 0.01);
    }
}
