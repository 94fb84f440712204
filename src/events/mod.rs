//! The timeline: entries appended in the caller's transaction, and a doorbell for those who
//! follow them.
//!
//! A follower keeps a position and reads what lies above it when the bell rings; a ring that is
//! missed is made good by the next, and by a look now and then. So a slow follower costs
//! nothing and delays nobody.

pub mod frame;
pub mod store;

use std::sync::Arc;

use tokio::sync::watch;

/// Rings when entries were committed; clones share it.
#[derive(Clone, Debug)]
pub struct Tail(Arc<watch::Sender<u64>>);

impl Default for Tail {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(0)))
    }
}

impl Tail {
    /// Says that entries were committed.
    pub fn ring(&self) {
        self.0.send_modify(|count| *count += 1);
    }

    /// A follower's end: `changed()` completes after a ring that it has not seen.
    pub fn follow(&self) -> watch::Receiver<u64> {
        self.0.subscribe()
    }
}
