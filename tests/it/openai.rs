//! The `OpenAI` facade as its clients see it: answers whole and in chunks, errors in their form,
//! and tasks that end with the client that asked.

use baton::pb::{self, Scope, TaskState};
use reqwest::{Client, RequestBuilder, Response, StatusCode};
use serde_json::{Value, json};

use crate::{
    auth,
    gateway::{at, body, clients},
    harness::{
        SOON, default,
        local::Local,
        object,
        runner::{self, Runner},
        within,
    },
};

const MODEL: &str = "test/echo";

/// A request for a chat, with these further parameters.
fn chat(client: &Client, addr: impl std::fmt::Display, more: Value) -> RequestBuilder {
    let mut body = json!({"model": MODEL, "messages": [{"role": "user", "content": "hello"}]});
    let (Some(body_map), Value::Object(more)) = (body.as_object_mut(), more) else {
        panic!("an object wanted")
    };
    body_map.extend(more);
    client.post(at(addr, "/openai/v1/chat/completions")).json(&body)
}

async fn send(request: RequestBuilder) -> Response {
    within("an answer", SOON, request.send()).await.expect("an answer")
}

/// Sends a request in the background; its answer comes when the task has ended.
fn sent(request: RequestBuilder) -> tokio::task::JoinHandle<Response> {
    tokio::spawn(send(request))
}

/// The chunks of a stream up to `[DONE]`, which must be its end.
async fn chunks(response: Response) -> Vec<Value> {
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    assert_eq!(response.headers()["x-accel-buffering"], "no");
    let text = within("a stream", SOON, response.text()).await.expect("a whole stream");
    let mut data: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    if data.last() == Some(&"[DONE]") {
        data.pop();
    }
    data.into_iter().map(|data| serde_json::from_str(data).expect("JSON")).collect()
}

fn error(answer: &Value) -> (&str, Option<&str>, Option<&str>) {
    let error = &answer["error"];
    assert!(!error["message"].as_str().expect("a message").is_empty(), "{answer}");
    (error["type"].as_str().expect("a type"), error["param"].as_str(), error["code"].as_str())
}

/// An end with a reason and with usage.
fn finished(reason: &str) -> pb::Finish {
    let result = Some(object(&[("finish_reason", reason)]));
    let outcome = Some(pb::finish::Outcome::Success(pb::Success { result }));
    let usage = Some(pb::Usage { tokens_in: 9, tokens_out: 3, ..default() });
    pb::Finish { outcome, usage }
}

#[tokio::test]
async fn a_chat_is_a_task_and_its_answer_tells_reason_and_usage() {
    let server = Local::start(&[]).await;
    let (addr, api) = (server.addr, server.api());
    let mut runner = Runner::connect(&api, "r1", &[MODEL], 1).await;
    for client in clients() {
        let more = json!({"max_tokens": 3, "seed": 7, "metadata": {"team": "demo"}, "user": "u"});
        let answer = sent(chat(&client, addr, more));
        let lease = runner.assigned().await;
        let task = api.get(&lease.task_id).await;
        let spec = task.spec.expect("a spec");
        let (input, params) = (spec.input.expect("an input"), spec.params.expect("parameters"));
        assert_eq!(input.fields.keys().collect::<Vec<_>>(), ["messages"]);
        assert_eq!(params.fields.keys().collect::<Vec<_>>(), ["max_tokens"]);
        assert_eq!((spec.seed, spec.labels["team"].as_str()), (Some(7), "demo"));
        runner.output(&lease, 1, runner::tokens(0, 3), None).await;
        runner.finish(&lease, 4, finished("length")).await;
        runner.credits(1).await;

        let answer = within("the answer", SOON, answer).await.expect("an answer");
        assert_eq!(answer.status(), StatusCode::OK);
        assert_eq!(answer.headers()["x-request-id"], answer.headers()["x-correlation-id"]);
        let answer = body(answer).await;
        assert_eq!(answer["id"], format!("chatcmpl-{}", lease.task_id));
        assert_eq!(answer["object"], "chat.completion");
        assert_eq!(answer["model"], MODEL);
        let created = task.create_time.expect("a time").seconds;
        assert_eq!(answer["created"], created);
        assert_eq!(answer["system_fingerprint"], "scripted-1");
        let choice = &answer["choices"][0];
        assert_eq!(choice["message"]["role"], "assistant");
        assert_eq!(choice["message"]["content"], "t0 t1 t2 ");
        assert_eq!((&choice["index"], &choice["finish_reason"]), (&json!(0), &json!("length")));
        let usage = json!({"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12});
        assert_eq!(answer["usage"], usage);
    }
    server.stop().await;
}

#[tokio::test]
async fn a_stream_brings_role_text_reason_and_usage_in_this_order() {
    let server = Local::start(&[]).await;
    let (addr, api) = (server.addr, server.api());
    let mut runner = Runner::connect(&api, "r1", &[MODEL], 1).await;
    for client in clients() {
        let more = json!({"stream": true, "stream_options": {"include_usage": true}});
        let answer = sent(chat(&client, addr, more));
        let lease = runner.assigned().await;
        runner.output(&lease, 1, runner::tokens(0, 2), None).await;
        let answer = within("the first token", SOON, answer).await.expect("an answer");
        runner.finish(&lease, 3, finished("stop")).await;
        runner.credits(1).await;
        let chunks = chunks(answer).await;
        let deltas: Vec<_> = chunks.iter().map(|chunk| &chunk["choices"][0]["delta"]).collect();
        assert_eq!(*deltas[0], json!({"role": "assistant", "content": ""}));
        assert_eq!(*deltas[1], json!({"content": "t0 "}));
        assert_eq!(*deltas[2], json!({"content": "t1 "}));
        assert_eq!(*deltas[3], json!({}));
        assert_eq!(chunks[3]["choices"][0]["finish_reason"], "stop");
        assert_eq!(chunks[4]["choices"], json!([]));
        assert_eq!(chunks[4]["usage"]["total_tokens"], 12);
        assert_eq!(chunks.len(), 5);
        for chunk in &chunks {
            assert_eq!(chunk["id"], format!("chatcmpl-{}", lease.task_id));
            assert_eq!(chunk["object"], "chat.completion.chunk");
        }
        assert_eq!(chunks[1]["usage"], Value::Null);
    }
    server.stop().await;
}

#[tokio::test]
async fn a_completion_takes_a_prompt_and_gives_text() {
    let server = Local::start(&[]).await;
    let (addr, api) = (server.addr, server.api());
    let mut runner = Runner::connect(&api, "r1", &[MODEL], 1).await;
    let client = Client::new();
    for stream in [false, true] {
        let body_ = json!({"model": MODEL, "prompt": "once", "stream": stream});
        let answer = sent(client.post(at(addr, "/openai/v1/completions")).json(&body_));
        let lease = runner.assigned().await;
        let input = api.get(&lease.task_id).await.spec.expect("a spec").input.expect("an input");
        assert_eq!(input, object(&[("prompt", "once")]));
        runner.output(&lease, 1, runner::tokens(0, 2), None).await;
        runner.finish(&lease, 3, finished("stop")).await;
        runner.credits(1).await;
        let answer = within("the answer", SOON, answer).await.expect("an answer");
        let answers = if stream { chunks(answer).await } else { vec![body(answer).await] };
        let text: String =
            answers.iter().filter_map(|answer| answer["choices"][0]["text"].as_str()).collect();
        assert_eq!(text, "t0 t1 ");
        let last = answers.last().expect("an answer");
        assert_eq!(last["id"], format!("cmpl-{}", lease.task_id));
        assert_eq!(last["object"], "text_completion");
        assert_eq!(last["choices"][0]["finish_reason"], "stop");
        assert!(last.get("usage").is_none() == stream, "{last}");
    }
    server.stop().await;
}

/// The result's text stands in for tokens that an engine does not send.
#[tokio::test]
async fn an_engine_without_tokens_still_gives_its_text() {
    let server = Local::start(&[]).await;
    let (addr, api) = (server.addr, server.api());
    let mut runner = Runner::connect(&api, "r1", &[MODEL], 1).await;
    let client = Client::new();
    for stream in [false, true] {
        let answer = sent(chat(&client, addr, json!({"stream": stream})));
        let lease = runner.assigned().await;
        let result = Some(object(&[("text", "all at once")]));
        let outcome = Some(pb::finish::Outcome::Success(pb::Success { result }));
        runner.finish(&lease, 1, pb::Finish { outcome, usage: None }).await;
        runner.credits(1).await;
        let answer = within("the answer", SOON, answer).await.expect("an answer");
        if stream {
            let chunks = chunks(answer).await;
            assert_eq!(chunks[1]["choices"][0]["delta"]["content"], "all at once");
            assert_eq!(chunks[2]["choices"][0]["finish_reason"], "stop");
        } else {
            let answer = body(answer).await;
            assert_eq!(answer["choices"][0]["message"]["content"], "all at once");
        }
    }
    server.stop().await;
}

#[tokio::test]
async fn calls_of_tools_and_thoughts_are_part_of_the_message() {
    let server = Local::start(&[]).await;
    let (addr, api) = (server.addr, server.api());
    let mut runner = Runner::connect(&api, "r1", &[MODEL], 1).await;
    let client = Client::new();
    let call =
        json!({"id": "c1", "type": "function", "function": {"name": "sum", "arguments": "{}"}});
    let result =
        json!({"text": "", "finish_reason": "tool_calls", "reasoning": "hm", "tool_calls": [call]});
    for stream in [false, true] {
        let answer = sent(chat(&client, addr, json!({"stream": stream})));
        let lease = runner.assigned().await;
        let result = baton::json::struct_from_text(&result.to_string());
        let outcome = Some(pb::finish::Outcome::Success(pb::Success { result }));
        runner.finish(&lease, 1, pb::Finish { outcome, usage: None }).await;
        runner.credits(1).await;
        let answer = within("the answer", SOON, answer).await.expect("an answer");
        let choices = if stream {
            let chunks = chunks(answer).await;
            assert_eq!(chunks[2]["choices"][0]["finish_reason"], "tool_calls");
            chunks[1]["choices"].clone()
        } else {
            body(answer).await["choices"].clone()
        };
        let mut call = call.clone();
        if stream {
            call["index"] = 0.into();
        } else {
            assert_eq!(choices[0]["message"]["content"], Value::Null);
            assert_eq!(choices[0]["finish_reason"], "tool_calls");
        }
        let message = &choices[0][if stream { "delta" } else { "message" }];
        assert_eq!(message["tool_calls"], json!([call]));
        assert_eq!(message["reasoning_content"], "hm");
    }
    server.stop().await;
}

#[tokio::test]
async fn a_client_that_leaves_cancels_its_task() {
    let server = Local::start(&[]).await;
    let (addr, api) = (server.addr, server.api());
    let mut runner = Runner::connect(&api, "r1", &[MODEL], 1).await;
    for client in clients() {
        // In the middle of a stream.
        let answer = sent(chat(&client, addr, json!({"stream": true})));
        let lease = runner.assigned().await;
        runner.output(&lease, 1, runner::tokens(0, 1), None).await;
        let mut answer = within("the first token", SOON, answer).await.expect("an answer");
        within("a chunk", SOON, answer.chunk()).await.expect("a chunk").expect("a chunk");
        drop(answer);
        runner.cancelled(&lease).await;
        api.wait_for(&lease.task_id, &[TaskState::Cancelled], SOON).await;
        runner.credits(1).await;

        // While it waits for the whole answer.
        let answer = sent(chat(&client, addr, json!({})));
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
async fn what_was_sent_is_not_sent_again_when_an_attempt_is_lost() {
    let server = Local::start(&[]).await;
    let (addr, api) = (server.addr, server.api());
    let mut runner = Runner::connect(&api, "r1", &[MODEL], 1).await;
    let client = Client::new();
    for same in [true, false] {
        let answer = sent(chat(&client, addr, json!({"stream": true})));
        let lease = runner.assigned().await;
        runner.output(&lease, 1, runner::tokens(0, 2), None).await;
        let answer = within("the first token", SOON, answer).await.expect("an answer");
        runner.finish(&lease, 3, runner::hand_back()).await;
        runner.credits(1).await;
        let again = runner.assigned().await;
        assert_eq!((&again.task_id, again.attempt), (&lease.task_id, 2));
        let from = u64::from(!same);
        runner.output(&again, 1, runner::tokens(from, 3), None).await;
        if same {
            runner.finish(&again, 4, finished("stop")).await;
        } else {
            // Nobody can use what follows.
            runner.cancelled(&again).await;
        }
        runner.credits(1).await;
        let chunks = chunks(answer).await;
        let text: String = chunks
            .iter()
            .filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str())
            .collect();
        let last = chunks.last().expect("a chunk");
        if same {
            assert_eq!(text, "t0 t1 t2 ");
            assert_eq!(last["choices"][0]["finish_reason"], "stop");
        } else {
            assert_eq!(text, "t0 t1 ");
            assert_eq!(error(last), ("server_error", None, Some("answer_lost")));
        }
    }
    server.stop().await;
}

#[tokio::test]
async fn a_task_that_fails_is_an_error_that_need_not_be_tried_again() {
    let server = Local::start(&[]).await;
    let (addr, api) = (server.addr, server.api());
    let mut runner = Runner::connect(&api, "r1", &[MODEL], 1).await;
    let client = Client::new();
    let failing = |reason: &str| {
        let failure = pb::Failure { reason: reason.into(), message: "too hot".into(), ..default() };
        pb::Finish { outcome: Some(pb::finish::Outcome::Failure(failure)), usage: None }
    };
    for (stream, reason, status, kind, code) in [
        (false, "INPUT_REJECTED", 400, "invalid_request_error", "input_rejected"),
        (true, "INPUT_REJECTED", 400, "invalid_request_error", "input_rejected"),
        (false, "ENGINE_ERROR", 500, "server_error", "engine_error"),
    ] {
        let answer = sent(chat(&client, addr, json!({"stream": stream})));
        let lease = runner.assigned().await;
        runner.finish(&lease, 1, failing(reason)).await;
        runner.credits(1).await;
        let answer = within("the answer", SOON, answer).await.expect("an answer");
        assert_eq!(answer.status().as_u16(), status);
        assert_eq!(answer.headers()["x-should-retry"], "false");
        let answer = body(answer).await;
        assert_eq!(error(&answer), (kind, None, Some(code)));
        assert_eq!(answer["error"]["message"], "too hot");
    }
    let answer = sent(chat(&client, addr, json!({})));
    let lease = runner.assigned().await;
    api.cancel(&lease.task_id).await.expect("a cancelled task");
    let answer = within("the answer", SOON, answer).await.expect("an answer");
    assert_eq!(answer.status(), StatusCode::CONFLICT);
    assert_eq!(error(&body(answer).await).2, Some("cancelled"));
    server.stop().await;
}

#[tokio::test]
async fn what_is_refused_is_an_error_in_the_form_of_that_api() {
    let env = [("BATON_LIMITS_MESSAGE", "64KiB"), ("BATON_QUEUE_MAX_PER_MODEL", "1")];
    let server = Local::start(&env).await;
    let (addr, api) = (server.addr, server.api());
    let client = Client::new();
    let invalid = "invalid_request_error";
    for model in ["test/none", "gpt-4"] {
        let refused = send(chat(&client, addr, json!({"model": model}))).await;
        assert_eq!(refused.status(), StatusCode::NOT_FOUND, "{model}");
        let refused = body(refused).await;
        assert_eq!(error(&refused), (invalid, Some("model"), Some("model_not_found")));
    }
    let mut runner = Runner::connect(&api, "r1", &[MODEL], 1).await;
    api.submit_to(MODEL).await;
    runner.assigned().await;
    api.submit_to(MODEL).await;
    let full = send(chat(&client, addr, json!({}))).await;
    assert_eq!(full.status(), StatusCode::TOO_MANY_REQUESTS);
    let headers = full.headers().clone();
    let number = |name: &str| headers[name].to_str().expect("text").parse::<u64>().expect("number");
    assert_eq!(number("retry-after"), number("retry-after-ms").div_ceil(1_000));
    assert_eq!(error(&body(full).await), ("rate_limit_error", None, Some("rate_limit_exceeded")));

    let many = send(chat(&client, addr, json!({"n": 2}))).await;
    assert_eq!(many.status(), StatusCode::BAD_REQUEST);
    assert_eq!(error(&body(many).await), (invalid, Some("n"), None));
    let long = json!({"messages": [{"role": "user", "content": "x".repeat(70_000)}]});
    let long = send(chat(&client, addr, long)).await;
    assert_eq!(long.status(), StatusCode::PAYLOAD_TOO_LARGE);
    assert_eq!(error(&body(long).await), (invalid, None, Some("message_too_large")));
    let labels = send(chat(&client, addr, json!({"metadata": {"k": "v".repeat(300)}}))).await;
    assert_eq!(error(&body(labels).await), (invalid, Some("metadata"), None));

    let url = || at(addr, "/openai/v1/chat/completions");
    // What a page of another origin can send without asking.
    let plain = send(client.post(url()).header("content-type", "text/plain").body("{}")).await;
    assert_eq!(plain.status(), StatusCode::BAD_REQUEST);
    assert_eq!(error(&body(plain).await), (invalid, Some("content-type"), None));
    let json_ = client.post(url()).header("content-type", "application/json");
    assert_eq!(error(&body(send(json_.body("[")).await).await), (invalid, Some("body"), None));
    let wrong = send(client.get(url())).await;
    assert_eq!(wrong.status(), StatusCode::METHOD_NOT_ALLOWED);
    assert_eq!(error(&body(wrong).await), (invalid, None, None));
    let unknown = send(client.post(at(addr, "/openai/v1/embeddings")).json(&json!({}))).await;
    assert_eq!(unknown.status(), StatusCode::NOT_FOUND);
    assert_eq!(error(&body(unknown).await), (invalid, None, Some("unknown_url")));
    let late = chat(&client, addr, json!({})).header("x-request-timeout", "soon");
    assert_eq!(send(late).await.status(), StatusCode::BAD_REQUEST);
    server.stop().await;
}

#[tokio::test]
async fn a_deadline_of_the_caller_ends_the_task_too() {
    let server = Local::start(&[]).await;
    let (addr, api) = (server.addr, server.api());
    let mut runner = Runner::connect(&api, "r1", &[MODEL], 1).await;
    let late = chat(&Client::new(), addr, json!({})).header("x-request-timeout", "300ms");
    let answer = sent(late);
    let lease = runner.assigned().await;
    let answer = within("the answer", SOON, answer).await.expect("an answer");
    assert_eq!(answer.status(), StatusCode::GATEWAY_TIMEOUT);
    assert_eq!(error(&body(answer).await).2, Some("call_deadline"));
    runner.cancelled(&lease).await;
    server.stop().await;
}

#[tokio::test]
async fn keys_open_what_their_scopes_allow_and_an_open_server_takes_any() {
    let server = Local::start(&[("BATON_AUTH_REQUIRED", "true")]).await;
    let addr = server.addr;
    let admin = auth::admin(&server);
    let (_, reader) = auth::key(&admin, "", &[Scope::TasksRead]).await;
    let (_, writer) = auth::key(&admin, "", &[Scope::TasksWrite]).await;
    let (_, machine) = auth::key(&admin, "", &[Scope::Runner]).await;
    let client = Client::new();
    for wrong in
        [chat(&client, addr, json!({})), chat(&client, addr, json!({})).bearer_auth("sk-1")]
    {
        let wrong = send(wrong).await;
        assert_eq!(wrong.status(), StatusCode::UNAUTHORIZED);
        assert_eq!(wrong.headers()["www-authenticate"], "Bearer");
        let code = Some("invalid_api_key");
        assert_eq!(error(&body(wrong).await), ("invalid_request_error", None, code));
    }
    let mut runner = Runner::connect(&server.api().with_key(&machine), "r1", &[MODEL], 1).await;
    let denied = send(chat(&client, addr, json!({})).bearer_auth(&reader)).await;
    assert_eq!(denied.status(), StatusCode::FORBIDDEN);
    assert_eq!(error(&body(denied).await).2, Some("insufficient_permissions"));
    let answer = sent(chat(&client, addr, json!({})).bearer_auth(&writer));
    runner.serve_one(1).await;
    let answer = within("the answer", SOON, answer).await.expect("an answer");
    assert_eq!(answer.status(), StatusCode::OK);
    server.stop().await;

    let open = Local::start(&[]).await;
    let models = client.get(at(open.addr, "/openai/v1/models")).bearer_auth("sk-unused");
    assert_eq!(send(models).await.status(), StatusCode::OK);
    // One of this server's own is looked at, there too.
    let gone = client.get(at(open.addr, "/openai/v1/models")).bearer_auth(&writer);
    assert_eq!(send(gone).await.status(), StatusCode::UNAUTHORIZED);
    open.stop().await;
}

#[tokio::test]
async fn models_are_those_that_runners_serve() {
    let server = Local::start(&[]).await;
    let (addr, api) = (server.addr, server.api());
    let client = Client::new();
    let list = || async { body(send(client.get(at(addr, "/openai/v1/models"))).await).await };
    assert_eq!(list().await, json!({"object": "list", "data": []}));
    let models = [MODEL, "acme/poem@2"];
    let _one = Runner::connect(&api, "r1", &models, 1).await;
    let _two = Runner::connect(&api, "r2", &["*"], 1).await;
    let listed = list().await;
    let ids: Vec<_> =
        listed["data"].as_array().expect("a list").iter().map(|model| &model["id"]).collect();
    assert_eq!(ids, ["acme/poem@2", MODEL]);
    let model = &listed["data"][1];
    assert_eq!((&model["object"], &model["owned_by"]), (&json!("model"), &json!("test")));
    assert!(model["created"].as_i64() > Some(0), "{model}");
    for path in ["test/echo", "test%2Fecho"] {
        let one = send(client.get(at(addr, &format!("/openai/v1/models/{path}")))).await;
        assert_eq!(body(one).await, *model);
    }
    let any = send(client.get(at(addr, "/openai/v1/models/other/model"))).await;
    assert_eq!(any.status(), StatusCode::OK);
    let none = send(client.get(at(addr, "/openai/v1/models/gpt-4"))).await;
    assert_eq!(none.status(), StatusCode::NOT_FOUND);
    assert_eq!(error(&body(none).await).2, Some("model_not_found"));
    server.stop().await;
}
