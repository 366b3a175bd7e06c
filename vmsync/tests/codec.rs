//! The delta codec as a whole: against a model that knows nothing of it, and against damaged frames.

mod corpus;

use proptest::prelude::*;

use vmsync::codec::{Encoder, FrameDecoder, KnownPages, MirrorBudget, PageContent, PageFate, PagesFrame};
use vmsync::hashes::HashSeed;
use vmsync::{PAGE_SIZE, Page, PageAddr, RamBlock, RamLayout};

const PAGES: u64 = 40;

fn layout() -> RamLayout {
    let block = |name: &str, pages: u64| RamBlock { name: name.into(), len_bytes: pages * 4096 };
    RamLayout::new(vec![block("a", 30), block("b", PAGES - 30)]).unwrap()
}

/// A shadow in the simplest form: pages, and what is known about them.
struct Shadow {
    pages: Vec<Page>,
    known: KnownPages,
    decoder: FrameDecoder,
}

impl Shadow {
    fn new() -> Self {
        let pages = vec![[0; PAGE_SIZE]; PAGES as usize];
        Self { pages, known: KnownPages::zero(&layout()), decoder: FrameDecoder::new() }
    }

    fn receive(&mut self, frames: &[Vec<u8>]) {
        for bytes in frames {
            let frame = self.decoder.decode(bytes, &layout()).unwrap();
            self.known.accept(&frame).unwrap();
            apply(&frame, &mut self.pages);
        }
    }
}

fn apply(frame: &PagesFrame, pages: &mut [Page]) {
    for (addr, content) in frame.iter() {
        content.apply(&mut pages[layout().linear(addr).unwrap() as usize]);
    }
}

#[derive(Debug, Clone)]
enum Write {
    Bytes(usize, Vec<u8>),
    Fill(u64),
    Noise(u32),
    Nothing,
}

fn write() -> impl Strategy<Value = Write> {
    prop_oneof![
        6 => (0..PAGE_SIZE, prop::collection::vec(any::<u8>(), 1..24)).prop_map(|(at, bytes)| Write::Bytes(at, bytes)),
        1 => (0..3000usize, 500..1090usize).prop_map(|(at, len)| Write::Bytes(at, (0..len).map(|i| i as u8 | 1).collect())),
        1 => prop_oneof![Just(0), any::<u64>()].prop_map(Write::Fill),
        1 => any::<u32>().prop_map(Write::Noise),
        1 => Just(Write::Nothing),
    ]
}

fn write_to(page: &mut Page, write: &Write) {
    match write {
        Write::Bytes(at, bytes) => {
            for (to, byte) in page[*at..].iter_mut().zip(bytes) {
                *to = *byte;
            }
        }
        Write::Fill(word) => PageContent::Fill(*word).apply(page),
        Write::Noise(seed) => *page = corpus::noise(*seed),
        Write::Nothing => {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Cuts of random writes, mirrors of any size, any level: after each cut the shadow equals the guest; what was
    /// left out had not changed; and applying all of the last cut once more changes nothing.
    #[test]
    fn a_shadow_in_step_equals_the_guest(
        room in prop_oneof![Just(0u64), 1..PAGES, Just(PAGES)],
        level in prop_oneof![Just(0), Just(1), Just(-5), Just(3)],
        cuts in prop::collection::vec(prop::collection::vec((0..PAGES, write()), 0..30), 1..8),
        forgotten in prop::collection::vec(0..PAGES, 0..4),
    ) {
        let layout = layout();
        let mut encoder = Encoder::new(&layout, MirrorBudget::Bytes(room * 4096), HashSeed::new(5), level);
        let mut guest = vec![[0; PAGE_SIZE]; PAGES as usize];
        let mut shadow = Shadow::new();
        for writes in cuts {
            let before = guest.clone();
            let mut dirty: Vec<u64> = writes.iter().map(|(page, _)| *page).collect();
            dirty.sort_unstable();
            dirty.dedup();
            writes.iter().for_each(|(page, write)| write_to(&mut guest[*page as usize], write));
            encoder.begin_cut();
            for page in dirty {
                let (old, new) = (&before[page as usize], &guest[page as usize]);
                let fate = encoder.page(layout.addr(page).unwrap(), new);
                if matches!(fate, PageFate::Same | PageFate::SameByHash) {
                    prop_assert_eq!(old, new);
                }
            }
            let frames = encoder.finish();
            shadow.receive(&frames);
            prop_assert!(shadow.pages == guest);
            let mut decoder = FrameDecoder::new();
            frames.iter().for_each(|bytes| apply(&decoder.decode(bytes, &layout).unwrap(), &mut shadow.pages));
            prop_assert!(shadow.pages == guest, "frames can be replayed");
            forgotten.iter().for_each(|page| encoder.forget(layout.addr(*page).unwrap()));
            prop_assert!(encoder.stats().mirror_pages <= room);
        }
    }

    /// A shadow that missed a cut is found out by the next patch of a page that it missed.
    #[test]
    fn a_shadow_out_of_step_is_found(seed in 1u32..1000, at in 0..PAGE_SIZE, later in 0..PAGE_SIZE) {
        let addr = PageAddr::new(1, 3);
        let mut encoder = Encoder::new(&layout(), MirrorBudget::Full, HashSeed::new(5), 1);
        let mut shadow = Shadow::new();
        let mut page = corpus::noise(seed);
        encoder.page(addr, &page);
        shadow.receive(&encoder.finish());
        page[at] ^= 0x55;
        encoder.page(addr, &page);
        let missed = encoder.finish();
        prop_assert_eq!(missed.len(), 1);
        page[later] ^= 0x1f;
        prop_assert_eq!(encoder.page(addr, &page), PageFate::Coded { patch: true });
        let frame = FrameDecoder::new().decode(&encoder.finish()[0], &layout()).unwrap();
        let error = shadow.known.accept(&frame).unwrap_err();
        prop_assert_eq!(error.addr, addr);
        shadow.known.forget(addr);
        prop_assert!(shadow.known.accept(&frame).is_ok(), "what is not known is not checked");
    }
}

/// As many bytes as one page less than the largest frame of changes holds, in patches of all lengths.
#[test]
fn long_epochs_are_split_into_frames_within_their_limits() {
    let pages = 10_000u64;
    let layout = RamLayout::new(vec![RamBlock { name: "a".into(), len_bytes: pages * 4096 }]).unwrap();
    let mut encoder = Encoder::new(&layout, MirrorBudget::Full, HashSeed::new(5), 1);
    let mut guest: Vec<Page> = (0..pages).map(|i| if i % 5 == 0 { [0; PAGE_SIZE] } else { corpus::noise(7) }).collect();
    for round in 0..3usize {
        encoder.begin_cut();
        for (i, page) in guest.iter_mut().enumerate() {
            let len = if round == 0 { 1 } else { i * round % 1000 };
            let noise = corpus::noise((i + round * 100_000) as u32);
            page[100..100 + len].copy_from_slice(&noise[..len]);
            encoder.page(layout.addr(i as u64).unwrap(), page);
        }
        let frames = encoder.finish();
        let mut decoder = FrameDecoder::new();
        let mut named = 0;
        for bytes in &frames {
            assert!(bytes.len() <= vmsync::codec::MAX_FRAME_BYTES);
            named += decoder.decode(bytes, &layout).unwrap().len();
        }
        assert!(frames.len() > 4 && named > 9000, "{} frames, {named} pages", frames.len());
    }
    let stats = encoder.stats();
    assert!(stats.pages_patched > 10_000 && stats.pages_whole > 8000 && stats.pages_same > 10, "{stats:?}");
}

#[test]
fn costs_are_as_promised() {
    let layout = layout();
    let mut encoder = Encoder::new(&layout, MirrorBudget::Full, HashSeed::new(5), 1);
    let mut cost = |page: &Page| {
        encoder.page(PageAddr::new(0, 3), page);
        encoder.finish().iter().map(Vec::len).sum::<usize>()
    };
    let noise = corpus::noise(1);
    assert_eq!(cost(&noise), 4 + 6 + PAGE_SIZE, "incompressible: nothing but its address is added");
    assert_eq!(cost(&noise), 0);
    let mut counter = noise;
    counter[800] ^= 1;
    assert_eq!(cost(&counter), 20 + 4 + 2 + 3 + 1, "head, tags, address, run, byte");
    assert_eq!(cost(&[0; PAGE_SIZE]), 20 + 2);
    assert_eq!(cost(&[0x77; PAGE_SIZE]), 20 + 2 + 8);
}

#[test]
fn damaged_frames_are_errors_or_other_frames_but_never_panics() {
    let seeds = corpus::frames(&layout());
    let mut random = corpus::Random::new(0x5eed);
    let (mut decoder, mut refused, mut taken) = (FrameDecoder::new(), 0u32, 0u32);
    for round in 0..60_000 {
        let mut bytes = seeds[round % seeds.len()].clone();
        corpus::mutate(&mut bytes, &mut random, &seeds);
        match decoder.decode(&bytes, &layout()) {
            Ok(frame) => {
                taken += 1;
                assert!(frame.memory_bytes() < 1 << 20);
                let mut pages = vec![[1; PAGE_SIZE]; PAGES as usize];
                apply(&frame, &mut pages);
                let _ = KnownPages::zero(&layout()).accept(&frame);
            }
            Err(_) => refused += 1,
        }
    }
    assert!(refused > 20_000 && taken > 500, "{refused} refused, {taken} taken");
}

#[test]
fn a_corpus_of_frames_is_decoded_as_ever() {
    for (name, bytes, expected) in corpus::stored() {
        let found = match FrameDecoder::new().decode(&bytes, &layout()) {
            Ok(frame) => format!("{} pages", frame.len()),
            Err(error) => error.to_string(),
        };
        assert_eq!(found, expected, "{name}");
    }
}
