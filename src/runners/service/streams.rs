//! The two ends of `Connect` and `Output`: loops that read, and streams of answers that end
//! their session's hold on a connection when they are dropped.

use std::{collections::VecDeque, pin::pin, sync::Arc, time::Duration};

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};

use crate::{
    clock::Mono,
    error::{Error, Kind, Reason},
    pb,
    queue::SupplyKey,
    runners::{Registry, convert, session::Link},
};

/// A runner that was asked to renew its stream has this long, and the same as jitter.
const RENEWAL: Duration = Duration::from_secs(10);
/// Ends that are being stored when the server stops are waited for this long.
const LAST_ACKS: Duration = Duration::from_secs(2);
/// Acknowledgements are looked for this often even if nothing rang.
const ACK_SWEEP: Duration = Duration::from_secs(1);

/// Reads a Connect stream until it ends.
pub(super) async fn read_control(
    registry: Registry,
    key: SupplyKey,
    link: Link,
    mut messages: Streaming<pb::ConnectRequest>,
) {
    loop {
        let message = tokio::select! {
            biased;
            () = link.ended() => return,
            message = messages.message() => message,
        };
        let taken = match message {
            Ok(Some(message)) => convert::from_runner(message)
                .and_then(|message| registry.receive(key, &link, message)),
            // Half-closed, or broken.
            Ok(None) | Err(_) => return registry.detach(key, &link),
        };
        if let Err(error) = taken {
            return link.end(Some(error));
        }
    }
}

/// Reads an Output stream until it ends. Waits for nothing else.
pub(super) async fn read_output(
    registry: Registry,
    key: SupplyKey,
    link: Link,
    first: pb::OutputRequest,
    mut messages: Streaming<pb::OutputRequest>,
) {
    let mut next = Some(first);
    let ended = link.clone();
    let mut ended = pin!(ended.ended());
    loop {
        let message = if let Some(first) = next.take() {
            Ok(Some(first))
        } else {
            tokio::select! {
                biased;
                () = &mut ended => return,
                message = messages.message() => message,
            }
        };
        let taken = match message {
            Ok(Some(message)) => {
                let seq = message.seq;
                convert::output(message)
                    .and_then(|(batches, credits)| registry.take(key, &link, seq, batches, credits))
            }
            Ok(None) | Err(_) => return registry.detach_output(key, &link),
        };
        if let Err(error) = taken {
            return link.end(Some(error));
        }
    }
}

/// Writes a Connect stream; when it is dropped, the session is detached.
pub(super) struct ControlWriter {
    registry: Registry,
    key: SupplyKey,
    link: Link,
    bell: Arc<Notify>,
    stop: CancellationToken,
    ready: VecDeque<pb::ConnectResponse>,
    heartbeat_at: Mono,
    /// When to ask for a new stream, and after that when to end this one.
    renew_at: Mono,
    renewal_asked: bool,
    over: bool,
}

impl ControlWriter {
    pub(super) fn new(
        registry: Registry,
        key: SupplyKey,
        link: Link,
        welcome: pb::ConnectResponse,
    ) -> Result<Self, Error> {
        let now = registry.clock().mono();
        Ok(Self {
            bell: registry.bell(key)?,
            stop: registry.supervisor().token(),
            ready: [welcome].into(),
            heartbeat_at: now + registry.limits().heartbeat_interval,
            renew_at: now + registry.limits().max_stream_age,
            renewal_asked: false,
            over: false,
            registry,
            key,
            link,
        })
    }

    pub(super) async fn next(&mut self) -> Option<Result<pb::ConnectResponse, Status>> {
        loop {
            if let Some(message) = self.ready.pop_front() {
                return Some(Ok(message));
            }
            if self.over {
                return None;
            }
            if self.link.is_ended() {
                return self.end(self.link.take_why());
            }
            match self.registry.unsent(self.key, &self.link) {
                Ok(messages) => self.ready.extend(messages),
                Err(error) => return self.end(Some(error)),
            }
            if self.ready.is_empty()
                && let Err(error) = self.idle().await
            {
                return self.end(Some(error));
            }
        }
    }

    /// Waits for something to do, or does what the clock says.
    async fn idle(&mut self) -> Result<(), Error> {
        let (registry, now) = (&self.registry, self.registry.clock().mono());
        if self.stop.is_cancelled() {
            if self.renewal_asked {
                return Err(stopping());
            }
            self.renewal_asked = true;
            let ask = convert::reconnect(Duration::from_secs(1), "the server is shutting down");
            self.ready.push_back(registry.unnumbered(self.key, ask));
        } else if now >= self.heartbeat_at {
            self.heartbeat_at = now + registry.limits().heartbeat_interval;
            let beat = convert::heartbeat(registry.clock().now());
            self.ready.push_back(registry.unnumbered(self.key, beat));
        } else if now >= self.renew_at {
            if self.renewal_asked {
                let message = "the stream has reached its greatest age";
                return Err(Error::new(Kind::Unavailable, Reason::NotServing, message));
            }
            self.renewal_asked = true;
            self.renew_at = now + 2 * RENEWAL;
            let ask = convert::reconnect(RENEWAL, "planned renewal");
            self.ready.push_back(registry.unnumbered(self.key, ask));
        } else {
            tokio::select! {
                () = self.bell.notified() => {}
                () = self.link.ended() => {}
                () = self.stop.cancelled() => {}
                () = registry.clock().sleep_until(self.heartbeat_at.min(self.renew_at)) => {}
            }
        }
        Ok(())
    }

    fn end(&mut self, why: Option<Error>) -> Option<Result<pb::ConnectResponse, Status>> {
        self.over = true;
        why.map(|error| Err(error.into()))
    }
}

impl Drop for ControlWriter {
    fn drop(&mut self) {
        self.registry.detach(self.key, &self.link);
        // This writer may have taken a ring that was meant for the next.
        self.bell.notify_one();
    }
}

/// Writes an Output stream.
pub(super) struct AckWriter {
    registry: Registry,
    key: SupplyKey,
    link: Link,
    bell: Arc<Notify>,
    stop: CancellationToken,
    /// Set once the server stops: the stream ends by then.
    stop_at: Option<Mono>,
    over: bool,
}

impl AckWriter {
    pub(super) fn new(registry: Registry, key: SupplyKey, link: Link, bell: Arc<Notify>) -> Self {
        let stop = registry.supervisor().token();
        Self { registry, key, link, bell, stop, stop_at: None, over: false }
    }

    pub(super) async fn next(&mut self) -> Option<Result<pb::OutputResponse, Status>> {
        loop {
            if self.over {
                return None;
            }
            if self.link.is_ended() {
                return self.end(self.link.take_why());
            }
            match self.registry.acks(self.key, &self.link) {
                Ok(Some(acks)) => return Some(Ok(acks)),
                Ok(None) => {}
                Err(error) => return self.end(Some(error)),
            }
            let now = self.registry.clock().mono();
            let mut wake_at = now + ACK_SWEEP;
            if self.stop.is_cancelled() {
                let stop_at = *self.stop_at.get_or_insert(now + LAST_ACKS);
                if now >= stop_at || !self.registry.is_storing(self.key) {
                    return self.end(Some(stopping()));
                }
                wake_at = stop_at;
            }
            tokio::select! {
                () = self.bell.notified() => {}
                () = self.link.ended() => {}
                () = self.stop.cancelled(), if self.stop_at.is_none() => {}
                () = self.registry.clock().sleep_until(wake_at) => {}
            }
        }
    }

    fn end(&mut self, why: Option<Error>) -> Option<Result<pb::OutputResponse, Status>> {
        self.over = true;
        why.map(|error| Err(error.into()))
    }
}

impl Drop for AckWriter {
    fn drop(&mut self) {
        self.registry.detach_output(self.key, &self.link);
        self.bell.notify_one();
    }
}

fn stopping() -> Error {
    Error::new(Kind::Unavailable, Reason::NotServing, "the server is shutting down")
        .retry_after(Duration::from_secs(1))
}
