//! The HTTP edge: every unary and server-streaming method as JSON, from the descriptors alone.
//!
//! A request that fits a template of `google.api.http` becomes a gRPC request ([`bind`],
//! [`call`]), passes through the same [`Calls`] as one from the network, so that credentials,
//! deadlines, limits and metrics are the same, and its answer becomes an HTTP response
//! ([`answer`], [`stream`]). The same descriptors make the description of the API ([`openapi`]).
//! A method that is added to a proto needs no line here. This edge
//! knows no method, no SQL and no state.

mod answer;
mod bind;
mod call;
mod connect;
mod content;
mod etag;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod guard;
mod mapping;
mod openapi;
mod reference;
mod route;
mod stream;
mod template;
#[cfg(test)]
mod tests;
mod web;

use std::sync::Arc;

use axum::{
    Router,
    body::Body,
    middleware::{Next, from_fn},
};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body::Body as _;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use prost_reflect::DescriptorPool;
use tonic::Status;
use tower_http::cors::CorsLayer;

pub use self::{
    answer::backoff,
    call::{metadata, too_large},
};
use self::{
    guard::Guard,
    route::{Body as Holds, Route, Routes},
    stream::{Form, Style},
    template::{Captures, Found},
};
use crate::{
    config::Config,
    error::{Error, Kind, Reason},
    grpc::calls::Calls,
    pb,
};

/// The HTTP edge; clones share it.
#[derive(Clone)]
pub struct Gateway(Arc<Inner>);

struct Inner {
    routes: Arc<Routes>,
    calls: Calls,
    /// Largest body.
    limit: usize,
    /// Permission for pages of other origins.
    cors: Option<CorsLayer>,
    /// Where no credential keeps strangers out.
    guard: Option<Arc<Guard>>,
    /// `/openapi.json`, where the API may be described.
    document: Option<Bytes>,
}

/// A response in place of what was wanted.
type Refused = Box<Response<Body>>;

impl Gateway {
    /// Reads the annotations of all methods that `calls` serve.
    pub fn new(calls: Calls, config: &Config) -> anyhow::Result<Self> {
        let pool = DescriptorPool::decode(pb::FILE_DESCRIPTOR_SET)?;
        let routes = Routes::new(&pool, |path| calls.method(path).is_some());
        let routes = Arc::new(routes.map_err(anyhow::Error::msg)?);
        let limit = usize::try_from(config.limits.message)?;
        let cors = web::cors(&config.http);
        let guard = (!config.auth.required).then(|| Arc::new(Guard::new(config)));
        let document = if config.server.reflection {
            Some(serde_json::to_vec(&openapi::document(&routes, &pool))?.into())
        } else {
            None
        };
        Ok(Self(Arc::new(Inner { routes, calls, limit, cors, guard, document })))
    }

    /// Answers what `router` has no route for.
    pub fn serve_on(self, router: Router) -> Router {
        let router = match &self.0.document {
            Some(document) => router.merge(reference::router(document.clone())),
            None => router,
        };
        let (cors, guard) = (self.0.cors.clone(), self.0.guard.clone());
        let routes = self.0.routes.clone();
        let router = router
            .fallback(move |request: Request<Body>| {
                let gateway = self.clone();
                async move {
                    if web::is_grpc_web(&request) {
                        return web::grpc_web(gateway.0.calls.clone(), request).await;
                    }
                    if let Some(route) = connect::route(&gateway.0.routes, &request) {
                        return gateway.connect(route, request).await;
                    }
                    gateway.answer(request).await
                }
            })
            .layer(web::compression());
        let router = match cors {
            Some(cors) => router.layer(cors),
            None => router,
        };
        match guard {
            Some(guard) => router.layer(from_fn(move |request: Request<Body>, next: Next| {
                let refused = guard.check(request.uri(), request.headers()).err();
                let refused = refused.map(|error| answer::failure(&routes, &error.into()));
                async move {
                    match refused {
                        Some(refused) => refused,
                        None => next.run(request).await,
                    }
                }
            })),
            None => router,
        }
    }

    /// Answers one request.
    async fn answer(&self, request: Request<Body>) -> Response<Body> {
        let routes = &self.0.routes;
        let path = request.uri().path().to_owned();
        let method = request.method().clone();
        let is_head = method == Method::HEAD;
        let wanted = if is_head { Method::GET } else { method.clone() };
        if let Some(target) = content::Target::of(&path) {
            let content = content::Content { calls: &self.0.calls, routes };
            return match (target, &wanted) {
                (content::Target::Artifact(id), &Method::GET) => {
                    content.download(id, request).await
                }
                (content::Target::Upload(id), &Method::PUT) => content.upload(id, request).await,
                _ => self.other_methods(&method, target.methods()),
            };
        }
        match routes.tree.find(wanted.as_str(), &path) {
            Found::Match(route, captures) if is_head && !route.streaming => {
                let response = self.call(route.clone(), &captures, request).await;
                // Its length is told and it is not sent.
                response.unwrap_or_else(|refused| *refused).map(|_| Body::empty())
            }
            Found::Match(route, captures) if !is_head => {
                let response = self.call(route.clone(), &captures, request).await;
                response.unwrap_or_else(|refused| *refused)
            }
            Found::Match(..) => self.other_methods(&method, vec!["GET"]),
            Found::OtherMethods(methods) => self.other_methods(&method, methods),
            Found::Nothing => {
                let message = format!("`{}` is no path of this API", path.escape_debug());
                let error = Error::new(Kind::NotFound, Reason::NotFound, message);
                let error = error.with("resource", "path").with("id", path.escape_debug());
                answer::failure(routes, &error.into())
            }
            Found::Malformed => {
                let error = Error::invalid("path", "is not percent-encoded UTF-8");
                answer::failure(routes, &error.into())
            }
        }
    }

    async fn call(
        &self,
        route: Arc<Route>,
        captures: &Captures,
        request: Request<Body>,
    ) -> Result<Response<Body>, Refused> {
        let routes = self.0.routes.clone();
        let refuse = |error: Error| Box::new(answer::failure(&routes, &error.into()));
        let (parts, body) = request.into_parts();
        let form = match (route.streaming, Form::accepted(&parts.headers)) {
            (true, None) => return Err(Box::new(self.not_acceptable())),
            (true, form) => form,
            (false, _) => None,
        };
        if body.size_hint().exact() != Some(0) {
            self.check_content_type(&parts.method, &parts.headers)?;
        }
        let mut query = bind::query(parts.uri.query().unwrap_or_default()).map_err(refuse)?;
        let mut headers = call::metadata(&parts.headers).map_err(refuse)?;
        if route.streaming {
            call::take_token(&mut query, &mut headers).map_err(refuse)?;
        }
        let last_event_id = last_event_id(&route, &parts.headers).map_err(refuse)?;
        let body = match route.body {
            Holds::None if parts.headers.get(header::CONTENT_LENGTH).is_none() => Bytes::new(),
            _ => self.collect(body).await?,
        };
        let etag = etag::wanted(&routes.mapping, &route, &parts.method, &parts.headers);
        let etag = etag.map_err(refuse)?;
        let fields = bind::Parts {
            captures,
            query: &query,
            body: &body,
            last_event_id,
            etag: etag.as_deref(),
        };
        let message = bind::request(&routes.mapping, &route, fields).map_err(refuse)?;
        let request = call::request(&route.path, &message, headers, parts.extensions);
        let answer = self.0.calls.call(request.map_err(refuse)?).await;
        if let Some(form) = form {
            let resumed = last_event_id.is_some();
            let encoded = self.0.calls.metrics().json_answers.clone();
            let style = Style { route, form, resumed, encoded };
            return Ok(stream::response(routes.clone(), style, answer).await);
        }
        let mut response = answer::unary(&routes, &route, answer).await;
        // What another has changed meanwhile is a conflict, and to HTTP a condition.
        if etag.is_some() && response.status() == StatusCode::CONFLICT {
            *response.status_mut() = StatusCode::PRECONDITION_FAILED;
        }
        Ok(response)
    }

    /// The whole body, within its limit.
    async fn collect(&self, body: Body) -> Result<Bytes, Refused> {
        self.gather(body).await.map_err(|(status, code)| {
            let mut response = answer::failure(&self.0.routes, &status);
            if let Some(code) = code {
                *response.status_mut() = code;
            }
            Box::new(response)
        })
    }

    /// The whole body, or why not, and the HTTP status where there is a better one than the
    /// code's.
    async fn gather(&self, body: Body) -> Result<Bytes, (Status, Option<StatusCode>)> {
        match Limited::new(body, self.0.limit).collect().await {
            Ok(collected) => Ok(collected.to_bytes()),
            Err(error) if error.is::<LengthLimitError>() => {
                Err((call::too_large(self.0.limit as u64).into(), None))
            }
            Err(error) => Err(match find_status(&*error) {
                Some(status) => (status.clone(), Some(StatusCode::REQUEST_TIMEOUT)),
                None => (Error::invalid("body", "did not arrive whole").into(), None),
            }),
        }
    }

    /// Only JSON is taken, where there is a body at all. A page of another origin cannot send
    /// that without asking first.
    fn check_content_type(&self, method: &Method, headers: &HeaderMap) -> Result<(), Refused> {
        if matches!(*method, Method::GET | Method::HEAD | Method::DELETE) {
            return Ok(());
        }
        let value = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let essence = value.unwrap_or_default().split(';').next().unwrap_or_default().trim();
        if essence.eq_ignore_ascii_case("application/json") {
            return Ok(());
        }
        let error = Error::invalid("content-type", "must be application/json");
        let code = StatusCode::UNSUPPORTED_MEDIA_TYPE;
        Err(Box::new(answer::refusal(&self.0.routes, code, error)))
    }

    fn not_acceptable(&self) -> Response<Body> {
        let error = Error::invalid(
            "accept",
            "must allow text/event-stream, application/x-ndjson or application/json",
        );
        answer::refusal(&self.0.routes, StatusCode::NOT_ACCEPTABLE, error)
    }

    fn other_methods(&self, method: &Method, mut methods: Vec<&str>) -> Response<Body> {
        if methods.contains(&"GET") {
            methods.push("HEAD");
        }
        methods.push("OPTIONS");
        methods.sort_unstable();
        let mut response = if *method == Method::OPTIONS {
            let mut response = Response::new(Body::empty());
            *response.status_mut() = StatusCode::NO_CONTENT;
            response
        } else {
            let message = format!("`{method}` is not served here");
            let error = Error::new(Kind::Unimplemented, Reason::Unimplemented, message);
            answer::refusal(&self.0.routes, StatusCode::METHOD_NOT_ALLOWED, error)
        };
        // Methods are tokens by the grammar of their annotations' paths.
        if let Ok(allow) = HeaderValue::try_from(methods.join(", ")) {
            response.headers_mut().insert(header::ALLOW, allow);
        }
        response
    }
}

/// The id after which a browser wants a stream to go on.
fn last_event_id(route: &Route, headers: &HeaderMap) -> Result<Option<u64>, Error> {
    let value = headers.get("last-event-id").filter(|_| route.events.resume.is_some());
    let Some(value) = value.filter(|value| !value.is_empty()) else { return Ok(None) };
    let id = value.to_str().ok().filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
    match id.and_then(|text| text.parse().ok()) {
        Some(id) => Ok(Some(id)),
        None => Err(Error::invalid("last-event-id", "must be the id of an event")),
    }
}

/// The status that a body ended with, below what wraps it.
fn find_status<'e>(error: &'e (dyn std::error::Error + 'static)) -> Option<&'e Status> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(status) = error.downcast_ref::<Status>() {
            return Some(status);
        }
        next = error.source();
    }
    None
}
