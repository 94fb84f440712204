//! TLS on the one port: both versions of HTTP by ALPN, certificates that change under open
//! streams, clients that must show one, and peers that do not speak it.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::{Duration, Instant},
};

use baton::{
    client::Client,
    pb::{TaskState, task_event::Body},
    tls::{
        Trust,
        own::{self, Own},
    },
};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use reqwest::{StatusCode, Version};
use serde_json::json;
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::{
    gateway::{body, events},
    harness::{
        SOON,
        api::Api,
        eventually,
        local::Local,
        server::{BATON, Process},
        within,
    },
};

const MODEL: &str = "test/echo";

/// A certificate for this machine, as `baton dev --tls` makes it.
fn certificate() -> (TempDir, Own) {
    let dir = tempfile::tempdir().expect("a directory");
    let now = baton::clock::Clock::system().now();
    let own = own::certificate(dir.path(), now).expect("a certificate");
    (dir, own)
}

async fn secured(own: &Own, more: &[(&str, &str)]) -> Local {
    let (cert, key) = (own.cert.display().to_string(), own.key.display().to_string());
    let env = [("BATON_TLS_CERT", &*cert), ("BATON_TLS_KEY", &*key)];
    Local::start(&[&env, more].concat()).await
}

fn trusting(own: &Own) -> Trust {
    Trust { ca: Some(own.ca.clone()), identity: None }
}

async fn connect(addr: SocketAddr, trust: &Trust) -> Result<Api, String> {
    let url = format!("https://{addr}");
    let connected = Client::connect_with(&url, None, trust);
    let client = within("a connection", SOON, connected).await.map_err(|error| {
        let mut text = error.to_string();
        let mut error: &dyn std::error::Error = &error;
        while let Some(source) = error.source() {
            error = source;
            text = format!("{text}: {error}");
        }
        text
    })?;
    Ok(Api::over(client.channel()))
}

/// An HTTP client that trusts one CA.
fn browser(own: &Own) -> reqwest::ClientBuilder {
    let ca = fs::read(&own.ca).expect("a CA");
    let ca = reqwest::Certificate::from_pem(&ca).expect("a certificate");
    reqwest::Client::builder().tls_certs_only([ca])
}

#[tokio::test]
async fn grpc_and_both_versions_of_http_share_the_tls_port_by_alpn() {
    let (_dir, own) = certificate();
    let server = secured(&own, &[]).await;
    let api = connect(server.addr, &trusting(&own)).await.expect("gRPC");
    let id = api.submit_to(MODEL).await;
    let by_alpn = [
        (Version::HTTP_2, browser(&own).build().expect("a client")),
        (Version::HTTP_11, browser(&own).http1_only().build().expect("a client")),
    ];
    for (version, client) in by_alpn {
        let url = |path: &str| format!("https://{}{path}", server.addr);
        let spec = json!({"model": MODEL, "input": {"text": "hello"}});
        let submit = client.post(url("/v1/tasks")).json(&json!({ "spec": spec })).send();
        let submitted = within("a submit", SOON, submit).await.expect("an answer");
        assert_eq!((submitted.version(), submitted.status()), (version, StatusCode::ACCEPTED));
        let mine = body(submitted).await["task"]["taskId"].as_str().expect("an id").to_owned();
        for task in [&mine, &id] {
            let stream = client.get(url(&format!("/v1/tasks/{task}/stream"))).send();
            let stream = within("a stream", SOON, stream).await.expect("an answer");
            assert_eq!(stream.headers()["content-type"], "text/event-stream");
            assert_eq!(events(stream, |events| !events.is_empty()).await[0].name, "queued");
        }
    }
    server.stop().await;
}

#[tokio::test]
async fn a_new_certificate_is_taken_up_while_an_open_stream_goes_on() {
    let (dir, first) = certificate();
    let (_other, second) = certificate();
    let (cert, key) = (first.cert.display().to_string(), first.key.display().to_string());
    let env = [("BATON_TLS_CERT", &*cert), ("BATON_TLS_KEY", &*key)];
    let server = Local::manual(&env).await;
    let old = trusting(&first);
    let api = connect(server.addr, &old).await.expect("the first certificate");
    let id = api.submit_to(MODEL).await;
    let mut stream = api.stream(&id, 1).await.expect("a stream");
    within("an event", SOON, stream.message()).await.expect("sound").expect("an event");

    // A new certificate without its key changes nothing.
    fs::copy(&second.cert, &first.cert).expect("a copy");
    for _ in 0..3 {
        server.clock.advance(Duration::from_secs(5));
        connect(server.addr, &old).await.expect("the first certificate still");
    }
    fs::copy(&second.key, &first.key).expect("a copy");
    let new = trusting(&second);
    eventually("the second certificate", SOON, || async {
        server.clock.advance(Duration::from_secs(5));
        connect(server.addr, &new).await.ok()
    })
    .await;
    let refused = connect(server.addr, &old).await.err().expect("no longer trusted");
    assert!(refused.contains("invalid peer certificate"), "{refused}");

    // The stream over the first one has not noticed.
    api.cancel(&id).await.expect("a cancel");
    let end = within("the end", SOON, async {
        let mut last = None;
        while let Some(event) = stream.message().await.expect("a sound stream") {
            last = event.body;
        }
        last
    });
    assert!(matches!(end.await, Some(Body::Ended(ended)) if ended.state() == TaskState::Cancelled));
    drop(dir);
    server.stop().await;
}

/// A CA, and a certificate of it for a client.
fn client_of_a_ca(dir: &Path, name: &str) -> (PathBuf, (PathBuf, PathBuf)) {
    let mut ca = CertificateParams::default();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = CertifiedIssuer::self_signed(ca, KeyPair::generate().expect("a key")).expect("a CA");
    let key = KeyPair::generate().expect("a key");
    let params = CertificateParams::new(vec![name.to_owned()]).expect("a name");
    let cert = params.signed_by(&key, &ca).expect("a certificate");
    let path = |kind: &str| dir.join(format!("{name}.{kind}"));
    fs::write(path("ca"), ca.pem()).expect("a file");
    fs::write(path("cert"), cert.pem()).expect("a file");
    fs::write(path("key"), key.serialize_pem()).expect("a file");
    (path("ca"), (path("cert"), path("key")))
}

#[tokio::test]
async fn clients_show_a_certificate_where_one_is_required_and_a_key_all_the_same() {
    let (dir, own) = certificate();
    let (ca, mine) = client_of_a_ca(dir.path(), "runner-1");
    let (_, foreign) = client_of_a_ca(dir.path(), "stranger");
    let ca = ca.display().to_string();
    let env = [("BATON_TLS_CLIENT_CA", &*ca), ("BATON_AUTH_REQUIRED", "true")];
    let server = secured(&own, &env).await;
    let admitted = |identity| Trust { identity, ..trusting(&own) };
    for outsider in [admitted(None), admitted(Some(foreign))] {
        // In TLS 1.3 the client learns of it with its first call.
        let refused = match connect(server.addr, &outsider).await {
            Ok(api) => api
                .try_get("nothing")
                .await
                .is_err_and(|error| error.code() != tonic::Code::Unauthenticated),
            Err(_) => true,
        };
        assert!(refused, "{outsider:?}");
    }
    let api = connect(server.addr, &admitted(Some(mine))).await.expect("a connection");
    let nobody = api.try_get("nothing").await.expect_err("no key");
    assert_eq!(nobody.code(), tonic::Code::Unauthenticated);
    let key = fs::read_to_string(server.app().first_key.as_ref().expect("a key")).expect("a file");
    api.with_key(key.trim()).submit_to(MODEL).await;
    server.stop().await;
}

async fn refused(server: &Local, reason: &str) {
    let line = format!("baton_connections_refused_total{{reason=\"{reason}\"}} ");
    eventually(&line, SOON, || async { server.app().metrics.text().contains(&line).then_some(()) })
        .await;
}

/// Runs the command line against a server.
fn baton(args: &[&str]) -> Output {
    let mut command = Command::new(BATON);
    command.args(args).env_remove("BATON_ADDRESS").env_remove("BATON_CA_CERT");
    command.output().expect("the command")
}

async fn command(args: Vec<String>) -> (Option<i32>, String) {
    let running = tokio::task::spawn_blocking(move || {
        baton(&args.iter().map(String::as_str).collect::<Vec<_>>())
    });
    let output = within("the command", SOON, running).await.expect("an end");
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

/// Exit code of commands that could not get through.
const UNREACHABLE: Option<i32> = Some(6);

#[tokio::test]
async fn each_side_is_told_when_one_speaks_tls_and_the_other_does_not() {
    let (_dir, own) = certificate();
    let (secure, plain) = (secured(&own, &[]).await, Local::start(&[]).await);
    let url = format!("http://{}/v1/tasks", secure.addr);
    let answer = within("an answer", SOON, reqwest::get(url)).await.expect("an answer");
    assert_eq!(answer.status(), StatusCode::BAD_REQUEST);
    assert_eq!(answer.text().await.expect("text"), "this port speaks TLS: use https://\n");
    let error = Api::new(secure.addr).try_get("nothing").await.expect_err("no TLS");
    let text = format!("{error:?}");
    assert!(text.contains("this port speaks TLS"), "{text}");
    refused(&secure, "plain_text").await;

    let list = |url: String| {
        let mut args: Vec<_> = ["task", "list", "--timeout", "5s"].map(str::to_owned).into();
        args.extend(["--address".into(), url]);
        command(args)
    };
    let (code, said) = list(format!("http://{}", secure.addr)).await;
    assert_eq!(code, UNREACHABLE, "{said}");
    assert!(said.contains("speaks TLS") && said.contains("--address https://"), "{said}");
    let (code, said) = list(format!("https://{}", plain.addr)).await;
    assert_eq!(code, UNREACHABLE, "{said}");
    assert!(said.contains(&format!("--address http://{}", plain.addr)), "{said}");
    refused(&plain, "tls").await;
    let (code, said) = list(format!("https://{}", secure.addr)).await;
    assert_eq!(code, UNREACHABLE, "{said}");
    assert!(said.contains("--ca-cert"), "{said}");
    secure.stop().await;
    plain.stop().await;
}

#[tokio::test]
async fn a_peer_that_never_ends_its_handshake_is_cut_off_and_holds_nobody_up() {
    let (_dir, own) = certificate();
    let server = secured(&own, &[("BATON_LIMITS_HANDSHAKE_TIMEOUT", "700ms")]).await;
    let begun = Instant::now();
    let mut idlers = Vec::new();
    // Nothing at all, a piece of TLS, and a piece of HTTP.
    for said in [&b""[..], &[0x16, 3, 1, 2, 0, 1], b"PR"] {
        for _ in 0..10 {
            let mut idler = TcpStream::connect(server.addr).await.expect("a connection");
            idler.write_all(said).await.expect("taken");
            idlers.push(idler);
        }
    }
    let api = connect(server.addr, &trusting(&own)).await.expect("not held up");
    api.submit_to(MODEL).await;
    assert!(begun.elapsed() < Duration::from_millis(650), "{:?}", begun.elapsed());
    for mut idler in idlers {
        let read = within("an end", SOON, idler.read(&mut [0; 64])).await;
        assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
    }
    assert!(begun.elapsed() >= Duration::from_millis(700));
    refused(&server, "handshake_timeout").await;
    server.stop().await;
}

#[tokio::test]
async fn dev_makes_a_certificate_and_says_how_to_trust_it() {
    let dir = tempfile::tempdir().expect("a directory");
    let data_dir = dir.path().join("data").display().to_string();
    let log = dir.path().join("dev.log");
    let mut dev = Command::new(BATON);
    dev.args(["dev", "--tls", "--addr", "127.0.0.1:0", "--data-dir", &data_dir]);
    let dev = Process::spawn(&mut dev, &log);
    let (address, ca) = eventually("the banner", 2 * SOON, || async {
        let text = dev.read_log();
        if !text.contains("Ctrl-C stops it") {
            return None;
        }
        let command = text.lines().find(|line| line.trim_start().starts_with("baton --address"))?;
        let mut words = command.split_whitespace().skip(2);
        let address = words.next()?.to_owned();
        assert_eq!(words.next(), Some("--ca-cert"), "{command}");
        Some((address, words.next()?.to_owned()))
    })
    .await;
    assert!(address.starts_with("https://127.0.0.1:"), "{address}");
    let reach = |rest: &[&str]| {
        let args = [&["--address", &address], rest].concat();
        command(args.into_iter().map(str::to_owned).collect())
    };
    let run = ["run", "baton/echo", "-i", "text=hello", "--timeout", "9s"];
    let (code, said) = reach(&[&["--ca-cert", &ca][..], &run].concat()).await;
    assert_eq!(code, Some(0), "{said}");
    let (code, said) = reach(&["--ca-cert", &ca, "doctor"]).await;
    assert_eq!(code, Some(0), "{said}");
    let (code, said) = reach(&run).await;
    assert_eq!(code, UNREACHABLE, "{said}");
    assert!(said.contains("--ca-cert"), "{said}");
    let (code, said) = reach(&["--ca-cert", "/nowhere.pem", "task", "list"]).await;
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("cannot read /nowhere.pem"), "{said}");
}

#[tokio::test]
async fn files_that_cannot_be_used_stop_the_start_with_their_names() {
    let (dir, own) = certificate();
    let (_other, foreign) = certificate();
    let (cert, key) = (own.cert.display().to_string(), foreign.key.display().to_string());
    let ca = own.ca.display().to_string();
    let data_dir = dir.path().join("data").display().to_string();
    let start = |files: &[(&str, &str)]| {
        let mut args: Vec<String> = vec!["server".into(), "start".into()];
        args.extend(["--addr", "127.0.0.1:0", "--data-dir", &data_dir].map(str::to_owned));
        for (flag, file) in files {
            args.extend([(*flag).to_owned(), (*file).to_owned()]);
        }
        command(args)
    };
    for (files, says) in [
        (&[("--tls-cert", &*cert)][..], "tls.key"),
        (&[("--tls-client-ca", &*ca)], "tls.cert"),
        (&[("--tls-cert", "/nowhere"), ("--tls-key", &*key)], "cannot read /nowhere"),
        (&[("--tls-cert", &*key), ("--tls-key", &*key)], "holds no certificate"),
        (&[("--tls-cert", &*cert), ("--tls-key", &*cert)], "holds no private key"),
        (&[("--tls-cert", &*cert), ("--tls-key", &*key)], "belongs to another certificate"),
    ] {
        let (code, said) = start(files).await;
        assert_eq!(code, Some(2), "{said}");
        assert!(said.contains(says), "{says}: {said}");
    }
}
