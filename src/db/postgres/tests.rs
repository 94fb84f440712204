//! Connections, over a real server.

use super::*;
use crate::db::{Sql, testing};

const PID: Sql = Sql::new("SELECT pg_backend_pid()::bigint");

/// Callers that lose patience cost no connection each.
#[tokio::test]
async fn a_read_whose_caller_has_left_gives_its_connection_back() {
    let dir = tempfile::tempdir().unwrap();
    let db = testing::open(dir.path()).await;
    if !db.is_shared() {
        return;
    }
    let pid = || db.read(|tx| Box::pin(async move { tx.query(PID).one::<(i64,)>().await }));
    let first = pid().await.unwrap();
    let (begun, begins) = tokio::sync::oneshot::channel();
    let (release, released) = tokio::sync::oneshot::channel::<()>();
    let (done, ends) = tokio::sync::oneshot::channel();
    let read = db.read(move |tx| {
        Box::pin(async move {
            let _ = begun.send(());
            let _ = released.await;
            let _ = done.send(tx.query(PID).one::<(i64,)>().await.unwrap());
            Ok(())
        })
    });
    tokio::select! {
        _ = read => unreachable!("it waits"),
        begun = begins => begun.unwrap(),
    }
    release.send(()).expect("it goes on when its caller has left");
    assert_eq!(ends.await.unwrap(), first);
    assert_eq!(pid().await.unwrap(), first);
}

/// Nobody waits for it any more, but it had begun.
#[tokio::test]
async fn a_write_whose_caller_has_left_ends_before_the_database_is_closed() {
    let dir = tempfile::tempdir().unwrap();
    let db = testing::open(dir.path()).await;
    if !db.is_shared() {
        return;
    }
    let under_way = Arc::new(());
    let watched = Arc::downgrade(&under_way);
    let (begun, begins) = tokio::sync::oneshot::channel();
    let (release, released) = tokio::sync::oneshot::channel::<()>();
    let write = db.write(move |tx| {
        Box::pin(async move {
            let _ = begun.send(());
            let _ = released.await;
            tx.query(PID).one::<(i64,)>().await?;
            // It lives until the commit has been answered.
            Ok(under_way)
        })
    });
    tokio::select! {
        _ = write => unreachable!("it waits"),
        begun = begins => begun.unwrap(),
    }
    tokio::join!(db.close(), async { release.send(()).expect("it goes on") });
    assert_eq!(watched.strong_count(), 0, "cut off");
}

#[test]
fn a_place_shows_no_password() {
    assert_eq!(place("postgres://u:p%40w@h:5/d?password=x"), "postgres://u@h:5/d");
    assert_eq!(place("postgres:///d?host=/run"), "postgres:///d");
    assert_eq!(place("nonsense"), "a database");
}
