//! What an agent has to remember about a waiting shadow to find it again after a restart.
//!
//! `run_dir/shadows/UUID/state.json`, replaced atomically. It is lost at a reboot, and so is the shadow.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::journal::is_on_tmpfs;
use crate::hypervisor::process::QemuProcess;

/// Changes with every incompatible change of [`Record`]; a record of another version is as good as none.
const VERSION: u32 = 2;
/// Longest record that is read, bytes: two definitions and some numbers.
const MAX_RECORD_BYTES: u64 = 4 << 20;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Record {
    version: u32,
    pub(super) uuid: String,
    pub(super) name: String,
    pub(super) process: QemuProcess,
    pub(super) phase: Phase,
    /// Blocks and lengths in the primary's order.
    pub(super) layout: Vec<(String, u64)>,
    /// Target and path of the disks.
    pub(super) disks: Vec<(String, String)>,
    /// Live definition of the primary and, if it is persistent, its inactive one.
    pub(super) live_xml: String,
    pub(super) inactive_xml: Option<String>,
    /// Inode of our end of the armed socket; QEMU holds a copy of it.
    pub(super) feed_inode: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Phase {
    /// Waits; nothing of a device state has been written to it.
    Waiting,
    /// A device state is being or has been written to it.
    Promoting,
}

impl Record {
    pub(super) fn new(
        uuid: &str,
        name: &str,
        process: QemuProcess,
        live_xml: &str,
        inactive_xml: Option<&str>,
    ) -> Self {
        Self {
            version: VERSION,
            uuid: uuid.to_owned(),
            name: name.to_owned(),
            process,
            phase: Phase::Waiting,
            layout: Vec::new(),
            disks: Vec::new(),
            live_xml: live_xml.to_owned(),
            inactive_xml: inactive_xml.map(str::to_owned),
            feed_inode: None,
        }
    }

    /// Reads the record of `uuid`; `None` if there is none that can be used.
    pub(super) fn read(run_dir: &Path, uuid: &str) -> io::Result<Option<Self>> {
        let path = path(run_dir, uuid);
        match fs::metadata(&path) {
            Ok(found) if found.len() <= MAX_RECORD_BYTES => {}
            Ok(_) => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        }
        let record: Option<Self> = serde_json::from_slice(&fs::read(&path)?).ok();
        Ok(record.filter(|record| record.version == VERSION && record.uuid == uuid))
    }

    /// Writes the record so that a crash leaves either the old or the new one.
    pub(super) fn write(&self, run_dir: &Path) -> io::Result<()> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory(run_dir, &self.uuid))?;
        replace_file(&path(run_dir, &self.uuid), &serde_json::to_vec(self)?)
    }
}

/// Replaces a file by one with these bytes, so that a crash leaves either the old or the new one. On a file system
/// that survives a power cut the new one does, too, when this returns. Only root may read it.
pub fn replace_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let new = path.with_extension("new");
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(bytes)?;
    let durable = !is_on_tmpfs(path);
    if durable {
        file.sync_all()?;
    }
    fs::rename(&new, path)?;
    match path.parent() {
        Some(folder) if durable => fs::File::open(folder)?.sync_all(),
        _ => Ok(()),
    }
}

/// The folder of one shadow: its record, its journal, and what else the agent keeps with it.
pub fn directory(run_dir: &Path, uuid: &str) -> PathBuf {
    run_dir.join("shadows").join(uuid)
}

pub(super) fn path(run_dir: &Path, uuid: &str) -> PathBuf {
    directory(run_dir, uuid).join("state.json")
}

/// Where the journal of a shadow belongs.
pub fn journal_path(run_dir: &Path, uuid: &str) -> PathBuf {
    directory(run_dir, uuid).join("journal")
}

/// UUIDs of all shadows that have a folder, in alphabetical order.
pub fn recorded(run_dir: &Path) -> io::Result<Vec<String>> {
    let mut found = Vec::new();
    let entries = match fs::read_dir(run_dir.join("shadows")) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let name = entry?.file_name();
        found.extend(name.to_str().filter(|name| is_uuid(name)).map(str::to_owned));
    }
    found.sort();
    Ok(found)
}

/// Forgets that a shadow waits here, and removes its journal; other files in its folder stay.
pub(super) fn forget(run_dir: &Path, uuid: &str) -> io::Result<()> {
    for file in [journal_path(run_dir, uuid), path(run_dir, uuid)] {
        match fs::remove_file(file) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    // Not empty if the agent keeps something of its own there.
    let _ = fs::remove_dir(directory(run_dir, uuid));
    Ok(())
}

/// Removes all that is kept of a shadow.
pub(super) fn remove(run_dir: &Path, uuid: &str) -> io::Result<()> {
    match fs::remove_dir_all(directory(run_dir, uuid)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// A UUID as libvirt writes it; nothing else may become part of a path.
pub fn is_uuid(text: &str) -> bool {
    text.len() == 36
        && text.bytes().enumerate().all(|(i, byte)| match i {
            8 | 13 | 18 | 23 => byte == b'-',
            _ => byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    const UUID: &str = "5f0ad1f9-1d3c-4d5b-9d0b-3f5f2f9f7a11";

    fn scratch(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("records-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        path
    }

    #[test]
    fn records_are_found_again_and_removed() {
        let run_dir = scratch("round");
        assert_eq!(Record::read(&run_dir, UUID).unwrap(), None);
        let process = QemuProcess { pid: 77, start_ticks: 1234 };
        let mut record = Record::new(UUID, "web", process, "<domain/>", None);
        record.write(&run_dir).unwrap();
        record.phase = Phase::Promoting;
        record.feed_inode = Some(9);
        record.write(&run_dir).unwrap();
        assert_eq!(Record::read(&run_dir, UUID).unwrap(), Some(record));
        fs::create_dir(run_dir.join("shadows/not-a-uuid")).unwrap();
        assert_eq!(recorded(&run_dir).unwrap(), [UUID]);
        fs::write(journal_path(&run_dir, UUID), "epochs").unwrap();
        fs::write(directory(&run_dir, UUID).join("target"), "promoted").unwrap();
        forget(&run_dir, UUID).unwrap();
        assert_eq!(Record::read(&run_dir, UUID).unwrap(), None);
        assert_eq!(fs::read_dir(directory(&run_dir, UUID)).unwrap().count(), 1, "the agent's own file stays");
        remove(&run_dir, UUID).unwrap();
        remove(&run_dir, UUID).unwrap();
        assert!(recorded(&run_dir).unwrap().is_empty());
        fs::remove_dir_all(run_dir).unwrap();
    }

    #[test]
    fn broken_and_foreign_records_are_as_none() {
        let run_dir = scratch("broken");
        let process = QemuProcess { pid: 1, start_ticks: 1 };
        Record::new(UUID, "web", process, "", None).write(&run_dir).unwrap();
        let good = fs::read_to_string(path(&run_dir, UUID)).unwrap();
        for broken in [&good[..good.len() / 2], "", "[]", &good.replace("\"version\":2", "\"version\":3")] {
            fs::write(path(&run_dir, UUID), broken).unwrap();
            assert_eq!(Record::read(&run_dir, UUID).unwrap(), None, "{broken}");
        }
        fs::remove_dir_all(run_dir).unwrap();
    }

    #[test]
    fn only_uuids_become_paths() {
        assert!(is_uuid(UUID));
        for bad in ["", "..", "../../../etc/passwd-0123456789abcdef01", &UUID.to_uppercase(), &format!("{UUID}0")] {
            assert!(!is_uuid(bad), "{bad}");
        }
    }
}
