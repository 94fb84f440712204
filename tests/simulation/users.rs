//! Users of the servers, and what must hold of all that they see.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use baton::{
    id::Entropy,
    json,
    pb::{self, TaskState, task_event::Body, task_service_client::TaskServiceClient},
};
use prost::Message;
use sha2::{Digest, Sha256};
use tonic::Code;

use super::{CHAOS, hosts::Site};

/// A runner knows of a cancel by then, when everything works: its lease is over, and some time.
const TOLD: Duration = Duration::from_secs(20);

/// What is known of a task from the outside.
#[derive(Default)]
pub struct Seen {
    /// Bytes of every event that any watcher saw.
    events: BTreeMap<u64, Vec<u8>>,
    /// Sequence and state of the terminal event.
    ended: Option<(u64, i32)>,
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
    let bytes = event.encode_to_vec();
    let mut book = book.lock().expect("no user failed");
    let when = turmoil::sim_elapsed().unwrap_or_default().as_nanos();
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
        seen.ended = Some(end);
        book.last_end = turmoil::sim_elapsed().unwrap_or_default();
    }
    if let Some((end, _)) = seen.ended {
        assert!(event.sequence <= end, "{id}: P6, {} after the end at {end}", event.sequence);
    }
}

fn spec(dice: &Entropy, cancels: bool) -> pb::TaskSpec {
    // One that is to be cancelled would run longer than anybody waits for it.
    let (repeat, delay) =
        if cancels { (20, 1000) } else { (1 + dice.u64() % 20, dice.u64() % 400) };
    let fail = match dice.u64() % 6 {
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
    tokio::time::sleep(Duration::from_millis(dice.u64() % CHAOS.as_millis() as u64)).await;
    let cancels = dice.u64().is_multiple_of(5);
    let spec = Some(spec(&dice, cancels));
    let request = pb::SubmitTaskRequest { spec, request_id: format!("r{i}") };
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
    check_runners_know(&id, &book).await;
}

/// P10: the runner of a task that was cancelled is told, once everything is mended.
async fn check_runners_know(id: &str, book: &Book) {
    if book.lock().expect("no user failed").tasks[id].cancelled_after.is_none() {
        return;
    }
    let mended = turmoil::sim_elapsed().unwrap_or_default().max(CHAOS) + TOLD;
    while turmoil::sim_elapsed().unwrap_or_default() < mended {
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
