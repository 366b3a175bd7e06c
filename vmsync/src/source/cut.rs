//! Cuts: when to make one, what it must hold, and who gets what of it.

use std::sync::Arc;

use super::catch_up::{EncodedFrames, Frames};
use super::peer::{InFlight, Peer, Phase};
use super::{Cut, CutPlan, Source, SourceAlarm, SourceEffect};
use crate::device_state::{DeviceState, MAX_DEVICE_STATE_BYTES};
use crate::hashes::hash_page;
use crate::message::{KIND_DEVICE_STATE, SourceBody};
use crate::page_set::PageSet;
use crate::units::{Millis, PeerId};
use crate::wire::{Encoded, encode, encode_with};

/// Of one cut: what goes to all peers.
struct Common {
    /// Dirty pages whose contents differ from those of the cut before.
    pages: Arc<PageSet>,
    frames: EncodedFrames,
    device_state: Encoded,
}

impl Source {
    /// Asked once for each cut that is due, just before it would be made.
    pub fn cut_plan(&mut self) -> CutPlan {
        let plan = self.plan();
        if plan == CutPlan::Skip {
            self.skipped_plans = self.skipped_plans.saturating_add(1);
        }
        plan
    }

    fn plan(&self) -> CutPlan {
        let limits = &self.config.limits;
        let streaming = self.peers.values().any(|p| p.is_streaming() && p.has_room(limits));
        let mut joining = self.peers.values().filter(|p| p.wants_join(limits)).peekable();
        if !streaming && joining.peek().is_none() {
            return CutPlan::Skip;
        }
        if self.skipped_plans > limits.skipped_plans {
            // Nobody knows how much is dirty by now; copying it all could stop the guest for long. Find out first.
            return CutPlan::Collect;
        }
        let mut extras = PageSet::new(&self.config.layout);
        for peer in joining {
            if extras.is_empty() || extras.len() + peer.lacking() <= limits.join_pages_max {
                extras.union_with(&peer.pending);
                if let Some(reading) = &peer.reading {
                    extras.insert_known(&reading.pages);
                }
            }
        }
        CutPlan::Cut { extras }
    }

    /// Pages became dirty and nobody has their contents.
    pub(super) fn collected(&mut self, dirty: &PageSet, effects: &mut Vec<SourceEffect>) {
        self.skipped_plans = 0;
        self.totals.count_dirty(dirty.len());
        for addr in dirty.iter() {
            self.cut_hashes.forget(addr);
        }
        if let Some(verify) = &mut self.verify {
            verify.forget(dirty);
        }
        for peer in self.peers.values_mut() {
            peer.pending.union_with(dirty);
            peer.fall_back(&self.config.limits);
        }
        self.pump_all(effects);
        self.verify_pump(effects);
    }

    pub(super) fn cut(&mut self, now: Millis, cut: Cut, effects: &mut Vec<SourceEffect>) -> Result<(), SourceAlarm> {
        let covered = self.check(&cut)?;
        self.last_epoch = cut.epoch;
        if !cut.dirty.is_subset(&covered) {
            self.collected(&cut.dirty, effects);
            return Ok(());
        }
        self.skipped_plans = 0;
        self.totals.epochs += 1;
        self.totals.count_dirty(cut.dirty.len());
        let changed = self.hash_contents(&cut);
        let takers = self.takers(&cut, &covered);
        if !takers.is_empty() {
            let common = self.encode_common(&cut, changed)?;
            for id in &takers {
                self.send_epoch(id, &cut, &common, effects);
            }
        }
        let limits = &self.config.limits;
        for peer in self.peers.values_mut().filter(|p| !takers.contains(&p.id)) {
            // All that is dirty, not only what changed since the last cut: the peer may hold what the page was in
            // between, from a live read.
            peer.pending.union_with(&cut.dirty);
            peer.fall_back(limits);
        }
        self.verify_cut(now, &cut, &takers, effects);
        self.pump_all(effects);
        Ok(())
    }

    /// Checks a cut; returns the pages whose contents it holds.
    fn check(&self, cut: &Cut) -> Result<PageSet, SourceAlarm> {
        if cut.dirty.layout() != &self.config.layout {
            return Err(SourceAlarm::OtherLayout);
        }
        if cut.epoch <= self.last_epoch {
            return Err(SourceAlarm::EpochOrder { last: self.last_epoch, found: cut.epoch });
        }
        if cut.device_state.len() > MAX_DEVICE_STATE_BYTES {
            return Err(SourceAlarm::DeviceState(cut.device_state.len()));
        }
        let mut covered = PageSet::new(&self.config.layout);
        for addr in cut.pages.addrs().iter().chain(cut.extras.addrs()) {
            covered.insert(*addr).map_err(|outside| SourceAlarm::OutsideLayout(outside.addr))?;
        }
        Ok(covered)
    }

    /// Records the hashes of all contents of the cut; returns the dirty pages that changed since the last cut.
    ///
    /// A page whose hash is that of the last cut at which it was recorded need not go to a streaming peer: it was
    /// either dirty at every cut since, or clean in between and so unchanged; the peer has the contents of the
    /// last cut. Cuts without contents forget the hash.
    fn hash_contents(&mut self, cut: &Cut) -> PageSet {
        let mut changed = PageSet::new(&self.config.layout);
        let mut seen = PageSet::new(&self.config.layout);
        for (addr, page) in cut.pages.iter().chain(cut.extras.iter()) {
            if seen.insert(addr) != Ok(true) {
                continue;
            }
            let hash = hash_page(self.seed, page);
            let former = self.cut_hashes.set(addr, hash);
            let dirty = cut.dirty.contains(addr);
            if dirty && former != Some(hash) {
                changed.insert_known(&[addr]);
            }
            if let Some(verify) = &mut self.verify {
                verify.set_at_cut(addr, hash);
            }
        }
        changed
    }

    /// Peers that get this epoch: streaming ones with room, and those that need nothing the cut does not hold.
    fn takers(&self, cut: &Cut, covered: &PageSet) -> Vec<PeerId> {
        let limits = &self.config.limits;
        let takes = |peer: &&Peer| match &peer.phase {
            Phase::Streaming => peer.has_room(limits),
            Phase::CatchUp => {
                debug_assert!(cut.dirty.is_subset(covered));
                let reading_covered = peer.reading.iter().flat_map(|r| &r.pages).all(|p| covered.contains(*p));
                peer.has_room(limits) && peer.pending.is_subset(covered) && reading_covered
            }
            Phase::Disconnected | Phase::Handshaking { .. } | Phase::Hashing(_) => false,
        };
        self.peers.values().filter(takes).map(|p| p.id.clone()).collect()
    }

    fn encode_common(&mut self, cut: &Cut, changed: PageSet) -> Result<Common, SourceAlarm> {
        let term = self.config.term;
        let mut packed = PageSet::new(&self.config.layout);
        let mut frames = Frames::new(&mut self.encoder, term, cut.epoch);
        for (addr, page) in cut.pages.iter().chain(cut.extras.iter()) {
            if changed.contains(addr) && packed.insert(addr) == Ok(true) {
                frames.push(addr, page);
            }
        }
        let frames = frames.finish();
        self.totals.raw_bytes += frames.raw_bytes;
        let state = DeviceState { running: cut.running, bytes: cut.device_state.clone() };
        let mut too_long = false;
        let device_state = encode_with(term, cut.epoch, |out| {
            too_long = state.encode(self.config.zstd_level, out).is_err();
            KIND_DEVICE_STATE
        });
        if too_long {
            return Err(SourceAlarm::DeviceState(cut.device_state.len()));
        }
        Ok(Common { pages: Arc::new(changed), frames, device_state })
    }

    /// Sends one peer all it lacks of this epoch.
    fn send_epoch(&mut self, id: &PeerId, cut: &Cut, common: &Common, effects: &mut Vec<SourceEffect>) {
        let Some(peer) = self.peers.get_mut(id) else { return };
        let mut sent = common.pages.clone();
        for message in &common.frames.messages {
            peer.send_chained(message, effects);
        }
        if peer.is_catching_up() {
            // A live read under way is overtaken: the cut holds its pages, its answer will be ignored.
            peer.abandon_read();
            let mut needs = std::mem::replace(&mut peer.pending, PageSet::new(&self.config.layout));
            needs.union_with(&cut.dirty);
            needs.subtract(&common.pages);
            let mut all = PageSet::clone(&common.pages);
            all.union_with(&needs);
            all.union_with(&peer.open);
            peer.open.clear();
            sent = Arc::new(all);
            let mut frames = Frames::new(&mut self.encoder, self.config.term, cut.epoch);
            for (addr, page) in cut.pages.iter().chain(cut.extras.iter()) {
                if needs.remove(addr) {
                    frames.push(addr, page);
                }
            }
            let frames = frames.finish();
            self.totals.raw_bytes += frames.raw_bytes;
            for message in &frames.messages {
                peer.send_chained(message, effects);
            }
            peer.phase = Phase::Streaming;
            peer.filter = None;
        }
        peer.send_chained(&common.device_state, effects);
        let chain = std::mem::take(&mut peer.chain);
        peer.send(&encode(self.config.term, cut.epoch, &SourceBody::Commit(chain)), effects);
        peer.in_flight.push_back(InFlight { epoch: cut.epoch, cut_at: cut.at, pages: sent });
    }

    fn pump_all(&mut self, effects: &mut Vec<SourceEffect>) {
        let ids: Vec<PeerId> = self.peers.keys().cloned().collect();
        for id in ids {
            self.pump(&id, effects);
        }
    }
}
