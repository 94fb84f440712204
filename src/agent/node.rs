//! What the host is and how busy it is, as the kernel and `nvidia-smi` tell it.
//!
//! What cannot be read is left out: a host without `nvidia-smi` has no GPUs.

use std::{fs, process::Stdio, time::Duration};

use futures_util::{FutureExt as _, future::BoxFuture};
use tokio::process::Command;

use crate::{clock::Clock, pb};

/// What knows the graphics processors.
const PROGRAM: &str = "nvidia-smi";
/// Time between two measurements.
const INTERVAL: Duration = Duration::from_secs(10);
/// Longest time that `nvidia-smi` may take.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The host's name.
pub fn host_name() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = name.trim();
    if name.is_empty() { "localhost".into() } else { name.into() }
}

/// The host.
pub fn node(gpus: Vec<pb::Gpu>) -> pb::Node {
    let cpus = std::thread::available_parallelism().map_or(0, |n| n.get() as u32);
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    pb::Node {
        node_id: host_name(),
        cpus,
        memory_bytes: memory(&meminfo).unwrap_or(0),
        gpus,
        os: format!("{} {}", std::env::consts::OS, release.trim()).trim().into(),
    }
}

/// Load average over one minute; 0 where the kernel does not tell.
pub fn load() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().next().and_then(|first| first.parse().ok()).unwrap_or(0.0)
}

/// The graphics processors with their load; none without `nvidia-smi`.
pub async fn gpus() -> Vec<pb::Gpu> {
    ask(PROGRAM).await
}

/// The graphics processors, measured again now and then.
pub struct Gpus {
    latest: Vec<pb::Gpu>,
    next: BoxFuture<'static, Vec<pb::Gpu>>,
    program: &'static str,
    clock: Clock,
}

impl Gpus {
    /// Measures them for the first time.
    pub async fn measure(clock: Clock) -> Self {
        Self::with(PROGRAM, clock).await
    }

    async fn with(program: &'static str, clock: Clock) -> Self {
        let latest = ask(program).await;
        let next = later(program, clock.clone());
        Self { latest, next, program, clock }
    }

    /// As they were measured last.
    pub fn latest(&self) -> Vec<pb::Gpu> {
        self.latest.clone()
    }

    /// Waits until they were measured again; for ever where there are none. Can be dropped and
    /// called again.
    pub async fn measured_again(&mut self) {
        if self.latest.is_empty() {
            return std::future::pending().await;
        }
        let measured = (&mut self.next).await;
        self.next = later(self.program, self.clock.clone());
        // What could not be measured is not gone.
        if !measured.is_empty() {
            self.latest = measured;
        }
    }
}

fn later(program: &'static str, clock: Clock) -> BoxFuture<'static, Vec<pb::Gpu>> {
    let at = clock.mono() + INTERVAL;
    async move {
        clock.sleep_until(at).await;
        ask(program).await
    }
    .boxed()
}

async fn ask(program: &str) -> Vec<pb::Gpu> {
    let query = "index,name,memory.total,memory.used,utilization.gpu,temperature.gpu";
    let output = Command::new(program)
        .arg(format!("--query-gpu={query}"))
        .arg("--format=csv,noheader,nounits")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    match tokio::time::timeout(TIMEOUT, output).await {
        Ok(Ok(output)) if output.status.success() => {
            String::from_utf8_lossy(&output.stdout).lines().filter_map(gpu).collect()
        }
        Ok(Ok(output)) => {
            tracing::warn!(status = %output.status, "nvidia-smi failed; no GPUs are reported");
            Vec::new()
        }
        // Not installed: the normal case on a host without GPUs.
        Ok(Err(_)) => Vec::new(),
        Err(_) => {
            tracing::warn!("nvidia-smi did not answer in time; no GPUs are reported");
            Vec::new()
        }
    }
}

/// One line of `nvidia-smi`: index, name, MiB in all, MiB used, percent, degrees.
fn gpu(line: &str) -> Option<pb::Gpu> {
    let mut fields = line.split(',').map(str::trim);
    let index = fields.next()?.parse().ok()?;
    let name = fields.next()?.to_owned();
    let mut number = || fields.next().and_then(|field| field.parse::<f64>().ok());
    let mib = |value: f64| (value * f64::from(1 << 20)) as u64;
    Some(pb::Gpu {
        index,
        name,
        memory_bytes: number().map_or(0, mib),
        memory_used_bytes: number().map(mib),
        utilization: number().map(|percent| percent / 100.0),
        temperature_celsius: number(),
    })
}

fn memory(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _, time::Duration};

    use super::{Gpus, INTERVAL, gpu, memory};
    use crate::clock::Clock;

    #[tokio::test]
    async fn the_load_is_measured_again_and_again() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("smi");
        let count = dir.path().join("count");
        let script = format!(
            "#!/bin/sh\necho x >> {0}\necho \"0, Fake, 1024, $(grep -c x {0}), 50, 40\"\n",
            count.display()
        );
        fs::write(&program, script).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let clock = Clock::manual();
        let program = program.display().to_string().leak();
        let mut gpus = Gpus::with(program, clock.clone()).await;
        let used = |gpus: &Gpus| gpus.latest()[0].memory_used_bytes.unwrap() >> 20;
        assert_eq!(used(&gpus), 1);
        for n in 2..4 {
            clock.advance(INTERVAL);
            let measured = gpus.measured_again();
            tokio::time::timeout(Duration::from_secs(10), measured).await.unwrap();
            assert_eq!(used(&gpus), n);
        }
    }

    #[test]
    fn reads_what_nvidia_smi_prints() {
        let gpu = gpu("0, NVIDIA H200, 143771, 4, 12, 31").unwrap();
        assert_eq!((gpu.index, gpu.name.as_str()), (0, "NVIDIA H200"));
        assert_eq!(gpu.memory_bytes, 143_771 << 20);
        assert_eq!(gpu.memory_used_bytes, Some(4 << 20));
        assert_eq!(gpu.utilization, Some(0.12));
        assert_eq!(gpu.temperature_celsius, Some(31.0));
    }

    #[test]
    fn what_nvidia_smi_does_not_know_stays_unset() {
        let gpu = gpu("1, GRID, [N/A], [N/A], [N/A], [N/A]").unwrap();
        assert_eq!((gpu.memory_bytes, gpu.memory_used_bytes, gpu.utilization), (0, None, None));
        assert_eq!(super::gpu("no devices were found"), None);
    }

    #[test]
    fn reads_the_memory_of_the_host() {
        let text = "MemFree: 1 kB\nMemTotal:       16 kB\n";
        assert_eq!(memory(text), Some(16 << 10));
    }
}
