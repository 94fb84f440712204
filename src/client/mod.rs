//! A client for Rust programs and the command line: credentials, retries that cannot do harm,
//! and streams that go on where they broke.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use baton::{client::{Client, Update}, pb};
//! let client = Client::connect("http://127.0.0.1:7070", None).await?;
//! let spec = pb::TaskSpec { model: "baton/ngram".into(), ..Default::default() };
//! let task = client.submit(pb::SubmitTaskRequest { spec: Some(spec), ..Default::default() }).await?;
//! let mut events = client.follow(&task.task.unwrap_or_default().task_id, 1);
//! while let Some(update) = events.next().await? {
//!     if let Update::Event(event) = update {
//!         println!("{event:?}");
//!     }
//! }
//! # Ok(()) }
//! ```
//!
//! A call is repeated only when the server was unavailable, and only when repeating is safe:
//! reads, and changes with a `request_id`, which [`Client::submit`] makes when it is absent.

mod follow;
mod patience;
mod transfer;

use std::{future::Future, time::Duration};

use tonic::{
    Code, Request, Status,
    metadata::{Ascii, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Channel, Endpoint},
};

use crate::{
    grpc::status,
    id::Entropy,
    pb::{
        self, artifact_service_client::ArtifactServiceClient, key_service_client::KeyServiceClient,
        queue_service_client::QueueServiceClient, runner_service_client::RunnerServiceClient,
        task_service_client::TaskServiceClient,
    },
    tls::{self, Trust},
};

pub use follow::{Follow, Update};
pub use transfer::{Listener, Pieces, Progress, TransferError};

/// Largest message read: a result with its text is far below.
const MAX_MESSAGE: usize = 16 << 20;
/// Receive window of the connection: many small frames must never exhaust it.
const CONNECTION_WINDOW: u32 = 16 << 20;
/// Receive window of one stream.
const STREAM_WINDOW: u32 = 4 << 20;
/// Between pings on a silent connection: less than what proxies allow.
const KEEP_ALIVE: Duration = Duration::from_secs(20);
/// First wait before a repetition.
const FIRST_BACKOFF: Duration = Duration::from_millis(100);
/// Longest wait before a repetition.
const LONGEST_BACKOFF: Duration = Duration::from_secs(5);
/// Repetitions of a unary call.
const MAX_REPEATS: u32 = 6;

/// What all generated clients run over.
pub type Transport = InterceptedService<Channel, Credential>;

/// Puts the credential on each call.
#[derive(Clone, Debug, Default)]
pub struct Credential(Option<MetadataValue<Ascii>>);

impl Interceptor for Credential {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(value) = &self.0 {
            request.metadata_mut().insert("authorization", value.clone());
        }
        Ok(request)
    }
}

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The address is malformed.
    #[error("`{0}` is not a server address; write for example http://127.0.0.1:7070")]
    Address(String),
    /// The key has characters that no header can carry.
    #[error("the API key has characters that no header can carry")]
    Key,
    /// The files for TLS cannot be used.
    #[error(transparent)]
    Tls(#[from] tls::Error),
    /// Nobody answers there.
    #[error("cannot reach the server at {address}")]
    Unreachable {
        /// Where.
        address: String,
        /// Why.
        source: tonic::transport::Error,
    },
}

/// A connection to a server; clones share it.
#[derive(Clone, Debug)]
pub struct Client {
    channel: Channel,
    credential: Credential,
    timeout: Duration,
    patience: Duration,
    entropy: Entropy,
}

impl Client {
    /// Connects, with an API key where the server asks for one. The address is a URL;
    /// without a scheme it is plain HTTP. With `https` the server must be known to the system's
    /// or the built-in CAs.
    pub async fn connect(address: &str, api_key: Option<&str>) -> Result<Self, ConnectError> {
        Self::connect_with(address, api_key, &Trust::default()).await
    }

    /// Connects to a server that a CA of its own vouches for, or that asks for a certificate.
    pub async fn connect_with(
        address: &str,
        api_key: Option<&str>,
        trust: &Trust,
    ) -> Result<Self, ConnectError> {
        let endpoint = trust.secure(endpoint(address)?)?;
        let channel = endpoint.connect().await.map_err(|source| ConnectError::Unreachable {
            address: endpoint.uri().to_string().trim_end_matches('/').to_owned(),
            source,
        })?;
        Self::over(channel, api_key)
    }

    /// Uses a channel made elsewhere.
    pub fn over(channel: Channel, api_key: Option<&str>) -> Result<Self, ConnectError> {
        let value = api_key.map(|key| format!("Bearer {key}").parse()).transpose();
        let mut value: Option<MetadataValue<Ascii>> = value.map_err(|_| ConnectError::Key)?;
        if let Some(value) = &mut value {
            value.set_sensitive(true);
        }
        Ok(Self {
            channel,
            credential: Credential(value),
            timeout: Duration::from_secs(30),
            patience: Duration::from_mins(2),
            entropy: Entropy::system(),
        })
    }

    /// Sets the longest time of a unary call, its repetitions included. Default 30 s.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Sets how long a stream tries to come back, and a transfer to go on, without any progress.
    /// Default 2 min.
    #[must_use]
    pub fn with_patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// The channel, for services that this module does not know.
    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    fn transport(&self) -> Transport {
        InterceptedService::new(self.channel.clone(), self.credential.clone())
    }

    /// The generated client of the task service.
    pub fn tasks(&self) -> TaskServiceClient<Transport> {
        TaskServiceClient::new(self.transport()).max_decoding_message_size(MAX_MESSAGE)
    }

    /// The generated client of the queue service.
    pub fn queues(&self) -> QueueServiceClient<Transport> {
        QueueServiceClient::new(self.transport()).max_decoding_message_size(MAX_MESSAGE)
    }

    /// The generated client of the runner service.
    pub fn runners(&self) -> RunnerServiceClient<Transport> {
        RunnerServiceClient::new(self.transport()).max_decoding_message_size(MAX_MESSAGE)
    }

    /// The generated client of the key service.
    pub fn keys(&self) -> KeyServiceClient<Transport> {
        KeyServiceClient::new(self.transport()).max_decoding_message_size(MAX_MESSAGE)
    }

    /// The generated client of the artifact service.
    pub fn artifacts(&self) -> ArtifactServiceClient<Transport> {
        ArtifactServiceClient::new(self.transport()).max_decoding_message_size(MAX_MESSAGE)
    }

    /// A new `request_id`.
    pub fn request_id(&self) -> String {
        let mut bytes = [0; 16];
        self.entropy.fill(&mut bytes);
        uuid::Builder::from_random_bytes(bytes).into_uuid().to_string()
    }

    /// Submits a task; makes a `request_id` when it is empty, so that repeating is safe.
    pub async fn submit(
        &self,
        mut request: pb::SubmitTaskRequest,
    ) -> Result<pb::SubmitTaskResponse, Status> {
        if request.request_id.is_empty() {
            request.request_id = self.request_id();
        }
        self.repeat(|| {
            let (mut tasks, request) = (self.tasks(), request.clone());
            async move { tasks.submit_task(request).await }
        })
        .await
    }

    /// Returns a task.
    pub async fn get_task(&self, task_id: &str) -> Result<pb::Task, Status> {
        self.repeat(|| {
            let mut tasks = self.tasks();
            let request = pb::GetTaskRequest { task_id: task_id.to_owned() };
            async move { tasks.get_task(request).await }
        })
        .await
    }

    /// Cancels a task; safe to repeat.
    pub async fn cancel(&self, task_id: &str, reason: &str) -> Result<pb::Task, Status> {
        self.repeat(|| {
            let mut tasks = self.tasks();
            let request =
                pb::CancelTaskRequest { task_id: task_id.to_owned(), reason: reason.to_owned() };
            async move { tasks.cancel_task(request).await }
        })
        .await
    }

    /// Follows a task from a sequence (1 is the beginning) to its end, over broken connections.
    pub fn follow(&self, task_id: &str, from_sequence: u64) -> Follow {
        Follow::new(self.clone(), task_id.to_owned(), from_sequence.max(1), None)
    }

    /// Submits a task and follows it in one call. `on_disconnect` of the request says what
    /// becomes of the task when the caller leaves.
    pub fn run(&self, mut request: pb::RunTaskRequest) -> Follow {
        if request.request_id.is_empty() {
            request.request_id = self.request_id();
        }
        Follow::new(self.clone(), String::new(), 1, Some(request))
    }

    /// Makes a unary call that is safe to repeat, and repeats it while the server is
    /// unavailable, within the time of a call.
    pub async fn repeat<T, F>(&self, call: impl Fn() -> F) -> Result<T, Status>
    where
        F: Future<Output = Result<tonic::Response<T>, Status>>,
    {
        let attempts = async {
            let mut n_repeats = 0;
            loop {
                match call().await {
                    Ok(response) => return Ok(response.into_inner()),
                    Err(error) if n_repeats < MAX_REPEATS && error.code() == Code::Unavailable => {
                        let wait = status::retry_delay(&error)
                            .unwrap_or_else(|| self.backoff(n_repeats))
                            .min(LONGEST_BACKOFF);
                        n_repeats += 1;
                        tokio::time::sleep(wait).await;
                    }
                    Err(error) => return Err(error),
                }
            }
        };
        self.in_time(attempts).await
    }

    /// A request that tells the server how long the call may take, for one that waits there.
    pub fn timed<T>(&self, body: T) -> tonic::Request<T> {
        let mut request = tonic::Request::new(body);
        request.set_timeout(self.timeout);
        request
    }

    /// Makes a unary call once, within the time of a call.
    pub async fn once<T>(
        &self,
        call: impl Future<Output = Result<tonic::Response<T>, Status>>,
    ) -> Result<T, Status> {
        self.in_time(async { call.await.map(tonic::Response::into_inner) }).await
    }

    async fn in_time<T>(&self, call: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
        tokio::time::timeout(self.timeout, call).await.unwrap_or_else(|_| {
            let after = humantime(self.timeout);
            Err(Status::deadline_exceeded(format!("no answer within {after}")))
        })
    }

    /// Full jitter over a doubling bound.
    fn backoff(&self, n_repeats: u32) -> Duration {
        let bound = (FIRST_BACKOFF * 2_u32.pow(n_repeats.min(10))).min(LONGEST_BACKOFF);
        bound.mul_f64(0.2 + 0.8 * self.entropy.unit())
    }
}

fn humantime(duration: Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}

fn endpoint(address: &str) -> Result<Endpoint, ConnectError> {
    let wrong = || ConnectError::Address(address.to_owned());
    let url =
        if address.contains("://") { address.to_owned() } else { format!("http://{address}") };
    let endpoint = Endpoint::from_shared(url.clone()).map_err(|_| wrong())?;
    let scheme = endpoint.uri().scheme_str().unwrap_or_default().to_owned();
    if endpoint.uri().host().is_none_or(str::is_empty) || !matches!(&*scheme, "http" | "https") {
        return Err(wrong());
    }
    endpoint
        .connect_timeout(Duration::from_secs(5))
        .tcp_nodelay(true)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .initial_stream_window_size(STREAM_WINDOW)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(Duration::from_secs(10))
        .keep_alive_while_idle(true)
        .user_agent(concat!("baton/", env!("CARGO_PKG_VERSION")))
        .map_err(|_| wrong())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_urls_and_plain_http_by_default() {
        for good in ["127.0.0.1:7070", "http://localhost:7070", "https://baton.example"] {
            assert!(endpoint(good).is_ok(), "{good}");
        }
        for bad in ["", "http://", "ftp://host", "no spaces"] {
            assert!(endpoint(bad).is_err(), "{bad}");
        }
    }
}
