//! The server's configuration: one typed tree, its defaults, and what it refuses.
//!
//! Values come from the defaults, a TOML file, `BATON_*` variables and flags, later ones
//! winning; [`load()`] does that and remembers where each came from. A key `server.io_threads`
//! has the variable `BATON_SERVER_IO_THREADS`. An empty text means "off".

mod artifacts;
mod load;
mod queue;
mod storage;
pub mod units;

use std::{net::SocketAddr, time::Duration};

use serde::{Deserialize, Serialize};

pub use artifacts::Artifacts;
pub use load::{ConfigError, Entry, Loaded, Origin, Sources, load, variable};
pub use queue::{FullPolicy, Queue, Redis};
pub use storage::{Database, Retention, Storage};

/// Everything that can be set.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Address, threads, shutdown.
    pub server: Server,
    /// TLS on the one port.
    pub tls: Tls,
    /// What one client may use up.
    pub limits: Limits,
    /// Credentials.
    pub auth: Auth,
    /// JSON and browsers.
    pub http: Http,
    /// Where data lie.
    pub storage: Storage,
    /// Files of tasks.
    pub artifacts: Artifacts,
    /// The database, where it is a server's.
    pub database: Database,
    /// How long what has ended is kept.
    pub retention: Retention,
    /// Admission, and what waits.
    pub queue: Queue,
    /// What servers on one database share.
    pub redis: Redis,
    /// Leases and runner sessions.
    pub runners: Runners,
    /// Live token logs.
    pub relay: Relay,
    /// Logs and traces.
    pub telemetry: Telemetry,
}

/// Address, threads, shutdown.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Server {
    /// Where the one port listens.
    pub addr: SocketAddr,
    /// Threads that serve connections; 1 means that the main thread serves them too.
    pub io_threads: usize,
    /// Longest shutdown, from the signal to the exit.
    #[serde(with = "units::duration")]
    pub shutdown_grace: Duration,
    /// Whether the API describes itself to generic clients.
    pub reflection: bool,
}

impl Default for Server {
    fn default() -> Self {
        Self {
            addr: SocketAddr::from(([127, 0, 0, 1], 7070)),
            io_threads: 1,
            shutdown_grace: Duration::from_secs(30),
            reflection: true,
        }
    }
}

/// TLS on the one port. The files are read again when they change, without a restart.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Tls {
    /// PEM file with the server's certificate and those between it and a CA, leaf first.
    /// Default: the port serves in the clear.
    pub cert: String,
    /// PEM file with the key of the certificate.
    pub key: String,
    /// PEM file with CAs. Clients must then show a certificate of one of them, runners and
    /// health checks included; who calls is still said by the credential of the call.
    pub client_ca: String,
}

/// What one client may use up.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Open connections in all.
    pub connections: usize,
    /// Open connections from one address.
    pub connections_per_ip: usize,
    /// Open calls on one connection.
    pub streams_per_connection: u32,
    /// Unary calls at work in all; more are refused, health and metrics excepted, and calls that
    /// wait for a runner or for work.
    pub calls: usize,
    /// Open streaming calls in all, and calls that wait for a runner or for work.
    pub streams: usize,
    /// A connection that has not spoken for this long since it opened is closed.
    #[serde(with = "units::duration")]
    pub handshake_timeout: Duration,
    /// An HTTP/1.1 request head must be complete within this time.
    #[serde(with = "units::duration")]
    pub header_timeout: Duration,
    /// A silent HTTP/2 connection is pinged this often.
    #[serde(with = "units::duration")]
    pub keepalive_interval: Duration,
    /// A ping must be answered within this time.
    #[serde(with = "units::duration")]
    pub keepalive_timeout: Duration,
    /// Receive window of a connection. Small DATA frames that nobody has read yet are counted
    /// against half of it, so that a small window lets a burst of tokens end a connection.
    #[serde(with = "units::bytes")]
    pub connection_window: u64,
    /// Receive window of a stream.
    #[serde(with = "units::bytes")]
    pub stream_window: u64,
    /// Largest message received.
    #[serde(with = "units::bytes")]
    pub message: u64,
    /// Largest set of headers received.
    #[serde(with = "units::bytes")]
    pub headers: u64,
    /// Calls that a client may cancel before the server has looked at them, per connection.
    pub pending_resets: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 20_000,
            connections_per_ip: 10_000,
            streams_per_connection: 1_000,
            calls: 4_096,
            streams: 100_000,
            handshake_timeout: Duration::from_secs(10),
            header_timeout: Duration::from_secs(10),
            keepalive_interval: Duration::from_secs(20),
            keepalive_timeout: Duration::from_secs(10),
            connection_window: 16 << 20,
            stream_window: 1 << 20,
            message: 4 << 20,
            headers: 16 << 10,
            pending_resets: 200,
        }
    }
}

/// Credentials.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Auth {
    /// Whether calls need a credential. May be off on a loopback address only; everybody who
    /// reaches the port is then an admin of the namespace `default`.
    pub required: bool,
    /// Whether `grpc.health.v1.Health` answers without a credential.
    pub open_health: bool,
    /// Whether reflection answers without a credential.
    pub open_reflection: bool,
    /// Whether `/metrics` answers without a credential.
    pub open_metrics: bool,
}

impl Default for Auth {
    fn default() -> Self {
        Self { required: true, open_health: true, open_reflection: false, open_metrics: false }
    }
}

/// JSON and browsers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Http {
    /// Origins whose pages may call, such as `https://app.example.org`, with commas between.
    /// Default: none but the server's own.
    pub cors_origins: String,
    /// Hosts under which a server without credentials is called over HTTP, besides `localhost`
    /// and loopback addresses, such as `baton.test`, with commas between. Any other host is
    /// refused: a page that gave its own name to this address could call otherwise.
    pub allowed_hosts: String,
    /// Whether `/jobs`, `/requests` and the older `/upload` and `/api` are served.
    pub job_routes: bool,
    /// What links to artifacts begin with, such as `https://baton.example.org`. Default: links are
    /// paths, below whatever address a client has.
    pub public_url: String,
}

impl Http {
    /// Hosts that are called, besides those of this machine.
    pub fn allowed_hosts(&self) -> impl Iterator<Item = &str> {
        self.allowed_hosts.split(',').map(str::trim).filter(|host| !host.is_empty())
    }

    /// Origins whose pages may call.
    pub fn cors_origins(&self) -> impl Iterator<Item = &str> {
        self.cors_origins.split(',').map(str::trim).filter(|origin| !origin.is_empty())
    }
}

/// Whether it is what browsers send as `Origin`: scheme, host, and port where it is not the
/// scheme's own.
fn is_origin(text: &str) -> bool {
    let host = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
    host.is_some_and(|host| {
        let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-.:[]".contains(c);
        !host.is_empty() && host.chars().all(allowed)
    })
}

/// Whether it is a name or an address, without a port; IPv6 in brackets, as in addresses.
fn is_host(text: &str) -> bool {
    let bracketed = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-.".contains(c);
    match bracketed {
        Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
        None => text.chars().all(allowed),
    }
}

/// Leases and runner sessions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Runners {
    /// A lease ends this long after the last heartbeat that was heard.
    #[serde(with = "units::duration")]
    pub lease_ttl: Duration,
    /// Heartbeats are due this often.
    #[serde(with = "units::duration")]
    pub heartbeat_interval: Duration,
    /// A runner that lost its connection may come back to its session within this time.
    #[serde(with = "units::duration")]
    pub session_grace: Duration,
    /// Runners are asked to renew a stream of this age.
    #[serde(with = "units::duration")]
    pub max_stream_age: Duration,
    /// A cancelled attempt must have given its slot back within this time.
    #[serde(with = "units::duration")]
    pub cancel_grace: Duration,
}

impl Default for Runners {
    fn default() -> Self {
        Self {
            lease_ttl: Duration::from_secs(15),
            heartbeat_interval: Duration::from_secs(3),
            session_grace: Duration::from_secs(30),
            max_stream_age: Duration::from_mins(30),
            cancel_grace: Duration::from_secs(5),
        }
    }
}

/// Live token logs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Relay {
    /// Memory of one task's log, above which events on stable storage are read from there.
    #[serde(with = "units::bytes")]
    pub per_task: u64,
    /// Memory of all logs, likewise; above it logs also take no more until there is room.
    #[serde(with = "units::bytes")]
    pub total: u64,
}

impl Default for Relay {
    fn default() -> Self {
        Self { per_task: 1 << 20, total: 256 << 20 }
    }
}

/// Logs and traces.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Telemetry {
    /// Form of log lines.
    pub log_format: LogFormat,
    /// What is logged, as `level` or `target=level,…`.
    pub log_filter: String,
    /// Where traces are sent (OTLP over gRPC), such as `http://127.0.0.1:4317`. Default: off.
    pub otlp_endpoint: String,
    /// Headers of the exporter, `name=value,…`. Secret.
    pub otlp_headers: Secret,
}

impl Default for Telemetry {
    fn default() -> Self {
        Self {
            log_format: LogFormat::Text,
            log_filter: "info".into(),
            otlp_endpoint: String::new(),
            otlp_headers: Secret::default(),
        }
    }
}

/// Form of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// For people.
    Text,
    /// For programs, one object a line.
    Json,
}

/// A text that never shows itself in logs and debug output.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// The text itself.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.0.is_empty() { "\"\"" } else { "[redacted]" })
    }
}

impl Config {
    /// Refuses values that cannot work, naming the key.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let refuse = |key: &str, problem: String| Err(ConfigError::refused(key, problem));
        if !self.auth.required && !self.server.addr.ip().is_loopback() {
            return refuse(
                "auth.required",
                format!(
                    "must be true unless server.addr is loopback, which {} is not; otherwise everybody who reaches the port is an admin",
                    self.server.addr
                ),
            );
        }
        let tls = &self.tls;
        if tls.cert.is_empty() && !(tls.key.is_empty() && tls.client_ca.is_empty()) {
            return refuse("tls.cert", "must be set when tls.key or tls.client_ca is".into());
        }
        if tls.key.is_empty() && !tls.cert.is_empty() {
            return refuse("tls.key", "must be set when tls.cert is".into());
        }
        let (limits, runners) = (&self.limits, &self.runners);
        let least: [(&str, u64, u64); 17] = [
            ("server.io_threads", self.server.io_threads as u64, 1),
            ("limits.connections", limits.connections as u64, 1),
            ("limits.connections_per_ip", limits.connections_per_ip as u64, 1),
            ("limits.streams_per_connection", limits.streams_per_connection.into(), 1),
            ("limits.calls", limits.calls as u64, 1),
            ("limits.streams", limits.streams as u64, 1),
            ("limits.connection_window", limits.connection_window, 65_535),
            ("limits.stream_window", limits.stream_window, 65_535),
            ("limits.message", limits.message, 1_024),
            ("limits.headers", limits.headers, 4_096),
            ("database.connections", self.database.connections as u64, 6),
            ("queue.max_per_model", self.queue.max_per_model, 1),
            ("queue.max_per_namespace", self.queue.max_per_namespace, 1),
            ("queue.max_attempts", self.queue.max_attempts.into(), 1),
            ("relay.per_task", self.relay.per_task, 65_536),
            ("artifacts.max_size", self.artifacts.max_size, 1),
            ("artifacts.max_uploads", self.artifacts.max_uploads, 1),
        ];
        for (key, value, least) in least {
            if value < least {
                return refuse(key, format!("is {value}, and must be at least {least}"));
            }
        }
        let most: [(&str, u64, u64); 6] = [
            ("server.io_threads", self.server.io_threads as u64, 1_024),
            ("queue.max_attempts", self.queue.max_attempts.into(), 100),
            ("limits.connection_window", limits.connection_window, (1 << 31) - 1),
            ("limits.stream_window", limits.stream_window, (1 << 31) - 1),
            ("limits.message", limits.message, 1 << 30),
            ("limits.headers", limits.headers, 1 << 20),
        ];
        for (key, value, most) in most {
            if value > most {
                return refuse(key, format!("is {value}, and must be at most {most}"));
            }
        }
        let positive = [
            ("limits.handshake_timeout", limits.handshake_timeout),
            ("limits.header_timeout", limits.header_timeout),
            ("limits.keepalive_interval", limits.keepalive_interval),
            ("limits.keepalive_timeout", limits.keepalive_timeout),
            ("queue.ageing", self.queue.ageing),
            ("queue.initial_backoff", self.queue.initial_backoff),
            ("queue.ack_timeout", self.queue.ack_timeout),
            ("queue.dead_letter_ttl", self.queue.dead_letter_ttl),
            ("redis.connect_timeout", self.redis.connect_timeout),
            ("redis.command_timeout", self.redis.command_timeout),
            ("artifacts.upload_ttl", self.artifacts.upload_ttl),
            ("runners.heartbeat_interval", runners.heartbeat_interval),
            ("runners.max_stream_age", runners.max_stream_age),
        ];
        for (key, value) in positive {
            if value.is_zero() {
                return refuse(key, "must be more than zero".into());
            }
        }
        if runners.lease_ttl < runners.heartbeat_interval * 2 {
            return refuse(
                "runners.lease_ttl",
                "must be at least twice runners.heartbeat_interval, or one late heartbeat loses leases".into(),
            );
        }
        if self.queue.max_backoff < self.queue.initial_backoff {
            return refuse("queue.max_backoff", "must be at least queue.initial_backoff".into());
        }
        if self.relay.total < self.relay.per_task {
            return refuse("relay.total", "must be at least relay.per_task".into());
        }
        if let Some(problem) = self.artifacts.store_fault() {
            return refuse("artifacts.store", problem);
        }
        if let Some(problem) = self.database.url_fault() {
            return refuse("database.url", problem);
        }
        if !self.redis.url.expose().is_empty() && self.database.url.expose().is_empty() {
            let problem = "must be set where redis.url is: servers that share a Redis share a database, such as postgres://user:password@host:5432/name";
            return refuse("database.url", problem.into());
        }
        for origin in self.http.cors_origins() {
            if !is_origin(origin) {
                let problem = format!(
                    "`{origin}` is no origin; write it as browsers do, such as `https://app.example.org`"
                );
                return refuse("http.cors_origins", problem);
            }
        }
        for host in self.http.allowed_hosts() {
            if !is_host(host) {
                let problem = format!(
                    "`{host}` is no host; write a name or an address, in lower case and without a port"
                );
                return refuse("http.allowed_hosts", problem);
            }
        }
        let addresses = [
            ("telemetry.otlp_endpoint", &self.telemetry.otlp_endpoint),
            ("artifacts.endpoint", &self.artifacts.endpoint),
            ("http.public_url", &self.http.public_url),
        ];
        for (key, url) in addresses {
            let schemes = ["http://", "https://"];
            if !url.is_empty() && !schemes.iter().any(|scheme| url.starts_with(scheme)) {
                return refuse(key, format!("`{url}` must begin with http:// or https://"));
            }
        }
        Ok(())
    }
}
