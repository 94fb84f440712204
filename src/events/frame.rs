//! Encoding of events, once.

use bytes::Bytes;
use prost::Message;

use crate::{clock::Micros, pb};

/// Encodes an event of a task's stream. The bytes are what every reader gets and what is kept.
pub fn encode(sequence: u64, time: Micros, attempt: u32, body: pb::task_event::Body) -> Bytes {
    pb::TaskEvent {
        task_id: String::new(),
        sequence,
        time: Some(timestamp(time)),
        attempt,
        body: Some(body),
    }
    .encode_to_vec()
    .into()
}

/// The sequence of an encoded event, read without decoding the rest; `None` for bytes that are
/// no event.
pub fn sequence(mut frame: &[u8]) -> Option<u64> {
    // Fields are encoded in order, so at most `task_id` (1) precedes `sequence` (2).
    loop {
        let (field, wire) = prost::encoding::decode_key(&mut frame).ok()?;
        match (field, wire) {
            (2, prost::encoding::WireType::Varint) => {
                return prost::encoding::decode_varint(&mut frame).ok();
            }
            (1, prost::encoding::WireType::LengthDelimited) => {
                let len = usize::try_from(prost::encoding::decode_varint(&mut frame).ok()?).ok()?;
                frame = frame.get(len..)?;
            }
            // A zero sequence is not encoded.
            _ => return Some(0),
        }
    }
}

/// A time as the wire has it.
pub fn timestamp(time: Micros) -> prost_types::Timestamp {
    prost_types::Timestamp {
        seconds: time.0.div_euclid(1_000_000),
        nanos: (time.0.rem_euclid(1_000_000) * 1000) as i32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pb::task_event::Body;

    #[test]
    fn the_sequence_is_read_without_decoding() {
        let body = Body::Token(pb::TokenEvent { text: "x".into(), index: 7 });
        for wanted in [0, 1, 300, u64::MAX] {
            let frame = encode(wanted, Micros(1_700_000_000_000_001), 2, body.clone());
            assert_eq!(sequence(&frame), Some(wanted));
        }
    }
}
