//! A client: channels, credentials, and the calls that most tests make.

use std::time::Duration;

use baton::pb::{
    self, artifact_service_client::ArtifactServiceClient, key_service_client::KeyServiceClient,
    queue_service_client::QueueServiceClient, runner_service_client::RunnerServiceClient,
    task_service_client::TaskServiceClient,
};
use tonic::{
    Request, Status, Streaming,
    metadata::MetadataValue,
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Channel, Endpoint},
};

use super::{SOON, default, spec, within};

/// Puts a key into every call, if there is one.
#[derive(Clone, Default)]
pub struct Credential(Option<MetadataValue<tonic::metadata::Ascii>>);

impl Interceptor for Credential {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(value) = &self.0 {
            request.metadata_mut().insert("authorization", value.clone());
        }
        Ok(request)
    }
}

pub type Wire = InterceptedService<Channel, Credential>;

/// A caller at one address, with one credential.
#[derive(Clone)]
pub struct Api {
    pub channel: Channel,
    credential: Credential,
}

impl Api {
    /// A caller without a credential. Connects at the first call, and again when needed.
    pub fn new(addr: impl std::fmt::Display) -> Self {
        let endpoint = Endpoint::from_shared(format!("http://{addr}"))
            .expect("an address")
            .connect_timeout(Duration::from_secs(5))
            .http2_keep_alive_interval(Duration::from_secs(5))
            .keep_alive_timeout(Duration::from_secs(5))
            .initial_connection_window_size(16 << 20);
        Self { channel: endpoint.connect_lazy(), credential: default() }
    }

    /// A caller over a channel made elsewhere.
    pub fn over(channel: Channel) -> Self {
        Self { channel, credential: default() }
    }

    /// The same address with a key or token.
    pub fn with_key(&self, key: &str) -> Self {
        let value = format!("Bearer {key}").parse().expect("a key in ASCII");
        Self { channel: self.channel.clone(), credential: Credential(Some(value)) }
    }

    pub fn tasks(&self) -> TaskServiceClient<Wire> {
        TaskServiceClient::with_interceptor(self.channel.clone(), self.credential.clone())
    }

    pub fn artifacts(&self) -> ArtifactServiceClient<Wire> {
        ArtifactServiceClient::with_interceptor(self.channel.clone(), self.credential.clone())
            .max_decoding_message_size(16 << 20)
    }

    pub fn queues(&self) -> QueueServiceClient<Wire> {
        QueueServiceClient::with_interceptor(self.channel.clone(), self.credential.clone())
    }

    pub fn keys(&self) -> KeyServiceClient<Wire> {
        KeyServiceClient::with_interceptor(self.channel.clone(), self.credential.clone())
    }

    pub fn runners(&self) -> RunnerServiceClient<Wire> {
        RunnerServiceClient::with_interceptor(self.channel.clone(), self.credential.clone())
    }

    /// Submits, without a request id.
    pub async fn try_submit(&self, spec: pb::TaskSpec) -> Result<pb::Task, Status> {
        self.try_submit_as(spec, "").await
    }

    pub async fn try_submit_as(
        &self,
        spec: pb::TaskSpec,
        request_id: &str,
    ) -> Result<pb::Task, Status> {
        let request = pb::SubmitTaskRequest { spec: Some(spec), request_id: request_id.into() };
        let answer = self.tasks().submit_task(request).await?.into_inner();
        Ok(answer.task.expect("a task in the answer"))
    }

    pub async fn submit(&self, spec: pb::TaskSpec) -> pb::Task {
        within("submit", SOON, self.try_submit(spec)).await.expect("an accepted submit")
    }

    /// Submits a small task for `model` and tells its id.
    pub async fn submit_to(&self, model: &str) -> String {
        self.submit(spec(model)).await.task_id
    }

    pub async fn try_get(&self, task_id: &str) -> Result<pb::Task, Status> {
        let request = pb::GetTaskRequest { task_id: task_id.into() };
        Ok(self.tasks().get_task(request).await?.into_inner())
    }

    pub async fn get(&self, task_id: &str) -> pb::Task {
        within("get", SOON, self.try_get(task_id)).await.expect("a task")
    }

    pub async fn cancel(&self, task_id: &str) -> Result<pb::Task, Status> {
        let request = pb::CancelTaskRequest { task_id: task_id.into(), reason: "test".into() };
        Ok(self.tasks().cancel_task(request).await?.into_inner())
    }

    /// Opens a stream of one task, from `from_sequence`.
    pub async fn stream(
        &self,
        task_id: &str,
        from_sequence: u64,
    ) -> Result<Streaming<pb::TaskEvent>, Status> {
        let request = pb::StreamTaskRequest { task_id: task_id.into(), from_sequence, ..default() };
        Ok(self.tasks().stream_task(request).await?.into_inner())
    }

    /// Reads a stream from the beginning to its end.
    pub async fn read_all(&self, task_id: &str) -> Vec<pb::TaskEvent> {
        within("the end of the stream", 3 * SOON, async {
            let mut stream = self.stream(task_id, 1).await.expect("a stream");
            let mut events = Vec::new();
            while let Some(event) = stream.message().await.expect("an event") {
                events.push(event);
            }
            events
        })
        .await
    }

    /// Waits until the task is in one of `states`.
    pub async fn wait_for(
        &self,
        task_id: &str,
        states: &[pb::TaskState],
        bound: Duration,
    ) -> pb::Task {
        let what = format!("task {task_id} in {states:?}");
        super::eventually(&what, bound, || async {
            let task = self.try_get(task_id).await.ok()?;
            states.contains(&task.state()).then_some(task)
        })
        .await
    }

    /// Every task of the namespace, by pages.
    pub async fn list_all(&self) -> Vec<pb::Task> {
        let mut request = pb::ListTasksRequest { page_size: 1000, ..default() };
        let mut tasks = Vec::new();
        loop {
            let page = self.tasks().list_tasks(request.clone()).await.expect("a page").into_inner();
            tasks.extend(page.tasks);
            if page.next_page_token.is_empty() {
                return tasks;
            }
            request.page_token = page.next_page_token;
        }
    }
}

/// The `reason` that a refused call carries.
pub fn reason(status: &Status) -> String {
    baton::grpc::status::error_reason(status).map(|(reason, _)| reason).unwrap_or_default()
}
