//! A task's stream on the terminal: tokens to stdout and nothing else, the rest to stderr.

use std::fmt::Write as _;
use std::time::Duration;

use indicatif::ProgressBar;
use serde_json::json;

use super::{
    exit::{Exit, Failure, Outcome},
    json,
    output::{Format, Output},
    text,
};
use crate::pb::{self, task_event::Body};

/// Prints the events of one task.
pub struct Printer<'a> {
    output: &'a Output,
    progress: Option<ProgressBar>,
    lead: Option<String>,
    printed: Printed,
    task_id: String,
    attempt: u32,
    n_tokens: u64,
    ended: Option<pb::EndedEvent>,
    started: bool,
}

/// What of the output stands on stdout already. A second attempt that makes the same tokens,
/// as one with the same seed does, is then not printed twice.
#[derive(Debug, Default)]
struct Printed {
    text: String,
    /// Bytes of the running attempt that were in `text` when it made them.
    matched: usize,
    /// Whether `text` holds the output from its first token.
    whole: bool,
}

/// What a token adds to stdout.
#[derive(Debug, PartialEq, Eq)]
enum Add<'t> {
    /// This much of it.
    Text(&'t str),
    /// The attempt differs from what was printed: all of it again, on a new line.
    Anew(String),
}

impl Printed {
    fn attempt(&mut self) {
        self.matched = 0;
    }

    fn token<'t>(&mut self, token: &'t str, index: u64) -> Add<'t> {
        if self.text.is_empty() {
            self.whole = index == 0;
        }
        if !self.whole {
            return Add::Text(token);
        }
        let ahead = &self.text[self.matched..];
        if let Some(fresh) = token.strip_prefix(ahead) {
            self.text.push_str(fresh);
            self.matched = self.text.len();
            return Add::Text(fresh);
        }
        if ahead.starts_with(token) {
            self.matched += token.len();
            return Add::Text("");
        }
        self.text.truncate(self.matched);
        self.text.push_str(token);
        self.matched = self.text.len();
        Add::Anew(self.text.clone())
    }
}

impl<'a> Printer<'a> {
    /// A printer; shows progress where it may.
    pub fn new(output: &'a Output, task_id: &str) -> Self {
        let progress = output.shows_progress().then(|| {
            let bar = ProgressBar::new_spinner();
            bar.enable_steady_tick(Duration::from_millis(120));
            bar.set_message("waiting for a runner");
            bar
        });
        Self {
            output,
            progress,
            lead: None,
            printed: Printed::default(),
            task_id: task_id.to_owned(),
            attempt: 0,
            n_tokens: 0,
            ended: None,
            started: false,
        }
    }

    /// Begins the line of the first token with this, where both stand on one terminal.
    #[must_use]
    pub fn with_lead(mut self, lead: String) -> Self {
        self.lead = Some(lead);
        self
    }

    /// The task; empty until known.
    pub fn task_id(&self) -> &str {
        &self.task_id
    }

    /// Whether an attempt has started.
    pub fn has_started(&self) -> bool {
        self.started
    }

    /// Takes the progress line away, so that something else can be said.
    pub fn clear(&mut self) {
        if let Some(bar) = self.progress.take() {
            bar.finish_and_clear();
        }
    }

    /// Makes room for an error.
    pub fn broken_off(&mut self) {
        self.clear();
        self.fresh_line();
    }

    fn status(&self, text: String) {
        if let Some(bar) = &self.progress {
            bar.set_message(text);
        }
    }

    /// Says something between the tokens.
    pub fn say(&mut self, text: &str) {
        if let Some(bar) = &self.progress {
            bar.suspend(|| self.output.note(text));
        } else {
            self.fresh_line();
            self.output.note(text);
        }
    }

    /// Makes room for words after an interrupt.
    pub fn interrupted(&self) {
        if !self.output.after_interrupt() {
            self.fresh_line();
        }
    }

    /// Notices, and the prompt after the end, must not stick to the tokens.
    pub fn fresh_line(&self) {
        let sticks = !self.printed.text.is_empty() && !self.printed.text.ends_with('\n');
        if sticks && self.output.is_text() {
            self.output.end_line();
        }
    }

    /// Prints an event.
    pub fn event(&mut self, event: &pb::TaskEvent) -> Outcome<()> {
        if self.output.format == Format::Jsonl {
            self.output.value(&json::of("TaskEvent", event)?)?;
        }
        let Some(body) = &event.body else { return Ok(()) };
        match body {
            Body::Queued(queued) => {
                if self.task_id.is_empty() {
                    self.task_id.clone_from(&queued.task_id);
                }
                if let Some(error) = &queued.previous_error {
                    let wait = if queued.not_before.is_some() { " after a pause" } else { "" };
                    self.say(&format!(
                        "{} attempt {} ended: {}: {}; trying again{wait}",
                        self.output.paint("warning:"),
                        self.attempt,
                        error.reason,
                        error.message
                    ));
                }
                self.started = false;
            }
            Body::AttemptStarted(started) => {
                self.attempt = event.attempt;
                self.started = true;
                self.n_tokens = 0;
                self.printed.attempt();
                self.status(format!("running on {}", started.runner_id));
                if self.output.verbose > 0 {
                    self.say(&text::event(event));
                }
            }
            Body::Token(token) => {
                self.n_tokens += 1;
                self.token(token)?;
            }
            Body::Stage(_) => {
                let line = text::event(event);
                self.status(line.clone());
                let visible = self.progress.is_none() && self.output.shows_progress();
                if self.output.verbose > 0 || visible {
                    self.say(&self.output.dim(&line));
                }
            }
            Body::Log(log) => {
                let serious = log.level >= pb::log_event::Level::Warn as i32;
                if serious || self.output.verbose > 0 {
                    self.say(&self.output.dim(&text::event(event)));
                }
            }
            Body::Metrics(metrics) => {
                let place = match metrics.queue_position {
                    0 => String::new(),
                    n => format!(", place {n} of {}", metrics.queue_depth),
                };
                if !self.started {
                    self.status(format!("waiting for a runner{place}"));
                }
            }
            Body::Artifact(_) => self.say(&text::event(event)),
            Body::Gap(_) => {
                let line = format!("{} {}", self.output.paint("warning:"), text::event(event));
                self.say(&line);
            }
            Body::Ended(ended) => {
                self.clear();
                self.ended = Some(ended.clone());
            }
        }
        Ok(())
    }

    fn token(&mut self, token: &pb::TokenEvent) -> Outcome<()> {
        let add = self.printed.token(&token.text, token.index);
        if !self.output.is_text() {
            return Ok(());
        }
        // The progress line would mix with the tokens on a terminal.
        if let Some(bar) = self.progress.take() {
            bar.finish_and_clear();
        }
        if let Some(lead) = self.lead.take() {
            self.output.lead(lead);
        }
        match add {
            Add::Text("") => Ok(()),
            Add::Text(text) => self.output.raw(text),
            Add::Anew(text) => {
                self.output.note(format!(
                    "\n{} attempt {} differs from the one before; its output starts anew",
                    self.output.paint("warning:"),
                    self.attempt
                ));
                self.output.raw(&format!("\n{text}"))
            }
        }
    }

    /// Says how the task ended; the exit code is the outcome's.
    pub fn finish(&mut self) -> Outcome {
        self.clear();
        let Some(ended) = self.ended.take() else {
            return Err(Failure::new(Exit::Unexpected, "the stream ended before the task did"));
        };
        let state = pb::TaskState::try_from(ended.state).unwrap_or_default();
        if self.output.format == Format::Json {
            self.output.value(&json!({
                "task_id": self.task_id,
                "state": state.as_str_name(),
                "text": self.printed.text,
                "ended": json::of("EndedEvent", &ended)?,
            }))?;
        }
        self.fresh_line();
        let exit = Exit::of_state(state).unwrap_or(Exit::Unexpected);
        if exit == Exit::Ok {
            // An engine without tokens still has a result to show.
            if self.output.is_text()
                && self.printed.text.is_empty()
                && let Some(result) = ended.result.as_ref().filter(|r| !r.fields.is_empty())
            {
                self.output.line(crate::json::text_from_struct(result))?;
            }
            self.output.note(self.output.dim(&self.summary(&ended)));
            return Ok(exit);
        }
        Err(ended_failure(&self.task_id, state, ended.error.as_ref()))
    }

    fn summary(&self, ended: &pb::EndedEvent) -> String {
        let usage = ended.usage.unwrap_or_default();
        let mut parts = vec!["succeeded".to_owned()];
        let time = usage.execution_time.map(text::duration_from_proto);
        if usage.tokens_out > 0 {
            parts.push(text::count(usage.tokens_out, "token"));
            let seconds = time.map(|time| time.as_secs_f64()).filter(|s| *s > 0.0);
            // One token makes no rate.
            if let Some(seconds) = seconds.filter(|_| usage.tokens_out > 1) {
                parts.push(format!("{:.1} tokens/s", usage.tokens_out as f64 / seconds));
            }
        }
        if let Some(first) = usage.time_to_first_token {
            let first = text::duration(text::duration_from_proto(first));
            parts.push(format!("first token after {first}"));
        }
        parts.extend(time.map(text::duration));
        format!("{}  (task {})", parts.join(", "), self.task_id)
    }
}

/// The failure of a command whose task did not succeed.
pub fn ended_failure(
    task_id: &str,
    state: pb::TaskState,
    error: Option<&pb::TaskError>,
) -> Failure {
    let exit = Exit::of_state(state).unwrap_or(Exit::Unexpected);
    let name = text::state(state as i32);
    let mut failure = Failure::new(exit, format!("task {task_id} ended as {name}"));
    if let Some(error) = error {
        let _ = write!(failure.message, ": {}", error.message);
        failure.reason = Some(error.reason.as_str().into());
        let mut facts: Vec<String> =
            error.metadata.iter().map(|(key, value)| format!("{key}: {value}")).collect();
        facts.sort();
        failure.causes = facts;
    }
    match exit {
        Exit::TaskCancelled => failure.hint(format!("run it again: baton task retry {task_id}")),
        Exit::TaskExpired => failure
            .hint(format!("see what it waited for: baton task explain {task_id}"))
            .hint(format!("run it again: baton task retry {task_id}")),
        _ if failure.reason.as_deref() == Some("INPUT_REJECTED") => failure
            .hint(format!("see what it was given: baton task get {task_id}"))
            .hint("give fields of the input with -i NAME=TEXT, parameters with -p NAME=VALUE"),
        _ => failure
            .hint(format!("see each attempt: baton task events {task_id}"))
            .hint(format!("run it again: baton task retry {task_id}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn print(printed: &mut Printed, tokens: &[&str]) -> String {
        let mut out = String::new();
        for (index, token) in tokens.iter().enumerate() {
            match printed.token(token, index as u64) {
                Add::Text(text) => out.push_str(text),
                Add::Anew(text) => {
                    out.push('|');
                    out.push_str(&text);
                }
            }
        }
        out
    }

    #[test]
    fn a_retry_with_the_same_tokens_goes_on_where_the_first_attempt_stopped() {
        let mut printed = Printed::default();
        assert_eq!(print(&mut printed, &["to", " be", " or"]), "to be or");
        printed.attempt();
        assert_eq!(print(&mut printed, &["to", " be", " or", " not"]), " not");
        printed.attempt();
        // Cut into other tokens, it is still the same text.
        assert_eq!(print(&mut printed, &["to be", " or n", "ot to"]), " to");
    }

    #[test]
    fn a_retry_that_differs_is_printed_anew_as_a_whole() {
        let mut printed = Printed::default();
        print(&mut printed, &["to", " be"]);
        printed.attempt();
        assert_eq!(print(&mut printed, &["to", " sleep", " and"]), "|to sleep and");
    }

    #[test]
    fn from_the_middle_tokens_are_printed_as_they_come() {
        let mut printed = Printed::default();
        let Add::Text(text) = printed.token("tail", 7) else { panic!("anew") };
        assert_eq!(text, "tail");
    }
}
