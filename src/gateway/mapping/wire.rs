//! The encoding of protobuf messages, as far as it is the same for every type.

use prost::encoding::{decode_varint, encode_varint};

/// A field as it lies in an encoded message.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Found<'a> {
    /// Its number.
    pub number: u32,
    /// Its value.
    pub value: Value<'a>,
}

/// A value, by its wire type.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value<'a> {
    /// Wire type 0.
    Varint(u64),
    /// Wire type 1.
    Fixed64(u64),
    /// Wire type 2.
    Bytes(&'a [u8]),
    /// Wire type 5.
    Fixed32(u32),
}

/// Bytes that are no message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed;

/// The fields of an encoded message, in the order in which they lie there.
pub fn fields(mut bytes: &[u8]) -> impl Iterator<Item = Result<Found<'_>, Malformed>> {
    std::iter::from_fn(move || {
        if bytes.is_empty() {
            return None;
        }
        let found = field(&mut bytes);
        if found.is_none() {
            bytes = &[];
        }
        Some(found.ok_or(Malformed))
    })
}

fn field<'a>(bytes: &mut &'a [u8]) -> Option<Found<'a>> {
    let key = decode_varint(bytes).ok()?;
    let number = u32::try_from(key >> 3).ok().filter(|number| *number > 0)?;
    let value = match key & 7 {
        0 => Value::Varint(decode_varint(bytes).ok()?),
        1 => Value::Fixed64(u64::from_le_bytes(take(bytes)?)),
        2 => {
            let length = usize::try_from(decode_varint(bytes).ok()?).ok()?;
            let (value, rest) = bytes.split_at_checked(length)?;
            *bytes = rest;
            Value::Bytes(value)
        }
        5 => Value::Fixed32(u32::from_le_bytes(take(bytes)?)),
        _ => return None,
    };
    Some(Found { number, value })
}

/// The next value of a packed run, of the same wire type as `like`.
pub fn packed(bytes: &mut &[u8], like: Packed) -> Option<Value<'static>> {
    Some(match like {
        Packed::Varint => Value::Varint(decode_varint(bytes).ok()?),
        Packed::Fixed64 => Value::Fixed64(u64::from_le_bytes(take(bytes)?)),
        Packed::Fixed32 => Value::Fixed32(u32::from_le_bytes(take(bytes)?)),
    })
}

/// How the values of a packed run are encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packed {
    /// Wire type 0.
    Varint,
    /// Wire type 1.
    Fixed64,
    /// Wire type 5.
    Fixed32,
}

fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (value, rest) = bytes.split_first_chunk()?;
    *bytes = rest;
    Some(*value)
}

/// Appends the key of a field.
pub fn put_key(number: u32, wire_type: u32, out: &mut Vec<u8>) {
    encode_varint(u64::from(number << 3 | wire_type), out);
}

/// Appends a field of wire type 0.
pub fn put_varint(number: u32, value: u64, out: &mut Vec<u8>) {
    put_key(number, 0, out);
    encode_varint(value, out);
}

/// Appends a field of wire type 2.
pub fn put_bytes(number: u32, value: &[u8], out: &mut Vec<u8>) {
    put_key(number, 2, out);
    encode_varint(value.len() as u64, out);
    out.extend_from_slice(value);
}

/// Appends the key of a message and a place for its length; to be given to [`close`].
pub fn open(number: u32, out: &mut Vec<u8>) -> usize {
    put_key(number, 2, out);
    out.push(0);
    out.len()
}

/// Writes the length of a message whose fields were appended since [`open`].
pub fn close(start: usize, out: &mut Vec<u8>) {
    let length = out.len() - start;
    if length < 0x80 {
        out[start - 1] = length as u8;
        return;
    }
    let mut prefix = Vec::with_capacity(5);
    encode_varint(length as u64, &mut prefix);
    out.splice(start - 1..start, prefix);
}
