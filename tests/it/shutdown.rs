//! SIGTERM, with everything open.

use std::time::{Duration, Instant};

use baton::pb::{self, TaskState, connect_request};
use rustix::process::Signal;
use tokio::net::TcpStream;
use tonic::Code;

use crate::harness::{
    SOON, checks, default,
    disk::Disk,
    eventually, pass,
    runner::{self, Runner},
    seconds,
    server::{FAST, Server, metric},
    spec, within,
};

const MODEL: &str = "test/echo";

/// P22: with open streams and a runner at work the process exits within its grace, streams end
/// with UNAVAILABLE, and nothing acknowledged is lost.
#[tokio::test]
async fn sigterm_ends_streams_keeps_work_and_exits_within_the_grace() {
    let mut server = Server::start(FAST).await;
    server.set_env("BATON_SERVER_SHUTDOWN_GRACE", "5s");
    let api = server.api();
    let mut runner = Runner::connect(&api, "r1", &[MODEL], 1).await;
    let running = api.submit_to(MODEL).await;
    let waiting = api.submit_to("test/other").await;
    let lease = runner.assigned().await;
    runner.output(&lease, 1, runner::tokens(0, 4), None).await;
    runner.acked(&lease, 4).await;
    let mut stream = api.stream(&running, 1).await.expect("a stream");
    let mut watch = api.tasks().watch_tasks(pb::WatchTasksRequest::default()).await.unwrap();

    let started = Instant::now();
    server.process().signal(Signal::TERM);
    let end = within("the stream's end", SOON, async {
        loop {
            match stream.message().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("the stream of an open task ended as if complete"),
                Err(status) => return status,
            }
        }
    })
    .await;
    assert_eq!(end.code(), Code::Unavailable, "{end:?}");
    let end = within("the watch's end", SOON, watch.get_mut().message()).await;
    assert_eq!(end.expect_err("an end").code(), Code::Unavailable);
    let status = server.process().exited(Duration::from_secs(32)).await;
    assert!(status.success(), "{status}");
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());

    server.restart().await;
    let api = server.api();
    assert_eq!(api.get(&waiting).await.state(), TaskState::Queued);
    let mut runner = runner.reconnect(&api).await.expect("a welcome");
    let task = api.get(&running).await;
    assert_eq!((task.attempt, task.lost_attempts), (1, 0), "the lease did not survive");
    runner.output(&lease, 1, runner::tokens(0, 6), Some(runner::success())).await;
    runner.ack("an ack of Finish", &lease, |ack| ack.finished).await;
    let events = api.read_all(&running).await;
    checks::check_stream(&running, 0, &events);
    assert_eq!(checks::text(&events), "t0 t1 t2 t3 t4 t5 ");
}

/// P22: under a flood of submits SIGTERM loses no acknowledged one.
#[tokio::test]
async fn sigterm_under_load_keeps_every_acknowledged_submit() {
    let mut server = Server::start(&[]).await;
    let (told, mut heard) = tokio::sync::mpsc::channel(100_000);
    for _ in 0..8 {
        let (api, told) = (server.api(), told.clone());
        tokio::spawn(async move {
            loop {
                match api.try_submit(spec(MODEL)).await {
                    Ok(task) => told.send(task.task_id).await.expect("room"),
                    Err(_) => return,
                }
            }
        });
    }
    drop(told);
    let mut acknowledged = std::collections::HashSet::new();
    while acknowledged.len() < 200 {
        acknowledged.insert(within("a submit", SOON, heard.recv()).await.expect("a submit"));
    }
    server.process().signal(Signal::TERM);
    while let Some(task) = within("the last submit", SOON, heard.recv()).await {
        acknowledged.insert(task);
    }
    let status = server.process().exited(Duration::from_secs(32)).await;
    assert!(status.success(), "{status}");
    server.restart().await;
    for task in server.api().list_all().await {
        acknowledged.remove(&task.task_id);
    }
    assert!(acknowledged.is_empty(), "lost: {acknowledged:?}");
}

/// P22: a silent connection without a preface does not hold the process.
#[tokio::test]
async fn a_connection_that_never_speaks_does_not_hold_the_exit() {
    let mut server = Server::start(&[]).await;
    let silent = TcpStream::connect(server.addr).await.expect("a connection");
    let started = Instant::now();
    server.process().signal(Signal::TERM);
    let status = server.process().exited(Duration::from_secs(32)).await;
    assert!(status.success() && started.elapsed() < Duration::from_secs(31), "{status}");
    drop(silent);
}

/// P22: a second SIGTERM ends it at once.
#[tokio::test]
async fn a_second_sigterm_ends_it_at_once() {
    let mut server = Server::start(&[]).await;
    let silent = TcpStream::connect(server.addr).await.expect("a connection");
    server.process().signal(Signal::TERM);
    crate::harness::pass(Duration::from_millis(300)).await;
    if server.process().exit_code().is_none() {
        server.process().signal(Signal::TERM);
    }
    server.process().exited(Duration::from_secs(2)).await;
    drop(silent);
}

/// P22: what falls due once the drain has begun is not assigned, though a runner has a slot for
/// it: it waits for the next server.
#[tokio::test]
async fn no_work_is_assigned_once_the_drain_has_begun() {
    let mut server = Server::stopped(&[]);
    let disk = Disk::under(&mut server);
    server.restart().await;
    let api = server.api();
    // A runner that polls is there also between its calls.
    let hello = connect_request::Body::Hello(runner::hello("r1", &[MODEL], 1));
    let hello = pb::ConnectRequest { body: Some(hello), ..default() };
    let poll = pb::PollRequest { messages: vec![hello], ..default() };
    api.runners().poll(poll).await.expect("a welcome");
    let due = Instant::now() + Duration::from_secs(1);
    let delay = Some(seconds(1.0));
    let waiting = api.submit(pb::TaskSpec { delay, ..spec(MODEL) }).await.task_id;
    // A call that waits for the disk holds the drain open.
    disk.start("hold");
    let caller = api.clone();
    let held = tokio::spawn(async move { caller.try_submit(spec("test/other")).await });
    let addr = server.addr;
    eventually("the call is at work", SOON, || async move {
        (metric(addr, "baton_rpc_calls").await? >= 1).then_some(())
    })
    .await;
    server.process().signal(Signal::TERM);
    eventually("the port is closed", SOON, || async move {
        TcpStream::connect(addr).await.is_err().then_some(())
    })
    .await;
    assert!(Instant::now() < due, "too slow to tell");
    pass(due.duration_since(Instant::now()) + Duration::from_millis(500)).await;
    disk.stop("hold");
    within("the held call", SOON, held).await.expect("a call").expect("accepted");
    server.process().exited(Duration::from_secs(32)).await;
    server.restart().await;
    assert_eq!(server.api().get(&waiting).await.attempt, 0);
}
