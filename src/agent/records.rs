//! What this host must remember over a reboot: of which guests it was primary or shadow, and with which term.
//!
//! One JSON file a guest, `<state_dir>/guests/<uuid>.json`, written whole (new file, fsync, rename, fsync of the
//! folder). The libvirt hook reads the same files when the daemon does not answer, so that a host that comes back
//! does not start a guest that runs elsewhere by now.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use crate::api::control::{GuestRecord, Role};
use crate::standby::{is_uuid, replace_file};

#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {path}: {source}")]
pub struct RecordError {
    action: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// The records of this host, in memory and on disk.
#[derive(Debug)]
pub struct Records {
    dir: PathBuf,
    guests: Mutex<BTreeMap<String, GuestRecord>>,
}

impl Records {
    /// Reads what is there. An unreadable file is reported and left alone, never deleted.
    pub fn open(state_dir: &Path) -> Result<Self, RecordError> {
        let dir = state_dir.join("guests");
        let error = |action, path: &Path| {
            let path = path.to_path_buf();
            move |source| RecordError { action, path, source }
        };
        fs::create_dir_all(&dir).map_err(error("create", &dir))?;
        let mut guests = BTreeMap::new();
        for entry in fs::read_dir(&dir).map_err(error("list", &dir))? {
            let path = entry.map_err(error("list", &dir))?.path();
            if path.extension().is_none_or(|e| e != "json") {
                continue;
            }
            let text = fs::read_to_string(&path).map_err(error("read", &path))?;
            match serde_json::from_str::<GuestRecord>(&text) {
                Ok(record) if is_uuid(&record.uuid) => drop(guests.insert(record.uuid.clone(), record)),
                Ok(record) => tracing::error!(path = %path.display(), uuid = record.uuid, "record with a bad UUID"),
                Err(error) => tracing::error!(path = %path.display(), %error, "unreadable record, left as it is"),
            }
        }
        Ok(Self { dir, guests: Mutex::new(guests) })
    }

    pub fn get(&self, uuid: &str) -> Option<GuestRecord> {
        self.lock().get(uuid).cloned()
    }

    pub fn all(&self) -> Vec<GuestRecord> {
        self.lock().values().cloned().collect()
    }

    /// Remembers a guest; on disk when this returns. A lower term than the one known is refused by returning the
    /// known record.
    pub fn set(&self, record: GuestRecord) -> Result<Result<(), GuestRecord>, RecordError> {
        let mut guests = self.lock();
        if let Some(known) = guests.get(&record.uuid) {
            if known.term > record.term {
                return Ok(Err(known.clone()));
            }
            if *known == record {
                return Ok(Ok(()));
            }
        }
        self.write(&record)?;
        guests.insert(record.uuid.clone(), record);
        Ok(Ok(()))
    }

    /// Remembers that `uuid` has `role` with `term` here; of a shadow, whose it is is not known any more.
    pub fn set_role(&self, uuid: &str, domain: &str, term: u64, role: Role) -> Result<Result<(), u64>, RecordError> {
        let record = GuestRecord {
            uuid: uuid.into(),
            domain: domain.into(),
            term,
            role,
            primary: None,
            keep: Default::default(),
            active: false,
        };
        Ok(self.set(record)?.map_err(|known| known.term))
    }

    pub fn remove(&self, uuid: &str) -> Result<(), RecordError> {
        let mut guests = self.lock();
        if guests.remove(uuid).is_some() {
            let path = self.path(uuid);
            match fs::remove_file(&path) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(RecordError { action: "remove", path, source });
                }
                _ => self.sync_dir()?,
            }
        }
        Ok(())
    }

    fn write(&self, record: &GuestRecord) -> Result<(), RecordError> {
        let path = self.path(&record.uuid);
        let error = |source| RecordError { action: "write", path: path.clone(), source };
        let text = serde_json::to_vec_pretty(record).map_err(|e| error(io::Error::other(e)))?;
        replace_file(&path, &text).map_err(error)
    }

    fn sync_dir(&self) -> Result<(), RecordError> {
        let error = |source| RecordError { action: "sync", path: self.dir.clone(), source };
        File::open(&self.dir).and_then(|dir| dir.sync_all()).map_err(error)
    }

    fn path(&self, uuid: &str) -> PathBuf {
        self.dir.join(format!("{uuid}.json"))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, GuestRecord>> {
        self.guests.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UUID: &str = "5ad7d3b0-6d1e-4a53-9d1f-0a4c1b7e2f11";

    #[test]
    fn records_survive_and_terms_only_grow() {
        let dir = std::env::temp_dir().join(format!("virt-shadow-records-{}", std::process::id()));
        let records = Records::open(&dir).unwrap();
        assert_eq!(records.set_role(UUID, "web", 3, Role::Primary).unwrap(), Ok(()));
        assert_eq!(records.set_role(UUID, "web", 2, Role::Shadow).unwrap(), Err(3));
        fs::write(dir.join("guests/garbage.json"), "{").unwrap();
        let again = Records::open(&dir).unwrap();
        assert_eq!(again.get(UUID).unwrap().term, 3);
        assert_eq!(again.all().len(), 1);
        again.remove(UUID).unwrap();
        assert!(Records::open(&dir).unwrap().all().is_empty());
        assert!(dir.join("guests/garbage.json").exists());
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn only_uuids_become_file_names() {
        assert!(is_uuid(UUID));
        for bad in
            ["", "../../etc/passwd", "5AD7D3B0-6d1e-4a53-9d1f-0a4c1b7e2f11", "5ad7d3b0-6d1e-4a53-9d1f-0a4c1b7e2f1/"]
        {
            assert!(!is_uuid(bad), "{bad}");
        }
    }
}
