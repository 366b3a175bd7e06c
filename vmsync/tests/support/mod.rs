//! A guest model, an image model, and one source and target wired together.

use std::collections::VecDeque;

use vmsync::codec::MirrorBudget;
use vmsync::hashes::hash_page;
use vmsync::journal::Commit;
use vmsync::message::{SourceBody, TargetBody};
use vmsync::source::{
    Cut, CutPlan, PeerState, Source, SourceConfig, SourceEffect, SourceEvent, SourceLimits, VerifyReport,
};
use vmsync::target::{ConnId, PreparedImage, Target, TargetConfig, TargetEffect, TargetEvent};
use vmsync::wire::Decoder;
use vmsync::{
    BlockIndex, DeviceState, Epoch, GuestUuid, Keep, Lineage, Millis, PAGE_SIZE, Page, PageAddr, PageBatch, PageSet,
    PeerId, RamBlock, RamLayout, Term,
};

pub const GUEST: GuestUuid = GuestUuid::from_bytes([7; 16]);

pub fn guest_layout() -> RamLayout {
    let block = |name: &str, pages: u64| RamBlock { name: name.into(), len_bytes: pages * PAGE_SIZE as u64 };
    RamLayout::new(vec![block("pc.ram", 400), block("pc.bios", 3), block("vga.vram", 61)]).unwrap()
}

/// Memory of a guest: one number a page stands for its contents; page contents are made from it.
pub struct Guest {
    pub layout: RamLayout,
    pub pages: Vec<u32>,
    pub at_cut: Vec<u32>,
    pub dirty: PageSet,
    pub epoch: u64,
    pub state: u32,
}

/// 0 is the zero page; odd numbers compress badly.
pub fn content(number: u32) -> Page {
    let mut page = [0; PAGE_SIZE];
    if number != 0 {
        page[..4].copy_from_slice(&number.to_le_bytes());
        page[4092..].copy_from_slice(&number.to_le_bytes());
    }
    page
}

pub fn number(page: &Page) -> u32 {
    let number = u32::from_le_bytes([page[0], page[1], page[2], page[3]]);
    assert_eq!(*page, content(number), "a page that the guest never had");
    number
}

impl Guest {
    pub fn new(layout: RamLayout) -> Self {
        let count = layout.total_pages() as usize;
        // A third of the pages is zero.
        let pages: Vec<u32> = (0..count as u32).map(|i| if i % 3 == 0 { 0 } else { i }).collect();
        Self { dirty: PageSet::full(&layout), at_cut: pages.clone(), pages, layout, epoch: 0, state: 0 }
    }

    /// Writes `count` pages somewhere.
    pub fn dirty(&mut self, seed: u32, count: u32) {
        for i in 0..count {
            let at = seed.wrapping_mul(2_654_435_761).wrapping_add(i * 7) % self.pages.len() as u32;
            self.write(at as u64, seed.wrapping_mul(31).wrapping_add(i) % 50);
        }
        self.state += 1;
    }

    pub fn write(&mut self, linear: u64, number: u32) {
        self.pages[linear as usize] = number;
        self.dirty.insert(self.layout.addr(linear).unwrap()).unwrap();
    }

    pub fn write_behind_the_trackers_back(&mut self, linear: u64) -> PageAddr {
        self.pages[linear as usize] = 77_777;
        self.layout.addr(linear).unwrap()
    }

    pub fn device_state(&self) -> Vec<u8> {
        format!("device state {} of epoch {}", self.state, self.epoch).into_bytes()
    }

    pub fn read<'a>(&self, addrs: impl IntoIterator<Item = &'a PageAddr>) -> PageBatch {
        let mut batch = PageBatch::new();
        for addr in addrs {
            batch.push(*addr, &content(self.pages[self.layout.linear(*addr).unwrap() as usize]));
        }
        batch
    }

    pub fn take_dirty(&mut self) -> PageSet {
        std::mem::replace(&mut self.dirty, PageSet::new(&self.layout))
    }

    pub fn cut(&mut self, at: Millis, extras: &PageSet) -> Cut {
        self.epoch += 1;
        self.at_cut = self.pages.clone();
        let dirty = self.take_dirty();
        let pages = self.read(&dirty.iter().collect::<Vec<_>>());
        let extras = self.read(&extras.iter().collect::<Vec<_>>());
        let device_state = self.device_state().into();
        Cut { epoch: Epoch::new(self.epoch), at, dirty, pages, extras, device_state, running: true }
    }
}

/// What a shadow's driver keeps: image, journal, state record.
#[derive(Default, Clone)]
pub struct Image {
    pub pages: Vec<u32>,
    pub journal: Vec<u8>,
    pub state: Option<Vec<u8>>,
}

impl Image {
    /// Executes the effects that touch storage; true if it was one.
    pub fn execute(&mut self, effect: &TargetEffect, layout: &RamLayout) -> bool {
        match effect {
            TargetEffect::SaveState(bytes) => self.state = Some(bytes.clone()),
            TargetEffect::AppendJournal { bytes, .. } => self.journal.extend_from_slice(bytes),
            TargetEffect::TruncateJournal { len_bytes } => self.journal.truncate(*len_bytes as usize),
            TargetEffect::Apply(frame) => {
                for (addr, page) in frame.iter() {
                    let held = &mut self.pages[layout.linear(addr).unwrap() as usize];
                    let mut contents = content(*held);
                    page.apply(&mut contents);
                    *held = number(&contents);
                }
            }
            _ => return false,
        }
        true
    }

    pub fn hashes(&self, layout: &RamLayout, block: BlockIndex, seed: vmsync::hashes::HashSeed) -> Vec<u64> {
        let first = layout.linear(PageAddr { block, page: Default::default() }).unwrap() as usize;
        let pages = &self.pages[first..first + layout.block_pages(block) as usize];
        pages.iter().map(|n| hash_page(seed, &content(*n))).collect()
    }
}

pub fn source(layout: &RamLayout, term: u64, lineage: u64, limits: SourceLimits) -> Source {
    Source::new(SourceConfig {
        term: Term::new(term),
        lineage: Lineage::new(lineage),
        guest: GUEST,
        domain: "g1".into(),
        host: "h1".into(),
        layout: layout.clone(),
        description: b"{}".to_vec(),
        zstd_level: 1,
        mirror: MirrorBudget::Bytes(100 * 4096),
        limits,
    })
    .unwrap()
}

pub fn target(term: u64, staging_limit_bytes: u64) -> Target {
    let keep = Keep::default();
    Target::new(TargetConfig { guest: GUEST, host: "h2".into(), term: Term::new(term), staging_limit_bytes, keep })
}

/// A source and a target with a perfect connection between them.
pub struct Pair {
    pub now: Millis,
    pub guest: Guest,
    pub source: Source,
    pub target: Target,
    pub image: Image,
    pub peer: PeerId,
    pub conn: ConnId,
    pub source_log: Vec<SourceEffect>,
    pub promoted: Option<(Commit, DeviceState)>,
    to_source: Decoder<TargetBody>,
    to_target: Decoder<SourceBody>,
    source_effects: VecDeque<SourceEffect>,
    target_effects: VecDeque<TargetEffect>,
}

impl Pair {
    pub fn new(layout: RamLayout) -> Self {
        let limits = SourceLimits { join_pages: 16, live_batch_pages: 32, ..SourceLimits::default() };
        let mut pair = Self {
            now: Millis::new(0),
            source: source(&layout, 1, 11, limits),
            target: target(1, 1 << 20),
            image: Image { pages: vec![0; layout.total_pages() as usize], ..Image::default() },
            guest: Guest::new(layout),
            peer: PeerId::new("h2"),
            conn: ConnId(0),
            source_log: Vec::new(),
            promoted: None,
            to_source: Decoder::new(),
            to_target: Decoder::new(),
            source_effects: VecDeque::new(),
            target_effects: VecDeque::new(),
        };
        pair.source_event(SourceEvent::PeerAdded { peer: pair.peer.clone() });
        pair
    }

    pub fn connect(&mut self) {
        self.conn = ConnId(self.conn.0 + 1);
        self.to_source = Decoder::new();
        self.to_target = Decoder::new();
        self.source_event(SourceEvent::Connected { peer: self.peer.clone() });
    }

    pub fn disconnect(&mut self) {
        self.source_event(SourceEvent::Disconnected { peer: self.peer.clone() });
        self.target_event(TargetEvent::Disconnected { conn: self.conn });
    }

    pub fn state(&self) -> PeerState {
        self.source.peer_view(self.now, &self.peer).unwrap().state
    }

    pub fn run_until_following(&mut self) {
        for _ in 0..50 {
            self.cut();
            if self.state() == PeerState::Following {
                return;
            }
        }
        panic!("does not get there: {:?}", self.source.peer_views(self.now));
    }

    pub fn cut(&mut self) {
        self.now = self.now.plus(Millis::new(50));
        match self.source.cut_plan() {
            CutPlan::Skip => {}
            CutPlan::Collect => {
                let dirty = self.guest.take_dirty();
                self.source_event(SourceEvent::Collected { at: self.now, dirty });
            }
            CutPlan::Cut { extras } => {
                let cut = self.guest.cut(self.now, &extras);
                self.source_event(SourceEvent::Cut(cut));
            }
        }
    }

    pub fn verify(&mut self) -> VerifyReport {
        self.source_log.clear();
        self.source_event(SourceEvent::VerifyStart);
        for _ in 0..10 {
            self.cut();
            for effect in &self.source_log {
                if let SourceEffect::Verified(report) = effect {
                    return report.clone();
                }
            }
        }
        panic!("verification does not end");
    }

    pub fn promote(&mut self, term: Term, after_epoch: Epoch) -> Option<(Commit, DeviceState)> {
        self.target_event(TargetEvent::Promote { term, after_epoch, back_to: None });
        self.promoted.clone()
    }

    pub fn source_event(&mut self, event: SourceEvent) {
        self.step_source(event);
        self.settle();
    }

    pub fn target_event(&mut self, event: TargetEvent) {
        self.step_target(event);
        self.settle();
    }

    fn step_source(&mut self, event: SourceEvent) {
        let mut effects = Vec::new();
        self.source.step(self.now, event, &mut effects).unwrap();
        self.source_effects.extend(effects);
    }

    fn step_target(&mut self, event: TargetEvent) {
        let mut effects = Vec::new();
        self.target.step(self.now, event, &mut effects);
        self.target_effects.extend(effects);
    }

    /// Executes effects until there are none.
    pub fn settle(&mut self) {
        loop {
            if let Some(effect) = self.source_effects.pop_front() {
                self.source_log.push(effect.clone());
                self.execute_source(effect);
            } else if let Some(effect) = self.target_effects.pop_front() {
                self.execute_target(effect);
            } else {
                return;
            }
        }
    }

    fn execute_source(&mut self, effect: SourceEffect) {
        match effect {
            SourceEffect::Send { peer, bytes } => {
                self.to_target.push(&bytes);
                while let Some(message) = self.to_target.next().unwrap() {
                    self.step_target(TargetEvent::Received { conn: self.conn, message });
                }
                self.step_source(SourceEvent::Written { peer, bytes: bytes.len() as u64 });
            }
            SourceEffect::ReadLive { peer, read, pages } => {
                let pages = self.guest.read(&pages);
                self.step_source(SourceEvent::LiveRead { peer, read, pages });
            }
            SourceEffect::ReadVerify { read, pages } => {
                let pages = self.guest.read(&pages);
                self.step_source(SourceEvent::VerifyRead { read, pages });
            }
            _ => {}
        }
    }

    fn execute_target(&mut self, effect: TargetEffect) {
        let layout = self.guest.layout.clone();
        if self.image.execute(&effect, &layout) {
            return;
        }
        match effect {
            TargetEffect::Prepare { keep, .. } => {
                let image = if keep { PreparedImage::Kept } else { PreparedImage::Fresh };
                self.step_target(TargetEvent::PrepareDone { result: Ok(image) });
            }
            TargetEffect::Hash { id, seed } => {
                for block in 0..layout.blocks().len() {
                    let block = BlockIndex::try_from(block).unwrap();
                    let hashes = self.image.hashes(&layout, block, seed);
                    let start = PageAddr { block, page: Default::default() };
                    self.step_target(TargetEvent::Hashed { id, start, hashes });
                }
                self.step_target(TargetEvent::HashingDone { id });
            }
            TargetEffect::Send { conn, bytes } if conn == self.conn => {
                self.to_source.push(&bytes);
                while let Some(message) = self.to_source.next().unwrap() {
                    self.step_source(SourceEvent::Received { peer: self.peer.clone(), message });
                }
            }
            TargetEffect::Promote(promotion) => self.promoted = Some((promotion.commit, promotion.device_state)),
            _ => {}
        }
    }
}
