//! Cuts: when to make one, what it must hold, and who gets what of it.

use std::sync::Arc;

use super::catch_up::messages;
use super::peer::{InFlight, Peer, Phase};
use super::{Cut, CutPlan, Source, SourceAlarm, SourceEffect};
use crate::batch::PageBatch;
use crate::codec::{FETCH_AHEAD, PageFate};
use crate::device_state::{DeviceState, MAX_DEVICE_STATE_BYTES};
use crate::hashes::hash_page;
use crate::message::{KIND_DEVICE_STATE, SourceBody};
use crate::page_set::PageSet;
use crate::units::{Epoch, Millis, PAGE_SIZE_U64, PeerId, Term};
use crate::wire::{Encoded, encode, encode_with};

/// A link is congested when this part of what may be unsent still is when the next cut comes.
const CONGESTED_PART: u64 = 8;

/// Of one cut: what goes to all peers that are in step.
struct Common {
    frames: Vec<Encoded>,
    /// Pages in the frames.
    coded: Arc<PageSet>,
    /// Pages that have the mirror's contents.
    same: PageSet,
    /// All pages that were looked at.
    seen: PageSet,
    /// Nobody is streaming: the frames were made for those who join.
    for_joining: bool,
    state: DeviceState,
    state_whole: Option<Encoded>,
    state_changes: Option<Encoded>,
}

impl Source {
    /// Asked once for each cut that is due, just before it would be made.
    pub fn cut_plan(&mut self) -> CutPlan {
        let plan = self.plan();
        match plan {
            CutPlan::Skip => self.skipped_plans = self.skipped_plans.saturating_add(1),
            CutPlan::Cut { .. } => self.peers.values_mut().for_each(|peer| peer.inbound.plan()),
            CutPlan::Collect => {}
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
        dirty.iter().for_each(|addr| self.encoder.unknown_contents(addr));
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

    /// The pages of the last cut, which are needed no longer: a driver may use their memory again.
    pub fn take_spent(&mut self) -> PageBatch {
        std::mem::take(&mut self.spent)
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
        let unsent_max = self.config.limits.unsent_bytes / CONGESTED_PART;
        self.congested = self.peers.values().any(|peer| peer.is_streaming() && peer.unsent_bytes > unsent_max);
        self.hash_for_verification(&cut);
        let takers = self.takers(&cut, &covered);
        if takers.is_empty() {
            cut.dirty.iter().for_each(|addr| self.encoder.unknown_contents(addr));
        } else {
            let mut common = self.encode_common(&cut, &covered, &takers);
            for id in &takers {
                self.send_epoch(id, &cut, &covered, &mut common, effects);
            }
            self.former_state = Some((cut.epoch, common.state));
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
        self.spent = cut.pages;
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

    fn hash_for_verification(&mut self, cut: &Cut) {
        if let Some(verify) = &mut self.verify {
            for (addr, page) in cut.extras.iter().chain(cut.pages.iter()) {
                verify.set_at_cut(addr, hash_page(self.seed, page));
            }
        }
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

    /// Codes the cut against the mirror, which then holds the cut.
    fn encode_common(&mut self, cut: &Cut, covered: &PageSet, takers: &[PeerId]) -> Common {
        let layout = &self.config.layout;
        let is_taker = |peer: &&Peer| takers.contains(&peer.id);
        let for_joining = !self.peers.values().filter(is_taker).any(Peer::is_streaming);
        if for_joining {
            let mut apart = PageSet::new(layout);
            self.peers.values().filter(is_taker).for_each(|peer| apart.union_with(&peer.apart));
            covered.iter().filter(|addr| apart.contains(*addr)).for_each(|addr| self.encoder.forget_base(addr));
        }
        let [mut seen, mut coded, mut same] = [(); 3].map(|()| PageSet::new(layout));
        self.encoder.begin_cut();
        let mut soon = cut.pages.iter().chain(cut.extras.iter()).skip(FETCH_AHEAD);
        for (addr, page) in cut.pages.iter().chain(cut.extras.iter()) {
            soon.next().into_iter().for_each(|(addr, page)| self.encoder.fetch(addr, page));
            // Who streams has all that is not dirty.
            if !for_joining && !cut.dirty.contains(addr) || seen.insert(addr) != Ok(true) {
                continue;
            }
            match self.encoder.page(addr, page) {
                PageFate::Same => same.insert_known(&[addr]),
                PageFate::SameByHash => {}
                PageFate::Coded { .. } => coded.insert_known(&[addr]),
            }
        }
        let frames = messages(&mut self.encoder, self.config.term, cut.epoch);
        self.totals.raw_bytes += coded.len() * PAGE_SIZE_U64;
        let mut changed = seen.clone();
        changed.subtract(&same);
        for peer in self.peers.values_mut().filter(|peer| !takers.contains(&peer.id)) {
            peer.apart.union_with(&changed);
        }
        let state = DeviceState { running: cut.running, bytes: cut.device_state.clone() };
        let coded = Arc::new(coded);
        Common { frames, coded, same, seen, for_joining, state, state_whole: None, state_changes: None }
    }

    /// Sends one peer all it lacks of this epoch.
    fn send_epoch(
        &mut self,
        id: &PeerId,
        cut: &Cut,
        covered: &PageSet,
        common: &mut Common,
        effects: &mut Vec<SourceEffect>,
    ) {
        let term = self.config.term;
        let Some(peer) = self.peers.get_mut(id) else { return };
        let mut sent = common.coded.clone();
        let in_step = peer.is_streaming() || common.for_joining || !peer.apart.intersects(&common.seen);
        if in_step {
            for message in &common.frames {
                peer.send_chained(message, effects);
            }
        }
        if peer.is_catching_up() {
            // A live read under way is overtaken: the cut holds its pages, its answer will be ignored.
            peer.abandon_read();
            let mut needs = std::mem::replace(&mut peer.pending, PageSet::new(&self.config.layout));
            needs.union_with(&cut.dirty);
            if in_step {
                needs.subtract(&common.coded);
                needs.subtract(&common.same);
            } else {
                let mut known = common.same.clone();
                known.subtract(&peer.apart);
                needs.subtract(&known);
            }
            let mut all = needs.clone();
            all.union_with(&peer.open);
            if in_step {
                all.union_with(&common.coded);
            }
            sent = Arc::new(all);
            self.totals.raw_bytes += needs.len() * PAGE_SIZE_U64;
            for (addr, page) in cut.pages.iter().chain(cut.extras.iter()) {
                if needs.remove(addr) {
                    self.encoder.whole(addr, page);
                }
            }
            for message in messages(&mut self.encoder, term, cut.epoch) {
                peer.send_chained(&message, effects);
            }
            // On pages of the cut it is in step now; on others the mirror gives in.
            peer.apart.subtract(covered);
            peer.apart.iter().for_each(|addr| self.encoder.forget_base(addr));
            peer.apart.clear();
            peer.open.clear();
            peer.phase = Phase::Streaming;
            peer.filter = None;
        }
        let former = self.former_state.as_ref().filter(|(epoch, _)| peer.state_of == Some(*epoch));
        let state = match former {
            Some((_, former)) => {
                common.state_changes.get_or_insert_with(|| encode_state(term, cut.epoch, &common.state, Some(former)))
            }
            None => common.state_whole.get_or_insert_with(|| encode_state(term, cut.epoch, &common.state, None)),
        };
        peer.send_chained(state, effects);
        peer.state_of = Some(cut.epoch);
        if let Some(all_but) = peer.inbound.cut() {
            peer.send(&encode(term, cut.epoch, &SourceBody::InboundCovered { all_but }), effects);
        }
        let chain = std::mem::take(&mut peer.chain);
        peer.send(&encode(term, cut.epoch, &SourceBody::Commit(chain)), effects);
        let ends_at = peer.wire_bytes_total;
        peer.in_flight.push_back(InFlight {
            epoch: cut.epoch,
            cut_at: cut.at,
            pages: sent,
            ends_at,
            handed_over: None,
        });
    }

    fn pump_all(&mut self, effects: &mut Vec<SourceEffect>) {
        let ids: Vec<PeerId> = self.peers.keys().cloned().collect();
        for id in ids {
            self.pump(&id, effects);
        }
    }
}

fn encode_state(term: Term, epoch: Epoch, state: &DeviceState, former: Option<&DeviceState>) -> Encoded {
    encode_with(term, epoch, |out| {
        // Its length was checked when the cut came in.
        let encoded = state.encode(former, out);
        debug_assert!(encoded.is_ok());
        KIND_DEVICE_STATE
    })
}
