//! The section `artifacts`: where files of tasks lie, and how many.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::units;

/// Files of tasks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Artifacts {
    /// Where their bytes lie: `file`, in the data directory, or `s3://bucket/prefix`.
    pub store: String,
    /// Server of the bucket, such as `https://s3.example.org`. Default: AWS.
    pub endpoint: String,
    /// Region of the bucket. Default: as the environment says, or `us-east-1`.
    pub region: String,
    /// Whether the bucket is named in the path, as most servers but AWS want it.
    pub path_style: bool,
    /// Largest artifact.
    #[serde(with = "units::bytes")]
    pub max_size: u64,
    /// Bytes that a namespace may keep; `0B` for any number.
    #[serde(with = "units::bytes")]
    pub max_per_namespace: u64,
    /// Uploads of a namespace that are not complete.
    pub max_uploads: u64,
    /// An artifact that no task made, and that has no lifetime of its own, is deleted after this
    /// long; `0s` for never.
    #[serde(with = "units::duration")]
    pub ttl: Duration,
    /// An upload that is not complete after this long is deleted.
    #[serde(with = "units::duration")]
    pub upload_ttl: Duration,
}

impl Default for Artifacts {
    fn default() -> Self {
        Self {
            store: "file".into(),
            endpoint: String::new(),
            region: String::new(),
            path_style: false,
            max_size: 64 << 30,
            max_per_namespace: 0,
            max_uploads: 1_000,
            ttl: Duration::ZERO,
            upload_ttl: Duration::from_hours(24),
        }
    }
}

impl Artifacts {
    /// What is wrong with the place of their bytes.
    pub(super) fn store_fault(&self) -> Option<String> {
        let store = &self.store;
        let known = store == "file" || store.starts_with("s3://");
        (!known).then(|| format!("`{store}` must be `file` or `s3://bucket/prefix`"))
    }
}
