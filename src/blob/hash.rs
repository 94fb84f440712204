//! SHA-256 that can be put aside and gone on with: an upload that was cut off is resumed without
//! reading again what has come.

use std::fmt;

use serde::{Deserialize, Serialize};
use sha2::{compress256, digest::generic_array::GenericArray};

use super::Digest;

const BLOCK: usize = 64;

/// First words of the hash (FIPS 180-4, section 5.3.3).
const START: [u32; 8] = [
    0x6a09_e667,
    0xbb67_ae85,
    0x3c6e_f372,
    0xa54f_f53a,
    0x510e_527f,
    0x9b05_688c,
    0x1f83_d9ab,
    0x5be0_cd19,
];

/// A hash under way.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hasher {
    words: [u32; 8],
    /// Bytes that do not fill a block yet.
    rest: Vec<u8>,
    length: u64,
}

impl Default for Hasher {
    fn default() -> Self {
        Self { words: START, rest: Vec::new(), length: 0 }
    }
}

impl fmt::Debug for Hasher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Hasher({} bytes)", self.length)
    }
}

impl Hasher {
    /// Bytes so far.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Takes the next bytes.
    pub fn update(&mut self, mut bytes: &[u8]) {
        self.length += bytes.len() as u64;
        if !self.rest.is_empty() {
            let taken = bytes.len().min(BLOCK - self.rest.len());
            self.rest.extend_from_slice(&bytes[..taken]);
            bytes = &bytes[taken..];
            if self.rest.len() < BLOCK {
                return;
            }
            compress256(&mut self.words, &[*GenericArray::from_slice(&self.rest)]);
            self.rest.clear();
        }
        let mut blocks = bytes.chunks_exact(BLOCK);
        for block in &mut blocks {
            let block = GenericArray::from_slice(block);
            compress256(&mut self.words, std::slice::from_ref(block));
        }
        self.rest.extend_from_slice(blocks.remainder());
    }

    /// The digest of all bytes.
    pub fn finish(mut self) -> Digest {
        let bits = self.length * 8;
        let mut padding = vec![0x80_u8];
        while (self.rest.len() + padding.len()) % BLOCK != BLOCK - 8 {
            padding.push(0);
        }
        padding.extend_from_slice(&bits.to_be_bytes());
        self.update(&padding);
        let mut digest = [0; 32];
        for (bytes, word) in digest.chunks_exact_mut(4).zip(self.words) {
            bytes.copy_from_slice(&word.to_be_bytes());
        }
        Digest(digest)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use sha2::{Digest as _, Sha256};

    use super::*;

    proptest! {
        #[test]
        fn pieces_and_pauses_do_not_change_the_digest(
            pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 0..12)
        ) {
            let mut hasher = Hasher::default();
            for piece in &pieces {
                hasher.update(piece);
                let saved = serde_json::to_string(&hasher).unwrap();
                hasher = serde_json::from_str(&saved).unwrap();
            }
            let whole = pieces.concat();
            prop_assert_eq!(hasher.length(), whole.len() as u64);
            prop_assert_eq!(hasher.finish(), Digest(Sha256::digest(&whole).into()));
        }
    }
}
