//! `baton bench`: Baton against yardsticks, over real gRPC, in processes of their own.
//!
//! The binary starts itself: once as a server under test (`server start` on an empty directory,
//! credentials required), once as a yardstick that does the same work without Baton, and once
//! for each load. Loads run on yardstick and product in turn, processor time is that of each
//! process, latencies are `CLOCK_MONOTONIC` stamps carried in the payload, and every figure is a
//! median of the repetitions. `docs/benchmarks.md` has the method and a table.

mod client;
mod cluster;
mod database;
mod decisions;
mod figures;
mod files;
mod floor;
mod lives;
mod memory;
mod process;
mod readers;
mod relay;
mod report;
mod restart;
mod runner;
mod shim;
mod suite;
mod tasks;
mod unary;
mod wire;
mod yardstick;

use std::{io::Write as _, path::PathBuf};

use serde::{Deserialize, Serialize};

/// Measures Baton against yardsticks on this machine.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Option<Hidden>,
    /// Run these cases only, e.g. `--only G1,G11,cancel`.
    #[arg(long, value_name = "CASES", value_delimiter = ',', value_parser = suite::case)]
    only: Vec<String>,
    /// Repetitions of each case; figures are medians.
    #[arg(long, default_value_t = 5)]
    repeat: usize,
    /// Shorter spans and fewer of everything: a first impression in about two minutes.
    #[arg(long)]
    quick: bool,
    /// Threads of the server under test that serve connections.
    #[arg(long, default_value_t = 1)]
    io_threads: usize,
    /// Put the databases here instead of the system's place for temporary files.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Run the servers under test on Postgres, each on a database of its own that is made there;
    /// prefer `BATON_DATABASE_URL`, which other users of the machine do not see.
    #[arg(long, env = "BATON_DATABASE_URL", hide_env_values = true, value_name = "URL")]
    database_url: Option<String>,
    /// Have those servers share their queues in this Redis, under prefixes of their own; prefer
    /// `BATON_REDIS_URL`. With both, the case `cluster` runs two servers.
    #[arg(long, env = "BATON_REDIS_URL", hide_env_values = true, value_name = "URL")]
    redis_url: Option<String>,
    /// Print the table as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, clap::Subcommand)]
enum Hidden {
    /// Plays a part of a benchmark; reads which from standard input.
    #[command(hide = true)]
    Role,
}

/// What a child process of a benchmark does.
#[derive(Clone, Debug, Serialize, Deserialize)]
enum Role {
    /// Serves the yardsticks.
    Yardstick(yardstick::Spec),
    /// Streams tokens.
    Relay(relay::Spec),
    /// Makes unary calls.
    Unary(unary::Spec),
    /// Opens streams that wait.
    Idle(relay::Server, usize),
    /// Reads slowly.
    Slow(memory::SlowSpec),
    /// Runs whole lives of tasks.
    Tasks(tasks::Spec),
    /// Cancels that many tasks, whose runner may be connected to another server.
    Cancels(relay::Server, Option<relay::Server>, usize),
    /// Breaks the connection of a runner that holds that many tasks.
    Reconnect(relay::Server, usize),
    /// Submits that many tasks that wait.
    Fill(relay::Server, usize),
    /// Runs whole lives in a bare store.
    Floor(floor::Spec),
    /// Moves an artifact in and out.
    Files(files::Spec),
    /// Moves that many bytes in and out of a bucket, without Baton.
    Bucket(u64),
    /// Decides.
    Decisions(decisions::Spec),
}

/// Runs the benchmarks that `args` name and prints the table; `json` prints it as JSON.
pub fn run(args: Args) -> anyhow::Result<()> {
    let json = args.json;
    run_as(args, json)
}

/// The same with the output format decided by the caller.
pub fn run_as(args: Args, json: bool) -> anyhow::Result<()> {
    if args.command.is_some() {
        return play();
    }
    let plan = suite::Plan {
        repeat: args.repeat.max(1),
        quick: args.quick,
        only: args.only,
        io_threads: args.io_threads,
        dir: args.dir,
        database_url: args.database_url.filter(|url| !url.is_empty()),
        redis_url: args.redis_url.filter(|url| !url.is_empty()),
    };
    let rows = suite::run(&plan, |name, rows| {
        let failed = rows.iter().any(|row| row.verdict == report::Verdict::Failed);
        let _ = writeln!(std::io::stderr(), "{name}: {}", if failed { "failed" } else { "done" });
    });
    let mut out = std::io::stdout().lock();
    if json {
        writeln!(out, "{}", serde_json::to_string_pretty(&rows)?)?;
    } else {
        writeln!(out, "{}", report::table(&rows))?;
    }
    let failed = rows.iter().filter(|row| row.verdict == report::Verdict::Failed).count();
    anyhow::ensure!(failed == 0, "{failed} cases did not run to their end");
    Ok(())
}

/// A child's side: plays the role that it reads from standard input.
fn play() -> anyhow::Result<()> {
    match process::read_role()? {
        Role::Yardstick(spec) => {
            std::thread::Builder::new().name("parent".to_owned()).spawn(|| {
                process::wait_for_parent();
                std::process::exit(0);
            })?;
            yardstick::serve(spec)
        }
        Role::Relay(spec) => load(relay::run(spec)),
        Role::Unary(spec) => load(unary::run(spec)),
        Role::Idle(server, streams) => load(memory::idle(server, streams)),
        Role::Slow(spec) => load(memory::slow(spec)),
        Role::Tasks(spec) => load(tasks::run(spec)),
        Role::Cancels(server, runner_at, count) => load(tasks::cancels(server, runner_at, count)),
        Role::Reconnect(server, held) => load(tasks::reconnect(server, held)),
        Role::Fill(server, tasks) => load(restart::fill(server, tasks)),
        Role::Floor(spec) => load(floor::run(spec)),
        Role::Files(spec) => load(files::run(spec)),
        Role::Bucket(n_bytes) => load(files::direct(n_bytes)),
        Role::Decisions(spec) => process::print_answer(&decisions::run(spec)),
    }
}

/// Runs a load generator and prints what came of it.
fn load<T: Serialize>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let local = tokio::task::LocalSet::new();
    let outcome = local.block_on(&runtime, work)?;
    process::print_answer(&outcome)
}
