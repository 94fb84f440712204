//! Several servers on one database: runners come and go between them, servers die, are cut off
//! and are replaced. All need the server that `BATON_TEST_POSTGRES` names.

use std::time::{Duration, Instant};

use baton::pb::{self, TaskState, task_event::Body};
use rustix::process::Signal;
use tonic::Code;

use crate::harness::{
    SOON,
    api::Api,
    bucket::Bucket,
    checks::{self, check_stream},
    cluster::{Balancer, Cluster, SETTINGS, TTL},
    eventually, pass,
    runner::{self, Runner},
    server::{Server, http_status},
    spec, within,
};

const MODEL: &str = "test/echo";
/// The text of so many tokens.
fn words(n_tokens: u64) -> String {
    (0..n_tokens).fold(String::new(), |text, i| text + &format!("t{i} "))
}

fn resume_from(runner: &Runner, lease: &pb::Assign) -> Option<u64> {
    let reconciliation = runner.welcome.reconciliation.as_ref()?;
    let verdict =
        reconciliation.verdicts.iter().find(|verdict| verdict.task_id == lease.task_id)?;
    verdict.keep.then_some(verdict.resume_from)
}

/// P3, P7, P9, P19: a server is killed; its runner goes on with another as if nothing had been.
#[tokio::test]
#[ignore = "needs the server that BATON_TEST_POSTGRES names"]
async fn a_runner_that_comes_back_to_another_server_goes_on_there() {
    let mut cluster = Cluster::start(2).await;
    let mut runner = Runner::connect(&cluster.api(0), "r1", &[MODEL], 1).await;
    let task = cluster.api(0).submit_to(MODEL).await;
    let lease = runner.assigned().await;
    runner.output(&lease, 1, runner::tokens(0, 5), None).await;
    runner.ack("stored tokens", &lease, |ack| ack.acked_index >= 5).await;
    runner.output(&lease, 6, runner::tokens(5, 3), None).await;
    cluster.servers[0].kill();
    let api = cluster.api(1);
    let mut runner = runner.reconnect(&api).await.expect("a welcome elsewhere");
    let from = resume_from(&runner, &lease).expect("the attempt goes on");
    assert!((6..=9).contains(&from), "resume from {from}");
    runner.output(&lease, from, runner::tokens(from - 1, 21 - from), Some(runner::success())).await;
    runner.ack("the end", &lease, |ack| ack.finished).await;
    let found = api.get(&task).await;
    assert_eq!((found.state(), found.attempt), (TaskState::Succeeded, 1));
    let events = api.read_all(&task).await;
    check_stream(&task, 0, &events);
    let text = words(20);
    assert_eq!(checks::text(&events), text);
    assert_eq!(cluster.sql("SELECT count(*) FROM tasks WHERE instance_id IS NOT NULL"), "0");
}

/// P3: the server and the runner are gone: the attempt is lost once, in time, and another follows.
#[tokio::test]
#[ignore = "needs the server that BATON_TEST_POSTGRES names"]
async fn an_attempt_whose_server_and_runner_died_is_lost_once_and_tried_again() {
    let mut cluster = Cluster::start(3).await;
    let mut runner = Runner::connect(&cluster.api(0), "r1", &[MODEL], 1).await;
    let task = cluster.api(0).submit_to(MODEL).await;
    let lease = runner.assigned().await;
    runner.output(&lease, 1, runner::tokens(0, 5), None).await;
    runner.ack("stored tokens", &lease, |ack| ack.acked_index >= 5).await;
    let died = Instant::now();
    cluster.servers[0].kill();
    drop(runner);
    let api = cluster.api(1);
    let mut other = Runner::connect(&api, "r2", &[MODEL], 1).await;
    // The lease, one second, two looks, and what a busy machine adds.
    let bound = TTL + Duration::from_secs(4);
    let is_lost = || async { (api.get(&task).await.lost_attempts > 0).then_some(()) };
    eventually("the attempt is lost", bound, is_lost).await;
    assert!(died.elapsed() < bound, "{:?}", died.elapsed());
    // Without Redis its sweep tells a server what another one put back.
    let again = other.assigned_within(Duration::from_secs(10)).await;
    assert_eq!((again.task_id.as_str(), again.attempt), (task.as_str(), 2));
    other.output(&again, 1, runner::tokens(0, 2), Some(runner::success())).await;
    other.ack("the end", &again, |ack| ack.finished).await;
    assert_eq!(cluster.sql("SELECT lost, attempt, state FROM tasks"), "1|2|SUCCEEDED");
    for server in [1, 2] {
        check_stream(&task, 0, &cluster.api(server).read_all(&task).await);
    }
}

/// P4, P5, P16: a server that is cut off from the database sends its runners away before others
/// take their attempts, and is of use again afterwards.
#[tokio::test]
#[ignore = "needs the server that BATON_TEST_POSTGRES names"]
async fn a_server_cut_off_from_the_database_lets_its_runner_go_on_elsewhere() {
    let mut cluster = Cluster::start(1).await;
    let role = cluster.sql("SELECT 'role_' || current_database()");
    cluster.sql(&format!("CREATE ROLE {role} SUPERUSER LOGIN"));
    let url = cluster.url.replacen("postgres@", &format!("{role}@"), 1);
    cluster.add(Some(&url)).await;
    let lost = cluster.servers[1].addr;
    let mut runner = Runner::connect(&cluster.api(1), "r1", &[MODEL], 1).await;
    let task = cluster.api(0).submit_to(MODEL).await;
    let lease = runner.assigned().await;
    runner.output(&lease, 1, runner::tokens(0, 4), None).await;
    runner.ack("stored tokens", &lease, |ack| ack.acked_index >= 4).await;
    cluster.sql(&format!(
        "ALTER ROLE {role} NOLOGIN;
         SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{role}'"
    ));
    within("the runner is sent away", TTL, async { while runner.next().await.is_some() {} }).await;
    let refused = Runner::hello(&cluster.api(1), runner::hello("r9", &[MODEL], 1)).await;
    assert_eq!(refused.err().expect("a refusal").code(), Code::Unavailable);
    let mut runner = runner.reconnect(&cluster.api(0)).await.expect("a welcome elsewhere");
    let from = resume_from(&runner, &lease).expect("the attempt goes on");
    assert_eq!(from, 5);
    // Longer than it takes for the other to be dead: the attempt is held, not lost.
    pass(TTL + Duration::from_secs(3)).await;
    runner.output(&lease, 5, runner::tokens(4, 4), Some(runner::success())).await;
    runner.ack("the end", &lease, |ack| ack.finished).await;
    assert_eq!(cluster.sql("SELECT lost, attempt, state FROM tasks"), "0|1|SUCCEEDED");
    cluster.sql(&format!("ALTER ROLE {role} LOGIN"));
    eventually("it is ready again", SOON, || async {
        (http_status(lost, "/readyz").await == Some(200)).then_some(())
    })
    .await;
    let api = cluster.api(1);
    let mut again = eventually("it takes runners again", SOON, || async {
        Runner::hello(&api, runner::hello("r2", &[MODEL], 1)).await.ok()
    })
    .await;
    drop(runner);
    api.submit_to(MODEL).await;
    again.assigned().await;
    check_stream(&task, 0, &api.read_all(&task).await);
}

/// P3, P4: a server that stands still past the lease time, with nobody to take over, goes on with
/// what its runners still hold and loses the rest.
#[tokio::test]
#[ignore = "needs the server that BATON_TEST_POSTGRES names"]
async fn a_server_that_stood_still_past_the_lease_time_leaves_nothing_behind() {
    let mut cluster = Cluster::start(1).await;
    let api = cluster.api(0);
    let mut kept = Runner::connect(&api, "kept", &[MODEL], 1).await;
    let first = api.submit_to(MODEL).await;
    let lease = kept.assigned().await;
    let mut gone = Runner::connect(&api, "gone", &[MODEL], 1).await;
    let second = api.submit_to(MODEL).await;
    gone.assigned().await;
    cluster.servers[0].process().signal(Signal::STOP);
    drop(gone);
    pass(TTL + Duration::from_secs(2)).await;
    cluster.servers[0].process().signal(Signal::CONT);
    let mut kept = kept.reconnect(&api).await.expect("a welcome");
    let from = resume_from(&kept, &lease).expect("the attempt goes on");
    kept.output(&lease, from, runner::tokens(from - 1, 3), Some(runner::success())).await;
    kept.ack("the end", &lease, |ack| ack.finished).await;
    let mut other = Runner::connect(&api, "other", &[MODEL], 1).await;
    let again = other.assigned_within(TTL * 3).await;
    assert_eq!((again.task_id.as_str(), again.attempt), (second.as_str(), 2));
    let found = api.get(&first).await;
    assert_eq!((found.state(), found.attempt), (TaskState::Succeeded, 1));
}

/// P10: the runner is connected to one server, and the cancel comes to another.
#[tokio::test]
#[ignore = "needs the server that BATON_TEST_POSTGRES names"]
async fn a_cancel_at_another_server_reaches_the_runner() {
    let cluster = Cluster::start(2).await;
    let mut runner = Runner::connect(&cluster.api(0), "r1", &[MODEL], 2).await;
    let task = cluster.api(0).submit_to(MODEL).await;
    let lease = runner.assigned().await;
    runner.output(&lease, 1, runner::tokens(0, 3), None).await;
    let cancelled = cluster.api(1).cancel(&task).await.expect("a cancel");
    assert_eq!(cancelled.state(), TaskState::Cancelled);
    let told = runner.cancelled(&lease).await;
    assert_eq!(told.reason, "CANCELLED");
    // What it says of the attempt from now on changes nothing.
    runner.output(&lease, 4, runner::tokens(3, 3), Some(runner::success())).await;
    runner.ack("a refusal", &lease, |ack| ack.error.is_some()).await;
    let found = cluster.api(0).get(&task).await;
    assert_eq!(found.state(), TaskState::Cancelled);
    let events = cluster.api(0).read_all(&task).await;
    assert_eq!(events, cluster.api(1).read_all(&task).await);
    assert!(matches!(events.last().and_then(|event| event.body.as_ref()), Some(Body::Ended(_))));
}

/// P7, P8, P9: readers at other servers than the runner's see every token once and in order, from
/// before the start to behind the end, also when the attempt moves to another server.
#[tokio::test]
#[ignore = "needs the server that BATON_TEST_POSTGRES names"]
async fn readers_at_other_servers_see_every_token_once_and_in_order() {
    readers_elsewhere(Cluster::start(3).await).await;
}

/// The same with a Redis, which loses everything in the middle.
#[tokio::test]
#[ignore = "needs the server that BATON_TEST_POSTGRES names"]
async fn readers_at_other_servers_see_every_token_though_redis_loses_all() {
    readers_elsewhere(Cluster::with_redis(3).await).await;
}

async fn readers_elsewhere(mut cluster: Cluster) {
    let task = cluster.api(1).submit_to(MODEL).await;
    let readers: Vec<_> = [1, 2, 2]
        .map(|server| {
            let (api, task) = (cluster.api(server), task.clone());
            tokio::spawn(async move { api.read_all(&task).await })
        })
        .into();
    let mut runner = Runner::connect(&cluster.api(0), "r1", &[MODEL], 1).await;
    let lease = runner.assigned().await;
    for piece in 0..20 {
        runner.output(&lease, piece * 10 + 1, runner::tokens(piece * 10, 10), None).await;
        if let (10, Some(redis)) = (piece, &cluster.redis) {
            redis.flush().await;
        }
        pass(Duration::from_millis(60)).await;
    }
    // Somebody who comes late and goes to yet another server.
    let (api, late) = (cluster.api(1), task.clone());
    let late = tokio::spawn(async move { api.read_all(&late).await });
    cluster.servers[0].kill();
    let mut runner = runner.reconnect(&cluster.api(2)).await.expect("a welcome elsewhere");
    let from = resume_from(&runner, &lease).expect("the attempt goes on");
    let rest = runner::tokens(from - 1, 401 - from);
    runner.output(&lease, from, rest, Some(runner::success())).await;
    runner.ack("the end", &lease, |ack| ack.finished).await;
    let text = words(400);
    let mut history = checks::History::default();
    for reader in readers.into_iter().chain([late]) {
        let events = within("a reader's end", 2 * SOON, reader).await.expect("a sound reader");
        check_stream(&task, 0, &events);
        assert_eq!(checks::text(&events), text);
        history.add(&task, &events);
    }
}

/// P10: where servers tell each other, the runner is told at once.
#[tokio::test]
#[ignore = "needs the server that BATON_TEST_POSTGRES names"]
async fn a_cancel_at_another_server_reaches_the_runner_at_once_through_redis() {
    let cluster = Cluster::with_redis(2).await;
    let mut runner = Runner::connect(&cluster.api(0), "r1", &[MODEL], 2).await;
    let task = cluster.api(1).submit_to(MODEL).await;
    let lease = runner.assigned().await;
    cluster.api(1).cancel(&task).await.expect("a cancel");
    let acknowledged = Instant::now();
    runner.cancelled(&lease).await;
    // The sweep behind it takes two looks, a second apart.
    let took = acknowledged.elapsed();
    assert!(took < Duration::from_millis(900), "{took:?}");
}

/// Operators see runners and command them at any server.
#[tokio::test]
#[ignore = "needs the server that BATON_TEST_POSTGRES names"]
async fn a_command_at_another_server_reaches_the_runner() {
    let cluster = Cluster::start(2).await;
    let mut runner = Runner::connect(&cluster.api(0), "r1", &[MODEL], 2).await;
    let _other = Runner::connect(&cluster.api(1), "r2", &[MODEL], 2).await;
    let mut elsewhere = cluster.api(1).runners();
    eventually("both runners are listed", SOON, || {
        let mut elsewhere = elsewhere.clone();
        async move {
            let list = elsewhere.list_runners(pb::ListRunnersRequest::default()).await.ok()?;
            let names: Vec<_> =
                list.into_inner().runners.into_iter().map(|runner| runner.runner_id).collect();
            (names == ["r1", "r2"]).then_some(())
        }
    })
    .await;
    let request = pb::PauseRunnerRequest { runner_id: "r1".into(), ..Default::default() };
    let mut caller = elsewhere.clone();
    let paused = tokio::spawn(async move { caller.pause_runner(request).await });
    let command = runner
        .wait("a command", SOON, |body| match body {
            pb::connect_response::Body::Command(command) => Some(command.command_id.clone()),
            _ => None,
        })
        .await;
    let done = pb::CommandDone { command_id: command, ..Default::default() };
    runner.send(pb::connect_request::Body::CommandDone(done)).await;
    let seen = within("an answer", SOON, paused).await.expect("a sound call");
    let seen = seen.expect("a paused runner").into_inner();
    assert_eq!((seen.runner_id.as_str(), seen.state()), ("r1", pb::runner::State::Paused));
    // What the holder refuses is refused with the same words.
    let tune = pb::TuneRunnerRequest {
        runner_id: "r1".into(),
        params: Some(crate::harness::object(&[("a", "b")])),
        ..Default::default()
    };
    let near = cluster.api(0).runners().tune_runner(tune.clone()).await.unwrap_err();
    let far = elsewhere.tune_runner(tune).await.unwrap_err();
    assert_eq!((near.code(), near.message()), (far.code(), far.message()));
    assert_eq!(crate::harness::api::reason(&near), crate::harness::api::reason(&far));
    let nobody = pb::PauseRunnerRequest { runner_id: "r9".into(), ..Default::default() };
    assert_eq!(elsewhere.pause_runner(nobody).await.unwrap_err().code(), Code::NotFound);
}

/// P12: a deadline holds though the server that accepted the task is gone.
#[tokio::test]
#[ignore = "needs the server that BATON_TEST_POSTGRES names"]
async fn a_deadline_holds_though_its_server_died() {
    let mut cluster = Cluster::start(2).await;
    let deadline = std::time::SystemTime::now() + Duration::from_secs(3);
    let spec = pb::TaskSpec { deadline: Some(deadline.into()), ..spec(MODEL) };
    let task = cluster.api(0).submit(spec).await.task_id;
    cluster.servers[0].kill();
    let api = cluster.api(1);
    let ended = eventually("the task expires", 2 * SOON, || async {
        let task = api.try_get(&task).await.ok()?;
        checks::is_terminal(task.state()).then_some(task)
    })
    .await;
    assert_eq!(ended.state(), TaskState::Expired);
}

/// P21: a newer version has moved the schema while older servers run: they serve on, tasks and
/// streams that were under way included; none is started anew on it, and says why.
#[tokio::test]
#[ignore = "needs the server that BATON_TEST_POSTGRES names"]
async fn an_older_server_serves_on_beside_a_newer_schema_and_is_not_started_on_it() {
    let mut cluster = Cluster::with_redis(2).await;
    let agents: Vec<_> = (0..2)
        .map(|i| {
            let server = &cluster.servers[i];
            server.agent(&format!("agent-{i}"), server.addr, MODEL, 4)
        })
        .collect();
    let mut before = Vec::new();
    for i in 0..4 {
        before.push(cluster.api(i % 2).submit(crate::failover::echo(40, 20.0)).await.task_id);
    }
    let api = cluster.api(0);
    for task in &before {
        api.wait_for(task, &[TaskState::Running], SOON).await;
    }
    cluster.sql(
        "ALTER TABLE tasks ADD COLUMN hue TEXT; ALTER TABLE task_events ADD COLUMN hue TEXT;
         ALTER TABLE segments ADD COLUMN hue TEXT; ALTER TABLE instances ADD COLUMN hue TEXT;
         CREATE TABLE hues (id TEXT PRIMARY KEY);
         INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time)
         VALUES (9999, 'hues', true, '', 1)",
    );
    let mut after = Vec::new();
    for i in 0..8 {
        after.push(cluster.api(i % 2).submit(crate::failover::echo(10, 20.0)).await.task_id);
    }
    for task in before.iter().chain(&after) {
        let ended = api.wait_for(task, &[TaskState::Succeeded], 3 * SOON).await;
        assert_eq!(ended.attempt, 1, "{ended:?}");
        check_stream(task, 0, &cluster.api(1).read_all(task).await);
    }
    // Longer than a server goes on that cannot say that it is there.
    pass(TTL + TTL / 2).await;
    for i in 0..2 {
        let (addr, api) = (cluster.servers[i].addr, cluster.api(i));
        assert_eq!(http_status(addr, "/readyz").await, Some(200), "server {i}");
        let task = api.submit(crate::failover::echo(10, 20.0)).await.task_id;
        let ended = api.wait_for(&task, &[TaskState::Succeeded], SOON).await;
        assert_eq!(ended.attempt, 1, "{ended:?}");
    }
    let server = &mut cluster.servers[0];
    server.process().signal(Signal::TERM);
    server.process().exited(2 * SOON).await;
    server.spawn();
    let code = server.process().exited(SOON).await.code();
    let said = server.process().read_log();
    assert!(code.is_some_and(|code| code != 0), "{code:?}: {said}");
    assert!(said.contains("has migration 9999, which this binary does not know"), "{said}");
    cluster.api(1).submit_to(MODEL).await;
    drop(agents);
}

/// P21, P22: three servers on one Redis are restarted one after the other while tasks come and run
/// on real agents: no task fails, and none is run twice.
#[tokio::test]
#[ignore = "needs the server that BATON_TEST_POSTGRES names"]
async fn heavy_a_rolling_restart_fails_no_task() {
    let mut cluster = Cluster::with_redis(3).await;
    let balancer = Balancer::to(cluster.servers.iter().map(|server| server.addr).collect()).await;
    let agents: Vec<_> = (0..3)
        .map(|i| cluster.servers[i].agent(&format!("agent-{i}"), balancer.addr, MODEL, 4))
        .collect();
    let addr = balancer.addr;
    let submitting = tokio::spawn(async move {
        let mut tasks = Vec::new();
        let mut tick = tokio::time::interval(Duration::from_millis(60));
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(24) {
            tick.tick().await;
            let request = format!("rolling-{}", tasks.len());
            let task = loop {
                let api = Api::new(addr);
                let answer = api.try_submit_as(crate::failover::echo(40, 20.0), &request);
                match tokio::time::timeout(SOON, answer).await {
                    Ok(Ok(task)) => break task.task_id,
                    _ => pass(Duration::from_millis(50)).await,
                }
            };
            tasks.push(task);
        }
        tasks
    });
    for server in &mut cluster.servers {
        pass(Duration::from_secs(4)).await;
        server.process().signal(Signal::TERM);
        server.process().exited(SOON * 2).await;
        server.restart().await;
    }
    let tasks = within("the load", 6 * SOON, submitting).await.expect("a sound load");
    assert!(tasks.len() > 100, "{} tasks", tasks.len());
    let api = cluster.api(0);
    for task in &tasks {
        let ended = eventually("the task ends", 3 * SOON, || async {
            let task = api.try_get(task).await.ok()?;
            checks::is_terminal(task.state()).then_some(task)
        })
        .await;
        assert_eq!(ended.state(), TaskState::Succeeded, "{ended:?}");
    }
    let lost = cluster.sql("SELECT coalesce(sum(lost), 0), coalesce(sum(failed), 0) FROM tasks");
    assert_eq!(lost, "0|0", "attempts were lost");
    for task in tasks.iter().step_by(10) {
        check_stream(task, 0, &api.read_all(task).await);
    }
    drop(agents);
}

/// What runners made goes to the bucket that the servers share, by one of them, and by the other
/// after that one died; both read it there.
#[tokio::test]
#[ignore = "needs the server that BATON_TEST_POSTGRES names"]
async fn transcripts_move_to_the_bucket_that_servers_share() {
    let (mut cluster, bucket) = (Cluster::start(0).await, Bucket::start().await);
    for _ in 0..2 {
        let mut server = Server::stopped(SETTINGS);
        server.set_env("BATON_DATABASE_URL", &cluster.url);
        for (name, value) in bucket.env() {
            server.set_env(&name, &value);
        }
        server.restart().await;
        cluster.servers.push(server);
    }
    let mut tasks = Vec::new();
    for killed in [None, Some(0)] {
        if let Some(killed) = killed {
            // It has had all locks since it was alone.
            cluster.servers[killed].kill();
        }
        let api = cluster.api(1);
        let mut runner = Runner::connect(&api, "r1", &[MODEL], 1).await;
        tasks.push(api.submit_to(MODEL).await);
        let lease = runner.assigned().await;
        runner.output(&lease, 1, runner::tokens(0, 20), Some(runner::success())).await;
        runner.ack("the end", &lease, |ack| ack.finished).await;
        let live = api.read_all(&tasks[tasks.len() - 1]).await;
        let wanted = format!("0|{}", tasks.len());
        eventually("all transcripts are in the bucket", 6 * SOON, || async {
            let rows = "SELECT (SELECT count(*) FROM segments), (SELECT count(*) FROM transcripts)";
            (cluster.sql(rows) == wanted).then_some(())
        })
        .await;
        let reading = if killed.is_none() { 0..2 } else { 1..2 };
        for server in reading {
            let api = cluster.api(server);
            assert_eq!(api.read_all(&tasks[tasks.len() - 1]).await, live);
            for task in &tasks {
                let events = api.read_all(task).await;
                check_stream(task, 0, &events);
                assert_eq!(checks::text(&events), words(20));
            }
        }
    }
}
