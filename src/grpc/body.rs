//! Bodies with limits: a request must arrive in time, and a response stream ends when its
//! deadline, its credential or the server ends.

use std::{
    future::Future as _,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    time::Duration,
};

use bytes::Bytes;
use futures_util::task::AtomicWaker;
use http::HeaderMap;
use http_body::{Frame, SizeHint};
use tokio::time::Sleep;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::{Code, Status, body::Body};
use tracing::Span;

use super::calls::Calls;
use crate::{
    error::{Error, Kind, Reason},
    telemetry::RpcLabels,
};

/// A request's body that must be complete within a time, or that must go on within a time.
pub(super) struct Arriving<B> {
    inner: B,
    allowed: Duration,
    sleep: Option<Pin<Box<Sleep>>>,
    /// Whether each piece has the time anew.
    long: bool,
}

impl<B> Arriving<B> {
    pub(super) fn new(inner: B, allowed: Duration) -> Self {
        Self { inner, allowed, sleep: None, long: false }
    }

    /// A body of any length, of which something must come within the time.
    pub(super) fn long(inner: B, allowed: Duration) -> Self {
        Self { inner, allowed, sleep: None, long: true }
    }
}

impl<B> http_body::Body for Arriving<B>
where
    B: http_body::Body<Data = Bytes> + Unpin,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    type Data = Bytes;
    type Error = Box<dyn std::error::Error + Send + Sync>;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let this = &mut *self;
        if let Poll::Ready(frame) = Pin::new(&mut this.inner).poll_frame(cx) {
            if this.long {
                this.sleep = None;
            }
            return Poll::Ready(frame.map(|frame| frame.map_err(Into::into)));
        }
        // The clock starts when something is missing: most requests arrive with their head.
        let allowed = this.allowed;
        let sleep = this.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep(allowed)));
        sleep.as_mut().poll(cx).map(|()| {
            let error = Error::new(
                Kind::DeadlineExceeded,
                Reason::CallDeadline,
                "the request did not arrive in time",
            );
            Some(Err(Box::new(Status::from(error)).into()))
        })
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// Counts a call once, when it ends in whatever way.
pub(super) struct Record {
    pub(super) calls: Calls,
    pub(super) method: &'static str,
    pub(super) span: Span,
    /// A stream of answers to one request.
    pub(super) one_way: bool,
    pub(super) code: Option<Code>,
}

impl Drop for Record {
    fn drop(&mut self) {
        // Without a code the client went away.
        let code = code_name(self.code.unwrap_or(Code::Cancelled));
        self.calls.metrics().rpcs.get_or_create(&RpcLabels { method: self.method, code }).inc();
        tracing::debug!(parent: &self.span, code, "call ended");
    }
}

/// Holds a place under a limit.
pub(super) struct Permit(pub(super) prometheus_client::metrics::gauge::Gauge);

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// Why a response stream may be ended from outside.
pub(super) struct Ending {
    pub(super) deadline: Option<Pin<Box<Sleep>>>,
    /// End of the credential by its own time.
    pub(super) expiry: Option<Pin<Box<Sleep>>>,
    /// Completes when the credential is revoked.
    revocation: Pin<Box<WaitForCancellationFutureOwned>>,
    /// Completes when the server stops.
    stop: Pin<Box<WaitForCancellationFutureOwned>>,
    alarm: Arc<Alarm>,
}

/// Wakes the stream when one of its endings may have come. Almost no poll of a stream is about
/// those, and to ask each of them would cost more than a token does.
struct Alarm {
    rung: AtomicBool,
    stream: AtomicWaker,
}

impl Wake for Alarm {
    fn wake(self: Arc<Self>) {
        self.rung.store(true, Ordering::Release);
        self.stream.wake();
    }
}

impl Ending {
    pub(super) fn new(revoked: CancellationToken, stopping: CancellationToken) -> Self {
        Self {
            deadline: None,
            expiry: None,
            revocation: Box::pin(revoked.cancelled_owned()),
            stop: Box::pin(stopping.cancelled_owned()),
            // Each is asked once, to be told of it later.
            alarm: Arc::new(Alarm { rung: AtomicBool::new(true), stream: AtomicWaker::new() }),
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Error> {
        self.alarm.stream.register(cx.waker());
        if !self.alarm.rung.load(Ordering::Acquire) {
            return Poll::Pending;
        }
        // Before they are asked: what rings while they are is asked again.
        self.alarm.rung.store(false, Ordering::Release);
        let alarm = Waker::from(self.alarm.clone());
        let cx = &mut Context::from_waker(&alarm);
        let sleeping = |sleep: &mut Option<Pin<Box<Sleep>>>, cx: &mut Context<'_>| {
            sleep.as_mut().is_some_and(|sleep| sleep.as_mut().poll(cx).is_ready())
        };
        if self.revocation.as_mut().poll(cx).is_ready() || sleeping(&mut self.expiry, cx) {
            Poll::Ready(credential_ended())
        } else if sleeping(&mut self.deadline, cx) {
            Poll::Ready(deadline_passed())
        } else if self.stop.as_mut().poll(cx).is_ready() {
            Poll::Ready(stopping())
        } else {
            Poll::Pending
        }
    }
}

pub(super) fn deadline_passed() -> Error {
    Error::new(
        Kind::DeadlineExceeded,
        Reason::CallDeadline,
        "the deadline of the call passed; the work it asked for may go on",
    )
}

pub(super) fn stopping() -> Error {
    Error::new(Kind::Unavailable, Reason::NotServing, "the server is shutting down")
        .retry_after(Duration::from_secs(1))
}

fn credential_ended() -> Error {
    Error::new(
        Kind::Unauthenticated,
        Reason::Unauthenticated,
        "the credential was revoked or has expired",
    )
}

/// A response's body, watched to its end.
pub struct Guarded {
    inner: Body,
    ending: Option<Ending>,
    record: Option<Record>,
    _permit: Option<Permit>,
    /// Polls are in the span of the call. Of a stream that only passes on what others made, the
    /// first is: entering the span for each token costs more than the token's own way.
    in_span: bool,
    done: bool,
}

impl Guarded {
    /// A body that needs no watching.
    pub(super) fn plain(inner: Body) -> Self {
        Self { inner, ending: None, record: None, _permit: None, in_span: false, done: false }
    }

    pub(super) fn new(
        inner: Body,
        ending: Option<Ending>,
        record: Record,
        permit: Option<Permit>,
    ) -> Self {
        Self { inner, ending, record: Some(record), _permit: permit, in_span: true, done: false }
    }

    /// Ends the call with `error`; nothing more comes from the handler.
    fn finish(&mut self, error: Error) -> Frame<Bytes> {
        let mut trailers = HeaderMap::new();
        let status = Status::from(error);
        self.note(status.code());
        write(&status, &mut trailers);
        self.done = true;
        self.inner = Body::empty();
        self.ending = None;
        Frame::trailers(trailers)
    }

    fn note(&mut self, code: Code) {
        if let Some(record) = &mut self.record {
            record.code = Some(code);
        }
        self.record = None;
    }
}

impl http_body::Body for Guarded {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        if this.done {
            return Poll::Ready(None);
        }
        // Before the handler, which may always have something.
        if let Some(Poll::Ready(error)) = this.ending.as_mut().map(|ending| ending.poll(cx)) {
            return Poll::Ready(Some(Ok(this.finish(error))));
        }
        let Self { inner, record, in_span, .. } = this;
        let polled = {
            let watched = record.as_ref().filter(|_| *in_span);
            let _entered = watched.map(|record| record.span.enter());
            *in_span = record.as_ref().is_some_and(|record| !record.one_way);
            catch_unwind(AssertUnwindSafe(|| Pin::new(inner).poll_frame(cx)))
        };
        match polled {
            Err(panic) => {
                if let Some(record) = &this.record {
                    record.calls.supervisor().panicked(record.method, panic.as_ref());
                    record.calls.metrics().panics.inc();
                }
                Poll::Ready(Some(Ok(this.finish(Error::internal("a stream panicked")))))
            }
            Ok(Poll::Ready(Some(Ok(frame)))) if frame.is_trailers() => {
                let Ok(trailers) = frame.into_trailers() else { return Poll::Ready(None) };
                let trailers = normalise(trailers);
                let code = read_code(&trailers).unwrap_or(Code::Unknown);
                if let Some(record) = this.record.as_ref().filter(|_| !this.in_span)
                    && matches!(code, Code::Internal | Code::Unknown | Code::DataLoss)
                {
                    // The cause was logged before, without the call that it hit.
                    let code = code_name(code);
                    tracing::error!(parent: &record.span, code, "a stream failed");
                }
                this.note(code);
                this.done = true;
                Poll::Ready(Some(Ok(Frame::trailers(trailers))))
            }
            Ok(Poll::Ready(None)) => {
                this.note(Code::Ok);
                this.done = true;
                Poll::Ready(None)
            }
            Ok(polled) => polled,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.done || self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// The code in headers or trailers, where there is one.
pub(super) fn read_code(headers: &HeaderMap) -> Option<Code> {
    headers.get(Status::GRPC_STATUS).map(|value| Code::from_bytes(value.as_bytes()))
}

fn write(status: &Status, headers: &mut HeaderMap) {
    if status.add_header(headers).is_err() {
        // Percent-encoded text and base64 are always header values; a code alone is enough.
        headers.insert(Status::GRPC_STATUS, http::HeaderValue::from_static("13"));
    }
}

/// Gives errors that did not come from this crate, such as the codec's, their place in the
/// table of reasons.
pub(super) fn normalise(mut headers: HeaderMap) -> HeaderMap {
    match read_code(&headers) {
        None | Some(Code::Ok) => return headers,
        Some(_) => {}
    }
    if headers.contains_key(Status::GRPC_STATUS_DETAILS) {
        return headers;
    }
    let Some(foreign) = Status::from_header_map(&headers) else { return headers };
    let message = foreign.message();
    let error = match foreign.code() {
        Code::OutOfRange if message.contains("message length too large") => {
            let limit = message.rsplit("limit is: ").next().unwrap_or_default();
            let limit = limit.trim_end_matches(" bytes").to_owned();
            Error::new(
                Kind::ResourceExhausted,
                Reason::MessageTooLarge,
                "the message is larger than the limit; large bodies belong in artifacts",
            )
            .with("limit_bytes", limit)
        }
        Code::Internal
            if message.contains("decode Protobuf message")
                || message.contains("Missing request message")
                || message.contains("compression flag")
                || message.contains("nexpected EOF") =>
        {
            Error::new(
                Kind::InvalidArgument,
                Reason::InvalidParams,
                "the request is not a message of the type that the method takes",
            )
        }
        Code::Unimplemented => Error::new(Kind::Unimplemented, Reason::Unimplemented, message),
        Code::NotFound => Error::new(Kind::NotFound, Reason::NotFound, message),
        Code::Internal | Code::Unknown => Error::internal(message.to_owned()),
        _ => return headers,
    };
    for name in [Status::GRPC_STATUS, Status::GRPC_MESSAGE, Status::GRPC_STATUS_DETAILS] {
        headers.remove(name);
    }
    write(&Status::from(error), &mut headers);
    headers
}

/// Name of a code as gRPC writes it.
pub fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}
