//! Queues between kernel and wire, and what a request may say.

use std::time::Duration;

use crate::{
    clock::Micros,
    error::{Error, Result},
    pb,
    queue::{Pause, QueueStats},
};

/// Longest reason of a pause, in characters.
const MAX_REASON: usize = 1_024;

/// A queue.
pub fn queue(stats: QueueStats) -> pb::Queue {
    let QueueStats {
        model,
        depth,
        delayed,
        running,
        oldest_wait,
        start_rate,
        slots,
        free_slots,
        limit,
        pause,
    } = stats;
    pb::Queue {
        model,
        depth,
        delayed,
        running,
        oldest_wait: oldest_wait.map(duration),
        start_rate,
        slots,
        free_slots,
        limit,
        pause: pause.map(queue_pause),
    }
}

fn queue_pause(pause: Pause) -> pb::QueuePause {
    pb::QueuePause {
        paused_by: pause.by,
        reason: pause.reason,
        pause_time: Some(timestamp(pause.time)),
    }
}

/// The model of a queue: `owner/name`, without a version.
pub fn model(text: &str) -> Result<&str> {
    let part = |part: &str| {
        (1..=64).contains(&part.len())
            && part.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
            && part.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-'))
    };
    if text.split_once('/').is_some_and(|(owner, name)| part(owner) && part(name)) {
        return Ok(text);
    }
    let shown: String = text.chars().take(140).collect();
    let mut wrong = format!("`{shown}` is not `owner/name`");
    if text.contains('@') {
        wrong.push_str("; a queue holds all versions of a model, so name none");
    }
    Err(Error::invalid("model", wrong))
}

/// The reason of a pause.
pub fn reason(text: String) -> Result<String> {
    let length = text.chars().count();
    if length > MAX_REASON {
        let wrong = format!("has {length} characters, more than {MAX_REASON}");
        return Err(Error::invalid("reason", wrong));
    }
    Ok(text)
}

fn timestamp(time: Micros) -> prost_types::Timestamp {
    prost_types::Timestamp {
        seconds: time.0.div_euclid(1_000_000),
        nanos: time.0.rem_euclid(1_000_000) as i32 * 1_000,
    }
}

fn duration(duration: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        nanos: duration.subsec_nanos() as i32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queue_is_named_by_a_model_without_version() {
        assert_eq!(model("meta/llama-3.1").unwrap(), "meta/llama-3.1");
        for wrong in ["", "llama", "a/b/c", "/b", "a/", "A/b", "a/b@1", "a/ b"] {
            let error = model(wrong).unwrap_err();
            assert_eq!(error.violations()[0].field, "model");
        }
        assert!(model("a/b@1").unwrap_err().message().contains("version"));
    }

    #[test]
    fn a_reason_has_a_limit_in_characters() {
        assert!(reason("ä".repeat(1_024)).is_ok());
        assert!(reason("ä".repeat(1_025)).is_err());
    }
}
