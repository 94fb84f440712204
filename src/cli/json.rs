//! Messages as JSON and back, by the protobuf JSON mapping with the names of the protos.
//!
//! It works from the descriptors, so that a new field shows without a line here, and a field
//! that does not exist is an error with its name.

use std::{collections::BTreeSet, sync::LazyLock};

use prost::Message;
use prost_reflect::{
    DescriptorPool, DeserializeOptions, DynamicMessage, Kind, MessageDescriptor, SerializeOptions,
};
use serde_json::Value;

use super::exit::{Exit, Failure, Outcome};
use crate::pb;

static POOL: LazyLock<Option<DescriptorPool>> =
    LazyLock::new(|| DescriptorPool::decode(pb::FILE_DESCRIPTOR_SET).ok());

/// The descriptors of everything that `baton.v1` has.
pub fn pool() -> Outcome<&'static DescriptorPool> {
    POOL.as_ref().ok_or_else(|| Failure::new(Exit::Unexpected, "the descriptors do not decode"))
}

fn descriptor(name: &str) -> Outcome<MessageDescriptor> {
    pool()?
        .get_message_by_name(&format!("baton.v1.{name}"))
        .ok_or_else(|| Failure::new(Exit::Unexpected, format!("no message is called {name}")))
}

/// A message of `baton.v1` as JSON. Numbers stay numbers and unset fields are left out.
pub fn of<M: Message>(name: &str, message: &M) -> Outcome<Value> {
    let unexpected = |what: String| Failure::new(Exit::Unexpected, what);
    let dynamic = DynamicMessage::decode(descriptor(name)?, message.encode_to_vec().as_slice())
        .map_err(|error| unexpected(format!("{name} does not decode: {error}")))?;
    let options =
        SerializeOptions::new().use_proto_field_name(true).stringify_64_bit_integers(false);
    dynamic
        .serialize_with_options(serde_json::value::Serializer, &options)
        .map_err(|error| unexpected(format!("{name} has no JSON form: {error}")))
}

/// A message of `baton.v1` from JSON; both spellings of field names are read, unknown fields
/// are errors.
pub fn parse<M: Message + Default>(name: &str, value: Value) -> Result<M, String> {
    let descriptor = descriptor(name).map_err(|failure| failure.message)?;
    let fields = fields(&descriptor);
    let options = DeserializeOptions::new().deny_unknown_fields(true);
    let dynamic = DynamicMessage::deserialize_with_options(descriptor, value, &options)
        .map_err(|error| explain(&error.to_string(), &fields))?;
    M::decode(dynamic.encode_to_vec().as_slice()).map_err(|error| error.to_string())
}

/// Names of the fields of a message and of all messages in it.
fn fields(message: &MessageDescriptor) -> BTreeSet<String> {
    let (mut names, mut seen, mut todo) = (BTreeSet::new(), BTreeSet::new(), vec![message.clone()]);
    while let Some(message) = todo.pop() {
        if !seen.insert(message.full_name().to_owned()) {
            continue;
        }
        for field in message.fields() {
            names.insert(field.name().to_owned());
            if let Kind::Message(inner) = field.kind() {
                todo.push(inner);
            }
        }
    }
    names
}

/// Adds the known name that most resembles an unknown one.
fn explain(error: &str, known: &BTreeSet<String>) -> String {
    let wrong = error.split('\'').nth(1).or_else(|| error.split('`').nth(1)).unwrap_or_default();
    match crate::near::nearest(wrong, known.iter().map(String::as_str)) {
        Some(name) if name != wrong => format!("{error}; did you mean `{name}`?"),
        _ => error.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_spec_is_read_in_either_spelling_and_written_in_the_protos() {
        let value = json!({ "model": "a/b", "requiredLabels": {"gpu": "h100"},
            "start_timeout": "30s", "input": {"n": 1, "s": "x"} });
        let spec: pb::TaskSpec = parse("TaskSpec", value).unwrap();
        assert_eq!(spec.required_labels["gpu"], "h100");
        let back = of("TaskSpec", &spec).unwrap();
        assert_eq!(back["required_labels"]["gpu"], "h100");
        assert_eq!(back["start_timeout"], "30s");
    }

    #[test]
    fn an_unknown_field_is_refused_with_the_likely_one() {
        let error = parse::<pb::TaskSpec>("TaskSpec", json!({ "modle": "a/b" })).unwrap_err();
        assert!(error.contains("modle") && error.contains("did you mean `model`"), "{error}");
        let nested = json!({ "model": "a/b", "retry": { "max_attemps": 3 } });
        let error = parse::<pb::TaskSpec>("TaskSpec", nested).unwrap_err();
        assert!(error.contains("did you mean `max_attempts`"), "{error}");
    }

    #[test]
    fn whole_64_bit_numbers_stay_numbers() {
        let event = pb::TaskEvent { sequence: 7, ..Default::default() };
        assert_eq!(of("TaskEvent", &event).unwrap()["sequence"], 7);
    }
}
