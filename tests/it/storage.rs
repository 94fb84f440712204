//! Stable storage that is slow, full or failing.

use std::{collections::HashSet, time::Duration};

use baton::pb::task_event::Body;
use tokio_stream::StreamExt as _;
use tonic::{Code, Status};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use crate::harness::{
    SOON,
    api::Api,
    checks::{self, History},
    disk::Disk,
    eventually, pass,
    runner::{self, Runner},
    server::{FAST, Server, http_status},
    spec, within,
};

const MODEL: &str = "test/echo";

async fn with_disk() -> (Server, Disk) {
    let mut server = Server::stopped(&[]);
    let disk = Disk::under(&mut server);
    server.restart().await;
    (server, disk)
}

async fn serving(api: &Api) -> bool {
    let mut health = HealthClient::new(api.channel.clone());
    let answer = health.check(HealthCheckRequest::default()).await;
    answer.is_ok_and(|answer| answer.into_inner().status == 1)
}

async fn submits(api: &Api, count: usize) -> Vec<Result<String, Status>> {
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..count {
        let api = api.clone();
        calls.spawn(async move { api.try_submit(spec(MODEL)).await.map(|task| task.task_id) });
    }
    within("answers", 3 * SOON, calls.join_all()).await
}

/// P1: while a sync has not returned, no submit, finish or cancel is acknowledged.
#[tokio::test]
async fn nothing_is_acknowledged_before_its_sync() {
    let (server, disk) = with_disk().await;
    let api = server.api();
    let mut runner = Runner::connect(&api, "r1", &[MODEL], 1).await;
    api.submit_to(MODEL).await;
    let lease = runner.assigned().await;
    let waiting = api.submit_to("test/other").await;
    let before = disk.synced();
    assert!(before > 0, "no sync was seen");
    disk.start("hold");
    let (submitting, cancelling) = (api.clone(), api.clone());
    let submit = tokio::spawn(async move { submitting.try_submit(spec(MODEL)).await });
    let cancel = tokio::spawn(async move { cancelling.cancel(&waiting).await });
    runner.output(&lease, 1, runner::tokens(0, 3), Some(runner::success())).await;
    pass(Duration::from_millis(600)).await;
    assert!(!submit.is_finished(), "a submit was acknowledged before its sync");
    assert!(!cancel.is_finished(), "a cancel was acknowledged before its sync");
    let ack = tokio::time::timeout(
        Duration::from_millis(50),
        runner.ack("a finish", &lease, |ack| ack.finished || ack.acked_index > 0),
    );
    assert!(ack.await.is_err(), "events were acknowledged before their sync");
    disk.stop("hold");
    within("the submit", SOON, submit).await.expect("a call").expect("accepted");
    within("the cancel", SOON, cancel).await.expect("a call").expect("cancelled");
    runner.ack("an ack of Finish", &lease, |ack| ack.finished).await;
    assert!(disk.synced() > before);
}

/// P9: events are acknowledged to the runner, which may then forget them, only after their sync.
#[tokio::test]
async fn events_are_acknowledged_after_their_sync_and_not_before() {
    let (server, disk) = with_disk().await;
    let api = server.api();
    let mut runner = Runner::connect(&api, "r1", &[MODEL], 1).await;
    api.submit_to(MODEL).await;
    let lease = runner.assigned().await;
    runner.output(&lease, 1, runner::tokens(0, 3), None).await;
    runner.acked(&lease, 3).await;
    disk.start("hold");
    runner.output(&lease, 4, runner::tokens(3, 3), None).await;
    // A hole is answered at once, with everything else that there is to tell.
    runner.output(&lease, 20, runner::tokens(19, 1), None).await;
    let missing = runner.ack("EVENTS_MISSING", &lease, |ack| ack.error.is_some()).await;
    assert_eq!(missing.resend_from, 7);
    assert!(missing.acked_index <= 3, "acknowledged before their sync: {missing:?}");
    disk.stop("hold");
    runner.acked(&lease, 6).await;
}

/// P7, P8: tokens that a reader saw and that a crash took from both ends stay a gap: their
/// sequences are never given to anything else.
#[tokio::test]
async fn what_was_shown_and_is_lost_stays_a_gap() {
    let mut server = Server::stopped(FAST);
    let disk = Disk::under(&mut server);
    server.restart().await;
    let api = server.api();
    let mut first = Runner::connect(&api, "first", &[MODEL], 1).await;
    let task = api.submit_to(MODEL).await;
    let lease = first.assigned().await;
    first.output(&lease, 1, runner::tokens(0, 2), None).await;
    first.acked(&lease, 2).await;
    // Nothing more reaches the disk, and readers see it all the same.
    disk.start("hold");
    first.output(&lease, 3, runner::tokens(2, 3), None).await;
    let mut before = Vec::new();
    let mut stream = api.stream(&task, 1).await.expect("a stream");
    while before.len() < 7 {
        let event = within("seven events", SOON, stream.message()).await;
        before.push(event.expect("a stream").expect("an event"));
    }
    server.kill();
    drop(first);
    disk.stop("hold");
    server.restart().await;

    let api = server.api();
    let mut second = Runner::connect(&api, "second", &[MODEL], 1).await;
    let lease = second.assigned().await;
    second.output(&lease, 1, runner::tokens(10, 5), None).await;
    second.finish(&lease, 6, runner::success()).await;
    let whole = api.read_all(&task).await;
    checks::check_stream(&task, 0, &whole);
    let mut history = History::default();
    history.add(&task, &before);
    history.add(&task, &whole);
    let resumed = api.stream(&task, 8).await.expect("a stream");
    let resumed = within("the rest", SOON, resumed.collect::<Vec<_>>()).await;
    let resumed: Vec<_> = resumed.into_iter().map(|event| event.expect("an event")).collect();
    let lost = &resumed[0];
    assert!(lost.sequence >= 7 && matches!(lost.body, Some(Body::Gap(_))), "{lost:?}");
    assert_eq!(resumed, whole[whole.len() - resumed.len()..]);
    assert_eq!(checks::text(&whole), "t10 t11 t12 t13 t14 ");
}

/// P16: on a full disk nothing is acknowledged, readiness and health say so within a second,
/// and once there is room the same process goes on, with everything that it had acknowledged.
#[tokio::test]
async fn a_full_disk_acknowledges_nothing_and_recovers_without_a_restart() {
    let (mut server, disk) = with_disk().await;
    let api = server.api();
    let mut kept = HashSet::new();
    for answer in submits(&api, 50).await {
        kept.insert(answer.expect("accepted"));
    }
    disk.start("full");
    let mut refused = 0;
    for answer in submits(&api, 20).await {
        match answer {
            Ok(task) => {
                kept.insert(task);
            }
            Err(status) => {
                let fine = [Code::Unavailable, Code::ResourceExhausted];
                assert!(fine.contains(&status.code()), "{status:?}");
                refused += 1;
            }
        }
    }
    assert!(refused > 0, "a full disk refused nothing");
    let second = Duration::from_secs(1);
    let addr = server.addr;
    eventually("not ready", second, || async move {
        (http_status(addr, "/readyz").await != Some(200)).then_some(())
    })
    .await;
    eventually("NOT_SERVING", second, || async { (!serving(&api).await).then_some(()) }).await;
    disk.stop("full");
    eventually("ready again", Duration::from_secs(5), || async move {
        (http_status(addr, "/readyz").await == Some(200)).then_some(())
    })
    .await;
    kept.insert(api.submit_to(MODEL).await);
    assert!(server.process().exit_code().is_none(), "the process ended");
    let there: HashSet<_> = api.list_all().await.into_iter().map(|task| task.task_id).collect();
    assert_eq!(kept.difference(&there).count(), 0, "acknowledged and gone");
    server.kill();
    server.restart().await;
    let there: HashSet<_> =
        server.api().list_all().await.into_iter().map(|task| task.task_id).collect();
    assert_eq!(kept.difference(&there).count(), 0, "acknowledged and gone after a kill");
}

/// P16: after a failed sync nothing is acknowledged until the file has been opened anew, and
/// nothing acknowledged is lost.
#[tokio::test]
async fn a_failed_sync_acknowledges_nothing_and_loses_nothing() {
    let (mut server, disk) = with_disk().await;
    let api = server.api();
    let mut kept = HashSet::new();
    for answer in submits(&api, 50).await {
        kept.insert(answer.expect("accepted"));
    }
    disk.start("eio");
    for answer in submits(&api, 20).await {
        let status = answer.expect_err("acknowledged without a sync");
        let fine = [Code::Unavailable, Code::Unknown, Code::Internal, Code::Cancelled];
        assert!(fine.contains(&status.code()), "{status:?}");
    }
    let addr = server.addr;
    eventually("not ready", Duration::from_secs(1), || async move {
        (http_status(addr, "/readyz").await != Some(200)).then_some(())
    })
    .await;
    disk.stop("eio");
    if server.process().exit_code().is_some() {
        server.restart().await;
    }
    let addr = server.addr;
    eventually("ready again", SOON, || async move {
        (http_status(addr, "/readyz").await == Some(200)).then_some(())
    })
    .await;
    let api = server.api();
    kept.insert(api.submit_to(MODEL).await);
    server.kill();
    server.restart().await;
    let there: HashSet<_> =
        server.api().list_all().await.into_iter().map(|task| task.task_id).collect();
    assert_eq!(kept.difference(&there).count(), 0, "acknowledged and gone");
}

/// P16, P5: an attempt that ends while the disk is full is not lost: the runner's Finish is
/// kept by the runner and taken once there is room.
#[tokio::test]
async fn a_finish_on_a_full_disk_is_taken_once_there_is_room() {
    let (server, disk) = with_disk().await;
    let api = server.api();
    let mut runner = Runner::connect(&api, "r1", &[MODEL], 1).await;
    let task = api.submit_to(MODEL).await;
    let lease = runner.assigned().await;
    disk.start("full");
    runner.output(&lease, 1, runner::tokens(0, 3), Some(runner::success())).await;
    pass(Duration::from_millis(700)).await;
    disk.stop("full");
    let ended = tokio::time::timeout(
        Duration::from_secs(6),
        runner.ack("an ack of Finish", &lease, |ack| ack.finished),
    );
    if ended.await.is_err() {
        // The server may also ask for it again.
        runner.output(&lease, 1, runner::tokens(0, 3), Some(runner::success())).await;
        runner.ack("an ack of Finish", &lease, |ack| ack.finished).await;
    }
    let task = api.get(&task).await;
    assert_eq!((task.state(), task.attempt), (baton::pb::TaskState::Succeeded, 1));
}
