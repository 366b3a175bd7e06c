//! Captured epochs of a guest: what a codec is measured on, again and again on the same bytes.
//!
//! ```text
//! file    16 bytes: magic "VSHC", u16 version 1, u16 0, u32 length of the RAM layout, u32 0
//!         the layout, as in the Hello
//!         epochs, until the file ends
//! epoch   24 bytes: u32 pages, u32 length of the device state, u64 epoch, u64 moment of the cut in microseconds
//!         12 bytes a page: u32 page, u16 block, u16 0, u32 0
//!         4,096 bytes a page, in the same order
//!         the device state
//!         u64 xxh3 of the epoch's bytes before
//! ```
//! All little-endian. The pages are those dirtied since the epoch before, with their contents at the cut. The first
//! epoch of a file is best all of the guest's memory that is not zero: then previous contents are known.

use std::io::{self, Read, Write};

use xxhash_rust::xxh3::Xxh3;

use crate::batch::PageBatch;
use crate::bytes::{Put, Reader};
use crate::device_state::MAX_DEVICE_STATE_BYTES;
use crate::layout::{LayoutError, RamLayout};
use crate::units::{BlockIndex, PAGE_SIZE, PageAddr, PageIndex};

pub const CAPTURE_VERSION: u16 = 1;

const MAGIC: [u8; 4] = *b"VSHC";
const FILE_HEAD_BYTES: usize = 16;
const EPOCH_HEAD_BYTES: usize = 24;
const ADDRESS_BYTES: usize = 12;
/// More than any layout takes.
const MAX_LAYOUT_BYTES: u32 = 1 << 20;

/// One epoch of a capture.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CapturedEpoch {
    pub epoch: u64,
    /// When the guest was stopped, microseconds of any clock that does not go back.
    pub at_us: u64,
    pub pages: PageBatch,
    pub device_state: Vec<u8>,
}

/// Why a capture cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    #[error("the capture cannot be read: {0}")]
    Io(#[from] io::Error),
    #[error("the file is not a capture of epochs")]
    NotACapture,
    #[error("the capture has version {0}; this build reads {CAPTURE_VERSION}")]
    Version(u16),
    #[error("the capture's RAM layout: {0}")]
    Layout(#[from] LayoutError),
    #[error("epoch {epoch} of the capture is damaged: {what}")]
    Epoch { epoch: u64, what: &'static str },
}

/// Writes a capture.
pub struct CaptureWriter<W> {
    out: W,
}

impl<W: Write> CaptureWriter<W> {
    /// Begins the file.
    pub fn new(mut out: W, layout: &RamLayout) -> io::Result<Self> {
        let encoded = layout.encode();
        let mut head = Vec::with_capacity(FILE_HEAD_BYTES);
        head.extend_from_slice(&MAGIC);
        head.put_u16(CAPTURE_VERSION);
        head.put_u16(0);
        head.put_u32(encoded.len() as u32); // a layout has at most 1024 blocks
        head.put_u32(0);
        out.write_all(&head)?;
        out.write_all(&encoded)?;
        Ok(Self { out })
    }

    /// Appends one epoch.
    pub fn epoch(&mut self, epoch: u64, at_us: u64, pages: &PageBatch, device_state: &[u8]) -> io::Result<()> {
        let too_large = |_| io::Error::other("an epoch of more than 2^32 pages or bytes of device state");
        let mut head = Vec::with_capacity(EPOCH_HEAD_BYTES + pages.len() * ADDRESS_BYTES);
        head.put_u32(u32::try_from(pages.len()).map_err(too_large)?);
        head.put_u32(u32::try_from(device_state.len()).map_err(too_large)?);
        head.put_u64(epoch);
        head.put_u64(at_us);
        for addr in pages.addrs() {
            head.put_u32(addr.page.get());
            head.put_u16(addr.block.get());
            head.put_u16(0);
            head.put_u32(0);
        }
        let mut hash = Xxh3::new();
        for part in [&head[..], pages.bytes(), device_state] {
            hash.update(part);
            self.out.write_all(part)?;
        }
        self.out.write_all(&hash.digest().to_le_bytes())
    }

    /// Ends the file; what it is written to is flushed and given back.
    pub fn finish(mut self) -> io::Result<W> {
        self.out.flush()?;
        Ok(self.out)
    }
}

/// Reads a capture, epoch by epoch.
pub struct CaptureReader<R> {
    from: R,
    layout: RamLayout,
}

impl<R: Read> CaptureReader<R> {
    pub fn new(mut from: R) -> Result<Self, CaptureError> {
        let mut head = [0; FILE_HEAD_BYTES];
        from.read_exact(&mut head)?;
        let mut reader = Reader::new(&head);
        let not_ours = |_| CaptureError::NotACapture;
        if reader.array::<4>().map_err(not_ours)? != MAGIC {
            return Err(CaptureError::NotACapture);
        }
        let version = reader.u16().map_err(not_ours)?;
        if version != CAPTURE_VERSION {
            return Err(CaptureError::Version(version));
        }
        reader.u16().map_err(not_ours)?;
        let len = reader.u32().map_err(not_ours)?;
        if len > MAX_LAYOUT_BYTES {
            return Err(CaptureError::NotACapture);
        }
        let mut layout = vec![0; len as usize];
        from.read_exact(&mut layout)?;
        Ok(Self { from, layout: RamLayout::decode(&layout)? })
    }

    pub fn layout(&self) -> &RamLayout {
        &self.layout
    }

    /// The next epoch; `None` at the file's end.
    pub fn next_epoch(&mut self) -> Result<Option<CapturedEpoch>, CaptureError> {
        let mut head = [0; EPOCH_HEAD_BYTES];
        let mut filled = 0;
        while filled < head.len() {
            match self.from.read(&mut head[filled..])? {
                0 if filled == 0 => return Ok(None),
                0 => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                n => filled += n,
            }
        }
        let mut reader = Reader::new(&head);
        let cut_short = |_| CaptureError::NotACapture;
        let (pages, state_len) = (reader.u32().map_err(cut_short)?, reader.u32().map_err(cut_short)?);
        let (epoch, at_us) = (reader.u64().map_err(cut_short)?, reader.u64().map_err(cut_short)?);
        let damaged = |what| CaptureError::Epoch { epoch, what };
        if u64::from(pages) > self.layout.total_pages() || state_len as usize > MAX_DEVICE_STATE_BYTES {
            return Err(damaged("it claims more than the guest has"));
        }
        let addresses = self.bytes(pages as usize * ADDRESS_BYTES)?;
        let contents = self.bytes(pages as usize * PAGE_SIZE)?;
        let device_state = self.bytes(state_len as usize)?;
        let mut checksum = [0; 8];
        self.from.read_exact(&mut checksum)?;
        let mut hash = Xxh3::new();
        [&head[..], &addresses, &contents, &device_state].into_iter().for_each(|part| hash.update(part));
        if hash.digest().to_le_bytes() != checksum {
            return Err(damaged("its checksum is wrong"));
        }
        let addrs: Vec<PageAddr> = addresses.as_chunks::<ADDRESS_BYTES>().0.iter().map(address).collect();
        if addrs.iter().any(|addr| !self.layout.contains(*addr)) {
            return Err(damaged("it has a page that the guest does not have"));
        }
        let pages = PageBatch::from_parts(addrs, contents).map_err(|_| damaged("its pages do not add up"))?;
        Ok(Some(CapturedEpoch { epoch, at_us, pages, device_state }))
    }

    /// Reads as many bytes; what a damaged file only claims is not allocated.
    fn bytes(&mut self, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.from.by_ref().take(len as u64).read_to_end(&mut bytes)?;
        if bytes.len() < len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(bytes)
    }
}

fn address(bytes: &[u8; ADDRESS_BYTES]) -> PageAddr {
    let [p0, p1, p2, p3, b0, b1, ..] = *bytes;
    PageAddr {
        block: BlockIndex::new(u16::from_le_bytes([b0, b1])),
        page: PageIndex::new(u32::from_le_bytes([p0, p1, p2, p3])),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::RamBlock;

    fn capture() -> (Vec<u8>, Vec<CapturedEpoch>) {
        let block = |name: &str, pages: u64| RamBlock { name: name.into(), len_bytes: pages * 4096 };
        let layout = RamLayout::new(vec![block("a", 4), block("b", 2)]).unwrap();
        let mut writer = CaptureWriter::new(Vec::new(), &layout).unwrap();
        let mut epochs = Vec::new();
        for epoch in 1..4u64 {
            let mut pages = PageBatch::new();
            pages.push(PageAddr::new(0, epoch as u32), &[epoch as u8; PAGE_SIZE]);
            pages.push(PageAddr::new(1, 1), &[9; PAGE_SIZE]);
            let device_state = vec![epoch as u8; 100];
            writer.epoch(epoch, epoch * 50_000, &pages, &device_state).unwrap();
            epochs.push(CapturedEpoch { epoch, at_us: epoch * 50_000, pages, device_state });
        }
        (writer.finish().unwrap(), epochs)
    }

    fn read(bytes: &[u8]) -> Result<Vec<CapturedEpoch>, CaptureError> {
        let mut reader = CaptureReader::new(bytes)?;
        let mut epochs = Vec::new();
        while let Some(epoch) = reader.next_epoch()? {
            epochs.push(epoch);
        }
        Ok(epochs)
    }

    #[test]
    fn captures_are_read_as_written() {
        let (bytes, epochs) = capture();
        assert_eq!(read(&bytes).unwrap(), epochs);
    }

    #[test]
    fn damage_is_found() {
        let (bytes, epochs) = capture();
        for len in 0..bytes.len() {
            // A file may end behind any epoch, nowhere else.
            assert!(read(&bytes[..len]).is_ok_and(|found| found.len() < epochs.len()) || read(&bytes[..len]).is_err());
        }
        for at in (0..bytes.len()).step_by(13) {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x10;
            assert!(read(&damaged).is_err() || at < FILE_HEAD_BYTES, "byte {at}");
        }
    }
}
