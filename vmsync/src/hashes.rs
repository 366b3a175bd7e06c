//! Page hashes: to leave out pages that were written without changing, to find what a returning shadow still has,
//! and to verify.

use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::layout::RamLayout;
use crate::units::{Lineage, Page, PageAddr};

/// Seed of page hashes. It differs from source to source, so that a guest cannot prepare two pages that its
/// shadows would take for one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HashSeed(u64);

impl HashSeed {
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl From<Lineage> for HashSeed {
    fn from(lineage: Lineage) -> Self {
        Self(lineage.get())
    }
}

/// xxh3-64 of a page; never 0, which stands for "unknown" in tables and messages.
pub fn hash_page(seed: HashSeed, page: &Page) -> u64 {
    xxh3_64_with_seed(page, seed.0).max(1)
}

/// xxh3-64 of any bytes, such as device state.
pub fn hash_bytes(seed: HashSeed, bytes: &[u8]) -> u64 {
    xxh3_64_with_seed(bytes, seed.0)
}

/// One hash for each page of a layout, or "unknown": 8 bytes a page (2 MiB a GiB of guest RAM), which the operating
/// system only backs with memory where hashes were set.
#[derive(Debug, Clone)]
pub struct HashTable {
    layout: RamLayout,
    hashes: Vec<u64>,
}

const UNKNOWN: u64 = 0;

impl HashTable {
    /// A table where all hashes are unknown.
    pub fn new(layout: &RamLayout) -> Self {
        let pages = usize::try_from(layout.total_pages()).expect("a layout has at most 2^32 pages");
        Self { layout: layout.clone(), hashes: vec![UNKNOWN; pages] }
    }

    pub fn layout(&self) -> &RamLayout {
        &self.layout
    }

    /// The page's hash; `None` if unknown or outside the layout.
    pub fn get(&self, addr: PageAddr) -> Option<u64> {
        self.index(addr).map(|i| self.hashes[i]).filter(|h| *h != UNKNOWN)
    }

    /// Sets the page's hash (0: unknown) and returns the former one. Outside the layout nothing happens.
    pub fn set(&mut self, addr: PageAddr, hash: u64) -> Option<u64> {
        let index = self.index(addr)?;
        let former = std::mem::replace(&mut self.hashes[index], hash);
        (former != UNKNOWN).then_some(former)
    }

    /// Forgets the page's hash.
    pub fn forget(&mut self, addr: PageAddr) {
        self.set(addr, UNKNOWN);
    }

    /// Hashes from `start` on, to the end of its block at most; unknown ones are 0.
    pub fn run(&self, start: PageAddr, max: usize) -> &[u64] {
        let left = self.layout.block_pages(start.block).saturating_sub(u64::from(start.page.get()));
        let len = usize::try_from(left).unwrap_or(max).min(max);
        self.index(start).map_or(&[], |i| &self.hashes[i..i + len])
    }

    fn index(&self, addr: PageAddr) -> Option<usize> {
        self.layout.linear(addr).and_then(|linear| usize::try_from(linear).ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::RamBlock;
    use crate::units::PAGE_SIZE;

    #[test]
    fn tables_know_what_they_do_not_know() {
        let block = |name: &str, pages: u64| RamBlock { name: name.into(), len_bytes: pages * 4096 };
        let mut table = HashTable::new(&RamLayout::new(vec![block("a", 3), block("b", 2)]).unwrap());
        let addr = PageAddr::new(0, 2);
        assert_eq!(table.get(addr), None);
        assert_eq!(table.set(addr, 7), None);
        assert_eq!(table.set(addr, 8), Some(7));
        assert_eq!(table.run(PageAddr::new(0, 1), 9), [0, 8], "ends with the block");
        assert_eq!(table.run(PageAddr::new(0, 3), 9), [0; 0]);
        assert_eq!(table.set(PageAddr::new(0, 3), 9), None);
        assert_eq!(table.get(PageAddr::new(1, 0)), None, "must not spill into the next block");
        table.forget(addr);
        assert_eq!(table.get(addr), None);
    }

    #[test]
    fn hashes_depend_on_seed_and_every_byte() {
        let mut page = [0; PAGE_SIZE];
        let of = |seed, page: &Page| hash_page(HashSeed::new(seed), page);
        let zero = of(1, &page);
        assert_ne!(zero, of(2, &page));
        for at in [0, 1, 2047, 4095] {
            page[at] = 1;
            assert_ne!(of(1, &page), zero);
            page[at] = 0;
        }
    }
}
