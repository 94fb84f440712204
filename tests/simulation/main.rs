//! Server, runners, an operator and watchers over a simulated network, with crashes and partitions.
//!
//! Real tonic, the real server, the real agent, a real database file; time and network are
//! simulated. A seed decides everything: what is asked for, and what breaks when. For half a
//! minute (safety) parts crash and links break, while every answer and every event is checked;
//! then everything is mended (liveness), and all tasks must end.
//!
//! `BATON_SEED=17 cargo test --test simulation one_seed -- --ignored --nocapture` repeats a seed.

#![expect(clippy::disallowed_methods, reason = "the simulation's own runtime ends what it spawns")]

mod operator;

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    path::PathBuf,
    process::{Command, Output},
    sync::{Arc, Mutex},
    time::Duration,
};

use baton::{
    agent::{self, Shutdown, connection, engine},
    app::App,
    clock::Clock,
    config::Config,
    grpc::serve::Listener,
    id::Entropy,
    json,
    pb::{self, TaskState, task_event::Body, task_service_client::TaskServiceClient},
};
use hyper_util::rt::TokioIo;
use prost::Message;
use rand::{SeedableRng, rngs::StdRng};
use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;
use tonic::{Code, transport::Channel};

/// Seeds that a test run tries.
const SEEDS: u64 = 200;
/// While parts break.
const CHAOS: Duration = Duration::from_secs(30);
/// Everything must have ended by then: the longest backoff, lease and session added up.
const END: Duration = Duration::from_mins(4);
const N_RUNNERS: u64 = 3;
const N_TASKS: u64 = 24;
const PORT: u16 = 7070;

/// A simulated network's listener.
struct SimListener(turmoil::net::TcpListener);

impl Listener for SimListener {
    type Conn = turmoil::net::TcpStream;
    type Io = turmoil::net::TcpStream;

    async fn accept(&mut self) -> io::Result<(Self::Conn, SocketAddr)> {
        self.0.accept().await
    }

    fn attach(conn: Self::Conn) -> io::Result<Self::Io> {
        Ok(conn)
    }
}

fn endpoint() -> tonic::transport::Endpoint {
    connection::endpoint("http://server:7070").expect("a valid address")
}

async fn connect() -> io::Result<TokioIo<turmoil::net::TcpStream>> {
    turmoil::net::TcpStream::connect(("server", PORT)).await.map(TokioIo::new)
}

fn channel() -> Channel {
    endpoint().connect_with_connector_lazy(tower::service_fn(|_| connect()))
}

async fn server(dir: PathBuf, seed: u64) -> turmoil::Result {
    let mut config = Config::default();
    config.storage.data_dir = dir;
    config.auth.required = false;
    let clock = Clock::simulated(turmoil::sim_elapsed().unwrap_or_default());
    // Ids must differ between starts.
    let boot = turmoil::sim_elapsed().unwrap_or_default().as_millis() as u64;
    let addr = SocketAddr::from(([0, 0, 0, 0], PORT));
    let listener = SimListener(turmoil::net::TcpListener::bind(addr).await?);
    let entropy = Entropy::seeded(seed ^ boot << 20);
    let app = App::start_on(listener, addr, config, clock, entropy).await?;
    app.stopped().await;
    Err(format!("the server stopped by itself: {:?}", app.supervisor.failures()).into())
}

async fn runner(i: u64, seed: u64) -> turmoil::Result {
    let boot = turmoil::sim_elapsed().unwrap_or_default();
    let entropy = Entropy::seeded(seed ^ (i + 1) << 40 ^ boot.as_millis() as u64);
    let mut config = agent::Config::new("http://server:7070", engine::Settings::Echo, &entropy);
    config.runner_id = format!("runner-{i}");
    config.slots = 2;
    config.engine_threads = 0;
    let connector: connection::Connector = Arc::new(|| {
        Box::pin(async {
            let connector = tower::service_fn(|_| connect());
            Ok(endpoint().connect_with_connector(connector).await?)
        })
    });
    let token = CancellationToken::new;
    let shutdown = Shutdown { drain: token(), stop: token() };
    let engine = Arc::new(engine::echo::Echo::default());
    agent::run_with(config, engine, connector, Clock::simulated(boot), entropy, shutdown).await?;
    Err("the runner left by itself".into())
}

/// What is known of a task from the outside.
#[derive(Default)]
struct Seen {
    /// Bytes of every event that any watcher saw.
    events: BTreeMap<u64, Vec<u8>>,
    /// Sequence and state of the terminal event.
    ended: Option<(u64, i32)>,
    /// Sequences up to here were seen when a cancel was acknowledged that ended the task.
    cancelled_after: Option<u64>,
}

#[derive(Default)]
struct Notes {
    tasks: BTreeMap<String, Seen>,
    /// Orders to runners that were obeyed while parts broke.
    n_obeyed: u64,
    /// Digest of everything that was seen, and when.
    trace: Sha256,
}

type Book = Arc<Mutex<Notes>>;

/// A watcher of one task: resumes until the end, and checks that it misses nothing.
async fn watch(id: String, book: Book, pause: u64) {
    let mut client = TaskServiceClient::new(channel());
    let mut cursor = 0;
    loop {
        let request = pb::StreamTaskRequest {
            task_id: id.clone(),
            from_sequence: cursor + 1,
            ..Default::default()
        };
        if let Ok(stream) = client.stream_task(request).await {
            let mut stream = stream.into_inner();
            while let Ok(Some(event)) = stream.message().await {
                note(&id, &book, &mut cursor, &event);
                if matches!(event.body, Some(Body::Ended(_))) {
                    let rest = stream.message().await;
                    assert!(!matches!(rest, Ok(Some(_))), "{id}: an event after the end");
                    return;
                }
            }
        }
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }
}

fn note(id: &str, book: &Book, cursor: &mut u64, event: &pb::TaskEvent) {
    let first = match &event.body {
        // This reader may have seen some of what was lost.
        Some(Body::Gap(gap)) => gap.first_sequence.max((*cursor + 1).min(event.sequence)),
        _ => event.sequence,
    };
    assert_eq!(first, *cursor + 1, "{id}: P8, each event follows the last: {event:?}");
    *cursor = event.sequence;
    let bytes = event.encode_to_vec();
    let mut book = book.lock().expect("no user failed");
    let when = turmoil::sim_elapsed().unwrap_or_default().as_nanos();
    book.trace.update(when.to_le_bytes());
    book.trace.update(&bytes);
    let seen = book.tasks.entry(id.to_owned()).or_default();
    let known = seen.events.entry(event.sequence).or_insert_with(|| bytes.clone());
    if *known != bytes {
        let known = pb::TaskEvent::decode(known.as_slice());
        panic!("{id}: P7, one sequence with two contents: {known:?} and {event:?}");
    }
    if let Some(Body::Ended(ended)) = &event.body {
        let end = (event.sequence, ended.state);
        assert!(seen.ended.is_none_or(|known| known == end), "{id}: P6, two ends");
        seen.ended = Some(end);
    }
    if let Some((end, _)) = seen.ended {
        assert!(event.sequence <= end, "{id}: P6, {} after the end at {end}", event.sequence);
    }
}

fn spec(dice: &Entropy) -> pb::TaskSpec {
    let repeat = 1 + dice.u64() % 20;
    let delay = dice.u64() % 400;
    let fail = match dice.u64() % 6 {
        0 => r#", "fail": {"times": 1}"#,
        1 => r#", "fail": {"retryable": false, "after": 2}"#,
        _ => "",
    };
    let params = format!(r#"{{"repeat": {repeat}, "delay_ms": {delay}{fail}}}"#);
    pb::TaskSpec {
        model: "test/echo".into(),
        input: json::struct_from_text(r#"{"text": "one two three four "}"#),
        params: json::struct_from_text(&params),
        seed: Some(dice.u64() >> 1),
        ..Default::default()
    }
}

/// Submits until it is acknowledged; the answer must be the same every time.
async fn submit(request: pb::SubmitTaskRequest, dice: &Entropy) -> String {
    let mut client = TaskServiceClient::new(channel());
    let mut first: Option<String> = None;
    loop {
        match client.submit_task(request.clone()).await {
            Ok(answer) => {
                let id = answer.into_inner().task.expect("a task").task_id;
                assert!(first.as_ref().is_none_or(|first| *first == id), "P2, two tasks");
                // Sometimes the answer counts as lost, and the call is repeated.
                if first.is_some() || !dice.u64().is_multiple_of(4) {
                    return id;
                }
                first = Some(id);
            }
            Err(status) => {
                let fine = matches!(
                    status.code(),
                    Code::Unavailable | Code::Unknown | Code::Cancelled | Code::DeadlineExceeded
                );
                assert!(fine || is_transport(&status), "a submit was refused: {status:?}");
            }
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Whether tonic made the status of a broken connection.
fn is_transport(status: &tonic::Status) -> bool {
    std::error::Error::source(status).is_some()
}

async fn cancel(id: &str, book: &Book) {
    let mut client = TaskServiceClient::new(channel());
    loop {
        let request = pb::CancelTaskRequest { task_id: id.into(), reason: "chaos".into() };
        if let Ok(answer) = client.cancel_task(request).await {
            if answer.into_inner().state() == TaskState::Cancelled {
                let mut book = book.lock().expect("no user failed");
                let seen = book.tasks.entry(id.to_owned()).or_default();
                let last = seen.events.last_key_value().map_or(0, |(last, _)| *last);
                seen.cancelled_after.get_or_insert(last);
            }
            return;
        }
        tokio::time::sleep(Duration::from_millis(150)).await;
    }
}

/// One task's life as its user sees it.
async fn user(i: u64, dice: Entropy, book: Book) {
    tokio::time::sleep(Duration::from_millis(dice.u64() % CHAOS.as_millis() as u64)).await;
    let request = pb::SubmitTaskRequest { spec: Some(spec(&dice)), request_id: format!("r{i}") };
    let id = submit(request, &dice).await;
    let watchers = [120, 170].map(|pause| tokio::spawn(watch(id.clone(), book.clone(), pause)));
    if dice.u64().is_multiple_of(5) {
        tokio::time::sleep(Duration::from_millis(dice.u64() % 5000)).await;
        cancel(&id, &book).await;
    }
    for watcher in watchers {
        watcher.await.expect("a watcher's checks hold");
    }
    check_end(&id, &book).await;
}

async fn check_end(id: &str, book: &Book) {
    let mut client = TaskServiceClient::new(channel());
    loop {
        let answer = client.get_task(pb::GetTaskRequest { task_id: id.into() }).await;
        if let Ok(task) = answer {
            let task = task.into_inner();
            let book = book.lock().expect("no user failed");
            let seen = &book.tasks[id];
            let (sequence, state) = seen.ended.expect("an end");
            assert_eq!(task.state, state, "{id}: P6, the end is what GetTask says");
            assert_eq!(task.last_sequence, sequence, "{id}: P6");
            assert!(task.failed_attempts <= 3, "{id}: P11");
            if seen.cancelled_after.is_some() {
                assert_eq!(task.state(), TaskState::Cancelled, "{id}: P10");
            }
            check_tokens(id, seen);
            return;
        }
        tokio::time::sleep(Duration::from_millis(150)).await;
    }
}

/// P9: within an attempt tokens are contiguous from 0, but for told gaps; attempts announce
/// themselves and grow.
fn check_tokens(id: &str, seen: &Seen) {
    let (mut attempt, mut next) = (0, Some(0));
    for bytes in seen.events.values() {
        let event = pb::TaskEvent::decode(bytes.as_slice()).expect("an event");
        match event.body {
            Some(Body::AttemptStarted(_)) => {
                assert!(event.attempt > attempt, "{id}: P4, attempts grow");
                (attempt, next) = (event.attempt, Some(0));
            }
            Some(Body::Gap(_)) => next = None,
            Some(Body::Token(token)) => {
                assert_eq!(event.attempt, attempt, "{id}: P5, a token of another attempt");
                assert!(next.is_none_or(|next| next == token.index), "{id}: P9, {token:?}");
                next = next.map(|next| next + 1);
            }
            _ => {}
        }
    }
}

/// What is broken, and until when.
enum Fault {
    Crashed(String),
    Cut(String),
    Held(String),
}

fn mend(sim: &mut turmoil::Sim<'_>, fault: Fault) {
    match fault {
        Fault::Crashed(host) => sim.bounce(host),
        Fault::Cut(host) => sim.repair(host, "server"),
        Fault::Held(host) => sim.release(host, "server"),
    }
}

/// Runs a seed; the digest of what was seen, and when, and how many orders were obeyed.
fn simulate(seed: u64) -> (String, u64) {
    mad_turmoil::rand::set_rng(StdRng::seed_from_u64(seed));
    let _clocks = mad_turmoil::time::SimClocksGuard::init();
    let dir = tempfile::tempdir().expect("a directory");
    let dice = Entropy::seeded(seed);
    let mut sim = turmoil::Builder::new()
        .rng_seed(seed)
        .simulation_duration(END)
        .tick_duration(Duration::from_millis(2))
        .min_message_latency(Duration::from_millis(1))
        .max_message_latency(Duration::from_millis(20))
        .tcp_capacity(4096)
        .build();
    let data = dir.path().to_owned();
    sim.host("server", move || server(data.clone(), seed));
    for i in 0..N_RUNNERS {
        sim.host(format!("runner-{i}"), move || runner(i, seed));
    }
    let book = Book::default();
    let users = book.clone();
    sim.client("client", async move {
        let lives = (0..N_TASKS).map(|i| {
            let dice = Entropy::seeded(seed << 8 ^ i);
            tokio::spawn(user(i, dice, users.clone()))
        });
        let orders = tokio::spawn(operator::operate(Entropy::seeded(!seed)));
        for life in lives.collect::<Vec<_>>() {
            life.await.expect("a user's checks hold");
        }
        let n_obeyed = orders.await.expect("the operator's checks hold");
        users.lock().expect("no user failed").n_obeyed = n_obeyed;
        Ok(())
    });
    let mut faults: Vec<(Duration, String, Fault)> = Vec::new();
    let mut next = Duration::from_millis(500);
    loop {
        let now = sim.elapsed();
        let over = now >= CHAOS;
        while let Some(i) = faults.iter().position(|(until, ..)| over || *until <= now) {
            let (_, _, fault) = faults.swap_remove(i);
            mend(&mut sim, fault);
        }
        if now >= next && !over {
            next = now + Duration::from_millis(200 + dice.u64() % 3000);
            let hosts = N_RUNNERS + 2;
            let host = match dice.u64() % hosts {
                0 => "server".to_owned(),
                1 => "client".to_owned(),
                n => format!("runner-{}", n - 2),
            };
            let until =
                now + Duration::from_millis(100 + dice.u64() % 20_000 / (1 + dice.u64() % 20));
            if faults.iter().all(|(_, broken, _)| *broken != host) {
                let fault = match (host.as_str(), dice.u64() % 3) {
                    ("client", _) | (_, 1) if host != "server" => {
                        sim.partition(host.as_str(), "server");
                        Fault::Cut(host.clone())
                    }
                    (_, 2) if host != "server" => {
                        sim.hold(host.as_str(), "server");
                        Fault::Held(host.clone())
                    }
                    _ => {
                        sim.crash(host.as_str());
                        Fault::Crashed(host.clone())
                    }
                };
                faults.push((until, host, fault));
            }
        }
        match sim.step() {
            Ok(true) => break,
            Ok(false) => {}
            Err(error) => {
                panic!("seed {seed}: not all tasks ended in time, or a part failed: {error}")
            }
        }
    }
    let book = book.lock().expect("no user failed");
    assert_eq!(book.tasks.len() as u64, N_TASKS, "every acknowledged task is there");
    (hex::encode(book.trace.clone().finalize()), book.n_obeyed)
}

/// One seed, named by the environment, in a process of its own.
#[test]
#[ignore = "run by every_seed_holds_its_promises, or by hand with BATON_SEED"]
fn one_seed() {
    let seed = std::env::var("BATON_SEED").expect("BATON_SEED").parse().expect("a number");
    if std::env::var("BATON_SEED_LOG").is_ok() {
        tracing_subscriber::fmt().with_max_level(tracing::Level::DEBUG).init();
    }
    let (trace, n_obeyed) = simulate(seed);
    println!("seed {seed}: {trace}");
    println!("obeyed {n_obeyed}");
}

/// Runs a seed in a process of its own.
fn run_apart(seed: u64) -> Output {
    Command::new(std::env::current_exe().expect("this binary"))
        .args(["--exact", "one_seed", "--ignored", "--nocapture"])
        .env("BATON_SEED", seed.to_string())
        .output()
        .expect("the seed's process")
}

/// A failure can be repeated: nothing but the seed decides.
#[test]
fn the_same_seed_gives_the_same_run() {
    for seed in [3, 7] {
        let trace = |output: Output| {
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            text.lines().find(|line| line.starts_with("seed ")).map(ToOwned::to_owned)
        };
        let first = trace(run_apart(seed));
        assert!(first.is_some(), "seed {seed} failed");
        assert_eq!(first, trace(run_apart(seed)));
    }
}

/// P1 to P11 from outside, whatever crashes: 200 seeds, a process each.
#[test]
fn every_seed_holds_its_promises() {
    let seeds = std::env::var("BATON_SEEDS").map_or(SEEDS, |n| n.parse().expect("a number"));
    let next = Arc::new(std::sync::atomic::AtomicU64::new(0));
    let failed = Arc::new(Mutex::new(Vec::new()));
    let obeyed = Arc::new(std::sync::atomic::AtomicU64::new(0));
    let threads = (0..2).map(|_| {
        let (next, failed, obeyed) = (next.clone(), failed.clone(), obeyed.clone());
        std::thread::spawn(move || {
            loop {
                let seed = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                if seed >= seeds {
                    return;
                }
                let output = run_apart(seed);
                if !output.status.success() {
                    let text = String::from_utf8_lossy(&output.stderr).into_owned();
                    eprintln!("seed {seed} failed:\n{text}");
                    failed.lock().expect("no user failed").push(seed);
                }
                let text = String::from_utf8_lossy(&output.stdout);
                let orders = text.lines().find_map(|line| line.strip_prefix("obeyed "));
                let orders = orders.map_or(0, |orders| orders.parse().expect("a number"));
                obeyed.fetch_add(orders, std::sync::atomic::Ordering::Relaxed);
            }
        })
    });
    for thread in threads.collect::<Vec<_>>() {
        thread.join().expect("a thread that starts processes");
    }
    let failed = failed.lock().expect("no user failed");
    let n_obeyed = obeyed.load(std::sync::atomic::Ordering::Relaxed);
    assert!(n_obeyed > seeds, "of {seeds} seeds' orders only {n_obeyed} were obeyed");
    assert!(failed.is_empty(), "seeds that failed: {failed:?}; repeat one with BATON_SEED");
}
