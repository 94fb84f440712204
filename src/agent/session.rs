//! The session: what is said at its beginning, and what each message of the server does.

use std::time::Duration;

use serde_json::Value;
use tonic::Status;

use super::{
    Agent,
    connection::{has_reason, reason},
    engine::{Failure, Work},
    files::Files,
    node,
    outbox::{Held, Key},
};
use crate::{
    clock::{Clock, Micros, Mono},
    error::Reason,
    id::TaskId,
    pb::{self, connect_request::Body as ToServer, connect_response::Body as FromServer},
    runners::protocol::{Inbox, Received, VERSIONS, feature},
};

/// What the server said at Welcome, and what was processed since.
#[derive(Debug)]
pub(super) struct Session {
    /// Empty before the first Welcome.
    pub(super) id: String,
    pub(super) inbox: Inbox,
    pub(super) n_welcomes: u64,
    pub(super) heartbeat_interval: Duration,
    /// When to open a new connection.
    pub(super) renew_at: Option<Mono>,
    /// What it understands besides the protocol's first release.
    features: Vec<String>,
    /// What it was told is offered.
    offered: Option<pb::Offer>,
}

impl Session {
    /// Whether the server understands a feature.
    pub(super) fn uses(&self, feature: &str) -> bool {
        self.features.iter().any(|used| used == feature)
    }

    /// Whether the server has to be told of an offer.
    pub(super) fn is_news(&mut self, offer: &pb::Offer) -> bool {
        let news = self.uses(feature::OFFER) && self.offered.as_ref() != Some(offer);
        if news {
            self.offered = Some(offer.clone());
        }
        news
    }
}

impl Default for Session {
    fn default() -> Self {
        Self {
            id: String::new(),
            inbox: Inbox::default(),
            n_welcomes: 0,
            heartbeat_interval: Duration::from_secs(5),
            renew_at: None,
            features: Vec::new(),
            offered: None,
        }
    }
}

/// Time that an engine gets to stop where the server names none.
const DEFAULT_GRACE: Duration = Duration::from_secs(10);

pub(super) fn duration(value: Option<prost_types::Duration>) -> Option<Duration> {
    value.and_then(|value| Duration::try_from(value).ok())
}

fn key(task_id: &str, attempt: u32) -> Option<Key> {
    Some((task_id.parse::<TaskId>().ok()?, attempt))
}

impl Agent {
    pub(super) fn hello(&mut self) -> pb::Hello {
        self.outbox.set_accepting(self.is_accepting());
        let offer = self.offer();
        self.session.offered = Some(offer.clone());
        // What the engine cannot do is not offered.
        let commands = self.engine.features().iter().copied();
        let features = commands.chain([feature::OFFER, feature::PROGRESS, feature::STOPPED]);
        pb::Hello {
            runner_id: self.config.runner_id.clone(),
            instance_id: self.instance_id.clone(),
            session_id: self.session.id.clone(),
            min_version: *VERSIONS.start(),
            max_version: *VERSIONS.end(),
            features: features.map(Into::into).collect(),
            node: Some(node::node(self.gpus.latest())),
            slots: self.config.slots,
            labels: self.config.labels.clone().into_iter().collect(),
            pools: self.config.pools.clone(),
            models: offer.models,
            engine: self.engine.name().into(),
            engine_version: offer.engine_version,
            agent_version: env!("CARGO_PKG_VERSION").into(),
            inventory: Some(self.inventory()),
            credits: Some(self.outbox.credits()),
            engine_params: offer.engine_params,
            paused: offer.paused,
            draining: offer.draining,
        }
    }

    fn inventory(&self) -> pb::Inventory {
        let held = |held: Held| pb::inventory::Held {
            task_id: held.key.0.to_string(),
            attempt: held.key.1,
            last_index: held.last_index,
            first_kept_index: held.first_kept,
            finished: held.finished,
        };
        pb::Inventory { held: self.outbox.inventory().into_iter().map(held).collect() }
    }

    pub(super) fn heartbeat(&self) -> pb::RunnerHeartbeat {
        let (held, held_digest) = self.outbox.digest();
        pb::RunnerHeartbeat { held_digest, held, load: node::load(), gpus: self.gpus.latest() }
    }

    /// Takes Welcome in; returns the carrier for events.
    pub(super) fn on_welcome(&mut self, welcome: pb::Welcome) -> Result<u64, Status> {
        if !VERSIONS.contains(&welcome.version) {
            let message = format!("the server chose protocol version {}", welcome.version);
            return Err(Status::unimplemented(message));
        }
        if !welcome.resumed {
            self.session.inbox = Inbox::default();
            self.outbox.new_session();
            self.commands.new_session();
            self.leaving.commands.clear();
        }
        self.session.features = welcome.features;
        tracing::info!(session.id = %welcome.session_id, resumed = welcome.resumed, "connected");
        self.session.n_welcomes += 1;
        self.session.id = welcome.session_id;
        if let Some(interval) = duration(welcome.heartbeat_interval) {
            self.session.heartbeat_interval = interval.max(Duration::from_millis(10));
        }
        // Spread over the last tenth, so that runners that came together do not leave together.
        self.session.renew_at = duration(welcome.max_stream_age)
            .filter(|age| !age.is_zero())
            .map(|age| self.clock.mono() + age.mul_f64(1.0 - 0.1 * self.entropy.unit()));
        if welcome.max_unacked_bytes > 0 {
            self.outbox.set_limit(welcome.max_unacked_bytes);
        }
        self.mailbox.welcomed(welcome.resumed, welcome.last_seq);
        let carrier = self.outbox.new_carrier();
        self.reconcile(welcome.reconciliation.unwrap_or_default());
        // The credits of Hello were counted in the numbers of the session before.
        if !welcome.resumed {
            self.announce();
        }
        Ok(carrier)
    }

    /// Processes a message after Welcome.
    ///
    /// # Errors
    /// When the peer broke the protocol: the stream must end, so that it resends.
    pub(super) fn on_control(&mut self, message: pb::ConnectResponse) -> Result<(), Status> {
        match self.session.inbox.receive(message.seq) {
            Received::New | Received::Unnumbered => {
                if let Some(body) = message.body {
                    self.on_body(message.seq, body);
                }
            }
            Received::Duplicate => {}
            Received::Missing { expected } => {
                let seq = message.seq;
                return Err(Status::aborted(format!("message {seq} came instead of {expected}")));
            }
        }
        self.mailbox.received(self.session.inbox.last(), message.ack);
        Ok(())
    }

    fn on_body(&mut self, seq: u64, body: FromServer) {
        match body {
            // Only ever first; a second one changes nothing.
            FromServer::Welcome(_) | FromServer::Heartbeat(_) => {}
            FromServer::Assign(assign) => self.on_assign(seq, assign),
            FromServer::Cancel(cancel) => {
                let Some(key) = key(&cancel.task_id, cancel.attempt) else { return };
                tracing::info!(task.id = %key.0, attempt = key.1, reason = cancel.reason,
                    detail = cancel.detail, "attempt cancelled by the server");
                self.on_cancel(key, duration(cancel.grace).unwrap_or(DEFAULT_GRACE));
            }
            FromServer::Command(command) => self.on_command(command),
            FromServer::InventoryRequest(_) => {
                self.mailbox.push(ToServer::Inventory(self.inventory()));
            }
            FromServer::Reconciliation(reconciliation) => self.reconcile(reconciliation),
            FromServer::Reconnect(reconnect) => {
                tracing::info!(reason = reconnect.reason, "the server asks for a new connection");
                let jitter = duration(reconnect.jitter).unwrap_or_default();
                let after = duration(reconnect.after).unwrap_or_default();
                let at = self.clock.mono() + after + jitter.mul_f64(self.entropy.unit());
                self.session.renew_at = Some(self.session.renew_at.map_or(at, |old| old.min(at)));
            }
        }
    }

    fn on_assign(&mut self, seq: u64, assign: pb::Assign) {
        self.outbox.saw_assign(seq);
        let (task_id, attempt) = (assign.task_id.clone(), assign.attempt);
        let Some(key) = key(&task_id, attempt) else {
            let reason = "the task id is no UUID".into();
            self.mailbox.push(ToServer::Refuse(pb::Refuse { task_id, attempt, reason }));
            return;
        };
        if self.outbox.holds(key) {
            return;
        }
        if let Some(reason) = self.refusal(&assign.model, &assign.model_version) {
            let reason = reason.into();
            self.mailbox.push(ToServer::Refuse(pb::Refuse { task_id, attempt, reason }));
            self.announce();
            return;
        }
        self.mailbox.push(ToServer::Accept(pb::Accept { task_id, attempt }));
        let token = assign.attempt_token.clone();
        let files = self.files.files(&token);
        match work(key, assign, files, self.clock.clone()) {
            Ok(work) => self.slots.start(work, token),
            Err(failure) => self.slots.fail(key, token, failure),
        }
    }

    /// The server cancels an attempt.
    pub(super) fn on_cancel(&mut self, key: Key, grace: Duration) {
        if self.slots.stop(key, grace) {
            let now = self.clock.mono();
            self.commands.cancelled.entry(key).or_insert(now);
        } else {
            self.tell_stopped(key, Duration::ZERO);
        }
    }

    /// An attempt's engine has stopped.
    pub(super) fn on_stopped(&mut self, key: Key) {
        if let Some(since) = self.commands.cancelled.remove(&key) {
            self.tell_stopped(key, self.clock.mono().since(since));
        }
    }

    fn tell_stopped(&self, (task, attempt): Key, took: Duration) {
        if self.session.uses(feature::STOPPED) {
            let took = took.try_into().ok();
            let stopped = pb::Stopped { task_id: task.to_string(), attempt, took };
            self.mailbox.push(ToServer::Stopped(stopped));
        }
    }

    fn reconcile(&mut self, reconciliation: pb::Reconciliation) {
        for verdict in reconciliation.verdicts {
            let Some(key) = key(&verdict.task_id, verdict.attempt) else { continue };
            if !verdict.keep {
                self.lost(key, "the server dropped the attempt");
            } else if !self.outbox.resend(key, verdict.resume_from) {
                self.lost(key, "the server wants events that it had acknowledged");
            }
        }
    }

    fn lost(&mut self, key: Key, why: &str) {
        if self.outbox.holds(key) {
            tracing::warn!(task.id = %key.0, attempt = key.1, "lease lost: {why}");
            self.slots.stop(key, DEFAULT_GRACE);
        }
    }

    /// Takes acknowledgements in.
    pub(super) fn on_acks(&mut self, acks: Vec<pb::LeaseAck>) {
        for ack in acks {
            let Some(key) = key(&ack.task_id, ack.attempt) else { continue };
            self.outbox.ack(key, ack.acked_index);
            if ack.finished {
                self.slots.stop(key, DEFAULT_GRACE);
            }
            let Some(error) = ack.error else { continue };
            if has_reason(&error, Reason::LeaseLost) {
                self.lost(key, "the server says so");
            } else if has_reason(&error, Reason::EventsMissing) {
                self.missing(key, ack.resend_from);
            } else {
                tracing::warn!(task.id = %key.0, attempt = key.1, reason = reason(&error),
                    "the server did not take events: {}", error.message);
            }
        }
    }

    /// The server misses events from `index` on.
    pub(super) fn missing(&mut self, key: Key, index: u64) {
        if !self.outbox.resend(key, index) {
            self.lost(key, "the server misses events that it had acknowledged");
        }
    }

    /// An answer to a call for one attempt says that its lease is lost.
    pub(super) fn lease_lost(&mut self, key: Key) {
        self.lost(key, "the server says so");
    }
}

/// The attempt as an engine takes it.
fn work(key: Key, assign: pb::Assign, files: Files, clock: Clock) -> Result<Work, Failure> {
    let object = |name: &str, json: &[u8]| match serde_json::from_slice(json) {
        _ if json.is_empty() => Ok(serde_json::Map::new()),
        Ok(Value::Object(map)) => Ok(map),
        _ => Err(Failure::input(format!("{name} is not a JSON object"))),
    };
    Ok(Work {
        task: key.0,
        attempt: key.1,
        input: object("input", &assign.input_json)?,
        params: object("params", &assign.params_json)?,
        model: assign.model,
        model_version: assign.model_version,
        seed: assign.seed,
        session: assign.session_id,
        labels: assign.labels.into_iter().collect(),
        deadline: assign
            .deadline
            .map(|at| Micros(at.seconds * 1_000_000 + i64::from(at.nanos) / 1000)),
        traceparent: assign.traceparent,
        files,
        clock,
    })
}
