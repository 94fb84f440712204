//! The queue API of fal under `/fal`: submit, status, status stream, result and cancel; and its
//! direct calls under `/fal/run`: a run that answers with the result, and one that streams.
//!
//! A request is a task, with its id. A direct call is a task that is cancelled when its client
//! leaves.

mod output;
mod path;
mod refusal;
mod request;
mod status;
mod stream;

use axum::{
    Router,
    body::Body,
    extract::State,
    response::{IntoResponse as _, Response},
    routing::any,
};
use http::{HeaderValue, Request, StatusCode, request::Parts};
use serde_json::{Map, Value, json};

use self::{
    output::{Output, Run, Step},
    path::{Action, Target},
    refusal::{REQUEST_ID, Refusal},
    status::Place,
};
use super::{
    Facade,
    served::{self, Served},
    standing,
    wire::InProcess,
};
use crate::pb::{self, TaskState};

/// Scheme of credentials.
const SCHEME: &str = "Key";

/// The routes of this facade.
pub fn router(facade: Facade) -> Router {
    Router::new().route("/fal/{*path}", any(answer)).with_state(facade)
}

async fn answer(State(facade): State<Facade>, request: Request<Body>) -> Response {
    let (parts, body) = request.into_parts();
    serve(&facade, &parts, body).await.unwrap_or_else(Refusal::into_response)
}

async fn serve(facade: &Facade, parts: &Parts, body: Body) -> Result<Response, Refusal> {
    let target = Target::of(parts)?;
    let allowed = target.action.method();
    if parts.method != allowed {
        return Err(Refusal::other_method(&allowed));
    }
    let client = facade.client(parts, SCHEME)?;
    let base = format!("{}/fal/{}/requests", facade.origin(parts), target.app);
    let place = |id: &str| Place { url: format!("{base}/{id}"), id: id.to_owned() };
    match &target.action {
        Action::Submit(_) => {
            let spec =
                request::spec(&target, &parts.headers, arguments(facade, parts, body).await?)?;
            submit(&client, spec, place).await
        }
        Action::Status(id) => {
            let task = status::find(&client, &target.app, id).await?;
            let (done, status) = status::now(&client, &place(id), task, target.logs()).await?;
            let code = if done { StatusCode::OK } else { StatusCode::ACCEPTED };
            Ok(about(id, (code, axum::Json(status)).into_response()))
        }
        Action::StatusStream(id) => {
            status::find(&client, &target.app, id).await?;
            let response = stream::status(client, place(id), target.logs()).await?;
            Ok(about(id, response))
        }
        Action::Result(id) => {
            let task = status::find(&client, &target.app, id).await?;
            let answer = result(&client, &task).await.unwrap_or_else(Refusal::into_response);
            Ok(about(id, answer))
        }
        Action::Cancel(id) => {
            let task = status::find(&client, &target.app, id).await?;
            cancel(&client, &task).await.map(|response| about(id, response))
        }
        Action::Run(_) => {
            let spec =
                request::spec(&target, &parts.headers, arguments(facade, parts, body).await?)?;
            run(begin(&client, spec).await?).await
        }
        Action::Stream(_) => {
            let spec =
                request::spec(&target, &parts.headers, arguments(facade, parts, body).await?)?;
            stream::output(begin(&client, spec).await?).await
        }
    }
}

/// The arguments; a client that has none sends nothing at all.
async fn arguments(
    facade: &Facade,
    parts: &Parts,
    body: Body,
) -> Result<Map<String, Value>, Refusal> {
    Ok(facade.object(parts, body).await?)
}

/// A response about a request.
fn about(id: &str, mut response: Response) -> Response {
    if let Ok(value) = HeaderValue::try_from(id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    response
}

async fn submit(
    client: &InProcess,
    spec: pb::TaskSpec,
    place: impl Fn(&str) -> Place,
) -> Result<Response, Refusal> {
    let request = pb::SubmitTaskRequest { spec: Some(spec), request_id: String::new() };
    let accepted = client.tasks().submit_task(request).await?.into_inner();
    let id = accepted.task.unwrap_or_default().task_id;
    let status = place(&id).in_queue(status::ahead(accepted.queue_position));
    Ok(about(&id, axum::Json(status).into_response()))
}

async fn result(client: &InProcess, task: &pb::Task) -> Result<Response, Refusal> {
    match (task.state(), &task.error) {
        (TaskState::Queued | TaskState::Running, _) => {
            Err(Refusal::bad("the request is still in progress"))
        }
        (TaskState::Succeeded, _) => {
            let request = pb::GetTaskResultRequest { task_id: task.task_id.clone() };
            let result = client.tasks().get_task_result(request).await?.into_inner();
            Ok(axum::Json(Output::from(result).into_json()).into_response())
        }
        (state, error) => Err(Refusal::ended(state, &error.clone().unwrap_or_default())),
    }
}

async fn cancel(client: &InProcess, task: &pb::Task) -> Result<Response, Refusal> {
    let completed = || {
        let message = "the request has ended already";
        let body = json!({"status": "ALREADY_COMPLETED", "detail": message, "message": message});
        (StatusCode::BAD_REQUEST, axum::Json(body)).into_response()
    };
    if standing::has_ended(task) {
        return Ok(completed());
    }
    let request = pb::CancelTaskRequest {
        task_id: task.task_id.clone(),
        reason: "cancelled through the queue API".into(),
    };
    let task = client.tasks().cancel_task(request).await?.into_inner();
    if task.state() != TaskState::Cancelled {
        return Ok(completed());
    }
    let body = json!({"status": "CANCELLATION_REQUESTED"});
    Ok((StatusCode::ACCEPTED, axum::Json(body)).into_response())
}

/// Starts a task that ends with its caller.
async fn begin(client: &InProcess, spec: pb::TaskSpec) -> Result<Run, Refusal> {
    if served::check(client, &spec.model).await? == Served::No {
        let message = format!("app `{}` not found: no connected runner serves it", spec.model);
        return Err(Refusal::not_found(message));
    }
    let request = pb::RunTaskRequest {
        spec: Some(spec),
        request_id: String::new(),
        on_disconnect: pb::run_task_request::OnDisconnect::Cancel.into(),
    };
    Run::begin(client.tasks().run_task(request).await?.into_inner()).await
}

async fn run(mut run: Run) -> Result<Response, Refusal> {
    let id = run.id.clone();
    let answer = loop {
        match run.next().await {
            Ok(Step::Event(_)) => {}
            Ok(Step::Done(output)) => break axum::Json(output).into_response(),
            Err(refusal) => break refusal.into_response(),
        }
    };
    Ok(about(&id, answer))
}
