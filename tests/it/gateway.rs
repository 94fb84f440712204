//! The HTTP edge as a browser and curl see it: the same methods as JSON, over both versions of
//! HTTP, and the streams as server-sent events, lines and arrays.

use std::time::Duration;

use baton::pb::{self, Scope, TaskState};
use reqwest::{Client, Response, StatusCode};
use serde_json::{Value, json};

use crate::{
    auth,
    harness::{
        SOON,
        local::Local,
        runner::{self, Runner},
        within,
    },
};

const MODEL: &str = "test/echo";

/// A client over HTTP/1.1 and one over HTTP/2.
pub fn clients() -> [Client; 2] {
    let h2 = Client::builder().http2_prior_knowledge().build().expect("a client");
    [Client::new(), h2]
}

/// The address of a path on a server.
pub fn at(addr: impl std::fmt::Display, path: &str) -> String {
    format!("http://{addr}{path}")
}

pub async fn body(response: Response) -> Value {
    let text = within("a body", SOON, response.text()).await.expect("a whole body");
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// The one `ErrorInfo` of an error.
pub fn reason(error: &Value) -> &str {
    let details = error["details"].as_array().map(Vec::as_slice).unwrap_or_default();
    let kind = "type.googleapis.com/google.rpc.ErrorInfo";
    let infos: Vec<_> = details.iter().filter(|detail| detail["@type"] == kind).collect();
    assert_eq!(infos.len(), 1, "{error}");
    assert_eq!(infos[0]["domain"], "baton");
    infos[0]["reason"].as_str().unwrap_or_default()
}

pub async fn submit(client: &Client, addr: impl std::fmt::Display) -> String {
    let spec = json!({"model": MODEL, "input": {"text": "hello"}, "labels": {"kind": "test"}});
    let request = client.post(at(addr, "/v1/tasks")).json(&json!({ "spec": spec }));
    let response = within("a submit", SOON, request.send()).await.expect("an answer");
    assert_eq!(response.status(), StatusCode::ACCEPTED);
    let answer = body(response).await;
    answer["task"]["taskId"].as_str().expect("an id").to_owned()
}

/// One server-sent event.
#[derive(Debug, Default, PartialEq)]
pub struct Event {
    pub id: Option<String>,
    pub name: String,
    pub data: Value,
}

/// Reads events as they come, until the stream ends or `enough` says so.
pub async fn events(mut response: Response, enough: impl Fn(&[Event]) -> bool) -> Vec<Event> {
    let (mut text, mut events) = (String::new(), Vec::new());
    within("events", SOON, async {
        while !enough(&events) {
            let Some(chunk) = response.chunk().await.expect("a sound stream") else { return };
            text.push_str(std::str::from_utf8(&chunk).expect("UTF-8, whole in each chunk"));
            while let Some((block, _)) = text.split_once("\n\n") {
                let mut event = Event::default();
                for line in block.lines() {
                    match line.split_once(": ") {
                        Some(("id", id)) => event.id = Some(id.to_owned()),
                        Some(("event", name)) => name.clone_into(&mut event.name),
                        Some(("data", data)) => {
                            event.data = serde_json::from_str(data).expect("JSON");
                        }
                        Some(("retry", _)) => {}
                        _ => assert!(line.starts_with(':'), "{line}"),
                    }
                }
                if event != Event::default() {
                    events.push(event);
                }
                let used = block.len() + 2;
                text.drain(..used);
            }
        }
    })
    .await;
    events
}

pub async fn get(client: &Client, url: String, headers: &[(&str, &str)]) -> Response {
    let mut request = client.get(url);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    within("an answer", SOON, request.send()).await.expect("an answer")
}

#[tokio::test]
async fn json_does_what_grpc_does_over_both_versions_of_http() {
    let server = Local::start(&[]).await;
    let (addr, api) = (server.addr, server.api());
    for client in clients() {
        let id = submit(&client, addr).await;
        let task = get(&client, at(addr, &format!("/v1/tasks/{id}")), &[]).await;
        assert_eq!(task.status(), StatusCode::OK);
        assert_eq!(task.headers()["content-type"], "application/json");
        let task = body(task).await;
        assert_eq!(task["state"], "TASK_STATE_QUEUED");
        assert_eq!(task["spec"]["input"], json!({"text": "hello"}));
        assert_eq!(api.get(&id).await.state(), TaskState::Queued);

        let list = "/v1/tasks?labels[kind]=test&states=TASK_STATE_QUEUED&page_size=1";
        let page = body(get(&client, at(addr, list), &[]).await).await;
        assert_eq!(page["tasks"][0]["taskId"], id.as_str());
        let none = "/v1/tasks?labels[kind]=other";
        assert_eq!(body(get(&client, at(addr, none), &[]).await).await, json!({}));

        let url = at(addr, &format!("/v1/tasks/{id}/cancel"));
        let request = client.post(url).header("x-correlation-id", "mine").json(&json!({}));
        let cancelled = request.send().await.expect("an answer");
        assert_eq!(cancelled.headers()["x-correlation-id"], "mine");
        assert_eq!(body(cancelled).await["state"], "TASK_STATE_CANCELLED");
        assert_eq!(api.get(&id).await.state(), TaskState::Cancelled);

        let url = at(addr, &format!("/v1/tasks/{id}/result"));
        let result = get(&client, url, &[]).await;
        assert_eq!(result.status(), StatusCode::BAD_REQUEST);
        assert_eq!(reason(&body(result).await), "STATE_CONFLICT");

        let queue = get(&client, at(addr, "/v1/queues/test/echo"), &[]).await;
        assert_eq!(body(queue).await["model"], MODEL);
        let pause = client.post(at(addr, "/v1/queues/test/echo:pause")).json(&json!({}));
        let paused = body(pause.send().await.expect("an answer")).await;
        assert!(paused["pause"]["pauseTime"].is_string(), "{paused}");

        let url = at(addr, &format!("/v1/tasks/{id}"));
        let head = client.head(&url).send().await.expect("an answer");
        assert_eq!(head.status(), StatusCode::OK);
        let deleted = client.delete(&url).send().await.expect("an answer");
        assert_eq!(body(deleted).await, json!({}));
        assert_eq!(get(&client, url, &[]).await.status(), StatusCode::NOT_FOUND);
    }
    server.stop().await;
}

#[tokio::test]
async fn what_is_refused_says_why_and_where() {
    let server = Local::start(&[("BATON_LIMITS_MESSAGE", "64KiB")]).await;
    let addr = server.addr;
    for client in clients() {
        let nothing = get(&client, at(addr, "/v1/nothing"), &[]).await;
        assert_eq!(nothing.status(), StatusCode::NOT_FOUND);
        assert_eq!(reason(&body(nothing).await), "NOT_FOUND");

        let wrong = client.put(at(addr, "/v1/tasks")).json(&json!({})).send().await.expect("one");
        assert_eq!(wrong.status(), StatusCode::METHOD_NOT_ALLOWED);
        assert_eq!(wrong.headers()["allow"], "GET, HEAD, OPTIONS, POST");
        let asked = client.request(reqwest::Method::OPTIONS, at(addr, "/v1/tasks:run"));
        let asked = asked.send().await.expect("an answer");
        assert_eq!(asked.status(), StatusCode::NO_CONTENT);
        assert_eq!(asked.headers()["allow"], "OPTIONS, POST");

        // What a page of another origin can send without asking.
        let plain = client.post(at(addr, "/v1/tasks")).header("content-type", "text/plain");
        let plain = plain.body("{}").send().await.expect("an answer");
        assert_eq!(plain.status(), StatusCode::UNSUPPORTED_MEDIA_TYPE);
        // Where there is no body there is nothing to be of a type.
        let bare = client.post(at(addr, "/v1/tasks/x/cancel")).send().await.expect("an answer");
        assert_eq!(bare.status(), StatusCode::NOT_FOUND);

        let other = json!({"taskId": "018f0000-0000-7000-8000-000000000000", "reason": "mine"});
        let id = submit(&client, addr).await;
        let cancel = at(addr, &format!("/v1/tasks/{id}/cancel"));
        let twice = client.post(&cancel).json(&other).send().await.expect("an answer");
        assert_eq!(twice.status(), StatusCode::BAD_REQUEST);
        let twice = body(twice).await;
        assert_eq!(reason(&twice), "INVALID_PARAMS");
        let violations = &twice["details"].as_array().expect("details")[1]["fieldViolations"];
        assert_eq!(violations[0]["field"], "task_id", "{twice}");

        let large = json!({"spec": {"model": MODEL, "input": {"text": "x".repeat(70_000)}}});
        let large = client.post(at(addr, "/v1/tasks")).json(&large).send().await.expect("one");
        assert_eq!(large.status(), StatusCode::PAYLOAD_TOO_LARGE);
        assert_eq!(reason(&body(large).await), "MESSAGE_TOO_LARGE");

        let typo = json!({"spec": {"model": MODEL, "retry": {"maxAtempts": 3}}});
        let typo = client.post(at(addr, "/v1/tasks")).json(&typo).send().await.expect("one");
        assert_eq!(typo.status(), StatusCode::BAD_REQUEST);
        let typo = body(typo).await;
        assert_eq!(reason(&typo), "INVALID_PARAMS");
        let violations = &typo["details"].as_array().expect("details")[1]["fieldViolations"];
        assert_eq!(violations[0]["field"], "spec.retry.maxAtempts", "{typo}");

        // The service's own refusals name their fields alike.
        let spec = json!({"spec": {"model": "no model", "priority": 1000}});
        let spec = client.post(at(addr, "/v1/tasks")).json(&spec).send().await.expect("one");
        let spec = body(spec).await;
        assert_eq!(spec["code"], 3);
        assert!(spec["message"].as_str().unwrap_or_default().contains("spec.model"), "{spec}");

        let unknown = get(&client, at(addr, "/v1/tasks?pagesize=1"), &[]).await;
        assert_eq!(unknown.status(), StatusCode::BAD_REQUEST);
        let strange = get(&client, at(addr, "/v1/tasks:watch"), &[("accept", "image/png")]).await;
        assert_eq!(strange.status(), StatusCode::NOT_ACCEPTABLE);
        let late = [("x-request-timeout", "soon")];
        let late = get(&client, at(addr, "/v1/tasks"), &late).await;
        assert_eq!(late.status(), StatusCode::BAD_REQUEST);
    }
    server.stop().await;
}

#[tokio::test]
async fn an_early_refusal_says_when_to_come_back() {
    let server = Local::start(&[("BATON_QUEUE_MAX_PER_MODEL", "1")]).await;
    let client = Client::new();
    submit(&client, server.addr).await;
    let spec = json!({"spec": {"model": MODEL}});
    let refused = client.post(at(server.addr, "/v1/tasks")).json(&spec).send().await.expect("one");
    assert_eq!(refused.status(), StatusCode::TOO_MANY_REQUESTS);
    let headers = refused.headers().clone();
    let number = |name: &str| headers[name].to_str().expect("text").parse::<u64>().expect("number");
    assert_eq!(number("retry-after"), number("x-backoff-ms").div_ceil(1_000));
    assert!(number("x-backoff-ms") > 0);
    assert_eq!(reason(&body(refused).await), "QUEUE_FULL");
    server.stop().await;
}

#[tokio::test]
async fn a_stream_has_ids_and_names_and_resumes_after_the_last_event() {
    let server = Local::start(&[]).await;
    let (addr, api) = (server.addr, server.api());
    let mut runner = Runner::connect(&api, "r1", &[MODEL], 1).await;
    for client in clients() {
        let id = submit(&client, addr).await;
        let url = at(addr, &format!("/v1/tasks/{id}/stream"));
        let live = get(&client, url.clone(), &[("accept", "text/event-stream")]).await;
        assert_eq!(live.headers()["content-type"], "text/event-stream");
        assert_eq!(live.headers()["cache-control"], "no-store");
        assert_eq!(live.headers()["x-accel-buffering"], "no");
        assert!(!live.headers().contains_key("content-encoding"));
        runner.serve_one(5).await;
        runner.credits(1).await;
        let live = events(live, |_| false).await;
        let names: Vec<_> = live.iter().map(|event| &*event.name).collect();
        let expected =
            ["queued", "attempt_started", "token", "token", "token", "token", "token", "ended"];
        assert_eq!(names, expected);
        for (event, n) in live.iter().zip(1..) {
            assert_eq!(event.id.as_deref(), Some(&*n.to_string()));
            assert_eq!(event.data["sequence"], n.to_string());
        }
        assert_eq!(live[2].data["token"]["text"], "t0 ");

        let rest = get(&client, url.clone(), &[("last-event-id", "3")]).await;
        assert_eq!(events(rest, |_| false).await, live[3..]);
        let rest = get(&client, format!("{url}?from_sequence=4"), &[]).await;
        assert_eq!(events(rest, |_| false).await, live[3..]);
        // The browser's word is the later one.
        let rest = get(&client, format!("{url}?from_sequence=1"), &[("last-event-id", "6")]).await;
        assert_eq!(events(rest, |_| false).await, live[6..]);
        // After the end there is nothing to come back for.
        let over = get(&client, url.clone(), &[("last-event-id", "8")]).await;
        assert_eq!(over.status(), StatusCode::NO_CONTENT);
        let beyond = get(&client, url.clone(), &[("last-event-id", "99")]).await;
        assert_eq!(beyond.status(), StatusCode::BAD_REQUEST);
        let broken = get(&client, url.clone(), &[("last-event-id", "x")]).await;
        assert_eq!(broken.status(), StatusCode::BAD_REQUEST);
        let unknown = at(addr, "/v1/tasks/018f0000-0000-7000-8000-000000000000/stream");
        let unknown = get(&client, unknown, &[]).await;
        assert_eq!(unknown.status(), StatusCode::NOT_FOUND);

        let lines = get(&client, url.clone(), &[("accept", "application/x-ndjson")]).await;
        assert_eq!(lines.headers()["content-type"], "application/x-ndjson");
        let lines = within("lines", SOON, lines.text()).await.expect("text");
        let lines: Vec<Value> =
            lines.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
        assert!(lines.iter().eq(live.iter().map(|event| &event.data)));
        let array = get(&client, url, &[("accept", "application/json")]).await;
        assert_eq!(body(array).await, Value::Array(lines));
    }
    server.stop().await;
}

#[tokio::test]
async fn a_stream_that_cannot_go_on_ends_with_a_typed_error() {
    let server = Local::start(&[]).await;
    let addr = server.addr;
    for client in clients() {
        let id = submit(&client, addr).await;
        let url = at(addr, &format!("/v1/tasks/{id}/stream"));
        for name in ["x-request-timeout", "grpc-timeout"] {
            let value = if name == "grpc-timeout" { "300m" } else { "300ms" };
            let cut = get(&client, url.clone(), &[(name, value)]).await;
            let cut = events(cut, |_| false).await;
            assert_eq!(cut[0].name, "queued");
            let last = cut.last().expect("an event");
            assert_eq!((&*last.name, cut.len()), ("error", 2));
            assert_eq!((reason(&last.data), &last.data["code"]), ("CALL_DEADLINE", &json!(4)));
        }
        let timeout = ("x-request-timeout", "300ms");
        let lines = get(&client, url.clone(), &[("accept", "application/x-ndjson"), timeout]).await;
        let lines = within("lines", SOON, lines.text()).await.expect("text");
        let last: Value = serde_json::from_str(lines.lines().last().expect("one")).expect("JSON");
        assert_eq!(reason(&last["error"]), "CALL_DEADLINE");
        let array = get(&client, url, &[("accept", "application/json"), timeout]).await;
        let array = body(array).await;
        assert_eq!(reason(&array[1]["error"]), "CALL_DEADLINE");
    }
    server.stop().await;
}

#[tokio::test]
async fn a_caller_who_leaves_a_run_cancels_it() {
    let server = Local::start(&[]).await;
    let api = server.api();
    for client in clients() {
        let run = json!({"spec": {"model": MODEL}});
        let run = client.post(at(server.addr, "/v1/tasks:run")).json(&run);
        let mut run = within("a run", SOON, run.send()).await.expect("an answer");
        let mut text = String::new();
        while !text.contains("\"queued\"") {
            let chunk = within("an event", SOON, run.chunk()).await.expect("one").expect("one");
            text.push_str(std::str::from_utf8(&chunk).expect("UTF-8"));
        }
        let data = text.lines().find_map(|line| line.strip_prefix("data: ")).expect("data");
        let event: Value = serde_json::from_str(data).expect("JSON");
        let id = event["queued"]["taskId"].as_str().expect("an id").to_owned();
        drop(run);
        drop(client);
        api.wait_for(&id, &[TaskState::Cancelled], SOON).await;
    }
    server.stop().await;
}

#[tokio::test]
async fn one_stream_carries_several_tasks() {
    let server = Local::start(&[]).await;
    let client = Client::new();
    let (one, two) = (submit(&client, server.addr).await, submit(&client, server.addr).await);
    let request = json!({"taskId": one, "others": [{"taskId": two}]});
    let both = client.post(at(server.addr, "/v1/tasks:stream")).json(&request);
    let both = within("a stream", SOON, both.send()).await.expect("an answer");
    let both = events(both, |events| events.len() == 2).await;
    let mut ids: Vec<_> = both.iter().filter_map(|event| event.data["taskId"].as_str()).collect();
    ids.sort_unstable();
    assert_eq!(ids, [one, two]);
    // Their numbers are of different streams, so that a browser must not come back with one.
    assert!(both.iter().all(|event| event.id.is_none()), "{both:?}");
    server.stop().await;
}

#[tokio::test]
async fn an_idle_stream_shows_signs_of_life_that_mean_nothing() {
    let server = Local::start(&[]).await;
    let client = Client::new();
    let id = submit(&client, server.addr).await;
    let url = at(server.addr, &format!("/v1/tasks/{id}/stream"));
    let idle = async |form: &str, sign: &str| {
        let mut stream = get(&client, url.clone(), &[("accept", form)]).await;
        let started = std::time::Instant::now();
        let mut text = String::new();
        within("a sign of life", Duration::from_secs(20), async {
            while !text.ends_with(sign) {
                let chunk = stream.chunk().await.expect("a sound stream").expect("no end");
                text.push_str(std::str::from_utf8(&chunk).expect("UTF-8"));
            }
        })
        .await;
        assert!(started.elapsed() > Duration::from_secs(14), "after {:?}", started.elapsed());
        (stream, text)
    };
    let (events, lines, array) = tokio::join!(
        idle("text/event-stream", "\n: keep-alive\n\n"),
        idle("application/x-ndjson", "}\n\n"),
        idle("application/json", "}\n"),
    );
    assert!(events.1.starts_with("retry: "), "{}", events.1);
    let cancel = client.post(at(server.addr, &format!("/v1/tasks/{id}/cancel"))).send().await;
    assert_eq!(cancel.expect("an answer").status(), StatusCode::OK);
    let whole = async |(stream, text): (Response, String)| {
        text + &within("the end", SOON, stream.text()).await.expect("text")
    };
    let array: Value = serde_json::from_str(&whole(array).await).expect("JSON all the same");
    let lines = whole(lines).await;
    let lines: Vec<Value> = lines
        .lines()
        .filter(|line| !line.is_empty())
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    assert_eq!((lines.len(), &array), (2, &Value::Array(lines.clone())));
    server.stop().await;
}

#[tokio::test]
async fn scopes_hold_over_json_as_over_grpc() {
    let server = Local::start(&[("BATON_AUTH_REQUIRED", "true")]).await;
    let admin = auth::admin(&server);
    let (_, reader) = auth::key(&admin, "", &[Scope::TasksRead]).await;
    let client = Client::new();
    let request = client.post(at(server.addr, "/v1/tasks")).bearer_auth(&reader);
    let denied = request.json(&json!({"spec": {"model": MODEL}})).send().await.expect("one");
    assert_eq!(denied.status(), StatusCode::FORBIDDEN);
    assert_eq!(reason(&body(denied).await), "PERMISSION_DENIED");
    let request = client.get(at(server.addr, "/v1/tasks")).header("x-api-key", &reader);
    assert_eq!(request.send().await.expect("an answer").status(), StatusCode::OK);
    server.stop().await;
}

#[tokio::test]
async fn a_result_comes_with_its_text_and_numbers_stay_exact() {
    let server = Local::start(&[]).await;
    let (addr, api) = (server.addr, server.api());
    let mut runner = Runner::connect(&api, "r1", &[MODEL], 1).await;
    let client = Client::new();
    let seed = "9223372036854775807";
    let spec = json!({"model": MODEL, "seed": seed, "input": {"n": 5, "x": 0.5, "deep": [null]}});
    let request = client.post(at(addr, "/v1/tasks")).json(&json!({ "spec": spec }));
    let task = body(request.send().await.expect("an answer")).await["task"].clone();
    assert_eq!(task["spec"]["seed"], seed);
    assert_eq!(task["spec"]["input"].to_string(), r#"{"deep":[null],"n":5,"x":0.5}"#);
    let lease = runner.assigned().await;
    runner.output(&lease, 1, runner::tokens(0, 2), None).await;
    runner.finish(&lease, 3, runner::success()).await;
    let id = task["taskId"].as_str().expect("an id");
    api.wait_for(id, &[TaskState::Succeeded], SOON).await;
    let result = body(get(&client, at(addr, &format!("/v1/tasks/{id}/result")), &[]).await).await;
    assert_eq!(result["text"], "t0 t1 ");
    assert_eq!(result["result"], json!({"done": "yes"}));
    let timeline = get(&client, at(addr, &format!("/v1/tasks/{id}/timeline")), &[]).await;
    let events = body(timeline).await["events"].as_array().map_or(0, Vec::len);
    assert_eq!(events, 3);
    let _: pb::Task = api.get(id).await;
    server.stop().await;
}
