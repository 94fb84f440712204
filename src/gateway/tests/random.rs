//! Any message survives JSON and back.

use proptest::prelude::*;
use prost::Message as _;
use prost_reflect::{DynamicMessage, Kind, MapKey, MessageDescriptor, Value};
use rand::{Rng, RngExt, SeedableRng, rngs::StdRng};

use super::{POOL, mapping, read, write};

/// A message with random fields.
fn message(described: &MessageDescriptor, rng: &mut StdRng, depth: u32) -> DynamicMessage {
    let mut message = DynamicMessage::new(described.clone());
    let set = |message: &mut DynamicMessage, name: &str, value: Value| {
        message.set_field_by_name(name, value);
    };
    match described.full_name() {
        "google.protobuf.Timestamp" => {
            set(
                &mut message,
                "seconds",
                Value::I64(rng.random_range(-62_135_596_800..253_402_300_800)),
            );
            set(&mut message, "nanos", Value::I32(rng.random_range(0..1_000_000_000)));
        }
        "google.protobuf.Duration" => {
            let seconds: i64 = rng.random_range(-315_576_000_000..315_576_000_000);
            let nanos = rng.random_range(0..1_000_000_000) * if seconds < 0 { -1 } else { 1 };
            set(&mut message, "seconds", Value::I64(seconds));
            set(&mut message, "nanos", Value::I32(nanos));
        }
        "google.protobuf.FieldMask" => {
            let paths = ["a", "b_c", "d.e_f", "g_h.i"];
            let paths = paths.iter().filter(|_| rng.random()).map(|path| (*path).into());
            set(&mut message, "paths", Value::List(paths.map(Value::String).collect()));
        }
        "google.protobuf.Any" => {
            let inner = POOL.get_message_by_name("library.Inner").unwrap();
            let inner = self::message(&inner, rng, depth + 1);
            set(&mut message, "type_url", Value::String("x/library.Inner".into()));
            set(&mut message, "value", Value::Bytes(inner.encode_to_vec().into()));
        }
        "google.protobuf.Value" => {
            let choice = rng.random_range(0..if depth > 6 { 4 } else { 6 });
            let field = described.get_field(choice + 1).unwrap();
            let value = match field.kind() {
                Kind::Double => Value::F64(rng.random_range(-1e9..1e9)),
                kind => value(&kind, rng, depth),
            };
            message.set_field(&field, value);
        }
        _ => {
            for field in described.fields() {
                // Deep messages stay small.
                if !rng.random_bool(if depth == 0 { 0.5 } else { 0.5 / f64::from(depth + 1) }) {
                    continue;
                }
                let n = rng.random_range(1..4);
                let field_value = if field.is_map() {
                    let entry = field.kind();
                    let entry = entry.as_message().unwrap();
                    let (keys, values) =
                        (entry.map_entry_key_field(), entry.map_entry_value_field());
                    let entries = (0..n).map(|_| {
                        let key = match value(&keys.kind(), rng, depth) {
                            Value::Bool(key) => MapKey::Bool(key),
                            Value::I32(key) => MapKey::I32(key),
                            Value::I64(key) => MapKey::I64(key),
                            Value::U32(key) => MapKey::U32(key),
                            Value::U64(key) => MapKey::U64(key),
                            Value::String(key) => MapKey::String(key),
                            other => panic!("{other:?} is no key"),
                        };
                        (key, value(&values.kind(), rng, depth))
                    });
                    Value::Map(entries.collect())
                } else if field.is_list() {
                    Value::List((0..n).map(|_| value(&field.kind(), rng, depth)).collect())
                } else {
                    value(&field.kind(), rng, depth)
                };
                message.set_field(&field, field_value);
            }
        }
    }
    message
}

fn value(kind: &Kind, rng: &mut StdRng, depth: u32) -> Value {
    match kind {
        Kind::Bool => Value::Bool(rng.random()),
        Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 => Value::I32(rng.random()),
        Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 => Value::I64(rng.random()),
        Kind::Uint32 | Kind::Fixed32 => Value::U32(rng.random()),
        Kind::Uint64 | Kind::Fixed64 => Value::U64(rng.random()),
        // NaN would differ from itself.
        Kind::Float => Value::F32(f32::from_bits(rng.random::<u32>() & 0xbfff_ffff)),
        Kind::Double => Value::F64(f64::from_bits(rng.random::<u64>() & 0xbfff_ffff_ffff_ffff)),
        Kind::String => {
            let n = rng.random_range(0..12);
            Value::String((0..n).map(|_| rng.random::<char>()).collect())
        }
        Kind::Bytes => {
            let mut bytes = vec![0; rng.random_range(0..12)];
            rng.fill_bytes(&mut bytes);
            Value::Bytes(bytes.into())
        }
        Kind::Enum(described) => {
            let values: Vec<_> = described.values().collect();
            let known = values[rng.random_range(0..values.len())].number();
            let strange = described.full_name() == "library.Color" && rng.random_bool(0.1);
            Value::EnumNumber(if strange { 1_234 } else { known })
        }
        Kind::Message(described) => Value::Message(message(described, rng, depth + 1)),
    }
}

/// A message to compare, as another implementation shows it: a default that was sent is the
/// same as one that was not.
fn shown(message: &DynamicMessage) -> serde_json::Value {
    serde_json::to_value(message).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn any_message_survives_json_and_back(seed: u64, which in 0_usize..1_000) {
        let described: Vec<_> = POOL
            .all_messages()
            .filter(|message| !message.is_map_entry())
            .filter(|message| {
                let name = message.full_name();
                name.starts_with("library.") || name.starts_with("baton.v1.") || name.starts_with("google.rpc.")
            })
            .collect();
        // Every other one is the message with everything.
        let described = match which % 2 {
            0 => POOL.get_message_by_name("library.All").unwrap(),
            _ => described[which % described.len()].clone(),
        };
        let name = described.full_name();
        let original = message(&described, &mut StdRng::seed_from_u64(seed), 0);

        let json = write(name, &original.encode_to_vec());
        let back = read(name, &json).map_err(|problem| TestCaseError::fail(format!("{problem:?}: {json}")))?;
        let back = DynamicMessage::decode(described.clone(), &*back).unwrap();
        let expected = shown(&original);
        prop_assert_eq!(shown(&back), expected.clone(), "{}", json);

        // Both ways through another implementation.
        let mut deserializer = serde_json::Deserializer::from_str(&json);
        let theirs = DynamicMessage::deserialize(described.clone(), &mut deserializer)
            .map_err(|error| TestCaseError::fail(format!("{error}: {json}")))?;
        prop_assert_eq!(shown(&theirs), expected.clone(), "{}", json);
        let json = serde_json::to_string(&original).unwrap();
        let ours = read(name, &json).map_err(|problem| TestCaseError::fail(format!("{problem:?}: {json}")))?;
        let ours = DynamicMessage::decode(described, &*ours).unwrap();
        prop_assert_eq!(shown(&ours), expected, "{}", json);
    }

    #[test]
    fn no_json_and_no_bytes_are_too_strange(json in "[\\[\\]{}:,\"a-z0-9.eE+ -]{0,60}", bytes: Vec<u8>) {
        let _ = read("library.All", &json);
        let id = mapping().find("library.All").unwrap();
        let mut out = Vec::new();
        if mapping().write(id, &bytes, &mut out).is_ok() {
            prop_assert!(serde_json::from_slice::<serde_json::Value>(&out).is_ok());
        }
    }
}
