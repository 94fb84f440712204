//! The bytes of one connection, in the clear or inside TLS, and how many the peer sent.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_rustls::server::TlsStream;

use crate::tls::Replay;

/// The first two bytes of TLS: a handshake record of some version 3.
const TLS: [u8; 2] = [0x16, 3];

/// A connection: the same code serves both kinds.
pub(super) enum Wire<I> {
    Plain(I),
    Tls(Box<TlsStream<Replay<I>>>),
}

/// What was heard from a peer.
#[derive(Default)]
pub(super) struct Heard {
    bytes: AtomicU64,
    tls: AtomicBool,
}

impl Heard {
    /// Bytes so far, without what TLS adds.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Whether it began to speak TLS where it should not have.
    pub(super) fn is_tls(&self) -> bool {
        self.tls.load(Ordering::Relaxed)
    }

    /// Listens to a connection.
    pub(super) fn of<I>(self: Arc<Self>, wire: Wire<I>) -> Overheard<I> {
        Overheard { wire, heard: self }
    }
}

/// A connection that is listened to.
pub(super) struct Overheard<I> {
    wire: Wire<I>,
    heard: Arc<Heard>,
}

/// The same on either kind of connection.
macro_rules! on_either {
    ($self:ident, $io:ident => $call:expr) => {
        match &mut $self.wire {
            Wire::Plain(io) => {
                let $io = Pin::new(io);
                $call
            }
            Wire::Tls(io) => {
                let $io = Pin::new(io.as_mut());
                $call
            }
        }
    };
}

impl<I: AsyncRead + AsyncWrite + Unpin> AsyncRead for Overheard<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = on_either!(self, io => io.poll_read(cx, buf));
        let read = &buf.filled()[before..];
        if !read.is_empty() {
            let earlier = self.heard.bytes.fetch_add(read.len() as u64, Ordering::Relaxed);
            if earlier == 0 && read.starts_with(&TLS) {
                self.heard.tls.store(true, Ordering::Relaxed);
            }
        }
        polled
    }
}

impl<I: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Overheard<I> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        on_either!(self, io => io.poll_write(cx, buf))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        on_either!(self, io => io.poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        match &self.wire {
            Wire::Plain(io) => io.is_write_vectored(),
            Wire::Tls(io) => io.is_write_vectored(),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        on_either!(self, io => io.poll_flush(cx))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        on_either!(self, io => io.poll_shutdown(cx))
    }
}
