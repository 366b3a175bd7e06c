//! Sending pages that were read while the guest ran.

use super::{ReadId, Source, SourceEffect};
use crate::batch::PageBatch;
use crate::frame::FrameEncoder;
use crate::message::KIND_PAGES;
use crate::page_set::PageSet;
use crate::units::{Epoch, Page, PageAddr, PeerId, Term};
use crate::wire::{Encoded, encode_with};

impl Source {
    /// Starts the next live read of a peer that catches up, if there is something to read and room to send it.
    pub(super) fn pump(&mut self, id: &PeerId, effects: &mut Vec<SourceEffect>) {
        let read = self.new_read();
        let limits = &self.config.limits;
        let Some(peer) = self.peers.get_mut(id) else { return };
        if !peer.is_catching_up() || peer.reading.is_some() || peer.unsent_bytes > limits.unsent_bytes / 2 {
            return;
        }
        if peer.pending.len() <= peer.join_pages {
            // Few enough for a cut's extras. Reading them before would be for nothing if they are hot.
            return;
        }
        if peer.pass_left == 0 {
            // A whole pass, and still too many: the guest dirties about as fast as we send. Accept more in a pause.
            peer.join_pages = (peer.join_pages * 2).min(limits.join_pages_max);
            peer.pass_left = peer.pending.len();
        }
        let pages = peer.pending.take_next(limits.live_batch_pages);
        peer.pass_left = peer.pass_left.saturating_sub(pages.len() as u64);
        let mut reading = PageSet::new(&self.config.layout);
        for addr in &pages {
            insert(&mut reading, *addr);
        }
        peer.reading = Some((read, reading));
        effects.push(SourceEffect::ReadLive { peer: id.clone(), read, pages });
    }

    pub(super) fn live_read(&mut self, id: &PeerId, read: ReadId, pages: &PageBatch, effects: &mut Vec<SourceEffect>) {
        let Some(peer) = self.peers.get_mut(id) else { return };
        // An answer to a read that was abandoned: its pages are pending again, or came with the joining cut.
        let Some((_, mut asked)) = peer.reading.take_if(|(current, _)| *current == read) else { return };
        let mut frames = Frames::new(&mut self.encoder, self.config.term, self.last_epoch);
        for (addr, page) in pages.iter() {
            if !asked.remove(addr) {
                continue;
            }
            // Dirtied since it was asked for: it is pending again and goes out with a later read.
            if peer.pending.contains(addr) {
                continue;
            }
            if peer.filter.as_ref().is_some_and(|filter| filter.peer_has(addr, page, self.seed)) {
                continue;
            }
            frames.push(addr, page);
            insert(&mut peer.open, addr);
            if let Some(filter) = &mut peer.filter {
                filter.sent(addr);
            }
        }
        let frames = frames.finish();
        self.totals.raw_bytes += frames.raw_bytes;
        for message in &frames.messages {
            peer.send_chained(message, effects);
        }
        // What could not be read is asked for again.
        peer.pending.union_with(&asked);
        self.pump(id, effects);
    }
}

/// Adds a page of which it is known that the layout has it.
pub(super) fn insert(set: &mut PageSet, addr: PageAddr) {
    let inserted = set.insert(addr);
    debug_assert!(inserted.is_ok(), "{addr} was checked before");
}

/// Packs pages into `Pages` messages.
pub(super) struct Frames<'a> {
    encoder: &'a mut FrameEncoder,
    term: Term,
    epoch: Epoch,
    done: EncodedFrames,
}

#[derive(Default)]
pub(super) struct EncodedFrames {
    pub(super) messages: Vec<Encoded>,
    pub(super) raw_bytes: u64,
}

impl<'a> Frames<'a> {
    pub(super) fn new(encoder: &'a mut FrameEncoder, term: Term, epoch: Epoch) -> Self {
        Self { encoder, term, epoch, done: EncodedFrames::default() }
    }

    pub(super) fn push(&mut self, addr: PageAddr, page: &Page) {
        self.done.raw_bytes += page.len() as u64;
        if !self.encoder.push(addr, page) {
            self.flush();
            let pushed = self.encoder.push(addr, page);
            debug_assert!(pushed, "a frame just begun has room");
        }
    }

    pub(super) fn finish(mut self) -> EncodedFrames {
        self.flush();
        self.done
    }

    fn flush(&mut self) {
        if !self.encoder.is_empty() {
            let encoder = &mut *self.encoder;
            self.done.messages.push(encode_with(self.term, self.epoch, |out| {
                encoder.finish(out);
                KIND_PAGES
            }));
        }
    }
}
