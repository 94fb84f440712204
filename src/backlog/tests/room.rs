//! Claims about bounds that hold over all servers.

use futures_util::future::join_all;

use super::site::{Member, Site, eventually, task, urgent, work_off};
use crate::{error::Reason, queue::FullPolicy, tasks::model::State};

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
