//! Page contents as drivers hand them over: addresses, and one contiguous buffer of their pages.

use std::mem::MaybeUninit;

use crate::units::{PAGE_SIZE, Page, PageAddr};

/// Addresses and contents of pages, in the order they were read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PageBatch {
    addrs: Vec<PageAddr>,
    /// `addrs.len() * PAGE_SIZE` bytes.
    bytes: Vec<u8>,
}

/// A buffer whose length does not fit its addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{pages} pages need {} bytes, not {bytes}", pages * PAGE_SIZE)]
pub struct BatchLength {
    pub pages: usize,
    pub bytes: usize,
}

impl PageBatch {
    pub fn new() -> Self {
        Self::default()
    }

    /// Room for `pages` pages without another allocation.
    pub fn with_capacity(pages: usize) -> Self {
        Self { addrs: Vec::with_capacity(pages), bytes: Vec::with_capacity(pages * PAGE_SIZE) }
    }

    /// Takes a buffer that was filled with the pages at `addrs`, in that order.
    pub fn from_parts(addrs: Vec<PageAddr>, bytes: Vec<u8>) -> Result<Self, BatchLength> {
        if bytes.len() != addrs.len() * PAGE_SIZE {
            return Err(BatchLength { pages: addrs.len(), bytes: bytes.len() });
        }
        Ok(Self { addrs, bytes })
    }

    /// Gives addresses and buffer back, for the next batch.
    pub fn into_parts(self) -> (Vec<PageAddr>, Vec<u8>) {
        (self.addrs, self.bytes)
    }

    pub fn push(&mut self, addr: PageAddr, page: &Page) {
        self.addrs.push(addr);
        self.bytes.extend_from_slice(page);
    }

    /// Pages there is room for without another allocation.
    pub fn room(&self) -> usize {
        self.bytes.capacity() / PAGE_SIZE
    }

    /// The room for pages that are not there yet.
    pub fn spare_bytes(&mut self) -> &mut [MaybeUninit<u8>] {
        self.bytes.spare_capacity_mut()
    }

    /// Adds what `other` holds, and leaves it empty.
    pub fn append(&mut self, other: &mut Self) {
        self.addrs.append(&mut other.addrs);
        self.bytes.append(&mut other.bytes);
    }

    pub fn len(&self) -> usize {
        self.addrs.len()
    }

    pub fn is_empty(&self) -> bool {
        self.addrs.is_empty()
    }

    pub fn addrs(&self) -> &[PageAddr] {
        &self.addrs
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub fn iter(&self) -> impl Iterator<Item = (PageAddr, &Page)> {
        self.addrs.iter().copied().zip(self.bytes.as_chunks::<PAGE_SIZE>().0)
    }

    /// Empties the batch and keeps its buffers.
    pub fn clear(&mut self) {
        self.addrs.clear();
        self.bytes.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_stay_with_their_addresses() {
        let mut batch = PageBatch::with_capacity(2);
        batch.push(PageAddr::new(0, 7), &[7; PAGE_SIZE]);
        batch.push(PageAddr::new(1, 3), &[3; PAGE_SIZE]);
        assert!(batch.iter().all(|(addr, page)| page.iter().all(|b| u32::from(*b) == addr.page.get())));
        let (addrs, mut bytes) = batch.clone().into_parts();
        assert_eq!(PageBatch::from_parts(addrs.clone(), bytes.clone()), Ok(batch));
        bytes.pop();
        assert_eq!(PageBatch::from_parts(addrs, bytes), Err(BatchLength { pages: 2, bytes: 8191 }));
    }
}
