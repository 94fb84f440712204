//! From the parts of an HTTP request to the encoded request of a method.

use std::borrow::Cow;

use super::{
    etag,
    mapping::{
        Field, Form, Kind, Mapping, Problem, Reader, Shape, TypeId,
        wire::{self, Value},
    },
    route::{Body, FieldPath, Route},
    template::percent_decode,
};
use crate::error::{Error, Result, Violation};

/// The parts of a request that hold fields.
#[derive(Clone, Copy, Debug)]
pub struct Parts<'a> {
    /// Values of the path's variables.
    pub captures: &'a [String],
    /// Names and values of the query.
    pub query: &'a Query<'a>,
    /// The body; empty when there is none.
    pub body: &'a [u8],
    /// The id after which a stream goes on.
    pub last_event_id: Option<u64>,
    /// The tag that the resource must have.
    pub etag: Option<&'a str>,
}

/// Names and values of a query, decoded.
pub type Query<'a> = Vec<(Cow<'a, str>, Cow<'a, str>)>;

/// Decodes a query.
pub fn query(text: &str) -> Result<Query<'_>> {
    text.split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            match (decode(name), decode(value)) {
                (Some(name), Some(value)) => Ok((name, value)),
                (name, _) => {
                    let name = name.unwrap_or_else(|| "query".into());
                    Err(Error::invalid(name, "is not percent-encoded UTF-8"))
                }
            }
        })
        .collect()
}

fn decode(text: &str) -> Option<Cow<'_, str>> {
    if text.contains('+') {
        let text = text.replace('+', "%20");
        return percent_decode(&text).map(|text| Cow::Owned(text.into_owned()));
    }
    percent_decode(text)
}

/// The encoded request. What the path says must not be said otherwise in the body.
pub fn request(mapping: &Mapping, route: &Route, parts: Parts<'_>) -> Result<Vec<u8>> {
    let mut reader = Reader::new(mapping);
    let described = mapping.message(route.input);
    let read = match route.body {
        // Nothing at all stands for no fields.
        _ if parts.body.is_empty() => Ok(()),
        Body::None => Err(Problem {
            field: "body".to_owned(),
            description: "must be empty: the fields are in the path and the query".to_owned(),
        }),
        Body::Whole => reader.message(route.input, parts.body),
        Body::Field(at) => reader.field(&described.fields[at], parts.body),
    };
    read.map_err(invalid)?;
    bind_query(mapping, route, parts.query, &mut reader)?;
    for (path, text) in route.variables.iter().zip(parts.captures) {
        let (within, field) = resolve(mapping, route.input, path);
        once(mapping, &mut reader, &within, field, text, "the path")?;
    }
    if let (Some(tag), Some(at)) = (parts.etag, etag::field(mapping, route.input)) {
        once(mapping, &mut reader, &[], &described.fields[at], tag, "if-match")?;
    }
    if let (Some(last), Some(at)) = (parts.last_event_id, route.events.resume) {
        let next = last.saturating_add(1).to_string();
        reader.text(&[], &described.fields[at], &next).map_err(invalid)?;
    }
    Ok(reader.into_message())
}

fn bind_query<'m>(
    mapping: &'m Mapping,
    route: &Route,
    query: &Query<'_>,
    reader: &mut Reader<'m>,
) -> Result<()> {
    let mut problems = Vec::new();
    let mut bound: Vec<FieldPath> = Vec::new();
    for (name, value) in query {
        if let Err(description) = bind_one(mapping, route, name, value, &mut bound, reader) {
            problems
                .push(Violation { field: description.field, description: description.description });
        }
    }
    if problems.is_empty() { Ok(()) } else { Err(Error::invalid_all(problems)) }
}

fn bind_one<'m>(
    mapping: &'m Mapping,
    route: &Route,
    name: &str,
    value: &str,
    bound: &mut Vec<FieldPath>,
    reader: &mut Reader<'m>,
) -> std::result::Result<(), Problem> {
    let problem = |description: String| Err(Problem { field: name.to_owned(), description });
    if route.body == Body::Whole {
        return problem("must be in the body: it holds all fields of this method".into());
    }
    let (names, key) = match name.strip_suffix(']').and_then(|rest| rest.split_once('[')) {
        Some((names, key)) => (names, Some(key)),
        None => (name, None),
    };
    let mut path = Vec::new();
    let mut id = route.input;
    let mut parts = names.split('.').peekable();
    while let Some(part) = parts.next() {
        let described = mapping.message(id);
        let Some(at) = described.position(part) else {
            return match described.nearest(part) {
                Some(near) => problem(format!("is no field here; did you mean `{near}`?")),
                None => problem("is no field of the request".into()),
            };
        };
        path.push(at);
        if parts.peek().is_none() {
            break;
        }
        id = match described.fields[at] {
            Field { shape: Shape::One, kind: Kind::Message(inner), .. }
                if mapping.message(inner).form == Form::Object =>
            {
                inner
            }
            _ => return problem(format!("`{part}` has no fields of its own here")),
        };
    }
    if route.variables.contains(&path) {
        return problem("is in the path already".into());
    }
    if matches!(route.body, Body::Field(at) if at == path[0]) {
        return problem("is in the body already".into());
    }
    let (within, field) = resolve(mapping, route.input, &path);
    match (field.shape, key) {
        (Shape::Map(_), Some(key)) => return reader.entry(&within, field, key, value),
        (Shape::Map(_), None) => return problem(format!("needs a key: `{names}[key]=value`")),
        (_, Some(_)) => return problem("takes no key".into()),
        (Shape::One, None) if bound.contains(&path) => return problem("is given twice".into()),
        (Shape::One | Shape::List, None) => {}
    }
    reader.text(&within, field, value)?;
    bound.push(path);
    Ok(())
}

/// The fields that a path names: those on the way, and the last.
fn resolve<'m>(
    mapping: &'m Mapping,
    input: TypeId,
    path: &FieldPath,
) -> (Vec<&'m Field>, &'m Field) {
    let mut within = Vec::with_capacity(path.len());
    let mut field = &mapping.message(input).fields[path[0]];
    for at in &path[1..] {
        within.push(field);
        // Only the last field of a path can be anything but a message.
        let Kind::Message(inner) = field.kind else { break };
        field = &mapping.message(inner).fields[*at];
    }
    (within, field)
}

/// Reads a field from `place`, unless it was given before with another value.
fn once<'m>(
    mapping: &'m Mapping,
    reader: &mut Reader<'m>,
    within: &[&'m Field],
    field: &'m Field,
    text: &str,
    place: &str,
) -> Result<()> {
    let given = value(reader.as_message(), within, field);
    if given.is_some() {
        let mut alone = Reader::new(mapping);
        alone.text(within, field, text).map_err(invalid)?;
        if given != value(alone.as_message(), within, field) {
            let description =
                format!("is `{text}` in {place} and another elsewhere; leave it out there");
            return Err(Error::invalid(names(within, field), description));
        }
    }
    reader.text(within, field, text).map_err(invalid)
}

/// The value of a field in an encoded message, unless it is unset.
fn value<'b>(message: &'b [u8], within: &[&Field], field: &Field) -> Option<Value<'b>> {
    let last = |message, number| {
        let found = wire::fields(message).flatten().filter(|found| found.number == number);
        found.last().map(|found| found.value)
    };
    let mut message = message;
    for outer in within {
        let Value::Bytes(inner) = last(message, outer.number)? else { return None };
        message = inner;
    }
    let default = [Value::Varint(0), Value::Fixed64(0), Value::Fixed32(0), Value::Bytes(&[])];
    last(message, field.number).filter(|value| field.presence || !default.contains(value))
}

fn names(within: &[&Field], field: &Field) -> String {
    let names = within.iter().map(|field| &*field.name).chain([&*field.name]);
    names.collect::<Vec<_>>().join(".")
}

fn invalid(problem: Problem) -> Error {
    let field = if problem.field.is_empty() { "body".to_owned() } else { problem.field };
    Error::invalid(field, problem.description)
}
