//! Page frames: how up to 64 pages travel and are journaled.
//!
//! ```text
//! offset  size  field (little-endian)
//!      0     1  n: number of entries, 1 to 64
//!      1     1  encoding of the data: 0 raw, 1 one zstd block
//!      2     2  0
//!      4    8n  entries: u32 page, u16 block, u8 kind (0 zero page, 1 data page), u8 0
//!   4+8n        data: the data pages in order of their entries, 4096 bytes each before encoding
//! ```
//! Entries stand before the data and are not compressed, so a reader knows how much may come out before it
//! allocates; one zstd block over all data pages shrinks neighbours that resemble each other. Raw is used whenever
//! zstd would not shrink. Pages of one frame may repeat; the last one counts. A frame holds 256 KiB at most: large
//! enough for zstd, small enough that a decoder's buffer and a lost frame cost little.

use zstd::bulk::{Compressor, Decompressor};

use crate::bytes::{Put, Reader, Truncated};
use crate::layout::RamLayout;
use crate::units::{BlockIndex, PAGE_SIZE, Page, PageAddr, PageIndex};

/// Most pages in one frame.
pub const MAX_FRAME_PAGES: usize = 64;
/// Longest encoded frame, bytes.
pub const MAX_FRAME_BYTES: usize = HEAD_BYTES + MAX_FRAME_PAGES * (ENTRY_BYTES + PAGE_SIZE);

const HEAD_BYTES: usize = 4;
const ENTRY_BYTES: usize = 8;
const RAW: u8 = 0;
const ZSTD: u8 = 1;
const KIND_ZERO: u8 = 0;
const KIND_DATA: u8 = 1;

/// Contents of a page in a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageContent<'a> {
    Zero,
    Data(&'a Page),
}

/// A decoded, checked frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PagesFrame {
    /// Address, and whether the page has data (next in `data`).
    entries: Vec<(PageAddr, bool)>,
    data: Vec<u8>,
}

/// Why bytes are not a frame. Always a fault of the sender or of the medium.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("page frame is cut short")]
    Truncated,
    #[error("page frame has {0} entries; 1 to {MAX_FRAME_PAGES} are allowed")]
    EntryCount(u8),
    #[error("page frame has a field with the unknown value {0}")]
    UnknownValue(u8),
    #[error("page frame names {0}, which the guest's RAM layout does not have")]
    OutsideLayout(PageAddr),
    #[error("page frame's data should be {expected} bytes but is {found}")]
    DataLength { expected: usize, found: usize },
    #[error("page frame's data is not a zstd block: {0}")]
    Zstd(String),
}

impl From<Truncated> for FrameError {
    fn from(Truncated: Truncated) -> Self {
        Self::Truncated
    }
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
        let mut data = self.data.as_chunks::<PAGE_SIZE>().0.iter();
        self.entries.iter().map(move |(addr, has_data)| {
            // The decoder made as many data pages as there are entries with data.
            let content =
                if *has_data { data.next().map_or(PageContent::Zero, PageContent::Data) } else { PageContent::Zero };
            (*addr, content)
        })
    }

    /// Memory this frame takes, for limits.
    pub fn memory_bytes(&self) -> u64 {
        (self.data.len() + self.entries.len() * size_of::<(PageAddr, bool)>()) as u64
    }
}

/// True if all bytes of the page are zero.
pub fn is_zero(page: &Page) -> bool {
    // Whole words, without an early exit inside a chunk, so that the compiler uses wide registers.
    page.as_chunks::<64>().0.iter().all(|chunk| chunk.iter().fold(0, |acc, byte| acc | byte) == 0)
}

/// Makes frames; reuses its buffers and zstd's.
pub struct FrameEncoder {
    compressor: Option<Compressor<'static>>,
    entries: Vec<u8>,
    data: Vec<u8>,
    count: u8,
}

impl FrameEncoder {
    /// `zstd_level`: 1 (fast) to 19 (small), negative for faster yet; 0 turns compression off.
    pub fn new(zstd_level: i32) -> Self {
        // zstd only fails here for want of memory or for an unknown level; frames then travel raw.
        let compressor = (zstd_level != 0).then(|| Compressor::new(zstd_level).ok()).flatten();
        Self {
            compressor,
            entries: Vec::with_capacity(MAX_FRAME_PAGES * ENTRY_BYTES),
            data: Vec::with_capacity(MAX_FRAME_PAGES * PAGE_SIZE),
            count: 0,
        }
    }

    /// Pages in the frame so far.
    pub fn len(&self) -> usize {
        usize::from(self.count)
    }

    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    pub fn is_full(&self) -> bool {
        self.len() == MAX_FRAME_PAGES
    }

    /// Adds a page to the frame. A full frame must be taken with [`finish`](Self::finish) first: adding to it
    /// returns false and does nothing.
    #[must_use]
    pub fn push(&mut self, addr: PageAddr, page: &Page) -> bool {
        if self.is_full() {
            return false;
        }
        let zero = is_zero(page);
        self.entries.put_u32(addr.page.get());
        self.entries.put_u16(addr.block.get());
        self.entries.put_u8(if zero { KIND_ZERO } else { KIND_DATA });
        self.entries.put_u8(0);
        if !zero {
            self.data.extend_from_slice(page);
        }
        self.count += 1;
        true
    }

    /// Appends the encoded frame to `out` and starts the next one. Appends nothing if there is no page.
    pub fn finish(&mut self, out: &mut Vec<u8>) {
        if self.is_empty() {
            return;
        }
        let start = out.len();
        out.extend_from_slice(&[self.count, RAW, 0, 0]);
        out.extend_from_slice(&self.entries);
        let data_start = out.len();
        if !self.data.is_empty() && self.compress(out, data_start) {
            out[start + 1] = ZSTD;
        } else {
            out.extend_from_slice(&self.data);
        }
        self.entries.clear();
        self.data.clear();
        self.count = 0;
    }

    /// Appends the compressed data; false, and `out` as it was, if that is not shorter.
    fn compress(&mut self, out: &mut Vec<u8>, data_start: usize) -> bool {
        let Some(compressor) = &mut self.compressor else { return false };
        // One byte less than raw: zstd then gives up as soon as it cannot win.
        out.resize(data_start + self.data.len() - 1, 0);
        match compressor.compress_to_buffer(&self.data, &mut out[data_start..]) {
            Ok(len) => {
                out.truncate(data_start + len);
                true
            }
            Err(_) => {
                out.truncate(data_start);
                false
            }
        }
    }
}

impl std::fmt::Debug for FrameEncoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FrameEncoder").field("pages", &self.count).finish_non_exhaustive()
    }
}

/// Reads frames, trusting nothing; reuses zstd's buffers.
#[derive(Default)]
pub struct FrameDecoder {
    decompressor: Option<Decompressor<'static>>,
}

impl FrameDecoder {
    pub fn new() -> Self {
        Self::default()
    }

    /// Checks and decodes one frame whose pages must lie in `layout`.
    pub fn decode(&mut self, bytes: &[u8], layout: &RamLayout) -> Result<PagesFrame, FrameError> {
        let mut reader = Reader::new(bytes);
        let count = reader.u8()?;
        if count == 0 || usize::from(count) > MAX_FRAME_PAGES {
            return Err(FrameError::EntryCount(count));
        }
        let encoding = reader.u8()?;
        if let Some(other) = reader.array::<2>()?.into_iter().find(|b| *b != 0) {
            return Err(FrameError::UnknownValue(other));
        }
        let mut entries = Vec::with_capacity(usize::from(count));
        for _ in 0..count {
            entries.push(decode_entry(&mut reader, layout)?);
        }
        let expected = entries.iter().filter(|(_, has_data)| *has_data).count() * PAGE_SIZE;
        let data = match encoding {
            RAW => reader.rest().to_vec(),
            ZSTD => self.decompress(reader.rest(), expected)?,
            other => return Err(FrameError::UnknownValue(other)),
        };
        if data.len() != expected {
            return Err(FrameError::DataLength { expected, found: data.len() });
        }
        Ok(PagesFrame { entries, data })
    }

    fn decompress(&mut self, bytes: &[u8], expected: usize) -> Result<Vec<u8>, FrameError> {
        let zstd_error = |error: std::io::Error| FrameError::Zstd(error.to_string());
        if self.decompressor.is_none() {
            self.decompressor = Some(Decompressor::new().map_err(zstd_error)?);
        }
        let decompressor = self.decompressor.as_mut().ok_or(FrameError::Truncated)?;
        let mut data = vec![0; expected];
        let found = decompressor.decompress_to_buffer(bytes, &mut data[..]).map_err(zstd_error)?;
        data.truncate(found);
        Ok(data)
    }
}

impl std::fmt::Debug for FrameDecoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FrameDecoder").finish_non_exhaustive()
    }
}

fn decode_entry(reader: &mut Reader<'_>, layout: &RamLayout) -> Result<(PageAddr, bool), FrameError> {
    let page = PageIndex::new(reader.u32()?);
    let block = BlockIndex::new(reader.u16()?);
    let addr = PageAddr { block, page };
    let kind = reader.u8()?;
    let reserved = reader.u8()?;
    if kind > KIND_DATA || reserved != 0 {
        return Err(FrameError::UnknownValue(kind.max(reserved)));
    }
    if !layout.contains(addr) {
        return Err(FrameError::OutsideLayout(addr));
    }
    Ok((addr, kind == KIND_DATA))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::layout::RamBlock;

    fn layout() -> RamLayout {
        let block = |name: &str, pages: u64| RamBlock { name: name.into(), len_bytes: pages * 4096 };
        RamLayout::new(vec![block("a", 100), block("b", 3)]).unwrap()
    }

    fn page(fill: u8, noise: u32) -> Page {
        let mut page = [fill; PAGE_SIZE];
        let mut state = noise;
        for byte in page.iter_mut().take(if noise == 0 { 0 } else { PAGE_SIZE }) {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            *byte = (state >> 24) as u8;
        }
        page
    }

    fn encode(level: i32, pages: &[(PageAddr, Page)]) -> Vec<u8> {
        let mut encoder = FrameEncoder::new(level);
        let mut out = Vec::new();
        for (addr, page) in pages {
            assert!(encoder.push(*addr, page));
        }
        encoder.finish(&mut out);
        out
    }

    fn contents(frame: &PagesFrame) -> Vec<(PageAddr, Page)> {
        let page = |content| match content {
            PageContent::Zero => [0; PAGE_SIZE],
            PageContent::Data(page) => *page,
        };
        frame.iter().map(|(addr, content)| (addr, page(content))).collect()
    }

    proptest! {
        #[test]
        fn what_goes_in_comes_out(
            level in prop_oneof![Just(0), Just(1), Just(3)],
            pages in prop::collection::vec((0u64..103, 0u8..3, 0u32..3), 1..=64),
        ) {
            let pages: Vec<_> =
                pages.into_iter().map(|(at, fill, noise)| (layout().addr(at).unwrap(), page(fill, noise))).collect();
            let bytes = encode(level, &pages);
            prop_assert!(bytes.len() <= MAX_FRAME_BYTES);
            let frame = FrameDecoder::new().decode(&bytes, &layout()).unwrap();
            prop_assert_eq!(contents(&frame), pages);
        }

        #[test]
        fn damage_is_an_error_or_another_frame_but_never_a_panic(
            at in 0usize..400, value: u8, cut in 0usize..400,
        ) {
            let pages: Vec<_> = (0..20).map(|i| (PageAddr::new(0, i), page(i as u8, 0))).collect();
            let mut bytes = encode(1, &pages);
            let at = at % bytes.len();
            bytes[at] = value;
            let _ = FrameDecoder::new().decode(&bytes, &layout());
            bytes.truncate(cut);
            let _ = FrameDecoder::new().decode(&bytes, &layout());
        }

        #[test]
        fn noise_is_no_frame(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            let _ = FrameDecoder::new().decode(&bytes, &layout());
        }
    }

    #[test]
    fn zero_pages_cost_eight_bytes_and_noise_travels_raw() {
        let zeros: Vec<_> = (0..64).map(|i| (PageAddr::new(0, i), page(0, 0))).collect();
        assert_eq!(encode(1, &zeros).len(), 4 + 64 * 8);
        let noise: Vec<_> = (0..64).map(|i| (PageAddr::new(0, i), page(0, i + 1))).collect();
        let bytes = encode(1, &noise);
        assert_eq!((bytes[1], bytes.len()), (RAW, MAX_FRAME_BYTES));
        let alike: Vec<_> = (0..64).map(|i| (PageAddr::new(0, i), page(0x5a, 0))).collect();
        assert!(encode(1, &alike).len() < 1000);
    }

    #[test]
    fn a_frame_cannot_claim_what_it_does_not_hold() {
        let mut decoder = FrameDecoder::new();
        let good = encode(1, &[(PageAddr::new(1, 2), page(1, 0))]);
        let decode = |decoder: &mut FrameDecoder, change: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = good.clone();
            change(&mut bytes);
            decoder.decode(&bytes, &layout()).unwrap_err()
        };
        assert_eq!(decode(&mut decoder, &|b| b[0] = 65), FrameError::EntryCount(65));
        assert_eq!(decode(&mut decoder, &|b| b[0] = 0), FrameError::EntryCount(0));
        assert_eq!(decode(&mut decoder, &|b| b[4] = 3), FrameError::OutsideLayout(PageAddr::new(1, 3)));
        assert_eq!(decode(&mut decoder, &|b| b[8] = 9), FrameError::OutsideLayout(PageAddr::new(9, 2)));
        assert_eq!(decode(&mut decoder, &|b| b[1] = 7), FrameError::UnknownValue(7));
        assert!(matches!(decode(&mut decoder, &|b| b[10] = 0), FrameError::Zstd(_)), "data without a data entry");
        // A zstd block that unpacks to more than the entries allow.
        let bomb = zstd::bulk::compress(&vec![0u8; 1 << 20], 1).unwrap();
        assert!(matches!(
            decode(&mut decoder, &|b| {
                b.truncate(12);
                b.extend_from_slice(&bomb);
            }),
            FrameError::Zstd(_)
        ));
    }
}
