//! The only table from [`Error`] to a gRPC status, and the way back for clients.

use std::{collections::HashMap, error::Error as _, time::Duration};

use http::StatusCode;
use prost::Message as _;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::{
    error::{Error, Kind, Reason, reason_name},
    pb,
};

/// Domain of every `google.rpc.ErrorInfo` of this server.
pub const DOMAIN: &str = "baton";

/// The gRPC code of a kind.
pub fn code(kind: Kind) -> Code {
    match kind {
        Kind::InvalidArgument => Code::InvalidArgument,
        Kind::NotFound => Code::NotFound,
        Kind::AlreadyExists => Code::AlreadyExists,
        Kind::FailedPrecondition => Code::FailedPrecondition,
        Kind::Aborted => Code::Aborted,
        Kind::OutOfRange => Code::OutOfRange,
        Kind::ResourceExhausted => Code::ResourceExhausted,
        Kind::Unauthenticated => Code::Unauthenticated,
        Kind::PermissionDenied => Code::PermissionDenied,
        Kind::DeadlineExceeded => Code::DeadlineExceeded,
        Kind::Unavailable => Code::Unavailable,
        Kind::Unimplemented => Code::Unimplemented,
        Kind::Internal => Code::Internal,
    }
}

/// The HTTP status of a code.
pub fn http_status(code: Code) -> StatusCode {
    match code {
        Code::Ok => StatusCode::OK,
        Code::InvalidArgument | Code::FailedPrecondition | Code::OutOfRange => {
            StatusCode::BAD_REQUEST
        }
        Code::Unauthenticated => StatusCode::UNAUTHORIZED,
        Code::PermissionDenied => StatusCode::FORBIDDEN,
        Code::NotFound => StatusCode::NOT_FOUND,
        Code::AlreadyExists | Code::Aborted => StatusCode::CONFLICT,
        Code::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
        // The client has closed the request, and hardly sees this.
        Code::Cancelled => StatusCode::from_u16(499).unwrap_or(StatusCode::BAD_REQUEST),
        Code::Unimplemented => StatusCode::NOT_IMPLEMENTED,
        Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        Code::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
        Code::Unknown | Code::Internal | Code::DataLoss => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// The status without a log line; [`From`] logs causes that someone must look at.
pub fn to_status(error: &Error) -> Status {
    let metadata: HashMap<String, String> =
        error.metadata().iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect();
    let mut details = ErrorDetails::new();
    details.set_error_info(reason_name(error.reason()), DOMAIN, metadata);
    for violation in error.violations() {
        details.add_bad_request_violation(&violation.field, &violation.description);
    }
    if let Some(delay) = error.retry_delay() {
        details.set_retry_info(Some(delay));
    }
    Status::with_error_details(code(error.kind()), error.message(), details)
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let reason = reason_name(error.reason());
        match (error.kind(), error.source()) {
            (Kind::Internal, source) => {
                let cause = source.map(chain).unwrap_or_default();
                tracing::error!(reason, cause, "call failed: {error}");
            }
            (_, Some(source)) => tracing::warn!(reason, cause = chain(source), "{error}"),
            (_, None) => tracing::debug!(reason, "call refused: {error}"),
        }
        to_status(&error)
    }
}

/// A cause and its causes in one line, for the log.
fn chain(source: &(dyn std::error::Error + 'static)) -> String {
    let mut line = source.to_string();
    let mut next = source.source();
    while let Some(cause) = next {
        line.push_str(": ");
        line.push_str(&cause.to_string());
        next = cause.source();
    }
    line
}

/// The error as a message, for a batch's item or a task's end.
pub fn to_rpc_status(error: &Error) -> pb::google::rpc::Status {
    let status = to_status(error);
    // The details were encoded by this process, so they decode.
    pb::google::rpc::Status::decode(status.details()).unwrap_or_else(|_| pb::google::rpc::Status {
        code: status.code() as i32,
        message: status.message().to_owned(),
        details: Vec::new(),
    })
}

/// Reason and metadata of an error that a server of this kind sent.
pub fn error_reason(status: &Status) -> Option<(String, HashMap<String, String>)> {
    let info = status.get_details_error_info()?;
    (info.domain == DOMAIN).then_some((info.reason, info.metadata))
}

/// Whether `status` carries `reason`.
pub fn is_reason(status: &Status, reason: Reason) -> bool {
    error_reason(status).is_some_and(|(name, _)| name == reason_name(reason))
}

/// When the server says that a retry makes sense.
pub fn retry_delay(status: &Status) -> Option<Duration> {
    status.get_details_retry_info()?.retry_delay
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn details_travel_and_come_back() {
        let error = Error::new(Kind::ResourceExhausted, Reason::QueueFull, "queue is full")
            .with("limit", 10)
            .retry_after(Duration::from_secs(2));
        let status = Status::from(error);
        assert_eq!(status.code(), Code::ResourceExhausted);
        let (reason, metadata) = error_reason(&status).unwrap();
        assert_eq!((reason.as_str(), metadata["limit"].as_str()), ("QUEUE_FULL", "10"));
        assert_eq!(retry_delay(&status), Some(Duration::from_secs(2)));
        assert!(is_reason(&status, Reason::QueueFull));
    }

    #[test]
    fn violations_name_their_fields() {
        let message = to_rpc_status(&Error::invalid("spec.model", "must not be empty"));
        assert_eq!(message.code, Code::InvalidArgument as i32);
        assert_eq!(message.details.len(), 2);
    }

    #[test]
    fn causes_stay_in_the_log() {
        let status = Status::from(Error::internal("SELECT secret FROM place"));
        assert_eq!(status.message(), "internal error");
        assert!(!String::from_utf8_lossy(status.details()).contains("SELECT"));
    }
}
