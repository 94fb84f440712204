//! Keys between domain and wire.

use std::time::Duration;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};

use super::{Scope, Scopes, store::Key};
use crate::{
    clock::Micros,
    error::{Error, Result, Violation},
    id::Namespace,
    pb,
};

/// A key without its secret.
pub fn key_to_pb(key: Key) -> pb::Key {
    pb::Key {
        key_id: key.id,
        display_name: key.display_name,
        namespace: key.namespace.to_string(),
        scopes: key.scopes.iter().map(|scope| scope_to_pb(scope) as i32).collect(),
        create_time: Some(timestamp(key.create_time)),
        expire_time: key.expire_time.map(timestamp),
        revoke_time: key.revoke_time.map(timestamp),
        last_used_time: key.last_used_time.map(timestamp),
    }
}

/// What `CreateKey` asks for.
pub struct NewKey {
    /// Name for people.
    pub display_name: String,
    /// At least one.
    pub scopes: Scopes,
    /// How long it lives.
    pub ttl: Option<Duration>,
    /// Tenant, when named.
    pub namespace: Option<Namespace>,
}

impl TryFrom<pb::CreateKeyRequest> for NewKey {
    type Error = Error;

    fn try_from(request: pb::CreateKeyRequest) -> Result<Self> {
        let mut violations = Vec::new();
        let mut refuse = |field: &str, description: &str| {
            violations.push(Violation { field: field.into(), description: description.into() });
        };
        let length = request.display_name.chars().count();
        if !(1..=128).contains(&length) || request.display_name.chars().any(char::is_control) {
            refuse("display_name", "must have 1 to 128 characters, none of them a control");
        }
        let mut scopes = Vec::new();
        for (i, scope) in request.scopes.iter().enumerate() {
            match pb::Scope::try_from(*scope).ok().and_then(scope_from_pb) {
                Some(scope) => scopes.push(scope),
                None => refuse(&format!("scopes[{i}]"), "is not a scope"),
            }
        }
        if request.scopes.is_empty() {
            refuse("scopes", "must name at least one scope");
        }
        let ttl = match request.ttl {
            None => None,
            Some(ttl) => match Duration::try_from(ttl) {
                Ok(ttl) if !ttl.is_zero() => Some(ttl),
                _ => {
                    refuse("ttl", "must be more than zero");
                    None
                }
            },
        };
        let namespace = request.namespace;
        let named = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if namespace.len() > 63 || !namespace.chars().all(named) {
            refuse("namespace", "must have 1 to 63 characters of a-z, 0-9 and -");
        }
        if !violations.is_empty() {
            return Err(Error::invalid_all(violations));
        }
        Ok(Self {
            display_name: request.display_name,
            scopes: scopes.into_iter().collect(),
            ttl,
            namespace: (!namespace.is_empty()).then(|| namespace.into()),
        })
    }
}

/// Where the next page begins, as a token.
pub fn page_token(key: &Key) -> String {
    URL_SAFE_NO_PAD.encode(format!("{} {}", key.create_time.0, key.id))
}

/// Reads a page token.
pub fn read_page_token(token: &str) -> Result<Option<(Micros, String)>> {
    if token.is_empty() {
        return Ok(None);
    }
    let read = || {
        let text = String::from_utf8(URL_SAFE_NO_PAD.decode(token).ok()?).ok()?;
        let (time, id) = text.split_once(' ')?;
        Some((Micros(time.parse().ok()?), id.to_owned()))
    };
    match read() {
        Some(start) => Ok(Some(start)),
        None => Err(Error::invalid("page_token", "is not one that this server made")),
    }
}

/// A time on the wire.
pub fn timestamp(time: Micros) -> pb::google::protobuf::Timestamp {
    pb::google::protobuf::Timestamp {
        seconds: time.0.div_euclid(1_000_000),
        nanos: (time.0.rem_euclid(1_000_000) * 1_000) as i32,
    }
}

fn scope_to_pb(scope: Scope) -> pb::Scope {
    match scope {
        Scope::TasksRead => pb::Scope::TasksRead,
        Scope::TasksWrite => pb::Scope::TasksWrite,
        Scope::Runner => pb::Scope::Runner,
        Scope::ArtifactsRead => pb::Scope::ArtifactsRead,
        Scope::ArtifactsWrite => pb::Scope::ArtifactsWrite,
        Scope::Admin => pb::Scope::Admin,
    }
}

fn scope_from_pb(scope: pb::Scope) -> Option<Scope> {
    match scope {
        pb::Scope::Unspecified => None,
        pb::Scope::TasksRead => Some(Scope::TasksRead),
        pb::Scope::TasksWrite => Some(Scope::TasksWrite),
        pb::Scope::Runner => Some(Scope::Runner),
        pb::Scope::ArtifactsRead => Some(Scope::ArtifactsRead),
        pb::Scope::ArtifactsWrite => Some(Scope::ArtifactsWrite),
        pb::Scope::Admin => Some(Scope::Admin),
    }
}
