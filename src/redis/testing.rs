//! A real redis-server for tests: private, in a directory of its own, without persistence. Tests
//! kill, stop and empty it.

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    net::{TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::{Redis, Settings};
use crate::{clock::Clock, id::Entropy, supervisor::Supervisor};

/// How long anything here may take.
pub const BOUND: Duration = Duration::from_secs(20);

/// The server.
pub struct Server {
    child: Child,
    port: u16,
    options: Vec<String>,
    folder: TempDir,
}

impl Server {
    /// Starts one.
    pub fn start() -> Self {
        Self::with_options(&[])
    }

    /// Starts one with further options of its command line.
    pub fn with_options(options: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let port = free_port();
        let options: Vec<_> = options.iter().map(|&option| option.to_owned()).collect();
        let child = spawn(port, &options, folder.path());
        let server = Self { child, port, options, folder };
        server.wait();
        server
    }

    /// Starts one that speaks TLS only.
    pub fn tls(cert: &Path, key: &Path) -> Self {
        let port = free_port().to_string();
        let (cert, key) = (cert.to_string_lossy(), key.to_string_lossy());
        let options = ["--tls-port", &port, "--tls-cert-file", &cert, "--tls-key-file", &key];
        let others = ["--tls-auth-clients", "no"];
        let mut server = Self::with_options(&[&options[..], &others].concat());
        server.port = port.parse().unwrap();
        server
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// How it is reached.
    pub fn settings(&self) -> Settings {
        Settings {
            url: format!("redis://127.0.0.1:{}", self.port),
            connect_timeout: Duration::from_secs(2),
            command_timeout: Duration::from_secs(1),
            ..Settings::default()
        }
    }

    /// A connection to it.
    pub async fn connect(&self) -> (Redis, Supervisor) {
        let supervisor = Supervisor::new();
        let redis =
            Redis::connect(self.settings(), Clock::system(), Entropy::system(), &supervisor).await;
        (redis.unwrap(), supervisor)
    }

    /// Kills it.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Starts it again, empty, at the same port.
    pub fn restart(&mut self) {
        self.child = spawn(self.port, &self.options, self.folder.path());
        self.wait();
    }

    /// Stops it in its tracks.
    pub fn pause(&self) {
        self.signal(Signal::STOP);
    }

    /// Lets it go on.
    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }

    /// How many connections wait for something.
    pub fn n_blocked(&self) -> usize {
        let is_it = |line: String| line.strip_prefix("blocked_clients:")?.parse().ok();
        self.answer("INFO clients").find_map(is_it).expect("a number of blocked clients")
    }

    /// Sends a command on a connection of its own; the first line of the answer.
    pub fn command(&self, command: &str) -> String {
        self.answer(command).next().expect("an answer")
    }

    /// The lines of an answer; asked for more than there are, it waits.
    fn answer(&self, command: &str) -> impl Iterator<Item = String> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream.set_read_timeout(Some(BOUND)).unwrap();
        stream.write_all(format!("{command}\r\n").as_bytes()).unwrap();
        BufReader::new(stream).lines().map(Result::unwrap)
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    fn wait(&self) {
        let clock = Clock::system();
        let end = clock.mono() + BOUND;
        while TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            assert!(clock.mono() < end, "redis-server did not start:\n{}", self.log());
            std::thread::yield_now();
        }
    }

    fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may be dead already, or stopped, which does not save it.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn spawn(port: u16, options: &[String], folder: &Path) -> Child {
    let port = port.to_string();
    Command::new("redis-server")
        .args(["--port", &port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"])
        .args(["--logfile", "log", "--dir"])
        .arg(folder)
        .args(options)
        .current_dir(folder)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("redis-server runs; install the package redis-server")
}

/// A port that nobody has. Below those that the system gives to others, so that nobody gets it
/// while a server is down.
fn free_port() -> u16 {
    let from = (Entropy::system().u64() % 10_000) as u16;
    (0..10_000)
        .map(|step| 20_000 + (from + step) % 10_000)
        .find(|&port| TcpListener::bind(("127.0.0.1", port)).is_ok())
        .expect("a free port")
}

/// Waits until something holds.
pub async fn eventually<F: Future<Output = bool>>(what: &str, mut holds: impl FnMut() -> F) {
    let mut pause = tokio::time::interval(Duration::from_millis(10));
    let waiting = async {
        while !holds().await {
            pause.tick().await;
        }
    };
    assert!(tokio::time::timeout(BOUND, waiting).await.is_ok(), "in vain waited for: {what}");
}
