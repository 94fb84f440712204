//! Tasks as items of lanes, and back. A lane says what its tasks have in common, once; an item has
//! what is left.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::{
    clock::Micros,
    error::{Error, Result},
    id::Namespace,
    queue::{Entry, LaneSpec},
    redis::{Delivery, Item, Lane, LaneInfo},
};

/// The priority of band 0.
const LOWEST: i32 = -100;

/// The variant of tasks that any runner of the model can run.
const PLAIN: &str = "any";

/// What tells variants of a model's work apart.
#[derive(Default, PartialEq, Serialize, Deserialize)]
struct Variant {
    #[serde(rename = "v", default, skip_serializing_if = "Option::is_none")]
    version: Option<String>,
    #[serde(rename = "l", default, skip_serializing_if = "BTreeMap::is_empty")]
    required_labels: BTreeMap<String, String>,
}

/// What tells tasks of a lane apart, besides their ids and attempts.
#[derive(Serialize, Deserialize)]
struct Facts {
    #[serde(rename = "c")]
    create_time: i64,
    #[serde(rename = "d", default, skip_serializing_if = "Option::is_none")]
    deadline: Option<i64>,
    #[serde(rename = "s", default, skip_serializing_if = "Option::is_none")]
    session: Option<String>,
}

/// The band of a priority: each has its own, so that a lane is in the order of acceptance.
pub(super) fn band(priority: i32) -> u8 {
    u8::try_from(priority.saturating_sub(LOWEST)).unwrap_or(if priority < 0 { 0 } else { u8::MAX })
}

/// Whose depth a task counts to.
fn account(namespace: &Namespace, model: &str) -> String {
    format!("{namespace}/{model}")
}

/// Namespace and model of an account.
pub(super) fn account_parts(account: &str) -> Option<(String, String)> {
    let (namespace, model) = account.split_once('/')?;
    Some((namespace.to_owned(), model.to_owned()))
}

/// The lane that stands for a queue where only its account and urgency matter.
pub(super) fn plain_lane(namespace: &Namespace, model: &str, priority: i32) -> Result<Lane> {
    Lane::new(&account(namespace, model), PLAIN, band(priority)).map_err(Error::internal)
}

/// A task that waits, as an item.
pub(super) fn item(entry: &Entry) -> Result<Item> {
    let variant = Variant {
        version: entry.version.clone(),
        required_labels: BTreeMap::clone(&entry.required_labels),
    };
    let info = serde_json::to_vec(&variant).map_err(Error::internal)?;
    let name = if variant == Variant::default() {
        PLAIN.to_owned()
    } else {
        hex::encode(&Sha256::digest(&info)[..12])
    };
    let account = account(&entry.namespace, &entry.model);
    let lane = Lane::new(&account, &name, band(entry.priority)).map_err(Error::internal)?;
    let facts = Facts {
        create_time: entry.create_time.0,
        deadline: entry.deadline.map(|time| time.0),
        session: entry.session.clone(),
    };
    let data = serde_json::to_vec(&facts).map_err(Error::internal)?;
    Ok(Item {
        lane,
        info: info.into(),
        id: entry.id.to_string(),
        attempt: entry.attempt,
        data: data.into(),
    })
}

/// What a lane's tasks have in common; `None` for one that this version does not understand.
pub(super) fn spec(lane: &LaneInfo) -> Option<LaneSpec> {
    let variant: Variant = serde_json::from_slice(&lane.info).ok()?;
    let (namespace, model) = account_parts(lane.lane.account())?;
    Some(LaneSpec {
        name: lane.lane.as_str().into(),
        namespace: namespace.into(),
        model,
        version: variant.version,
        required_labels: Arc::new(variant.required_labels),
        priority: i32::from(lane.lane.band()) + LOWEST,
    })
}

/// The task of a delivery; `None` for one that this version does not understand.
pub(super) fn entry(delivery: &Delivery, spec: &LaneSpec) -> Option<Entry> {
    let facts: Facts = serde_json::from_slice(&delivery.data).ok()?;
    Some(Entry {
        id: delivery.id.parse().ok()?,
        namespace: spec.namespace.clone(),
        model: spec.model.clone(),
        version: spec.version.clone(),
        required_labels: spec.required_labels.clone(),
        priority: spec.priority,
        create_time: Micros(facts.create_time),
        not_before: None,
        deadline: facts.deadline.map(Micros),
        session: facts.session,
        attempt: delivery.attempt,
        waited_out: false,
    })
}

/// When the task with these data was accepted.
pub(super) fn create_time(data: &Bytes) -> Option<Micros> {
    serde_json::from_slice(data).ok().map(|facts: Facts| Micros(facts.create_time))
}
