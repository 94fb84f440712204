//! Errors as fal clients read them: `{"detail", "error_type"}`, and lists of what is wrong with an
//! input.

use axum::response::{IntoResponse as _, Response};
use http::{HeaderName, HeaderValue, StatusCode, header};
use serde_json::{Value, json};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::{
    error::Error,
    gateway,
    grpc::status::{http_status, retry_delay},
    pb,
};

/// The request's id, in responses.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-fal-request-id");

const ERROR_TYPE: HeaderName = HeaderName::from_static("x-fal-error-type");

/// Says that the client itself had set the time that is up.
const TIMEOUT_TYPE: HeaderName = HeaderName::from_static("x-fal-request-timeout-type");

/// Something that is not answered as wished.
#[derive(Clone, Debug, PartialEq)]
pub struct Refusal {
    status: StatusCode,
    message: String,
    /// What is wrong with the input, where that is the reason.
    detail: Option<Value>,
    kind: Option<&'static str>,
    headers: Vec<(HeaderName, HeaderValue)>,
}

impl Refusal {
    fn new(status: StatusCode, message: impl Into<String>, kind: Option<&'static str>) -> Self {
        Self { status, message: message.into(), detail: None, kind, headers: Vec::new() }
    }

    /// A request that makes no sense here.
    pub fn bad(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message, Some("bad_request"))
    }

    /// Something that does not exist.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, message, None)
    }

    /// A method that a path does not take.
    pub fn other_method(allowed: &http::Method) -> Self {
        let message = format!("only `{allowed}` is served here");
        let mut refusal = Self::new(StatusCode::METHOD_NOT_ALLOWED, message, None);
        if let Ok(value) = HeaderValue::try_from(allowed.as_str()) {
            refusal.headers.push((header::ALLOW, value));
        }
        refusal
    }

    /// An answer that came apart.
    pub fn broken() -> Self {
        let message = "part of the output was lost";
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, message, Some("internal_error"))
    }

    /// An input with these faults, each by the name of its field.
    fn input(faults: &[(&str, &str)]) -> Self {
        let messages: Vec<_> = faults.iter().map(|(_, message)| *message).collect();
        let message = messages.join("; ");
        let mut refusal = Self::new(StatusCode::UNPROCESSABLE_ENTITY, message, None);
        let faults = faults.iter().map(|(field, message)| {
            let mut location = vec!["body"];
            location.extend(field.split('.').filter(|part| !part.is_empty()));
            json!({"loc": location, "msg": message, "type": "value_error"})
        });
        refusal.detail = Some(faults.collect());
        refusal
    }

    /// The end of a task that did not succeed.
    pub fn ended(state: pb::TaskState, error: &pb::TaskError) -> Self {
        let (status, kind) = match (state, error.reason.as_str()) {
            (_, "INPUT_REJECTED") => return Self::input(&[("", &error.message)]),
            (pb::TaskState::Cancelled, _) => (499, "client_cancelled"),
            (_, "START_TIMEOUT" | "DEADLINE_EXCEEDED" | "EXECUTION_TIMEOUT") => {
                (504, "request_timeout")
            }
            (_, "RUNNER_LOST" | "HANDED_BACK") => (503, "runner_disconnected"),
            (_, "QUEUE_FULL_DROP_LRU") => (503, "runner_scheduling_failure"),
            _ => (500, "runner_server_error"),
        };
        let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut refusal = Self::new(status, error.message.clone(), Some(kind));
        if error.reason == "START_TIMEOUT" {
            refusal.headers.push((TIMEOUT_TYPE, HeaderValue::from_static("user")));
        }
        refusal
    }

    /// What is wrong, for people.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The class of error, where there is one.
    pub fn kind(&self) -> Option<&'static str> {
        self.kind
    }

    /// The error as JSON. Clients look for `detail` or for `message`.
    pub fn json(&self) -> Value {
        let detail = self.detail.clone().unwrap_or_else(|| self.message.clone().into());
        let mut body = json!({"detail": detail, "message": self.message});
        if let Some(kind) = self.kind {
            body["error_type"] = kind.into();
        }
        body
    }

    /// The error as a response.
    pub fn into_response(self) -> Response {
        let mut response = (self.status, axum::Json(self.json())).into_response();
        let headers = response.headers_mut();
        if let Some(kind) = self.kind {
            headers.insert(ERROR_TYPE, HeaderValue::from_static(kind));
        }
        headers.extend(self.headers);
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
        let bad = status.get_details_bad_request();
        let faults: Vec<_> = bad
            .iter()
            .flat_map(|bad| &bad.field_violations)
            .map(|fault| (fault.field.as_str(), fault.description.as_str()))
            .collect();
        if faults.iter().any(|(field, _)| *field == "spec.model") {
            return Self::not_found(status.message());
        }
        let arguments: Option<Vec<_>> = faults
            .iter()
            .map(|(field, fault)| Some((field.strip_prefix("spec.")?, *fault)))
            .collect();
        match arguments {
            Some(arguments) if !arguments.is_empty() => return Self::input(&arguments),
            Some(_) => {}
            None => return Self::bad(status.message()),
        }
        let code = http_status(status.code());
        let too_large =
            crate::grpc::status::is_reason(&status, crate::error::Reason::MessageTooLarge);
        let code = if too_large { StatusCode::PAYLOAD_TOO_LARGE } else { code };
        let kind = match status.code() {
            Code::FailedPrecondition | Code::OutOfRange => Some("bad_request"),
            Code::DeadlineExceeded => Some("request_timeout"),
            _ if code.is_server_error() => Some("internal_error"),
            _ => None,
        };
        let mut refusal = Self::new(code, status.message(), kind);
        if code == StatusCode::UNAUTHORIZED {
            refusal.headers.push((header::WWW_AUTHENTICATE, HeaderValue::from_static("Key")));
        }
        if let Some(after) = retry_delay(&status) {
            refusal.headers.extend(gateway::backoff(after));
        }
        refusal
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_have_the_statuses_and_types_that_fal_documents() {
        use pb::TaskState::{Cancelled, DeadLettered, Expired, Failed};
        for (state, reason, status, kind) in [
            (Failed, "INPUT_REJECTED", 422, None),
            (Cancelled, "CANCELLED", 499, Some("client_cancelled")),
            (Expired, "START_TIMEOUT", 504, Some("request_timeout")),
            (DeadLettered, "RUNNER_LOST", 503, Some("runner_disconnected")),
            (Failed, "TASK_FAILED", 500, Some("runner_server_error")),
        ] {
            let error =
                pb::TaskError { reason: reason.into(), message: "m".into(), ..Default::default() };
            let refusal = Refusal::ended(state, &error);
            assert_eq!((refusal.status.as_u16(), refusal.kind), (status, kind));
        }
    }

    #[test]
    fn a_fault_of_the_input_names_its_field() {
        let refusal = Refusal::from(Error::invalid("spec.labels", "has too many"));
        let detail =
            json!([{"loc": ["body", "labels"], "msg": "has too many", "type": "value_error"}]);
        assert_eq!(refusal.json()["detail"], detail);
        assert_eq!(refusal.status, StatusCode::UNPROCESSABLE_ENTITY);
    }
}
