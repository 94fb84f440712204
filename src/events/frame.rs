//! Encoding of events, once.

use bytes::{BufMut as _, Bytes, BytesMut};
use prost::{Message, encoding::WireType};

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

/// Appends an encoded event, as [`encode`] makes it.
pub fn put(
    buf: &mut BytesMut,
    sequence: u64,
    time: Micros,
    attempt: u32,
    body: pb::task_event::Body,
) {
    let event = pb::TaskEvent {
        task_id: String::new(),
        sequence,
        time: Some(timestamp(time)),
        attempt,
        body: Some(body),
    };
    // The buffer grows as needed, and a frame is far below its bound.
    event.encode_raw(buf);
}

/// Number of `TaskEvent.token`.
const TOKEN: u32 = 8;

/// Appends an encoded token: the bytes of [`put`], without a copy of the text.
pub fn put_token(
    buf: &mut BytesMut,
    sequence: u64,
    time: Micros,
    attempt: u32,
    text: &str,
    index: u64,
) {
    use prost::encoding::{encode_key, encode_varint, encoded_len_varint, uint32, uint64};
    let at = timestamp(time);
    let token_len = optional_len(text.len() as u64, text.len())
        + if index == 0 { 0 } else { 1 + encoded_len_varint(index) };
    buf.reserve(token_len + 48);
    if sequence != 0 {
        uint64::encode(2, &sequence, buf);
    }
    encode_key(3, WireType::LengthDelimited, buf);
    encode_varint(at.encoded_len() as u64, buf);
    at.encode_raw(buf);
    if attempt != 0 {
        uint32::encode(4, &attempt, buf);
    }
    encode_key(TOKEN, WireType::LengthDelimited, buf);
    encode_varint(token_len as u64, buf);
    if !text.is_empty() {
        encode_key(1, WireType::LengthDelimited, buf);
        encode_varint(text.len() as u64, buf);
        buf.put_slice(text.as_bytes());
    }
    if index != 0 {
        uint64::encode(2, &index, buf);
    }
}

/// Encoded length of a text field with a number below 16; empty texts are not encoded.
fn optional_len(length: u64, bytes: usize) -> usize {
    if bytes == 0 { 0 } else { 1 + prost::encoding::encoded_len_varint(length) + bytes }
}

/// The sequence of an encoded event, read without decoding the rest; `None` for bytes that are
/// no event.
pub fn sequence(mut frame: &[u8]) -> Option<u64> {
    // Fields are encoded in order, so at most `task_id` (1) precedes `sequence` (2).
    loop {
        let (field, wire) = prost::encoding::decode_key(&mut frame).ok()?;
        match (field, wire) {
            (2, WireType::Varint) => {
                return prost::encoding::decode_varint(&mut frame).ok();
            }
            (1, WireType::LengthDelimited) => {
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
    use proptest::prelude::*;

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
    proptest! {
        #[test]
        fn a_token_is_encoded_as_any_event_is(
            sequence: u64,
            micros in 0_i64..4_000_000_000_000_000,
            attempt: u32,
            text in ".{0,200}",
            index: u64,
        ) {
            let mut buf = BytesMut::new();
            let time = Micros(micros);
            put_token(&mut buf, sequence, time, attempt, &text, index);
            let body = Body::Token(pb::TokenEvent { text, index });
            let mut other = BytesMut::new();
            put(&mut other, sequence, time, attempt, body.clone());
            prop_assert_eq!(&buf, &other);
            prop_assert_eq!(buf.freeze(), encode(sequence, time, attempt, body));
        }
    }
}
