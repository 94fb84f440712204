//! Several servers on one database and one Redis: what it costs when a task is accepted at one and its
//! runner is connected to another, when its reader is, and what more servers give.

use std::net::TcpStream;

use super::{
    Role,
    database::redis_pid,
    figures::Latency,
    process::{Process, children_cpu_us, cpu_us, now_ns},
    relay::{self, Server},
    report::{Better, Row},
    suite::{self, Plan, Scratch, each, play},
    tasks,
};

/// Servers that share a store and a queue.
struct Site {
    servers: Vec<Server>,
    redis: Option<u32>,
    processes: Vec<(Process, Scratch)>,
}

impl Site {
    fn start(plan: &Plan, n_servers: usize) -> anyhow::Result<Self> {
        let (first, server) = suite::baton(plan)?;
        let mut site = Self {
            servers: vec![server],
            redis: plan.redis_url.as_deref().and_then(redis_pid),
            processes: vec![first],
        };
        for at in 1..n_servers {
            let (process, server) = beside(plan, &site.processes[0].1, &site.servers[0], at)?;
            site.servers.push(server);
            site.processes.push(process);
        }
        Ok(site)
    }

    /// Processor time of the servers, the database and Redis, in microseconds.
    fn cpu_us(&self) -> u64 {
        let servers: u64 = self.servers.iter().map(|server| cpu_us(server.pid)).sum();
        let database = self.servers[0].database.map_or(0, children_cpu_us);
        servers + database + self.redis.map_or(0, cpu_us)
    }
}

/// Each thing at one server and across two in turn, then whole lives over one server and three.
/// There are no rows without a database and a Redis to share.
pub(super) fn case(plan: &Plan) -> anyhow::Result<Vec<Row>> {
    if plan.database_url.is_none() || plan.redis_url.is_none() {
        return Ok(Vec::new());
    }
    let site = Site::start(plan, 2)?;
    let mut rows = starts(plan, &site)?;
    rows.extend(cancels(plan, &site)?);
    rows.extend(tokens(plan, &site)?);
    drop(site);
    rows.extend(scaling(plan)?);
    Ok(rows)
}

/// Submits at a pace, with the runner at the same server and at the other.
fn starts(plan: &Plan, site: &Site) -> anyhow::Result<Vec<Row>> {
    let (mut here, mut across) = (Vec::new(), Vec::new());
    for _ in 0..plan.repeat {
        for (runner_at, into) in [(None, &mut here), (Some(site.servers[1].clone()), &mut across)] {
            let spec = tasks::Spec {
                server: site.servers[0].clone(),
                runner_at,
                pace: tasks::Pace::PerSecond(200.0),
                seconds: plan.seconds(),
                payload: 200,
                slots: 64,
            };
            into.push(play::<tasks::Outcome>(&Role::Tasks(spec))?);
        }
    }
    let row = |what, of: fn(&tasks::Outcome) -> f64| {
        Row::new("cluster", what, "ms", each(&across, |outcome| of(outcome) / 1000.0))
            .against(each(&here, |outcome| of(outcome) / 1000.0))
            .judged(Better::Lower, 3.0, 2.0)
    };
    Ok(vec![
        row("submit to start p50 at 200/s, runner at another server", |o| o.start.p50),
        row("submit to start p99 at 200/s, runner at another server", |o| o.start.p99),
        row("submit ack p50 at 200/s, runner at another server", |o| o.ack.p50),
    ])
}

/// Cancels at one server what a runner at the other does; P10 allows 250 ms.
fn cancels(plan: &Plan, site: &Site) -> anyhow::Result<Vec<Row>> {
    let count = if plan.quick { 100 } else { 400 };
    let (mut here, mut across) = (Vec::new(), Vec::new());
    for _ in 0..plan.repeat {
        for (runner_at, into) in [(None, &mut here), (Some(site.servers[1].clone()), &mut across)] {
            let role = Role::Cancels(site.servers[0].clone(), runner_at, count);
            into.push(play::<Latency>(&role)?);
        }
    }
    let row = |what, of: fn(&Latency) -> f64| {
        Row::new("cluster", what, "ms", each(&across, |outcome| of(outcome) / 1000.0))
    };
    let alone = super::figures::median(each(&here, |outcome| outcome.p50 / 1000.0));
    Ok(vec![
        row("CancelTask to a runner at another server, p50", |o| o.p50)
            .noted(format!("{alone:.2} ms at the same server")),
        row("CancelTask to a runner at another server, p99", |o| o.p99).judged(
            Better::Lower,
            250.0,
            25.0,
        ),
    ])
}

/// Streams tokens to readers at the same server and at the other.
fn tokens(plan: &Plan, site: &Site) -> anyhow::Result<Vec<Row>> {
    let (mut here, mut across) = (Vec::new(), Vec::new());
    for _ in 0..plan.repeat {
        for (readers_at, into) in [(None, &mut here), (Some(site.servers[1].clone()), &mut across)]
        {
            let spec = relay::Spec {
                readers_at,
                also: site.servers[1..].iter().map(|server| server.pid).chain(site.redis).collect(),
                ..relay::Spec::paced(site.servers[0].clone(), plan.seconds())
            };
            into.push(play::<relay::Outcome>(&Role::Relay(spec))?);
        }
    }
    let row = |what, unit, of: fn(&relay::Outcome) -> f64| {
        Row::new("cluster", what, unit, each(&across, of)).against(each(&here, of))
    };
    Ok(vec![
        row("CPU per token of servers and Redis, reader at another server", "µs", |o| o.server_us)
            .noted(suite::lost(&across)),
        row("token latency p50, reader at another server", "ms", |o| o.latency.p50 / 1000.0),
        row("token latency p99, reader at another server", "ms", |o| o.latency.p99 / 1000.0),
    ])
}

/// Whole lives at full speed over one server and over three, 64 submitters in all.
fn scaling(plan: &Plan) -> anyhow::Result<Vec<Row>> {
    const SUBMITTERS: usize = 64;
    let (mut rates, mut costs) = ([const { Vec::new() }; 2], [const { Vec::new() }; 2]);
    for (i, n_servers) in [1, 3].into_iter().enumerate() {
        let site = Site::start(plan, n_servers)?;
        for _ in 0..plan.repeat {
            let before = site.cpu_us();
            let loads = site.servers.iter().map(|server| {
                Process::role(&Role::Tasks(tasks::Spec {
                    server: server.clone(),
                    runner_at: None,
                    pace: tasks::Pace::Closed(SUBMITTERS / n_servers),
                    seconds: plan.seconds(),
                    payload: 200,
                    slots: 512,
                }))
            });
            let mut loads = loads.collect::<anyhow::Result<Vec<_>>>()?;
            let outcomes = loads.iter_mut().map(Process::answer::<tasks::Outcome>);
            let outcomes = outcomes.collect::<anyhow::Result<Vec<_>>>()?;
            let n_tasks: u64 = outcomes.iter().map(|outcome| outcome.tasks).sum();
            rates[i].push(outcomes.iter().map(|outcome| outcome.rate).sum());
            costs[i].push((site.cpu_us() - before) as f64 / n_tasks.max(1) as f64);
        }
    }
    let ([rate_of_one, rate_of_three], [cost_of_one, cost_of_three]) = (rates, costs);
    Ok(vec![
        Row::new("cluster", "whole lives per second, three servers over one", "/s", rate_of_three)
            .against(rate_of_one)
            .noted("on one machine the servers share its cores".to_owned()),
        Row::new(
            "cluster",
            "CPU per task of servers and stores, three over one",
            "µs",
            cost_of_three,
        )
        .against(cost_of_one),
    ])
}

/// Another server beside one that runs, with a directory of its own.
fn beside(
    plan: &Plan,
    first: &Scratch,
    server: &Server,
    at: usize,
) -> anyhow::Result<((Process, Scratch), Server)> {
    let path = first.path.join(format!("beside-{at}"));
    std::fs::create_dir_all(&path)?;
    let dir = Scratch { path, database: None, settings: first.settings.clone() };
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0))?;
    let addr = listener.local_addr()?;
    drop(listener);
    let process = suite::start(plan, &dir, addr)?;
    let deadline = now_ns() + 20_000_000_000;
    while TcpStream::connect(addr).is_err() {
        if now_ns() > deadline {
            let log = std::fs::read_to_string(dir.log()).unwrap_or_default();
            anyhow::bail!("server {at} beside the first did not start: {log}");
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let beside = Server { addr, pid: process.pid(), ..server.clone() };
    Ok(((process, dir), beside))
}
