//! Users of the servers, and what must hold of all that they see.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use baton::{
    clock::{EPOCH, Micros},
    id::Entropy,
    json,
    pb::{self, TaskState, task_event::Body, task_service_client::TaskServiceClient},
};
use prost::Message;
use sha2::{Digest, Sha256};
use tonic::Code;

use super::{CHAOS, SETTLED, hosts::Site, replay};

/// A runner knows by then of a cancel from before: its lease is over, and some time.
const TOLD: Duration = Duration::from_secs(20);
/// The same, when everything works.
const TOLD_AT_ONCE: Duration = Duration::from_millis(250);
/// Deadlines hold to this, and wrong clocks are right to that.
const LATE: Duration = Duration::from_secs(1);
const EARLY: Duration = Duration::from_millis(50);
/// Of so many tasks one has a deadline.
const LIMITED: u64 = 6;

/// What is known of a task from the outside.
#[derive(Default)]
pub struct Seen {
    /// Bytes of every event that any watcher saw.
    events: BTreeMap<u64, Vec<u8>>,
    /// Sequence and state of the terminal event.
    ended: Option<(u64, i32)>,
    /// When that was first seen.
    ended_at: Duration,
    /// Sequences up to here were seen when a cancel was acknowledged that ended the task.
    cancelled_after: Option<u64>,
}

#[derive(Default)]
pub struct Notes {
    pub tasks: BTreeMap<String, Seen>,
    /// Orders to runners that were obeyed while parts broke.
    pub n_obeyed: u64,
    /// The runner that was seen with each attempt.
    pub attempts: BTreeMap<(String, u32), String>,
    /// Attempts that run, by task: several while a runner has not heard that its lease is over.
    pub running: BTreeMap<String, u32>,
    /// When the last task ended.
    pub last_end: Duration,
    /// Digest of everything that was seen, and when.
    pub trace: Sha256,
}

pub type Book = Arc<Mutex<Notes>>;

/// A watcher of one task: resumes until the end, and checks that it misses nothing.
async fn watch(site: Site, id: String, book: Book, pause: u64) {
    let mut cursor = 0;
    loop {
        let mut client = TaskServiceClient::new(site.channel());
        let request = pb::StreamTaskRequest {
            task_id: id.clone(),
            from_sequence: cursor + 1,
            ..Default::default()
        };
        if let Ok(stream) = client.stream_task(request).await {
            let mut stream = stream.into_inner();
            while let Ok(Some(event)) = stream.message().await {
                note(&id, &book, &mut cursor, &event);
                if matches!(event.body, Some(Body::Ended(_))) {
                    let rest = stream.message().await;
                    assert!(!matches!(rest, Ok(Some(_))), "{id}: an event after the end");
                    return;
                }
            }
        }
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }
}

fn note(id: &str, book: &Book, cursor: &mut u64, event: &pb::TaskEvent) {
    let first = match &event.body {
        // This reader may have seen some of what was lost.
        Some(Body::Gap(gap)) => gap.first_sequence.max((*cursor + 1).min(event.sequence)),
        _ => event.sequence,
    };
    assert_eq!(first, *cursor + 1, "{id}: P8, each event follows the last: {event:?}");
    *cursor = event.sequence;
    tracing::debug!(id, event.sequence, event.attempt, body = ?event.body, "seen");
    let bytes = event.encode_to_vec();
    let mut book = book.lock().expect("no user failed");
    let when = now().as_nanos();
    book.trace.update(when.to_le_bytes());
    book.trace.update(&bytes);
    let book = &mut *book;
    let seen = book.tasks.entry(id.to_owned()).or_default();
    let known = seen.events.entry(event.sequence).or_insert_with(|| bytes.clone());
    if *known != bytes {
        let known = pb::TaskEvent::decode(known.as_slice());
        panic!("{id}: P7, one sequence with two contents: {known:?} and {event:?}");
    }
    if let Some(Body::Ended(ended)) = &event.body {
        let end = (event.sequence, ended.state);
        assert!(seen.ended.is_none_or(|known| known == end), "{id}: P6, two ends");
        if seen.ended.replace(end).is_none() {
            book.last_end = now();
            seen.ended_at = now();
        }
    }
    if let Some((end, _)) = seen.ended {
        assert!(event.sequence <= end, "{id}: P6, {} after the end at {end}", event.sequence);
    }
    check_lost(id, event);
}

/// P12: when everything works no lease is lost.
fn check_lost(id: &str, event: &pb::TaskEvent) {
    let error = match &event.body {
        Some(Body::Queued(queued)) => &queued.previous_error,
        Some(Body::Ended(ended)) => &ended.error,
        _ => return,
    };
    let is_lost = error.as_ref().is_some_and(|error| error.reason == "RUNNER_LOST");
    assert!(!is_lost || told_at(event) < SETTLED, "{id}: P12, a living runner's lease: {event:?}");
}

/// When an event was, by the server's clock.
fn told_at(event: &pb::TaskEvent) -> Duration {
    let time = event.time.expect("a time");
    let time = Micros(time.seconds * 1_000_000 + i64::from(time.nanos) / 1000);
    time.since(EPOCH)
}

fn now() -> Duration {
    turmoil::sim_elapsed().unwrap_or_default()
}

/// A task, and whether it is to be cancelled or has a deadline.
struct Plan {
    spec: pb::TaskSpec,
    cancels: bool,
    deadline: Option<Duration>,
}

impl Plan {
    fn new(dice: &Entropy) -> Self {
        let cancels = dice.u64().is_multiple_of(5);
        let limited = !cancels && dice.u64().is_multiple_of(LIMITED);
        let deadline = limited.then(|| SETTLED + Duration::from_millis(dice.u64() % 10_000));
        let mut spec = spec(dice, cancels || limited);
        spec.deadline = deadline.map(|after| {
            let at = (EPOCH + after).0;
            let nanos = (at % 1_000_000 * 1000) as i32;
            prost_types::Timestamp { seconds: at / 1_000_000, nanos }
        });
        Self { spec, cancels, deadline }
    }
}

/// One that is `long` would run longer than anybody waits for it.
fn spec(dice: &Entropy, long: bool) -> pb::TaskSpec {
    let (repeat, delay) = if long { (20, 1000) } else { (1 + dice.u64() % 20, dice.u64() % 400) };
    let fail = match dice.u64() % 6 {
        _ if long => "",
        0 => r#", "fail": {"times": 1}"#,
        1 => r#", "fail": {"retryable": false, "after": 2}"#,
        _ => "",
    };
    let params = format!(r#"{{"repeat": {repeat}, "delay_ms": {delay}{fail}}}"#);
    pb::TaskSpec {
        model: "test/echo".into(),
        input: json::struct_from_text(r#"{"text": "one two three four "}"#),
        params: json::struct_from_text(&params),
        seed: Some(dice.u64() >> 1),
        ..Default::default()
    }
}

/// Submits until it is acknowledged; the answer must be the same every time.
async fn submit(site: &Site, request: pb::SubmitTaskRequest, dice: &Entropy) -> String {
    let mut first: Option<String> = None;
    loop {
        let mut client = TaskServiceClient::new(site.channel());
        match client.submit_task(request.clone()).await {
            Ok(answer) => {
                let id = answer.into_inner().task.expect("a task").task_id;
                assert!(first.as_ref().is_none_or(|first| *first == id), "P2, two tasks");
                // Sometimes the answer counts as lost, and the call is repeated.
                if first.is_some() || !dice.u64().is_multiple_of(4) {
                    return id;
                }
                check_there(site, &id).await;
                first = Some(id);
            }
            Err(status) => {
                let fine = matches!(
                    status.code(),
                    Code::Unavailable | Code::Unknown | Code::Cancelled | Code::DeadlineExceeded
                );
                assert!(fine || is_transport(&status), "a submit was refused: {status:?}");
            }
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// P18: what was acknowledged is there, whomever one asks.
async fn check_there(site: &Site, id: &str) {
    let mut client = TaskServiceClient::new(site.channel());
    if let Err(status) = client.get_task(pb::GetTaskRequest { task_id: id.into() }).await {
        assert_ne!(status.code(), Code::NotFound, "{id}: P18, acknowledged and not found");
    }
}

/// Whether tonic made the status of a broken connection.
pub fn is_transport(status: &tonic::Status) -> bool {
    std::error::Error::source(status).is_some()
}

async fn cancel(site: &Site, id: &str, book: &Book) {
    loop {
        let mut client = TaskServiceClient::new(site.channel());
        let request = pb::CancelTaskRequest { task_id: id.into(), reason: "chaos".into() };
        if let Ok(answer) = client.cancel_task(request).await {
            if answer.into_inner().state() == TaskState::Cancelled {
                let mut book = book.lock().expect("no user failed");
                let seen = book.tasks.entry(id.to_owned()).or_default();
                let last = seen.events.last_key_value().map_or(0, |(last, _)| *last);
                seen.cancelled_after.get_or_insert(last);
            }
            return;
        }
        tokio::time::sleep(Duration::from_millis(150)).await;
    }
}

/// One task's life as its user sees it.
pub async fn user(site: Site, i: u64, dice: Entropy, book: Book) {
    // Alone, or with others at once.
    let at = dice.u64() % CHAOS.as_millis() as u64;
    let at = if dice.u64().is_multiple_of(2) { at } else { 5000 + at / 10_000 * 10_000 };
    tokio::time::sleep(Duration::from_millis(at)).await;
    let Plan { spec, cancels, deadline } = Plan::new(&dice);
    let request = pb::SubmitTaskRequest { spec: Some(spec), request_id: format!("r{i}") };
    // Some cannot wait and ask two servers at once: P2, it is one task.
    let id = if site.n_servers > 1 && dice.u64().is_multiple_of(3) {
        let (id, other) =
            tokio::join!(submit(&site, request.clone(), &dice), submit(&site, request, &dice));
        assert_eq!(id, other, "P2, two tasks for one request");
        id
    } else {
        submit(&site, request, &dice).await
    };
    let watchers =
        [120, 170].map(|pause| tokio::spawn(watch(site.clone(), id.clone(), book.clone(), pause)));
    if cancels {
        tokio::time::sleep(Duration::from_millis(dice.u64() % 5000)).await;
        cancel(&site, &id, &book).await;
    }
    for watcher in watchers {
        watcher.await.expect("a watcher's checks hold");
    }
    check_end(&site, &id, &book).await;
    if let Some(deadline) = deadline {
        check_deadline(&id, &book, deadline);
    }
    let first = replay::read(&site, &id).await;
    check_runners_know(&id, &book).await;
    tokio::time::sleep(SETTLED.saturating_sub(now())).await;
    replay::check(&site, &id, &first).await;
}

/// One who comes when everything works again, and cancels what runs: P10, the runner hears of it at
/// once, whichever server it is asked of.
pub async fn late_user(site: Site, i: u64, dice: Entropy, book: Book) {
    tokio::time::sleep(SETTLED + Duration::from_millis(dice.u64() % 10_000)).await;
    let spec = Some(spec(&dice, true));
    let request = pb::SubmitTaskRequest { spec, request_id: format!("late{i}") };
    let id = submit(&site, request, &dice).await;
    let watcher = tokio::spawn(watch(site.clone(), id.clone(), book.clone(), 150));
    let n_running = || book.lock().expect("no user failed").running.get(&id).copied().unwrap_or(0);
    while n_running() == 0 {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    tokio::time::sleep(Duration::from_millis(dice.u64() % 2000)).await;
    cancel(&site, &id, &book).await;
    tokio::time::sleep(TOLD_AT_ONCE).await;
    assert_eq!(n_running(), 0, "{id}: P10, it runs {TOLD_AT_ONCE:?} after it was cancelled");
    watcher.await.expect("a watcher's checks hold");
    check_end(&site, &id, &book).await;
}

/// P12: a deadline passes when it is time, and not before, whatever clocks show.
fn check_deadline(id: &str, book: &Book, deadline: Duration) {
    let book = book.lock().expect("no user failed");
    let seen = &book.tasks[id];
    let (sequence, state) = seen.ended.expect("an end");
    let end = pb::TaskEvent::decode(seen.events[&sequence].as_slice()).expect("an event");
    let (told, at) = (told_at(&end), seen.ended_at);
    let expired = state == i32::from(TaskState::Expired);
    assert!(!expired || at + EARLY >= deadline, "{id}: P12, {deadline:?} passed at {at:?}");
    assert!(told <= deadline + LATE, "{id}: P12, {deadline:?} passed only at {told:?}");
}

/// P10: the runner of a task that was cancelled is told, once everything is mended.
async fn check_runners_know(id: &str, book: &Book) {
    if book.lock().expect("no user failed").tasks[id].cancelled_after.is_none() {
        return;
    }
    let mended = now().max(CHAOS) + TOLD;
    while now() < mended {
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let n_running = book.lock().expect("no user failed").running.get(id).copied().unwrap_or(0);
    assert_eq!(n_running, 0, "{id}: P10, it was cancelled and runs");
}

async fn check_end(site: &Site, id: &str, book: &Book) {
    loop {
        let mut client = TaskServiceClient::new(site.channel());
        let answer = client.get_task(pb::GetTaskRequest { task_id: id.into() }).await;
        if let Ok(task) = answer {
            let task = task.into_inner();
            let book = book.lock().expect("no user failed");
            let seen = &book.tasks[id];
            let (sequence, state) = seen.ended.expect("an end");
            assert_eq!(task.state, state, "{id}: P6, the end is what GetTask says");
            assert_eq!(task.last_sequence, sequence, "{id}: P6");
            assert!(task.failed_attempts <= 3, "{id}: P11");
            if seen.cancelled_after.is_some() {
                assert_eq!(task.state(), TaskState::Cancelled, "{id}: P10");
            }
            check_tokens(id, seen);
            return;
        }
        tokio::time::sleep(Duration::from_millis(150)).await;
    }
}

/// P9: within an attempt tokens are contiguous from 0, but for told gaps; attempts announce
/// themselves and grow.
fn check_tokens(id: &str, seen: &Seen) {
    let (mut attempt, mut next) = (0, Some(0));
    for bytes in seen.events.values() {
        let event = pb::TaskEvent::decode(bytes.as_slice()).expect("an event");
        match event.body {
            Some(Body::AttemptStarted(_)) => {
                assert!(event.attempt > attempt, "{id}: P4, attempts grow");
                (attempt, next) = (event.attempt, Some(0));
            }
            Some(Body::Gap(_)) => next = None,
            Some(Body::Token(token)) => {
                assert_eq!(event.attempt, attempt, "{id}: P5, a token of another attempt");
                assert!(next.is_none_or(|next| next == token.index), "{id}: P9, {token:?}");
                next = next.map(|next| next + 1);
            }
            _ => {}
        }
    }
}
