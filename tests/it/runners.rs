//! Leases and fencing, with runners that go silent, come back late, or lose their link.

use std::time::{Duration, Instant};

use baton::pb::{self, TaskState};

use crate::harness::{
    SOON, checks, default,
    local::Local,
    proxy::Proxy,
    runner::{self, Runner},
    spec,
};

const MODEL: &str = "test/echo";
/// Leases of two seconds, in the server's own time.
const SHORT: &[(&str, &str)] = &[
    ("BATON_RUNNERS_LEASE_TTL", "2s"),
    ("BATON_RUNNERS_HEARTBEAT_INTERVAL", "500ms"),
    ("BATON_RUNNERS_SESSION_GRACE", "2s"),
];

/// P3, P4, P5: a silent runner's attempt goes to another within TTL + 1 s, under a higher
/// number, and what the first one says afterwards changes nothing.
#[tokio::test]
async fn a_silent_runner_loses_its_lease_and_its_late_words_are_void() {
    let server = Local::start(SHORT).await;
    let api = server.api();
    let mut first = Runner::connect(&api, "first", &[MODEL], 1).await;
    let task = api.submit_to(MODEL).await;
    let old = first.assigned().await;
    first.output(&old, 1, runner::tokens(0, 3), None).await;
    first.acked(&old, 3).await;
    first.set_beating(false);
    let silent = Instant::now();
    let mut second = Runner::connect(&api, "second", &[MODEL], 1).await;
    let new = second.assigned().await;
    let took = silent.elapsed();
    assert!(took < Duration::from_secs(3), "runnable after {took:?}");
    assert_eq!((new.task_id.clone(), new.attempt), (task.clone(), old.attempt + 1));

    first.output(&old, 4, runner::tokens(3, 2), None).await;
    first.refused(&old).await;
    first.output(&old, 4, vec![], Some(runner::success())).await;
    first.refused(&old).await;
    assert_eq!(api.get(&task).await.state(), TaskState::Running);
    second.output(&new, 1, runner::tokens(0, 2), None).await;
    second.finish(&new, 3, runner::success()).await;

    let end = api.get(&task).await;
    assert_eq!((end.state(), end.attempt), (TaskState::Succeeded, 2));
    assert_eq!((end.lost_attempts, end.failed_attempts), (1, 0));
    let events = api.read_all(&task).await;
    checks::check_stream(&task, 0, &events);
    assert_eq!(checks::text(&events), "t0 t1 ");
    server.stop().await;
}

/// P5: expiry raced against completion: whichever comes first, the other changes nothing.
#[tokio::test]
async fn a_completion_at_the_moment_of_expiry_counts_once() {
    let mut env = SHORT.to_vec();
    // The session outlives its leases, so that the late word is answered on its stream.
    env.push(("BATON_RUNNERS_SESSION_GRACE", "60s"));
    let server = Local::manual(&env).await;
    let api = server.api();
    let mut won = [0, 0];
    for round in 0..60_u64 {
        let name = format!("r{round}");
        let mut runner = Runner::connect(&api, &name, &[MODEL], 1).await;
        let task = api.submit_to(MODEL).await;
        let lease = runner.assigned().await;
        runner.set_beating(false);
        if round % 3 == 0 {
            runner.output(&lease, 1, vec![], Some(runner::success())).await;
        }
        server.advance(Duration::from_millis(2_500)).await;
        if round % 3 != 0 {
            runner.output(&lease, 1, vec![], Some(runner::success())).await;
        }
        let kept = server.while_time_passes(runner.verdict(&lease)).await;
        let end = api.get(&task).await;
        won[usize::from(end.state() == TaskState::Succeeded)] += 1;
        match kept {
            Some(kept) => assert_eq!(kept, end.state() == TaskState::Succeeded, "{end:?}"),
            None => assert!(runner.reconnect(&api).await.is_ok(), "the runner cannot come back"),
        }
        if !checks::is_terminal(end.state()) {
            api.cancel(&task).await.expect("cancelled");
        }
        let events = api.read_all(&task).await;
        checks::check_stream(&task, 0, &events);
        checks::check_end(&api.get(&task).await, &events);
    }
    assert!(won[0] > 0 && won[1] > 0, "no race: {won:?}");
}

/// P12: the wall clock set an hour ahead or back neither expires nor prolongs a lease.
#[tokio::test]
async fn a_wall_clock_jump_neither_expires_nor_prolongs_a_lease() {
    let server = Local::manual(SHORT).await;
    let api = server.api();
    let mut runner = Runner::connect(&api, "r1", &[MODEL], 1).await;
    let task = api.submit_to(MODEL).await;
    let lease = runner.assigned().await;
    runner.set_beating(false);
    let hour = Duration::from_hours(1);
    server.clock.set_wall(server.clock.now() + hour);
    server.advance(Duration::from_secs(1)).await;
    // The end of a lease would be committed before this is.
    api.submit_to("test/other").await;
    assert_eq!(api.get(&task).await.state(), TaskState::Running, "expired by the wall clock");
    server.clock.set_wall(server.clock.now() - 2 * hour);
    server.advance(Duration::from_millis(2_500)).await;
    let state = api.wait_for(&task, &[TaskState::Queued], SOON).await;
    assert_eq!((state.attempt, state.lost_attempts), (lease.attempt, 1), "prolonged");
}

/// P19: a restart gives a lease its whole time again, and a runner that returns within it goes on.
#[tokio::test]
async fn a_runner_that_returns_in_time_after_a_restart_keeps_its_lease() {
    // Long enough by the database's clock too, which this test does not move.
    let long = &[("BATON_RUNNERS_LEASE_TTL", "20s"), ("BATON_RUNNERS_SESSION_GRACE", "20s")];
    let server = Local::manual(long).await;
    let api = server.api();
    let mut runner = Runner::connect(&api, "r1", &[MODEL], 1).await;
    let task = api.submit_to(MODEL).await;
    let lease = runner.assigned().await;
    runner.output(&lease, 1, runner::tokens(0, 3), None).await;
    server.while_time_passes(runner.acked(&lease, 3)).await;
    let server = server.restarted(long).await;
    let api = server.api();
    server.advance(Duration::from_secs(18)).await;
    // The end of a lease would be committed before this is.
    api.submit_to("test/other").await;
    assert_eq!(api.get(&task).await.state(), TaskState::Running, "ended by the restart");
    let mut runner = runner.reconnect(&api).await.expect("a welcome");
    let verdicts = runner.welcome.reconciliation.clone().unwrap_or_default().verdicts;
    assert!(verdicts.len() == 1 && verdicts[0].keep, "{verdicts:?}");
    runner.output(&lease, 4, runner::tokens(3, 2), Some(runner::success())).await;
    server.while_time_passes(runner.ack("an ack of Finish", &lease, |ack| ack.finished)).await;
    let end = api.get(&task).await;
    assert_eq!((end.state(), end.attempt, end.lost_attempts), (TaskState::Succeeded, 1, 0));
    assert_eq!(checks::text(&api.read_all(&task).await), "t0 t1 t2 t3 t4 ");
}

/// P4: over many losses, no attempt number comes twice and each grant is higher.
#[tokio::test]
async fn each_grant_has_a_higher_attempt_number() {
    let server = Local::manual(SHORT).await;
    let api = server.api();
    let task = api.submit_to(MODEL).await;
    let mut last = 0;
    for round in 0..4 {
        let mut runner = Runner::connect(&api, &format!("r{round}"), &[MODEL], 1).await;
        let lease = runner.assigned().await;
        assert!(lease.attempt > last, "{} after {last}", lease.attempt);
        last = lease.attempt;
        runner.set_beating(false);
        server.advance(Duration::from_secs(5)).await;
        api.wait_for(&task, &[TaskState::Queued], SOON).await;
    }
    assert_eq!(api.get(&task).await.lost_attempts, 4);
}

/// P11: lost runners end in a dead letter too, by a limit of their own.
#[tokio::test]
async fn a_task_that_loses_every_runner_is_dead_lettered() {
    let server = Local::manual(SHORT).await;
    let api = server.api();
    let task = api.submit_to(MODEL).await;
    for round in 0..30 {
        let mut runner = Runner::connect(&api, &format!("r{round}"), &[MODEL], 1).await;
        runner.assigned().await;
        runner.set_beating(false);
        server.advance(Duration::from_secs(4)).await;
        let states = [TaskState::Queued, TaskState::DeadLettered];
        let state = api.wait_for(&task, &states, SOON).await;
        if state.state() == TaskState::DeadLettered {
            assert_eq!(state.failed_attempts, 0);
            assert_eq!(state.lost_attempts, state.attempt);
            return;
        }
        server.advance(Duration::from_mins(2)).await;
    }
    panic!("thirty runners lost and no end");
}

/// P9, P19: a runner that comes back in time keeps its lease, and a cut mid-token leaves no hole.
#[tokio::test]
async fn a_cut_link_within_the_lease_keeps_the_attempt_and_every_token() {
    let server = Local::start(SHORT).await;
    let link = Proxy::to(server.addr).await;
    let api = server.api();
    let far = crate::harness::api::Api::new(link.addr);
    let mut runner = Runner::connect(&far, "r1", &[MODEL], 1).await;
    let task = api.submit_to(MODEL).await;
    let lease = runner.assigned().await;
    runner.output(&lease, 1, runner::tokens(0, 4), None).await;
    runner.acked(&lease, 4).await;
    for round in 1..4_u64 {
        link.cut();
        runner = runner.reconnect(&far).await.expect("a welcome");
        assert!(runner.welcome.resumed, "the session is gone");
        let verdicts = runner.welcome.reconciliation.clone().unwrap_or_default().verdicts;
        assert!(verdicts.iter().all(|verdict| verdict.keep), "{verdicts:?}");
        // The last two of the round before once more, then two new ones.
        let first = 4 + 2 * (round - 1) - 1;
        runner.output(&lease, first, runner::tokens(first - 1, 4), None).await;
        runner.acked(&lease, first + 3).await;
    }
    runner.finish(&lease, 11, runner::success()).await;
    let events = api.read_all(&task).await;
    checks::check_stream(&task, 0, &events);
    assert_eq!(checks::text(&events), "t0 t1 t2 t3 t4 t5 t6 t7 t8 t9 ");
    assert_eq!(api.get(&task).await.attempt, 1);
    server.stop().await;
}

/// P3, P5: a half-open link costs the lease in time; after it heals the old words are void.
#[tokio::test]
async fn a_half_open_link_costs_the_lease_and_nothing_else() {
    let server = Local::start(SHORT).await;
    let link = Proxy::to(server.addr).await;
    let api = server.api();
    let far = crate::harness::api::Api::new(link.addr);
    let mut stuck = Runner::connect(&far, "stuck", &[MODEL], 1).await;
    let task = api.submit_to(MODEL).await;
    let old = stuck.assigned().await;
    link.set(|link| link.up.blocked = true);
    let blocked = Instant::now();
    stuck.output(&old, 1, runner::tokens(0, 2), Some(runner::success())).await;
    let mut other = Runner::connect(&api, "other", &[MODEL], 1).await;
    let new = other.assigned().await;
    assert!(blocked.elapsed() < Duration::from_millis(3_500), "{:?}", blocked.elapsed());
    assert_eq!(new.attempt, old.attempt + 1);
    link.heal();
    other.output(&new, 1, runner::tokens(5, 2), None).await;
    other.finish(&new, 3, runner::success()).await;
    let events = api.read_all(&task).await;
    checks::check_stream(&task, 0, &events);
    assert_eq!(checks::text(&events), "t5 t6 ");
    server.stop().await;
}

/// P9: a slow link delays its own runner and nobody else.
#[tokio::test]
async fn a_slow_link_delays_only_its_own_runner() {
    let server = Local::start(SHORT).await;
    let link = Proxy::to(server.addr).await;
    let api = server.api();
    let far = crate::harness::api::Api::new(link.addr);
    let mut slow = Runner::connect(&far, "slow", &["test/slow"], 1).await;
    let mut quick = Runner::connect(&api, "quick", &[MODEL], 1).await;
    let held_up = api.submit_to("test/slow").await;
    let lease = slow.assigned().await;
    link.set(|link| {
        link.up.bytes_per_second = 20_000;
        link.up.delay = Duration::from_millis(100);
    });
    slow.output(&lease, 1, runner::tokens(0, 2_000), None).await;
    for _ in 0..20 {
        let started = Instant::now();
        let task = api.submit_to(MODEL).await;
        quick.serve_one(3).await;
        api.wait_for(&task, &[TaskState::Succeeded], SOON).await;
        assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
        quick.credits(1).await;
    }
    slow.acked(&lease, 2_000).await;
    slow.finish(&lease, 2_001, runner::success()).await;
    let events = api.read_all(&held_up).await;
    checks::check_stream(&held_up, 0, &events);
    assert_eq!(api.get(&held_up).await.attempt, 1, "heartbeats were held up by output");
    server.stop().await;
}

/// P3: a refused assignment goes to another runner.
#[tokio::test]
async fn a_refused_assignment_goes_elsewhere() {
    let server = Local::start(&[]).await;
    let api = server.api();
    let mut first = Runner::connect(&api, "first", &[MODEL], 1).await;
    let task = api.submit(pb::TaskSpec { labels: default(), ..spec(MODEL) }).await.task_id;
    let lease = first.assigned().await;
    let refuse = pb::Refuse {
        task_id: lease.task_id.clone(),
        attempt: lease.attempt,
        reason: "not today".into(),
    };
    first.forget(&lease);
    first.send(pb::connect_request::Body::Refuse(refuse)).await;
    first.credits(0).await;
    let mut second = Runner::connect(&api, "second", &[MODEL], 1).await;
    let again = second.assigned().await;
    assert_eq!(again.attempt, 2);
    second.finish(&again, 1, runner::success()).await;
    let end = api.get(&task).await;
    assert_eq!((end.state(), end.handed_back_attempts), (TaskState::Succeeded, 1));
    server.stop().await;
}
