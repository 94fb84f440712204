//! How a command ends: its exit code, and an error that says what failed and what to do next.

use std::fmt::Write as _;

use serde_json::json;
use tonic::{Code, Status};

use crate::{
    client::ConnectError,
    config::ConfigError,
    error::{self, Kind},
    grpc::status,
    pb,
    tls::PLAIN,
};

/// Result of a command.
pub type Outcome<T = Exit> = Result<T, Failure>;

/// Exit codes, as the help documents them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Done.
    Ok = 0,
    /// Something unexpected.
    Unexpected = 1,
    /// The command line or its input is wrong.
    Usage = 2,
    /// The named thing does not exist.
    NotFound = 3,
    /// The credential is missing or may not.
    Auth = 4,
    /// The state of the thing does not allow it.
    Conflict = 5,
    /// The server cannot be reached or cannot serve now.
    Unreachable = 6,
    /// A quota or a limit refused it.
    Quota = 7,
    /// The time to wait is over; the task goes on.
    TimedOut = 8,
    /// The task failed.
    TaskFailed = 20,
    /// The task was cancelled.
    TaskCancelled = 21,
    /// The task expired.
    TaskExpired = 22,
    /// Interrupted from the terminal.
    Interrupted = 130,
}

impl Exit {
    /// All codes with their meaning, for help and documentation.
    pub const TABLE: [(Self, &'static str); 13] = [
        (Self::Ok, "success"),
        (Self::Unexpected, "unexpected error"),
        (Self::Usage, "wrong usage or input"),
        (Self::NotFound, "not found"),
        (Self::Auth, "no credential, or one that may not do this"),
        (Self::Conflict, "conflict: the state does not allow it"),
        (Self::Unreachable, "server unreachable or not serving"),
        (Self::Quota, "refused by a quota or a limit"),
        (Self::TimedOut, "waiting timed out; the task goes on"),
        (Self::TaskFailed, "the task failed"),
        (Self::TaskCancelled, "the task was cancelled"),
        (Self::TaskExpired, "the task's deadline or start timeout passed"),
        (Self::Interrupted, "interrupted"),
    ];

    /// The number.
    pub fn code(self) -> u8 {
        self as u8
    }

    /// The code for a task that ended so; open states are none.
    pub fn of_state(state: pb::TaskState) -> Option<Self> {
        use pb::TaskState as S;
        match state {
            S::Unspecified | S::Queued | S::Running => None,
            S::Succeeded => Some(Self::Ok),
            S::Failed | S::DeadLettered => Some(Self::TaskFailed),
            S::Cancelled => Some(Self::TaskCancelled),
            S::Expired => Some(Self::TaskExpired),
        }
    }
}

/// Why a command ended without doing its work.
#[derive(Debug)]
pub struct Failure {
    /// The exit code.
    pub exit: Exit,
    /// What failed, with the value seen; empty where nobody is left to tell.
    pub message: String,
    /// The likely cause, one line each.
    pub causes: Vec<String>,
    /// What to do next: a runnable command, or a sentence.
    pub hints: Vec<String>,
    /// Name of the server's reason.
    pub reason: Option<Box<str>>,
    /// Finds the call in the server's log.
    pub correlation_id: Option<Box<str>>,
}

impl Failure {
    /// A failure with a message.
    pub fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self {
            exit,
            message: message.into(),
            causes: Vec::new(),
            hints: Vec::new(),
            reason: None,
            correlation_id: None,
        }
    }

    /// The command line or its input is wrong.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Exit::Usage, message)
    }

    /// Adds a likely cause.
    #[must_use]
    pub fn cause(mut self, cause: impl Into<String>) -> Self {
        self.causes.push(cause.into());
        self
    }

    /// Adds what to do next.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hints.push(hint.into());
        self
    }

    /// Adds what to do where client and server do not agree about TLS, by the words of `cause`.
    fn of_tls(self, cause: &str) -> Self {
        const CA: &str =
            "name the CA that vouches for the server: --ca-cert FILE (or BATON_CA_CERT)";
        let hint = if cause.contains(PLAIN) {
            "speak it: --address https://HOST:PORT (or BATON_ADDRESS)"
        } else if cause.contains("UnknownIssuer") || cause.contains("BadSignature") {
            CA
        } else if cause.contains("not valid for name") || cause.contains("NotValidForName") {
            "reach the server by a name that its certificate has: --address https://NAME:PORT"
        } else if cause.contains("CertificateRequired") {
            "the server asks for a certificate: --client-cert FILE --client-key FILE"
        } else {
            return self;
        };
        self.hint(hint)
    }

    /// An error of a call, with what was being done, such as `submit the task`.
    pub fn of_call(doing: &str, error: &Status) -> Self {
        let known = status::error_reason(error);
        let reason: Option<Box<str>> = known.as_ref().map(|(reason, _)| reason.as_str().into());
        let mut exit = exit_of(error.code());
        let mut message = error.message().to_owned();
        let cause = root_cause(error);
        let wants_tls = known.is_none() && cause.contains(PLAIN);
        // Every answer of a baton server has a reason: this one is the transport's, or a stranger's.
        if wants_tls {
            exit = Exit::Unreachable;
            message = "the server speaks TLS, and was spoken to without".into();
        } else if known.is_none()
            && matches!(
                error.code(),
                Code::Unavailable | Code::Unknown | Code::Cancelled | Code::Internal
            )
        {
            exit = Exit::Unreachable;
            message = format!("lost the connection to the server ({message})");
        }
        let mut failure = Self::new(exit, format!("cannot {doing}: {message}"));
        if known.is_none() {
            failure = failure.of_tls(&cause);
        }
        if wants_tls {
            return failure;
        }
        failure.reason.clone_from(&reason);
        failure.correlation_id = error
            .metadata()
            .get("x-correlation-id")
            .and_then(|id| id.to_str().ok())
            .map(Into::into);
        if let Some(after) = status::retry_delay(error) {
            failure.causes.push(format!(
                "the server asks to try again after {}",
                crate::config::units::format_duration(after)
            ));
        }
        match (exit, reason.as_deref()) {
            (Exit::Auth, Some("PERMISSION_DENIED")) => {
                failure.hint("make a key with the scope that it names: baton key create --name me --scope <scope>")
            }
            (Exit::Auth, _) => failure
                .hint("name a file that holds a valid key: --api-key-file <path>, or set BATON_API_KEY_FILE or BATON_API_KEY"),
            (_, Some("REQUEST_ID_REUSED")) => {
                failure.hint("leave --request-id out, or use a new one for a new request")
            }
            (_, Some("QUEUE_FULL" | "ADMISSION_REJECT" | "OVERLOADED")) => {
                failure.hint("see what waits: baton queue list")
            }
            (_, Some("DEADLINE_UNMET")) => {
                failure.hint("allow more time with --deadline, or raise --priority")
            }
            (_, Some("HISTORY_DROPPED")) => failure.hint("start later with --from"),
            (Exit::Unreachable, _) => failure.hint("see how the server is: baton doctor"),
            (_, Some("UNIMPLEMENTED")) => {
                failure.hint("compare the versions of server and command: baton version")
            }
            (Exit::Unexpected, _) => {
                failure.hint("look for the correlation id in the server's log")
            }
            _ => failure,
        }
    }

    /// The failure as people read it; `paint` colours the leading words.
    pub fn text(&self, paint: impl Fn(&str) -> String) -> String {
        let mut text = format!("{} {}\n", paint("error:"), self.message);
        for cause in &self.causes {
            let _ = writeln!(text, "  {cause}");
        }
        if let Some(reason) = &self.reason {
            let _ = writeln!(text, "  reason: {reason} (docs/errors.md#{})", reason.to_lowercase());
        }
        if let Some(id) = &self.correlation_id {
            let _ = writeln!(text, "  correlation id: {id}");
        }
        if !self.hints.is_empty() {
            text.push('\n');
        }
        for hint in &self.hints {
            let _ = writeln!(text, "{} {hint}", paint("hint:"));
        }
        text
    }

    /// The failure for programs.
    pub fn json(&self) -> serde_json::Value {
        json!({ "error": {
            "exit_code": self.exit.code(),
            "message": self.message,
            "causes": self.causes,
            "hints": self.hints,
            "reason": self.reason,
            "correlation_id": self.correlation_id,
        }})
    }
}

fn exit_of(code: Code) -> Exit {
    match code {
        Code::Ok => Exit::Ok,
        Code::InvalidArgument | Code::OutOfRange => Exit::Usage,
        Code::NotFound => Exit::NotFound,
        Code::Unauthenticated | Code::PermissionDenied => Exit::Auth,
        Code::AlreadyExists | Code::FailedPrecondition | Code::Aborted => Exit::Conflict,
        Code::Unavailable | Code::DeadlineExceeded => Exit::Unreachable,
        Code::ResourceExhausted => Exit::Quota,
        Code::Cancelled | Code::Unknown | Code::Internal | Code::DataLoss | Code::Unimplemented => {
            Exit::Unexpected
        }
    }
}

impl From<ConnectError> for Failure {
    fn from(error: ConnectError) -> Self {
        let message = error.to_string();
        match error {
            ConnectError::Address(_) | ConnectError::Key | ConnectError::Tls(_) => {
                Self::usage(message)
            }
            ConnectError::Unreachable { address, source } => {
                let failure = Self::new(Exit::Unreachable, message).cause(root_cause(&source));
                // What rustls makes of an answer that is not TLS.
                let plain = address
                    .strip_prefix("https://")
                    .filter(|_| failure.causes[0].contains("corrupt message"));
                if let Some(rest) = plain {
                    return failure
                        .cause("whoever listens there does not speak TLS")
                        .hint(format!("go without: --address http://{rest}"));
                }
                let cause = failure.causes[0].clone();
                let failure = failure.of_tls(&cause);
                if !failure.hints.is_empty() {
                    return failure;
                }
                failure
                    .hint("start a server on this machine: baton dev")
                    .hint("or name another one: --address http://HOST:PORT (or BATON_ADDRESS)")
            }
        }
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        Self::usage(error.to_string())
            .hint("see every value and where it came from: baton server print-config --origin")
    }
}

impl From<error::Error> for Failure {
    fn from(error: error::Error) -> Self {
        let exit = match error.kind() {
            Kind::InvalidArgument | Kind::OutOfRange => Exit::Usage,
            Kind::NotFound => Exit::NotFound,
            Kind::Unauthenticated | Kind::PermissionDenied => Exit::Auth,
            Kind::AlreadyExists | Kind::FailedPrecondition | Kind::Aborted => Exit::Conflict,
            Kind::Unavailable | Kind::DeadlineExceeded => Exit::Unreachable,
            Kind::ResourceExhausted => Exit::Quota,
            Kind::Unimplemented | Kind::Internal => Exit::Unexpected,
        };
        let mut failure = Self::new(exit, error.to_string());
        if let Some(source) = std::error::Error::source(&error) {
            failure.causes.push(root_cause(source));
        }
        failure
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        match error.downcast::<ConfigError>() {
            Ok(error) => error.into(),
            Err(error) => Self::new(Exit::Unexpected, format!("{error:#}")),
        }
    }
}

/// The innermost cause, which says most.
pub fn root_cause(error: &(dyn std::error::Error + 'static)) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Error, Reason};

    #[test]
    fn the_exit_code_follows_the_kind_of_error() {
        let refused = |kind, reason| {
            let status = Status::from(Error::new(kind, reason, "no"));
            Failure::of_call("do it", &status).exit
        };
        assert_eq!(refused(Kind::NotFound, Reason::NotFound), Exit::NotFound);
        assert_eq!(refused(Kind::Unauthenticated, Reason::Unauthenticated), Exit::Auth);
        assert_eq!(refused(Kind::ResourceExhausted, Reason::QueueFull), Exit::Quota);
        assert_eq!(refused(Kind::FailedPrecondition, Reason::StateConflict), Exit::Conflict);
    }

    #[test]
    fn an_answer_that_is_no_servers_counts_as_none() {
        let failure = Failure::of_call("list tasks", &Status::cancelled("operation was canceled"));
        assert_eq!(failure.exit, Exit::Unreachable);
        assert!(failure.hints.iter().any(|hint| hint.contains("baton doctor")));
        let said = Status::from(Error::new(Kind::Internal, Reason::Internal, "no"));
        assert_eq!(Failure::of_call("list tasks", &said).exit, Exit::Unexpected);
    }

    #[test]
    fn an_error_names_what_failed_the_reason_and_the_next_step() {
        let status = Status::from(Error::new(Kind::ResourceExhausted, Reason::QueueFull, "full"));
        let text = Failure::of_call("submit the task", &status).text(str::to_owned);
        assert!(text.starts_with("error: cannot submit the task: full\n"), "{text}");
        assert!(text.contains("QUEUE_FULL"), "{text}");
        assert!(text.contains("\nhint: see what waits: baton queue list\n"), "{text}");
    }
}
