//! What a fal client asks for, as a task.

use std::time::Duration;

use http::HeaderMap;
use serde_json::{Map, Value};

use super::{
    path::{Action, Target},
    refusal::Refusal,
};
use crate::{json, pb};

/// The label that holds the path behind the app's name.
const PATH_LABEL: &str = "fal.path";

/// Priority of requests that may wait for others.
const LOW: i32 = -10;

/// The task. Arguments are its input, but for an object `params`, which are its parameters.
pub fn spec(
    target: &Target,
    headers: &HeaderMap,
    mut arguments: Map<String, Value>,
) -> Result<pb::TaskSpec, Refusal> {
    if target.parameter("fal_webhook").is_some() {
        return Err(Refusal::bad(
            "fal_webhook: webhooks are not offered; poll the status_url or stream the status",
        ));
    }
    if header(headers, "x-fal-store-io")?.is_some_and(|value| !is_yes(value)) {
        return Err(Refusal::bad("x-fal-store-io: requests are always kept; delete the task"));
    }
    let params = match arguments.remove("params") {
        Some(Value::Object(params)) => Some(params),
        Some(other) => {
            arguments.insert("params".into(), other);
            None
        }
        None => None,
    };
    let mut spec = pb::TaskSpec {
        model: target.app.clone(),
        input: Some(json::struct_from_map(arguments)),
        params: params.map(json::struct_from_map),
        priority: priority(headers)?,
        start_timeout: start_timeout(headers)?,
        ..Default::default()
    };
    if header(headers, "x-fal-no-retry")?.is_some_and(is_yes) {
        spec.retry = Some(pb::RetryPolicy { max_attempts: 1, ..Default::default() });
    }
    if let Action::Submit(path) | Action::Run(path) | Action::Stream(path) = &target.action
        && !path.is_empty()
    {
        spec.labels.insert(PATH_LABEL.into(), path.clone());
    }
    Ok(spec)
}

fn header<'h>(headers: &'h HeaderMap, name: &str) -> Result<Option<&'h str>, Refusal> {
    let value = headers.get(name).map(|value| value.to_str());
    value.transpose().map_err(|_| Refusal::bad(format!("{name}: is not text")))
}

fn is_yes(value: &str) -> bool {
    ["1", "true", "yes"].iter().any(|yes| value.trim().eq_ignore_ascii_case(yes))
}

fn priority(headers: &HeaderMap) -> Result<i32, Refusal> {
    match header(headers, "x-fal-queue-priority")? {
        None | Some("normal") => Ok(0),
        Some("low") => Ok(LOW),
        Some(other) => {
            let shown: String = other.chars().take(40).collect();
            Err(Refusal::bad(format!("x-fal-queue-priority: `{shown}` is not `normal` or `low`")))
        }
    }
}

/// Despite its name the header limits the time until the start.
fn start_timeout(headers: &HeaderMap) -> Result<Option<prost_types::Duration>, Refusal> {
    let Some(text) = header(headers, "x-fal-request-timeout")? else { return Ok(None) };
    let seconds = text.trim().parse().ok().filter(|seconds: &f64| *seconds > 0.0);
    let timeout = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    let timeout = timeout.and_then(|timeout| prost_types::Duration::try_from(timeout).ok());
    let wrong = || Refusal::bad("x-fal-request-timeout: is not a number of seconds above 0");
    timeout.map(Some).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use http::{HeaderName, HeaderValue};
    use serde_json::json;

    use super::*;

    fn target(action: Action, query: &str) -> Target {
        Target { app: "a/b".into(), action, query: query.into() }
    }

    fn read(
        query: &str,
        headers: &[(&'static str, &'static str)],
    ) -> Result<pb::TaskSpec, Refusal> {
        let headers = headers
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)));
        let arguments = json!({"prompt": "x", "params": {"n": 1}});
        let Value::Object(arguments) = arguments else { panic!("an object wanted") };
        let target = target(Action::Submit("c".into()), query);
        spec(&target, &headers.collect(), arguments)
    }

    #[test]
    fn headers_say_how_urgent_it_is_and_how_often_it_may_fail() {
        let spec = read(
            "",
            &[
                ("x-fal-queue-priority", "low"),
                ("x-fal-request-timeout", "2.5"),
                ("x-fal-no-retry", "1"),
            ],
        )
        .unwrap();
        assert_eq!(spec.priority, LOW);
        let timeout = prost_types::Duration { seconds: 2, nanos: 500_000_000 };
        assert_eq!(spec.start_timeout, Some(timeout));
        assert_eq!(spec.retry.unwrap().max_attempts, 1);
        assert_eq!(json::text_from_struct(&spec.input.unwrap()), r#"{"prompt":"x"}"#);
        assert_eq!(json::text_from_struct(&spec.params.unwrap()), r#"{"n":1}"#);
        assert_eq!(spec.labels["fal.path"], "c");
        let plain =
            read("", &[("x-fal-queue-priority", "normal"), ("x-fal-no-retry", "0")]).unwrap();
        assert_eq!((plain.priority, plain.start_timeout, plain.retry), (0, None, None));
    }

    #[test]
    fn what_is_not_offered_is_refused() {
        for (query, headers) in [
            ("fal_webhook=https://example.org", &[] as &[_]),
            ("", &[("x-fal-queue-priority", "urgent")]),
            ("", &[("x-fal-request-timeout", "0")]),
            ("", &[("x-fal-request-timeout", "soon")]),
            ("", &[("x-fal-request-timeout", "inf")]),
            ("", &[("x-fal-store-io", "0")]),
        ] {
            assert!(read(query, headers).is_err(), "{query} {headers:?}");
        }
    }
}
