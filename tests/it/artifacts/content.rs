//! The bytes over plain HTTP.

use std::time::Duration;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use baton::pb::{self, Scope};
use reqwest::{Client, Method, Response, StatusCode, header::HeaderMap};
use serde_json::{Value, json};
use tonic::Code;

use super::{listed, noise, put, sha256, spec};
use crate::{
    auth,
    gateway::{at, body, clients, reason},
    harness::{SOON, local::Local, within},
};

async fn get(client: &Client, method: Method, url: String, headers: &[(&str, &str)]) -> Response {
    let mut request = client.request(method, url);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    within("an answer", SOON, request.send()).await.expect("an answer")
}

fn header<'h>(headers: &'h HeaderMap, name: &str) -> &'h str {
    headers.get(name).map_or("", |value| value.to_str().expect("ASCII"))
}

#[tokio::test]
async fn bytes_come_whole_in_ranges_and_not_at_all_as_the_headers_say() {
    let server = Local::start(&[]).await;
    let bytes = noise(100_000, 1);
    let named = pb::ArtifactSpec { mime_type: "text/html".into(), ..spec("ü \"x\".html") };
    let artifact = put(&server.api(), named, &bytes).await.expect("an artifact");
    let etag = format!("\"{}\"", sha256(&bytes));
    assert_eq!(artifact.url, format!("/v1/artifacts/{}/content", artifact.artifact_id));
    let url = || at(server.addr, &artifact.url);
    let weak = format!("W/{etag}");
    for client in clients() {
        let whole = get(&client, Method::GET, url(), &[("accept-encoding", "gzip")]).await;
        assert_eq!(whole.status(), StatusCode::OK);
        let headers = whole.headers().clone();
        for (name, value) in [
            ("content-length", "100000"),
            ("content-type", "text/html"),
            ("etag", &etag),
            ("accept-ranges", "bytes"),
            ("x-content-type-options", "nosniff"),
            ("content-security-policy", "sandbox; default-src 'none'"),
            ("cache-control", "private, no-cache"),
            ("content-encoding", ""),
        ] {
            assert_eq!(header(&headers, name), value, "{name}");
        }
        let disposition = header(&headers, "content-disposition");
        assert!(disposition.starts_with("attachment; filename=\"_ _x_.html\";"), "{disposition}");
        assert!(disposition.ends_with("filename*=UTF-8''%C3%BC%20%22x%22.html"), "{disposition}");
        assert_eq!(whole.bytes().await.expect("bytes"), bytes);

        let head = get(&client, Method::HEAD, url(), &[("range", "bytes=1-2")]).await;
        assert_eq!(
            (head.status(), header(head.headers(), "content-length")),
            (StatusCode::OK, "100000")
        );

        for (range, first, last) in [
            ("bytes=0-0", 0, 0),
            ("bytes=5-99", 5, 99),
            ("bytes=99990-", 99_990, 99_999),
            ("bytes=-10", 99_990, 99_999),
            ("bytes=50000-999999", 50_000, 99_999),
        ] {
            let part = get(&client, Method::GET, url(), &[("range", range)]).await;
            assert_eq!(part.status(), StatusCode::PARTIAL_CONTENT, "{range}");
            let said = header(part.headers(), "content-range").to_owned();
            assert_eq!(said, format!("bytes {first}-{last}/100000"));
            assert_eq!(header(part.headers(), "content-length"), (last - first + 1).to_string());
            assert_eq!(part.bytes().await.expect("bytes"), &bytes[first..=last]);
        }
        let beyond = get(&client, Method::GET, url(), &[("range", "bytes=100000-")]).await;
        assert_eq!(beyond.status(), StatusCode::RANGE_NOT_SATISFIABLE);
        assert_eq!(header(beyond.headers(), "content-range"), "bytes */100000");
        assert_eq!(reason(&body(beyond).await), "INVALID_PARAMS");

        for (name, value, range, code) in [
            ("if-none-match", etag.as_str(), false, 304),
            ("if-none-match", &weak, false, 304),
            ("if-none-match", "\"other\"", false, 200),
            ("if-match", "\"other\"", false, 412),
            ("if-match", &etag, true, 206),
            ("if-range", &etag, true, 206),
            ("if-range", "\"other\"", true, 200),
        ] {
            let mut headers = vec![(name, value)];
            if range {
                headers.push(("range", "bytes=1-2"));
            }
            let answer = get(&client, Method::GET, url(), &headers).await;
            assert_eq!(answer.status(), code, "{name}: {value}");
        }
        let shown = get(&client, Method::GET, url() + "?disposition=inline", &[]).await;
        assert!(header(shown.headers(), "content-disposition").starts_with("inline"));
        assert_eq!(
            header(shown.headers(), "content-security-policy"),
            "sandbox; default-src 'none'"
        );
        for query in ["?disposition=x", "?what=1", "?disposition=inline&a=b"] {
            let wrong = get(&client, Method::GET, url() + query, &[]).await;
            assert_eq!(wrong.status(), StatusCode::BAD_REQUEST, "{query}");
        }
        let post = get(&client, Method::POST, url(), &[]).await;
        assert_eq!(post.status(), StatusCode::METHOD_NOT_ALLOWED);
        assert_eq!(header(post.headers(), "allow"), "GET, HEAD, OPTIONS");
        let none = at(server.addr, "/v1/artifacts/0192f0c1-2345-7abc-8def-0123456789ab/content");
        let none = get(&client, Method::GET, none, &[]).await;
        assert_eq!(none.status(), StatusCode::NOT_FOUND);
        let escape =
            get(&client, Method::GET, at(server.addr, "/v1/artifacts/..%2f..%2fetc/content"), &[])
                .await;
        assert_eq!(escape.status(), StatusCode::BAD_REQUEST);
    }
    server.stop().await;
}

#[tokio::test]
async fn artifacts_are_made_listed_and_deleted_as_json() {
    let server = Local::start(&[]).await;
    let [client, _] = clients();
    let make = |name: &str, bytes: &[u8]| {
        let made = json!({"spec": {"name": name, "mimeType": "text/plain"}, "data": STANDARD.encode(bytes)});
        client.post(at(server.addr, "/v1/artifacts")).json(&made).send()
    };
    let first = make("a.txt", b"hello").await.expect("an answer");
    assert_eq!(first.status(), StatusCode::CREATED);
    let first = body(first).await;
    assert_eq!((&first["type"], &first["sizeBytes"]), (&json!("text"), &json!("5")));
    assert_eq!(first["sha256"], sha256(b"hello"));
    make("b.txt", b"").await.expect("an answer");
    for name in ["../x", "a\u{0}b", "", "a/b", "a\\b", &"x".repeat(256)] {
        let refused = make(name, b"x").await.expect("an answer");
        assert_eq!(refused.status(), StatusCode::BAD_REQUEST, "{name:?}");
    }
    let page = client.get(at(server.addr, "/v1/artifacts?pageSize=1")).send().await;
    let page = body(page.expect("an answer")).await;
    assert_eq!(page["artifacts"][0]["name"], "b.txt");
    let next = page["nextPageToken"].as_str().expect("another page");
    let page = at(server.addr, &format!("/v1/artifacts?pageSize=1&pageToken={next}"));
    let page = body(client.get(page).send().await.expect("an answer")).await;
    assert_eq!(
        (&page["artifacts"][0]["name"], &page["nextPageToken"]),
        (&json!("a.txt"), &Value::Null)
    );
    let id = first["artifactId"].as_str().expect("an id");
    let one = at(server.addr, &format!("/v1/artifacts/{id}"));
    assert_eq!(client.get(&one).send().await.expect("an answer").status(), StatusCode::OK);
    assert_eq!(client.delete(&one).send().await.expect("an answer").status(), StatusCode::OK);
    assert_eq!(client.get(&one).send().await.expect("an answer").status(), StatusCode::NOT_FOUND);
    assert_eq!(listed(&server.api()).await.len(), 1);
    server.stop().await;
}

#[tokio::test]
async fn a_link_opens_one_artifact_until_it_expires() {
    let server = Local::manual(&[("BATON_AUTH_REQUIRED", "true")]).await;
    let admin = auth::admin(&server);
    let (_, writer) = auth::key(&admin, "a", &[Scope::ArtifactsWrite]).await;
    let (key_id, reader) = auth::key(&admin, "a", &[Scope::ArtifactsRead]).await;
    let (writer, reader) = (server.api().with_key(&writer), server.api().with_key(&reader));
    let artifact = put(&writer, spec("a"), b"hello").await.expect("an artifact");
    let other = put(&writer, spec("b"), b"other").await.expect("an artifact");
    assert_eq!(put(&reader, spec("c"), b"x").await.expect_err("no").code(), Code::PermissionDenied);
    let share = pb::ShareArtifactRequest { artifact_id: artifact.artifact_id.clone(), ttl: None };
    let refused = writer.artifacts().share_artifact(share.clone()).await;
    assert_eq!(refused.expect_err("no").code(), Code::PermissionDenied);
    let shared = reader.artifacts().share_artifact(share).await.expect("a link").into_inner();
    let [client, _] = clients();
    let status = |url: String| {
        let sent = client.get(at(server.addr, &url)).send();
        async move { sent.await.expect("an answer").status() }
    };
    let (_, token) = shared.url.split_once('?').expect("a token");
    assert_eq!(status(artifact.url.clone()).await, StatusCode::UNAUTHORIZED);
    assert_eq!(status(shared.url.clone()).await, StatusCode::OK);
    assert_eq!(status(format!("{}?{token}", other.url)).await, StatusCode::NOT_FOUND);
    assert_eq!(status(format!("/v1/artifacts?{token}")).await, StatusCode::BAD_REQUEST);
    server.advance(Duration::from_mins(61)).await;
    assert_eq!(status(shared.url.clone()).await, StatusCode::UNAUTHORIZED);
    let share = pb::ShareArtifactRequest { artifact_id: artifact.artifact_id, ttl: None };
    let again = reader.artifacts().share_artifact(share).await.expect("a link").into_inner();
    assert_eq!(status(again.url.clone()).await, StatusCode::OK);
    // A link dies with the key of whoever made it.
    admin.keys().revoke_key(pb::RevokeKeyRequest { key_id }).await.expect("revoked");
    assert_eq!(status(again.url).await, StatusCode::UNAUTHORIZED);
    server.stop().await;
}
