//! Tells pages that will not compress, so that no time is spent on trying.

use crate::units::Page;

/// One byte in so many is looked at.
const STRIDE: usize = 32;
/// Of 128 random bytes 101 are different on average, 4 more or less; of machine code about 65, of text and pointers
/// less than 50.
const RANDOM_FROM: u32 = 88;
/// Judged pages of which one is compressed nevertheless, to see whether the judgement is any good.
const PROBE_EVERY: u32 = 64;
/// After a probe that shrank, so many pages are not judged.
const DISTRUST_PAGES: u32 = 4096;

/// Judges pages, and learns from what compression made of those it judged.
#[derive(Debug, Default)]
pub(super) struct NoiseFilter {
    judged: u32,
    distrust: u32,
}

impl NoiseFilter {
    /// True if compressing the page is not worth trying.
    pub(super) fn is_noise(&mut self, page: &Page) -> bool {
        if self.distrust > 0 {
            self.distrust -= 1;
            return false;
        }
        different_bytes(page) >= RANDOM_FROM
    }

    /// Whether this page, judged as noise, is to be compressed nevertheless as a probe.
    pub(super) fn wants_probe(&mut self) -> bool {
        self.judged = (self.judged + 1) % PROBE_EVERY;
        self.judged == 1
    }

    /// A probe of `raw` bytes was compressed to `packed`.
    pub(super) fn probed(&mut self, raw: usize, packed: usize) {
        if packed < raw - raw / 16 {
            self.distrust = DISTRUST_PAGES;
        }
    }
}

fn different_bytes(page: &Page) -> u32 {
    let mut seen = [0u64; 4];
    for (i, chunk) in page.as_chunks::<STRIDE>().0.iter().enumerate() {
        // Of each word another byte: the high ones of small numbers are all zero.
        let byte = usize::from(chunk[i % STRIDE]);
        seen[byte / 64] |= 1 << (byte % 64);
    }
    seen.iter().map(|seen| seen.count_ones()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::PAGE_SIZE;

    fn random(mut state: u64) -> Page {
        std::array::from_fn(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        })
    }

    #[test]
    fn random_pages_are_noise_and_others_are_not() {
        let mut filter = NoiseFilter::default();
        let found = (0..1000).filter(|seed| filter.is_noise(&random(*seed))).count();
        assert!(found > 990, "{found} of 1000");
        let text = include_bytes!("noise.rs").repeat(4);
        assert!(!filter.is_noise(text[..PAGE_SIZE].as_chunks().0.first().unwrap()));
        let counters: Page = std::array::from_fn(|i| if i % 8 < 2 { (i * 7 / 8) as u8 } else { 0 });
        assert!(!filter.is_noise(&counters));
    }

    #[test]
    fn a_judgement_that_was_wrong_is_not_trusted_for_a_while() {
        let mut filter = NoiseFilter::default();
        assert!(filter.is_noise(&random(1)) && filter.wants_probe() && !filter.wants_probe());
        filter.probed(4096, 4090);
        assert!(filter.is_noise(&random(1)));
        filter.probed(4096, 2000);
        assert!((0..DISTRUST_PAGES).all(|_| !filter.is_noise(&random(1))));
        assert!(filter.is_noise(&random(1)));
    }
}
