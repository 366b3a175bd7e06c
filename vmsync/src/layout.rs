//! A guest's RAM blocks, in QEMU's order, and where each page lies among all pages.

use std::sync::Arc;

use xxhash_rust::xxh3::xxh3_64;

use crate::bytes::{Put, Reader};
use crate::units::{BlockIndex, PAGE_SIZE_U64, PageAddr, PageIndex};

/// Most RAM blocks a guest may have.
pub const MAX_BLOCKS: usize = 1024;
/// Longest name of a RAM block, bytes.
pub const MAX_NAME_BYTES: usize = 255;
/// Most RAM a guest may have, bytes: all page numbers then fit in 32 bits.
pub const MAX_RAM_BYTES: u64 = 16 << 40;

/// One RAM block as `info ramblock` names it: `pc.ram`, `pc.bios`, `/rom@etc/acpi/tables`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamBlock {
    pub name: String,
    /// Used length; a multiple of the page size.
    pub len_bytes: u64,
}

/// The validated list of a guest's RAM blocks. Cheap to clone.
#[derive(Debug, Clone)]
pub struct RamLayout {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    blocks: Vec<RamBlock>,
    /// Number of the block's first page among all pages; one more entry than blocks, the last is the total.
    first: Vec<u64>,
    digest: u64,
}

/// Why a list of RAM blocks is not a layout.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    #[error("a guest has 1 to {MAX_BLOCKS} RAM blocks, not {0}")]
    BlockCount(usize),
    #[error("RAM block {index}: {name:?} is not a name of 1 to {MAX_NAME_BYTES} printable ASCII characters")]
    Name { index: usize, name: String },
    #[error("two RAM blocks are named {name:?}")]
    DuplicateName { name: String },
    #[error("RAM block {name:?}: its length of {len_bytes} bytes is not a positive multiple of {PAGE_SIZE_U64}")]
    Length { name: String, len_bytes: u64 },
    #[error("RAM blocks add up to more than {MAX_RAM_BYTES} bytes")]
    TooLarge,
    #[error("encoded RAM layout is cut short or has bytes left over")]
    Encoding,
}

impl RamLayout {
    /// Checks and takes the blocks, in the order both hosts number them.
    pub fn new(blocks: Vec<RamBlock>) -> Result<Self, LayoutError> {
        if blocks.is_empty() || blocks.len() > MAX_BLOCKS {
            return Err(LayoutError::BlockCount(blocks.len()));
        }
        let mut names = std::collections::BTreeSet::new();
        let mut first = Vec::with_capacity(blocks.len() + 1);
        let mut total: u64 = 0;
        for (index, block) in blocks.iter().enumerate() {
            let name = &block.name;
            let printable = name.bytes().all(|b| (0x20..0x7f).contains(&b));
            if name.is_empty() || name.len() > MAX_NAME_BYTES || !printable {
                return Err(LayoutError::Name { index, name: name.clone() });
            }
            if !names.insert(name.as_str()) {
                return Err(LayoutError::DuplicateName { name: name.clone() });
            }
            if block.len_bytes == 0 || !block.len_bytes.is_multiple_of(PAGE_SIZE_U64) {
                return Err(LayoutError::Length { name: name.clone(), len_bytes: block.len_bytes });
            }
            first.push(total / PAGE_SIZE_U64);
            total = total.checked_add(block.len_bytes).filter(|t| *t <= MAX_RAM_BYTES).ok_or(LayoutError::TooLarge)?;
        }
        first.push(total / PAGE_SIZE_U64);
        let digest = xxh3_64(&encode(&blocks));
        Ok(Self { inner: Arc::new(Inner { blocks, first, digest }) })
    }

    pub fn blocks(&self) -> &[RamBlock] {
        &self.inner.blocks
    }

    /// Index of the block of that name.
    pub fn find(&self, name: &str) -> Option<BlockIndex> {
        // At most MAX_BLOCKS blocks: the index fits.
        self.inner.blocks.iter().position(|b| b.name == name).and_then(|i| BlockIndex::try_from(i).ok())
    }

    pub fn block(&self, block: BlockIndex) -> Option<&RamBlock> {
        self.inner.blocks.get(block.as_usize())
    }

    /// Pages of one block; 0 for a block that does not exist.
    pub fn block_pages(&self, block: BlockIndex) -> u64 {
        self.block(block).map_or(0, |b| b.len_bytes / PAGE_SIZE_U64)
    }

    /// Pages of all blocks.
    pub fn total_pages(&self) -> u64 {
        self.inner.first[self.inner.blocks.len()]
    }

    pub fn total_bytes(&self) -> u64 {
        self.total_pages() * PAGE_SIZE_U64
    }

    pub fn contains(&self, addr: PageAddr) -> bool {
        self.linear(addr).is_some()
    }

    /// xxh3 of the encoded layout: equal layouts have equal digests on both hosts.
    pub fn digest(&self) -> u64 {
        self.inner.digest
    }

    /// Number of `addr` among all pages, blocks in order; `None` outside the layout.
    pub fn linear(&self, addr: PageAddr) -> Option<u64> {
        let first = *self.inner.first.get(addr.block.as_usize())?;
        let next = *self.inner.first.get(addr.block.as_usize() + 1)?;
        let linear = first + u64::from(addr.page.get());
        (linear < next).then_some(linear)
    }

    /// The page with number `linear` among all pages.
    pub fn addr(&self, linear: u64) -> Option<PageAddr> {
        if linear >= self.total_pages() {
            return None;
        }
        let block = self.inner.first.partition_point(|f| *f <= linear) - 1;
        let page = PageIndex::try_from(linear - self.inner.first[block]).ok()?;
        Some(PageAddr { block: BlockIndex::try_from(block).ok()?, page })
    }

    /// Byte form, as it stands in `Hello` and in the state record:
    /// u16 blocks, then for each: u16 name length, name, u64 length in bytes. Little-endian.
    pub fn encode(&self) -> Vec<u8> {
        encode(&self.inner.blocks)
    }

    /// Reads what [`encode`](Self::encode) wrote; trusts nothing.
    pub fn decode(bytes: &[u8]) -> Result<Self, LayoutError> {
        let mut reader = Reader::new(bytes);
        let blocks = decode_blocks(&mut reader).ok_or(LayoutError::Encoding)??;
        if !reader.rest().is_empty() {
            return Err(LayoutError::Encoding);
        }
        Self::new(blocks)
    }
}

/// Two layouts are equal when they have the same blocks.
impl PartialEq for RamLayout {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner) || self.inner.blocks == other.inner.blocks
    }
}

impl Eq for RamLayout {}

fn encode(blocks: &[RamBlock]) -> Vec<u8> {
    let mut out = Vec::new();
    out.put_u16(blocks.len() as u16); // at most MAX_BLOCKS
    for block in blocks {
        out.put_text(&block.name);
        out.put_u64(block.len_bytes);
    }
    out
}

fn decode_blocks(reader: &mut Reader<'_>) -> Option<Result<Vec<RamBlock>, LayoutError>> {
    let count = usize::from(reader.u16().ok()?);
    if count > MAX_BLOCKS {
        return Some(Err(LayoutError::BlockCount(count)));
    }
    let mut blocks = Vec::with_capacity(count);
    for _ in 0..count {
        let name = reader.text().ok()?;
        blocks.push(RamBlock { name, len_bytes: reader.u64().ok()? });
    }
    Some(Ok(blocks))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(name: &str, pages: u64) -> RamBlock {
        RamBlock { name: name.into(), len_bytes: pages * PAGE_SIZE_U64 }
    }

    #[test]
    fn pages_are_numbered_across_blocks() {
        let layout = RamLayout::new(vec![block("pc.ram", 100), block("pc.bios", 2), block("vga.vram", 3)]).unwrap();
        assert_eq!(layout.total_pages(), 105);
        for linear in 0..105 {
            assert_eq!(layout.linear(layout.addr(linear).unwrap()), Some(linear));
        }
        assert_eq!(layout.addr(100), Some(PageAddr::new(1, 0)));
        assert_eq!(layout.addr(105), None);
        assert_eq!(layout.linear(PageAddr::new(0, 100)), None, "must not run over into the next block");
        assert_eq!(layout.linear(PageAddr::new(3, 0)), None);
        assert_eq!(layout.linear(PageAddr::new(u16::MAX, u32::MAX)), None);
        assert_eq!(layout.find("vga.vram"), Some(BlockIndex::new(2)));
    }

    #[test]
    fn bad_lists_are_refused_with_the_reason() {
        assert_eq!(RamLayout::new(vec![]), Err(LayoutError::BlockCount(0)));
        assert!(matches!(RamLayout::new(vec![block("", 1)]), Err(LayoutError::Name { .. })));
        assert!(matches!(RamLayout::new(vec![block("a\nb", 1)]), Err(LayoutError::Name { .. })));
        assert!(matches!(RamLayout::new(vec![block("a", 0)]), Err(LayoutError::Length { .. })));
        assert!(matches!(RamLayout::new(vec![block("a", 1), block("a", 1)]), Err(LayoutError::DuplicateName { .. })));
        let odd = RamBlock { name: "a".into(), len_bytes: 4097 };
        assert!(matches!(RamLayout::new(vec![odd]), Err(LayoutError::Length { .. })));
        assert_eq!(RamLayout::new(vec![block("a", 1 << 32), block("b", 1)]), Err(LayoutError::TooLarge));
        assert!(RamLayout::new(vec![block("a", 1 << 32)]).is_ok());
        let huge = RamBlock { name: "a".into(), len_bytes: u64::MAX - 4095 };
        assert_eq!(RamLayout::new(vec![huge]), Err(LayoutError::TooLarge));
    }

    #[test]
    fn encoding_round_trips_and_truncation_is_found() {
        let layout = RamLayout::new(vec![block("pc.ram", 100), block("/rom@etc/acpi/tables", 2)]).unwrap();
        let bytes = layout.encode();
        let again = RamLayout::decode(&bytes).unwrap();
        assert_eq!(again, layout);
        assert_eq!(again.digest(), layout.digest());
        for len in 0..bytes.len() {
            assert!(RamLayout::decode(&bytes[..len]).is_err(), "{len}");
        }
        assert_eq!(RamLayout::decode(&[&bytes[..], &[0]].concat()), Err(LayoutError::Encoding));
    }
}
