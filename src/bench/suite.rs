//! Which cases there are, with what they are compared, and in what order they run: yardstick and
//! Baton in turn, so that a drift of the machine touches both.

use std::{net::SocketAddr, path::PathBuf, process::Command};

use anyhow::Context as _;
use serde::de::DeserializeOwned;

use super::{
    Role, cluster,
    database::Database,
    decisions,
    figures::Latency,
    files, lives, memory,
    process::{Process, now_ns},
    relay::{self, Server},
    report::{Better, Row},
    restart, shim, tasks, unary, yardstick,
};

/// How much to measure.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Repetitions of each case.
    pub repeat: usize,
    /// Shorter spans and fewer of everything.
    pub quick: bool,
    /// Cases to run; all when empty.
    pub only: Vec<String>,
    /// Threads of Baton that serve connections.
    pub io_threads: usize,
    /// Where databases are put; the system's place for temporary files when unset.
    pub dir: Option<PathBuf>,
    /// A server of Postgres on which each server under test gets a database of its own.
    pub database_url: Option<String>,
    /// A Redis in which the servers under test that are on Postgres share their queues.
    pub redis_url: Option<String>,
}

/// Measures and judges.
type Case = fn(&Plan) -> anyhow::Result<Vec<Row>>;

/// The cases and the names that they go by, in order.
const CASES: [(&str, Case); 15] = [
    ("G1,G3", paced),
    ("G2", stepped),
    ("G4", fastest),
    ("G7", idle),
    ("G8", slow),
    ("G9", shim::events),
    ("G10", shim::json_calls),
    ("G11,G12,G13", lives::whole_lives),
    ("G14", paced_tasks),
    ("cluster", cluster::case),
    ("G15", control_calls),
    ("G16", decide),
    ("cancel,reconnect", interruptions),
    ("restart", restarts),
    ("artifacts", files::case),
];

/// A name out of [`CASES`], for the command line.
pub fn case(name: &str) -> Result<String, String> {
    let mut known = CASES.iter().flat_map(|(names, _)| names.split(','));
    if known.clone().any(|known| known.eq_ignore_ascii_case(name)) {
        return Ok(name.to_owned());
    }
    let last = known.next_back().unwrap_or_default();
    Err(format!("the cases are {} and {last}", known.collect::<Vec<_>>().join(", ")))
}

/// Runs the cases of a plan; `done` sees each row as soon as it is there.
pub fn run(plan: &Plan, mut done: impl FnMut(&str, &[Row])) -> Vec<Row> {
    let mut rows = Vec::new();
    for (name, case) in CASES {
        let wanted = |only: &String| name.split(',').any(|part| part.eq_ignore_ascii_case(only));
        if !plan.only.is_empty() && !plan.only.iter().any(wanted) {
            continue;
        }
        let found = case(plan).unwrap_or_else(|error| vec![Row::failed(name, "", &error)]);
        done(name, &found);
        rows.extend(found);
    }
    rows
}

impl Plan {
    /// Length of a measured span.
    pub(super) fn seconds(&self) -> f64 {
        if self.quick { 2.0 } else { 4.0 }
    }

    pub(super) fn dir(&self) -> anyhow::Result<Scratch> {
        let parent = self.dir.clone().unwrap_or_else(std::env::temp_dir);
        let name = format!("baton-bench-{}-{}", std::process::id(), now_ns());
        let path = parent.join(&name);
        std::fs::create_dir_all(&path)?;
        let database = self.database_url.as_deref().map(Database::create).transpose()?;
        let mut settings = Vec::new();
        if let Some(database) = &database {
            settings.push(("BATON_DATABASE_URL", database.url.clone()));
            if let Some(redis) = &self.redis_url {
                settings.push(("BATON_REDIS_URL", redis.clone()));
                settings.push(("BATON_REDIS_PREFIX", format!("{name}:")));
            }
        }
        Ok(Scratch { path, database, settings })
    }
}

/// A directory, and a database where one is asked for, that go with their case.
pub(super) struct Scratch {
    pub(super) path: PathBuf,
    pub(super) database: Option<Database>,
    /// What servers share: variables and their values.
    pub(super) settings: Vec<(&'static str, String)>,
}

impl Scratch {
    /// Where a server keeps its data.
    fn data(&self) -> PathBuf {
        self.path.join("data")
    }

    /// Where it logs.
    pub(super) fn log(&self) -> PathBuf {
        self.path.join("server.log")
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

/// Runs a role to its end.
pub(super) fn play<T: DeserializeOwned>(role: &Role) -> anyhow::Result<T> {
    Process::role(role)?.answer()
}

/// A yardstick that runs.
fn bare(relay: yardstick::Relay, threads: usize) -> anyhow::Result<(Process, Server)> {
    let mut process = Process::role(&Role::Yardstick(yardstick::Spec { relay, threads }))?;
    let listening: yardstick::Listening = process.answer()?;
    let addr = ([127, 0, 0, 1], listening.port).into();
    let server = Server { addr, pid: process.pid(), baton: false, token: None, database: None };
    Ok((process, server))
}

/// A server of Baton that runs on an empty directory, credentials required.
pub(super) fn baton(plan: &Plan) -> anyhow::Result<((Process, Scratch), Server)> {
    let dir = plan.dir()?;
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0))?;
    let addr = listener.local_addr()?;
    drop(listener);
    let process = start(plan, &dir, addr)?;
    let key = dir.data().join("admin.key");
    let deadline = now_ns() + 20_000_000_000;
    let token = loop {
        let token = std::fs::read_to_string(&key).unwrap_or_default();
        if !token.is_empty() && std::net::TcpStream::connect(addr).is_ok() {
            break token.trim().to_owned();
        }
        if now_ns() > deadline {
            let log = std::fs::read_to_string(dir.log()).unwrap_or_default();
            anyhow::bail!("the server did not start: {log}");
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    };
    let database = dir.database.as_ref().and_then(Database::postmaster);
    let server = Server { addr, pid: process.pid(), baton: true, token: Some(token), database };
    Ok(((process, dir), server))
}

/// Starts a server of Baton in a directory.
pub(super) fn start(plan: &Plan, dir: &Scratch, addr: SocketAddr) -> anyhow::Result<Process> {
    let binary = std::env::current_exe().context("this binary's path is unknown")?;
    let mut command = Command::new(binary);
    command
        .args(["server", "start"])
        .env("BATON_SERVER_ADDR", addr.to_string())
        .env("BATON_STORAGE_DATA_DIR", dir.data())
        .env("BATON_SERVER_IO_THREADS", plan.io_threads.to_string());
    command.envs(dir.settings.iter().map(|(name, value)| (*name, value.as_str())));
    command.stderr(std::fs::File::create(dir.log())?);
    Process::start(&mut command)
}

/// Runs the same load on a yardstick and on Baton, in turn.
pub(super) fn in_turn(
    plan: &Plan,
    relay: yardstick::Relay,
    threads: usize,
    spec: impl Fn(Server) -> relay::Spec,
) -> anyhow::Result<(Vec<relay::Outcome>, Vec<relay::Outcome>)> {
    let (_bare, yardstick) = bare(relay, threads)?;
    let (_baton, product) = baton(plan)?;
    let (mut floor, mut ours) = (Vec::new(), Vec::new());
    for _ in 0..plan.repeat {
        floor.push(play(&Role::Relay(spec(yardstick.clone()))).context("yardstick")?);
        ours.push(play(&Role::Relay(spec(product.clone()))).context("baton")?);
    }
    Ok((floor, ours))
}

pub(super) fn each<T>(outcomes: &[T], of: impl Fn(&T) -> f64) -> Vec<f64> {
    outcomes.iter().map(of).collect()
}

pub(super) fn lost(outcomes: &[relay::Outcome]) -> String {
    let lost: u64 = outcomes.iter().map(|outcome| outcome.lost).sum();
    let load = super::figures::median(outcomes.iter().map(|outcome| outcome.load_us));
    format!("{lost} tokens lost or out of order; load generator {load:.1} µs/token")
}

fn paced(plan: &Plan) -> anyhow::Result<Vec<Row>> {
    let spec = |server| relay::Spec::paced(server, plan.seconds());
    let (floor, ours) = in_turn(plan, yardstick::Relay::Typed, 2, spec)?;
    let row = |goal, what, of: fn(&relay::Outcome) -> f64| {
        Row::new(goal, what, "µs", each(&ours, of)).against(each(&floor, of))
    };
    Ok(vec![
        row("G1", "server CPU per token, 200 x 50/s single, bare typed t2", |o| o.server_us)
            .judged(Better::Lower, 1.3, 0.7)
            .noted(lost(&ours)),
        row("G3", "latency p50 at 10 k tokens/s", |o| o.latency.p50).judged(
            Better::Lower,
            1.3,
            1.1,
        ),
        row("G3", "latency p99 at 10 k tokens/s", |o| o.latency.p99).judged(
            Better::Lower,
            1.5,
            1.2,
        ),
    ])
}

fn stepped(plan: &Plan) -> anyhow::Result<Vec<Row>> {
    let spec = |server| relay::Spec { step: true, ..relay::Spec::paced(server, plan.seconds()) };
    let (floor, ours) = in_turn(plan, yardstick::Relay::Body, 1, spec)?;
    let row = |goal, what, of: fn(&relay::Outcome) -> f64| {
        Row::new(goal, what, "µs", each(&ours, of)).against(each(&floor, of))
    };
    Ok(vec![
        row("G2", "server CPU per token, one message a step, bare body t1", |o| o.server_us)
            .judged(Better::Lower, 2.0, 1.3)
            .noted(lost(&ours)),
        row("G2", "latency p50 of the same", |o| o.latency.p50),
        row("G2", "latency p99 of the same", |o| o.latency.p99),
    ])
}

fn fastest(plan: &Plan) -> anyhow::Result<Vec<Row>> {
    let spec = |server| relay::Spec {
        tasks: 100,
        rate: 0.0,
        tokens: if plan.quick { 500_000 } else { 2_000_000 },
        ..relay::Spec::paced(server, 0.0)
    };
    let (floor, ours) = in_turn(plan, yardstick::Relay::Typed, 2, spec)?;
    let rate = |o: &relay::Outcome| o.tokens as f64 / o.seconds;
    Ok(vec![
        Row::new("G4", "most tokens per second, 100 tasks, bare typed t2", "/s", each(&ours, rate))
            .against(each(&floor, rate))
            .judged(Better::Higher, 0.5, 0.8)
            .noted(lost(&ours)),
        Row::new("G4", "server CPU per token of the same", "µs", each(&ours, |o| o.server_us))
            .against(each(&floor, |o| o.server_us)),
    ])
}

fn idle(plan: &Plan) -> anyhow::Result<Vec<Row>> {
    let streams = if plan.quick { 2_000 } else { 10_000 };
    let (mut floor, mut ours) = (Vec::new(), Vec::new());
    for _ in 0..plan.repeat.min(3) {
        let (_bare, server) = bare(yardstick::Relay::Typed, 2)?;
        floor.push(play::<memory::Idle>(&Role::Idle(server, streams)).context("yardstick")?);
        let (_baton, server) = baton(plan)?;
        ours.push(play::<memory::Idle>(&Role::Idle(server, streams)).context("baton")?);
    }
    let yardstick = super::figures::median(each(&floor, |o| o.kib));
    Ok(vec![
        Row::new("G7", "memory per idle subscriber stream", "KiB", each(&ours, |o| o.kib))
            .judged(Better::Lower, 20.0, 13.0)
            .noted(format!("bare relay: {yardstick:.1} KiB; {streams} streams, 200 a connection")),
    ])
}

fn slow(plan: &Plan) -> anyhow::Result<Vec<Row>> {
    let case = |tokens, rate| -> anyhow::Result<(Vec<memory::Slow>, Vec<memory::Slow>)> {
        let (mut all_read, mut one_stalls) = (Vec::new(), Vec::new());
        let (_baton, server) = baton(plan)?;
        for _ in 0..plan.repeat {
            for (stall, into) in [(false, &mut all_read), (true, &mut one_stalls)] {
                let spec = memory::SlowSpec { server: server.clone(), tokens, rate, stall };
                into.push(play(&Role::Slow(spec))?);
            }
        }
        Ok((all_read, one_stalls))
    };
    let p99 = |o: &memory::Slow| o.neighbour.p99;
    let describe = |outcomes: &[memory::Slow]| {
        let resumed = outcomes.iter().filter(|o| o.resumed).count();
        let grown = super::figures::median(outcomes.iter().map(|o| o.grown_mib));
        let n = outcomes.len();
        format!("{resumed} of {n} broke and resumed by sequence; server grew {grown:.1} MiB")
    };
    let (all_read, stalls) = case(40_000, 10_000.0)?;
    let mut rows = vec![
        Row::new("G8", "neighbour's p99 beside 40 k unread, all reading", "µs", each(&stalls, p99))
            .against(each(&all_read, p99))
            .judged(Better::Lower, 1.2, 1.2)
            .noted(describe(&stalls)),
    ];
    if !plan.quick {
        let (_, stalls) = case(1_000_000, 250_000.0)?;
        let count = each(&stalls, |o| o.caught_up as f64);
        rows.push(
            Row::new("G8", "entries caught up after 1 M unread", "", count)
                .noted(describe(&stalls)),
        );
    }
    Ok(rows)
}

fn paced_tasks(plan: &Plan) -> anyhow::Result<Vec<Row>> {
    let (_baton, server) = baton(plan)?;
    let mut ours = Vec::new();
    for _ in 0..plan.repeat {
        let (server, pace) = (server.clone(), tasks::Pace::PerSecond(200.0));
        let (seconds, runner_at) = (plan.seconds(), None);
        let spec = tasks::Spec { server, runner_at, pace, seconds, payload: 200, slots: 64 };
        ours.push(play::<tasks::Outcome>(&Role::Tasks(spec))?);
    }
    let row = |what, of: fn(&tasks::Outcome) -> f64, good, world| {
        let figures = each(&ours, |outcome| of(outcome) / 1000.0);
        Row::new("G14", what, "ms", figures).judged(Better::Lower, good, world)
    };
    Ok(vec![
        row("submit ack p50 at 200/s", |o| o.ack.p50, 1.0, 0.5),
        row("submit ack p99 at 200/s", |o| o.ack.p99, 5.0, 5.0),
        row("submit to start p50 at 200/s", |o| o.start.p50, 1.0, 0.8),
        row("submit to start p99 at 200/s", |o| o.start.p99, 5.0, 3.0),
    ])
}

fn control_calls(plan: &Plan) -> anyhow::Result<Vec<Row>> {
    let (_bare, yardstick) = bare(yardstick::Relay::Typed, 2)?;
    let (_baton, product) = baton(plan)?;
    let calls = [
        (yardstick, unary::Call::Echo),
        (product.clone(), unary::Call::GetTask),
        (product, unary::Call::Health),
    ];
    let mut found: [Vec<unary::Outcome>; 3] = Default::default();
    for _ in 0..plan.repeat {
        for ((server, call), into) in calls.iter().zip(&mut found) {
            let (server, seconds) = (server.clone(), plan.seconds());
            let spec = unary::Spec { server, call: *call, callers: 64, connections: 4, seconds };
            into.push(play(&Role::Unary(spec)).with_context(|| format!("{call:?}"))?);
        }
    }
    let [echo, get, health] = found;
    let cpu = |o: &unary::Outcome| o.server_us;
    Ok(vec![
        Row::new("G15", "CPU of GetTask, 64 callers, bare echo t2", "µs", each(&get, cpu))
            .against(each(&echo, cpu))
            .judged(Better::Lower, 2.0, 1.4),
        Row::new("G15", "CPU of a health check of the same", "µs", each(&health, cpu))
            .against(each(&echo, cpu)),
    ])
}

fn decide(plan: &Plan) -> anyhow::Result<Vec<Row>> {
    let (tasks, decisions) = if plan.quick { (100_000, 20_000) } else { (1_000_000, 200_000) };
    let what = if plan.quick {
        "one decision, 10 k runners, 100 k tasks"
    } else {
        "one decision, 10 k runners, 1 M tasks"
    };
    let spec = decisions::Spec { runners: 10_000, tasks, decisions };
    let mut ours = Vec::new();
    for _ in 0..plan.repeat.min(5) {
        ours.push(play::<decisions::Outcome>(&Role::Decisions(spec))?);
    }
    let median = |of: fn(&decisions::Outcome) -> f64| super::figures::median(each(&ours, of));
    Ok(vec![
        Row::new("G16", what, "µs", each(&ours, |o| o.decision_us))
            .judged(Better::Lower, 20.0, 5.0)
            .noted(format!(
                "push {:.2} µs, {:.0} bytes a task, longest call of 64 matches {:.0} µs",
                median(|o| o.push_us),
                median(|o| o.bytes_per_task),
                median(|o| o.longest_us),
            )),
    ])
}

fn interruptions(plan: &Plan) -> anyhow::Result<Vec<Row>> {
    let (_baton, server) = baton(plan)?;
    let (mut cancels, mut reconnects) = (Vec::new(), Vec::new());
    for _ in 0..plan.repeat {
        let count = if plan.quick { 100 } else { 400 };
        cancels
            .push(play::<Latency>(&Role::Cancels(server.clone(), None, count)).context("cancel")?);
        let role = Role::Reconnect(server.clone(), 50);
        reconnects.push(play::<tasks::Reconnected>(&role).context("reconnect")?);
    }
    let disorder: u64 = reconnects.iter().map(|o| o.disorder).sum();
    Ok(vec![
        Row::new("cancel", "CancelTask to the runner, p50", "µs", each(&cancels, |o| o.p50)),
        Row::new("cancel", "CancelTask to the runner, p99", "µs", each(&cancels, |o| o.p99)),
        Row::new(
            "reconnect",
            "cut to first token, 50 tasks in flight",
            "ms",
            each(&reconnects, |o| o.first_ms),
        ),
        Row::new(
            "reconnect",
            "cut until all 50 streams go on",
            "ms",
            each(&reconnects, |o| o.all_ms),
        )
        .noted(format!("{disorder} entries missing, doubled or out of order")),
    ])
}

fn restarts(plan: &Plan) -> anyhow::Result<Vec<Row>> {
    const OPEN: usize = 100_000;
    let ((mut process, dir), server) = baton(plan)?;
    let mut again = || -> anyhow::Result<f64> {
        process.kill();
        let since = now_ns();
        process = start(plan, &dir, server.addr)?;
        restart::ready_after(server.addr, since)
    };
    let empty = again()?;
    play::<usize>(&Role::Fill(server.clone(), OPEN)).context("fill")?;
    let full = (0..plan.repeat).map(|_| again()).collect::<Result<_, _>>()?;
    Ok(vec![
        Row::new("restart", "kill -9 to ready, 100 k tasks open", "ms", full)
            .judged(Better::Lower, 2_000.0, 500.0)
            .noted(format!("{empty:.0} ms with none")),
    ])
}
