//! A scripted runner: speaks the runner protocol with as little work as it allows, so that a
//! measurement shows the server.
//!
//! Runs inside a `LocalSet`; the state is shared without locks.

use std::{cell::RefCell, collections::HashMap, rc::Rc, time::Duration};

use anyhow::Context as _;
use bytes::{BufMut as _, Bytes, BytesMut};
use prost::{
    Message as _,
    encoding::{encode_varint, encoded_len_varint},
};
use tokio::sync::{mpsc, oneshot};

use super::{
    process::now_ns,
    wire::{self, Connection, Sender},
};
use crate::{
    id::TaskId,
    pb::{
        ConnectRequest, ConnectResponse, Credits, Finish, Hello, Inventory, LeaseAck, LeaseEvents,
        OutputHello, OutputRequest, OutputResponse, RunnerHeartbeat, Success, connect_request,
        connect_response, finish, inventory::Held,
    },
    runners::protocol::HeldDigest,
};

const CONNECT: &str = "/baton.v1.RunnerService/Connect";
const OUTPUT: &str = "/baton.v1.RunnerService/Output";

/// The server is told what was processed after this many of its messages at the latest; it
/// keeps a few thousand.
const ACK_EVERY: u64 = 1024;

/// An attempt that the runner holds.
#[derive(Clone, Debug)]
pub struct Lease {
    /// The task.
    pub task_id: String,
    /// The attempt.
    pub attempt: u32,
    /// When the Assign came, in nanoseconds of the monotonic clock.
    pub assigned_ns: u64,
    /// Index of its latest event.
    pub last_index: u64,
    /// Highest index acknowledged.
    pub acked_index: u64,
    /// Whether its Finish was sent.
    pub finished: bool,
    /// The input as it came.
    pub input: Bytes,
}

/// What the server wants of the script.
#[derive(Debug)]
pub enum Order {
    /// A new attempt.
    Start(Lease),
    /// Stop it; when the order came, in nanoseconds of the monotonic clock.
    Stop { at_ns: u64 },
    /// Its Finish is on stable storage.
    Finished,
    /// Acknowledged up to here.
    Acked { task_id: String, index: u64 },
    /// Errors that acknowledgements carried.
    Failed(String),
}

/// A runner; clones share it.
#[derive(Clone)]
pub struct Runner(Rc<RefCell<State>>);

struct State {
    control: Sender,
    output: Option<Sender>,
    session: String,
    seq: u64,
    output_seq: u64,
    seen: u64,
    acked: u64,
    revision: u64,
    slots: u32,
    held: HashMap<String, Lease>,
    digest: HeldDigest,
    error: Option<String>,
    buf: BytesMut,
}

/// How a runner appears.
#[derive(Clone, Debug)]
pub struct Script {
    /// Its name.
    pub name: String,
    /// The model that it serves.
    pub model: String,
    /// Most attempts at once.
    pub slots: u32,
}

impl Runner {
    /// Connects a new runner; its orders come through the channel.
    pub async fn start(
        connection: &Connection,
        script: &Script,
    ) -> anyhow::Result<(Self, mpsc::Receiver<Order>)> {
        Self::open(connection, script, None).await
    }

    /// Comes back to the session of a runner whose connection is gone, with all that it held.
    pub async fn resume(
        &self,
        connection: &Connection,
        script: &Script,
    ) -> anyhow::Result<(Self, mpsc::Receiver<Order>)> {
        Self::open(connection, script, Some(self)).await
    }

    async fn open(
        connection: &Connection,
        script: &Script,
        before: Option<&Self>,
    ) -> anyhow::Result<(Self, mpsc::Receiver<Order>)> {
        let (mut control, mut answers) = connection.call(CONNECT).await?;
        let old = before.map(|runner| runner.0.borrow());
        let free = script.slots - old.as_ref().map_or(0, |old| old.held.len()) as u32;
        let seen = old.as_ref().map_or(0, |old| old.seen);
        let revision = old.as_ref().map_or(1, |old| old.revision + 1);
        let hello = Hello {
            runner_id: script.name.clone(),
            instance_id: "bench".to_owned(),
            session_id: old.as_ref().map_or_else(String::new, |old| old.session.clone()),
            min_version: 1,
            max_version: 1,
            slots: script.slots,
            models: vec![script.model.clone()],
            engine: "scripted".to_owned(),
            inventory: Some(old.as_ref().map_or_else(Inventory::default, |old| old.inventory())),
            credits: Some(Credits { revision, free_slots: free, as_of_seq: seen }),
            ..Hello::default()
        };
        let held = old.as_ref().map(|old| (old.held.clone(), old.digest, old.seq));
        drop(old);
        let first =
            ConnectRequest { seq: 0, ack: seen, body: Some(connect_request::Body::Hello(hello)) };
        control.send(wire::framed(&first))?;
        // The channel holds what a full set of slots can bring at once, with room for acks.
        let (orders, script_side) = mpsc::channel(16_384);
        let (welcomed, welcome) = oneshot::channel();
        let (output, mut acks) = connection.call(OUTPUT).await?;
        let (held, digest, seq) = held.unwrap_or_default();
        let runner = Self(Rc::new(RefCell::new(State {
            control,
            output: Some(output),
            session: String::new(),
            seq,
            output_seq: 0,
            seen,
            acked: seen,
            revision,
            slots: script.slots,
            held,
            digest,
            error: None,
            buf: BytesMut::new(),
        })));

        let reader = runner.clone();
        let control_orders = orders.clone();
        tokio::task::spawn_local(async move {
            let mut welcomed = Some(welcomed);
            let mut heartbeat = Duration::from_secs(5);
            let mut failed = None;
            loop {
                let mut arrived = Vec::new();
                let at_ns = now_ns();
                let wait = answers.chunk(|m| arrived.push(ConnectResponse::decode(m)));
                match tokio::time::timeout(heartbeat, wait).await {
                    Err(_) => failed = reader.0.borrow_mut().heartbeat().err(),
                    Ok(Ok(true)) => {}
                    Ok(Ok(false)) => break,
                    Ok(Err(error)) => failed = Some(error),
                }
                for message in arrived.into_iter().flatten() {
                    let body = reader.0.borrow_mut().receive(message, at_ns.max(now_ns()));
                    match body {
                        Ok(Said::Welcome(session, interval)) => {
                            heartbeat = interval;
                            if let Some(welcomed) = welcomed.take() {
                                let _ = welcomed.send(session);
                            }
                        }
                        Ok(Said::Order(order)) => {
                            let _ = control_orders.send(order).await;
                        }
                        Ok(Said::Nothing) => {}
                        Err(error) => failed = Some(error),
                    }
                }
                if let Some(error) = failed.take() {
                    reader.0.borrow_mut().error = Some(format!("Connect: {error:#}"));
                    break;
                }
            }
        });
        let session = tokio::time::timeout(Duration::from_secs(10), welcome)
            .await
            .context("no Welcome")?
            .map_err(|_| {
                anyhow::anyhow!("{}", runner.0.borrow().error.clone().unwrap_or_default())
            })?;
        {
            let mut state = runner.0.borrow_mut();
            state.session.clone_from(&session);
            let hello = OutputHello { session_id: session };
            state.output_seq = 1;
            let first = OutputRequest { seq: 1, hello: Some(hello), ..OutputRequest::default() };
            state.send_output(wire::framed(&first))?;
        }
        let reader = runner.clone();
        tokio::task::spawn_local(async move {
            loop {
                let mut arrived = Vec::new();
                let going = acks.chunk(|m| arrived.push(OutputResponse::decode(m))).await;
                for ack in arrived.into_iter().flatten().flat_map(|m| m.leases) {
                    let order = reader.0.borrow_mut().acknowledged(ack);
                    let _ = orders.send(order).await;
                }
                match going {
                    Ok(true) => {}
                    Ok(false) => break,
                    Err(error) => {
                        reader.0.borrow_mut().error = Some(format!("Output: {error:#}"));
                        break;
                    }
                }
            }
        });
        Ok((runner, script_side))
    }

    /// Why a stream of it ended, if one did.
    pub fn error(&self) -> Option<String> {
        self.0.borrow().error.clone()
    }

    /// Sends one token for each of `leases`, all in one message, with the same text.
    pub fn step(&self, leases: &mut [Lease], text: &[u8]) -> anyhow::Result<()> {
        let mut state = self.0.borrow_mut();
        let frames = state.tokens(leases, text);
        state.send_output(frames)
    }

    /// The frames that [`step`](Self::step) would send.
    pub fn encode(&self, leases: &mut [Lease], text: &[u8]) -> Bytes {
        self.0.borrow_mut().tokens(leases, text)
    }

    /// Takes the output stream, for a script that follows its flow control.
    pub fn take_output(&self) -> Option<Sender> {
        self.0.borrow_mut().output.take()
    }

    /// Gives the output stream back.
    pub fn put_output(&self, output: Sender) {
        self.0.borrow_mut().output = Some(output);
    }

    /// Highest index acknowledged of an attempt that is held.
    pub fn acked_index(&self, task_id: &str) -> u64 {
        self.0.borrow().held.get(task_id).map_or(0, |lease| lease.acked_index)
    }

    /// Number of attempts held.
    pub fn n_held(&self) -> usize {
        self.0.borrow().held.len()
    }

    /// Ends an attempt, and offers its slot anew.
    pub fn finish(&self, task_ids: &[(String, u32, u64)]) -> anyhow::Result<()> {
        let mut state = self.0.borrow_mut();
        let outcome = finish::Outcome::Success(Success { result: None });
        let finish = Finish { outcome: Some(outcome), usage: None };
        let mut leases = Vec::with_capacity(task_ids.len());
        for (task_id, attempt, last_index) in task_ids {
            if let Some(lease) = state.held.get_mut(task_id) {
                lease.finished = true;
                lease.last_index = *last_index;
            }
            leases.push(LeaseEvents {
                task_id: task_id.clone(),
                attempt: *attempt,
                first_index: last_index + 1,
                events: Vec::new(),
                finish: Some(finish.clone()),
            });
        }
        state.output_seq += 1;
        let credits = Some(state.credits());
        let seq = state.output_seq;
        let request = OutputRequest { seq, hello: None, leases, credits };
        state.send_output(wire::framed(&request))
    }

    /// Notes how far an attempt's events go, for the inventory of a reconnect.
    pub fn note(&self, lease: &Lease) {
        if let Some(held) = self.0.borrow_mut().held.get_mut(&lease.task_id) {
            held.last_index = lease.last_index;
        }
    }
}

enum Said {
    Welcome(String, Duration),
    Order(Order),
    Nothing,
}

impl State {
    fn free(&self) -> u32 {
        let busy = self.held.values().filter(|lease| !lease.finished).count() as u32;
        self.slots.saturating_sub(busy)
    }

    fn credits(&mut self) -> Credits {
        self.revision += 1;
        Credits { revision: self.revision, free_slots: self.free(), as_of_seq: self.seen }
    }

    fn inventory(&self) -> Inventory {
        let held = self.held.values().map(|lease| Held {
            task_id: lease.task_id.clone(),
            attempt: lease.attempt,
            last_index: lease.last_index,
            first_kept_index: 1,
            finished: lease.finished,
        });
        Inventory { held: held.collect() }
    }

    fn send_output(&mut self, frames: Bytes) -> anyhow::Result<()> {
        self.output.as_mut().context("the output stream is in use")?.send(frames)
    }

    fn send_control(&mut self, seq: u64, body: connect_request::Body) -> anyhow::Result<()> {
        self.acked = self.seen;
        let message = ConnectRequest { seq, ack: self.seen, body: Some(body) };
        self.control.send(wire::framed(&message))
    }

    fn heartbeat(&mut self) -> anyhow::Result<()> {
        let beat = RunnerHeartbeat {
            held_digest: self.digest.0,
            held: self.held.len() as u32,
            ..RunnerHeartbeat::default()
        };
        self.send_control(0, connect_request::Body::Heartbeat(beat))
    }

    fn receive(&mut self, message: ConnectResponse, at_ns: u64) -> anyhow::Result<Said> {
        if message.seq != 0 {
            if message.seq <= self.seen {
                return Ok(Said::Nothing);
            }
            self.seen = message.seq;
        }
        let said = match message.body {
            Some(connect_response::Body::Welcome(welcome)) => {
                if !welcome.resumed {
                    (self.seen, self.seq) = (0, 0);
                }
                let every = welcome.heartbeat_interval.unwrap_or_default();
                let every = Duration::try_from(every).unwrap_or(Duration::from_secs(5));
                Said::Welcome(welcome.session_id, every)
            }
            Some(connect_response::Body::Assign(assign)) => {
                let lease = Lease {
                    task_id: assign.task_id,
                    attempt: assign.attempt,
                    assigned_ns: at_ns,
                    last_index: 0,
                    acked_index: 0,
                    finished: false,
                    input: assign.input_json,
                };
                self.toggle(&lease.task_id, lease.attempt);
                self.held.insert(lease.task_id.clone(), lease.clone());
                Said::Order(Order::Start(lease))
            }
            Some(connect_response::Body::Cancel(cancel)) => {
                self.forget(&cancel.task_id);
                let credits = self.credits();
                self.seq += 1;
                self.send_control(self.seq, connect_request::Body::Credits(credits))?;
                Said::Order(Order::Stop { at_ns })
            }
            Some(connect_response::Body::InventoryRequest(_)) => {
                let inventory = self.inventory();
                self.seq += 1;
                self.send_control(self.seq, connect_request::Body::Inventory(inventory))?;
                Said::Nothing
            }
            _ => Said::Nothing,
        };
        if self.seen >= self.acked + ACK_EVERY {
            self.heartbeat()?;
        }
        Ok(said)
    }

    fn acknowledged(&mut self, ack: LeaseAck) -> Order {
        if let Some(error) = ack.error {
            return Order::Failed(format!("{}: {}", ack.task_id, error.message));
        }
        if ack.finished {
            self.forget(&ack.task_id);
            return Order::Finished;
        }
        if let Some(lease) = self.held.get_mut(&ack.task_id) {
            lease.acked_index = ack.acked_index;
        }
        Order::Acked { task_id: ack.task_id, index: ack.acked_index }
    }

    fn forget(&mut self, task_id: &str) {
        if let Some(lease) = self.held.remove(task_id) {
            self.toggle(task_id, lease.attempt);
        }
    }

    fn toggle(&mut self, task_id: &str, attempt: u32) {
        if let Ok(task) = task_id.parse::<TaskId>() {
            self.digest.toggle(task, attempt);
        }
    }

    /// One message with one token of each lease, cut by hand: an `OutputRequest` in its frame.
    fn tokens(&mut self, leases: &mut [Lease], text: &[u8]) -> Bytes {
        let now = now_ns();
        self.output_seq += 1;
        self.buf.clear();
        self.buf.put_u8(0x08);
        encode_varint(self.output_seq, &mut self.buf);
        for lease in leases {
            lease.last_index += 1;
            let elapsed = (now - lease.assigned_ns) / 1000;
            let token = 1 + encoded_len_varint(text.len() as u64) + text.len();
            let event = token + 1 + encoded_len_varint(elapsed);
            let id = lease.task_id.len();
            let len = 2
                + id
                + 1
                + encoded_len_varint(u64::from(lease.attempt))
                + 1
                + encoded_len_varint(lease.last_index)
                + 1
                + encoded_len_varint(event as u64)
                + event;
            let buf = &mut self.buf;
            put_field(buf, 0x1a, len as u64); // leases
            put_field(buf, 0x0a, id as u64);
            buf.put_slice(lease.task_id.as_bytes());
            put_field(buf, 0x10, u64::from(lease.attempt));
            put_field(buf, 0x18, lease.last_index);
            put_field(buf, 0x22, event as u64); // events
            put_field(buf, 0x0a, text.len() as u64);
            buf.put_slice(text);
            put_field(buf, 0x28, elapsed);
        }
        let mut out = BytesMut::with_capacity(self.buf.len() + 5);
        wire::put_frame_head(&mut out, self.buf.len());
        out.put_slice(&self.buf);
        out.freeze()
    }
}

fn put_field(buf: &mut BytesMut, key: u8, value: u64) {
    buf.put_u8(key);
    encode_varint(value, buf);
}
