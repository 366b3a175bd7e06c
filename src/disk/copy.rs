//! The local copy of one disk: a sparse file of the disk's size, and which of its pages were written since the last cut.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use vmsync::page_set::{OutsideLayout, PageSet};
use vmsync::units::{BlockIndex, PAGE_SIZE, PAGE_SIZE_U64, Page};

use super::hole;

/// Written pages that are listed; more than these are found by looking through the bitmap.
const LISTED_MAX: usize = 1 << 16;
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// See the module's description. A write is in the file before its pages count as written: whoever sees a page as
/// written reads the new contents.
#[derive(Debug)]
pub struct DiskCopy {
    file: File,
    path: PathBuf,
    len: u64,
    written: Mutex<Written>,
}

#[derive(Debug)]
struct Written {
    taken: Taken,
    /// Off until the copy is complete: before, everything is to be looked at anyway.
    tracked: bool,
    bits: Vec<u64>,
    listed: Vec<u32>,
    overflown: bool,
}

/// Pages as they were at a cut whose contents have not been read yet: the guest runs on and writes.
#[derive(Debug, Default)]
struct Taken {
    /// First page and number of each, in order.
    ranges: Vec<(u64, u64)>,
    /// What was there before it was written.
    kept: HashMap<u64, Box<Page>>,
}

impl Taken {
    fn contains(&self, page: u64) -> bool {
        let behind = self.ranges.partition_point(|(first, _)| *first <= page);
        behind > 0 && page < self.ranges[behind - 1].0 + self.ranges[behind - 1].1
    }
}

impl DiskCopy {
    /// Opens the file at `path` or makes it, with `len` bytes (whole pages).
    pub fn open(path: &Path, len: u64) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
        file.set_len(len)?;
        let words = usize::try_from((len / PAGE_SIZE_U64).div_ceil(64)).map_err(io::Error::other)?;
        let written = Written {
            taken: Taken::default(),
            tracked: false,
            bits: vec![0; words],
            listed: Vec::new(),
            overflown: false,
        };
        Ok(Self { file, path: path.to_owned(), len, written: Mutex::new(written) })
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

    pub fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.keep(offset, bytes.len() as u64)?;
        self.file.write_all_at(bytes, offset)?;
        self.note(offset, bytes.len() as u64);
        Ok(())
    }

    /// Makes a range zero; whole pages of it become a hole.
    pub fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.keep(offset, len)?;
        if len > 0 && hole::punch(&self.file, offset, len).is_err() {
            let mut at = offset;
            while at < offset + len {
                let part = (offset + len - at).min(ZEROS.len() as u64);
                self.file.write_all_at(&ZEROS[..part as usize], at)?;
                at += part;
            }
        }
        self.note(offset, len);
        Ok(())
    }

    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(bytes, offset)
    }

    /// Adds `count` pages from `page` on to `bytes`; those that are held, as they were then.
    pub fn read_pages(&self, page: u64, count: usize, bytes: &mut Vec<u8>) -> io::Result<()> {
        let start = bytes.len();
        bytes.resize(start + count * PAGE_SIZE, 0);
        self.read(page * PAGE_SIZE_U64, &mut bytes[start..])?;
        // In this order: what is written before this look was kept before it was written.
        let taken = &self.lock().taken;
        if !taken.kept.is_empty() {
            for (read, page) in bytes[start..].as_chunks_mut::<PAGE_SIZE>().0.iter_mut().zip(page..) {
                if let Some(kept) = taken.kept.get(&page) {
                    read.copy_from_slice(&**kept);
                }
            }
        }
        Ok(())
    }

    /// Until [`Self::release`] these pages (first and number, in order) are read as they are now, whatever is written.
    /// Nothing is being written now.
    pub fn hold(&self, ranges: Vec<(u64, u64)>) {
        self.lock().taken = Taken { ranges, kept: HashMap::new() };
    }

    pub fn release(&self) {
        self.lock().taken = Taken::default();
    }

    /// Before this is written: keeps what is held of it.
    fn keep(&self, offset: u64, len: u64) -> io::Result<()> {
        let taken = &mut self.lock().taken;
        if taken.ranges.is_empty() || len == 0 {
            return Ok(());
        }
        for page in offset / PAGE_SIZE_U64..(offset + len).div_ceil(PAGE_SIZE_U64) {
            if taken.contains(page) && !taken.kept.contains_key(&page) {
                let mut old = Box::new([0; PAGE_SIZE]);
                self.file.read_exact_at(&mut *old, page * PAGE_SIZE_U64)?;
                taken.kept.insert(page, old);
            }
        }
        Ok(())
    }

    /// From now on written pages are known.
    pub fn track(&self) {
        self.lock().tracked = true;
    }

    /// Adds the pages written since the last call to `into`, as pages of `block`.
    pub fn take_written(&self, block: BlockIndex, into: &mut PageSet) -> Result<(), OutsideLayout> {
        let written = &mut *self.lock();
        if !std::mem::take(&mut written.overflown) {
            for page in written.listed.drain(..) {
                written.bits[page as usize / 64] &= !(1 << (page % 64));
                into.insert_range(block, page.into(), 1)?;
            }
            return Ok(());
        }
        written.listed.clear();
        for (index, word) in written.bits.iter_mut().enumerate().filter(|(_, word)| **word != 0) {
            let mut left = std::mem::take(word);
            while left != 0 {
                let first = left.trailing_zeros();
                let count = (left >> first).trailing_ones();
                into.insert_range(block, index as u64 * 64 + u64::from(first), count.into())?;
                left &= u64::MAX.checked_shl(first + count).unwrap_or(0);
            }
        }
        Ok(())
    }

    fn note(&self, offset: u64, len: u64) {
        let written = &mut *self.lock();
        if !written.tracked || len == 0 {
            return;
        }
        for page in offset / PAGE_SIZE_U64..(offset + len).div_ceil(PAGE_SIZE_U64) {
            let (word, bit) = ((page / 64) as usize, 1u64 << (page % 64));
            if written.bits[word] & bit == 0 {
                written.bits[word] |= bit;
                if written.listed.len() < LISTED_MAX {
                    // A layout's pages are numbered with 32 bits.
                    written.listed.push(page as u32);
                } else {
                    written.overflown = true;
                }
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Written> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmsync::{RamBlock, RamLayout};

    #[test]
    fn held_pages_are_read_as_they_were() {
        let path = std::env::temp_dir().join(format!("virt-shadow-held-{}", std::process::id()));
        let copy = DiskCopy::open(&path, 64 * PAGE_SIZE_U64).unwrap();
        let first_bytes = || {
            let mut bytes = Vec::new();
            copy.read_pages(0, 64, &mut bytes).unwrap();
            bytes.chunks(PAGE_SIZE).map(|page| page[0]).collect::<Vec<_>>()
        };
        let mut contents: Vec<u8> = (1..=64).collect();
        for (page, byte) in contents.iter().enumerate() {
            copy.write((page * PAGE_SIZE) as u64, &[*byte; PAGE_SIZE]).unwrap();
        }
        copy.hold(vec![(0, 1), (7, 3), (63, 1)]);
        // Twice, in part, over a border, as zeroes, and where nothing is held.
        copy.write(0, &[100; 10]).unwrap();
        copy.write(0, &[101; 10]).unwrap();
        copy.write(6 * PAGE_SIZE_U64, &[102; 3 * PAGE_SIZE]).unwrap();
        copy.zero(9 * PAGE_SIZE_U64, 2 * PAGE_SIZE_U64).unwrap();
        copy.zero(63 * PAGE_SIZE_U64, 10).unwrap();
        (contents[6], contents[10]) = (102, 0);
        assert_eq!(first_bytes(), contents);
        copy.release();
        (contents[0], contents[7], contents[8], contents[9], contents[63]) = (101, 102, 102, 0, 0);
        assert_eq!(first_bytes(), contents);
        copy.write(0, &[103]).unwrap();
        assert_eq!(first_bytes()[0], 103, "nothing is held any more");
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn written_pages_are_told_once_however_many_there_are() {
        let path = std::env::temp_dir().join(format!("virt-shadow-copy-{}", std::process::id()));
        let pages = 100_000u64;
        let copy = DiskCopy::open(&path, pages * PAGE_SIZE_U64).unwrap();
        let layout = |pages| RamLayout::new(vec![RamBlock { name: "d".into(), len_bytes: pages * 4096 }]).unwrap();
        let layout = layout(pages);
        let take = || {
            let mut set = PageSet::new(&layout);
            copy.take_written(BlockIndex::new(0), &mut set).unwrap();
            set.ranges().map(|(first, count)| (first.page.get(), count)).collect::<Vec<_>>()
        };
        copy.write(0, &[1; 4096]).unwrap();
        assert_eq!(take(), [], "not tracked yet");
        copy.track();
        copy.write(4095, &[2, 2]).unwrap();
        copy.write(10 * 4096, &[3; 512]).unwrap();
        copy.write(10 * 4096, &[4; 512]).unwrap();
        assert_eq!(take(), [(0, 2), (10, 1)]);
        assert_eq!(take(), []);
        copy.zero(64 * 4096, 90_000 * 4096).unwrap();
        copy.write(4096 * 3, &[1]).unwrap();
        assert_eq!(take(), [(3, 1), (64, 90_000)]);
        assert_eq!(take(), []);
        let mut bytes = Vec::new();
        copy.read_pages(0, 2, &mut bytes).unwrap();
        assert_eq!((bytes.len(), bytes[4094], bytes[4095], bytes[4096], bytes[4097]), (8192, 1, 2, 2, 0));
        std::fs::remove_file(path).unwrap();
    }
}
