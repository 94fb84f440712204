//! The load: tasks that come at a steady rate, each accompanied by a client that does not give up.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use baton::pb::{self, task_event::Body};
use tokio::task::JoinSet;
use tonic::{Code, Status};

use crate::harness::{api::Api, default, pass};

/// Words of a task besides its name, and the time between two.
pub const WORDS: usize = 12;
pub const PACE_MS: f64 = 10.0;
/// Longest wait for an answer before another server is asked.
const PATIENCE: Duration = Duration::from_secs(4);
/// Wait before another server is asked: it doubles each time, up to the longest, and differs between
/// clients by up to a half.
const BACKOFF: Duration = Duration::from_millis(100);
const BACKOFF_MOST: Duration = Duration::from_secs(4);
/// Longest wait for the next event before another server is asked.
const SILENCE: Duration = Duration::from_secs(8);

/// What a client knows of its task.
pub struct Told {
    pub task: String,
    /// When, and by which server, the submit was acknowledged.
    pub acked: (Instant, usize),
    /// How often the submit was sent again.
    pub resent: u32,
    /// What the same request was answered at another server.
    pub again: Option<String>,
    /// Whether another server knew the task right after the answer.
    pub was_found: bool,
    /// Whether a cancel was acknowledged before the end.
    pub cancelled: bool,
    /// What was seen by following, through whatever happened.
    pub followed: Vec<pb::TaskEvent>,
    /// The artifact that it read and when that was acknowledged; what it said is another.
    pub input: Option<(pb::Artifact, Instant)>,
    /// The tokens that it must have had.
    pub text: String,
}

/// A load under way.
pub struct Load {
    clients: tokio::task::JoinHandle<Vec<Told>>,
    is_over: Arc<AtomicBool>,
}

impl Load {
    /// Starts one whose request ids begin with `name`.
    pub fn start(name: &str, apis: Vec<Api>, rate: f64) -> Self {
        let (name, is_over) = (name.to_owned(), Arc::new(AtomicBool::new(false)));
        let over = is_over.clone();
        let clients = tokio::spawn(async move {
            let mut tick = tokio::time::interval(Duration::from_secs_f64(1.0 / rate));
            let mut clients = JoinSet::new();
            for at in 0.. {
                tick.tick().await;
                if over.load(Relaxed) {
                    break;
                }
                clients.spawn(accompany(apis.clone(), format!("{name}-{at}"), at));
            }
            clients.join_all().await
        });
        Self { clients, is_over }
    }

    /// Sends nothing new and waits until every client is done.
    pub async fn ended(self) -> Vec<Told> {
        self.is_over.store(true, Relaxed);
        self.clients.await.expect("a sound load")
    }
}

async fn accompany(apis: Vec<Api>, request: String, at: usize) -> Told {
    let words = (0..WORDS).map(|i| format!("w{i}")).collect::<Vec<_>>().join(" ");
    let text = format!("{request} {words}");
    let mut input = None;
    let spec = if at % 10 == 2 {
        let artifact = put(&apis, &text, at).await;
        let spec = reader(&artifact.artifact_id);
        input = Some((artifact, Instant::now()));
        spec
    } else {
        speaker(&text)
    };
    let (task, resent, acked) = submit(&apis, &spec, &request, at).await;
    let was_found = get(&apis, &task, at + 1).await;
    let again = if at.is_multiple_of(10) {
        Some(submit(&apis, &spec, &request, at + 2).await.0)
    } else {
        None
    };
    let cancelled = at % 20 == 3 && cancel(&apis, &task, at + 1).await;
    let followed = if at % 8 == 3 { follow(&apis, &task, at + 2).await } else { Vec::new() };
    Told { task, acked, resent, again, was_found, cancelled, followed, input, text }
}

/// A task that says this.
fn speaker(text: &str) -> pb::TaskSpec {
    let input = Some(crate::harness::object(&[("text", text)]));
    pb::TaskSpec { input, ..crate::failover::echo(0, PACE_MS) }
}

/// A task that says what an artifact has, and saves what it said as another.
fn reader(artifact: &str) -> pb::TaskSpec {
    let text = |text: &str| prost_types::value::Kind::StringValue(text.into());
    let value = |kind| prost_types::Value { kind: Some(kind) };
    let object =
        |name: &str, kind| prost_types::Struct { fields: [(name.to_owned(), value(kind))].into() };
    let reference = prost_types::value::Kind::StructValue(object("$artifact", text(artifact)));
    let mut spec = crate::failover::echo(0, PACE_MS);
    let params = spec.params.get_or_insert_default();
    params.fields.insert("save_as".into(), value(text("said.txt")));
    // As long as the longest outage of the bucket, and longer.
    let retry = pb::RetryPolicy {
        max_attempts: 50,
        max_backoff: Some(crate::harness::seconds(2.0)),
        ..default()
    };
    pb::TaskSpec { input: Some(object("text", reference)), retry: Some(retry), ..spec }
}

/// Whether a call may be made again elsewhere: it was not answered, or refused for now.
pub fn passes(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::Unavailable
            | Code::DeadlineExceeded
            | Code::ResourceExhausted
            | Code::Aborted
            | Code::Cancelled
            | Code::Unknown
            | Code::Internal
    )
}

/// Wait before the next of so many tries.
fn backoff(n_tried: usize) -> Duration {
    let most = BACKOFF.saturating_mul(1 << n_tried.min(16)).min(BACKOFF_MOST);
    most.mul_f64(rand::random_range(0.5..1.0))
}

/// Calls one server after another, from `first` on, until one answers; says which did.
pub async fn insist<T, F>(
    apis: &[Api],
    first: usize,
    call: impl Fn(Api) -> F,
) -> Result<(T, usize), Status>
where
    F: Future<Output = Result<T, Status>>,
{
    for at in first.. {
        let server = at % apis.len();
        match tokio::time::timeout(PATIENCE, call(apis[server].clone())).await {
            Ok(Ok(answer)) => return Ok((answer, server)),
            Ok(Err(status)) if !passes(&status) => return Err(status),
            _ => pass(backoff(at - first)).await,
        }
    }
    unreachable!("there is always another try")
}

async fn put(apis: &[Api], text: &str, first: usize) -> pb::Artifact {
    let spec = pb::ArtifactSpec { name: "input.txt".into(), ..default() };
    let request =
        pb::CreateArtifactRequest { spec: Some(spec), data: text.as_bytes().to_vec().into() };
    let put = insist(apis, first, |api| {
        let request = request.clone();
        async move { Ok(api.artifacts().create_artifact(request).await?.into_inner()) }
    });
    put.await.expect("an artifact").0
}

async fn submit(
    apis: &[Api],
    spec: &pb::TaskSpec,
    request: &str,
    first: usize,
) -> (String, u32, (Instant, usize)) {
    let n_sent = AtomicU32::new(0);
    let (task, server) = insist(apis, first, |api| {
        n_sent.fetch_add(1, Relaxed);
        let (spec, request) = (spec.clone(), request.to_owned());
        async move { api.try_submit_as(spec, &request).await }
    })
    .await
    .unwrap_or_else(|status| panic!("{request}: {status:?}"));
    (task.task_id, n_sent.into_inner() - 1, (Instant::now(), server))
}

async fn get(apis: &[Api], task: &str, first: usize) -> bool {
    insist(apis, first, |api| {
        let task = task.to_owned();
        async move { api.try_get(&task).await }
    })
    .await
    .is_ok()
}

/// Whether the cancel is what ended the task.
async fn cancel(apis: &[Api], task: &str, first: usize) -> bool {
    let cancelled = insist(apis, first, |api| {
        let task = task.to_owned();
        async move { api.cancel(&task).await }
    });
    cancelled.await.is_ok_and(|(task, _)| task.state() == pb::TaskState::Cancelled)
}

/// Follows a task to its end, at one server after another, from where the last one stopped.
pub async fn follow(apis: &[Api], task: &str, first: usize) -> Vec<pb::TaskEvent> {
    let mut events: Vec<pb::TaskEvent> = Vec::new();
    for at in first.. {
        let next = events.last().map_or(0, |event| event.sequence) + 1;
        let stream = tokio::time::timeout(PATIENCE, apis[at % apis.len()].stream(task, next)).await;
        if let Ok(Ok(mut stream)) = stream {
            while let Ok(Ok(Some(event))) = tokio::time::timeout(SILENCE, stream.message()).await {
                if matches!(event.body, Some(Body::Metrics(_))) {
                    continue;
                }
                let end = matches!(event.body, Some(Body::Ended(_)));
                events.push(event);
                if end {
                    return events;
                }
            }
        }
        pass(backoff(at - first)).await;
    }
    events
}
