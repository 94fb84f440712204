//! Keeps pages of strangers from a server that asks for no credential.
//!
//! Such a server listens on this machine alone, but so does every page in a browser on it. A
//! page that gives its own name to this address (DNS rebinding) shows itself by the host that it
//! calls, and a page from elsewhere by its origin. gRPC itself is out of their reach: browsers
//! cannot speak it.

use std::net::IpAddr;

use http::{HeaderMap, Uri, header, uri::Authority};

use crate::{
    config::Config,
    error::{Error, Kind, Reason, Result},
};

/// Which hosts and origins are let in.
pub struct Guard {
    hosts: Vec<String>,
    origins: Vec<String>,
}

impl Guard {
    /// Those of this machine and of the configuration.
    pub fn new(config: &Config) -> Self {
        let hosts = config.http.allowed_hosts().map(str::to_owned).collect();
        let origins = config.http.cors_origins().map(str::to_owned).collect();
        Self { hosts, origins }
    }

    /// Refuses a request that comes by a strange name, or from a page of a strange origin.
    pub fn check(&self, uri: &Uri, headers: &HeaderMap) -> Result<()> {
        if let Some(authority) = uri.authority() {
            self.check_host(authority.as_str())?;
        }
        for host in headers.get_all(header::HOST) {
            self.check_host(host.to_str().unwrap_or("?"))?;
        }
        for origin in headers.get_all(header::ORIGIN) {
            self.check_origin(origin.to_str().unwrap_or("?"))?;
        }
        Ok(())
    }

    fn check_host(&self, authority: &str) -> Result<()> {
        if host_of(authority).is_some_and(|host| self.is_own(&host)) {
            return Ok(());
        }
        Err(denied(format!(
            "this server has no credentials and answers to localhost alone, not to `{}`; name that host in http.allowed_hosts",
            authority.escape_debug()
        ))
        .with("host", authority.escape_debug()))
    }

    fn check_origin(&self, origin: &str) -> Result<()> {
        let host = origin.split_once("://").and_then(|(_, authority)| host_of(authority));
        if host.is_some_and(|host| self.is_own(&host)) || self.origins.iter().any(|o| o == origin) {
            return Ok(());
        }
        Err(denied(format!(
            "this server has no credentials, and pages of `{}` may not call it; name that origin in http.cors_origins",
            origin.escape_debug()
        ))
        .with("origin", origin.escape_debug()))
    }

    /// Whether only this machine can have the name, or the configuration has it.
    fn is_own(&self, host: &str) -> bool {
        let address = host.trim_matches(['[', ']']).parse::<IpAddr>();
        address.is_ok_and(|address| address.is_loopback())
            || host == "localhost"
            || host.ends_with(".localhost")
            || self.hosts.iter().any(|own| own == host)
    }
}

/// The host of `host` or `host:port`, in lower case.
fn host_of(authority: &str) -> Option<String> {
    let authority: Authority = authority.parse().ok()?;
    let host = authority.host().to_ascii_lowercase();
    let host = host.strip_suffix('.').unwrap_or(&host);
    (!host.is_empty()).then(|| host.to_owned())
}

fn denied(message: String) -> Error {
    Error::new(Kind::PermissionDenied, Reason::PermissionDenied, message)
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn guard() -> Guard {
        let mut config = Config::default();
        config.http.allowed_hosts = "baton.test, 10.0.0.7".into();
        config.http.cors_origins = "https://app.example.org".into();
        Guard::new(&config)
    }

    #[test]
    fn only_names_of_this_machine_and_configured_ones_are_answered() {
        let by = |host: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::HOST, HeaderValue::from_str(host).unwrap());
            let by_header = guard().check(&Uri::from_static("/v1/tasks"), &headers).is_ok();
            let uri = Uri::builder().scheme("http").authority(host).path_and_query("/").build();
            let by_authority = uri.is_ok_and(|uri| guard().check(&uri, &HeaderMap::new()).is_ok());
            assert_eq!(by_header, by_authority, "{host}");
            by_header
        };
        for host in [
            "localhost",
            "LOCALHOST:7070",
            "localhost.:7070",
            "app.localhost:1",
            "127.0.0.1:7070",
            "127.9.9.9",
            "[::1]:7070",
            "baton.test:80",
            "10.0.0.7",
        ] {
            assert!(by(host), "{host}");
        }
        for host in [
            "evil.example.org:7070",
            "localhost.evil.example.org",
            "evillocalhost",
            "127.0.0.1.evil.example.org",
            "10.0.0.8",
            "0.0.0.0:7070",
            "[::2]",
            "localhost@evil.example.org",
        ] {
            assert!(!by(host), "{host}");
        }
        let mut headers = HeaderMap::new();
        assert!(guard().check(&Uri::from_static("/"), &headers).is_ok());
        headers.append(header::HOST, HeaderValue::from_static("localhost"));
        headers.append(header::HOST, HeaderValue::from_static("evil.example.org"));
        assert!(guard().check(&Uri::from_static("/"), &headers).is_err());
    }

    #[test]
    fn only_pages_of_this_machine_and_configured_ones_may_call() {
        let from = |origin: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::ORIGIN, HeaderValue::from_static(origin));
            guard().check(&Uri::from_static("/"), &headers).is_ok()
        };
        for origin in ["http://localhost:5173", "https://127.0.0.1:7070", "https://app.example.org"]
        {
            assert!(from(origin), "{origin}");
        }
        for origin in ["null", "https://evil.example.org", "http://app.example.org", "file://", ""]
        {
            assert!(!from(origin), "{origin}");
        }
    }
}
