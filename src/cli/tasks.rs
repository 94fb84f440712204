//! `task`: look at tasks and steer them.

use std::{fmt::Write as _, time::Duration};

use clap::{Args, Subcommand};

use super::{
    Context,
    exit::{Exit, Failure, Outcome},
    input, json,
    output::{Output, fields},
    text,
};
use crate::{client::Client, clock::Micros, pb};

/// Commands of `task`.
#[derive(Subcommand, Clone, Debug)]
pub enum TaskCommand {
    /// List tasks, newest first
    List(ListArgs),
    /// Show a task
    Get {
        /// Task
        task: String,
    },
    /// Show the timeline of a task: everything but its tokens
    Events {
        /// Task
        task: String,
    },
    /// Cancel a task
    Cancel {
        /// Tasks
        #[arg(required = true)]
        tasks: Vec<String>,
        /// For the timeline and the runner
        #[arg(long, default_value = "")]
        reason: String,
    },
    /// Submit an ended task again, as a new task
    Retry {
        /// Task
        task: String,
        /// Same id, same new task; made when absent
        #[arg(long)]
        request_id: Option<String>,
    },
    /// Say why a task waits, or why it ended as it did
    Explain {
        /// Task
        task: String,
    },
    /// Delete an ended task, its events and its tokens
    Delete {
        /// Tasks
        #[arg(required = true)]
        tasks: Vec<String>,
    },
}

/// Arguments of `task list`.
#[derive(Args, Clone, Debug)]
pub struct ListArgs {
    /// Only this state, such as running; may be given several times
    #[arg(long, value_parser = state)]
    state: Vec<pb::TaskState>,
    /// Only this model
    #[arg(long)]
    model: Option<String>,
    /// Only tasks with this label, k=v
    #[arg(long, value_name = "K=V")]
    label: Vec<String>,
    /// Only tasks of this session
    #[arg(long, value_name = "ID")]
    session: Option<String>,
    /// Only tasks created within this time
    #[arg(long, value_name = "DURATION", value_parser = crate::config::units::parse_duration)]
    since: Option<std::time::Duration>,
    /// At most this many
    #[arg(long, default_value_t = 50)]
    limit: usize,
}

fn state(name: &str) -> Result<pb::TaskState, String> {
    let full = format!("TASK_STATE_{}", name.to_uppercase().replace('-', "_"));
    pb::TaskState::from_str_name(&full).filter(|s| *s != pb::TaskState::Unspecified).ok_or_else(
        || {
            "states are queued, running, succeeded, failed, cancelled, expired and dead_lettered"
                .into()
        },
    )
}

/// Runs a command of `task`.
pub async fn run(context: &Context, command: &TaskCommand) -> Outcome {
    let client = context.client().await?;
    let output = &context.output;
    match command {
        TaskCommand::List(args) => return list(context, &client, args).await,
        TaskCommand::Get { task } => {
            let found = call(client.get_task(task).await, "find", task)?;
            output.message("Task", &found, |found| describe(found, context))?;
        }
        TaskCommand::Events { task } => return events(context, &client, task).await,
        TaskCommand::Cancel { tasks, reason } => {
            let mut changed = Vec::new();
            for id in tasks {
                let task = call(client.cancel(id, reason).await, "cancel", id)?;
                match Exit::of_state(task.state()) {
                    Some(Exit::TaskCancelled) => output.note(format!("task {id} is cancelled")),
                    _ => output.note(format!(
                        "task {id} had ended before, as {}; nothing was changed",
                        text::state(task.state)
                    )),
                }
                output.next("run it again", format_args!("baton task retry {id}"));
                changed.push(task);
            }
            output.changed(("Task", "tasks"), &changed)?;
        }
        TaskCommand::Retry { task, request_id } => {
            let request_id = request_id.clone().unwrap_or_else(|| client.request_id());
            let new = call(retry(&client, task, request_id).await, "retry", task)?;
            output.message("Task", &new, |new| new.task_id.clone())?;
            output.next("follow", format_args!("baton follow {}", new.task_id));
        }
        TaskCommand::Explain { task } => {
            let request = pb::ExplainTaskRequest { task_id: task.clone() };
            let answer = client
                .repeat(|| {
                    let (mut tasks, request) = (client.tasks(), request.clone());
                    async move { tasks.explain_task(request).await }
                })
                .await;
            let answer = call(answer, "explain", task)?;
            output.message("TaskExplanation", &answer, explanation)?;
        }
        TaskCommand::Delete { tasks } => {
            let n_tasks = text::count(tasks.len() as u64, "task");
            output.confirm(&format!("Delete {n_tasks}, events and tokens included?"))?;
            for id in tasks {
                delete(&client, id).await?;
                output.note(format!("task {id} is deleted"));
            }
        }
    }
    Ok(Exit::Ok)
}

/// Retries a task as a new one; safe to repeat because of the id.
pub async fn retry(
    client: &Client,
    task: &str,
    request_id: String,
) -> Result<pb::Task, tonic::Status> {
    let request = pb::RetryTaskRequest { task_id: task.to_owned(), request_id };
    client
        .repeat(|| {
            let (mut tasks, request) = (client.tasks(), request.clone());
            async move { tasks.retry_task(request).await }
        })
        .await
}

/// Deletes a task.
pub async fn delete(client: &Client, task: &str) -> Outcome<()> {
    let request = pb::DeleteTaskRequest { task_id: task.to_owned() };
    let mut tasks = client.tasks();
    call(client.once(tasks.delete_task(request)).await, "delete", task)
}

fn call<T>(answer: Result<T, tonic::Status>, verb: &str, id: &str) -> Outcome<T> {
    answer.map_err(|error| {
        let failure = Failure::of_call(&format!("{verb} task {id}"), &error);
        match failure.exit {
            Exit::NotFound => failure.hint("see the latest tasks: baton task list"),
            Exit::Conflict if verb == "delete" => {
                failure.hint(format!("cancel it first: baton task cancel {id}"))
            }
            Exit::Conflict => failure.hint(format!("see its state: baton task get {id}")),
            _ => failure,
        }
    })
}

/// All pages of a list, up to a limit.
pub async fn pages(
    client: &Client,
    mut request: pb::ListTasksRequest,
    limit: usize,
) -> Outcome<(Vec<pb::Task>, bool)> {
    let mut tasks: Vec<pb::Task> = Vec::new();
    loop {
        request.page_size = i32::try_from((limit - tasks.len()).clamp(1, 1_000)).unwrap_or(1_000);
        let page = client
            .repeat(|| {
                let (mut tasks, request) = (client.tasks(), request.clone());
                async move { tasks.list_tasks(request).await }
            })
            .await
            .map_err(|error| Failure::of_call("list tasks", &error))?;
        tasks.extend(page.tasks);
        if page.next_page_token.is_empty() || tasks.len() >= limit {
            let more = !page.next_page_token.is_empty() || tasks.len() > limit;
            tasks.truncate(limit);
            return Ok((tasks, more));
        }
        request.page_token = page.next_page_token;
    }
}

async fn list(context: &Context, client: &Client, args: &ListArgs) -> Outcome {
    let since = args.since.map(|since| text::timestamp(context.clock.now() - since));
    let request = pb::ListTasksRequest {
        states: args.state.iter().map(|state| *state as i32).collect(),
        model: args.model.clone().unwrap_or_default(),
        labels: input::pairs("--label", &args.label)?.into_iter().collect(),
        session_id: args.session.clone().unwrap_or_default(),
        created_after: since,
        ..Default::default()
    };
    let (tasks, more) = pages(client, request, args.limit.max(1)).await?;
    table(context, "tasks", &tasks)?;
    if more {
        context.output.note(format!("more than {} match; see more with --limit", tasks.len()));
    }
    Ok(Exit::Ok)
}

/// Prints tasks as a list; `key` is what they are called.
pub fn table(context: &Context, key: &str, tasks: &[pb::Task]) -> Outcome<()> {
    let headers = ["task", "state", "model", "attempt", "age", "why"];
    context.output.list(("Task", key), tasks, &headers, |task| {
        let spec = task.spec.clone().unwrap_or_default();
        let why = task.error.as_ref().map(|error| shorten(&text::why(task.state, error)));
        vec![
            task.task_id.clone(),
            text::state(task.state).into(),
            spec.model,
            task.attempt.to_string(),
            text::age(task.create_time, &context.clock),
            why.unwrap_or_default(),
        ]
    })
}

fn shorten(line: &str) -> String {
    let line = line.replace('\n', " ");
    if line.chars().count() <= 60 {
        return line;
    }
    line.chars().take(59).chain(['…']).collect()
}

async fn events(context: &Context, client: &Client, task: &str) -> Outcome {
    let mut request = pb::ListTaskEventsRequest {
        task_id: task.to_owned(),
        page_size: 1_000,
        ..Default::default()
    };
    let mut events = Vec::new();
    loop {
        let page = client
            .repeat(|| {
                let (mut tasks, request) = (client.tasks(), request.clone());
                async move { tasks.list_task_events(request).await }
            })
            .await;
        let page = call(page, "list the events of", task)?;
        events.extend(page.events);
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    let headers = ["sequence", "time", "attempt", "event"];
    context.output.list(("TaskEvent", "events"), &events, &headers, |event| {
        vec![
            event.sequence.to_string(),
            text::time(event.time),
            event.attempt.to_string(),
            text::event(event),
        ]
    })?;
    Ok(Exit::Ok)
}

fn describe(task: &pb::Task, context: &Context) -> String {
    let spec = task.spec.clone().unwrap_or_default();
    let json_of = |value: &Option<prost_types::Struct>| {
        value.as_ref().map(crate::json::text_from_struct).unwrap_or_default()
    };
    let attempts = format!(
        "{} ({} failed, {} lost, {} handed back)",
        task.attempt, task.failed_attempts, task.lost_attempts, task.handed_back_attempts
    );
    let error = task.error.as_ref().map(|error| text::why(task.state, error));
    let age = text::age(task.create_time, &context.clock);
    let usage = task.usage.unwrap_or_default();
    let tokens = match (usage.tokens_in, usage.tokens_out) {
        (0, 0) => String::new(),
        (read, made) => format!("{read} in, {made} out"),
    };
    let pairs = [
        ("task", task.task_id.clone()),
        ("state", text::state(task.state).into()),
        ("model", spec.model),
        ("input", json_of(&spec.input)),
        ("params", json_of(&spec.params)),
        ("labels", text::labels(&spec.labels)),
        ("requires", text::labels(&spec.required_labels)),
        ("priority", if spec.priority == 0 { String::new() } else { spec.priority.to_string() }),
        ("session", spec.session_id),
        ("attempts", attempts),
        ("runner", task.runner_id.clone()),
        ("created", format!("{} ({age} ago)", text::time(task.create_time))),
        ("not before", text::time(task.not_before)),
        ("started", text::time(task.start_time)),
        ("ended", text::time(task.end_time)),
        ("deadline", text::time(spec.deadline)),
        ("tokens", tokens),
        ("error", error.unwrap_or_default()),
        ("result", json_of(&task.result)),
        ("retry of", task.retry_of.clone()),
        ("retried by", task.retried_by.clone()),
        ("request id", task.request_id.clone()),
    ];
    fields(&pairs)
}

fn explanation(answer: &pb::TaskExplanation) -> String {
    let mut lines = format!("{}: {}\n", text::state(answer.state), answer.summary);
    let mut facts: Vec<_> = answer.evidence.iter().collect();
    facts.sort();
    for (name, value) in facts {
        let (name, value) = readable(name, value);
        let _ = writeln!(lines, "  {name}: {value}");
    }
    if !answer.next_step.is_empty() {
        let _ = writeln!(lines, "next: {}", answer.next_step);
    }
    lines
}

/// A fact with its unit as people read it: times and durations travel as numbers.
fn readable<'a>(name: &'a str, value: &str) -> (&'a str, String) {
    let number = value.parse::<i64>().ok();
    if let (Some(name), Some(us)) = (name.strip_suffix("_us"), number) {
        return (name, text::time(Some(text::timestamp(Micros(us)))));
    }
    if let (Some(name), Some(ms)) = (name.strip_suffix("_ms"), number) {
        return (name, text::duration(Duration::from_millis(ms.unsigned_abs())));
    }
    (name, value.to_owned())
}

/// Prints an id, or the whole message, of something that was changed.
pub fn changed(output: &Output, name: &str, message: &impl prost::Message) -> Outcome<()> {
    if output.is_text() { Ok(()) } else { output.value(&json::of(name, message)?) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_explanation_shows_times_and_durations_not_numbers() {
        let evidence =
            [("pause_time_us", "1795683355000000"), ("waited_ms", "2400"), ("slots", "8")];
        let answer = pb::TaskExplanation {
            summary: "it waits".into(),
            evidence: evidence.map(|(name, value)| (name.into(), value.into())).into(),
            ..Default::default()
        };
        let text = explanation(&answer);
        assert!(text.contains("  pause_time: 2026-11-26T08:55:55Z\n"), "{text}");
        assert!(text.contains("  waited: 2.4 s\n"), "{text}");
        assert!(text.contains("  slots: 8\n"), "{text}");
    }
}
