//! Backups by the server's own tools, `pg_dump` and `pg_restore`: what operators of Postgres
//! know, with its guarantees and its file format.

use std::{borrow::Cow, path::Path, process::Stdio};

use percent_encoding::percent_decode_str;
use tokio::process::Command;

use crate::{
    db::{Location, admin::status},
    error::{Error, Kind, Reason, Result},
};

/// Writes an archive in the custom format.
pub(in crate::db) async fn backup(url: &str, to: &Path) -> Result<()> {
    let beside = to.with_extension("partial");
    let mut command = tool("pg_dump", url)?;
    command.args(["--format=custom", "--no-owner", "--no-privileges", "--file"]).arg(&beside);
    let done = run(command, "pg_dump").await;
    let placed = match done {
        Ok(()) => std::fs::rename(&beside, to).map_err(Error::storage),
        Err(error) => Err(error),
    };
    if placed.is_err() {
        // It is ours, and of no use.
        let _ = std::fs::remove_file(&beside);
    }
    placed
}

/// Loads an archive into a database without tables, as a whole or not at all.
pub(in crate::db) async fn restore(url: &str, from: &Path) -> Result<()> {
    let found = status(&Location::Url(url.to_owned())).await?;
    if found.legacy || !found.applied.is_empty() {
        return Err(Error::new(
            Kind::AlreadyExists,
            Reason::AlreadyExists,
            format!("{} has tables already; make an empty database", super::place(url)),
        ));
    }
    let mut command = tool("pg_restore", url)?;
    let database = libpq(url)?.into_iter().find(|(name, _)| *name == "PGDATABASE");
    let database = database.map_or_else(|| "postgres".to_owned(), |(_, value)| value);
    command.args(["--exit-on-error", "--single-transaction", "--no-owner", "--no-privileges"]);
    command.arg("--dbname").arg(database).arg(from);
    run(command, "pg_restore").await
}

/// A tool that knows the database by its environment, where no other user sees the password.
fn tool(name: &str, url: &str) -> Result<Command> {
    let mut command = Command::new(name);
    command.envs(libpq(url)?).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command.arg("--no-password").kill_on_drop(true);
    Ok(command)
}

async fn run(mut command: Command, name: &str) -> Result<()> {
    let output = command.output().await.map_err(|error| {
        let message = match error.kind() {
            std::io::ErrorKind::NotFound => {
                format!("{name} is not installed; install the client tools of PostgreSQL")
            }
            _ => format!("{name} did not start"),
        };
        Error::new(Kind::FailedPrecondition, Reason::StateConflict, message).caused_by(error)
    })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.trim().lines().next().unwrap_or_default();
    Err(Error::new(
        Kind::FailedPrecondition,
        Reason::StateConflict,
        format!("{name} failed: {said}"),
    ))
}

/// What a URL says, as the tools' variables.
fn libpq(url: &str) -> Result<Vec<(&'static str, String)>> {
    let wrong = |error: String| Error::invalid("database.url", "is no URL").caused_by(error);
    let parsed = reqwest::Url::parse(url).map_err(|error| wrong(error.to_string()))?;
    let decoded = |text: &str| {
        let text = percent_decode_str(text).decode_utf8();
        text.map(Cow::into_owned).map_err(|error| wrong(error.to_string()))
    };
    let mut variables = Vec::new();
    let mut set = |name, value: String| {
        if !value.is_empty() {
            variables.push((name, value));
        }
    };
    set("PGHOST", decoded(parsed.host_str().unwrap_or_default())?);
    set("PGPORT", parsed.port().map(|port| port.to_string()).unwrap_or_default());
    set("PGUSER", decoded(parsed.username())?);
    set("PGPASSWORD", decoded(parsed.password().unwrap_or_default())?);
    set("PGDATABASE", decoded(parsed.path().trim_start_matches('/'))?);
    for (key, value) in parsed.query_pairs() {
        let name = match &*key {
            "host" => "PGHOST",
            "port" => "PGPORT",
            "user" => "PGUSER",
            "password" => "PGPASSWORD",
            "dbname" => "PGDATABASE",
            "sslmode" => "PGSSLMODE",
            "sslrootcert" => "PGSSLROOTCERT",
            "sslcert" => "PGSSLCERT",
            "sslkey" => "PGSSLKEY",
            "options" => "PGOPTIONS",
            _ => continue,
        };
        set(name, value.into_owned());
    }
    Ok(variables)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tools_get_what_the_url_says() {
        let url = "postgres://u:p%40w@h:5/d?sslmode=require&host=%2Frun%2Fpg";
        let found = libpq(url).unwrap();
        for (name, value) in [
            ("PGUSER", "u"),
            ("PGPASSWORD", "p@w"),
            ("PGPORT", "5"),
            ("PGDATABASE", "d"),
            ("PGSSLMODE", "require"),
            ("PGHOST", "/run/pg"),
        ] {
            let last = found.iter().rev().find(|(key, _)| *key == name);
            assert_eq!(last.map(|(_, value)| value.as_str()), Some(value), "{name}");
        }
    }
}
