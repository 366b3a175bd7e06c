//! What can go wrong between us, libvirt and QEMU.

use super::ramblock::RamblockError;
use super::xml::XmlError;

#[derive(Debug, thiserror::Error)]
pub enum HypervisorError {
    /// libvirt does not know the domain.
    #[error("libvirt of this host has no domain {domain}")]
    NotFound { domain: String },
    /// The connection to libvirtd could not be opened or is gone; open a new [`super::Hypervisor`].
    #[error("no connection to libvirt at {uri}: {message} (is libvirtd running, and may this user open its socket?)")]
    NotConnected { uri: String, message: String },
    /// libvirt refused or failed. `code` and `origin` are its virErrorNumber and virErrorDomain.
    #[error("cannot {action}: {message} (libvirt error {code})")]
    Libvirt { action: String, code: u32, origin: u32, message: String },
    /// QEMU answered a monitor command with an error. `class` is QMP's error class.
    #[error("QEMU of {domain} refused {command}: {desc} ({class})")]
    Monitor { domain: String, command: String, class: String, desc: String },
    /// The answer to a monitor command is not what this QEMU's protocol promises.
    #[error("QEMU of {domain} answered {command} with something unexpected: {reason}")]
    MonitorReply { domain: String, command: String, reason: String },
    #[error("QEMU's process of {domain} cannot be identified: {reason}")]
    Process { domain: String, reason: String },
    #[error("memory blocks of {domain}: {source}")]
    Ramblock { domain: String, source: RamblockError },
    #[error("definition of {domain}: {source}")]
    Definition { domain: String, source: XmlError },
    #[error("cannot {action}: the text given contains a NUL byte")]
    NulByte { action: String },
}

impl HypervisorError {
    /// Whether the connection is gone, so that only a new one can help.
    pub fn is_disconnect(&self) -> bool {
        match self {
            Self::NotConnected { .. } => true,
            // A call on a connection whose daemon went away fails in the RPC layer or as an invalid connection.
            Self::Libvirt { code, .. } => {
                [virt::sys::VIR_ERR_RPC, virt::sys::VIR_ERR_INVALID_CONN, virt::sys::VIR_ERR_NO_CONNECT].contains(code)
            }
            _ => false,
        }
    }

    /// Whether QEMU does not know the command at all.
    pub fn is_command_not_found(&self) -> bool {
        matches!(self, Self::Monitor { class, .. } if class == "CommandNotFound")
    }

    pub(super) fn from_virt(action: impl Into<String>, error: &virt::error::Error) -> Self {
        Self::Libvirt {
            action: action.into(),
            code: error.code().to_raw(),
            origin: error.domain().to_raw(),
            message: error.message().to_owned(),
        }
    }

    /// The error libvirt recorded for this thread's last failed call.
    pub(super) fn last(action: impl Into<String>) -> Self {
        Self::from_virt(action, &virt::error::Error::last_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_connection_is_recognised() {
        let rpc = |code| HypervisorError::Libvirt { action: "x".into(), code, origin: 7, message: "gone".into() };
        assert!(rpc(virt::sys::VIR_ERR_RPC).is_disconnect());
        assert!(!rpc(virt::sys::VIR_ERR_OPERATION_INVALID).is_disconnect());
    }
}
