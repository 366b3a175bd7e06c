//! One disk of a shadow: a raw file that the waiting QEMU has open as well, and does not touch before it is promoted.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use vmsync::units::{PAGE_SIZE, PAGE_SIZE_U64, Page};

use crate::disk::hole;

const ZERO_PAGE: Page = [0; PAGE_SIZE];

#[derive(Debug)]
pub(super) struct DiskFile {
    file: File,
}

impl DiskFile {
    /// Opens what must be there, with this length.
    pub(super) fn open(path: &Path, len: u64) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let found = file.metadata()?.len();
        if found != len {
            return Err(io::Error::other(format!("{} has {found} bytes, not {len}", path.display())));
        }
        Ok(Self { file })
    }

    pub(super) fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(bytes, offset)
    }

    pub(super) fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }

    /// Makes a page a hole, or writes zeros where that cannot be done.
    pub(super) fn zero_page(&self, offset: u64) -> io::Result<()> {
        let mut page = ZERO_PAGE;
        self.read(offset, &mut page)?;
        if page == ZERO_PAGE {
            return Ok(());
        }
        hole::punch(&self.file, offset, PAGE_SIZE_U64).or_else(|_| self.write(offset, &ZERO_PAGE))
    }

    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}
