//! What the queues and the frames in Redis cost, with a server of their own on this machine.
//! Skipped where there is no redis-server.

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    net::TcpStream,
    process::{Child, Command, Stdio},
    time::Duration,
};

use baton::{
    clock::Clock,
    id::Entropy,
    redis::{Item, Lane, Mail, Parcel, Redis, Settings},
    supervisor::Supervisor,
};
use bytes::Bytes;
use criterion::{Criterion, Throughput};
use hdrhistogram::Histogram;
use tokio::runtime::Runtime;

const PORT: u16 = 19_379;
/// Items in one call, about as many as a busy commit holds.
const BATCH: usize = 100;
/// How long the latency of frames is measured.
const FRAMES_FOR: Duration = Duration::from_secs(5);
/// How often frames are sent, as a server gathers them.
const FLUSH_EVERY: Duration = Duration::from_millis(2);
/// Topics with a frame in each flush.
const TOPICS: u64 = 50;

struct Server {
    child: Child,
    folder: tempfile::TempDir,
}

impl Drop for Server {
    fn drop(&mut self) {
        // At the end of the process either way.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn start() -> Option<Server> {
    let folder = tempfile::tempdir().ok()?;
    let child = Command::new("redis-server")
        .args(["--port", &PORT.to_string(), "--bind", "127.0.0.1", "--save", ""])
        .arg("--dir")
        .arg(folder.path())
        .stdout(Stdio::null())
        .spawn()
        .ok()?;
    let server = Server { child, folder };
    let clock = Clock::system();
    let end = clock.mono() + Duration::from_secs(10);
    while TcpStream::connect(("127.0.0.1", PORT)).is_err() {
        assert!(
            clock.mono() < end,
            "redis-server in {} does not start",
            server.folder.path().display()
        );
        std::thread::yield_now();
    }
    Some(server)
}

/// Processor time of a process's threads so far.
fn cpu(pid: u32) -> Duration {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let nanos = tasks.filter_map(|task| {
        let text = fs::read_to_string(task.path().join("schedstat")).ok()?;
        text.split_whitespace().next()?.parse::<u64>().ok()
    });
    Duration::from_nanos(nanos.sum())
}

async fn connect(supervisor: &Supervisor) -> Redis {
    let settings = Settings { url: format!("redis://127.0.0.1:{PORT}"), ..Settings::default() };
    Redis::connect(settings, Clock::system(), Entropy::system(), supervisor)
        .await
        .expect("a server that just started")
}

fn batch(lane: &Lane, from: usize) -> Vec<Item> {
    (from..from + BATCH)
        .map(|number| Item {
            lane: lane.clone(),
            info: Bytes::new(),
            id: format!("0198c5a0-0000-7000-8000-{number:012}"),
            attempt: 1,
            data: Bytes::from_static(&[7; 24]),
        })
        .collect()
}

fn queues(criterion: &mut Criterion, runtime: &Runtime, server: &Server) {
    let supervisor = Supervisor::new();
    let redis = runtime.block_on(connect(&supervisor));
    let (work, consumer) = (redis.work(), redis.work().consumer("bench"));
    let lane = Lane::new("default/model", "v1", 1).expect("a name");
    let mut next = 0;
    let mut n_items = 0_u64;
    let before = (cpu(std::process::id()), cpu(server.child.id()));

    let mut group = criterion.benchmark_group("redis");
    group.throughput(Throughput::Elements(BATCH as u64));
    group.bench_function("add, pull and acknowledge 100", |bencher| {
        bencher.iter(|| {
            let items = batch(&lane, next);
            next += BATCH;
            n_items += BATCH as u64;
            runtime.block_on(async {
                work.add(&items).await.expect("added");
                let got = consumer.pull(std::slice::from_ref(&lane), BATCH).await.expect("pulled");
                assert_eq!(got.len(), BATCH);
                consumer.ack(&got).await.expect("acknowledged");
            });
        });
    });
    group.finish();
    let own = cpu(std::process::id()).saturating_sub(before.0);
    let theirs = cpu(server.child.id()).saturating_sub(before.1);
    println!(
        "processor time per item, added, pulled and acknowledged: {:.1} µs here, {:.1} µs in Redis",
        own.as_secs_f64() * 1e6 / n_items as f64,
        theirs.as_secs_f64() * 1e6 / n_items as f64,
    );
    runtime.block_on(supervisor.shutdown(Duration::from_secs(1), &Clock::system()));
}

/// What waiting items take.
fn memory(runtime: &Runtime) {
    const N_ITEMS: usize = 100_000;
    let supervisor = Supervisor::new();
    let redis = runtime.block_on(connect(&supervisor));
    let lane = Lane::new("default/other", "v1", 1).expect("a name");
    let before = used_memory();
    for from in (0..N_ITEMS).step_by(BATCH) {
        let items = batch(&lane, 1_000_000_000 + from);
        runtime.block_on(redis.work().add(&items)).expect("added");
    }
    let grown = used_memory() - before;
    println!("memory of a waiting item: {} bytes", grown / N_ITEMS as u64);
    runtime.block_on(supervisor.shutdown(Duration::from_secs(1), &Clock::system()));
}

fn used_memory() -> u64 {
    let mut stream = TcpStream::connect(("127.0.0.1", PORT)).expect("a connection");
    stream.write_all(b"INFO memory\r\n").expect("sent");
    BufReader::new(stream)
        .lines()
        .map_while(Result::ok)
        .find_map(|line| line.strip_prefix("used_memory:")?.parse().ok())
        .expect("a number")
}

/// Frames gathered for two milliseconds, sent, and read on another connection.
fn frames(runtime: &Runtime, server: &Server) {
    let clock = Clock::system();
    let supervisor = Supervisor::new();
    let before = (cpu(std::process::id()), cpu(server.child.id()));
    let (latencies, n_frames) = runtime.block_on(async {
        let (sender, reader) = (connect(&supervisor).await, connect(&supervisor).await);
        let mut inbox = reader.inbox("bench").await.expect("an inbox");
        let end = clock.mono() + FRAMES_FOR;
        let sending = async {
            let mut flush = tokio::time::interval(FLUSH_EVERY);
            let mut index = 0;
            while clock.mono() < end {
                flush.tick().await;
                index += 1;
                let now = clock.now().0.to_le_bytes();
                let parcels: Vec<_> = (0..TOPICS)
                    .map(|topic| Parcel {
                        topic: format!("0198c5a0-0000-7000-8000-{topic:012}"),
                        first: index,
                        last: index,
                        frames: Bytes::copy_from_slice(&[&now[..], &[7; 32]].concat()),
                    })
                    .collect();
                sender.send("bench", &parcels).await.expect("sent");
            }
            index * TOPICS
        };
        let reading = async {
            let mut latencies = Histogram::<u64>::new(3).expect("three digits");
            while clock.mono() < end {
                if let Mail::Parcels(parcels) = inbox.next().await {
                    let now = clock.now().0;
                    for parcel in parcels {
                        let mut sent = [0; 8];
                        sent.copy_from_slice(&parcel.frames[..8]);
                        latencies.record((now - i64::from_le_bytes(sent)) as u64).expect("small");
                    }
                }
            }
            latencies
        };
        let (n_frames, latencies) = tokio::join!(sending, reading);
        (latencies, n_frames)
    });
    let own = cpu(std::process::id()).saturating_sub(before.0);
    let theirs = cpu(server.child.id()).saturating_sub(before.1);
    println!(
        "{n_frames} frames of {TOPICS} topics, sent every {FLUSH_EVERY:?}: {} read, p50 {} µs, p99 {} µs; \
         processor time per frame {:.2} µs here (both sides), {:.2} µs in Redis",
        latencies.len(),
        latencies.value_at_quantile(0.5),
        latencies.value_at_quantile(0.99),
        own.as_secs_f64() * 1e6 / n_frames as f64,
        theirs.as_secs_f64() * 1e6 / n_frames as f64,
    );
    runtime.block_on(supervisor.shutdown(Duration::from_secs(1), &clock));
}

fn main() {
    let Some(server) = start() else {
        println!("skipped: there is no redis-server; it is in the package redis-server");
        return;
    };
    let runtime = Runtime::new().expect("a runtime");
    let mut criterion = Criterion::default().configure_from_args();
    queues(&mut criterion, &runtime, &server);
    memory(&runtime);
    frames(&runtime, &server);
    criterion.final_summary();
}
