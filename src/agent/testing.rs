//! A scripted server: the test holds the other ends of the streams.

use std::{sync::Arc, time::Duration};

use futures_util::{FutureExt as _, future::BoxFuture};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::mpsc, task::JoinSet, time::timeout};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming, transport::Server};

use super::{
    Config, Shutdown,
    emitter::Emitter,
    engine::{Completion, Engine, Failure, Work},
};
use crate::{
    clock::{Clock, Micros},
    error::{Error, Kind, Reason},
    grpc::status::to_rpc_status,
    id::{Entropy, TaskId},
    pb::{
        self,
        connect_request::Body as FromRunner,
        connect_response::Body as ToRunner,
        server::runner_service_server::{RunnerService, RunnerServiceServer},
    },
};

/// Longest wait for anything.
pub const SOON: Duration = Duration::from_secs(20);

type Answers<T> = mpsc::Sender<Result<T, Status>>;
/// A unary call, with the end that answers it.
pub type Call<Q, A> = (Request<Q>, tokio::sync::oneshot::Sender<Result<A, Status>>);

/// The server's end of `Connect`.
pub struct Control {
    pub requests: Streaming<pb::ConnectRequest>,
    pub answers: Answers<pb::ConnectResponse>,
    pub hello: pb::Hello,
    /// The `ack` that Hello came with.
    pub ack: u64,
    seq: u64,
}

/// The server's end of `Output`.
pub struct Output {
    pub requests: Streaming<pb::OutputRequest>,
    pub answers: Answers<pb::OutputResponse>,
    pub session_id: String,
}

struct Service {
    controls: mpsc::Sender<Control>,
    outputs: mpsc::Sender<Output>,
    polls: mpsc::Sender<Call<pb::PollRequest, pb::PollResponse>>,
    reports: mpsc::Sender<Call<pb::ReportTaskEventsRequest, pb::ReportTaskEventsResponse>>,
    refusal: Arc<Mutex<Option<Status>>>,
}

async fn ask<Q, A>(calls: &mpsc::Sender<Call<Q, A>>, request: Request<Q>) -> Result<A, Status> {
    let (answer, answered) = tokio::sync::oneshot::channel();
    let gone = |_| Status::unavailable("the test is over");
    calls.send((request, answer)).await.map_err(|_| Status::unavailable("the test is over"))?;
    answered.await.map_err(gone)?
}

#[tonic::async_trait]
impl RunnerService for Service {
    type ConnectStream = ReceiverStream<Result<pb::ConnectResponse, Status>>;
    type OutputStream = ReceiverStream<Result<pb::OutputResponse, Status>>;

    async fn connect(
        &self,
        request: Request<Streaming<pb::ConnectRequest>>,
    ) -> Result<Response<Self::ConnectStream>, Status> {
        if let Some(status) = self.refusal.lock().clone() {
            return Err(status);
        }
        let mut requests = request.into_inner();
        let first = requests.message().await?.unwrap();
        let Some(FromRunner::Hello(hello)) = first.body else { panic!("no Hello: {first:?}") };
        assert_eq!(first.seq, 0);
        let (answers, stream) = mpsc::channel(64);
        let control = Control { requests, answers, hello, ack: first.ack, seq: 0 };
        self.controls.send(control).await.unwrap();
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn output(
        &self,
        request: Request<Streaming<pb::OutputRequest>>,
    ) -> Result<Response<Self::OutputStream>, Status> {
        let mut requests = request.into_inner();
        let first = requests.message().await?.unwrap();
        let (answers, stream) = mpsc::channel(64);
        let session_id = first.hello.unwrap().session_id;
        self.outputs.send(Output { requests, answers, session_id }).await.unwrap();
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn poll(
        &self,
        request: Request<pb::PollRequest>,
    ) -> Result<Response<pb::PollResponse>, Status> {
        ask(&self.polls, request).await.map(Response::new)
    }

    async fn report_task_events(
        &self,
        request: Request<pb::ReportTaskEventsRequest>,
    ) -> Result<Response<pb::ReportTaskEventsResponse>, Status> {
        ask(&self.reports, request).await.map(Response::new)
    }

    async fn list_runners(
        &self,
        _: Request<pb::ListRunnersRequest>,
    ) -> Result<Response<pb::ListRunnersResponse>, Status> {
        Err(Status::unimplemented("not scripted"))
    }

    async fn get_runner(
        &self,
        _: Request<pb::GetRunnerRequest>,
    ) -> Result<Response<pb::Runner>, Status> {
        Err(Status::unimplemented("not scripted"))
    }

    async fn drain_runner(
        &self,
        _: Request<pb::DrainRunnerRequest>,
    ) -> Result<Response<()>, Status> {
        Err(Status::unimplemented("not scripted"))
    }

    async fn pause_runner(
        &self,
        _: Request<pb::PauseRunnerRequest>,
    ) -> Result<Response<pb::Runner>, Status> {
        Err(Status::unimplemented("not scripted"))
    }

    async fn resume_runner(
        &self,
        _: Request<pb::ResumeRunnerRequest>,
    ) -> Result<Response<pb::Runner>, Status> {
        Err(Status::unimplemented("not scripted"))
    }

    async fn apply_model(
        &self,
        _: Request<pb::ApplyModelRequest>,
    ) -> Result<Response<pb::Runner>, Status> {
        Err(Status::unimplemented("not scripted"))
    }

    async fn reload_runner(
        &self,
        _: Request<pb::ReloadRunnerRequest>,
    ) -> Result<Response<pb::Runner>, Status> {
        Err(Status::unimplemented("not scripted"))
    }

    async fn tune_runner(
        &self,
        _: Request<pb::TuneRunnerRequest>,
    ) -> Result<Response<pb::Runner>, Status> {
        Err(Status::unimplemented("not scripted"))
    }
}

/// A scripted server and one runner.
pub struct Rig {
    pub shutdown: Shutdown,
    pub controls: mpsc::Receiver<Control>,
    pub outputs: mpsc::Receiver<Output>,
    pub polls: mpsc::Receiver<Call<pb::PollRequest, pb::PollResponse>>,
    pub reports: mpsc::Receiver<Call<pb::ReportTaskEventsRequest, pb::ReportTaskEventsResponse>>,
    pub refusal: Arc<Mutex<Option<Status>>>,
    server: JoinSet<()>,
    runner: JoinSet<anyhow::Result<()>>,
}

impl Rig {
    /// Starts the server and a runner, set up by `configure`.
    pub async fn start(engine: impl Engine, configure: impl FnOnce(&mut Config)) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (controls_in, controls) = mpsc::channel(16);
        let (outputs_in, outputs) = mpsc::channel(16);
        let (polls_in, polls) = mpsc::channel(16);
        let (reports_in, reports) = mpsc::channel(16);
        let refusal = Arc::new(Mutex::new(None));
        let service = Service {
            controls: controls_in,
            outputs: outputs_in,
            polls: polls_in,
            reports: reports_in,
            refusal: refusal.clone(),
        };
        let mut server = JoinSet::new();
        server.spawn(
            Server::builder()
                .add_service(RunnerServiceServer::new(service))
                .serve_with_incoming(TcpListenerStream::new(listener))
                .map(|_| ()),
        );
        let entropy = Entropy::seeded(3);
        let settings = super::engine::Settings::Echo;
        let mut config = Config::new(address.to_string(), settings, &entropy);
        config.engine_threads = 0;
        config.slots = 2;
        configure(&mut config);
        let shutdown = Shutdown::default();
        let connector = super::connection::connector(&config.server, &config.trust).unwrap();
        let mut runner = JoinSet::new();
        runner.spawn(super::run_with(
            config,
            Arc::new(engine),
            connector,
            Clock::system(),
            entropy,
            shutdown.clone(),
        ));
        Self { shutdown, controls, outputs, polls, reports, refusal, server, runner }
    }

    /// The runner's next `Connect`.
    pub async fn control(&mut self) -> Control {
        timeout(SOON, self.controls.recv()).await.expect("no Connect came").unwrap()
    }

    /// The runner's next `Output`.
    pub async fn output(&mut self) -> Output {
        timeout(SOON, self.outputs.recv()).await.expect("no Output came").unwrap()
    }

    /// Both, welcomed.
    pub async fn session(&mut self) -> (Control, Output) {
        let control = self.control().await;
        control.welcome(welcome("s1", false)).await;
        let output = self.output().await;
        assert_eq!(output.session_id, "s1");
        (control, output)
    }

    /// How the runner ended.
    pub async fn ended(&mut self) -> anyhow::Result<()> {
        timeout(SOON, self.runner.join_next()).await.expect("the runner goes on").unwrap().unwrap()
    }

    /// Whether the server still runs.
    pub fn is_serving(&self) -> bool {
        !self.server.is_empty()
    }
}

/// A Welcome with a heartbeat interval of an hour.
pub fn welcome(session_id: &str, resumed: bool) -> pb::Welcome {
    pb::Welcome {
        version: 1,
        session_id: session_id.into(),
        resumed,
        heartbeat_interval: Some(prost_types::Duration { seconds: 3600, nanos: 0 }),
        ..pb::Welcome::default()
    }
}

impl Control {
    /// Answers Hello.
    pub async fn welcome(&self, welcome: pb::Welcome) {
        let body = Some(ToRunner::Welcome(welcome));
        let message = pb::ConnectResponse { seq: 0, ack: 0, body };
        self.answers.send(Ok(message)).await.unwrap();
    }

    /// Sends a numbered message.
    pub async fn send(&mut self, body: ToRunner) {
        self.seq += 1;
        let message = pb::ConnectResponse { seq: self.seq, ack: 0, body: Some(body) };
        self.answers.send(Ok(message)).await.unwrap();
    }

    /// The runner's next message.
    pub async fn next(&mut self) -> pb::ConnectRequest {
        let message = timeout(SOON, self.requests.message()).await.expect("no message came");
        message.unwrap().expect("the runner ended the stream")
    }

    /// The first message that `pick` picks; others are passed over.
    pub async fn find<T>(&mut self, mut pick: impl FnMut(FromRunner) -> Option<T>) -> T {
        loop {
            if let Some(found) = pick(self.next().await.body.unwrap()) {
                return found;
            }
        }
    }

    /// The next announcement of credits by control.
    pub async fn credits(&mut self) -> pb::Credits {
        self.find(|body| match body {
            FromRunner::Credits(credits) => Some(credits),
            _ => None,
        })
        .await
    }
}

/// An attempt's events as they came, with its end.
#[derive(Debug, Default)]
pub struct Received {
    pub text: String,
    pub next_index: u64,
    pub finish: Option<pb::Finish>,
    pub credits: Option<pb::Credits>,
}

impl Output {
    /// The next message.
    pub async fn next(&mut self) -> pb::OutputRequest {
        let message = timeout(SOON, self.requests.message()).await.expect("no message came");
        message.unwrap().expect("the runner ended the stream")
    }

    /// Reads one attempt's events until `enough`, which sees what came so far.
    pub async fn read(&mut self, enough: impl Fn(&Received) -> bool) -> Received {
        let mut received = Received::default();
        while !enough(&received) {
            let message = self.next().await;
            received.credits = message.credits.or(received.credits.take());
            for lease in message.leases {
                if received.next_index != 0 && !lease.events.is_empty() {
                    assert_eq!(lease.first_index, received.next_index, "events out of order");
                }
                received.next_index = lease.first_index + lease.events.len() as u64;
                for event in lease.events {
                    if let Some(pb::runner_event::Body::Token(text)) = event.body {
                        received.text.push_str(&text);
                    }
                }
                received.finish = lease.finish.or(received.finish.take());
            }
        }
        received
    }

    /// Answers for one attempt.
    pub async fn ack(&self, task: TaskId, acked_index: u64, finished: bool) {
        self.answer(pb::LeaseAck { acked_index, finished, ..lease(task) }).await;
    }

    /// Answers with an error for one attempt.
    pub async fn refuse(&self, task: TaskId, reason: Reason, resend_from: u64) {
        let error = Error::new(Kind::Aborted, reason, "as scripted");
        let error = Some(to_rpc_status(&error));
        self.answer(pb::LeaseAck { error, resend_from, ..lease(task) }).await;
    }

    async fn answer(&self, lease: pb::LeaseAck) {
        let answer = pb::OutputResponse { ack: 0, leases: vec![lease] };
        self.answers.send(Ok(answer)).await.unwrap();
    }
}

fn lease(task: TaskId) -> pb::LeaseAck {
    pb::LeaseAck { task_id: task.to_string(), attempt: 1, ..pb::LeaseAck::default() }
}

/// A task's id.
pub fn task(n: u64) -> TaskId {
    TaskId::new(Micros(1_000_000), &Entropy::seeded(n))
}

/// The first attempt of a task for the engine `echo`.
pub fn assign(task: TaskId, text: &str, params: &Value) -> ToRunner {
    ToRunner::Assign(pb::Assign {
        task_id: task.to_string(),
        attempt: 1,
        model: "test/echo".into(),
        input_json: json!({"text": text}).to_string().into(),
        params_json: params.to_string().into(),
        attempt_token: "attempt-token".into(),
        ..pb::Assign::default()
    })
}

/// An engine that says one word and then waits for ever; tells when it is dropped.
#[derive(Clone, Default)]
pub struct Stuck {
    pub dropped: Arc<tokio::sync::Notify>,
}

struct TellDrop(Arc<tokio::sync::Notify>);

impl Drop for TellDrop {
    fn drop(&mut self) {
        self.0.notify_one();
    }
}

impl Engine for Stuck {
    fn name(&self) -> &'static str {
        "stuck"
    }

    fn version(&self) -> String {
        "1".into()
    }

    fn run(&self, _: Work, emitter: Emitter) -> BoxFuture<'static, Result<Completion, Failure>> {
        let tell = TellDrop(self.dropped.clone());
        Box::pin(async move {
            let _tell = tell;
            emitter.token("begun").await?;
            std::future::pending().await
        })
    }
}
