//! Control messages to the server, numbered and kept until they are acknowledged, and
//! the request stream that carries them.
//!
//! Anybody may push at any time; a stream pulls. A stream hands out Hello first and
//! nothing else until Welcome was taken in; a stream that was superseded ends.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
};

use futures_util::task::AtomicWaker;
use parking_lot::Mutex;
use tokio_stream::Stream;

use crate::{
    pb::{self, ConnectRequest, connect_request::Body},
    runners::protocol::Outbox,
};

/// The messages; clones share them.
#[derive(Clone, Debug, Default)]
pub struct Mailbox(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    carrier: AtomicWaker,
}

#[derive(Debug, Default)]
struct State {
    outbox: Outbox<Body>,
    /// The latest heartbeat, until it is sent.
    heartbeat: Option<pb::RunnerHeartbeat>,
    /// Highest seq of the server that was processed.
    ack: u64,
    stream: u64,
    welcomed: bool,
}

impl State {
    fn next(&mut self) -> Option<ConnectRequest> {
        let ack = self.ack;
        if let Some(heartbeat) = self.heartbeat.take() {
            return Some(ConnectRequest { seq: 0, ack, body: Some(Body::Heartbeat(heartbeat)) });
        }
        let (seq, body) = self.outbox.next_unsent()?;
        Some(ConnectRequest { seq, ack, body: Some(body.clone()) })
    }
}

impl Mailbox {
    /// Sends a message, now or once there is a stream.
    pub fn push(&self, body: Body) {
        self.0.state.lock().outbox.push(body);
        self.0.carrier.wake();
    }

    /// Sends a heartbeat in place of one that was not sent yet.
    pub fn beat(&self, heartbeat: pb::RunnerHeartbeat) {
        self.0.state.lock().heartbeat = Some(heartbeat);
        self.0.carrier.wake();
    }

    /// A message of the server was processed; `theirs` is what it acknowledged.
    pub fn received(&self, processed: u64, theirs: u64) {
        let mut state = self.0.state.lock();
        state.ack = processed;
        state.outbox.ack(theirs);
    }

    /// Begins a stream, which ends the one before.
    pub fn open(&self, hello: pb::Hello) -> ControlStream {
        let mut state = self.0.state.lock();
        state.stream += 1;
        state.welcomed = false;
        state.heartbeat = None;
        let hello = ConnectRequest { seq: 0, ack: state.ack, body: Some(Body::Hello(hello)) };
        let stream = state.stream;
        drop(state);
        self.0.carrier.wake();
        ControlStream { mailbox: self.clone(), stream, hello: Some(hello) }
    }

    /// Welcome came: the session goes on after `last_seq`, or a new one starts empty.
    pub fn welcomed(&self, resumed: bool, last_seq: u64) {
        let mut state = self.0.state.lock();
        if resumed {
            state.outbox.ack(last_seq);
            state.outbox.rewind();
        } else {
            state.outbox = Outbox::default();
            state.ack = 0;
        }
        state.welcomed = true;
        drop(state);
        self.0.carrier.wake();
    }

    /// Takes everything unsent, for a call in poll mode; the highest seq among it.
    pub fn take(&self) -> (Vec<ConnectRequest>, u64) {
        let mut state = self.0.state.lock();
        let messages: Vec<_> = std::iter::from_fn(|| state.next()).collect();
        let last = messages.iter().map(|message| message.seq).max().unwrap_or(0);
        (messages, last)
    }

    /// A call in poll mode carried messages up to `seq`.
    pub fn delivered(&self, seq: u64) {
        self.0.state.lock().outbox.ack(seq);
    }

    /// Whether there is something unsent; else `waker` is woken when there is.
    pub fn poll_ready(&self, waker: &Waker) -> bool {
        self.0.carrier.register(waker);
        let state = self.0.state.lock();
        state.heartbeat.is_some() || state.outbox.has_unsent()
    }

    /// Whether the server has acknowledged everything.
    pub fn is_settled(&self) -> bool {
        self.0.state.lock().outbox.n_unacked() == 0
    }
}

/// The request stream of `Connect`.
#[derive(Debug)]
pub struct ControlStream {
    mailbox: Mailbox,
    stream: u64,
    hello: Option<ConnectRequest>,
}

impl Stream for ControlStream {
    type Item = ConnectRequest;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<ConnectRequest>> {
        if let Some(hello) = self.hello.take() {
            return Poll::Ready(Some(hello));
        }
        let shared = &*self.mailbox.0;
        if shared.state.lock().stream != self.stream {
            return Poll::Ready(None);
        }
        shared.carrier.register(cx.waker());
        let mut state = shared.state.lock();
        if state.stream != self.stream {
            return Poll::Ready(None);
        }
        if !state.welcomed {
            return Poll::Pending;
        }
        match state.next() {
            Some(message) => Poll::Ready(Some(message)),
            None => Poll::Pending,
        }
    }
}
