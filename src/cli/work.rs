//! `run`, `submit`, `follow`, `wait`: from a spec to tokens on stdout.

use std::{pin::Pin, time::Duration};

use super::{
    Context,
    diagnose::{self, Cancel},
    exit::{Exit, Failure, Outcome},
    input::SpecArgs,
    json,
    output::Format,
    signals::Interrupts,
    stream::{Printer, ended_failure},
};
use crate::{
    client::{Client, Follow, Update},
    pb,
};
use clap::{Args, ValueEnum};

/// A task that has not started by then gets an explanation.
const EXPLAIN_AFTER: Duration = Duration::from_secs(1);
/// Between two looks at why it waits.
const EXPLAIN_EVERY: Duration = Duration::from_secs(5);
/// A second interrupt within this time cancels a task that the first one left alone.
const SECOND_INTERRUPT: Duration = Duration::from_secs(2);

/// Arguments of `run`.
#[derive(Args, Clone, Debug)]
pub struct RunArgs {
    #[command(flatten)]
    spec: SpecArgs,
}

/// Arguments of `submit`.
#[derive(Args, Clone, Debug)]
pub struct SubmitArgs {
    #[command(flatten)]
    spec: SpecArgs,
    /// Print the tokens as they come; Ctrl-C leaves the task running
    #[arg(long, short, conflicts_with = "wait")]
    follow: bool,
    /// Wait for the end and print the result
    #[arg(long, short)]
    wait: bool,
}

/// Arguments of `follow`.
#[derive(Args, Clone, Debug)]
pub struct FollowArgs {
    /// Task to follow
    task: String,
    /// Sequence to start with, or `live` for what comes from now on
    #[arg(long, value_name = "N", default_value = "1")]
    from: String,
}

/// Arguments of `wait`.
#[derive(Args, Clone, Debug)]
pub struct WaitArgs {
    /// Tasks to wait for
    #[arg(required = true)]
    tasks: Vec<String>,
    /// What counts as success
    #[arg(long = "for", value_enum, default_value = "succeeded")]
    until: Until,
}

/// What `wait` waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Until {
    /// Every task succeeded; another end gives its exit code
    Succeeded,
    /// Every task ended, in whatever way
    Terminal,
}

/// What is followed: its model, and what cancels it.
#[derive(Clone, Copy)]
struct Watched<'a> {
    model: &'a str,
    cancel: Cancel,
}

/// How following came to a stop.
enum Stop {
    Ended,
    Interrupted,
    TimedOut,
}

/// `run`: submits and streams; leaving cancels.
pub async fn run(context: &Context, args: &RunArgs) -> Outcome {
    let request = args.spec.request(&context.clock)?;
    let model = request.spec.as_ref().map(|spec| spec.model.clone()).unwrap_or_default();
    let client = context.client().await?;
    let mut interrupts = Interrupts::new()?;
    let mut printer = Printer::new(&context.output, "");
    let mut follow = client.run(pb::RunTaskRequest {
        spec: request.spec,
        request_id: request.request_id,
        on_disconnect: pb::run_task_request::OnDisconnect::Cancel as i32,
    });
    if context.output.shows_progress() {
        follow = follow.with_metrics();
    }
    let watched = Watched { model: &model, cancel: Cancel::Leave };
    let stop = drive(context, &client, &mut follow, &mut printer, &mut interrupts, watched)
        .await
        .inspect_err(|_| printer.broken_off())?;
    printer.clear();
    let (why, exit) = match stop {
        Stop::Ended => return printer.finish(),
        Stop::Interrupted => {
            printer.interrupted();
            ("interrupted", Exit::Interrupted)
        }
        Stop::TimedOut => {
            printer.fresh_line();
            ("timed out", Exit::TimedOut)
        }
    };
    let id = printer.task_id().to_owned();
    if id.is_empty() {
        // The server cancels a task whose caller leaves.
        return Err(Failure::new(exit, format!("{why} before the task was accepted")));
    }
    // A second interrupt does not wait for the answer.
    let cancelled = tokio::select! {
        answer = client.cancel(&id, "the caller left") => answer,
        () = interrupts.next() => return Err(Failure::new(exit, format!("{why}; task {id} is cancelled when the server sees it"))),
    };
    match cancelled {
        Ok(task) => {
            let state = super::text::state(task.state).to_lowercase();
            Err(Failure::new(exit, format!("{why}; task {id} is {state}"))
                .hint(format!("run it again: baton task retry {id}"))
                .hint("to leave tasks running, use: baton submit --follow"))
        }
        Err(error) => Err(Failure::of_call(&format!("cancel task {id}"), &error)),
    }
}

/// `submit`: accepts durably and prints the id, or stays to watch.
pub async fn submit(context: &Context, args: &SubmitArgs) -> Outcome {
    let mut request = args.spec.request(&context.clock)?;
    let client = context.client().await?;
    if request.request_id.is_empty() {
        request.request_id = client.request_id();
    }
    let model = request.spec.as_ref().map(|spec| spec.model.clone()).unwrap_or_default();
    let response =
        client.submit(request).await.map_err(|e| Failure::of_call("submit the task", &e))?;
    let task = response.task.clone().unwrap_or_default();
    let output = &context.output;
    if !(args.follow || args.wait) {
        output.message("SubmitTaskResponse", &response, |_| task.task_id.clone())?;
        if let Some(ms) = response.predicted_start_ms.filter(|_| output.is_text()) {
            let wait = super::text::duration(Duration::from_millis(ms));
            output.note(format!(
                "  place {} in the queue, start expected in {wait}",
                response.queue_position
            ));
        }
        output.next("follow", format_args!("baton follow {}", task.task_id));
        output.next("cancel", format_args!("baton task cancel {}", task.task_id));
        let waiting = diagnose::waiting(&client, &task.task_id, &model, Cancel::Command);
        if let Some(warning) = waiting.await {
            output.note(output.warning(warning));
        }
        return Ok(Exit::Ok);
    }
    output.note(output.dim(&format!("task {}", task.task_id)));
    if args.wait {
        return wait_for(context, &client, &[task.task_id], Until::Succeeded, Form::One).await;
    }
    attach(context, &client, &task.task_id, 1, &model).await
}

/// `follow`: attaches to a task.
pub async fn follow(context: &Context, args: &FollowArgs) -> Outcome {
    let client = context.client().await?;
    let task = get(&client, &args.task).await?;
    let from = match args.from.as_str() {
        "live" => live(&task),
        number => number.parse().map_err(|_| {
            Failure::usage(format!("--from `{number}` is neither a sequence nor `live`"))
        })?,
    };
    let model = task.spec.map(|spec| spec.model).unwrap_or_default();
    attach(context, &client, &task.task_id, from, &model).await
}

/// The last sequence on stable storage: a live reader starts there.
fn live(task: &pb::Task) -> u64 {
    task.last_sequence.max(1)
}

async fn get(client: &Client, id: &str) -> Outcome<pb::Task> {
    client.get_task(id).await.map_err(|error| {
        let failure = Failure::of_call(&format!("find task {id}"), &error);
        if failure.exit == Exit::NotFound {
            return failure.hint("see the latest tasks: baton task list");
        }
        failure
    })
}

/// Follows to the end; the first interrupt leaves the task alone, a second cancels it.
async fn attach(context: &Context, client: &Client, id: &str, from: u64, model: &str) -> Outcome {
    let output = &context.output;
    let mut interrupts = Interrupts::new()?;
    let mut printer = Printer::new(output, id);
    let mut follow = client.follow(id, from);
    if output.shows_progress() {
        follow = follow.with_metrics();
    }
    let watched = Watched { model, cancel: Cancel::Command };
    let stop = drive(context, client, &mut follow, &mut printer, &mut interrupts, watched)
        .await
        .inspect_err(|_| printer.broken_off())?;
    let next = follow.next_sequence();
    printer.clear();
    match stop {
        Stop::Ended => printer.finish(),
        Stop::TimedOut => {
            printer.fresh_line();
            Err(Failure::new(Exit::TimedOut, format!("timed out; task {id} goes on"))
                .hint(format!("go on watching: baton follow {id} --from {next}"))
                .hint(format!("cancel it: baton task cancel {id}")))
        }
        Stop::Interrupted => {
            printer.interrupted();
            output.note(format!("detached; task {id} goes on"));
            output.next("reattach", format_args!("baton follow {id} --from {next}"));
            output.next("cancel", format_args!("baton task cancel {id}  (or Ctrl-C again now)"));
            tokio::select! {
                () = tokio::time::sleep(SECOND_INTERRUPT) => {}
                () = interrupts.next() => {
                    client
                        .cancel(id, "cancelled from the terminal")
                        .await
                        .map_err(|e| Failure::of_call(&format!("cancel task {id}"), &e))?;
                    output.note(format!("task {id} is cancelled"));
                }
            }
            Ok(Exit::Interrupted)
        }
    }
}

/// Prints until the task ends, somebody interrupts, or the time is over.
async fn drive(
    context: &Context,
    client: &Client,
    follow: &mut Follow,
    printer: &mut Printer<'_>,
    interrupts: &mut Interrupts,
    watched: Watched<'_>,
) -> Outcome<Stop> {
    let mut time_out: Pin<Box<dyn Future<Output = ()>>> = match context.timeout {
        Some(timeout) => Box::pin(tokio::time::sleep(timeout)),
        None => Box::pin(std::future::pending()),
    };
    let mut look = Box::pin(tokio::time::sleep(EXPLAIN_AFTER));
    let mut warned = String::new();
    loop {
        let waits = !printer.has_started() && !printer.task_id().is_empty();
        tokio::select! {
            biased;
            () = interrupts.next() => return Ok(Stop::Interrupted),
            () = &mut time_out => return Ok(Stop::TimedOut),
            update = follow.next() => match update {
                Ok(None) => return Ok(Stop::Ended),
                Ok(Some(Update::Event(event))) => printer.event(&event)?,
                Ok(Some(Update::Reconnecting { error, next_sequence })) => {
                    if context.output.verbose > 0 || context.output.shows_progress() {
                        printer.say(&format!(
                            "connection lost ({}); going on at {next_sequence}", error.message()
                        ));
                    }
                }
                Err(error) => {
                    let doing = match printer.task_id() {
                        "" => "run the task".to_owned(),
                        id => format!("follow task {id}"),
                    };
                    return Err(Failure::of_call(&doing, &error));
                }
            },
            () = &mut look, if waits => {
                let Watched { model, cancel } = watched;
                let id = printer.task_id();
                if let Some(warning) = diagnose::waiting(client, id, model, cancel).await
                    && warning != warned
                {
                    printer.say(&context.output.warning(&warning));
                    warned = warning;
                }
                look.as_mut().reset(tokio::time::Instant::now() + EXPLAIN_EVERY);
            }
        }
    }
}

/// `wait`: waits for the end of tasks without their tokens.
pub async fn wait(context: &Context, args: &WaitArgs) -> Outcome {
    let client = context.client().await?;
    wait_for(context, &client, &args.tasks, args.until, Form::List).await
}

/// What a wait prints as one JSON document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// The task.
    One,
    /// A list, however many were named.
    List,
}

async fn wait_for(
    context: &Context,
    client: &Client,
    ids: &[String],
    until: Until,
    form: Form,
) -> Outcome {
    let mut interrupts = Interrupts::new()?;
    let all = async {
        let (mut worst, mut tasks) = (None, Vec::new());
        for id in ids {
            let task = ended(client, id).await?;
            let state = pb::TaskState::try_from(task.state).unwrap_or_default();
            if (context.output.format, form) != (Format::Json, Form::List) {
                print_ended(context, &task, ids.len() > 1)?;
            }
            if Exit::of_state(state) != Some(Exit::Ok) && worst.is_none() {
                worst = Some(ended_failure(id, state, task.error.as_ref()));
            }
            tasks.push(task);
        }
        if (context.output.format, form) == (Format::Json, Form::List) {
            context.output.changed(("Task", "tasks"), &tasks)?;
        }
        match worst.filter(|_| until == Until::Succeeded) {
            Some(failure) => Err(failure),
            None => Ok(Exit::Ok),
        }
    };
    let time_out = async {
        match context.timeout {
            Some(timeout) => tokio::time::sleep(timeout).await,
            None => std::future::pending().await,
        }
    };
    let ids_text = ids.join(" ");
    tokio::select! {
        outcome = all => outcome,
        () = time_out => Err(Failure::new(Exit::TimedOut, "timed out; at least one task goes on")
            .hint(format!("wait on: baton wait {ids_text}"))),
        () = interrupts.next() => {
            context.output.after_interrupt();
            context.output.note("no longer waiting; the tasks go on");
            context.output.next("wait on", format_args!("baton wait {ids_text}"));
            Ok(Exit::Interrupted)
        }
    }
}

/// Follows from the latest entry, so that few tokens travel.
async fn ended(client: &Client, id: &str) -> Outcome<pb::Task> {
    loop {
        let task = get(client, id).await?;
        let state = pb::TaskState::try_from(task.state).unwrap_or_default();
        if Exit::of_state(state).is_some() {
            return Ok(task);
        }
        let mut follow = client.follow(id, live(&task));
        while follow
            .next()
            .await
            .map_err(|e| Failure::of_call(&format!("wait for task {id}"), &e))?
            .is_some()
        {}
    }
}

fn print_ended(context: &Context, task: &pb::Task, several: bool) -> Outcome<()> {
    let output = &context.output;
    if !output.is_text() {
        return output.value(&json::of("Task", task)?);
    }
    if several {
        return output.line(format_args!("{} {}", task.task_id, super::text::state(task.state)));
    }
    match task.result.as_ref().filter(|result| !result.fields.is_empty()) {
        Some(result) => output.line(crate::json::text_from_struct(result)),
        None => Ok(()),
    }
}
