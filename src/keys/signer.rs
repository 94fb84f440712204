//! Signed tokens: what they say is in them, so that nothing is stored and nothing looked up.

use std::time::Duration;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use hmac::{Hmac, Mac as _};
use sha2::Sha256;

use crate::{
    clock::{Clock, Micros},
    id::{Namespace, TaskId},
};

/// First letters of every signed token.
pub(super) const PREFIX: &str = "btt_";

/// Signs and checks tokens with a key that never leaves the database; clones share it.
#[derive(Clone)]
pub struct Signer {
    mac: Hmac<Sha256>,
    clock: Clock,
}

impl std::fmt::Debug for Signer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Signer")
    }
}

/// What a token speaks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Grant {
    /// Reporting for one attempt.
    Attempt(TaskId, u32),
    /// Reading one task.
    Task(TaskId),
}

/// What a token says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claims {
    /// Tenant.
    pub namespace: Namespace,
    /// What it opens.
    pub grant: Grant,
    /// Key that asked for it; the token dies with the key.
    pub key_id: Option<String>,
    /// Stops working.
    pub expire_time: Micros,
}

impl Signer {
    /// A signer with that key.
    pub fn new(key: &[u8; 32], clock: Clock) -> Self {
        let mac = Hmac::new_from_slice(key).expect("HMAC takes keys of any length");
        Self { mac, clock }
    }

    /// A token with which a runner reports one attempt of one task.
    pub fn attempt_token(
        &self,
        namespace: &Namespace,
        task: TaskId,
        attempt: u32,
        ttl: Duration,
    ) -> String {
        self.sign(&Claims {
            namespace: namespace.clone(),
            grant: Grant::Attempt(task, attempt),
            key_id: None,
            expire_time: self.clock.now() + ttl,
        })
    }

    /// A token with those claims.
    pub fn sign(&self, claims: &Claims) -> String {
        let (task, attempt) = match claims.grant {
            Grant::Attempt(task, attempt) => (task, attempt.to_string()),
            Grant::Task(task) => (task, String::new()),
        };
        let key = claims.key_id.as_deref().unwrap_or_default();
        // No field may hold the separator: names are of letters, digits and dashes.
        let text =
            format!("1|{}|{task}|{attempt}|{key}|{}", claims.namespace, claims.expire_time.0);
        let mac = self.mac.clone().chain_update(&text).finalize().into_bytes();
        format!("{PREFIX}{}.{}", URL_SAFE_NO_PAD.encode(text), URL_SAFE_NO_PAD.encode(mac))
    }

    /// What a genuine token that has not expired says.
    pub fn verify(&self, token: &str) -> Option<Claims> {
        let (text, mac) = token.strip_prefix(PREFIX)?.split_once('.')?;
        let (text, mac) = (URL_SAFE_NO_PAD.decode(text).ok()?, URL_SAFE_NO_PAD.decode(mac).ok()?);
        // Compares in constant time.
        self.mac.clone().chain_update(&text).verify_slice(&mac).ok()?;
        let text = String::from_utf8(text).ok()?;
        let parts: Vec<&str> = text.split('|').collect();
        let ["1", namespace, task, attempt, key, expires] = parts[..] else { return None };
        let task = task.parse().ok()?;
        let grant = match attempt {
            "" => Grant::Task(task),
            attempt => Grant::Attempt(task, attempt.parse().ok()?),
        };
        let claims = Claims {
            namespace: namespace.into(),
            grant,
            key_id: (!key.is_empty()).then(|| key.to_owned()),
            expire_time: Micros(expires.parse().ok()?),
        };
        (self.clock.now() < claims.expire_time).then_some(claims)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::Entropy;

    fn signer() -> (Signer, TaskId, Clock) {
        let clock = Clock::manual();
        let task = TaskId::new(clock.now(), &Entropy::seeded(1));
        (Signer::new(&[7; 32], clock.clone()), task, clock)
    }

    #[test]
    fn a_token_says_what_was_signed_until_it_expires() {
        let (signer, task, clock) = signer();
        let token = signer.attempt_token(&"a".into(), task, 3, Duration::from_mins(1));
        let claims = signer.verify(&token).unwrap();
        assert_eq!((claims.namespace.as_str(), &claims.grant), ("a", &Grant::Attempt(task, 3)));
        clock.advance(Duration::from_mins(1));
        assert_eq!(signer.verify(&token), None);
    }

    #[test]
    fn no_changed_byte_and_no_other_key_passes() {
        let (signer, task, clock) = signer();
        let token = signer.attempt_token(&"a".into(), task, 3, Duration::from_mins(1));
        for at in 0..token.len() {
            let mut bytes = token.clone().into_bytes();
            bytes[at] = if bytes[at] == b'A' { b'B' } else { b'A' };
            let forged = String::from_utf8(bytes).unwrap();
            assert_eq!(signer.verify(&forged), None, "byte {at}");
            assert_eq!(signer.verify(&token[..at]), None, "cut at {at}");
        }
        assert_eq!(signer.verify(&format!("{token}=")), None);
        assert_eq!(Signer::new(&[8; 32], clock).verify(&token), None);
    }
}
