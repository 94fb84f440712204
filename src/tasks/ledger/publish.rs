//! What is told after a commit. None of it may fail: a nudge that is lost is found by a sweep.

use std::sync::Arc;

use bytes::Bytes;

use super::{
    Writer,
    batch::Batch,
    effect::{Cause, Effect},
};
use crate::{
    error::{Reason, reason_name},
    instances::hints::{Hint, To},
    queue::{Entry, Revocation},
    tasks::model::{State, Task},
    telemetry::{OutcomeLabel, StateLabel},
};

impl Writer {
    /// Tells everyone what was committed, then answers.
    pub(super) fn publish(&mut self, mut batch: Batch) {
        batch.committed();
        for effect in std::mem::take(&mut batch.effects) {
            match effect {
                Effect::Accepted(task) => {
                    self.parts.timers.watch(&task);
                    self.parts.metrics.submits.inc();
                    self.parts.queue.accepted(task.id);
                    self.open.keep(task);
                }
                Effect::Kept(task) => self.open.keep(task),
                Effect::Started { was, now } => {
                    let ready = was.not_before.unwrap_or(was.create_time);
                    let waited = now.start_time.unwrap_or(ready).since(ready);
                    self.parts.queue.started(&now.namespace, &now.spec.model, now.id);
                    self.parts.metrics.attempts.inc();
                    if self.parts.standing.id().is_some() {
                        // Another may have accepted it; from now on this one watches its time.
                        self.parts.timers.watch(&now);
                    }
                    if now.attempt == 1 {
                        self.parts.metrics.wait_seconds.observe(waited.as_secs_f64());
                    }
                    self.open.keep(now);
                }
                Effect::Requeued { was, now, cause } => {
                    self.attempt_ended(&was, &now, cause);
                    if self.parts.standing.id().is_some() {
                        // Whoever watched its time may be gone.
                        self.parts.timers.watch(&now);
                    }
                    self.parts.queue.wait(queue_entry(&now));
                    self.open.keep(now);
                }
                Effect::Ended { was, now, cause } => {
                    if was.state == State::Running {
                        self.attempt_ended(&was, &now, cause);
                    } else {
                        self.parts.queue.gone(now.id);
                    }
                    if now.state == State::DeadLettered {
                        let reason = now.error.as_ref().map_or("", |error| &*error.reason);
                        self.parts.queue.dead(now.id, reason);
                    }
                    let state = now.state.as_str();
                    self.parts.metrics.ends.get_or_create(&StateLabel { state }).inc();
                    self.open.remove(now.id);
                    log_end(&now);
                }
            }
        }
        let rang = !batch.frames.is_empty();
        let moved: Vec<_> = if self.parts.hints.are_carried() {
            batch.frames.keys().copied().collect()
        } else {
            Vec::new()
        };
        for (id, frames) in std::mem::take(&mut batch.frames) {
            if let Some(task) = batch.task(id) {
                let after = batch.after.get(&id).copied().unwrap_or(0);
                self.publish_frames(task, after, &frames);
            }
        }
        self.assign_started(&mut batch);
        if rang {
            self.parts.tail.ring();
            self.parts.hints.committed(moved.into_iter());
        }
        answer(&mut batch);
    }

    /// Shows what was committed to readers. A running attempt takes the runner's events from
    /// then on.
    fn publish_frames(&self, task: &Task, after: u64, frames: &[(u64, Bytes)]) {
        if self.parts.standing.id().is_some()
            && let Some(log) = self.parts.relay.find(task.id)
        {
            log.catch_up(after);
        }
        if task.state == State::Running {
            let log = self.parts.relay.open(task.id);
            log.publish(frames, false);
            log.begin_attempt(task.attempt, task.base_sequence, task.reserved_sequence);
        } else if let Some(log) = self.parts.relay.find(task.id) {
            log.publish(frames, task.state.is_terminal());
        }
    }

    fn attempt_ended(&self, was: &Task, now: &Arc<Task>, cause: Cause) {
        let outcome = match (&cause, now.state) {
            (Cause::Runner, State::Succeeded) => "succeeded",
            (Cause::Runner, _) if now.handed_back > was.handed_back => "handed_back",
            (Cause::Other(Reason::Cancelled), _) => "cancelled",
            (Cause::Other(Reason::ExecutionTimeout | Reason::DeadlineExceeded), _) => "timed_out",
            (Cause::Other(_), _) => "lost",
            (Cause::Runner, _) => "failed",
        };
        self.parts.metrics.attempt_ends.get_or_create(&OutcomeLabel { outcome }).inc();
        let took = now.usage.map(|usage| usage.execution).unwrap_or_default();
        let succeeded = now.state == State::Succeeded;
        self.parts.queue.finished(&now.spec.model, now.id, took, succeeded);
        if let Cause::Other(reason) = cause {
            let detail = now.error.as_ref().map(|error| error.message.clone()).unwrap_or_default();
            let (task, attempt) = (now.id, was.attempt);
            if let Some(holder) = was.instance.filter(|_| was.instance != self.parts.standing.id())
            {
                let (reason, detail) = (reason_name(reason).to_owned(), detail.clone());
                let ended = Hint::Ended { task, attempt, reason, detail };
                self.parts.hints.tell(To::One(holder), ended);
            }
            self.parts.queue.revoke(Revocation { task, attempt, reason, detail });
        }
    }
}

/// Answers each command of a batch.
pub(super) fn answer(batch: &mut Batch) {
    for (command, answer) in batch.commands.drain(..).zip(batch.answers.drain(..)) {
        // The caller may have left.
        let _ = command.reply.send(answer);
    }
}

/// How the queue sees a task.
pub fn queue_entry(task: &Task) -> Entry {
    Entry {
        id: task.id,
        namespace: task.namespace.clone(),
        model: task.spec.model.clone(),
        version: task.spec.version.clone(),
        required_labels: Arc::new(task.spec.required_labels.clone()),
        priority: task.spec.priority,
        create_time: task.create_time,
        not_before: task.not_before,
        deadline: task.spec.deadline,
        session: task.spec.session.clone(),
        attempt: task.attempt,
        waited_out: false,
    }
}

fn log_end(task: &Task) {
    let usage = task.usage.unwrap_or_default();
    tracing::info!(
        task.id = %task.id,
        namespace = %task.namespace,
        model = %task.spec.model,
        state = %task.state,
        attempt = task.attempt,
        reason = task.error.as_ref().map(|error| error.reason.as_str()),
        session_id = task.spec.session,
        tokens_in = usage.tokens_in,
        tokens_out = usage.tokens_out,
        duration_ms = task.end_time.unwrap_or_default().since(task.create_time).as_millis() as u64,
        "task ended"
    );
}
