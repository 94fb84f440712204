//! Values without parts, from JSON's scalars and from texts to their encoding.

use serde::de::Error;

use super::{
    EnumId, Field, Form, Kind, Shape, TypeId,
    read::{Problem, Reader},
    text, wire,
};
use crate::near::nearest;

/// What a scalar of JSON can be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Scalar<'a> {
    Null,
    Bool(bool),
    Uint(u64),
    Int(i64),
    Float(f64),
    Text(&'a str),
}

impl<'m> Reader<'m> {
    /// Reads one value of a field from a path or a query, where there are only texts.
    /// `within` are the fields from the message down to it.
    pub fn text(
        &mut self,
        within: &[&'m Field],
        field: &'m Field,
        text: &str,
    ) -> Result<(), Problem> {
        let mut starts = Vec::with_capacity(within.len());
        let length = self.path.len();
        for outer in within {
            self.enter(&outer.name);
            starts.push(wire::open(outer.number, &mut self.out));
        }
        self.enter(&field.name);
        let put = self.put_text(field.number, field.kind, text);
        self.close(starts, length);
        put.map_err(|_: serde_json::Error| self.take_problem())
    }

    /// Reads one entry of a map from a query.
    pub fn entry(
        &mut self,
        within: &[&'m Field],
        field: &'m Field,
        key: &str,
        text: &str,
    ) -> Result<(), Problem> {
        let mut starts = Vec::with_capacity(within.len() + 1);
        let length = self.path.len();
        for outer in within {
            self.enter(&outer.name);
            starts.push(wire::open(outer.number, &mut self.out));
        }
        self.enter(&field.name);
        self.enter_key(key);
        starts.push(wire::open(field.number, &mut self.out));
        let put = match field.shape {
            Shape::Map(kind) => {
                self.put_key(kind, key).and_then(|()| self.put_text(2, field.kind, text))
            }
            Shape::One | Shape::List => self.fault("is no map"),
        };
        self.close(starts, length);
        put.map_err(|_: serde_json::Error| self.take_problem())
    }

    fn close(&mut self, starts: Vec<usize>, path_length: usize) {
        for start in starts.into_iter().rev() {
            wire::close(start, &mut self.out);
        }
        self.path.truncate(path_length);
    }

    fn take_problem(&mut self) -> Problem {
        self.problem.take().unwrap_or_else(|| Problem {
            field: self.path.clone(),
            description: "is malformed".to_owned(),
        })
    }

    pub(super) fn put_text<E: Error>(
        &mut self,
        number: u32,
        kind: Kind,
        text: &str,
    ) -> Result<(), E> {
        let mapping = self.mapping;
        match kind {
            Kind::Bool => match text {
                "true" => self.put(number, kind, Scalar::Bool(true)),
                "false" => self.put(number, kind, Scalar::Bool(false)),
                _ => self.fault("must be `true` or `false`"),
            },
            Kind::Enum(_) => match text::integer(text).map(i64::try_from) {
                Some(Ok(value)) => self.put(number, kind, Scalar::Int(value)),
                _ => self.put(number, kind, Scalar::Text(text)),
            },
            Kind::Message(id) => match mapping.message(id).form {
                Form::Wrapper => {
                    let start = self.open(number)?;
                    self.put_text(1, mapping.message(id).fields[0].kind, text)?;
                    self.shut(start);
                    Ok(())
                }
                Form::Timestamp | Form::Duration | Form::FieldMask => {
                    self.put(number, kind, Scalar::Text(text))
                }
                _ => self.fault("is a message; only a request's body can hold it"),
            },
            _ => self.put(number, kind, Scalar::Text(text)),
        }
    }

    pub(super) fn put_key<E: Error>(&mut self, kind: Kind, key: &str) -> Result<(), E> {
        match kind {
            Kind::Bool => self.put_text(1, kind, key),
            _ => self.put(1, kind, Scalar::Text(key)),
        }
    }

    pub(super) fn put<E: Error>(
        &mut self,
        number: u32,
        kind: Kind,
        value: Scalar<'_>,
    ) -> Result<(), E> {
        match kind {
            Kind::Bool => match value {
                Scalar::Bool(value) => wire::put_varint(number, value.into(), &mut self.out),
                _ => return self.fault("must be true or false"),
            },
            Kind::String => match value {
                Scalar::Text(text) => wire::put_bytes(number, text.as_bytes(), &mut self.out),
                _ => return self.fault("must be a string"),
            },
            Kind::Bytes => {
                let bytes = if let Scalar::Text(text) = value { text::bytes(text) } else { None };
                let Some(bytes) = bytes else { return self.fault("must be base64") };
                wire::put_bytes(number, &bytes, &mut self.out);
            }
            Kind::Float | Kind::Double => return self.put_float(number, kind, value),
            Kind::Enum(id) => return self.put_enum(number, id, value),
            Kind::Message(id) => {
                let start = self.open(number)?;
                self.put_body(id, value)?;
                self.shut(start);
            }
            _ => return self.put_integer(number, kind, value),
        }
        Ok(())
    }

    fn put_integer<E: Error>(
        &mut self,
        number: u32,
        kind: Kind,
        value: Scalar<'_>,
    ) -> Result<(), E> {
        let (least, most): (i128, i128) = match kind {
            Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 => (i32::MIN.into(), i32::MAX.into()),
            Kind::Uint32 | Kind::Fixed32 => (0, u32::MAX.into()),
            Kind::Uint64 | Kind::Fixed64 => (0, u64::MAX.into()),
            _ => (i64::MIN.into(), i64::MAX.into()),
        };
        let value = match value {
            Scalar::Uint(value) => Some(value.into()),
            Scalar::Int(value) => Some(value.into()),
            Scalar::Float(value) if value.fract() == 0.0 && value.abs() < 1e20 => {
                Some(value as i128)
            }
            Scalar::Text(text) => text::integer(text),
            _ => None,
        };
        let Some(value) = value.filter(|value| (least..=most).contains(value)) else {
            return self.fault(format!("must be a whole number from {least} to {most}"));
        };
        let value = value as i64;
        let out = &mut self.out;
        match kind {
            Kind::Sint32 | Kind::Sint64 => {
                wire::put_varint(number, ((value << 1) ^ (value >> 63)) as u64, out);
            }
            Kind::Fixed32 | Kind::Sfixed32 => {
                wire::put_key(number, 5, out);
                out.extend_from_slice(&(value as u32).to_le_bytes());
            }
            Kind::Fixed64 | Kind::Sfixed64 => {
                wire::put_key(number, 1, out);
                out.extend_from_slice(&(value as u64).to_le_bytes());
            }
            _ => wire::put_varint(number, value as u64, out),
        }
        Ok(())
    }

    fn put_float<E: Error>(&mut self, number: u32, kind: Kind, value: Scalar<'_>) -> Result<(), E> {
        let value = match value {
            Scalar::Uint(value) => Some(value as f64),
            Scalar::Int(value) => Some(value as f64),
            Scalar::Float(value) => Some(value),
            Scalar::Text(text) => text::float(text),
            Scalar::Null | Scalar::Bool(_) => None,
        };
        let Some(value) = value else {
            return self.fault("must be a number, \"NaN\", \"Infinity\" or \"-Infinity\"");
        };
        if kind == Kind::Double {
            wire::put_key(number, 1, &mut self.out);
            self.out.extend_from_slice(&value.to_le_bytes());
            return Ok(());
        }
        let single = value as f32;
        if value.is_finite() && single.is_infinite() {
            return self.fault("is larger than a single-precision number can be");
        }
        wire::put_key(number, 5, &mut self.out);
        self.out.extend_from_slice(&single.to_le_bytes());
        Ok(())
    }

    fn put_enum<E: Error>(&mut self, number: u32, id: EnumId, value: Scalar<'_>) -> Result<(), E> {
        let described = self.mapping.enumeration(id);
        let found = match value {
            Scalar::Null => Some(0),
            Scalar::Uint(value) => i32::try_from(value).ok(),
            Scalar::Int(value) => i32::try_from(value).ok(),
            Scalar::Float(value) if value.fract() == 0.0 && value.abs() <= 2_147_483_647.0 => {
                Some(value as i32)
            }
            Scalar::Text(text) => described.by_name.get(text).copied(),
            Scalar::Float(_) | Scalar::Bool(_) => None,
        };
        if let Some(value) = found {
            wire::put_varint(number, i64::from(value) as u64, &mut self.out);
            return Ok(());
        }
        let near = match value {
            Scalar::Text(text) => nearest(text, described.by_name.keys().map(|name| &**name)),
            _ => None,
        };
        if let Some(name) = near {
            return self.fault(format!("is no value of this enum; did you mean `{name}`?"));
        }
        let mut names: Vec<_> = described.by_name.iter().collect();
        names.sort_by_key(|(_, number)| **number);
        let names: Vec<_> = names.iter().map(|(name, _)| &***name).collect();
        self.fault(format!("must be one of {}", names.join(", ")))
    }

    /// Appends the fields of a message that JSON writes as a scalar.
    pub(super) fn put_body<E: Error>(&mut self, id: TypeId, value: Scalar<'_>) -> Result<(), E> {
        let described = self.mapping.message(id);
        match (described.form, value) {
            (Form::Wrapper, value) if value != Scalar::Null => {
                self.put(1, described.fields[0].kind, value)
            }
            (Form::Value, value) => {
                match value {
                    Scalar::Null => wire::put_varint(1, 0, &mut self.out),
                    Scalar::Bool(value) => wire::put_varint(4, value.into(), &mut self.out),
                    Scalar::Text(text) => wire::put_bytes(3, text.as_bytes(), &mut self.out),
                    number => return self.put_float(2, Kind::Double, number),
                }
                Ok(())
            }
            (Form::Timestamp, Scalar::Text(text)) => match text::timestamp(text) {
                Some(parts) => {
                    self.put_parts(parts);
                    Ok(())
                }
                None => self.fault("must be a time such as `2026-01-31T12:00:00Z`"),
            },
            (Form::Duration, Scalar::Text(text)) => match text::duration(text) {
                Some(parts) => {
                    self.put_parts(parts);
                    Ok(())
                }
                None => self.fault("must be a duration in seconds such as `1.5s`"),
            },
            (Form::FieldMask, Scalar::Text(text)) => match text::field_mask(text) {
                Some(paths) => {
                    for path in paths {
                        wire::put_bytes(1, path.as_bytes(), &mut self.out);
                    }
                    Ok(())
                }
                None => self.fault("must be names in lowerCamelCase with commas between"),
            },
            (Form::Timestamp, _) => self.fault("must be a time such as `2026-01-31T12:00:00Z`"),
            (Form::Duration, _) => self.fault("must be a duration in seconds such as `1.5s`"),
            (Form::FieldMask, _) => self.fault("must be a string of names with commas between"),
            (Form::List, _) => self.fault("must be a list"),
            (Form::Object | Form::Any | Form::Struct | Form::Wrapper, _) => {
                self.fault("must be an object")
            }
        }
    }

    fn put_parts(&mut self, (seconds, nanos): (i64, i32)) {
        wire::put_varint(1, seconds as u64, &mut self.out);
        wire::put_varint(2, i64::from(nanos) as u64, &mut self.out);
    }
}
