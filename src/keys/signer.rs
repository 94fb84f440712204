//! Signed tokens: what they say is in them, so that nothing is stored and nothing looked up.

use std::time::Duration;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use hmac::{Hmac, Mac as _};
use sha2::Sha256;

use crate::{
    clock::{Clock, Micros},
    id::{ArtifactId, Namespace, TaskId, UploadId},
};

/// First letters of every signed token.
pub(super) const PREFIX: &str = "btt_";

/// What a token for an upload, or for an artifact, says in the place of an attempt's number.
const UPLOAD: &str = "u";
const ARTIFACT: &str = "a";

/// Bytes of a signature.
const MAC: usize = 32;

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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grant {
    /// Reporting for one attempt.
    Attempt(TaskId, u32),
    /// Reading one task.
    Task(TaskId),
    /// Putting the bytes of one upload.
    Upload(UploadId),
    /// Reading one artifact: a shared link.
    Artifact(ArtifactId),
}

/// Kinds of [`Grant`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenKind {
    /// For an attempt.
    Attempt,
    /// For a task.
    Task,
    /// For an upload.
    Upload,
    /// For an artifact.
    Artifact,
}

impl Grant {
    /// Its kind.
    pub fn kind(&self) -> TokenKind {
        match self {
            Self::Attempt(..) => TokenKind::Attempt,
            Self::Task(_) => TokenKind::Task,
            Self::Upload(_) => TokenKind::Upload,
            Self::Artifact(_) => TokenKind::Artifact,
        }
    }
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

    /// Seals and opens receipts with the same key.
    pub fn receipts(&self) -> Receipts {
        Receipts(self.mac.clone())
    }

    /// A token with those claims.
    pub fn sign(&self, claims: &Claims) -> String {
        let (id, what) = match claims.grant {
            Grant::Attempt(task, attempt) => (task.to_string(), attempt.to_string()),
            Grant::Task(task) => (task.to_string(), String::new()),
            Grant::Upload(upload) => (upload.to_string(), UPLOAD.into()),
            Grant::Artifact(artifact) => (artifact.to_string(), ARTIFACT.into()),
        };
        let key = claims.key_id.as_deref().unwrap_or_default();
        // No field may hold the separator: names are of letters, digits and dashes.
        let text = format!("1|{}|{id}|{what}|{key}|{}", claims.namespace, claims.expire_time.0);
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
        let ["1", namespace, id, what, key, expires] = parts[..] else { return None };
        let grant = match what {
            "" => Grant::Task(id.parse().ok()?),
            UPLOAD => Grant::Upload(id.parse().ok()?),
            ARTIFACT => Grant::Artifact(id.parse().ok()?),
            attempt => Grant::Attempt(id.parse().ok()?, attempt.parse().ok()?),
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

/// Proofs that an attempt made an artifact: whoever lists it need not look it up. A proof holds what
/// it proves, for one attempt and no other; clones share the key.
#[derive(Clone)]
pub struct Receipts(Hmac<Sha256>);

impl std::fmt::Debug for Receipts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Receipts")
    }
}

impl Receipts {
    /// Seals `facts` for an attempt.
    pub fn seal(&self, task: TaskId, attempt: u32, facts: &[u8]) -> Vec<u8> {
        let mut sealed = self.mac(task, attempt, facts).finalize().into_bytes().to_vec();
        sealed.extend_from_slice(facts);
        sealed
    }

    /// The facts of a genuine receipt of that attempt.
    pub fn open<'r>(&self, task: TaskId, attempt: u32, receipt: &'r [u8]) -> Option<&'r [u8]> {
        let (mac, facts) = receipt.split_at_checked(MAC)?;
        self.mac(task, attempt, facts).verify_slice(mac).ok()?;
        Some(facts)
    }

    /// The facts of a receipt that was opened before.
    pub fn facts(receipt: &[u8]) -> &[u8] {
        receipt.get(MAC..).unwrap_or_default()
    }

    fn mac(&self, task: TaskId, attempt: u32, facts: &[u8]) -> Hmac<Sha256> {
        // No token begins so: they begin with the digit 1.
        self.0
            .clone()
            .chain_update(b"receipt|")
            .chain_update(task.0.as_bytes())
            .chain_update(attempt.to_be_bytes())
            .chain_update(facts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::Entropy;

    #[test]
    fn a_receipt_opens_for_its_attempt_only_and_only_as_it_was() {
        let (signer, task, clock) = signer();
        let receipts = signer.receipts();
        let receipt = receipts.seal(task, 2, b"facts");
        assert_eq!(receipts.open(task, 2, &receipt), Some(&b"facts"[..]));
        assert_eq!(receipts.open(task, 1, &receipt), None);
        let other = TaskId::new(clock.now(), &Entropy::seeded(2));
        assert_eq!(receipts.open(other, 2, &receipt), None);
        for at in 0..receipt.len() {
            let mut forged = receipt.clone();
            forged[at] ^= 1;
            assert_eq!(receipts.open(task, 2, &forged), None, "byte {at}");
            assert_eq!(receipts.open(task, 2, &receipt[..at]), None, "cut at {at}");
        }
        let other_key = Signer::new(&[8; 32], clock).receipts();
        assert_eq!(other_key.open(task, 2, &receipt), None);
    }

    #[test]
    fn tokens_for_uploads_and_artifacts_open_those_and_nothing_else() {
        let (signer, task, clock) = signer();
        let expire_time = clock.now() + Duration::from_mins(1);
        let grants = [
            Grant::Upload(UploadId(task.0)),
            Grant::Artifact(ArtifactId(task.0)),
            Grant::Task(task),
            Grant::Attempt(task, 7),
        ];
        for grant in grants {
            let claims = Claims { namespace: "a".into(), grant, key_id: None, expire_time };
            assert_eq!(signer.verify(&signer.sign(&claims)), Some(claims));
        }
    }

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
