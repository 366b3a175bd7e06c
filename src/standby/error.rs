//! What can go wrong with a shadow on its host.

use std::io;
use std::path::PathBuf;

use super::image::ImageError;
use super::journal::JournalError;
use crate::hypervisor::HypervisorError;
use crate::hypervisor::xml::XmlError;

#[derive(Debug, thiserror::Error)]
pub enum StandbyError {
    #[error(transparent)]
    Hypervisor(#[from] HypervisorError),
    #[error("shadow of {guest}: its definition {source}")]
    Definition { guest: String, source: XmlError },
    #[error("shadow of {guest}: the definition that came is of {found}, not of {expected}; refusing it")]
    WrongGuest { guest: String, expected: String, found: String },
    /// Asked for something that would harm a guest.
    #[error(
        "shadow of {guest}: a domain of its UUID is active on this host and is not a waiting shadow ({found}); leaving it alone"
    )]
    Occupied { guest: String, found: String },
    #[error("shadow of {guest}: this host lacks {path}, which its definition names; copy it from the primary's host")]
    MissingFile { guest: String, path: String },
    /// The shadow's QEMU was started from the same definition and still has other memory.
    #[error(
        "shadow of {guest}: its memory differs from the primary's: {difference}; are QEMU's versions on both hosts the same?"
    )]
    Layout { guest: String, difference: String },
    #[error("memory of the shadow of {guest}: {source}")]
    Image { guest: String, source: ImageError },
    #[error("disk of the shadow of {guest}: {path}: {source}")]
    Disk { guest: String, path: PathBuf, source: io::Error },
    #[error("journal of the shadow of {guest}: {source}")]
    Journal { guest: String, source: JournalError },
    #[error("record of the shadow of {guest} at {path}: {source}")]
    Record { guest: String, path: PathBuf, source: io::Error },
    #[error("the saved device state of {guest} is not one: {reason}")]
    DeviceState { guest: String, reason: String },
    #[error("shadow of {guest}: cannot {action}: {source}")]
    Feed { guest: String, action: &'static str, source: io::Error },
    /// An incoming load works once in the life of a QEMU: the shadow has to be made anew.
    #[error("shadow of {guest} did not start: {reason}; QEMU's log on this host: {log}")]
    NotLoaded { guest: String, reason: String, log: PathBuf },
    /// The state was handed to QEMU, and then libvirt was gone for good.
    #[error(
        "shadow of {guest}: it has its state, but libvirt cannot be asked whether it runs: {reason}; restart libvirtd"
    )]
    OutcomeUnknown { guest: String, reason: String },
    #[error("shadow of {guest} is not waiting any more: {reason}")]
    NotWaiting { guest: String, reason: String },
}

pub type Result<T> = std::result::Result<T, StandbyError>;
