//! What is tried beside the load: words of runners whose lease has ended, submits to a full queue,
//! and tasks whose time runs out.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use baton::pb::{
    self, TaskState, batch_submit_tasks_response::outcome::Outcome, connect_request,
    connect_response,
};
use tokio::task::JoinHandle;
use tonic::Status;

use super::load::{follow, insist, passes};
use crate::harness::{
    SOON,
    api::{Api, reason},
    checks, default, pass, runner, seconds, spec, within,
};

/// A model that no runner serves, whose queue is full.
const FULL: &str = "test/full";
/// Longest wait for a lease to be given, and to be lost.
const PATIENCE: Duration = Duration::from_mins(1);
/// Longest silence of a server that was asked for work.
const POLL: f64 = 2.0;

/// What was looked at: whether it was as promised, and what it was.
pub type Looks = Vec<(bool, String)>;

/// Tasks of one model that may wait.
pub fn most_waiting(rate: f64) -> u64 {
    (30.0 * rate) as u64
}

/// P5: a runner takes a task, is silent until its lease has ended, and then says all that a runner
/// can say. No look where there was no lease to lose.
pub async fn late_words(apis: Vec<Api>, name: String, first: usize) -> Looks {
    let model = format!("test/{name}");
    let submit = insist(&apis, first, |api| {
        let (spec, request) = (spec(&model), name.clone());
        async move { api.try_submit_as(spec, &request).await }
    });
    let task = submit.await.expect("a task").0.task_id;
    let Ok(lease) = tokio::time::timeout(PATIENCE, take(&apis, &name, &model, first)).await else {
        return Vec::new();
    };
    let lost = async {
        loop {
            let get = insist(&apis, first, |api| {
                let task = task.clone();
                async move { api.try_get(&task).await }
            });
            if get.await.expect("the task").0.lost_attempts > 0 {
                return;
            }
            pass(Duration::from_millis(250)).await;
        }
    };
    if tokio::time::timeout(PATIENCE, lost).await.is_err() {
        return vec![(false, format!("{task} is not lost, and its runner silent"))];
    }
    let report = |finish| pb::ReportTaskEventsRequest {
        task_id: task.clone(),
        attempt: lease.attempt,
        first_index: 1,
        events: runner::tokens(0, 2),
        finish,
    };
    let holders: Vec<_> = apis.iter().map(|api| api.with_key(&lease.attempt_token)).collect();
    let mut looks = Vec::new();
    for finish in [None, Some(runner::success())] {
        let said = insist(&holders, first, |api| {
            let report = report(finish.clone());
            async move { api.runners().report_task_events(report).await }
        });
        looks.push(lease_lost(said.await, &format!("a report for {task}")));
    }
    let put = insist(&holders, first, |api| {
        let spec = pb::ArtifactSpec { name: "late".into(), ..default() };
        let request =
            pb::CreateArtifactRequest { spec: Some(spec), data: name.as_bytes().to_vec().into() };
        async move { api.artifacts().create_artifact(request).await }
    });
    looks.push(lease_lost(put.await, &format!("an artifact of {task}")));
    let cancel = insist(&apis, first, |api| {
        let task = task.clone();
        async move { api.cancel(&task).await }
    });
    let ended = cancel.await.expect("the task").0;
    let events = within("the end", 3 * SOON, follow(&apis, &task, first)).await;
    let said = checks::text(&events);
    let silent = said.is_empty() && ended.artifacts.is_empty();
    looks.push((
        silent && ended.state() == TaskState::Cancelled,
        format!("{task} is {:?} and has `{said}`", ended.state()),
    ));
    looks
}

/// Whether it was refused with the one documented error.
fn lease_lost<T>(said: Result<T, Status>, what: &str) -> (bool, String) {
    match said {
        Ok(_) => (false, format!("{what} was taken after the lease")),
        Err(status) => (reason(&status) == "LEASE_LOST", format!("{what}: {status:?}")),
    }
}

/// A lease, by calls, at whatever server gives one.
async fn take(apis: &[Api], name: &str, model: &str, first: usize) -> pb::Assign {
    let message = |seq, body| pb::ConnectRequest { seq, ack: 0, body: Some(body) };
    for at in first.. {
        let api = &apis[at % apis.len()];
        let poll = |session_id: String, messages| {
            let wait = Some(seconds(POLL));
            let request = pb::PollRequest { messages, session_id, wait };
            let mut runners = api.runners();
            async move {
                let polled = tokio::time::timeout(2 * SOON, runners.poll(request)).await;
                Some(polled.ok()?.ok()?.into_inner().messages)
            }
        };
        let hello = runner::hello(&format!("{name}-{at}"), &[model], 1);
        let hello = message(0, connect_request::Body::Hello(hello));
        let mut messages = poll(String::new(), vec![hello]).await.unwrap_or_default();
        let welcomed = messages.iter().find_map(|message| match &message.body {
            Some(connect_response::Body::Welcome(welcome)) => Some(welcome.session_id.clone()),
            _ => None,
        });
        let Some(session) = welcomed else {
            pass(Duration::from_millis(200)).await;
            continue;
        };
        for _ in 0..10 {
            let given = messages.into_iter().find_map(|message| match message.body {
                Some(connect_response::Body::Assign(assign)) => Some(assign),
                _ => None,
            });
            let Some(lease) = given else {
                let Some(more) = poll(session.clone(), Vec::new()).await else { break };
                messages = more;
                continue;
            };
            let accept = pb::Accept { task_id: lease.task_id.clone(), attempt: lease.attempt };
            let accept = message(1, connect_request::Body::Accept(accept));
            match poll(session, vec![accept]).await {
                Some(_) => return lease,
                None => break,
            }
        }
    }
    unreachable!("there is always another server")
}

/// Submits to a queue that is full, one after another.
pub struct Press {
    is_over: Arc<AtomicBool>,
    calls: JoinHandle<(Looks, Vec<String>)>,
}

/// Fills the queue; returns the tasks in it.
pub async fn fill(api: &Api) -> Vec<String> {
    let mut accepted = Vec::new();
    loop {
        let request = pb::SubmitTaskRequest { spec: Some(spec(FULL)), ..default() };
        let request = pb::BatchSubmitTasksRequest { requests: vec![request; 200] };
        let answer = api.tasks().batch_submit_tasks(request).await.expect("outcomes");
        let outcomes = answer.into_inner().outcomes.into_iter().filter_map(|one| one.outcome);
        let before = accepted.len();
        accepted.extend(outcomes.filter_map(|outcome| match outcome {
            Outcome::Accepted(answer) => Some(answer.task?.task_id),
            Outcome::Refused(_) => None,
        }));
        if accepted.len() < before + 200 {
            return accepted;
        }
    }
}

impl Press {
    /// Begins, at each server in turn.
    pub fn begin(apis: Vec<Api>) -> Self {
        let is_over = Arc::new(AtomicBool::new(false));
        let over = is_over.clone();
        let calls = tokio::spawn(async move {
            let (mut looks, mut accepted) = (Vec::new(), Vec::new());
            for at in 0.. {
                if over.load(Relaxed) {
                    break;
                }
                let submit = apis[at % apis.len()].try_submit(spec(FULL));
                match tokio::time::timeout(SOON, submit).await {
                    Ok(Ok(task)) => accepted.push(task.task_id),
                    Ok(Err(status)) if reason(&status) == "QUEUE_FULL" => {
                        let delay = baton::grpc::status::retry_delay(&status);
                        looks.push((delay.is_some(), format!("no delay in {status:?}")));
                    }
                    // What is gone is not full; that is another promise.
                    Ok(Err(status)) if passes(&status) => {}
                    Ok(Err(status)) => looks.push((false, format!("{status:?}"))),
                    Err(_) => {}
                }
                pass(Duration::from_millis(250)).await;
            }
            (looks, accepted)
        });
        Self { is_over, calls }
    }

    /// Ends; returns what was refused and how, and the tasks that were accepted.
    pub async fn ended(self) -> (Looks, Vec<String>) {
        self.is_over.store(true, Relaxed);
        self.calls.await.expect("sound calls")
    }
}

/// P12: a task that nobody starts expires in time by the caller's clock.
pub async fn run_out(api: Api, name: String) -> Looks {
    let allowed = Duration::from_secs(2);
    let spec = pb::TaskSpec { start_timeout: Some(seconds(2.0)), ..spec("test/nobody") };
    let submitted = Instant::now();
    let Ok(task) = api.try_submit_as(spec, &name).await else { return Vec::new() };
    let acked = Instant::now();
    let (task, mut took) = (task.task_id, Duration::ZERO);
    while took < 10 * allowed {
        pass(Duration::from_millis(50)).await;
        took = acked.elapsed();
        match api.try_get(&task).await {
            Ok(task) if task.state() == TaskState::Expired => break,
            _ => {}
        }
    }
    // A second, and half of one for looking.
    let in_time = took < allowed + Duration::from_millis(1_500) && submitted.elapsed() >= allowed;
    vec![(in_time, format!("{task} expired {took:?} after its submit, not {allowed:?}"))]
}
