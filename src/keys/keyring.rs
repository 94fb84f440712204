//! The credentials in use: keys are read once, checked from memory, and ended when revoked.

use std::{collections::HashMap, sync::Arc, time::Duration};

use parking_lot::Mutex;
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;
use tokio_util::sync::CancellationToken;

use super::{
    Principal, Scope, Scopes,
    signer::{self, Claims, Grant, Signer},
    store::{self, Key},
};
use crate::{
    clock::{Clock, Micros},
    db::Db,
    error::{Error, Kind, Reason, Result},
    id::{Entropy, Namespace},
};

/// Revocations made elsewhere are seen after at most this long.
const REFRESH: Duration = Duration::from_secs(2);

/// A revocation is looked for this long after its time, in case clocks disagree.
const LOOK_BACK: Duration = Duration::from_mins(10);

const MINUTE: i64 = 60_000_000;

/// Checks credentials, and makes and ends keys; clones share it.
#[derive(Clone)]
pub struct Keyring(Arc<Inner>);

struct Inner {
    db: Db,
    clock: Clock,
    entropy: Entropy,
    signer: Signer,
    /// Everybody is an admin: a development server on loopback.
    open: bool,
    cached: Mutex<HashMap<String, Cached>>,
}

struct Cached {
    secret_hash: [u8; 32],
    access: Access,
    expire_time: Option<Micros>,
    /// Minute of the last use, and whether the row says so.
    used: i64,
    noted: bool,
}

/// A credential that was accepted.
#[derive(Clone, Debug)]
pub struct Access {
    /// On whose behalf.
    pub principal: Principal,
    /// Cancelled when the credential ends while a stream is open under it.
    pub ended: CancellationToken,
    /// When it ends by itself.
    pub expire_time: Option<Micros>,
}

impl Keyring {
    /// Reads the signing key, making it on the first start. With `open`, calls without a
    /// credential are made by [`Principal::local`].
    pub async fn open(db: Db, clock: Clock, entropy: Entropy, open: bool) -> Result<Self> {
        let mut fresh = [0; 32];
        entropy.fill(&mut fresh);
        let key = db
            .write(move |tx| {
                Box::pin(async move { store::setting(tx, "signing_key", &fresh).await })
            })
            .await?;
        let key: [u8; 32] = key
            .try_into()
            .map_err(|_| Error::internal("the setting `signing_key` is not 32 bytes long"))?;
        let signer = Signer::new(&key, clock.clone());
        let cached = Mutex::default();
        Ok(Self(Arc::new(Inner { db, clock, entropy, signer, open, cached })))
    }

    /// Signs tokens.
    pub fn signer(&self) -> &Signer {
        &self.0.signer
    }

    /// The clock that credentials expire by.
    pub fn clock(&self) -> &Clock {
        &self.0.clock
    }

    /// Checks a credential from memory; `None` when its key must be read first.
    pub fn check_cached(&self, credential: Option<&str>) -> Option<Result<Access>> {
        let Some(credential) = credential else {
            return Some(if self.0.open { Ok(local()) } else { Err(missing()) });
        };
        if credential.starts_with(signer::PREFIX) {
            let Some(claims) = self.0.signer.verify(credential) else { return Some(Err(wrong())) };
            let ended = match &claims.key_id {
                None => CancellationToken::new(),
                Some(key) => self.0.cached.lock().get(key)?.access.ended.clone(),
            };
            if ended.is_cancelled() {
                return Some(Err(wrong()));
            }
            return Some(Ok(token_access(claims, ended)));
        }
        let Some((id, secret)) = split(credential) else { return Some(Err(wrong())) };
        let hash: [u8; 32] = Sha256::digest(secret).into();
        let mut cached = self.0.cached.lock();
        let key = cached.get_mut(id)?;
        let now = self.0.clock.now();
        let genuine: bool = key.secret_hash.ct_eq(&hash).into();
        if !genuine || key.access.ended.is_cancelled() || key.expire_time.is_some_and(|t| t <= now)
        {
            return Some(Err(wrong()));
        }
        let minute = now.0 - now.0.rem_euclid(MINUTE);
        if key.used != minute {
            (key.used, key.noted) = (minute, false);
        }
        Some(Ok(key.access.clone()))
    }

    /// Checks a credential.
    pub async fn check(&self, credential: Option<&str>) -> Result<Access> {
        if let Some(known) = self.check_cached(credential) {
            return known;
        }
        let text = credential.unwrap_or_default();
        let id = match self.0.signer.verify(text) {
            Some(claims) => claims.key_id.ok_or_else(wrong)?,
            None => split(text).ok_or_else(wrong)?.0.to_owned(),
        };
        let key = self
            .0
            .db
            .read(|tx| Box::pin(async move { store::find(tx, &id).await }))
            .await?
            .ok_or_else(wrong)?;
        self.remember(key);
        self.check_cached(credential).unwrap_or_else(|| Err(wrong()))
    }

    /// Makes a key; the secret is in the answer and nowhere else.
    pub async fn create(
        &self,
        namespace: Namespace,
        display_name: String,
        scopes: Scopes,
        ttl: Option<Duration>,
    ) -> Result<(Key, String)> {
        let (mut id, mut secret) = ([0; 8], [0; 32]);
        self.0.entropy.fill(&mut id);
        self.0.entropy.fill(&mut secret);
        let (id, secret) = (hex::encode(id), hex::encode(secret));
        let create_time = self.0.clock.now();
        let key = Key {
            id,
            namespace,
            display_name,
            secret_hash: Sha256::digest(&secret).to_vec(),
            scopes,
            create_time,
            expire_time: ttl.map(|ttl| create_time + ttl),
            revoke_time: None,
            last_used_time: None,
        };
        let row = key.clone();
        self.0.db.write(|tx| Box::pin(async move { store::insert(tx, &row).await })).await?;
        let text = format!("bt_{}_{secret}", key.id);
        Ok((key, text))
    }

    /// Makes the first admin key, if there is no key at all.
    pub async fn bootstrap(&self) -> Result<Option<String>> {
        let empty = self.0.db.read(|tx| Box::pin(store::is_empty(tx))).await?;
        if !empty {
            return Ok(None);
        }
        let namespace = Namespace::from(Namespace::DEFAULT);
        let scopes = [Scope::Admin].into_iter().collect();
        let (_, text) = self.create(namespace, "first admin".into(), scopes, None).await?;
        Ok(Some(text))
    }

    /// Keys, newest first; of one namespace, or of all.
    pub async fn list(
        &self,
        namespace: Option<Namespace>,
        before: Option<(Micros, String)>,
        limit: u32,
    ) -> Result<Vec<Key>> {
        self.0
            .db
            .read(move |tx| {
                Box::pin(async move { store::list(tx, namespace.as_ref(), before, limit).await })
            })
            .await
    }

    /// Revokes a key; what is open under it ends now.
    pub async fn revoke(&self, namespace: Option<Namespace>, id: String) -> Result<Key> {
        let now = self.0.clock.now();
        let key = self
            .0
            .db
            .write(move |tx| {
                Box::pin(async move { store::revoke(tx, namespace.as_ref(), &id, now).await })
            })
            .await?;
        self.end(&key.id);
        Ok(key)
    }

    /// Ends what was revoked elsewhere or has expired, and writes down what was used.
    pub async fn run_once(&self) -> Result<()> {
        let now = self.0.clock.now();
        let since = now - LOOK_BACK;
        let revoked = self
            .0
            .db
            .read(move |tx| Box::pin(async move { store::revoked_since(tx, since).await }))
            .await?;
        for id in &revoked {
            self.end(id);
        }
        let mut used = Vec::new();
        for (id, key) in self.0.cached.lock().iter_mut() {
            if key.expire_time.is_some_and(|time| time <= now) {
                key.access.ended.cancel();
            }
            if !key.noted {
                key.noted = true;
                used.push((id.clone(), Micros(key.used)));
            }
        }
        if used.is_empty() {
            return Ok(());
        }
        self.0
            .db
            .write(|tx| {
                Box::pin(async move {
                    for (id, time) in used {
                        store::touch(tx, &id, time).await?;
                    }
                    Ok(())
                })
            })
            .await
    }

    /// The loop of [`run_once`](Self::run_once).
    pub async fn run(self) -> anyhow::Result<()> {
        loop {
            self.0.clock.sleep(REFRESH).await;
            if let Err(error) = self.run_once().await {
                tracing::warn!(%error, "keys were not refreshed; trying again");
            }
        }
    }

    fn end(&self, id: &str) {
        if let Some(key) = self.0.cached.lock().get(id) {
            key.access.ended.cancel();
        }
    }

    fn remember(&self, key: Key) {
        let Ok(secret_hash) = <[u8; 32]>::try_from(key.secret_hash) else { return };
        let ended = CancellationToken::new();
        if key.revoke_time.is_some() {
            ended.cancel();
        }
        let principal = Principal {
            namespace: key.namespace,
            key_id: Some(key.id.clone()),
            name: format!("key {}", key.id),
            scopes: key.scopes,
            grant: None,
        };
        let used = key.last_used_time.map_or(0, |time| time.0);
        let expire_time = key.expire_time;
        let access = Access { principal, ended, expire_time };
        let cached = Cached { secret_hash, access, expire_time, used, noted: true };
        self.0.cached.lock().entry(key.id).or_insert(cached);
    }
}

fn local() -> Access {
    Access { principal: Principal::local(), ended: CancellationToken::new(), expire_time: None }
}

fn token_access(claims: Claims, ended: CancellationToken) -> Access {
    let scope = match claims.grant {
        Grant::Attempt(..) => Scope::Runner,
        Grant::Task(_) => Scope::TasksRead,
        Grant::Upload(_) => Scope::ArtifactsWrite,
        Grant::Artifact(_) => Scope::ArtifactsRead,
    };
    let principal = Principal {
        namespace: claims.namespace,
        key_id: claims.key_id,
        name: "signed token".into(),
        scopes: [scope].into_iter().collect(),
        grant: Some(claims.grant),
    };
    Access { principal, ended, expire_time: Some(claims.expire_time) }
}

/// Id and secret of a key's text.
fn split(text: &str) -> Option<(&str, &str)> {
    let (id, secret) = text.strip_prefix("bt_")?.split_once('_')?;
    (!id.is_empty() && id.len() <= 64 && secret.len() == 64).then_some((id, secret))
}

fn missing() -> Error {
    Error::new(
        Kind::Unauthenticated,
        Reason::Unauthenticated,
        "no credential; send an API key as `authorization: Bearer bt_…` or `x-api-key`",
    )
}

/// One answer for everything that is wrong with a credential.
fn wrong() -> Error {
    Error::new(
        Kind::Unauthenticated,
        Reason::Unauthenticated,
        "the credential is malformed, unknown, expired or revoked",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::TaskId;

    async fn keyring() -> (tempfile::TempDir, Keyring, Clock) {
        let dir = tempfile::tempdir().unwrap();
        let db = crate::db::testing::open(dir.path()).await;
        let clock = Clock::manual();
        let keyring = Keyring::open(db, clock.clone(), Entropy::seeded(1), false).await.unwrap();
        (dir, keyring, clock)
    }

    fn reader() -> Scopes {
        [Scope::TasksRead].into_iter().collect()
    }

    #[tokio::test]
    async fn a_key_works_until_it_is_revoked_and_ends_what_is_open() {
        let (_dir, keyring, _) = keyring().await;
        let (key, text) = keyring.create("a".into(), "n".into(), reader(), None).await.unwrap();
        let access = keyring.check(Some(&text)).await.unwrap();
        assert_eq!(access.principal.namespace.as_str(), "a");
        assert!(!access.principal.scopes.allow(Scope::TasksWrite));
        keyring.revoke(None, key.id).await.unwrap();
        assert!(access.ended.is_cancelled());
        assert!(keyring.check(Some(&text)).await.is_err());
    }

    #[tokio::test]
    async fn a_revocation_made_elsewhere_is_seen_by_the_refresh() {
        let (_dir, keyring, clock) = keyring().await;
        let (key, text) = keyring.create("a".into(), "n".into(), reader(), None).await.unwrap();
        let access = keyring.check(Some(&text)).await.unwrap();
        let (id, now) = (key.id.clone(), clock.now());
        let elsewhere = keyring.0.db.clone();
        elsewhere
            .write(move |tx| Box::pin(async move { store::revoke(tx, None, &id, now).await }))
            .await
            .unwrap();
        keyring.run_once().await.unwrap();
        assert!(access.ended.is_cancelled());
    }

    #[tokio::test]
    async fn an_expired_key_ends_and_the_last_use_is_kept_to_the_minute() {
        let (_dir, keyring, clock) = keyring().await;
        let ttl = Some(Duration::from_secs(90));
        let (_, text) = keyring.create("a".into(), "n".into(), reader(), ttl).await.unwrap();
        clock.advance(Duration::from_secs(70));
        let access = keyring.check(Some(&text)).await.unwrap();
        keyring.run_once().await.unwrap();
        let rows = keyring.list(None, None, 10).await.unwrap();
        assert_eq!(rows[0].last_used_time, Some(crate::clock::EPOCH + Duration::from_mins(1)));
        clock.advance(Duration::from_secs(20));
        assert!(keyring.check(Some(&text)).await.is_err());
        keyring.run_once().await.unwrap();
        assert!(access.ended.is_cancelled());
    }

    #[tokio::test]
    async fn forged_and_cut_keys_are_refused_alike() {
        let (_dir, keyring, _) = keyring().await;
        let (_, text) = keyring.create("a".into(), "n".into(), reader(), None).await.unwrap();
        let other =
            format!("{}{}", &text[..text.len() - 1], if text.ends_with('0') { '1' } else { '0' });
        let bad = [
            "",
            "bt_",
            "bt__",
            "btt_x.y",
            &text[..40],
            &format!("{text}0"),
            &other,
            &text.to_uppercase(),
        ];
        for credential in bad {
            let error = keyring.check(Some(credential)).await.unwrap_err();
            assert_eq!(error.message(), wrong().message(), "{credential}");
        }
        assert!(keyring.check(None).await.is_err());
    }

    #[tokio::test]
    async fn a_task_token_dies_with_the_key_that_asked_for_it() {
        let (_dir, keyring, clock) = keyring().await;
        let (key, _) = keyring.create("a".into(), "n".into(), reader(), None).await.unwrap();
        let task = TaskId::new(clock.now(), &Entropy::seeded(2));
        let token = keyring.signer().sign(&Claims {
            namespace: "a".into(),
            grant: Grant::Task(task),
            key_id: Some(key.id.clone()),
            expire_time: clock.now() + Duration::from_mins(1),
        });
        let access = keyring.check(Some(&token)).await.unwrap();
        assert_eq!(access.principal.grant, Some(Grant::Task(task)));
        assert!(
            access.principal.check_task(TaskId::new(clock.now(), &Entropy::seeded(3))).is_err()
        );
        keyring.revoke(None, key.id).await.unwrap();
        assert!(access.ended.is_cancelled());
        assert!(keyring.check(Some(&token)).await.is_err());
    }

    #[tokio::test]
    async fn no_secret_is_in_the_database() {
        let (dir, keyring, _) = keyring().await;
        let (_, text) = keyring.create("a".into(), "n".into(), reader(), None).await.unwrap();
        let secret = text.rsplit('_').next().unwrap().as_bytes();
        for file in std::fs::read_dir(dir.path()).unwrap() {
            let bytes = std::fs::read(file.unwrap().path()).unwrap();
            assert!(!bytes.windows(secret.len()).any(|window| window == secret));
        }
    }

    #[tokio::test]
    async fn the_first_key_is_made_once_and_the_signing_key_outlives_a_restart() {
        let (dir, keyring, clock) = keyring().await;
        assert!(keyring.bootstrap().await.unwrap().is_some());
        assert!(keyring.bootstrap().await.unwrap().is_none());
        let task = TaskId::new(clock.now(), &Entropy::seeded(2));
        let token = keyring.signer().attempt_token(&"a".into(), task, 1, Duration::from_mins(1));
        let db = crate::db::testing::open(dir.path()).await;
        let again = Keyring::open(db, clock, Entropy::seeded(9), false).await.unwrap();
        assert_eq!(again.check(Some(&token)).await.unwrap().principal.attempt(), Some((task, 1)));
    }
}
