//! Claims about who starts first when several servers share what waits.

use std::collections::BTreeSet;

use super::site::{Member, Site, eventually, task, task_of, urgent, work_off};
use crate::{id::TaskId, queue::Pause};

/// Waits until all tasks lie in so many lanes, and servers know of them.
async fn know_of_all(members: &[Member], n_lanes: usize, ids: &[TaskId]) {
    for member in members {
        let Member { backlog, world, .. } = member;
        eventually("all are there and known", || async {
            let depths = backlog.0.work.depths().await.unwrap();
            depths.values().sum::<u64>() == ids.len() as u64
                && world.parts.queue.far_lanes_with_work() == n_lanes
        })
        .await;
    }
}

/// What both runners are given next, and do once both have something.
async fn both_given(members: &mut [Member; 2]) -> Vec<TaskId> {
    let mut given = Vec::new();
    for member in &mut *members {
        given.push(member.given_soon().await);
    }
    for (member, fences) in members.iter_mut().zip(&given) {
        member.finish(fences);
    }
    given.into_iter().flatten().map(|fence| fence.task).collect()
}

#[tokio::test]
async fn namespaces_share_runners_whoever_floods_and_wherever() {
    let site = Site::new();
    let mut members: [Member; 2] = site.members().await;
    let mut ids = Vec::new();
    for _ in 0..60 {
        ids.push(members[0].submit(task_of("flood")).await);
    }
    let mut few = Vec::new();
    for _ in 0..15 {
        few.push(members[1].submit(task_of("few")).await);
    }
    ids.extend(&few);
    know_of_all(&members, 2, &ids).await;
    for member in &mut members {
        member.connect(1);
    }
    work_off(&mut members, &ids).await;
    let mut started = Vec::new();
    for id in &ids {
        started.push((members[0].get(*id).await.start_time.unwrap(), *id));
    }
    started.sort_unstable();
    assert!(site.clock.now() >= started[0].0);
    let order: Vec<TaskId> = started.into_iter().map(|(_, id)| id).collect();
    let last = order.iter().rposition(|id| few.contains(id)).unwrap();
    // Fair is every other one.
    assert!(last < 40, "the last of few started as number {last}");
    let first_half = order[..15].iter().filter(|id| few.contains(id)).count();
    assert!((4..=11).contains(&first_half), "{first_half} of the first 15");
}

#[tokio::test]
async fn the_more_urgent_starts_first_wherever_it_was_accepted() {
    let site = Site::new();
    let mut members: [Member; 2] = site.members().await;
    let mut ids = Vec::new();
    for _ in 0..10 {
        ids.push(members[0].submit(urgent(-1)).await);
    }
    for priority in [0, 50, 100] {
        ids.push(members[1].submit(urgent(priority)).await);
    }
    know_of_all(&members, 4, &ids).await;
    for member in &mut members {
        member.connect(1);
    }
    // Two runners: two start at a time.
    let first = BTreeSet::from_iter(both_given(&mut members).await);
    assert_eq!(first, BTreeSet::from([ids[11], ids[12]]), "of {ids:?}");
    let second = both_given(&mut members).await;
    assert!(second.contains(&ids[10]), "{second:?} of {ids:?}");
    work_off(&mut members, &ids).await;
}

#[tokio::test]
async fn a_server_that_comes_too_late_for_a_task_takes_the_next_at_once() {
    let site = Site::new();
    let one = [site.member().await];
    let ids = [one[0].submit(urgent(9)).await, one[0].submit(task()).await];
    know_of_all(&one, 2, &ids).await;
    let [mut fast, mut late] = [site.still().await, site.still().await];
    for member in [&mut fast, &mut late] {
        member.backlog.look().await.unwrap();
        member.connect(1);
    }
    fast.backlog.fetch_all().await.unwrap();
    late.backlog.fetch_all().await.unwrap();
    assert!(fast.world.parts.queue.contains(ids[0]));
    assert!(late.world.parts.queue.contains(ids[1]));
}

#[tokio::test]
async fn nothing_new_passes_what_waits_though_it_is_accepted_where_a_runner_gets_free() {
    let site = Site::new();
    let mut one = site.member().await;
    let old = one.submit_many(2).await;
    eventually("they are there", || async {
        one.backlog.0.work.depths().await.unwrap().get("default/a/m") == Some(&2)
    })
    .await;
    let mut still = site.still().await;
    still.backlog.look().await.unwrap();
    still.connect(1);
    let new = still.submit(task()).await;
    assert_eq!(still.get(new).await.attempt, 0, "it waits behind the old ones");
    one.connect(1);
    let mut members = [one];
    work_off(&mut members, &old).await;
}

#[tokio::test]
async fn a_paused_queue_is_not_fetched_from_and_goes_on_when_resumed() {
    let site = Site::new();
    let mut members: [Member; 2] = site.members().await;
    let namespace = crate::id::Namespace::from("default");
    let pause = Pause { by: "me".into(), reason: String::new(), time: site.clock.now() };
    for member in &members {
        member.world.parts.queue.set_paused(&namespace, "a/m", Some(pause.clone()));
    }
    members[1].connect(4);
    let ids = members[0].submit_many(3).await;
    let mut other = task();
    other.spec.model = "b/m".into();
    let other = members[0].submit(other).await;
    work_off(&mut members, &[other]).await;
    for id in &ids {
        assert_eq!(members[0].get(*id).await.attempt, 0);
    }
    for member in &members {
        member.world.parts.queue.set_paused(&namespace, "a/m", None);
    }
    work_off(&mut members, &ids).await;
}
