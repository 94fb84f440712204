//! The APIs of others, for clients that exist already: each a thin translation to the calls of
//! this server and back, with its own paths, words and errors.
//!
//! A facade makes its calls in this process ([`wire::InProcess`]), so that credentials, deadlines,
//! quotas, correlation ids and metrics are those of every other call. It knows no SQL and no
//! state, and keeps nothing between two requests.

mod fal;
mod jobs;
mod openai;
mod served;
mod sse;
mod standing;
mod wire;

use std::sync::Arc;

use axum::{Router, body::Body};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, header, request::Parts, uri::Authority};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use serde_json::{Map, Value};

use self::wire::InProcess;
use crate::{
    config::Config,
    error::{Error, Kind, Reason},
    gateway,
    grpc::calls::Calls,
    keys,
};

/// All facades that the configuration offers.
///
/// # Errors
/// When a limit is no size.
pub fn router(calls: Calls, config: &Config) -> anyhow::Result<Router> {
    let limit = usize::try_from(config.limits.message)?;
    let open = !config.auth.required;
    let secure = !config.tls.cert.is_empty();
    let facade = Facade(Arc::new(Inner { calls, limit, open, secure }));
    let router = openai::router(facade.clone()).merge(fal::router(facade.clone()));
    Ok(if config.http.job_routes { router.merge(jobs::router(facade)) } else { router })
}

/// What every facade works with; clones share it.
#[derive(Clone)]
struct Facade(Arc<Inner>);

struct Inner {
    calls: Calls,
    /// Largest body.
    limit: usize,
    /// Whether this server asks nobody for a credential.
    open: bool,
    /// Whether the port speaks TLS.
    secure: bool,
}

impl Facade {
    /// The calls that a request leads to, under its credential, which comes as
    /// `authorization: <scheme> …` or in any way that the gRPC API takes.
    fn client(&self, parts: &Parts, scheme: &str) -> Result<InProcess, Error> {
        let mut headers = gateway::metadata(&parts.headers)?;
        if let Some(token) = token(&headers, scheme).map(str::to_owned) {
            // The clients of these APIs cannot send none. Where nobody needs a credential,
            // one that cannot be ours is as good as none.
            if self.0.open && !keys::is_credential(&token) {
                headers.remove(header::AUTHORIZATION);
            } else if let Ok(mut value) = HeaderValue::try_from(format!("Bearer {token}")) {
                value.set_sensitive(true);
                headers.insert(header::AUTHORIZATION, value);
            }
        }
        Ok(InProcess::new(self.0.calls.clone(), headers, parts.extensions.clone()))
    }

    /// Scheme and host by which the client knows this server, or the proxy before it.
    fn origin(&self, parts: &Parts) -> String {
        let header = |name: HeaderName| parts.headers.get(name).and_then(|it| it.to_str().ok());
        let forwarded = |name: &'static str| {
            let value = header(HeaderName::from_static(name))?.split(',').next()?.trim();
            (!value.is_empty()).then(|| value.to_owned())
        };
        let scheme = forwarded("x-forwarded-proto")
            .filter(|scheme| matches!(scheme.as_str(), "http" | "https"))
            .unwrap_or_else(|| if self.0.secure { "https" } else { "http" }.to_owned());
        let host = forwarded("x-forwarded-host")
            .or_else(|| header(header::HOST).map(str::to_owned))
            .or_else(|| parts.uri.authority().map(ToString::to_string));
        // What is no host is not repeated.
        let host = host.filter(|host| host.parse::<Authority>().is_ok());
        format!("{scheme}://{}", host.unwrap_or_default())
    }

    /// The JSON object of a request's body; one that is empty has no fields. Nothing else is
    /// taken, so that a page of another origin cannot send one without asking first.
    async fn object(&self, parts: &Parts, body: Body) -> Result<Map<String, Value>, Error> {
        let kind = parts.headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let essence = kind.unwrap_or_default().split(';').next().unwrap_or_default().trim();
        if parts.method != Method::GET && !essence.eq_ignore_ascii_case("application/json") {
            return Err(Error::invalid("content-type", "must be application/json"));
        }
        let bytes = self.collect(body).await?;
        if bytes.is_empty() {
            return Ok(Map::new());
        }
        match serde_json::from_slice(&bytes) {
            Ok(Value::Object(map)) => Ok(map),
            Ok(_) => Err(Error::invalid("body", "must be a JSON object")),
            Err(error) => Err(Error::invalid("body", format!("is not JSON: {error}"))),
        }
    }

    /// The whole body, within its limit.
    async fn collect(&self, body: Body) -> Result<Bytes, Error> {
        let limit = self.0.limit;
        match Limited::new(body, limit).collect().await {
            Ok(collected) => Ok(collected.to_bytes()),
            Err(error) if error.is::<LengthLimitError>() => Err(gateway::too_large(limit as u64)),
            Err(_) => Err(Error::new(
                Kind::DeadlineExceeded,
                Reason::CallDeadline,
                "the body did not arrive whole and in time",
            )),
        }
    }
}

/// The token behind `authorization: <scheme> …`.
fn token<'h>(headers: &'h HeaderMap, scheme: &str) -> Option<&'h str> {
    let text = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (found, token) = text.split_once(' ')?;
    found.eq_ignore_ascii_case(scheme).then(|| token.trim())
}
