//! A certificate of its own for a server on this machine, and the CA that vouches for it.
//!
//! The key of the CA is thrown away as soon as the one certificate is signed, so that whoever
//! trusts the CA trusts this certificate and nothing else.

use std::{
    fs::File,
    io::Write as _,
    net::{Ipv4Addr, Ipv6Addr},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, SanType,
};
use rustls::{
    RootCertStore,
    client::{WebPkiServerVerifier, danger::ServerCertVerifier as _},
    pki_types::{ServerName, UnixTime},
    sign::CertifiedKey,
};
use time::OffsetDateTime;

use super::{Error, Result, certificates, private_key, provider, read};
use crate::clock::Micros;

/// How long a certificate is good: what all browsers accept.
const LIFETIME: Duration = Duration::from_hours(24 * 397);
/// A certificate that ends within this time is replaced at the next start.
const RENEWAL: Duration = Duration::from_hours(24 * 30);
/// Clocks of clients may be behind by this much.
const SKEW: Duration = Duration::from_hours(1);

/// Where they lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Own {
    /// The CA's certificate, which clients are told to trust.
    pub ca: PathBuf,
    /// The server's certificate.
    pub cert: PathBuf,
    /// The server's key, which its owner alone can read.
    pub key: PathBuf,
}

/// The certificate in `dir` for `localhost`, `127.0.0.1` and `::1`. It is made, together with a
/// new CA, unless there is one that is good for another month.
pub fn certificate(dir: &Path, now: Micros) -> Result<Own> {
    let own =
        Own { ca: dir.join("ca.pem"), cert: dir.join("server.pem"), key: dir.join("server.key") };
    if !own.is_good(now + RENEWAL) {
        own.make(dir, now)?;
    }
    Ok(own)
}

impl Own {
    fn is_good(&self, at: Micros) -> bool {
        let verified = || -> Option<()> {
            let mut roots = RootCertStore::empty();
            for cert in certificates(&self.ca, &read(&self.ca).ok()?).ok()? {
                roots.add(cert).ok()?;
            }
            let chain = certificates(&self.cert, &read(&self.cert).ok()?).ok()?;
            let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider())
                .build()
                .ok()?;
            let at = UnixTime::since_unix_epoch(Duration::from_micros(u64::try_from(at.0).ok()?));
            let name = ServerName::try_from("localhost").ok()?;
            verifier.verify_server_cert(&chain[0], &chain[1..], &name, &[], at).ok()?;
            let key = private_key(&self.key, &read(&self.key).ok()?).ok()?;
            CertifiedKey::from_der(chain, key, &provider()).ok().map(drop)
        };
        verified().is_some()
    }

    fn make(&self, dir: &Path, now: Micros) -> Result<()> {
        let making = |error: rcgen::Error| Error::Making(error.to_string());
        let (from, until) = (stamp(now - SKEW)?, stamp(now + LIFETIME)?);
        let mut ca = CertificateParams::default();
        ca.distinguished_name.push(DnType::CommonName, "Baton development CA, for one server");
        ca.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        ca.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        (ca.not_before, ca.not_after) = (from, until);
        let ca = CertifiedIssuer::self_signed(ca, KeyPair::generate().map_err(making)?)
            .map_err(making)?;

        let mut server = CertificateParams::default();
        server.distinguished_name.push(DnType::CommonName, "localhost");
        server.subject_alt_names = vec![
            SanType::DnsName("localhost".try_into().map_err(making)?),
            SanType::IpAddress(Ipv4Addr::LOCALHOST.into()),
            SanType::IpAddress(Ipv6Addr::LOCALHOST.into()),
        ];
        server.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        server.use_authority_key_identifier_extension = true;
        (server.not_before, server.not_after) = (from, until);
        let key = KeyPair::generate().map_err(making)?;
        let cert = server.signed_by(&key, &ca).map_err(making)?;

        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(|problem| Error::File { doing: "write", path: dir.into(), problem })?;
        write(&self.key, 0o600, &key.serialize_pem())?;
        write(&self.cert, 0o644, &cert.pem())?;
        write(&self.ca, 0o644, &ca.pem())
    }
}

fn stamp(at: Micros) -> Result<OffsetDateTime> {
    OffsetDateTime::from_unix_timestamp(at.0 / 1_000_000)
        .map_err(|error| Error::Making(error.to_string()))
}

/// Replaces a file whole, so that nobody reads a half.
fn write(path: &Path, mode: u32, text: &str) -> Result<()> {
    let new = path.with_extension("new");
    // Its mode holds for a new file only.
    let _absent = std::fs::remove_file(&new);
    File::options()
        .create_new(true)
        .write(true)
        .mode(mode)
        .open(&new)
        .and_then(|mut file| file.write_all(text.as_bytes()).and_then(|()| file.sync_all()))
        .and_then(|()| std::fs::rename(&new, path))
        .map_err(|problem| Error::File { doing: "write", path: path.into(), problem })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::clock::EPOCH;

    #[test]
    fn a_certificate_is_kept_until_its_last_month() {
        let dir = tempfile::tempdir().unwrap();
        let own = certificate(dir.path(), EPOCH).unwrap();
        let first = read(&own.cert).unwrap();
        let day = Duration::from_hours(24);
        certificate(dir.path(), EPOCH + day * 366).unwrap();
        assert_eq!(read(&own.cert).unwrap(), first);
        certificate(dir.path(), EPOCH + day * 368).unwrap();
        assert_ne!(read(&own.cert).unwrap(), first);
        assert!(own.is_good(EPOCH + day * 368));
    }

    #[test]
    fn a_missing_or_foreign_file_makes_all_of_them_anew() {
        let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let own = certificate(dir.path(), EPOCH).unwrap();
        let foreign = certificate(other.path(), EPOCH).unwrap();
        for (mine, theirs) in [(&own.ca, &foreign.ca), (&own.key, &foreign.key)] {
            std::fs::copy(theirs, mine).unwrap();
            assert!(!own.is_good(EPOCH), "{}", mine.display());
            certificate(dir.path(), EPOCH).unwrap();
            assert!(own.is_good(EPOCH), "{}", mine.display());
        }
        std::fs::remove_file(&own.cert).unwrap();
        certificate(dir.path(), EPOCH).unwrap();
        assert!(own.is_good(EPOCH));
    }

    #[test]
    fn the_key_is_its_owners_alone_and_that_of_the_ca_is_nowhere() {
        let dir = tempfile::tempdir().unwrap();
        let own = certificate(dir.path(), EPOCH).unwrap();
        let mode = std::fs::metadata(&own.key).unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0);
        let mut names: Vec<_> =
            std::fs::read_dir(dir.path()).unwrap().map(|file| file.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["ca.pem", "server.key", "server.pem"]);
        assert!(!String::from_utf8(read(&own.ca).unwrap()).unwrap().contains("PRIVATE"));
    }
}
