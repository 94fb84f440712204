//! `RunnerService`: streams and calls in, the registry asked, streams and answers out.

mod streams;

use std::{pin::Pin, time::Duration};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use futures_util::{Stream, stream};
use prost::Message as _;
use tonic::{Code, Request, Response, Status, Streaming};

use self::streams::{AckWriter, ControlWriter, read_control, read_output};
use super::{
    Registry,
    convert::{self, commands},
    model::Fence,
    operate::Order,
    session::{Attached, Link},
};
use crate::{
    error::{Error, Kind, Reason},
    grpc::{auth::principal, protocol::CallTimeout},
    id::{Namespace, RunnerId},
    keys::Scope,
    pb::{self, server::runner_service_server},
};

/// Longest wait of a Poll.
const MAX_POLL_WAIT: Duration = Duration::from_secs(30);
/// A runner's answer to a command is waited for this long where the call has no deadline.
const MAX_COMMAND_WAIT: Duration = Duration::from_mins(15);

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
        self.0.take_over(&namespace, &hello).await?;
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
        let writer = AckWriter::new(self.0.clone(), key, link.clone(), bell);
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
                self.0.take_over(&namespace, &hello).await?;
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
        match principal.attempt() {
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
        let mut seen = self.0.list_all(&namespace, after.as_deref(), size + 1).await?;
        let more = seen.len() > size;
        seen.truncate(size);
        let last = seen.last().filter(|_| more);
        let next_page_token =
            last.map(|last| URL_SAFE_NO_PAD.encode(&last.runner_id)).unwrap_or_default();
        Ok(Response::new(pb::ListRunnersResponse { runners: seen, next_page_token }))
    }

    async fn get_runner(
        &self,
        request: Request<pb::GetRunnerRequest>,
    ) -> Result<Response<pb::Runner>, Status> {
        let namespace = principal(&request)?.namespace;
        let runner = RunnerId::from(request.into_inner().runner_id);
        Ok(Response::new(self.0.get_any(&namespace, &runner).await?))
    }

    async fn drain_runner(
        &self,
        request: Request<pb::DrainRunnerRequest>,
    ) -> Result<Response<()>, Status> {
        let caller = principal(&request)?;
        caller.require(Scope::Admin)?;
        if request.get_ref().wait {
            // The runner may have left by now, as it was asked to.
            self.obey("drain", request, commands::drain).await?;
            return Ok(Response::new(()));
        }
        let request = request.into_inner();
        let asked = ("drain", request.encode_to_vec());
        let order = commands::drain(request)?;
        let namespace = &caller.namespace;
        let elsewhere = self.0.order_elsewhere(namespace, &order.runner, asked, Duration::ZERO);
        match elsewhere.await? {
            // Its answer is shown to who asks for the runner.
            None => drop(self.0.send_order(namespace, order)?),
            Some(status) if status.code == 0 => {}
            Some(status) => return Err(told(&status)),
        }
        Ok(Response::new(()))
    }

    async fn pause_runner(
        &self,
        request: Request<pb::PauseRunnerRequest>,
    ) -> Result<Response<pb::Runner>, Status> {
        self.order("pause", request, commands::pause).await
    }

    async fn resume_runner(
        &self,
        request: Request<pb::ResumeRunnerRequest>,
    ) -> Result<Response<pb::Runner>, Status> {
        self.order("resume", request, commands::resume).await
    }

    async fn apply_model(
        &self,
        request: Request<pb::ApplyModelRequest>,
    ) -> Result<Response<pb::Runner>, Status> {
        self.order("apply", request, commands::apply).await
    }

    async fn reload_runner(
        &self,
        request: Request<pb::ReloadRunnerRequest>,
    ) -> Result<Response<pb::Runner>, Status> {
        self.order("reload", request, commands::reload).await
    }

    async fn tune_runner(
        &self,
        request: Request<pb::TuneRunnerRequest>,
    ) -> Result<Response<pb::Runner>, Status> {
        self.order("tune", request, commands::tune).await
    }
}

impl Service {
    /// Gives an order, waits for the runner's answer and shows the runner.
    async fn order<T: prost::Message + Clone>(
        &self,
        kind: &str,
        request: Request<T>,
        parse: fn(T) -> Result<Order, Error>,
    ) -> Result<Response<pb::Runner>, Status> {
        let (namespace, runner) = self.obey(kind, request, parse).await?;
        Ok(Response::new(self.0.get_any(&namespace, &runner).await?))
    }

    /// Gives an order and waits for the runner's answer as long as the call may last.
    async fn obey<T: prost::Message + Clone>(
        &self,
        kind: &str,
        request: Request<T>,
        parse: fn(T) -> Result<Order, Error>,
    ) -> Result<(Namespace, RunnerId), Status> {
        let caller = principal(&request)?;
        caller.require(Scope::Admin)?;
        let given = request.extensions().get::<CallTimeout>().map(|timeout| timeout.0);
        let wait = given.unwrap_or(MAX_COMMAND_WAIT).min(MAX_COMMAND_WAIT);
        let request = request.into_inner();
        let order = parse(request.clone())?;
        let runner = order.runner.clone();
        let asked = (kind, request.encode_to_vec());
        match self.0.order_elsewhere(&caller.namespace, &runner, asked, wait).await? {
            None => self.0.order(&caller.namespace, order, wait).await?,
            Some(status) if status.code == 0 => {}
            Some(status) => return Err(told(&status)),
        }
        Ok((caller.namespace, runner))
    }

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

/// The refusal of another server, as it was told.
fn told(status: &pb::google::rpc::Status) -> Status {
    let details = status.encode_to_vec().into();
    Status::with_details(Code::from_i32(status.code), status.message.as_str(), details)
}

fn page_name(token: &str) -> Option<String> {
    String::from_utf8(URL_SAFE_NO_PAD.decode(token).ok()?).ok()
}
