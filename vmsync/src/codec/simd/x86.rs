//! The loops for x86: AVX-512, and AVX2 where that gains. What each of them needs stands above it; who calls it has looked.

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
        let bytes = first_line(&literals[literal..]);
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
        let mut bytes = first_line(&window[at - stride..]);
        if lines >> line & 1 != 0 {
            let mask = masks.next().map_or(0, |mask| u64::from_le_bytes(*mask));
            let by = first_line(literals);
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

/// The first line of these bytes; zeros if there are fewer.
#[target_feature(enable = "avx512f")]
fn first_line(bytes: &[u8]) -> __m512i {
    bytes.first_chunk().map_or_else(|| _mm512_setzero_si512(), |line| load_line(line))
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
