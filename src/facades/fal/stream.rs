//! The two streams: how a request stands, and what a run produces.

use axum::response::{Response, sse::Event};
use serde_json::{Value, json};
use tonic::Streaming;

use super::{
    about,
    output::{Run, Step},
    refusal::Refusal,
    status::{Place, ahead, line},
};
use crate::{
    facades::{
        sse::{self, PEEK, Source, event},
        wire::InProcess,
    },
    pb::{self, task_event::Body},
};

/// The response that tells how a request stands until it has ended.
pub async fn status(client: InProcess, place: Place, logs: bool) -> Result<Response, Refusal> {
    let request = pb::StreamTaskRequest {
        task_id: place.id.clone(),
        include_metrics: true,
        ..Default::default()
    };
    let events = client.tasks().stream_task(request).await?.into_inner();
    Ok(sse::response(Statuses {
        client,
        place,
        logs,
        events,
        waits: true,
        told: None,
        over: false,
    }))
}

/// The states of a request.
struct Statuses {
    client: InProcess,
    place: Place,
    logs: bool,
    events: Streaming<pb::TaskEvent>,
    /// Whether it is in the queue.
    waits: bool,
    /// The place in the queue that was told last.
    told: Option<u64>,
    over: bool,
}

impl Statuses {
    /// The next state that is worth telling.
    async fn advance(&mut self) -> Result<Value, Refusal> {
        while let Some(event) = self.events.message().await? {
            match &event.body {
                Some(Body::Queued(_)) => (self.waits, self.told) = (true, None),
                Some(Body::Metrics(metrics)) if self.waits => {
                    let ahead = ahead(metrics.queue_position);
                    if self.told.replace(ahead) != Some(ahead) {
                        return Ok(self.place.in_queue(ahead));
                    }
                }
                Some(Body::AttemptStarted(_)) => {
                    self.waits = false;
                    return Ok(self.place.in_progress(if self.logs {
                        json!([])
                    } else {
                        Value::Null
                    }));
                }
                Some(Body::Ended(_)) => {
                    let _end = self.events.trailers().await;
                    let request = pb::GetTaskRequest { task_id: self.place.id.clone() };
                    let task = self.client.tasks().get_task(request).await?.into_inner();
                    self.over = true;
                    let logs = if self.logs { json!([]) } else { Value::Null };
                    return Ok(self.place.completed(&task, logs));
                }
                // Each line is told once: these clients collect them.
                _ if self.logs => {
                    if let Some(line) = line(&event) {
                        return Ok(self.place.in_progress(json!([line])));
                    }
                }
                _ => {}
            }
        }
        Err(Refusal::broken())
    }
}

impl Source for Statuses {
    async fn next(&mut self) -> Option<Vec<Event>> {
        if self.over {
            return None;
        }
        let status = self.advance().await.unwrap_or_else(|refusal| {
            self.over = true;
            refusal.json()
        });
        Some(vec![event(&status)])
    }
}

/// The response that brings a run's output as it comes. The last event is what a run without
/// stream would have answered.
pub async fn output(mut run: Run) -> Result<Response, Refusal> {
    let id = run.id.clone();
    let first = match tokio::time::timeout(PEEK, run.next()).await {
        Ok(Ok(step)) => Some(step),
        Ok(Err(refusal)) => return Ok(about(&id, refusal.into_response())),
        // The step that was waited for is not lost: nothing is taken before it is there.
        Err(_) => None,
    };
    Ok(about(&id, sse::response(Steps { run, first, over: false })))
}

/// The steps of a run.
struct Steps {
    run: Run,
    first: Option<Step>,
    over: bool,
}

impl Source for Steps {
    async fn next(&mut self) -> Option<Vec<Event>> {
        if self.over {
            return None;
        }
        let step = match self.first.take() {
            Some(step) => Ok(step),
            None => self.run.next().await,
        };
        self.over = !matches!(step, Ok(Step::Event(_)));
        let data = match step {
            Ok(Step::Event(data) | Step::Done(data)) => data,
            Err(refusal) => {
                let mut error = refusal.json();
                error["type"] = "error".into();
                error
            }
        };
        Some(vec![event(&data)])
    }
}
