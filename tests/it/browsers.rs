//! What browsers need of the HTTP edge: tokens in addresses, gRPC-Web, other origins, compression,
//! and a page that describes the API.

use baton::pb;
use reqwest::{Client, StatusCode};
use serde_json::json;

use crate::{
    gateway::{at, body, clients, events, get, reason, submit},
    harness::{SOON, eventually, local::Local, server::Server, within},
};

const MODEL: &str = "test/echo";

#[tokio::test]
async fn a_browser_streams_with_a_token_that_opens_one_task_and_is_never_logged() {
    let env = [("BATON_AUTH_REQUIRED", "true"), ("BATON_TELEMETRY_LOG_FILTER", "info,baton=trace")];
    let server = Server::start(&env).await;
    let path = server.data_dir().join("admin.key");
    let key = std::fs::read_to_string(path).expect("the first key").trim().to_owned();
    let (addr, api) = (server.addr, server.api().with_key(&key));
    let (mine, other) = (api.submit_to(MODEL).await, api.submit_to(MODEL).await);
    for client in clients() {
        let denied = get(&client, at(addr, "/v1/tasks"), &[]).await;
        assert_eq!(denied.status(), StatusCode::UNAUTHORIZED);
        assert_eq!(denied.headers()["www-authenticate"], "Bearer");
        assert_eq!(reason(&body(denied).await), "UNAUTHENTICATED");
        let bearer = format!("Bearer {key}");
        let allowed = get(&client, at(addr, "/v1/tasks"), &[("authorization", &bearer)]).await;
        assert_eq!(allowed.status(), StatusCode::OK);

        let request = client.post(at(addr, "/v1/tokens")).bearer_auth(&key);
        let issued = request.json(&json!({"taskId": mine})).send().await.expect("an answer");
        let issued = body(issued).await;
        let token = issued["token"].as_str().expect("a token");
        let stream = |task: &str, token: &str| {
            at(addr, &format!("/v1/tasks/{task}/stream?access_token={token}"))
        };
        let opened = get(&client, stream(&mine, token), &[]).await;
        assert_eq!(opened.status(), StatusCode::OK);
        assert_eq!(events(opened, |events| !events.is_empty()).await[0].name, "queued");
        let denied = get(&client, stream(&other, token), &[]).await;
        assert!(matches!(denied.status().as_u16(), 403 | 404), "{}", denied.status());
        let denied = get(&client, stream(&mine, &key), &[]).await;
        assert_eq!(denied.status(), StatusCode::UNAUTHORIZED, "a key does not belong into a URL");
        let both = get(&client, stream(&mine, token), &[("authorization", &bearer)]).await;
        assert_eq!(both.status(), StatusCode::UNAUTHORIZED, "which of the two?");
        let unary = at(addr, &format!("/v1/tasks/{mine}?access_token={token}"));
        assert_eq!(get(&client, unary, &[]).await.status(), StatusCode::BAD_REQUEST);

        let log = server.dir.path().join("server.log");
        let server_log = eventually("the log", SOON, || async {
            let text = std::fs::read_to_string(&log).unwrap_or_default();
            text.contains("call ended").then_some(text)
        })
        .await;
        let (body, secret) = (token.trim_start_matches("btt_"), key.rsplit('_').next());
        assert!(!server_log.contains(body), "the token is in the log");
        assert!(!server_log.contains(secret.expect("a secret")), "the key is in the log");
    }
}

/// A gRPC message in its frame.
fn framed(message: &impl prost::Message) -> Vec<u8> {
    let message = message.encode_to_vec();
    let length = u32::try_from(message.len()).expect("a short message");
    [&[0][..], &length.to_be_bytes(), &message].concat()
}

#[tokio::test]
async fn grpc_web_is_served_on_the_same_port() {
    let server = Local::start(&[]).await;
    let id = server.api().submit_to(MODEL).await;
    for client in clients() {
        let call = async |method: &str, body: Vec<u8>| {
            let url = at(server.addr, &format!("/baton.v1.TaskService/{method}"));
            let request = client.post(url).header("content-type", "application/grpc-web+proto");
            let response = request.header("x-grpc-web", "1").body(body).send();
            let response = within("an answer", SOON, response).await.expect("an answer");
            assert_eq!(response.status(), StatusCode::OK);
            assert_eq!(response.headers()["content-type"], "application/grpc-web+proto");
            response
        };
        let got = call("GetTask", framed(&pb::GetTaskRequest { task_id: id.clone() })).await;
        let got = got.bytes().await.expect("a body");
        let length = u32::from_be_bytes(got[1..5].try_into().expect("four bytes")) as usize;
        let task = <pb::Task as prost::Message>::decode(&got[5..5 + length]).expect("a task");
        assert_eq!(task.task_id, id);
        // Trailers are a frame of their own.
        assert_eq!(got[5 + length], 0x80);
        let trailers = String::from_utf8_lossy(&got[5 + length + 5..]);
        assert!(trailers.contains("grpc-status:0"), "{trailers}");

        let request = pb::StreamTaskRequest { task_id: id.clone(), ..Default::default() };
        let mut stream = call("StreamTask", framed(&request)).await;
        let first = within("an event", SOON, stream.chunk()).await.expect("sound").expect("one");
        let event = <pb::TaskEvent as prost::Message>::decode(&first[5..]).expect("an event");
        assert_eq!(event.sequence, 1);
    }
    server.stop().await;
}

#[tokio::test]
async fn only_pages_of_configured_origins_may_call() {
    let origin = "https://app.example.org";
    let env = [("BATON_HTTP_CORS_ORIGINS", "https://app.example.org, http://localhost:5173")];
    let (open, closed) = (Local::start(&env).await, Local::start(&[]).await);
    let client = Client::new();
    let ask = async |server: &Local, path: &str, origin: &str| {
        let asked = client
            .request(reqwest::Method::OPTIONS, at(server.addr, path))
            .header("origin", origin)
            .header("access-control-request-method", "POST")
            .header("access-control-request-headers", "authorization,content-type")
            .send();
        within("an answer", SOON, asked).await.expect("an answer").headers().clone()
    };
    for path in ["/v1/tasks", "/baton.v1.TaskService/SubmitTask"] {
        let allowed = ask(&open, path, origin).await;
        assert_eq!(allowed["access-control-allow-origin"], origin, "{path}");
        assert_eq!(allowed["access-control-allow-headers"], "authorization,content-type");
        assert!(!allowed.contains_key("access-control-allow-credentials"));
        for (server, origin) in [(&open, "https://evil.example.org"), (&closed, origin)] {
            let denied = ask(server, path, origin).await;
            assert!(!denied.contains_key("access-control-allow-origin"), "{path}");
        }
    }
    let read = get(&client, at(open.addr, "/v1/nothing"), &[("origin", origin)]).await;
    assert_eq!(read.headers()["access-control-allow-origin"], origin);
    let exposed = read.headers()["access-control-expose-headers"].to_str().expect("text");
    assert!(exposed.contains("x-correlation-id") && exposed.contains("retry-after"), "{exposed}");
    open.stop().await;
    closed.stop().await;
}

#[tokio::test]
async fn pages_of_strangers_do_not_reach_a_server_without_credentials() {
    let hosts = [("BATON_HTTP_ALLOWED_HOSTS", "baton.test")];
    let (open, named) = (Local::start(&[]).await, Local::start(&hosts).await);
    let locked = Local::start(&[("BATON_AUTH_REQUIRED", "true")]).await;
    let client = Client::new();
    let id = submit(&client, open.addr).await;
    let paths = ["/v1/tasks", "/docs", "/openapi.json", "/metrics", "/readyz", "/v1/nothing"];
    let stream = format!("/v1/tasks/{id}/stream");
    for path in paths.into_iter().chain([&*stream]) {
        // The name of a page that was made to point here.
        let rebound = [("host", "evil.example.org")];
        let refused = get(&client, at(open.addr, path), &rebound).await;
        assert_eq!(refused.status(), StatusCode::FORBIDDEN, "{path}");
        let refused = body(refused).await;
        let message = refused["message"].as_str().unwrap_or_default();
        assert_eq!(reason(&refused), "PERMISSION_DENIED");
        assert!(message.contains("http.allowed_hosts"), "{message}");
        let own = get(&client, at(open.addr, path), &[("host", "localhost:1")]).await;
        assert_ne!(own.status(), StatusCode::FORBIDDEN, "{path}");
    }
    let by_name = [("host", "baton.test:7070")];
    assert_eq!(get(&client, at(open.addr, "/v1/tasks"), &by_name).await.status(), 403);
    assert_eq!(get(&client, at(named.addr, "/v1/tasks"), &by_name).await.status(), 200);
    // With credentials there is nothing that a browser would add by itself.
    let rebound = [("host", "evil.example.org")];
    assert_eq!(get(&client, at(locked.addr, "/v1/tasks"), &rebound).await.status(), 401);

    for path in [&*format!("/v1/tasks/{id}/cancel"), "/baton.v1.TaskService/CancelTask"] {
        for origin in ["https://evil.example.org", "null"] {
            let sent = client.post(at(open.addr, path)).header("origin", origin);
            let sent = sent.json(&json!({ "taskId": id })).send();
            let sent = within("an answer", SOON, sent).await.expect("an answer");
            assert_eq!(sent.status(), StatusCode::FORBIDDEN, "{path} {origin}");
            assert!(body(sent).await["message"].to_string().contains("http.cors_origins"));
        }
    }
    assert_eq!(open.api().get(&id).await.state(), pb::TaskState::Queued);
    for server in [open, named, locked] {
        server.stop().await;
    }
}

#[tokio::test]
async fn whole_answers_are_compressed_and_streams_are_not() {
    let server = Local::start(&[]).await;
    let (addr, client) = (server.addr, Client::new());
    for _ in 0..10 {
        submit(&client, addr).await;
    }
    for encoding in ["gzip", "zstd"] {
        let accept = ("accept-encoding", encoding);
        let list = get(&client, at(addr, "/v1/tasks"), &[accept]).await;
        assert_eq!(list.headers()["content-encoding"], encoding);
        let short = get(&client, at(addr, "/v1/queues/test/echo"), &[accept]).await;
        assert!(!short.headers().contains_key("content-encoding"));
        let array = ("accept", "application/json");
        let watch = get(&client, at(addr, "/v1/tasks:watch"), &[accept, array]).await;
        assert!(!watch.headers().contains_key("content-encoding"));
    }
    server.stop().await;
}

#[tokio::test]
async fn the_api_describes_itself_and_its_page_needs_nothing_from_elsewhere() {
    let server = Local::start(&[]).await;
    let client = Client::new();
    let api = body(get(&client, at(server.addr, "/openapi.json"), &[]).await).await;
    assert_eq!(api["openapi"], "3.1.0");
    let submit = &api["paths"]["/v1/tasks"]["post"];
    assert_eq!(submit["operationId"], "TaskService_SubmitTask");
    assert!(submit["description"].as_str().unwrap_or_default().starts_with("Accepts a task."));
    let schema = "#/components/schemas/SubmitTaskResponse";
    let answer = &submit["responses"]["202"]["content"]["application/json"]["schema"];
    assert_eq!(answer["$ref"], schema);
    let pause = &api["paths"]["/v1/queues/{model_1}/{model_2}:pause"]["post"]["parameters"];
    assert_eq!(pause.as_array().map(Vec::len), Some(2));
    // Every reference leads somewhere.
    let text = api.to_string();
    for reference in text.split("\"$ref\":\"#").skip(1) {
        let pointer = reference.split('"').next().unwrap_or_default();
        assert!(api.pointer(pointer).is_some_and(|found| !found.is_null()), "{pointer}");
    }
    let page = get(&client, at(server.addr, "/docs"), &[]).await;
    let policy = page.headers()["content-security-policy"].to_str().expect("text").to_owned();
    assert!(policy.contains("default-src 'none'"), "{policy}");
    let page = page.text().await.expect("text");
    for path in page.split('"').filter(|text| text.starts_with("/docs/")) {
        assert_eq!(get(&client, at(server.addr, path), &[]).await.status(), 200, "{path}");
    }
    assert!(!page.contains("http://") && !page.contains("https://"));
    server.stop().await;

    let quiet = Local::start(&[("BATON_SERVER_REFLECTION", "false")]).await;
    assert_eq!(get(&client, at(quiet.addr, "/openapi.json"), &[]).await.status(), 404);
    quiet.stop().await;
}
