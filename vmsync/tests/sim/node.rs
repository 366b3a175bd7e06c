//! A shadow host's driver: executes effects, and crashes between them or within one.

use std::collections::VecDeque;

use vmsync::codec::PageContent;
use vmsync::hashes::{HashSeed, hash_page};
use vmsync::state_record::StateRecord;
use vmsync::target::{HashId, Promotion, Target, TargetCloseReason, TargetEffect, TargetEvent};
use vmsync::{Epoch, Term};

use super::{Ev, GUEST, World, content, fresh_or_kept, value};

/// What survives the agent.
#[derive(Clone, Default)]
pub struct Storage {
    /// None: the domain and its memory are gone.
    pub pages: Option<Vec<u64>>,
    pub journal: Vec<u8>,
    pub state: Option<Vec<u8>>,
}

pub struct Node {
    pub id: usize,
    pub life: u64,
    /// None while the agent is down.
    pub target: Option<Target>,
    pub image: Storage,
    effects: VecDeque<TargetEffect>,
    /// Newest commit that was acknowledged and not given up durably.
    promised: Option<(u64, u64)>,
    /// The newest commit seen in this lineage.
    last_commit: Option<(u64, u64)>,
    /// Highest term of which something was committed here.
    commit_term: u64,
    pub promoted: bool,
}

impl Node {
    pub fn new(id: usize) -> Self {
        Self {
            id,
            life: 0,
            target: None,
            image: Storage::default(),
            effects: VecDeque::new(),
            promised: None,
            last_commit: None,
            commit_term: 0,
            promoted: false,
        }
    }
}

impl World {
    pub fn start_node(&mut self, node: usize) {
        let config = vmsync::target::TargetConfig {
            guest: GUEST,
            host: format!("node{node}"),
            term: Term::new(1),
            staging_limit_bytes: self.nature.staging_limit_bytes,
        };
        let n = &mut self.nodes[node];
        if n.target.is_some() || n.promoted {
            return;
        }
        match (&n.image.pages, &n.image.state) {
            (Some(_), Some(state)) => {
                let resumed = Target::resume(config, state, &n.image.journal).expect("own record");
                self.seen.replayed_epochs +=
                    u64::from(resumed.effects.iter().any(|e| matches!(e, TargetEffect::Apply(_))));
                n.effects = resumed.effects.into();
                // Crashed in the middle of a promotion: it goes on.
                n.effects.extend(resumed.target.promotion().cloned().map(TargetEffect::Promote));
                n.target = Some(resumed.target);
            }
            (_, state) => {
                let term = state.as_ref().and_then(|s| StateRecord::decode(s, GUEST).ok()).map(|r| r.term);
                n.image.journal.clear();
                n.image.state = None;
                n.promised = None;
                let config = vmsync::target::TargetConfig { term: term.unwrap_or(config.term), ..config };
                n.target = Some(Target::new(config));
            }
        }
        self.log(|| format!("node {node} is up"));
        self.execute_target(node);
    }

    pub fn crash_node(&mut self, node: usize) {
        let n = &mut self.nodes[node];
        if !self.nature.faults || n.promoted || n.target.take().is_none() {
            return;
        }
        n.life += 1;
        n.effects.clear();
        self.seen.crashes += 1;
        self.log(|| format!("node {node} crashes"));
        let links: Vec<u64> = self.links.iter().filter(|(_, l)| l.node == node && l.up).map(|(id, _)| *id).collect();
        links.into_iter().for_each(|link| self.cut_link(link));
        let after = self.rng.between(5, 500);
        self.at(after, Ev::StartNode { node });
    }

    pub fn target_event(&mut self, node: usize, event: TargetEvent) {
        let now = self.millis();
        let n = &mut self.nodes[node];
        let Some(target) = &mut n.target else { return };
        let mut effects = Vec::new();
        target.step(now, event, &mut effects);
        n.effects.extend(effects);
        self.execute_target(node);
    }

    fn execute_target(&mut self, node: usize) {
        while let Some(effect) = self.nodes[node].effects.pop_front() {
            if self.nature.faults && !self.nodes[node].promoted && self.rng.chance(self.nature.crash_per_mille) {
                self.tear(node, &effect);
                self.crash_node(node);
                self.check_storage(node);
                return;
            }
            let storage = self.execute_one(node, effect);
            if storage && self.rng.chance(100) {
                self.check_storage(node);
            }
        }
        self.check_commit(node);
    }

    /// Executes a part of an effect.
    fn tear(&mut self, node: usize, effect: &TargetEffect) {
        let part = self.rng.below(70) as usize;
        let image = &mut self.nodes[node].image;
        match effect {
            TargetEffect::AppendJournal { bytes, .. } => {
                let part = part * bytes.len() / 70;
                image.journal.extend_from_slice(&bytes[..part]);
                self.seen.torn_appends += 1;
            }
            TargetEffect::Apply(frame) => {
                let part = part % (frame.len() + 1);
                let pages = image.pages.as_mut().expect("an image to apply to");
                for (addr, page) in frame.iter().take(part) {
                    write_page(&mut pages[self.layout.linear(addr).unwrap() as usize], page);
                }
                // Of the next page's changes only the first.
                if let Some((addr, PageContent::Patch(patch))) = frame.iter().nth(part)
                    && let Some((at, bytes)) = patch.runs().next()
                {
                    let held = &mut pages[self.layout.linear(addr).unwrap() as usize];
                    let mut contents = content(*held);
                    contents[at..at + bytes.len()].copy_from_slice(bytes);
                    *held = value(&contents);
                    self.seen.torn_patches += 1;
                }
                self.seen.torn_applies += 1;
            }
            _ => {}
        }
    }

    /// Executes one effect; true if it changed what is stored.
    fn execute_one(&mut self, node: usize, effect: TargetEffect) -> bool {
        let life = self.nodes[node].life;
        let n = &mut self.nodes[node];
        match effect {
            TargetEffect::SaveState(bytes) => {
                let record = StateRecord::decode(&bytes, GUEST).expect("own record");
                if record.image.is_none_or(|i| i.committed.is_none()) {
                    n.promised = None;
                }
                n.image.state = Some(bytes);
                return true;
            }
            TargetEffect::AppendJournal { bytes, .. } => {
                n.image.journal.extend_from_slice(&bytes);
                return true;
            }
            TargetEffect::TruncateJournal { len_bytes } => {
                assert!(len_bytes <= n.image.journal.len() as u64, "a journal is cut, never grown");
                n.image.journal.truncate(len_bytes as usize);
                return true;
            }
            TargetEffect::Apply(frame) => {
                let pages = n.image.pages.as_mut().expect("an image to apply to");
                for (addr, page) in frame.iter() {
                    write_page(&mut pages[self.layout.linear(addr).unwrap() as usize], page);
                }
                return true;
            }
            TargetEffect::Prepare { keep, .. } => {
                let after = self.rng.below(60);
                self.at(after, Ev::Prepared { node, life, keep });
            }
            TargetEffect::Hash { id, seed } => {
                let after = self.rng.below(30);
                self.at(after, Ev::HashNow { node, life, id, seed, from: 0 });
            }
            TargetEffect::StopHash { .. } => {}
            TargetEffect::Send { conn, bytes } => {
                if let (Some((_, promised)), true) = (committed(n), is_ack(&bytes)) {
                    n.promised = Some(promised);
                }
                self.send_to_source(conn.0, &bytes);
            }
            TargetEffect::Close { conn, reason } => {
                self.log(|| format!("node {node} closes {conn:?}: {reason}"));
                if let TargetCloseReason::Protocol(what) = &reason {
                    // Only a connection that was replaced, and does not know it yet, may look like that.
                    assert_eq!(what, "a message before Hello");
                }
                self.target_closes(conn.0);
            }
            TargetEffect::Committed(commit) => {
                assert!(commit.term.get() >= n.commit_term, "node {node} follows a primary that was replaced");
                n.commit_term = commit.term.get();
                self.seen.commits += 1;
                self.check_storage(node);
            }
            TargetEffect::CommitLost => {
                self.seen.commits_lost += 1;
                self.nodes[node].last_commit = None;
                self.log(|| format!("node {node} has lost its commit"));
            }
            TargetEffect::Promote(promotion) => self.promoted(node, promotion),
            TargetEffect::PromoteRefused(refusal) => self.log(|| format!("node {node}: {refusal}")),
        }
        false
    }

    pub fn prepared(&mut self, node: usize, life: u64, keep: bool) {
        if self.nodes[node].life != life || self.nodes[node].target.is_none() {
            return;
        }
        let present = self.nodes[node].image.pages.is_some();
        let kept = keep && present && !(self.nature.faults && self.rng.chance(50));
        if !kept && present {
            self.target_event(node, TargetEvent::ImageLost);
            if self.nodes[node].life != life || self.nodes[node].promoted {
                return;
            }
        }
        if !kept && self.nature.faults && self.rng.chance(100) {
            self.nodes[node].image.pages = None;
            let result = Err("no memory left".into());
            self.target_event(node, TargetEvent::PrepareDone { result });
            return;
        }
        if !kept {
            self.nodes[node].image.pages = Some(vec![0; self.layout.total_pages() as usize]);
            // The record of the image that was there must not vouch for this one.
            self.check_storage(node);
        }
        self.target_event(node, TargetEvent::PrepareDone { result: Ok(fresh_or_kept(kept)) });
    }

    pub fn destroy_image(&mut self, node: usize) {
        if self.nature.faults && !self.nodes[node].promoted {
            self.log(|| format!("node {node}: image destroyed"));
            self.target_event(node, TargetEvent::ImageLost);
            if !self.nodes[node].promoted {
                self.nodes[node].image.pages = None;
            }
        }
    }

    /// Hashes a few pages, then a few more later.
    pub fn hash_now(&mut self, node: usize, life: u64, id: HashId, seed: HashSeed, from: u64) {
        let n = &self.nodes[node];
        let (true, Some(_), Some(pages)) = (n.life == life, &n.target, &n.image.pages) else { return };
        let Some(start) = self.layout.addr(from) else {
            self.target_event(node, TargetEvent::HashingDone { id });
            return;
        };
        let left = self.layout.block_pages(start.block) - u64::from(start.page.get());
        let count = left.min(40);
        let hashes = &pages[from as usize..(from + count) as usize];
        let hashes = hashes.iter().map(|v| hash_page(seed, &content(*v))).collect();
        self.target_event(node, TargetEvent::Hashed { id, start, hashes });
        let after = if self.nature.faults && self.rng.chance(30) { 2_500 } else { self.rng.below(60) };
        self.at(after, Ev::HashNow { node, life, id, seed, from: from + count });
    }

    pub fn promote(&mut self, node: usize) {
        let alive = self.nodes.iter().filter(|n| !n.promoted).count();
        if self.nature.faults && alive > 1 && !self.nodes[node].promoted {
            self.log(|| format!("node {node} shall be promoted"));
            let term = Term::new(self.term + 1);
            self.target_event(node, TargetEvent::Promote { term, after_epoch: Epoch::NONE });
        }
    }

    /// The one thing that it is all for.
    fn promoted(&mut self, node: usize, promotion: Promotion) {
        self.log(|| format!("node {node} is promoted from {:?}", promotion.commit));
        let key = (promotion.commit.lineage.get(), promotion.commit.epoch.get());
        let moment = &self.history[&key];
        let pages = self.nodes[node].image.pages.clone().expect("an image");
        assert_eq!(pages, moment.pages, "promoted from another memory than epoch {key:?} had");
        assert_eq!(&promotion.device_state.bytes[..], &moment.device_state[..]);
        self.check_storage(node);
        self.term = promotion.term.get();
        self.seen.promotions += 1;
        self.nodes[node].promoted = true;
        // The old primary goes on for a while: it does not know yet.
        for primary in 0..self.primaries.len() {
            let after = self.rng.between(0, 1_500);
            self.at(after, Ev::StopPrimary { primary });
        }
        let others = self.nodes.iter().filter(|n| !n.promoted).map(|n| n.id).collect();
        self.start_primary(pages, others);
    }

    /// Commits only grow within a lineage.
    fn check_commit(&mut self, node: usize) {
        let n = &mut self.nodes[node];
        let Some((_, now)) = committed(n) else { return };
        if let Some(last) = n.last_commit
            && last.0 == now.0
        {
            assert!(now.1 >= last.1, "node {node} went from epoch {last:?} to {now:?}");
        }
        n.last_commit = Some(now);
    }

    /// What if the agent crashed now: the image that a restarted one would make must be exactly its commit's, and
    /// no older than what was acknowledged.
    fn check_storage(&mut self, node: usize) {
        self.seen.checks += 1;
        let n = &self.nodes[node];
        let (Some(pages), Some(state)) = (&n.image.pages, &n.image.state) else { return };
        let config = vmsync::target::TargetConfig {
            guest: GUEST,
            host: "check".into(),
            term: Term::new(0),
            staging_limit_bytes: 1,
        };
        let resumed = Target::resume(config, state, &n.image.journal).expect("own record");
        let Some(commit) = resumed.target.committed() else {
            assert_eq!(n.promised, None, "node {node} acknowledged an epoch it does not have");
            return;
        };
        let mut pages = pages.clone();
        let mut record = StateRecord::decode(state, GUEST).unwrap();
        for effect in resumed.effects {
            match effect {
                TargetEffect::Apply(frame) => {
                    for (addr, page) in frame.iter() {
                        write_page(&mut pages[self.layout.linear(addr).unwrap() as usize], page);
                    }
                }
                TargetEffect::SaveState(bytes) => record = StateRecord::decode(&bytes, GUEST).unwrap(),
                _ => {}
            }
        }
        let key = (commit.lineage.get(), commit.epoch.get());
        let moment = &self.history[&key];
        assert!(pages == moment.pages, "node {node} would take another memory for epoch {key:?}");
        let (_, device_state) = record.image.unwrap().committed.unwrap();
        assert_eq!(&device_state.bytes[..], &moment.device_state[..]);
        if let Some(promised) = n.promised
            && promised.0 == key.0
        {
            assert!(key.1 >= promised.1, "node {node} acknowledged {promised:?} and would have {key:?}");
        }
    }
}

fn committed(node: &Node) -> Option<(usize, (u64, u64))> {
    let commit = node.target.as_ref()?.committed()?;
    Some((node.id, (commit.lineage.get(), commit.epoch.get())))
}

fn is_ack(bytes: &[u8]) -> bool {
    let mut decoder = vmsync::wire::Decoder::<vmsync::message::TargetBody>::new();
    decoder.push(bytes);
    decoder.next().unwrap().is_some_and(|m| m.body == vmsync::message::TargetBody::Ack)
}

fn write_page(held: &mut u64, page: PageContent<'_>) {
    let mut contents = content(*held);
    page.apply(&mut contents);
    *held = value(&contents);
}
