//! Errors of the job routes: `{"detail", "reason"}`.

use axum::response::{IntoResponse, Response};
use http::{HeaderName, HeaderValue, Method, StatusCode, header};
use serde_json::json;
use tonic::Status;

use super::job;
use crate::{
    error::{Error, Reason, reason_name},
    gateway,
    grpc::status::{error_reason, http_status, retry_delay},
    pb,
};

/// Something that is not answered as wished.
#[derive(Clone, Debug, PartialEq)]
pub struct Refusal {
    status: StatusCode,
    detail: String,
    reason: String,
    headers: Vec<(HeaderName, HeaderValue)>,
}

impl Refusal {
    fn new(status: StatusCode, reason: Reason, detail: impl Into<String>) -> Self {
        let reason = reason_name(reason).to_owned();
        Self { status, detail: detail.into(), reason, headers: Vec::new() }
    }

    /// A request that makes no sense.
    pub fn bad(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, Reason::InvalidParams, detail)
    }

    /// Something that does not exist.
    pub fn not_found(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, Reason::NotFound, detail)
    }

    /// Something that this server does not do.
    pub fn not_offered(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_IMPLEMENTED, Reason::Unimplemented, detail)
    }

    /// A method that a path does not take.
    pub fn other_method(method: &Method) -> Self {
        let detail = format!("`{method}` is not served here");
        Self::new(StatusCode::METHOD_NOT_ALLOWED, Reason::Unimplemented, detail)
    }

    /// A job without a result, or without one yet.
    pub fn no_result(task: &pb::Task) -> Self {
        let (id, status) = (&task.task_id, job::status(task.state()));
        let detail = match &task.error {
            Some(error) => format!("job `{id}` is {status}: {}", error.message),
            None => format!("job `{id}` is {status}; it has no result yet"),
        };
        Self::new(StatusCode::CONFLICT, Reason::StateConflict, detail)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let body = json!({"detail": self.detail, "reason": self.reason});
        let mut response = (self.status, axum::Json(body)).into_response();
        response.headers_mut().extend(self.headers);
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
        let code = if reason == reason_name(Reason::MessageTooLarge) {
            StatusCode::PAYLOAD_TOO_LARGE
        } else {
            http_status(status.code())
        };
        let mut headers = Vec::new();
        if code == StatusCode::UNAUTHORIZED {
            headers.push((header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer")));
        }
        if let Some(after) = retry_delay(&status) {
            headers.extend(gateway::backoff(after));
        }
        Self { status: code, detail: status.message().to_owned(), reason, headers }
    }
}
