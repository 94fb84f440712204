//! Where a queue that shares its tasks with other servers tells of them, and asks for room.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use futures_util::future::BoxFuture;
use tokio::sync::{Notify, mpsc};

use super::model::Entry;
use crate::{
    error::Result,
    id::{Namespace, TaskId},
};

/// What may wait to be told: more than commit while Redis takes a second to answer. What does not
/// fit is found in the database.
const TOLD: usize = 65_536;

/// What a server has done, for the backlog; after the commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Told {
    /// The task waits, and may start anywhere.
    Waits(Box<Entry>),
    /// The task waits no more: it was started, or it ended.
    Gone(TaskId),
    /// The task that was given room was not accepted.
    Released(TaskId),
    /// The task's attempts are used up.
    Dead {
        /// Which.
        task: TaskId,
        /// Why its last attempt failed.
        reason: String,
    },
}

/// A task that asks for room.
#[derive(Clone, Debug)]
pub struct Asked {
    /// Its id, if it is accepted.
    pub task: TaskId,
    /// Tenant.
    pub namespace: Namespace,
    /// `owner/name`.
    pub model: String,
    /// -100 to 100.
    pub priority: i32,
}

/// Grants room, or refuses with `QUEUE_FULL`; names the task that had to leave for it.
pub type Admit = dyn Fn(Asked) -> BoxFuture<'static, Result<Option<TaskId>>> + Send + Sync;

/// The queue's end.
pub(super) struct Outlet {
    told: mpsc::Sender<Told>,
    admit: Arc<Admit>,
    missed: Arc<AtomicBool>,
    hungry: Arc<Notify>,
}

/// The backlog's end.
#[derive(Debug)]
pub struct Inlet {
    /// What was told.
    pub told: mpsc::Receiver<Told>,
    missed: Arc<AtomicBool>,
    hungry: Arc<Notify>,
}

impl fmt::Debug for Outlet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outlet").finish_non_exhaustive()
    }
}

/// Both ends.
pub(super) fn pair(admit: Arc<Admit>) -> (Outlet, Inlet) {
    let (sender, told) = mpsc::channel(TOLD);
    let (missed, hungry) = (Arc::new(AtomicBool::new(false)), Arc::new(Notify::new()));
    let outlet = Outlet { told: sender, admit, missed: missed.clone(), hungry: hungry.clone() };
    (outlet, Inlet { told, missed, hungry })
}

impl Outlet {
    pub(super) fn tell(&self, told: Told) {
        if self.told.try_send(told).is_err() {
            self.missed.store(true, Ordering::Release);
        }
    }

    /// Says that more may start now.
    pub(super) fn hungry(&self) {
        self.hungry.notify_one();
    }

    pub(super) fn admit(&self, asked: Asked) -> BoxFuture<'static, Result<Option<TaskId>>> {
        (self.admit)(asked)
    }
}

impl Inlet {
    /// Whether something was not told since the last call.
    pub fn take_missed(&self) -> bool {
        self.missed.swap(false, Ordering::AcqRel)
    }

    /// What completes when more may start than at the last time.
    pub fn hungry(&self) -> Arc<Notify> {
        self.hungry.clone()
    }
}
