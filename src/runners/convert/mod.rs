//! Control messages between wire and model, with everything a runner says checked at the door.

pub mod commands;

use std::{collections::BTreeMap, time::Duration};

use prost::Message as _;
use prost_types::Struct;

use crate::{
    clock::Micros,
    error::{Error, Kind, Reason, Result},
    events::frame::timestamp,
    grpc::status::to_rpc_status,
    id::TaskId,
    json,
    pb::{self, connect_request, connect_response},
    runners::{
        RunnerLimits,
        model::{
            Announcement, Batch, Fence, FromRunner, Held, Hello, LeaseAck, Leave, Offer, Profile,
            Said, ToRunner, Trouble, Verdict, Welcome,
        },
        protocol::{VERSIONS, feature},
    },
    tasks::model::Task,
};

/// Longest name, label or reason that is kept whole.
const MAX_TEXT: usize = 1024;
/// Longest list in a Hello.
const MAX_LIST: usize = 256;
/// Most bytes of an engine's parameters.
const MAX_PARAMS: usize = 64 << 10;
/// Most attempts in an inventory.
const MAX_HELD: usize = 16_384;

/// A name out of a Hello: 1 to 128 printable characters.
fn name(field: &str, text: String) -> Result<String> {
    let n_chars = text.chars().count();
    if n_chars == 0 || n_chars > 128 || text.chars().any(char::is_control) {
        return Err(Error::invalid(field, "must have 1 to 128 printable characters"));
    }
    Ok(text)
}

/// A text that may be empty.
fn text(field: &str, text: String) -> Result<String> {
    if text.len() > MAX_TEXT {
        return Err(Error::invalid(field, format!("must have at most {MAX_TEXT} bytes")));
    }
    Ok(text)
}

fn list(field: &str, items: Vec<String>) -> Result<Vec<String>> {
    if items.len() > MAX_LIST {
        return Err(Error::invalid(field, format!("must have at most {MAX_LIST} items")));
    }
    let named = items.into_iter().enumerate();
    named.map(|(at, item)| name(&format!("{field}[{at}]"), item)).collect()
}

/// A text for people, cut where it is too long to keep.
pub fn cut(mut text: String, max: usize) -> String {
    if text.len() > max {
        let end = (0..=max).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        text.truncate(end);
    }
    text
}

/// A task id.
pub fn task_id(field: &str, text: &str) -> Result<TaskId> {
    text.parse().map_err(|_| Error::invalid(field, "must be a task id"))
}

fn fence(field: &str, task: &str, attempt: u32) -> Result<Fence> {
    let task = task.parse();
    let task = task.map_err(|_| Error::invalid(format!("{field}.task_id"), "must be a task id"))?;
    Ok(Fence { task, attempt })
}

fn announcement(credits: pb::Credits) -> Announcement {
    let pb::Credits { revision, free_slots, as_of_seq } = credits;
    Announcement { revision, free_slots, as_of_seq }
}

fn inventory(field: &str, inventory: pb::Inventory) -> Result<Vec<Held>> {
    if inventory.held.len() > MAX_HELD {
        return Err(Error::invalid(field, format!("must have at most {MAX_HELD} attempts")));
    }
    let held = inventory.held.into_iter().map(|held| {
        Ok(Held {
            fence: fence(field, &held.task_id, held.attempt)?,
            last_index: held.last_index,
            first_kept_index: held.first_kept_index,
            finished: held.finished,
        })
    });
    held.collect()
}

fn gpus(field: &str, gpus: Vec<pb::Gpu>) -> Result<Vec<pb::Gpu>> {
    if gpus.len() > MAX_LIST {
        return Err(Error::invalid(field, format!("must be at most {MAX_LIST}")));
    }
    for gpu in &gpus {
        text(&format!("{field}.name"), gpu.name.clone())?;
    }
    Ok(gpus)
}

/// A Hello, with its envelope's ack.
pub fn hello(hello: pb::Hello, ack: u64) -> Result<Hello> {
    if hello.slots == 0 || hello.slots > 65_536 {
        return Err(Error::invalid("hello.slots", "must be 1 to 65536"));
    }
    let waits = hello.features.iter().any(|name| name == feature::APPLY);
    if hello.models.is_empty() && !waits {
        return Err(Error::invalid("hello.models", "must name a model, or `*`"));
    }
    if hello.labels.len() > MAX_LIST {
        return Err(Error::invalid("hello.labels", format!("must be at most {MAX_LIST}")));
    }
    let mut labels = BTreeMap::new();
    for (key, value) in hello.labels {
        labels.insert(name("hello.labels", key)?, text("hello.labels", value)?);
    }
    let node = hello.node.unwrap_or_default();
    text("hello.node.node_id", node.node_id.clone())?;
    text("hello.node.os", node.os.clone())?;
    let node = pb::Node { gpus: gpus("hello.node.gpus", node.gpus)?, ..node };
    let profile = Profile {
        runner: name("hello.runner_id", hello.runner_id)?.into(),
        instance: name("hello.instance_id", hello.instance_id)?,
        node,
        slots: hello.slots,
        labels,
        pools: list("hello.pools", hello.pools)?,
        models: list("hello.models", hello.models)?,
        engine: text("hello.engine", hello.engine)?,
        engine_version: text("hello.engine_version", hello.engine_version)?,
        agent_version: text("hello.agent_version", hello.agent_version)?,
        features: list("hello.features", hello.features)?,
        engine_params: engine_params("hello.engine_params", hello.engine_params)?,
    };
    let leave = Leave { paused: hello.paused, draining: hello.draining };
    Ok(Hello {
        profile,
        leave,
        session: Some(hello.session_id).filter(|id| !id.is_empty()),
        versions: (hello.min_version, hello.max_version),
        inventory: inventory("hello.inventory", hello.inventory.unwrap_or_default())?,
        credits: hello.credits.map(announcement),
        ack,
    })
}

fn offer(offer: pb::Offer) -> Result<Offer> {
    Ok(Offer {
        models: list("offer.models", offer.models)?,
        engine_version: text("offer.engine_version", offer.engine_version)?,
        engine_params: engine_params("offer.engine_params", offer.engine_params)?,
        leave: Leave { paused: offer.paused, draining: offer.draining },
    })
}

fn engine_params(field: &str, params: Option<Struct>) -> Result<Struct> {
    let params = params.unwrap_or_default();
    if !json::depth_is_fine(&params) || params.encoded_len() > MAX_PARAMS {
        let what = format!("must have at most {MAX_PARAMS} bytes and {} levels", json::MAX_DEPTH);
        return Err(Error::invalid(field, what));
    }
    Ok(params)
}

/// The Hello that a first message must be.
pub fn first_message(message: pb::ConnectRequest) -> Result<Hello> {
    match message.body {
        Some(connect_request::Body::Hello(first)) => hello(first, message.ack),
        _ => Err(Error::invalid("body", "the first message must be hello")),
    }
}

/// A control message after Hello.
pub fn from_runner(message: pb::ConnectRequest) -> Result<FromRunner> {
    use connect_request::Body;
    let body = match message.body {
        Some(Body::Hello(_)) => {
            return Err(Error::invalid("body", "hello may only be the first message"));
        }
        Some(Body::Accept(accept)) => {
            Said::Accept(fence("accept", &accept.task_id, accept.attempt)?)
        }
        Some(Body::Refuse(refuse)) => Said::Refuse(
            fence("refuse", &refuse.task_id, refuse.attempt)?,
            cut(refuse.reason, MAX_TEXT),
        ),
        Some(Body::Heartbeat(heartbeat)) => Said::Heartbeat {
            digest: heartbeat.held_digest,
            load: heartbeat.load,
            gpus: gpus("heartbeat.gpus", heartbeat.gpus)?,
        },
        Some(Body::Credits(credits)) => Said::Credits(announcement(credits)),
        Some(Body::CommandAccepted(command)) => {
            Said::CommandAccepted(text("command_accepted.command_id", command.command_id)?)
        }
        Some(Body::CommandProgress(command)) => Said::CommandProgress(
            text("command_progress.command_id", command.command_id.clone())?,
            commands::progress(command),
        ),
        Some(Body::CommandDone(command)) => Said::CommandDone(
            text("command_done.command_id", command.command_id)?,
            commands::refusal(command.status),
        ),
        Some(Body::Offer(said)) => Said::Offer(offer(said)?),
        Some(Body::Stopped(said)) => Said::Stopped(
            fence("stopped", &said.task_id, said.attempt)?,
            from_duration("stopped.took", said.took)?,
        ),
        Some(Body::Inventory(held)) => Said::Inventory(inventory("inventory", held)?),
        Some(Body::Bye(bye)) => Said::Bye(cut(bye.reason, MAX_TEXT)),
        None => return Err(Error::invalid("body", "must be set to a message this server knows")),
    };
    Ok(FromRunner { seq: message.seq, ack: message.ack, body })
}

/// The events and credits of an Output message.
pub fn output(message: pb::OutputRequest) -> Result<(Vec<Batch>, Option<Announcement>)> {
    let batches = message.leases.into_iter().map(|lease| {
        let fence = fence("leases", &lease.task_id, lease.attempt)?;
        batch(fence, lease.first_index, lease.events, lease.finish)
    });
    Ok((batches.collect::<Result<_>>()?, message.credits.map(announcement)))
}

/// Events of one attempt.
pub fn batch(
    fence: Fence,
    first_index: u64,
    events: Vec<pb::RunnerEvent>,
    finish: Option<pb::Finish>,
) -> Result<Batch> {
    // Far above what can be counted, far below where sums overflow.
    if first_index == 0 || first_index > 1 << 48 {
        return Err(Error::invalid("leases.first_index", "must be 1 to 2^48"));
    }
    Ok(Batch { fence, first_index, events, finish })
}

/// A control message of the server.
pub fn to_runner(message: &ToRunner) -> connect_response::Body {
    use connect_response::Body;
    match message {
        ToRunner::Assign { task, token } => Body::Assign(assign(task, token)),
        ToRunner::Cancel { fence, reason, detail, grace } => Body::Cancel(pb::Cancel {
            task_id: fence.task.to_string(),
            attempt: fence.attempt,
            reason: (*reason).to_owned(),
            detail: detail.clone(),
            grace: Some(duration(*grace)),
        }),
        ToRunner::Command { id, action } => Body::Command(commands::command(id, action)),
        ToRunner::InventoryRequest => Body::InventoryRequest(pb::InventoryRequest {}),
        ToRunner::Reconciliation(verdicts) => Body::Reconciliation(reconciliation(verdicts)),
    }
}

fn assign(task: &Task, token: &str) -> pb::Assign {
    pb::Assign {
        task_id: task.id.to_string(),
        attempt: task.attempt,
        model: task.spec.model.clone(),
        model_version: task.spec.version.clone().unwrap_or_default(),
        input_json: task.spec.input.clone().into(),
        params_json: task.spec.params.clone().into(),
        seed: task.spec.seed,
        session_id: task.spec.session.clone().unwrap_or_default(),
        labels: task.spec.labels.clone().into_iter().collect(),
        deadline: task.spec.deadline.map(timestamp),
        execution_timeout: Some(duration(task.spec.execution_timeout)),
        traceparent: task.traceparent.clone().unwrap_or_default(),
        attempt_token: token.to_owned(),
        namespace: task.namespace.to_string(),
    }
}

fn reconciliation(verdicts: &[Verdict]) -> pb::Reconciliation {
    let verdicts = verdicts.iter().map(|verdict| pb::reconciliation::Verdict {
        task_id: verdict.fence.task.to_string(),
        attempt: verdict.fence.attempt,
        keep: verdict.resume_from.is_some(),
        resume_from: verdict.resume_from.unwrap_or(0),
    });
    pb::Reconciliation { verdicts: verdicts.collect() }
}

/// The answer to Hello.
pub fn welcome(welcome: &Welcome, limits: &RunnerLimits) -> connect_response::Body {
    connect_response::Body::Welcome(pb::Welcome {
        version: welcome.version,
        session_id: welcome.session.to_string(),
        resumed: welcome.resumed,
        heartbeat_interval: Some(duration(limits.heartbeat_interval)),
        lease_ttl: Some(duration(limits.lease_ttl)),
        session_grace: Some(duration(limits.session_grace)),
        max_stream_age: Some(duration(limits.max_stream_age)),
        reconciliation: Some(reconciliation(&welcome.verdicts)),
        max_unacked_bytes: limits.max_unacked_bytes as u64,
        features: welcome.features.clone(),
        last_seq: welcome.last_seq,
    })
}

/// The server's sign of life.
pub fn heartbeat(now: Micros) -> connect_response::Body {
    connect_response::Body::Heartbeat(pb::ServerHeartbeat { time: Some(timestamp(now)) })
}

/// Asks for a new connection.
pub fn reconnect(jitter: Duration, reason: &str) -> connect_response::Body {
    connect_response::Body::Reconnect(pb::Reconnect {
        after: Some(duration(Duration::ZERO)),
        jitter: Some(duration(jitter)),
        reason: reason.to_owned(),
    })
}

/// What became of an attempt's events.
pub fn lease_ack(ack: &LeaseAck) -> pb::LeaseAck {
    let resend_from = match ack.trouble {
        Some(Trouble::Missing { resend_from }) => resend_from,
        _ => 0,
    };
    pb::LeaseAck {
        task_id: ack.fence.task.to_string(),
        attempt: ack.fence.attempt,
        acked_index: ack.acked_index,
        finished: ack.finished,
        error: ack.trouble.as_ref().map(|trouble| to_rpc_status(&error(ack.fence, trouble))),
        resend_from,
    }
}

/// Trouble as an error.
pub fn error(fence: Fence, trouble: &Trouble) -> Error {
    match trouble {
        Trouble::LeaseLost => lease_lost(fence),
        Trouble::Missing { resend_from } => Error::new(
            Kind::Aborted,
            Reason::EventsMissing,
            format!("events of `{fence}` before the first one sent are missing"),
        )
        .with("task_id", fence.task)
        .with("attempt", fence.attempt)
        .with("expected_index", resend_from),
        Trouble::Invalid(what) => Error::invalid("leases.events", what.clone()),
    }
}

/// The lease of `fence` has ended.
pub fn lease_lost(fence: Fence) -> Error {
    Error::new(
        Kind::FailedPrecondition,
        Reason::LeaseLost,
        format!("the lease of `{fence}` has ended; stop that work"),
    )
    .with("task_id", fence.task)
    .with("attempt", fence.attempt)
}

/// No protocol version is common.
pub fn version_mismatch() -> Error {
    Error::new(
        Kind::FailedPrecondition,
        Reason::ProtocolVersion,
        format!(
            "this server speaks runner protocol {} to {}; use an agent of its release",
            VERSIONS.start(),
            VERSIONS.end()
        ),
    )
    .with("server_min", VERSIONS.start())
    .with("server_max", VERSIONS.end())
}

/// A duration as the wire has it.
pub fn duration(duration: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        nanos: duration.subsec_nanos() as i32,
    }
}

/// A duration from the wire, 0 when unset.
pub fn from_duration(field: &str, duration: Option<prost_types::Duration>) -> Result<Duration> {
    duration
        .unwrap_or_default()
        .try_into()
        .map_err(|_| Error::invalid(field, "must not be negative"))
}
