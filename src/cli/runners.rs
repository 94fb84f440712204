//! `runner list|get` and the commands that connected runners are given: `drain`, `pause`,
//! `resume`, `apply`, `reload`, `tune`.

use std::{fmt::Write as _, time::Duration};

use clap::{Args, ValueEnum};
use prost_types::Struct;

use super::{
    Context,
    exit::{Exit, Failure, Outcome},
    input,
    output::fields,
    text,
};
use crate::{
    client::Client,
    config::units,
    json,
    pb::{self, when_busy::Policy},
};

/// What a call may take beyond the time that the runner was given.
const MARGIN: Duration = Duration::from_mins(10);

/// Lists runners.
pub async fn list(context: &Context) -> Outcome {
    let client = context.client().await?;
    let mut all = Vec::new();
    let mut request = pb::ListRunnersRequest { page_size: 1_000, ..Default::default() };
    loop {
        let page = client
            .repeat(|| {
                let (mut runners, request) = (client.runners(), request.clone());
                async move { runners.list_runners(request).await }
            })
            .await
            .map_err(|error| Failure::of_call("list runners", &error))?;
        all.extend(page.runners);
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    let headers = ["runner", "state", "engine", "models", "slots", "free", "running", "heard"];
    context.output.list(("Runner", "runners"), &all, &headers, |runner| {
        vec![
            runner.runner_id.clone(),
            runner_state(runner).into(),
            runner.engine.clone(),
            runner.models.join(","),
            runner.slots.to_string(),
            runner.free_slots.to_string(),
            runner.attempts.len().to_string(),
            text::age(runner.last_heartbeat_time, &context.clock),
        ]
    })?;
    if all.is_empty() {
        context.output.next("start one", "baton runner start --engine ngram");
    }
    Ok(Exit::Ok)
}

fn runner_state(runner: &pb::Runner) -> &'static str {
    runner.state().as_str_name().trim_start_matches("STATE_")
}

/// Shows a runner.
pub async fn get(context: &Context, id: &str) -> Outcome {
    let client = context.client().await?;
    let request = pb::GetRunnerRequest { runner_id: id.to_owned() };
    let runner = client
        .repeat(|| {
            let (mut runners, request) = (client.runners(), request.clone());
            async move { runners.get_runner(request).await }
        })
        .await
        .map_err(|error| runner_failure("find", id, &error))?;
    context.output.message("Runner", &runner, |runner| {
        let node = runner.node.clone().unwrap_or_default();
        let gpus: Vec<String> = node
            .gpus
            .iter()
            .map(|gpu| format!("{} ({} GiB)", gpu.name, gpu.memory_bytes >> 30))
            .collect();
        let mut lines = fields(&[
            ("runner", runner.runner_id.clone()),
            ("state", runner_state(runner).into()),
            ("engine", format!("{} {}", runner.engine, runner.engine_version)),
            ("models", runner.models.join(", ")),
            ("labels", text::labels(&runner.labels)),
            ("pools", runner.pools.join(", ")),
            ("slots", format!("{}, {} free", runner.slots, runner.free_slots)),
            (
                "node",
                format!("{}, {} CPUs, {} GiB", node.node_id, node.cpus, node.memory_bytes >> 30),
            ),
            ("load", format!("{:.2}", runner.load)),
            ("gpus", if gpus.is_empty() { "none".into() } else { gpus.join(", ") }),
            ("agent", runner.agent_version.clone()),
            ("understands", runner.features.join(", ")),
            (
                "tuned",
                runner
                    .engine_params
                    .as_ref()
                    .map(json::text_from_struct)
                    .filter(|text| text != "{}")
                    .unwrap_or_default(),
            ),
            ("connected", text::time(runner.connect_time)),
            ("heard", format!("{} ago", text::age(runner.last_heartbeat_time, &context.clock))),
            ("reconnects", runner.reconnects.to_string()),
        ]);
        for attempt in &runner.attempts {
            let age = text::age(attempt.start_time, &context.clock);
            let _ =
                writeln!(lines, "  task {} attempt {} for {age}", attempt.task_id, attempt.attempt);
        }
        for attempt in &runner.stopping {
            let age = text::age(attempt.cancel_time, &context.clock);
            let overdue = if attempt.overdue { ", overdue" } else { "" };
            let _ = writeln!(
                lines,
                "  task {} attempt {} stopping for {age}{overdue}",
                attempt.task_id, attempt.attempt
            );
        }
        for command in &runner.commands {
            let _ = writeln!(lines, "  {}", describe_command(command));
        }
        lines
    })?;
    Ok(Exit::Ok)
}

fn runner_failure(verb: &str, id: &str, error: &tonic::Status) -> Failure {
    let failure = Failure::of_call(&format!("{verb} runner {id}"), error);
    if failure.exit == Exit::NotFound {
        return failure.hint("see the connected ones: baton runner list");
    }
    failure
}

/// A command in one line: what it asks for, how far it is.
fn describe_command(command: &pb::RunnerCommand) -> String {
    let mut line = command.action.clone();
    if !command.model.is_empty() {
        let _ = write!(line, " {}", command.model);
    }
    let state = command.state().as_str_name().trim_start_matches("STATE_");
    let _ = write!(line, ": {state}");
    if command.total > 0 && command.end_time.is_none() {
        let _ = write!(line, ", {} of {} {}", command.done, command.total, command.detail);
    }
    if let Some(error) = &command.error {
        let _ = write!(line, ", {}", error.message);
    }
    line
}

/// Arguments of `runner drain`.
#[derive(Args, Clone, Debug)]
pub struct DrainArgs {
    /// Runner
    runner: String,
    /// Attempts still held by then are handed back
    #[arg(long, value_parser = units::parse_duration, default_value = "5m")]
    deadline: Duration,
    /// Hand back at once instead of finishing
    #[arg(long)]
    hand_back: bool,
    /// Ask the runner to exit when done
    #[arg(long)]
    exit: bool,
    /// Wait until the runner holds nothing any more
    #[arg(long)]
    wait: bool,
}

/// What becomes of attempts that are in a command's way.
#[derive(Args, Clone, Debug)]
pub struct BusyArgs {
    /// What becomes of attempts that are in the way
    #[arg(long, value_enum, default_value = "wait", value_name = "POLICY")]
    when_busy: PolicyName,
    /// With --when-busy wait: attempts still running by then are handed back
    #[arg(long, value_parser = units::parse_duration, default_value = "5m")]
    deadline: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum PolicyName {
    /// They may finish until the deadline
    Wait,
    /// The command is refused
    Refuse,
    /// They are handed back at once
    HandBack,
}

impl BusyArgs {
    fn to_proto(&self) -> pb::WhenBusy {
        let (policy, deadline) = match self.when_busy {
            PolicyName::Wait => (Policy::Wait, Some(text::duration_to_proto(self.deadline))),
            PolicyName::Refuse => (Policy::Refuse, None),
            PolicyName::HandBack => (Policy::HandBack, None),
        };
        pb::WhenBusy { policy: policy.into(), deadline }
    }
}

/// Arguments of `runner apply`.
#[derive(Args, Clone, Debug)]
pub struct ApplyArgs {
    /// Runner
    runner: String,
    /// Model as owner/name or owner/name@version; * for every model
    model: String,
    /// Unload it instead
    #[arg(long, conflicts_with = "option")]
    unload: bool,
    /// Option of the engine: k=v, k=@file for a file's text, k=- for stdin, k:=json for other types
    #[arg(short = 'i', long, value_name = "K=V")]
    option: Vec<String>,
    #[command(flatten)]
    busy: BusyArgs,
}

/// Arguments of `runner reload`.
#[derive(Args, Clone, Debug)]
pub struct ReloadArgs {
    /// Runner
    runner: String,
    /// Model, as the runner announces it; all when absent
    model: Option<String>,
    #[command(flatten)]
    busy: BusyArgs,
}

/// Arguments of `runner tune`.
#[derive(Args, Clone, Debug)]
pub struct TuneArgs {
    /// Runner
    runner: String,
    /// Parameter, k=v; numbers, true, false and JSON are read as such, null takes one back
    #[arg(required = true, value_name = "K=V")]
    params: Vec<String>,
}

/// Drains a runner.
pub async fn drain(context: &Context, args: &DrainArgs) -> Outcome {
    let client = patient(context, args.wait.then_some(args.deadline)).await?;
    let request = pb::DrainRunnerRequest {
        runner_id: args.runner.clone(),
        deadline: Some(text::duration_to_proto(args.deadline)),
        hand_back: args.hand_back,
        exit: args.exit,
        wait: args.wait,
        request_id: client.request_id(),
    };
    let mut runners = client.runners();
    let request = client.timed(request);
    client
        .once(async move { runners.drain_runner(request).await })
        .await
        .map_err(|error| runner_failure("drain", &args.runner, &error))?;
    if !context.output.is_text() {
        context.output.value(&serde_json::json!({}))?;
    }
    if args.wait {
        context.output.note(format!("runner {} has drained", args.runner));
    } else {
        context.output.note(format!("runner {} takes no more work", args.runner));
        context.output.next("watch it", format_args!("baton runner get {}", args.runner));
    }
    if !args.exit {
        context.output.next("go on", format_args!("baton runner resume {}", args.runner));
    }
    Ok(Exit::Ok)
}

/// Pauses a runner.
pub async fn pause(context: &Context, id: &str) -> Outcome {
    let client = patient(context, None).await?;
    let request_id = client.request_id();
    let request = client.timed(pb::PauseRunnerRequest { runner_id: id.into(), request_id });
    let mut runners = client.runners();
    let answered = client.once(async move { runners.pause_runner(request).await }).await;
    done(context, ("pause", id), answered, "takes no work; what it has goes on")?;
    context.output.next("go on", format_args!("baton runner resume {id}"));
    Ok(Exit::Ok)
}

/// Has a runner take work again.
pub async fn resume(context: &Context, id: &str) -> Outcome {
    let client = patient(context, None).await?;
    let request_id = client.request_id();
    let request = client.timed(pb::ResumeRunnerRequest { runner_id: id.into(), request_id });
    let mut runners = client.runners();
    let answered = client.once(async move { runners.resume_runner(request).await }).await;
    done(context, ("resume", id), answered, "takes work again")
}

/// Loads or unloads a model.
pub async fn apply(context: &Context, args: &ApplyArgs) -> Outcome {
    if args.model != "*" {
        input::check_model(&args.model)?;
    }
    let client = patient(context, Some(args.busy.deadline)).await?;
    let state = if args.unload { pb::apply::State::Unloaded } else { pb::apply::State::Loaded };
    let request = client.timed(pb::ApplyModelRequest {
        runner_id: args.runner.clone(),
        model: args.model.clone(),
        state: state.into(),
        options: Some(input::options("-i", &args.option)?),
        when_busy: Some(args.busy.to_proto()),
        request_id: client.request_id(),
    });
    let mut runners = client.runners();
    let answered = client.once(async move { runners.apply_model(request).await }).await;
    let (model, runner) = (&args.model, args.runner.as_str());
    let verb = if args.unload { "serves no more" } else { "serves" };
    done(context, ("apply a model to", runner), answered, &format!("{verb} {model}"))
}

/// Loads anew what is loaded.
pub async fn reload(context: &Context, args: &ReloadArgs) -> Outcome {
    let client = patient(context, Some(args.busy.deadline)).await?;
    let request = client.timed(pb::ReloadRunnerRequest {
        runner_id: args.runner.clone(),
        model: args.model.clone().unwrap_or_default(),
        when_busy: Some(args.busy.to_proto()),
        request_id: client.request_id(),
    });
    let mut runners = client.runners();
    let answered = client.once(async move { runners.reload_runner(request).await }).await;
    done(context, ("reload", &args.runner), answered, "has loaded anew")
}

/// Sets parameters of the engine.
pub async fn tune(context: &Context, args: &TuneArgs) -> Outcome {
    let client = patient(context, None).await?;
    let params: Struct = json::struct_from_map(input::parameters("tune", &args.params)?);
    let request = client.timed(pb::TuneRunnerRequest {
        runner_id: args.runner.clone(),
        params: Some(params),
        request_id: client.request_id(),
    });
    let mut runners = client.runners();
    let answered = client.once(async move { runners.tune_runner(request).await }).await;
    done(context, ("tune", &args.runner), answered, "is tuned")
}

/// A client that waits for an answer as long as the runner may take, unless `--timeout` says.
async fn patient(context: &Context, runner_takes: Option<Duration>) -> Outcome<Client> {
    let client = context.client().await?;
    Ok(match (context.timeout, runner_takes) {
        (None, Some(takes)) => client.with_timeout(takes + MARGIN),
        (Some(_), _) | (None, None) => client,
    })
}

fn done(
    context: &Context,
    (verb, id): (&str, &str),
    answered: Result<pb::Runner, tonic::Status>,
    now: &str,
) -> Outcome {
    let runner = answered.map_err(|error| runner_failure(verb, id, &error))?;
    super::tasks::changed(&context.output, "Runner", &runner)?;
    context.output.note(format!("runner {id} {now}"));
    context.output.next("see it", format_args!("baton runner get {id}"));
    Ok(Exit::Ok)
}
