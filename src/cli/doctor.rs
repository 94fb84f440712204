//! `doctor`: one look at everything that usually goes wrong, with what to do about it.

use clap::Args;
use serde_json::json;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use super::{
    Context, diagnose,
    exit::{Exit, Outcome},
    parts,
    server::ConfigArgs,
    text,
};
use crate::{agent, client::Client, config::Config, pb};

/// Arguments of `doctor`.
#[derive(Args, Clone, Debug)]
pub struct DoctorArgs {
    #[command(flatten)]
    config: ConfigArgs,
}

/// How a check went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mark {
    Good,
    Note,
    Bad,
}

pub(super) struct Check {
    name: &'static str,
    mark: Mark,
    found: String,
    hint: Option<String>,
}

/// A check that was made.
pub(super) fn check(
    name: &'static str,
    mark: Mark,
    found: impl Into<String>,
    hint: Option<String>,
) -> Check {
    Check { name, mark, found: found.into(), hint }
}

/// Runs all checks; the exit code says whether one failed.
pub async fn run(context: &Context, args: &DoctorArgs) -> Outcome {
    let mut checks = Vec::new();
    let mut exit = Exit::Ok;
    let config = configuration(args, &mut checks);
    machine(&mut checks).await;
    let client = connection(context, &mut checks, &mut exit).await;
    if let Some(client) = &client {
        server(client, &mut checks, &mut exit).await;
    }
    if let Some(config) = &config {
        parts::look(context, config, client.is_some(), &mut checks).await;
    }
    if exit == Exit::Ok && checks.iter().any(|check| check.mark == Mark::Bad) {
        exit = Exit::Unexpected;
    }
    print(context, &checks)?;
    Ok(exit)
}

fn configuration(args: &DoctorArgs, checks: &mut Vec<Check>) -> Option<Config> {
    let loaded = match args.config.load() {
        Ok(loaded) => {
            let n_set = loaded
                .entries
                .iter()
                .filter(|entry| entry.origin != crate::config::Origin::Default)
                .count();
            checks.push(check(
                "configuration",
                Mark::Good,
                match n_set {
                    0 => "valid, all defaults".to_owned(),
                    n => format!("valid, {} set", text::count(n as u64, "value")),
                },
                None,
            ));
            Some(loaded.config)
        }
        Err(failure) => {
            checks.push(check(
                "configuration",
                Mark::Bad,
                failure.message,
                failure.hints.first().cloned(),
            ));
            None
        }
    };
    let proxies: Vec<String> =
        ["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"]
            .iter()
            .filter(|name| std::env::var_os(name).is_some_and(|value| !value.is_empty()))
            .map(|name| (*name).to_owned())
            .collect();
    if !proxies.is_empty() {
        checks.push(check(
            "proxy",
            Mark::Note,
            format!("{} is set; baton connects directly and does not use it", proxies.join(", ")),
            None,
        ));
    }
    loaded
}

async fn machine(checks: &mut Vec<Check>) {
    let gpus = agent::gpus().await;
    let found = if gpus.is_empty() {
        "none found (nvidia-smi is absent or reports none)".to_owned()
    } else {
        gpus.iter()
            .map(|gpu| format!("{} ({} GiB)", gpu.name, gpu.memory_bytes >> 30))
            .collect::<Vec<_>>()
            .join(", ")
    };
    let mark = if gpus.is_empty() { Mark::Note } else { Mark::Good };
    checks.push(check("GPUs here", mark, found, None));
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let most = limit.maximum.unwrap_or(u64::MAX);
    if most < 4_096 {
        checks.push(check(
            "open files",
            Mark::Note,
            format!("this user may open {most} files, so a server here takes fewer connections"),
            Some("raise it: ulimit -Hn 65536, or LimitNOFILE= in the service".into()),
        ));
    }
}

async fn connection(context: &Context, checks: &mut Vec<Check>, exit: &mut Exit) -> Option<Client> {
    match context.client().await {
        Ok(client) => {
            checks.push(check("connection", Mark::Good, context.address(), None));
            Some(client)
        }
        Err(failure) => {
            *exit = failure.exit;
            let found = match failure.causes.first() {
                Some(cause) => format!("{}: {cause}", failure.message),
                None => failure.message,
            };
            checks.push(check("connection", Mark::Bad, found, failure.hints.first().cloned()));
            None
        }
    }
}

async fn server(client: &Client, checks: &mut Vec<Check>, exit: &mut Exit) {
    let mut health = HealthClient::new(client.channel());
    let request = HealthCheckRequest { service: String::new() };
    match client.once(health.check(request)).await {
        Ok(answer) if answer.status() == ServingStatus::Serving => {
            checks.push(check("health", Mark::Good, "serving", None));
        }
        Ok(answer) => {
            *exit = Exit::Unreachable;
            let found = answer.status().as_str_name().to_lowercase().replace('_', " ");
            let hint = "the server starts, drains, or has lost its storage; see its log".into();
            checks.push(check("health", Mark::Bad, found, Some(hint)));
        }
        Err(error) => {
            *exit = Exit::Unreachable;
            let failure = super::exit::Failure::of_call("ask for its health", &error);
            // It would name this very command otherwise.
            let of_tls = failure.hints.into_iter().find(|hint| hint.contains("--"));
            let hint = of_tls.unwrap_or_else(|| "is this the address of a baton server?".into());
            checks.push(check("health", Mark::Bad, failure.message, Some(hint)));
            return;
        }
    }
    let mut tasks = client.tasks();
    let request = pb::ListTasksRequest { page_size: 1, ..Default::default() };
    match client.once(tasks.list_tasks(request)).await {
        Ok(_) => checks.push(check("credential", Mark::Good, "may read tasks", None)),
        Err(error) => {
            let failure = super::exit::Failure::of_call("read tasks", &error);
            *exit = failure.exit;
            checks.push(check(
                "credential",
                Mark::Bad,
                failure.message,
                failure.hints.first().cloned(),
            ));
            return;
        }
    }
    let models = diagnose::models(client).await;
    if models.is_empty() {
        let hint = "start one: baton runner start --engine ngram".into();
        checks.push(check("runners", Mark::Note, "none is connected; tasks will wait", Some(hint)));
    } else {
        checks.push(check("runners", Mark::Good, format!("serve {}", models.join(", ")), None));
    }
}

fn print(context: &Context, checks: &[Check]) -> Outcome<()> {
    let output = &context.output;
    if !output.is_text() {
        let checks: Vec<_> = checks
            .iter()
            .map(|check| {
                let mark = match check.mark {
                    Mark::Good => "ok",
                    Mark::Note => "note",
                    Mark::Bad => "failed",
                };
                json!({ "check": check.name, "outcome": mark, "found": check.found, "hint": check.hint })
            })
            .collect();
        return output.value(&json!({ "checks": checks }));
    }
    for check in checks {
        let mark = match check.mark {
            Mark::Good => "ok    ",
            Mark::Note => "note  ",
            Mark::Bad => "FAILED",
        };
        output.line(format_args!("{mark}  {:<14} {}", check.name, check.found))?;
        if let Some(hint) = &check.hint {
            output.line(format_args!("        hint: {hint}"))?;
        }
    }
    Ok(())
}
