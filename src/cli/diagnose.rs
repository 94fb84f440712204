//! Why a task waits when something is wrong, and the model that was probably meant.

use std::fmt::Write as _;
use std::time::Duration;

use crate::near::nearest_model;
use crate::{
    client::Client,
    pb::{self, task_explanation::Reason},
};

/// The explanation must not hold up the tokens.
const TIMEOUT: Duration = Duration::from_secs(2);

/// What cancels the task that waits, for a person who sees the warning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cancel {
    /// Leaving the command that shows it.
    Leave,
    /// A command of its own.
    Command,
}

/// One warning when the task waits for something that will not come by itself.
pub async fn waiting(
    client: &Client,
    task_id: &str,
    model: &str,
    cancel: Cancel,
) -> Option<String> {
    let client = client.clone().with_timeout(TIMEOUT);
    let request = pb::ExplainTaskRequest { task_id: task_id.to_owned() };
    let mut tasks = client.tasks();
    let mut explanation = client.once(tasks.explain_task(request)).await.ok()?;
    let mut warning = match explanation.reason() {
        Reason::QueuePaused
        | Reason::NoRunnerForModel
        | Reason::NoRunnerWithLabels
        | Reason::RunnersDraining => explanation.summary.clone(),
        Reason::Unspecified
        | Reason::NotBefore
        | Reason::Backoff
        | Reason::BehindOthers
        | Reason::NoFreeSlot
        | Reason::Starting
        | Reason::Running
        | Reason::Ended => return None,
    };
    if explanation.reason() == Reason::NoRunnerForModel {
        let known = models(&client).await;
        if let Some(near) = nearest_model(model, &known) {
            // Nobody should start a runner for a typo.
            explanation.next_step = match cancel {
                Cancel::Leave => "Ctrl-C cancels it".to_owned(),
                Cancel::Command => format!("cancel it: baton task cancel {task_id}"),
            };
            let _ = write!(warning, "; did you mean `{near}`?");
        } else if known.is_empty() {
            warning.push_str("; no runner is connected");
        } else {
            let _ = write!(warning, "; runners serve: {}", known.join(", "));
        }
    }
    if !explanation.next_step.is_empty() {
        let _ = write!(warning, "\nhint: {}", explanation.next_step);
    }
    Some(warning)
}

/// Models that connected runners serve.
pub async fn models(client: &Client) -> Vec<String> {
    let request = pb::ListRunnersRequest { page_size: 1_000, page_token: String::new() };
    let mut runners = client.runners();
    let Ok(list) = client.once(runners.list_runners(request)).await else { return Vec::new() };
    let mut models: Vec<String> = list.runners.into_iter().flat_map(|r| r.models).collect();
    models.sort();
    models.dedup();
    models
}
