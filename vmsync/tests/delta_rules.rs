//! Who gets changes, and who whole pages: two shadows of one source, message by message.

use std::sync::Arc;

use vmsync::codec::{Encoder, FrameDecoder, MirrorBudget, PageContent};
use vmsync::device_state::DeviceState;
use vmsync::hashes::HashSeed;
use vmsync::message::{Hello, ImageState, RefuseCode, SourceBody, SourceMessage, TargetBody};
use vmsync::source::{Cut, CutPlan, Source, SourceConfig, SourceEffect, SourceEvent, SourceLimits};
use vmsync::target::{ConnId, Left, PreparedImage, Target, TargetConfig, TargetEffect, TargetEvent};
use vmsync::wire::{Chain, Decoder, encode};
use vmsync::{
    Epoch, GuestUuid, Keep, Lineage, Millis, Page, PageAddr, PageBatch, PageSet, PeerId, RamBlock, RamLayout, Term,
};

const GUEST: GuestUuid = GuestUuid::from_bytes([7; 16]);
const PEERS: [&str; 2] = ["h2", "h3"];

fn layout() -> RamLayout {
    RamLayout::new(vec![RamBlock { name: "pc.ram".into(), len_bytes: 50 * 4096 }]).unwrap()
}

/// What a peer got at a cut.
#[derive(Default)]
struct Got {
    messages: Vec<(SourceMessage, Arc<[u8]>)>,
}

impl Got {
    /// Pages that came whole, or as one word; pages that came as changes.
    fn pages(&self) -> (Vec<u32>, Vec<u32>) {
        let mut decoder = FrameDecoder::new();
        let (mut whole, mut patched) = (Vec::new(), Vec::new());
        for (message, _) in &self.messages {
            let SourceBody::Pages(bytes) = &message.body else { continue };
            for (addr, content) in decoder.decode(bytes, &layout()).unwrap().iter() {
                let list = if matches!(content, PageContent::Patch(_)) { &mut patched } else { &mut whole };
                list.push(addr.page.get());
            }
        }
        whole.sort_unstable();
        patched.sort_unstable();
        (whole, patched)
    }

    fn device_state(&self) -> &[u8] {
        let state = self.messages.iter().find_map(|(m, _)| match &m.body {
            SourceBody::DeviceState(bytes) => Some(&bytes[..]),
            _ => None,
        });
        state.expect("an epoch has one")
    }

    fn shares_all_with(&self, other: &Self) -> bool {
        let chained = |got: &Self| -> Vec<Arc<[u8]>> {
            let is_chained = |m: &SourceMessage| matches!(m.body, SourceBody::Pages(_) | SourceBody::DeviceState(_));
            got.messages.iter().filter(|(m, _)| is_chained(m)).map(|(_, b)| b.clone()).collect()
        };
        let (mine, theirs) = (chained(self), chained(other));
        !mine.is_empty() && mine.len() == theirs.len() && mine.iter().zip(&theirs).all(|(a, b)| Arc::ptr_eq(a, b))
    }
}

struct Bench {
    source: Source,
    guest: Vec<Page>,
    epoch: u64,
}

impl Bench {
    /// Both shadows follow; of pages 0 to 9 the mirror has the contents.
    fn streaming() -> Self {
        let limits = SourceLimits { in_flight_epochs: 2, join_pages: 20, ..SourceLimits::default() };
        let config = SourceConfig {
            term: Term::new(1),
            lineage: Lineage::new(50),
            guest: GUEST,
            domain: "g1".into(),
            host: "h1".into(),
            layout: layout(),
            description: vec![],
            zstd_level: 1,
            mirror: MirrorBudget::Full,
            limits,
        };
        let page = |i: usize| std::array::from_fn(|at| (at / 16 * (i + 1)) as u8);
        let mut bench = Self { source: Source::new(config).unwrap(), guest: (0..50).map(page).collect(), epoch: 0 };
        for peer in PEERS {
            bench.step(SourceEvent::PeerAdded { peer: peer.into() });
            bench.connect(peer, ImageState::Zero);
        }
        assert_eq!(bench.source.cut_plan(), CutPlan::Collect);
        bench.step(SourceEvent::Collected { at: Millis::new(1), dirty: PageSet::new(&layout()) });
        bench.cut(&[]);
        bench.ack(&PEERS);
        bench.cut(&(0..10).collect::<Vec<_>>());
        bench.ack(&PEERS);
        bench
    }

    fn connect(&mut self, peer: &str, image: ImageState) -> Vec<SourceEffect> {
        self.step(SourceEvent::Connected { peer: peer.into() });
        self.answer(peer, 0, TargetBody::Welcome(image))
    }

    /// All sends are written, all reads answered at once.
    fn step(&mut self, event: SourceEvent) -> Vec<SourceEffect> {
        let (mut log, mut events) = (Vec::new(), vec![event]);
        while let Some(event) = events.pop() {
            let mut effects = Vec::new();
            self.source.step(Millis::new(1), event, &mut effects).expect("no alarm");
            for effect in &effects {
                match effect {
                    SourceEffect::Send { peer, bytes } => {
                        events.push(SourceEvent::Written { peer: peer.clone(), bytes: bytes.len() as u64 });
                    }
                    SourceEffect::ReadLive { peer, read, pages } => {
                        let pages = self.read(pages.iter().copied());
                        events.push(SourceEvent::LiveRead { peer: peer.clone(), read: *read, pages });
                    }
                    _ => {}
                }
            }
            log.extend(effects);
        }
        log
    }

    fn answer(&mut self, peer: &str, epoch: u64, body: TargetBody) -> Vec<SourceEffect> {
        let mut decoder = Decoder::new();
        decoder.push(&encode(Term::new(1), Epoch::new(epoch), &body).bytes);
        let message = decoder.next().unwrap().unwrap();
        self.step(SourceEvent::Received { peer: peer.into(), message })
    }

    fn ack(&mut self, peers: &[&str]) {
        for peer in peers {
            self.answer(peer, self.epoch, TargetBody::Ack);
        }
    }

    fn read(&self, pages: impl Iterator<Item = PageAddr>) -> PageBatch {
        let mut batch = PageBatch::new();
        pages.for_each(|addr| batch.push(addr, &self.guest[addr.page.get() as usize]));
        batch
    }

    fn write(&mut self, pages: &[u32]) -> PageSet {
        let mut dirty = PageSet::new(&layout());
        for page in pages {
            self.guest[*page as usize][77] = self.guest[*page as usize][77].wrapping_add(1);
            dirty.insert(PageAddr::new(0, *page)).unwrap();
        }
        dirty
    }

    /// Writes these pages, cuts, and tells what each peer got.
    fn cut(&mut self, pages: &[u32]) -> [Got; 2] {
        let CutPlan::Cut { extras } = self.source.cut_plan() else { panic!("no cut is wanted") };
        let dirty = self.write(pages);
        self.epoch += 1;
        let mut device_state = vec![3; 5000];
        device_state[40] = self.epoch as u8;
        let cut = Cut {
            epoch: Epoch::new(self.epoch),
            at: Millis::new(1),
            pages: self.read(dirty.iter()),
            extras: self.read(extras.iter()),
            dirty,
            device_state: device_state.into(),
            running: true,
        };
        self.got(SourceEvent::Cut(cut))
    }

    fn got(&mut self, event: SourceEvent) -> [Got; 2] {
        let effects = self.step(event);
        PEERS.map(|name| {
            let mut got = Got::default();
            for effect in &effects {
                if let SourceEffect::Send { peer, bytes } = effect
                    && *peer == PeerId::new(name)
                {
                    let mut decoder = Decoder::<SourceBody>::new();
                    decoder.push(bytes);
                    got.messages.push((decoder.next().unwrap().unwrap(), bytes.clone()));
                }
            }
            got
        })
    }
}

#[test]
fn an_epoch_is_encoded_once_for_all_in_step() {
    let mut bench = Bench::streaming();
    let [a, b] = bench.cut(&[1, 2, 20]);
    assert_eq!(a.pages(), (vec![20], vec![1, 2]));
    assert!(a.shares_all_with(&b), "the same bytes in memory");
}

#[test]
fn a_laggard_gets_whole_pages_until_it_is_in_step_and_nobody_else_does() {
    let mut bench = Bench::streaming();
    bench.cut(&[1]);
    bench.ack(&["h2"]);
    bench.cut(&[2]);
    bench.ack(&["h2"]);
    let [a, b] = bench.cut(&[3, 4]);
    assert_eq!((a.pages().1, b.messages.len()), (vec![3, 4], 0), "h3 is at its limit");
    bench.ack(&["h2"]);
    bench.answer("h3", bench.epoch - 1, TargetBody::Ack);
    let [a, b] = bench.cut(&[4, 5]);
    assert_eq!(a.pages(), (vec![], vec![4, 5]));
    assert_eq!(b.pages(), (vec![3, 4, 5], vec![]));
    bench.ack(&PEERS);
    let [a, b] = bench.cut(&[3, 4, 5]);
    assert_eq!(a.pages(), (vec![], vec![3, 4, 5]));
    assert!(a.shares_all_with(&b), "in step again");
}

#[test]
fn a_laggard_that_is_in_step_on_what_is_dirty_takes_what_the_others_get() {
    let mut bench = Bench::streaming();
    bench.cut(&[1]);
    bench.ack(&["h2"]);
    bench.cut(&[2]);
    bench.ack(&["h2"]);
    bench.cut(&[3]);
    bench.ack(&["h2"]);
    bench.answer("h3", bench.epoch - 1, TargetBody::Ack);
    let [a, b] = bench.cut(&[5]);
    assert_eq!((a.pages(), b.pages()), ((vec![], vec![5]), (vec![3], vec![5])));
}

#[test]
fn pages_that_were_only_collected_are_still_sent_as_changes() {
    let mut bench = Bench::streaming();
    let dirty = bench.write(&[1, 2]);
    bench.step(SourceEvent::Collected { at: Millis::new(1), dirty });
    let [a, b] = bench.cut(&[2, 3]);
    assert_eq!(a.pages(), (vec![], vec![1, 2, 3]));
    assert!(a.shares_all_with(&b), "both joined with the same");
}

#[test]
fn what_was_lost_with_a_connection_goes_whole() {
    let mut bench = Bench::streaming();
    let committed = bench.epoch;
    bench.cut(&[1, 2]);
    bench.ack(&["h2"]);
    bench.step(SourceEvent::Disconnected { peer: "h3".into() });
    let image = ImageState::Committed { lineage: Lineage::new(50), epoch: Epoch::new(committed) };
    bench.connect("h3", image);
    let [a, b] = bench.cut(&[2, 3]);
    assert_eq!(a.pages(), (vec![], vec![2, 3]));
    assert_eq!(b.pages(), (vec![1, 2, 3], vec![]));
    assert!(a.device_state().len() < 60 && b.device_state().len() < 60, "either way it compresses");
    assert_eq!((a.device_state()[1], b.device_state()[1]), (2, 1), "changes for who has the former state only");
    bench.ack(&PEERS);
    let [a, b] = bench.cut(&[1, 3]);
    assert!(a.shares_all_with(&b));
}

#[test]
fn a_shadow_that_says_it_is_out_of_step_is_compared_page_by_page() {
    let mut bench = Bench::streaming();
    let refuse = TargetBody::Refuse { code: RefuseCode::OutOfStep, text: "no".into(), known_term: Term::new(1) };
    let effects = bench.answer("h3", 0, refuse);
    assert!(effects.iter().any(|e| matches!(e, SourceEffect::PeerRefused { code: RefuseCode::OutOfStep, .. })));
    let image = ImageState::Committed { lineage: Lineage::new(50), epoch: Epoch::new(bench.epoch) };
    let asked = |effects: &[SourceEffect]| {
        let mut decoder = Decoder::<SourceBody>::new();
        effects.iter().for_each(|e| {
            if let SourceEffect::Send { bytes, .. } = e {
                decoder.push(bytes)
            }
        });
        std::iter::from_fn(|| decoder.next().unwrap()).any(|m| matches!(m.body, SourceBody::HashRequest { .. }))
    };
    assert!(asked(&bench.connect("h3", image)));
    bench.step(SourceEvent::Disconnected { peer: "h3".into() });
    assert!(!asked(&bench.connect("h2", image)), "the other one is trusted");
}

#[test]
fn with_another_mirror_pages_go_whole_once() {
    let mut bench = Bench::streaming();
    bench.source.set_mirror(MirrorBudget::Bytes(20 * 4096));
    assert_eq!(bench.cut(&[1, 2])[0].pages(), (vec![1, 2], vec![]));
    bench.ack(&PEERS);
    assert_eq!(bench.cut(&[1, 2])[0].pages(), (vec![], vec![1, 2]));
    bench.ack(&PEERS);
    bench.source.set_mirror(MirrorBudget::Bytes(0));
    for _ in 0..2 {
        assert_eq!(bench.cut(&[1, 2])[0].pages(), (vec![1, 2], vec![]));
        bench.ack(&PEERS);
    }
}

#[test]
fn compression_follows_the_time_that_coding_takes() {
    let mut bench = Bench::streaming();
    assert_eq!(bench.source.zstd_level(), 1);
    bench.step(SourceEvent::Paced { coding_us: 40_000, interval_us: 50_000 });
    assert_eq!(bench.source.zstd_level(), -1);
}

// The target's side.

fn target_config() -> TargetConfig {
    TargetConfig {
        guest: GUEST,
        host: "h2".into(),
        term: Term::new(1),
        staging_limit_bytes: 1 << 20,
        keep: Keep::default(),
    }
}

fn target() -> (Target, Vec<u8>, Vec<u8>) {
    (Target::new(target_config()), vec![], vec![])
}

struct Shadow {
    target: Target,
    state: Vec<u8>,
    journal: Vec<u8>,
    encoder: Encoder,
    page: Page,
    chain: Chain,
    former: Option<DeviceState>,
}

impl Shadow {
    /// Has committed epoch 1, with page 3.
    fn committed() -> Self {
        let (target, state, journal) = target();
        let encoder = Encoder::new(&layout(), MirrorBudget::Full, HashSeed::new(1), 1);
        let page = std::array::from_fn(|at| (at / 16) as u8);
        let mut shadow = Self { target, state, journal, encoder, page, chain: Chain::default(), former: None };
        shadow.greet(1);
        shadow.epoch(1, 1);
        assert_eq!(shadow.target.committed().map(|c| c.epoch.get()), Some(1));
        shadow
    }

    fn greet(&mut self, conn: u64) {
        let hello = Hello {
            lineage: Lineage::new(50),
            guest: GUEST,
            domain: "g1".into(),
            source_host: "h1".into(),
            layout: layout(),
            description: vec![],
        };
        self.former = None;
        self.chain = Chain::default();
        self.send(conn, 0, &SourceBody::Hello(Box::new(hello)));
        let image = if self.target.committed().is_some() { PreparedImage::Kept } else { PreparedImage::Fresh };
        self.step(TargetEvent::PrepareDone { result: Ok(image) });
    }

    fn step(&mut self, event: TargetEvent) -> Vec<TargetEffect> {
        let mut effects = Vec::new();
        self.target.step(Millis::new(1), event, &mut effects);
        for effect in &effects {
            match effect {
                TargetEffect::SaveState(bytes) => self.state.clone_from(bytes),
                TargetEffect::AppendJournal { bytes, .. } => self.journal.extend_from_slice(bytes),
                TargetEffect::TruncateJournal { len_bytes } => self.journal.truncate(*len_bytes as usize),
                _ => {}
            }
        }
        effects
    }

    fn send(&mut self, conn: u64, epoch: u64, body: &SourceBody) -> Vec<TargetEffect> {
        let encoded = encode(Term::new(1), Epoch::new(epoch), body);
        if matches!(body, SourceBody::Pages(_) | SourceBody::DeviceState(_)) {
            self.chain.add(encoded.checksum);
        }
        let mut decoder = Decoder::new();
        decoder.push(&encoded.bytes);
        let message = decoder.next().unwrap().unwrap();
        self.step(TargetEvent::Received { conn: ConnId(conn), message })
    }

    /// Changes page 3.
    fn frame(&mut self) -> SourceBody {
        self.page[9] = self.page[9].wrapping_add(1);
        self.encoder.page(PageAddr::new(0, 3), &self.page);
        SourceBody::Pages(self.encoder.finish().remove(0))
    }

    fn epoch(&mut self, conn: u64, epoch: u64) -> Vec<TargetEffect> {
        let frame = self.frame();
        let mut effects = self.send(conn, epoch, &frame);
        let mut bytes = vec![7; 900];
        bytes[5] = epoch as u8;
        let state = DeviceState { running: true, bytes: bytes.into() };
        let mut encoded = Vec::new();
        state.encode(self.former.as_ref(), &mut encoded).unwrap();
        self.former = Some(state);
        effects.extend(self.send(conn, epoch, &SourceBody::DeviceState(encoded)));
        let chain = std::mem::take(&mut self.chain);
        effects.extend(self.send(conn, epoch, &SourceBody::Commit(chain)));
        effects
    }
}

fn refusal(effects: &[TargetEffect]) -> Option<RefuseCode> {
    let mut decoder = Decoder::<TargetBody>::new();
    effects.iter().for_each(|e| {
        if let TargetEffect::Send { bytes, .. } = e {
            decoder.push(bytes)
        }
    });
    std::iter::from_fn(|| decoder.next().unwrap()).find_map(|m| match m.body {
        TargetBody::Refuse { code, .. } => Some(code),
        _ => None,
    })
}

#[test]
fn changes_of_other_contents_are_refused_before_anything_is_committed() {
    let mut shadow = Shadow::committed();
    assert_eq!(refusal(&shadow.epoch(1, 2)), None);
    drop(shadow.frame());
    let frame = shadow.frame();
    let effects = shadow.send(1, 4, &frame);
    assert_eq!(refusal(&effects), Some(RefuseCode::OutOfStep));
    assert!(effects.iter().any(|e| matches!(e, TargetEffect::Close { .. })));
    assert_eq!(shadow.target.committed().map(|c| c.epoch.get()), Some(2));
}

#[test]
fn a_device_state_made_from_another_one_is_refused() {
    let mut shadow = Shadow::committed();
    let state = |byte| DeviceState { running: true, bytes: vec![byte; 900].into() };
    let mut changes = Vec::new();
    let mut next = vec![8; 900];
    next[5] = 1;
    DeviceState { running: true, bytes: next.into() }.encode(Some(&state(8)), &mut changes).unwrap();
    assert_eq!(refusal(&shadow.send(1, 2, &SourceBody::DeviceState(changes))), Some(RefuseCode::OutOfStep));
}

#[test]
fn what_was_staged_and_dropped_is_not_known_any_more() {
    let mut shadow = Shadow::committed();
    let lost = shadow.frame();
    shadow.send(1, 2, &lost);
    shadow.step(TargetEvent::Disconnected { conn: ConnId(1) });
    shadow.greet(2);
    // A source that knows what was lost sends the page whole; what it is changed from then is right again.
    shadow.encoder.forget(PageAddr::new(0, 3));
    assert_eq!(refusal(&shadow.epoch(2, 3)), None);
    assert_eq!(refusal(&shadow.epoch(2, 4)), None);
    assert_eq!(shadow.target.committed().map(|c| c.epoch.get()), Some(4));
}

#[test]
fn sealed_epochs_of_changes_are_replayed_after_a_crash() {
    let mut shadow = Shadow::committed();
    let mut image = [0; 4096];
    image.copy_from_slice(&shadow.page);
    let state = shadow.state.clone();
    let effects = [shadow.epoch(1, 2), shadow.epoch(1, 3)].concat();
    // Both epochs were sealed; the crash came before anything was applied or the journal cut.
    let (mut journal, mut applied) = (Vec::new(), 0);
    for effect in &effects {
        match effect {
            TargetEffect::AppendJournal { bytes, .. } => journal.extend_from_slice(bytes),
            TargetEffect::Apply(_) => applied += 1,
            _ => {}
        }
    }
    assert_eq!(applied, 2);
    journal.splice(..0, shadow.journal[..40].iter().copied());
    let left = Left { state: &state, journal: &journal, undo: &[], rebooted: false };
    let resumed = Target::resume(target_config(), Millis::new(1), left).unwrap();
    for effect in &resumed.effects {
        if let TargetEffect::Apply(frame) = effect {
            frame.iter().for_each(|(_, content)| content.apply(&mut image));
        }
    }
    assert!(image == shadow.page);
    assert_eq!(resumed.target.committed().map(|c| c.epoch.get()), Some(3));
}
