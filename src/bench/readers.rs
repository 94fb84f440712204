//! Subscribers of a relay: over gRPC, many on a connection, or server-sent events, each on a
//! connection of its own. What they see is counted and checked alike.

use std::{cell::RefCell, rc::Rc, time::Duration};

use anyhow::{Context as _, bail, ensure};
use bytes::{Buf as _, BytesMut};
use hdrhistogram::Histogram;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use super::{
    client,
    figures::histogram,
    process::now_ns,
    relay::{Server, stamped},
    wire::{self, Connection, Receiver},
    yardstick,
};

/// Opens a subscriber's stream.
pub async fn subscribe(
    connection: &Connection,
    server: &Server,
    task: &str,
) -> anyhow::Result<Receiver> {
    if server.baton {
        return client::stream_task(connection, task, 0).await;
    }
    let (mut sender, mut receiver) = connection.call(yardstick::path::SUBSCRIBE).await?;
    sender.send(wire::framed(&yardstick::Subscription { task: task.to_owned() }))?;
    sender.finish()?;
    receiver.accepted().await?;
    Ok(receiver)
}

/// A stream of server-sent events over HTTP/1.1.
pub struct Events {
    stream: TcpStream,
    /// What is not cut into chunks yet.
    raw: BytesMut,
    /// Some of it came with the head of the answer.
    came: bool,
    /// What is left of the chunk, with the line break behind it.
    left: usize,
    /// What is not cut into events yet.
    text: BytesMut,
}

impl Events {
    /// Opens the stream of a task.
    pub async fn open(server: &Server, task: &str) -> anyhow::Result<Self> {
        let path = if server.baton {
            format!("/v1/tasks/{task}/stream")
        } else {
            format!("{}{task}", yardstick::path::EVENTS)
        };
        let token = server.token.as_deref();
        let credential = token.map(|token| format!("authorization: Bearer {token}\r\n"));
        let request = format!(
            "GET {path} HTTP/1.1\r\nhost: {}\r\naccept: text/event-stream\r\n{}\r\n",
            server.addr,
            credential.unwrap_or_default(),
        );
        let mut stream = TcpStream::connect(server.addr).await.context("could not connect")?;
        stream.set_nodelay(true)?;
        stream.write_all(request.as_bytes()).await?;
        let mut raw = BytesMut::new();
        let head = loop {
            ensure!(stream.read_buf(&mut raw).await? > 0, "the connection ended before an answer");
            if let Some(at) = find(&raw, b"\r\n\r\n") {
                break raw.split_to(at + 4);
            }
        };
        let ok = head.starts_with(b"HTTP/1.1 200 ");
        ensure!(ok, "{path}: {}", String::from_utf8_lossy(&head));
        let came = !raw.is_empty();
        Ok(Self { stream, raw, came, left: 0, text: BytesMut::new() })
    }

    /// Waits for more and hands over the events that it completes; false at the end.
    async fn chunk(&mut self, mut each: impl FnMut(&[u8])) -> anyhow::Result<bool> {
        // What came with the head is there already, once.
        let came = std::mem::take(&mut self.came);
        let mut going = came || self.stream.read_buf(&mut self.raw).await? > 0;
        while !self.raw.is_empty() {
            if self.left == 0 {
                let Some(end) = find(&self.raw, b"\r\n") else { break };
                let size = usize::from_str_radix(std::str::from_utf8(&self.raw[..end])?, 16)?;
                self.raw.advance(end + 2);
                going &= size > 0;
                self.left = size + 2;
            }
            let taken = self.left.min(self.raw.len());
            let data = taken.min(self.left.saturating_sub(2));
            self.text.extend_from_slice(&self.raw[..data]);
            self.raw.advance(taken);
            self.left -= taken;
        }
        while let Some(end) = find(&self.text, b"\n\n") {
            each(&self.text[..end]);
            self.text.advance(end + 2);
        }
        Ok(going)
    }
}

fn find(text: &[u8], mark: &[u8]) -> Option<usize> {
    text.windows(mark.len()).position(|window| window == mark)
}

/// Id of an event, and when its token was sent if it is one; `None` of what is no event.
fn event(text: &[u8], baton: bool) -> Option<(u64, Option<u64>)> {
    let number = |digits: &[u8]| {
        let digits = digits.iter().take_while(|digit| digit.is_ascii_digit());
        digits.fold(0, |number, digit| number * 10 + u64::from(digit - b'0'))
    };
    let id = number(text.strip_prefix(b"id: ")?);
    let mark: &[u8] = if baton { b"\"text\":\"" } else { b"\"sent\":" };
    let sent = find(text, b"event: token\n").and_then(|_| {
        let value = &text[find(text, mark)? + mark.len()..];
        Some(if baton { stamped(value) } else { number(value) })
    });
    Some((id, sent))
}

/// What subscribers saw, all together.
pub struct Seen {
    /// Tokens that came.
    pub tokens: u64,
    /// Tokens sent before this do not count for latency.
    pub from_ns: u64,
    /// From send to receipt, in nanoseconds.
    pub latency: Histogram<u64>,
    /// Entries that came out of order.
    pub disorder: u64,
    error: Option<String>,
}

impl Default for Seen {
    fn default() -> Self {
        Self { tokens: 0, from_ns: u64::MAX, latency: histogram(), disorder: 0, error: None }
    }
}

impl Seen {
    /// Notes an entry; `last` is the one before it in the same stream.
    fn note(&mut self, last: &mut u64, sequence: u64, sent: Option<u64>) {
        let now = now_ns();
        self.disorder += u64::from(sequence != *last + 1);
        *last = sequence;
        let Some(sent) = sent else { return };
        self.tokens += 1;
        if sent >= self.from_ns {
            let _ = self.latency.record(now.saturating_sub(sent));
        }
    }
}

/// Sequence of an entry, and the text of its token if it is one.
pub fn entry(message: &[u8], baton: bool) -> (u64, Option<u64>) {
    let (mut sequence, mut sent) = (0, None);
    wire::fields(message, |number, value, integer| match (number, baton) {
        (2, _) => sequence = integer,
        (3, false) => sent = Some(integer),
        (8, true) => wire::fields(value, |number, text, _| {
            if number == 1 {
                sent = Some(stamped(text));
            }
        }),
        _ => {}
    });
    (sequence, sent)
}

/// Reads a stream in the background.
pub fn read(mut receiver: Receiver, seen: Rc<RefCell<Seen>>, baton: bool) {
    tokio::task::spawn_local(async move {
        let mut last = 0;
        let ended = loop {
            let going = receiver.chunk(|message| {
                let (sequence, sent) = entry(message, baton);
                seen.borrow_mut().note(&mut last, sequence, sent);
            });
            match going.await {
                Ok(true) => {}
                ended => break ended,
            }
        };
        seen.borrow_mut().error = ended.err().map(|error| format!("{error:#}"));
    });
}

/// Reads server-sent events in the background.
pub fn read_events(mut events: Events, seen: Rc<RefCell<Seen>>, baton: bool) {
    tokio::task::spawn_local(async move {
        let mut last = 0;
        let ended = loop {
            let going = events.chunk(|text| {
                let Some((sequence, sent)) = event(text, baton) else { return };
                seen.borrow_mut().note(&mut last, sequence, sent);
            });
            match going.await {
                Ok(true) => {}
                ended => break ended,
            }
        };
        seen.borrow_mut().error = ended.err().map(|error| format!("{error:#}"));
    });
}

/// Waits until that many tokens came in all.
pub async fn wait_for(seen: &Rc<RefCell<Seen>>, tokens: u64) -> anyhow::Result<()> {
    let deadline = now_ns() + 20_000_000_000;
    while seen.borrow().tokens < tokens {
        if let Some(error) = &seen.borrow().error {
            bail!("a subscriber's stream broke: {error}");
        }
        if now_ns() > deadline {
            bail!("{} of {tokens} tokens came", seen.borrow().tokens);
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::event;

    #[test]
    fn events_tell_their_id_and_when_their_token_was_sent() {
        let ours = br#"id: 7
event: token
data: {"sequence":"7","token":{"text":"00000000000000ff"}}"#;
        assert_eq!(event(ours, true), Some((7, Some(255))));
        let bare = b"id: 9\nevent: token\ndata: {\"sequence\":9,\"sent\":1234,\"text\":\"t\"}";
        assert_eq!(event(bare, false), Some((9, Some(1234))));
        assert_eq!(event(b"id: 1\nevent: queued\ndata: {\"text\":\"x\"}", true), Some((1, None)));
        assert_eq!(event(b"retry: 2000", true), None);
    }
}
