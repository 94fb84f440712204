//! What headers say of an artifact's bytes, and which of them a request's headers ask for.

use std::fmt::Write as _;

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};

use crate::{
    error::{Error, Result},
    pb,
};

/// Headers of every answer about an artifact.
pub fn describe(artifact: &pb::Artifact, etag: &str, inline: bool) -> Result<HeaderMap> {
    let mut headers = HeaderMap::new();
    let mut put = |name: HeaderName, value: &str| -> Result<()> {
        headers.insert(name, HeaderValue::try_from(value).map_err(Error::internal)?);
        Ok(())
    };
    put(header::CONTENT_TYPE, &artifact.mime_type)?;
    put(header::ETAG, etag)?;
    put(header::ACCEPT_RANGES, "bytes")?;
    // The bytes never change, but who may see them does.
    put(header::CACHE_CONTROL, "private, no-cache")?;
    put(header::CONTENT_DISPOSITION, &disposition(&artifact.name, inline))?;
    put(header::X_CONTENT_TYPE_OPTIONS, "nosniff")?;
    put(header::CONTENT_SECURITY_POLICY, "sandbox; default-src 'none'")?;
    put(header::REFERRER_POLICY, "no-referrer")?;
    Ok(headers)
}

/// `Content-Disposition` with the name for old and new programs (RFC 6266).
fn disposition(name: &str, inline: bool) -> String {
    let kind = if inline { "inline" } else { "attachment" };
    let plain: String = name
        .chars()
        .map(|c| {
            if c.is_ascii_graphic() && !matches!(c, '"' | '\\' | '%') || c == ' ' { c } else { '_' }
        })
        .collect();
    let mut text = format!("{kind}; filename=\"{plain}\"");
    if plain != name {
        text.push_str("; filename*=UTF-8''");
        for byte in name.bytes() {
            if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
                text.push(char::from(byte));
            } else {
                // A text takes whatever is written.
                let _ = write!(text, "%{byte:02X}");
            }
        }
    }
    text
}

/// What the conditions of a request say, where they say that the bytes are not wanted.
pub fn conditions(headers: &HeaderMap, etag: &str) -> Option<StatusCode> {
    let lists = |name: HeaderName, weak: bool| {
        let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
        let mut tags = values.flat_map(|value| value.split(',')).map(str::trim);
        tags.any(|tag| {
            let tag = if weak { tag.strip_prefix("W/").unwrap_or(tag) } else { tag };
            tag == "*" || tag == etag
        })
    };
    if headers.contains_key(header::IF_MATCH) && !lists(header::IF_MATCH, false) {
        return Some(StatusCode::PRECONDITION_FAILED);
    }
    lists(header::IF_NONE_MATCH, true).then_some(StatusCode::NOT_MODIFIED)
}

/// Which bytes a request wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Range {
    /// All of them.
    Whole,
    /// First, and how many: at least one.
    Part(u64, u64),
    /// None that are there.
    Unsatisfiable,
}

/// Reads `Range` and `If-Range` (RFC 9110, section 14). What is malformed, or asks for several
/// ranges, is ignored, as it may be.
pub fn range(headers: &HeaderMap, etag: &str, whole: u64) -> Range {
    let text = |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
    if headers.get_all(header::RANGE).iter().count() != 1 {
        return Range::Whole;
    }
    // A date is never the newest that the bytes have: they have none.
    if headers.contains_key(header::IF_RANGE) && text(header::IF_RANGE) != Some(etag) {
        return Range::Whole;
    }
    let Some(spec) = text(header::RANGE).and_then(|value| value.strip_prefix("bytes=")) else {
        return Range::Whole;
    };
    let Some((first, last)) = spec.trim().split_once('-') else { return Range::Whole };
    let number = |text: &str| {
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        // More than can be counted is more than there is.
        digits.then(|| text.parse().unwrap_or(u64::MAX))
    };
    match (number(first), number(last)) {
        (None, Some(suffix)) if first.is_empty() => match suffix.min(whole) {
            0 => Range::Unsatisfiable,
            length => Range::Part(whole - length, length),
        },
        (Some(first), None) if last.is_empty() && first < whole => {
            Range::Part(first, whole - first)
        }
        (Some(first), Some(last)) if first <= last && first < whole => {
            Range::Part(first, last.min(whole - 1) - first + 1)
        }
        (Some(first), Some(last)) if first > last => Range::Whole,
        (Some(_), Some(_)) => Range::Unsatisfiable,
        (Some(_), None) if last.is_empty() => Range::Unsatisfiable,
        _ => Range::Whole,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ETAG: &str = "\"abc\"";

    fn with(headers: &[(HeaderName, &str)]) -> HeaderMap {
        headers.iter().map(|(n, v)| (n.clone(), HeaderValue::try_from(*v).unwrap())).collect()
    }

    #[test]
    fn ranges_are_read_as_the_standard_says() {
        use Range::{Part, Unsatisfiable, Whole};
        for (text, whole, expected) in [
            ("bytes=0-0", 10, Part(0, 1)),
            ("bytes=0-9", 10, Part(0, 10)),
            ("bytes=3-5", 10, Part(3, 3)),
            ("bytes=3-", 10, Part(3, 7)),
            ("bytes=9-100", 10, Part(9, 1)),
            ("bytes=-4", 10, Part(6, 4)),
            ("bytes=-100", 10, Part(0, 10)),
            ("bytes=0-99999999999999999999999", 10, Part(0, 10)),
            ("bytes=-0", 10, Unsatisfiable),
            ("bytes=10-", 10, Unsatisfiable),
            ("bytes=10-11", 10, Unsatisfiable),
            ("bytes=99999999999999999999999-", 10, Unsatisfiable),
            ("bytes=0-", 0, Unsatisfiable),
            ("bytes=-1", 0, Unsatisfiable),
            ("bytes=5-3", 10, Whole),
            ("bytes=1-2,4-5", 10, Whole),
            ("bytes=", 10, Whole),
            ("bytes=-", 10, Whole),
            ("bytes=a-b", 10, Whole),
            ("bytes=+1-2", 10, Whole),
            ("bytes=1-2x", 10, Whole),
            ("items=1-2", 10, Whole),
            ("1-2", 10, Whole),
        ] {
            assert_eq!(range(&with(&[(header::RANGE, text)]), ETAG, whole), expected, "{text}");
        }
        assert_eq!(range(&HeaderMap::new(), ETAG, 10), Whole);
    }

    #[test]
    fn a_range_of_other_bytes_is_not_given() {
        let wanted = (header::RANGE, "bytes=1-2");
        for (condition, expected) in [
            (ETAG, Range::Part(1, 2)),
            ("\"other\"", Range::Whole),
            ("W/\"abc\"", Range::Whole),
            ("Wed, 21 Oct 2015 07:28:00 GMT", Range::Whole),
        ] {
            let headers = with(&[wanted.clone(), (header::IF_RANGE, condition)]);
            assert_eq!(range(&headers, ETAG, 10), expected, "{condition}");
        }
    }

    #[test]
    fn conditions_are_of_the_digest() {
        let said = |name, value| conditions(&with(&[(name, value)]), ETAG);
        assert_eq!(said(header::IF_NONE_MATCH, ETAG), Some(StatusCode::NOT_MODIFIED));
        assert_eq!(said(header::IF_NONE_MATCH, "\"x\", W/\"abc\""), Some(StatusCode::NOT_MODIFIED));
        assert_eq!(said(header::IF_NONE_MATCH, "*"), Some(StatusCode::NOT_MODIFIED));
        assert_eq!(said(header::IF_NONE_MATCH, "\"x\""), None);
        assert_eq!(said(header::IF_MATCH, ETAG), None);
        assert_eq!(said(header::IF_MATCH, "\"x\""), Some(StatusCode::PRECONDITION_FAILED));
        assert_eq!(said(header::IF_MATCH, "W/\"abc\""), Some(StatusCode::PRECONDITION_FAILED));
    }

    #[test]
    fn no_name_leaves_its_header() {
        assert_eq!(disposition("a b.png", false), "attachment; filename=\"a b.png\"");
        assert_eq!(
            disposition("a\"; x=\"y", true),
            "inline; filename=\"a_; x=_y\"; filename*=UTF-8''a%22%3B%20x%3D%22y"
        );
        assert_eq!(
            disposition("ü.txt", false),
            "attachment; filename=\"_.txt\"; filename*=UTF-8''%C3%BC.txt"
        );
    }
}
