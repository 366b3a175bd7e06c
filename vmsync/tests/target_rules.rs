//! What a target accepts, refuses and promises, message by message.

use vmsync::codec::{Encoder, MirrorBudget};
use vmsync::device_state::DeviceState;
use vmsync::hashes::HashSeed;
use vmsync::message::{Hello, ImageState, RefuseCode, SourceBody, TargetBody};
use vmsync::target::{
    ConnId, Left, PreparedImage, PromoteRefusal, Target, TargetCloseReason, TargetConfig, TargetEffect, TargetEvent,
};
use vmsync::wire::{Chain, Decoder, WireError, encode};
use vmsync::{Epoch, GuestUuid, Keep, Lineage, Millis, PageAddr, RamBlock, RamLayout, Term};

const GUEST: GuestUuid = GuestUuid::from_bytes([7; 16]);

struct Bench {
    target: Target,
    chain: Chain,
    state: Vec<u8>,
    journal: Vec<u8>,
}

fn layout() -> RamLayout {
    RamLayout::new(vec![RamBlock { name: "pc.ram".into(), len_bytes: 64 * 4096 }]).unwrap()
}

fn config() -> TargetConfig {
    let keep = Keep::default();
    TargetConfig { guest: GUEST, host: "h2".into(), term: Term::new(3), staging_limit_bytes: 40_000, keep }
}

fn left<'a>(state: &'a [u8], journal: &'a [u8]) -> Left<'a> {
    Left { state, journal, undo: &[], rebooted: false }
}

fn hello(lineage: u64) -> SourceBody {
    SourceBody::Hello(Box::new(Hello {
        lineage: Lineage::new(lineage),
        guest: GUEST,
        domain: "g1".into(),
        source_host: "h1".into(),
        layout: layout(),
        description: vec![],
    }))
}

fn pages(first: u32, count: u32) -> SourceBody {
    let mut encoder = Encoder::new(&layout(), MirrorBudget::Bytes(0), HashSeed::new(1), 0);
    // Different in all words, so that it goes as it is.
    let page = std::array::from_fn(|i| (i / 8 % 255) as u8);
    (first..first + count).for_each(|i| encoder.whole(PageAddr::new(0, i), &page));
    SourceBody::Pages(encoder.finish().remove(0))
}

fn device_state() -> SourceBody {
    let mut out = Vec::new();
    DeviceState { running: true, bytes: b"QEVM"[..].into() }.encode(None, &mut out).unwrap();
    SourceBody::DeviceState(out)
}

impl Bench {
    fn new() -> Self {
        Self { target: Target::new(config()), chain: Chain::default(), state: vec![], journal: vec![] }
    }

    /// A shadow that has committed epoch 1 of lineage 50 over connection 1.
    fn committed() -> Self {
        let mut bench = Self::new();
        bench.greet(1, 3, 50);
        bench.send(1, 3, 1, &pages(0, 4));
        bench.commit(1, 1);
        assert_eq!(bench.epoch(), Some(1));
        bench
    }

    fn epoch(&self) -> Option<u64> {
        self.target.committed().map(|c| c.epoch.get())
    }

    fn step(&mut self, event: TargetEvent) -> Vec<TargetEffect> {
        let mut effects = Vec::new();
        self.target.step(Millis::new(1), event, &mut effects);
        for effect in &effects {
            match effect {
                TargetEffect::SaveState(bytes) => self.state = bytes.clone(),
                TargetEffect::AppendJournal { bytes, .. } => self.journal.extend_from_slice(bytes),
                TargetEffect::TruncateJournal { len_bytes } => self.journal.truncate(*len_bytes as usize),
                _ => {}
            }
        }
        effects
    }

    fn send(&mut self, conn: u64, term: u64, epoch: u64, body: &SourceBody) -> Vec<TargetEffect> {
        let encoded = encode(Term::new(term), Epoch::new(epoch), body);
        if matches!(body, SourceBody::Pages(_) | SourceBody::DeviceState(_)) {
            self.chain.add(encoded.checksum);
        }
        let mut decoder = Decoder::new();
        decoder.push(&encoded.bytes);
        let message = decoder.next().unwrap().unwrap();
        self.step(TargetEvent::Received { conn: ConnId(conn), message })
    }

    fn greet(&mut self, conn: u64, term: u64, lineage: u64) -> Vec<TargetEffect> {
        self.chain = Chain::default();
        let mut effects = self.send(conn, term, 0, &hello(lineage));
        let prepare = effects.iter().find_map(|e| match e {
            TargetEffect::Prepare { keep, .. } => Some(*keep),
            _ => None,
        });
        if let Some(keep) = prepare {
            let image = if keep { PreparedImage::Kept } else { PreparedImage::Fresh };
            effects.extend(self.step(TargetEvent::PrepareDone { result: Ok(image) }));
        }
        effects
    }

    fn commit(&mut self, conn: u64, epoch: u64) -> Vec<TargetEffect> {
        let mut effects = self.send(conn, 3, epoch, &device_state());
        let chain = std::mem::take(&mut self.chain);
        effects.extend(self.send(conn, 3, epoch, &SourceBody::Commit(chain)));
        effects
    }
}

fn sent(effects: &[TargetEffect]) -> Vec<TargetBody> {
    let mut decoder = Decoder::<TargetBody>::new();
    for effect in effects {
        if let TargetEffect::Send { bytes, .. } = effect {
            decoder.push(bytes);
        }
    }
    std::iter::from_fn(|| decoder.next().unwrap().map(|m| m.body)).collect()
}

fn refused(effects: &[TargetEffect]) -> Option<(RefuseCode, u64)> {
    sent(effects).into_iter().find_map(|body| match body {
        TargetBody::Refuse { code, known_term, .. } => Some((code, known_term.get())),
        _ => None,
    })
}

fn closes(effects: &[TargetEffect], conn: u64) -> bool {
    effects.iter().any(|e| matches!(e, TargetEffect::Close { conn: c, .. } if c.0 == conn))
}

#[test]
fn an_acknowledgement_stands_behind_what_makes_it_true() {
    let mut bench = Bench::committed();
    bench.send(1, 3, 2, &pages(0, 2));
    let effects = bench.commit(1, 2);
    let at = |what: &dyn Fn(&TargetEffect) -> bool| effects.iter().position(what).expect("there");
    let sealed = at(&|e| matches!(e, TargetEffect::AppendJournal { durable: true, .. }));
    let ack = at(&|e| matches!(e, TargetEffect::Send { .. }));
    let apply = at(&|e| matches!(e, TargetEffect::Apply(_)));
    let saved = at(&|e| matches!(e, TargetEffect::SaveState(_)));
    let cleared = at(&|e| matches!(e, TargetEffect::TruncateJournal { .. }));
    assert!(sealed < ack && sealed < apply && apply < saved && saved < cleared, "{effects:?}");
}

#[test]
fn the_first_copy_is_applied_at_once_and_a_later_epoch_only_when_sealed() {
    let mut bench = Bench::new();
    let effects = bench.greet(1, 3, 50);
    assert_eq!(sent(&effects), [TargetBody::Welcome(ImageState::Zero)]);
    assert!(matches!(bench.send(1, 3, 0, &pages(0, 4))[..], [TargetEffect::Apply(_)]));
    bench.commit(1, 1);
    assert!(matches!(bench.send(1, 3, 0, &pages(0, 4))[..], [TargetEffect::AppendJournal { durable: false, .. }]));
}

#[test]
fn an_epoch_that_is_not_what_was_sealed_is_refused_and_changes_nothing() {
    for spoil in ["count", "checksum", "no device state", "old epoch", "epoch 0"] {
        let mut bench = Bench::committed();
        bench.send(1, 3, 2, &pages(0, 2));
        let mut epoch = 2;
        if spoil != "no device state" {
            bench.send(1, 3, 2, &device_state());
        }
        let mut chain = bench.chain;
        match spoil {
            "count" => chain.count += 1,
            "checksum" => chain.checksum ^= 1,
            "old epoch" => epoch = 1,
            "epoch 0" => epoch = 0,
            _ => {}
        }
        let effects = bench.send(1, 3, epoch, &SourceBody::Commit(chain));
        assert_eq!(refused(&effects).map(|r| r.0), Some(RefuseCode::Protocol), "{spoil}");
        assert!(closes(&effects, 1), "{spoil}");
        assert!(!effects.iter().any(|e| matches!(e, TargetEffect::Apply(_))), "{spoil}");
        assert_eq!(bench.epoch(), Some(1), "{spoil}");
        assert_eq!(bench.journal.len(), 40, "{spoil}: what was staged is cut off");
    }
}

#[test]
fn bad_frames_and_messages_out_of_place_close_the_connection() {
    let frame = |bytes: &[u8]| SourceBody::Pages(bytes.to_vec());
    for body in [
        frame(&[]),
        frame(&[2, 0, 1, 0, 64, 0, 0, 0, 0, 0]), // page 64 of 64
        SourceBody::DeviceState(vec![9; 20]),
        SourceBody::VerifyRequest { seed: HashSeed::new(1) }, // of epoch 9
        hello(50),
    ] {
        let mut bench = Bench::committed();
        let effects = bench.send(1, 3, 9, &body);
        assert!(closes(&effects, 1), "{body:?}");
        assert_eq!(bench.epoch(), Some(1));
        assert_eq!(bench.target.view().source_host, None);
    }
    let mut bench = Bench::committed();
    assert!(closes(&bench.send(7, 3, 1, &pages(0, 1)), 7), "no Hello on that connection");
    assert!(closes(&bench.send(1, 2, 1, &pages(0, 1)), 1), "another term than the session's");
    let effects = Bench::new().send(1, 3, 0, &hello(50));
    assert!(matches!(effects[..], [TargetEffect::Prepare { keep: false, .. }]));
    let mut bench = Bench::new();
    bench.send(1, 3, 0, &hello(50));
    assert!(closes(&bench.send(1, 3, 0, &pages(0, 1)), 1), "pages before Welcome");
}

#[test]
fn pages_while_the_source_waits_for_hashes_are_an_error() {
    let mut bench = Bench::committed();
    bench.greet(2, 3, 51);
    let effects = bench.send(2, 3, 0, &SourceBody::HashRequest { seed: HashSeed::new(1) });
    assert!(matches!(effects[..], [TargetEffect::Hash { .. }]));
    let effects = bench.send(2, 3, 0, &pages(0, 1));
    assert!(closes(&effects, 2));
    assert!(effects.iter().any(|e| matches!(e, TargetEffect::StopHash { .. })));
}

#[test]
fn a_source_of_a_lower_term_is_refused_and_a_higher_one_remembered() {
    let mut bench = Bench::committed();
    let effects = bench.greet(2, 2, 60);
    assert_eq!(refused(&effects), Some((RefuseCode::StaleTerm, 3)));
    assert!(closes(&effects, 2) && !closes(&effects, 1), "the session goes on");
    let effects = bench.greet(3, 8, 61);
    assert!(closes(&effects, 1), "a newer primary replaces the old one");
    let resumed = Target::resume(config(), Millis::new(1), left(&bench.state, &bench.journal)).unwrap();
    assert_eq!(resumed.target.view().term, Term::new(8), "also after a restart");
    assert_eq!(resumed.target.committed(), bench.target.committed());
    assert_eq!(refused(&bench.greet(4, 7, 62)), Some((RefuseCode::StaleTerm, 8)));
}

#[test]
fn a_term_that_the_manager_tells_cuts_the_old_primary_off() {
    let mut bench = Bench::committed();
    assert!(bench.step(TargetEvent::TermKnown { term: Term::new(3) }).is_empty());
    let effects = bench.step(TargetEvent::TermKnown { term: Term::new(4) });
    assert_eq!(refused(&effects), Some((RefuseCode::StaleTerm, 4)));
    assert!(closes(&effects, 1) && matches!(effects[0], TargetEffect::SaveState(_)));
    assert_eq!(bench.epoch(), Some(1), "what was committed stays");
    assert_eq!(refused(&bench.greet(2, 3, 50)), Some((RefuseCode::StaleTerm, 4)));
}

#[test]
fn a_connection_that_comes_again_replaces_the_old_one_and_drops_what_that_staged() {
    let mut bench = Bench::committed();
    bench.send(1, 3, 2, &pages(0, 2));
    let effects = bench.greet(2, 3, 50);
    assert!(effects.iter().any(|e| matches!(e, TargetEffect::Close { reason: TargetCloseReason::Replaced, .. })));
    let state = ImageState::Committed { lineage: Lineage::new(50), epoch: Epoch::new(1) };
    assert_eq!(sent(&effects), [TargetBody::Welcome(state)]);
    bench.commit(2, 2);
    assert_eq!(bench.epoch(), Some(2), "without the staged pages: they are not part of this chain");
    assert!(bench.step(TargetEvent::Disconnected { conn: ConnId(1) }).is_empty(), "the old end is of no matter");
}

#[test]
fn promotion_needs_a_newer_term_and_a_commit_that_is_new_enough() {
    let refusal = |bench: &mut Bench, term, after| {
        let event = TargetEvent::Promote { term: Term::new(term), after_epoch: Epoch::new(after), back_to: None };
        match &bench.step(event)[..] {
            [TargetEffect::PromoteRefused(refusal)] => refusal.clone(),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(refusal(&mut Bench::new(), 4, 0), PromoteRefusal::NoCommit);
    let mut bench = Bench::committed();
    let term = PromoteRefusal::Term { asked: Term::new(3), known: Term::new(3) };
    assert_eq!(refusal(&mut bench, 3, 0), term);
    let old = PromoteRefusal::TooOld { committed: Epoch::new(1), wanted: Epoch::new(2) };
    assert_eq!(refusal(&mut bench, 4, 2), old);
    let effects = bench.step(TargetEvent::Promote { term: Term::new(4), after_epoch: Epoch::new(1), back_to: None });
    let at = |what: &dyn Fn(&TargetEffect) -> bool| effects.iter().position(what).expect("there");
    let saved = at(&|e| matches!(e, TargetEffect::SaveState(_)));
    let promoted = at(&|e| matches!(e, TargetEffect::Promote(_)));
    assert!(saved < promoted, "a restarted agent must know");
    assert_eq!(refused(&effects), Some((RefuseCode::Promoted, 4)), "the old primary is told");
    assert_eq!(refusal(&mut bench, 5, 0), PromoteRefusal::AlreadyPromoted(Term::new(4)));
    let order = TargetEvent::Promote { term: Term::new(4), after_epoch: Epoch::NONE, back_to: None };
    let again = bench.step(order);
    assert!(matches!(again[..], [TargetEffect::Promote(_)]), "repeated, as its outcome was not known: {again:?}");
    assert_eq!(refused(&bench.greet(9, 9, 70)), Some((RefuseCode::Promoted, 4)), "its memory is in use");
    let resumed = Target::resume(config(), Millis::new(1), left(&bench.state, &bench.journal)).unwrap();
    assert_eq!(resumed.target.promotion().map(|p| p.term), Some(Term::new(4)));
    assert!(resumed.effects.is_empty(), "nothing is replayed onto a running guest");
}

#[test]
fn staging_has_a_limit_and_the_source_is_told() {
    let mut bench = Bench::committed();
    assert!(bench.send(1, 3, 0, &pages(0, 9)).iter().all(|e| matches!(e, TargetEffect::AppendJournal { .. })));
    let effects = bench.send(1, 3, 0, &pages(20, 9));
    assert_eq!(sent(&effects), [TargetBody::GaveUp]);
    let at = |what: &dyn Fn(&TargetEffect) -> bool| effects.iter().position(what).expect("there");
    let saved = at(&|e| matches!(e, TargetEffect::SaveState(_)));
    assert!(saved < at(&|e| matches!(e, TargetEffect::Apply(_))), "first it says that there is no commit");
    assert_eq!(bench.epoch(), None);
    assert_eq!(bench.journal.len(), 40);
    let effects = bench.commit(1, 2);
    assert!(sent(&effects).contains(&TargetBody::Ack));
    assert_eq!(bench.epoch(), Some(2), "the next commit makes it whole again");
}

#[test]
fn a_journal_left_behind_by_a_given_up_commit_is_not_replayed() {
    // The agent crashed after SaveState said that there is no commit, and before the journal was cut.
    let mut bench = Bench::committed();
    bench.send(1, 3, 2, &pages(0, 2));
    bench.send(1, 3, 2, &device_state());
    let chain = bench.chain;
    let mut effects = Vec::new();
    let encoded = encode(Term::new(3), Epoch::new(2), &SourceBody::Commit(chain));
    let mut decoder = Decoder::new();
    decoder.push(&encoded.bytes);
    let message = decoder.next().unwrap().unwrap();
    bench.target.step(Millis::new(1), TargetEvent::Received { conn: ConnId(1), message }, &mut effects);
    for effect in &effects {
        if let TargetEffect::AppendJournal { bytes, .. } = effect {
            bench.journal.extend_from_slice(bytes);
        }
    }
    let sealed = bench.journal.clone();
    let replayed = Target::resume(config(), Millis::new(1), left(&bench.state, &sealed)).unwrap();
    assert_eq!(replayed.target.committed().map(|c| c.epoch.get()), Some(2), "sealed counts");
    bench.step(TargetEvent::ImageLost);
    bench.greet(2, 3, 51); // a fresh image, not committed
    let resumed = Target::resume(config(), Millis::new(1), left(&bench.state, &sealed)).unwrap();
    assert_eq!(resumed.target.committed(), None);
    assert!(!resumed.effects.iter().any(|e| matches!(e, TargetEffect::Apply(_))));
}

#[test]
fn failures_to_prepare_and_foreign_versions_are_told() {
    let mut bench = Bench::new();
    bench.send(1, 3, 0, &hello(50));
    let effects = bench.step(TargetEvent::PrepareDone { result: Err("no memory left; free 2 GiB".into()) });
    let refuse = TargetBody::Refuse {
        code: RefuseCode::CannotPrepare,
        text: "no memory left; free 2 GiB".into(),
        known_term: Term::new(3),
    };
    assert_eq!(sent(&effects), [refuse]);
    assert!(closes(&effects, 1));
    let error = WireError::Version { ours: 1, theirs: 2 };
    let effects = bench.step(TargetEvent::Unreadable { conn: ConnId(2), error });
    assert_eq!(refused(&effects).map(|r| r.0), Some(RefuseCode::Version));
    let mut other = Bench::new();
    let SourceBody::Hello(mut foreign) = hello(50) else { unreachable!() };
    foreign.guest = GuestUuid::from_bytes([8; 16]);
    let effects = other.send(1, 3, 0, &SourceBody::Hello(foreign));
    assert_eq!(refused(&effects).map(|r| r.0), Some(RefuseCode::UnknownGuest));
}

#[test]
fn only_one_prepare_is_under_way() {
    let mut bench = Bench::new();
    assert_eq!(bench.send(1, 3, 0, &hello(50)).len(), 1);
    let effects = bench.send(2, 3, 0, &hello(51));
    assert!(matches!(effects[..], [TargetEffect::Close { conn: ConnId(1), .. }]), "{effects:?}");
    let effects = bench.step(TargetEvent::PrepareDone { result: Ok(PreparedImage::Fresh) });
    assert!(matches!(effects.last(), Some(TargetEffect::Prepare { keep: true, .. })), "{effects:?}");
    let effects = bench.step(TargetEvent::PrepareDone { result: Ok(PreparedImage::Kept) });
    assert_eq!(sent(&effects), [TargetBody::Welcome(ImageState::Zero)]);
}

#[test]
fn an_order_to_promote_can_be_repeated_after_a_crash_anywhere() {
    // A verification is being hashed, and a sealed epoch waits for its end: a promotion has much to do.
    let busy = || {
        let mut bench = Bench::committed();
        bench.send(1, 3, 1, &SourceBody::VerifyRequest { seed: HashSeed::new(1) });
        bench.send(1, 3, 2, &pages(0, 2));
        bench.commit(1, 2);
        bench.send(1, 3, 3, &pages(5, 2));
        bench
    };
    let order = TargetEvent::Promote { term: Term::new(4), after_epoch: Epoch::new(2), back_to: None };
    let mut probe = busy();
    let count = probe.step(order.clone()).len();
    for crash_before in 0..count {
        let mut bench = busy();
        let mut effects = Vec::new();
        bench.target.step(Millis::new(2), order.clone(), &mut effects);
        for effect in &effects[..crash_before] {
            match effect {
                TargetEffect::SaveState(bytes) => bench.state = bytes.clone(),
                TargetEffect::AppendJournal { bytes, .. } => bench.journal.extend_from_slice(bytes),
                TargetEffect::TruncateJournal { len_bytes } => bench.journal.truncate(*len_bytes as usize),
                _ => {}
            }
        }
        let mut resumed = Target::resume(config(), Millis::new(1), left(&bench.state, &bench.journal)).unwrap();
        assert_eq!(resumed.target.committed().map(|c| c.epoch.get()), Some(2), "{crash_before}");
        let mut effects = Vec::new();
        resumed.target.step(Millis::new(3), order.clone(), &mut effects);
        let promoted = |e: &TargetEffect| matches!(e, TargetEffect::Promote(_));
        assert!(effects.iter().any(promoted), "{crash_before}: {effects:?}");
    }
}

/// Found by the simulation: what was sealed before the record's epoch, by another source even, was replayed onto it.
#[test]
fn what_the_record_has_is_not_replayed() {
    let mut bench = Bench::committed();
    bench.send(1, 3, 2, &pages(0, 2));
    let journal = bench.journal.clone();
    let effects = bench.commit(1, 2);
    let appended = effects.iter().filter_map(|effect| match effect {
        TargetEffect::AppendJournal { bytes, .. } => Some(&bytes[..]),
        _ => None,
    });
    let journal = appended.fold(journal, |journal, bytes| [&journal, bytes].concat());
    let resumed = Target::resume(config(), Millis::new(1), left(&bench.state, &journal)).unwrap();
    assert_eq!(resumed.target.committed().map(|c| c.epoch.get()), Some(2));
    assert!(!resumed.effects.iter().any(|e| matches!(e, TargetEffect::Apply(_))), "{:?}", resumed.effects);
    bench.step(TargetEvent::Disconnected { conn: ConnId(1) });
    assert_eq!(bench.journal.len(), 40, "the next source's records do not come behind these");
}

/// Found by the simulation: with sealed epochs waiting, a lost image was written to before the record said that it is gone.
#[test]
fn a_lost_image_is_told_of_first_and_not_written_to() {
    let mut bench = Bench::committed();
    bench.send(1, 3, 1, &SourceBody::VerifyRequest { seed: HashSeed::new(1) });
    bench.send(1, 3, 2, &pages(0, 2));
    bench.commit(1, 2);
    let effects = bench.step(TargetEvent::ImageLost);
    assert!(matches!(effects[0], TargetEffect::SaveState(_)), "{effects:?}");
    assert!(!effects.iter().any(|e| matches!(e, TargetEffect::Apply(_))), "{effects:?}");
    assert_eq!(bench.epoch(), None);
}

#[test]
fn frames_for_the_guest_are_kept_until_a_commit_covers_them() {
    let frame = |number: u8| SourceBody::Inbound(vec![vec![number; 60]]);
    let send = |bench: &mut Bench, bodies: &[SourceBody]| {
        bodies.iter().for_each(|body| {
            let effects = bench.send(1, 3, 1, body);
            assert!(effects.is_empty(), "{effects:?}");
        });
    };
    let first = |bench: &mut Bench| bench.target.take_inbound().iter().map(|frame| frame[0]).collect::<Vec<_>>();

    // Of no use before there is anything to promote.
    let mut bench = Bench::new();
    bench.greet(1, 3, 50);
    send(&mut bench, &[frame(0)]);
    bench.send(1, 3, 1, &pages(0, 4));
    bench.commit(1, 1);
    send(&mut bench, &[frame(1), frame(2), frame(3), SourceBody::InboundCovered { all_but: 1 }, frame(4)]);
    bench.commit(1, 2);
    send(&mut bench, &[frame(5), SourceBody::InboundCovered { all_but: 0 }]);
    // That commit does not come. The connection's end, by which most promotions begin, changes nothing.
    bench.step(TargetEvent::Disconnected { conn: ConnId(1) });
    let promote = |back_to| TargetEvent::Promote { term: Term::new(4), after_epoch: Epoch::NONE, back_to };
    let effects = bench.step(promote(None));
    assert!(effects.iter().any(|effect| matches!(effect, TargetEffect::Promote(_))), "{effects:?}");
    assert_eq!(first(&mut bench), [3, 4, 5]);
    assert_eq!(first(&mut bench), []);

    // Going back, even to where it is, gives up what came since.
    let mut bench = Bench::committed();
    send(&mut bench, &[frame(1)]);
    bench.step(promote(Some(Epoch::new(1))));
    assert_eq!(first(&mut bench), []);

    // A refusal changes nothing: not kept, too old, of an old term.
    let mut bench = Bench::committed();
    send(&mut bench, &[frame(1)]);
    let order = |term, after, back_to: Option<u64>| {
        let (term, after_epoch) = (Term::new(term), Epoch::new(after));
        TargetEvent::Promote { term, after_epoch, back_to: back_to.map(Epoch::new) }
    };
    for order in [order(4, 0, Some(77)), order(4, 9, None), order(4, 9, Some(1)), order(3, 0, Some(1))] {
        let effects = bench.step(order.clone());
        assert!(matches!(effects[..], [TargetEffect::PromoteRefused(_)]), "{order:?}: {effects:?}");
    }
    send(&mut bench, &[frame(2)]);
    bench.step(promote(None));
    assert_eq!(first(&mut bench), [1, 2]);

    // Nor does one that came to nothing because a record cannot be read; read, it gives up what came since.
    let state = DeviceState { running: true, bytes: b"QEVM"[..].into() };
    for (result, left) in [(Err("damaged".into()), [1].as_slice()), (Ok(state), &[])] {
        let mut bench = Bench::committed();
        bench.step(TargetEvent::KeepChanged { keep: Keep { epochs: 4, age: Millis::new(0), bytes: 1 << 20 } });
        bench.send(1, 3, 2, &pages(0, 2));
        let seq = bench.commit(1, 2).iter().find_map(|effect| match effect {
            TargetEffect::Keep(undo) => Some(undo.head.seq),
            _ => None,
        });
        bench.step(TargetEvent::Kept { seq: seq.expect("a record"), bytes: Some(8192) });
        send(&mut bench, &[frame(1)]);
        let effects = bench.step(order(4, 0, Some(1)));
        assert!(matches!(effects.last(), Some(TargetEffect::ReadBack { .. })), "{effects:?}");
        bench.step(TargetEvent::BackRead { result });
        bench.step(promote(None));
        assert_eq!(first(&mut bench), left);
    }

    // The next source says itself what is on its way; an image that is lost takes them along.
    for event in [None, Some(TargetEvent::ImageLost)] {
        let mut bench = Bench::committed();
        send(&mut bench, &[frame(1)]);
        match event {
            Some(event) => drop(bench.step(event)),
            None => drop(bench.greet(2, 3, 50)),
        }
        assert_eq!(first(&mut bench), []);
    }
}

/// Whatever a source says about them: bounded, in order, none twice, and nothing that has been handed out.
#[test]
fn a_hostile_source_neither_fills_memory_nor_changes_the_order_of_frames() {
    let mut random = 0x5eed_u64;
    let mut below = |bound: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % bound
    };
    for _ in 0..100 {
        let (mut bench, mut epoch, mut number) = (Bench::committed(), 1, 0u32);
        for _ in 0..below(60) {
            match below(5) {
                0 => {
                    epoch += 1;
                    bench.commit(1, epoch);
                }
                1 => {
                    let all_but = [0, 1, below(300) as u32, u32::MAX][below(4) as usize];
                    bench.send(1, 3, epoch, &SourceBody::InboundCovered { all_but });
                }
                _ => {
                    let len = [4, 60, 4096][below(3) as usize];
                    let mut frame = || {
                        number += 1;
                        [&number.to_be_bytes()[..], &vec![0; len - 4]].concat()
                    };
                    // As many as a message can hold.
                    let frames = (0..=below((64 << 10) / (len as u64).max(256))).map(|_| frame()).collect();
                    bench.send(1, 3, epoch, &SourceBody::Inbound(frames));
                }
            }
        }
        bench.step(TargetEvent::Promote { term: Term::new(4), after_epoch: Epoch::NONE, back_to: None });
        let taken = bench.target.take_inbound();
        let bytes: usize = taken.iter().map(|frame| frame.len().max(256)).sum();
        assert!(bytes <= 256 << 10, "{bytes}");
        assert!(taken.is_sorted_by(|a, b| a[..4] < b[..4]), "another order, or twice");
        assert!(bench.target.take_inbound().is_empty());
    }
}
