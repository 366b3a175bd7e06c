//! What a guest is made of, for those who make its shadows, and how it is spoken to.

use std::sync::Arc;

use crate::agent::libvirt::LiveDomain;
use crate::capture::cutter::MonitorCall;
use crate::hypervisor::xml::{GuestDefinition, without_mirrors};
use crate::hypervisor::{Domain, XmlKind};
use crate::standby::ShadowDescription;

/// Sends commands over whatever connection to libvirt there is at that moment.
pub(super) fn monitor_call(domain: LiveDomain) -> MonitorCall {
    Arc::new(move |command| {
        domain.get().and_then(|domain| domain.qmp(command)).map(drop).map_err(|error| error.to_string())
    })
}

/// The live definition without what changes by itself.
pub(super) fn definition_of(domain: &Domain) -> Result<String, String> {
    let xml = domain.xml(XmlKind::Migratable).map_err(|e| e.to_string())?;
    let xml = without_mirrors(&xml).map_err(|e| e.to_string())?;
    Ok(xml.lines().filter(|line| !line.trim_start().starts_with("<currentMemory")).collect::<Vec<_>>().join("\n"))
}

/// What `enable` refuses may also be plugged into a protected guest later.
pub(super) fn refuse_what_cannot_be_captured(xml: &str) -> Result<(), String> {
    let definition = GuestDefinition::parse(xml).map_err(|e| e.to_string())?;
    let refusals = definition.refusals();
    if refusals.is_empty() {
        return Ok(());
    }
    Err(refusals.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))
}

/// What the shadow's host needs to make the waiting domain.
pub(super) fn description_of(domain: &Domain, live_xml: &str) -> Result<Vec<u8>, String> {
    let persistent = domain.is_persistent().map_err(|e| e.to_string())?;
    let inactive_xml = if persistent { Some(domain.xml(XmlKind::Inactive).map_err(|e| e.to_string())?) } else { None };
    let description = ShadowDescription {
        name: domain.name().into(),
        uuid: domain.uuid().into(),
        live_xml: live_xml.into(),
        inactive_xml,
    };
    serde_json::to_vec(&description).map_err(|e| e.to_string())
}

pub(super) fn random_u64() -> Result<u64, String> {
    use std::io::Read;
    let mut bytes = [0; 8];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .map_err(|error| format!("/dev/urandom: {error}"))?;
    Ok(u64::from_le_bytes(bytes))
}
