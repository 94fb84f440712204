//! The cases of the HTTP edge: server-sent events against a bare server of them, and JSON against
//! gRPC in the same server.

use anyhow::Context as _;

use super::{
    Role,
    relay::{self, Server},
    report::{Better, Row},
    suite::{Plan, baton, each, in_turn, lost, play},
    unary, yardstick,
};

/// Tokens to subscribers that read server-sent events, a connection each.
pub fn events(plan: &Plan) -> anyhow::Result<Vec<Row>> {
    let spec = |server| relay::Spec { events: true, ..relay::Spec::paced(server, plan.seconds()) };
    let (floor, ours) = in_turn(plan, yardstick::Relay::Events, 2, spec)?;
    let row = |goal, what, of: fn(&relay::Outcome) -> f64| {
        Row::new(goal, what, "µs", each(&ours, of)).against(each(&floor, of))
    };
    Ok(vec![
        row("G9", "server CPU per event, 200 SSE x 50/s, bare SSE t2", |o| o.server_us)
            .judged(Better::Lower, 1.3, 1.1)
            .noted(lost(&ours)),
        row("G9", "latency p50 of the same", |o| o.latency.p50),
        row("G9", "latency p99 of the same", |o| o.latency.p99),
    ])
}

/// What JSON adds to unary calls.
pub fn json_calls(plan: &Plan) -> anyhow::Result<Vec<Row>> {
    let (_baton, server) = baton(plan)?;
    let call = |server: &Server, call| {
        let seconds = plan.seconds() / 2.0;
        let spec =
            unary::Spec { server: server.clone(), call, callers: 64, connections: 4, seconds };
        play::<unary::Outcome>(&Role::Unary(spec)).with_context(|| format!("{call:?}"))
    };
    let mut rows = Vec::new();
    for (what, grpc, json) in [
        // Before there are many tasks, which the server looks after in the background.
        ("CPU that JSON adds to GetTask", unary::Call::GetTask, unary::Call::GetTaskJson),
        (
            "CPU that JSON adds to SubmitTask, 700 bytes",
            unary::Call::Submit,
            unary::Call::SubmitJson,
        ),
    ] {
        let (mut over_grpc, mut as_json) = (Vec::new(), Vec::new());
        for _ in 0..plan.repeat {
            over_grpc.push(call(&server, grpc)?);
            as_json.push(call(&server, json)?);
        }
        let cpu = |o: &unary::Outcome| o.server_us;
        let (over_grpc, as_json) = (each(&over_grpc, cpu), each(&as_json, cpu));
        let added = as_json.iter().zip(&over_grpc).map(|(json, grpc)| json - grpc).collect();
        let note = format!(
            "{:.1} µs over gRPC, {:.1} µs as JSON, both over HTTP/2",
            super::figures::median(over_grpc),
            super::figures::median(as_json),
        );
        rows.push(Row::new("G10", what, "µs", added).judged(Better::Lower, 25.0, 5.0).noted(note));
    }
    Ok(rows)
}
