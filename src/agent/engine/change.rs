//! What commands change in an engine: the models that it has loaded, and its parameters.

use std::{collections::BTreeMap, sync::Arc};

use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use tokio::sync::Notify;

use crate::error::{Error, Kind, Reason, Violation};

/// What is to change. An engine that fails to make a change is as it was before.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// Load a model, in place of what is loaded by that name.
    Load {
        /// `owner/name`, `owner/name@version` or `*`.
        model: String,
        /// The engine's own.
        options: Map<String, Value>,
    },
    /// Unload a model; nothing happens when it is not loaded.
    Unload {
        /// As it was loaded.
        model: String,
    },
    /// Load anew, from where it came.
    Reload {
        /// As it was loaded; all when `None`.
        model: Option<String>,
    },
    /// Set parameters; null takes one back to what the engine was started with.
    Tune {
        /// The engine's own.
        params: Map<String, Value>,
    },
}

impl Change {
    /// The refusal of an engine that does not do such a thing.
    pub fn unsupported(&self, engine: &str) -> Error {
        let what = match self {
            Self::Load { .. } => "load models",
            Self::Unload { .. } => "unload models",
            Self::Reload { .. } => "reload",
            Self::Tune { .. } => "be tuned",
        };
        let message = format!("engine `{engine}` cannot {what} by command");
        Error::new(Kind::Unimplemented, Reason::CommandUnsupported, message)
    }
}

/// How far a change is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Steps done.
    pub done: u64,
    /// Steps in all; 0 when unknown.
    pub total: u64,
    /// What is being done.
    pub detail: String,
}

/// Where an engine says how far a change is; clones share it.
#[derive(Clone, Debug, Default)]
pub struct Progress(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    latest: Mutex<Option<Step>>,
    bell: Notify,
}

impl Progress {
    /// Says how far it is. May be called often: only the latest counts.
    pub fn report(&self, done: u64, total: u64, detail: &str) {
        *self.0.latest.lock() = Some(Step { done, total, detail: detail.to_owned() });
        self.0.bell.notify_one();
    }

    /// The latest that was not taken yet. Can be dropped and called again.
    pub async fn next(&self) -> Step {
        loop {
            if let Some(step) = self.0.latest.lock().take() {
                return step;
            }
            self.0.bell.notified().await;
        }
    }
}

/// What was loaded by command, by the model's name as it was loaded.
#[derive(Clone, Debug)]
pub struct Loaded<T>(BTreeMap<String, T>);

impl<T> Default for Loaded<T> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<T: Clone> Loaded<T> {
    /// Loads, in place of what is there.
    pub fn insert(&mut self, model: String, loaded: T) {
        self.0.insert(model, loaded);
    }

    /// Unloads.
    pub fn remove(&mut self, model: &str) {
        self.0.remove(model);
    }

    /// All with this name; with all names when `None`.
    pub fn named(&self, model: Option<&str>) -> Vec<(String, T)> {
        let wanted = self.0.iter().filter(|(name, _)| model.is_none_or(|model| model == *name));
        wanted.map(|(name, loaded)| (name.clone(), loaded.clone())).collect()
    }

    /// What a task for `model` runs on, and for `version` unless that is empty: the closest name.
    pub fn find(&self, model: &str, version: &str) -> Option<&T> {
        let exact = self.0.get(&format!("{model}@{version}"));
        let any_version = || {
            let prefix = format!("{model}@");
            let (name, loaded) = self.0.range(prefix.clone()..).next()?;
            (version.is_empty() && name.starts_with(&prefix)).then_some(loaded)
        };
        exact.or_else(|| self.0.get(model)).or_else(any_version).or_else(|| self.0.get("*"))
    }
}

/// Parameters that were set over those that an engine was started with.
#[derive(Clone, Debug, Default)]
pub struct Tuned<T> {
    /// As they were set.
    pub map: Map<String, Value>,
    /// As the engine reads them.
    pub value: T,
}

impl<T: DeserializeOwned> Tuned<T> {
    /// These with others set.
    ///
    /// # Errors
    /// `INVALID_PARAMS` that names each one that is not among `known` or does not fit.
    pub fn with(&self, params: &Map<String, Value>, known: &[&str]) -> Result<Self, Error> {
        check_names("params", params, known)?;
        let mut map = self.map.clone();
        for (name, value) in params {
            match value {
                Value::Null => map.remove(name),
                value => map.insert(name.clone(), value.clone()),
            };
        }
        Ok(Self { value: read("params", &map, known)?, map })
    }
}

/// Reads an object whose fields are all optional.
///
/// # Errors
/// `INVALID_PARAMS` that names each field that is not among `known` or does not fit; `what` is
/// the name of the whole.
pub fn read<T: DeserializeOwned>(
    what: &str,
    given: &Map<String, Value>,
    known: &[&str],
) -> Result<T, Error> {
    check_names(what, given, known)?;
    let whole = serde_json::from_value(Value::Object(given.clone()));
    whole.map_err(|error: serde_json::Error| {
        // A field alone tells whether it is the one.
        let alone = |name: &String, value: &Value| {
            let object = Map::from_iter([(name.clone(), value.clone())]);
            serde_json::from_value::<T>(Value::Object(object)).err()
        };
        let wrong = given.iter().filter_map(|(name, value)| {
            let description = alone(name, value)?.to_string();
            Some(Violation { field: format!("{what}.{name}"), description })
        });
        let wrong: Vec<_> = wrong.collect();
        if wrong.is_empty() {
            Error::invalid(what, error.to_string())
        } else {
            Error::invalid_all(wrong)
        }
    })
}

fn check_names(what: &str, given: &Map<String, Value>, known: &[&str]) -> Result<(), Error> {
    let unknown = given.keys().filter(|name| !known.contains(&name.as_str()));
    let unknown: Vec<_> = unknown
        .map(|name| Violation {
            field: format!("{what}.{name}"),
            description: match known {
                [] => "is unknown; the engine takes none".to_owned(),
                known => format!("is unknown; the engine takes {}", known.join(", ")),
            },
        })
        .collect();
    if unknown.is_empty() { Ok(()) } else { Err(Error::invalid_all(unknown)) }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;
    use serde_json::json;

    use super::*;

    const KNOWN: &[&str] = &["rate", "limit"];

    #[derive(Debug, Default, Deserialize)]
    struct Settings {
        rate: Option<f64>,
        limit: Option<u64>,
    }

    fn object(value: Value) -> Map<String, Value> {
        let Value::Object(map) = value else { panic!("no object: {value}") };
        map
    }

    #[test]
    fn a_task_runs_on_the_closest_name() {
        let mut loaded = Loaded::default();
        for name in ["*", "a/b", "a/b@2", "a/c@1"] {
            loaded.insert(name.to_owned(), name);
        }
        let find = |model, version| loaded.find(model, version).copied();
        assert_eq!(find("a/b", "2"), Some("a/b@2"));
        assert_eq!(find("a/b", "3"), Some("a/b"));
        assert_eq!(find("a/b", ""), Some("a/b"));
        assert_eq!(find("a/c", ""), Some("a/c@1"));
        assert_eq!(find("a/c", "2"), Some("*"));
        assert_eq!(find("a/d", ""), Some("*"));
        loaded.remove("*");
        assert_eq!(loaded.find("a/c", "2"), None);
    }

    #[test]
    fn parameters_add_up_and_null_takes_one_back() {
        let tuned = Tuned::<Settings>::default();
        let tuned = tuned.with(&object(json!({"rate": 2.5, "limit": 3})), KNOWN).unwrap();
        let tuned = tuned.with(&object(json!({"rate": null})), KNOWN).unwrap();
        assert_eq!((tuned.value.rate, tuned.value.limit), (None, Some(3)));
        assert_eq!(Value::Object(tuned.map), json!({"limit": 3}));
    }

    #[test]
    fn what_is_unknown_or_does_not_fit_is_named() {
        let tuned = Tuned::<Settings>::default();
        for (params, field) in [
            (json!({"limit": 1, "topk": 2}), "params.topk"),
            (json!({"topk": null}), "params.topk"),
            (json!({"rate": 1, "limit": "many"}), "params.limit"),
        ] {
            let error = tuned.with(&object(params), KNOWN).unwrap_err();
            assert_eq!(error.reason(), Reason::InvalidParams);
            let fields: Vec<_> = error.violations().iter().map(|wrong| &wrong.field).collect();
            assert_eq!(fields, [field]);
        }
    }
}
