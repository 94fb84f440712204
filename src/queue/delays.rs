//! Tasks that may not start yet: until a time of the wall clock, or until a backoff has passed.
//!
//! What a user asked for goes by the wall clock, also when it is set. A backoff lasts as long as it
//! was to last when the task came here, by the monotonic clock, wherever the wall clock is set.

use std::collections::BTreeSet;

use super::model::Entry;
use crate::{
    clock::{Clock, Micros, Mono},
    id::TaskId,
};

/// Now, by both clocks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Moment {
    pub wall: Micros,
    pub mono: Mono,
}

impl Moment {
    pub(super) fn of(clock: &Clock) -> Self {
        Self { wall: clock.now(), mono: clock.mono() }
    }
}

/// When a task may start.
#[derive(Clone, Copy, Debug)]
pub(super) enum Due {
    At(Micros),
    Rested(Mono),
}

impl Due {
    /// When an entry may start; `None` when it may now.
    pub(super) fn of(entry: &Entry, now: Moment) -> Option<Self> {
        let time = entry.not_before.filter(|time| !entry.waited_out && *time > now.wall)?;
        let backs_off = entry.attempt > 0;
        Some(if backs_off { Self::Rested(now.mono + time.since(now.wall)) } else { Self::At(time) })
    }
}

/// The tasks that wait for a time.
#[derive(Debug, Default)]
pub(super) struct Delays {
    at: BTreeSet<(Micros, TaskId)>,
    rested: BTreeSet<(Mono, TaskId)>,
}

impl Delays {
    pub(super) fn insert(&mut self, due: Due, id: TaskId) {
        match due {
            Due::At(time) => self.at.insert((time, id)),
            Due::Rested(time) => self.rested.insert((time, id)),
        };
    }

    pub(super) fn remove(&mut self, due: Due, id: TaskId) {
        match due {
            Due::At(time) => self.at.remove(&(time, id)),
            Due::Rested(time) => self.rested.remove(&(time, id)),
        };
    }

    /// Takes one out that may start.
    pub(super) fn pop(&mut self, now: Moment) -> Option<TaskId> {
        if self.at.first().is_some_and(|(time, _)| *time <= now.wall) {
            return self.at.pop_first().map(|(_, id)| id);
        }
        if self.rested.first().is_some_and(|(time, _)| *time <= now.mono) {
            return self.rested.pop_first().map(|(_, id)| id);
        }
        None
    }
}
