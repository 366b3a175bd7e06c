//! What changed in a page, as runs of bytes.
//!
//! ```text
//! run, in the stream of runs:  varint bytes since the end of the run before (or since the page's start)
//!                              varint (length - 1) * 2 + (1 if another run of this page follows)
//! its bytes, in the stream of data: the new contents
//! ```
//! A varint has 7 bits a byte, low ones first; both values fit in two for a page, in four for a device state. Runs
//! replace bytes, they are not XORed onto them: applying the same runs again, or onto contents that have a part of them
//! already, leads to the same page. The staging journal rests on that. So a run may hold bytes that did not change;
//! runs of a page that changed much are *coarse*: they go on over up to 31 of such bytes.
//!
//! Which bytes differ is found by [`super::simd`].

use std::ops::Range;

use super::simd::{ByteMasks, LINE_BYTES, LINES, bring_up, changed_bytes, line_mask};
use crate::units::{PAGE_SIZE, Page};

/// Unchanged bytes between two runs that are not worth another run's header.
const MERGE_GAP_BYTES: usize = 3;
/// The same where much changed: few long runs are coded faster than many short ones, and zstd does better on them.
const COARSE_GAP_BYTES: usize = 31;
/// Changed bytes of a page from which on runs are coarse.
const COARSE_FROM_BYTES: usize = 1024;

const QUARTER_BYTES: usize = LINE_BYTES / 4;

/// How a page compares with its previous contents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Difference {
    None,
    /// They were collected.
    Sparse,
    /// Too many.
    Dense,
}

/// Room in which the changes of one page are collected; kept from page to page.
pub(super) struct PatchRoom {
    masks: ByteMasks,
    runs: [u8; RUNS_ROOM],
    data: [u8; PAGE_SIZE + SHORT_COPY],
    runs_len: usize,
    data_len: usize,
}

/// Of runs, which are cut off at the end of the line where changes exceed their limit.
const RUNS_ROOM: usize = PAGE_SIZE + LINE_BYTES * 2;
/// Bytes that are copied at once, whether a run has so many or fewer.
const SHORT_COPY: usize = 16;

impl Default for PatchRoom {
    fn default() -> Self {
        Self { masks: [0; LINES], runs: [0; RUNS_ROOM], data: [0; PAGE_SIZE + SHORT_COPY], runs_len: 0, data_len: 0 }
    }
}

impl std::fmt::Debug for PatchRoom {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PatchRoom").finish_non_exhaustive()
    }
}

impl PatchRoom {
    /// Brings `old` to `new`, keeps its sum right, and collects what changed unless that takes more than `limit` bytes.
    pub(super) fn advance(&mut self, old: &mut Page, new: &Page, sum: &mut u64, limit: usize) -> Difference {
        let lines = changed_bytes(old, new, &mut self.masks);
        if lines == 0 {
            return Difference::None;
        }
        *sum = sum.wrapping_add(bring_up(old, new, lines));
        let limit = limit.min(PAGE_SIZE);
        let (changed, touched) = self.extent(lines);
        let fine = limit.min(COARSE_FROM_BYTES);
        let collected = changed <= COARSE_FROM_BYTES && self.collect(new, lines, fine, MERGE_GAP_BYTES)
            || touched <= limit && limit > COARSE_FROM_BYTES && self.collect(new, lines, limit, COARSE_GAP_BYTES);
        if collected { Difference::Sparse } else { Difference::Dense }
    }

    /// Bytes that changed, and bytes of those quarters of lines that have any of them: about what coarse runs take.
    fn extent(&self, mut lines: u64) -> (usize, usize) {
        let (mut changed, mut quarters) = (0, 0);
        while lines != 0 {
            let mask = self.masks[lines.trailing_zeros() as usize % LINES];
            lines &= lines - 1;
            changed += mask.count_ones();
            let two = mask | mask >> 1;
            let four = two | two >> 2;
            let eight = four | four >> 4;
            quarters += ((eight | eight >> 8) & 0x0001_0001_0001_0001).count_ones();
        }
        (changed as usize, quarters as usize * QUARTER_BYTES)
    }

    /// Runs of the page that was collected last.
    pub(super) fn runs(&self) -> &[u8] {
        &self.runs[..self.runs_len]
    }

    /// Their bytes.
    pub(super) fn data(&self) -> &[u8] {
        &self.data[..self.data_len]
    }

    fn collect(&mut self, new: &Page, mut lines: u64, limit: usize, gap: usize) -> bool {
        (self.runs_len, self.data_len) = (0, 0);
        let (mut closed_at, mut open) = (0, None);
        while lines != 0 {
            let line = lines.trailing_zeros() as usize % LINES;
            lines &= lines - 1;
            let mut mask = self.masks[line];
            while mask != 0 {
                let first = mask.trailing_zeros() as usize;
                // Carries through the run of ones.
                let rest = mask.wrapping_add(mask & mask.wrapping_neg());
                let end = if rest == 0 { LINE_BYTES } else { rest.trailing_zeros() as usize };
                mask &= rest;
                let (start, end) = (line * LINE_BYTES + first, line * LINE_BYTES + end);
                open = match open {
                    Some((open_start, open_end)) if start - open_end <= gap => Some((open_start, end)),
                    Some((open_start, open_end)) => {
                        self.close(new, closed_at, open_start, open_end, true);
                        closed_at = open_end;
                        Some((start, end))
                    }
                    None => Some((start, end)),
                };
            }
            if self.runs_len + self.data_len > limit {
                return false;
            }
        }
        if let Some((start, end)) = open {
            self.close(new, closed_at, start, end, false);
        }
        self.runs_len + self.data_len <= limit
    }

    fn close(&mut self, new: &Page, closed_at: usize, start: usize, end: usize, more: bool) {
        let len = end - start;
        self.put(start - closed_at);
        self.put((len - 1) * 2 + usize::from(more));
        let to = &mut self.data[self.data_len..];
        if len <= SHORT_COPY && start + SHORT_COPY <= PAGE_SIZE {
            to[..SHORT_COPY].copy_from_slice(&new[start..start + SHORT_COPY]);
        } else {
            to[..len].copy_from_slice(&new[start..end]);
        }
        self.data_len += len;
    }

    /// A varint of at most two bytes: [`put_varint`].
    fn put(&mut self, value: usize) {
        let long = usize::from(value >= 0x80);
        let bytes = [(value & 0x7f | long << 7) as u8, (value >> 7) as u8];
        self.runs[self.runs_len..self.runs_len + 2].copy_from_slice(&bytes);
        self.runs_len += 1 + long;
    }
}

/// Appends what changed between byte strings of one length, unless that takes more than `limit` bytes.
pub(super) fn compare(old: &[u8], new: &[u8], limit: usize, runs: &mut Vec<u8>, data: &mut Vec<u8>) -> Difference {
    debug_assert_eq!(old.len(), new.len());
    if old == new {
        return Difference::None;
    }
    let mut writer = RunWriter::new(runs, data, new, limit);
    let ((old, old_tail), (new, new_tail)) = (old.as_chunks(), new.as_chunks());
    for (line, (old, new)) in old.iter().zip(new).enumerate() {
        if old != new {
            writer.line(line * LINE_BYTES, line_mask(old, new));
        }
        if writer.full {
            break;
        }
    }
    let padded = |tail: &[u8]| {
        let mut line = [0; LINE_BYTES];
        line[..tail.len()].copy_from_slice(tail);
        line
    };
    writer.line(old.len() * LINE_BYTES, line_mask(&padded(old_tail), &padded(new_tail)));
    writer.finish()
}

/// Collects runs; the last one stays open until it is known whether another follows.
struct RunWriter<'a> {
    runs: &'a mut Vec<u8>,
    data: &'a mut Vec<u8>,
    bytes: &'a [u8],
    limit: usize,
    runs_start: usize,
    data_start: usize,
    /// End of the last closed run.
    closed_at: usize,
    open: Option<(usize, usize)>,
    full: bool,
}

impl<'a> RunWriter<'a> {
    fn new(runs: &'a mut Vec<u8>, data: &'a mut Vec<u8>, bytes: &'a [u8], limit: usize) -> Self {
        let (runs_start, data_start) = (runs.len(), data.len());
        Self { runs, data, bytes, limit, runs_start, data_start, closed_at: 0, open: None, full: false }
    }

    /// Changed bytes of the line that begins at `at`.
    fn line(&mut self, at: usize, mut mask: u64) {
        while mask != 0 {
            let first = mask.trailing_zeros() as usize;
            let len = (mask >> first).trailing_ones() as usize;
            mask &= u64::MAX.checked_shl((first + len) as u32).unwrap_or(0);
            let (start, end) = (at + first, at + first + len);
            match &mut self.open {
                Some((_, open_end)) if start - *open_end <= MERGE_GAP_BYTES => *open_end = end,
                open => {
                    if let Some((open_start, open_end)) = open.replace((start, end)) {
                        self.close(open_start, open_end, true);
                    }
                }
            }
        }
        self.full = self.runs.len() - self.runs_start + self.data.len() - self.data_start > self.limit;
    }

    fn close(&mut self, start: usize, end: usize, more: bool) {
        put_varint(self.runs, start - self.closed_at);
        put_varint(self.runs, (end - start - 1) * 2 + usize::from(more));
        self.data.extend_from_slice(&self.bytes[start..end]);
        self.closed_at = end;
    }

    fn finish(mut self) -> Difference {
        if let Some((start, end)) = self.open.take() {
            self.close(start, end, false);
        }
        if self.runs.len() - self.runs_start + self.data.len() - self.data_start > self.limit {
            self.runs.truncate(self.runs_start);
            self.data.truncate(self.data_start);
            return Difference::Dense;
        }
        Difference::Sparse
    }
}

/// Appends a value, 7 bits a byte, low ones first.
pub(super) fn put_varint(out: &mut Vec<u8>, mut value: usize) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Reads a value in its shortest form and at most `max_bytes` (5 or less).
#[inline]
pub(super) fn take_varint(bytes: &mut &[u8], max_bytes: usize) -> Option<usize> {
    // Most are of one byte.
    if max_bytes > 0
        && let [value @ ..0x80, rest @ ..] = *bytes
    {
        *bytes = rest;
        return Some(usize::from(*value));
    }
    let mut value = 0;
    for (i, byte) in bytes.iter().take(max_bytes).enumerate() {
        value |= usize::from(*byte & 0x7f) << (7 * i);
        if *byte < 0x80 {
            *bytes = &bytes[i + 1..];
            return (*byte != 0 || i == 0).then_some(value);
        }
    }
    None
}

/// Reads one run: the bytes skipped before it, its length, and whether another one follows.
#[inline]
fn take_run(runs: &mut &[u8], varint_bytes: usize) -> Option<(usize, usize, bool)> {
    // Both are mostly of one byte.
    if let [skip, len, rest @ ..] = *runs
        && skip | len < 0x80
    {
        *runs = rest;
        return Some((usize::from(*skip), usize::from(*len / 2) + 1, len % 2 == 1));
    }
    let skip = take_varint(runs, varint_bytes)?;
    let len = take_varint(runs, varint_bytes)?;
    Some((skip, len / 2 + 1, len % 2 == 1))
}

/// Longest varint in the runs of something that has so many bytes.
fn varint_bytes(len: usize) -> usize {
    if len <= PAGE_SIZE { 2 } else { 4 }
}

/// Takes the runs of one page off the front of `runs`, and their bytes off `data`: both as written, checked to stay
/// within a page and what there is; and one bit for each line of the page that they touch. `None`: they do not.
pub(super) fn take_page_runs<'a>(runs: &mut &'a [u8], data: &mut &'a [u8]) -> Option<(Patch<'a>, u64)> {
    let mut lines = 0;
    let patch = take_runs(runs, data, PAGE_SIZE, |run| {
        let (first, last) = (run.start / LINE_BYTES, (run.end - 1) / LINE_BYTES);
        lines |= u64::MAX << first & u64::MAX >> (LINES - 1 - last);
    })?;
    Some((patch, lines))
}

/// The same for a byte string of `len` bytes; `see` gets to know where each run goes.
pub(super) fn take_runs<'a>(
    runs: &mut &'a [u8],
    data: &mut &'a [u8],
    len: usize,
    mut see: impl FnMut(Range<usize>),
) -> Option<Patch<'a>> {
    let (runs_start, data_start) = (*runs, *data);
    let varint_bytes = varint_bytes(len);
    let (mut at, mut bytes) = (0, 0);
    loop {
        let (skip, run_len, more) = take_run(runs, varint_bytes)?;
        // A run that touches the one before would have been a part of it.
        if bytes > 0 && skip == 0 {
            return None;
        }
        let start = at + skip;
        at = start + run_len;
        bytes += run_len;
        if at > len {
            return None;
        }
        see(start..at);
        if !more {
            break;
        }
    }
    *data = data.get(bytes..)?;
    let runs = &runs_start[..runs_start.len() - runs.len()];
    Some(Patch { runs, data: &data_start[..bytes], varint_bytes })
}

/// Changes of one page, checked when they were decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patch<'a> {
    runs: &'a [u8],
    data: &'a [u8],
    varint_bytes: usize,
}

impl<'a> Patch<'a> {
    /// Of runs and data that [`take_page_runs`] took.
    pub(super) fn of_page(runs: &'a [u8], data: &'a [u8]) -> Self {
        Self { runs, data, varint_bytes: varint_bytes(PAGE_SIZE) }
    }

    /// Lengths of runs and data.
    pub(super) fn lengths(&self) -> (usize, usize) {
        (self.runs.len(), self.data.len())
    }

    /// Offsets within the page, ascending, and the bytes that belong there.
    pub fn runs(&self) -> impl Iterator<Item = (usize, &'a [u8])> + use<'a> {
        let (mut runs, mut data, mut at, varint_bytes) = (self.runs, self.data, 0, self.varint_bytes);
        std::iter::from_fn(move || {
            let (skip, len, _) = take_run(&mut runs, varint_bytes)?;
            let (bytes, rest) = data.split_at_checked(len)?;
            data = rest;
            let offset = at + skip;
            at = offset + len;
            Some((offset, bytes))
        })
    }

    /// Writes the changes into the previous contents.
    pub fn apply(&self, contents: &mut [u8]) {
        for (offset, bytes) in self.runs() {
            // Within them, as was checked when it was decoded.
            if let Some(to) = contents.get_mut(offset..offset + bytes.len()) {
                copy_short(to, bytes);
            }
        }
    }
}

/// Copies between slices of one length, most of them of a few bytes.
fn copy_short(to: &mut [u8], from: &[u8]) {
    match (to.first_chunk_mut::<8>(), from.first_chunk::<8>()) {
        // Both ends, which overlap.
        (Some(first), Some(bytes)) if from.len() <= 16 => {
            *first = *bytes;
            if let (Some(last), Some(bytes)) = (to.last_chunk_mut::<8>(), from.last_chunk::<8>()) {
                *last = *bytes;
            }
        }
        (Some(_), _) => to.copy_from_slice(from),
        (None, _) => to.iter_mut().zip(from).for_each(|(to, from)| *to = *from),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::sum::page_sum;
    use super::*;

    /// The reference: byte by byte.
    fn naive(old: &Page, new: &Page, gap: usize) -> (Vec<u8>, Vec<u8>) {
        let mut found: Vec<(usize, usize)> = Vec::new();
        for at in (0..PAGE_SIZE).filter(|at| old[*at] != new[*at]) {
            match found.last_mut() {
                Some((_, end)) if at - *end <= gap => *end = at + 1,
                _ => found.push((at, at + 1)),
            }
        }
        let (mut runs, mut data, mut last) = (Vec::new(), Vec::new(), 0);
        for (i, (start, end)) in found.iter().enumerate() {
            put_varint(&mut runs, start - last);
            put_varint(&mut runs, (end - start - 1) * 2 + usize::from(i + 1 < found.len()));
            data.extend_from_slice(&new[*start..*end]);
            last = *end;
        }
        (runs, data)
    }

    fn page(writes: &[(usize, Vec<u8>)], mut page: Page) -> Page {
        for (at, bytes) in writes {
            let end = (at + bytes.len()).min(PAGE_SIZE);
            page[*at..end].copy_from_slice(&bytes[..end - at]);
        }
        page
    }

    fn writes() -> impl Strategy<Value = Vec<(usize, Vec<u8>)>> {
        let bytes = prop_oneof![
            8 => prop::collection::vec(any::<u8>(), 1..20),
            1 => prop::collection::vec(any::<u8>(), 60..200),
            1 => Just(vec![7; PAGE_SIZE]),
        ];
        prop::collection::vec((0..PAGE_SIZE, bytes), 0..30)
    }

    /// Lines that a patch touches, byte by byte.
    fn touched(patch: &Patch<'_>) -> u64 {
        let bytes = patch.runs().flat_map(|(at, bytes)| at..at + bytes.len());
        bytes.fold(0, |lines, at| lines | 1 << (at / LINE_BYTES))
    }

    proptest! {
        #[test]
        fn runs_are_those_of_the_naive_code(first in writes(), then in writes(), limit in 0usize..4500) {
            let mut old = page(&first, [0; PAGE_SIZE]);
            let new = page(&then, old);
            let (base, mut sum) = (old, page_sum(&old));
            let mut room = PatchRoom::default();
            let mut other = [5; PAGE_SIZE];
            room.advance(&mut other, &base, &mut 0, limit);
            let difference = room.advance(&mut old, &new, &mut sum, limit);
            prop_assert_eq!(old, new);
            prop_assert_eq!(sum, page_sum(&new));
            let (mut naive_runs, mut naive_data) = naive(&base, &new, MERGE_GAP_BYTES);
            if naive_runs.len() + naive_data.len() > COARSE_FROM_BYTES && limit > COARSE_FROM_BYTES {
                (naive_runs, naive_data) = naive(&base, &new, COARSE_GAP_BYTES);
            }
            let limit = limit.min(PAGE_SIZE);
            match difference {
                Difference::None => prop_assert_eq!(base, new),
                Difference::Dense => {
                    let touched = base.chunks(QUARTER_BYTES).zip(new.chunks(QUARTER_BYTES)).filter(|(a, b)| a != b);
                    let touched = touched.count() * QUARTER_BYTES;
                    prop_assert!(naive_runs.len() + naive_data.len() > limit || touched > limit);
                }
                Difference::Sparse => {
                    let (mut runs, mut data) = (room.runs(), room.data());
                    prop_assert_eq!((runs, data), (&naive_runs[..], &naive_data[..]));
                    let (patch, lines) = take_page_runs(&mut runs, &mut data).unwrap();
                    prop_assert_eq!(lines, touched(&patch));
                    prop_assert!(runs.is_empty() && data.is_empty());
                    let mut patched = base;
                    patch.apply(&mut patched);
                    prop_assert_eq!(patched, new);
                    patch.apply(&mut patched);
                    prop_assert_eq!(patched, new, "again");
                }
            }
        }

        #[test]
        fn noise_is_taken_for_runs_only_within_the_page(
            noise in prop::collection::vec(any::<u8>(), 0..40), len in 0usize..5000,
        ) {
            let data = vec![1; len];
            let (mut runs, mut rest) = (&noise[..], &data[..]);
            if let Some((patch, lines)) = take_page_runs(&mut runs, &mut rest) {
                prop_assert_eq!(lines, touched(&patch));
                let found: Vec<_> = patch.runs().collect();
                prop_assert_eq!(found.iter().map(|(_, b)| b.len()).sum::<usize>(), patch.data.len());
                prop_assert!(found.last().is_some_and(|(at, bytes)| at + bytes.len() <= PAGE_SIZE));
            }
        }
    }

    #[test]
    fn every_single_byte_is_found() {
        for at in 0..PAGE_SIZE {
            let (mut old, mut new) = ([3; PAGE_SIZE], [3; PAGE_SIZE]);
            new[at] ^= 0x80;
            let (mut sum, mut room) = (page_sum(&old), PatchRoom::default());
            assert_eq!(room.advance(&mut old, &new, &mut sum, 64), Difference::Sparse);
            assert_eq!(Patch::of_page(room.runs(), room.data()).runs().collect::<Vec<_>>(), [(at, &new[at..=at])]);
        }
    }

    #[test]
    fn varints_have_one_form() {
        for value in [0, 1, 127, 128, 4095, 8191, 16_383, 16_384, (1 << 34) + 3] {
            let mut out = Vec::new();
            put_varint(&mut out, value);
            assert_eq!(take_varint(&mut &out[..], 5), Some(value));
            assert_eq!(take_varint(&mut &out[..], out.len() - 1), None);
        }
        for bad in [&[][..], &[0x80], &[0x80, 0], &[0xff, 0x80]] {
            assert_eq!(take_varint(&mut &bad[..], 5), None, "{bad:?}");
        }
    }
}
