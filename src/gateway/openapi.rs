//! The `OpenAPI` 3.1 description of everything that can be called over HTTP, from the descriptors
//! and the comments in the protos.

use std::collections::{BTreeMap, HashMap};

use prost_reflect::{
    Cardinality, DescriptorPool, EnumDescriptor, FieldDescriptor, Kind, MessageDescriptor,
    MethodDescriptor,
};
use serde_json::{Map, Value, json};

use super::{
    route::{Body, Route, Routes},
    template::{Segment, Template},
};

/// Messages in a query are described this deep.
const QUERY_DEPTH: usize = 3;

/// The document.
pub fn document(routes: &Routes, pool: &DescriptorPool) -> Value {
    let mut writer =
        Writer { comments: Comments::new(pool), schemas: BTreeMap::new(), wanted: Vec::new() };
    let mut paths: BTreeMap<String, Map<String, Value>> = BTreeMap::new();
    let mut tags = BTreeMap::new();
    let mut ids = HashMap::new();
    for (template, method, route) in routes.tree.iter() {
        let service = route.method.parent_service();
        let comment = writer.comments.of(service.parent_file().name(), service.path());
        tags.insert(service.name().to_owned(), comment.to_owned());
        let mut operation = writer.operation(template, route);
        // A method has one id for each of its bindings.
        let id = format!("{}_{}", service.name(), route.method.name());
        let used = ids.entry(id.clone()).or_insert(0_u32);
        *used += 1;
        let id = if *used == 1 { id } else { format!("{id}_{used}") };
        operation["operationId"] = id.into();
        let path = paths.entry(path(template)).or_default();
        path.insert(method.to_ascii_lowercase(), operation);
    }
    let status = pool.get_message_by_name("google.rpc.Status");
    let status = status.map(|status| writer.message(&status));
    while let Some(wanted) = writer.wanted.pop() {
        let name = schema_name(wanted.full_name());
        if !writer.schemas.contains_key(&name) {
            writer.schemas.insert(name.clone(), Value::Null);
            let schema = writer.object(&wanted);
            writer.schemas.insert(name, schema);
        }
    }
    let tags: Vec<_> =
        tags.into_iter().map(|(name, about)| json!({"name": name, "description": about})).collect();
    let error = json!({
        "description": "The call failed; `details` hold one `ErrorInfo` with the reason.",
        "headers": {
            "X-Correlation-Id": {"schema": {"type": "string"}, "description": "Finds the call in the log."},
            "Retry-After": {"schema": {"type": "integer"}, "description": "Seconds until a retry makes sense."},
            "X-Backoff-Ms": {"schema": {"type": "integer"}, "description": "The same in milliseconds."},
        },
        "content": {"application/json": {"schema": status}},
    });
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Baton",
            "version": env!("CARGO_PKG_VERSION"),
            "description": env!("CARGO_PKG_DESCRIPTION"),
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{"bearer": []}, {"key": []}, {}],
        "tags": tags,
        "paths": paths,
        "components": {
            "schemas": writer.schemas,
            "responses": {"Error": error},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "description": "A key or a token."},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    })
}

/// The path with one parameter a segment: a parameter cannot hold a slash.
fn path(template: &Template) -> String {
    let mut names = path_parameters(template).into_iter().map(|parameter| parameter.name);
    let mut path = String::new();
    for segment in &template.segments {
        path.push('/');
        match segment {
            Segment::Literal(text) => path.push_str(text),
            Segment::One | Segment::Rest => {
                path.push('{');
                path.push_str(&names.next().unwrap_or_default());
                path.push('}');
            }
        }
    }
    if let Some(verb) = &template.verb {
        path.push(':');
        path.push_str(verb);
    }
    path
}

/// A parameter of a path.
struct Parameter {
    name: String,
    /// The field that it is, or is a part of.
    field: Vec<Box<str>>,
}

/// The parameter of each segment that is not literal, in order. Many readers of the description
/// take names with dots for something else.
fn path_parameters(template: &Template) -> Vec<Parameter> {
    let wild = |segments: &[Segment]| {
        segments.iter().filter(|it| !matches!(it, Segment::Literal(_))).count()
    };
    let mut parameters = Vec::new();
    for (at, segment) in template.segments.iter().enumerate() {
        if matches!(segment, Segment::Literal(_)) {
            continue;
        }
        let variable = template.variables.iter().find(|it| it.segments.contains(&at));
        let field = variable.map(|it| it.path.clone()).unwrap_or_default();
        let name = match variable {
            None => format!("segment{at}"),
            Some(it) if wild(&template.segments[it.segments.clone()]) > 1 => {
                let nth = wild(&template.segments[it.segments.start..=at]);
                format!("{}_{nth}", field.join("_"))
            }
            Some(_) => field.join("_"),
        };
        parameters.push(Parameter { name, field });
    }
    parameters
}

struct Writer {
    comments: Comments,
    schemas: BTreeMap<String, Value>,
    /// Messages that schemas refer to.
    wanted: Vec<MessageDescriptor>,
}

impl Writer {
    fn operation(&mut self, template: &Template, route: &Route) -> Value {
        let method = &route.method;
        let input = method.input();
        let comment = self.comments.of(method.parent_file().name(), method.path()).to_owned();
        let summary = comment.split_inclusive(". ").next().unwrap_or_default().trim();
        let mut parameters = Vec::new();
        for Parameter { name, field } in path_parameters(template) {
            let field = field.first().and_then(|field| input.get_field_by_name(field));
            let about = field.as_ref().map(|field| self.about(field)).unwrap_or_default();
            parameters.push(json!({
                "name": name, "in": "path", "required": true, "description": about,
                "schema": {"type": "string", "minLength": 1},
            }));
        }
        if route.body != Body::Whole {
            let bound: Vec<_> =
                template.variables.iter().map(|variable| variable.path.join(".")).collect();
            let in_body = match route.body {
                Body::Field(_) => Self::body_field(route).map(|field| field.name().to_owned()),
                Body::None | Body::Whole => None,
            };
            self.query(&input, "", "", &bound, in_body.as_deref(), QUERY_DEPTH, &mut parameters);
        }
        if route.streaming {
            parameters.push(json!({
                "name": "access_token", "in": "query", "schema": {"type": "string"},
                "description": "A token of KeyService.IssueToken, for a browser's `EventSource`.",
            }));
        }
        if route.events.resume.is_some() {
            parameters.push(json!({
                "name": "Last-Event-ID", "in": "header",
                "schema": {"type": "string", "pattern": "^[0-9]{1,19}$"},
                "description": "The stream goes on after this event.",
            }));
        }
        if input.get_field_by_name("etag").is_some_and(|field| field.kind() == Kind::String) {
            parameters.push(json!({
                "name": "If-Match", "in": "header", "schema": {"type": "string"},
                "description": "The `ETag` that the resource must still have; 412 if it has not.",
            }));
        }
        let mut operation = json!({
            "tags": [method.parent_service().name()],
            "summary": summary,
            "description": comment,
            "parameters": parameters,
            "responses": self.responses(route, method),
        });
        let body = match route.body {
            Body::None => None,
            Body::Whole => Some(self.message(&input)),
            Body::Field(_) => Self::body_field(route).map(|field| self.field(&field)),
        };
        if let Some(schema) = body {
            let content = json!({"application/json": {"schema": schema}});
            operation["requestBody"] = json!({ "content": content });
        }
        operation
    }

    fn body_field(route: &Route) -> Option<FieldDescriptor> {
        let Body::Field(at) = route.body else { return None };
        let mut fields: Vec<_> = route.method.input().fields().collect();
        fields.sort_by_key(FieldDescriptor::number);
        fields.get(at).cloned()
    }

    fn responses(&mut self, route: &Route, method: &MethodDescriptor) -> Value {
        let output = method.output();
        let whole = match route.response_body {
            Some(at) => {
                let mut fields: Vec<_> = output.fields().collect();
                fields.sort_by_key(FieldDescriptor::number);
                fields.get(at).map_or(Value::Null, |field| self.field(field))
            }
            None => self.message(&output),
        };
        let mut responses = Map::new();
        let content = if route.streaming {
            let array = json!({"type": "array", "items": whole});
            // As of one event: only OpenAPI 3.2 can tell it from the stream.
            let event = json!({
                "type": "object",
                "description": "One server-sent event.",
                "properties": {
                    "id": {"type": "string"},
                    "event": {"type": "string"},
                    "data": {"type": "string", "contentMediaType": "application/json"},
                    "retry": {"type": "integer"},
                },
            });
            json!({
                "text/event-stream": {"schema": event},
                "application/x-ndjson": {"schema": {"type": "string"}},
                "application/json": {"schema": array},
            })
        } else {
            json!({"application/json": {"schema": whole}})
        };
        let description = if route.streaming {
            format!("A stream of `{}`, by the request's Accept.", output.name())
        } else {
            "Done.".to_owned()
        };
        responses.insert(
            route.status.as_str().to_owned(),
            json!({"description": description, "content": content}),
        );
        if route.events.resume.is_some() {
            let description = "Nothing follows the Last-Event-ID: do not come back.";
            responses.insert("204".to_owned(), json!({ "description": description }));
        }
        responses.insert("default".to_owned(), json!({"$ref": "#/components/responses/Error"}));
        Value::Object(responses)
    }

    /// Appends the parameters for the fields of a message that are not bound elsewhere.
    #[expect(clippy::too_many_arguments, reason = "one recursive walk with two spellings")]
    fn query(
        &mut self,
        message: &MessageDescriptor,
        names: &str,
        json_names: &str,
        bound: &[String],
        in_body: Option<&str>,
        depth: usize,
        parameters: &mut Vec<Value>,
    ) {
        for field in message.fields() {
            let name = format!("{names}{}", field.name());
            let json_name = format!("{json_names}{}", field.json_name());
            if bound.contains(&name) || in_body == Some(&*name) {
                continue;
            }
            let about = self.about(&field);
            let mut parameter = json!({
                "name": json_name, "in": "query", "description": about,
            });
            match field.kind() {
                Kind::Message(_) if field.is_map() => {
                    parameter["schema"] = self.field(&field);
                    parameter["style"] = "deepObject".into();
                    parameter["explode"] = true.into();
                }
                Kind::Message(inner) if well_known(&inner).is_none() => {
                    if !field.is_list() && depth > 0 {
                        let (name, json_name) = (format!("{name}."), format!("{json_name}."));
                        self.query(&inner, &name, &json_name, bound, None, depth - 1, parameters);
                    }
                    continue;
                }
                Kind::Message(inner) if !is_textual(&inner) => continue,
                _ => parameter["schema"] = self.field(&field),
            }
            parameters.push(parameter);
        }
    }

    fn about(&self, field: &FieldDescriptor) -> String {
        self.comments.of(field.parent_file().name(), field.path()).to_owned()
    }

    /// The schema of a message, by reference where it is an object of its own.
    fn message(&mut self, message: &MessageDescriptor) -> Value {
        if let Some(schema) = well_known(message) {
            return schema;
        }
        self.wanted.push(message.clone());
        json!({"$ref": format!("#/components/schemas/{}", schema_name(message.full_name()))})
    }

    fn object(&mut self, message: &MessageDescriptor) -> Value {
        let mut properties = Map::new();
        for field in message.fields() {
            let mut schema = self.field(&field);
            let mut about = self.about(&field);
            let oneof = field.containing_oneof().filter(|oneof| !oneof.is_synthetic());
            if let Some(oneof) = oneof {
                let others = oneof.fields().filter(|other| *other != field);
                let others: Vec<_> =
                    others.map(|other| format!("`{}`", other.json_name())).collect();
                about = format!("{about} Excludes {}.", others.join(", "));
            }
            if !about.is_empty() {
                schema["description"] = about.trim().into();
            }
            properties.insert(field.json_name().to_owned(), schema);
        }
        let about = self.comments.of(message.parent_file().name(), message.path());
        json!({
            "type": "object",
            "description": about,
            "properties": properties,
            "additionalProperties": false,
        })
    }

    fn field(&mut self, field: &FieldDescriptor) -> Value {
        if let Kind::Message(entry) = field.kind()
            && field.is_map()
        {
            let values = self.value(&entry.map_entry_value_field().kind());
            return json!({"type": "object", "additionalProperties": values});
        }
        let value = self.value(&field.kind());
        if field.cardinality() == Cardinality::Repeated {
            return json!({"type": "array", "items": value});
        }
        value
    }

    fn value(&mut self, kind: &Kind) -> Value {
        match kind {
            Kind::Bool => json!({"type": "boolean"}),
            Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 => {
                json!({"type": "integer", "format": "int32", "minimum": i32::MIN, "maximum": i32::MAX})
            }
            Kind::Uint32 | Kind::Fixed32 => {
                json!({"type": "integer", "format": "uint32", "minimum": 0, "maximum": u32::MAX})
            }
            Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 => {
                json!({"type": "string", "format": "int64", "pattern": "^(0|-?[1-9][0-9]{0,18})$"})
            }
            Kind::Uint64 | Kind::Fixed64 => {
                json!({"type": "string", "format": "uint64", "pattern": "^(0|[1-9][0-9]{0,19})$"})
            }
            Kind::Float | Kind::Double => {
                json!({"anyOf": [{"type": "number"}, {"enum": ["NaN", "Infinity", "-Infinity"]}]})
            }
            Kind::String => json!({"type": "string"}),
            Kind::Bytes => json!({"type": "string", "contentEncoding": "base64"}),
            Kind::Enum(described) => self.enumeration(described),
            Kind::Message(message) => self.message(message),
        }
    }

    fn enumeration(&mut self, described: &EnumDescriptor) -> Value {
        if described.full_name() == "google.protobuf.NullValue" {
            return json!({"type": "null"});
        }
        let name = schema_name(described.full_name());
        let reference = format!("#/components/schemas/{name}");
        if !self.schemas.contains_key(&name) {
            let file = described.parent_file();
            let mut about = self.comments.of(file.name(), described.path()).to_owned();
            for value in described.values() {
                let comment = self.comments.of(file.name(), value.path());
                about = format!("{about}\n- `{}`: {comment}", value.name());
            }
            let names: Vec<_> = described.values().map(|value| value.name().to_owned()).collect();
            let schema = json!({"type": "string", "description": about, "enum": names});
            self.schemas.insert(name, schema);
        }
        json!({ "$ref": reference })
    }
}

/// The name of a type without the package that most have.
fn schema_name(full_name: &str) -> String {
    full_name.strip_prefix("baton.v1.").unwrap_or(full_name).to_owned()
}

/// Schemas of messages that JSON does not write as their fields.
fn well_known(message: &MessageDescriptor) -> Option<Value> {
    let name = message.full_name().strip_prefix("google.protobuf.")?;
    Some(match name {
        "Timestamp" => json!({"type": "string", "format": "date-time"}),
        "Duration" => json!({
            "type": "string", "pattern": r"^-?[0-9]{1,12}(\.[0-9]{1,9})?s$", "examples": ["1.5s"],
        }),
        "FieldMask" => json!({"type": "string", "examples": ["name,retry.maxAttempts"]}),
        "Struct" => json!({"type": "object", "additionalProperties": true}),
        "Value" => json!({}),
        "ListValue" => json!({"type": "array", "items": {}}),
        "Empty" => json!({"type": "object", "additionalProperties": false}),
        "Any" => json!({
            "type": "object",
            "properties": {"@type": {"type": "string"}},
            "required": ["@type"],
            "additionalProperties": true,
        }),
        "BoolValue" => json!({"type": "boolean"}),
        "StringValue" => json!({"type": "string"}),
        "BytesValue" => json!({"type": "string", "contentEncoding": "base64"}),
        "Int32Value" | "UInt32Value" => json!({"type": "integer"}),
        "Int64Value" | "UInt64Value" => json!({"type": "string", "pattern": "^-?[0-9]{1,20}$"}),
        "FloatValue" | "DoubleValue" => json!({"type": "number"}),
        _ => return None,
    })
}

/// Whether a well-known message can be written as a text in a query.
fn is_textual(message: &MessageDescriptor) -> bool {
    !matches!(message.name(), "Struct" | "Value" | "ListValue" | "Empty" | "Any")
}

/// Comments in the protos, by file and path of the element.
struct Comments(HashMap<(String, Vec<i32>), String>);

impl Comments {
    fn new(pool: &DescriptorPool) -> Self {
        let mut comments = HashMap::new();
        for file in pool.file_descriptor_protos() {
            let info = file.source_code_info.iter().flat_map(|info| &info.location);
            for location in info {
                let Some(comment) = &location.leading_comments else { continue };
                let lines: Vec<_> = comment.lines().map(str::trim).collect();
                let key = (file.name().to_owned(), location.path.clone());
                comments.insert(key, lines.join(" ").trim().to_owned());
            }
        }
        Self(comments)
    }

    fn of(&self, file: &str, path: &[i32]) -> &str {
        self.0.get(&(file.to_owned(), path.to_vec())).map_or("", |comment| comment)
    }
}
