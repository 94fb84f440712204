//! Submits, retries, cancellation, deadlines: what the life of one task promises.

use std::{collections::HashSet, time::Duration};

use baton::pb::{self, TaskState, task_event::Body};
use tonic::Code;

use crate::harness::{
    SOON,
    api::reason,
    checks, default, eventually,
    local::Local,
    runner::{self, Runner},
    seconds,
    server::{FAST, Server},
    spec, within,
};

const MODEL: &str = "test/echo";

fn retry(max_attempts: u32) -> pb::RetryPolicy {
    let backoff = Some(seconds(0.05));
    pb::RetryPolicy { max_attempts, initial_backoff: backoff, max_backoff: backoff, ..default() }
}

/// P1, P6: the whole path, and the end that the stream and `GetTask` agree on.
#[tokio::test]
async fn a_task_runs_to_one_end_that_get_and_stream_agree_on() {
    let server = Local::start(&[]).await;
    let api = server.api();
    let mut runner = Runner::connect(&api, "r1", &[MODEL], 1).await;
    let task = api.submit_to(MODEL).await;
    runner.serve_one(5).await;
    let events = api.read_all(&task).await;
    checks::check_stream(&task, 0, &events);
    assert_eq!(checks::text(&events), "t0 t1 t2 t3 t4 ");
    let state = api.get(&task).await;
    assert_eq!(state.state(), TaskState::Succeeded);
    checks::check_end(&state, &events);
}

/// P1: what was acknowledged before a kill -9 is there after it.
#[tokio::test]
async fn an_acknowledged_submit_survives_kill_nine() {
    let mut server = Server::start(&[]).await;
    let mut acknowledged = HashSet::new();
    for round in 0..3 {
        let (told, mut heard) = tokio::sync::mpsc::channel(10_000);
        for _ in 0..16 {
            let (api, told) = (server.api(), told.clone());
            tokio::spawn(async move {
                while let Ok(task) = api.try_submit(spec(MODEL)).await {
                    if told.send(task.task_id).await.is_err() {
                        return;
                    }
                }
            });
        }
        drop(told);
        while acknowledged.len() < 100 * (round + 1) {
            let task = within("submits", SOON, heard.recv()).await.expect("a submit");
            acknowledged.insert(task);
        }
        server.kill();
        while let Some(task) = heard.recv().await {
            acknowledged.insert(task);
        }
        server.restart().await;
        let there: HashSet<_> =
            server.api().list_all().await.into_iter().map(|task| task.task_id).collect();
        let lost: Vec<_> = acknowledged.difference(&there).collect();
        assert!(lost.is_empty(), "acknowledged and gone: {lost:?}");
    }
}

/// P2: one task for one request id, over a restart too.
#[tokio::test]
async fn the_same_request_id_finds_the_same_task_across_a_restart() {
    let mut server = Server::start(&[]).await;
    let api = server.api();
    let first = api.try_submit_as(spec(MODEL), "one").await.expect("a task");
    let again = api.try_submit_as(spec(MODEL), "one").await.expect("the same task");
    assert_eq!(first.task_id, again.task_id);
    server.kill();
    server.restart().await;
    let api = server.api();
    let after = api.try_submit_as(spec(MODEL), "one").await.expect("the same task");
    assert_eq!(first.task_id, after.task_id);
    assert_eq!(api.list_all().await.len(), 1);
}

/// P2: twenty submits at once under one request id make one task.
#[tokio::test]
async fn a_request_id_raced_with_itself_makes_one_task() {
    let server = Local::start(&[]).await;
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..20 {
        let api = server.api();
        calls.spawn(async move { api.try_submit_as(spec(MODEL), "raced").await });
    }
    let answers = within("twenty submits", SOON, calls.join_all()).await;
    let ids: HashSet<_> =
        answers.into_iter().map(|answer| answer.expect("a task").task_id).collect();
    assert_eq!(ids.len(), 1);
}

/// P2: another request under a used id is refused and makes nothing.
#[tokio::test]
async fn a_used_request_id_with_another_request_is_refused() {
    let server = Local::start(&[]).await;
    let api = server.api();
    api.try_submit_as(spec(MODEL), "one").await.expect("a task");
    let other = pb::TaskSpec { priority: 7, ..spec(MODEL) };
    let refused = api.try_submit_as(other, "one").await.expect_err("another request");
    assert_eq!((refused.code(), &*reason(&refused)), (Code::AlreadyExists, "REQUEST_ID_REUSED"));
    assert_eq!(api.list_all().await.len(), 1);
}

/// P10: the connected runner hears of a cancel within 250 ms, and what it says then is void.
#[tokio::test]
async fn a_cancel_reaches_the_runner_in_250_ms_and_ends_the_stream() {
    let server = Local::start(&[]).await;
    let api = server.api();
    let mut runner = Runner::connect(&api, "r1", &[MODEL], 1).await;
    let task = api.submit_to(MODEL).await;
    let lease = runner.assigned().await;
    runner.output(&lease, 1, runner::tokens(0, 3), None).await;
    runner.acked(&lease, 3).await;

    let started = std::time::Instant::now();
    let cancelled = api.cancel(&task).await.expect("cancelled");
    assert_eq!(cancelled.state(), TaskState::Cancelled);
    runner.output(&lease, 4, runner::tokens(3, 3), None).await;
    runner.cancelled(&lease).await;
    assert!(started.elapsed() < Duration::from_millis(250), "told after {:?}", started.elapsed());
    runner.output(&lease, 4, runner::tokens(3, 3), Some(runner::success())).await;
    runner.refused(&lease).await;

    let events = api.read_all(&task).await;
    checks::check_stream(&task, 0, &events);
    assert_eq!(checks::text(&events), "t0 t1 t2 ");
    checks::check_end(&api.get(&task).await, &events);
    assert_eq!(api.get(&task).await.state(), TaskState::Cancelled);
}

/// P6: cancelling an ended task changes nothing.
#[tokio::test]
async fn an_end_never_changes() {
    let mut server = Server::start(&[]).await;
    let api = server.api();
    let mut runner = Runner::connect(&api, "r1", &[MODEL], 1).await;
    let task = api.submit_to(MODEL).await;
    let lease = runner.serve_one(2).await;
    let before = (api.get(&task).await, api.read_all(&task).await);
    let answer = api.cancel(&task).await.expect("the ended task");
    assert_eq!(answer.state(), TaskState::Succeeded);
    runner.output(&lease, 3, vec![], Some(runner::failure(false))).await;
    server.kill();
    server.restart().await;
    let api = server.api();
    assert_eq!((api.get(&task).await, api.read_all(&task).await), before);
}

/// P11: a task that always fails is dead-lettered after its limit, each attempt's reason told.
#[tokio::test]
async fn a_poison_task_is_dead_lettered_with_the_reason_of_each_attempt() {
    let server = Local::start(&[]).await;
    let api = server.api();
    let mut runner = Runner::connect(&api, "r1", &[MODEL], 1).await;
    let task = api.submit(pb::TaskSpec { retry: Some(retry(3)), ..spec(MODEL) }).await.task_id;
    for attempt in 1..=3 {
        let lease = runner.assigned().await;
        assert_eq!(lease.attempt, attempt);
        runner.finish(&lease, 1, runner::failure(true)).await;
        runner.credits(1).await;
    }
    let end = api.wait_for(&task, &[TaskState::DeadLettered], SOON).await;
    assert_eq!((end.attempt, end.failed_attempts), (3, 3));
    assert_eq!((end.lost_attempts, end.handed_back_attempts), (0, 0));
    let events = api.read_all(&task).await;
    checks::check_stream(&task, 0, &events);
    let told = events.iter().filter(|event| match &event.body {
        Some(Body::Queued(queued)) => queued.previous_error.is_some(),
        Some(Body::Ended(ended)) => ended.error.is_some(),
        _ => false,
    });
    assert_eq!(told.count(), 3);
}

/// P11: the runner's word that a retry cannot help is final.
#[tokio::test]
async fn a_failure_that_cannot_be_retried_is_not() {
    let server = Local::start(&[]).await;
    let api = server.api();
    let mut runner = Runner::connect(&api, "r1", &[MODEL], 1).await;
    let task = api.submit(pb::TaskSpec { retry: Some(retry(5)), ..spec(MODEL) }).await.task_id;
    let lease = runner.assigned().await;
    runner.finish(&lease, 1, runner::failure(false)).await;
    let end = api.wait_for(&task, &[TaskState::Failed], SOON).await;
    assert_eq!((end.attempt, end.failed_attempts), (1, 1));
}

/// P11: a hand-back is no failure of the task.
#[tokio::test]
async fn hand_backs_are_counted_apart_from_failures() {
    let server = Local::start(&[]).await;
    let api = server.api();
    let mut runner = Runner::connect(&api, "r1", &[MODEL], 1).await;
    let task = api.submit(pb::TaskSpec { retry: Some(retry(1)), ..spec(MODEL) }).await.task_id;
    for attempt in 1..=3 {
        let lease = runner.assigned().await;
        assert_eq!(lease.attempt, attempt);
        runner.finish(&lease, 1, runner::hand_back()).await;
        runner.credits(1).await;
    }
    let lease = runner.assigned().await;
    runner.finish(&lease, 1, runner::success()).await;
    let end = api.wait_for(&task, &[TaskState::Succeeded], SOON).await;
    assert_eq!((end.attempt, end.failed_attempts, end.handed_back_attempts), (4, 0, 3));
}

/// P12: a deadline passes on time although the server was down in between.
#[tokio::test]
async fn a_deadline_holds_through_a_restart() {
    let mut server = Server::start(&[]).await;
    let api = server.api();
    let deadline = std::time::SystemTime::now() + Duration::from_secs(3);
    let task = api.submit(pb::TaskSpec { deadline: Some(deadline.into()), ..spec(MODEL) }).await;
    server.kill();
    server.restart().await;
    let api = server.api();
    let end = api.wait_for(&task.task_id, &[TaskState::Expired], SOON).await;
    let late = deadline.elapsed().expect("not before the deadline");
    assert!(late < Duration::from_secs(1), "{late:?} late");
    assert_eq!(end.error.expect("an error").reason, "DEADLINE_EXCEEDED");
}

/// P12: an attempt that runs too long is ended, and the runner is told to stop.
#[tokio::test]
async fn an_execution_timeout_ends_the_attempt_within_a_second() {
    let server = Local::start(&[]).await;
    let api = server.api();
    let mut runner = Runner::connect(&api, "r1", &[MODEL], 1).await;
    let limits = pb::TaskSpec {
        execution_timeout: Some(seconds(1.0)),
        retry: Some(retry(1)),
        ..spec(MODEL)
    };
    let task = api.submit(limits).await.task_id;
    let lease = runner.assigned().await;
    let started = std::time::Instant::now();
    runner.cancelled(&lease).await;
    let took = started.elapsed().as_secs_f64();
    assert!((0.8..2.0).contains(&took), "ended after {took} s");
    let over = [TaskState::Failed, TaskState::DeadLettered];
    let end = api.wait_for(&task, &over, SOON).await;
    assert_eq!(end.error.expect("an error").reason, "EXECUTION_TIMEOUT");
}

/// P12: a task that nobody starts in time expires.
#[tokio::test]
async fn a_start_timeout_expires_a_task_that_nobody_starts() {
    let server = Local::start(&[]).await;
    let api = server.api();
    let asked = pb::TaskSpec { start_timeout: Some(seconds(1.0)), ..spec(MODEL) };
    let started = std::time::Instant::now();
    let task = api.submit(asked).await.task_id;
    let end = api.wait_for(&task, &[TaskState::Expired], SOON).await;
    let took = started.elapsed().as_secs_f64();
    assert!((0.9..2.0).contains(&took), "expired after {took} s");
    assert_eq!(end.error.expect("an error").reason, "START_TIMEOUT");
}

/// P18: a read after a write sees it, and no read goes back.
#[tokio::test]
async fn a_read_sees_the_write_before_it_and_states_never_go_back() {
    let server = Local::start(FAST).await;
    let api = server.api();
    let mut runner = Runner::connect(&api, "r1", &[MODEL], 4).await;
    for round in 0..50 {
        let task = api.submit_to(MODEL).await;
        let first = api.get(&task).await;
        assert_ne!(first.state(), TaskState::Unspecified);
        let (reader, id) = (api.clone(), task.clone());
        let watch = tokio::spawn(async move {
            let mut rank = 0;
            loop {
                let state = reader.get(&id).await.state();
                let now = if checks::is_terminal(state) { 3 } else { state as i32 };
                assert!(now >= rank, "{id} went back to {state:?}");
                rank = now;
                if checks::is_terminal(state) {
                    return state;
                }
            }
        });
        let lease = runner.assigned().await;
        let expected = if round % 2 == 0 {
            api.cancel(&task).await.expect("cancelled");
            assert_eq!(api.get(&task).await.state(), TaskState::Cancelled);
            runner.cancelled(&lease).await;
            TaskState::Cancelled
        } else {
            runner.finish(&lease, 1, runner::success()).await;
            assert_eq!(api.get(&task).await.state(), TaskState::Succeeded);
            TaskState::Succeeded
        };
        runner.credits(4).await;
        let last = within("the reader", SOON, watch).await.expect("states in order");
        assert_eq!(last, expected);
    }
}

/// P10, P6, P5: ten thousand cancels against tokens and completion: one end each, and nothing
/// after an acknowledged cancel.
#[tokio::test]
async fn heavy_ten_thousand_cancels_race_tokens_and_completion_to_one_end_each() {
    const RACES: usize = 10_000;
    const SLOTS: usize = 64;
    let server = Local::start(&[]).await;
    let api = server.api();
    let mut runner = Runner::connect(&api, "r1", &[MODEL], SLOTS as u32).await;
    let mut cancelled = 0;
    let mut done = 0;
    while done < RACES {
        let mut calls = tokio::task::JoinSet::new();
        let round: Vec<_> = (0..SLOTS).collect();
        for _ in &round {
            let api = api.clone();
            calls.spawn(async move { api.submit_to(MODEL).await });
        }
        let tasks = within("submits", 3 * SOON, calls.join_all()).await;
        let mut leases = Vec::new();
        for _ in &round {
            leases.push(runner.assigned().await);
        }
        let mut cancels = tokio::task::JoinSet::new();
        for (i, lease) in leases.iter().enumerate() {
            let (api, task) = (api.clone(), lease.task_id.clone());
            cancels.spawn(async move {
                if i % 3 == 0 {
                    tokio::task::yield_now().await;
                }
                let answer = api.cancel(&task).await.expect("an answer");
                (task.clone(), answer, api.get(&task).await.last_sequence)
            });
            let events = runner::tokens(0, (i % 4) as u64);
            let finish = (i % 5 != 0).then(runner::success);
            runner.output(lease, 1, events, finish).await;
        }
        for (task, answer, last_sequence) in within("cancels", 3 * SOON, cancels.join_all()).await {
            assert!(checks::is_terminal(answer.state()), "{task}: {answer:?}");
            let end = api.get(&task).await;
            assert_eq!(end.state(), answer.state(), "{task}: the end changed");
            assert_eq!(end.last_sequence, last_sequence, "{task}: grew after the answer");
            cancelled += usize::from(end.state() == TaskState::Cancelled);
            // One in eight streams is read whole: the rest would only repeat it.
            if done % 8 == 0 {
                let events = api.read_all(&task).await;
                checks::check_stream(&task, 0, &events);
                checks::check_end(&end, &events);
            }
            done += 1;
        }
        for lease in &leases {
            runner.forget(lease);
        }
        runner.credits(SLOTS as u32).await;
        assert_eq!(tasks.len(), SLOTS);
    }
    assert!(cancelled > 0 && cancelled < done, "{cancelled} of {done} cancelled: no race");
}

/// P3: nothing is left open once runners serve everything.
#[tokio::test]
async fn every_accepted_task_reaches_an_end() {
    let server = Local::start(FAST).await;
    let api = server.api();
    for i in 0..50 {
        let start = if i % 5 == 0 { Some(seconds(0.2)) } else { None };
        api.submit(pb::TaskSpec { delay: start, retry: Some(retry(2)), ..spec(MODEL) }).await;
    }
    let mut runner = Runner::connect(&api, "r1", &[MODEL], 8).await;
    let (mut served, mut again) = (0, 0);
    while served < 50 + again {
        let lease = runner.assigned().await;
        // Every second task fails once.
        let failing = lease.attempt == 1 && served % 2 == 0;
        again += u32::from(failing);
        served += 1;
        let finish = if failing { runner::failure(true) } else { runner::success() };
        runner.finish(&lease, 1, finish).await;
        runner.credits(8).await;
    }
    eventually("all tasks ended", SOON, || async {
        let open = api.list_all().await.into_iter();
        (open.filter(|task| !checks::is_terminal(task.state())).count() == 0).then_some(())
    })
    .await;
}
