//! Claims about addresses, refusals, and health.

use std::time::Duration;

use super::super::{
    Error, Health, Redis, Settings,
    testing::{BOUND, Server},
};
use crate::{clock::Clock, id::Entropy, supervisor::Supervisor, tls::Trust};

async fn refusal(settings: Settings) -> String {
    let supervisor = Supervisor::new();
    let outcome = Redis::connect(settings, Clock::system(), Entropy::system(), &supervisor).await;
    let error = outcome.err().expect("a refusal");
    assert!(!format!("{error} {error:?}").contains("hunter2"), "{error:?} names the password");
    error.to_string()
}

#[tokio::test]
async fn a_malformed_address_is_refused_with_the_reason_and_without_the_password() {
    let cases = [
        ("", "is not a URL"),
        ("localhost:6379", "begins with `localhost://`"),
        ("redis:hunter2@x", "names no host"),
        ("http://:hunter2@host", "begins with `http://`"),
        ("redis://:hunter2@host:port", "is not a URL (invalid port number)"),
        ("redis://:hunter2@host/zero", "names the database `zero`"),
        ("redis://:hunter2@host/0/1", "names the database `0/1`"),
        ("redis://:hunter2@host?tls=1", "takes none"),
        ("redis://:hunter2%ff@host", "a password that is not UTF-8"),
        ("redis-sentinel://:hunter2@host", "address of the primary"),
        ("redis-cluster://:hunter2@host", "address of the primary"),
    ];
    for (url, reason) in cases {
        let text = refusal(Settings { url: url.into(), ..Settings::default() }).await;
        assert!(text.starts_with("the Redis URL ") && text.contains(reason), "{url}: {text}");
    }
    let prefix = Settings { prefix: "a b".into(), ..Settings::default() };
    assert!(refusal(prefix).await.contains("prefix `a b` is not"));
    let debug = Settings { url: "redis://u:hunter2@host/3".into(), ..Settings::default() };
    let text = format!("{debug:?}");
    assert!(text.contains("host:6379/3") && !text.contains("hunter2"), "{text}");
}

#[tokio::test]
async fn a_wrong_address_refuses_to_start() {
    let mut server = Server::with_options(&["--requirepass", "right"]);
    let at = |userinfo: &str| Settings {
        url: format!("redis://{userinfo}127.0.0.1:{}", server.port()),
        ..server.settings()
    };
    let text = refusal(at("")).await;
    assert!(text.contains("check user and password"), "no password: {text}");
    let text = refusal(at(":hunter2@")).await;
    assert!(text.contains("check user and password"), "wrong password: {text}");
    let supervisor = Supervisor::new();
    let right = at(":right@");
    let redis = Redis::connect(right, Clock::system(), Entropy::system(), &supervisor).await;
    assert_eq!(redis.unwrap().address(), format!("127.0.0.1:{}", server.port()));
    let plain = at("");
    let secure = Settings { url: plain.url.replace("redis://", "rediss://"), ..plain.clone() };
    let text = refusal(secure).await;
    assert!(text.starts_with("cannot use Redis at 127.0.0.1:"), "{text}");

    server.kill();
    let text = refusal(plain).await;
    assert!(text.contains("check host and port, and whether it runs"), "nobody there: {text}");
}

#[tokio::test]
async fn a_replica_is_refused_and_its_primary_named() {
    let server = Server::with_options(&["--replicaof", "127.0.0.1 1"]);
    let text = refusal(server.settings()).await;
    assert!(text.contains("replica of 127.0.0.1:1"), "{text}");
}

#[tokio::test]
async fn a_server_is_spoken_to_in_tls_with_the_given_authority_and_no_other() {
    let folder = tempfile::tempdir().unwrap();
    let key = rcgen::KeyPair::generate().unwrap();
    let params = rcgen::CertificateParams::new(vec!["127.0.0.1".into()]).unwrap();
    let cert = params.self_signed(&key).unwrap();
    let (cert_path, key_path) = (folder.path().join("cert.pem"), folder.path().join("key.pem"));
    std::fs::write(&cert_path, cert.pem()).unwrap();
    std::fs::write(&key_path, key.serialize_pem()).unwrap();
    let server = Server::tls(&cert_path, &key_path);

    let url = format!("rediss://127.0.0.1:{}", server.port());
    let trust = Trust { ca: Some(cert_path), identity: None };
    let known = Settings { url: url.clone(), trust, ..server.settings() };
    let supervisor = Supervisor::new();
    let redis = Redis::connect(known, Clock::system(), Entropy::system(), &supervisor).await;
    redis.unwrap().work().add(&super::items(3)).await.unwrap();
    let text = refusal(Settings { url, ..server.settings() }).await;
    assert!(text.starts_with("cannot use Redis at 127.0.0.1:"), "{text}");
}

#[tokio::test]
async fn health_turns_while_redis_is_away_and_commands_fail_in_bounded_time() {
    let mut server = Server::start();
    let (redis, supervisor) = server.connect().await;
    let mut health = redis.health();
    assert!(health.borrow().is_up());

    server.kill();
    let down = tokio::time::timeout(BOUND, health.wait_for(|health| !health.is_up())).await;
    assert!(matches!(&*down.unwrap().unwrap(), Health::Down { .. }));
    let adding = tokio::time::timeout(Duration::from_secs(5), async {
        redis.work().add(&super::items(1)).await
    });
    let error = adding.await.expect("an outcome within the command's time").err().unwrap();
    assert!(matches!(error, Error::Command { command: "add", .. }), "{error}");

    let losses = *redis.losses().borrow();
    server.restart();
    tokio::time::timeout(BOUND, health.wait_for(Health::is_up)).await.unwrap().unwrap();
    assert!(*redis.losses().borrow() > losses, "what it held is gone, and that is told");
    assert_eq!(redis.work().add(&super::items(1)).await.unwrap(), 1);
    supervisor.shutdown(Duration::from_secs(5), &Clock::system()).await;
    assert_eq!(supervisor.failures(), Vec::<String>::new());
}
