//! What a server that is configured as here stands on: its database, its files, its port, its
//! certificate. Each is looked at as the server would use it.

use std::{net::SocketAddr, path::Path, time::Duration};

use bytes::Bytes;
use rustix::fs::{Access, access, statfs, statvfs};

use super::{
    Context,
    doctor::{Check, Mark, check},
    exit::root_cause,
    text,
};
use crate::{
    app,
    blob::{Digest, Key, Store, hash::Hasher},
    config::{Config, units::format_duration},
    db::{self, Facts, Location},
    id::Entropy,
    tls,
};

/// A clock that is off by more is worth a word.
const SKEW: Duration = Duration::from_secs(1);
/// A certificate that ends sooner is worth a word.
const RENEWAL: Duration = Duration::from_hours(24 * 14);
/// Longest time for a bucket to answer.
const PATIENCE: Duration = Duration::from_secs(15);
/// File systems on which locks and syncs are not what SQLite takes them for: NFS, SMB, CIFS.
const NETWORK: [i64; 3] = [0x6969, 0x517b, 0xff53_4d42];

/// Looks at each.
pub async fn look(context: &Context, config: &Config, reached: bool, checks: &mut Vec<Check>) {
    let at = app::database(config);
    match &at {
        Location::File(path) => file(path, &at, checks).await,
        Location::Url(url) => server(context, config, &at, url, checks).await,
    }
    redis(context, config, checks).await;
    disk(config, checks);
    if config.artifacts.store != "file" {
        bucket(config, checks).await;
    }
    port(config.server.addr, reached, checks);
    certificate(context, config, checks);
}

async fn file(path: &Path, at: &Location, checks: &mut Vec<Check>) {
    if !path.exists() {
        let found = format!("none at {} yet; the first start makes it", path.display());
        checks.push(check("database", Mark::Note, found, None));
        return;
    }
    if let Some(dir) = path.parent()
        && let Ok(stat) = statfs(dir)
        && NETWORK.contains(&stat.f_type)
    {
        let found =
            format!("{} is on a network file system, where a file is not safe", path.display());
        let hint = "name a local directory with --data-dir, or a server with --database-url";
        checks.push(check("database", Mark::Bad, found, Some(hint.into())));
        return;
    }
    if let Some(status) = status(at, checks).await {
        checks.push(check("database", Mark::Good, described(at, &status), None));
    }
}

/// What a database has of the migrations; what is wrong with it is a check of its own.
async fn status(at: &Location, checks: &mut Vec<Check>) -> Option<db::Status> {
    match db::status(at).await {
        Ok(status) => {
            let newest = status.known.last().map_or(0, |(version, _)| *version);
            if status.applied.iter().any(|version| *version > newest) {
                let found = format!("{at} was migrated by a newer binary than this one");
                let hint = "run that binary, or restore the backup made before: docs/operations.md";
                checks.push(check("database", Mark::Bad, found, Some(hint.into())));
                return None;
            }
            Some(status)
        }
        Err(error) => {
            let cause = std::error::Error::source(&error).map(root_cause);
            let found = cause.unwrap_or_else(|| error.to_string());
            let hint = match at {
                Location::File(_) => "restore a backup: baton db restore --help",
                Location::Url(_) => {
                    "name a database that is there and a user who may use it: --database-url postgres://USER:PASSWORD@HOST:PORT/NAME"
                }
            };
            checks.push(check(
                "database",
                Mark::Bad,
                format!("cannot use {at}: {found}"),
                Some(hint.into()),
            ));
            None
        }
    }
}

fn described(at: &Location, status: &db::Status) -> String {
    match status.pending().len() {
        0 => format!("{at}, no migration pending"),
        n => format!("{at}, {} pending; a start applies them", text::count(n as u64, "migration")),
    }
}

async fn server(
    context: &Context,
    config: &Config,
    at: &Location,
    url: &str,
    checks: &mut Vec<Check>,
) {
    let facts = match db::facts(url, &context.clock).await {
        Ok(facts) => facts,
        Err(error) => {
            let cause = std::error::Error::source(&error).map(root_cause);
            let found =
                format!("cannot reach {at}: {}", cause.unwrap_or_else(|| error.to_string()));
            let hint = "is the server up, the name right, and does it let this machine in? psql with the same URL says so too";
            checks.push(check("database", Mark::Bad, found, Some(hint.into())));
            return;
        }
    };
    let wrong = faults(&facts, config.database.connections as u64);
    let fatal = wrong.iter().any(|(mark, ..)| *mark == Mark::Bad);
    for (mark, found, hint) in wrong {
        checks.push(check("database", mark, found, Some(hint)));
    }
    if fatal {
        return;
    }
    if let Some(status) = status(at, checks).await {
        let sync = &facts.synchronous_commit;
        let took = format_duration(facts.round_trip);
        let found = format!(
            "{}; PostgreSQL {}, synchronous_commit {sync}, {took} away",
            described(at, &status),
            facts.version
        );
        checks.push(check("database", Mark::Good, found, None));
    }
    clock(&facts, checks);
}

/// What is wrong with a server, and how it is mended.
fn faults(facts: &Facts, wanted: u64) -> Vec<(Mark, String, String)> {
    let mut wrong = Vec::new();
    if facts.major < db::OLDEST_POSTGRES {
        wrong.push((
            Mark::Bad,
            format!("the server is PostgreSQL {}", facts.version),
            format!("use {} or newer", db::OLDEST_POSTGRES),
        ));
    }
    if facts.is_standby {
        wrong.push((
            Mark::Bad,
            "the server is a standby, which takes no writes".into(),
            "name the primary".into(),
        ));
    }
    if facts.synchronous_commit == "off" {
        wrong.push((
            Mark::Bad,
            "synchronous_commit is off: acknowledged tasks could be lost".into(),
            "set it: ALTER DATABASE … SET synchronous_commit = on".into(),
        ));
    }
    if facts.fsync == "off" {
        wrong.push((
            Mark::Note,
            "fsync is off: a power cut can lose the database".into(),
            "set it in postgresql.conf: fsync = on".into(),
        ));
    }
    if !facts.may_create {
        wrong.push((
            Mark::Note,
            "this user may not make tables, so that migrations fail".into(),
            "let it: GRANT CREATE ON SCHEMA public TO …, or migrate as the owner: baton db migrate"
                .into(),
        ));
    }
    let (most, used) = facts.connections;
    if most.saturating_sub(used) < wanted {
        wrong.push((
            Mark::Note,
            format!("{used} of {most} connections are in use, and a server opens up to {wanted}"),
            "raise max_connections there, or lower database.connections".into(),
        ));
    }
    wrong
}

fn clock(facts: &Facts, checks: &mut Vec<Check>) {
    let off = Duration::from_micros(facts.ahead.unsigned_abs());
    // What the way takes cannot be told from a difference.
    if off <= SKEW + facts.round_trip {
        checks.push(check("clock", Mark::Good, "as the database's", None));
        return;
    }
    let which = if facts.ahead > 0 { "behind" } else { "ahead of" };
    let found = format!("{} {which} the database's", format_duration(off));
    let hint = "let both follow a time server: chronyc tracking, timedatectl";
    checks.push(check("clock", Mark::Note, found, Some(hint.into())));
}

async fn redis(context: &Context, config: &Config, checks: &mut Vec<Check>) {
    let (mark, found, hint) = match app::look_at_redis(config, &context.clock).await {
        Ok(None) => return,
        Ok(Some((version, None))) => (Mark::Good, format!("version {version}"), None),
        Ok(Some((version, Some(policy)))) => (
            Mark::Note,
            format!("version {version}, forgets keys by {policy} when its memory is full"),
            Some("set it: CONFIG SET maxmemory-policy noeviction"),
        ),
        Err(error) => (
            Mark::Bad,
            format!("{error:#}"),
            Some(
                "name one that is there: BATON_REDIS_URL=redis://USER:PASSWORD@HOST:6379/0; the database alone does as well",
            ),
        ),
    };
    checks.push(check("redis", mark, found, hint.map(str::to_owned)));
}

fn disk(config: &Config, checks: &mut Vec<Check>) {
    let dir = &config.storage.data_dir;
    let absolute = std::path::absolute(dir).unwrap_or_else(|_| dir.clone());
    let there = absolute.ancestors().find(|dir| dir.exists()).unwrap_or(Path::new("/"));
    if let Err(error) = access(there, Access::WRITE_OK | Access::EXEC_OK) {
        let found = format!("{} cannot be written to: {error}", there.display());
        let hint = "name a directory of yours: --data-dir DIR";
        checks.push(check("disk", Mark::Bad, found, Some(hint.into())));
        return;
    }
    match statvfs(there) {
        Ok(stat) => {
            let free = stat.f_bavail.saturating_mul(stat.f_frsize);
            let least = config.storage.min_free;
            let found = format!("{} free for {}", indicatif::HumanBytes(free), dir.display());
            let (mark, hint) = if free < least {
                (Mark::Bad, Some("make room: nothing is accepted below storage.min_free"))
            } else if free < least.saturating_mul(10) {
                (Mark::Note, Some("make room soon: nothing is accepted below storage.min_free"))
            } else {
                (Mark::Good, None)
            };
            checks.push(check("disk", mark, found, hint.map(str::to_owned)));
        }
        Err(error) => {
            let found = format!("{} cannot be looked at: {error}", there.display());
            checks.push(check("disk", Mark::Bad, found, None));
        }
    }
}

/// Writes, reads and deletes something small, as the server will.
async fn bucket(config: &Config, checks: &mut Vec<Check>) {
    let name = &config.artifacts.store;
    let tried = async {
        let bytes = app::bytes_beside(config).await?;
        try_out(&bytes.artifacts).await.map_err(anyhow::Error::new)
    };
    let (mark, found, hint) = match tokio::time::timeout(PATIENCE, tried).await {
        Ok(Ok(())) => (Mark::Good, format!("{name}, may write, read and delete"), None),
        Ok(Err(error)) => {
            let cause = format!("{error:#}");
            let hint = if cause.contains("TimeTooSkewed") {
                "set this machine's clock: the bucket refuses signatures that are minutes off"
            } else {
                "check artifacts.store, artifacts.endpoint, artifacts.region, artifacts.path_style and the credentials, which need to list, read, write and delete below the prefix"
            };
            (Mark::Bad, format!("cannot use {name}: {cause}"), Some(hint.to_owned()))
        }
        Err(_) => (
            Mark::Bad,
            format!("{name} does not answer within {}", format_duration(PATIENCE)),
            Some("is artifacts.endpoint right, and does it let this machine in?".to_owned()),
        ),
    };
    checks.push(check("artifacts", mark, found, hint));
}

async fn try_out(store: &Store) -> Result<(), crate::blob::Error> {
    let text = format!("baton doctor {:016x}", Entropy::system().u64());
    let mut hasher = Hasher::default();
    hasher.update(text.as_bytes());
    let digest: Digest = hasher.finish();
    let key = Key { kind: "doctor".into(), digest, generation: String::new() };
    let size = text.len() as u64;
    store.put(&key, Bytes::from(text)).await?;
    let found = store.size(&key).await?;
    store.delete(&key).await?;
    if found == Some(size) { Ok(()) } else { Err(crate::blob::Error::NotFound(digest)) }
}

fn port(addr: SocketAddr, reached: bool, checks: &mut Vec<Check>) {
    if addr.port() == 0 {
        return;
    }
    let (mark, found, hint) = match std::net::TcpListener::bind(addr) {
        Ok(_) => (Mark::Good, format!("{addr} is free"), None),
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse && reached => {
            (Mark::Good, format!("{addr} is in use, by the server"), None)
        }
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => (
            Mark::Note,
            format!("{addr} is in use, and no server answered"),
            Some(format!(
                "see by what: ss -ltnp 'sport = :{}'; or choose another with --addr",
                addr.port()
            )),
        ),
        Err(error) => (
            Mark::Bad,
            format!("cannot listen on {addr}: {error}"),
            Some("choose an address of this machine with --addr".to_owned()),
        ),
    };
    checks.push(check("port", mark, found, hint));
}

fn certificate(context: &Context, config: &Config, checks: &mut Vec<Check>) {
    let (Some(files), now) = (app::certificate(&config.tls), context.clock.now()) else { return };
    let name = files.cert.display().to_string();
    let (mark, found, hint) = match tls::Acceptor::load(files.clone()).and_then(|_| tls::end(&files.cert)) {
        Err(error) => (
            Mark::Bad,
            error.to_string(),
            Some("tls.cert wants the chain, leaf first, and tls.key the key of the leaf, both as PEM".to_owned()),
        ),
        Ok(end) if end <= now => {
            (Mark::Bad, format!("{name} has ended"), Some("renew it; it is read again within seconds".to_owned()))
        }
        Ok(end) => {
            let left = end.since(now);
            let days = text::count(left.as_secs() / 86_400, "day");
            let found = format!("{name}, good for {days}");
            if left < RENEWAL {
                (Mark::Note, found, Some("renew it; it is read again within seconds".to_owned()))
            } else {
                (Mark::Good, found, None)
            }
        }
    };
    checks.push(check("certificate", mark, found, hint));
}
