//! Commands of the server: pause and drain take effect at once; changes of the engine are made
//! one after the other, beside the work, once the attempts that they would disturb are gone.
//!
//! What a change withholds is not offered meanwhile, so that the server places no such work
//! here. An answer is given in the session that asked, or not at all: in another one, Hello
//! says what became of it.

use std::{
    collections::{HashMap, VecDeque},
    time::Duration,
};

use serde_json::{Map, Value};
use tokio::{runtime::Handle, task::JoinSet};

use super::{
    Agent,
    engine::{Change, Progress, Step},
    offers::Withheld,
    outbox::Key,
    session::duration,
};
use crate::{
    clock::Mono,
    error::{Error, Kind, Reason},
    grpc::status::to_rpc_status,
    json,
    pb::{
        self, command::Action, connect_request::Body as ToServer, google::rpc::Status,
        when_busy::Policy,
    },
    queue::ModelPattern,
    runners::protocol::feature,
};

/// Commands whose answers are remembered.
const MAX_KNOWN: usize = 256;
/// Time for attempts that are in the way, where the server names none.
const DEADLINE: Duration = Duration::from_mins(5);

/// Commands under way, and the answers to those that have ended.
#[derive(Default)]
pub(super) struct Commands {
    known: VecDeque<(String, Option<Status>)>,
    waiting: VecDeque<Order>,
    current: Option<Current>,
    running: JoinSet<Result<(), Error>>,
    progress: Progress,
    /// Where engines run.
    runtime: Option<Handle>,
    /// Attempts that the server cancelled and that have not stopped, and since when.
    pub(super) cancelled: HashMap<Key, Mono>,
}

/// A change that a command asks for.
struct Order {
    /// The command; `None` when its session has ended.
    id: Option<String>,
    change: Change,
    busy: Busy,
}

/// What becomes of attempts that are in the way.
#[derive(Clone, Copy)]
enum Busy {
    Wait(Duration),
    Refuse,
    HandBack,
}

/// The change being made.
struct Current {
    order: Order,
    /// Whose attempts must be gone first.
    scope: Option<ModelPattern>,
    withheld: Option<Withheld>,
    /// When what is in the way is handed back.
    hand_back_at: Option<Mono>,
    /// Attempts that were in the way.
    n_in_way: u64,
    started: bool,
    told: Told,
}

/// What was said of a command's progress: no more than a hundred times, however long it is.
#[derive(Debug, Default)]
pub(super) struct Told(Option<(u64, String)>);

impl Told {
    /// Whether it is worth saying.
    fn is_news(&mut self, step: &Step) -> bool {
        let percent = step.done.saturating_mul(100).checked_div(step.total).unwrap_or(0);
        let now = Some((percent, step.detail.clone()));
        let news = self.0 != now;
        self.0 = now;
        news
    }
}

/// What happens to the change being made.
pub(super) enum Event {
    Step(Step),
    Ended(Result<(), Error>),
    /// What is in the way has had its time.
    TimeIsUp,
}

impl Commands {
    pub(super) fn new(runtime: Option<Handle>) -> Self {
        Self { runtime, ..Self::default() }
    }

    /// The next thing that happens. Can be dropped and called again.
    pub(super) async fn next(&mut self, clock: &crate::clock::Clock) -> Event {
        let hand_back_at = self.current.as_ref().and_then(|current| current.hand_back_at);
        tokio::select! {
            biased;
            step = self.progress.next() => Event::Step(step),
            Some(ended) = self.running.join_next() => Event::Ended(ended.unwrap_or_else(|error| {
                tracing::error!(%error, "the engine panicked over a command");
                let message = "the engine panicked; see the runner's log";
                Err(Error::new(Kind::FailedPrecondition, Reason::EngineError, message))
            })),
            () = super::stream::sleep_until(clock, hand_back_at) => Event::TimeIsUp,
        }
    }

    /// What is not offered now.
    pub(super) fn withheld(&self) -> Option<&Withheld> {
        self.current.as_ref().and_then(|current| current.withheld.as_ref())
    }

    /// Another session begins: nobody waits for the answers any more.
    pub(super) fn new_session(&mut self) {
        self.known.clear();
        self.waiting.clear();
        self.cancelled.clear();
        if let Some(current) = &mut self.current {
            current.order.id = None;
        }
    }
}

impl Agent {
    /// Takes a command.
    pub(super) fn on_command(&mut self, command: pb::Command) {
        let id = command.command_id;
        if let Some((_, answer)) = self.commands.known.iter().find(|(known, _)| *known == id) {
            if let Some(status) = answer.clone() {
                let done = pb::CommandDone { command_id: id, status: Some(status) };
                self.mailbox.push(ToServer::CommandDone(done));
            }
            return;
        }
        self.commands.known.push_back((id.clone(), None));
        if self.commands.known.len() > MAX_KNOWN {
            self.commands.known.pop_front();
        }
        let accepted = pb::CommandAccepted { command_id: id.clone() };
        self.mailbox.push(ToServer::CommandAccepted(accepted));
        match command.action {
            Some(Action::Drain(drain)) => {
                let time = duration(drain.deadline).unwrap_or(self.config.drain_time);
                let time = if drain.hand_back { Duration::ZERO } else { time };
                self.drain(time, drain.exit);
                self.leaving.commands.push(id);
            }
            Some(Action::Pause(pause)) if pause.paused => {
                self.paused = true;
                self.announce();
                self.answer(Some(id), Ok(()));
            }
            Some(Action::Pause(_)) => {
                let resumed = self.resume();
                self.answer(Some(id), resumed);
            }
            Some(Action::Apply(apply)) => {
                let (model, options) = (apply.model.clone(), object(apply.options.as_ref()));
                let change = match apply.state() {
                    pb::apply::State::Unloaded => Change::Unload { model },
                    pb::apply::State::Unspecified | pb::apply::State::Loaded => {
                        Change::Load { model, options }
                    }
                };
                self.order(id, change, apply.when_busy);
            }
            Some(Action::Reload(reload)) => {
                let model = Some(reload.model).filter(|model| !model.is_empty());
                self.order(id, Change::Reload { model }, reload.when_busy);
            }
            Some(Action::Tune(tune)) => {
                let params = object(tune.params.as_ref());
                self.order(id, Change::Tune { params }, None);
            }
            None => {
                let message = "this version of the agent does not know the command";
                let unknown = Error::new(Kind::Unimplemented, Reason::Unimplemented, message);
                self.answer(Some(id), Err(unknown));
            }
        }
    }

    fn order(&mut self, id: String, change: Change, when: Option<pb::WhenBusy>) {
        let when = when.unwrap_or_default();
        let busy = match when.policy() {
            Policy::Refuse => Busy::Refuse,
            Policy::HandBack => Busy::HandBack,
            Policy::Unspecified | Policy::Wait => {
                Busy::Wait(duration(when.deadline).unwrap_or(DEADLINE))
            }
        };
        self.commands.waiting.push_back(Order { id: Some(id), change, busy });
    }

    /// Ends a pause, and a drain unless the runner is to exit.
    fn resume(&mut self) -> Result<(), Error> {
        if self.leaving.draining && self.leaving.exit {
            let message = "the runner is leaving; start it again";
            return Err(Error::state_conflict(
                "runner",
                &self.config.runner_id,
                "DRAINING",
                message,
            ));
        }
        self.paused = false;
        self.leaving.draining = false;
        self.leaving.hand_back_at = None;
        for id in std::mem::take(&mut self.leaving.commands) {
            let message = "the runner was resumed before it had drained";
            self.answer(Some(id), Err(Error::new(Kind::Aborted, Reason::Conflict, message)));
        }
        self.announce();
        Ok(())
    }

    /// Gives a command its answer, if anybody waits for it.
    fn answer(&mut self, id: Option<String>, outcome: Result<(), Error>) {
        if let Err(error) = &outcome {
            tracing::warn!(command.id = id, "a command failed: {error}");
        }
        let Some(command_id) = id else { return };
        let status = match outcome {
            Ok(()) => Status::default(),
            Err(error) => to_rpc_status(&error),
        };
        let known = self.commands.known.iter_mut().find(|(known, _)| *known == command_id);
        if let Some((_, answer)) = known {
            *answer = Some(status.clone());
        }
        let done = pb::CommandDone { command_id, status: Some(status) };
        self.mailbox.push(ToServer::CommandDone(done));
    }

    /// Does what can be done now for the commands under way.
    pub(super) fn commands_go_on(&mut self) {
        self.drain_goes_on();
        while self.commands.current.is_none()
            && let Some(order) = self.commands.waiting.pop_front()
        {
            self.begin(order);
        }
        self.make_change();
    }

    /// Tells how many attempts a drain still waits for, and when there are none.
    fn drain_goes_on(&mut self) {
        if !self.leaving.draining || self.leaving.commands.is_empty() {
            return;
        }
        let (held, _) = self.outbox.digest();
        let done = u64::from(self.leaving.n_held.saturating_sub(held));
        let total = u64::from(self.leaving.n_held);
        let step = Step { done, total, detail: "attempts ended".into() };
        if total > 0 && self.leaving.told.is_news(&step) {
            for id in &self.leaving.commands {
                self.tell(id, &step);
            }
        }
        if held == 0 {
            for id in std::mem::take(&mut self.leaving.commands) {
                self.answer(Some(id), Ok(()));
            }
        }
    }

    fn tell(&self, command_id: &str, step: &Step) {
        if self.session.uses(feature::PROGRESS) {
            self.mailbox.push(ToServer::CommandProgress(pb::CommandProgress {
                command_id: command_id.to_owned(),
                done: step.done,
                total: step.total,
                detail: step.detail.clone(),
            }));
        }
    }

    fn begin(&mut self, order: Order) {
        if let Err(error) = self.check(&order.change) {
            return self.answer(order.id, Err(error));
        }
        let scope = match &order.change {
            Change::Load { model, .. }
            | Change::Unload { model }
            | Change::Reload { model: Some(model) } => Some(ModelPattern::parse(model)),
            Change::Reload { model: None } => Some(ModelPattern::Any),
            Change::Tune { .. } => None,
        };
        let n_in_way = self.n_in_way(scope.as_ref());
        let mut hand_back_at = None;
        match order.busy {
            Busy::Refuse if n_in_way > 0 => {
                let message = format!("{n_in_way} attempt(s) run that the command would disturb");
                let id = self.config.runner_id.clone();
                let error = Error::state_conflict("runner", id, "BUSY", message);
                return self.answer(order.id, Err(error));
            }
            Busy::Wait(time) if n_in_way > 0 => hand_back_at = Some(self.clock.mono() + time),
            Busy::Wait(_) | Busy::Refuse | Busy::HandBack => {}
        }
        let withheld = self.to_withhold(&order.change, n_in_way);
        let hand_back = matches!(order.busy, Busy::HandBack) && n_in_way > 0;
        self.commands.current = Some(Current {
            order,
            scope,
            withheld,
            hand_back_at,
            n_in_way,
            started: false,
            told: Told::default(),
        });
        self.announce();
        if hand_back {
            self.hand_back_in_way();
        }
    }

    /// Whether the runner is in a state for the change.
    fn check(&self, change: &Change) -> Result<(), Error> {
        let conflict = |message: String| {
            Err(Error::state_conflict("model", &self.config.runner_id, "LOADED", message))
        };
        match change {
            Change::Unload { model } => match self.wider(model) {
                Some(wider) => conflict(format!(
                    "the runner serves `{model}` by the wider `{wider}`; unload that first"
                )),
                None => Ok(()),
            },
            Change::Reload { model: Some(model) } if !self.models.contains(model) => {
                let served = self.models.join(", ");
                let message = format!("the runner does not serve `{model}`; it serves: {served}");
                Err(Error::new(Kind::NotFound, Reason::NotFound, message)
                    .with("resource", "model")
                    .with("id", model))
            }
            Change::Load { .. } | Change::Reload { .. } | Change::Tune { .. } => Ok(()),
        }
    }

    fn n_in_way(&self, scope: Option<&ModelPattern>) -> u64 {
        let Some(scope) = scope else { return 0 };
        self.slots.count(|model, version| scope.matches(model, version)) as u64
    }

    fn hand_back_in_way(&mut self) {
        let Some(current) = &mut self.commands.current else { return };
        current.hand_back_at = None;
        let Some(scope) = current.scope.clone() else { return };
        let why = "its model is being changed on the runner";
        self.slots.hand_back(why, |model, version| scope.matches(model, version));
    }

    /// Makes the current change once nothing is in its way.
    fn make_change(&mut self) {
        let Some(current) = self.commands.current.as_ref().filter(|current| !current.started)
        else {
            return;
        };
        let left = self.n_in_way(current.scope.as_ref());
        let total = current.n_in_way;
        let done = total.saturating_sub(left);
        if left > 0 {
            self.on_step(&Step { done, total, detail: "attempts in the way ended".into() });
            return;
        }
        let progress = Progress::default();
        let Commands { current: Some(current), running, runtime, .. } = &mut self.commands else {
            return;
        };
        let change = self.engine.change(current.order.change.clone(), progress.clone());
        current.started = true;
        match runtime {
            Some(runtime) => running.spawn_on(change, runtime),
            None => running.spawn(change),
        };
        self.commands.progress = progress;
    }

    fn on_step(&mut self, step: &Step) {
        let Some(current) = &mut self.commands.current else { return };
        if !current.told.is_news(step) {
            return;
        }
        if let Some(id) = current.order.id.clone() {
            self.tell(&id, step);
        }
    }

    /// Takes what happened to the current change.
    pub(super) fn on_command_event(&mut self, event: Event) {
        match event {
            Event::Step(step) => self.on_step(&step),
            Event::TimeIsUp => self.hand_back_in_way(),
            Event::Ended(outcome) => {
                self.commands.progress = Progress::default();
                let Some(current) = self.commands.current.take() else { return };
                if outcome.is_ok() {
                    match current.order.change {
                        Change::Load { model, .. } if !self.models.contains(&model) => {
                            self.models.push(model);
                        }
                        Change::Unload { model } => self.models.retain(|own| *own != model),
                        Change::Load { .. } | Change::Reload { .. } | Change::Tune { .. } => {}
                    }
                }
                self.announce();
                self.answer(current.order.id, outcome);
            }
        }
    }
}

fn object(value: Option<&prost_types::Struct>) -> Map<String, Value> {
    value.map(json::map_from_struct).unwrap_or_default()
}
