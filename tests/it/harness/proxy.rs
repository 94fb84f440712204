//! A TCP link between two parties that a test cuts, half-opens, slows and delays.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
    task::JoinHandle,
};

/// What the link does with bytes, per direction.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Way {
    /// Nothing passes and nobody is told: a pulled cable, or one half of it.
    pub blocked: bool,
    /// Each piece waits this long.
    pub delay: Duration,
    /// At most this many bytes a second; 0 for no limit.
    pub bytes_per_second: u64,
}

/// State of the link.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Link {
    /// From the dialling party to the server.
    pub up: Way,
    /// From the server to the dialling party.
    pub down: Way,
    /// New connections are refused.
    pub refusing: bool,
    /// Grows with every cut; connections of an earlier generation are closed.
    cuts: u64,
}

/// The link. Dropping it closes everything.
pub struct Proxy {
    pub addr: SocketAddr,
    link: watch::Sender<Link>,
    bytes_down: Arc<AtomicU64>,
    refused: Arc<AtomicU64>,
    accept: JoinHandle<()>,
}

impl Proxy {
    /// A link to `target`.
    pub async fn to(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let addr = listener.local_addr().expect("the port's address");
        let link = watch::Sender::new(Link::default());
        let bytes_down = Arc::new(AtomicU64::new(0));
        let refused = Arc::new(AtomicU64::new(0));
        let (state, counted, n_refused) = (link.clone(), bytes_down.clone(), refused.clone());
        let accept = tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                if state.borrow().refusing {
                    n_refused.fetch_add(1, Ordering::Relaxed);
                    continue;
                }
                tokio::spawn(carry(near, target, state.subscribe(), counted.clone()));
            }
        });
        Self { addr, link, bytes_down, refused, accept }
    }

    /// Changes the link.
    pub fn set(&self, change: impl FnOnce(&mut Link)) {
        self.link.send_modify(change);
    }

    /// Closes every connection; new ones are taken.
    pub fn cut(&self) {
        self.set(|link| link.cuts += 1);
    }

    /// Lets nothing pass in either direction, without telling anyone.
    pub fn block(&self) {
        self.set(|link| (link.up.blocked, link.down.blocked) = (true, true));
    }

    /// Back to a sound link.
    pub fn heal(&self) {
        self.set(|link| {
            let cuts = link.cuts;
            *link = Link { cuts, ..Link::default() };
        });
    }

    /// Connections that were refused so far.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// Bytes that went to the dialling parties so far.
    pub fn bytes_down(&self) -> u64 {
        self.bytes_down.load(Ordering::Relaxed)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accept.abort();
        self.cut();
    }
}

async fn carry(
    near: TcpStream,
    target: SocketAddr,
    mut link: watch::Receiver<Link>,
    bytes_down: Arc<AtomicU64>,
) {
    let Ok(far) = TcpStream::connect(target).await else { return };
    let _ = (near.set_nodelay(true), far.set_nodelay(true));
    let (near_read, near_write) = near.into_split();
    let (far_read, far_write) = far.into_split();
    let born = link.borrow_and_update().cuts;
    let ignored = Arc::new(AtomicU64::new(0));
    tokio::select! {
        () = pump(near_read, far_write, link.clone(), |link| link.up, ignored) => {}
        () = pump(far_read, near_write, link.clone(), |link| link.down, bytes_down) => {}
        _ = link.wait_for(|link| link.cuts != born) => {}
    }
}

/// Moves bytes one way until either end closes.
async fn pump(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut link: watch::Receiver<Link>,
    way: fn(&Link) -> Way,
    count: Arc<AtomicU64>,
) {
    let mut piece = vec![0; 16 * 1024];
    loop {
        let now = way(&link.borrow());
        // A slow link takes small pieces, so that its rate is even.
        let most = match now.bytes_per_second {
            0 => piece.len(),
            rate => (rate / 20).clamp(1, piece.len() as u64) as usize,
        };
        if link.wait_for(|link| !way(link).blocked).await.is_err() {
            return;
        }
        let Ok(read @ 1..) = from.read(&mut piece[..most]).await else { return };
        let mut wait = now.delay;
        if let Some(millis) = (read as u64 * 1000).checked_div(now.bytes_per_second) {
            wait += Duration::from_millis(millis);
        }
        if !wait.is_zero() {
            super::pass(wait).await;
        }
        if link.wait_for(|link| !way(link).blocked).await.is_err() {
            return;
        }
        if to.write_all(&piece[..read]).await.is_err() {
            return;
        }
        count.fetch_add(read as u64, Ordering::Relaxed);
    }
}

#[tokio::test]
async fn a_blocked_link_passes_nothing_and_a_healed_one_passes_what_waited() {
    let (proxy, mut near, mut far) = pair().await;
    proxy.block();
    near.write_all(b"held").await.unwrap();
    let mut got = [0; 4];
    let early = tokio::time::timeout(Duration::from_millis(100), far.read_exact(&mut got)).await;
    assert!(early.is_err(), "a blocked link let {got:?} through");
    proxy.heal();
    let what = "bytes after the heal";
    let read = super::within(what, super::SOON, far.read_exact(&mut got)).await;
    read.unwrap();
    assert_eq!(&got, b"held");
}

#[tokio::test]
async fn a_cut_link_closes_both_ends() {
    let (proxy, mut near, mut far) = pair().await;
    proxy.cut();
    let mut byte = [0; 1];
    let closed = async { matches!(near.read(&mut byte).await, Ok(0) | Err(_)) };
    assert!(super::within("the near end", super::SOON, closed).await);
    let closed = async { matches!(far.read(&mut byte).await, Ok(0) | Err(_)) };
    assert!(super::within("the far end", super::SOON, closed).await);
}

/// Two ends of a new link that has carried a byte.
#[cfg(test)]
async fn pair() -> (Proxy, TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let proxy = Proxy::to(listener.local_addr().expect("an address")).await;
    let mut near = TcpStream::connect(proxy.addr).await.expect("the proxy");
    let (mut far, _) = listener.accept().await.expect("the proxy's connection");
    near.write_all(b"x").await.expect("a byte");
    far.read_exact(&mut [0; 1]).await.expect("the byte");
    (proxy, near, far)
}
