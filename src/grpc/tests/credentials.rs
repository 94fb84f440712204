//! Who may call what.

use super::*;

fn scopes(scopes: &[Scope]) -> Scopes {
    scopes.iter().copied().collect()
}

fn with_key<T>(message: T, key: &str) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.metadata_mut().insert("authorization", format!("Bearer {key}").parse().unwrap());
    request
}

#[tokio::test]
async fn credentials_decide_namespace_and_method() {
    let bench = Bench::new(|config| config.auth = config::Auth::default()).await;
    let mut tasks = bench.tasks().await;
    let list = pb::ListTasksRequest::default;
    let status = tasks.list_tasks(list()).await.unwrap_err();
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::Unauthenticated, "UNAUTHENTICATED")
    );
    let reader = scopes(&[Scope::TasksRead]);
    let (_, key) = bench.keyring.create("blue".into(), "n".into(), reader, None).await.unwrap();
    let status = tasks.list_tasks(with_key(list(), &key)).await.unwrap_err();
    assert_eq!(status.code(), Code::Aborted);
    assert!(status.message().starts_with("blue "));
    let mut api_key = tonic::Request::new(list());
    api_key.metadata_mut().insert("x-api-key", key.parse().unwrap());
    assert_eq!(tasks.list_tasks(api_key).await.unwrap_err().code(), Code::Aborted);
    let mut twice = with_key(list(), &key);
    twice.metadata_mut().insert("x-api-key", key.parse().unwrap());
    assert_eq!(tasks.list_tasks(twice).await.unwrap_err().code(), Code::Unauthenticated);
    let status = tasks.cancel_task(with_key(pb::CancelTaskRequest::default(), &key)).await;
    let status = status.unwrap_err();
    let (reason, metadata) = error_reason(&status).unwrap();
    assert_eq!((status.code(), reason.as_str()), (Code::PermissionDenied, "PERMISSION_DENIED"));
    assert_eq!(metadata["scope"], "tasks.write");
    let url = format!("http://{}/metrics", bench.addr);
    assert_eq!(reqwest::get(&url).await.unwrap().status(), 401);
    let client = reqwest::Client::new();
    assert_eq!(client.get(&url).bearer_auth(&key).send().await.unwrap().status(), 200);
    let mut health = tonic_health::pb::health_client::HealthClient::new(bench.channel().await);
    health.check(tonic_health::pb::HealthCheckRequest::default()).await.unwrap();
}

#[tokio::test]
async fn a_revoked_key_ends_the_streams_that_are_open_under_it() {
    let bench = Bench::new(|config| config.auth = config::Auth::default()).await;
    let reader = scopes(&[Scope::TasksRead]);
    let (row, key) = bench.keyring.create("a".into(), "n".into(), reader, None).await.unwrap();
    let request = with_key(pb::StreamTaskRequest::default(), &key);
    let mut stream = bench.tasks().await.stream_task(request).await.unwrap().into_inner();
    assert!(stream.message().await.unwrap().is_some());
    bench.keyring.revoke(None, row.id).await.unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(5), stream.message()).await;
    assert_eq!(ended.unwrap().unwrap_err().code(), Code::Unauthenticated);
}
