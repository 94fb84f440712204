//! The models that connected runners serve.

use std::collections::BTreeMap;

use super::refusal::Refusal;
use crate::{
    facades::{
        served::{self, Served},
        wire::InProcess,
    },
    pb,
};
use serde_json::{Value, json};

/// The list of models.
pub async fn list(client: &InProcess) -> Result<Value, Refusal> {
    let models: Vec<_> = listed(client).await?.iter().map(|(id, at)| model(id, *at)).collect();
    Ok(json!({"object": "list", "data": models}))
}

/// One model.
pub async fn get(client: &InProcess, id: &str) -> Result<Value, Refusal> {
    let at = listed(client).await?.get(id).copied();
    if at.is_none() {
        // A runner that serves every model lists none.
        check_served(client, id).await?;
    }
    Ok(model(id, at.unwrap_or_default()))
}

fn model(id: &str, created: i64) -> Value {
    let owner = id.split('/').next().unwrap_or_default();
    json!({"id": id, "object": "model", "created": created, "owned_by": owner})
}

/// Names of the models, and when the first of their runners connected, in seconds since 1970.
async fn listed(client: &InProcess) -> Result<BTreeMap<String, i64>, Refusal> {
    let mut models = BTreeMap::new();
    let mut request = pb::ListRunnersRequest { page_size: 1_000, ..Default::default() };
    loop {
        let page = client.runners().list_runners(request.clone()).await?.into_inner();
        for runner in page.runners {
            let at = runner.connect_time.map_or(0, |time| time.seconds);
            for name in runner.models.into_iter().filter(|name| name != "*") {
                let known = models.entry(name).or_insert(at);
                *known = at.min(*known);
            }
        }
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    let mut request = pb::ListQueuesRequest { page_size: 1_000, ..Default::default() };
    loop {
        let page = client.queues().list_queues(request.clone()).await?.into_inner();
        for queue in page.queues.into_iter().filter(|queue| queue.slots > 0) {
            models.entry(queue.model).or_insert(0);
        }
        if page.next_page_token.is_empty() {
            return Ok(models);
        }
        request.page_token = page.next_page_token;
    }
}

/// Refuses a model that is not there.
pub async fn check_served(client: &InProcess, model: &str) -> Result<(), Refusal> {
    match served::check(client, model).await? {
        Served::Yes => Ok(()),
        Served::No => Err(Refusal::no_model(model, "no connected runner serves it")),
        Served::Never => Err(Refusal::no_model(model, "models here are named `owner/name`")),
    }
}
