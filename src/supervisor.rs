//! Owns every future that runs on its own: named loops, connections, calls that must finish.
//!
//! Nothing else in the crate spawns, but calls to a database that are seen through without their
//! caller, which its closing waits for: so nothing runs unnamed, dies unseen or outlives a drain. A
//! shutdown has four phases, each bounded by what is left of the grace:
//!
//! 1. [`Supervisor::token`] is cancelled: connections and streams end.
//! 2. [`Supervisor::last_call`] is cancelled: loops made by [`Supervisor::spawn_flushing_loop`]
//!    write what they hold and return.
//! 3. The other loops are dropped at their next await.
//! 4. What is still there is dropped too, and named in the log.

use std::{
    any::Any,
    future::Future,
    panic::AssertUnwindSafe,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::FutureExt as _;
use parking_lot::Mutex;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::Instrument as _;

use crate::clock::{Clock, Mono};

/// Spawns, watches and ends futures; clones share it.
#[derive(Clone, Default)]
pub struct Supervisor(Arc<Inner>);

#[derive(Default)]
struct Inner {
    stop_requested: CancellationToken,
    token: CancellationToken,
    last_call: CancellationToken,
    stop_loops: CancellationToken,
    kill: CancellationToken,
    tasks: TaskTracker,
    flushing: TaskTracker,
    loops: TaskTracker,
    failures: Mutex<Vec<String>>,
    panics: AtomicU64,
}

impl Supervisor {
    /// A supervisor with nothing to watch.
    pub fn new() -> Self {
        Self::default()
    }

    /// Runs a loop that should last until the shutdown; it is dropped at an await then.
    ///
    /// Its end before the shutdown, in whatever way, is a failure: logged as ERROR, kept for
    /// [`failures`](Self::failures), and the process is asked to stop.
    pub fn spawn_loop(
        &self,
        name: &'static str,
        future: impl Future<Output = anyhow::Result<()>> + Send + 'static,
    ) {
        let (watcher, stop) = (self.clone(), self.0.stop_loops.clone());
        let watched = async move {
            tokio::select! {
                biased;
                () = stop.cancelled() => {}
                outcome = AssertUnwindSafe(future).catch_unwind() => {
                    watcher.loop_ended(name, outcome);
                }
            }
        };
        self.0.loops.spawn(watched.instrument(tracing::info_span!("loop", name)));
    }

    /// Runs a loop that holds data to be written at the end: after
    /// [`last_call`](Self::last_call) it writes them and returns.
    pub fn spawn_flushing_loop(
        &self,
        name: &'static str,
        future: impl Future<Output = anyhow::Result<()>> + Send + 'static,
    ) {
        let (watcher, kill) = (self.clone(), self.0.kill.clone());
        let watched = async move {
            tokio::select! {
                biased;
                () = kill.cancelled() => tracing::error!(name, "loop did not finish in time"),
                outcome = AssertUnwindSafe(future).catch_unwind() => {
                    watcher.loop_ended(name, outcome);
                }
            }
        };
        self.0.flushing.spawn(watched.instrument(tracing::info_span!("loop", name)));
    }

    /// Runs a future with an end of its own, such as a call that must not stop half-way, in the
    /// current span. A panic ends it alone, and is logged and counted.
    pub fn spawn(&self, name: &'static str, future: impl Future<Output = ()> + Send + 'static) {
        self.0.tasks.spawn(self.watched(name, future).in_current_span());
    }

    /// As [`spawn`](Self::spawn), in no span: for connections, whose calls have spans of their own.
    pub fn spawn_apart(
        &self,
        name: &'static str,
        future: impl Future<Output = ()> + Send + 'static,
    ) {
        self.0.tasks.spawn(self.watched(name, future));
    }

    fn watched(
        &self,
        name: &'static str,
        future: impl Future<Output = ()> + Send + 'static,
    ) -> impl Future<Output = ()> + Send + 'static {
        let (watcher, kill) = (self.clone(), self.0.kill.clone());
        async move {
            tokio::select! {
                biased;
                () = kill.cancelled() => tracing::debug!(name, "dropped at the end of the grace"),
                outcome = AssertUnwindSafe(future).catch_unwind() => {
                    if let Err(panic) = outcome {
                        watcher.panicked(name, panic.as_ref());
                    }
                }
            }
        }
    }

    /// Cancelled when the shutdown begins: streams end, nothing new starts.
    pub fn token(&self) -> CancellationToken {
        self.0.token.clone()
    }

    /// Cancelled when connections are gone and flushing loops shall write what they hold.
    pub fn last_call(&self) -> CancellationToken {
        self.0.last_call.clone()
    }

    /// Asks the owner of the process to shut down.
    pub fn request_stop(&self) {
        self.0.stop_requested.cancel();
    }

    /// Cancelled once a stop was asked for, by a person or by the failure of a loop.
    pub fn stop_requested(&self) -> CancellationToken {
        self.0.stop_requested.clone()
    }

    /// Loops that ended early and panics, as sentences. Empty in a sound process.
    pub fn failures(&self) -> Vec<String> {
        self.0.failures.lock().clone()
    }

    /// Panics caught so far.
    pub fn panics(&self) -> u64 {
        self.0.panics.load(Ordering::Relaxed)
    }

    /// Counts and logs a panic that was caught elsewhere, such as in a call's handler.
    pub fn panicked(&self, name: &str, panic: &(dyn Any + Send)) {
        let text = panic_text(panic);
        self.0.panics.fetch_add(1, Ordering::Relaxed);
        tracing::error!(name, panic = text, "panic caught");
        self.0.failures.lock().push(format!("{name} panicked: {text}"));
    }

    /// Ends everything in phases, within `grace`.
    pub async fn shutdown(&self, grace: Duration, clock: &Clock) {
        let inner = &self.0;
        let deadline = clock.mono() + grace;
        inner.stop_requested.cancel();
        inner.token.cancel();
        if !ended(&inner.tasks, deadline, clock).await {
            tracing::warn!(left = inner.tasks.len(), "grace is over; dropping what still runs");
        }
        inner.last_call.cancel();
        // Even with the grace used up, the flush is given a moment: it is short and saves work.
        let flush_deadline = deadline.max(clock.mono() + Duration::from_secs(1));
        ended(&inner.flushing, flush_deadline, clock).await;
        inner.stop_loops.cancel();
        inner.kill.cancel();
        for tracker in [&inner.loops, &inner.flushing, &inner.tasks] {
            if !ended(tracker, clock.mono() + Duration::from_secs(1), clock).await {
                tracing::error!(left = tracker.len(), "futures that never yield were left behind");
            }
        }
    }

    fn loop_ended(
        &self,
        name: &'static str,
        outcome: Result<anyhow::Result<()>, Box<dyn Any + Send>>,
    ) {
        let failure = match outcome {
            Ok(Ok(())) if self.0.token.is_cancelled() => return,
            Ok(Ok(())) => format!("loop {name} returned"),
            Ok(Err(error)) => format!("loop {name} failed: {error:#}"),
            Err(panic) => {
                self.0.panics.fetch_add(1, Ordering::Relaxed);
                format!("loop {name} panicked: {}", panic_text(panic.as_ref()))
            }
        };
        tracing::error!(failure, "a loop ended; the server stops");
        self.0.failures.lock().push(failure);
        self.request_stop();
    }
}

/// Waits until the tracker is empty; false when `deadline` came first.
async fn ended(tracker: &TaskTracker, deadline: Mono, clock: &Clock) -> bool {
    tracker.close();
    tokio::select! {
        biased;
        () = tracker.wait() => true,
        () = clock.sleep_until(deadline) => false,
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    match (panic.downcast_ref::<&'static str>(), panic.downcast_ref::<String>()) {
        (Some(text), _) => text,
        (_, Some(text)) => text,
        _ => "(not a text)",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_loop_that_returns_early_is_a_failure_and_asks_for_a_stop() {
        let supervisor = Supervisor::new();
        supervisor.spawn_loop("short", async { Ok(()) });
        supervisor.stop_requested().cancelled().await;
        assert_eq!(supervisor.failures(), ["loop short returned"]);
    }

    #[tokio::test]
    async fn a_panic_in_a_future_is_counted_and_ends_it_alone() {
        let supervisor = Supervisor::new();
        supervisor.spawn("bad", async { panic!("boom") });
        supervisor.shutdown(Duration::from_secs(5), &Clock::system()).await;
        assert_eq!(supervisor.panics(), 1);
        assert_eq!(supervisor.failures(), ["bad panicked: boom"]);
    }

    struct Last(Arc<Mutex<Vec<&'static str>>>);
    impl Drop for Last {
        fn drop(&mut self) {
            self.0.lock().push("writer");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn flushing_loops_end_after_connections_and_before_other_loops() {
        let supervisor = Supervisor::new();
        let (order, clock) = (Arc::new(Mutex::new(Vec::new())), Clock::simulated(Duration::ZERO));
        let (token, log) = (supervisor.token(), order.clone());
        supervisor.spawn("connection", async move {
            token.cancelled().await;
            log.lock().push("connection");
        });
        let (last_call, log) = (supervisor.last_call(), order.clone());
        supervisor.spawn_flushing_loop("recorder", async move {
            last_call.cancelled().await;
            log.lock().push("recorder");
            Ok(())
        });
        let last = Last(order.clone());
        supervisor.spawn_loop("writer", async move {
            let _last = last;
            std::future::pending().await
        });
        tokio::task::yield_now().await;
        supervisor.shutdown(Duration::from_secs(5), &clock).await;
        assert_eq!(*order.lock(), ["connection", "recorder", "writer"]);
        assert!(supervisor.failures().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_ignores_the_token_is_dropped_after_the_grace() {
        let (supervisor, clock) = (Supervisor::new(), Clock::simulated(Duration::ZERO));
        supervisor.spawn("stubborn", std::future::pending());
        supervisor.shutdown(Duration::from_secs(5), &clock).await;
        assert_eq!(clock.mono().0.as_secs(), 5);
    }
}
