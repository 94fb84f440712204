//! The end of a lease by time against the runner's own word.

use std::{
    collections::BTreeSet,
    sync::{Arc, Barrier},
    time::Duration,
};

use futures_util::future::join_all;

use super::world::*;
use crate::{runners::model::Fence, tasks::model::State};

/// P5: leases expire while their runner ends them. Whichever comes first counts, the other changes
/// nothing, and the runner is told which.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_completions_race_the_expiry_of_their_leases_and_count_once() {
    const ROUNDS: usize = 50;
    const HELD: usize = 200;
    let world = Arc::new(World::new().await);
    let (mut n_finished, mut n_lost) = (0, 0);
    for _ in 0..ROUNDS {
        let mut runner = Runner::connect(&world);
        let fences = join_all((0..HELD).map(|_| world.run(&runner))).await;
        while !runner.read(&world).is_empty() {}
        runner.heartbeat(&world, &fences);
        world.clock.advance(Duration::from_secs(15));

        let begin = Arc::new(Barrier::new(2));
        let (begins, there, held_then) = (begin.clone(), world.clone(), fences.clone());
        let runtime = tokio::runtime::Handle::current();
        let speaking = std::thread::spawn(move || {
            let _entered = runtime.enter();
            begins.wait();
            for fence in &held_then {
                runner.finish(&there, *fence, 1);
            }
            runner
        });
        begin.wait();
        world.registry.sweep_once().await;
        let mut runner = speaking.join().unwrap();
        until(|| async { (world.leases() == 0).then_some(()) }).await;

        let told = finished(&runner.acks(&world));
        let mut lost = Vec::new();
        for fence in fences {
            let task = world.get(fence.task).await;
            let kept = told.contains(&fence.task.to_string());
            match task.state {
                State::Succeeded => assert!(kept && task.lost == 0, "{task:?}"),
                State::Queued => assert!(!kept && task.lost == 1, "{task:?}"),
                _ => panic!("{task:?}"),
            }
            // One entry for the start, one for whichever end there was.
            assert_eq!((task.attempt, task.last_sequence), (1, 3), "{task:?}");
            if !kept {
                lost.push(fence);
            }
        }
        // What it lost it has lost for good.
        let inventory = lost.iter().map(|fence| held(*fence, 0, 1)).collect();
        runner.reconnect(&world, inventory);
        assert!(runner.welcome.verdicts.iter().all(|verdict| verdict.resume_from.is_none()));
        let revisions = revisions(&world, &lost).await;
        for fence in &lost {
            runner.finish(&world, *fence, 1);
        }
        let mut refused = 0;
        while refused < lost.len() {
            let acks = runner.next_acks(&world).await;
            assert!(acks.iter().all(|ack| reason(ack) == "LEASE_LOST"), "{acks:?}");
            refused += acks.len();
        }
        assert_eq!(self::revisions(&world, &lost).await, revisions);
        n_lost += lost.len();
        n_finished += told.len();
    }
    assert_eq!(n_finished + n_lost, ROUNDS * HELD);
    assert!(n_finished > 100 && n_lost > 100, "{n_finished} finished, {n_lost} lost: no race");
}

/// Tasks whose end was acknowledged.
fn finished(acks: &[crate::pb::LeaseAck]) -> BTreeSet<String> {
    acks.iter().filter(|ack| ack.finished).map(|ack| ack.task_id.clone()).collect()
}

async fn revisions(world: &World, fences: &[Fence]) -> Vec<u64> {
    let mut revisions = Vec::new();
    for fence in fences {
        revisions.push(world.get(fence.task).await.revision);
    }
    revisions
}
