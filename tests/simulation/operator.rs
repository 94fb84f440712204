//! An operator who pauses, drains, tunes and reloads runners while parts break, and lets all of
//! them work again before the mending is judged.

use std::time::Duration;

use baton::{
    id::Entropy,
    json,
    pb::{self, apply::State, runner_service_client::RunnerServiceClient},
};
use tonic::{Code, Status, transport::Channel};

use super::{CHAOS, N_RUNNERS, hosts::Site, users::is_transport};

/// A model that comes and goes; tasks are for another.
const OTHER: &str = "test/other";
/// Longest wait for an answer; the command goes on.
const PATIENCE: Duration = Duration::from_secs(3);

type Client = RunnerServiceClient<Channel>;

/// Gives orders until the chaos is over, then has every runner take work; returns how many orders
/// were obeyed before.
pub async fn operate(site: Site, dice: Entropy) -> u64 {
    let (mut number, mut n_obeyed) = (0, 0);
    while turmoil::sim_elapsed().unwrap_or_default() < CHAOS {
        tokio::time::sleep(Duration::from_millis(200 + dice.u64() % 2500)).await;
        let runner_id = format!("runner-{}", dice.u64() % N_RUNNERS);
        let mut client = RunnerServiceClient::new(site.channel());
        number += 1;
        let request_id = format!("order-{number}");
        // Sometimes the answer counts as lost, and the order is repeated.
        let kind = dice.u64();
        for _ in 0..=dice.u64() % 2 {
            match order(&mut client, kind, &runner_id, &request_id).await {
                Ok(()) => n_obeyed += 1,
                Err(status) => check(&status),
            }
        }
    }
    for i in 0..N_RUNNERS {
        let runner_id = format!("runner-{i}");
        loop {
            let mut client = RunnerServiceClient::new(site.channel());
            let request_id = String::new();
            let resume = pb::ResumeRunnerRequest { runner_id: runner_id.clone(), request_id };
            match client.resume_runner(bounded(resume)).await {
                Ok(_) => break,
                Err(status) => check(&status),
            }
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    }
    n_obeyed
}

fn bounded<T>(message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.set_timeout(PATIENCE);
    request
}

async fn order(
    client: &mut Client,
    kind: u64,
    runner_id: &str,
    request_id: &str,
) -> Result<(), Status> {
    let (runner_id, request_id) = (runner_id.to_owned(), request_id.to_owned());
    match kind % 7 {
        0 => {
            let pause = pb::PauseRunnerRequest { runner_id, request_id };
            client.pause_runner(bounded(pause)).await.map(drop)
        }
        1 | 2 => {
            let resume = pb::ResumeRunnerRequest { runner_id, request_id };
            client.resume_runner(bounded(resume)).await.map(drop)
        }
        3 => {
            let drain = pb::DrainRunnerRequest {
                runner_id,
                request_id,
                deadline: Some(prost_types::Duration { seconds: 1, nanos: 0 }),
                hand_back: kind & 64 == 0,
                exit: false,
                wait: kind & 128 == 0,
            };
            client.drain_runner(bounded(drain)).await.map(drop)
        }
        4 => {
            let params = json::struct_from_text(r#"{"delay_ms": 7}"#);
            let tune = pb::TuneRunnerRequest { runner_id, request_id, params };
            client.tune_runner(bounded(tune)).await.map(drop)
        }
        5 => {
            let state = if kind & 64 == 0 { State::Loaded } else { State::Unloaded };
            let apply = pb::ApplyModelRequest {
                runner_id,
                request_id,
                model: OTHER.into(),
                state: state.into(),
                ..Default::default()
            };
            client.apply_model(bounded(apply)).await.map(drop)
        }
        _ => {
            let reload = pb::ReloadRunnerRequest { runner_id, request_id, ..Default::default() };
            client.reload_runner(bounded(reload)).await.map(drop)
        }
    }
}

/// An order may be refused by the state of things or lost with a part, and in no other way.
fn check(status: &Status) {
    let fine = matches!(
        status.code(),
        Code::Unavailable
            | Code::Unknown
            | Code::Cancelled
            | Code::DeadlineExceeded
            | Code::NotFound
            | Code::FailedPrecondition
            | Code::Aborted
    );
    assert!(fine || is_transport(status), "an order was refused: {status:?}");
}
