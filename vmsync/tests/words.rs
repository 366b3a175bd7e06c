//! Machine words in page frames, read by the product's decoder and by the plainest code that follows
//! `docs/wire-format.md`: whatever comes, both have the same pages of it, or both refuse it.

use proptest::prelude::*;
use vmsync::codec::FrameDecoder;
use vmsync::{PAGE_SIZE, Page, RamBlock, RamLayout};

const WORDS_A_PAGE: usize = PAGE_SIZE / 8;
/// Tags from here on have an index.
const ENTRY: usize = 13;
/// By tag: how many literal bytes of the lower half, and of the upper one.
const LITERALS: [[usize; 2]; 16] = [
    [0, 0],
    [1, 0],
    [2, 0],
    [4, 0],
    [0, 1],
    [1, 1],
    [0, 2],
    [1, 2],
    [2, 2],
    [4, 2],
    [0, 4],
    [1, 4],
    [4, 4],
    [0, 0],
    [1, 0],
    [2, 0],
];

/// Of one frame, each still apart.
#[derive(Debug, Clone)]
struct Streams {
    pages: usize,
    /// One nibble a word.
    tags: Vec<u8>,
    indexes: Vec<u8>,
    literals: Vec<u8>,
}

impl Streams {
    /// As many indexes and literals as the tags take, from these.
    fn fitting(tags: Vec<u8>, indexes: &[u8], literals: &[u8]) -> Self {
        let pages = tags.len() / (WORDS_A_PAGE / 2);
        let nibbles = || tags.iter().flat_map(|two| [two & 15, two >> 4]).map(usize::from);
        let index_count = nibbles().filter(|tag| *tag >= ENTRY).count();
        let literal_count = nibbles().map(|tag| LITERALS[tag].iter().sum::<usize>()).sum();
        let indexes = indexes.iter().copied().cycle().take(index_count).collect();
        let literals = literals.iter().copied().cycle().take(literal_count).collect();
        Self { pages, tags, indexes, literals }
    }

    fn frame(&self) -> Vec<u8> {
        let mut frame = vec![2, 2];
        frame.extend((self.pages as u16).to_le_bytes());
        for page in 0..self.pages as u32 {
            frame.extend(page.to_le_bytes());
            frame.extend([0, 0]);
        }
        frame.extend((self.indexes.len() as u32).to_le_bytes());
        frame.extend((self.literals.len() as u32).to_le_bytes());
        frame.extend((self.tags.len() as u32).to_le_bytes());
        frame.extend((self.indexes.len() as u32).to_le_bytes());
        [&frame[..], &self.tags, &self.indexes, &self.literals].concat()
    }

    fn plainly(&self) -> Option<Vec<u64>> {
        let (mut table, mut words) = ([0u64; 256], Vec::new());
        let (mut indexes, mut literals) = (self.indexes.iter(), &self.literals[..]);
        if self.tags.len() != self.pages * WORDS_A_PAGE / 2 {
            return None;
        }
        for line in self.tags.chunks(4) {
            let before = table;
            for tag in line.iter().flat_map(|two| [two & 15, two >> 4]).map(usize::from) {
                let mut halves = [[0u8; 4]; 2];
                for (half, len) in halves.iter_mut().zip(LITERALS[tag]) {
                    let (taken, rest) = literals.split_at_checked(len)?;
                    half[..len].copy_from_slice(taken);
                    literals = rest;
                }
                let [low, high] = halves.map(|half| u64::from(u32::from_le_bytes(half)));
                let mut word = low | high << 32;
                let mut place = ((word >> 16).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as usize;
                if tag >= ENTRY {
                    place = usize::from(*indexes.next()?);
                    let entry = before[place];
                    let modulus = 1 << (8 * (tag - ENTRY));
                    word = entry - entry % modulus + entry.wrapping_add(low) % modulus;
                }
                table[place] = word;
                words.push(word);
            }
        }
        (literals.is_empty() && indexes.next().is_none()).then_some(words)
    }
}

/// A decoder that has decoded before: what was there must not show.
fn decoded(decoder: &mut FrameDecoder, frame: &[u8], pages: usize) -> Option<Vec<u64>> {
    let blocks = vec![RamBlock { name: "a".into(), len_bytes: 64 * PAGE_SIZE as u64 }];
    let frame = decoder.decode(frame, &RamLayout::new(blocks).unwrap()).ok()?;
    let mut found: Vec<Page> = vec![[0xa5; PAGE_SIZE]; pages];
    frame.iter().for_each(|(addr, content)| content.apply(&mut found[addr.page.get() as usize]));
    let words = found.as_flattened().as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word)).collect();
    decoder.reuse(frame);
    Some(words)
}

/// Two words' tags.
fn tags() -> impl Strategy<Value = u8> {
    let tag = prop_oneof![4 => Just(0u8), 3 => 1u8..13, 4 => 13u8..16];
    (tag.clone(), tag).prop_map(|(low, high)| low | high << 4)
}

/// Lines of words: of one kind, or mixed.
fn pages_of_tags() -> impl Strategy<Value = Vec<u8>> {
    let line = prop_oneof![
        4 => prop::array::uniform4(tags()),
        1 => Just([0; 4]),
        1 => tags().prop_map(|two| [two; 4]),
        1 => prop::array::uniform4(prop_oneof![Just(0xedu8), Just(0xfe), Just(0xcc), Just(0xd3)]),
    ];
    (1usize..8, prop::collection::vec(line, 1..80))
        .prop_map(|(pages, lines)| lines.into_iter().flatten().cycle().take(pages * WORDS_A_PAGE / 2).collect())
}

fn bytes(most: usize) -> impl Strategy<Value = Vec<u8>> {
    let byte = prop_oneof![3 => Just(0u8), 2 => 0u8..5, 2 => any::<u8>(), 1 => Just(0xff)];
    prop::collection::vec(byte, 1..most)
}

#[derive(Debug, Clone)]
enum Damage {
    Tag(prop::sample::Index, u8),
    Index(prop::sample::Index, u8),
    Literal(prop::sample::Index, u8),
    MoreIndexes(Vec<u8>),
    MoreLiterals(Vec<u8>),
    FewerIndexes(usize),
    FewerLiterals(usize),
}

fn damage() -> impl Strategy<Value = Damage> {
    let at = any::<prop::sample::Index>;
    prop_oneof![
        3 => (at(), any::<u8>()).prop_map(|(at, byte)| Damage::Tag(at, byte)),
        2 => (at(), any::<u8>()).prop_map(|(at, byte)| Damage::Index(at, byte)),
        1 => (at(), any::<u8>()).prop_map(|(at, byte)| Damage::Literal(at, byte)),
        1 => bytes(20).prop_map(Damage::MoreIndexes),
        1 => bytes(20).prop_map(Damage::MoreLiterals),
        1 => (1usize..20).prop_map(Damage::FewerIndexes),
        1 => (1usize..20).prop_map(Damage::FewerLiterals),
    ]
}

fn apply(streams: &mut Streams, damage: Damage) {
    fn set(bytes: &mut [u8], at: prop::sample::Index, byte: u8) {
        if !bytes.is_empty() {
            bytes[at.index(bytes.len())] = byte;
        }
    }
    let Streams { tags, indexes, literals, .. } = streams;
    match damage {
        Damage::Tag(at, byte) => set(tags, at, byte),
        Damage::Index(at, byte) => set(indexes, at, byte),
        Damage::Literal(at, byte) => set(literals, at, byte),
        Damage::MoreIndexes(more) => indexes.extend(more),
        Damage::MoreLiterals(more) => literals.extend(more),
        Damage::FewerIndexes(fewer) => indexes.truncate(indexes.len().saturating_sub(fewer)),
        Damage::FewerLiterals(fewer) => literals.truncate(literals.len().saturating_sub(fewer)),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn both_readers_have_the_same_pages_or_refuse(
        tags in pages_of_tags(),
        indexes in bytes(200),
        literals in bytes(300),
        damages in prop::collection::vec(damage(), 0..4),
    ) {
        let mut streams = Streams::fitting(tags, &indexes, &literals);
        let mut decoder = FrameDecoder::new();
        let undamaged = streams.plainly();
        prop_assert!(undamaged.is_some(), "they fit");
        prop_assert!(decoded(&mut decoder, &streams.frame(), streams.pages) == undamaged);
        for damage in damages {
            apply(&mut streams, damage);
            let found = decoded(&mut decoder, &streams.frame(), streams.pages);
            prop_assert!(found == streams.plainly(), "read: {}, plainly: {}", found.is_some(), streams.plainly().is_some());
        }
    }

    /// Nothing fits anything: mostly refused, never a panic, and never read by one of them only.
    #[test]
    fn noise_is_the_same_to_both(
        tags in prop::collection::vec(any::<u8>(), WORDS_A_PAGE / 2),
        indexes in prop::collection::vec(any::<u8>(), 0..600),
        literals in prop::collection::vec(any::<u8>(), 0..4200),
    ) {
        let streams = Streams { pages: 1, tags, indexes, literals };
        prop_assert!(decoded(&mut FrameDecoder::new(), &streams.frame(), 1) == streams.plainly());
    }
}
