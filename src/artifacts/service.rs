//! `ArtifactService`.

use std::{pin::Pin, time::Duration};

use bytes::{Bytes, BytesMut};
use futures_util::{Stream, StreamExt as _};
use tonic::{Request, Response, Status, Streaming};

use super::{
    Artifacts, convert, keep,
    model::{Artifact, Upload},
    receive::Receiver,
    store::Filter,
};
use crate::{
    db::page,
    error::{Error, Kind, Reason, Result},
    grpc::auth,
    id::Namespace,
    keys::{Grant, Principal},
    pb::{self, server::artifact_service_server::ArtifactService, upload_artifact_request::Part},
};

/// An upload that is over before so many bytes have come needs no row of its own.
const SMALL: usize = 1 << 20;

/// The service; clones share its parts.
#[derive(Clone)]
pub struct Service(Artifacts);

impl Service {
    /// The service.
    pub fn new(artifacts: Artifacts) -> Self {
        Self(artifacts)
    }

    fn artifact(&self, artifact: &Artifact) -> pb::Artifact {
        convert::artifact(artifact, self.0.url(artifact.id))
    }

    /// What the maker of an artifact gets.
    fn made(&self, caller: &Principal, artifact: &Artifact) -> Response<pb::Artifact> {
        let wire = self.artifact(artifact);
        let own = caller.attempt().is_some() && caller.attempt() == artifact.origin.attempt;
        Response::new(if own {
            convert::with_receipt(&self.0.receipts(), artifact, wire)
        } else {
            wire
        })
    }

    async fn upload(&self, caller: &Principal, upload: &Upload) -> Result<pb::Upload> {
        if upload.artifact.is_some() {
            return Ok(convert::upload(upload, upload.spec.size.unwrap_or(upload.received), None));
        }
        if self.0.has_bytes(upload).await? {
            return Ok(convert::upload(upload, upload.spec.size.unwrap_or(0), None));
        }
        let target = self.0.target(caller, upload).await?;
        Ok(convert::upload(upload, upload.received, target))
    }

    async fn receive(
        &self,
        caller: &Principal,
        stream: &mut Streaming<pb::UploadArtifactRequest>,
    ) -> Result<Artifact, Status> {
        let first = stream.message().await?.and_then(|message| message.part);
        let mut receiver = match first {
            Some(Part::Upload(at)) => {
                let id = convert::upload_id(&at.upload_id)?;
                self.0.resume(caller, id, at.offset).await?
            }
            Some(Part::Spec(spec)) => {
                if let Some(Grant::Upload(_)) = caller.grant {
                    let message = "this token puts the bytes of its upload and nothing else";
                    let reason = Reason::PermissionDenied;
                    return Err(Error::new(Kind::PermissionDenied, reason, message).into());
                }
                let spec = convert::spec(Some(spec))?;
                let mut early = BytesMut::new();
                loop {
                    match data(stream).await? {
                        None => return Ok(self.0.put(caller, spec, early.freeze()).await?),
                        Some(bytes) => early.extend_from_slice(&bytes),
                    }
                    if early.len() >= SMALL {
                        break;
                    }
                }
                let upload = self.0.begin(caller, spec).await?;
                let mut receiver = self.0.receive(upload, 0).await?;
                receiver.write(early.freeze()).await?;
                receiver
            }
            _ => {
                let what = "the first message must be spec or upload";
                return Err(Error::invalid("part", what).into());
            }
        };
        loop {
            match data(stream).await {
                Ok(Some(bytes)) => receiver.write(bytes).await?,
                Ok(None) => return Ok(receiver.finish().await?),
                Err(status) => {
                    pause(receiver).await;
                    return Err(status);
                }
            }
        }
    }
}

/// The next bytes of an upload.
async fn data(stream: &mut Streaming<pb::UploadArtifactRequest>) -> Result<Option<Bytes>, Status> {
    match stream.message().await? {
        None => Ok(None),
        Some(pb::UploadArtifactRequest { part: Some(Part::Data(bytes)) }) => Ok(Some(bytes)),
        Some(_) => Err(Error::invalid("part", "must be data after the first message").into()),
    }
}

/// The sender is gone; what it sent is kept for when it comes back.
async fn pause(receiver: Receiver) {
    if let Err(error) = receiver.pause().await {
        tracing::info!(%error, "an upload goes on from an earlier place");
    }
}

#[tonic::async_trait]
impl ArtifactService for Service {
    async fn upload_artifact(
        &self,
        request: Request<Streaming<pb::UploadArtifactRequest>>,
    ) -> Result<Response<pb::Artifact>, Status> {
        let caller = auth::principal(&request)?;
        let artifact = self.receive(&caller, &mut request.into_inner()).await?;
        Ok(self.made(&caller, &artifact))
    }

    type DownloadArtifactStream =
        Pin<Box<dyn Stream<Item = Result<pb::DownloadArtifactResponse, Status>> + Send>>;

    async fn download_artifact(
        &self,
        request: Request<pb::DownloadArtifactRequest>,
    ) -> Result<Response<Self::DownloadArtifactStream>, Status> {
        let caller = auth::principal(&request)?;
        let request = request.into_inner();
        let artifact = self.0.get(&caller, convert::artifact_id(&request.artifact_id)?).await?;
        let limit = Some(request.limit).filter(|limit| *limit > 0);
        let pieces = self.0.read(&artifact, request.offset, limit).await?;
        let id = artifact.id;
        Ok(Response::new(Box::pin(pieces.map(move |piece| match piece {
            Ok(data) => Ok(pb::DownloadArtifactResponse { data }),
            Err(error) => Err(keep::unreadable(id, error).into()),
        }))))
    }

    async fn create_artifact(
        &self,
        request: Request<pb::CreateArtifactRequest>,
    ) -> Result<Response<pb::Artifact>, Status> {
        let caller = auth::principal(&request)?;
        let pb::CreateArtifactRequest { spec, data } = request.into_inner();
        let artifact = self.0.put(&caller, convert::spec(spec)?, data).await?;
        Ok(self.made(&caller, &artifact))
    }

    async fn get_artifact(
        &self,
        request: Request<pb::GetArtifactRequest>,
    ) -> Result<Response<pb::Artifact>, Status> {
        let caller = auth::principal(&request)?;
        let id = convert::artifact_id(&request.get_ref().artifact_id)?;
        let artifact = self.0.get(&caller, id).await?;
        Ok(Response::new(self.artifact(&artifact)))
    }

    async fn list_artifacts(
        &self,
        request: Request<pb::ListArtifactsRequest>,
    ) -> Result<Response<pb::ListArtifactsResponse>, Status> {
        let caller = auth::principal(&request)?;
        let request = request.into_inner();
        let limit = page::size(request.page_size, 100, 1_000)?;
        let filter = Filter {
            task: convert::task_id(&request.task_id)?,
            kind: Some(request.r#type).filter(|kind| !kind.is_empty()),
            name: Some(request.name).filter(|name| !name.is_empty()),
        };
        let list = ("artifacts", &caller.namespace, &filter);
        let cursor = page::cursor(&list, &request.page_token)?;
        let token = |last: &Artifact| page::token(&list, &last.id.to_string());
        let mut found = self.0.list(&caller.namespace, filter.clone(), cursor, limit + 1).await?;
        let more = found.len() > limit as usize;
        found.truncate(limit as usize);
        let next_page_token = match found.last() {
            Some(last) if more => token(last),
            _ => String::new(),
        };
        let artifacts = found.iter().map(|artifact| self.artifact(artifact)).collect();
        Ok(Response::new(pb::ListArtifactsResponse { artifacts, next_page_token }))
    }

    async fn delete_artifact(
        &self,
        request: Request<pb::DeleteArtifactRequest>,
    ) -> Result<Response<pb::DeleteArtifactResponse>, Status> {
        let caller = auth::principal(&request)?;
        let id = convert::artifact_id(&request.get_ref().artifact_id)?;
        if self.0.delete(&caller.namespace, id).await? {
            tracing::info!(target: "baton::audit", by = caller.name, artifact.id = %id, "artifact deleted");
        }
        Ok(Response::new(pb::DeleteArtifactResponse {}))
    }

    async fn verify_artifact(
        &self,
        request: Request<pb::VerifyArtifactRequest>,
    ) -> Result<Response<pb::VerifyArtifactResponse>, Status> {
        let caller = auth::principal(&request)?;
        let id = convert::artifact_id(&request.get_ref().artifact_id)?;
        let artifact = self.0.get(&caller, id).await?;
        let (size_bytes, digest) = self.0.inspect(&artifact).await?;
        let intact = digest == Some(artifact.key.digest) && size_bytes == artifact.size;
        if !intact {
            tracing::error!(artifact.id = %id, "the stored bytes of an artifact are damaged");
        }
        let sha256 = digest.map(|digest| digest.to_string()).unwrap_or_default();
        Ok(Response::new(pb::VerifyArtifactResponse { intact, size_bytes, sha256 }))
    }

    async fn share_artifact(
        &self,
        request: Request<pb::ShareArtifactRequest>,
    ) -> Result<Response<pb::ShareArtifactResponse>, Status> {
        const DEFAULT: Duration = Duration::from_hours(1);
        let caller = auth::principal(&request)?;
        let request = request.into_inner();
        let artifact = self.0.get(&caller, convert::artifact_id(&request.artifact_id)?).await?;
        let ttl = convert::ttl(request.ttl, DEFAULT)?;
        let (url, expire_time) = self.0.share(&caller, &artifact, ttl)?;
        tracing::info!(target: "baton::audit", by = caller.name, artifact.id = %artifact.id, "artifact shared");
        let expire_time = Some(crate::events::frame::timestamp(expire_time));
        Ok(Response::new(pb::ShareArtifactResponse { url, expire_time }))
    }

    async fn collect_artifacts(
        &self,
        request: Request<pb::CollectArtifactsRequest>,
    ) -> Result<Response<pb::CollectArtifactsResponse>, Status> {
        let caller = auth::principal(&request)?;
        if caller.namespace.as_str() != Namespace::DEFAULT {
            let message = "bytes belong to all namespaces; an admin of `default` collects them";
            let reason = Reason::PermissionDenied;
            return Err(Error::new(Kind::PermissionDenied, reason, message).into());
        }
        let collected = self.0.collect().await?;
        tracing::info!(target: "baton::audit", by = caller.name, files = collected.files, "artifacts collected");
        Ok(Response::new(convert::collected(collected)))
    }

    async fn create_upload(
        &self,
        request: Request<pb::CreateUploadRequest>,
    ) -> Result<Response<pb::Upload>, Status> {
        let caller = auth::principal(&request)?;
        let spec = convert::spec(request.into_inner().spec)?;
        if spec.size.is_none() || spec.digest.is_none() {
            let field = if spec.size.is_none() { "spec.size_bytes" } else { "spec.sha256" };
            let what = "is required here; send bytes of unknown size or digest with UploadArtifact";
            return Err(Error::invalid(field, what).into());
        }
        let upload = self.0.begin(&caller, spec).await?;
        Ok(Response::new(self.upload(&caller, &upload).await?))
    }

    async fn get_upload(
        &self,
        request: Request<pb::GetUploadRequest>,
    ) -> Result<Response<pb::Upload>, Status> {
        let caller = auth::principal(&request)?;
        let id = convert::upload_id(&request.get_ref().upload_id)?;
        let upload = self.0.upload(&caller, id).await?;
        Ok(Response::new(self.upload(&caller, &upload).await?))
    }

    async fn complete_upload(
        &self,
        request: Request<pb::CompleteUploadRequest>,
    ) -> Result<Response<pb::Artifact>, Status> {
        let caller = auth::principal(&request)?;
        let id = convert::upload_id(&request.get_ref().upload_id)?;
        let artifact = self.0.complete(&caller, id).await?;
        Ok(self.made(&caller, &artifact))
    }

    async fn delete_upload(
        &self,
        request: Request<pb::DeleteUploadRequest>,
    ) -> Result<Response<pb::DeleteUploadResponse>, Status> {
        let caller = auth::principal(&request)?;
        let id = convert::upload_id(&request.get_ref().upload_id)?;
        self.0.abandon(&caller, id).await?;
        Ok(Response::new(pb::DeleteUploadResponse {}))
    }
}
