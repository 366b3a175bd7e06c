//! Which pages the guest wrote since the last cut: one interface, two ways.
//!
//! | tracker | needs | cost of a cut |
//! | --- | --- | --- |
//! | `userfaultfd` | Linux 6.7, CAP_SYS_PTRACE | a walk of page tables, about 0.5 ms per GiB of small pages |
//! | `hash` | nothing | reads and hashes all RAM, about 100 ms per GiB |
//!
//! Soft-dirty, the third way the kernel offers, resets a bit that checkpointing tools use as well and needs a kernel
//! built for it; a kernel with it but without PAGEMAP_SCAN gets `hash`.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use vmsync::page_set::{OutsideLayout, PageSet};
use vmsync::units::PAGE_SIZE_U64;
use xxhash_rust::xxh3::xxh3_64;

use super::memory::{GuestMemory, MemoryError};
use super::uffd::{ProtectMode, WriteTracker};

#[derive(Debug, thiserror::Error)]
pub enum TrackerError {
    #[error("write tracking of QEMU (process {pid}): {what}: {source}")]
    Kernel { pid: i32, what: &'static str, source: io::Error },
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The kernel reported a page that no RAM block holds.
    #[error(transparent)]
    Layout(#[from] OutsideLayout),
}

/// Finds written pages. The guest is stopped, its I/O drained, whenever `collect` is called.
pub trait Tracker: Send {
    fn name(&self) -> &'static str;

    /// Does the next part of getting ready, with the guest stopped; false: more parts remain. Nothing counts as
    /// tracked before it returned true. Bounded so that a part costs a pause like any other.
    fn prepare_part(&mut self, memory: &GuestMemory) -> Result<bool, TrackerError>;

    /// Adds to `written` all pages written since the last call, and possibly a few more.
    fn collect(&mut self, memory: &GuestMemory, written: &mut PageSet) -> Result<(), TrackerError>;
}

/// By userfaultfd and PAGEMAP_SCAN.
pub struct UserfaultTracker {
    tracker: WriteTracker,
    /// Bytes of all blocks, in order, that are protected already.
    prepared: u64,
}

/// Time spent in one pause on protecting RAM for the first time, looked at after each chunk of so many bytes. A chunk
/// of small pages takes some 50 us, of shared memory that this QEMU has not touched yet ten times as long.
const PREPARE_FOR: Duration = Duration::from_micros(1000);
const PREPARE_CHUNK_BYTES: u64 = 4 << 20;

impl UserfaultTracker {
    pub fn new(uffd: OwnedFd, memory: &GuestMemory, mode: ProtectMode) -> Result<Self, TrackerError> {
        let kernel = |what| move |source| TrackerError::Kernel { pid: memory.pid(), what, source };
        let tracker = WriteTracker::new(uffd, memory.pid(), mode).map_err(kernel("userfaultfd"))?;
        for (_, address, len) in memory.ranges() {
            tracker.register(address, len).map_err(kernel("registering a RAM block"))?;
        }
        Ok(Self { tracker, prepared: 0 })
    }
}

impl Tracker for UserfaultTracker {
    fn name(&self) -> &'static str {
        "userfaultfd"
    }

    fn prepare_part(&mut self, memory: &GuestMemory) -> Result<bool, TrackerError> {
        let began = Instant::now();
        let mut passed = 0;
        for (_, address, len) in memory.ranges() {
            let mut done = self.prepared.saturating_sub(passed).min(len);
            while done < len {
                if began.elapsed() >= PREPARE_FOR {
                    return Ok(false);
                }
                let part = (len - done).min(PREPARE_CHUNK_BYTES);
                let kernel = |source| TrackerError::Kernel { pid: memory.pid(), what: "first protection", source };
                self.tracker.collect(address + done, part, |_, _| {}).map_err(kernel)?;
                self.prepared += part;
                done += part;
            }
            passed += len;
        }
        Ok(true)
    }

    fn collect(&mut self, memory: &GuestMemory, written: &mut PageSet) -> Result<(), TrackerError> {
        for (block, address, len) in memory.ranges() {
            let mut inserted = Ok(());
            self.tracker
                .collect(address, len, |start, end| {
                    let (first, count) = ((start - address) / PAGE_SIZE_U64, (end - start) / PAGE_SIZE_U64);
                    inserted = inserted.and(written.insert_range(block, first, count));
                })
                .map_err(|source| TrackerError::Kernel { pid: memory.pid(), what: "scanning for writes", source })?;
            inserted?;
        }
        Ok(())
    }
}

/// By comparing a hash of every page with that of the cut before.
pub struct HashTracker {
    hashes: Vec<Vec<u64>>,
}

impl HashTracker {
    pub fn new(memory: &GuestMemory) -> Self {
        let pages = |len: u64| (len / PAGE_SIZE_U64) as usize;
        Self { hashes: memory.ranges().map(|(_, _, len)| vec![0; pages(len)]).collect() }
    }
}

impl Tracker for HashTracker {
    fn name(&self) -> &'static str {
        "hash"
    }

    fn prepare_part(&mut self, _: &GuestMemory) -> Result<bool, TrackerError> {
        Ok(true)
    }

    fn collect(&mut self, memory: &GuestMemory, written: &mut PageSet) -> Result<(), TrackerError> {
        let hashes = &mut self.hashes;
        let mut inserted = Ok(false);
        memory.for_each_page(|addr, page| {
            let known = &mut hashes[addr.block.as_usize()][addr.page.get() as usize];
            let hash = xxh3_64(page);
            if *known != hash {
                *known = hash;
                inserted = inserted.and(written.insert(addr));
            }
        })?;
        inserted?;
        Ok(())
    }
}
