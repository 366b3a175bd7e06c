//! Sums of page contents: how source and target find out that they mean the same by "the previous contents".
//!
//! A page's sum is `w[0]*k[0] + ... + w[511]*k[511]` modulo 2^64, over its 512 little-endian words and fixed odd
//! weights `k`. It is linear, so a page of which three words changed costs three multiplications, and any change of a
//! single word changes it. It guards against mistakes of ours, not against attackers: nothing that a guest writes can
//! make both sides differ in the first place.
//!
//! On the wire and in a target's table a sum is folded to a [`Tag`] of 16 bits: a page that is out of step is missed
//! once in 65,535 times, a fault that takes many pages out of step is not missed.

use super::simd::{self, LINES};
use crate::layout::RamLayout;
use crate::units::{PAGE_SIZE, Page, PageAddr};

/// Words in a page.
pub(super) const WORDS: usize = PAGE_SIZE / 8;

/// A folded sum: never 0, which stands for "unknown".
pub(super) type Tag = u16;

const UNKNOWN: Tag = 0;
/// Odd, and without a pattern: the first outputs of SplitMix64.
static WEIGHTS: [[u64; 8]; LINES] = weights();
const FILL_WEIGHT: u64 = fill_weight();

const fn weights() -> [[u64; 8]; LINES] {
    let mut weights = [[0; 8]; LINES];
    let mut state = 0u64;
    let mut i = 0;
    while i < WORDS {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        weights[i / 8][i % 8] = (z ^ (z >> 31)) | 1;
        i += 1;
    }
    weights
}

const fn fill_weight() -> u64 {
    let weights = weights();
    let mut sum = 0u64;
    let mut i = 0;
    while i < WORDS {
        sum = sum.wrapping_add(weights[i / 8][i % 8]);
        i += 1;
    }
    sum
}

/// Weights of the 8 words of each 64-byte line.
pub(super) fn weight_lines() -> &'static [[u64; 8]; LINES] {
    &WEIGHTS
}

/// Sum of a page's contents.
pub fn page_sum(page: &Page) -> u64 {
    simd::page_sum(page)
}

/// Sum of a page that holds `word` in all its places.
pub(super) fn fill_sum(word: u64) -> u64 {
    word.wrapping_mul(FILL_WEIGHT)
}

/// Folds a sum.
pub(super) fn tag(sum: u64) -> Tag {
    let half = sum ^ (sum >> 32);
    ((half ^ (half >> 16)) as Tag).max(1)
}

/// What a target knows about the contents it has for each page: 2 bytes a page, which the operating system backs
/// with memory only where something was set.
#[derive(Debug, Clone)]
pub struct KnownPages {
    layout: RamLayout,
    /// XOR of the tag and of `base`.
    tags: Vec<Tag>,
    /// What a page has of which nothing was set: unknown, or the zero page's tag.
    base: Tag,
}

impl KnownPages {
    /// Nothing is known about an image that was found.
    pub fn unknown(layout: &RamLayout) -> Self {
        Self::with_base(layout, UNKNOWN)
    }

    /// All pages are zero.
    pub fn zero(layout: &RamLayout) -> Self {
        Self::with_base(layout, tag(0))
    }

    fn with_base(layout: &RamLayout, base: Tag) -> Self {
        let pages = usize::try_from(layout.total_pages()).expect("a layout has at most 2^32 pages");
        Self { layout: layout.clone(), tags: vec![0; pages], base }
    }

    /// What came for this page is dropped: nothing is known about it any more.
    pub fn forget(&mut self, addr: PageAddr) {
        self.set(addr, UNKNOWN);
    }

    pub(super) fn get(&self, addr: PageAddr) -> Option<Tag> {
        let index = self.index(addr)?;
        Some(self.tags[index] ^ self.base).filter(|tag| *tag != UNKNOWN)
    }

    pub(super) fn set(&mut self, addr: PageAddr, tag: Tag) {
        if let Some(index) = self.index(addr) {
            self.tags[index] = tag ^ self.base;
        }
    }

    fn index(&self, addr: PageAddr) -> Option<usize> {
        self.layout.linear(addr).and_then(|linear| usize::try_from(linear).ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::RamBlock;

    #[test]
    fn sums_follow_changes_word_by_word() {
        let mut page = [0; PAGE_SIZE];
        assert_eq!((page_sum(&page), tag(0)), (0, 1));
        let mut sum = 0u64;
        for (at, byte) in [(0, 1u8), (4095, 0xff), (8, 3), (2048, 9), (0, 2), (7, 255)] {
            let word = at / 8;
            let old = u64::from_le_bytes(page.as_chunks::<8>().0[word]);
            page[at] = byte;
            let new = u64::from_le_bytes(page.as_chunks::<8>().0[word]);
            sum = sum.wrapping_add(new.wrapping_sub(old).wrapping_mul(weight_lines()[word / 8][word % 8]));
            assert_eq!(page_sum(&page), sum);
        }
        let word = 0x0123_4567_89ab_cdefu64;
        let page: Page = word.to_le_bytes().repeat(WORDS).try_into().unwrap();
        assert_eq!(page_sum(&page), fill_sum(word));
    }

    #[test]
    fn words_that_change_places_change_the_sum() {
        let mut page = [0; PAGE_SIZE];
        page[0] = 5;
        let one = page_sum(&page);
        page[0] = 0;
        page[8] = 5;
        assert_ne!(page_sum(&page), one);
        assert_ne!(tag(page_sum(&page)), tag(one));
    }

    #[test]
    fn a_table_knows_what_it_was_told() {
        let layout = RamLayout::new(vec![RamBlock { name: "a".into(), len_bytes: 3 * 4096 }]).unwrap();
        let (mut unknown, mut zero) = (KnownPages::unknown(&layout), KnownPages::zero(&layout));
        let addr = PageAddr::new(0, 2);
        assert_eq!((unknown.get(addr), zero.get(addr)), (None, Some(1)));
        for table in [&mut unknown, &mut zero] {
            table.set(addr, 77);
            assert_eq!(table.get(addr), Some(77));
            table.forget(addr);
            assert_eq!(table.get(addr), None);
            table.set(PageAddr::new(0, 3), 1);
            assert_eq!(table.get(PageAddr::new(0, 3)), None, "outside");
        }
    }
}
