//! The command reference, written from clap's tree, so that it cannot drift.

use std::fmt::Write as _;

use clap::{Arg, Command, CommandFactory as _};

use super::{
    Cli,
    exit::{Exit, Failure, Outcome},
    json,
};

/// The table of exit codes, for `--help`.
pub fn exit_codes() -> String {
    let mut text = String::from("Exit codes:\n");
    for (exit, meaning) in Exit::TABLE {
        let _ = writeln!(text, "  {:>3}  {meaning}", exit.code());
    }
    text
}

/// `docs/cli.md`.
pub fn markdown() -> String {
    let mut root = Cli::command();
    root.build();
    let mut text = String::from(
        "# Command line\n\n\
         Written from the program by `BATON_WRITE_DOCS=1 cargo test --test docs`; do not edit.\n\n\
         Data go to stdout; notices, progress and errors go to stderr, and progress only to a terminal. \
         `baton run … > out.txt` holds exactly the tokens. Where a retry makes the same tokens as the attempt \
         before it, they are printed once.\n\n\
         ## Exit codes\n\n| code | meaning |\n|---|---|\n",
    );
    for (exit, meaning) in Exit::TABLE {
        let _ = writeln!(text, "| {} | {meaning} |", exit.code());
    }
    text.push_str("\n## Global options\n\n");
    let globals: Vec<&Arg> = root.get_arguments().filter(|arg| arg.is_global_set()).collect();
    arguments(&mut text, &globals);
    text.push_str("\n## Commands\n");
    for command in root.get_subcommands().filter(|command| command.get_name() != "help") {
        section(&mut text, "baton", command);
    }
    text
}

/// `docs/errors.md`, from the comments of the reasons in the protos.
pub fn errors() -> Outcome<String> {
    let missing = || Failure::new(Exit::Unexpected, "the descriptors lack the reasons");
    let reasons = json::pool()?.get_enum_by_name("baton.v1.ErrorReason").ok_or_else(missing)?;
    let mut text = String::from(
        "# Errors\n\n\
         Written from `proto/baton/v1/errors.proto` by `BATON_WRITE_DOCS=1 cargo test --test docs`; do not edit.\n\n\
         Every error is a gRPC status with one `google.rpc.ErrorInfo` (domain `baton`) whose `reason` is one of \
         these. `BadRequest` names the fields of bad input, and `RetryInfo` says when a retry helps. The answer \
         carries `x-correlation-id`, which finds the call in the server's log. The same names stand in the error \
         of a task that did not succeed.\n",
    );
    let file = reasons.parent_file();
    let comments = &file.file_descriptor_proto().source_code_info;
    for value in reasons.values().filter(|value| value.number() != 0) {
        let name = value.name().trim_start_matches("ERROR_REASON_").to_owned();
        let comment = comments
            .iter()
            .flat_map(|info| &info.location)
            .find(|location| location.path == value.path())
            .map(|location| {
                location.leading_comments().split_whitespace().collect::<Vec<_>>().join(" ")
            })
            .unwrap_or_default();
        let _ = write!(text, "\n## {name}\n\n{comment}\n");
    }
    Ok(text)
}

fn section(text: &mut String, parent: &str, command: &Command) {
    let name = format!("{parent} {}", command.get_name());
    let about = command.get_about().map(ToString::to_string).unwrap_or_default();
    let _ = write!(text, "\n### `{name}`\n\n{about}.\n");
    let inner: Vec<&Command> =
        command.get_subcommands().filter(|c| c.get_name() != "help" && !c.is_hide_set()).collect();
    if !inner.is_empty() {
        for inner in inner {
            section(text, &name, inner);
        }
        return;
    }
    let mut usage = String::new();
    for arg in command.get_positionals() {
        let value = arg
            .get_value_names()
            .and_then(|names| names.first())
            .map_or_else(|| arg.get_id().as_str().to_uppercase(), ToString::to_string);
        let many = if arg.get_num_args().is_some_and(|n| n.max_values() > 1) { "..." } else { "" };
        let _ = if arg.is_required_set() {
            write!(usage, " <{value}>{many}")
        } else {
            write!(usage, " [{value}]{many}")
        };
    }
    let _ = write!(text, "\n`{name}{usage}`\n");
    let own: Vec<&Arg> = command
        .get_arguments()
        .filter(|arg| !arg.is_global_set() && !matches!(arg.get_id().as_str(), "help" | "version"))
        .collect();
    if !own.is_empty() {
        text.push('\n');
        arguments(text, &own);
    }
}

fn arguments(text: &mut String, args: &[&Arg]) {
    text.push_str("| argument | meaning | default | variable |\n|---|---|---|---|\n");
    for arg in args.iter().filter(|arg| !arg.is_hide_set()) {
        let value = arg
            .get_value_names()
            .and_then(|names| names.first())
            .filter(|_| arg.get_action().takes_values())
            .map(|name| format!(" <{name}>"))
            .unwrap_or_default();
        let spelling = match (arg.get_short(), arg.get_long()) {
            (Some(short), Some(long)) => format!("`-{short}`, `--{long}{value}`"),
            (Some(short), None) => format!("`-{short}{value}`"),
            (None, Some(long)) => format!("`--{long}{value}`"),
            (None, None) => format!("`{}`", value.trim()),
        };
        let mut meaning =
            arg.get_help().map(ToString::to_string).unwrap_or_default().replace('|', "\\|");
        let values: Vec<String> = if arg.get_action().takes_values() {
            arg.get_possible_values()
                .iter()
                .map(|value| format!("`{}`", value.get_name()))
                .collect()
        } else {
            Vec::new()
        };
        if !values.is_empty() {
            let _ = write!(meaning, ": {}", values.join(", "));
        }
        let default: Vec<String> = arg
            .get_default_values()
            .iter()
            .filter(|_| arg.get_action().takes_values())
            .map(|value| value.to_string_lossy().into_owned())
            .filter(|value| !value.is_empty())
            .collect();
        let env = arg.get_env().map(|name| format!("`{}`", name.to_string_lossy()));
        let _ = writeln!(
            text,
            "| {spelling} | {meaning} | {} | {} |",
            default.join(", "),
            env.unwrap_or_default()
        );
    }
}
