//! The command line as a process: what goes to stdout, how it ends, and what the documents print.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use baton::pb::TaskState;
use rustix::process::Signal;
use serde_json::Value;

use crate::harness::{
    SOON, eventually,
    server::{BATON, FAST, Process, Server},
};

const MODEL: &str = "test/echo";

/// A command that knows the server and nothing of the machine.
fn command(server: &Server, args: &[&str]) -> Command {
    let mut command = Command::new(BATON);
    command.args(args).env("BATON_ADDRESS", format!("http://{}", server.addr));
    command.env_remove("BATON_OUTPUT").env_remove("BATON_API_KEY").stdin(Stdio::null());
    command
}

fn run(server: &Server, args: &[&str]) -> Output {
    command(server, args).output().expect("the command starts")
}

fn stdout(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).expect("text")
}

fn stderr(output: &Output) -> &str {
    std::str::from_utf8(&output.stderr).expect("text")
}

/// The one JSON document on stdout.
fn document(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}{}", stdout(output), stderr(output)))
}

/// Submits a task and returns its id.
fn submit(server: &Server, args: &[&str]) -> String {
    let output = run(server, &[&["submit", "-q"], args].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    stdout(&output).trim().to_owned()
}

#[tokio::test]
async fn piped_stdout_holds_the_tokens_and_nothing_else() {
    let server = Server::start(FAST).await;
    let _agent = server.agent("r1", server.addr, MODEL, 2);
    let output = run(&server, &["run", MODEL, "-i", "text=to be or"]);
    assert_eq!(stdout(&output), "to be or");
    assert!(stderr(&output).contains("succeeded, 3 tokens"), "{}", stderr(&output));
    let quiet = run(&server, &["run", MODEL, "-q", "-i", "text=to be or"]);
    assert_eq!((stdout(&quiet), stderr(&quiet)), ("to be or", ""));
    // In one file, the words begin a line of their own.
    let log = server.dir.path().join("both.log");
    let file = fs::File::create(&log).expect("a file");
    let mut both = command(&server, &["run", MODEL, "-i", "text=to be or"]);
    both.stderr(file.try_clone().expect("the same file")).stdout(file);
    assert!(both.status().expect("the command starts").success());
    let text = fs::read_to_string(&log).expect("a file");
    assert!(text.starts_with("to be or\nsucceeded"), "{text}");
}

#[tokio::test]
async fn every_end_has_the_exit_code_that_the_help_documents() {
    let server = Server::start(&[FAST, &[("BATON_QUEUE_MAX_PER_MODEL", "1")]].concat()).await;
    let _agent = server.agent("r1", server.addr, MODEL, 4);
    let waiting = submit(&server, &["nobody/full"]);
    let cancelled = submit(&server, &["nobody/cancelled"]);
    assert!(run(&server, &["task", "cancel", &cancelled]).status.success());
    let unknown = "01a1fd71-3ba7-7f7c-95be-07bf7a32443b";
    let cases: &[(i32, &[&str])] = &[
        (0, &["run", MODEL, "-i", "text=hi"]),
        (2, &["run", "noslash"]),
        (2, &["task", "delete", &cancelled]),
        (3, &["task", "get", unknown]),
        (5, &["task", "retry", &waiting]),
        (6, &["--address", "http://127.0.0.1:1", "task", "list"]),
        (7, &["submit", "nobody/full"]),
        (8, &["run", "nobody/there", "--timeout", "200ms"]),
        (20, &["run", MODEL]),
        (21, &["wait", &cancelled]),
        (22, &["run", "nobody/there", "--deadline", "200ms"]),
    ];
    for (code, args) in cases {
        let output = run(&server, args);
        assert_eq!(output.status.code(), Some(*code), "{args:?}: {}", stderr(&output));
        let said = stderr(&output);
        assert!(*code == 0 || said.starts_with("error: "), "{args:?}: {said}");
        assert!(*code == 0 || said.contains("\nhint: "), "{args:?}: {said}");
    }
}

#[tokio::test]
async fn without_a_valid_key_the_exit_code_is_that_of_access() {
    let server = Server::start(&[("BATON_AUTH_REQUIRED", "true")]).await;
    let admin = server.data_dir().join("admin.key");
    let wrong = server.dir.path().join("wrong.key");
    fs::write(&wrong, "bt_wrong_key").expect("a file");
    let with = |key: &Path, args: &[&str]| {
        command(&server, args).env("BATON_API_KEY_FILE", key).output().expect("a command")
    };
    assert_eq!(run(&server, &["task", "list"]).status.code(), Some(4));
    assert_eq!(with(&wrong, &["task", "list"]).status.code(), Some(4));
    // A key lives from its creation to its revocation.
    let made =
        with(&admin, &["-o", "json", "key", "create", "--name", "app", "--scope", "tasks.read"]);
    let made = document(&made);
    let key = server.dir.path().join("app.key");
    fs::write(&key, made["secret"].as_str().expect("a secret")).expect("a file");
    assert_eq!(with(&key, &["task", "list"]).status.code(), Some(0));
    let refused = with(&key, &["submit", "a/b"]);
    assert_eq!(refused.status.code(), Some(4), "{}", stderr(&refused));
    assert!(stderr(&refused).contains("tasks.write"), "{}", stderr(&refused));
    let id = made["key"]["key_id"].as_str().expect("an id");
    assert!(with(&admin, &["--yes", "key", "revoke", id]).status.success());
    assert_eq!(with(&key, &["task", "list"]).status.code(), Some(4));
}

#[tokio::test]
async fn json_is_one_document_however_many_things_it_is_about() {
    let server = Server::start(FAST).await;
    let _agent = server.agent("r1", server.addr, MODEL, 2);
    let tasks = [submit(&server, &["nobody/there"]), submit(&server, &["nobody/there"])];
    let [one, two] = [&*tasks[0], &*tasks[1]];
    for args in [&["task", "cancel", one, two][..], &["wait", "--for", "terminal", one, two]] {
        let found = document(&run(&server, &[&["-o", "json"], args].concat()));
        let ids = found["tasks"].as_array().expect("a list").iter().map(|task| &task["task_id"]);
        assert_eq!(ids.collect::<Vec<_>>(), [one, two], "{args:?}");
    }
    let fail = ["-p", "fail={\"reason\":\"OOPS\"}", "--max-attempts", "1"];
    for _ in 0..2 {
        run(&server, &[&["run", MODEL, "-i", "text=hi"], &fail[..]].concat());
    }
    let dead = document(&run(&server, &["-o", "json", "failures", "list"]));
    assert_eq!(dead["dead_letters"].as_array().map(Vec::len), Some(2), "{dead}");
    let retried = document(&run(&server, &["-o", "json", "--yes", "failures", "retry", "--all"]));
    assert_eq!(retried["tasks"].as_array().map(Vec::len), Some(2), "{retried}");
    let lines = run(&server, &["-o", "jsonl", "task", "list"]);
    let n_lines = stdout(&lines).lines().inspect(|line| assert!(line.starts_with('{'))).count();
    assert_eq!(n_lines, 6, "{}", stdout(&lines));
}

#[tokio::test]
async fn a_reader_that_leaves_ends_the_command_without_a_word() {
    let server = Server::start(FAST).await;
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let output = command(&server, &["completion", "bash"]).stdout(writer).output();
    let output = output.expect("the command starts");
    assert_eq!((output.status.code(), stderr(&output)), (Some(130), ""));
}

#[tokio::test]
async fn a_busy_port_names_its_holder_and_a_command_that_works() {
    let server = Server::start(FAST).await;
    let addr = server.addr.to_string();
    let output = run(&server, &["dev", "--ephemeral", "--addr", &addr]);
    assert_eq!(output.status.code(), Some(5), "{}", stderr(&output));
    assert!(stderr(&output).contains("it is held by `baton` (process "), "{}", stderr(&output));
    assert!(stderr(&output).contains("baton dev --addr 127.0.0.1:0\n"), "{}", stderr(&output));
}

#[tokio::test]
async fn tls_to_a_server_without_it_is_named_as_the_cause() {
    let server = Server::start(FAST).await;
    let address = format!("https://{}", server.addr);
    let output = run(&server, &["--address", &address, "task", "list"]);
    assert_eq!(output.status.code(), Some(6));
    let hint = format!("--address http://{}\n", server.addr);
    assert!(stderr(&output).contains(&hint), "{}", stderr(&output));
}

#[tokio::test]
async fn a_database_is_made_where_there_is_none_and_a_strange_file_is_named() {
    let server = Server::stopped(&[]);
    let place = |path: &str| server.dir.path().join(path).display().to_string();
    let new = place("deep/new");
    let made = run(&server, &["-o", "json", "db", "migrate", "--data-dir", &new]);
    assert_eq!(document(&made)["pending"], serde_json::json!([]), "{}", stderr(&made));
    let copy = place("deep/copy.db");
    assert!(run(&server, &["db", "backup", "--data-dir", &new, &copy]).status.success());
    let nowhere = run(&server, &["db", "backup", "--data-dir", &new, &place("no/copy.db")]);
    assert_eq!(nowhere.status.code(), Some(2), "{}", stderr(&nowhere));
    assert!(stderr(&nowhere).contains("hint: make it: mkdir -p "), "{}", stderr(&nowhere));
    fs::write(server.dir.path().join("deep/new/baton.db"), [7; 5_000]).expect("a file");
    for args in [&["db", "status"][..], &["db", "migrate"], &["server", "start"], &["dev"]] {
        let output = run(&server, &[args, &["--data-dir", &new]].concat());
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {said}");
        let named = said.starts_with("error: cannot ") && said.contains("deep/new/baton.db\n");
        assert!(named && said.contains("hint: move the file away"), "{args:?}: {said}");
    }
}

/// Starts a command on a task of a minute and waits for its first token.
async fn streaming(server: &Server, verb: &[&str]) -> Process {
    let slow = ["-i", "text=one two", "-p", "repeat=600", "-p", "delay_ms=50"];
    let mut command = command(server, &[verb, &[MODEL], &slow[..]].concat());
    let process = Process::spawn(&mut command, &server.dir.path().join("streaming.log"));
    eventually("the first token", SOON, || async {
        process.read_log().contains("one").then_some(())
    })
    .await;
    process
}

#[tokio::test]
async fn an_interrupt_cancels_what_run_runs_and_says_so() {
    let server = Server::start(FAST).await;
    let _agent = server.agent("r1", server.addr, MODEL, 2);
    let mut process = streaming(&server, &["run"]).await;
    process.signal(Signal::INT);
    assert_eq!(process.exited(SOON).await.code(), Some(130));
    let log = process.read_log();
    assert!(log.contains("error: interrupted; task ") && log.contains("is cancelled"), "{log}");
    let task = server.api().list_all().await.remove(0);
    server.api().wait_for(&task.task_id, &[TaskState::Cancelled], SOON).await;
}

#[tokio::test]
async fn an_interrupt_leaves_a_followed_task_alone_and_a_second_cancels_it() {
    let server = Server::start(FAST).await;
    let _agent = server.agent("r1", server.addr, MODEL, 2);
    let mut process = streaming(&server, &["submit", "--follow"]).await;
    process.signal(Signal::INT);
    eventually("it says that it detaches", SOON, || async {
        process.read_log().contains("reattach: baton follow").then_some(())
    })
    .await;
    let task = server.api().list_all().await.remove(0);
    assert_eq!(task.state(), TaskState::Running);
    process.signal(Signal::INT);
    assert_eq!(process.exited(SOON).await.code(), Some(130));
    server.api().wait_for(&task.task_id, &[TaskState::Cancelled], SOON).await;
}

#[tokio::test]
async fn every_order_to_a_runner_has_a_command_that_tells_how_it_ended() {
    let server = Server::start(FAST).await;
    let runner = server.dir.path().join("r1.log");
    let mut start = command(&server, &["runner", "start", "--engine", "echo", "--no-model"]);
    let mut process = Process::spawn(start.args(["--name", "r1"]), &runner);
    let get = || run(&server, &["runner", "get", "r1", "-o", "json"]);
    eventually("the runner is there", SOON, || async { get().status.success().then_some(()) })
        .await;
    let ok = |args: &[&str]| {
        let output = run(&server, &[&["runner"], args].concat());
        assert!(output.status.success(), "{args:?}: {}", stderr(&output));
        output
    };

    ok(&["apply", "r1", "a/b"]);
    assert_eq!(document(&get())["models"], serde_json::json!(["a/b"]));
    assert_eq!(stdout(&run(&server, &["run", "a/b", "-q", "-i", "text=hi"])), "hi");
    ok(&["tune", "r1", "delay_ms=1"]);
    assert_eq!(document(&get())["engine_params"]["delay_ms"], 1.0);
    ok(&["tune", "r1", "delay_ms=null"]);
    ok(&["reload", "r1"]);
    ok(&["pause", "r1"]);
    assert_eq!(document(&get())["state"], "STATE_PAUSED");
    ok(&["resume", "r1"]);
    assert_eq!(document(&get())["state"], "STATE_READY");
    let done = document(&ok(&["drain", "r1", "--wait", "-o", "json"]));
    assert!(done.is_object(), "{done}");
    assert_eq!(document(&get())["state"], "STATE_DRAINING");
    ok(&["resume", "r1"]);
    ok(&["apply", "r1", "a/b", "--unload"]);
    let shown = run(&server, &["runner", "get", "r1"]);
    assert!(stdout(&shown).contains("drain"), "its latest commands: {}", stdout(&shown));

    // What the engine does not know is named, and an absent runner has the exit code of absence.
    let refused = run(&server, &["runner", "tune", "r1", "warmth=3"]);
    assert_eq!(refused.status.code(), Some(2), "{}", stderr(&refused));
    assert!(stderr(&refused).contains("warmth"), "{}", stderr(&refused));
    for verb in [&["pause", "r2"][..], &["drain", "r2"], &["apply", "r2", "a/b"]] {
        let absent = run(&server, &[&["runner"], verb].concat());
        assert_eq!(absent.status.code(), Some(3), "{verb:?}: {}", stderr(&absent));
        assert!(stderr(&absent).contains("baton runner list"), "{}", stderr(&absent));
    }

    ok(&["drain", "r1", "--exit", "--wait"]);
    assert!(process.exited(SOON).await.success());
}

/// The shell blocks of a document, from a heading on to the next one like it, or all.
fn blocks(name: &str, heading: Option<&str>) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(name);
    let text = fs::read_to_string(path).expect("the document");
    let mut script = String::new();
    let (mut here, mut inside) = (heading.is_none(), false);
    for line in text.lines() {
        match line {
            _ if line.starts_with("## ") && !inside => {
                here = heading.is_none_or(|heading| &line[3..] == heading);
            }
            "```sh" => inside = true,
            "```" => inside = false,
            _ if here && inside => {
                script.push_str(line);
                script.push('\n');
            }
            _ => {}
        }
    }
    assert!(!script.is_empty(), "{name} has no such block");
    script
}

/// Runs a script in an empty directory, where `baton` is this build's and finds the server.
fn execute(server: &Server, script: &str, env: &[(&str, &str)]) -> Output {
    let bin = server.dir.path().join("bin");
    fs::create_dir_all(&bin).expect("a directory");
    let _ = std::os::unix::fs::symlink(BATON, bin.join("baton"));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path = std::iter::once(bin).chain(std::env::split_paths(&path));
    let output = Command::new("bash")
        .args(["-e", "-u", "-x", "-c", script])
        .current_dir(server.dir.path())
        .env("PATH", std::env::join_paths(path).expect("a path"))
        .env("BATON_ADDRESS", format!("http://{}", server.addr))
        .envs(env.iter().copied())
        .stdin(Stdio::null())
        .output()
        .expect("bash starts");
    assert!(output.status.success(), "{}{}", stdout(&output), stderr(&output));
    output
}

#[tokio::test]
async fn the_quick_start_of_the_readme_runs_as_printed() {
    let server = Server::start(FAST).await;
    let _echo = server.agent("r1", server.addr, "baton/echo", 2);
    let mut ngram = command(&server, &["runner", "start", "--engine", "ngram"]);
    ngram.args(["--model", "baton/ngram"]);
    let _ngram = Process::spawn(&mut ngram, &server.dir.path().join("ngram.log"));
    let script = blocks("README.md", Some("Quick start"));
    // What starts the server needs minutes, and is what the other commands talk to.
    let (first, rest) = script.split_once('\n').expect("several commands");
    assert_eq!(first, "cargo run --release -- dev --demo");
    let output = execute(&server, rest, &[]);
    assert!(stdout(&output).contains("hello"), "{}", stdout(&output));
    assert!(stdout(&output).contains("SUCCEEDED"), "{}", stdout(&output));
}

/// Starts the server that a script begins with, and runs the rest.
async fn operate(script: &str) {
    let mut server = Server::stopped(&[("BATON_AUTH_REQUIRED", "true")]);
    let place = |path: &str| server.dir.path().join(path).display().to_string();
    let (data, backup) = (place("data"), place("backup"));
    fs::create_dir(&backup).expect("a directory");
    let script = script.replace("/var/lib/baton", &data).replace("/backup", &backup);
    let (first, rest) = script.split_once('\n').expect("several commands");
    assert_eq!(first, format!("baton server start --data-dir {data}"));
    server.restart().await;
    let admin = format!("{data}/admin.key");
    let key = [("BATON_API_KEY_FILE", &*admin)];
    let mut runner = command(&server, &["runner", "start", "--engine", "echo", "--name", "gpu-1"]);
    runner.args(["--model", "meta/llama"]).envs(key);
    let runner = Process::spawn(&mut runner, &server.dir.path().join("gpu-1.log"));
    eventually("the runner is there", SOON, || async {
        let found = command(&server, &["runner", "get", "gpu-1"]).envs(key).output();
        found.is_ok_and(|output| output.status.success()).then_some(())
    })
    .await;
    let submitted = command(&server, &["submit", "-q", "meta/llama"]).envs(key).output();
    let submitted = submitted.expect("the command starts");
    let task = stdout(&submitted).trim();
    execute(&server, rest, &[("TASK", task)]);
    assert!(Path::new(&backup).join("baton.db").exists());
    drop(runner);
}

#[tokio::test]
async fn the_operations_of_the_readme_run_as_printed() {
    operate(&blocks("README.md", Some("Operations"))).await;
}

#[tokio::test]
async fn the_commands_of_the_operations_page_run_as_printed() {
    operate(&blocks("docs/operations.md", None)).await;
}
