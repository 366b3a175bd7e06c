//! Domain definitions: what a guest is, whether it can have shadows, and the definitions of its copies.
//!
//! ```text
//! primary's live migratable XML --GuestDefinition::parse--> facts, refusals
//!            |  shadow_xml                                  primary's inactive XML (if persistent)
//!            v                                                        |  clean_persistent_xml
//! waiting shadow: memfd RAM, `-incoming defer`                        v
//!            `---- promoted: its live XML still has our additions --> persistent definition without them
//! ```

mod abilities;
mod definition;
mod disks;
mod nics;
mod shadow;
mod tree;

pub use abilities::{cpu_models, machine_types, policy_element, policy_text};
pub use definition::{Disk, GuestDefinition, Interface, InterfaceLink, Refusal};
pub use disks::{disk_file, with_disk_files, without_mirrors};
pub use nics::{OutputNic, output_nics};
pub use shadow::{clean_persistent_xml, is_shadow, shadow_xml, shape};

/// Longest definition we parse, bytes. libvirt's own limit for a string on the wire is 16 MiB; real ones have some KiB.
pub const MAX_XML_BYTES: usize = 1 << 20;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum XmlError {
    #[error("not well-formed XML: {reason}")]
    Malformed { reason: String },
    #[error("has {bytes} bytes; at most {MAX_XML_BYTES} are accepted")]
    TooLong { bytes: usize },
    #[error("is not a domain definition but <{root}>")]
    NotADomain { root: String },
    #[error("lacks {what}")]
    Missing { what: &'static str },
    #[error("{what} is {value:?}, which cannot be understood")]
    Invalid { what: &'static str, value: String },
}
