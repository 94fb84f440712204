//! The `OpenAI` API under `/openai/v1`: models, chat completions and completions.
//!
//! A completion is a task that is run and followed in one call: when the client leaves before
//! its end, the task is cancelled.

mod answer;
mod follow;
mod models;
mod refusal;
mod request;

use axum::{
    Router,
    body::Body,
    extract::State,
    response::{IntoResponse as _, Response},
    routing::{any, get, post},
};
use http::{Method, Request};

use self::{
    answer::Form,
    follow::Follow,
    refusal::Refusal,
    request::{Asked, Kind},
};
use super::{Facade, wire::InProcess};
use crate::{grpc::layers::CorrelationId, pb};

/// Scheme of credentials.
const SCHEME: &str = "Bearer";

/// The routes of this facade.
pub fn router(facade: Facade) -> Router {
    Router::new()
        .route("/openai/v1/chat/completions", post(chat))
        .route("/openai/v1/completions", post(completions))
        .route("/openai/v1/models", get(list_models))
        .route("/openai/v1/models/{*model}", get(get_model))
        .route("/openai/v1/{*path}", any(unknown))
        .method_not_allowed_fallback(other_method)
        .with_state(facade)
}

async fn chat(State(facade): State<Facade>, request: Request<Body>) -> Response {
    answer(request, |request| complete(facade, Kind::Chat, request)).await
}

async fn completions(State(facade): State<Facade>, request: Request<Body>) -> Response {
    answer(request, |request| complete(facade, Kind::Text, request)).await
}

async fn list_models(State(facade): State<Facade>, request: Request<Body>) -> Response {
    answer(request, async move |request| {
        let client = facade.client(&request.into_parts().0, SCHEME)?;
        Ok(axum::Json(models::list(&client).await?).into_response())
    })
    .await
}

async fn get_model(
    State(facade): State<Facade>,
    axum::extract::Path(model): axum::extract::Path<String>,
    request: Request<Body>,
) -> Response {
    answer(request, async move |request| {
        let client = facade.client(&request.into_parts().0, SCHEME)?;
        Ok(axum::Json(models::get(&client, &model).await?).into_response())
    })
    .await
}

async fn unknown(request: Request<Body>) -> Response {
    answer(request, async |request| Err(Refusal::unknown_path(request.method(), request.uri())))
        .await
}

async fn other_method(request: Request<Body>) -> Response {
    answer(request, async |request| Err(Refusal::other_method(request.method()))).await
}

/// Answers with what `work` gives or with its refusal, under the id that finds the call in the
/// log by the name that these clients look for.
async fn answer<F>(request: Request<Body>, work: impl FnOnce(Request<Body>) -> F) -> Response
where
    F: Future<Output = Result<Response, Refusal>>,
{
    let id = request.extensions().get::<CorrelationId>().cloned();
    let mut response = work(request).await.unwrap_or_else(Refusal::into_response);
    if let Some(value) = id.and_then(|id| http::HeaderValue::from_str(&id.0).ok()) {
        response.headers_mut().insert("x-request-id", value);
    }
    response
}

/// Runs one completion.
async fn complete(facade: Facade, kind: Kind, request: Request<Body>) -> Result<Response, Refusal> {
    debug_assert_eq!(request.method(), Method::POST);
    let (parts, body) = request.into_parts();
    let client = facade.client(&parts, SCHEME)?;
    let asked = Asked::read(kind, facade.object(&parts, body).await?)?;
    models::check_served(&client, &asked.model).await?;
    let Asked { spec, model, stream, include_usage, .. } = asked;
    let form = Form { kind, model, include_usage };
    let events = run(&client, spec).await?;
    if stream {
        answer::stream(Follow::new(events), form).await
    } else {
        answer::whole(events, &form).await
    }
}

/// Starts a task that ends with its caller.
async fn run(
    client: &InProcess,
    spec: pb::TaskSpec,
) -> Result<tonic::Streaming<pb::TaskEvent>, Refusal> {
    let request = pb::RunTaskRequest {
        spec: Some(spec),
        request_id: String::new(),
        on_disconnect: pb::run_task_request::OnDisconnect::Cancel.into(),
    };
    Ok(client.tasks().run_task(request).await?.into_inner())
}
