//! How the scripted runner takes commands and answers them.

use baton::{
    error::Error,
    grpc::status::to_rpc_status,
    pb::{self, command::Action, connect_request::Body, connect_response},
};

use super::{SOON, default, runner::Runner};

impl Runner {
    /// The next command, accepted.
    pub async fn commanded(&mut self) -> (String, Action) {
        let command = self
            .wait("a Command", SOON, |body| match body {
                connect_response::Body::Command(command) => Some(command.clone()),
                _ => None,
            })
            .await;
        let command_id = command.command_id;
        let accepted = pb::CommandAccepted { command_id: command_id.clone() };
        self.send(Body::CommandAccepted(accepted)).await;
        (command_id, command.action.expect("an action"))
    }

    /// Opens new streams for the same session, as a runner that serves other models by now.
    pub async fn reconnect_with(mut self, api: &super::api::Api, models: &[&str]) -> Self {
        self.hello.models = models.iter().map(|model| (*model).into()).collect();
        self.reconnect(api).await.expect("a welcome")
    }

    /// Sends a message that is never resent.
    pub async fn send_unnumbered(&mut self, body: Body) {
        let message = pb::ConnectRequest { body: Some(body), ..default() };
        self.control.send(message).await.expect("an open control stream");
    }

    /// Says that a command is done.
    pub async fn done(&mut self, command_id: &str) {
        let (command_id, status) = (command_id.into(), Some(default()));
        self.send(Body::CommandDone(pb::CommandDone { command_id, status })).await;
    }

    /// Says that a command failed.
    pub async fn failed(&mut self, command_id: &str, error: &Error) {
        let (command_id, status) = (command_id.into(), Some(to_rpc_status(error)));
        self.send(Body::CommandDone(pb::CommandDone { command_id, status })).await;
    }

    /// Says how far a command is.
    pub async fn progress(&mut self, command_id: &str, done: u64, total: u64) {
        let (command_id, detail) = (command_id.into(), "attempts ended".into());
        let progress = pb::CommandProgress { command_id, done, total, detail };
        self.send(Body::CommandProgress(progress)).await;
    }

    /// Offers these models from now on.
    pub async fn offer(&mut self, models: &[&str]) {
        let models = models.iter().map(|model| (*model).into()).collect();
        self.send(Body::Offer(pb::Offer { models, ..default() })).await;
    }

    /// Says that nothing of a cancelled attempt runs any more.
    pub async fn stopped(&mut self, lease: &pb::Assign, took: f64) {
        let took = Some(super::seconds(took));
        let (task_id, attempt) = (lease.task_id.clone(), lease.attempt);
        self.send(Body::Stopped(pb::Stopped { task_id, attempt, took })).await;
    }
}
