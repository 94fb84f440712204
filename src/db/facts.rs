//! What a database's server says of itself, for whoever looks for what is wrong.

use std::time::Duration;

use crate::{clock::Clock, error::Result};

/// The oldest Postgres that is known to do.
pub const OLDEST_POSTGRES: u32 = 13;

/// What a server says of itself and of a database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Such as `15.8`.
    pub version: String,
    /// Its major number.
    pub major: u32,
    /// `synchronous_commit`.
    pub synchronous_commit: String,
    /// `fsync`.
    pub fsync: String,
    /// Whether it follows another one and takes no writes.
    pub is_standby: bool,
    /// Connections that it takes and that others have.
    pub connections: (u64, u64),
    /// Whether this user may make tables.
    pub may_create: bool,
    /// Time that a question took.
    pub round_trip: Duration,
    /// Its clock less ours, in microseconds.
    pub ahead: i64,
    /// Whether the connection is encrypted.
    pub is_encrypted: bool,
}

/// Asks the server of a URL, usable or not.
pub async fn facts(url: &str, clock: &Clock) -> Result<Facts> {
    #[cfg(feature = "postgres")]
    return super::postgres::facts::ask(url, clock).await;
    #[cfg(not(feature = "postgres"))]
    {
        let _ = (url, clock);
        Err(super::admin::without_postgres())
    }
}
