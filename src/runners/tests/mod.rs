//! The registry over a real ledger, with scripted runners and a clock that is moved by hand.

mod leases;
mod output;
mod races;
pub(crate) mod world;
