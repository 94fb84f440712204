//! Load on a relay: tokens in through runners, out through subscribers, paced or as fast as it
//! goes. The same script drives Baton and the bare yardstick.

use std::{cell::RefCell, net::SocketAddr, rc::Rc, time::Duration};

use anyhow::{Context as _, bail};
use bytes::{BufMut as _, Bytes, BytesMut};
use prost::encoding::{encode_varint, encoded_len_varint};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::{
    client,
    figures::Latency,
    process::{cpu_us, now_ns},
    readers::{Events, Seen, read, read_events, subscribe, wait_for},
    runner::{Lease, Order, Runner, Script},
    wire::{self, Connection, Receiver, Sender, Windows},
    yardstick,
};

/// What to do to which server.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Spec {
    /// The server.
    pub server: Server,
    /// The server that subscribers read from, where it is another one.
    pub readers_at: Option<Server>,
    /// Processes whose time counts as the server's.
    pub also: Vec<u32>,
    /// Tasks that stream at once.
    pub tasks: usize,
    /// Connections of runners, and as many of subscribers.
    pub connections: usize,
    /// Tokens a second of each task; 0 sends `tokens` as fast as it goes.
    pub rate: f64,
    /// One message per engine step rather than one per token.
    pub step: bool,
    /// Length of the measured span.
    pub seconds: f64,
    /// Tokens in all when there is no rate.
    pub tokens: u64,
    /// Subscribers read server-sent events, on a connection each.
    pub events: bool,
}

impl Spec {
    /// The usual load: 200 tasks of 50 tokens a second, each in a message of its own, over 4
    /// connections of runners and 4 of subscribers.
    pub fn paced(server: Server, seconds: f64) -> Self {
        Self {
            server,
            readers_at: None,
            also: Vec::new(),
            tasks: 200,
            connections: 4,
            rate: 50.0,
            step: false,
            seconds,
            tokens: 0,
            events: false,
        }
    }
}

/// A server to load.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Server {
    /// Where it listens.
    pub addr: SocketAddr,
    /// Its process, for processor time and memory.
    pub pid: u32,
    /// Whether it is Baton, rather than a yardstick.
    pub baton: bool,
    /// Credential.
    pub token: Option<String>,
    /// Process that the processes of its database descend from, where it is on this machine.
    pub database: Option<u32>,
}

impl Server {
    /// Opens a connection to it.
    pub async fn connect(&self) -> anyhow::Result<Connection> {
        Connection::open(self.addr, self.token.as_deref(), Windows::default()).await
    }
}

/// What came of it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Outcome {
    /// Tokens received in the span.
    pub tokens: u64,
    /// Tokens that never came, or came out of order.
    pub lost: u64,
    /// Length of the span in seconds.
    pub seconds: f64,
    /// Processor time of the server per token, in microseconds.
    pub server_us: f64,
    /// Processor time of this process per token, in microseconds.
    pub load_us: f64,
    /// From the runner's send to the subscriber's receipt.
    pub latency: Latency,
}

/// Runs the load.
pub async fn run(spec: Spec) -> anyhow::Result<Outcome> {
    let seen = Rc::new(RefCell::new(Seen::default()));
    let mut feeds = Vec::new();
    let mut subscribers = Vec::new();
    let readers_at = spec.readers_at.as_ref().unwrap_or(&spec.server);
    for _ in 0..spec.connections {
        subscribers.push(readers_at.connect().await?);
    }
    let per_feed = spec.tasks / spec.connections;
    let model = format!("bench/relay-{}", std::process::id());
    for at in 0..spec.connections {
        let connection = spec.server.connect().await?;
        let mut leases: Vec<Lease> = Vec::new();
        let link = if spec.server.baton {
            let name = format!("relay-{}-{at}", std::process::id());
            let script = Script { name, model: model.clone(), slots: per_feed as u32 };
            let (runner, orders) = Runner::start(&connection, &script).await?;
            Link::Baton(runner, orders)
        } else {
            let (sender, receiver) = connection.call(yardstick::path::PUSH).await?;
            leases.extend((0..per_feed).map(|i| bare_lease(at * per_feed + i)));
            Link::Bare(sender, receiver)
        };
        feeds.push(Feed { link, leases, _connection: connection });
    }
    if spec.server.baton {
        let ids = client::submit_many(&subscribers[0], &model, spec.tasks).await?;
        for feed in &mut feeds {
            feed.leases = feed.assigned(ids.len() / spec.connections).await?;
        }
    }
    for (at, lease) in feeds.iter().flat_map(|feed| &feed.leases).enumerate() {
        if spec.events {
            let events = Events::open(readers_at, &lease.task_id).await?;
            read_events(events, Rc::clone(&seen), spec.server.baton);
            continue;
        }
        let connection = &subscribers[at % spec.connections];
        let receiver = subscribe(connection, readers_at, &lease.task_id).await?;
        read(receiver, Rc::clone(&seen), spec.server.baton);
    }
    // Streams count as open once the first token is through each of them.
    for feed in &mut feeds {
        feed.send_step()?;
    }
    wait_for(&seen, spec.tasks as u64).await?;

    let outcome = if spec.rate > 0.0 {
        paced(&spec, &mut feeds, &seen).await
    } else {
        unpaced(&spec, &mut feeds, &seen).await
    };
    let mut outcome = outcome?;
    outcome.lost += seen.borrow().disorder;
    for feed in &mut feeds {
        feed.finish().await?;
    }
    Ok(outcome)
}

/// A runner's connection and the tasks that stream through it.
struct Feed {
    link: Link,
    leases: Vec<Lease>,
    _connection: Connection,
}

enum Link {
    Baton(Runner, mpsc::Receiver<Order>),
    Bare(Sender, #[expect(dead_code, reason = "keeps the call open")] Receiver),
}

impl Feed {
    async fn assigned(&mut self, count: usize) -> anyhow::Result<Vec<Lease>> {
        let Link::Baton(runner, orders) = &mut self.link else { return Ok(Vec::new()) };
        let mut leases = Vec::new();
        while leases.len() < count {
            let order = tokio::time::timeout(Duration::from_secs(20), orders.recv()).await;
            match order.with_context(|| {
                format!("{} of {count} tasks were assigned: {:?}", leases.len(), runner.error())
            })? {
                Some(Order::Start(lease)) => leases.push(lease),
                Some(_) => {}
                None => bail!("the runner's session ended: {:?}", runner.error()),
            }
        }
        Ok(leases)
    }

    /// One token of the lease at `at`.
    fn send_one(&mut self, at: usize) -> anyhow::Result<()> {
        let leases = &mut self.leases[at..=at];
        match &mut self.link {
            Link::Baton(runner, orders) => {
                while orders.try_recv().is_ok() {}
                runner.step(leases, &stamp(now_ns()))
            }
            Link::Bare(sender, _) => sender.send(bare_tokens(leases)),
        }
    }

    /// One token of each lease, in one message.
    fn send_step(&mut self) -> anyhow::Result<()> {
        match &mut self.link {
            Link::Baton(runner, orders) => {
                while orders.try_recv().is_ok() {}
                runner.step(&mut self.leases, &stamp(now_ns()))
            }
            Link::Bare(sender, _) => sender.send(bare_tokens(&mut self.leases)),
        }
    }

    async fn finish(&mut self) -> anyhow::Result<()> {
        match &mut self.link {
            Link::Bare(sender, _) => sender.finish(),
            Link::Baton(runner, orders) => {
                let ends = self.leases.iter();
                let ends = ends.map(|l| (l.task_id.clone(), l.attempt, l.last_index));
                runner.finish(&ends.collect::<Vec<_>>())?;
                let deadline = now_ns() + 20_000_000_000;
                while runner.n_held() > 0 && now_ns() < deadline {
                    let wait = Duration::from_millis(100);
                    let _ = tokio::time::timeout(wait, orders.recv()).await;
                }
                if runner.n_held() > 0 {
                    bail!("{} Finish were not acknowledged: {:?}", runner.n_held(), runner.error());
                }
                Ok(())
            }
        }
    }
}

fn bare_lease(at: usize) -> Lease {
    Lease {
        task_id: format!("t{at:07}"),
        attempt: 1,
        assigned_ns: now_ns(),
        last_index: 0,
        acked_index: 0,
        finished: false,
        input: Bytes::new(),
    }
}

/// The send time as a token's text.
pub fn stamp(ns: u64) -> [u8; 16] {
    let mut text = [0; 16];
    for (at, digit) in text.iter_mut().enumerate() {
        *digit = b"0123456789abcdef"[(ns >> (60 - 4 * at)) as usize & 15];
    }
    text
}

/// The time that a token's text tells.
pub fn stamped(text: &[u8]) -> u64 {
    text.iter().take(16).fold(0, |ns, digit| {
        ns << 4 | u64::from(if *digit <= b'9' { digit - b'0' } else { digit - b'a' + 10 })
    })
}

/// A yardstick's `Tokens` message in its frame: one token of each lease, cut by hand.
fn bare_tokens(leases: &mut [Lease]) -> Bytes {
    let now = now_ns();
    let mut body = BytesMut::with_capacity(leases.len() * 40);
    for lease in leases {
        lease.last_index += 1;
        let id = lease.task_id.len();
        body.put_u8(0x0a);
        body.put_u8((2 + id + 1 + encoded_len_varint(lease.last_index) + 9 + 8) as u8);
        body.put_u8(0x0a);
        body.put_u8(id as u8);
        body.put_slice(lease.task_id.as_bytes());
        body.put_u8(0x10);
        encode_varint(lease.last_index, &mut body);
        body.put_u8(0x19);
        body.put_u64_le(now);
        body.put_slice(b"\x22\x06 token");
    }
    let mut frame = BytesMut::with_capacity(body.len() + 5);
    wire::put_frame_head(&mut frame, body.len());
    frame.put_slice(&body);
    frame.freeze()
}

async fn paced(
    spec: &Spec,
    feeds: &mut [Feed],
    seen: &Rc<RefCell<Seen>>,
) -> anyhow::Result<Outcome> {
    let period_ns = 1e9 / spec.rate;
    // A unit is what is sent at once: a token, or a step of a runner.
    let units = if spec.step { feeds.len() } else { spec.tasks };
    let gap_ns = period_ns / units as f64;
    let n_feeds = feeds.len();
    let mut ticks = tokio::time::interval(Duration::from_millis(1));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    let warm_ns = 1_000_000_000;
    let span_ns = (spec.seconds * 1e9) as u64;
    let start = now_ns();
    let (mut sent, mut warm) = (0_usize, None);
    loop {
        ticks.tick().await;
        let elapsed = now_ns() - start;
        if warm.is_none() && elapsed >= warm_ns {
            seen.borrow_mut().from_ns = now_ns();
            warm = Some(Mark::take(spec, seen));
        }
        if elapsed >= warm_ns + span_ns {
            break;
        }
        let due = (elapsed as f64 / gap_ns) as usize;
        while sent < due {
            let unit = sent % units;
            let feed = &mut feeds[unit % n_feeds];
            if spec.step {
                feed.send_step()?;
            } else {
                feed.send_one(unit / n_feeds)?;
            }
            sent += 1;
        }
    }
    let outcome = warm.context("the span was too short")?.until_now(spec, seen);
    let all = sent * (if spec.step { spec.tasks / n_feeds } else { 1 }) + spec.tasks;
    let arrived = wait_for(seen, all as u64).await;
    let lost = all as u64 - seen.borrow().tokens.min(all as u64);
    if lost == 0 {
        arrived?;
    }
    Ok(Outcome { lost, latency: (&seen.borrow().latency).into(), ..outcome })
}

/// Tokens of an attempt that may wait for their acknowledgement.
pub const WINDOW: u64 = 8192;

async fn unpaced(
    spec: &Spec,
    feeds: &mut [Feed],
    seen: &Rc<RefCell<Seen>>,
) -> anyhow::Result<Outcome> {
    let already = seen.borrow().tokens;
    let share = spec.tokens / spec.tasks as u64;
    let mark = Mark::take(spec, seen);
    let senders = feeds.iter_mut().map(|feed| pour(feed, share));
    futures_util::future::try_join_all(senders).await?;
    wait_for(seen, already + share * spec.tasks as u64).await?;
    Ok(mark.until_now(spec, seen))
}

/// Sends `share` tokens of each lease, single, as fast as flow control and acks let it.
async fn pour(feed: &mut Feed, share: u64) -> anyhow::Result<()> {
    let target = feed.leases.first().map_or(0, |lease| lease.last_index) + share;
    let mut borrowed = None;
    loop {
        let mut frames = BytesMut::with_capacity(32 << 10);
        let mut done = true;
        for at in 0..feed.leases.len() {
            let lease = &mut feed.leases[at..=at];
            if lease[0].last_index >= target {
                continue;
            }
            done = false;
            match &feed.link {
                Link::Bare(..) => frames.put_slice(&bare_tokens(lease)),
                Link::Baton(runner, _) => {
                    if lease[0].last_index < runner.acked_index(&lease[0].task_id) + WINDOW {
                        frames.put_slice(&runner.encode(lease, &stamp(now_ns())));
                    }
                }
            }
        }
        match &mut feed.link {
            Link::Bare(sender, _) if !done => sender.send_all(frames.freeze()).await?,
            Link::Baton(runner, orders) if !done => {
                while orders.try_recv().is_ok() {}
                if borrowed.is_none() {
                    borrowed = runner.take_output();
                }
                let output = borrowed.as_mut().context("the output stream is gone")?;
                if frames.is_empty() {
                    let wait = tokio::time::timeout(Duration::from_secs(20), orders.recv());
                    wait.await.context("no acknowledgement came")?;
                } else {
                    output.send_all(frames.freeze()).await?;
                }
            }
            Link::Baton(runner, _) => {
                if let Some(output) = borrowed.take() {
                    runner.put_output(output);
                }
                return Ok(());
            }
            Link::Bare(..) => return Ok(()),
        }
    }
}

/// The state of things at the start of a span.
struct Mark {
    at_ns: u64,
    server_us: u64,
    load_us: u64,
    tokens: u64,
}

impl Mark {
    fn take(spec: &Spec, seen: &Rc<RefCell<Seen>>) -> Self {
        Self {
            at_ns: now_ns(),
            server_us: cpu_us(spec.server.pid) + spec.also.iter().copied().map(cpu_us).sum::<u64>(),
            load_us: cpu_us(std::process::id()),
            tokens: seen.borrow().tokens,
        }
    }

    fn until_now(&self, spec: &Spec, seen: &Rc<RefCell<Seen>>) -> Outcome {
        let now = Self::take(spec, seen);
        let tokens = now.tokens - self.tokens;
        let each = |us: u64| us as f64 / tokens.max(1) as f64;
        Outcome {
            tokens,
            lost: 0,
            seconds: (now.at_ns - self.at_ns) as f64 / 1e9,
            server_us: each(now.server_us - self.server_us),
            load_us: each(now.load_us - self.load_us),
            latency: Latency::default(),
        }
    }
}
