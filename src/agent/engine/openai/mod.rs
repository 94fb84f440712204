//! Runs tasks on any server that speaks the `OpenAI` API with streaming: vLLM,
//! llama.cpp, TGI. `input.messages` goes to chat completions, `input.prompt` to
//! completions; parameters are passed through.
//!
//! The upstream request lives inside the attempt's future: dropping it closes the
//! connection, at which such servers stop computing.

mod answer;
mod failures;

use std::{fmt, sync::Arc, time::Duration};

use anyhow::Context as _;
use futures_util::{FutureExt as _, future::BoxFuture};
use parking_lot::RwLock;
use reqwest::{Client, Response, Url, header::CONTENT_TYPE};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use self::{
    answer::Answer,
    failures::{garbled, refused, unreachable},
};
use super::{
    Change, Completion, Engine, Failure, Loaded, Progress, Tuned, Work, read, sse::Parser,
};
use crate::{
    agent::emitter::Emitter,
    error::{Error, Kind, Reason},
    runners::protocol::feature,
};

/// Settings of [`OpenAi`].
#[derive(Clone)]
pub struct Settings {
    /// Base address, such as `http://127.0.0.1:8000/v1`.
    pub base_url: String,
    /// Sent as bearer token.
    pub api_key: Option<String>,
    /// Name of the model upstream; `None` sends the task's.
    pub model: Option<String>,
    /// Longest time to connect.
    pub connect_timeout: Duration,
    /// Longest silence of the upstream server, also before the first token.
    pub read_timeout: Duration,
}

impl Settings {
    /// The defaults for a server: 5 s to connect, 120 s of silence.
    pub fn new(base_url: impl Into<String>) -> Self {
        Self {
            base_url: base_url.into(),
            api_key: None,
            model: None,
            connect_timeout: Duration::from_secs(5),
            read_timeout: Duration::from_mins(2),
        }
    }
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settings")
            .field("base_url", &self.base_url)
            .field("api_key", &self.api_key.as_ref().map(|_| "[redacted]"))
            .field("model", &self.model)
            .field("connect_timeout", &self.connect_timeout)
            .field("read_timeout", &self.read_timeout)
            .finish()
    }
}

/// The engine.
#[derive(Clone, Debug)]
pub struct OpenAi {
    client: Client,
    chat: Url,
    completions: Url,
    models: Url,
    settings: Settings,
    state: Arc<RwLock<State>>,
}

/// What commands have changed; clones of the engine share it.
#[derive(Debug, Default)]
struct State {
    /// Names upstream.
    loaded: Loaded<String>,
    tuned: Tuned<Tuning>,
}

/// Parameters of the engine.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Tuning {
    /// Parameters of requests, for tasks that set none of that name.
    defaults: Map<String, Value>,
}

/// Their names.
const TUNABLE: &[&str] = &["defaults"];

/// Options of a model.
#[derive(Debug, Default, Deserialize)]
struct Options {
    /// Its name upstream; its own when absent.
    upstream_model: Option<String>,
}

/// The models of an upstream server.
#[derive(Debug, Deserialize)]
struct Listing {
    data: Vec<Listed>,
}

#[derive(Debug, Deserialize)]
struct Listed {
    id: String,
}

impl OpenAi {
    /// An engine for the server of `settings`.
    ///
    /// # Errors
    /// When the address is no HTTP URL.
    pub fn new(settings: &Settings) -> anyhow::Result<Self> {
        let mut base = settings.base_url.trim_end_matches('/').to_owned();
        if !base.ends_with("/v1") {
            base.push_str("/v1");
        }
        let url = |path: &str| {
            Url::parse(&format!("{base}/{path}"))
                .ok()
                .filter(|url| matches!(url.scheme(), "http" | "https"))
                .with_context(|| format!("`{}` is no HTTP address", settings.base_url))
        };
        let client = Client::builder()
            .connect_timeout(settings.connect_timeout)
            .read_timeout(settings.read_timeout)
            .user_agent(concat!("baton/", env!("CARGO_PKG_VERSION")))
            .build()
            .context("cannot make an HTTP client")?;
        Ok(Self {
            client,
            chat: url("chat/completions")?,
            completions: url("completions")?,
            models: url("models")?,
            state: Arc::default(),
            settings: settings.clone(),
        })
    }

    fn body(&self, work: &Work) -> Result<(Url, Value), Failure> {
        let (url, field) = match (work.input.get("messages"), work.input.get("prompt")) {
            (Some(Value::Array(_)), None) => (&self.chat, "messages"),
            (Some(_), None) => return Err(Failure::input("input.messages is not a list")),
            (None, Some(_)) => (&self.completions, "prompt"),
            (Some(_), Some(_)) => {
                return Err(Failure::input("input.messages and input.prompt exclude each other"));
            }
            (None, None) => {
                return Err(Failure::input("input.messages or input.prompt is missing"));
            }
        };
        let state = self.state.read();
        let mut body = state.tuned.value.defaults.clone();
        body.extend(work.params.clone());
        body.insert(field.into(), work.input[field].clone());
        let loaded = state.loaded.find(&work.model, &work.model_version);
        let model = loaded.or(self.settings.model.as_ref()).unwrap_or(&work.model);
        body.insert("model".into(), model.as_str().into());
        // Servers differ in how wide a seed may be; 31 bits fit all of them.
        body.entry("seed").or_insert_with(|| (work.seed & 0x7fff_ffff).into());
        body.insert("n".into(), 1.into());
        body.insert("stream".into(), true.into());
        body.insert("stream_options".into(), json!({"include_usage": true}));
        Ok((url.clone(), Value::Object(body)))
    }

    async fn generate(self, work: Work, emitter: Emitter) -> Result<Completion, Failure> {
        let (url, body) = self.body(&work)?;
        let mut request = self.client.post(url).json(&body);
        if let Some(key) = &self.settings.api_key {
            request = request.bearer_auth(key);
        }
        if !work.traceparent.is_empty() {
            request = request.header("traceparent", &work.traceparent);
        }
        let mut response = request.send().await.map_err(|error| unreachable(&error))?;
        if !response.status().is_success() {
            return Err(refused(response, &work.clock).await);
        }

        let mut answer = Answer::default();
        if is_json(&response) {
            let body = response.bytes().await.map_err(|error| unreachable(&error))?;
            answer.whole(&body, &emitter).await?;
        } else {
            let (mut parser, mut events) = (Parser::default(), Vec::new());
            while !answer.is_done() {
                let Some(bytes) = response.chunk().await.map_err(|error| unreachable(&error))?
                else {
                    break;
                };
                parser.push(&bytes, &mut events).map_err(|error| garbled(&error))?;
                for event in events.drain(..) {
                    answer.event(&event, &emitter).await?;
                }
            }
        }
        answer.complete()
    }
}

impl Engine for OpenAi {
    fn name(&self) -> &'static str {
        "openai"
    }

    fn version(&self) -> String {
        env!("CARGO_PKG_VERSION").into()
    }

    fn run(&self, work: Work, emitter: Emitter) -> BoxFuture<'static, Result<Completion, Failure>> {
        Box::pin(self.clone().generate(work, emitter))
    }

    fn features(&self) -> &'static [&'static str] {
        &[feature::APPLY, feature::RELOAD, feature::TUNE]
    }

    fn change(&self, change: Change, _: Progress) -> BoxFuture<'static, Result<(), Error>> {
        self.clone().make(change).boxed()
    }

    fn params(&self) -> Map<String, Value> {
        self.state.read().tuned.map.clone()
    }
}

impl OpenAi {
    async fn make(self, change: Change) -> Result<(), Error> {
        match change {
            Change::Load { model, options } => {
                let options: Options = read("options", &options, &["upstream_model"])?;
                // Every model by its own name, unless the start or the command says otherwise.
                let wanted = options.upstream_model.or_else(|| self.settings.model.clone());
                let wanted = match wanted {
                    None if model == "*" => return Ok(()),
                    None => model.split('@').next().unwrap_or(&model).to_owned(),
                    Some(wanted) => wanted,
                };
                self.check_upstream(std::slice::from_ref(&wanted)).await?;
                self.state.write().loaded.insert(model, wanted);
            }
            Change::Unload { model } => self.state.write().loaded.remove(&model),
            Change::Reload { model } => {
                let named = self.state.read().loaded.named(model.as_deref());
                let wanted: Vec<_> = named.into_iter().map(|(_, wanted)| wanted).collect();
                self.check_upstream(&wanted).await?;
            }
            Change::Tune { params } => {
                let mut state = self.state.write();
                state.tuned = state.tuned.with(&params, TUNABLE)?;
            }
        }
        Ok(())
    }

    /// Fails unless the upstream server answers and has the models; one that does not list its
    /// models is believed to have them.
    async fn check_upstream(&self, wanted: &[String]) -> Result<(), Error> {
        let mut request = self.client.get(self.models.clone());
        if let Some(key) = &self.settings.api_key {
            request = request.bearer_auth(key);
        }
        let upstream = |kind, message: String| Error::new(kind, Reason::EngineError, message);
        let response = request.send().await.map_err(|error| {
            tracing::debug!(?error, "the upstream server did not answer");
            upstream(Kind::Unavailable, "the upstream server cannot be reached".into())
        })?;
        let status = response.status();
        if matches!(status.as_u16(), 404 | 405 | 501) {
            return Ok(());
        }
        if !status.is_success() {
            let message =
                format!("the upstream server answered {status} when asked for its models");
            return Err(upstream(Kind::FailedPrecondition, message));
        }
        let Ok(listing) = response.json::<Listing>().await else { return Ok(()) };
        let missing = wanted.iter().find(|name| listing.data.iter().all(|has| has.id != **name));
        let Some(missing) = missing else { return Ok(()) };
        let has: Vec<_> = listing.data.iter().take(20).map(|has| has.id.as_str()).collect();
        let message =
            format!("the upstream server has no model `{missing}`; it has: {}", has.join(", "));
        Err(upstream(Kind::FailedPrecondition, message))
    }
}

fn is_json(response: &Response) -> bool {
    let kind = response.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    kind.is_some_and(|kind| kind.trim_start().starts_with("application/json"))
}

#[cfg(test)]
mod tests;
