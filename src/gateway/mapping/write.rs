//! Encoded messages to JSON text.

use std::collections::{HashMap, hash_map};

use super::{
    Field, Form, Kind, Mapping, Shape, Type, TypeId, text,
    wire::{self, Found, Malformed, Packed, Value},
};

/// A message that has no JSON form: bytes of another type, a time outside the calendar, a
/// number in a `google.protobuf.Value` that JSON does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the message has no JSON form")]
pub struct Unwritable;

impl From<Malformed> for Unwritable {
    fn from(_: Malformed) -> Self {
        Self
    }
}

type Outcome<T = ()> = Result<T, Unwritable>;

/// Nested messages are followed this far; what was read from a client nests less.
const MAX_DEPTH: u32 = 200;

impl Mapping {
    /// Appends an encoded message as JSON. Fields that are unset, or have the default value and
    /// no presence, are left out.
    pub fn write(&self, id: TypeId, message: &[u8], out: &mut Vec<u8>) -> Outcome {
        Writer { mapping: self, out, spans: Vec::new(), depth: 0 }.message(id, message)
    }

    /// Appends one field of an encoded message as JSON: its default when it is unset, `null` for
    /// a message.
    pub fn write_field(&self, field: &Field, message: &[u8], out: &mut Vec<u8>) -> Outcome {
        let mut writer = Writer { mapping: self, out, spans: Vec::new(), depth: 0 };
        for found in wire::fields(message) {
            let found = found?;
            if found.number == field.number {
                writer.spans.push((0, found.value));
            }
        }
        if writer.spans.is_empty() {
            return writer.default(field);
        }
        let end = writer.spans.len();
        writer.field(field, 0, end)
    }
}

/// Writes JSON. Found fields lie on one stack, so that messages cost no allocation each.
struct Writer<'m, 'o, 'a> {
    mapping: &'m Mapping,
    out: &'o mut Vec<u8>,
    spans: Vec<(u16, Value<'a>)>,
    depth: u32,
}

impl<'a> Writer<'_, '_, 'a> {
    fn message(&mut self, id: TypeId, message: &'a [u8]) -> Outcome {
        if self.depth == MAX_DEPTH {
            return Err(Unwritable);
        }
        self.depth += 1;
        let written = self.form(id, message);
        self.depth -= 1;
        written
    }

    fn form(&mut self, id: TypeId, message: &'a [u8]) -> Outcome {
        let mapping = self.mapping;
        let described = mapping.message(id);
        match described.form {
            Form::Object => {
                self.out.push(b'{');
                self.members(described, message, true)?;
                self.out.push(b'}');
            }
            Form::Any => self.any(message)?,
            Form::Timestamp | Form::Duration => {
                let (mut seconds, mut nanos) = (0, 0);
                for found in wire::fields(message) {
                    match found? {
                        Found { number: 1, value: Value::Varint(value) } => seconds = value as i64,
                        Found { number: 2, value: Value::Varint(value) } => nanos = value as i32,
                        _ => {}
                    }
                }
                self.out.push(b'"');
                let put = match described.form {
                    Form::Timestamp => text::put_timestamp,
                    _ => text::put_duration,
                };
                put(seconds, nanos, self.out).ok_or(Unwritable)?;
                self.out.push(b'"');
            }
            Form::FieldMask => {
                let mut mask = String::new();
                for found in wire::fields(message) {
                    let Found { number: 1, value: Value::Bytes(path) } = found? else { continue };
                    if !mask.is_empty() {
                        mask.push(',');
                    }
                    let path = std::str::from_utf8(path).map_err(|_| Unwritable)?;
                    text::put_field_mask_path(path, &mut mask).ok_or(Unwritable)?;
                }
                put_string(&mask, self.out);
            }
            Form::Struct | Form::List | Form::Wrapper => {
                let field = &described.fields[0];
                let base = self.collect(described, message)?;
                let end = self.spans.len();
                if base == end {
                    self.default(field)?;
                } else {
                    self.field(field, base, end)?;
                }
                self.spans.truncate(base);
            }
            Form::Value => {
                let base = self.collect(described, message)?;
                // The members of its oneof; of several the last is left.
                match self.spans.last().copied() {
                    None | Some((0, _)) => self.out.extend_from_slice(b"null"),
                    Some((1, Value::Fixed64(bits))) if !f64::from_bits(bits).is_finite() => {
                        return Err(Unwritable);
                    }
                    Some((at, _)) => {
                        let end = self.spans.len();
                        self.field(&described.fields[usize::from(at)], base, end)?;
                    }
                }
                self.spans.truncate(base);
            }
        }
        Ok(())
    }

    /// Appends the fields of a message as members of an object.
    fn members(&mut self, described: &Type, message: &'a [u8], mut first: bool) -> Outcome {
        let base = self.collect(described, message)?;
        let mut from = base;
        while let Some(&(at, value)) = self.spans.get(from) {
            let n = self.spans[from..].iter().take_while(|span| span.0 == at).count();
            let field = &described.fields[usize::from(at)];
            let end = from + n;
            let silent = match field.shape {
                Shape::One => !field.presence && is_default(self.spans[end - 1].1),
                // A packed run may be empty.
                Shape::List => n == 1 && field.kind.is_packable() && value == Value::Bytes(&[]),
                Shape::Map(_) => false,
            };
            if !silent {
                if !first {
                    self.out.push(b',');
                }
                first = false;
                self.out.extend_from_slice(&field.key);
                self.field(field, from, end)?;
            }
            from = end;
        }
        self.spans.truncate(base);
        Ok(())
    }

    /// Puts the known fields of a message onto the stack, in the order of their numbers and,
    /// within one, as they came. Returns where they begin.
    fn collect(&mut self, described: &Type, message: &'a [u8]) -> Outcome<usize> {
        let base = self.spans.len();
        let mut sorted = true;
        for found in wire::fields(message) {
            let found = found?;
            let Some(at) = described.numbered(found.number) else { continue };
            if let Some(oneof) = described.fields[at].oneof {
                // The last of a oneof's members counts; a message may come in parts.
                let other = |span: &(u16, Value<'_>)| {
                    usize::from(span.0) != at
                        && described.fields[usize::from(span.0)].oneof == Some(oneof)
                };
                if self.spans[base..].iter().any(other) {
                    let mut kept = self.spans.split_off(base);
                    kept.retain(|span| !other(span));
                    self.spans.append(&mut kept);
                }
            }
            sorted &= self.spans.len() == base
                || self.spans.last().is_some_and(|(last, _)| usize::from(*last) <= at);
            self.spans.push((at as u16, found.value));
        }
        if !sorted {
            self.spans[base..].sort_by_key(|(at, _)| *at);
        }
        Ok(base)
    }

    /// Appends the value of a field that lies in part of the stack, which is not empty.
    fn field(&mut self, field: &Field, from: usize, end: usize) -> Outcome {
        match field.shape {
            Shape::One => match field.kind {
                Kind::Message(id) if end - from > 1 => {
                    // The parts of a message behind each other are their merge.
                    let mut whole = Vec::new();
                    for (_, value) in &self.spans[from..end] {
                        let Value::Bytes(part) = value else { return Err(Unwritable) };
                        whole.extend_from_slice(part);
                    }
                    let Self { mapping, out, depth, .. } = self;
                    let spans = Vec::new();
                    Writer { mapping, out, spans, depth: *depth }.message(id, &whole)
                }
                kind => self.value(kind, self.spans[end - 1].1),
            },
            Shape::List => {
                self.out.push(b'[');
                let mut first = true;
                for at in from..end {
                    match self.spans[at].1 {
                        Value::Bytes(mut run) if field.kind.is_packable() => {
                            while !run.is_empty() {
                                let value = wire::packed(&mut run, packing(field.kind));
                                self.separate(&mut first);
                                self.value(field.kind, value.ok_or(Unwritable)?)?;
                            }
                        }
                        value => {
                            self.separate(&mut first);
                            self.value(field.kind, value)?;
                        }
                    }
                }
                self.out.push(b']');
                Ok(())
            }
            Shape::Map(key) => self.map(key, field.kind, from, end),
        }
    }

    fn separate(&mut self, first: &mut bool) {
        if !std::mem::take(first) {
            self.out.push(b',');
        }
    }

    fn map(&mut self, key_kind: Kind, kind: Kind, from: usize, end: usize) -> Outcome {
        // Of entries with the same key the last counts.
        let mut entries: Vec<(Option<Value<'a>>, Option<Value<'a>>)> =
            Vec::with_capacity(end - from);
        let mut places: HashMap<Vec<u8>, usize> = HashMap::new();
        for at in from..end {
            let Value::Bytes(entry) = self.spans[at].1 else { return Err(Unwritable) };
            let (mut key, mut value) = (None, None);
            for found in wire::fields(entry) {
                match found? {
                    Found { number: 1, value: found } => key = Some(found),
                    Found { number: 2, value: found } => value = Some(found),
                    _ => {}
                }
            }
            if end - from > 1 {
                let mut name = Vec::new();
                Writer { mapping: self.mapping, out: &mut name, spans: Vec::new(), depth: 0 }
                    .key(key_kind, key)?;
                match places.entry(name) {
                    hash_map::Entry::Occupied(place) => {
                        entries[*place.get()] = (key, value);
                        continue;
                    }
                    hash_map::Entry::Vacant(place) => _ = place.insert(entries.len()),
                }
            }
            entries.push((key, value));
        }
        self.out.push(b'{');
        let mut first = true;
        for (key, value) in entries {
            self.separate(&mut first);
            self.key(key_kind, key)?;
            self.out.push(b':');
            match value {
                Some(value) => self.value(kind, value)?,
                None => self.zero(kind)?,
            }
        }
        self.out.push(b'}');
        Ok(())
    }

    /// Appends a map's key, which JSON writes as a string whatever it is.
    fn key(&mut self, kind: Kind, key: Option<Value<'a>>) -> Outcome {
        let quoted = matches!(
            kind,
            Kind::String
                | Kind::Int64
                | Kind::Uint64
                | Kind::Sint64
                | Kind::Fixed64
                | Kind::Sfixed64
        );
        if !quoted {
            self.out.push(b'"');
        }
        match key {
            Some(key) => self.value(kind, key)?,
            None => self.zero(kind)?,
        }
        if !quoted {
            self.out.push(b'"');
        }
        Ok(())
    }

    fn value(&mut self, kind: Kind, value: Value<'a>) -> Outcome {
        match (kind, value) {
            (Kind::Bool, Value::Varint(value)) => {
                self.out.extend_from_slice(if value == 0 { b"false" } else { b"true" });
            }
            (Kind::Int32, Value::Varint(value)) => self.number(value as i32),
            (Kind::Uint32, Value::Varint(value)) => self.number(value as u32),
            (Kind::Sint32, Value::Varint(value)) => self.number(unzigzag(value) as i32),
            (Kind::Fixed32, Value::Fixed32(value)) => self.number(value),
            (Kind::Sfixed32, Value::Fixed32(value)) => self.number(value as i32),
            (Kind::Int64, Value::Varint(value)) | (Kind::Sfixed64, Value::Fixed64(value)) => {
                self.quoted(value as i64);
            }
            (Kind::Uint64, Value::Varint(value)) | (Kind::Fixed64, Value::Fixed64(value)) => {
                self.quoted(value);
            }
            (Kind::Sint64, Value::Varint(value)) => self.quoted(unzigzag(value)),
            (Kind::Float, Value::Fixed32(bits)) => {
                let value = f32::from_bits(bits);
                text::put_float(value.into(), &value, self.out);
            }
            (Kind::Double, Value::Fixed64(bits)) => {
                let value = f64::from_bits(bits);
                text::put_float(value, &value, self.out);
            }
            (Kind::String, Value::Bytes(bytes)) => {
                put_string(std::str::from_utf8(bytes).map_err(|_| Unwritable)?, self.out);
            }
            (Kind::Bytes, Value::Bytes(bytes)) => {
                self.out.push(b'"');
                text::put_bytes(bytes, self.out);
                self.out.push(b'"');
            }
            (Kind::Enum(id), Value::Varint(value)) => {
                let described = self.mapping.enumeration(id);
                let number = value as i32;
                match described.by_number.get(&number) {
                    _ if described.is_null => self.out.extend_from_slice(b"null"),
                    Some(name) => {
                        self.out.push(b'"');
                        self.out.extend_from_slice(name.as_bytes());
                        self.out.push(b'"');
                    }
                    None => self.number(number),
                }
            }
            (Kind::Message(id), Value::Bytes(message)) => self.message(id, message)?,
            _ => return Err(Unwritable),
        }
        Ok(())
    }

    /// Appends the default value of a field that is unset.
    fn default(&mut self, field: &Field) -> Outcome {
        match (field.shape, field.kind) {
            (Shape::List, _) => self.out.extend_from_slice(b"[]"),
            (Shape::Map(_), _) => self.out.extend_from_slice(b"{}"),
            (Shape::One, Kind::Message(_)) => self.out.extend_from_slice(b"null"),
            (Shape::One, kind) => self.zero(kind)?,
        }
        Ok(())
    }

    fn zero(&mut self, kind: Kind) -> Outcome {
        let value = match kind {
            Kind::String | Kind::Bytes | Kind::Message(_) => Value::Bytes(&[]),
            Kind::Fixed32 | Kind::Sfixed32 | Kind::Float => Value::Fixed32(0),
            Kind::Fixed64 | Kind::Sfixed64 | Kind::Double => Value::Fixed64(0),
            _ => Value::Varint(0),
        };
        self.value(kind, value)
    }

    fn number(&mut self, value: impl itoa::Integer) {
        self.out.extend_from_slice(itoa::Buffer::new().format(value).as_bytes());
    }

    /// JavaScript's numbers do not hold all integers of 64 bits.
    fn quoted(&mut self, value: impl itoa::Integer) {
        self.out.push(b'"');
        self.number(value);
        self.out.push(b'"');
    }

    fn any(&mut self, message: &'a [u8]) -> Outcome {
        let (mut url, mut value): (&[u8], &[u8]) = (&[], &[]);
        for found in wire::fields(message) {
            match found? {
                Found { number: 1, value: Value::Bytes(found) } => url = found,
                Found { number: 2, value: Value::Bytes(found) } => value = found,
                _ => {}
            }
        }
        self.out.push(b'{');
        if url.is_empty() && value.is_empty() {
            self.out.push(b'}');
            return Ok(());
        }
        let url = std::str::from_utf8(url).map_err(|_| Unwritable)?;
        self.out.extend_from_slice(b"\"@type\":");
        put_string(url, self.out);
        let mapping = self.mapping;
        match mapping.find(url.rsplit('/').next().unwrap_or_default()) {
            Some(id) if mapping.message(id).form == Form::Object => {
                self.members(mapping.message(id), value, false)?;
            }
            Some(id) => {
                self.out.extend_from_slice(b",\"value\":");
                self.message(id, value)?;
            }
            // Of a type that a newer server knows; better opaque than gone.
            None => {
                self.out.extend_from_slice(b",\"value\":\"");
                text::put_bytes(value, self.out);
                self.out.push(b'"');
            }
        }
        self.out.push(b'}');
        Ok(())
    }
}

fn is_default(value: Value<'_>) -> bool {
    match value {
        Value::Varint(value) | Value::Fixed64(value) => value == 0,
        Value::Fixed32(value) => value == 0,
        Value::Bytes(bytes) => bytes.is_empty(),
    }
}

fn packing(kind: Kind) -> Packed {
    match kind {
        Kind::Fixed32 | Kind::Sfixed32 | Kind::Float => Packed::Fixed32,
        Kind::Fixed64 | Kind::Sfixed64 | Kind::Double => Packed::Fixed64,
        _ => Packed::Varint,
    }
}

fn unzigzag(value: u64) -> i64 {
    (value >> 1) as i64 ^ -((value & 1) as i64)
}

/// Appends a JSON string.
pub fn put_string(text: &str, out: &mut Vec<u8>) {
    out.push(b'"');
    let bytes = text.as_bytes();
    let mut from = 0;
    for (at, &byte) in bytes.iter().enumerate() {
        if byte >= 0x20 && byte != b'"' && byte != b'\\' {
            continue;
        }
        out.extend_from_slice(&bytes[from..at]);
        from = at + 1;
        let short = match byte {
            b'"' => b'"',
            b'\\' => b'\\',
            b'\n' => b'n',
            b'\r' => b'r',
            b'\t' => b't',
            8 => b'b',
            12 => b'f',
            _ => {
                const HEX: &[u8; 16] = b"0123456789abcdef";
                out.extend_from_slice(b"\\u00");
                out.extend_from_slice(&[HEX[usize::from(byte >> 4)], HEX[usize::from(byte & 15)]]);
                continue;
            }
        };
        out.extend_from_slice(&[b'\\', short]);
    }
    out.extend_from_slice(&bytes[from..]);
    out.push(b'"');
}
