//! What is known about a lab: `/run/virt-shadow-lab/NAME/state.json`, replaced as a whole under a lock.
//!
//! It is written before anything is made, so that whatever a crash leaves behind can be found and removed.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::net::Ipv4Addr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::error::{LabError, Result};
use super::process::ProcessRef;
use crate::config::Transport;

/// Everything that a reboot of this machine may forget: states, links to the nodes' `/run`.
pub const RUN_ROOT: &str = "/run/virt-shadow-lab";
/// What a node keeps across a power cut: its `/etc`, `/var` and logs.
pub const VAR_ROOT: &str = "/var/lib/virt-shadow-lab";
/// Guest images and libvirt's capability cache, shared by all labs.
pub const CACHE_ROOT: &str = "/var/cache/virt-shadow-lab";
/// Where `down --keep-logs` leaves the logs.
pub const LOG_ROOT: &str = "/var/log/virt-shadow-lab";

pub const HOSTS_MAX: u8 = 32;
pub const MANAGER: &str = "manager";
pub const CLIENT: &str = "client";
/// All addresses of a lab are in this /16; every lab has the same ones, in namespaces of its own.
pub const NET_PREFIX_LEN: u8 = 16;
const LAB_NAME_LEN_MAX: usize = 32;

/// The user that libvirt runs QEMU as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum QemuUser {
    Root,
    LibvirtQemu,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    Host,
    Manager,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NodeState {
    pub name: String,
    pub role: Role,
    /// Switch the node is plugged into; the manager is at the spine.
    pub rack: String,
    pub ip: Ipv4Addr,
    pub uuid: String,
    /// First process of the node; `None` without power.
    pub init: Option<ProcessRef>,
    pub link_cut: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct GuestState {
    pub uuid: String,
    /// The host it was defined on; it may run elsewhere by now.
    pub home: String,
    pub ip: Ipv4Addr,
    pub mac: String,
    pub workload: String,
    pub memory_mib: u32,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LabState {
    pub name: String,
    /// The process that a lab of a test lives and dies with; none for labs made by hand.
    pub owner: Option<ProcessRef>,
    pub racks: u8,
    #[serde(default)]
    pub power_domains: u8,
    pub qemu_user: QemuUser,
    pub transport: Transport,
    pub daemons: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub record_dir: Option<PathBuf>,
    /// False while `up` is at work; a lab that stays so was interrupted.
    pub complete: bool,
    pub nodes: Vec<NodeState>,
    pub cut_racks: Vec<String>,
    pub guests: BTreeMap<String, GuestState>,
}

impl LabState {
    pub fn hosts(&self) -> impl Iterator<Item = &NodeState> {
        self.nodes.iter().filter(|n| n.role == Role::Host)
    }

    pub fn node(&self, name: &str) -> Result<&NodeState> {
        self.nodes.iter().find(|n| n.name == name).ok_or_else(|| self.unknown("node", name))
    }

    pub fn node_mut(&mut self, name: &str) -> Result<&mut NodeState> {
        let unknown = self.unknown("node", name);
        self.nodes.iter_mut().find(|n| n.name == name).ok_or(unknown)
    }

    pub fn host(&self, name: &str) -> Result<&NodeState> {
        self.hosts().find(|n| n.name == name).ok_or_else(|| self.unknown("host", name))
    }

    /// The first process of a node with power.
    pub fn running(&self, name: &str) -> Result<ProcessRef> {
        let off = || LabError::PoweredOff { lab: self.name.clone(), node: name.into() };
        self.node(name)?.init.filter(ProcessRef::is_alive).ok_or_else(off)
    }

    fn unknown(&self, what: &'static str, name: &str) -> LabError {
        let known: Vec<_> =
            self.nodes.iter().filter(|n| what != "host" || n.role == Role::Host).map(|n| n.name.as_str()).collect();
        LabError::Unknown { lab: self.name.clone(), what, name: name.into(), known: known.join(", ") }
    }
}

/// Address of host number `index` (from 1), of the manager, of the client.
pub fn host_ip(index: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, 1, index)
}
pub const MANAGER_IP: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
pub const CLIENT_IP: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 3);

/// Address of the guest that is number `index` (from 0) of its lab.
pub fn guest_ip(index: u16) -> Ipv4Addr {
    let [high, low] = index.to_be_bytes();
    Ipv4Addr::new(10, 77, 100 + high, low)
}

/// Checks a name of a lab: it becomes part of paths and of namespace names.
pub fn check_lab_name(name: &str) -> Result<()> {
    let ok = (1..=LAB_NAME_LEN_MAX).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !name.starts_with('-');
    let reason = format!("a lab's name is 1 to {LAB_NAME_LEN_MAX} of a-z, 0-9 and '-'");
    if ok { Ok(()) } else { Err(LabError::Invalid { what: "lab name", value: name.into(), reason }) }
}

pub fn run_dir(lab: &str) -> PathBuf {
    Path::new(RUN_ROOT).join(lab)
}

/// A link to the node's own `/run`, valid while it has power.
pub fn node_run_link(lab: &str, node: &str) -> PathBuf {
    run_dir(lab).join(node)
}

pub fn node_var_dir(lab: &str, node: &str) -> PathBuf {
    Path::new(VAR_ROOT).join(lab).join(node)
}

fn state_path(lab: &str) -> PathBuf {
    run_dir(lab).join("state.json")
}

/// Names of all labs that left a state on this machine.
pub fn all_labs() -> Vec<String> {
    let Ok(entries) = fs::read_dir(RUN_ROOT) else { return Vec::new() };
    let mut names: Vec<_> = entries
        .flatten()
        .filter(|e| e.file_type().is_ok_and(|t| t.is_dir()))
        .filter_map(|e| e.file_name().into_string().ok())
        .filter(|name| check_lab_name(name).is_ok())
        .collect();
    names.sort();
    names
}

/// Reads a state; `Ok(None)` if the lab has none.
pub fn load(lab: &str) -> Result<Option<LabState>> {
    let path = state_path(lab);
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(LabError::io("read", &path)(error)),
    };
    let corrupt =
        |e: serde_json::Error| LabError::Corrupt { path, reason: format!("{e}; remove the lab with \"down\"") };
    serde_json::from_str(&text).map(Some).map_err(corrupt)
}

/// One process at a time changes a lab.
pub struct LabLock {
    _file: Flock<File>,
    lab: String,
}

impl LabLock {
    /// Waits for the lock of `lab`.
    pub fn acquire(lab: &str) -> Result<Self> {
        check_lab_name(lab)?;
        fs::create_dir_all(RUN_ROOT).map_err(LabError::io("create", Path::new(RUN_ROOT)))?;
        let path = Self::path(lab);
        loop {
            let file = OpenOptions::new()
                .create(true)
                .truncate(false)
                .write(true)
                .open(&path)
                .map_err(LabError::io("open", &path))?;
            let inode = file.metadata().map_err(LabError::io("stat", &path))?.ino();
            let locked = Flock::lock(file, FlockArg::LockExclusive)
                .map_err(|(_, errno)| LabError::io("lock", &path)(errno.into()))?;
            // `down` removes the file while holding it: whoever waited meanwhile holds a lock that no one sees.
            if fs::metadata(&path).is_ok_and(|m| m.ino() == inode) {
                return Ok(Self { _file: locked, lab: lab.into() });
            }
        }
    }

    fn path(lab: &str) -> PathBuf {
        Path::new(RUN_ROOT).join(format!("{lab}.lock"))
    }

    pub fn load(&self) -> Result<LabState> {
        load(&self.lab)?.ok_or_else(|| LabError::NotUp { lab: self.lab.clone() })
    }

    pub fn save(&self, state: &LabState) -> Result<()> {
        let path = state_path(&self.lab);
        let new = path.with_extension("new");
        let text = serde_json::to_vec_pretty(state)
            .map_err(|e| LabError::Corrupt { path: path.clone(), reason: e.to_string() })?;
        fs::create_dir_all(run_dir(&self.lab)).map_err(LabError::io("create", &path))?;
        fs::write(&new, text).map_err(LabError::io("write", &new))?;
        fs::rename(&new, &path).map_err(LabError::io("replace", &path))
    }

    /// Loads, changes and saves.
    pub fn update<T>(&self, change: impl FnOnce(&mut LabState) -> Result<T>) -> Result<T> {
        let mut state = self.load()?;
        let value = change(&mut state)?;
        self.save(&state)?;
        Ok(value)
    }

    /// Removes the lock file too, as the last trace of a lab.
    pub fn remove(self) {
        // Nothing depends on these; a file that stays is only untidy.
        let _ = fs::remove_file(Self::path(&self.lab));
        let _ = fs::remove_dir(RUN_ROOT);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_would_leave_their_directory_are_refused() {
        for bad in ["", "a/b", "..", "a.b", "-a", "A", &"x".repeat(33)] {
            assert!(check_lab_name(bad).is_err(), "{bad:?}");
        }
        assert!(check_lab_name("t-basic-1234").is_ok());
    }

    #[test]
    fn addresses_of_hosts_and_guests_never_meet() {
        assert_eq!(guest_ip(1).to_string(), "10.77.100.1");
        assert_eq!(guest_ip(256).to_string(), "10.77.101.0");
        assert_eq!(host_ip(HOSTS_MAX).to_string(), "10.77.1.32");
    }
}
