//! `db`: what an operator does to the database file.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde_json::json;

use super::{
    Context,
    exit::{Exit, Failure, Outcome, root_cause},
    output::fields,
    server::{self, ConfigArgs},
};
use crate::{
    app, db,
    error::{Error, Kind},
};

/// Name of the database in the data directory.
const FILE: &str = "baton.db";

/// Which database.
#[derive(Args, Clone, Debug)]
pub struct Place {
    #[command(flatten)]
    config: ConfigArgs,
}

impl Place {
    fn path(&self) -> Outcome<PathBuf> {
        Ok(self.config.load()?.config.storage.data_dir.join(FILE))
    }
}

/// Commands of `db`.
#[derive(Subcommand, Clone, Debug)]
pub enum DbCommand {
    /// Show the migrations, the size and the journal mode; the server may run
    Status(Place),
    /// Apply pending migrations; a server does so when it starts
    Migrate(Place),
    /// Write a consistent copy; the server may run
    Backup {
        #[command(flatten)]
        place: Place,
        /// New file to write
        to: PathBuf,
    },
}

/// Runs a command of `db`.
pub async fn run(context: &Context, command: &DbCommand) -> Outcome {
    let output = &context.output;
    match command {
        DbCommand::Status(place) => {
            let path = place.path()?;
            let status =
                db::status(&path).await.map_err(|error| failure("look at", &path, error))?;
            print(context, &path, &status)?;
        }
        DbCommand::Migrate(place) => {
            let path = place.path()?;
            app::make_data_dir(path.parent().unwrap_or(&path))
                .map_err(|error| server::start_failure(error, "baton db migrate", None))?;
            let status =
                db::migrate(&path).await.map_err(|error| failure("migrate", &path, error))?;
            print(context, &path, &status)?;
            output.next("start the server", "baton server start");
        }
        DbCommand::Backup { place, to } => {
            let path = place.path()?;
            let copied = db::backup(&path, to).await;
            let bytes = copied.map_err(|error| {
                match to.parent().filter(|dir| !dir.as_os_str().is_empty()) {
                    Some(dir) if !dir.exists() => {
                        Failure::usage(format!("the directory {} does not exist", dir.display()))
                            .hint(format!("make it: mkdir -p {}", dir.display()))
                    }
                    _ => failure("back up", &path, error),
                }
            })?;
            if output.is_text() {
                let size = format!("{} KiB", bytes.div_ceil(1024));
                output.note(format!("wrote {} ({size})", to.display()));
            } else {
                output.value(&json!({ "path": to.display().to_string(), "size_bytes": bytes }))?;
            }
            output.next(
                "restore",
                format_args!(
                    "stop the server, put the file in place of {}, remove its -wal and -shm",
                    path.display()
                ),
            );
        }
    }
    Ok(Exit::Ok)
}

/// An error about the database file itself, with the file's name.
fn failure(doing: &str, path: &Path, error: Error) -> Failure {
    match error.kind() {
        Kind::NotFound => Failure::new(Exit::NotFound, error.to_string()).hint(
            "name the data directory of the server: --data-dir DIR (`baton dev` uses ./.baton)",
        ),
        Kind::Unavailable => unusable(format!("cannot {doing} {}", path.display()), &error),
        _ => Failure::from(error),
    }
}

/// A database that cannot be used, and what may help.
pub fn unusable(message: String, error: &Error) -> Failure {
    let cause = std::error::Error::source(error).map(root_cause).unwrap_or_default();
    let foreign = cause.contains("not a database") || cause.contains("malformed");
    let failure = Failure::new(Exit::Unexpected, message).cause(cause);
    if foreign {
        return failure
            .hint("move the file away, and restore a backup if there is one: docs/operations.md");
    }
    failure.hint("choose a directory that you may write: --data-dir DIR")
}

fn print(context: &Context, path: &std::path::Path, status: &db::Status) -> Outcome<()> {
    let pending = status.pending();
    if !context.output.is_text() {
        return context.output.value(&json!({
            "path": path.display().to_string(),
            "size_bytes": status.size_bytes,
            "journal_mode": status.journal_mode,
            "applied": status.applied,
            "pending": pending,
        }));
    }
    let list = |versions: &[i64]| {
        if versions.is_empty() {
            return "none".to_owned();
        }
        versions.iter().map(i64::to_string).collect::<Vec<_>>().join(", ")
    };
    context.output.raw(&fields(&[
        ("database", path.display().to_string()),
        ("size", format!("{} KiB", status.size_bytes.div_ceil(1024))),
        ("journal", status.journal_mode.clone()),
        ("applied", list(&status.applied)),
        ("pending", list(&pending)),
    ]))
}
