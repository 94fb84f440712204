//! The real agent against the real server, on an engine whose every word the test says: by
//! streams and by calls, over restarts, renewals and takeovers, and on its way out.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use baton::{
    agent::{
        self, Mode, Shutdown, connection,
        emitter::Emitter,
        engine::{Completion, Engine, Failure, Settings, Work},
    },
    clock::Clock,
    id::Entropy,
    pb::{self, TaskState},
};
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use tokio::{sync::mpsc, task::JoinHandle};
use tonic::Code;

use crate::harness::{
    SOON,
    api::{self, Api},
    checks, default, eventually,
    local::Local,
    runner,
    server::Server,
    within,
};

const MODEL: &str = "test/scripted";

/// Executes what the test says, word by word.
struct Scripted(mpsc::Sender<Attempt>);

/// An attempt that is executing.
struct Attempt {
    number: u32,
    words: mpsc::Sender<Option<String>>,
    n_said: u64,
}

impl Attempt {
    /// Says `count` words, numbered on over the whole attempt.
    async fn say(&mut self, count: u64) {
        for _ in 0..count {
            let word = format!("t{} ", self.n_said);
            self.n_said += 1;
            within("a word taken", SOON, self.words.send(Some(word))).await.expect("an execution");
        }
    }

    /// Completes.
    async fn complete(self) {
        within("the end taken", SOON, self.words.send(None)).await.expect("an execution");
    }

    /// Waits until the engine was stopped.
    async fn stopped(&self) {
        within("the engine stopped", SOON, self.words.closed()).await;
    }
}

impl Engine for Scripted {
    fn name(&self) -> &'static str {
        "scripted"
    }

    fn version(&self) -> String {
        "1".into()
    }

    fn run(&self, work: Work, emitter: Emitter) -> BoxFuture<'static, Result<Completion, Failure>> {
        let attempts = self.0.clone();
        Box::pin(async move {
            let (words, mut said) = mpsc::channel(64);
            let attempt = Attempt { number: work.attempt, words, n_said: 0 };
            attempts.send(attempt).await.expect("a test that listens");
            let mut tokens_out = 0;
            while let Some(Some(word)) = said.recv().await {
                emitter.token(word).await?;
                tokens_out += 1;
            }
            Ok(Completion { tokens_in: 3, tokens_out, ..Completion::default() })
        })
    }
}

/// A runner in this process.
struct Agent {
    running: JoinHandle<anyhow::Result<()>>,
    shutdown: Shutdown,
    attempts: mpsc::Receiver<Attempt>,
    /// Where its next connection goes.
    server: Arc<Mutex<SocketAddr>>,
}

impl Agent {
    fn start(addr: SocketAddr, name: &str, change: impl FnOnce(&mut agent::Config)) -> Self {
        let entropy = Entropy::system();
        let mut config = agent::Config::new(addr.to_string(), Settings::Echo, &entropy);
        config.runner_id = name.into();
        config.models = vec![MODEL.into()];
        config.mode = Mode::Stream;
        change(&mut config);
        let (told, attempts) = mpsc::channel(16);
        let server = Arc::new(Mutex::new(addr));
        let target = server.clone();
        let connector: agent::Connector = Arc::new(move || {
            let addr = target.lock().to_string();
            Box::pin(async move { Ok(connection::endpoint(&addr)?.connect().await?) })
        });
        let shutdown = Shutdown::default();
        let running = agent::run_with(
            config,
            Arc::new(Scripted(told)),
            connector,
            Clock::system(),
            entropy,
            shutdown.clone(),
        );
        Self { running: tokio::spawn(running), shutdown, attempts, server }
    }

    async fn attempt(&mut self) -> Attempt {
        within("an attempt", SOON, self.attempts.recv()).await.expect("a running agent")
    }

    async fn ended(self) -> anyhow::Result<()> {
        within("the agent's end", SOON, self.running).await.expect("no panic")
    }

    /// Stops it and waits until it is gone.
    async fn stop(self) {
        self.shutdown.stop.cancel();
        self.ended().await.expect("a clean end");
    }
}

async fn runner(api: &Api, name: &str) -> Option<pb::Runner> {
    let request = pb::GetRunnerRequest { runner_id: name.into() };
    Some(api.runners().get_runner(request).await.ok()?.into_inner())
}

/// Waits until the runner is gone from the server.
async fn gone(api: &Api, name: &str) {
    eventually("the runner is gone", SOON, || async {
        runner(api, name).await.is_none().then_some(())
    })
    .await;
}

/// Waits until `count` tokens of the task can be read.
async fn readable(api: &Api, task: &str, count: usize) {
    within("the tokens", SOON, async {
        let mut stream = api.stream(task, 1).await.expect("a stream");
        let mut seen = 0;
        while seen < count {
            let event = stream.message().await.expect("an event").expect("a token");
            seen += usize::from(matches!(event.body, Some(pb::task_event::Body::Token(_))));
        }
    })
    .await;
}

/// The words `t0` to `t{count - 1}`.
fn words(count: u64) -> String {
    (0..count).map(|i| format!("t{i} ")).collect::<Vec<_>>().concat()
}

/// Checks that a task succeeded with these tokens in its last attempt, each once.
async fn succeeded(api: &Api, task: &str, n_words: u64) -> pb::Task {
    let events = api.read_all(task).await;
    checks::check_stream(task, 0, &events);
    assert_eq!(checks::text(&events), words(n_words));
    let task = api.get(task).await;
    checks::check_end(&task, &events);
    assert_eq!(task.state(), TaskState::Succeeded);
    task
}

#[tokio::test]
async fn an_attempt_by_streams_delivers_its_tokens_and_its_end() {
    let server = Local::start(&[]).await;
    let api = server.api();
    let mut agent = Agent::start(server.addr, "r1", |_| {});
    let task = api.submit_to(MODEL).await;
    let mut attempt = agent.attempt().await;
    attempt.say(3).await;
    readable(&api, &task, 3).await;
    attempt.say(200).await;
    attempt.complete().await;
    let task = succeeded(&api, &task, 203).await;
    let usage = task.usage.expect("usage");
    assert_eq!((usage.tokens_in, usage.tokens_out), (3, 203));
    agent.stop().await;
    server.stop().await;
}

#[tokio::test]
async fn polling_delivers_tokens_ends_and_cancels() {
    let server = Local::start(&[]).await;
    let api = server.api();
    let mut agent = Agent::start(server.addr, "r1", |config| config.mode = Mode::Poll);
    for n_words in [0, 1, 500] {
        let task = api.submit_to(MODEL).await;
        let mut attempt = agent.attempt().await;
        attempt.say(n_words).await;
        readable(&api, &task, n_words as usize).await;
        attempt.complete().await;
        assert_eq!(succeeded(&api, &task, n_words).await.attempt, 1);
    }

    let task = api.submit_to(MODEL).await;
    let mut attempt = agent.attempt().await;
    attempt.say(2).await;
    readable(&api, &task, 2).await;
    let cancelled = api.cancel(&task).await.expect("cancelled");
    assert_eq!(cancelled.state(), TaskState::Cancelled);
    attempt.stopped().await;

    let seen = runner(&api, "r1").await.expect("the runner");
    assert_eq!(seen.reconnects, 0, "its calls got in each other's way");
    agent.shutdown.drain.cancel();
    agent.ended().await.expect("a clean end");
    gone(&api, "r1").await;
    server.stop().await;
}

#[tokio::test]
async fn a_cancel_stops_the_engine_and_frees_its_slot() {
    let server = Local::start(&[]).await;
    let api = server.api();
    let mut agent = Agent::start(server.addr, "r1", |_| {});
    for _ in 0..20 {
        let task = api.submit_to(MODEL).await;
        let mut attempt = agent.attempt().await;
        attempt.say(1).await;
        api.cancel(&task).await.expect("cancelled");
        attempt.stopped().await;
    }
    let task = api.submit_to(MODEL).await;
    agent.attempt().await.complete().await;
    succeeded(&api, &task, 0).await;
    agent.stop().await;
    server.stop().await;
}

/// P11: what a leaving runner hands back is counted apart from failures and losses.
async fn drained_in_the_middle(mode: Mode) {
    let server = Local::start(&[]).await;
    let api = server.api();
    let change = |config: &mut agent::Config| {
        config.mode = mode;
        config.drain_time = Duration::ZERO;
    };
    let mut first = Agent::start(server.addr, "first", change);
    let task = api.submit_to(MODEL).await;
    let mut attempt = first.attempt().await;
    attempt.say(4).await;
    readable(&api, &task, 4).await;
    let mut second = Agent::start(server.addr, "second", change);
    first.shutdown.drain.cancel();
    attempt.stopped().await;
    first.ended().await.expect("a clean end");
    gone(&api, "first").await;

    let mut again = second.attempt().await;
    assert_eq!(again.number, 2);
    again.say(2).await;
    again.complete().await;
    let end = succeeded(&api, &task, 2).await;
    let counted = (end.handed_back_attempts, end.lost_attempts, end.failed_attempts);
    assert_eq!(counted, (1, 0, 0));
    second.stop().await;
    server.stop().await;
}

#[tokio::test]
async fn a_drained_runner_hands_its_work_back_and_says_bye() {
    drained_in_the_middle(Mode::Stream).await;
}

#[tokio::test]
async fn a_drained_runner_hands_its_work_back_by_calls_too() {
    drained_in_the_middle(Mode::Poll).await;
}

#[tokio::test]
async fn a_runner_drained_by_the_server_finishes_first_and_then_leaves() {
    let server = Local::start(&[]).await;
    let api = server.api();
    let mut agent = Agent::start(server.addr, "r1", |config| config.slots = 2);
    let task = api.submit_to(MODEL).await;
    let mut attempt = agent.attempt().await;
    attempt.say(1).await;
    let drain = pb::DrainRunnerRequest { runner_id: "r1".into(), exit: true, ..default() };
    api.runners().drain_runner(drain).await.expect("a drain");
    let waiting = api.submit_to(MODEL).await;
    attempt.say(5).await;
    attempt.complete().await;
    assert_eq!(succeeded(&api, &task, 6).await.attempt, 1);
    agent.ended().await.expect("a clean end");
    assert_eq!(api.get(&waiting).await.state(), TaskState::Queued, "work after the drain began");
    server.stop().await;
}

/// P1, P9: a planned restart of the server costs neither the attempt nor a token.
#[tokio::test]
async fn an_attempt_outlives_a_restart_of_the_server_with_each_token_once() {
    let mut server = Local::start(&[]).await;
    let mut agent = Agent::start(server.addr, "r1", |_| {});
    let task = server.api().submit_to(MODEL).await;
    let mut attempt = agent.attempt().await;
    attempt.say(10).await;
    readable(&server.api(), &task, 10).await;
    attempt.say(10).await;
    let dir = server.stop().await;
    attempt.say(10).await;
    server = Local::start_in(dir, Clock::system(), &[]).await;
    *agent.server.lock() = server.addr;
    attempt.say(10).await;
    attempt.complete().await;
    let end = succeeded(&server.api(), &task, 40).await;
    assert_eq!((end.attempt, end.lost_attempts), (1, 0));
    agent.stop().await;
    server.stop().await;
}

/// P1, P7, P9: nor does a server that dies, again and again, in the middle of the tokens.
#[tokio::test]
async fn an_attempt_outlives_the_deaths_of_the_server_with_each_token_once() {
    let mut server = Server::start(&[]).await;
    let mut agent = Agent::start(server.addr, "r1", |_| {});
    let task = server.api().submit_to(MODEL).await;
    let mut attempt = agent.attempt().await;
    let mut history = checks::History::default();
    for round in 1..=3 {
        attempt.say(20).await;
        readable(&server.api(), &task, 30 * (round - 1) + 20).await;
        let mut stream = server.api().stream(&task, 1).await.expect("a stream");
        attempt.say(5).await;
        server.kill();
        let mut seen = Vec::new();
        while let Ok(Some(event)) = stream.message().await {
            seen.push(event);
        }
        checks::check_stream(&task, 0, &seen);
        history.add(&task, &seen);
        attempt.say(5).await;
        server.restart().await;
    }
    attempt.complete().await;
    let api = server.api();
    let end = succeeded(&api, &task, 90).await;
    assert_eq!((end.attempt, end.lost_attempts), (1, 0));
    history.add(&task, &api.read_all(&task).await);
    agent.stop().await;
}

/// P9: connections that are renewed all the time lose and double no token.
#[tokio::test]
async fn planned_renewals_lose_and_double_no_token() {
    let server = Local::start(&[("BATON_RUNNERS_MAX_STREAM_AGE", "100ms")]).await;
    let api = server.api();
    let mut agent = Agent::start(server.addr, "r1", |_| {});
    let task = api.submit_to(MODEL).await;
    let mut attempt = agent.attempt().await;
    within("ten renewals", 3 * SOON, async {
        while runner(&api, "r1").await.is_none_or(|runner| runner.reconnects < 10) {
            attempt.say(7).await;
        }
    })
    .await;
    let n_words = attempt.n_said;
    attempt.complete().await;
    assert_eq!(succeeded(&api, &task, n_words).await.attempt, 1);
    agent.stop().await;
    server.stop().await;
}

#[tokio::test]
async fn of_two_agents_with_one_name_the_newer_serves_and_the_older_ends() {
    let server = Local::start(&[]).await;
    let api = server.api();
    let mut older = Agent::start(server.addr, "twin", |_| {});
    let task = api.submit_to(MODEL).await;
    let mut attempt = older.attempt().await;
    attempt.say(3).await;
    readable(&api, &task, 3).await;

    let mut newer = Agent::start(server.addr, "twin", |_| {});
    let refused = older.ended().await.expect_err("two runners with one name");
    let status = refused.downcast_ref::<tonic::Status>().expect("the server's word");
    assert_eq!(status.code(), Code::AlreadyExists, "{refused:#}");
    attempt.stopped().await;

    let mut again = newer.attempt().await;
    assert_eq!(again.number, 2);
    again.say(2).await;
    again.complete().await;
    let end = succeeded(&api, &task, 2).await;
    assert_eq!((end.lost_attempts, end.failed_attempts), (1, 0));
    newer.stop().await;
    server.stop().await;
}

#[tokio::test]
async fn a_protocol_version_that_the_server_does_not_speak_is_refused_for_good() {
    let server = Local::start(&[]).await;
    let api = server.api();
    let hello = pb::Hello { min_version: 90, max_version: 99, ..runner::hello("r1", &[MODEL], 1) };
    let Err(by_stream) = runner::Runner::hello(&api, hello.clone()).await else {
        panic!("version 90 was welcomed");
    };
    let body = Some(pb::connect_request::Body::Hello(hello));
    let messages = vec![pb::ConnectRequest { body, ..default() }];
    let poll = pb::PollRequest { messages, ..default() };
    let by_call = api.runners().poll(poll).await.expect_err("version 90 by a call");
    for refusal in [by_stream, by_call] {
        assert_eq!(api::reason(&refusal), "PROTOCOL_VERSION", "{refusal:?}");
        assert!(connection::is_final(&refusal), "agents would try again: {refusal:?}");
    }
    assert!(runner(&api, "r1").await.is_none());
    server.stop().await;
}
