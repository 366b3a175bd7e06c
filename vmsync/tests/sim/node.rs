//! A shadow host's driver: executes effects, and crashes between them or within one.

use std::collections::{BTreeMap, VecDeque};

use vmsync::codec::PageContent;
use vmsync::hashes::{HashSeed, hash_page};
use vmsync::history::{FoundUndo, Undo, UndoRecord, read_back};
use vmsync::state_record::StateRecord;
use vmsync::target::{HashId, Left, Promotion, Target, TargetCloseReason, TargetEffect, TargetEvent};
use vmsync::{Epoch, Keep, RamLayout, Term};

use super::frames::Heard;
use super::{Ev, GUEST, World, content, fresh_or_kept, keep, value};

/// What survives the agent.
#[derive(Clone, Default)]
pub struct Storage {
    /// None: the domain and its memory are gone.
    pub pages: Option<Vec<u64>>,
    pub journal: Vec<u8>,
    pub state: Option<Vec<u8>>,
    /// Undo records by number.
    pub undo: BTreeMap<u64, Vec<u8>>,
}

impl Storage {
    fn left<'a>(&'a self, state: &'a [u8], undo: &'a [FoundUndo]) -> Left<'a> {
        Left { state, journal: &self.journal, undo, rebooted: false }
    }

    fn found(&self, layout: &RamLayout) -> Vec<FoundUndo> {
        let found = self.undo.iter().map(|(seq, bytes)| {
            let head = UndoRecord::read(bytes, GUEST, layout).ok().map(|record| record.head);
            FoundUndo { seq: *seq, bytes: bytes.len() as u64, head }
        });
        found.collect()
    }

    fn record(&self, undo: &Undo, layout: &RamLayout) -> Option<Vec<u8>> {
        let mut record = Vec::new();
        let pages = self.pages.as_ref()?;
        let made = undo.make(
            |addr, page| {
                *page = content(pages[layout.linear(addr).unwrap() as usize]);
                Ok::<(), ()>(())
            },
            |bytes| {
                record.extend_from_slice(bytes);
                Ok(())
            },
        );
        made.is_ok().then_some(record)
    }

    /// Applies as many frames of an undo record.
    fn step_back(&mut self, seq: u64, layout: &RamLayout, frames: usize) {
        let record = UndoRecord::read(&self.undo[&seq], GUEST, layout).expect("own record");
        let pages = self.pages.as_mut().expect("an image to go back with");
        for frame in record.frames(layout).take(frames) {
            for (addr, page) in frame.expect("own frame").iter() {
                write_page(&mut pages[layout.linear(addr).unwrap() as usize], page);
            }
        }
    }
}

pub struct Node {
    pub id: usize,
    pub life: u64,
    /// None while the agent is down.
    pub target: Option<Target>,
    pub image: Storage,
    effects: VecDeque<TargetEffect>,
    /// Answers to effects, told once all effects are done.
    answers: VecDeque<TargetEvent>,
    pub keep: Keep,
    /// What its clock shows at moment 0.
    clock: u64,
    /// Highest term that the host's own records have; they are on another disk than shadows.
    recorded_term: u64,
    /// Newest commit that was acknowledged and not given up durably.
    promised: Option<(u64, u64)>,
    /// The newest commit seen in this lineage.
    last_commit: Option<(u64, u64)>,
    /// Highest term of which something was committed here.
    commit_term: u64,
    pub promoted: bool,
    pub heard: Heard,
}

impl Node {
    pub fn new(id: usize, keep: Keep) -> Self {
        Self {
            id,
            keep,
            clock: 1_000_000,
            recorded_term: 1,
            answers: VecDeque::new(),
            life: 0,
            target: None,
            image: Storage::default(),
            effects: VecDeque::new(),
            promised: None,
            last_commit: None,
            commit_term: 0,
            promoted: false,
            heard: Heard::default(),
        }
    }
}

impl World {
    pub fn start_node(&mut self, node: usize) {
        let config = vmsync::target::TargetConfig {
            guest: GUEST,
            host: format!("node{node}"),
            term: Term::new(self.nodes[node].recorded_term),
            staging_limit_bytes: self.nature.staging_limit_bytes,
            keep: self.nodes[node].keep,
        };
        // A clock that was set back or forth shows when the agent starts; until it ends it goes on steadily.
        let jump = self.rng.below(4_000);
        if self.nature.faults && self.nodes[node].life > 0 {
            self.nodes[node].clock = self.nodes[node].clock + jump - 2_000;
            self.seen.clock_jumps += 1;
        }
        let now = self.clock_of(node);
        let n = &mut self.nodes[node];
        if n.target.is_some() || n.promoted {
            return;
        }
        match (&n.image.pages, &n.image.state) {
            (Some(_), Some(state)) => {
                let undo = n.image.found(&self.layout);
                let mut resumed = Target::resume(config, now, n.image.left(state, &undo)).expect("own record");
                self.seen.replayed_epochs +=
                    u64::from(resumed.effects.iter().any(|e| matches!(e, TargetEffect::Apply(_))));
                // Crashed in the middle of a promotion: the order is repeated.
                if let Some(term) = resumed.target.promotion().map(|promotion| promotion.term) {
                    let order = TargetEvent::Promote { term, after_epoch: Epoch::NONE, back_to: None };
                    resumed.target.step(now, order, &mut resumed.effects);
                }
                n.effects = resumed.effects.into();
                n.target = Some(resumed.target);
            }
            (_, state) => {
                let term = state.as_ref().and_then(|s| StateRecord::decode(s, GUEST).ok()).map(|r| r.term);
                n.image.journal.clear();
                n.image.state = None;
                n.image.undo.clear();
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
        n.heard = Heard::default();
        n.effects.clear();
        n.answers.clear();
        self.seen.crashes += 1;
        self.log(|| format!("node {node} crashes"));
        let links: Vec<u64> = self.links.iter().filter(|(_, l)| l.node == node && l.up).map(|(id, _)| *id).collect();
        links.into_iter().for_each(|link| self.cut_link(link));
        let after = self.rng.between(5, 500);
        self.at(after, Ev::StartNode { node });
    }

    pub fn target_event(&mut self, node: usize, event: TargetEvent) {
        let now = self.clock_of(node);
        let n = &mut self.nodes[node];
        let Some(target) = &mut n.target else { return };
        match event {
            TargetEvent::ImageLost => n.heard.nothing(),
            TargetEvent::Promote { back_to, .. } => n.heard.ordered(back_to),
            _ => {}
        }
        let mut effects = Vec::new();
        target.step(now, event, &mut effects);
        n.effects.extend(effects);
        self.execute_target(node);
    }

    fn clock_of(&self, node: usize) -> vmsync::Millis {
        vmsync::Millis::new(self.nodes[node].clock + self.now)
    }

    /// The host was suspended for a while.
    pub fn clock_jump(&mut self, node: usize) {
        if self.nature.faults {
            self.nodes[node].clock += self.rng.below(10_000);
            self.seen.clock_jumps += 1;
        }
    }

    fn execute_target(&mut self, node: usize) {
        while let Some(effect) = self.next_effect(node) {
            // Steps back are rare, and must be met in the middle.
            let likely = if matches!(effect, TargetEffect::StepBack { .. }) { 50 } else { 1 };
            let crash_per_mille = self.nature.crash_per_mille * likely;
            if self.nature.faults && !self.nodes[node].promoted && self.rng.chance(crash_per_mille) {
                self.tear(node, &effect);
                self.crash_node(node);
                self.check_storage(node);
                return;
            }
            let writes = matches!(effect, TargetEffect::AppendJournal { .. } | TargetEffect::SaveState(_));
            // A promotion that fails here is another node's turn, which nobody here decides.
            let target = self.nodes[node].target.as_ref();
            let writes = writes && target.is_some_and(|target| target.promotion().is_none());
            if writes && self.nature.faults && self.rng.below(10_000) < self.nature.full_per_ten_thousand {
                self.disk_is_full(node, &effect);
                continue;
            }
            let storage = self.execute_one(node, effect);
            if storage && self.rng.chance(100) {
                self.check_storage(node);
            }
        }
        self.check_commit(node);
    }

    /// What the agent does when a write fails: it gives the image up.
    fn disk_is_full(&mut self, node: usize, effect: &TargetEffect) {
        self.log(|| format!("node {node}: no room"));
        self.seen.full_disks += 1;
        let n = &mut self.nodes[node];
        if let TargetEffect::SaveState(bytes) = effect {
            let record = StateRecord::decode(bytes, GUEST).expect("own record");
            n.recorded_term = n.recorded_term.max(record.term.get());
            n.image.state = None;
        }
        n.image.pages = None;
        n.promised = None;
        let waits = n.effects.iter().any(|effect| matches!(effect, TargetEffect::Prepare { .. }));
        n.effects.clear();
        n.answers.clear();
        n.answers.push_back(TargetEvent::ImageLost);
        if waits {
            n.answers.push_back(TargetEvent::PrepareDone { result: Err("no room".into()) });
        }
    }

    /// The next effect that is due; once there is none, answers lead to new ones.
    fn next_effect(&mut self, node: usize) -> Option<TargetEffect> {
        let now = self.clock_of(node);
        let n = &mut self.nodes[node];
        while n.effects.is_empty() {
            let (answer, target) = (n.answers.pop_front()?, n.target.as_mut()?);
            if matches!(answer, TargetEvent::ImageLost) {
                n.heard.nothing();
            }
            let mut effects = Vec::new();
            target.step(now, answer, &mut effects);
            n.effects.extend(effects);
        }
        n.effects.pop_front()
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
            TargetEffect::Keep(undo) => {
                let record = image.record(undo, &self.layout).unwrap_or_default();
                let part = part * record.len() / 70;
                image.undo.insert(undo.head.seq, record[..part].to_vec());
                self.seen.torn_records += 1;
            }
            TargetEffect::DropKept { first, last } => {
                let range: Vec<u64> = image.undo.range(first..=last).map(|(seq, _)| *seq).collect();
                range.iter().take(part % (range.len() + 1)).for_each(|seq| drop(image.undo.remove(seq)));
            }
            TargetEffect::StepBack { seq } => {
                image.step_back(*seq, &self.layout, part % 3);
                self.seen.torn_steps += 1;
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
                n.recorded_term = n.recorded_term.max(record.term.get());
                // Promoted: from an older epoch, if that was asked for.
                if record.image.is_none_or(|i| i.committed.is_none()) || record.promoted {
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
            TargetEffect::Keep(undo) => {
                let fails = self.nature.faults && self.rng.chance(self.nature.keep_fails_per_mille);
                let record = n.image.record(&undo, &self.layout).filter(|_| !fails);
                let bytes = record.as_ref().map(|record| record.len() as u64);
                match record {
                    Some(record) => drop(n.image.undo.insert(undo.head.seq, record)),
                    None => n.image.undo.clear(),
                }
                if bytes.is_some() {
                    self.seen.kept += 1
                } else {
                    self.seen.not_kept += 1
                }
                n.answers.push_back(TargetEvent::Kept { seq: undo.head.seq, bytes });
                return true;
            }
            TargetEffect::DropKept { first, last } => n.image.undo.retain(|seq, _| !(first..=last).contains(seq)),
            TargetEffect::ReadBack { seqs, state } => {
                let read = |seq: u64| n.image.undo.get(&seq).cloned().ok_or("it is not there");
                let result = read_back(&seqs, state, GUEST, &self.layout, read);
                n.answers.push_back(TargetEvent::BackRead { result });
            }
            TargetEffect::StepBack { seq } => {
                n.image.step_back(seq, &self.layout, usize::MAX);
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
                self.nodes[node].heard.ended(conn.0);
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
                self.nodes[node].heard.nothing();
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
        let state = self.nodes[node].image.state.as_ref();
        // In the middle of a promotion that is the loss of the guest, and nobody here decides who is next.
        let being_promoted = state.is_some_and(|s| StateRecord::decode(s, GUEST).is_ok_and(|record| record.promoted));
        if self.nature.faults && !being_promoted {
            self.log(|| format!("node {node}: image destroyed"));
            self.seen.destroyed += 1;
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
            let term = Term::new(self.term + 1);
            self.ask_in_vain(node, term);
            let kept = self.nodes[node].target.as_ref().map(|target| target.kept()).unwrap_or_default();
            let back_to = if self.rng.chance(600) && !kept.is_empty() {
                let kept = kept[self.rng.below(kept.len() as u64) as usize];
                Some(kept.stamp.commit.epoch)
            } else {
                self.rng.chance(50).then_some(Epoch::new(77_777))
            };
            self.log(|| format!("node {node} shall be promoted, from {back_to:?}"));
            self.target_event(node, TargetEvent::Promote { term, after_epoch: Epoch::NONE, back_to });
        }
    }

    pub fn keep_changed(&mut self, node: usize) {
        let keep = keep(&mut self.rng);
        self.nodes[node].keep = keep;
        self.target_event(node, TargetEvent::KeepChanged { keep });
    }

    /// The one thing that it is all for.
    fn promoted(&mut self, node: usize, promotion: Promotion) {
        self.log(|| format!("node {node} is promoted from {:?}", promotion.commit));
        let key = (promotion.commit.lineage.get(), promotion.commit.epoch.get());
        let moment = &self.history[&key];
        let pages = self.nodes[node].image.pages.clone().expect("an image");
        assert_eq!(pages, moment.pages, "promoted from another memory than epoch {key:?} had");
        assert_eq!(&promotion.device_state.bytes[..], &moment.device_state[..]);
        self.seen.went_back += u64::from(promotion.newest != promotion.commit.epoch);
        self.check_storage(node);
        self.check_frames(node, &promotion);
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
        let Some((_, now)) = committed(n).filter(|_| n.target.as_ref().is_some_and(|t| t.promotion().is_none())) else {
            return;
        };
        if let Some(last) = n.last_commit
            && last.0 == now.0
        {
            assert!(now.1 >= last.1, "node {node} went from epoch {last:?} to {now:?}");
        }
        n.last_commit = Some(now);
    }

    /// What if the agent crashed now: the image that a restarted one would make must be exactly its commit's, and
    /// no older than what was acknowledged; and all that it would go back to must be what the guest held then.
    fn check_storage(&mut self, node: usize) {
        self.seen.checks += 1;
        let n = &self.nodes[node];
        let (Some(_), Some(state)) = (&n.image.pages, &n.image.state) else { return };
        let config = vmsync::target::TargetConfig {
            guest: GUEST,
            host: "check".into(),
            term: Term::new(0),
            staging_limit_bytes: 1,
            keep: n.keep,
        };
        let undo = n.image.found(&self.layout);
        let mut resumed = Target::resume(config, self.millis(), n.image.left(state, &undo)).expect("own record");
        let Some(commit) = resumed.target.committed() else {
            assert_eq!(n.promised, None, "node {node} acknowledged an epoch it does not have");
            return;
        };
        if let Some(term) = resumed.target.promotion().map(|promotion| promotion.term) {
            let order = TargetEvent::Promote { term, after_epoch: Epoch::NONE, back_to: None };
            resumed.target.step(self.millis(), order, &mut resumed.effects);
        }
        let mut restarted = n.image.clone();
        self.carry_out(&mut restarted, &mut resumed.target, resumed.effects);
        let record = StateRecord::decode(restarted.state.as_ref().expect("a record"), GUEST).unwrap();
        let key = (commit.lineage.get(), commit.epoch.get());
        let moment = &self.history[&key];
        assert!(restarted.pages.as_ref() == Some(&moment.pages), "node {node} would take another memory for {key:?}");
        let (_, device_state) = record.image.unwrap().committed.unwrap();
        assert_eq!(&device_state.bytes[..], &moment.device_state[..]);
        if let Some(promised) = n.promised
            && promised.0 == key.0
        {
            assert!(key.1 >= promised.1, "node {node} acknowledged {promised:?} and would have {key:?}");
        }
        // It takes long.
        if resumed.target.promotion().is_none() && (self.trace || self.seen.checks.is_multiple_of(6)) {
            self.check_way_back(node, restarted, &resumed.target, device_state);
        }
    }

    /// What a restarted agent does first.
    fn carry_out(&self, storage: &mut Storage, target: &mut Target, effects: Vec<TargetEffect>) {
        let mut effects = VecDeque::from(effects);
        while let Some(effect) = effects.pop_front() {
            match effect {
                TargetEffect::Apply(frame) => {
                    let pages = storage.pages.as_mut().expect("an image");
                    for (addr, page) in frame.iter() {
                        write_page(&mut pages[self.layout.linear(addr).unwrap() as usize], page);
                    }
                }
                TargetEffect::SaveState(bytes) => storage.state = Some(bytes),
                TargetEffect::Keep(undo) => {
                    let record = storage.record(&undo, &self.layout);
                    let answer =
                        TargetEvent::Kept { seq: undo.head.seq, bytes: record.as_ref().map(|r| r.len() as u64) };
                    match record {
                        Some(record) => drop(storage.undo.insert(undo.head.seq, record)),
                        None => storage.undo.clear(),
                    }
                    let mut more = Vec::new();
                    target.step(self.millis(), answer, &mut more);
                    effects.extend(more);
                }
                TargetEffect::DropKept { first, last } => storage.undo.retain(|seq, _| !(first..=last).contains(seq)),
                TargetEffect::StepBack { seq } => storage.step_back(seq, &self.layout, usize::MAX),
                _ => {}
            }
        }
    }

    fn check_way_back(&mut self, node: usize, mut image: Storage, target: &Target, newest: vmsync::DeviceState) {
        let kept = target.kept();
        let numbers: Vec<u64> = kept.iter().map(|kept| kept.seq).filter(|seq| *seq > 0).collect();
        assert_eq!(image.undo.keys().copied().collect::<Vec<_>>(), numbers, "node {node}: records nobody knows");
        let mut state = newest;
        for kept in kept.iter().rev().filter(|kept| kept.seq > 0) {
            let key = (kept.stamp.commit.lineage.get(), kept.stamp.commit.epoch.get());
            let moment = &self.history[&key];
            let read = |seq: u64| image.undo.get(&seq).cloned().ok_or("it is not there");
            state = read_back(&[kept.seq], state, GUEST, &self.layout, read).expect("own record");
            image.step_back(kept.seq, &self.layout, usize::MAX);
            assert!(image.pages.as_ref() == Some(&moment.pages), "node {node} would go back to another {key:?}");
            assert_eq!(&state.bytes[..], &moment.device_state[..]);
            self.seen.checked_back += 1;
        }
    }

    /// What is kept stays within its limits.
    pub fn check_keep(&self) {
        for n in &self.nodes {
            let Some(target) = n.target.as_ref().filter(|target| target.promotion().is_none()) else { continue };
            let kept: Vec<_> = target.kept().into_iter().filter(|kept| kept.seq > 0).collect();
            let bytes: u64 = kept.iter().filter_map(|kept| kept.bytes).sum();
            assert!(bytes <= n.keep.bytes, "{bytes} of {:?}", n.keep);
            assert!(n.keep.epochs == 0 || kept.len() as u64 <= n.keep.epochs, "{} of {:?}", kept.len(), n.keep);
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
