//! The mirror: previous contents of pages, which changes are coded against.
//!
//! It holds at most as many pages as its budget allows, those that are dirtied most often. Which page is worth more is
//! told by its *heat*: 1 for each cut that it was dirty at, halved every [`HALF_LIFE_CUTS`] cuts. A page is only put
//! out by one that is clearly hotter: when all of a guest's pages are dirtied in turn and do not fit, those that are in
//! stay in and hit, where the least recently used would always have been put out just before it was needed.

use super::simd;
use crate::layout::RamLayout;
use crate::units::{PAGE_SIZE, PAGE_SIZE_U64, Page, PageAddr};

/// Heat halves in so many cuts.
pub const HALF_LIFE_CUTS: u32 = 16;

/// Heat of one cut.
const ONE: u16 = 256;
const HEAT_MAX: u16 = 0x3fff;
/// A shunned page is tried again at one cut in so many.
const TRY_AGAIN_CUTS: usize = 16;
/// 2^16 * 2^(-i / 16)
const DECAY: [u32; HALF_LIFE_CUTS as usize] = [
    65_536, 62_757, 60_097, 57_549, 55_109, 52_772, 50_535, 48_393, 46_341, 44_376, 42_495, 40_693, 38_968, 37_316,
    35_734, 34_219,
];
/// Slots looked at to find one to put out.
const CANDIDATES: usize = 8;
/// Pages that are allocated at once: 16 MiB, of which the operating system may well make huge pages.
const SLAB_PAGES: usize = 4096;

/// Memory for previous contents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MirrorBudget {
    /// All pages that were ever dirty, at most the guest's RAM.
    Full,
    /// At most so many bytes of pages; what keeps account of them (8 bytes a page of the guest that was ever dirty,
    /// 16 a page held) comes on top.
    Bytes(u64),
}

impl Default for MirrorBudget {
    /// Enough for a guest that dirties 100 MB an epoch; most dirty less.
    fn default() -> Self {
        Self::Bytes(256 << 20)
    }
}

/// Is given memory that was just allocated and will be filled with pages, from its start on, and may tell the operating
/// system about it. Only speed depends on it.
pub type Advise = fn(&[u8]);

/// Memory of so many pages.
struct Slab {
    /// Bytes, because only of these a zeroed vector costs no memory before it is written.
    bytes: Vec<u8>,
    /// Where the first page begins: vectors read and write lines of a cache, not parts of two.
    start: usize,
}

/// See the module's description.
pub(super) struct Mirror {
    layout: RamLayout,
    /// One [`Account`] a page.
    pages: Vec<u64>,
    slots: Vec<Slot>,
    slabs: Vec<Slab>,
    advise: Advise,
    free: Vec<u32>,
    slots_max: usize,
    hand: usize,
    clock: u16,
}

/// What is known about a page, packed so that an untouched table needs no memory: slot + 1 (32 bits; 0: none), heat
/// (14 bits), whether what is held is one word throughout (1 bit), whether it is shunned (1 bit), clock when it was last
/// dirty (16 bits; it may run around, and a page then looks a little too hot).
#[derive(Debug, Clone, Copy)]
struct Account(u64);

#[derive(Debug, Clone, Copy)]
struct Slot {
    /// Number of the page among all pages; [`Slot::FREE`]: none.
    page: u32,
    /// The page was written since, and nobody knows what: these are not the contents that it had at the last cut.
    stale: bool,
    sum: u64,
}

/// Where a page is held, until another one is admitted or it is forgotten.
#[derive(Debug, Clone, Copy)]
pub(super) struct HeldAt {
    slot: usize,
    /// It holds one word throughout.
    pub(super) filled: bool,
}

/// A page's place in the mirror.
pub(super) struct Held<'a> {
    pub(super) page: &'a mut Page,
    pub(super) sum: &'a mut u64,
}

impl Account {
    const SHUNNED: u64 = 1 << 47;
    const FILLED: u64 = 1 << 46;

    fn slot(self) -> Option<usize> {
        (self.0 as u32).checked_sub(1).map(|slot| slot as usize)
    }

    fn with_slot(self, slot: Option<usize>) -> Self {
        // Slots are numbered below 2^32 - 1: a layout has at most 2^32 pages, and memory ends long before.
        Self(self.0 & !0xffff_ffff | slot.map_or(0, |slot| slot as u64 + 1))
    }

    fn heat_at(self, clock: u16) -> u16 {
        let (heat, since) = ((self.0 >> 32) as u16 & HEAT_MAX, (self.0 >> 48) as u16);
        let age = u32::from(clock.wrapping_sub(since));
        let decayed = (u32::from(heat) * (DECAY[(age % HALF_LIFE_CUTS) as usize] >> 8)) >> 8;
        decayed.checked_shr(age / HALF_LIFE_CUTS).unwrap_or(0) as u16
    }

    fn touched(self, clock: u16) -> Self {
        let heat = self.heat_at(clock).saturating_add(ONE).min(HEAT_MAX);
        Self(self.0 & (0xffff_ffff | Self::SHUNNED | Self::FILLED) | u64::from(heat) << 32 | u64::from(clock) << 48)
    }
}

impl Slot {
    const FREE: u32 = u32::MAX;
}

impl Mirror {
    pub(super) fn new(layout: &RamLayout, budget: MirrorBudget, advise: Advise) -> Self {
        let total = layout.total_pages();
        let pages = match budget {
            MirrorBudget::Full => total,
            MirrorBudget::Bytes(bytes) => total.min(bytes / PAGE_SIZE_U64),
        };
        let total = usize::try_from(total).expect("a layout has at most 2^32 pages");
        Self {
            layout: layout.clone(),
            pages: vec![0; total],
            slots: Vec::new(),
            slabs: Vec::new(),
            advise,
            free: Vec::new(),
            // The last page of the largest layout has no slot: its number means "free".
            slots_max: usize::try_from(pages).unwrap_or(usize::MAX).min(Slot::FREE as usize - 1),
            hand: 0,
            clock: 0,
        }
    }

    /// Another cut begins.
    pub(super) fn begin_cut(&mut self) {
        self.clock = self.clock.wrapping_add(1);
    }

    /// The page is dirty at this cut, and its contents are known; where it is held.
    pub(super) fn touch(&mut self, addr: PageAddr) -> Option<HeldAt> {
        let index = self.index(addr)?;
        let account = Account(self.pages[index]).touched(self.clock);
        self.pages[index] = account.0;
        let slot = account.slot()?;
        self.slots[slot].stale = false;
        Some(HeldAt { slot, filled: account.0 & Account::FILLED != 0 })
    }

    /// The page will be touched soon: what is needed for it is fetched into the CPU's caches.
    pub(super) fn fetch(&self, addr: PageAddr) {
        let Some(account) = self.index(addr).map(|index| Account(self.pages[index])) else { return };
        let Some(slot) = account.slot() else { return };
        simd::fetch_value(&self.slots[slot]);
        let page = page_of(&self.slabs, slot);
        match account.0 & Account::FILLED {
            0 => simd::fetch_bytes(page),
            // It is most likely so again, and then the first word tells all.
            _ => simd::fetch_value(&page[0]),
        }
    }

    pub(super) fn get(&self, addr: PageAddr) -> Option<&Page> {
        let slot = Account(self.pages[self.index(addr)?]).slot()?;
        Some(page_of(&self.slabs, slot))
    }

    /// What is held of the page is one word throughout from now on, or no longer.
    pub(super) fn set_filled(&mut self, addr: PageAddr, filled: bool) {
        if let Some(index) = self.index(addr).filter(|index| Account(self.pages[*index]).slot().is_some()) {
            self.pages[index] = self.pages[index] & !Account::FILLED | if filled { Account::FILLED } else { 0 };
        }
    }

    pub(super) fn held(&mut self, HeldAt { slot, .. }: HeldAt) -> Held<'_> {
        let page = self.slabs[slot / SLAB_PAGES].page_mut(slot % SLAB_PAGES);
        Held { page, sum: &mut self.slots[slot].sum }
    }

    /// Puts a page in that is not there, if there is room or a colder one; `put_out` is given the page that had to go,
    /// unless it is stale.
    pub(super) fn admit(
        &mut self,
        addr: PageAddr,
        page: &Page,
        sum: impl FnOnce() -> u64,
        put_out: impl FnOnce(PageAddr, &Page),
    ) -> bool {
        let Some(index) = self.index(addr).filter(|i| self.may_enter(*i)) else { return false };
        let Some(slot) = self.room_for(index, put_out) else { return false };
        // A page's number fits in 32 bits, or it would not be in a layout.
        self.slots[slot] = Slot { page: index as u32, stale: false, sum: sum() };
        *self.slabs[slot / SLAB_PAGES].page_mut(slot % SLAB_PAGES) = *page;
        self.pages[index] = Account(self.pages[index]).with_slot(Some(slot)).0 & !(Account::SHUNNED | Account::FILLED);
        true
    }

    fn may_enter(&self, index: usize) -> bool {
        let account = Account(self.pages[index]);
        let shunned =
            account.0 & Account::SHUNNED != 0 && !(index + usize::from(self.clock)).is_multiple_of(TRY_AGAIN_CUTS);
        account.slot().is_none() && !shunned
    }

    /// The page was written, and its contents at that cut were not taken. What is held stays the base of patches.
    pub(super) fn set_stale(&mut self, addr: PageAddr, stale: bool) {
        if let Some(slot) = self.index(addr).and_then(|index| Account(self.pages[index]).slot()) {
            self.slots[slot].stale = stale;
        }
    }

    /// Takes a page out.
    pub(super) fn forget(&mut self, addr: PageAddr) {
        let Some(index) = self.index(addr) else { return };
        if let Some(slot) = Account(self.pages[index]).slot() {
            self.pages[index] = Account(self.pages[index]).with_slot(None).0;
            self.slots[slot].page = Slot::FREE;
            self.free.push(slot as u32);
        }
    }

    /// Takes out a page whose contents are all new each time and do not compress: they are no use as previous ones.
    pub(super) fn shun(&mut self, addr: PageAddr) {
        self.forget(addr);
        if let Some(index) = self.index(addr) {
            self.pages[index] |= Account::SHUNNED;
        }
    }

    /// Pages held.
    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Pages that may be held.
    pub(super) fn capacity(&self) -> usize {
        self.slots_max
    }

    fn room_for(&mut self, index: usize, put_out: impl FnOnce(PageAddr, &Page)) -> Option<usize> {
        if let Some(slot) = self.free.pop() {
            return Some(slot as usize);
        }
        if self.slots.len() < self.slots_max {
            let slot = self.slots.len();
            if slot.is_multiple_of(SLAB_PAGES) {
                let pages = SLAB_PAGES.min(self.slots_max - slot);
                let slab = Slab::new(pages);
                (self.advise)(&slab.bytes);
                self.slabs.push(slab);
            }
            self.slots.push(Slot { page: Slot::FREE, stale: false, sum: 0 });
            return Some(slot);
        }
        if self.slots.is_empty() {
            return None;
        }
        let (slot, heat) = self.coldest();
        let newcomer = Account(self.pages[index]).heat_at(self.clock);
        if u32::from(newcomer) * 4 <= u32::from(heat) * 5 {
            return None;
        }
        let victim = self.slots[slot].page as usize;
        let addr = self.layout.addr(victim as u64)?;
        if !self.slots[slot].stale {
            put_out(addr, page_of(&self.slabs, slot));
        }
        self.pages[victim] = Account(self.pages[victim]).with_slot(None).0;
        Some(slot)
    }

    /// The coldest of the next few slots, and its heat. There is no free slot.
    fn coldest(&mut self) -> (usize, u16) {
        let mut coldest = (self.hand, u16::MAX);
        for _ in 0..CANDIDATES.min(self.slots.len()) {
            self.hand = (self.hand + 1) % self.slots.len();
            let heat = Account(self.pages[self.slots[self.hand].page as usize]).heat_at(self.clock);
            if heat < coldest.1 {
                coldest = (self.hand, heat);
            }
        }
        coldest
    }

    fn index(&self, addr: PageAddr) -> Option<usize> {
        self.layout.linear(addr).and_then(|linear| usize::try_from(linear).ok())
    }
}

impl Slab {
    fn new(pages: usize) -> Self {
        let bytes = vec![0u8; (pages + 1) * PAGE_SIZE];
        let start = bytes.as_ptr().align_offset(PAGE_SIZE).min(PAGE_SIZE);
        Self { bytes, start }
    }

    fn page(&self, at: usize) -> &Page {
        &self.bytes[self.start..].as_chunks().0[at]
    }

    fn page_mut(&mut self, at: usize) -> &mut Page {
        &mut self.bytes[self.start..].as_chunks_mut().0[at]
    }
}

fn page_of(slabs: &[Slab], slot: usize) -> &Page {
    slabs[slot / SLAB_PAGES].page(slot % SLAB_PAGES)
}

impl std::fmt::Debug for Mirror {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mirror").field("pages", &self.len()).field("pages_max", &self.slots_max).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::layout::RamBlock;

    fn layout(pages: u64) -> RamLayout {
        RamLayout::new(vec![RamBlock { name: "a".into(), len_bytes: pages * 4096 }]).unwrap()
    }

    fn mirror(pages: u64, room: u64) -> Mirror {
        Mirror::new(&layout(pages), MirrorBudget::Bytes(room * 4096 + 4095), |_| {})
    }

    fn dirty(mirror: &mut Mirror, page: u32) -> bool {
        let addr = PageAddr::new(0, page);
        mirror.touch(addr);
        let hit = mirror.get(addr).is_some();
        if !hit {
            mirror.admit(addr, &[page as u8; PAGE_SIZE], || 0, |_, _| {});
        }
        hit
    }

    #[test]
    fn a_scan_larger_than_the_mirror_still_hits() {
        let (mut mirror, mut hits) = (mirror(2000, 900), 0);
        for _ in 0..10 {
            mirror.begin_cut();
            hits = (0..2000).filter(|page| dirty(&mut mirror, *page)).count();
        }
        assert_eq!((hits, mirror.len()), (900, 900));
    }

    #[test]
    fn hot_pages_get_in_and_stay_while_others_pass_by() {
        let mut mirror = mirror(10_000, 100);
        let mut passing = 0;
        let mut hits = 0;
        for cut in 0..200 {
            mirror.begin_cut();
            for _ in 0..300 {
                passing = (passing + 1) % 9000;
                dirty(&mut mirror, 1000 + passing);
            }
            let hot = (0..90).filter(|page| dirty(&mut mirror, *page)).count();
            hits += if cut >= 50 { hot } else { 0 };
        }
        assert!(hits >= 150 * 85, "{hits} of {}", 150 * 90);
    }

    #[test]
    fn another_working_set_takes_over() {
        let mut mirror = mirror(1000, 100);
        for cut in 0..80 {
            mirror.begin_cut();
            let first = if cut < 40 { 0 } else { 500 };
            let hits = (first..first + 100).filter(|page| dirty(&mut mirror, *page)).count();
            assert!(!matches!(cut, 39 | 79) || hits == 100, "cut {cut}: {hits}");
        }
    }

    #[test]
    fn shunned_pages_stay_out_and_are_tried_again() {
        let mut mirror = mirror(10, 10);
        mirror.begin_cut();
        dirty(&mut mirror, 3);
        mirror.shun(PageAddr::new(0, 3));
        assert_eq!(mirror.len(), 0);
        let mut entered = 0;
        for _ in 0..64 {
            mirror.begin_cut();
            dirty(&mut mirror, 3);
            entered += mirror.len();
            mirror.shun(PageAddr::new(0, 3));
        }
        assert_eq!(entered, 4);
    }

    #[test]
    fn budgets_are_kept() {
        assert_eq!(Mirror::new(&layout(10), MirrorBudget::Full, |_| {}).capacity(), 10);
        assert_eq!(Mirror::new(&layout(10), MirrorBudget::default(), |_| {}).capacity(), 10);
        let mut none = mirror(10, 0);
        assert!(!dirty(&mut none, 3) && !dirty(&mut none, 3));
        assert_eq!((none.len(), none.slabs.len()), (0, 0));
    }

    proptest! {
        #[test]
        fn what_is_held_is_what_was_put_in(
            room in 0u64..12, ops in prop::collection::vec((0u32..20, 0u8..10, any::<u8>()), 1..200),
        ) {
            let mut mirror = mirror(20, room);
            let mut model = BTreeMap::new();
            for (page, op, fill) in ops {
                let addr = PageAddr::new(0, page);
                match op {
                    0 => mirror.begin_cut(),
                    1 => {
                        mirror.forget(addr);
                        model.remove(&page);
                    }
                    2..5 => drop(mirror.touch(addr)),
                    _ => {
                        if let Some(held) = mirror.touch(addr) {
                            let held = mirror.held(held);
                            *held.page = [fill; PAGE_SIZE];
                            *held.sum = u64::from(fill);
                            model.insert(page, fill);
                        } else {
                            let mut gone = None;
                            let put_out = |addr: PageAddr, page: &Page| gone = Some((addr.page.get(), page[0]));
                            if mirror.admit(addr, &[fill; PAGE_SIZE], || u64::from(fill), put_out) {
                                if let Some((page, fill)) = gone {
                                    prop_assert_eq!(model.remove(&page), Some(fill));
                                }
                                model.insert(page, fill);
                            } else {
                                prop_assert_eq!(gone, None);
                            }
                        }
                    }
                }
                prop_assert_eq!(mirror.len(), model.len());
                prop_assert!(mirror.len() as u64 <= room);
                for page in 0..20 {
                    let slot = Account(mirror.pages[page as usize]).slot();
                    prop_assert_eq!(slot.is_some(), mirror.get(PageAddr::new(0, page)).is_some());
                    let held = slot.map(|slot| mirror.held(HeldAt { slot, filled: false })).map(|h| (*h.page, *h.sum));
                    prop_assert_eq!(held, model.get(&page).map(|f| ([*f; PAGE_SIZE], u64::from(*f))));
                }
            }
        }
    }
}
