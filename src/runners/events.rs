//! What a runner sends about an attempt: checked, and encoded once into the frames that every
//! reader gets. The hot path of tokens.

use bytes::BytesMut;
use prost::Message as _;

use crate::{
    clock::Micros,
    error::{Reason, reason_name},
    events::frame,
    json,
    keys::Receipts,
    pb,
    relay::Encoded,
    runners::{convert::cut, model::Fence},
    tasks::{
        model::{Failure, Usage},
        state::Outcome,
    },
};

/// Longest line of a log, in bytes; as the proto says.
const MAX_LINE: usize = 64 << 10;
/// Longest token, in bytes.
const MAX_TOKEN: usize = 1 << 20;
/// Longest name of a stage, in characters; as the proto says.
const MAX_STAGE_NAME: usize = 128;
/// Longest text for people, in bytes.
const MAX_DETAIL: usize = 4 << 10;
/// Longest result, as JSON text in bytes.
const MAX_RESULT: usize = 1 << 20;
/// Most facts of a failure.
const MAX_FACTS: usize = 64;
/// Longest time since the start of an attempt, in microseconds: ten years.
const MAX_ELAPSED: u64 = 10 * 366 * 86_400 * 1_000_000;

/// What is wrong with an event of an attempt; `None` when it may be appended.
pub fn fault(receipts: &Receipts, fence: Fence, event: &pb::RunnerEvent) -> Option<String> {
    use pb::runner_event::Body;
    if event.elapsed_us > MAX_ELAPSED {
        return Some("elapsed_us must be below ten years".into());
    }
    let at_most = |field: &str, text: &str, max: usize| {
        (text.len() > max)
            .then(|| format!("{field} has {} bytes, more than {max}; use an artifact", text.len()))
    };
    match &event.body {
        Some(Body::Token(text)) => at_most("token", text, MAX_TOKEN),
        Some(Body::Stage(stage)) => {
            let n_chars = stage.name.chars().count();
            if n_chars == 0 || n_chars > MAX_STAGE_NAME {
                return Some(format!(
                    "stage.name must have 1 to {MAX_STAGE_NAME} characters, not {n_chars}"
                ));
            }
            if stage.progress.is_some_and(|share| !(0.0..=1.0).contains(&share)) {
                return Some("stage.progress must be 0 to 1".into());
            }
            at_most("stage.detail", &stage.detail, MAX_DETAIL)
        }
        Some(Body::Log(log)) => at_most("log.message", &log.message, MAX_LINE),
        // Only who kept the bytes gives a receipt, so that nothing has to be looked up here.
        Some(Body::ArtifactReceipt(receipt)) => {
            let genuine = receipts.open(fence.task, fence.attempt, receipt);
            let known = genuine.and_then(|facts| pb::ArtifactEvent::decode(facts).ok());
            known.is_none().then(|| {
                "artifact_receipt must be the receipt of an artifact that this attempt made".into()
            })
        }
        None => Some("event is of a kind that this server does not know".into()),
    }
}

/// Appends the frame of an event without [`fault`]. `start` is the attempt's.
pub fn put(
    buf: &mut BytesMut,
    event: &pb::RunnerEvent,
    start: Micros,
    attempt: u32,
    sequence: u64,
    token_index: u64,
) -> Encoded {
    use pb::{runner_event::Body, task_event};
    let time = Micros(start.0.saturating_add_unsigned(event.elapsed_us));
    match &event.body {
        Some(Body::Token(text)) => {
            frame::put_token(buf, sequence, time, attempt, text, token_index);
            Encoded::Token
        }
        Some(Body::Stage(stage)) => {
            frame::put(buf, sequence, time, attempt, task_event::Body::Stage(stage.clone()));
            Encoded::Timeline
        }
        Some(Body::ArtifactReceipt(receipt)) => {
            // `fault` has read it before.
            let artifact = pb::ArtifactEvent::decode(Receipts::facts(receipt)).unwrap_or_default();
            let body = task_event::Body::Artifact(artifact);
            frame::put(buf, sequence, time, attempt, body);
            Encoded::Timeline
        }
        Some(Body::Log(log)) => {
            frame::put(buf, sequence, time, attempt, task_event::Body::Log(log.clone()));
            Encoded::Other
        }
        // `fault` lets no such event through; an empty line keeps the numbers whole.
        None => {
            frame::put(buf, sequence, time, attempt, task_event::Body::Log(Default::default()));
            Encoded::Other
        }
    }
}

/// Memory that an event takes while it waits.
pub fn weight(event: &pb::RunnerEvent) -> usize {
    use pb::runner_event::Body;
    size_of::<pb::RunnerEvent>()
        + match &event.body {
            Some(Body::Token(text)) => text.len(),
            Some(Body::Stage(stage)) => stage.name.len() + stage.detail.len(),
            Some(Body::Log(log)) => log.message.len(),
            Some(Body::ArtifactReceipt(receipt)) => receipt.len(),
            None => 0,
        }
}

/// How an attempt ended, and what it used. An end that cannot be kept is a failure that says so.
pub fn outcome(finish: pb::Finish) -> (Outcome, Usage) {
    use pb::finish::Outcome as Said;
    let outcome = match finish.outcome {
        Some(Said::Success(success)) => match success.result {
            None => Outcome::Success(None),
            Some(result) if !json::depth_is_fine(&result) => {
                invalid(format!("the result nests deeper than {} levels", json::MAX_DEPTH))
            }
            Some(result) => {
                let text = json::text_from_struct(&result);
                if text.len() > MAX_RESULT {
                    let message = format!(
                        "the result has {} bytes, more than {MAX_RESULT}; use an artifact",
                        text.len()
                    );
                    failure(Reason::MessageTooLarge, message).into()
                } else {
                    Outcome::Success(Some(text))
                }
            }
        },
        Some(Said::Failure(failure)) => {
            let retry_after = failure.retry_after.and_then(|after| after.try_into().ok());
            Outcome::Failure {
                failure: failed(failure),
                retry_after: retry_after.unwrap_or_default(),
            }
        }
        Some(Said::HandBack(hand_back)) => Outcome::HandBack(cut(hand_back.reason, MAX_DETAIL)),
        None => invalid("the attempt ended without an outcome that this server knows".into()),
    };
    let usage = finish.usage.unwrap_or_default();
    let usage = Usage {
        tokens_in: usage.tokens_in,
        tokens_out: usage.tokens_out,
        execution: usage
            .execution_time
            .and_then(|duration| duration.try_into().ok())
            .unwrap_or_default(),
        first_token: usage.time_to_first_token.and_then(|duration| duration.try_into().ok()),
    };
    (outcome, usage)
}

/// The end of an attempt whose runner sent what cannot be taken.
pub fn invalid(message: String) -> Outcome {
    failure(Reason::InvalidParams, message).into()
}

fn failure(reason: Reason, message: String) -> Failure {
    Failure {
        reason: reason_name(reason).to_owned(),
        message,
        retryable: false,
        metadata: Default::default(),
    }
}

fn failed(failure: pb::Failure) -> Failure {
    let known = Reason::from_str_name(&format!("ERROR_REASON_{}", failure.reason));
    let mut metadata: std::collections::BTreeMap<_, _> = failure
        .metadata
        .into_iter()
        .take(MAX_FACTS)
        .map(|(key, value)| (cut(key, 128), cut(value, MAX_DETAIL)))
        .collect();
    let reason = match known {
        Some(reason) if reason != Reason::Unspecified => reason_name(reason),
        // A name of the runner's own is kept as a fact.
        _ => {
            if !failure.reason.is_empty() {
                metadata.insert("runner_reason".into(), cut(failure.reason, 128));
            }
            reason_name(Reason::TaskFailed)
        }
    };
    Failure {
        reason: reason.to_owned(),
        message: cut(failure.message, MAX_DETAIL),
        retryable: failure.retryable,
        metadata,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        clock::Clock,
        id::{Entropy, TaskId},
        keys::Signer,
        pb::{RunnerEvent, StageEvent, runner_event::Body},
    };

    fn fault(event: &RunnerEvent) -> Option<String> {
        let (receipts, fence) = attempt();
        super::fault(&receipts, fence, event)
    }

    fn attempt() -> (Receipts, Fence) {
        let clock = Clock::manual();
        let task = TaskId::new(clock.now(), &Entropy::seeded(1));
        (Signer::new(&[7; 32], clock).receipts(), Fence { task, attempt: 2 })
    }

    #[test]
    fn an_artifact_is_listed_by_the_receipt_of_its_own_attempt_only() {
        let (receipts, fence) = attempt();
        let artifact = pb::ArtifactEvent { name: "a".into(), ..pb::ArtifactEvent::default() };
        let of = |attempt| receipts.seal(fence.task, attempt, &artifact.encode_to_vec());
        let listed = |receipt: Vec<u8>| event(Body::ArtifactReceipt(receipt.into()));
        assert_eq!(fault(&listed(of(2))), None);
        assert!(fault(&listed(of(1))).unwrap().contains("artifact_receipt"));
        assert!(fault(&listed(artifact.encode_to_vec())).is_some());
        assert!(fault(&listed(Vec::new())).is_some());
        let mut buf = BytesMut::new();
        assert_eq!(put(&mut buf, &listed(of(2)), Micros(7), 2, 9, 3), Encoded::Timeline);
        let body = pb::Frame::new(buf.freeze()).event().unwrap().body;
        assert_eq!(body, Some(pb::task_event::Body::Artifact(artifact)));
    }

    fn event(body: Body) -> RunnerEvent {
        RunnerEvent { body: Some(body), elapsed_us: 5 }
    }

    #[test]
    fn a_resent_event_makes_the_same_bytes() {
        let stage = StageEvent { name: "LOAD".into(), progress: Some(0.5), detail: "x".into() };
        for event in [event(Body::Token("a".into())), event(Body::Stage(stage))] {
            let (mut once, mut again) = (BytesMut::new(), BytesMut::new());
            let kind = put(&mut once, &event, Micros(7), 2, 9, 3);
            assert_eq!(put(&mut again, &event, Micros(7), 2, 9, 3), kind);
            assert_eq!(once, again);
            let decoded = pb::Frame::new(once.freeze()).event().unwrap();
            assert_eq!((decoded.sequence, decoded.attempt), (9, 2));
            assert_eq!(decoded.time.unwrap().nanos, 12_000);
        }
    }

    #[test]
    fn malformed_events_are_named() {
        let stage = |name: &str, progress| {
            let (name, detail) = (name.to_owned(), String::new());
            event(Body::Stage(StageEvent { name, progress, detail }))
        };
        assert_eq!(fault(&stage("A", Some(1.0))), None);
        assert!(fault(&stage("", None)).unwrap().contains("stage.name"));
        assert!(fault(&stage("A", Some(f64::NAN))).unwrap().contains("stage.progress"));
        assert!(fault(&stage("A", Some(1.1))).unwrap().contains("stage.progress"));
        assert!(fault(&RunnerEvent::default()).is_some());
        let line = pb::LogEvent { level: 99, message: "x".repeat(MAX_LINE + 1) };
        assert!(fault(&event(Body::Log(line))).unwrap().contains("log.message"));
        let late = RunnerEvent { elapsed_us: u64::MAX, ..event(Body::Token("a".into())) };
        assert!(fault(&late).unwrap().contains("elapsed_us"));
    }

    #[test]
    fn an_end_that_cannot_be_kept_is_a_failure() {
        let finish = |outcome| pb::Finish { outcome, usage: None };
        let (ended, _) = outcome(finish(None));
        assert!(
            matches!(ended, Outcome::Failure { failure, .. } if failure.reason == "INVALID_PARAMS")
        );
        let own = pb::Failure { reason: "OOM".into(), retryable: true, ..Default::default() };
        let (ended, _) = outcome(finish(Some(pb::finish::Outcome::Failure(own))));
        let Outcome::Failure { failure, .. } = ended else { panic!("{ended:?}") };
        assert_eq!((failure.reason.as_str(), failure.retryable), ("TASK_FAILED", true));
        assert_eq!(failure.metadata["runner_reason"], "OOM");
    }

    #[test]
    fn texts_are_cut_between_characters() {
        assert_eq!(cut("aä".into(), 2), "a");
        assert_eq!(cut("ab".into(), 2), "ab");
    }
}
