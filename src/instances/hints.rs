//! What servers tell each other in passing. Each hint may be lost, and a sweep stands behind each;
//! a server alone, or one without a wire to the others, tells nothing.
//!
//! Nothing is told of what nobody asked for: a server says which tasks its readers follow, and
//! whether it has watchers of the timeline, again and again for as long as that is so.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::{
    clock::{Clock, Mono},
    id::{InstanceId, TaskId},
};

/// Hints on their way out; more are lost.
const WAITING: usize = 8192;
/// What was asked for counts so long, unless it is asked for again.
const ASKED_FOR: Duration = Duration::from_secs(15);
/// Between two times of asking.
pub const ASK_EVERY: Duration = Duration::from_secs(5);

/// What one server tells another. Kinds of a later version are passed over.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "hint", rename_all = "snake_case")]
pub enum Hint {
    /// The attempt, whose runner you hold, has ended.
    Ended {
        /// Task.
        task: TaskId,
        /// Attempt.
        attempt: u32,
        /// Name of the reason.
        reason: String,
        /// For people.
        detail: String,
    },
    /// I have readers of these tasks: say when they move, and send what follows these sequences.
    Follow {
        /// Who.
        from: InstanceId,
        /// Tasks with the last sequences known there.
        tasks: Vec<(TaskId, u64)>,
    },
    /// These tasks have moved.
    Moved {
        /// Tasks.
        tasks: Vec<TaskId>,
    },
    /// I have watchers of the timeline: say when something was added to it.
    Watch {
        /// Who.
        from: InstanceId,
    },
    /// Something was added to the timeline.
    Rang,
    /// Of a later version.
    #[serde(other)]
    Unknown,
}

/// Whom a hint is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum To {
    /// One server.
    One(InstanceId),
    /// Every server.
    All,
}

/// Somebody wants the frames of a task that may run here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked {
    /// Task.
    pub task: TaskId,
    /// Who.
    pub by: InstanceId,
    /// What follows this sequence; `None` for what comes from now on.
    pub after: Option<u64>,
}

/// Tells others; clones share it.
#[derive(Clone, Default)]
pub struct Hints(Option<Arc<Inner>>);

struct Inner {
    clock: Clock,
    out: mpsc::Sender<(To, Hint)>,
    asked: mpsc::Sender<Asked>,
    followers: Mutex<HashMap<TaskId, HashMap<InstanceId, Mono>>>,
    n_followed: AtomicUsize,
    watchers: Mutex<HashMap<InstanceId, Mono>>,
    n_watchers: AtomicUsize,
}

/// What is to be carried to others.
pub struct Outgoing {
    /// Hints.
    pub hints: mpsc::Receiver<(To, Hint)>,
    /// Tasks whose frames are wanted elsewhere.
    pub asked: mpsc::Receiver<Asked>,
}

impl std::fmt::Debug for Hints {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Hints").field(&self.0.is_some()).finish()
    }
}

impl Hints {
    /// Hints that somebody carries.
    pub fn new(clock: Clock) -> (Self, Outgoing) {
        let (out, hints) = mpsc::channel(WAITING);
        let (ask, asked) = mpsc::channel(WAITING);
        let inner = Inner {
            clock,
            out,
            asked: ask,
            followers: Mutex::default(),
            n_followed: AtomicUsize::new(0),
            watchers: Mutex::default(),
            n_watchers: AtomicUsize::new(0),
        };
        (Self(Some(Arc::new(inner))), Outgoing { hints, asked })
    }

    /// Whether anybody carries them.
    pub fn are_carried(&self) -> bool {
        self.0.is_some()
    }

    /// Tells others.
    pub fn tell(&self, to: To, hint: Hint) {
        if let Some(inner) = &self.0 {
            // What does not fit is found by a sweep.
            let _ = inner.out.try_send((to, hint));
        }
    }

    /// Another server follows tasks.
    pub fn follow(&self, by: InstanceId, tasks: &[(TaskId, u64)]) {
        let Some(inner) = &self.0 else { return };
        let now = inner.clock.mono();
        let mut followers = inner.followers.lock();
        followers.retain(|_, by| {
            by.retain(|_, until| *until > now);
            !by.is_empty()
        });
        for (task, after) in tasks {
            followers.entry(*task).or_default().insert(by, now + ASKED_FOR);
            // As above.
            let _ = inner.asked.try_send(Asked { task: *task, by, after: Some(*after) });
        }
        inner.n_followed.store(followers.len(), Relaxed);
    }

    /// Whether a server still follows a task.
    pub fn is_followed(&self, task: TaskId, by: InstanceId) -> bool {
        let Some(inner) = &self.0 else { return false };
        let until = inner.followers.lock().get(&task).and_then(|servers| servers.get(&by).copied());
        until.is_some_and(|until| until > inner.clock.mono())
    }

    /// Another server has watchers.
    pub fn watch(&self, by: InstanceId) {
        let Some(inner) = &self.0 else { return };
        let now = inner.clock.mono();
        let mut watchers = inner.watchers.lock();
        watchers.retain(|_, until| *until > now);
        watchers.insert(by, now + ASKED_FOR);
        inner.n_watchers.store(watchers.len(), Relaxed);
    }

    /// Tells those who asked what was committed here.
    pub fn committed(&self, tasks: impl Iterator<Item = TaskId>) {
        let Some(inner) = &self.0 else { return };
        let now = inner.clock.mono();
        if inner.n_watchers.load(Relaxed) > 0 {
            let watchers = inner.watchers.lock();
            for (by, _) in watchers.iter().filter(|(_, until)| **until > now) {
                self.tell(To::One(*by), Hint::Rang);
            }
        }
        if inner.n_followed.load(Relaxed) == 0 {
            return;
        }
        let mut moved: HashMap<InstanceId, Vec<TaskId>> = HashMap::new();
        {
            let followers = inner.followers.lock();
            for task in tasks {
                for (by, until) in followers.get(&task).into_iter().flatten() {
                    if *until > now {
                        moved.entry(*by).or_default().push(task);
                    }
                }
            }
        }
        for (by, tasks) in moved {
            for task in &tasks {
                // As above.
                let _ = inner.asked.try_send(Asked { task: *task, by, after: None });
            }
            self.tell(To::One(by), Hint::Moved { tasks });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids() -> (TaskId, InstanceId) {
        (TaskId(uuid::Uuid::from_u128(1)), InstanceId(uuid::Uuid::from_u128(2)))
    }

    #[test]
    fn a_hint_of_a_later_version_is_passed_over() {
        let text = r#"{"hint": "dance", "with": {"whom": 1}}"#;
        assert_eq!(serde_json::from_str::<Hint>(text).unwrap(), Hint::Unknown);
        let (task, from) = ids();
        let hint = Hint::Follow { from, tasks: vec![(task, 7)] };
        let text = serde_json::to_string(&hint).unwrap();
        assert_eq!(serde_json::from_str::<Hint>(&text).unwrap(), hint);
    }

    #[test]
    fn nothing_is_told_unless_it_was_asked_for_and_only_for_a_while() {
        let clock = Clock::manual();
        let (hints, mut out) = Hints::new(clock.clone());
        let (task, by) = ids();
        hints.committed([task].into_iter());
        assert!(out.hints.try_recv().is_err());
        hints.follow(by, &[(task, 3)]);
        assert_eq!(out.asked.try_recv().unwrap(), Asked { task, by, after: Some(3) });
        hints.committed([task, TaskId::MAX].into_iter());
        let moved = (To::One(by), Hint::Moved { tasks: vec![task] });
        assert_eq!(out.hints.try_recv().unwrap(), moved);
        assert_eq!(out.asked.try_recv().unwrap(), Asked { task, by, after: None });
        hints.watch(by);
        hints.committed([].into_iter());
        assert_eq!(out.hints.try_recv().unwrap(), (To::One(by), Hint::Rang));
        clock.advance(ASKED_FOR);
        assert!(!hints.is_followed(task, by));
        hints.committed([task].into_iter());
        assert!(out.hints.try_recv().is_err(), "told what nobody asks for any more");
    }
}
