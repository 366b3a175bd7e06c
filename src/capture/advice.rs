//! What the kernel is told about memory of ours.

use std::mem::MaybeUninit;
use std::ptr::NonNull;

use nix::sys::mman::{MmapAdvise, madvise};
use nix::unistd::{SysconfVar, sysconf};

/// This memory will be used from its start to its end, and pages of 2 MiB are welcome: they are zeroed and found faster
/// than 512 small ones. A kernel that cannot, or may not, uses small ones.
pub fn huge_pages(memory: &[u8]) {
    // SAFETY: pages of ours; how large the kernel's are changes nothing of what they hold.
    if let Err(error) = unsafe { advise(NonNull::from(memory), MmapAdvise::MADV_HUGEPAGE) } {
        tracing::debug!(%error, "our memory has small pages");
    }
}

/// The same, and it is there from now on: using it for the first time is no fault.
pub fn in_place(memory: &mut [MaybeUninit<u8>]) {
    let bytes = NonNull::slice_from_raw_parts(NonNull::from(&mut *memory).cast(), memory.len());
    for advice in [MmapAdvise::MADV_HUGEPAGE, MmapAdvise::MADV_POPULATE_WRITE] {
        // SAFETY: as above; populating writes nothing that could be read.
        if let Err(error) = unsafe { advise(bytes, advice) } {
            tracing::debug!(%error, "memory is not put in place ahead");
        }
    }
}

/// # Safety
/// This memory may be treated so.
unsafe fn advise(memory: NonNull<[u8]>, advice: MmapAdvise) -> nix::Result<()> {
    let page =
        sysconf(SysconfVar::PAGE_SIZE).ok().flatten().and_then(|size| usize::try_from(size).ok()).unwrap_or(4096);
    // Of the allocation's own pages only those that are wholly its.
    let start: NonNull<u8> = memory.cast();
    let skipped = start.align_offset(page);
    let Some(len) = memory.len().checked_sub(skipped).map(|len| len / page * page).filter(|len| *len > 0) else {
        return Ok(());
    };
    // SAFETY: `skipped` is at most the length; the caller answers for the rest.
    unsafe { madvise(start.add(skipped).cast(), len, advice) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_memory_may_be_asked_for_and_stays_as_it_is() {
        let memory = vec![7; 5 << 20];
        for part in [&memory[..], &memory[1..], &memory[100..200], &[]] {
            huge_pages(part);
            assert!(part.iter().all(|byte| *byte == 7));
        }
        let mut room: Vec<u8> = vec![7; 100];
        room.reserve(3 << 20);
        in_place(room.spare_capacity_mut());
        in_place(&mut []);
        assert_eq!(room, [7; 100]);
    }
}
