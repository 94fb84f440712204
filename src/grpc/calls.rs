//! What every call of a method passes through, whatever protocol it came by: protocol checks,
//! load, credential, deadline, handler, status.

use std::{collections::HashMap, convert::Infallible, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use tokio_util::sync::CancellationToken;
use tonic::{Status, body::Body, server::NamedService};
use tower::Service;

use super::{
    auth,
    body::{Arriving, Ending, Guarded, Permit, Record, normalise, read_code, stopping},
    methods::{Access, METHODS, Method},
    protocol::{CallTimeout, check_binary_metadata, not_grpc, timeout},
    work::{Failed, Reply, Work, answer},
};
use crate::{
    config,
    error::{Error, Kind, Reason},
    keys::Keyring,
    supervisor::Supervisor,
    telemetry::{MethodLabel, Metrics},
};

/// A request whose body is not complete this long after its head is refused.
pub(super) const BODY_TIMEOUT: Duration = Duration::from_secs(30);

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

/// The methods that are served, behind their checks; clones share them.
#[derive(Clone)]
pub struct Calls(Arc<Inner>);

struct Inner {
    methods: HashMap<&'static str, (Method, Arc<dyn Handler>)>,
    keyring: Keyring,
    auth: config::Auth,
    limits: config::Limits,
    metrics: Metrics,
    supervisor: Supervisor,
    /// Cancelled when open streams must end because the server stops.
    streams_end: CancellationToken,
}

/// What [`Calls`] are made of.
pub struct Parts {
    /// The methods.
    pub services: Services,
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
}

impl Calls {
    /// Puts the parts together.
    pub fn new(parts: Parts) -> Self {
        let Parts { services, keyring, auth, limits, metrics, supervisor } = parts;
        let methods = METHODS
            .iter()
            .filter_map(|(path, method)| {
                Some((*path, (*method, services.0.get(method.service)?.clone())))
            })
            .collect();
        let streams_end = CancellationToken::new();
        let inner = Inner { methods, keyring, auth, limits, metrics, supervisor, streams_end };
        Self(Arc::new(inner))
    }

    /// Ends streaming calls that are still open, as a shutdown must.
    pub fn end_streams(&self) {
        self.0.streams_end.cancel();
    }

    /// The method at a path such as `/baton.v1.TaskService/GetTask`.
    pub fn method(&self, path: &str) -> Option<Method> {
        self.0.methods.get(path).map(|(method, _)| *method)
    }

    /// Checks credentials.
    pub(super) fn keyring(&self) -> &Keyring {
        &self.0.keyring
    }

    /// Which services need no credential.
    pub(super) fn auth(&self) -> &config::Auth {
        &self.0.auth
    }

    /// Supervisor of detached calls.
    pub(super) fn supervisor(&self) -> &Supervisor {
        &self.0.supervisor
    }

    /// Metrics of calls and connections.
    pub fn metrics(&self) -> &Metrics {
        &self.0.metrics
    }

    /// Limits of calls and connections.
    pub(super) fn limits(&self) -> &config::Limits {
        &self.0.limits
    }

    /// Makes one call: a gRPC request over HTTP/2, from the network or from a protocol that was
    /// translated. Names the method in the current span.
    pub async fn call<B>(&self, request: Request<B>) -> Response<Guarded>
    where
        B: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        if let Some(refusal) = not_grpc(&request) {
            return refusal;
        }
        let inner = &*self.0;
        let found = inner.methods.get(request.uri().path()).map(|(m, h)| (*m, h.clone()));
        let span = tracing::Span::current();
        if let Some((method, _)) = &found {
            span.record("method", method.name);
        }
        let mut record = Record {
            calls: self.clone(),
            method: found.as_ref().map_or("unknown", |(method, _)| method.name),
            span: span.clone(),
            one_way: found.as_ref().is_some_and(|(m, _)| m.is_streaming() && !m.client_streaming),
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
        let admitted = self.admit(request.headers(), &method).await;
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
        let expires_in = access.expire_time.map(|time| time.since(inner.keyring.clock().now()));
        let revoked = access.ended.clone();
        parts.extensions.insert(access.principal);
        if let Some(timeout) = timeout {
            parts.extensions.insert(CallTimeout(timeout));
        }

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
    async fn admit(
        &self,
        headers: &HeaderMap,
        method: &Method,
    ) -> Result<(crate::keys::Access, Option<Permit>, Option<Duration>), Error> {
        let inner = &*self.0;
        check_binary_metadata(headers)?;
        let timeout = timeout(headers)?;
        let permit = inner.permit(method)?;
        if method.is_streaming() && inner.streams_end.is_cancelled() {
            return Err(stopping());
        }
        let access = auth::admit(&inner.keyring, &inner.auth, headers, method).await?;
        Ok((access, permit, timeout))
    }
}

impl Inner {
    /// A place among the calls at work; health checks need none.
    fn permit(&self, method: &Method) -> Result<Option<Permit>, Error> {
        if method.access == Access::Health {
            return Ok(None);
        }
        let (gauge, limit, label) = if method.is_streaming() || method.waits {
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
