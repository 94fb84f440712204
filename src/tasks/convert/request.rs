//! Requests from the wire, checked: every bad field is named.

use std::{collections::BTreeMap, time::Duration};

use crate::{
    clock::Micros,
    error::{Error, Result, Violation},
    events::store as events,
    id::TaskId,
    json, pb,
    tasks::{
        convert,
        model::{RetryPolicy, Spec},
        reads,
    },
};

/// Longest input and params, as JSON text.
const MAX_JSON: usize = 1 << 20;
/// Most labels.
const MAX_LABELS: usize = 64;
/// Longest execution timeout.
const MAX_EXECUTION: Duration = Duration::from_hours(168);
/// Execution timeout when none is given.
const DEFAULT_EXECUTION: Duration = Duration::from_hours(1);
/// Longest wait of any kind.
const MAX_WAIT: Duration = Duration::from_hours(8784);

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

/// Checks a submit at `now`; `seed` and `retry` are used where the client gave none. Names every
/// bad field.
pub fn submit(
    request_id: &str,
    spec: Option<pb::TaskSpec>,
    now: Micros,
    seed: u64,
    retry: &RetryPolicy,
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
    let retry = check.retry(wire.retry.as_ref(), retry);
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

/// A `request_id` on its own.
pub fn request_id(field: &str, text: &str) -> Result<Option<String>> {
    let mut check = Check::default();
    let request_id = check.request_id(field, text);
    check.done()?;
    Ok(request_id)
}

/// A reason that people give.
pub fn reason(field: &str, text: &str) -> Result<()> {
    let mut check = Check::default();
    let fine = text.chars().count() <= 1024 && !text.contains('\0');
    check.that(fine, field, || "has more than 1,024 characters or a NUL".to_owned());
    check.done()
}

/// A stream's batch window.
pub fn batch_window(value: Option<&prost_types::Duration>) -> Result<Option<Duration>> {
    let mut check = Check::default();
    let window = check.duration("batch_window", value, Duration::from_secs(1));
    check.done()?;
    Ok(window)
}

/// The filter of a list.
pub fn filter(request: pb::ListTasksRequest) -> Result<reads::Filter> {
    let (model, version) = model_filter("model", &request.model)?.unzip();
    Ok(reads::Filter {
        states: convert::states("states", &request.states)?,
        model,
        version: version.flatten(),
        labels: request.labels.into_iter().collect(),
        after: time("created_after", request.created_after.as_ref())?,
        before: time("created_before", request.created_before.as_ref())?,
        session: Some(request.session_id).filter(|session| !session.is_empty()),
        exclude_retried: request.exclude_retried,
    })
}

/// The filter of a watch.
pub fn watch_filter(request: pb::WatchTasksRequest) -> Result<events::Filter> {
    let labels: BTreeMap<String, String> = request.labels.into_iter().collect();
    Ok(events::Filter {
        model: model_filter("model", &request.model)?.map(|(model, _)| model),
        session: Some(request.session_id).filter(|session| !session.is_empty()),
        labels: serde_json::json!(labels).to_string(),
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
        self.that(json::numbers_are_finite(value), field, || {
            "holds NaN or an infinity, which JSON does not have".to_owned()
        });
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

    fn retry(&mut self, wire: Option<&pb::RetryPolicy>, default: &RetryPolicy) -> RetryPolicy {
        let mut retry = default.clone();
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
