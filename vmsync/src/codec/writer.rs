//! Makes frames; [`super::frame`] has their layout.

use zstd::bulk::Compressor;
use zstd::zstd_safe::{CParameter, ParamSwitch};

use super::diff::{PatchRoom, put_varint};
use super::frame::{
    CHANGES, CHANGES_HEAD_BYTES, ENTRY_BYTES, KIND_BLOCK, KIND_FILL, KIND_PATCH, KIND_ZERO, MAX_CHANGED_PAGES,
    MAX_FRAME_BYTES, MAX_STREAM_BYTES, MAX_WHOLE_PAGES, RAW, RECORDS, RECORDS_HEAD_BYTES, TAGS_BYTES, WHOLE,
    WHOLE_HEAD_BYTES, WORDS, WORDS_HEAD_BYTES, ZSTD,
};
use super::noise::NoiseFilter;
use super::records::RecordWriter;
use super::sum::Tag;
use super::words::{self, WordWriter};
use crate::bytes::Put;
use crate::units::{BlockIndex, PAGE_SIZE, Page, PageAddr};

/// Level at which streams of changes are compressed. They are short, and the link may be long.
const CHANGES_LEVEL: i32 = -1;
/// The same where they are few, of which the link has little to carry as they are; and up to how many bytes a page that is.
const SPARSE_LEVEL: i32 = -5;
const SPARSE_PAGE_BYTES: usize = 128;
/// What the other streams are made of repeats less than pages do; zstd gains little by looking closer.
const RECORDS_FASTER: i32 = 4;
/// The streams of words at fast levels: tags and literals are little more than coded by their frequencies (see
/// [`Packers::new`]), only indexes repeat in longer runs.
const WORDS_LEVELS: [i32; 3] = [-20, -2, -2000];
/// At others.
const WORDS_LEVEL_SLOW: i32 = -1;
/// Streams shorter than this are not worth zstd's own header.
const WORTH_PACKING_BYTES: usize = 64;
/// Most bytes that one page adds to a frame of changes, besides its patch: two addresses and a word.
const PAGE_EXTRA_BYTES: usize = 18;

/// Collects pages into frames.
pub(super) struct FrameWriter {
    changes: Changes,
    packed: Whole,
    words: Words,
    records: Records,
    plain: Plain,
    noise: NoiseFilter,
    /// `None`: nothing is compressed.
    packers: Option<Packers>,
    scratch: Vec<u8>,
    frames: Vec<Vec<u8>>,
    spare: Spare,
}

/// Memory of former frames.
#[derive(Default)]
struct Spare(Vec<Vec<u8>>);

/// Frames whose memory is kept: 8 MiB.
const SPARE_MAX: usize = 32;

#[derive(Default)]
struct Changes {
    pages: u16,
    patches: u16,
    /// Where the next address counts from.
    place: Option<(BlockIndex, u64)>,
    tags: Vec<u8>,
    addresses: Vec<u8>,
    runs: Vec<u8>,
    data: Vec<u8>,
}

#[derive(Default)]
struct Whole {
    entries: Entries,
    data: Vec<u8>,
}

impl FrameWriter {
    /// `level`: see [`Self::set_level`].
    pub(super) fn new(level: i32) -> Self {
        let mut writer = Self {
            changes: Changes::default(),
            packed: Whole::default(),
            words: Words::default(),
            records: Records::default(),
            plain: Plain::default(),
            noise: NoiseFilter::default(),
            packers: None,
            scratch: Vec::new(),
            frames: Vec::new(),
            spare: Spare::default(),
        };
        writer.set_level(level);
        writer
    }

    /// Level of whole pages, as zstd counts: negative is faster; 0 turns all compression off.
    pub(super) fn set_level(&mut self, level: i32) {
        match &mut self.packers {
            _ if level == 0 => self.packers = None,
            Some(packers) => packers.set_level(level),
            // zstd only fails here for want of memory; frames then travel raw.
            none => *none = Packers::new(level).ok(),
        }
    }

    pub(super) fn zero(&mut self, addr: PageAddr) {
        self.changes.address(addr, KIND_ZERO);
        self.changes_grew(0);
    }

    pub(super) fn fill(&mut self, addr: PageAddr, word: u64) {
        self.changes.address(addr, KIND_FILL);
        self.changes.data.put_u64(word);
        self.changes_grew(0);
    }

    /// The changes that were collected.
    pub(super) fn patch(&mut self, addr: PageAddr, changes: &PatchRoom, before: Tag, after: Tag) {
        let (runs, data) = (changes.runs(), changes.data());
        self.changes_grew(runs.len() + data.len());
        self.changes.runs.extend_from_slice(runs);
        self.changes.data.extend_from_slice(data);
        self.changes.address(addr, KIND_PATCH);
        self.changes.patches += 1;
        self.changes.tags.put_u16(before);
        self.changes.tags.put_u16(after);
        self.changes_grew(0);
    }

    /// Adds a whole page; true if it does not compress.
    pub(super) fn data(&mut self, addr: PageAddr, page: &Page) -> bool {
        if self.packers.is_none() {
            self.as_it_is(addr, page);
        } else if words::suit(page) {
            self.words.push(addr, page);
            if usize::from(self.words.entries.pages) == MAX_WHOLE_PAGES {
                self.write_words();
            }
        } else if self.noise.is_noise(page) {
            if self.noise.wants_probe() {
                self.probe(page);
            }
            self.as_it_is(addr, page);
            return true;
        } else if let Some(stride) = self.records.writer.judge(page) {
            self.records.push(addr, page, stride);
            if usize::from(self.records.entries.pages) == MAX_WHOLE_PAGES {
                self.write_records();
            }
        } else {
            self.packed.push(addr, page);
            if usize::from(self.packed.entries.pages) == MAX_WHOLE_PAGES {
                self.write_packed();
            }
        }
        false
    }

    fn as_it_is(&mut self, addr: PageAddr, page: &Page) {
        self.plain.push(addr, page, &mut self.spare);
        if usize::from(self.plain.pages) == MAX_WHOLE_PAGES {
            self.frames.push(self.plain.take());
        }
    }

    /// Ends what was begun, and gives all frames.
    pub(super) fn finish(&mut self) -> Vec<Vec<u8>> {
        self.write_changes();
        self.write_packed();
        self.write_words();
        self.write_records();
        if self.plain.pages > 0 {
            self.frames.push(self.plain.take());
        }
        std::mem::take(&mut self.frames)
    }

    /// The frames that are complete already.
    pub(super) fn full_frames(&mut self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.frames)
    }

    /// Takes a frame back that is needed no longer.
    pub(super) fn reuse(&mut self, frame: Vec<u8>) {
        self.spare.put(frame);
    }

    /// Ends the frame of changes if a page with a patch of `limit` bytes might not fit.
    fn changes_grew(&mut self, limit: usize) {
        let changes = &self.changes;
        let streams = changes.addresses.len() + changes.runs.len() + changes.data.len();
        let full = usize::from(changes.pages) == MAX_CHANGED_PAGES;
        if full || streams + limit + PAGE_EXTRA_BYTES > MAX_STREAM_BYTES {
            self.write_changes();
        }
    }

    fn write_changes(&mut self) {
        let changes = &mut self.changes;
        if changes.pages == 0 {
            return;
        }
        let [addresses, runs, data] = [&changes.addresses, &changes.runs, &changes.data].map(Vec::len);
        let streams = addresses + runs + data;
        let mut out = self.spare.take(CHANGES_HEAD_BYTES + changes.tags.len() + streams);
        out.extend_from_slice(&[CHANGES, RAW]);
        out.put_u16(changes.pages);
        out.put_u16(changes.patches);
        out.put_u16(0);
        // Each at most MAX_STREAM_BYTES.
        out.put_u32(addresses as u32);
        out.put_u32(runs as u32);
        out.put_u32(data as u32);
        debug_assert_eq!(changes.tags.len(), usize::from(changes.patches) * TAGS_BYTES);
        out.extend_from_slice(&changes.tags);
        changes.addresses.extend_from_slice(&changes.runs);
        changes.addresses.extend_from_slice(&changes.data);
        let is_sparse = streams <= usize::from(changes.pages) * SPARSE_PAGE_BYTES;
        let packer = self.packers.as_mut().map(|packers| match is_sparse {
            true => &mut packers.sparse,
            false => &mut packers.changes,
        });
        let packer = packer.filter(|_| streams >= WORTH_PACKING_BYTES);
        if append(&mut out, &changes.addresses, packer, &mut self.scratch) < streams {
            out[1] = ZSTD;
        }
        changes.clear();
        self.frames.push(out);
    }

    fn write_packed(&mut self) {
        let packer = self.packers.as_mut().map(|packers| &mut packers.pages);
        self.frames.extend(self.packed.write(packer, &mut self.scratch, &mut self.spare));
    }

    fn write_words(&mut self) {
        let packers = self.packers.as_mut().map(|packers| &mut packers.words);
        self.frames.extend(self.words.write(packers, &mut self.scratch, &mut self.spare));
    }

    fn write_records(&mut self) {
        let packer = self.packers.as_mut().map(|packers| &mut packers.records);
        self.frames.extend(self.records.write(packer, &mut self.scratch, &mut self.spare));
    }

    /// Compresses a page that was judged as noise, to learn from it.
    fn probe(&mut self, page: &Page) {
        let Some(packers) = &mut self.packers else { return };
        self.scratch.clear();
        self.scratch.reserve(2 * PAGE_SIZE);
        if let Ok(packed) = packers.pages.compress_to_buffer(page, &mut self.scratch) {
            self.noise.probed(PAGE_SIZE, packed);
        }
    }
}

type Packer = Compressor<'static>;

/// zstd, at the level that each stream is worth.
struct Packers {
    pages: Packer,
    records: Packer,
    /// Tags, indexes, literals.
    words: [Packer; 3],
    changes: Packer,
    sparse: Packer,
}

impl Packers {
    fn new(level: i32) -> std::io::Result<Self> {
        let packer = || Packer::new(level);
        let words = [packer()?, packer()?, packer()?];
        let (changes, sparse) = (Packer::new(CHANGES_LEVEL)?, Packer::new(SPARSE_LEVEL)?);
        let mut packers = Self { pages: packer()?, records: packer()?, words, changes, sparse };
        // At its fast levels zstd leaves literals as they are, unless told otherwise; one that refuses this packs less.
        let [tags, _, literals] = &mut packers.words;
        for packer in [tags, literals] {
            let _ = packer.set_parameter(CParameter::LiteralCompressionMode(ParamSwitch::Enable));
        }
        packers.set_level(level);
        Ok(packers)
    }

    /// As zstd counts; not 0.
    fn set_level(&mut self, level: i32) {
        let words = if level < 0 { WORDS_LEVELS } else { [WORDS_LEVEL_SLOW; 3] };
        let [tags, indexes, literals] = &mut self.words;
        let all = [&mut self.pages, &mut self.records, tags, indexes, literals];
        let levels = [level, (level - RECORDS_FASTER).min(-1), words[0], words[1], words[2]];
        for (packer, level) in all.into_iter().zip(levels) {
            // A level outside zstd's is taken as the next one that it has.
            let _ = packer.set_compression_level(level);
        }
    }
}

impl Spare {
    /// Room for a frame. Memory that just came from the operating system costs more than what is written into it.
    fn take(&mut self, capacity: usize) -> Vec<u8> {
        let mut frame = self.0.pop().unwrap_or_default();
        frame.reserve(capacity);
        frame
    }

    fn put(&mut self, mut frame: Vec<u8>) {
        if self.0.len() < SPARE_MAX && frame.capacity() <= 2 * MAX_FRAME_BYTES {
            frame.clear();
            self.0.push(frame);
        }
    }
}

impl std::fmt::Debug for FrameWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FrameWriter").field("frames", &self.frames.len()).finish_non_exhaustive()
    }
}

impl Changes {
    fn address(&mut self, addr: PageAddr, kind: usize) {
        let page = u64::from(addr.page.get());
        let next = match self.place {
            Some((block, next)) if block == addr.block && next <= page => next,
            _ => {
                put_varint(&mut self.addresses, usize::from(addr.block.get()) * 4 + KIND_BLOCK);
                0
            }
        };
        // Page numbers have 32 bits.
        put_varint(&mut self.addresses, (page - next) as usize * 4 + kind);
        self.place = Some((addr.block, page + 1));
        self.pages += 1;
    }

    fn clear(&mut self) {
        self.pages = 0;
        self.patches = 0;
        self.place = None;
        for stream in [&mut self.tags, &mut self.addresses, &mut self.runs, &mut self.data] {
            stream.clear();
        }
    }
}

/// Addresses of whole pages, with which their frame begins.
#[derive(Default)]
struct Entries {
    pages: u16,
    bytes: Vec<u8>,
}

impl Entries {
    fn push(&mut self, addr: PageAddr) {
        self.bytes.put_u32(addr.page.get());
        self.bytes.put_u16(addr.block.get());
        self.pages += 1;
    }

    /// The beginning of their frame, with room for so many bytes more; none if there are no pages. Then there are none.
    fn begin(&mut self, encoding: u8, more: usize, spare: &mut Spare) -> Option<Vec<u8>> {
        if self.pages == 0 {
            return None;
        }
        let mut out = spare.take(WHOLE_HEAD_BYTES + self.bytes.len() + more);
        out.extend_from_slice(&[WHOLE, encoding]);
        out.put_u16(self.pages);
        out.extend_from_slice(&self.bytes);
        self.pages = 0;
        self.bytes.clear();
        Some(out)
    }
}

impl Whole {
    fn push(&mut self, addr: PageAddr, page: &Page) {
        self.entries.push(addr);
        self.data.extend_from_slice(page);
    }

    fn write(&mut self, packer: Option<&mut Packer>, scratch: &mut Vec<u8>, spare: &mut Spare) -> Option<Vec<u8>> {
        let mut out = self.entries.begin(RAW, 0, spare)?;
        if append(&mut out, &self.data, packer, scratch) < self.data.len() {
            out[1] = ZSTD;
        }
        self.data.clear();
        Some(out)
    }
}

/// Whole pages coded as words.
#[derive(Default)]
struct Words {
    entries: Entries,
    writer: WordWriter,
}

impl Words {
    fn push(&mut self, addr: PageAddr, page: &Page) {
        self.entries.push(addr);
        self.writer.push(page);
    }

    fn write(
        &mut self,
        mut packers: Option<&mut [Packer; 3]>,
        scratch: &mut Vec<u8>,
        spare: &mut Spare,
    ) -> Option<Vec<u8>> {
        let mut out = self.entries.begin(WORDS, WORDS_HEAD_BYTES, spare)?;
        let streams = self.writer.streams();
        let head_at = out.len();
        // Of 64 pages, some 300 KiB.
        out.put_u32(streams[1].len() as u32);
        out.put_u32(streams[2].len() as u32);
        out.extend_from_slice(&[0; 8]);
        for (index, stream) in streams.into_iter().enumerate() {
            let packed = append(&mut out, stream, packers.as_mut().map(|packers| &mut packers[index]), scratch);
            // The last one's is what is left.
            if let Some(field) = out[head_at + 8..head_at + WORDS_HEAD_BYTES].as_chunks_mut().0.get_mut(index) {
                *field = (packed as u32).to_le_bytes();
            }
        }
        self.writer.clear();
        Some(out)
    }
}

/// Whole pages coded as records.
#[derive(Default)]
struct Records {
    entries: Entries,
    writer: RecordWriter,
    streams: Vec<u8>,
}

impl Records {
    fn push(&mut self, addr: PageAddr, page: &Page, stride: u8) {
        self.entries.push(addr);
        self.writer.push(page, stride);
    }

    fn write(&mut self, packer: Option<&mut Packer>, scratch: &mut Vec<u8>, spare: &mut Spare) -> Option<Vec<u8>> {
        let mut out = self.entries.begin(RECORDS, RECORDS_HEAD_BYTES, spare)?;
        let streams = self.writer.streams();
        // Of 64 pages, 32 and 256 KiB.
        out.put_u32(streams[2].len() as u32);
        out.put_u32(streams[3].len() as u32);
        streams.iter().for_each(|stream| self.streams.extend_from_slice(stream));
        append(&mut out, &self.streams, packer, scratch);
        self.writer.clear();
        self.streams.clear();
        Some(out)
    }
}

/// Whole pages that are not compressed: the frame is made in place, with room for the entries of a full one.
#[derive(Default)]
struct Plain {
    pages: u16,
    frame: Vec<u8>,
}

impl Plain {
    const DATA_AT: usize = WHOLE_HEAD_BYTES + MAX_WHOLE_PAGES * ENTRY_BYTES;

    fn push(&mut self, addr: PageAddr, page: &Page, spare: &mut Spare) {
        if self.pages == 0 {
            self.frame = spare.take(Self::DATA_AT + MAX_WHOLE_PAGES * PAGE_SIZE);
            self.frame.resize(Self::DATA_AT, 0);
        }
        let at = WHOLE_HEAD_BYTES + usize::from(self.pages) * ENTRY_BYTES;
        self.frame[at..at + 4].copy_from_slice(&addr.page.get().to_le_bytes());
        self.frame[at + 4..at + 6].copy_from_slice(&addr.block.get().to_le_bytes());
        self.frame.extend_from_slice(page);
        self.pages += 1;
    }

    fn take(&mut self) -> Vec<u8> {
        let entries_end = WHOLE_HEAD_BYTES + usize::from(self.pages) * ENTRY_BYTES;
        self.frame.drain(entries_end..Self::DATA_AT);
        self.frame[..2].copy_from_slice(&[WHOLE, RAW]);
        self.frame[2..4].copy_from_slice(&self.pages.to_le_bytes());
        self.pages = 0;
        std::mem::take(&mut self.frame)
    }
}

/// Appends `data` as one zstd block; or as it is, if that is not shorter. How many bytes it took.
fn append(out: &mut Vec<u8>, data: &[u8], packer: Option<&mut Packer>, scratch: &mut Vec<u8>) -> usize {
    scratch.clear();
    scratch.reserve(zstd::zstd_safe::compress_bound(data.len()));
    let packed = packer.and_then(|packer| packer.compress_to_buffer(data, scratch).ok());
    let taken = if packed.is_some_and(|len| len < data.len()) { &scratch[..] } else { data };
    out.extend_from_slice(taken);
    taken.len()
}
