//! The generated clients, over calls that never leave this process.

use std::{
    convert::Infallible,
    task::{Context, Poll},
};

use futures_util::{FutureExt as _, future::BoxFuture};
use http::{Extensions, HeaderMap, Request, Response};
use tonic::body::Body;
use tower::Service;

use crate::{
    grpc::{Guarded, calls::Calls},
    pb::{
        artifact_service_client::ArtifactServiceClient, queue_service_client::QueueServiceClient,
        runner_service_client::RunnerServiceClient, task_service_client::TaskServiceClient,
    },
};

/// Makes the calls that one HTTP request leads to, with its metadata and under its correlation
/// id.
#[derive(Clone)]
pub struct InProcess {
    calls: Calls,
    metadata: HeaderMap,
    extensions: Extensions,
}

impl InProcess {
    /// Calls with this metadata; `extensions` are those of the HTTP request.
    pub fn new(calls: Calls, metadata: HeaderMap, extensions: Extensions) -> Self {
        Self { calls, metadata, extensions }
    }

    /// Tasks.
    pub fn tasks(&self) -> TaskServiceClient<Self> {
        TaskServiceClient::new(self.clone()).max_decoding_message_size(usize::MAX)
    }

    /// Artifacts.
    pub fn artifacts(&self) -> ArtifactServiceClient<Self> {
        ArtifactServiceClient::new(self.clone())
    }

    /// Queues.
    pub fn queues(&self) -> QueueServiceClient<Self> {
        QueueServiceClient::new(self.clone())
    }

    /// Runners.
    pub fn runners(&self) -> RunnerServiceClient<Self> {
        RunnerServiceClient::new(self.clone()).max_decoding_message_size(usize::MAX)
    }
}

impl Service<Request<Body>> for InProcess {
    type Response = Response<Guarded>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        request.headers_mut().extend(self.metadata.clone());
        request.extensions_mut().extend(self.extensions.clone());
        let calls = self.calls.clone();
        async move { Ok(calls.call(request).await) }.boxed()
    }
}
