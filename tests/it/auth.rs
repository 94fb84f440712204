//! Who may do what: namespaces that do not see each other, credentials that end, and bytes that
//! no sound client sends.

use std::time::Duration;

use baton::pb::{self, Scope};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tonic::{Code, Status};

use crate::harness::{
    SOON,
    api::{Api, reason},
    default, eventually,
    local::Local,
    object,
    runner::{self, Runner},
    spec, within,
};

const MODEL: &str = "test/echo";
const AUTH: &[(&str, &str)] = &[("BATON_AUTH_REQUIRED", "true")];

/// The operator, by the key that the first start wrote.
pub fn admin(server: &Local) -> Api {
    let path = server.app().first_key.as_ref().expect("a first key");
    let key = std::fs::read_to_string(path).expect("the key's file");
    server.api().with_key(key.trim())
}

/// A new key of `namespace`: its id and its secret.
pub async fn key(admin: &Api, namespace: &str, scopes: &[Scope]) -> (String, String) {
    let request = pb::CreateKeyRequest {
        display_name: format!("{namespace} key"),
        scopes: scopes.iter().map(|scope| *scope as i32).collect(),
        namespace: namespace.into(),
        ..default()
    };
    let answer = admin.keys().create_key(request).await.expect("a key").into_inner();
    (answer.key.expect("a key").key_id, answer.secret)
}

/// Every call about one task, as (method, outcome).
async fn about(api: &Api, task: &str) -> Vec<(&'static str, Option<Status>)> {
    let id = || task.to_owned();
    let mut calls = api.tasks();
    let mut outcomes = vec![
        ("GetTask", calls.get_task(pb::GetTaskRequest { task_id: id() }).await.err()),
        ("GetTaskResult", {
            calls.get_task_result(pb::GetTaskResultRequest { task_id: id() }).await.err()
        }),
        ("CancelTask", {
            let request = pb::CancelTaskRequest { task_id: id(), ..default() };
            calls.cancel_task(request).await.err()
        }),
        ("RetryTask", {
            let request = pb::RetryTaskRequest { task_id: id(), ..default() };
            calls.retry_task(request).await.err()
        }),
        ("ExplainTask", calls.explain_task(pb::ExplainTaskRequest { task_id: id() }).await.err()),
        ("DeleteTask", calls.delete_task(pb::DeleteTaskRequest { task_id: id() }).await.err()),
        ("ListTaskEvents", {
            let request = pb::ListTaskEventsRequest { task_id: id(), ..default() };
            calls.list_task_events(request).await.err()
        }),
        ("IssueToken", {
            // A token may be had for any id; it opens only what its maker may see.
            let request = pb::IssueTokenRequest { task_id: id(), ..default() };
            match api.keys().issue_token(request).await {
                Ok(answer) => api.with_key(&answer.into_inner().token).try_get(task).await.err(),
                Err(status) => Some(status),
            }
        }),
    ];
    let stream = match api.stream(task, 1).await {
        Ok(mut stream) => within("the stream's answer", SOON, stream.message()).await.err(),
        Err(status) => Some(status),
    };
    outcomes.push(("StreamTask", stream));
    let own = api.submit_to("test/own").await;
    let request = pb::StreamTaskRequest {
        task_id: own,
        others: vec![pb::stream_task_request::Position { task_id: id(), after_sequence: 0 }],
        ..default()
    };
    let stream = match calls.stream_task(request).await {
        Ok(stream) => {
            let mut stream = stream.into_inner();
            let refusal = within("a refusal", SOON, async {
                loop {
                    match stream.message().await {
                        Ok(Some(event)) => assert_ne!(event.task_id, task, "seen"),
                        Ok(None) => return None,
                        Err(status) => return Some(status),
                    }
                }
            });
            refusal.await
        }
        Err(status) => Some(status),
    };
    outcomes.push(("StreamTask.others", stream));
    outcomes
}

/// P20: another namespace's task answers every call like one that does not exist.
#[tokio::test]
async fn another_namespaces_task_is_like_one_that_does_not_exist() {
    let server = Local::start(AUTH).await;
    let admin = admin(&server);
    let (_, ours) = key(&admin, "ours", &[Scope::Admin]).await;
    let (_, theirs) = key(&admin, "theirs", &[Scope::Admin]).await;
    let (ours, theirs) = (server.api().with_key(&ours), server.api().with_key(&theirs));
    let task = ours.submit_to(MODEL).await;
    let absent = "018f0000-0000-7000-8000-000000000000";
    let foreign = about(&theirs, &task).await;
    let missing = about(&theirs, absent).await;
    for ((method, foreign), (_, missing)) in foreign.into_iter().zip(missing) {
        let foreign = foreign.unwrap_or_else(|| panic!("{method} answered about another's task"));
        let missing = missing.unwrap_or_else(|| panic!("{method} answered about nothing"));
        assert_eq!(foreign.code(), Code::NotFound, "{method}: {foreign:?}");
        assert_eq!(foreign.code(), missing.code(), "{method}");
        let plain = |status: &Status, id: &str| status.message().replace(id, "ID");
        assert_eq!(plain(&foreign, &task), plain(&missing, absent), "{method}");
    }
    assert!(theirs.list_all().await.iter().all(|task| task.spec.as_ref().unwrap().model != MODEL));
    assert_eq!(ours.get(&task).await.state(), pb::TaskState::Queued, "steered by another");
    server.stop().await;
}

/// P20: a watch of all tasks shows one's own only.
#[tokio::test]
async fn a_watch_shows_only_the_own_namespace() {
    let server = Local::start(AUTH).await;
    let admin = admin(&server);
    let (_, ours) = key(&admin, "ours", &[Scope::Admin]).await;
    let (_, theirs) = key(&admin, "theirs", &[Scope::Admin]).await;
    let (ours, theirs) = (server.api().with_key(&ours), server.api().with_key(&theirs));
    let mut watch = theirs.tasks().watch_tasks(pb::WatchTasksRequest::default()).await.unwrap();
    for _ in 0..5 {
        ours.submit_to(MODEL).await;
    }
    let own = theirs.submit_to(MODEL).await;
    let first = within("an event", SOON, watch.get_mut().message()).await.unwrap().unwrap();
    assert_eq!(first.task_id, own);
    server.stop().await;
}

/// P20: a runner of one namespace never gets another's task.
#[tokio::test]
async fn a_runner_of_a_namespace_serves_only_its_own() {
    let server = Local::start(AUTH).await;
    let admin = admin(&server);
    let (_, ours) = key(&admin, "ours", &[Scope::TasksWrite, Scope::TasksRead]).await;
    let (_, theirs) = key(&admin, "theirs", &[Scope::Admin, Scope::Runner]).await;
    let (ours, theirs) = (server.api().with_key(&ours), server.api().with_key(&theirs));
    let mut runner = Runner::connect(&theirs, "r1", &["*"], 4).await;
    ours.submit_to(MODEL).await;
    let own = theirs.submit_to(MODEL).await;
    assert_eq!(runner.assigned().await.task_id, own);
    let list = ours.runners().list_runners(pb::ListRunnersRequest::default()).await.unwrap();
    assert!(list.into_inner().runners.is_empty(), "another's runner is listed");
    server.stop().await;
}

/// Without a valid credential nothing answers, and each scope opens its own methods only.
#[tokio::test]
async fn no_credential_or_the_wrong_scope_opens_nothing() {
    let server = Local::start(AUTH).await;
    let api = server.api();
    let admin = admin(&server);
    let (_, reads) = key(&admin, "ours", &[Scope::TasksRead]).await;
    let forged = [
        "bt_x".to_owned(),
        String::from("x").repeat(5_000),
        reads[..reads.len() - 1].to_owned(),
        format!("{reads}0"),
        reads.to_uppercase(),
        "eyJhbGciOiJub25lIn0.e30.".to_owned(),
    ];
    let refused = api.try_submit(spec(MODEL)).await.expect_err("no credential");
    assert_eq!((refused.code(), &*reason(&refused)), (Code::Unauthenticated, "UNAUTHENTICATED"));
    for forged in forged {
        let api = api.with_key(&forged);
        let refused = api.try_submit(spec(MODEL)).await.expect_err("a forged key");
        let refused = (refused.code(), forged.len());
        assert_eq!(refused.0, Code::Unauthenticated, "{} characters", refused.1);
    }
    let reads = api.with_key(&reads);
    reads.list_all().await;
    let refused = reads.try_submit(spec(MODEL)).await.expect_err("the wrong scope");
    assert_eq!((refused.code(), &*reason(&refused)), (Code::PermissionDenied, "PERMISSION_DENIED"));
    let refused = Runner::hello(&reads, runner::hello("r1", &[MODEL], 1)).await;
    assert_eq!(refused.err().map(|status| status.code()), Some(Code::PermissionDenied));
    let request = pb::CreateKeyRequest { display_name: "more".into(), ..default() };
    let refused = reads.keys().create_key(request).await.expect_err("the wrong scope");
    assert_eq!(refused.code(), Code::PermissionDenied);
    server.stop().await;
}

/// A revoked key opens nothing within 5 s, open streams included.
#[tokio::test]
async fn a_revoked_key_is_shut_out_within_five_seconds() {
    let server = Local::start(AUTH).await;
    let admin = admin(&server);
    let (id, secret) = key(&admin, "ours", &[Scope::TasksRead, Scope::TasksWrite]).await;
    let api = server.api().with_key(&secret);
    let task = api.submit_to(MODEL).await;
    let mut stream = api.stream(&task, 1).await.expect("a stream");
    within("queued", SOON, stream.message()).await.expect("a stream").expect("an event");
    admin.keys().revoke_key(pb::RevokeKeyRequest { key_id: id }).await.expect("revoked");
    let five = Duration::from_secs(5);
    let end = within("the end of the stream", five, stream.message()).await;
    assert_eq!(end.expect_err("an end").code(), Code::Unauthenticated);
    let refused = api.try_get(&task).await.expect_err("revoked");
    assert_eq!(refused.code(), Code::Unauthenticated);
    server.stop().await;
}

/// P5: the token of an attempt reports for that attempt alone, and dies with the lease.
#[tokio::test]
async fn an_attempt_token_speaks_for_its_attempt_alone_and_dies_with_the_lease() {
    let server = Local::start(AUTH).await;
    let admin = admin(&server);
    let mut runner = Runner::connect(&admin, "r1", &[MODEL], 2).await;
    let (one, two) = (admin.submit_to(MODEL).await, admin.submit_to(MODEL).await);
    let lease = runner.assigned().await;
    runner.assigned().await;
    let other = if lease.task_id == one { two } else { one };
    let holder = server.api().with_key(&lease.attempt_token);
    let report = |task: &str, attempt: u32, first: u64| pb::ReportTaskEventsRequest {
        task_id: task.into(),
        attempt,
        first_index: first,
        events: runner::tokens(first - 1, 2),
        finish: None,
    };
    let mut calls = holder.runners();
    let acked = calls.report_task_events(report(&lease.task_id, lease.attempt, 1)).await;
    assert_eq!(acked.expect("its own attempt").into_inner().acked_index, 2);
    let refused = calls.report_task_events(report(&other, 1, 1)).await;
    let refused = refused.expect_err("another task");
    assert!(matches!(refused.code(), Code::NotFound | Code::PermissionDenied), "{refused:?}");
    let refused = calls.report_task_events(report(&lease.task_id, lease.attempt + 1, 3)).await;
    refused.expect_err("another attempt");
    let refused = holder.try_submit(spec(MODEL)).await.expect_err("not its business");
    assert_eq!(refused.code(), Code::PermissionDenied);
    let refused = holder.try_get(&other).await.expect_err("another task");
    assert!(matches!(refused.code(), Code::NotFound | Code::PermissionDenied), "{refused:?}");
    admin.cancel(&lease.task_id).await.expect("cancelled");
    let refused = calls.report_task_events(report(&lease.task_id, lease.attempt, 3)).await;
    assert_eq!(reason(&refused.expect_err("an ended lease")), "LEASE_LOST");
    server.stop().await;
}

/// P23: malformed fields are refused with their names, and kill nothing.
#[tokio::test]
async fn hostile_requests_are_refused_and_kill_nothing() {
    let server = Local::start(&[]).await;
    let api = server.api();
    let long = "x".repeat(100_000);
    let negative = Some(prost_types::Duration { seconds: -5, nanos: -1 });
    let absurd = Some(prost_types::Duration { seconds: i64::MAX, nanos: i32::MAX });
    let never = Some(prost_types::Timestamp { seconds: i64::MAX, nanos: -7 });
    let mut deep = prost_types::Value { kind: None };
    for _ in 0..90 {
        let values = vec![deep];
        let list = prost_types::ListValue { values };
        deep = prost_types::Value { kind: Some(prost_types::value::Kind::ListValue(list)) };
    }
    let nan = prost_types::Value { kind: Some(prost_types::value::Kind::NumberValue(f64::NAN)) };
    let input = |value: prost_types::Value| {
        Some(prost_types::Struct { fields: [("x".to_owned(), value)].into() })
    };
    let retry = |multiplier: f64| {
        Some(pb::RetryPolicy {
            multiplier,
            jitter: Some(f64::INFINITY),
            initial_backoff: absurd,
            max_attempts: u32::MAX,
            ..default()
        })
    };
    let bad = [
        pb::TaskSpec::default(),
        spec(""),
        spec("no-slash"),
        spec(&long),
        spec("a/b\0c"),
        spec("../../etc"),
        spec("a/b@"),
        pb::TaskSpec { priority: i32::MIN, ..spec(MODEL) },
        pb::TaskSpec { delay: negative, ..spec(MODEL) },
        pb::TaskSpec { execution_timeout: absurd, ..spec(MODEL) },
        pb::TaskSpec { start_timeout: negative, ..spec(MODEL) },
        pb::TaskSpec { deadline: never, ..spec(MODEL) },
        pb::TaskSpec { not_before: never, ..spec(MODEL) },
        pb::TaskSpec { retry: retry(f64::NAN), ..spec(MODEL) },
        pb::TaskSpec { retry: retry(-1.0), ..spec(MODEL) },
        pb::TaskSpec { session_id: long.clone(), ..spec(MODEL) },
        pb::TaskSpec { labels: [(long.clone(), long.clone())].into(), ..spec(MODEL) },
        pb::TaskSpec { input: input(nan), ..spec(MODEL) },
        pb::TaskSpec { input: Some(object(&[("x", &"y".repeat(2 << 20))])), ..spec(MODEL) },
    ];
    for (i, bad) in bad.into_iter().enumerate() {
        let refused = api.try_submit(bad).await.expect_err(&format!("bad spec {i}"));
        let fine = [Code::InvalidArgument, Code::ResourceExhausted];
        assert!(fine.contains(&refused.code()), "bad spec {i}: {refused:?}");
    }
    let _either = api.try_submit(pb::TaskSpec { input: input(deep), ..spec(MODEL) }).await;
    let refused = api.try_submit_as(spec(MODEL), "a\nb").await.expect_err("a bad request id");
    assert_eq!(refused.code(), Code::InvalidArgument);
    for id in ["", "x", "%00", "' OR 1=1 --", &long, "018f0000-0000-7000-8000-00000000000g"] {
        let refused = api.try_get(id).await.expect_err("no task");
        assert!(matches!(refused.code(), Code::NotFound | Code::InvalidArgument), "{refused:?}");
        let words = ["sqlx", "SELECT", ".rs:", "panicked", "/home"];
        assert!(words.iter().all(|word| !refused.message().contains(word)), "{refused:?}");
    }
    for token in ["x", "AAAA", &long] {
        let request = pb::ListTasksRequest { page_token: token.into(), ..default() };
        let refused = api.tasks().list_tasks(request).await.expect_err("no such page");
        assert!(
            matches!(refused.code(), Code::InvalidArgument | Code::ResourceExhausted),
            "{refused:?}"
        );
    }
    let mut hello = runner::hello("", &["*", "", "////"], u32::MAX);
    hello.inventory = Some(pb::Inventory {
        held: vec![pb::inventory::Held {
            task_id: "x".into(),
            attempt: u32::MAX,
            last_index: u64::MAX,
            first_kept_index: u64::MAX,
            finished: true,
        }],
    });
    assert!(Runner::hello(&api, hello).await.is_err(), "a runner without a name");
    api.submit_to(MODEL).await;
    server.stop().await;
}

/// P23, P5: a runner that talks nonsense hurts itself only.
#[tokio::test]
async fn a_runner_that_talks_nonsense_hurts_only_itself() {
    let server = Local::start(&[]).await;
    let api = server.api();
    let mut good = Runner::connect(&api, "good", &[MODEL], 1).await;
    let mut bad = Runner::connect(&api, "bad", &["test/bad"], 1).await;
    let task = api.submit_to(MODEL).await;
    let lease = good.assigned().await;
    // Another's attempt, an attempt that never was, indices out of this world, no body.
    let nothing = pb::RunnerEvent::default();
    bad.output(&lease, 1, runner::tokens(0, 1), None).await;
    bad.output(&lease, 1, vec![], Some(runner::success())).await;
    bad.refused(&lease).await;
    let ghost = pb::Assign { task_id: "not-an-id".into(), attempt: 9, ..default() };
    bad.output(&ghost, 1, vec![nothing.clone(), nothing], None).await;
    let far = pb::Assign { attempt: u32::MAX, ..lease.clone() };
    bad.output(&far, u64::MAX - 1, runner::tokens(0, 1), None).await;
    good.output(&lease, 1, runner::tokens(0, 1), None).await;
    good.finish(&lease, 2, runner::success()).await;
    assert_eq!(api.get(&task).await.state(), pb::TaskState::Succeeded);
    server.stop().await;
}

/// P23: bytes that are no HTTP/2, cut, flipped and flooded, leave the server serving.
#[tokio::test]
async fn garbage_on_the_port_leaves_the_server_serving() {
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let server = Local::start(&[]).await;
    let mut state = 1_u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for round in 0..200 {
        let Ok(mut connection) = TcpStream::connect(server.addr).await else { panic!("refused") };
        let mut bytes = if round % 2 == 0 { PREFACE.to_vec() } else { vec![] };
        if round % 4 == 0 {
            // A frame head of a random type over random bytes.
            let length = (random() % 512) as usize;
            bytes.extend([0, (length >> 8) as u8, length as u8, (random() % 12) as u8]);
            bytes.extend([random() as u8, 0, 0, 0, (random() % 5) as u8]);
            bytes.extend((0..length).map(|_| random() as u8));
        }
        bytes.extend((0..random() % 2_000).map(|_| random() as u8));
        // The server may hang up while we still write.
        let _ = connection.write_all(&bytes).await;
        let _ = connection.shutdown().await;
        if round % 8 == 0 {
            let mut answer = [0; 1024];
            let bound = Duration::from_millis(200);
            let _ = tokio::time::timeout(bound, connection.read(&mut answer)).await;
        }
    }
    let api = server.api();
    eventually("submits go on", SOON, || async { api.try_submit(spec(MODEL)).await.ok() }).await;
    assert_eq!(server.app().supervisor.panics(), 0);
    server.stop().await;
}
