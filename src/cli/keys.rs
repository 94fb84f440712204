//! `key`: who may call.

use std::{path::PathBuf, time::Duration};

use clap::{Subcommand, ValueEnum};

use super::{
    Context,
    exit::{Exit, Failure, Outcome},
    server, tasks, text,
};
use crate::{config::units, pb};

/// What a key may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ScopeName {
    /// Read and watch tasks and queues
    #[value(name = "tasks.read")]
    TasksRead,
    /// Submit, cancel, retry and delete tasks
    #[value(name = "tasks.write")]
    TasksWrite,
    /// Connect as a runner
    Runner,
    /// List, read and share artifacts
    #[value(name = "artifacts.read")]
    ArtifactsRead,
    /// Upload and delete artifacts
    #[value(name = "artifacts.write")]
    ArtifactsWrite,
    /// Everything in its namespace
    Admin,
}

impl ScopeName {
    fn proto(self) -> pb::Scope {
        match self {
            Self::TasksRead => pb::Scope::TasksRead,
            Self::TasksWrite => pb::Scope::TasksWrite,
            Self::Runner => pb::Scope::Runner,
            Self::ArtifactsRead => pb::Scope::ArtifactsRead,
            Self::ArtifactsWrite => pb::Scope::ArtifactsWrite,
            Self::Admin => pb::Scope::Admin,
        }
    }
}

/// Commands of `key`.
#[derive(Subcommand, Clone, Debug)]
pub enum KeyCommand {
    /// Make a key; its secret is printed this once, on stdout
    Create {
        /// Name for people
        #[arg(long)]
        name: String,
        /// What it may do; may be given several times
        #[arg(long, value_enum, required = true)]
        scope: Vec<ScopeName>,
        /// Lives this long; for ever when absent
        #[arg(long, value_parser = units::parse_duration)]
        ttl: Option<Duration>,
        /// Namespace of the key; yours when absent
        #[arg(long, default_value = "")]
        namespace: String,
        /// Write the secret to this file, readable by you alone, instead of stdout
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
    },
    /// List keys, without their secrets
    List,
    /// Revoke a key for good
    Revoke {
        /// Key id, as `key list` shows it
        key: String,
    },
    /// Issue a token that opens one task for reading for some minutes
    IssueToken {
        /// Task
        task: String,
        /// Lives this long, at most 1h
        #[arg(long, value_parser = units::parse_duration, default_value = "10m")]
        ttl: Duration,
    },
}

/// Runs a command of `key`.
pub async fn key(context: &Context, command: &KeyCommand) -> Outcome {
    let client = context.client().await?;
    let output = &context.output;
    let mut keys = client.keys();
    match command {
        KeyCommand::Create { name, scope, ttl, namespace, out } => {
            let request = pb::CreateKeyRequest {
                display_name: name.clone(),
                scopes: scope.iter().map(|scope| scope.proto() as i32).collect(),
                ttl: ttl.map(text::duration_to_proto),
                namespace: namespace.clone(),
            };
            let mut made = client
                .once(keys.create_key(request))
                .await
                .map_err(|error| Failure::of_call("make the key", &error))?;
            if let Some(path) = out {
                server::write_secret(path, &made.secret)?;
                made.secret.clear();
            }
            let id = made.key.clone().unwrap_or_default().key_id;
            if let Some(path) = out {
                output.note(format!("key {id} is in {}", path.display()));
                output.next(
                    "use it",
                    format_args!("baton --api-key-file {} task list", path.display()),
                );
                tasks::changed(output, "CreateKeyResponse", &made)?;
            } else {
                output.message("CreateKeyResponse", &made, |made| made.secret.clone())?;
                output.note(format!("key {id}; the secret is shown this once"));
            }
            output.next("revoke it", format_args!("baton key revoke {id}"));
        }
        KeyCommand::List => {
            let mut all = Vec::new();
            let mut request = pb::ListKeysRequest { page_size: 1_000, ..Default::default() };
            loop {
                let page = client
                    .once(keys.list_keys(request.clone()))
                    .await
                    .map_err(|error| Failure::of_call("list keys", &error))?;
                all.extend(page.keys);
                if page.next_page_token.is_empty() {
                    break;
                }
                request.page_token = page.next_page_token;
            }
            let headers = ["key", "name", "namespace", "scopes", "age", "last used", "state"];
            output.list(("Key", "keys"), &all, &headers, |key| key_row(key, context))?;
        }
        KeyCommand::Revoke { key } => {
            output.confirm(&format!("Revoke key {key} for good?"))?;
            let request = pb::RevokeKeyRequest { key_id: key.clone() };
            let revoked = client
                .once(keys.revoke_key(request))
                .await
                .map_err(|error| Failure::of_call(&format!("revoke key {key}"), &error))?;
            tasks::changed(output, "Key", &revoked)?;
            output.note(format!("key {key} ({}) is revoked", revoked.display_name));
            output.next("see what is left", "baton key list");
        }
        KeyCommand::IssueToken { task, ttl } => {
            let request = pb::IssueTokenRequest {
                task_id: task.clone(),
                ttl: Some(text::duration_to_proto(*ttl)),
            };
            let issued = client
                .once(keys.issue_token(request))
                .await
                .map_err(|error| Failure::of_call("issue the token", &error))?;
            output.message("IssueTokenResponse", &issued, |issued| issued.token.clone())?;
            output.note(format!("valid until {}", text::time(issued.expire_time)));
        }
    }
    Ok(Exit::Ok)
}

fn key_row(key: &pb::Key, context: &Context) -> Vec<String> {
    let now = context.clock.now();
    let state = match (key.revoke_time, key.expire_time) {
        (Some(_), _) => "revoked",
        (None, Some(end)) if text::micros(end) <= now => "expired",
        (None, _) => "valid",
    };
    let scopes: Vec<String> = key
        .scopes()
        .map(|scope| {
            scope.as_str_name().trim_start_matches("SCOPE_").to_lowercase().replace('_', ".")
        })
        .collect();
    vec![
        key.key_id.clone(),
        key.display_name.clone(),
        key.namespace.clone(),
        scopes.join(","),
        text::age(key.create_time, &context.clock),
        text::age(key.last_used_time, &context.clock),
        state.into(),
    ]
}
