//! Files that come with a form: kept as artifacts, and given to a job if the form names a model.

use axum::{
    body::Bytes,
    extract::{
        Multipart,
        multipart::{Field, MultipartError},
    },
    response::{IntoResponse as _, Response},
};
use futures_util::{Stream, StreamExt as _, future, stream};
use http::StatusCode;
use serde_json::{Map, Value, json};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::{super::wire::InProcess, job::Job, refusal::Refusal, request};
use crate::pb::{self, upload_artifact_request::Part};

/// The field of a form that is the file.
const FILE: &str = "file";
/// Longest field that is none.
const MAX_FIELD: usize = 64 << 10;
/// Bytes in one message.
const PIECE: usize = 256 << 10;

/// Keeps the file of a form. With a `model_id` among the fields it is the input of a job, as
/// `file`; the fields are those of a job, `payload` and `options` as JSON.
pub async fn take(client: InProcess, mut form: Multipart) -> Result<Response, Refusal> {
    let (mut artifact, mut fields) = (None, Map::new());
    while let Some(field) = form.next_field().await? {
        let name = field.name().unwrap_or_default().to_owned();
        if name != FILE {
            fields.insert(name.clone(), value(&name, field).await?);
        } else if artifact.replace(store(&client, field).await?).is_some() {
            return Err(Refusal::bad("file: is there twice; send a form for each"));
        }
    }
    let artifact = artifact.ok_or_else(|| Refusal::bad("file: is required, with a file name"))?;
    let kept = json!({
        "artifact_id": artifact.artifact_id,
        "name": artifact.name,
        "mime_type": artifact.mime_type,
        "size_bytes": artifact.size_bytes,
        "sha256": artifact.sha256,
        "url": artifact.url,
    });
    if fields.is_empty() {
        return Ok((StatusCode::CREATED, axum::Json(kept)).into_response());
    }
    let payload = fields.entry("payload").or_insert_with(|| json!({}));
    let payload = payload.as_object_mut();
    let payload = payload.ok_or_else(|| Refusal::bad("payload: must be a JSON object"))?;
    payload.insert(FILE.to_owned(), json!({"$artifact": artifact.artifact_id}));
    let accepted = client.tasks().submit_task(request::submit(fields)?).await?.into_inner();
    let task = accepted.task.unwrap_or_default();
    let mut job = Job { task: &task, position: accepted.queue_position, stage: None }.status_json();
    job[FILE] = kept;
    Ok((StatusCode::ACCEPTED, axum::Json(job)).into_response())
}

/// The value of a field that is no file.
async fn value(name: &str, mut field: Field<'_>) -> Result<Value, Refusal> {
    let mut bytes = Vec::new();
    while let Some(chunk) = field.chunk().await? {
        bytes.extend_from_slice(&chunk);
        if bytes.len() > MAX_FIELD {
            return Err(Refusal::bad(format!("{name}: is longer than {MAX_FIELD} bytes")));
        }
    }
    let text =
        String::from_utf8(bytes).map_err(|_| Refusal::bad(format!("{name}: is no UTF-8 text")))?;
    match name {
        "payload" | "options" | "labels" | "priority" => serde_json::from_str(&text)
            .map_err(|error| Refusal::bad(format!("{name}: is not JSON: {error}"))),
        _ => Ok(Value::String(text)),
    }
}

/// Keeps a file as it comes.
async fn store(client: &InProcess, mut field: Field<'_>) -> Result<pb::Artifact, Refusal> {
    // Browsers of old send a path.
    let name = field.file_name().unwrap_or_default();
    let name = name.rsplit(['/', '\\']).next().unwrap_or_default().to_owned();
    let mime_type = field.content_type().unwrap_or_default().to_owned();
    let spec = pb::ArtifactSpec { name, mime_type, ..Default::default() };
    let (send, receive) = mpsc::channel(4);
    let mut artifacts = client.artifacts();
    let call = async {
        let artifact = artifacts.upload_artifact(parts(spec, receive)).await?;
        Ok::<_, Refusal>(artifact.into_inner())
    };
    let read = async move {
        while let Some(chunk) = field.chunk().await? {
            if send.send(Some(chunk)).await.is_err() {
                break;
            }
        }
        // A call that has ended says itself why.
        let _ = send.send(None).await;
        Ok::<_, Refusal>(())
    };
    let (artifact, ()) = future::try_join(call, read).await?;
    Ok(artifact)
}

/// What is sent. It ends with the `None` that stands for the end of the file, and not when the
/// sender is gone: half a file is none.
fn parts(
    spec: pb::ArtifactSpec,
    pieces: mpsc::Receiver<Option<Bytes>>,
) -> impl Stream<Item = pb::UploadArtifactRequest> + Send + 'static {
    let whole = ReceiverStream::new(pieces).chain(stream::pending());
    let data = whole.take_while(|piece| future::ready(piece.is_some())).flat_map(|piece| {
        let mut left = piece.unwrap_or_default();
        stream::iter(std::iter::from_fn(move || {
            let size = left.len().min(PIECE);
            (size > 0).then(|| Part::Data(left.split_to(size)))
        }))
    });
    let part = |part| pb::UploadArtifactRequest { part: Some(part) };
    stream::iter([Part::Spec(spec)]).chain(data).map(part)
}

impl From<MultipartError> for Refusal {
    fn from(error: MultipartError) -> Self {
        tracing::debug!(%error, "a form broke off");
        Self::bad(format!("the form cannot be read: {}", error.body_text()))
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn what_is_sent_ends_with_the_file_and_not_with_its_sender() {
        for whole in [true, false] {
            let (send, receive) = mpsc::channel(2);
            send.send(Some(Bytes::from(vec![1; PIECE + 1]))).await.unwrap();
            if whole {
                send.send(None).await.unwrap();
            }
            drop(send);
            let mut parts = std::pin::pin!(parts(pb::ArtifactSpec::default(), receive));
            let mut sizes = Vec::new();
            let ended = loop {
                match parts.next().now_or_never() {
                    Some(Some(request)) => match request.part {
                        Some(Part::Data(data)) => sizes.push(data.len()),
                        part => assert!(matches!(part, Some(Part::Spec(_)))),
                    },
                    Some(None) => break true,
                    None => break false,
                }
            };
            assert_eq!((sizes, ended), (vec![PIECE, 1], whole));
        }
    }
}
