//! Instances over a real database, on either engine.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::{Heartbeat, Lock, Phase, Standing};
use crate::{
    clock::Clock,
    db::{self, Db, Sql},
    error::Reason,
    id::{Entropy, InstanceId},
};

const TTL: Duration = Duration::from_secs(15);

fn instance(db: &Db, clock: &Clock) -> Heartbeat {
    let id = InstanceId::new(clock.now(), &Entropy::system());
    Heartbeat {
        db: db.clone(),
        clock: clock.clone(),
        standing: Standing::among(id, TTL, clock.clone()),
        address: "127.0.0.1:7070".into(),
        leaving: CancellationToken::new(),
    }
}

async fn two() -> (tempfile::TempDir, Db, Clock, Heartbeat, Heartbeat) {
    let dir = tempfile::tempdir().unwrap();
    let db = db::testing::open(dir.path()).await;
    let clock = Clock::manual();
    let (one, other) = (instance(&db, &clock), instance(&db, &clock));
    one.run_once().await.unwrap();
    other.run_once().await.unwrap();
    assert_eq!((one.standing.n_others(), other.standing.n_others()), (0, 1));
    (dir, db, clock, one, other)
}

/// Lets the locks lapse by the database's clock.
async fn lapse(db: &Db) {
    const SQL: Sql = Sql::new("UPDATE locks SET until = 0");
    db.write(|tx| Box::pin(async move { tx.query(SQL).run().await.map(drop) })).await.unwrap();
}

#[tokio::test]
async fn one_instance_has_a_lock_and_another_takes_it_when_it_lapses() {
    let (_dir, db, clock, one, other) = two().await;
    assert!(Lock::ALL.iter().all(|lock| one.standing.duty(*lock).mandate().is_some()));
    assert!(Lock::ALL.iter().all(|lock| other.standing.duty(*lock).mandate().is_none()));
    // It is lost by the holder's own clock before it is by the database's.
    clock.advance(TTL * 3 / 5);
    assert!(one.standing.duty(Lock::Orphans).mandate().is_none());
    lapse(&db).await;
    other.run_once().await.unwrap();
    assert!(other.standing.duty(Lock::Orphans).mandate().is_some());
    one.run_once().await.unwrap();
    assert!(one.standing.duty(Lock::Orphans).mandate().is_none());
}

#[tokio::test]
async fn nothing_is_written_in_the_name_of_a_lock_that_another_instance_has() {
    let (_dir, db, _clock, one, other) = two().await;
    let old = one.standing.duty(Lock::Housekeeping).mandate().unwrap();
    let held = old.clone();
    db.write(move |tx| Box::pin(async move { held.check(tx).await })).await.unwrap();
    lapse(&db).await;
    // Taken again by the same instance it is the same lock.
    one.run_once().await.unwrap();
    let held = old.clone();
    db.write(move |tx| Box::pin(async move { held.check(tx).await })).await.unwrap();
    lapse(&db).await;
    other.run_once().await.unwrap();
    lapse(&db).await;
    one.run_once().await.unwrap();
    // It went and came back: what was decided before counts no more.
    let refused = db.write(move |tx| Box::pin(async move { old.check(tx).await })).await;
    assert_eq!(refused.unwrap_err().reason(), Reason::Conflict);
    let new = one.standing.duty(Lock::Housekeeping).mandate().unwrap();
    db.write(move |tx| Box::pin(async move { new.check(tx).await })).await.unwrap();
}

#[tokio::test]
async fn an_instance_that_leaves_gives_its_locks_away_at_once() {
    let (_dir, _db, _clock, one, other) = two().await;
    one.leaving.cancel();
    one.run_once().await.unwrap();
    assert!(one.standing.duty(Lock::Artifacts).mandate().is_none());
    other.run_once().await.unwrap();
    assert!(other.standing.duty(Lock::Artifacts).mandate().is_some());
    assert_eq!(one.standing.phase(), Phase::Good, "it holds its runners until they have gone");
}

#[tokio::test]
async fn an_instance_that_is_not_heard_lets_go_before_others_take() {
    let (_dir, db, clock, one, _other) = two().await;
    let standing = &one.standing;
    assert_eq!((standing.phase(), standing.good_for()), (Phase::Good, Duration::ZERO));
    clock.advance(Duration::from_millis(7_499));
    assert_eq!(standing.phase(), Phase::Good);
    clock.advance(Duration::from_millis(1));
    assert_eq!((standing.phase(), standing.good_for()), (Phase::Cut, Duration::ZERO));
    clock.advance(TTL / 2);
    assert_eq!(standing.phase(), Phase::Over);
    assert!(standing.dead_after() > TTL);
    one.run_once().await.unwrap();
    clock.advance(Duration::from_secs(1));
    // What was before the break does not count.
    assert_eq!((standing.phase(), standing.good_for()), (Phase::Good, Duration::from_secs(1)));
    drop(db);
}

#[tokio::test]
async fn a_server_alone_is_always_good_and_has_every_lock() {
    let clock = Clock::manual();
    let alone = Standing::alone(clock.clone());
    clock.advance(Duration::from_hours(1));
    assert_eq!((alone.phase(), alone.id()), (Phase::Good, None));
    assert!(alone.duty(Lock::Housekeeping).mandate().is_some());
}

/// A transaction that holds a lock's row, of whoever has it, delays no heartbeat of others.
#[tokio::test]
async fn a_heartbeat_waits_for_no_lock_that_another_instance_has() {
    let (_dir, db, _clock, one, other) = two().await;
    if !db.is_shared() {
        return; // One writer at a time: whoever writes waits.
    }
    let mandate = one.standing.duty(Lock::Limits).mandate().unwrap();
    let (held, holding) = tokio::sync::oneshot::channel();
    let (release, released) = tokio::sync::oneshot::channel::<()>();
    let hold = db.write(move |tx| {
        Box::pin(async move {
            mandate.check(tx).await?;
            let _ = held.send(());
            let _ = released.await;
            Ok(())
        })
    });
    let beat = async {
        holding.await.unwrap();
        other.run_once().await.unwrap();
        release.send(()).unwrap();
    };
    let (held, ()) = tokio::join!(hold, beat);
    held.unwrap();
    assert_eq!(other.standing.phase(), Phase::Good);
    assert!(other.standing.duty(Lock::Limits).mandate().is_none());
}

/// However long its locks take.
#[tokio::test]
async fn a_heartbeat_goes_out_an_interval_after_the_last() {
    let (_dir, db, clock, one, _other) = two().await;
    if !db.is_shared() {
        return; // What it does between two of them does not wait for others.
    }
    let (release, _) = tokio::sync::broadcast::channel::<()>(1);
    let (begun, mut begins) = tokio::sync::mpsc::channel(64);
    let mut reads = tokio::task::JoinSet::new();
    for _ in 0..64 {
        let (db, begun, mut released) = (db.clone(), begun.clone(), release.subscribe());
        reads.spawn(async move {
            let read = db.read(move |_| {
                Box::pin(async move {
                    let _ = begun.send(()).await;
                    let _ = released.recv().await;
                    Ok(())
                })
            });
            read.await
        });
    }
    begins.recv().await.unwrap();
    clock.advance(Duration::from_millis(1));
    let (standing, stop) = (one.standing.clone(), CancellationToken::new());
    reads.spawn({
        let stop = stop.clone();
        async move {
            one.run(stop).await.unwrap();
            Ok(())
        }
    });
    for _ in 0..3 {
        let mut look = tokio::time::interval(Duration::from_millis(5));
        let heard = async {
            while !standing.silent().is_zero() {
                look.tick().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), heard).await.expect("a heartbeat");
        // Now it asks who has the locks, and no reader answers.
        clock.advance(standing.interval());
    }
    release.send(()).unwrap();
    stop.cancel();
    for done in reads.join_all().await {
        done.unwrap();
    }
}

/// However much there is to write.
#[tokio::test]
async fn a_heartbeat_waits_for_no_other_write() {
    let (_dir, db, _clock, one, _other) = two().await;
    if !db.is_shared() {
        return; // One writer at a time: whoever writes waits.
    }
    let (release, _) = tokio::sync::broadcast::channel::<()>(1);
    let (begun, mut begins) = tokio::sync::mpsc::channel(16);
    let mut writes = tokio::task::JoinSet::new();
    for _ in 0..16 {
        let (db, begun, mut released) = (db.clone(), begun.clone(), release.subscribe());
        writes.spawn(async move {
            let write = db.write(move |_| {
                Box::pin(async move {
                    let _ = begun.send(()).await;
                    let _ = released.recv().await;
                    Ok(())
                })
            });
            write.await
        });
    }
    begins.recv().await.unwrap();
    let beat = tokio::time::timeout(Duration::from_secs(10), one.run_once());
    beat.await.expect("not behind the others").unwrap();
    assert_eq!(one.standing.phase(), Phase::Good);
    release.send(()).unwrap();
    for written in writes.join_all().await {
        written.unwrap();
    }
}
