//! The accept loop: one port for gRPC (HTTP/2, by ALPN or prior knowledge) and HTTP/1.1.
//!
//! Every connection is under a limit from its first moment: a cap in all and per address, a
//! time to say something, pings, windows, header sizes, resets. On shutdown the listener
//! closes, connections get GOAWAY, and open streams are ended when they do not end by
//! themselves.

use std::{
    collections::HashMap,
    future::Future,
    io,
    net::{IpAddr, SocketAddr},
    pin::pin,
    sync::Arc,
    time::Duration,
};

use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::mpsc,
};
use tokio_util::sync::CancellationToken;

use super::{
    layers::Edge,
    wire::{Heard, Wire},
};
use crate::{
    faults::{self, Fault},
    telemetry::ReasonLabel,
    tls::{Acceptor, Refused},
};

/// An HTTP/2 client says this much before anything else, and HTTP/1.1 hardly less.
const PREFACE: u64 = 24;

/// A stream that does not end by itself on shutdown is ended after this time.
const STREAM_LINGER: Duration = Duration::from_millis(300);

/// Unsent bytes kept per stream: enough for a few full frames, little enough that a hundred
/// stalled readers cost megabytes.
const SEND_BUFFER: usize = 128 << 10;

/// Provoked resets that one connection may cause before it is closed (CVE-2025-8671).
const LOCAL_ERROR_RESETS: usize = 256;

/// Connections waiting for an I/O thread to take them up; it does so at once.
const HANDOVER: usize = 1_024;

/// Where connections come from: TCP, or a simulation's network.
pub trait Listener: Send + 'static {
    /// A connection that is not yet bound to a runtime.
    type Conn: Send + 'static;
    /// A connection on the runtime that serves it.
    type Io: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// Waits for a connection.
    fn accept(&mut self) -> impl Future<Output = io::Result<(Self::Conn, SocketAddr)>> + Send;

    /// Binds a connection to the current runtime.
    fn attach(conn: Self::Conn) -> io::Result<Self::Io>;
}

impl Listener for tokio::net::TcpListener {
    type Conn = std::net::TcpStream;
    type Io = tokio::net::TcpStream;

    async fn accept(&mut self) -> io::Result<(Self::Conn, SocketAddr)> {
        let (stream, peer) = tokio::net::TcpListener::accept(self).await?;
        stream.set_nodelay(true)?;
        Ok((stream.into_std()?, peer))
    }

    fn attach(conn: Self::Conn) -> io::Result<Self::Io> {
        tokio::net::TcpStream::from_std(conn)
    }
}

/// What every connection of a port shares.
#[derive(Clone)]
pub struct Port {
    /// Answers its requests.
    pub edge: Edge,
    /// Shakes hands first; none serves in the clear.
    pub tls: Option<Acceptor>,
}

/// Accepts until the supervisor's token is cancelled. With more than one I/O thread the
/// connections are dealt to threads of their own, which end when `threads_end` is cancelled.
pub async fn serve<L: Listener>(
    mut listener: L,
    port: Port,
    io_threads: usize,
    threads_end: CancellationToken,
) -> anyhow::Result<()> {
    let edge = &port.edge;
    let stop = edge.supervisor().token();
    let caps = Caps::new(edge);
    let threads = match io_threads {
        0 | 1 => Vec::new(),
        n => (0..n)
            .map(|i| start_thread::<L>(i, port.clone(), threads_end.clone()))
            .collect::<io::Result<Vec<_>>>()?,
    };
    let mut turn = 0_usize;
    loop {
        let accepted = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        let (conn, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) if is_of_one_connection(&error) => continue,
            Err(error) => {
                // Out of descriptors, most likely: the listener is sound, so wait for some.
                tracing::warn!(%error, "cannot accept connections");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Some(place) = caps.admit(peer.ip()) else { continue };
        if threads.is_empty() {
            take_up::<L>(&port, conn, peer, place);
            continue;
        }
        turn = (turn + 1) % threads.len();
        if threads[turn].try_send((conn, peer, place)).is_err() {
            caps.refused("handover");
        }
    }
    drop(listener);
    let linger = edge.clone();
    edge.supervisor().spawn("stream linger", async move {
        tokio::time::sleep(STREAM_LINGER).await;
        if !faults::planted(Fault::LeaveStreamsOpen) {
            linger.end_streams();
        }
    });
    Ok(())
}

type Accepted<C> = (C, SocketAddr, Place);

fn start_thread<L: Listener>(
    index: usize,
    port: Port,
    end: CancellationToken,
) -> io::Result<mpsc::Sender<Accepted<L::Conn>>> {
    let (sender, mut accepted) = mpsc::channel::<Accepted<L::Conn>>(HANDOVER);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::Builder::new().name(format!("baton-io-{index}")).spawn(move || {
        runtime.block_on(async move {
            while let Some((conn, peer, place)) = accepted.recv().await {
                take_up::<L>(&port, conn, peer, place);
            }
            // The connections of this thread live on its runtime until they are drained.
            end.cancelled().await;
        });
    })?;
    Ok(sender)
}

fn take_up<L: Listener>(port: &Port, conn: L::Conn, peer: SocketAddr, place: Place) {
    match L::attach(conn) {
        Ok(io) => {
            let connection = connection(io, peer, port.clone(), place);
            port.edge.supervisor().spawn_apart("connection", connection);
        }
        Err(error) => tracing::warn!(%error, "cannot take up a connection"),
    }
}

async fn connection<I>(io: I, peer: SocketAddr, port: Port, place: Place)
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let Port { edge, tls } = port;
    let limits = edge.limits();
    let stop = edge.supervisor().token();
    let mut silence = pin!(tokio::time::sleep(limits.handshake_timeout));
    let wire = match &tls {
        None => Wire::Plain(io),
        Some(acceptor) => {
            let shaken = tokio::select! {
                biased;
                shaken = acceptor.accept(io) => shaken,
                () = stop.cancelled() => return,
                () = silence.as_mut() => return place.caps.refused("handshake_timeout"),
            };
            match shaken {
                Ok(stream) => Wire::Tls(Box::new(stream)),
                Err(error) => {
                    match error {
                        Refused::Left => tracing::debug!(%peer, "{error}"),
                        Refused::Plain | Refused::Handshake(_) => tracing::info!(%peer, "{error}"),
                    }
                    return place.caps.refused(error.reason());
                }
            }
        }
    };
    let heard = Arc::<Heard>::default();
    let io = TokioIo::new(heard.clone().of(wire));
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_timeout)
        .max_headers(64)
        .max_buf_size(usize::try_from(limits.headers).unwrap_or(usize::MAX).max(8_192));
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(limits.keepalive_interval)
        .keep_alive_timeout(limits.keepalive_timeout)
        .max_concurrent_streams(limits.streams_per_connection)
        .initial_connection_window_size(u32::try_from(limits.connection_window).unwrap_or(u32::MAX))
        .initial_stream_window_size(u32::try_from(limits.stream_window).unwrap_or(u32::MAX))
        .max_header_list_size(u32::try_from(limits.headers).unwrap_or(u32::MAX))
        .max_pending_accept_reset_streams(limits.pending_resets)
        .max_local_error_reset_streams(LOCAL_ERROR_RESETS)
        .max_send_buf_size(SEND_BUFFER);
    let calls = edge.clone();
    // Boxed once here: on its way to its task hyper and tokio move it several times.
    let service = service_fn(move |request: http::Request<Incoming>| {
        Box::pin(calls.clone().call(peer, request))
    });
    let mut serving = pin!(builder.serve_connection(io, service));
    let (mut may_be_silent, mut draining) = (false, false);
    loop {
        tokio::select! {
            biased;
            ended = serving.as_mut() => {
                if let Err(error) = ended {
                    tracing::debug!(%peer, %error, "connection ended");
                }
                if tls.is_none() && heard.is_tls() {
                    tracing::info!(%peer, "the peer spoke TLS, which this port does not; it is to use http://, or the server to be given a certificate (tls.cert, tls.key)");
                    place.caps.refused("tls");
                }
                break;
            }
            () = stop.cancelled(), if !draining => {
                draining = true;
                serving.as_mut().graceful_shutdown();
            }
            () = silence.as_mut(), if !may_be_silent => {
                may_be_silent = true;
                if heard.bytes() < PREFACE {
                    place.caps.refused("silent");
                    break;
                }
            }
        }
    }
    drop(place);
}

/// Errors of a connection that was gone before it was accepted.
fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

/// Counts connections in all and per address.
#[derive(Clone)]
struct Caps(Arc<CapsInner>);

struct CapsInner {
    edge: Edge,
    open: Mutex<HashMap<IpAddr, usize>>,
}

impl Caps {
    fn new(edge: &Edge) -> Self {
        Self(Arc::new(CapsInner { edge: edge.clone(), open: Mutex::default() }))
    }

    fn admit(&self, ip: IpAddr) -> Option<Place> {
        let (metrics, limits) = (self.0.edge.metrics(), self.0.edge.limits());
        if usize::try_from(metrics.connections.get()).unwrap_or(0) >= limits.connections {
            self.refused("connections");
            return None;
        }
        {
            let mut open = self.0.open.lock();
            let from_ip = open.entry(ip).or_default();
            if *from_ip >= limits.connections_per_ip {
                drop(open);
                self.refused("connections_per_ip");
                return None;
            }
            *from_ip += 1;
        }
        metrics.connections.inc();
        Some(Place { caps: self.clone(), ip })
    }

    fn refused(&self, reason: &'static str) {
        let refused = &self.0.edge.metrics().connections_refused;
        refused.get_or_create(&ReasonLabel { reason }).inc();
    }
}

/// The place of one open connection.
struct Place {
    caps: Caps,
    ip: IpAddr,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.caps.0.edge.metrics().connections.dec();
        let mut open = self.caps.0.open.lock();
        if let Some(from_ip) = open.get_mut(&self.ip) {
            *from_ip -= 1;
            if *from_ip == 0 {
                open.remove(&self.ip);
            }
        }
    }
}
