//! `server`: a server for real, and what its configuration is.

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use clap::{Args, Subcommand};

use super::{
    Context,
    exit::{Exit, Failure, Outcome},
    output::{Format, table},
    port,
    signals::Interrupts,
    storage,
};
use crate::{
    app::App,
    config::{self, Loaded, Sources},
    error::{Error, Kind},
    id::Entropy,
    telemetry::Telemetry,
    tls,
};

/// Where the configuration comes from.
#[derive(Args, Clone, Debug, Default)]
pub struct ConfigArgs {
    /// Configuration file, TOML
    #[arg(long, env = "BATON_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where the one port listens; port 0 picks a free one
    #[arg(long, value_name = "ADDR", value_parser = socket_addr)]
    addr: Option<SocketAddr>,
    /// Directory of the database and the files
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Where artifacts lie: `file`, in the data directory, or `s3://bucket/prefix`
    #[arg(long, value_name = "STORE")]
    artifact_store: Option<String>,
    /// Database of a Postgres server, as `postgres://user:password@host:5432/name`; other users of
    /// the machine see it here, but not in the variable `BATON_DATABASE_URL`
    #[arg(long, value_name = "URL")]
    database_url: Option<String>,
    #[command(flatten)]
    tls: TlsArgs,
}

/// With which certificate a server speaks TLS.
#[derive(Args, Clone, Debug, Default)]
pub struct TlsArgs {
    /// Speak TLS: PEM file with the server's certificate, leaf first; read again when it changes
    #[arg(long = "tls-cert", value_name = "FILE")]
    cert: Option<PathBuf>,
    /// PEM file with the key of the certificate
    #[arg(long = "tls-key", value_name = "FILE")]
    key: Option<PathBuf>,
    /// PEM file with the CAs of which clients must show a certificate
    #[arg(long = "tls-client-ca", value_name = "FILE")]
    client_ca: Option<PathBuf>,
}

impl TlsArgs {
    /// Adds what was given.
    pub fn add_to(&self, sources: &mut Sources) {
        for (key, file, flag) in [
            ("tls.cert", &self.cert, "--tls-cert"),
            ("tls.key", &self.key, "--tls-key"),
            ("tls.client_ca", &self.client_ca, "--tls-client-ca"),
        ] {
            if let Some(file) = file {
                sources.flag(key, file.display(), flag);
            }
        }
    }
}

impl ConfigArgs {
    /// The layers: defaults, file, variables, flags.
    pub fn sources(&self) -> Sources {
        let mut sources = Sources::process(self.config.clone());
        if let Some(addr) = self.addr {
            sources.flag("server.addr", addr, "--addr");
        }
        if let Some(dir) = &self.data_dir {
            sources.flag("storage.data_dir", dir.display(), "--data-dir");
        }
        if let Some(store) = &self.artifact_store {
            sources.flag("artifacts.store", store, "--artifact-store");
        }
        if let Some(url) = &self.database_url {
            sources.flag("database.url", url, "--database-url");
        }
        self.tls.add_to(&mut sources);
        sources
    }

    /// The configuration in effect.
    pub fn load(&self) -> Outcome<Loaded> {
        Ok(config::load(&self.sources())?)
    }
}

/// Commands of `server`.
#[derive(Subcommand, Clone, Debug)]
pub enum ServerCommand {
    /// Start a server; credentials are required
    Start(ConfigArgs),
    /// Print the configuration in effect, and check it
    PrintConfig {
        #[command(flatten)]
        config: ConfigArgs,
        /// Also print where each value came from, and the variable that sets it
        #[arg(long)]
        origin: bool,
    },
}

/// Runs a command of `server`.
pub async fn run(context: &Context, command: &ServerCommand) -> Outcome {
    match command {
        ServerCommand::Start(args) => start(context, args).await,
        ServerCommand::PrintConfig { config, origin } => {
            let loaded = config.load()?;
            print_config(context, &loaded, *origin)?;
            Ok(Exit::Ok)
        }
    }
}

async fn start(context: &Context, args: &ConfigArgs) -> Outcome {
    let config = args.load()?.config;
    let telemetry = Telemetry::init(&config.telemetry)?;
    let data_dir = config.storage.data_dir.clone();
    let wanted = config.server.addr;
    let app = App::start(config, context.clock.clone(), Entropy::system())
        .await
        .map_err(|error| start_failure(error, "baton server start", Some(wanted)))?;
    let how = if app.is_tls { ", with TLS" } else { "" };
    context.output.note(format!("baton {} serves on {}{how}", env!("CARGO_PKG_VERSION"), app.addr));
    context.output.next("data", data_dir.display());
    if let Some(path) = &app.first_key {
        context.output.next("first admin key", path.display());
        context.output.next(
            "try it",
            format_args!(
                "baton --address {} --api-key-file {} doctor",
                local_url(&app),
                path.display()
            ),
        );
    }
    let mut interrupts = Interrupts::new()?;
    until_stopped(&app, &mut interrupts).await;
    stop(app, telemetry, interrupts).await
}

/// An address to listen on.
pub fn socket_addr(text: &str) -> Result<SocketAddr, String> {
    let numeric = text.strip_prefix("localhost:").map(|port| format!("127.0.0.1:{port}"));
    let parsed = numeric.as_deref().unwrap_or(text).parse();
    parsed.map_err(|_| "write an IP address and a port, such as 127.0.0.1:7070".into())
}

/// The address under which this machine reaches a server.
pub fn local_url(app: &App) -> String {
    local_url_of(app.addr, app.is_tls)
}

fn local_url_of(mut addr: SocketAddr, is_tls: bool) -> String {
    if addr.ip().is_unspecified() {
        addr.set_ip(match addr {
            SocketAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            SocketAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        });
    }
    let scheme = if is_tls { "https" } else { "http" };
    format!("{scheme}://{addr}")
}

/// Waits for a signal, or for the server to ask for its own end.
pub async fn until_stopped(app: &App, interrupts: &mut Interrupts) {
    tokio::select! {
        () = interrupts.next() => {}
        () = app.stopped() => {}
    }
}

/// Ends a server in order; a second signal ends it at once.
pub async fn stop(app: App, telemetry: Telemetry, mut interrupts: Interrupts) -> Outcome {
    let failures = app.supervisor.failures();
    let ended = async {
        app.shutdown().await?;
        telemetry.shutdown().await;
        anyhow::Ok(())
    };
    tokio::select! {
        ended = ended => ended?,
        () = interrupts.next() => return Ok(Exit::Interrupted),
    }
    if failures.is_empty() {
        return Ok(Exit::Ok);
    }
    Err(Failure::new(Exit::Unexpected, "the server stopped by itself").cause(failures.join("; ")))
}

/// Why a server did not start, with what to do about it.
pub fn start_failure(error: anyhow::Error, command: &str, addr: Option<SocketAddr>) -> Failure {
    let busy = error.chain().any(|cause| {
        cause
            .downcast_ref::<std::io::Error>()
            .is_some_and(|e| e.kind() == std::io::ErrorKind::AddrInUse)
    }) || error.to_string().contains("is in use; stop the other program");
    if let Some(addr) = addr.filter(|_| busy) {
        let failure = Failure::new(Exit::Conflict, format!("the address {addr} is in use"));
        let failure = match port::holder(addr) {
            Some(holder) => failure.cause(format!("it is held by {holder}")),
            None => failure,
        };
        let free = SocketAddr::new(addr.ip(), 0);
        return failure
            .hint(format!("take any free port: {command} --addr {free}"))
            .hint(format!("is it a baton server? ask it: baton doctor --address http://{addr}"));
    }
    if error.to_string().starts_with("cannot listen on") {
        return Failure { exit: Exit::Usage, ..Failure::from(error) }.hint(format!(
            "choose an address and a port of your own: {command} --addr 127.0.0.1:7070"
        ));
    }
    if error.is::<tls::Error>() {
        return Failure { exit: Exit::Usage, ..Failure::from(error) }
            .hint("see where it comes from: baton server print-config --origin");
    }
    if let Some(inner) = error.downcast_ref::<Error>().filter(|e| e.kind() == Kind::Unavailable) {
        return storage::unusable(error.to_string(), inner);
    }
    let failure = Failure::from(error);
    if failure.message.contains("data directory") && failure.message.contains("in use") {
        return Failure { exit: Exit::Conflict, ..failure }
            .hint(format!("choose another directory: {command} --data-dir DIR"));
    }
    if failure.message.contains("data directory") {
        return Failure { exit: Exit::Usage, ..failure }
            .hint(format!("choose a directory that you may write: {command} --data-dir DIR"));
    }
    failure
}

fn print_config(context: &Context, loaded: &Loaded, origin: bool) -> Outcome<()> {
    let output = &context.output;
    if output.format != Format::Text {
        let entries: Vec<_> = loaded
            .entries
            .iter()
            .map(|entry| {
                serde_json::json!({ "key": entry.key, "value": entry.value,
                    "origin": entry.origin.to_string(), "env": entry.env })
            })
            .collect();
        return output.value(&serde_json::json!({ "config": entries }));
    }
    if origin {
        let rows = loaded.entries.iter().map(|entry| {
            vec![
                entry.key.clone(),
                entry.value.clone(),
                entry.origin.to_string(),
                entry.env.clone(),
            ]
        });
        return output.raw(&table(&["key", "value", "origin", "variable"], rows));
    }
    let mut section = String::new();
    for entry in &loaded.entries {
        let (head, name) = entry.key.split_once('.').unwrap_or(("", &entry.key));
        if head != section {
            let blank = if section.is_empty() { "" } else { "\n" };
            output.raw(&format!("{blank}[{head}]\n"))?;
            head.clone_into(&mut section);
        }
        output.line(format_args!("{name} = {}", entry.value))?;
    }
    Ok(())
}

/// Writes a secret to a new file that its owner alone can read.
pub fn write_secret(path: &std::path::Path, secret: &str) -> Outcome<()> {
    use std::{io::Write as _, os::unix::fs::OpenOptionsExt as _};
    let written = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .and_then(|mut file| writeln!(file, "{secret}").and_then(|()| file.sync_all()));
    written.map_err(|error| {
        Failure::usage(format!("cannot write the secret to {}: {error}", path.display()))
            .hint("name a new file in a directory that exists: --out FILE")
    })
}

/// How long a development server may take to end.
pub const DEV_GRACE: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    #[test]
    fn an_address_to_listen_on_is_numeric_or_localhost() {
        assert_eq!(socket_addr("localhost:0"), Ok(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))));
        assert!(socket_addr("host:1").is_err_and(|error| error.contains("127.0.0.1:7070")));
    }

    #[test]
    fn a_server_on_all_addresses_is_reached_on_loopback() {
        let url = |ip: IpAddr, is_tls| local_url_of(SocketAddr::from((ip, 80)), is_tls);
        assert_eq!(url([0; 4].into(), false), "http://127.0.0.1:80");
        assert_eq!(url([0u16; 8].into(), true), "https://[::1]:80");
        assert_eq!(url([10, 0, 0, 7].into(), false), "http://10.0.0.7:80");
    }

    #[test]
    fn an_address_of_another_machine_is_refused_with_one_that_works() {
        let cause = std::io::Error::from(std::io::ErrorKind::AddrNotAvailable);
        let error = anyhow::Error::new(cause).context("cannot listen on 10.9.9.9:7000");
        let failure = start_failure(error, "baton dev", None);
        assert_eq!(failure.exit, Exit::Usage);
        assert_eq!(failure.hints.len(), 1, "{failure:?}");
    }
}
