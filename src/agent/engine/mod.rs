//! What executes an attempt: the [`Engine`] trait and the engines built in.
//!
//! An engine is a future that emits events and ends with a [`Completion`] or a
//! [`Failure`]. It knows no stream, lease or session. Dropping its future is how an
//! attempt is cancelled, so an engine must hold every upstream request inside it.

mod change;
pub mod echo;
pub mod ngram;
pub mod openai;
pub mod sse;

use std::{borrow::Cow, collections::BTreeMap, sync::Arc, time::Duration};

use futures_util::{FutureExt as _, future::BoxFuture};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

pub use self::change::{Change, Loaded, Progress, Step, Tuned, read};
use crate::{
    agent::{
        emitter::{Emitter, Stopped},
        files::Files,
    },
    clock::{Clock, Micros},
    error::{Error, Reason, reason_name},
    id::TaskId,
};

/// Settings of samplers that clients of language models set whatever the model.
const SAMPLING: [&str; 6] = [
    "frequency_penalty",
    "max_completion_tokens",
    "max_tokens",
    "presence_penalty",
    "temperature",
    "top_p",
];

/// Executes attempts.
pub trait Engine: Send + Sync + 'static {
    /// Name, such as `ngram`.
    fn name(&self) -> &'static str;

    /// Version, for operators.
    fn version(&self) -> String;

    /// Executes one attempt. Dropping the future cancels it.
    fn run(&self, work: Work, emitter: Emitter) -> BoxFuture<'static, Result<Completion, Failure>>;

    /// The commands that it understands, by the names of their features: of
    /// [`feature`](crate::runners::protocol::feature) `APPLY`, `RELOAD` and `TUNE`.
    fn features(&self) -> &'static [&'static str] {
        &[]
    }

    /// Makes a change; attempts that run go on with what they began with. One that takes long
    /// says how far it is, and yields now and then.
    fn change(&self, change: Change, progress: Progress) -> BoxFuture<'static, Result<(), Error>> {
        drop(progress);
        let refusal = change.unsupported(self.name());
        async { Err(refusal) }.boxed()
    }

    /// The parameters that were set by [`Change::Tune`].
    fn params(&self) -> Map<String, Value> {
        Map::new()
    }
}

/// Which engine to load, with its settings.
#[derive(Clone, Debug)]
pub enum Settings {
    /// Echoes its input; for tests and benchmarks.
    Echo,
    /// A small n-gram language model.
    Ngram(ngram::Settings),
    /// A server that speaks the `OpenAI` API.
    OpenAi(openai::Settings),
}

/// Loads an engine.
///
/// # Errors
/// When a file cannot be read or an address is malformed.
pub async fn load(settings: &Settings) -> anyhow::Result<Arc<dyn Engine>> {
    Ok(match settings {
        Settings::Echo => Arc::new(echo::Echo::default()),
        Settings::Ngram(settings) => Arc::new(ngram::Ngram::load(settings).await?),
        Settings::OpenAi(settings) => Arc::new(openai::OpenAi::new(settings)?),
    })
}

/// One attempt to execute.
#[derive(Clone, Debug)]
pub struct Work {
    /// The task.
    pub task: TaskId,
    /// The attempt, from 1.
    pub attempt: u32,
    /// `owner/name`.
    pub model: String,
    /// Version; empty when any will do.
    pub model_version: String,
    /// Input.
    pub input: Map<String, Value>,
    /// Parameters.
    pub params: Map<String, Value>,
    /// Seed of the sampler; the same at every attempt of a task.
    pub seed: u64,
    /// Session; empty for none.
    pub session: String,
    /// Labels of the task.
    pub labels: BTreeMap<String, String>,
    /// When the task expires.
    pub deadline: Option<Micros>,
    /// W3C trace context to continue; empty for none.
    pub traceparent: String,
    /// The artifacts that it reads and makes.
    pub files: Files,
    /// Time, for pacing.
    pub clock: Clock,
}

impl Work {
    /// The parameters as a type of the engine's own, which knows these `names`. Settings that
    /// samplers have and that are not among them are left out: clients set them for any model.
    ///
    /// # Errors
    /// `INPUT_REJECTED` when they do not fit.
    pub fn params<T: DeserializeOwned>(&self, names: &[&str]) -> Result<T, Failure> {
        let mut params = self.params.clone();
        params.retain(|name, _| names.contains(&name.as_str()) || !SAMPLING.contains(&&**name));
        serde_json::from_value(Value::Object(params))
            .map_err(|error| Failure::input(format!("params: {error}")))
    }

    /// The artifact that a member of the input refers to: the id in `{"$artifact": "<id>"}`.
    pub fn artifact(&self, name: &str) -> Option<&str> {
        match self.input.get(name)? {
            Value::Object(reference) if reference.len() == 1 => {
                reference.get("$artifact")?.as_str()
            }
            _ => None,
        }
    }

    /// A text of the input: the first of `names` that is there, or else that of the last of its
    /// `messages`.
    ///
    /// # Errors
    /// `INPUT_REJECTED` when none is, or when it is not a string.
    pub fn text(&self, names: &[&str]) -> Result<Cow<'_, str>, Failure> {
        let found = names.iter().find_map(|name| Some((name, self.input.get(*name)?)));
        match found {
            Some((_, Value::String(text))) => return Ok(text.into()),
            Some((name, _)) => return Err(Failure::input(format!("input.{name} is not a string"))),
            None => {}
        }
        let Some(messages) = self.input.get("messages") else {
            return Err(Failure::input(format!("input.{} is missing", names.join(" or input."))));
        };
        let last = messages.as_array().and_then(|messages| messages.last());
        match last.and_then(|message| message.get("content")) {
            Some(Value::String(text)) => Ok(text.into()),
            Some(Value::Array(parts)) => {
                let texts = parts.iter().map(|part| part.get("text").and_then(Value::as_str));
                let text: Option<String> = texts.collect();
                text.map(Cow::Owned).ok_or_else(|| {
                    Failure::input("input.messages: the last has a part that is no text")
                })
            }
            _ => Err(Failure::input("input.messages: the last has no text as its content")),
        }
    }
}

/// How an attempt succeeded.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Completion {
    /// The result.
    pub result: Map<String, Value>,
    /// Input tokens.
    pub tokens_in: u64,
    /// Output tokens.
    pub tokens_out: u64,
}

/// How an attempt failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Name of an `ErrorReason` without its prefix.
    pub reason: String,
    /// For people.
    pub message: String,
    /// Whether another attempt could succeed.
    pub retryable: bool,
    /// Facts, as the reason documents.
    pub metadata: BTreeMap<String, String>,
    /// Shortest wait before another attempt, where it is known.
    pub retry_after: Option<Duration>,
}

impl Failure {
    /// A failure with a documented reason.
    pub fn new(reason: Reason, retryable: bool, message: impl Into<String>) -> Self {
        Self {
            reason: reason_name(reason).into(),
            message: message.into(),
            retryable,
            metadata: BTreeMap::new(),
            retry_after: None,
        }
    }

    /// The input is not what the engine takes; retrying cannot help.
    pub fn input(message: impl Into<String>) -> Self {
        Self::new(Reason::InputRejected, false, message)
    }

    /// Adds a fact.
    #[must_use]
    pub fn with(mut self, key: &str, value: impl std::fmt::Display) -> Self {
        self.metadata.insert(key.into(), value.to_string());
        self
    }
}

impl From<Stopped> for Failure {
    fn from(_: Stopped) -> Self {
        Self::new(Reason::LeaseLost, false, "the attempt was stopped")
    }
}

#[cfg(test)]
pub(crate) mod testing {
    //! Runs an engine without an agent.

    use super::{BTreeMap, Clock, Completion, Engine, Failure, Files, TaskId, Value, Work};
    use crate::{agent::outbox::Outbox, id::Entropy, pb};

    /// An attempt with `input` and `params`.
    pub(crate) fn work(input: Value, params: Value) -> Work {
        let (Value::Object(input), Value::Object(params)) = (input, params) else {
            panic!("objects wanted")
        };
        let clock = Clock::system();
        Work {
            task: TaskId::new(clock.now(), &Entropy::seeded(1)),
            attempt: 1,
            model: "test/model".into(),
            model_version: String::new(),
            input,
            params,
            seed: 7,
            session: String::new(),
            labels: BTreeMap::new(),
            deadline: None,
            traceparent: String::new(),
            files: unconnected(),
            clock,
        }
    }

    /// Files of a runner that reaches no server.
    fn unconnected() -> Files {
        let nowhere: crate::agent::Connector =
            std::sync::Arc::new(|| Box::pin(async { anyhow::bail!("there is no server") }));
        crate::agent::files::Way::new(nowhere, Clock::system(), Entropy::system()).files("")
    }

    /// Runs to the end; returns the events too.
    pub(crate) async fn run(
        engine: &dyn Engine,
        work: Work,
    ) -> (Vec<pb::runner_event::Body>, Result<Completion, Failure>) {
        let outbox = Outbox::new(1);
        let emitter = outbox.begin((work.task, work.attempt), String::new(), work.clock.clone());
        let ended = engine.run(work, emitter).await;
        let mut events = Vec::new();
        while let Some(batch) = outbox.take(0, usize::MAX, |_| false) {
            for lease in batch.leases {
                events.extend(lease.events.into_iter().filter_map(|event| event.body));
            }
        }
        (events, ended)
    }

    /// The tokens among events, joined.
    pub(crate) fn text(events: &[pb::runner_event::Body]) -> String {
        events
            .iter()
            .filter_map(|event| match event {
                pb::runner_event::Body::Token(text) => Some(text.as_str()),
                _ => None,
            })
            .collect()
    }
}
