//! An S3 server for tests: files in a directory, on a free port.

use std::{net::SocketAddr, path::Path};

use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto::Builder,
};
use s3s::{auth::SimpleAuth, service::S3ServiceBuilder};
use tokio::{net::TcpListener, task::JoinSet};

/// Who may call, and with what.
pub const ACCESS_KEY: &str = "test-access-key";
/// Its secret.
pub const SECRET_KEY: &str = "test-secret-key";
/// The bucket that is there.
pub const BUCKET: &str = "test-bucket";

/// A server that ends when dropped.
pub struct TestServer {
    /// Where it listens.
    pub addr: SocketAddr,
    _connections: JoinSet<()>,
}

impl TestServer {
    /// Starts one over `dir`, with one empty bucket.
    pub async fn start(dir: &Path) -> Self {
        std::fs::create_dir_all(dir.join(BUCKET)).expect("a directory");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        Self::start_on(dir, listener)
    }

    /// Starts one on a port that is open already.
    pub fn start_on(dir: &Path, listener: TcpListener) -> Self {
        let addr = listener.local_addr().expect("an address");
        let files = s3s_fs::FileSystem::new(dir).expect("a directory");
        let mut service = S3ServiceBuilder::new(files);
        service.set_auth(SimpleAuth::from_single(ACCESS_KEY, SECRET_KEY));
        let service = service.build();
        let mut connections = JoinSet::new();
        connections.spawn(async move {
            let mut open = JoinSet::new();
            while let Ok((socket, _)) = listener.accept().await {
                let service = service.clone();
                open.spawn(async move {
                    let serving = Builder::new(TokioExecutor::new());
                    // Whoever left is gone.
                    let _ = serving.serve_connection(TokioIo::new(socket), service).await;
                });
            }
        });
        Self { addr, _connections: connections }
    }
}
