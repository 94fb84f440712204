//! Bytes that are put with one HTTP request: to this server, or to the bucket behind it.

use std::time::Duration;

use baton::pb::{self, upload_artifact_request::Part};
use reqwest::{Client, StatusCode};
use tonic::Code;

use super::{announce, announced, complete, download, listed, noise, servers, spec, upload};
use crate::{
    gateway::at,
    harness::{SOON, api::reason, local::Local, within},
};

/// Sends the request of an upload's target, changed as a test wants it.
async fn send(
    addr: std::net::SocketAddr,
    target: &pb::UploadTarget,
    bytes: &[u8],
    change: impl FnOnce(&mut pb::UploadTarget),
) -> StatusCode {
    let mut target = target.clone();
    change(&mut target);
    let url = if target.url.starts_with('/') { at(addr, &target.url) } else { target.url.clone() };
    let method = target.method.parse().expect("a method");
    let mut request = Client::new().request(method, url).body(bytes.to_vec());
    for (name, value) in &target.headers {
        if name != "content-length" {
            request = request.header(name, value);
        }
    }
    within("an answer", SOON, request.send()).await.expect("an answer").status()
}

/// P14: the request opens one place for one method, and takes no other size and no other bytes.
#[tokio::test]
async fn a_request_puts_the_announced_bytes_and_nothing_else() {
    for (server, _bucket) in servers(&[]).await {
        let (api, addr) = (server.api(), server.addr);
        let bytes = noise(3_000_000, 1);
        let mut other = bytes.clone();
        other[7] ^= 1;
        let first = announce(&api, announced("a", &bytes)).await.expect("an upload");
        let second = announce(&api, announced("b", &other)).await.expect("an upload");
        let target = first.target.clone().expect("a target");
        assert_eq!(target.method, "PUT");
        let refused = complete(&api, &first).await.expect_err("nothing came");
        assert_eq!(reason(&refused), "STATE_CONFLICT");

        let to = |change: fn(&mut pb::UploadTarget)| change;
        let wrong = [
            ("bytes", send(addr, &target, &other, to(|_| {})).await),
            ("size", send(addr, &target, &bytes[..2_999_999], to(|_| {})).await),
            ("method", send(addr, &target, &bytes, to(|t| t.method = "POST".into())).await),
            ("reading", send(addr, &target, &[], to(|t| t.method = "GET".into())).await),
            (
                "signature",
                send(
                    addr,
                    &target,
                    &bytes,
                    to(|t| {
                        let flipped = if t.url.ends_with('0') { "1" } else { "0" };
                        t.url.replace_range(t.url.len() - 1.., flipped);
                    }),
                )
                .await,
            ),
            (
                "place",
                send(addr, &target, &bytes, |t| {
                    t.url = t.url.replace(&first.upload_id, &second.upload_id);
                })
                .await,
            ),
        ];
        for (what, status) in wrong {
            assert!(status.is_client_error(), "{what}: {status}");
        }
        assert!(complete(&api, &first).await.is_err());
        assert!(complete(&api, &second).await.is_err());
        assert!(listed(&api).await.is_empty());

        let status = send(addr, &target, &bytes, to(|_| {})).await;
        assert!(status.is_success(), "{status}");
        let made = complete(&api, &first).await.expect("an artifact");
        assert_eq!(download(&api, &made).await.expect("bytes"), bytes);
        assert_eq!(complete(&api, &first).await.expect("the same"), made);
        // Used once more, it changes nothing.
        let _again = send(addr, &target, &bytes, to(|_| {})).await;
        assert_eq!(listed(&api).await, std::slice::from_ref(&made));
        assert_eq!(download(&api, &made).await.expect("bytes"), bytes);
        // Bytes that are there need not be sent.
        let third = announce(&api, announced("c", &bytes)).await.expect("an upload");
        assert_eq!((third.received_bytes, third.target.is_none()), (3_000_000, true));
        let linked = complete(&api, &third).await.expect("an artifact");
        assert_eq!(linked.sha256, made.sha256);
    }
}

#[tokio::test]
async fn the_token_of_an_upload_opens_nothing_else_and_expires() {
    let server = Local::manual(&[("BATON_AUTH_REQUIRED", "true")]).await;
    let admin = crate::auth::admin(&server);
    let bytes = noise(1_000, 1);
    let begun = announce(&admin, announced("a", &bytes)).await.expect("an upload");
    let target = begun.target.clone().expect("a target");
    let (_, token) = target.url.split_once("access_token=").expect("a token");
    let bearer = server.api().with_key(token);
    let get = pb::GetUploadRequest { upload_id: begun.upload_id.clone() };
    let refused = bearer.artifacts().get_upload(get).await.expect_err("no");
    assert_eq!(refused.code(), Code::PermissionDenied);
    let refused = upload(&bearer, Part::Spec(spec("b")), b"x").await.expect_err("no");
    assert_eq!(refused.code(), Code::PermissionDenied);
    let second = announce(&admin, announced("b", &noise(10, 2))).await.expect("an upload");
    let at = Part::Upload(pb::UploadPosition { upload_id: second.upload_id, offset: 0 });
    assert_eq!(upload(&bearer, at, b"x").await.expect_err("no").code(), Code::NotFound);
    server.advance(Duration::from_mins(16)).await;
    assert_eq!(send(server.addr, &target, &bytes, |_| {}).await, StatusCode::UNAUTHORIZED);
    let again = announce(&admin, announced("a", &bytes)).await.expect("the same upload");
    assert_eq!(again.upload_id, begun.upload_id);
    let target = again.target.expect("a new target");
    assert_eq!(send(server.addr, &target, &bytes, |_| {}).await, StatusCode::OK);
    assert_eq!(complete(&admin, &begun).await.expect("an artifact").size_bytes, 1_000);
    server.stop().await;
}

#[tokio::test]
async fn what_is_wrong_with_an_upload_is_said() {
    let server = Local::start(&[("BATON_ARTIFACTS_MAX_SIZE", "1MiB")]).await;
    let api = server.api();
    let error = announce(&api, spec("a")).await.expect_err("no");
    assert!(error.message().contains("spec.size_bytes"), "{}", error.message());
    let error = announce(&api, announced("a", &vec![0; (1 << 20) + 1])).await.expect_err("no");
    assert_eq!(
        (error.code(), reason(&error).as_str()),
        (Code::ResourceExhausted, "MESSAGE_TOO_LARGE")
    );
    let error = upload(&api, Part::Data(b"x".to_vec().into()), b"").await.expect_err("no");
    assert!(error.message().contains("first message"), "{}", error.message());
    let error = upload(&api, Part::Spec(announced("a", b"other")), b"bytes").await.expect_err("no");
    assert_eq!(reason(&error), "DIGEST_MISMATCH");
    let error = upload(&api, Part::Spec(spec("a")), &vec![1; 3 << 20]).await.expect_err("no");
    assert_eq!(reason(&error), "MESSAGE_TOO_LARGE");
    let begun = announce(&api, announced("a", b"0123456789")).await.expect("an upload");
    let delete = pb::DeleteUploadRequest { upload_id: begun.upload_id.clone() };
    api.artifacts().delete_upload(delete).await.expect("gone");
    assert_eq!(complete(&api, &begun).await.expect_err("no").code(), Code::NotFound);
    assert!(listed(&api).await.is_empty());
    server.stop().await;
}
