//! TLS on both sides: what a server shows and asks for ([`Acceptor`]), whom a client trusts
//! ([`Trust`]), and certificates of its own for development ([`own`]). Knows no noun of the
//! domain.
//!
//! All of it is rustls with one crypto provider. TLS 1.2 and 1.3 are spoken, nothing older.

mod accept;
mod dates;
pub mod own;
mod trust;

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::{CertificateDer, PrivateKeyDer, pem, pem::PemObject as _},
};

use crate::clock::Micros;
pub use accept::{Acceptor, Files, PLAIN, Refused, Replay};
pub use trust::Trust;

/// Certificates or keys that cannot be used. Each message names the file.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read or written.
    #[error("cannot {doing} {}: {problem}", path.display())]
    File {
        /// What was tried: `read` or `write`.
        doing: &'static str,
        /// Which.
        path: PathBuf,
        /// Why.
        problem: io::Error,
    },
    /// A file holds something else.
    #[error("{} holds no {wanted} in PEM form{problem}", path.display())]
    Malformed {
        /// Which.
        path: PathBuf,
        /// What should be there.
        wanted: &'static str,
        /// What is there instead; empty, or begins with a colon.
        problem: String,
    },
    /// The files are sound by themselves, but not together.
    #[error("the certificate {} and the key {} cannot be used: {problem}", cert.display(), key.display())]
    Pair {
        /// The chain, leaf first.
        cert: PathBuf,
        /// Its key.
        key: PathBuf,
        /// Why.
        problem: String,
    },
    /// A CA that cannot be used.
    #[error("the CA {} cannot be used: {problem}", path.display())]
    Authority {
        /// Which.
        path: PathBuf,
        /// Why.
        problem: String,
    },
    /// A client cannot speak TLS to this address.
    #[error("cannot set up TLS for `{address}`: {problem}")]
    Address {
        /// Which.
        address: String,
        /// Why.
        problem: String,
    },
    /// A certificate cannot be made.
    #[error("cannot make a certificate: {0}")]
    Making(String),
}

type Result<T> = std::result::Result<T, Error>;

/// The one crypto provider.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|problem| Error::File { doing: "read", path: path.into(), problem })
}

/// When the certificate in a file ends, the first of them.
pub fn end(path: &Path) -> Result<Micros> {
    let malformed = || Error::Malformed {
        path: path.into(),
        wanted: "certificate",
        problem: ": its end cannot be read".into(),
    };
    let found = certificates(path, &read(path)?)?;
    found.first().and_then(dates::end).ok_or_else(malformed)
}

/// The certificates of a file, at least one, leaf first.
fn certificates(path: &Path, text: &[u8]) -> Result<Vec<CertificateDer<'static>>> {
    let found: std::result::Result<Vec<_>, pem::Error> =
        CertificateDer::pem_slice_iter(text).collect();
    let malformed =
        |problem| Error::Malformed { path: path.into(), wanted: "certificate", problem };
    match found {
        Ok(found) if found.is_empty() => Err(malformed(String::new())),
        Ok(found) => Ok(found),
        Err(error) => Err(malformed(format!(": {error}"))),
    }
}

/// The private key of a file: PKCS#8, PKCS#1 or SEC1.
fn private_key(path: &Path, text: &[u8]) -> Result<PrivateKeyDer<'static>> {
    PrivateKeyDer::from_pem_slice(text).map_err(|error| {
        let problem = match error {
            pem::Error::NoItemsFound => String::new(),
            other => format!(": {other}"),
        };
        Error::Malformed { path: path.into(), wanted: "private key", problem }
    })
}
