//! Artifacts from outside: over HTTP as a browser and curl move them, as tasks read and make them,
//! and by command.

mod content;
mod outage;
mod requests;
mod work;

use baton::pb::{self, upload_artifact_request::Part};
use sha2::{Digest as _, Sha256};
use tonic::Status;

use crate::harness::{api::Api, bucket::Bucket, default, server::Server};

/// Lower-case hex SHA-256.
pub fn sha256(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

/// Bytes that do not repeat soon.
pub fn noise(n_bytes: usize, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; n_bytes];
    baton::id::Entropy::seeded(seed).fill(&mut bytes);
    bytes
}

/// A name and nothing else.
pub fn spec(name: &str) -> pb::ArtifactSpec {
    pb::ArtifactSpec { name: name.into(), ..default() }
}

/// Size and digest announced.
pub fn announced(name: &str, bytes: &[u8]) -> pb::ArtifactSpec {
    pb::ArtifactSpec { size_bytes: Some(bytes.len() as u64), sha256: sha256(bytes), ..spec(name) }
}

/// Uploads bytes by stream.
pub async fn upload(api: &Api, first: Part, bytes: &[u8]) -> Result<pb::Artifact, Status> {
    let pieces: Vec<_> =
        bytes.chunks(300_000).map(|piece| Part::Data(piece.to_vec().into())).collect();
    let parts = std::iter::once(first).chain(pieces);
    let parts: Vec<_> = parts.map(|part| pb::UploadArtifactRequest { part: Some(part) }).collect();
    let sent = api.artifacts().upload_artifact(tokio_stream::iter(parts)).await?;
    Ok(sent.into_inner())
}

/// Makes a small artifact.
pub async fn put(api: &Api, spec: pb::ArtifactSpec, bytes: &[u8]) -> Result<pb::Artifact, Status> {
    let request = pb::CreateArtifactRequest { spec: Some(spec), data: bytes.to_vec().into() };
    Ok(api.artifacts().create_artifact(request).await?.into_inner())
}

/// Announces an upload.
pub async fn announce(api: &Api, spec: pb::ArtifactSpec) -> Result<pb::Upload, Status> {
    let request = pb::CreateUploadRequest { spec: Some(spec) };
    Ok(api.artifacts().create_upload(request).await?.into_inner())
}

/// Completes an upload.
pub async fn complete(api: &Api, upload: &pb::Upload) -> Result<pb::Artifact, Status> {
    let request = pb::CompleteUploadRequest { upload_id: upload.upload_id.clone() };
    Ok(api.artifacts().complete_upload(request).await?.into_inner())
}

/// All bytes of an artifact.
pub async fn download(api: &Api, artifact: &pb::Artifact) -> Result<Vec<u8>, Status> {
    let request =
        pb::DownloadArtifactRequest { artifact_id: artifact.artifact_id.clone(), ..default() };
    let mut stream = api.artifacts().download_artifact(request).await?.into_inner();
    let mut bytes = Vec::new();
    while let Some(piece) = stream.message().await? {
        bytes.extend_from_slice(&piece.data);
    }
    Ok(bytes)
}

/// Every artifact of the namespace.
pub async fn listed(api: &Api) -> Vec<pb::Artifact> {
    let list = api.artifacts().list_artifacts(pb::ListArtifactsRequest::default()).await;
    list.expect("a list").into_inner().artifacts
}

/// A server on each store, in turn; the bucket lives as long as it is needed.
pub async fn servers(env: &[(&str, &str)]) -> Vec<(Server, Option<Bucket>)> {
    let files = Server::start(env).await;
    let bucket = Bucket::start().await;
    let on_bucket = bucket.env();
    let on_bucket = on_bucket.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    let env: Vec<_> = env.iter().copied().chain(on_bucket).collect();
    vec![(files, None), (Server::start(&env).await, Some(bucket))]
}
