//! Buffers for the pages of a cut, used again from cut to cut: memory that comes from the operating system while a guest stands
//! still is a fault for each page, and small pages are looked up slowly, by who fills them and by who reads them.

use vmsync::batch::PageBatch;
use vmsync::units::PAGE_SIZE;

use super::advice;

/// What is more goes back to the operating system: an epoch like that is rare, or its guest large.
const KEPT_MAX_BYTES: usize = 40 << 20;

#[derive(Default)]
pub(super) struct Spares(Vec<PageBatch>);

impl Spares {
    /// An empty one with room for so many pages, which is in place.
    pub(super) fn take(&mut self, pages: usize) -> PageBatch {
        let roomiest = (0..self.0.len()).max_by_key(|at| self.0[*at].room());
        let mut batch = roomiest.map(|at| self.0.swap_remove(at)).unwrap_or_default();
        if batch.room() < pages {
            // Not one that grows: what was in it would be copied.
            batch = PageBatch::with_capacity(pages);
            advice::in_place(batch.spare_bytes());
        }
        batch
    }

    /// Takes one back that is needed no longer.
    pub(super) fn give(&mut self, mut batch: PageBatch) {
        batch.clear();
        let kept: usize = self.0.iter().map(PageBatch::room).sum();
        if batch.room() > 0 && (kept + batch.room()) * PAGE_SIZE <= KEPT_MAX_BYTES {
            self.0.push(batch);
        }
    }
}

#[cfg(test)]
mod tests {
    use vmsync::units::PageAddr;

    use super::*;

    #[test]
    fn the_roomiest_is_used_again_and_long_ones_are_not_kept() {
        let mut spares = Spares::default();
        let mut large = spares.take(900);
        assert!(large.room() >= 900);
        (0..900).for_each(|page| large.push(PageAddr::new(0, page), &[7; PAGE_SIZE]));
        let at = large.bytes().as_ptr();
        let small = spares.take(3);
        spares.give(small);
        spares.give(large);
        let again = spares.take(700);
        assert!(again.is_empty() && again.bytes().as_ptr() == at);
        spares.give(again);
        let too_long = spares.take(KEPT_MAX_BYTES / PAGE_SIZE + 1);
        spares.give(too_long);
        spares.give(PageBatch::new());
        assert!(spares.0.iter().all(|batch| batch.room() < 1_000), "given back to the system");
    }
}
