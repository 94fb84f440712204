//! Collectors that are held up, die, or run beside each other, while the same bytes come again.

use std::{collections::BTreeSet, time::Duration};

use super::{
    HOUR, LARGE, rows,
    world::{World, announced, caller, noise, pieces, reason, spec},
};
use crate::{
    artifacts::{model::Artifact, store::stored},
    blob::Key,
    error::Reason,
};

on_both! {
    /// P14.
    a_late_deletion_hits_nothing_that_came_since,
    /// P14.
    bytes_that_were_condemned_while_they_were_kept_are_not_listed,
    /// P14.
    bytes_of_a_version_without_generations_stay_and_go,
    what_a_collector_left_when_it_died_is_deleted,
    parts_on_their_way_stay_where_their_bytes_will_be,
}

/// What a collector is about to delete, of bytes that nothing refers to.
async fn condemn(world: &World, artifact: &Artifact) -> Vec<Key> {
    world.artifacts.delete(&"a".into(), artifact.id).await.unwrap();
    world.clock.advance(HOUR);
    let now = world.clock.now();
    let condemn = world.db.write(move |tx| {
        Box::pin(async move {
            stored::condemn(tx, now - HOUR, 10, now).await?;
            stored::garbage(tx, 10).await
        })
    });
    condemn.await.unwrap()
}

async fn a_late_deletion_hits_nothing_that_came_since(world: World) {
    let bytes = noise(LARGE, 1);
    let mut made = world.put("first", &bytes).await;
    let mut late = BTreeSet::new();
    for round in 0..3 {
        late.extend(condemn(&world, &made).await);
        // One that was not held up does what is to be done; the bytes come again, on any way.
        if round > 0 {
            world.artifacts.collect().await.unwrap();
        }
        made = match round {
            0 => world.put("put", &bytes).await,
            1 => world.upload(announced("known", &bytes), &bytes).await.unwrap(),
            _ => world.upload(spec("streamed"), &bytes).await.unwrap(),
        };
        for key in &late {
            world.artifacts.0.store.delete(key).await.unwrap();
        }
        assert_eq!(world.bytes(&made).await.unwrap(), bytes, "round {round}");
    }
    assert_eq!(late.len(), 3);
    world.artifacts.collect().await.unwrap();
    assert_eq!(world.bytes(&made).await.unwrap(), bytes);
    assert_eq!(world.stored().len(), 1);
}

async fn bytes_that_were_condemned_while_they_were_kept_are_not_listed(world: World) {
    let bytes = noise(1_000, 1);
    let artifacts = &world.artifacts;
    let digest = super::digest(&bytes);
    let origin = crate::artifacts::Artifacts::origin(&caller("a"));
    let new = artifacts.new_artifact(&"a".into(), &spec("slow"), origin, digest, 1_000);
    let slow = artifacts.commit(new, None, async |key| {
        world.clock.advance(HOUR);
        assert_eq!(artifacts.collect().await.unwrap().files, 0);
        artifacts.0.store.put(&key, bytes.clone()).await
    });
    assert_eq!(reason(Box::pin(slow).await), Reason::Conflict);
    assert!(world.listed().await.is_empty());
    let made = world.put("again", &bytes).await;
    assert_eq!(world.stored().len(), 2);
    artifacts.collect().await.unwrap();
    assert_eq!(world.stored().len(), 1);
    assert_eq!(world.bytes(&made).await.unwrap(), bytes);
}

async fn bytes_of_a_version_without_generations_stay_and_go(world: World) {
    let bytes = noise(1_000, 1);
    let made = world.put("old", &bytes).await;
    let old = Key { generation: String::new(), ..made.key.clone() };
    let store = &world.artifacts.0.store;
    store.put(&old, bytes.clone()).await.unwrap();
    store.delete(&made.key).await.unwrap();
    world.db.write(|tx| Box::pin(rows::forget_generations(tx))).await.unwrap();

    let second = world.put("second", &bytes).await;
    assert_eq!(second.key, old);
    for id in [made.id, second.id] {
        let artifact = world.artifacts.get(&caller("a"), id).await.unwrap();
        assert_eq!(world.bytes(&artifact).await.unwrap(), bytes);
    }
    assert_eq!(world.stored().len(), 1);
    world.artifacts.delete(&"a".into(), made.id).await.unwrap();
    assert_eq!(condemn(&world, &second).await, std::slice::from_ref(&old));
    let third = world.put("third", &bytes).await;
    assert_ne!(third.key, old);
    assert_eq!(world.artifacts.collect().await.unwrap().files, 1);
    assert_eq!(store.size(&old).await.unwrap(), None);
    assert_eq!(world.bytes(&third).await.unwrap(), bytes);
}

async fn what_a_collector_left_when_it_died_is_deleted(world: World) {
    let bytes = noise(1_000, 1);
    let made = world.put("a", &bytes).await;
    let left = condemn(&world, &made).await;
    assert_eq!(left, [made.key]);
    // It died before the deletion, or right after it.
    for is_deleted in [false, true] {
        if is_deleted {
            let made = world.put("b", &bytes).await;
            let left = condemn(&world, &made).await;
            world.artifacts.0.store.delete(&left[0]).await.unwrap();
        }
        let done = world.artifacts.collect().await.unwrap();
        let found = if is_deleted { (0, 0) } else { (1, 1_000) };
        assert_eq!((done.files, done.bytes), found);
        assert!(world.stored().is_empty());
        assert_eq!(world.artifacts.collect().await.unwrap().files, 0);
    }
}

async fn parts_on_their_way_stay_where_their_bytes_will_be(world: World) {
    let bytes = noise(LARGE, 1);
    let me = caller("a");
    let upload = world.artifacts.begin(&me, announced("a", &bytes)).await.unwrap();
    let mut receiver = world.artifacts.receive(upload.clone(), 0).await.unwrap();
    for piece in pieces(&bytes.slice(..LARGE - 1)) {
        receiver.write(piece).await.unwrap();
    }
    let kept = receiver.pause().await.unwrap();
    assert!(kept > 0);
    world.clock.advance(Duration::from_hours(20));
    assert_eq!(world.artifacts.collect().await.unwrap().files, 0);
    let upload = world.artifacts.upload(&me, upload.id).await.unwrap();
    let made = world.send(upload, kept, &bytes).await.unwrap();
    assert_eq!(world.bytes(&made).await.unwrap(), bytes);
    // Nothing was kept elsewhere on the way.
    assert_eq!(world.stored().len(), 1);
    assert_eq!(world.artifacts.collect().await.unwrap().files, 0);
}
