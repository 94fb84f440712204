//! Where words go: data to stdout, everything else to stderr, progress to terminals only.

use std::{
    fmt::{Display, Write as _},
    io::{self, IsTerminal as _, Write as _},
    os::fd::AsFd,
};

use clap::ValueEnum;
use owo_colors::OwoColorize as _;
use serde_json::Value;

use super::{
    exit::{Exit, Failure, Outcome},
    json,
};

/// Form of what a command prints.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    #[default]
    Text,
    /// One JSON document.
    Json,
    /// One JSON document a line.
    Jsonl,
}

/// How this process prints.
#[derive(Clone, Debug)]
pub struct Output {
    /// Form of data.
    pub format: Format,
    /// Leaves out notices and summaries.
    pub quiet: bool,
    /// More detail on stderr.
    pub verbose: u8,
    /// Answers every question with yes.
    pub yes: bool,
    colour: bool,
    stdout_tty: bool,
    stderr_tty: bool,
    /// Whether stdout and stderr are one file, as after `2>&1`.
    joined: bool,
}

impl Output {
    /// Looks at the terminal once.
    pub fn new(format: Format, quiet: bool, verbose: u8, yes: bool, no_color: bool) -> Self {
        let stderr_tty = io::stderr().is_terminal();
        let no_color = no_color || std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
        Self {
            format,
            quiet,
            verbose,
            yes,
            colour: stderr_tty && !no_color,
            stdout_tty: io::stdout().is_terminal(),
            stderr_tty,
            joined: same_file(io::stdout(), io::stderr()),
        }
    }

    /// Ends the line on which a terminal showed `^C`; says whether there is one.
    pub fn after_interrupt(&self) -> bool {
        if self.stderr_tty {
            // Nobody is left to tell when stderr is closed.
            let _ = writeln!(io::stderr());
        }
        self.stderr_tty
    }

    /// Whether data is for people.
    pub fn is_text(&self) -> bool {
        self.format == Format::Text
    }

    /// Ends a line of data that is not ended, where words or a prompt would stick to it. Data
    /// that go to a file or a pipe of their own stay as they are.
    pub fn end_line(&self) {
        if self.quiet && !self.stdout_tty {
            return;
        }
        let ended = match (self.stdout_tty, self.joined) {
            (true, _) => writeln!(io::stdout()),
            (false, true) => writeln!(io::stderr()),
            (false, false) => Ok(()),
        };
        // Nobody is left to tell when both are closed.
        let _ = ended;
    }

    /// Whether progress may be shown.
    pub fn shows_progress(&self) -> bool {
        self.stderr_tty && !self.quiet
    }

    /// Writes data to stdout as it is.
    #[expect(clippy::unused_self, reason = "all words go through the output")]
    pub fn raw(&self, text: &str) -> Outcome<()> {
        let mut stdout = io::stdout().lock();
        stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(|e| broken(&e))
    }

    /// Writes a line of data to stdout.
    pub fn line(&self, text: impl Display) -> Outcome<()> {
        self.raw(&format!("{text}\n"))
    }

    /// Writes a JSON document: indented as `json`, on one line as `jsonl`.
    pub fn value(&self, value: &Value) -> Outcome<()> {
        match self.format {
            Format::Jsonl => self.line(value),
            Format::Json | Format::Text => self.line(format_args!("{value:#}")),
        }
    }

    /// Writes one message: as JSON where asked for, else by `text`.
    pub fn message<M: prost::Message>(
        &self,
        name: &str,
        message: &M,
        text: impl FnOnce(&M) -> String,
    ) -> Outcome<()> {
        match self.format {
            Format::Text => self.line(text(message).trim_end()),
            Format::Json | Format::Jsonl => self.value(&json::of(name, message)?),
        }
    }

    /// Writes a list: a table for people, `{"<key>": […]}` as `json`, a line each as `jsonl`.
    pub fn list<M: prost::Message>(
        &self,
        (name, key): (&str, &str),
        items: &[M],
        headers: &[&str],
        row: impl Fn(&M) -> Vec<String>,
    ) -> Outcome<()> {
        match self.format {
            Format::Text if items.is_empty() => {
                self.note(format!("no {}", key.replace('_', " ")));
                Ok(())
            }
            Format::Text => self.raw(&table(headers, items.iter().map(row))),
            Format::Json => {
                let items: Result<Vec<Value>, _> =
                    items.iter().map(|item| json::of(name, item)).collect();
                self.value(&serde_json::json!({ key: items? }))
            }
            Format::Jsonl => {
                for item in items {
                    self.value(&json::of(name, item)?)?;
                }
                Ok(())
            }
        }
    }

    /// Writes messages about which words went to stderr already: `{"<key>": […]}` as `json`, a
    /// line each as `jsonl`, nothing for people.
    pub fn changed<M: prost::Message>(
        &self,
        (name, key): (&str, &str),
        items: &[M],
    ) -> Outcome<()> {
        if self.is_text() {
            return Ok(());
        }
        self.list((name, key), items, &[], |_| Vec::new())
    }

    /// Tells something to people, on stderr, unless they want quiet.
    pub fn note(&self, text: impl Display) {
        if !self.quiet {
            // Nobody is left to tell when stderr is closed.
            let _ = writeln!(io::stderr(), "{text}");
        }
    }

    /// Begins a line that data go on with, where both stand on one terminal.
    pub fn lead(&self, text: impl Display) {
        if self.joined && self.stdout_tty && self.is_text() && !self.quiet {
            // Nobody is left to tell when stderr is closed.
            let _ = write!(io::stderr(), "{text}");
        }
    }

    /// Tells the next command, on stderr.
    pub fn next(&self, what: &str, command: impl Display) {
        if self.is_text() {
            self.note(format!("  {} {command}", self.dim(&format!("{what}:"))));
        }
    }

    /// A warning, which may end with a hint, in colour.
    pub fn warning(&self, text: impl Display) -> String {
        let hint = format!("\n{}", self.paint("hint:"));
        format!("{} {}", self.paint("warning:"), text.to_string().replace("\nhint:", &hint))
    }

    /// Tells a failure on stderr, in the form wanted.
    pub fn failure(&self, failure: &Failure) {
        if failure.message.is_empty() {
            return;
        }
        let text = match self.format {
            Format::Text => failure.text(|word| self.paint(word)),
            Format::Json | Format::Jsonl => format!("{}\n", failure.json()),
        };
        // Nobody is left to tell when stderr is closed.
        let _ = io::stderr().write_all(text.as_bytes());
    }

    /// A leading word in colour.
    pub fn paint(&self, word: &str) -> String {
        match (self.colour, word) {
            (false, _) => word.to_owned(),
            (true, "error:") => word.red().bold().to_string(),
            (true, "warning:") => word.yellow().bold().to_string(),
            (true, _) => word.cyan().bold().to_string(),
        }
    }

    /// Less prominent text.
    pub fn dim(&self, text: &str) -> String {
        if self.colour { text.dimmed().to_string() } else { text.to_owned() }
    }

    /// Asks before something that cannot be undone. Without a terminal, `--yes` is needed.
    pub fn confirm(&self, question: &str) -> Outcome<()> {
        if self.yes {
            return Ok(());
        }
        if !(self.stderr_tty && io::stdin().is_terminal()) {
            return Err(Failure::usage(format!(
                "{question} This needs a yes, and there is no terminal to ask"
            ))
            .hint("say it beforehand: --yes"));
        }
        let _ = write!(io::stderr(), "{question} [y/N] ");
        let mut answer = String::new();
        io::stdin().read_line(&mut answer).map_err(|e| broken(&e))?;
        if matches!(answer.trim().to_lowercase().as_str(), "y" | "yes") {
            return Ok(());
        }
        Err(Failure::new(Exit::Interrupted, "nothing was changed"))
    }
}

fn same_file(one: impl AsFd, other: impl AsFd) -> bool {
    match (rustix::fs::fstat(one), rustix::fs::fstat(other)) {
        (Ok(one), Ok(other)) => (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino),
        _ => false,
    }
}

/// A reader that has left, such as `head`, is no defect: the command ends without a word.
pub fn broken(error: &io::Error) -> Failure {
    match error.kind() {
        io::ErrorKind::BrokenPipe => Failure::new(Exit::Interrupted, ""),
        _ => Failure::new(Exit::Unexpected, format!("cannot write the output: {error}")),
    }
}

/// Columns as wide as their widest cell; no borders, so that `awk` can read them.
pub fn table(headers: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let headers = headers.iter().map(|header| header.to_uppercase()).collect();
    let rows: Vec<Vec<String>> = std::iter::once(headers).chain(rows).collect();
    let n_columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max()
    };
    let widths: Vec<usize> = (0..n_columns).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for row in &rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            let pad = width - cell.chars().count();
            line.push_str(cell);
            line.extend(std::iter::repeat_n(' ', pad + 2));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// Names and values below each other.
pub fn fields(pairs: &[(&str, String)]) -> String {
    let width = pairs.iter().map(|(name, _)| name.len()).max().unwrap_or(0) + 1;
    let mut text = String::new();
    for (name, value) in pairs.iter().filter(|(_, value)| !value.is_empty()) {
        let _ = writeln!(text, "{:width$} {value}", format!("{name}:"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_lines_have_no_trailing_blanks() {
        let rows = [vec!["a".into(), "long cell".into()], vec!["bb".into(), "x".into()]];
        let text = table(&["id", "what"], rows.into_iter());
        assert_eq!(text, "ID  WHAT\na   long cell\nbb  x\n");
    }

    #[test]
    fn without_a_terminal_a_question_is_answered_by_the_flag_only() {
        let output = Output::new(Format::Text, true, 0, false, true);
        if !io::stdin().is_terminal() {
            assert_eq!(output.confirm("Delete it?").unwrap_err().exit, Exit::Usage);
        }
        let yes = Output { yes: true, ..output };
        assert!(yes.confirm("Delete it?").is_ok());
    }
}
