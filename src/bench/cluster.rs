//! Two servers on one database and one Redis: what it costs when a task is accepted at one and its
//! runner is connected to the other.

use std::net::TcpStream;

use super::{
    Role,
    process::{Process, now_ns},
    relay::Server,
    report::{Better, Row},
    suite::{self, Plan, Scratch, each},
    tasks,
};

/// Submits at a pace, with the runner at the same server and at the other in turn. There are no rows
/// without a database and a Redis to share.
pub(super) fn case(plan: &Plan) -> anyhow::Result<Vec<Row>> {
    if plan.database_url.is_none() || plan.redis_url.is_none() {
        return Ok(Vec::new());
    }
    let (one, server) = suite::baton(plan)?;
    let (_other, beside) = beside(plan, &one.1, &server)?;
    let (mut here, mut across) = (Vec::new(), Vec::new());
    for _ in 0..plan.repeat {
        for (runner_at, into) in [(None, &mut here), (Some(beside.clone()), &mut across)] {
            let spec = tasks::Spec {
                server: server.clone(),
                runner_at,
                pace: tasks::Pace::PerSecond(200.0),
                seconds: plan.seconds(),
                payload: 200,
                slots: 64,
            };
            into.push(suite::play::<tasks::Outcome>(&Role::Tasks(spec))?);
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

/// A second server beside one that runs, with a directory of its own.
fn beside(
    plan: &Plan,
    first: &Scratch,
    server: &Server,
) -> anyhow::Result<((Process, Scratch), Server)> {
    let path = first.path.join("beside");
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
            anyhow::bail!("the second server did not start: {log}");
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let beside = Server { addr, pid: process.pid(), ..server.clone() };
    Ok(((process, dir), beside))
}
