//! A set of guest pages: one bit a page, over all blocks of a layout.

use crate::layout::RamLayout;
use crate::units::{BlockIndex, PageAddr};

/// A set of pages of one [`RamLayout`]: 32 KiB a GiB of guest RAM, whatever it holds.
///
/// Sets of different layouts do not mix: combining them panics, as indexing past a slice does. Whoever takes sets
/// from elsewhere compares [`PageSet::layout`] first.
#[derive(Debug, Clone)]
pub struct PageSet {
    layout: RamLayout,
    words: Vec<u64>,
    len: u64,
    /// Where [`take_next`](Self::take_next) goes on, as a page's number among all pages.
    cursor: u64,
}

/// A page that the layout does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{addr} (and {count} pages from there) is outside the guest's RAM layout")]
pub struct OutsideLayout {
    pub addr: PageAddr,
    pub count: u64,
}

impl PageSet {
    /// The empty set.
    pub fn new(layout: &RamLayout) -> Self {
        let words = usize::try_from(layout.total_pages().div_ceil(64)).expect("2^32 pages need 2^26 words");
        Self { layout: layout.clone(), words: vec![0; words], len: 0, cursor: 0 }
    }

    /// All pages of the layout.
    pub fn full(layout: &RamLayout) -> Self {
        let mut set = Self::new(layout);
        set.set_bits(0, layout.total_pages());
        set
    }

    pub fn layout(&self) -> &RamLayout {
        &self.layout
    }

    /// Number of pages in the set; O(1).
    pub fn len(&self) -> u64 {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Adds a page; true if it was not in the set.
    pub fn insert(&mut self, addr: PageAddr) -> Result<bool, OutsideLayout> {
        let linear = self.layout.linear(addr).ok_or(OutsideLayout { addr, count: 1 })?;
        Ok(self.insert_linear(linear))
    }

    /// Adds `count` pages of `block` from page `start` on.
    pub fn insert_range(&mut self, block: BlockIndex, start: u64, count: u64) -> Result<(), OutsideLayout> {
        if count == 0 {
            return Ok(());
        }
        let inside = start.checked_add(count).is_some_and(|end| end <= self.layout.block_pages(block));
        let addr = PageAddr { block, page: start.try_into().unwrap_or_default() };
        let first = self.layout.linear(addr).filter(|_| inside).ok_or(OutsideLayout { addr, count })?;
        self.set_bits(first, count);
        Ok(())
    }

    /// Removes a page; true if it was in the set.
    pub fn remove(&mut self, addr: PageAddr) -> bool {
        let Some(linear) = self.layout.linear(addr) else { return false };
        let (word, bit) = split(linear);
        let was = self.words[word] & bit != 0;
        self.words[word] &= !bit;
        self.len -= u64::from(was);
        was
    }

    pub fn contains(&self, addr: PageAddr) -> bool {
        self.layout.linear(addr).is_some_and(|linear| {
            let (word, bit) = split(linear);
            self.words[word] & bit != 0
        })
    }

    /// Removes all pages. The cursor of [`take_next`](Self::take_next) stays.
    pub fn clear(&mut self) {
        if self.len > 0 {
            self.words.fill(0);
            self.len = 0;
        }
    }

    /// Adds all pages of `other`.
    pub fn union_with(&mut self, other: &Self) {
        self.assert_same_layout(other);
        if other.len == 0 {
            return;
        }
        let mut len = 0;
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine |= theirs;
            len += u64::from(mine.count_ones());
        }
        self.len = len;
    }

    /// Removes all pages of `other`.
    pub fn subtract(&mut self, other: &Self) {
        self.assert_same_layout(other);
        if self.len == 0 || other.len == 0 {
            return;
        }
        let mut len = 0;
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine &= !theirs;
            len += u64::from(mine.count_ones());
        }
        self.len = len;
    }

    /// Whether every page of this set is in `other`.
    pub fn is_subset(&self, other: &Self) -> bool {
        self.assert_same_layout(other);
        self.len <= other.len && self.words.iter().zip(&other.words).all(|(mine, theirs)| mine & !theirs == 0)
    }

    /// Whether a page is in both sets.
    pub fn intersects(&self, other: &Self) -> bool {
        self.assert_same_layout(other);
        self.len > 0 && other.len > 0 && self.words.iter().zip(&other.words).any(|(mine, theirs)| mine & theirs != 0)
    }

    /// The pages in order of block and page.
    pub fn iter(&self) -> impl Iterator<Item = PageAddr> + '_ {
        self.words.iter().enumerate().filter(|(_, word)| **word != 0).flat_map(move |(index, word)| {
            bits(*word).map(move |bit| {
                self.layout.addr(index as u64 * 64 + bit).expect("only bits of pages in the layout are set")
            })
        })
    }

    /// Runs of neighbouring pages of one block, in order: first page and count.
    pub fn ranges(&self) -> impl Iterator<Item = (PageAddr, u64)> + '_ {
        let mut pages = self.iter().peekable();
        std::iter::from_fn(move || {
            let first = pages.next()?;
            let mut count = 1;
            while pages
                .next_if(|next| {
                    next.block == first.block && u64::from(next.page.get()) == u64::from(first.page.get()) + count
                })
                .is_some()
            {
                count += 1;
            }
            Some((first, count))
        })
    }

    /// Removes and returns up to `max` pages, from where the last call ended, around the end to the start: no page
    /// waits for ever behind others that keep coming back.
    pub fn take_next(&mut self, max: usize) -> Vec<PageAddr> {
        let mut taken = Vec::with_capacity(max.min(usize::try_from(self.len).unwrap_or(max)));
        let total = self.layout.total_pages();
        if self.cursor >= total {
            self.cursor = 0;
        }
        let start = self.cursor;
        self.take_between(start, total, max, &mut taken);
        if taken.len() < max && self.len > 0 {
            self.take_between(0, start, max, &mut taken);
        }
        taken
    }

    fn take_between(&mut self, from: u64, to: u64, max: usize, taken: &mut Vec<PageAddr>) {
        if from >= to {
            return;
        }
        let (first_word, last_word) = ((from / 64) as usize, ((to - 1) / 64) as usize);
        for index in first_word..=last_word {
            let base = index as u64 * 64;
            let mut candidates = self.words[index];
            if base < from {
                candidates &= u64::MAX << (from - base);
            }
            if base + 64 > to {
                candidates &= u64::MAX >> (base + 64 - to);
            }
            for bit in bits(candidates) {
                if taken.len() == max || self.len == 0 {
                    return;
                }
                let linear = base + bit;
                taken.push(self.layout.addr(linear).expect("only bits of pages in the layout are set"));
                self.words[index] &= !(1 << bit);
                self.len -= 1;
                self.cursor = linear + 1;
            }
        }
    }

    /// Adds pages that came out of a set of the same layout.
    pub(crate) fn insert_known(&mut self, pages: &[PageAddr]) {
        for addr in pages {
            let inserted = self.insert(*addr);
            debug_assert!(inserted.is_ok(), "{addr} came out of a set of this layout");
        }
    }

    fn insert_linear(&mut self, linear: u64) -> bool {
        let (word, bit) = split(linear);
        let new = self.words[word] & bit == 0;
        self.words[word] |= bit;
        self.len += u64::from(new);
        new
    }

    fn set_bits(&mut self, first: u64, count: u64) {
        let end = first + count;
        let mut at = first;
        while at < end {
            let (word, offset) = ((at / 64) as usize, at % 64);
            let run = (64 - offset).min(end - at);
            let mask = (u64::MAX >> (64 - run)) << offset;
            self.len += u64::from((mask & !self.words[word]).count_ones());
            self.words[word] |= mask;
            at += run;
        }
    }

    fn assert_same_layout(&self, other: &Self) {
        assert!(self.layout == other.layout, "page sets of different RAM layouts were combined");
    }
}

/// Sets are equal when they hold the same pages of the same layout.
impl PartialEq for PageSet {
    fn eq(&self, other: &Self) -> bool {
        self.layout == other.layout && self.words == other.words
    }
}

impl Eq for PageSet {}

fn split(linear: u64) -> (usize, u64) {
    ((linear / 64) as usize, 1 << (linear % 64))
}

fn bits(mut word: u64) -> impl Iterator<Item = u64> {
    std::iter::from_fn(move || {
        (word != 0).then(|| {
            let bit = word.trailing_zeros();
            word &= word - 1;
            u64::from(bit)
        })
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::layout::RamBlock;

    fn layout() -> RamLayout {
        let block = |name: &str, pages: u64| RamBlock { name: name.into(), len_bytes: pages * 4096 };
        RamLayout::new(vec![block("a", 70), block("b", 1), block("c", 129)]).unwrap()
    }

    fn page() -> impl Strategy<Value = PageAddr> {
        (0u64..200).prop_map(|linear| layout().addr(linear).unwrap())
    }

    #[derive(Debug, Clone)]
    enum Op {
        Insert(PageAddr),
        Remove(PageAddr),
        Range(u16, u64, u64),
        Take(usize),
        Union(Vec<PageAddr>),
        Subtract(Vec<PageAddr>),
        Clear,
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            4 => page().prop_map(Op::Insert),
            2 => page().prop_map(Op::Remove),
            2 => (0u16..4, 0u64..140, 0u64..140).prop_map(|(b, s, c)| Op::Range(b, s, c)),
            2 => (0usize..80).prop_map(Op::Take),
            1 => prop::collection::vec(page(), 0..50).prop_map(Op::Union),
            1 => prop::collection::vec(page(), 0..50).prop_map(Op::Subtract),
            1 => Just(Op::Clear),
        ]
    }

    fn set_of(pages: &[PageAddr]) -> PageSet {
        let mut set = PageSet::new(&layout());
        for page in pages {
            set.insert(*page).unwrap();
        }
        set
    }

    proptest! {
        #[test]
        fn behaves_as_a_btree_set(ops in prop::collection::vec(op(), 1..60)) {
            let mut set = PageSet::new(&layout());
            let mut model = BTreeSet::new();
            for op in ops {
                match op {
                    Op::Insert(p) => prop_assert_eq!(set.insert(p), Ok(model.insert(p))),
                    Op::Remove(p) => prop_assert_eq!(set.remove(p), model.remove(&p)),
                    Op::Range(block, start, count) => {
                        let fits = start + count <= layout().block_pages(BlockIndex::new(block));
                        let result = set.insert_range(BlockIndex::new(block), start, count);
                        prop_assert_eq!(result.is_ok(), fits || count == 0);
                        if result.is_ok() {
                            model.extend((start..start + count).map(|p| PageAddr::new(block, p as u32)));
                        }
                    }
                    Op::Take(max) => {
                        let taken = set.take_next(max);
                        prop_assert_eq!(taken.len(), max.min(model.len()));
                        for p in taken {
                            prop_assert!(model.remove(&p));
                        }
                    }
                    Op::Union(pages) => {
                        set.union_with(&set_of(&pages));
                        model.extend(pages);
                    }
                    Op::Subtract(pages) => {
                        set.subtract(&set_of(&pages));
                        pages.iter().for_each(|p| { model.remove(p); });
                    }
                    Op::Clear => {
                        set.clear();
                        model.clear();
                    }
                }
                prop_assert_eq!(set.len(), model.len() as u64);
                prop_assert!(set.iter().eq(model.iter().copied()), "sorted and the same");
                let from_ranges = set.ranges().flat_map(|(p, n)| {
                    (0..n as u32).map(move |i| PageAddr::new(p.block.get(), p.page.get() + i))
                });
                prop_assert!(from_ranges.eq(model.iter().copied()));
                prop_assert!(set.is_subset(&PageSet::full(&layout())));
                prop_assert_eq!(set.intersects(&PageSet::full(&layout())), !model.is_empty());
                let first = model.first().map(|p| set_of(&[*p])).unwrap_or_else(|| set_of(&[]));
                prop_assert_eq!(set.intersects(&first), !model.is_empty());
                let mut rest = PageSet::full(&layout());
                rest.subtract(&set);
                prop_assert!(!set.intersects(&rest));
            }
        }
    }

    #[test]
    fn taking_rotates() {
        let mut set = PageSet::full(&layout());
        assert_eq!(set.take_next(1), [PageAddr::new(0, 0)]);
        set.insert(PageAddr::new(0, 0)).unwrap();
        assert_eq!(set.take_next(1), [PageAddr::new(0, 1)], "a page that came back waits for its turn");
        assert_eq!(set.take_next(198).len(), 198);
        assert_eq!(set.take_next(9), [PageAddr::new(0, 0)]);
        assert_eq!(set.take_next(9), []);
    }

    #[test]
    fn pages_outside_are_refused_not_spilled_into_the_next_block() {
        let mut set = PageSet::new(&layout());
        assert!(set.insert(PageAddr::new(0, 70)).is_err());
        assert!(set.insert_range(BlockIndex::new(1), 0, 2).is_err());
        assert!(set.insert_range(BlockIndex::new(1), u64::MAX, 2).is_err());
        assert!(set.is_empty());
        assert!(!set.contains(PageAddr::new(0, 70)));
        assert_eq!(PageSet::full(&layout()).len(), 200);
    }
}
