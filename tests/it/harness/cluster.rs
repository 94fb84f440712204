//! Servers that share a database, and perhaps a Redis, and a balancer before them.

use std::{
    net::SocketAddr,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};

use super::{
    SOON,
    api::Api,
    database, eventually,
    server::{Process, Server, http_status},
};

/// Leases are short, but long enough for machines that do much else.
pub const TTL: Duration = Duration::from_secs(4);
/// What servers of a cluster are set to.
pub const SETTINGS: &[(&str, &str)] = &[
    ("BATON_RUNNERS_LEASE_TTL", "4s"),
    ("BATON_RUNNERS_HEARTBEAT_INTERVAL", "500ms"),
    ("BATON_RUNNERS_SESSION_GRACE", "4s"),
    ("BATON_SERVER_SHUTDOWN_GRACE", "10s"),
];

/// A redis-server of its own, in memory.
pub struct Redis {
    pub port: u16,
    pub process: Process,
    dir: tempfile::TempDir,
}

impl Redis {
    pub async fn start() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = free.local_addr().expect("an address").port();
        drop(free);
        let process = Self::spawn(port, dir.path());
        let redis = Self { port, process, dir };
        redis.answers().await;
        redis
    }

    /// Starts it again, empty, after it was killed.
    pub async fn restart(&mut self) {
        self.process = Self::spawn(self.port, self.dir.path());
        self.answers().await;
    }

    fn spawn(port: u16, dir: &std::path::Path) -> Process {
        let mut command = Command::new("redis-server");
        command.args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", ""]);
        command.args(["--appendonly", "no", "--dir"]).arg(dir);
        Process::spawn(&mut command, &dir.join("redis.log"))
    }

    async fn answers(&self) {
        let port = self.port;
        eventually("redis-server answers", SOON, || async move {
            TcpStream::connect(("127.0.0.1", port)).await.ok()
        })
        .await;
    }

    /// Runs a script; returns what it answers.
    pub fn eval(&self, script: &str) -> String {
        let port = self.port.to_string();
        let output = Command::new("redis-cli").args(["-p", &port, "EVAL", script, "0"]).output();
        let text = String::from_utf8(output.expect("redis-cli").stdout).expect("text");
        text.trim().to_owned()
    }

    /// Loses everything.
    pub async fn flush(&self) {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).await.expect("redis-server");
        stream.write_all(b"FLUSHALL\r\n").await.expect("a command");
        let mut answer = [0; 3];
        stream.read_exact(&mut answer).await.expect("an answer");
        assert_eq!(&answer, b"+OK");
    }
}

/// Servers on one database.
pub struct Cluster {
    pub url: String,
    pub servers: Vec<Server>,
    pub redis: Option<Redis>,
}

impl Cluster {
    pub async fn start(n_servers: usize) -> Self {
        Self::start_on(n_servers, None).await
    }

    /// Servers that also share a Redis.
    pub async fn with_redis(n_servers: usize) -> Self {
        Self::start_on(n_servers, Some(Redis::start().await)).await
    }

    async fn start_on(n_servers: usize, redis: Option<Redis>) -> Self {
        let url = database::create(&database::server().expect("a server"));
        let mut cluster = Self { url, servers: Vec::new(), redis };
        for _ in 0..n_servers {
            cluster.add(None).await;
        }
        cluster
    }

    /// Starts one more, which uses the database by another URL if one is given.
    pub async fn add(&mut self, url: Option<&str>) -> &mut Server {
        let mut server = Server::stopped(SETTINGS);
        server.set_env("BATON_DATABASE_URL", url.unwrap_or(&self.url));
        if let Some(redis) = &self.redis {
            server.set_env("BATON_REDIS_URL", &format!("redis://127.0.0.1:{}", redis.port));
        }
        server.restart().await;
        self.servers.push(server);
        self.servers.last_mut().expect("the server just added")
    }

    pub fn api(&self, server: usize) -> Api {
        self.servers[server].api()
    }

    pub fn sql(&self, sql: &str) -> String {
        database::psql(&self.url, sql)
    }
}

/// A balancer of connections that knows which servers take some.
pub struct Balancer {
    pub addr: SocketAddr,
    accept: JoinHandle<()>,
}

impl Balancer {
    pub async fn to(targets: Vec<SocketAddr>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let addr = listener.local_addr().expect("the port's address");
        let next = Arc::new(AtomicUsize::new(0));
        let accept = tokio::spawn(async move {
            while let Ok((mut near, _)) = listener.accept().await {
                let (targets, next) = (targets.clone(), next.clone());
                tokio::spawn(async move {
                    for _ in 0..targets.len() {
                        let at = next.fetch_add(1, Ordering::Relaxed) % targets.len();
                        if http_status(targets[at], "/readyz").await != Some(200) {
                            continue;
                        }
                        let Ok(mut far) = TcpStream::connect(targets[at]).await else { continue };
                        let _ = (near.set_nodelay(true), far.set_nodelay(true));
                        let _ended = copy_bidirectional(&mut near, &mut far).await;
                        return;
                    }
                });
            }
        });
        Self { addr, accept }
    }
}

impl Drop for Balancer {
    fn drop(&mut self) {
        self.accept.abort();
    }
}
