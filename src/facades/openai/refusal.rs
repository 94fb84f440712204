//! Errors as the clients of the `OpenAI` API read them: `{"error": {message, type, param, code}}`.

use std::time::Duration;

use axum::response::{IntoResponse as _, Response};
use http::{HeaderValue, Method, StatusCode, Uri, header};
use serde_json::{Value, json};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::{
    error::Error,
    gateway,
    grpc::status::{error_reason, http_status, retry_delay},
    pb,
};

/// Something that is not answered as wished.
#[derive(Clone, Debug, PartialEq)]
pub struct Refusal {
    status: StatusCode,
    message: String,
    kind: &'static str,
    /// The parameter that is wrong.
    pub param: Option<String>,
    code: Option<String>,
    /// Whether the client should try again by itself; `None` where the status says so.
    retry: Option<bool>,
    after: Option<Duration>,
}

/// Type of an error that the request is at fault for.
const INVALID: &str = "invalid_request_error";

impl Refusal {
    fn new(status: StatusCode, message: impl Into<String>) -> Self {
        let kind = match status.as_u16() {
            429 => "rate_limit_error",
            500.. => "server_error",
            _ => INVALID,
        };
        let message = message.into();
        Self { status, message, kind, param: None, code: None, retry: None, after: None }
    }

    /// A parameter that is wrong.
    pub fn parameter(name: &str, problem: impl std::fmt::Display) -> Self {
        let mut refusal = Self::new(StatusCode::BAD_REQUEST, format!("`{name}`: {problem}"));
        refusal.param = Some(name.to_owned());
        refusal
    }

    /// A model that nobody has.
    pub fn no_model(model: &str, why: &str) -> Self {
        let shown: String = model.chars().take(140).collect();
        let message = format!("the model `{shown}` does not exist: {why}");
        let mut refusal = Self::new(StatusCode::NOT_FOUND, message);
        refusal.param = Some("model".into());
        refusal.code = Some("model_not_found".into());
        refusal
    }

    /// A path of that API that is not offered.
    pub fn unknown_path(method: &Method, uri: &Uri) -> Self {
        let path = uri.path().escape_debug();
        let message = format!(
            "`{method} {path}` is not offered; there are chat/completions, completions and models"
        );
        let mut refusal = Self::new(StatusCode::NOT_FOUND, message);
        refusal.code = Some("unknown_url".into());
        refusal
    }

    /// A method that a path does not take.
    pub fn other_method(method: &Method) -> Self {
        let message = format!("`{method}` is not served here");
        Self::new(StatusCode::METHOD_NOT_ALLOWED, message)
    }

    /// An answer that came apart.
    pub fn broken(message: &str) -> Self {
        let mut refusal = Self::new(StatusCode::INTERNAL_SERVER_ERROR, message);
        refusal.code = Some("answer_lost".into());
        refusal
    }

    /// The end of a task that did not succeed.
    pub fn ended(ended: &pb::EndedEvent) -> Self {
        let error = ended.error.clone().unwrap_or_default();
        let status = match (ended.state(), error.reason.as_str()) {
            (_, "INPUT_REJECTED") => StatusCode::BAD_REQUEST,
            (_, "QUEUE_FULL_DROP_LRU") => StatusCode::TOO_MANY_REQUESTS,
            (pb::TaskState::Cancelled, _) => StatusCode::CONFLICT,
            (pb::TaskState::Expired, _) => StatusCode::GATEWAY_TIMEOUT,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        let mut refusal = Self::new(status, error.message);
        refusal.code = Some(error.reason.to_ascii_lowercase());
        // The task has used up the attempts that it had.
        refusal.retry = Some(status == StatusCode::TOO_MANY_REQUESTS);
        refusal
    }

    /// The error as JSON, as in a body and in a stream.
    pub fn json(&self) -> Value {
        let Self { message, kind, param, code, .. } = self;
        json!({"error": {"message": message, "type": kind, "param": param, "code": code}})
    }

    /// The error as a response.
    pub fn into_response(self) -> Response {
        let mut response = (self.status, axum::Json(self.json())).into_response();
        let headers = response.headers_mut();
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if let Some(retry) = self.retry {
            let value = if retry { "true" } else { "false" };
            headers.insert("x-should-retry", HeaderValue::from_static(value));
        }
        if let Some(after) = self.after {
            let [millis, seconds] = gateway::backoff(after);
            // Its clients read milliseconds under a name of their own.
            headers.insert("retry-after-ms", millis.1.clone());
            headers.extend([millis, seconds]);
        }
        response
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Status::from(error).into()
    }
}

impl From<Status> for Refusal {
    fn from(status: Status) -> Self {
        let reason = error_reason(&status).map(|(reason, _)| reason).unwrap_or_default();
        let violation = status
            .get_details_bad_request()
            .and_then(|bad| bad.field_violations.into_iter().next());
        let field = violation.as_ref().map(|violation| violation.field.as_str());
        if field == Some("spec.model") {
            let mut refusal = Self::new(StatusCode::NOT_FOUND, status.message());
            refusal.param = Some("model".into());
            refusal.code = Some("model_not_found".into());
            return refusal;
        }
        let code = match reason.as_str() {
            "MESSAGE_TOO_LARGE" => StatusCode::PAYLOAD_TOO_LARGE,
            _ => http_status(status.code()),
        };
        let mut refusal = Self::new(code, status.message());
        refusal.param = field.map(|field| parameter_of(field).to_owned());
        refusal.after = retry_delay(&status);
        refusal.code = match (status.code(), reason.as_str()) {
            (Code::Unauthenticated, _) => Some("invalid_api_key".into()),
            (Code::PermissionDenied, _) => Some("insufficient_permissions".into()),
            (_, "BUDGET_EXHAUSTED") => Some("insufficient_quota".into()),
            (Code::ResourceExhausted, reason) if reason != "MESSAGE_TOO_LARGE" => {
                Some("rate_limit_exceeded".into())
            }
            (_, "" | "INVALID_PARAMS") => None,
            (_, reason) => Some(reason.to_ascii_lowercase()),
        };
        refusal
    }
}

/// The parameter that became a field of the task.
fn parameter_of(field: &str) -> &str {
    match field {
        "spec.input" => "messages",
        "spec.labels" => "metadata",
        "spec.seed" => "seed",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Kind, Reason};

    #[test]
    fn statuses_and_codes_are_those_that_the_clients_know() {
        let error =
            |kind, reason| Error::new(kind, reason, "m").retry_after(Duration::from_millis(1500));
        for (error, status, kind, code) in [
            (
                error(Kind::Unauthenticated, Reason::Unauthenticated),
                401,
                INVALID,
                "invalid_api_key",
            ),
            (
                error(Kind::ResourceExhausted, Reason::QueueFull),
                429,
                "rate_limit_error",
                "rate_limit_exceeded",
            ),
            (
                error(Kind::ResourceExhausted, Reason::BudgetExhausted),
                429,
                "rate_limit_error",
                "insufficient_quota",
            ),
            (
                error(Kind::ResourceExhausted, Reason::MessageTooLarge),
                413,
                INVALID,
                "message_too_large",
            ),
            (
                error(Kind::Unavailable, Reason::StorageUnavailable),
                503,
                "server_error",
                "storage_unavailable",
            ),
            (Error::invalid("spec.model", "is wrong"), 404, INVALID, "model_not_found"),
        ] {
            let refusal = Refusal::from(error);
            assert_eq!((refusal.status.as_u16(), refusal.kind), (status, kind));
            assert_eq!(refusal.code.as_deref(), Some(code));
            if refusal.after.is_some() {
                let response = refusal.into_response();
                assert_eq!(response.headers()["retry-after"], "2");
                assert_eq!(response.headers()["retry-after-ms"], "1500");
            }
        }
    }
}
