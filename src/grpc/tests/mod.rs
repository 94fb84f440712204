//! The edge over real sockets, with a service that misbehaves on purpose.

mod credentials;

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{StreamExt as _, future::BoxFuture};
use http::{Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::Notify,
};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, body::Body, server::NamedService};
use tower::Service;

use super::{
    calls::{Calls, Parts, Services},
    health::{self, Health},
    layers::{CORRELATION, CorrelationId, Edge},
    serve,
    status::{error_reason, retry_delay},
};
use crate::{
    clock::Clock,
    config::{self, Config},
    id::Entropy,
    keys::{Keyring, Principal, Scope, Scopes},
    pb::{
        self, key_service_client::KeyServiceClient, server::key_service_server::KeyServiceServer,
        task_service_client::TaskServiceClient,
    },
    supervisor::Supervisor,
    telemetry::Metrics,
};

const BOUND: Duration = Duration::from_secs(10);

/// Counts what became of its calls.
#[derive(Clone, Default)]
struct Odd {
    finished: Arc<AtomicUsize>,
    gate: Arc<Notify>,
    entered: Arc<Notify>,
}

impl NamedService for Odd {
    const NAME: &'static str = "baton.v1.TaskService";
}

impl Service<Request<Body>> for Odd {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let odd = self.clone();
        let method = request.uri().path().rsplit('/').next().unwrap().to_owned();
        Box::pin(async move {
            let response = match method.as_str() {
                "GetTask" => panic!("a handler's secret"),
                "ExplainTask" => Status::internal("SELECT password FROM users").into_http(),
                "CancelTask" => {
                    odd.entered.notify_one();
                    odd.gate.notified().await;
                    odd.finished.fetch_add(1, Ordering::SeqCst);
                    Status::not_found("gone").into_http()
                }
                "StreamTask" => stream(false),
                "WatchTasks" => stream(true),
                "ListTasks" => {
                    let Principal { namespace, .. } = request.extensions().get().unwrap();
                    let CorrelationId(id) = request.extensions().get().unwrap();
                    Status::aborted(format!("{namespace} {id}")).into_http()
                }
                other => panic!("unexpected {other}"),
            };
            Ok(response)
        })
    }
}

/// One empty message, then silence, or a panic.
fn stream(panics: bool) -> Response<Body> {
    let first = Ok::<_, Status>(Frame::data(Bytes::from_static(&[0; 5])));
    let rest = futures_util::stream::once(async move {
        assert!(!panics, "in the middle");
        std::future::pending().await
    });
    let body = StreamBody::new(futures_util::stream::iter([first]).chain(rest));
    let mut response = Response::new(Body::new(body));
    let kind = http::HeaderValue::from_static("application/grpc");
    response.headers_mut().insert(http::header::CONTENT_TYPE, kind);
    response
}

struct Bench {
    addr: SocketAddr,
    odd: Odd,
    keyring: Keyring,
    metrics: Metrics,
    supervisor: Supervisor,
    threads_end: CancellationToken,
    _dir: tempfile::TempDir,
}

impl Bench {
    async fn new(adjust: impl FnOnce(&mut Config)) -> Self {
        let mut config = Config::default();
        config.auth.required = false;
        adjust(&mut config);
        let dir = tempfile::tempdir().unwrap();
        let db = crate::db::testing::open(dir.path()).await;
        let (clock, entropy) = (Clock::system(), Entropy::seeded(1));
        let keyring = Keyring::open(db, clock, entropy.clone(), !config.auth.required).await;
        let keyring = keyring.unwrap();
        let (odd, metrics, supervisor) = (Odd::default(), Metrics::new(), Supervisor::new());
        let keys = crate::keys::Service::new(keyring.clone());
        let keys = KeyServiceServer::new(keys)
            .max_decoding_message_size(usize::try_from(config.limits.message).unwrap());
        let services = Services::new().with(odd.clone()).with(keys);
        let health = Health::new(&services).await;
        health.set(true).await;
        let services = health::with_reflection(services.with(health.server())).unwrap();
        let calls = Calls::new(Parts {
            services,
            keyring: keyring.clone(),
            auth: config.auth.clone(),
            limits: config.limits.clone(),
            metrics: metrics.clone(),
            supervisor: supervisor.clone(),
        });
        let edge = Edge::new(calls, health::router(health, metrics.clone(), || ()), &entropy);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let threads_end = CancellationToken::new();
        let threads = config.server.io_threads;
        supervisor.spawn_flushing_loop(
            "accept",
            serve::serve(listener, serve::Port { edge, tls: None }, threads, threads_end.clone()),
        );
        Self { addr, odd, keyring, metrics, supervisor, threads_end, _dir: dir }
    }

    async fn channel(&self) -> tonic::transport::Channel {
        tonic::transport::Endpoint::new(format!("http://{}", self.addr))
            .unwrap()
            .connect()
            .await
            .unwrap()
    }

    async fn tasks(&self) -> TaskServiceClient<tonic::transport::Channel> {
        TaskServiceClient::new(self.channel().await)
    }

    /// A request over HTTP/2 as raw as it gets.
    async fn raw(&self, request: Request<Full<Bytes>>) -> Response<Bytes> {
        let stream = TcpStream::connect(self.addr).await.unwrap();
        let (mut send, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
                .await
                .unwrap();
        self.supervisor.spawn("client", async move {
            let _ = connection.await;
        });
        let (head, body) = send.send_request(request).await.unwrap().into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        Response::from_parts(head, body)
    }

    fn post(&self, path: &str) -> http::request::Builder {
        Request::post(format!("http://{}{path}", self.addr))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
    }
}

fn reason(status: &Status) -> String {
    error_reason(status).map(|(reason, _)| reason).unwrap_or_default()
}

/// Waits until the peer closes; the bound of the test is the time limit of the wait.
async fn closed(mut stream: TcpStream) {
    let mut sink = Vec::new();
    let ended = tokio::time::timeout(BOUND, stream.read_to_end(&mut sink)).await;
    // A reset is as good as a close.
    ended.expect("the server closes the connection").ok();
}

#[tokio::test]
async fn a_connection_that_says_nothing_is_closed() {
    let short = |config: &mut Config| config.limits.handshake_timeout = Duration::from_millis(50);
    let bench = Bench::new(short).await;
    closed(TcpStream::connect(bench.addr).await.unwrap()).await;
}

#[tokio::test]
async fn half_a_preface_and_half_a_request_head_are_closed() {
    let bench = Bench::new(|config| {
        config.limits.handshake_timeout = Duration::from_millis(50);
        config.limits.header_timeout = Duration::from_millis(50);
    })
    .await;
    for start in ["PRI * HTTP/2.0\r\n", "GET /livez HTTP/1.1\r\nhost: a-long-name-of-a-host\r\n"] {
        let mut stream = TcpStream::connect(bench.addr).await.unwrap();
        stream.write_all(start.as_bytes()).await.unwrap();
        closed(stream).await;
    }
}

#[tokio::test]
async fn an_http2_peer_that_answers_no_ping_is_closed() {
    let bench = Bench::new(|config| {
        config.limits.keepalive_interval = Duration::from_millis(50);
        config.limits.keepalive_timeout = Duration::from_millis(50);
    })
    .await;
    let mut stream = TcpStream::connect(bench.addr).await.unwrap();
    let settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    stream.write_all(&settings).await.unwrap();
    closed(stream).await;
}

#[tokio::test]
async fn connections_over_the_cap_are_closed_and_counted() {
    let bench = Bench::new(|config| config.limits.connections_per_ip = 1).await;
    let _first = bench.channel().await;
    closed(TcpStream::connect(bench.addr).await.unwrap()).await;
    assert!(bench.metrics.text().contains("reason=\"connections_per_ip\"} 1"));
}

#[tokio::test]
async fn one_port_speaks_http_1_and_grpc_on_several_threads() {
    let bench = Bench::new(|config| config.server.io_threads = 2).await;
    for _ in 0..3 {
        let url = format!("http://{}/readyz", bench.addr);
        let answer = reqwest::get(&url).await.unwrap();
        assert!(answer.headers().contains_key(CORRELATION.as_str()));
        assert_eq!(answer.text().await.unwrap(), "ready\n");
        let status = bench.tasks().await.list_tasks(pb::ListTasksRequest::default()).await;
        assert_eq!(status.unwrap_err().code(), Code::Aborted);
    }
    bench.supervisor.shutdown(BOUND, &Clock::system()).await;
    bench.threads_end.cancel();
}

#[tokio::test]
async fn a_panic_ends_one_call_and_tells_nothing() {
    let bench = Bench::new(|_| ()).await;
    let mut tasks = bench.tasks().await;
    let status = tasks.get_task(pb::GetTaskRequest::default()).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::Internal, "internal error"));
    let status = tasks.explain_task(pb::ExplainTaskRequest::default()).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::Internal, "internal error"));
    let mut stream =
        tasks.watch_tasks(pb::WatchTasksRequest::default()).await.unwrap().into_inner();
    assert!(stream.message().await.unwrap().is_some());
    let status = stream.message().await.unwrap_err();
    assert_eq!((status.code(), reason(&status).as_str()), (Code::Internal, "INTERNAL"));
    let status = tasks.list_tasks(pb::ListTasksRequest::default()).await.unwrap_err();
    assert_eq!(status.code(), Code::Aborted, "the connection goes on");
    assert_eq!(bench.supervisor.panics(), 2);
}

#[tokio::test]
async fn a_deadline_ends_unary_calls_and_streams() {
    let bench = Bench::new(|_| ()).await;
    let mut tasks = bench.tasks().await;
    // The header alone: tonic's client would enforce `set_timeout` itself.
    let with_timeout = |value: &str| {
        let mut request = tonic::Request::new(pb::StreamTaskRequest::default());
        request.metadata_mut().insert("grpc-timeout", value.parse().unwrap());
        request
    };
    let mut stream = tasks.stream_task(with_timeout("100m")).await.unwrap().into_inner();
    assert!(stream.message().await.unwrap().is_some());
    let ended = tokio::time::timeout(BOUND, stream.message()).await.unwrap().unwrap_err();
    assert_eq!((ended.code(), reason(&ended).as_str()), (Code::DeadlineExceeded, "CALL_DEADLINE"));

    let call = bench.post("/baton.v1.TaskService/CancelTask").header("grpc-timeout", "50m");
    let answer = bench.raw(call.body(Full::default()).unwrap()).await;
    assert_eq!(answer.headers()["grpc-status"], "4");

    for malformed in ["", "S", "5", "123456789S", "1.5S", "-1S", "5s"] {
        let ended = tasks.stream_task(with_timeout(malformed)).await.unwrap_err();
        assert_eq!(ended.code(), Code::InvalidArgument, "{malformed}");
    }
}

#[tokio::test]
async fn a_unary_call_is_finished_when_its_client_is_gone() {
    let bench = Bench::new(|_| ()).await;
    let mut tasks = bench.tasks().await;
    let mut call = Box::pin(tasks.cancel_task(pb::CancelTaskRequest::default()));
    tokio::select! {
        _ = &mut call => panic!("the gate is closed"),
        () = bench.odd.entered.notified() => {}
    }
    drop(call);
    drop(tasks);
    // Once the reset has arrived the call's permit is the detached work's.
    bench.odd.gate.notify_one();
    let done = async {
        while bench.odd.finished.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(BOUND, done).await.unwrap();
}

#[tokio::test]
async fn calls_over_the_limit_are_shed_but_health_answers() {
    let bench = Bench::new(|config| config.limits.calls = 1).await;
    let mut tasks = bench.tasks().await;
    let mut first =
        Box::pin(async { bench.tasks().await.cancel_task(pb::CancelTaskRequest::default()).await });
    tokio::select! {
        _ = &mut first => panic!("the gate is closed"),
        () = bench.odd.entered.notified() => {}
    }
    let status = tasks.list_tasks(pb::ListTasksRequest::default()).await.unwrap_err();
    assert_eq!((status.code(), reason(&status).as_str()), (Code::ResourceExhausted, "OVERLOADED"));
    assert!(retry_delay(&status).is_some());
    let mut health = tonic_health::pb::health_client::HealthClient::new(bench.channel().await);
    health.check(tonic_health::pb::HealthCheckRequest::default()).await.unwrap();
    bench.odd.gate.notify_one();
    assert_eq!(first.await.unwrap_err().code(), Code::NotFound);
    let status = tasks.list_tasks(pb::ListTasksRequest::default()).await.unwrap_err();
    assert_eq!(status.code(), Code::Aborted);
}

#[tokio::test]
async fn a_message_over_the_limit_is_refused_with_its_reason() {
    let bench = Bench::new(|config| config.limits.message = 1_024).await;
    let mut keys = KeyServiceClient::new(bench.channel().await);
    let display_name = "x".repeat(2_000);
    let request = pb::CreateKeyRequest { display_name, ..Default::default() };
    let status = keys.create_key(request).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    let (reason, metadata) = error_reason(&status).unwrap();
    assert_eq!((reason.as_str(), metadata["limit_bytes"].as_str()), ("MESSAGE_TOO_LARGE", "1024"));
}

#[tokio::test]
async fn what_is_not_grpc_is_refused_as_http() {
    let bench = Bench::new(|_| ()).await;
    let path = "/baton.v1.TaskService/ListTasks";
    let wrong = Request::post(format!("http://{}{path}", bench.addr))
        .header("content-type", "text/html")
        .body(Full::default())
        .unwrap();
    assert_eq!(bench.raw(wrong).await.status(), 415);
    let get = Request::get(format!("http://{}{path}", bench.addr)).body(Full::default()).unwrap();
    assert_eq!(bench.raw(get).await.status(), 405);
    let answer = reqwest::Client::new().post(format!("http://{}{path}", bench.addr)).send().await;
    assert_eq!(answer.unwrap().status(), 505);
    let unknown = bench.post("/baton.v1.TaskService/Nope").body(Full::default()).unwrap();
    let answer = bench.raw(unknown).await;
    assert_eq!(answer.headers()["grpc-status"], "12");
    assert_eq!(reason(&Status::from_header_map(answer.headers()).unwrap()), "UNIMPLEMENTED");
}

#[tokio::test]
async fn malformed_requests_and_metadata_are_the_clients_mistake() {
    let bench = Bench::new(|_| ()).await;
    let path = "/baton.v1.KeyService/ListKeys";
    let bad = bench.post(path).header("x-thing-bin", "not base64!").body(Full::default()).unwrap();
    assert_eq!(bench.raw(bad).await.headers()["grpc-status"], "3");
    // A field of type varint that ends in the middle; then a message that is missing.
    for body in [&[0, 0, 0, 0, 2, 8, 255][..], &[], &[9, 0, 0, 0, 0]] {
        let request = bench.post(path).body(Full::new(Bytes::copy_from_slice(body))).unwrap();
        let answer = bench.raw(request).await;
        assert_eq!(answer.headers()["grpc-status"], "3", "{body:?} {:?}", answer.headers());
    }
}

#[tokio::test]
async fn correlation_ids_are_echoed_or_made_and_never_dangerous() {
    let bench = Bench::new(|_| ()).await;
    let call = async |id: &str| {
        let request = bench
            .post("/baton.v1.TaskService/ListTasks")
            .header(CORRELATION, id)
            .body(Full::default())
            .unwrap();
        let answer = bench.raw(request).await;
        let header = answer.headers()[CORRELATION].to_str().unwrap().to_owned();
        let status = Status::from_header_map(answer.headers()).unwrap();
        assert_eq!(status.message(), format!("default {header}"), "the handler sees the same");
        header
    };
    assert_eq!(call("req-42").await, "req-42");
    let long = "x".repeat(7_000);
    for dangerous in ["a b", "\"quoted\"", "a\tb", "", long.as_str()] {
        let made = call(dangerous).await;
        assert!(made != dangerous && made.len() == 24, "{made}");
    }
    let mut request = tonic::Request::new(pb::GetTaskRequest::default());
    request.metadata_mut().insert("x-correlation-id", "mine".parse().unwrap());
    let status = bench.tasks().await.get_task(request).await.unwrap_err();
    assert_eq!(status.metadata().get(CORRELATION.as_str()).unwrap(), "mine");
}

#[tokio::test]
async fn a_shutdown_ends_streams_with_a_hint_and_silent_connections_at_once() {
    let bench = Bench::new(|_| ()).await;
    let mut tasks = bench.tasks().await;
    let mut stream =
        tasks.stream_task(pb::StreamTaskRequest::default()).await.unwrap().into_inner();
    assert!(stream.message().await.unwrap().is_some());
    let silent = TcpStream::connect(bench.addr).await.unwrap();
    let shutdown = tokio::time::timeout(
        Duration::from_secs(5),
        bench.supervisor.shutdown(Duration::from_secs(30), bench.keyring.clock()),
    );
    let (ended, down, ()) = tokio::join!(stream.message(), shutdown, closed(silent));
    down.expect("well within the grace");
    let ended = ended.unwrap_err();
    assert_eq!((ended.code(), reason(&ended).as_str()), (Code::Unavailable, "NOT_SERVING"));
    assert!(retry_delay(&ended).is_some());
    assert!(TcpStream::connect(bench.addr).await.is_err(), "the port is closed");
}

#[tokio::test]
async fn concurrent_streams_of_a_connection_are_limited() {
    let bench = Bench::new(|config| config.limits.streams_per_connection = 2).await;
    let tasks = bench.tasks().await;
    let open = async || {
        let mut tasks = tasks.clone();
        tasks.stream_task(pb::StreamTaskRequest::default()).await.unwrap()
    };
    let (_first, _second) = (open().await, open().await);
    let third = tokio::time::timeout(Duration::from_millis(200), open()).await;
    assert!(third.is_err(), "the third waits in the client");
}
