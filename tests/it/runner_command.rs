//! `baton runner start` as a process: what signals do to it and to its work.

use std::{process::Command, time::Duration};

use baton::pb::{self, TaskState};
use rustix::process::Signal;

use crate::harness::{
    SOON, default, eventually, object,
    server::{BATON, FAST, Process, Server},
    within,
};

const MODEL: &str = "test/echo";

/// A task of `words` words, said at one every 50 ms.
fn slow(words: usize) -> pb::TaskSpec {
    let text = vec!["word"; words].join(" ");
    let mut params = object(&[]);
    let delay = prost_types::value::Kind::NumberValue(50.0);
    params.fields.insert("delay_ms".into(), prost_types::Value { kind: Some(delay) });
    let input = Some(object(&[("text", &text)]));
    pb::TaskSpec { model: MODEL.into(), input, params: Some(params), ..default() }
}

/// A runner with two slots that hands back what still runs after `drain_time`.
fn start(server: &Server, name: &str, drain_time: &str) -> Process {
    let mut command = Command::new(BATON);
    command
        .args(["runner", "start", "--engine", "echo", "--model", MODEL, "--slots", "2"])
        .args(["--name", name, "--drain-time", drain_time])
        .env("BATON_ADDRESS", format!("http://{}", server.addr));
    Process::spawn(&mut command, &server.dir.path().join(format!("{name}.log")))
}

/// Submits a slow task and waits until it says something.
async fn begun(server: &Server, words: usize) -> String {
    let task = server.api().submit(slow(words)).await.task_id;
    within("the first token", SOON, async {
        let mut stream = server.api().stream(&task, 1).await.expect("a stream");
        loop {
            let event = stream.message().await.expect("an event").expect("a token");
            if let Some(pb::task_event::Body::Token(_)) = event.body {
                return;
            }
        }
    })
    .await;
    task
}

/// Sends SIGTERM and waits until the process says that it drains.
async fn drain(process: &Process) {
    process.signal(Signal::TERM);
    eventually("the runner drains", SOON, || async {
        process.read_log().contains("draining").then_some(())
    })
    .await;
}

#[tokio::test]
async fn the_first_sigterm_finishes_what_runs_and_takes_no_more() {
    let server = Server::start(FAST).await;
    let api = server.api();
    let mut process = start(&server, "r1", "1m");
    let running = begun(&server, 40).await;
    drain(&process).await;
    let waiting = api.submit(slow(1)).await.task_id;
    let status = process.exited(SOON).await;
    assert!(status.success(), "{status}");
    let end = api.get(&running).await;
    assert_eq!((end.state(), end.attempt), (TaskState::Succeeded, 1));
    assert_eq!(end.usage.expect("usage").tokens_out, 40);
    let state = api.get(&waiting).await;
    assert_eq!((state.state(), state.attempt), (TaskState::Queued, 0));
    let left = pb::GetRunnerRequest { runner_id: "r1".into() };
    assert!(api.runners().get_runner(left).await.is_err(), "it left without a word");
}

#[tokio::test]
async fn what_outlasts_the_drain_time_is_handed_back() {
    let server = Server::start(FAST).await;
    let api = server.api();
    let mut process = start(&server, "r1", "200ms");
    let task = begun(&server, 10_000).await;
    drain(&process).await;
    let status = process.exited(SOON).await;
    assert!(status.success(), "{status}");
    let state = api.wait_for(&task, &[TaskState::Queued], SOON).await;
    let counted = (state.handed_back_attempts, state.lost_attempts, state.failed_attempts);
    assert_eq!(counted, (1, 0, 0));
}

#[tokio::test]
async fn the_second_sigterm_stops_it_now() {
    let server = Server::start(FAST).await;
    let api = server.api();
    let mut process = start(&server, "r1", "1m");
    let task = begun(&server, 10_000).await;
    drain(&process).await;
    assert!(process.exit_code().is_none(), "it did not wait for what runs");
    process.signal(Signal::TERM);
    process.exited(Duration::from_secs(2)).await;
    let state = api.wait_for(&task, &[TaskState::Queued], SOON).await;
    assert_eq!((state.handed_back_attempts, state.failed_attempts), (0, 0));
    assert_eq!(state.lost_attempts, 1);
}

#[tokio::test]
async fn a_runner_that_never_reached_its_server_leaves_at_the_first_sigterm() {
    let server = Server::stopped(FAST);
    let mut process = start(&server, "r1", "1m");
    eventually("the runner tries", SOON, || async {
        process.read_log().contains("not connected").then_some(())
    })
    .await;
    process.signal(Signal::TERM);
    let status = process.exited(Duration::from_secs(2)).await;
    assert!(status.success(), "{status}");
}
