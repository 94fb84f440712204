//! Two ledgers on one database, as two servers have them: they need the server that
//! `BATON_TEST_POSTGRES` names.

use std::collections::HashSet;

use futures_util::future::join_all;

use super::{
    tests::{Bench, new_task},
    *,
};
use crate::{
    relay::Encoded,
    tasks::{
        model::State,
        reads,
        state::{Event, Outcome},
    },
};

const ROUNDS: usize = 50;

async fn two() -> (Bench, Bench) {
    let one = Bench::new().await;
    let other = one.rival().await;
    assert_eq!(one.parts.db.engine(), Engine::Postgres, "BATON_TEST_POSTGRES names no server");
    (one, other)
}

#[tokio::test]
#[ignore = "needs the server that BATON_TEST_POSTGRES names"]
async fn of_two_ledgers_that_start_a_task_one_does() {
    let (one, other) = two().await;
    for _ in 0..ROUNDS {
        let id = one.submit(new_task()).await.task.id;
        let (a, b) = tokio::join!(one.start(id), other.start(id));
        assert!(a.is_ok() != b.is_ok(), "{a:?} {b:?}");
        let lost = a.as_ref().err().or(b.as_ref().err()).unwrap();
        assert_eq!(lost.reason(), Reason::StateConflict);
        assert_eq!(one.get(id).await.attempt, 1);
        assert_eq!(one.timeline(id).await, [(1, "queued"), (2, "attempt_started")]);
    }
}

#[tokio::test]
#[ignore = "needs the server that BATON_TEST_POSTGRES names"]
async fn of_two_ledgers_that_end_an_attempt_one_does() {
    let (one, other) = two().await;
    for _ in 0..ROUNDS {
        let id = one.submit(new_task()).await.task.id;
        let task = one.start(id).await.unwrap();
        let cancel = Event::Cancel { reason: String::new(), by: "me".into() };
        let (a, b) =
            tokio::join!(one.finish(&task, Outcome::Success(None)), other.ledger.apply(id, cancel));
        assert!(a.is_ok() != b.is_ok(), "{a:?} {b:?}");
        let kinds: Vec<_> = one.timeline(id).await.into_iter().map(|(_, kind)| kind).collect();
        assert_eq!(kinds.last(), Some(&"ended"));
        assert_eq!(kinds.iter().filter(|kind| **kind == "ended").count(), 1);
    }
}

#[tokio::test]
#[ignore = "needs the server that BATON_TEST_POSTGRES names"]
async fn of_two_ledgers_that_accept_a_request_id_one_makes_the_task() {
    let (one, other) = two().await;
    for round in 0..ROUNDS {
        let new = NewTask { request_id: Some(format!("r{round}")), ..new_task() };
        let (a, b) = tokio::join!(one.submit(new.clone()), other.submit(new));
        assert_eq!(a.task.id, b.task.id);
        assert!(a.new != b.new);
    }
}

#[tokio::test]
#[ignore = "needs the server that BATON_TEST_POSTGRES names"]
async fn of_two_ledgers_that_redrive_a_dead_letter_one_does() {
    let (one, other) = two().await;
    for _ in 0..ROUNDS {
        let id = one.submit(new_task()).await.task.id;
        for _ in 0..3 {
            let task = one.start(id).await.unwrap();
            one.finish(&task, super::tests::broken()).await.unwrap();
            one.parts.clock.advance(Duration::from_mins(1));
        }
        let again = NewTask { retry_of: Some(id), ..new_task() };
        let both = [&one, &other].map(|bench| bench.ledger.submit(vec![again.clone()]));
        let answers: Vec<_> = join_all(both).await.into_iter().flatten().collect();
        assert_eq!(answers.iter().filter(|answer| answer.is_ok()).count(), 1, "{answers:?}");
    }
}

/// What one server records while another ends the attempt lies before the end or nowhere.
#[tokio::test]
#[ignore = "needs the server that BATON_TEST_POSTGRES names"]
async fn nothing_is_recorded_behind_an_end_that_another_server_wrote() {
    let (one, other) = two().await;
    let mut ends = HashSet::new();
    for round in 0..ROUNDS {
        let id = one.submit(new_task()).await.task.id;
        one.start(id).await.unwrap();
        let log = one.parts.relay.find(id).unwrap();
        log.append(1, 1, 5, |_, _, _, _| Encoded::Token).unwrap();
        let segment = log.take_unrecorded().unwrap();
        let record = async {
            for _ in 0..round % 5 {
                tokio::task::yield_now().await;
            }
            one.ledger.record(vec![segment]).await
        };
        let cancel = Event::Cancel { reason: String::new(), by: "me".into() };
        let end = other.ledger.apply(id, cancel);
        // One before the other, the other before the one, and, most often, both at once.
        let (recorded, ended) = match round {
            0 => {
                let recorded = record.await;
                (recorded, end.await)
            }
            1 => {
                let ended = end.await;
                (record.await, ended)
            }
            _ => tokio::join!(record, end),
        };
        recorded.unwrap();
        let ended = ended.unwrap();
        assert_eq!(ended.state, State::Cancelled);
        let read =
            one.parts.db.read(move |tx| Box::pin(async move { reads::segments(tx, id, 1).await }));
        let last = read.await.unwrap().last().map(|(last, _)| *last);
        assert!(last.is_none_or(|last| last < ended.last_sequence), "{last:?} {ended:?}");
        ends.insert(last.is_some());
    }
    assert_eq!(ends.len(), 2, "what was recorded first is kept, what came late is not");
}
