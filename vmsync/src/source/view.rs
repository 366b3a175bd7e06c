//! What a source shows of itself.

use super::Source;
use super::peer::{Peer, Phase};
use crate::units::{Epoch, Millis, PeerId};

/// Totals of a source since it was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SourceTotals {
    /// Bytes of pages before encoding; those sent to several peers at once count once.
    pub raw_bytes: u64,
    /// Bytes handed to the driver for all peers.
    pub wire_bytes: u64,
    /// Cuts with contents.
    pub epochs: u64,
    /// Pages dirty at the last cut or collection.
    pub dirty_pages_last: u64,
    /// Sum of them over `dirty_samples` cuts and collections.
    pub dirty_pages_sum: u64,
    pub dirty_samples: u64,
}

impl SourceTotals {
    /// Mean number of dirty pages a cut or collection.
    pub fn dirty_pages_mean(&self) -> f64 {
        if self.dirty_samples == 0 { 0.0 } else { self.dirty_pages_sum as f64 / self.dirty_samples as f64 }
    }

    pub(super) fn count_dirty(&mut self, pages: u64) {
        self.dirty_pages_last = pages;
        self.dirty_pages_sum = self.dirty_pages_sum.saturating_add(pages);
        self.dirty_samples += 1;
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerState {
    Disconnected,
    /// Connected; lacks more than the next cut can bring.
    Syncing,
    /// Gets each epoch, or a few of them as one when it is slow.
    Following,
}

/// One shadow as its source sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerView {
    pub peer: PeerId,
    pub state: PeerState,
    /// Why it is not connected; empty if it is, or if nothing was tried yet.
    pub reason: String,
    /// Newest epoch of this source that is committed there.
    pub committed: Option<Epoch>,
    /// Age of that epoch's cut.
    pub lag: Option<Millis>,
    /// Pages the peer lacks.
    pub pending_pages: u64,
    /// Epochs sent and not acknowledged.
    pub in_flight_epochs: usize,
    pub unsent_bytes: u64,
    pub wire_bytes_total: u64,
}

impl Source {
    pub fn peer_view(&self, now: Millis, peer: &PeerId) -> Option<PeerView> {
        self.peers.get(peer).map(|p| self.view_of(now, p))
    }

    /// All peers, by name.
    pub fn peer_views(&self, now: Millis) -> Vec<PeerView> {
        self.peers.values().map(|p| self.view_of(now, p)).collect()
    }

    pub fn totals(&self) -> SourceTotals {
        let wire_bytes = self.totals.wire_bytes + self.peers.values().map(|p| p.wire_bytes_total).sum::<u64>();
        SourceTotals { wire_bytes, ..self.totals }
    }

    fn view_of(&self, now: Millis, peer: &Peer) -> PeerView {
        let state = match peer.phase {
            Phase::Disconnected => PeerState::Disconnected,
            Phase::Streaming => PeerState::Following,
            Phase::CatchUp if peer.committed.is_some() && peer.lacking() <= peer.join_pages => PeerState::Following,
            Phase::Handshaking { .. } | Phase::Hashing(_) | Phase::CatchUp => PeerState::Syncing,
        };
        PeerView {
            peer: peer.id.clone(),
            state,
            reason: peer.reason.clone(),
            committed: peer.committed.map(|(epoch, _)| epoch),
            lag: peer.committed.map(|(_, cut_at)| now.since(cut_at)),
            pending_pages: peer.lacking(),
            in_flight_epochs: peer.in_flight.len(),
            unsent_bytes: peer.unsent_bytes,
            wire_bytes_total: peer.wire_bytes_total,
        }
    }
}
