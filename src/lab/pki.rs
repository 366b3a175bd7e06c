//! A certificate authority for one lab, and a certificate for each of its nodes, as an operator would make them.

use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};

use super::error::{LabError, Result};
use crate::config::TlsConfig;

const CA: &str = "ca.pem";
const CERTIFICATE: &str = "host.pem";
const KEY: &str = "host.key";

/// Signs for one lab; its key is in memory only and gone once the lab is up.
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    pub fn new(lab: &str) -> Result<Self> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, format!("virt-shadow-lab {lab}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().map_err(failed)?;
        Ok(Self(CertifiedIssuer::self_signed(params, key).map_err(failed)?))
    }

    /// Writes what the host `name` at `ip` needs into the folder `pki`, which [`config`] describes.
    pub fn issue(&self, name: &str, ip: IpAddr, pki: &Path) -> Result<()> {
        let mut params = CertificateParams::new(vec![name.to_owned(), ip.to_string()]).map_err(failed)?;
        params.distinguished_name.push(DnType::CommonName, name.to_owned());
        // One certificate for both sides of a connection.
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        let key = KeyPair::generate().map_err(failed)?;
        let certificate = params.signed_by(&key, &self.0).map_err(failed)?;
        fs::create_dir_all(pki).map_err(LabError::io("create", pki))?;
        fs::set_permissions(pki, fs::Permissions::from_mode(0o700)).map_err(LabError::io("change mode of", pki))?;
        write(&pki.join(CA), &self.0.pem(), 0o644)?;
        write(&pki.join(CERTIFICATE), &certificate.pem(), 0o644)?;
        write(&pki.join(KEY), &key.serialize_pem(), 0o600)
    }
}

/// What a configuration says of the files in the folder `pki`.
pub fn config(pki: &Path) -> TlsConfig {
    let path = |name: &str| pki.join(name);
    TlsConfig {
        ca: path(CA),
        client_cert: path(CERTIFICATE),
        client_key: path(KEY),
        server_cert: path(CERTIFICATE),
        server_key: path(KEY),
    }
}

fn write(path: &Path, text: &str, mode: u32) -> Result<()> {
    let opened = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(path);
    opened
        .and_then(|mut file| std::io::Write::write_all(&mut file, text.as_bytes()))
        .map_err(LabError::io("write", path))
}

fn failed(error: rcgen::Error) -> LabError {
    LabError::Pki(error.to_string())
}
