//! A server that comes back: killed with many tasks open, how soon it is ready again.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use super::{client, process::now_ns, relay::Server};

/// Longest wait for a server to be ready.
const PATIENCE: Duration = Duration::from_mins(1);

/// Submits tasks that nobody serves; returns how many.
pub async fn fill(server: Server, tasks: usize) -> anyhow::Result<usize> {
    let connection = server.connect().await?;
    Ok(client::submit_many(&connection, "bench/waiting", tasks).await?.len())
}

/// Milliseconds from `since` until the server answers `/readyz` with 200.
pub fn ready_after(addr: SocketAddr, since: u64) -> anyhow::Result<f64> {
    loop {
        if is_ready(addr) {
            return Ok((now_ns() - since) as f64 / 1e6);
        }
        anyhow::ensure!(
            now_ns() - since < PATIENCE.as_nanos() as u64,
            "the server is not ready after {PATIENCE:?}"
        );
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn is_ready(addr: SocketAddr) -> bool {
    let ask = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect(addr)?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.write_all(b"GET /readyz HTTP/1.1\r\nhost: bench\r\nconnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    ask().is_ok_and(|answer| answer.starts_with("HTTP/1.1 200"))
}
