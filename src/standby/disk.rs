//! One disk of a shadow: a raw file that the waiting QEMU has open as well, and does not touch before it is promoted.
//!
//! What was written is written out every second, on a thread of its own. Left to the kernel it would be up to half a minute
//! of a guest's writes, and a promoted guest's first sync, for which QEMU's main loop may have to wait, would take as long
//! as all of it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::Thread;
use std::time::Duration;

use vmsync::units::{PAGE_SIZE, PAGE_SIZE_U64, Page};

use crate::disk::hole;

const ZERO_PAGE: Page = [0; PAGE_SIZE];
const WRITE_OUT_EVERY: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(super) struct DiskFile {
    shared: Arc<Shared>,
    writer: Thread,
}

#[derive(Debug)]
struct Shared {
    file: File,
    path: PathBuf,
    /// Since it was written out last.
    written: AtomicBool,
    ended: AtomicBool,
    /// What was taken for written is not on the disk: the kernel says so once.
    failure: Mutex<Option<io::Error>>,
}

impl DiskFile {
    /// Opens what must be there, with this length.
    pub(super) fn open(path: &Path, len: u64) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let found = file.metadata()?.len();
        if found != len {
            return Err(io::Error::other(format!("{} has {found} bytes, not {len}", path.display())));
        }
        let (written, ended) = (AtomicBool::new(false), AtomicBool::new(false));
        let shared = Arc::new(Shared { file, path: path.to_owned(), written, ended, failure: Mutex::default() });
        let theirs = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("disk-write-out".into()).spawn(move || theirs.write_out())?;
        Ok(Self { shared, writer: thread.thread().clone() })
    }

    pub(super) fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.shared.file.read_exact_at(bytes, offset)
    }

    pub(super) fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.shared.check()?;
        self.shared.written.store(true, Ordering::Relaxed);
        self.shared.file.write_all_at(bytes, offset)
    }

    /// Makes a page a hole, or writes zeros where that cannot be done.
    pub(super) fn zero_page(&self, offset: u64) -> io::Result<()> {
        let mut page = ZERO_PAGE;
        self.read(offset, &mut page)?;
        if page == ZERO_PAGE {
            return Ok(());
        }
        hole::punch(&self.shared.file, offset, PAGE_SIZE_U64).or_else(|_| self.write(offset, &ZERO_PAGE))
    }

    pub(super) fn sync(&self) -> io::Result<()> {
        self.shared.check()?;
        self.shared.file.sync_data()
    }
}

impl Drop for DiskFile {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Release);
        // Not waited for: it may be in the middle of it.
        self.writer.unpark();
    }
}

impl Shared {
    fn write_out(&self) {
        while !self.ended.load(Ordering::Acquire) {
            std::thread::park_timeout(WRITE_OUT_EVERY);
            if !self.written.swap(false, Ordering::Relaxed) {
                continue;
            }
            if let Err(error) = self.file.sync_data() {
                tracing::error!(path = %self.path.display(), %error, "a shadow's disk cannot be written out");
                *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            }
        }
    }

    fn check(&self) -> io::Result<()> {
        match self.failure.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_could_not_be_written_out_is_told() {
        let path = std::env::temp_dir().join(format!("virt-shadow-disk-file-{}", std::process::id()));
        File::create(&path).unwrap().set_len(8192).unwrap();
        assert!(DiskFile::open(&path, 4096).unwrap_err().to_string().contains("8192 bytes"));
        let disk = DiskFile::open(&path, 8192).unwrap();
        disk.write(4096, &[7; 4096]).unwrap();
        disk.zero_page(0).unwrap();
        disk.sync().unwrap();
        *disk.shared.failure.lock().unwrap() = Some(io::Error::other("no such sector"));
        assert!(disk.write(0, &[1]).unwrap_err().to_string().contains("no such sector"));
        let mut page = [0; 4096];
        disk.read(4096, &mut page).unwrap();
        assert_eq!(page, [7; 4096]);
        let writer = Arc::downgrade(&disk.shared);
        drop(disk);
        while writer.upgrade().is_some() {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::fs::remove_file(path).unwrap();
    }
}
