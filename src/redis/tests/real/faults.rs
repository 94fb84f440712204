//! Claims about Redis that is killed, emptied, stopped, or forgets: no id is lost once whoever
//! keeps the truth compares, and it learns that it must.

use std::{collections::BTreeSet, time::Duration};

use super::{Server, assert_empty, drain, ids, item, items, lane, pull};
use crate::redis::{
    Bell, Health, Item, Work,
    testing::{BOUND, eventually},
};

/// What whoever keeps the truth does: asks for what it knows to wait, and adds what is missing.
async fn reconcile(work: &Work, truth: &[Item]) -> u64 {
    let ids: Vec<_> = truth.iter().map(|item| item.id.as_str()).collect();
    let known = work.known(&ids).await.unwrap();
    let absent = truth.iter().zip(known).filter(|(_, known)| known.is_none());
    let absent: Vec<_> = absent.map(|(item, _)| item.clone()).collect();
    work.add(&absent).await.unwrap()
}

fn all(items: &[Item]) -> BTreeSet<String> {
    items.iter().map(|item| item.id.clone()).collect()
}

#[tokio::test]
async fn emptied_redis_is_noticed_without_any_traffic_and_filled_again() {
    let server = Server::start();
    let (redis, _supervisor) = server.connect().await;
    let (work, a) = (redis.work(), redis.work().consumer("a"));
    let truth = items(300);
    work.add(&truth).await.unwrap();
    let held = pull(&a, 10).await;
    let mut losses = redis.losses();

    assert_eq!(server.command("FLUSHALL"), "+OK");
    let bound = Duration::from_secs(10);
    tokio::time::timeout(bound, losses.changed()).await.expect("in time").unwrap();
    assert_eq!(reconcile(&work, &truth).await, 300);
    // Acknowledged is the old entry; the new one comes once more, which is harmless.
    a.ack(&held).await.unwrap();
    assert_eq!(drain(&a, &[lane(2)]).await, all(&truth));
    assert_empty(&work).await;
}

#[tokio::test]
async fn the_pull_after_a_loss_tells_of_it_at_once_and_only_once() {
    let server = Server::start();
    let (redis, _supervisor) = server.connect().await;
    let (work, a) = (redis.work(), redis.work().consumer("a"));
    work.add(&items(3)).await.unwrap();
    let mut losses = redis.losses();
    server.command("FLUSHALL");
    assert_eq!(pull(&a, 10).await, []);
    assert!(losses.has_changed().unwrap(), "known with the answer");
    losses.mark_unchanged();

    eventually("the new data have a name", || async { server.command("EXISTS baton:era") == ":1" })
        .await;
    assert_eq!(reconcile(&work, &items(3)).await, 3);
    assert_eq!(pull(&a, 10).await.len(), 3);
    redis.look().await.unwrap();
    assert!(!losses.has_changed().unwrap(), "told twice");
}

#[tokio::test]
async fn a_lost_group_begins_anew_and_delivers_everything_that_is_unfinished() {
    let server = Server::start();
    let (redis, _supervisor) = server.connect().await;
    let work = redis.work();
    let (a, b) = (work.consumer("a"), work.consumer("b"));
    work.add(&items(4)).await.unwrap();
    let held = pull(&a, 2).await;
    assert_eq!(server.command(&format!("XGROUP DESTROY baton:q:{} baton", lane(2))), ":1");

    let got = pull(&b, 10).await;
    assert_eq!(ids(&got), ["id0000", "id0001", "id0002", "id0003"]);
    a.ack(&held).await.unwrap();
    b.ack(&got).await.unwrap();
    assert_empty(&work).await;
}

#[tokio::test]
async fn a_killed_server_loses_nothing_that_is_added_again() {
    let mut server = Server::start();
    let (redis, _supervisor) = server.connect().await;
    let (work, a) = (redis.work(), redis.work().consumer("a"));
    let bells = redis.bells().await.unwrap();
    let mut bell = bells.listen("cancels").await.unwrap();
    let truth = items(50);
    work.add(&truth).await.unwrap();
    pull(&a, 20).await;
    let mut losses = redis.losses();
    server.kill();
    assert!(work.add(&truth).await.is_err());
    assert!(a.pull(&[lane(2)], 1).await.is_err());
    server.restart();

    tokio::time::timeout(BOUND, losses.changed()).await.unwrap().unwrap();
    reconcile(&work, &truth).await;
    assert_eq!(drain(&a, &[lane(2)]).await, all(&truth));
    assert_empty(&work).await;
    // Whoever listens is told that some may be missed, and hears from then on.
    assert_eq!(tokio::time::timeout(BOUND, bell.next()).await.unwrap(), Some(Bell::Missed));
    assert_eq!(redis.ring("cancels", "x".into()).await.unwrap(), 1);
    let rang = tokio::time::timeout(BOUND, async {
        loop {
            match bell.next().await {
                Some(Bell::Missed) => {}
                other => return other,
            }
        }
    });
    assert_eq!(rang.await.unwrap(), Some(Bell::Rang("x".into())));
}

#[tokio::test]
async fn a_server_that_stands_still_fails_calls_and_keeps_what_it_had() {
    let server = Server::start();
    let (redis, _supervisor) = server.connect().await;
    let (work, a) = (redis.work(), redis.work().consumer("a"));
    let truth = items(20);
    work.add(&truth[..10]).await.unwrap();
    let losses = redis.losses();

    server.pause();
    // Sent and not answered: they may have been carried out by the time it goes on.
    assert!(work.add(&truth).await.is_err());
    assert!(a.pull(&[lane(2)], 5).await.is_err());
    let mut health = redis.health();
    tokio::time::timeout(BOUND, health.wait_for(|health| !health.is_up())).await.unwrap().unwrap();
    server.resume();
    tokio::time::timeout(BOUND, health.wait_for(Health::is_up)).await.unwrap().unwrap();

    reconcile(&work, &truth).await;
    // Without the claim that others would make after a while: what the lost answer said comes at
    // the next pull.
    let mut seen = BTreeSet::new();
    while seen.len() < truth.len() {
        let got = pull(&a, 100).await;
        assert!(!got.is_empty(), "{} of {} came", seen.len(), truth.len());
        seen.extend(got.into_iter().map(|delivery| delivery.id));
    }
    assert!(!losses.has_changed().unwrap(), "nothing was lost");
}

#[tokio::test]
async fn what_was_delivered_in_an_answer_that_nobody_awaited_comes_with_the_next_pull() {
    let server = Server::start();
    let (redis, _supervisor) = server.connect().await;
    let (work, a) = (redis.work(), redis.work().consumer("a"));
    // From here on the server has the script, so that one message is enough.
    assert_eq!(pull(&a, 1).await, []);
    work.add(&items(10)).await.unwrap();

    server.pause();
    let lanes = [lane(2)];
    assert!(tokio::time::timeout(Duration::from_millis(50), a.pull(&lanes, 5)).await.is_err());
    server.resume();
    eventually("the pull was carried out", || async {
        work.stats(&lanes).await.unwrap()[0].delivered == 5
    })
    .await;
    assert_eq!(pull(&a, 100).await.len(), 10);
}

#[tokio::test]
async fn a_connection_that_is_killed_under_everything_is_made_again() {
    let server = Server::start();
    let (redis, _supervisor) = server.connect().await;
    let (work, a) = (redis.work(), redis.work().consumer("a"));
    let bells = redis.bells().await.unwrap();
    let mut bell = bells.listen("c").await.unwrap();
    let truth = items(100);
    for (round, part) in truth.chunks(20).enumerate() {
        let kind = if round % 2 == 0 { "normal" } else { "pubsub" };
        server.command(&format!("CLIENT KILL TYPE {kind}"));
        // An error is allowed, since it may have been carried out; another try adds nothing twice.
        eventually("added", || async { work.add(part).await.is_ok() }).await;
    }
    eventually("heard again", || async { redis.ring("c", "x".into()).await.is_ok_and(|n| n == 1) })
        .await;
    let heard = tokio::time::timeout(BOUND, async {
        while bell.next().await != Some(Bell::Rang("x".into())) {}
    });
    heard.await.expect("the bell after the last subscription");
    assert_eq!(drain(&a, &[lane(2)]).await, all(&truth));
    assert_empty(&work).await;
}

#[tokio::test]
async fn scripts_that_the_server_forgot_are_sent_again() {
    let server = Server::start();
    let (redis, _supervisor) = server.connect().await;
    let work = redis.work();
    work.add(&[item("x", 1)]).await.unwrap();
    server.command("SCRIPT FLUSH");
    work.add(&[item("y", 1)]).await.unwrap();
    assert_eq!(work.known(&["x", "y"]).await.unwrap(), [Some(1), Some(1)]);
}
