//! What happens to every request on the port before its protocol matters: correlation id,
//! span, and whether it is a call of a method or plain HTTP.

use std::{convert::Infallible, net::SocketAddr, sync::Arc};

use axum::Router;
use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, Request, Response, StatusCode, header};
use tonic::{body::Body, transport::server::TcpConnectInfo};
use tower::ServiceExt as _;
use tracing::Instrument as _;

use super::{
    auth,
    body::{Arriving, Guarded},
    calls::{BODY_TIMEOUT, Calls},
    protocol::{Ids, is_connect, is_grpc, is_grpc_web},
    work::Caught,
};
use crate::{
    config,
    id::Entropy,
    supervisor::Supervisor,
    telemetry::{self, Metrics},
};

/// Name of the header that finds a call in the log.
pub const CORRELATION: HeaderName = HeaderName::from_static("x-correlation-id");

/// The correlation id of a call, in the request's extensions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CorrelationId(pub Arc<str>);

/// Everything a request passes through; clones share it.
#[derive(Clone)]
pub struct Edge(Arc<Inner>);

struct Inner {
    calls: Calls,
    http: Router,
    ids: Ids,
}

impl Edge {
    /// Calls of methods, and everything else on the port.
    pub fn new(calls: Calls, http: Router, entropy: &Entropy) -> Self {
        Self(Arc::new(Inner { calls, http, ids: Ids::new(entropy) }))
    }

    /// Ends streaming calls that are still open, as a shutdown must.
    pub fn end_streams(&self) {
        self.0.calls.end_streams();
    }

    /// Supervisor of connections.
    pub(super) fn supervisor(&self) -> &Supervisor {
        self.0.calls.supervisor()
    }

    /// Metrics of connections.
    pub(super) fn metrics(&self) -> &Metrics {
        self.0.calls.metrics()
    }

    /// Limits of connections.
    pub(super) fn limits(&self) -> &config::Limits {
        self.0.calls.limits()
    }

    /// Serves one request.
    pub async fn call<B>(
        self,
        peer: SocketAddr,
        mut request: Request<B>,
    ) -> Result<Response<Guarded>, Infallible>
    where
        B: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let inner = &*self.0;
        let id = CorrelationId(inner.ids.of(request.headers()));
        let span = tracing::info_span!(
            "call",
            otel.kind = "server",
            method = tracing::field::Empty,
            correlation_id = &*id.0
        );
        // Before the span is entered: its parent cannot be set afterwards.
        let caller = telemetry::traceparent(request.headers());
        if let Some(parent) = telemetry::adopt_parent(&span, caller) {
            request.extensions_mut().insert(parent);
        }
        let value = HeaderValue::from_str(&id.0);
        request.extensions_mut().insert(id);
        let peer = TcpConnectInfo { local_addr: None, remote_addr: Some(peer) };
        request.extensions_mut().insert(peer);
        // Browsers ask by OPTIONS whether they may make a call.
        let headers = request.headers();
        let of_browser =
            is_grpc_web(headers) || is_connect(headers) || request.method() == Method::OPTIONS;
        let is_call = is_grpc(request.headers())
            || (inner.calls.method(request.uri().path()).is_some() && !of_browser);
        let mut response = if is_call {
            inner.calls.call(request).instrument(span).await
        } else {
            // Large, and rarer than calls, which would all have room for it.
            Box::pin(self.http(request)).instrument(span).await
        };
        if let Ok(value) = value {
            response.headers_mut().insert(CORRELATION, value);
        }
        Ok(response)
    }

    async fn http<B>(&self, request: Request<B>) -> Response<Guarded>
    where
        B: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let path = request.uri().path();
        if path == "/metrics" && !self.0.calls.auth().open_metrics {
            let checked =
                self.0.calls.keyring().check(auth::credential(request.headers()).ok().flatten());
            if let Err(error) = checked.await {
                let text = format!("{error}\n");
                let mut response =
                    Response::new(Guarded::plain(Body::new(axum::body::Body::from(text))));
                *response.status_mut() = StatusCode::UNAUTHORIZED;
                let challenge = HeaderValue::from_static("Bearer");
                response.headers_mut().insert(header::WWW_AUTHENTICATE, challenge);
                return response;
            }
        }
        // Bytes of artifacts take their time, as long as they come.
        let long = path.ends_with("/content");
        let request = request.map(|body| {
            axum::body::Body::new(if long {
                Arriving::long(body, BODY_TIMEOUT)
            } else {
                Arriving::new(body, BODY_TIMEOUT)
            })
        });
        let router = self.0.http.clone();
        let response = match Caught(router.oneshot(request)).await {
            Ok(Ok(response)) => response,
            Err(panic) => {
                self.supervisor().panicked("http", panic.as_ref());
                self.metrics().panics.inc();
                let mut response = Response::new(axum::body::Body::from("internal error\n"));
                *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
                response
            }
        };
        response.map(|body| Guarded::plain(Body::new(body)))
    }
}
