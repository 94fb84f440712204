//! The job routes: off by default, and a job's way from its submit to its result and its files.

use baton::pb::{self, TaskState};
use reqwest::{Client, RequestBuilder, Response, StatusCode, redirect};
use serde_json::{Value, json};

use crate::{
    artifacts,
    gateway::{at, body},
    harness::{
        SOON, default,
        local::Local,
        object,
        runner::{self, Runner},
        within,
    },
};

const MODEL: &str = "test/echo";
const ON: &[(&str, &str)] = &[("BATON_HTTP_JOB_ROUTES", "true")];

async fn send(request: RequestBuilder) -> Response {
    within("an answer", SOON, request.send()).await.expect("an answer")
}

async fn get(server: &Local, path: &str) -> (u16, Value) {
    let answer = send(Client::new().get(at(server.addr, path))).await;
    (answer.status().as_u16(), body(answer).await)
}

async fn post(server: &Local, path: &str, input: Value) -> (u16, Value) {
    let answer = send(Client::new().post(at(server.addr, path)).json(&input)).await;
    (answer.status().as_u16(), body(answer).await)
}

#[tokio::test]
async fn they_are_off_unless_switched_on() {
    let server = Local::start(&[]).await;
    for path in ["/jobs", "/jobs/x", "/requests/x", "/api/status/x", "/upload"] {
        assert_eq!(get(&server, path).await.0, 404, "{path}");
    }
    server.stop().await;
}

#[tokio::test]
async fn a_job_goes_from_its_submit_to_its_result_and_its_files() {
    let server = Local::start(ON).await;
    let api = server.api();
    let job = json!({
        "model_id": "test/echo", "version_id": "2", "payload": {"text": "hello"},
        "options": {"repeat": 1}, "labels": {"team": "demo"}, "request_id": "once",
    });
    let (code, submitted) = post(&server, "/jobs", job.clone()).await;
    assert_eq!((code, &submitted["status"]), (202, &json!("PENDING")), "{submitted}");
    let id = submitted["job_id"].as_str().expect("an id");
    assert_eq!(post(&server, "/jobs", job).await.1["job_id"], id);
    let spec = api.get(id).await.spec.expect("a spec");
    assert_eq!((spec.model.as_str(), spec.labels["team"].as_str()), ("test/echo@2", "demo"));
    assert_eq!(spec.input, Some(object(&[("text", "hello")])));

    let (code, waiting) = get(&server, &format!("/jobs/{id}")).await;
    assert_eq!((code, &waiting["queue_position"]), (200, &json!(1)));
    assert_eq!(waiting["timeline"][0]["status"], "PENDING");
    let (code, early) = get(&server, &format!("/jobs/{id}/result")).await;
    assert_eq!((code, &early["reason"]), (409, &json!("STATE_CONFLICT")));
    let (code, queued) = get(&server, &format!("/requests/{id}")).await;
    assert_eq!((code, &queued["status"]), (202, &json!("IN_QUEUE")));

    let mut runner = Runner::connect(&api, "r1", &["test/echo@2"], 1).await;
    let lease = runner.assigned().await;
    let stage = pb::StageEvent { name: "OCR_PROCESSING".into(), progress: Some(0.5), ..default() };
    let stage = pb::RunnerEvent { body: Some(pb::runner_event::Body::Stage(stage)), ..default() };
    let token = api.with_key(&lease.attempt_token);
    let pdf = |name: &str| pb::ArtifactSpec { r#type: "pdf".into(), ..artifacts::spec(name) };
    let first = artifacts::put(&token, pdf("a.pdf"), b"one").await.expect("an artifact");
    let second = artifacts::put(&token, pdf("b.pdf"), b"two").await.expect("an artifact");
    let file = |artifact: &pb::Artifact| pb::RunnerEvent {
        body: Some(pb::runner_event::Body::ArtifactReceipt(artifact.receipt.clone())),
        ..default()
    };
    runner.output(&lease, 1, vec![stage], None).await;
    runner.acked(&lease, 1).await;
    let (_, status) = get(&server, &format!("/api/status/{id}")).await;
    assert_eq!(
        (&status["status"], &status["stage"]),
        (&json!("RUNNING"), &json!("OCR_PROCESSING"))
    );
    assert_eq!(status["progress"], 0.5);
    let output = vec![file(&first), file(&second), runner::token("some text")];
    runner.output(&lease, 2, output, None).await;
    runner.finish(&lease, 5, runner::success()).await;
    api.wait_for(id, &[TaskState::Succeeded], SOON).await;

    let (_, done) = get(&server, &format!("/jobs/{id}")).await;
    assert_eq!((&done["status"], &done["stage"]), (&json!("COMPLETE"), &Value::Null));
    assert_eq!((&done["model_id"], &done["version_id"]), (&json!(MODEL), &json!("2")));
    assert_eq!(done["artifacts"][0]["type"], "pdf");
    let (_, timeline) = get(&server, &format!("/jobs/{id}/timeline")).await;
    assert_eq!(timeline["timeline"], done["timeline"]);
    let words: Vec<_> =
        timeline["timeline"].as_array().expect("a list").iter().map(|it| &it["status"]).collect();
    let expected = ["PENDING", "RUNNING", "OCR_PROCESSING", "ARTEFACT", "ARTEFACT", "COMPLETE"];
    assert_eq!(words, expected);
    let (_, result) = get(&server, &format!("/jobs/{id}/result?format=json")).await;
    assert_eq!(
        (&result["result"], &result["text"]),
        (&json!({"done": "yes"}), &json!("some text"))
    );
    assert_eq!(get(&server, &format!("/api/result/{id}")).await.1, result);
    let text =
        send(Client::new().get(at(server.addr, &format!("/jobs/{id}/result?format=text")))).await;
    assert_eq!(text.headers()["content-type"], "text/plain; charset=utf-8");
    assert_eq!(text.text().await.expect("text"), "some text");
    assert_eq!(get(&server, &format!("/jobs/{id}/result?format=xml")).await.0, 400);
    let (code, request) = get(&server, &format!("/requests/{id}")).await;
    assert_eq!((code, &request["status"]), (200, &json!("COMPLETED")));
    assert_eq!(request["artifacts"][0]["url"], first.url);

    let still = Client::builder().redirect(redirect::Policy::none()).build().expect("a client");
    let path = |name: &str| at(server.addr, &format!("/jobs/{id}/artefacts/{name}"));
    let found = send(still.get(path("a.pdf"))).await;
    assert_eq!(found.status(), StatusCode::TEMPORARY_REDIRECT);
    assert_eq!(found.headers()["location"], first.url);
    let followed = send(Client::new().get(path("b.pdf"))).await;
    assert_eq!(followed.bytes().await.expect("bytes"), "two");
    assert_eq!(send(still.get(path("c.pdf"))).await.status(), StatusCode::NOT_FOUND);
    server.stop().await;
}

#[tokio::test]
async fn lists_are_filtered_and_what_is_wrong_is_named() {
    let server = Local::start(ON).await;
    let job = |model: &str| json!({"model_id": model, "payload": {}});
    let (_, first) = post(&server, "/jobs", job("test/echo")).await;
    let (_, second) = post(&server, "/jobs", job("test/other")).await;
    let id = first["id"].as_str().expect("an id");
    let path = format!("/jobs/{id}/cancel");
    let (code, cancelled) = post(&server, &path, json!({"reason": "no longer needed"})).await;
    assert_eq!((code, &cancelled["status"]), (200, &json!("CANCELLED")));
    let (_, one) = get(&server, &format!("/jobs/{id}/result")).await;
    assert!(one["detail"].as_str().expect("text").contains("CANCELLED"), "{one}");

    for (query, ids) in [
        ("", vec![&second["id"], &first["id"]]),
        ("?status=CANCELLED", vec![&first["id"]]),
        ("?status=PENDING&limit=5", vec![&second["id"]]),
        ("?model_id=test/other", vec![&second["id"]]),
        ("?status=ERROR", vec![]),
    ] {
        let (_, list) = get(&server, &format!("/jobs{query}")).await;
        let listed: Vec<_> =
            list["jobs"].as_array().expect("a list").iter().map(|job| &job["id"]).collect();
        assert_eq!(listed, ids, "{query}");
    }
    for (input, named) in [
        (json!({}), "model_id"),
        (json!({"model_id": "test/echo", "payload": 1}), "payload"),
        (json!({"model_id": "test/echo", "file": "x"}), "file"),
        (json!({"model_id": "no model"}), "spec.model"),
    ] {
        let (code, refused) = post(&server, "/jobs", input).await;
        assert_eq!((code, &refused["reason"]), (400, &json!("INVALID_PARAMS")));
        assert!(refused["detail"].as_str().expect("text").contains(named), "{refused}");
    }
    assert_eq!(get(&server, "/jobs?status=DONE").await.0, 400);
    assert_eq!(get(&server, "/jobs?color=red").await.0, 400);
    assert_eq!(get(&server, "/jobs/none").await.0, 404);
    let wrong = send(Client::new().put(at(server.addr, "/jobs")).json(&json!({}))).await;
    assert_eq!(wrong.status(), StatusCode::METHOD_NOT_ALLOWED);
    server.stop().await;
}

/// A form with these fields; the one named `file` has a file name.
fn form(server: &Local, fields: &[(&str, &[u8])]) -> RequestBuilder {
    let mut bytes = Vec::new();
    for (name, value) in fields {
        let file = if *name == "file" {
            "; filename=\"C:\\dir\\scan.pdf\"\r\nContent-Type: application/pdf"
        } else {
            ""
        };
        let head =
            format!("--cut\r\nContent-Disposition: form-data; name=\"{name}\"{file}\r\n\r\n");
        bytes.extend_from_slice(head.as_bytes());
        bytes.extend_from_slice(value);
        bytes.extend_from_slice(b"\r\n");
    }
    bytes.extend_from_slice(b"--cut--\r\n");
    let request = Client::new().post(at(server.addr, "/upload"));
    request.header("content-type", "multipart/form-data; boundary=cut").body(bytes)
}

#[tokio::test]
async fn a_file_of_a_form_is_kept_and_is_the_input_of_a_job_that_the_form_names() {
    let server = Local::start(ON).await;
    let api = server.api();
    // Larger than one message, and than the bodies that frameworks take by default.
    let scan: Vec<u8> = (0..3_000_000_u32).map(|at| (at % 251) as u8).collect();
    let answer = send(form(&server, &[("file", &scan)])).await;
    assert_eq!(answer.status(), StatusCode::CREATED);
    let kept = body(answer).await;
    assert_eq!((&kept["name"], &kept["size_bytes"]), (&json!("scan.pdf"), &json!(3_000_000)));
    assert_eq!(kept["mime_type"], "application/pdf");
    let url = kept["url"].as_str().expect("an address");
    let content = send(Client::new().get(at(server.addr, url))).await;
    assert!(content.bytes().await.expect("bytes") == scan);

    let fields: [(&str, &[u8]); 4] = [
        ("model_id", MODEL.as_bytes()),
        ("file", &scan),
        ("payload", br#"{"language": "lo"}"#),
        ("options", br#"{"repeat": 2}"#),
    ];
    let answer = send(form(&server, &fields)).await;
    assert_eq!(answer.status(), StatusCode::ACCEPTED);
    let job = body(answer).await;
    assert_eq!(job["file"]["sha256"], kept["sha256"]);
    let id = job["task_id"].as_str().expect("an id");
    let spec = api.get(id).await.spec.expect("a spec");
    let input = baton::json::text_from_struct(&spec.input.expect("an input"));
    let input: Value = serde_json::from_str(&input).expect("JSON");
    let file = json!({"$artifact": job["file"]["artifact_id"]});
    assert_eq!(input, json!({"file": file, "language": "lo"}));
    let (_, status) = get(&server, &format!("/api/status/{id}")).await;
    assert_eq!(status["status"], "PENDING");
    server.stop().await;
}

#[tokio::test]
async fn a_form_that_breaks_off_or_is_none_leaves_no_artifact() {
    let server = Local::start(ON).await;
    let whole = form(&server, &[("file", &vec![7; 400_000])]).build().expect("a request");
    let bytes = whole.body().and_then(|body| body.as_bytes()).expect("bytes");
    let cut = bytes[..bytes.len() - 100].to_vec();
    let cases = [
        (form(&server, &[]).body(cut), "form"),
        (form(&server, &[("model_id", b"a/b")]), "file: is required"),
        (form(&server, &[("file", b"x"), ("priority", b"high")]), "priority: is not JSON"),
        (Client::new().post(at(server.addr, "/upload")).json(&json!({})), "content-type"),
    ];
    for (request, said) in cases {
        let answer = send(request).await;
        assert_eq!(answer.status(), StatusCode::BAD_REQUEST, "{said}");
        let refusal = body(answer).await;
        assert!(refusal["detail"].as_str().expect("text").contains(said), "{refusal}");
    }
    let list = server.api().artifacts().list_artifacts(pb::ListArtifactsRequest::default()).await;
    let sizes: Vec<_> =
        list.expect("a list").into_inner().artifacts.iter().map(|it| it.size_bytes).collect();
    assert_eq!(sizes, [1], "of the form whose priority is wrong; the broken one left nothing");
    server.stop().await;
}
