//! The agent against a scripted server.

use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use serde_json::json;
use tokio::time::timeout;
use tonic::Status;

use super::{
    Mode,
    emitter::Emitter,
    engine::{Completion, Engine, Failure, Work, echo::Echo},
    testing::{Rig, SOON, Stuck, assign, task, welcome},
};
use crate::{
    error::Reason,
    pb::{
        self, connect_request::Body as FromRunner, connect_response::Body as ToRunner,
        finish::Outcome,
    },
};

/// An engine that blocks its thread until the channel's sender is dropped.
struct Blocking(Mutex<Option<std::sync::mpsc::Receiver<()>>>);

impl Engine for Blocking {
    fn name(&self) -> &'static str {
        "blocking"
    }

    fn version(&self) -> String {
        "1".into()
    }

    fn run(&self, _: Work, _: Emitter) -> BoxFuture<'static, Result<Completion, Failure>> {
        let wait = self.0.lock().take().unwrap();
        Box::pin(async move {
            assert!(wait.recv().is_err());
            Ok(Completion::default())
        })
    }
}

/// An engine that panics.
struct Panicking;

impl Engine for Panicking {
    fn name(&self) -> &'static str {
        "panicking"
    }

    fn version(&self) -> String {
        "1".into()
    }

    fn run(&self, _: Work, _: Emitter) -> BoxFuture<'static, Result<Completion, Failure>> {
        Box::pin(async { panic!("as the test wants") })
    }
}

#[tokio::test]
async fn an_attempt_runs_and_its_finish_carries_credits() {
    let mut rig = Rig::start(Echo::default(), |config| {
        config.labels = [("gpu".to_owned(), "none".to_owned())].into();
    })
    .await;
    let mut control = rig.control().await;
    let hello = control.hello.clone();
    assert_eq!((hello.slots, hello.engine.as_str()), (2, "echo"));
    assert_eq!((hello.min_version, hello.max_version), (1, 1));
    assert_eq!(hello.labels["gpu"], "none");
    assert_eq!(hello.credits.unwrap().free_slots, 2);
    control.welcome(welcome("s1", false)).await;
    let mut output = rig.output().await;
    let announced = control.credits().await;
    assert_eq!((announced.free_slots, announced.as_of_seq), (2, 0));

    control.send(assign(task(1), "one two three", &json!({"stages": ["READ"]}))).await;
    let accept = control.next().await;
    assert!(matches!(accept.body, Some(FromRunner::Accept(_))), "{accept:?}");
    assert_eq!((accept.seq, accept.ack), (2, 1));
    let received = output.read(|received| received.finish.is_some()).await;
    assert_eq!(received.text, "one two three");
    assert_eq!(received.next_index, 5);
    let finish = received.finish.unwrap();
    let usage = finish.usage.unwrap();
    assert_eq!((usage.tokens_in, usage.tokens_out), (3, 3));
    assert!(usage.time_to_first_token.is_some());
    assert!(matches!(finish.outcome, Some(Outcome::Success(_))));
    let credits = received.credits.unwrap();
    assert_eq!((credits.free_slots, credits.as_of_seq), (2, 1));
    assert!(credits.revision > announced.revision);
    assert!(rig.is_serving());
}

#[tokio::test]
async fn an_output_stream_that_broke_is_opened_again_and_resends_what_is_not_acknowledged() {
    let mut rig = Rig::start(Echo::default(), |_| {}).await;
    let (mut control, mut output) = rig.session().await;
    control.send(assign(task(1), "a b c d", &json!({}))).await;
    let first = output.read(|received| received.finish.is_some()).await;
    assert_eq!(first.next_index, 5);
    output.ack(task(1), 2, false).await;
    output.answers.send(Err(Status::unavailable("cut"))).await.unwrap();

    let mut output = rig.output().await;
    let again = output.read(|received| received.finish.is_some()).await;
    assert_eq!((again.text.as_str(), again.next_index), (" c d", 5));
    output.ack(task(1), 4, true).await;
    // What is settled is forgotten: nothing is held any more.
    control.send(ToRunner::InventoryRequest(pb::InventoryRequest {})).await;
    loop {
        let inventory = control
            .find(|body| match body {
                FromRunner::Inventory(inventory) => Some(inventory),
                _ => None,
            })
            .await;
        if inventory.held.is_empty() {
            break;
        }
        control.send(ToRunner::InventoryRequest(pb::InventoryRequest {})).await;
    }
}

#[tokio::test]
async fn a_session_goes_on_after_control_broke() {
    let engine = Stuck::default();
    let mut rig = Rig::start(engine.clone(), |_| {}).await;
    let (mut control, mut output) = rig.session().await;
    for n in [1, 2] {
        control.send(assign(task(n), "x", &json!({}))).await;
        output.read(|received| received.text == "begun").await;
    }
    // Credits and the first Accept have arrived, the second Accept has not.
    while control.next().await.seq < 2 {}
    control.answers.send(Err(Status::unavailable("cut"))).await.unwrap();

    let mut control = rig.control().await;
    assert_eq!((control.hello.session_id.as_str(), control.ack), ("s1", 2));
    let held = control.hello.inventory.clone().unwrap().held;
    assert_eq!(held.len(), 2);
    assert!(held.iter().all(|held| held.last_index == 1 && !held.finished));
    assert_eq!(control.hello.credits.unwrap().free_slots, 0);
    let verdict = |n, keep| pb::reconciliation::Verdict {
        task_id: task(n).to_string(),
        attempt: 1,
        keep,
        resume_from: 1,
    };
    let verdicts = vec![verdict(1, true), verdict(2, false)];
    let reconciliation = Some(pb::Reconciliation { verdicts });
    control.welcome(pb::Welcome { reconciliation, last_seq: 2, ..welcome("s1", true) }).await;
    // The dropped attempt stops, the kept one sends its event again.
    timeout(SOON, engine.dropped.notified()).await.unwrap();
    let mut output = rig.output().await;
    let lease = output.next().await.leases.remove(0);
    assert_eq!((lease.task_id, lease.first_index), (task(1).to_string(), 1));
    let message = control.next().await;
    assert!(matches!(message.body, Some(FromRunner::Accept(_))), "{message:?}");
    assert_eq!(message.seq, 3);
    assert_eq!(control.credits().await.free_slots, 1);
}

#[tokio::test]
async fn a_new_session_starts_both_sequences_at_one() {
    let mut rig = Rig::start(Echo::default(), |_| {}).await;
    let (mut control, mut output) = rig.session().await;
    control.send(assign(task(1), "a", &json!({}))).await;
    output.read(|received| received.finish.is_some()).await;
    drop((control, output));

    let mut control = rig.control().await;
    control.welcome(welcome("s2", false)).await;
    let credits = control.next().await;
    assert_eq!((credits.seq, credits.ack), (1, 0));
    control.send(assign(task(2), "b", &json!({}))).await;
    let mut output = rig.output().await;
    assert_eq!(output.session_id, "s2");
    let mut finished = std::collections::BTreeSet::new();
    while finished.len() < 2 {
        let done = output.next().await.leases.into_iter().filter(|lease| lease.finish.is_some());
        finished.extend(done.map(|lease| lease.task_id));
    }
    // What was not acknowledged is sent in the new session too.
    assert!(finished.contains(&task(1).to_string()));
}

#[tokio::test]
async fn cancel_stops_the_engine_and_frees_the_slot() {
    let engine = Stuck::default();
    let mut rig = Rig::start(engine.clone(), |config| config.slots = 1).await;
    let (mut control, mut output) = rig.session().await;
    control.credits().await;
    control.send(assign(task(1), "x", &json!({}))).await;
    output.read(|received| received.text == "begun").await;
    let cancel = pb::Cancel { task_id: task(1).to_string(), attempt: 1, ..pb::Cancel::default() };
    control.send(ToRunner::Cancel(cancel)).await;
    timeout(SOON, engine.dropped.notified()).await.unwrap();
    let credits = control.credits().await;
    assert_eq!((credits.free_slots, credits.as_of_seq), (1, 1));
    // A work that comes without credit is refused, one with credit is taken.
    for n in [2, 3] {
        control.send(assign(task(n), "x", &json!({}))).await;
    }
    let refused = control
        .find(|body| match body {
            FromRunner::Refuse(refuse) => Some(refuse.task_id),
            _ => None,
        })
        .await;
    assert_eq!(refused, task(3).to_string());
}

#[tokio::test]
async fn a_lost_lease_stops_the_work_and_missing_events_are_sent_again() {
    let engine = Stuck::default();
    let mut rig = Rig::start(engine.clone(), |_| {}).await;
    let (mut control, mut output) = rig.session().await;
    control.send(assign(task(1), "x", &json!({}))).await;
    output.read(|received| received.text == "begun").await;
    output.refuse(task(1), Reason::EventsMissing, 1).await;
    let again = output.read(|received| received.text == "begun").await;
    assert_eq!(again.next_index, 2);
    output.refuse(task(1), Reason::LeaseLost, 0).await;
    timeout(SOON, engine.dropped.notified()).await.unwrap();
}

#[tokio::test]
async fn an_engine_waits_while_its_buffer_is_full() {
    let mut rig = Rig::start(Echo::default(), |_| {}).await;
    let mut control = rig.control().await;
    control.welcome(pb::Welcome { max_unacked_bytes: 100, ..welcome("s1", false) }).await;
    let mut output = rig.output().await;
    control.send(assign(task(1), "0123456789", &json!({"repeat": 10}))).await;
    // An event counts 16 bytes besides its text: three fit.
    let first = output.read(|received| received.next_index == 4).await;
    assert!(first.finish.is_none());
    let mut acked = 3;
    loop {
        output.ack(task(1), acked, false).await;
        let more = output.read(|received| received.next_index > 0).await;
        assert!(more.next_index - 1 - acked <= 3, "{more:?} after {acked}");
        acked = more.next_index - 1;
        if more.finish.is_some() {
            break;
        }
    }
    assert_eq!(acked, 10);
}

#[tokio::test]
async fn heartbeats_go_on_while_an_engine_blocks_its_thread() {
    let (release, wait) = std::sync::mpsc::channel();
    let engine = Blocking(Mutex::new(Some(wait)));
    let mut rig = Rig::start(engine, |config| config.engine_threads = 1).await;
    let mut control = rig.control().await;
    let heartbeat_interval = Some(prost_types::Duration { seconds: 0, nanos: 10_000_000 });
    control.welcome(pb::Welcome { heartbeat_interval, ..welcome("s1", false) }).await;
    let mut output = rig.output().await;
    control.send(assign(task(1), "x", &json!({}))).await;
    for _ in 0..5 {
        let heartbeat = control
            .find(|body| match body {
                FromRunner::Heartbeat(heartbeat) => Some(heartbeat),
                _ => None,
            })
            .await;
        if heartbeat.held == 1 {
            assert_ne!(heartbeat.held_digest, 0);
        }
    }
    drop(release);
    output.read(|received| received.finish.is_some()).await;
}

#[tokio::test]
async fn a_panic_fails_its_attempt_alone() {
    let mut rig = Rig::start(Panicking, |_| {}).await;
    let (mut control, mut output) = rig.session().await;
    control.send(assign(task(1), "x", &json!({}))).await;
    let received = output.read(|received| received.finish.is_some()).await;
    let Some(Outcome::Failure(failure)) = received.finish.unwrap().outcome else { panic!() };
    assert_eq!((failure.reason.as_str(), failure.retryable), ("ENGINE_ERROR", true));
    assert_eq!(received.credits.unwrap().free_slots, 2);
}

#[tokio::test]
async fn input_that_is_no_object_fails_the_attempt() {
    let mut rig = Rig::start(Echo::default(), |_| {}).await;
    let (mut control, mut output) = rig.session().await;
    control
        .send(ToRunner::Assign(pb::Assign {
            task_id: task(1).to_string(),
            attempt: 1,
            input_json: "[]".into(),
            ..pb::Assign::default()
        }))
        .await;
    let received = output.read(|received| received.finish.is_some()).await;
    let Some(Outcome::Failure(failure)) = received.finish.unwrap().outcome else { panic!() };
    assert_eq!((failure.reason.as_str(), failure.retryable), ("INPUT_REJECTED", false));
}

#[tokio::test]
async fn a_planned_reconnect_goes_on_with_the_session() {
    let mut rig = Rig::start(Echo::default(), |_| {}).await;
    let (mut control, _output) = rig.session().await;
    control.send(ToRunner::Reconnect(pb::Reconnect::default())).await;
    let again = rig.control().await;
    assert_eq!((again.hello.session_id.as_str(), again.ack), ("s1", 1));
}

#[tokio::test]
async fn a_final_refusal_ends_the_runner_with_an_error() {
    let mut rig = Rig::start(Echo::default(), |_| {}).await;
    drop(rig.control().await);
    *rig.refusal.lock() = Some(Status::unauthenticated("the key is revoked"));
    let error = rig.ended().await.unwrap_err();
    assert!(format!("{error:#}").contains("the key is revoked"), "{error:#}");
}

#[tokio::test]
async fn polling_runs_attempts_with_their_tokens() {
    let mut rig = Rig::start(Echo::default(), |config| {
        config.mode = Mode::Poll;
        config.api_key = Some("runner-key".into());
    })
    .await;
    polled(&mut rig).await;
}

#[tokio::test]
async fn auto_falls_back_to_polling_when_streams_keep_breaking() {
    let mut rig =
        Rig::start(Echo::default(), |config| config.api_key = Some("runner-key".into())).await;
    for _ in 0..3 {
        let control = rig.control().await;
        control.answers.send(Err(Status::unavailable("a proxy cut it"))).await.unwrap();
    }
    polled(&mut rig).await;
}

/// A whole attempt by unary calls.
async fn polled(rig: &mut Rig) {
    let (request, answer) = timeout(SOON, rig.polls.recv()).await.unwrap().unwrap();
    assert_eq!(request.metadata().get("authorization").unwrap(), "Bearer runner-key");
    let request = request.into_inner();
    let Some(FromRunner::Hello(hello)) = &request.messages[0].body else { panic!() };
    assert_eq!(hello.credits.unwrap().free_slots, 2);
    let message = |seq, body| pb::ConnectResponse { seq, ack: 0, body: Some(body) };
    let messages = vec![
        message(0, ToRunner::Welcome(welcome("p1", false))),
        message(1, assign(task(1), "one two", &json!({}))),
    ];
    answer.send(Ok(pb::PollResponse { messages })).unwrap();

    let mut text = String::new();
    let (mut accepted, mut finished) = (false, false);
    // Calls that wait are answered when the test ends.
    let mut waiting = Vec::new();
    let whole = async {
        while !(accepted && finished) {
            tokio::select! {
                Some((request, answer)) = rig.polls.recv() => {
                    let request = request.into_inner();
                    assert_eq!(request.session_id, "p1");
                    let numbered = request.messages.iter().any(|message| message.seq > 0);
                    accepted |= request
                        .messages
                        .iter()
                        .any(|message| matches!(message.body, Some(FromRunner::Accept(_))));
                    if numbered {
                        // The same message again, as a server does that saw no ack.
                        let again = message(1, assign(task(1), "one two", &json!({})));
                        let answered = Ok(pb::PollResponse { messages: vec![again] });
                        answer.send(answered).unwrap();
                    } else {
                        waiting.push(answer);
                    }
                }
                Some((request, answer)) = rig.reports.recv() => {
                    let bearer = request.metadata().get("authorization").unwrap();
                    assert_eq!(bearer, "Bearer attempt-token");
                    let request = request.into_inner();
                    for event in &request.events {
                        if let Some(pb::runner_event::Body::Token(token)) = &event.body {
                            text.push_str(token);
                        }
                    }
                    finished |= request.finish.is_some();
                    let acked_index = request.first_index + request.events.len() as u64 - 1;
                    let finished = request.finish.is_some();
                    answer.send(Ok(pb::ReportTaskEventsResponse { acked_index, finished })).unwrap();
                }
            }
        }
    };
    timeout(SOON, whole).await.unwrap();
    assert_eq!(text, "one two");
}
