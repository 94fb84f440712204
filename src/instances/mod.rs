//! Instances: the servers that share a database, and which of them may do what.
//!
//! A server alone on its file needs none of this: [`Standing::alone`] is always good and holds
//! every lock. Where others share the database, each server is an *instance* with an id of its
//! own, which the rows of the attempts that it holds carry, and shows in short intervals that it
//! is there:
//!
//! ```text
//!  heartbeat sent ─────────────► TTL/2 ───────────────► TTL ─────────► TTL + 1 s
//!    Good: hands out work,         Cut: hands out none,   Over: holds    by the database's clock:
//!    holds its runners             sends its runners      no lease       others take what it held
//!                                  elsewhere
//! ```
//!
//! The left side counts on the instance's own monotonic clock, from before the heartbeat was sent;
//! the right side on the clock of the database, from when it was written. So an instance that is
//! cut off has let go before others take, whatever the wall clocks say. With each heartbeat an
//! instance also takes the database's time for its own ([`crate::clock::Clock::follow`]), so that
//! time limits are the same everywhere: the wall clock of one does not expire the tasks of all.
//!
//! A [`Lock`] is held by one instance at a time, for loops of which one is enough. Its epoch grows
//! with every change of hands. What a loop writes in the name of a lock holds the lock's row at
//! that epoch ([`Mandate`]), so that an instance that was paused writes nothing once another has
//! the lock.

mod heartbeat;
pub mod hints;
mod standing;
mod store;
#[cfg(test)]
mod tests;

pub use self::{
    heartbeat::Heartbeat,
    standing::{Duty, Lock, Mandate, Phase, Standing},
    store::{STATEMENTS, hold},
};
