//! Errors of an upstream server as failures of the attempt.

use std::{
    fmt,
    time::{Duration, SystemTime},
};

use reqwest::{
    Response, StatusCode,
    header::{HeaderMap, RETRY_AFTER},
};
use serde_json::Value;

use super::Failure;
use crate::{clock::Clock, error::Reason};

/// No answer, or an answer that broke off.
pub(super) fn unreachable(error: &reqwest::Error) -> Failure {
    let what = if error.is_timeout() && !error.is_connect() {
        "the engine was silent for too long"
    } else if error.is_connect() {
        "the engine cannot be reached"
    } else {
        "the connection to the engine broke"
    };
    tracing::debug!(error = ?error, "{what}");
    Failure::new(Reason::EngineError, true, what)
}

/// An answer that is not what the API says.
pub(super) fn garbled(error: &dyn fmt::Display) -> Failure {
    Failure::new(Reason::EngineError, true, format!("the engine's answer cannot be read: {error}"))
}

/// An answer with an error status.
pub(super) async fn refused(response: Response, clock: &Clock) -> Failure {
    /// Enough of an error page to find a message in.
    const LIMIT: usize = 64 << 10;
    let status = response.status();
    let retry_after = retry_after(response.headers(), clock);
    let mut response = response;
    let mut body = Vec::new();
    // What can be read of the body is enough: the status has already told the failure.
    while let Ok(Some(bytes)) = response.chunk().await {
        body.extend_from_slice(&bytes);
        if body.len() >= LIMIT {
            break;
        }
    }
    let parsed: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
    let error = parsed.get("error").filter(|error| !error.is_null()).unwrap_or(&parsed);
    let message = message_of(error).unwrap_or_else(|| format!("the engine answered {status}"));
    Failure { retry_after, ..by_status(status, message) }
}

/// An error inside a stream, where no status tells what it is.
pub(super) fn upstream_error(error: &Value) -> Failure {
    let message = message_of(error).unwrap_or_else(|| "the engine reported an error".into());
    match status_of(error) {
        Some(status) => by_status(status, message),
        None => Failure::new(Reason::EngineError, true, message),
    }
}

/// The status that an error's `code` is, as number or text, or that its `type` stands for.
fn status_of(error: &Value) -> Option<StatusCode> {
    let code = error.get("code");
    let code = code.and_then(|code| code.as_u64().or_else(|| code.as_str()?.parse().ok()));
    if let Some(code) = code.and_then(|code| u16::try_from(code).ok()) {
        return StatusCode::from_u16(code).ok();
    }
    // OpenAI's and vLLM's names, then TGI's.
    match error.get("type")?.as_str()? {
        "invalid_request_error" | "BadRequestError" | "validation" => Some(StatusCode::BAD_REQUEST),
        "authentication_error" => Some(StatusCode::UNAUTHORIZED),
        "permission_error" => Some(StatusCode::FORBIDDEN),
        "not_found_error" | "NotFoundError" => Some(StatusCode::NOT_FOUND),
        "rate_limit_error" | "overloaded" => Some(StatusCode::TOO_MANY_REQUESTS),
        _ => None,
    }
}

/// The message of an error body, in the forms that servers use.
fn message_of(error: &Value) -> Option<String> {
    let text = error.as_str().or_else(|| {
        ["message", "detail"].iter().find_map(|name| error.get(*name).and_then(Value::as_str))
    })?;
    let text = text.trim();
    let end = text.floor_char_boundary(1000);
    (!text.is_empty()).then(|| text[..end].to_owned())
}

fn by_status(status: StatusCode, message: String) -> Failure {
    let failure = match status.as_u16() {
        400 | 413 | 422 => Failure::input(message),
        408 | 425 | 429 | 500.. => Failure::new(Reason::EngineError, true, message),
        _ => Failure::new(Reason::EngineError, false, message),
    };
    failure.with("http_status", status.as_u16())
}

/// How long the server asks to be left alone: `retry-after-ms`, or `Retry-After` in seconds or
/// as a date.
fn retry_after(headers: &HeaderMap, clock: &Clock) -> Option<Duration> {
    let text = |name: &str| headers.get(name)?.to_str().ok().map(str::trim);
    let millis = |text: &str| Duration::try_from_secs_f64(text.parse::<f64>().ok()? / 1e3).ok();
    if let Some(wait) = text("retry-after-ms").and_then(millis) {
        return Some(wait);
    }
    let text = text(RETRY_AFTER.as_str())?;
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let then = httpdate::parse_http_date(text).ok()?;
    let then = then.duration_since(SystemTime::UNIX_EPOCH).ok()?;
    let now = Duration::from_micros(clock.now().0.unsigned_abs());
    Some(then.saturating_sub(now))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_is_read_in_all_its_forms() {
        let clock = Clock::manual();
        let date = SystemTime::UNIX_EPOCH
            + Duration::from_micros(clock.now().0.unsigned_abs())
            + Duration::from_mins(2);
        let date = httpdate::fmt_http_date(date);
        let cases: [(&str, &str, Option<Duration>); 8] = [
            ("retry-after", "7", Some(Duration::from_secs(7))),
            ("retry-after", " 7 ", Some(Duration::from_secs(7))),
            ("retry-after", "-7", None),
            ("retry-after", "soon", None),
            ("retry-after", "Thu, 01 Jan 1970 00:00:00 GMT", Some(Duration::ZERO)),
            ("retry-after-ms", "1500", Some(Duration::from_millis(1500))),
            ("retry-after-ms", "-1", None),
            ("retry-after", &date, Some(Duration::from_mins(2))),
        ];
        for (name, value, wait) in cases {
            let headers = [(name.parse().unwrap(), value.parse().unwrap())];
            let read = retry_after(&HeaderMap::from_iter(headers), &clock);
            // A date has whole seconds.
            let close = |wait: Duration| read.is_some_and(|read| read.abs_diff(wait).as_secs() < 1);
            assert!(wait.map_or(read.is_none(), close), "{name}: {value} gives {read:?}");
        }
    }
}
