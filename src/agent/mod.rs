//! The runner agent: holds a session with a server and executes attempts on an engine.
//!
//! One future does all the talking: it opens `Connect` and `Output` on connections of
//! their own, answers what the server sends, sends heartbeats on a timer, comes back with
//! full jitter when a stream breaks, and leaves in order. Engines run beside it
//! ([`slots`]), on threads of their own where [`Config::engine_threads`] asks for it, and
//! put what they make into the [`outbox`], which the Output stream empties whenever it can
//! take something: one message then carries what is ready of all attempts.
//!
//! What must survive a broken stream stands in [`outbox`] (events, credits) and
//! [`mailbox`] (control messages); streams only pull from them. [`poll`] does the same
//! with unary calls where streams do not get through.

mod commands;
pub mod connection;
pub mod emitter;
pub mod engine;
pub mod files;
#[cfg(test)]
mod leaving_tests;
mod mailbox;
mod node;
mod offers;
pub mod outbox;
mod output;
mod poll;
mod session;
mod slots;
mod stream;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use anyhow::Context as _;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use self::{
    commands::{Commands, Told},
    connection::Credential,
    engine::Engine,
    mailbox::Mailbox,
    outbox::Outbox,
    session::Session,
    slots::{Ended, Slots},
};
pub use self::{connection::Connector, node::gpus};
use crate::{
    clock::{Clock, Mono},
    id::Entropy,
    pb,
    runners::protocol::{Backoff, feature},
    tls::Trust,
};

/// How the agent talks to the server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Streams, and unary calls for a while where streams keep breaking.
    #[default]
    Auto,
    /// Streams alone.
    Stream,
    /// Unary calls alone.
    Poll,
}

/// Settings of a runner.
#[derive(Clone)]
pub struct Config {
    /// Address of the server, such as `http://127.0.0.1:7070`.
    pub server: String,
    /// API key with scope `runner`; none where the server asks for none.
    pub api_key: Option<String>,
    /// How runner and server know each other where the address is `https://…`.
    pub trust: Trust,
    /// Stable name, unique in the namespace; see [`default_runner_id`].
    pub runner_id: String,
    /// Labels that tasks may require.
    pub labels: BTreeMap<String, String>,
    /// Pools that it belongs to.
    pub pools: Vec<String>,
    /// Models that it serves: `owner/name`, `owner/name@version` or `*`. May be empty with an
    /// engine that loads models by command.
    pub models: Vec<String>,
    /// Most attempts at once; at least 1.
    pub slots: u32,
    /// The engine.
    pub engine: engine::Settings,
    /// Threads that engines run on; 0 shares the caller's runtime, which suits engines that
    /// never block.
    pub engine_threads: usize,
    /// How to talk to the server.
    pub mode: Mode,
    /// Attempts still running this long after the drain began are handed back.
    pub drain_time: Duration,
    /// Events wait this long for more to go with them; zero sends at once.
    pub flush_interval: Duration,
}

impl Config {
    /// A runner of `engine` for all models with one slot; names itself.
    pub fn new(server: impl Into<String>, engine: engine::Settings, entropy: &Entropy) -> Self {
        Self {
            server: server.into(),
            api_key: None,
            trust: Trust::default(),
            runner_id: default_runner_id(entropy),
            labels: BTreeMap::new(),
            pools: Vec::new(),
            models: vec!["*".into()],
            slots: 1,
            engine,
            engine_threads: 1,
            mode: Mode::Auto,
            drain_time: Duration::from_mins(5),
            flush_interval: Duration::ZERO,
        }
    }
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Config")
            .field("server", &self.server)
            .field("api_key", &self.api_key.as_ref().map(|_| "[redacted]"))
            .field("trust", &self.trust)
            .field("runner_id", &self.runner_id)
            .field("labels", &self.labels)
            .field("pools", &self.pools)
            .field("models", &self.models)
            .field("slots", &self.slots)
            .field("engine", &self.engine)
            .field("engine_threads", &self.engine_threads)
            .field("mode", &self.mode)
            .field("drain_time", &self.drain_time)
            .field("flush_interval", &self.flush_interval)
            .finish()
    }
}

/// A runner's name: the host's, with a suffix so that several fit on a host.
pub fn default_runner_id(entropy: &Entropy) -> String {
    format!("{}-{:04x}", node::host_name(), entropy.u64() & 0xffff)
}

/// How a runner is asked to go.
#[derive(Clone, Debug, Default)]
pub struct Shutdown {
    /// Take no more work, finish or hand back within the drain time, leave.
    pub drain: CancellationToken,
    /// Stop now.
    pub stop: CancellationToken,
}

/// Runs a runner until it has left or was stopped.
///
/// # Errors
/// When the settings are wrong, the engine cannot be loaded, or the server refuses the
/// runner for good (credential, protocol version).
pub async fn run(
    config: Config,
    clock: Clock,
    entropy: Entropy,
    shutdown: Shutdown,
) -> anyhow::Result<()> {
    let engine = engine::load(&config.engine).await?;
    let connector = connection::connector(&config.server, &config.trust)?;
    run_with(config, engine, connector, clock, entropy, shutdown).await
}

/// [`run`] with an engine and connections of the caller's own.
///
/// # Errors
/// As [`run`].
pub async fn run_with(
    config: Config,
    engine: Arc<dyn Engine>,
    connector: Connector,
    clock: Clock,
    entropy: Entropy,
    shutdown: Shutdown,
) -> anyhow::Result<()> {
    anyhow::ensure!(config.slots > 0, "a runner needs at least one slot");
    anyhow::ensure!(
        !config.models.is_empty() || engine.features().contains(&feature::APPLY),
        "a runner whose engine does not load models by command needs at least one model"
    );
    let threads = match config.engine_threads {
        0 => None,
        n => Some(EngineThreads::start(n)?),
    };
    let outbox = Outbox::new(config.slots);
    let runtime = threads.as_ref().map(|threads| threads.handle.clone());
    let agent = Agent {
        credential: Credential::new(config.api_key.as_deref())?,
        instance_id: format!("{:016x}", entropy.u64()),
        commands: Commands::new(runtime.clone()),
        slots: Slots::new(engine.clone(), outbox.clone(), clock.clone(), runtime),
        mailbox: Mailbox::default(),
        session: Session::default(),
        leaving: Leaving::default(),
        paused: false,
        gpus: node::Gpus::measure(clock.clone()).await,
        models: config.models.clone(),
        config,
        engine,
        files: files::Way::new(connector.clone(), clock.clone(), entropy.clone()),
        connector,
        clock,
        entropy,
        shutdown,
        outbox,
    };
    // The future of a whole life is large; it belongs on the heap.
    let ended = Box::pin(agent.live()).await;
    drop(threads);
    ended
}

/// Threads for engines; they end in the background when dropped.
struct EngineThreads {
    handle: tokio::runtime::Handle,
    runtime: Option<tokio::runtime::Runtime>,
}

impl EngineThreads {
    fn start(n: usize) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(n)
            .thread_name("engine")
            .enable_all()
            .build()
            .context("cannot start threads for the engine")?;
        Ok(Self { handle: runtime.handle().clone(), runtime: Some(runtime) })
    }
}

impl Drop for EngineThreads {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Everything of one runner.
struct Agent {
    config: Config,
    engine: Arc<dyn Engine>,
    connector: Connector,
    /// The way of artifacts' bytes.
    files: files::Way,
    credential: Credential,
    clock: Clock,
    entropy: Entropy,
    shutdown: Shutdown,
    instance_id: String,
    outbox: Outbox,
    mailbox: Mailbox,
    slots: Slots,
    session: Session,
    leaving: Leaving,
    commands: Commands,
    /// Models that it serves, as it announces them.
    models: Vec<String>,
    paused: bool,
    gpus: node::Gpus,
}

/// How far the runner is on its way out.
#[derive(Debug, Default)]
struct Leaving {
    /// No more work is taken.
    draining: bool,
    /// When attempts are handed back.
    hand_back_at: Option<Mono>,
    /// Whether to end when nothing is held.
    exit: bool,
    /// Commands to answer when nothing is held.
    commands: Vec<String>,
    /// Attempts held when the drain began.
    n_held: u32,
    /// What the commands were told of it.
    told: Told,
    /// Whether the supervisor's token has been heeded.
    heeded: bool,
    /// Whether to end now.
    stopped: bool,
}

/// Why a way of talking to the server came to its end.
#[derive(Debug)]
enum End {
    /// The runner has left, or was stopped.
    Left,
    /// A new connection is wanted.
    Renew,
    /// It broke; whether that looks like a network that does not carry streams.
    Broken { suspicious: bool, why: String },
    /// The server refuses the runner.
    Refused(Status),
}

/// What happens inside the runner.
enum Local {
    Stop,
    Drain,
    HandBack,
    /// An attempt's engine has ended.
    Ended(Ended),
    Command(commands::Event),
    /// The graphics processors were measured.
    Measured,
}

impl Agent {
    async fn live(mut self) -> anyhow::Result<()> {
        /// Suspicious ends in a row after which streams are given up.
        const SUSPICIOUS: u32 = 3;
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(10));
        let mut n_suspicious = 0;
        loop {
            let polls = match self.config.mode {
                Mode::Auto => n_suspicious >= SUSPICIOUS,
                Mode::Stream => false,
                Mode::Poll => true,
            };
            let welcomes = self.session.n_welcomes;
            let end = if polls { self.poll().await } else { self.stream().await };
            if self.session.n_welcomes > welcomes {
                backoff.reset();
            }
            match end {
                End::Left => return Ok(()),
                End::Renew => n_suspicious = 0,
                End::Refused(status) => {
                    return Err(anyhow::Error::new(status).context("the server refused the runner"));
                }
                End::Broken { suspicious, why } => {
                    n_suspicious = if suspicious { n_suspicious + 1 } else { 0 };
                    if n_suspicious == SUSPICIOUS && self.config.mode == Mode::Auto {
                        tracing::warn!("streams keep breaking: polling instead for a while");
                        continue;
                    }
                    let wait = backoff.next(self.entropy.unit());
                    let wait_ms = wait.as_millis() as u64;
                    tracing::warn!(why, wait_ms, "not connected; trying again");
                    let pause = self.clock.sleep(wait);
                    if let Some(End::Left) = self.meanwhile(pause).await.err() {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// The next thing that happens inside. Can be dropped and called again.
    async fn local(&mut self) -> Local {
        let hand_back = self.leaving.hand_back_at.map(|at| self.clock.sleep_until(at));
        tokio::select! {
            biased;
            () = self.shutdown.stop.cancelled(), if !self.leaving.stopped => Local::Stop,
            () = self.shutdown.drain.cancelled(), if !self.leaving.heeded => Local::Drain,
            () = async { hand_back.expect("the guard checked it").await }, if hand_back.is_some() => {
                Local::HandBack
            }
            ended = self.slots.ended() => Local::Ended(ended),
            event = self.commands.next(&self.clock) => Local::Command(event),
            () = self.gpus.measured_again() => Local::Measured,
        }
    }

    fn on_local(&mut self, local: Local) {
        match local {
            Local::Stop => {
                tracing::info!("stopping now");
                self.leaving.stopped = true;
            }
            Local::Drain => {
                self.leaving.heeded = true;
                self.drain(self.config.drain_time, true);
            }
            Local::HandBack => {
                self.leaving.hand_back_at = None;
                self.slots.hand_back("the runner is leaving", |_, _| true);
            }
            Local::Ended(Ended { key, freed }) => {
                if freed {
                    self.announce();
                }
                self.on_stopped(key);
            }
            Local::Command(event) => self.on_command_event(event),
            Local::Measured => {}
        }
    }

    /// Takes no more work; hands back after `time` what is still running.
    fn drain(&mut self, time: Duration, exit: bool) {
        tracing::info!(held = self.outbox.digest().0, exit, "draining");
        let at = self.clock.mono() + time;
        if !std::mem::replace(&mut self.leaving.draining, true) {
            self.leaving.n_held = self.outbox.digest().0;
            self.leaving.told = Told::default();
        }
        self.leaving.exit |= exit;
        self.leaving.hand_back_at =
            Some(self.leaving.hand_back_at.map_or(at, |before| before.min(at)));
        self.announce();
    }

    /// Announces what is offered now, if that is news, and the credits of now.
    fn announce(&mut self) {
        self.outbox.set_accepting(self.is_accepting());
        let offer = self.offer();
        if self.session.is_news(&offer) {
            self.mailbox.push(pb::connect_request::Body::Offer(offer));
        }
        self.mailbox.push(pb::connect_request::Body::Credits(self.outbox.credits()));
    }

    /// Whether nothing keeps a draining runner.
    fn is_drained(&self) -> bool {
        self.leaving.draining && self.outbox.is_empty()
    }

    /// Waits for `future` while attempts go on; `Left` when the runner may leave without a
    /// word, having no connection to say it on.
    async fn meanwhile<T>(&mut self, future: impl Future<Output = T>) -> Result<T, End> {
        let mut future = std::pin::pin!(future);
        loop {
            self.commands_go_on();
            if self.leaving.stopped || (self.leaving.exit && self.is_drained()) {
                return Err(End::Left);
            }
            tokio::select! {
                biased;
                local = self.local() => self.on_local(local),
                value = &mut future => return Ok(value),
            }
        }
    }
}
