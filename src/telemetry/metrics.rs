//! The metrics, typed, in one registry. Labels have few values: no names that clients choose.

use std::sync::{Arc, atomic::AtomicU64};

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeMetric, text},
    metrics::{
        TypedMetric,
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};

/// Every metric; clones share them.
#[derive(Clone, Debug)]
pub struct Metrics {
    registry: Arc<Registry>,
    /// Tasks accepted.
    pub submits: Counter,
    /// Submits refused, by reason.
    pub refusals: Family<ReasonLabel, Counter>,
    /// Tasks ended, by state.
    pub ends: Family<StateLabel, Counter>,
    /// Attempts started.
    pub attempts: Counter,
    /// Attempts ended, by outcome: `succeeded`, `failed`, `lost`, `handed_back`, `timed_out`,
    /// `cancelled`.
    pub attempt_ends: Family<OutcomeLabel, Counter>,
    /// Tasks that wait.
    pub queued: Gauge,
    /// Attempts that hold a lease.
    pub running: Gauge,
    /// Wait from the submit to the first attempt.
    pub wait_seconds: Histogram,
    /// Bytes of live logs.
    pub relay_bytes: Gauge,
    /// Live logs.
    pub relay_logs: Gauge,
    /// Open subscriptions.
    pub relay_subscribers: Gauge,
    /// Events that runners appended.
    pub relay_events: Counter,
    /// Changes per transaction.
    pub ledger_batch: Histogram,
    /// From the first change of a batch to its commit.
    pub ledger_commit_seconds: Histogram,
    /// Bytes of segments made durable.
    pub segment_bytes: Counter,
    /// Runner sessions, by state: `connected`, `away`.
    pub runners: Family<StateLabel, Gauge>,
    /// Slots that runners offer.
    pub runner_slots: Gauge,
    /// Slots free.
    pub runner_slots_free: Gauge,
    /// Cancels told to runners that say when they have stopped, by what became of them:
    /// `stopped`, `late`, `overdue`.
    pub runner_cancels: Family<OutcomeLabel, Counter>,
    /// Calls ended, by method and code.
    pub rpcs: Family<RpcLabels, Counter>,
    /// Time to the end of unary calls and to the head of streaming ones.
    pub rpc_seconds: Family<MethodLabel, Histogram, fn() -> Histogram>,
    /// Streaming calls open.
    pub streams: Gauge,
    /// Unary calls at work.
    pub calls: Gauge,
    /// Connections open.
    pub connections: Gauge,
    /// Connections refused or closed by a limit.
    pub connections_refused: Family<ReasonLabel, Counter>,
    /// Answers of streams that were encoded as JSON, each once for all its readers.
    pub json_answers: Counter,
    /// Calls refused because the server has enough to do.
    pub shed: Counter,
    /// Panics caught.
    pub panics: Counter,
    /// 1 while storage takes writes.
    pub storage_healthy: Gauge,
    /// 1 while the Redis that servers share answers; 0 also where none is configured.
    pub redis_healthy: Gauge,
    /// Start of the process, Unix seconds.
    pub start_time_seconds: Gauge<f64, AtomicU64>,
}

/// Label `state`.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct StateLabel {
    /// A state's name.
    pub state: &'static str,
}

/// Label `outcome`.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct OutcomeLabel {
    /// An outcome's name.
    pub outcome: &'static str,
}

/// Label `reason`.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct ReasonLabel {
    /// A reason's name.
    pub reason: &'static str,
}

/// Label `method`.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct MethodLabel {
    /// Such as `baton.v1.TaskService/GetTask`; `unknown` for what is not served.
    pub method: &'static str,
}

/// Labels `method` and `code`.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct RpcLabels {
    /// As in [`MethodLabel`].
    pub method: &'static str,
    /// Such as `NOT_FOUND`.
    pub code: &'static str,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// A registry of its own, all at zero.
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("baton");
        let r = &mut registry;
        Self {
            submits: counter(r, "tasks_submitted", "Tasks accepted"),
            refusals: family(r, "tasks_refused", "Submits refused"),
            ends: family(r, "tasks_ended", "Tasks ended"),
            attempts: counter(r, "attempts_started", "Attempts started"),
            attempt_ends: family(r, "attempts_ended", "Attempts ended"),
            queued: gauge(r, "tasks_queued", "Tasks that wait"),
            running: gauge(r, "tasks_running", "Attempts that hold a lease"),
            wait_seconds: histogram(r, "task_wait_seconds", "Submit to first attempt", seconds()),
            relay_bytes: gauge(r, "relay_bytes", "Bytes of live logs"),
            relay_logs: gauge(r, "relay_logs", "Live logs"),
            relay_subscribers: gauge(r, "relay_subscribers", "Open subscriptions"),
            relay_events: counter(r, "relay_events", "Events that runners appended"),
            ledger_batch: histogram(r, "ledger_batch_changes", "Changes per transaction", sizes()),
            ledger_commit_seconds: histogram(r, "ledger_commit_seconds", "Commit", seconds()),
            segment_bytes: counter(r, "segment_bytes", "Bytes of segments made durable"),
            runners: family(r, "runner_sessions", "Runner sessions"),
            runner_slots: gauge(r, "runner_slots", "Slots that runners offer"),
            runner_slots_free: gauge(r, "runner_slots_free", "Slots free"),
            runner_cancels: family(r, "runner_cancels", "Cancels told to runners"),
            rpcs: family(r, "rpcs", "Calls ended"),
            rpc_seconds: seconds_family(r),
            streams: gauge(r, "rpc_streams", "Streaming calls open"),
            calls: gauge(r, "rpc_calls", "Unary calls at work"),
            connections: gauge(r, "connections", "Connections open"),
            connections_refused: family(r, "connections_refused", "Connections refused"),
            json_answers: counter(r, "json_answers_encoded", "Answers of streams made JSON"),
            shed: counter(r, "rpcs_shed", "Calls refused under load"),
            panics: counter(r, "panics", "Panics caught"),
            storage_healthy: gauge(r, "storage_healthy", "1 while storage takes writes"),
            redis_healthy: gauge(r, "redis_healthy", "1 while the shared Redis answers"),
            start_time_seconds: float_gauge(r, "start_time_seconds", "Start, Unix seconds"),
            registry: Arc::new(registry),
        }
    }

    /// All metrics in the `OpenMetrics` text form.
    pub fn text(&self) -> String {
        let mut out = String::with_capacity(16 << 10);
        // Writing to a string does not fail.
        let _ = text::encode(&mut out, &self.registry);
        out
    }
}

/// Buckets of times, 50 microseconds to 100 seconds.
fn seconds() -> Histogram {
    Histogram::new(exponential_buckets(0.000_05, 2.0, 22))
}

/// Buckets of counts, 1 to 16,384.
fn sizes() -> Histogram {
    Histogram::new(exponential_buckets(1.0, 2.0, 15))
}

fn counter(registry: &mut Registry, name: &str, help: &str) -> Counter {
    let metric = Counter::default();
    registry.register(name, help, metric.clone());
    metric
}

fn gauge(registry: &mut Registry, name: &str, help: &str) -> Gauge {
    let metric = Gauge::default();
    registry.register(name, help, metric.clone());
    metric
}

fn float_gauge(registry: &mut Registry, name: &str, help: &str) -> Gauge<f64, AtomicU64> {
    let metric = Gauge::default();
    registry.register(name, help, metric.clone());
    metric
}

fn histogram(registry: &mut Registry, name: &str, help: &str, metric: Histogram) -> Histogram {
    registry.register(name, help, metric.clone());
    metric
}

fn family<L, M>(registry: &mut Registry, name: &str, help: &str) -> Family<L, M>
where
    L: Clone + std::fmt::Debug + std::hash::Hash + Eq + EncodeLabelSet + Send + Sync + 'static,
    M: Default + std::fmt::Debug + EncodeMetric + TypedMetric + Send + Sync + 'static,
{
    let metric = Family::<L, M>::default();
    registry.register(name, help, metric.clone());
    metric
}

fn seconds_family(registry: &mut Registry) -> Family<MethodLabel, Histogram, fn() -> Histogram> {
    let metric = Family::new_with_constructor(seconds as fn() -> Histogram);
    registry.register("rpc_seconds", "Time to the end or the head", metric.clone());
    metric
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_written_with_their_labels() {
        let metrics = Metrics::new();
        metrics.submits.inc();
        metrics.ends.get_or_create(&StateLabel { state: "SUCCEEDED" }).inc();
        metrics.rpc_seconds.get_or_create(&MethodLabel { method: "m" }).observe(0.001);
        let text = metrics.text();
        assert!(text.contains("baton_tasks_submitted_total 1"), "{text}");
        assert!(text.contains("baton_tasks_ended_total{state=\"SUCCEEDED\"} 1"), "{text}");
        assert!(text.contains("baton_rpc_seconds_bucket{le="), "{text}");
    }
}
