//! Who may speak with us, and as whom: TLS 1.3, both sides show a certificate of one authority.
//!
//! | who | shows | is known by |
//! | --- | --- | --- |
//! | a host that connects | its client certificate | its host's name, among the DNS names of the certificate |
//! | a host that is connected to | its server certificate | its host's name, likewise |
//! | the manager | its server certificate | `agent.manager_name`, or the address it is connected at |
//!
//! Authority and certificates are read once, at the start.

use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::verify_server_name;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{ClientConfig, RootCertStore, ServerConfig};

use crate::config::{TlsConfig, Transport};

#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error(
        "{what} {path}: {reason}; see docs/security.md for how it is made, or set transport = \"plain-tcp\" where only \
         trusted hosts share the network"
    )]
    File { what: &'static str, path: PathBuf, reason: String },
    #[error("TLS: {0}")]
    Setup(#[from] rustls::Error),
}

/// How this host speaks with others.
#[derive(Clone)]
pub enum Security {
    /// Asked for by name: `transport = "plain-tcp"`.
    Plain,
    Tls(Credentials),
}

/// This host's certificates, ready for both sides of a connection.
#[derive(Clone)]
pub struct Credentials {
    pub(super) client: Arc<ClientConfig>,
    pub(super) server: Arc<ServerConfig>,
}

impl Security {
    /// Reads what the configuration names.
    pub fn load(transport: Transport, config: &TlsConfig) -> Result<Self, TlsError> {
        match transport {
            Transport::PlainTcp => Ok(Self::Plain),
            Transport::Tls => Credentials::load(config).map(Self::Tls),
        }
    }

    /// Whether peers will believe that we are `host`, with either of the certificates configured.
    pub fn speaks_for(config: &TlsConfig, host: &str) -> Result<(), String> {
        for path in [&config.client_cert, &config.server_cert] {
            let at = |reason: String| format!("{}: {reason}", path.display());
            PeerIdentity::Certificate(certificates(path).map_err(at)?.into_iter().next())
                .speaks_for(host)
                .map_err(at)?;
        }
        Ok(())
    }

    /// `tls` or `plain-tcp`, as in the configuration.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Plain => "plain-tcp",
            Self::Tls(_) => "tls",
        }
    }
}

// What it holds says nothing to a reader, and part of it must not be printed.
impl std::fmt::Debug for Security {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(self.name())
    }
}

impl Credentials {
    fn load(config: &TlsConfig) -> Result<Self, TlsError> {
        let authority = Arc::new(authority(&config.ca)?);
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let only_1_3 = &[&rustls::version::TLS13];

        let (chain, key) = identity("client", &config.client_cert, &config.client_key)?;
        let mut client = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(only_1_3)?
            .with_root_certificates(Arc::clone(&authority))
            .with_client_auth_cert(chain, key)
            .map_err(|error| mismatch(&config.client_cert, &error))?;
        // Connections last for days: nothing is won by resuming, and no ticket has to be kept secret.
        client.resumption = rustls::client::Resumption::disabled();

        let (chain, key) = identity("server", &config.server_cert, &config.server_key)?;
        let verifier = WebPkiClientVerifier::builder_with_provider(authority, Arc::clone(&provider))
            .build()
            .map_err(|error| TlsError::Setup(rustls::Error::General(error.to_string())))?;
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(only_1_3)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(|error| mismatch(&config.server_cert, &error))?;
        server.send_tls13_tickets = 0;
        Ok(Self { client: Arc::new(client), server: Arc::new(server) })
    }
}

fn mismatch(path: &Path, error: &rustls::Error) -> TlsError {
    TlsError::File { what: "certificate", path: path.into(), reason: format!("with its key: {error}") }
}

fn authority(path: &Path) -> Result<RootCertStore, TlsError> {
    let error = |reason: String| TlsError::File { what: "certificate authority", path: path.into(), reason };
    let mut store = RootCertStore::empty();
    for certificate in certificates(path).map_err(error)? {
        store.add(certificate).map_err(|reason| error(reason.to_string()))?;
    }
    Ok(store)
}

fn identity(
    side: &'static str,
    certificate: &Path,
    key: &Path,
) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), TlsError> {
    let (what, what_key) = match side {
        "client" => ("client certificate", "client key"),
        _ => ("server certificate", "server key"),
    };
    let chain =
        certificates(certificate).map_err(|reason| TlsError::File { what, path: certificate.into(), reason })?;
    let key_error = |reason: String| TlsError::File { what: what_key, path: key.into(), reason };
    let key = PrivateKeyDer::from_pem_file(key).map_err(|error| key_error(pem_reason(&error)))?;
    Ok((chain, key))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let found = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    match found {
        Ok(found) if found.is_empty() => Err("holds no certificate in PEM form".into()),
        Ok(found) => Ok(found),
        Err(error) => Err(pem_reason(&error)),
    }
}

/// Never any of the content: it may be a key.
fn pem_reason(error: &rustls::pki_types::pem::Error) -> String {
    match error {
        rustls::pki_types::pem::Error::Io(error) => error.to_string(),
        rustls::pki_types::pem::Error::NoItemsFound => "holds nothing of the kind in PEM form".into(),
        _ => "is not in PEM form".into(),
    }
}

/// Whom we mean to connect to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PeerName {
    /// A host by its name, or a manager by its.
    Name(String),
    /// Whoever has this address.
    Address(IpAddr),
}

impl PeerName {
    pub(super) fn server_name(&self) -> io::Result<ServerName<'static>> {
        match self {
            Self::Name(name) => ServerName::try_from(name.clone()).map_err(|_| {
                io::Error::new(io::ErrorKind::InvalidInput, format!("{name:?} cannot be a name in a certificate"))
            }),
            Self::Address(address) => Ok(ServerName::IpAddress((*address).into())),
        }
    }
}

/// What the other side of a connection has shown of itself.
#[derive(Debug, Clone)]
pub enum PeerIdentity {
    /// Plain TCP: it may say that it is anybody.
    Unknown,
    /// Signed by our authority, which was checked when it connected.
    Certificate(Option<CertificateDer<'static>>),
}

impl PeerIdentity {
    pub(super) fn shown(certificates: Option<&[CertificateDer<'_>]>) -> Self {
        Self::Certificate(certificates.and_then(<[_]>::first).map(|certificate| certificate.clone().into_owned()))
    }

    /// Whether it may speak for `host`; `Err` says why not.
    pub fn speaks_for(&self, host: &str) -> Result<(), String> {
        let Self::Certificate(certificate) = self else { return Ok(()) };
        let refused = |reason: String| format!("the certificate it shows is not one of host {host}: {reason}");
        let certificate = certificate.as_ref().ok_or_else(|| refused("it showed none".into()))?;
        let name = ServerName::try_from(host).map_err(|error| refused(error.to_string()))?;
        let parsed = ParsedCertificate::try_from(certificate).map_err(|error| refused(error.to_string()))?;
        verify_server_name(&parsed, &name).map_err(|error| refused(error.to_string()))
    }
}
