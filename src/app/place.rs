//! Where a server lives: its port, its directory, its database, its descriptors.

use std::{
    fs::File,
    net::SocketAddr,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};

use crate::{
    blob::{Blobs, Store},
    config::{self, Config},
    db::Location,
    keys::Keyring,
    moving::Bytes,
    tasks::housekeeping::Retention,
    tls::{Acceptor, Files},
};

/// Where the configuration has the database.
pub fn database(config: &Config) -> Location {
    match config.database.url.expose() {
        "" => Location::File(config.storage.data_dir.join("baton.db")),
        url => Location::Url(url.to_owned()),
    }
}

/// What the configuration says of old tasks.
pub fn retention(config: &config::Retention) -> Retention {
    let set = |kept: std::time::Duration| Some(kept).filter(|kept| !kept.is_zero());
    Retention { ended_tasks: set(config.ended_tasks), dead_letters: set(config.dead_letters) }
}

/// Opens the port, with a backlog for herds of runners that return at once.
pub(super) fn bind(addr: SocketAddr) -> anyhow::Result<tokio::net::TcpListener> {
    let socket = match addr {
        SocketAddr::V4(_) => tokio::net::TcpSocket::new_v4()?,
        SocketAddr::V6(_) => tokio::net::TcpSocket::new_v6()?,
    };
    socket.set_reuseaddr(true)?;
    let bound = socket.bind(addr).and_then(|()| socket.listen(4_096));
    bound.map_err(|error| match error.kind() {
        std::io::ErrorKind::AddrInUse => {
            anyhow::anyhow!("the address {addr} is in use; stop the other program or choose another address with --addr")
        }
        _ => anyhow::Error::new(error).context(format!("cannot listen on {addr}")),
    })
}

/// Reads the certificate, where one is configured.
pub(super) fn acceptor(config: &config::Tls) -> anyhow::Result<Option<Acceptor>> {
    certificate(config).map(Acceptor::load).transpose().map_err(Into::into)
}

/// Where the configuration has the certificate, if it has one.
pub fn certificate(config: &config::Tls) -> Option<Files> {
    if config.cert.is_empty() {
        return None;
    }
    let client_ca = Some(&config.client_ca).filter(|path| !path.is_empty());
    Some(Files {
        cert: PathBuf::from(&config.cert),
        key: PathBuf::from(&config.key),
        client_ca: client_ca.map(PathBuf::from),
    })
}

/// Makes the data directory, unless it is there, for its owner alone.
pub fn make_data_dir(dir: &Path) -> anyhow::Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .with_context(|| format!("cannot make the data directory {}", dir.display()))
}

/// Makes the data directory and takes it for this process, as long as the file lives.
pub fn lock_data_dir(dir: &Path) -> anyhow::Result<File> {
    make_data_dir(dir)?;
    let path = dir.join("baton.lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path)
        .with_context(|| format!("cannot write to the data directory {}", dir.display()))?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => {
            bail!("the data directory {} is in use by another server", dir.display())
        }
        Err(error) => Err(error).with_context(|| format!("cannot lock {}", path.display())),
    }
}

/// Opens where artifacts' bytes lie.
pub async fn artifact_store(config: &Config) -> anyhow::Result<Store> {
    let artifacts = &config.artifacts;
    if artifacts.store == "file" {
        let dir = config.storage.data_dir.join("artifacts");
        return Store::files(&dir).await.with_context(|| format!("cannot use {}", dir.display()));
    }
    bucket(artifacts).await
}

/// Opens where everything lies that is not in tables. Servers that share a database share the
/// bucket, so that transcripts are there too.
pub async fn bytes(config: &Config) -> anyhow::Result<Bytes> {
    let artifacts = artifact_store(config).await?;
    let transcripts = match transcripts_beside(config, &artifacts) {
        Some(shared) => shared,
        None => Blobs::open(config.storage.data_dir.join("transcripts")).await?,
    };
    Ok(Bytes { artifacts, transcripts })
}

/// The same for reads, beside a server that may use it.
pub async fn bytes_beside(config: &Config) -> anyhow::Result<Bytes> {
    let dir = &config.storage.data_dir;
    let artifacts = match config.artifacts.store.as_str() {
        "file" => Store::look_into(&dir.join("artifacts")),
        _ => bucket(&config.artifacts).await?,
    };
    let transcripts = transcripts_beside(config, &artifacts)
        .unwrap_or_else(|| Blobs::look_into(dir.join("transcripts")));
    Ok(Bytes { artifacts, transcripts })
}

fn transcripts_beside(config: &Config, artifacts: &Store) -> Option<Blobs> {
    match database(config) {
        Location::Url(_) => artifacts.blobs_beside("transcripts"),
        Location::File(_) => None,
    }
}

#[cfg(feature = "s3")]
async fn bucket(config: &config::Artifacts) -> anyhow::Result<Store> {
    use crate::blob::s3::{Settings, address};
    let Some((bucket, prefix)) = address(&config.store) else {
        bail!("artifacts.store: `{}` must be `file` or `s3://bucket/prefix`", config.store);
    };
    let settings = Settings {
        bucket,
        prefix,
        endpoint: config.endpoint.clone(),
        region: config.region.clone(),
        path_style: config.path_style,
    };
    let server = if config.endpoint.is_empty() { "AWS" } else { &config.endpoint };
    Store::bucket(&settings).await.with_context(|| {
        format!(
            "cannot use the bucket `{}` of {server}; check artifacts.store, artifacts.endpoint, artifacts.region, artifacts.path_style and the credentials",
            settings.bucket
        )
    })
}

#[cfg(not(feature = "s3"))]
async fn bucket(config: &config::Artifacts) -> anyhow::Result<Store> {
    bail!(
        "artifacts.store: `{}` needs a program that was built with the feature `s3`",
        config.store
    )
}

/// Makes the first admin key and leaves it where only the owner of the data reads it.
pub(super) async fn write_first_key(
    keyring: &Keyring,
    dir: &Path,
) -> anyhow::Result<Option<PathBuf>> {
    use std::io::Write as _;
    let Some(key) = keyring.bootstrap().await? else { return Ok(None) };
    let path = dir.join("admin.key");
    let mut file = File::options()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o600)
        .open(&path)
        .with_context(|| format!("cannot write {}", path.display()))?;
    writeln!(file, "{key}")?;
    tracing::info!(path = %path.display(), "the first admin key was written");
    Ok(Some(path))
}

/// Connections need descriptors: takes as many as the system lets this user have.
pub(super) fn raise_descriptor_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}
