//! What a batch reads before it decides.

use std::{collections::HashSet, sync::Arc};

use super::{
    Ask,
    batch::{Batch, Row, is_elsewhere},
    open::OpenTasks,
};
use crate::{
    db::Tx,
    error::Result,
    id::TaskId,
    instances::Standing,
    tasks::{
        model::{State, Task},
        reads,
        state::Event,
        store,
    },
};

impl Batch {
    /// Reads what the commands are about: from `open`, else from the database.
    pub(super) async fn load(
        &mut self,
        tx: &mut Tx,
        open: &OpenTasks,
        standing: &Standing,
    ) -> Result<()> {
        let keys: Vec<(&str, &str)> = self
            .commands
            .iter()
            .filter_map(|command| match &command.ask {
                Ask::Submit(new) => Some((new.namespace.as_str(), new.request_id.as_deref()?)),
                _ => None,
            })
            .collect();
        let known = store::find_requests(tx, &keys).await?;
        let mut wanted: HashSet<TaskId> = known.iter().map(|request| request.task).collect();
        for command in &self.commands {
            match &command.ask {
                Ask::Submit(new) => wanted.extend(new.retry_of),
                Ask::Apply(id, _) | Ask::ApplyFor(id, ..) | Ask::Delete(_, id) => {
                    wanted.insert(*id);
                }
                Ask::Record(segments) => wanted.extend(segments.iter().map(|s| s.task)),
            }
        }
        if standing.id().is_some() {
            // An older task is shown as it is, and not as it was when this server saw it last.
            for request in &known {
                open.remove(request.task);
            }
        }
        self.load_rows(tx, open, wanted).await?;
        self.known = known
            .into_iter()
            .map(|request| ((request.namespace.clone(), request.request_id.clone()), request))
            .collect();
        self.load_durable(tx, standing).await
    }

    /// Reads how far storage is with running attempts that other servers hold.
    async fn load_durable(&mut self, tx: &mut Tx, standing: &Standing) -> Result<()> {
        if standing.id().is_none() {
            return Ok(());
        }
        let ends = self.commands.iter().filter_map(|command| match &command.ask {
            Ask::Apply(_, Event::Resume { .. }) => None,
            Ask::Apply(id, _) | Ask::ApplyFor(id, ..) => self.rows.get(id),
            _ => None,
        });
        let elsewhere =
            |row: &&Row| row.task.state == State::Running && is_elsewhere(&row.task, standing);
        let ids: Vec<_> = ends.filter(elsewhere).map(|row| row.task.id).collect();
        self.durable = reads::last_stored(tx, &ids).await?;
        Ok(())
    }

    /// Reads rows that the batch does not have yet; unknown ids stay absent.
    pub(super) async fn load_rows(
        &mut self,
        tx: &mut Tx,
        open: &OpenTasks,
        ids: impl IntoIterator<Item = TaskId>,
    ) -> Result<()> {
        let mut missing = Vec::new();
        for id in ids {
            if self.rows.contains_key(&id) {
                continue;
            }
            match open.get(id) {
                Some(task) => self.put(task, true),
                None => missing.push(id),
            }
        }
        for task in store::load(tx, &missing).await? {
            self.put(Arc::new(task), false);
        }
        Ok(())
    }

    fn put(&mut self, task: Arc<Task>, at_hand: bool) {
        let stored = Some(task.revision);
        self.rows.insert(task.id, Row { task, stored, at_hand, deleted: false });
    }
}
