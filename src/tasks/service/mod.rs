//! `TaskService`: decode, act, encode. Decisions are made in `state`, `queue` and `convert`.

mod metered;
mod submit;

use std::{pin::Pin, sync::Arc};

use futures_util::{Stream, StreamExt, future::try_join_all, stream};
use sha2::{Digest, Sha256};
use tonic::{Request, Response, Status};

use self::{metered::Metered, submit::Ready};
use crate::{
    artifacts::{self, Artifacts},
    db::page,
    error::{Error, Reason, Result},
    events::store as events,
    faults::{self, Fault},
    grpc::auth::principal,
    id::TaskId,
    keys::Principal,
    pb::{self, Frame, server::task_service_server::TaskService},
    supervisor::Supervisor,
    tasks::{
        convert::{self, View, explain, request as checked},
        history::{History, Options},
        ledger::{Ledger, NewTask, Parts, queue_entry},
        model::{RetryPolicy, State, Task},
        reads,
        state::Event,
        watch,
    },
    telemetry::TraceParent,
};

/// Most tasks in one batch submit.
const MAX_BATCH: usize = 1000;
/// Most tasks in one stream.
const MAX_STREAMED: usize = 256;
/// Longest text in a result, so that the message stays below the cap of 4 MiB.
const MAX_TEXT: usize = 3 << 20;

/// The service; clones share its parts.
#[derive(Clone)]
pub struct Service {
    pub(super) parts: Parts,
    pub(super) ledger: Ledger,
    artifacts: Artifacts,
    history: History,
    supervisor: Supervisor,
    /// Of tasks that name none.
    pub(super) retry: RetryPolicy,
}

type Frames = Pin<Box<dyn Stream<Item = Result<Frame, Status>> + Send>>;

impl Service {
    /// A service over the parts of the ledger.
    pub fn new(parts: Parts, ledger: Ledger, artifacts: Artifacts, supervisor: Supervisor) -> Self {
        let history = History {
            db: parts.db.clone(),
            blobs: parts.blobs.clone(),
            relay: parts.relay.clone(),
            clock: parts.clock.clone(),
        };
        let retry = RetryPolicy::default();
        Self { parts, ledger, artifacts, history, supervisor, retry }
    }

    /// The same, with another retry policy for tasks that name none.
    #[must_use]
    pub fn retrying(self, retry: RetryPolicy) -> Self {
        Self { retry, ..self }
    }

    async fn read(&self, caller: &Principal, id: TaskId) -> Result<Arc<Task>> {
        caller.check_task(id)?;
        let at_hand = self.ledger.open_task(id);
        let all = faults::planted(Fault::SeeOtherNamespaces);
        if let Some(task) = at_hand.filter(|task| all || task.namespace == caller.namespace) {
            return Ok(task);
        }
        let namespace = caller.namespace.clone();
        self.parts
            .db
            .read(move |tx| Box::pin(async move { reads::get(tx, &namespace, id).await }))
            .await
            .map(Arc::new)
    }

    async fn artifacts(&self, id: TaskId) -> Result<Vec<pb::ArtifactEvent>> {
        let frames = self
            .parts
            .db
            .read(move |tx| Box::pin(async move { reads::artifacts(tx, id).await }))
            .await?;
        let events = frames.into_iter().filter_map(|frame| Frame::new(frame).event().ok());
        Ok(events
            .filter_map(|event| match event.body {
                Some(pb::task_event::Body::Artifact(artifact)) => Some(artifact),
                _ => None,
            })
            .collect())
    }

    async fn cancel(&self, caller: &Principal, id: TaskId, reason: String) -> Result<Arc<Task>> {
        let task = self.read(caller, id).await?;
        if task.state.is_terminal() {
            return Ok(task);
        }
        let cancel = Event::Cancel { reason, by: caller.name.clone() };
        match self.ledger.apply(id, cancel).await {
            // It ended meanwhile.
            Err(error) if error.reason() == Reason::StateConflict => self.read(caller, id).await,
            answer => answer,
        }
    }

    async fn follow(&self, caller: &Principal, request: pb::StreamTaskRequest) -> Result<Frames> {
        let window = checked::batch_window(request.batch_window.as_ref())?;
        if request.others.len() > MAX_STREAMED {
            let n_others = request.others.len();
            return Err(Error::invalid("others", format!("has {n_others} entries, not up to 256")));
        }
        let tagged = !request.others.is_empty();
        let first = (request.task_id, request.from_sequence.saturating_sub(1));
        let others = request.others.into_iter().map(|other| (other.task_id, other.after_sequence));
        let opened = std::iter::once(first).chain(others).map(|(task_id, after)| async move {
            let id = checked::task_id("task_id", &task_id)?;
            caller.check_task(id)?;
            let options = Options { tagged, window };
            let stream = self.history.stream(&caller.namespace, id, after, options).await?;
            Ok::<_, Error>((id, stream))
        });
        let mut opened = try_join_all(opened).await?;
        if request.include_metrics {
            let mut streams = Vec::with_capacity(opened.len());
            for (id, stream) in opened {
                let task = self.read(caller, id).await?;
                streams.push(Metered::new(stream, task, tagged, self.parts.clone()));
            }
            return Ok(Box::pin(stream::select_all(streams).map(to_status)));
        }
        Ok(match (opened.pop(), opened.is_empty()) {
            (Some((_, only)), true) => Box::pin(only.map(to_status)),
            (last, _) => {
                let streams = opened.into_iter().chain(last).map(|(_, stream)| stream);
                Box::pin(stream::select_all(streams).map(to_status))
            }
        })
    }
}

fn to_status(item: Result<Frame>) -> Result<Frame, Status> {
    item.map_err(Status::from)
}

/// Cancels a task when the caller of `RunTask` leaves before its end.
struct CancelOnDrop {
    service: Service,
    caller: Principal,
    task: Option<TaskId>,
}

impl CancelOnDrop {
    /// The stream came to its end: there is nothing to cancel.
    fn disarm(&mut self) {
        self.task = None;
    }
}

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        let Some(id) = self.task.take() else { return };
        let (service, caller) = (self.service.clone(), self.caller.clone());
        self.service.supervisor.spawn("cancel_on_disconnect", async move {
            let reason = "the caller of RunTask left".to_owned();
            if let Err(error) = service.cancel(&caller, id, reason).await {
                tracing::warn!(task.id = %id, %error, "a task whose caller left goes on");
            }
        });
    }
}

#[tonic::async_trait]
impl TaskService for Service {
    async fn submit_task(
        &self,
        request: Request<pb::SubmitTaskRequest>,
    ) -> Result<Response<pb::SubmitTaskResponse>, Status> {
        let caller = principal(&request)?;
        let trace = request.extensions().get::<TraceParent>().cloned();
        let pb::SubmitTaskRequest { spec, request_id } = request.into_inner();
        let ready = self.check(&caller, trace.as_ref(), &request_id, spec);
        let mut outcomes = self.submit_all(vec![ready]).await;
        let outcome = outcomes.pop().unwrap_or_else(|| Err(Error::internal("one outcome")));
        Ok(Response::new(outcome?))
    }

    async fn batch_submit_tasks(
        &self,
        request: Request<pb::BatchSubmitTasksRequest>,
    ) -> Result<Response<pb::BatchSubmitTasksResponse>, Status> {
        use pb::batch_submit_tasks_response::{Outcome, outcome};
        let caller = principal(&request)?;
        let trace = request.extensions().get::<TraceParent>().cloned();
        let requests = request.into_inner().requests;
        if requests.is_empty() || requests.len() > MAX_BATCH {
            let n_requests = requests.len();
            return Err(Error::invalid(
                "requests",
                format!("has {n_requests} entries, not 1 to {MAX_BATCH}"),
            )
            .into());
        }
        let ready = requests
            .into_iter()
            .map(|request| self.check(&caller, trace.as_ref(), &request.request_id, request.spec))
            .collect();
        let outcomes = self.submit_all(ready).await.into_iter().map(|outcome| Outcome {
            outcome: Some(match outcome {
                Ok(accepted) => outcome::Outcome::Accepted(accepted),
                Err(error) => outcome::Outcome::Refused(crate::grpc::status::to_rpc_status(&error)),
            }),
        });
        Ok(Response::new(pb::BatchSubmitTasksResponse { outcomes: outcomes.collect() }))
    }

    type RunTaskStream = Frames;

    async fn run_task(
        &self,
        request: Request<pb::RunTaskRequest>,
    ) -> Result<Response<Frames>, Status> {
        use pb::run_task_request::OnDisconnect;
        let caller = principal(&request)?;
        let trace = request.extensions().get::<TraceParent>().cloned();
        let pb::RunTaskRequest { spec, request_id, on_disconnect } = request.into_inner();
        let on_disconnect = OnDisconnect::try_from(on_disconnect).map_err(|_| {
            Error::invalid("on_disconnect", format!("{on_disconnect} is no choice"))
        })?;
        let ready = self.check(&caller, trace.as_ref(), &request_id, spec);
        let mut outcomes = self.submit_all(vec![ready]).await;
        let accepted = outcomes.pop().unwrap_or_else(|| Err(Error::internal("one outcome")))?;
        let id = checked::task_id("task_id", &accepted.task.unwrap_or_default().task_id)?;
        let mut guard = CancelOnDrop {
            service: self.clone(),
            caller: caller.clone(),
            task: (on_disconnect != OnDisconnect::Keep).then_some(id),
        };
        let stream = self.history.follow(id, 0, Options::default());
        let end = stream::poll_fn(move |_| {
            guard.disarm();
            std::task::Poll::Ready(None)
        });
        Ok(Response::new(Box::pin(stream.map(to_status).chain(end))))
    }

    async fn get_task(
        &self,
        request: Request<pb::GetTaskRequest>,
    ) -> Result<Response<pb::Task>, Status> {
        let caller = principal(&request)?;
        let id = checked::task_id("task_id", &request.get_ref().task_id)?;
        let task = self.read(&caller, id).await?;
        // Artifacts are made by attempts.
        let artifacts = if task.attempt == 0 { Vec::new() } else { self.artifacts(id).await? };
        Ok(Response::new(convert::task(&task, View::Full, artifacts)))
    }

    async fn list_tasks(
        &self,
        request: Request<pb::ListTasksRequest>,
    ) -> Result<Response<pb::ListTasksResponse>, Status> {
        let caller = principal(&request)?;
        let request = request.into_inner();
        let size = page::size(request.page_size, 50, 1000)?;
        let token = request.page_token.clone();
        let filter = checked::filter(request)?;
        let cursor = page::cursor(&filter, &token)?.and_then(|cursor| cursor.parse().ok());
        let (wanted, namespace) = (filter.clone(), caller.namespace);
        let read = self.parts.db.read(move |tx| {
            Box::pin(async move { reads::list(tx, &namespace, &wanted, cursor, size).await })
        });
        let tasks = read.await?;
        let next = tasks.last().filter(|_| tasks.len() == size as usize);
        let next_page_token =
            next.map(|task| page::token(&filter, &task.id.to_string())).unwrap_or_default();
        let tasks = tasks.iter().map(|task| convert::task(task, View::Basic, Vec::new())).collect();
        Ok(Response::new(pb::ListTasksResponse { tasks, next_page_token }))
    }

    type StreamTaskStream = Frames;

    async fn stream_task(
        &self,
        request: Request<pb::StreamTaskRequest>,
    ) -> Result<Response<Frames>, Status> {
        let caller = principal(&request)?;
        Ok(Response::new(self.follow(&caller, request.into_inner()).await?))
    }

    async fn list_task_events(
        &self,
        request: Request<pb::ListTaskEventsRequest>,
    ) -> Result<Response<pb::ListTaskEventsResponse>, Status> {
        let caller = principal(&request)?;
        let request = request.into_inner();
        let id = checked::task_id("task_id", &request.task_id)?;
        let size = page::size(request.page_size, 100, 1000)?;
        let cursor = page::cursor(&id, &request.page_token)?;
        let after = cursor.and_then(|cursor| cursor.parse().ok()).unwrap_or(0);
        self.read(&caller, id).await?;
        let read = self
            .parts
            .db
            .read(move |tx| Box::pin(async move { events::list(tx, id, after, size).await }));
        let events = read.await?;
        let next = events.last().filter(|_| events.len() == size as usize);
        let next_page_token =
            next.map(|event| page::token(&id, &event.sequence.to_string())).unwrap_or_default();
        let events = events.into_iter().map(|event| Frame::new(event.frame).event());
        let events = events.collect::<Result<_, _>>().map_err(Error::internal)?;
        Ok(Response::new(pb::ListTaskEventsResponse { events, next_page_token }))
    }

    async fn get_task_result(
        &self,
        request: Request<pb::GetTaskResultRequest>,
    ) -> Result<Response<pb::TaskResult>, Status> {
        let caller = principal(&request)?;
        let id = checked::task_id("task_id", &request.get_ref().task_id)?;
        let task = self.read(&caller, id).await?;
        if task.state != State::Succeeded {
            return Err(explain::no_result(&task).into());
        }
        let (text, text_truncated) = self.history.text(&task, MAX_TEXT).await?;
        let full = convert::task(&task, View::Full, self.artifacts(id).await?);
        Ok(Response::new(pb::TaskResult {
            task_id: full.task_id,
            result: full.result,
            text,
            text_truncated,
            usage: full.usage,
            artifacts: full.artifacts,
        }))
    }

    async fn cancel_task(
        &self,
        request: Request<pb::CancelTaskRequest>,
    ) -> Result<Response<pb::Task>, Status> {
        let caller = principal(&request)?;
        let pb::CancelTaskRequest { task_id, reason } = request.into_inner();
        let id = checked::task_id("task_id", &task_id)?;
        checked::reason("reason", &reason)?;
        let task = self.cancel(&caller, id, reason).await?;
        Ok(Response::new(convert::task(&task, View::Full, Vec::new())))
    }

    async fn retry_task(
        &self,
        request: Request<pb::RetryTaskRequest>,
    ) -> Result<Response<pb::Task>, Status> {
        let caller = principal(&request)?;
        let trace = request.extensions().get::<TraceParent>().cloned();
        let pb::RetryTaskRequest { task_id, request_id } = request.into_inner();
        let id = checked::task_id("task_id", &task_id)?;
        let request_id = checked::request_id("request_id", &request_id)?;
        let task = self.read(&caller, id).await?;
        if !task.state.is_terminal() {
            let message = format!("task `{id}` is {}; only an ended task is retried", task.state);
            return Err(Error::state_conflict("task", id, task.state, message).into());
        }
        let now = self.parts.clock.now();
        let inputs = artifacts::references(&task.spec.input)?;
        let new = NewTask {
            id: self.task_id(&inputs, now),
            namespace: caller.namespace.clone(),
            spec: task.spec.again(now),
            not_before: None,
            request_id,
            digest: Sha256::digest(format!("retry {id}")).into(),
            retry_of: Some(id),
            traceparent: trace.map(|trace| trace.0),
        };
        let ready = Ready { new, inputs, require_on_time: false };
        let mut outcomes = self.submit_all(vec![Ok(ready)]).await;
        let outcome = outcomes.pop().unwrap_or_else(|| Err(Error::internal("one outcome")))?;
        Ok(Response::new(outcome.task.unwrap_or_default()))
    }

    async fn explain_task(
        &self,
        request: Request<pb::ExplainTaskRequest>,
    ) -> Result<Response<pb::TaskExplanation>, Status> {
        let caller = principal(&request)?;
        let id = checked::task_id("task_id", &request.get_ref().task_id)?;
        let task = self.read(&caller, id).await?;
        Ok(Response::new(explain::explain(&task, self.parts.queue.explain(&queue_entry(&task)))))
    }

    async fn delete_task(
        &self,
        request: Request<pb::DeleteTaskRequest>,
    ) -> Result<Response<()>, Status> {
        let caller = principal(&request)?;
        let id = checked::task_id("task_id", &request.get_ref().task_id)?;
        self.ledger.delete(caller.namespace, id).await?;
        Ok(Response::new(()))
    }

    type WatchTasksStream = Frames;

    async fn watch_tasks(
        &self,
        request: Request<pb::WatchTasksRequest>,
    ) -> Result<Response<Frames>, Status> {
        let caller = principal(&request)?;
        let filter = checked::watch_filter(request.into_inner())?;
        let stream = watch::follow(&self.parts, caller.namespace, filter).await?;
        Ok(Response::new(Box::pin(stream.map(to_status))))
    }
}
