//! `db export` and `db import`: a whole installation as one file, from one store to another.

use std::{
    fs::File,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use clap::Args;
use indicatif::HumanBytes;
use serde_json::json;

use super::{
    Context,
    exit::{Exit, Failure, Outcome},
    output::fields,
    server,
    storage::{self, Place},
    text,
};
use crate::{
    app,
    config::Config,
    db::{self, Location},
    error::{Error, Kind},
    moving::{self, Bytes, Exported, Files, Imported, Into},
};

/// Arguments of `db export`.
#[derive(Args, Clone, Debug)]
pub struct ExportArgs {
    #[command(flatten)]
    place: Place,
    /// Export what is there at this moment while a server runs; what it does later is not in it
    #[arg(long)]
    live: bool,
    /// New file to write, as long as everything that is kept; `-` is stdout. Whoever reads it has
    /// all keys
    to: PathBuf,
}

/// Arguments of `db import`.
#[derive(Args, Clone, Debug)]
pub struct ImportArgs {
    #[command(flatten)]
    place: Place,
    /// Delete what the target has
    #[arg(long, conflicts_with = "dry_run")]
    replace: bool,
    /// Only check the export and the target; nothing is written
    #[arg(long)]
    dry_run: bool,
    /// File that `db export` wrote; `-` is stdin
    from: PathBuf,
}

/// Writes everything that an installation keeps to one file.
pub async fn export(context: &Context, args: &ExportArgs) -> Outcome<()> {
    let (config, at) = args.place.find()?;
    // Held until everything is written.
    let _lock = match &at {
        Location::File(path) if !path.exists() => {
            return Err(failure("export", &at, Error::not_found("database", path.display())));
        }
        Location::File(_) if !args.live => Some(lock(&config, "baton db export")?),
        Location::File(_) => None,
        Location::Url(_) => {
            if !args.live {
                refuse_servers(&at, "export what is there at this moment: --live").await?;
            }
            None
        }
    };
    let bytes = app::bytes_beside(&config).await.map_err(unusable)?;
    let now = context.clock.now();
    let exported = if args.to == Path::new("-") {
        moving::export(&at, &bytes, now, tokio::io::stdout()).await
    } else {
        return export_to_file(context, args, &at, &bytes).await;
    };
    let exported = exported.map_err(|error| failure("export", &at, error))?;
    // Data went to stdout, so that words do not.
    context.output.note(format!("exported {}", summary(&exported.rows, exported.artifacts)));
    Ok(())
}

async fn export_to_file(
    context: &Context,
    args: &ExportArgs,
    at: &Location,
    bytes: &Bytes,
) -> Outcome<()> {
    let to = &args.to;
    let written = |error: std::io::Error| {
        Failure::new(Exit::Unexpected, format!("cannot write {}", to.display()))
            .cause(error.to_string())
            .hint("name a new file in a directory that is there and has room")
    };
    if to.exists() {
        return Err(Failure::new(Exit::Conflict, format!("{} exists already", to.display()))
            .hint("name a new file"));
    }
    let mut part = to.clone().into_os_string();
    part.push(".part");
    let part = PathBuf::from(part);
    let file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&part);
    let file = tokio::fs::File::from_std(file.map_err(written)?);
    let to_file = tokio::io::BufWriter::with_capacity(1 << 20, file);
    let exported = moving::export(at, bytes, context.clock.now(), to_file).await;
    let placed = match exported {
        Ok(exported) => File::open(&part)
            .and_then(|file| file.sync_all())
            .and_then(|()| std::fs::rename(&part, to))
            .and_then(|()| File::open(parent(to))?.sync_all())
            .map(|()| exported)
            .map_err(written),
        Err(error) => Err(failure("export", at, error)),
    };
    let exported = placed.inspect_err(|_| {
        // It is ours, and of no use.
        let _ = std::fs::remove_file(&part);
    })?;
    print_exported(context, to, &exported)
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn print_exported(context: &Context, to: &Path, exported: &Exported) -> Outcome<()> {
    let output = &context.output;
    if !output.is_text() {
        return output.value(&json!({
            "path": to.display().to_string(),
            "size_bytes": exported.bytes,
            "rows": rows(&exported.rows),
            "artifacts": files(exported.artifacts),
            "transcripts": files(exported.transcripts),
            "uploads_left": exported.uploads_left,
        }));
    }
    output.raw(&fields(&[
        ("file", format!("{} ({})", to.display(), HumanBytes(exported.bytes))),
        ("rows", row_text(&exported.rows)),
        ("artifacts", file_text(exported.artifacts)),
        ("transcripts", file_text(exported.transcripts)),
    ]))?;
    if exported.uploads_left > 0 {
        let uploads = text::count(exported.uploads_left, "upload");
        output.note(format!("{uploads} not complete; they do not travel, and begin anew"));
    }
    output.next("look at it", format_args!("tar tvf {}", to.display()));
    output.next(
        "move up",
        format_args!("BATON_DATABASE_URL=postgres://… baton db import {}", to.display()),
    );
    Ok(())
}

/// Makes an installation of what `db export` wrote.
pub async fn import(context: &Context, args: &ImportArgs) -> Outcome<()> {
    let (config, at) = args.place.find()?;
    let into = match (args.dry_run, args.replace) {
        (true, _) => Into::Nothing,
        (false, true) => Into::Replaced,
        (false, false) => Into::Empty,
    };
    let _lock = match &at {
        Location::File(_) if into != Into::Nothing => Some(lock(&config, "baton db import")?),
        Location::File(_) => None,
        Location::Url(_) => {
            refuse_servers(&at, "stop all servers of it").await?;
            None
        }
    };
    let bytes = if into == Into::Nothing {
        app::bytes_beside(&config).await
    } else {
        db::migrate(&at).await.map_err(|error| failure("migrate", &at, error))?;
        app::bytes(&config).await
    };
    let (bytes, now) = (bytes.map_err(unusable)?, context.clock.now());
    let imported = if args.from == Path::new("-") {
        moving::import(&at, &bytes, into, now, tokio::io::stdin()).await
    } else {
        let file = tokio::fs::File::open(&args.from).await.map_err(|error| {
            Failure::new(Exit::NotFound, format!("cannot read {}", args.from.display()))
                .cause(error.to_string())
                .hint("name a file that `baton db export` wrote")
        })?;
        let from = tokio::io::BufReader::with_capacity(1 << 20, file);
        moving::import(&at, &bytes, into, now, from).await
    };
    let imported = imported.map_err(|error| failure("import into", &at, error))?;
    print_imported(context, &at, into, &imported)
}

fn print_imported(context: &Context, at: &Location, into: Into, done: &Imported) -> Outcome<()> {
    let output = &context.output;
    let dry_run = into == Into::Nothing;
    if !output.is_text() {
        return output.value(&json!({
            "database": at.to_string(),
            "from": done.from,
            "dry_run": dry_run,
            "rows": rows(&done.rows),
            "rows_before": done.replaced,
            "artifacts": files(done.artifacts),
            "artifacts_kept_before": files(done.kept),
            "transcripts": files(done.transcripts),
        }));
    }
    output.raw(&fields(&[
        ("database", at.to_string()),
        ("rows", row_text(&done.rows)),
        ("artifacts", file_text(done.artifacts)),
        ("transcripts", file_text(done.transcripts)),
    ]))?;
    if done.kept.files > 0 {
        output.note(format!("{} were there already", file_text(done.kept)));
    }
    if dry_run {
        output.note("the export is whole; nothing was written");
        if done.replaced > 0 {
            let rows = text::count(done.replaced, "row");
            output.note(format!("the target has {rows} already: --replace would delete them"));
        }
        return Ok(());
    }
    if done.replaced > 0 {
        output.note(format!("{} before it were deleted", text::count(done.replaced, "row")));
    }
    output.note("everything is there: numbers and digests are those of the export");
    output.next("start the server", "baton server start");
    Ok(())
}

/// Keeps servers from the directory until it is dropped.
fn lock(config: &Config, command: &str) -> Outcome<File> {
    app::lock_data_dir(&config.storage.data_dir)
        .map_err(|error| server::start_failure(error, command, None))
}

/// Refuses a database that a server is connected to.
async fn refuse_servers(at: &Location, hint: &str) -> Outcome<()> {
    let n_servers = db::servers(at).await.map_err(|error| failure("look at", at, error))?;
    if n_servers == 0 {
        return Ok(());
    }
    let connections = text::count(n_servers, "connection");
    Err(Failure::new(Exit::Conflict, format!("a server uses {at} ({connections})")).hint(hint))
}

fn failure(doing: &str, at: &Location, error: Error) -> Failure {
    if error.kind() == Kind::FailedPrecondition {
        return Failure::new(Exit::Conflict, error.to_string());
    }
    storage::failure(doing, at, error)
}

fn unusable(error: anyhow::Error) -> Failure {
    server::start_failure(error, "baton db import", None)
}

fn rows(rows: &[(String, u64)]) -> serde_json::Value {
    rows.iter()
        .map(|(table, n)| (table.clone(), json!(n)))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

fn files(files: Files) -> serde_json::Value {
    json!({ "files": files.files, "bytes": files.bytes })
}

fn row_text(rows: &[(String, u64)]) -> String {
    let some = rows.iter().filter(|(_, n)| *n > 0);
    let list: Vec<_> = some.map(|(table, n)| format!("{n} {table}")).collect();
    if list.is_empty() { "none".to_owned() } else { list.join(", ") }
}

fn file_text(files: Files) -> String {
    format!("{} ({})", text::count(files.files, "file"), HumanBytes(files.bytes))
}

fn summary(rows: &[(String, u64)], artifacts: Files) -> String {
    let n_rows: u64 = rows.iter().map(|(_, n)| n).sum();
    format!("{} and {} of artifacts", text::count(n_rows, "row"), file_text(artifacts))
}
