//! Sending pages that were read while the guest ran.

use super::peer::Reading;
use super::{ReadId, Source, SourceEffect};
use crate::batch::PageBatch;
use crate::frame::FrameEncoder;
use crate::message::KIND_PAGES;
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
        let mut pages = peer.pending.take_next(limits.live_batch_pages);
        // Sorted but where the set's cursor went around its end.
        pages.sort_unstable();
        peer.pass_left = peer.pass_left.saturating_sub(pages.len() as u64);
        peer.reading = Some(Reading { id: read, pages: pages.clone() });
        effects.push(SourceEffect::ReadLive { peer: id.clone(), read, pages });
    }

    pub(super) fn live_read(&mut self, id: &PeerId, read: ReadId, pages: &PageBatch, effects: &mut Vec<SourceEffect>) {
        let Some(peer) = self.peers.get_mut(id) else { return };
        // An answer to a read that was abandoned: its pages are pending again, or came with the joining cut.
        let Some(asked) = peer.reading.take_if(|r| r.id == read) else { return };
        let mut done = vec![false; asked.pages.len()];
        let mut frames = Frames::new(&mut self.encoder, self.config.term, self.last_epoch);
        for (addr, page) in pages.iter() {
            let Ok(index) = asked.pages.binary_search(&addr) else { continue };
            if std::mem::replace(&mut done[index], true) {
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
            peer.open.insert_known(&[addr]);
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
        for (addr, _) in asked.pages.iter().zip(done).filter(|(_, done)| !done) {
            peer.pending.insert_known(&[*addr]);
        }
        self.pump(id, effects);
    }
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
