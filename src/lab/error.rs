//! What can go wrong in a lab, told so that a person knows what to do.

use std::path::{Path, PathBuf};

#[derive(Debug, thiserror::Error)]
pub enum LabError {
    #[error("namespaces, bridges and libvirt daemons need root; run it again as root")]
    NotRoot,
    #[error("interrupted")]
    Interrupted,
    #[error("{what} {value:?}: {reason}")]
    Invalid { what: &'static str, value: String, reason: String },
    #[error("lab {lab} is not up; start it with: virt-shadow-lab --name {lab} up")]
    NotUp { lab: String },
    #[error("lab {lab} is up already; {}, or choose another name with --name", done_with(lab, *owner))]
    UpAlready { lab: String, owner: Option<i32> },
    #[error("lab {lab} has no {what} {name:?}; it has {}", if known.is_empty() { "none" } else { known })]
    Unknown { lab: String, what: &'static str, name: String, known: String },
    #[error("{node} has no power; start it with: virt-shadow-lab --name {lab} power-on {node}")]
    PoweredOff { lab: String, node: String },
    #[error("{command}: {outcome}{}{stderr}", if stderr.is_empty() { "" } else { ": " })]
    Command { command: String, outcome: String, stderr: String },
    #[error("cannot {action} {path}: {source}")]
    Io { action: &'static str, path: PathBuf, source: std::io::Error },
    #[error("cannot {action}: {source}")]
    System { action: String, source: std::io::Error },
    #[error("{path}: {reason}")]
    Corrupt { path: PathBuf, reason: String },
    #[error(
        "packages {packages} cannot be downloaded: {reason}; refresh the package lists (apt-get update), and see that \
         this machine reaches its package sources"
    )]
    Packages { packages: String, reason: String },
    #[error("certificates of the lab: {0}")]
    Pki(String),
    /// The running product did not do what it should.
    #[error("{0}")]
    Product(String),
    #[error("{what} after {waited_ms} ms{}{detail}", if detail.is_empty() { "" } else { ": " })]
    Timeout { what: String, waited_ms: u128, detail: String },
}

pub type Result<T, E = LabError> = std::result::Result<T, E>;

impl LabError {
    /// For `map_err` on file operations: `fs::read(p).map_err(LabError::io("read", p))`.
    pub(super) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { action, path, source }
    }

    /// For `map_err` on system calls, of the standard library and of nix.
    pub(super) fn system<E: Into<std::io::Error>>(action: impl Into<String>) -> impl FnOnce(E) -> Self {
        let action = action.into();
        move |source| Self::System { action, source: source.into() }
    }
}

/// What to do about a lab that is up, and maybe somebody's.
fn done_with(lab: &str, owner: Option<i32>) -> String {
    match owner {
        Some(pid) => format!("process {pid} works with it: wait until that has ended"),
        None => format!("take it down with: virt-shadow-lab --name {lab} down"),
    }
}
