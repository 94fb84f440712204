//! What holds of artifacts on local files and on a bucket alike: each claim is a function of a
//! [`World`], run on both.

#[cfg(feature = "postgres")]
mod rivals;
mod rows;
mod world;

use std::{path::PathBuf, time::Duration};

use bytes::Bytes;
use proptest::prelude::*;

use self::world::{World, announced, attempt, caller, digest, noise, pieces, reason, spec};
use super::model::{Collected, Spec};
use crate::{
    blob::Store,
    error::{Kind, Reason},
    id::{Entropy, Namespace, TaskId},
    keys::{Grant, Principal},
};

const HOUR: Duration = Duration::from_hours(1);
/// More than two parts of a bucket, and more than one sync of a file.
const LARGE: usize = (40 << 20) + 12_345;

/// Each claim on each store.
macro_rules! on_both {
    ($($(#[$doc:meta])* $claim:ident,)+) => {
        mod on_files {
            use super::*;
            $($(#[$doc])* #[tokio::test] async fn $claim() { super::$claim(World::files().await).await; })+
        }
        mod on_a_bucket {
            use super::*;
            $($(#[$doc])* #[tokio::test] async fn $claim() { super::$claim(World::bucket().await).await; })+
        }
    };
}

mod garbage;

on_both! {
    what_is_put_is_found_whole_and_in_parts,
    /// P14.
    nothing_but_the_announced_bytes_is_listed,
    /// P14.
    an_upload_is_seen_by_nobody_before_its_end,
    an_upload_goes_on_where_it_was_after_a_crash,
    the_same_announcement_is_the_same_upload,
    a_completed_upload_is_one_artifact_however_often_it_is_completed,
    the_same_bytes_are_kept_once_and_as_long_as_anything_has_them,
    /// P14.
    what_a_task_reads_is_not_collected,
    what_nobody_completes_is_collected,
    /// P5.
    an_attempt_without_its_lease_makes_nothing,
    /// P20.
    namespaces_do_not_see_each_other,
    limits_are_named_when_they_are_reached,
    two_writers_at_one_upload_do_not_mix,
}

async fn what_is_put_is_found_whole_and_in_parts(world: World) {
    for bytes in [noise(0, 1), noise(1, 2), noise(5_000_000, 3), noise(LARGE, 4)] {
        let small = world.put("small", &bytes).await;
        let streamed = world.upload(spec("streamed"), &bytes).await.unwrap();
        let known = world.upload(announced("known", &bytes), &bytes).await.unwrap();
        for artifact in [&small, &streamed, &known] {
            assert_eq!(artifact.size, bytes.len() as u64);
            assert_eq!(artifact.key.digest, digest(&bytes));
            assert_eq!(world.bytes(artifact).await.unwrap(), bytes);
            let found = world.artifacts.get(&caller("a"), artifact.id).await.unwrap();
            assert_eq!(&found, artifact);
            let (size, stored) = world.artifacts.inspect(artifact).await.unwrap();
            assert_eq!((size, stored), (artifact.size, Some(artifact.key.digest)));
        }
        let n = bytes.len();
        for (offset, limit) in [(0, 1), (n / 2, n / 3), (n, 1), (n.saturating_sub(1), 100)] {
            let found = world.range(&small, offset as u64, Some(limit as u64)).await.unwrap();
            assert_eq!(found, bytes.slice(offset.min(n)..(offset + limit).min(n)));
        }
        assert!(world.range(&small, n as u64 + 1, None).await.is_err());
    }
    assert_eq!(world.listed().await.len(), 12);
}

async fn nothing_but_the_announced_bytes_is_listed(world: World) {
    let bytes = noise(9_000_000, 1);
    let mut other = bytes.to_vec();
    other[8_000_000] ^= 1;
    let other = Bytes::from(other);
    let short = bytes.slice(..8_999_999);
    let wrong = [
        (Spec { digest: Some(digest(&other)), ..spec("a") }, &bytes),
        (announced("a", &bytes), &other),
        (Spec { size: Some(9_000_001), ..spec("a") }, &bytes),
        (Spec { size: Some(8_999_999), ..spec("a") }, &bytes),
        (announced("b", &bytes), &short),
    ];
    for (spec, bytes) in wrong {
        let put = world.artifacts.put(&caller("a"), spec.clone(), bytes.clone()).await;
        assert_eq!(reason(put), Reason::DigestMismatch);
        assert_eq!(reason(world.upload(spec, bytes).await), Reason::DigestMismatch);
        world.clock.advance(25 * HOUR);
        world.artifacts.collect().await.unwrap();
    }
    assert!(world.listed().await.is_empty());
    world.clock.advance(HOUR);
    world.artifacts.collect().await.unwrap();
    assert_eq!(world.stored(), Vec::<PathBuf>::new());
}

async fn an_upload_is_seen_by_nobody_before_its_end(world: World) {
    let bytes = noise(LARGE, 1);
    let upload = world.artifacts.begin(&caller("a"), announced("a", &bytes)).await.unwrap();
    let mut receiver = world.artifacts.receive(upload.clone(), 0).await.unwrap();
    for piece in pieces(&bytes) {
        receiver.write(piece).await.unwrap();
        assert!(world.listed().await.is_empty());
    }
    let digits = digest(&bytes).to_string();
    let is_kept = |path: &PathBuf| path.to_string_lossy().contains(&digits[2..]);
    let kept = || world.stored().into_iter().filter(is_kept).count();
    assert_eq!(kept(), 0);
    let made = receiver.finish().await.unwrap();
    assert_eq!(world.listed().await, [made.id]);
    assert_eq!(kept(), 1);
    let found = world.artifacts.0.store.size(&made.key).await.unwrap();
    assert_eq!(found, Some(LARGE as u64));
}

async fn an_upload_goes_on_where_it_was_after_a_crash(mut world: World) {
    let bytes = noise(LARGE, 1);
    let upload = world.artifacts.begin(&caller("a"), announced("a", &bytes)).await.unwrap();
    let (mut offset, mut crashes) = (0, 0);
    // Dies whenever more has become safe, and three bytes later.
    'dead: loop {
        let again = world.artifacts.upload(&caller("a"), upload.id).await.unwrap();
        assert!(again.received >= offset, "{} bytes were lost", offset - again.received);
        offset = again.received;
        let mut receiver = world.artifacts.resume(&caller("a"), upload.id, offset).await.unwrap();
        for piece in pieces(&bytes.slice(offset as usize..)) {
            receiver.write(piece).await.unwrap();
            let now = world.artifacts.upload(&caller("a"), upload.id).await.unwrap().received;
            if now > offset {
                drop(receiver);
                world = world.restart().await;
                crashes += 1;
                continue 'dead;
            }
        }
        let made = receiver.finish().await.unwrap();
        assert_eq!(world.bytes(&made).await.unwrap(), bytes);
        break;
    }
    assert!(crashes > 0, "nothing was safe before the end");
    let wrong = world.artifacts.begin(&caller("a"), announced("b", &noise(100, 9))).await.unwrap();
    let resumed = world.artifacts.resume(&caller("a"), wrong.id, 50).await.map(|_| ());
    assert_eq!(reason(resumed), Reason::InvalidParams);
}

async fn the_same_announcement_is_the_same_upload(world: World) {
    let bytes = noise(LARGE, 1);
    let begin = |name: &str| {
        let (artifacts, spec) = (world.artifacts.clone(), announced(name, &bytes));
        async move { artifacts.begin(&caller("a"), spec).await.unwrap() }
    };
    let first = begin("a").await;
    let mut receiver = world.artifacts.receive(first.clone(), 0).await.unwrap();
    for piece in pieces(&bytes.slice(..LARGE - 1)) {
        receiver.write(piece).await.unwrap();
    }
    let kept = receiver.pause().await.unwrap();
    assert!(kept > 0);
    let again = begin("a").await;
    assert_eq!((again.id, again.received), (first.id, kept));
    assert_ne!(begin("b").await.id, first.id);
    let made = world.send(again, kept, &bytes).await.unwrap();
    assert_eq!(world.bytes(&made).await.unwrap(), bytes);
    assert_ne!(begin("a").await.id, first.id, "a completed one is over");
}

async fn a_completed_upload_is_one_artifact_however_often_it_is_completed(world: World) {
    let bytes = noise(100_000, 1);
    let me = caller("a");
    let upload = world.artifacts.begin(&me, announced("a", &bytes)).await.unwrap();
    let early = world.artifacts.complete(&me, upload.id).await;
    assert_eq!(reason(early), Reason::StateConflict);
    let made = world.send(upload.clone(), 0, &bytes).await.unwrap();
    for _ in 0..2 {
        assert_eq!(world.artifacts.complete(&me, upload.id).await.unwrap(), made);
    }
    let resumed = world.artifacts.resume(&me, upload.id, 0).await.map(|_| ());
    assert_eq!(reason(resumed), Reason::StateConflict);
    // What the namespace has need not be sent again.
    let second = world.artifacts.begin(&me, announced("b", &bytes)).await.unwrap();
    let linked = world.artifacts.complete(&me, second.id).await.unwrap();
    assert_eq!((linked.key.clone(), linked.name.as_str()), (made.key.clone(), "b"));
    assert_eq!(world.stored().len(), 1);
}

async fn the_same_bytes_are_kept_once_and_as_long_as_anything_has_them(world: World) {
    let bytes = noise(100_000, 1);
    let (first, second) = (world.put("a", &bytes).await, world.put("b", &bytes).await);
    assert_eq!(world.stored().len(), 1);
    let a: Namespace = "a".into();
    assert!(world.artifacts.delete(&a, first.id).await.unwrap());
    assert!(!world.artifacts.delete(&a, first.id).await.unwrap());
    world.clock.advance(HOUR);
    assert_eq!(world.artifacts.collect().await.unwrap(), Collected::default());
    assert_eq!(world.bytes(&second).await.unwrap(), bytes);
    world.artifacts.delete(&a, second.id).await.unwrap();
    let expected = Collected { files: 1, bytes: 100_000, ..Collected::default() };
    assert_eq!(world.artifacts.collect().await.unwrap(), expected);
    assert_eq!(world.stored(), Vec::<PathBuf>::new());
    let third = world.put("c", &bytes).await;
    assert_eq!(world.bytes(&third).await.unwrap(), bytes);
}

async fn what_a_task_reads_is_not_collected(world: World) {
    let bytes = noise(1_000, 1);
    let mut input = spec("input");
    input.ttl = Some(HOUR);
    let input = world.artifacts.put(&caller("a"), input, bytes.clone()).await.unwrap();
    let a: Namespace = "a".into();
    let task = world.run_task(1, "RUNNING").await;
    world.artifacts.refer(&a, task, vec![input.id]).await.unwrap();
    assert_eq!(reason(world.artifacts.delete(&a, input.id).await), Reason::StateConflict);
    world.clock.advance(48 * HOUR);
    assert_eq!(world.artifacts.collect().await.unwrap(), Collected::default());
    assert_eq!(world.bytes(&input).await.unwrap(), bytes);
    assert!(world.listed().await.is_empty(), "its time is over for everybody else");
    assert_eq!(reason(world.artifacts.get(&caller("a"), input.id).await), Reason::NotFound);
    assert!(world.artifacts.get(&attempt(task, 1), input.id).await.is_ok());
    // An expired artifact is no input for new tasks.
    let late = world.artifacts.refer(&a, world.run_task(2, "QUEUED").await, vec![input.id]).await;
    assert_eq!(reason(late), Reason::NotFound);
    world
        .db
        .write(move |tx| Box::pin(async move { rows::end_task(tx, task).await }))
        .await
        .unwrap();
    let done = world.artifacts.collect().await.unwrap();
    assert_eq!(done, Collected { artifacts: 1, files: 1, bytes: 1_000, ..Collected::default() });
    // A reference of a task that was never accepted counts for an hour.
    let other = world.put("other", &bytes).await;
    let never = TaskId::new(world.clock.now(), &Entropy::seeded(5));
    world.artifacts.refer(&a, never, vec![other.id]).await.unwrap();
    assert_eq!(reason(world.artifacts.delete(&a, other.id).await), Reason::StateConflict);
    world.clock.advance(2 * HOUR);
    assert!(world.artifacts.delete(&a, other.id).await.unwrap());
}

async fn what_nobody_completes_is_collected(world: World) {
    let bytes = noise(LARGE, 1);
    let me = caller("a");
    let upload = world.artifacts.begin(&me, announced("a", &bytes)).await.unwrap();
    let mut receiver = world.artifacts.receive(upload.clone(), 0).await.unwrap();
    for piece in pieces(&bytes.slice(..LARGE - 1)) {
        receiver.write(piece).await.unwrap();
    }
    receiver.pause().await.unwrap();
    assert!(!world.stored().is_empty());
    world.clock.advance(23 * HOUR);
    assert_eq!(world.artifacts.collect().await.unwrap(), Collected::default());
    world.clock.advance(2 * HOUR);
    let done = world.artifacts.collect().await.unwrap();
    assert_eq!(done, Collected { uploads: 1, ..Collected::default() });
    assert_eq!(world.stored(), Vec::<PathBuf>::new());
    let gone = world.artifacts.upload(&me, upload.id).await;
    assert_eq!(reason(gone), Reason::NotFound);
    // One that is given up goes at once.
    let upload = world.artifacts.begin(&me, announced("a", &bytes)).await.unwrap();
    let mut receiver = world.artifacts.receive(upload.clone(), 0).await.unwrap();
    receiver.write(bytes.slice(..20 << 20)).await.unwrap();
    receiver.pause().await.unwrap();
    world.artifacts.abandon(&me, upload.id).await.unwrap();
    world.artifacts.abandon(&me, upload.id).await.unwrap();
    assert_eq!(world.stored(), Vec::<PathBuf>::new());
}

async fn an_attempt_without_its_lease_makes_nothing(world: World) {
    let bytes = noise(1_000, 1);
    let task = world.run_task(2, "RUNNING").await;
    let me = attempt(task, 2);
    let made = world.artifacts.put(&me, spec("a"), bytes.clone()).await.unwrap();
    assert_eq!(made.origin.attempt, Some((task, 2)));
    let stale = attempt(task, 1);
    let put = world.artifacts.put(&stale, spec("b"), bytes.clone()).await;
    assert_eq!(reason(put), Reason::LeaseLost);
    let begun = world.artifacts.begin(&me, announced("c", &noise(5_000, 2))).await.unwrap();
    let other = world.artifacts.upload(&stale, begun.id).await;
    assert_eq!(reason(other), Reason::NotFound);
    world
        .db
        .write(move |tx| Box::pin(async move { rows::end_task(tx, task).await }))
        .await
        .unwrap();
    // The lease ended while the bytes came.
    assert_eq!(reason(world.send(begun, 0, &noise(5_000, 2)).await), Reason::LeaseLost);
    assert_eq!(world.listed().await, [made.id]);
    // Output goes with its task.
    world.clock.advance(HOUR);
    world
        .db
        .write(move |tx| Box::pin(async move { rows::delete_task(tx, task).await }))
        .await
        .unwrap();
    let done = world.artifacts.collect().await.unwrap();
    assert_eq!((done.artifacts, done.files), (1, 1));
}

async fn namespaces_do_not_see_each_other(world: World) {
    let bytes = noise(1_000, 1);
    let (mine, me, other) = (world.put("a", &bytes).await, caller("a"), caller("b"));
    assert_eq!(reason(world.artifacts.get(&other, mine.id).await), Reason::NotFound);
    assert!(!world.artifacts.delete(&other.namespace, mine.id).await.unwrap());
    let task = world.run_task(1, "QUEUED").await;
    let refer = world.artifacts.refer(&other.namespace, task, vec![mine.id]).await;
    assert_eq!(reason(refer), Reason::NotFound);
    assert!(
        world
            .artifacts
            .list(&other.namespace, Default::default(), None, 9)
            .await
            .unwrap()
            .is_empty()
    );
    // Who does not have bytes cannot have them by their digest alone.
    let begun = world.artifacts.begin(&other, announced("a", &bytes)).await.unwrap();
    assert!(!world.artifacts.has_bytes(&begun).await.unwrap());
    let complete = world.artifacts.complete(&other, begun.id).await;
    assert_eq!(reason(complete), Reason::StateConflict);
    assert_eq!(reason(world.artifacts.upload(&me, begun.id).await), Reason::NotFound);
    // An attempt sees what its task reads and made.
    let running = world.run_task(3, "RUNNING").await;
    let runner = attempt(running, 3);
    assert_eq!(reason(world.artifacts.get(&runner, mine.id).await), Reason::NotFound);
    world.artifacts.refer(&me.namespace, running, vec![mine.id]).await.unwrap();
    assert_eq!(world.artifacts.get(&runner, mine.id).await.unwrap().id, mine.id);
    let made = world.artifacts.put(&runner, spec("out"), bytes).await.unwrap();
    assert_eq!(world.artifacts.get(&runner, made.id).await.unwrap().id, made.id);
    let link = Principal { grant: Some(Grant::Artifact(made.id)), ..me };
    assert!(world.artifacts.get(&link, made.id).await.is_ok());
    assert_eq!(reason(world.artifacts.get(&link, mine.id).await), Reason::NotFound);
}

async fn limits_are_named_when_they_are_reached(world: World) {
    let me = caller("a");
    let large = Spec { size: Some((64 << 20) + 1), ..spec("a") };
    let error = world.artifacts.begin(&me, large).await.unwrap_err();
    assert_eq!(error.reason(), Reason::MessageTooLarge);
    let upload = world.artifacts.begin(&me, spec("a")).await.unwrap();
    let mut receiver = world.artifacts.receive(upload, 0).await.unwrap();
    let (piece, mut refused) = (noise(9 << 20, 1), None);
    for _ in 0..8 {
        refused = receiver.write(piece.clone()).await.err();
    }
    assert_eq!(refused.unwrap().reason(), Reason::MessageTooLarge);
    drop(receiver);
    for n in 0..2 {
        world.artifacts.begin(&me, announced("a", &noise(10, n))).await.unwrap();
    }
    let error = world.artifacts.begin(&me, announced("a", &noise(10, 7))).await.unwrap_err();
    assert_eq!((error.kind(), error.reason()), (Kind::ResourceExhausted, Reason::AdmissionReject));
    assert!(error.message().contains("3 uploads"), "{error}");
    let sixty = noise(60 << 20, 2);
    for name in ["a", "b", "c"] {
        world.put(name, &sixty).await;
    }
    let error = world.artifacts.put(&me, spec("d"), sixty.clone()).await.unwrap_err();
    assert!(error.message().contains("188743680 of 209715200"), "{error}");
    let first = world.listed().await[0];
    world.artifacts.delete(&me.namespace, first).await.unwrap();
    world.put("d", &sixty).await;
    // The other namespace has its own.
    world.artifacts.put(&caller("b"), spec("d"), sixty).await.unwrap();
}

async fn two_writers_at_one_upload_do_not_mix(world: World) {
    let bytes = noise(LARGE, 1);
    let upload = world.artifacts.begin(&caller("a"), announced("a", &bytes)).await.unwrap();
    let mut receiver = world.artifacts.receive(upload.clone(), 0).await.unwrap();
    receiver.write(bytes.slice(..2 << 20)).await.unwrap();
    let second = world.artifacts.receive(upload.clone(), 0).await.map(|_| ());
    assert_eq!(reason(second), Reason::StateConflict);
    assert_eq!(
        reason(world.artifacts.abandon(&caller("a"), upload.id).await),
        Reason::StateConflict
    );
    receiver.write(bytes.slice(2 << 20..)).await.unwrap();
    let made = receiver.finish().await.unwrap();
    assert_eq!(world.bytes(&made).await.unwrap(), bytes);
}

/// P14.
#[tokio::test]
async fn a_flipped_bit_is_noticed_by_whoever_reads_the_whole() {
    let world = World::files().await;
    let bytes = noise(3_000_000, 1);
    let made = world.put("a", &bytes).await;
    let path = world.stored().pop().unwrap();
    let mut stored = std::fs::read(&path).unwrap();
    stored[2_000_000] ^= 4;
    std::fs::write(&path, stored).unwrap();
    assert!(world.bytes(&made).await.is_err());
    let (size, found) = world.artifacts.inspect(&made).await.unwrap();
    assert!(size == made.size && found != Some(made.key.digest));
    // The same bytes put again mend it.
    world.put("b", &bytes).await;
    assert_eq!(world.bytes(&made).await.unwrap(), bytes);
    std::fs::remove_file(&path).unwrap();
    let error = world.artifacts.read(&made, 0, None).await.map(|_| ()).unwrap_err();
    assert_eq!(error.reason(), Reason::ArtifactDamaged);
    assert_eq!(world.artifacts.inspect(&made).await.unwrap(), (0, None));
}

#[tokio::test]
async fn a_bucket_that_is_not_there_is_refused_by_name() {
    let settings = crate::blob::s3::Settings {
        bucket: "no-such-bucket".into(),
        endpoint: "http://127.0.0.1:1".into(),
        path_style: true,
        ..Default::default()
    };
    assert!(Store::bucket(&settings).await.is_err());
}

#[test]
fn addresses_of_buckets_are_read_or_refused() {
    use crate::blob::s3::address;
    let read = |text: &str| address(text).map(|(bucket, prefix)| format!("{bucket}|{prefix}"));
    assert_eq!(read("s3://b").as_deref(), Some("b|"));
    assert_eq!(read("s3://b/").as_deref(), Some("b|"));
    assert_eq!(read("s3://b-1.x/a/b/").as_deref(), Some("b-1.x|a/b"));
    for text in ["s3://", "s3:///a", "b", "s3://b/../c", "s3://b/ä", "s3://b c"] {
        assert_eq!(read(text), None, "{text}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn any_range_is_that_range(n in 0_usize..700_000, from in 0.0..1.0, share in 0.0..1.2) {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async {
            let world = World::files().await;
            let bytes = noise(n, 1);
            let made = world.put("a", &bytes).await;
            let from = (n as f64 * from) as usize;
            let length = (n as f64 * share) as usize + 1;
            let found = world.range(&made, from as u64, Some(length as u64)).await.unwrap();
            assert_eq!(found, bytes.slice(from..(from + length).min(n)));
        });
    }
}
