//! What a start, or the return of storage, makes of the rows: the queue, the timers and the
//! logs of running attempts.

use std::sync::Arc;

use super::{
    ledger::Parts,
    model::{State, Task},
    queued, reads, store,
};
use crate::{
    error::Result,
    faults::{self, Fault},
    id::TaskId,
    pb::{Frame, task_event::Body},
    relay,
};

/// Rows read at once.
const PAGE: u32 = 5000;

/// Watches the time limits of every waiting task and puts it in the queue, unless that shares its
/// tasks with other servers; returns how many there are.
pub async fn waiting(parts: &Parts) -> Result<usize> {
    let mut after = None;
    let mut n_tasks = 0;
    loop {
        let page = parts
            .db
            .read(move |tx| Box::pin(async move { queued::waiting_page(tx, after, PAGE).await }))
            .await?;
        let Some(last) = page.last() else { return Ok(n_tasks) };
        after = Some(last.entry.id);
        n_tasks += page.len();
        if !faults::planted(Fault::ForgetLimitsAtStart) {
            for (at, task, limit) in page.iter().flat_map(queued::Waiting::limits) {
                parts.timers.add(at, task, limit);
            }
        }
        if !parts.queue.is_shared() {
            parts.queue.push_all(page.into_iter().map(|waiting| waiting.entry));
        }
    }
}

/// Opens the logs of running attempts that are this server's where storage left off, so that their runners can go on;
/// returns the tasks, whose leases begin anew.
pub async fn running(parts: &Parts) -> Result<Vec<Arc<Task>>> {
    let instance = parts.standing.id();
    let mut after = None;
    let mut tasks = Vec::new();
    loop {
        let page = parts
            .db
            .read(move |tx| {
                Box::pin(async move { reads::running_page(tx, instance, after, PAGE).await })
            })
            .await?;
        let Some(last) = page.last() else { return Ok(tasks) };
        after = Some(last.id);
        for task in page {
            resume(parts, &task).await?;
            parts.timers.watch(&task);
            tasks.push(Arc::new(task));
        }
    }
}

/// As [`running`], for some tasks of which nothing is known here.
pub async fn strays(parts: &Parts, ids: Vec<TaskId>) -> Result<Vec<Arc<Task>>> {
    let read = parts.db.read(move |tx| Box::pin(async move { store::load(tx, &ids).await }));
    let mut tasks = Vec::new();
    for task in read.await? {
        if task.state == State::Running && task.instance == parts.standing.id() {
            resume(parts, &task).await?;
            parts.timers.watch(&task);
            tasks.push(Arc::new(task));
        }
    }
    Ok(tasks)
}

/// Opens the log of a running attempt where storage left off.
pub async fn resume(parts: &Parts, task: &Task) -> Result<()> {
    let (id, attempt) = (task.id, task.attempt);
    let segments = parts
        .db
        .read(move |tx| Box::pin(async move { reads::segments(tx, id, attempt).await }))
        .await?;
    let durable = segments.last().map_or(task.base_sequence, |(last, _)| *last);
    let tokens = segments.iter().flat_map(|(_, frames)| relay::frames(frames.clone()).flatten());
    let tokens = tokens.filter(is_token).count();
    parts.queue.resumed(&task.namespace, &task.spec.model, id);
    parts.relay.open(id).resume_attempt(
        attempt,
        task.base_sequence,
        durable,
        tokens as u64,
        task.reserved_sequence,
    );
    Ok(())
}

fn is_token(frame: &bytes::Bytes) -> bool {
    Frame::new(frame.clone()).event().is_ok_and(|event| matches!(event.body, Some(Body::Token(_))))
}
