//! A completion as the clients read it: whole, or in chunks.

use axum::response::{IntoResponse as _, Response, sse::Event};
use serde_json::{Value, json};
use tonic::Streaming;

use super::{
    follow::{self, About, Done, Follow, Step},
    refusal::Refusal,
    request::Kind,
};
use crate::{
    facades::sse::{self, PEEK, Source, event},
    pb,
};

/// What answers look like.
#[derive(Clone, Debug)]
pub struct Form {
    /// Of which kind they are.
    pub kind: Kind,
    /// The model, as the client names it.
    pub model: String,
    /// Whether a stream ends with a chunk that tells the usage.
    pub include_usage: bool,
}

impl Form {
    fn object(&self, about: &About, object: &str, choices: &Value) -> Value {
        let prefix = match self.kind {
            Kind::Chat => "chatcmpl",
            Kind::Text => "cmpl",
        };
        json!({
            "id": format!("{prefix}-{}", about.task),
            "object": object,
            "created": about.created,
            "model": self.model,
            "system_fingerprint": about.fingerprint,
            "choices": choices,
        })
    }

    fn chunk(&self, about: &About, choices: &Value) -> Value {
        let object = match self.kind {
            Kind::Chat => "chat.completion.chunk",
            Kind::Text => "text_completion",
        };
        let mut chunk = self.object(about, object, choices);
        if self.include_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }

    /// A piece of text.
    fn piece(&self, about: &About, text: &str) -> Value {
        let choices = match self.kind {
            Kind::Chat => {
                json!([{"index": 0, "delta": {"content": text}, "logprobs": null, "finish_reason": null}])
            }
            Kind::Text => {
                json!([{"index": 0, "text": text, "logprobs": null, "finish_reason": null}])
            }
        };
        self.chunk(about, &choices)
    }

    /// What comes before the first text.
    fn opening(&self, about: &About) -> Option<Value> {
        let delta = json!({"role": "assistant", "content": ""});
        let choices =
            json!([{"index": 0, "delta": delta, "logprobs": null, "finish_reason": null}]);
        (self.kind == Kind::Chat).then(|| self.chunk(about, &choices))
    }

    /// What comes after the last text.
    fn closing(&self, about: &About, done: &Done) -> Vec<Value> {
        let mut chunks = Vec::new();
        let reason = &done.finish_reason;
        if self.kind == Kind::Chat && !done.extras.is_empty() {
            let mut delta = Value::Object(done.extras.clone());
            number_calls(&mut delta);
            let choices =
                json!([{"index": 0, "delta": delta, "logprobs": null, "finish_reason": null}]);
            chunks.push(self.chunk(about, &choices));
        }
        let choices = match self.kind {
            Kind::Chat => {
                json!([{"index": 0, "delta": {}, "logprobs": null, "finish_reason": reason}])
            }
            Kind::Text => {
                json!([{"index": 0, "text": "", "logprobs": null, "finish_reason": reason}])
            }
        };
        chunks.push(self.chunk(about, &choices));
        if self.include_usage {
            let mut chunk = self.chunk(about, &json!([]));
            chunk["usage"] = usage(done);
            chunks.push(chunk);
        }
        chunks
    }
}

/// In chunks a call of a tool says which one it is.
fn number_calls(delta: &mut Value) {
    let calls = delta.get_mut("tool_calls").and_then(Value::as_array_mut);
    for (i, call) in calls.into_iter().flatten().enumerate() {
        if let Some(call) = call.as_object_mut() {
            call.insert("index".into(), i.into());
        }
    }
}

fn usage(done: &Done) -> Value {
    let Done { prompt_tokens, completion_tokens, .. } = done;
    json!({
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    })
}

/// The whole answer, when the task has ended.
pub async fn whole(events: Streaming<pb::TaskEvent>, form: &Form) -> Result<Response, Refusal> {
    let (about, text, done) = follow::whole(events).await?;
    let reason = &done.finish_reason;
    let mut answer = match form.kind {
        Kind::Chat => {
            // A message that is nothing but calls of tools has no content.
            let content =
                (!text.is_empty() || !done.extras.contains_key("tool_calls")).then_some(text);
            let mut message = json!({"role": "assistant", "content": content, "refusal": null});
            for (name, value) in &done.extras {
                message[name] = value.clone();
            }
            let choices = json!([{"index": 0, "message": message, "logprobs": null, "finish_reason": reason}]);
            form.object(&about, "chat.completion", &choices)
        }
        Kind::Text => {
            let choices =
                json!([{"index": 0, "text": text, "logprobs": null, "finish_reason": reason}]);
            form.object(&about, "text_completion", &choices)
        }
    };
    answer["usage"] = usage(&done);
    Ok(axum::Json(answer).into_response())
}

/// The answer in chunks, as they come.
pub async fn stream(mut follow: Follow, form: Form) -> Result<Response, Refusal> {
    let first = match tokio::time::timeout(PEEK, follow.next()).await {
        Ok(Err(refusal)) => return Err(refusal),
        Ok(Ok(step)) => Some(step),
        // The step that was waited for is not lost: nothing is taken before it is there.
        Err(_) => None,
    };
    Ok(sse::response(Chunks { follow, form, first, opened: false, ended: false }))
}

/// A stream under way.
struct Chunks {
    follow: Follow,
    form: Form,
    first: Option<Step>,
    opened: bool,
    ended: bool,
}

impl Source for Chunks {
    async fn next(&mut self) -> Option<Vec<Event>> {
        if self.ended {
            return None;
        }
        let step = match self.first.take() {
            Some(step) => Ok(step),
            None => self.follow.next().await,
        };
        let (form, about) = (&self.form, &self.follow.about);
        let mut events = Vec::new();
        if !self.opened && step.is_ok() {
            self.opened = true;
            events.extend(form.opening(about).as_ref().map(event));
        }
        match step {
            Ok(Step::Text(text)) => events.push(event(&form.piece(about, &text))),
            Ok(Step::Done(done)) => {
                events.extend(form.closing(about, &done).iter().map(event));
                events.push(Event::default().data("[DONE]"));
                self.ended = true;
            }
            Err(refusal) => {
                events.push(event(&refusal.json()));
                self.ended = true;
            }
        }
        Some(events)
    }
}
