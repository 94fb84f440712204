//! A running completion, as its steps.

use serde_json::{Map, Value};
use tonic::Streaming;

use super::refusal::Refusal;
use crate::{
    json,
    pb::{self, task_event::Body},
};

/// What is known of a completion from its beginning on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct About {
    /// The task.
    pub task: String,
    /// When it was accepted, in seconds since 1970.
    pub created: i64,
    /// The engine and its version.
    pub fingerprint: Option<String>,
}

impl About {
    /// Takes in what an event says of it.
    pub fn note(&mut self, event: &pb::TaskEvent) {
        match &event.body {
            Some(Body::Queued(queued)) if self.task.is_empty() => {
                self.task.clone_from(&queued.task_id);
                self.created = event.time.as_ref().map_or(0, |time| time.seconds);
            }
            Some(Body::AttemptStarted(started)) if !started.engine.is_empty() => {
                self.fingerprint = Some(format!("{}-{}", started.engine, started.engine_version));
            }
            _ => {}
        }
    }
}

/// Further fields of a result and their names in a message of that API.
const EXTRAS: [(&str, &str); 3] =
    [("tool_calls", "tool_calls"), ("reasoning", "reasoning_content"), ("refusal", "refusal")];

/// How a completion ended well.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Done {
    /// Why it ended.
    pub finish_reason: String,
    /// Text of the result, for engines that give none before.
    pub text: Option<String>,
    /// What else the engine gives for a message: calls of tools, what the model thought, why it
    /// would not answer.
    pub extras: Map<String, Value>,
    /// Tokens of the input.
    pub prompt_tokens: u64,
    /// Tokens of the output.
    pub completion_tokens: u64,
}

impl Done {
    /// The end that an event tells, or the refusal in its place.
    pub fn read(ended: &pb::EndedEvent) -> Result<Self, Refusal> {
        if ended.state() != pb::TaskState::Succeeded {
            return Err(Refusal::ended(ended));
        }
        let mut result = ended.result.as_ref().map(json::map_from_struct).unwrap_or_default();
        let usage = ended.usage.unwrap_or_default();
        let mut text = |name: &str| match result.remove(name) {
            Some(Value::String(text)) => Some(text),
            _ => None,
        };
        let (reason, text) = (text("finish_reason"), text("text"));
        let extras = EXTRAS.into_iter().filter_map(|(name, theirs)| {
            Some((theirs.to_owned(), result.remove(name).filter(|value| !value.is_null())?))
        });
        Ok(Self {
            finish_reason: reason.unwrap_or_else(|| "stop".to_owned()),
            text: text.filter(|text| !text.is_empty()),
            extras: extras.collect(),
            prompt_tokens: usage.tokens_in,
            completion_tokens: usage.tokens_out,
        })
    }
}

/// A step of a completion.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// More text.
    Text(String),
    /// The end.
    Done(Done),
}

/// Follows a completion whose text is passed on as it comes.
///
/// What a client has got cannot be taken back. So when a task is tried again after its runner
/// was lost, the new attempt must begin with the same text, which is not sent twice; where it
/// does not, the completion has failed.
pub struct Follow {
    events: Streaming<pb::TaskEvent>,
    /// What is known of it so far.
    pub about: About,
    said: Said,
    /// The end that follows the text of a result.
    end: Option<Done>,
}

impl Follow {
    /// Follows these events.
    pub fn new(events: Streaming<pb::TaskEvent>) -> Self {
        Self { events, about: About::default(), said: Said::default(), end: None }
    }

    /// The next step; nothing comes after the end or a refusal.
    pub async fn next(&mut self) -> Result<Step, Refusal> {
        if let Some(done) = self.end.take() {
            return Ok(Step::Done(done));
        }
        while let Some(event) = self.events.message().await? {
            self.about.note(&event);
            match event.body {
                Some(Body::AttemptStarted(_)) => self.said.at = 0,
                Some(Body::Token(token)) => match self.said.more(&token.text) {
                    Some("") => {}
                    Some(text) => return Ok(Step::Text(text.to_owned())),
                    None => return Err(changed()),
                },
                Some(Body::Gap(_)) => return Err(lost()),
                Some(Body::Ended(ended)) => {
                    finish(&mut self.events).await;
                    let done = Done::read(&ended)?;
                    if self.said.at < self.said.text.len() {
                        return Err(changed());
                    }
                    if let Some(text) = done.text.clone().filter(|_| self.said.text.is_empty()) {
                        self.end = Some(done);
                        return Ok(Step::Text(text));
                    }
                    return Ok(Step::Done(done));
                }
                _ => {}
            }
        }
        Err(lost())
    }
}

/// The whole completion: its text, and how it ended.
pub async fn whole(mut events: Streaming<pb::TaskEvent>) -> Result<(About, String, Done), Refusal> {
    let (mut about, mut text, mut has_gap) = (About::default(), String::new(), false);
    while let Some(event) = events.message().await? {
        about.note(&event);
        match event.body {
            // What earlier attempts said is void.
            Some(Body::AttemptStarted(_)) => (text, has_gap) = (String::new(), false),
            Some(Body::Token(token)) => text.push_str(&token.text),
            Some(Body::Gap(_)) => has_gap = true,
            Some(Body::Ended(ended)) => {
                finish(&mut events).await;
                let mut done = Done::read(&ended)?;
                return match done.text.take() {
                    Some(result) if has_gap || text.is_empty() => Ok((about, result, done)),
                    None if has_gap => Err(lost()),
                    _ => Ok((about, text, done)),
                };
            }
            _ => {}
        }
    }
    Err(lost())
}

/// Reads to the very end, so that the caller does not pass for one that left early. The task has
/// ended; how the stream does changes nothing.
async fn finish(events: &mut Streaming<pb::TaskEvent>) {
    let _end = events.trailers().await;
}

fn changed() -> Refusal {
    Refusal::broken(
        "the work was lost after part of the answer, and what was made again differs; ask again",
    )
}

fn lost() -> Refusal {
    Refusal::broken("part of the answer was lost; ask again")
}

/// Text that was passed on, and how far the current attempt has come in it.
#[derive(Debug, Default)]
struct Said {
    text: String,
    at: usize,
}

impl Said {
    /// What of `text` is new; `None` when it differs from what was passed on.
    fn more<'t>(&mut self, text: &'t str) -> Option<&'t str> {
        let known = self.text.get(self.at..)?;
        let new = if let Some(new) = text.strip_prefix(known) {
            self.text.push_str(new);
            new
        } else if known.starts_with(text) {
            ""
        } else {
            return None;
        };
        self.at += text.len();
        Some(new)
    }
}

#[cfg(test)]
mod tests {
    use super::Said;

    #[test]
    fn text_that_is_made_again_is_not_passed_on_again() {
        let mut said = Said::default();
        assert_eq!(said.more("one "), Some("one "));
        assert_eq!(said.more("two"), Some("two"));
        said.at = 0;
        assert_eq!(said.more("on"), Some(""));
        assert_eq!(said.more("e t"), Some(""));
        assert_eq!(said.more("wo three"), Some(" three"));
        assert_eq!(said.more("!"), Some("!"));
        said.at = 0;
        assert_eq!(said.more("One"), None);
    }

    #[test]
    fn a_cut_within_a_character_is_no_match() {
        let mut said = Said::default();
        assert_eq!(said.more("ä"), Some("ä"));
        said.at = 0;
        assert_eq!(said.more("ö"), None);
    }
}
