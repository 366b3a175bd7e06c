//! Whole pages as machine words: what heaps, page tables and a kernel's structures are made of. Most words are zero, small,
//! or like one that came before. Told apart so they are a fourth of the bytes, which zstd then packs in a fraction of the
//! time that it needs for the pages themselves.
//!
//! ```text
//! tags       4 bits a word, 8 words in a little-endian u32, 256 bytes a page
//! indexes    1 byte for each word with a tag of 1 to 4: which entry of the table
//! literals   the low bytes of words, as many as the tag says
//!
//! tag 0        zero
//!     1        the entry of the table
//!     2 3 4    the entry of the table, but for its low 2, 3 or 4 bytes
//!     5 6 7 8  the low 1, 2, 4 or 8 bytes; the others are zero
//! ```
//! The table has 256 entries, all zero at a frame's start. Every word then replaces the entry that it hashes to, which
//! depends on its upper 6 bytes; with a tag of 1 or 2 that is the entry that it was read from. The same code runs on every CPU.

use super::simd::{LINE_BYTES, LINES};
use crate::units::Page;

/// Bytes of tags a page.
pub(super) const TAGS_PAGE_BYTES: usize = LINES * 4;
/// Most indexes and literals of a page, bytes.
pub(super) const INDEXES_PAGE_MAX: usize = LINES * LINE_WORDS;
pub(super) const LITERALS_PAGE_MAX: usize = size_of::<Page>();

const LINE_WORDS: usize = LINE_BYTES / 8;
const LITERAL_BYTES: [u8; 16] = [0, 0, 2, 3, 4, 1, 2, 4, 8, 0, 0, 0, 0, 0, 0, 0];
const INDEX_BYTES: [u8; 16] = [0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
/// Bits that are those of the table's entry.
const OF_ENTRY: [u64; 16] = [0, !0, !0 << 16, !0 << 24, !0 << 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
/// Bits of the place in the table that are those of the entry's.
const AT_ENTRY: [usize; 16] = [0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
/// Bits that are those of the literals.
const OF_LITERAL: [u64; 16] =
    [0, 0, 0xffff, 0xff_ffff, 0xffff_ffff, 0xff, 0xffff, 0xffff_ffff, !0, 0, 0, 0, 0, 0, 0, 0];
/// The best tag for a word by the bytes that differ from the table's entry, and by those that are not zero above its low ones.
const TAGS: [[u8; 9]; 9] = tags();
/// One word of each line is looked at to judge a page. At most one in so many may have its upper bytes in use.
const FULL_WORDS_PART: u32 = 4;

const fn tags() -> [[u8; 9]; 9] {
    let by_entry = [(0, 1), (2, 2), (2, 2), (3, 3), (4, 4)];
    let by_value = [(0, 0), (1, 5), (2, 6), (4, 7), (4, 7), (8, 8), (8, 8), (8, 8), (8, 8)];
    let mut tags = [[0; 9]; 9];
    let mut differ = 0;
    while differ <= 8 {
        let mut used = 0;
        while used <= 8 {
            let (value_bytes, value_tag) = by_value[used];
            tags[differ][used] = value_tag;
            // An entry takes an index, too.
            if differ < by_entry.len() && by_entry[differ].0 + 1 < value_bytes {
                tags[differ][used] = by_entry[differ].1;
            }
            used += 1;
        }
        differ += 1;
    }
    tags
}

/// Former words, by hash.
struct Table([u64; 256]);

impl Table {
    fn new() -> Self {
        Self([0; 256])
    }

    fn slot(word: u64) -> usize {
        ((word >> 16).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as usize
    }
}

/// Whether this way suits a page: not if it is text, code or compressed.
pub(super) fn suit(page: &Page) -> bool {
    let (mut full, mut used) = (0, 0);
    for (line, bytes) in page.as_chunks::<LINE_BYTES>().0.iter().enumerate() {
        // Of each line another word: structures repeat.
        let word = u64::from_le_bytes(bytes.as_chunks::<8>().0[line * 3 % LINE_WORDS]);
        let top = word >> 48;
        full += u32::from(top != 0 && top != 0xffff);
        used += u32::from(word != 0);
    }
    full * FULL_WORDS_PART <= used
}

/// Collects pages.
pub(super) struct WordWriter {
    table: Table,
    tags: Vec<u8>,
    indexes: Vec<u8>,
    literals: Vec<u8>,
    indexes_len: usize,
    literals_len: usize,
}

impl Default for WordWriter {
    fn default() -> Self {
        let (tags, indexes, literals) = (Vec::new(), Vec::new(), Vec::new());
        Self { table: Table::new(), tags, indexes, literals, indexes_len: 0, literals_len: 0 }
    }
}

impl WordWriter {
    pub(super) fn push(&mut self, page: &Page) {
        // Room for the longest page, and for what is written beyond the end; none of it is written twice.
        self.indexes.resize(self.indexes.len().max(self.indexes_len + INDEXES_PAGE_MAX), 0);
        self.literals.resize(self.literals.len().max(self.literals_len + LITERALS_PAGE_MAX + 8), 0);
        for line in page.as_chunks::<LINE_BYTES>().0 {
            let words: [u64; LINE_WORDS] = std::array::from_fn(|at| u64::from_le_bytes(line.as_chunks::<8>().0[at]));
            let tags = if words == [0; LINE_WORDS] {
                self.table.0[Table::slot(0)] = 0;
                0
            } else {
                self.line(&words)
            };
            self.tags.extend_from_slice(&tags.to_le_bytes());
        }
    }

    #[inline(always)]
    fn line(&mut self, words: &[u64; LINE_WORDS]) -> u32 {
        let indexes = &mut self.indexes[self.indexes_len..self.indexes_len + LINE_WORDS];
        let literals = &mut self.literals[self.literals_len..self.literals_len + LINE_BYTES + 8];
        let (mut tags, mut index, mut literal) = (0, 0, 0);
        for (at, word) in words.iter().enumerate() {
            let slot = Table::slot(*word);
            let former = std::mem::replace(&mut self.table.0[slot], *word);
            let bytes = |word: u64| 8 - word.leading_zeros() as usize / 8;
            let tag = usize::from(TAGS[bytes(word ^ former)][bytes(*word)]) % 16;
            tags |= (tag as u32) << (4 * at);
            indexes[index % LINE_WORDS] = slot as u8;
            index += usize::from(INDEX_BYTES[tag]);
            literals[literal..literal + 8].copy_from_slice(&word.to_le_bytes());
            literal += usize::from(LITERAL_BYTES[tag]);
        }
        self.indexes_len += index;
        self.literals_len += literal;
        tags
    }

    /// Tags, indexes, literals.
    pub(super) fn streams(&self) -> [&[u8]; 3] {
        [&self.tags, &self.indexes[..self.indexes_len], &self.literals[..self.literals_len]]
    }

    pub(super) fn clear(&mut self) {
        self.table = Table::new();
        self.tags.clear();
        (self.indexes_len, self.literals_len) = (0, 0);
    }
}

/// Bytes after the literals that [`read`] may look at.
pub(super) const PADDING: [u8; LINE_BYTES + 8] = [0; LINE_BYTES + 8];

/// Reads pages from their streams, which stand one after the other and are padded; `None`: they do not add up. What was
/// in `pages` does not matter.
pub(super) fn read(pages: &mut [Page], streams: &[u8], indexes_len: usize) -> Option<()> {
    let literals_end = streams.len().checked_sub(PADDING.len())?;
    let (tags, _) = streams.split_at_checked(pages.len() * TAGS_PAGE_BYTES)?;
    let indexes_end = tags.len() + indexes_len;
    let (mut index, mut literal) = (tags.len(), indexes_end);
    let mut table = Table::new();
    let lines = pages.as_flattened_mut().as_chunks_mut::<LINE_BYTES>().0;
    for (line, tags) in lines.iter_mut().zip(tags.as_chunks::<4>().0) {
        let tags = u32::from_le_bytes(*tags);
        if tags == 0 {
            table.0[Table::slot(0)] = 0;
            *line = [0; LINE_BYTES];
            continue;
        }
        // A tag above 8 has its upper bit and another one.
        if tags & (tags & 0x7777_7777).wrapping_add(0x7777_7777) & 0x8888_8888 != 0 {
            return None;
        }
        let (indexes, literals) = (streams.get(index..)?.first_chunk()?, streams.get(literal..)?.first_chunk()?);
        // Where the entries go is known before they are read, unless a word has low bytes of another hash: reads then need
        // not wait for what is written before them.
        let (indexes_taken, literals_taken) = if has_nibble(tags, 3) || has_nibble(tags, 4) {
            table.line::<true>(line, tags, indexes, literals)
        } else {
            table.line::<false>(line, tags, indexes, literals)
        };
        index += indexes_taken;
        literal += literals_taken;
    }
    (index == indexes_end && literal == literals_end).then_some(())
}

/// Whether one of the 8 nibbles has this value.
fn has_nibble(nibbles: u32, value: u32) -> bool {
    let zero_where = nibbles ^ (value * 0x1111_1111);
    zero_where.wrapping_sub(0x1111_1111) & !zero_where & 0x8888_8888 != 0
}

impl Table {
    /// Reads a line; how many indexes and literals it took. `REHASH`: some words have a tag of 3 or 4.
    #[inline(always)]
    fn line<const REHASH: bool>(
        &mut self,
        line: &mut [u8; LINE_BYTES],
        mut tags: u32,
        indexes: &[u8; LINE_WORDS],
        literals: &[u8; PADDING.len()],
    ) -> (usize, usize) {
        let (mut index, mut literal) = (0, 0);
        for word in line.as_chunks_mut::<8>().0 {
            let tag = tags as usize % 16;
            tags >>= 4;
            let entry_at = usize::from(indexes[index % LINE_WORDS]);
            let entry = self.0[entry_at];
            // Before the last word at most 7 were taken, of 8 bytes each.
            let bytes = literals[literal.min(LINE_BYTES)..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
            let literal_word = bytes & OF_LITERAL[tag];
            let value = entry & OF_ENTRY[tag] | literal_word;
            index += usize::from(INDEX_BYTES[tag]);
            literal += usize::from(LITERAL_BYTES[tag]);
            // Of a tag of 1 or 2 the literal alone hashes to 0.
            let hashed = if REHASH && AT_ENTRY[tag] == 0 { value } else { literal_word };
            let slot = entry_at & AT_ENTRY[tag] | Self::slot(hashed);
            self.0[slot] = value;
            *word = value.to_le_bytes();
        }
        (index, literal)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::units::PAGE_SIZE;

    /// The plainest code that follows the description.
    fn naive(pages: &[Page]) -> (Vec<u8>, Vec<u8>, Vec<u8>) {
        let (mut tags, mut indexes, mut literals) = (Vec::new(), Vec::new(), Vec::new());
        let mut table = [0u64; 256];
        for word in pages.as_flattened().as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word)) {
            let slot = Table::slot(word);
            let former = std::mem::replace(&mut table[slot], word);
            let bytes = |word: u64| (0..=8).find(|bytes| *bytes == 8 || word >> (8 * bytes) == 0).unwrap();
            let same_above = |low: u32| word >> (8 * low) == former >> (8 * low);
            let choices = [(0, 0, 0), (1, 5, 1), (2, 6, 2), (4, 7, 4), (8, 8, 8)];
            let (_, mut tag, mut len) = *choices.iter().find(|(room, ..)| bytes(word) <= *room).unwrap();
            let by_entry = [(0, 1), (2, 2), (3, 3), (4, 4)].into_iter().find(|(low, _)| same_above(*low));
            if let Some((low, entry_tag)) = by_entry.filter(|(low, _)| low + 1 < len) {
                (tag, len) = (entry_tag, low);
                indexes.push(slot as u8);
            }
            tags.push(tag as u8);
            literals.extend_from_slice(&word.to_le_bytes()[..len as usize]);
        }
        (tags.chunks(2).map(|two| two[0] | two[1] << 4).collect(), indexes, literals)
    }

    fn padded(streams: [&[u8]; 3]) -> Vec<u8> {
        [streams[0], streams[1], streams[2], &PADDING].concat()
    }

    fn words() -> impl Strategy<Value = u64> {
        let pointer =
            (0u64..40, any::<u16>()).prop_map(|(area, low)| 0xffff_8880_0000_0000 | area << 20 | u64::from(low));
        prop_oneof![5 => Just(0), 2 => 0u64..300, 1 => any::<u32>().prop_map(u64::from), 3 => pointer, 1 => any::<u64>()]
    }

    fn page(words: &[u64], zero_from: usize) -> Page {
        std::array::from_fn(|at| if at < zero_from { words[at / 8 % words.len()].to_le_bytes()[at % 8] } else { 0 })
    }

    proptest! {
        #[test]
        fn pages_come_back_and_streams_are_those_of_the_naive_code(
            pages in prop::collection::vec((prop::collection::vec(words(), 1..60), 0..=PAGE_SIZE), 1..6),
        ) {
            let pages: Vec<Page> = pages.iter().map(|(words, zero_from)| page(words, *zero_from)).collect();
            let mut writer = WordWriter::default();
            for _ in 0..2 {
                writer.clear();
                pages.iter().for_each(|page| writer.push(page));
                let (tags, indexes, literals) = naive(&pages);
                prop_assert_eq!(writer.streams(), [&tags[..], &indexes, &literals]);
                let mut read_pages = vec![[7; PAGE_SIZE]; pages.len()];
                let streams = padded(writer.streams());
                prop_assert_eq!(read(&mut read_pages, &streams, indexes.len()), Some(()));
                prop_assert!(read_pages == pages);
                prop_assert_eq!(read(&mut read_pages, &streams[..streams.len() - 1], indexes.len()), None);
            }
        }

        #[test]
        fn noise_is_refused_or_read_but_never_a_panic(
            tags in prop_oneof![Just(0x88u8), Just(0x11), any::<u8>()], noise in prop::collection::vec(any::<u8>(), 0..400),
            indexes_len in 0usize..600,
        ) {
            let streams = [&[tags; TAGS_PAGE_BYTES], &noise[..], &PADDING].concat();
            for skipped in [0, 40, streams.len()] {
                let _ = read(&mut [[0; PAGE_SIZE]], &streams[skipped..], indexes_len);
            }
        }
    }

    #[test]
    fn text_and_code_are_left_to_others() {
        let text: Page = include_bytes!("words.rs")[..PAGE_SIZE].try_into().unwrap();
        assert!(!suit(&text));
        assert!(suit(&[0; PAGE_SIZE]));
        assert!(suit(&page(&[0xffff_8880_1234_5678, 12, 0, 7 << 32], PAGE_SIZE)));
    }
}
