//! Claims about recording, archiving and reading a task's stream, over a real database.

use std::{sync::Arc, time::Duration};

use bytes::{BufMut, Bytes};
use futures_util::{FutureExt, StreamExt, TryStreamExt};
use prost::Message;
use tokio_util::sync::CancellationToken;

use super::{
    archive::Archiver,
    history::{History, Options, TaskStream},
    ledger::{
        self,
        tests::{Bench, new_task},
    },
    model::{Task, Usage},
    recorder::Recorder,
    recovery,
    state::{Event, Outcome},
    transcripts,
};
use crate::{
    clock::Micros,
    error::{Kind, Reason},
    events::frame,
    id::{InstanceId, TaskId},
    instances::{Duty, Heartbeat, Lock, Standing},
    pb::{self, task_event::Body},
    relay::{Encoded, Limits, Log, Relay},
};

/// What one task's life needs.
struct Life {
    bench: Bench,
    recorder: Recorder,
    archiver: Archiver,
    duty: Duty,
}

impl Life {
    async fn new() -> Self {
        let bench = Bench::new().await;
        Self::over(bench)
    }

    fn over(bench: Bench) -> Self {
        let parts = bench.parts.clone();
        let recorder =
            Recorder::new(parts.relay, bench.ledger.clone(), parts.clock.clone(), parts.metrics);
        let duty = Standing::alone(parts.clock.clone()).duty(Lock::Archive);
        let archiver =
            Archiver::new(parts.db, parts.blobs, parts.clock, parts.entropy, duty.clone());
        Self { bench, recorder, archiver, duty }
    }

    async fn archive(&self) -> crate::error::Result<usize> {
        let mandate = self.duty.mandate().unwrap();
        self.archiver.run_once(&mandate).await
    }

    /// A reader over `relay`: the server's own, or a new one, which knows nothing.
    fn history(&self, relay: Relay) -> History {
        let parts = &self.bench.parts;
        History {
            db: parts.db.clone(),
            blobs: parts.blobs.clone(),
            relay,
            clock: parts.clock.clone(),
        }
    }

    fn live(&self) -> History {
        self.history(self.bench.parts.relay.clone())
    }

    fn stored(&self) -> History {
        self.history(Relay::default())
    }

    async fn running(&self) -> (Arc<Task>, Arc<Log>) {
        let id = self.bench.submit(new_task()).await.task.id;
        let task = self.bench.start(id).await.unwrap();
        let log = self.bench.parts.relay.find(id).unwrap();
        (task, log)
    }

    async fn end(&self, task: &Task) -> Arc<Task> {
        self.bench.finish(task, Outcome::Success(None)).await.unwrap()
    }
}

/// Appends what the runner's events `from..=to` make: a stage every tenth, else tokens.
fn append(log: &Arc<Log>, task: &Task, from: u64, to: u64) {
    let count = (to + 1 - from) as usize;
    let appended = log.append(task.attempt, from, count, |_, sequence, index, buffer| {
        let (body, encoded) = if sequence % 10 == 0 {
            let stage = pb::StageEvent { name: "S".into(), ..Default::default() };
            (Body::Stage(stage), Encoded::Timeline)
        } else {
            let text = format!("t{sequence} ");
            (Body::Token(pb::TokenEvent { text, index }), Encoded::Token)
        };
        buffer.put_slice(&frame::encode(sequence, Micros(7), task.attempt, body));
        encoded
    });
    assert_eq!(appended.unwrap().accepted, count);
}

async fn all(stream: TaskStream) -> Vec<Bytes> {
    stream.map_ok(|frame| frame.0).try_collect().await.unwrap()
}

fn sequences(frames: &[Bytes]) -> Vec<u64> {
    frames.iter().map(|bytes| frame::sequence(bytes).unwrap()).collect()
}

#[tokio::test]
async fn a_reader_gets_the_same_bytes_from_log_segments_and_transcript() {
    let life = Life::new().await;
    let (task, log) = life.running().await;
    let early = life.live().follow(task.id, 0, Options::default());
    append(&log, &task, 1, 300);
    assert_eq!(life.recorder.run_once().await.unwrap(), 1);
    assert_eq!(log.durable_index(1), Some(300));
    append(&log, &task, 301, 700);
    let other = life.running().await;
    life.end(&task).await;
    life.end(&other.0).await;

    let early = all(early).await;
    assert_eq!(sequences(&early), (1..=703).collect::<Vec<_>>());
    for round in 0..2 {
        for after in [0, 1, 2, 9, 10, 299, 302, 303, 700, 702, 703] {
            let late = life.stored().follow(task.id, after, Options::default());
            assert_eq!(all(late).await, early[after as usize..], "round {round} after {after}");
        }
        let beyond = life.stored().follow(task.id, 704, Options::default()).next().await;
        assert_eq!(beyond.unwrap().unwrap_err().kind(), Kind::OutOfRange);
        if round == 0 {
            assert_eq!(life.archive().await.unwrap(), 1);
            assert_eq!(life.archive().await.unwrap(), 0);
        }
    }
    let (segments, _) = life
        .bench
        .parts
        .db
        .read(move |tx| {
            Box::pin(async move { transcripts::segments(tx, task.id, 0, usize::MAX).await })
        })
        .await
        .unwrap();
    assert!(segments.is_empty());
    assert_eq!(
        sequences(&all(life.stored().follow(other.0.id, 0, Options::default())).await),
        [1, 2, 3]
    );
}

#[tokio::test]
async fn what_could_not_be_recorded_is_recorded_later() {
    let life = Life::new().await;
    let (task, log) = life.running().await;
    append(&log, &task, 1, 20);
    let parts = life.bench.parts.clone();
    let (dead, writer) = ledger::new(parts.clone());
    drop(writer);
    let failing = Recorder::new(parts.relay.clone(), dead, parts.clock, parts.metrics);
    assert!(failing.run_once().await.is_err());
    assert_eq!(log.durable_index(1), Some(0));
    append(&log, &task, 21, 30);
    assert_eq!(life.recorder.run_once().await.unwrap(), 1);
    assert_eq!(log.durable_index(1), Some(30));
    life.end(&task).await;
    let whole = all(life.stored().follow(task.id, 0, Options::default())).await;
    assert_eq!(sequences(&whole), (1..=33).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_large_transcript_is_read_window_by_window() {
    let life = Life::new().await;
    let (task, log) = life.running().await;
    let mut index = 1;
    for _ in 0..40 {
        append(&log, &task, index, index + 900);
        index += 901;
        life.recorder.run_once().await.unwrap();
    }
    let end = life.end(&task).await.last_sequence;
    life.archive().await.unwrap();
    for after in [0, 17, 20_000, end - 1] {
        let late = all(life.stored().follow(task.id, after, Options::default())).await;
        assert_eq!(sequences(&late), (after + 1..=end).collect::<Vec<_>>());
    }
}

#[tokio::test]
async fn a_reader_left_behind_goes_back_to_storage_and_comes_again() {
    let limits = Limits { log_bytes: 1_000, batch_bytes: 100, ..Limits::default() };
    let life = Life::over(Bench::new().await.restarted(Relay::new(limits)));
    let (task, log) = life.running().await;
    let mut slow = life.live().follow(task.id, 0, Options::default());
    let mut seen = Vec::new();
    let mut index = 1;
    for _ in 0..30 {
        append(&log, &task, index, index + 49);
        index += 50;
        life.recorder.run_once().await.unwrap();
        for _ in 0..20 {
            seen.push(slow.next().await.unwrap().unwrap().0);
        }
    }
    let end = life.end(&task).await.last_sequence;
    seen.extend(all(slow).await);
    assert_eq!(sequences(&seen), (1..=end).collect::<Vec<_>>());
}

#[tokio::test]
async fn what_a_crash_lost_is_an_explicit_gap_for_every_reader() {
    let life = Life::new().await;
    let (task, log) = life.running().await;
    append(&log, &task, 1, 10);
    life.recorder.run_once().await.unwrap();
    append(&log, &task, 11, 20);
    let seen = life.live().follow(task.id, 0, Options::default()).take(22);
    let seen: Vec<Bytes> = seen.map_ok(|frame| frame.0).try_collect().await.unwrap();
    assert_eq!(sequences(&seen), (1..=22).collect::<Vec<_>>());

    let life = Life::over(life.bench.restarted(Relay::default()));
    recovery::running(&life.bench.parts).await.unwrap();
    let waiting = life.live().follow(task.id, 22, Options::default());
    let lose = Event::Lose { attempt: 1, reason: "gone".into() };
    let reserved = task.reserved_sequence;
    life.bench.ledger.apply(task.id, lose).await.unwrap();
    let second = life.bench.start(task.id).await.unwrap();
    let end = life.end(&second).await.last_sequence;

    for (after, stream) in [
        (22, waiting),
        (12, life.stored().follow(task.id, 12, Options::default())),
        (15, life.stored().follow(task.id, 15, Options::default())),
    ] {
        let frames = all(stream).await;
        let expected: Vec<u64> = (reserved..=end).collect();
        assert_eq!(sequences(&frames), expected, "after {after}");
        let gap = pb::TaskEvent::decode(&frames[0][..]).unwrap();
        let Some(Body::Gap(gap)) = gap.body else { panic!("a gap, not {gap:?}") };
        assert_eq!(gap.first_sequence, 13);
    }
    let whole = all(life.stored().follow(task.id, 0, Options::default())).await;
    assert_eq!(whole[..12], seen[..12], "what was recorded is as it was shown");
    assert_eq!(sequences(&whole)[12], reserved);
}

#[tokio::test]
async fn the_transcript_of_a_deleted_task_is_collected() {
    let life = Life::new().await;
    let mut ids: Vec<TaskId> = Vec::new();
    for _ in 0..2 {
        let (task, log) = life.running().await;
        append(&log, &task, 1, 5);
        life.end(&task).await;
        ids.push(task.id);
    }
    assert_eq!(life.archive().await.unwrap(), 2, "both in one blob");
    let blobs = |life: &Life| {
        let blobs = life.bench.parts.blobs.clone();
        async move {
            let mut n_blobs = 0;
            for shard in 0..=255 {
                n_blobs += blobs.list(shard).await.unwrap().len();
            }
            n_blobs
        }
    };
    for (deleted, id) in ids.into_iter().enumerate() {
        assert_eq!(blobs(&life).await, 1, "one refers to it, with {deleted} deleted");
        life.bench.ledger.delete("default".into(), id).await.unwrap();
        let gone = life.stored().follow(id, 0, Options::default()).next().await;
        assert_eq!(gone.unwrap().unwrap_err().reason(), Reason::NotFound);
        for shard in 0..=255 {
            life.archiver.collect(shard).await.unwrap();
        }
    }
    assert_eq!(blobs(&life).await, 0);
}

#[tokio::test]
async fn a_server_that_lost_the_lock_archives_nothing() {
    let life = Life::new().await;
    let parts = &life.bench.parts;
    let instance = || Heartbeat {
        db: parts.db.clone(),
        clock: parts.clock.clone(),
        standing: Standing::among(
            InstanceId::new(parts.clock.now(), &parts.entropy),
            Duration::from_secs(15),
            parts.clock.clone(),
        ),
        address: "127.0.0.1:7070".into(),
        leaving: CancellationToken::new(),
    };
    let (one, other) = (instance(), instance());
    one.run_once().await.unwrap();
    let old = one.standing.duty(Lock::Archive).mandate().unwrap();
    one.leaving.cancel();
    one.run_once().await.unwrap();
    other.run_once().await.unwrap();
    let new = other.standing.duty(Lock::Archive).mandate().unwrap();

    let (task, log) = life.running().await;
    append(&log, &task, 1, 5);
    life.end(&task).await;
    let seen = all(life.stored().follow(task.id, 0, Options::default())).await;
    let refused = life.archiver.run_once(&old).await;
    assert_eq!(refused.unwrap_err().reason(), Reason::Conflict);
    assert_eq!(life.archiver.run_once(&new).await.unwrap(), 1);
    let refused = life.archiver.run_once(&old).await;
    assert_eq!(refused.unwrap(), 0, "there is nothing left");
    let whole = all(life.stored().follow(task.id, 0, Options::default())).await;
    assert_eq!(whole, seen);
    let mut n_blobs = 0;
    for shard in 0..=255 {
        n_blobs += parts.blobs.list(shard).await.unwrap().len();
    }
    assert_eq!(n_blobs, 2, "what was put in vain is like nothing else");
}

#[tokio::test]
async fn the_text_of_a_result_is_the_last_attempts_tokens_up_to_a_limit() {
    let life = Life::new().await;
    let (first, log) = life.running().await;
    append(&log, &first, 1, 5);
    let lose = Event::Lose { attempt: 1, reason: "gone".into() };
    life.bench.ledger.apply(first.id, lose).await.unwrap();
    let second = life.bench.start(first.id).await.unwrap();
    append(&log, &second, 1, 3);
    let base = second.base_sequence;
    let outcome = Outcome::Success(None);
    let event = Event::Finish { attempt: 2, outcome, usage: Usage::default() };
    let ended = life.bench.ledger.apply(first.id, event).await.unwrap();
    let tokens: Vec<String> = (base + 1..base + 4)
        .filter(|sequence| sequence % 10 != 0)
        .map(|sequence| format!("t{sequence} "))
        .collect();
    let wanted = tokens.concat();
    assert_eq!(life.stored().text(&ended, 1_000).await.unwrap(), (wanted.clone(), false));
    let (cut, was_cut) = life.stored().text(&ended, wanted.len() - 1).await.unwrap();
    assert!(was_cut && wanted.starts_with(&cut));
}

#[tokio::test]
async fn a_batch_window_gathers_what_comes_within_it() {
    let life = Life::new().await;
    let (task, log) = life.running().await;
    let window = Duration::from_millis(100);
    let options = Options { tagged: true, window: Some(window) };
    let mut stream = life.live().follow(task.id, 2, options);
    append(&log, &task, 1, 1);
    let first = stream.next().await.unwrap().unwrap().event().unwrap();
    assert_eq!((first.task_id, first.sequence), (task.id.to_string(), 3));
    assert!(stream.next().now_or_never().is_none());
    append(&log, &task, 2, 4);
    assert!(stream.next().now_or_never().is_none(), "the window is open");
    life.bench.parts.clock.advance(window);
    for sequence in 4..=6 {
        let frame = stream.next().now_or_never().unwrap().unwrap().unwrap();
        assert_eq!(frame.event().unwrap().sequence, sequence);
    }
}

#[test]
fn a_tagged_frame_is_the_same_event_with_its_task() {
    let id: TaskId = "01890a5d-ac96-774b-bcce-b302099a8057".parse().unwrap();
    let body = Body::Token(pb::TokenEvent { text: "x".into(), index: 3 });
    let plain = frame::encode(9, Micros(1), 1, body);
    let tagged = pb::TaskEvent::decode(super::history::tag(id, &plain)).unwrap();
    assert_eq!(tagged.task_id, id.to_string());
    let untagged = pb::TaskEvent { task_id: String::new(), ..tagged };
    assert_eq!(untagged, pb::TaskEvent::decode(plain).unwrap());
}
