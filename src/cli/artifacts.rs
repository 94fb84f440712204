//! `artifact`: files put into the server's keeping and got back, with bars where a terminal is.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use clap::{Args, Subcommand};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

use super::{
    Context,
    exit::{Exit, Failure, Outcome},
    output::{Output, fields},
    tasks, text,
};
use crate::{
    client::{Client, Listener, Progress, TransferError},
    config::units,
    pb,
};

/// Commands of `artifact`.
#[derive(Subcommand, Clone, Debug)]
pub enum ArtifactCommand {
    /// Make artifacts of files; one that was cut off goes on where it was
    Put(PutArgs),
    /// Write the bytes of an artifact to a file, and check them
    Get(GetArgs),
    /// List artifacts, newest first
    List(ListArgs),
    /// Have the stored bytes read and compared with their digest
    Verify {
        /// Artifacts
        #[arg(required = true)]
        artifacts: Vec<String>,
    },
    /// Make a link that opens the bytes to whoever has it
    Share {
        /// Artifact
        artifact: String,
        /// The link works this long, at most 7d
        #[arg(long, value_parser = units::parse_duration, default_value = "1h")]
        ttl: Duration,
    },
    /// Delete artifacts
    Delete {
        /// Artifacts
        #[arg(required = true)]
        artifacts: Vec<String>,
    },
    /// Delete now what has expired and what nobody refers to; the server does so every minute
    Gc,
}

/// Arguments of `artifact put`.
#[derive(Args, Clone, Debug)]
pub struct PutArgs {
    /// Files; `-` is stdin, which cannot be resumed
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// Name; the file's own when absent
    #[arg(long)]
    name: Option<String>,
    /// Kind of content, such as `image`; the first half of the media type when absent
    #[arg(long, default_value = "")]
    r#type: String,
    /// Media type; guessed by the file's ending when absent
    #[arg(long)]
    mime_type: Option<String>,
    /// Deleted after this long
    #[arg(long, value_parser = units::parse_duration)]
    ttl: Option<Duration>,
}

/// Arguments of `artifact get`.
#[derive(Args, Clone, Debug)]
pub struct GetArgs {
    /// Artifact
    artifact: String,
    /// File or directory to write to, `-` for stdout; the artifact's name here when absent
    to: Option<PathBuf>,
    /// Replace a file that is there
    #[arg(short, long)]
    force: bool,
}

/// Arguments of `artifact list`.
#[derive(Args, Clone, Debug)]
pub struct ListArgs {
    /// Made by this task
    #[arg(long, default_value = "")]
    task: String,
    /// Of this type
    #[arg(long, default_value = "")]
    r#type: String,
    /// Of this name
    #[arg(long, default_value = "")]
    name: String,
    /// At most this many
    #[arg(long, default_value_t = 100)]
    limit: usize,
}

/// Runs a command of `artifact`.
pub async fn run(context: &Context, command: &ArtifactCommand) -> Outcome {
    let client = context.client().await?;
    match command {
        ArtifactCommand::Put(args) => put(context, &client, args).await,
        ArtifactCommand::Get(args) => get(context, &client, args).await,
        ArtifactCommand::List(args) => list(context, &client, args).await,
        ArtifactCommand::Verify { artifacts } => verify(context, &client, artifacts).await,
        ArtifactCommand::Share { artifact, ttl } => share(context, &client, artifact, *ttl).await,
        ArtifactCommand::Delete { artifacts } => delete(context, &client, artifacts).await,
        ArtifactCommand::Gc => collect(context, &client).await,
    }
}

/// A bar of bytes where there is a terminal, else nothing.
fn bar(output: &Output, what: &str, size: Option<u64>) -> ProgressBar {
    if !output.shows_progress() {
        return ProgressBar::hidden();
    }
    let bar = size.map_or_else(ProgressBar::no_length, ProgressBar::new);
    let template = match size {
        Some(_) => "{msg} {bar:30} {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}",
        None => "{msg} {spinner} {bytes} {binary_bytes_per_sec}",
    };
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.set_message(what.to_owned());
    bar
}

fn listener(bar: &ProgressBar, moving: &'static str) -> Listener {
    let bar = bar.clone();
    Arc::new(move |progress| match progress {
        Progress::Hashing(n) => {
            bar.set_prefix("reading");
            bar.set_position(n);
        }
        Progress::Moving(n) => {
            bar.set_prefix(moving);
            bar.set_position(n);
        }
    })
}

fn failed(doing: String) -> impl FnOnce(TransferError) -> Failure {
    move |error| match error {
        TransferError::Call(status) => Failure::of_call(&doing, &status),
        TransferError::File { .. } => {
            Failure::new(Exit::Usage, format!("cannot {doing}")).cause(error.to_string())
        }
        TransferError::Damaged(_) => {
            Failure::new(Exit::Unexpected, format!("cannot {doing}")).cause(error.to_string())
        }
    }
}

async fn put(context: &Context, client: &Client, args: &PutArgs) -> Outcome {
    let output = &context.output;
    if args.files.len() > 1 && args.name.is_some() {
        return Err(Failure::usage("--name names one file, and there are several"));
    }
    for path in &args.files {
        let stdin = path.as_os_str() == "-";
        let own = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let name = match (&args.name, stdin) {
            (Some(name), _) => name.clone(),
            (None, true) => {
                return Err(Failure::usage("stdin has no name").hint("give it one: --name <name>"));
            }
            (None, false) => own,
        };
        let guessed = || mime_guess::from_path(&name).first_raw().unwrap_or_default().to_owned();
        let spec = pb::ArtifactSpec {
            mime_type: args.mime_type.clone().unwrap_or_else(guessed),
            r#type: args.r#type.clone(),
            ttl: args.ttl.map(text::duration_to_proto),
            name: name.clone(),
            ..pb::ArtifactSpec::default()
        };
        let size = std::fs::metadata(path).ok().map(|metadata| metadata.len());
        let bar = bar(output, &name, size.filter(|_| !stdin));
        let heard = listener(&bar, "sending");
        let made = if stdin {
            client.put_stream(tokio::io::stdin(), spec, heard).await
        } else {
            client.put_file(path, spec, heard).await
        };
        bar.finish_and_clear();
        let made = made.map_err(failed(format!("put {}", path.display())))?;
        output.message("Artifact", &made, |made| made.artifact_id.clone())?;
        let bytes = HumanBytes(made.size_bytes).to_string();
        output.note(format!("{name}: {bytes}, sha256 {}", made.sha256));
        output.next("get it", format_args!("baton artifact get {}", made.artifact_id));
    }
    Ok(Exit::Ok)
}

async fn find(client: &Client, id: &str) -> Outcome<pb::Artifact> {
    let found = client.repeat(|| {
        let mut artifacts = client.artifacts();
        let request = pb::GetArtifactRequest { artifact_id: id.to_owned() };
        async move { artifacts.get_artifact(request).await }
    });
    found.await.map_err(|error| Failure::of_call(&format!("find artifact {id}"), &error))
}

async fn get(context: &Context, client: &Client, args: &GetArgs) -> Outcome {
    let output = &context.output;
    let artifact = find(client, &args.artifact).await?;
    let doing = format!("get artifact {}", args.artifact);
    if args.to.as_deref() == Some(Path::new("-")) {
        let mut pieces = client.fetch(&artifact, 0);
        let mut stdout = std::io::stdout().lock();
        while let Some(piece) =
            pieces.next().await.map_err(|error| Failure::of_call(&doing, &error))?
        {
            stdout.write_all(&piece).map_err(|error| super::output::broken(&error))?;
        }
        stdout.flush().map_err(|error| super::output::broken(&error))?;
        return Ok(Exit::Ok);
    }
    // A server that names a file elsewhere is not followed.
    let name = Path::new(&artifact.name).file_name().unwrap_or(artifact.artifact_id.as_ref());
    let path = match &args.to {
        None => PathBuf::from(name),
        Some(to) if to.is_dir() => to.join(name),
        Some(to) => to.clone(),
    };
    if path.exists() && !args.force {
        let message = format!("{} is there already", path.display());
        return Err(Failure::new(Exit::Conflict, message)
            .hint("replace it with --force, or name another file"));
    }
    let bar = bar(output, &artifact.name, Some(artifact.size_bytes));
    let heard = listener(&bar, "receiving");
    let got = client.get_file(&artifact, &path, heard).await;
    bar.finish_and_clear();
    got.map_err(failed(doing))?;
    output.message("Artifact", &artifact, |_| path.display().to_string())?;
    let bytes = HumanBytes(artifact.size_bytes).to_string();
    output.note(format!("{bytes}, sha256 {} as it should be", artifact.sha256));
    Ok(Exit::Ok)
}

async fn list(context: &Context, client: &Client, args: &ListArgs) -> Outcome {
    let mut all = Vec::new();
    let mut request = pb::ListArtifactsRequest {
        page_size: i32::try_from(args.limit.min(1_000)).unwrap_or(1_000),
        page_token: String::new(),
        task_id: args.task.clone(),
        r#type: args.r#type.clone(),
        name: args.name.clone(),
    };
    while all.len() < args.limit {
        let page = client
            .repeat(|| {
                let (mut artifacts, request) = (client.artifacts(), request.clone());
                async move { artifacts.list_artifacts(request).await }
            })
            .await
            .map_err(|error| Failure::of_call("list artifacts", &error))?;
        all.extend(page.artifacts);
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    all.truncate(args.limit);
    let headers = ["artifact", "name", "type", "size", "age", "expires", "task"];
    let row = |artifact: &pb::Artifact| {
        vec![
            artifact.artifact_id.clone(),
            artifact.name.clone(),
            artifact.mime_type.clone(),
            HumanBytes(artifact.size_bytes).to_string(),
            text::age(artifact.create_time, &context.clock),
            artifact.expires_at.map(|time| text::time(Some(time))).unwrap_or_default(),
            artifact.task_id.clone(),
        ]
    };
    context.output.list(("Artifact", "artifacts"), &all, &headers, row)?;
    Ok(Exit::Ok)
}

async fn verify(context: &Context, client: &Client, artifacts: &[String]) -> Outcome {
    let mut exit = Exit::Ok;
    for id in artifacts {
        let request = pb::VerifyArtifactRequest { artifact_id: id.clone() };
        // Reading a large artifact takes longer than other calls.
        let verified = client.artifacts().verify_artifact(request).await;
        let verified = verified
            .map_err(|error| Failure::of_call(&format!("verify artifact {id}"), &error))?
            .into_inner();
        if !verified.intact {
            exit = Exit::Unexpected;
        }
        context.output.message("VerifyArtifactResponse", &verified, |verified| {
            let state = if verified.intact { "intact" } else { "DAMAGED" };
            fields(&[
                ("artifact", id.clone()),
                ("state", state.to_owned()),
                ("size", HumanBytes(verified.size_bytes).to_string()),
                ("sha256", verified.sha256.clone()),
            ])
        })?;
    }
    Ok(exit)
}

async fn share(context: &Context, client: &Client, id: &str, ttl: Duration) -> Outcome {
    let request = pb::ShareArtifactRequest {
        artifact_id: id.to_owned(),
        ttl: Some(text::duration_to_proto(ttl)),
    };
    let mut shared = client
        .once(client.artifacts().share_artifact(request))
        .await
        .map_err(|error| Failure::of_call(&format!("share artifact {id}"), &error))?;
    if shared.url.starts_with('/') {
        shared.url.insert_str(0, context.address().trim_end_matches('/'));
    }
    context.output.message("ShareArtifactResponse", &shared, |shared| shared.url.clone())?;
    context.output.note(format!("works until {}", text::time(shared.expire_time)));
    Ok(Exit::Ok)
}

async fn delete(context: &Context, client: &Client, artifacts: &[String]) -> Outcome {
    let output = &context.output;
    output.confirm(&format!("Delete {}?", text::count(artifacts.len() as u64, "artifact")))?;
    for id in artifacts {
        let deleted = client.repeat(|| {
            let mut artifacts = client.artifacts();
            let request = pb::DeleteArtifactRequest { artifact_id: id.clone() };
            async move { artifacts.delete_artifact(request).await }
        });
        let deleted = deleted
            .await
            .map_err(|error| Failure::of_call(&format!("delete artifact {id}"), &error))?;
        tasks::changed(output, "DeleteArtifactResponse", &deleted)?;
        output.note(format!("artifact {id} is deleted"));
    }
    Ok(Exit::Ok)
}

async fn collect(context: &Context, client: &Client) -> Outcome {
    let collected = client.artifacts().collect_artifacts(pb::CollectArtifactsRequest {}).await;
    let collected =
        collected.map_err(|error| Failure::of_call("collect artifacts", &error))?.into_inner();
    context.output.message("CollectArtifactsResponse", &collected, |collected| {
        fields(&[
            ("artifacts", collected.artifacts.to_string()),
            ("uploads", collected.uploads.to_string()),
            ("files", collected.files.to_string()),
            ("bytes", HumanBytes(collected.bytes).to_string()),
        ])
    })?;
    Ok(Exit::Ok)
}
