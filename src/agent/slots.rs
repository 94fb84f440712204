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
    task::{AbortHandle, Id, JoinSet},
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
    handles: HashMap<Key, AbortHandle>,
    /// Attempts forgotten while they ran: their slots are freed when they have stopped.
    stopping: HashMap<Id, (Mono, Duration)>,
    handed_back: HashSet<Id>,
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
        self.handles.insert(key, handle);
    }

    /// Ends an attempt that cannot be started, with a failure.
    pub fn fail(&self, key: Key, token: String, failure: Failure) {
        // Nothing will be emitted.
        drop(self.outbox.begin(key, token, self.clock.clone()));
        self.outbox.finish(key, finish(Err(failure)), self.clock.mono());
    }

    /// Stops an attempt and forgets it; nothing more is sent for it.
    pub fn stop(&mut self, key: Key, grace: Duration) {
        let was_running = self.outbox.forget(key);
        if let Some(handle) = self.handles.get(&key)
            && was_running
        {
            self.stopping.insert(handle.id(), (self.clock.mono(), grace));
            handle.abort();
        }
    }

    /// Stops all attempts and hands them back.
    pub fn hand_back(&mut self, reason: &str) {
        for (key, handle) in &self.handles {
            let outcome = Outcome::HandBack(pb::HandBack { reason: reason.into() });
            let finish = pb::Finish { outcome: Some(outcome), usage: None };
            self.outbox.finish(*key, finish, self.clock.mono());
            self.handed_back.insert(handle.id());
            handle.abort();
        }
    }

    /// Waits for an attempt to end or stop; pending while there is none. Returns whether a
    /// slot became free that no Finish tells of.
    pub async fn ended(&mut self) -> bool {
        let Some(joined) = self.running.join_next_with_id().await else {
            return std::future::pending().await;
        };
        let (id, error) = match joined {
            Ok((id, ())) => (id, None),
            Err(error) => (error.id(), Some(error)),
        };
        let Some(key) = self.keys.remove(&id) else { return false };
        if self.handles.get(&key).is_some_and(|handle| handle.id() == id) {
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
            return true;
        }
        if let Some(error) = error
            && !handed_back
        {
            tracing::error!(task.id = %key.0, attempt = key.1, %error, "the engine panicked");
            let failure = Failure::new(Reason::EngineError, true, "the engine panicked");
            self.outbox.finish(key, finish(Err(failure)), self.clock.mono());
        }
        false
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
    };
    pb::Finish { outcome: Some(Outcome::Failure(failure)), usage }
}
