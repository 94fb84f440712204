//! The error of every call: a kind, a reason that programs can match, a message for
//! people, and what the caller can do about it. Transport-free; `grpc::status` maps it.

use std::{fmt, time::Duration};

use crate::pb::ErrorReason;

/// Result of a call.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Reasons, as `errors.proto` documents them.
pub type Reason = ErrorReason;

/// What class of failure it is; maps one to one to gRPC codes and HTTP statuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A field is malformed. 400.
    InvalidArgument,
    /// No such thing in the namespace. 404.
    NotFound,
    /// It exists already. 409.
    AlreadyExists,
    /// The state does not allow it. 400.
    FailedPrecondition,
    /// It changed meanwhile; read again. 409.
    Aborted,
    /// Outside the kept range. 400.
    OutOfRange,
    /// A limit is reached; retry later. 429.
    ResourceExhausted,
    /// No valid credential. 401.
    Unauthenticated,
    /// The credential may not. 403.
    PermissionDenied,
    /// The caller's time is up. 504.
    DeadlineExceeded,
    /// Not now; retry. 503.
    Unavailable,
    /// Not offered. 501.
    Unimplemented,
    /// A defect or a broken part. 500.
    Internal,
}

/// One malformed field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Path of the field in the request, such as `spec.retry.max_attempts`.
    pub field: String,
    /// What is wrong with its value and what would be right.
    pub description: String,
}

/// The error of a call. Its text reaches the client, so it names things and never internals;
/// the cause is in `source`, for the log only.
#[derive(Debug)]
pub struct Error(Box<Inner>);

#[derive(Debug)]
struct Inner {
    kind: Kind,
    reason: Reason,
    message: String,
    violations: Vec<Violation>,
    metadata: Vec<(&'static str, String)>,
    retry_after: Option<Duration>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error with a message: lower case, no full stop, naming the thing.
    pub fn new(kind: Kind, reason: Reason, message: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            kind,
            reason,
            message: message.into(),
            violations: Vec::new(),
            metadata: Vec::new(),
            retry_after: None,
            source: None,
        }))
    }

    /// A malformed field.
    pub fn invalid(field: impl Into<String>, description: impl Into<String>) -> Self {
        let (field, description) = (field.into(), description.into());
        Self::invalid_all(vec![Violation { field, description }])
    }

    /// Malformed fields; at least one.
    pub fn invalid_all(violations: Vec<Violation>) -> Self {
        let message = violations
            .iter()
            .map(|violation| format!("{}: {}", violation.field, violation.description))
            .collect::<Vec<_>>()
            .join("; ");
        let mut error = Self::new(Kind::InvalidArgument, Reason::InvalidParams, message);
        error.0.violations = violations;
        error
    }

    /// No such thing in the caller's namespace.
    pub fn not_found(resource: &'static str, id: impl fmt::Display) -> Self {
        Self::new(Kind::NotFound, Reason::NotFound, format!("{resource} `{id}` does not exist"))
            .with("resource", resource)
            .with("id", id)
    }

    /// The thing's state does not allow the call.
    pub fn state_conflict(
        resource: &'static str,
        id: impl fmt::Display,
        state: impl fmt::Display,
        message: impl Into<String>,
    ) -> Self {
        Self::new(Kind::FailedPrecondition, Reason::StateConflict, message)
            .with("resource", resource)
            .with("id", id)
            .with("state", state)
    }

    /// A defect or a broken part; `source` goes to the log.
    pub fn internal(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::new(Kind::Internal, Reason::Internal, "internal error").caused_by(source)
    }

    /// Stable storage did not take or give the data; nothing was acknowledged.
    pub fn storage(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::new(
            Kind::Unavailable,
            Reason::StorageUnavailable,
            "storage is unavailable; nothing was changed",
        )
        .retry_after(Duration::from_secs(1))
        .caused_by(source)
    }

    /// Adds a fact for programs; keys are documented with the reason.
    #[must_use]
    pub fn with(mut self, key: &'static str, value: impl fmt::Display) -> Self {
        self.0.metadata.push((key, value.to_string()));
        self
    }

    /// Says when a retry makes sense.
    #[must_use]
    pub fn retry_after(mut self, after: Duration) -> Self {
        self.0.retry_after = Some(after);
        self
    }

    /// Adds the cause, for the log.
    #[must_use]
    pub fn caused_by(
        mut self,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// Class of failure.
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// Reason.
    pub fn reason(&self) -> Reason {
        self.0.reason
    }

    /// Message for people.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// Malformed fields.
    pub fn violations(&self) -> &[Violation] {
        &self.0.violations
    }

    /// Facts for programs.
    pub fn metadata(&self) -> &[(&'static str, String)] {
        &self.0.metadata
    }

    /// When a retry makes sense.
    pub fn retry_delay(&self) -> Option<Duration> {
        self.0.retry_after
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_ref().map(|source| &**source as _)
    }
}

/// The reason of that name; an internal error for one of a later version.
pub fn reason_of(name: &str) -> Reason {
    Reason::from_str_name(&format!("ERROR_REASON_{name}")).unwrap_or(Reason::Internal)
}

/// Name of a reason as it travels, without the enum's prefix.
pub fn reason_name(reason: Reason) -> &'static str {
    reason.as_str_name().trim_start_matches("ERROR_REASON_")
}
