//! The file that staged epochs are journaled in. What the bytes mean is `vmsync`'s business; here they are kept,
//! whole or not at all, below a limit.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::sys::statfs::{TMPFS_MAGIC, fstatfs, statfs};

#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    #[error("cannot {action} {path}: {source}")]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error("no room for {needed} bytes in {path}: its file system is full; free space or move run_dir")]
    NoRoom { path: PathBuf, needed: u64 },
    #[error("{path} holds {len} bytes and may hold {limit}: {needed} more do not fit")]
    Limit { path: PathBuf, len: u64, limit: u64, needed: u64 },
    #[error("{path} has {len} bytes, not {wanted}")]
    Short { path: PathBuf, len: u64, wanted: u64 },
}

type Result<T> = std::result::Result<T, JournalError>;

/// An append-only file with a limit. Dropping it keeps the file.
#[derive(Debug)]
pub struct JournalFile {
    file: File,
    path: PathBuf,
    len: u64,
    limit: u64,
    on_tmpfs: bool,
}

impl JournalFile {
    /// Opens the journal at `path` or makes an empty one; it may grow to `limit` bytes.
    pub fn open(path: &Path, limit: u64) -> Result<Self> {
        let failed = |action| move |source| JournalError::Io { action, path: path.to_owned(), source };
        // Guests' memory is in it: nobody else may read it.
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path);
        let file = file.map_err(failed("open"))?;
        let len = file.metadata().map_err(failed("look at"))?.len();
        let on_tmpfs = fstatfs(&file).is_ok_and(|found| found.filesystem_type() == TMPFS_MAGIC);
        Ok(Self { file, path: path.to_owned(), len, limit, on_tmpfs })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn len(&self) -> u64 {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Adds `bytes` at the end. When that fails the journal is as it was.
    pub fn append(&mut self, bytes: &[u8]) -> Result<()> {
        let needed = bytes.len() as u64;
        let new_len = self.len.checked_add(needed).filter(|len| *len <= self.limit);
        let Some(new_len) = new_len else {
            return Err(JournalError::Limit { path: self.path.clone(), len: self.len, limit: self.limit, needed });
        };
        if let Err(source) = self.file.write_all_at(bytes, self.len) {
            // Bytes after `len` do not belong to the journal; if even this fails, `open` after a crash sees them and
            // the layout's checksums tell.
            let _ = self.file.set_len(self.len);
            return Err(match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                    JournalError::NoRoom { path: self.path.clone(), needed }
                }
                _ => self.failed("append to", source),
            });
        }
        self.len = new_len;
        Ok(())
    }

    /// Makes what was appended survive a power cut of this host, where the file system can.
    pub fn seal(&mut self) -> Result<()> {
        if self.on_tmpfs {
            return Ok(());
        }
        self.file.sync_data().map_err(|source| self.failed("sync", source))
    }

    /// Fills `buffer` from `offset`; fails if there are not that many bytes.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let wanted = offset.saturating_add(buffer.len() as u64);
        if wanted > self.len {
            return Err(JournalError::Short { path: self.path.clone(), len: self.len, wanted });
        }
        self.file.read_exact_at(buffer, offset).map_err(|source| self.failed("read", source))
    }

    /// The whole journal, to replay it after a restart.
    pub fn read_all(&self) -> Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(self.len).unwrap_or(usize::MAX)];
        self.read_at(0, &mut bytes)?;
        Ok(bytes)
    }

    /// Keeps the first `len` bytes only.
    pub fn truncate(&mut self, len: u64) -> Result<()> {
        if len > self.len {
            return Err(JournalError::Short { path: self.path.clone(), len: self.len, wanted: len });
        }
        self.file.set_len(len).map_err(|source| self.failed("truncate", source))?;
        self.len = len;
        Ok(())
    }

    fn failed(&self, action: &'static str, source: io::Error) -> JournalError {
        JournalError::Io { action, path: self.path.clone(), source }
    }
}

/// Whether files at `path` (or where it will be made) live in memory, as journals and shadows' records should.
pub fn is_on_tmpfs(path: &Path) -> bool {
    let existing = path.ancestors().find(|ancestor| fs::symlink_metadata(ancestor).is_ok());
    existing.and_then(|path| statfs(path).ok()).is_some_and(|found| found.filesystem_type() == TMPFS_MAGIC)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("journal-{name}-{}", std::process::id()));
        let _ = fs::remove_file(&path);
        path
    }

    #[test]
    fn what_was_appended_is_read_back_after_a_restart() {
        let path = scratch("replay");
        let mut journal = JournalFile::open(&path, 100).unwrap();
        assert!(journal.is_empty());
        journal.append(b"epoch one ").unwrap();
        journal.append(b"epoch two").unwrap();
        journal.seal().unwrap();
        drop(journal);
        let mut journal = JournalFile::open(&path, 100).unwrap();
        assert_eq!(journal.read_all().unwrap(), b"epoch one epoch two");
        journal.truncate(10).unwrap();
        journal.append(b"epoch 2").unwrap();
        assert_eq!(journal.read_all().unwrap(), b"epoch one epoch 2");
        assert!(matches!(journal.read_at(15, &mut [0; 3]), Err(JournalError::Short { .. })));
        assert!(matches!(journal.truncate(99), Err(JournalError::Short { .. })));
        fs::remove_file(path).unwrap();
    }

    #[test]
    fn the_limit_holds_and_leaves_the_journal_usable() {
        let path = scratch("limit");
        let mut journal = JournalFile::open(&path, 10).unwrap();
        journal.append(&[1; 8]).unwrap();
        assert!(matches!(journal.append(&[2; 3]), Err(JournalError::Limit { needed: 3, .. })));
        journal.append(&[3; 2]).unwrap();
        assert_eq!(journal.len(), 10);
        fs::remove_file(path).unwrap();
    }

    #[test]
    fn a_full_file_system_is_named_and_nothing_half_stays() {
        // Always full, and there on every Linux.
        let mut journal = JournalFile::open(Path::new("/dev/full"), 1 << 20).unwrap();
        assert!(matches!(journal.append(&[0; 4096]), Err(JournalError::NoRoom { needed: 4096, .. })));
        assert_eq!(journal.len(), 0);
    }

    #[test]
    fn file_systems_in_memory_are_told_apart() {
        assert!(is_on_tmpfs(Path::new("/dev/shm/not/there/yet")));
        assert!(!is_on_tmpfs(Path::new("/proc/self")));
    }
}
