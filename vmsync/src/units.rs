//! Units: pages, epochs, terms, milliseconds, and the names of guests and peers. The page size stands here once.

use std::fmt;
use std::sync::Arc;

/// Size of a guest page in bytes. Huge pages are mirrored as runs of these.
pub const PAGE_SIZE: usize = 4096;

/// [`PAGE_SIZE`] for arithmetic on byte lengths.
pub const PAGE_SIZE_U64: u64 = PAGE_SIZE as u64;

/// Contents of one guest page.
pub type Page = [u8; PAGE_SIZE];

/// Number of an epoch; grows by at least one from cut to cut. 0 stands for "no epoch yet".
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Epoch(u64);

impl Epoch {
    /// No epoch yet.
    pub const NONE: Self = Self(0);

    pub const fn new(number: u64) -> Self {
        Self(number)
    }
    pub const fn get(self) -> u64 {
        self.0
    }
    pub const fn is_none(self) -> bool {
        self.0 == 0
    }
    /// The epoch after this one; `None` after the last representable one.
    pub fn checked_next(self) -> Option<Self> {
        self.0.checked_add(1).map(Self)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_none() { f.write_str("none") } else { self.0.fmt(f) }
    }
}

/// Fencing number of a guest's primaryship; grows with every promotion.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Term(u64);

impl Term {
    pub const fn new(number: u64) -> Self {
        Self(number)
    }
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Random number of one [`Source`](crate::source::Source)'s life, given by its driver. Two commits of one lineage
/// and one epoch hold the same memory; across lineages epoch numbers say nothing about contents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lineage(u64);

impl Lineage {
    pub const fn new(number: u64) -> Self {
        Self(number)
    }
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for Lineage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// Position of a RAM block in a [`RamLayout`](crate::layout::RamLayout).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct BlockIndex(u16);

impl BlockIndex {
    pub const fn new(index: u16) -> Self {
        Self(index)
    }
    pub const fn get(self) -> u16 {
        self.0
    }
    /// For indexing slices.
    pub const fn as_usize(self) -> usize {
        self.0 as usize
    }
}

impl TryFrom<usize> for BlockIndex {
    type Error = std::num::TryFromIntError;

    fn try_from(index: usize) -> Result<Self, Self::Error> {
        u16::try_from(index).map(Self)
    }
}

/// Number of a page within its RAM block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct PageIndex(u32);

impl PageIndex {
    pub const fn new(index: u32) -> Self {
        Self(index)
    }
    pub const fn get(self) -> u32 {
        self.0
    }
    /// Offset of the page's first byte within its block.
    pub const fn byte_offset(self) -> u64 {
        self.0 as u64 * PAGE_SIZE_U64
    }
    /// The page that holds the byte at `offset_bytes` of a block; `None` past 2^32 pages.
    pub fn containing(offset_bytes: u64) -> Option<Self> {
        u32::try_from(offset_bytes / PAGE_SIZE_U64).ok().map(Self)
    }
}

impl TryFrom<u64> for PageIndex {
    type Error = std::num::TryFromIntError;

    fn try_from(index: u64) -> Result<Self, Self::Error> {
        u32::try_from(index).map(Self)
    }
}

/// One guest page: block and page within it. Ordered by block, then page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct PageAddr {
    pub block: BlockIndex,
    pub page: PageIndex,
}

impl PageAddr {
    pub const fn new(block: u16, page: u32) -> Self {
        Self { block: BlockIndex(block), page: PageIndex(page) }
    }
}

impl fmt::Display for PageAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "block {} page {}", self.block.0, self.page.0)
    }
}

/// A moment or a span in milliseconds, of the driver's monotonic clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Millis(u64);

impl Millis {
    pub const fn new(ms: u64) -> Self {
        Self(ms)
    }
    pub const fn get(self) -> u64 {
        self.0
    }
    /// Time from `earlier` to this moment; 0 if `earlier` is later.
    pub const fn since(self, earlier: Self) -> Self {
        Self(self.0.saturating_sub(earlier.0))
    }
    /// This moment moved by `span`.
    pub const fn plus(self, span: Self) -> Self {
        Self(self.0.saturating_add(span.0))
    }
}

impl fmt::Display for Millis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ms", self.0)
    }
}

/// Host name of a shadow's host: how a source tells its peers apart.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerId(Arc<str>);

impl PeerId {
    pub fn new(host: &str) -> Self {
        Self(host.into())
    }
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<&str> for PeerId {
    fn from(host: &str) -> Self {
        Self::new(host)
    }
}

impl fmt::Display for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// UUID of a guest, as libvirt knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestUuid([u8; 16]);

impl GuestUuid {
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
    /// Parses 32 hexadecimal digits; hyphens may stand anywhere, as libvirt accepts them.
    pub fn parse(text: &str) -> Option<Self> {
        let mut bytes = [0u8; 16];
        let mut digits = 0;
        for c in text.chars().filter(|c| *c != '-') {
            let digit = c.to_digit(16)? as u8;
            *bytes.get_mut(digits / 2)? |= if digits % 2 == 0 { digit << 4 } else { digit };
            digits += 1;
        }
        (digits == 32).then_some(Self(bytes))
    }
}

impl fmt::Display for GuestUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, byte) in self.0.iter().enumerate() {
            if matches!(i, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids_read_and_print_as_libvirt_does() {
        let text = "6ba7b810-9dad-11d1-80b4-00c04fd430c8";
        let uuid = GuestUuid::parse(text).unwrap();
        assert_eq!(uuid.to_string(), text);
        assert_eq!(GuestUuid::parse("6BA7B8109DAD11D180B400C04FD430C8"), Some(uuid));
        for bad in ["", "6ba7b810", "6ba7b810-9dad-11d1-80b4-00c04fd430c8aa", "zba7b810-9dad-11d1-80b4-00c04fd430c8"] {
            assert_eq!(GuestUuid::parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn page_indices_have_a_last_value() {
        assert_eq!(PageIndex::containing(u64::from(u32::MAX) * 4096 + 4095), Some(PageIndex::new(u32::MAX)));
        assert_eq!(PageIndex::containing(1 << 44), None);
        assert_eq!(PageIndex::new(u32::MAX).byte_offset(), (1 << 44) - 4096);
    }

    #[test]
    fn time_does_not_run_below_zero() {
        assert_eq!(Millis::new(5).since(Millis::new(7)), Millis::new(0));
        assert_eq!(Epoch::new(u64::MAX).checked_next(), None);
    }
}
