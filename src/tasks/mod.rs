//! Tasks: accepted, leased attempt by attempt, streamed, ended.
//!
//! [`state`] decides, [`ledger`] makes it durable, [`store`] and [`reads`] hold the SQL,
//! [`timers`] ends what is late, [`recovery`] rebuilds from the rows what lives in memory.

pub mod convert;
pub mod history;
pub mod housekeeping;
pub mod ledger;
pub mod metered;
pub mod model;
pub mod reads;
pub mod recovery;
pub mod service;
pub mod state;
pub mod store;
mod submit;
pub mod timers;
pub mod watch;
