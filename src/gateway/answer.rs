//! From a gRPC answer to an HTTP response.

use std::time::Duration;

use axum::body::Body;
use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, header};
use http_body_util::BodyExt as _;
use tonic::{Code, Status};

use super::{
    call::{PREFIX, is_metadata},
    etag,
    mapping::{Mapping, TypeId},
    route::{Route, Routes},
};
use crate::{
    error::{Error, Reason},
    grpc::{
        Guarded,
        status::{http_status, is_reason, retry_delay, to_rpc_status},
    },
};

/// Milliseconds until a retry makes sense.
pub const BACKOFF: HeaderName = HeaderName::from_static("x-backoff-ms");

const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// The response to a unary call.
pub async fn unary(routes: &Routes, route: &Route, answer: Response<Guarded>) -> Response<Body> {
    let (head, body) = answer.into_parts();
    if let Some(refusal) = refused(routes, &head.headers) {
        return refusal;
    }
    let (message, trailers) = match collect(body).await {
        Ok(collected) => collected,
        Err(status) => return failure(routes, &status),
    };
    if let Some(refusal) = refused(routes, &trailers) {
        return refusal;
    }
    let mapping = &routes.mapping;
    let mut json = Vec::with_capacity(message.len() * 2 + 64);
    let written = match route.response_body {
        Some(at) => {
            let field = &mapping.message(route.output).fields[at];
            mapping.write_field(field, &message, &mut json)
        }
        None => mapping.write(route.output, &message, &mut json),
    };
    if let Err(error) = written {
        return failure(routes, &Error::internal(error).into());
    }
    let mut response = Response::new(Body::from(json));
    *response.status_mut() = route.status;
    response.headers_mut().insert(header::CONTENT_TYPE, JSON);
    response
        .headers_mut()
        .extend(etag::of(mapping, route, &message).map(|tag| (header::ETAG, tag)));
    copy_metadata(&head.headers, response.headers_mut());
    copy_metadata(&trailers, response.headers_mut());
    response
}

/// The message that a unary call answered with, or its refusal as a response.
pub async fn message<M: prost::Message + Default>(
    routes: &Routes,
    answer: Response<Guarded>,
) -> Result<M, Box<Response<Body>>> {
    let (head, body) = answer.into_parts();
    if let Some(refusal) = refused(routes, &head.headers) {
        return Err(Box::new(refusal));
    }
    let (message, trailers) =
        collect(body).await.map_err(|status| Box::new(failure(routes, &status)))?;
    if let Some(refusal) = refused(routes, &trailers) {
        return Err(Box::new(refusal));
    }
    let decoded = M::decode(message);
    decoded.map_err(|error| Box::new(failure(routes, &Error::internal(error).into())))
}

/// A message as JSON.
pub fn json(routes: &Routes, name: &str, message: &[u8]) -> Response<Body> {
    let mut json = Vec::with_capacity(message.len() * 2 + 64);
    let mapping = &routes.mapping;
    let known = mapping.find(name);
    if known.is_none_or(|id| mapping.write(id, message, &mut json).is_err()) {
        return failure(routes, &Error::internal("a message that cannot be written").into());
    }
    let mut response = Response::new(Body::from(json));
    response.headers_mut().insert(header::CONTENT_TYPE, JSON);
    response
}

/// The one message of a unary answer, and its trailers.
pub async fn collect(mut body: Guarded) -> Result<(Bytes, HeaderMap), Status> {
    let mut data = Bytes::new();
    let mut trailers = HeaderMap::new();
    while let Some(frame) = body.frame().await {
        match frame?.into_data() {
            Ok(bytes) if data.is_empty() => data = bytes,
            Ok(bytes) => {
                let mut joined = BytesMut::from(&*data);
                joined.extend_from_slice(&bytes);
                data = joined.freeze();
            }
            Err(frame) => trailers.extend(frame.into_trailers().unwrap_or_default()),
        }
    }
    // A refusal has no message.
    let message = data.slice(PREFIX.min(data.len())..);
    Ok((message, trailers))
}

/// The error that headers or trailers carry.
pub fn error(headers: &HeaderMap) -> Option<Status> {
    Status::from_header_map(headers).filter(|status| status.code() != Code::Ok)
}

/// The error that headers or trailers carry, as a response.
pub fn refused(routes: &Routes, headers: &HeaderMap) -> Option<Response<Body>> {
    let mut response = failure(routes, &error(headers)?);
    copy_metadata(headers, response.headers_mut());
    Some(response)
}

/// An error as a response: `google.rpc.Status` as JSON.
pub fn failure(routes: &Routes, status: &Status) -> Response<Body> {
    let too_large = is_reason(status, Reason::MessageTooLarge);
    let code = if too_large { StatusCode::PAYLOAD_TOO_LARGE } else { http_status(status.code()) };
    let mut response = Response::new(Body::from(status_json(routes, status)));
    *response.status_mut() = code;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, JSON);
    if code == StatusCode::UNAUTHORIZED {
        headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    if let Some(delay) = retry_delay(status) {
        headers.extend(backoff(delay));
    }
    response
}

/// The headers that say after what time a repetition helps, in milliseconds and in seconds.
pub fn backoff(delay: Duration) -> [(HeaderName, HeaderValue); 2] {
    let millis = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX);
    [(BACKOFF, millis.into()), (header::RETRY_AFTER, millis.div_ceil(1_000).into())]
}

/// An error of this edge as a response, where HTTP has a better word than the code's.
pub fn refusal(routes: &Routes, code: StatusCode, error: Error) -> Response<Body> {
    let mut response = failure(routes, &error.into());
    *response.status_mut() = code;
    response
}

/// `google.rpc.Status` as JSON.
pub fn status_json(routes: &Routes, status: &Status) -> Vec<u8> {
    let mapping = &routes.mapping;
    let mut json = Vec::new();
    let written = mapping
        .find("google.rpc.Status")
        .is_some_and(|id| write_status(mapping, id, status, &mut json));
    if !written {
        // Details that a newer server sent and this one cannot show.
        let plain = to_rpc_status(&Error::internal("unwritable details"));
        json = format!("{{\"code\":{},\"message\":\"internal error\"}}", plain.code).into_bytes();
    }
    json
}

fn write_status(mapping: &Mapping, id: TypeId, status: &Status, json: &mut Vec<u8>) -> bool {
    use prost::Message as _;
    let bare = crate::pb::google::rpc::Status {
        code: status.code() as i32,
        message: status.message().to_owned(),
        details: Vec::new(),
    };
    if !status.details().is_empty() && mapping.write(id, status.details(), json).is_ok() {
        return true;
    }
    json.clear();
    mapping.write(id, &bare.encode_to_vec(), json).is_ok()
}

/// Copies what is metadata and header alike.
pub fn copy_metadata(from: &HeaderMap, to: &mut HeaderMap) {
    for (name, value) in from {
        if is_metadata(name) {
            to.append(name, value.clone());
        }
    }
}
