//! userfaultfd in asynchronous write-protect mode and PAGEMAP_SCAN: which pages of another process were written.
//!
//! Sources: Documentation/admin-guide/mm/{userfaultfd,pagemap}.rst, include/uapi/linux/{userfaultfd,fs}.h (6.7).

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use libc::{c_ulong, c_void};

const UFFD_API: u64 = 0xAA;
const UFFD_FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
const UFFD_FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const UFFD_FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const UFFD_FEATURE_WP_ASYNC: u64 = 1 << 15;
const FEATURES: u64 = UFFD_FEATURE_PAGEFAULT_FLAG_WP
    | UFFD_FEATURE_WP_HUGETLBFS_SHMEM
    | UFFD_FEATURE_WP_UNPOPULATED
    | UFFD_FEATURE_WP_ASYNC;
const UFFDIO_REGISTER_MODE_WP: u64 = 1 << 1;
const UFFDIO_WRITEPROTECT_MODE_WP: u64 = 1 << 0;

const UFFDIO_API: c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: c_ulong = 0xc020_aa00;
const UFFDIO_WRITEPROTECT: c_ulong = 0xc018_aa06;
const PAGEMAP_SCAN: c_ulong = 0xc060_6610;

const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;
const PAGE_IS_WRITTEN: u64 = 1 << 1;
/// Regions fetched by one call; 24 bytes each.
const REGIONS_PER_CALL: usize = 4096;

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioRegister {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioWriteprotect {
    start: u64,
    len: u64,
    mode: u64,
}

#[repr(C)]
struct PmScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region`: `[start, end)` in the other process's addresses, bytes.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// How a scan protects again what it reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProtectMode {
    /// In the same walk. The kernel then notifies the MMU users (KVM) of the whole range walked.
    Combined,
    /// A walk that only reports, then one request for each written range: cold pages keep their KVM mappings.
    TwoStep,
}

/// A userfaultfd of another process, set up for write tracking.
pub struct WriteTracker {
    uffd: Arc<OwnedFd>,
    pid: i32,
    pagemap: File,
    regions: Vec<PageRegion>,
    mode: ProtectMode,
}

impl WriteTracker {
    /// Negotiates the features with the kernel.
    pub fn new(uffd: OwnedFd, pid: i32, mode: ProtectMode) -> io::Result<Self> {
        let mut api = UffdioApi { api: UFFD_API, features: FEATURES, ioctls: 0 };
        ioctl(&uffd, UFFDIO_API, &mut api)?;
        Self::with(Arc::new(uffd), pid, mode)
    }

    /// For memory of this process.
    pub fn of_this_process(mode: ProtectMode) -> io::Result<Self> {
        // SAFETY: userfaultfd takes flags only.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a fresh descriptor that nobody else owns.
        let fd = unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(fd as i32) };
        Self::new(fd, std::process::id() as i32, mode)
    }

    /// The other process.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    fn with(uffd: Arc<OwnedFd>, pid: i32, mode: ProtectMode) -> io::Result<Self> {
        let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
        Ok(Self { uffd, pid, pagemap, regions: vec![PageRegion::default(); REGIONS_PER_CALL], mode })
    }

    /// The same tracking, for another thread to collect other ranges at the same time.
    pub fn another(&self) -> io::Result<Self> {
        Self::with(Arc::clone(&self.uffd), self.pid, self.mode)
    }

    /// Starts tracking `[start, start + len)` of the other process, page aligned. Everything in it counts as written
    /// until it is first collected.
    pub fn register(&self, start: u64, len: u64) -> io::Result<()> {
        let mut request = UffdioRegister { start, len, mode: UFFDIO_REGISTER_MODE_WP, ioctls: 0 };
        ioctl(&*self.uffd, UFFDIO_REGISTER, &mut request).map(|_| ())
    }

    /// Calls `found(start, end)` for each range written since the last collection and protects it again.
    ///
    /// The guest must be stopped with its I/O drained: a page that was pinned for I/O before it is protected takes
    /// its data without a fault.
    pub fn collect(&mut self, start: u64, len: u64, found: impl FnMut(u64, u64)) -> io::Result<()> {
        self.walk(start, len, Some(self.mode), found)
    }

    /// The same, but they go on counting as written: this interrupts no processor.
    pub fn look(&mut self, start: u64, len: u64, found: impl FnMut(u64, u64)) -> io::Result<()> {
        self.walk(start, len, None, found)
    }

    fn walk(
        &mut self,
        start: u64,
        len: u64,
        protect: Option<ProtectMode>,
        mut found: impl FnMut(u64, u64),
    ) -> io::Result<()> {
        let flags = match protect {
            Some(ProtectMode::Combined) => PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
            Some(ProtectMode::TwoStep) | None => PM_SCAN_CHECK_WPASYNC,
        };
        let (mut at, end) = (start, start + len);
        while at < end {
            let mut request = PmScanArg {
                size: size_of::<PmScanArg>() as u64,
                flags,
                start: at,
                end,
                walk_end: 0,
                vec: self.regions.as_mut_ptr() as u64,
                vec_len: self.regions.len() as u64,
                max_pages: 0,
                category_inverted: 0,
                category_mask: PAGE_IS_WRITTEN,
                category_anyof_mask: 0,
                return_mask: PAGE_IS_WRITTEN,
            };
            let count = ioctl(&self.pagemap, PAGEMAP_SCAN, &mut request)? as usize;
            for region in &self.regions[..count.min(REGIONS_PER_CALL)] {
                if protect == Some(ProtectMode::TwoStep) {
                    self.protect(region.start, region.end - region.start)?;
                }
                found(region.start, region.end);
            }
            if request.walk_end <= at {
                return Err(io::Error::other(format!("PAGEMAP_SCAN stopped at {at:#x}")));
            }
            at = request.walk_end;
        }
        Ok(())
    }

    fn protect(&self, start: u64, len: u64) -> io::Result<()> {
        let mut request = UffdioWriteprotect { start, len, mode: UFFDIO_WRITEPROTECT_MODE_WP };
        loop {
            match ioctl(&*self.uffd, UFFDIO_WRITEPROTECT, &mut request) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue, // the mappings just changed
                other => return other.map(|_| ()),
            }
        }
    }
}

fn ioctl<T>(fd: &impl AsRawFd, request: c_ulong, argument: &mut T) -> io::Result<i32> {
    // SAFETY: each request above is paired with the structure the kernel defines for it; `vec` in PmScanArg points
    // at a buffer of `vec_len` regions that is alive for the call.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_mut(argument).cast::<c_void>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Whether this kernel has what the tracker needs, tried on this very process; the error says what is missing.
pub fn probe() -> Result<(), String> {
    let mut tracker = WriteTracker::of_this_process(ProtectMode::Combined)
        .map_err(|e| format!("userfaultfd with asynchronous write protection: {e}; it needs Linux 6.7"))?;
    let page = Box::new(AlignedPage([1; 4096]));
    let at = page.0.as_ptr() as u64;
    tracker.register(at, 4096).map_err(|e| format!("UFFDIO_REGISTER: {e}"))?;
    tracker.collect(at, 4096, |_, _| {}).map_err(|e| format!("PAGEMAP_SCAN: {e}; it needs Linux 6.7"))
}

#[repr(align(4096))]
struct AlignedPage([u8; 4096]);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_structures_have_their_sizes() {
        assert_eq!(size_of::<UffdioApi>(), 24);
        assert_eq!(size_of::<UffdioRegister>(), 32);
        assert_eq!(size_of::<UffdioWriteprotect>(), 24);
        assert_eq!(size_of::<PmScanArg>(), 96);
        assert_eq!(size_of::<PageRegion>(), 24);
    }

    #[test]
    fn written_pages_and_only_those_are_found_in_both_modes() {
        if let Err(missing) = probe() {
            panic!("this kernel cannot track writes: {missing}");
        }
        for mode in [ProtectMode::Combined, ProtectMode::TwoStep] {
            let mut tracker = WriteTracker::of_this_process(mode).unwrap();
            let len = 64 * 4096;
            // SAFETY: a fresh anonymous mapping of that length.
            let map = unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    len,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                    -1,
                    0,
                )
            };
            assert_ne!(map, libc::MAP_FAILED);
            let base = map as u64;
            tracker.register(base, len as u64).unwrap();
            tracker.collect(base, len as u64, |_, _| {}).unwrap();
            for page in [3usize, 4, 17] {
                // SAFETY: inside the mapping.
                unsafe { *map.cast::<u8>().add(page * 4096) = 1 };
            }
            let mut pages = vec![];
            let to_page = |at: u64| (at - base) / 4096;
            for _ in 0..2 {
                tracker.look(base, len as u64, |s, e| pages.extend(to_page(s)..to_page(e))).unwrap();
                assert_eq!(std::mem::take(&mut pages), [3, 4, 17], "{mode:?}: looking changes nothing");
            }
            tracker.collect(base, len as u64, |s, e| pages.extend(to_page(s)..to_page(e))).unwrap();
            assert_eq!(pages, [3, 4, 17], "{mode:?}");
            pages.clear();
            tracker.collect(base, len as u64, |s, e| pages.extend(to_page(s)..to_page(e))).unwrap();
            assert!(pages.is_empty(), "{mode:?}: {pages:?}");
            // SAFETY: the mapping made above.
            unsafe { libc::munmap(map, len) };
        }
    }
}
