//! Entity tags: a field `etag` of an answer is its `ETag`, and `If-Match` is the field `etag` of a
//! request. The fields hold the tag alone, without the quotes of HTTP.

use http::{HeaderMap, HeaderValue, Method, header};

use super::{
    mapping::{
        Kind, Mapping, Shape, TypeId,
        wire::{self, Value},
    },
    route::Route,
};
use crate::error::{Error, Result};

/// Position of the field `etag` in a message that has one.
pub fn field(mapping: &Mapping, id: TypeId) -> Option<usize> {
    let described = mapping.message(id);
    let at = described.position("etag")?;
    let field = &described.fields[at];
    (field.shape == Shape::One && field.kind == Kind::String).then_some(at)
}

/// The `ETag` of an answer that has one.
pub fn of(mapping: &Mapping, route: &Route, message: &[u8]) -> Option<HeaderValue> {
    let number = mapping.message(route.output).fields[field(mapping, route.output)?].number;
    let found = wire::fields(message).flatten().filter(|found| found.number == number).last()?;
    let Value::Bytes(tag) = found.value else { return None };
    // A quote would end the tag.
    if tag.is_empty() || tag.contains(&b'"') {
        return None;
    }
    HeaderValue::from_bytes(&[b"\"", tag, b"\""].concat()).ok()
}

/// The tag that a request insists on. A method that would change something without looking at it
/// refuses the request.
pub fn wanted(
    mapping: &Mapping,
    route: &Route,
    method: &Method,
    headers: &HeaderMap,
) -> Result<Option<String>> {
    let wrong = |what: &str| Err(Error::invalid("if-match", what));
    let mut values = headers.get_all(header::IF_MATCH).iter();
    let Some(value) = values.next() else { return Ok(None) };
    if field(mapping, route.input).is_none() {
        if matches!(*method, Method::GET | Method::HEAD) {
            return Ok(None);
        }
        return wrong("is not looked at by this method, which knows no etag");
    }
    let text = value.to_str().unwrap_or_default().trim();
    if text == "*" && values.next().is_none() {
        return Ok(None);
    }
    let tag = text.strip_prefix('"').and_then(|rest| rest.strip_suffix('"'));
    match tag.filter(|tag| !tag.is_empty() && !tag.contains('"')) {
        Some(tag) if values.next().is_none() => Ok(Some(tag.to_owned())),
        _ => wrong("must be one tag in quotes, as `ETag` has it, or `*`"),
    }
}
