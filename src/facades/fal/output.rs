//! What a request produced, whole and as it comes.

use serde_json::{Map, Value, json};
use tonic::Streaming;

use super::{refusal::Refusal, status::line};
use crate::{
    json,
    pb::{self, TaskState, task_event::Body},
};

/// What a task produced.
#[derive(Debug, Default)]
pub struct Output {
    /// Result as the engine gave it.
    pub result: Option<prost_types::Struct>,
    /// Its tokens, joined.
    pub text: String,
    /// Its files.
    pub artifacts: Vec<pb::ArtifactEvent>,
}

impl Output {
    /// The result, as the engine gave it. Text stands in where there is none, and files are added
    /// where it does not name them itself.
    pub fn into_json(self) -> Value {
        let mut result = self.result.as_ref().map(json::map_from_struct).unwrap_or_default();
        if result.is_empty() && !self.text.is_empty() {
            result.insert("text".into(), self.text.into());
        }
        if !self.artifacts.is_empty() && !result.contains_key("artifacts") {
            result.insert("artifacts".into(), self.artifacts.iter().map(artifact).collect());
        }
        Value::Object(result)
    }
}

impl From<pb::TaskResult> for Output {
    fn from(result: pb::TaskResult) -> Self {
        let pb::TaskResult { result, text, artifacts, .. } = result;
        Self { result, text, artifacts }
    }
}

fn artifact(artifact: &pb::ArtifactEvent) -> Value {
    json!({
        "name": artifact.name,
        "type": artifact.r#type,
        "url": artifact.url,
        "content_type": artifact.mime_type,
        "file_size": artifact.size_bytes,
        "expires_at": artifact.expires_at.map(|time| time.to_string()),
    })
}

/// A run under way.
pub struct Run {
    events: Streaming<pb::TaskEvent>,
    /// The task.
    pub id: String,
    output: Output,
    /// Whether some of its text is lost for good.
    has_gap: bool,
}

/// A step of a run.
#[derive(Debug, PartialEq)]
pub enum Step {
    /// Something on the way.
    Event(Value),
    /// What it produced; nothing follows.
    Done(Value),
}

impl Run {
    /// A run of these events, from the first of which the id is known.
    pub async fn begin(mut events: Streaming<pb::TaskEvent>) -> Result<Self, Refusal> {
        match events.message().await?.and_then(|event| event.body) {
            Some(Body::Queued(queued)) => {
                Ok(Self { events, id: queued.task_id, output: Output::default(), has_gap: false })
            }
            _ => Err(Refusal::broken()),
        }
    }

    /// The next step.
    pub async fn next(&mut self) -> Result<Step, Refusal> {
        while let Some(event) = self.events.message().await? {
            match event.body {
                Some(Body::AttemptStarted(_)) if event.attempt > 1 => {
                    (self.output, self.has_gap) = (Output::default(), false);
                    return Ok(step("restart", json!({"attempt": event.attempt})));
                }
                Some(Body::Token(token)) => {
                    self.output.text.push_str(&token.text);
                    return Ok(step("token", json!({"text": token.text})));
                }
                Some(Body::Stage(stage)) => {
                    let pb::StageEvent { name, progress, detail } = stage;
                    let stage = json!({"name": name, "progress": progress, "detail": detail});
                    return Ok(step("stage", stage));
                }
                Some(Body::Artifact(file)) => {
                    let event = json!({"artifact": artifact(&file)});
                    self.output.artifacts.push(file);
                    return Ok(step("artifact", event));
                }
                Some(Body::Log(_)) => {
                    if let Some(line) = line(&event) {
                        return Ok(step("log", line));
                    }
                }
                Some(Body::Gap(gap)) => {
                    self.has_gap = true;
                    return Ok(step("gap", json!({"message": gap.reason})));
                }
                Some(Body::Ended(ended)) => {
                    // Read to the very end, so that this does not pass for a client that left.
                    let _end = self.events.trailers().await;
                    if ended.state() != TaskState::Succeeded {
                        let error = ended.error.clone().unwrap_or_default();
                        return Err(Refusal::ended(ended.state(), &error));
                    }
                    let mut output = std::mem::take(&mut self.output);
                    output.result = ended.result;
                    if self.has_gap && output.result.as_ref().is_none_or(|it| it.fields.is_empty())
                    {
                        return Err(Refusal::broken());
                    }
                    return Ok(Step::Done(output.into_json()));
                }
                _ => {}
            }
        }
        Err(Refusal::broken())
    }
}

/// An event of a kind, with what belongs to it.
fn step(kind: &str, fields: Value) -> Step {
    let mut event = Map::from_iter([("type".to_owned(), Value::from(kind))]);
    if let Value::Object(fields) = fields {
        event.extend(fields);
    }
    Step::Event(Value::Object(event))
}
