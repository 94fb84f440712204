//! Starts in the commit that accepts: a task that finds a free runner needs no second commit.
//!
//! What a batch accepts goes into the queue before the commit, and the queue decides at once
//! who may start, by the same policy as ever: a task that waited longer goes first. Whoever
//! else takes such a task out of the queue asks this loop to start it, which happens after the
//! commit; if the commit fails, there is nothing to start.

use std::{collections::HashSet, sync::Arc};

use super::{Start, Writer, batch::Batch, queue_entry};
use crate::{
    db::Tx,
    error::Result,
    id::{InstanceId, TaskId},
    queue::{Match, SupplyKey},
    tasks::{model::Task, state::Event},
};

/// Most tasks started in the commit of others.
const ROUND: usize = 256;

/// The start that a match stands for.
type StartOf = dyn Fn(&Match) -> Option<Start> + Send + Sync;

/// How the ledger starts what it accepts.
pub struct Starter {
    /// The start that a match stands for; `None` when its runner has left or nothing is to be
    /// started any more.
    pub start: Box<StartOf>,
    /// Takes a started attempt to its runner.
    pub assign: Box<dyn Fn(SupplyKey, Arc<Task>) + Send + Sync>,
}

impl Start {
    pub(super) fn into_event(self, instance: Option<InstanceId>) -> (TaskId, Event) {
        let Self { task, runner, node, engine, engine_version, waited } = self;
        (task, Event::Start { runner, node, engine, engine_version, instance, waited })
    }
}

impl Writer {
    /// Starts tasks in the commit that accepts them, where a runner is free.
    #[must_use]
    pub fn starting(self, starter: Starter) -> Self {
        Self { starter: Some(starter), ..self }
    }

    /// Puts accepted tasks into the queue and starts what it matches.
    pub(super) async fn start_accepted(&mut self, batch: &mut Batch, tx: &mut Tx) -> Result<()> {
        let queue = &self.parts.queue;
        let entries: Vec<_> = batch.accepted().map(|task| queue_entry(task)).collect();
        if entries.is_empty() {
            return Ok(());
        }
        let Some(starter) = &self.starter else {
            queue.push_all(entries);
            return Ok(());
        };
        batch.matches = queue.place(entries, ROUND);
        let ids: Vec<_> = batch.matches.iter().map(|matched| matched.entry.id).collect();
        batch.load_rows(tx, &self.open, ids).await?;
        let now = self.parts.clock.now();
        for matched in std::mem::take(&mut batch.matches) {
            let Some(start) = (starter.start)(&matched) else {
                queue.give_back(matched.runner);
                queue.push(matched.entry);
                continue;
            };
            match batch.start(start, &self.parts, now) {
                Ok(()) => batch.matches.push(matched),
                Err(error) => {
                    tracing::debug!(task.id = %matched.entry.id, %error, "not started");
                    queue.give_back(matched.runner);
                    queue.gone(matched.entry.id);
                }
            }
        }
        batch.settle();
        Ok(())
    }

    /// After the commit: takes what was started to its runners.
    pub(super) fn assign_started(&self, batch: &mut Batch) {
        let Some(starter) = &self.starter else { return };
        for matched in std::mem::take(&mut batch.matches) {
            if let Some(task) = batch.task(matched.entry.id) {
                (starter.assign)(matched.runner, task.clone());
            }
        }
    }

    /// Nothing was committed: the queue forgets what it was told of it.
    pub(super) fn undo_starts(&self, batch: &mut Batch) {
        let queue = &self.parts.queue;
        let accepted: HashSet<_> = batch.accepted().map(|task| task.id).collect();
        for id in &accepted {
            queue.remove(*id);
        }
        for matched in std::mem::take(&mut batch.matches) {
            queue.give_back(matched.runner);
            if !accepted.contains(&matched.entry.id) {
                queue.push(matched.entry);
            }
        }
    }
}
