//! Which pages the guest wrote since the last cut: one interface, two ways.
//!
//! | tracker | needs | cost of a cut |
//! | --- | --- | --- |
//! | `userfaultfd` | Linux 6.7, CAP_SYS_PTRACE | a walk of page tables, shared by threads: about 0.5 ms per GiB of small pages and thread |
//! | `hash` | nothing | reads and hashes all RAM, about 100 ms per GiB |
//!
//! Soft-dirty, the third way the kernel offers, resets a bit that checkpointing tools use as well and needs a kernel
//! built for it; a kernel with it but without PAGEMAP_SCAN gets `hash`.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use vmsync::batch::PageBatch;
use vmsync::page_set::{OutsideLayout, PageSet};
use vmsync::units::{BlockIndex, PAGE_SIZE_U64, PageAddr};
use xxhash_rust::xxh3::xxh3_64;

use super::crew::{self, Crew};
use super::memory::{GuestMemory, MemoryError};
use super::uffd::{ProtectMode, WriteTracker};

#[derive(Debug, thiserror::Error)]
pub enum TrackerError {
    #[error("write tracking of QEMU (process {pid}): {what}: {source}")]
    Kernel { pid: i32, what: &'static str, source: io::Error },
    #[error("waiting for QEMU to write its state: {0}")]
    Writer(#[source] io::Error),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The kernel reported a page that no RAM block holds.
    #[error(transparent)]
    Layout(#[from] OutsideLayout),
}

/// QEMU, which makes the first part of a stopped guest's state and then waits for us to read it. While it is at work, each
/// page table that is protected interrupts it.
pub trait Writer {
    /// Whether it waits already.
    fn waits(&mut self) -> bool;

    /// Returns when it does.
    fn wait(&mut self) -> io::Result<()>;
}

/// Finds written pages. The guest is stopped, its I/O drained, whenever `collect` is called.
pub trait Tracker: Send {
    fn name(&self) -> &'static str;

    /// Does the next part of getting ready, with the guest stopped; false: more parts remain. Nothing counts as
    /// tracked before it returned true. Bounded so that a part costs a pause like any other.
    fn prepare_part(&mut self, memory: &GuestMemory) -> Result<bool, TrackerError>;

    /// Adds to `written` all pages written since the last call, and possibly a few more. When it is done, `qemu` waits.
    fn collect(
        &mut self,
        memory: &GuestMemory,
        written: &mut PageSet,
        qemu: &mut dyn Writer,
    ) -> Result<(), TrackerError>;

    /// Where this tracker must be told what was read of the running guest between two cuts; `None`: it need not.
    fn live_reads(&self) -> Option<LiveReads> {
        None
    }
}

/// Contents of the running guest's pages that were sent or compared since the last cut, as hashes. A page that was changed, read
/// and changed back looks unwritten to who compares cuts only, and its reader has what never was at a cut.
#[derive(Debug, Clone, Default)]
pub struct LiveReads(Arc<Mutex<SeenPages>>);

/// `None`: two readers got different contents, so at least one of them has what is not there at the cut.
type SeenPages = HashMap<PageAddr, Option<u64>>;

impl LiveReads {
    /// To be called before the next cut begins.
    pub fn note(&self, pages: &PageBatch) {
        let mut seen = self.lock();
        for (addr, page) in pages.iter() {
            let hash = Some(xxh3_64(page));
            seen.entry(addr).and_modify(|known| *known = known.filter(|_| *known == hash)).or_insert(hash);
        }
    }

    fn take(&self) -> SeenPages {
        std::mem::take(&mut self.lock())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, SeenPages> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// By userfaultfd and PAGEMAP_SCAN.
pub struct UserfaultTracker {
    tracker: WriteTracker,
    crew: Crew<Arc<Pieces>, Scanned>,
    /// Bytes of all blocks, in order, that are protected already.
    prepared: u64,
}

/// A part of a RAM block, in QEMU's addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stretch {
    block: BlockIndex,
    block_starts_at: u64,
    start: u64,
    len: u64,
}

/// What threads share among them as they go: another process may have the processor of one.
struct Pieces {
    left: Mutex<std::vec::IntoIter<Stretch>>,
    /// QEMU waits: what is found may be protected at once.
    protect: AtomicBool,
}

/// Block, first page, number of pages.
type Pages = (BlockIndex, u64, u64);

/// What one thread found, and what went wrong, if it could not go on.
struct Scanned {
    /// Protected again.
    protected: Vec<Pages>,
    /// Ranges of QEMU's addresses in which written pages were only seen.
    seen: Vec<Stretch>,
    outcome: io::Result<()>,
}

/// Less is not worth waking a thread for: it takes some 60 us to scan.
const SCAN_LEAST_BYTES: u64 = 256 << 20;
/// Borders between pieces are multiples of what one page table maps.
const PAGE_TABLE_BYTES: u64 = 2 << 20;
/// Pieces of RAM for each thread, between which it is seen whether QEMU waits.
const PIECES_EACH: usize = 8;
/// Fewer page tables are not worth waking a thread for: to protect what one maps takes some 5 us.
const TABLES_EACH_LEAST: usize = 8;

/// All of RAM in at most `count` parts of about the same length.
fn shares(memory: &GuestMemory, count: usize) -> Vec<Vec<Stretch>> {
    let total: u64 = memory.ranges().map(|(_, _, len)| len).sum();
    let each = total.div_ceil(count as u64).next_multiple_of(PAGE_TABLE_BYTES);
    let (mut shares, mut room) = (vec![Vec::new()], each);
    for (block, block_starts_at, block_len) in memory.ranges() {
        let (mut start, end) = (block_starts_at, block_starts_at + block_len);
        while start < end {
            if room == 0 {
                shares.push(Vec::new());
                room = each;
            }
            let len = room.min(end - start);
            shares.last_mut().expect("starts with one").push(Stretch { block, block_starts_at, start, len });
            start += len;
            room -= len;
        }
    }
    shares
}

/// Scans pieces until none is left; `between` is called after each.
fn scan(tracker: &mut WriteTracker, pieces: &Pieces, mut between: impl FnMut()) -> Scanned {
    let (mut protected, mut seen) = (Vec::new(), Vec::new());
    let next = || pieces.left.lock().unwrap_or_else(PoisonError::into_inner).next();
    while let Some(stretch) = next() {
        let Stretch { block, block_starts_at, start, len } = stretch;
        let outcome = if pieces.protect.load(Ordering::Relaxed) {
            let to_page = |at: u64| (at - block_starts_at) / PAGE_SIZE_U64;
            let found = |start, end| protected.push((block, to_page(start), (end - start) / PAGE_SIZE_U64));
            tracker.collect(start, len, found)
        } else {
            tracker.look(start, len, |start, end| see(&mut seen, Stretch { start, len: end - start, ..stretch }))
        };
        if outcome.is_err() {
            return Scanned { protected, seen, outcome };
        }
        between();
    }
    Scanned { protected, seen, outcome: Ok(()) }
}

/// Adds a range to those before it; what one page table maps becomes one.
fn see(seen: &mut Vec<Stretch>, next: Stretch) {
    let table = |address: u64| address / PAGE_TABLE_BYTES;
    match seen.last_mut() {
        Some(last) if last.block == next.block && table(last.start + last.len - 1) == table(next.start) => {
            last.len = next.start + next.len - last.start;
        }
        _ => seen.push(next),
    }
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
        let total = memory.ranges().map(|(_, _, len)| len).sum();
        let others = 1..crew::hands_for(total, SCAN_LEAST_BYTES);
        let others: Vec<_> = others.map(|_| tracker.another()).collect::<Result<_, _>>().map_err(kernel("pagemap"))?;
        let work = |mut tracker: WriteTracker| move |pieces: Arc<Pieces>| scan(&mut tracker, &pieces, || ());
        let crew = Crew::start("scanner", others.into_iter().map(work)).map_err(kernel("starting a thread"))?;
        Ok(Self { tracker, crew, prepared: 0 })
    }

    /// Scans `pieces` by at most `hands` threads, from when `qemu` waits on protecting what is found. Adds to `written` what
    /// was protected; returns where else there are written pages.
    fn sweep(
        &mut self,
        pieces: Vec<Stretch>,
        hands: usize,
        written: &mut PageSet,
        qemu: &mut dyn Writer,
    ) -> Result<Vec<Stretch>, TrackerError> {
        let pid = self.tracker.pid();
        let kernel = |source| TrackerError::Kernel { pid, what: "scanning for writes", source };
        let hands = hands.clamp(1, self.crew.len() + 1);
        let protect = AtomicBool::new(qemu.waits());
        let pieces = Arc::new(Pieces { left: Mutex::new(pieces.into_iter()), protect });
        let scanned = self.crew.run(vec![Arc::clone(&pieces); hands], |own| {
            scan(&mut self.tracker, &own, || pieces.protect.store(qemu.waits(), Ordering::Relaxed))
        });
        // What one thread found is kept even if another failed: the kernel tells it only once.
        let (mut outcome, mut elsewhere) = (Ok(()), Vec::new());
        for part in scanned {
            let lost = |lost| Scanned { protected: Vec::new(), seen: Vec::new(), outcome: Err(io::Error::other(lost)) };
            let part = part.unwrap_or_else(lost);
            outcome = outcome.and(part.outcome.map_err(kernel));
            for (block, first, count) in part.protected {
                let inserted = written.insert_range(block, first, count);
                outcome = outcome.and(inserted.map(drop).map_err(TrackerError::from));
            }
            elsewhere.extend(part.seen);
        }
        outcome.map(|()| elsewhere)
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

    fn collect(
        &mut self,
        memory: &GuestMemory,
        written: &mut PageSet,
        qemu: &mut dyn Writer,
    ) -> Result<(), TrackerError> {
        let hands = self.crew.len() + 1;
        let all = shares(memory, hands * PIECES_EACH).into_iter().flatten().collect();
        let seen = self.sweep(all, hands, written, qemu)?;
        qemu.wait().map_err(TrackerError::Writer)?;
        // These still count as written, and so do pages that QEMU wrote meanwhile.
        let hands = seen.len() / TABLES_EACH_LEAST;
        match self.sweep(seen, hands, written, qemu)?.is_empty() {
            true => Ok(()),
            false => Err(TrackerError::Writer(io::Error::other("it writes on"))),
        }
    }
}

/// By comparing a hash of every page with that of the cut before, and with what was read in between.
pub struct HashTracker {
    hashes: Vec<Vec<u64>>,
    live_reads: LiveReads,
}

impl HashTracker {
    pub fn new(memory: &GuestMemory) -> Self {
        let pages = |len: u64| (len / PAGE_SIZE_U64) as usize;
        let hashes = memory.ranges().map(|(_, _, len)| vec![0; pages(len)]).collect();
        Self { hashes, live_reads: LiveReads::default() }
    }
}

impl Tracker for HashTracker {
    fn name(&self) -> &'static str {
        "hash"
    }

    /// Hashes everything once: no more than each cut does.
    fn prepare_part(&mut self, memory: &GuestMemory) -> Result<bool, TrackerError> {
        self.compare(memory, &mut PageSet::new(memory.layout()))?;
        Ok(true)
    }

    fn collect(
        &mut self,
        memory: &GuestMemory,
        written: &mut PageSet,
        qemu: &mut dyn Writer,
    ) -> Result<(), TrackerError> {
        qemu.wait().map_err(TrackerError::Writer)?;
        self.compare(memory, written)
    }

    fn live_reads(&self) -> Option<LiveReads> {
        Some(self.live_reads.clone())
    }
}

impl HashTracker {
    fn compare(&mut self, memory: &GuestMemory, written: &mut PageSet) -> Result<(), TrackerError> {
        let hashes = &mut self.hashes;
        let live_reads = self.live_reads.take();
        let mut inserted = Ok(false);
        memory.for_each_page(|addr, page| {
            let known = &mut hashes[addr.block.as_usize()][addr.page.get() as usize];
            let hash = xxh3_64(page);
            if *known != hash || live_reads.get(&addr).is_some_and(|seen| *seen != Some(hash)) {
                *known = hash;
                inserted = inserted.and(written.insert(addr));
            }
        })?;
        inserted?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmsync::units::{PAGE_SIZE, PageIndex};
    use vmsync::{RamBlock, RamLayout};

    #[test]
    fn threads_share_all_of_ram_and_nothing_twice() {
        let mib = |mib: u64| mib << 20;
        let lens = [mib(1024), mib(16), 262_144, 4096];
        let blocks = lens.iter().enumerate().map(|(i, len)| RamBlock { name: format!("b{i}"), len_bytes: *len });
        let layout = Arc::new(RamLayout::new(blocks.collect()).unwrap());
        let addresses: Vec<u64> = (1..=4).map(|i| i << 40).collect();
        let memory = GuestMemory::new(1, layout, addresses).unwrap();
        for hands in 1..=5 {
            let shares = shares(&memory, hands);
            assert!((1..=hands).contains(&shares.len()));
            let longest = shares.iter().map(|share| share.iter().map(|s| s.len).sum::<u64>()).max().unwrap();
            assert!(longest <= lens.iter().sum::<u64>() / hands as u64 + 2 * PAGE_TABLE_BYTES, "{hands}: {longest}");
            let mut covered = shares.into_iter().flatten();
            let mut next = covered.next();
            for (block, address, len) in memory.ranges() {
                let mut at = address;
                while let Some(stretch) = next.filter(|stretch| stretch.block == block) {
                    assert_eq!((stretch.start, stretch.block_starts_at), (at, address));
                    at += stretch.len;
                    next = covered.next();
                }
                assert_eq!(at, address + len);
            }
            assert_eq!(next, None);
        }
    }

    /// This process's own memory stands for the guest's.
    #[test]
    fn a_page_that_was_read_in_between_and_changed_back_counts_as_written() {
        let pages = 8;
        let mut own = vec![0_u8; (pages + 1) * PAGE_SIZE];
        let start = own.as_ptr().addr().next_multiple_of(PAGE_SIZE) - own.as_ptr().addr();
        let layout = RamLayout::new(vec![RamBlock { name: "ram".into(), len_bytes: (pages * PAGE_SIZE) as u64 }]);
        let address = own[start..].as_ptr().addr() as u64;
        let memory = GuestMemory::new(std::process::id() as i32, Arc::new(layout.unwrap()), vec![address]).unwrap();
        let page = |page| PageAddr { block: BlockIndex::new(0), page: PageIndex::new(page) };
        let mut tracker = HashTracker::new(&memory);
        assert!(tracker.prepare_part(&memory).unwrap());
        let written = |tracker: &mut HashTracker| {
            let mut written = PageSet::new(memory.layout());
            tracker.compare(&memory, &mut written).unwrap();
            written.iter().collect::<Vec<_>>()
        };
        let read = || memory.read([page(1), page(3)].into_iter(), PageBatch::new()).unwrap();
        let live_reads = tracker.live_reads().unwrap();
        live_reads.note(&read());
        assert_eq!(written(&mut tracker), [], "read as it was at the cut");
        own[start + PAGE_SIZE] = 7;
        live_reads.note(&read());
        own[start + PAGE_SIZE] = 0;
        assert_eq!(written(&mut tracker), [page(1)]);
        assert_eq!(written(&mut tracker), [], "told once");
        live_reads.note(&read());
        own[start + 3 * PAGE_SIZE] = 7;
        live_reads.note(&read());
        own[start + 3 * PAGE_SIZE] = 0;
        live_reads.note(&read());
        assert_eq!(written(&mut tracker), [page(3)], "one of two readers has something else");
    }

    /// A QEMU that waits after so many glances, and writes a page itself before.
    struct Busy<'a> {
        glances: u32,
        own_write: &'a dyn Fn(),
    }

    impl Writer for Busy<'_> {
        fn waits(&mut self) -> bool {
            self.glances = self.glances.saturating_sub(1);
            self.glances == 0
        }

        fn wait(&mut self) -> io::Result<()> {
            (self.own_write)();
            self.glances = 0;
            Ok(())
        }
    }

    #[test]
    fn whenever_qemu_begins_to_wait_each_write_is_found_once() {
        let pages: usize = 8 * 512;
        // SAFETY: a fresh anonymous mapping, which stays until the process ends.
        let map = unsafe {
            let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            let map = libc::mmap(std::ptr::null_mut(), pages * PAGE_SIZE, access, kind, -1, 0);
            assert_ne!(map, libc::MAP_FAILED);
            libc::madvise(map, pages * PAGE_SIZE, libc::MADV_NOHUGEPAGE);
            map.cast::<u8>()
        };
        let write = |page: usize| {
            // SAFETY: inside the mapping.
            unsafe { map.add(page * PAGE_SIZE).write_volatile(1) }
        };
        let layout = RamLayout::new(vec![RamBlock { name: "ram".into(), len_bytes: (pages * PAGE_SIZE) as u64 }]);
        let memory =
            GuestMemory::new(std::process::id() as i32, Arc::new(layout.unwrap()), vec![map.addr() as u64]).unwrap();
        for mode in [ProtectMode::Combined, ProtectMode::TwoStep] {
            let tracker = WriteTracker::of_this_process(mode).unwrap();
            tracker.register(map.addr() as u64, (pages * PAGE_SIZE) as u64).unwrap();
            let mut other = tracker.another().unwrap();
            let work = move |pieces: Arc<Pieces>| scan(&mut other, &pieces, || ());
            let mut tracker = UserfaultTracker { tracker, crew: Crew::start("test", [work]).unwrap(), prepared: 0 };
            while !tracker.prepare_part(&memory).unwrap() {}
            for glances in 0..12 {
                let mut found = |own_write: &dyn Fn()| {
                    let mut written = PageSet::new(memory.layout());
                    tracker.collect(&memory, &mut written, &mut Busy { glances, own_write }).unwrap();
                    written.iter().map(|page| page.page.get() as usize).collect::<Vec<_>>()
                };
                // From one page table into the next, and one alone.
                let by_guest = [0, 3, 500, 511, 512, 513, 1_030, 4_095];
                by_guest.into_iter().for_each(write);
                let (between, alone) = (100, 2_000);
                let now = found(&|| [between, alone].into_iter().for_each(write));
                let later = found(&|| ());
                let mut all = [now.clone(), later].concat();
                all.sort_unstable();
                let expected = [0, 3, between, 500, 511, 512, 513, 1_030, alone, 4_095];
                assert_eq!(all, expected, "{mode:?}, waits after {glances}: nothing lost, nothing twice");
                assert!(by_guest.iter().all(|page| now.contains(page)), "{mode:?}, waits after {glances}: {now:?}");
                assert_eq!(found(&|| ()), [0_usize; 0]);
            }
        }
    }
}
