//! What the same work costs without Baton: a bare tonic relay (typed, with bodies written by hand,
//! or to server-sent events over HTTP/1.1) and a unary echo. No credentials, no storage, no numbering, no metrics.
//!
//! The services are written by hand, as generated code would be, so that no proto is needed.

use std::{
    collections::HashMap,
    convert::Infallible,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use futures_util::future::BoxFuture;
use http_body::Frame;
use http_body_util::BodyExt as _;
use parking_lot::RwLock;
use prost::Message;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio_stream::{Stream, StreamExt as _, wrappers::ReceiverStream, wrappers::TcpListenerStream};
use tonic::{
    Request, Response, Status, Streaming,
    body::Body,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    server::{Grpc, NamedService, ServerStreamingService, StreamingService, UnaryService},
};
use tonic_prost::ProstCodec;

use super::{process, wire};

/// Paths of the calls.
pub mod path {
    /// Runner to relay.
    pub const PUSH: &str = "/bench.Relay/Push";
    /// Relay to subscriber.
    pub const SUBSCRIBE: &str = "/bench.Relay/Subscribe";
    /// Relay to a subscriber of server-sent events; the task follows.
    pub const EVENTS: &str = "/bench.Relay/Events/";
    /// Unary echo.
    pub const ECHO: &str = "/bench.Relay/Echo";
}

/// One token on its way.
#[derive(Clone, PartialEq, Message, Serialize)]
pub struct Token {
    /// The task.
    #[prost(string, tag = "1")]
    pub task: String,
    /// Its number in the task, from 1.
    #[prost(uint64, tag = "2")]
    pub sequence: u64,
    /// When it was sent, in nanoseconds of the monotonic clock.
    #[prost(fixed64, tag = "3")]
    pub sent: u64,
    /// Text.
    #[prost(string, tag = "4")]
    pub text: String,
}

/// Tokens of one message.
#[derive(Clone, PartialEq, Message)]
pub struct Tokens {
    /// In order.
    #[prost(message, repeated, tag = "1")]
    pub tokens: Vec<Token>,
}

/// Asks for the tokens of a task.
#[derive(Clone, PartialEq, Message)]
pub struct Subscription {
    /// The task.
    #[prost(string, tag = "1")]
    pub task: String,
}

/// Any bytes.
#[derive(Clone, PartialEq, Message)]
pub struct Payload {
    /// The bytes.
    #[prost(bytes = "bytes", tag = "1")]
    pub data: Bytes,
}

/// How a yardstick is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Relay {
    /// prost messages in and out.
    Typed,
    /// Tokens are passed through as bytes; everything ready leaves in one DATA frame.
    Body,
    /// prost messages in, JSON out: an event a token, encoded for each subscriber.
    Events,
}

/// A yardstick's role.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// How tokens travel.
    pub relay: Relay,
    /// 1 is a current-thread runtime, more are workers of a multi-thread one.
    pub threads: usize,
}

/// What a server prints once it listens.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Listening {
    /// On loopback.
    pub port: u16,
}

/// Serves until the parent is gone.
pub fn serve(spec: Spec) -> anyhow::Result<()> {
    let runtime = if spec.threads == 1 {
        tokio::runtime::Builder::new_current_thread().enable_all().build()?
    } else {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(spec.threads)
            .enable_all()
            .build()?
    };
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await?;
        process::print_answer(&Listening { port: listener.local_addr()?.port() })?;
        let service = Service { relay: spec.relay, subscribers: Arc::default() };
        let connections = TcpListenerStream::new(listener).map(|stream| {
            stream.inspect(|stream| {
                let _ = stream.set_nodelay(true);
            })
        });
        tonic::transport::Server::builder()
            .accept_http1(spec.relay == Relay::Events)
            .initial_connection_window_size(16 << 20)
            .initial_stream_window_size(1 << 20)
            .add_service(service)
            .serve_with_incoming(connections)
            .await?;
        anyhow::Ok(())
    })
}

/// Tokens that a subscriber may lag behind before the relay waits for it.
const LAG: usize = 1024;

enum Outlet {
    Typed(mpsc::Sender<Result<Token, Status>>),
    Body(mpsc::Sender<Bytes>),
}

type Subscribers = Arc<RwLock<HashMap<String, Arc<Outlet>>>>;

#[derive(Clone)]
struct Service {
    relay: Relay,
    subscribers: Subscribers,
}

impl NamedService for Service {
    const NAME: &'static str = "bench.Relay";
}

impl tower::Service<http::Request<Body>> for Service {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let (relay, subscribers) = (self.relay, Arc::clone(&self.subscribers));
        Box::pin(async move {
            let answer = match (request.uri().path(), relay) {
                (path::PUSH, Relay::Typed | Relay::Events) => {
                    let mut grpc = Grpc::new(ProstCodec::<Payload, Tokens>::new());
                    grpc.streaming(TypedPush(subscribers), request).await
                }
                (path::PUSH, Relay::Body) => {
                    Grpc::new(RawCodec).streaming(RawPush(subscribers), request).await
                }
                (path::SUBSCRIBE, Relay::Typed) => {
                    let mut grpc = Grpc::new(ProstCodec::<Token, Subscription>::new());
                    grpc.server_streaming(TypedSubscribe(subscribers), request).await
                }
                (path::SUBSCRIBE, Relay::Body) => body_subscribe(&subscribers, request).await,
                (path, Relay::Events) => events_subscribe(&subscribers, path),
                _ => Grpc::new(ProstCodec::<Payload, Payload>::new()).unary(Echo, request).await,
            };
            Ok(answer)
        })
    }
}

struct Echo;

impl UnaryService<Payload> for Echo {
    type Response = Payload;
    type Future = std::future::Ready<Result<Response<Payload>, Status>>;

    fn call(&mut self, request: Request<Payload>) -> Self::Future {
        std::future::ready(Ok(Response::new(request.into_inner())))
    }
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;
type Answered<T> = BoxFuture<'static, Result<Response<Answers<T>>, Status>>;

struct TypedPush(Subscribers);

impl StreamingService<Tokens> for TypedPush {
    type Response = Payload;
    type ResponseStream = Answers<Payload>;
    type Future = Answered<Payload>;

    fn call(&mut self, request: Request<Streaming<Tokens>>) -> Self::Future {
        let subscribers = Arc::clone(&self.0);
        let mut tokens = request.into_inner();
        let relay = async move {
            while let Some(message) = tokens.message().await? {
                for token in message.tokens {
                    let outlet = subscribers.read().get(&token.task).cloned();
                    if let Some(Outlet::Typed(outlet)) = outlet.as_deref() {
                        let _ = outlet.send(Ok(token)).await;
                    }
                }
            }
            Ok(Payload::default())
        };
        answer_at_the_end(relay)
    }
}

fn answer_at_the_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, Status>> + Send + 'static,
) -> Answered<T> {
    let answers: Answers<T> = Box::pin(tokio_stream::once(()).then(once_of(work)));
    Box::pin(std::future::ready(Ok(Response::new(answers))))
}

/// A closure for `then` that hands out one future.
fn once_of<T: Send + 'static>(
    work: impl Future<Output = Result<T, Status>> + Send + 'static,
) -> impl FnMut(()) -> BoxFuture<'static, Result<T, Status>> {
    let mut work: Option<BoxFuture<'static, Result<T, Status>>> = Some(Box::pin(work));
    move |()| work.take().unwrap_or_else(|| Box::pin(std::future::pending()))
}

struct TypedSubscribe(Subscribers);

impl ServerStreamingService<Subscription> for TypedSubscribe {
    type Response = Token;
    type ResponseStream = ReceiverStream<Result<Token, Status>>;
    type Future = std::future::Ready<Result<Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: Request<Subscription>) -> Self::Future {
        let (sender, receiver) = mpsc::channel(LAG);
        let task = request.into_inner().task;
        self.0.write().insert(task, Arc::new(Outlet::Typed(sender)));
        std::future::ready(Ok(Response::new(ReceiverStream::new(receiver))))
    }
}

struct RawPush(Subscribers);

impl StreamingService<Bytes> for RawPush {
    type Response = Bytes;
    type ResponseStream = Answers<Bytes>;
    type Future = Answered<Bytes>;

    fn call(&mut self, request: Request<Streaming<Bytes>>) -> Self::Future {
        let subscribers = Arc::clone(&self.0);
        let mut messages = request.into_inner();
        let relay = async move {
            let mut found = Vec::new();
            while let Some(message) = messages.message().await? {
                {
                    let subscribers = subscribers.read();
                    wire::fields(&message, |_, token, _| {
                        // The task is the first field: one byte of key, one of length.
                        let len = usize::from(token.get(1).copied().unwrap_or(0));
                        let task = token.get(2..2 + len).and_then(|t| str::from_utf8(t).ok());
                        if let Some(outlet) = task.and_then(|task| subscribers.get(task)) {
                            found.push((Arc::clone(outlet), message.slice_ref(token)));
                        }
                    });
                }
                for (outlet, token) in found.drain(..) {
                    if let Outlet::Body(outlet) = &*outlet {
                        let _ = outlet.send(token).await;
                    }
                }
            }
            Ok(Bytes::new())
        };
        answer_at_the_end(relay)
    }
}

async fn body_subscribe(
    subscribers: &Subscribers,
    request: http::Request<Body>,
) -> http::Response<Body> {
    let request = request.into_body().collect().await.map(http_body_util::Collected::to_bytes);
    let task = request.ok().and_then(|bytes| Subscription::decode(bytes.get(5..)?).ok());
    let (sender, receiver) = mpsc::channel(LAG);
    let task = task.unwrap_or_default().task;
    subscribers.write().insert(task, Arc::new(Outlet::Body(sender)));
    let body = Body::new(ReadyBody { receiver, ready: Vec::with_capacity(64) });
    let mut response = http::Response::new(body);
    response
        .headers_mut()
        .insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static("application/grpc"));
    response
}

fn events_subscribe(subscribers: &Subscribers, path: &str) -> http::Response<Body> {
    let (sender, receiver) = mpsc::channel(LAG);
    let task = path.strip_prefix(path::EVENTS).unwrap_or_default().to_owned();
    subscribers.write().insert(task, Arc::new(Outlet::Typed(sender)));
    let body = EventsBody { receiver, ready: Vec::with_capacity(64) };
    let mut response = http::Response::new(Body::new(body));
    response
        .headers_mut()
        .insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static("text/event-stream"));
    response
}

/// A response body that writes everything ready as events in one chunk.
struct EventsBody {
    receiver: mpsc::Receiver<Result<Token, Status>>,
    ready: Vec<Result<Token, Status>>,
}

impl http_body::Body for EventsBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        match this.receiver.poll_recv_many(cx, &mut this.ready, 64) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(0) => Poll::Ready(None),
            Poll::Ready(n) => {
                let mut data = Vec::with_capacity(n * 160);
                for token in this.ready.drain(..) {
                    let token = token?;
                    data.extend_from_slice(b"id: ");
                    data.extend_from_slice(itoa::Buffer::new().format(token.sequence).as_bytes());
                    data.extend_from_slice(b"\nevent: token\ndata: ");
                    serde_json::to_writer(&mut data, &token)
                        .map_err(|error| Status::internal(error.to_string()))?;
                    data.extend_from_slice(b"\n\n");
                }
                Poll::Ready(Some(Ok(Frame::data(data.into()))))
            }
        }
    }
}

/// A response body that writes everything ready into one DATA frame.
struct ReadyBody {
    receiver: mpsc::Receiver<Bytes>,
    ready: Vec<Bytes>,
}

impl http_body::Body for ReadyBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        match this.receiver.poll_recv_many(cx, &mut this.ready, 64) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(0) => Poll::Ready(None),
            Poll::Ready(_) => {
                let len: usize = this.ready.iter().map(|token| token.len() + 5).sum();
                let mut data = BytesMut::with_capacity(len);
                for token in this.ready.drain(..) {
                    wire::put_frame_head(&mut data, token.len());
                    data.put_slice(&token);
                }
                Poll::Ready(Some(Ok(Frame::data(data.freeze()))))
            }
        }
    }
}

/// Messages as the bytes they are.
#[derive(Clone, Copy, Default)]
struct RawCodec;

impl Codec for RawCodec {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for RawCodec {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, buf: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buf.put_slice(&item);
        Ok(())
    }
}

impl Decoder for RawCodec {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, buf: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(buf.copy_to_bytes(buf.remaining())))
    }
}
