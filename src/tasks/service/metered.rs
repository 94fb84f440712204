//! Live figures in a task's stream: made for each reader, not kept, not numbered.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::{Stream, future::BoxFuture};

use crate::{
    error::Result,
    events::frame,
    pb::{self, Frame, task_event::Body},
    tasks::{
        history::{TaskStream, tag},
        ledger::{Parts, queue_entry},
        model::{State, Task},
    },
};

/// Between two figures.
const EVERY: Duration = Duration::from_secs(1);

/// A stream with figures in between.
pub struct Metered {
    stream: TaskStream,
    task: Arc<Task>,
    tagged: bool,
    parts: Parts,
    tick: BoxFuture<'static, ()>,
    tokens_in: u64,
    tokens_out: u64,
    attempt: u32,
    /// Whether the task waits, by what the stream has shown.
    waits: bool,
}

impl Metered {
    /// Adds figures to the stream of `task`.
    pub fn new(stream: TaskStream, task: Arc<Task>, tagged: bool, parts: Parts) -> Self {
        let tick = Box::pin(parts.clock.sleep(Duration::ZERO));
        let (tokens_in, attempt) = (task.usage.map_or(0, |usage| usage.tokens_in), task.attempt);
        let waits = task.state == State::Queued;
        Self { stream, task, tagged, parts, tick, tokens_in, tokens_out: 0, attempt, waits }
    }

    fn count(&mut self, frame: &Frame) {
        let Ok(event) = frame.event() else { return };
        match event.body {
            Some(Body::Queued(_)) => self.waits = true,
            Some(Body::AttemptStarted(_)) => (self.tokens_out, self.waits) = (0, false),
            Some(Body::Ended(_)) => self.waits = false,
            Some(Body::Token(_)) => self.tokens_out += 1,
            _ => {}
        }
        self.attempt = event.attempt;
    }

    fn figures(&self) -> Frame {
        let queue = &self.parts.queue;
        let stats = queue.stats(&self.task.namespace, &self.task.spec.model);
        // A shared queue holds few of the tasks that wait.
        let waiting = if queue.is_shared() { self.waits } else { queue.contains(self.task.id) };
        let estimate = waiting.then(|| queue.estimate(&queue_entry(&self.task)));
        let predicted = estimate.as_ref().and_then(|estimate| estimate.predicted_start);
        let body = Body::Metrics(pb::MetricsEvent {
            queue_depth: stats.depth,
            on_time_probability: estimate.as_ref().and_then(|it| it.on_time_probability),
            kv_warmth: None,
            tokens_in: self.tokens_in,
            tokens_out: self.tokens_out,
            queue_position: estimate.map_or(0, |estimate| estimate.position),
            predicted_start_ms: predicted.map(|start| start.as_millis() as u64),
        });
        let bytes = frame::encode(0, self.parts.clock.now(), self.attempt, body);
        Frame::new(if self.tagged { tag(self.task.id, &bytes) } else { bytes })
    }
}

impl Stream for Metered {
    type Item = Result<Frame>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        let polled = Pin::new(&mut this.stream).poll_next(cx);
        if let Poll::Ready(Some(Ok(frame))) = &polled {
            this.count(frame);
        }
        if polled.is_ready() {
            return polled;
        }
        if this.tick.as_mut().poll(cx).is_ready() {
            this.tick = Box::pin(this.parts.clock.sleep(EVERY));
            return Poll::Ready(Some(Ok(this.figures())));
        }
        Poll::Pending
    }
}
