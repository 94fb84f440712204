//! JSON text to encoded messages.

use std::{collections::HashSet, fmt};

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use super::{Field, Form, Kind, Mapping, Shape, Type, TypeId, put::Scalar, wire};

/// Messages nest no deeper than decoders follow them.
const MAX_DEPTH: usize = 96;

/// What is wrong with the text, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Path of the field, by the names of the protos, such as `spec.labels[k]`; empty for the
    /// whole.
    pub field: String,
    /// What is wrong with it and what would be right.
    pub description: String,
}

/// Reads JSON and texts into one encoded message; later fields are merged into earlier ones.
#[derive(Debug)]
pub struct Reader<'m> {
    pub(super) mapping: &'m Mapping,
    pub(super) out: Vec<u8>,
    pub(super) path: String,
    depth: usize,
    /// Fields of the messages that are being read, and whether each was set.
    seen: Vec<(u16, bool)>,
    pub(super) problem: Option<Problem>,
}

/// What a value is read for.
#[derive(Clone, Copy)]
enum Place<'m> {
    /// A field, whole.
    Field(&'m Field),
    /// One of the values of a list or a map.
    Item(u32, Kind),
    /// The fields of a message.
    Body(TypeId),
}

impl<'m> Reader<'m> {
    /// A reader of an empty message.
    pub fn new(mapping: &'m Mapping) -> Self {
        Self {
            mapping,
            out: Vec::new(),
            path: String::new(),
            depth: 0,
            seen: Vec::new(),
            problem: None,
        }
    }

    /// The message as read so far.
    pub fn as_message(&self) -> &[u8] {
        &self.out
    }

    /// The message as read so far.
    pub fn into_message(self) -> Vec<u8> {
        self.out
    }

    /// Reads a message of the type.
    pub fn message(&mut self, id: TypeId, json: &[u8]) -> Result<(), Problem> {
        self.read(Place::Body(id), json)
    }

    /// Reads the value of a field.
    pub fn field(&mut self, field: &'m Field, json: &[u8]) -> Result<(), Problem> {
        let length = self.enter(&field.name);
        let read = self.read(Place::Field(field), json);
        self.path.truncate(length);
        read
    }

    fn read(&mut self, place: Place<'m>, json: &[u8]) -> Result<(), Problem> {
        let mut deserializer = serde_json::Deserializer::from_slice(json);
        let read = Seed { reader: self, place }.deserialize(&mut deserializer);
        let read = read.and_then(|()| deserializer.end());
        match (self.problem.take(), read) {
            (Some(problem), _) => Err(problem),
            (None, Ok(())) => Ok(()),
            (None, Err(error)) => {
                Err(Problem { field: String::new(), description: format!("is not JSON: {error}") })
            }
        }
    }

    /// Adds a field to the path; returns the length before.
    pub(super) fn enter(&mut self, name: &str) -> usize {
        let length = self.path.len();
        if length > 0 {
            self.path.push('.');
        }
        self.path.push_str(name);
        length
    }

    pub(super) fn enter_key(&mut self, key: impl fmt::Display) -> usize {
        use fmt::Write as _;
        let length = self.path.len();
        // Writing to a string does not fail.
        let _ = write!(self.path, "[{key}]");
        length
    }

    /// Remembers the first problem and ends the reading.
    pub(super) fn fault<T, E: Error>(&mut self, description: impl Into<String>) -> Result<T, E> {
        let (field, description) = (self.path.clone(), description.into());
        self.problem.get_or_insert(Problem { field, description });
        Err(E::custom(""))
    }

    pub(super) fn open<E: Error>(&mut self, number: u32) -> Result<usize, E> {
        if self.depth == MAX_DEPTH {
            return self.fault("nests too deeply");
        }
        self.depth += 1;
        Ok(wire::open(number, &mut self.out))
    }

    pub(super) fn shut(&mut self, start: usize) {
        self.depth -= 1;
        wire::close(start, &mut self.out);
    }

    fn scalar<E: Error>(&mut self, place: Place<'m>, value: Scalar<'_>) -> Result<(), E> {
        let null = value == Scalar::Null;
        match place {
            Place::Field(field) => match field.shape {
                Shape::One if null && !self.mapping.takes_null(field.kind) => Ok(()),
                Shape::One => self.put(field.number, field.kind, value),
                Shape::List | Shape::Map(_) if null => Ok(()),
                Shape::List => self.fault("must be a list"),
                Shape::Map(_) => self.fault("must be an object"),
            },
            Place::Item(_, kind) if null && !self.mapping.takes_null(kind) => {
                self.fault("must not be null")
            }
            Place::Item(number, kind) => self.put(number, kind, value),
            Place::Body(id) => self.put_body(id, value),
        }
    }

    fn list<'de, A: SeqAccess<'de>>(
        &mut self,
        place: Place<'m>,
        seq: &mut A,
    ) -> Result<(), A::Error> {
        let mapping = self.mapping;
        let (number, kind, form) = match place {
            Place::Field(field) if field.shape == Shape::List => {
                return self.elements(field.number, field.kind, seq);
            }
            Place::Field(field) if field.shape != Shape::One => {
                return self.fault("must be an object");
            }
            Place::Field(Field { number, kind, .. }) => (Some(*number), *kind, mapping.form(*kind)),
            Place::Item(number, kind) => (Some(number), kind, mapping.form(kind)),
            Place::Body(id) => (None, Kind::Message(id), mapping.message(id).form),
        };
        let start = number.map(|number| self.open(number)).transpose()?;
        match form {
            Form::List => self.elements(1, mapping.inner(kind), seq)?,
            Form::Value => {
                let inner = self.open(6)?;
                self.elements(1, kind, seq)?;
                self.shut(inner);
            }
            _ => self.fault("must not be a list")?,
        }
        if let Some(start) = start {
            self.shut(start);
        }
        Ok(())
    }

    fn elements<'de, A: SeqAccess<'de>>(
        &mut self,
        number: u32,
        kind: Kind,
        seq: &mut A,
    ) -> Result<(), A::Error> {
        for at in 0.. {
            let length = self.enter_key(at);
            let seed = Seed { reader: self, place: Place::Item(number, kind) };
            let more = seq.next_element_seed(seed)?.is_some();
            self.path.truncate(length);
            if !more {
                break;
            }
        }
        Ok(())
    }

    fn object<'de, A: MapAccess<'de>>(
        &mut self,
        place: Place<'m>,
        map: &mut A,
    ) -> Result<(), A::Error> {
        let mapping = self.mapping;
        let (number, kind) = match place {
            Place::Field(field) => match field.shape {
                Shape::Map(key) => return self.entries(field.number, key, field.kind, map),
                Shape::List => return self.fault("must be a list"),
                Shape::One => (Some(field.number), field.kind),
            },
            Place::Item(number, kind) => (Some(number), kind),
            Place::Body(id) => (None, Kind::Message(id)),
        };
        let Kind::Message(id) = kind else { return self.fault("must not be an object") };
        let start = number.map(|number| self.open(number)).transpose()?;
        let described = mapping.message(id);
        match described.form {
            Form::Object => {
                let base = self.seen.len();
                while let Some(key) = map.next_key_seed(KeySeed(described))? {
                    self.member(described, base, key, |seed| map.next_value_seed(seed))?;
                }
                self.seen.truncate(base);
            }
            Form::Struct => self.entries(1, Kind::String, mapping.inner(kind), map)?,
            Form::Value => {
                let inner = self.open(5)?;
                self.entries(1, Kind::String, kind, map)?;
                self.shut(inner);
            }
            Form::Any => self.any(map)?,
            Form::List => self.fault("must be a list")?,
            Form::Timestamp | Form::Duration | Form::FieldMask | Form::Wrapper => {
                self.fault("must not be an object")?;
            }
        }
        if let Some(start) = start {
            self.shut(start);
        }
        Ok(())
    }

    fn entries<'de, A: MapAccess<'de>>(
        &mut self,
        number: u32,
        key_kind: Kind,
        kind: Kind,
        map: &mut A,
    ) -> Result<(), A::Error> {
        let mut keys = HashSet::new();
        while let Some(key) = map.next_key::<String>()? {
            let length = match key_kind {
                Kind::String if number == 1 => self.enter(&key),
                _ => self.enter_key(&key),
            };
            let start = self.open(number)?;
            self.put_key(key_kind, &key)?;
            if !keys.insert(key) {
                self.fault("is given twice")?;
            }
            map.next_value_seed(Seed { reader: self, place: Place::Item(2, kind) })?;
            self.shut(start);
            self.path.truncate(length);
        }
        Ok(())
    }

    fn member<E: Error>(
        &mut self,
        described: &'m Type,
        base: usize,
        key: Key,
        read: impl FnOnce(Seed<'_, 'm>) -> Result<(), E>,
    ) -> Result<(), E> {
        let at = match key {
            Key::Known(at) => at,
            Key::Unknown(name) => {
                self.enter(&name);
                return match described.nearest(&name) {
                    Some(near) => self.fault(format!("is no field here; did you mean `{near}`?")),
                    None => self.fault("is no field here"),
                };
            }
        };
        let field = &described.fields[at];
        let length = self.enter(&field.name);
        if self.seen[base..].iter().any(|(seen, _)| usize::from(*seen) == at) {
            self.fault("is given twice")?;
        }
        let before = self.out.len();
        read(Seed { reader: self, place: Place::Field(field) })?;
        let set = self.out.len() > before;
        if let Some(oneof) = field.oneof.filter(|_| set) {
            let other = self.seen[base..].iter().find_map(|(seen, set)| {
                let other = &described.fields[usize::from(*seen)];
                (*set && other.oneof == Some(oneof)).then_some(&other.name)
            });
            if let Some(other) = other {
                self.fault(format!("excludes `{other}`, which is given too"))?;
            }
        }
        self.seen.push((at as u16, set));
        self.path.truncate(length);
        Ok(())
    }

    fn any<'de, A: MapAccess<'de>>(&mut self, map: &mut A) -> Result<(), A::Error> {
        let mapping = self.mapping;
        let mut members: Vec<(String, Box<RawValue>)> = Vec::new();
        // `@type` may come last, and nothing can be read before it is known.
        while let Some((key, value)) = map.next_entry::<String, Box<RawValue>>()? {
            if members.iter().any(|(name, _)| *name == key) {
                self.enter(&key);
                self.fault("is given twice")?;
            }
            members.push((key, value));
        }
        if members.is_empty() {
            return Ok(());
        }
        let at = members.iter().position(|(name, _)| name == "@type");
        let url = at.and_then(|at| {
            let (_, url) = members.swap_remove(at);
            serde_json::from_str::<String>(url.get()).ok()
        });
        let Some(url) = url else {
            self.enter("@type");
            return self.fault("must name the type");
        };
        let found = url.rsplit_once('/').and_then(|(_, name)| mapping.find(name));
        let Some(id) = found else {
            self.enter("@type");
            return self.fault("names no known type");
        };
        wire::put_bytes(1, url.as_bytes(), &mut self.out);
        let start = self.open(2)?;
        let described = mapping.message(id);
        let base = self.seen.len();
        for (name, value) in members {
            let mut value = serde_json::Deserializer::from_str(value.get());
            let read = if described.form == Form::Object {
                let key = KeySeed(described).find(&name);
                self.member(described, base, key, |seed| seed.deserialize(&mut value))
            } else if name == "value" {
                let length = self.enter(&name);
                let seed = Seed { reader: self, place: Place::Body(id) };
                let read = seed.deserialize(&mut value);
                self.path.truncate(length);
                read
            } else {
                self.enter(&name);
                self.fault("is no field here")
            };
            read.map_err(A::Error::custom)?;
        }
        self.seen.truncate(base);
        self.shut(start);
        Ok(())
    }
}

impl Mapping {
    fn form(&self, kind: Kind) -> Form {
        match kind {
            Kind::Message(id) => self.message(id).form,
            // No scalar takes what is asked for here: a list.
            _ => Form::Object,
        }
    }

    /// The kind of the values in a `Struct` or a `ListValue`.
    fn inner(&self, kind: Kind) -> Kind {
        match kind {
            Kind::Message(id) => self.message(id).fields[0].kind,
            other => other,
        }
    }
}

/// The name of a member.
enum Key {
    Known(usize),
    Unknown(String),
}

struct KeySeed<'m>(&'m Type);

impl KeySeed<'_> {
    fn find(&self, name: &str) -> Key {
        self.0.position(name).map_or_else(|| Key::Unknown(name.to_owned()), Key::Known)
    }
}

impl<'de> DeserializeSeed<'de> for KeySeed<'_> {
    type Value = Key;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Key, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for KeySeed<'_> {
    type Value = Key;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a name")
    }

    fn visit_str<E: Error>(self, name: &str) -> Result<Key, E> {
        Ok(self.find(name))
    }
}

/// Reads one value.
struct Seed<'r, 'm> {
    reader: &'r mut Reader<'m>,
    place: Place<'m>,
}

impl Seed<'_, '_> {
    fn scalar<E: Error>(self, value: Scalar<'_>) -> Result<(), E> {
        self.reader.scalar(self.place, value)
    }
}

impl<'de> DeserializeSeed<'de> for Seed<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Seed<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        self.scalar(Scalar::Null)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<(), E> {
        self.scalar(Scalar::Bool(value))
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<(), E> {
        self.scalar(Scalar::Uint(value))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<(), E> {
        self.scalar(Scalar::Int(value))
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<(), E> {
        self.scalar(Scalar::Float(value))
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<(), E> {
        self.scalar(Scalar::Text(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        self.reader.list(self.place, &mut seq)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        self.reader.object(self.place, &mut map)
    }
}
