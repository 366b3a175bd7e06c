//! A primary's driver and its guest.

use std::collections::BTreeMap;

use vmsync::source::{
    CloseReason, Cut, CutPlan, NotCompared, PeerState, PeerVerdict, Source, SourceConfig, SourceEffect, SourceEvent,
    VerifyReport,
};
use vmsync::{Epoch, Lineage, PageAddr, PageBatch, PageSet, Term};

use super::link::{node_of, peer_id};
use super::{Ev, GUEST, Moment, Read, World, content, whole};

pub struct Primary {
    pub alive: bool,
    /// Counts restarts of the agent.
    pub life: u64,
    pub term: u64,
    pub lineage: u64,
    pub source: Source,
    pub pages: Vec<u64>,
    pub dirty: PageSet,
    pub epoch: u64,
    pub writes: u64,
    /// For the guest, seen so far.
    pub frames: u64,
    /// Node -> connection.
    pub links: BTreeMap<usize, u64>,
    pub peers: Vec<usize>,
    pub last_report: Option<VerifyReport>,
}

impl World {
    pub fn start_primary(&mut self, pages: Vec<u64>, peers: Vec<usize>) {
        self.lineage += 1;
        let (term, lineage) = (self.term, self.lineage);
        let index = self.primaries.len();
        let source = self.new_source(term, lineage);
        self.primaries.push(Primary {
            alive: true,
            life: 0,
            term,
            lineage,
            source,
            pages,
            dirty: PageSet::new(&self.layout),
            epoch: 0,
            writes: 0,
            frames: 0,
            links: BTreeMap::new(),
            peers: peers.clone(),
            last_report: None,
        });
        for node in peers {
            self.source_event(index, SourceEvent::PeerAdded { peer: peer_id(node) });
            self.at(1, Ev::Connect { primary: index, life: 0, node });
        }
        self.at(0, Ev::GuestWrites { primary: index });
        self.at(2, Ev::FramesCome { primary: index });
        self.at(50, Ev::CutDue { primary: index });
        self.at(100, Ev::Tick { primary: index });
        let after = self.rng.between(200, 4_000);
        self.at(after, Ev::VerifyStart { primary: index });
    }

    fn new_source(&self, term: u64, lineage: u64) -> Source {
        Source::new(SourceConfig {
            term: Term::new(term),
            lineage: Lineage::new(lineage),
            guest: GUEST,
            domain: "g1".into(),
            host: "primary".into(),
            layout: self.layout.clone(),
            description: b"{}".to_vec(),
            zstd_level: self.nature.zstd_level,
            mirror: self.nature.mirror,
            limits: self.nature.limits.clone(),
        })
        .expect("a valid configuration")
    }

    /// The agent crashed: a new one makes a new source; the guest has gone on.
    pub fn restart_primary(&mut self, primary: usize) {
        if !self.primaries[primary].alive || !self.nature.faults {
            return;
        }
        self.log(|| format!("primary {primary}: agent restarts"));
        self.seen.restarts += 1;
        self.lineage += 1;
        let (term, lineage) = (self.primaries[primary].term, self.lineage);
        let source = self.new_source(term, lineage);
        let links: Vec<u64> = self.primaries[primary].links.values().copied().collect();
        links.into_iter().for_each(|link| self.cut_link(link));
        let p = &mut self.primaries[primary];
        p.links.clear();
        p.life += 1;
        p.lineage = lineage;
        p.source = source;
        p.dirty.clear();
        let (life, peers) = (p.life, p.peers.clone());
        for node in peers {
            self.source_event(primary, SourceEvent::PeerAdded { peer: peer_id(node) });
            self.at(20, Ev::Connect { primary, life, node });
        }
    }

    pub fn stop_primary(&mut self, primary: usize) {
        self.log(|| format!("primary {primary} is gone"));
        self.primaries[primary].alive = false;
        let links: Vec<u64> = self.primaries[primary].links.values().copied().collect();
        links.into_iter().for_each(|link| self.cut_link(link));
    }

    pub fn guest_writes(&mut self, primary: usize) {
        if !self.primaries[primary].alive {
            return;
        }
        for _ in 0..self.rng.below(self.nature.write_pages_max + 1) {
            self.guest_write(primary);
        }
        let after = self.rng.between(1, 40);
        self.at(after, Ev::GuestWrites { primary });
    }

    fn guest_write(&mut self, primary: usize) {
        let total = self.layout.total_pages();
        // A few pages are hot.
        let at = if self.rng.chance(500) { self.rng.below(6) } else { self.rng.below(total) };
        let number = whole(self.rng.below(self.nature.values));
        self.guest_sets(primary, at, number);
    }

    fn guest_sets(&mut self, primary: usize, at: u64, value: u64) {
        let addr = self.layout.addr(at).unwrap();
        let p = &mut self.primaries[primary];
        p.pages[at as usize] = value;
        p.dirty.insert(addr).unwrap();
        p.writes += 1;
    }

    pub fn cut_due(&mut self, primary: usize) {
        if !self.primaries[primary].alive {
            return;
        }
        self.at(50, Ev::CutDue { primary });
        let planned = self.primaries[primary].frames;
        let plan = self.primaries[primary].source.cut_plan();
        self.frames_come_meanwhile(primary);
        let at = self.millis();
        let failed = self.nature.faults && self.rng.chance(self.nature.failed_cut_per_mille);
        match plan {
            CutPlan::Skip => {}
            CutPlan::Cut { extras } if !failed => {
                let mut cut = self.make_cut(primary, &extras, planned);
                if self.nature.faults && self.rng.chance(10) && !cut.dirty.is_empty() {
                    cut.pages.clear(); // too many to be copied in a pause
                    self.history.remove(&(self.primaries[primary].lineage, cut.epoch.get()));
                }
                self.source_event(primary, SourceEvent::Cut(cut));
            }
            CutPlan::Collect | CutPlan::Cut { .. } => {
                self.seen.collects += 1;
                let p = &mut self.primaries[primary];
                let dirty = std::mem::replace(&mut p.dirty, PageSet::new(&self.layout));
                self.source_event(primary, SourceEvent::Collected { at, dirty });
            }
        }
    }

    fn make_cut(&mut self, primary: usize, extras: &PageSet, planned: u64) -> Cut {
        let p = &mut self.primaries[primary];
        p.epoch += 1;
        let device_state = format!("state of {} after {} writes", p.lineage, p.writes).into_bytes();
        let moment = Moment { pages: p.pages.clone(), device_state: device_state.clone(), frames: planned };
        self.history.insert((p.lineage, p.epoch), moment);
        let dirty = std::mem::replace(&mut p.dirty, PageSet::new(&self.layout));
        let (epoch, running) = (Epoch::new(p.epoch), p.writes.is_multiple_of(2));
        let pages = self.read(primary, dirty.iter());
        let extras = self.read(primary, extras.iter().filter(|addr| !dirty.contains(*addr)));
        let (at, device_state) = (self.millis(), device_state.into());
        Cut { epoch, at, dirty, pages, extras, device_state, running }
    }

    fn read(&self, primary: usize, addrs: impl Iterator<Item = PageAddr>) -> PageBatch {
        let mut batch = PageBatch::new();
        for addr in addrs {
            let at = self.layout.linear(addr).unwrap() as usize;
            batch.push(addr, &content(self.primaries[primary].pages[at]));
        }
        batch
    }

    /// A live read takes place: some pages are being written just then, some cannot be read.
    pub fn read_now(&mut self, primary: usize, life: u64, read: Read) {
        if !self.primaries[primary].alive || self.primaries[primary].life != life {
            return;
        }
        let (Read::Live { pages: addrs, .. } | Read::Verify { pages: addrs, .. }) = &read;
        let mut batch = PageBatch::new();
        for addr in addrs.clone() {
            if self.nature.faults && self.rng.chance(5) {
                continue;
            }
            let at = self.layout.linear(addr).unwrap();
            let mut seen = self.primaries[primary].pages[at as usize];
            if self.rng.chance(10) {
                let new = whole(self.rng.below(self.nature.values));
                self.guest_sets(primary, at, new);
                seen = seen & 0xffff_ffff | new & !0xffff_ffff;
                self.seen.torn_reads += 1;
            }
            batch.push(addr, &content(seen));
        }
        let after = if self.nature.faults && self.rng.chance(200) { self.rng.below(120) } else { 0 };
        self.at(after, Ev::ReadDone { primary, life, read, pages: batch });
    }

    pub fn read_done(&mut self, primary: usize, life: u64, read: Read, pages: PageBatch) {
        if !self.primaries[primary].alive || self.primaries[primary].life != life {
            return;
        }
        let event = match read {
            Read::Live { node, id, .. } => SourceEvent::LiveRead { peer: peer_id(node), read: id, pages },
            Read::Verify { id, .. } => SourceEvent::VerifyRead { read: id, pages },
        };
        self.source_event(primary, event);
    }

    pub fn primary_tick(&mut self, primary: usize) {
        if self.primaries[primary].alive {
            self.at(100, Ev::Tick { primary });
            self.source_event(primary, SourceEvent::Tick);
        }
    }

    pub fn verify_start(&mut self, primary: usize) {
        if self.primaries[primary].alive {
            let after = self.rng.between(800, 2_500);
            self.at(after, Ev::VerifyStart { primary });
            self.source_event(primary, SourceEvent::VerifyStart);
        }
    }

    pub fn source_event(&mut self, primary: usize, event: SourceEvent) {
        let now = self.millis();
        let was_streaming = self.following(primary);
        let is_cut = matches!(event, SourceEvent::Cut(_));
        let mut effects = Vec::new();
        self.primaries[primary].source.step(now, event, &mut effects).expect("no alarm");
        if is_cut && self.following(primary) < was_streaming {
            self.seen.coalesced += 1;
        }
        for effect in effects {
            self.execute_source(primary, effect);
        }
    }

    fn following(&self, primary: usize) -> usize {
        let views = self.primaries[primary].source.peer_views(self.millis());
        views.iter().filter(|v| v.state == PeerState::Following && v.pending_pages == 0).count()
    }

    fn execute_source(&mut self, primary: usize, effect: SourceEffect) {
        let life = self.primaries[primary].life;
        match effect {
            SourceEffect::Send { peer, bytes } => self.send_to_target(primary, node_of(&peer), bytes),
            SourceEffect::ReadLive { peer, read, pages } => {
                let read = Read::Live { node: node_of(&peer), id: read, pages };
                let after = self.rng.below(4);
                self.at(after, Ev::ReadNow { primary, life, read });
            }
            SourceEffect::ReadVerify { read, pages } => {
                let after = self.rng.below(4);
                self.at(after, Ev::ReadNow { primary, life, read: Read::Verify { id: read, pages } });
            }
            SourceEffect::Close { peer, reason } => {
                if matches!(reason, CloseReason::Silent(_) | CloseReason::NoWelcome(_)) {
                    self.seen.silent += 1;
                }
                self.log(|| format!("primary {primary} closes {peer}: {reason}"));
                let readable = !matches!(reason, CloseReason::Protocol(_) | CloseReason::Unreadable(_));
                assert!(readable || self.seen.flips > 0, "{reason}");
                self.source_closes(primary, node_of(&peer));
            }
            SourceEffect::Committed { peer, epoch } => self.log(|| format!("primary {primary}: {peer} has {epoch}")),
            SourceEffect::CommitLost { .. } => {}
            SourceEffect::Superseded { newer_term, .. } => {
                assert!(newer_term.get() > self.primaries[primary].term);
                self.seen.superseded += 1;
                self.at(0, Ev::StopPrimary { primary });
            }
            SourceEffect::PeerRefused { code, text, .. } => {
                self.seen.refused += 1;
                self.log(|| format!("primary {primary} refused: {code:?} {text}"));
                use vmsync::message::RefuseCode::{OutOfStep, Protocol};
                assert!(code != OutOfStep && (code != Protocol || self.seen.flips > 0), "{text}");
            }
            SourceEffect::Verified(report) => self.verified(primary, report),
        }
    }

    fn verified(&mut self, primary: usize, report: VerifyReport) {
        self.log(|| format!("primary {primary}: {report:?}"));
        for (peer, verdict) in &report.peers {
            match verdict {
                PeerVerdict::Compared { .. } => {
                    assert!(verdict.is_equal(), "{peer} differs: {verdict:?}");
                    self.seen.verified_equal += 1;
                }
                PeerVerdict::NotCompared(_) => self.seen.not_compared += 1,
            }
        }
        self.primaries[primary].last_report = Some(report);
    }

    /// Limits hold, at every moment.
    pub fn check_bounds(&mut self) {
        self.check_keep();
        let limits = &self.nature.limits;
        let epoch_bytes = (self.layout.total_pages() + 8) * 4096 * 2;
        for p in self.primaries.iter().filter(|p| p.alive) {
            for view in p.source.peer_views(self.millis()) {
                assert!(view.in_flight_epochs <= limits.in_flight_epochs, "{view:?}");
                assert!(view.unsent_bytes <= limits.unsent_bytes + epoch_bytes, "{view:?}");
            }
        }
        for node in &self.nodes {
            let Some(target) = &node.target else { continue };
            let limit = self.nature.staging_limit_bytes;
            assert!(target.view().staged_bytes <= limit + 64 * 5000, "{:?}", target.view());
            assert!(node.image.journal.len() as u64 <= 2 * limit + 40 * 64 * 5000);
        }
    }

    /// After a while without faults: all shadows of the living primary follow, were verified, and lag little.
    pub fn check_healed(&mut self) {
        let now = self.millis();
        let newest = self.primaries.iter().filter(|p| p.alive).max_by_key(|p| p.term).expect("a primary lives");
        for view in newest.source.peer_views(now) {
            let node = &self.nodes[node_of(&view.peer)];
            let commit = node.target.as_ref().and_then(|t| t.committed()).expect("committed");
            assert_eq!(commit.lineage.get(), newest.lineage, "{view:?}");
            assert_eq!(view.state, PeerState::Following, "{view:?}");
            assert!(view.lag.expect("committed").get() <= 500, "{view:?}");
        }
        let report = newest.last_report.as_ref().expect("was verified");
        // With next to no room for staging, epochs cannot wait for the hashing to end.
        let tight = self.nature.staging_limit_bytes < 1 << 20;
        let accepted =
            |v: &PeerVerdict| v.is_equal() || tight && *v == PeerVerdict::NotCompared(NotCompared::Incomplete);
        assert!(report.peers.iter().all(|(_, v)| accepted(v)), "{report:?}");
    }
}
