//! What happens to every request before and after its handler, in this order: correlation
//! id, protocol checks, load, credential, deadline, handler, status.

use std::{collections::HashMap, convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};

use axum::Router;
use bytes::Bytes;
use http::{HeaderName, HeaderValue, Request, Response, StatusCode, header};
use tokio_util::sync::CancellationToken;
use tonic::{Status, body::Body, server::NamedService, transport::server::TcpConnectInfo};
use tower::{Service, ServiceExt as _};
use tracing::Instrument as _;

use super::{
    auth,
    body::{Arriving, Ending, Guarded, Permit, Record, normalise, read_code, stopping},
    methods::{METHODS, Method},
    protocol::{Ids, check_binary_metadata, is_grpc, not_grpc, timeout},
    work::{Caught, Failed, Reply, Work, answer},
};
use crate::{
    config,
    error::{Error, Kind, Reason},
    id::Entropy,
    keys::Keyring,
    supervisor::Supervisor,
    telemetry::{self, MethodLabel, Metrics},
};

/// Name of the header that finds a call in the log.
pub const CORRELATION: HeaderName = HeaderName::from_static("x-correlation-id");

/// A request whose body is not complete this long after its head is refused.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// The correlation id of a call, in the request's extensions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CorrelationId(pub Arc<str>);

/// Handles the calls of one service.
trait Handler: Send + Sync {
    fn call(&self, request: Request<Body>) -> Reply;
}

impl<S> Handler for S
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible, Future = Reply>
        + Clone
        + Send
        + Sync,
{
    fn call(&self, request: Request<Body>) -> Reply {
        // A generated server is an `Arc` and is always ready.
        Service::call(&mut self.clone(), request)
    }
}

/// The gRPC services that are served.
#[derive(Clone, Default)]
pub struct Services(HashMap<&'static str, Arc<dyn Handler>>);

impl Services {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a generated server.
    #[must_use]
    pub fn with<S>(mut self, service: S) -> Self
    where
        S: Service<Request<Body>, Response = Response<Body>, Error = Infallible, Future = Reply>
            + NamedService
            + Clone
            + Send
            + Sync
            + 'static,
    {
        self.0.insert(S::NAME, Arc::new(service));
        self
    }

    /// Names of the services, for health.
    #[must_use]
    pub fn names(&self) -> Vec<&'static str> {
        self.0.keys().copied().collect()
    }
}

/// Everything a request passes through; clones share it.
#[derive(Clone)]
pub struct Edge(Arc<Inner>);

struct Inner {
    methods: HashMap<&'static str, (Method, Arc<dyn Handler>)>,
    http: Router,
    keyring: Keyring,
    auth: config::Auth,
    limits: config::Limits,
    metrics: Metrics,
    supervisor: Supervisor,
    ids: Ids,
    /// Cancelled when open streams must end because the server stops.
    streams_end: CancellationToken,
}

/// What an [`Edge`] is made of.
pub struct Parts {
    /// gRPC.
    pub services: Services,
    /// Everything else on the port.
    pub http: Router,
    /// Checks credentials.
    pub keyring: Keyring,
    /// Which services need none.
    pub auth: config::Auth,
    /// Limits.
    pub limits: config::Limits,
    /// Metrics.
    pub metrics: Metrics,
    /// Takes over calls whose clients left.
    pub supervisor: Supervisor,
    /// For correlation ids.
    pub entropy: Entropy,
}

impl Edge {
    /// Puts the parts together.
    pub fn new(parts: Parts) -> Self {
        let Parts { services, http, keyring, auth, limits, metrics, supervisor, entropy } = parts;
        let methods = METHODS
            .iter()
            .filter_map(|(path, method)| {
                Some((*path, (*method, services.0.get(method.service)?.clone())))
            })
            .collect();
        let ids = Ids::new(&entropy);
        let streams_end = CancellationToken::new();
        Self(Arc::new(Inner {
            methods,
            http,
            keyring,
            auth,
            limits,
            metrics,
            supervisor,
            ids,
            streams_end,
        }))
    }

    /// Ends streaming calls that are still open, as a shutdown must.
    pub fn end_streams(&self) {
        self.0.streams_end.cancel();
    }

    /// Supervisor of detached calls.
    pub(super) fn supervisor(&self) -> &Supervisor {
        &self.0.supervisor
    }

    /// Metrics of connections.
    pub(super) fn metrics(&self) -> &Metrics {
        &self.0.metrics
    }

    /// Limits of connections.
    pub(super) fn limits(&self) -> &config::Limits {
        &self.0.limits
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
        let found = inner.methods.get(request.uri().path());
        let name = found.map_or("unknown", |(method, _)| method.name);
        let span = tracing::info_span!(
            "call",
            otel.kind = "server",
            method = name,
            correlation_id = &*id.0
        );
        // Before the span is entered: its parent cannot be set afterwards.
        let caller = telemetry::traceparent(request.headers());
        if let Some(parent) = telemetry::adopt_parent(&span, caller) {
            request.extensions_mut().insert(parent);
        }
        let value = HeaderValue::from_str(&id.0);
        request.extensions_mut().insert(id);
        let grpc = found.is_some() || is_grpc(request.headers());
        let mut response = if grpc {
            let call =
                self.clone().grpc(peer, request, found.map(|(m, h)| (*m, h.clone())), span.clone());
            call.instrument(span).await
        } else {
            self.http(request).instrument(span).await
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
        if path == "/metrics" && !self.0.auth.open_metrics {
            let checked = self.0.keyring.check(auth::credential(request.headers()).ok().flatten());
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
        let request = request.map(|body| axum::body::Body::new(Arriving::new(body, BODY_TIMEOUT)));
        let router = self.0.http.clone();
        let response = match Caught(router.oneshot(request)).await {
            Ok(Ok(response)) => response,
            Err(panic) => {
                self.0.supervisor.panicked("http", panic.as_ref());
                self.0.metrics.panics.inc();
                let mut response = Response::new(axum::body::Body::from("internal error\n"));
                *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
                response
            }
        };
        response.map(|body| Guarded::plain(Body::new(body)))
    }

    async fn grpc<B>(
        self,
        peer: SocketAddr,
        request: Request<B>,
        found: Option<(Method, Arc<dyn Handler>)>,
        span: tracing::Span,
    ) -> Response<Guarded>
    where
        B: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        if let Some(refusal) = not_grpc(&request) {
            return refusal;
        }
        let inner = &*self.0;
        let mut record = Record {
            metrics: inner.metrics.clone(),
            supervisor: inner.supervisor.clone(),
            method: found.as_ref().map_or("unknown", |(method, _)| method.name),
            span: span.clone(),
            code: None,
        };
        let Some((method, handler)) = found else {
            let path = request.uri().path();
            let error = Error::new(
                Kind::Unimplemented,
                Reason::Unimplemented,
                format!("`{}` is not served here", path.escape_debug()),
            );
            return refuse(record, error);
        };
        let started = inner.keyring.clock().mono();
        let admitted = self.admit(&request, &method).await;
        let (access, permit, timeout) = match admitted {
            Ok(admitted) => admitted,
            Err(error) => return refuse(record, error),
        };
        let deadline = timeout.map(|timeout| tokio::time::Instant::now() + timeout);

        let (mut parts, body) = request.into_parts();
        // A bidirectional stream may rest; everything else sends its request and is done.
        let body = if method.client_streaming {
            Body::new(body)
        } else {
            Body::new(Arriving::new(body, BODY_TIMEOUT))
        };
        parts.extensions.insert(TcpConnectInfo { local_addr: None, remote_addr: Some(peer) });
        let expires_in = access.expire_time.map(|time| time.since(inner.keyring.clock().now()));
        let revoked = access.ended.clone();
        parts.extensions.insert(access.principal);

        let work = Work {
            future: Some(handler.call(Request::from_parts(parts, body))),
            permit,
            keep: (!method.is_streaming()).then(|| (inner.supervisor.clone(), span)),
        };
        let answered = answer(work, deadline, method.is_streaming(), &inner.streams_end).await;
        let labels = MethodLabel { method: method.name };
        let took = inner.keyring.clock().mono().since(started);
        inner.metrics.rpc_seconds.get_or_create(&labels).observe(took.as_secs_f64());
        let (response, permit) = match answered {
            Ok(answered) => answered,
            Err(Failed::Error(error)) => return refuse(record, error),
            Err(Failed::Panic(panic)) => {
                inner.supervisor.panicked(method.name, panic.as_ref());
                inner.metrics.panics.inc();
                return refuse(record, Error::internal("a handler panicked"));
            }
        };
        let (mut head, body) = response.into_parts();
        if read_code(&head.headers).is_some() {
            head.headers = normalise(head.headers);
            record.code = read_code(&head.headers);
            return Response::from_parts(head, Guarded::plain(body));
        }
        let ending = method.is_streaming().then(|| {
            let mut ending = Ending::new(revoked, inner.streams_end.clone());
            ending.deadline = deadline.map(|at| Box::pin(tokio::time::sleep_until(at)));
            ending.expiry = expires_in.map(|wait| Box::pin(tokio::time::sleep(wait)));
            ending
        });
        Response::from_parts(head, Guarded::new(body, ending, record, permit))
    }

    /// Everything that can refuse a call before its handler sees it.
    async fn admit<B>(
        &self,
        request: &Request<B>,
        method: &Method,
    ) -> Result<(crate::keys::Access, Option<Permit>, Option<Duration>), Error> {
        let inner = &*self.0;
        check_binary_metadata(request.headers())?;
        let timeout = timeout(request.headers())?;
        let permit = inner.permit(method)?;
        if method.is_streaming() && inner.streams_end.is_cancelled() {
            return Err(stopping());
        }
        let access = auth::admit(&inner.keyring, &inner.auth, request.headers(), method).await?;
        Ok((access, permit, timeout))
    }
}

impl Inner {
    /// A place among the calls at work; health checks need none.
    fn permit(&self, method: &Method) -> Result<Option<Permit>, Error> {
        if method.access == super::methods::Access::Health {
            return Ok(None);
        }
        let (gauge, limit, label) = if method.is_streaming() {
            (&self.metrics.streams, self.limits.streams, "streams")
        } else {
            (&self.metrics.calls, self.limits.calls, "calls")
        };
        let before = gauge.inc();
        let permit = Permit(gauge.clone());
        if usize::try_from(before).unwrap_or(0) < limit {
            return Ok(Some(permit));
        }
        self.metrics.shed.inc();
        Err(Error::new(
            Kind::ResourceExhausted,
            Reason::Overloaded,
            "the server has as many calls at work as it takes",
        )
        .with("policy_label", label)
        .retry_after(Duration::from_secs(1)))
    }
}

fn refuse(mut record: Record, error: Error) -> Response<Guarded> {
    let status = Status::from(error);
    record.code = Some(status.code());
    status.into_http::<Body>().map(Guarded::plain)
}
