//! Two servers on one database: they need the server that `BATON_TEST_POSTGRES` names.

use std::time::Duration;

use super::{
    HOUR, rows,
    world::{World, attempt, caller, noise, reason, spec},
};
use crate::{
    artifacts::{
        model::{Artifact, Spec},
        store::{self, Lease, stored},
    },
    db::{Engine, Sql},
    error::Reason,
    id::{Entropy, TaskId},
};

async fn world() -> World {
    let world = World::files().await;
    assert_eq!(world.db.engine(), Engine::Postgres, "BATON_TEST_POSTGRES names no server");
    world
}

/// Whether a transaction that does not wait may write the row.
async fn is_free(world: &World, sql: Sql, artifact: &Artifact, task: TaskId) -> bool {
    let mut write = world.db.begin().await.unwrap();
    let found = write.tx().query(sql).bind(artifact.id).bind(task).first::<(String,)>().await;
    let free = found.is_ok();
    drop(write);
    free
}

/// Waits until somebody waits for a row.
async fn until_somebody_waits(world: &World) {
    const WAITING: Sql = Sql::new(
        "SELECT COUNT(*) FROM pg_locks WHERE NOT granted AND pid IN
         (SELECT pid FROM pg_stat_activity WHERE datname = current_database())",
    );
    for _ in 0..10_000 {
        let waiting = world.db.read(|tx| Box::pin(async move { tx.query(WAITING).one().await }));
        let (n,): (i64,) = waiting.await.unwrap();
        if n > 0 {
            return;
        }
        tokio::task::yield_now().await;
    }
    panic!("nobody waits");
}

#[tokio::test]
#[ignore = "needs the server that BATON_TEST_POSTGRES names"]
async fn what_a_write_depends_on_stays_until_it_ends() {
    const ROWS: [Sql; 3] = [
        Sql::new(
            "SELECT namespace FROM artifacts WHERE id = $1 AND $2::uuid IS NOT NULL
             FOR NO KEY UPDATE NOWAIT",
        ),
        Sql::new(
            "SELECT namespace FROM tasks WHERE $1::uuid IS NOT NULL AND id = $2
             FOR NO KEY UPDATE NOWAIT",
        ),
        Sql::new(
            "SELECT namespace FROM artifact_usage
             WHERE $1::uuid IS NOT NULL AND $2::uuid IS NOT NULL AND namespace = 'a'
             FOR NO KEY UPDATE NOWAIT",
        ),
    ];
    let world = world().await;
    let artifact = world.put("a", &noise(10, 1)).await;
    let task = world.run_task(1, "RUNNING").await;
    let (namespace, now) = ("a".into(), world.clock.now());
    for row in ROWS {
        assert!(is_free(&world, row, &artifact, task).await, "{row:?}");
    }
    let mut write = world.db.begin().await.unwrap();
    assert!(store::runs(write.tx(), &namespace, (task, 1), Lease::Held).await.unwrap());
    assert_eq!(store::hold_usage(write.tx(), &namespace).await.unwrap(), 10);
    store::refer(write.tx(), &namespace, artifact.id, task, now).await.unwrap();
    for row in ROWS {
        assert!(!is_free(&world, row, &artifact, task).await, "{row:?}");
    }
    write.commit().await.unwrap();
    for row in ROWS {
        assert!(is_free(&world, row, &artifact, task).await, "{row:?}");
    }
}

/// P14.
#[tokio::test]
#[ignore = "needs the server that BATON_TEST_POSTGRES names"]
async fn what_a_task_is_about_to_read_is_not_deleted() {
    let world = world().await;
    let short = Spec { ttl: Some(HOUR / 2), ..spec("a") };
    let bytes = noise(10, 1);
    let artifact = world.artifacts.put(&caller("a"), short, bytes.clone()).await.unwrap();
    let task = TaskId::new(world.clock.now(), &Entropy::seeded(1));
    let mut write = world.db.begin().await.unwrap();
    let now = world.clock.now();
    store::refer(write.tx(), &"a".into(), artifact.id, task, now).await.unwrap();
    world.clock.advance(HOUR / 2);
    assert_eq!(world.artifacts.collect().await.unwrap().artifacts, 0);
    let namespace = "a".into();
    let delete = world.artifacts.delete(&namespace, artifact.id);
    let commit = async {
        until_somebody_waits(&world).await;
        write.commit().await.unwrap();
    };
    let (deleted, ()) = tokio::join!(delete, commit);
    assert_eq!(reason(deleted), Reason::StateConflict);
    assert_eq!(world.artifacts.collect().await.unwrap().artifacts, 0);
    assert_eq!(world.bytes(&artifact).await.unwrap(), bytes);
}

/// P14.
#[tokio::test]
#[ignore = "needs the server that BATON_TEST_POSTGRES names"]
async fn bytes_that_somebody_comes_to_refer_to_are_not_condemned() {
    let world = world().await;
    let artifact = world.put("a", &noise(10, 1)).await;
    world.artifacts.delete(&"a".into(), artifact.id).await.unwrap();
    world.clock.advance(HOUR);
    let now = world.clock.now();
    let mut write = world.db.begin().await.unwrap();
    assert!(stored::confirm(write.tx(), &artifact.key, artifact.size, now).await.unwrap());
    let size = artifact.size;
    let condemn = world.db.write(move |tx| {
        Box::pin(async move { stored::condemn(tx, now - Duration::from_mins(30), 10, now).await })
    });
    let commit = async {
        until_somebody_waits(&world).await;
        write.commit().await.unwrap();
    };
    let (condemned, ()) = tokio::join!(condemn, commit);
    assert_eq!(condemned.unwrap(), 0);
    // And who comes too late is told.
    let condemn =
        world.db.write(move |tx| Box::pin(async move { stored::condemn(tx, now, 10, now).await }));
    assert_eq!(condemn.await.unwrap(), 1);
    let key = artifact.key.clone();
    let confirm = world
        .db
        .write(move |tx| Box::pin(async move { stored::confirm(tx, &key, size, now).await }));
    assert!(!confirm.await.unwrap());
}

/// P5.
#[tokio::test]
#[ignore = "needs the server that BATON_TEST_POSTGRES names"]
async fn an_attempt_that_ends_meanwhile_makes_nothing() {
    let world = world().await;
    for round in 0..20 {
        let task = TaskId::new(world.clock.now(), &Entropy::seeded(round));
        let insert = world.db.write(move |tx| {
            Box::pin(async move { rows::insert_task(tx, task, 1, "RUNNING").await })
        });
        insert.await.unwrap();
        // The name of what was there when the attempt had ended is all that is ever there.
        let me = attempt(task, 1);
        let put = world.artifacts.put(&me, spec("a"), noise(10, round));
        let end = async {
            let end =
                world.db.write(move |tx| Box::pin(async move { rows::end_task(tx, task).await }));
            end.await.unwrap();
            let filter = store::Filter { task: Some(task), ..Default::default() };
            world.artifacts.list(&"a".into(), filter, None, 10).await.unwrap().len()
        };
        let (put, seen) = tokio::join!(put, end);
        assert_eq!(usize::from(put.is_ok()), seen, "round {round}");
    }
}
