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
mod x86 {
    use std::arch::is_x86_feature_detected;
    use std::arch::x86_64::*;

    use super::super::records::{JUDGED_LINES, PageRoom as PageRecords, STRIDE_MAX, Taken};
    use super::super::words::{AS_VALUE, ENTRY, ENTRY_BYTES, HASH, LINE_WORDS, LITERAL_BYTES, NEAR_ENTRY};
    use super::*;
    use crate::units::PAGE_SIZE;

    /// Cheap: the standard library looks once and remembers.
    pub(super) fn has_avx512() -> bool {
        is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("bmi1")
    }

    pub(super) fn has_avx2() -> bool {
        is_x86_feature_detected!("avx2") && is_x86_feature_detected!("bmi1")
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,bmi1")]
    pub(super) fn changed_bytes_avx512(old: &Page, new: &Page, masks: &mut ByteMasks) -> u64 {
        let (old, new) = (old.as_chunks::<LINE_BYTES>().0, new.as_chunks::<LINE_BYTES>().0);
        let mut lines = 0;
        for four in 0..LINES / 4 {
            let mut differs = [_mm512_setzero_si512(); 4];
            for (i, differs) in differs.iter_mut().enumerate() {
                let line = four * 4 + i;
                *differs = _mm512_xor_si512(load_line(&old[line]), load_line(&new[line]));
            }
            let any = _mm512_or_si512(_mm512_or_si512(differs[0], differs[1]), _mm512_or_si512(differs[2], differs[3]));
            if _mm512_test_epi64_mask(any, any) == 0 {
                continue;
            }
            for (i, differs) in differs.iter().enumerate() {
                let line = four * 4 + i;
                masks[line] = _mm512_test_epi8_mask(*differs, *differs);
                lines |= u64::from(masks[line] != 0) << line;
            }
        }
        lines
    }

    #[target_feature(enable = "avx2,bmi1")]
    pub(super) fn changed_bytes_avx2(old: &Page, new: &Page, masks: &mut ByteMasks) -> u64 {
        let (old, new) = (old.as_chunks::<32>().0, new.as_chunks::<32>().0);
        let mut lines = 0;
        for two in 0..LINES / 2 {
            let mut equal = [_mm256_setzero_si256(); 4];
            for (i, equal) in equal.iter_mut().enumerate() {
                let half = two * 4 + i;
                *equal = _mm256_cmpeq_epi8(load_half(&old[half]), load_half(&new[half]));
            }
            let all = _mm256_and_si256(_mm256_and_si256(equal[0], equal[1]), _mm256_and_si256(equal[2], equal[3]));
            if _mm256_movemask_epi8(all) == -1 {
                continue;
            }
            for i in 0..2 {
                let line = two * 2 + i;
                let low = u64::from(!_mm256_movemask_epi8(equal[2 * i]) as u32);
                let high = u64::from(!_mm256_movemask_epi8(equal[2 * i + 1]) as u32);
                masks[line] = low | high << 32;
                lines |= u64::from(masks[line] != 0) << line;
            }
        }
        lines
    }

    #[target_feature(enable = "avx512f,avx512dq,bmi1")]
    pub(super) fn bring_up_avx512(old: &mut Page, new: &Page, mut lines: u64) -> u64 {
        let (old, new) = (old.as_chunks_mut::<LINE_BYTES>().0, new.as_chunks::<LINE_BYTES>().0);
        let weights = weight_lines();
        let mut change = _mm512_setzero_si512();
        while lines != 0 {
            let line = lines.trailing_zeros() as usize % LINES;
            lines &= lines - 1;
            let by = _mm512_sub_epi64(load_line(&new[line]), load_line(&old[line]));
            change = _mm512_add_epi64(change, _mm512_mullo_epi64(by, load_words(&weights[line])));
            old[line] = new[line];
        }
        _mm512_reduce_add_epi64(change) as u64
    }

    #[target_feature(enable = "avx512f,avx512dq")]
    pub(super) fn page_sum_avx512(page: &Page) -> u64 {
        let (lines, weights) = (page.as_chunks::<LINE_BYTES>().0, weight_lines());
        let mut sums = [_mm512_setzero_si512(); 4];
        for four in 0..LINES / 4 {
            for (i, sum) in sums.iter_mut().enumerate() {
                let line = four * 4 + i;
                *sum = _mm512_add_epi64(*sum, _mm512_mullo_epi64(load_line(&lines[line]), load_words(&weights[line])));
            }
        }
        let sums = [_mm512_add_epi64(sums[0], sums[1]), _mm512_add_epi64(sums[2], sums[3])];
        _mm512_reduce_add_epi64(_mm512_add_epi64(sums[0], sums[1])) as u64
    }

    pub(super) fn has_avx512_vbmi2() -> bool {
        has_avx512()
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vbmi")
            && is_x86_feature_detected!("avx512vbmi2")
            && is_x86_feature_detected!("bmi2")
            && is_x86_feature_detected!("popcnt")
    }

    /// The low 4 bits of each byte.
    const NIBBLES: u64 = 0x0f0f_0f0f_0f0f_0f0f;

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,bmi1,bmi2,popcnt")]
    pub(super) fn write_words_avx512(page: &Page, table: &mut Table, out: PageRoom<'_>) -> (usize, usize) {
        let values = AS_VALUE.as_chunks::<LINE_BYTES>().0;
        let values = [load_line(&values[0]), load_line(&values[1]), load_line(&values[2]), load_line(&values[3])];
        let (near_entry, literal_bytes) = (load_16(&near_entry()), load_16(&LITERAL_BYTES));
        let (mut index, mut literal) = (0, 0);
        for (line, tags) in page.as_chunks::<LINE_BYTES>().0.iter().zip(out.tags.as_chunks_mut::<4>().0) {
            let words = load_line(line);
            if _mm512_test_epi64_mask(words, words) == 0 {
                table[0] = 0;
                *tags = [0; 4];
                continue;
            }
            let slots = slots(words);
            let former = entries(table, slots);
            remember(table, slots, line);
            let differs = _mm512_xor_si512(words, former);
            // Of each word a byte: which of its bytes are not zero, and which differ.
            let used = bytes_of(_mm512_test_epi8_mask(words, words));
            let near = bytes_of(_mm512_test_epi8_mask(differs, differs));
            let near = _mm_shuffle_epi8(near_entry, _mm_min_epu8(near, _mm_set1_epi8(NEAR_ENTRY.len() as i8 - 1)));
            let wide = _mm512_castsi128_si512(used);
            let low = _mm512_castsi512_si128(_mm512_permutex2var_epi8(values[0], wide, values[1]));
            let high = _mm512_castsi512_si128(_mm512_permutex2var_epi8(values[2], wide, values[3]));
            let value = _mm_mask_blend_epi8(_mm_movepi8_mask(used), low, high);
            let tag = _mm_and_si128(_mm_min_epu8(near, value), _mm_set1_epi8(15));
            *tags = (_pext_u64(low_8(tag), NIBBLES) as u32).to_le_bytes();

            let of_entry = is_entry(tag);
            let taken = _mm_maskz_compress_epi8(of_entry, bytes_of(slots));
            out.indexes[index..index + LINE_WORDS].copy_from_slice(&low_8(taken).to_le_bytes());
            index += of_entry.count_ones() as usize;

            let literals = low_8(_mm_shuffle_epi8(literal_bytes, tag));
            let bytes = _mm512_mask_sub_epi64(words, of_entry as u8, words, former);
            let bytes = _mm512_maskz_compress_epi8(literals, bytes);
            store_line(&mut out.literals[literal..], bytes);
            literal += literals.count_ones() as usize;
        }
        (index, literal)
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,bmi1,bmi2,popcnt")]
    pub(super) fn read_words_avx512(page: &mut Page, table: &mut Table, from: PageStreams<'_>) -> (usize, usize) {
        let PageStreams { tags, indexes, literals } = from;
        let (literal_bytes, entry_bytes) = (load_16(&LITERAL_BYTES), load_16(&ENTRY_BYTES));
        let (mut index, mut literal) = (0, 0);
        for (line, tags) in page.as_chunks_mut::<LINE_BYTES>().0.iter_mut().zip(tags.as_chunks().0) {
            let tags = u32::from_le_bytes(*tags);
            if tags == 0 {
                table[0] = 0;
                *line = [0; LINE_BYTES];
                continue;
            }
            let tag = bytes_of(_pdep_u64(u64::from(tags), NIBBLES));
            let of_entry = is_entry(tag);
            let taken = indexes[index..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
            let taken = _mm_maskz_expand_epi8(of_entry, bytes_of(taken));
            index += of_entry.count_ones() as usize;

            let literal_bytes = low_8(_mm_shuffle_epi8(literal_bytes, tag));
            let bytes =
                literals[literal..].first_chunk().map_or_else(|| _mm512_setzero_si512(), |line| load_line(line));
            let bytes = _mm512_maskz_expand_epi8(literal_bytes, bytes);
            literal += literal_bytes.count_ones() as usize;
            // Known before the table is read: lines wait for what they need from former ones, not for where it is.
            let slots = low_8(_mm_mask_blend_epi8(of_entry, bytes_of(slots(bytes)), taken));
            let former = entries(table, low_8(taken));
            let words = _mm512_mask_add_epi64(bytes, of_entry as u8, bytes, former);
            let words = _mm512_mask_mov_epi8(words, low_8(_mm_shuffle_epi8(entry_bytes, tag)), former);
            store_line(line, words);
            remember(table, slots, line);
        }
        (index, literal)
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,bmi1")]
    pub(super) fn equal_bytes_avx512(page: &Page, stride: usize) -> u32 {
        let line = |at: usize| page[at..].first_chunk().expect("within the page");
        let mut equal = 0;
        for at in JUDGED_LINES.map(|line| line * LINE_BYTES) {
            equal += _mm512_cmpeq_epi8_mask(load_line(line(at)), load_line(line(at - stride))).count_ones();
        }
        equal
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,bmi1,bmi2,popcnt")]
    pub(super) fn write_records_avx512(window: &[u8; WINDOW_BYTES], stride: usize, out: PageRecords<'_>) -> Taken {
        let old = window[STRIDE_MAX - stride..].first_chunk::<PAGE_SIZE>().expect("strides are that long at most");
        let new = window.last_chunk::<PAGE_SIZE>().expect("a page and more");
        let (mut lines, mut mask_at, mut literal) = (0, 0, 0);
        for (line, (old, new)) in old.as_chunks().0.iter().zip(new.as_chunks().0).enumerate() {
            let (old, new) = (load_line(old), load_line(new));
            let mask = _mm512_cmpneq_epi8_mask(old, new);
            if mask == 0 {
                continue;
            }
            lines |= 1 << line;
            out.masks[mask_at..mask_at + 8].copy_from_slice(&mask.to_le_bytes());
            mask_at += 8;
            store_line(&mut out.literals[literal..], _mm512_maskz_compress_epi8(mask, _mm512_sub_epi8(new, old)));
            literal += mask.count_ones() as usize;
        }
        (lines, literal)
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,bmi1,bmi2,popcnt")]
    pub(super) fn read_records_avx512(
        window: &mut [u8; WINDOW_BYTES],
        stride: usize,
        lines: u64,
        masks: &[[u8; 8]],
        mut literals: &[u8],
    ) {
        let mut masks = masks.iter();
        for line in 0..LINES {
            let at = STRIDE_MAX + line * LINE_BYTES;
            let mut bytes =
                window[at - stride..].first_chunk().map_or_else(|| _mm512_setzero_si512(), |line| load_line(line));
            if lines >> line & 1 != 0 {
                let mask = masks.next().map_or(0, |mask| u64::from_le_bytes(*mask));
                let by = literals.first_chunk().map_or_else(|| _mm512_setzero_si512(), |line| load_line(line));
                bytes = _mm512_add_epi8(bytes, _mm512_maskz_expand_epi8(mask, by));
                literals = literals.get(mask.count_ones() as usize..).unwrap_or_default();
            }
            store_line(&mut window[at..], bytes);
        }
    }

    /// Where each word goes in the table, a byte each.
    #[target_feature(enable = "avx512f,avx512dq")]
    fn slots(words: __m512i) -> u64 {
        let hashes = _mm512_mullo_epi64(_mm512_srli_epi64::<16>(words), _mm512_set1_epi64(HASH as i64));
        low_8(_mm512_cvtepi64_epi8(_mm512_srli_epi64::<56>(hashes)))
    }

    #[target_feature(enable = "avx512f")]
    fn entries(table: &Table, slots: u64) -> __m512i {
        let [a, b, c, d, e, f, g, h] = slots.to_le_bytes().map(|slot| table[usize::from(slot)] as i64);
        _mm512_set_epi64(h, g, f, e, d, c, b, a)
    }

    #[inline(always)]
    fn remember(table: &mut Table, slots: u64, line: &Line) {
        for (slot, word) in slots.to_le_bytes().into_iter().zip(line.as_chunks::<8>().0) {
            table[usize::from(slot)] = u64::from_le_bytes(*word);
        }
    }

    #[target_feature(enable = "avx512bw,avx512vl")]
    fn is_entry(tag: __m128i) -> __mmask16 {
        _mm_cmpgt_epi8_mask(tag, _mm_set1_epi8(ENTRY as i8 - 1))
    }

    const fn near_entry() -> [u8; 16] {
        let mut padded = [0; 16];
        let mut at = 0;
        while at < NEAR_ENTRY.len() {
            padded[at] = NEAR_ENTRY[at];
            at += 1;
        }
        padded
    }

    #[target_feature(enable = "sse2")]
    fn bytes_of(word: u64) -> __m128i {
        _mm_cvtsi64_si128(word as i64)
    }

    #[target_feature(enable = "sse2")]
    fn low_8(bytes: __m128i) -> u64 {
        _mm_cvtsi128_si64(bytes) as u64
    }

    #[target_feature(enable = "sse2")]
    fn load_16(bytes: &[u8; 16]) -> __m128i {
        // SAFETY: it is 16 bytes, and this load needs no alignment.
        unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
    }

    /// The first line of these bytes becomes this.
    #[target_feature(enable = "avx512f")]
    fn store_line(to: &mut [u8], line: __m512i) {
        let to = &mut to[..LINE_BYTES];
        // SAFETY: it is 64 bytes, and this store needs no alignment.
        unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), line) };
    }

    #[target_feature(enable = "avx512f")]
    fn load_line(line: &Line) -> __m512i {
        // SAFETY: a line is 64 bytes, and this load needs no alignment.
        unsafe { _mm512_loadu_si512(line.as_ptr().cast()) }
    }

    #[target_feature(enable = "avx512f")]
    fn load_words(words: &[u64; 8]) -> __m512i {
        // SAFETY: 8 words are 64 bytes, and this load needs no alignment.
        unsafe { _mm512_loadu_si512(words.as_ptr().cast()) }
    }

    #[target_feature(enable = "avx2")]
    fn load_half(half: &[u8; 32]) -> __m256i {
        // SAFETY: it is 32 bytes, and this load needs no alignment.
        unsafe { _mm256_loadu_si256(half.as_ptr().cast()) }
    }
}

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
