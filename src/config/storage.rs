//! The sections `storage`, `database` and `retention`: where data lie, and for how long.

use std::{path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};

use super::{Secret, units};

/// Where data lie.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Storage {
    /// Directory of the database and the files; made when absent.
    pub data_dir: PathBuf,
    /// Writes are refused while the disk has less than this to give.
    #[serde(with = "units::bytes")]
    pub min_free: u64,
}

impl Default for Storage {
    fn default() -> Self {
        Self { data_dir: PathBuf::from("baton-data"), min_free: 32 << 20 }
    }
}

/// The database, where it is a server's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Database {
    /// Such as `postgres://user:password@host:5432/name`. Default: a file in `storage.data_dir`.
    /// Secret.
    pub url: Secret,
    /// Connections to the server, in all.
    pub connections: usize,
}

impl Default for Database {
    fn default() -> Self {
        Self { url: Secret::default(), connections: 16 }
    }
}

/// How long what has ended is kept.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Retention {
    /// Tasks that ended this long ago are deleted, dead letters excepted. Default: kept for ever.
    #[serde(with = "units::duration")]
    pub ended_tasks: Duration,
    /// Dead letters of this age are deleted. Default: kept for ever.
    #[serde(with = "units::duration")]
    pub dead_letters: Duration,
}

impl Database {
    /// What is wrong with the address.
    pub(super) fn url_fault(&self) -> Option<String> {
        let url = self.url.expose();
        let known = ["postgres://", "postgresql://"].iter().any(|scheme| url.starts_with(scheme));
        (!url.is_empty() && !known).then(|| {
            "must begin with postgres://, as in postgres://user:password@host:5432/name".into()
        })
    }
}
