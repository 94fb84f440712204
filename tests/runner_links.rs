//! The real agent on the real service, over connections that are cut at random: nothing is
//! lost, nothing runs twice, every transcript is whole.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{collections::VecDeque, sync::Arc, time::Duration};

use baton::{
    agent,
    blob::Blobs,
    clock::Clock,
    db::Db,
    events::Tail,
    id::{Entropy, Namespace, TaskId},
    instances::Standing,
    keys::{Principal, Signer},
    pb::{Frame, server::runner_service_server::RunnerServiceServer, task_event::Body},
    queue::{self, Queue, SupplyKey},
    relay::{self, Relay},
    runners::{Ports, Registry, RunnerLimits, service::Service},
    supervisor::Supervisor,
    tasks::{
        ledger::{self, Ledger, NewTask, Parts, Start},
        model::{RetryPolicy, Spec, State, Task},
        reads, store,
        timers::Timers,
    },
    telemetry::Metrics,
};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{DuplexStream, copy_bidirectional, duplex},
    sync::{mpsc, watch},
};
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Status};

const N_TASKS: usize = 60;
const N_WORDS: usize = 40;

struct Server {
    parts: Parts,
    ledger: Ledger,
    registry: Registry,
    supervisor: Supervisor,
    connections: mpsc::Sender<DuplexStream>,
    cut: watch::Sender<u64>,
    /// Entries on stable storage.
    n_recorded: watch::Sender<u64>,
    _dir: tempfile::TempDir,
}

impl Server {
    async fn start() -> Arc<Self> {
        let dir = tempfile::tempdir().unwrap();
        let clock = Clock::system();
        let parts = Parts {
            db: Db::open(&dir.path().join("baton.db")).await.unwrap(),
            blobs: Blobs::open(dir.path().join("transcripts")).await.unwrap(),
            queue: Queue::new(queue::Limits::default(), clock.clone()),
            clock: clock.clone(),
            entropy: Entropy::system(),
            relay: Relay::new(relay::Limits::default()),
            timers: Timers::default(),
            tail: Tail::default(),
            metrics: Metrics::new(),
            standing: Standing::alone(clock.clone()),
            hints: Default::default(),
        };
        let (ledger, writer) = ledger::new(parts.clone());
        let supervisor = Supervisor::new();
        supervisor.spawn_loop("ledger", writer.run());
        let limits = RunnerLimits {
            heartbeat_interval: Duration::from_millis(100),
            lease_ttl: Duration::from_secs(5),
            session_grace: Duration::from_secs(10),
            ..RunnerLimits::default()
        };
        let registry = Registry::new(
            limits,
            clock,
            Entropy::system(),
            parts.queue.clone(),
            parts.relay.clone(),
            supervisor.clone(),
            ports(&ledger, &parts.db, &parts.metrics),
        );
        supervisor.spawn_loop("sweep", registry.clone().run_sweep());
        supervisor.spawn_loop("revocations", registry.clone().run_revocations());
        let (connections, incoming) = mpsc::channel(16);
        let identify = |mut request: Request<()>| {
            request.extensions_mut().insert(Principal::local());
            Ok::<_, Status>(request)
        };
        let service = RunnerServiceServer::with_interceptor(Service(registry.clone()), identify);
        supervisor.spawn("server", async move {
            let incoming = ReceiverStream::new(incoming).map(Ok::<_, std::io::Error>);
            let server = tonic::transport::Server::builder().add_service(service);
            server.serve_with_incoming(incoming).await.unwrap();
        });
        let (cut, n_recorded) = (watch::Sender::new(0), watch::Sender::new(0));
        let server =
            Self { parts, ledger, registry, supervisor, connections, cut, n_recorded, _dir: dir };
        Arc::new(server)
    }

    /// A connection through a link that is cut whenever `cut` changes.
    async fn connect(self: Arc<Self>) -> anyhow::Result<tonic::transport::Channel> {
        let server = self.clone();
        let dial = tower::service_fn(move |_: http::Uri| {
            let server = server.clone();
            async move {
                let (client, mut near) = duplex(16 << 10);
                let (mut far, inner) = duplex(16 << 10);
                server.connections.send(inner).await.map_err(std::io::Error::other)?;
                let mut cut = server.cut.subscribe();
                server.supervisor.spawn("link", async move {
                    tokio::select! {
                        _ = copy_bidirectional(&mut near, &mut far) => {}
                        _ = cut.changed() => {}
                    }
                });
                Ok::<_, std::io::Error>(TokioIo::new(client))
            }
        });
        let endpoint = agent::connection::endpoint("http://server:1")?;
        Ok(endpoint.connect_with_connector(dial).await?)
    }

    async fn submit(&self, text: String) -> TaskId {
        let new = NewTask {
            id: None,
            namespace: Namespace::from("default"),
            spec: Spec {
                model: "baton/echo".into(),
                version: None,
                input: serde_json::json!({ "text": text }).to_string(),
                params: "{\"delay_ms\":2}".into(),
                priority: 0,
                labels: Default::default(),
                required_labels: Default::default(),
                deadline: None,
                start_timeout: None,
                execution_timeout: Duration::from_mins(1),
                retry: RetryPolicy::default(),
                seed: 1,
                session: None,
            },
            not_before: None,
            request_id: None,
            digest: [0; 32],
            retry_of: None,
            traceparent: None,
        };
        self.ledger.submit(vec![new]).await.pop().unwrap().unwrap().task.id
    }

    async fn get(&self, id: TaskId) -> Task {
        get(&self.parts.db, id).await.unwrap()
    }

    /// Hands tasks out as credits allow, until all have ended. A task whose runner was cut off
    /// before the assignment is handed back and goes out again.
    async fn dispatch(&self, tasks: &[TaskId]) {
        let namespace = Namespace::from("default");
        let mut open: VecDeque<TaskId> = tasks.iter().copied().collect();
        while let Some(task) = open.pop_front() {
            let row = self.get(task).await;
            if row.state.is_terminal() {
                continue;
            }
            open.push_back(task);
            let seen = self.registry.get(&namespace, &"r".into());
            if row.state != State::Queued || !seen.is_ok_and(|seen| seen.free_slots > 0) {
                tokio::task::yield_now().await;
                continue;
            }
            let start = Start {
                task,
                runner: "r".into(),
                node: String::new(),
                engine: String::new(),
                engine_version: String::new(),
                waited: None,
            };
            let task = self.ledger.start(vec![start]).await.pop().unwrap().unwrap();
            self.registry.assign(SupplyKey(1), task);
        }
    }

    async fn record(self: Arc<Self>) {
        let token = self.supervisor.token();
        loop {
            tokio::select! {
                () = self.parts.relay.dirty_notified() => {}
                () = token.cancelled() => return,
            }
            let logs = self.parts.relay.dirty();
            for log in logs {
                let Some(segment) = log.take_unrecorded() else { continue };
                let (last, reserved) = (segment.last, segment.reserve_to.unwrap_or(0));
                let n_entries = last + 1 - segment.first;
                self.ledger.record(vec![segment]).await.unwrap();
                log.recorded(last, reserved);
                self.n_recorded.send_modify(|n| *n += n_entries);
            }
        }
    }

    /// The text that the tokens of a task make, in order.
    async fn text(&self, id: TaskId, attempt: u32) -> String {
        let segments = self
            .parts
            .db
            .read(move |tx| Box::pin(async move { reads::segments(tx, id, attempt).await }));
        let mut text = String::new();
        let mut index = 0;
        for (_, frames) in segments.await.unwrap() {
            for frame in relay::frames(frames) {
                let event = Frame::new(frame.unwrap()).event().unwrap();
                if let Some(Body::Token(token)) = event.body {
                    assert_eq!(token.index, index);
                    index += 1;
                    text.push_str(&token.text);
                }
            }
        }
        text
    }
}

fn ports(ledger: &Ledger, db: &Db, metrics: &Metrics) -> Ports {
    let (ledger, db) = (ledger.clone(), db.clone());
    Ports {
        apply: Arc::new(move |id, event| {
            let ledger = ledger.clone();
            Box::pin(async move { ledger.apply(id, event).await })
        }),
        get: Arc::new(move |id| {
            let db = db.clone();
            Box::pin(async move { get(&db, id).await })
        }),
        token: Arc::new(|task| format!("token-{}", task.id)),
        receipts: Signer::new(&[7; 32], Clock::manual()).receipts(),
        resume: None,
        roster: None,
        standing: Standing::alone(Clock::manual()),
        metrics: metrics.clone(),
    }
}

async fn get(db: &Db, id: TaskId) -> baton::error::Result<Task> {
    let rows = db.read(move |tx| Box::pin(async move { store::load(tx, &[id]).await })).await?;
    rows.into_iter().next().ok_or_else(|| baton::error::Error::not_found("task", id))
}

#[tokio::test]
async fn cut_streams_lose_nothing_and_run_nothing_twice() {
    cut_links(agent::Mode::Stream).await;
}

#[tokio::test]
async fn cut_calls_lose_nothing_and_run_nothing_twice() {
    cut_links(agent::Mode::Poll).await;
}

async fn cut_links(mode: agent::Mode) {
    let server = Server::start().await;
    let stop = CancellationToken::new();
    let shutdown = agent::Shutdown { drain: CancellationToken::new(), stop: stop.clone() };
    let entropy = Entropy::system();
    let mut config = agent::Config::new("http://server:1", agent::engine::Settings::Echo, &entropy);
    config.runner_id = "r".into();
    config.slots = 8;
    config.engine_threads = 0;
    config.mode = mode;
    let connector: agent::Connector = {
        let server = server.clone();
        Arc::new(move || Box::pin(server.clone().connect()))
    };
    let running = agent::run_with(
        config,
        Arc::new(agent::engine::echo::Echo::default()),
        connector,
        Clock::system(),
        entropy,
        shutdown,
    );
    server.supervisor.spawn("agent", async move { running.await.unwrap() });
    server.supervisor.spawn("recorder", server.clone().record());

    let mut tasks = Vec::new();
    let mut texts = Vec::new();
    for n in 0..N_TASKS {
        let text: Vec<_> = (0..N_WORDS).map(|word| format!("w{n}.{word}")).collect();
        texts.push(text.join(" "));
        tasks.push(server.submit(text.join(" ")).await);
    }
    let mut n_cuts = 0;
    let cutter = async {
        let mut recorded = server.n_recorded.subscribe();
        loop {
            let some = *recorded.borrow() + Entropy::system().u64() % 100;
            recorded.wait_for(|n| *n > some).await.unwrap();
            // Sometimes again, while the runner is coming back.
            for _ in 0..=Entropy::system().u64() % 3 {
                server.cut.send_modify(|n| *n += 1);
                n_cuts += 1;
                for _ in 0..Entropy::system().u64() % 200 {
                    tokio::task::yield_now().await;
                }
            }
        }
    };
    tokio::select! {
        () = server.dispatch(&tasks) => {}
        () = cutter => {}
    }
    for (id, text) in tasks.iter().zip(&texts) {
        let task = server.get(*id).await;
        assert_eq!((task.state, task.lost, task.failed), (State::Succeeded, 0, 0), "{task:?}");
        assert_eq!(task.attempt, 1 + task.handed_back);
        assert_eq!(server.text(*id, task.attempt).await.trim(), text.trim());
    }
    assert!(n_cuts > 3, "{n_cuts}");
    // The last answers may be on their way back from the store.
    let deadline = Clock::system().mono() + Duration::from_secs(5);
    while server.registry.counts().1 > 0 && Clock::system().mono() < deadline {
        tokio::task::yield_now().await;
    }
    assert_eq!(server.registry.counts().1, 0);
    stop.cancel();
    assert_eq!(server.supervisor.failures(), Vec::<String>::new());
}
