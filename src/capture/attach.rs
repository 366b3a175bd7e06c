//! Getting hold of a running guest: its RAM blocks, its pipe, its tracker. Nothing of the guest is changed.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use vmsync::layout::{RamBlock, RamLayout};

use super::cutter::{CutError, Cutter, MonitorCall};
use super::guard::{Guard, GuardError, Injected, Injection};
use super::memory::{GuestMemory, MemoryError};
use super::pipe::StatePipe;
use super::tracker::{HashTracker, Tracker, TrackerError, UserfaultTracker};
use super::uffd::{self, ProtectMode};
use crate::config::TrackerChoice;
use crate::disk::DiskSet;
use crate::hypervisor::process::QemuProcess;
use crate::hypervisor::{Domain, HypervisorError};

#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    #[error(transparent)]
    Hypervisor(#[from] HypervisorError),
    #[error("RAM blocks of {domain}: {reason}")]
    Layout { domain: String, reason: String },
    #[error("{0}")]
    Guard(#[from] GuardError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Tracker(#[from] TrackerError),
    #[error(transparent)]
    Cut(#[from] CutError),
    #[error(
        "comparing hashes would stop {domain} for about {estimate_ms} ms at each cut, more than the watchdog's \
         {bound_ms} ms; userfaultfd is not used because: {reason}. Use Linux 6.7 or newer, or raise agent.watchdog_ms"
    )]
    TooSlow { domain: String, estimate_ms: u128, bound_ms: u128, reason: String },
    #[error("pipe of {domain}: {source}")]
    Pipe { domain: String, source: io::Error },
}

/// How to capture.
#[derive(Debug, Clone)]
pub struct AttachOptions {
    pub tracker: TrackerChoice,
    pub bound: Duration,
    /// Where the record of a guest's pipe is kept, so that a restarted agent uses it again.
    pub run_dir: PathBuf,
}

/// A guest ready to be cut.
pub struct Attached {
    pub cutter: Cutter,
    pub process: QemuProcess,
    pub layout: Arc<RamLayout>,
    pub tracker_reason: String,
}

/// The layout of a guest's RAM and where its blocks lie in QEMU.
pub fn ram_layout(domain: &Domain) -> Result<(RamLayout, Vec<u64>), AttachError> {
    let blocks = domain.ram_blocks()?;
    let layout = RamLayout::new(blocks.iter().map(|b| RamBlock { name: b.name.clone(), len_bytes: b.used }).collect())
        .map_err(|error| AttachError::Layout { domain: domain.name().into(), reason: error.to_string() })?;
    let addresses = blocks.iter().map(|block| block.hva).collect();
    Ok((layout, addresses))
}

/// Attaches to a running guest, whose `disks` are mirrored. `call` sends monitor commands to it.
pub fn attach(
    domain: &Domain,
    guard: &Arc<Guard>,
    call: MonitorCall,
    disks: Arc<DiskSet>,
    options: &AttachOptions,
) -> Result<Attached, AttachError> {
    let process = domain.process()?;
    let (layout, addresses) = ram_layout(domain)?;
    let layout = Arc::new(layout);
    let memory = GuestMemory::new(process.pid, Arc::clone(&layout), addresses)?;
    let (tracker, tracker_reason) = choose_tracker(guard, &memory, options.tracker, protect_mode(domain))?;
    if tracker.name() == "hash" && hash_time(&layout) > options.bound {
        return Err(AttachError::TooSlow {
            domain: domain.name().into(),
            estimate_ms: hash_time(&layout).as_millis(),
            bound_ms: options.bound.as_millis(),
            reason: tracker_reason,
        });
    }
    let pipe = open_pipe(domain, guard, process, &options.run_dir)?;
    let memory = memory.with_disks(disks)?;
    let layout = Arc::clone(memory.layout());
    let cutter = Cutter::new(Arc::clone(guard), pipe, call, memory, tracker, options.bound)?;
    Ok(Attached { cutter, process, layout, tracker_reason })
}

/// Takes back what [`attach`] left in QEMU: the descriptor that stands for the pipe. The tracking ends with our descriptor.
pub fn detach(guard: &Guard, process: QemuProcess, uuid: &str, run_dir: &Path) {
    let path = record_path(run_dir, uuid);
    if let Some(record) = read_record(&path).filter(|record| record.process == process && process.is_alive())
        && let Err(error) = guard.inject(process.pid, Injection::Close(record.path_fd))
    {
        tracing::warn!(uuid, %error, "QEMU keeps the descriptor of a pipe that is no more");
    }
    let _ = fs::remove_file(path);
}

/// What reading and hashing all RAM takes, at the 2.5 GB/s measured.
fn hash_time(layout: &RamLayout) -> Duration {
    Duration::from_micros(layout.total_bytes() / 2_500)
}

fn choose_tracker(
    guard: &Guard,
    memory: &GuestMemory,
    choice: TrackerChoice,
    mode: ProtectMode,
) -> Result<(Box<dyn Tracker>, String), AttachError> {
    if choice == TrackerChoice::Hash {
        return Ok((Box::new(HashTracker::new(memory)), "the configuration asks for it".into()));
    }
    let attempt = || -> Result<Box<dyn Tracker>, String> {
        uffd::probe()?;
        let fd = match guard.inject(memory.pid(), Injection::Userfaultfd).map_err(|e| e.to_string())? {
            Injected::Userfaultfd(fd) => fd,
            _ => return Err("the guard sent no userfaultfd".into()),
        };
        let tracker = UserfaultTracker::new(fd, memory, mode).map_err(|e| e.to_string())?;
        Ok(Box::new(tracker))
    };
    match attempt() {
        Ok(tracker) => Ok((tracker, "the kernel tracks writes exactly, at the least cost".into())),
        Err(reason) if choice == TrackerChoice::Userfaultfd => {
            Err(AttachError::Guard(GuardError::Injection(format!("userfaultfd is not possible: {reason}"))))
        }
        Err(reason) => Ok((Box::new(HashTracker::new(memory)), format!("userfaultfd is not possible: {reason}"))),
    }
}

/// One walk that reports and protects is the cheapest, but drops KVM's mappings of all it walks: a guest under KVM
/// gets two steps. `VIRT_SHADOW_PROTECT=combined|two-step` overrides it, to measure.
fn protect_mode(domain: &Domain) -> ProtectMode {
    let kvm = domain.qmp_call("query-kvm", serde_json::Value::Null);
    match std::env::var("VIRT_SHADOW_PROTECT").as_deref() {
        Ok("combined") => ProtectMode::Combined,
        Ok("two-step") => ProtectMode::TwoStep,
        _ if kvm.is_ok_and(|kvm| kvm.get("enabled").and_then(serde_json::Value::as_bool) == Some(true)) => {
            ProtectMode::TwoStep
        }
        _ => ProtectMode::Combined,
    }
}

/// Which pipe an agent made in which QEMU.
#[derive(Debug, Serialize, Deserialize)]
struct PipeRecord {
    process: QemuProcess,
    path_fd: i32,
    inode: String,
}

fn record_path(run_dir: &Path, uuid: &str) -> PathBuf {
    run_dir.join("pipes").join(format!("{uuid}.json"))
}

fn read_record(path: &Path) -> Option<PipeRecord> {
    serde_json::from_str(&fs::read_to_string(path).ok()?).ok()
}

/// `pipe:[inode]` behind a descriptor of a process.
fn link_of(pid: i32, fd: i32) -> Option<String> {
    Some(fs::read_link(format!("/proc/{pid}/fd/{fd}")).ok()?.to_string_lossy().into_owned())
}

/// The pipe an earlier agent left in this QEMU, or a new one.
fn open_pipe(domain: &Domain, guard: &Guard, process: QemuProcess, run_dir: &Path) -> Result<StatePipe, AttachError> {
    let error = |source| AttachError::Pipe { domain: domain.name().into(), source };
    let path = record_path(run_dir, domain.uuid());
    if let Some(record) = read_record(&path)
        && record.process == process
        && link_of(process.pid, record.path_fd).is_some_and(|link| link == record.inode)
    {
        // What stands for the pipe in QEMU can be opened for reading.
        use std::os::unix::fs::OpenOptionsExt;
        let read_end = fs::File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(format!("/proc/{}/fd/{}", process.pid, record.path_fd));
        if let Ok(read_end) = read_end {
            return StatePipe::new(OwnedFd::from(read_end), record.path_fd).map_err(error);
        }
    }
    let (read_end, path_fd) = match guard.inject(process.pid, Injection::Pipe)? {
        Injected::Pipe { read_end, path_fd } => (read_end, path_fd),
        _ => return Err(error(io::Error::other("the guard sent no pipe"))),
    };
    if let Some(inode) = link_of(process.pid, path_fd) {
        let record = PipeRecord { process, path_fd, inode };
        let written = serde_json::to_vec(&record).map_err(io::Error::other).and_then(|text| {
            fs::create_dir_all(run_dir.join("pipes"))?;
            fs::write(&path, text)
        });
        if let Err(error) = written {
            // Without the record a restarted agent makes another pipe and this one stays open in QEMU: harmless.
            tracing::warn!(path = %path.display(), %error, "cannot remember QEMU's pipe");
        }
    }
    StatePipe::new(read_end, path_fd).map_err(error)
}
