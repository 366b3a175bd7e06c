//! What the kernel is told about memory of ours.

use std::ptr::NonNull;

use nix::sys::mman::{MmapAdvise, madvise};
use nix::unistd::{SysconfVar, sysconf};

/// This memory will be used from its start to its end, and pages of 2 MiB are welcome: they are zeroed and found faster
/// than 512 small ones. A kernel that cannot, or may not, uses small ones.
pub fn huge_pages(memory: &[u8]) {
    let page =
        sysconf(SysconfVar::PAGE_SIZE).ok().flatten().and_then(|size| usize::try_from(size).ok()).unwrap_or(4096);
    // Of the allocation's own pages only those that are wholly its.
    let skipped = memory.as_ptr().align_offset(page);
    let Some(inner) = memory.get(skipped..).map(|rest| &rest[..rest.len() / page * page]) else { return };
    // SAFETY: these are pages of ours; how large the kernel's are changes nothing of what they hold.
    if let Err(error) = unsafe { madvise(NonNull::from(inner).cast(), inner.len(), MmapAdvise::MADV_HUGEPAGE) } {
        tracing::debug!(%error, "the mirror has small pages");
    }
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
    }
}
