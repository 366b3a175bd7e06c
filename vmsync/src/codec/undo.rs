//! The way back: what leads from the contents that pages have to those that they had.
//!
//! Frames like all others, of which each names its pages once. Made on a shadow's host before an epoch is applied, so
//! it must cost less than the epoch did: nothing is remembered, and what changed little goes as a patch.

use super::diff::{Difference, PatchRoom};
use super::encoder::{PATCH_LIMIT_BYTES, one_word};
use super::sum::{page_sum, tag};
use super::writer::FrameWriter;
use crate::units::{Page, PageAddr};

/// zstd's level for whole pages: nobody waits for it, but a shadow's host has many guests.
const LEVEL: i32 = 1;

/// Codes former contents of pages into frames.
#[derive(Debug)]
pub struct UndoEncoder {
    writer: FrameWriter,
    room: Box<PatchRoom>,
}

impl Default for UndoEncoder {
    fn default() -> Self {
        Self { writer: FrameWriter::new(LEVEL), room: Box::default() }
    }
}

impl UndoEncoder {
    /// A page that will hold `newer` and held `former`; each page at most once.
    pub fn page(&mut self, addr: PageAddr, mut newer: Page, former: &Page) {
        if newer == *former {
            return;
        }
        match one_word(former) {
            Some(0) => return self.writer.zero(addr),
            Some(word) => return self.writer.fill(addr, word),
            None => {}
        }
        let mut sum = page_sum(&newer);
        let before = tag(sum);
        match self.room.advance(&mut newer, former, &mut sum, PATCH_LIMIT_BYTES) {
            Difference::None => {}
            Difference::Sparse => self.writer.patch(addr, &self.room, before, tag(sum)),
            Difference::Dense => drop(self.writer.data(addr, former)),
        }
    }

    /// Frames that are full, so that a large epoch needs no more memory than a small one.
    pub fn full_frames(&mut self) -> Vec<Vec<u8>> {
        self.writer.full_frames()
    }

    /// Ends what was begun, and gives all frames since the last call.
    pub fn finish(&mut self) -> Vec<Vec<u8>> {
        self.writer.finish()
    }
}
