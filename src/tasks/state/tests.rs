//! Random orders of events never leave the table.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::{
    id::{Entropy, InstanceId, Namespace, TaskId},
    tasks::model::{RetryPolicy, Spec},
};

fn task(retry: RetryPolicy, deadline: Option<Micros>, start_timeout: Option<Duration>) -> Task {
    let create_time = Micros(1_000_000);
    Task {
        id: TaskId::new(create_time, &Entropy::seeded(1)),
        namespace: Namespace::from("default"),
        spec: Spec {
            model: "a/b".into(),
            version: None,
            input: "{}".into(),
            params: "{}".into(),
            priority: 0,
            labels: BTreeMap::new(),
            required_labels: BTreeMap::new(),
            deadline,
            start_timeout,
            execution_timeout: Duration::from_secs(10),
            retry,
            seed: 0,
            session: None,
        },
        state: State::Queued,
        attempt: 0,
        failed: 0,
        lost: 0,
        handed_back: 0,
        create_time,
        start_time: None,
        end_time: None,
        not_before: None,
        runner: None,
        instance: None,
        base_sequence: 0,
        last_sequence: 1,
        reserved_sequence: 1,
        result: None,
        error: None,
        usage: None,
        revision: 1,
        request_id: None,
        retry_of: None,
        retried_by: None,
        traceparent: None,
    }
}

fn start() -> Event {
    Event::Start {
        runner: "r".into(),
        node: "n".into(),
        engine: "e".into(),
        engine_version: "1".into(),
        instance: None,
        waited: None,
    }
}

fn finish(attempt: u32, outcome: Outcome) -> Event {
    Event::Finish { attempt, outcome, usage: Usage::default() }
}

fn events() -> impl Strategy<Value = Event> {
    let failure =
        (prop::bool::ANY, prop::sample::select(vec!["A", "B"])).prop_map(|(retryable, reason)| {
            Outcome::from(Failure {
                reason: reason.into(),
                message: "boom".into(),
                retryable,
                metadata: BTreeMap::new(),
            })
        });
    let outcome = prop_oneof![
        Just(Outcome::Success(Some("{}".into()))),
        failure.clone(),
        failure,
        Just(Outcome::HandBack("drain".into())),
    ];
    let attempt = 0..40_u32;
    prop_oneof![
        4 => Just(start()),
        4 => (attempt.clone(), outcome).prop_map(|(attempt, outcome)| finish(attempt, outcome)),
        2 => attempt.clone().prop_map(|attempt| Event::Lose { attempt, reason: "gone".into() }),
        1 => attempt.prop_map(|attempt| Event::TimeOut { attempt }),
        1 => Just(Event::Cancel { reason: String::new(), by: "me".into() }),
        1 => Just(Event::Expire(Limit::Deadline)),
        1 => Just(Event::Expire(Limit::StartTimeout)),
        1 => Just(Event::Evict { policy_label: "drop_lru".into() }),
    ]
}

/// An event, the time until it, whether it should name the live attempt, how many entries the
/// runner makes before it, and whether some of them are in doubt.
type Step = (Event, u64, bool, u64, bool);

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = (events(), 0..100_000_000_u64, prop::bool::weighted(0.9), 0..20_u64, any::<bool>());
    prop::collection::vec(step, 0..80)
}

fn aim(event: &mut Event, live: u32) {
    if let Event::Finish { attempt, .. }
    | Event::Lose { attempt, .. }
    | Event::TimeOut { attempt } = event
    {
        *attempt = live;
    }
}

proptest! {
    #[test]
    fn random_events_never_leave_the_table(
        steps in steps(),
        max_attempts in 1..6_u32,
        deadline in prop::option::of(1_000_001..3_000_000_000_i64),
        start_timeout in prop::option::of(1..1000_u64),
        retry_on in prop::sample::select(vec![vec![], vec!["A".to_owned()]]),
        unit in 0.0..1.0_f64,
    ) {
        let retry = RetryPolicy { max_attempts, retry_on, ..RetryPolicy::default() };
        let start_timeout = start_timeout.map(Duration::from_secs);
        let mut task = task(retry, deadline.map(Micros), start_timeout);
        let mut now = task.create_time;
        let mut seen = 1; // Highest sequence that a reader may have seen.
        let mut n_ended = 0;
        let mut head = Head { head: 1, in_doubt: None };
        for (mut event, wait, aimed, n_made, doubt) in steps {
            now = now + Duration::from_micros(wait);
            if aimed {
                aim(&mut event, task.attempt);
            }
            // An attempt's entries add up, and a doubt stays, until the attempt ends.
            if task.state == State::Running {
                head.head += n_made;
                if doubt {
                    head.in_doubt = Some(task.reserved_sequence);
                }
                seen = seen.max(head.head).max(head.in_doubt.unwrap_or(0));
            }
            let was = task.clone();
            let change = match apply(&task, &event, now, head, unit) {
                Err(rejected) => {
                    if was.state.is_terminal() {
                        let lease = matches!(
                            event,
                            Event::Finish { .. } | Event::Lose { .. } | Event::TimeOut { .. }
                        );
                        let wanted = if lease { Rejected::LeaseLost } else { Rejected::Ended };
                        prop_assert_eq!(rejected, wanted);
                    }
                    continue;
                }
                Ok(change) => change,
            };
            task = change.task;
            prop_assert!(!was.state.is_terminal(), "terminal is terminal");
            prop_assert_eq!(task.revision, was.revision + 1);
            match (was.state, task.state) {
                (State::Queued, State::Running) => {
                    prop_assert_eq!(task.attempt, was.attempt + 1);
                    prop_assert!(was.not_before.is_none_or(|at| now >= at));
                    prop_assert!(task.spec.deadline.is_none_or(|at| now < at));
                }
                (State::Running, State::Queued) => prop_assert_eq!(task.attempt, was.attempt),
                (State::Queued | State::Running, state) => {
                    prop_assert!(state.is_terminal(), "{} to {state}", was.state);
                    n_ended += 1;
                    prop_assert!(matches!(change.entries.last(), Some((_, Entry::Ended))));
                    prop_assert_eq!(task.error.is_none(), state == State::Succeeded);
                }
                _ => prop_assert!(false, "nothing moves out of an end"),
            }
            // Entries follow everything seen without a hole, and none is given twice.
            let mut cursor = head.head;
            for (sequence, entry) in &change.entries {
                let first = if let Entry::Gap { first } = entry { *first } else { *sequence };
                prop_assert_eq!(first, cursor + 1);
                cursor = *sequence;
            }
            let first_own = change.entries.iter().find(|(_, e)| !matches!(e, Entry::Gap { .. }));
            prop_assert!(first_own.is_some_and(|(sequence, _)| *sequence > seen));
            seen = seen.max(cursor);
            head = Head { head: cursor, in_doubt: None };
            prop_assert_eq!(task.last_sequence, cursor);
            prop_assert!(task.reserved_sequence >= cursor);
            prop_assert!(task.failed <= max_attempts && task.lost <= MAX_LOST);
            prop_assert!(task.attempt <= task.failed + task.lost + task.handed_back + 1);
        }
        prop_assert!(n_ended <= 1, "one terminal entry");
    }

    #[test]
    fn a_backoff_grows_up_to_its_cap_and_jitter_only_shortens_it(
        failures in 1..200_u32,
        unit in 0.0..1.0_f64,
        jitter in 0.0..1.0_f64,
    ) {
        let retry = RetryPolicy { jitter, ..RetryPolicy::default() };
        let full = retry.backoff(failures, 0.0);
        prop_assert!(full >= retry.initial_backoff && full <= retry.max_backoff);
        let wait = retry.backoff(failures, unit);
        prop_assert!(wait <= full && wait >= full.mul_f64(1.0 - jitter).saturating_sub(Duration::from_nanos(10)));
    }
}

#[test]
fn a_runner_can_say_do_not_retry() {
    let mut task = task(RetryPolicy::default(), None, None);
    let head = |task: &Task| Head { head: task.last_sequence, in_doubt: None };
    task = apply(&task, &start(), task.create_time, head(&task), 0.0).unwrap().task;
    let failure = failure(Reason::InputRejected, "no", false);
    let outcome = Outcome::from(failure.clone());
    let ended = apply(&task, &finish(1, outcome), task.create_time, head(&task), 0.0).unwrap().task;
    assert_eq!((ended.state, ended.error), (State::Failed, Some(failure)));
}

#[test]
fn the_longer_of_backoff_and_retry_after_is_waited() {
    let retry = RetryPolicy { jitter: 0.0, max_attempts: 9, ..RetryPolicy::default() };
    let mut task = task(retry, None, None);
    let now = task.create_time;
    let hours = |n| Duration::from_hours(n);
    let cases = [
        (Duration::ZERO, Duration::from_secs(1)),
        (Duration::from_secs(30), Duration::from_secs(30)),
        (Duration::from_secs(3), Duration::from_secs(4)),
        (hours(100), hours(1)),
    ];
    for (retry_after, wait) in cases {
        let head = Head { head: task.last_sequence, in_doubt: None };
        task.not_before = None;
        task = apply(&task, &start(), now, head, 0.0).unwrap().task;
        let head = Head { head: task.last_sequence, in_doubt: None };
        let failure = failure(Reason::EngineError, "busy", true);
        let outcome = Outcome::Failure { failure, retry_after };
        task = apply(&task, &finish(task.attempt, outcome), now, head, 0.0).unwrap().task;
        assert_eq!(task.not_before, Some(now + wait), "{retry_after:?}");
    }
}

#[test]
fn lost_runners_and_hand_backs_do_not_count_as_failures() {
    let mut task = task(RetryPolicy { max_attempts: 1, ..RetryPolicy::default() }, None, None);
    let now = task.create_time;
    for (n_lost, n_handed_back) in [(1, 0), (1, 1), (2, 1), (2, 2)] {
        let head = Head { head: task.last_sequence, in_doubt: None };
        task = apply(&task, &start(), now, head, 0.0).unwrap().task;
        let head = Head { head: task.last_sequence, in_doubt: None };
        let attempt = task.attempt;
        let event = if n_lost > n_handed_back {
            Event::Lose { attempt, reason: "gone".into() }
        } else {
            finish(attempt, Outcome::HandBack("drain".into()))
        };
        task = apply(&task, &event, now, head, 0.0).unwrap().task;
        assert_eq!((task.state, task.not_before), (State::Queued, None));
        assert_eq!((task.failed, task.lost, task.handed_back), (0, n_lost, n_handed_back));
    }
}

#[test]
fn a_runner_that_comes_back_elsewhere_takes_its_attempt_along_and_nobody_else_does() {
    let (one, other) = (InstanceId(uuid::Uuid::from_u128(1)), InstanceId(uuid::Uuid::from_u128(2)));
    let head = Head { head: 1, in_doubt: None };
    let queued = task(RetryPolicy::default(), None, None);
    let mut started = start();
    if let Event::Start { instance, .. } = &mut started {
        *instance = Some(one);
    }
    let running = apply(&queued, &started, Micros(2_000_000), head, 0.0).unwrap().task;
    assert_eq!(running.instance, Some(one));
    let head = Head { head: running.last_sequence, in_doubt: None };
    let resume = |attempt, runner: &str, serves: Option<&str>| {
        let (runner, serves) = (runner.into(), serves.map(Namespace::from));
        let event = Event::Resume { attempt, runner, serves, instance: other };
        apply(&running, &event, Micros(3_000_000), head, 0.0)
    };
    let moved = resume(1, "r", None).unwrap();
    let wanted = Task { instance: Some(other), revision: running.revision + 1, ..running.clone() };
    assert_eq!((&moved.task, moved.entries.len()), (&wanted, 0));
    assert_eq!(resume(1, "r", Some("default")).unwrap().task, wanted);
    for refused in [resume(2, "r", None), resume(1, "s", None), resume(1, "r", Some("else"))] {
        assert_eq!(refused, Err(Rejected::LeaseLost));
    }
    let orphan = |task: &Task, instance| {
        let event = Event::Orphan { attempt: 1, instance, reason: "gone".into() };
        apply(task, &event, Micros(4_000_000), head, 0.0)
    };
    assert_eq!(orphan(&wanted, Some(one)), Err(Rejected::LeaseLost), "it has moved");
    let lost = orphan(&running, Some(one)).unwrap().task;
    assert_eq!((lost.state, lost.lost, lost.instance), (State::Queued, 1, None));
}

#[test]
fn a_start_comes_before_its_time_only_after_that_very_wait() {
    let mut task = task(RetryPolicy::default(), None, None);
    let due = task.create_time + Duration::from_secs(10);
    task.not_before = Some(due);
    let head = Head { head: 1, in_doubt: None };
    let mut early = start();
    let set = |event: &mut Event, to| {
        if let Event::Start { waited, .. } = event {
            *waited = to;
        }
    };
    for other in [None, Some(due + Duration::from_secs(1)), Some(task.create_time)] {
        set(&mut early, other);
        let refused = apply(&task, &early, task.create_time, head, 0.0);
        assert_eq!(refused.unwrap_err(), Rejected::NotDue);
    }
    set(&mut early, Some(due));
    assert!(apply(&task, &early, task.create_time, head, 0.0).is_ok());
}
