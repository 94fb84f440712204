//! The model: words, what follows which, and how the next one is drawn.
//!
//! Order 3 with Witten-Bell back-off: a context seen `c` times with `n` different
//! successors is trusted with weight `c / (c + n)`, else the next shorter context
//! decides. At temperature 1 sampling is integer arithmetic alone.

use std::collections::HashMap;

use crate::{agent::engine::Progress, id::Entropy};

/// Where paragraphs end.
pub(super) const BREAK: &str = "\n\n";

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
pub(super) struct Model {
    pub(super) words: Vec<String>,
    numbers: HashMap<String, u32>,
    pub(super) total: u64,
    single: Successors,
    pairs: HashMap<u32, Successors>,
    triples: HashMap<(u32, u32), Successors>,
    /// FNV-1a of the text, so that the version names what it was trained on.
    pub(super) digest: u64,
}

/// The two tokens before; `None` where there is none or it is unknown.
pub(super) type Context = [Option<u32>; 2];

impl Model {
    /// Trains on a text. Yields now and then, and says how far it is.
    pub(super) async fn train(text: &str, progress: &Progress) -> Self {
        /// Tokens learnt at a stretch: a few milliseconds.
        const STRETCH: usize = 8192;
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
        let tokens = tokenize(text);
        let mut context: Context = [None, None];
        for stretch in tokens.chunks(STRETCH) {
            progress.report(model.total, tokens.len() as u64, "tokens learnt");
            tokio::task::yield_now().await;
            for word in stretch {
                context = model.learn(word, context);
            }
        }
        model
    }

    fn learn(&mut self, word: &str, context: Context) -> Context {
        let known = self.numbers.get(word).copied();
        let token = known.unwrap_or_else(|| {
            let token = self.words.len() as u32;
            self.words.push(word.to_owned());
            self.numbers.insert(word.to_owned(), token);
            token
        });
        self.total += 1;
        self.single.add(token);
        if let Some(before) = context[1] {
            self.pairs.entry(before).or_default().add(token);
            if let Some(earlier) = context[0] {
                self.triples.entry((earlier, before)).or_default().add(token);
            }
        }
        [context[1], Some(token)]
    }

    pub(super) fn context(&self, tokens: &[String]) -> Context {
        let number = |back: usize| {
            let word = tokens.len().checked_sub(back).map(|i| tokens[i].as_str())?;
            // A prompt's first word stands without the space that it has in the text.
            let found = self.numbers.get(word);
            found.or_else(|| self.numbers.get(&format!(" {word}"))).copied()
        };
        [number(2), number(1)]
    }

    pub(super) fn next(&self, context: Context, temperature: f64, random: &Entropy) -> u32 {
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
pub(super) fn tokenize(text: &str) -> Vec<String> {
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

    use super::{super::CORPUS, *};

    fn train(text: &str) -> Model {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(Model::train(text, &Progress::default()))
    }

    #[test]
    fn the_text_built_in_is_worth_a_demo() {
        let model = train(CORPUS);
        assert!(model.total > 3000, "{} tokens", model.total);
        assert!(model.words.len() > 700, "{} words", model.words.len());
        assert!(CORPUS.is_ascii());
    }

    proptest! {
        #[test]
        fn every_text_with_a_word_makes_a_model_that_speaks(
            text in "[a-c ,.\n]{0,60}x",
            prompt in "[a-d ,.\n]{0,20}",
            temperature in 0.0..3.0_f64,
            seed: u64,
        ) {
            let model = train(&text);
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
