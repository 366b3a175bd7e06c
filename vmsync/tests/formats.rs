//! Bytes of this version, as in `fixtures/vmsync`: a change that would make two builds misunderstand each other, or a
//! restarted agent its own files, fails here. If it is meant, it needs a new version number and new fixtures; those of older versions stay.

use vmsync::codec::{Encoder, MirrorBudget};
use vmsync::device_state::DeviceState;
use vmsync::hashes::HashSeed;
use vmsync::journal::{Commit, JournalError, RecordEncoder, encode_header, scan};
use vmsync::message::{Hello, ImageState, RefuseCode, SourceBody, TargetBody};
use vmsync::state_record::{ImageRecord, StateRecord};
use vmsync::wire::{Body, Chain, Decoder, Encoded, WireError, encode};
use vmsync::{Epoch, GuestUuid, Lineage, PageAddr, RamBlock, RamLayout, Term};

const GUEST: GuestUuid = GuestUuid::from_bytes(*b"0123456789abcdef");

fn layout() -> RamLayout {
    let block = |name: &str, pages: u64| RamBlock { name: name.into(), len_bytes: pages * 4096 };
    RamLayout::new(vec![block("pc.ram", 300), block("/rom@etc/acpi/tables", 2)]).unwrap()
}

fn commit() -> Commit {
    Commit { lineage: Lineage::new(0xfeed), term: Term::new(7), epoch: Epoch::new(42) }
}

fn device_state() -> DeviceState {
    DeviceState { running: true, bytes: b"QEVM"[..].into() }
}

fn encoded_state() -> Vec<u8> {
    let mut out = Vec::new();
    device_state().encode(None, &mut out).unwrap();
    out
}

fn frame() -> Vec<u8> {
    let mut encoder = Encoder::new(&layout(), MirrorBudget::Full, HashSeed::new(1), 0);
    let mut page = [7; 4096];
    encoder.page(PageAddr::new(1, 0), &page);
    encoder.finish();
    page[0x123] = 8;
    encoder.page(PageAddr::new(0, 258), &[0; 4096]);
    encoder.page(PageAddr::new(1, 0), &page);
    encoder.page(PageAddr::new(1, 1), &[9; 4096]);
    encoder.finish().remove(0)
}

/// Whole pages: one as words, one as records, and one as it is.
fn whole_frames() -> Vec<Vec<u8>> {
    let mut encoder = Encoder::new(&layout(), MirrorBudget::Full, HashSeed::new(1), 1);
    let words: [u64; 512] = std::array::from_fn(|i| match i {
        0 | 1 | 17 => 0xffff_8880_1234_5678,
        8 | 24 => 0xffff_8880_1234_9abc,
        16 => 0xffff_8880_12cd_ef01,
        25 => 0xffff_8880_1234_5699,
        64..70 => 0x11 << (10 * (i - 64)),
        511 => u64::MAX,
        _ => 0,
    });
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    encoder.whole(PageAddr::new(0, 1), bytes.as_slice().try_into().unwrap());
    encoder.whole(PageAddr::new(1, 1), &std::array::from_fn(|i| b"virt-shadow"[i * i / 64 % 11]));
    encoder.whole(
        PageAddr::new(0, 2),
        &std::array::from_fn(|i| if i % 72 == 3 { (i / 72) as u8 } else { b'a' + (i % 72) as u8 }),
    );
    let mut frames = encoder.finish();
    frames.sort_by_key(|frame| frame[1]);
    frames
}

fn source_bodies() -> Vec<SourceBody> {
    let hello = Hello {
        lineage: Lineage::new(0xfeed),
        guest: GUEST,
        domain: "g1".into(),
        source_host: "h1".into(),
        layout: layout(),
        description: b"{}".to_vec(),
    };
    vec![
        SourceBody::Hello(Box::new(hello)),
        SourceBody::Pages(frame()),
        SourceBody::DeviceState(encoded_state()),
        SourceBody::Commit(Chain { count: 2, checksum: 0x1122_3344_5566_7788 }),
        SourceBody::HashRequest { seed: HashSeed::new(9) },
        SourceBody::VerifyRequest { seed: HashSeed::new(9) },
        SourceBody::Ping,
        SourceBody::Inbound(vec![b"frame".to_vec(), b"another".to_vec()]),
        SourceBody::InboundCovered { all_but: 3 },
    ]
}

fn target_bodies() -> Vec<TargetBody> {
    vec![
        TargetBody::Welcome(ImageState::Zero),
        TargetBody::Welcome(ImageState::Present),
        TargetBody::Welcome(ImageState::Committed { lineage: Lineage::new(0xfeed), epoch: Epoch::new(41) }),
        TargetBody::Ack,
        TargetBody::Hashes { start: PageAddr::new(1, 0), hashes: vec![1, 2] },
        TargetBody::HashesEnd { complete: true, device_state_hash: 3 },
        TargetBody::Refuse { code: RefuseCode::StaleTerm, text: "no".into(), known_term: Term::new(8) },
        TargetBody::Pong,
        TargetBody::GaveUp,
    ]
}

fn journal() -> Vec<u8> {
    let mut records = RecordEncoder::default();
    let mut out = encode_header(GUEST, &layout());
    out.extend(records.pages(&frame()));
    out.extend(records.device_state(&encoded_state()));
    out.extend(records.commit(commit()));
    out
}

fn state_record() -> StateRecord {
    let image = Some(ImageRecord { layout: layout(), committed: Some((commit(), device_state())) });
    StateRecord { guest: GUEST, term: Term::new(7), promoted: false, image }
}

/// One line of hexadecimal digits an item.
fn hex<'a>(items: impl IntoIterator<Item = &'a [u8]>) -> String {
    let line = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>() + "\n";
    items.into_iter().map(line).collect()
}

fn unhex(line: &str) -> Vec<u8> {
    (0..line.len()).step_by(2).map(|i| u8::from_str_radix(&line[i..i + 2], 16).unwrap()).collect()
}

/// What zstd makes of it is zstd's to choose; what is in it when it is unpacked is ours. Head, and streams of these lengths.
fn unpacked(frame: &[u8], head_len: usize, streams: &[(usize, usize)]) -> Vec<Vec<u8>> {
    let (head, mut rest) = frame.split_at(head_len);
    let mut out = vec![head[..4 + 6].to_vec(), head[4 + 6..4 + 6 + 8].to_vec()];
    for (packed_len, len) in streams {
        let packed;
        (packed, rest) = rest.split_at(*packed_len);
        out.push(if packed_len < len { zstd::bulk::decompress(packed, *len).unwrap() } else { packed.to_vec() });
        assert_eq!(out.last().unwrap().len(), *len);
    }
    assert!(rest.is_empty());
    out
}

#[test]
fn whole_pages_of_version_3() {
    let frames = whole_frames();
    assert_eq!(frames.iter().map(|frame| (frame[0], frame[1])).collect::<Vec<_>>(), [(2, 1), (2, 2), (2, 3)]);
    let u32_at = |frame: &[u8], at: usize| u32::from_le_bytes(frame[at..at + 4].try_into().unwrap()) as usize;

    let words = &frames[1];
    let [indexes, literals, tags_here, indexes_here] = [10, 14, 18, 22].map(|at| u32_at(words, at));
    let literals_here = words.len() - 26 - tags_here - indexes_here;
    let streams = unpacked(words, 26, &[(tags_here, 256), (indexes_here, indexes), (literals_here, literals)]);
    assert_eq!(hex(streams.iter().map(|stream| &stream[..])), include_str!("../../fixtures/vmsync/words-3.hex"));

    let records = &frames[2];
    let [masks, literals] = [10, 14].map(|at| u32_at(records, at));
    let streams = unpacked(records, 18, &[(records.len() - 18, 1 + 8 + masks + literals)]);
    assert_eq!(hex(streams.iter().map(|stream| &stream[..])), include_str!("../../fixtures/vmsync/records-3.hex"));
}

fn check_wire<B: Body + PartialEq + std::fmt::Debug>(bodies: &[B], fixture: &str) {
    let encoded: Vec<Encoded> = bodies.iter().map(|b| encode(Term::new(7), Epoch::new(42), b)).collect();
    assert_eq!(hex(encoded.iter().map(|e| &e.bytes[..])), fixture);
    let mut decoder = Decoder::<B>::new();
    decoder.push(&fixture.lines().flat_map(unhex).collect::<Vec<u8>>());
    let decoded: Vec<B> = std::iter::from_fn(|| decoder.next().unwrap().map(|m| m.body)).collect();
    assert_eq!(decoded, bodies);
}

#[test]
fn wire_version_3() {
    check_wire(&source_bodies(), include_str!("../../fixtures/vmsync/wire-3-source.hex"));
    check_wire(&target_bodies(), include_str!("../../fixtures/vmsync/wire-3-target.hex"));
}

/// A build of another version is told apart at its first bytes.
#[test]
fn former_wire_versions_are_refused_by_their_number() {
    let former = [
        include_str!("../../fixtures/vmsync/wire-1-source.hex"),
        include_str!("../../fixtures/vmsync/wire-2-source.hex"),
    ];
    for (theirs, fixture) in (1..).zip(former) {
        let mut lines = 0;
        for line in fixture.lines() {
            let mut decoder = Decoder::<SourceBody>::new();
            decoder.push(&unhex(line)[..6]);
            assert_eq!(decoder.next().unwrap_err(), WireError::Version { ours: 3, theirs });
            lines += 1;
        }
        assert_eq!(lines, 7);
    }
}

#[test]
fn journal_version_3() {
    let fixture = include_str!("../../fixtures/vmsync/journal-3.hex");
    assert_eq!(hex([&journal()[..]]), fixture);
    let scan = scan(&unhex(fixture.trim()), GUEST, &layout()).unwrap();
    assert_eq!(scan.epochs.len(), 1);
    assert_eq!((scan.epochs[0].commit, &scan.epochs[0].device_state), (commit(), &device_state()));
    assert_eq!(scan.epochs[0].frames[0].len(), 3);
}

#[test]
fn former_journal_versions_are_refused_by_their_number() {
    let former =
        [include_str!("../../fixtures/vmsync/journal-1.hex"), include_str!("../../fixtures/vmsync/journal-2.hex")];
    for (version, fixture) in (1..).zip(former) {
        assert_eq!(scan(&unhex(fixture.trim()), GUEST, &layout()), Err(JournalError::Version(version)));
    }
}

#[test]
fn state_record_version_1() {
    let fixture = include_str!("../../fixtures/vmsync/state-1.hex");
    assert_eq!(hex([&state_record().encode()[..]]), fixture);
    assert_eq!(StateRecord::decode(&unhex(fixture.trim()), GUEST).unwrap(), state_record());
}
