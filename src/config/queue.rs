//! The sections `queue` and `redis`: how much waits, and where servers share it.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Secret, units};

/// Admission, and what waits.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Queue {
    /// Waiting tasks per model and namespace.
    pub max_per_model: u64,
    /// Waiting tasks per namespace.
    pub max_per_namespace: u64,
    /// What a full queue does.
    pub full: FullPolicy,
    /// A waiting task gains one point of priority each time this passes, so that none starves.
    #[serde(with = "units::duration")]
    pub ageing: Duration,
    /// Attempts that may fail of a task that does not say how many.
    pub max_attempts: u32,
    /// Pause after the first failed attempt of a task that does not say how long.
    #[serde(with = "units::duration")]
    pub initial_backoff: Duration,
    /// Longest pause between attempts of a task that does not say how long.
    #[serde(with = "units::duration")]
    pub max_backoff: Duration,
    /// With `redis.url`: a task that a server fetched and did not start within this time is
    /// delivered to another one.
    #[serde(with = "units::duration")]
    pub ack_timeout: Duration,
    /// With `redis.url`: dead letters are listed there this long. The tasks themselves stay as
    /// `retention.dead_letters` says.
    #[serde(with = "units::duration")]
    pub dead_letter_ttl: Duration,
}

impl Default for Queue {
    fn default() -> Self {
        Self {
            max_per_model: 1_000_000,
            max_per_namespace: 2_000_000,
            full: FullPolicy::Reject,
            ageing: Duration::from_secs(30),
            max_attempts: 3,
            initial_backoff: Duration::from_secs(1),
            max_backoff: Duration::from_mins(1),
            ack_timeout: Duration::from_secs(5),
            dead_letter_ttl: Duration::from_hours(7 * 24),
        }
    }
}

/// What a full queue does with a new task.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FullPolicy {
    /// Refuses it.
    Reject,
    /// Ends the oldest waiting task of the lowest priority, if not above the new one's.
    DropOldest,
}

/// What servers on one database share: queues, and tokens on their way between them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Redis {
    /// Such as `redis://user:password@host:6379/0`, or `rediss://` for TLS. A server that cannot
    /// use it does not start. Default: each server finds the others' tasks in the database only.
    /// Secret.
    pub url: Secret,
    /// What the names of all keys begin with. Servers of one installation have the same.
    pub prefix: String,
    /// PEM file with the CAs that are trusted under `rediss://`. Default: those of the system.
    pub ca: String,
    /// Most time for a connection to be made.
    #[serde(with = "units::duration")]
    pub connect_timeout: Duration,
    /// Most time for the answer to a command.
    #[serde(with = "units::duration")]
    pub command_timeout: Duration,
}

impl Default for Redis {
    fn default() -> Self {
        Self {
            url: Secret::default(),
            prefix: "baton:".into(),
            ca: String::new(),
            connect_timeout: Duration::from_secs(5),
            command_timeout: Duration::from_secs(2),
        }
    }
}
