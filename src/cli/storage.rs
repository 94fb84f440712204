//! `db`: what an operator does to the database.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use clap::{Args, Subcommand};
use serde_json::json;

use super::{
    Context,
    exit::{Exit, Failure, Outcome, root_cause},
    moving,
    output::fields,
    server::{self, ConfigArgs},
};
use crate::{
    app,
    config::{Config, units::parse_duration},
    db::{self, Db, Engine, Location},
    error::{Error, Kind},
    id::Entropy,
    instances::Mandate,
    tasks::housekeeping,
};

/// Which database.
#[derive(Args, Clone, Debug)]
pub struct Place {
    #[command(flatten)]
    config: ConfigArgs,
}

impl Place {
    /// The configuration, and where it has the database.
    pub fn find(&self) -> Outcome<(Config, Location)> {
        let config = self.config.load()?.config;
        let at = app::database(&config);
        Ok((config, at))
    }
}

/// Commands of `db`.
#[derive(Subcommand, Clone, Debug)]
pub enum DbCommand {
    /// Show the migrations, the size and how commits reach the disk; the server may run
    Status(Place),
    /// Apply pending migrations; a server does so when it starts
    Migrate {
        #[command(flatten)]
        place: Place,
        /// Only show what would be applied
        #[arg(long)]
        dry_run: bool,
    },
    /// Write a consistent copy; the server may run. Of Postgres, an archive of `pg_dump`
    Backup {
        #[command(flatten)]
        place: Place,
        /// New file to write
        to: PathBuf,
    },
    /// Put a copy where there is no database yet; the server must not run
    Restore {
        #[command(flatten)]
        place: Place,
        /// A file that `db backup` wrote
        from: PathBuf,
    },
    /// Write everything that is kept to one file: rows, artifacts and transcripts
    Export(moving::ExportArgs),
    /// Make an installation of what `db export` wrote, on whatever keeps it here
    Import(moving::ImportArgs),
    /// Delete what the retention policies let go; the server does so every ten minutes
    Gc {
        #[command(flatten)]
        place: Place,
        /// Delete tasks that ended this long ago, whatever the policies say, dead letters excepted
        #[arg(long, value_name = "AGE", value_parser = parse_duration)]
        older_than: Option<Duration>,
    },
}

/// Runs a command of `db`.
pub async fn run(context: &Context, command: &DbCommand) -> Outcome {
    match command {
        DbCommand::Status(place) => {
            let (_, at) = place.find()?;
            print(context, &at, &look(&at).await?)?;
        }
        DbCommand::Migrate { place, dry_run } => migrate(context, place, *dry_run).await?,
        DbCommand::Backup { place, to } => backup(context, place, to).await?,
        DbCommand::Restore { place, from } => restore(context, place, from).await?,
        DbCommand::Export(args) => moving::export(context, args).await?,
        DbCommand::Import(args) => moving::import(context, args).await?,
        DbCommand::Gc { place, older_than } => collect(context, place, *older_than).await?,
    }
    Ok(Exit::Ok)
}

async fn look(at: &Location) -> Outcome<db::Status> {
    db::status(at).await.map_err(|error| failure("look at", at, error))
}

/// The data directory of a database file, made when it is missing.
fn make_dir(at: &Location, command: &str) -> Outcome<()> {
    if let Location::File(path) = at {
        app::make_data_dir(path.parent().unwrap_or(path))
            .map_err(|error| server::start_failure(error, command, None))?;
    }
    Ok(())
}

async fn migrate(context: &Context, place: &Place, dry_run: bool) -> Outcome<()> {
    let (_, at) = place.find()?;
    if !dry_run {
        make_dir(&at, "baton db migrate")?;
        db::migrate(&at).await.map_err(|error| failure("migrate", &at, error))?;
    }
    let status = look(&at).await?;
    print(context, &at, &status)?;
    if !status.pending().is_empty() {
        context.output.next("apply what is pending", "baton db migrate");
    } else if !dry_run {
        context.output.next("start the server", "baton server start");
    }
    Ok(())
}

async fn backup(context: &Context, place: &Place, to: &Path) -> Outcome<()> {
    let output = &context.output;
    let (_, at) = place.find()?;
    let copied = db::backup(&at, to).await;
    let bytes =
        copied.map_err(|error| match to.parent().filter(|dir| !dir.as_os_str().is_empty()) {
            Some(dir) if !dir.exists() => {
                Failure::usage(format!("the directory {} does not exist", dir.display()))
                    .hint(format!("make it: mkdir -p {}", dir.display()))
            }
            _ => failure("back up", &at, error),
        })?;
    if output.is_text() {
        let size = format!("{} KiB", bytes.div_ceil(1024));
        output.note(format!("wrote {} ({size})", to.display()));
    } else {
        output.value(&json!({ "path": to.display().to_string(), "size_bytes": bytes }))?;
    }
    output.next("restore", format_args!("baton db restore {}", to.display()));
    Ok(())
}

async fn restore(context: &Context, place: &Place, from: &Path) -> Outcome<()> {
    let (config, at) = place.find()?;
    let lock = match at {
        Location::File(_) => Some(
            app::lock_data_dir(&config.storage.data_dir)
                .map_err(|error| server::start_failure(error, "baton db restore", None))?,
        ),
        Location::Url(_) => None,
    };
    db::restore(&at, from).await.map_err(|error| failure("restore", &at, error))?;
    drop(lock);
    context.output.note(format!("restored {at} from {}", from.display()));
    print(context, &at, &look(&at).await?)?;
    context.output.next("start the server", "baton server start");
    Ok(())
}

async fn collect(context: &Context, place: &Place, older_than: Option<Duration>) -> Outcome<()> {
    let (config, at) = place.find()?;
    let pending = look(&at).await?.pending();
    if !pending.is_empty() {
        return Err(Failure::new(Exit::Conflict, format!("{at} has migrations pending"))
            .hint("apply them: baton db migrate"));
    }
    let mut retention = app::retention(&config.retention);
    if older_than.is_some() {
        retention.ended_tasks = older_than;
    }
    let collected = async {
        let connections = config.database.connections;
        let db = Db::connect_at(&at, connections, &Entropy::system()).await?;
        let collected =
            housekeeping::run_once(&db, context.clock.now(), retention, &Mandate::of_operator())
                .await;
        db.close().await;
        collected
    };
    let collected = collected.await.map_err(|error| failure("clean up", &at, error))?;
    let output = &context.output;
    if !output.is_text() {
        return output.value(&json!({
            "tasks": collected.tasks,
            "dead_letters": collected.dead_letters,
            "request_ids": collected.request_ids,
        }));
    }
    output.raw(&fields(&[
        ("ended tasks", collected.tasks.to_string()),
        ("dead letters", collected.dead_letters.to_string()),
        ("request ids", collected.request_ids.to_string()),
    ]))?;
    if retention.ended_tasks.is_none() {
        output.next("delete ended tasks", "baton db gc --older-than 30d");
    }
    Ok(())
}

/// An error about the database itself, with its name.
pub fn failure(doing: &str, at: &Location, error: Error) -> Failure {
    match error.kind() {
        Kind::NotFound => Failure::new(Exit::NotFound, error.to_string()).hint(
            "name the data directory of the server: --data-dir DIR (`baton dev` uses ./.baton)",
        ),
        Kind::Unavailable => unusable(format!("cannot {doing} {at}"), &error),
        _ => Failure::from(error),
    }
}

/// A database that cannot be used, and what may help.
pub fn unusable(message: String, error: &Error) -> Failure {
    let cause = std::error::Error::source(error).map(root_cause).unwrap_or_default();
    let foreign = cause.contains("not a database") || cause.contains("malformed");
    let remote = message.contains("postgres://") || message.contains("postgresql://");
    let failure = Failure::new(Exit::Unexpected, message).cause(cause);
    if remote {
        return failure
            .hint("name a database that is there and a user who may use it: --database-url postgres://USER:PASSWORD@HOST:PORT/NAME");
    }
    if foreign {
        return failure
            .hint("move the file away, and restore a backup if there is one: docs/operations.md");
    }
    failure.hint("choose a directory that you may write: --data-dir DIR")
}

fn print(context: &Context, at: &Location, status: &db::Status) -> Outcome<()> {
    let pending = status.pending();
    let (engine, durability) = match status.engine {
        Engine::Sqlite => ("sqlite", "journal_mode"),
        Engine::Postgres => ("postgres", "synchronous_commit"),
    };
    if !context.output.is_text() {
        return context.output.value(&json!({
            "engine": engine,
            "path": at.to_string(),
            "size_bytes": status.size_bytes,
            (durability): status.durability,
            "applied": status.applied,
            "pending": pending,
            "unversioned": status.legacy,
        }));
    }
    let list = |versions: &[i64]| {
        if versions.is_empty() {
            return "none".to_owned();
        }
        let name = |version: &i64| {
            let known = status.known.iter().find(|(known, _)| known == version);
            known.map_or_else(|| version.to_string(), |(_, name)| format!("{version} ({name})"))
        };
        versions.iter().map(name).collect::<Vec<_>>().join(", ")
    };
    context.output.raw(&fields(&[
        ("database", at.to_string()),
        ("size", format!("{} KiB", status.size_bytes.div_ceil(1024))),
        (durability, status.durability.clone()),
        ("applied", list(&status.applied)),
        ("pending", list(&pending)),
    ]))?;
    if status.legacy {
        context
            .output
            .note("the tables have no version record; a migration takes them for version 1");
    }
    Ok(())
}
