//! Sending pages that were read while the guest ran.

use super::peer::Reading;
use super::{ReadId, Source, SourceEffect};
use crate::batch::PageBatch;
use crate::codec::Encoder;
use crate::message::KIND_PAGES;
use crate::units::{Epoch, PeerId, Term};
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
        let mut raw_bytes = 0;
        for (addr, page) in pages.iter() {
            let Ok(index) = asked.pages.binary_search(&addr) else { continue };
            if std::mem::replace(&mut done[index], true) {
                continue;
            }
            // Dirtied since it was asked for: it is pending again and goes out with a later read.
            if peer.pending.contains(addr) {
                continue;
            }
            // From here on the peer holds what was read, sent or not.
            peer.set_apart(addr, self.encoder.is_previous(addr, page) == Some(false));
            if peer.filter.as_ref().is_some_and(|filter| filter.peer_has(addr, page, self.seed)) {
                continue;
            }
            self.encoder.whole(addr, page);
            raw_bytes += page.len() as u64;
            peer.open.insert_known(&[addr]);
            if let Some(filter) = &mut peer.filter {
                filter.sent(addr);
            }
        }
        self.totals.raw_bytes += raw_bytes;
        for message in messages(&mut self.encoder, self.config.term, self.last_epoch) {
            peer.send_chained(&message, effects);
        }
        // What could not be read is asked for again.
        for (addr, _) in asked.pages.iter().zip(done).filter(|(_, done)| !done) {
            peer.pending.insert_known(&[*addr]);
        }
        self.pump(id, effects);
    }
}

/// Turns what the encoder has made into `Pages` messages.
pub(super) fn messages(encoder: &mut Encoder, term: Term, epoch: Epoch) -> Vec<Encoded> {
    let message = |frame: &Vec<u8>| {
        encode_with(term, epoch, |out| {
            out.extend_from_slice(frame);
            KIND_PAGES
        })
    };
    let frames = encoder.finish();
    let messages = frames.iter().map(message).collect();
    encoder.reuse(frames);
    messages
}
