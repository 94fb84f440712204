//! A task's stream over any number of connections: each sequence once, in order.

use std::time::Duration;

use futures_util::future::BoxFuture;
use tonic::{Code, Status, Streaming};

use super::Client;
use crate::{grpc::status, pb};

/// What [`Follow::next`] has to tell.
#[derive(Clone, Debug)]
pub enum Update {
    /// An event; each sequence once, in order.
    Event(Box<pb::TaskEvent>),
    /// The stream broke and is being opened again after what was seen.
    Reconnecting {
        /// Why.
        error: Status,
        /// The sequence that it will go on with.
        next_sequence: u64,
    },
}

/// The events of a task, over any number of connections.
pub struct Follow {
    client: Client,
    task_id: String,
    next_sequence: u64,
    /// The call that makes the task, until the task is known.
    run: Option<pb::RunTaskRequest>,
    include_metrics: bool,
    link: Link,
    n_failures: u32,
    failing_since: Option<tokio::time::Instant>,
}

enum Link {
    /// To be opened at the next call.
    Closed,
    /// Being opened; kept here, so that dropping `next` loses nothing.
    Opening(BoxFuture<'static, Result<Streaming<pb::TaskEvent>, Status>>),
    Open(Box<Streaming<pb::TaskEvent>>),
    /// The task has ended.
    Done,
}

impl Follow {
    pub(super) fn new(
        client: Client,
        task_id: String,
        next_sequence: u64,
        run: Option<pb::RunTaskRequest>,
    ) -> Self {
        Self {
            client,
            task_id,
            next_sequence,
            run,
            include_metrics: false,
            link: Link::Closed,
            n_failures: 0,
            failing_since: None,
        }
    }

    /// Also delivers `metrics` events.
    #[must_use]
    pub fn with_metrics(mut self) -> Self {
        self.include_metrics = true;
        self
    }

    /// The task; empty until the first event of a [`Client::run`].
    pub fn task_id(&self) -> &str {
        &self.task_id
    }

    /// The sequence that comes next.
    pub fn next_sequence(&self) -> u64 {
        self.next_sequence
    }

    /// The next update; `None` after the task's `ended`. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Result<Option<Update>, Status> {
        loop {
            match &mut self.link {
                Link::Done => return Ok(None),
                Link::Closed => self.link = Link::Opening(self.open()),
                Link::Opening(opening) => match opening.await {
                    Ok(stream) => self.link = Link::Open(Box::new(stream)),
                    Err(error) => return self.broken(error).map(Some),
                },
                Link::Open(stream) => match stream.message().await {
                    Ok(Some(event)) => {
                        if let Some(event) = self.take(event) {
                            return Ok(Some(Update::Event(Box::new(event))));
                        }
                    }
                    Ok(None) => {
                        let error = Status::unavailable("the stream ended before the task");
                        return self.broken(error).map(Some);
                    }
                    Err(error) => return self.broken(error).map(Some),
                },
            }
        }
    }

    /// Counts an event; `None` when it was seen before.
    fn take(&mut self, event: pb::TaskEvent) -> Option<pb::TaskEvent> {
        use pb::task_event::Body;
        (self.n_failures, self.failing_since) = (0, None);
        if let Some(Body::Queued(queued)) = &event.body
            && self.task_id.is_empty()
        {
            self.task_id.clone_from(&queued.task_id);
            self.run = None;
        }
        if event.sequence == 0 {
            return Some(event);
        }
        if event.sequence < self.next_sequence {
            return None;
        }
        self.next_sequence = event.sequence + 1;
        if matches!(event.body, Some(Body::Ended(_))) {
            self.link = Link::Done;
        }
        Some(event)
    }

    fn broken(&mut self, error: Status) -> Result<Update, Status> {
        self.link = Link::Closed;
        let since = *self.failing_since.get_or_insert_with(tokio::time::Instant::now);
        if !may_resume(&error) || since.elapsed() > self.client.patience {
            return Err(error);
        }
        self.n_failures += 1;
        Ok(Update::Reconnecting { error, next_sequence: self.next_sequence })
    }

    fn open(&self) -> BoxFuture<'static, Result<Streaming<pb::TaskEvent>, Status>> {
        let mut tasks = self.client.tasks();
        let wait = match self.n_failures {
            0 => Duration::ZERO,
            n => self.client.backoff(n - 1),
        };
        let run = self.run.clone();
        let request = pb::StreamTaskRequest {
            task_id: self.task_id.clone(),
            from_sequence: self.next_sequence,
            include_metrics: self.include_metrics,
            ..Default::default()
        };
        Box::pin(async move {
            tokio::time::sleep(wait).await;
            let opened = match run {
                Some(run) => tasks.run_task(run).await,
                None => tasks.stream_task(request).await,
            };
            opened.map(tonic::Response::into_inner)
        })
    }
}

/// Whether a stream that ended so may be opened again: the server said "not now", or the
/// connection broke and nobody said anything.
fn may_resume(error: &Status) -> bool {
    match error.code() {
        Code::Unavailable => true,
        Code::Unknown | Code::Internal | Code::Cancelled => status::error_reason(error).is_none(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{client::endpoint, error::Error};

    #[test]
    fn a_stream_is_resumed_when_the_connection_broke_but_not_when_the_server_failed() {
        assert!(may_resume(&Status::unavailable("not now")));
        assert!(may_resume(&Status::unknown("transport error")));
        assert!(!may_resume(&Error::internal("defect").into()));
        assert!(!may_resume(&Status::not_found("no such task")));
    }

    fn event(sequence: u64, body: pb::task_event::Body) -> pb::TaskEvent {
        pb::TaskEvent { sequence, body: Some(body), ..Default::default() }
    }

    #[tokio::test]
    async fn each_sequence_is_delivered_once_and_a_gap_moves_past_what_it_covers() {
        use pb::task_event::Body;
        let channel = endpoint("127.0.0.1:1").unwrap().connect_lazy();
        let mut follow = Client::over(channel, None).unwrap().follow("t", 1);
        let token = || Body::Token(pb::TokenEvent::default());
        assert!(follow.take(event(1, token())).is_some());
        assert!(follow.take(event(1, token())).is_none());
        assert!(follow.take(event(9, Body::Gap(pb::GapEvent::default()))).is_some());
        assert!(follow.take(event(9, token())).is_none());
        assert_eq!(follow.next_sequence(), 10);
        assert!(follow.take(event(10, Body::Ended(pb::EndedEvent::default()))).is_some());
        assert!(follow.next().await.unwrap().is_none());
    }
}
