//! Made-up epochs with the statistics of captured ones: pages an epoch, how many are unchanged, zero, or changed in
//! how many words, and how likely a page is dirty again.

use vmsync::codec::capture::CapturedEpoch;
use vmsync::{PAGE_SIZE, Page, PageBatch, RamBlock, RamLayout};

use crate::Capture;

struct Guest {
    name: &'static str,
    pages_an_epoch: usize,
    epochs: usize,
    /// Parts of 100 of the dirty pages.
    unchanged: usize,
    zero: usize,
    /// Of the pages dirtied in an epoch so many of 100 come from the pages dirtied in the one before.
    again: usize,
    /// Changed words of a page: as many at each decile.
    words: [usize; 11],
    text: Text,
}

/// What memory looks like.
#[derive(Clone, Copy, PartialEq)]
enum Text {
    /// Records of small numbers, pointers and short repeating strings.
    Records,
    /// Words of a vocabulary, tables, zeros.
    Source,
    Random,
}

const GUESTS: [Guest; 6] = [
    Guest {
        name: "like redis, 1 s",
        pages_an_epoch: 5911,
        epochs: 8,
        unchanged: 8,
        zero: 7,
        again: 46,
        words: [1, 1, 1, 1, 2, 2, 2, 3, 6, 12, 40],
        text: Text::Records,
    },
    Guest {
        name: "like PostgreSQL, 1 s",
        pages_an_epoch: 1403,
        epochs: 12,
        unchanged: 22,
        zero: 7,
        again: 41,
        words: [1, 1, 2, 3, 4, 6, 12, 40, 150, 469, 512],
        text: Text::Records,
    },
    Guest {
        name: "like gcc, 1 s",
        pages_an_epoch: 1996,
        epochs: 10,
        unchanged: 6,
        zero: 5,
        again: 58,
        words: [1, 8, 40, 100, 180, 248, 330, 400, 460, 493, 512],
        text: Text::Source,
    },
    Guest {
        name: "like gcc, 50 ms",
        pages_an_epoch: 453,
        epochs: 30,
        unchanged: 12,
        zero: 1,
        again: 57,
        words: [1, 1, 2, 4, 9, 19, 45, 110, 240, 441, 512],
        text: Text::Source,
    },
    Guest {
        name: "random data, 50 ms",
        pages_an_epoch: 481,
        epochs: 30,
        unchanged: 2,
        zero: 0,
        again: 8,
        words: [512; 11],
        text: Text::Random,
    },
    Guest {
        name: "idle, 1 s",
        pages_an_epoch: 209,
        epochs: 60,
        unchanged: 32,
        zero: 4,
        again: 94,
        words: [1, 1, 1, 1, 2, 2, 3, 6, 15, 65, 200],
        text: Text::Records,
    },
];

pub fn all() -> impl Iterator<Item = Capture> {
    GUESTS.iter().map(make)
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() >> 16) as usize % bound
    }
}

fn make(guest: &Guest) -> Capture {
    let mut random = Random(0x9e37_79b9_7f4a_7c15 ^ guest.pages_an_epoch as u64);
    let total = guest.pages_an_epoch * 6;
    let layout = RamLayout::new(vec![RamBlock { name: "pc.ram".into(), len_bytes: (total * PAGE_SIZE) as u64 }]);
    let layout = layout.expect("a plain layout");
    let mut memory: Vec<Page> = (0..total).map(|_| page(guest.text, &mut random)).collect();
    let mut epochs = vec![epoch(0, &(0..total).collect::<Vec<_>>(), &memory, &layout)];
    let mut former: Vec<usize> = (0..guest.pages_an_epoch).map(|_| random.below(total)).collect();
    for number in 1..=guest.epochs {
        let mut dirty: Vec<usize> = former.iter().copied().filter(|_| random.below(100) < guest.again).collect();
        while dirty.len() < guest.pages_an_epoch {
            // Neighbours are dirtied together.
            let first = random.below(total - 4);
            dirty.extend(first..first + 1 + random.below(3));
        }
        dirty.sort_unstable();
        dirty.dedup();
        for index in &dirty {
            write(guest, &mut memory[*index], &mut random);
        }
        epochs.push(epoch(number as u64, &dirty, &memory, &layout));
        former = dirty;
    }
    Capture { name: guest.name.into(), layout, epochs }
}

fn epoch(number: u64, dirty: &[usize], memory: &[Page], layout: &RamLayout) -> CapturedEpoch {
    let mut pages = PageBatch::with_capacity(dirty.len());
    for index in dirty {
        pages.push(layout.addr(*index as u64).expect("inside"), &memory[*index]);
    }
    CapturedEpoch { epoch: number, at_us: number * 1_000_000, pages, device_state: vec![0; 100] }
}

fn write(guest: &Guest, memory: &mut Page, random: &mut Random) {
    match random.below(100) {
        part if part < guest.unchanged => {}
        part if part < guest.unchanged + guest.zero => *memory = [0; PAGE_SIZE],
        _ => {
            let rank = random.below(100);
            let (low, high) = (guest.words[rank / 10], guest.words[rank / 10 + 1]);
            let words = low + (high - low) * (rank % 10) / 10;
            let fresh = page(guest.text, random);
            if words >= 480 {
                *memory = fresh;
                return;
            }
            // In up to four places, as structures are written.
            let places = words.min(1 + random.below(4));
            for _ in 0..places {
                let len = words.div_ceil(places);
                let at = random.below(512 - len) * 8;
                if len <= 2 && guest.text != Text::Random {
                    // Counters and pointers.
                    memory[at] = memory[at].wrapping_add(1 + random.below(7) as u8);
                    memory[at + 1] ^= random.below(256) as u8;
                } else {
                    memory[at..at + len * 8].copy_from_slice(&fresh[at..at + len * 8]);
                }
            }
        }
    }
}

fn page(text: Text, random: &mut Random) -> Page {
    let mut page = [0; PAGE_SIZE];
    match text {
        Text::Random => {
            page.as_chunks_mut::<8>().0.iter_mut().for_each(|word| *word = random.next().to_le_bytes());
        }
        Text::Records => {
            let base = 0x7f12_0000_0000u64 + ((random.next() & 0xff) << 24);
            for (i, record) in page.as_chunks_mut::<64>().0.iter_mut().enumerate() {
                let pointer = base + (random.next() & 0xf_fff0);
                record[..8].copy_from_slice(&pointer.to_le_bytes());
                record[8..12].copy_from_slice(&(i as u32 * 3 + random.below(3) as u32).to_le_bytes());
                let key = format!("key:{:012}", random.below(100_000));
                record[16..16 + key.len()].copy_from_slice(key.as_bytes());
                record[40..48].fill(b'x');
            }
        }
        Text::Source => {
            let mut at = 0;
            while at < PAGE_SIZE - 16 {
                // Words of a vocabulary with a long tail, between zeros and small numbers.
                let rarity = 1 + random.below(10);
                let word = random.below(1 << rarity) as u64;
                let hash = (word + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                let len = 3 + (hash >> 60) as usize % 6;
                page[at..at + len].copy_from_slice(&hash.to_le_bytes()[..len]);
                at += len + if random.below(3) == 0 { 8 - at % 8 } else { 1 };
            }
        }
    }
    page
}
