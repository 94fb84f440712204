//! Runners: who is connected, what they hold, and the protocol that they speak.
//!
//! A runner has a **session** that outlives its connections, and the session holds **leases**,
//! one for each attempt. All of it is memory under one lock ([`Registry`]); the store is the
//! truth, and this slice tells it when attempts end:
//!
//! ```text
//!  dispatch --assign--> lease --Finish--------------------> as the runner says
//!                         |  Refuse, Bye, never reached --> handed back
//!                         |  no heartbeat, no inventory --> lost
//!                         |  execution timeout -----------> timed out
//!  queue --revocation---> +--------- Cancel to the runner, lease forgotten
//! ```
//!
//! Invariants: nothing is acknowledged to a runner before it is on stable storage; the reader
//! of events waits for neither storage nor subscribers; the newest connection of a session is
//! the only one; nothing here waits while it holds the lock.

mod cancels;
mod commands;
mod control;
pub mod convert;
mod elsewhere;
mod ends;
mod events;
mod hello;
mod leases;
pub mod model;
mod operate;
mod output;
pub mod protocol;
mod registry;
pub mod roster;
pub mod service;
mod session;
#[cfg(test)]
pub(crate) mod tests;

use std::time::Duration;

pub use self::registry::{Ports, Registry, Resume, Supply};

/// Times and bounds of the runner protocol.
#[derive(Clone, Debug, PartialEq)]
pub struct RunnerLimits {
    /// Runners heartbeat this often.
    pub heartbeat_interval: Duration,
    /// Leases end this long after the last heartbeat.
    pub lease_ttl: Duration,
    /// A session waits this long for its runner to come back.
    pub session_grace: Duration,
    /// Streams are renewed after this long.
    pub max_stream_age: Duration,
    /// A Hello must come this soon.
    pub hello_timeout: Duration,
    /// Cancelled work must have stopped after this long.
    pub cancel_grace: Duration,
    /// Bytes of an attempt's events that a runner may have unacknowledged.
    pub max_unacked_bytes: usize,
}

impl Default for RunnerLimits {
    fn default() -> Self {
        Self {
            heartbeat_interval: Duration::from_secs(3),
            lease_ttl: Duration::from_secs(15),
            session_grace: Duration::from_secs(30),
            max_stream_age: Duration::from_mins(30),
            hello_timeout: Duration::from_secs(10),
            cancel_grace: Duration::from_secs(5),
            max_unacked_bytes: 1 << 20,
        }
    }
}
