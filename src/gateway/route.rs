//! The ways to methods over HTTP, from the descriptors and their `google.api.http` annotations.

use std::{collections::HashMap, sync::Arc};

use http::StatusCode;
use prost_reflect::{DescriptorPool, ExtensionDescriptor, MethodDescriptor};

use super::{
    mapping::{Field, Form, Kind, Mapping, Shape, TypeId},
    template::{Template, Tree},
};
use crate::pb::{
    self,
    google::api::{HttpRule, http_rule::Pattern},
};

/// One way to a method.
#[derive(Debug)]
pub struct Route {
    /// Where gRPC finds the method, such as `/baton.v1.TaskService/GetTask`.
    pub path: String,
    /// What the method is, for the reference.
    pub method: MethodDescriptor,
    /// Type of the request.
    pub input: TypeId,
    /// Type of the answers.
    pub output: TypeId,
    /// Fields that the variables of the template set, in their order.
    pub variables: Vec<FieldPath>,
    /// What the request's body holds.
    pub body: Body,
    /// The field of the answer that the response's body holds; position, or else the whole.
    pub response_body: Option<usize>,
    /// Of a successful unary call.
    pub status: StatusCode,
    /// Whether there are many answers.
    pub streaming: bool,
    /// How answers become server-sent events.
    pub events: Events,
}

/// Positions of fields from a message down, each in the type of the one before.
pub type FieldPath = Vec<usize>;

/// What a request's body holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Body {
    /// Nothing.
    None,
    /// All fields that the path does not set.
    Whole,
    /// The field at this position.
    Field(usize),
}

/// How answers become server-sent events.
#[derive(Debug, Default)]
pub struct Events {
    /// Number of the field that is the id.
    pub id: Option<u32>,
    /// Numbers and names of the fields of which the one that is set names the event.
    pub names: Vec<(u32, Box<str>)>,
    /// Position of the request's field that holds the first wanted id.
    pub resume: Option<usize>,
    /// Number of the field that is set where ids are not of one stream.
    pub stream: Option<u32>,
}

/// Everything that can be called over HTTP.
#[derive(Debug)]
pub struct Routes {
    /// Types of requests and answers.
    pub mapping: Mapping,
    /// By path.
    pub tree: Tree<Arc<Route>>,
    /// Unary and server-streaming methods by where gRPC finds them, with or without annotations.
    pub methods: HashMap<String, Arc<Route>>,
}

impl Routes {
    /// Reads the annotations of all services that `serves` knows; the error names the method
    /// whose annotations cannot be followed.
    pub fn new(pool: &DescriptorPool, serves: impl Fn(&str) -> bool) -> Result<Self, String> {
        let mapping = Mapping::new(pool);
        let extension = |name: &str| {
            pool.get_extension_by_name(name).ok_or_else(|| format!("there is no option {name}"))
        };
        let options = Options {
            http: extension("google.api.http")?,
            status: extension("baton.v1.http_status")?,
            events: extension("baton.v1.event_stream")?,
        };
        let (mut tree, mut methods) = (Tree::new(), HashMap::new());
        for service in pool.services() {
            for method in service.methods() {
                let path = format!("/{}/{}", service.full_name(), method.name());
                if !serves(&path) {
                    continue;
                }
                add(&mapping, &options, &method, &path, &mut tree)
                    .map_err(|problem| format!("{path}: {problem}"))?;
                if !method.is_client_streaming() {
                    methods.insert(path.clone(), Arc::new(bare(&mapping, &method, path)?));
                }
            }
        }
        Ok(Self { mapping, tree, methods })
    }
}

struct Options {
    http: ExtensionDescriptor,
    status: ExtensionDescriptor,
    events: ExtensionDescriptor,
}

fn add(
    mapping: &Mapping,
    extensions: &Options,
    method: &MethodDescriptor,
    path: &str,
    tree: &mut Tree<Arc<Route>>,
) -> Result<(), String> {
    let options = method.options();
    if !options.has_extension(&extensions.http) {
        return Ok(());
    }
    if method.is_client_streaming() {
        return Err("a method to which the client streams cannot be called over HTTP".into());
    }
    let undecodable = |error: prost::DecodeError| error.to_string();
    let message = |extension: &ExtensionDescriptor| {
        options.get_extension(extension).as_message().cloned().ok_or("an option has another type")
    };
    let rule: HttpRule = message(&extensions.http)?.transcode_to().map_err(undecodable)?;
    let stream: pb::EventStream =
        message(&extensions.events)?.transcode_to().map_err(undecodable)?;
    let status = match options.get_extension(&extensions.status).as_u32() {
        None | Some(0) => StatusCode::OK,
        Some(code) => u16::try_from(code)
            .ok()
            .and_then(|code| StatusCode::from_u16(code).ok())
            .filter(StatusCode::is_success)
            .ok_or_else(|| format!("{code} is no status of a success"))?,
    };
    let find = |name: &str| mapping.find(name).ok_or_else(|| format!("there is no type {name}"));
    let (input, output) = (find(method.input().full_name())?, find(method.output().full_name())?);
    let primary = HttpRule { additional_bindings: Vec::new(), ..rule.clone() };
    for binding in std::iter::once(&primary).chain(&rule.additional_bindings) {
        let (http_method, pattern) = pattern(binding)?;
        let template = Template::parse(pattern).map_err(|what| format!("`{pattern}` {what}"))?;
        let variables = template.variables.iter();
        let variables = variables
            .map(|variable| field_path(mapping, input, &variable.path))
            .collect::<Result<_, _>>()?;
        let body = match &*binding.body {
            "" => Body::None,
            "*" => Body::Whole,
            name => Body::Field(position(mapping, input, name)?),
        };
        let response_body = match &*binding.response_body {
            "" => None,
            name => Some(position(mapping, output, name)?),
        };
        let route = Route {
            path: path.to_owned(),
            method: method.clone(),
            input,
            output,
            variables,
            body,
            response_body,
            status,
            streaming: method.is_server_streaming(),
            events: events(mapping, method, &stream)?,
        };
        tree.insert(template, &http_method, Arc::new(route))?;
    }
    Ok(())
}

/// A method as it is called by its own path: the body is the request.
fn bare(mapping: &Mapping, method: &MethodDescriptor, path: String) -> Result<Route, String> {
    let find = |name: &str| mapping.find(name).ok_or_else(|| format!("there is no type {name}"));
    Ok(Route {
        path,
        method: method.clone(),
        input: find(method.input().full_name())?,
        output: find(method.output().full_name())?,
        variables: Vec::new(),
        body: Body::Whole,
        response_body: None,
        status: StatusCode::OK,
        streaming: method.is_server_streaming(),
        events: Events::default(),
    })
}

fn pattern(rule: &HttpRule) -> Result<(String, &str), String> {
    let (method, path) = match &rule.pattern {
        Some(Pattern::Get(path)) => ("GET", path),
        Some(Pattern::Put(path)) => ("PUT", path),
        Some(Pattern::Post(path)) => ("POST", path),
        Some(Pattern::Delete(path)) => ("DELETE", path),
        Some(Pattern::Patch(path)) => ("PATCH", path),
        Some(Pattern::Custom(custom)) => (&*custom.kind, &custom.path),
        None => return Err("a binding has no path".into()),
    };
    Ok((method.to_ascii_uppercase(), path))
}

fn position(mapping: &Mapping, id: TypeId, name: &str) -> Result<usize, String> {
    let described = mapping.message(id);
    described.position(name).ok_or_else(|| format!("{} has no field `{name}`", described.name))
}

/// Resolves a variable: single fields down to one that can be written as a text.
fn field_path(mapping: &Mapping, input: TypeId, path: &[Box<str>]) -> Result<FieldPath, String> {
    let mut id = input;
    let mut positions = Vec::with_capacity(path.len());
    for (at, name) in path.iter().enumerate() {
        let position = position(mapping, id, name)?;
        let field = &mapping.message(id).fields[position];
        let is_last = at + 1 == path.len();
        match (field.shape, field.kind) {
            (Shape::One, Kind::Message(inner)) if !is_last => id = inner,
            (Shape::One, kind) if is_last && is_textual(mapping, kind) => {}
            _ => return Err(format!("`{name}` cannot stand in a path")),
        }
        positions.push(position);
    }
    Ok(positions)
}

/// Whether values of the kind can be written as a text in a path or a query.
pub fn is_textual(mapping: &Mapping, kind: Kind) -> bool {
    match kind {
        Kind::Message(id) => matches!(
            mapping.message(id).form,
            Form::Timestamp | Form::Duration | Form::FieldMask | Form::Wrapper
        ),
        _ => true,
    }
}

fn events(
    mapping: &Mapping,
    method: &MethodDescriptor,
    stream: &pb::EventStream,
) -> Result<Events, String> {
    let find = |id: TypeId, name: &str| -> Result<Option<&Field>, String> {
        if name.is_empty() {
            return Ok(None);
        }
        position(mapping, id, name).map(|at| Some(&mapping.message(id).fields[at]))
    };
    let type_of = |name: &str| mapping.find(name).ok_or_else(|| format!("there is no type {name}"));
    let (input, output) =
        (type_of(method.input().full_name())?, type_of(method.output().full_name())?);
    let number = |name: &str| {
        let field = find(output, name)?;
        match field.map(|field| field.kind) {
            None | Some(Kind::Uint64 | Kind::String) => Ok(field.map(|field| field.number)),
            Some(_) => Err(format!("`{name}` is neither a number nor a string")),
        }
    };
    let resume = match find(input, &stream.resume)? {
        Some(Field { kind: Kind::Uint64, name, .. }) => mapping.message(input).position(name),
        Some(_) => return Err(format!("`{}` is no uint64", stream.resume)),
        None => None,
    };
    let mut names = Vec::new();
    if !stream.name.is_empty() {
        let output = method.output();
        let oneof = output.oneofs().find(|oneof| oneof.name() == stream.name);
        let oneof = oneof.ok_or_else(|| format!("there is no oneof `{}`", stream.name))?;
        names.extend(oneof.fields().map(|field| (field.number(), field.name().into())));
    }
    Ok(Events { id: number(&stream.id)?, names, resume, stream: number(&stream.stream)? })
}
