//! Whole pages as records: rows of a database's tables, entries of its indexes, arrays of structures. Of each byte stands there by
//! how much it differs from the one a record before it, and most do not. zstd then packs a quarter of the bytes or less, which it
//! would have found to repeat as well, in several times the time.
//!
//! ```text
//! strides   1 byte a page: length of its records in words of 8 bytes, 8 to 64
//! lines     u64 a page: one bit for each of its lines of 64 bytes that differs from what is a stride before it
//! masks     u64 for each of these lines: one bit for each byte that differs
//! literals  1 byte for each of those: the difference, modulo 2^8
//! ```
//! A frame's pages follow one another, so that the beginning of a page differs from the end of the page before; before the
//! first one all is zero. Records that are shorter than a line count as several: a line never differs from a part
//! of itself, and vectors code it at once ([`super::simd`]).

use std::cmp::Reverse;

use super::simd::{self, LINE_BYTES, LINES};
use crate::bytes::Put;
use crate::units::{PAGE_SIZE, Page};

/// Longest stride, bytes; so much before a page its lines may differ from.
pub(super) const STRIDE_MAX: usize = 512;
/// Shortest stride, bytes.
pub(super) const STRIDE_MIN: usize = LINE_BYTES;
/// A page with as much before it as its lines may differ from.
pub(super) const WINDOW_BYTES: usize = STRIDE_MAX + PAGE_SIZE;
/// Bytes of a page's stride and lines.
pub(super) const HEAD_PAGE_BYTES: usize = 1 + 8;
/// Most bytes of a page's masks.
pub(super) const MASKS_PAGE_MAX: usize = LINES * 8;
/// Room for a page's literals: a whole line is read and written beside the last one.
pub(super) const LITERALS_ROOM: usize = PAGE_SIZE + LINE_BYTES;

/// Strides that are tried, as words: records are mostly short, and where all have one length a multiple of it will do.
const CANDIDATES: [u8; 29] =
    [8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 40, 48, 56, 64];
/// Lines that are looked at to judge a page: not all at one place of records of 128, 192 or 256 bytes.
pub(super) const JUDGED_LINES: [usize; 8] = [8, 15, 22, 29, 36, 43, 50, 57];
/// Of the bytes of these lines so many must be equal to those a stride before them.
const EQUAL_LEAST: u32 = 360;
/// With so many it is not worth it to look for a better stride than that of the page before.
const EQUAL_MOST: u32 = 448;

/// The bytes that a stride's byte stands for, if it may stand there.
fn stride_bytes(words: u8) -> Option<usize> {
    let bytes = usize::from(words) * 8;
    (STRIDE_MIN..=STRIDE_MAX).contains(&bytes).then_some(bytes)
}

/// Where a page's streams are written to.
pub(super) struct PageRoom<'a> {
    pub(super) masks: &'a mut [u8; MASKS_PAGE_MAX],
    pub(super) literals: &'a mut [u8; LITERALS_ROOM],
}

/// What a page took: one bit for each line with a mask, and how many literals.
pub(super) type Taken = (u64, usize);

/// Collects pages.
pub(super) struct RecordWriter {
    window: [u8; WINDOW_BYTES],
    strides: Vec<u8>,
    lines: Vec<u8>,
    masks: Vec<u8>,
    literals: Vec<u8>,
    masks_len: usize,
    literals_len: usize,
    /// Of the page that was judged last, in words.
    last: u8,
}

impl Default for RecordWriter {
    fn default() -> Self {
        let (strides, lines, masks, literals) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let window = [0; WINDOW_BYTES];
        Self { window, strides, lines, masks, literals, masks_len: 0, literals_len: 0, last: CANDIDATES[0] }
    }
}

impl RecordWriter {
    /// The stride of the page's records, in words; `None`: it has no such.
    pub(super) fn judge(&mut self, page: &Page) -> Option<u8> {
        let equal = |words: u8| simd::equal_bytes(page, usize::from(words) * 8);
        if equal(self.last) < EQUAL_MOST {
            // Of those that do as well the shortest.
            let judged = CANDIDATES.map(|words| (equal(words), Reverse(words)));
            let (most, Reverse(best)) = judged.into_iter().max()?;
            if most < EQUAL_LEAST {
                return None;
            }
            self.last = best;
        }
        Some(self.last)
    }

    /// `stride`: as it was judged.
    pub(super) fn push(&mut self, page: &Page, stride: u8) {
        self.window.copy_within(PAGE_SIZE.., 0);
        self.window[STRIDE_MAX..].copy_from_slice(page);
        let room = PageRoom {
            masks: super::room(&mut self.masks, self.masks_len),
            literals: super::room(&mut self.literals, self.literals_len),
        };
        let (lines, literals) = simd::write_records(&self.window, usize::from(stride) * 8, room);
        self.strides.push(stride);
        self.lines.put_u64(lines);
        self.masks_len += 8 * lines.count_ones() as usize;
        self.literals_len += literals;
    }

    /// Strides, lines, masks, literals.
    pub(super) fn streams(&self) -> [&[u8]; 4] {
        [&self.strides, &self.lines, &self.masks[..self.masks_len], &self.literals[..self.literals_len]]
    }

    pub(super) fn clear(&mut self) {
        self.window.fill(0);
        self.strides.clear();
        self.lines.clear();
        (self.masks_len, self.literals_len) = (0, 0);
    }
}

/// Bytes after the literals that [`read`] may look at.
pub(super) const PADDING: [u8; LINE_BYTES] = [0; LINE_BYTES];

/// Reads pages from their streams, which stand one after the other and are padded; `None`: they do not add up. The pages
/// stand in `bytes` behind [`STRIDE_MAX`] zeros; what was there does not matter.
pub(super) fn read(bytes: &mut [u8], streams: &[u8], masks_len: usize) -> Option<()> {
    let pages = bytes.len().checked_sub(STRIDE_MAX)? / PAGE_SIZE;
    let (strides, rest) = streams.split_at_checked(pages)?;
    let (lines, rest) = rest.split_at_checked(pages * 8)?;
    let (masks, mut literals) = rest.split_at_checked(masks_len)?;
    let (mut masks, odd) = masks.as_chunks::<8>();
    if !odd.is_empty() {
        return None;
    }
    bytes[..STRIDE_MAX].fill(0);
    for (page, (stride, lines)) in strides.iter().zip(lines.as_chunks().0).enumerate() {
        let (stride, lines) = (stride_bytes(*stride)?, u64::from_le_bytes(*lines));
        let of_page;
        (of_page, masks) = masks.split_at_checked(lines.count_ones() as usize)?;
        let taken: usize = of_page.iter().map(|mask| u64::from_le_bytes(*mask).count_ones() as usize).sum();
        // With the line beside them.
        if literals.len() < taken + LINE_BYTES {
            return None;
        }
        let window = bytes[page * PAGE_SIZE..].first_chunk_mut()?;
        simd::read_records(window, stride, lines, of_page, literals);
        literals = &literals[taken..];
    }
    (masks.is_empty() && literals.len() == PADDING.len()).then_some(())
}

/// The reference of [`simd::equal_bytes`].
pub(super) fn equal_portable(page: &Page, stride: usize) -> u32 {
    let line = |at: usize| page[at..].first_chunk::<LINE_BYTES>().expect("within the page");
    let equal = |at: &usize| simd::line_mask(line(at * LINE_BYTES), line(at * LINE_BYTES - stride)).count_zeros();
    JUDGED_LINES.iter().map(equal).sum()
}

/// The reference of [`simd::write_records`].
pub(super) fn write_portable(window: &[u8; WINDOW_BYTES], stride: usize, out: PageRoom<'_>) -> Taken {
    let (mut lines, mut mask_at, mut literal) = (0u64, 0, 0);
    for line in 0..LINES {
        let at = STRIDE_MAX + line * LINE_BYTES;
        let (new, old) = (&window[at..at + LINE_BYTES], &window[at - stride..at - stride + LINE_BYTES]);
        if new == old {
            continue;
        }
        let mut mask = 0u64;
        for (byte, (new, old)) in new.iter().zip(old).enumerate() {
            if new != old {
                mask |= 1 << byte;
                out.literals[literal] = new.wrapping_sub(*old);
                literal += 1;
            }
        }
        lines |= 1 << line;
        out.masks[mask_at..mask_at + 8].copy_from_slice(&mask.to_le_bytes());
        mask_at += 8;
    }
    (lines, literal)
}

/// The reference of [`simd::read_records`].
pub(super) fn read_portable(
    window: &mut [u8; WINDOW_BYTES],
    stride: usize,
    lines: u64,
    masks: &[[u8; 8]],
    literals: &[u8],
) {
    let (mut masks, mut literals) = (masks.iter(), literals.iter());
    for line in 0..LINES {
        let at = STRIDE_MAX + line * LINE_BYTES;
        window.copy_within(at - stride..at - stride + LINE_BYTES, at);
        if lines >> line & 1 == 0 {
            continue;
        }
        let mut mask = masks.next().map_or(0, |mask| u64::from_le_bytes(*mask));
        while mask != 0 {
            let byte = &mut window[at + mask.trailing_zeros() as usize];
            *byte = byte.wrapping_add(literals.next().copied().unwrap_or_default());
            mask &= mask - 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The plainest code that follows the description: strides, lines, masks, literals.
    fn naive(pages: &[Page], strides: &[u8]) -> [Vec<u8>; 4] {
        let bytes = [&[0; STRIDE_MAX], pages.as_flattened()].concat();
        let (mut lines, mut masks, mut literals) = (Vec::new(), Vec::new(), Vec::new());
        for (page, stride) in strides.iter().enumerate() {
            let mut changed = 0u64;
            for line in 0..64 {
                let mut mask = 0u64;
                for byte in 0..64 {
                    let at = STRIDE_MAX + page * PAGE_SIZE + line * 64 + byte;
                    let by = bytes[at].wrapping_sub(bytes[at - usize::from(*stride) * 8]);
                    if by != 0 {
                        mask |= 1 << byte;
                        literals.push(by);
                    }
                }
                if mask != 0 {
                    changed |= 1 << line;
                    masks.put_u64(mask);
                }
            }
            lines.put_u64(changed);
        }
        [strides.to_vec(), lines, masks, literals]
    }

    /// What a CPU without vectors writes; it reads what it wrote.
    fn written_portably(pages: &[Page], strides: &[u8]) -> [Vec<u8>; 4] {
        let (mut lines, mut masks, mut literals) = (Vec::new(), Vec::new(), Vec::new());
        let mut window = [0; WINDOW_BYTES];
        for (page, stride) in pages.iter().zip(strides) {
            window.copy_within(PAGE_SIZE.., 0);
            window[STRIDE_MAX..].copy_from_slice(page);
            let (mut m, mut l) = ([1; MASKS_PAGE_MAX], [1; LITERALS_ROOM]);
            let room = PageRoom { masks: &mut m, literals: &mut l };
            let (changed, taken) = write_portable(&window, usize::from(*stride) * 8, room);
            let m = &m[..8 * changed.count_ones() as usize];
            let mut read = window;
            read[STRIDE_MAX..].fill(7);
            read_portable(&mut read, usize::from(*stride) * 8, changed, m.as_chunks().0, &l);
            assert!(read == window);
            lines.put_u64(changed);
            masks.extend_from_slice(m);
            literals.extend_from_slice(&l[..taken]);
        }
        [strides.to_vec(), lines, masks, literals]
    }

    fn padded(streams: [&[u8]; 4]) -> Vec<u8> {
        [streams[0], streams[1], streams[2], streams[3], &PADDING].concat()
    }

    /// Records of this length that count up, with some bytes written over.
    fn page(record: usize, from: u8, writes: &[(usize, u8)]) -> Page {
        let mut page: Page = std::array::from_fn(|at| match at % record {
            0 => from.wrapping_add((at / record) as u8),
            other => other as u8,
        });
        writes.iter().for_each(|(at, byte)| page[*at] = *byte);
        page
    }

    proptest! {
        #[test]
        fn pages_come_back_and_streams_are_those_of_the_naive_code(
            pages in prop::collection::vec(
                (1usize..300, any::<u8>(), prop::collection::vec((0..PAGE_SIZE, any::<u8>()), 0..100), 8u8..=64), 1..6),
        ) {
            let strides: Vec<u8> = pages.iter().map(|page| page.3).collect();
            let pages: Vec<Page> = pages.iter().map(|(record, from, writes, _)| page(*record, *from, writes)).collect();
            let mut writer = RecordWriter::default();
            for _ in 0..2 {
                writer.clear();
                pages.iter().zip(&strides).for_each(|(page, stride)| writer.push(page, *stride));
                let wanted = naive(&pages, &strides);
                prop_assert_eq!(writer.streams().map(<[u8]>::to_vec), wanted.clone());
                prop_assert_eq!(written_portably(&pages, &strides), wanted);
                let mut bytes = vec![7; STRIDE_MAX + pages.len() * PAGE_SIZE];
                let masks_len = writer.streams()[2].len();
                let streams = padded(writer.streams());
                prop_assert_eq!(read(&mut bytes, &streams, masks_len), Some(()));
                prop_assert!(&bytes[STRIDE_MAX..] == pages.as_flattened());
                prop_assert_eq!(read(&mut bytes, &streams[..streams.len() - 1], masks_len), None);
            }
        }

        #[test]
        fn noise_is_refused_or_read_everywhere_the_same_and_never_a_panic(
            noise in prop::collection::vec(any::<u8>(), 0..6000), stride in any::<u8>(), lines in any::<u64>(),
            masks_len in 0usize..1200,
        ) {
            let streams = [&[stride, stride], &lines.to_le_bytes()[..], &noise, &PADDING].concat();
            for skipped in [0, 1, 40, streams.len()] {
                let _ = read(&mut [9; STRIDE_MAX + 2 * PAGE_SIZE], streams.get(skipped..).unwrap_or_default(), masks_len);
            }
            let (masks, literals) = noise.split_at(noise.len().min(MASKS_PAGE_MAX));
            let literals = [literals, &[0; LITERALS_ROOM]].concat();
            let stride = usize::from(stride.clamp(8, 64)) * 8;
            let mut found = [[3; WINDOW_BYTES]; 2];
            read_portable(&mut found[0], stride, lines, masks.as_chunks().0, &literals);
            simd::read_records(&mut found[1], stride, lines, masks.as_chunks().0, &literals);
            prop_assert!(found[0] == found[1]);
        }

        #[test]
        fn judging_is_the_same_everywhere(record in 1usize..600, writes in prop::collection::vec((0..PAGE_SIZE, any::<u8>()), 0..400)) {
            let page = page(record, 0, &writes);
            for stride in CANDIDATES.map(|words| usize::from(words) * 8) {
                prop_assert_eq!(simd::equal_bytes(&page, stride), equal_portable(&page, stride));
            }
        }
    }

    #[test]
    fn records_are_told_from_text() {
        let mut writer = RecordWriter::default();
        assert_eq!(writer.judge(&page(128, 0, &[])), Some(16));
        assert_eq!(writer.judge(&page(24, 0, &[])), Some(9));
        assert_eq!(writer.judge(&page(264, 0, &[])), None, "a record of so many words is not tried");
        assert_eq!(writer.judge(&page(144, 0, &[])), Some(18));
        let text: Page = include_bytes!("records.rs")[..PAGE_SIZE].try_into().unwrap();
        assert_eq!(writer.judge(&text), None);
        assert_eq!(writer.judge(&page(144, 0, &[])), Some(18));
    }
}
