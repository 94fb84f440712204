//! Layers of configuration and the origin of each value.

use std::{collections::BTreeMap, fmt, path::PathBuf};

use toml::{Table, Value};

use super::{Config, Secret};

/// Keys whose values are never shown.
const SECRETS: [&str; 3] = ["database.url", "redis.url", "telemetry.otlp_headers"];

/// Where the layers come from, weakest first.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    /// A TOML file; it must exist when named.
    pub file: Option<PathBuf>,
    /// Variables; those that name no key are left alone.
    pub env: BTreeMap<String, String>,
    /// Key, value and the flag that set it.
    pub flags: Vec<(&'static str, String, &'static str)>,
}

impl Sources {
    /// The process's variables, and a file.
    pub fn process(file: Option<PathBuf>) -> Self {
        let env = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .filter(|(name, _)| name.starts_with("BATON_"))
            .collect();
        Self { file, env, flags: Vec::new() }
    }

    /// Adds a value that a flag gave.
    pub fn flag(&mut self, key: &'static str, value: impl fmt::Display, flag: &'static str) {
        self.flags.push((key, value.to_string(), flag));
    }
}

/// A variable of the process, for what must not wait until a configuration is loaded.
pub fn variable(name: &str) -> Option<String> {
    std::env::var_os(name)?.into_string().ok()
}

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Built in.
    Default,
    /// The file.
    File(PathBuf),
    /// A variable.
    Env(String),
    /// A flag.
    Flag(&'static str),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Env(name) => f.write_str(name),
            Self::Flag(flag) => f.write_str(flag),
        }
    }
}

/// One value in effect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Such as `server.addr`.
    pub key: String,
    /// In TOML; a secret is redacted.
    pub value: String,
    /// Where it came from.
    pub origin: Origin,
    /// The variable that would set it.
    pub env: String,
}

/// The configuration in effect.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// Validated.
    pub config: Config,
    /// Every value, in the order of the keys.
    pub entries: Vec<Entry>,
}

/// A value or a file that was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("cannot read the configuration file {path}: {source}")]
    Unreadable {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not TOML.
    #[error("the configuration file {path} is malformed: {problem}")]
    Malformed {
        /// Which.
        path: PathBuf,
        /// What and where.
        problem: String,
    },
    /// A key or its value cannot be accepted.
    #[error("configuration key `{key}`{}: {problem}", from(origin.as_ref()))]
    Refused {
        /// Which.
        key: String,
        /// Who set it, where known.
        origin: Option<Origin>,
        /// Why, and what would be right.
        problem: String,
    },
}

fn from(origin: Option<&Origin>) -> String {
    origin.map(|origin| format!(" (from {origin})")).unwrap_or_default()
}

impl ConfigError {
    /// A value that cannot be accepted, whoever set it.
    pub fn refused(key: &str, problem: String) -> Self {
        Self::Refused { key: key.into(), origin: None, problem }
    }

    /// The key that is wrong, where it is one.
    pub fn key(&self) -> Option<&str> {
        match self {
            Self::Refused { key, .. } => Some(key),
            Self::Unreadable { .. } | Self::Malformed { .. } => None,
        }
    }
}

/// Reads all layers, validates the outcome and names the origin of every value.
pub fn load(sources: &Sources) -> Result<Loaded, ConfigError> {
    let mut values = BTreeMap::new();
    let defaults = Table::try_from(Config::default())
        .map_err(|error| ConfigError::refused("(defaults)", error.to_string()))?;
    flatten("", &defaults, &mut |key, value| {
        values.insert(key, (value.clone(), Origin::Default));
    });
    if let Some(path) = &sources.file {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Unreadable { path: path.clone(), source })?;
        let table: Table = text.parse().map_err(|error: toml::de::Error| {
            ConfigError::Malformed { path: path.clone(), problem: error.to_string() }
        })?;
        let mut found = Vec::new();
        flatten("", &table, &mut |key, value| found.push((key, value.clone())));
        for (key, value) in found {
            set(&mut values, &key, value, &Origin::File(path.clone()))?;
        }
    }
    let names: Vec<String> = values.keys().cloned().collect();
    for key in &names {
        let name = env_name(key);
        if let Some(text) = sources.env.get(&name) {
            let value = typed(&values[key].0, text);
            set(&mut values, key, value, &Origin::Env(name))?;
        }
    }
    for (key, text, flag) in &sources.flags {
        let value = values.get(*key).map(|(old, _)| typed(old, text));
        set(&mut values, key, value.unwrap_or(Value::String(text.clone())), &Origin::Flag(flag))?;
    }
    let config = build(&values)?;
    config.validate().map_err(|error| match error {
        ConfigError::Refused { key, problem, .. } => {
            let origin = values.get(&key).map(|(_, origin)| origin.clone());
            ConfigError::Refused { key, origin, problem }
        }
        other => other,
    })?;
    let entries = values
        .into_iter()
        .map(|(key, (value, origin))| {
            let secret = SECRETS.contains(&key.as_str()) && value.as_str() != Some("");
            let value = if secret { "\"[redacted]\"".into() } else { value.to_string() };
            Entry { env: env_name(&key), key, value, origin }
        })
        .collect();
    Ok(Loaded { config, entries })
}

type Values = BTreeMap<String, (Value, Origin)>;

fn env_name(key: &str) -> String {
    format!("BATON_{}", key.replace('.', "_").to_uppercase())
}

fn flatten(prefix: &str, table: &Table, visit: &mut impl FnMut(String, &Value)) {
    for (name, value) in table {
        let key = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
        match value {
            Value::Table(inner) => flatten(&key, inner, visit),
            leaf => visit(key, leaf),
        }
    }
}

/// Sets a known key, and checks that the tree still reads, so that the error names this key.
fn set(values: &mut Values, key: &str, value: Value, origin: &Origin) -> Result<(), ConfigError> {
    let refuse = |problem: String, origin: &Origin| ConfigError::Refused {
        key: key.into(),
        origin: Some(origin.clone()),
        problem,
    };
    let Some(slot) = values.get_mut(key) else {
        let near = nearest(key, values.keys());
        let hint = near.map(|name| format!("; did you mean `{name}`?")).unwrap_or_default();
        return Err(refuse(format!("is not known{hint}"), origin));
    };
    *slot = (value, origin.clone());
    match build(values) {
        Ok(_) => Ok(()),
        Err(ConfigError::Refused { problem, .. }) => Err(refuse(problem, origin)),
        Err(other) => Err(other),
    }
}

fn build(values: &Values) -> Result<Config, ConfigError> {
    let mut root = Table::new();
    for (key, (value, _)) in values {
        let mut table = &mut root;
        let mut parts = key.split('.').peekable();
        while let Some(part) = parts.next() {
            if parts.peek().is_none() {
                table.insert(part.into(), value.clone());
                break;
            }
            let inner = table.entry(part).or_insert_with(|| Value::Table(Table::new()));
            let Value::Table(inner) = inner else {
                return Err(ConfigError::refused(key, "is a section, not a value".into()));
            };
            table = inner;
        }
    }
    root.try_into()
        .map_err(|error: toml::de::Error| ConfigError::refused("", error.message().to_owned()))
}

/// Reads a variable's text as the type that the key has.
fn typed(like: &Value, text: &str) -> Value {
    match like {
        Value::Integer(_) => text.parse().map(Value::Integer).ok(),
        Value::Float(_) => text.parse().map(Value::Float).ok(),
        Value::Boolean(_) => text.parse().map(Value::Boolean).ok(),
        _ => None,
    }
    .unwrap_or_else(|| Value::String(text.into()))
}

/// The known name that most resembles a wrong one, if any does.
fn nearest<'a>(wrong: &str, known: impl Iterator<Item = &'a String>) -> Option<&'a str> {
    let last = |key: &str| key.rsplit('.').next().unwrap_or_default().to_owned();
    known
        .map(|key| (distance(wrong, key).min(1 + distance(&last(wrong), &last(key))), key.as_str()))
        .min()
        .filter(|(distance, _)| *distance <= 3)
        .map(|(_, key)| key)
}

/// Edits from one text to another.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

impl From<&str> for Secret {
    fn from(text: &str) -> Self {
        Self(text.into())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn sources(env: &[(&str, &str)]) -> Sources {
        let env = env.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
        Sources { env, ..Sources::default() }
    }

    fn file(text: &str) -> (tempfile::TempDir, Sources) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("baton.toml");
        std::fs::write(&path, text).unwrap();
        (dir, Sources { file: Some(path), ..Sources::default() })
    }

    #[test]
    fn nothing_set_gives_the_defaults() {
        let loaded = load(&Sources::default()).unwrap();
        assert_eq!(loaded.config, Config::default());
        assert!(loaded.entries.iter().all(|entry| entry.origin == Origin::Default));
        assert!(loaded.entries.iter().any(|entry| entry.env == "BATON_SERVER_IO_THREADS"));
    }

    #[test]
    fn flags_beat_variables_and_variables_beat_the_file() {
        let (_dir, mut sources) =
            file("[server]\nio_threads = 2\nshutdown_grace = \"5s\"\n[limits]\nmessage = \"1MiB\"");
        sources.env.insert("BATON_SERVER_IO_THREADS".into(), "3".into());
        sources.env.insert("BATON_API_KEY".into(), "of the command line".into());
        sources.flag("server.addr", "127.0.0.1:0", "--addr");
        let loaded = load(&sources).unwrap();
        assert_eq!(loaded.config.server.io_threads, 3);
        assert_eq!(loaded.config.server.shutdown_grace, Duration::from_secs(5));
        assert_eq!(loaded.config.limits.message, 1 << 20);
        assert_eq!(loaded.config.server.addr.port(), 0);
        let origin = |key: &str| {
            loaded.entries.iter().find(|entry| entry.key == key).unwrap().origin.to_string()
        };
        assert_eq!(origin("server.io_threads"), "BATON_SERVER_IO_THREADS");
        assert_eq!(origin("server.addr"), "--addr");
        assert!(origin("limits.message").ends_with("baton.toml"));
    }

    #[test]
    fn a_bad_value_names_its_key_and_origin() {
        let error = load(&sources(&[("BATON_LIMITS_MESSAGE", "4 quarts")])).unwrap_err();
        assert_eq!(error.key(), Some("limits.message"));
        let text = error.to_string();
        assert!(text.contains("BATON_LIMITS_MESSAGE") && text.contains("4MiB"), "{text}");
        let error = load(&sources(&[("BATON_SERVER_IO_THREADS", "0")])).unwrap_err();
        assert_eq!(error.key(), Some("server.io_threads"));
    }

    #[test]
    fn a_misspelt_key_is_refused_with_the_likely_one() {
        let (_dir, sources) = file("[server]\nadr = \"127.0.0.1:1\"");
        let text = load(&sources).unwrap_err().to_string();
        assert!(text.contains("did you mean `server.addr`"), "{text}");
    }

    #[test]
    fn an_open_server_is_refused_off_loopback() {
        let error = load(&sources(&[
            ("BATON_AUTH_REQUIRED", "false"),
            ("BATON_SERVER_ADDR", "0.0.0.0:7070"),
        ]));
        assert_eq!(error.unwrap_err().key(), Some("auth.required"));
    }

    #[test]
    fn a_shared_queue_is_refused_without_a_shared_database() {
        let error = load(&sources(&[("BATON_REDIS_URL", "redis://127.0.0.1")])).unwrap_err();
        assert_eq!(error.key(), Some("database.url"));
    }

    #[test]
    fn secrets_do_not_show() {
        let loaded = load(&sources(&[
            ("BATON_TELEMETRY_OTLP_HEADERS", "x=hush"),
            ("BATON_REDIS_URL", "redis://u:hush@h"),
            ("BATON_DATABASE_URL", "postgres://u:hush@h/d"),
        ]));
        let loaded = loaded.unwrap();
        assert_eq!(loaded.config.telemetry.otlp_headers.expose(), "x=hush");
        assert!(!format!("{loaded:?}").contains("hush"));
    }
}
