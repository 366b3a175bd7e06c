//! Frames to be damaged, a way to damage them that is the same in every run, and stored ones.

use vmsync::codec::{Encoder, MirrorBudget};
use vmsync::hashes::HashSeed;
use vmsync::{PAGE_SIZE, Page, PageAddr, RamLayout};

/// xorshift64*: small, and the same everywhere.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() >> 11) as usize % bound.max(1)
    }
}

pub fn noise(seed: u32) -> Page {
    let mut random = Random::new(u64::from(seed) << 20 | 77);
    let mut page = [0; PAGE_SIZE];
    page.as_chunks_mut::<8>().0.iter_mut().for_each(|word| *word = random.next().to_le_bytes());
    page
}

/// Frames of all kinds and encodings.
pub fn frames(layout: &RamLayout) -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    for level in [0, 1] {
        let mut encoder = Encoder::new(layout, MirrorBudget::Full, HashSeed::new(5), level);
        let mut pages: Vec<Page> = (0..30).map(|i| if i % 3 == 0 { [i as u8; PAGE_SIZE] } else { noise(i) }).collect();
        for round in 0..3usize {
            for (i, page) in pages.iter_mut().enumerate() {
                for write in 0..=i {
                    page[write * 131 % PAGE_SIZE] ^= round as u8;
                }
                encoder.page(PageAddr::new((i / 20) as u16, (i % 20 % 10) as u32), page);
            }
            encoder.whole(PageAddr::new(0, 29), &[round as u8; PAGE_SIZE]);
            encoder.whole(PageAddr::new(0, 28), &std::array::from_fn(|i| (i / 100) as u8));
            // As words.
            encoder
                .whole(PageAddr::new(0, 27), &std::array::from_fn(|i| if i % 8 < 3 { (i * 7 / 9) as u8 } else { 0 }));
            frames.extend(encoder.finish());
        }
    }
    frames
}

/// One to four small damages.
pub fn mutate(bytes: &mut Vec<u8>, random: &mut Random, others: &[Vec<u8>]) {
    for _ in 0..=random.below(4) {
        // Heads and addresses matter most.
        let reach = if random.below(2) == 0 { bytes.len().min(64) } else { bytes.len() };
        let at = random.below(reach);
        match random.below(7) {
            0 => bytes.truncate(at),
            1 => bytes.iter_mut().skip(at).take(1).for_each(|b| *b = [0, 1, 2, 3, 0x7f, 0x80, 0xff][at % 7]),
            2 => bytes.iter_mut().skip(at).take(1).for_each(|b| *b ^= 1 << (at % 8)),
            3 => bytes.iter_mut().skip(at).take(4).for_each(|b| *b = random.next() as u8),
            4 => bytes.insert(at.min(bytes.len()), random.next() as u8),
            5 => drop(bytes.drain(at..(at + random.below(9)).min(bytes.len()))),
            _ => {
                let other = &others[random.below(others.len())];
                bytes.truncate(at);
                bytes.extend_from_slice(&other[at.min(other.len())..]);
            }
        }
    }
}

/// Frames of `fixtures/vmsync/frames`, each with what the decoder says to it.
pub fn stored() -> Vec<(String, Vec<u8>, String)> {
    let listed = include_str!("../../../fixtures/vmsync/frames-3.txt");
    let entry = |line: &str| {
        let mut parts = line.splitn(3, '\t');
        let mut next = || parts.next().unwrap_or_default().to_owned();
        let (name, expected, hex) = (next(), next(), next());
        let bytes = (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect();
        (name, bytes, expected)
    };
    let stored: Vec<_> = listed.lines().filter(|line| !line.starts_with('#')).map(entry).collect();
    assert!(stored.len() > 20);
    stored
}
