//! A reader of a log: a cursor that waits for what comes after it.

use std::{
    collections::VecDeque,
    future::poll_fn,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll},
};

use bytes::Bytes;

use super::{Log, log::Entry, wake::Ticket};

/// What follows a subscriber's cursor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// All frames that are ready, up to a bound, with their sequences.
    Frames(Vec<(u64, Bytes)>),
    /// What follows is no longer in memory; storage has it. Read on from there and
    /// tell the subscriber with [`Subscriber::seek`].
    Behind,
    /// Storage may have something new, which did not come by this log.
    Stirred,
    /// Nothing follows any more.
    End,
}

/// What [`Subscriber::poll_fill`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ready {
    /// At least one frame was added.
    Frames,
    /// As [`Next::Behind`].
    Behind,
    /// As [`Next::Stirred`].
    Stirred,
    /// As [`Next::End`].
    End,
}

/// A cursor over a log. It holds no frames.
#[derive(Debug)]
pub struct Subscriber {
    log: Arc<Log>,
    id: u64,
    cursor: u64,
    /// Of the log's stirs.
    seen: u64,
    ticket: Ticket,
}

impl Subscriber {
    pub(super) fn new(log: Arc<Log>, after: u64) -> Self {
        static IDS: AtomicU64 = AtomicU64::new(1);
        log.books().subscribers.fetch_add(1, Relaxed);
        log.readers.fetch_add(1, Relaxed);
        let (id, seen) = (IDS.fetch_add(1, Relaxed), log.stirs());
        Self { log, id, cursor: after, seen, ticket: Ticket::default() }
    }

    /// The log.
    pub fn log(&self) -> &Log {
        &self.log
    }

    /// Sequence of the last entry that was handed out or skipped.
    pub fn cursor(&self) -> u64 {
        self.cursor
    }

    /// Moves the cursor on, after reading entries elsewhere. It never moves back.
    pub fn seek(&mut self, after: u64) {
        self.cursor = self.cursor.max(after);
    }

    /// Adds what is ready to `out`, with twins where `twins` says so, and moves the cursor
    /// behind it.
    pub fn poll_fill(
        &mut self,
        cx: &mut Context<'_>,
        out: &mut VecDeque<Entry>,
        twins: bool,
    ) -> Poll<Ready> {
        let Self { log, id, cursor, seen, ticket } = self;
        let ready =
            log.read(cursor, seen, out, twins, |waiting| waiting.wait(*id, ticket, cx.waker()));
        ready.map_or(Poll::Pending, Poll::Ready)
    }

    /// What follows, waiting for it.
    pub async fn next(&mut self) -> Next {
        let mut out = VecDeque::new();
        match poll_fn(|cx| self.poll_fill(cx, &mut out, false)).await {
            Ready::Frames => {
                Next::Frames(out.into_iter().map(|entry| (entry.sequence, entry.frame)).collect())
            }
            Ready::Behind => Next::Behind,
            Ready::Stirred => Next::Stirred,
            Ready::End => Next::End,
        }
    }
}

impl Drop for Subscriber {
    fn drop(&mut self) {
        self.log.books().subscribers.fetch_sub(1, Relaxed);
        self.log.readers.fetch_sub(1, Relaxed);
        self.log.leave(&self.ticket);
    }
}
