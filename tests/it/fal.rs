//! The fal facade as its clients see it: the queue with its states, results and errors, direct
//! calls, and the proxy.

use std::time::Duration;

use baton::pb::{self, Scope, TaskState};
use reqwest::{Client, Method, RequestBuilder, Response, StatusCode};
use serde_json::{Value, json};

use crate::{
    auth,
    gateway::{at, body, clients, events},
    harness::{
        SOON, default, eventually,
        local::Local,
        object,
        runner::{self, Runner},
        within,
    },
};

const MODEL: &str = "test/echo";

async fn send(request: RequestBuilder) -> Response {
    within("an answer", SOON, request.send()).await.expect("an answer")
}

/// Puts a request into the queue; its id and what was answered.
async fn submit(client: &Client, addr: impl std::fmt::Display) -> (String, Value) {
    let request = client.post(at(addr, "/fal/test/echo")).json(&json!({"prompt": "hello"}));
    let answer = send(request).await;
    assert_eq!(answer.status(), StatusCode::OK);
    let header = answer.headers()["x-fal-request-id"].clone();
    let answer = body(answer).await;
    let id = answer["request_id"].as_str().expect("an id").to_owned();
    assert_eq!(header, id.as_str());
    (id, answer)
}

/// A path of a request.
fn of(id: &str, rest: &str) -> String {
    format!("/fal/test/echo/requests/{id}{rest}")
}

async fn get(client: &Client, addr: impl std::fmt::Display, path: &str) -> (u16, Value) {
    let answer = send(client.get(at(addr, path))).await;
    (answer.status().as_u16(), body(answer).await)
}

fn stage(name: &str) -> pb::RunnerEvent {
    let stage = pb::StageEvent { name: name.into(), progress: Some(0.5), detail: String::new() };
    pb::RunnerEvent { body: Some(pb::runner_event::Body::Stage(stage)), ..default() }
}

fn log(message: &str) -> pb::RunnerEvent {
    let log = pb::LogEvent { level: pb::log_event::Level::Warn.into(), message: message.into() };
    pb::RunnerEvent { body: Some(pb::runner_event::Body::Log(log)), ..default() }
}

fn failing(reason: &str) -> pb::Finish {
    let failure = pb::Failure { reason: reason.into(), message: "too hot".into(), ..default() };
    pb::Finish { outcome: Some(pb::finish::Outcome::Failure(failure)), usage: None }
}

#[tokio::test]
async fn a_request_goes_from_the_queue_to_its_result() {
    let server = Local::start(&[]).await;
    let (addr, api) = (server.addr, server.api());
    for client in clients() {
        let (id, submitted) = submit(&client, addr).await;
        let url = at(addr, &of(&id, ""));
        assert_eq!(submitted["status"], "IN_QUEUE");
        assert_eq!(submitted["queue_position"], 0);
        assert_eq!(submitted["response_url"], url);
        assert_eq!(submitted["status_url"], format!("{url}/status"));
        assert_eq!(submitted["cancel_url"], format!("{url}/cancel"));
        let input = api.get(&id).await.spec.expect("a spec").input.expect("an input");
        assert_eq!(input, object(&[("prompt", "hello")]));
        let (behind, _) = submit(&client, addr).await;

        let (code, status) = get(&client, addr, &of(&behind, "/status")).await;
        assert_eq!((code, &status["status"]), (202, &json!("IN_QUEUE")));
        assert_eq!(status["queue_position"], 1);
        let (code, early) = get(&client, addr, &of(&id, "")).await;
        assert_eq!((code, &early["error_type"]), (400, &json!("bad_request")));

        let mut runner = Runner::connect(&api, "r1", &[MODEL], 1).await;
        let lease = runner.assigned().await;
        assert_eq!(lease.task_id, id);
        let lines = vec![stage("LOADING"), log("warm"), runner::token("t")];
        runner.output(&lease, 1, lines, None).await;
        let (code, status) = get(&client, addr, &of(&id, "/status")).await;
        assert_eq!((code, &status["status"]), (202, &json!("IN_PROGRESS")));
        assert_eq!(status["logs"], Value::Null);
        let logs = eventually("both lines", SOON, || async {
            let (code, status) = get(&client, addr, &of(&id, "/status?logs=1")).await;
            assert_eq!((code, &status["status"]), (202, &json!("IN_PROGRESS")));
            let logs = status["logs"].as_array().expect("a list").clone();
            (logs.len() == 2).then_some(logs)
        })
        .await;
        assert_eq!(logs[0]["message"], "LOADING 50%");
        let line = (&logs[1]["message"], &logs[1]["level"], &logs[1]["source"]);
        assert_eq!(line, (&json!("warm"), &json!("WARN"), &json!("USER")));
        assert!(logs[1]["timestamp"].as_str().is_some_and(|time| time.starts_with("20")));

        runner.finish(&lease, 4, runner::success()).await;
        api.wait_for(&id, &[TaskState::Succeeded], SOON).await;
        let (code, status) = get(&client, addr, &of(&id, "/status?logs=True")).await;
        assert_eq!((code, &status["status"]), (200, &json!("COMPLETED")));
        assert_eq!(status["logs"], Value::Array(logs));
        assert!(status["metrics"]["inference_time"].is_f64(), "{status}");
        assert!(status.get("error").is_none(), "{status}");
        assert_eq!(get(&client, addr, &of(&id, "")).await, (200, json!({"done": "yes"})));

        runner.credits(1).await;
        let lease = runner.assigned().await;
        runner.finish(&lease, 1, runner::success()).await;
    }
    server.stop().await;
}

#[tokio::test]
async fn text_stands_in_for_a_result_that_is_empty() {
    let server = Local::start(&[]).await;
    let (addr, api) = (server.addr, server.api());
    let mut runner = Runner::connect(&api, "r1", &[MODEL], 1).await;
    let client = Client::new();
    let (id, _) = submit(&client, addr).await;
    let lease = runner.assigned().await;
    runner.output(&lease, 1, runner::tokens(0, 2), None).await;
    let outcome = Some(pb::finish::Outcome::Success(default()));
    runner.finish(&lease, 3, pb::Finish { outcome, usage: None }).await;
    api.wait_for(&id, &[TaskState::Succeeded], SOON).await;
    assert_eq!(get(&client, addr, &of(&id, "")).await, (200, json!({"text": "t0 t1 "})));
    server.stop().await;
}

#[tokio::test]
async fn the_status_streams_until_the_end_and_tells_each_line_once() {
    let server = Local::start(&[]).await;
    let (addr, api) = (server.addr, server.api());
    for client in clients() {
        let (id, _) = submit(&client, addr).await;
        let request = client.get(at(addr, &of(&id, "/status/stream?logs=1")));
        let stream = send(request.header("accept", "text/event-stream")).await;
        assert_eq!(stream.headers()["content-type"], "text/event-stream");
        assert_eq!(stream.headers()["x-fal-request-id"], id.as_str());
        let mut runner = Runner::connect(&api, "r1", &[MODEL], 1).await;
        let told = tokio::spawn(events(stream, |_| false));
        let lease = runner.assigned().await;
        runner.output(&lease, 1, vec![log("one"), runner::token("t"), log("two")], None).await;
        runner.finish(&lease, 4, runner::success()).await;
        let told = within("the end", SOON, told).await.expect("events");
        let mut states: Vec<_> = told.iter().map(|event| &event.data["status"]).collect();
        states.dedup();
        let running = states.iter().position(|state| **state == "IN_PROGRESS").expect("it ran");
        assert!(states[..running].iter().all(|state| **state == "IN_QUEUE"), "{states:?}");
        assert_eq!(states[running..], ["IN_PROGRESS", "COMPLETED"]);
        let lines: Vec<_> = told
            .iter()
            .filter_map(|event| event.data["logs"].as_array())
            .flatten()
            .map(|line| &line["message"])
            .collect();
        assert_eq!(lines, ["one", "two"]);

        // One that has ended is told from its history.
        let again = send(client.get(at(addr, &of(&id, "/status/stream")))).await;
        let again = events(again, |_| false).await;
        let last = again.last().expect("an event");
        assert_eq!((&last.data["status"], &last.data["logs"]), (&json!("COMPLETED"), &Value::Null));
    }
    server.stop().await;
}

#[tokio::test]
async fn a_cancel_is_asked_for_once() {
    let server = Local::start(&[]).await;
    let (addr, api) = (server.addr, server.api());
    let mut runner = Runner::connect(&api, "r1", &[MODEL], 1).await;
    for client in clients() {
        let (id, _) = submit(&client, addr).await;
        let lease = runner.assigned().await;
        let cancel = || client.put(at(addr, &of(&id, "/cancel")));
        let asked = send(cancel()).await;
        assert_eq!(asked.status(), StatusCode::ACCEPTED);
        assert_eq!(body(asked).await["status"], "CANCELLATION_REQUESTED");
        runner.cancelled(&lease).await;
        runner.credits(1).await;
        let again = send(cancel()).await;
        assert_eq!(again.status(), StatusCode::BAD_REQUEST);
        assert_eq!(body(again).await["status"], "ALREADY_COMPLETED");
        let (code, status) = get(&client, addr, &of(&id, "/status")).await;
        assert_eq!((code, &status["status"]), (200, &json!("COMPLETED")));
        assert_eq!(status["error_type"], "client_cancelled");
        let (code, result) = get(&client, addr, &of(&id, "")).await;
        assert_eq!((code, &result["error_type"]), (499, &json!("client_cancelled")));
    }
    server.stop().await;
}

#[tokio::test]
async fn what_fails_has_the_status_and_type_that_fal_documents() {
    let server = Local::start(&[]).await;
    let (addr, api) = (server.addr, server.api());
    let mut runner = Runner::connect(&api, "r1", &[MODEL], 1).await;
    let client = Client::new();
    for (reason, code, kind) in
        [("INPUT_REJECTED", 422, None), ("TASK_FAILED", 500, Some("runner_server_error"))]
    {
        let (id, _) = submit(&client, addr).await;
        let lease = runner.assigned().await;
        runner.finish(&lease, 1, failing(reason)).await;
        runner.credits(1).await;
        api.wait_for(&id, &[TaskState::Failed], SOON).await;
        let (_, status) = get(&client, addr, &of(&id, "/status")).await;
        assert_eq!((&status["status"], &status["error"]), (&json!("COMPLETED"), &json!("too hot")));
        let answer = send(client.get(at(addr, &of(&id, "")))).await;
        assert_eq!(answer.status().as_u16(), code);
        assert_eq!(answer.headers()["x-fal-request-id"], id.as_str());
        let header = answer.headers().get("x-fal-error-type").cloned();
        assert_eq!(header.as_ref().and_then(|value| value.to_str().ok()), kind);
        let answer = body(answer).await;
        assert_eq!(answer["error_type"].as_str(), kind);
        if code == 422 {
            let detail = json!([{"loc": ["body"], "msg": "too hot", "type": "value_error"}]);
            assert_eq!(answer["detail"], detail);
        } else {
            assert_eq!(answer["detail"], "too hot");
        }
    }
    server.stop().await;
}

#[tokio::test]
async fn a_start_timeout_is_the_clients_own() {
    let server = Local::manual(&[]).await;
    let (addr, api) = (server.addr, server.api());
    let client = Client::new();
    let request = client.post(at(addr, "/fal/test/echo")).header("x-fal-request-timeout", "5.0");
    let answer = body(send(request.json(&json!({}))).await).await;
    let id = answer["request_id"].as_str().expect("an id");
    server.advance(Duration::from_secs(6)).await;
    api.wait_for(id, &[TaskState::Expired], SOON).await;
    let answer = send(client.get(at(addr, &of(id, "")))).await;
    assert_eq!(answer.status(), StatusCode::GATEWAY_TIMEOUT);
    assert_eq!(answer.headers()["x-fal-request-timeout-type"], "user");
    assert_eq!(body(answer).await["error_type"], "request_timeout");
    server.stop().await;
}

#[tokio::test]
async fn headers_and_the_path_reach_the_task() {
    let server = Local::start(&[]).await;
    let (addr, api) = (server.addr, server.api());
    let client = Client::new();
    let request = client
        .post(at(addr, "/fal/test/echo/fast/lane"))
        .header("x-fal-queue-priority", "low")
        .header("x-fal-no-retry", "true")
        .header("x-forwarded-proto", "https")
        .header("x-forwarded-host", "queue.example.org");
    let answer = send(request.json(&json!({"n": 1, "params": {"temperature": 0}}))).await;
    let answer = body(answer).await;
    let id = answer["request_id"].as_str().expect("an id");
    // Paths of the app are for the submit alone.
    let url = format!("https://queue.example.org/fal/test/echo/requests/{id}");
    assert_eq!(answer["response_url"], url);
    let spec = api.get(id).await.spec.expect("a spec");
    assert_eq!(spec.priority, -10);
    assert_eq!(spec.retry.expect("a policy").max_attempts, 1);
    assert_eq!(spec.labels["fal.path"], "fast/lane");
    assert_eq!(spec.input.expect("an input").fields.keys().collect::<Vec<_>>(), ["n"]);
    assert_eq!(spec.params.expect("some").fields.keys().collect::<Vec<_>>(), ["temperature"]);
    server.stop().await;
}

#[tokio::test]
async fn a_direct_call_answers_with_the_result_and_ends_with_its_client() {
    let server = Local::start(&[]).await;
    let (addr, api) = (server.addr, server.api());
    let mut runner = Runner::connect(&api, "r1", &[MODEL], 1).await;
    for client in clients() {
        let call = || client.post(at(addr, "/fal/run/test/echo")).json(&json!({"prompt": "x"}));
        let answer = tokio::spawn(send(call()));
        let lease = runner.serve_one(2).await;
        runner.credits(1).await;
        let answer = within("the answer", SOON, answer).await.expect("an answer");
        assert_eq!(answer.status(), StatusCode::OK);
        assert_eq!(answer.headers()["x-fal-request-id"], lease.task_id.as_str());
        assert_eq!(body(answer).await, json!({"done": "yes"}));

        let answer = tokio::spawn(send(call()));
        let lease = runner.assigned().await;
        runner.finish(&lease, 1, failing("INPUT_REJECTED")).await;
        runner.credits(1).await;
        let answer = within("the answer", SOON, answer).await.expect("an answer");
        assert_eq!(answer.status(), StatusCode::UNPROCESSABLE_ENTITY);

        let answer = tokio::spawn(send(call()));
        let lease = runner.assigned().await;
        answer.abort();
        drop(client);
        runner.cancelled(&lease).await;
        api.wait_for(&lease.task_id, &[TaskState::Cancelled], SOON).await;
        runner.credits(1).await;
    }
    server.stop().await;
}

#[tokio::test]
async fn a_stream_brings_the_output_as_it_comes_and_the_result_last() {
    let server = Local::start(&[]).await;
    let (addr, api) = (server.addr, server.api());
    let mut runner = Runner::connect(&api, "r1", &[MODEL], 1).await;
    for client in clients() {
        let call = || client.post(at(addr, "/fal/run/test/echo/stream")).json(&json!({}));
        let stream = tokio::spawn(send(call()));
        let lease = runner.assigned().await;
        let output = vec![stage("LOADING"), runner::token("a"), log("l"), runner::token("b")];
        runner.output(&lease, 1, output, None).await;
        runner.finish(&lease, 5, runner::success()).await;
        runner.credits(1).await;
        let stream = within("the stream", SOON, stream).await.expect("a stream");
        assert_eq!(stream.headers()["x-fal-request-id"], lease.task_id.as_str());
        let data: Vec<_> =
            events(stream, |_| false).await.into_iter().map(|event| event.data).collect();
        let kinds: Vec<_> = data.iter().map(|data| &data["type"]).collect();
        assert_eq!(kinds[..4], ["stage", "token", "log", "token"]);
        assert_eq!((&data[1]["text"], &data[3]["text"]), (&json!("a"), &json!("b")));
        assert_eq!(data[4..], [json!({"done": "yes"})]);

        // A failure before any output is one of the call.
        let stream = tokio::spawn(send(call()));
        let lease = runner.assigned().await;
        runner.finish(&lease, 1, failing("TASK_FAILED")).await;
        runner.credits(1).await;
        let refused = within("the stream", SOON, stream).await.expect("an answer");
        assert_eq!(refused.status(), StatusCode::INTERNAL_SERVER_ERROR);

        // A later one is the last event.
        let stream = tokio::spawn(send(call()));
        let lease = runner.assigned().await;
        runner.output(&lease, 1, vec![runner::token("a")], None).await;
        let stream = within("the stream", SOON, stream).await.expect("a stream");
        runner.finish(&lease, 2, failing("TASK_FAILED")).await;
        runner.credits(1).await;
        let last = events(stream, |_| false).await.pop().expect("an event").data;
        assert_eq!(last["type"], "error");
        assert_eq!(
            (&last["detail"], &last["error_type"]),
            (&json!("too hot"), &json!("runner_server_error"))
        );
    }
    server.stop().await;
}

#[tokio::test]
async fn a_proxy_takes_the_target_from_the_header() {
    let server = Local::start(&[]).await;
    let (addr, api) = (server.addr, server.api());
    let client = Client::new();
    let proxy = |method: Method, url: &str| {
        client.request(method, at(addr, "/fal/proxy")).header("x-fal-target-url", url)
    };
    let submitted = proxy(Method::POST, "https://queue.fal.run/test/echo").json(&json!({}));
    let submitted = body(send(submitted).await).await;
    let id = submitted["request_id"].as_str().expect("an id");
    let url = format!("https://queue.fal.run/test/echo/requests/{id}");
    let status = send(proxy(Method::GET, &format!("{url}/status?logs=0"))).await;
    assert_eq!(status.status(), StatusCode::ACCEPTED);
    let cancel = proxy(Method::PUT, &format!("{url}/cancel"));
    let cancel = send(cancel.header("content-type", "application/json")).await;
    assert_eq!(cancel.status(), StatusCode::ACCEPTED);
    api.wait_for(id, &[TaskState::Cancelled], SOON).await;
    let upload = proxy(Method::POST, "https://rest.fal.ai/storage/upload/initiate");
    assert_eq!(send(upload.json(&json!({}))).await.status(), StatusCode::BAD_REQUEST);
    server.stop().await;
}

#[tokio::test]
async fn what_is_refused_says_what_and_why() {
    let env = [("BATON_LIMITS_MESSAGE", "64KiB"), ("BATON_QUEUE_MAX_PER_MODEL", "1")];
    let server = Local::start(&env).await;
    let addr = server.addr;
    let client = Client::new();
    let post = |path: &str, input: Value| send(client.post(at(addr, path)).json(&input));

    let hook = post("/fal/test/echo?fal_webhook=https%3A%2F%2Fexample.org", json!({})).await;
    assert_eq!(hook.status(), StatusCode::BAD_REQUEST);
    let hook = body(hook).await;
    assert!(hook["detail"].as_str().expect("text").contains("fal_webhook"), "{hook}");
    assert_eq!(hook["error_type"], "bad_request");
    assert_eq!(post("/fal/alone", json!({})).await.status(), StatusCode::NOT_FOUND);
    assert_eq!(post("/fal/No/Model", json!({})).await.status(), StatusCode::NOT_FOUND);
    let nobody = post("/fal/run/test/echo", json!({})).await;
    assert_eq!(nobody.status(), StatusCode::NOT_FOUND);
    let list = send(client.post(at(addr, "/fal/test/echo")).json(&json!([1]))).await;
    assert_eq!(list.status(), StatusCode::BAD_REQUEST);
    let far = post(&format!("/fal/test/echo/{}", "x".repeat(300)), json!({})).await;
    assert_eq!(far.status(), StatusCode::UNPROCESSABLE_ENTITY);
    assert_eq!(body(far).await["detail"][0]["loc"], json!(["body", "labels"]));
    let plain = client.post(at(addr, "/fal/test/echo")).header("content-type", "text/plain");
    assert_eq!(send(plain.body("{}")).await.status(), StatusCode::BAD_REQUEST);
    let long = post("/fal/test/echo", json!({"x": "x".repeat(70_000)})).await;
    assert_eq!(long.status(), StatusCode::PAYLOAD_TOO_LARGE);
    let wrong = send(client.post(at(addr, &of("x", "/cancel"))).json(&json!({}))).await;
    assert_eq!(wrong.status(), StatusCode::METHOD_NOT_ALLOWED);
    assert_eq!(wrong.headers()["allow"], "PUT");

    let (id, _) = submit(&client, addr).await;
    let full = post("/fal/test/echo", json!({})).await;
    assert_eq!(full.status(), StatusCode::TOO_MANY_REQUESTS);
    assert!(full.headers().contains_key("retry-after"));
    // Another app has no such request, and neither has this one another's.
    for path in [format!("/fal/test/other/requests/{id}/status"), of("none", "/status")] {
        let (code, answer) = get(&client, addr, &path).await;
        assert_eq!(code, 404, "{path}: {answer}");
    }
    server.stop().await;
}

#[tokio::test]
async fn keys_are_those_of_this_server() {
    let server = Local::start(&[("BATON_AUTH_REQUIRED", "true")]).await;
    let addr = server.addr;
    let admin = auth::admin(&server);
    let (_, key) = auth::key(&admin, "", &[Scope::TasksRead, Scope::TasksWrite]).await;
    let (_, foreign) = auth::key(&admin, "other", &[Scope::TasksRead, Scope::TasksWrite]).await;
    let client = Client::new();
    let with = |request: RequestBuilder, key: &str| {
        send(request.header("authorization", format!("Key {key}")).json(&json!({})))
    };
    for wrong in ["id:secret", "bt_0_0"] {
        let wrong = with(client.post(at(addr, "/fal/test/echo")), wrong).await;
        assert_eq!(wrong.status(), StatusCode::UNAUTHORIZED);
        assert_eq!(wrong.headers()["www-authenticate"], "Key");
    }
    let mine = with(client.post(at(addr, "/fal/test/echo")), &key).await;
    assert_eq!(mine.status(), StatusCode::OK);
    let mine = body(mine).await;
    let url = mine["status_url"].as_str().expect("an address");
    let theirs = client.get(url).header("authorization", format!("Key {foreign}"));
    assert_eq!(send(theirs).await.status(), StatusCode::NOT_FOUND);
    server.stop().await;

    let open = Local::start(&[]).await;
    let any = with(client.post(at(open.addr, "/fal/test/echo")), "id:secret").await;
    assert_eq!(any.status(), StatusCode::OK);
    open.stop().await;
}
