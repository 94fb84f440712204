//! How attempts end from this side: the store is told, then the runner; and the sweep that
//! finds leases whose time is up.

use std::{sync::Arc, time::Duration};

use futures_util::future::join_all;

use super::{
    Registry,
    leases::Ending,
    model::{Fence, Trouble},
    protocol::Backoff,
    registry::State,
    session::{Attached, Session, superseded, taken_over},
};
use crate::{
    clock::Mono,
    error::{Error, Kind, Reason, Result},
    faults::{self, Fault},
    queue::{Revocation, SupplyKey},
    tasks::{
        model::{State as TaskState, Task, Usage},
        state::{Event, Outcome},
    },
};

/// Time between two sweeps.
const SWEEP_INTERVAL: Duration = Duration::from_millis(100);
/// Sweeps between two looks for leases that ended unheard.
const STALE_EVERY: u32 = 10;
/// Wait before the store is told again of an end that it did not take.
const RETRY_AFTER: Duration = Duration::from_millis(500);

/// How an attempt ends.
#[derive(Clone, Debug)]
pub(super) enum End {
    /// As the runner said.
    Finish(Outcome, Usage),
    /// The runner sent what cannot be taken.
    Invalid(String),
    /// Not executed, through nobody's fault.
    HandBack(String),
    /// The runner was lost.
    Lose(String),
    /// It ran too long.
    TimeOut,
}

impl End {
    fn ending(&self) -> Ending {
        match self {
            Self::Finish(..) | Self::Invalid(_) | Self::HandBack(_) => Ending::Finish,
            Self::Lose(_) => Ending::Lose,
            Self::TimeOut => Ending::TimeOut,
        }
    }

    fn event(&self, attempt: u32) -> Event {
        let finish = |outcome, usage| Event::Finish { attempt, outcome, usage };
        match self.clone() {
            Self::Finish(outcome, usage) => finish(outcome, usage),
            Self::Invalid(what) => finish(super::events::invalid(what), Usage::default()),
            Self::HandBack(why) => finish(Outcome::HandBack(why), Usage::default()),
            Self::Lose(reason) => Event::Lose { attempt, reason },
            Self::TimeOut => Event::TimeOut { attempt },
        }
    }
}

/// What became of telling the store.
enum Told {
    /// The attempt has ended, this way or another.
    Ended,
    /// The store did not answer; tell it again.
    Again,
    /// The store did not answer; the next sweep decides anew.
    Later,
}

impl Registry {
    /// Has the store told of an attempt's end. Nothing happens if an end is under way.
    pub(super) fn spawn_end(&self, state: &mut State, fence: Fence, end: End) {
        if !mark(state, fence, &end) {
            return;
        }
        let registry = self.clone();
        self.supervisor().spawn("attempt_end", async move {
            // The error has been handled: the runner was told, or the sweep tries again.
            let _ = registry.tell_store(fence, end).await;
        });
    }

    /// Tells the store of an end that was marked in the lease.
    pub(super) async fn tell_store(&self, fence: Fence, end: End) -> Result<Arc<Task>> {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(2));
        let stop = self.supervisor().token();
        loop {
            let holder = self.lock().leases.find(fence).and_then(|lease| lease.holder);
            let answer = (self.ports().apply)(fence.task, end.event(fence.attempt)).await;
            match self.store_answered(fence, holder, &end, &answer) {
                Told::Ended | Told::Later => return answer,
                Told::Again => {}
            }
            let wait = backoff.next(self.entropy().unit()).max(Duration::from_millis(20));
            tokio::select! {
                () = self.clock().sleep(wait) => {}
                () = stop.cancelled() => return answer,
            }
            if self.lock().leases.find(fence).is_none() {
                return Err(super::convert::lease_lost(fence));
            }
        }
    }

    /// `holder` is who held the lease when the store was asked.
    fn store_answered(
        &self,
        fence: Fence,
        holder: Option<SupplyKey>,
        end: &End,
        answer: &Result<Arc<Task>>,
    ) -> Told {
        let mono = self.mono();
        let mut state = self.lock();
        match answer {
            Err(error) if is_transient(error) => {
                tracing::warn!(
                    task.id = %fence.task,
                    attempt = fence.attempt,
                    "the end of an attempt is not stored yet: {error}"
                );
                let Some(lease) = state.leases.find_mut(fence) else { return Told::Ended };
                match end.ending() {
                    Ending::Finish => Told::Again,
                    Ending::Lose | Ending::TimeOut => {
                        lease.ending = None;
                        lease.retry_at = mono + RETRY_AFTER;
                        if let End::TimeOut = end {
                            state.leases.retry_timeout(fence, mono + RETRY_AFTER);
                        }
                        Told::Later
                    }
                }
            }
            answer => {
                let lease = state.release(fence);
                if let (Err(_), Some(lease)) = (answer, &lease) {
                    // Another server ended the attempt or has it: readers look at storage.
                    lease.log.let_go(fence.attempt);
                }
                if lease.is_none() && !matches!(end, End::Finish(..)) {
                    // A revocation released it and told the runner.
                    return Told::Ended;
                }
                let key = lease.map_or(holder, |lease| lease.holder);
                if let Some(session) = key.and_then(|key| state.sessions.get_mut(&key)) {
                    self.tell_runner(session, fence, end, answer.is_ok());
                }
                Told::Ended
            }
        }
    }

    /// Tells the runner what became of an attempt that it held.
    fn tell_runner(&self, session: &mut Session, fence: Fence, end: &End, applied: bool) {
        match end {
            End::Finish(..) if applied => {
                session.finished(fence);
                session.output.finished(fence);
            }
            End::Finish(..) => session.output.trouble(fence, Trouble::LeaseLost),
            End::Invalid(what) => {
                session.output.trouble(fence, Trouble::Invalid(what.clone()));
                self.cancel(session, fence, Reason::InvalidParams, what.clone());
            }
            // It gave the attempt up itself, or never had it.
            End::HandBack(_) => {}
            End::Lose(why) => {
                self.cancel(session, fence, Reason::LeaseLost, why.clone());
            }
            End::TimeOut => {
                let why = "the attempt ran longer than its execution timeout";
                self.cancel(session, fence, Reason::ExecutionTimeout, why.into());
            }
        }
        session.output.bell.notify_one();
    }

    /// Whether the store says that the attempt ended the task, in this way.
    pub(super) async fn has_ended_so(&self, fence: Fence, outcome: &Outcome) -> Result<bool> {
        match (self.ports().get)(fence.task).await {
            Ok(task) => Ok(ended_so(&task, fence, outcome)),
            Err(error) if error.kind() == Kind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Ends a session for good; its attempts are lost, or handed back when it left in peace.
    pub(super) fn drop_session(&self, state: &mut State, key: SupplyKey, left: Left<'_>) {
        let Some(mut session) = state.sessions.remove(&key) else { return };
        state.by_id.remove(&session.id);
        let name = (session.namespace.clone(), session.profile.runner.clone());
        if state.by_runner.get(&name) == Some(&key) {
            state.by_runner.remove(&name);
        }
        self.queue().runner_down(key);
        session.commands.give_up(match left {
            Left::InPeace(why) | Left::Lost(why) => why,
            Left::Replaced => "its runner began a new session",
            Left::TakenOver => "another process took over the runner's name",
            Left::Cut => "the server lost touch with the database",
        });
        for link in session.attached.link().into_iter().chain(&session.output.link) {
            link.end(match left {
                Left::InPeace(_) => None,
                Left::TakenOver => Some(taken_over(&session.profile.runner)),
                Left::Replaced | Left::Lost(_) => Some(superseded()),
                Left::Cut => Some(super::elsewhere::cut_off()),
            });
        }
        let mono = self.mono();
        let acked_seq = session.outbox.acked_seq();
        for task in session.held {
            state.leases.set_holder(task, None, mono);
            let Some(lease) = state.leases.of_task_mut(task) else { continue };
            lease.accepted = lease.is_reached(acked_seq);
            let end = match left {
                // The Hello that replaces it decides.
                Left::Replaced | Left::TakenOver | Left::Cut => continue,
                Left::Lost(why) if lease.accepted => End::Lose(why.to_owned()),
                Left::InPeace(why) | Left::Lost(why) => End::HandBack(why.to_owned()),
            };
            let fence = lease.fence;
            self.spawn_end(state, fence, end);
        }
    }

    /// Ends leases and sessions whose time is up, for ever.
    pub async fn run_sweep(self) -> anyhow::Result<()> {
        loop {
            for _ in 0..STALE_EVERY {
                self.clock().sleep(SWEEP_INTERVAL).await;
                self.sweep_standing();
                self.sweep_once().await;
            }
            self.sweep_stale();
        }
    }

    /// Ends leases and sessions whose time is up; completes when the store has answered.
    pub async fn sweep_once(&self) {
        let ends = {
            let mut state = self.lock();
            let mono = self.mono();
            let mut ends = self.sweep_sessions(&mut state, mono);
            for lease in state.leases.orphans() {
                if lease.ending.is_none() && lease.orphaned_until.max(lease.retry_at) <= mono {
                    let why = format!("runner `{}` did not come back in time", lease.runner);
                    ends.push((lease.fence, End::Lose(why)));
                }
            }
            for fence in state.leases.take_timed_out(mono) {
                let Some(lease) = state.leases.find(fence) else { continue };
                if lease.ending.is_some() || lease.finish.is_some() {
                    // The end that is under way may fail.
                    state.leases.retry_timeout(fence, mono + RETRY_AFTER);
                } else {
                    ends.push((fence, End::TimeOut));
                }
            }
            ends.retain(|(fence, end)| mark(&mut state, *fence, end));
            ends
        };
        // Together, so that they share one commit.
        join_all(ends.into_iter().map(|(fence, end)| self.tell_store(fence, end))).await;
    }

    /// Revokes leases whose attempts the store ended without this side hearing of it: a
    /// revocation is a nudge and may be lost.
    pub fn sweep_stale(&self) {
        let mut stale = Vec::new();
        for lease in self.lock().leases.iter_mut() {
            let live = lease.log.next_index(lease.fence.attempt).is_some();
            // The second look, since the revocation, or the answer to an end that was told from
            // here, may be on its way.
            if !live && std::mem::replace(&mut lease.stale, true) {
                stale.push(lease.fence);
            }
        }
        for fence in stale {
            let detail = "the attempt has ended".to_owned();
            let Fence { task, attempt } = fence;
            self.revoke(Revocation { task, attempt, reason: Reason::LeaseLost, detail });
        }
    }

    fn sweep_sessions(&self, state: &mut State, mono: Mono) -> Vec<(Fence, End)> {
        let limits = self.limits();
        let mut ends = Vec::new();
        let mut gone = Vec::new();
        let mut pending = Vec::new();
        for session in state.sessions.values_mut() {
            if let Attached::No(since) = session.attached
                && since + limits.session_grace <= mono
            {
                gone.push(session.key);
                continue;
            }
            let silent = session.heard + limits.lease_ttl <= mono
                && !faults::planted(Fault::KeepSilentLeases);
            if silent && session.is_connected() {
                let why = "no heartbeat came within the lease's time to live";
                if let Some(link) = session.attached.link() {
                    link.end(Some(Error::new(Kind::Unavailable, Reason::RunnerLost, why)));
                }
                session.attached = Attached::No(mono);
                self.publish_credits(session);
            }
            let acked_seq = session.outbox.acked_seq();
            self.sweep_cancels(session, acked_seq, mono);
            for task in &session.held {
                let Some(lease) = state.leases.of_task(*task) else { continue };
                if silent && lease.ending.is_none() && lease.retry_at <= mono {
                    let why = format!(
                        "runner `{}` sent no heartbeat for {:?}",
                        lease.runner, limits.lease_ttl
                    );
                    let reached = lease.is_reached(acked_seq);
                    ends.push((
                        lease.fence,
                        if reached { End::Lose(why) } else { End::HandBack(why) },
                    ));
                } else if !lease.backlog.is_empty() || lease.finish.is_some() {
                    pending.push(lease.fence);
                }
            }
        }
        for key in gone {
            self.drop_session(state, key, Left::Lost("its runner did not come back in time"));
        }
        for fence in pending {
            self.pump(state, fence);
        }
        ends
    }
}

/// How a session ended.
#[derive(Clone, Copy, Debug)]
pub(super) enum Left<'a> {
    /// The runner said Bye.
    InPeace(&'a str),
    /// A new session of the same process takes its place.
    Replaced,
    /// A session of another process with the same name takes its place.
    TakenOver,
    /// The runner did not come back.
    Lost(&'a str),
    /// This server lost touch with the database.
    Cut,
}

/// Marks a lease as about to end; false when it is already, or gone.
pub(super) fn mark(state: &mut State, fence: Fence, end: &End) -> bool {
    match state.leases.find_mut(fence) {
        Some(lease) if lease.ending.is_none() => {
            lease.ending = Some(end.ending());
            true
        }
        _ => false,
    }
}

/// Whether the task was ended by this attempt, in this way.
fn ended_so(task: &Task, fence: Fence, outcome: &Outcome) -> bool {
    task.attempt == fence.attempt
        && match outcome {
            Outcome::Success(_) => task.state == TaskState::Succeeded,
            Outcome::Failure { failure, .. } => {
                matches!(task.state, TaskState::Failed | TaskState::DeadLettered)
                    && task.error.as_ref() == Some(failure)
            }
            Outcome::HandBack(_) => false,
        }
}

/// Whether the store may answer otherwise next time.
fn is_transient(error: &Error) -> bool {
    matches!(
        error.kind(),
        Kind::Unavailable | Kind::Internal | Kind::DeadlineExceeded | Kind::ResourceExhausted
    )
}
