//! The way to the server: how connections are made, with which credential calls go, and
//! which refusals are final.

use std::{sync::Arc, time::Duration};

use anyhow::Context as _;
use futures_util::future::BoxFuture;
use prost::Message as _;
use tonic::{
    Code, Request, Status,
    metadata::{Ascii, MetadataValue},
    transport::{Channel, Endpoint},
};

use crate::{
    error::{Reason, reason_name},
    grpc::status,
    pb::{self, runner_service_client::RunnerServiceClient},
    tls::Trust,
};

/// Makes a new connection each time it is called. Tests and simulations bring their own.
pub type Connector = Arc<dyn Fn() -> BoxFuture<'static, anyhow::Result<Channel>> + Send + Sync>;

/// Receive window of a connection: many small frames must never exhaust it.
const CONNECTION_WINDOW: u32 = 16 << 20;
/// Receive window of a stream.
const STREAM_WINDOW: u32 = 4 << 20;
/// Largest message that is read: an Assign carries up to 4 MiB of input.
const MAX_MESSAGE: usize = 16 << 20;
/// Between pings on a silent connection: less than what proxies allow.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// A ping that is not answered by then ends the connection.
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest time to connect.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The endpoint of a server with the windows and the keepalive that a runner needs. An
/// address without a scheme is plain HTTP.
///
/// # Errors
/// When the address is malformed.
pub fn endpoint(server: &str) -> anyhow::Result<Endpoint> {
    let address =
        if server.contains("://") { server.to_owned() } else { format!("http://{server}") };
    Endpoint::from_shared(address)
        .with_context(|| format!("`{server}` is no server address"))?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .initial_stream_window_size(STREAM_WINDOW)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .user_agent(concat!("baton-runner/", env!("CARGO_PKG_VERSION")))
        .context("the user agent is a valid header")
}

/// Connects to `server` over TCP, or TLS for `https`. Each connection reads the files of
/// `trust` anew, so that a certificate that is renewed is used from then on.
///
/// # Errors
/// When the address is malformed, or a file cannot be used.
pub fn connector(server: &str, trust: &Trust) -> anyhow::Result<Connector> {
    let (endpoint, trust) = (endpoint(server)?, trust.clone());
    trust.secure(endpoint.clone())?;
    Ok(Arc::new(move || {
        let secured = trust.secure(endpoint.clone());
        Box::pin(async move { Ok(secured?.connect().await?) })
    }))
}

/// What calls carry as their credential.
#[derive(Clone)]
pub struct Credential(Option<MetadataValue<Ascii>>);

impl Credential {
    /// A bearer token; none leaves calls without a credential.
    ///
    /// # Errors
    /// When the token has characters that no header can carry.
    pub fn new(token: Option<&str>) -> anyhow::Result<Self> {
        let Some(token) = token else { return Ok(Self(None)) };
        let mut value: MetadataValue<Ascii> = format!("Bearer {token}")
            .parse()
            .context("the API key has characters that no header can carry")?;
        value.set_sensitive(true);
        Ok(Self(Some(value)))
    }

    /// A call's request with the credential.
    pub fn request<T>(&self, body: T) -> Request<T> {
        let mut request = Request::new(body);
        if let Some(value) = &self.0 {
            request.metadata_mut().insert("authorization", value.clone());
        }
        request
    }
}

/// The calls over a connection.
pub fn client(channel: Channel) -> RunnerServiceClient<Channel> {
    RunnerServiceClient::new(channel)
        .max_decoding_message_size(MAX_MESSAGE)
        .max_encoding_message_size(MAX_MESSAGE)
}

/// Whether trying again cannot help until a person has changed something.
pub fn is_final(error: &Status) -> bool {
    match error.code() {
        Code::Unauthenticated
        | Code::PermissionDenied
        | Code::InvalidArgument
        | Code::AlreadyExists
        | Code::Unimplemented => true,
        Code::FailedPrecondition => status::is_reason(error, Reason::ProtocolVersion),
        _ => false,
    }
}

/// The reason inside a status message.
pub fn reason(status: &pb::google::rpc::Status) -> Option<String> {
    let details = status.encode_to_vec().into();
    let status = Status::with_details(Code::Unknown, status.message.as_str(), details);
    Some(crate::grpc::status::error_reason(&status)?.0)
}

/// Whether a status message carries `reason`.
pub fn has_reason(status: &pb::google::rpc::Status, wanted: Reason) -> bool {
    reason(status).is_some_and(|name| name == reason_name(wanted))
}

#[cfg(test)]
mod tests {
    use super::{Credential, endpoint, has_reason};
    use crate::{
        error::{Error, Kind, Reason},
        grpc::status,
    };

    #[test]
    fn addresses_without_a_scheme_are_plain_http() {
        assert_eq!(endpoint("localhost:7070").unwrap().uri().scheme_str(), Some("http"));
        assert_eq!(endpoint("https://host").unwrap().uri().scheme_str(), Some("https"));
        assert!(endpoint("http://no spaces").is_err());
    }

    #[test]
    fn a_credential_becomes_a_bearer_token() {
        let request = Credential::new(Some("key")).unwrap().request(());
        assert_eq!(request.metadata().get("authorization").unwrap(), "Bearer key");
        assert!(Credential::new(None).unwrap().request(()).metadata().is_empty());
        assert!(Credential::new(Some("a\nb")).is_err());
    }

    #[test]
    fn reasons_are_read_from_messages() {
        let error = Error::new(Kind::FailedPrecondition, Reason::LeaseLost, "gone");
        let message = status::to_rpc_status(&error);
        assert!(has_reason(&message, Reason::LeaseLost));
        assert!(!has_reason(&message, Reason::EventsMissing));
    }
}
