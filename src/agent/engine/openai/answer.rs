//! What an upstream server answers: chunks of a stream, or everything at once.

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{
    Completion, Failure,
    failures::{garbled, upstream_error},
};
use crate::{
    agent::{emitter::Emitter, engine::sse::Event},
    error::Reason,
};

/// The stage that runs while the model thinks and has said nothing yet.
const REASONING: &str = "reasoning";

/// A chunk of the stream, or the whole answer of a server that does not stream.
#[derive(Debug, Default, Deserialize)]
struct Chunk {
    #[serde(default, deserialize_with = "or_default")]
    choices: Vec<Choice>,
    #[serde(default)]
    usage: Option<Usage>,
    #[serde(default)]
    error: Option<Value>,
    /// `error` for vLLM's errors without an envelope.
    #[serde(default)]
    object: Option<String>,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Choice {
    #[serde(deserialize_with = "or_default")]
    index: u64,
    text: Option<String>,
    delta: Option<Message>,
    message: Option<Message>,
    finish_reason: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Message {
    content: Option<String>,
    /// What the model thought: the name that most servers use, and the one of newer vLLM.
    reasoning_content: Option<String>,
    reasoning: Option<String>,
    refusal: Option<String>,
    #[serde(deserialize_with = "or_default")]
    tool_calls: Vec<ToolCallDelta>,
}

/// A part of a call of a tool: the arguments come piece by piece.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct ToolCallDelta {
    index: Option<usize>,
    id: Option<String>,
    function: FunctionDelta,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct FunctionDelta {
    name: Option<String>,
    arguments: Option<String>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
struct Usage {
    #[serde(deserialize_with = "or_default")]
    prompt_tokens: u64,
    #[serde(deserialize_with = "or_default")]
    completion_tokens: u64,
}

/// The default for `null`, which servers send where they could send nothing.
fn or_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

/// A call of a tool that the model asks for.
#[derive(Debug, Default)]
struct ToolCall {
    id: String,
    name: String,
    arguments: String,
}

/// What the stream has said so far.
#[derive(Debug, Default)]
pub(super) struct Answer {
    text: String,
    reasoning: String,
    refusal: String,
    tool_calls: Vec<ToolCall>,
    n_pieces: u64,
    finish_reason: Option<String>,
    usage: Option<Usage>,
    done: bool,
}

/// Most calls of tools in one answer.
const MAX_TOOL_CALLS: usize = 128;

impl Answer {
    /// Whether the server has said that nothing follows.
    pub(super) fn is_done(&self) -> bool {
        self.done
    }

    /// Takes the answer of a server that does not stream.
    pub(super) async fn whole(&mut self, body: &[u8], emitter: &Emitter) -> Result<(), Failure> {
        let chunk = serde_json::from_slice(body).map_err(|error| garbled(&error))?;
        self.take(chunk, emitter).await?;
        self.done = true;
        Ok(())
    }

    /// Takes an event of the stream.
    pub(super) async fn event(&mut self, event: &Event, emitter: &Emitter) -> Result<(), Failure> {
        let data = event.data.trim();
        if self.done || data.is_empty() {
            return Ok(());
        }
        if data == "[DONE]" {
            self.done = true;
            return Ok(());
        }
        let chunk: Chunk = serde_json::from_str(data).map_err(|error| garbled(&error))?;
        self.take(chunk, emitter).await
    }

    async fn take(&mut self, chunk: Chunk, emitter: &Emitter) -> Result<(), Failure> {
        if let Some(mut error) = chunk.error.filter(|error| !error.is_null()) {
            // TGI tells the type beside the message.
            if let (Value::String(message), Some(kind)) = (&error, chunk.rest.get("error_type")) {
                error = json!({"message": message, "type": kind});
            }
            return Err(upstream_error(&error));
        }
        if chunk.object.as_deref() == Some("error") {
            return Err(upstream_error(&Value::Object(chunk.rest)));
        }
        self.usage = chunk.usage.or(self.usage);
        for choice in chunk.choices.into_iter().filter(|choice| choice.index == 0) {
            self.finish_reason = choice.finish_reason.or(self.finish_reason.take());
            let message = choice.delta.or(choice.message).unwrap_or_default();
            if let Some(thought) = message.reasoning_content.or(message.reasoning) {
                self.think(&thought, emitter).await?;
            }
            self.refusal.push_str(&message.refusal.unwrap_or_default());
            for call in message.tool_calls {
                self.call(call)?;
            }
            let piece = choice.text.or(message.content).unwrap_or_default();
            if !piece.is_empty() {
                self.text.push_str(&piece);
                self.n_pieces += 1;
                emitter.token(piece).await?;
            }
        }
        Ok(())
    }

    /// Thoughts are no output: a stage tells watchers why nothing comes, the result keeps them.
    async fn think(&mut self, thought: &str, emitter: &Emitter) -> Result<(), Failure> {
        if thought.is_empty() {
            return Ok(());
        }
        if self.reasoning.is_empty() {
            emitter.stage(REASONING.into(), None, String::new()).await?;
        }
        self.reasoning.push_str(thought);
        self.n_pieces += 1;
        Ok(())
    }

    fn call(&mut self, delta: ToolCallDelta) -> Result<(), Failure> {
        let index = delta.index.unwrap_or(self.tool_calls.len());
        if index >= MAX_TOOL_CALLS {
            return Err(garbled(&format_args!("more than {MAX_TOOL_CALLS} tool calls")));
        }
        if self.tool_calls.len() <= index {
            self.tool_calls.resize_with(index + 1, ToolCall::default);
        }
        let call = &mut self.tool_calls[index];
        call.id = delta.id.filter(|id| !id.is_empty()).unwrap_or(std::mem::take(&mut call.id));
        call.name.push_str(&delta.function.name.unwrap_or_default());
        call.arguments.push_str(&delta.function.arguments.unwrap_or_default());
        Ok(())
    }

    /// The end of the attempt: the text with whatever else the server said.
    pub(super) fn complete(self) -> Result<Completion, Failure> {
        if !self.done && self.finish_reason.is_none() {
            let message = "the engine's stream ended before its end";
            return Err(Failure::new(Reason::EngineError, true, message));
        }
        let usage =
            self.usage.unwrap_or(Usage { prompt_tokens: 0, completion_tokens: self.n_pieces });
        let finish_reason = self.finish_reason.map_or(Value::Null, Value::String);
        let mut result = Map::from_iter([
            ("text".to_owned(), Value::String(self.text)),
            ("finish_reason".to_owned(), finish_reason),
        ]);
        for (name, text) in [("reasoning", self.reasoning), ("refusal", self.refusal)] {
            if !text.is_empty() {
                result.insert(name.into(), text.into());
            }
        }
        if !self.tool_calls.is_empty() {
            let calls = self.tool_calls.into_iter().map(ToolCall::into_json).collect();
            result.insert("tool_calls".into(), Value::Array(calls));
        }
        Ok(Completion {
            result,
            tokens_in: usage.prompt_tokens,
            tokens_out: usage.completion_tokens,
        })
    }
}

impl ToolCall {
    /// As in a message of the `OpenAI` API.
    fn into_json(self) -> Value {
        json!({
            "id": self.id,
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        })
    }
}
