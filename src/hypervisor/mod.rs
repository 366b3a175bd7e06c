//! The only place that knows libvirt, its monitor pass-through and its FFI.
//!
//! ```text
//! Hypervisor (one libvirt connection) --lookup--> Domain --qmp/hmp--> QEMU
//!      |  subscribe                                  |  xml --> xml::GuestDefinition, xml::shadow_xml
//!      v                                             `--ramblocks, pid
//! HypervisorEvent on the event-loop thread
//! ```
//! Everything here blocks; callers run it on threads of their own. A connection does not heal: after
//! [`HypervisorEvent::Disconnected`] open a new [`Hypervisor`] and look the domains up again.

mod connection;
mod domain;
mod error;
mod events;
mod ffi;
pub mod process;
pub mod ramblock;
pub mod xml;

pub use connection::Hypervisor;
pub use domain::{Domain, DomainState, PAUSED_BY_USER, PAUSED_UNKNOWN, XmlKind};
pub use error::HypervisorError;
pub use events::{EventSink, HypervisorEvent, Lifecycle, Resumed, Started, Stopped, Suspended};
pub use ffi::BlockJob;

pub type Result<T> = std::result::Result<T, HypervisorError>;
