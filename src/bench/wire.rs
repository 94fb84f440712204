//! The cheapest gRPC client that tells the truth: `h2` with frames cut by hand, so that a load
//! generator leaves the processors to what it measures.
//!
//! Runs inside a `LocalSet` on a current-thread runtime.

use std::net::SocketAddr;

use anyhow::{Context as _, anyhow, bail};
use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use h2::{RecvStream, SendStream, client};
use http::{HeaderValue, Method, Request, Version, header};
use prost::Message;
use tokio::net::TcpStream;

/// Receive windows of a connection, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Windows {
    /// Of each stream.
    pub stream: u32,
    /// Of the connection.
    pub connection: u32,
}

impl Default for Windows {
    /// Wide enough that flow control never decides a measurement.
    fn default() -> Self {
        Self { stream: 4 << 20, connection: 64 << 20 }
    }
}

/// One connection; clones share it.
#[derive(Clone)]
pub struct Connection {
    requests: client::SendRequest<Bytes>,
    authority: String,
    credential: Option<HeaderValue>,
    driver: std::rc::Rc<Driver>,
}

struct Driver(tokio::task::AbortHandle);

impl Drop for Driver {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Connection {
    /// Opens a connection that presents `token` in each call.
    pub async fn open(
        addr: SocketAddr,
        token: Option<&str>,
        windows: Windows,
    ) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(addr).await.context("could not connect")?;
        stream.set_nodelay(true)?;
        let (requests, connection) = client::Builder::new()
            .initial_window_size(windows.stream)
            .initial_connection_window_size(windows.connection)
            .max_send_buffer_size(4 << 20)
            .handshake(stream)
            .await?;
        let driver = tokio::task::spawn_local(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "connection ended");
            }
        });
        let credential = token
            .map(|token| HeaderValue::try_from(format!("Bearer {token}")))
            .transpose()
            .context("the token is not a header value")?;
        let driver = std::rc::Rc::new(Driver(driver.abort_handle()));
        Ok(Self { requests, authority: addr.to_string(), credential, driver })
    }

    /// Drops the socket at once, as a broken link does.
    pub fn cut(&self) {
        self.driver.0.abort();
    }

    /// Starts a call.
    pub async fn call(&self, path: &str) -> anyhow::Result<(Sender, Receiver)> {
        let mut request = Request::builder()
            .method(Method::POST)
            .version(Version::HTTP_2)
            .uri(format!("http://{}{path}", self.authority))
            .header(header::TE, "trailers")
            .header(header::CONTENT_TYPE, "application/grpc");
        if let Some(credential) = &self.credential {
            request = request.header(header::AUTHORIZATION, credential);
        }
        let mut requests = self.requests.clone().ready().await?;
        let (response, body) = requests.send_request(request.body(())?, false)?;
        Ok((Sender(body), Receiver { response: Some(response), body: None, rest: BytesMut::new() }))
    }

    /// Makes a unary call with a message that is framed already.
    pub async fn unary_framed(&self, path: &str, framed: Bytes) -> anyhow::Result<Bytes> {
        let (mut sender, mut receiver) = self.call(path).await?;
        sender.0.send_data(framed, true)?;
        let mut answer = None;
        while receiver.chunk(|message| answer = Some(Bytes::copy_from_slice(message))).await? {}
        answer.ok_or_else(|| anyhow!("{path}: no answer"))
    }

    /// Makes a request with JSON and returns the body of the answer; any status but that of a
    /// success is an error.
    pub async fn json(&self, method: Method, path: &str, body: Bytes) -> anyhow::Result<Bytes> {
        let mut request = Request::builder()
            .method(method)
            .version(Version::HTTP_2)
            .uri(format!("http://{}{path}", self.authority))
            .header(header::CONTENT_TYPE, "application/json");
        if let Some(credential) = &self.credential {
            request = request.header(header::AUTHORIZATION, credential);
        }
        let mut requests = self.requests.clone().ready().await?;
        let (response, mut sender) = requests.send_request(request.body(())?, body.is_empty())?;
        if !body.is_empty() {
            sender.send_data(body, true)?;
        }
        let (head, mut body) = response.await?.into_parts();
        let mut answer = BytesMut::new();
        while let Some(data) = body.data().await {
            let data = data?;
            body.flow_control().release_capacity(data.len())?;
            answer.extend_from_slice(&data);
        }
        if !head.status.is_success() {
            bail!("{path}: {}: {}", head.status, String::from_utf8_lossy(&answer));
        }
        Ok(answer.freeze())
    }

    /// Makes a unary call.
    pub async fn unary<T: Message + Default>(
        &self,
        path: &str,
        message: &impl Message,
    ) -> anyhow::Result<T> {
        let answer = self.unary_framed(path, framed(message)).await?;
        Ok(T::decode(answer)?)
    }
}

/// The sending half of a call.
pub struct Sender(SendStream<Bytes>);

impl Sender {
    /// Queues frames, however many are waiting.
    pub fn send(&mut self, frames: Bytes) -> anyhow::Result<()> {
        Ok(self.0.send_data(frames, false)?)
    }

    /// Waits for flow control to take `frames`, then queues them.
    pub async fn send_all(&mut self, mut frames: Bytes) -> anyhow::Result<()> {
        while frames.has_remaining() {
            self.0.reserve_capacity(frames.len());
            let granted = match std::future::poll_fn(|cx| self.0.poll_capacity(cx)).await {
                Some(granted) => granted?,
                None => bail!("the stream ended"),
            };
            let now = frames.split_to(granted.min(frames.len()));
            self.0.send_data(now, false)?;
        }
        Ok(())
    }

    /// Says that nothing more is sent.
    pub fn finish(&mut self) -> anyhow::Result<()> {
        Ok(self.0.send_data(Bytes::new(), true)?)
    }
}

/// The receiving half of a call.
pub struct Receiver {
    response: Option<client::ResponseFuture>,
    body: Option<RecvStream>,
    rest: BytesMut,
}

impl Receiver {
    /// Waits for the headers; a call that a server accepted has them.
    pub async fn accepted(&mut self) -> anyhow::Result<()> {
        if let Some(response) = self.response.take() {
            let response = response.await?;
            check(response.headers())?;
            self.body = Some(response.into_body());
        }
        Ok(())
    }

    /// Waits for one DATA frame and hands over the messages that it completes; false at the end
    /// of a call that went well.
    pub async fn chunk(&mut self, mut each: impl FnMut(&[u8])) -> anyhow::Result<bool> {
        self.accepted().await?;
        let body = self.body.as_mut().context("no body")?;
        let Some(data) = body.data().await else {
            if let Some(trailers) = body.trailers().await? {
                check(&trailers)?;
            }
            return Ok(false);
        };
        let data = data?;
        body.flow_control().release_capacity(data.len())?;
        if self.rest.is_empty() {
            let used = cut(&data, &mut each);
            self.rest.extend_from_slice(&data[used..]);
        } else {
            self.rest.extend_from_slice(&data);
            let used = cut(&self.rest, &mut each);
            self.rest.advance(used);
        }
        Ok(true)
    }
}

/// Fails when headers or trailers carry a status other than OK.
fn check(headers: &http::HeaderMap) -> anyhow::Result<()> {
    let text = |name| headers.get(name).and_then(|v: &HeaderValue| v.to_str().ok());
    match text("grpc-status") {
        None | Some("0") => Ok(()),
        Some(code) => bail!("status {code}: {}", text("grpc-message").unwrap_or_default()),
    }
}

/// Hands over each complete message and returns how many bytes they took.
fn cut(data: &[u8], each: &mut impl FnMut(&[u8])) -> usize {
    let mut at = 0;
    while let Some(head) = data.get(at..at + 5) {
        let len = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
        let Some(message) = data.get(at + 5..at + 5 + len) else { break };
        each(message);
        at += 5 + len;
    }
    at
}

/// Puts the head of a gRPC frame.
pub fn put_frame_head(buf: &mut BytesMut, len: usize) {
    buf.put_u8(0);
    buf.put_u32(len as u32);
}

/// A message with its frame head.
pub fn framed(message: &impl Message) -> Bytes {
    let len = message.encoded_len();
    let mut buf = BytesMut::with_capacity(len + 5);
    put_frame_head(&mut buf, len);
    message.encode_raw(&mut buf);
    buf.freeze()
}

/// Reads the fields of an encoded message without copying: `(number, value)`, where the value is
/// the content of a length-delimited field, or empty with the number given for others.
pub fn fields(mut data: &[u8], mut each: impl FnMut(u32, &[u8], u64)) {
    while let Ok(key) = prost::encoding::decode_varint(&mut data) {
        let number = (key >> 3) as u32;
        match key & 7 {
            0 => match prost::encoding::decode_varint(&mut data) {
                Ok(value) => each(number, &[], value),
                Err(_) => return,
            },
            1 if data.len() >= 8 => each(number, &[], data.get_u64_le()),
            5 if data.len() >= 4 => each(number, &[], u64::from(data.get_u32_le())),
            2 => {
                let Ok(len) = prost::encoding::decode_varint(&mut data) else { return };
                let Some((value, rest)) = data.split_at_checked(len as usize) else { return };
                each(number, value, 0);
                data = rest;
            }
            _ => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_cut_at_their_lengths() {
        let mut data = framed(&prost_types::Timestamp { seconds: 7, nanos: 0 }).to_vec();
        data.extend_from_slice(&framed(&prost_types::Timestamp { seconds: 9, nanos: 1 }));
        let whole = data.len();
        data.extend_from_slice(&[0, 0, 0]);
        let mut seen = Vec::new();
        let used = cut(&data, &mut |m: &[u8]| {
            fields(m, |number, _, value| seen.push((number, value)));
        });
        assert_eq!(used, whole);
        assert_eq!(seen, [(1, 7), (1, 9), (2, 1)]);
    }
}
