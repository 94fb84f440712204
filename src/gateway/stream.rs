//! The answers of a server-streaming call as server-sent events, as lines of JSON, or as one
//! JSON array. Every answer that is ready goes out in one chunk.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::body::Body;
use bytes::{Buf as _, Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use http_body::Frame;
use http_body_util::BodyExt as _;
use tokio::time::{Instant, Sleep};
use tonic::{Code, Status};

use super::{
    answer,
    call::PREFIX,
    mapping::wire::{self, Value},
    route::{Route, Routes},
};
use crate::{error::Error, grpc::Guarded};

/// Proxies close connections on which nothing happens, some after 30 s.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// How long a browser waits before it connects again.
const RETRY: &[u8] = b"retry: 2000\n\n";

/// A stream that a browser resumes ends at once when it has ended before. It is looked at this
/// long, to tell the browser by 204 that it need not come again.
const PEEK: Duration = Duration::from_millis(250);

/// How answers are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// `text/event-stream`.
    Events,
    /// `application/x-ndjson`.
    Lines,
    /// `application/json`.
    Array,
}

impl Form {
    /// The form that a request accepts, events where it does not mind; `None` where it accepts
    /// none.
    pub fn accepted(headers: &HeaderMap) -> Option<Self> {
        let mut best: Option<(f32, Self)> = None;
        let mut any = false;
        for value in headers.get_all(header::ACCEPT) {
            for range in value.to_str().unwrap_or_default().split(',') {
                let mut parts = range.split(';').map(str::trim);
                let kind = parts.next().unwrap_or_default().to_ascii_lowercase();
                if kind.is_empty() {
                    continue;
                }
                any = true;
                let weight = parts.find_map(|part| part.strip_prefix("q=")?.parse().ok());
                let weight: f32 = weight.unwrap_or(1.0);
                let form = match &*kind {
                    "*/*" | "text/*" | "text/event-stream" => Self::Events,
                    "application/x-ndjson" | "application/jsonl" | "application/x-jsonlines" => {
                        Self::Lines
                    }
                    "application/json" | "application/*" => Self::Array,
                    _ => continue,
                };
                if weight > 0.0 && best.is_none_or(|(best, _)| weight > best) {
                    best = Some((weight, form));
                }
            }
        }
        if any { best.map(|(_, form)| form) } else { Some(Self::Events) }
    }

    fn content_type(self) -> HeaderValue {
        HeaderValue::from_static(match self {
            Self::Events => "text/event-stream",
            Self::Lines => "application/x-ndjson",
            Self::Array => "application/json",
        })
    }
}

/// The response to a streaming call. `resumed` says that a browser came back by itself.
pub async fn response(
    routes: Arc<Routes>,
    route: Arc<Route>,
    form: Form,
    answer: Response<Guarded>,
    resumed: bool,
) -> Response<Body> {
    let (head, mut body) = answer.into_parts();
    if let Some(refusal) = answer::refused(&routes, &head.headers) {
        return refusal;
    }
    let mut first = None;
    if resumed && let Ok(frame) = tokio::time::timeout(PEEK, body.frame()).await {
        match frame {
            None => return ended(),
            Some(Err(status)) => return answer::failure(&routes, &status),
            Some(Ok(frame)) => match frame.into_data() {
                Ok(data) => first = Some(data),
                Err(frame) => {
                    let trailers = frame.into_trailers().unwrap_or_default();
                    return answer::refused(&routes, &trailers).unwrap_or_else(ended);
                }
            },
        }
    }
    let mut chunks = Chunks {
        writer: Writer { routes, route, form, wrote: false },
        answers: body,
        partial: BytesMut::new(),
        out: Vec::new(),
        spoken: Instant::now(),
        idle: Box::pin(tokio::time::sleep(KEEP_ALIVE)),
        done: false,
    };
    match form {
        Form::Events => chunks.out.extend_from_slice(RETRY),
        Form::Array => chunks.out.push(b'['),
        Form::Lines => {}
    }
    if let Some(data) = first {
        chunks.take(data);
    }
    let mut response = Response::new(Body::new(chunks));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, form.content_type());
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    answer::copy_metadata(&head.headers, headers);
    response
}

/// Tells a browser that there is nothing to come back for.
fn ended() -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::NO_CONTENT;
    response
}

/// Writes answers in a form.
struct Writer {
    routes: Arc<Routes>,
    route: Arc<Route>,
    form: Form,
    /// Whether there was an answer yet.
    wrote: bool,
}

impl Writer {
    fn message(&mut self, message: &[u8], out: &mut Vec<u8>) -> Result<(), Error> {
        let before = out.len();
        self.open(message, out);
        let (mapping, route) = (&self.routes.mapping, &self.route);
        let written = match route.response_body {
            Some(at) => {
                mapping.write_field(&mapping.message(route.output).fields[at], message, out)
            }
            None => mapping.write(route.output, message, out),
        };
        if let Err(error) = written {
            out.truncate(before);
            return Err(Error::internal(error));
        }
        self.close(out);
        Ok(())
    }

    /// What comes before the JSON of an answer.
    fn open(&self, message: &[u8], out: &mut Vec<u8>) {
        match self.form {
            Form::Array if self.wrote => out.push(b','),
            Form::Lines | Form::Array => {}
            Form::Events => {
                let events = &self.route.events;
                let (mut id, mut name, mut mixed) = (None, None, false);
                for found in wire::fields(message).flatten() {
                    let number = Some(found.number);
                    mixed |= number == events.stream;
                    if number == events.id {
                        id = Some(found.value);
                    }
                    let named = events.names.iter().find(|(number, _)| *number == found.number);
                    name = named.map(|(_, name)| name).or(name);
                }
                match id.filter(|_| !mixed) {
                    Some(Value::Varint(id)) => {
                        out.extend_from_slice(b"id: ");
                        out.extend_from_slice(itoa::Buffer::new().format(id).as_bytes());
                        out.push(b'\n');
                    }
                    // A line break or NUL would end the id or void it.
                    Some(Value::Bytes(id)) if id.iter().all(|byte| *byte >= b' ') => {
                        out.extend_from_slice(b"id: ");
                        out.extend_from_slice(id);
                        out.push(b'\n');
                    }
                    _ => {}
                }
                if let Some(name) = name {
                    out.extend_from_slice(b"event: ");
                    out.extend_from_slice(name.as_bytes());
                    out.push(b'\n');
                }
                out.extend_from_slice(b"data: ");
            }
        }
    }

    fn close(&mut self, out: &mut Vec<u8>) {
        self.wrote = true;
        match self.form {
            Form::Events => out.extend_from_slice(b"\n\n"),
            Form::Lines => out.push(b'\n'),
            Form::Array => {}
        }
    }

    /// The end of the stream: nothing follows.
    fn end(&mut self, status: &Status, out: &mut Vec<u8>) {
        if status.code() != Code::Ok {
            let json = answer::status_json(&self.routes, status);
            if self.form == Form::Events {
                out.extend_from_slice(b"event: error\ndata: ");
                out.extend_from_slice(&json);
            } else {
                if self.form == Form::Array && self.wrote {
                    out.push(b',');
                }
                out.extend_from_slice(b"{\"error\":");
                out.extend_from_slice(&json);
                out.push(b'}');
            }
            self.close(out);
        }
        if self.form == Form::Array {
            out.push(b']');
        }
    }
}

/// A response's body.
struct Chunks {
    writer: Writer,
    answers: Guarded,
    /// The beginning of a message whose rest has not come yet.
    partial: BytesMut,
    out: Vec<u8>,
    /// When the last chunk went out.
    spoken: Instant,
    /// Set for some time before the next comment is due: moving a timer for every chunk would
    /// cost more than the chunk.
    idle: Pin<Box<Sleep>>,
    done: bool,
}

impl Chunks {
    /// Writes the messages in a piece of the gRPC answer.
    fn take(&mut self, data: Bytes) {
        if !self.partial.is_empty() {
            self.partial.extend_from_slice(&data);
            let mut joined = self.partial.split().freeze();
            self.take_whole(&mut joined);
            self.partial.extend_from_slice(&joined);
            return;
        }
        let mut data = data;
        self.take_whole(&mut data);
        self.partial.extend_from_slice(&data);
    }

    /// Takes whole messages off the front.
    fn take_whole(&mut self, data: &mut Bytes) {
        while let Some((prefix, rest)) = data.split_at_checked(PREFIX) {
            let length = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]) as usize;
            let Some(message) = rest.get(..length) else { return };
            if let Err(error) = self.writer.message(message, &mut self.out) {
                self.finish(&error.into());
                data.clear();
                return;
            }
            data.advance(PREFIX + length);
        }
    }

    fn finish(&mut self, status: &Status) {
        self.writer.end(status, &mut self.out);
        self.done = true;
    }
}

impl http_body::Body for Chunks {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let this = &mut *self;
        loop {
            if !this.out.is_empty() {
                let chunk = Bytes::from(std::mem::take(&mut this.out));
                this.spoken = Instant::now();
                return Poll::Ready(Some(Ok(Frame::data(chunk))));
            }
            if this.done {
                return Poll::Ready(None);
            }
            match Pin::new(&mut this.answers).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) => this.take(data),
                    Err(frame) => {
                        let trailers = frame.into_trailers().unwrap_or_default();
                        let status = Status::from_header_map(&trailers);
                        this.finish(&status.unwrap_or_else(|| Status::ok("")));
                    }
                },
                Poll::Ready(Some(Err(status))) => this.finish(&status),
                Poll::Ready(None) => this.finish(&Status::ok("")),
                Poll::Pending => {
                    if this.writer.form != Form::Events || this.idle.as_mut().poll(cx).is_pending()
                    {
                        return Poll::Pending;
                    }
                    let due = this.spoken + KEEP_ALIVE;
                    if due <= Instant::now() {
                        this.out.extend_from_slice(b": keep-alive\n\n");
                        this.idle.as_mut().reset(Instant::now() + KEEP_ALIVE);
                    } else {
                        this.idle.as_mut().reset(due);
                    }
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.done && self.out.is_empty()
    }
}
