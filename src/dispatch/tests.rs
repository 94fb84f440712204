//! Dispatch over a real ledger and a real registry, with a scripted runner.

use std::{future::Future, sync::Arc, time::Duration};

use super::{Dispatcher, Sweep};
use crate::{
    clock::Clock,
    db::Sql,
    id::{Namespace, TaskId},
    pb::connect_response::Body,
    queue::Entry,
    runners::tests::world::{Runner, World},
    tasks::model::State,
};

fn dispatcher(world: &World) -> Dispatcher {
    Dispatcher {
        queue: world.parts.queue.clone(),
        ledger: world.ledger.clone(),
        registry: world.registry.clone(),
        clock: world.clock.clone(),
        supervisor: world.supervisor.clone(),
    }
}

fn sweep(world: &World) -> Sweep {
    Sweep::new(world.parts.db.clone(), world.parts.queue.clone(), world.clock.clone())
}

/// Runs `work` while time goes by.
async fn moving<T>(clock: &Clock, work: impl Future<Output = T>) -> T {
    tokio::pin!(work);
    loop {
        tokio::select! {
            biased;
            done = &mut work => return done,
            () = tokio::task::yield_now() => clock.advance(Duration::from_millis(100)),
        }
    }
}

fn ghost(id: TaskId) -> Entry {
    Entry {
        id,
        namespace: Namespace::from("default"),
        model: "baton/echo".into(),
        version: None,
        required_labels: Arc::default(),
        priority: 0,
        create_time: crate::clock::EPOCH,
        not_before: None,
        deadline: None,
        session: None,
        attempt: 0,
        waited_out: false,
    }
}

fn assigned(runner: &mut Runner, world: &World) -> usize {
    let bodies = runner.read(world);
    bodies.iter().filter(|body| matches!(body, Body::Assign(_))).count()
}

#[tokio::test]
async fn a_match_becomes_an_attempt_that_its_runner_hears_of() {
    let world = World::new().await;
    let mut runner = Runner::connect(&world);
    let id = world.submit().await;
    assert_eq!(dispatcher(&world).run_once().await, 1);
    assert_eq!(assigned(&mut runner, &world), 1);
    let task = world.get(id).await;
    assert_eq!((task.state, task.attempt), (State::Running, 1));
    let stats = world.parts.queue.stats(&task.namespace, "baton/echo");
    assert_eq!((stats.depth, stats.running, stats.free_slots), (0, 1, 7));
}

#[tokio::test]
async fn credits_bound_what_is_started() {
    let world = World::new().await;
    let mut runner = Runner::connect(&world);
    for _ in 0..20 {
        world.submit().await;
    }
    assert_eq!(dispatcher(&world).run_once().await, 8);
    assert_eq!(dispatcher(&world).run_once().await, 0);
    assert_eq!(assigned(&mut runner, &world), 8);
    assert_eq!(world.parts.queue.len(), 12);
}

#[tokio::test]
async fn ghosts_and_doubles_start_nothing_and_cost_no_credit() {
    let world = World::new().await;
    let mut runner = Runner::connect(&world);
    let id = world.submit().await;
    let dispatcher = dispatcher(&world);
    dispatcher.run_once().await;
    // It runs, yet the queue offers it again, with one that never was.
    world.parts.queue.push(ghost(id));
    world.parts.queue.push(ghost(TaskId(uuid::Uuid::from_u128(1))));
    assert_eq!(dispatcher.run_once().await, 2);
    assert_eq!(assigned(&mut runner, &world), 1);
    assert_eq!(world.get(id).await.attempt, 1);
    let stats = world.parts.queue.stats(&Namespace::from("default"), "baton/echo");
    assert_eq!((stats.depth, stats.running, stats.free_slots), (0, 1, 7));
}

#[tokio::test]
async fn a_runner_that_left_gives_its_match_back() {
    let world = World::new().await;
    let runner = Runner::connect(&world);
    let id = world.submit().await;
    let dispatcher = dispatcher(&world);
    let mut matches = world.parts.queue.take_matches(world.clock.now(), 9);
    assert_eq!(matches[0].runner, runner.key);
    // As if the session had ended between the decision and now.
    matches[0].runner = crate::queue::SupplyKey(u64::MAX);
    dispatcher.start(matches).await;
    assert!(world.parts.queue.contains(id));
    assert_eq!(world.get(id).await.state, State::Queued);
}

#[tokio::test]
async fn what_the_queue_lost_the_sweep_finds() {
    let world = World::new().await;
    let mut ids = Vec::new();
    for _ in 0..30 {
        ids.push(world.submit().await);
    }
    let mut sweep = sweep(&world);
    assert_eq!(sweep.run_once().await.unwrap(), 0);
    for id in ids.iter().step_by(3) {
        assert!(world.parts.queue.remove(*id));
    }
    let before = world.clock.mono();
    let found = moving(&world.clock, sweep.run_once()).await.unwrap();
    assert_eq!(found, 10);
    assert!(world.clock.mono().since(before) >= Duration::from_secs(1), "no second look");
    assert!(ids.iter().all(|id| world.parts.queue.contains(*id)));
    assert_eq!(sweep.run_once().await.unwrap(), 0);
}

#[tokio::test]
async fn the_sweep_leaves_alone_what_started_or_ended() {
    let world = World::new().await;
    let _runner = Runner::connect(&world);
    world.submit().await;
    dispatcher(&world).run_once().await;
    assert_eq!(sweep(&world).run_once().await.unwrap(), 0);
    assert!(world.parts.queue.is_empty());
}

async fn rename(world: &World, sql: Sql) {
    let write = world
        .parts
        .db
        .write(move |tx| Box::pin(async move { tx.query(sql).run().await.map(drop) }));
    write.await.unwrap();
}

#[tokio::test]
async fn a_task_that_finds_a_free_runner_starts_in_the_commit_that_accepts_it() {
    let world = World::starting().await;
    let mut runner = Runner::connect(&world);
    let id = world.submit().await;
    assert_eq!(assigned(&mut runner, &world), 1);
    let task = world.get(id).await;
    assert_eq!((task.state, task.attempt, task.revision), (State::Running, 1, 2));
    let stats = world.parts.queue.stats(&task.namespace, "baton/echo");
    assert_eq!((stats.depth, stats.running, stats.free_slots), (0, 1, 7));
    // Nothing is left for the dispatcher to do.
    assert_eq!(dispatcher(&world).run_once().await, 0);
}

#[tokio::test]
async fn who_waited_longer_gets_the_slot_that_an_accepted_task_finds() {
    let world = World::starting().await;
    let first = world.submit().await;
    world.clock.advance(Duration::from_secs(1));
    let mut runner = Runner::connect_with_slots(&world, 1);
    let second = world.submit().await;
    assert_eq!(assigned(&mut runner, &world), 1);
    assert_eq!(world.get(first).await.state, State::Running);
    assert_eq!(world.get(second).await.state, State::Queued);
    assert!(world.parts.queue.contains(second));
}

#[tokio::test]
async fn a_commit_that_fails_leaves_neither_a_start_nor_an_entry() {
    let world = World::starting().await;
    let mut runner = Runner::connect(&world);
    rename(&world, Sql::new("ALTER TABLE tasks RENAME TO hidden")).await;
    assert!(world.try_submit().await.is_err());
    assert_eq!(assigned(&mut runner, &world), 0);
    assert!(world.parts.queue.is_empty());
    let stats = world.parts.queue.stats(&Namespace::from("default"), "baton/echo");
    assert_eq!((stats.running, stats.free_slots), (0, 8));
    rename(&world, Sql::new("ALTER TABLE hidden RENAME TO tasks")).await;
    let id = world.submit().await;
    assert_eq!(assigned(&mut runner, &world), 1);
    assert_eq!(world.get(id).await.state, State::Running);
}
