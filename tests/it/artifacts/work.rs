//! Artifacts of tasks, by command, and across crashes.

use std::{
    fs,
    process::{Command, Output, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use baton::{
    client::{Client, Progress},
    pb::{self, TaskState, task_event::Body},
};
use serde_json::Value;
use tonic::Code;

use super::{download, listed, noise, put, servers, sha256, spec};
use crate::harness::{
    SOON,
    api::reason,
    checks, default, eventually,
    local::Local,
    runner::{self, Runner},
    server::{BATON, FAST, Server},
    within,
};

pub const MODEL: &str = "test/echo";

/// A task that reads an artifact and saves what it says as another.
pub fn task(input: &str) -> pb::TaskSpec {
    let text = |text: &str| prost_types::Value {
        kind: Some(prost_types::value::Kind::StringValue(text.into())),
    };
    let reference = prost_types::Struct { fields: [("$artifact".into(), text(input))].into() };
    let reference =
        prost_types::Value { kind: Some(prost_types::value::Kind::StructValue(reference)) };
    pb::TaskSpec {
        model: MODEL.into(),
        input: Some(prost_types::Struct { fields: [("text".into(), reference)].into() }),
        params: Some(crate::harness::object(&[("save_as", "said.txt")])),
        ..default()
    }
}

#[tokio::test]
async fn a_task_reads_artifacts_and_lists_what_it_made() {
    for (server, _bucket) in servers(FAST).await {
        let api = server.api();
        let _agent = server.agent("r1", server.addr, MODEL, 2);
        let said = "to be or not to be";
        let input = put(&api, spec("input.txt"), said.as_bytes()).await.expect("an artifact");
        let id = api.submit(task(&input.artifact_id)).await.task_id;
        let ended = api.wait_for(&id, &[TaskState::Succeeded, TaskState::Failed], SOON).await;
        assert_eq!(ended.state(), TaskState::Succeeded, "{:?}", ended.error);
        let [output] = &ended.artifacts[..] else { panic!("{:?}", ended.artifacts) };
        assert_eq!((output.name.as_str(), output.r#type.as_str()), ("said.txt", "text"));
        assert_eq!((output.size_bytes, output.sha256.clone()), (18, sha256(said.as_bytes())));
        let request = pb::GetArtifactRequest { artifact_id: output.artifact_id.clone() };
        let made = api.artifacts().get_artifact(request).await.expect("an artifact").into_inner();
        assert_eq!((made.task_id.as_str(), made.attempt), (id.as_str(), 1));
        assert!(made.receipt.is_empty(), "a receipt is the runner's");
        assert_eq!(download(&api, &made).await.expect("bytes"), said.as_bytes());
        let events = api.read_all(&id).await;
        checks::check_stream(&id, 0, &events);
        let listed = events.iter().filter(|event| matches!(event.body, Some(Body::Artifact(_))));
        assert_eq!(listed.count(), 1);
        let request = pb::GetTaskResultRequest { task_id: id.clone() };
        let result = api.tasks().get_task_result(request).await.expect("a result");
        assert_eq!(result.into_inner().artifacts, ended.artifacts);
    }
}

#[tokio::test]
async fn a_task_whose_input_is_not_there_is_refused_and_what_it_reads_stays() {
    let server = Local::start(FAST).await;
    let api = server.api();
    let refused = api.try_submit(task("0192f0c1-2345-7abc-8def-0123456789ab")).await;
    assert_eq!(refused.expect_err("no").code(), Code::NotFound);
    let refused = api.try_submit(task("../etc/passwd")).await;
    assert_eq!(refused.expect_err("no").code(), Code::InvalidArgument);
    let input = put(&api, spec("a"), b"hello").await.expect("an artifact");
    let id = api.submit(task(&input.artifact_id)).await.task_id;
    let delete = pb::DeleteArtifactRequest { artifact_id: input.artifact_id.clone() };
    let refused = api.artifacts().delete_artifact(delete.clone()).await.expect_err("no");
    assert_eq!(reason(&refused), "STATE_CONFLICT");
    api.cancel(&id).await.expect("cancelled");
    let retry = pb::RetryTaskRequest { task_id: id, ..default() };
    let again = api.tasks().retry_task(retry).await.expect("a task").into_inner().task_id;
    assert!(api.artifacts().delete_artifact(delete.clone()).await.is_err());
    api.cancel(&again).await.expect("cancelled");
    api.artifacts().delete_artifact(delete).await.expect("deleted");
    server.stop().await;
}

/// P5, P14: an event lists only what its own attempt made, whole.
#[tokio::test]
async fn a_runner_lists_nothing_without_a_receipt_of_its_attempt() {
    let server = Local::start(FAST).await;
    let api = server.api();
    let mut runner = Runner::connect(&api, "r1", &[MODEL], 2).await;
    let event = |receipt: &[u8]| pb::RunnerEvent {
        body: Some(pb::runner_event::Body::ArtifactReceipt(receipt.to_vec().into())),
        ..default()
    };
    let first = api.submit_to(MODEL).await;
    let lease = runner.assigned().await;
    let token = server.api().with_key(&lease.attempt_token);
    let made = put(&token, spec("a"), b"hello").await.expect("an artifact");
    assert_eq!((made.task_id.as_str(), made.attempt), (first.as_str(), 1));
    let other = put(&api, spec("b"), b"other").await.expect("an artifact");
    let get = pb::GetArtifactRequest { artifact_id: other.artifact_id };
    let refused = token.artifacts().get_artifact(get).await.expect_err("no");
    assert_eq!(refused.code(), Code::NotFound);
    let list = token.artifacts().list_artifacts(pb::ListArtifactsRequest::default()).await;
    assert_eq!(list.expect_err("no").code(), Code::PermissionDenied);
    runner.output(&lease, 1, vec![event(&made.receipt)], Some(runner::success())).await;
    let ended = api.wait_for(&first, &[TaskState::Succeeded], SOON).await;
    assert_eq!(ended.artifacts[0].artifact_id, made.artifact_id);
    let late = put(&token, spec("c"), b"late").await.expect_err("the lease has ended");
    assert_eq!(reason(&late), "LEASE_LOST");

    let second = api.submit_to(MODEL).await;
    let lease = runner.assigned().await;
    runner.output(&lease, 1, vec![event(&made.receipt)], Some(runner::success())).await;
    let ended = api.wait_for(&second, &[TaskState::Failed], SOON).await;
    let message = ended.error.unwrap_or_default().message;
    assert!(message.contains("artifact_receipt"), "{message}");
    assert!(ended.artifacts.is_empty());
    drop(runner);
    server.stop().await;
}

/// P14: a server that dies in the middle of an upload shows nothing of it, and the upload goes on.
#[tokio::test]
async fn heavy_an_upload_outlives_the_server_and_is_not_seen_before_its_end() {
    let mut server = Server::start(&[]).await;
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("large.bin");
    let bytes = noise(150 << 20, 1);
    fs::write(&path, &bytes).expect("a file");
    let client = Client::connect(&server.addr.to_string(), None).await.expect("a client");
    let sent = Arc::new(AtomicU64::new(0));
    let heard = sent.clone();
    let from = path.clone();
    let putting = tokio::spawn(async move {
        let heard = Arc::new(move |progress: Progress| {
            if let Progress::Moving(n) = progress {
                heard.store(n, Relaxed);
            }
        });
        client.put_file(&from, spec("large.bin"), heard).await
    });
    for threshold in [50_u64 << 20, 100 << 20] {
        eventually("bytes on their way", 3 * SOON, || async {
            (sent.load(Relaxed) > threshold || putting.is_finished()).then_some(())
        })
        .await;
        server.kill();
        server.restart().await;
        assert!(listed(&server.api()).await.is_empty() || putting.is_finished());
    }
    let made = within("the upload", 6 * SOON, putting).await.expect("no panic");
    let made = made.expect("an artifact");
    assert_eq!((made.size_bytes, made.sha256.clone()), (bytes.len() as u64, sha256(&bytes)));
    let client = Client::connect(&server.addr.to_string(), None).await.expect("a client");
    let back = dir.path().join("back.bin");
    let getting = client.get_file(&made, &back, Arc::new(|_| {}));
    within("the download", 6 * SOON, getting).await.expect("the file");
    assert_eq!(sha256(&fs::read(&back).expect("a file")), made.sha256);
    let uploads = server.data_dir().join("artifacts/uploads");
    assert_eq!(fs::read_dir(uploads).expect("a directory").count(), 0);
}

fn run(server: &Server, args: &[&str]) -> Output {
    let mut command = Command::new(BATON);
    command.args(args).env("BATON_ADDRESS", format!("http://{}", server.addr));
    command.env_remove("BATON_OUTPUT").env_remove("BATON_API_KEY").stdin(Stdio::null());
    command.output().expect("the command starts")
}

fn text(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).expect("text").trim().to_owned()
}

fn document(output: &Output) -> Value {
    serde_json::from_str(&text(output)).expect("JSON")
}

// The bucket is served while commands are waited for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_are_put_got_verified_shared_and_deleted_by_command() {
    for (server, _bucket) in servers(&[]).await {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("photo.png");
        let bytes = noise(2_500_000, 1);
        fs::write(&path, &bytes).expect("a file");
        let file = path.display().to_string();
        let made = document(&run(&server, &["artifact", "put", &file, "-o", "json"]));
        let id = made["artifact_id"].as_str().expect("an id").to_owned();
        assert_eq!((&made["mime_type"], &made["type"]), (&"image/png".into(), &"image".into()));
        // The same file again is the same bytes, and need not be sent.
        let again = text(&run(&server, &["artifact", "put", &file]));
        assert_ne!(again, id);
        let there = run(&server, &["artifact", "get", &id, &file]);
        assert_eq!(there.status.code(), Some(5), "a file is not replaced unasked");
        let back = dir.path().join("back.png");
        let to = back.display().to_string();
        assert_eq!(text(&run(&server, &["artifact", "get", &id, &to])), to);
        assert_eq!(fs::read(&back).expect("a file"), bytes);
        // What an interrupted download left is gone on with.
        let partial = dir.path().join(format!(".half.png.{id}.part"));
        fs::write(&partial, &bytes[..1_000_000]).expect("a file");
        let half = dir.path().join("half.png").display().to_string();
        text(&run(&server, &["artifact", "get", &id, &half]));
        assert_eq!(fs::read(&half).expect("a file"), bytes);
        assert!(!partial.exists());
        fs::write(&partial, noise(1_000_000, 2)).expect("a file");
        let wrong = run(&server, &["artifact", "get", "-f", &id, &half]);
        assert_eq!(wrong.status.code(), Some(1), "other bytes were left there");
        assert_eq!(fs::read(&half).expect("a file"), bytes);
        let piped = run(&server, &["artifact", "get", &id, "-"]);
        assert_eq!(piped.stdout, bytes);
        let listed = document(&run(&server, &["artifact", "list", "-o", "json"]));
        assert_eq!(listed["artifacts"].as_array().map(Vec::len), Some(2));
        let verified = document(&run(&server, &["artifact", "verify", &id, "-o", "json"]));
        assert_eq!(verified["intact"], true);
        let link = text(&run(&server, &["artifact", "share", &id, "--ttl", "5m"]));
        let got = reqwest::get(&link).await.expect("an answer").bytes().await.expect("bytes");
        assert_eq!(got, bytes);
        text(&run(&server, &["artifact", "delete", "--yes", &id, &again]));
        let missing = run(&server, &["artifact", "get", &id, &to]);
        assert_eq!(missing.status.code(), Some(3));
        let collected = document(&run(&server, &["artifact", "gc", "-o", "json"]));
        assert!(collected["files"].is_null(), "what was referred to just now stays a while");
    }
}

#[tokio::test]
async fn a_bucket_that_cannot_be_used_keeps_the_server_from_starting() {
    let bucket = crate::harness::bucket::Bucket::start().await;
    let mut server = Server::stopped(&[]);
    for (name, value) in bucket.env() {
        server.set_env(&name, &value);
    }
    server.set_env("BATON_ARTIFACTS_STORE", "s3://no-such-bucket/x");
    server.spawn();
    let status = server.process().exited(6 * SOON).await;
    assert!(!status.success());
    let log = server.process().read_log();
    assert!(log.contains("no-such-bucket") && log.contains("artifacts.store"), "{log}");
    server.kill();
}
