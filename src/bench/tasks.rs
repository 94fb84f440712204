//! Load on tasks as a whole: submitted, assigned to a scripted runner, finished. In closed loops
//! or paced; besides, the time of a cancel and of a reconnect.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    time::Duration,
};

use anyhow::{Context as _, bail};
use futures_util::future::try_join_all;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::{
    client,
    figures::{Latency, histogram},
    process::{children_cpu_us, cpu_us, now_ns},
    readers::entry,
    relay::{Server, stamp, stamped},
    runner::{Lease, Order, Runner, Script},
    wire,
};
use crate::pb::{CancelTaskRequest, Task};

/// What to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Spec {
    /// The server that tasks are submitted to.
    pub server: Server,
    /// The server that the runner connects to, where it is another one.
    pub runner_at: Option<Server>,
    /// How tasks come.
    pub pace: Pace,
    /// Length of the span in which tasks are submitted.
    pub seconds: f64,
    /// Bytes of input of a task.
    pub payload: usize,
    /// Attempts that the runner takes at once.
    pub slots: u32,
}

/// How tasks come.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub enum Pace {
    /// That many submitters, each waiting for its answer.
    Closed(usize),
    /// That many a second, waiting for none.
    PerSecond(f64),
}

/// What came of it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Outcome {
    /// Tasks that ended.
    pub tasks: u64,
    /// Whole lives a second, from the first submit to the last acknowledged end.
    pub rate: f64,
    /// Processor time of the server per task, in microseconds.
    pub server_us: f64,
    /// Processor time of the database's processes per task, in microseconds.
    pub database_us: f64,
    /// Processor time of this process per task, in microseconds.
    pub load_us: f64,
    /// From the submit to its answer.
    pub ack: Latency,
    /// From the submit to the runner's receipt of the assignment.
    pub start: Latency,
}

/// Connects a runner of that many slots for `model`.
async fn runner(
    server: &Server,
    model: &str,
    slots: u32,
) -> anyhow::Result<(wire::Connection, Script, Runner, mpsc::Receiver<Order>)> {
    let connection = server.connect().await?;
    let name = format!("{}-runner", model.replace('/', "-"));
    let script = Script { name, model: model.to_owned(), slots };
    let (runner, orders) = Runner::start(&connection, &script).await?;
    Ok((connection, script, runner, orders))
}

/// Runs whole lives.
pub async fn run(spec: Spec) -> anyhow::Result<Outcome> {
    let model = format!("bench/tasks-{}", std::process::id());
    let at = spec.runner_at.as_ref().unwrap_or(&spec.server);
    let (_link, _, runner, mut orders) = runner(at, &model, spec.slots).await?;
    let start = Rc::new(RefCell::new(histogram()));
    let ack = Rc::new(RefCell::new(histogram()));
    let finished = Rc::new(Cell::new(0_u64));
    let failure = Rc::new(RefCell::new(None));

    let (starts, ended, failed) = (Rc::clone(&start), Rc::clone(&finished), Rc::clone(&failure));
    let work = runner.clone();
    tokio::task::spawn_local(async move {
        let mut batch = Vec::new();
        let mut ends = Vec::new();
        while orders.recv_many(&mut batch, 1024).await > 0 {
            for order in batch.drain(..) {
                match order {
                    Order::Start(lease) => {
                        let sent = mark(&lease);
                        let _ = starts.borrow_mut().record(lease.assigned_ns.saturating_sub(sent));
                        ends.push((lease.task_id, lease.attempt, 0));
                    }
                    Order::Finished => ended.set(ended.get() + 1),
                    Order::Failed(error) => *failed.borrow_mut() = Some(error),
                    Order::Stop { .. } | Order::Acked { .. } => {}
                }
            }
            if !ends.is_empty() {
                if let Err(error) = work.finish(&ends) {
                    *failed.borrow_mut() = Some(format!("{error:#}"));
                }
                ends.clear();
            }
        }
        *failed.borrow_mut() = Some(format!("the runner's session ended: {:?}", work.error()));
    });

    let mut connections = Vec::new();
    for _ in 0..4 {
        connections.push(spec.server.connect().await?);
    }
    let from = now_ns();
    let (cpu, own) = (cpu_us(spec.server.pid), cpu_us(std::process::id()));
    let database_us = || spec.server.database.map_or(0, children_cpu_us);
    let database = database_us();
    let until = from + (spec.seconds * 1e9) as u64;
    let submitted = match spec.pace {
        Pace::Closed(submitters) => {
            let loops = (0..submitters).map(|at| {
                let connection = connections[at % connections.len()].clone();
                let (model, ack, payload) = (model.clone(), Rc::clone(&ack), spec.payload);
                tokio::task::spawn_local(async move {
                    let mut count = 0_u64;
                    while now_ns() < until {
                        submit_one(&connection, &model, payload, &ack).await?;
                        count += 1;
                    }
                    anyhow::Ok(count)
                })
            });
            let mut all = 0;
            for count in try_join_all(loops).await? {
                all += count?;
            }
            all
        }
        Pace::PerSecond(rate) => {
            let mut ticks = tokio::time::interval(Duration::from_micros((1e6 / rate) as u64));
            ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Burst);
            let mut count = 0_u64;
            let mut pending = tokio::task::JoinSet::new();
            while now_ns() < until {
                ticks.tick().await;
                let connection = connections[count as usize % connections.len()].clone();
                let (model, ack, payload) = (model.clone(), Rc::clone(&ack), spec.payload);
                pending.spawn_local(
                    async move { submit_one(&connection, &model, payload, &ack).await },
                );
                count += 1;
            }
            while let Some(ended) = pending.join_next().await {
                ended??;
            }
            count
        }
    };
    let deadline = now_ns() + 60_000_000_000;
    while finished.get() < submitted {
        if let Some(error) = failure.borrow_mut().take() {
            bail!("{error}");
        }
        if now_ns() > deadline {
            bail!("{} of {submitted} tasks ended", finished.get());
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let seconds = (now_ns() - from) as f64 / 1e9;
    let each = |us: u64| us as f64 / submitted.max(1) as f64;
    let (ack, start) = ((&*ack.borrow()).into(), (&*start.borrow()).into());
    Ok(Outcome {
        tasks: submitted,
        rate: submitted as f64 / seconds,
        server_us: each(cpu_us(spec.server.pid) - cpu),
        database_us: each(database_us().saturating_sub(database)),
        load_us: each(cpu_us(std::process::id()) - own),
        ack,
        start,
    })
}

async fn submit_one(
    connection: &wire::Connection,
    model: &str,
    payload: usize,
    ack: &Rc<RefCell<hdrhistogram::Histogram<u64>>>,
) -> anyhow::Result<()> {
    let sent = now_ns();
    let mark = stamp(sent);
    let request = client::submission(model, &String::from_utf8_lossy(&mark), payload);
    connection.unary_framed(client::SUBMIT, wire::framed(&request)).await?;
    let _ = ack.borrow_mut().record(now_ns() - sent);
    Ok(())
}

/// The time that the input of a task tells: `{"p":"<16 digits>..."}`.
fn mark(lease: &Lease) -> u64 {
    let text = lease.input.iter().position(|byte| *byte == b':');
    let text = text.and_then(|colon| lease.input.get(colon..));
    let quote = text.and_then(|text| text.iter().position(|byte| *byte == b'"'));
    match (text, quote) {
        (Some(text), Some(quote)) => stamped(&text[quote + 1..]),
        _ => 0,
    }
}

/// Cancels running tasks one after the other: from the call to the runner's receipt. The runner
/// connects to `runner_at`, where that is another server.
pub async fn cancels(
    server: Server,
    runner_at: Option<Server>,
    count: usize,
) -> anyhow::Result<Latency> {
    let model = format!("bench/cancel-{}", std::process::id());
    let at = runner_at.as_ref().unwrap_or(&server);
    let (_link, _, runner, mut orders) = runner(at, &model, 64).await?;
    let client = server.connect().await?;
    let mut latency = histogram();
    for _ in 0..count {
        let task_id =
            client::submit(&client, wire::framed(&client::submission(&model, "", 32))).await?;
        let wait = Duration::from_secs(10);
        tokio::time::timeout(wait, async {
            while let Some(order) = orders.recv().await {
                if matches!(order, Order::Start(_)) {
                    return Ok(());
                }
            }
            bail!("the runner's session ended: {:?}", runner.error())
        })
        .await
        .context("no assignment")??;
        let sent = now_ns();
        let request = CancelTaskRequest { task_id, reason: "measured".to_owned() };
        let cancel = client.unary::<Task>(client::CANCEL, &request);
        let stop = async {
            while let Some(order) = orders.recv().await {
                if let Order::Stop { at_ns, .. } = order {
                    return Ok(at_ns);
                }
            }
            bail!("the runner's session ended: {:?}", runner.error())
        };
        let both = async { tokio::try_join!(cancel, stop) };
        let (_, at_ns) = tokio::time::timeout(wait, both).await.context("no Cancel")??;
        let _ = latency.record(at_ns.saturating_sub(sent));
    }
    Ok((&latency).into())
}

/// What a broken connection costs.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Reconnected {
    /// From the cut to the first new token at a subscriber, in milliseconds.
    pub first_ms: f64,
    /// From the cut until each task's stream went on, in milliseconds.
    pub all_ms: f64,
    /// Entries that were missing, doubled or out of order.
    pub disorder: u64,
}

/// Cuts a runner's connection while it holds `held` streaming tasks, and comes back at once.
pub async fn reconnect(server: Server, held: usize) -> anyhow::Result<Reconnected> {
    let model = format!("bench/reconnect-{}", std::process::id());
    let (link, script, old, mut orders) = runner(&server, &model, held as u32).await?;
    let client = server.connect().await?;
    client::submit_many(&client, &model, held).await?;
    let mut leases = Vec::new();
    while leases.len() < held {
        match tokio::time::timeout(Duration::from_secs(10), orders.recv()).await? {
            Some(Order::Start(lease)) => leases.push(lease),
            Some(_) => {}
            None => bail!("the runner's session ended: {:?}", old.error()),
        }
    }
    let cut_ns = Rc::new(Cell::new(u64::MAX));
    let back = Rc::new(RefCell::new(Vec::new()));
    let disorder = Rc::new(Cell::new(0));
    for lease in &leases {
        let mut receiver = client::stream_task(&client, &lease.task_id, 0).await?;
        let (cut_ns, back, disorder) = (cut_ns.clone(), back.clone(), disorder.clone());
        tokio::task::spawn_local(async move {
            let (mut last, mut counted) = (0, false);
            let mut read = |message: &[u8]| {
                let (sequence, sent) = entry(message, true);
                disorder.set(disorder.get() + u64::from(sequence != last + 1));
                last = sequence;
                if !counted && sent.is_some_and(|sent| sent > cut_ns.get()) {
                    counted = true;
                    back.borrow_mut().push(now_ns());
                }
            };
            while receiver.chunk(&mut read).await.unwrap_or(false) {}
        });
    }
    // Tokens stay below what needs an acknowledgement; those that the cut swallows are sent
    // again from the index that the server names.
    for _ in 0..20 {
        old.step(&mut leases, &stamp(now_ns()))?;
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    for lease in &leases {
        old.note(lease);
    }
    let at = now_ns();
    cut_ns.set(at);
    link.cut();
    let link = server.connect().await?;
    let (runner, mut orders) = old.resume(&link, &script).await?;
    while back.borrow().len() < held {
        if now_ns() > at + 20_000_000_000 {
            let back = back.borrow().len();
            bail!("{back} of {held} streams went on: {:?}", runner.error());
        }
        runner.step(&mut leases, &stamp(now_ns()))?;
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let back = back.borrow().clone();
    let since = |ns: Option<&u64>| ns.map_or(0.0, |ns| (ns - at) as f64 / 1e6);
    let ends = leases.iter().map(|l| (l.task_id.clone(), l.attempt, l.last_index));
    runner.finish(&ends.collect::<Vec<_>>())?;
    while runner.n_held() > 0 {
        let order = tokio::time::timeout(Duration::from_secs(10), orders.recv()).await;
        order.context("a Finish was not acknowledged")?;
    }
    Ok(Reconnected {
        first_ms: since(back.iter().min()),
        all_ms: since(back.iter().max()),
        disorder: disorder.get(),
    })
}
