//! From a credential to a [`Principal`], and whether it may call the method.

use http::HeaderMap;
use tonic::{Request, Status};

use super::methods::{Access, Method};
use crate::{
    config,
    error::{Error, Kind, Reason, Result},
    keys::{self, Keyring, Principal, Scopes},
};

/// The principal that the auth layer found for this call.
pub fn principal<T>(request: &Request<T>) -> Result<Principal, Status> {
    request.extensions().get::<Principal>().cloned().ok_or_else(|| {
        Error::new(Kind::Unauthenticated, Reason::Unauthenticated, "no credential").into()
    })
}

/// The credential of a request: a bearer token or an API key.
pub(super) fn credential(headers: &HeaderMap) -> Result<Option<&str>> {
    let malformed = || {
        Error::new(
            Kind::Unauthenticated,
            Reason::Unauthenticated,
            "send one credential, as `authorization: Bearer …` or as `x-api-key`",
        )
    };
    let one = |name: &str| {
        let mut values = headers.get_all(name).iter();
        let value = values.next().map(|value| value.to_str().map_err(|_| malformed()));
        if values.next().is_some() { Err(malformed()) } else { value.transpose() }
    };
    match (one("authorization")?, one("x-api-key")?) {
        (None, key) => Ok(key.map(str::trim)),
        (Some(_), Some(_)) => Err(malformed()),
        (Some(text), None) => {
            let (scheme, token) = text.split_once(' ').ok_or_else(malformed)?;
            if !scheme.eq_ignore_ascii_case("bearer") {
                return Err(malformed());
            }
            Ok(Some(token.trim()))
        }
    }
}

/// Checks the credential and what it may do.
pub(super) async fn admit(
    keyring: &Keyring,
    config: &config::Auth,
    headers: &HeaderMap,
    method: &Method,
) -> Result<keys::Access> {
    let open = match method.access {
        Access::Health => config.open_health,
        Access::Reflection => config.open_reflection,
        Access::Scope(_) | Access::ScopeOrToken(..) => false,
    };
    if open {
        let principal =
            Principal { name: "anybody".into(), scopes: Scopes::default(), ..Principal::local() };
        return Ok(keys::Access { principal, ended: Default::default(), expire_time: None });
    }
    let credential = credential(headers)?;
    let checked = match keyring.check_cached(credential) {
        Some(checked) => checked,
        None => keyring.check(credential).await,
    };
    let access = checked.inspect_err(|error| {
        tracing::info!(target: "baton::audit", method = method.name, "call denied: {error}");
    })?;
    if method.access.admits(&access.principal) {
        return Ok(access);
    }
    let (who, scope) = (&access.principal.name, method.access.scope());
    let scope = scope.map_or("none", |scope| scope.as_str());
    tracing::info!(target: "baton::audit", method = method.name, by = who, scope, "call denied");
    let message = format!("{who} may not call {}, which needs the scope `{scope}`", method.name);
    Err(Error::new(Kind::PermissionDenied, Reason::PermissionDenied, message)
        .with("scope", scope)
        .with("method", method.name))
}
