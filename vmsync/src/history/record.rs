//! Undo records: how a shadow's image is led from one epoch back to the one before.
//!
//! ```text
//! header, 120 bytes (little-endian)
//!   0   4  magic "VSHU"
//!   4   2  version
//!   6   2  0
//!   8  16  guest UUID
//!  24   8  digest of the RAM layout
//!  32   8  number of the record
//!  40  24  the older epoch, which it leads to: u64 lineage, u64 term, u64 epoch
//!  64   8  when that was committed here, milliseconds of the host's clock
//!  72  24  the newer epoch, which it leads back from
//!  96   8  when that was committed here
//! 104   8  0
//! 112   8  xxh3-64 of bytes 0..112
//! records as in the staging journal: page frames with the older contents of all pages that differ; the older device
//! state, which may be made from the newer one; and a commit record of the older epoch at the end
//! ```
//! A record without its end, or with bytes behind it, is none. Pages are whole or patches, which replace bytes: applied
//! in order, newest record first, records lead from the newer epoch, and from wherever an earlier attempt had come, to the
//! same memory.
//! Disks are blocks of pages like RAM and need no kind of record of their own.

use std::sync::Arc;

use xxhash_rust::xxh3::xxh3_64;

use super::Stamp;
use crate::bytes::{Put, Reader, Truncated};
use crate::codec::{FrameDecoder, PagesFrame, UndoEncoder};
use crate::device_state::DeviceState;
use crate::journal::{COMMIT, Commit, DEVICE_STATE, PAGES, RecordEncoder, read_commit, read_record};
use crate::layout::RamLayout;
use crate::units::{Epoch, GuestUuid, Lineage, Millis, PAGE_SIZE, Page, PageAddr, Term};
use crate::wire::Chain;

/// Version of the records that are made: their page frames are those of [`crate::journal`]'s version 3.
pub const UNDO_VERSION: u16 = 2;
/// Oldest version that is read: its page frames have no machine words, all else is the same.
pub const UNDO_VERSION_OLDEST: u16 = 1;
/// Length of a record's header, bytes.
pub const UNDO_HEADER_BYTES: usize = 120;

const MAGIC: [u8; 4] = *b"VSHU";
const SUMMED_BYTES: usize = 112;

/// What an undo record is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UndoHead {
    /// Records are numbered as they are made.
    pub seq: u64,
    pub older: Stamp,
    pub newer: Stamp,
}

/// An undo record to be made: before anything of these frames is applied.
#[derive(Debug, Clone)]
pub struct Undo {
    pub head: UndoHead,
    /// Longest record that is wanted, bytes.
    pub limit_bytes: u64,
    pub(crate) guest: GuestUuid,
    pub(crate) layout: RamLayout,
    /// What will be applied, in order.
    pub(crate) frames: Vec<Arc<PagesFrame>>,
    pub(crate) older_state: DeviceState,
    pub(crate) newer_state: DeviceState,
}

/// Why no record was made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UndoError<E> {
    #[error("{0}")]
    Driver(E),
    #[error("it would be longer than {0} bytes")]
    TooLong(u64),
}

impl Undo {
    /// Makes the record from the image as it is: `read` reads a page of it, `write` appends to the record. Returns the
    /// record's length.
    pub fn make<E>(
        &self,
        mut read: impl FnMut(PageAddr, &mut Page) -> Result<(), E>,
        write: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<u64, UndoError<E>> {
        let mut sink = Sink { write, len: 0, limit: self.limit_bytes };
        let mut records = RecordEncoder::default();
        sink.append(&self.head.encode(self.guest, &self.layout))?;
        let mut encoder = UndoEncoder::default();
        let mut changes: Vec<_> = self.frames.iter().flat_map(|frame| frame.iter()).collect();
        // By page; what came for a page stays in its order.
        changes.sort_by_key(|(addr, _)| *addr);
        let mut older = [0; PAGE_SIZE];
        for of_page in changes.chunk_by(|(a, _), (b, _)| a == b) {
            let Some((addr, _)) = of_page.first() else { continue };
            read(*addr, &mut older).map_err(UndoError::Driver)?;
            let mut newer = older;
            of_page.iter().for_each(|(_, content)| content.apply(&mut newer));
            encoder.page(*addr, newer, &older);
            for frame in encoder.full_frames() {
                sink.append(&records.pages(&frame))?;
            }
        }
        for frame in encoder.finish() {
            sink.append(&records.pages(&frame))?;
        }
        let mut state = Vec::new();
        // Its length was checked when it came in.
        let fits = self.older_state.encode(Some(&self.newer_state), &mut state);
        debug_assert!(fits.is_ok());
        sink.append(&records.device_state(&state))?;
        sink.append(&records.commit(self.head.older.commit))?;
        Ok(sink.len)
    }
}

struct Sink<W> {
    write: W,
    len: u64,
    limit: u64,
}

impl<E, W: FnMut(&[u8]) -> Result<(), E>> Sink<W> {
    fn append(&mut self, bytes: &[u8]) -> Result<(), UndoError<E>> {
        self.len += bytes.len() as u64;
        if self.len > self.limit {
            return Err(UndoError::TooLong(self.limit));
        }
        (self.write)(bytes).map_err(UndoError::Driver)
    }
}

/// Why bytes are no undo record of this image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    #[error("it is not one of virt-shadow's, or its header is damaged")]
    Header,
    #[error("it has version {0}; this build reads {UNDO_VERSION_OLDEST} to {UNDO_VERSION}")]
    Version(u16),
    #[error("it belongs to guest {0}")]
    OtherGuest(GuestUuid),
    #[error("it was written for another RAM layout")]
    OtherLayout,
    #[error("{0}")]
    Damaged(&'static str),
}

/// A whole undo record, checked but for the contents of its frames and its device state.
#[derive(Debug, Clone)]
pub struct UndoRecord<'a> {
    pub head: UndoHead,
    frames: Vec<&'a [u8]>,
    device_state: &'a [u8],
}

impl<'a> UndoRecord<'a> {
    /// Checks all of a record, and trusts nothing.
    pub fn read(bytes: &'a [u8], guest: GuestUuid, layout: &RamLayout) -> Result<Self, RecordError> {
        let head = UndoHead::decode(bytes, guest, layout)?;
        let mut reader = Reader::new(&bytes[UNDO_HEADER_BYTES..]);
        let mut record = Self { head, frames: Vec::new(), device_state: &[] };
        let mut chain = Chain::default();
        loop {
            let (kind, checksum, payload) = read_record(&mut reader).map_err(RecordError::Damaged)?;
            match kind {
                PAGES => record.frames.push(payload),
                DEVICE_STATE if record.device_state.is_empty() => record.device_state = payload,
                COMMIT => {
                    let end = read_commit(payload).map_err(|Truncated| RecordError::Damaged("its end is cut short"))?;
                    if end != (head.older.commit, chain) || record.device_state.is_empty() {
                        return Err(RecordError::Damaged("its end does not fit what is before it"));
                    }
                    if !reader.rest().is_empty() {
                        return Err(RecordError::Damaged("there is something behind its end"));
                    }
                    return Ok(record);
                }
                _ => return Err(RecordError::Damaged("it has two device states")),
            }
            chain.add(checksum);
        }
    }

    /// The older device state, made from the newer one.
    pub fn device_state(&self, newer: &DeviceState) -> Result<DeviceState, RecordError> {
        DeviceState::decode(self.device_state, Some(newer))
            .map_err(|_| RecordError::Damaged("its device state cannot be decoded"))
    }

    /// What is to be applied, in order.
    pub fn frames(&self, layout: &RamLayout) -> impl Iterator<Item = Result<PagesFrame, RecordError>> {
        let mut decoder = FrameDecoder::new();
        self.frames.iter().map(move |bytes| {
            decoder.decode(bytes, layout).map_err(|_| RecordError::Damaged("a page frame of it cannot be decoded"))
        })
    }
}

/// Whether these records can be gone back along, the newest first: all of each is decoded. `state` is the device state of
/// the newest epoch; returned is the one of the oldest.
pub fn read_back<E: std::fmt::Display>(
    seqs: &[u64],
    state: DeviceState,
    guest: GuestUuid,
    layout: &RamLayout,
    mut read: impl FnMut(u64) -> Result<Vec<u8>, E>,
) -> Result<DeviceState, String> {
    seqs.iter().try_fold(state, |newer, seq| {
        let bytes = read(*seq).map_err(|error| error.to_string())?;
        let checked = UndoRecord::read(&bytes, guest, layout).and_then(|record| {
            record.frames(layout).try_for_each(|frame| frame.map(drop))?;
            record.device_state(&newer)
        });
        checked.map_err(|error| format!("undo record {seq}: {error}"))
    })
}

impl UndoHead {
    fn encode(&self, guest: GuestUuid, layout: &RamLayout) -> Vec<u8> {
        let mut out = Vec::with_capacity(UNDO_HEADER_BYTES);
        out.extend_from_slice(&MAGIC);
        out.put_u16(UNDO_VERSION);
        out.put_u16(0);
        out.extend_from_slice(guest.as_bytes());
        out.put_u64(layout.digest());
        out.put_u64(self.seq);
        for Stamp { commit, at } in [self.older, self.newer] {
            out.put_u64(commit.lineage.get());
            out.put_u64(commit.term.get());
            out.put_u64(commit.epoch.get());
            out.put_u64(at.get());
        }
        out.put_u64(0);
        out.put_u64(xxh3_64(&out));
        out
    }

    fn decode(bytes: &[u8], guest: GuestUuid, layout: &RamLayout) -> Result<Self, RecordError> {
        let header = bytes.get(..UNDO_HEADER_BYTES).ok_or(RecordError::Header)?;
        let mut reader = Reader::new(header);
        let short = |Truncated| RecordError::Header;
        if reader.array::<4>().map_err(short)? != MAGIC {
            return Err(RecordError::Header);
        }
        let version = reader.u16().map_err(short)?;
        if !(UNDO_VERSION_OLDEST..=UNDO_VERSION).contains(&version) {
            return Err(RecordError::Version(version));
        }
        if header[SUMMED_BYTES..] != xxh3_64(&header[..SUMMED_BYTES]).to_le_bytes() {
            return Err(RecordError::Header);
        }
        reader.u16().map_err(short)?;
        let found = GuestUuid::from_bytes(reader.array().map_err(short)?);
        if found != guest {
            return Err(RecordError::OtherGuest(found));
        }
        if reader.u64().map_err(short)? != layout.digest() {
            return Err(RecordError::OtherLayout);
        }
        let seq = reader.u64().map_err(short)?;
        let mut stamp = || -> Result<Stamp, Truncated> {
            let (lineage, term) = (Lineage::new(reader.u64()?), Term::new(reader.u64()?));
            let commit = Commit { lineage, term, epoch: Epoch::new(reader.u64()?) };
            Ok(Stamp { commit, at: Millis::new(reader.u64()?) })
        };
        let (older, newer) = (stamp().map_err(short)?, stamp().map_err(short)?);
        Ok(Self { seq, older, newer })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::codec::{Encoder, MirrorBudget};
    use crate::hashes::HashSeed;
    use crate::layout::RamBlock;

    const GUEST: GuestUuid = GuestUuid::from_bytes([1; 16]);
    const PAGES_OF_GUEST: usize = 40;

    fn layout() -> RamLayout {
        RamLayout::new(vec![RamBlock { name: "pc.ram".into(), len_bytes: 40 * 4096 }]).unwrap()
    }

    fn stamp(epoch: u64) -> Stamp {
        let commit = Commit { lineage: Lineage::new(5), term: Term::new(2), epoch: Epoch::new(epoch) };
        Stamp { commit, at: Millis::new(epoch * 50) }
    }

    fn state(epoch: u64) -> DeviceState {
        let bytes: Vec<u8> = (0..3000).map(|i| (i / 9) as u8 ^ if i == 77 { epoch as u8 } else { 0 }).collect();
        DeviceState { running: epoch.is_multiple_of(2), bytes: bytes.into() }
    }

    fn undo(frames: Vec<PagesFrame>) -> Undo {
        Undo {
            head: UndoHead { seq: 9, older: stamp(3), newer: stamp(4) },
            limit_bytes: 1 << 20,
            guest: GUEST,
            layout: layout(),
            frames: frames.into_iter().map(Arc::new).collect(),
            older_state: state(3),
            newer_state: state(4),
        }
    }

    /// The record, from an image as it is.
    fn made(undo: &Undo, image: &[Page]) -> Result<Vec<u8>, UndoError<()>> {
        let mut record = Vec::new();
        let read = |addr: PageAddr, page: &mut Page| {
            *page = image[addr.page.get() as usize];
            Ok(())
        };
        let len = undo.make(read, |bytes| {
            record.extend_from_slice(bytes);
            Ok(())
        })?;
        assert_eq!(len, record.len() as u64);
        Ok(record)
    }

    fn apply(image: &mut [Page], frame: &PagesFrame) {
        frame.iter().for_each(|(addr, content)| content.apply(&mut image[addr.page.get() as usize]));
    }

    fn page(kind: u8, seed: u64) -> Page {
        let mut word = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut noise = || {
            word ^= word << 13;
            word ^= word >> 7;
            word ^= word << 17;
            word as u8
        };
        match kind {
            0 => [0; PAGE_SIZE],
            1 => [seed as u8; PAGE_SIZE],
            2 => std::array::from_fn(|_| noise()),
            _ => std::array::from_fn(|i| if i as u64 % 509 == seed % 7 { noise() } else { (i / 8) as u8 }),
        }
    }

    proptest! {
        /// Whatever came for whatever pages, also twice: the record leads back, also when that was begun before.
        #[test]
        fn records_lead_back(
            before in prop::collection::vec((0u8..4, 0u64..50), PAGES_OF_GUEST),
            writes in prop::collection::vec((0u32..PAGES_OF_GUEST as u32, 0u8..4, 0u64..50), 1..80),
            begun in 0usize..4,
        ) {
            let older: Vec<Page> = before.iter().map(|(kind, seed)| page(*kind, *seed)).collect();
            let mut encoder = Encoder::new(&layout(), MirrorBudget::Full, HashSeed::new(1), 1);
            for (i, page) in older.iter().enumerate() {
                encoder.page(PageAddr::new(0, i as u32), page);
            }
            encoder.finish();
            let mut frames = Vec::new();
            for (i, (at, kind, seed)) in writes.iter().enumerate() {
                encoder.page(PageAddr::new(0, *at), &page(*kind, *seed));
                if i % 7 == 0 {
                    frames.extend(encoder.finish());
                }
            }
            frames.extend(encoder.finish());
            let frames: Vec<_> =
                frames.iter().map(|f| FrameDecoder::new().decode(f, &layout()).unwrap()).collect();
            let undo = undo(frames.clone());
            let bytes = made(&undo, &older).unwrap();

            let mut image = older.clone();
            frames.iter().for_each(|frame| apply(&mut image, frame));
            let record = UndoRecord::read(&bytes, GUEST, &layout()).unwrap();
            prop_assert_eq!(record.head, undo.head);
            prop_assert_eq!(record.device_state(&state(4)), Ok(state(3)));
            record.frames(&layout()).take(begun).for_each(|frame| apply(&mut image, &frame.unwrap()));
            for _ in 0..2 {
                record.frames(&layout()).for_each(|frame| apply(&mut image, &frame.unwrap()));
                prop_assert!(image == older);
            }
        }
    }

    fn small() -> Vec<u8> {
        let mut encoder = Encoder::new(&layout(), MirrorBudget::Bytes(0), HashSeed::new(1), 1);
        encoder.whole(PageAddr::new(0, 7), &page(3, 1));
        let frame = FrameDecoder::new().decode(&encoder.finish()[0], &layout()).unwrap();
        made(&undo(vec![frame]), &vec![page(3, 2); PAGES_OF_GUEST]).unwrap()
    }

    #[test]
    fn every_cut_and_every_flipped_bit_is_found() {
        let bytes = small();
        assert!(bytes.len() < 500, "{} bytes for few changes", bytes.len());
        for len in 0..bytes.len() {
            assert!(UndoRecord::read(&bytes[..len], GUEST, &layout()).is_err(), "{len} bytes");
        }
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(UndoRecord::read(&damaged, GUEST, &layout()).is_err(), "bit {bit}");
        }
        let longer = [&bytes[..], &[0]].concat();
        assert!(UndoRecord::read(&longer, GUEST, &layout()).is_err());
    }

    #[test]
    fn other_versions_are_refused_by_their_number() {
        let mut bytes = small();
        assert_eq!(bytes[4..6], UNDO_VERSION.to_le_bytes());
        for version in [0, UNDO_VERSION + 1, u16::MAX] {
            bytes[4..6].copy_from_slice(&version.to_le_bytes());
            let error = UndoRecord::read(&bytes, GUEST, &layout()).unwrap_err();
            assert_eq!(error, RecordError::Version(version));
            assert!(error.to_string().contains("this build reads 1 to 2"), "{error}");
        }
    }

    /// With a page as machine words in it.
    fn with_words() -> Vec<u8> {
        let mut encoder = Encoder::new(&layout(), MirrorBudget::Bytes(0), HashSeed::new(1), 1);
        encoder.whole(PageAddr::new(0, 7), &page(2, 1));
        let frame = FrameDecoder::new().decode(&encoder.finish()[0], &layout()).unwrap();
        made(&undo(vec![frame]), &vec![words(); PAGES_OF_GUEST]).unwrap()
    }

    fn words() -> Page {
        std::array::from_fn(|i| if i % 8 < 3 { (i / 8 * (i % 8 + 1)) as u8 } else { 0 })
    }

    /// Records that builds of both versions made: zstd's part of them is what it was then.
    #[test]
    fn records_of_both_versions_are_read() {
        let unhex = |text: &str| -> Vec<u8> {
            let text = text.trim();
            (0..text.len()).step_by(2).map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap()).collect()
        };
        let first = unhex(include_str!("../../../fixtures/vmsync/undo-1.hex"));
        let second = unhex(include_str!("../../../fixtures/vmsync/undo-2.hex"));
        for (version, bytes, older, in_words) in [(1u16, first, page(3, 2), false), (2, second, words(), true)] {
            assert_eq!(bytes[4..6], version.to_le_bytes());
            let record = UndoRecord::read(&bytes, GUEST, &layout()).unwrap();
            assert_eq!((record.head, record.device_state(&state(4))), (undo(vec![]).head, Ok(state(3))));
            // Whole pages, as words.
            assert_eq!(record.frames.iter().any(|frame| frame[..2] == [2, 2]), in_words);
            let mut image = vec![older; PAGES_OF_GUEST];
            image[7] = page(if in_words { 2 } else { 3 }, 1);
            record.frames(&layout()).for_each(|frame| apply(&mut image, &frame.unwrap()));
            assert!(image[7] == older, "version {version}");
        }
        // And those that are made now are such ones.
        assert!(
            with_words()[..UNDO_HEADER_BYTES]
                == unhex(include_str!("../../../fixtures/vmsync/undo-2.hex"))[..UNDO_HEADER_BYTES]
        );
    }

    #[test]
    fn records_of_others_are_told_apart_and_long_ones_are_not_made() {
        let bytes = small();
        let read = |guest, layout: &RamLayout| UndoRecord::read(&bytes, guest, layout).map(|r| r.head.seq);
        assert_eq!(read(GUEST, &layout()), Ok(9));
        assert_eq!(read(GuestUuid::from_bytes([2; 16]), &layout()), Err(RecordError::OtherGuest(GUEST)));
        let other = RamLayout::new(vec![RamBlock { name: "a".into(), len_bytes: 4096 }]).unwrap();
        assert_eq!(read(GUEST, &other), Err(RecordError::OtherLayout));
        let mut undo = undo(vec![]);
        undo.limit_bytes = 150;
        assert_eq!(made(&undo, &[]), Err(UndoError::TooLong(150)));
    }
}
