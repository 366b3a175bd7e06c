//! The source's end: what each page of a cut costs.
//!
//! ```text
//! dirty page --- as before, says the mirror or a hash --------------------> nothing
//!            \-- zero, or one word throughout ----------------------------> 1 or 9 bytes
//!            \-- few bytes differ from the mirror's ----------------------> a patch
//!            \-- otherwise -----------------------------------------------> whole
//!                  numbers and pointers as words, rows as records, and zstd over 64 pages; noise as it is
//! ```
//! [`Encoder::page`] codes against the *previous contents*: what a shadow that is in step has once everything sent
//! before has arrived. Whoever calls it must know which shadows those are: see
//! [`crate::source`]. [`Encoder::whole`] needs nothing on the other side.

use super::diff::{Difference, PatchRoom};
use super::mirror::{Advise, HeldAt, Mirror, MirrorBudget};
use super::simd;
use super::sum::{fill_sum, page_sum, tag};
use super::writer::FrameWriter;
use crate::hashes::{HashSeed, HashTable, hash_page};
use crate::layout::RamLayout;
use crate::units::{Page, PageAddr};

/// Longest patch, bytes before compression; a page that needs more goes whole, which spares its tags and runs.
pub(super) const PATCH_LIMIT_BYTES: usize = 2560;

/// How many pages before it is coded a page is best [fetched](Encoder::fetch).
pub const FETCH_AHEAD: usize = 3;

/// What a page of a cut came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageFate {
    /// Whoever is in step has exactly these contents: compared with the mirror.
    Same,
    /// The same, by a 64-bit hash.
    SameByHash,
    /// Coded into a frame; good for shadows in step only if it is a patch.
    Coded { patch: bool },
}

/// What an encoder did so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CodecStats {
    /// Pages that were written without changing.
    pub pages_same: u64,
    /// Pages of one word throughout, zero or not.
    pub pages_filled: u64,
    /// Pages of which the changes were sent.
    pub pages_patched: u64,
    /// Pages that were sent whole.
    pub pages_whole: u64,
    /// Pages whose previous contents are held, and may be held at most.
    pub mirror_pages: u64,
    pub mirror_pages_max: u64,
}

/// Codes pages into frames; see the module's description.
#[derive(Debug)]
pub struct Encoder {
    mirror: Mirror,
    advise: Advise,
    /// Hashes of previous contents that the mirror does not hold.
    hashes: HashTable,
    seed: HashSeed,
    writer: FrameWriter,
    room: Box<PatchRoom>,
    stats: CodecStats,
}

impl Encoder {
    /// `level`: see [`set_level`](Self::set_level).
    pub fn new(layout: &RamLayout, budget: MirrorBudget, seed: HashSeed, level: i32) -> Self {
        let advise: Advise = |_| {};
        Self {
            mirror: Mirror::new(layout, budget, advise),
            advise,
            hashes: HashTable::new(layout),
            seed,
            writer: FrameWriter::new(level),
            room: Box::default(),
            stats: CodecStats::default(),
        }
    }

    /// zstd's level for whole pages: 1 and up is small, negative is fast; 0 turns all compression off.
    pub fn set_level(&mut self, level: i32) {
        self.writer.set_level(level);
    }

    /// Is given the memory of the mirror, piece by piece, before it is used; from the next [`set_mirror`](Self::set_mirror)
    /// on.
    pub fn set_advice(&mut self, advise: Advise) {
        self.advise = advise;
    }

    /// Starts over with an empty mirror.
    pub fn set_mirror(&mut self, budget: MirrorBudget) {
        self.mirror = Mirror::new(self.hashes.layout(), budget, self.advise);
    }

    /// Another cut begins: pages that were hot are a little less so.
    pub fn begin_cut(&mut self) {
        self.mirror.begin_cut();
    }

    /// A page will be coded soon: what is needed for it is on its way into the CPU's caches meanwhile. Only speed
    /// depends on it.
    pub fn fetch(&self, addr: PageAddr, page: &Page) {
        simd::fetch_bytes(page);
        self.mirror.fetch(addr);
    }

    /// Codes a dirty page against its previous contents, which these become.
    pub fn page(&mut self, addr: PageAddr, page: &Page) -> PageFate {
        let held = self.mirror.touch(addr);
        let fate = match one_word(page) {
            Some(word) => self.filled(addr, held, page, word),
            None => self.page_with_contents(addr, held, page),
        };
        match fate {
            PageFate::Same | PageFate::SameByHash => self.stats.pages_same += 1,
            PageFate::Coded { patch: true } => self.stats.pages_patched += 1,
            PageFate::Coded { patch: false } => {}
        }
        fate
    }

    /// Codes a page so that it can be read without its previous contents, and remembers nothing of it.
    pub fn whole(&mut self, addr: PageAddr, page: &Page) {
        match one_word(page) {
            Some(0) => self.writer.zero(addr),
            Some(word) => self.writer.fill(addr, word),
            None => {
                self.stats.pages_whole += 1;
                self.writer.data(addr, page);
                return;
            }
        }
        self.stats.pages_filled += 1;
    }

    /// Ends what was begun, and gives all frames since the last call. They name each page once, in any order.
    pub fn finish(&mut self) -> Vec<Vec<u8>> {
        self.writer.finish()
    }

    /// Takes frames back whose bytes are needed no longer: their memory serves the next ones.
    pub fn reuse(&mut self, frames: Vec<Vec<u8>>) {
        frames.into_iter().for_each(|frame| self.writer.reuse(frame));
    }

    /// Whether these are the previous contents; `None`: they are not held.
    pub fn is_previous(&self, addr: PageAddr, page: &Page) -> Option<bool> {
        self.mirror.get(addr).map(|previous| previous == page)
    }

    /// Forgets the page's previous contents and their hash: next time it goes whole, whatever it holds.
    pub fn forget(&mut self, addr: PageAddr) {
        self.mirror.forget(addr);
        self.hashes.forget(addr);
    }

    /// Forgets the page's previous contents as the base of a patch.
    pub fn forget_base(&mut self, addr: PageAddr) {
        self.mirror.forget(addr);
    }

    /// The page was written, and its contents at that cut are not known. Previous contents are what shadows hold, so
    /// those of the mirror stay; a hash stands for the contents of the last cut and does not.
    pub fn unknown_contents(&mut self, addr: PageAddr) {
        self.hashes.forget(addr);
        self.mirror.set_stale(addr, true);
    }

    pub fn stats(&self) -> CodecStats {
        let (pages, max) = (self.mirror.len() as u64, self.mirror.capacity() as u64);
        CodecStats { mirror_pages: pages, mirror_pages_max: max, ..self.stats }
    }

    fn filled(&mut self, addr: PageAddr, held: Option<HeldAt>, page: &Page, word: u64) -> PageFate {
        let sum = fill_sum(word);
        let same = if let Some(at) = held {
            let held = self.mirror.held(at);
            let is_same = if at.filled { held.page[..8] == page[..8] } else { held.page == page };
            if !is_same {
                *held.page = *page;
                *held.sum = sum;
            }
            is_same.then_some(PageFate::Same)
        } else {
            self.remember(addr, page, || sum).then_some(PageFate::SameByHash)
        };
        self.mirror.set_filled(addr, true);
        if let Some(same) = same {
            return same;
        }
        match word {
            0 => self.writer.zero(addr),
            word => self.writer.fill(addr, word),
        }
        self.stats.pages_filled += 1;
        PageFate::Coded { patch: false }
    }

    fn page_with_contents(&mut self, addr: PageAddr, held: Option<HeldAt>, page: &Page) -> PageFate {
        let mut newly_held = true;
        if let Some(at) = held {
            if at.filled {
                self.mirror.set_filled(addr, false);
            }
            let held = self.mirror.held(at);
            let before = tag(*held.sum);
            match self.room.advance(held.page, page, held.sum, PATCH_LIMIT_BYTES) {
                Difference::None => return PageFate::Same,
                Difference::Sparse => {
                    let after = tag(*held.sum);
                    self.writer.patch(addr, &self.room, before, after);
                    return PageFate::Coded { patch: true };
                }
                Difference::Dense => newly_held = false,
            }
        } else if self.remember(addr, page, || page_sum(page)) {
            return PageFate::SameByHash;
        }
        self.stats.pages_whole += 1;
        if self.writer.data(addr, page) && !newly_held {
            self.mirror.shun(addr);
            self.hashes.set(addr, hash_page(self.seed, page));
        }
        PageFate::Coded { patch: false }
    }

    /// Takes note of a page that the mirror does not hold; true if it is as before, by its hash.
    fn remember(&mut self, addr: PageAddr, page: &Page, sum: impl FnOnce() -> u64) -> bool {
        let hashes = &mut self.hashes;
        let seed = self.seed;
        let put_out = |addr: PageAddr, page: &Page| {
            hashes.set(addr, hash_page(seed, page));
        };
        if self.mirror.admit(addr, page, sum, put_out) {
            let former = self.hashes.get(addr);
            self.hashes.forget(addr);
            return former.is_some_and(|former| former == hash_page(seed, page));
        }
        let hash = hash_page(seed, page);
        self.hashes.set(addr, hash) == Some(hash)
    }
}

/// True if all bytes of the page are zero.
pub fn is_zero(page: &Page) -> bool {
    one_word(page) == Some(0)
}

/// The word that the page consists of.
pub(super) fn one_word(page: &Page) -> Option<u64> {
    let words = page.as_chunks::<8>().0;
    let first = words[0];
    // Most pages end here.
    if words[511] != first || words[255] != first || words[64] != first {
        return None;
    }
    // Each word is like the one before it. One comparison of memory, for which libc has the machine's best code.
    (page[8..] == page[..page.len() - 8]).then(|| u64::from_le_bytes(first))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::PAGE_SIZE;

    #[test]
    fn one_word_is_told_from_nearly_one_word() {
        let mut page = [0; PAGE_SIZE];
        assert_eq!(one_word(&page), Some(0));
        for at in 0..PAGE_SIZE {
            page[at] = 1;
            assert_eq!(one_word(&page), None, "{at}");
            page[at] = 0;
        }
        let page: Page = 0xdead_beef_u64.to_le_bytes().repeat(512).try_into().unwrap();
        assert_eq!(one_word(&page), Some(0xdead_beef));
    }
}
