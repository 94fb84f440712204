//! What operators see of runners and ask of them: lists, commands and their answers, and what
//! became of cancels.

use std::{sync::Arc, time::Duration};

use super::{
    Registry,
    cancels::{Outcome, Told},
    commands::{Action, Progress, Refusal, Stage},
    model::{Fence, Profile, ToRunner},
    protocol::feature,
    registry::State,
    session::{Attached, Session},
};
use crate::{
    clock::{Micros, Mono},
    error::{Error, Kind, Reason, Result},
    id::{Namespace, RunnerId},
    queue::SupplyState,
    telemetry::OutcomeLabel,
};

/// A runner as operators see it.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Who it is.
    pub profile: Arc<Profile>,
    /// Whether it is connected.
    pub connected: bool,
    /// Whether it shall take work.
    pub mode: SupplyState,
    /// Slots that it offers now.
    pub free_slots: u32,
    /// Load of its host.
    pub load: f64,
    /// When its session began.
    pub connect_time: Micros,
    /// Last sign of life.
    pub heartbeat_time: Micros,
    /// Attempts that it holds, with their start.
    pub attempts: Vec<(Fence, Micros)>,
    /// Attempts that it is to stop.
    pub stopping: Vec<(Fence, Told)>,
    /// Commands under way, and the latest that have ended.
    pub commands: Vec<SeenCommand>,
    /// How often it came back.
    pub n_reconnects: u32,
}

/// A command as operators see it.
#[derive(Clone, Debug)]
pub struct SeenCommand {
    /// On the wire.
    pub id: String,
    /// As the call gave it.
    pub request_id: String,
    /// What it asks for.
    pub action: Action,
    /// How far it is.
    pub stage: Stage,
    /// How much is done.
    pub progress: Progress,
    /// When it was sent.
    pub create_time: Micros,
    /// When it ended.
    pub end_time: Option<Micros>,
}

/// An order of an operator.
#[derive(Clone, Debug)]
pub struct Order {
    /// The runner.
    pub runner: RunnerId,
    /// Makes it the same command when it comes again; empty for none.
    pub request_id: String,
    /// What it asks for.
    pub action: Action,
}

impl Registry {
    /// Runners of a namespace by name, after a name; at most `max`.
    pub fn list(&self, namespace: &Namespace, after: Option<&str>, max: usize) -> Vec<Seen> {
        let state = self.lock();
        let first = (namespace.clone(), RunnerId::from(after.unwrap_or_default()));
        state
            .by_runner
            .range(first..)
            .take_while(|((owner, _), _)| owner == namespace)
            .filter(|((_, runner), _)| after.is_none_or(|after| runner.as_str() > after))
            .filter_map(|(_, key)| state.sessions.get(key))
            .take(max)
            .map(|session| seen(&state, session))
            .collect()
    }

    /// All runners, with their namespaces.
    pub fn list_everything(&self) -> Vec<(Namespace, Seen)> {
        let state = self.lock();
        let present = state.by_runner.iter().filter_map(|((namespace, _), key)| {
            Some((namespace.clone(), seen(&state, state.sessions.get(key)?)))
        });
        present.collect()
    }

    /// A runner of a namespace.
    pub fn get(&self, namespace: &Namespace, runner: &RunnerId) -> Result<Seen> {
        let state = self.lock();
        let key = state.by_runner.get(&(namespace.clone(), runner.clone()));
        key.and_then(|key| state.sessions.get(key))
            .map(|session| seen(&state, session))
            .ok_or_else(|| Error::not_found("runner", runner))
    }

    /// Gives a runner an order and waits until it has answered, no longer than `wait`.
    ///
    /// # Errors
    /// The runner's refusal; when it does not understand the order, or leaves without an answer;
    /// when the time is over, at which the command goes on.
    pub async fn order(&self, namespace: &Namespace, order: Order, wait: Duration) -> Result<()> {
        let runner = order.runner.clone();
        let mut stage = self.send_order(namespace, order)?;
        let stop = self.supervisor().token();
        let ended = tokio::select! {
            biased;
            ended = stage.wait_for(Stage::is_end) => ended.map(|ended| ended.clone()),
            () = stop.cancelled() => return Err(Error::new(
                Kind::Unavailable,
                Reason::NotServing,
                "the server is shutting down",
            )),
            () = self.clock().sleep(wait) => return Err(Error::new(
                Kind::DeadlineExceeded,
                Reason::CallDeadline,
                format!("runner `{runner}` has not answered yet; the command goes on"),
            )),
        };
        match ended {
            Ok(Stage::Failed(refusal)) => Err(refusal.error()),
            Ok(Stage::Sent | Stage::Accepted | Stage::Done) => Ok(()),
            // Forgotten among many others; it has ended, nobody knows how.
            Err(_) => Err(Refusal::gone("it was forgotten among later ones").error()),
        }
    }

    /// Gives a runner an order; the receiver tells how far it is.
    ///
    /// # Errors
    /// When there is no such runner, it does not understand the order, or the request id stands
    /// for another one.
    pub fn send_order(
        &self,
        namespace: &Namespace,
        order: Order,
    ) -> Result<tokio::sync::watch::Receiver<Stage>> {
        let Order { runner, request_id, action } = order;
        let mut state = self.lock();
        let key = state.by_runner.get(&(namespace.clone(), runner.clone())).copied();
        let session = key
            .and_then(|key| state.sessions.get_mut(&key))
            .ok_or_else(|| Error::not_found("runner", &runner))?;
        if let Some(stage) = session.commands.find(&request_id, &action)? {
            return Ok(stage);
        }
        check_understood(session, &action)?;
        let now = self.clock().now();
        let (id, stage) = session.commands.make(&session.id, request_id, action.clone(), now)?;
        tracing::info!(
            runner.id = %runner,
            command.id = id,
            action = action.name(),
            model = action.model(),
            "command sent"
        );
        session.say(ToRunner::Command { id, action });
        self.publish_credits(session);
        Ok(stage)
    }

    /// The runner says how a command ended.
    pub(super) fn command_done(&self, session: &mut Session, id: &str, refusal: Option<Refusal>) {
        let runner = session.profile.runner.clone();
        let error = refusal.as_ref().map(|refusal| refusal.message.clone());
        let failed = refusal.is_some();
        let Some(action) = session.commands.ended(id, refusal, self.clock().now()) else {
            tracing::debug!(runner.id = %runner, command.id = id, "answer to an unknown command");
            return;
        };
        tracing::info!(
            runner.id = %runner,
            command.id = id,
            action = action.name(),
            error,
            "command ended"
        );
        // An agent that tells what it offers has done so before.
        if !failed && !session.profile.understands(feature::OFFER) {
            match action {
                Action::Drain { .. } => session.leave.draining = true,
                Action::Pause => session.leave.paused = true,
                Action::Resume => session.leave.paused = false,
                Action::Apply { .. } | Action::Reload { .. } | Action::Tune { .. } => {}
            }
        }
        self.publish_credits(session);
    }

    /// Tells a runner to stop an attempt.
    pub(super) fn cancel(
        &self,
        session: &mut Session,
        fence: Fence,
        reason: Reason,
        detail: String,
    ) {
        let grace = self.limits().cancel_grace;
        session.cancel(fence, reason, detail, grace, self.clock().now());
    }

    /// A runner says that nothing of a cancelled attempt runs any more.
    pub(super) fn stopped(&self, session: &mut Session, fence: Fence, took: Duration) {
        let took_ms = took.as_millis() as u64;
        let outcome = session.cancels.stopped(fence, took);
        match outcome {
            Some(Outcome::Stopped) => {}
            Some(Outcome::Late | Outcome::Overdue) | None => tracing::warn!(
                runner.id = %session.profile.runner,
                task.id = %fence.task,
                attempt = fence.attempt,
                took_ms,
                "a cancelled attempt stopped late"
            ),
        }
        if let Some(outcome) = outcome {
            self.count_cancel(outcome);
        }
    }

    /// Finds attempts that a runner should have stopped by now.
    pub(super) fn sweep_cancels(&self, session: &mut Session, acked_seq: u64, mono: Mono) {
        // What the runner acknowledges and reports may wait for its next heartbeat.
        let slack = self.limits().heartbeat_interval;
        for fence in session.cancels.sweep(acked_seq, mono, slack) {
            tracing::warn!(
                runner.id = %session.profile.runner,
                task.id = %fence.task,
                attempt = fence.attempt,
                "the runner has not stopped a cancelled attempt within the grace"
            );
            self.count_cancel(Outcome::Overdue);
        }
    }

    fn count_cancel(&self, outcome: Outcome) {
        let label = OutcomeLabel { outcome: outcome.name() };
        self.ports().metrics.runner_cancels.get_or_create(&label).inc();
    }
}

/// Fails unless the runner understands the command.
fn check_understood(session: &Session, action: &Action) -> Result<()> {
    let profile = &session.profile;
    let understood = match action {
        // The first release's agents go on from a pause alone.
        Action::Resume if session.leave.draining => profile.understands(feature::OFFER),
        action => action.feature().is_none_or(|feature| profile.understands(feature)),
    };
    if understood {
        return Ok(());
    }
    let (runner, name) = (&profile.runner, action.name());
    let engine = &profile.engine;
    let agent = match profile.agent_version.as_str() {
        "" => "of unknown version",
        version => version,
    };
    let message = format!(
        "runner `{runner}` (agent {agent}, engine {engine}) does not understand `{name}`; restart \
         it with the agent of this release and an engine that does, or with other settings"
    );
    Err(Error::new(Kind::FailedPrecondition, Reason::CommandUnsupported, message)
        .with("runner_id", runner)
        .with("command", name)
        .with("engine", engine)
        .with("agent_version", &profile.agent_version))
}

fn seen(state: &State, session: &Session) -> Seen {
    let leases = session.held.iter().filter_map(|task| state.leases.of_task(*task));
    let commands = session.commands.iter().map(|command| SeenCommand {
        id: command.id.clone(),
        request_id: command.request_id.clone(),
        action: command.action.clone(),
        stage: command.stage(),
        progress: command.progress.clone(),
        create_time: command.create_time,
        end_time: command.end_time,
    });
    Seen {
        profile: session.profile.clone(),
        connected: !matches!(session.attached, Attached::No(_)),
        mode: session.mode(),
        free_slots: session.free(),
        load: session.load,
        connect_time: session.connect_time,
        heartbeat_time: session.heartbeat_time,
        attempts: leases.map(|lease| (lease.fence, lease.start_time)).collect(),
        stopping: session.cancels.iter().map(|(fence, told)| (*fence, *told)).collect(),
        commands: commands.collect(),
        n_reconnects: session.n_reconnects,
    }
}
