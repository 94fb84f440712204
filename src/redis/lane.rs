//! Lanes: one stream each, for work that the same consumers can do and that is equally urgent.

use std::{fmt, sync::Arc};

use super::{Error, Result};

/// Longest name of a lane, in bytes.
const MAX_LANE: usize = 512;

/// The name of a lane: `account:variant:band`. Clones share it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lane(Arc<str>);

impl Lane {
    /// The lane of an account (whose depth is limited; any text), a variant of its work (without
    /// colons) and a band of urgency. What the bands mean is up to those who order lanes.
    pub fn new(account: &str, variant: &str, band: u8) -> Result<Self> {
        let name = format!("{account}:{variant}:{band}");
        let fault = if account.is_empty() {
            "has no account".to_owned()
        } else if variant.contains(':') {
            format!("has a colon in its variant `{variant}`")
        } else if name.len() > MAX_LANE {
            format!("has a name of {} bytes, {MAX_LANE} are allowed", name.len())
        } else {
            return Ok(Self(name.into()));
        };
        Err(Error::Settings { field: "lane", problem: fault })
    }

    /// A lane by its name.
    pub fn parse(name: &str) -> Option<Self> {
        let (rest, band) = name.rsplit_once(':')?;
        let (account, variant) = rest.rsplit_once(':')?;
        Self::new(account, variant, band.parse().ok()?).ok().filter(|lane| lane.as_str() == name)
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whose depth it counts to.
    pub fn account(&self) -> &str {
        self.split().0
    }

    /// Which of the account's work it is.
    pub fn variant(&self) -> &str {
        self.split().1
    }

    /// How urgent it is.
    pub fn band(&self) -> u8 {
        self.split().2.parse().unwrap_or(0)
    }

    fn split(&self) -> (&str, &str, &str) {
        let (rest, band) = self.0.rsplit_once(':').unwrap_or(("", ""));
        let (account, variant) = rest.rsplit_once(':').unwrap_or(("", ""));
        (account, variant, band)
    }
}

impl fmt::Display for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&*self.0, f)
    }
}

/// A lane that exists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaneInfo {
    /// Which.
    pub lane: Lane,
    /// What whoever first used it said of it; tells consumers whether they can do its work.
    pub info: bytes::Bytes,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lane_is_its_name_and_its_parts_whatever_the_account_is_called() {
        for account in ["a", "team:a/meta/llama", "mit Leerraum", "::"] {
            let lane = Lane::new(account, "v1-00ff", 3).unwrap();
            assert_eq!(Lane::parse(lane.as_str()), Some(lane.clone()));
            assert_eq!((lane.account(), lane.variant(), lane.band()), (account, "v1-00ff", 3));
        }
        assert!(Lane::new("a", "b:c", 0).is_err());
        assert!(Lane::new("", "b", 0).is_err());
        assert!(Lane::new(&"x".repeat(600), "b", 0).is_err());
        for name in ["", "a", "a:b", "a:b:x", "a:b:300", "a:b:007", ":b:1"] {
            assert_eq!(Lane::parse(name), None, "{name}");
        }
    }
}
