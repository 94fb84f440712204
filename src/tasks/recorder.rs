//! The loop that brings what runners sent to stable storage in the background.
//!
//! Every 400 ms (up to every second where many logs grow), or at once when much is waiting or a log
//! needs more sequences, it takes what the logs have not recorded and gives all of it to the ledger
//! in few transactions. Only then do logs acknowledge it and may drop it from memory. It also has
//! the relay keep its bounds.

use std::{sync::Arc, time::Duration};

use tokio_util::sync::CancellationToken;

use super::ledger::Ledger;
use crate::{
    clock::Clock,
    error::Result,
    relay::{Log, Relay, SegmentData},
    telemetry::Metrics,
};

/// Least time between two passes.
const SHORTEST: Duration = Duration::from_millis(400);

/// Longest time that an event waits to be recorded.
const LONGEST: Duration = Duration::from_secs(1);

/// What each log that grew adds to the time: a row costs its write, whatever is in it, so from 80
/// logs on there are 200 rows a second, until the longest time is reached.
const PER_LOG: Duration = Duration::from_millis(5);

/// Pause after a failure, so that failing storage is not hammered.
const PAUSE: Duration = Duration::from_millis(500);

/// Time between two sweeps of an idle relay.
const SWEEP: Duration = Duration::from_secs(1);

/// Bytes of one transaction.
const TRANSACTION: usize = 8 << 20;

/// Records logs.
pub struct Recorder {
    relay: Relay,
    ledger: Ledger,
    clock: Clock,
    metrics: Metrics,
}

impl Recorder {
    /// A recorder of these logs.
    pub fn new(relay: Relay, ledger: Ledger, clock: Clock, metrics: Metrics) -> Self {
        Self { relay, ledger, clock, metrics }
    }

    /// Records for ever; after `last_call`, when no runner can send any more, a last time.
    pub async fn run(self, last_call: CancellationToken) -> anyhow::Result<()> {
        let mut interval = SHORTEST;
        while !last_call.is_cancelled() {
            tokio::select! {
                () = self.relay.dirty_notified() => tokio::select! {
                    () = self.clock.sleep(interval) => {}
                    () = self.relay.hurried() => {}
                    () = last_call.cancelled() => {}
                },
                () = self.clock.sleep(SWEEP) => {}
                () = last_call.cancelled() => {}
            }
            let recorded = self.run_once().await;
            self.relay.evict();
            self.measure();
            match recorded {
                Ok(n_logs) => interval = interval_after(n_logs),
                Err(error) => {
                    tracing::warn!(%error, "events wait to be recorded");
                    tokio::select! {
                        () = self.clock.sleep(PAUSE) => {}
                        () = last_call.cancelled() => {}
                    }
                }
            }
        }
        self.run_once().await?;
        Ok(())
    }

    /// Records what there is; returns how many segments that were. What failed is taken again.
    pub async fn run_once(&self) -> Result<usize> {
        let mut taken: Vec<(Arc<Log>, SegmentData)> = Vec::new();
        for log in self.relay.dirty() {
            if let Some(segment) = log.take_unrecorded() {
                taken.push((log, segment));
            }
        }
        let n_segments = taken.len();
        let mut outcome = Ok(n_segments);
        while !taken.is_empty() {
            let mut size = 0;
            let fits = taken.iter().take_while(|(_, segment)| {
                let before = size;
                size += segment.frames.len();
                before == 0 || size <= TRANSACTION
            });
            let batch: Vec<_> = {
                let n_fitting = fits.count();
                taken.drain(..n_fitting).collect()
            };
            let mut left_out = Vec::new();
            // After a failure the others are given back unasked.
            if outcome.is_ok() {
                let segments = batch.iter().map(|(_, segment)| segment.clone()).collect();
                match self.ledger.record(segments).await {
                    Ok(tasks) => left_out = tasks,
                    Err(error) => outcome = Err(error),
                }
            }
            for (log, segment) in batch {
                // Of an attempt that another server ended nothing is kept, so nothing is
                // acknowledged; its lease is let go as soon as this one hears of it.
                if outcome.is_ok() && !left_out.contains(&segment.task) {
                    self.metrics.segment_bytes.inc_by(segment.frames.len() as u64);
                    log.recorded(segment.last, segment.reserve_to.unwrap_or(0));
                } else {
                    log.not_recorded(segment.last);
                }
            }
        }
        outcome
    }

    fn measure(&self) {
        let stats = self.relay.stats();
        self.metrics.relay_bytes.set(stats.bytes as i64);
        self.metrics.relay_logs.set(stats.logs as i64);
        self.metrics.relay_subscribers.set(stats.subscribers as i64);
    }
}

/// Time until the next pass, after one that recorded so many logs.
fn interval_after(n_logs: usize) -> Duration {
    let time = PER_LOG.saturating_mul(n_logs.try_into().unwrap_or(u32::MAX));
    time.clamp(SHORTEST, LONGEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_logs_are_recorded_less_often_but_each_second() {
        let ms = |n_logs| interval_after(n_logs).as_millis();
        assert_eq!([0, 80, 120, 200, usize::MAX].map(ms), [400, 400, 600, 1000, 1000]);
    }
}
