//! From flags, files and stdin to a task's spec.

use std::{collections::BTreeMap, io::Read as _, path::Path, time::Duration};

use clap::Args;
use prost_types::{Struct, Timestamp};
use serde_json::{Map, Value};

use super::{
    exit::{Failure, Outcome},
    json, text,
};
use crate::{clock::Clock, config::units, json as structs, pb};

/// What to run and how.
#[derive(Args, Clone, Debug, Default)]
pub struct SpecArgs {
    /// Model as owner/name or owner/name@version; may come from --json instead
    pub model: Option<String>,
    /// Input field: k=text, k=@file for a file's text, k=- for stdin, k:=json for other types
    #[arg(short, long = "input", value_name = "K=V", help_heading = "Task")]
    pub input: Vec<String>,
    /// Whole task, or a whole submit request, as JSON from a file or - for stdin; flags win
    #[arg(long, value_name = "FILE", help_heading = "Task")]
    pub json: Option<String>,
    /// Parameter of the execution, k=v; numbers, true, false and JSON are read as such
    #[arg(short, long = "param", value_name = "K=V", help_heading = "Task")]
    pub param: Vec<String>,
    /// All parameters as a JSON object, or @file
    #[arg(long, value_name = "JSON", help_heading = "Task")]
    pub params: Option<String>,
    /// Label, k=v
    #[arg(short, long, value_name = "K=V", help_heading = "Task")]
    pub label: Vec<String>,
    /// Label that the runner must have, k=v
    #[arg(long, value_name = "K=V", help_heading = "Task")]
    pub require_label: Vec<String>,
    /// Higher starts earlier, -100 to 100
    #[arg(long, allow_negative_numbers = true, help_heading = "Task")]
    pub priority: Option<i32>,
    /// Must end within this time, or by this RFC 3339 time
    #[arg(long, value_name = "TIME", help_heading = "Task")]
    pub deadline: Option<String>,
    /// Must start within this time
    #[arg(long, value_name = "DURATION", value_parser = units::parse_duration, help_heading = "Task")]
    pub start_timeout: Option<Duration>,
    /// An attempt may run this long
    #[arg(long, value_name = "DURATION", value_parser = units::parse_duration, help_heading = "Task")]
    pub execution_timeout: Option<Duration>,
    /// Attempts that may fail by the task's own fault
    #[arg(long, value_name = "N", help_heading = "Task")]
    pub max_attempts: Option<u32>,
    /// Earliest start, this long from now
    #[arg(long, value_name = "DURATION", value_parser = units::parse_duration, help_heading = "Task")]
    pub delay: Option<Duration>,
    /// Seed of the sampler
    #[arg(long, help_heading = "Task")]
    pub seed: Option<u64>,
    /// Session whose context the task continues
    #[arg(long, value_name = "ID", help_heading = "Task")]
    pub session: Option<String>,
    /// Refuse now when the estimate says that the deadline or start timeout cannot be met
    #[arg(long, help_heading = "Task")]
    pub require_on_time: bool,
    /// Same id, same task: makes repeating safe; made when absent
    #[arg(long, value_name = "ID", help_heading = "Task")]
    pub request_id: Option<String>,
}

impl SpecArgs {
    /// The request that the flags, files and stdin make.
    pub fn request(&self, clock: &Clock) -> Outcome<pb::SubmitTaskRequest> {
        let mut stdin = Stdin::default();
        let mut request = match &self.json {
            Some(source) => document(source, &mut stdin)?,
            None => pb::SubmitTaskRequest::default(),
        };
        let spec = request.spec.get_or_insert_default();
        if let Some(model) = &self.model {
            spec.model.clone_from(model);
        }
        if spec.model.is_empty() {
            return Err(Failure::usage("no model is named")
                .hint("baton run baton/ngram -i prompt=\"Once upon a time\"")
                .hint("see which models runners serve: baton runner list"));
        }
        check_model(&spec.model)?;
        merge(&mut spec.input, inputs("-i", &self.input, &mut stdin)?);
        let mut params = match &self.params {
            Some(text) => object("--params", text)?,
            None => Map::new(),
        };
        params.extend(parameters("-p", &self.param)?);
        merge(&mut spec.params, params);
        spec.labels.extend(pairs("--label", &self.label)?);
        spec.required_labels.extend(pairs("--require-label", &self.require_label)?);
        if let Some(priority) = self.priority {
            spec.priority = priority;
        }
        if let Some(deadline) = &self.deadline {
            spec.deadline = Some(time(deadline, clock)?);
        }
        set(&mut spec.start_timeout, self.start_timeout);
        set(&mut spec.execution_timeout, self.execution_timeout);
        set(&mut spec.delay, self.delay);
        if let Some(max_attempts) = self.max_attempts {
            spec.retry.get_or_insert_default().max_attempts = max_attempts;
        }
        spec.seed = self.seed.or(spec.seed);
        if let Some(session) = &self.session {
            spec.session_id.clone_from(session);
        }
        spec.require_on_time |= self.require_on_time;
        if let Some(id) = &self.request_id {
            request.request_id.clone_from(id);
        }
        Ok(request)
    }
}

fn set(slot: &mut Option<prost_types::Duration>, value: Option<Duration>) {
    if let Some(value) = value {
        *slot = Some(text::duration_to_proto(value));
    }
}

/// Stdin can be read once; a second reader is told so.
#[derive(Default)]
struct Stdin {
    reader: Option<String>,
}

impl Stdin {
    fn read(&mut self, reader: &str) -> Outcome<String> {
        if let Some(first) = &self.reader {
            return Err(Failure::usage(format!("stdin is read by {first} and by {reader}"))
                .hint("give one of the two from a file"));
        }
        self.reader = Some(reader.to_owned());
        let mut text = String::new();
        std::io::stdin()
            .read_to_string(&mut text)
            .map_err(|error| Failure::usage(format!("cannot read stdin for {reader}: {error}")))?;
        Ok(text)
    }
}

fn read_file(path: &str, reader: &str) -> Outcome<String> {
    let bytes = std::fs::read(Path::new(path))
        .map_err(|error| Failure::usage(format!("cannot read `{path}` for {reader}: {error}")))?;
    String::from_utf8(bytes).map_err(|_| {
        Failure::usage(format!("`{path}` for {reader} is not UTF-8 text"))
            .cause("inputs are JSON; bytes must be encoded, for example as base64")
    })
}

fn document(source: &str, stdin: &mut Stdin) -> Outcome<pb::SubmitTaskRequest> {
    let text = if source == "-" { stdin.read("--json")? } else { read_file(source, "--json")? };
    let value: Value = serde_json::from_str(&text)
        .map_err(|error| Failure::usage(format!("--json {source} is not JSON: {error}")))?;
    let refuse = |error: String| {
        Failure::usage(format!("--json {source}: {error}"))
            .hint("the fields are those of TaskSpec: proto/baton/v1/tasks.proto")
    };
    // A request has a `spec`, which a spec has not.
    if value.get("spec").is_some() {
        return json::parse("SubmitTaskRequest", value).map_err(refuse);
    }
    let spec = json::parse("TaskSpec", value).map_err(refuse)?;
    Ok(pb::SubmitTaskRequest { spec: Some(spec), request_id: String::new() })
}

fn split<'a>(flag: &str, pair: &'a str) -> Outcome<(&'a str, &'a str)> {
    match pair.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key, value)),
        _ => Err(Failure::usage(format!("{flag} `{pair}` is not of the form key=value"))
            .hint(format!("for example: {flag} name=value"))),
    }
}

fn inputs(flag: &str, pairs: &[String], stdin: &mut Stdin) -> Outcome<Map<String, Value>> {
    let mut input = Map::new();
    for pair in pairs {
        let (key, value) = split(flag, pair)?;
        let reader = format!("{flag} {key}");
        let (key, value) = if let Some(key) = key.strip_suffix(':') {
            let value = serde_json::from_str(value).map_err(|error| {
                Failure::usage(format!("{flag} `{pair}`: `{value}` is not JSON: {error}"))
                    .hint(format!("give it as text: {flag} {key}={value}"))
            })?;
            (key, value)
        } else if value == "-" {
            (key, Value::String(stdin.read(&reader)?))
        } else if let Some(text) = value.strip_prefix("@@") {
            (key, Value::String(format!("@{text}")))
        } else if let Some(path) = value.strip_prefix('@') {
            (key, Value::String(read_file(path, &reader)?))
        } else {
            (key, Value::String(value.to_owned()))
        };
        input.insert(key.to_owned(), value);
    }
    Ok(input)
}

/// Parameters of a flag: numbers, true, false and JSON are read as such.
pub fn parameters(flag: &str, pairs: &[String]) -> Outcome<Map<String, Value>> {
    pairs
        .iter()
        .map(|pair| {
            let (key, value) = split(flag, pair)?;
            let parsed = serde_json::from_str(value);
            let value = parsed.unwrap_or_else(|_| Value::String(value.to_owned()));
            Ok((key.trim_end_matches(':').to_owned(), value))
        })
        .collect()
}

fn object(flag: &str, source: &str) -> Outcome<Map<String, Value>> {
    let text = match source.strip_prefix('@') {
        Some(path) => read_file(path, flag)?,
        None => source.to_owned(),
    };
    match serde_json::from_str(&text) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(Failure::usage(format!("{flag} is not a JSON object"))),
        Err(error) => Err(Failure::usage(format!("{flag} is not JSON: {error}"))
            .hint(format!("for example: {flag} '{{\"max_tokens\": 64}}'"))),
    }
}

/// Options of a flag, as `-i` reads them.
pub fn options(flag: &str, pairs: &[String]) -> Outcome<Struct> {
    Ok(structs::struct_from_map(inputs(flag, pairs, &mut Stdin::default())?))
}

/// Key-value pairs of a flag.
pub fn pairs(flag: &str, pairs: &[String]) -> Outcome<BTreeMap<String, String>> {
    pairs
        .iter()
        .map(|pair| split(flag, pair).map(|(key, value)| (key.to_owned(), value.to_owned())))
        .collect()
}

fn merge(slot: &mut Option<Struct>, map: Map<String, Value>) {
    if !map.is_empty() {
        slot.get_or_insert_default().fields.extend(structs::struct_from_map(map).fields);
    }
}

/// A time from now, or an absolute one.
fn time(value: &str, clock: &Clock) -> Outcome<Timestamp> {
    if let Ok(after) = units::parse_duration(value) {
        return Ok(text::timestamp(clock.now() + after));
    }
    value.parse().map_err(|_| {
        Failure::usage(format!("`{value}` is neither a duration nor an RFC 3339 time"))
            .hint("for example: --deadline 2m, or --deadline 2027-01-31T12:00:00Z")
    })
}

/// Refuses what cannot be a model's name, before a call is made.
pub fn check_model(model: &str) -> Outcome<()> {
    let name = model.split('@').next().unwrap_or_default();
    if name.split('/').count() == 2 && !name.starts_with('/') && !name.ends_with('/') {
        return Ok(());
    }
    Err(Failure::usage(format!("`{model}` is not a model; models are named owner/name[@version]"))
        .hint("see which models runners serve: baton runner list"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(input: &[&str]) -> SpecArgs {
        SpecArgs {
            model: Some("a/b".into()),
            input: input.iter().map(|pair| (*pair).to_owned()).collect(),
            ..SpecArgs::default()
        }
    }

    fn input_of(args: &SpecArgs) -> Outcome<String> {
        let spec = args.request(&Clock::manual())?.spec.unwrap();
        Ok(structs::text_from_struct(&spec.input.unwrap_or_default()))
    }

    #[test]
    fn inputs_are_text_unless_marked_as_json() {
        let text = input_of(&args(&["a=5", "b:=5", "c:=[1,2]", "d=x=y", "e=@@at"])).unwrap();
        assert_eq!(text, r#"{"a":"5","b":5,"c":[1,2],"d":"x=y","e":"@at"}"#);
    }

    #[test]
    fn a_file_is_read_byte_for_byte_and_a_missing_one_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("in.txt");
        std::fs::write(&path, "two\nlines\n").unwrap();
        let pair = format!("t=@{}", path.display());
        assert_eq!(input_of(&args(&[&pair])).unwrap(), r#"{"t":"two\nlines\n"}"#);
        let failure = input_of(&args(&["t=@/no/such/file"])).unwrap_err();
        assert!(failure.message.contains("/no/such/file"), "{}", failure.message);
    }

    #[test]
    fn flags_win_over_the_document_and_unknown_fields_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("task.json");
        std::fs::write(&path, r#"{"model":"x/y","priority":3,"params":{"k":1,"n":2}}"#).unwrap();
        let args = SpecArgs {
            json: Some(path.display().to_string()),
            param: vec!["k=7".into(), "s=word".into()],
            ..args(&[])
        };
        let spec = args.request(&Clock::manual()).unwrap().spec.unwrap();
        assert_eq!((spec.model.as_str(), spec.priority), ("a/b", 3));
        let params = structs::text_from_struct(&spec.params.unwrap());
        assert_eq!(params, r#"{"k":7,"n":2,"s":"word"}"#);
        std::fs::write(&path, r#"{"model":"x/y","priorty":3}"#).unwrap();
        let failure = args.request(&Clock::manual()).unwrap_err();
        assert!(failure.message.contains("did you mean `priority`"), "{}", failure.message);
    }

    #[test]
    fn a_deadline_is_relative_or_absolute() {
        let clock = Clock::manual();
        assert_eq!(
            time("2m", &clock).unwrap(),
            text::timestamp(clock.now() + Duration::from_mins(2))
        );
        assert_eq!(time("2026-01-01T00:00:00Z", &clock).unwrap(), text::timestamp(clock.now()));
        assert!(time("tomorrow", &clock).is_err());
    }

    #[test]
    fn a_model_without_owner_is_refused_at_once() {
        assert!(check_model("ngram").is_err());
        assert!(check_model("baton/ngram@1").is_ok());
    }
}
