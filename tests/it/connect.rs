//! The Connect protocol, as its specification has it: unary calls and server streams, in JSON and
//! in protobuf, over both versions of HTTP.

use base64::{Engine as _, engine::general_purpose::STANDARD_NO_PAD};
use baton::pb;
use prost::Message as _;
use reqwest::{Client, Response, StatusCode};
use serde_json::{Value, json};

use crate::{
    gateway::{at, body, clients, submit},
    harness::{SOON, local::Local, within},
};

const MODEL: &str = "test/echo";
const UNKNOWN: &str = "018f0000-0000-7000-8000-000000000000";

/// Calls a method with a body of a content type.
async fn call(
    (client, server): (&Client, &Local),
    method: &str,
    kind: &str,
    body: Vec<u8>,
    headers: &[(&str, &str)],
) -> Response {
    let url = at(server.addr, &format!("/baton.v1.TaskService/{method}"));
    let mut request = client.post(url).header("content-type", kind).body(body);
    request = request.header("connect-protocol-version", "1");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    within("an answer", SOON, request.send()).await.expect("an answer")
}

/// A message in its envelope.
fn envelope(message: &[u8]) -> Vec<u8> {
    let length = u32::try_from(message.len()).expect("a short message");
    [&[0][..], &length.to_be_bytes(), message].concat()
}

/// The messages of a stream and its end.
async fn envelopes(response: Response) -> (Vec<Vec<u8>>, Value) {
    assert_eq!(response.status(), StatusCode::OK);
    let text = within("the end", SOON, response.bytes()).await.expect("a whole stream");
    let (mut rest, mut messages) = (&text[..], Vec::new());
    loop {
        let length = u32::from_be_bytes(rest[1..5].try_into().expect("four bytes")) as usize;
        let (flags, message) = (rest[0], rest[5..5 + length].to_vec());
        rest = &rest[5 + length..];
        if flags == 2 {
            assert!(rest.is_empty(), "nothing after the end");
            return (messages, serde_json::from_slice(&message).expect("JSON"));
        }
        assert_eq!(flags, 0);
        messages.push(message);
    }
}

/// The `ErrorInfo` of an error.
fn reason(error: &Value) -> String {
    let details = error["details"].as_array().expect("details");
    let is_info = |detail: &&Value| detail["type"] == "google.rpc.ErrorInfo";
    let info = details.iter().find(is_info).expect("an ErrorInfo");
    let value = info["value"].as_str().expect("base64");
    let value = STANDARD_NO_PAD.decode(value).expect("base64 without padding");
    let decoded = pb::google::rpc::ErrorInfo::decode(&*value).expect("a message");
    assert_eq!(info["debug"]["reason"], decoded.reason);
    decoded.reason
}

#[tokio::test]
async fn unary_calls_are_made_in_json_and_in_protobuf() {
    let server = Local::start(&[("BATON_LIMITS_MESSAGE", "64KiB")]).await;
    for client in clients() {
        let to = (&client, &server);
        let request = json!({"spec": {"model": MODEL, "input": {"text": "hello"}}}).to_string();
        let submitted = call(to, "SubmitTask", "application/json", request.into(), &[]).await;
        assert_eq!(submitted.status(), StatusCode::OK);
        assert_eq!(submitted.headers()["content-type"], "application/json");
        let id = body(submitted).await["task"]["taskId"].as_str().expect("an id").to_owned();

        let request = pb::GetTaskRequest { task_id: id.clone() }.encode_to_vec();
        let got = call(to, "GetTask", "application/proto", request, &[]).await;
        assert_eq!(got.headers()["content-type"], "application/proto");
        let got = pb::Task::decode(got.bytes().await.expect("a body")).expect("a task");
        assert_eq!(got.task_id, id);

        let unknown = pb::GetTaskRequest { task_id: UNKNOWN.into() }.encode_to_vec();
        let unknown = call(to, "GetTask", "application/proto", unknown, &[]).await;
        assert_eq!(unknown.status(), StatusCode::NOT_FOUND);
        assert_eq!(unknown.headers()["content-type"], "application/json");
        let unknown = body(unknown).await;
        assert_eq!((&unknown["code"], &*reason(&unknown)), (&json!("not_found"), "NOT_FOUND"));

        let refused = async |kind: &str, content: Vec<u8>, headers: &[(&str, &str)]| {
            let refused = call(to, "GetTask", kind, content, headers).await;
            let code = refused.status().as_u16();
            (code, body(refused).await["code"].clone())
        };
        let json = "application/json";
        assert_eq!(refused(json, b"{".into(), &[]).await, (400, json!("invalid_argument")));
        let typo = br#"{"taskid": "x"}"#;
        assert_eq!(refused(json, typo.into(), &[]).await, (400, json!("invalid_argument")));
        let large = vec![b' '; 70_000];
        assert_eq!(refused(json, large, &[]).await, (429, json!("resource_exhausted")));
        let packed = [("content-encoding", "gzip")];
        assert_eq!(refused(json, b"x".into(), &packed).await, (501, json!("unimplemented")));
        let timeout = [("connect-timeout-ms", "soon")];
        assert_eq!(refused(json, b"{}".into(), &timeout).await, (400, json!("invalid_argument")));
        let version = [("connect-protocol-version", "2")];
        let later = client.post(at(server.addr, "/baton.v1.TaskService/GetTask"));
        let later = later.header(version[0].0, version[0].1).json(&json!({})).send().await;
        assert_eq!(body(later.expect("an answer")).await["code"], "invalid_argument");
    }
    server.stop().await;
}

#[tokio::test]
async fn streams_come_in_envelopes_and_end_with_what_became_of_them() {
    let server = Local::start(&[]).await;
    for client in clients() {
        let to = (&client, &server);
        let id = submit(&client, server.addr).await;
        let json = |id: &str| envelope(json!({ "taskId": id }).to_string().as_bytes());
        let request = pb::StreamTaskRequest { task_id: id.clone(), ..Default::default() };
        let proto = envelope(&request.encode_to_vec());
        let (as_json, as_proto) = ("application/connect+json", "application/connect+proto");
        let one = call(to, "StreamTask", as_json, json(&id), &[]).await;
        let two = call(to, "StreamTask", as_proto, proto, &[]).await;
        assert_eq!(one.headers()["content-type"], as_json);
        assert_eq!(two.headers()["content-type"], as_proto);
        let soon = [("connect-timeout-ms", "200")];
        let (events, end) =
            envelopes(call(to, "StreamTask", as_json, json(&id), &soon).await).await;
        assert_eq!((events.len(), &end["error"]["code"]), (1, &json!("deadline_exceeded")));
        assert_eq!(reason(&end["error"]), "CALL_DEADLINE");

        server.api().cancel(&id).await.expect("a cancel");
        let (one, end) = envelopes(one).await;
        assert!(end.get("error").is_none(), "{end}");
        let (two, end) = envelopes(two).await;
        assert!(end.get("error").is_none(), "{end}");
        let one: Vec<Value> =
            one.iter().map(|event| serde_json::from_slice(event).expect("JSON")).collect();
        let names = [("1", "queued"), ("2", "ended")];
        for (event, (sequence, name)) in one.iter().zip(names) {
            assert_eq!((&event["sequence"], event[name].is_object()), (&json!(sequence), true));
        }
        let two: Vec<u64> = two
            .iter()
            .map(|event| pb::TaskEvent::decode(&**event).expect("an event").sequence)
            .collect();
        assert_eq!((one.len(), two), (2, vec![1, 2]));

        let unknown = call(to, "StreamTask", as_json, json(UNKNOWN), &[]).await;
        let (events, end) = envelopes(unknown).await;
        assert_eq!((events.len(), &end["error"]["code"]), (0, &json!("not_found")));
        for broken in [&b"{}"[..], &[0, 0, 0, 0, 9, b'{'], &[2, 0, 0, 0, 0]] {
            let broken = call(to, "StreamTask", as_json, broken.into(), &[]).await;
            assert_eq!(envelopes(broken).await.1["error"]["code"], "invalid_argument");
        }
        let packed = [&[1][..], &[0; 4]].concat();
        let packed = call(to, "StreamTask", as_json, packed, &[]).await;
        assert_eq!(envelopes(packed).await.1["error"]["code"], "unimplemented");

        for (method, kind, accepted) in [
            ("StreamTask", "application/json", "application/connect+json"),
            ("GetTask", "application/connect+json", "application/json"),
        ] {
            let wrong = call(to, method, kind, b"{}".into(), &[]).await;
            assert_eq!(wrong.status(), StatusCode::UNSUPPORTED_MEDIA_TYPE);
            let accept = wrong.headers()["accept-post"].to_str().expect("text");
            assert!(accept.starts_with(accepted), "{accept}");
        }
    }
    server.stop().await;
}
