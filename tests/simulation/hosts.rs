//! The hosts of a simulation: servers, alone or on one database and one Redis, and runners.

use std::{
    io,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use baton::{
    agent::{
        self, Shutdown, connection,
        emitter::Emitter,
        engine::{self, Change, Completion, Engine, Failure, Progress, Work},
    },
    app::{App, Outside},
    clock::{Clock, EPOCH, Micros},
    config::{Config, Secret},
    db,
    error::{Error, Result},
    grpc::serve::Listener,
    id::Entropy,
};
use futures_util::future::BoxFuture;
use hyper_util::rt::TokioIo;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use super::{
    imitation::Imitation,
    users::{Book, Notes},
};

const PORT: u16 = 7070;
/// As far ahead as a wrong clock is.
const AHEAD: Duration = Duration::from_secs(30);
/// Longest wait for Redis.
const REDIS_BOUND: Duration = Duration::from_secs(2);

/// Which servers there are, and how they are found: each connection goes to any of them.
#[derive(Clone)]
pub struct Site {
    pub seed: u64,
    pub n_servers: u64,
    /// What servers share, where there are several.
    pub shared: Option<Shared>,
    /// Which server a connection gets.
    dice: Entropy,
}

/// What servers share.
#[derive(Clone)]
pub struct Shared {
    pub redis: Imitation,
    pub database: Arc<Mutex<Database>>,
    dice: Entropy,
}

/// The ways to the database.
#[derive(Default)]
pub struct Database {
    /// Servers that cannot reach it.
    pub cut: Vec<String>,
    /// Chance of a thousand that a message is lost.
    pub losses: u64,
}

impl Shared {
    fn new(seed: u64) -> Self {
        let now = || EPOCH + turmoil::sim_elapsed().unwrap_or_default();
        let redis = Imitation::new(now, Entropy::seeded(seed ^ 0x5ed));
        Self { redis, database: Arc::default(), dice: Entropy::seeded(seed ^ 0xdb) }
    }
}

impl Site {
    pub fn new(seed: u64, n_servers: u64) -> Self {
        let shared = (n_servers > 1).then(|| Shared::new(seed));
        Self { seed, n_servers, shared, dice: Entropy::seeded(seed ^ 0x517e) }
    }

    pub fn servers(&self) -> impl Iterator<Item = String> + use<> {
        (0..self.n_servers).map(server_name)
    }

    /// A channel to any server.
    pub fn channel(&self) -> Channel {
        let site = self.clone();
        let connector = tower::service_fn(move |_| connect(site.any()));
        endpoint().connect_with_connector_lazy(connector)
    }

    fn any(&self) -> String {
        server_name(self.dice.u64() % self.n_servers)
    }
}

/// A channel to one server.
pub fn channel_to(server: String) -> Channel {
    let connector = tower::service_fn(move |_| connect(server.clone()));
    endpoint().connect_with_connector_lazy(connector)
}

pub fn server_name(i: u64) -> String {
    format!("server-{i}")
}

pub fn runner_name(i: u64) -> String {
    format!("runner-{i}")
}

/// The way of a server to the database.
struct Way {
    shared: Shared,
    name: String,
}

impl Way {
    /// Whether it can be gone.
    fn is_open(&self) -> bool {
        let database = self.shared.database.lock().expect("nobody failed");
        let lost = database.losses > 0 && self.shared.dice.u64() % 1000 < database.losses;
        !lost && !database.cut.contains(&self.name)
    }
}

impl db::Way for Way {
    fn go(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            tokio::time::sleep(Duration::from_millis(self.shared.dice.u64() % 4)).await;
            if self.is_open() {
                return Ok(());
            }
            // Refused at once, or waited for in vain.
            let wait = if self.shared.dice.u64().is_multiple_of(2) { 5000 } else { 5 };
            tokio::time::sleep(Duration::from_millis(wait)).await;
            Err(Error::storage("the database is out of reach"))
        })
    }

    fn now(&self) -> Micros {
        EPOCH + turmoil::sim_elapsed().unwrap_or_default()
    }
}

/// A simulated network's listener.
struct SimListener(turmoil::net::TcpListener);

impl Listener for SimListener {
    type Conn = turmoil::net::TcpStream;
    type Io = turmoil::net::TcpStream;

    async fn accept(&mut self) -> io::Result<(Self::Conn, SocketAddr)> {
        self.0.accept().await
    }

    fn attach(conn: Self::Conn) -> io::Result<Self::Io> {
        Ok(conn)
    }
}

fn endpoint() -> tonic::transport::Endpoint {
    connection::endpoint("http://server:7070").expect("a valid address")
}

async fn connect(server: String) -> io::Result<TokioIo<turmoil::net::TcpStream>> {
    turmoil::net::TcpStream::connect((server, PORT)).await.map(TokioIo::new)
}

/// A server, whose files are in `dir`.
pub async fn server(site: Site, i: u64, dir: PathBuf) -> turmoil::Result {
    let (name, elapsed) = (server_name(i), turmoil::sim_elapsed().unwrap_or_default());
    let mut config = Config::default();
    config.storage.data_dir = dir.join(&name);
    config.auth.required = false;
    let mut outside = Outside::default();
    let way = site.shared.clone().map(|shared| {
        config.database.url = Secret::from("postgres://imitation/baton");
        config.redis.url = Secret::from("redis://imitation");
        outside.redis = Some(shared.redis.way(&name, REDIS_BOUND));
        Arc::new(Way { shared, name: name.clone() }) as Arc<dyn db::Way>
    });
    outside.database = Some(db::Simulated { path: dir.join("baton.db"), way });
    // One of several may have a wrong clock.
    let is_wrong = site.shared.is_some() && site.seed % 6 == i;
    let clock = Clock::simulated(elapsed + if is_wrong { AHEAD } else { Duration::ZERO });
    // Ids must differ between starts.
    let entropy = Entropy::seeded(site.seed ^ (elapsed.as_millis() as u64) << 20 ^ i << 12);
    let addr = SocketAddr::from(([0, 0, 0, 0], PORT));
    let listener = SimListener(turmoil::net::TcpListener::bind(addr).await?);
    let app = match App::start_on(listener, addr, config, (clock, entropy), outside).await {
        Ok(app) => app,
        // What it shares may be away: it ends, and is started again.
        Err(_) if site.shared.is_some() => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    app.stopped().await;
    Err(format!("the server stopped by itself: {:?}", app.supervisor.failures()).into())
}

/// A runner, which notes what it is given.
pub async fn runner(site: Site, i: u64, book: Book) -> turmoil::Result {
    let boot = turmoil::sim_elapsed().unwrap_or_default();
    let entropy = Entropy::seeded(site.seed ^ (i + 1) << 40 ^ boot.as_millis() as u64);
    let mut config = agent::Config::new("http://server:7070", engine::Settings::Echo, &entropy);
    config.runner_id = runner_name(i);
    config.slots = 2;
    config.engine_threads = 0;
    let connector: connection::Connector = Arc::new(move || {
        let site = site.clone();
        Box::pin(async move {
            let connector = tower::service_fn(move |_| connect(site.any()));
            Ok(endpoint().connect_with_connector(connector).await?)
        })
    });
    let token = CancellationToken::new;
    let shutdown = Shutdown { drain: token(), stop: token() };
    let engine =
        Arc::new(Witness { echo: engine::echo::Echo::default(), runner: runner_name(i), book });
    agent::run_with(config, engine, connector, Clock::simulated(boot), entropy, shutdown).await?;
    Err("the runner left by itself".into())
}

/// An attempt that runs.
struct Running {
    book: Book,
    task: String,
}

impl Running {
    fn new(noted: &mut Notes, book: &Book, task: String) -> Self {
        *noted.running.entry(task.clone()).or_default() += 1;
        Self { book: book.clone(), task }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(mut book) = self.book.lock()
            && let Some(n_running) = book.running.get_mut(&self.task)
        {
            *n_running -= 1;
            tracing::debug!(self.task, "runs no more");
        }
    }
}

/// An engine that sees who runs what.
struct Witness {
    echo: engine::echo::Echo,
    runner: String,
    book: Book,
}

impl Engine for Witness {
    fn name(&self) -> &'static str {
        self.echo.name()
    }

    fn version(&self) -> String {
        self.echo.version()
    }

    fn run(&self, work: Work, emitter: Emitter) -> BoxFuture<'static, Result<Completion, Failure>> {
        let attempt = (work.task.to_string(), work.attempt);
        tracing::debug!(?attempt, "begins");
        let mut book = self.book.lock().expect("no user failed");
        let runner = book.attempts.entry(attempt.clone()).or_insert_with(|| self.runner.clone());
        assert_eq!(*runner, self.runner, "P4, two runners got attempt {attempt:?}");
        let running = Running::new(&mut book, &self.book, work.task.to_string());
        drop(book);
        let run = self.echo.run(work, emitter);
        Box::pin(async move {
            let _running = running;
            run.await
        })
    }

    fn features(&self) -> &'static [&'static str] {
        self.echo.features()
    }

    fn change(&self, change: Change, progress: Progress) -> BoxFuture<'static, Result<()>> {
        self.echo.change(change, progress)
    }

    fn params(&self) -> serde_json::Map<String, serde_json::Value> {
        self.echo.params()
    }
}
