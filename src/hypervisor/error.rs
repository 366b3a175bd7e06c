//! What can go wrong between us, libvirt and QEMU.

use virt::sys;

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
            // A call whose libvirtd goes away fails as the system's own error (connection reset), raised by the
            // RPC layer of this side; what libvirtd itself refuses keeps the origin it has there.
            Self::Libvirt { code, origin, .. } => {
                [sys::VIR_FROM_RPC, sys::VIR_FROM_REMOTE].contains(origin)
                    || [sys::VIR_ERR_RPC, sys::VIR_ERR_INVALID_CONN, sys::VIR_ERR_NO_CONNECT].contains(code)
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
        let failed = |code, origin| {
            let error = HypervisorError::Libvirt { action: "x".into(), code, origin, message: "gone".into() };
            error.is_disconnect()
        };
        // "Cannot recv data: Connection reset by peer", "client socket is closed".
        assert!(failed(sys::VIR_ERR_SYSTEM_ERROR, sys::VIR_FROM_RPC));
        assert!(failed(sys::VIR_ERR_INTERNAL_ERROR, sys::VIR_FROM_RPC));
        assert!(failed(sys::VIR_ERR_INVALID_CONN, sys::VIR_FROM_NONE));
        assert!(!failed(sys::VIR_ERR_OPERATION_INVALID, sys::VIR_FROM_QEMU));
        assert!(!failed(sys::VIR_ERR_SYSTEM_ERROR, sys::VIR_FROM_QEMU));
    }
}
