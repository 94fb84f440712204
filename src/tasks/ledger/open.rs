//! Rows of open tasks, as they were in the database last. The ledger writes them here after the
//! commit and before it answers, so that a reader finds at least what it was told.
//!
//! Where other servers write too, a row here may be behind the database. The ledger may start
//! from it all the same, since what it writes then is refused unless the revision is still the
//! same; but readers are not given it.

use std::{collections::HashMap, sync::Arc};

use parking_lot::RwLock;

use crate::{
    faults::{self, Fault},
    id::TaskId,
    tasks::model::Task,
};

/// Open tasks whose rows are kept at hand.
const KEPT: usize = 16_384;
/// Rows with a longer input than this are not kept at hand.
const KEPT_INPUT: usize = 64 << 10;

/// Rows at hand; clones share them. A task that is not here may be open all the same.
#[derive(Clone, Debug, Default)]
pub(super) struct OpenTasks(Arc<RwLock<HashMap<TaskId, Arc<Task>>>>);

impl OpenTasks {
    /// The row of an open task, if it is at hand.
    pub(super) fn get(&self, id: TaskId) -> Option<Arc<Task>> {
        self.0.read().get(&id).cloned()
    }

    /// Keeps a row, if there is room.
    pub(super) fn keep(&self, task: Arc<Task>) {
        let mut tasks = self.0.write();
        let room = tasks.len() < KEPT && task.spec.input.len() <= KEPT_INPUT;
        if room || tasks.contains_key(&task.id) {
            tasks.insert(task.id, task);
        }
    }

    /// Forgets a task.
    pub(super) fn remove(&self, id: TaskId) {
        if faults::planted(Fault::StaleReads) {
            return;
        }
        self.0.write().remove(&id);
    }

    /// Forgets all.
    pub(super) fn clear(&self) {
        self.0.write().clear();
    }
}
