//! P12 on the real process: its wall clock is set while it runs.

use std::time::{Duration, SystemTime};

use baton::pb::{self, TaskState};
use rustix::process::Signal;

use crate::harness::{
    SOON,
    cluster::{Cluster, SETTINGS},
    default, eventually, object, pass, seconds,
    server::{FAST, Process, Server},
    spec,
    wall::Wall,
    within,
};

const MODEL: &str = "test/echo";
const HOUR: i64 = 3600;

async fn with_wall() -> (Server, Wall) {
    let mut server = Server::stopped(FAST);
    let wall = Wall::under(&mut server);
    server.restart().await;
    (server, wall)
}

/// A task that says a word every 50 ms, and has begun to.
async fn begun(server: &Server, words: usize) -> String {
    let params = prost_types::value::Kind::NumberValue(50.0);
    let params = prost_types::Struct {
        fields: [("delay_ms".to_owned(), prost_types::Value { kind: Some(params) })].into(),
    };
    let input = Some(object(&[("text", &vec!["word"; words].join(" "))]));
    let task = pb::TaskSpec { model: MODEL.into(), input, params: Some(params), ..default() };
    let task = server.api().submit(task).await.task_id;
    within("the first token", SOON, async {
        let mut stream = server.api().stream(&task, 1).await.expect("a stream");
        while let Some(event) = stream.message().await.expect("an event") {
            if let Some(pb::task_event::Body::Token(_)) = event.body {
                return;
            }
        }
        panic!("it ended without a token");
    })
    .await;
    task
}

fn agent(server: &Server) -> Process {
    server.agent("r1", server.addr, MODEL, 4)
}

#[tokio::test]
async fn a_clock_set_ahead_or_back_ends_no_lease_of_a_living_runner() {
    let (server, wall) = with_wall().await;
    let _runner = agent(&server);
    let api = server.api();
    for ahead in [HOUR, -2 * HOUR, 0] {
        // Longer than the lease of 2 s.
        let task = begun(&server, 60).await;
        wall.set_ahead(ahead);
        let end = api.wait_for(&task, &[TaskState::Succeeded], SOON).await;
        assert_eq!((end.attempt, end.lost_attempts), (1, 0), "{ahead} s ahead");
        let times = [end.create_time, end.start_time, end.end_time];
        let times = times.map(|time| time.map(|time| (time.seconds, time.nanos)));
        assert!(times.is_sorted(), "a time went backwards: {end:?}");
    }
}

#[tokio::test]
async fn a_clock_set_back_does_not_prolong_the_lease_of_a_silent_runner() {
    let (server, wall) = with_wall().await;
    let runner = agent(&server);
    let task = begun(&server, 80).await;
    runner.signal(Signal::STOP);
    wall.set_ahead(-HOUR);
    // The lease of 2 s, the second that P3 allows, and what a busy machine takes.
    let bound = Duration::from_secs(8);
    let state = server.api().wait_for(&task, &[TaskState::Queued], bound).await;
    assert_eq!((state.attempt, state.lost_attempts), (1, 1));
    runner.signal(Signal::CONT);
    let end = server.api().wait_for(&task, &[TaskState::Succeeded], SOON).await;
    assert_eq!(end.attempt, 2, "it went on under a new lease");
}

#[tokio::test]
async fn a_deadline_passes_when_the_clock_passes_it_also_while_the_server_is_down() {
    let (mut server, wall) = with_wall().await;
    let api = server.api();
    let in_an_hour = SystemTime::now() + Duration::from_hours(1);
    let late = || pb::TaskSpec { deadline: Some(in_an_hour.into()), ..spec(MODEL) };
    let task = api.submit(late()).await.task_id;
    assert_eq!(api.get(&task).await.state(), TaskState::Queued);
    wall.set_ahead(HOUR + 1);
    api.wait_for(&task, &[TaskState::Expired], Duration::from_secs(3)).await;

    wall.set_ahead(0);
    let task = api.submit(late()).await.task_id;
    server.kill();
    wall.set_ahead(HOUR + 1);
    server.restart().await;
    let end = server.api().wait_for(&task, &[TaskState::Expired], Duration::from_secs(3)).await;
    assert_eq!(end.attempt, 0);
}

/// Servers that share a database have its time: a clock that is wrong at one of them, which may be
/// the one that looks for what is overdue, expires nothing, there or elsewhere.
#[tokio::test]
#[ignore = "needs the server that BATON_TEST_POSTGRES names"]
async fn the_clock_of_one_server_of_several_expires_no_task() {
    let mut cluster = Cluster::start(0).await;
    let mut server = Server::stopped(SETTINGS);
    server.set_env("BATON_DATABASE_URL", &cluster.url);
    let wall = Wall::under(&mut server);
    server.restart().await;
    cluster.servers.push(server);
    cluster.add(None).await;
    let limited = || pb::TaskSpec { start_timeout: Some(seconds(4.0)), ..spec("test/nobody") };
    for ahead in [30, -30] {
        let tasks = [0, 1].map(|at| (cluster.api(at), limited()));
        let mut waiting = Vec::new();
        for (api, spec) in tasks {
            // On a busy machine storage may seem to fail while a server starts.
            let task = eventually("a submit is accepted", SOON, || async {
                Some(api.try_submit(spec.clone()).await.ok()?.task_id)
            });
            let task = task.await;
            waiting.push((api, task));
        }
        wall.set_ahead(ahead);
        pass(Duration::from_secs(3)).await;
        for (api, task) in &waiting {
            assert_eq!(api.get(task).await.state(), TaskState::Queued, "{ahead} s ahead");
        }
        for (api, task) in &waiting {
            api.wait_for(task, &[TaskState::Expired], Duration::from_secs(3)).await;
        }
    }
}

#[tokio::test]
async fn a_clock_set_back_does_not_prolong_the_backoff_of_a_retry() {
    let (server, wall) = with_wall().await;
    let _runner = agent(&server);
    let api = server.api();
    let number = |n| prost_types::Value { kind: Some(prost_types::value::Kind::NumberValue(n)) };
    let fail = prost_types::Struct { fields: [("times".to_owned(), number(1.0))].into() };
    let fail = prost_types::Value { kind: Some(prost_types::value::Kind::StructValue(fail)) };
    let params = prost_types::Struct { fields: [("fail".to_owned(), fail)].into() };
    let retry = pb::RetryPolicy {
        max_attempts: 2,
        initial_backoff: Some(seconds(3.0)),
        max_backoff: Some(seconds(3.0)),
        ..default()
    };
    let task = pb::TaskSpec { params: Some(params), retry: Some(retry), ..spec(MODEL) };
    let task = api.submit(task).await.task_id;
    eventually("a first attempt that failed", SOON, || async {
        let task = api.get(&task).await;
        (task.state() == TaskState::Queued && task.attempt == 1).then_some(())
    })
    .await;
    wall.set_ahead(-HOUR);
    let end = api.wait_for(&task, &[TaskState::Succeeded, TaskState::Failed], SOON).await;
    assert_eq!((end.state(), end.attempt), (TaskState::Succeeded, 2), "{:?}", end.error);
}
