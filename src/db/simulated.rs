//! A database of a simulation: a file whose statements take no simulated time. Servers that share
//! one reach it over a [`Way`], which takes some, and loses what goes over it. A transaction is
//! where time stands still: others write before and after it, and while what it is decided from
//! was read and it has not begun.

use std::{
    cell::Cell,
    future::{Future, poll_fn},
    path::PathBuf,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Poll, Wake, Waker},
    thread::{self, Thread},
};

use futures_util::future::BoxFuture;

use crate::{clock::Micros, error::Result};

/// A database of a simulation.
#[derive(Clone)]
pub struct Simulated {
    /// Where its file is.
    pub path: PathBuf,
    /// How this server reaches it, where others do as well.
    pub way: Option<Arc<dyn Way>>,
}

/// The way from a server to a database.
pub trait Way: Send + Sync {
    /// Goes there, or back. It is an error of storage when what was on its way is lost.
    fn go(&self) -> BoxFuture<'_, Result<()>>;

    /// The time by the database's clock.
    fn now(&self) -> Micros;
}

thread_local! {
    /// Whether what is pending waits for something of the simulation, and not for the file.
    static WAITS: Cell<bool> = const { Cell::new(false) };
}

/// Awaits something for which simulated time may pass.
pub async fn in_time<T>(work: impl Future<Output = T>) -> T {
    let mut work = pin!(work);
    poll_fn(|cx| {
        let polled = work.as_mut().poll(cx);
        if polled.is_pending() {
            WAITS.set(true);
        }
        polled
    })
    .await
}

/// Drives work on the file to its end: the thread waits for what is not [`in_time`].
pub(super) async fn at_once<T>(work: impl Future<Output = T>) -> T {
    let mut work = pin!(work);
    poll_fn(|cx| {
        loop {
            let wakers = Arc::new(Wakers {
                thread: thread::current(),
                outer: cx.waker().clone(),
                waits: AtomicBool::new(false),
                woken: AtomicBool::new(false),
            });
            WAITS.set(false);
            let waker = Waker::from(wakers.clone());
            if let Poll::Ready(done) =
                work.as_mut().poll(&mut std::task::Context::from_waker(&waker))
            {
                return Poll::Ready(done);
            }
            if WAITS.replace(false) {
                wakers.waits.store(true, Ordering::Release);
                // What it waits for may have asked to be looked at again at once.
                if wakers.woken.load(Ordering::Acquire) {
                    cx.waker().wake_by_ref();
                }
                return Poll::Pending;
            }
            // A wake that came already, or another's, makes it look again.
            thread::park();
        }
    })
    .await
}

/// Wakes the thread that waits for the file, or whoever waits for the simulation.
struct Wakers {
    thread: Thread,
    outer: Waker,
    waits: AtomicBool,
    /// Woken by its own thread before it was known what it waits for.
    woken: AtomicBool,
}

impl Wake for Wakers {
    fn wake(self: Arc<Self>) {
        // The file's thread may be late with a wake for what has come; it must not wake the simulation.
        let is_here = thread::current().id() == self.thread.id();
        if is_here && self.waits.load(Ordering::Acquire) {
            self.outer.wake_by_ref();
        } else {
            if is_here {
                self.woken.store(true, Ordering::Release);
            }
            self.thread.unpark();
        }
    }
}
