//! The answers of a server-streaming call as server-sent events, as lines of JSON, or as one
//! JSON array. Every answer that is ready goes out in one chunk. An answer that has a
//! [twin] is made an event once for all who read it, in whatever form.

use std::{
    future::poll_fn,
    ops::Range,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::body::Body;
use bytes::{Buf as _, Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use http_body::{Body as _, Frame};
use prometheus_client::metrics::counter::Counter;
use tokio::time::{Instant, Sleep};
use tonic::{Code, Status};

use super::{
    answer,
    call::PREFIX,
    mapping::{
        Unwritable,
        wire::{self, Value},
    },
    route::{Events, Route, Routes},
};
use crate::{
    error::Error,
    grpc::Guarded,
    twin::{self, Offer},
};

/// Proxies close connections on which nothing happens, some after 30 s.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// How long a browser waits before it connects again.
const RETRY: &[u8] = b"retry: 2000\n\n";

/// What the line of an event's JSON begins with.
const DATA: &[u8] = b"data: ";

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

/// How the answers of one call are written.
pub struct Style {
    /// What the call is to.
    pub route: Arc<Route>,
    /// How answers are written.
    pub form: Form,
    /// A browser came back by itself.
    pub resumed: bool,
    /// Counts answers that were encoded.
    pub encoded: Counter,
}

/// The response to a streaming call.
pub async fn response(
    routes: Arc<Routes>,
    style: Style,
    answer: Response<Guarded>,
) -> Response<Body> {
    let Style { route, form, resumed, encoded } = style;
    let (head, mut body) = answer.into_parts();
    if let Some(refusal) = answer::refused(&routes, &head.headers) {
        return refusal;
    }
    let (mut first, mut offers) = (None, Vec::new());
    let peek = poll_fn(|cx| twin::collect(&mut offers, || Pin::new(&mut body).poll_frame(cx)));
    if resumed && let Ok(frame) = tokio::time::timeout(PEEK, peek).await {
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
        writer: Writer { routes, route, form, wrote: false, encoded, event: Vec::new() },
        answers: body,
        offers,
        partial: BytesMut::new(),
        out: Out::default(),
        spoken: Instant::now(),
        idle: Box::pin(tokio::time::sleep(KEEP_ALIVE)),
        done: false,
    };
    match form {
        Form::Events => chunks.out.joined().extend_from_slice(RETRY),
        Form::Array => chunks.out.joined().push(b'['),
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
    encoded: Counter,
    /// Where events are made.
    event: Vec<u8>,
}

impl Writer {
    /// Writes an answer; `offer` has it as an event if somebody made that before, or has it for
    /// others.
    fn message(
        &mut self,
        message: &[u8],
        offer: Option<&Offer>,
        out: &mut Out,
    ) -> Result<(), Error> {
        // A part of the answer is not what others want.
        let shared = offer.filter(|_| self.route.response_body.is_none()).and_then(|offer| {
            offer.encoding(|message| {
                self.make(message).ok()?;
                Some(Bytes::copy_from_slice(&self.event))
            })
        });
        if shared.is_none() {
            self.make(message).map_err(Error::internal)?;
        }
        if std::mem::replace(&mut self.wrote, true) && self.form == Form::Array {
            out.joined().push(b',');
        }
        if let Some(event) = shared {
            let wanted = self.wanted(&event);
            out.push(event.slice(wanted));
        } else {
            let wanted = self.wanted(&self.event);
            out.joined().extend_from_slice(&self.event[wanted]);
        }
        Ok(())
    }

    /// Makes an answer an event; the other forms are parts of it.
    fn make(&mut self, message: &[u8]) -> Result<(), Unwritable> {
        let (mapping, route, event) = (&self.routes.mapping, &self.route, &mut self.event);
        self.encoded.inc();
        event.clear();
        open(&route.events, message, event);
        match route.response_body {
            Some(at) => {
                let field = &mapping.message(route.output).fields[at];
                mapping.write_field(field, message, event)?;
            }
            None => mapping.write(route.output, message, event)?,
        }
        event.extend_from_slice(b"\n\n");
        Ok(())
    }

    /// What of an event belongs into this form.
    fn wanted(&self, event: &[u8]) -> Range<usize> {
        let after = match self.form {
            Form::Events => return 0..event.len(),
            Form::Lines => b"\n".len(),
            Form::Array => 0,
        };
        let lines = event.split_inclusive(|byte| *byte == b'\n');
        let before = lines.take_while(|line| !line.starts_with(DATA));
        let from = before.map(<[u8]>::len).sum::<usize>() + DATA.len();
        from..event.len() - b"\n\n".len() + after
    }

    /// The end of the stream: nothing follows.
    fn end(&mut self, status: &Status, out: &mut Out) {
        let out = out.joined();
        if status.code() != Code::Ok {
            let json = answer::status_json(&self.routes, status);
            let (before, after): (&[u8], &[u8]) = match self.form {
                Form::Events => (b"event: error\ndata: ", b"\n\n"),
                Form::Lines => (b"{\"error\":", b"}\n"),
                Form::Array if self.wrote => (b",{\"error\":", b"}"),
                Form::Array => (b"{\"error\":", b"}"),
            };
            out.extend_from_slice(before);
            out.extend_from_slice(&json);
            out.extend_from_slice(after);
        }
        if self.form == Form::Array {
            out.push(b']');
        }
    }
}

/// Writes what comes before the JSON of an event.
pub fn open(events: &Events, message: &[u8], out: &mut Vec<u8>) {
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
    out.extend_from_slice(DATA);
}

/// What is to be sent next. An event that goes alone is sent as it was made for all its readers.
#[derive(Default)]
struct Out {
    alone: Bytes,
    joined: Vec<u8>,
}

impl Out {
    fn is_empty(&self) -> bool {
        self.alone.is_empty() && self.joined.is_empty()
    }

    fn push(&mut self, bytes: Bytes) {
        if self.is_empty() {
            self.alone = bytes;
        } else {
            self.joined().extend_from_slice(&bytes);
        }
    }

    /// For more behind what is there.
    fn joined(&mut self) -> &mut Vec<u8> {
        let alone = std::mem::take(&mut self.alone);
        self.joined.extend_from_slice(&alone);
        &mut self.joined
    }

    fn take(&mut self) -> Bytes {
        if self.joined.is_empty() {
            return std::mem::take(&mut self.alone);
        }
        std::mem::take(&mut self.joined).into()
    }
}

/// A response's body.
struct Chunks {
    writer: Writer,
    answers: Guarded,
    /// What the messages of the last poll offered, in their order.
    offers: Vec<Offer>,
    /// The beginning of a message whose rest has not come yet.
    partial: BytesMut,
    out: Out,
    /// When the last chunk went out.
    spoken: Instant,
    /// Set for some time before the next sign of life is due: moving a timer for every chunk would
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

    /// Takes whole messages off the front. All of them were encoded in the last poll, or before
    /// it and have no offer.
    fn take_whole(&mut self, data: &mut Bytes) {
        let Self { writer, offers, out, .. } = self;
        let mut offers = offers.drain(..).peekable();
        let mut written = Ok(());
        while let Some((prefix, rest)) = data.split_at_checked(PREFIX)
            && written.is_ok()
        {
            let length = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]) as usize;
            let Some(message) = rest.get(..length) else { break };
            let offer = offers.next_if(|offer| offer.message() == message);
            written = writer.message(message, offer.as_ref(), out);
            data.advance(PREFIX + length);
        }
        drop(offers);
        if let Err(error) = written {
            data.clear();
            self.finish(&error.into());
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
                let chunk = this.out.take();
                this.spoken = Instant::now();
                return Poll::Ready(Some(Ok(Frame::data(chunk))));
            }
            if this.done {
                return Poll::Ready(None);
            }
            let Self { answers, offers, .. } = this;
            match twin::collect(offers, || Pin::new(answers).poll_frame(cx)) {
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
                    if this.idle.as_mut().poll(cx).is_pending() {
                        return Poll::Pending;
                    }
                    let due = this.spoken + KEEP_ALIVE;
                    if due <= Instant::now() {
                        this.out.joined().extend_from_slice(match this.writer.form {
                            Form::Events => b": keep-alive\n\n",
                            // An empty line, and space between two elements.
                            Form::Lines | Form::Array => b"\n",
                        });
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
