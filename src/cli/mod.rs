//! The command line: clap's tree, what all commands share, and which function runs which.
//!
//! Data go to stdout and everything else to stderr. Exit codes are those of [`exit::Exit`].

mod artifacts;
pub mod dev;
mod diagnose;
mod doctor;
pub mod exit;
mod input;
mod json;
mod keys;
mod moving;
mod operate;
mod output;
mod parts;
mod port;
pub mod reference;
mod runner;
mod runners;
mod server;
mod signals;
mod storage;
mod stream;
mod tasks;
mod text;
mod work;

use std::{path::PathBuf, process::ExitCode, time::Duration};

use clap::{Args, CommandFactory as _, Parser, Subcommand, error::ErrorKind};

use self::{
    exit::{Exit, Failure, Outcome},
    output::{Format, Output},
};
use crate::{bench, client::Client, clock::Clock, config::units, tls::Trust};

/// Where a client finds its server.
pub const DEFAULT_ADDRESS: &str = "http://127.0.0.1:7070";

/// Turns a fleet of GPU hosts into a service: submit tasks, watch tokens arrive, run runners.
#[derive(Parser, Clone, Debug)]
#[command(name = "baton", version, max_term_width = 100, after_long_help = reference::exit_codes(), subcommand_required = true, arg_required_else_help = true)]
pub struct Cli {
    #[command(flatten)]
    globals: Globals,
    #[command(subcommand)]
    command: Command,
}

/// What all commands share.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Global options")]
pub struct Globals {
    /// Address of the server
    #[arg(long, global = true, env = "BATON_ADDRESS", value_name = "URL", default_value = DEFAULT_ADDRESS)]
    address: String,
    /// File with the API key; the variable `BATON_API_KEY` may hold the key itself
    #[arg(long, global = true, env = "BATON_API_KEY_FILE", value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// PEM file with the CAs that are trusted, and no others, where the address is https://…;
    /// without it the system's and the public ones are
    #[arg(long, global = true, env = "BATON_CA_CERT", value_name = "FILE")]
    ca_cert: Option<PathBuf>,
    /// PEM file with a certificate of one's own, where the server asks for one
    #[arg(long, global = true, env = "BATON_CLIENT_CERT", value_name = "FILE")]
    client_cert: Option<PathBuf>,
    /// PEM file with the key of that certificate
    #[arg(long, global = true, env = "BATON_CLIENT_KEY", value_name = "FILE")]
    client_key: Option<PathBuf>,
    /// Form of the output
    #[arg(short, long, global = true, env = "BATON_OUTPUT", value_enum, default_value = "text")]
    output: Format,
    /// Longest time: of a call (default 30s), or to wait for a task (default for ever)
    #[arg(long, global = true, env = "BATON_TIMEOUT", value_name = "DURATION", value_parser = units::parse_duration)]
    timeout: Option<Duration>,
    /// No colours; `NO_COLOR` does the same
    #[arg(long, global = true)]
    no_color: bool,
    /// No notices, summaries and progress; errors and data only
    #[arg(short, long, global = true)]
    quiet: bool,
    /// More detail on stderr; twice for more
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    /// Answer every question with yes
    #[arg(short, long, global = true)]
    yes: bool,
}

#[derive(Subcommand, Clone, Debug)]
enum Command {
    /// Start server and runner in one process, for development; data are kept
    Dev(dev::DevArgs),
    /// Submit a task and stream its tokens; leaving cancels it
    Run(work::RunArgs),
    /// Submit a task and print its id
    Submit(work::SubmitArgs),
    /// Attach to a task: its tokens from the beginning or from a position
    Follow(work::FollowArgs),
    /// Wait for tasks to end; the exit code says how they did
    Wait(work::WaitArgs),
    /// Look at tasks and steer them
    #[command(subcommand)]
    Task(tasks::TaskCommand),
    /// Put files into the server's keeping, get them, share them
    #[command(subcommand)]
    Artifact(artifacts::ArtifactCommand),
    /// Look at queues, pause and resume them
    #[command(subcommand)]
    Queue(operate::QueueCommand),
    /// Look at dead letters, retry or discard them
    #[command(subcommand)]
    Failures(operate::FailuresCommand),
    /// Start a runner; look at runners, drain, pause and change them
    #[command(subcommand)]
    Runner(runner::RunnerCommand),
    /// Start a server, or print its configuration
    #[command(subcommand)]
    Server(server::ServerCommand),
    /// Make, list and revoke API keys
    #[command(subcommand)]
    Key(keys::KeyCommand),
    /// Look at the database, migrate it, back it up
    #[command(subcommand)]
    Db(storage::DbCommand),
    /// Check the server, the credential, the runners and this machine
    Doctor(doctor::DoctorArgs),
    /// Measure this build against yardsticks on this machine
    Bench(bench::Args),
    /// Print the completion script of a shell
    Completion {
        /// Shell
        shell: clap_complete::Shell,
    },
    /// Print the version
    Version,
}

/// What a command works with.
pub struct Context {
    /// Where words go.
    pub output: Output,
    /// Time.
    pub clock: Clock,
    /// `--timeout`.
    pub timeout: Option<Duration>,
    address: String,
    api_key_file: Option<PathBuf>,
    ca_cert: Option<PathBuf>,
    client_cert: Option<PathBuf>,
    client_key: Option<PathBuf>,
}

impl Context {
    fn new(globals: &Globals) -> Self {
        Self {
            output: Output::new(
                globals.output,
                globals.quiet,
                globals.verbose,
                globals.yes,
                globals.no_color,
            ),
            clock: Clock::system(),
            timeout: globals.timeout,
            address: globals.address.clone(),
            api_key_file: globals.api_key_file.clone(),
            ca_cert: globals.ca_cert.clone(),
            client_cert: globals.client_cert.clone(),
            client_key: globals.client_key.clone(),
        }
    }

    /// Address of the server.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The API key: the named file's, else `BATON_API_KEY`.
    pub fn api_key(&self) -> Outcome<Option<String>> {
        let Some(path) = &self.api_key_file else {
            let key = std::env::var_os("BATON_API_KEY").and_then(|key| key.into_string().ok());
            return Ok(key.map(|key| key.trim().to_owned()).filter(|key| !key.is_empty()));
        };
        let text = std::fs::read_to_string(path).map_err(|error| {
            Failure::new(Exit::Auth, format!("cannot read the API key file {}: {error}", path.display()))
                .hint("make a key where you have admin: baton key create --name me --scope tasks.write --out FILE")
        })?;
        let key = text.trim().to_owned();
        if key.is_empty() {
            return Err(Failure::new(
                Exit::Auth,
                format!("the API key file {} is empty", path.display()),
            ));
        }
        Ok(Some(key))
    }

    /// Whom a client trusts, and who it is.
    pub fn trust(&self) -> Outcome<Trust> {
        let identity = match (&self.client_cert, &self.client_key) {
            (None, None) => None,
            (Some(cert), Some(key)) => Some((cert.clone(), key.clone())),
            (Some(_), None) => {
                return Err(Failure::usage("--client-cert needs its key: --client-key FILE"));
            }
            (None, Some(_)) => {
                let text = "--client-key needs its certificate: --client-cert FILE";
                return Err(Failure::usage(text));
            }
        };
        Ok(Trust { ca: self.ca_cert.clone(), identity })
    }

    /// A connected client.
    pub async fn client(&self) -> Outcome<Client> {
        let (key, trust) = (self.api_key()?, self.trust()?);
        let client = Client::connect_with(&self.address, key.as_deref(), &trust).await?;
        Ok(match self.timeout {
            Some(timeout) => client.with_timeout(timeout),
            None => client,
        })
    }
}

/// Parses the command line, runs the command and says how it went.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // clap prints help to stdout and errors to stderr; either may be closed.
            let _ = error.print();
            return match error.kind() {
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => ExitCode::SUCCESS,
                _ => ExitCode::from(Exit::Usage.code()),
            };
        }
    };
    let context = Context::new(&cli.globals);
    // It starts processes and runtimes of its own.
    if let Command::Bench(args) = cli.command {
        return ended(&context, measure(&context, args));
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let outcome = match runtime {
        Ok(runtime) => {
            let outcome = runtime.block_on(run(&context, cli.command));
            // A thread that reads stdin must not hold the exit.
            runtime.shutdown_timeout(Duration::from_millis(100));
            outcome
        }
        Err(error) => Err(Failure::new(Exit::Unexpected, format!("cannot start: {error}"))),
    };
    ended(&context, outcome)
}

fn ended(context: &Context, outcome: Outcome) -> ExitCode {
    match outcome {
        Ok(exit) => ExitCode::from(exit.code()),
        Err(failure) => {
            context.output.failure(&failure);
            ExitCode::from(failure.exit.code())
        }
    }
}

fn measure(context: &Context, args: bench::Args) -> Outcome {
    if context.output.is_text() {
        bench::run(args)?;
    } else {
        bench::run_as(args, true)?;
    }
    Ok(Exit::Ok)
}

async fn run(context: &Context, command: Command) -> Outcome {
    // Each arm's future is boxed, so that the whole stays small.
    match command {
        Command::Dev(args) => Box::pin(dev::run(context, &args)).await,
        Command::Run(args) => Box::pin(work::run(context, &args)).await,
        Command::Submit(args) => Box::pin(work::submit(context, &args)).await,
        Command::Follow(args) => Box::pin(work::follow(context, &args)).await,
        Command::Wait(args) => Box::pin(work::wait(context, &args)).await,
        Command::Task(command) => Box::pin(tasks::run(context, &command)).await,
        Command::Artifact(command) => Box::pin(artifacts::run(context, &command)).await,
        Command::Queue(command) => Box::pin(operate::queue(context, &command)).await,
        Command::Failures(command) => Box::pin(operate::failures(context, &command)).await,
        Command::Runner(command) => Box::pin(runner::run(context, &command)).await,
        Command::Server(command) => Box::pin(server::run(context, &command)).await,
        Command::Key(command) => Box::pin(keys::key(context, &command)).await,
        Command::Db(command) => Box::pin(storage::run(context, &command)).await,
        Command::Doctor(args) => Box::pin(doctor::run(context, &args)).await,
        Command::Bench(args) => measure(context, args),
        Command::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "baton", &mut script);
            context.output.raw(&String::from_utf8_lossy(&script))?;
            Ok(Exit::Ok)
        }
        Command::Version => {
            version(context)?;
            Ok(Exit::Ok)
        }
    }
}

fn version(context: &Context) -> Outcome<()> {
    let version = env!("CARGO_PKG_VERSION");
    if context.output.is_text() {
        return context.output.line(format_args!("baton {version}"));
    }
    context.output.value(&serde_json::json!({
        "version": version,
        "api_version": "baton.v1",
        "runner_protocol": 1,
        "os": std::env::consts::OS,
        "architecture": std::env::consts::ARCH,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tree_of_commands_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_wrong_flag_is_a_usage_error_and_close_ones_are_suggested() {
        let error = Cli::try_parse_from(["baton", "submit", "a/b", "--priorty", "3"]).unwrap_err();
        assert!(error.to_string().contains("--priority"), "{error}");
    }

    #[test]
    fn the_key_itself_is_no_flag() {
        assert!(Cli::try_parse_from(["baton", "--api-key", "bt_x_y", "version"]).is_err());
    }
}
