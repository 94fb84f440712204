//! Claims about what waits for its time, what is promised, counted, buried and tidied.

use std::time::Duration;

use bytes::Bytes;

use super::{Server, assert_empty, drain, ids, item, item_in, items, lane, pull};
use crate::redis::{Lane, Promise, Room};

const LATER: Duration = Duration::from_hours(1);
const PROMISED: Room = Room::Promised { evicted: None };

#[tokio::test]
async fn a_delayed_item_waits_until_it_is_due_and_counts_all_the_while() {
    let server = Server::start();
    let (redis, _supervisor) = server.connect().await;
    let (work, a) = (redis.work(), redis.work().consumer("a"));
    let delayed = [(item("later", 1), LATER), (item("now", 1), Duration::ZERO)];
    assert_eq!(work.delay(&delayed).await.unwrap(), 2);
    assert_eq!(work.delay(&delayed).await.unwrap(), 0, "replayed");
    assert_eq!(pull(&a, 10).await, []);
    assert_eq!(work.depths().await.unwrap()["team/model"], 2);
    assert_eq!(work.known(&["later", "now"]).await.unwrap(), [Some(1), Some(1)]);

    let moved = work.move_due(10).await.unwrap();
    assert_eq!((moved.items, moved.lapsed), (1, 0));
    let next = moved.next.unwrap();
    assert!(next + Duration::from_mins(1) > LATER && next <= LATER, "{next:?}");
    let got = pull(&a, 10).await;
    assert_eq!((ids(&got), &got[0].data), (vec!["now"], &item("now", 1).data));
    a.ack(&got).await.unwrap();

    // Added after all, it does not wait any more; removed, it is gone.
    assert_eq!(work.add(&[item("later", 1)]).await.unwrap(), 1);
    assert_eq!(work.move_due(10).await.unwrap().next, None);
    let got = pull(&a, 10).await;
    assert_eq!(ids(&got), ["later"]);
    // A retry waits under a later attempt while the earlier one is delivered still.
    assert_eq!(work.delay(&[(item("later", 2), LATER)]).await.unwrap(), 1);
    a.ack(&got).await.unwrap();
    assert_eq!(work.known(&["later"]).await.unwrap(), [Some(2)]);
    assert_eq!(work.remove(&["later", "now"]).await.unwrap(), 1);
    assert_empty(&work).await;
}

#[tokio::test]
async fn promises_never_exceed_the_limit_and_are_kept_let_go_or_lapse() {
    let server = Server::start();
    let (redis, _supervisor) = server.connect().await;
    let work = redis.work();
    let place = lane(2);
    let promise = |id| Promise { lane: &place, id, limit: 2, group_limit: 3, evict: None };
    let asked = [promise("a"), promise("b"), promise("a"), promise("c")];
    let rooms = work.reserve(&asked, LATER).await.unwrap();
    assert_eq!(rooms, [PROMISED, PROMISED, PROMISED, Room::AccountFull(2)]);
    let elsewhere = Lane::new("team/other", "v1", 2).unwrap();
    let other = |id| Promise { lane: &elsewhere, id, limit: 2, group_limit: 3, evict: None };
    let rooms = work.reserve(&[other("o"), other("p")], Duration::ZERO).await.unwrap();
    assert_eq!(rooms, [PROMISED, Room::GroupFull(3)]);
    assert_eq!(work.known(&["a"]).await.unwrap(), [None], "a promise is no item");

    // Kept: the item takes the place that was promised.
    assert_eq!(work.add(&[item("a", 0)]).await.unwrap(), 1);
    assert_eq!(work.depths().await.unwrap()["team/model"], 2);
    // Let go: what was added meanwhile stays.
    assert_eq!(work.release(&["a", "b"]).await.unwrap(), 1);
    assert_eq!(work.reserve(&[promise("c")], LATER).await.unwrap(), [PROMISED]);
    // Lapsed.
    assert_eq!(work.move_due(10).await.unwrap().lapsed, 1);
    assert_eq!(work.depths().await.unwrap(), [("team/model".to_owned(), 2)].into());

    work.release(&["c"]).await.unwrap();
    drain(&work.consumer("a"), &[place]).await;
    assert_empty(&work).await;
}

#[tokio::test]
async fn the_oldest_of_the_lowest_band_makes_room_if_it_is_not_above() {
    let server = Server::start();
    let (redis, _supervisor) = server.connect().await;
    let (work, a) = (redis.work(), redis.work().consumer("a"));
    let elsewhere = Lane::new("team/other", "v1", 0).unwrap();
    work.add(&[item_in(&elsewhere, "other", 1)]).await.unwrap();
    let bands = [("started", 1), ("old", 1), ("young", 1), ("urgent", 3)];
    for (id, band) in bands {
        work.add(&[item_in(&lane(band), id, 1)]).await.unwrap();
    }
    let started = a.pull(&[lane(1)], 1).await.unwrap();
    assert_eq!(ids(&started), ["started"]);
    let ask = async |band: u8, id: &str, limit, group_limit, evict| {
        let promise = Promise { lane: &lane(band), id, limit, group_limit, evict };
        work.reserve(&[promise], LATER).await.unwrap().remove(0)
    };
    let evicted = |id: &str| Room::Promised { evicted: Some(id.into()) };
    assert_eq!(ask(0, "n0", 4, 9, Some(0)).await, Room::AccountFull(4), "none is lower");
    assert_eq!(ask(1, "n1", 4, 9, Some(1)).await, evicted("old"), "not the delivered one");
    assert_eq!(ask(1, "n1", 4, 9, Some(1)).await, PROMISED, "it has its room");
    assert_eq!(ask(3, "n2", 4, 9, Some(3)).await, evicted("young"));
    assert_eq!(ask(3, "n3", 9, 5, Some(3)).await, evicted("other"), "of the whole group");
    assert_eq!(ask(3, "n4", 4, 9, Some(2)).await, Room::AccountFull(5));
    assert_eq!(work.known(&["old", "young", "urgent"]).await.unwrap(), [None, None, Some(1)]);
    assert_eq!(work.depths().await.unwrap(), [("team/model".to_owned(), 5)].into());
}

#[tokio::test]
async fn lanes_say_what_they_are_and_are_counted() {
    let server = Server::start();
    let (redis, _supervisor) = server.connect().await;
    let (work, a) = (redis.work(), redis.work().consumer("a"));
    work.add(&items(5)).await.unwrap();
    work.add(&[item_in(&lane(0), "u", 1)]).await.unwrap();
    let mut lanes = work.lanes().await.unwrap();
    lanes.sort_by_key(|info| info.lane.clone());
    assert_eq!(lanes[0].lane, lane(0));
    assert_eq!((&lanes[1].lane, &lanes[1].info), (&lane(2), &Bytes::from_static(b"what it is")));

    let next = || async { work.stats(&[lane(2)]).await.unwrap().remove(0).next };
    let data = |attempt| Some(item("", attempt).data);
    work.add(&[item("last", 7)]).await.unwrap();
    let got = a.pull_each(&[(lane(2), 5), (lane(0), 0)], 9).await.unwrap();
    assert_eq!((got.len(), next().await), (5, data(7)));
    a.give_back(&got).await.unwrap();
    assert_eq!(next().await, data(1), "given back comes first");
    work.remove(&["last"]).await.unwrap();

    pull(&a, 2).await;
    let stats = work.stats(&[lane(2), lane(1), lane(0)]).await.unwrap();
    assert_eq!((stats[0].entries, stats[0].delivered), (5, 2));
    assert!(stats[0].oldest.is_some_and(|age| age < Duration::from_mins(1)));
    assert_eq!((stats[1].entries, stats[1].oldest), (0, None), "no such lane");
    let position = work.position("id0003", 100).await.unwrap().unwrap();
    assert_eq!((position.lane, position.before), (lane(2), 3));
    assert_eq!(work.position("id0003", 2).await.unwrap().unwrap().before, 2);
    assert_eq!(work.position("nobody", 2).await.unwrap(), None);
}

#[tokio::test]
async fn known_ids_are_listed_whole_in_parts() {
    let server = Server::start();
    let (redis, _supervisor) = server.connect().await;
    let work = redis.work();
    work.add(&items(1000)).await.unwrap();
    let (mut cursor, mut found, mut n_parts) = ("0".to_owned(), Vec::new(), 0);
    loop {
        let (next, ids) = work.ids(&cursor, 100).await.unwrap();
        found.extend(ids);
        n_parts += 1;
        if next == "0" {
            break;
        }
        cursor = next;
    }
    found.sort();
    found.dedup();
    assert!(found.len() == 1000 && n_parts > 3, "{} in {n_parts}", found.len());
}

#[tokio::test]
async fn the_dead_are_listed_for_a_time_and_wait_no_more() {
    let server = Server::start();
    let (redis, _supervisor) = server.connect().await;
    let work = redis.work();
    work.add(&items(2)).await.unwrap();
    let dead = [("id0000", Bytes::from_static(b"poison")), ("unknown", Bytes::new())];
    work.bury(&dead, LATER).await.unwrap();
    assert_eq!(server.command("XLEN baton:dead"), ":2");
    assert_eq!(drain(&work.consumer("a"), &[lane(2)]).await, ["id0001".to_owned()].into());
    assert_empty(&work).await;
}

#[tokio::test]
async fn tidying_ends_what_is_empty_and_unused_and_nothing_else() {
    let server = Server::start();
    let (redis, _supervisor) = server.connect().await;
    let work = redis.work();
    let (a, b) = (work.consumer("a"), work.consumer("b"));
    let held = item_in(&lane(0), "held", 1);
    let used = item_in(&lane(1), "used", 1);
    work.add(&[held, used, item("done", 1)]).await.unwrap();
    assert_eq!(a.pull(&[lane(0)], 1).await.unwrap().len(), 1);
    drain(&b, &[lane(2)]).await;

    assert_eq!(work.tidy(LATER, LATER).await.unwrap(), 0);
    assert_eq!(work.tidy(Duration::ZERO, Duration::ZERO).await.unwrap(), 1);
    let left: Vec<_> = work.lanes().await.unwrap().into_iter().map(|info| info.lane).collect();
    assert_eq!(left, [lane(0), lane(1)]);
    // The lane comes back with its first item.
    work.add(&[item("again", 1)]).await.unwrap();
    let everything = drain(&b, &[lane(0), lane(1), lane(2)]).await;
    assert_eq!(everything, ["again", "held", "used"].map(String::from).into());
    assert_empty(&work).await;
}

#[tokio::test]
async fn a_note_is_read_until_it_lapses_and_the_last_one_of_a_name_counts() {
    let server = Server::start();
    let (redis, _supervisor) = server.connect().await;
    redis.put_note("supply", "a", Bytes::from_static(b"1"), LATER).await.unwrap();
    redis.put_note("supply", "a", Bytes::from_static(&[0xff, 0]), LATER).await.unwrap();
    redis.put_note("supply", "b", Bytes::new(), Duration::ZERO).await.unwrap();
    redis.put_note("other", "c", Bytes::new(), LATER).await.unwrap();
    let notes = redis.notes("supply").await.unwrap();
    assert_eq!(notes, [("a".to_owned(), Bytes::from_static(&[0xff, 0]))].into());
    assert_eq!(redis.notes("empty").await.unwrap(), [].into());
}

#[tokio::test]
async fn depths_are_right_again_after_either_side_of_the_count_was_deleted() {
    let server = Server::start();
    let (redis, _supervisor) = server.connect().await;
    let work = redis.work();
    work.add(&items(300)).await.unwrap();
    assert!(!work.recount().await.unwrap());
    for key in ["depth", "known"] {
        assert_eq!(server.command(&format!("DEL baton:{key}")), ":1");
        work.add(&items(300)).await.unwrap();
        assert!(work.recount().await.unwrap(), "{key} was deleted");
        assert_eq!(work.depths().await.unwrap(), [("team/model".to_owned(), 300)].into());
    }
    // The entries of before are there still, and harmless.
    assert_eq!(drain(&work.consumer("a"), &[lane(2)]).await.len(), 300);
    assert_empty(&work).await;
}
