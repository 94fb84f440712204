//! Typed ids, and the randomness that they and jitter are made of.

use std::{cell::RefCell, fmt, str::FromStr, sync::Arc};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::clock::Micros;

/// Makes an id type: a `UUIDv7`, so that ids sort by creation.
macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub Uuid);

        impl $name {
            /// Before all ids.
            pub const MIN: Self = Self(Uuid::nil());
            /// After all ids.
            pub const MAX: Self = Self(Uuid::max());

            /// Before all ids made at `time`, and after those made a millisecond earlier.
            pub fn first_at(time: Micros) -> Self {
                let millis = u64::try_from(time.0 / 1000).unwrap_or(0);
                Self(uuid::Builder::from_unix_timestamp_millis(millis, &[0; 10]).into_uuid())
            }

            /// A new id, made at `now`.
            pub fn new(now: Micros, entropy: &Entropy) -> Self {
                let millis = u64::try_from(now.0 / 1000).unwrap_or(0);
                let mut random = [0; 10];
                entropy.fill(&mut random);
                Self(uuid::Builder::from_unix_timestamp_millis(millis, &random).into_uuid())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.as_hyphenated().fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = uuid::Error;
            fn from_str(s: &str) -> Result<Self, Self::Err> {
                Uuid::try_parse(s).map(Self)
            }
        }
    };
}

id! {
    /// A task's id.
    TaskId
}
id! {
    /// An artifact's id.
    ArtifactId
}
id! {
    /// The id of an upload under way.
    UploadId
}

id! {
    /// The id of a server among others, made anew at each start of its process.
    InstanceId
}

/// Makes a cheaply cloned name type.
macro_rules! name {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub Arc<str>);

        impl $name {
            /// The text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl From<&str> for $name {
            fn from(s: &str) -> Self {
                Self(s.into())
            }
        }

        impl From<String> for $name {
            fn from(s: String) -> Self {
                Self(s.into())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&*self.0, f)
            }
        }
    };
}

name! {
    /// The tenant.
    Namespace
}
name! {
    /// A runner's stable name, unique in its namespace.
    RunnerId
}

impl Namespace {
    /// The operator's namespace, and the only one until keys name others.
    pub const DEFAULT: &'static str = "default";
}

/// Randomness of the operating system, asked for many ids at once: a call of its own for each is
/// a fiftieth of what a task costs. What was given is not kept.
struct Pool {
    bytes: [u8; 1024],
    n_left: usize,
}

thread_local! {
    static POOL: RefCell<Pool> = const { RefCell::new(Pool { bytes: [0; 1024], n_left: 0 }) };
}

impl Pool {
    /// Longest piece.
    const LARGEST: usize = 16;

    fn take(&mut self, buf: &mut [u8]) -> Result<(), getrandom::Error> {
        if self.n_left < buf.len() {
            getrandom::fill(&mut self.bytes)?;
            self.n_left = self.bytes.len();
        }
        let given = &mut self.bytes[self.n_left - buf.len()..self.n_left];
        buf.copy_from_slice(given);
        given.fill(0);
        self.n_left -= buf.len();
        Ok(())
    }
}

/// Randomness as a port: the system's, or a seeded stream for simulations.
#[derive(Clone, Debug, Default)]
pub struct Entropy(Option<Arc<Mutex<u64>>>);

impl Entropy {
    /// The operating system's randomness.
    pub fn system() -> Self {
        Self(None)
    }

    /// The same stream for the same seed.
    pub fn seeded(seed: u64) -> Self {
        Self(Some(Arc::new(Mutex::new(seed))))
    }

    /// Fills `buf` with random bytes. What is longer than an id, such as a key, is asked of the
    /// operating system by itself.
    ///
    /// # Panics
    /// When the operating system has no randomness to give.
    #[expect(clippy::expect_used, reason = "no key may ever be made without randomness")]
    pub fn fill(&self, buf: &mut [u8]) {
        match &self.0 {
            None if buf.len() <= Pool::LARGEST => {
                POOL.with_borrow_mut(|pool| pool.take(buf))
                    .expect("the operating system's randomness");
            }
            None => getrandom::fill(buf).expect("the operating system's randomness"),
            Some(_) => {
                for chunk in buf.chunks_mut(8) {
                    chunk.copy_from_slice(&self.u64().to_le_bytes()[..chunk.len()]);
                }
            }
        }
    }

    /// A random number.
    pub fn u64(&self) -> u64 {
        match &self.0 {
            None => {
                let mut bytes = [0; 8];
                self.fill(&mut bytes);
                u64::from_le_bytes(bytes)
            }
            // SplitMix64.
            Some(state) => {
                let mut state = state.lock();
                *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
                let mut z = *state;
                z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
                z ^ (z >> 31)
            }
        }
    }

    /// A random number in `0.0..1.0`.
    pub fn unit(&self) -> f64 {
        (self.u64() >> 11) as f64 / (1_u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn randomness_does_not_repeat_whatever_is_asked_for() {
        let entropy = Entropy::system();
        let mut seen = HashSet::new();
        for i in 0..3_000 {
            let mut bytes = vec![0; 8 + i % 40];
            entropy.fill(&mut bytes);
            // The last bytes too, where a piece runs over what is left.
            let last = bytes.split_off(bytes.len() - 8);
            assert!(seen.insert(last.clone()), "{last:?} came twice");
        }
    }
}
