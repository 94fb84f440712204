//! A whole server in process: its start, what it refuses, a task from submit to result, its
//! end.

use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use super::App;
use crate::{
    agent,
    clock::Clock,
    config::Config,
    id::Entropy,
    pb::{
        self, key_service_client::KeyServiceClient, task_event::Body,
        task_service_client::TaskServiceClient,
    },
};

const BOUND: Duration = Duration::from_secs(20);

fn config(dir: &tempfile::TempDir) -> Config {
    let mut config = Config::default();
    config.server.addr.set_port(0);
    config.storage.data_dir = dir.path().join("data");
    config.auth.required = false;
    config
}

async fn start(config: Config) -> App {
    App::start(config, Clock::system(), Entropy::system()).await.unwrap()
}

async fn channel(app: &App) -> Channel {
    let endpoint = tonic::transport::Endpoint::new(format!("http://{}", app.addr)).unwrap();
    endpoint.connect().await.unwrap()
}

#[tokio::test]
async fn a_second_server_on_the_same_directory_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let first = start(config(&dir)).await;
    let second = App::start(config(&dir), Clock::system(), Entropy::system()).await;
    let text = second.err().unwrap().to_string();
    assert!(text.contains("in use by another server"), "{text}");
    first.shutdown().await.unwrap();
    start(config(&dir)).await.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_busy_port_is_named_with_the_way_out() {
    let dir = tempfile::tempdir().unwrap();
    let busy = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut config = config(&dir);
    config.server.addr = busy.local_addr().unwrap();
    let refused = App::start(config, Clock::system(), Entropy::system()).await;
    let text = refused.err().unwrap().to_string();
    assert!(text.contains("is in use") && text.contains("--addr"), "{text}");
}

#[tokio::test]
async fn the_data_directory_is_the_owners_alone() {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(&dir);
    config.auth.required = true;
    let data_dir = config.storage.data_dir.clone();
    let app = start(config).await;
    let key_file = app.first_key.clone().unwrap();
    for path in [&data_dir, &key_file] {
        let mode = std::fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0, "{}", path.display());
    }
    let key = std::fs::read_to_string(key_file).unwrap();
    let mut keys = KeyServiceClient::new(channel(&app).await);
    let refused = keys.list_keys(pb::ListKeysRequest::default()).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::Unauthenticated);
    let mut request = tonic::Request::new(pb::ListKeysRequest::default());
    let bearer = format!("Bearer {}", key.trim()).parse().unwrap();
    request.metadata_mut().insert("authorization", bearer);
    let listed = keys.list_keys(request).await.unwrap().into_inner();
    assert_eq!(listed.keys.len(), 1);
    app.shutdown().await.unwrap();
}

#[tokio::test]
async fn health_speaks_for_every_service_and_turns_before_the_drain() {
    let dir = tempfile::tempdir().unwrap();
    let app = start(config(&dir)).await;
    let mut health = HealthClient::new(channel(&app).await);
    for service in ["", "baton.v1.TaskService", "baton.v1.RunnerService", "baton.v1.KeyService"] {
        let request = HealthCheckRequest { service: service.into() };
        let mut watch = health.watch(request).await.unwrap().into_inner();
        let mut status = watch.message().await.unwrap().unwrap().status();
        while status != ServingStatus::Serving {
            status = watch.message().await.unwrap().unwrap().status();
        }
    }
    let request = HealthCheckRequest { service: "baton.v1.TaskService".into() };
    let mut watch = health.watch(request).await.unwrap().into_inner();
    watch.message().await.unwrap();
    let (down, seen) = tokio::join!(app.shutdown(), watch.message());
    down.unwrap();
    assert_eq!(seen.unwrap().unwrap().status(), ServingStatus::NotServing);
}

#[tokio::test]
async fn a_task_runs_from_submit_to_result_and_a_shutdown_is_quick() {
    let dir = tempfile::tempdir().unwrap();
    let app = start(config(&dir)).await;
    let entropy = Entropy::system();
    let mut runner =
        agent::Config::new(format!("http://{}", app.addr), agent::engine::Settings::Echo, &entropy);
    runner.engine_threads = 0;
    let (drain, stop) = (CancellationToken::new(), CancellationToken::new());
    let shutdown = agent::Shutdown { drain, stop: stop.clone() };
    let work = agent::run(runner, Clock::system(), entropy, shutdown);
    app.supervisor.spawn("agent", async move {
        work.await.unwrap();
    });

    let mut tasks = TaskServiceClient::new(channel(&app).await);
    let input = crate::json::struct_from_text(r#"{"text":"one two three"}"#).unwrap();
    let spec = pb::TaskSpec { model: "demo/echo".into(), input: Some(input), ..Default::default() };
    let request = pb::SubmitTaskRequest { spec: Some(spec), ..Default::default() };
    let submitted = tasks.submit_task(request).await.unwrap().into_inner();
    let task_id = submitted.task.unwrap().task_id;
    let request = pb::StreamTaskRequest { task_id: task_id.clone(), ..Default::default() };
    let mut stream = tasks.stream_task(request).await.unwrap().into_inner();
    let events = async {
        let (mut text, mut sequence) = (String::new(), 0);
        while let Some(event) = stream.message().await.unwrap() {
            sequence += 1;
            assert_eq!(event.sequence, sequence);
            if let Some(Body::Token(token)) = event.body {
                text.push_str(&token.text);
            }
        }
        text
    };
    let text = tokio::time::timeout(BOUND, events).await.unwrap();
    assert_eq!(text.trim(), "one two three");
    let metrics = app.metrics.text();
    assert!(metrics.contains("baton_tasks_submitted_total 1"), "{metrics}");

    // An open watch and the runner's streams do not hold the server up.
    let watching = tasks.watch_tasks(pb::WatchTasksRequest::default()).await.unwrap();
    let down = tokio::time::timeout(BOUND, app.shutdown());
    stop.cancel();
    down.await.unwrap().unwrap();
    drop(watching);
}

#[cfg(feature = "redis")]
mod shared {
    use super::*;
    use crate::{config::Secret, db, redis::testing::Server};

    #[tokio::test]
    async fn a_redis_that_cannot_be_used_keeps_the_server_from_starting() {
        let dir = tempfile::tempdir().unwrap();
        let server = Server::start();
        let port = server.port();
        let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        for (url, says) in [
            (format!("redis://:hush@{nobody}"), "check host and port"),
            (format!("http://127.0.0.1:{port}"), "redis:// and, for TLS, rediss://"),
            (format!("redis://127.0.0.1:{port}/nine"), "databases are numbers"),
            (format!("redis://u:hush@127.0.0.1:{port}"), "check user and password"),
        ] {
            let mut config = config(&dir);
            config.redis.url = Secret::from(url.as_str());
            config.database.url = Secret::from("postgres://127.0.0.1:1/none");
            let refused = App::start(config, Clock::system(), Entropy::system()).await;
            let text = format!("{:#}", refused.err().unwrap());
            assert!(text.contains("redis.url") && text.contains(says), "{text}");
            assert!(!text.contains("hush"), "{text}");
        }
    }

    #[tokio::test]
    #[ignore = "needs the server that BATON_TEST_POSTGRES names"]
    async fn two_servers_share_a_queue_and_say_when_they_cannot() {
        let mut redis = Server::start();
        let dir = tempfile::tempdir().unwrap();
        let db::Location::Url(database) = db::testing::location(dir.path()).await else {
            panic!("BATON_TEST_POSTGRES names no server")
        };
        let server = |name: &str| {
            let mut config = config(&dir);
            config.storage.data_dir = dir.path().join(name);
            config.redis.url = Secret::from(redis.settings().url.as_str());
            config.database.url = Secret::from(database.as_str());
            start(config)
        };
        let (one, other) = (server("one").await, server("other").await);
        let entropy = Entropy::system();
        let address = format!("http://{}", other.addr);
        let mut runner = agent::Config::new(address, agent::engine::Settings::Echo, &entropy);
        runner.engine_threads = 0;
        let (drain, stop) = (CancellationToken::new(), CancellationToken::new());
        let shutdown = agent::Shutdown { drain, stop: stop.clone() };
        let work = agent::run(runner, Clock::system(), entropy, shutdown);
        other.supervisor.spawn("agent", async move {
            work.await.unwrap();
        });

        let mut tasks = TaskServiceClient::new(channel(&one).await);
        let mut run = async || {
            let input = crate::json::struct_from_text(r#"{"text":"one two"}"#).unwrap();
            let spec = pb::TaskSpec {
                model: "demo/echo".into(),
                input: Some(input),
                ..Default::default()
            };
            let request = pb::SubmitTaskRequest { spec: Some(spec), ..Default::default() };
            let submitted = tasks.submit_task(request).await.unwrap().into_inner();
            let task_id = submitted.task.unwrap().task_id;
            let done = async {
                loop {
                    let request = pb::GetTaskRequest { task_id: task_id.clone() };
                    let task = tasks.get_task(request).await.unwrap().into_inner();
                    if task.state == i32::from(pb::TaskState::Succeeded) {
                        break;
                    }
                    tokio::task::yield_now().await;
                }
            };
            tokio::time::timeout(BOUND, done).await.unwrap();
        };
        run().await;

        let mut health = HealthClient::new(channel(&one).await);
        let request = HealthCheckRequest { service: "redis".into() };
        let mut watch = health.watch(request).await.unwrap().into_inner();
        assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::Serving);
        redis.kill();
        assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::NotServing);
        assert!(one.is_serving() && other.is_serving());
        run().await;
        redis.restart();
        assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::Serving);
        run().await;
        stop.cancel();
        drop(watch);
        one.shutdown().await.unwrap();
        other.shutdown().await.unwrap();
    }
}
