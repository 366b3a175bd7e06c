//! Peers come, greet, refuse, fall silent and go.

use super::peer::{Filter, Peer, Phase};
use super::{CloseReason, Source, SourceEffect};
use crate::hashes::HashTable;
use crate::inbound;
use crate::message::{Hello, ImageState, KIND_INBOUND, RefuseCode, SourceBody, TargetBody, TargetMessage};
use crate::page_set::PageSet;
use crate::units::{Epoch, Millis, PageAddr, PageIndex, PeerId, Term};
use crate::wire::{Encoded, WireError, encode, encode_with};

impl Source {
    pub(super) fn peer_added(&mut self, id: PeerId) {
        let (layout, limits) = (&self.config.layout, &self.config.limits);
        self.peers.entry(id.clone()).or_insert_with(|| Peer::new(id, layout, limits));
    }

    pub(super) fn peer_removed(&mut self, id: &PeerId, effects: &mut Vec<SourceEffect>) {
        self.close(id, CloseReason::Removed, effects);
        if let Some(peer) = self.peers.remove(id) {
            self.totals.wire_bytes += peer.wire_bytes_total;
        }
    }

    pub(super) fn connected(&mut self, now: Millis, id: &PeerId, effects: &mut Vec<SourceEffect>) {
        let config = &self.config;
        let Some(peer) = self.peers.get_mut(id) else {
            effects.push(SourceEffect::Close { peer: id.clone(), reason: CloseReason::Removed });
            return;
        };
        // The driver has one connection a peer: an earlier one is gone, even if nobody said so.
        if peer.is_connected() {
            peer.lose_connection();
        }
        let hello = Hello {
            lineage: config.lineage,
            guest: config.guest,
            domain: config.domain.clone(),
            source_host: config.host.clone(),
            layout: config.layout.clone(),
            description: config.description.clone(),
        };
        peer.phase = Phase::Handshaking { since: now };
        peer.alive_at = now;
        peer.reason.clear();
        peer.send(&encode(config.term, self.last_epoch, &SourceBody::Hello(Box::new(hello))), effects);
        self.verify_peer_gone(id, effects);
    }

    pub(super) fn disconnected(&mut self, id: &PeerId, effects: &mut Vec<SourceEffect>) {
        if let Some(peer) = self.peers.get_mut(id)
            && peer.is_connected()
        {
            peer.lose_connection();
            peer.reason = "the connection was lost".into();
            self.verify_peer_gone(id, effects);
        }
    }

    pub(super) fn unreadable(&mut self, id: &PeerId, error: WireError, effects: &mut Vec<SourceEffect>) {
        if matches!(error, WireError::Version { .. }) {
            let text = error.to_string();
            effects.push(SourceEffect::PeerRefused { peer: id.clone(), code: RefuseCode::Version, text });
        }
        self.close(id, CloseReason::Unreadable(error), effects);
    }

    pub(super) fn written(&mut self, now: Millis, id: &PeerId, bytes: u64, effects: &mut Vec<SourceEffect>) {
        if let Some(peer) = self.peers.get_mut(id)
            && peer.is_connected()
        {
            peer.written(now, bytes);
            self.pump(id, effects);
        }
    }

    pub(super) fn received(
        &mut self,
        now: Millis,
        id: &PeerId,
        message: TargetMessage,
        effects: &mut Vec<SourceEffect>,
    ) {
        let Some(peer) = self.peers.get_mut(id).filter(|p| p.is_connected()) else { return };
        (peer.alive_at, peer.heard_at) = (now, now);
        peer.pinged = false;
        let result = match message.body {
            TargetBody::Welcome(image) => self.welcome(id, image, effects),
            TargetBody::Ack => self.ack(id, message.epoch, effects),
            TargetBody::Hashes { start, hashes } => self.hashes(id, message.epoch, start, &hashes),
            TargetBody::HashesEnd { complete, device_state_hash } => {
                self.hashes_end(id, message.epoch, complete, device_state_hash, effects)
            }
            TargetBody::Refuse { code, text, known_term } => {
                self.refused(id, code, text, known_term, effects);
                Ok(())
            }
            TargetBody::Pong => Ok(()),
            TargetBody::GaveUp => {
                peer.committed = None;
                effects.push(SourceEffect::CommitLost { peer: id.clone() });
                Ok(())
            }
        };
        match result {
            Ok(()) => self.pump(id, effects),
            Err(what) => self.close(id, CloseReason::Protocol(what), effects),
        }
    }

    /// Frames for the guest go to those who follow, in the order of their streams; what came together goes together.
    pub(super) fn inbound(&mut self, mut frames: Vec<Vec<u8>>, effects: &mut Vec<SourceEffect>) {
        frames.retain(|frame| inbound::fits(frame.len()));
        let (limits, term, epoch) = (&self.config.limits, self.config.term, self.last_epoch);
        // Who has been in step for as long has as much room: for them it is encoded once.
        let mut encoded: Option<(usize, Encoded)> = None;
        for peer in self.peers.values_mut().filter(|peer| peer.is_streaming() && peer.has_room(limits)) {
            let taken = peer.inbound.add(&frames);
            if taken == 0 {
                continue;
            }
            encoded = encoded.filter(|(frames, _)| *frames == taken);
            let (_, message) = encoded.get_or_insert_with(|| {
                let write = |out: &mut Vec<u8>| {
                    inbound::write(&frames[..taken], out);
                    KIND_INBOUND
                };
                (taken, encode_with(term, epoch, write))
            });
            peer.send(message, effects);
        }
    }

    pub(super) fn tick(&mut self, now: Millis, effects: &mut Vec<SourceEffect>) {
        let ids: Vec<PeerId> = self.peers.keys().cloned().collect();
        for id in ids {
            if let Some(reason) = self.overdue(now, &id, effects) {
                self.close(&id, reason, effects);
            } else {
                self.pump(&id, effects);
            }
        }
        self.verify_tick(now, effects);
    }

    /// Pings a peer that is quiet; says why one must be given up.
    fn overdue(&mut self, now: Millis, id: &PeerId, effects: &mut Vec<SourceEffect>) -> Option<CloseReason> {
        let limits = &self.config.limits;
        let peer = self.peers.get_mut(id)?;
        match peer.phase {
            Phase::Disconnected => return None,
            Phase::Handshaking { since } if now.since(since) > limits.welcome => {
                return Some(CloseReason::NoWelcome(now.since(since)));
            }
            Phase::Handshaking { .. } => return None,
            Phase::Hashing(_) | Phase::CatchUp | Phase::Streaming => {}
        }
        let quiet = now.since(peer.alive_at);
        let deaf = peer.deaf_since().map_or(quiet, |at| now.since(at).max(quiet));
        if deaf > limits.silence {
            return Some(CloseReason::Silent(deaf));
        }
        if quiet > limits.ping_after && !peer.pinged {
            peer.pinged = true;
            peer.send(&encode(self.config.term, self.last_epoch, &SourceBody::Ping), effects);
        }
        None
    }

    fn welcome(&mut self, id: &PeerId, image: ImageState, effects: &mut Vec<SourceEffect>) -> Result<(), &'static str> {
        let config = &self.config;
        let Some(peer) = self.peers.get_mut(id) else { return Ok(()) };
        if !matches!(peer.phase, Phase::Handshaking { .. }) {
            return Err("Welcome without a greeting");
        }
        let ours = match image {
            ImageState::Committed { lineage, epoch } if lineage == config.lineage && !peer.distrusted => Some(epoch),
            _ => None,
        };
        peer.distrusted = false;
        let acked = peer.committed.map(|(epoch, _)| epoch);
        if let Some(epoch) = ours
            && (acked == Some(epoch) || peer.acknowledge(epoch))
        {
            // The image is exactly that epoch. What was sent for later ones is lost; what was sent and not
            // committed went to `pending` when the connection was lost.
            for lost in peer.in_flight.drain(..) {
                peer.pending.union_with(&lost.pages);
                peer.apart.union_with(&lost.pages);
            }
            if acked != Some(epoch) {
                effects.push(SourceEffect::Committed { peer: id.clone(), epoch });
            }
            peer.phase = Phase::CatchUp;
            peer.begin_passes(&config.limits);
            return Ok(());
        }
        // Nothing of ours, or an epoch we do not know: its pages tell what the image is worth.
        if peer.committed.take().is_some() {
            effects.push(SourceEffect::CommitLost { peer: id.clone() });
        }
        peer.in_flight.clear();
        peer.pending = PageSet::full(&config.layout);
        peer.apart = PageSet::full(&config.layout);
        if image == ImageState::Zero {
            peer.filter = Some(Filter::Zero(PageSet::full(&config.layout)));
            peer.phase = Phase::CatchUp;
            peer.begin_passes(&config.limits);
        } else {
            let request = encode(config.term, self.last_epoch, &SourceBody::HashRequest { seed: self.seed });
            peer.send(&request, effects);
            peer.phase = Phase::Hashing(HashTable::new(&config.layout));
        }
        Ok(())
    }

    fn ack(&mut self, id: &PeerId, epoch: Epoch, effects: &mut Vec<SourceEffect>) -> Result<(), &'static str> {
        let Some(peer) = self.peers.get_mut(id) else { return Ok(()) };
        if matches!(peer.phase, Phase::Handshaking { .. }) || !peer.acknowledge(epoch) {
            return Err("acknowledged an epoch that is not in flight");
        }
        effects.push(SourceEffect::Committed { peer: id.clone(), epoch });
        Ok(())
    }

    fn hashes(&mut self, id: &PeerId, epoch: Epoch, start: PageAddr, hashes: &[u64]) -> Result<(), &'static str> {
        let end = u64::from(start.page.get()) + hashes.len() as u64;
        if end > self.config.layout.block_pages(start.block) {
            return Err("sent hashes of pages that do not exist");
        }
        let pages = (start.page.get()..).map(|page| PageAddr { block: start.block, page: PageIndex::new(page) });
        let Some(peer) = self.peers.get_mut(id) else { return Ok(()) };
        if let Phase::Hashing(table) = &mut peer.phase {
            pages.zip(hashes).for_each(|(addr, hash)| {
                table.set(addr, *hash);
            });
            Ok(())
        } else {
            self.verify_hashes(id, epoch, pages.zip(hashes.iter().copied()))
        }
    }

    fn hashes_end(
        &mut self,
        id: &PeerId,
        epoch: Epoch,
        complete: bool,
        device_state_hash: u64,
        effects: &mut Vec<SourceEffect>,
    ) -> Result<(), &'static str> {
        let Some(peer) = self.peers.get_mut(id) else { return Ok(()) };
        match std::mem::replace(&mut peer.phase, Phase::CatchUp) {
            Phase::Hashing(table) => {
                peer.filter = Some(Filter::Hashes(table));
                peer.begin_passes(&self.config.limits);
                Ok(())
            }
            other => {
                peer.phase = other;
                self.verify_hashes_end(id, epoch, complete, device_state_hash, effects)
            }
        }
    }

    fn refused(
        &mut self,
        id: &PeerId,
        code: RefuseCode,
        text: String,
        known_term: Term,
        effects: &mut Vec<SourceEffect>,
    ) {
        if code == RefuseCode::OutOfStep
            && let Some(peer) = self.peers.get_mut(id)
        {
            peer.distrusted = true;
        }
        let stale = matches!(code, RefuseCode::StaleTerm | RefuseCode::Promoted);
        if stale && known_term > self.config.term {
            effects.push(SourceEffect::Superseded { peer: id.clone(), newer_term: known_term });
        } else {
            effects.push(SourceEffect::PeerRefused { peer: id.clone(), code, text: text.clone() });
        }
        self.close(id, CloseReason::Refused(text), effects);
    }

    /// Closes a peer's connection, as if it had been lost.
    pub(super) fn close(&mut self, id: &PeerId, reason: CloseReason, effects: &mut Vec<SourceEffect>) {
        let Some(peer) = self.peers.get_mut(id) else { return };
        if peer.is_connected() {
            peer.lose_connection();
            peer.reason = reason.to_string();
            effects.push(SourceEffect::Close { peer: id.clone(), reason });
            self.verify_peer_gone(id, effects);
        }
    }
}
