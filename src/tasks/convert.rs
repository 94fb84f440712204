//! Tasks to the wire and back; the place where requests are checked.

use std::{collections::BTreeMap, time::Duration};

use bytes::Bytes;

use super::{
    model::{Failure, RetryPolicy, Spec, State, Task, Usage},
    state::Entry,
};
use crate::{
    clock::Micros,
    error::{Error, Result, Violation},
    events::frame::{self, timestamp},
    id::TaskId,
    json,
    pb::{self, task_event::Body},
};

/// Longest input and params, as JSON text.
const MAX_JSON: usize = 1 << 20;
/// Most labels.
const MAX_LABELS: usize = 64;
/// Longest execution timeout.
const MAX_EXECUTION: Duration = Duration::from_secs(7 * 24 * 3600);
/// Execution timeout when none is given.
const DEFAULT_EXECUTION: Duration = Duration::from_secs(3600);
/// Longest wait of any kind.
const MAX_WAIT: Duration = Duration::from_secs(366 * 24 * 3600);

/// Name of an entry's kind in rows.
pub fn kind(entry: &Entry) -> &'static str {
    match entry {
        Entry::Queued { .. } => "queued",
        Entry::AttemptStarted { .. } => "attempt_started",
        Entry::Gap { .. } => "gap",
        Entry::Ended => "ended",
    }
}

/// Name of the kind of an encoded event.
pub fn kind_of(frame: &Bytes) -> &'static str {
    match pb::Frame(frame.clone()).event().ok().and_then(|event| event.body) {
        Some(Body::Queued(_)) => "queued",
        Some(Body::AttemptStarted(_)) => "attempt_started",
        Some(Body::Stage(_)) => "stage",
        Some(Body::Token(_)) => "token",
        Some(Body::Log(_)) => "log",
        Some(Body::Metrics(_)) => "metrics",
        Some(Body::Artifact(_)) => "artifact",
        Some(Body::Gap(_)) => "gap",
        Some(Body::Ended(_)) => "ended",
        None => "unknown",
    }
}

/// Encodes an entry that `task`, as it is after the change, appends.
pub fn encode(sequence: u64, time: Micros, task: &Task, entry: &Entry) -> Bytes {
    let body = match entry {
        Entry::Queued { not_before, previous } => Body::Queued(pb::QueuedEvent {
            task_id: task.id.to_string(),
            not_before: not_before.map(timestamp),
            previous_error: previous.as_ref().map(failure),
            summary: previous.as_ref().map_or_else(
                || "waiting for a runner".to_owned(),
                |previous| format!("attempt {} ended: {}", task.attempt, previous.message),
            ),
        }),
        Entry::AttemptStarted { runner, node, engine, engine_version } => {
            Body::AttemptStarted(pb::AttemptStartedEvent {
                runner_id: runner.to_string(),
                node_id: node.clone(),
                engine: engine.clone(),
                engine_version: engine_version.clone(),
            })
        }
        Entry::Gap { first } => Body::Gap(pb::GapEvent {
            first_sequence: *first,
            reason: "lost with the server and the runner that held them".to_owned(),
        }),
        Entry::Ended => Body::Ended(pb::EndedEvent {
            state: state(task.state).into(),
            result: task.result.as_deref().and_then(json::struct_from_text),
            error: task.error.as_ref().map(failure),
            usage: task.usage.as_ref().map(usage),
            summary: summary(task),
        }),
    };
    frame::encode(sequence, time, task.attempt, body)
}

fn summary(task: &Task) -> String {
    let took = task.end_time.unwrap_or_default().since(task.create_time).as_secs_f64();
    match &task.error {
        Some(error) => format!("{} after {took:.1} s: {}", task.state, error.message),
        None => format!("{} after {took:.1} s", task.state),
    }
}

/// A state on the wire.
pub fn state(state: State) -> pb::TaskState {
    match state {
        State::Queued => pb::TaskState::Queued,
        State::Running => pb::TaskState::Running,
        State::Succeeded => pb::TaskState::Succeeded,
        State::Failed => pb::TaskState::Failed,
        State::Cancelled => pb::TaskState::Cancelled,
        State::Expired => pb::TaskState::Expired,
        State::DeadLettered => pb::TaskState::DeadLettered,
    }
}

/// States of a filter.
pub fn states(field: &str, values: &[i32]) -> Result<Vec<State>> {
    values
        .iter()
        .map(|value| match pb::TaskState::try_from(*value) {
            Ok(pb::TaskState::Queued) => Ok(State::Queued),
            Ok(pb::TaskState::Running) => Ok(State::Running),
            Ok(pb::TaskState::Succeeded) => Ok(State::Succeeded),
            Ok(pb::TaskState::Failed) => Ok(State::Failed),
            Ok(pb::TaskState::Cancelled) => Ok(State::Cancelled),
            Ok(pb::TaskState::Expired) => Ok(State::Expired),
            Ok(pb::TaskState::DeadLettered) => Ok(State::DeadLettered),
            Ok(pb::TaskState::Unspecified) | Err(_) => {
                Err(Error::invalid(field, format!("{value} is no task state")))
            }
        })
        .collect()
}

/// An error on the wire.
pub fn failure(failure: &Failure) -> pb::TaskError {
    pb::TaskError {
        reason: failure.reason.clone(),
        message: failure.message.clone(),
        retryable: failure.retryable,
        metadata: failure.metadata.clone().into_iter().collect(),
    }
}

/// Usage on the wire.
pub fn usage(usage: &Usage) -> pb::Usage {
    pb::Usage {
        tokens_in: usage.tokens_in,
        tokens_out: usage.tokens_out,
        execution_time: Some(duration(usage.execution)),
        time_to_first_token: usage.first_token.map(duration),
    }
}

/// A duration on the wire.
pub fn duration(duration: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: duration.as_secs() as i64,
        nanos: duration.subsec_nanos() as i32,
    }
}

/// What a view of a task leaves out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum View {
    /// Nothing.
    Full,
    /// The result, as in lists.
    Basic,
}

/// A task on the wire.
pub fn task(task: &Task, view: View, artifacts: Vec<pb::ArtifactEvent>) -> pb::Task {
    let result = match view {
        View::Full => task.result.as_deref().and_then(json::struct_from_text),
        View::Basic => None,
    };
    pb::Task {
        task_id: task.id.to_string(),
        spec: Some(spec(task)),
        state: state(task.state).into(),
        attempt: task.attempt,
        failed_attempts: task.failed,
        lost_attempts: task.lost,
        handed_back_attempts: task.handed_back,
        create_time: Some(timestamp(task.create_time)),
        start_time: task.start_time.map(timestamp),
        end_time: task.end_time.map(timestamp),
        not_before: task.not_before.map(timestamp),
        runner_id: task.runner.as_ref().map(ToString::to_string).unwrap_or_default(),
        result,
        error: task.error.as_ref().map(failure),
        usage: task.usage.as_ref().filter(|_| task.state.is_terminal()).map(usage),
        last_sequence: task.last_sequence,
        request_id: task.request_id.clone().unwrap_or_default(),
        retry_of: task.retry_of.map(|id| id.to_string()).unwrap_or_default(),
        artifacts,
        retried_by: task.retried_by.map(|id| id.to_string()).unwrap_or_default(),
    }
}

fn spec(task: &Task) -> pb::TaskSpec {
    let spec = &task.spec;
    pb::TaskSpec {
        model: match &spec.version {
            Some(version) => format!("{}@{version}", spec.model),
            None => spec.model.clone(),
        },
        input: json::struct_from_text(&spec.input),
        params: (spec.params != "{}").then(|| json::struct_from_text(&spec.params)).flatten(),
        priority: spec.priority,
        labels: spec.labels.clone(),
        required_labels: spec.required_labels.clone(),
        deadline: spec.deadline.map(timestamp),
        start_timeout: spec.start_timeout.map(duration),
        execution_timeout: Some(duration(spec.execution_timeout)),
        retry: Some(pb::RetryPolicy {
            max_attempts: spec.retry.max_attempts,
            initial_backoff: Some(duration(spec.retry.initial_backoff)),
            max_backoff: Some(duration(spec.retry.max_backoff)),
            multiplier: spec.retry.multiplier,
            jitter: Some(spec.retry.jitter),
            retry_on: spec.retry.retry_on.clone(),
        }),
        not_before: None,
        delay: None,
        seed: Some(spec.seed),
        session_id: spec.session.clone().unwrap_or_default(),
        require_on_time: false,
    }
}

/// A checked submit.
#[derive(Clone, Debug)]
pub struct Submit {
    /// What is asked for.
    pub spec: Spec,
    /// Earliest start.
    pub not_before: Option<Micros>,
    /// Idempotency key.
    pub request_id: Option<String>,
    /// Refuse what the estimate says will be late.
    pub require_on_time: bool,
}

/// Checks a submit at `now`; `seed` is used when the client gave none. Names every bad field.
pub fn submit(
    request_id: &str,
    spec: Option<pb::TaskSpec>,
    now: Micros,
    seed: u64,
) -> Result<Submit> {
    let mut check = Check::default();
    let Some(wire) = spec else { return Err(Error::invalid("spec", "is required")) };
    let (model, version) = check.model("spec.model", &wire.model);
    let input = check.json("spec.input", wire.input.as_ref());
    let params = check.json("spec.params", wire.params.as_ref());
    check.that((-100..=100).contains(&wire.priority), "spec.priority", || {
        format!("{} is outside -100..=100", wire.priority)
    });
    let labels = check.labels("spec.labels", wire.labels);
    let required_labels = check.labels("spec.required_labels", wire.required_labels);
    let deadline = check.time("spec.deadline", wire.deadline.as_ref());
    check.that(deadline.is_none_or(|deadline| deadline > now), "spec.deadline", || {
        "has passed already; name a later time".to_owned()
    });
    let start_timeout = check.duration("spec.start_timeout", wire.start_timeout.as_ref(), MAX_WAIT);
    let execution_timeout =
        check.duration("spec.execution_timeout", wire.execution_timeout.as_ref(), MAX_EXECUTION);
    let mut not_before = check.time("spec.not_before", wire.not_before.as_ref());
    if let Some(delay) = check.duration("spec.delay", wire.delay.as_ref(), MAX_WAIT) {
        check.that(not_before.is_none(), "spec.delay", || {
            "excludes not_before; set one of the two".to_owned()
        });
        not_before = Some(now + delay);
    }
    check.that(
        wire.session_id.chars().count() <= 128 && !wire.session_id.contains('\0'),
        "spec.session_id",
        || "has more than 128 characters or a NUL".to_owned(),
    );
    let retry = check.retry(wire.retry.as_ref());
    let request_id = check.request_id("request_id", request_id);
    // Rows hold signed numbers, and JSON numbers are exact up to 2^53.
    let seed = wire.seed.unwrap_or(seed >> 11);
    check.that(i64::try_from(seed).is_ok(), "spec.seed", || format!("{seed} is above 2^63 - 1"));
    check.done()?;
    let spec = Spec {
        model,
        version,
        input,
        params,
        priority: wire.priority,
        labels,
        required_labels,
        deadline,
        start_timeout,
        execution_timeout: execution_timeout.unwrap_or(DEFAULT_EXECUTION),
        retry,
        seed,
        session: Some(wire.session_id).filter(|session| !session.is_empty()),
    };
    let not_before = not_before.filter(|at| *at > now);
    Ok(Submit { spec, not_before, request_id, require_on_time: wire.require_on_time })
}

/// A task id from the wire.
pub fn task_id(field: &str, text: &str) -> Result<TaskId> {
    // No such id can exist: the same answer as for one that does not.
    text.parse().map_err(|_| {
        if text.is_empty() {
            Error::invalid(field, "is required")
        } else {
            Error::not_found("task", text.chars().take(64).collect::<String>())
        }
    })
}

/// A model filter: `owner/name`, perhaps with a version.
pub fn model_filter(field: &str, text: &str) -> Result<Option<(String, Option<String>)>> {
    if text.is_empty() {
        return Ok(None);
    }
    let mut check = Check::default();
    let model = check.model(field, text);
    check.done()?;
    Ok(Some(model))
}

/// A time filter.
pub fn time(field: &str, value: Option<&prost_types::Timestamp>) -> Result<Option<Micros>> {
    let mut check = Check::default();
    let time = check.time(field, value);
    check.done()?;
    Ok(time)
}

/// Collects what is wrong with a request.
#[derive(Default)]
struct Check(Vec<Violation>);

impl Check {
    fn done(self) -> Result<()> {
        if self.0.is_empty() { Ok(()) } else { Err(Error::invalid_all(self.0)) }
    }

    fn that(&mut self, fine: bool, field: &str, description: impl FnOnce() -> String) {
        if !fine {
            self.0.push(Violation { field: field.to_owned(), description: description() });
        }
    }

    fn model(&mut self, field: &str, text: &str) -> (String, Option<String>) {
        let (name, version) = match text.split_once('@') {
            Some((name, version)) => (name, Some(version)),
            None => (text, None),
        };
        let part = |part: &str| {
            (1..=64).contains(&part.len())
                && part.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
                && part.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-'))
        };
        let fine = name.split_once('/').is_some_and(|(owner, name)| part(owner) && part(name))
            && version.is_none_or(part);
        self.that(fine, field, || {
            let shown: String = text.chars().take(140).collect();
            format!(
                "`{shown}` is not `owner/name` or `owner/name@version` \
                 (parts of 1 to 64 characters of a-z 0-9 . _ -)"
            )
        });
        (name.to_owned(), version.map(ToOwned::to_owned))
    }

    fn json(&mut self, field: &str, value: Option<&prost_types::Struct>) -> String {
        let Some(value) = value else { return "{}".to_owned() };
        self.that(json::depth_is_fine(value), field, || {
            format!("nests deeper than {} levels", json::MAX_DEPTH)
        });
        if !json::depth_is_fine(value) {
            return "{}".to_owned();
        }
        let text = json::text_from_struct(value);
        self.that(text.len() <= MAX_JSON, field, || {
            format!(
                "has {} bytes as JSON, more than 1 MiB; put large data in an artifact",
                text.len()
            )
        });
        text
    }

    fn labels(
        &mut self,
        field: &str,
        labels: BTreeMap<String, String>,
    ) -> BTreeMap<String, String> {
        self.that(labels.len() <= MAX_LABELS, field, || {
            format!("has {} entries, more than {MAX_LABELS}", labels.len())
        });
        for (key, value) in &labels {
            let shown: String = key.chars().take(80).collect();
            self.that(
                (1..=63).contains(&key.chars().count()) && !key.chars().any(char::is_control),
                field,
                || format!("key `{shown}` does not have 1 to 63 printable characters"),
            );
            self.that(
                value.chars().count() <= 255 && !value.chars().any(char::is_control),
                field,
                || format!("value of `{shown}` has more than 255 or unprintable characters"),
            );
        }
        labels
    }

    fn time(&mut self, field: &str, value: Option<&prost_types::Timestamp>) -> Option<Micros> {
        let value = value?;
        // Years 1970 to 9999.
        let fine = (0..253_402_300_800).contains(&value.seconds)
            && (0..1_000_000_000).contains(&value.nanos);
        self.that(fine, field, || "is not a time between 1970 and 9999".to_owned());
        fine.then(|| Micros(value.seconds * 1_000_000 + i64::from(value.nanos / 1000)))
    }

    fn duration(
        &mut self,
        field: &str,
        value: Option<&prost_types::Duration>,
        most: Duration,
    ) -> Option<Duration> {
        let value = value?;
        let duration = Duration::try_from(*value).unwrap_or_default();
        let fine = !duration.is_zero() && duration <= most;
        self.that(fine, field, || {
            format!("is not a duration above 0 and up to {} s", most.as_secs())
        });
        fine.then_some(duration)
    }

    fn retry(&mut self, wire: Option<&pb::RetryPolicy>) -> RetryPolicy {
        let mut retry = RetryPolicy::default();
        let Some(wire) = wire else { return retry };
        self.that(wire.max_attempts <= 100, "spec.retry.max_attempts", || {
            format!("{} is more than 100", wire.max_attempts)
        });
        if wire.max_attempts > 0 {
            retry.max_attempts = wire.max_attempts;
        }
        let backoff =
            self.duration("spec.retry.initial_backoff", wire.initial_backoff.as_ref(), MAX_WAIT);
        retry.initial_backoff = backoff.unwrap_or(retry.initial_backoff);
        let backoff = self.duration("spec.retry.max_backoff", wire.max_backoff.as_ref(), MAX_WAIT);
        retry.max_backoff = backoff.unwrap_or(retry.max_backoff).max(retry.initial_backoff);
        if wire.multiplier != 0.0 {
            self.that((1.0..=10.0).contains(&wire.multiplier), "spec.retry.multiplier", || {
                format!("{} is outside 1..=10", wire.multiplier)
            });
            retry.multiplier = wire.multiplier;
        }
        if let Some(jitter) = wire.jitter {
            self.that((0.0..=1.0).contains(&jitter), "spec.retry.jitter", || {
                format!("{jitter} is outside 0..=1")
            });
            retry.jitter = jitter;
        }
        let fine = wire.retry_on.len() <= 64
            && wire.retry_on.iter().all(|reason| (1..=128).contains(&reason.len()));
        self.that(fine, "spec.retry.retry_on", || {
            "has more than 64 reasons, or one that is empty or longer than 128".to_owned()
        });
        retry.retry_on.clone_from(&wire.retry_on);
        retry
    }

    fn request_id(&mut self, field: &str, text: &str) -> Option<String> {
        self.that(text.len() <= 64 && text.bytes().all(|b| b.is_ascii_graphic()), field, || {
            "is not up to 64 visible ASCII characters".to_owned()
        });
        Some(text.to_owned()).filter(|text| !text.is_empty())
    }
}
