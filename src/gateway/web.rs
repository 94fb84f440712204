//! What browsers need beside JSON: gRPC-Web, permission for pages of other origins, and answers
//! that are compressed.

use std::convert::Infallible;

use axum::body::Body;
use http::{HeaderName, HeaderValue, Method, Request, Response, Version, header};
use tonic_web::GrpcWebLayer;
use tower::{Layer as _, ServiceExt as _, service_fn};
use tower_http::{
    compression::{CompressionLayer, predicate::Predicate},
    cors::{AllowHeaders, AllowOrigin, CorsLayer},
};

use super::answer::BACKOFF;
use crate::{
    config,
    grpc::{calls::Calls, layers::CORRELATION},
};

/// Smaller answers are not worth compressing.
const COMPRESSED_FROM: u64 = 1_024;

/// How long a browser remembers what it may ask.
const PREFLIGHT_AGE: std::time::Duration = std::time::Duration::from_hours(2);

/// Whether it is a gRPC-Web call.
pub fn is_grpc_web<B>(request: &Request<B>) -> bool {
    let kind = request.headers().get(header::CONTENT_TYPE);
    kind.is_some_and(|value| value.as_bytes().starts_with(b"application/grpc-web"))
}

/// Makes a gRPC-Web call.
pub async fn grpc_web(calls: Calls, request: Request<Body>) -> Response<Body> {
    let grpc = service_fn(move |mut request: Request<tonic::body::Body>| {
        let calls = calls.clone();
        async move {
            // It came over whatever version, and is a whole gRPC request now.
            *request.version_mut() = Version::HTTP_2;
            Ok::<_, Infallible>(calls.call(request).await.map(tonic::body::Body::new))
        }
    });
    let request = request.map(tonic::body::Body::new);
    match GrpcWebLayer::new().layer(grpc).oneshot(request).await {
        Ok(response) => response.map(Body::new),
        Err(never) => match never {},
    }
}

/// Lets pages of these origins call, and of no other. They bring a credential of their own:
/// nothing that a browser adds by itself opens anything here.
pub fn cors(config: &config::Http) -> Option<CorsLayer> {
    // The configuration has none that is no header value.
    let origins = config.cors_origins().filter_map(|origin| HeaderValue::try_from(origin).ok());
    let origins: Vec<_> = origins.collect();
    if origins.is_empty() {
        return None;
    }
    let exposed = [
        CORRELATION,
        BACKOFF,
        header::RETRY_AFTER,
        header::ALLOW,
        header::ETAG,
        header::CONTENT_RANGE,
        header::CONTENT_DISPOSITION,
        HeaderName::from_static("grpc-status"),
        HeaderName::from_static("grpc-message"),
        HeaderName::from_static("grpc-status-details-bin"),
        // Of the facades.
        HeaderName::from_static("x-request-id"),
        HeaderName::from_static("x-fal-request-id"),
        HeaderName::from_static("x-fal-error-type"),
        HeaderName::from_static("x-fal-request-timeout-type"),
    ];
    let methods =
        [Method::GET, Method::HEAD, Method::POST, Method::PUT, Method::PATCH, Method::DELETE];
    let layer = CorsLayer::new()
        .allow_origin(AllowOrigin::list(origins))
        .allow_methods(methods)
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers(exposed)
        .max_age(PREFLIGHT_AGE);
    Some(layer)
}

/// Compresses whole answers of JSON and text as the client accepts it; streams never: a
/// compressor would hold events back.
pub fn compression() -> CompressionLayer<impl Predicate> {
    CompressionLayer::new().compress_when(Whole)
}

/// Bodies of known length.
#[derive(Clone, Copy)]
struct Whole;

impl Predicate for Whole {
    fn should_compress<B: http_body::Body>(&self, response: &Response<B>) -> bool {
        let kind = response.headers().get(header::CONTENT_TYPE);
        let text = kind.is_some_and(|value| {
            let value = value.as_bytes();
            value.starts_with(b"application/json") || value.starts_with(b"text/")
        });
        // A part of the bytes must not become a part of other bytes.
        let ranged = response.headers().contains_key(header::ACCEPT_RANGES);
        text && !ranged
            && response.body().size_hint().exact().is_some_and(|size| size >= COMPRESSED_FROM)
    }
}
