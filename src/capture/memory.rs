//! Reads the RAM blocks of a running QEMU from outside, and says when the set of blocks may have changed.

use std::fs;
use std::io;
use std::sync::Arc;

use vmsync::batch::PageBatch;
use vmsync::layout::RamLayout;
use vmsync::units::{BlockIndex, PAGE_SIZE, Page, PageAddr, PageIndex};
use xxhash_rust::xxh3::xxh3_64;

use crate::disk::DiskSet;

/// Ranges handed to one process_vm_readv; the kernel's limit is 1,024.
const RANGES_PER_CALL: usize = 512;

/// The RAM of one QEMU process: where each block of the layout lies in its address space. Behind it, as further blocks,
/// the guest's disks, which are read from their copies.
#[derive(Clone)]
pub struct GuestMemory {
    pid: i32,
    layout: Arc<RamLayout>,
    /// Host virtual address of each block of RAM in QEMU, in the layout's order.
    addresses: Vec<u64>,
    disks: Option<Arc<DiskSet>>,
}

#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    #[error("QEMU (process {pid}) ended")]
    Gone { pid: i32 },
    #[error("reading {len} bytes at {address:#x} of QEMU (process {pid}): {source}")]
    Read { pid: i32, address: u64, len: usize, source: io::Error },
    #[error("reading the copy of disk {block}: {source}")]
    Disk { block: String, source: io::Error },
    #[error("{0}")]
    Layout(String),
}

impl GuestMemory {
    /// `addresses`: one host virtual address for each block of `layout`.
    pub fn new(pid: i32, layout: Arc<RamLayout>, addresses: Vec<u64>) -> Result<Self, MemoryError> {
        if addresses.len() != layout.blocks().len() || addresses.iter().any(|at| at % PAGE_SIZE as u64 != 0) {
            return Err(MemoryError::Layout("RAM block addresses do not match the layout".into()));
        }
        Ok(Self { pid, layout, addresses, disks: None })
    }

    /// The same memory with the guest's disks behind it.
    pub fn with_disks(mut self, disks: Arc<DiskSet>) -> Result<Self, MemoryError> {
        let layout = disks.layout(&self.layout).map_err(|error| MemoryError::Layout(error.to_string()))?;
        self.layout = Arc::new(layout);
        self.disks = Some(disks);
        Ok(self)
    }

    /// The disks, and the index of the first one's block.
    pub fn disks(&self) -> Option<(&Arc<DiskSet>, usize)> {
        self.disks.as_ref().map(|disks| (disks, self.addresses.len()))
    }

    /// Whether this page is read from the copy of a disk.
    pub fn is_disk(&self, page: PageAddr) -> bool {
        page.block.as_usize() >= self.addresses.len()
    }

    pub fn pid(&self) -> i32 {
        self.pid
    }

    pub fn layout(&self) -> &Arc<RamLayout> {
        &self.layout
    }

    /// Each block of RAM: its index, address in QEMU and length in bytes.
    pub fn ranges(&self) -> impl Iterator<Item = (BlockIndex, u64, u64)> + '_ {
        self.layout
            .blocks()
            .iter()
            .zip(&self.addresses)
            .enumerate()
            .map(|(index, (block, address))| (BlockIndex::new(index as u16), *address, block.len_bytes))
    }

    fn address(&self, page: PageAddr) -> u64 {
        self.addresses[page.block.get() as usize] + u64::from(page.page.get()) * PAGE_SIZE as u64
    }

    /// The contents of `pages`; neighbours are read as one range. `spare` gives its buffers.
    pub fn read(&self, pages: impl Iterator<Item = PageAddr>, mut spare: PageBatch) -> Result<PageBatch, MemoryError> {
        spare.clear();
        self.read_more(pages, spare)
    }

    /// The same, behind those that `batch` has.
    pub fn read_more(&self, pages: impl Iterator<Item = PageAddr>, batch: PageBatch) -> Result<PageBatch, MemoryError> {
        let (mut addrs, mut bytes) = batch.into_parts();
        let mut ranges: Vec<libc::iovec> = Vec::with_capacity(RANGES_PER_CALL);
        let mut pages = pages.peekable();
        while let Some(page) = pages.next() {
            if self.is_disk(page) {
                // Disks are the last blocks of a set of pages, but nothing here depends on it.
                if !ranges.is_empty() {
                    self.read_ranges(&ranges, &mut bytes)?;
                    ranges.clear();
                }
                addrs.push(page);
                let mut count = 1;
                let is_next = |next: &PageAddr, count: usize| {
                    next.block == page.block && next.page.get() as usize == page.page.get() as usize + count
                };
                while let Some(next) = pages.next_if(|next| is_next(next, count)) {
                    addrs.push(next);
                    count += 1;
                }
                self.read_disk(page, count, &mut bytes)?;
                continue;
            }
            let at = self.address(page);
            match ranges.last_mut() {
                Some(last) if last.iov_base as u64 + last.iov_len as u64 == at => last.iov_len += PAGE_SIZE,
                _ => {
                    if ranges.len() == RANGES_PER_CALL {
                        self.read_ranges(&ranges, &mut bytes)?;
                        ranges.clear();
                    }
                    ranges.push(libc::iovec { iov_base: at as *mut libc::c_void, iov_len: PAGE_SIZE });
                }
            }
            addrs.push(page);
        }
        if !ranges.is_empty() {
            self.read_ranges(&ranges, &mut bytes)?;
        }
        PageBatch::from_parts(addrs, bytes).map_err(|error| MemoryError::Layout(error.to_string()))
    }

    fn read_disk(&self, page: PageAddr, count: usize, bytes: &mut Vec<u8>) -> Result<(), MemoryError> {
        let index = page.block.as_usize() - self.addresses.len();
        let read = match &self.disks {
            Some(disks) => disks.read(index, page, count, bytes),
            None => Err(io::Error::from(io::ErrorKind::InvalidInput)),
        };
        read.map_err(|source| {
            let block = self.layout.block(page.block).map_or("?", |block| block.name.as_str()).to_owned();
            MemoryError::Disk { block, source }
        })
    }

    fn read_ranges(&self, ranges: &[libc::iovec], bytes: &mut Vec<u8>) -> Result<(), MemoryError> {
        let pid = self.pid;
        let len: usize = ranges.iter().map(|range| range.iov_len).sum();
        bytes.reserve(len);
        let local = libc::iovec { iov_base: bytes.spare_capacity_mut().as_mut_ptr().cast(), iov_len: len };
        // SAFETY: `local` describes spare capacity of at least `len` bytes; the remote ranges are checked by the
        // kernel against the other process, never dereferenced here.
        let read = unsafe { libc::process_vm_readv(pid, &local, 1, ranges.as_ptr(), ranges.len() as libc::c_ulong, 0) };
        if read == len as isize {
            // SAFETY: the kernel has just written these `len` bytes.
            unsafe { bytes.set_len(bytes.len() + len) };
            return Ok(());
        }
        let source = io::Error::last_os_error();
        if read < 0 && source.raw_os_error() == Some(libc::ESRCH) {
            return Err(MemoryError::Gone { pid });
        }
        let source = if read < 0 { source } else { io::Error::from(io::ErrorKind::UnexpectedEof) };
        Err(MemoryError::Read { pid, address: ranges[0].iov_base as u64, len, source })
    }

    /// Calls `each` with the contents of every page, in order, reading 2 MiB at a time.
    pub fn for_each_page(&self, mut each: impl FnMut(PageAddr, &Page)) -> Result<(), MemoryError> {
        const CHUNK_PAGES: u32 = 512;
        let mut batch = PageBatch::new();
        for (block, _, len) in self.ranges() {
            let pages = (len / PAGE_SIZE as u64) as u32;
            for start in (0..pages).step_by(CHUNK_PAGES as usize) {
                let addr = |page| PageAddr { block, page: PageIndex::new(page) };
                batch = self.read((start..pages.min(start + CHUNK_PAGES)).map(addr), batch)?;
                batch.iter().for_each(|(addr, page)| each(addr, page));
            }
        }
        Ok(())
    }

    /// A digest of the process's mappings. While it stays the same no RAM block was added, removed or moved; when
    /// it changes, that may have happened (or a thread may have started): ask QEMU.
    pub fn mappings_digest(&self) -> Result<u64, MemoryError> {
        let maps = fs::read(format!("/proc/{}/maps", self.pid)).map_err(|_| MemoryError::Gone { pid: self.pid })?;
        Ok(xxh3_64(&maps))
    }
}
