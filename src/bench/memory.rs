//! Subscribers that cost memory: thousands that wait, and one that stops reading.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    time::Duration,
};

use anyhow::{Context as _, bail};
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use super::{
    client,
    figures::{Latency, histogram},
    process::{now_ns, rss_kib},
    readers::{self, entry},
    relay::{self, Server, stamp},
    runner::{Order, Runner, Script},
    wire::{Connection, Receiver, Windows},
};

/// What waiting streams cost.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Idle {
    /// Streams open at the end.
    pub streams: usize,
    /// Resident memory of the server per stream, its share of the connection included, in KiB.
    pub kib: f64,
}

/// Opens `streams` streams, each of a task of its own, on connections of 200.
pub async fn idle(server: Server, streams: usize) -> anyhow::Result<Idle> {
    let ids = if server.baton {
        let client = server.connect().await?;
        let model = format!("bench/idle-{}", std::process::id());
        client::submit_many(&client, &model, streams).await?
    } else {
        (0..streams).map(|at| format!("i{at:07}")).collect()
    };
    tokio::time::sleep(Duration::from_secs(2)).await;
    let before = rss_kib(server.pid);
    let mut open = Vec::new();
    for ids in ids.chunks(200) {
        let connection = server.connect().await?;
        for id in ids {
            let mut receiver = readers::subscribe(&connection, &server, id).await?;
            if server.baton {
                receiver.chunk(|_| ()).await.context("the first entry did not come")?;
            }
            open.push((connection.clone(), receiver));
        }
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    let grown = rss_kib(server.pid).saturating_sub(before);
    Ok(Idle { streams: open.len(), kib: grown as f64 / open.len().max(1) as f64 })
}

/// The case of a subscriber that stops reading.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SlowSpec {
    /// The server.
    pub server: Server,
    /// Tokens that its task makes while it does not read.
    pub tokens: u64,
    /// Tokens a second of that task.
    pub rate: f64,
    /// Whether there is one that stops, or all read.
    pub stall: bool,
}

/// What a subscriber that stopped reading did to others and to itself.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Slow {
    /// Latency at a neighbour, which reads another task of the same runner.
    pub neighbour: Latency,
    /// Growth of the server's resident memory, in MiB.
    pub grown_mib: f64,
    /// Entries that the slow one received after it went on; all of them, in order, or this
    /// would have failed.
    pub caught_up: u64,
    /// Whether its stream broke and it came back by sequence.
    pub resumed: bool,
}

/// Streams two tasks through one runner; the subscriber of one stops reading until all tokens
/// are sent, then reads on.
pub async fn slow(spec: SlowSpec) -> anyhow::Result<Slow> {
    let server = &spec.server;
    let model = format!("bench/slow-{}", std::process::id());
    let link = server.connect().await?;
    let script = Script { name: model.replace('/', "-"), model: model.clone(), slots: 2 };
    let (runner, mut orders) = Runner::start(&link, &script).await?;
    let client = server.connect().await?;
    client::submit_many(&client, &model, 2).await?;
    let mut leases = Vec::new();
    while leases.len() < 2 {
        match tokio::time::timeout(Duration::from_secs(10), orders.recv()).await? {
            Some(Order::Start(lease)) => leases.push(lease),
            Some(_) => {}
            None => bail!("the runner's session ended: {:?}", runner.error()),
        }
    }
    // The windows of a usual client: these decide how much it buffers unread.
    let usual = Windows { stream: 2 << 20, connection: 5 << 20 };
    let token = server.token.as_deref();
    let slow_link = Connection::open(server.addr, token, usual).await?;
    let slow_task = leases[0].task_id.clone();
    let mut slow = client::stream_task(&slow_link, &slow_task, 0).await?;
    let last = Rc::new(Cell::new(0));
    drain(&mut slow, &last, 2).await?;
    let near = client::stream_task(&client, &leases[1].task_id, 0).await?;
    let latency = Rc::new(RefCell::new(histogram()));
    tokio::task::spawn_local(watch(near, Rc::clone(&latency)));
    let until = spec.tokens + 2;
    let (cell, stall) = (Rc::clone(&last), spec.stall);
    let (go, wait) = tokio::sync::oneshot::channel::<()>();
    let reading = tokio::task::spawn_local(async move {
        if stall {
            let _ = wait.await;
        }
        drain(&mut slow, &cell, until).await
    });

    let before = rss_kib(server.pid);
    let (start, mut sent, mut beside) = (now_ns(), 0_u64, 0_u64);
    let mut ticks = tokio::time::interval(Duration::from_millis(1));
    let mut acked = 0;
    while sent < spec.tokens {
        ticks.tick().await;
        while let Ok(order) = orders.try_recv() {
            match order {
                Order::Acked { task_id, index } if task_id == slow_task => acked = index,
                Order::Failed(error) => bail!("events were refused: {error}"),
                _ => {}
            }
        }
        let elapsed = (now_ns() - start) as f64 / 1e9;
        while sent < spec.tokens.min((elapsed * spec.rate) as u64) && sent < acked + relay::WINDOW {
            runner.step(&mut leases[..1], &stamp(now_ns()))?;
            sent += 1;
        }
        // The neighbour's task makes 200 tokens a second.
        while beside < (elapsed * 200.0) as u64 {
            runner.step(&mut leases[1..], &stamp(now_ns()))?;
            beside += 1;
        }
    }
    let grown_mib = rss_kib(server.pid).saturating_sub(before) as f64 / 1024.0;
    let neighbour = (&*latency.borrow()).into();
    let from = last.get();
    let _ = go.send(());
    let mut resumed = false;
    if let Err(error) = reading.await? {
        tracing::debug!(%error, "the slow subscriber's stream broke");
        resumed = true;
        let link = server.connect().await?;
        let mut again = client::stream_task(&link, &slow_task, last.get() + 1).await?;
        drain(&mut again, &last, until).await?;
    }
    let ends = leases.iter().map(|l| (l.task_id.clone(), l.attempt, l.last_index));
    runner.finish(&ends.collect::<Vec<_>>())?;
    Ok(Slow { neighbour, grown_mib, caught_up: last.get() - from, resumed })
}

/// Reads entries until that sequence; fails when one is missing or doubled.
async fn drain(receiver: &mut Receiver, last: &Cell<u64>, until: u64) -> anyhow::Result<()> {
    while last.get() < until {
        let mut disorder = None;
        let read = receiver.chunk(|message| {
            let (sequence, _) = entry(message, true);
            if sequence != last.get() + 1 {
                disorder.get_or_insert((last.get(), sequence));
            }
            last.set(sequence);
        });
        let read = tokio::time::timeout(Duration::from_mins(1), read).await;
        if !read.context("no entry came")?? {
            bail!("the stream ended after entry {}", last.get());
        }
        if let Some((before, after)) = disorder {
            bail!("entry {after} came after entry {before}");
        }
    }
    Ok(())
}

/// Notes the latency of a task's tokens until the stream ends.
async fn watch(mut receiver: Receiver, latency: Rc<RefCell<Histogram<u64>>>) {
    let mut read = |message: &[u8]| {
        if let (_, Some(sent)) = entry(message, true) {
            let _ = latency.borrow_mut().record(now_ns().saturating_sub(sent));
        }
    };
    while receiver.chunk(&mut read).await.unwrap_or(false) {}
}
