//! `dev`: server and runner in one process, ready in a moment.

use std::fmt::Write as _;
use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

use clap::Args;
use serde_json::json;

use super::{
    Context,
    exit::{Exit, Failure, Outcome},
    server::{DEV_GRACE, TlsArgs, local_url, socket_addr, start_failure, stop, until_stopped},
    signals::Interrupts,
    stream::Printer,
};
use crate::{
    agent::{
        self, Shutdown,
        engine::{self, ngram},
    },
    app::{App, make_data_dir},
    client::{Client, Update},
    config::{self, Config, Sources},
    id::Entropy,
    json::struct_from_map,
    pb,
    telemetry::Telemetry,
    tls::{self, Trust, own::Own},
};

/// The model of the built-in n-gram engine.
pub const NGRAM: &str = "baton/ngram";
/// The model of the built-in echo engine.
pub const ECHO: &str = "baton/echo";

/// What the demonstration asks the model to go on with.
const PROMPT: &str = "Alice was beginning to";
/// A seed that says something amusing.
const DEMO_SEED: u64 = 8;
/// A pace at which one sees the tokens arrive.
const DEMO_PACE: f64 = 40.0;

/// Arguments of `dev`.
#[derive(Args, Clone, Debug)]
pub struct DevArgs {
    /// Submit a task to the n-gram model and stream it here
    #[arg(long)]
    demo: bool,
    /// Keep nothing: data go to a directory that is removed at the end
    #[arg(long, conflicts_with = "data_dir")]
    ephemeral: bool,
    /// Directory of the data
    #[arg(long, value_name = "DIR", default_value = ".baton")]
    data_dir: PathBuf,
    /// Where to listen; port 0 picks a free one
    #[arg(long, value_name = "ADDR", env = "BATON_SERVER_ADDR", default_value = "127.0.0.1:7070", value_parser = socket_addr)]
    addr: SocketAddr,
    /// Speak TLS, with a certificate for this machine that is made in the data directory
    #[arg(long, conflicts_with_all = ["cert", "key"])]
    tls: bool,
    #[command(flatten)]
    files: TlsArgs,
    /// Require API keys, as a server does; needed to listen beyond this machine
    #[arg(long)]
    auth: bool,
    /// Tasks that each built-in runner executes at once
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    slots: u32,
    /// Start no runner
    #[arg(long, conflicts_with = "demo")]
    no_runner: bool,
}

/// A directory that goes with the process.
struct Ephemeral(PathBuf);

impl Ephemeral {
    fn new() -> Outcome<Self> {
        let name = format!("baton-{:016x}", Entropy::system().u64());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).map_err(|error| {
            Failure::new(Exit::Unexpected, format!("cannot make {}: {error}", path.display()))
        })?;
        Ok(Self(path))
    }
}

impl Drop for Ephemeral {
    fn drop(&mut self) {
        // It lies in the system's directory for such things; what is left is swept there.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A server that runs, and how it is reached.
struct Here<'a> {
    args: &'a DevArgs,
    app: &'a App,
    data_dir: &'a Path,
    key: Option<String>,
    trust: Trust,
    own: Option<Own>,
}

/// Runs until a signal comes.
pub async fn run(context: &Context, args: &DevArgs) -> Outcome {
    let ephemeral = args.ephemeral.then(Ephemeral::new).transpose()?;
    let data_dir = ephemeral.as_ref().map_or(&args.data_dir, |dir| &dir.0).clone();
    let own = certificate(context, args, &data_dir)?;
    let config = configure(context, args, &data_dir, own.as_ref())?;
    let mut trust = context.trust()?;
    if let Some(own) = &own {
        trust.ca = Some(own.ca.clone());
    }
    let telemetry = Telemetry::init(&config.telemetry)?;
    let entropy = Entropy::system();
    let app = App::start(config, context.clock.clone(), entropy.clone())
        .await
        .map_err(|error| start_failure(error, "baton dev", Some(args.addr)))?;
    let key = admin_key(args, &data_dir)?;
    let here = Here { args, app: &app, data_dir: &data_dir, key, trust, own };
    let drain = Shutdown::default();
    let mut interrupts = Interrupts::new()?;
    if let Err(failure) = here.reach().await {
        stop(app, telemetry, interrupts).await?;
        return Err(failure);
    }
    if !args.no_runner {
        here.start_runners(context, &drain, &entropy);
    }
    here.banner(context).await;
    let shown = tokio::select! {
        () = until_stopped(&app, &mut interrupts) => None,
        shown = here.demo(context) => Some(shown),
    };
    if let Some(Ok(())) = shown {
        until_stopped(&app, &mut interrupts).await;
    }
    context.output.note("\nstopping");
    drain.stop.cancel();
    let exit = stop(app, telemetry, interrupts).await;
    match shown {
        Some(Err(failure)) => Err(failure),
        Some(Ok(())) | None => exit,
    }
}

/// With `--tls`, the certificate that lies in the data directory, or a new one.
fn certificate(context: &Context, args: &DevArgs, data_dir: &Path) -> Outcome<Option<Own>> {
    if !args.tls {
        return Ok(None);
    }
    make_data_dir(data_dir)?;
    // Others are told its path, wherever they are.
    let dir = std::fs::canonicalize(data_dir).unwrap_or_else(|_| data_dir.to_owned()).join("tls");
    let made = tls::own::certificate(&dir, context.clock.now());
    made.map(Some).map_err(|error| Failure::new(Exit::Unexpected, error.to_string()))
}

fn configure(
    context: &Context,
    args: &DevArgs,
    data_dir: &Path,
    own: Option<&Own>,
) -> Outcome<Config> {
    if !args.auth && !args.addr.ip().is_loopback() {
        return Err(Failure::usage(format!(
            "refusing to listen on {} without credentials: everybody who reaches it would be an admin",
            args.addr
        ))
        .hint(format!("require API keys: baton dev --addr {} --auth", args.addr))
        .hint("or stay on this machine: baton dev --addr 127.0.0.1:7070"));
    }
    let mut sources = Sources::process(None);
    // Log lines would mix with the tokens, so only what matters is shown.
    let filter = match context.output.verbose {
        0 => "warn",
        1 => "info",
        _ => "debug",
    };
    if !sources.env.contains_key("BATON_TELEMETRY_LOG_FILTER") {
        sources.flag("telemetry.log_filter", filter, "-v");
    }
    sources.flag("server.addr", args.addr, "--addr");
    sources.flag("server.shutdown_grace", config::units::format_duration(DEV_GRACE), "dev");
    sources.flag("storage.data_dir", data_dir.display(), "--data-dir");
    sources.flag("auth.required", args.auth, "--auth");
    sources.flag("auth.open_reflection", true, "dev");
    args.files.add_to(&mut sources);
    if let Some(own) = own {
        sources.flag("tls.cert", own.cert.display(), "--tls");
        sources.flag("tls.key", own.key.display(), "--tls");
    }
    Ok(config::load(&sources)?.config)
}

/// With `--auth`, the key that the first start left in the data directory.
fn admin_key(args: &DevArgs, data_dir: &Path) -> Outcome<Option<String>> {
    if !args.auth {
        return Ok(None);
    }
    let path = data_dir.join("admin.key");
    let key = std::fs::read_to_string(&path).map_err(|error| {
        Failure::new(Exit::Auth, format!("cannot read the admin key {}: {error}", path.display()))
            .hint("start with new data: baton dev --auth --ephemeral")
    })?;
    Ok(Some(key.trim().to_owned()))
}

impl Here<'_> {
    async fn client(&self) -> Outcome<Client> {
        let url = local_url(self.app);
        Ok(Client::connect_with(&url, self.key.as_deref(), &self.trust).await?)
    }

    /// With certificates from elsewhere, sees whether this process itself can get in.
    async fn reach(&self) -> Outcome<()> {
        if !self.app.is_tls || self.args.no_runner {
            return Ok(());
        }
        let client = self.client().await?;
        let request = pb::ListTasksRequest { page_size: 1, ..Default::default() };
        let listed = client.once(client.tasks().list_tasks(request)).await;
        listed
            .map(drop)
            .map_err(|error| Failure::of_call("reach the server that was started", &error))
    }

    fn start_runners(&self, context: &Context, shutdown: &Shutdown, entropy: &Entropy) {
        let ngram = engine::Settings::Ngram(ngram::Settings::default());
        for (name, settings, model) in
            [("dev-ngram", ngram, NGRAM), ("dev-echo", engine::Settings::Echo, ECHO)]
        {
            let mut config = agent::Config::new(local_url(self.app), settings, entropy);
            config.api_key.clone_from(&self.key);
            config.trust.clone_from(&self.trust);
            config.runner_id = name.into();
            config.models = vec![model.into()];
            config.slots = self.args.slots;
            config.engine_threads = 0;
            let (clock, entropy, shutdown) =
                (context.clock.clone(), entropy.clone(), shutdown.clone());
            self.app.supervisor.spawn("dev runner", async move {
                let ended = Box::pin(agent::run(config, clock, entropy, shutdown)).await;
                if let Err(error) = ended {
                    tracing::error!(runner = name, "the built-in runner stopped: {error:#}");
                }
            });
        }
    }

    async fn banner(&self, context: &Context) {
        let (output, args, data_dir) = (&context.output, self.args, self.data_dir);
        let url = local_url(self.app);
        let place = match (args.ephemeral, std::fs::canonicalize(data_dir)) {
            (true, _) => "none; removed at the end (--ephemeral)".to_owned(),
            (false, Ok(path)) => path.display().to_string(),
            (false, Err(_)) => data_dir.display().to_string(),
        };
        let gpus: Vec<String> = agent::gpus().await.into_iter().map(|gpu| gpu.name).collect();
        let gpus = if gpus.is_empty() { "none".into() } else { gpus.join(", ") };
        let models =
            if args.no_runner { "none (--no-runner)".into() } else { format!("{NGRAM}, {ECHO}") };
        let access = if args.auth {
            format!("API key required; admin key in {}", data_dir.join("admin.key").display())
        } else {
            "open on this machine, no key needed".into()
        };
        output.note(format!("baton {}\n", env!("CARGO_PKG_VERSION")));
        let tls = self.own.as_ref().map(|own| ("CA", own.ca.display().to_string()));
        let lines = [
            ("gRPC", url.clone()),
            ("JSON", format!("{url}/v1")),
            ("docs", format!("{url}/docs")),
            ("health", format!("{url}/readyz")),
            ("metrics", format!("{url}/metrics")),
            ("data", place),
            ("storage", "SQLite, single node".into()),
            ("access", access),
            ("models", models),
            ("GPUs", gpus),
        ];
        for (name, value) in lines.into_iter().chain(tls) {
            output.note(format!("  {} {value}", output.dim(&format!("{name:<8}"))));
        }
        if let Some(own) = &self.own {
            let ca = quoted(&own.ca);
            output.note("\nlet other programs trust it: the CA vouches for this server alone\n");
            for line in [
                format!("curl --cacert {ca} {url}/readyz"),
                format!("export NODE_EXTRA_CA_CERTS={ca}"),
                format!("export SSL_CERT_FILE={ca} GRPC_DEFAULT_SSL_ROOTS_FILE_PATH={ca}"),
            ] {
                output.note(format!("  {line}"));
            }
        }
        let prefix = self.prefix();
        output.note("\nin another terminal, try\n");
        if let Some(exe) = unnamed() {
            output.note(format!("  alias baton={}", quoted(&exe)));
        }
        for command in [
            format!("{prefix} run {NGRAM} -i prompt=\"{PROMPT}\""),
            format!("{prefix} submit {ECHO} -i text=hello --follow"),
            format!("{prefix} task list"),
            format!("{prefix} --help"),
        ] {
            output.note(format!("  {command}"));
        }
        output.note("\nCtrl-C stops it\n");
    }

    /// How a command that reaches this server begins.
    fn prefix(&self) -> String {
        let mut prefix = String::from("baton");
        let url = local_url(self.app);
        if url != super::DEFAULT_ADDRESS {
            let _ = write!(prefix, " --address {url}");
        }
        if let Some(own) = &self.own {
            let _ = write!(prefix, " --ca-cert {}", quoted(&own.ca));
        }
        if self.args.auth {
            let file = self.data_dir.join("admin.key");
            let file = std::fs::canonicalize(&file).unwrap_or(file);
            let _ = write!(prefix, " --api-key-file {}", quoted(&file));
        }
        prefix
    }

    /// Runs the demonstration, if asked to.
    async fn demo(&self, context: &Context) -> Outcome<()> {
        if !self.args.demo {
            return Ok(());
        }
        let output = &context.output;
        let client = self.client().await?;
        output.note(format!("demo: {NGRAM}, a small language model, continues a prompt\n"));
        let map = |value: serde_json::Value| match value {
            serde_json::Value::Object(map) => Some(struct_from_map(map)),
            _ => None,
        };
        let spec = pb::TaskSpec {
            model: NGRAM.into(),
            input: map(json!({ "prompt": PROMPT })),
            params: map(
                json!({ "max_tokens": 100, "temperature": 0.9, "tokens_per_second": DEMO_PACE }),
            ),
            seed: Some(DEMO_SEED),
            ..Default::default()
        };
        let request = pb::SubmitTaskRequest { spec: Some(spec), request_id: client.request_id() };
        let response =
            client.submit(request).await.map_err(|e| Failure::of_call("submit the task", &e))?;
        let id = response.task.unwrap_or_default().task_id;
        // The prompt is no token, but the tokens go on from it.
        let mut printer = Printer::new(output, &id).with_lead(output.dim(PROMPT));
        let mut follow = client.follow(&id, 1);
        while let Some(update) = follow
            .next()
            .await
            .map_err(|error| Failure::of_call(&format!("follow task {id}"), &error))?
        {
            if let Update::Event(event) = update {
                printer.event(&event)?;
            }
        }
        printer.finish()?;
        output.note("\nthe server stays up; see what happened, in another terminal:\n");
        output.note(format!("  {} task events {id}", self.prefix()));
        Ok(())
    }
}

/// This binary, unless the shell finds it as `baton`: cargo runs it from where it was built.
fn unnamed() -> Option<PathBuf> {
    let exe = std::env::current_exe().and_then(std::fs::canonicalize).ok()?;
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found =
        std::env::split_paths(&path).find_map(|dir| std::fs::canonicalize(dir.join("baton")).ok());
    (found.as_ref() != Some(&exe)).then_some(exe)
}

/// A path as one word of a shell.
fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = text.chars().all(|c| c.is_ascii_alphanumeric() || "/._-+".contains(c));
    if plain { text } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_one_word_of_a_shell() {
        assert_eq!(quoted(Path::new("/opt/baton-1.0/baton")), "/opt/baton-1.0/baton");
        assert_eq!(quoted(Path::new("/my dir/it's")), r"'/my dir/it'\''s'");
    }

    #[test]
    fn a_test_binary_is_not_what_the_shell_calls_baton() {
        assert_eq!(unnamed(), std::env::current_exe().and_then(std::fs::canonicalize).ok());
    }
}
