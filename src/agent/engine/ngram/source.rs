//! Where a text to train on comes from, and which ones a command may name.
//!
//! A command comes over the network, so it may name a file only inside the one directory that the
//! runner's operator has opened to it, wherever links point.

use std::{
    borrow::Cow,
    fs::File,
    io::{self, Read as _},
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::{
    agent::engine::read,
    error::{Error, Kind, Reason},
};

/// Longest text of a file that a command names, in bytes.
const MAX_FILE: u64 = 64 << 20;

/// Where a text comes from.
#[derive(Clone, Debug)]
pub(super) enum Source {
    /// The one built in.
    BuiltIn,
    /// A file that was named at start.
    Start(PathBuf),
    /// A file that a command named, in the directory opened to commands.
    File {
        /// The directory.
        dir: PathBuf,
        /// Below it.
        path: PathBuf,
    },
    /// It came with the command.
    Text(Arc<str>),
}

/// Options of a model.
#[derive(Debug, Default, Deserialize)]
struct Options {
    text: Option<String>,
    path: Option<PathBuf>,
}

/// The source that a command names, if any; files are those below `dir`.
pub(super) fn of_options(
    options: &Map<String, Value>,
    dir: Option<&Path>,
) -> Result<Option<Source>, Error> {
    let options: Options = read("options", options, &["text", "path"])?;
    match (options.text, options.path, dir) {
        (None, None, _) => Ok(None),
        (Some(text), None, _) => Ok(Some(Source::Text(text.into()))),
        (Some(_), Some(_), _) => Err(Error::invalid("options", "text and path exclude each other")),
        (None, Some(_), None) => Err(Error::invalid(
            "options.path",
            "this runner opens no directory to commands; start it with --corpus-dir",
        )),
        (None, Some(path), Some(dir)) => {
            let below = path.components().all(|part| matches!(part, Component::Normal(_)));
            if !below || path.as_os_str().is_empty() {
                let what = "must be a path below the runner's --corpus-dir, without `..`";
                return Err(Error::invalid("options.path", what));
            }
            Ok(Some(Source::File { dir: dir.to_owned(), path }))
        }
    }
}

impl Source {
    /// The text.
    pub(super) fn read(&self) -> Result<Cow<'_, str>, Error> {
        match self {
            Self::BuiltIn => Ok(Cow::Borrowed(super::CORPUS)),
            Self::Text(text) => Ok(Cow::Borrowed(text)),
            Self::Start(path) => std::fs::read_to_string(path)
                .map(Cow::Owned)
                .map_err(|error| unreadable(path, &error)),
            Self::File { dir, path } => {
                read_below(dir, path).map(Cow::Owned).map_err(|error| unreadable(path, &error))
            }
        }
    }
}

/// Reads a file that lies below `dir` also when all links are followed.
fn read_below(dir: &Path, path: &Path) -> io::Result<String> {
    let dir = dir.canonicalize()?;
    let path = dir.join(path).canonicalize()?;
    if !path.starts_with(&dir) {
        return Err(io::Error::other("it lies outside the directory opened to commands"));
    }
    if !path.metadata()?.is_file() {
        return Err(io::Error::other("it is no file"));
    }
    let mut text = String::new();
    File::open(path)?.take(MAX_FILE + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_FILE {
        return Err(io::Error::other(format!("it has more than {MAX_FILE} bytes")));
    }
    Ok(text)
}

fn unreadable(path: &Path, error: &io::Error) -> Error {
    let message = format!("cannot read the text `{}`: {error}", path.display());
    Error::new(Kind::FailedPrecondition, Reason::EngineError, message)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use serde_json::json;

    use super::*;

    fn of(options: &Value, dir: Option<&Path>) -> Result<Option<Source>, Error> {
        of_options(options.as_object().unwrap(), dir)
    }

    #[test]
    fn a_command_reads_only_what_lies_below_the_directory() {
        let (dir, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::fs::create_dir(dir.path().join("in")).unwrap();
        std::fs::write(dir.path().join("in/a.txt"), "a b").unwrap();
        std::fs::write(outside.path().join("secret"), "s").unwrap();
        symlink(outside.path().join("secret"), dir.path().join("link")).unwrap();
        symlink(outside.path(), dir.path().join("away")).unwrap();
        let text = |path: &str| {
            let source = of(&json!({"path": path}), Some(dir.path()))?.unwrap();
            source.read().map(Cow::into_owned)
        };
        assert_eq!(text("in/a.txt").unwrap(), "a b");
        let secret = outside.path().join("secret").display().to_string();
        for path in ["", "..", "in/../../x", "./in/a.txt", "/etc/passwd", &secret] {
            let error = text(path).unwrap_err();
            assert_eq!(error.reason(), Reason::InvalidParams, "{path}: {error}");
        }
        for path in ["link", "away/secret", "in", "missing"] {
            let error = text(path).unwrap_err();
            assert_eq!(error.reason(), Reason::EngineError, "{path}: {error}");
        }
    }

    #[test]
    fn without_a_directory_no_path_is_taken() {
        let error = of(&json!({"path": "a.txt"}), None).unwrap_err();
        assert!(error.message().contains("--corpus-dir"), "{error}");
        assert!(of(&json!({"text": "a", "path": "b"}), None).is_err());
        assert!(of(&json!({}), None).unwrap().is_none());
        let error = of(&json!({"url": "x"}), None).unwrap_err();
        assert_eq!(error.violations()[0].field, "options.url");
    }
}
