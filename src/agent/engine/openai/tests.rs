//! The `openai` engine against scripted HTTP servers.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

use super::{OpenAi, Settings};
use crate::{
    agent::{
        engine::{Change, Engine as _, Failure, Progress, testing},
        outbox::Outbox,
    },
    pb::{self, runner_event::Body},
};

/// A server that answers every request with the same bytes and then closes, or, when it
/// is told to hold, keeps the connection and reports when the client closes it.
struct Upstream {
    address: SocketAddr,
    requests: Arc<Mutex<Vec<String>>>,
    closed: Arc<tokio::sync::Notify>,
    _server: JoinSet<()>,
}

impl Upstream {
    async fn start(answer: String, hold: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let closed = Arc::new(tokio::sync::Notify::new());
        let (seen, notify) = (requests.clone(), closed.clone());
        let mut server = JoinSet::new();
        server.spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let request = read_request(&mut stream).await;
                seen.lock().push(request);
                stream.write_all(answer.as_bytes()).await.unwrap();
                if hold {
                    // Ends when the client closes.
                    let _ = stream.read(&mut [0; 1]).await;
                    notify.notify_one();
                }
            }
        });
        Self { address, requests, closed, _server: server }
    }

    fn engine(&self) -> OpenAi {
        let mut settings = Settings::new(format!("http://{}", self.address));
        settings.api_key = Some("secret".into());
        OpenAi::new(&settings).unwrap()
    }
}

async fn read_request(stream: &mut TcpStream) -> String {
    let mut request = Vec::new();
    loop {
        let mut buf = [0; 4096];
        let n = stream.read(&mut buf).await.unwrap();
        request.extend_from_slice(&buf[..n]);
        let text = String::from_utf8_lossy(&request);
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let length = head
            .lines()
            .find_map(|line| line.to_lowercase().strip_prefix("content-length: ")?.parse().ok())
            .unwrap_or(0);
        if body.len() >= length {
            return text.into_owned();
        }
    }
}

fn answer(status: &str, kind: &str, body: &str) -> String {
    format!("HTTP/1.1 {status}\r\ncontent-type: {kind}\r\nconnection: close\r\n\r\n{body}")
}

fn sse(chunks: &[Value]) -> String {
    let events: Vec<_> = chunks.iter().map(|chunk| format!("data: {chunk}\n\n")).collect();
    events.concat() + "data: [DONE]\n\n"
}

async fn failure(answer: String) -> Failure {
    let upstream = Upstream::start(answer, false).await;
    let work = testing::work(json!({"prompt": "x"}), json!({}));
    testing::run(&upstream.engine(), work).await.1.unwrap_err()
}

#[tokio::test]
async fn a_chat_streams_with_usage() {
    let body = sse(&[
        json!({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}),
        json!({"choices": [{"index": 0, "delta": {"content": "Hel"}}]}),
        json!({"choices": [{"index": 0, "delta": {"content": "lo"}, "finish_reason": null}]}),
        json!({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}),
        json!({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2}}),
    ]);
    let upstream = Upstream::start(answer("200 OK", "text/event-stream", &body), false).await;
    let messages = json!([{"role": "user", "content": "hi"}]);
    let mut work =
        testing::work(json!({"messages": messages}), json!({"temperature": 0.5, "max_tokens": 3}));
    work.seed = (1 << 40) + 5;
    let (events, ended) = testing::run(&upstream.engine(), work).await;
    let completion = ended.unwrap();
    assert_eq!(events, [Body::Token("Hel".into()), Body::Token("lo".into())]);
    assert_eq!(completion.result["text"], "Hello");
    assert_eq!(completion.result["finish_reason"], "stop");
    assert_eq!((completion.tokens_in, completion.tokens_out), (9, 2));

    let request = upstream.requests.lock()[0].clone();
    assert!(request.starts_with("POST /v1/chat/completions "), "{request}");
    assert!(request.contains("Bearer secret"), "{request}");
    let (_, body) = request.split_once("\r\n\r\n").unwrap();
    let body: Value = serde_json::from_str(body).unwrap();
    assert_eq!(
        body,
        json!({
            "messages": messages, "model": "test/model", "seed": 5, "n": 1, "temperature": 0.5,
            "max_tokens": 3, "stream": true, "stream_options": {"include_usage": true},
        })
    );
}

#[tokio::test]
async fn a_server_that_does_not_stream_is_understood() {
    let body = json!({"choices": [{"index": 0, "text": "all at once", "finish_reason": "length"}]});
    let upstream =
        Upstream::start(answer("200 OK", "application/json", &body.to_string()), false).await;
    let (events, ended) =
        testing::run(&upstream.engine(), testing::work(json!({"prompt": "x"}), json!({}))).await;
    assert_eq!(ended.unwrap().result["finish_reason"], "length");
    assert_eq!(testing::text(&events), "all at once");
}

#[tokio::test]
async fn statuses_become_reasons() {
    let error = json!({"error": {"message": "no such thing"}}).to_string();
    for (status, reason, retryable) in [
        ("400 Bad Request", "INPUT_REJECTED", false),
        ("422 Unprocessable", "INPUT_REJECTED", false),
        ("401 Unauthorized", "ENGINE_ERROR", false),
        ("403 Forbidden", "ENGINE_ERROR", false),
        ("404 Not Found", "ENGINE_ERROR", false),
        ("429 Too Many", "ENGINE_ERROR", true),
        ("503 Unavailable", "ENGINE_ERROR", true),
    ] {
        let failure = failure(answer(status, "application/json", &error)).await;
        assert_eq!((failure.reason.as_str(), failure.retryable), (reason, retryable), "{status}");
        assert_eq!(failure.message, "no such thing");
        assert_eq!(failure.metadata["http_status"], status[..3]);
    }
}

#[tokio::test]
async fn broken_streams_are_retryable_errors() {
    let cut = r#"data: {"choices": [{"index": 0, "text": "half"}]}"#.to_owned() + "\n\n";
    for body in [cut.as_str(), "", "data: {nonsense\n\n"] {
        let failure = failure(answer("200 OK", "text/event-stream", body)).await;
        assert_eq!((failure.reason.as_str(), failure.retryable), ("ENGINE_ERROR", true), "{body}");
    }
    let said = json!({"error": {"message": "prompt too long", "code": 400}});
    let failure = failure(answer("200 OK", "text/event-stream", &sse(&[said]))).await;
    assert_eq!((failure.reason.as_str(), failure.retryable), ("INPUT_REJECTED", false));
}

#[tokio::test]
async fn a_server_that_is_not_there_is_a_retryable_error() {
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let engine = OpenAi::new(&Settings::new(format!("http://{free}/v1/"))).unwrap();
    let work = testing::work(json!({"prompt": "x"}), json!({}));
    let failure = testing::run(&engine, work).await.1.unwrap_err();
    assert_eq!((failure.reason.as_str(), failure.retryable), ("ENGINE_ERROR", true));
    assert_eq!(failure.message, "the engine cannot be reached");
}

#[tokio::test]
async fn input_of_neither_or_both_kinds_is_refused() {
    let upstream = Upstream::start(String::new(), false).await;
    for input in [json!({}), json!({"prompt": "x", "messages": []}), json!({"messages": "x"})] {
        let work = testing::work(input, json!({}));
        let failure = testing::run(&upstream.engine(), work).await.1.unwrap_err();
        assert_eq!(failure.reason, "INPUT_REJECTED");
    }
    assert!(upstream.requests.lock().is_empty());
}

#[tokio::test]
async fn dropping_the_attempt_closes_the_request() {
    let first = r#"data: {"choices": [{"index": 0, "text": "one"}]}"#.to_owned() + "\n\n";
    let upstream = Upstream::start(answer("200 OK", "text/event-stream", &first), true).await;
    let outbox = Outbox::new(1);
    let work = testing::work(json!({"prompt": "x"}), json!({}));
    let emitter = outbox.begin((work.task, 1), String::new(), work.clock.clone());
    let mut attempts = JoinSet::new();
    attempts.spawn(upstream.engine().run(work, emitter));
    let until = Duration::from_secs(10);
    let token = async {
        while outbox.take(0, usize::MAX, |_| false).is_none() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(until, token).await.unwrap();
    attempts.abort_all();
    tokio::time::timeout(until, upstream.closed.notified()).await.unwrap();
}

#[test]
fn an_address_that_is_none_is_refused_and_keys_stay_secret() {
    assert!(OpenAi::new(&Settings::new("localhost 80")).is_err());
    assert!(OpenAi::new(&Settings::new("ftp://host")).is_err());
    let mut settings = Settings::new("http://host");
    settings.api_key = Some("hunter2".into());
    assert!(!format!("{settings:?}").contains("hunter2"));
}

#[tokio::test]
async fn a_model_is_loaded_under_its_name_upstream_if_the_server_has_it() {
    let list = json!({"data": [{"id": "up"}, {"id": "acme/own"}]}).to_string();
    let upstream = Upstream::start(answer("200 OK", "application/json", &list), false).await;
    let engine = upstream.engine();
    let load = |model: &str, options: Value| {
        let Value::Object(options) = options else { panic!("no object: {options}") };
        engine.change(Change::Load { model: model.into(), options }, Progress::default())
    };
    let missing = load("test/model", json!({"upstream_model": "down"})).await.unwrap_err();
    assert!(missing.message().ends_with("no model `down`; it has: up, acme/own"), "{missing}");
    let unknown = load("test/model", json!({"weights": "x"})).await.unwrap_err();
    assert_eq!(unknown.violations()[0].field, "options.weights");
    load("acme/own", json!({})).await.unwrap();
    load("test/model", json!({"upstream_model": "up"})).await.unwrap();
    let defaults = json!({"defaults": {"temperature": 0.5, "top_p": 0.9}});
    let Value::Object(params) = defaults.clone() else { panic!() };
    engine.change(Change::Tune { params }, Progress::default()).await.unwrap();
    assert_eq!(Value::Object(engine.params()), defaults);

    let work = testing::work(json!({"prompt": "x"}), json!({"top_p": 0.1}));
    testing::run(&engine, work).await.1.unwrap();
    let request = upstream.requests.lock().last().unwrap().clone();
    let (_, body) = request.split_once("\r\n\r\n").unwrap();
    let body: Value = serde_json::from_str(body).unwrap();
    assert_eq!((&body["model"], &body["top_p"]), (&json!("up"), &json!(0.1)));
    assert_eq!(body["temperature"], 0.5);
}

#[tokio::test]
async fn a_server_without_a_list_is_believed_and_one_that_is_away_is_not() {
    let load = |engine: OpenAi| {
        let (model, options) = ("test/model".into(), serde_json::Map::new());
        engine.change(Change::Load { model, options }, Progress::default())
    };
    let upstream = Upstream::start(answer("404 Not Found", "text/plain", "no"), false).await;
    load(upstream.engine()).await.unwrap();
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let away = OpenAi::new(&Settings::new(format!("http://{free}"))).unwrap();
    assert_eq!(load(away).await.unwrap_err().kind(), crate::error::Kind::Unavailable);
}

/// Keep-alive comments, an empty delta, `null` where nothing is, events after the end.
#[tokio::test]
async fn what_is_no_token_is_passed_over() {
    let delta = |delta: Value| json!({"choices": [{"index": 0, "delta": delta}]});
    let chunks = [
        delta(json!({"role": "assistant", "content": null, "tool_calls": null, "reasoning": null})),
        json!({"choices": null, "usage": null, "error": null}),
        json!({"choices": [{"index": null, "delta": null, "text": null, "logprobs": null}]}),
        delta(json!({"content": ""})),
        delta(json!({"content": "yes"})),
        delta(json!({"content": null, "tool_calls": []})),
        json!({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}),
    ];
    let body =
        format!(": keep-alive\n\n{}data: {}\n\n", sse(&chunks), delta(json!({"content": "!"})));
    let upstream = Upstream::start(answer("200 OK", "text/event-stream", &body), false).await;
    let work = testing::work(json!({"messages": []}), json!({}));
    let (events, ended) = testing::run(&upstream.engine(), work).await;
    assert_eq!(events, [Body::Token("yes".into())]);
    let completion = ended.unwrap();
    // The server told no usage: what came is counted.
    assert_eq!((completion.tokens_in, completion.tokens_out), (0, 1));
}

/// The name in llama.cpp and vLLM, and the one in newer vLLM.
#[tokio::test]
async fn thoughts_are_a_stage_and_part_of_the_result() {
    for name in ["reasoning_content", "reasoning"] {
        let delta = |delta: Value| json!({"choices": [{"index": 0, "delta": delta}]});
        let chunks = [
            delta(json!({"role": "assistant", name: "Let me "})),
            delta(json!({name: "think."})),
            delta(json!({"content": "4"})),
            json!({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}),
        ];
        let answer = answer("200 OK", "text/event-stream", &sse(&chunks));
        let upstream = Upstream::start(answer, false).await;
        let work = testing::work(json!({"messages": []}), json!({}));
        let (events, ended) = testing::run(&upstream.engine(), work).await;
        let stage = pb::StageEvent { name: "reasoning".into(), ..Default::default() };
        assert_eq!(events, [Body::Stage(stage), Body::Token("4".into())]);
        let completion = ended.unwrap();
        assert_eq!(completion.result["reasoning"], "Let me think.");
        assert_eq!((&completion.result["text"], completion.tokens_out), (&json!("4"), 3));
    }
}

#[tokio::test]
async fn calls_of_tools_are_put_together() {
    let call = |call: Value| json!({"choices": [{"index": 0, "delta": {"tool_calls": [call]}}]});
    let function =
        |name: Option<&str>, arguments: &str| json!({"name": name, "arguments": arguments});
    let chunks = [
        call(
            json!({"index": 0, "id": "c1", "type": "function", "function": function(Some("f"), "")}),
        ),
        call(json!({"index": 0, "function": function(None, "{\"a\":")})),
        call(json!({"index": 1, "id": "c2", "function": function(Some("g"), "{}")})),
        call(json!({"index": 0, "id": "", "function": {"arguments": "1}"}})),
        json!({"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]}),
    ];
    let upstream =
        Upstream::start(answer("200 OK", "text/event-stream", &sse(&chunks)), false).await;
    let work = testing::work(json!({"messages": []}), json!({}));
    let completion = testing::run(&upstream.engine(), work).await.1.unwrap();
    let made = |id: &str, name: &str, arguments: &str| json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}});
    let calls = json!([made("c1", "f", "{\"a\":1}"), made("c2", "g", "{}")]);
    assert_eq!(completion.result["tool_calls"], calls);
    assert_eq!(completion.result["finish_reason"], "tool_calls");
}

#[tokio::test]
async fn a_busy_server_is_left_alone_as_long_as_it_asks() {
    let failure = failure(
        "HTTP/1.1 429 Too Many\r\nretry-after: 7\r\nconnection: close\r\n\r\n\
         {\"error\":\"Model is overloaded\",\"error_type\":\"overloaded\"}"
            .into(),
    )
    .await;
    assert_eq!((failure.retry_after, failure.retryable), (Some(Duration::from_secs(7)), true));
    assert_eq!(failure.message, "Model is overloaded");
}

/// What a stream says after its status was sent: TGI's, vLLM's old and new, `OpenAI`'s dialect.
#[tokio::test]
async fn errors_inside_a_stream_are_read_in_every_dialect() {
    let cases = [
        (json!({"error": "Input too long", "error_type": "validation"}), false, "INPUT_REJECTED"),
        (json!({"error": "Overloaded", "error_type": "overloaded"}), true, "ENGINE_ERROR"),
        (json!({"error": "CUDA error", "error_type": "generation"}), true, "ENGINE_ERROR"),
        (
            json!({"object": "error", "message": "too long", "type": "BadRequestError", "code": 400}),
            false,
            "INPUT_REJECTED",
        ),
        (json!({"error": {"message": "no", "code": "400"}}), false, "INPUT_REJECTED"),
        (
            json!({"error": {"message": "no", "type": "invalid_request_error", "code": null}}),
            false,
            "INPUT_REJECTED",
        ),
        (json!({"error": {"message": "boom", "type": "server_error"}}), true, "ENGINE_ERROR"),
    ];
    for (said, retryable, reason) in cases {
        let told = answer("200 OK", "text/event-stream", &sse(std::slice::from_ref(&said)));
        let failure = failure(told).await;
        assert_eq!((failure.retryable, failure.reason.as_str()), (retryable, reason), "{said}");
    }
}
