//! Claims about what is delivered, to whom, in which order, and how often.

use std::time::Duration;

use bytes::Bytes;

use super::{Server, assert_empty, drain, ids, item, item_in, items, lane, pull};
use crate::redis::{Bell, Listener, testing::BOUND};

#[tokio::test]
async fn what_was_added_is_delivered_as_it_was_in_order_and_gone_once_acknowledged() {
    let server = Server::start();
    let (redis, _supervisor) = server.connect().await;
    let (work, a) = (redis.work(), redis.work().consumer("a"));
    // More than one run of a script takes.
    assert_eq!(work.add(&items(600)).await.unwrap(), 600);

    let first = pull(&a, 2).await;
    assert_eq!(ids(&first), ["id0000", "id0001"]);
    assert_eq!((first[0].attempt, &first[0].data), (1, &item("", 1).data));
    let rest = pull(&a, 1000).await;
    assert_eq!((rest.len(), rest[597].id.as_str(), a.n_held()), (598, "id0599", 600));
    assert_eq!(pull(&a, 10).await, []);
    assert_eq!(work.depths().await.unwrap()["team/model"], 600);

    a.ack(&first).await.unwrap();
    a.ack(&rest).await.unwrap();
    // Twice does no harm.
    a.ack(&first).await.unwrap();
    assert_empty(&work).await;
}

#[tokio::test]
async fn two_consumers_share_a_lane_and_none_gets_more_than_it_asked_for_over_all_lanes() {
    let server = Server::start();
    let (redis, _supervisor) = server.connect().await;
    let work = redis.work();
    let (a, b) = (work.consumer("a"), work.consumer("b"));
    let urgent = [item_in(&lane(0), "u1", 1), item_in(&lane(0), "u2", 1)];
    work.add(&items(4)).await.unwrap();
    work.add(&urgent).await.unwrap();

    let lanes = [lane(0), lane(1), lane(2)];
    let got = a.pull(&lanes, 3).await.unwrap();
    assert_eq!(ids(&got), ["u1", "u2", "id0000"], "the first lane first");
    let other = b.pull(&lanes, 10).await.unwrap();
    assert_eq!(ids(&other), ["id0001", "id0002", "id0003"]);
    a.ack(&got).await.unwrap();
    b.ack(&other).await.unwrap();
    assert_empty(&work).await;
}

#[tokio::test]
async fn an_id_is_known_once_and_a_later_attempt_replaces_an_earlier_one() {
    let server = Server::start();
    let (redis, _supervisor) = server.connect().await;
    let (work, a) = (redis.work(), redis.work().consumer("a"));
    assert_eq!(work.add(&[item("x", 2), item("x", 2)]).await.unwrap(), 1);
    assert_eq!(work.add(&[item("x", 2)]).await.unwrap(), 0, "replayed");
    assert_eq!(work.add(&[item("x", 1)]).await.unwrap(), 0, "late");
    assert_eq!(work.known(&["x", "y"]).await.unwrap(), [Some(2), None]);

    let held = pull(&a, 10).await;
    assert_eq!(held.len(), 1);
    assert_eq!(work.add(&[item("x", 2)]).await.unwrap(), 0, "delivered is known, too");
    assert_eq!(work.add(&[item("x", 3)]).await.unwrap(), 1);
    assert_eq!(work.depths().await.unwrap()["team/model"], 1);

    // The acknowledgement of the earlier one leaves the later one alone.
    a.ack(&held).await.unwrap();
    assert_eq!(work.known(&["x"]).await.unwrap(), [Some(3)]);
    let later = pull(&a, 10).await;
    assert_eq!(later[0].attempt, 3);
    a.ack(&later).await.unwrap();
    assert_empty(&work).await;
}

#[tokio::test]
async fn what_is_given_back_keeps_its_place_and_goes_to_whoever_pulls_next() {
    let server = Server::start();
    let (redis, _supervisor) = server.connect().await;
    let work = redis.work();
    let (a, b) = (work.consumer("a"), work.consumer("b"));
    work.add(&items(4)).await.unwrap();
    let held = pull(&a, 2).await;
    assert_eq!(a.give_back(&held).await.unwrap(), 2);
    assert_eq!(a.n_held(), 0);

    let got = pull(&b, 3).await;
    assert_eq!(ids(&got), ["id0000", "id0001", "id0002"]);
    // What is another's cannot be given away.
    assert_eq!(a.give_back(&held).await.unwrap(), 0);
    let rest = pull(&a, 5).await;
    assert_eq!(ids(&rest), ["id0003"]);
    b.ack(&got).await.unwrap();
    a.ack(&rest).await.unwrap();
    assert_empty(&work).await;
}

#[tokio::test]
async fn what_a_silent_consumer_holds_is_taken_over_and_what_one_holds_oneself_is_not_new() {
    let server = Server::start();
    let (redis, _supervisor) = server.connect().await;
    let work = redis.work();
    let (a, b) = (work.consumer("a"), work.consumer("b"));
    work.add(&items(3)).await.unwrap();
    assert_eq!(pull(&a, 2).await.len(), 2);
    let own = pull(&b, 1).await;

    let idle = Duration::from_hours(1);
    assert_eq!(b.claim(&[lane(2)], idle, 10).await.unwrap(), [], "not silent for long");
    let got = b.claim(&[lane(2)], Duration::ZERO, 10).await.unwrap();
    assert_eq!(ids(&got), ["id0000", "id0001"]);
    b.ack(&got).await.unwrap();
    b.ack(&own).await.unwrap();
    assert_empty(&work).await;
}

#[tokio::test]
async fn an_entry_that_was_deleted_under_its_consumer_is_not_delivered_again() {
    let server = Server::start();
    let (redis, _supervisor) = server.connect().await;
    let work = redis.work();
    let (a, b) = (work.consumer("a"), work.consumer("b"));
    work.add(&items(2)).await.unwrap();
    let held = pull(&a, 2).await;
    let stream = format!("baton:q:{}", lane(2));
    assert_eq!(server.command(&format!("XDEL {stream} {}", held[0].entry)), ":1");

    assert_eq!(work.known(&["id0000", "id0001"]).await.unwrap(), [None, Some(1)]);
    let got = b.claim(&[lane(2)], Duration::ZERO, 10).await.unwrap();
    assert_eq!(ids(&got), ["id0001"]);
    // Whoever keeps the truth adds it again.
    assert_eq!(work.add(&items(2)).await.unwrap(), 1);
    b.ack(&got).await.unwrap();
    assert_eq!(drain(&b, &[lane(2)]).await, ["id0000".to_owned()].into());
    assert_empty(&work).await;
}

#[tokio::test]
async fn a_consumer_that_leaves_gives_back_everything_and_is_gone() {
    let server = Server::start();
    let (redis, _supervisor) = server.connect().await;
    let work = redis.work();
    let (a, b) = (work.consumer("a"), work.consumer("b"));
    work.add(&items(250)).await.unwrap();
    assert_eq!(pull(&a, 250).await.len(), 250);
    assert_eq!(a.leave(&[lane(2), lane(3)]).await.unwrap(), 250);

    let got = pull(&b, 300).await;
    assert_eq!((got.len(), got[0].id.as_str()), (250, "id0000"));
    b.ack(&got).await.unwrap();
    assert_empty(&work).await;
}

async fn next(bell: &mut Listener) -> Bell {
    tokio::time::timeout(BOUND, bell.next()).await.expect("a bell in time").expect("a connection")
}

#[tokio::test]
async fn the_bell_rings_with_the_lane_that_got_work() {
    let server = Server::start();
    let (redis, _supervisor) = server.connect().await;
    let work = redis.work();
    let bells = redis.bells().await.unwrap();
    let mut bell = work.bell(&bells).await.unwrap();
    let rang = Bell::Rang(Bytes::from(lane(2).as_str().to_owned()));

    work.add(&items(3)).await.unwrap();
    assert_eq!(next(&mut bell).await, rang.clone(), "added, once for all");
    work.add(&items(3)).await.unwrap();
    work.delay(&[(item("late", 1), Duration::ZERO)]).await.unwrap();
    work.move_due(10).await.unwrap();
    assert_eq!(next(&mut bell).await, rang.clone(), "due; not for what was there already");
    let a = work.consumer("a");
    let held = pull(&a, 1).await;
    a.give_back(&held).await.unwrap();
    assert_eq!(next(&mut bell).await, rang, "given back");
}
