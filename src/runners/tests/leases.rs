//! Sessions, leases and what ends them.

use std::{sync::atomic::Ordering::Relaxed, time::Duration};

use super::world::*;
use crate::{
    error::Reason,
    id::Namespace,
    pb::connect_response::Body,
    queue::SupplyState,
    runners::{
        model::{Announcement, FromRunner, Said},
        session::{Attached, Link},
    },
    tasks::{model::State, state::Event},
};

const SECOND: Duration = Duration::from_secs(1);

#[tokio::test]
async fn a_runner_that_comes_back_in_time_keeps_its_attempts() {
    let world = World::new().await;
    let mut runner = Runner::connect(&world);
    let first = world.run(&runner).await;
    assert_eq!(runner.read(&world).len(), 1);
    runner.say(&world, Said::Accept(first));
    runner.tokens(&world, first, 1, &["a", "b"]);
    // The second assignment is written and never arrives.
    let second = world.run(&runner).await;
    world.registry.unsent(runner.key, &runner.link).unwrap();
    world.registry.detach(runner.key, &runner.link);
    world.clock.advance(10 * SECOND);
    world.registry.sweep_once().await;
    runner.reconnect(&world, vec![held(first, 2, 1)]);
    assert_eq!(runner.welcome.verdicts[0].resume_from, Some(1));
    assert_eq!(runner.welcome.last_seq, 1);
    let Body::Assign(assign) = &runner.read(&world)[0] else { panic!("not sent again") };
    assert_eq!(assign.task_id, second.task.to_string());
    runner.tokens(&world, first, 1, &["a", "b", "c"]);
    runner.finish(&world, first, 4);
    runner.finish(&world, second, 1);
    for fence in [first, second] {
        until(|| async { (world.get(fence.task).await.state == State::Succeeded).then_some(()) })
            .await;
        assert_eq!(world.get(fence.task).await.attempt, 1);
    }
}

/// P12: another server ended the attempt and this one has not heard of it when it starts the next.
#[tokio::test]
async fn an_attempt_that_ended_unheard_takes_nothing_from_the_next_one() {
    let world = World::new().await;
    let mut first = Runner::connect(&world);
    let mut second = Runner::try_connect(&world, hello("r2", "i2")).unwrap();
    let ended = world.run(&first).await;
    let lose = Event::Lose { attempt: ended.attempt, reason: "by another server".into() };
    world.ledger.apply(ended.task, lose).await.unwrap();
    let fence = world.rerun(&second, ended.task).await;
    // The runner of the first one has dropped it.
    first.say(&world, Said::Inventory(Vec::new()));
    world.registry.detach(first.key, &first.link);
    world.clock.advance(40 * SECOND);
    second.heartbeat(&world, &[fence]);
    world.registry.sweep_once().await;
    assert_eq!(world.get(fence.task).await.state, State::Running);
    second.finish(&world, fence, 1);
    until(|| async { (world.get(fence.task).await.state == State::Succeeded).then_some(()) }).await;
    assert_eq!(world.get(fence.task).await.attempt, fence.attempt);
}

#[tokio::test]
async fn a_silent_runner_loses_its_attempts_and_hears_of_it() {
    let world = World::new().await;
    let mut runner = Runner::connect(&world);
    let fence = world.run(&runner).await;
    let unread = world.run(&runner).await;
    let messages = world.registry.unsent(runner.key, &runner.link).unwrap();
    runner.acked = messages[0].seq;
    runner.heartbeat(&world, &[fence]);
    world.clock.advance(14 * SECOND);
    world.registry.sweep_once().await;
    assert_eq!(world.get(fence.task).await.state, State::Running);
    world.clock.advance(SECOND);
    world.registry.sweep_once().await;
    let lost = world.get(fence.task).await;
    assert_eq!((lost.state, lost.lost, lost.handed_back), (State::Queued, 1, 0));
    // What never reached it is nobody's loss.
    let back = world.get(unread.task).await;
    assert_eq!((back.state, back.lost, back.handed_back), (State::Queued, 0, 1));
    assert!(runner.link.is_ended());
    // It speaks again: a zombie.
    runner.reconnect(&world, vec![held(fence, 0, 0)]);
    assert_eq!(runner.welcome.verdicts[0].resume_from, None);
    let told = runner.read(&world);
    assert!(told.iter().any(|body| matches!(body, Body::Cancel(cancel)
        if cancel.task_id == fence.task.to_string() && cancel.reason == "LEASE_LOST")));
    runner.tokens(&world, fence, 1, &["z"]);
    assert_eq!(reason(&runner.acks(&world)[0]), "LEASE_LOST");
}

#[tokio::test]
async fn heartbeats_keep_leases_and_a_jump_of_the_wall_clock_changes_nothing() {
    let world = World::new().await;
    let runner = Runner::connect(&world);
    let fence = world.run(&runner).await;
    for _ in 0..10 {
        world.clock.advance(5 * SECOND);
        runner.heartbeat(&world, &[]);
        let now = world.clock.now();
        world.clock.set_wall(now + 3600 * SECOND);
        world.registry.sweep_once().await;
        world.clock.set_wall(now);
    }
    assert_eq!(world.get(fence.task).await.state, State::Running);
}

#[tokio::test]
async fn an_execution_timeout_ends_the_attempt_and_stops_the_runner() {
    let world = World::new().await;
    let mut runner = Runner::connect(&world);
    let fence = world.run(&runner).await;
    runner.read(&world);
    for _ in 0..6 {
        runner.heartbeat(&world, &[fence]);
        world.clock.advance(10 * SECOND);
    }
    runner.heartbeat(&world, &[fence]);
    // A store that is gone for a moment delays it, no more.
    world.store_down.store(true, Relaxed);
    world.registry.sweep_once().await;
    world.store_down.store(false, Relaxed);
    world.clock.advance(SECOND);
    world.registry.sweep_once().await;
    let task = world.get(fence.task).await;
    assert_eq!((task.state, task.failed), (State::Queued, 1));
    let told = runner.read(&world);
    assert!(matches!(&told[..], [Body::Cancel(cancel)] if cancel.reason == "EXECUTION_TIMEOUT"));
}

#[tokio::test]
async fn a_store_that_is_gone_loses_no_lease() {
    let world = World::new().await;
    let mut runner = Runner::connect(&world);
    let fence = world.run(&runner).await;
    runner.read(&world);
    runner.heartbeat(&world, &[fence]);
    world.registry.detach(runner.key, &runner.link);
    world.store_down.store(true, Relaxed);
    world.clock.advance(16 * SECOND);
    world.registry.sweep_once().await;
    runner.reconnect(&world, vec![held(fence, 0, 0)]);
    assert_eq!(runner.welcome.verdicts[0].resume_from, Some(1));
    world.store_down.store(false, Relaxed);
    world.clock.advance(SECOND);
    world.registry.sweep_once().await;
    assert_eq!(world.get(fence.task).await.state, State::Running);
}

#[tokio::test]
async fn a_new_process_of_the_runner_ends_what_the_old_one_held() {
    let world = World::new().await;
    let mut old = Runner::connect(&world);
    let fence = world.run(&old).await;
    old.read(&world);
    old.heartbeat(&world, &[fence]);
    let new = Runner::try_connect(&world, hello("r1", "i2")).unwrap();
    assert!(!new.welcome.resumed && old.link.is_ended() && old.output.is_ended());
    until(|| async { (world.get(fence.task).await.state == State::Queued).then_some(()) }).await;
    until(|| async { (world.registry.counts() == (1, 0)).then_some(()) }).await;
}

#[tokio::test]
async fn a_runner_returns_with_its_attempts_to_a_server_that_restarted() {
    let world = World::new().await;
    let mut runner = Runner::connect(&world);
    let kept = world.run(&runner).await;
    let forgotten = world.run(&runner).await;
    let strange = world.run(&runner).await;
    runner.read(&world);
    runner.tokens(&world, kept, 1, &["a", "b"]);
    world.record().await;
    runner.tokens(&world, kept, 3, &["c"]);
    let world = world.restart().await;
    assert_eq!(world.leases(), 3);
    let mut hello = hello("r1", "i1");
    hello.session = Some(runner.welcome.session.to_string());
    // Of the last, the events that the server lacks are gone.
    hello.inventory = vec![held(kept, 3, 3), held(strange, 5, 4)];
    let mut runner = Runner::try_connect(&world, hello).unwrap();
    assert!(!runner.welcome.resumed);
    let verdicts: Vec<_> = runner.welcome.verdicts.iter().map(|v| v.resume_from).collect();
    assert_eq!(verdicts, [Some(3), None]);
    for fence in [forgotten, strange] {
        until(|| async { (world.get(fence.task).await.lost == 1).then_some(()) }).await;
    }
    runner.tokens(&world, kept, 3, &["c", "d"]);
    runner.finish(&world, kept, 5);
    assert_eq!(runner.next_acks(&world).await[0].acked_index, 2);
    assert!(runner.next_acks(&world).await[0].finished);
    let task = world.get(kept.task).await;
    assert_eq!((task.state, task.attempt, task.last_sequence), (State::Succeeded, 1, 7));
}

#[tokio::test]
async fn after_a_restart_attempts_of_runners_that_stay_away_are_lost_in_time() {
    let world = World::new().await;
    let runner = Runner::connect(&world);
    let fence = world.run(&runner).await;
    let world = world.restart().await;
    world.clock.advance(14 * SECOND);
    world.registry.sweep_once().await;
    assert_eq!(world.get(fence.task).await.state, State::Running);
    world.clock.advance(SECOND);
    world.registry.sweep_once().await;
    assert_eq!(world.get(fence.task).await.state, State::Queued);
}

#[tokio::test]
async fn the_newest_connection_is_the_only_one() {
    let world = World::new().await;
    let mut runner = Runner::connect(&world);
    let (before, output) = (runner.link.clone(), runner.output.clone());
    runner.reconnect(&world, Vec::new());
    assert!(before.is_ended() && output.is_ended());
    let message = FromRunner { seq: 1, ack: 0, body: Said::Bye(String::new()) };
    let refused = world.registry.receive(runner.key, &before, message).unwrap_err();
    assert_eq!(refused.reason(), Reason::Conflict);
    assert!(world.registry.take(runner.key, &output, 1, Vec::new(), None).is_err());
    // The old stream's end changes nothing either.
    world.registry.detach(runner.key, &before);
    assert!(world.registry.get(&Namespace::from("default"), &"r1".into()).unwrap().connected);
}

#[tokio::test]
async fn goodbyes_and_refusals_hand_back() {
    let world = World::new().await;
    let mut runner = Runner::connect(&world);
    let (refused, left) = (world.run(&runner).await, world.run(&runner).await);
    runner.read(&world);
    runner.say(&world, Said::Refuse(refused, "no".into()));
    runner.say(&world, Said::Bye("done".into()));
    for fence in [refused, left] {
        until(|| async { (world.get(fence.task).await.handed_back == 1).then_some(()) }).await;
    }
    assert!(runner.link.is_ended() && runner.link.take_why().is_none());
    until(|| async { (world.registry.counts() == (0, 0)).then_some(()) }).await;
}

#[tokio::test]
async fn an_assignment_for_a_runner_that_left_is_handed_back() {
    let world = World::new().await;
    let mut runner = Runner::connect(&world);
    runner.say(&world, Said::Bye(String::new()));
    let fence = world.run(&runner).await;
    until(|| async { (world.get(fence.task).await.handed_back == 1).then_some(()) }).await;
}

#[tokio::test]
async fn a_cancel_that_overtakes_the_assignment_wins() {
    let world = World::new().await;
    let mut runner = Runner::connect(&world);
    let id = world.submit().await;
    let task = world.start(id).await;
    world.revoke(crate::runners::model::Fence { task: id, attempt: 1 });
    world.registry.assign(runner.key, task);
    assert!(runner.read(&world).is_empty());
    assert_eq!(world.leases(), 0);
}

#[tokio::test]
async fn a_runner_that_forgot_an_attempt_is_found_out_by_its_heartbeats() {
    let world = World::new().await;
    let mut runner = Runner::connect(&world);
    let (kept, forgotten) = (world.run(&runner).await, world.run(&runner).await);
    runner.read(&world);
    runner.heartbeat(&world, &[kept, forgotten]);
    assert!(runner.read(&world).is_empty());
    runner.heartbeat(&world, &[kept]);
    runner.heartbeat(&world, &[kept]);
    assert!(matches!(runner.read(&world)[..], [Body::InventoryRequest(_)]));
    runner.say(&world, Said::Inventory(vec![held(kept, 0, 0)]));
    until(|| async { (world.get(forgotten.task).await.lost == 1).then_some(()) }).await;
    let told = runner.read(&world);
    assert!(matches!(&told[0], Body::Reconciliation(all) if all.verdicts[0].keep), "{told:?}");
    assert_eq!(world.get(kept.task).await.state, State::Running);
}

#[tokio::test]
async fn an_inventory_that_comes_late_ends_nothing_that_was_assigned_since() {
    let world = World::new().await;
    let mut runner = Runner::connect(&world);
    let forgotten = world.run(&runner).await;
    runner.read(&world);
    runner.heartbeat(&world, &[]);
    runner.heartbeat(&world, &[]);
    assert!(matches!(runner.read(&world)[..], [Body::InventoryRequest(_)]));
    // The answer is made now and arrives over the next connection.
    let newer = world.run(&runner).await;
    runner.read(&world);
    runner.tokens(&world, newer, 1, &["a"]);
    world.registry.detach(runner.key, &runner.link);
    runner.reconnect(&world, vec![held(forgotten, 0, 0), held(newer, 1, 1)]);
    runner.say(&world, Said::Inventory(Vec::new()));
    until(|| async { (world.get(forgotten.task).await.lost == 1).then_some(()) }).await;
    assert_eq!(world.get(newer.task).await.state, State::Running);
}

#[tokio::test]
async fn a_drained_runner_is_told_and_offers_nothing_any_more() {
    let world = World::new().await;
    let mut runner = Runner::connect(&world);
    let namespace = Namespace::from("default");
    world.registry.send_order(&namespace, drain("r1")).unwrap();
    assert!(matches!(runner.read(&world)[..], [Body::Command(_)]));
    let credits = Announcement { revision: 2, free_slots: 4, as_of_seq: 0 };
    runner.say(&world, Said::Credits(credits));
    let seen = world.registry.get(&namespace, &"r1".into()).unwrap();
    assert_eq!((seen.mode, seen.free_slots), (SupplyState::Draining, 4));
    let unknown = world.registry.send_order(&namespace, drain("r9"));
    assert_eq!(unknown.unwrap_err().reason(), Reason::NotFound);
}

#[tokio::test]
async fn credits_count_what_is_under_way() {
    let world = World::new().await;
    let mut runner = Runner::connect(&world);
    let namespace = Namespace::from("default");
    let free = || world.registry.get(&namespace, &"r1".into()).unwrap().free_slots;
    world.run(&runner).await;
    world.run(&runner).await;
    assert_eq!(free(), 6);
    // It has seen the first only.
    let credits = Announcement { revision: 2, free_slots: 7, as_of_seq: 1 };
    runner.say(&world, Said::Credits(credits));
    assert_eq!(free(), 6);
    let old = Announcement { revision: 1, free_slots: 8, as_of_seq: 2 };
    runner.say(&world, Said::Credits(old));
    assert_eq!(free(), 6);
    world.registry.detach(runner.key, &runner.link);
    assert_eq!(free(), 0);
}

#[tokio::test]
async fn other_namespaces_neither_see_nor_take_a_session() {
    let world = World::new().await;
    let runner = Runner::connect(&world);
    let other = Namespace::from("other");
    let link = Link::default();
    let refused = world.registry.attach_output(&other, &runner.welcome.session, link.clone());
    assert_eq!(refused.unwrap_err().reason(), Reason::NotFound);
    let mut theft = hello("r1", "i1");
    theft.session = Some(runner.welcome.session.to_string());
    let fence = world.run(&runner).await;
    theft.inventory = vec![held(fence, 0, 0)];
    let (_, welcome) = world.registry.hello(&other, theft, Attached::Stream(link)).unwrap();
    assert!(!welcome.resumed && welcome.verdicts[0].resume_from.is_none());
    assert!(!runner.link.is_ended());
    assert_eq!(world.registry.list(&other, None, 10).len(), 1);
    assert_eq!(world.get(fence.task).await.state, State::Running);
}

#[tokio::test]
async fn a_session_ends_when_its_runner_stays_away() {
    let world = World::new().await;
    let runner = Runner::connect(&world);
    world.registry.detach(runner.key, &runner.link);
    world.clock.advance(30 * SECOND);
    world.registry.sweep_once().await;
    assert_eq!(world.registry.counts(), (0, 0));
    let mut late = hello("r1", "i1");
    late.session = Some(runner.welcome.session.to_string());
    assert!(!Runner::try_connect(&world, late).unwrap().welcome.resumed);
}

#[tokio::test]
async fn a_runner_of_another_protocol_is_told_which_is_spoken() {
    let world = World::new().await;
    let mut new = hello("r1", "i1");
    new.versions = (2, 3);
    let refused = Runner::try_connect(&world, new).err().unwrap();
    assert_eq!(refused.reason(), Reason::ProtocolVersion);
}
