//! The protobuf JSON mapping, from the descriptors: encoded messages to JSON text and back.
//!
//! It works on encoded bytes and never builds a message in memory: reading JSON appends
//! fields to a buffer, and two buffers of one type behind each other are their merge. It
//! knows nothing of HTTP and of no method.

mod put;
mod read;
pub mod text;
pub mod wire;
mod write;

use std::collections::HashMap;

use prost_reflect::{
    Cardinality, DescriptorPool, EnumDescriptor, FieldDescriptor, Kind as Described,
    MessageDescriptor,
};

pub use self::{
    read::{Problem, Reader},
    write::Unwritable,
};
use crate::near::nearest;

/// The message and enum types of a descriptor pool, laid out for fast look-ups.
#[derive(Debug)]
pub struct Mapping {
    types: Vec<Type>,
    enums: Vec<Enum>,
    by_name: HashMap<Box<str>, TypeId>,
}

/// A message type of a [`Mapping`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TypeId(u32);

/// An enum type of a [`Mapping`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EnumId(u32);

/// A message type.
#[derive(Debug)]
pub struct Type {
    /// Full name, such as `baton.v1.Task`.
    pub name: Box<str>,
    /// How it looks in JSON.
    pub form: Form,
    /// In the order of their numbers.
    pub fields: Vec<Field>,
    /// Position in `fields` by name, both spellings.
    names: HashMap<Box<str>, usize>,
    /// Position in `fields` by number, for small numbers.
    numbers: Vec<Option<u16>>,
}

/// How a message looks in JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// An object of its fields.
    Object,
    /// An object with `@type`.
    Any,
    /// A string.
    Timestamp,
    /// A string.
    Duration,
    /// A string.
    FieldMask,
    /// Any object.
    Struct,
    /// Anything.
    Value,
    /// Any array.
    List,
    /// The value of its only field.
    Wrapper,
}

/// A field of a message type.
#[derive(Debug)]
pub struct Field {
    /// Number.
    pub number: u32,
    /// Name in the proto.
    pub name: Box<str>,
    /// Name in JSON.
    pub json_name: Box<str>,
    /// Whether it is one value, a list or a map.
    pub shape: Shape,
    /// Type of the value, or of each.
    pub kind: Kind,
    /// Whether being set to the default differs from being unset.
    pub presence: bool,
    /// Which group of fields it belongs to of which at most one is set.
    pub oneof: Option<u16>,
    /// `"jsonName":`
    key: Box<[u8]>,
}

/// Whether a field is one value, a list or a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// One value.
    One,
    /// A list.
    List,
    /// A map with keys of this kind.
    Map(Kind),
}

/// Type of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// True or false.
    Bool,
    /// A varint of 32 bits.
    Int32,
    /// A varint of 64 bits.
    Int64,
    /// A varint of 32 bits without a sign.
    Uint32,
    /// A varint of 64 bits without a sign.
    Uint64,
    /// A zigzag varint of 32 bits.
    Sint32,
    /// A zigzag varint of 64 bits.
    Sint64,
    /// Four bytes without a sign.
    Fixed32,
    /// Eight bytes without a sign.
    Fixed64,
    /// Four bytes.
    Sfixed32,
    /// Eight bytes.
    Sfixed64,
    /// Single precision.
    Float,
    /// Double precision.
    Double,
    /// UTF-8.
    String,
    /// Bytes.
    Bytes,
    /// A value of an enum.
    Enum(EnumId),
    /// A message.
    Message(TypeId),
}

/// An enum type.
#[derive(Debug)]
struct Enum {
    by_name: HashMap<Box<str>, i32>,
    by_number: HashMap<i32, Box<str>>,
    /// `google.protobuf.NullValue`, which is `null` in JSON.
    is_null: bool,
}

impl Mapping {
    /// Lays out the types of a pool.
    pub fn new(pool: &DescriptorPool) -> Self {
        let mut by_name = HashMap::new();
        let mut next = (0..).map(TypeId);
        for message in pool.all_messages().filter(|message| !message.is_map_entry()) {
            by_name.extend(next.next().map(|id| (message.full_name().into(), id)));
        }
        let enum_ids: HashMap<_, _> = pool
            .all_enums()
            .zip((0..).map(EnumId))
            .map(|(described, id)| (described.full_name().to_owned(), id))
            .collect();
        let types = pool
            .all_messages()
            .filter(|message| !message.is_map_entry())
            .map(|message| Type::new(&message, &by_name, &enum_ids))
            .collect();
        let enums = pool.all_enums().map(|described| Enum::new(&described)).collect();
        Self { types, enums, by_name }
    }

    /// A message type by its full name.
    pub fn find(&self, name: &str) -> Option<TypeId> {
        self.by_name.get(name).copied()
    }

    /// A message type.
    pub fn message(&self, id: TypeId) -> &Type {
        &self.types[id.0 as usize]
    }

    fn enumeration(&self, id: EnumId) -> &Enum {
        &self.enums[id.0 as usize]
    }

    /// Whether a field of that kind is set to null rather than unset by JSON's null.
    fn takes_null(&self, kind: Kind) -> bool {
        match kind {
            Kind::Message(id) => self.message(id).form == Form::Value,
            Kind::Enum(id) => self.enumeration(id).is_null,
            _ => false,
        }
    }
}

impl Type {
    fn new(
        message: &MessageDescriptor,
        types: &HashMap<Box<str>, TypeId>,
        enums: &HashMap<String, EnumId>,
    ) -> Self {
        let mut described: Vec<_> = message.fields().collect();
        described.sort_by_key(FieldDescriptor::number);
        let oneofs: Vec<_> = message.oneofs().collect();
        let kind = |kind: &Described| match kind {
            Described::Message(message) => Kind::Message(types[message.full_name()]),
            Described::Enum(described) => Kind::Enum(enums[described.full_name()]),
            scalar => scalar_kind(scalar),
        };
        let fields: Vec<_> = described
            .iter()
            .map(|field| {
                let (shape, value) = match field.kind() {
                    Described::Message(entry) if field.is_map() => {
                        let key = scalar_kind(&entry.map_entry_key_field().kind());
                        (Shape::Map(key), entry.map_entry_value_field().kind())
                    }
                    value if field.cardinality() == Cardinality::Repeated => (Shape::List, value),
                    value => (Shape::One, value),
                };
                let oneof = field.containing_oneof().filter(|oneof| !oneof.is_synthetic());
                let oneof = oneof.and_then(|oneof| oneofs.iter().position(|it| *it == oneof));
                Field {
                    number: field.number(),
                    name: field.name().into(),
                    json_name: field.json_name().into(),
                    shape,
                    kind: kind(&value),
                    presence: field.supports_presence(),
                    oneof: oneof.map(|at| at as u16),
                    key: {
                        let mut key = Vec::new();
                        write::put_string(field.json_name(), &mut key);
                        key.push(b':');
                        key.into()
                    },
                }
            })
            .collect();
        let mut names = HashMap::new();
        let mut numbers = Vec::new();
        for (at, field) in fields.iter().enumerate() {
            names.insert(field.name.clone(), at);
            names.insert(field.json_name.clone(), at);
            let number = field.number as usize;
            if number <= 64 {
                numbers.resize(numbers.len().max(number + 1), None);
                numbers[number] = Some(at as u16);
            }
        }
        Self { name: message.full_name().into(), form: form(message), fields, names, numbers }
    }

    /// Position of a field by its name in the proto or in JSON.
    pub fn position(&self, name: &str) -> Option<usize> {
        self.names.get(name).copied()
    }

    /// The name of a field, in either spelling, that a wrong one most likely meant.
    pub fn nearest(&self, wrong: &str) -> Option<&str> {
        let names = self.fields.iter().flat_map(|field| [&*field.json_name, &*field.name]);
        nearest(wrong, names)
    }

    /// Position of a field by its number.
    fn numbered(&self, number: u32) -> Option<usize> {
        match self.numbers.get(number as usize) {
            Some(at) => at.map(usize::from),
            None => self.fields.binary_search_by_key(&number, |field| field.number).ok(),
        }
    }
}

impl Kind {
    /// Whether values may be packed into one run of bytes.
    fn is_packable(self) -> bool {
        !matches!(self, Self::String | Self::Bytes | Self::Message(_))
    }
}

impl Enum {
    fn new(described: &EnumDescriptor) -> Self {
        let mut by_number = HashMap::new();
        // Of several names for one number the first in the proto is the canonical one.
        for value in &described.enum_descriptor_proto().value {
            by_number.entry(value.number()).or_insert_with(|| value.name().into());
        }
        Self {
            by_name: described
                .values()
                .map(|value| (value.name().into(), value.number()))
                .collect(),
            by_number,
            is_null: described.full_name() == "google.protobuf.NullValue",
        }
    }
}

fn form(message: &MessageDescriptor) -> Form {
    let Some(name) = message.full_name().strip_prefix("google.protobuf.") else {
        return Form::Object;
    };
    match name {
        "Any" => Form::Any,
        "Timestamp" => Form::Timestamp,
        "Duration" => Form::Duration,
        "FieldMask" => Form::FieldMask,
        "Struct" => Form::Struct,
        "Value" => Form::Value,
        "ListValue" => Form::List,
        "DoubleValue" | "FloatValue" | "Int64Value" | "UInt64Value" | "Int32Value"
        | "UInt32Value" | "BoolValue" | "StringValue" | "BytesValue" => Form::Wrapper,
        _ => Form::Object,
    }
}

fn scalar_kind(kind: &Described) -> Kind {
    match kind {
        Described::Bool => Kind::Bool,
        Described::Int32 => Kind::Int32,
        Described::Int64 => Kind::Int64,
        Described::Uint32 => Kind::Uint32,
        Described::Uint64 => Kind::Uint64,
        Described::Sint32 => Kind::Sint32,
        Described::Sint64 => Kind::Sint64,
        Described::Fixed32 => Kind::Fixed32,
        Described::Fixed64 => Kind::Fixed64,
        Described::Sfixed32 => Kind::Sfixed32,
        Described::Sfixed64 => Kind::Sfixed64,
        Described::Float => Kind::Float,
        Described::Double => Kind::Double,
        Described::String => Kind::String,
        Described::Bytes => Kind::Bytes,
        Described::Enum(_) | Described::Message(_) => {
            unreachable!("map keys are scalars, and other kinds have their own arms")
        }
    }
}
