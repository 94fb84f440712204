//! Commands to runners, as operators give them and a scripted runner answers them.

use std::time::Duration;

use baton::{
    error::Error,
    pb::{self, TaskState, command::Action, connect_request, connect_response, runner},
    runners::protocol::feature,
};
use tokio::task::JoinHandle;
use tonic::{Code, Response, Status};

use crate::harness::{
    SOON,
    api::{Api, reason},
    default, eventually,
    local::Local,
    object,
    runner::{self as scripted, Runner},
    seconds, within,
};

const MODEL: &str = "test/echo";
const OTHER: &str = "test/other";
const SHORT: &[(&str, &str)] = &[
    ("BATON_RUNNERS_LEASE_TTL", "2s"),
    ("BATON_RUNNERS_HEARTBEAT_INTERVAL", "500ms"),
    ("BATON_RUNNERS_SESSION_GRACE", "2s"),
];

/// A runner that understands everything.
async fn connect(api: &Api, models: &[&str]) -> Runner {
    let features = feature::ALL.map(Into::into).to_vec();
    let hello = pb::Hello { features, ..scripted::hello("r1", models, 2) };
    Runner::hello(api, hello).await.expect("a welcome")
}

type Answer = JoinHandle<Result<Response<pb::Runner>, Status>>;

fn pause(api: &Api, request_id: &str) -> Answer {
    let (mut runners, request_id) = (api.runners(), request_id.to_owned());
    tokio::spawn(async move {
        let runner_id = "r1".into();
        runners.pause_runner(pb::PauseRunnerRequest { runner_id, request_id }).await
    })
}

fn resume(api: &Api) -> Answer {
    let mut runners = api.runners();
    tokio::spawn(async move {
        let request = pb::ResumeRunnerRequest { runner_id: "r1".into(), ..default() };
        runners.resume_runner(request).await
    })
}

fn apply(api: &Api, model: &str, state: pb::apply::State) -> Answer {
    let (mut runners, model) = (api.runners(), model.to_owned());
    tokio::spawn(async move {
        let request = pb::ApplyModelRequest {
            runner_id: "r1".into(),
            model,
            state: state.into(),
            options: Some(object(&[("weights_uri", "file:x")])),
            ..default()
        };
        runners.apply_model(request).await
    })
}

async fn answered(answer: Answer) -> Result<pb::Runner, Status> {
    within("an answer", SOON, answer).await.expect("no panic").map(Response::into_inner)
}

async fn get(api: &Api) -> pb::Runner {
    let request = pb::GetRunnerRequest { runner_id: "r1".into() };
    api.runners().get_runner(request).await.expect("the runner").into_inner()
}

#[tokio::test]
async fn a_first_release_runner_is_paused_and_resumed_by_command() {
    let server = Local::start(&[]).await;
    let api = server.api();
    let mut runner = Runner::connect(&api, "r1", &[MODEL], 1).await;
    let answer = pause(&api, "");
    let (id, action) = runner.commanded().await;
    assert_eq!(action, Action::Pause(pb::Pause { paused: true }));
    let task = api.submit_to(MODEL).await;
    runner.done(&id).await;
    let paused = answered(answer).await.expect("paused");
    assert_eq!(paused.state(), runner::State::Paused);
    let command = &paused.commands[0];
    assert_eq!((command.action.as_str(), &command.command_id), ("pause", &id));
    assert_eq!(command.state(), pb::runner_command::State::Done);
    assert_eq!(api.get(&task).await.state(), TaskState::Queued, "work for a paused runner");

    let answer = resume(&api);
    let (id, action) = runner.commanded().await;
    assert_eq!(action, Action::Pause(pb::Pause { paused: false }));
    runner.done(&id).await;
    assert_eq!(answered(answer).await.expect("resumed").state(), runner::State::Ready);
    assert_eq!(runner.assigned().await.task_id, task);
    server.stop().await;
}

#[tokio::test]
async fn a_runner_gets_no_command_that_it_did_not_name() {
    let server = Local::start(&[]).await;
    let api = server.api();
    let mut runner = Runner::connect(&api, "r1", &[MODEL], 1).await;
    let refused = answered(apply(&api, OTHER, pb::apply::State::Loaded)).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert_eq!(reason(&refused), "COMMAND_UNSUPPORTED");
    assert!(refused.message().contains("`apply`"), "{refused:?}");
    assert!(runner.welcome.features.is_empty());
    // What it understands is the first that it hears of.
    let answer = pause(&api, "");
    let (id, action) = runner.commanded().await;
    assert!(matches!(action, Action::Pause(_)), "{action:?}");
    runner.done(&id).await;
    answered(answer).await.expect("paused");
    server.stop().await;
}

#[tokio::test]
async fn work_follows_the_models_that_a_runner_offers() {
    let server = Local::start(&[]).await;
    let api = server.api();
    let mut runner = connect(&api, &[MODEL]).await;
    let early = api.submit_to(OTHER).await;
    let answer = apply(&api, OTHER, pb::apply::State::Loaded);
    let (id, action) = runner.commanded().await;
    let Action::Apply(asked) = action else { panic!("{action:?}") };
    assert_eq!((asked.model.as_str(), asked.state()), (OTHER, pb::apply::State::Loaded));
    assert!(asked.options.expect("options").fields.contains_key("weights_uri"));
    runner.offer(&[MODEL, OTHER]).await;
    runner.done(&id).await;
    assert_eq!(answered(answer).await.expect("applied").models, [MODEL, OTHER]);
    let lease = runner.assigned().await;
    assert_eq!(lease.task_id, early);
    runner.finish(&lease, 1, scripted::success()).await;

    let answer = apply(&api, OTHER, pb::apply::State::Unloaded);
    let (id, _) = runner.commanded().await;
    runner.offer(&[MODEL]).await;
    runner.done(&id).await;
    answered(answer).await.expect("unloaded");
    runner.credits(2).await;
    let late = api.submit_to(OTHER).await;
    let served = api.submit_to(MODEL).await;
    assert_eq!(runner.assigned().await.task_id, served);
    assert_eq!(api.get(&late).await.state(), TaskState::Queued);

    // What Hello says counts as much, also in the session that goes on.
    runner = runner.reconnect_with(&api, &[OTHER]).await;
    assert!(runner.welcome.resumed);
    runner.credits(2).await;
    assert_eq!(runner.assigned().await.task_id, late);
    server.stop().await;
}

#[tokio::test]
async fn a_drain_shows_its_progress_and_is_waited_for() {
    let server = Local::start(&[]).await;
    let api = server.api();
    let mut runner = connect(&api, &[MODEL]).await;
    let drain = pb::DrainRunnerRequest {
        runner_id: "r1".into(),
        deadline: Some(seconds(60.0)),
        wait: true,
        ..default()
    };
    let mut runners = api.runners();
    let answer = tokio::spawn(async move { runners.drain_runner(drain).await });
    let (id, _) = runner.commanded().await;
    runner.progress(&id, 3, 5).await;
    let command = eventually("the progress", SOON, || async {
        get(&api).await.commands.pop().filter(|command| command.done > 0)
    })
    .await;
    assert_eq!((command.done, command.total), (3, 5));
    assert_eq!(command.state(), pb::runner_command::State::Accepted);
    assert_eq!(get(&api).await.state(), runner::State::Draining);
    assert!(!answer.is_finished(), "answered before the drain ended");
    runner.done(&id).await;
    within("an answer", SOON, answer).await.expect("no panic").expect("drained");
    server.stop().await;
}

/// P15: who waits for a runner, or as one for work, keeps nobody else from being answered.
#[tokio::test]
async fn calls_that_wait_take_no_place_among_those_at_work() {
    let server = Local::start(&[("BATON_LIMITS_CALLS", "1")]).await;
    let api = server.api();
    let mut runner = connect(&api, &[MODEL]).await;
    let drain = pb::DrainRunnerRequest { runner_id: "r1".into(), wait: true, ..default() };
    let mut runners = api.runners();
    let answer = tokio::spawn(async move { runners.drain_runner(drain).await });
    let (id, _) = runner.commanded().await;
    let hello = connect_request::Body::Hello(scripted::hello("r2", &[OTHER], 1));
    let poll = |session_id, messages| {
        let (mut runners, wait) = (api.runners(), Some(seconds(30.0)));
        async move { runners.poll(pb::PollRequest { messages, session_id, wait }).await }
    };
    let hello = pb::ConnectRequest { seq: 0, ack: 0, body: Some(hello) };
    let welcome = poll(String::new(), vec![hello]).await.expect("a welcome").into_inner();
    let Some(connect_response::Body::Welcome(welcome)) = welcome.messages[0].body.clone() else {
        panic!("no welcome: {welcome:?}")
    };
    let waiting = tokio::spawn(poll(welcome.session_id, Vec::new()));
    assert_eq!(get(&api).await.state(), runner::State::Draining);
    assert!(!answer.is_finished() && !waiting.is_finished());
    runner.done(&id).await;
    within("an answer", SOON, answer).await.expect("no panic").expect("drained");
    waiting.abort();
    server.stop().await;
}

#[tokio::test]
async fn the_same_request_id_is_the_same_command() {
    let server = Local::start(&[]).await;
    let api = server.api();
    let mut runner = connect(&api, &[MODEL]).await;
    let both = [pause(&api, "a"), pause(&api, "a")];
    let (id, _) = runner.commanded().await;
    runner.done(&id).await;
    for answer in both {
        answered(answer).await.expect("paused");
    }
    answered(pause(&api, "a")).await.expect("paused before");
    assert_eq!(get(&api).await.commands.len(), 1);
    let request = pb::ResumeRunnerRequest { runner_id: "r1".into(), request_id: "a".into() };
    let refused = api.runners().resume_runner(request).await.unwrap_err();
    assert_eq!(
        (refused.code(), reason(&refused).as_str()),
        (Code::AlreadyExists, "REQUEST_ID_REUSED")
    );
    server.stop().await;
}

#[tokio::test]
async fn a_refusal_reaches_the_caller_as_the_runner_gave_it() {
    let server = Local::start(&[]).await;
    let api = server.api();
    let mut runner = connect(&api, &[MODEL]).await;
    let mut runners = api.runners();
    let answer = tokio::spawn(async move {
        let params = Some(object(&[("topk", "4")]));
        runners
            .tune_runner(pb::TuneRunnerRequest { runner_id: "r1".into(), params, ..default() })
            .await
    });
    let (id, _) = runner.commanded().await;
    runner.failed(&id, &Error::invalid("params.topk", "is unknown")).await;
    let refused = answered(answer).await.unwrap_err();
    assert_eq!(
        (refused.code(), reason(&refused).as_str()),
        (Code::InvalidArgument, "INVALID_PARAMS")
    );
    assert_eq!(refused.message(), "params.topk: is unknown");
    let command = get(&api).await.commands.pop().expect("the command");
    assert_eq!(command.state(), pb::runner_command::State::Failed);
    assert_eq!(command.error.expect("an error").message, "params.topk: is unknown");
    server.stop().await;
}

#[tokio::test]
async fn a_command_to_a_runner_that_is_away_waits_for_it() {
    let server = Local::start(&[]).await;
    let api = server.api();
    let mut runner = connect(&api, &[MODEL]).await;
    let answer = pause(&api, "");
    let (id, _) = runner.commanded().await;
    // The connection breaks before the answer: the command comes again, under its id.
    runner = runner.reconnect(&api).await.expect("a welcome");
    runner.done(&id).await;
    answered(answer).await.expect("paused");
    assert_eq!(get(&api).await.commands.len(), 1);
    server.stop().await;
}

#[tokio::test]
async fn a_command_fails_with_the_session_of_its_runner() {
    let server = Local::start(SHORT).await;
    let api = server.api();
    let runner = connect(&api, &[MODEL]).await;
    drop(runner);
    eventually("the runner is away", SOON, || async {
        (get(&api).await.state() == runner::State::Disconnected).then_some(())
    })
    .await;
    let refused = answered(pause(&api, "")).await.unwrap_err();
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::Unavailable, "RUNNER_LOST"));
    server.stop().await;
}

#[tokio::test]
async fn a_call_whose_time_is_up_leaves_the_command_under_way() {
    let server = Local::start(&[]).await;
    let api = server.api();
    let mut runner = connect(&api, &[MODEL]).await;
    let body = pb::PauseRunnerRequest { runner_id: "r1".into(), ..default() };
    let mut request = tonic::Request::new(body);
    request.set_timeout(Duration::from_millis(200));
    let refused = api.runners().pause_runner(request).await.unwrap_err();
    assert!(matches!(refused.code(), Code::DeadlineExceeded | Code::Cancelled), "{refused:?}");
    let (id, _) = runner.commanded().await;
    runner.done(&id).await;
    eventually("the command's end", SOON, || async {
        let command = get(&api).await.commands.pop()?;
        (command.state() == pb::runner_command::State::Done).then_some(())
    })
    .await;
    server.stop().await;
}

#[tokio::test]
async fn an_attempt_that_is_cancelled_is_watched_until_it_has_stopped() {
    let server = Local::manual(SHORT).await;
    let api = server.api();
    let mut runner = connect(&api, &[MODEL]).await;
    let tasks = [api.submit_to(MODEL).await, api.submit_to(MODEL).await];
    let leases = [runner.assigned().await, runner.assigned().await];
    for task in &tasks {
        api.cancel(task).await.expect("cancelled");
    }
    for lease in &leases {
        runner.cancelled(lease).await;
    }
    assert_eq!(get(&api).await.stopping.len(), 2);
    runner.stopped(&leases[0], 0.1).await;
    let left = eventually("the first has stopped", SOON, || async {
        Some(get(&api).await.stopping).filter(|stopping| stopping.len() == 1)
    })
    .await;
    assert_eq!((&left[0].task_id, left[0].overdue), (&leases[1].task_id, false));
    server
        .while_time_passes(eventually("the second is overdue", 3 * SOON, || async {
            get(&api).await.stopping.pop().filter(|attempt| attempt.acknowledged && attempt.overdue)
        }))
        .await;
    runner.stopped(&leases[1], 60.0).await;
    eventually("none is left", SOON, || async {
        get(&api).await.stopping.is_empty().then_some(())
    })
    .await;
    let metrics = &server.app().metrics;
    let text = metrics.text();
    for outcome in ["stopped", "overdue"] {
        let line = format!("baton_runner_cancels_total{{outcome=\"{outcome}\"}} 1");
        assert!(text.contains(&line), "{outcome}: {text}");
    }
    assert!(!text.contains("outcome=\"late\""), "counted twice");
    server.stop().await;
}

#[tokio::test]
async fn heartbeats_show_the_load_of_the_host() {
    let server = Local::start(&[]).await;
    let api = server.api();
    let mut runner = connect(&api, &[MODEL]).await;
    let gpu = pb::Gpu { name: "Fake".into(), utilization: Some(0.5), ..default() };
    let heartbeat = pb::RunnerHeartbeat { load: 2.5, gpus: vec![gpu.clone()], ..default() };
    runner.set_beating(false);
    runner.send_unnumbered(connect_request::Body::Heartbeat(heartbeat)).await;
    let seen = eventually("the load", SOON, || async {
        Some(get(&api).await).filter(|runner| runner.load > 2.0)
    })
    .await;
    assert_eq!(seen.node.expect("a node").gpus, [gpu]);
    server.stop().await;
}

/// The unary fallback carries commands and answers as well.
#[tokio::test]
async fn commands_travel_by_calls_too() {
    let server = Local::start(&[]).await;
    let api = server.api();
    let poll = |session_id: &str, messages| {
        let request =
            pb::PollRequest { messages, session_id: session_id.into(), wait: Some(seconds(5.0)) };
        let mut runners = api.runners();
        async move { runners.poll(request).await.expect("a poll").into_inner().messages }
    };
    let message = |seq, body| pb::ConnectRequest { seq, ack: 0, body: Some(body) };
    let hello =
        pb::Hello { features: vec![feature::TUNE.into()], ..scripted::hello("r1", &[MODEL], 1) };
    let first = poll("", vec![message(0, connect_request::Body::Hello(hello))]).await;
    let Some(connect_response::Body::Welcome(welcome)) = first[0].body.clone() else { panic!() };
    assert_eq!(welcome.features, [feature::TUNE]);
    let mut runners = api.runners();
    let answer = tokio::spawn(async move {
        let params = Some(object(&[("a", "b")]));
        runners
            .tune_runner(pb::TuneRunnerRequest { runner_id: "r1".into(), params, ..default() })
            .await
    });
    let messages = poll(&welcome.session_id, Vec::new()).await;
    let command = messages.into_iter().find_map(|message| match message.body {
        Some(connect_response::Body::Command(command)) => Some(command),
        _ => None,
    });
    let command_id = command.expect("a command").command_id;
    let done = pb::CommandDone { command_id, status: Some(default()) };
    poll(&welcome.session_id, vec![message(1, connect_request::Body::CommandDone(done))]).await;
    answered(answer).await.expect("tuned");
    server.stop().await;
}
