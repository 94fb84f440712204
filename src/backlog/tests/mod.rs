//! Claims about several servers that share a backlog, over a real Redis and a real database.

mod loss;
mod order;
mod room;
mod site;

use std::time::Duration;

use self::site::{BOUND, Member, Site, eventually, later, task, work_off};
use crate::{
    queue::{Told, WaitReason},
    tasks::{
        ledger::{queue_entry, tests::broken},
        model::State,
        state::Event,
    },
};

#[tokio::test]
async fn a_task_starts_at_the_server_that_has_a_runner_for_it() {
    let site = Site::new();
    let [one, mut other] = site.members().await;
    other.connect(2);
    let ids = one.submit_many(5).await;
    let mut members = [one, other];
    let times = work_off(&mut members, &ids).await;
    assert!(times.values().all(|n_times| *n_times == 1), "{times:?}");
    assert_eq!(members[1].given.len(), 5);
    assert_drained(&members[0]).await;
}

#[tokio::test]
async fn a_task_that_finds_a_runner_when_it_is_accepted_never_lies_in_redis() {
    let site = Site::new();
    let mut one = site.still().await;
    one.connect(1);
    let id = one.submit(task()).await;
    assert_eq!(one.get(id).await.state, State::Running);
    // All that Redis is told is that its room is free.
    let told = one.backlog.0.inlet.lock().await.told.try_recv().unwrap();
    assert_eq!(told, Told::Gone(id));
    one.backlog.tell([told]).await;
    assert_drained(&one).await;
}

#[tokio::test]
async fn each_task_is_done_once_over_three_servers_though_deliveries_come_twice() {
    let site = Site::new();
    let mut members: [Member; 3] = site.members().await;
    for member in &mut members {
        member.connect(4);
    }
    let mut ids = Vec::new();
    for round in 0..12 {
        for member in &members {
            ids.extend(member.submit_many(8).await);
        }
        for member in &mut members {
            member.work();
        }
        // All that is known is delivered again.
        if round % 3 == 0 {
            for lane in members[0].backlog.0.work.lanes().await.unwrap() {
                site.redis.command(&format!("XGROUP DESTROY baton:q:{} baton", lane.lane));
            }
        }
        members[round % 3].backlog.compare().await.unwrap();
    }
    let times = work_off(&mut members, &ids).await;
    assert_eq!(times.len(), ids.len());
    assert!(times.values().all(|n_times| *n_times == 1), "{times:?}");
    let shares: Vec<_> = members.iter().map(|member| member.given.len()).collect();
    assert!(shares.iter().all(|share| *share > 0), "{shares:?}");
    assert_drained(&members[0]).await;
}

#[tokio::test]
async fn a_delayed_task_starts_on_time_wherever_it_was_accepted() {
    let site = Site::new();
    let [one, mut other] = site.members().await;
    other.connect(1);
    let at = site.clock.now() + Duration::from_millis(1200);
    let id = one.submit(later(at)).await;
    let explained = one.world.parts.queue.explain(&queue_entry(&one.get(id).await)).unwrap();
    assert_eq!(explained.reason, WaitReason::NotBefore);
    eventually("the start", || async { other.get(id).await.state == State::Running }).await;
    let late = site.clock.now().since(at);
    assert!(other.get(id).await.start_time.unwrap() >= at, "too early");
    assert!(late < Duration::from_secs(1), "{late:?} late");
    assert_eq!(other.given_soon().await.len(), 1);
}

#[tokio::test]
async fn a_failed_attempt_is_tried_again_elsewhere_after_its_backoff_and_dead_letters_are_listed() {
    let site = Site::new();
    let [mut one, mut other] = site.members().await;
    one.connect(1);
    let mut new = task();
    new.spec.retry.max_attempts = 2;
    new.spec.retry.initial_backoff = Duration::from_millis(300);
    let id = one.submit(new).await;
    let fail = |member: &Member, attempt| {
        let outcome = broken();
        let ledger = member.world.ledger.clone();
        async move {
            let event = Event::Finish { attempt, outcome, usage: Default::default() };
            ledger.apply(id, event).await.unwrap()
        }
    };
    assert_eq!(one.given_soon().await.len(), 1);
    fail(&one, 1).await;
    // Its only runner is gone for good, another server has one.
    let namespace = crate::id::Namespace::from("default");
    one.world.parts.queue.runner_down(one.runner.as_ref().unwrap().key);
    assert_eq!(one.get(id).await.namespace, namespace);
    other.connect(1);
    eventually("the second attempt", || async { other.get(id).await.attempt == 2 }).await;
    assert_eq!(other.given_soon().await.len(), 1);
    assert_eq!(fail(&other, 2).await.state, State::DeadLettered);
    eventually("the dead letter", || async { site.redis.command("XLEN baton:dead") == ":1" }).await;
    assert_drained(&one).await;
}

#[tokio::test]
async fn what_a_server_cannot_start_after_all_it_gives_back() {
    let mut site = Site::new();
    // None takes it over before.
    site.settings.ack_timeout = Duration::from_mins(1);
    let [mut one, mut other] = site.members().await;
    let id = other.submit(task()).await;
    // Fetched for a runner that leaves before it could start.
    let still = site.still().await;
    let mut leaving = still;
    leaving.connect(1);
    leaving.backlog.look().await.unwrap();
    assert_eq!(leaving.backlog.fetch().await.unwrap(), Some(1));
    leaving.world.parts.queue.runner_down(leaving.runner.as_ref().unwrap().key);
    assert_eq!(leaving.backlog.give_back().await.unwrap(), 0, "not at once");
    one.connect(1);
    let given = async {
        while leaving.backlog.give_back().await.unwrap() == 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(BOUND, given).await.unwrap();
    eventually("the start", || async { one.get(id).await.state == State::Running }).await;
    other.work();
    assert_eq!(one.given_soon().await.len(), 1);
}

#[tokio::test]
async fn numbers_and_reasons_count_over_all_servers() {
    let site = Site::new();
    let [one, mut other] = site.members().await;
    other.connect_for(1, &["a/m"]);
    let mut ids = Vec::new();
    for _ in 0..4 {
        ids.push(one.submit(task()).await);
    }
    eventually("a start", || async {
        futures_util::future::join_all(ids.iter().map(|id| one.get(*id)))
            .await
            .iter()
            .any(|task| task.state == State::Running)
    })
    .await;
    let namespace = crate::id::Namespace::from("default");
    eventually("the numbers", || async {
        let stats = one.world.parts.queue.stats(&namespace, "a/m");
        (stats.depth, stats.running, stats.slots, stats.free_slots) == (3, 1, 1, 0)
    })
    .await;
    let mut waiting = Vec::new();
    for id in &ids {
        let task = one.get(*id).await;
        if task.state == State::Queued {
            waiting.push(queue_entry(&task));
        }
    }
    for member in [&one, &other] {
        eventually("the reason", || async {
            let explained = member.world.parts.queue.explain(waiting.last().unwrap()).unwrap();
            explained.reason == WaitReason::BehindOthers
        })
        .await;
        assert_eq!(member.world.parts.queue.list(&namespace)[0].depth, 3);
    }
    let mut elsewhere = task();
    elsewhere.spec.model = "b/m".into();
    let id = one.submit(elsewhere).await;
    let explained = one.world.parts.queue.explain(&queue_entry(&one.get(id).await)).unwrap();
    assert_eq!(explained.reason, WaitReason::NoRunnerForModel);
    assert_eq!(other.given_soon().await.len(), 1);
}

/// Nothing waits in Redis, and nothing is counted.
async fn assert_drained(member: &Member) {
    let work = &member.backlog.0.work;
    eventually("an empty Redis", || async {
        work.ids("0", 1000).await.unwrap().1.is_empty() && work.depths().await.unwrap().is_empty()
    })
    .await;
}
