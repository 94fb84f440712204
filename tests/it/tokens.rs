//! Tokens and sequences: what every reader sees, live, late and after a resume.

use baton::pb::{self, TaskState, task_event::Body};
use tonic::Code;

use crate::harness::{
    SOON,
    api::Api,
    checks::{self, History},
    default,
    local::Local,
    runner::{self, Runner},
    spec, within,
};

const MODEL: &str = "test/echo";

/// Reads from `from` to the end.
async fn read_from(api: &Api, task: &str, from: u64) -> Vec<pb::TaskEvent> {
    within("the end of a stream", SOON, async {
        let mut stream = api.stream(task, from).await.expect("a stream");
        let mut events = Vec::new();
        while let Some(event) = stream.message().await.expect("an event") {
            events.push(event);
        }
        events
    })
    .await
}

/// P7, P8: live readers from every position, and late ones after the end and after a restart,
/// see the same bytes, without a gap or a repeat.
#[tokio::test]
async fn readers_from_every_position_see_the_same_bytes_live_and_late() {
    let server = Local::start(&[]).await;
    let api = server.api();
    let mut runner = Runner::connect(&api, "r1", &[MODEL], 1).await;
    let task = api.submit_to(MODEL).await;
    let lease = runner.assigned().await;
    let mut readers = tokio::task::JoinSet::new();
    for from in 1..=20_u64 {
        let (api, task) = (api.clone(), task.clone());
        readers.spawn(async move { (from, read_from(&api, &task, from).await) });
    }
    for i in 0..40 {
        runner.output(&lease, i + 1, runner::tokens(i, 1), None).await;
    }
    runner.finish(&lease, 41, runner::success()).await;
    let mut history = History::default();
    for (from, events) in within("readers", SOON, readers.join_all()).await {
        checks::check_stream(&task, from - 1, &events);
        history.add(&task, &events);
    }
    let whole = api.read_all(&task).await;
    assert_eq!(history.len(), whole.len());
    for from in 1..=whole.len() as u64 {
        let events = read_from(&api, &task, from).await;
        checks::check_stream(&task, from - 1, &events);
        assert_eq!(events, whole[from as usize - 1..]);
    }
    let server = server.restarted(&[]).await;
    assert_eq!(server.api().read_all(&task).await, whole);
    server.stop().await;
}

/// P8: a reader that hangs up after each event and comes back misses and repeats nothing.
#[tokio::test]
async fn a_reader_that_hangs_up_after_every_event_misses_and_repeats_nothing() {
    let server = Local::start(&[]).await;
    let api = server.api();
    let mut runner = Runner::connect(&api, "r1", &[MODEL], 1).await;
    let task = api.submit_to(MODEL).await;
    let (reader, id) = (api.clone(), task.clone());
    let reading = tokio::spawn(async move {
        let mut events: Vec<pb::TaskEvent> = Vec::new();
        loop {
            let next = events.last().map_or(0, |event| event.sequence) + 1;
            let mut stream = reader.stream(&id, next).await.expect("a stream");
            let event = stream.message().await.expect("an event").expect("another event");
            let end = matches!(event.body, Some(Body::Ended(_)));
            events.push(event);
            if end {
                return events;
            }
        }
    });
    let lease = runner.assigned().await;
    for i in 0..60 {
        runner.output(&lease, i + 1, runner::tokens(i, 1), None).await;
        if i % 10 == 9 {
            runner.acked(&lease, i + 1).await;
        }
    }
    runner.finish(&lease, 61, runner::success()).await;
    let events = within("the reader", SOON, reading).await.expect("a sound reader");
    checks::check_stream(&task, 0, &events);
    assert_eq!(events, api.read_all(&task).await);
    server.stop().await;
}

/// P8: a position beyond the end of an ended task is refused, not waited for.
#[tokio::test]
async fn a_position_beyond_the_end_is_out_of_range() {
    let server = Local::start(&[]).await;
    let api = server.api();
    let mut runner = Runner::connect(&api, "r1", &[MODEL], 1).await;
    let task = api.submit_to(MODEL).await;
    runner.serve_one(2).await;
    let last = api.read_all(&task).await.len() as u64;
    let refused = within("an answer", SOON, async {
        match api.stream(&task, last + 2).await {
            Err(status) => status,
            Ok(mut stream) => stream.message().await.expect_err("a refusal"),
        }
    })
    .await;
    assert_eq!(refused.code(), Code::OutOfRange);
    server.stop().await;
}

/// P9: a missing index is refused with the index to resend from; a doubled one is dropped.
#[tokio::test]
async fn a_missing_index_is_refused_and_a_doubled_one_is_dropped() {
    let server = Local::start(&[]).await;
    let api = server.api();
    let mut runner = Runner::connect(&api, "r1", &[MODEL], 1).await;
    let task = api.submit_to(MODEL).await;
    let lease = runner.assigned().await;
    runner.output(&lease, 1, runner::tokens(0, 3), None).await;
    runner.output(&lease, 5, runner::tokens(4, 2), None).await;
    let refused = runner.ack("EVENTS_MISSING", &lease, |ack| ack.error.is_some()).await;
    let error = refused.error.expect("an error");
    assert_eq!(runner::lease_reason(&error), "EVENTS_MISSING");
    assert_eq!(refused.resend_from, 4);
    // Everything again, twice, in overlapping pieces.
    runner.output(&lease, 2, runner::tokens(1, 4), None).await;
    runner.output(&lease, 1, runner::tokens(0, 6), None).await;
    runner.output(&lease, 6, runner::tokens(5, 2), None).await;
    runner.acked(&lease, 7).await;
    // A Finish that would leave a hole is refused too.
    runner.output(&lease, 10, vec![], Some(runner::success())).await;
    let refused = runner.ack("EVENTS_MISSING", &lease, |ack| ack.error.is_some()).await;
    assert_eq!((refused.finished, refused.resend_from), (false, 8));
    runner.finish(&lease, 8, runner::success()).await;
    // A Finish may be sent again.
    runner.output(&lease, 8, vec![], Some(runner::success())).await;
    runner.ack("an answer", &lease, |ack| ack.finished || ack.error.is_some()).await;
    let events = api.read_all(&task).await;
    checks::check_stream(&task, 0, &events);
    assert_eq!(checks::text(&events), "t0 t1 t2 t3 t4 t5 t6 ");
    server.stop().await;
}

/// P9: a retry announces itself, its tokens count from 0, and what came before stays readable.
#[tokio::test]
async fn a_retry_announces_itself_and_voids_earlier_tokens() {
    let server = Local::start(&[]).await;
    let api = server.api();
    let mut runner = Runner::connect(&api, "r1", &[MODEL], 1).await;
    let retry = pb::RetryPolicy {
        max_attempts: 2,
        initial_backoff: Some(crate::harness::seconds(0.01)),
        ..default()
    };
    let task = api.submit(pb::TaskSpec { retry: Some(retry), ..spec(MODEL) }).await.task_id;
    let lease = runner.assigned().await;
    runner.output(&lease, 1, runner::tokens(0, 4), Some(runner::failure(true))).await;
    runner.ack("an ack of Finish", &lease, |ack| ack.finished).await;
    runner.forget(&lease);
    runner.credits(1).await;
    let lease = runner.assigned().await;
    runner.output(&lease, 1, runner::tokens(10, 2), None).await;
    runner.finish(&lease, 3, runner::success()).await;
    let events = api.read_all(&task).await;
    checks::check_stream(&task, 0, &events);
    let started = events.iter().filter(|event| matches!(event.body, Some(Body::AttemptStarted(_))));
    assert_eq!(started.count(), 2);
    assert_eq!(checks::text(&events), "t10 t11 ");
    let tokens = events.iter().filter(|event| matches!(event.body, Some(Body::Token(_))));
    assert_eq!(tokens.count(), 6, "the first attempt's tokens are gone");
    server.stop().await;
}

/// P7, P8: an orderly restart in the middle of an attempt: the runner comes back and goes on,
/// and a reader that resumes sees one unbroken stream.
#[tokio::test]
async fn an_attempt_goes_on_over_a_restart_without_a_hole() {
    let server = Local::start(&[]).await;
    let api = server.api();
    let mut runner = Runner::connect(&api, "r1", &[MODEL], 1).await;
    let task = api.submit_to(MODEL).await;
    let lease = runner.assigned().await;
    runner.output(&lease, 1, runner::tokens(0, 5), None).await;
    let mut before = Vec::new();
    let mut stream = api.stream(&task, 1).await.expect("a stream");
    while before.len() < 7 {
        let event = within("seven events", SOON, stream.message()).await;
        before.push(event.expect("a stream").expect("an event"));
    }
    let server = server.restarted(&[]).await;
    let api = server.api();
    let mut runner = runner.reconnect(&api).await.expect("a welcome");
    let verdicts = runner.welcome.reconciliation.clone().unwrap_or_default().verdicts;
    assert!(verdicts.len() == 1 && verdicts[0].keep, "{verdicts:?}");
    assert!(verdicts[0].resume_from <= 6, "{verdicts:?}");
    let from = verdicts[0].resume_from.max(1);
    runner.output(&lease, from, runner::tokens(from - 1, 9 - from), None).await;
    runner.finish(&lease, 9, runner::success()).await;
    let after = read_from(&api, &task, 8).await;
    let whole: Vec<_> = before.into_iter().chain(after).collect();
    checks::check_stream(&task, 0, &whole);
    assert_eq!(whole, api.read_all(&task).await);
    assert_eq!(checks::text(&whole), "t0 t1 t2 t3 t4 t5 t6 t7 ");
    let end = api.get(&task).await;
    assert_eq!((end.state(), end.attempt, end.lost_attempts), (TaskState::Succeeded, 1, 0));
    server.stop().await;
}
