//! More work than there is room for: refused early, shared fairly.

use std::time::Duration;

use baton::pb::{self, TaskState};
use tonic::Code;

use crate::harness::{
    SOON,
    api::reason,
    checks, default,
    local::Local,
    runner::{self, Runner},
    seconds, spec, within,
};

const MODEL: &str = "test/echo";

/// P15: a full queue refuses with a reason and a delay, and what it accepted runs.
#[tokio::test]
async fn a_full_queue_refuses_early_and_keeps_what_it_accepted() {
    let server = Local::start(&[("BATON_QUEUE_MAX_PER_MODEL", "50")]).await;
    let api = server.api();
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..500 {
        let api = api.clone();
        calls.spawn(async move { api.try_submit(spec(MODEL)).await });
    }
    let mut accepted = Vec::new();
    for answer in within("500 submits", 3 * SOON, calls.join_all()).await {
        match answer {
            Ok(task) => accepted.push(task.task_id),
            Err(status) => {
                assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
                assert_eq!(reason(&status), "QUEUE_FULL");
                let delay = baton::grpc::status::retry_delay(&status);
                assert!(delay.is_some_and(|delay| !delay.is_zero()), "no RetryInfo: {status:?}");
            }
        }
    }
    assert_eq!(accepted.len(), 50);
    let mut runner = Runner::connect(&api, "r1", &[MODEL], 10).await;
    for _ in 0..50 {
        let lease = runner.assigned().await;
        runner.finish(&lease, 1, runner::success()).await;
        runner.credits(10).await;
    }
    for task in accepted {
        assert_eq!(api.get(&task).await.state(), TaskState::Succeeded);
    }
    api.submit_to(MODEL).await;
    server.stop().await;
}

/// P15: under the drop policy the oldest of the lowest priority makes room, and ends saying so.
#[tokio::test]
async fn the_drop_policy_ends_the_oldest_of_lowest_priority_with_its_reason() {
    let env = [("BATON_QUEUE_MAX_PER_MODEL", "3"), ("BATON_QUEUE_FULL", "drop_oldest")];
    let server = Local::start(&env).await;
    let api = server.api();
    let low = api.submit(pb::TaskSpec { priority: -1, ..spec(MODEL) }).await.task_id;
    for _ in 0..2 {
        api.submit_to(MODEL).await;
    }
    api.submit(pb::TaskSpec { priority: 5, ..spec(MODEL) }).await;
    let end = api.wait_for(&low, &[TaskState::Failed], SOON).await;
    assert_eq!(end.error.expect("an error").reason, "QUEUE_FULL_DROP_LRU");
    let lower = pb::TaskSpec { priority: -5, ..spec(MODEL) };
    let refused = api.try_submit(lower).await.expect_err("nothing lower to drop");
    assert_eq!(reason(&refused), "QUEUE_FULL");
    server.stop().await;
}

/// P15: a deadline that the estimate rules out is refused when the client asked to be told.
#[tokio::test]
async fn a_deadline_that_cannot_be_met_is_refused_when_asked() {
    let server = Local::start(&[]).await;
    let api = server.api();
    let mut runner = Runner::connect(&api, "r1", &[MODEL], 1).await;
    // Measured: half a second each, one at a time.
    for _ in 0..6 {
        api.submit_to(MODEL).await;
        let lease = runner.assigned().await;
        crate::harness::pass(Duration::from_millis(500)).await;
        runner.finish(&lease, 1, runner::success()).await;
        runner.credits(1).await;
    }
    for _ in 0..60 {
        api.submit_to(MODEL).await;
    }
    let wanted =
        pb::TaskSpec { start_timeout: Some(seconds(1.0)), require_on_time: true, ..spec(MODEL) };
    let refused = api.try_submit(wanted).await.expect_err("sixty are ahead");
    assert_eq!(reason(&refused), "DEADLINE_UNMET");
    server.stop().await;
}

/// P15: with thirty times the load that a runner serves, calls stay quick and nothing accepted
/// is lost.
#[tokio::test]
async fn heavy_overload_keeps_answers_quick_and_loses_nothing_accepted() {
    let server = Local::start(&[("BATON_QUEUE_MAX_PER_MODEL", "200")]).await;
    let api = server.api();
    let mut runner = Runner::connect(&api, "r1", &[MODEL], 4).await;
    let serving = tokio::spawn(async move {
        loop {
            let lease = runner.assigned_within(Duration::from_mins(1)).await;
            runner.output(&lease, 1, runner::tokens(0, 3), None).await;
            runner.finish(&lease, 4, runner::success()).await;
            runner.credits(4).await;
        }
    });
    let mut floods = tokio::task::JoinSet::new();
    for _ in 0..30 {
        let api = api.clone();
        floods.spawn(async move {
            let (mut accepted, mut slowest) = (Vec::new(), Duration::ZERO);
            for _ in 0..40 {
                let started = std::time::Instant::now();
                if let Ok(task) = api.try_submit(spec(MODEL)).await {
                    accepted.push(task.task_id);
                }
                slowest = slowest.max(started.elapsed());
            }
            (accepted, slowest)
        });
    }
    let mut accepted = Vec::new();
    for (tasks, slowest) in within("the flood", 9 * SOON, floods.join_all()).await {
        accepted.extend(tasks);
        assert!(slowest < Duration::from_secs(5), "an answer took {slowest:?}");
    }
    for task in accepted {
        let end = api.wait_for(&task, &[TaskState::Succeeded], 6 * SOON).await;
        assert!(checks::is_terminal(end.state()));
    }
    serving.abort();
    server.stop().await;
}

/// P20: a namespace that floods does not starve another's few tasks.
#[tokio::test]
async fn a_flooding_namespace_does_not_starve_another() {
    let server = Local::start(&[("BATON_AUTH_REQUIRED", "true")]).await;
    let admin = crate::auth::admin(&server);
    let all = [pb::Scope::TasksRead, pb::Scope::TasksWrite, pb::Scope::Runner];
    let (_, runs) = crate::auth::key(&admin, "default", &all).await;
    let (_, loud) = crate::auth::key(&admin, "loud", &all).await;
    let (_, quiet) = crate::auth::key(&admin, "quiet", &all).await;
    let (loud, quiet) = (server.api().with_key(&loud), server.api().with_key(&quiet));
    let requests: Vec<_> =
        (0..400).map(|_| pb::SubmitTaskRequest { spec: Some(spec(MODEL)), ..default() }).collect();
    loud.tasks()
        .batch_submit_tasks(pb::BatchSubmitTasksRequest { requests })
        .await
        .expect("accepted");
    let mut runner = Runner::connect(&server.api().with_key(&runs), "r1", &[MODEL], 1).await;
    let mut wanted = Vec::new();
    for round in 0..30 {
        // The flood has been served for a while when the others come.
        if round == 10 {
            for _ in 0..5 {
                wanted.push(quiet.submit_to(MODEL).await);
            }
        }
        let lease = runner.assigned().await;
        wanted.retain(|task| *task != lease.task_id);
        runner.finish(&lease, 1, runner::success()).await;
        runner.credits(1).await;
    }
    assert!(wanted.is_empty(), "{} of 5 still wait behind the flood", wanted.len());
    server.stop().await;
}
