//! A word-level n-gram language model, trained at load on a text file: real tokens
//! without a download, the same bytes for the same seed.
//!
//! Order 3 with Witten-Bell back-off: a context seen `c` times with `n` different
//! successors is trusted with weight `c / (c + n)`, else the next shorter context
//! decides. At temperature 1 sampling is integer arithmetic alone.

use std::{collections::HashMap, path::PathBuf, sync::Arc, time::Duration};

use anyhow::Context as _;
use futures_util::future::BoxFuture;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{Completion, Engine, Failure, Work};
use crate::{agent::emitter::Emitter, id::Entropy};

/// The text built in: passages of the King James Bible and of Lewis Carroll, all in
/// the public domain.
const CORPUS: &str = include_str!("corpus.txt");

/// Where paragraphs end.
const BREAK: &str = "\n\n";

/// Settings of [`Ngram`].
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// Text to train on; `None` for the one built in.
    pub corpus: Option<PathBuf>,
    /// Pace for tasks that set none; `None` is as fast as possible.
    pub tokens_per_second: Option<f64>,
}

/// The engine.
#[derive(Debug)]
pub struct Ngram {
    model: Arc<Model>,
    tokens_per_second: Option<f64>,
}

/// Parameters of a task for [`Ngram`].
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Params {
    #[serde(default = "default_max_tokens")]
    max_tokens: u64,
    /// 0 is greedy, 1 samples as the text has it.
    #[serde(default = "default_temperature")]
    temperature: f64,
    tokens_per_second: Option<f64>,
}

fn default_max_tokens() -> u64 {
    128
}

fn default_temperature() -> f64 {
    1.0
}

impl Ngram {
    /// Trains on the text of `settings`.
    ///
    /// # Errors
    /// When the file cannot be read or holds no word.
    pub fn load(settings: &Settings) -> anyhow::Result<Self> {
        let model = match &settings.corpus {
            None => Model::train(CORPUS),
            Some(path) => {
                let text = std::fs::read_to_string(path)
                    .with_context(|| format!("cannot read the text `{}`", path.display()))?;
                Model::train(&text)
            }
        };
        anyhow::ensure!(model.total > 0, "the text to train on holds no word");
        Ok(Self { model: Arc::new(model), tokens_per_second: settings.tokens_per_second })
    }
}

impl Engine for Ngram {
    fn name(&self) -> &'static str {
        "ngram"
    }

    fn version(&self) -> String {
        format!("{}+{:016x}", env!("CARGO_PKG_VERSION"), self.model.digest)
    }

    fn run(&self, work: Work, emitter: Emitter) -> BoxFuture<'static, Result<Completion, Failure>> {
        Box::pin(generate(self.model.clone(), self.tokens_per_second, work, emitter))
    }
}

async fn generate(
    model: Arc<Model>,
    pace: Option<f64>,
    work: Work,
    emitter: Emitter,
) -> Result<Completion, Failure> {
    let params: Params = work.params()?;
    if !(0.0..=10.0).contains(&params.temperature) {
        return Err(Failure::input("params.temperature is not within 0 and 10"));
    }
    let pace = match params.tokens_per_second.or(pace) {
        Some(rate) if rate > 0.0 => Some(1.0 / rate),
        Some(_) => return Err(Failure::input("params.tokens_per_second is not above 0")),
        None => None,
    };
    let prompt = work.text(&["prompt", "text"])?;
    let tokens = tokenize(prompt);
    let mut context = model.context(&tokens);
    let mut fresh = tokens.last().is_none_or(|last| last == BREAK);
    let random = Entropy::seeded(work.seed);
    let start = work.clock.mono();

    let mut text = String::new();
    for i in 0..params.max_tokens {
        let next = model.next(context, params.temperature, &random);
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
        tokens_out: params.max_tokens,
    })
}

/// What followed a context, by token number.
#[derive(Debug, Default)]
struct Successors {
    total: u64,
    counts: Vec<(u32, u64)>,
}

impl Successors {
    fn add(&mut self, token: u32) {
        self.total += 1;
        match self.counts.binary_search_by_key(&token, |(token, _)| *token) {
            Ok(i) => self.counts[i].1 += 1,
            Err(i) => self.counts.insert(i, (token, 1)),
        }
    }

    fn greedy(&self) -> Option<u32> {
        let most = self.counts.iter().map(|(_, count)| *count).max()?;
        self.counts.iter().find(|(_, count)| *count == most).map(|(token, _)| *token)
    }

    /// A token, drawn by the counts raised to `1 / temperature`. Never called empty.
    fn draw(&self, temperature: f64, random: &Entropy) -> u32 {
        let last = self.counts.last().map_or(0, |(token, _)| *token);
        if (temperature - 1.0).abs() < f64::EPSILON {
            let mut left = random.u64() % self.total.max(1);
            for (token, count) in &self.counts {
                if left < *count {
                    return *token;
                }
                left -= count;
            }
            return last;
        }
        let weight = |count: u64| (count as f64).powf(1.0 / temperature);
        let sum: f64 = self.counts.iter().map(|(_, count)| weight(*count)).sum();
        let mut left = random.unit() * sum;
        for (token, count) in &self.counts {
            left -= weight(*count);
            if left < 0.0 {
                return *token;
            }
        }
        last
    }
}

/// The trained model.
#[derive(Debug)]
struct Model {
    words: Vec<String>,
    numbers: HashMap<String, u32>,
    total: u64,
    single: Successors,
    pairs: HashMap<u32, Successors>,
    triples: HashMap<(u32, u32), Successors>,
    /// FNV-1a of the text, so that the version names what it was trained on.
    digest: u64,
}

/// The two tokens before; `None` where there is none or it is unknown.
type Context = [Option<u32>; 2];

impl Model {
    fn train(text: &str) -> Self {
        let mut model = Self {
            words: Vec::new(),
            numbers: HashMap::new(),
            total: 0,
            single: Successors::default(),
            pairs: HashMap::new(),
            triples: HashMap::new(),
            digest: text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
                (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
            }),
        };
        let mut context: Context = [None, None];
        for word in tokenize(text) {
            let token = *model.numbers.entry(word).or_insert_with_key(|word| {
                model.words.push(word.clone());
                (model.words.len() - 1) as u32
            });
            model.total += 1;
            model.single.add(token);
            if let Some(before) = context[1] {
                model.pairs.entry(before).or_default().add(token);
                if let Some(earlier) = context[0] {
                    model.triples.entry((earlier, before)).or_default().add(token);
                }
            }
            context = [context[1], Some(token)];
        }
        model
    }

    fn context(&self, tokens: &[String]) -> Context {
        let number = |back: usize| {
            let word = tokens.len().checked_sub(back).map(|i| tokens[i].as_str())?;
            // A prompt's first word stands without the space that it has in the text.
            let found = self.numbers.get(word);
            found.or_else(|| self.numbers.get(&format!(" {word}"))).copied()
        };
        [number(2), number(1)]
    }

    fn next(&self, context: Context, temperature: f64, random: &Entropy) -> u32 {
        let triple = context[0].zip(context[1]).and_then(|pair| self.triples.get(&pair));
        let pair = context[1].and_then(|before| self.pairs.get(&before));
        if temperature == 0.0 {
            let best = triple.or(pair).and_then(Successors::greedy);
            return best.or_else(|| self.single.greedy()).unwrap_or(0);
        }
        for successors in [triple, pair].into_iter().flatten() {
            let (count, kinds) = (successors.total, successors.counts.len() as u64);
            if random.u64() % (count + kinds) < count {
                return successors.draw(temperature, random);
            }
        }
        self.single.draw(temperature, random)
    }
}

/// Words with the space before them, runs of punctuation, and paragraph breaks.
fn tokenize(text: &str) -> Vec<String> {
    let mut tokens: Vec<String> = Vec::new();
    for (i, paragraph) in text.split(BREAK).enumerate() {
        let mut words = paragraph.split_whitespace().peekable();
        if i > 0 && !tokens.is_empty() && words.peek().is_some() {
            tokens.push(BREAK.into());
        }
        for word in words {
            let core = word.trim_end_matches(|c: char| ",.;:!?)\"'”’".contains(c));
            if !core.is_empty() {
                tokens.push(format!(" {core}"));
            }
            let tail = &word[core.len()..];
            if !tail.is_empty() {
                tokens.push(if core.is_empty() { format!(" {tail}") } else { tail.into() });
            }
        }
    }
    tokens
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::{super::testing, CORPUS, Model, Ngram, Settings, tokenize};
    use crate::id::Entropy;

    async fn generate(prompt: &str, params: Value, seed: u64) -> (String, usize) {
        let engine = Ngram::load(&Settings::default()).unwrap();
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
        let engine = Ngram::load(&Settings::default()).unwrap();
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

    #[test]
    fn the_text_built_in_is_worth_a_demo() {
        let model = Model::train(CORPUS);
        assert!(model.total > 3000, "{} tokens", model.total);
        assert!(model.words.len() > 700, "{} words", model.words.len());
        assert!(CORPUS.is_ascii());
    }

    #[test]
    fn a_missing_or_empty_text_is_an_error() {
        let missing = Settings { corpus: Some("/nonexistent".into()), ..Settings::default() };
        assert!(Ngram::load(&missing).unwrap_err().to_string().contains("/nonexistent"));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("empty.txt");
        std::fs::write(&path, " \n\n ").unwrap();
        assert!(Ngram::load(&Settings { corpus: Some(path), ..Settings::default() }).is_err());
    }

    proptest! {
        #[test]
        fn every_text_with_a_word_makes_a_model_that_speaks(
            text in "[a-c ,.\n]{0,60}x",
            prompt in "[a-d ,.\n]{0,20}",
            temperature in 0.0..3.0_f64,
            seed: u64,
        ) {
            let model = Model::train(&text);
            let random = Entropy::seeded(seed);
            let mut context = model.context(&tokenize(&prompt));
            for _ in 0..20 {
                let next = model.next(context, temperature, &random);
                prop_assert!((next as usize) < model.words.len());
                context = [context[1], Some(next)];
            }
        }
    }
}
