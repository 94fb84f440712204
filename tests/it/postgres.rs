//! What only Postgres has: a server that others share, that is restarted and that can be set up
//! wrongly. All need the server that `BATON_TEST_POSTGRES` names.

use std::process::{Command, Output};

use baton::pb::TaskState;

use crate::harness::{
    SOON, database, eventually,
    runner::{self, Runner},
    server::{BATON, FAST, Server, http_status},
    spec,
};

const MODEL: &str = "test/echo";

/// Runs a command in the server's place.
fn run(server: &Server, args: &[&str]) -> Output {
    let mut command = Command::new(BATON);
    command
        .env("BATON_STORAGE_DATA_DIR", server.data_dir())
        .env("BATON_SERVER_ADDR", "127.0.0.1:0");
    command.current_dir(server.dir.path()).args(args).output().expect("a run of the binary")
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn on_new_database() -> (Server, String) {
    let url = database::create(&database::server().expect("a server"));
    let mut server = Server::stopped(FAST);
    server.set_env("BATON_DATABASE_URL", &url);
    (server, url)
}

/// Ends all connections to a database but this one.
fn cut(url: &str) {
    database::psql(
        url,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
         WHERE datname = current_database() AND pid <> pg_backend_pid()",
    );
}

#[tokio::test]
#[ignore = "needs the server that BATON_TEST_POSTGRES names"]
async fn payloads_are_documents_that_sql_can_look_into() {
    let (mut server, url) = on_new_database();
    server.restart().await;
    server.api().submit_to(MODEL).await;
    let text = database::psql(&url, "SELECT input ->> 'text' FROM tasks");
    assert_eq!(text, "hello");
}

/// A document with U+0000 in it, which JSONB cannot hold, comes back as it went in.
#[tokio::test]
#[ignore = "needs the server that BATON_TEST_POSTGRES names"]
async fn a_document_with_a_nul_is_kept() {
    let (mut server, _url) = on_new_database();
    server.restart().await;
    let api = server.api();
    let mut wanted = spec(MODEL);
    wanted.input = Some(crate::harness::object(&[("text", "a\0b")]));
    let task = api.try_submit(wanted.clone()).await.expect("accepted").task_id;
    let found = api.get(&task).await;
    assert_eq!(found.spec.expect("a spec").input, wanted.input);
}

#[tokio::test]
#[ignore = "needs the server that BATON_TEST_POSTGRES names"]
async fn connections_that_are_cut_lose_nothing() {
    let (mut server, url) = on_new_database();
    server.restart().await;
    let api = server.api();
    let mut runner = Runner::connect(&api, "r1", &[MODEL], 1).await;
    let task = api.submit_to(MODEL).await;
    let lease = runner.assigned().await;
    cut(&url);
    runner.output(&lease, 1, runner::tokens(0, 3), Some(runner::success())).await;
    let ended = eventually("the end of the task", SOON, || async {
        let task = api.try_get(&task).await.ok()?;
        (task.state() == TaskState::Succeeded).then_some(task)
    });
    assert_eq!(ended.await.attempt, 1);
    let addr = server.addr;
    eventually("ready", SOON, || async move {
        (http_status(addr, "/readyz").await == Some(200)).then_some(())
    })
    .await;
    api.submit_to(MODEL).await;
}

#[tokio::test]
#[ignore = "needs the server that BATON_TEST_POSTGRES names"]
async fn a_server_that_may_lose_commits_is_refused() {
    let (server, url) = on_new_database();
    let name = database::psql(&url, "SELECT current_database()");
    database::psql(&url, &format!("ALTER DATABASE {name} SET synchronous_commit = off"));
    let output = run(&server, &["server", "start", "--database-url", &url]);
    assert!(!output.status.success());
    assert!(stderr(&output).contains("synchronous_commit is off"), "{}", stderr(&output));
}

#[tokio::test]
#[ignore = "needs the server that BATON_TEST_POSTGRES names"]
async fn a_wrong_url_refuses_to_start_and_shows_no_password() {
    let (server, url) = on_new_database();
    let no_database = url.replace("test_", "none_");
    for (wrong, said) in [
        ("mysql://u:hush@h/d", "must begin with postgres://"),
        ("postgres://u:hush@127.0.0.1:1/d", "cannot open postgres://u@127.0.0.1:1/d"),
        (no_database.as_str(), "does not exist"),
    ] {
        let output = run(&server, &["server", "start", "--database-url", wrong]);
        assert!(!output.status.success());
        let text = stderr(&output);
        assert!(text.contains(said) && !text.contains("hush"), "{wrong}: {text}");
    }
}

#[tokio::test]
#[ignore = "needs the server that BATON_TEST_POSTGRES names"]
async fn a_schema_without_a_version_is_adopted_and_a_strange_one_is_not() {
    let (server, url) = on_new_database();
    let db = |args: &[&str]| run(&server, &[args, &["--database-url", &url]].concat());
    assert!(db(&["db", "migrate"]).status.success());
    database::psql(
        &url,
        "INSERT INTO settings VALUES ('kept', '\\x01'); DROP TABLE _sqlx_migrations",
    );
    let looked = db(&["-o", "json", "db", "migrate", "--dry-run"]);
    let text = String::from_utf8_lossy(&looked.stdout).into_owned();
    assert!(text.contains("\"unversioned\": true"), "{text} {}", stderr(&looked));
    assert_eq!(database::psql(&url, "SELECT to_regclass('_sqlx_migrations') IS NULL"), "t");
    assert!(db(&["db", "migrate"]).status.success());
    assert_eq!(database::psql(&url, "SELECT count(*) FROM settings WHERE name = 'kept'"), "1");
    let applied = "SELECT min(version), max(version) = count(*) FROM _sqlx_migrations";
    assert_eq!(database::psql(&url, applied), "1|t");
    database::psql(&url, "DROP TABLE _sqlx_migrations; ALTER TABLE tasks DROP COLUMN seed");
    let refused = db(&["db", "migrate"]);
    assert!(stderr(&refused).contains("tasks.seed missing"), "{}", stderr(&refused));
}

#[tokio::test]
#[ignore = "needs the server that BATON_TEST_POSTGRES names"]
async fn servers_that_migrate_at_once_all_succeed() {
    let (server, url) = on_new_database();
    let server = &server;
    let url = &url;
    std::thread::scope(|scope| {
        let runs: Vec<_> = (0..4)
            .map(|_| scope.spawn(move || run(server, &["db", "migrate", "--database-url", url])))
            .collect();
        for run in runs {
            let output = run.join().expect("a run");
            assert!(output.status.success(), "{}", stderr(&output));
        }
    });
    let locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database = \
                 (SELECT oid FROM pg_database WHERE datname = current_database())";
    assert_eq!(database::psql(url, locks), "0");
}

#[tokio::test]
#[ignore = "needs the server that BATON_TEST_POSTGRES names"]
async fn a_backup_restored_elsewhere_has_everything() {
    let (mut server, url) = on_new_database();
    server.restart().await;
    let task = server.api().submit_to(MODEL).await;
    let file = server.dir.path().join("copy.dump").display().to_string();
    let backup = run(&server, &["db", "backup", "--database-url", &url, &file]);
    assert!(backup.status.success(), "{}", stderr(&backup));
    let onto_itself = run(&server, &["db", "restore", "--database-url", &url, &file]);
    assert!(stderr(&onto_itself).contains("has tables already"), "{}", stderr(&onto_itself));
    server.kill();
    let (mut other, url) = on_new_database();
    let restore = run(&other, &["db", "restore", "--database-url", &url, &file]);
    assert!(restore.status.success(), "{}", stderr(&restore));
    other.restart().await;
    let found = other.api().get(&task).await;
    assert_eq!(found.state(), TaskState::Queued);
}
