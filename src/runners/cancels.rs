//! Attempts that a runner was told to stop, until it says that it has. Plain data.

use std::{collections::BTreeMap, time::Duration};

use super::model::Fence;
use crate::clock::{Micros, Mono};

/// Attempts that are remembered at once; beyond it the oldest task's is forgotten.
const MAX_TOLD: usize = 4096;

/// An attempt that is to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Told {
    /// When the runner was told.
    pub time: Micros,
    /// Since when it is known to have heard.
    pub acked: Option<Mono>,
    /// Whether it should have stopped by now.
    pub overdue: bool,
    seq: u64,
    grace: Duration,
}

/// What became of a Cancel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The attempt stopped within the grace.
    Stopped,
    /// It stopped later.
    Late,
    /// It has not stopped in time; it may still.
    Overdue,
}

impl Outcome {
    /// Label of the metric.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stopped => "stopped",
            Self::Late => "late",
            Self::Overdue => "overdue",
        }
    }
}

/// The attempts that a runner is to stop.
#[derive(Debug, Default)]
pub struct Cancels(BTreeMap<Fence, Told>);

impl Cancels {
    /// The runner was told by the message `seq`.
    pub fn tell(&mut self, fence: Fence, seq: u64, now: Micros, grace: Duration) {
        let told = Told { time: now, acked: None, overdue: false, seq, grace };
        self.0.insert(fence, told);
        if self.0.len() > MAX_TOLD {
            self.0.pop_first();
        }
    }

    /// The runner says that nothing of the attempt runs any more, so long after it was told.
    /// `None` when it was not told, or when this was overdue and has been counted.
    pub fn stopped(&mut self, fence: Fence, took: Duration) -> Option<Outcome> {
        let told = self.0.remove(&fence)?;
        let outcome = if took <= told.grace { Outcome::Stopped } else { Outcome::Late };
        (!told.overdue).then_some(outcome)
    }

    /// Finds the attempts that have become overdue: `slack` after the grace, which began when the
    /// runner was seen to know. It acknowledges messages up to `acked_seq`.
    pub fn sweep(&mut self, acked_seq: u64, mono: Mono, slack: Duration) -> Vec<Fence> {
        let mut overdue = Vec::new();
        for (fence, told) in self.0.iter_mut().filter(|(_, told)| told.seq <= acked_seq) {
            let acked = *told.acked.get_or_insert(mono);
            if acked + told.grace + slack <= mono && !std::mem::replace(&mut told.overdue, true) {
                overdue.push(*fence);
            }
        }
        overdue
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (&Fence, &Told)> {
        self.0.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::TaskId;

    const GRACE: Duration = Duration::from_secs(5);
    const SLACK: Duration = Duration::from_secs(1);

    fn fence(n: u128) -> Fence {
        Fence { task: TaskId(uuid::Uuid::from_u128(n)), attempt: 1 }
    }

    #[test]
    fn the_grace_begins_when_the_runner_knows() {
        let mut cancels = Cancels::default();
        cancels.tell(fence(1), 7, Micros(0), GRACE);
        assert!(cancels.sweep(6, Mono(10 * GRACE), SLACK).is_empty());
        let known = Mono(11 * GRACE);
        assert!(cancels.sweep(7, known, SLACK).is_empty());
        assert!(cancels.sweep(7, known + GRACE, SLACK).is_empty());
        assert_eq!(cancels.sweep(7, known + GRACE + SLACK, SLACK), [fence(1)]);
        assert!(cancels.sweep(7, known + 2 * GRACE, SLACK).is_empty(), "told twice");
        assert_eq!(cancels.stopped(fence(1), 3 * GRACE), None, "counted twice");
    }

    #[test]
    fn what_the_runner_says_is_judged_by_the_grace() {
        let mut cancels = Cancels::default();
        cancels.tell(fence(1), 1, Micros(0), GRACE);
        cancels.tell(fence(2), 2, Micros(0), GRACE);
        assert_eq!(cancels.stopped(fence(1), GRACE), Some(Outcome::Stopped));
        assert_eq!(cancels.stopped(fence(2), GRACE + SLACK), Some(Outcome::Late));
        assert_eq!(cancels.stopped(fence(3), GRACE), None);
        assert_eq!(cancels.iter().count(), 0);
    }
}
