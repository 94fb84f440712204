//! `baton doctor` names what is wrong with the parts of a server, and how it is mended.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde_json::Value;

use crate::harness::{
    bucket::Bucket,
    database,
    server::{BATON, Server},
};

/// Outcome, finding and hint of a check that a server's doctor made.
fn look(server: &Server, env: &[(&str, &str)], name: &str) -> Option<(String, String, String)> {
    let mut command = Command::new(BATON);
    command.envs(server.env()).envs(env.iter().copied()).current_dir(server.dir.path());
    command.env("BATON_ADDRESS", format!("http://{}", server.addr));
    let output = command.args(["-o", "json", "doctor"]).stdin(Stdio::null()).output();
    let output = output.expect("a run of the binary");
    let report: Value = serde_json::from_slice(&output.stdout).expect("a report");
    let checks = report["checks"].as_array().expect("checks").clone();
    let failed = checks.iter().any(|check| check["outcome"] == "failed");
    assert_eq!(output.status.success(), !failed, "{report}");
    // The worst of those that have the name.
    let found = checks.iter().filter(|check| check["check"] == name);
    let worst = found.max_by_key(|check| match check["outcome"].as_str() {
        Some("failed") => 2,
        Some("note") => 1,
        _ => 0,
    })?;
    let text = |key: &str| worst[key].as_str().unwrap_or_default().to_owned();
    Some((text("outcome"), text("found"), text("hint")))
}

fn said(found: Option<(String, String, String)>, outcome: &str, words: &[&str]) {
    let found = found.expect("the check");
    let all = format!("{} {}", found.1, found.2);
    assert_eq!(found.0, outcome, "{all}");
    for word in words {
        assert!(all.contains(word), "`{word}` is not in: {all}");
    }
}

/// What lies below a directory, but for what the server of the bucket keeps for itself.
fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).expect("a directory").flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(files(&path));
        } else if !entry.file_name().to_string_lossy().starts_with('.') {
            found.push(path);
        }
    }
    found
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_well_is_said_to_be() {
    let bucket = Bucket::start().await;
    let mut server = Server::stopped(&[]);
    for (name, value) in bucket.env() {
        server.set_env(&name, &value);
    }
    server.restart().await;
    // The tests' own Postgres does not sync, which is worth a word.
    let database = if database::server().is_some() { "note" } else { "ok" };
    assert_eq!(look(&server, &[], "database").expect("the check").0, database);
    for (name, word) in [
        ("connection", "http://"),
        ("disk", "free for"),
        ("artifacts", "may write, read and delete"),
        ("port", "by the server"),
    ] {
        said(look(&server, &[], name), "ok", &[word]);
    }
    let left = files(&bucket.dir.path().join("test-bucket"));
    assert!(left.is_empty(), "the doctor left something behind: {left:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_wrong_is_named_with_what_mends_it() {
    let mut server = Server::stopped(&[]);
    server.restart().await;
    let nowhere = "http://127.0.0.1:1";
    let bucket = [
        ("BATON_ARTIFACTS_STORE", "s3://nowhere/x"),
        ("BATON_ARTIFACTS_ENDPOINT", nowhere),
        ("AWS_ACCESS_KEY_ID", "a"),
        ("AWS_SECRET_ACCESS_KEY", "b"),
        ("AWS_MAX_ATTEMPTS", "1"),
    ];
    said(look(&server, &bucket, "artifacts"), "failed", &["s3://nowhere/x", "artifacts.endpoint"]);
    let url = [("BATON_DATABASE_URL", "postgres://u:hush@127.0.0.1:1/d")];
    said(look(&server, &url, "database"), "failed", &["postgres://u@127.0.0.1:1/d", "psql"]);
    let full = [("BATON_STORAGE_MIN_FREE", "1000000GiB")];
    said(look(&server, &full, "disk"), "failed", &["storage.min_free"]);
    let redis = [
        ("BATON_REDIS_URL", "redis://:hush@127.0.0.1:1"),
        ("BATON_DATABASE_URL", "postgres://u@127.0.0.1:1/d"),
    ];
    let (outcome, found, hint) = look(&server, &redis, "redis").expect("the check");
    assert_eq!(outcome, "failed", "{found}");
    assert!(found.contains("127.0.0.1:1") && hint.contains("BATON_REDIS_URL"), "{found} {hint}");
    assert!(!found.contains("hush"), "{found}");
    let key = server.dir.path().join("no.key").display().to_string();
    let tls = [("BATON_TLS_CERT", key.as_str()), ("BATON_TLS_KEY", &key)];
    said(look(&server, &tls, "certificate"), "failed", &["no.key", "PEM"]);
    let elsewhere = [("BATON_SERVER_ADDR", "192.0.2.1:7070"), ("BATON_AUTH_REQUIRED", "true")];
    said(look(&server, &elsewhere, "port"), "failed", &["192.0.2.1:7070", "--addr"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs the server that BATON_TEST_POSTGRES names"]
async fn a_database_that_may_lose_commits_is_said_to() {
    let mut server = Server::stopped(&[]);
    let url = database::create(&database::server().expect("a server"));
    server.set_env("BATON_DATABASE_URL", &url);
    server.restart().await;
    said(look(&server, &[], "clock"), "ok", &["database"]);
    let name = database::psql(&url, "SELECT current_database()");
    database::psql(&url, &format!("ALTER DATABASE {name} SET synchronous_commit = off"));
    let wanted = ["synchronous_commit is off", "ALTER DATABASE"];
    said(look(&server, &[], "database"), "failed", &wanted);
}
