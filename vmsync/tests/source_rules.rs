//! What a source asks of its driver and tells its peers, step by step.

use vmsync::codec::MirrorBudget;
use vmsync::message::{ImageState, RefuseCode, SourceBody, TargetBody};
use vmsync::source::{
    CloseReason, Cut, CutPlan, PeerState, ReadId, Source, SourceAlarm, SourceConfig, SourceConfigError, SourceEffect,
    SourceEvent, SourceLimits,
};
use vmsync::wire::{Decoder, Encoded, WireError, encode};
use vmsync::{Epoch, GuestUuid, Lineage, Millis, PageAddr, PageBatch, PageSet, PeerId, RamBlock, RamLayout, Term};

fn layout() -> RamLayout {
    RamLayout::new(vec![RamBlock { name: "pc.ram".into(), len_bytes: 100 * 4096 }]).unwrap()
}

fn config() -> SourceConfig {
    SourceConfig {
        term: Term::new(3),
        lineage: Lineage::new(50),
        guest: GuestUuid::from_bytes([7; 16]),
        domain: "g1".into(),
        host: "h1".into(),
        layout: layout(),
        description: vec![],
        zstd_level: 1,
        mirror: MirrorBudget::Full,
        limits: SourceLimits { live_batch_pages: 30, join_pages: 5, in_flight_epochs: 2, ..SourceLimits::default() },
    }
}

struct Bench {
    source: Source,
    now: u64,
    epoch: u64,
}

fn peer() -> PeerId {
    PeerId::new("h2")
}

fn set(pages: &[u32]) -> PageSet {
    let mut set = PageSet::new(&layout());
    pages.iter().for_each(|p| {
        set.insert(PageAddr::new(0, *p)).unwrap();
    });
    set
}

fn batch(pages: impl IntoIterator<Item = PageAddr>, fill: u8) -> PageBatch {
    let mut batch = PageBatch::new();
    pages.into_iter().for_each(|p| batch.push(p, &[fill; 4096]));
    batch
}

impl Bench {
    fn new() -> Self {
        let mut bench = Self { source: Source::new(config()).unwrap(), now: 1_000, epoch: 0 };
        bench.step(SourceEvent::PeerAdded { peer: peer() });
        bench
    }

    /// A source whose peer has committed epoch 1 and streams.
    fn streaming() -> Self {
        let mut bench = Self::new();
        let effects = bench.welcome(ImageState::Zero);
        bench.catch_up(effects, 0);
        assert_eq!(bench.source.cut_plan(), CutPlan::Collect);
        bench.collected(&[]);
        bench.cut(&[], 1);
        bench.answer(1, TargetBody::Ack);
        assert_eq!(bench.view().committed, Some(Epoch::new(1)));
        assert_eq!((bench.view().state, bench.view().pending_pages), (PeerState::Following, 0));
        bench
    }

    fn step(&mut self, event: SourceEvent) -> Vec<SourceEffect> {
        self.try_step(event).expect("no alarm")
    }

    fn try_step(&mut self, event: SourceEvent) -> Result<Vec<SourceEffect>, SourceAlarm> {
        let mut effects = Vec::new();
        self.source.step(Millis::new(self.now), event, &mut effects)?;
        // A fast link.
        for effect in effects.clone() {
            if let SourceEffect::Send { peer, bytes } = effect {
                let written = SourceEvent::Written { peer, bytes: bytes.len() as u64 };
                self.source.step(Millis::new(self.now), written, &mut effects)?;
            }
        }
        Ok(effects)
    }

    fn answer(&mut self, epoch: u64, body: TargetBody) -> Vec<SourceEffect> {
        let Encoded { bytes, .. } = encode(Term::new(3), Epoch::new(epoch), &body);
        let mut decoder = Decoder::new();
        decoder.push(&bytes);
        let message = decoder.next().unwrap().unwrap();
        self.step(SourceEvent::Received { peer: peer(), message })
    }

    fn welcome(&mut self, state: ImageState) -> Vec<SourceEffect> {
        self.step(SourceEvent::Connected { peer: peer() });
        self.answer(0, TargetBody::Welcome(state))
    }

    /// Answers live reads, the first of them in `effects`, until there is none.
    fn catch_up(&mut self, mut effects: Vec<SourceEffect>, fill: u8) {
        while let Some((read, pages)) = read_in(&effects) {
            effects = self.step(SourceEvent::LiveRead { peer: peer(), read, pages: batch(pages, fill) });
        }
    }

    fn collected(&mut self, dirty: &[u32]) -> Vec<SourceEffect> {
        self.step(SourceEvent::Collected { at: Millis::new(self.now), dirty: set(dirty) })
    }

    fn make_cut(&mut self, dirty: &[u32], fill: u8) -> Cut {
        let extras = match self.source.cut_plan() {
            CutPlan::Cut { extras } => extras,
            _ => PageSet::new(&layout()),
        };
        self.now += 50;
        self.epoch += 1;
        let dirty = set(dirty);
        Cut {
            epoch: Epoch::new(self.epoch),
            at: Millis::new(self.now),
            pages: batch(dirty.iter(), fill),
            extras: batch(extras.iter(), fill),
            dirty,
            device_state: b"QEVM"[..].into(),
            running: true,
        }
    }

    fn cut(&mut self, dirty: &[u32], fill: u8) -> Vec<SourceEffect> {
        let cut = self.make_cut(dirty, fill);
        self.step(SourceEvent::Cut(cut))
    }

    fn view(&self) -> vmsync::source::PeerView {
        self.source.peer_view(Millis::new(self.now), &peer()).unwrap()
    }
}

fn read_in(effects: &[SourceEffect]) -> Option<(ReadId, Vec<PageAddr>)> {
    effects.iter().find_map(|e| match e {
        SourceEffect::ReadLive { read, pages, .. } => Some((*read, pages.clone())),
        _ => None,
    })
}

fn sent(effects: &[SourceEffect]) -> Vec<SourceBody> {
    let mut decoder = Decoder::<SourceBody>::new();
    for effect in effects {
        if let SourceEffect::Send { bytes, .. } = effect {
            decoder.push(bytes);
        }
    }
    std::iter::from_fn(|| decoder.next().unwrap().map(|m| m.body)).collect()
}

fn pages_sent(effects: &[SourceEffect]) -> usize {
    let mut decoder = vmsync::codec::FrameDecoder::new();
    let frames = sent(effects);
    let frames = frames.iter().filter_map(|b| if let SourceBody::Pages(f) = b { Some(f) } else { None });
    frames.map(|f| decoder.decode(f, &layout()).unwrap().len()).sum()
}

fn closed(effects: &[SourceEffect]) -> Option<&CloseReason> {
    effects.iter().find_map(|e| if let SourceEffect::Close { reason, .. } = e { Some(reason) } else { None })
}

#[test]
fn without_anybody_to_serve_the_guest_is_not_stopped() {
    let mut bench = Bench::new();
    assert_eq!(bench.source.cut_plan(), CutPlan::Skip);
    bench.step(SourceEvent::Connected { peer: peer() });
    assert_eq!(bench.source.cut_plan(), CutPlan::Skip, "greeting");
    bench.answer(0, TargetBody::Welcome(ImageState::Zero));
    assert_eq!(bench.source.cut_plan(), CutPlan::Skip, "far from done");
}

#[test]
fn what_piled_up_is_collected_before_it_is_copied_in_a_pause() {
    let mut bench = Bench::streaming();
    assert!(matches!(bench.source.cut_plan(), CutPlan::Cut { .. }));
    bench.cut(&[1], 2);
    bench.cut(&[2], 2);
    for _ in 0..3 {
        assert_eq!(bench.source.cut_plan(), CutPlan::Skip, "two epochs in flight are the limit");
    }
    bench.answer(3, TargetBody::Ack);
    assert_eq!(bench.source.cut_plan(), CutPlan::Collect);
    let effects = bench.collected(&(0..50).collect::<Vec<_>>());
    assert_eq!(read_in(&effects).expect("more than a cut should bring").1.len(), 30);
    assert_eq!(bench.view().state, PeerState::Syncing);
}

#[test]
fn a_fresh_image_needs_no_zero_pages_and_an_unchanged_page_is_not_sent() {
    let mut bench = Bench::streaming();
    assert_eq!(bench.source.totals().raw_bytes, 0, "all pages were zero");
    let effects = bench.cut(&[1, 2, 3], 7);
    assert_eq!(pages_sent(&effects), 3);
    assert_eq!(pages_sent(&bench.cut(&[1, 2, 3], 7)), 0, "written, but to the same contents");
    bench.answer(3, TargetBody::Ack);
    assert_eq!(pages_sent(&bench.cut(&[1, 2, 3], 8)), 3);
}

#[test]
fn a_peer_at_its_limit_coalesces_and_joins_again_with_all_of_it() {
    let mut bench = Bench::streaming();
    bench.cut(&[1], 2);
    bench.cut(&[2], 3);
    let cut = bench.make_cut(&[3, 4], 4);
    assert_eq!(sent(&bench.step(SourceEvent::Cut(cut))), [], "at its limit");
    assert_eq!(bench.view().pending_pages, 2);
    bench.answer(3, TargetBody::Ack);
    let effects = bench.cut(&[4, 5], 5);
    assert_eq!(pages_sent(&effects), 3, "3 as an extra, 4 and 5");
    assert_eq!(bench.view().pending_pages, 0);
}

#[test]
fn a_cut_without_all_contents_is_a_collection() {
    let mut bench = Bench::streaming();
    let mut cut = bench.make_cut(&[1, 2], 2);
    cut.pages = batch([PageAddr::new(0, 1)], 2);
    assert_eq!(sent(&bench.step(SourceEvent::Cut(cut))), []);
    assert_eq!(bench.view().pending_pages, 2);
}

#[test]
fn an_answer_to_a_read_of_a_former_session_is_ignored() {
    let mut bench = Bench::new();
    let effects = bench.welcome(ImageState::Zero);
    let (old, pages) = read_in(&effects).unwrap();
    bench.step(SourceEvent::Disconnected { peer: peer() });
    let effects = bench.welcome(ImageState::Zero);
    let (new, again) = read_in(&effects).unwrap();
    assert_ne!(old, new);
    let stale = SourceEvent::LiveRead { peer: peer(), read: old, pages: batch(pages.into_iter().chain(again), 9) };
    assert_eq!(sent(&bench.step(stale)), [], "those contents are older than what the tracker told since");
    assert_eq!(bench.view().pending_pages, 100);
}

#[test]
fn pages_that_could_not_be_read_are_asked_for_again() {
    let mut bench = Bench::new();
    let effects = bench.welcome(ImageState::Zero);
    let (read, pages) = read_in(&effects).unwrap();
    let some = batch(pages[..10].iter().copied(), 1);
    bench.step(SourceEvent::LiveRead { peer: peer(), read, pages: some });
    assert_eq!(bench.view().pending_pages, 90);
}

#[test]
fn a_returning_peer_gets_what_it_lacks() {
    let mut bench = Bench::streaming();
    bench.cut(&[1], 2);
    bench.cut(&[2], 2);
    bench.step(SourceEvent::Disconnected { peer: peer() });
    bench.collected(&[3]);
    // Epoch 2 was committed there although its Ack was lost; epoch 3 was not.
    let state = ImageState::Committed { lineage: Lineage::new(50), epoch: Epoch::new(2) };
    let effects = bench.welcome(state);
    let committed = |e: &SourceEffect| matches!(e, SourceEffect::Committed { epoch, .. } if epoch.get() == 2);
    assert!(effects.iter().any(committed));
    assert_eq!(bench.view().pending_pages, 2, "pages 2 and 3");
}

#[test]
fn a_peer_with_an_epoch_that_cannot_be_is_asked_for_its_hashes() {
    for (lineage, epoch) in [(50, 99), (50, 0), (51, 1)] {
        let mut bench = Bench::streaming();
        bench.cut(&[1], 2);
        bench.answer(2, TargetBody::Ack);
        bench.step(SourceEvent::Disconnected { peer: peer() });
        let state = ImageState::Committed { lineage: Lineage::new(lineage), epoch: Epoch::new(epoch) };
        let effects = bench.welcome(state);
        assert!(matches!(sent(&effects)[..], [SourceBody::HashRequest { .. }]), "{lineage} {epoch}");
        assert_eq!((bench.view().pending_pages, bench.view().committed), (100, None));
        assert!(effects.iter().any(|e| matches!(e, SourceEffect::CommitLost { .. })));
    }
}

#[test]
fn breaking_the_protocol_costs_the_connection() {
    let out_of_layout = TargetBody::Hashes { start: PageAddr::new(0, 99), hashes: vec![1, 2] };
    for body in [TargetBody::Ack, TargetBody::Welcome(ImageState::Zero), out_of_layout] {
        let mut bench = Bench::streaming();
        let effects = bench.answer(77, body.clone());
        assert!(matches!(closed(&effects), Some(CloseReason::Protocol(_))), "{body:?}");
        assert_eq!(bench.view().state, PeerState::Disconnected);
    }
}

#[test]
fn refusals_and_other_versions_are_shown_with_their_reason() {
    let mut bench = Bench::new();
    bench.step(SourceEvent::Connected { peer: peer() });
    let text = "no memory left".to_string();
    let refuse = TargetBody::Refuse { code: RefuseCode::CannotPrepare, text, known_term: Term::new(3) };
    let effects = bench.answer(0, refuse);
    assert!(matches!(closed(&effects), Some(CloseReason::Refused(_))));
    assert!(bench.view().reason.contains("no memory left"));
    bench.step(SourceEvent::Connected { peer: peer() });
    let error = WireError::Version { ours: 1, theirs: 2 };
    let effects = bench.step(SourceEvent::Unreadable { peer: peer(), error });
    let told = |e: &SourceEffect| matches!(e, SourceEffect::PeerRefused { code: RefuseCode::Version, .. });
    assert!(effects.iter().any(told) && bench.view().reason.contains("the other 2"));
    bench.step(SourceEvent::Connected { peer: peer() });
    let refuse = TargetBody::Refuse { code: RefuseCode::StaleTerm, text: String::new(), known_term: Term::new(4) };
    let effects = bench.answer(0, refuse);
    assert!(effects.iter().any(|e| matches!(e, SourceEffect::Superseded { newer_term, .. } if newer_term.get() == 4)));
}

#[test]
fn a_silent_peer_is_pinged_and_then_given_up() {
    let mut bench = Bench::streaming();
    bench.now += 1_100;
    assert_eq!(sent(&bench.step(SourceEvent::Tick)), [SourceBody::Ping]);
    bench.now += 500;
    bench.answer(0, TargetBody::Pong);
    bench.now += 900;
    assert_eq!(sent(&bench.step(SourceEvent::Tick)), []);
    bench.now += 9_200;
    assert!(matches!(closed(&bench.step(SourceEvent::Tick)), Some(CloseReason::Silent(_))));
    bench.step(SourceEvent::Connected { peer: peer() });
    bench.now += 60_001;
    assert!(matches!(closed(&bench.step(SourceEvent::Tick)), Some(CloseReason::NoWelcome(_))));
}

#[test]
fn a_stuck_peer_delays_nobody() {
    let mut bench = Bench::streaming();
    let stuck = PeerId::new("h3");
    bench.step(SourceEvent::PeerAdded { peer: stuck.clone() });
    bench.step(SourceEvent::Connected { peer: stuck.clone() });
    for epoch in 2..40 {
        bench.cut(&[1, 2], epoch as u8);
        bench.answer(epoch, TargetBody::Ack);
        assert_eq!(bench.view().committed, Some(Epoch::new(epoch)));
        assert_eq!(bench.view().lag, Some(Millis::new(0)));
    }
    let view = bench.source.peer_view(Millis::new(bench.now), &stuck).unwrap();
    assert_eq!((view.state, view.in_flight_epochs, view.pending_pages), (PeerState::Syncing, 0, 100));
    let effects = bench.step(SourceEvent::PeerRemoved { peer: stuck });
    assert_eq!(closed(&effects), Some(&CloseReason::Removed));
}

#[test]
fn a_driver_that_breaks_the_contract_is_told() {
    let mut bench = Bench::streaming();
    let mut cut = bench.make_cut(&[1], 1);
    cut.epoch = Epoch::new(1);
    let order = SourceAlarm::EpochOrder { last: Epoch::new(1), found: Epoch::new(1) };
    assert_eq!(bench.try_step(SourceEvent::Cut(cut.clone())).unwrap_err(), order);
    cut.epoch = Epoch::new(9);
    cut.pages = batch([PageAddr::new(0, 100)], 1);
    let outside = SourceAlarm::OutsideLayout(PageAddr::new(0, 100));
    assert_eq!(bench.try_step(SourceEvent::Cut(cut.clone())).unwrap_err(), outside);
    let other = RamLayout::new(vec![RamBlock { name: "pc.ram".into(), len_bytes: 101 * 4096 }]).unwrap();
    let dirty = PageSet::new(&other);
    let plugged = bench.try_step(SourceEvent::Collected { at: Millis::new(1), dirty });
    assert_eq!(plugged.unwrap_err(), SourceAlarm::OtherLayout);
    cut.pages = batch([PageAddr::new(0, 1)], 1);
    cut.device_state = vec![0; (16 << 20) + 1].into();
    assert_eq!(bench.try_step(SourceEvent::Cut(cut)).unwrap_err(), SourceAlarm::DeviceState((16 << 20) + 1));
}

#[test]
fn configurations_are_checked() {
    let limits = SourceLimits { in_flight_epochs: 0, ..SourceLimits::default() };
    let with = |change: &dyn Fn(&mut SourceConfig)| {
        let mut config = config();
        change(&mut config);
        Source::new(config).unwrap_err()
    };
    assert_eq!(with(&|c| c.limits = limits.clone()), SourceConfigError::ZeroLimit("in_flight_epochs"));
    assert_eq!(with(&|c| c.zstd_level = 20), SourceConfigError::ZstdLevel(20));
    assert_eq!(with(&|c| c.description = vec![0; (1 << 20) + 1]), SourceConfigError::Description((1 << 20) + 1));
}

#[test]
fn frames_for_the_guest_go_to_followers_and_a_cut_says_which_it_covers() {
    let frame = |number: u8| SourceEvent::Inbound { frames: vec![vec![number; 60]] };
    let covered = |effects: &[SourceEffect]| {
        let bodies = sent(effects);
        let is_one = |body: &SourceBody| matches!(body, SourceBody::InboundCovered { .. });
        let at = bodies.iter().position(is_one);
        assert!(at.is_none_or(|at| matches!(bodies[at + 1], SourceBody::Commit(_))), "right before the commit");
        at.map(|at| bodies[at].clone())
    };
    // Nobody follows yet.
    let mut bench = Bench::new();
    bench.welcome(ImageState::Present);
    assert!(bench.step(frame(1)).is_empty());

    let mut bench = Bench::streaming();
    assert_eq!(sent(&bench.step(frame(1))), [SourceBody::Inbound(vec![vec![1; 60]])]);
    let cut = bench.make_cut(&[1], 2);
    // It came while the guest may have stood still.
    bench.step(frame(2));
    let effects = bench.step(SourceEvent::Cut(cut));
    assert_eq!(covered(&effects), Some(SourceBody::InboundCovered { all_but: 1 }));
    assert_eq!(covered(&bench.cut(&[1], 3)), Some(SourceBody::InboundCovered { all_but: 0 }));
    bench.answer(3, TargetBody::Ack);
    assert_eq!(covered(&bench.cut(&[1], 4)), None, "nothing came");

    // Bounded from one cut to the next; and none that are long.
    assert!(bench.step(SourceEvent::Inbound { frames: vec![vec![0; 4097], vec![]] }).is_empty());
    // What is too long is left out from between others; all others go in one message.
    let together = SourceEvent::Inbound { frames: vec![vec![1; 60], vec![0; 4097], vec![2; 60]] };
    assert_eq!(sent(&bench.step(together)), [SourceBody::Inbound(vec![vec![1; 60], vec![2; 60]])]);
    let taken = (0..1_000).filter(|_| !bench.step(frame(3)).is_empty()).count();
    assert_eq!(taken, 254);
    // With a new connection it begins anew.
    bench.step(SourceEvent::Disconnected { peer: peer() });
    assert!(bench.step(frame(4)).is_empty());
    bench.welcome(ImageState::Committed { lineage: Lineage::new(50), epoch: Epoch::new(3) });
    assert_eq!(covered(&bench.cut(&[1], 5)), None);
}
