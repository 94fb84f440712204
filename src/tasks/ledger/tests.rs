//! The ledger over a real database file.

use std::time::Duration;

use super::*;
use crate::{
    queue,
    relay::{Encoded, Limits},
    tasks::{
        model::{Failure, RetryPolicy, State},
        reads,
        state::{Event, Limit, Outcome},
    },
};

/// A ledger over a database in a directory of its own.
pub struct Bench {
    /// Handle.
    pub ledger: Ledger,
    /// What it works with.
    pub parts: Parts,
    dir: Arc<tempfile::TempDir>,
}

impl Bench {
    pub async fn new() -> Self {
        Self::on(Arc::new(tempfile::tempdir().unwrap()), Clock::manual()).await
    }

    /// Another server's, on the same database.
    pub async fn rival(&self) -> Self {
        Self::on(self.dir.clone(), self.parts.clock.clone()).await
    }

    async fn on(dir: Arc<tempfile::TempDir>, clock: Clock) -> Self {
        let db = crate::db::testing::open(dir.path()).await;
        let standing = if db.is_shared() {
            let id = InstanceId::new(clock.now(), &Entropy::system());
            Standing::among(id, Duration::from_secs(15), clock.clone())
        } else {
            Standing::alone(clock.clone())
        };
        let parts = Parts {
            db,
            blobs: Blobs::open(dir.path().join("transcripts")).await.unwrap(),
            queue: Queue::new(queue::Limits::default(), clock.clone()),
            clock,
            entropy: Entropy::system(),
            relay: Relay::new(Limits::default()),
            timers: Timers::default(),
            tail: Tail::default(),
            metrics: Metrics::new(),
            standing,
            hints: Default::default(),
        };
        let (ledger, writer) = new(parts.clone());
        #[expect(clippy::disallowed_methods, reason = "the test's runtime ends it")]
        tokio::spawn(writer.run());
        Self { ledger, parts, dir }
    }

    /// The same database after a restart, with a relay that knows nothing.
    pub fn restarted(self, relay: Relay) -> Self {
        let queue = Queue::new(queue::Limits::default(), self.parts.clock.clone());
        let parts = Parts { relay, queue, timers: Timers::default(), ..self.parts };
        let (ledger, writer) = new(parts.clone());
        #[expect(clippy::disallowed_methods, reason = "the test's runtime ends it")]
        tokio::spawn(writer.run());
        Self { ledger, parts, dir: self.dir }
    }

    pub async fn submit(&self, new: NewTask) -> Submitted {
        self.ledger.submit(vec![new]).await.pop().unwrap().unwrap()
    }

    pub async fn start(&self, id: TaskId) -> Result<Arc<Task>> {
        let start = Start {
            task: id,
            runner: "r".into(),
            node: "n".into(),
            engine: "echo".into(),
            engine_version: "1".into(),
            waited: None,
        };
        self.ledger.start(vec![start]).await.pop().unwrap()
    }

    pub async fn finish(&self, task: &Task, outcome: Outcome) -> Result<Arc<Task>> {
        let attempt = task.attempt;
        let event = Event::Finish { attempt, outcome, usage: Default::default() };
        self.ledger.apply(task.id, event).await
    }

    /// Sequences and kinds of the timeline.
    pub async fn timeline(&self, id: TaskId) -> Vec<(u64, &'static str)> {
        let read = self.parts.db.read(move |tx| {
            Box::pin(async move { crate::events::store::list(tx, id, 0, 1000).await })
        });
        let kind = crate::tasks::convert::kind_of;
        read.await.unwrap().iter().map(|event| (event.sequence, kind(&event.frame))).collect()
    }

    pub async fn get(&self, id: TaskId) -> Task {
        let read = self.parts.db.read(move |tx| {
            Box::pin(async move { reads::get(tx, &Namespace::from("default"), id).await })
        });
        read.await.unwrap()
    }
}

pub fn new_task() -> NewTask {
    NewTask {
        id: None,
        namespace: Namespace::from("default"),
        spec: Spec {
            model: "baton/echo".into(),
            version: None,
            input: "{}".into(),
            params: "{}".into(),
            priority: 0,
            labels: Default::default(),
            required_labels: Default::default(),
            deadline: None,
            start_timeout: None,
            execution_timeout: Duration::from_mins(1),
            retry: RetryPolicy { jitter: 0.0, ..RetryPolicy::default() },
            seed: 1,
            session: None,
        },
        not_before: None,
        request_id: None,
        digest: [0; 32],
        retry_of: None,
        traceparent: None,
    }
}

pub fn broken() -> Outcome {
    Outcome::from(Failure {
        reason: "TASK_FAILED".into(),
        message: "boom".into(),
        retryable: true,
        metadata: Default::default(),
    })
}

#[tokio::test]
async fn a_task_goes_from_submit_to_its_end() {
    let bench = Bench::new().await;
    let task = bench.submit(new_task()).await.task;
    assert!(bench.parts.queue.contains(task.id));
    let task = bench.start(task.id).await.unwrap();
    assert_eq!((task.state, task.attempt), (State::Running, 1));
    let ended = bench.finish(&task, Outcome::Success(Some("{\"a\": 1}".into()))).await.unwrap();
    assert_eq!(ended.state, State::Succeeded);
    assert_eq!(bench.get(task.id).await, *ended);
    let timeline = bench.timeline(task.id).await;
    assert_eq!(timeline, [(1, "queued"), (2, "attempt_started"), (3, "ended")]);
}

#[tokio::test]
async fn the_same_request_id_gives_the_same_task_and_another_request_is_refused() {
    let bench = Bench::new().await;
    let new = NewTask { request_id: Some("r1".into()), ..new_task() };
    // In one batch and in two.
    let twice = bench.ledger.submit(vec![new.clone(), new.clone()]).await;
    let twice: Vec<_> = twice.into_iter().map(|answer| answer.unwrap()).collect();
    assert_eq!(twice[0].task.id, twice[1].task.id);
    assert_eq!((twice[0].new, twice[1].new), (true, false));
    assert_eq!(bench.submit(new.clone()).await.task.id, twice[0].task.id);
    let other = NewTask { digest: [1; 32], ..new.clone() };
    let refused = bench.ledger.submit(vec![other]).await.pop().unwrap().unwrap_err();
    assert_eq!(refused.reason(), Reason::RequestIdReused);
    // Another namespace knows nothing of it.
    let elsewhere = NewTask { namespace: "other".into(), digest: [1; 32], ..new.clone() };
    assert!(bench.submit(elsewhere).await.new);
    // After 24 h it counts as new.
    bench.parts.clock.advance(Duration::from_secs(24 * 3600 + 1));
    assert!(bench.submit(new).await.new);
}

#[tokio::test]
async fn a_poison_task_is_dead_lettered_with_the_reason_of_each_attempt() {
    let bench = Bench::new().await;
    let id = bench.submit(new_task()).await.task.id;
    for attempt in 1..=3 {
        let task = bench.start(id).await.unwrap();
        assert_eq!(task.attempt, attempt);
        bench.finish(&task, broken()).await.unwrap();
        assert!(bench.start(id).await.is_err(), "a backoff or the end holds it back");
        bench.parts.clock.advance(Duration::from_mins(1));
    }
    let task = bench.get(id).await;
    assert_eq!((task.state, task.failed), (State::DeadLettered, 3));
    let kinds: Vec<_> = bench.timeline(id).await.into_iter().map(|(_, kind)| kind).collect();
    let round = ["queued", "attempt_started"];
    assert_eq!(kinds, [&round[..], &round, &round, &["ended"]].concat());
}

#[tokio::test]
async fn runner_made_entries_lie_between_start_and_end_without_holes() {
    let bench = Bench::new().await;
    let id = bench.submit(new_task()).await.task.id;
    let task = bench.start(id).await.unwrap();
    let log = bench.parts.relay.find(id).unwrap();
    let appended = log.append(1, 1, 5, |i, sequence, _, buffer| {
        assert_eq!(sequence, task.base_sequence + 1 + i as u64);
        buffer.extend_from_slice(b"x");
        Encoded::Token
    });
    assert_eq!(appended.unwrap().accepted, 5);
    bench.finish(&task, Outcome::Success(None)).await.unwrap();
    let timeline = bench.timeline(id).await;
    assert_eq!(timeline, [(1, "queued"), (2, "attempt_started"), (8, "ended")]);
    let read =
        bench.parts.db.read(move |tx| Box::pin(async move { reads::segments(tx, id, 1).await }));
    let segments = read.await.unwrap();
    assert_eq!(segments.iter().map(|(last, _)| *last).collect::<Vec<_>>(), [7]);
}

#[tokio::test]
async fn what_comes_under_an_ended_lease_is_refused() {
    let bench = Bench::new().await;
    let id = bench.submit(new_task()).await.task.id;
    let first = bench.start(id).await.unwrap();
    let lose = Event::Lose { attempt: 1, reason: "gone".into() };
    bench.ledger.apply(id, lose.clone()).await.unwrap();
    let second = bench.start(id).await.unwrap();
    assert_eq!(second.attempt, 2);
    for event in [lose, Event::TimeOut { attempt: 1 }] {
        let refused = bench.ledger.apply(id, event).await.unwrap_err();
        assert_eq!(refused.reason(), Reason::LeaseLost);
    }
    let refused = bench.finish(&first, Outcome::Success(None)).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::LeaseLost);
    assert_eq!(bench.get(id).await, *second);
    bench.finish(&second, Outcome::Success(None)).await.unwrap();
}

#[tokio::test]
async fn after_a_cancel_nothing_is_taken_but_the_end() {
    let bench = Bench::new().await;
    let id = bench.submit(new_task()).await.task.id;
    let task = bench.start(id).await.unwrap();
    let log = bench.parts.relay.open(id);
    let cancel = Event::Cancel { reason: "enough".into(), by: "me".into() };
    let ended = bench.ledger.apply(id, cancel.clone()).await.unwrap();
    assert_eq!(ended.state, State::Cancelled);
    assert!(log.append(1, 1, 1, |_, _, _, _| Encoded::Token).is_err());
    let late = bench.finish(&task, Outcome::Success(None)).await.unwrap_err();
    assert_eq!(late.reason(), Reason::LeaseLost);
    let again = bench.ledger.apply(id, cancel).await.unwrap_err();
    assert_eq!(again.reason(), Reason::StateConflict);
    assert_eq!(bench.get(id).await, *ended);
}

/// What one task's racers were told: each event with its answer, and how many tokens were taken.
async fn race(
    bench: Arc<Bench>,
    task: Arc<Task>,
    first: usize,
    other: Event,
) -> (Vec<(Event, bool)>, u64) {
    let attempt = task.attempt;
    let mut events = vec![
        Event::Finish { attempt, outcome: Outcome::Success(None), usage: Default::default() },
        Event::Lose { attempt, reason: "gone".into() },
        other,
        Event::TimeOut { attempt },
        Event::Cancel { reason: String::new(), by: "me".into() },
    ];
    events.rotate_left(first);
    let ends = events.into_iter().map(|event| async {
        match bench.ledger.apply(task.id, event.clone()).await {
            Ok(_) => (event, true),
            Err(error) => {
                let leased = effect::attempt_of(&event).is_some();
                let wanted = if leased { Reason::LeaseLost } else { Reason::StateConflict };
                assert_eq!(error.reason(), wanted, "{event:?}: {error}");
                (event, false)
            }
        }
    });
    let log = bench.parts.relay.find(task.id).unwrap();
    let tokens = async {
        for _ in 0..first {
            tokio::task::yield_now().await;
        }
        let taken = log.append(attempt, 1, 3, |_, _, _, _| Encoded::Token);
        taken.map_or(0, |appended| appended.accepted as u64)
    };
    futures_util::future::join(futures_util::future::join_all(ends), tokens).await
}

/// P5, P6, P10: completion, loss, timeout, cancel, and the deadline or a second attempt, at the
/// same instant and beside tokens: one of them ends the task, none but the first the lease, and
/// what the stream has is what was taken before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_tasks_whose_ends_race_have_one_end_each() {
    const RACES: usize = 10_000;
    const AT_ONCE: usize = 250;
    let bench = Arc::new(Bench::new().await);
    let mut won = [0_usize; 6];
    for _ in 0..RACES / AT_ONCE {
        let deadline = bench.parts.clock.now() + Duration::from_secs(1);
        let new = (0..AT_ONCE).map(|i| {
            let deadline = (i % 2 == 0).then_some(deadline);
            NewTask { spec: Spec { deadline, ..new_task().spec }, ..new_task() }
        });
        let tasks = bench.ledger.submit(new.collect()).await;
        let ids: Vec<_> = tasks.into_iter().map(|task| task.unwrap().task.id).collect();
        let started = futures_util::future::join_all(ids.iter().map(|id| bench.start(*id))).await;
        bench.parts.clock.advance(Duration::from_secs(1));
        let mut racers = tokio::task::JoinSet::new();
        for (i, task) in started.into_iter().enumerate() {
            let (bench, task) = (bench.clone(), task.unwrap());
            let again = Event::Start {
                runner: "other".into(),
                node: String::new(),
                engine: String::new(),
                engine_version: String::new(),
                instance: bench.parts.standing.id(),
                waited: None,
            };
            let other = if i % 2 == 0 { Event::Expire(Limit::Deadline) } else { again };
            racers.spawn(async move { (task.id, race(bench, task, i % 5, other).await) });
        }
        for (id, (answers, n_tokens)) in racers.join_all().await {
            let applied = |wanted: fn(&Event) -> bool| {
                answers.iter().filter(|(event, applied)| *applied && wanted(event)).count()
            };
            let ends = [
                applied(|event| matches!(event, Event::Finish { .. })),
                applied(|event| matches!(event, Event::Cancel { .. })),
                applied(|event| matches!(event, Event::Expire(_))),
            ];
            assert_eq!(ends.iter().sum::<usize>(), 1, "{answers:?}");
            let requeued =
                applied(|event| matches!(event, Event::Lose { .. } | Event::TimeOut { .. }));
            assert!(ends[0] + requeued <= 1, "one lease ended twice: {answers:?}");
            let again = applied(|event| matches!(event, Event::Start { .. }));
            let task = bench.get(id).await;
            let state = [State::Succeeded, State::Cancelled, State::Expired];
            assert_eq!(task.state, state[ends.iter().position(|n| *n == 1).unwrap()]);
            let timeline = bench.timeline(id).await;
            let kinds: Vec<_> = timeline.iter().map(|(_, kind)| *kind).collect();
            let (queued, started) = (["queued"], ["attempt_started"]);
            let wanted =
                [&queued[..], &started, &queued[..requeued], &started[..again], &["ended"]];
            assert_eq!(kinds, wanted.concat());
            assert_eq!(task.last_sequence, kinds.len() as u64 + n_tokens, "{answers:?}");
            let more = ends.into_iter().chain([requeued, again, n_tokens as usize]);
            won.iter_mut().zip(more).for_each(|(count, more)| *count += more);
        }
    }
    assert!(won.iter().all(|n| *n > RACES / 100), "no race: {won:?}");
}
