//! What a source knows about one peer.

use std::collections::VecDeque;
use std::sync::Arc;

use super::{ReadId, SourceEffect, SourceLimits};
use crate::codec::is_zero;
use crate::hashes::{HashSeed, HashTable, hash_page};
use crate::inbound::Sent;
use crate::layout::RamLayout;
use crate::page_set::PageSet;
use crate::units::{Epoch, Millis, Page, PageAddr, PeerId};
use crate::wire::{Chain, Encoded};

#[derive(Debug)]
pub(super) struct Peer {
    pub(super) id: PeerId,
    pub(super) phase: Phase,
    /// Pages whose contents at the peer, once all that was sent has arrived, may differ from the guest's.
    pub(super) pending: PageSet,
    /// Pages sent since the last Commit sent: lost with the connection.
    pub(super) open: PageSet,
    /// Epochs sent and not acknowledged, oldest first, each with what was sent for it: lost with the connection
    /// unless the peer comes back with that epoch. Kept while disconnected, to find out.
    pub(super) in_flight: VecDeque<InFlight>,
    /// Pages of which the mirror's contents may not be the peer's; see [`crate::source`]. May name pages that the
    /// mirror does not hold. Empty while streaming.
    pub(super) apart: PageSet,
    /// Epoch of the last device state sent on this connection.
    pub(super) state_of: Option<Epoch>,
    /// It said that it is out of step: its image has to be compared page by page.
    pub(super) distrusted: bool,
    /// The live read that is under way; its pages are neither in `pending` nor sent.
    pub(super) reading: Option<Reading>,
    /// What the peer's image held when the session began, while that is worth comparing with.
    pub(super) filter: Option<Filter>,
    pub(super) chain: Chain,
    /// Newest epoch known to be committed there, and when it was cut.
    pub(super) committed: Option<(Epoch, Millis)>,
    /// Join threshold now; see [`SourceLimits::join_pages`].
    pub(super) join_pages: u64,
    /// Pages to be read before this pass counts as done.
    pub(super) pass_left: u64,
    pub(super) unsent_bytes: u64,
    pub(super) wire_bytes_total: u64,
    /// Why there is no session, if the peer refused the last one or it was closed from here.
    pub(super) reason: String,
    /// When the peer was last heard, or took bytes from us.
    pub(super) alive_at: Millis,
    /// When something came from it.
    pub(super) heard_at: Millis,
    pub(super) pinged: bool,
    /// Frames for the guest that it keeps.
    pub(super) inbound: Sent,
}

/// A live read under way.
#[derive(Debug)]
pub(super) struct Reading {
    pub(super) id: ReadId,
    /// Sorted.
    pub(super) pages: Vec<PageAddr>,
}

#[derive(Debug)]
pub(super) enum Phase {
    Disconnected,
    Handshaking { since: Millis },
    Hashing(HashTable),
    CatchUp,
    Streaming,
}

#[derive(Debug)]
pub(super) struct InFlight {
    pub(super) epoch: Epoch,
    pub(super) cut_at: Millis,
    pub(super) pages: Arc<PageSet>,
    /// Where it ends in all that was sent to the peer, and when that much had been handed to the driver's kernel.
    pub(super) ends_at: u64,
    pub(super) handed_over: Option<Millis>,
}

/// Pages that need not be sent because the peer's image holds them already.
///
/// Why leaving them out is right: a page left out had, at some moment after the session began, the contents that
/// the peer's image has; nothing was sent for it before, so the peer still has them. Whatever is written to it later
/// is dirty at the next cut, puts it back into `pending`, and is compared or sent again.
#[derive(Debug)]
pub(super) enum Filter {
    /// The image was all zero; these pages were not sent since.
    Zero(PageSet),
    /// Hashes of the image; pages sent since are unknown.
    Hashes(HashTable),
}

impl Filter {
    pub(super) fn peer_has(&self, addr: PageAddr, page: &Page, seed: HashSeed) -> bool {
        match self {
            Self::Zero(untouched) => is_zero(page) && untouched.contains(addr),
            Self::Hashes(table) => table.get(addr).is_some_and(|hash| hash == hash_page(seed, page)),
        }
    }

    /// The page was sent: what the image held there before no longer counts, or a page that went back to its old
    /// contents would be left out although the peer has others by now.
    pub(super) fn sent(&mut self, addr: PageAddr) {
        match self {
            Self::Zero(untouched) => {
                untouched.remove(addr);
            }
            Self::Hashes(table) => table.forget(addr),
        }
    }
}

impl Peer {
    pub(super) fn new(id: PeerId, layout: &RamLayout, limits: &SourceLimits) -> Self {
        Self {
            id,
            phase: Phase::Disconnected,
            pending: PageSet::full(layout),
            open: PageSet::new(layout),
            in_flight: VecDeque::new(),
            apart: PageSet::full(layout),
            state_of: None,
            distrusted: false,
            reading: None,
            filter: None,
            chain: Chain::default(),
            committed: None,
            join_pages: limits.join_pages.min(limits.join_pages_max),
            pass_left: 0,
            unsent_bytes: 0,
            wire_bytes_total: 0,
            reason: String::new(),
            alive_at: Millis::new(0),
            heard_at: Millis::new(0),
            pinged: false,
            inbound: Sent::default(),
        }
    }

    pub(super) fn is_connected(&self) -> bool {
        !matches!(self.phase, Phase::Disconnected)
    }

    pub(super) fn is_streaming(&self) -> bool {
        matches!(self.phase, Phase::Streaming)
    }

    pub(super) fn is_catching_up(&self) -> bool {
        matches!(self.phase, Phase::CatchUp)
    }

    /// Pages that must reach the peer before it equals the last cut.
    pub(super) fn lacking(&self) -> u64 {
        self.pending.len() + self.reading.as_ref().map_or(0, |r| r.pages.len() as u64)
    }

    /// Room for another epoch.
    pub(super) fn has_room(&self, limits: &SourceLimits) -> bool {
        self.in_flight.len() < limits.in_flight_epochs && self.unsent_bytes < limits.unsent_bytes
    }

    /// Could join at the next cut.
    pub(super) fn wants_join(&self, limits: &SourceLimits) -> bool {
        // Half of the limit, so that the joining epoch itself does not throw the peer back at once.
        self.is_catching_up()
            && self.lacking() <= self.join_pages
            && self.has_room(limits)
            && self.unsent_bytes <= limits.unsent_bytes / 2
    }

    pub(super) fn set_apart(&mut self, addr: PageAddr, apart: bool) {
        if apart {
            self.apart.insert_known(&[addr]);
        } else {
            self.apart.remove(addr);
        }
    }

    /// Queues a message that is not part of the chain.
    pub(super) fn send(&mut self, message: &Encoded, effects: &mut Vec<SourceEffect>) {
        let len = message.bytes.len() as u64;
        self.unsent_bytes += len;
        self.wire_bytes_total += len;
        effects.push(SourceEffect::Send { peer: self.id.clone(), bytes: message.bytes.clone() });
    }

    /// The driver has handed on so many more bytes.
    pub(super) fn written(&mut self, now: Millis, bytes: u64) {
        // Saturating: a driver may still report bytes of a connection that was replaced.
        self.unsent_bytes = self.unsent_bytes.saturating_sub(bytes);
        self.alive_at = now;
        let position = self.wire_bytes_total - self.unsent_bytes;
        for epoch in self.in_flight.iter_mut().filter(|epoch| epoch.ends_at <= position) {
            epoch.handed_over.get_or_insert(now);
        }
    }

    /// Since when nothing came from it, although all of an epoch is on its way: what was written later proves nothing.
    pub(super) fn deaf_since(&self) -> Option<Millis> {
        self.in_flight.front()?.handed_over.map(|at| at.max(self.heard_at))
    }

    /// Queues a `Pages` or `DeviceState` message.
    pub(super) fn send_chained(&mut self, message: &Encoded, effects: &mut Vec<SourceEffect>) {
        self.chain.add(message.checksum);
        self.send(message, effects);
    }

    /// A live read's pages go back to `pending`.
    pub(super) fn abandon_read(&mut self) {
        if let Some(reading) = self.reading.take() {
            self.pending.insert_known(&reading.pages);
        }
    }

    /// Streaming is over for now: these pages of the cut were not sent.
    pub(super) fn fall_back(&mut self, limits: &SourceLimits) {
        if self.is_streaming() {
            self.phase = Phase::CatchUp;
            self.begin_passes(limits);
        }
    }

    pub(super) fn begin_passes(&mut self, limits: &SourceLimits) {
        self.join_pages = limits.join_pages.min(limits.join_pages_max);
        self.pass_left = self.pending.len();
    }

    /// The connection is gone, and with it everything that no Commit ended.
    pub(super) fn lose_connection(&mut self) {
        self.abandon_read();
        self.pending.union_with(&self.open);
        self.apart.union_with(&self.open);
        self.open.clear();
        self.state_of = None;
        self.phase = Phase::Disconnected;
        self.filter = None;
        self.chain = Chain::default();
        self.unsent_bytes = 0;
        self.inbound = Sent::default();
        self.pinged = false;
    }

    /// Removes all epochs up to `epoch` from those in flight; false if `epoch` is not among them.
    pub(super) fn acknowledge(&mut self, epoch: Epoch) -> bool {
        let Some(position) = self.in_flight.iter().position(|e| e.epoch == epoch) else { return false };
        if let Some(newest) = self.in_flight.drain(..=position).next_back() {
            self.committed = Some((newest.epoch, newest.cut_at));
        }
        true
    }
}
