//! The Connect protocol: unary calls as a POST of JSON or protobuf to the path of the method, and
//! server streams in envelopes. Messages may not be compressed; everything else is as the
//! protocol says.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use axum::body::Body;
use base64::{Engine as _, engine::general_purpose::STANDARD_NO_PAD};
use bytes::{Buf as _, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body::Frame;
use http_body_util::Full;
use prost::Message as _;
use serde_json::{Value, json};
use tonic::{Code, Status};

use super::{
    Gateway, answer,
    call::{self, PREFIX, is_metadata},
    mapping::{Mapping, Reader, TypeId},
    route::{Route, Routes},
};
use crate::{
    error::{Error, Kind, Reason, Result},
    grpc::{Guarded, code_name, status::http_status},
    pb,
};

/// Flag of an envelope whose message is compressed.
const COMPRESSED: u8 = 1;
/// Flag of the envelope that ends a stream.
const END: u8 = 2;

/// How messages are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codec {
    /// As JSON.
    Json,
    /// As protobuf.
    Proto,
}

impl Codec {
    /// The content type of a unary call.
    fn unary_type(self) -> &'static str {
        match self {
            Self::Json => "application/json",
            Self::Proto => "application/proto",
        }
    }

    /// The content type of a stream.
    fn stream_type(self) -> &'static str {
        match self {
            Self::Json => "application/connect+json",
            Self::Proto => "application/connect+proto",
        }
    }

    /// The codec of a content type, and whether it is that of a stream.
    fn of(headers: &HeaderMap) -> Option<(Self, bool)> {
        let kind = headers.get(header::CONTENT_TYPE)?.to_str().ok()?;
        match kind.split(';').next().unwrap_or_default().trim() {
            "application/json" => Some((Self::Json, false)),
            "application/proto" => Some((Self::Proto, false)),
            "application/connect+json" => Some((Self::Json, true)),
            "application/connect+proto" => Some((Self::Proto, true)),
            _ => None,
        }
    }

    /// Appends a message as the client wants it.
    fn write(self, mapping: &Mapping, id: TypeId, message: &[u8], out: &mut Vec<u8>) -> Result<()> {
        match self {
            Self::Json => mapping.write(id, message, out).map_err(Error::internal),
            Self::Proto => {
                out.extend_from_slice(message);
                Ok(())
            }
        }
    }

    /// The encoding of a message that the client wrote.
    fn read(self, mapping: &Mapping, id: TypeId, message: &[u8]) -> Result<Vec<u8>> {
        match self {
            Self::Proto => Ok(message.to_vec()),
            // Nothing at all stands for no fields.
            Self::Json if message.is_empty() => Ok(Vec::new()),
            Self::Json => {
                let mut reader = Reader::new(mapping);
                reader.message(id, message).map_err(|problem| {
                    let field = if problem.field.is_empty() { "body" } else { &problem.field };
                    Error::invalid(field, problem.description)
                })?;
                Ok(reader.into_message())
            }
        }
    }
}

/// The method that a request calls by its own path.
pub fn route<B>(routes: &Routes, request: &Request<B>) -> Option<Arc<Route>> {
    let route = routes.methods.get(request.uri().path())?;
    (request.method() == Method::POST).then(|| route.clone())
}

impl Gateway {
    /// Makes a call by the Connect protocol.
    pub(super) async fn connect(
        &self,
        route: Arc<Route>,
        request: Request<Body>,
    ) -> Response<Body> {
        let routes = self.0.routes.clone();
        let Some((codec, streaming)) =
            Codec::of(request.headers()).filter(|(_, streaming)| *streaming == route.streaming)
        else {
            return unsupported(&route);
        };
        match self.connected(&route, codec, request).await {
            Ok(answer) if streaming => stream(routes, route, codec, answer),
            Ok(answer) => unary(&routes, &route, codec, answer).await,
            Err(status) if streaming => {
                let mut body = Vec::new();
                end(&routes.mapping, &status, &HeaderMap::new(), &mut body);
                respond(StatusCode::OK, codec.stream_type(), body)
            }
            Err(status) => failure(&routes.mapping, &status),
        }
    }

    async fn connected(
        &self,
        route: &Route,
        codec: Codec,
        request: Request<Body>,
    ) -> std::result::Result<Response<Guarded>, Status> {
        let (parts, body) = request.into_parts();
        check(&parts.headers, route.streaming)?;
        let mut metadata = call::metadata(&parts.headers)?;
        call::take_connect_timeout(&parts.headers, &mut metadata)?;
        let body = self.gather(body).await.map_err(|(status, _)| status)?;
        let message = if route.streaming { opened(&body)? } else { &body };
        let message = codec.read(&self.0.routes.mapping, route.input, message)?;
        let request: Request<Full<Bytes>> =
            call::request(&route.path, &message, metadata, parts.extensions)?;
        Ok(self.0.calls.call(request).await)
    }
}

/// What of the headers cannot be followed.
fn check(headers: &HeaderMap, streaming: bool) -> Result<()> {
    if headers.get("connect-protocol-version").is_some_and(|version| version != "1") {
        return Err(Error::invalid("connect-protocol-version", "must be 1"));
    }
    let name = if streaming { "connect-content-encoding" } else { "content-encoding" };
    match headers.get(name) {
        Some(encoding) if encoding != "identity" => Err(compressed()),
        _ => Ok(()),
    }
}

fn compressed() -> Error {
    let message = "requests may not be compressed here; the supported encoding is `identity`";
    Error::new(Kind::Unimplemented, Reason::Unimplemented, message)
}

/// The one message that a client sends to a server stream.
fn opened(body: &[u8]) -> Result<&[u8]> {
    let wrong = || Error::invalid("body", "must be one message in its envelope");
    let (prefix, message) = body.split_first_chunk::<PREFIX>().ok_or_else(wrong)?;
    let [flags, length @ ..] = *prefix;
    if flags & COMPRESSED != 0 {
        return Err(compressed());
    }
    if flags != 0 || u32::from_be_bytes(length) as usize != message.len() {
        return Err(wrong());
    }
    Ok(message)
}

/// Appends an envelope and what `write` puts into it; nothing when that fails.
fn envelope(
    flags: u8,
    out: &mut Vec<u8>,
    write: impl FnOnce(&mut Vec<u8>) -> Result<()>,
) -> Result<()> {
    let start = out.len();
    out.extend_from_slice(&[flags, 0, 0, 0, 0]);
    if let Err(error) = write(out) {
        out.truncate(start);
        return Err(error);
    }
    let length = u32::try_from(out.len() - start - PREFIX).map_err(Error::internal)?;
    out[start + 1..start + PREFIX].copy_from_slice(&length.to_be_bytes());
    Ok(())
}

/// Appends the envelope that ends a stream.
fn end(mapping: &Mapping, status: &Status, trailers: &HeaderMap, out: &mut Vec<u8>) {
    let mut last = serde_json::Map::new();
    if status.code() != Code::Ok {
        last.insert("error".into(), error_json(mapping, status));
    }
    let mut metadata = serde_json::Map::new();
    for name in trailers.keys().filter(|name| is_metadata(name)) {
        let values = trailers.get_all(name).iter().filter_map(|value| value.to_str().ok());
        metadata.insert(name.to_string(), values.collect());
    }
    if !metadata.is_empty() {
        last.insert("metadata".into(), metadata.into());
    }
    // What was just put together is far from the limit of a length.
    let _written = envelope(END, out, |out| {
        out.extend_from_slice(Value::Object(last).to_string().as_bytes());
        Ok(())
    });
}

/// The answer to a streaming call: its errors come in the last envelope, always.
fn stream(
    routes: Arc<Routes>,
    route: Arc<Route>,
    codec: Codec,
    answer: Response<Guarded>,
) -> Response<Body> {
    let (head, body) = answer.into_parts();
    let mut envelopes = Envelopes {
        routes,
        route,
        codec,
        answers: body,
        partial: BytesMut::new(),
        out: Vec::new(),
        done: false,
    };
    if let Some(status) = answer::error(&head.headers) {
        envelopes.finish(&status, &head.headers);
    }
    let mut response = Response::new(Body::new(envelopes));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(codec.stream_type()));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    answer::copy_metadata(&head.headers, headers);
    response
}

/// The body of a streaming answer.
struct Envelopes {
    routes: Arc<Routes>,
    route: Arc<Route>,
    codec: Codec,
    answers: Guarded,
    /// The beginning of a message whose rest has not come yet.
    partial: BytesMut,
    out: Vec<u8>,
    done: bool,
}

impl Envelopes {
    /// Writes the whole messages in what came of the gRPC answer.
    fn take(&mut self, data: &[u8]) -> Result<()> {
        self.partial.extend_from_slice(data);
        while let Some((prefix, rest)) = self.partial.split_first_chunk::<PREFIX>() {
            let [_, length @ ..] = *prefix;
            let length = u32::from_be_bytes(length) as usize;
            let Some(message) = rest.get(..length) else { break };
            envelope(0, &mut self.out, |out| {
                self.codec.write(&self.routes.mapping, self.route.output, message, out)
            })?;
            self.partial.advance(PREFIX + length);
        }
        Ok(())
    }

    fn finish(&mut self, status: &Status, trailers: &HeaderMap) {
        end(&self.routes.mapping, status, trailers, &mut self.out);
        self.done = true;
    }
}

impl http_body::Body for Envelopes {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<std::result::Result<Frame<Bytes>, Infallible>>> {
        let this = &mut *self;
        loop {
            if !this.out.is_empty() {
                return Poll::Ready(Some(Ok(Frame::data(std::mem::take(&mut this.out).into()))));
            }
            if this.done {
                return Poll::Ready(None);
            }
            let none = HeaderMap::new();
            match ready!(Pin::new(&mut this.answers).poll_frame(cx)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => {
                        if let Err(error) = this.take(&data) {
                            this.finish(&error.into(), &none);
                        }
                    }
                    Err(frame) => {
                        let trailers = frame.into_trailers().unwrap_or_default();
                        let status = Status::from_header_map(&trailers);
                        this.finish(&status.unwrap_or_else(|| Status::ok("")), &trailers);
                    }
                },
                Some(Err(status)) => this.finish(&status, &none),
                None => this.finish(&Status::ok(""), &none),
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.done && self.out.is_empty()
    }
}

async fn unary(
    routes: &Routes,
    route: &Route,
    codec: Codec,
    answer: Response<Guarded>,
) -> Response<Body> {
    let (head, body) = answer.into_parts();
    let mapping = &routes.mapping;
    let (message, trailers) = match answer::error(&head.headers) {
        Some(status) => return with_trailers(failure(mapping, &status), &head.headers),
        None => match answer::collect(body).await {
            Ok(collected) => collected,
            Err(status) => return failure(mapping, &status),
        },
    };
    let mut response = if let Some(status) = answer::error(&trailers) {
        failure(mapping, &status)
    } else {
        let mut written = Vec::with_capacity(message.len() * 2);
        match codec.write(mapping, route.output, &message, &mut written) {
            Ok(()) => respond(StatusCode::OK, codec.unary_type(), written),
            Err(error) => failure(mapping, &error.into()),
        }
    };
    answer::copy_metadata(&head.headers, response.headers_mut());
    with_trailers(response, &trailers)
}

/// Trailers of a unary answer are headers with a prefix.
fn with_trailers(mut response: Response<Body>, trailers: &HeaderMap) -> Response<Body> {
    for (name, value) in trailers.iter().filter(|(name, _)| is_metadata(name)) {
        if let Ok(name) = HeaderName::try_from(format!("trailer-{name}")) {
            response.headers_mut().append(name, value.clone());
        }
    }
    response
}

/// An error in place of a unary answer: JSON, whatever the codec is.
fn failure(mapping: &Mapping, status: &Status) -> Response<Body> {
    let json = error_json(mapping, status).to_string();
    respond(http_status(status.code()), Codec::Json.unary_type(), json.into_bytes())
}

fn respond(code: StatusCode, kind: &'static str, body: Vec<u8>) -> Response<Body> {
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = code;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

/// A content type that the method has not.
fn unsupported(route: &Route) -> Response<Body> {
    let accepted = if route.streaming {
        "application/connect+json, application/connect+proto"
    } else {
        "application/json, application/proto"
    };
    let code = StatusCode::UNSUPPORTED_MEDIA_TYPE;
    let text = format!("the content type must be one of {accepted}\n");
    let mut response = respond(code, "text/plain", text.into_bytes());
    response.headers_mut().insert("accept-post", HeaderValue::from_static(accepted));
    response
}

/// An error as the protocol writes it.
fn error_json(mapping: &Mapping, status: &Status) -> Value {
    let code = match status.code() {
        Code::Cancelled => "canceled".to_owned(),
        code => code_name(code).to_ascii_lowercase(),
    };
    let full = pb::google::rpc::Status::decode(status.details()).unwrap_or_default();
    let details: Vec<_> = full
        .details
        .iter()
        .map(|any| {
            let name = any.type_url.rsplit('/').next().unwrap_or_default();
            let value = STANDARD_NO_PAD.encode(&any.value);
            match debug(mapping, name, &any.value) {
                Some(debug) => json!({"type": name, "value": value, "debug": debug}),
                None => json!({"type": name, "value": value}),
            }
        })
        .collect();
    json!({"code": code, "message": status.message(), "details": details})
}

/// A detail as people read it.
fn debug(mapping: &Mapping, name: &str, value: &[u8]) -> Option<Value> {
    let mut json = Vec::new();
    mapping.write(mapping.find(name)?, value, &mut json).ok()?;
    serde_json::from_slice(&json).ok()
}
