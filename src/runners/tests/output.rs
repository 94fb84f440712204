//! Events and ends.

use std::sync::atomic::Ordering::Relaxed;

use super::world::*;
use crate::{
    pb::{self, connect_response::Body},
    runners::model::Batch,
    tasks::{
        model::State,
        state::{Event, Outcome},
    },
};

#[tokio::test]
async fn events_are_acknowledged_when_they_are_on_stable_storage() {
    let world = World::new().await;
    let mut runner = Runner::connect(&world);
    let fence = world.run(&runner).await;
    let Body::Assign(assign) = &runner.read(&world)[0] else { panic!("no assignment") };
    assert_eq!(assign.attempt, 1);
    assert_eq!(assign.attempt_token, format!("token-{}", fence.task));
    runner.tokens(&world, fence, 1, &["a", "b"]);
    assert_eq!(world.parts.relay.find(fence.task).unwrap().head(), Some(4));
    assert!(runner.acks(&world).is_empty());
    world.record().await;
    let acks = runner.acks(&world);
    assert_eq!((acks[0].acked_index, acks[0].finished), (2, false));
    assert!(runner.acks(&world).is_empty());
}

#[tokio::test]
async fn a_finish_is_acknowledged_after_the_store_has_it_and_never_before() {
    let world = World::new().await;
    let mut runner = Runner::connect(&world);
    let fence = world.run(&runner).await;
    world.store_down.store(true, Relaxed);
    runner.tokens(&world, fence, 1, &["a"]);
    runner.finish(&world, fence, 2);
    for _ in 0..100 {
        tokio::task::yield_now().await;
        world.clock.advance(std::time::Duration::from_millis(10));
        assert!(runner.acks(&world).is_empty());
    }
    assert_eq!(world.get(fence.task).await.state, State::Running);
    world.store_down.store(false, Relaxed);
    let acks = until(|| async {
        world.clock.advance(std::time::Duration::from_millis(10));
        Some(runner.acks(&world)).filter(|acks| !acks.is_empty())
    })
    .await;
    assert!(acks[0].finished);
    assert_eq!(world.get(fence.task).await.state, State::Succeeded);
    assert_eq!(world.leases(), 0);
}

#[tokio::test]
async fn a_finish_that_is_sent_again_is_acknowledged_again() {
    let world = World::new().await;
    let mut runner = Runner::connect(&world);
    let fence = world.run(&runner).await;
    runner.finish(&world, fence, 1);
    assert!(runner.next_acks(&world).await[0].finished);
    runner.finish(&world, fence, 1);
    assert!(runner.next_acks(&world).await[0].finished);
    // Also by a session that knows nothing of it.
    let mut runner = Runner::try_connect(&world, hello("r1", "i1")).unwrap();
    runner.finish(&world, fence, 1);
    assert!(runner.next_acks(&world).await[0].finished);
    // Another end is not what the store has.
    let mut other = success();
    other.outcome = Some(pb::finish::Outcome::Failure(pb::Failure::default()));
    let mut runner = Runner::try_connect(&world, hello("r1", "i2")).unwrap();
    let batch = Batch { fence, first_index: 1, events: Vec::new(), finish: Some(other) };
    runner.send(&world, batch);
    assert_eq!(reason(&runner.next_acks(&world).await[0]), "LEASE_LOST");
}

#[tokio::test]
async fn doubled_events_are_dropped_and_missing_ones_asked_for() {
    let world = World::new().await;
    let mut runner = Runner::connect(&world);
    let fence = world.run(&runner).await;
    runner.tokens(&world, fence, 1, &["a", "b"]);
    runner.tokens(&world, fence, 2, &["b", "c"]);
    let log = world.parts.relay.find(fence.task).unwrap();
    assert_eq!(log.next_index(1), Some(4));
    runner.tokens(&world, fence, 6, &["f"]);
    runner.finish(&world, fence, 7);
    let acks = runner.acks(&world);
    assert_eq!((reason(&acks[0]), acks[0].resend_from), ("EVENTS_MISSING", 4));
    assert_eq!(log.next_index(1), Some(4));
    runner.tokens(&world, fence, 4, &["d", "e", "f"]);
    runner.finish(&world, fence, 7);
    assert!(runner.next_acks(&world).await[0].finished);
}

#[tokio::test]
async fn nothing_is_taken_under_a_lease_that_another_holds_or_that_has_ended() {
    let world = World::new().await;
    let runner = Runner::connect(&world);
    let mut other = Runner::try_connect(&world, hello("r2", "i1")).unwrap();
    let fence = world.run(&runner).await;
    other.tokens(&world, fence, 1, &["x"]);
    assert_eq!(reason(&other.acks(&world)[0]), "LEASE_LOST");
    other.finish(&world, fence, 1);
    assert_eq!(reason(&other.next_acks(&world).await[0]), "LEASE_LOST");
    assert_eq!(world.get(fence.task).await.state, State::Running);
    assert_eq!(world.parts.relay.find(fence.task).unwrap().next_index(1), Some(1));
}

#[tokio::test]
async fn after_a_cancel_the_runner_hears_of_it_and_its_events_change_nothing() {
    let world = World::new().await;
    let mut runner = Runner::connect(&world);
    let fence = world.run(&runner).await;
    runner.read(&world);
    let cancel = Event::Cancel { reason: "enough".into(), by: "me".into() };
    world.ledger.apply(fence.task, cancel).await.unwrap();
    world.revoke(fence);
    let Body::Cancel(cancel) = &runner.read(&world)[0] else { panic!("no cancel") };
    assert_eq!(cancel.reason, "CANCELLED");
    runner.tokens(&world, fence, 1, &["late"]);
    runner.finish(&world, fence, 2);
    let acks = runner.next_acks(&world).await;
    assert_eq!(reason(&acks[0]), "LEASE_LOST");
    assert_eq!(world.get(fence.task).await.state, State::Cancelled);
}

#[tokio::test]
async fn a_cancel_whose_nudge_is_lost_is_found_by_the_sweep() {
    let world = World::new().await;
    let mut runner = Runner::connect(&world);
    let fence = world.run(&runner).await;
    runner.read(&world);
    let cancel = Event::Cancel { reason: String::new(), by: "me".into() };
    world.ledger.apply(fence.task, cancel).await.unwrap();
    world.registry.sweep_stale();
    world.registry.sweep_stale();
    assert!(matches!(runner.read(&world)[..], [Body::Cancel(_)]));
    assert_eq!(world.leases(), 0);
}

#[tokio::test]
async fn more_events_than_are_reserved_wait_and_the_finish_with_them() {
    let world = World::new().await;
    let mut runner = Runner::connect(&world);
    let fence = world.run(&runner).await;
    let many = vec!["t"; 3000];
    runner.tokens(&world, fence, 1, &many);
    runner.tokens(&world, fence, 3001, &many);
    runner.finish(&world, fence, 6001);
    assert!(runner.acks(&world).is_empty());
    let acked = std::cell::Cell::new(0);
    until(|| async {
        world.record().await;
        let acks = runner.acks(&world);
        acked.set(acks.iter().map(|ack| ack.acked_index).fold(acked.get(), u64::max));
        acks.iter().any(|ack| ack.finished).then_some(())
    })
    .await;
    assert!(acked.get() >= 1000, "{acked:?}");
    let task = world.get(fence.task).await;
    assert_eq!((task.state, task.last_sequence), (State::Succeeded, 6003));
}

#[tokio::test]
async fn a_malformed_event_ends_the_attempt_with_a_clear_error() {
    let world = World::new().await;
    let mut runner = Runner::connect(&world);
    let fence = world.run(&runner).await;
    runner.read(&world);
    let events = vec![token("a"), pb::RunnerEvent::default(), token("b")];
    runner.send(&world, Batch { fence, first_index: 1, events, finish: None });
    assert_eq!(reason(&runner.next_acks(&world).await[0]), "INVALID_PARAMS");
    assert!(matches!(runner.read(&world)[..], [Body::Cancel(_)]));
    let task = world.get(fence.task).await;
    assert_eq!(
        (task.state, task.error.unwrap().reason.as_str()),
        (State::Failed, "INVALID_PARAMS")
    );
}

#[tokio::test]
async fn a_report_is_answered_when_it_is_on_stable_storage() {
    let world = World::new().await;
    let runner = Runner::connect(&world);
    let fence = world.run(&runner).await;
    let report = |first_index, n: usize, finish: bool| {
        let events = vec![token("t"); n];
        let finish = finish.then(success);
        world.registry.report(Batch { fence, first_index, events, finish })
    };
    let mut tokens = Box::pin(report(1, 2500, false));
    let answer = loop {
        tokio::select! {
            biased;
            answer = &mut tokens => break answer,
            () = tokio::task::yield_now() => world.record().await,
        }
    };
    assert_eq!(answer.unwrap(), (2500, false));
    assert_eq!(report(2501, 1, true).await.unwrap(), (2501, true));
    // Sent again, also after the end.
    assert_eq!(report(2501, 1, true).await.unwrap(), (2501, true));
    let late = report(2502, 1, false).await.unwrap_err();
    assert_eq!(late.reason(), crate::error::Reason::LeaseLost);
}

#[tokio::test]
async fn a_finish_and_a_loss_that_race_leave_one_end() {
    for order in 0..2 {
        let world = World::new().await;
        let mut runner = Runner::connect(&world);
        let fence = world.run(&runner).await;
        let lose = Event::Lose { attempt: 1, reason: "test".into() };
        if order == 0 {
            runner.finish(&world, fence, 1);
            let _ = world.ledger.apply(fence.task, lose).await;
        } else {
            let finish = Event::Finish {
                attempt: 1,
                outcome: Outcome::Success(None),
                usage: Default::default(),
            };
            let (lost, _) = tokio::join!(
                world.ledger.apply(fence.task, lose),
                world.ledger.apply(fence.task, finish)
            );
            assert!(lost.is_ok());
            runner.finish(&world, fence, 1);
        }
        let acks = runner.next_acks(&world).await;
        let task = world.get(fence.task).await;
        assert_eq!(acks[0].finished, task.state == State::Succeeded, "{task:?}");
        assert_eq!(reason(&acks[0]) == "LEASE_LOST", task.state == State::Queued);
    }
}
