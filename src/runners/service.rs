//! `RunnerService`: streams and calls in, the registry asked, streams and answers out.

use std::{
    collections::VecDeque,
    pin::{Pin, pin},
    sync::Arc,
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use futures_util::{Stream, stream};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use super::{
    Registry, convert,
    model::Fence,
    session::{Attached, Link},
};
use crate::{
    clock::Mono,
    error::{Error, Kind, Reason},
    grpc::auth::principal,
    id::RunnerId,
    keys::Scope,
    pb::{self, server::runner_service_server},
    queue::SupplyKey,
};

/// Longest wait of a Poll.
const MAX_POLL_WAIT: Duration = Duration::from_secs(30);
/// A runner that was asked to renew its stream has this long, and the same as jitter.
const RENEWAL: Duration = Duration::from_secs(10);
/// Ends that are being stored when the server stops are waited for this long.
const LAST_ACKS: Duration = Duration::from_secs(2);
/// Acknowledgements are looked for this often even if nothing rang.
const ACK_SWEEP: Duration = Duration::from_secs(1);
/// A drain's deadline where none is given.
const DRAIN_DEADLINE: Duration = Duration::from_mins(5);

/// The tonic service.
#[derive(Clone)]
pub struct Service(pub Registry);

/// Stream of answers.
type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl runner_service_server::RunnerService for Service {
    type ConnectStream = Answers<pb::ConnectResponse>;
    type OutputStream = Answers<pb::OutputResponse>;

    async fn connect(
        &self,
        request: Request<Streaming<pb::ConnectRequest>>,
    ) -> Result<Response<Self::ConnectStream>, Status> {
        let namespace = principal(&request)?.namespace;
        let mut messages = request.into_inner();
        let hello = convert::first_message(self.first(&mut messages).await?)?;
        let link = Link::default();
        let attached = Attached::Stream(link.clone());
        let (key, welcome) = self.0.hello(&namespace, hello, attached)?;
        let welcome = self.0.unnumbered(key, convert::welcome(&welcome, self.0.limits()));
        let writer = ControlWriter::new(self.0.clone(), key, link.clone(), welcome)?;
        let reader = read_control(self.0.clone(), key, link, messages);
        self.0.supervisor().spawn("runner_control", reader);
        let answers = stream::unfold(writer, |mut writer| async move {
            writer.next().await.map(|answer| (answer, writer))
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn output(
        &self,
        request: Request<Streaming<pb::OutputRequest>>,
    ) -> Result<Response<Self::OutputStream>, Status> {
        let namespace = principal(&request)?.namespace;
        let mut messages = request.into_inner();
        let mut first = self.first(&mut messages).await?;
        let hello = first
            .hello
            .take()
            .ok_or_else(|| Error::invalid("hello", "must be set in the first message"))?;
        let link = Link::default();
        let (key, bell) = self.0.attach_output(&namespace, &hello.session_id, link.clone())?;
        let writer = AckWriter {
            registry: self.0.clone(),
            key,
            link: link.clone(),
            bell,
            stop: self.0.supervisor().token(),
            stop_at: None,
            over: false,
        };
        let reader = read_output(self.0.clone(), key, link, first, messages);
        self.0.supervisor().spawn("runner_output", reader);
        let answers = stream::unfold(writer, |mut writer| async move {
            writer.next().await.map(|answer| (answer, writer))
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn poll(
        &self,
        request: Request<pb::PollRequest>,
    ) -> Result<Response<pb::PollResponse>, Status> {
        let namespace = principal(&request)?.namespace;
        let request = request.into_inner();
        let wait = convert::from_duration("wait", request.wait)?.min(MAX_POLL_WAIT);
        let mut incoming = request.messages.into_iter().peekable();
        let link = Link::default();
        let mut answers = Vec::new();
        let is_hello = incoming.peek().is_some_and(|message| {
            matches!(message.body, Some(pb::connect_request::Body::Hello(_)))
        });
        let key = match incoming.next_if(|_| is_hello) {
            Some(first) => {
                let hello = convert::first_message(first)?;
                let attached = Attached::Poll(link.clone());
                let (key, welcome) = self.0.hello(&namespace, hello, attached)?;
                let welcome = convert::welcome(&welcome, self.0.limits());
                answers.push(self.0.unnumbered(key, welcome));
                key
            }
            None => self.0.attach_poll(&namespace, &request.session_id, &link)?,
        };
        // The bell first: the last message may be Bye, which ends the session.
        let bell = self.0.bell(key)?;
        for message in incoming {
            self.0.receive(key, &link, convert::from_runner(message)?)?;
        }
        let (until, stop) = (self.0.clock().mono() + wait, self.0.supervisor().token());
        loop {
            if link.is_ended() {
                match link.take_why() {
                    Some(error) => return Err(error.into()),
                    None => break,
                }
            }
            answers.extend(self.0.unsent(key, &link)?);
            if !answers.is_empty() || stop.is_cancelled() || self.0.clock().mono() >= until {
                break;
            }
            tokio::select! {
                () = bell.notified() => {}
                () = link.ended() => {}
                () = stop.cancelled() => {}
                () = self.0.clock().sleep_until(until) => {}
            }
        }
        // Carries the ack when nothing else does.
        answers.push(self.0.unnumbered(key, convert::heartbeat(self.0.clock().now())));
        Ok(Response::new(pb::PollResponse { messages: answers }))
    }

    async fn report_task_events(
        &self,
        request: Request<pb::ReportTaskEventsRequest>,
    ) -> Result<Response<pb::ReportTaskEventsResponse>, Status> {
        let principal = principal(&request)?;
        let request = request.into_inner();
        let task = convert::task_id("task_id", &request.task_id)?;
        principal.check_task(task)?;
        let fence = Fence { task, attempt: request.attempt };
        match principal.attempt {
            Some((task, attempt)) if fence == (Fence { task, attempt }) => {}
            Some(_) => return Err(convert::lease_lost(fence).into()),
            // A runner's own key may report what its namespace's runners execute.
            None => self.0.check_reporter(&principal.namespace, fence)?,
        }
        let batch = convert::batch(fence, request.first_index, request.events, request.finish)?;
        let (acked_index, finished) = self.0.report(batch).await?;
        Ok(Response::new(pb::ReportTaskEventsResponse { acked_index, finished }))
    }

    async fn list_runners(
        &self,
        request: Request<pb::ListRunnersRequest>,
    ) -> Result<Response<pb::ListRunnersResponse>, Status> {
        let namespace = principal(&request)?.namespace;
        let request = request.into_inner();
        let size = match request.page_size {
            0 => 100,
            size @ 1..=1000 => size as usize,
            _ => return Err(Error::invalid("page_size", "must be 1 to 1000, or 0").into()),
        };
        let after =
            match request.page_token.as_str() {
                "" => None,
                token => Some(page_name(token).ok_or_else(|| {
                    Error::invalid("page_token", "must come from the previous page")
                })?),
            };
        let mut seen = self.0.list(&namespace, after.as_deref(), size + 1);
        let more = seen.len() > size;
        seen.truncate(size);
        let last = seen.last().filter(|_| more);
        let next_page_token = last
            .map(|last| URL_SAFE_NO_PAD.encode(last.profile.runner.as_str()))
            .unwrap_or_default();
        let runners = seen.iter().map(convert::runner).collect();
        Ok(Response::new(pb::ListRunnersResponse { runners, next_page_token }))
    }

    async fn get_runner(
        &self,
        request: Request<pb::GetRunnerRequest>,
    ) -> Result<Response<pb::Runner>, Status> {
        let namespace = principal(&request)?.namespace;
        let runner = RunnerId::from(request.into_inner().runner_id);
        Ok(Response::new(convert::runner(&self.0.get(&namespace, &runner)?)))
    }

    async fn drain_runner(
        &self,
        request: Request<pb::DrainRunnerRequest>,
    ) -> Result<Response<()>, Status> {
        let principal = principal(&request)?;
        principal.require(Scope::Admin)?;
        let request = request.into_inner();
        let deadline = match request.deadline {
            None => DRAIN_DEADLINE,
            given => convert::from_duration("deadline", given)?,
        };
        let runner = RunnerId::from(request.runner_id);
        self.0.drain(&principal.namespace, &runner, deadline, request.hand_back, request.exit)?;
        Ok(Response::new(()))
    }
}

impl Service {
    /// The first message, which must come soon.
    async fn first<T>(&self, messages: &mut Streaming<T>) -> Result<T, Status> {
        let timeout = self.0.limits().hello_timeout;
        tokio::select! {
            message = messages.message() => message?.ok_or_else(|| {
                Error::invalid("body", "the stream ended before its first message").into()
            }),
            () = self.0.clock().sleep(timeout) => Err(Error::new(
                Kind::DeadlineExceeded,
                Reason::CallDeadline,
                format!("the first message did not come within {timeout:?}"),
            )
            .into()),
        }
    }
}

fn page_name(token: &str) -> Option<String> {
    String::from_utf8(URL_SAFE_NO_PAD.decode(token).ok()?).ok()
}

/// Reads a Connect stream until it ends.
async fn read_control(
    registry: Registry,
    key: SupplyKey,
    link: Link,
    mut messages: Streaming<pb::ConnectRequest>,
) {
    loop {
        let message = tokio::select! {
            biased;
            () = link.ended() => return,
            message = messages.message() => message,
        };
        let taken = match message {
            Ok(Some(message)) => convert::from_runner(message)
                .and_then(|message| registry.receive(key, &link, message)),
            // Half-closed, or broken.
            Ok(None) | Err(_) => return registry.detach(key, &link),
        };
        if let Err(error) = taken {
            return link.end(Some(error));
        }
    }
}

/// Reads an Output stream until it ends. Waits for nothing else.
async fn read_output(
    registry: Registry,
    key: SupplyKey,
    link: Link,
    first: pb::OutputRequest,
    mut messages: Streaming<pb::OutputRequest>,
) {
    let mut next = Some(first);
    let ended = link.clone();
    let mut ended = pin!(ended.ended());
    loop {
        let message = if let Some(first) = next.take() {
            Ok(Some(first))
        } else {
            tokio::select! {
                biased;
                () = &mut ended => return,
                message = messages.message() => message,
            }
        };
        let taken = match message {
            Ok(Some(message)) => {
                let seq = message.seq;
                convert::output(message)
                    .and_then(|(batches, credits)| registry.take(key, &link, seq, batches, credits))
            }
            Ok(None) | Err(_) => return registry.detach_output(key, &link),
        };
        if let Err(error) = taken {
            return link.end(Some(error));
        }
    }
}

/// Writes a Connect stream; when it is dropped, the session is detached.
struct ControlWriter {
    registry: Registry,
    key: SupplyKey,
    link: Link,
    bell: Arc<Notify>,
    stop: CancellationToken,
    ready: VecDeque<pb::ConnectResponse>,
    heartbeat_at: Mono,
    /// When to ask for a new stream, and after that when to end this one.
    renew_at: Mono,
    renewal_asked: bool,
    over: bool,
}

impl ControlWriter {
    fn new(
        registry: Registry,
        key: SupplyKey,
        link: Link,
        welcome: pb::ConnectResponse,
    ) -> Result<Self, Error> {
        let now = registry.clock().mono();
        Ok(Self {
            bell: registry.bell(key)?,
            stop: registry.supervisor().token(),
            ready: [welcome].into(),
            heartbeat_at: now + registry.limits().heartbeat_interval,
            renew_at: now + registry.limits().max_stream_age,
            renewal_asked: false,
            over: false,
            registry,
            key,
            link,
        })
    }

    async fn next(&mut self) -> Option<Result<pb::ConnectResponse, Status>> {
        loop {
            if let Some(message) = self.ready.pop_front() {
                return Some(Ok(message));
            }
            if self.over {
                return None;
            }
            if self.link.is_ended() {
                return self.end(self.link.take_why());
            }
            match self.registry.unsent(self.key, &self.link) {
                Ok(messages) => self.ready.extend(messages),
                Err(error) => return self.end(Some(error)),
            }
            if self.ready.is_empty()
                && let Err(error) = self.idle().await
            {
                return self.end(Some(error));
            }
        }
    }

    /// Waits for something to do, or does what the clock says.
    async fn idle(&mut self) -> Result<(), Error> {
        let (registry, now) = (&self.registry, self.registry.clock().mono());
        if self.stop.is_cancelled() {
            if self.renewal_asked {
                return Err(stopping());
            }
            self.renewal_asked = true;
            let ask = convert::reconnect(Duration::from_secs(1), "the server is shutting down");
            self.ready.push_back(registry.unnumbered(self.key, ask));
        } else if now >= self.heartbeat_at {
            self.heartbeat_at = now + registry.limits().heartbeat_interval;
            let beat = convert::heartbeat(registry.clock().now());
            self.ready.push_back(registry.unnumbered(self.key, beat));
        } else if now >= self.renew_at {
            if self.renewal_asked {
                let message = "the stream has reached its greatest age";
                return Err(Error::new(Kind::Unavailable, Reason::NotServing, message));
            }
            self.renewal_asked = true;
            self.renew_at = now + 2 * RENEWAL;
            let ask = convert::reconnect(RENEWAL, "planned renewal");
            self.ready.push_back(registry.unnumbered(self.key, ask));
        } else {
            tokio::select! {
                () = self.bell.notified() => {}
                () = self.link.ended() => {}
                () = self.stop.cancelled() => {}
                () = registry.clock().sleep_until(self.heartbeat_at.min(self.renew_at)) => {}
            }
        }
        Ok(())
    }

    fn end(&mut self, why: Option<Error>) -> Option<Result<pb::ConnectResponse, Status>> {
        self.over = true;
        why.map(|error| Err(error.into()))
    }
}

impl Drop for ControlWriter {
    fn drop(&mut self) {
        self.registry.detach(self.key, &self.link);
        // This writer may have taken a ring that was meant for the next.
        self.bell.notify_one();
    }
}

/// Writes an Output stream.
struct AckWriter {
    registry: Registry,
    key: SupplyKey,
    link: Link,
    bell: Arc<Notify>,
    stop: CancellationToken,
    /// Set once the server stops: the stream ends by then.
    stop_at: Option<Mono>,
    over: bool,
}

impl AckWriter {
    async fn next(&mut self) -> Option<Result<pb::OutputResponse, Status>> {
        loop {
            if self.over {
                return None;
            }
            if self.link.is_ended() {
                return self.end(self.link.take_why());
            }
            match self.registry.acks(self.key, &self.link) {
                Ok(Some(acks)) => return Some(Ok(acks)),
                Ok(None) => {}
                Err(error) => return self.end(Some(error)),
            }
            let now = self.registry.clock().mono();
            let mut wake_at = now + ACK_SWEEP;
            if self.stop.is_cancelled() {
                let stop_at = *self.stop_at.get_or_insert(now + LAST_ACKS);
                if now >= stop_at || !self.registry.is_storing(self.key) {
                    return self.end(Some(stopping()));
                }
                wake_at = stop_at;
            }
            tokio::select! {
                () = self.bell.notified() => {}
                () = self.link.ended() => {}
                () = self.stop.cancelled(), if self.stop_at.is_none() => {}
                () = self.registry.clock().sleep_until(wake_at) => {}
            }
        }
    }

    fn end(&mut self, why: Option<Error>) -> Option<Result<pb::OutputResponse, Status>> {
        self.over = true;
        why.map(|error| Err(error.into()))
    }
}

impl Drop for AckWriter {
    fn drop(&mut self) {
        self.registry.detach_output(self.key, &self.link);
        self.bell.notify_one();
    }
}

fn stopping() -> Error {
    Error::new(Kind::Unavailable, Reason::NotServing, "the server is shutting down")
        .retry_after(Duration::from_secs(1))
}
