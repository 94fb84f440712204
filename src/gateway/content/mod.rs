//! The bytes of artifacts over plain HTTP: downloads with ranges, and uploads with one request.
//!
//! Both are calls of `ArtifactService` in this process, so that credentials, limits and checks are
//! those of every call. What is served was made by somebody else and is treated so: no browser
//! runs it, guesses its type, or shows it as a page of this server unless asked to.

use axum::body::Body;
use bytes::{BufMut as _, Bytes, BytesMut};
use futures_util::{StreamExt as _, stream};
use http::{HeaderValue, Method, Request, Response, StatusCode, Version, header};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use prost::Message;
use tonic::Status;

mod headers;

use self::headers::{Range, conditions, describe, range};
use super::{
    answer, bind,
    bind::Query,
    call::{self, PREFIX},
    route::Routes,
};
use crate::{
    error::{Error, Result},
    grpc::{Guarded, calls::Calls},
    pb,
};

/// Tag of `data` in `UploadArtifactRequest`.
const DATA: u8 = 3 << 3 | 2;
/// Larger pieces of a body are sent as several messages, each below the limit of a message.
const MAX_PIECE: usize = 1 << 20;

/// What a path names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target<'p> {
    /// The bytes of an artifact.
    Artifact(&'p str),
    /// The bytes of an upload.
    Upload(&'p str),
}

impl<'p> Target<'p> {
    /// Reads a path.
    pub fn of(path: &'p str) -> Option<Self> {
        let name = path.strip_suffix("/content")?;
        let one = |id: &&str| !id.is_empty() && !id.contains('/');
        match (name.strip_prefix("/v1/artifacts/"), name.strip_prefix("/v1/uploads/")) {
            (Some(id), _) => Some(id).filter(one).map(Self::Artifact),
            (_, Some(id)) => Some(id).filter(one).map(Self::Upload),
            _ => None,
        }
    }

    /// Methods that it has.
    pub fn methods(self) -> Vec<&'static str> {
        match self {
            Self::Artifact(_) => vec!["GET"],
            Self::Upload(_) => vec!["PUT"],
        }
    }
}

/// A part of this edge at work on one request.
pub struct Content<'g> {
    /// Where methods are.
    pub calls: &'g Calls,
    /// For errors and JSON.
    pub routes: &'g Routes,
}

impl Content<'_> {
    /// Serves the bytes of an artifact.
    pub async fn download(&self, id: &str, request: Request<Body>) -> Response<Body> {
        match self.try_download(id, request).await {
            Ok(response) => response,
            Err(refused) => *refused,
        }
    }

    async fn try_download(
        &self,
        id: &str,
        request: Request<Body>,
    ) -> Result<Response<Body>, Box<Response<Body>>> {
        let refuse = |error: Error| Box::new(answer::failure(self.routes, &error.into()));
        let (parts, _) = request.into_parts();
        let mut query = bind::query(parts.uri.query().unwrap_or_default()).map_err(refuse)?;
        let mut headers = call::metadata(&parts.headers).map_err(refuse)?;
        call::take_token(&mut query, &mut headers).map_err(refuse)?;
        let inline = wants_inline(&query).map_err(refuse)?;

        let get = pb::GetArtifactRequest { artifact_id: id.to_owned() };
        let path = "/baton.v1.ArtifactService/GetArtifact";
        let extensions = parts.extensions.clone();
        let get = call::request(path, &get.encode_to_vec(), headers.clone(), extensions);
        let answered = self.calls.call(get.map_err(refuse)?).await;
        let artifact: pb::Artifact = answer::message(self.routes, answered).await?;

        let etag = format!("\"{}\"", artifact.sha256);
        let head = describe(&artifact, &etag, inline).map_err(refuse)?;
        let respond = |code: StatusCode, body: Body| {
            let mut response = Response::new(body);
            *response.status_mut() = code;
            response.headers_mut().extend(head.clone());
            response
        };
        if let Some(code) = conditions(&parts.headers, &etag) {
            return Ok(respond(code, Body::empty()));
        }
        let whole = artifact.size_bytes;
        let range = match parts.method {
            Method::GET => range(&parts.headers, &etag, whole),
            _ => Range::Whole,
        };
        let (offset, length, code) = match range {
            Range::Whole => (0, whole, StatusCode::OK),
            Range::Part(first, length) => (first, length, StatusCode::PARTIAL_CONTENT),
            Range::Unsatisfiable => {
                let error = Error::invalid("range", format!("is outside of {whole} bytes"));
                let code = StatusCode::RANGE_NOT_SATISFIABLE;
                let mut response = answer::refusal(self.routes, code, error);
                let value = HeaderValue::try_from(format!("bytes */{whole}"));
                response.headers_mut().extend(value.ok().map(|v| (header::CONTENT_RANGE, v)));
                return Err(Box::new(response));
            }
        };
        let body = if parts.method == Method::HEAD || length == 0 {
            Body::empty()
        } else {
            let download =
                pb::DownloadArtifactRequest { artifact_id: id.to_owned(), offset, limit: length };
            let path = "/baton.v1.ArtifactService/DownloadArtifact";
            let download =
                call::request(path, &download.encode_to_vec(), headers, parts.extensions);
            let answered = self.calls.call(download.map_err(refuse)?).await;
            if let Some(refused) = answer::refused(self.routes, answered.headers()) {
                return Err(Box::new(refused));
            }
            Body::from_stream(pieces(answered.into_body()))
        };
        let mut response = respond(code, body);
        response.headers_mut().insert(header::CONTENT_LENGTH, length.into());
        if code == StatusCode::PARTIAL_CONTENT {
            let value = format!("bytes {offset}-{}/{whole}", offset + length - 1);
            let value = HeaderValue::try_from(value).ok();
            response.headers_mut().extend(value.map(|value| (header::CONTENT_RANGE, value)));
        }
        Ok(response)
    }

    /// Takes the bytes of an upload.
    pub async fn upload(&self, id: &str, request: Request<Body>) -> Response<Body> {
        match self.try_upload(id, request).await {
            Ok(response) => response,
            Err(refused) => *refused,
        }
    }

    async fn try_upload(
        &self,
        id: &str,
        request: Request<Body>,
    ) -> Result<Response<Body>, Box<Response<Body>>> {
        let refuse = |error: Error| Box::new(answer::failure(self.routes, &error.into()));
        let (parts, body) = request.into_parts();
        let mut query = bind::query(parts.uri.query().unwrap_or_default()).map_err(refuse)?;
        let mut headers = call::metadata(&parts.headers).map_err(refuse)?;
        call::take_token(&mut query, &mut headers).map_err(refuse)?;
        no_more(&query).map_err(refuse)?;
        let at = pb::UploadPosition { upload_id: id.to_owned(), offset: 0 };
        let part = Some(pb::upload_artifact_request::Part::Upload(at));
        let first = pb::UploadArtifactRequest { part }.encode_to_vec();
        let mut opening = BytesMut::with_capacity(PREFIX + first.len());
        prefix(&mut opening, first.len());
        opening.put_slice(&first);
        let opening = stream::iter([Ok(Frame::data(opening.freeze()))]);
        let data = body.into_data_stream().flat_map(|piece| stream::iter(framed(piece)));
        let body = StreamBody::new(opening.chain(data));

        let mut request = Request::new(body);
        *request.method_mut() = Method::POST;
        *request.version_mut() = Version::HTTP_2;
        *request.uri_mut() = http::Uri::from_static("/baton.v1.ArtifactService/UploadArtifact");
        *request.headers_mut() = headers;
        *request.extensions_mut() = parts.extensions;
        let answered = self.calls.call(request).await;
        let artifact: pb::Artifact = answer::message(self.routes, answered).await?;
        Ok(answer::json(self.routes, "baton.v1.Artifact", &artifact.encode_to_vec()))
    }
}

/// The head of a gRPC message.
fn prefix(buf: &mut BytesMut, length: usize) {
    buf.put_u8(0);
    buf.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
}

/// A piece of a body as gRPC messages, without a copy of it.
fn framed(piece: Result<Bytes, axum::Error>) -> Vec<Result<Frame<Bytes>, axum::Error>> {
    let mut piece = match piece {
        Ok(piece) => piece,
        Err(error) => return vec![Err(error)],
    };
    let mut frames = Vec::with_capacity(2);
    while !piece.is_empty() {
        let data = piece.split_to(piece.len().min(MAX_PIECE));
        let n_length = prost::encoding::encoded_len_varint(data.len() as u64);
        let mut head = BytesMut::with_capacity(PREFIX + 1 + n_length);
        prefix(&mut head, 1 + n_length + data.len());
        head.put_u8(DATA);
        prost::encoding::encode_varint(data.len() as u64, &mut head);
        frames.push(Ok(Frame::data(head.freeze())));
        frames.push(Ok(Frame::data(data)));
    }
    frames
}

/// The bytes in a stream of `DownloadArtifactResponse`; an end that is not OK is an error, so that
/// the connection does not end as if all had come.
fn pieces(body: Guarded) -> impl futures_util::Stream<Item = Result<Bytes, Status>> + Send {
    let state = (body, BytesMut::new());
    stream::try_unfold(state, |(mut body, mut partial)| async move {
        loop {
            let Some(frame) = body.frame().await else {
                let complete = partial.is_empty();
                return if complete { Ok(None) } else { Err(Status::internal("cut off")) };
            };
            let mut data = match frame?.into_data() {
                Ok(data) => data,
                Err(frame) => {
                    let trailers = frame.into_trailers().unwrap_or_default();
                    match Status::from_header_map(&trailers) {
                        Some(status) if status.code() != tonic::Code::Ok => return Err(status),
                        _ => continue,
                    }
                }
            };
            if !partial.is_empty() {
                partial.extend_from_slice(&data);
                data = std::mem::take(&mut partial).freeze();
            }
            let mut whole = BytesMut::new();
            let mut only = None;
            while let Some(message) = take_message(&mut data) {
                let message = pb::DownloadArtifactResponse::decode(message);
                let message = message.map_err(|_| Status::internal("malformed"))?;
                match only.take() {
                    None if whole.is_empty() => only = Some(message.data),
                    first => {
                        whole.extend_from_slice(first.as_deref().unwrap_or_default());
                        whole.extend_from_slice(&message.data);
                    }
                }
            }
            partial.extend_from_slice(&data);
            if let Some(piece) = only.or_else(|| (!whole.is_empty()).then(|| whole.freeze())) {
                return Ok(Some((piece, (body, partial))));
            }
        }
    })
}

/// The message at the front of `data`, if all of it is there.
fn take_message(data: &mut Bytes) -> Option<Bytes> {
    let (head, rest) = data.split_at_checked(PREFIX)?;
    let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
    if rest.len() < length {
        return None;
    }
    let mut message = data.split_to(PREFIX + length);
    Some(message.split_off(PREFIX))
}

/// Whether the bytes shall be shown rather than saved.
fn wants_inline(query: &Query<'_>) -> Result<bool> {
    match &query[..] {
        [] => Ok(false),
        [(name, value)] if name == "disposition" => match value.as_ref() {
            "inline" => Ok(true),
            "attachment" => Ok(false),
            _ => Err(Error::invalid("disposition", "must be `inline` or `attachment`")),
        },
        _ => no_more(query).map(|()| false),
    }
}

fn no_more(query: &Query<'_>) -> Result<()> {
    match query.iter().find(|(name, _)| name != "disposition") {
        None => Ok(()),
        Some((name, _)) => Err(Error::invalid(name.clone(), "is not known here")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_paths_name_bytes() {
        assert_eq!(Target::of("/v1/artifacts/x/content"), Some(Target::Artifact("x")));
        assert_eq!(Target::of("/v1/uploads/x/content"), Some(Target::Upload("x")));
        for path in ["/v1/artifacts//content", "/v1/artifacts/x/y/content", "/v1/artifacts/content"]
        {
            assert_eq!(Target::of(path), None, "{path}");
        }
    }

    #[tokio::test]
    async fn pieces_of_a_body_are_messages_that_fit() {
        let body = Bytes::from(vec![7; MAX_PIECE + 5]);
        let mut sent = BytesMut::new();
        for frame in framed(Ok(body.clone())) {
            sent.extend_from_slice(&frame.unwrap().into_data().unwrap());
        }
        let (mut sent, mut found) = (sent.freeze(), BytesMut::new());
        while let Some(message) = take_message(&mut sent) {
            assert!(message.len() < MAX_PIECE + 16);
            let message = pb::UploadArtifactRequest::decode(message).unwrap();
            let Some(pb::upload_artifact_request::Part::Data(data)) = message.part else {
                panic!("data wanted")
            };
            found.extend_from_slice(&data);
        }
        assert!(sent.is_empty());
        assert_eq!(found.freeze(), body);
    }
}
