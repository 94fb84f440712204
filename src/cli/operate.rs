//! `queue`, `failures`: what operators look at and change.

use clap::{Args, Subcommand};

use super::{
    Context,
    exit::{Exit, Failure, Outcome},
    input::check_model,
    output::fields,
    tasks, text,
};
use crate::{client::Client, pb};

/// Commands of `queue`.
#[derive(Subcommand, Clone, Debug)]
pub enum QueueCommand {
    /// List queues that hold tasks or are paused
    List,
    /// Show the queue of a model
    Get {
        /// Model, owner/name
        model: String,
    },
    /// Stop handing out tasks of a model; running tasks go on
    Pause {
        /// Model, owner/name
        model: String,
        /// Shown to everyone who asks why a task waits
        #[arg(long, default_value = "")]
        reason: String,
    },
    /// Hand out tasks of a model again
    Resume {
        /// Model, owner/name
        model: String,
    },
}

/// Runs a command of `queue`.
pub async fn queue(context: &Context, command: &QueueCommand) -> Outcome {
    let client = context.client().await?;
    let output = &context.output;
    let fail = |doing: String| move |error: tonic::Status| Failure::of_call(&doing, &error);
    let queues = || client.queues();
    match command {
        QueueCommand::List => {
            let mut all = Vec::new();
            let mut request = pb::ListQueuesRequest { page_size: 1_000, ..Default::default() };
            loop {
                let page = client
                    .repeat(|| {
                        let (mut queues, request) = (queues(), request.clone());
                        async move { queues.list_queues(request).await }
                    })
                    .await
                    .map_err(fail("list queues".into()))?;
                all.extend(page.queues);
                if page.next_page_token.is_empty() {
                    break;
                }
                request.page_token = page.next_page_token;
            }
            let headers =
                ["model", "waiting", "delayed", "running", "oldest", "slots", "free", "paused"];
            output.list(("Queue", "queues"), &all, &headers, |queue| {
                let pause = queue.pause.as_ref();
                vec![
                    queue.model.clone(),
                    queue.depth.to_string(),
                    queue.delayed.to_string(),
                    queue.running.to_string(),
                    text::optional_duration(queue.oldest_wait),
                    queue.slots.to_string(),
                    queue.free_slots.to_string(),
                    pause.map(|p| format!("by {}: {}", p.paused_by, p.reason)).unwrap_or_default(),
                ]
            })?;
        }
        QueueCommand::Get { model } => {
            check_model(model)?;
            let request = pb::GetQueueRequest { model: model.clone() };
            let found = client
                .repeat(|| {
                    let (mut queues, request) = (queues(), request.clone());
                    async move { queues.get_queue(request).await }
                })
                .await
                .map_err(fail(format!("find the queue of {model}")))?;
            output.message("Queue", &found, describe_queue)?;
        }
        QueueCommand::Pause { model, reason } => {
            check_model(model)?;
            let request = pb::PauseQueueRequest { model: model.clone(), reason: reason.clone() };
            let changed = client
                .repeat(|| {
                    let (mut queues, request) = (queues(), request.clone());
                    async move { queues.pause_queue(request).await }
                })
                .await
                .map_err(fail(format!("pause the queue of {model}")))?;
            tasks::changed(output, "Queue", &changed)?;
            let running = match changed.running {
                0 => "nothing runs".to_owned(),
                n => format!("{} still running", text::count(n, "task")),
            };
            output.note(format!("the queue of {model} is paused; {running}"));
            output.next("go on", format_args!("baton queue resume {model}"));
        }
        QueueCommand::Resume { model } => {
            check_model(model)?;
            let request = pb::ResumeQueueRequest { model: model.clone() };
            let changed = client
                .repeat(|| {
                    let (mut queues, request) = (queues(), request.clone());
                    async move { queues.resume_queue(request).await }
                })
                .await
                .map_err(fail(format!("resume the queue of {model}")))?;
            tasks::changed(output, "Queue", &changed)?;
            let waiting = text::count(changed.depth, "task");
            output.note(format!("the queue of {model} goes on; {waiting} waiting"));
            output.next("watch it", format_args!("baton queue get {model}"));
        }
    }
    Ok(Exit::Ok)
}

fn describe_queue(queue: &pb::Queue) -> String {
    let pause = queue.pause.as_ref().map(|pause| {
        format!("by {} at {}: {}", pause.paused_by, text::time(pause.pause_time), pause.reason)
    });
    fields(&[
        ("model", queue.model.clone()),
        ("paused", pause.unwrap_or_default()),
        ("waiting", format!("{} of at most {}", queue.depth, queue.limit)),
        ("delayed", queue.delayed.to_string()),
        ("running", queue.running.to_string()),
        ("oldest wait", text::optional_duration(queue.oldest_wait)),
        ("start rate", format!("{:.2}/s", queue.start_rate)),
        ("slots", format!("{}, {} free", queue.slots, queue.free_slots)),
    ])
}

/// Which dead letters.
#[derive(Args, Clone, Debug)]
pub struct Which {
    /// Dead letters
    tasks: Vec<String>,
    /// All of them
    #[arg(long, conflicts_with = "tasks")]
    all: bool,
    /// With --all: only this model
    #[arg(long, requires = "all")]
    model: Option<String>,
}

/// Commands of `failures`.
#[derive(Subcommand, Clone, Debug)]
pub enum FailuresCommand {
    /// List dead letters that nobody has retried
    List {
        /// Only this model
        #[arg(long)]
        model: Option<String>,
        /// At most this many
        #[arg(long, default_value_t = 50)]
        limit: usize,
    },
    /// Submit dead letters again, as new tasks
    Retry(Which),
    /// Delete dead letters for good
    Discard(Which),
}

/// Runs a command of `failures`.
pub async fn failures(context: &Context, command: &FailuresCommand) -> Outcome {
    let client = context.client().await?;
    let output = &context.output;
    match command {
        FailuresCommand::List { model, limit } => {
            let (tasks, more) = dead(&client, model.as_ref(), (*limit).max(1)).await?;
            tasks::table(context, "dead_letters", &tasks)?;
            if more {
                output.note(format!("more than {} match; see more with --limit", tasks.len()));
            }
            if let Some(first) = tasks.first() {
                output.next("see why", format_args!("baton task events {}", first.task_id));
                output.next("retry", format_args!("baton failures retry {}", first.task_id));
            }
        }
        FailuresCommand::Retry(which) => {
            let ids = which.ids(&client, "retry").await?;
            if ids.is_empty() {
                output.note("no dead letters");
                return output.changed::<pb::Task>(("Task", "tasks"), &[]).map(|()| Exit::Ok);
            }
            let letters = text::count(ids.len() as u64, "dead letter");
            if ids.len() > 1 {
                output.confirm(&format!("Retry {letters}?"))?;
            }
            let mut made = Vec::new();
            for id in &ids {
                let new = tasks::retry(&client, id, client.request_id())
                    .await
                    .map_err(|error| Failure::of_call(&format!("retry task {id}"), &error))?;
                if output.is_text() {
                    output.line(&new.task_id)?;
                }
                made.push(new);
            }
            output.changed(("Task", "tasks"), &made)?;
            output.note(format!("{letters} submitted again"));
            output.next("watch them", "baton task list");
        }
        FailuresCommand::Discard(which) => {
            let ids = which.ids(&client, "discard").await?;
            if ids.is_empty() {
                output.note("no dead letters");
                return Ok(Exit::Ok);
            }
            let letters = text::count(ids.len() as u64, "dead letter");
            output.confirm(&format!("Delete {letters} for good?"))?;
            for id in &ids {
                tasks::delete(&client, id).await?;
            }
            output.note(format!("{letters} deleted"));
        }
    }
    Ok(Exit::Ok)
}

impl Which {
    async fn ids(&self, client: &Client, verb: &str) -> Outcome<Vec<String>> {
        if self.all {
            let (tasks, _) = dead(client, self.model.as_ref(), usize::MAX).await?;
            return Ok(tasks.into_iter().map(|task| task.task_id).collect());
        }
        if self.tasks.is_empty() {
            return Err(Failure::usage("no dead letter is named")
                .hint("see them: baton failures list")
                .hint(format!("or take all of them: baton failures {verb} --all")));
        }
        Ok(self.tasks.clone())
    }
}

async fn dead(
    client: &Client,
    model: Option<&String>,
    limit: usize,
) -> Outcome<(Vec<pb::Task>, bool)> {
    let request = pb::ListTasksRequest {
        states: vec![pb::TaskState::DeadLettered as i32],
        model: model.cloned().unwrap_or_default(),
        exclude_retried: true,
        ..Default::default()
    };
    tasks::pages(client, request, limit).await
}
