//! A bucket: the S3 server of the unit tests, over a directory of its own.

#[path = "../../../src/blob/testing.rs"]
mod server;

use tempfile::TempDir;

use self::server::{ACCESS_KEY, BUCKET, SECRET_KEY, TestServer};

/// A server with an empty bucket.
pub struct Bucket {
    pub server: TestServer,
    pub dir: TempDir,
}

impl Bucket {
    pub async fn start() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        Self { server: TestServer::start(dir.path()).await, dir }
    }

    /// Variables that let a server of Baton use it.
    pub fn env(&self) -> Vec<(String, String)> {
        [
            ("BATON_ARTIFACTS_STORE", format!("s3://{BUCKET}/baton")),
            ("BATON_ARTIFACTS_ENDPOINT", format!("http://{}", self.server.addr)),
            ("BATON_ARTIFACTS_REGION", "us-east-1".into()),
            ("BATON_ARTIFACTS_PATH_STYLE", "true".into()),
            ("AWS_ACCESS_KEY_ID", ACCESS_KEY.into()),
            ("AWS_SECRET_ACCESS_KEY", SECRET_KEY.into()),
            ("AWS_EC2_METADATA_DISABLED", "true".into()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into()
    }
}
