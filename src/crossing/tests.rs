//! Tokens across two servers' insides, over a real Redis and the database that
//! `BATON_TEST_POSTGRES` names.

use std::sync::Arc;

use futures_util::StreamExt as _;

use super::{Carrier, Export, Follow};
use crate::{
    id::TaskId,
    instances::hints::Hints,
    pb::task_event::Body,
    redis::testing::Server as Redis,
    runners::tests::world::{Runner, World},
    tasks::history::{History, Options, TaskStream},
};

/// A server's inside, and its part of the wire.
async fn server(dir: &Arc<tempfile::TempDir>, redis: &Redis) -> World {
    let (hints, outgoing) = Hints::new(crate::clock::Clock::system());
    let world = World::beside(dir.clone(), hints.clone()).await;
    let me = world.parts.standing.id().unwrap();
    let (connection, _) = redis.connect().await;
    let follow = Follow::new(
        history(&world),
        world.parts.tail.clone(),
        me,
        world.parts.standing.clone(),
        hints.clone(),
    );
    let carrier = Carrier {
        redis: connection.clone(),
        bells: connection.bells().await.unwrap(),
        me,
        hints: hints.clone(),
        inlet: follow.inlet(),
        registry: world.registry.clone(),
        tail: world.parts.tail.clone(),
    };
    carrier.start(outgoing.hints, &world.supervisor).await.unwrap();
    let (relay, clock) = (world.parts.relay.clone(), world.clock.clone());
    let export = Export::new(relay, clock, hints, connection, outgoing.asked);
    world.supervisor.spawn_loop("export", export.run());
    world.supervisor.spawn_loop("follow", follow.run());
    world
}

fn history(world: &World) -> History {
    History {
        db: world.parts.db.clone(),
        blobs: world.parts.blobs.clone(),
        relay: world.parts.relay.clone(),
        clock: world.clock.clone(),
    }
}

fn stream(world: &World, task: TaskId) -> TaskStream {
    history(world).follow(task, 0, Options::default())
}

/// Reads until the token of that index has come; checks that nothing is missing or doubled.
async fn read_to(stream: &mut TaskStream, last: &mut (u64, u64), index: u64) {
    let reading = async {
        while last.1 <= index {
            let event = stream.next().await.unwrap().unwrap().event().unwrap();
            assert_eq!(event.sequence, last.0 + 1);
            last.0 = event.sequence;
            if let Some(Body::Token(token)) = event.body {
                assert_eq!(token.index, last.1);
                last.1 += 1;
            }
        }
    };
    let bound = crate::redis::testing::BOUND;
    assert!(tokio::time::timeout(bound, reading).await.is_ok(), "no token after {last:?}");
}

fn texts(n_tokens: usize) -> Vec<&'static str> {
    vec!["a "; n_tokens]
}

/// P7, P8: what is not stored yet comes over the wire, what the wire lost is read where it is
/// stored, and a reader sees each once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs the server that BATON_TEST_POSTGRES names"]
async fn tokens_cross_once_and_in_order_whatever_becomes_of_the_wire() {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let mut redis = Redis::start();
    let (near, far) = (server(&dir, &redis).await, server(&dir, &redis).await);
    let id = far.submit().await;
    // From before the start, when nobody knows who will run it.
    let (mut reader, mut last) = (stream(&far, id), (0, 0));
    let first = reader.next().await.unwrap().unwrap().event().unwrap();
    last.0 = first.sequence;
    let mut runner = Runner::connect(&near);
    let fence = near.rerun(&runner, id).await;
    runner.tokens(&near, fence, 1, &texts(10));
    // Nothing is recorded: these came over the wire.
    read_to(&mut reader, &mut last, 9).await;
    runner.tokens(&near, fence, 11, &texts(10));
    read_to(&mut reader, &mut last, 19).await;
    near.record().await;
    redis.command("FLUSHALL");
    runner.tokens(&near, fence, 21, &texts(10));
    read_to(&mut reader, &mut last, 29).await;
    redis.kill();
    runner.tokens(&near, fence, 31, &texts(10));
    near.record().await;
    read_to(&mut reader, &mut last, 39).await;
    redis.restart();
    // The wire is found again, since somebody asks for it again.
    let (mut index, clock) = (40, crate::clock::Clock::system());
    let until = clock.mono() + crate::redis::testing::BOUND;
    loop {
        index += 1;
        runner.tokens(&near, fence, index, &texts(1));
        let soon = std::time::Duration::from_millis(200);
        let came = tokio::time::timeout(soon, read_to(&mut reader, &mut last, index - 1));
        if came.await.is_ok() {
            break;
        }
        assert!(clock.mono() < until, "the wire was not found again");
    }
    runner.finish(&near, fence, index + 1);
    let mut events = 0;
    while let Some(frame) = reader.next().await {
        let event = frame.unwrap().event().unwrap();
        assert_eq!(event.sequence, last.0 + 1);
        last.0 += 1;
        events += 1;
    }
    assert!(events > 0, "no end");
    // Late readers, here and there, find the same.
    for world in [&near, &far] {
        let all: Vec<_> = stream(world, id).collect().await;
        assert_eq!(all.len() as u64, last.0);
    }
}

/// The local path pays nothing for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs the server that BATON_TEST_POSTGRES names"]
async fn nothing_is_sent_that_nobody_elsewhere_reads() {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let redis = Redis::start();
    let (near, _far) = (server(&dir, &redis).await, server(&dir, &redis).await);
    let mut runner = Runner::connect(&near);
    let fence = near.run(&runner).await;
    let (mut reader, mut last) = (stream(&near, fence.task), (0, 0));
    runner.tokens(&near, fence, 1, &texts(100));
    read_to(&mut reader, &mut last, 99).await;
    assert_eq!(redis.command("EXISTS baton:f:x"), ":0");
    let keys = redis.command("DBSIZE");
    // The era of the data, and no inbox.
    assert_eq!(keys, ":1", "{keys}");
}
