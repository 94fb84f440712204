//! Waking readers: publishing takes the whole list of those who wait, and wakes a few
//! itself; a large audience is handed to a loop of its own.

use std::{
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    task::Waker,
};

use parking_lot::Mutex;
use tokio::sync::Notify;

/// Audience up to which the publisher wakes them itself: about what handing them over
/// costs.
const FEW: usize = 8;

/// Wakes between two yields of the loop.
const CHUNK: usize = 128;

/// The readers of one log that wait; each at most once.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    /// Grows whenever everybody is woken.
    epoch: u64,
    /// Apart, since most logs have one reader and that one must cost no allocation.
    first: Option<(u64, Waker)>,
    rest: Vec<(u64, Waker)>,
}

/// Where a reader stands in [`Waiting`].
#[derive(Debug, Default)]
pub(super) struct Ticket {
    epoch: u64,
    id: u64,
}

/// Who is to be woken, once the log's lock is released.
#[derive(Debug, Default)]
#[must_use]
pub(super) struct Woken {
    first: Option<(u64, Waker)>,
    rest: Vec<(u64, Waker)>,
}

impl Waiting {
    /// Has `waker` woken by the next [`wake`](Self::wake). `id` is the reader's own.
    pub(super) fn wait(&mut self, id: u64, ticket: &mut Ticket, waker: &Waker) {
        // Epoch 0 is a ticket's before its first wait.
        if ticket.epoch == self.epoch + 1 {
            let own = self.first.iter_mut().chain(&mut self.rest).find(|entry| entry.0 == id);
            if let Some((_, held)) = own {
                held.clone_from(waker);
                return;
            }
        }
        *ticket = Ticket { epoch: self.epoch + 1, id };
        if self.first.is_none() {
            self.first = Some((id, waker.clone()));
        } else {
            self.rest.push((id, waker.clone()));
        }
    }

    /// Forgets a reader that leaves.
    pub(super) fn leave(&mut self, ticket: &Ticket) {
        if ticket.epoch != self.epoch + 1 {
            return;
        }
        if self.first.as_ref().is_some_and(|(id, _)| *id == ticket.id) {
            self.first = None;
        } else if let Some(at) = self.rest.iter().position(|(id, _)| *id == ticket.id) {
            self.rest.swap_remove(at);
        }
    }

    /// Takes everybody who waits.
    pub(super) fn wake(&mut self) -> Woken {
        if self.first.is_none() && self.rest.is_empty() {
            return Woken::default();
        }
        self.epoch += 1;
        Woken { first: self.first.take(), rest: std::mem::take(&mut self.rest) }
    }
}

impl Woken {
    /// Wakes them, a large audience by way of `fan_out`.
    pub(super) fn send(self, fan_out: &FanOut) {
        if let Some((_, waker)) = self.first {
            waker.wake();
        }
        if self.rest.len() > FEW && fan_out.running.load(Relaxed) {
            fan_out.audiences.lock().push(self.rest);
            fan_out.handed.notify_one();
        } else {
            for (_, waker) in self.rest {
                waker.wake();
            }
        }
    }
}

/// Audiences to be woken.
#[derive(Debug, Default)]
pub(super) struct FanOut {
    running: AtomicBool,
    audiences: Mutex<Vec<Vec<(u64, Waker)>>>,
    handed: Notify,
}

impl FanOut {
    /// Wakes audiences for ever.
    pub(super) async fn run(&self) {
        let _running = Running::new(self);
        loop {
            self.handed.notified().await;
            let audiences = std::mem::take(&mut *self.audiences.lock());
            for mut audience in audiences {
                while !audience.is_empty() {
                    let from = audience.len().saturating_sub(CHUNK);
                    for (_, waker) in audience.drain(from..) {
                        waker.wake();
                    }
                    if !audience.is_empty() {
                        tokio::task::yield_now().await;
                    }
                }
            }
        }
    }
}

/// Says that the loop runs; when it is dropped in the middle, what is left is woken.
struct Running<'a>(&'a FanOut);

impl<'a> Running<'a> {
    fn new(fan_out: &'a FanOut) -> Self {
        fan_out.running.store(true, Relaxed);
        Self(fan_out)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.running.store(false, Relaxed);
        for (_, waker) in std::mem::take(&mut *self.0.audiences.lock()).into_iter().flatten() {
            waker.wake();
        }
    }
}
