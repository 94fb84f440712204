//! Claims about bounds that hold over all servers.

use std::sync::atomic::Ordering::Relaxed;

use futures_util::future::join_all;

use super::site::{Member, Site, eventually, task, urgent, work_off};
use crate::{
    error::{Error, Reason},
    id::TaskId,
    queue::FullPolicy,
    tasks::{model::State, queued},
};

#[tokio::test]
async fn exactly_as_many_are_accepted_as_may_wait_over_all_servers() {
    let mut site = Site::new();
    site.settings.limits.max_per_model = 50;
    site.settings.limits.max_per_namespace = 60;
    let mut members: [Member; 3] = site.members().await;
    let submits = members.iter().flat_map(|member| (0..40).map(|_| member.try_submit(task())));
    let outcomes = join_all(submits).await;
    let ids: Vec<_> =
        outcomes.iter().filter_map(|outcome| outcome.as_ref().ok().copied()).collect();
    assert_eq!(ids.len(), 50);
    for refused in outcomes.iter().filter_map(|outcome| outcome.as_ref().err()) {
        assert_eq!(refused.reason(), Reason::QueueFull, "{refused:?}");
        assert!(refused.retry_delay().is_some());
    }
    let other = || {
        let mut other = task();
        other.spec.model = "b/m".into();
        other
    };
    let submits = members.iter().flat_map(|member| (0..5).map(|_| member.try_submit(other())));
    let outcomes = join_all(submits).await;
    let others: Vec<_> = outcomes.into_iter().filter_map(Result::ok).collect();
    assert_eq!(others.len(), 10, "of the namespace");

    // What has started leaves its room to others.
    members[2].connect(8);
    work_off(&mut members, &[ids, others].concat()).await;
    let work = members[0].backlog.0.work.clone();
    eventually("room", || async { work.depths().await.unwrap().is_empty() }).await;
    members[0].submit(task()).await;
}

#[tokio::test]
async fn the_oldest_of_the_lowest_priority_makes_room_wherever_it_was_accepted() {
    let mut site = Site::new();
    site.settings.limits.max_per_model = 3;
    site.settings.limits.when_full = FullPolicy::DropOldest;
    let members: [Member; 2] = site.members().await;
    let keeps = members[0].submit(urgent(5)).await;
    let work = members[0].backlog.0.work.clone();
    let depth = |depth: u64| {
        let work = work.clone();
        move || {
            let work = work.clone();
            async move { work.depths().await.unwrap().get("default/a/m") == Some(&depth) }
        }
    };
    let old = members[0].submit(urgent(1)).await;
    eventually("it is there", depth(2)).await;
    let young = members[0].submit(urgent(1)).await;
    eventually("all wait in their lanes", || async {
        let lanes = work.lanes().await.unwrap();
        let lanes: Vec<_> = lanes.into_iter().map(|info| info.lane).collect();
        let stats = work.stats(&lanes).await.unwrap();
        stats.iter().map(|stats| stats.entries).sum::<u64>() == 3
    })
    .await;
    let refused = members[1].try_submit(urgent(0)).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::QueueFull, "it would be the lowest itself");
    let new = members[1].submit(urgent(1)).await;
    let evicted = members[0].get(old).await;
    assert_eq!(evicted.state, State::Failed, "{evicted:?}");
    assert_eq!(evicted.error.unwrap().reason, "QUEUE_FULL_DROP_LRU");
    for id in [keeps, young, new] {
        assert_eq!(members[1].get(id).await.state, State::Queued);
    }
    eventually("three wait", depth(3)).await;
}

/// Submits at each server at once; how many were accepted.
async fn press(members: &[Member]) -> usize {
    let submits = members.iter().flat_map(|member| (0..20).map(|_| member.try_submit(task())));
    let full = |outcome: Result<TaskId, Error>| match outcome {
        Ok(_) => true,
        Err(refused) => {
            assert_eq!(refused.reason(), Reason::QueueFull, "{refused:?}");
            assert!(refused.retry_delay().is_some());
            false
        }
    };
    join_all(submits).await.into_iter().filter_map(|outcome| full(outcome).then_some(())).count()
}

/// P15, to a twentieth.
#[tokio::test]
async fn limits_hold_while_redis_is_away_and_when_it_comes_back_empty() {
    const MOST: u64 = 100;
    let mut site = Site::new();
    site.settings.limits.max_per_model = MOST;
    let members: [Member; 3] = site.members().await;
    eventually("they know of each other", || async {
        members.iter().all(|member| member.backlog.0.counter.n_servers.load(Relaxed) == 3)
    })
    .await;
    site.redis.kill();
    eventually("it is missed", || async { members.iter().all(|member| !member.backlog.is_up()) })
        .await;
    let waiting = || async {
        let read = members[0]
            .world
            .parts
            .db
            .read(|tx| Box::pin(async move { queued::queued_count(tx).await }));
        read.await.unwrap()
    };
    eventually("it is nearly full", || async {
        press(&members).await;
        waiting().await >= MOST - 6
    })
    .await;
    for _ in 0..20 {
        press(&members).await;
    }
    let before = waiting().await;
    assert!(before <= MOST + MOST / 20, "{before} wait where {MOST} may");
    site.redis.restart();
    let work = members[0].backlog.0.work.clone();
    eventually("Redis has them all", || async {
        press(&members).await;
        let waiting = waiting().await;
        assert!(waiting <= MOST + MOST / 20, "{waiting} wait where {MOST} may");
        work.depths().await.is_ok_and(|depths| depths.get("default/a/m") == Some(&waiting))
    })
    .await;
    for _ in 0..20 {
        press(&members).await;
    }
    let after = waiting().await;
    assert!((MOST - 6..=MOST + MOST / 20).contains(&after), "{after} wait where {MOST} may");
}

#[tokio::test]
async fn the_oldest_of_the_lowest_priority_makes_room_while_redis_is_away() {
    let mut site = Site::new();
    site.settings.limits.max_per_model = 3;
    site.settings.limits.when_full = FullPolicy::DropOldest;
    let one = site.member().await;
    site.redis.kill();
    eventually("it is missed", || async { !one.backlog.is_up() }).await;
    let mut ids = Vec::new();
    for priority in [5, 1, 1] {
        ids.push(one.submit(urgent(priority)).await);
    }
    let refused = one.try_submit(urgent(0)).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::QueueFull, "it would be the lowest itself");
    ids.push(one.submit(urgent(1)).await);
    ids.push(one.submit(urgent(1)).await);
    let mut states = Vec::new();
    for id in ids {
        states.push(one.get(id).await.state);
    }
    let (gone, kept) = (State::Failed, State::Queued);
    assert_eq!(states, [kept, gone, gone, kept, kept]);
}
