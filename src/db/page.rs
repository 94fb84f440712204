//! Page tokens: an opaque cursor that is bound to the list's filter.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

/// Page size from the wire: `default` for 0, lowered to `most`, refused below 0.
pub fn size(value: i32, default: u32, most: u32) -> Result<u32> {
    match u32::try_from(value) {
        Ok(0) => Ok(default),
        Ok(value) => Ok(value.min(most)),
        Err(_) => Err(Error::invalid("page_size", format!("{value} is negative"))),
    }
}

/// A token that continues after `cursor` in the list filtered by `filter`.
pub fn token(filter: &impl std::fmt::Debug, cursor: &str) -> String {
    URL_SAFE_NO_PAD.encode(format!("{}{cursor}", digest(filter)))
}

/// The cursor of a token; `None` for the first page.
pub fn cursor(filter: &impl std::fmt::Debug, token: &str) -> Result<Option<String>> {
    if token.is_empty() {
        return Ok(None);
    }
    let text = URL_SAFE_NO_PAD.decode(token).ok().and_then(|bytes| String::from_utf8(bytes).ok());
    match text.as_deref().and_then(|text| text.strip_prefix(&digest(filter))) {
        Some(cursor) => Ok(Some(cursor.to_owned())),
        None => Err(Error::invalid(
            "page_token",
            "is not a token of this list; use next_page_token with the same filter",
        )),
    }
}

fn digest(filter: &impl std::fmt::Debug) -> String {
    hex::encode(&Sha256::digest(format!("{filter:?}"))[..8])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_serves_only_the_list_it_came_from() {
        let token = token(&("a", 1), "cursor");
        assert_eq!(cursor(&("a", 1), &token).unwrap().as_deref(), Some("cursor"));
        assert!(cursor(&("b", 1), &token).is_err());
        assert!(cursor(&("a", 1), "garbage!").is_err());
        assert!(cursor(&("a", 1), "").unwrap().is_none());
    }
}
