//! A handler at work: bounded by a deadline, finished even when nobody waits for it any more,
//! and alone in its panic.

use std::{
    convert::Infallible,
    future::Future,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    pin::Pin,
    task::{Context, Poll},
};

use futures_util::future::BoxFuture;
use http::Response;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tracing::Instrument as _;

use super::body::{Permit, deadline_passed, stopping};
use crate::{
    error::Error,
    faults::{self, Fault},
    supervisor::Supervisor,
};

/// What a generated server answers with.
pub(super) type Reply = BoxFuture<'static, Result<Response<Body>, Infallible>>;

/// Why there is no response.
pub(super) enum Failed {
    Error(Error),
    Panic(Box<dyn std::any::Any + Send>),
}

/// Waits for the response's head, no longer than the call may last.
pub(super) async fn answer(
    mut work: Work,
    deadline: Option<tokio::time::Instant>,
    streaming: bool,
    streams_end: &CancellationToken,
) -> Result<(Response<Body>, Option<Permit>), Failed> {
    let late = async {
        match deadline {
            Some(at) => tokio::time::sleep_until(at).await,
            None => std::future::pending().await,
        }
    };
    let stop = async {
        if streaming { streams_end.cancelled().await } else { std::future::pending().await }
    };
    let answered = tokio::select! {
        biased;
        answered = &mut work => answered,
        () = late => return Err(Failed::Error(deadline_passed())),
        () = stop => return Err(Failed::Error(stopping())),
    };
    let permit = work.permit.take();
    answered.map(|response| (response, permit)).map_err(Failed::Panic)
}

/// A handler at work. A unary one runs to its end even when nobody waits for it any more:
/// half of a write is never left undone because a client hung up.
pub(super) struct Work {
    pub(super) future: Option<Reply>,
    pub(super) permit: Option<Permit>,
    pub(super) keep: Option<(Supervisor, tracing::Span)>,
}

impl Future for Work {
    type Output = Result<Response<Body>, Box<dyn std::any::Any + Send>>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Some(future) = &mut self.future else { return Poll::Pending };
        let polled = catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(cx)));
        let output = match polled {
            Ok(Poll::Pending) => return Poll::Pending,
            Ok(Poll::Ready(Ok(response))) => Ok(response),
            Err(panic) if faults::planted(Fault::PanicsEndConnections) => resume_unwind(panic),
            Err(panic) => Err(panic),
        };
        self.future = None;
        Poll::Ready(output)
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        let (Some(future), Some((supervisor, span))) = (self.future.take(), self.keep.take())
        else {
            return;
        };
        // Outside a runtime the process is ending, and nothing can be waited for.
        if tokio::runtime::Handle::try_current().is_err() {
            return;
        }
        let permit = self.permit.take();
        let rest = async move {
            let _permit = permit;
            // The client is gone; what the call did is in the database.
            let _ = future.await;
        };
        supervisor.spawn("abandoned call", rest.instrument(span));
    }
}

/// Polls a future so that its panic is its output.
pub(super) struct Caught<F>(pub(super) F);

impl<F: Future + Unpin> Future for Caught<F> {
    type Output = Result<F::Output, Box<dyn std::any::Any + Send>>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match catch_unwind(AssertUnwindSafe(|| Pin::new(&mut self.0).poll(cx))) {
            Ok(polled) => polled.map(Ok),
            Err(panic) => Poll::Ready(Err(panic)),
        }
    }
}
