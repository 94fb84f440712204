//! The load: tasks that come at a steady rate, each accompanied by a client that does not give up.

use std::time::{Duration, Instant};

use baton::pb::{self, task_event::Body};
use tokio::task::JoinSet;
use tonic::{Code, Status};

use crate::harness::{api::Api, pass};

/// Tokens of a task, and the time between two.
pub const WORDS: usize = 12;
pub const PACE_MS: f64 = 10.0;
/// Longest wait for an answer before another server is asked.
const PATIENCE: Duration = Duration::from_secs(4);
/// Longest wait for the next event before another server is asked.
const SILENCE: Duration = Duration::from_secs(8);

/// What a client knows of its task.
pub struct Told {
    pub task: String,
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
    /// The tokens that it must have had.
    pub text: String,
}

/// A load under way.
pub struct Load(tokio::task::JoinHandle<Vec<Told>>);

impl Load {
    /// Starts one whose request ids begin with `name`.
    pub fn start(name: &str, apis: Vec<Api>, time: Duration, rate: f64) -> Self {
        let name = name.to_owned();
        Self(tokio::spawn(async move {
            let mut tick = tokio::time::interval(Duration::from_secs_f64(1.0 / rate));
            let begun = Instant::now();
            let mut clients = JoinSet::new();
            for at in 0.. {
                tick.tick().await;
                if begun.elapsed() > time {
                    break;
                }
                clients.spawn(accompany(apis.clone(), format!("{name}-{at}"), at));
            }
            clients.join_all().await
        }))
    }

    /// Waits until every client is done.
    pub async fn ended(self) -> Vec<Told> {
        self.0.await.expect("a sound load")
    }
}

async fn accompany(apis: Vec<Api>, request: String, at: usize) -> Told {
    let (task, resent) = submit(&apis, &request, at).await;
    let was_found = get(&apis, &task, at + 1).await;
    let again =
        if at.is_multiple_of(10) { Some(submit(&apis, &request, at + 2).await.0) } else { None };
    let cancelled = at % 20 == 3 && cancel(&apis, &task, at + 1).await;
    let followed = if at % 8 == 3 { follow(&apis, &task, at + 2).await } else { Vec::new() };
    let text = (0..WORDS).map(|i| format!("w{i}")).collect::<Vec<_>>().join(" ");
    Told { task, resent, again, was_found, cancelled, followed, text }
}

/// Whether a call may be made again elsewhere: it was not answered, or refused for now.
fn passes(status: &Status) -> bool {
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

async fn submit(apis: &[Api], request: &str, first: usize) -> (String, u32) {
    for (resent, at) in (first..).enumerate() {
        let spec = crate::failover::echo(WORDS, PACE_MS);
        let submit = apis[at % apis.len()].try_submit_as(spec, request);
        match tokio::time::timeout(PATIENCE, submit).await {
            Ok(Ok(task)) => return (task.task_id, resent as u32),
            Ok(Err(status)) if !passes(&status) => panic!("{request}: {status:?}"),
            _ => pass(Duration::from_millis(100)).await,
        }
    }
    unreachable!("there is always another try")
}

async fn get(apis: &[Api], task: &str, first: usize) -> bool {
    for at in first.. {
        match tokio::time::timeout(PATIENCE, apis[at % apis.len()].try_get(task)).await {
            Ok(Ok(_)) => return true,
            Ok(Err(status)) if !passes(&status) => return false,
            _ => pass(Duration::from_millis(100)).await,
        }
    }
    false
}

/// Whether the cancel is what ended the task.
async fn cancel(apis: &[Api], task: &str, first: usize) -> bool {
    for at in first.. {
        match tokio::time::timeout(PATIENCE, apis[at % apis.len()].cancel(task)).await {
            Ok(Ok(task)) => return task.state() == pb::TaskState::Cancelled,
            Ok(Err(status)) if !passes(&status) => return false,
            _ => pass(Duration::from_millis(100)).await,
        }
    }
    false
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
        pass(Duration::from_millis(100)).await;
    }
    events
}
