//! The attempts that are executing: starts engines, stops them, hears of their end.
//!
//! Each attempt is a future of its own, owned by this set: it cannot outlive it, a panic
//! ends that attempt alone, and stopping one drops its future with all it holds.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use prost::Message as _;
use tokio::{
    runtime::Handle,
    task::{AbortHandle, Id, JoinError, JoinSet},
};

use super::{
    engine::{Completion, Engine, Failure, Work},
    outbox::{Key, Outbox},
};
use crate::{
    clock::{Clock, Mono},
    error::Reason,
    json,
    pb::{self, finish::Outcome},
};

/// Largest encoded result; a message may take 4 MiB with what goes with it.
const MAX_RESULT: usize = 3 << 20;

/// The executing attempts.
pub struct Slots {
    engine: Arc<dyn Engine>,
    outbox: Outbox,
    clock: Clock,
    /// Where engines run; apart from the control loop, so that one that blocks its thread
    /// cannot hold back a heartbeat.
    runtime: Option<Handle>,
    running: JoinSet<()>,
    keys: HashMap<Id, Key>,
    handles: HashMap<Key, Running>,
    /// Attempts forgotten while they ran: their slots are freed when they have stopped.
    stopping: HashMap<Id, (Mono, Duration)>,
    handed_back: HashSet<Id>,
}

/// An attempt whose engine has not ended yet.
struct Running {
    handle: AbortHandle,
    model: String,
    /// Empty when any will do.
    version: String,
}

impl Running {
    fn is(&self, pick: &impl Fn(&str, Option<&str>) -> bool) -> bool {
        pick(&self.model, Some(self.version.as_str()).filter(|version| !version.is_empty()))
    }
}

/// An attempt whose engine has ended.
pub struct Ended {
    /// The attempt.
    pub key: Key,
    /// Whether a slot became free that no Finish tells of.
    pub freed: bool,
}

impl Slots {
    /// No attempt yet. Engines run on `runtime`, or on the caller's.
    pub fn new(
        engine: Arc<dyn Engine>,
        outbox: Outbox,
        clock: Clock,
        runtime: Option<Handle>,
    ) -> Self {
        Self {
            engine,
            outbox,
            clock,
            runtime,
            running: JoinSet::new(),
            keys: HashMap::new(),
            handles: HashMap::new(),
            stopping: HashMap::new(),
            handed_back: HashSet::new(),
        }
    }

    /// Starts an attempt. `token` is its credential for unary calls.
    pub fn start(&mut self, work: Work, token: String) {
        let key = (work.task, work.attempt);
        let (model, version) = (work.model.clone(), work.model_version.clone());
        let emitter = self.outbox.begin(key, token, self.clock.clone());
        let (outbox, clock) = (self.outbox.clone(), self.clock.clone());
        let execution = self.engine.run(work, emitter);
        let attempt = async move {
            let ended = execution.await;
            outbox.finish(key, finish(ended), clock.mono());
        };
        let handle = match &self.runtime {
            Some(runtime) => self.running.spawn_on(attempt, runtime),
            None => self.running.spawn(attempt),
        };
        self.keys.insert(handle.id(), key);
        self.handles.insert(key, Running { handle, model, version });
    }

    /// Ends an attempt that cannot be started, with a failure.
    pub fn fail(&self, key: Key, token: String, failure: Failure) {
        // Nothing will be emitted.
        drop(self.outbox.begin(key, token, self.clock.clone()));
        self.outbox.finish(key, finish(Err(failure)), self.clock.mono());
    }

    /// Stops an attempt and forgets it; nothing more is sent for it. Returns whether its engine
    /// may go on for a moment: [`ended`](Self::ended) tells when it has ended.
    pub fn stop(&mut self, key: Key, grace: Duration) -> bool {
        let was_running = self.outbox.forget(key);
        let Some(Running { handle, .. }) = self.handles.get(&key) else { return false };
        if was_running {
            self.stopping.insert(handle.id(), (self.clock.mono(), grace));
            handle.abort();
        }
        true
    }

    /// Attempts that `pick` picks by model and version, whose engines have not ended.
    pub fn count(&self, pick: impl Fn(&str, Option<&str>) -> bool) -> usize {
        self.handles.values().filter(|running| running.is(&pick)).count()
    }

    /// Stops the attempts that `pick` picks by model and version, and hands them back.
    pub fn hand_back(&mut self, reason: &str, pick: impl Fn(&str, Option<&str>) -> bool) {
        for (key, running) in self.handles.iter().filter(|(_, running)| running.is(&pick)) {
            let handle = &running.handle;
            let outcome = Outcome::HandBack(pb::HandBack { reason: reason.into() });
            let finish = pb::Finish { outcome: Some(outcome), usage: None };
            self.outbox.finish(*key, finish, self.clock.mono());
            self.handed_back.insert(handle.id());
            handle.abort();
        }
    }

    /// Waits for an attempt to end or stop; pending while there is none.
    pub async fn ended(&mut self) -> Ended {
        loop {
            let Some(joined) = self.running.join_next_with_id().await else {
                return std::future::pending().await;
            };
            if let Some(ended) = self.take(joined) {
                return ended;
            }
        }
    }

    fn take(&mut self, joined: Result<(Id, ()), JoinError>) -> Option<Ended> {
        let (id, error) = match joined {
            Ok((id, ())) => (id, None),
            Err(error) => (error.id(), Some(error)),
        };
        let key = self.keys.remove(&id)?;
        if self.handles.get(&key).is_some_and(|running| running.handle.id() == id) {
            self.handles.remove(&key);
        }
        let handed_back = self.handed_back.remove(&id);
        if let Some((since, grace)) = self.stopping.remove(&id) {
            let took = self.clock.mono().since(since);
            if took > grace {
                let (task, attempt) = key;
                tracing::warn!(task.id = %task, attempt, took_ms = took.as_millis() as u64,
                    "the engine did not stop within the grace");
            }
            self.outbox.free();
            return Some(Ended { key, freed: true });
        }
        if let Some(error) = error
            && !handed_back
        {
            tracing::error!(task.id = %key.0, attempt = key.1, %error, "the engine panicked");
            let failure = Failure::new(Reason::EngineError, true, "the engine panicked");
            self.outbox.finish(key, finish(Err(failure)), self.clock.mono());
        }
        Some(Ended { key, freed: false })
    }
}

fn finish(ended: Result<Completion, Failure>) -> pb::Finish {
    let completion = match ended {
        Ok(completion) => completion,
        Err(failure) => return failed(failure, None),
    };
    let usage = pb::Usage {
        tokens_in: completion.tokens_in,
        tokens_out: completion.tokens_out,
        ..pb::Usage::default()
    };
    let result = json::struct_from_map(completion.result);
    if result.encoded_len() > MAX_RESULT {
        let message = format!("the result is larger than {MAX_RESULT} bytes");
        let failure = Failure::new(Reason::MessageTooLarge, false, message);
        return failed(failure.with("limit_bytes", MAX_RESULT), Some(usage));
    }
    let success = pb::Success { result: Some(result) };
    pb::Finish { outcome: Some(Outcome::Success(success)), usage: Some(usage) }
}

fn failed(failure: Failure, usage: Option<pb::Usage>) -> pb::Finish {
    let failure = pb::Failure {
        reason: failure.reason,
        message: failure.message,
        retryable: failure.retryable,
        metadata: failure.metadata.into_iter().collect(),
        retry_after: failure.retry_after.and_then(|after| after.try_into().ok()),
    };
    pb::Finish { outcome: Some(Outcome::Failure(failure)), usage }
}
