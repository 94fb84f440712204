//! Artifacts between domain and wire, and what a task's input refers to.

use std::{collections::BTreeSet, time::Duration};

use prost::Message as _;

use super::{
    keep::Target,
    model::{Artifact, Collected, Spec, Upload},
};
use crate::{
    blob::Digest,
    error::{Error, Result, Violation},
    events::frame::timestamp,
    id::{ArtifactId, TaskId, UploadId},
    keys::Receipts,
    pb,
};

/// The member whose object stands for an artifact in a task's input.
const REFERENCE: &str = "$artifact";
/// Most artifacts that one task reads.
const MAX_REFERENCES: usize = 1_000;
/// Longest name, in bytes.
const MAX_NAME: usize = 255;
/// Longest media type, in bytes.
const MAX_MIME_TYPE: usize = 255;
/// Longest type.
const MAX_TYPE: usize = 32;
/// Longest lifetime.
const MAX_TTL: Duration = Duration::from_hours(24 * 3_660);
/// Media type when none is given.
const BYTES: &str = "application/octet-stream";

/// What an artifact shall be, checked; every bad field is named.
pub fn spec(spec: Option<pb::ArtifactSpec>) -> Result<Spec> {
    let Some(wire) = spec else { return Err(Error::invalid("spec", "is required")) };
    let mut violations = Vec::new();
    let mut refuse = |field: &str, description: String| {
        violations.push(Violation { field: format!("spec.{field}"), description });
    };
    if let Some(what) = name_fault(&wire.name) {
        refuse("name", what);
    }
    let mime_type = if wire.mime_type.is_empty() { BYTES.to_owned() } else { wire.mime_type };
    if !is_mime_type(&mime_type) {
        refuse(
            "mime_type",
            format!("`{}` is no media type, such as `image/png`", mime_type.escape_debug()),
        );
    }
    let kind = if wire.r#type.is_empty() {
        let half = mime_type.split('/').next().unwrap_or_default().to_ascii_lowercase();
        if is_type(&half) { half } else { "application".into() }
    } else {
        wire.r#type
    };
    if !is_type(&kind) {
        refuse(
            "type",
            format!("must have 1 to {MAX_TYPE} characters of a-z, 0-9 and -, a letter first"),
        );
    }
    let digest = match wire.sha256.as_str() {
        "" => None,
        text => {
            let digest = text.parse::<Digest>();
            if digest.is_err() {
                refuse("sha256", "must have 64 lower-case hexadecimal digits".into());
            }
            digest.ok()
        }
    };
    let ttl = wire.ttl.map(Duration::try_from).transpose().ok().flatten();
    if wire.ttl.is_some() && !ttl.is_some_and(|ttl| !ttl.is_zero() && ttl <= MAX_TTL) {
        refuse("ttl", "must be more than zero, at most 10 years".into());
    }
    if wire.size_bytes.is_some_and(|size| i64::try_from(size).is_err()) {
        refuse("size_bytes", "is larger than any artifact can be".into());
    }
    if !violations.is_empty() {
        return Err(Error::invalid_all(violations));
    }
    Ok(Spec { name: wire.name, kind, mime_type, size: wire.size_bytes, digest, ttl })
}

/// What is wrong with a name. Names are for people, and yet none should surprise the program that
/// saves a file under it.
fn name_fault(name: &str) -> Option<String> {
    // Marks that turn text around make a name look like another.
    let hidden = |c: char| {
        c.is_control()
            || matches!(c, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}')
    };
    if name.is_empty() || name.len() > MAX_NAME {
        return Some(format!("must have 1 to {MAX_NAME} bytes, not {}", name.len()));
    }
    if let Some(c) = name.chars().find(|c| matches!(c, '/' | '\\') || hidden(*c)) {
        return Some(format!("must not contain `{}`", c.escape_default()));
    }
    if matches!(name, "." | "..") || name.trim() != name {
        return Some("must not be `.` or `..`, nor begin or end with a space".into());
    }
    None
}

/// Whether it is a type of artifacts.
fn is_type(text: &str) -> bool {
    let sound = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    text.len() <= MAX_TYPE
        && text.starts_with(|c: char| c.is_ascii_lowercase())
        && text.chars().all(sound)
}

/// Whether it is a media type, with or without parameters, and nothing but one in a header.
fn is_mime_type(text: &str) -> bool {
    let token = |text: &str| {
        !text.is_empty()
            && text.chars().all(|c| c.is_ascii_alphanumeric() || "!#$&-^_.+".contains(c))
    };
    let (essence, parameters) = text.split_once(';').unwrap_or((text, ""));
    text.len() <= MAX_MIME_TYPE
        && essence.trim_end().split_once('/').is_some_and(|(a, b)| token(a) && token(b))
        && parameters.chars().all(|c| c == ' ' || c.is_ascii_graphic())
}

/// An artifact's id.
pub fn artifact_id(text: &str) -> Result<ArtifactId> {
    text.parse().map_err(|_| Error::invalid("artifact_id", "must be an artifact's id, a UUID"))
}

/// An upload's id.
pub fn upload_id(text: &str) -> Result<UploadId> {
    text.parse().map_err(|_| Error::invalid("upload_id", "must be an upload's id, a UUID"))
}

/// A task's id; `None` when empty.
pub fn task_id(text: &str) -> Result<Option<TaskId>> {
    if text.is_empty() {
        return Ok(None);
    }
    text.parse().map(Some).map_err(|_| Error::invalid("task_id", "must be a task's id, a UUID"))
}

/// A lifetime; `default` when unset.
pub fn ttl(ttl: Option<prost_types::Duration>, default: Duration) -> Result<Duration> {
    match ttl {
        None => Ok(default),
        Some(ttl) => ttl.try_into().map_err(|_| Error::invalid("ttl", "must not be negative")),
    }
}

/// An artifact, without its receipt.
pub fn artifact(artifact: &Artifact, url: String) -> pb::Artifact {
    let (task_id, attempt) = artifact.origin.attempt.unzip();
    pb::Artifact {
        artifact_id: artifact.id.to_string(),
        name: artifact.name.clone(),
        r#type: artifact.key.kind.clone(),
        mime_type: artifact.mime_type.clone(),
        size_bytes: artifact.size,
        sha256: artifact.key.digest.to_string(),
        url,
        create_time: Some(timestamp(artifact.create_time)),
        expires_at: artifact.expire_time.map(timestamp),
        task_id: task_id.map(|id| id.to_string()).unwrap_or_default(),
        attempt: attempt.unwrap_or(0),
        receipt: Default::default(),
    }
}

/// An artifact as its attempt gets it, with the receipt that lists it.
pub fn with_receipt(receipts: &Receipts, artifact: &Artifact, wire: pb::Artifact) -> pb::Artifact {
    let Some((task, attempt)) = artifact.origin.attempt else { return wire };
    let event = pb::ArtifactEvent {
        name: wire.name.clone(),
        r#type: wire.r#type.clone(),
        url: wire.url.clone(),
        size_bytes: wire.size_bytes,
        mime_type: wire.mime_type.clone(),
        sha256: wire.sha256.clone(),
        expires_at: wire.expires_at,
        artifact_id: wire.artifact_id.clone(),
    };
    let receipt = receipts.seal(task, attempt, &event.encode_to_vec());
    pb::Artifact { receipt: receipt.into(), ..wire }
}

/// An upload.
pub fn upload(upload: &Upload, received: u64, target: Option<Target>) -> pb::Upload {
    pb::Upload {
        upload_id: upload.id.to_string(),
        received_bytes: received,
        size_bytes: upload.spec.size.unwrap_or(0),
        expire_time: Some(timestamp(upload.expire_time)),
        target: target.map(|target| pb::UploadTarget {
            method: target.request.method,
            url: target.request.url,
            headers: target.request.headers.into_iter().collect(),
            expire_time: Some(timestamp(target.expire_time)),
        }),
        artifact_id: upload.artifact.map(|id| id.to_string()).unwrap_or_default(),
    }
}

/// What a collection did.
pub fn collected(collected: Collected) -> pb::CollectArtifactsResponse {
    let Collected { artifacts, uploads, files, bytes } = collected;
    pb::CollectArtifactsResponse { artifacts, uploads, files, bytes }
}

/// The artifacts that an input refers to: objects of one member, `{"$artifact": "<id>"}`.
pub fn references(input: &str) -> Result<Vec<ArtifactId>> {
    // Nearly every input has none.
    if !input.contains(REFERENCE) {
        return Ok(Vec::new());
    }
    let input: serde_json::Value = serde_json::from_str(input).map_err(Error::internal)?;
    let mut found = BTreeSet::new();
    let mut waiting = vec![&input];
    while let Some(value) = waiting.pop() {
        match value {
            serde_json::Value::Object(members) => match members.get(REFERENCE) {
                Some(id) if members.len() == 1 => {
                    let id = id.as_str().and_then(|id| id.parse().ok()).ok_or_else(|| {
                        let what = format!("`{REFERENCE}` must be an artifact's id, a UUID");
                        Error::invalid("spec.input", what)
                    })?;
                    found.insert(id);
                }
                _ => waiting.extend(members.values()),
            },
            serde_json::Value::Array(items) => waiting.extend(items),
            _ => {}
        }
    }
    if found.len() > MAX_REFERENCES {
        let what = format!("refers to {} artifacts, more than {MAX_REFERENCES}", found.len());
        return Err(Error::invalid("spec.input", what));
    }
    Ok(found.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wire(name: &str) -> pb::ArtifactSpec {
        pb::ArtifactSpec { name: name.into(), ..pb::ArtifactSpec::default() }
    }

    #[test]
    fn names_that_could_escape_or_deceive_are_refused() {
        for name in [
            "",
            ".",
            "..",
            "../x",
            "a/../b",
            "/etc/passwd",
            "a\\b",
            "a\0b",
            "a\nb",
            "\u{1b}[31m",
            " a",
            "a ",
            "cod.exe\u{202e}gpj",
            "a\u{200b}b",
            &"x".repeat(256),
            &"ä".repeat(128),
        ] {
            let error = spec(Some(wire(name))).unwrap_err();
            assert_eq!(error.violations()[0].field, "spec.name", "{name:?}");
        }
        for name in ["a", "a b.png", "ສະບາຍດີ.txt", "..a", "a..b", "CON", &"ä".repeat(127)]
        {
            assert_eq!(spec(Some(wire(name))).unwrap().name, name);
        }
    }

    #[test]
    fn types_come_from_the_media_type_and_are_prefixes_of_their_own() {
        let of = |mime: &str, kind: &str| {
            spec(Some(pb::ArtifactSpec {
                mime_type: mime.into(),
                r#type: kind.into(),
                ..wire("a")
            }))
        };
        assert_eq!(of("image/png", "").unwrap().kind, "image");
        assert_eq!(of("", "").unwrap().kind, "application");
        assert_eq!(of("text/plain; charset=utf-8", "log").unwrap().kind, "log");
        for kind in ["..", "a/b", "A", "-a", "1", &"a".repeat(33), "a_b", "ä"] {
            assert!(of("", kind).is_err(), "{kind}");
        }
        for mime in ["x", "a/", "/b", "a/b\r\nx: y", "a b/c", "a/b; \u{7f}", "a/ä"] {
            assert!(of(mime, "").is_err(), "{mime:?}");
        }
    }

    #[test]
    fn references_are_found_wherever_they_are_and_nothing_else_is_one() {
        let id = "0192f0c1-2345-7abc-8def-0123456789ab";
        let found = references(&format!(
            r#"{{"a":[{{"$artifact":"{id}"}}],"b":{{"c":{{"$artifact":"{id}"}}}},"d":"$artifact"}}"#
        ));
        assert_eq!(found.unwrap(), [id.parse().unwrap()]);
        assert!(references(r#"{"a":{"$artifact":"x","b":1}}"#).unwrap().is_empty());
        assert!(references(r#"{"a":{"$artifact":"../x"}}"#).is_err());
        assert!(references(r#"{"a":{"$artifact":7}}"#).is_err());
    }
}
