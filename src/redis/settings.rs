//! Where Redis is and how it is spoken to: everything that can be wrong before a connection is
//! tried. Passwords stay out of errors and of `Debug`.

use std::{fmt, time::Duration};

use fred::{
    prelude::{Builder, Config, ReconnectPolicy, ServerConfig, TcpConfig, TlsConfig, TlsConnector},
    types::config::UnresponsiveConfig,
};
use url::Url;

use super::{Error, Result};
use crate::tls::Trust;

/// Longest prefix of keys, in bytes: it stands in every key.
const MAX_PREFIX: usize = 64;

/// Pauses between attempts to connect again, in milliseconds: from, to, and the factor.
const RECONNECT: (u32, u32, u32) = (50, 1000, 2);

/// Commands that wait for one connection before further ones are refused. A server has far fewer
/// in flight; a Redis that is away shall not fill the memory.
const MAX_WAITING: usize = 100_000;

/// Messages of channels that wait for their readers in this process. A reader that is further
/// behind is told that it missed some.
const MAX_MESSAGES: usize = 16_384;

/// How Redis is reached.
#[derive(Clone)]
pub struct Settings {
    /// `redis://[user[:password]@]host[:port][/database]`, or `rediss://` for TLS. `valkey` and
    /// `valkeys` mean the same. Special characters of user and password are percent-encoded.
    pub url: String,
    /// What the names of all keys begin with. Those who share data share it; an installation of
    /// its own needs another one, or another database.
    pub prefix: String,
    /// Most time for a connection to be made.
    pub connect_timeout: Duration,
    /// Most time for the answer to a command; reads that wait for something have longer.
    pub command_timeout: Duration,
    /// Whom to trust under `rediss://`.
    pub trust: Trust,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            url: "redis://127.0.0.1:6379".into(),
            prefix: "baton:".into(),
            connect_timeout: Duration::from_secs(5),
            command_timeout: Duration::from_secs(2),
            trust: Trust::default(),
        }
    }
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settings")
            .field("address", &self.address().unwrap_or_else(|_| "(malformed)".into()))
            .field("prefix", &self.prefix)
            .finish_non_exhaustive()
    }
}

impl Settings {
    /// Host, port and database for people, without credentials.
    pub fn address(&self) -> Result<String> {
        let url = self.checked_url()?;
        let host = url.host_str().unwrap_or_default();
        let database = url.path().trim_start_matches('/');
        let place = format!("{host}:{}", url.port().unwrap_or(6379));
        Ok(if database.is_empty() { place } else { format!("{place}/{database}") })
    }

    /// What clients are made from.
    pub(super) fn builder(&self) -> Result<Builder> {
        let url = self.checked_url()?;
        self.checked_prefix()?;
        let encrypted = matches!(url.scheme(), "rediss" | "valkeys");
        let port = url.port().unwrap_or(6379);
        // A certificate names an IPv6 address without the brackets of URLs.
        let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
        let config = Config {
            server: ServerConfig::new_centralized(host, port),
            username: decoded(url.username(), "user")?,
            password: decoded(url.password().unwrap_or_default(), "password")?,
            database: database(&url)?,
            tls: if encrypted { Some(self.tls()?) } else { None },
            ..Config::default()
        };
        let mut builder = Builder::from_config(config);
        builder
            .set_policy(ReconnectPolicy::new_exponential(0, RECONNECT.0, RECONNECT.1, RECONNECT.2))
            .with_connection_config(|connection| {
                connection.connection_timeout = self.connect_timeout;
                connection.internal_command_timeout = self.connect_timeout;
                connection.max_command_buffer_len = MAX_WAITING;
                connection.reconnect_on_auth_error = true;
                connection.tcp = TcpConfig { nodelay: Some(true), ..TcpConfig::default() };
                // A connection that says nothing is dead, though nobody closed it.
                connection.unresponsive = UnresponsiveConfig {
                    max_timeout: Some(self.command_timeout * 3),
                    interval: self.command_timeout / 2,
                };
            })
            .with_performance_config(|performance| {
                performance.default_command_timeout = self.command_timeout;
                performance.broadcast_channel_capacity = MAX_MESSAGES;
            });
        Ok(builder)
    }

    fn checked_url(&self) -> Result<Url> {
        // The parser's errors do not repeat the text, which may hold a password.
        let url = Url::parse(&self.url).map_err(|error| {
            wrong(format!("is not a URL ({error}); it looks like redis://host:6379/0"))
        })?;
        match url.scheme() {
            "redis" | "rediss" | "valkey" | "valkeys" => {}
            "redis-cluster" | "rediss-cluster" | "redis-sentinel" | "rediss-sentinel" => {
                return Err(wrong(format!(
                    "names `{}`, which is not spoken: give the address of the primary, or one \
                     that follows it, as redis:// or rediss://",
                    url.scheme()
                )));
            }
            other => {
                return Err(wrong(format!(
                    "begins with `{other}://`; redis:// and, for TLS, rediss:// are spoken"
                )));
            }
        }
        if url.host_str().is_none_or(str::is_empty) {
            return Err(wrong("names no host; it looks like redis://host:6379/0".into()));
        }
        if url.query().is_some() || url.fragment().is_some() {
            return Err(wrong("has options after `?` or `#`; it takes none".into()));
        }
        database(&url)?;
        Ok(url)
    }

    fn checked_prefix(&self) -> Result<()> {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, ':' | '-' | '_' | '.' | '/');
        if self.prefix.is_empty()
            || self.prefix.len() > MAX_PREFIX
            || !self.prefix.chars().all(plain)
        {
            return Err(Error::Settings {
                field: "prefix",
                problem: format!(
                    "`{}` is not 1 to {MAX_PREFIX} letters, digits and `:-_./`",
                    self.prefix.escape_default()
                ),
            });
        }
        Ok(())
    }

    fn tls(&self) -> Result<TlsConfig> {
        let config = self
            .trust
            .client_config()
            .map_err(|error| Error::Settings { field: "TLS", problem: error.to_string() })?;
        Ok(TlsConnector::from(config).into())
    }
}

fn database(url: &Url) -> Result<Option<u8>> {
    match url.path().trim_start_matches('/') {
        "" => Ok(None),
        text => text.parse().map(Some).map_err(|_| {
            wrong(format!("names the database `{text}`; databases are numbers from 0 on"))
        }),
    }
}

fn decoded(text: &str, what: &str) -> Result<Option<String>> {
    if text.is_empty() {
        return Ok(None);
    }
    let decoded = percent_encoding::percent_decode_str(text).decode_utf8();
    let decoded = decoded.map_err(|_| wrong(format!("has a {what} that is not UTF-8")))?;
    Ok(Some(decoded.into_owned()))
}

fn wrong(problem: String) -> Error {
    Error::Settings { field: "URL", problem }
}
