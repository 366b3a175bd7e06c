//! All writable disks of one guest: their copies, servers and mirror jobs.
//!
//! ```text
//! start: server, virDomainBlockCopy --> copying (QEMU copies what is allocated) --> ready --> [settled at each cut]
//!                                          \--- a job or a connection ended: the set is of no more use, a new one is made
//! ```

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vmsync::layout::{LayoutError, RamBlock, RamLayout};
use vmsync::page_set::{OutsideLayout, PageSet};
use vmsync::units::{BlockIndex, PAGE_SIZE_U64, PageAddr};

use super::copy::DiskCopy;
use super::images;
use super::server::{Server, State};
use crate::capture::guard::Guard;
use crate::hypervisor::xml::{Disk, GuestDefinition};
use crate::hypervisor::{Domain, HypervisorError};

/// All disks of a guest together: sets of pages are looked through at each cut.
pub const MAX_DISKS_BYTES: u64 = 512 << 30;

#[derive(Debug, thiserror::Error)]
pub enum DiskProblem {
    #[error("disk {target}: {reason}")]
    Unfit { target: String, reason: String },
    #[error("disk {target}: cannot {action}: {source}")]
    Io { target: String, action: &'static str, source: io::Error },
    #[error("agent.disk_dir {path}: {source}")]
    Folder { path: PathBuf, source: io::Error },
    #[error("disk {target} is mirrored no longer: {reason}")]
    Broken { target: String, reason: String },
    #[error(transparent)]
    Hypervisor(#[from] HypervisorError),
    #[error(transparent)]
    Layout(#[from] LayoutError),
    #[error(transparent)]
    Outside(#[from] OutsideLayout),
}

/// Where things of disks go on this host.
#[derive(Debug, Clone)]
pub struct DiskPaths {
    pub disk_dir: PathBuf,
    pub run_dir: PathBuf,
    /// Bound of the first copy of each disk, MiB/s; 0: none.
    pub copy_mib_per_s: u64,
}

pub struct DiskSet {
    domain: Domain,
    disks: Vec<Mirrored>,
    ready: AtomicBool,
}

struct Mirrored {
    target: String,
    source: Option<String>,
    copy: Arc<DiskCopy>,
    server: Server,
}

/// How far the first copies are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    Copying(String),
    Ready,
}

impl DiskSet {
    /// Begins to mirror all writable disks; a set without any if there are none.
    pub fn start(
        domain: &Domain,
        definition: &GuestDefinition,
        paths: &DiskPaths,
        guard: &Arc<Guard>,
    ) -> Result<Self, DiskProblem> {
        let mut set = Self { domain: domain.clone(), disks: Vec::new(), ready: AtomicBool::new(false) };
        let writable: Vec<&Disk> = definition.mirrored_disks().collect();
        if writable.is_empty() {
            set.ready = AtomicBool::new(true);
            return Ok(set);
        }
        let folder = images::folder(&paths.disk_dir, domain.uuid())
            .map_err(|source| DiskProblem::Folder { path: paths.disk_dir.clone(), source })?;
        let sockets = paths.run_dir.join("disks");
        fs::create_dir_all(&sockets).map_err(|source| DiskProblem::Folder { path: sockets.clone(), source })?;
        let in_use: Vec<String> = writable.iter().filter_map(|disk| disk.source.clone()).collect();
        let sizes = check_sizes(domain, definition)?;
        for (disk, len) in writable.into_iter().zip(sizes) {
            let image = images::choose(&folder, &disk.target, &in_use);
            set.disks.push(start_one(domain, disk, len, &image, &sockets, guard)?);
        }
        for disk in &set.disks {
            set.begin_copy(disk, &sockets, paths.copy_mib_per_s)?;
        }
        Ok(set)
    }

    fn begin_copy(&self, disk: &Mirrored, sockets: &Path, mib_per_s: u64) -> Result<(), DiskProblem> {
        // One may be left of an agent that died.
        if self.domain.block_job(&disk.target)?.is_some() {
            self.domain.abort_block_job(&disk.target)?;
        }
        let xml = format!(
            "<disk type='network' device='disk'><driver name='qemu' type='raw'/><source protocol='nbd' name='{}'>\
             <host transport='unix' socket='{}'/></source></disk>",
            disk.target,
            socket_path(sockets, self.domain.uuid(), &disk.target).display()
        );
        self.domain.mirror_disk(&disk.target, &xml)?;
        if mib_per_s > 0 {
            self.domain.limit_block_job(&disk.target, mib_per_s << 20)?;
        }
        Ok(())
    }

    pub fn is_empty(&self) -> bool {
        self.disks.is_empty()
    }

    /// Whether these are the disks that the guest has, all mirrored.
    pub fn fits(&self, domain: &Domain, definition: &GuestDefinition) -> bool {
        let same = |disk: &Disk, mirrored: &Mirrored| disk.target == mirrored.target && disk.source == mirrored.source;
        let wanted: Vec<&Disk> = definition.mirrored_disks().collect();
        domain.uuid() == self.domain.uuid()
            && wanted.len() == self.disks.len()
            && wanted.iter().zip(&self.disks).all(|(disk, mirrored)| same(disk, mirrored))
            && self.check().is_ok()
    }

    /// The guest's blocks: its RAM, then its disks.
    pub fn layout(&self, ram: &RamLayout) -> Result<RamLayout, LayoutError> {
        let mut blocks = ram.blocks().to_vec();
        blocks.extend(
            self.disks
                .iter()
                .map(|disk| RamBlock { name: images::block_name(&disk.target), len_bytes: disk.copy.len() }),
        );
        RamLayout::new(blocks)
    }

    /// An error once a disk is mirrored no longer.
    pub fn check(&self) -> Result<(), DiskProblem> {
        self.disks.iter().try_for_each(|disk| match disk.server.state() {
            State::Ended(reason) => Err(DiskProblem::Broken { target: disk.target.clone(), reason }),
            State::Waiting | State::Serving => Ok(()),
        })
    }

    pub fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Acquire)
    }

    /// Looks how far the copies are. Once ready, it stays so.
    pub fn progress(&self, domain: &Domain) -> Result<Progress, DiskProblem> {
        self.check()?;
        if self.is_ready() {
            return Ok(Progress::Ready);
        }
        let mut copying = Vec::new();
        for disk in &self.disks {
            match domain.block_job(&disk.target)? {
                None => {
                    let reason = "its job is gone: somebody ended it, or QEMU could not read or write".into();
                    return Err(DiskProblem::Broken { target: disk.target.clone(), reason });
                }
                Some(job) if job.is_ready() => {}
                Some(job) => copying.push(format!("{} {} %", disk.target, job.percent())),
            }
        }
        if !copying.is_empty() {
            return Ok(Progress::Copying(format!("first copy of its disks on this host: {}", copying.join(", "))));
        }
        // Whatever was written before is in the copies; nothing has been read of them yet.
        self.disks.iter().for_each(|disk| disk.copy.track());
        self.ready.store(true, Ordering::Release);
        Ok(Progress::Ready)
    }

    /// While the guest is stopped: adds the pages written since the last call. The first disk is block `first`.
    pub fn collect(&self, first: usize, written: &mut PageSet) -> Result<(), DiskProblem> {
        for (index, disk) in self.disks.iter().enumerate() {
            // Before anything is taken: what is taken must not be lost.
            if !disk.server.is_settled() {
                let reason = match disk.server.state() {
                    State::Ended(reason) => reason,
                    _ => "QEMU and the agent do not agree on what was written".into(),
                };
                return Err(DiskProblem::Broken { target: disk.target.clone(), reason });
            }
            disk.copy.take_written(BlockIndex::new((first + index) as u16), written)?;
        }
        Ok(())
    }

    /// After [`Self::collect`], while the guest is still stopped: until [`Self::release`] these pages are read as they are now.
    pub fn hold(&self, first: usize, pages: &PageSet) {
        let mut held = vec![Vec::new(); self.disks.len()];
        for (page, count) in pages.ranges() {
            let disk = page.block.as_usize().checked_sub(first);
            if let Some(ranges) = disk.and_then(|disk| held.get_mut(disk)) {
                ranges.push((page.page.get().into(), count));
            }
        }
        self.disks.iter().zip(held).for_each(|(disk, ranges)| disk.copy.hold(ranges));
    }

    pub fn release(&self) {
        self.disks.iter().for_each(|disk| disk.copy.release());
    }

    /// Adds the contents of `count` pages from `page` on, of the disk with that number.
    pub fn read(&self, disk: usize, page: PageAddr, count: usize, bytes: &mut Vec<u8>) -> io::Result<()> {
        let disk = self.disks.get(disk).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        disk.copy.read_pages(page.page.get().into(), count, bytes)
    }

    pub fn set_guard(&self, guard: &Arc<Guard>) {
        self.disks.iter().for_each(|disk| disk.server.set_guard(guard));
    }
}

/// The guest goes on without us: its jobs are ended before what they write to.
impl Drop for DiskSet {
    fn drop(&mut self) {
        for disk in &self.disks {
            if let Ok(Some(_)) = self.domain.block_job(&disk.target)
                && let Err(error) = self.domain.abort_block_job(&disk.target)
            {
                tracing::debug!(guest = self.domain.name(), disk = disk.target, %error, "its mirror is ended by force");
            }
        }
    }
}

fn socket_path(sockets: &Path, uuid: &str, target: &str) -> PathBuf {
    sockets.join(format!("{uuid}-{target}"))
}

/// Sizes of all writable disks, if these can be mirrored.
pub fn check_sizes(domain: &Domain, definition: &GuestDefinition) -> Result<Vec<u64>, DiskProblem> {
    let (mut sizes, mut total) = (Vec::new(), 0u64);
    for disk in definition.mirrored_disks() {
        let len = check_size(domain, disk)?;
        total = total.saturating_add(len);
        if total > MAX_DISKS_BYTES {
            let reason = format!("all disks together have more than {} GiB", MAX_DISKS_BYTES >> 30);
            return Err(DiskProblem::Unfit { target: disk.target.clone(), reason });
        }
        sizes.push(len);
    }
    Ok(sizes)
}

fn check_size(domain: &Domain, disk: &Disk) -> Result<u64, DiskProblem> {
    let target = disk.target.clone();
    if !images::is_target(&target) {
        return Err(DiskProblem::Unfit { target, reason: "its name has other than letters and digits".into() });
    }
    let len = domain.disk_bytes(&target)?;
    if len == 0 || !len.is_multiple_of(PAGE_SIZE_U64) {
        let reason = format!("its size of {len} bytes is not a multiple of {PAGE_SIZE_U64}; make it a little larger");
        return Err(DiskProblem::Unfit { target, reason });
    }
    Ok(len)
}

fn start_one(
    domain: &Domain,
    disk: &Disk,
    len: u64,
    image: &Path,
    sockets: &Path,
    guard: &Arc<Guard>,
) -> Result<Mirrored, DiskProblem> {
    let target = disk.target.clone();
    let failed = |action| {
        let target = target.clone();
        move |source| DiskProblem::Io { target, action, source }
    };
    let copy = Arc::new(DiskCopy::open(image, len).map_err(failed("open its copy"))?);
    let pid = domain.pid()?;
    let uid = fs::metadata(format!("/proc/{pid}")).map_err(failed("look at QEMU"))?;
    let uid = std::os::unix::fs::MetadataExt::uid(&uid);
    let socket = socket_path(sockets, domain.uuid(), &target);
    let server = Server::start(&socket, uid, move |from| from == pid, &target, Arc::clone(&copy), Arc::clone(guard))
        .map_err(failed("listen for QEMU"))?;
    Ok(Mirrored { target, source: disk.source.clone(), copy, server })
}
