//! Claims about a Redis that loses what it held, or is away, and about servers that die.

use std::time::Duration;

use super::{
    assert_drained,
    site::{Member, Site, eventually, later, task, work_off},
};
use crate::tasks::{queued, state::Event};

/// What the sweeps promise.
const FOUND: Duration = Duration::from_secs(10);

#[tokio::test]
async fn what_redis_lost_is_found_again_within_ten_seconds() {
    let site = Site::new();
    let mut members: [Member; 2] = site.members().await;
    let mut ids = members[0].submit_many(40).await;
    ids.extend(members[1].submit_many(40).await);
    let work = members[0].backlog.0.work.clone();
    eventually("all are there", || async { work.depths().await.unwrap()["default/a/m"] == 80 })
        .await;
    site.redis.command("FLUSHALL");
    let lost = site.clock.mono();
    members[1].connect(8);
    work_off(&mut members, &ids).await;
    let took = site.clock.mono().since(lost);
    assert!(took < FOUND, "{took:?}");
    assert_drained(&members[0]).await;
}

#[tokio::test]
async fn without_redis_tasks_are_accepted_and_started_and_its_return_loses_none() {
    let mut site = Site::new();
    let mut members: [Member; 2] = site.members().await;
    let mut ids = members[0].submit_many(20).await;
    site.redis.kill();
    eventually("it is missed", || async { !members[0].backlog.is_up() }).await;
    ids.extend(members[0].submit_many(20).await);
    members[1].connect(4);
    let away = site.clock.mono();
    work_off(&mut members, &ids).await;
    let took = site.clock.mono().since(away);
    assert!(took < FOUND, "{took:?}");

    let ids = members[0].submit_many(20).await;
    site.redis.restart();
    work_off(&mut members, &ids).await;
    let ids = members[0].submit_many(20).await;
    work_off(&mut members, &ids).await;
    assert_drained(&members[0]).await;
}

#[tokio::test]
async fn what_can_start_is_found_among_rows_of_other_models_and_of_later() {
    let site = Site::new();
    let one = site.still().await;
    let before = site.clock.now();
    let mine = one.submit(task()).await;
    let mut other = task();
    other.spec.model = "b/m".into();
    let other = one.submit(other).await;
    one.submit(later(site.clock.now() + Duration::from_hours(1))).await;
    let read = async |since, models: Option<&[&str]>| {
        let models = models.map(|models| models.iter().map(ToString::to_string).collect());
        let read = one.world.parts.db.read(move |tx| {
            let models: Option<Vec<String>> = models.clone();
            Box::pin(
                async move { queued::startable_page(tx, None, since, models.as_deref(), 10).await },
            )
        });
        read.await.unwrap().into_iter().map(|entry| entry.id).collect::<Vec<_>>()
    };
    let now = site.clock.now();
    assert_eq!(read(now, Some(&["a/m", "c/m"])).await, [mine]);
    assert_eq!(read(now, None).await, [mine, other]);
    assert_eq!(read(now, Some(&[])).await, []);
    assert_eq!(read(before, None).await, [], "they are for who accepted them");
}

#[tokio::test]
async fn what_a_server_had_fetched_when_it_died_others_take_over() {
    let site = Site::new();
    let mut dying = site.still().await;
    let mut heir = site.member().await;
    let ids = heir.submit_many(3).await;
    eventually("they are there", || async {
        heir.backlog.0.work.depths().await.unwrap().get("default/a/m") == Some(&3)
    })
    .await;
    dying.connect(2);
    dying.backlog.look().await.unwrap();
    assert_eq!(dying.backlog.fetch().await.unwrap(), Some(2));
    drop(dying);
    heir.connect(1);
    let mut members = [heir];
    work_off(&mut members, &ids).await;
    assert_drained(&members[0]).await;
}

#[tokio::test]
async fn a_server_that_leaves_gives_back_what_it_fetched() {
    let mut site = Site::new();
    site.settings.ack_timeout = Duration::from_hours(1);
    let mut leaving = site.still().await;
    let heir = site.member().await;
    let ids = heir.submit_many(3).await;
    eventually("they are there", || async {
        heir.backlog.0.work.depths().await.unwrap().get("default/a/m") == Some(&3)
    })
    .await;
    leaving.connect(2);
    leaving.backlog.look().await.unwrap();
    assert_eq!(leaving.backlog.fetch().await.unwrap(), Some(2));
    let supervisor = leaving.world.supervisor.clone();
    supervisor
        .spawn_flushing_loop("backlog", leaving.backlog.clone().write(supervisor.last_call()));
    supervisor.shutdown(Duration::from_secs(5), &site.clock).await;
    let mut members = [heir];
    members[0].connect(1);
    work_off(&mut members, &ids).await;
    assert_drained(&members[0]).await;
}

#[tokio::test]
async fn what_does_not_wait_any_more_does_not_count_for_long() {
    let site = Site::new();
    let one = site.member().await;
    let ids = one.submit_many(3).await;
    let work = one.backlog.0.work.clone();
    eventually("they are there", || async {
        work.depths().await.unwrap().get("default/a/m") == Some(&3)
    })
    .await;
    // Ended behind the queue's back.
    let stranger = site.stranger().await;
    for id in ids {
        let cancel = Event::Cancel { reason: String::new(), by: "me".into() };
        stranger.ledger.apply(id, cancel).await.unwrap();
    }
    let mut suspects = std::collections::BTreeSet::new();
    one.backlog.drop_ghosts(&mut suspects).await.unwrap();
    assert_eq!(work.depths().await.unwrap()["default/a/m"], 3, "one look may be wrong");
    one.backlog.drop_ghosts(&mut suspects).await.unwrap();
    assert_drained(&one).await;
}
