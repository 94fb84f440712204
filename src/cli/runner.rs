//! `runner`: start an agent, and look at those that are connected.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Subcommand, ValueEnum};

use super::{
    Context,
    exit::{Exit, Failure, Outcome},
    input, runners,
    signals::Interrupts,
};
use crate::{
    agent::{
        self, Mode, Shutdown,
        engine::{self, ngram, openai},
    },
    config::{self, units},
    id::Entropy,
    supervisor::Supervisor,
    telemetry::Telemetry,
};

/// Commands of `runner`.
#[derive(Subcommand, Clone, Debug)]
pub enum RunnerCommand {
    /// Start a runner on this machine; Ctrl-C drains it, a second one stops it now
    Start(Box<StartArgs>),
    /// List connected runners
    List,
    /// Show a runner
    Get {
        /// Runner
        runner: String,
    },
    /// Ask a runner to take no more work
    Drain(runners::DrainArgs),
    /// Ask a runner to take no work for now; what it has goes on
    Pause {
        /// Runner
        runner: String,
    },
    /// Ask a paused or drained runner to take work again
    Resume {
        /// Runner
        runner: String,
    },
    /// Load a model on a runner, or unload it
    Apply(runners::ApplyArgs),
    /// Load anew what a runner has loaded
    Reload(runners::ReloadArgs),
    /// Set parameters of a runner's engine
    Tune(runners::TuneArgs),
}

/// Which engine executes tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum EngineName {
    /// Sends the input back
    Echo,
    /// A small language model, trained at start on a text
    Ngram,
    /// A server that speaks the OpenAI API: vLLM, llama.cpp, TGI
    Openai,
}

/// How the runner talks to the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ModeName {
    /// Streams, and unary calls where streams keep breaking
    Auto,
    /// Streams alone
    Stream,
    /// Unary calls alone
    Poll,
}

/// Arguments of `runner start`.
#[derive(Args, Clone, Debug)]
pub struct StartArgs {
    /// Engine that executes the tasks
    #[arg(long, value_enum, env = "BATON_RUNNER_ENGINE")]
    engine: EngineName,
    /// Model that it serves, owner/name, owner/name@version or *; may be given several times
    #[arg(long, env = "BATON_RUNNER_MODELS", value_delimiter = ',')]
    model: Vec<String>,
    /// Serve no model until `runner apply` loads one
    #[arg(long, conflicts_with = "model")]
    no_model: bool,
    /// Most tasks at once
    #[arg(long, default_value_t = 1, env = "BATON_RUNNER_SLOTS", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    slots: u32,
    /// Stable name, unique in the namespace; the host's with a suffix when absent
    #[arg(long, env = "BATON_RUNNER_NAME")]
    name: Option<String>,
    /// Label that tasks may require, k=v
    #[arg(long, value_name = "K=V")]
    label: Vec<String>,
    /// Pool that it belongs to
    #[arg(long)]
    pool: Vec<String>,
    /// After the first signal, tasks still running by then are handed back
    #[arg(long, value_parser = units::parse_duration, default_value = "5m", value_name = "DURATION")]
    drain_time: Duration,
    /// How to talk to the server
    #[arg(long, value_enum, default_value = "auto")]
    mode: ModeName,
    /// Let events wait this long to travel together
    #[arg(long, value_parser = units::parse_duration, default_value = "0s", value_name = "DURATION")]
    flush_interval: Duration,
    /// openai: base address of the server, such as <http://127.0.0.1:8000/v1>
    #[arg(long, value_name = "URL", help_heading = "Engine openai")]
    upstream: Option<String>,
    /// openai: name of the model there; the task's when absent
    #[arg(long, value_name = "NAME", help_heading = "Engine openai")]
    upstream_model: Option<String>,
    /// openai: file with the key of that server
    #[arg(long, value_name = "FILE", help_heading = "Engine openai")]
    upstream_key_file: Option<PathBuf>,
    /// ngram: text to train on; a public-domain text is built in
    #[arg(long, value_name = "FILE", help_heading = "Engine ngram")]
    corpus: Option<PathBuf>,
    /// ngram: directory whose files `runner apply -i path=…` may train on; none when absent
    #[arg(long, value_name = "DIR", help_heading = "Engine ngram")]
    corpus_dir: Option<PathBuf>,
    /// ngram: pace; as fast as possible when absent
    #[arg(long, value_name = "N", help_heading = "Engine ngram")]
    tokens_per_second: Option<f64>,
}

/// Runs a command of `runner`.
pub async fn run(context: &Context, command: &RunnerCommand) -> Outcome {
    match command {
        RunnerCommand::Start(args) => start(context, args).await,
        RunnerCommand::List => runners::list(context).await,
        RunnerCommand::Get { runner } => runners::get(context, runner).await,
        RunnerCommand::Drain(args) => runners::drain(context, args).await,
        RunnerCommand::Pause { runner } => runners::pause(context, runner).await,
        RunnerCommand::Resume { runner } => runners::resume(context, runner).await,
        RunnerCommand::Apply(args) => runners::apply(context, args).await,
        RunnerCommand::Reload(args) => runners::reload(context, args).await,
        RunnerCommand::Tune(args) => runners::tune(context, args).await,
    }
}

impl StartArgs {
    fn settings(&self) -> Outcome<engine::Settings> {
        let foreign = |flag: &str, set: bool, engine: EngineName| {
            if set && self.engine != engine {
                return Err(Failure::usage(format!("{flag} belongs to another engine")));
            }
            Ok(())
        };
        foreign("--upstream", self.upstream.is_some(), EngineName::Openai)?;
        foreign("--upstream-model", self.upstream_model.is_some(), EngineName::Openai)?;
        foreign("--upstream-key-file", self.upstream_key_file.is_some(), EngineName::Openai)?;
        foreign("--corpus", self.corpus.is_some(), EngineName::Ngram)?;
        foreign("--corpus-dir", self.corpus_dir.is_some(), EngineName::Ngram)?;
        foreign("--tokens-per-second", self.tokens_per_second.is_some(), EngineName::Ngram)?;
        Ok(match self.engine {
            EngineName::Echo => engine::Settings::Echo,
            EngineName::Ngram => engine::Settings::Ngram(ngram::Settings {
                corpus: self.corpus.clone(),
                corpora: self.corpus_dir.clone(),
                tokens_per_second: self.tokens_per_second,
            }),
            EngineName::Openai => {
                let Some(url) = &self.upstream else {
                    return Err(Failure::usage("the engine openai needs --upstream").hint(
                        "baton runner start --engine openai --upstream http://127.0.0.1:8000/v1",
                    ));
                };
                let mut settings = openai::Settings::new(url.clone());
                settings.model.clone_from(&self.upstream_model);
                if let Some(path) = &self.upstream_key_file {
                    let key = std::fs::read_to_string(path).map_err(|error| {
                        Failure::usage(format!("cannot read {}: {error}", path.display()))
                    })?;
                    settings.api_key = Some(key.trim().to_owned());
                }
                engine::Settings::OpenAi(settings)
            }
        })
    }
}

async fn start(context: &Context, args: &StartArgs) -> Outcome {
    let entropy = Entropy::system();
    let mut config = agent::Config::new(context.address(), args.settings()?, &entropy);
    config.api_key = context.api_key()?;
    config.trust = context.trust()?;
    if let Some(name) = &args.name {
        config.runner_id.clone_from(name);
    }
    config.labels = input::pairs("--label", &args.label)?;
    config.pools.clone_from(&args.pool);
    if args.no_model {
        config.models.clear();
    } else if !args.model.is_empty() {
        config.models.clone_from(&args.model);
    }
    config.slots = args.slots;
    config.drain_time = args.drain_time;
    config.flush_interval = args.flush_interval;
    config.mode = match args.mode {
        ModeName::Auto => Mode::Auto,
        ModeName::Stream => Mode::Stream,
        ModeName::Poll => Mode::Poll,
    };
    let loaded = config::load(&config::Sources::process(None))?;
    let telemetry = Telemetry::init(&loaded.config.telemetry)?;
    let output = &context.output;
    output.note(format!("runner {} dials {}", config.runner_id, config.server));
    output.next("see it", format_args!("baton runner get {}", config.runner_id));
    output.next("stop it", "Ctrl-C finishes what runs, a second one stops now");

    let supervisor = Supervisor::new();
    let shutdown = Shutdown::default();
    watch_signals(&supervisor, &shutdown, output.clone())?;
    let name = config.runner_id.clone();
    let ended = Box::pin(agent::run(config, context.clock.clone(), entropy, shutdown)).await;
    telemetry.shutdown().await;
    match ended {
        Ok(()) => {
            output.note(format!("runner {name} has left"));
            Ok(Exit::Ok)
        }
        Err(error) => {
            let failure = match error.downcast_ref::<tonic::Status>() {
                Some(status) => Failure::of_call("connect the runner", status),
                None => Failure::new(Exit::Usage, format!("{error:#}")),
            };
            Err(failure)
        }
    }
}

/// The first signal drains, the second stops.
fn watch_signals(
    supervisor: &Supervisor,
    shutdown: &Shutdown,
    output: super::output::Output,
) -> Outcome<()> {
    let mut interrupts = Interrupts::new()?;
    let shutdown = shutdown.clone();
    supervisor.spawn("signals", async move {
        for token in [&shutdown.drain, &shutdown.stop] {
            interrupts.next().await;
            if !shutdown.drain.is_cancelled() {
                output.note("draining: no new work; a second signal stops now");
            }
            token.cancel();
        }
    });
    Ok(())
}
