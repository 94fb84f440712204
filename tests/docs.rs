//! What the documents say is what the program does: the references are written from it.

use std::{fs, path::PathBuf};

use baton::{cli::reference, config};

fn document(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("docs").join(name)
}

/// Compares a document with what the program would write; `BATON_WRITE_DOCS=1` writes it.
fn assert_current(name: &str, expected: &str) {
    let path = document(name);
    if std::env::var_os("BATON_WRITE_DOCS").is_some() {
        fs::write(&path, expected).expect("docs/ can be written");
    }
    let found = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        found == expected,
        "docs/{name} is out of date; write it: BATON_WRITE_DOCS=1 cargo test --test docs"
    );
}

#[test]
fn the_command_reference_is_current() {
    assert_current("cli.md", &reference::markdown());
}

#[test]
fn the_error_reference_is_current() {
    assert_current("errors.md", &reference::errors().expect("the descriptors hold the reasons"));
}

#[test]
fn every_configuration_key_is_documented_with_its_default_and_variable() {
    let text = fs::read_to_string(document("configuration.md")).unwrap_or_default();
    let loaded = config::load(&config::Sources::default()).expect("the defaults are valid");
    let mut missing = Vec::new();
    for entry in &loaded.entries {
        let row = format!("| `{}` | `{}` |", entry.key, entry.value.trim_matches('"'));
        if !text.contains(&row) {
            missing.push(row);
        }
    }
    assert!(missing.is_empty(), "docs/configuration.md lacks:\n{}", missing.join("\n"));
    for line in text.lines().filter_map(|line| line.strip_prefix("| `")) {
        let key = line.split('`').next().unwrap_or_default();
        let known = loaded.entries.iter().any(|entry| entry.key == key);
        assert!(known || !key.contains('.'), "docs/configuration.md has `{key}`, which is no key");
    }
}

#[test]
fn every_variable_of_the_deployment_is_one_that_the_program_reads() {
    let loaded = config::load(&config::Sources::default()).expect("the defaults are valid");
    let commands = reference::markdown();
    let is_read = |name: &str| {
        loaded.entries.iter().any(|entry| entry.env == name)
            || commands.contains(&format!("`{name}`"))
    };
    let deploy = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("deploy");
    let mut n_found = 0;
    for file in ["compose.yaml", "Dockerfile"] {
        let text = fs::read_to_string(deploy.join(file)).expect("a file of the deployment");
        let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        for name in words.filter(|word| word.starts_with("BATON_")) {
            assert!(is_read(name), "deploy/{file} sets {name}, which nothing reads");
            n_found += 1;
        }
    }
    assert!(n_found > 5, "{n_found} variables found");
}

#[test]
fn commands_in_the_documents_exist() {
    use clap::Parser as _;
    let mut wrong = Vec::new();
    let readme = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("README.md");
    let pages =
        ["benchmarks.md", "clients.md", "engines.md", "facades.md", "operations.md", "protocol.md"];
    for path in std::iter::once(readme).chain(pages.map(document)) {
        // A command may go on behind a backslash.
        let text = fs::read_to_string(&path).unwrap_or_default().replace("\\\n", " ");
        for line in text.lines().map(|line| line.trim_start_matches("$ ")) {
            let Some(command) = line.strip_prefix("baton ") else { continue };
            let words = words(command.split(" #").next().unwrap_or(command));
            let args = std::iter::once("baton".to_owned()).chain(words);
            if let Err(error) = baton::cli::Cli::try_parse_from(args)
                && error.use_stderr()
            {
                wrong.push(format!("{}: {line}\n{error}", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Words as a shell would split them, up to a pipe or a redirection.
fn words(command: &str) -> Vec<String> {
    let (mut words, mut word, mut quote, mut open) = (Vec::new(), String::new(), None, false);
    for c in command.chars() {
        match (quote, c) {
            (Some(q), c) if q == c => quote = None,
            (None, '"' | '\'') => (quote, open) = (Some(c), true),
            (None, '|' | '<' | '>' | '&') => break,
            (None, c) if c.is_whitespace() => {
                if open || !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
                open = false;
            }
            (_, c) => word.push(c),
        }
    }
    if open || !word.is_empty() {
        words.push(word);
    }
    words
}
