//! Frames on their way to storage: each with its length before it.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::id::TaskId;

/// Longest length before a frame that is worth making room for: frames are below 4 MiB.
pub(super) const MAX_PREFIX: usize = 4;

/// Contiguous frames of one attempt that are to be stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SegmentData {
    /// The task.
    pub task: TaskId,
    /// The attempt that made them.
    pub attempt: u32,
    /// Sequence of the first.
    pub first: u64,
    /// Sequence of the last; `first - 1` when there are no frames.
    pub last: u64,
    /// The frames, as [`put_frame`] writes them.
    pub frames: Bytes,
    /// Those that belong on the timeline too, with their sequences.
    pub timeline: Vec<(u64, Bytes)>,
    /// Sequence up to which the row should be reserved, when it is time for more.
    pub reserve_to: Option<u64>,
}

/// Appends a frame with its length as a varint before it.
pub fn put_frame(buf: &mut BytesMut, frame: &[u8]) {
    let mut length = frame.len();
    while length >= 0x80 {
        buf.put_u8(length as u8 | 0x80);
        length >>= 7;
    }
    buf.put_u8(length as u8);
    buf.put_slice(frame);
}

/// The frames that [`put_frame`] wrote, sharing the memory of `bytes`; `None` for one
/// that is cut off, last.
pub fn frames(mut bytes: Bytes) -> impl Iterator<Item = Option<Bytes>> {
    std::iter::from_fn(move || {
        if bytes.is_empty() {
            return None;
        }
        let frame = split_frame(&mut bytes);
        if frame.is_none() {
            bytes.clear();
        }
        Some(frame)
    })
}

fn split_frame(bytes: &mut Bytes) -> Option<Bytes> {
    let mut length = 0_usize;
    for shift in (0..35).step_by(7) {
        if bytes.is_empty() {
            return None;
        }
        let byte = bytes.get_u8();
        length |= usize::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return (length <= bytes.len()).then(|| bytes.split_to(length));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn frames_come_back_as_they_were_put(
            sizes in prop::collection::vec(0_usize..40_000, 0..8),
        ) {
            let expected: Vec<Bytes> =
                sizes.iter().enumerate().map(|(i, size)| vec![i as u8; *size].into()).collect();
            let mut buf = BytesMut::new();
            for frame in &expected {
                put_frame(&mut buf, frame);
            }
            let found: Vec<Bytes> = frames(buf.freeze()).map(Option::unwrap).collect();
            prop_assert_eq!(found, expected);
        }

        #[test]
        fn any_bytes_end_or_are_refused(bytes: Vec<u8>) {
            let mut frames = frames(bytes.into());
            while let Some(Some(_)) = frames.next() {}
            prop_assert!(frames.next().is_none());
        }
    }
}
