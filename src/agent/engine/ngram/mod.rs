//! A word-level n-gram language model, trained on a text: real tokens without a
//! download, the same bytes for the same seed.
//!
//! It is trained at start, and by command on further texts, each a model of its own:
//! texts that come with the command, and files of one directory that the runner's
//! operator has named.

mod model;
mod source;

use std::{path::PathBuf, sync::Arc, time::Duration};

use futures_util::{FutureExt as _, future::BoxFuture};
use parking_lot::RwLock;
use serde::Deserialize;
use serde_json::{Map, Value};

use self::{
    model::{BREAK, Model, tokenize},
    source::Source,
};
use super::{Change, Completion, Engine, Failure, Loaded, Progress, Tuned, Work};
use crate::{agent::emitter::Emitter, error::Error, id::Entropy, runners::protocol::feature};

/// The text built in: passages of the King James Bible and of Lewis Carroll, all in
/// the public domain.
const CORPUS: &str = include_str!("../corpus.txt");

/// Settings of [`Ngram`].
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// Text to train on; `None` for the one built in.
    pub corpus: Option<PathBuf>,
    /// Directory whose files may be trained on by command; `None` for none.
    pub corpora: Option<PathBuf>,
    /// Pace for tasks that set none; `None` is as fast as possible.
    pub tokens_per_second: Option<f64>,
}

/// The engine; clones share what is loaded.
#[derive(Clone, Debug)]
pub struct Ngram {
    state: Arc<RwLock<State>>,
    settings: Settings,
}

#[derive(Debug)]
struct State {
    /// What it was started with.
    base: Trained,
    /// What was loaded by command.
    loaded: Loaded<Trained>,
    tuned: Tuned<Tuning>,
}

/// A model, and where it came from.
#[derive(Clone, Debug)]
struct Trained {
    model: Arc<Model>,
    source: Source,
}

/// Parameters of the engine, for tasks that set none.
#[derive(Clone, Debug, Default, Deserialize)]
struct Tuning {
    max_tokens: Option<u64>,
    temperature: Option<f64>,
    tokens_per_second: Option<f64>,
}

/// Their names.
const TUNABLE: &[&str] = &["max_tokens", "temperature", "tokens_per_second"];

/// Parameters of a task for [`Ngram`].
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Params {
    /// Also by the name that chat clients use now.
    #[serde(alias = "max_completion_tokens")]
    max_tokens: Option<u64>,
    /// 0 is greedy, 1 samples as the text has it.
    temperature: Option<f64>,
    tokens_per_second: Option<f64>,
}

const MAX_TOKENS: u64 = 128;
const TEMPERATURE: f64 = 1.0;

impl Ngram {
    /// Trains on the text of `settings`.
    ///
    /// # Errors
    /// When the file cannot be read or holds no word.
    pub async fn load(settings: &Settings) -> anyhow::Result<Self> {
        let source = settings.corpus.clone().map_or(Source::BuiltIn, Source::Start);
        let base = train(source, &Progress::default()).await?;
        let state = State { base, loaded: Loaded::default(), tuned: Tuned::default() };
        Ok(Self { state: Arc::new(RwLock::new(state)), settings: settings.clone() })
    }

    async fn make(self, change: Change, progress: Progress) -> Result<(), Error> {
        match change {
            Change::Load { model, options } => {
                let source = source::of_options(&options, self.settings.corpora.as_deref())?;
                // Without a text of its own a model is another name of the one at start.
                let trained = match source {
                    Some(source) => train(source, &progress).await?,
                    None => self.state.read().base.clone(),
                };
                self.state.write().loaded.insert(model, trained);
            }
            Change::Unload { model } => self.state.write().loaded.remove(&model),
            Change::Reload { model } => self.reload(model.as_deref(), &progress).await?,
            Change::Tune { params } => self.tune(&params)?,
        }
        Ok(())
    }

    /// Trains anew; nothing is replaced unless all of it succeeds.
    async fn reload(&self, model: Option<&str>, progress: &Progress) -> Result<(), Error> {
        let (base, named) = {
            let state = self.state.read();
            (state.base.source.clone(), state.loaded.named(model))
        };
        // A model that was not loaded by command is the one at start.
        let base = match model {
            Some(_) if !named.is_empty() => None,
            _ => Some(train(base, progress).await?),
        };
        let mut anew = Vec::new();
        for (name, before) in named {
            anew.push((name, train(before.source, progress).await?));
        }
        let mut state = self.state.write();
        if let Some(base) = base {
            state.base = base;
        }
        for (name, trained) in anew {
            state.loaded.insert(name, trained);
        }
        Ok(())
    }

    fn tune(&self, params: &Map<String, Value>) -> Result<(), Error> {
        let mut state = self.state.write();
        let tuned = state.tuned.with(params, TUNABLE)?;
        let value = &tuned.value;
        if value.tokens_per_second.is_some_and(|rate| rate <= 0.0) {
            return Err(Error::invalid("params.tokens_per_second", "must be above 0"));
        }
        if value.temperature.is_some_and(|t| !(0.0..=10.0).contains(&t)) {
            return Err(Error::invalid("params.temperature", "must be 0 to 10"));
        }
        state.tuned = tuned;
        Ok(())
    }
}

async fn train(source: Source, progress: &Progress) -> Result<Trained, Error> {
    let model = Model::train(&source.read()?, progress).await;
    if model.total == 0 {
        return Err(Error::invalid("options", "the text to train on holds no word"));
    }
    Ok(Trained { model: Arc::new(model), source })
}

impl Engine for Ngram {
    fn name(&self) -> &'static str {
        "ngram"
    }

    fn version(&self) -> String {
        format!("{}+{:016x}", env!("CARGO_PKG_VERSION"), self.state.read().base.model.digest)
    }

    fn run(&self, work: Work, emitter: Emitter) -> BoxFuture<'static, Result<Completion, Failure>> {
        let state = self.state.read();
        let found = state.loaded.find(&work.model, &work.model_version);
        let model = found.unwrap_or(&state.base).model.clone();
        let mut tuning = state.tuned.value.clone();
        tuning.tokens_per_second = tuning.tokens_per_second.or(self.settings.tokens_per_second);
        Box::pin(generate(model, tuning, work, emitter))
    }

    fn features(&self) -> &'static [&'static str] {
        &[feature::APPLY, feature::RELOAD, feature::TUNE]
    }

    fn change(&self, change: Change, progress: Progress) -> BoxFuture<'static, Result<(), Error>> {
        self.clone().make(change, progress).boxed()
    }

    fn params(&self) -> Map<String, Value> {
        self.state.read().tuned.map.clone()
    }
}

async fn generate(
    model: Arc<Model>,
    tuning: Tuning,
    work: Work,
    emitter: Emitter,
) -> Result<Completion, Failure> {
    let params: Params = work.params(&["max_tokens", "max_completion_tokens", "temperature"])?;
    let temperature = params.temperature.or(tuning.temperature).unwrap_or(TEMPERATURE);
    let max_tokens = params.max_tokens.or(tuning.max_tokens).unwrap_or(MAX_TOKENS);
    if !(0.0..=10.0).contains(&temperature) {
        return Err(Failure::input("params.temperature is not within 0 and 10"));
    }
    let pace = match params.tokens_per_second.or(tuning.tokens_per_second) {
        Some(rate) if rate > 0.0 => Some(1.0 / rate),
        Some(_) => return Err(Failure::input("params.tokens_per_second is not above 0")),
        None => None,
    };
    let prompt = work.text(&["prompt", "text"])?;
    let tokens = tokenize(&prompt);
    let mut context = model.context(&tokens);
    let mut fresh = tokens.last().is_none_or(|last| last == BREAK);
    let random = Entropy::seeded(work.seed);
    let start = work.clock.mono();

    let mut text = String::new();
    for i in 0..max_tokens {
        let next = model.next(context, temperature, &random);
        context = [context[1], Some(next)];
        let token = &model.words[next as usize];
        let piece = if fresh { token.trim_start_matches(' ') } else { token };
        fresh = token == BREAK;
        match pace {
            Some(pause) => {
                // The first token comes at once, as from a warm engine.
                let due = start + Duration::from_secs_f64(pause * i as f64);
                work.clock.sleep_until(due).await;
            }
            None => tokio::task::yield_now().await,
        }
        text.push_str(piece);
        emitter.token(piece.to_owned()).await?;
    }
    Ok(Completion {
        result: Map::from_iter([
            ("text".to_owned(), Value::String(text)),
            ("finish_reason".to_owned(), Value::String("length".into())),
        ]),
        tokens_in: tokens.len() as u64,
        tokens_out: max_tokens,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{super::testing, *};

    async fn generate(prompt: &str, params: Value, seed: u64) -> (String, usize) {
        let engine = Ngram::load(&Settings::default()).await.unwrap();
        let mut work = testing::work(json!({"prompt": prompt}), params);
        work.seed = seed;
        let (events, ended) = testing::run(&engine, work).await;
        let completion = ended.unwrap();
        assert_eq!(completion.result["text"], testing::text(&events));
        assert_eq!(completion.result["finish_reason"], "length");
        assert_eq!(completion.tokens_out, events.len() as u64);
        (testing::text(&events), events.len())
    }

    #[tokio::test]
    async fn the_same_seed_gives_the_same_bytes() {
        let (first, count) = generate("In the beginning", json!({}), 42).await;
        let (again, _) = generate("In the beginning", json!({}), 42).await;
        let (other, _) = generate("In the beginning", json!({}), 43).await;
        assert_eq!(count, 128);
        assert_eq!(first, again);
        assert_ne!(first, other);
    }

    #[tokio::test]
    async fn greedy_ignores_the_seed() {
        let params = json!({"temperature": 0, "max_tokens": 12});
        let (first, count) = generate("In the", params.clone(), 1).await;
        let (again, _) = generate("In the", params, 2).await;
        assert_eq!(count, 12);
        assert_eq!(first, again);
        assert!(first.starts_with(" beginning"), "{first}");
    }

    #[tokio::test]
    async fn parameters_out_of_range_are_refused() {
        let engine = Ngram::load(&Settings::default()).await.unwrap();
        for params in [
            json!({"temperature": -1}),
            json!({"tokens_per_second": 0}),
            json!({"max_tokens": -1}),
            json!({"top_k": 1}),
        ] {
            let (_, ended) =
                testing::run(&engine, testing::work(json!({"prompt": "x"}), params)).await;
            assert_eq!(ended.unwrap_err().reason, "INPUT_REJECTED");
        }
    }

    #[tokio::test]
    async fn a_missing_or_empty_text_is_an_error() {
        let missing = Settings { corpus: Some("/nonexistent".into()), ..Settings::default() };
        assert!(Ngram::load(&missing).await.unwrap_err().to_string().contains("/nonexistent"));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("empty.txt");
        std::fs::write(&path, " \n\n ").unwrap();
        assert!(
            Ngram::load(&Settings { corpus: Some(path), ..Settings::default() }).await.is_err()
        );
    }
}
