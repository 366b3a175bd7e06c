//! Whole pages as machine words: what heaps, page tables and a kernel's structures are made of. Most words are zero, small,
//! or near one that came before. Told apart so they are a fourth of the bytes, which zstd then packs in a fraction of the
//! time that it needs for the pages themselves.
//!
//! ```text
//! tags       4 bits a word, 8 words in a little-endian u32, 256 bytes a page
//! indexes    1 byte for each word with a tag of 13 to 15: which entry of the table
//! literals   of each word, as many bytes as its tag says
//!
//! tag  0  1  2  3  4  5  6  7  8  9 10 11 12    literal bytes: low ones of the word's lower half,
//!      0  1  2  4  0  1  0  1  2  4  0  1  4      then
//!      0  0  0  0  1  1  2  2  2  2  4  4  4      low ones of its upper half; all others are zero
//! tag 13 14 15                                  the word is an entry of the table,
//!      0  1  2                                    but for these low bytes, to which the literal is added (modulo 2^8 or 2^16)
//! ```
//! The table has 256 entries, all zero at a frame's start. A line is 8 words: all of them are read from the table as it was
//! before the line; then each in turn becomes the entry that it hashes to, which depends on its upper 6 bytes. So the
//! words of a line do not wait for each other, and vectors code them at once ([`super::simd`]). A word that was read from
//! an entry becomes that entry, to which it hashes too: where all words of a line go is known before any entry is read.

use super::simd::{self, LINE_BYTES, LINES};
use crate::units::{PAGE_SIZE, Page};

/// Bytes of tags a page.
pub(super) const TAGS_PAGE_BYTES: usize = LINES * 4;
/// Most indexes and literals of a page, bytes.
pub(super) const INDEXES_PAGE_MAX: usize = LINES * LINE_WORDS;
pub(super) const LITERALS_PAGE_MAX: usize = PAGE_SIZE;
/// Room for a page's literals: beside the last one a whole word is read and written.
pub(super) const LITERALS_ROOM: usize = LITERALS_PAGE_MAX + 8;

pub(super) const LINE_WORDS: usize = LINE_BYTES / 8;

/// Tags from here on are of entries.
pub(super) const ENTRY: u8 = 13;
/// Literal bytes of a word's lower half, and of its upper half.
const LITERAL: [(u8, u8); 16] = [
    (0, 0),
    (1, 0),
    (2, 0),
    (4, 0),
    (0, 1),
    (1, 1),
    (0, 2),
    (1, 2),
    (2, 2),
    (4, 2),
    (0, 4),
    (1, 4),
    (4, 4),
    (0, 0),
    (1, 0),
    (2, 0),
];
/// The same with one bit for each byte of the word.
pub(super) const LITERAL_BYTES: [u8; 16] = literal_bytes();
/// Bytes that are those of the table's entry.
pub(super) const ENTRY_BYTES: [u8; 16] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xfe, 0xfc];
/// For the bytes of a word that are not zero, one bit each: how many bytes it takes as a value (upper 4 bits), and its tag.
/// The least of this and [`NEAR_ENTRY`] is chosen.
pub(super) const AS_VALUE: [u8; 256] = as_values();
/// The same for the bytes that differ from the entry's; the last one stands for all sets that are not here.
pub(super) const NEAR_ENTRY: [u8; 5] = [0x1d, 0x2e, 0x3f, 0x3f, 0xff];

/// Multiplied with a word's upper 6 bytes; the upper byte of it is where the word goes in the table.
pub(super) const HASH: u64 = 0x9e37_79b9_7f4a_7c15;
/// One word of each line is looked at to judge a page. At most one in so many may have its upper bytes in use.
const FULL_WORDS_PART: u32 = 4;

const fn literal_bytes() -> [u8; 16] {
    let mut bytes = [0; 16];
    let mut tag = 0;
    while tag < 16 {
        let (low, high) = LITERAL[tag];
        bytes[tag] = (((1u16 << low) - 1) | ((1 << (4 + high)) - 16)) as u8;
        tag += 1;
    }
    bytes
}

const fn as_values() -> [u8; 256] {
    let mut values = [0xff; 256];
    let mut used = 0;
    while used < 256 {
        let mut tag = 0;
        while tag < ENTRY {
            let literal = LITERAL_BYTES[tag as usize];
            let value = (literal.count_ones() as u8) << 4 | tag;
            if used as u8 & !literal == 0 && value < values[used] {
                values[used] = value;
            }
            tag += 1;
        }
        used += 1;
    }
    values
}

/// Former words, by hash.
pub(super) type Table = [u64; 256];

fn slot(word: u64) -> u8 {
    ((word >> 16).wrapping_mul(HASH) >> 56) as u8
}

/// Where a page's streams are written to.
pub(super) struct PageRoom<'a> {
    pub(super) tags: &'a mut [u8; TAGS_PAGE_BYTES],
    pub(super) indexes: &'a mut [u8; INDEXES_PAGE_MAX],
    pub(super) literals: &'a mut [u8; LITERALS_ROOM],
}

/// Where they are read from.
#[derive(Clone, Copy)]
pub(super) struct PageStreams<'a> {
    pub(super) tags: &'a [u8; TAGS_PAGE_BYTES],
    pub(super) indexes: &'a [u8; INDEXES_PAGE_MAX],
    pub(super) literals: &'a [u8; LITERALS_ROOM],
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
        Self { table: [0; 256], tags, indexes, literals, indexes_len: 0, literals_len: 0 }
    }
}

impl WordWriter {
    pub(super) fn push(&mut self, page: &Page) {
        let tags_len = self.tags.len();
        self.tags.resize(tags_len + TAGS_PAGE_BYTES, 0);
        let room = PageRoom {
            tags: super::room(&mut self.tags, tags_len),
            indexes: super::room(&mut self.indexes, self.indexes_len),
            literals: super::room(&mut self.literals, self.literals_len),
        };
        let (indexes, literals) = simd::write_words(page, &mut self.table, room);
        self.indexes_len += indexes;
        self.literals_len += literals;
    }

    /// Tags, indexes, literals.
    pub(super) fn streams(&self) -> [&[u8]; 3] {
        [&self.tags, &self.indexes[..self.indexes_len], &self.literals[..self.literals_len]]
    }

    pub(super) fn clear(&mut self) {
        self.table = [0; 256];
        self.tags.clear();
        (self.indexes_len, self.literals_len) = (0, 0);
    }
}

/// Bytes after the literals that [`read`] may look at.
pub(super) const PADDING: [u8; LITERALS_ROOM] = [0; LITERALS_ROOM];

/// Reads pages from their streams, which stand one after the other and are padded; `None`: they do not add up. What was
/// in `pages` does not matter.
pub(super) fn read(pages: &mut [Page], streams: &[u8], indexes_len: usize) -> Option<()> {
    let literals_end = streams.len().checked_sub(PADDING.len())?;
    let (tags, _) = streams.split_at_checked(pages.len() * TAGS_PAGE_BYTES)?;
    let indexes_end = tags.len() + indexes_len;
    let (mut index, mut literal) = (tags.len(), indexes_end);
    let mut table = [0; 256];
    for (page, tags) in pages.iter_mut().zip(tags.as_chunks().0) {
        // Both are there, unless more was taken before than there is.
        let (indexes, literals) = (streams.get(index..)?.first_chunk()?, streams.get(literal..)?.first_chunk()?);
        let from = PageStreams { tags, indexes, literals };
        let (indexes_taken, literals_taken) = simd::read_words(page, &mut table, from);
        index += indexes_taken;
        literal += literals_taken;
    }
    (index == indexes_end && literal == literals_end).then_some(())
}

/// The reference of [`simd::write_words`].
pub(super) fn write_portable(page: &Page, table: &mut Table, out: PageRoom<'_>) -> (usize, usize) {
    let (mut index, mut literal) = (0, 0);
    for (line, tags_to) in page.as_chunks::<LINE_BYTES>().0.iter().zip(out.tags.as_chunks_mut().0) {
        let words: [u64; LINE_WORDS] = std::array::from_fn(|at| u64::from_le_bytes(line.as_chunks::<8>().0[at]));
        if words == [0; LINE_WORDS] {
            table[0] = 0;
            *tags_to = [0; 4];
            continue;
        }
        let slots = words.map(slot);
        let formers = slots.map(|slot| table[usize::from(slot)]);
        let mut tags = 0;
        for (at, ((word, former), slot)) in words.into_iter().zip(formers).zip(slots).enumerate() {
            table[usize::from(slot)] = word;
            let near = match word ^ former {
                0 => NEAR_ENTRY[0],
                1..0x100 => NEAR_ENTRY[1],
                0x100..0x1_0000 => NEAR_ENTRY[2],
                _ => NEAR_ENTRY[4],
            };
            let tag = near.min(AS_VALUE[usize::from(simd::used_bytes(word))]) & 15;
            tags |= u32::from(tag) << (4 * at);
            let is_entry = tag >= ENTRY;
            out.indexes[index] = slot;
            index += usize::from(is_entry);
            let value = if is_entry { word.wrapping_sub(former) } else { word };
            let (low, high) = LITERAL[usize::from(tag)];
            let bytes = value & low_bytes(low) | (value >> 32 & low_bytes(high)) << (8 * low);
            out.literals[literal..literal + 8].copy_from_slice(&bytes.to_le_bytes());
            literal += usize::from(low + high);
        }
        *tags_to = tags.to_le_bytes();
    }
    (index, literal)
}

/// The reference of [`simd::read_words`].
pub(super) fn read_portable(page: &mut Page, table: &mut Table, from: PageStreams<'_>) -> (usize, usize) {
    let PageStreams { tags, indexes, literals } = from;
    let (mut index, mut literal) = (0, 0);
    for (line, tags) in page.as_chunks_mut::<LINE_BYTES>().0.iter_mut().zip(tags.as_chunks().0) {
        let mut tags = u32::from_le_bytes(*tags);
        if tags == 0 {
            table[0] = 0;
            *line = [0; LINE_BYTES];
            continue;
        }
        let mut words = [(0, 0); LINE_WORDS];
        for word in &mut words {
            let tag = tags as usize & 15;
            tags >>= 4;
            let (low, high) = LITERAL[tag];
            let bytes = literals[literal..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
            // No tag has more than 4 bytes of a half.
            let value = bytes & low_bytes(low) | (bytes >> (8 * low) & low_bytes(high)) << 32;
            literal += usize::from(low + high);
            *word = if tag >= usize::from(ENTRY) {
                let slot = indexes[index];
                let entry = table[usize::from(slot)];
                index += 1;
                (entry & !low_bytes(low) | entry.wrapping_add(value) & low_bytes(low), slot)
            } else {
                (value, slot(value))
            };
        }
        for (to, (word, slot)) in line.as_chunks_mut::<8>().0.iter_mut().zip(words) {
            table[usize::from(slot)] = word;
            *to = word.to_le_bytes();
        }
    }
    (index, literal)
}

/// So many low bytes, at most 4.
fn low_bytes(len: u8) -> u64 {
    (1 << (8 * len)) - 1
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
        for line in pages.as_flattened().as_chunks::<64>().0 {
            let before = table;
            for word in line.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word)) {
                let place = usize::from(slot(word));
                let former = before[place];
                table[place] = word;
                let fits = |tag: &usize| {
                    let (low, high) = LITERAL[*tag];
                    (word as u32 as u64) >> (8 * low) == 0 && (word >> 32) >> (8 * high) == 0
                };
                let len = |tag: usize| usize::from(LITERAL[tag].0 + LITERAL[tag].1);
                let value = (0..13).filter(fits).min_by_key(|tag| len(*tag)).unwrap();
                let near = (0..3).find(|bytes| word >> (8 * bytes) == former >> (8 * bytes));
                match near.filter(|bytes| bytes + 1 < len(value)) {
                    Some(bytes) => {
                        tags.push(13 + bytes as u8);
                        indexes.push(place as u8);
                        literals.extend_from_slice(&word.wrapping_sub(former).to_le_bytes()[..bytes]);
                    }
                    None => {
                        let (low, high) = LITERAL[value];
                        tags.push(value as u8);
                        literals.extend_from_slice(&word.to_le_bytes()[..usize::from(low)]);
                        literals.extend_from_slice(&word.to_le_bytes()[4..][..usize::from(high)]);
                    }
                }
            }
        }
        (tags.chunks(2).map(|two| two[0] | two[1] << 4).collect(), indexes, literals)
    }

    /// What a CPU without vectors writes; it reads what it wrote.
    fn written_portably(pages: &[Page]) -> (Vec<u8>, Vec<u8>, Vec<u8>) {
        let (mut tags, mut indexes, mut literals) = (Vec::new(), Vec::new(), Vec::new());
        let mut tables = [[0; 256]; 2];
        for page in pages {
            let (mut t, mut i, mut l) = ([1; TAGS_PAGE_BYTES], [1; INDEXES_PAGE_MAX], [1; LITERALS_ROOM]);
            let room = PageRoom { tags: &mut t, indexes: &mut i, literals: &mut l };
            let taken = write_portable(page, &mut tables[0], room);
            let mut read_page = [7; PAGE_SIZE];
            let from = PageStreams { tags: &t, indexes: &i, literals: &l };
            assert_eq!(read_portable(&mut read_page, &mut tables[1], from), taken);
            assert!(read_page == *page && tables[0] == tables[1]);
            tags.extend_from_slice(&t);
            indexes.extend_from_slice(&i[..taken.0]);
            literals.extend_from_slice(&l[..taken.1]);
        }
        (tags, indexes, literals)
    }

    fn padded(streams: [&[u8]; 3]) -> Vec<u8> {
        [streams[0], streams[1], streams[2], &PADDING].concat()
    }

    fn words() -> impl Strategy<Value = u64> {
        let pointer =
            (0u64..40, any::<u16>()).prop_map(|(area, low)| 0xffff_8880_0000_0000 | area << 20 | u64::from(low));
        let near = (0u64..8, any::<u8>()).prop_map(|(area, low)| 0x7fff_1234_0000 + (area << 8 | u64::from(low)));
        let halves = (any::<u64>(), 0..16usize).prop_map(|(word, tag)| {
            let kept = |byte: usize| u64::from(LITERAL_BYTES[tag] >> byte & 1) * (0xff << (8 * byte));
            word & (0..8).map(kept).fold(0, |a, b| a | b)
        });
        prop_oneof![
            5 => Just(0),
            2 => 0u64..300,
            1 => any::<u32>().prop_map(u64::from),
            3 => pointer,
            2 => near,
            3 => halves,
            1 => any::<u64>(),
        ]
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
                prop_assert_eq!(written_portably(&pages), (tags, indexes.clone(), literals));
                let mut read_pages = vec![[7; PAGE_SIZE]; pages.len()];
                let streams = padded(writer.streams());
                prop_assert_eq!(read(&mut read_pages, &streams, indexes.len()), Some(()));
                prop_assert!(read_pages == pages);
                prop_assert_eq!(read(&mut read_pages, &streams[..streams.len() - 1], indexes.len()), None);
            }
        }

        #[test]
        fn noise_is_refused_or_read_everywhere_the_same_and_never_a_panic(
            tags in prop_oneof![Just(0xccu8), Just(0xdd), Just(0x3f), any::<u8>()],
            noise in prop::collection::vec(any::<u8>(), 0..5000), indexes_len in 0usize..600,
        ) {
            let noisy_tags: [u8; TAGS_PAGE_BYTES] =
                std::array::from_fn(|at| if at % 3 == 0 { tags } else { noise.get(at).copied().unwrap_or(tags) });
            for tags in [[tags; TAGS_PAGE_BYTES], noisy_tags] {
                let streams = [&tags, &noise[..], &PADDING].concat();
                for skipped in [0, 40, streams.len()] {
                    let _ = read(&mut [[0; PAGE_SIZE]], &streams[skipped..], indexes_len);
                }
                let (indexes, literals) = (streams.first_chunk().unwrap(), streams.last_chunk().unwrap());
                let from = PageStreams { tags: &tags, indexes, literals };
                let (mut tables, mut found) = ([[5; 256]; 2], [[1; PAGE_SIZE], [2; PAGE_SIZE]]);
                let taken = [
                    read_portable(&mut found[0], &mut tables[0], from),
                    simd::read_words(&mut found[1], &mut tables[1], from),
                ];
                prop_assert_eq!(taken[0], taken[1]);
                prop_assert!(found[0] == found[1] && tables[0] == tables[1]);
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
