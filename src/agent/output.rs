//! The Output stream: pulls what is ready of all attempts whenever the stream can take
//! it, and opens itself again when it breaks.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::future::BoxFuture;
use tokio_stream::Stream;
use tonic::{Code, Status, Streaming, transport::Channel};

use super::{
    connection::{self, Connector, Credential},
    outbox::Outbox,
};
use crate::{
    clock::Clock,
    id::Entropy,
    pb::{OutputHello, OutputRequest, OutputResponse},
    runners::protocol::Backoff,
};

/// Bytes of events in one message: far below the cap on messages, far above a step.
const MAX_BATCH: usize = 256 << 10;
/// Longest time to open the stream.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);

/// What the link has to say.
#[derive(Debug)]
pub enum Heard {
    /// Acknowledgements.
    Response(OutputResponse),
    /// The stream ended and will be opened again; the reason.
    Broken(Status),
}

/// How the stream is opened.
#[derive(Clone)]
pub struct Opening {
    /// Makes the connection, which is not that of control.
    pub connector: Connector,
    /// The connection of control, for where another one leads to another server: behind a
    /// balancer, which knows nothing of sessions.
    pub beside: Option<Channel>,
    /// Credential of the runner.
    pub credential: Credential,
    /// The session to join.
    pub session_id: String,
    /// What is carried.
    pub outbox: Outbox,
    /// Time.
    pub clock: Clock,
    /// Waits this long for more to send together; zero sends at once.
    pub flush_interval: Duration,
}

enum State {
    Opening(BoxFuture<'static, Result<Streaming<OutputResponse>, Status>>),
    Open(Box<Streaming<OutputResponse>>),
    Waiting(BoxFuture<'static, ()>),
}

/// The stream with its reopening.
pub struct Link {
    opening: Opening,
    state: State,
    backoff: Backoff,
    entropy: Entropy,
    /// Ends in a row without a message in between.
    n_failures: u32,
}

impl Link {
    /// Opens the stream on `carrier`.
    pub fn open(opening: Opening, carrier: u64, entropy: Entropy) -> Self {
        let state = State::Opening(open(opening.clone(), carrier));
        let backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
        Self { opening, state, backoff, entropy, n_failures: 0 }
    }

    /// Ends of the stream in a row without a message in between.
    pub fn n_failures(&self) -> u32 {
        self.n_failures
    }

    /// The next thing heard. Can be dropped and called again.
    pub async fn next(&mut self) -> Heard {
        loop {
            match &mut self.state {
                State::Opening(opening) => match opening.await {
                    Ok(stream) => self.state = State::Open(Box::new(stream)),
                    Err(status) if status.code() == Code::NotFound => {
                        let Some(channel) = self.opening.beside.take() else {
                            return self.broken(status);
                        };
                        self.opening.connector = Arc::new(move || {
                            let channel = channel.clone();
                            Box::pin(async move { Ok(channel) })
                        });
                        let carrier = self.opening.outbox.new_carrier();
                        self.state = State::Opening(open(self.opening.clone(), carrier));
                    }
                    Err(status) => return self.broken(status),
                },
                State::Open(stream) => match stream.message().await {
                    Ok(Some(response)) => {
                        self.n_failures = 0;
                        self.backoff.reset();
                        return Heard::Response(response);
                    }
                    Ok(None) => return self.broken(Status::unavailable("the stream ended")),
                    Err(status) => return self.broken(status),
                },
                State::Waiting(sleep) => {
                    sleep.await;
                    let carrier = self.opening.outbox.new_carrier();
                    self.state = State::Opening(open(self.opening.clone(), carrier));
                }
            }
        }
    }

    fn broken(&mut self, status: Status) -> Heard {
        self.n_failures += 1;
        let wait = self.backoff.next(self.entropy.unit());
        self.state = State::Waiting(Box::pin(self.opening.clock.sleep(wait)));
        Heard::Broken(status)
    }
}

fn open(
    opening: Opening,
    carrier: u64,
) -> BoxFuture<'static, Result<Streaming<OutputResponse>, Status>> {
    let timeout = opening.clock.sleep(OPEN_TIMEOUT);
    let attempt = async move {
        let channel = (opening.connector)().await;
        let channel = channel.map_err(|error| Status::unavailable(format!("{error:#}")))?;
        let requests = Requests {
            outbox: opening.outbox,
            carrier,
            hello: Some(OutputHello { session_id: opening.session_id }),
            seq: 0,
            clock: opening.clock,
            flush_interval: opening.flush_interval,
            flush: None,
        };
        let request = opening.credential.request(requests);
        Ok(connection::client(channel).output(request).await?.into_inner())
    };
    Box::pin(async move {
        tokio::select! {
            biased;
            opened = attempt => opened,
            () = timeout => Err(Status::deadline_exceeded("the Output stream did not open in time")),
        }
    })
}

/// The request stream of `Output`.
struct Requests {
    outbox: Outbox,
    carrier: u64,
    hello: Option<OutputHello>,
    seq: u64,
    clock: Clock,
    flush_interval: Duration,
    flush: Option<BoxFuture<'static, ()>>,
}

impl Stream for Requests {
    type Item = OutputRequest;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<OutputRequest>> {
        let this = &mut *self;
        if let Some(hello) = this.hello.take() {
            this.seq += 1;
            let request = OutputRequest { seq: this.seq, hello: Some(hello), ..Default::default() };
            return Poll::Ready(Some(request));
        }
        loop {
            if !this.outbox.is_carrier(this.carrier) {
                return Poll::Ready(None);
            }
            if !this.outbox.poll_ready(cx.waker(), |_| false) {
                return Poll::Pending;
            }
            if !this.flush_interval.is_zero() {
                let (clock, interval) = (&this.clock, this.flush_interval);
                let flush = this.flush.get_or_insert_with(|| Box::pin(clock.sleep(interval)));
                if flush.as_mut().poll(cx).is_pending() {
                    return Poll::Pending;
                }
                this.flush = None;
            }
            // Nothing to take: the stream was superseded or all was acknowledged just now.
            if let Some(batch) = this.outbox.take(this.carrier, MAX_BATCH, |_| false) {
                this.seq += 1;
                return Poll::Ready(Some(OutputRequest {
                    seq: this.seq,
                    hello: None,
                    leases: batch.leases,
                    credits: batch.credits,
                }));
            }
        }
    }
}
