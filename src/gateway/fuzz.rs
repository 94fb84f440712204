//! What strangers can send, as functions of any bytes that must not panic: targets of the fuzzer,
//! whose finds and corpus the tests run again.

use std::sync::LazyLock;

use http::{HeaderMap, HeaderValue, header};
use prost_reflect::{DescriptorPool, DynamicMessage, MessageDescriptor};

use super::{
    bind::{self, Parts},
    last_event_id,
    mapping::{Mapping, Reader},
    route::{Route, Routes},
    stream::{self, Form},
    template::{Found, Template, Tree},
};
use crate::pb;

static POOL: LazyLock<DescriptorPool> = LazyLock::new(|| {
    DescriptorPool::decode(pb::FILE_DESCRIPTOR_SET).expect("descriptors compiled into the program")
});

static ROUTES: LazyLock<Routes> =
    LazyLock::new(|| Routes::new(&POOL, |_| true).expect("sound annotations"));

/// All message types, in the order of their names.
static TYPES: LazyLock<Vec<MessageDescriptor>> = LazyLock::new(|| {
    let mut types: Vec<_> = POOL.all_messages().filter(|it| !it.is_map_entry()).collect();
    types.sort_by(|one, other| one.full_name().cmp(other.full_name()));
    types
});

/// A template, and on the next lines an address and a body: the template matches as it says, and
/// what the API makes of the address and the body is a message.
pub fn path(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let (pattern, rest) = text.split_once('\n').unwrap_or((text, ""));
    let (uri, body) = rest.split_once('\n').unwrap_or((rest, ""));
    let (path, query) = uri.split_once('?').unwrap_or((uri, ""));
    if let Ok(template) = Template::parse(pattern) {
        let n_variables = template.variables.len();
        let mut tree = Tree::new();
        if tree.insert(template, "GET", ()).is_ok()
            && let Found::Match((), captures) = tree.find("GET", path)
        {
            assert_eq!(captures.len(), n_variables, "{pattern} {path}");
        }
    }
    let Ok(query) = bind::query(query) else { return };
    for method in ["GET", "POST", "DELETE"] {
        let Found::Match(route, captures) = ROUTES.tree.find(method, path) else { continue };
        let parts = Parts {
            captures: &captures,
            query: &query,
            body: body.as_bytes(),
            last_event_id: None,
            etag: None,
        };
        if let Ok(message) = bind::request(&ROUTES.mapping, route, parts) {
            decoded(&route.method.input(), &message);
        }
    }
}

/// Two bytes that choose a type, and JSON of it or a message: what is read can be written, and
/// reads as the same; what is written is JSON.
pub fn json(data: &[u8]) {
    let Some((choice, text)) = data.split_first_chunk::<2>() else { return };
    let described = &TYPES[usize::from(u16::from_le_bytes(*choice)) % TYPES.len()];
    let mapping = &ROUTES.mapping;
    let Some(id) = mapping.find(described.full_name()) else { return };
    if let Some(message) = read(mapping, described, text) {
        decoded(described, &message);
        let mut once = Vec::new();
        mapping.write(id, &message, &mut once).expect("what was read can be written");
        let again = read(mapping, described, &once).expect("what was written can be read");
        let mut twice = Vec::new();
        mapping.write(id, &again, &mut twice).expect("what was read can be written");
        assert_eq!(
            String::from_utf8_lossy(&once),
            String::from_utf8_lossy(&twice),
            "{}",
            described.full_name()
        );
    }
    let mut written = Vec::new();
    if mapping.write(id, text, &mut written).is_ok() {
        serde_json::from_slice::<serde::de::IgnoredAny>(&written).expect("JSON");
    }
}

/// A `Last-Event-ID`, on the next line an `Accept`, and then an event: the stream goes on behind
/// the id, and the event is one event, whatever is in it.
pub fn events(data: &[u8]) {
    let mut parts = data.splitn(3, |byte| *byte == b'\n');
    let mut headers = HeaderMap::new();
    for name in [header::HeaderName::from_static("last-event-id"), header::ACCEPT] {
        if let Ok(value) = HeaderValue::from_bytes(parts.next().unwrap_or_default()) {
            headers.insert(name, value);
        }
    }
    let _form = Form::accepted(&headers);
    let Found::Match(route, captures) = ROUTES.tree.find("GET", "/v1/tasks/x/stream") else {
        panic!("there is a stream of a task");
    };
    resume(route, &captures, &headers);
    let event = parts.next().unwrap_or_default();
    let mut text = Vec::new();
    stream::open(&route.events, event, &mut text);
    if ROUTES.mapping.write(route.output, event, &mut text).is_ok() {
        let lines: Vec<_> = text.split(|byte| matches!(byte, b'\n' | b'\r')).collect();
        let begins = |name: &[u8]| lines.iter().filter(|line| line.starts_with(name)).count();
        assert_eq!(begins(b"data: "), 1, "{}", String::from_utf8_lossy(&text));
        assert_eq!(begins(b"data: ") + begins(b"id: ") + begins(b"event: "), lines.len());
    }
}

fn resume(route: &Route, captures: &[String], headers: &HeaderMap) {
    let Ok(last_event_id) = last_event_id(route, headers) else { return };
    let query = Vec::new();
    let parts = Parts { captures, query: &query, body: b"", last_event_id, etag: None };
    let Ok(message) = bind::request(&ROUTES.mapping, route, parts) else { return };
    let request: pb::StreamTaskRequest = prost::Message::decode(&*message).expect("a message");
    let next = last_event_id.map_or(0, |last| last.saturating_add(1));
    assert_eq!(request.from_sequence, next);
}

fn read(mapping: &Mapping, described: &MessageDescriptor, json: &[u8]) -> Option<Vec<u8>> {
    let mut reader = Reader::new(mapping);
    reader.message(mapping.find(described.full_name())?, json).ok()?;
    Some(reader.into_message())
}

/// Another implementation takes the bytes for the message too.
fn decoded(described: &MessageDescriptor, message: &[u8]) {
    DynamicMessage::decode(described.clone(), message).expect("an encoded message");
}
