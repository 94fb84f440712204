//! What a request must look like before anything is done for it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use http::{HeaderMap, Request, Response, StatusCode, Version, header};
use tonic::body::Body;

use super::{body::Guarded, layers::CORRELATION};
use crate::{error::Error, id::Entropy};

/// The answer to something that looks for a method but does not speak gRPC.
pub(super) fn not_grpc<B>(request: &Request<B>) -> Option<Response<Guarded>> {
    let (status, text) = if request.version() != Version::HTTP_2 {
        (StatusCode::HTTP_VERSION_NOT_SUPPORTED, "gRPC needs HTTP/2\n")
    } else if request.method() != http::Method::POST {
        (StatusCode::METHOD_NOT_ALLOWED, "gRPC calls are POST requests\n")
    } else if !is_grpc(request.headers()) {
        (StatusCode::UNSUPPORTED_MEDIA_TYPE, "the content type must be application/grpc\n")
    } else {
        return None;
    };
    let mut response = Response::new(Guarded::plain(Body::new(axum::body::Body::from(text))));
    *response.status_mut() = status;
    Some(response)
}

pub(super) fn is_grpc(headers: &HeaderMap) -> bool {
    headers.get(header::CONTENT_TYPE).is_some_and(|value| {
        value
            .as_bytes()
            .strip_prefix(b"application/grpc")
            .is_some_and(|rest| matches!(rest.first(), None | Some(b';')) || rest == b"+proto")
    })
}

pub(super) fn is_grpc_web(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE);
    kind.is_some_and(|value| value.as_bytes().starts_with(b"application/grpc-web"))
}

/// Whether the body is of a type that the Connect protocol has.
pub(super) fn is_connect(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    let kind = kind.unwrap_or_default().split(';').next().unwrap_or_default().trim();
    matches!(kind, "application/json" | "application/proto")
        || kind.starts_with("application/connect+")
}

/// Refuses `-bin` metadata that is not base64.
pub(super) fn check_binary_metadata(headers: &HeaderMap) -> Result<(), Error> {
    use base64::{Engine as _, engine::general_purpose::STANDARD_NO_PAD};
    for (name, value) in headers {
        if !name.as_str().ends_with("-bin") {
            continue;
        }
        // Several values may be joined by commas.
        let joined = value.as_bytes().split(|byte| *byte == b',');
        for part in joined {
            let part = part.trim_ascii();
            let unpadded = part.strip_suffix(b"==").or(part.strip_suffix(b"=")).unwrap_or(part);
            if STANDARD_NO_PAD.decode(unpadded).is_err() {
                return Err(Error::invalid(
                    name.as_str(),
                    "is not base64, as `-bin` metadata must be",
                ));
            }
        }
    }
    Ok(())
}

/// How long a call may last, for handlers that wait for something.
#[derive(Clone, Copy, Debug)]
pub struct CallTimeout(pub Duration);

/// The client's deadline, as time from now.
pub(super) fn timeout(headers: &HeaderMap) -> Result<Option<Duration>, Error> {
    let Some(value) = headers.get("grpc-timeout") else { return Ok(None) };
    let parsed = value.to_str().ok().and_then(|text| {
        let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
        if !(1..=8).contains(&digits.len()) || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        let n: u64 = digits.parse().ok()?;
        Some(match unit {
            "H" => Duration::from_secs(n * 3_600),
            "M" => Duration::from_secs(n * 60),
            "S" => Duration::from_secs(n),
            "m" => Duration::from_millis(n),
            "u" => Duration::from_micros(n),
            "n" => Duration::from_nanos(n),
            _ => return None,
        })
    });
    match parsed {
        Some(timeout) => Ok(Some(timeout)),
        None => Err(Error::invalid(
            "grpc-timeout",
            "must be 1 to 8 digits and one of the units H, M, S, m, u, n",
        )),
    }
}

/// Makes correlation ids that no two processes share.
pub(super) struct Ids {
    prefix: u64,
    next: AtomicU64,
}

impl Ids {
    pub(super) fn new(entropy: &Entropy) -> Self {
        Self { prefix: entropy.u64(), next: AtomicU64::new(entropy.u64() >> 32) }
    }

    /// The client's id if it is harmless, else a new one.
    pub(super) fn of(&self, headers: &HeaderMap) -> Arc<str> {
        let theirs = headers.get(&CORRELATION).and_then(|value| value.to_str().ok());
        let harmless = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:/".contains(&byte);
        match theirs {
            Some(id) if (1..=128).contains(&id.len()) && id.bytes().all(harmless) => id.into(),
            _ => {
                let n = self.next.fetch_add(1, Ordering::Relaxed);
                format!("{:016x}{n:08x}", self.prefix).into()
            }
        }
    }
}
