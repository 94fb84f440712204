//! Claims about when the recorder is hurried.

use std::task::{Context, Waker};

use uuid::Uuid;

use super::{
    tests::{append, record},
    *,
};

#[test]
fn one_log_hurries_the_recorder_before_many_do() {
    let hurried = |relay: &Relay| {
        let mut hurried = std::pin::pin!(relay.hurried());
        hurried.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready()
    };
    let limits = Limits { hurry_log_bytes: 1_000, hurry_bytes: 2_000, ..Limits::default() };
    let relay = Relay::new(limits);
    let logs: Vec<_> = (1..=20).map(|id| relay.open(TaskId(Uuid::from_u128(id)))).collect();
    for log in &logs {
        log.publish(&[(1, "started".into())], false);
        log.begin_attempt(1, 1, 1 << 20);
    }
    // Less than 150 bytes each, with what it costs to keep them.
    let mut next = 1;
    while !hurried(&relay) {
        append(&logs[0], 1, next, 1).unwrap();
        next += 1;
    }
    assert!((7..=20).contains(&next), "after {next} entries of one log");
    for log in relay.dirty() {
        record(&log);
    }
    let n_appended = logs[1..].iter().take_while(|log| {
        append(log, 1, 1, 2).unwrap();
        !hurried(&relay)
    });
    let n_logs = n_appended.count() + 1;
    assert!((10..=19).contains(&n_logs), "after two entries of {n_logs} logs");
}
