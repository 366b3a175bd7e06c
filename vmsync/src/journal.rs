//! The staging journal: what a shadow has received and not yet applied to its image.
//!
//! ```text
//! header, 40 bytes (little-endian)
//!   0   4  magic "VSHJ"
//!   4   2  journal version
//!   6   2  0
//!   8  16  guest UUID
//!  24   8  digest of the RAM layout
//!  32   8  xxh3-64 of bytes 0..32
//! record, 16 bytes and a payload
//!   0   1  kind: 1 page frame, 2 device state, 3 commit
//!   1   3  0
//!   4   4  length of the payload
//!   8   8  xxh3-64 of the payload, seeded with the xxh3-64 of bytes 0..8
//!  16      payload: the frame as it came over the wire; the device state, whole; or, of a commit:
//!          u64 lineage, u64 term, u64 epoch, u32 count and u64 checksum of the chain of the epoch's records
//! ```
//! A redo log: an epoch is sealed once its commit record is durable. Replaying sealed epochs in order gives the
//! image of the last one, however often and from whatever half-applied state: pages are whole, or changes that replace
//! bytes. Each byte that differs from the image of the last applied epoch is written by the replay, the last time with
//! its last value; all others have not changed.
//! What follows the last commit record is an epoch that was never acknowledged, and is dropped. A crash leaves a beginning
//! of it. What ends otherwise, a whole record with a wrong checksum or a damaged one before a commit record, was changed
//! where it lay: it may have been acknowledged, and be applied in part.

use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use crate::bytes::{Put, Reader, Truncated};
use crate::codec::{FrameDecoder, MAX_FRAME_BYTES, PagesFrame};
use crate::device_state::{DeviceState, MAX_ENCODED_BYTES};
use crate::layout::RamLayout;
use crate::units::{Epoch, GuestUuid, Lineage, Term};
use crate::wire::Chain;

/// Version of the journal's layout.
pub const JOURNAL_VERSION: u16 = 3;
/// Length of the journal's header, bytes.
pub const JOURNAL_HEADER_BYTES: u64 = 40;

const MAGIC: [u8; 4] = *b"VSHJ";
const RECORD_HEAD_BYTES: usize = 16;
pub(crate) const PAGES: u8 = 1;
pub(crate) const DEVICE_STATE: u8 = 2;
pub(crate) const COMMIT: u8 = 3;
const COMMIT_BYTES: usize = 36;

/// Which epoch of which source an image holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Commit {
    pub lineage: Lineage,
    /// Term of the primary that it came from.
    pub term: Term,
    pub epoch: Epoch,
}

/// The journal's first bytes.
pub fn encode_header(guest: GuestUuid, layout: &RamLayout) -> Vec<u8> {
    let mut out = Vec::with_capacity(JOURNAL_HEADER_BYTES as usize);
    out.extend_from_slice(&MAGIC);
    out.put_u16(JOURNAL_VERSION);
    out.put_u16(0);
    out.extend_from_slice(guest.as_bytes());
    out.put_u64(layout.digest());
    out.put_u64(xxh3_64(&out));
    out
}

/// Encodes the records of one epoch, and chains their checksums for its commit.
#[derive(Debug, Default)]
pub struct RecordEncoder {
    chain: Chain,
}

impl RecordEncoder {
    /// A record of an encoded page frame.
    pub fn pages(&mut self, frame: &[u8]) -> Vec<u8> {
        self.record(PAGES, frame)
    }

    /// A record of encoded device state.
    pub fn device_state(&mut self, state: &[u8]) -> Vec<u8> {
        self.record(DEVICE_STATE, state)
    }

    /// The record that seals the epoch; the next record begins another one.
    pub fn commit(&mut self, commit: Commit) -> Vec<u8> {
        let chain = std::mem::take(&mut self.chain);
        let mut payload = Vec::with_capacity(COMMIT_BYTES);
        payload.put_u64(commit.lineage.get());
        payload.put_u64(commit.term.get());
        payload.put_u64(commit.epoch.get());
        payload.put_u32(chain.count);
        payload.put_u64(chain.checksum);
        let record = self.record(COMMIT, &payload);
        self.chain = Chain::default();
        record
    }

    /// Forgets the records since the last commit.
    pub fn reset(&mut self) {
        self.chain = Chain::default();
    }

    fn record(&mut self, kind: u8, payload: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(RECORD_HEAD_BYTES + payload.len());
        out.put_u8(kind);
        out.extend_from_slice(&[0; 3]);
        out.put_u32(payload.len() as u32); // payloads are at most 16 MiB and a little
        let checksum = xxh3_64_with_seed(payload, xxh3_64(&out));
        out.put_u64(checksum);
        out.extend_from_slice(payload);
        self.chain.add(checksum);
        out
    }
}

/// One sealed epoch of a journal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SealedEpoch {
    pub commit: Commit,
    /// In the order they are to be applied.
    pub frames: Vec<PagesFrame>,
    pub device_state: DeviceState,
}

/// What a journal holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scan {
    /// Sealed epochs, oldest first.
    pub epochs: Vec<SealedEpoch>,
    /// Bytes up to the end of the last sealed epoch (of the header, if there is none).
    pub sealed_len_bytes: u64,
    /// Why the scan ended before the end of the bytes, if it did: the mark of a crash while staging, unless it is
    /// `damaged`.
    pub tail: Option<&'static str>,
    /// No crash leaves bytes as those that follow: sealed epochs may be missing.
    pub damaged: bool,
}

/// A journal that does not belong to this image, or is of another version. There is nothing to replay from it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JournalError {
    #[error("journal is not one of virt-shadow's, or its header is damaged")]
    Header,
    #[error("journal has version {0}; this build reads {JOURNAL_VERSION}")]
    Version(u16),
    #[error("journal belongs to guest {0}")]
    OtherGuest(GuestUuid),
    #[error("journal was written for another RAM layout")]
    OtherLayout,
}

/// Reads a journal. An empty one is as good as one with a header only. Never panics, whatever the bytes.
pub fn scan(bytes: &[u8], guest: GuestUuid, layout: &RamLayout) -> Result<Scan, JournalError> {
    if bytes.is_empty() {
        return Ok(Scan { epochs: Vec::new(), sealed_len_bytes: 0, tail: None, damaged: false });
    }
    check_header(bytes, guest, layout)?;
    let mut scanner = Scanner { layout, decoder: FrameDecoder::new(), open: Open::default() };
    let mut reader = Reader::new(&bytes[JOURNAL_HEADER_BYTES as usize..]);
    let mut scan = Scan { epochs: Vec::new(), sealed_len_bytes: JOURNAL_HEADER_BYTES, tail: None, damaged: false };
    while !reader.rest().is_empty() {
        let rest = reader.rest();
        match scanner.record(&mut reader) {
            Ok(Some(epoch)) => {
                scan.epochs.push(epoch);
                scan.sealed_len_bytes = (bytes.len() - reader.rest().len()) as u64;
            }
            Ok(None) => {}
            Err(what) => {
                (scan.tail, scan.damaged) = (Some(what), what != CUT_SHORT || seals_something(rest));
                return Ok(scan);
            }
        }
    }
    if scanner.open.chain.count > 0 {
        scan.tail = Some("the last epoch is not sealed");
    }
    Ok(scan)
}

fn check_header(bytes: &[u8], guest: GuestUuid, layout: &RamLayout) -> Result<(), JournalError> {
    let header = bytes.get(..JOURNAL_HEADER_BYTES as usize).ok_or(JournalError::Header)?;
    let damaged = |Truncated| JournalError::Header;
    let mut reader = Reader::new(header);
    if reader.array::<4>().map_err(damaged)? != MAGIC {
        return Err(JournalError::Header);
    }
    let version = reader.u16().map_err(damaged)?;
    if version != JOURNAL_VERSION {
        return Err(JournalError::Version(version));
    }
    reader.u16().map_err(damaged)?;
    let found = GuestUuid::from_bytes(reader.array().map_err(damaged)?);
    let digest = reader.u64().map_err(damaged)?;
    if reader.u64().map_err(damaged)? != xxh3_64(&header[..32]) {
        return Err(JournalError::Header);
    }
    if found != guest {
        return Err(JournalError::OtherGuest(found));
    }
    if digest != layout.digest() {
        return Err(JournalError::OtherLayout);
    }
    Ok(())
}

struct Scanner<'a> {
    layout: &'a RamLayout,
    decoder: FrameDecoder,
    open: Open,
}

/// The epoch that is being read.
#[derive(Default)]
struct Open {
    chain: Chain,
    frames: Vec<PagesFrame>,
    device_state: Option<DeviceState>,
}

impl Scanner<'_> {
    /// Reads one record; returns the epoch if it sealed one.
    fn record(&mut self, reader: &mut Reader<'_>) -> Result<Option<SealedEpoch>, &'static str> {
        let (kind, checksum, payload) = read_record(reader)?;
        match kind {
            PAGES => {
                let frame = self.decoder.decode(payload, self.layout).map_err(|_| "a page frame cannot be decoded")?;
                self.open.frames.push(frame);
            }
            DEVICE_STATE => {
                let state = DeviceState::decode(payload, None).map_err(|_| "device state cannot be decoded")?;
                self.open.device_state = Some(state);
            }
            _ => return self.seal(payload).map(Some),
        }
        self.open.chain.add(checksum);
        Ok(None)
    }

    fn seal(&mut self, payload: &[u8]) -> Result<SealedEpoch, &'static str> {
        let (commit, chain) = read_commit(payload).map_err(|Truncated| "a commit record is cut short")?;
        let open = std::mem::take(&mut self.open);
        if open.chain != chain {
            return Err("a commit record does not seal the records before it");
        }
        let device_state = open.device_state.ok_or("a sealed epoch has no device state")?;
        Ok(SealedEpoch { commit, frames: open.frames, device_state })
    }
}

const CUT_SHORT: &str = "the last record is cut short";

/// Whether bytes that begin with a record that claims to be longer hold a commit record, or the length of one.
fn seals_something(rest: &[u8]) -> bool {
    const WHOLE: usize = RECORD_HEAD_BYTES + COMMIT_BYTES;
    let is_commit = |bytes: &[u8]| {
        bytes.starts_with(&[COMMIT, 0, 0, 0, COMMIT_BYTES as u8]) && read_record(&mut Reader::new(bytes)).is_ok()
    };
    rest.first() == Some(&COMMIT) && rest.len() >= WHOLE || rest.windows(WHOLE).any(is_commit)
}

pub(crate) fn read_record<'a>(reader: &mut Reader<'a>) -> Result<(u8, u64, &'a [u8]), &'static str> {
    let short = |Truncated| CUT_SHORT;
    let head = reader.array::<8>().map_err(short)?;
    let checksum = reader.u64().map_err(short)?;
    let [kind, _, _, _, len @ ..] = head;
    let len = u32::from_le_bytes(len) as usize;
    let max = match kind {
        PAGES => MAX_FRAME_BYTES,
        DEVICE_STATE => MAX_ENCODED_BYTES,
        COMMIT => COMMIT_BYTES,
        _ => return Err("a record has an unknown kind"),
    };
    if len > max {
        return Err("a record claims too many bytes");
    }
    let payload = reader.take(len).map_err(short)?;
    if xxh3_64_with_seed(payload, xxh3_64(&head)) != checksum {
        return Err("a record is damaged (checksum)");
    }
    Ok((kind, checksum, payload))
}

pub(crate) fn read_commit(payload: &[u8]) -> Result<(Commit, Chain), Truncated> {
    let mut reader = Reader::new(payload);
    let commit = Commit {
        lineage: Lineage::new(reader.u64()?),
        term: Term::new(reader.u64()?),
        epoch: Epoch::new(reader.u64()?),
    };
    Ok((commit, Chain { count: reader.u32()?, checksum: reader.u64()? }))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::codec::{Encoder, MirrorBudget};
    use crate::hashes::HashSeed;
    use crate::layout::RamBlock;
    use crate::units::PageAddr;

    const GUEST: GuestUuid = GuestUuid::from_bytes([1; 16]);

    fn layout() -> RamLayout {
        RamLayout::new(vec![RamBlock { name: "pc.ram".into(), len_bytes: 40 * 4096 }]).unwrap()
    }

    fn commit(epoch: u64) -> Commit {
        Commit { lineage: Lineage::new(5), term: Term::new(2), epoch: Epoch::new(epoch) }
    }

    fn frame(page: u32, fill: u8) -> Vec<u8> {
        let mut encoder = Encoder::new(&layout(), MirrorBudget::Bytes(0), HashSeed::new(1), 1);
        encoder.whole(PageAddr::new(0, page), &[fill; 4096]);
        encoder.finish().remove(0)
    }

    fn state(epoch: u64) -> Vec<u8> {
        let mut out = Vec::new();
        DeviceState { running: true, bytes: epoch.to_le_bytes().to_vec().into() }.encode_raw(&mut out).unwrap();
        out
    }

    /// A journal as a list of records: `epochs` sealed ones of two frames each, and an open one.
    fn records(epochs: u64) -> Vec<Vec<u8>> {
        let mut encoder = RecordEncoder::default();
        let mut out = vec![encode_header(GUEST, &layout())];
        for epoch in 1..=epochs + 1 {
            out.push(encoder.pages(&frame(epoch as u32, 1)));
            out.push(encoder.pages(&frame(epoch as u32 + 1, 0)));
            out.push(encoder.device_state(&state(epoch)));
            if epoch <= epochs {
                out.push(encoder.commit(commit(epoch)));
            }
        }
        out
    }

    fn epochs_in(bytes: &[u8]) -> Vec<u64> {
        let scan = scan(bytes, GUEST, &layout()).unwrap();
        for epoch in &scan.epochs {
            assert_eq!(epoch.frames.len(), 2);
            assert_eq!(&epoch.device_state.bytes[..], epoch.commit.epoch.get().to_le_bytes());
        }
        scan.epochs.iter().map(|e| e.commit.epoch.get()).collect()
    }

    #[test]
    fn sealed_epochs_come_back_in_order_and_an_open_one_does_not() {
        let records = records(3);
        let bytes = records.concat();
        assert_eq!(epochs_in(&bytes), [1, 2, 3]);
        let scan = scan(&bytes, GUEST, &layout()).unwrap();
        assert_eq!(scan.tail, Some("the last epoch is not sealed"));
        let sealed = scan.sealed_len_bytes as usize;
        assert_eq!(sealed, records[..records.len() - 3].concat().len());
        assert_eq!(epochs_in(&bytes[..sealed]), [1, 2, 3]);
        assert_eq!(super::scan(&bytes[..sealed], GUEST, &layout()).unwrap().tail, None);
    }

    #[test]
    fn a_cut_at_any_byte_leaves_whole_epochs() {
        let records = records(2);
        let bytes = records.concat();
        let ends: Vec<usize> = [4, 8].iter().map(|n| records[..=*n].concat().len()).collect();
        for len in JOURNAL_HEADER_BYTES as usize..=bytes.len() {
            let expected = ends.iter().filter(|end| **end <= len).count() as u64;
            assert_eq!(epochs_in(&bytes[..len]), (1..=expected).collect::<Vec<_>>(), "{len} bytes");
            assert!(!scan(&bytes[..len], GUEST, &layout()).unwrap().damaged, "{len} bytes");
        }
        assert_eq!(epochs_in(&[]), [0; 0]);
        assert_eq!(scan(&bytes[..39], GUEST, &layout()), Err(JournalError::Header));
    }

    #[test]
    fn records_that_are_missing_doubled_or_swapped_seal_nothing() {
        let good = records(1);
        for (what, order) in [
            ("missing", vec![0, 1, 3, 4]),
            ("doubled", vec![0, 1, 1, 2, 3, 4]),
            ("swapped", vec![0, 2, 1, 3, 4]),
            ("left over from another epoch", vec![0, 5, 1, 2, 3, 4]),
        ] {
            let bytes: Vec<u8> = order.into_iter().flat_map(|i: usize| good[i].clone()).collect();
            assert_eq!(epochs_in(&bytes), [0; 0], "{what}");
        }
    }

    #[test]
    fn a_journal_of_another_guest_or_layout_is_told_apart() {
        let bytes = records(1).concat();
        let other = GuestUuid::from_bytes([2; 16]);
        assert_eq!(scan(&bytes, other, &layout()), Err(JournalError::OtherGuest(GUEST)));
        let smaller = RamLayout::new(vec![RamBlock { name: "pc.ram".into(), len_bytes: 4096 }]).unwrap();
        assert_eq!(scan(&bytes, GUEST, &smaller), Err(JournalError::OtherLayout));
        let mut newer = bytes.clone();
        newer[4] = 9;
        assert_eq!(scan(&newer, GUEST, &layout()), Err(JournalError::Version(9)));
    }

    proptest! {
        #[test]
        fn any_damage_leaves_a_prefix(at in 0usize..2000, value: u8) {
            let mut bytes = records(4).concat();
            let at = at % bytes.len();
            bytes[at] = value;
            if let Ok(scan) = scan(&bytes, GUEST, &layout()) {
                let found: Vec<u64> = scan.epochs.iter().map(|e| e.commit.epoch.get()).collect();
                prop_assert_eq!(&found, &(1..=found.len() as u64).collect::<Vec<_>>());
            }
        }

        #[test]
        fn a_changed_byte_is_told_from_a_crash_if_a_sealed_epoch_is_missing(at in 0usize..2000, change in 1u8..) {
            let records = records(3);
            // With and without an epoch that was being staged.
            for mut bytes in [records.concat(), records[..records.len() - 3].concat()] {
                let at = at % bytes.len();
                bytes[at] ^= change;
                if let Ok(scan) = scan(&bytes, GUEST, &layout()) {
                    prop_assert!(scan.epochs.len() == 3 || scan.damaged, "{:?} at {}", scan.tail, at);
                }
            }
        }

        #[test]
        fn noise_behind_a_header_seals_nothing(noise in prop::collection::vec(any::<u8>(), 0..500)) {
            let bytes = [encode_header(GUEST, &layout()), noise].concat();
            prop_assert!(scan(&bytes, GUEST, &layout()).unwrap().epochs.is_empty());
        }
    }
}
