//! Artifacts: how fast bytes go in and out, and what memory they cost on their way.

use std::{
    io,
    path::Path,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll},
    time::Duration,
};

use anyhow::Context as _;
use bytes::Bytes;
use futures_util::StreamExt as _;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, ReadBuf};

use super::{
    Role,
    process::{cpu_us, now_ns, rss_kib},
    relay::Server,
    report::Row,
    suite::{Plan, baton, play},
};
use crate::{
    app, blob,
    client::{Client, Progress},
    clock::Clock,
    config,
    id::{Entropy, UploadId},
    pb,
};

/// Moves an artifact in and out, in turn with the yardstick.
pub fn case(plan: &Plan) -> anyhow::Result<Vec<Row>> {
    let n_bytes = if plan.quick { 512 << 20 } else { 4 << 30 };
    let ((_baton, dir), server) = baton(plan)?;
    let (mut ours, mut alone) = (Vec::new(), Vec::new());
    for _ in 0..plan.repeat {
        alone.push(if in_bucket() {
            play(&Role::Bucket(n_bytes)).map(|found: Outcome| (found.up, found.down))?
        } else {
            copied(&dir.path, n_bytes).map(|rate| (rate, rate))?
        });
        ours.push(play(&Role::Files(Spec { server: server.clone(), n_bytes }))?);
    }
    Ok(rows(n_bytes, &ours, &alone))
}

/// A megabyte, as rates are counted.
const MB: f64 = 1e6;

/// What to move.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Spec {
    /// The server.
    pub server: Server,
    /// Size of the artifact.
    pub n_bytes: u64,
}

/// How it went.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Outcome {
    /// Bytes in, in MB/s: hashed, synced and listed.
    pub up: f64,
    /// Bytes out, in MB/s: checked.
    pub down: f64,
    /// Processor time of the server, in seconds per GB in and out.
    pub cpu: f64,
    /// Most that the server's resident memory grew meanwhile, in MiB.
    pub grown_mib: f64,
}

/// Bytes that do not repeat soon, from memory.
struct Noise {
    block: Bytes,
    left: u64,
}

impl AsyncRead for Noise {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let n = buf.remaining().min(self.block.len()).min(usize::try_from(self.left).unwrap_or(0));
        buf.put_slice(&self.block[..n]);
        self.left -= n as u64;
        Poll::Ready(Ok(()))
    }
}

fn noise(n_bytes: u64) -> Noise {
    let mut block = vec![0; 1 << 20];
    Entropy::seeded(now_ns()).fill(&mut block);
    Noise { block: block.into(), left: n_bytes }
}

/// Moves one artifact in and out.
pub async fn run(spec: Spec) -> anyhow::Result<Outcome> {
    let Spec { server, n_bytes } = spec;
    let client = Client::connect(&server.addr.to_string(), server.token.as_deref()).await?;
    let (most, done) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let before = rss_kib(server.pid);
    let watcher = {
        let (most, done, pid) = (most.clone(), done.clone(), server.pid);
        std::thread::spawn(move || {
            while !done.load(Relaxed) {
                most.fetch_max(rss_kib(pid), Relaxed);
                std::thread::sleep(Duration::from_millis(50));
            }
        })
    };
    let cpu = cpu_us(server.pid);
    let artifact = pb::ArtifactSpec {
        name: "noise.bin".into(),
        size_bytes: Some(n_bytes),
        ..pb::ArtifactSpec::default()
    };
    let started = now_ns();
    let made = client.put_stream(noise(n_bytes), artifact, Arc::new(|_: Progress| {})).await?;
    let up = rate(n_bytes, started);
    let started = now_ns();
    let (mut pieces, mut came) = (client.fetch(&made, 0), 0);
    while let Some(piece) = pieces.next().await? {
        came += piece.len() as u64;
    }
    let down = rate(n_bytes, started);
    anyhow::ensure!(came == n_bytes, "{came} of {n_bytes} bytes came back");
    let cpu = (cpu_us(server.pid) - cpu) as f64 / 1e6 / (2.0 * n_bytes as f64 / 1e9);
    done.store(true, Relaxed);
    // It only looks.
    let _ = watcher.join();
    let request = pb::DeleteArtifactRequest { artifact_id: made.artifact_id };
    client.artifacts().delete_artifact(request).await?;
    let grown_mib = most.load(Relaxed).saturating_sub(before) as f64 / 1024.0;
    Ok(Outcome { up, down, cpu, grown_mib })
}

fn rate(n_bytes: u64, started_ns: u64) -> f64 {
    n_bytes as f64 / MB / ((now_ns() - started_ns) as f64 / 1e9)
}

/// The bucket without Baton before it: the same writes and reads, from this process.
pub async fn direct(n_bytes: u64) -> anyhow::Result<Outcome> {
    let config = config::load(&config::Sources::process(None))?.config;
    let store = app::artifact_store(&config).await?;
    let clock = Clock::system();
    let id = UploadId::new(clock.now(), &Entropy::system()).0;
    let before = rss_kib(std::process::id());
    let started = now_ns();
    let mut writer = store
        .open(blob::Upload { id, digest: None, place: None, size: Some(n_bytes) }, None)
        .await?;
    let Noise { block, mut left } = noise(n_bytes);
    while left > 0 {
        let piece = block.slice(..block.len().min(usize::try_from(left)?));
        left -= piece.len() as u64;
        writer.write(piece).await?;
    }
    let sealed = writer.finish().await?;
    let key = blob::Key { kind: "bench".into(), digest: sealed.digest, generation: String::new() };
    sealed.keep(&key).await?;
    let up = rate(n_bytes, started);
    let started = now_ns();
    let mut pieces = store.read(&key, 0, n_bytes).await?;
    while let Some(piece) = pieces.next().await {
        piece?;
    }
    let down = rate(n_bytes, started);
    store.delete(&key).await?;
    let grown_mib = rss_kib(std::process::id()).saturating_sub(before) as f64 / 1024.0;
    Ok(Outcome { up, down, cpu: 0.0, grown_mib })
}

/// Whether artifacts lie in a bucket here, by the variables of the process.
pub fn in_bucket() -> bool {
    config::variable("BATON_ARTIFACTS_STORE").is_some_and(|store| store != "file")
}

/// What the machine does without Baton: the same bytes copied by `cp` and synced, in MB/s.
pub fn copied(dir: &Path, n_bytes: u64) -> anyhow::Result<f64> {
    let (from, to) = (dir.join("from"), dir.join("to"));
    let mut source = io::BufWriter::new(std::fs::File::create(&from)?);
    let noise = noise(n_bytes);
    for _ in 0..n_bytes.div_ceil(noise.block.len() as u64) {
        io::Write::write_all(&mut source, &noise.block)?;
    }
    source.into_inner()?.sync_all()?;
    let started = now_ns();
    let status = std::process::Command::new("cp").arg(&from).arg(&to).status().context("cp")?;
    anyhow::ensure!(status.success(), "cp: {status}");
    std::fs::File::open(&to)?.sync_all()?;
    let copied = rate(n_bytes, started);
    std::fs::remove_file(&from)?;
    std::fs::remove_file(&to)?;
    Ok(copied)
}

/// The lines of the table. The yardstick is a bucket by itself, or `cp`.
pub fn rows(n_bytes: u64, outcomes: &[Outcome], alone: &[(f64, f64)]) -> Vec<Row> {
    let other = if in_bucket() { "the bucket alone" } else { "cp and sync" };
    let (up, down): (Vec<f64>, Vec<f64>) = alone.iter().copied().unzip();
    let each = |of: fn(&Outcome) -> f64| outcomes.iter().map(of).collect::<Vec<_>>();
    let gib = n_bytes as f64 / f64::from(1 << 30);
    let cpu = super::figures::median(outcomes.iter().map(|outcome| outcome.cpu));
    vec![
        Row::new("artifacts", &format!("{gib:.1} GiB in, {other}"), "MB/s", each(|o| o.up))
            .against(up)
            .noted(format!("{cpu:.2} s of the server per GB in or out")),
        Row::new("artifacts", &format!("{gib:.1} GiB out, {other}"), "MB/s", each(|o| o.down))
            .against(down),
        Row::new("artifacts", "memory that they cost the server", "MiB", each(|o| o.grown_mib)),
    ]
}
