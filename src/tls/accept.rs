//! A server's side: its certificate, which may change while it runs, the clients that it asks
//! for one, and an answer in the clear for those who do not speak TLS.
//!
//! A changed file is taken up for new connections, and open ones go on. Files that do not fit
//! together, such as a new certificate whose key is still to come, change nothing.

use std::{
    io,
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use parking_lot::RwLock;
use rustls::{RootCertStore, ServerConfig, server::WebPkiClientVerifier};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use super::{Error, Result, certificates, private_key, provider, read};
use crate::clock::Clock;

/// Files are looked at this often.
const WATCH: Duration = Duration::from_secs(2);
/// The first byte of TLS: a handshake record.
const HANDSHAKE: u8 = 0x16;
/// The beginning of HTTP/2 without TLS.
const HTTP2: &[u8] = b"PRI ";
/// What is told to those who do not speak TLS.
pub const PLAIN: &str = "this port speaks TLS: use https://";
/// A peer in the clear may go on about this much before the connection is closed on it.
const PATIENCE: u64 = 64 << 10;

/// What a server shows, and asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    /// Its certificate and those between it and a CA, leaf first.
    pub cert: PathBuf,
    /// The key of the certificate.
    pub key: PathBuf,
    /// CAs of which clients must show a certificate; none asks for none.
    pub client_ca: Option<PathBuf>,
}

/// Why a connection was not taken up.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// It left, or the network failed, before it had said anything.
    #[error("the peer left before the handshake")]
    Left,
    /// It spoke HTTP, and was told to speak TLS.
    #[error("the peer spoke HTTP without TLS")]
    Plain,
    /// The handshake failed.
    #[error("the TLS handshake failed: {0}")]
    Handshake(io::Error),
}

impl Refused {
    /// The reason in one word, for metrics.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Left => "left",
            Self::Plain => "plain_text",
            Self::Handshake(_) => "handshake",
        }
    }
}

/// Takes up connections with the certificate of the moment; clones share it.
#[derive(Clone, Debug)]
pub struct Acceptor(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    files: Files,
    /// As they were when the current ones were read.
    read_at: Vec<Stamp>,
    current: RwLock<Arc<ServerConfig>>,
}

impl Acceptor {
    /// Reads the files.
    pub fn load(files: Files) -> Result<Self> {
        let read_at = files.stamps();
        let current = RwLock::new(Arc::new(files.load()?));
        Ok(Self(Arc::new(Inner { files, read_at, current })))
    }

    /// Shakes hands. The caller bounds the time.
    pub async fn accept<I>(&self, mut io: I) -> std::result::Result<TlsStream<Replay<I>>, Refused>
    where
        I: AsyncRead + AsyncWrite + Unpin,
    {
        let mut held = [0; HTTP2.len()];
        let mut n_held = 0;
        while n_held < held.len() && held[0] != HANDSHAKE {
            match io.read(&mut held[n_held..]).await {
                Ok(0) | Err(_) if n_held == 0 => return Err(Refused::Left),
                Ok(0) | Err(_) => break,
                Ok(n) => n_held += n,
            }
        }
        if held[0] != HANDSHAKE {
            // It may be gone by now, which makes no difference.
            let _ = answer_in_the_clear(io, &held[..n_held]).await;
            return Err(Refused::Plain);
        }
        let current = self.0.current.read().clone();
        let io = Replay { held, n_held, n_read: 0, io };
        TlsAcceptor::from(current).accept(io).await.map_err(Refused::Handshake)
    }

    /// Follows the files for ever.
    pub async fn watch(self, clock: Clock) -> anyhow::Result<()> {
        let mut seen = self.0.read_at.clone();
        loop {
            clock.sleep(WATCH).await;
            let files = self.0.files.clone();
            let (stamps, files) = tokio::task::spawn_blocking(|| (files.stamps(), files)).await?;
            if stamps == seen {
                continue;
            }
            seen = stamps;
            let cert = files.cert.display().to_string();
            match tokio::task::spawn_blocking(move || files.load()).await? {
                Ok(config) => {
                    *self.0.current.write() = Arc::new(config);
                    tracing::info!(cert, "the certificate was read anew");
                }
                Err(error) => {
                    tracing::warn!(%error, "the files for TLS have changed but cannot be used; the old ones are kept");
                }
            }
        }
    }
}

/// What changes when a file does.
type Stamp = Option<(SystemTime, u64, u64)>;

impl Files {
    fn load(&self) -> Result<ServerConfig> {
        let chain = certificates(&self.cert, &read(&self.cert)?)?;
        let key = private_key(&self.key, &read(&self.key)?)?;
        let pair = |error: rustls::Error| Error::Pair {
            cert: self.cert.clone(),
            key: self.key.clone(),
            problem: match error {
                rustls::Error::InconsistentKeys(_) => {
                    "the key belongs to another certificate".into()
                }
                other => other.to_string(),
            },
        };
        let builder = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(pair)?;
        let builder = match &self.client_ca {
            None => builder.with_no_client_auth(),
            Some(path) => builder.with_client_cert_verifier(clients_of(path)?),
        };
        let mut config = builder.with_single_cert(chain, key).map_err(pair)?;
        config.alpn_protocols = vec![b"h2".into(), b"http/1.1".into()];
        Ok(config)
    }

    fn stamps(&self) -> Vec<Stamp> {
        use std::os::unix::fs::MetadataExt as _;
        let stamp = |path: &PathBuf| {
            let found = std::fs::metadata(path).ok()?;
            Some((found.modified().ok()?, found.len(), found.ino()))
        };
        [&self.cert, &self.key].into_iter().chain(&self.client_ca).map(stamp).collect()
    }
}

fn clients_of(path: &Path) -> Result<Arc<dyn rustls::server::danger::ClientCertVerifier>> {
    let unusable = |problem: String| Error::Authority { path: path.into(), problem };
    let mut roots = RootCertStore::empty();
    for cert in certificates(path, &read(path)?)? {
        roots.add(cert).map_err(|error| unusable(error.to_string()))?;
    }
    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider())
        .build()
        .map_err(|error| unusable(error.to_string()))
}

/// Says in HTTP, of the version that the peer spoke, that it should have spoken TLS.
async fn answer_in_the_clear<I>(mut io: I, heard: &[u8]) -> io::Result<()>
where
    I: AsyncRead + AsyncWrite + Unpin,
{
    let answer = if heard == HTTP2 {
        // SETTINGS, which must come first, and GOAWAY for INADEQUATE_SECURITY (0xc).
        let length = u8::try_from(8 + PLAIN.len()).unwrap_or(u8::MAX);
        let settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
        let goaway = [0, 0, length, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xc];
        [&settings[..], &goaway, PLAIN.as_bytes()].concat()
    } else {
        format!(
            "HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{PLAIN}\n",
            PLAIN.len() + 1
        )
        .into_bytes()
    };
    io.write_all(&answer).await?;
    io.shutdown().await?;
    // Closing on a peer that still speaks would take the answer from it.
    tokio::io::copy(&mut io.take(PATIENCE), &mut tokio::io::sink()).await?;
    Ok(())
}

/// A connection from which some bytes were read ahead.
#[derive(Debug)]
pub struct Replay<I> {
    held: [u8; HTTP2.len()],
    n_held: usize,
    n_read: usize,
    io: I,
}

impl<I: AsyncRead + Unpin> AsyncRead for Replay<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.n_read == self.n_held {
            return Pin::new(&mut self.io).poll_read(cx, buf);
        }
        let n = buf.remaining().min(self.n_held - self.n_read);
        buf.put_slice(&self.held[self.n_read..self.n_read + n]);
        self.n_read += n;
        Poll::Ready(Ok(()))
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Replay<I> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
