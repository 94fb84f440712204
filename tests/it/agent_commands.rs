//! Commands from an operator's call to the engine and back: the real server, the real agent, the
//! engines that come with it; by streams and by calls.

use std::{path::Path, time::Duration};

use baton::{
    agent::{
        self, Mode, Shutdown,
        engine::{Settings, ngram},
    },
    clock::Clock,
    id::Entropy,
    pb::{self, TaskState, runner, when_busy::Policy},
};
use prost_types::{Struct, Value, value::Kind};
use tokio::task::JoinHandle;
use tonic::{Code, Response, Status};

use crate::harness::{
    SOON,
    api::{Api, reason},
    checks, default, eventually,
    local::Local,
    object, seconds, within,
};

const BASE: &str = "test/base";
const POEM: &str = "test/poem";
/// A text that a greedy model says by heart.
const TEXT: &str = "tick tock tick tock tick tock tick tock";

const GREEDY: &[(&str, f64)] = &[("max_tokens", 4.0), ("temperature", 0.0)];

struct Agent {
    running: JoinHandle<anyhow::Result<()>>,
    shutdown: Shutdown,
}

impl Agent {
    fn start(server: &Local, engine: Settings, change: impl FnOnce(&mut agent::Config)) -> Self {
        let entropy = Entropy::system();
        let mut config = agent::Config::new(server.addr.to_string(), engine, &entropy);
        config.runner_id = "r1".into();
        config.models = vec![BASE.into()];
        config.slots = 2;
        change(&mut config);
        let shutdown = Shutdown::default();
        let running = agent::run(config, Clock::system(), entropy, shutdown.clone());
        Self { running: tokio::spawn(running), shutdown }
    }

    async fn ended(self) {
        within("the agent's end", SOON, self.running)
            .await
            .expect("no panic")
            .expect("a clean end");
    }

    async fn stop(self) {
        self.shutdown.stop.cancel();
        self.ended().await;
    }
}

fn ngram(corpora: Option<&Path>) -> Settings {
    Settings::Ngram(ngram::Settings { corpora: corpora.map(Into::into), ..default() })
}

async fn find(api: &Api) -> Option<pb::Runner> {
    let request = pb::GetRunnerRequest { runner_id: "r1".into() };
    Some(api.runners().get_runner(request).await.ok()?.into_inner())
}

/// The runner, once it is there.
async fn connected(api: &Api) -> pb::Runner {
    eventually("the runner", SOON, || find(api)).await
}

async fn apply(
    api: &Api,
    model: &str,
    state: pb::apply::State,
    options: Struct,
) -> Result<pb::Runner, Status> {
    let request = pb::ApplyModelRequest {
        runner_id: "r1".into(),
        model: model.into(),
        state: state.into(),
        options: Some(options),
        ..default()
    };
    let mut runners = api.runners();
    within("the model applied", SOON, runners.apply_model(request)).await.map(Response::into_inner)
}

async fn load(api: &Api, model: &str, options: &[(&str, &str)]) -> Result<pb::Runner, Status> {
    apply(api, model, pb::apply::State::Loaded, object(options)).await
}

async fn unload(api: &Api, model: &str) -> Result<pb::Runner, Status> {
    apply(api, model, pb::apply::State::Unloaded, default()).await
}

async fn tune(api: &Api, params: Struct) -> Result<pb::Runner, Status> {
    let request =
        pb::TuneRunnerRequest { runner_id: "r1".into(), params: Some(params), ..default() };
    within("the engine tuned", SOON, api.runners().tune_runner(request))
        .await
        .map(Response::into_inner)
}

async fn reload(api: &Api, model: &str, policy: Policy) -> Result<pb::Runner, Status> {
    let request = pb::ReloadRunnerRequest {
        runner_id: "r1".into(),
        model: model.into(),
        when_busy: Some(pb::WhenBusy { policy: policy.into(), ..default() }),
        ..default()
    };
    within("the reload", SOON, api.runners().reload_runner(request)).await.map(Response::into_inner)
}

fn number(value: f64) -> Value {
    Value { kind: Some(Kind::NumberValue(value)) }
}

fn numbers(fields: &[(&str, f64)]) -> Struct {
    Struct { fields: fields.iter().map(|(name, n)| ((*name).into(), number(*n))).collect() }
}

fn prompt(model: &str, params: &[(&str, f64)]) -> pb::TaskSpec {
    let input = Some(object(&[("prompt", "tick")]));
    pb::TaskSpec { model: model.into(), input, params: Some(numbers(params)), ..default() }
}

/// What a task for the model says.
async fn said(api: &Api, model: &str) -> String {
    let task = api.submit(prompt(model, GREEDY)).await.task_id;
    let events = api.read_all(&task).await;
    assert_eq!(api.get(&task).await.state(), TaskState::Succeeded, "{model}");
    checks::text(&events)
}

/// Starts a slow task and waits until it speaks.
async fn begun(api: &Api, model: &str) -> String {
    let spec = prompt(model, &[("tokens_per_second", 20.0), ("max_tokens", 20.0)]);
    let task = api.submit(spec).await.task_id;
    within("the first token", SOON, async {
        let mut stream = api.stream(&task, 1).await.expect("a stream");
        while !matches!(
            stream.message().await.expect("an event").expect("a token").body,
            Some(pb::task_event::Body::Token(_))
        ) {}
    })
    .await;
    task
}

async fn models_come_and_go(mode: Mode) {
    let server = Local::start(&[]).await;
    let api = server.api();
    let agent = Agent::start(&server, ngram(None), |config| config.mode = mode);
    connected(&api).await;
    let early = api.submit(prompt(POEM, GREEDY)).await.task_id;
    let applied = load(&api, POEM, &[("text", TEXT)]).await.expect("applied");
    assert_eq!(applied.models, [BASE, POEM]);
    api.wait_for(&early, &[TaskState::Succeeded], SOON).await;
    assert_eq!(checks::text(&api.read_all(&early).await), " tock tick tock tick");
    assert_ne!(said(&api, BASE).await, " tock tick tock tick");

    // Loading again replaces.
    load(&api, POEM, &[("text", "tick off tick off tick off")]).await.expect("replaced");
    assert_eq!(said(&api, POEM).await, " off tick off tick");

    assert_eq!(unload(&api, POEM).await.expect("unloaded").models, [BASE]);
    let late = api.submit(prompt(POEM, &[])).await.task_id;
    said(&api, BASE).await;
    let late = api.get(&late).await;
    assert_eq!((late.state(), late.attempt), (TaskState::Queued, 0));
    agent.stop().await;
    server.stop().await;
}

#[tokio::test]
async fn a_model_is_served_from_its_apply_to_its_unload() {
    models_come_and_go(Mode::Stream).await;
}

#[tokio::test]
async fn a_model_is_served_from_its_apply_to_its_unload_by_calls_too() {
    models_come_and_go(Mode::Poll).await;
}

#[tokio::test]
async fn a_runner_without_models_waits_for_one() {
    let server = Local::start(&[]).await;
    let api = server.api();
    let agent = Agent::start(&server, Settings::Echo, |config| config.models.clear());
    assert!(connected(&api).await.models.is_empty());
    load(&api, POEM, &[]).await.expect("applied");
    let task = api.submit_to(POEM).await;
    api.wait_for(&task, &[TaskState::Succeeded], SOON).await;
    agent.stop().await;
    server.stop().await;
}

#[tokio::test]
async fn files_are_read_only_where_the_operator_of_the_runner_opened_a_directory() {
    let server = Local::start(&[]).await;
    let api = server.api();
    let dir = tempfile::tempdir().expect("a directory");
    std::fs::write(dir.path().join("poem.txt"), TEXT).expect("a file");
    let agent = Agent::start(&server, ngram(Some(dir.path())), |_| {});
    connected(&api).await;
    let refused = load(&api, POEM, &[("path", "/etc/passwd")]).await.unwrap_err();
    assert_eq!(
        (refused.code(), reason(&refused).as_str()),
        (Code::InvalidArgument, "INVALID_PARAMS")
    );
    load(&api, POEM, &[("path", "poem.txt")]).await.expect("applied");
    assert_eq!(said(&api, POEM).await, " tock tick tock tick");
    // A reload reads it anew; one that fails leaves the model as it was.
    std::fs::write(dir.path().join("poem.txt"), "tick off tick off tick off").expect("a file");
    reload(&api, POEM, Policy::Wait).await.expect("reloaded");
    assert_eq!(said(&api, POEM).await, " off tick off tick");
    std::fs::remove_file(dir.path().join("poem.txt")).expect("a file");
    let failed = reload(&api, POEM, Policy::Wait).await.unwrap_err();
    assert_eq!(
        (failed.code(), reason(&failed).as_str()),
        (Code::FailedPrecondition, "ENGINE_ERROR")
    );
    assert_eq!(said(&api, POEM).await, " off tick off tick");
    assert_eq!(connected(&api).await.models, [BASE, POEM]);
    agent.stop().await;
    server.stop().await;
}

#[tokio::test]
async fn a_reload_waits_for_what_runs_or_is_refused() {
    let server = Local::start(&[]).await;
    let api = server.api();
    let agent = Agent::start(&server, ngram(None), |_| {});
    connected(&api).await;
    let task = begun(&api, BASE).await;
    let busy = reload(&api, BASE, Policy::Refuse).await.unwrap_err();
    assert_eq!((busy.code(), reason(&busy).as_str()), (Code::FailedPrecondition, "STATE_CONFLICT"));
    let unknown = reload(&api, POEM, Policy::Refuse).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound, "{unknown:?}");
    assert_eq!(reload(&api, BASE, Policy::Wait).await.expect("reloaded").models, [BASE]);
    // Its end and the answer come by different streams.
    let task = api.wait_for(&task, &[TaskState::Succeeded], SOON).await;
    assert_eq!((task.attempt, task.handed_back_attempts), (1, 0), "it did not wait");

    let task = begun(&api, BASE).await;
    reload(&api, BASE, Policy::HandBack).await.expect("reloaded");
    let ended = api.wait_for(&task, &[TaskState::Succeeded], SOON).await;
    assert_eq!((ended.attempt, ended.handed_back_attempts), (2, 1));
    agent.stop().await;
    server.stop().await;
}

#[tokio::test]
async fn parameters_hold_from_their_tune_on_and_unknown_ones_are_named() {
    let server = Local::start(&[]).await;
    let api = server.api();
    let agent = Agent::start(&server, ngram(None), |_| {});
    connected(&api).await;
    let refused = tune(&api, numbers(&[("max_tokens", 3.0), ("topk", 4.0)])).await.unwrap_err();
    assert_eq!(
        (refused.code(), reason(&refused).as_str()),
        (Code::InvalidArgument, "INVALID_PARAMS")
    );
    assert!(refused.message().starts_with("params.topk: "), "{refused:?}");
    assert_eq!(connected(&api).await.engine_params, Some(default()), "half of it was set");
    let tuned = tune(&api, numbers(&[("max_tokens", 3.0)])).await.expect("tuned");
    assert_eq!(tuned.engine_params, Some(numbers(&[("max_tokens", 3.0)])));
    let task = api.submit(prompt(BASE, &[])).await.task_id;
    let ended = api.wait_for(&task, &[TaskState::Succeeded], SOON).await;
    assert_eq!(ended.usage.expect("usage").tokens_out, 3);
    agent.stop().await;
    server.stop().await;
}

#[tokio::test]
async fn a_drained_runner_takes_work_again_when_it_is_resumed() {
    let server = Local::start(&[]).await;
    let api = server.api();
    let agent = Agent::start(&server, ngram(None), |_| {});
    connected(&api).await;
    let running = begun(&api, BASE).await;
    let drain = pb::DrainRunnerRequest {
        runner_id: "r1".into(),
        deadline: Some(seconds(60.0)),
        wait: true,
        ..default()
    };
    within("the drain", SOON, api.runners().drain_runner(drain)).await.expect("drained");
    let ended = api.wait_for(&running, &[TaskState::Succeeded], SOON).await;
    assert_eq!((ended.attempt, ended.handed_back_attempts), (1, 0), "it was not finished");
    let seen = connected(&api).await;
    assert_eq!(seen.state(), runner::State::Draining);
    let command = &seen.commands[0];
    assert_eq!((command.total, command.state()), (1, pb::runner_command::State::Done));
    let waiting = api.submit(prompt(BASE, &[("max_tokens", 1.0)])).await.task_id;
    let resume = pb::ResumeRunnerRequest { runner_id: "r1".into(), ..default() };
    let resumed = within("an answer", SOON, api.runners().resume_runner(resume)).await;
    assert_eq!(resumed.expect("resumed").into_inner().state(), runner::State::Ready);
    api.wait_for(&waiting, &[TaskState::Succeeded], SOON).await;
    agent.stop().await;
    server.stop().await;
}

/// A server that lost its memory learns from Hello what commands had made of the runner.
#[tokio::test]
async fn what_commands_have_changed_outlives_a_restart_of_the_server() {
    let server = Local::start(&[]).await;
    let addr = server.addr;
    let api = server.api();
    let agent = Agent::start(&server, ngram(None), |_| {});
    connected(&api).await;
    load(&api, POEM, &[("text", TEXT)]).await.expect("applied");
    let pause = pb::PauseRunnerRequest { runner_id: "r1".into(), ..default() };
    api.runners().pause_runner(pause).await.expect("paused");
    let dir = server.stop().await;
    let addr = addr.to_string();
    let server = Local::start_in(dir, Clock::system(), &[("BATON_SERVER_ADDR", &addr)]).await;
    let api = server.api();
    let seen = connected(&api).await;
    assert_eq!(seen.models, [BASE, POEM]);
    assert_eq!((seen.state(), seen.commands.len()), (runner::State::Paused, 0));
    agent.stop().await;
    server.stop().await;
}

#[tokio::test]
async fn a_cancel_is_answered_when_the_engine_has_stopped() {
    let server = Local::start(&[]).await;
    let api = server.api();
    let agent = Agent::start(&server, ngram(None), |_| {});
    connected(&api).await;
    for _ in 0..3 {
        let task = begun(&api, BASE).await;
        api.cancel(&task).await.expect("cancelled");
    }
    let line = "baton_runner_cancels_total{outcome=\"stopped\"} 3";
    eventually("three answers", SOON, || async {
        server.app().metrics.text().contains(line).then_some(())
    })
    .await;
    assert!(connected(&api).await.stopping.is_empty());
    agent.stop().await;
    server.stop().await;
}

/// A runner that drains by its own operator's signal says so.
#[tokio::test]
async fn a_runner_that_drains_by_itself_is_seen_to() {
    let server = Local::start(&[]).await;
    let api = server.api();
    let agent = Agent::start(&server, ngram(None), |config| {
        config.drain_time = Duration::from_mins(1);
    });
    connected(&api).await;
    begun(&api, BASE).await;
    agent.shutdown.drain.cancel();
    eventually("the state", SOON, || async {
        (find(&api).await?.state() == runner::State::Draining).then_some(())
    })
    .await;
    agent.ended().await;
    server.stop().await;
}
