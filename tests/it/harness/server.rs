//! The server: as the real binary in a child process that can be killed and stopped.

use std::{
    fs::{self, File},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::{api::Api, database, eventually};

/// The `baton` binary of this build.
pub const BATON: &str = env!("CARGO_BIN_EXE_baton");

/// A child process that is killed when dropped.
pub struct Process {
    child: Child,
    pub log: PathBuf,
}

impl Process {
    pub fn spawn(command: &mut Command, log: &Path) -> Self {
        let file = File::options().create(true).append(true).open(log).expect("a log file");
        let errors = file.try_clone().expect("the same file");
        command.stdin(Stdio::null()).stdout(file).stderr(errors);
        let child = command.spawn().expect("a child process");
        Self { child, log: log.into() }
    }

    /// The process.
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).expect("a living child");
    }

    /// Ends it as a power cut would, and waits until it is gone.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Whether it has ended, and how.
    pub fn exit_code(&mut self) -> Option<std::process::ExitStatus> {
        self.child.try_wait().expect("a child process")
    }

    pub async fn exited(&mut self, bound: Duration) -> std::process::ExitStatus {
        let started = Instant::now();
        loop {
            if let Some(status) = self.exit_code() {
                return status;
            }
            assert!(started.elapsed() < bound, "still there after {bound:?}: {}", self.tail());
            super::pass(Duration::from_millis(10)).await;
        }
    }

    pub fn read_log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn tail(&self) -> String {
        let log = self.read_log();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("--- end of {} ---\n{}", self.log.display(), self.tail());
        } else {
            let log = self.read_log();
            assert!(
                !log.contains("panicked"),
                "a panic in {}: {}",
                self.log.display(),
                self.tail()
            );
        }
    }
}

/// A server on one port and one data directory, which outlive its processes.
pub struct Server {
    process: Option<Process>,
    pub addr: SocketAddr,
    pub dir: TempDir,
    env: Vec<(String, String)>,
}

/// Settings that make leases short, so that real time suffices.
pub const FAST: &[(&str, &str)] = &[
    ("BATON_RUNNERS_LEASE_TTL", "2s"),
    ("BATON_RUNNERS_HEARTBEAT_INTERVAL", "500ms"),
    ("BATON_RUNNERS_SESSION_GRACE", "2s"),
];

impl Server {
    /// Starts one without credentials and waits until it is ready.
    pub async fn start(env: &[(&str, &str)]) -> Self {
        let mut server = Self::stopped(env);
        server.restart().await;
        server
    }

    /// One that has not been started: its port is chosen and its data directory is there.
    pub fn stopped(env: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let port = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let addr = port.local_addr().expect("an address");
        let mut all = vec![
            ("BATON_SERVER_ADDR".to_owned(), addr.to_string()),
            ("BATON_STORAGE_DATA_DIR".into(), dir.path().join("data").display().to_string()),
            ("BATON_STORAGE_MIN_FREE".into(), "0".into()),
            ("BATON_AUTH_REQUIRED".into(), "false".into()),
        ];
        all.extend(database::url(dir.path()).map(|url| ("BATON_DATABASE_URL".to_owned(), url)));
        let given = env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        all.extend(given);
        Self { process: None, addr, dir, env: all }
    }

    /// The data directory.
    pub fn data_dir(&self) -> PathBuf {
        let key = "BATON_STORAGE_DATA_DIR";
        let last = self.env.iter().rev().find(|(name, _)| name == key);
        last.map(|(_, value)| value.into()).expect("a data directory")
    }

    /// The variables of the next start.
    pub fn env(&self) -> impl Iterator<Item = (&str, &str)> {
        self.env.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// Sets a variable for the next start.
    pub fn set_env(&mut self, name: &str, value: &str) {
        self.env.push((name.into(), value.into()));
    }

    /// Starts a process; does not wait.
    pub fn spawn(&mut self) {
        let mut command = Command::new(BATON);
        command.args(["server", "start"]).envs(self.env.iter().cloned());
        self.process = Some(Process::spawn(&mut command, &self.dir.path().join("server.log")));
    }

    /// Starts a process and waits until it is ready; says how long that took.
    pub async fn restart(&mut self) -> Duration {
        let started = Instant::now();
        self.spawn();
        let addr = self.addr;
        let what = format!("the server on {addr} is ready");
        eventually(&what, Duration::from_secs(20), || async move {
            (http_status(addr, "/readyz").await == Some(200)).then_some(())
        })
        .await;
        started.elapsed()
    }

    pub fn process(&mut self) -> &mut Process {
        self.process.as_mut().expect("a running server")
    }

    /// Ends the process as a power cut would.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill();
        }
    }

    pub fn api(&self) -> Api {
        Api::new(self.addr)
    }

    /// The real runner agent with engine echo, connected to `addr`: this server or a link to it.
    pub fn agent(&self, name: &str, addr: SocketAddr, model: &str, slots: u32) -> Process {
        let mut command = Command::new(BATON);
        command
            .args(["runner", "start", "--engine", "echo", "--model", model, "--name", name])
            .args(["--slots", &slots.to_string()])
            .env("BATON_ADDRESS", format!("http://{addr}"));
        Process::spawn(&mut command, &self.dir.path().join(format!("{name}.log")))
    }
}

/// A number without labels in the server's metrics.
pub async fn metric(addr: SocketAddr, name: &str) -> Option<i64> {
    let text = reqwest::get(format!("http://{addr}/metrics")).await.ok()?.text().await.ok()?;
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
}

/// Status of a plain HTTP GET; `None` when nobody answers.
pub async fn http_status(addr: SocketAddr, path: &str) -> Option<u16> {
    let bound = Duration::from_secs(5);
    let request = reqwest::Client::new().get(format!("http://{addr}{path}")).timeout(bound);
    Some(request.send().await.ok()?.status().as_u16())
}
