//! The codec's inner loops over pages, in the widest vectors that this CPU has. The one module of the crate with
//! `unsafe` in it: vectors are loaded through pointers, and code for a CPU's extensions may only be called on a CPU
//! that has them.
//!
//! Each loop is written once, portably: that is what runs on any other CPU, and what the others are tested against. The
//! bytes that come out are the same everywhere.

use super::records::{self, WINDOW_BYTES};
use super::sum::{WORDS, weight_lines};
use super::words::{self, PageRoom, PageStreams, Table};
use crate::units::Page;

/// Compared and copied at once.
pub(super) const LINE_BYTES: usize = 64;
/// Lines in a page.
pub(super) const LINES: usize = size_of::<Page>() / LINE_BYTES;

type Line = [u8; LINE_BYTES];

/// Of each line of a page one bit for each byte that differs.
pub(super) type ByteMasks = [u64; LINES];

/// How pages differ: one bit for each line that does, whose bytes are then in `masks`. Of lines that are equal nothing
/// is written.
pub(super) fn changed_bytes(old: &Page, new: &Page, masks: &mut ByteMasks) -> u64 {
    #[cfg(target_arch = "x86_64")]
    {
        if x86::has_avx512() {
            // SAFETY: this CPU has what the function is compiled for.
            return unsafe { x86::changed_bytes_avx512(old, new, masks) };
        }
        if x86::has_avx2() {
            // SAFETY: as above.
            return unsafe { x86::changed_bytes_avx2(old, new, masks) };
        }
    }
    portable::changed_bytes(old, new, masks)
}

/// Brings these lines of `old` to `new`; by how much that changes the page's sum.
pub(super) fn bring_up(old: &mut Page, new: &Page, lines: u64) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if x86::has_avx512() {
        // SAFETY: this CPU has what the function is compiled for.
        return unsafe { x86::bring_up_avx512(old, new, lines) };
    }
    portable::bring_up(old, new, lines)
}

/// Sum of a page's contents: see [`super::sum`].
pub(super) fn page_sum(page: &Page) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if x86::has_avx512() {
        // SAFETY: this CPU has what the function is compiled for.
        return unsafe { x86::page_sum_avx512(page) };
    }
    portable::page_sum(page)
}

/// Writes a page's words: see [`words`]. How many indexes and literals they took.
pub(super) fn write_words(page: &Page, table: &mut Table, out: PageRoom<'_>) -> (usize, usize) {
    #[cfg(target_arch = "x86_64")]
    if x86::has_avx512_vbmi2() {
        // SAFETY: this CPU has what the function is compiled for.
        return unsafe { x86::write_words_avx512(page, table, out) };
    }
    words::write_portable(page, table, out)
}

/// Reads a page's words, whatever these bytes are. How many indexes and literals they took.
pub(super) fn read_words(page: &mut Page, table: &mut Table, from: PageStreams<'_>) -> (usize, usize) {
    #[cfg(target_arch = "x86_64")]
    if x86::has_avx512_vbmi2() {
        // SAFETY: this CPU has what the function is compiled for.
        return unsafe { x86::read_words_avx512(page, table, from) };
    }
    words::read_portable(page, table, from)
}

/// How many bytes of the lines by which a page is judged are equal to those a stride before them: see [`records`].
pub(super) fn equal_bytes(page: &Page, stride: usize) -> u32 {
    #[cfg(target_arch = "x86_64")]
    if x86::has_avx512() {
        // SAFETY: this CPU has what the function is compiled for.
        return unsafe { x86::equal_bytes_avx512(page, stride) };
    }
    records::equal_portable(page, stride)
}

/// Writes a page's records: see [`records`].
pub(super) fn write_records(window: &[u8; WINDOW_BYTES], stride: usize, out: records::PageRoom<'_>) -> records::Taken {
    #[cfg(target_arch = "x86_64")]
    if x86::has_avx512_vbmi2() {
        // SAFETY: this CPU has what the function is compiled for.
        return unsafe { x86::write_records_avx512(window, stride, out) };
    }
    records::write_portable(window, stride, out)
}

/// Reads a page's records. There is a mask for each of the lines, and a line more than the literals that they tell of.
pub(super) fn read_records(
    window: &mut [u8; WINDOW_BYTES],
    stride: usize,
    lines: u64,
    masks: &[[u8; 8]],
    literals: &[u8],
) {
    #[cfg(target_arch = "x86_64")]
    if x86::has_avx512_vbmi2() {
        // SAFETY: this CPU has what the function is compiled for.
        return unsafe { x86::read_records_avx512(window, stride, lines, masks, literals) };
    }
    records::read_portable(window, stride, lines, masks, literals);
}

/// One bit for each byte of a line that differs.
pub(super) fn line_mask(old: &Line, new: &Line) -> u64 {
    let mut mask = 0;
    for (word, (old, new)) in old.as_chunks::<8>().0.iter().zip(new.as_chunks::<8>().0).enumerate() {
        let differs = u64::from_le_bytes(*old) ^ u64::from_le_bytes(*new);
        mask |= u64::from(used_bytes(differs)) << (8 * word);
    }
    mask
}

/// One bit for each byte of a word that is not zero.
pub(super) fn used_bytes(word: u64) -> u8 {
    const LOW: u64 = 0x7f7f_7f7f_7f7f_7f7f;
    /// Moves bit 0 of byte i to bit 56 + i, without carries between them.
    const GATHER: u64 = 0x0102_0408_1020_4080;
    // The top bit of each byte that is not zero.
    let top = (((word & LOW) + LOW) | word) & !LOW;
    ((top >> 7).wrapping_mul(GATHER) >> 56) as u8
}

/// The value will be used soon: it is fetched into the CPU's second cache. The first one is too small for some pages
/// more than the one that is worked on.
pub(super) fn fetch_value<T>(value: &T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: the address is that of a value; a prefetch changes nothing but caches.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(std::ptr::from_ref(value).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = value;
}

/// The same for bytes that need not begin with a line; of a page best all of them.
pub(super) fn fetch_bytes(bytes: &[u8]) {
    bytes.chunks(LINE_BYTES).for_each(|line| fetch_value(&line[0]));
}

/// The same for these lines of a page, a bit each.
pub fn fetch_lines(page: &Page, mut lines: u64) {
    if lines == u64::MAX {
        return fetch_bytes(page);
    }
    while lines != 0 {
        let line = lines.trailing_zeros() as usize % LINES;
        lines &= lines - 1;
        fetch_value(&page[line * LINE_BYTES]);
    }
}

/// The reference.
mod portable {
    use super::*;

    /// Compared at once.
    const PART_LINES: usize = 8;

    pub(super) fn changed_bytes(old: &Page, new: &Page, masks: &mut ByteMasks) -> u64 {
        const PART_BYTES: usize = PART_LINES * LINE_BYTES;
        let mut lines = 0;
        let parts = old.as_chunks::<PART_BYTES>().0.iter().zip(new.as_chunks::<PART_BYTES>().0);
        for (part, (old, new)) in parts.enumerate() {
            // Most parts of most pages are equal, and libc compares memory with the machine's best code.
            if old == new {
                continue;
            }
            let of_part = old.as_chunks().0.iter().zip(new.as_chunks().0);
            for (line, (old, new)) in of_part.enumerate() {
                let line = part * PART_LINES + line;
                let mask = line_mask(old, new);
                if mask != 0 {
                    masks[line] = mask;
                    lines |= 1 << line;
                }
            }
        }
        lines
    }

    #[inline(always)]
    pub(super) fn bring_up(old: &mut Page, new: &Page, mut lines: u64) -> u64 {
        let (old, new) = (old.as_chunks_mut::<LINE_BYTES>().0, new.as_chunks::<LINE_BYTES>().0);
        let weights = weight_lines();
        let mut change = [0u64; 8];
        while lines != 0 {
            let line = lines.trailing_zeros() as usize % LINES;
            lines &= lines - 1;
            let words = old[line].as_chunks_mut::<8>().0.iter_mut().zip(new[line].as_chunks::<8>().0);
            for ((sum, (old, new)), weight) in change.iter_mut().zip(words).zip(&weights[line]) {
                let by = u64::from_le_bytes(*new).wrapping_sub(u64::from_le_bytes(*old));
                *sum = sum.wrapping_add(by.wrapping_mul(*weight));
                *old = *new;
            }
        }
        change.into_iter().fold(0, u64::wrapping_add)
    }

    #[inline(always)]
    pub(super) fn page_sum(page: &Page) -> u64 {
        const { assert!(WORDS == LINES * 8) };
        let mut sums = [0u64; 8];
        for (line, weights) in page.as_chunks::<LINE_BYTES>().0.iter().zip(weight_lines()) {
            for ((sum, word), weight) in sums.iter_mut().zip(line.as_chunks::<8>().0).zip(weights) {
                *sum = sum.wrapping_add(u64::from_le_bytes(*word).wrapping_mul(*weight));
            }
        }
        sums.into_iter().fold(0, u64::wrapping_add)
    }
}

#[cfg(target_arch = "x86_64")]
mod x86;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::units::PAGE_SIZE;

    type ChangedBytes = fn(&Page, &Page, &mut ByteMasks) -> u64;
    type BringUp = fn(&mut Page, &Page, u64) -> u64;
    type PageSum = fn(&Page) -> u64;

    /// All that this CPU can run, whichever it would choose.
    fn all() -> (Vec<ChangedBytes>, Vec<BringUp>, Vec<PageSum>) {
        let (mut changed, mut bring, mut sums): (Vec<ChangedBytes>, Vec<BringUp>, Vec<PageSum>) =
            (vec![portable::changed_bytes], vec![portable::bring_up], vec![portable::page_sum]);
        #[cfg(target_arch = "x86_64")]
        {
            if x86::has_avx2() {
                // SAFETY: this CPU has what the functions are compiled for; below too.
                changed.push(|old, new, masks| unsafe { x86::changed_bytes_avx2(old, new, masks) });
            }
            if x86::has_avx512() {
                // SAFETY: as above.
                changed.push(|old, new, masks| unsafe { x86::changed_bytes_avx512(old, new, masks) });
                // SAFETY: as above.
                bring.push(|old, new, lines| unsafe { x86::bring_up_avx512(old, new, lines) });
                // SAFETY: as above.
                sums.push(|page| unsafe { x86::page_sum_avx512(page) });
            }
        }
        (changed, bring, sums)
    }

    fn page(mut seed: u64) -> Page {
        std::array::from_fn(|_| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 56) as u8
        })
    }

    proptest! {
        #[test]
        fn all_loops_do_what_the_plainest_code_does(
            seed in any::<u64>(), writes in prop::collection::vec((0..PAGE_SIZE, any::<u8>()), 0..200), noise in any::<u8>(),
        ) {
            let old = page(seed);
            let mut new = if noise == 0 { page(!seed) } else { old };
            writes.iter().for_each(|(at, byte)| new[*at] = *byte);
            let differs = |at: usize| u64::from(old[at] != new[at]);
            let masks: ByteMasks =
                std::array::from_fn(|line| (0..64).map(|byte| differs(line * 64 + byte) << byte).fold(0, |a, b| a | b));
            let lines = (0..LINES).map(|line| u64::from(masks[line] != 0) << line).fold(0, |a, b| a | b);
            let weights = weight_lines().as_flattened();
            let words = |page: &Page| -> u64 {
                let words = page.as_chunks::<8>().0.iter().zip(weights);
                words.fold(0, |sum, (word, weight)| sum.wrapping_add(u64::from_le_bytes(*word).wrapping_mul(*weight)))
            };
            let (changed, bring, sums) = all();
            for changed_bytes in changed {
                let mut found = [0; LINES];
                prop_assert_eq!(changed_bytes(&old, &new, &mut found), lines);
                prop_assert_eq!(found, masks);
            }
            for bring_up in bring {
                let mut brought = old;
                prop_assert_eq!(words(&old).wrapping_add(bring_up(&mut brought, &new, lines)), words(&new));
                prop_assert_eq!(brought, new);
                prop_assert_eq!(bring_up(&mut brought, &new, u64::MAX), 0);
            }
            for page_sum in sums {
                prop_assert_eq!(page_sum(&new), words(&new));
            }
        }
    }
}
