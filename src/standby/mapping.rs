//! A piece of a guest's memory mapped into this process. Other processes write it too: nothing here hands out
//! references into it, only copies.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// What CPUs fetch at once.
#[cfg(target_arch = "x86_64")]
const LINE_BYTES: usize = 64;

#[derive(Debug)]
pub(super) struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to this value alone; it is plain memory that any thread may copy to and from.
unsafe impl Send for Mapping {}
// SAFETY: `&Mapping` only copies out of the memory, which other processes may write at any time anyway.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of `file` from `offset`, shared and writable. Both must fit the file's page size.
    pub(super) fn new(file: &File, offset: u64, len: u64) -> io::Result<Self> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let len = usize::try_from(len).map_err(|_| invalid())?;
        let non_zero = NonZeroUsize::new(len).ok_or_else(invalid)?;
        let offset = i64::try_from(offset).map_err(|_| invalid())?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let start = unsafe { mmap(None, non_zero, access, MapFlags::MAP_SHARED, file, offset) }?;
        Ok(Self { start: start.cast(), len })
    }

    #[cfg(test)]
    pub(super) fn address(&self) -> u64 {
        self.start.as_ptr() as u64
    }

    /// Copies `bytes` to `offset`; an error if that is outside.
    pub(super) fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let to = self.at(offset, bytes.len())?;
        // SAFETY: `at` checked that the range lies within the mapping, which lives as long as `self`; the source is
        // not part of it, because no reference into the mapping exists.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        Ok(())
    }

    /// Copies from `offset` to `bytes`; an error if that is outside.
    pub(super) fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let from = self.at(offset, bytes.len())?;
        // SAFETY: as in `write`. A concurrent writer may tear what is read, which the callers' checksums find.
        unsafe { std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    /// Lines of 64 bytes from `offset` on, a bit each, will be written soon: they are fetched into the CPU's caches.
    pub(super) fn fetch(&self, offset: u64, lines: u64) {
        #[cfg(target_arch = "x86_64")]
        if let Ok(at) = self.at(offset, LINE_BYTES * u64::BITS as usize) {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            let mut lines = lines;
            while lines != 0 {
                let line = lines.trailing_zeros() as usize;
                lines &= lines - 1;
                // SAFETY: the address is within the mapping; a prefetch reads nothing and never faults.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(at.add(line * LINE_BYTES).cast_const().cast()) };
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (offset, lines);
    }

    fn at(&self, offset: u64, len: usize) -> io::Result<*mut u8> {
        let offset = usize::try_from(offset).ok().filter(|o| o.checked_add(len).is_some_and(|end| end <= self.len));
        let offset = offset.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        // SAFETY: `offset` is within the mapping.
        Ok(unsafe { self.start.as_ptr().add(offset) })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `new`, and no pointer into it leaves this file.
        if let Err(error) = unsafe { munmap(self.start.cast(), self.len) } {
            tracing::error!(%error, "cannot unmap a guest's memory");
        }
    }
}
