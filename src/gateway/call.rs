//! One gRPC call in this process, made of an HTTP request, and what of the headers goes with it.

use std::time::Duration;

use bytes::{BufMut as _, Bytes, BytesMut};
use http::{
    Extensions, HeaderMap, HeaderName, HeaderValue, Method, Request, Version,
    header::{self, AUTHORIZATION},
};
use http_body_util::Full;

use super::bind::Query;
use crate::error::{Error, Kind, Reason, Result};

/// A deadline that is easier to write than `grpc-timeout`: `30s`, `1.5s`, `500ms`.
pub const REQUEST_TIMEOUT: HeaderName = HeaderName::from_static("x-request-timeout");

const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");

/// Bytes before a message: whether it is compressed, and its length.
pub const PREFIX: usize = 5;

/// Headers that are metadata too, besides those that begin with `x-`.
const METADATA: [HeaderName; 4] = [
    AUTHORIZATION,
    HeaderName::from_static("traceparent"),
    HeaderName::from_static("tracestate"),
    HeaderName::from_static("baggage"),
];

/// The gRPC request of a call.
pub fn request(
    path: &str,
    message: &[u8],
    headers: HeaderMap,
    extensions: Extensions,
) -> Result<Request<Full<Bytes>>> {
    let mut body = BytesMut::with_capacity(PREFIX + message.len());
    body.put_u8(0);
    let length = u32::try_from(message.len()).map_err(|_| too_large(u64::from(u32::MAX)))?;
    body.put_u32(length);
    body.put_slice(message);
    let mut request = Request::new(Full::new(body.freeze()));
    *request.method_mut() = Method::POST;
    *request.uri_mut() = path.parse().map_err(Error::internal)?;
    *request.version_mut() = Version::HTTP_2;
    *request.headers_mut() = headers;
    *request.extensions_mut() = extensions;
    Ok(request)
}

/// The metadata of a call, from the headers of a request.
pub fn metadata(headers: &HeaderMap) -> Result<HeaderMap> {
    let mut metadata = HeaderMap::with_capacity(8);
    for (name, value) in headers {
        if *name != REQUEST_TIMEOUT && is_metadata(name) {
            metadata.append(name, value.clone());
        }
    }
    let timeout = match (headers.get(GRPC_TIMEOUT), headers.get(REQUEST_TIMEOUT)) {
        (Some(_), Some(_)) => {
            let both = "must not come together with grpc-timeout";
            return Err(Error::invalid(REQUEST_TIMEOUT.as_str(), both));
        }
        (Some(value), None) => Some(value.clone()),
        (None, Some(value)) => Some(grpc_timeout(value)?),
        (None, None) => None,
    };
    metadata.extend(timeout.map(|value| (GRPC_TIMEOUT, value)));
    metadata.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    metadata.insert(header::TE, HeaderValue::from_static("trailers"));
    Ok(metadata)
}

/// Whether a header and a metadata entry of that name are the same thing.
pub fn is_metadata(name: &HeaderName) -> bool {
    name.as_str().starts_with("x-") || METADATA.contains(name)
}

fn grpc_timeout(value: &HeaderValue) -> Result<HeaderValue> {
    let parsed = value.to_str().ok().and_then(|text| {
        let (number, unit) = match text.strip_suffix("ms") {
            Some(number) => (number, 1e-3),
            None => (text.strip_suffix('s').unwrap_or(text), 1.0),
        };
        let digits = |c: char| c.is_ascii_digit() || c == '.';
        if !number.starts_with(|c: char| c.is_ascii_digit()) || !number.chars().all(digits) {
            return None;
        }
        Duration::try_from_secs_f64(number.parse::<f64>().ok()? * unit).ok()
    });
    parsed.and_then(in_grpc).ok_or_else(|| {
        Error::invalid(REQUEST_TIMEOUT.as_str(), "must be a time such as `30s` or `500ms`")
    })
}

/// A time as `grpc-timeout`, which has at most eight digits.
fn in_grpc(timeout: Duration) -> Option<HeaderValue> {
    let text = match timeout.as_millis() {
        millis @ ..=99_999_999 => format!("{millis}m"),
        millis if millis / 1_000 <= 99_999_999 => format!("{}S", millis / 1_000),
        _ => return None,
    };
    HeaderValue::try_from(text).ok()
}

/// Sets the deadline of a call from `connect-timeout-ms`, if there is one.
pub fn take_connect_timeout(headers: &HeaderMap, metadata: &mut HeaderMap) -> Result<()> {
    const NAME: &str = "connect-timeout-ms";
    let Some(value) = headers.get(NAME) else { return Ok(()) };
    let digits = value.to_str().ok().filter(|text| {
        (1..=10).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit())
    });
    let timeout = digits.and_then(|text| text.parse().ok()).map(Duration::from_millis);
    let timeout = timeout.and_then(in_grpc);
    let timeout = timeout.ok_or_else(|| Error::invalid(NAME, "must be 1 to 10 digits"))?;
    metadata.insert(GRPC_TIMEOUT, timeout);
    Ok(())
}

/// Takes a token out of the query and puts it where credentials are: a browser's `EventSource`
/// sends no headers. Only tokens are taken, which live minutes and open one task: a key would
/// stay in histories and in the logs of proxies.
pub fn take_token(query: &mut Query<'_>, headers: &mut HeaderMap) -> Result<()> {
    let Some(at) = query.iter().position(|(name, _)| name == "access_token") else {
        return Ok(());
    };
    let (_, token) = query.remove(at);
    let unauthenticated =
        |message: &str| Error::new(Kind::Unauthenticated, Reason::Unauthenticated, message);
    if token.starts_with("bt_") {
        return Err(unauthenticated(
            "a key does not belong into a URL; get a token for the task from KeyService.IssueToken",
        ));
    }
    let value = HeaderValue::try_from(format!("Bearer {token}"));
    let mut value = value.map_err(|_| unauthenticated("`access_token` is malformed"))?;
    value.set_sensitive(true);
    // A second credential is refused, as ever.
    headers.append(AUTHORIZATION, value);
    Ok(())
}

/// A body over its limit.
pub fn too_large(limit: u64) -> Error {
    Error::new(
        Kind::ResourceExhausted,
        Reason::MessageTooLarge,
        "the body is larger than the limit; large bodies belong in artifacts",
    )
    .with("limit_bytes", limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_become_grpc_timeouts() {
        for (text, expected) in [
            ("30s", "30000m"),
            ("1.5s", "1500m"),
            ("500ms", "500m"),
            ("2", "2000m"),
            ("0s", "0m"),
            ("604800s", "604800S"),
        ] {
            let value = grpc_timeout(&HeaderValue::from_static(text)).unwrap();
            assert_eq!(value, expected, "{text}");
        }
        for text in ["", "s", "-1s", "1e3s", "1m", "soon", "1.2.3s", "99999999999s", "inf"] {
            assert!(grpc_timeout(&HeaderValue::from_static(text)).is_err(), "{text}");
        }
    }

    #[test]
    fn only_credentials_traces_and_own_headers_go_along() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("host", "example.org"),
            ("cookie", "a=b"),
            ("connection", "upgrade"),
            ("content-encoding", "gzip"),
            ("grpc-status", "0"),
            ("authorization", "Bearer x"),
            ("x-api-key", "y"),
            ("x-request-timeout", "1s"),
        ] {
            headers.insert(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        let metadata = metadata(&headers).unwrap();
        let mut names: Vec<_> = metadata.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["authorization", "content-type", "grpc-timeout", "te", "x-api-key"]);
    }

    #[test]
    fn a_key_in_the_query_is_refused_and_a_token_leaves_it() {
        let mut headers = HeaderMap::new();
        let mut query: Query<'_> = vec![("access_token".into(), "bt_id_secret".into())];
        assert!(take_token(&mut query, &mut headers).is_err());
        let mut query: Query<'_> =
            vec![("from_sequence".into(), "2".into()), ("access_token".into(), "btt_x".into())];
        take_token(&mut query, &mut headers).unwrap();
        assert_eq!(query.len(), 1);
        assert_eq!(headers[AUTHORIZATION], "Bearer btt_x");
        assert!(headers[AUTHORIZATION].is_sensitive());
    }
}
