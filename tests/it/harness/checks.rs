//! What must hold of every stream, whoever read it and whenever (P6, P7, P8, P9).

use std::collections::HashMap;

use baton::pb::{self, task_event::Body};
use prost::Message as _;

/// Whether no further attempt or event can follow.
pub fn is_terminal(state: pb::TaskState) -> bool {
    !matches!(state, pb::TaskState::Unspecified | pb::TaskState::Queued | pb::TaskState::Running)
}

/// The tokens of the last attempt that the events tell of.
pub fn text(events: &[pb::TaskEvent]) -> String {
    let mut text = String::new();
    for event in events {
        match &event.body {
            Some(Body::AttemptStarted(_)) => text.clear(),
            Some(Body::Token(token)) => text.push_str(&token.text),
            _ => {}
        }
    }
    text
}

/// The last event, which must be the end.
pub fn ended(events: &[pb::TaskEvent]) -> &pb::EndedEvent {
    match events.last().and_then(|event| event.body.as_ref()) {
        Some(Body::Ended(ended)) => ended,
        other => panic!("the stream does not end with `ended` but with {other:?}"),
    }
}

/// Checks numbering, tokens and the single end of events read after `after`.
///
/// # Panics
/// On the first violation.
pub fn check_stream(task_id: &str, after: u64, events: &[pb::TaskEvent]) {
    let mut last = after;
    let mut attempt = 0;
    let mut next_token = None;
    for (i, event) in events.iter().enumerate() {
        let sequence = event.sequence;
        match event.body.as_ref().expect("an event with a body") {
            Body::Metrics(_) => {
                assert_eq!(sequence, 0, "{task_id}: metrics hold no position");
                continue;
            }
            Body::Gap(gap) => {
                assert_eq!(gap.first_sequence, last + 1, "{task_id}: gap after {last}: {gap:?}");
                assert!(sequence >= gap.first_sequence, "{task_id}: empty gap {gap:?}");
                next_token = None;
                last = sequence;
                continue;
            }
            Body::AttemptStarted(_) => {
                assert!(event.attempt > attempt, "{task_id}: attempt {attempt} started again");
                attempt = event.attempt;
                next_token = Some(0);
            }
            Body::Token(token) => {
                if let Some(expected) = next_token {
                    assert_eq!(token.index, expected, "{task_id}: token at sequence {sequence}");
                }
                next_token = Some(token.index + 1);
                assert!(attempt == 0 || event.attempt == attempt, "{task_id}: {event:?}");
            }
            Body::Ended(_) => {
                assert_eq!(i + 1, events.len(), "{task_id}: something follows the end");
            }
            _ => {}
        }
        assert_eq!(sequence, last + 1, "{task_id}: sequence after {last}: {event:?}");
        last = sequence;
    }
}

/// Remembers what every reader saw under (task, sequence), over restarts and reconnects.
#[derive(Default)]
pub struct History {
    seen: HashMap<(String, u64), Vec<u8>>,
    gaps: HashMap<String, Vec<(u64, u64)>>,
}

impl History {
    /// Adds what one reader saw of a task.
    ///
    /// # Panics
    /// When another reader saw other bytes there (P7).
    pub fn add(&mut self, task_id: &str, events: &[pb::TaskEvent]) {
        for event in events {
            match &event.body {
                Some(Body::Metrics(_)) => continue,
                Some(Body::Gap(gap)) => {
                    let gaps = self.gaps.entry(task_id.into()).or_default();
                    gaps.push((gap.first_sequence, event.sequence));
                    continue;
                }
                _ => {}
            }
            let mut event = event.clone();
            event.task_id.clear();
            let bytes = event.encode_to_vec();
            let key = (task_id.to_owned(), event.sequence);
            if let Some(before) = self.seen.get(&key) {
                let earlier = pb::TaskEvent::decode(before.as_slice()).expect("an event");
                assert_eq!(
                    *before, bytes,
                    "{task_id}: two readers saw {earlier:?} and {event:?} at one sequence"
                );
            } else {
                self.seen.insert(key, bytes);
            }
        }
    }

    /// How many (task, sequence) pairs were seen.
    pub fn len(&self) -> usize {
        self.seen.len()
    }
}

/// Checks that the stream's end says what `GetTask` says (P6).
pub fn check_end(task: &pb::Task, events: &[pb::TaskEvent]) {
    let ended = ended(events);
    assert_eq!(ended.state(), task.state(), "{}: the end and GetTask differ", task.task_id);
    assert_eq!(ended.result, task.result, "{}: results differ", task.task_id);
    assert_eq!(
        ended.error.as_ref().map(|error| &error.reason),
        task.error.as_ref().map(|error| &error.reason),
        "{}: errors differ",
        task.task_id
    );
    let count = events.iter().filter(|event| matches!(event.body, Some(Body::Ended(_)))).count();
    assert_eq!(count, 1, "{}: one end", task.task_id);
}
