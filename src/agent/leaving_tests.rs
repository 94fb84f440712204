//! How a runner goes: drains, commands, stops.

use std::time::Duration;

use serde_json::json;
use tokio::time::timeout;

use super::{
    engine::echo::Echo,
    testing::{Control, Rig, SOON, Stuck, assign, task, welcome},
};
use crate::pb::{
    self, connect_request::Body as FromRunner, connect_response::Body as ToRunner, finish::Outcome,
};

#[tokio::test]
async fn a_drain_finishes_what_runs_and_says_bye() {
    let mut rig = Rig::start(Echo::default(), |_| {}).await;
    let (mut control, mut output) = rig.session().await;
    control.credits().await;
    control.send(assign(task(1), "a b c", &json!({"delay_ms": 20}))).await;
    output.read(|received| received.text.starts_with('a')).await;
    rig.shutdown.drain.cancel();
    assert_eq!(control.credits().await.free_slots, 0);
    control.send(assign(task(2), "late", &json!({}))).await;
    let refused = control
        .find(|body| match body {
            FromRunner::Refuse(refuse) => Some(refuse.reason),
            _ => None,
        })
        .await;
    assert_eq!(refused, "the runner is draining");
    let received = output.read(|received| received.finish.is_some()).await;
    assert!(matches!(received.finish.unwrap().outcome, Some(Outcome::Success(_))));
    output.ack(task(1), 3, true).await;
    control.find(|body| matches!(body, FromRunner::Bye(_)).then_some(())).await;
    drop(control);
    rig.ended().await.unwrap();
}

#[tokio::test]
async fn what_outlasts_the_drain_time_is_handed_back() {
    let engine = Stuck::default();
    let mut rig =
        Rig::start(engine.clone(), |config| config.drain_time = Duration::from_millis(1)).await;
    let (mut control, mut output) = rig.session().await;
    control.send(assign(task(1), "x", &json!({}))).await;
    output.read(|received| received.text == "begun").await;
    rig.shutdown.drain.cancel();
    let received = output.read(|received| received.finish.is_some()).await;
    assert!(matches!(received.finish.unwrap().outcome, Some(Outcome::HandBack(_))));
    timeout(SOON, engine.dropped.notified()).await.unwrap();
    output.ack(task(1), 1, true).await;
    control.find(|body| matches!(body, FromRunner::Bye(_)).then_some(())).await;
    drop(control);
    rig.ended().await.unwrap();
}

#[tokio::test]
async fn a_stop_ends_at_once() {
    let engine = Stuck::default();
    let mut rig = Rig::start(engine.clone(), |_| {}).await;
    let (mut control, mut output) = rig.session().await;
    control.send(assign(task(1), "x", &json!({}))).await;
    output.read(|received| received.text == "begun").await;
    rig.shutdown.drain.cancel();
    rig.shutdown.stop.cancel();
    rig.ended().await.unwrap();
    timeout(SOON, engine.dropped.notified()).await.unwrap();
}

#[tokio::test]
async fn commands_are_accepted_and_answered() {
    let mut rig = Rig::start(Echo::default(), |_| {}).await;
    let (mut control, _output) = rig.session().await;
    assert_eq!(control.credits().await.free_slots, 2);
    for (command_id, paused, free_slots) in [("c1", true, 0), ("c2", false, 2)] {
        let action = Some(pb::command::Action::Pause(pb::Pause { paused }));
        let command = pb::Command { command_id: command_id.into(), action };
        control.send(ToRunner::Command(command)).await;
        let accepted = control.next().await.body.unwrap();
        let wanted = pb::CommandAccepted { command_id: command_id.into() };
        assert_eq!(accepted, FromRunner::CommandAccepted(wanted));
        assert_eq!(control.credits().await.free_slots, free_slots);
        let done = control.next().await.body.unwrap();
        assert!(
            matches!(done, FromRunner::CommandDone(done) if done.status.as_ref().unwrap().code == 0)
        );
    }
    let drain = pb::Drain { exit: true, ..pb::Drain::default() };
    let action = Some(pb::command::Action::Drain(drain));
    control.send(ToRunner::Command(pb::Command { command_id: "c3".into(), action })).await;
    assert_eq!(control.credits().await.free_slots, 0);
    let done = control.next().await.body.unwrap();
    assert!(matches!(done, FromRunner::CommandDone(done) if done.command_id == "c3"));
    control.find(|body| matches!(body, FromRunner::Bye(_)).then_some(())).await;
    drop(control);
    rig.ended().await.unwrap();
}

fn pause(command_id: &str, paused: bool) -> ToRunner {
    let action = Some(pb::command::Action::Pause(pb::Pause { paused }));
    ToRunner::Command(pb::Command { command_id: command_id.into(), action })
}

/// Ids of the commands that are answered up to the answer to `last`.
async fn answers(control: &mut Control, last: &str) -> Vec<String> {
    let mut ids: Vec<String> = Vec::new();
    while ids.last().is_none_or(|id| id != last) {
        let done = control.find(|body| match body {
            FromRunner::CommandDone(done) => Some(done.command_id),
            _ => None,
        });
        ids.push(done.await);
    }
    ids
}

#[tokio::test]
async fn a_command_that_comes_twice_is_executed_once_and_answered_twice() {
    let mut rig = Rig::start(Echo::default(), |_| {}).await;
    let (mut control, _output) = rig.session().await;
    control.send(pause("c1", true)).await;
    control.send(pause("c1", false)).await;
    control.send(pause("c2", true)).await;
    assert_eq!(answers(&mut control, "c2").await, ["c1", "c1", "c2"]);
    control.send(assign(task(1), "x", &json!({}))).await;
    let refused = control
        .find(|body| match body {
            FromRunner::Refuse(refuse) => Some(refuse.reason),
            _ => None,
        })
        .await;
    assert_eq!(refused, "the runner is paused");
}

#[tokio::test]
async fn a_command_of_an_ended_session_is_told_by_hello_and_not_answered() {
    let mut rig = Rig::start(Stuck::default(), |_| {}).await;
    let (mut control, mut output) = rig.session().await;
    control.send(assign(task(1), "x", &json!({}))).await;
    output.read(|received| received.text == "begun").await;
    let action = Some(pb::command::Action::Drain(pb::Drain::default()));
    control.send(ToRunner::Command(pb::Command { command_id: "c1".into(), action })).await;
    control.find(|body| matches!(body, FromRunner::CommandAccepted(_)).then_some(())).await;
    drop((control, output));

    let mut control = rig.control().await;
    assert!(control.hello.draining);
    control.welcome(welcome("s2", false)).await;
    let cancel = pb::Cancel { task_id: task(1).to_string(), attempt: 1, ..pb::Cancel::default() };
    control.send(ToRunner::Cancel(cancel)).await;
    control.credits().await;
    control.send(pause("c2", true)).await;
    assert_eq!(answers(&mut control, "c2").await, ["c2"]);
}

#[tokio::test]
async fn a_command_is_refused_that_the_engine_cannot_execute() {
    let mut rig = Rig::start(Stuck::default(), |_| {}).await;
    let (mut control, _output) = rig.session().await;
    assert_eq!(control.hello.features, ["offer", "progress", "stopped"]);
    let action = Some(pb::command::Action::Tune(pb::Tune::default()));
    control.send(ToRunner::Command(pb::Command { command_id: "c1".into(), action })).await;
    let status = control
        .find(|body| match body {
            FromRunner::CommandDone(done) => done.status,
            _ => None,
        })
        .await;
    assert_eq!(status.code, tonic::Code::Unimplemented as i32);
    assert!(status.message.contains("`stuck` cannot be tuned"), "{status:?}");
}
