//! `google.protobuf.Struct` to JSON text and back.

use prost_types::{ListValue, Struct, Value, value::Kind};
use serde_json::{Map, Number};

/// The struct as JSON text. Whole numbers are printed without a fraction.
pub fn text_from_struct(value: &Struct) -> String {
    serde_json::Value::Object(map_from_struct(value)).to_string()
}

/// A JSON object as a struct; `None` when the text is no JSON object.
pub fn struct_from_text(text: &str) -> Option<Struct> {
    match serde_json::from_str(text) {
        Ok(serde_json::Value::Object(map)) => Some(struct_from_map(map)),
        _ => None,
    }
}

/// A JSON object as a struct.
pub fn struct_from_map(map: Map<String, serde_json::Value>) -> Struct {
    Struct { fields: map.into_iter().map(|(key, value)| (key, to_proto(value))).collect() }
}

/// The struct as a JSON object.
pub fn map_from_struct(value: &Struct) -> Map<String, serde_json::Value> {
    value.fields.iter().map(|(key, value)| (key.clone(), from_proto(value))).collect()
}

fn from_proto(value: &Value) -> serde_json::Value {
    match &value.kind {
        None | Some(Kind::NullValue(_)) => serde_json::Value::Null,
        Some(Kind::BoolValue(value)) => (*value).into(),
        Some(Kind::NumberValue(value)) => number(*value),
        Some(Kind::StringValue(value)) => value.clone().into(),
        Some(Kind::ListValue(list)) => list.values.iter().map(from_proto).collect(),
        Some(Kind::StructValue(value)) => serde_json::Value::Object(map_from_struct(value)),
    }
}

/// JSON has no NaN or infinity: they become null.
fn number(value: f64) -> serde_json::Value {
    // Whole numbers up to 2^53 are exact in either form.
    if value.fract() == 0.0 && value.abs() <= 9_007_199_254_740_992.0 {
        return (value as i64).into();
    }
    Number::from_f64(value).map_or(serde_json::Value::Null, serde_json::Value::Number)
}

fn to_proto(value: serde_json::Value) -> Value {
    let kind = match value {
        serde_json::Value::Null => Kind::NullValue(0),
        serde_json::Value::Bool(value) => Kind::BoolValue(value),
        serde_json::Value::Number(value) => Kind::NumberValue(value.as_f64().unwrap_or(f64::NAN)),
        serde_json::Value::String(value) => Kind::StringValue(value),
        serde_json::Value::Array(values) => {
            Kind::ListValue(ListValue { values: values.into_iter().map(to_proto).collect() })
        }
        serde_json::Value::Object(map) => Kind::StructValue(struct_from_map(map)),
    };
    Value { kind: Some(kind) }
}

/// Whether all numbers of a struct of fine depth can be written as JSON.
pub fn numbers_are_finite(value: &Struct) -> bool {
    fn finite(value: &Value) -> bool {
        match &value.kind {
            Some(Kind::NumberValue(value)) => value.is_finite(),
            Some(Kind::ListValue(list)) => list.values.iter().all(finite),
            Some(Kind::StructValue(inner)) => inner.fields.values().all(finite),
            _ => true,
        }
    }
    value.fields.values().all(finite)
}

/// How deeply lists and objects may nest in what clients send.
pub const MAX_DEPTH: usize = 64;

/// Whether the struct nests no deeper than [`MAX_DEPTH`].
pub fn depth_is_fine(value: &Struct) -> bool {
    fn fine(value: &Value, left: usize) -> bool {
        match &value.kind {
            Some(Kind::ListValue(list)) => {
                left > 0 && list.values.iter().all(|value| fine(value, left - 1))
            }
            Some(Kind::StructValue(inner)) => {
                left > 0 && inner.fields.values().all(|value| fine(value, left - 1))
            }
            _ => true,
        }
    }
    value.fields.values().all(|value| fine(value, MAX_DEPTH))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_survives_the_way_through_a_struct() {
        let text = r#"{"a":[1,2.5,null,true,"x"],"b":{"c":-3}}"#;
        let value = struct_from_text(text).unwrap();
        assert_eq!(text_from_struct(&value), text);
    }

    #[test]
    fn only_objects_are_structs() {
        assert!(struct_from_text("[1]").is_none());
        assert!(struct_from_text("{").is_none());
    }
}
