//! The job routes: `/jobs` with what lies below it, `/requests/{id}`, and the older `/upload`,
//! `/api/status/{id}` and `/api/result/{id}`. A job is a task, with its id. They are off unless the
//! configuration switches them on.

mod job;
mod refusal;
mod request;
mod upload;

use std::collections::HashMap;

use axum::{
    Router,
    body::Body,
    extract::{DefaultBodyLimit, FromRequest as _, Multipart, Path, Query, State},
    response::{IntoResponse as _, Response},
    routing::{get, post},
};
use http::{HeaderValue, Request, StatusCode, header};
use serde_json::{Value, json};

use self::{job::Job, refusal::Refusal};
use super::{
    Facade,
    standing::{self, Standing},
    wire::InProcess,
};
use crate::pb::{self, TaskState};

/// Scheme of credentials.
const SCHEME: &str = "Bearer";

/// Entries of a timeline that are read at once.
const PAGE: i32 = 1_000;

/// Parameters of a query.
type Parameters = Query<HashMap<String, String>>;

/// The routes of this facade.
pub fn router(facade: Facade) -> Router {
    Router::new()
        .route("/jobs", post(submit).get(list))
        .route("/jobs/{id}", get(one))
        .route("/jobs/{id}/timeline", get(timeline))
        .route("/jobs/{id}/result", get(result))
        .route("/jobs/{id}/artefacts/{name}", get(artefact))
        .route("/jobs/{id}/cancel", post(cancel))
        .route("/requests/{id}", get(queued))
        .route("/api/status/{id}", get(status))
        .route("/api/result/{id}", get(result))
        .route("/upload", post(upload).layer(DefaultBodyLimit::disable()))
        .method_not_allowed_fallback(other_method)
        .with_state(facade)
}

/// Work that ends in a response or a refusal.
type Answer = Result<Response, Refusal>;

async fn other_method(request: Request<Body>) -> Answer {
    Err(Refusal::other_method(request.method()))
}

/// A client and the body of a request.
async fn opened(
    facade: &Facade,
    request: Request<Body>,
) -> Result<(InProcess, serde_json::Map<String, Value>), Refusal> {
    let (parts, body) = request.into_parts();
    let client = facade.client(&parts, SCHEME)?;
    Ok((client, facade.object(&parts, body).await?))
}

/// A client for a request without a body.
fn client(facade: &Facade, request: Request<Body>) -> Result<InProcess, Refusal> {
    Ok(facade.client(&request.into_parts().0, SCHEME)?)
}

async fn find(client: &InProcess, id: &str) -> Result<pb::Task, Refusal> {
    let request = pb::GetTaskRequest { task_id: id.to_owned() };
    Ok(client.tasks().get_task(request).await?.into_inner())
}

async fn submit(State(facade): State<Facade>, request: Request<Body>) -> Answer {
    let (client, body) = opened(&facade, request).await?;
    let request = request::submit(body)?;
    let accepted = client.tasks().submit_task(request).await?.into_inner();
    let task = accepted.task.unwrap_or_default();
    let job = Job { task: &task, position: accepted.queue_position, stage: None };
    Ok((StatusCode::ACCEPTED, axum::Json(job.json())).into_response())
}

async fn list(
    State(facade): State<Facade>,
    Query(parameters): Parameters,
    request: Request<Body>,
) -> Answer {
    let client = client(&facade, request)?;
    let page = client.tasks().list_tasks(request::list(&parameters)?).await?.into_inner();
    let jobs = page.tasks.iter().map(|task| Job { task, position: 0, stage: None }.json());
    let jobs: Vec<_> = jobs.collect();
    let answer = json!({"jobs": jobs, "next_page_token": page.next_page_token});
    Ok(axum::Json(answer).into_response())
}

async fn one(
    State(facade): State<Facade>,
    Path(id): Path<String>,
    request: Request<Body>,
) -> Answer {
    let client = client(&facade, request)?;
    let task = find(&client, &id).await?;
    let Standing { task, position, .. } = standing::now(&client, task, false).await?;
    let events = events(&client, &id).await?;
    let mut job = Job { task: &task, position, stage: job::stage(&events) }.json();
    job["timeline"] = events.iter().map(job::entry).collect();
    Ok(axum::Json(job).into_response())
}

async fn timeline(
    State(facade): State<Facade>,
    Path(id): Path<String>,
    request: Request<Body>,
) -> Answer {
    let client = client(&facade, request)?;
    let entries: Vec<_> = events(&client, &id).await?.iter().map(job::entry).collect();
    Ok(axum::Json(json!({"job_id": id, "timeline": entries})).into_response())
}

/// The whole timeline: it has no tokens and no log lines, so that it is short.
async fn events(client: &InProcess, id: &str) -> Result<Vec<pb::TaskEvent>, Refusal> {
    let mut events = Vec::new();
    let mut page_token = String::new();
    loop {
        let request =
            pb::ListTaskEventsRequest { task_id: id.to_owned(), page_size: PAGE, page_token };
        let page = client.tasks().list_task_events(request).await?.into_inner();
        events.extend(page.events);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            return Ok(events);
        }
    }
}

async fn result(
    State(facade): State<Facade>,
    Path(id): Path<String>,
    Query(parameters): Parameters,
    request: Request<Body>,
) -> Answer {
    let client = client(&facade, request)?;
    let format = parameters.get("format").map_or("json", String::as_str);
    if !matches!(format, "json" | "text") {
        return Err(Refusal::bad("format: is neither `json` nor `text`"));
    }
    let task = find(&client, &id).await?;
    if task.state() != TaskState::Succeeded {
        return Err(Refusal::no_result(&task));
    }
    let request = pb::GetTaskResultRequest { task_id: id };
    let result = client.tasks().get_task_result(request).await?.into_inner();
    if format == "text" {
        let kind = [(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"))];
        return Ok((kind, job::text(result)).into_response());
    }
    Ok(axum::Json(job::result(&task, result)).into_response())
}

/// Leads to where the file is.
async fn artefact(
    State(facade): State<Facade>,
    Path((id, name)): Path<(String, String)>,
    request: Request<Body>,
) -> Answer {
    let client = client(&facade, request)?;
    let task = find(&client, &id).await?;
    let found = task.artifacts.into_iter().rfind(|artifact| artifact.name == name);
    let Some(found) = found else {
        return Err(Refusal::not_found(format!("job `{id}` has no artefact `{name}`")));
    };
    if found.url.is_empty() {
        let message = format!("artefact `{name}` has no address, and its bytes are not kept here");
        return Err(Refusal::not_offered(message));
    }
    let url = HeaderValue::try_from(found.url)
        .map_err(|_| Refusal::not_offered(format!("the address of artefact `{name}` is none")))?;
    Ok((StatusCode::TEMPORARY_REDIRECT, [(header::LOCATION, url)]).into_response())
}

async fn cancel(
    State(facade): State<Facade>,
    Path(id): Path<String>,
    request: Request<Body>,
) -> Answer {
    let (client, mut body) = opened(&facade, request).await?;
    let reason = match body.remove("reason") {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(reason)) => reason,
        Some(_) => return Err(Refusal::bad("reason: must be a string")),
    };
    let request = pb::CancelTaskRequest { task_id: id, reason };
    let task = client.tasks().cancel_task(request).await?.into_inner();
    Ok(axum::Json(Job { task: &task, position: 0, stage: None }.json()).into_response())
}

/// A job in the words of a queue: with its files when it is complete.
async fn queued(
    State(facade): State<Facade>,
    Path(id): Path<String>,
    request: Request<Body>,
) -> Answer {
    let client = client(&facade, request)?;
    let task = find(&client, &id).await?;
    let Standing { task, position, .. } = standing::now(&client, task, false).await?;
    let code = if standing::has_ended(&task) { StatusCode::OK } else { StatusCode::ACCEPTED };
    Ok((code, axum::Json(job::request(&task, position))).into_response())
}

async fn status(
    State(facade): State<Facade>,
    Path(id): Path<String>,
    request: Request<Body>,
) -> Answer {
    let client = client(&facade, request)?;
    let task = find(&client, &id).await?;
    let Standing { task, position, .. } = standing::now(&client, task, false).await?;
    let events = events(&client, &id).await?;
    let job = Job { task: &task, position, stage: job::stage(&events) };
    Ok(axum::Json(job.status_json()).into_response())
}

/// Keeps a file, and makes a job of it where the form names a model.
async fn upload(State(facade): State<Facade>, request: Request<Body>) -> Answer {
    let (parts, body) = request.into_parts();
    let client = facade.client(&parts, SCHEME)?;
    let request = Request::from_parts(parts, body);
    let form = Multipart::from_request(request, &()).await.map_err(|_| {
        Refusal::bad("content-type: must be multipart/form-data, with a field `file`")
    })?;
    upload::take(client, form).await
}
