//! Unary calls in closed loops: an echo, or a control call of Baton.

use std::{cell::RefCell, rc::Rc};

use bytes::Bytes;
use futures_util::future::try_join_all;
use http::Method;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{
    client,
    figures::{Latency, histogram},
    process::{cpu_us, now_ns},
    relay::Server,
    wire::{self, Connection},
    yardstick,
};
use crate::pb::GetTaskRequest;

/// What to call, and how often at once.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Spec {
    /// The server.
    pub server: Server,
    /// Which call.
    pub call: Call,
    /// Calls at once.
    pub callers: usize,
    /// Connections that they share.
    pub connections: usize,
    /// Length of the measured span.
    pub seconds: f64,
}

/// A unary call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Call {
    /// 32 bytes there and back, at a yardstick.
    Echo,
    /// A task that waits.
    GetTask,
    /// The same as JSON.
    GetTaskJson,
    /// A task that will wait, of 700 bytes as JSON.
    Submit,
    /// The same as JSON.
    SubmitJson,
    /// The health of the server.
    Health,
}

/// What came of it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Outcome {
    /// Calls a second.
    pub rate: f64,
    /// Processor time of the server per call, in microseconds.
    pub server_us: f64,
    /// Round trips.
    pub latency: Latency,
}

/// Runs the load.
pub async fn run(spec: Spec) -> anyhow::Result<Outcome> {
    let mut connections = Vec::new();
    for _ in 0..spec.connections {
        connections.push(spec.server.connect().await?);
    }
    let request = Rc::new(request(&spec, &connections[0]).await?);
    let latency = Rc::new(RefCell::new(histogram()));
    drive(&spec, &connections, &request, 0.5, &latency).await?;
    latency.borrow_mut().reset();
    let (at, cpu) = (now_ns(), cpu_us(spec.server.pid));
    drive(&spec, &connections, &request, spec.seconds, &latency).await?;
    let seconds = (now_ns() - at) as f64 / 1e9;
    let latency = Latency::from(&*latency.borrow());
    let calls = latency.count.max(1) as f64;
    let server_us = (cpu_us(spec.server.pid) - cpu) as f64 / calls;
    Ok(Outcome { rate: calls / seconds, server_us, latency })
}

/// One call, ready to be made again and again.
struct Request {
    /// Of a call with JSON; `None` over gRPC.
    method: Option<Method>,
    path: String,
    /// A message in its frame, or JSON.
    body: Bytes,
}

/// Bytes of input that make a submit of 700 bytes as JSON.
const INPUT: usize = 642;

async fn request(spec: &Spec, connection: &Connection) -> anyhow::Result<Request> {
    let model = "bench/unary";
    let grpc = |path: &str, body| Request { method: None, path: path.to_owned(), body };
    Ok(match spec.call {
        Call::Echo => {
            let data = Bytes::from_static(&[7; 32]);
            grpc(yardstick::path::ECHO, wire::framed(&yardstick::Payload { data }))
        }
        Call::GetTask | Call::GetTaskJson => {
            let ids = client::submit_many(connection, model, 1).await?;
            let task_id = ids.into_iter().next().unwrap_or_default();
            if spec.call == Call::GetTask {
                grpc(client::GET, wire::framed(&GetTaskRequest { task_id }))
            } else {
                let path = format!("/v1/tasks/{task_id}");
                Request { method: Some(Method::GET), path, body: Bytes::new() }
            }
        }
        Call::Submit => grpc(client::SUBMIT, wire::framed(&client::submission(model, "", INPUT))),
        Call::SubmitJson => {
            let input = json!({ "p": "x".repeat(INPUT) });
            let body = json!({ "spec": { "model": model, "input": input } }).to_string();
            Request { method: Some(Method::POST), path: "/v1/tasks".to_owned(), body: body.into() }
        }
        Call::Health => grpc("/grpc.health.v1.Health/Check", Bytes::from_static(&[0; 5])),
    })
}

async fn drive(
    spec: &Spec,
    connections: &[Connection],
    request: &Rc<Request>,
    seconds: f64,
    latency: &Rc<RefCell<hdrhistogram::Histogram<u64>>>,
) -> anyhow::Result<()> {
    let until = now_ns() + (seconds * 1e9) as u64;
    let callers = (0..spec.callers).map(|at| {
        let connection = connections[at % connections.len()].clone();
        let (request, latency) = (Rc::clone(request), Rc::clone(latency));
        let calls = async move {
            loop {
                let sent = now_ns();
                let body = request.body.clone();
                match &request.method {
                    Some(method) => connection.json(method.clone(), &request.path, body).await?,
                    None => connection.unary_framed(&request.path, body).await?,
                };
                let done = now_ns();
                let _ = latency.borrow_mut().record(done - sent);
                if done >= until {
                    return anyhow::Ok(());
                }
            }
        };
        tokio::task::spawn_local(calls)
    });
    for ended in try_join_all(callers).await? {
        ended?;
    }
    Ok(())
}
