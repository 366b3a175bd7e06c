//! The delta codec as agents use it.

use std::collections::BTreeMap;

use vmsync::codec::{Encoder, FETCH_AHEAD, FrameDecoder, KnownPages, MirrorBudget, PageContent, fetch_lines};
use vmsync::hashes::HashSeed;
use vmsync::{PAGE_SIZE, Page, PageAddr, RamLayout};

use super::recording::{Recording, staged};
use super::{Measured, cpu_s};
use crate::capture::advice::{huge_pages, in_place};

/// Codes all epochs, decodes and applies them, and compares what came out.
pub(super) fn pass(recording: &Recording, budget: MirrorBudget, level: i32) -> Measured {
    let mut measured = Measured::NOTHING;
    let mut encoder = Encoder::new(&recording.layout, budget, HashSeed::new(7), level);
    encoder.set_advice(huge_pages);
    encoder.set_mirror(budget);
    let mut shadow = Shadow::new(recording);
    // As the agent has it for the pages of its cuts; the first epoch, all of memory, is read in parts there.
    let longest = recording.epochs[1..].iter().map(|epoch| epoch.pages.bytes().len()).max();
    let (mut buffer, mut first) = (Vec::with_capacity(longest.unwrap_or(0)), Vec::new());
    in_place(buffer.spare_capacity_mut());
    for (i, epoch) in recording.epochs.iter().enumerate() {
        let mut frames = Vec::new();
        let buffer = if i == 0 { &mut first } else { &mut buffer };
        let pages = staged(epoch, buffer);
        let encode_s = cpu_s(|| {
            encoder.begin_cut();
            let mut soon = pages.iter().skip(FETCH_AHEAD);
            for (addr, page) in pages.iter() {
                soon.next().into_iter().for_each(|(addr, page)| encoder.fetch(addr, page));
                encoder.page(addr, page);
            }
            frames = encoder.finish();
        });
        // As they came off a connection.
        let received = frames.clone();
        let decode_s = cpu_s(|| shadow.receive(received));
        *buffer = pages.into_parts().1;
        if i > 0 {
            measured.encode_s += encode_s;
            measured.decode_s += decode_s;
            measured.raw_bytes += epoch.pages.bytes().len() as u64;
            measured.packed_bytes += frames.iter().map(|frame| frame.len() as u64).sum::<u64>();
        }
        encoder.reuse(frames);
    }
    shadow.check(recording);
    measured
}

/// The memory of a shadow: frames are checked, decoded and applied as an agent does it.
struct Shadow {
    layout: RamLayout,
    memory: Vec<u8>,
    known: KnownPages,
    decoder: FrameDecoder,
}

impl Shadow {
    fn new(recording: &Recording) -> Self {
        let layout = recording.layout.clone();
        let known = KnownPages::zero(&layout);
        Self { layout, memory: recording.memory(), known, decoder: FrameDecoder::new() }
    }

    fn receive(&mut self, frames: Vec<Vec<u8>>) {
        let memory = self.memory.as_chunks_mut::<PAGE_SIZE>().0;
        for bytes in frames {
            let frame = self.decoder.decode_owned(bytes, &self.layout).expect("own frame");
            self.known.accept(&frame).expect("in step");
            let index = |addr| self.layout.linear(addr).expect("checked") as usize;
            for (addr, content, soon) in frame.writes() {
                soon.into_iter().for_each(|(addr, lines)| fetch_lines(&memory[index(addr)], lines));
                let page = &mut memory[index(addr)];
                match content {
                    PageContent::Data(data) => *page = *data,
                    other => other.apply(page),
                }
            }
            self.decoder.reuse(frame);
        }
    }

    /// A figure of a coder that loses something is worth nothing.
    fn check(&self, recording: &Recording) {
        let last: BTreeMap<PageAddr, &Page> = recording.epochs.iter().flat_map(|epoch| epoch.pages.iter()).collect();
        let memory = self.memory.as_chunks::<PAGE_SIZE>().0;
        for (addr, page) in last {
            assert!(memory[self.layout.linear(addr).expect("checked") as usize] == *page, "{addr} differs");
        }
    }
}
