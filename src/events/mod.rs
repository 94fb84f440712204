//! The timeline: entries appended in the caller's transaction, and a doorbell for those who
//! follow them.
//!
//! A follower keeps a position and reads what lies above it when the bell rings; a ring that is
//! missed is made good by the next, and by a look now and then. So a slow follower costs
//! nothing and delays nobody. Of the newest entries it has the [twins](Twin) that followers share.

pub mod frame;
pub mod store;

use std::{collections::BTreeMap, sync::Arc};

use parking_lot::Mutex;
use tokio::sync::watch;

use crate::twin::{Charge, Twin};

/// Bytes of twins above which the oldest are forgotten.
const TWIN_BYTES: usize = 4 << 20;

/// Rings when entries were committed, and has the twins of the newest; clones share it.
#[derive(Clone, Debug, Default)]
pub struct Tail(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    rings: watch::Sender<u64>,
    /// By position.
    twins: Mutex<BTreeMap<i64, Arc<Twin>>>,
    /// Counts the twins.
    charge: Arc<Charge>,
}

impl Tail {
    /// Says that entries were committed.
    pub fn ring(&self) {
        self.0.rings.send_modify(|count| *count += 1);
    }

    /// A follower's end: `changed()` completes after a ring that it has not seen.
    pub fn follow(&self) -> watch::Receiver<u64> {
        self.0.rings.subscribe()
    }

    /// Whether anybody follows.
    pub fn is_followed(&self) -> bool {
        self.0.rings.receiver_count() > 0
    }

    /// The twin of the entry at a position, for followers that want the entry in a second
    /// encoding: the same for all of them, unless one is far behind.
    pub fn twin(&self, position: i64) -> Arc<Twin> {
        let mut twins = self.0.twins.lock();
        let twin = twins.entry(position).or_insert_with(|| Twin::new(&self.0.charge)).clone();
        while self.0.charge.bytes() > TWIN_BYTES && twins.len() > 1 {
            twins.pop_first();
        }
        twin
    }
}
