//! An installation that moves, by the command line: from files to a server's database and a
//! bucket, and back.

use std::{
    fs,
    process::{Command, Output, Stdio},
};

use baton::pb::{self, TaskState};
use serde_json::Value;

use crate::{
    artifacts,
    harness::{
        SOON,
        bucket::Bucket,
        database, eventually,
        runner::Runner,
        server::{BATON, FAST, Server},
        spec,
    },
};

const MODEL: &str = "test/echo";

/// A server on files, whatever the tests run on.
fn on_files() -> Server {
    let mut server = Server::stopped(FAST);
    server.set_env("BATON_DATABASE_URL", "");
    server
}

/// A server on an empty database and an empty bucket.
async fn on_services() -> (Server, Bucket) {
    let (mut server, bucket) = on_a_bucket().await;
    let url = database::create(&database::server().expect("a server"));
    server.set_env("BATON_DATABASE_URL", &url);
    (server, bucket)
}

async fn on_a_bucket() -> (Server, Bucket) {
    let (mut server, bucket) = (on_files(), Bucket::start().await);
    for (name, value) in bucket.env() {
        server.set_env(&name, &value);
    }
    (server, bucket)
}

/// Runs a command with the variables of a server.
fn run(server: &Server, args: &[&str]) -> Output {
    let mut command = Command::new(BATON);
    command.envs(server.env()).current_dir(server.dir.path()).args(args);
    command.stdin(Stdio::null()).output().expect("a run of the binary")
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn done(output: &Output) -> Value {
    assert!(output.status.success(), "{}", said(output));
    serde_json::from_slice(&output.stdout).unwrap_or_default()
}

/// What somebody may find in an installation.
#[derive(Debug, PartialEq)]
struct Found {
    tasks: Vec<pb::Task>,
    events: Vec<Vec<pb::TaskEvent>>,
    artifacts: Vec<(pb::Artifact, Vec<u8>)>,
    keys: Vec<pb::Key>,
}

async fn find(server: &Server) -> Found {
    let api = server.api();
    let tasks = api.list_all().await;
    let mut events = Vec::new();
    for task in tasks.iter().filter(|task| task.end_time.is_some()) {
        events.push(api.read_all(&task.task_id).await);
    }
    let mut found = Vec::new();
    for artifact in artifacts::listed(&api).await {
        let bytes = artifacts::download(&api, &artifact).await.expect("bytes");
        found.push((artifact, bytes));
    }
    let keys = api.keys().list_keys(pb::ListKeysRequest::default()).await;
    let keys = keys.expect("a list").into_inner().keys;
    Found { tasks, events, artifacts: found, keys }
}

/// Does something of everything, and ends the server.
async fn fill(server: &mut Server) -> Found {
    server.restart().await;
    let api = server.api();
    let mut runner = Runner::connect(&api, "r1", &[MODEL], 8).await;
    for text in ["a\0b", "plain ä"] {
        let mut wanted = spec(MODEL);
        wanted.input = Some(crate::harness::object(&[("text", text)]));
        api.submit(wanted).await;
        runner.serve_one(20).await;
    }
    api.submit_to("test/nobody").await;
    let (small, large) = (artifacts::noise(1_000, 1), artifacts::noise(9_000_000, 2));
    artifacts::put(&api, artifacts::spec("small"), &small).await.expect("an artifact");
    artifacts::put(&api, artifacts::spec("twin"), &small).await.expect("an artifact");
    let first = pb::upload_artifact_request::Part::Spec(artifacts::announced("large", &large));
    artifacts::upload(&api, first, &large).await.expect("an artifact");
    artifacts::announce(&api, artifacts::announced("never", b"never")).await.expect("an upload");
    let key = pb::CreateKeyRequest {
        display_name: "mine".into(),
        scopes: vec![pb::Scope::TasksRead.into()],
        ..Default::default()
    };
    api.keys().create_key(key).await.expect("a key");
    let dir = server.data_dir().join("transcripts");
    eventually("an archived transcript", SOON, || async {
        let shards = fs::read_dir(&dir).ok()?;
        shards.flatten().any(|shard| shard.file_name() != "tmp").then_some(())
    })
    .await;
    let found = find(server).await;
    assert_eq!((found.tasks.len(), found.artifacts.len(), found.keys.len()), (3, 3, 1));
    server.kill();
    found
}

fn export(server: &Server) -> (String, Value) {
    let file = server.dir.path().join("all.tar").display().to_string();
    let report = done(&run(server, &["-o", "json", "db", "export", &file]));
    (file, report)
}

/// Moves, looks, and does what is left to do.
async fn arrives(from: &Server, to: &mut Server, before: &Found) {
    let (file, exported) = export(from);
    let imported = done(&run(to, &["-o", "json", "db", "import", &file]));
    for what in ["rows", "artifacts", "transcripts"] {
        assert_eq!(exported[what], imported[what], "{what}");
    }
    assert_eq!(imported["artifacts"]["files"], 2);
    assert!(imported["transcripts"]["files"].as_u64() > Some(0), "{imported}");
    to.restart().await;
    assert_eq!(&find(to).await, before);
}

async fn goes_on(server: &Server) {
    let api = server.api();
    let mut runner = Runner::connect(&api, "r2", &["test/nobody", MODEL], 8).await;
    runner.serve_one(3).await;
    api.submit_to(MODEL).await;
    runner.serve_one(3).await;
    let tasks = api.list_all().await;
    assert!(tasks.iter().all(|task| task.state() == TaskState::Succeeded), "{tasks:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_installation_moves_from_files_to_a_bucket_and_another_file() {
    let mut from = on_files();
    let before = fill(&mut from).await;
    let (mut to, _bucket) = on_a_bucket().await;
    arrives(&from, &mut to, &before).await;
    goes_on(&to).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs the server that BATON_TEST_POSTGRES names"]
async fn an_installation_moves_up_to_postgres_and_a_bucket_and_down_again() {
    let mut from = on_files();
    let before = fill(&mut from).await;
    let (mut up, _bucket) = on_services().await;
    arrives(&from, &mut up, &before).await;
    up.kill();
    let mut down = on_files();
    arrives(&up, &mut down, &before).await;
    goes_on(&down).await;
    up.restart().await;
    goes_on(&up).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_import_that_is_cut_off_leaves_nothing_and_goes_on_from_there() {
    let mut from = on_files();
    let before = fill(&mut from).await;
    let (file, _) = export(&from);
    let whole = fs::read(&file).expect("a file");
    let cut = from.dir.path().join("cut.tar").display().to_string();
    fs::write(&cut, &whole[..whole.len() - 30_000]).expect("a file");
    let (mut to, _bucket) = on_a_bucket().await;
    for args in [&["db", "import", "--dry-run", &cut][..], &["db", "import", &cut]] {
        let refused = run(&to, args);
        assert!(!refused.status.success());
        assert!(said(&refused).contains("not a whole export"), "{}", said(&refused));
    }
    // One whose digest or row was changed on its way.
    let at = whole.windows(9).position(|window| window == b"test/echo").expect("a row");
    let mut other = whole.clone();
    other[at] = b'b';
    fs::write(&cut, other).expect("a file");
    let refused = run(&to, &["db", "import", &cut]);
    assert!(said(&refused).contains("came as they were"), "{}", said(&refused));
    let report = done(&run(&to, &["-o", "json", "db", "import", &file]));
    assert_eq!(report["artifacts_kept_before"]["files"], 2, "{report}");
    assert_eq!(report["rows_before"], 0, "{report}");
    to.restart().await;
    assert_eq!(find(&to).await, before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_that_is_not_empty_is_kept_unless_told() {
    let mut from = on_files();
    let before = fill(&mut from).await;
    let (file, _) = export(&from);
    let mut to = on_files();
    to.restart().await;
    let own = to.api().submit_to("test/own").await;
    let running = run(&to, &["db", "import", "--replace", &file]);
    assert!(said(&running).contains("in use by another server"), "{}", said(&running));
    to.kill();
    let looked = done(&run(&to, &["-o", "json", "db", "import", "--dry-run", &file]));
    assert_eq!(looked["dry_run"], true);
    assert!(looked["rows_before"].as_u64() > Some(0), "{looked}");
    let refused = run(&to, &["db", "import", &file]);
    assert!(said(&refused).contains("--replace"), "{}", said(&refused));
    to.restart().await;
    to.api().get(&own).await;
    to.kill();
    done(&run(&to, &["-o", "json", "db", "import", "--replace", &file]));
    to.restart().await;
    assert_eq!(find(&to).await, before);
    assert!(to.api().try_get(&own).await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_export_is_whole_or_not_there() {
    let mut from = on_files();
    fill(&mut from).await;
    from.restart().await;
    let file = from.dir.path().join("all.tar").display().to_string();
    let refused = run(&from, &["db", "export", &file]);
    assert!(said(&refused).contains("in use by another server"), "{}", said(&refused));
    done(&run(&from, &["-o", "json", "db", "export", "--live", &file]));
    from.kill();
    let again = run(&from, &["db", "export", &file]);
    assert!(said(&again).contains("exists already"), "{}", said(&again));
    fs::remove_file(&file).expect("a file");
    // A bit flips in an artifact.
    let mut dirs = vec![from.data_dir().join("artifacts/blobs")];
    let mut flipped = false;
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).expect("a directory").flatten() {
            if entry.path().is_dir() {
                dirs.push(entry.path());
            } else if !flipped {
                let mut bytes = fs::read(entry.path()).expect("a file");
                bytes[500] ^= 1;
                fs::write(entry.path(), bytes).expect("a file");
                flipped = true;
            }
        }
    }
    let refused = run(&from, &["db", "export", &file]);
    assert!(said(&refused).contains("cannot be read"), "{}", said(&refused));
    let left: Vec<_> = fs::read_dir(from.dir.path()).expect("a directory").flatten().collect();
    assert!(left.iter().all(|entry| !entry.file_name().to_string_lossy().starts_with("all.tar")));
}
