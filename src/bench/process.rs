//! Processes under measurement: starts them, talks to them in lines of JSON, and reads their
//! processor time and memory from `/proc`.

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use anyhow::{Context as _, bail};
use rustix::{
    process::{Pid, Signal, kill_process},
    time::{ClockId, clock_gettime},
};
use serde::{Serialize, de::DeserializeOwned};

/// `CLOCK_MONOTONIC` in nanoseconds: one scale for all processes of a machine.
pub fn now_ns() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Processor time that the living threads of a process have used, in microseconds.
///
/// Threads that ended are not in it; neither server nor yardsticks end threads while they are
/// measured.
pub fn cpu_us(pid: u32) -> u64 {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return 0 };
    let nanos: u64 = threads
        .flatten()
        .filter_map(|thread| fs::read_to_string(thread.path().join("schedstat")).ok())
        .filter_map(|line| line.split_whitespace().next()?.parse::<u64>().ok())
        .sum();
    nanos / 1000
}

/// Processor time that the children of a process have used, in microseconds; of those that have
/// ended, in steps of 10 ms.
pub fn children_cpu_us(pid: u32) -> u64 {
    let Ok(processes) = fs::read_dir("/proc") else { return 0 };
    let living: u64 = processes
        .flatten()
        .filter_map(|process| process.file_name().to_str()?.parse().ok())
        .filter(|child| parent(*child) == Some(pid))
        .map(cpu_us)
        .sum();
    living + ended_children_cpu_us(pid).unwrap_or(0)
}

/// What `proc_pid_stat(5)` has of children that were waited for, in its ticks of 10 ms.
fn ended_children_cpu_us(pid: u32) -> Option<u64> {
    const TICK_US: u64 = 10_000;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything; `cutime` and `cstime` are the 14th and 15th after it.
    let (_, rest) = stat.rsplit_once(')')?;
    let ticks = rest.split_whitespace().skip(13).take(2).map(str::parse::<u64>);
    Some(ticks.sum::<Result<u64, _>>().ok()? * TICK_US)
}

/// The process that started a process.
pub fn parent(pid: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse().ok()
}

/// Resident memory of a process in KiB.
pub fn rss_kib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

/// A child process; it is ended when this is dropped.
pub struct Process {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

impl Process {
    /// Starts a command whose standard output is read here.
    pub fn start(command: &mut Command) -> anyhow::Result<Self> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("could not start {}", command.get_program().display()))?;
        let stdin = child.stdin.take();
        let stdout = BufReader::new(child.stdout.take().context("no pipe from the child")?);
        Ok(Self { child, stdin, stdout })
    }

    /// Starts this binary in one of the roles of a benchmark.
    pub fn role(role: &impl Serialize) -> anyhow::Result<Self> {
        let binary = std::env::current_exe().context("this binary's path is unknown")?;
        let mut process = Self::start(Command::new(binary).args(["bench", "role"]))?;
        let stdin = process.stdin.as_mut().context("no pipe to the child")?;
        writeln!(stdin, "{}", serde_json::to_string(role)?)?;
        stdin.flush()?;
        Ok(process)
    }

    /// Reads one line of JSON.
    pub fn answer<T: DeserializeOwned>(&mut self) -> anyhow::Result<T> {
        let mut line = String::new();
        self.stdout.read_line(&mut line)?;
        if line.is_empty() {
            bail!("the process ended without an answer: {}", self.child.wait()?);
        }
        serde_json::from_str(&line).with_context(|| format!("not an answer: {line}"))
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Process {
    /// Ends it as a power cut would, and waits until it is gone.
    pub fn kill(&mut self) {
        drop(self.stdin.take());
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        if let (Some(pid), Ok(None)) = (pid, self.child.try_wait()) {
            let _ = kill_process(pid, Signal::KILL);
        }
        let _ = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A child's side: reads its role from the first line of standard input.
pub fn read_role<T: DeserializeOwned>() -> anyhow::Result<T> {
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line)?;
    serde_json::from_str(&line).context("not a role")
}

/// A child's side: prints one line of JSON.
pub fn print_answer(answer: &impl Serialize) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", serde_json::to_string(answer)?)?;
    Ok(out.flush()?)
}

/// A child's side: waits until the parent closes the pipe.
pub fn wait_for_parent() {
    let mut line = String::new();
    while matches!(std::io::stdin().lock().read_line(&mut line), Ok(n) if n > 0) {
        line.clear();
    }
}
