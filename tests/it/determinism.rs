//! The n-gram engine says the same for the same seed, whoever executes it and however often.

use std::process::Command;

use baton::pb::{self, TaskState, task_event::Body};

use crate::harness::{
    SOON,
    api::Api,
    checks, default, eventually, object,
    server::{BATON, FAST, Process, Server},
    spec,
};

const MODEL: &str = "test/ngram";
const TOKENS: u32 = 60;

/// A runner process with the n-gram engine.
fn agent(server: &Server, name: &str) -> Process {
    let mut command = Command::new(BATON);
    command
        .args(["runner", "start", "--engine", "ngram", "--model", MODEL, "--name", name])
        .env("BATON_ADDRESS", format!("http://{}", server.addr));
    Process::spawn(&mut command, &server.dir.path().join(format!("{name}.log")))
}

/// A task of sixty tokens, at a pace that lets one interfere where `slow`.
fn generation(seed: Option<u64>, slow: bool) -> pb::TaskSpec {
    let number = |value: f64| prost_types::Value {
        kind: Some(prost_types::value::Kind::NumberValue(value)),
    };
    let rate = if slow { 20.0 } else { 10_000.0 };
    let params = [("max_tokens", f64::from(TOKENS)), ("tokens_per_second", rate)];
    pb::TaskSpec {
        input: Some(object(&[("prompt", "Alice was beginning to")])),
        params: Some(prost_types::Struct {
            fields: params.map(|(name, value)| (name.to_owned(), number(value))).into(),
        }),
        seed,
        ..spec(MODEL)
    }
}

/// The tokens of one attempt, piece by piece.
fn pieces(events: &[pb::TaskEvent], attempt: u32) -> Vec<String> {
    let of_attempt = events.iter().filter(|event| event.attempt == attempt);
    let token = |event: &pb::TaskEvent| match &event.body {
        Some(Body::Token(token)) => Some(token.text.clone()),
        _ => None,
    };
    of_attempt.filter_map(token).collect()
}

/// Waits for the end and returns what the attempt that succeeded said.
async fn said(api: &Api, task: &str) -> Vec<String> {
    let task = api.wait_for(task, &[TaskState::Succeeded], 3 * SOON).await;
    let events = api.read_all(&task.task_id).await;
    checks::check_stream(&task.task_id, 0, &events);
    let pieces = pieces(&events, task.attempt);
    assert_eq!(pieces.len(), TOKENS as usize);
    pieces
}

/// Waits until a reader has seen a few tokens of the attempt.
async fn under_way(api: &Api, task: &str) {
    eventually("tokens", SOON, || async {
        let mut stream = api.stream(task, 1).await.ok()?;
        let mut seen = 0;
        while let Ok(Some(event)) = stream.message().await {
            seen += u32::from(matches!(event.body, Some(Body::Token(_))));
            if seen == 5 {
                return Some(());
            }
        }
        None
    })
    .await;
}

/// One seed, one transcript: again on the same runner, on another one, through a kill of the
/// server in the middle, after it, and when the ended task is submitted again.
#[tokio::test]
async fn one_seed_gives_one_transcript_across_restarts_runners_and_retries() {
    let mut server = Server::start(FAST).await;
    let mut first = agent(&server, "first");
    let api = server.api();
    let once = api.submit(generation(Some(42), false)).await.task_id;
    let expected = said(&api, &once).await;
    let other = api.submit(generation(Some(43), false)).await.task_id;
    assert_ne!(said(&api, &other).await, expected, "the seed does nothing");
    // Without a seed the server makes one, which a retry keeps.
    let unseeded = api.submit(generation(None, false)).await.task_id;
    let made = said(&api, &unseeded).await;
    let request = pb::RetryTaskRequest { task_id: unseeded, ..default() };
    let retried = api.tasks().retry_task(request).await.expect("a retry").into_inner();
    assert_eq!(said(&api, &retried.task_id).await, made, "a retry said something else");

    let through = api.submit(generation(Some(42), true)).await.task_id;
    under_way(&api, &through).await;
    server.kill();
    server.restart().await;
    let api = server.api();
    assert_eq!(said(&api, &through).await, expected, "different through a restart");
    let events = api.read_all(&once).await;
    assert_eq!(pieces(&events, 1), expected, "the kept transcript changed");

    first.kill();
    let _second = agent(&server, "second");
    let elsewhere = api.submit(generation(Some(42), false)).await.task_id;
    assert_eq!(said(&api, &elsewhere).await, expected, "different on another runner");
    assert_eq!(api.get(&elsewhere).await.runner_id, "second");
}

/// What a lost attempt had said is the beginning of what the next one says.
#[tokio::test]
async fn the_attempt_after_a_killed_runner_says_the_same() {
    let server = Server::start(FAST).await;
    let api = server.api();
    let mut first = agent(&server, "first");
    let task = api.submit(generation(None, true)).await.task_id;
    under_way(&api, &task).await;
    first.kill();
    let _second = agent(&server, "second");
    let whole = said(&api, &task).await;
    let end = api.get(&task).await;
    assert_eq!((end.attempt, end.runner_id.as_str()), (2, "second"));
    let lost = pieces(&api.read_all(&task).await, 1);
    assert!((5..whole.len()).contains(&lost.len()), "{} tokens were lost", lost.len());
    assert_eq!(lost, whole[..lost.len()], "the second attempt said something else");
}
