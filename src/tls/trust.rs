//! A client's side: whom it trusts, and who it is.

use std::path::PathBuf;

use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity};

#[cfg(feature = "redis")]
use super::provider;
use super::{Error, Result, certificates, private_key, read};

/// How a client knows the server, and how the server knows the client.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trust {
    /// File with the CA certificates that are trusted, and no others. None trusts those of the
    /// system and the public ones that are built in.
    pub ca: Option<PathBuf>,
    /// Files with the client's own certificate and its key, where the server asks for one.
    pub identity: Option<(PathBuf, PathBuf)>,
}

impl Trust {
    /// Secures an endpoint whose address is `https://…`, and leaves any other as it is. Reads
    /// the files, so that a connection made later uses what is there then.
    pub fn secure(&self, endpoint: Endpoint) -> Result<Endpoint> {
        let uri = endpoint.uri();
        if uri.scheme_str() != Some("https") {
            return Ok(endpoint);
        }
        let address = uri.to_string().trim_end_matches('/').to_owned();
        // A certificate names an IPv6 address without the brackets of URLs.
        let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
        let mut tls = ClientTlsConfig::new().domain_name(host);
        if let Some((cert, key)) = &self.identity {
            let (chain, secret) = (read(cert)?, read(key)?);
            certificates(cert, &chain)?;
            private_key(key, &secret)?;
            tls = tls.identity(Identity::from_pem(chain, secret));
        }
        let wrong = |error: tonic::transport::Error| Error::Address {
            address,
            problem: root_cause(&error),
        };
        if let Some(path) = &self.ca {
            let text = read(path)?;
            certificates(path, &text)?;
            return endpoint
                .tls_config(tls.ca_certificate(Certificate::from_pem(text)))
                .map_err(wrong);
        }
        // A slim machine has no certificates of its own, which is no reason to fail.
        let built_in = tls.with_webpki_roots();
        endpoint
            .clone()
            .tls_config(built_in.clone().with_native_roots())
            .or_else(|_| endpoint.tls_config(built_in))
            .map_err(wrong)
    }
}

#[cfg(feature = "redis")]
impl Trust {
    /// The same for connections that are not HTTP. Reads the files.
    pub fn client_config(&self) -> Result<rustls::ClientConfig> {
        let mut roots = rustls::RootCertStore::empty();
        if let Some(path) = &self.ca {
            for certificate in certificates(path, &read(path)?)? {
                roots.add(certificate).map_err(|error| Error::Authority {
                    path: path.clone(),
                    problem: error.to_string(),
                })?;
            }
        } else {
            // What cannot be read is not trusted; a server that needs it is refused by name.
            let found = rustls_native_certs::load_native_certs();
            roots.add_parsable_certificates(found.certs);
        }
        let builder = rustls::ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(|error| Error::Making(error.to_string()))?
            .with_root_certificates(roots);
        let Some((cert, key)) = &self.identity else {
            return Ok(builder.with_no_client_auth());
        };
        let chain = certificates(cert, &read(cert)?)?;
        let secret = private_key(key, &read(key)?)?;
        builder.with_client_auth_cert(chain, secret).map_err(|error| Error::Pair {
            cert: cert.clone(),
            key: key.clone(),
            problem: error.to_string(),
        })
    }
}

fn root_cause(error: &(dyn std::error::Error + 'static)) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(address: &'static str) -> Endpoint {
        Endpoint::from_static(address)
    }

    #[test]
    fn a_plain_address_needs_no_files_and_a_secure_one_reads_them() {
        let absent = Trust { ca: Some("/nowhere/ca.pem".into()), identity: None };
        assert!(absent.secure(endpoint("http://host")).is_ok());
        let text = absent.secure(endpoint("https://host")).err().unwrap().to_string();
        assert!(text.starts_with("cannot read /nowhere/ca.pem"), "{text}");
        for address in ["https://host", "https://127.0.0.1:7070", "https://[::1]:7070"] {
            assert!(Trust::default().secure(endpoint(address)).is_ok(), "{address}");
        }
    }

    #[test]
    fn a_ca_file_without_a_certificate_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ca.pem");
        std::fs::write(&path, "no certificate").unwrap();
        let trust = Trust { ca: Some(path), identity: None };
        let text = trust.secure(endpoint("https://host")).err().unwrap().to_string();
        assert!(text.contains("holds no certificate"), "{text}");
    }
}
