//! Artifacts' bytes in a bucket: `<prefix>/blobs/<kind>/ab/cd…-<generation>`, uploads as
//! `<prefix>/uploads/<id>` or as parts that the bucket shows to nobody.
//!
//! Any S3-compatible server will do: nothing here relies on conditional writes, and the SDK's own
//! checksums, which not every server understands, are left to where an operation needs them. What
//! is kept was hashed on its way.

mod objects;
mod writer;

use std::{sync::Arc, time::Duration};

use aws_sdk_s3::{
    Client,
    config::{
        BehaviorVersion, Region, RequestChecksumCalculation, ResponseChecksumValidation,
        timeout::TimeoutConfig,
    },
    error::{DisplayErrorContext, SdkError},
    operation::{get_object::GetObjectError, head_object::HeadObjectError},
    presigning::PresigningConfig,
    primitives::ByteStream,
    types::{ChecksumMode, CompletedMultipartUpload, CompletedPart},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use uuid::Uuid;

use super::{
    Digest, Error,
    hash::Hasher,
    store::{Checkpoint, Key, Multipart, Pieces, Presigned, Upload},
};
pub use writer::{End, Writer};

/// Most that one request can put or copy.
const MOST_AT_ONCE: u64 = 5 << 30;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// One try of one operation; the slowest moves one part.
const ATTEMPT_TIMEOUT: Duration = Duration::from_mins(1);

/// Which bucket, and how it is reached. Credentials come from where the SDK looks for them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// Its name.
    pub bucket: String,
    /// What all names in it begin with, without slashes around; may be empty.
    pub prefix: String,
    /// Server; AWS when empty.
    pub endpoint: String,
    /// Region; when empty as the environment says, or `us-east-1`.
    pub region: String,
    /// Whether the bucket is named in the path instead of the host.
    pub path_style: bool,
}

/// A bucket; clones share it.
#[derive(Clone, Debug)]
pub(super) struct Bucket(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    client: Client,
    name: String,
    /// Empty, or ending with a slash.
    prefix: String,
}

fn failed<E, R>(error: SdkError<E, R>) -> Error
where
    E: std::error::Error + 'static,
    R: std::fmt::Debug,
{
    Error::Bucket(DisplayErrorContext(error).to_string())
}

/// The code of an error that the server answered with.
fn code<E, R>(error: &SdkError<E, R>) -> Option<&str>
where
    E: aws_sdk_s3::error::ProvideErrorMetadata,
{
    error.as_service_error().and_then(aws_sdk_s3::error::ProvideErrorMetadata::code)
}

impl Bucket {
    pub(super) async fn open(settings: &Settings) -> Result<Self, Error> {
        let timeouts = TimeoutConfig::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .operation_attempt_timeout(ATTEMPT_TIMEOUT)
            .build();
        let mut loader = aws_config::defaults(BehaviorVersion::latest()).timeout_config(timeouts);
        if !settings.endpoint.is_empty() {
            loader = loader.endpoint_url(&settings.endpoint);
        }
        if !settings.region.is_empty() {
            loader = loader.region(Region::new(settings.region.clone()));
        }
        Self::connect(settings, &loader.load().await).await
    }

    /// Opens the bucket by what the SDK found of credentials and the like.
    async fn connect(settings: &Settings, shared: &aws_config::SdkConfig) -> Result<Self, Error> {
        let region = shared.region().cloned().unwrap_or(Region::from_static("us-east-1"));
        let config = aws_sdk_s3::config::Builder::from(shared)
            .region(region)
            .force_path_style(settings.path_style)
            .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
            .response_checksum_validation(ResponseChecksumValidation::WhenRequired)
            .build();
        let prefix = match settings.prefix.trim_matches('/') {
            "" => String::new(),
            prefix => format!("{prefix}/"),
        };
        let inner =
            Inner { client: Client::from_conf(config), name: settings.bucket.clone(), prefix };
        let head = inner.client.head_bucket().bucket(&inner.name).send();
        head.await.map_err(failed)?;
        Ok(Self(Arc::new(inner)))
    }

    /// A bucket of the server that tests start.
    #[cfg(test)]
    pub(super) async fn open_test(addr: std::net::SocketAddr, prefix: &str) -> Result<Self, Error> {
        use super::testing::{ACCESS_KEY, BUCKET, SECRET_KEY};
        let keys = aws_sdk_s3::config::Credentials::new(ACCESS_KEY, SECRET_KEY, None, None, "test");
        let loader = aws_config::defaults(BehaviorVersion::latest())
            .credentials_provider(keys)
            .region(Region::from_static("us-east-1"))
            .endpoint_url(format!("http://{addr}"));
        let settings = Settings {
            bucket: BUCKET.into(),
            prefix: prefix.into(),
            path_style: true,
            ..Settings::default()
        };
        Self::connect(&settings, &loader.load().await).await
    }

    fn object(&self, key: &Key) -> String {
        format!("{}blobs/{key}", self.0.prefix)
    }

    fn staged(&self, id: Uuid) -> String {
        format!("{}uploads/{}", self.0.prefix, id.as_hyphenated())
    }

    /// Whether an object is an upload's own. Any other is deleted by whoever keeps the references.
    fn is_staged(&self, object: &str) -> bool {
        let name = object.strip_prefix(&self.0.prefix);
        name.is_some_and(|name| name.starts_with("uploads/"))
    }

    pub(super) async fn put(&self, key: &Key, bytes: Bytes) -> Result<(), Error> {
        self.put_at(self.object(key), bytes).await
    }

    async fn put_at(&self, object: String, bytes: Bytes) -> Result<(), Error> {
        let put = self.0.client.put_object().bucket(&self.0.name).key(object);
        put.body(ByteStream::from(bytes)).send().await.map_err(failed)?;
        Ok(())
    }

    pub(super) async fn remove(
        &self,
        id: Uuid,
        checkpoint: Option<Checkpoint>,
    ) -> Result<(), Error> {
        if let Some(multipart) = checkpoint.and_then(|checkpoint| checkpoint.multipart) {
            self.abort(&multipart).await?;
        }
        self.delete_object(self.staged(id)).await
    }

    async fn abort(&self, multipart: &Multipart) -> Result<(), Error> {
        let abort = self.0.client.abort_multipart_upload().bucket(&self.0.name);
        let sent = abort.key(&multipart.object).upload_id(&multipart.id).send().await;
        match sent {
            Err(error) if code(&error) != Some("NoSuchUpload") => Err(failed(error)),
            _ => Ok(()),
        }
    }

    pub(super) async fn presign(
        &self,
        upload: &Upload,
        expires_in: Duration,
    ) -> Result<Option<Presigned>, Error> {
        let (Some(size), Some(digest)) = (upload.size, upload.digest) else { return Ok(None) };
        if size > MOST_AT_ONCE {
            return Ok(None);
        }
        let config = PresigningConfig::expires_in(expires_in)
            .map_err(|error| Error::Bucket(error.to_string()))?;
        let put = self.0.client.put_object().bucket(&self.0.name).key(self.staged(upload.id));
        // What is part of the signature cannot be chosen by who uses it.
        let put = put
            .content_length(i64::try_from(size).unwrap_or(i64::MAX))
            .checksum_sha256(STANDARD.encode(digest.0));
        let request = put.presigned(config).await.map_err(failed)?;
        let headers = request.headers();
        Ok(Some(Presigned {
            method: request.method().to_owned(),
            url: request.uri().to_owned(),
            headers: headers.map(|(name, value)| (name.to_owned(), value.to_owned())).collect(),
        }))
    }

    pub(super) async fn inspect(&self, id: Uuid) -> Result<Option<(u64, Digest)>, Error> {
        let object = self.staged(id);
        let head = self.0.client.head_object().bucket(&self.0.name).key(&object);
        let head = match head.checksum_mode(ChecksumMode::Enabled).send().await {
            Ok(head) => head,
            Err(error) if error.as_service_error().is_some_and(HeadObjectError::is_not_found) => {
                return Ok(None);
            }
            Err(error) => return Err(failed(error)),
        };
        let size = u64::try_from(head.content_length().unwrap_or(0)).unwrap_or(0);
        // A bucket that checked the digest by itself need not send all bytes here.
        let checked = head.checksum_sha256().and_then(|text| STANDARD.decode(text).ok());
        if let Some(Ok(digest)) = checked.map(<[u8; 32]>::try_from) {
            return Ok(Some((size, Digest(digest))));
        }
        let mut hasher = Hasher::default();
        let mut pieces = self.get(object, 0, size).await?;
        while let Some(piece) = pieces.next().await {
            hasher.update(&piece?);
        }
        Ok(Some((hasher.length(), hasher.finish())))
    }

    pub(super) async fn promote(&self, id: Uuid, key: &Key) -> Result<(), Error> {
        let staged = self.staged(id);
        self.copy(&staged, key).await?;
        self.delete_object(staged).await
    }

    async fn copy(&self, from: &str, key: &Key) -> Result<(), Error> {
        let copy = self.0.client.copy_object().bucket(&self.0.name).key(self.object(key));
        let source = format!("{}/{from}", self.0.name);
        copy.copy_source(source).send().await.map_err(failed)?;
        Ok(())
    }

    pub(super) async fn read(&self, key: &Key, offset: u64, length: u64) -> Result<Pieces, Error> {
        if length == 0 {
            return Ok(stream::empty().boxed());
        }
        self.get(self.object(key), offset, length).await.map_err(|error| match error {
            Error::NotFound(_) => Error::NotFound(key.digest),
            other => other,
        })
    }

    async fn get(&self, object: String, offset: u64, length: u64) -> Result<Pieces, Error> {
        if length == 0 {
            return Ok(stream::empty().boxed());
        }
        let last = offset.saturating_add(length - 1);
        let get = self.0.client.get_object().bucket(&self.0.name).key(object);
        let got = match get.range(format!("bytes={offset}-{last}")).send().await {
            Ok(got) => got,
            Err(error)
                if error.as_service_error().is_some_and(GetObjectError::is_no_such_key)
                    || code(&error) == Some("InvalidRange") =>
            {
                return Err(Error::NotFound(Digest([0; 32])));
            }
            Err(error) => return Err(failed(error)),
        };
        let pieces = stream::try_unfold(got.body, |mut body| async move {
            let piece = body.next().await.transpose();
            let piece = piece.map_err(|error| Error::Bucket(error.to_string()))?;
            Ok(piece.map(|piece| (piece, body)))
        });
        Ok(pieces.boxed())
    }

    pub(super) async fn size(&self, key: &Key) -> Result<Option<u64>, Error> {
        self.size_at(self.object(key)).await
    }

    async fn size_at(&self, object: String) -> Result<Option<u64>, Error> {
        let head = self.0.client.head_object().bucket(&self.0.name).key(object);
        match head.send().await {
            Ok(head) => Ok(head.content_length().and_then(|size| u64::try_from(size).ok())),
            Err(error) if error.as_service_error().is_some_and(HeadObjectError::is_not_found) => {
                Ok(None)
            }
            Err(error) => Err(failed(error)),
        }
    }

    pub(super) async fn delete(&self, key: &Key) -> Result<(), Error> {
        self.delete_object(self.object(key)).await
    }

    async fn delete_object(&self, object: String) -> Result<(), Error> {
        let delete = self.0.client.delete_object().bucket(&self.0.name).key(object);
        match delete.send().await {
            // Some servers mind that there is nothing to delete.
            Err(error) if code(&error) != Some("NoSuchKey") => Err(failed(error)),
            _ => Ok(()),
        }
    }

    async fn begin(&self, object: String) -> Result<Multipart, Error> {
        let create = self.0.client.create_multipart_upload().bucket(&self.0.name).key(&object);
        let created = create.send().await.map_err(failed)?;
        let id = created.upload_id().unwrap_or_default().to_owned();
        Ok(Multipart { id, object, tags: Vec::new() })
    }

    async fn complete(&self, multipart: &Multipart) -> Result<(), Error> {
        let parts =
            multipart.tags.iter().zip(1..).map(|(tag, number)| {
                CompletedPart::builder().part_number(number).e_tag(tag).build()
            });
        let parts = CompletedMultipartUpload::builder().set_parts(Some(parts.collect())).build();
        let complete = self.0.client.complete_multipart_upload().bucket(&self.0.name);
        let complete = complete.key(&multipart.object).upload_id(&multipart.id);
        complete.multipart_upload(parts).send().await.map_err(failed)?;
        Ok(())
    }
}

/// Bucket and prefix of an address such as `s3://bucket/prefix`.
pub fn address(text: &str) -> Option<(String, String)> {
    let (bucket, prefix) = match text.strip_prefix("s3://")?.split_once('/') {
        Some((bucket, prefix)) => (bucket, prefix.trim_matches('/')),
        None => (text.strip_prefix("s3://")?, ""),
    };
    let named = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    let sound = !bucket.is_empty()
        && bucket.chars().all(named)
        && prefix.chars().all(|c| named(c) || c == '/')
        && !prefix.split('/').any(|part| matches!(part, "." | ".."));
    sound.then(|| (bucket.to_owned(), prefix.to_owned()))
}
