//! One transaction's worth of commands: loaded, applied in memory, saved.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::Arc,
};

use super::{
    Answer, Ask, Command, NewTask, Parts, Start, Submitted,
    effect::{Effect, attempt_of, cause_of, count_usage, is_holders},
    refused::{lease_lost, refused},
};
use crate::{
    clock::Micros,
    error::{Error, Kind, Reason, Result},
    events::store::NewEvent,
    faults::{self, Fault},
    id::{Namespace, TaskId},
    instances::{Mandate, Standing},
    queue::Match,
    relay::{Log, SegmentData},
    tasks::{
        convert,
        model::{State, Task},
        state::{self, Entry, Event, Head, Rejected},
        store::{self, Request, SegmentRow},
    },
};

/// A log at rest, and what of it is not on stable storage yet.
type FrozenLog = (Arc<Log>, Option<SegmentData>);

/// A row in the making.
pub(super) struct Row {
    pub(super) task: Arc<Task>,
    /// Revision in the database; `None` for a row to insert.
    pub(super) stored: Option<u64>,
    /// Whether it was at hand, and may be behind the database where other servers write.
    pub(super) at_hand: bool,
    pub(super) deleted: bool,
}

/// Commands and what becomes of them. Dropped before it is published, it thaws what it froze.
pub(super) struct Batch {
    pub(super) commands: Vec<Command>,
    pub(super) answers: Vec<Result<Answer>>,
    pub(super) effects: Vec<Effect>,
    /// Matches whose tasks start in this commit.
    pub(super) matches: Vec<Match>,
    /// Frames by task, in order.
    pub(super) frames: HashMap<TaskId, Vec<(u64, bytes::Bytes)>>,
    /// The sequences that these frames follow, where other servers add some too; 0 where unset.
    pub(super) after: HashMap<TaskId, u64>,
    pub(super) rows: HashMap<TaskId, Row>,
    pub(super) known: HashMap<(Namespace, String), Request>,
    pub(super) events: Vec<NewEvent>,
    pub(super) segments: Vec<SegmentRow>,
    pub(super) requests: Vec<Request>,
    /// Requests in whose place others are remembered.
    pub(super) replaced: Vec<Request>,
    /// The retry of each ended task.
    pub(super) retries: HashMap<TaskId, TaskId>,
    /// Tasks whose segments are written without a move of theirs.
    pub(super) recorded: HashSet<TaskId>,
    frozen: Vec<(Arc<Log>, u32)>,
    /// Highest sequences on stable storage of attempts that other servers hold.
    pub(super) durable: HashMap<TaskId, u64>,
    /// Locks that commands rely on.
    pub(super) mandates: BTreeSet<Mandate>,
    /// Attempts of other servers that end, with the last sequence that storage has of each.
    pub(super) elsewhere: HashMap<TaskId, u64>,
    /// Whether something was refused because of a row that was at hand.
    doubtful: bool,
}

impl Batch {
    pub(super) fn new(commands: Vec<Command>) -> Self {
        Self {
            answers: Vec::with_capacity(commands.len()),
            commands,
            effects: Vec::new(),
            matches: Vec::new(),
            frames: HashMap::new(),
            after: HashMap::new(),
            rows: HashMap::new(),
            known: HashMap::new(),
            events: Vec::new(),
            segments: Vec::new(),
            requests: Vec::new(),
            replaced: Vec::new(),
            retries: HashMap::new(),
            recorded: HashSet::new(),
            frozen: Vec::new(),
            durable: HashMap::new(),
            mandates: BTreeSet::new(),
            elsewhere: HashMap::new(),
            doubtful: false,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.commands.len()
    }

    /// The task as it is after the batch.
    pub(super) fn task(&self, id: TaskId) -> Option<&Arc<Task>> {
        self.rows.get(&id).map(|row| &row.task)
    }

    pub(super) fn into_commands(mut self) -> Vec<Command> {
        std::mem::take(&mut self.commands)
    }

    pub(super) fn fail(mut self, error: &Error) {
        for command in std::mem::take(&mut self.commands) {
            let answer = Error::new(error.kind(), error.reason(), error.message());
            let answer = match error.retry_delay() {
                Some(after) => answer.retry_after(after),
                None => answer,
            };
            // The caller may have left.
            let _ = command.reply.send(Err(answer));
        }
    }

    /// The commit is done: logs that were frozen are left to their next entries.
    pub(super) fn committed(&mut self) {
        self.frozen.clear();
    }

    /// Applies the commands in order.
    pub(super) fn apply(&mut self, parts: &Parts) {
        let now = parts.clock.now();
        let commands = std::mem::take(&mut self.commands);
        for command in &commands {
            let answer = match &command.ask {
                Ask::Submit(new) => self.submit(new, parts, now),
                // Its server watches the time of an attempt.
                Ask::Apply(id, event @ Event::Expire(_)) if self.runs_elsewhere(*id, parts) => {
                    self.rows.get(id).map_or_else(
                        || Err(Error::not_found("task", id)),
                        |row| Err(refused(&row.task, Rejected::NotDue, attempt_of(event))),
                    )
                }
                Ask::Apply(id, event) => self.event(*id, event, parts, now),
                Ask::ApplyFor(id, event, mandate) => {
                    self.mandates.insert(mandate.clone());
                    self.event(*id, event, parts, now)
                }
                Ask::Record(segments) => {
                    Ok(Answer::Recorded(self.record(segments, &parts.standing, now)))
                }
                Ask::Delete(namespace, id) => self.delete(namespace, *id),
            };
            // What is refused writes nothing that would be refused in turn.
            self.doubtful |= answer.is_err() && self.is_at_hand(command);
            self.answers.push(answer);
        }
        self.commands = commands;
    }

    fn submit(&mut self, new: &NewTask, parts: &Parts, now: Micros) -> Result<Answer> {
        let key = new.request_id.as_ref().map(|id| (new.namespace.clone(), id.clone()));
        let since = now - store::REQUEST_ID_TTL;
        let known = key.as_ref().and_then(|key| self.known.get(key));
        if let Some(known) = known.filter(|known| known.create_time >= since) {
            let task = self.rows.get(&known.task).filter(|row| !row.deleted);
            if known.digest != new.digest && !faults::planted(Fault::IgnoreRequestDigests) {
                return Err(Error::new(
                    Kind::AlreadyExists,
                    Reason::RequestIdReused,
                    format!("request_id `{}` was used for another request", known.request_id),
                )
                .with("request_id", &known.request_id)
                .with("task_id", known.task));
            }
            // A deleted task leaves its request_id free.
            if let Some(row) = task {
                let task = row.task.clone();
                return Ok(Answer::Submitted(Submitted { task, new: false }));
            }
        }
        if let Some(of) = new.retry_of {
            let ended = self.rows.get(&of).filter(|row| !row.deleted);
            let ended = ended.ok_or_else(|| Error::not_found("task", of))?;
            if let Some(by) =
                ended.task.retried_by.filter(|_| ended.task.state == State::DeadLettered)
            {
                return Err(Error::state_conflict(
                    "task",
                    of,
                    ended.task.state,
                    format!("task `{of}` was redriven already, as `{by}`"),
                )
                .with("retried_by", by));
            }
        }
        let id = new.id.unwrap_or_else(|| TaskId::new(now, &parts.entropy));
        let task = Arc::new(new.task(id, now));
        if let Some((namespace, request_id)) = key {
            let request = Request {
                namespace: namespace.clone(),
                request_id: request_id.clone(),
                task: task.id,
                digest: new.digest,
                create_time: now,
            };
            self.requests.push(request.clone());
            self.replaced.extend(self.known.insert((namespace, request_id), request));
        }
        if let Some(row) = new.retry_of.and_then(|of| self.rows.get_mut(&of)) {
            let mut ended = Task::clone(&row.task);
            ended.retried_by = Some(task.id);
            self.retries.insert(ended.id, task.id);
            row.task = Arc::new(ended);
        }
        let (sequence, entry) = state::first_entry(&task);
        self.entry(&task, sequence, &entry, now);
        self.rows.insert(
            task.id,
            Row { task: task.clone(), stored: None, at_hand: false, deleted: false },
        );
        self.effects.push(Effect::Accepted(task.clone()));
        Ok(Answer::Submitted(Submitted { task, new: true }))
    }

    /// Tasks that the batch accepts.
    pub(super) fn accepted(&self) -> impl Iterator<Item = &Arc<Task>> {
        self.effects.iter().filter_map(|effect| match effect {
            Effect::Accepted(task) => Some(task),
            _ => None,
        })
    }

    /// Starts an attempt beside what the commands ask for.
    pub(super) fn start(&mut self, start: Start, parts: &Parts, now: Micros) -> Result<()> {
        let (id, event) = start.into_event(parts.standing.id());
        self.event(id, &event, parts, now).map(drop)
    }

    /// Makes answers to submits show their tasks as they will be committed.
    pub(super) fn settle(&mut self) {
        for answer in &mut self.answers {
            if let Ok(Answer::Submitted(submitted)) = answer
                && let Some(row) = self.rows.get(&submitted.task.id)
            {
                submitted.task = row.task.clone();
            }
        }
    }

    fn event(&mut self, id: TaskId, event: &Event, parts: &Parts, now: Micros) -> Result<Answer> {
        let Some(was) = self.rows.get(&id).filter(|row| !row.deleted).map(|row| row.task.clone())
        else {
            return Err(match attempt_of(event) {
                Some(attempt) => lease_lost(id, attempt),
                None => Error::not_found("task", id),
            });
        };
        if let Some(attempt) = attempt_of(event)
            && (state::check_lease(&was, attempt).is_err()
                || is_holders(event) && is_elsewhere(&was, &parts.standing))
        {
            return Err(lease_lost(id, attempt));
        }
        let (head, frozen) = self.head(&was, event, parts);
        let change = match state::apply(&was, event, now, head, parts.entropy.unit()) {
            Ok(change) => change,
            Err(rejected) => {
                if let Some((log, _)) = frozen {
                    log.thaw(was.attempt);
                }
                return Err(refused(&was, rejected, attempt_of(event)));
            }
        };
        if let Some((log, rest)) = frozen {
            if let Some(rest) = rest {
                self.segment(&rest, &was.namespace, now);
            }
            self.frozen.push((log, was.attempt));
        }
        if self.runs_elsewhere(id, parts) && change.task.state != State::Running {
            self.elsewhere.insert(id, self.durable.get(&id).copied().unwrap_or(0));
        }
        if parts.standing.id().is_some() {
            self.after.entry(id).or_insert(head.head);
        }
        let mut task = change.task;
        count_usage(&was, &mut task, now);
        let task = Arc::new(task);
        for (sequence, entry) in &change.entries {
            self.entry(&task, *sequence, entry, now);
        }
        if let Some(row) = self.rows.get_mut(&id) {
            row.task = task.clone();
        }
        let cause = cause_of(event);
        self.effects.push(match task.state {
            State::Running if was.state == State::Running => Effect::Kept(task.clone()),
            State::Running => Effect::Started { was, now: task.clone() },
            State::Queued => Effect::Requeued { was, now: task.clone(), cause },
            _ => Effect::Ended { was, now: task.clone(), cause },
        });
        Ok(Answer::Applied(task))
    }

    /// Whether it was decided from rows at hand, where other servers write too.
    pub(super) fn is_doubtful(&self, standing: &Standing) -> bool {
        self.doubtful && standing.id().is_some()
    }

    fn is_at_hand(&self, command: &Command) -> bool {
        let (Ask::Apply(id, _) | Ask::ApplyFor(id, ..) | Ask::Delete(_, id)) = &command.ask else {
            return false;
        };
        self.rows.get(id).is_some_and(|row| row.at_hand)
    }

    /// Whether the task runs and another server holds its runner.
    fn runs_elsewhere(&self, id: TaskId, parts: &Parts) -> bool {
        self.rows.get(&id).is_some_and(|row| {
            row.task.state == State::Running && is_elsewhere(&row.task, &parts.standing)
        })
    }

    /// Sequences in use. A live attempt's log is frozen, so that none is added meanwhile.
    fn head(&self, task: &Task, event: &Event, parts: &Parts) -> (Head, Option<FrozenLog>) {
        let base = task.last_sequence;
        if task.state != State::Running || matches!(event, Event::Resume { .. }) {
            return (Head { head: base, in_doubt: None }, None);
        }
        if is_elsewhere(task, &parts.standing) {
            // Its server may have shown more than it stored.
            let head = self.durable.get(&task.id).copied().unwrap_or(0).max(base);
            let shown = Some(task.reserved_sequence);
            let in_doubt = shown.filter(|_| !faults::planted(Fault::ForgetFarShown));
            return (Head { head, in_doubt }, None);
        }
        let Some(log) = parts.relay.find(task.id) else {
            // A running attempt always has a log; without one nobody knows what was shown.
            return (Head { head: base, in_doubt: Some(task.reserved_sequence) }, None);
        };
        let frozen = log.freeze(task.attempt);
        let head = Head { head: frozen.head.max(base), in_doubt: frozen.in_doubt };
        (head, Some((log, frozen.rest)))
    }

    fn entry(&mut self, task: &Arc<Task>, sequence: u64, entry: &Entry, time: Micros) {
        let frame = convert::encode(sequence, time, task, entry);
        self.frames.entry(task.id).or_default().push((sequence, frame.clone()));
        self.events.push(NewEvent {
            task: task.id,
            namespace: task.namespace.clone(),
            sequence,
            kind: convert::kind(entry),
            time,
            frame,
        });
    }

    /// Keeps the segments of attempts that still run; returns the tasks of the others.
    fn record(
        &mut self,
        segments: &[SegmentData],
        standing: &Standing,
        now: Micros,
    ) -> Vec<TaskId> {
        let mut left_out = Vec::new();
        for segment in segments {
            let runs = |row: &&mut Row| {
                row.task.state == State::Running
                    && row.task.attempt == segment.attempt
                    && !is_elsewhere(&row.task, standing)
            };
            let row = self.rows.get_mut(&segment.task);
            // What this batch itself ended is not in doubt.
            let unmoved = |row: &&mut Row| row.stored == Some(row.task.revision);
            self.doubtful |=
                row.as_ref().is_some_and(|row| row.at_hand && unmoved(row) && !runs(row));
            let Some(row) = row.filter(runs) else {
                left_out.push(segment.task);
                continue;
            };
            let namespace = row.task.namespace.clone();
            if let Some(reserved) = segment.reserve_to.filter(|to| *to > row.task.reserved_sequence)
            {
                // What ends the attempt, here or on another server, must know of it.
                let task = Task::clone(&row.task);
                let revision = task.revision + 1;
                row.task = Arc::new(Task { reserved_sequence: reserved, revision, ..task });
                self.effects.push(Effect::Kept(row.task.clone()));
            }
            self.recorded.insert(segment.task);
            self.segment(segment, &namespace, now);
        }
        left_out
    }

    fn segment(&mut self, segment: &SegmentData, namespace: &Namespace, now: Micros) {
        let SegmentData { task, attempt, first, last, frames, timeline, reserve_to: _ } = segment;
        if !frames.is_empty() {
            self.segments.push(SegmentRow {
                task: *task,
                attempt: *attempt,
                first: *first,
                last: *last,
                frames: frames.clone(),
            });
        }
        for (sequence, frame) in timeline {
            self.events.push(NewEvent {
                task: *task,
                namespace: namespace.clone(),
                sequence: *sequence,
                kind: convert::kind_of(frame),
                time: now,
                frame: frame.clone(),
            });
        }
    }

    fn delete(&mut self, namespace: &Namespace, id: TaskId) -> Result<Answer> {
        let row = self.rows.get_mut(&id);
        let row = row.filter(|row| !row.deleted && row.task.namespace == *namespace);
        let row = row.ok_or_else(|| Error::not_found("task", id))?;
        if !row.task.state.is_terminal() {
            return Err(Error::state_conflict(
                "task",
                id,
                row.task.state,
                format!("task `{id}` is {}; cancel it first", row.task.state),
            ));
        }
        row.deleted = true;
        Ok(Answer::Done)
    }

    /// The tasks that it read.
    pub(super) fn ids(&self) -> impl Iterator<Item = TaskId> {
        self.rows.keys().copied()
    }
}

/// Whether another server holds the runner of a running task.
pub(super) fn is_elsewhere(task: &Task, standing: &Standing) -> bool {
    standing.id().is_some_and(|me| task.instance != Some(me))
}

impl Drop for Batch {
    fn drop(&mut self) {
        for (log, attempt) in &self.frozen {
            log.thaw(*attempt);
        }
    }
}
