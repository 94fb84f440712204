//! Tasks: accepted, leased attempt by attempt, streamed, ended.
//!
//! [`state`] decides, [`ledger`] makes it durable, [`store`] and [`reads`] hold the SQL,
//! [`timers`] ends what is late, [`recovery`] rebuilds from the rows what lives in memory.
//! What runners made is brought to storage by the [`recorder`] while it is fresh and by the
//! [`archive`] once the task has ended; [`history`] reads it, wherever it is.

pub mod archive;
pub mod convert;
pub mod history;
pub mod housekeeping;
pub mod ledger;
pub mod model;
pub mod recorder;
pub mod recovery;
pub mod service;
pub mod state;
pub mod store;
#[cfg(test)]
mod tests;
pub mod timers;
pub mod watch;

pub use self::store::{queued, reads, transcripts};
