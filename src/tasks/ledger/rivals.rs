//! Two ledgers on one database, as two servers have them: they need the server that
//! `BATON_TEST_POSTGRES` names.

use std::collections::HashSet;

use futures_util::{StreamExt as _, future::join_all};

use super::{
    tests::{Bench, new_task},
    *,
};
use crate::{
    events::store as events,
    instances::Lock,
    relay::Encoded,
    tasks::{
        model::State,
        reads,
        recorder::Recorder,
        state::{Event, Outcome},
        watch,
    },
};

const ROUNDS: usize = 50;

async fn two() -> (Bench, Bench) {
    let one = Bench::new().await;
    let other = one.rival().await;
    assert!(one.parts.db.is_shared(), "BATON_TEST_POSTGRES names no server");
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
        let left_out = recorded.unwrap();
        let ended = ended.unwrap();
        assert_eq!(ended.state, State::Cancelled);
        let read =
            one.parts.db.read(move |tx| Box::pin(async move { reads::segments(tx, id, 1).await }));
        let last = read.await.unwrap().last().map(|(last, _)| *last);
        assert!(last.is_none_or(|last| last < ended.last_sequence), "{last:?} {ended:?}");
        assert_eq!(left_out.is_empty(), last.is_some(), "it says what is kept");
        ends.insert(last.is_some());
    }
    assert_eq!(ends.len(), 2, "what was recorded first is kept, what came late is not");
}

fn claim(task: &Task) -> Claim {
    let runner = task.runner.clone().unwrap();
    Claim { task: task.id, attempt: task.attempt, runner, serves: None }
}

fn lose(task: &Task) -> Event {
    Event::Lose { attempt: task.attempt, reason: "gone".into() }
}

/// The runner came back to the other server: what the first one says of the attempt from then on
/// is refused, also when it had the row at hand.
#[tokio::test]
#[ignore = "needs the server that BATON_TEST_POSTGRES names"]
async fn a_server_whose_runner_went_to_another_has_no_say_any_more() {
    let (one, other) = two().await;
    let id = one.submit(new_task()).await.task.id;
    let task = one.start(id).await.unwrap();
    assert_eq!(task.instance, one.parts.standing.id());
    let log = one.parts.relay.find(id).unwrap();
    log.append(1, 1, 5, |_, _, _, _| Encoded::Token).unwrap();
    let late = log.take_unrecorded().unwrap();
    let resumed = other.ledger.resume(vec![claim(&task)]).await.unwrap();
    assert_eq!(resumed[0].instance, other.parts.standing.id());
    assert_eq!(resumed[0].revision, task.revision + 1);
    let through = late.last;
    assert_eq!(one.ledger.record(vec![late]).await.unwrap(), [id]);
    log.not_recorded(through);
    let (relay, clock) = (one.parts.relay.clone(), one.parts.clock.clone());
    let recorder = Recorder::new(relay, one.ledger.clone(), clock, one.parts.metrics.clone());
    recorder.run_once().await.unwrap();
    assert_eq!(log.durable_index(1), Some(0), "acknowledged, and kept nowhere");
    for event in [lose(&task), Event::TimeOut { attempt: 1 }] {
        let refused = one.ledger.apply(id, event).await.unwrap_err();
        assert_eq!(refused.reason(), Reason::LeaseLost);
    }
    let finished = one.finish(&task, Outcome::Success(None)).await;
    assert_eq!(finished.unwrap_err().reason(), Reason::LeaseLost);
    let stored =
        one.parts.db.read(move |tx| Box::pin(async move { reads::segments(tx, id, 1).await }));
    assert!(stored.await.unwrap().is_empty(), "a late segment was kept");
    other.parts.relay.open(id).resume_attempt(1, 2, 2, 0, task.reserved_sequence);
    let done = other.finish(&resumed[0], Outcome::Success(None)).await.unwrap();
    assert_eq!((done.state, done.instance), (State::Succeeded, None));
}

#[tokio::test]
#[ignore = "needs the server that BATON_TEST_POSTGRES names"]
async fn of_a_return_and_a_loss_at_the_same_time_one_counts() {
    let (one, other) = two().await;
    let mut n_lost = 0;
    for round in 0..ROUNDS {
        let id = one.submit(new_task()).await.task.id;
        let task = one.start(id).await.unwrap();
        let lost = async {
            for _ in 0..round % 5 {
                tokio::task::yield_now().await;
            }
            one.ledger.apply(id, lose(&task)).await
        };
        let (resumed, lost) = tokio::join!(other.ledger.resume(vec![claim(&task)]), lost);
        assert!(resumed.unwrap().is_empty() == lost.is_ok(), "{lost:?}");
        n_lost += usize::from(lost.is_ok());
        let row = one.get(id).await;
        let wanted = if lost.is_ok() { State::Queued } else { State::Running };
        assert_eq!(row.state, wanted);
    }
    assert!(n_lost > 0 && n_lost < ROUNDS, "no race: {n_lost}");
}

/// Whoever ends an attempt of another server gives no sequence away that this one has shown.
#[tokio::test]
#[ignore = "needs the server that BATON_TEST_POSTGRES names"]
async fn an_end_by_another_server_comes_behind_all_that_was_shown() {
    let (one, other) = two().await;
    let id = one.submit(new_task()).await.task.id;
    let task = one.start(id).await.unwrap();
    let log = one.parts.relay.find(id).unwrap();
    log.append(1, 1, 3, |_, _, _, _| Encoded::Token).unwrap();
    one.ledger.record(vec![log.take_unrecorded().unwrap()]).await.unwrap();
    log.append(1, 4, 2, |_, _, _, _| Encoded::Token).unwrap();
    let shown = log.head().unwrap();
    // The other has a log of its own, which somebody reads and which knows nothing.
    other.parts.relay.open(id);
    let cancel = Event::Cancel { reason: String::new(), by: "me".into() };
    let ended = other.ledger.apply(id, cancel).await.unwrap();
    assert_eq!(ended.last_sequence, task.reserved_sequence + 1);
    assert!(shown < task.reserved_sequence);
    let timeline = one.timeline(id).await;
    let last: Vec<_> = timeline.iter().rev().take(2).map(|(_, kind)| *kind).collect();
    assert_eq!(last, ["ended", "gap"]);
}

#[tokio::test]
#[ignore = "needs the server that BATON_TEST_POSTGRES names"]
async fn what_a_dead_server_held_is_lost_once_and_only_by_who_has_the_lock() {
    let (one, other) = two().await;
    let beat = |bench: &Bench| crate::instances::Heartbeat {
        db: bench.parts.db.clone(),
        clock: bench.parts.clock.clone(),
        standing: bench.parts.standing.clone(),
        address: String::new(),
        leaving: tokio_util::sync::CancellationToken::new(),
    };
    let (first, second) = (beat(&one), beat(&other));
    first.run_once().await.unwrap();
    let duty = one.parts.standing.duty(Lock::Orphans);
    let old = duty.mandate().unwrap();
    let id = one.submit(new_task()).await.task.id;
    let task = one.start(id).await.unwrap();
    let orphan = || {
        let (attempt, instance) = (1, task.instance);
        vec![(id, Event::Orphan { attempt, instance, reason: "gone".into() })]
    };
    first.leaving.cancel();
    first.run_once().await.unwrap();
    second.run_once().await.unwrap();
    let refused = one.ledger.apply_for(&old, orphan()).await.pop().unwrap().unwrap_err();
    assert_eq!(refused.reason(), Reason::Conflict);
    assert_eq!(one.get(id).await.state, State::Running);
    let new = other.parts.standing.duty(Lock::Orphans).mandate().unwrap();
    let lost = other.ledger.apply_for(&new, orphan()).await.pop().unwrap().unwrap();
    assert_eq!((lost.state, lost.lost), (State::Queued, 1));
    let again = other.ledger.apply_for(&new, orphan()).await.pop().unwrap().unwrap_err();
    assert_eq!(again.reason(), Reason::LeaseLost);
}

/// What a server has at hand may be old; it refuses nothing because of that.
#[tokio::test]
#[ignore = "needs the server that BATON_TEST_POSTGRES names"]
async fn nothing_is_refused_because_of_a_row_that_was_at_hand() {
    let (one, other) = two().await;
    let new = NewTask { request_id: Some("once".into()), ..new_task() };
    let id = one.submit(new.clone()).await.task.id;
    let task = other.start(id).await.unwrap();
    // Here it waits, as far as was seen last.
    let resumed = one.ledger.resume(vec![claim(&task)]).await.unwrap();
    assert_eq!(resumed.len(), 1);
    let lost = one.ledger.apply(id, lose(&task)).await.unwrap();
    assert_eq!(lost.state, State::Queued);
    // There it runs.
    let again = other.start(id).await.unwrap();
    assert_eq!(again.attempt, 2);
    assert_eq!(one.submit(new).await.task.state, State::Running);
}

/// Positions are given before commits: what commits late has a lower one.
#[tokio::test]
#[ignore = "needs the server that BATON_TEST_POSTGRES names"]
async fn a_watcher_sees_what_commits_behind_a_higher_position_once() {
    let (one, other) = two().await;
    let ids = [one.submit(new_task()).await.task.id, other.submit(new_task()).await.task.id];
    let (db, namespace) = (&one.parts.db, Namespace::from("default"));
    let event = |task, sequence| events::NewEvent {
        task,
        namespace: namespace.clone(),
        sequence,
        kind: "stage",
        time: one.parts.clock.now(),
        frame: vec![sequence as u8].into(),
    };
    let read = |place: events::Place, limit| {
        let (db, namespace) = (db.clone(), namespace.clone());
        async move {
            let filter = events::Filter { labels: "{}".into(), ..Default::default() };
            let read = db.read(move |tx| {
                Box::pin(async move { events::after(tx, &namespace, place, &filter, limit).await })
            });
            let (page, place) = read.await.unwrap();
            let found: Vec<_> = page.iter().map(|event| (event.task, event.sequence)).collect();
            (found, place)
        }
    };
    let place = db.read(|tx| Box::pin(events::end(tx))).await.unwrap();
    let mut late = db.begin().await.unwrap();
    let mut script = db.script();
    events::append(&mut script, &[event(ids[0], 10), event(ids[0], 11)]).unwrap();
    script.run(late.tx()).await.unwrap();
    let mut early = db.begin().await.unwrap();
    let mut script = db.script();
    events::append(&mut script, &[event(ids[1], 20), event(ids[1], 21)]).unwrap();
    script.run(early.tx()).await.unwrap();
    early.commit().await.unwrap();
    // Page by page, with a commit in between.
    let (found, place) = read(place, 1).await;
    assert_eq!(found, [(ids[1], 20)]);
    late.commit().await.unwrap();
    let (found, place) = read(place, 1).await;
    assert_eq!(found, [(ids[1], 21)]);
    let (found, place) = read(place, 1).await;
    assert_eq!(found, []);
    let (found, place) = read(place, 9).await;
    assert_eq!(found, [(ids[0], 10), (ids[0], 11)]);
    assert_eq!(read(place, 9).await.0, []);
}

/// P8: a watcher of one server sees what both commit, at the same time, each once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs the server that BATON_TEST_POSTGRES names"]
async fn a_watcher_misses_nothing_of_what_two_servers_commit_at_once() {
    const TASKS: usize = 300;
    let (one, other) = two().await;
    let filter = events::Filter { labels: "{}".into(), ..Default::default() };
    let namespace = Namespace::from("default");
    let watched = watch::follow(&one.parts, namespace, filter).await.unwrap();
    let submit = |bench: &Bench| {
        let ledger = bench.ledger.clone();
        async move {
            let mut ids = Vec::new();
            for _ in 0..TASKS {
                let submitted = ledger.submit(vec![new_task()]).await.pop().unwrap();
                ids.push(submitted.unwrap().task.id);
            }
            ids
        }
    };
    let both = async { tokio::join!(submit(&one), submit(&other)) };
    let seen = async {
        let mut watched = std::pin::pin!(watched);
        let mut seen = Vec::new();
        while seen.len() < 2 * TASKS {
            let frame = watched.next().await.unwrap().unwrap();
            seen.push(frame.event().unwrap().task_id);
            // The other has no way to ring: time goes by.
            one.parts.clock.advance(Duration::from_millis(100));
        }
        seen
    };
    let ticking = async {
        loop {
            one.parts.clock.advance(Duration::from_millis(100));
            tokio::task::yield_now().await;
        }
    };
    let work = async { tokio::join!(both, seen) };
    let ((mine, theirs), seen) = tokio::select! {
        done = work => done,
        () = ticking => unreachable!(),
    };
    let wanted: HashSet<_> = mine.into_iter().chain(theirs).map(|id| id.to_string()).collect();
    assert_eq!(seen.iter().cloned().collect::<HashSet<_>>(), wanted);
    assert_eq!(seen.len(), wanted.len());
}
