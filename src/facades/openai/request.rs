//! What a client of the `OpenAI` API asks for, as a task.
//!
//! What has a meaning for every model is read here. All other parameters go to the engine as
//! they are: it knows which of them it takes, and names the one that it refuses.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::refusal::Refusal;
use crate::{json, pb};

/// Which of the two kinds of completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `chat/completions`: of messages.
    Chat,
    /// `completions`: of a prompt.
    Text,
}

/// A completion that is asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct Asked {
    /// The task.
    pub spec: pb::TaskSpec,
    /// The model, as the client names it.
    pub model: String,
    /// Whether the answer comes in pieces.
    pub stream: bool,
    /// Whether a stream ends with a chunk that tells the usage.
    pub include_usage: bool,
}

/// Parameters about the account of the caller at that service, which say nothing here.
const WITHOUT_MEANING: [&str; 7] = [
    "store",
    "user",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "service_tier",
    "prompt_cache_options",
];

/// Parameters that change the form of the answer to one that is not offered, and the values that
/// leave it as it is.
const NOT_OFFERED: [(&str, &[&str]); 8] = [
    ("n", &["1"]),
    ("best_of", &["1"]),
    ("logprobs", &["false"]),
    ("top_logprobs", &["0"]),
    ("echo", &["false"]),
    ("suffix", &["\"\""]),
    ("modalities", &["[\"text\"]"]),
    ("audio", &[]),
];

impl Asked {
    /// Reads the body of a request.
    pub fn read(kind: Kind, mut body: Map<String, Value>) -> Result<Self, Refusal> {
        // A parameter that is null is one that was not given.
        body.retain(|_, value| !value.is_null());
        let model = match body.remove("model") {
            Some(Value::String(model)) => model,
            Some(_) => return Err(Refusal::parameter("model", "must be a string")),
            None => return Err(Refusal::parameter("model", "is required")),
        };
        let input = match kind {
            Kind::Chat => ("messages", messages(body.remove("messages"))?),
            Kind::Text => ("prompt", prompt(body.remove("prompt"))?),
        };
        let stream = flag(&mut body, "stream")?;
        let include_usage = match body.remove("stream_options") {
            None => false,
            Some(Value::Object(_)) if !stream => {
                return Err(Refusal::parameter("stream_options", "needs stream to be true"));
            }
            Some(Value::Object(mut options)) => flag(&mut options, "include_usage")?,
            Some(_) => return Err(Refusal::parameter("stream_options", "must be an object")),
        };
        let seed = seed(body.remove("seed"))?;
        let labels = labels(body.remove("metadata"))?;
        for name in WITHOUT_MEANING {
            body.remove(name);
        }
        for (name, plain) in NOT_OFFERED {
            if let Some(value) = body.remove(name) {
                let value = value.to_string();
                if !plain.contains(&value.as_str()) {
                    let shown: String = value.chars().take(40).collect();
                    let problem = format!("`{shown}` is not offered; leave it out");
                    return Err(Refusal::parameter(name, problem));
                }
            }
        }
        let spec = pb::TaskSpec {
            model: model.clone(),
            input: Some(json::struct_from_map(Map::from_iter([(input.0.to_owned(), input.1)]))),
            params: (!body.is_empty()).then(|| json::struct_from_map(body)),
            labels,
            seed,
            ..Default::default()
        };
        Ok(Self { spec, model, stream, include_usage })
    }
}

fn messages(value: Option<Value>) -> Result<Value, Refusal> {
    let Some(value) = value else { return Err(Refusal::parameter("messages", "is required")) };
    let list = value.as_array().filter(|list| !list.is_empty());
    let Some(list) = list else {
        return Err(Refusal::parameter("messages", "must be a list of at least one message"));
    };
    for (i, message) in list.iter().enumerate() {
        if !message.get("role").is_some_and(Value::is_string) {
            let name = format!("messages[{i}].role");
            return Err(Refusal::parameter(&name, "must be a string"));
        }
        match message.get("content") {
            None | Some(Value::Null | Value::String(_) | Value::Array(_)) => {}
            Some(_) => {
                let name = format!("messages[{i}].content");
                return Err(Refusal::parameter(&name, "must be a string or a list of parts"));
            }
        }
    }
    Ok(value)
}

/// One prompt: a string or a list of token ids, or a list of one of these.
fn prompt(value: Option<Value>) -> Result<Value, Refusal> {
    let single = |value: &Value| match value {
        Value::String(_) => true,
        Value::Array(tokens) => !tokens.is_empty() && tokens.iter().all(Value::is_u64),
        _ => false,
    };
    match value {
        None => Err(Refusal::parameter("prompt", "is required")),
        Some(value) if single(&value) => Ok(value),
        Some(Value::Array(mut list)) => match (list.pop(), list.is_empty()) {
            (Some(only), true) if single(&only) => Ok(only),
            _ => Err(Refusal::parameter("prompt", "must hold one prompt a request")),
        },
        Some(_) => Err(Refusal::parameter("prompt", "must be a string or a list of tokens")),
    }
}

fn flag(map: &mut Map<String, Value>, name: &str) -> Result<bool, Refusal> {
    match map.remove(name) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(value)) => Ok(value),
        Some(_) => Err(Refusal::parameter(name, "must be true or false")),
    }
}

fn seed(value: Option<Value>) -> Result<Option<u64>, Refusal> {
    let Some(value) = value else { return Ok(None) };
    let seed = value.as_u64().filter(|seed| i64::try_from(*seed).is_ok());
    seed.map(Some).ok_or_else(|| Refusal::parameter("seed", "must be a whole number from 0 on"))
}

/// The caller's own notes about a request are labels of the task.
fn labels(value: Option<Value>) -> Result<BTreeMap<String, String>, Refusal> {
    let wrong = || Refusal::parameter("metadata", "must be an object of strings");
    match value {
        None => Ok(BTreeMap::new()),
        Some(Value::Object(map)) => map
            .into_iter()
            .map(|(key, value)| match value {
                Value::String(value) => Ok((key, value)),
                _ => Err(wrong()),
            })
            .collect(),
        Some(_) => Err(wrong()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(kind: Kind, body: Value) -> Result<Asked, Refusal> {
        let Value::Object(body) = body else { panic!("an object wanted") };
        Asked::read(kind, body)
    }

    #[test]
    fn what_has_a_meaning_for_every_model_leaves_the_parameters() {
        let asked = read(
            Kind::Chat,
            json!({
                "model": "a/b", "messages": [{"role": "user", "content": "hello"}], "stream": true,
                "stream_options": {"include_usage": true}, "seed": 7, "metadata": {"team": "demo"},
                "n": 1, "user": "u", "temperature": 0.5, "top_k": 3, "stop": null,
            }),
        )
        .unwrap();
        assert!(asked.stream && asked.include_usage);
        let spec = asked.spec;
        let params = json::text_from_struct(&spec.params.unwrap());
        assert_eq!(params, r#"{"temperature":0.5,"top_k":3}"#);
        let input = json::text_from_struct(&spec.input.unwrap());
        assert_eq!(input, r#"{"messages":[{"content":"hello","role":"user"}]}"#);
        assert_eq!((spec.model.as_str(), spec.seed), ("a/b", Some(7)));
        assert_eq!(spec.labels["team"], "demo");
    }

    #[test]
    fn a_list_of_one_prompt_is_that_prompt() {
        for (given, prompt) in [
            (json!("x"), json!("x")),
            (json!(["x"]), json!("x")),
            (json!([1, 2]), json!([1, 2])),
            (json!([[1, 2]]), json!([1, 2])),
        ] {
            let asked = read(Kind::Text, json!({"model": "a/b", "prompt": given})).unwrap();
            let input = json::map_from_struct(&asked.spec.input.unwrap());
            assert_eq!(input["prompt"], prompt);
        }
    }

    #[test]
    fn a_refusal_names_the_parameter() {
        let message = json!([{"role": "user", "content": "x"}]);
        for (kind, body, param) in [
            (Kind::Chat, json!({"messages": message}), "model"),
            (Kind::Chat, json!({"model": "a/b"}), "messages"),
            (Kind::Chat, json!({"model": "a/b", "messages": []}), "messages"),
            (Kind::Chat, json!({"model": "a/b", "messages": [{"role": 1}]}), "messages[0].role"),
            (Kind::Chat, json!({"model": "a/b", "messages": message, "n": 2}), "n"),
            (Kind::Chat, json!({"model": "a/b", "messages": message, "seed": -1}), "seed"),
            (Kind::Chat, json!({"model": "a/b", "messages": message, "stream": 1}), "stream"),
            (
                Kind::Chat,
                json!({"model": "a/b", "messages": message, "logprobs": true}),
                "logprobs",
            ),
            (
                Kind::Chat,
                json!({"model": "a/b", "messages": message, "stream_options": {}}),
                "stream_options",
            ),
            (Kind::Text, json!({"model": "a/b", "prompt": ["x", "y"]}), "prompt"),
            (Kind::Text, json!({"model": "a/b", "prompt": "x", "echo": true}), "echo"),
            (Kind::Text, json!({"model": "a/b", "prompt": "x", "metadata": {"k": 1}}), "metadata"),
        ] {
            let refusal = read(kind, body.clone()).unwrap_err();
            assert_eq!(refusal.param.as_deref(), Some(param), "{body}");
        }
    }
}
