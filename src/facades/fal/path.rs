//! Where a request of a fal client wants to go.
//!
//! These clients know two hosts: `queue.fal.run` for the queue and `fal.run` for direct calls. Here
//! the queue is `/fal` and direct calls are `/fal/run`; `/fal/proxy` takes requests that name the
//! host in a header, as the JavaScript client sends them to a proxy.

use http::{Uri, request::Parts};

use super::refusal::Refusal;

/// The header that tells a proxy where a request is meant to go.
const TARGET: &str = "x-fal-target-url";

/// Which of the two hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Host {
    /// `queue.fal.run`.
    Queue,
    /// `fal.run`.
    Run,
}

/// What a path asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Put a request into the queue, for a path of the app.
    Submit(String),
    /// Tell how a request stands.
    Status(String),
    /// Tell it again and again.
    StatusStream(String),
    /// Give the result of a request.
    Result(String),
    /// Cancel a request.
    Cancel(String),
    /// Run the app and give the result, for a path of the app.
    Run(String),
    /// Run the app and give its output as it comes.
    Stream(String),
}

impl Action {
    /// The one method that it takes.
    pub fn method(&self) -> http::Method {
        match self {
            Self::Submit(_) | Self::Run(_) | Self::Stream(_) => http::Method::POST,
            Self::Status(_) | Self::StatusStream(_) | Self::Result(_) => http::Method::GET,
            Self::Cancel(_) => http::Method::PUT,
        }
    }
}

/// What a request asks for, and of which app.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// `owner/name`: the model.
    pub app: String,
    /// What is wanted.
    pub action: Action,
    /// The query.
    pub query: String,
}

impl Target {
    /// Reads a request.
    pub fn of(parts: &Parts) -> Result<Self, Refusal> {
        let path = parts.uri.path().strip_prefix("/fal/").unwrap_or_default();
        if path == "proxy" {
            return Self::proxied(parts);
        }
        let (host, path) = match path.strip_prefix("run/") {
            Some(path) => (Host::Run, path),
            None => (Host::Queue, path),
        };
        Self::read(host, path, parts.uri.query())
    }

    /// Reads what a proxy is asked for. Nothing is sent there: the address only says which call
    /// is meant.
    fn proxied(parts: &Parts) -> Result<Self, Refusal> {
        let Some(url) = parts.headers.get(TARGET) else {
            return Err(Refusal::bad(format!("the header `{TARGET}` is missing")));
        };
        let uri: Option<Uri> = url.to_str().ok().and_then(|text| text.parse().ok());
        let uri = uri.ok_or_else(|| Refusal::bad(format!("`{TARGET}` is no address")))?;
        let host = match uri.host() {
            Some("queue.fal.run") => Host::Queue,
            Some("fal.run") => Host::Run,
            host => {
                let host = host.unwrap_or_default();
                let message =
                    format!("`{host}` is not answered here; fal.run and queue.fal.run are");
                return Err(Refusal::bad(message));
            }
        };
        Self::read(host, uri.path().trim_start_matches('/'), uri.query())
    }

    fn read(host: Host, path: &str, query: Option<&str>) -> Result<Self, Refusal> {
        let segments: Vec<_> = path.trim_end_matches('/').split('/').collect();
        let [owner, name, rest @ ..] = &segments[..] else {
            return Err(Refusal::not_found(format!("`{path}` is no app; write `owner/name`")));
        };
        if matches!(*owner, "workflows" | "comfy") {
            return Err(Refusal::not_found(format!("`{owner}/…` are not served here")));
        }
        let action = match (host, rest) {
            (Host::Queue, ["requests", id] | ["requests", id, "response"]) => {
                Action::Result((*id).to_owned())
            }
            (Host::Queue, ["requests", id, "status"]) => Action::Status((*id).to_owned()),
            (Host::Queue, ["requests", id, "status", "stream"]) => {
                Action::StatusStream((*id).to_owned())
            }
            (Host::Queue, ["requests", id, "cancel"]) => Action::Cancel((*id).to_owned()),
            (Host::Queue, ["requests", ..]) => {
                return Err(Refusal::not_found(format!("`{path}` is no path of the queue")));
            }
            (Host::Queue, rest) => Action::Submit(rest.join("/")),
            (Host::Run, [rest @ .., "stream"]) => Action::Stream(rest.join("/")),
            (Host::Run, [.., "realtime"]) => {
                return Err(Refusal::not_found("realtime connections are not offered".to_owned()));
            }
            (Host::Run, rest) => Action::Run(rest.join("/")),
        };
        let query = query.unwrap_or_default().to_owned();
        Ok(Self { app: format!("{owner}/{name}"), action, query })
    }

    /// A parameter of the query, decoded as far as its names and values need it: `%` and `+`
    /// stay as they are.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.query.split('&').find_map(|pair| {
            let (found, value) = pair.split_once('=').unwrap_or((pair, ""));
            (found == name).then_some(value)
        })
    }

    /// Whether log lines are wanted.
    pub fn logs(&self) -> bool {
        let value = self.parameter("logs").unwrap_or_default();
        ["1", "true", "yes"].iter().any(|yes| value.eq_ignore_ascii_case(yes))
    }
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    fn target(uri: &str, header: Option<&str>) -> Result<Target, Refusal> {
        let mut request = Request::builder().uri(uri);
        if let Some(url) = header {
            request = request.header(TARGET, url);
        }
        Target::of(&request.body(()).unwrap().into_parts().0)
    }

    #[test]
    fn paths_are_those_that_the_clients_send() {
        let id = || "7".to_owned();
        for (path, app, action) in [
            ("/fal/a/b", "a/b", Action::Submit(String::new())),
            ("/fal/a/b/c/d", "a/b", Action::Submit("c/d".into())),
            ("/fal/a/b@2", "a/b@2", Action::Submit(String::new())),
            ("/fal/a/b/requests/7", "a/b", Action::Result(id())),
            ("/fal/a/b/requests/7/status?logs=1", "a/b", Action::Status(id())),
            ("/fal/a/b/requests/7/status/stream", "a/b", Action::StatusStream(id())),
            ("/fal/a/b/requests/7/cancel", "a/b", Action::Cancel(id())),
            ("/fal/run/a/b", "a/b", Action::Run(String::new())),
            ("/fal/run/a/b/c/", "a/b", Action::Run("c".into())),
            ("/fal/run/a/b/stream", "a/b", Action::Stream(String::new())),
        ] {
            let target = target(path, None).unwrap();
            assert_eq!((target.app.as_str(), target.action), (app, action), "{path}");
        }
        for path in ["/fal/a", "/fal/run/a", "/fal/a/b/requests", "/fal/workflows/a/b"] {
            assert!(target(path, None).is_err(), "{path}");
        }
    }

    #[test]
    fn a_proxy_is_told_the_target_by_a_header() {
        let url = "https://queue.fal.run/a/b/requests/7/status?logs=1";
        let asked = target("/fal/proxy", Some(url)).unwrap();
        assert_eq!(asked.action, Action::Status("7".into()));
        assert!(asked.logs());
        let asked = target("/fal/proxy", Some("https://fal.run/a/b/stream")).unwrap();
        assert_eq!(asked.action, Action::Stream(String::new()));
        for url in [None, Some("https://rest.fal.ai/a/b"), Some("https://evil.example/a/b")] {
            assert!(target("/fal/proxy", url).is_err(), "{url:?}");
        }
    }
}
