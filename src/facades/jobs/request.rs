//! Jobs that are asked for, as calls about tasks.

use std::collections::{BTreeMap, HashMap};

use serde_json::{Map, Value};

use super::{job, refusal::Refusal};
use crate::{json, pb};

/// A job to submit.
pub fn submit(mut body: Map<String, Value>) -> Result<pb::SubmitTaskRequest, Refusal> {
    body.retain(|_, value| !value.is_null());
    let model = text(&mut body, "model_id")?.or(text(&mut body, "model")?);
    let mut model = model.ok_or_else(|| Refusal::bad("model_id: is required"))?;
    if let Some(version) = text(&mut body, "version_id")? {
        model = format!("{model}@{version}");
    }
    let input = object(&mut body, "payload")?.or(object(&mut body, "input")?);
    let params = object(&mut body, "options")?.or(object(&mut body, "params")?);
    let priority = match body.remove("priority") {
        None => 0,
        Some(value) => {
            let priority = value.as_i64().and_then(|priority| i32::try_from(priority).ok());
            priority.ok_or_else(|| Refusal::bad("priority: must be a whole number"))?
        }
    };
    let labels = labels(body.remove("labels"))?;
    let request_id = text(&mut body, "request_id")?.unwrap_or_default();
    if let Some(name) = body.keys().next() {
        let shown: String = name.chars().take(64).collect();
        return Err(Refusal::bad(format!(
            "`{shown}` is no field of a job; there are model_id, version_id, payload, options, priority, labels and request_id"
        )));
    }
    let spec = pb::TaskSpec {
        model,
        input: input.map(json::struct_from_map),
        params: params.map(json::struct_from_map),
        priority,
        labels,
        ..Default::default()
    };
    Ok(pb::SubmitTaskRequest { spec: Some(spec), request_id })
}

/// A list of jobs.
pub fn list(parameters: &HashMap<String, String>) -> Result<pb::ListTasksRequest, Refusal> {
    let mut request = pb::ListTasksRequest::default();
    for (name, value) in parameters {
        match name.as_str() {
            "status" => {
                let states = job::states(value).ok_or_else(|| {
                    Refusal::bad("status: is not PENDING, RUNNING, COMPLETE, ERROR or CANCELLED")
                })?;
                request.states = states.iter().map(|state| *state as i32).collect();
            }
            "model_id" => request.model.clone_from(value),
            "page_token" => request.page_token.clone_from(value),
            "limit" => {
                let limit = value.parse().ok().filter(|limit| *limit > 0);
                request.page_size =
                    limit.ok_or_else(|| Refusal::bad("limit: must be a number from 1 on"))?;
            }
            other => {
                let shown: String = other.chars().take(64).collect();
                return Err(Refusal::bad(format!(
                    "`{shown}` is no filter; there are status, model_id, limit and page_token"
                )));
            }
        }
    }
    Ok(request)
}

fn text(body: &mut Map<String, Value>, name: &str) -> Result<Option<String>, Refusal> {
    match body.remove(name) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => Err(Refusal::bad(format!("{name}: must be a string"))),
    }
}

fn object(
    body: &mut Map<String, Value>,
    name: &str,
) -> Result<Option<Map<String, Value>>, Refusal> {
    match body.remove(name) {
        None => Ok(None),
        Some(Value::Object(map)) => Ok(Some(map)),
        Some(_) => Err(Refusal::bad(format!("{name}: must be an object"))),
    }
}

fn labels(value: Option<Value>) -> Result<BTreeMap<String, String>, Refusal> {
    let wrong = || Refusal::bad("labels: must be an object of strings");
    let Some(value) = value else { return Ok(BTreeMap::new()) };
    let Value::Object(map) = value else { return Err(wrong()) };
    map.into_iter()
        .map(|(key, value)| match value {
            Value::String(value) => Ok((key, value)),
            _ => Err(wrong()),
        })
        .collect()
}
