//! The memory of a waiting shadow, as this agent reads and writes it.
//!
//! ```text
//! block of the layout ──> shared file (memfd, tmpfs, hugetlbfs)   mapped here; pages never written stay holes
//!                    `──> private memory of QEMU (ROMs, video)    through /proc/PID/mem
//! ```
//! Two things are taken care of for the host's sake. Memory stays sparse: a zero page is a hole in the file, not a
//! page of zeros, and reading a hole does not fill it. And a file system that is full is an error, not a SIGBUS: a
//! page's first write goes through `pwrite`, which can fail; only pages that exist are written through the mapping.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;

use nix::unistd::{Whence, lseek64};
use vmsync::codec::{PageContent, PagesFrame, Patch};
use vmsync::hashes::{HashSeed, hash_page};
use vmsync::layout::RamLayout;
use vmsync::units::{PAGE_SIZE, PAGE_SIZE_U64, Page, PageAddr, PageIndex};

use super::disk::DiskFile;
use super::mapping::Mapping;
use super::memory_file::{self, MemoryFile};
use crate::disk::hole;
use crate::disk::images::target_of;
use crate::hypervisor::process::QemuProcess;
use crate::hypervisor::ramblock::RamBlock;

const ZERO_PAGE: Page = [0; PAGE_SIZE];

#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error("{block}: cannot {action}: {source}")]
    Io { block: String, action: &'static str, source: io::Error },
    #[error("no room for another page of {block}: {source}; free memory on this host")]
    NoRoom { block: String, source: io::Error },
    #[error("QEMU has no block {block} of the layout")]
    NoBlock { block: String },
    #[error("{addr} is outside the guest's memory")]
    Outside { addr: PageAddr },
}

type Result<T> = std::result::Result<T, ImageError>;

/// All RAM blocks of a waiting shadow, addressed as in the primary's layout.
#[derive(Debug)]
pub struct Image {
    layout: RamLayout,
    blocks: Vec<Block>,
}

#[derive(Debug)]
struct Block {
    name: String,
    backing: Backing,
}

#[derive(Debug)]
enum Backing {
    Shared(SharedBlock),
    /// A disk of the guest, which QEMU has open, too.
    Disk(DiskFile),
    /// Private memory of QEMU from this address on.
    Process {
        memory: File,
        address: u64,
    },
}

#[derive(Debug)]
struct SharedBlock {
    file: File,
    offset: u64,
    mapping: Mapping,
    /// Pages that may be something else than a hole; one bit each.
    present: Vec<u64>,
    /// 4 KiB pages that may be taken out of the file again.
    sparse: bool,
}

impl Image {
    /// Opens the memory of `process`, whose RAM blocks are `qemu`. With `keep_allocated` zero pages are written
    /// instead of given back, for guests whose memory is allocated ahead or locked. `disks`: target and path.
    pub fn open(
        process: QemuProcess,
        layout: &RamLayout,
        qemu: &[RamBlock],
        disks: &[(String, String)],
        keep_allocated: bool,
    ) -> Result<Self> {
        let mut blocks = Vec::with_capacity(layout.blocks().len());
        for wanted in layout.blocks() {
            if let Some(target) = target_of(&wanted.name) {
                let path = disks.iter().find(|(name, _)| name == target).map(|(_, path)| path);
                let path = path.ok_or_else(|| ImageError::NoBlock { block: wanted.name.clone() })?;
                let file = DiskFile::open(path.as_ref(), wanted.len_bytes);
                let file = file.map_err(|source| failed(&wanted.name, "open it", source))?;
                blocks.push(Block { name: wanted.name.clone(), backing: Backing::Disk(file) });
                continue;
            }
            let found = qemu.iter().find(|block| block.name == wanted.name && block.used == wanted.len_bytes);
            let found = found.ok_or_else(|| ImageError::NoBlock { block: wanted.name.clone() })?;
            let backing = open_backing(process.pid, found, keep_allocated).map_err(|source| ImageError::Io {
                block: found.name.clone(),
                action: "open it",
                source,
            })?;
            blocks.push(Block { name: found.name.clone(), backing });
        }
        Ok(Self { layout: layout.clone(), blocks })
    }

    pub fn layout(&self) -> &RamLayout {
        &self.layout
    }

    /// Bytes of the blocks that are mapped here; all others are small or private to QEMU.
    pub fn mapped_bytes(&self) -> u64 {
        let shared = self.blocks.iter().zip(self.layout.blocks());
        shared.filter(|(block, _)| matches!(block.backing, Backing::Shared(_))).map(|(_, l)| l.len_bytes).sum()
    }

    pub fn write_page(&mut self, addr: PageAddr, page: &Page) -> Result<()> {
        let (block, offset) = self.locate(addr)?;
        let written = match &mut block.backing {
            Backing::Process { memory, address } => memory.write_all_at(page, *address + offset),
            Backing::Disk(disk) => disk.write(offset, page),
            Backing::Shared(shared) => shared.write_page(offset, page),
        };
        written.map_err(|source| failed(&block.name, "write a page", source))
    }

    /// Makes a page all zero, giving its memory back where that is possible.
    pub fn zero_page(&mut self, addr: PageAddr) -> Result<()> {
        let (block, offset) = self.locate(addr)?;
        let written = match &mut block.backing {
            Backing::Process { memory, address } => memory.write_all_at(&ZERO_PAGE, *address + offset),
            Backing::Disk(disk) => disk.zero_page(offset),
            Backing::Shared(shared) => shared.zero_page(offset),
        };
        written.map_err(|source| failed(&block.name, "zero a page", source))
    }

    pub fn read_page(&self, addr: PageAddr, page: &mut Page) -> Result<()> {
        let index = addr.block.as_usize();
        let block = self.blocks.get(index).filter(|_| self.layout.contains(addr));
        let block = block.ok_or(ImageError::Outside { addr })?;
        block.read_page(addr.page.byte_offset(), page)
    }

    /// Writes the pages of a frame, in its order.
    pub fn apply(&mut self, frame: &PagesFrame) -> Result<()> {
        frame.writes().try_for_each(|(addr, content, soon)| {
            soon.into_iter().for_each(|(addr, lines)| self.fetch(addr, lines));
            match content {
                PageContent::Zero | PageContent::Fill(0) => self.zero_page(addr),
                PageContent::Data(page) => self.write_page(addr, page),
                PageContent::Patch(patch) => self.patch_page(addr, patch),
                PageContent::Fill(_) => {
                    let mut page = ZERO_PAGE;
                    content.apply(&mut page);
                    self.write_page(addr, &page)
                }
            }
        })
    }

    /// These lines of a page will be written soon.
    fn fetch(&self, addr: PageAddr, lines: u64) {
        if let Some(Block { backing: Backing::Shared(shared), .. }) = self.blocks.get(addr.block.as_usize()) {
            shared.mapping.fetch(addr.page.byte_offset(), lines);
        }
    }

    /// Writes changes into a page.
    fn patch_page(&mut self, addr: PageAddr, patch: Patch<'_>) -> Result<()> {
        let (block, offset) = self.locate(addr)?;
        let written = match &mut block.backing {
            Backing::Process { memory, address } => {
                let at = *address + offset;
                patch.runs().try_for_each(|(within, bytes)| memory.write_all_at(bytes, at + within as u64))
            }
            Backing::Disk(disk) => {
                patch.runs().try_for_each(|(within, bytes)| disk.write(offset + within as u64, bytes))
            }
            Backing::Shared(shared) => shared.patch_page(offset, patch),
        };
        written.map_err(|source| failed(&block.name, "change a page", source))
    }

    /// Makes all memory zero, not the disks. A new QEMU's is not: it has put its firmware into some blocks.
    pub fn clear(&mut self) -> Result<()> {
        let mut page = ZERO_PAGE;
        for linear in 0..self.layout.total_pages() {
            let Some(addr) = self.layout.addr(linear) else { break };
            if self.is_disk(addr) {
                break; // the last blocks
            }
            if self.is_hole(addr) {
                continue;
            }
            self.read_page(addr, &mut page)?;
            if page != ZERO_PAGE {
                self.zero_page(addr)?;
            }
        }
        Ok(())
    }

    /// Hashes of at most `max` neighbouring pages of one block, from `start` on; fewer at the block's end.
    pub fn hashes(&self, seed: HashSeed, start: PageAddr, max: usize) -> Result<Vec<u64>> {
        let pages = self.layout.block_pages(start.block);
        let first = u64::from(start.page.get());
        if first >= pages {
            return Err(ImageError::Outside { addr: start });
        }
        let zero_hash = hash_page(seed, &ZERO_PAGE);
        if let Some(Block { name, backing: Backing::Disk(disk) }) = self.blocks.get(start.block.as_usize()) {
            let count = (pages - first).min(max as u64) as usize;
            let mut bytes = vec![0; count * PAGE_SIZE];
            disk.read(start.page.byte_offset(), &mut bytes).map_err(|source| failed(name, "read it", source))?;
            let pages = bytes.as_chunks::<PAGE_SIZE>().0.iter();
            return Ok(pages.map(|page| if page == &ZERO_PAGE { zero_hash } else { hash_page(seed, page) }).collect());
        }
        let mut page = ZERO_PAGE;
        let mut hashes = Vec::with_capacity(max.min(usize::try_from(pages - first).unwrap_or(max)));
        for index in (first..pages).take(max) {
            // Pages of a layout are numbered with 32 bits.
            let Ok(index) = PageIndex::try_from(index) else { break };
            let addr = PageAddr { page: index, ..start };
            self.read_page(addr, &mut page)?;
            hashes.push(if page == ZERO_PAGE { zero_hash } else { hash_page(seed, &page) });
        }
        Ok(hashes)
    }

    /// Calls `visit` with every page in the layout's order. Holes are read as zero and stay holes.
    pub fn for_each_page(&self, mut visit: impl FnMut(PageAddr, &Page)) -> Result<()> {
        let mut page = ZERO_PAGE;
        for linear in 0..self.layout.total_pages() {
            // Every number below the total has an address.
            let Some(addr) = self.layout.addr(linear) else { break };
            self.read_page(addr, &mut page)?;
            visit(addr, &page);
        }
        Ok(())
    }

    /// Begins to write out what is not yet on disk; for the guest's writes to outlive the host's power once it runs here.
    pub fn sync_disks(&self) -> Result<()> {
        self.blocks.iter().try_for_each(|block| match &block.backing {
            Backing::Disk(disk) => disk.sync().map_err(|source| failed(&block.name, "sync it", source)),
            _ => Ok(()),
        })
    }

    fn is_disk(&self, addr: PageAddr) -> bool {
        self.blocks.get(addr.block.as_usize()).is_some_and(|block| matches!(block.backing, Backing::Disk(_)))
    }

    fn is_hole(&self, addr: PageAddr) -> bool {
        match self.blocks.get(addr.block.as_usize()).map(|block| &block.backing) {
            Some(Backing::Shared(shared)) => !shared.is_present(addr.page.byte_offset()),
            _ => false,
        }
    }

    fn locate(&mut self, addr: PageAddr) -> Result<(&mut Block, u64)> {
        if !self.layout.contains(addr) {
            return Err(ImageError::Outside { addr });
        }
        let block = self.blocks.get_mut(addr.block.as_usize()).ok_or(ImageError::Outside { addr })?;
        Ok((block, addr.page.byte_offset()))
    }
}

impl Block {
    fn read_page(&self, offset: u64, page: &mut Page) -> Result<()> {
        let read = match &self.backing {
            Backing::Process { memory, address } => memory.read_exact_at(page, address + offset),
            Backing::Disk(disk) => disk.read(offset, page),
            Backing::Shared(shared) => shared.read_page(offset, page),
        };
        read.map_err(|source| failed(&self.name, "read a page", source))
    }
}

impl SharedBlock {
    fn new(found: MemoryFile, len: u64, sparse: bool, hugetlb: bool) -> io::Result<Self> {
        let MemoryFile { file, offset } = found;
        let mapping = Mapping::new(&file, offset, len)?;
        let pages = len / PAGE_SIZE_U64;
        // Files of huge pages cannot be written with pwrite; their memory was reserved when QEMU mapped them.
        let fill = if hugetlb { u64::MAX } else { 0 };
        let present = vec![fill; usize::try_from(pages.div_ceil(64)).unwrap_or(usize::MAX)];
        let mut block = Self { file, offset, mapping, present, sparse: sparse && !hugetlb };
        if !hugetlb {
            block.find_present(len)?;
        }
        Ok(block)
    }

    /// Marks what the file already holds: after a restart of this agent that is the whole image.
    fn find_present(&mut self, len: u64) -> io::Result<()> {
        let end = self.offset + len;
        let mut position = self.offset;
        while position < end {
            let data = match lseek64(&self.file, as_offset(position)?, Whence::SeekData) {
                Ok(data) => data.unsigned_abs(),
                // No data from here on.
                Err(nix::errno::Errno::ENXIO) => break,
                Err(error) => return Err(error.into()),
            };
            let hole = lseek64(&self.file, as_offset(data)?, Whence::SeekHole)?.unsigned_abs();
            for page in data / PAGE_SIZE_U64..hole.min(end).div_ceil(PAGE_SIZE_U64) {
                self.set_present(page * PAGE_SIZE_U64 - self.offset, true);
            }
            position = hole.max(position + PAGE_SIZE_U64);
        }
        Ok(())
    }

    fn is_present(&self, offset: u64) -> bool {
        let (word, bit) = bit(offset);
        self.present.get(word).is_some_and(|bits| bits & bit != 0)
    }

    fn set_present(&mut self, offset: u64, present: bool) {
        let (word, bit) = bit(offset);
        if let Some(bits) = self.present.get_mut(word) {
            if present { *bits |= bit } else { *bits &= !bit }
        }
    }

    fn write_page(&mut self, offset: u64, page: &Page) -> io::Result<()> {
        if self.is_present(offset) {
            return self.mapping.write(offset, page);
        }
        self.file.write_all_at(page, self.offset + offset)?;
        self.set_present(offset, true);
        Ok(())
    }

    fn patch_page(&mut self, offset: u64, patch: Patch<'_>) -> io::Result<()> {
        if self.is_present(offset) {
            return patch.runs().try_for_each(|(within, bytes)| self.mapping.write(offset + within as u64, bytes));
        }
        // A hole: the page was zero.
        let mut page = ZERO_PAGE;
        self.read_page(offset, &mut page)?;
        patch.apply(&mut page);
        self.write_page(offset, &page)
    }

    fn zero_page(&mut self, offset: u64) -> io::Result<()> {
        if !self.is_present(offset) && self.sparse {
            return Ok(());
        }
        if !self.sparse {
            return self.write_page(offset, &ZERO_PAGE);
        }
        match hole::punch(&self.file, self.offset + offset, PAGE_SIZE_U64) {
            Ok(()) => {
                self.set_present(offset, false);
                Ok(())
            }
            Err(_) => self.mapping.write(offset, &ZERO_PAGE),
        }
    }

    fn read_page(&self, offset: u64, page: &mut Page) -> io::Result<()> {
        if self.is_present(offset) {
            return self.mapping.read(offset, page);
        }
        // QEMU may have written what was a hole for us; reading through the mapping would fill the hole.
        self.file.read_exact_at(page, self.offset + offset)
    }
}

fn bit(offset: u64) -> (usize, u64) {
    let page = offset / PAGE_SIZE_U64;
    (usize::try_from(page / 64).unwrap_or(usize::MAX), 1 << (page % 64))
}

fn as_offset(value: u64) -> io::Result<i64> {
    i64::try_from(value).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
}

fn open_backing(pid: i32, block: &RamBlock, keep_allocated: bool) -> io::Result<Backing> {
    let hugetlb = block.page_size > PAGE_SIZE_U64;
    if let Some(found) = memory_file::find(pid, block.hva, block.used)? {
        return Ok(Backing::Shared(SharedBlock::new(found, block.used, !keep_allocated, hugetlb)?));
    }
    let memory = OpenOptions::new().read(true).write(true).open(format!("/proc/{pid}/mem"))?;
    Ok(Backing::Process { memory, address: block.hva })
}

fn failed(block: &str, action: &'static str, source: io::Error) -> ImageError {
    let block = block.to_owned();
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::OutOfMemory | io::ErrorKind::QuotaExceeded => {
            ImageError::NoRoom { block, source }
        }
        _ => ImageError::Io { block, action, source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmsync::layout::RamBlock as LayoutBlock;

    /// A process that holds memory as a shadow's QEMU does: this test itself, with a memfd and a private block.
    struct Fake {
        shared: Mapping,
        private: Box<[u8]>,
        file: File,
    }

    const SHARED_PAGES: u64 = 300;
    const PRIVATE_PAGES: u64 = 4;

    impl Fake {
        fn new(name: &str) -> Self {
            let name = std::ffi::CString::new(name).unwrap();
            let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
            let file = File::from(nix::sys::memfd::memfd_create(name.as_c_str(), flags).unwrap());
            file.set_len(SHARED_PAGES * PAGE_SIZE_U64).unwrap();
            let shared = Mapping::new(&file, 0, SHARED_PAGES * PAGE_SIZE_U64).unwrap();
            let private = vec![0x55; (PRIVATE_PAGES as usize + 1) * PAGE_SIZE].into_boxed_slice();
            Self { shared, private, file }
        }

        fn open(&self, keep_allocated: bool) -> Image {
            let address = (self.private.as_ptr() as u64).next_multiple_of(PAGE_SIZE_U64);
            let block = |name: &str, hva, pages: u64| RamBlock {
                name: name.into(),
                page_size: PAGE_SIZE_U64,
                used: pages * PAGE_SIZE_U64,
                total: pages * PAGE_SIZE_U64,
                hva,
                read_only: false,
            };
            // QEMU's order differs from the layout's.
            let qemu = [block("pc.bios", address, PRIVATE_PAGES), block("pc.ram", self.shared.address(), SHARED_PAGES)];
            let layout = |name: &str, pages| LayoutBlock { name: name.into(), len_bytes: pages * PAGE_SIZE_U64 };
            let layout =
                RamLayout::new(vec![layout("pc.ram", SHARED_PAGES), layout("pc.bios", PRIVATE_PAGES)]).unwrap();
            let process = QemuProcess { pid: std::process::id() as i32, start_ticks: 0 };
            Image::open(process, &layout, &qemu, &[], keep_allocated).unwrap()
        }

        fn allocated_pages(&self) -> u64 {
            use std::os::unix::fs::MetadataExt;
            self.file.metadata().unwrap().blocks() * 512 / PAGE_SIZE_U64
        }
    }

    #[test]
    fn pages_arrive_in_qemus_memory_and_holes_stay_holes() {
        let fake = Fake::new("image-write");
        let mut image = fake.open(false);
        assert_eq!(image.mapped_bytes(), SHARED_PAGES * PAGE_SIZE_U64);
        for round in [1u8, 2] {
            image.write_page(PageAddr::new(0, 299), &[round; PAGE_SIZE]).unwrap();
            image.write_page(PageAddr::new(1, 3), &[round + 10; PAGE_SIZE]).unwrap();
        }
        image.zero_page(PageAddr::new(0, 7)).unwrap();
        let mut byte = [0];
        fake.shared.read(299 * PAGE_SIZE_U64 + 5, &mut byte).unwrap();
        assert_eq!(byte, [2]);
        assert!(fake.private.contains(&12) && fake.private.contains(&0x55));
        let mut pages = 0;
        image.for_each_page(|_, _| pages += 1).unwrap();
        assert_eq!((pages, fake.allocated_pages()), (SHARED_PAGES + PRIVATE_PAGES, 1));
    }

    #[test]
    fn zero_pages_give_memory_back_unless_it_shall_stay() {
        let fake = Fake::new("image-zero");
        for (keep, left) in [(false, 0), (true, 1)] {
            let mut image = fake.open(keep);
            let addr = PageAddr::new(0, 64);
            image.write_page(addr, &[9; PAGE_SIZE]).unwrap();
            image.zero_page(addr).unwrap();
            let mut page = [1; PAGE_SIZE];
            image.read_page(addr, &mut page).unwrap();
            assert_eq!((page, fake.allocated_pages()), (ZERO_PAGE, left));
        }
    }

    #[test]
    fn a_restarted_agent_finds_what_it_wrote() {
        let fake = Fake::new("image-restart");
        fake.open(false).write_page(PageAddr::new(0, 130), &[3; PAGE_SIZE]).unwrap();
        let mut image = fake.open(false);
        let mut page = ZERO_PAGE;
        image.read_page(PageAddr::new(0, 130), &mut page).unwrap();
        assert_eq!(page[0], 3);
        // Known to be there, so that zeroing it is not taken for done already.
        image.zero_page(PageAddr::new(0, 130)).unwrap();
        assert_eq!(fake.allocated_pages(), 0);
    }

    #[test]
    fn frames_are_applied_and_hashed_and_a_cleared_image_is_all_zero() {
        use vmsync::codec::{Encoder, FrameDecoder, MirrorBudget};
        let fake = Fake::new("image-frames");
        let mut image = fake.open(false);
        let (ram, bios) = (PageAddr::new(0, 5), PageAddr::new(1, 1));
        let hole = PageAddr::new(0, 9);
        let mut encoder = Encoder::new(image.layout(), MirrorBudget::Full, HashSeed::new(1), 1);
        let mut apply = |image: &mut Image, pages: &[(PageAddr, Page)]| {
            for (addr, page) in pages {
                encoder.page(*addr, page);
            }
            for bytes in encoder.finish() {
                image.apply(&FrameDecoder::new().decode(&bytes, image.layout()).unwrap()).unwrap();
            }
        };
        let mixed: Page = std::array::from_fn(|i| (i / 7) as u8);
        apply(&mut image, &[(ram, mixed), (bios, mixed), (hole, ZERO_PAGE)]);
        // More of them than are fetched ahead, of all kinds, in memory that is mapped and that is not, to its very end.
        let many: Vec<PageAddr> = [(0, 100..120), (1, 2..4), (0, 290..300)]
            .into_iter()
            .flat_map(|(block, pages)| pages.map(move |page| PageAddr::new(block, page)))
            .collect();
        for round in 0..3u32 {
            let page_of = |nth: u32| -> Page {
                match (nth + round) % 4 {
                    0 => ZERO_PAGE,
                    1 => [round as u8 + 1; PAGE_SIZE],
                    2 => std::array::from_fn(|i| if i as u32 % 1000 == nth { round as u8 } else { (i / 9) as u8 }),
                    _ => std::array::from_fn(|i| ((i as u32 ^ nth << 3).wrapping_mul(2_654_435_761) >> 13) as u8),
                }
            };
            let pages: Vec<(PageAddr, Page)> = (0..).zip(&many).map(|(nth, addr)| (*addr, page_of(nth))).collect();
            apply(&mut image, &pages);
            for (addr, expected) in pages {
                let mut page = ZERO_PAGE;
                image.read_page(addr, &mut page).unwrap();
                assert!(page == expected, "{addr} in round {round}");
            }
        }
        apply(&mut image, &many.into_iter().map(|addr| (addr, ZERO_PAGE)).collect::<Vec<_>>());
        let (mut changed, mut first) = (mixed, ZERO_PAGE);
        changed[4095] ^= 1;
        first[77] = 3;
        apply(&mut image, &[(ram, changed), (bios, changed), (hole, first)]);
        for (addr, expected) in [(ram, changed), (bios, changed), (hole, first)] {
            let mut page = ZERO_PAGE;
            image.read_page(addr, &mut page).unwrap();
            assert!(page == expected, "{addr}");
        }
        apply(&mut image, &[(ram, [8; PAGE_SIZE]), (bios, ZERO_PAGE), (hole, ZERO_PAGE)]);

        let seed = HashSeed::new(3);
        let hashes = image.hashes(seed, PageAddr::new(0, 4), 3).unwrap();
        let zero = hash_page(seed, &ZERO_PAGE);
        assert_eq!(hashes, [zero, hash_page(seed, &[8; PAGE_SIZE]), zero]);
        assert_eq!(image.hashes(seed, PageAddr::new(1, 1), 100).unwrap().len(), 3);
        assert!(image.hashes(seed, PageAddr::new(1, 4), 1).is_err());

        image.clear().unwrap();
        let mut all_zero = true;
        image.for_each_page(|_, page| all_zero &= page == &ZERO_PAGE).unwrap();
        assert!(all_zero && fake.allocated_pages() == 0);
    }

    #[test]
    fn addresses_outside_are_refused() {
        let fake = Fake::new("image-outside");
        let mut image = fake.open(false);
        for addr in [PageAddr::new(0, 300), PageAddr::new(1, 4), PageAddr::new(2, 0), PageAddr::new(9, u32::MAX)] {
            assert!(matches!(image.write_page(addr, &ZERO_PAGE), Err(ImageError::Outside { .. })), "{addr}");
            assert!(matches!(image.zero_page(addr), Err(ImageError::Outside { .. })), "{addr}");
            assert!(matches!(image.read_page(addr, &mut [0; PAGE_SIZE]), Err(ImageError::Outside { .. })), "{addr}");
        }
    }
}
