//! A Postgres of a test's own, on a free port, that is stopped and started again. Syncs are off: it
//! is the process that dies here, not the machine.

use std::{
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use rustix::process::Signal;
use tempfile::TempDir;
use tokio::net::TcpStream;

use super::{SOON, eventually, server::Process};

/// The server and its files.
pub struct Postgres {
    pub port: u16,
    process: Process,
    programs: PathBuf,
    dir: TempDir,
}

impl Postgres {
    /// Starts one with an empty database `postgres`, whose owner is asked for no password.
    pub async fn start() -> Self {
        let programs = programs().expect("initdb: install the package postgresql");
        let dir = tempfile::tempdir().expect("a directory");
        if let Some((user, group)) = account() {
            std::os::unix::fs::chown(dir.path(), Some(user), Some(group)).expect("a directory");
        }
        let mut init = program(&programs, "initdb", dir.path());
        init.arg("-D").arg(dir.path().join("data")).args(["-U", "postgres", "-A", "trust"]);
        init.args(["-E", "UTF8", "--locale=C", "--no-sync"]);
        let made = init.output().expect("initdb");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = free.local_addr().expect("an address").port();
        drop(free);
        let process = spawn(&programs, dir.path(), port);
        let postgres = Self { port, process, programs, dir };
        postgres.answers().await;
        postgres
    }

    /// Where its first database is.
    pub fn url(&self) -> String {
        format!("postgres://postgres@127.0.0.1:{}/postgres", self.port)
    }

    /// Ends it without a checkpoint, as `pg_ctl stop -m immediate` does.
    pub async fn stop_at_once(&mut self) {
        self.process.signal(Signal::QUIT);
        self.process.exited(SOON).await;
    }

    /// Starts it again on the same files.
    pub async fn restart(&mut self) {
        self.process = spawn(&self.programs, self.dir.path(), self.port);
        self.answers().await;
    }

    async fn answers(&self) {
        let (port, url) = (self.port, self.url());
        eventually("Postgres answers", SOON, || async {
            TcpStream::connect(("127.0.0.1", port)).await.ok()?;
            let mut look = Command::new("psql");
            let look = look.args(["-X", "-q", "-d", &url, "-c", "SELECT 1"]).output();
            look.expect("psql").status.success().then_some(())
        })
        .await;
    }
}

fn spawn(programs: &Path, dir: &Path, port: u16) -> Process {
    let mut command = program(programs, "postgres", dir);
    command.arg("-D").arg(dir.join("data")).arg("-k").arg(dir);
    command.args(["-h", "127.0.0.1", "-p", &port.to_string(), "-c", "fsync=off"]);
    command.args(["-c", "full_page_writes=off", "-c", "max_connections=300"]);
    Process::spawn(&mut command, &dir.join("postgres.log"))
}

/// One of its programs, by the account that may run it: they refuse to run as root.
fn program(programs: &Path, name: &str, dir: &Path) -> Command {
    let mut command = Command::new(programs.join(name));
    command.current_dir(dir);
    if let Some((user, group)) = account() {
        command.uid(user).gid(group);
    }
    command
}

/// User and group of the account `postgres`; `None` where this process is not root.
fn account() -> Option<(u32, u32)> {
    if !rustix::process::getuid().is_root() {
        return None;
    }
    let accounts = std::fs::read_to_string("/etc/passwd").expect("accounts");
    let line = accounts.lines().find(|line| line.starts_with("postgres:"));
    let mut numbers = line.expect("the account postgres").split(':').skip(2);
    let mut number = || numbers.next().and_then(|text| text.parse().ok()).expect("a number");
    Some((number(), number()))
}

/// Where they are: on the path, or where Debian puts them, the newest first.
fn programs() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let on_path = std::env::split_paths(&path).find(|dir| dir.join("initdb").exists());
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let installed = versions.map(|version| version.path().join("bin"));
    let newest = installed.filter(|dir| dir.join("initdb").exists()).max();
    on_path.or(newest)
}
