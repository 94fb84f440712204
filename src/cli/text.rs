//! Values as people read them.

use std::time::Duration;

use prost_types::Timestamp;

use crate::{
    clock::{Clock, Micros},
    config::units,
    pb,
};

/// A wall-clock time as the protos have it.
pub fn timestamp(time: Micros) -> Timestamp {
    Timestamp {
        seconds: time.0.div_euclid(1_000_000),
        nanos: (time.0.rem_euclid(1_000_000) * 1_000) as i32,
    }
}

/// A time of the protos as a wall-clock time.
pub fn micros(time: Timestamp) -> Micros {
    Micros(time.seconds.saturating_mul(1_000_000).saturating_add(i64::from(time.nanos) / 1_000))
}

/// A duration as the protos have it.
pub fn duration_to_proto(duration: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        nanos: duration.subsec_nanos() as i32,
    }
}

/// A duration of the protos.
pub fn duration_from_proto(duration: prost_types::Duration) -> Duration {
    Duration::try_from(duration).unwrap_or_default()
}

/// A duration with as much precision as people want: `850 ms`, `2.1 s`, `3m20s`.
pub fn duration(duration: Duration) -> String {
    if !duration.is_zero() && duration < Duration::from_millis(1) {
        return "<1 ms".into();
    }
    if duration < Duration::from_secs(1) {
        return format!("{} ms", duration.as_millis());
    }
    if duration < Duration::from_mins(1) {
        return format!("{:.1} s", duration.as_secs_f64());
    }
    units::format_duration(Duration::from_secs(duration.as_secs()))
}

/// A proto duration, or nothing.
pub fn optional_duration(value: Option<prost_types::Duration>) -> String {
    value.map(|value| duration(duration_from_proto(value))).unwrap_or_default()
}

/// A number of things: `1 task`, `2 tasks`.
pub fn count(n: impl Into<u64>, thing: &str) -> String {
    let n = n.into();
    format!("{n} {thing}{}", if n == 1 { "" } else { "s" })
}

/// How long ago, in one unit: `12s`, `5m`, `3h`, `9d`.
pub fn age(time: Option<Timestamp>, clock: &Clock) -> String {
    let Some(time) = time else { return "-".into() };
    let seconds = clock.now().since(micros(time)).as_secs();
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3_600 => format!("{}m", seconds / 60),
        3_600..86_400 => format!("{}h", seconds / 3_600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// An absolute time, UTC.
pub fn time(time: Option<Timestamp>) -> String {
    time.map(|time| time.to_string()).unwrap_or_default()
}

/// A state without its prefix.
pub fn state(state: i32) -> &'static str {
    pb::TaskState::try_from(state)
        .map_or("UNKNOWN", |state| state.as_str_name().trim_start_matches("TASK_STATE_"))
}

/// Labels in one line.
pub fn labels<'a>(labels: impl IntoIterator<Item = (&'a String, &'a String)>) -> String {
    let mut pairs: Vec<String> = labels.into_iter().map(|(k, v)| format!("{k}={v}")).collect();
    pairs.sort();
    pairs.join(",")
}

/// Why a task ended: the reason, unless the state says it already, and the message.
pub fn why(ended: i32, error: &pb::TaskError) -> String {
    if error.reason != state(ended) {
        return format!("{}: {}", error.reason, error.message);
    }
    // The message of a cancel begins with the state, too.
    let prefix = format!("{}: ", state(ended).to_lowercase());
    error.message.strip_prefix(&prefix).unwrap_or(&error.message).to_owned()
}

/// One event of a timeline in one line, without its time.
pub fn event(event: &pb::TaskEvent) -> String {
    use pb::task_event::Body;
    let Some(body) = &event.body else { return "(an event newer than this binary)".into() };
    match body {
        Body::Queued(queued) => match &queued.previous_error {
            Some(error) => format!("queued again after {}: {}", error.reason, error.message),
            None => "queued".into(),
        },
        Body::AttemptStarted(started) => format!(
            "attempt {} started on {} ({} {})",
            event.attempt, started.runner_id, started.engine, started.engine_version
        ),
        Body::Stage(stage) => {
            let progress = stage.progress.map(|p| format!(" {:.0} %", p * 100.0));
            let detail = if stage.detail.is_empty() { "" } else { ": " };
            format!("stage {}{}{detail}{}", stage.name, progress.unwrap_or_default(), stage.detail)
        }
        Body::Token(token) => format!("token {} {:?}", token.index, token.text),
        Body::Log(log) => {
            let level = pb::log_event::Level::try_from(log.level).unwrap_or_default();
            format!("log {}: {}", level.as_str_name().trim_start_matches("LEVEL_"), log.message)
        }
        Body::Metrics(metrics) => {
            format!("{} waiting, {} tokens out", metrics.queue_depth, metrics.tokens_out)
        }
        Body::Artifact(artifact) => {
            format!(
                "artifact {} ({}, {} bytes)",
                artifact.name, artifact.mime_type, artifact.size_bytes
            )
        }
        Body::Gap(gap) => {
            format!("gap: {} to {} are lost: {}", gap.first_sequence, event.sequence, gap.reason)
        }
        Body::Ended(ended) => match &ended.error {
            Some(error) => format!("{}: {}", state(ended.state), why(ended.state, error)),
            None => state(ended.state).into(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_and_durations_are_short() {
        let clock = Clock::manual();
        assert_eq!(age(Some(timestamp(clock.now() - Duration::from_secs(7_300))), &clock), "2h");
        assert_eq!(duration(Duration::from_millis(2_140)), "2.1 s");
        assert_eq!(duration(Duration::from_millis(200_400)), "3m20s");
        assert_eq!(duration(Duration::from_micros(140)), "<1 ms");
    }

    #[test]
    fn one_thing_has_no_plural() {
        assert_eq!([count(0u32, "task"), count(1u32, "task")], ["0 tasks", "1 task"]);
    }

    #[test]
    fn a_cancelled_task_says_so_once() {
        let error = |reason: &str, message: &str| pb::TaskError {
            reason: reason.into(),
            message: message.into(),
            ..Default::default()
        };
        let cancelled = pb::TaskState::Cancelled as i32;
        assert_eq!(why(cancelled, &error("CANCELLED", "cancelled: too slow")), "too slow");
        let failed = pb::TaskState::Failed as i32;
        assert_eq!(why(failed, &error("TASK_FAILED", "boom")), "TASK_FAILED: boom");
    }

    #[test]
    fn times_survive_the_way_through_the_protos() {
        for micros_ in [0, -1, 1_767_225_600_123_456] {
            assert_eq!(micros(timestamp(Micros(micros_))), Micros(micros_));
        }
    }
}
