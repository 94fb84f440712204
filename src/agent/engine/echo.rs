//! Echoes `input.text`, or the last of `input.messages`, word by word: the engine of tests and
//! benchmarks.

use std::{sync::Arc, time::Duration};

use futures_util::{FutureExt as _, future::BoxFuture};
use parking_lot::RwLock;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{Change, Completion, Engine, Failure, Progress, Tuned, Work, read};
use crate::{agent::emitter::Emitter, error::Error, pb, runners::protocol::feature};

/// The engine. It can pass for any model.
#[derive(Clone, Debug, Default)]
pub struct Echo {
    tuned: Arc<RwLock<Tuned<Tuning>>>,
}

/// Parameters of the engine.
#[derive(Clone, Debug, Default, Deserialize)]
struct Tuning {
    /// Pause before each word where the task sets none, in milliseconds.
    #[serde(default)]
    delay_ms: u64,
}

/// Their names.
const TUNABLE: &[&str] = &["delay_ms"];

/// Options of a model: none.
#[derive(Debug, Deserialize)]
struct NoOptions {}

/// Parameters of a task for [`Echo`].
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Params {
    /// Pause before each word, in milliseconds.
    delay_ms: Option<u64>,
    /// How often the text is said.
    #[serde(default = "once")]
    repeat: u64,
    /// Names of stages to announce before the first word.
    #[serde(default)]
    stages: Vec<String>,
    /// Lines to log before the first word.
    #[serde(default)]
    log: Vec<String>,
    /// Also saves what was said as an artifact of this name.
    save_as: Option<String>,
    /// Fails instead of succeeding.
    fail: Option<Fail>,
}

/// A failure on demand.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Fail {
    #[serde(default = "task_failed")]
    reason: String,
    #[serde(default = "on_demand")]
    message: String,
    #[serde(default = "yes")]
    retryable: bool,
    /// Attempts that fail, from the first; all of them when unset.
    times: Option<u32>,
    /// Words said before the failure; all of them when unset.
    after: Option<u64>,
    /// Shortest wait before another attempt, in milliseconds.
    retry_after_ms: Option<u64>,
}

/// Longest text that is read from an artifact.
const MAX_TEXT: u64 = 16 << 20;

fn once() -> u64 {
    1
}

fn task_failed() -> String {
    "TASK_FAILED".into()
}

fn on_demand() -> String {
    "failed as params.fail asked for".into()
}

fn yes() -> bool {
    true
}

impl Engine for Echo {
    fn name(&self) -> &'static str {
        "echo"
    }

    fn version(&self) -> String {
        env!("CARGO_PKG_VERSION").into()
    }

    fn run(&self, work: Work, emitter: Emitter) -> BoxFuture<'static, Result<Completion, Failure>> {
        let delay_ms = self.tuned.read().value.delay_ms;
        Box::pin(echo(work, emitter, delay_ms))
    }

    fn features(&self) -> &'static [&'static str] {
        &[feature::APPLY, feature::RELOAD, feature::TUNE]
    }

    fn change(&self, change: Change, _: Progress) -> BoxFuture<'static, Result<(), Error>> {
        let made = match change {
            Change::Load { options, .. } => read::<NoOptions>("options", &options, &[]).map(drop),
            Change::Unload { .. } | Change::Reload { .. } => Ok(()),
            Change::Tune { params } => self.tune(&params),
        };
        async { made }.boxed()
    }

    fn params(&self) -> Map<String, Value> {
        self.tuned.read().map.clone()
    }
}

impl Echo {
    fn tune(&self, params: &Map<String, Value>) -> Result<(), Error> {
        let tuned = self.tuned.read().with(params, TUNABLE)?;
        *self.tuned.write() = tuned;
        Ok(())
    }
}

async fn echo(work: Work, emitter: Emitter, delay_ms: u64) -> Result<Completion, Failure> {
    let params: Params = work.params(&[])?;
    let delay_ms = params.delay_ms.unwrap_or(delay_ms);
    let text = match work.artifact("text") {
        Some(id) => {
            let bytes = work.files.read(id, MAX_TEXT).await?;
            let text = String::from_utf8(bytes.to_vec());
            text.map_err(|_| Failure::input(format!("artifact {id} is not UTF-8 text")))?
        }
        None => work.text(&["text", "prompt"])?.into_owned(),
    };
    let fail = params.fail.filter(|fail| fail.times.is_none_or(|times| work.attempt <= times));
    let limit = fail.as_ref().and_then(|fail| fail.after).unwrap_or(u64::MAX);

    for (i, name) in params.stages.iter().enumerate() {
        let progress = (i + 1) as f64 / params.stages.len() as f64;
        emitter.stage(name.clone(), Some(progress), String::new()).await?;
    }
    for line in params.log {
        emitter.log(crate::pb::log_event::Level::Info, line).await?;
    }

    let mut said = 0;
    let mut result = String::new();
    'saying: for round in 0..params.repeat {
        let space = if round > 0 { " " } else { "" };
        for (i, word) in words(&text).enumerate() {
            if said == limit {
                break 'saying;
            }
            if delay_ms > 0 {
                work.clock.sleep(Duration::from_millis(delay_ms)).await;
            } else {
                tokio::task::yield_now().await;
            }
            let token = if i == 0 { format!("{space}{word}") } else { word.to_owned() };
            result.push_str(&token);
            emitter.token(token).await?;
            said += 1;
        }
    }
    if let Some(fail) = fail {
        return Err(Failure {
            reason: fail.reason,
            message: fail.message,
            retryable: fail.retryable,
            metadata: [("attempt".to_owned(), work.attempt.to_string())].into(),
            retry_after: fail.retry_after_ms.map(Duration::from_millis),
        });
    }
    if let Some(name) = params.save_as {
        let mime_type = "text/plain; charset=utf-8".to_owned();
        let spec = pb::ArtifactSpec { name, mime_type, ..pb::ArtifactSpec::default() };
        let saved = work.files.put(spec, result.clone().into()).await?;
        emitter.artifact(&saved).await?;
    }
    Ok(Completion {
        result: Map::from_iter([("text".to_owned(), Value::String(result))]),
        tokens_in: words(&text).count() as u64,
        tokens_out: said,
    })
}

/// The words of a text, each with the white space before it; joined they are the text.
fn words(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let word = rest.find(|c: char| !c.is_whitespace()).unwrap_or(rest.len());
        let end = rest[word..].find(char::is_whitespace).map_or(rest.len(), |len| word + len);
        let (token, tail) = rest.split_at(end);
        rest = tail;
        Some(token)
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{super::testing, Echo, words};

    #[test]
    fn words_joined_are_the_text() {
        for text in ["", " ", "a", "a b", "  a\n b  ", "ä ö\u{a0}ü", "one two  three\n"] {
            assert_eq!(words(text).collect::<String>(), text);
        }
        assert_eq!(words("a b  c").collect::<Vec<_>>(), ["a", " b", "  c"]);
    }

    #[tokio::test]
    async fn says_the_text_again_and_again() {
        let work = testing::work(json!({"text": "hello big world"}), json!({"repeat": 2}));
        let (events, ended) = testing::run(&Echo::default(), work).await;
        let completion = ended.unwrap();
        assert_eq!(testing::text(&events), "hello big world hello big world");
        assert_eq!(completion.result["text"], "hello big world hello big world");
        assert_eq!((completion.tokens_in, completion.tokens_out), (3, 6));
        assert_eq!(events.len(), 6);
    }

    #[tokio::test]
    async fn fails_as_asked_and_then_no_more() {
        let params =
            json!({"fail": {"reason": "ENGINE_ERROR", "retryable": true, "times": 1, "after": 1}});
        let mut work = testing::work(json!({"text": "a b"}), params);
        let (events, ended) = testing::run(&Echo::default(), work.clone()).await;
        let failure = ended.unwrap_err();
        assert_eq!((failure.reason.as_str(), failure.retryable), ("ENGINE_ERROR", true));
        assert_eq!(events.len(), 1);

        work.attempt = 2;
        let (events, ended) = testing::run(&Echo::default(), work).await;
        assert!(ended.is_ok());
        assert_eq!(testing::text(&events), "a b");
    }

    #[tokio::test]
    async fn says_the_last_of_messages_whatever_the_settings_of_a_sampler() {
        let parts = json!([{"type": "text", "text": "two "}, {"type": "text", "text": "parts"}]);
        for (content, said) in [(json!("hello world"), "hello world"), (parts, "two parts")] {
            let messages = json!([{"role": "system", "content": "be brief"}, {"content": content}]);
            let params = json!({"temperature": 0.5, "max_tokens": 100, "repeat": 1});
            let work = testing::work(json!({"messages": messages}), params);
            let (events, ended) = testing::run(&Echo::default(), work).await;
            assert_eq!(testing::text(&events), said);
            assert!(ended.is_ok());
        }
    }

    #[tokio::test]
    async fn refuses_what_it_does_not_understand() {
        for (input, params) in [
            (json!({}), json!({})),
            (json!({"messages": []}), json!({})),
            (json!({"messages": [{"content": [{"type": "image_url"}]}]}), json!({})),
            (json!({"text": ""}), json!({"stop": ["x"]})),
            (json!({"text": 1}), json!({})),
            (json!({"text": ""}), json!({"dely_ms": 1})),
        ] {
            let (_, ended) = testing::run(&Echo::default(), testing::work(input, params)).await;
            let failure = ended.unwrap_err();
            assert_eq!((failure.reason.as_str(), failure.retryable), ("INPUT_REJECTED", false));
        }
    }
}
