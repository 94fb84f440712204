//! Server-sent events of facades.

use std::{convert::Infallible, time::Duration};

use axum::response::{
    IntoResponse as _, Response,
    sse::{Event, KeepAlive, Sse},
};
use futures_util::{StreamExt as _, stream};
use http::{HeaderValue, header};
use serde_json::Value;

/// A stream that fails within this time fails with an HTTP status. A later error is an event.
pub const PEEK: Duration = Duration::from_secs(5);

/// Proxies close connections on which nothing happens, some after 30 s.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Something that is written event by event.
pub trait Source: Send + 'static {
    /// The next events; `None` after the last.
    fn next(&mut self) -> impl Future<Output = Option<Vec<Event>>> + Send;
}

/// An event with JSON as its data.
pub fn event(data: &Value) -> Event {
    Event::default().data(data.to_string())
}

/// The response that carries a source's events.
pub fn response(source: impl Source) -> Response {
    let events = stream::unfold(source, |mut source| async move {
        let events = source.next().await?;
        Some((stream::iter(events.into_iter().map(Ok::<_, Infallible>)), source))
    });
    let events = Sse::new(events.flatten()).keep_alive(KeepAlive::new().interval(KEEP_ALIVE));
    let mut response = events.into_response();
    let headers = response.headers_mut();
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}
