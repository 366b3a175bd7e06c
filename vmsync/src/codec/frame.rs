//! Page frames: how pages travel and are journaled, and the decoder, which trusts nothing.
//!
//! ```text
//! changes                                          whole pages
//! offset  size  field (little-endian)              offset  size  field
//!      0     1  1                                       0     1  2
//!      1     1  encoding: 0 raw, 1 one zstd block       1     1  encoding of the data
//!      2     2  n: pages, 1 to 4,096                    2     2  n: pages, 1 to 64
//!      4     2  d: pages with a patch, at most n        4    6n  pages: u32 page, u16 block
//!      6     2  0                                    4+6n        their data, 4,096 bytes each before encoding
//!      8     4  length of the addresses
//!     12     4  length of the runs
//!     16     4  length of the data
//!     20    4d  of each patch: u16 tag of the page before it, u16 tag of the page after it
//!  20+4d        addresses, runs, data: one after the other, encoded as one; at most 256 KiB before
//!
//! Whole pages have two more encodings. After their pages stand
//!   2  words    u32 lengths of the indexes and of the literals, u32 lengths of tags and indexes as they stand here;
//!               tags, indexes, literals: see `words`
//!   3  records  u32 lengths of the masks and of the literals; strides, lines, masks, literals, as one: see `records`
//! What is shorter here than it is is one zstd block, what is not is raw.
//!
//! address: varint value * 4 + kind
//!   kind 0  page is zero          value: pages between it and the last address's (0: its neighbour)
//!   kind 1  one word throughout   the same; the word is the next 8 bytes of the data
//!   kind 2  patch                 the same; its runs and bytes are next in the runs and in the data
//!   kind 3  block                 value: number of the block that the next pages are in, from its first page on
//! ```
//! Runs are described in [`super::diff`], tags in [`super::sum`]. What decides how much memory a frame takes stands
//! before the first compressed byte. Small things of a kind lie together, which zstd likes; tags, which it cannot
//! shrink, stay outside. Later contents of a page override earlier ones.

use zstd::bulk::Decompressor;
use zstd::zstd_safe::WriteBuf;

use super::diff::{Patch, take_page_runs, take_varint};
use super::sum::{KnownPages, Tag, fill_sum, page_sum, tag};
use super::{records, words};
use crate::bytes::{Reader, Truncated};
use crate::layout::RamLayout;
use crate::units::{BlockIndex, PAGE_SIZE, Page, PageAddr, PageIndex};

/// Most pages in a frame of changes.
pub const MAX_CHANGED_PAGES: usize = 4096;
/// Most pages in a frame of whole pages.
pub const MAX_WHOLE_PAGES: usize = 64;
/// Most bytes of addresses, runs and data in a frame of changes, before encoding.
pub const MAX_STREAM_BYTES: usize = 256 << 10;
/// Longest encoded frame, bytes.
pub const MAX_FRAME_BYTES: usize = CHANGES_HEAD_BYTES + MAX_CHANGED_PAGES * TAGS_BYTES + MAX_STREAM_BYTES;

pub(super) const CHANGES: u8 = 1;
pub(super) const WHOLE: u8 = 2;
pub(super) const RAW: u8 = 0;
pub(super) const ZSTD: u8 = 1;
/// Of whole pages only, as are the next ones.
pub(super) const WORDS: u8 = 2;
pub(super) const RECORDS: u8 = 3;
pub(super) const WORDS_HEAD_BYTES: usize = 16;
pub(super) const RECORDS_HEAD_BYTES: usize = 8;
pub(super) const CHANGES_HEAD_BYTES: usize = 20;
pub(super) const TAGS_BYTES: usize = 4;
pub(super) const KIND_ZERO: usize = 0;
pub(super) const KIND_FILL: usize = 1;
pub(super) const KIND_PATCH: usize = 2;
pub(super) const KIND_BLOCK: usize = 3;
pub(super) const WHOLE_HEAD_BYTES: usize = 4;
pub(super) const ENTRY_BYTES: usize = 6;
const ADDRESS_MAX_BYTES: usize = 5;
/// Pages between one that is written and the one that is fetched.
const WRITE_AHEAD: usize = 4;

/// Contents of a page in a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageContent<'a> {
    Zero,
    /// This word (little-endian) throughout.
    Fill(u64),
    Data(&'a Page),
    /// Changes against what the page holds once all earlier frames are applied.
    Patch(Patch<'a>),
}

impl PageContent<'_> {
    /// Brings a page from its previous contents to these.
    pub fn apply(&self, page: &mut Page) {
        match self {
            Self::Zero => page.fill(0),
            Self::Fill(word) => page.as_chunks_mut::<8>().0.fill(word.to_le_bytes()),
            Self::Data(data) => page.copy_from_slice(&data[..]),
            Self::Patch(patch) => patch.apply(page),
        }
    }
}

/// A decoded, checked frame.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PagesFrame {
    entries: Vec<Entry>,
    /// Decoded data of whole pages, or addresses, runs and data of changes.
    bytes: Vec<u8>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    addr: PageAddr,
    content: Stored,
}

/// Positions are within a frame's bytes, which are fewer than 2^32; lengths are at most a page's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stored {
    Zero,
    Fill(u64),
    Data { at: u32 },
    Patch { runs_at: u32, data_at: u32, lines: u64, runs_len: u16, data_len: u16, before: Tag, after: Tag },
}

/// Why bytes are not a frame. Always a fault of the sender or of the medium.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("page frame is cut short")]
    Truncated,
    #[error("page frame has {found} pages; 1 to {max} are allowed")]
    PageCount { found: u16, max: usize },
    #[error("page frame has a field with the unknown value {0}")]
    UnknownValue(u8),
    #[error("page frame names {0}, which the guest's RAM layout does not have")]
    OutsideLayout(PageAddr),
    #[error("page frame's data should be {expected} bytes but is {found}")]
    DataLength { expected: usize, found: usize },
    #[error("page frame claims {0} bytes of changes; at most {MAX_STREAM_BYTES} are allowed")]
    StreamLength(u64),
    #[error("page frame's {0} do not add up")]
    Changes(&'static str),
    #[error("page frame's machine words do not add up")]
    Words,
    #[error("page frame's records do not add up")]
    Records,
    #[error("page frame's data is not a zstd block: {0}")]
    Zstd(String),
}

impl From<Truncated> for FrameError {
    fn from(Truncated: Truncated) -> Self {
        Self::Truncated
    }
}

/// A patch was made against other contents than the page has here: source and target are out of step, which is a
/// fault of one of them. All pages must be compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the changes of {addr} were made against other contents than this shadow has")]
pub struct OutOfStep {
    pub addr: PageAddr,
}

impl PagesFrame {
    /// Number of entries.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Pages in the order they are to be written.
    pub fn iter(&self) -> impl Iterator<Item = (PageAddr, PageContent<'_>)> {
        self.entries.iter().map(|entry| (entry.addr, self.content(entry.content)))
    }

    /// Pages in the order they are to be written, each with a later one that is to be fetched meanwhile, and which of
    /// its lines, a bit each: what a guest wrote is in nobody's cache here.
    pub fn writes(&self) -> impl Iterator<Item = (PageAddr, PageContent<'_>, Option<(PageAddr, u64)>)> {
        let mut soon = self.entries.iter().skip(WRITE_AHEAD).map(|entry| match entry.content {
            Stored::Patch { lines, .. } => (entry.addr, lines),
            _ => (entry.addr, u64::MAX),
        });
        self.iter().map(move |(addr, content)| (addr, content, soon.next()))
    }

    /// Memory this frame takes, for limits.
    pub fn memory_bytes(&self) -> u64 {
        (self.bytes.len() + self.entries.len() * size_of::<Entry>()) as u64
    }

    fn content(&self, stored: Stored) -> PageContent<'_> {
        // The decoder checked that all positions are within the bytes.
        match stored {
            Stored::Zero => PageContent::Zero,
            Stored::Fill(word) => PageContent::Fill(word),
            Stored::Data { at } => self.bytes[at as usize..].first_chunk().map_or(PageContent::Zero, PageContent::Data),
            Stored::Patch { runs_at, data_at, runs_len, data_len, .. } => {
                let slice = |at: u32, len: u16| &self.bytes[at as usize..at as usize + usize::from(len)];
                PageContent::Patch(Patch::of_page(slice(runs_at, runs_len), slice(data_at, data_len)))
            }
        }
    }
}

impl KnownPages {
    /// Checks that the frame's patches fit what is known of their pages, and takes note of what the pages are now.
    /// What is not known is not checked: after a restart of the agent, until it has come once.
    pub fn accept(&mut self, frame: &PagesFrame) -> Result<(), OutOfStep> {
        for entry in &frame.entries {
            if let Stored::Patch { before, .. } = entry.content
                && self.get(entry.addr).is_some_and(|known| known != before)
            {
                return Err(OutOfStep { addr: entry.addr });
            }
        }
        for entry in &frame.entries {
            let tag = match (entry.content, frame.content(entry.content)) {
                (Stored::Patch { after, .. }, _) => after,
                (_, PageContent::Fill(word)) => tag(fill_sum(word)),
                (_, PageContent::Data(page)) => tag(page_sum(page)),
                (_, PageContent::Zero | PageContent::Patch(_)) => tag(0),
            };
            self.set(entry.addr, tag);
        }
        Ok(())
    }

    /// The frame is dropped instead of applied.
    pub fn drop_frame(&mut self, frame: &PagesFrame) {
        frame.entries.iter().for_each(|entry| self.forget(entry.addr));
    }
}

/// Reads frames, trusting nothing; reuses zstd's buffers, and those of frames that are given back.
#[derive(Default)]
pub struct FrameDecoder {
    decompressor: Option<Decompressor<'static>>,
    /// Of words or records: as long as the longest yet.
    streams: Vec<u8>,
    spare: Vec<PagesFrame>,
}

/// Frames whose memory is kept: some 8 MiB.
const SPARE_MAX: usize = 32;

impl FrameDecoder {
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes a frame back that is needed no longer: its memory serves a later one.
    pub fn reuse(&mut self, frame: PagesFrame) {
        if self.spare.len() < SPARE_MAX {
            self.spare.push(frame);
        }
    }

    /// Checks and decodes one frame whose pages must lie in `layout`. Allocates at most 512 KiB for it.
    pub fn decode(&mut self, bytes: &[u8], layout: &RamLayout) -> Result<PagesFrame, FrameError> {
        let mut reader = Reader::new(bytes);
        let (kind, encoding, pages) = head(&mut reader)?;
        let mut frame = self.spare.pop().unwrap_or_default();
        frame.entries.clear();
        let decoded = if kind == CHANGES {
            self.changes(&mut reader, encoding, pages, layout, &mut frame)
        } else {
            self.whole(&mut reader, encoding, pages, layout, &mut frame)
        };
        match decoded {
            Ok(()) => Ok(frame),
            Err(error) => {
                self.reuse(frame);
                Err(error)
            }
        }
    }

    /// The same of bytes that are the frame's from now on: whole pages that are not encoded stay where they are.
    pub fn decode_owned(&mut self, bytes: Vec<u8>, layout: &RamLayout) -> Result<PagesFrame, FrameError> {
        if !bytes.starts_with(&[WHOLE, RAW]) {
            return self.decode(&bytes, layout);
        }
        let mut reader = Reader::new(&bytes);
        let (_, _, pages) = head(&mut reader)?;
        let mut frame = self.spare.pop().unwrap_or_default();
        frame.entries.clear();
        let data_at = WHOLE_HEAD_BYTES + pages * ENTRY_BYTES;
        whole_entries(&mut reader, pages, data_at, layout, &mut frame.entries)?;
        let (expected, found) = (pages * PAGE_SIZE, reader.rest().len());
        if found != expected {
            return Err(FrameError::DataLength { expected, found });
        }
        frame.bytes = bytes;
        Ok(frame)
    }

    fn whole(
        &mut self,
        reader: &mut Reader<'_>,
        encoding: u8,
        pages: usize,
        layout: &RamLayout,
        frame: &mut PagesFrame,
    ) -> Result<(), FrameError> {
        let data_at = if encoding == RECORDS { records::STRIDE_MAX } else { 0 };
        whole_entries(reader, pages, data_at, layout, &mut frame.entries)?;
        match encoding {
            WORDS => self.words(reader, pages, &mut frame.bytes),
            RECORDS => self.records(reader, pages, &mut frame.bytes),
            _ => self.unpack(reader.rest(), encoding, pages * PAGE_SIZE, &mut frame.bytes),
        }
    }

    fn words(&mut self, reader: &mut Reader<'_>, pages: usize, bytes: &mut Vec<u8>) -> Result<(), FrameError> {
        let [indexes, literals, packed_tags, packed_indexes] =
            [reader.u32()?, reader.u32()?, reader.u32()?, reader.u32()?].map(|len| len as usize);
        if indexes > pages * words::INDEXES_PAGE_MAX || literals > pages * words::LITERALS_PAGE_MAX {
            return Err(FrameError::Words);
        }
        let packed = [reader.take(packed_tags)?, reader.take(packed_indexes)?, reader.rest()];
        let lengths = [pages * words::TAGS_PAGE_BYTES, indexes, literals];
        let streams = self.streams(&packed, &lengths, &words::PADDING)?;
        // What is there is written over.
        bytes.resize(pages * PAGE_SIZE, 0);
        words::read(bytes.as_chunks_mut().0, streams, indexes).ok_or(FrameError::Words)
    }

    fn records(&mut self, reader: &mut Reader<'_>, pages: usize, bytes: &mut Vec<u8>) -> Result<(), FrameError> {
        let [masks, literals] = [reader.u32()?, reader.u32()?].map(|len| len as usize);
        if masks > pages * records::MASKS_PAGE_MAX || literals > pages * PAGE_SIZE {
            return Err(FrameError::Records);
        }
        let total = pages * records::HEAD_PAGE_BYTES + masks + literals;
        let streams = self.streams(&[reader.rest()], &[total], &records::PADDING)?;
        bytes.resize(records::STRIDE_MAX + pages * PAGE_SIZE, 0);
        records::read(bytes, streams, masks).ok_or(FrameError::Records)
    }

    /// Streams of these lengths, one after the other, and the padding. Those that are shorter as they came are zstd's.
    fn streams(&mut self, packed: &[&[u8]], lengths: &[usize], padding: &[u8]) -> Result<&[u8], FrameError> {
        let total = lengths.iter().sum::<usize>() + padding.len();
        let mut streams = std::mem::take(&mut self.streams);
        // What is there is written over.
        streams.resize(streams.len().max(total), 0);
        let (mut at, mut unpacked) = (0, Ok(()));
        for (packed, len) in packed.iter().zip(lengths) {
            let room = &mut streams[at..at + len];
            if packed.len() == *len {
                room.copy_from_slice(packed);
            } else if packed.len() > *len {
                unpacked = Err(FrameError::DataLength { expected: *len, found: packed.len() });
            } else if unpacked.is_ok() {
                unpacked = self.decompress(packed, *len, room);
            }
            at += len;
        }
        streams[at..total].copy_from_slice(padding);
        self.streams = streams;
        unpacked.map(|()| &self.streams[..total])
    }

    fn changes(
        &mut self,
        reader: &mut Reader<'_>,
        encoding: u8,
        pages: usize,
        layout: &RamLayout,
        frame: &mut PagesFrame,
    ) -> Result<(), FrameError> {
        let patches = usize::from(reader.u16()?);
        if let Some(other) = reader.array::<2>()?.into_iter().find(|b| *b != 0) {
            return Err(FrameError::UnknownValue(other));
        }
        if patches > pages {
            return Err(FrameError::Changes("pages and patches"));
        }
        let lengths = [reader.u32()?, reader.u32()?, reader.u32()?];
        let total = lengths.into_iter().map(u64::from).sum();
        if total > MAX_STREAM_BYTES as u64 {
            return Err(FrameError::StreamLength(total));
        }
        let [addresses, runs, _] = lengths.map(|len| len as usize);
        let tags = reader.take(patches * TAGS_BYTES)?;
        let PagesFrame { entries, bytes } = frame;
        self.unpack(reader.rest(), encoding, total as usize, bytes)?;
        let (addresses, rest) = bytes.split_at(addresses);
        let (runs, data) = rest.split_at(runs);
        let ends = (addresses.len() + runs.len(), bytes.len());
        let parser = Changes { ends, addresses, runs, data, tags: tags.as_chunks().0, layout };
        parser.entries(pages, entries)
    }

    fn unpack(&mut self, bytes: &[u8], encoding: u8, expected: usize, data: &mut Vec<u8>) -> Result<(), FrameError> {
        data.clear();
        match encoding {
            RAW if bytes.len() != expected => return Err(FrameError::DataLength { expected, found: bytes.len() }),
            RAW => data.extend_from_slice(bytes),
            ZSTD => {
                data.reserve(expected);
                return self.decompress(bytes, expected, data);
            }
            other => return Err(FrameError::UnknownValue(other)),
        }
        Ok(())
    }

    /// Fails also where it does not come out as long as expected.
    fn decompress<B: WriteBuf + ?Sized>(
        &mut self,
        bytes: &[u8],
        expected: usize,
        data: &mut B,
    ) -> Result<(), FrameError> {
        let zstd_error = |error: std::io::Error| FrameError::Zstd(error.to_string());
        if self.decompressor.is_none() {
            self.decompressor = Some(Decompressor::new().map_err(zstd_error)?);
        }
        let decompressor = self.decompressor.as_mut().ok_or(FrameError::Truncated)?;
        // Fails when it would come out longer than the capacity; that may be more than was asked for.
        match decompressor.decompress_to_buffer(bytes, data).map_err(zstd_error)? {
            found if found == expected => Ok(()),
            found => Err(FrameError::DataLength { expected, found }),
        }
    }
}

/// What every frame begins with: its kind, how its data is encoded, and of how many pages it is.
fn head(reader: &mut Reader<'_>) -> Result<(u8, u8, usize), FrameError> {
    let (kind, encoding, pages) = (reader.u8()?, reader.u8()?, reader.u16()?);
    let max = match kind {
        CHANGES => MAX_CHANGED_PAGES,
        WHOLE => MAX_WHOLE_PAGES,
        other => return Err(FrameError::UnknownValue(other)),
    };
    match usize::from(pages) {
        pages if (1..=max).contains(&pages) => Ok((kind, encoding, pages)),
        _ => Err(FrameError::PageCount { found: pages, max }),
    }
}

/// Addresses of whole pages, whose contents stand from `data_at` on.
fn whole_entries(
    reader: &mut Reader<'_>,
    pages: usize,
    data_at: usize,
    layout: &RamLayout,
    entries: &mut Vec<Entry>,
) -> Result<(), FrameError> {
    entries.reserve(pages);
    for index in 0..pages {
        let (page, block) = (PageIndex::new(reader.u32()?), BlockIndex::new(reader.u16()?));
        let addr = PageAddr { block, page };
        if !layout.contains(addr) {
            return Err(FrameError::OutsideLayout(addr));
        }
        // At most 64 pages.
        entries.push(Entry { addr, content: Stored::Data { at: (data_at + index * PAGE_SIZE) as u32 } });
    }
    Ok(())
}

impl std::fmt::Debug for FrameDecoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FrameDecoder").finish_non_exhaustive()
    }
}

/// The streams of a frame of changes, of which each address takes its part.
struct Changes<'a> {
    /// Where runs and data end within all bytes.
    ends: (usize, usize),
    addresses: &'a [u8],
    runs: &'a [u8],
    data: &'a [u8],
    tags: &'a [[u8; TAGS_BYTES]],
    layout: &'a RamLayout,
}

impl Changes<'_> {
    fn entries(mut self, pages: usize, entries: &mut Vec<Entry>) -> Result<(), FrameError> {
        entries.reserve(pages);
        let mut block = None;
        let mut next_page = 0u64;
        while !self.addresses.is_empty() {
            let address =
                take_varint(&mut self.addresses, ADDRESS_MAX_BYTES).ok_or(FrameError::Changes("addresses"))?;
            let (value, kind) = (address / 4, address % 4);
            if kind == KIND_BLOCK {
                block = Some(BlockIndex::try_from(value).map_err(|_| FrameError::Changes("blocks"))?);
                next_page = 0;
                continue;
            }
            let number = next_page + value as u64;
            let page = PageIndex::try_from(number).map_err(|_| FrameError::Changes("page numbers"))?;
            let addr = PageAddr { block: block.ok_or(FrameError::Changes("blocks"))?, page };
            if !self.layout.contains(addr) {
                return Err(FrameError::OutsideLayout(addr));
            }
            if entries.len() == pages {
                return Err(FrameError::Changes("addresses"));
            }
            next_page = number + 1;
            entries.push(Entry { addr, content: self.content(kind)? });
        }
        let used_up = self.runs.is_empty() && self.data.is_empty() && self.tags.is_empty();
        if entries.len() != pages || !used_up {
            return Err(FrameError::Changes("lengths"));
        }
        Ok(())
    }

    fn content(&mut self, kind: usize) -> Result<Stored, FrameError> {
        match kind {
            KIND_ZERO => Ok(Stored::Zero),
            KIND_FILL => {
                let (word, rest) = self.data.split_first_chunk().ok_or(FrameError::Changes("words"))?;
                self.data = rest;
                Ok(Stored::Fill(u64::from_le_bytes(*word)))
            }
            _ => {
                // All of it is at most MAX_STREAM_BYTES long.
                let runs_at = (self.ends.0 - self.runs.len()) as u32;
                let data_at = (self.ends.1 - self.data.len()) as u32;
                let taken = take_page_runs(&mut self.runs, &mut self.data);
                let (patch, lines) = taken.ok_or(FrameError::Changes("runs of bytes"))?;
                let (runs_len, data_len) = patch.lengths();
                let ([before_low, before_high, after_low, after_high], rest) =
                    self.tags.split_first().ok_or(FrameError::Changes("patches"))?;
                self.tags = rest;
                Ok(Stored::Patch {
                    runs_at,
                    data_at,
                    lines,
                    // Runs are at least one byte apart: at most 2,048 of 4 bytes each, and 4,096 bytes of data.
                    runs_len: runs_len as u16,
                    data_len: data_len as u16,
                    before: Tag::from_le_bytes([*before_low, *before_high]),
                    after: Tag::from_le_bytes([*after_low, *after_high]),
                })
            }
        }
    }
}
