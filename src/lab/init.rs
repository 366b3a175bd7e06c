//! First process of a node (`virt-shadow-lab node-init SPEC`): what firmware, kernel and systemd are to a real host.
//!
//! It makes the node's own view of the file system, starts libvirtd and virtshadowd, starts them again when they end
//! (as systemd does with Restart=always) and reaps what nobody waits for. It has no way to end but SIGKILL from
//! outside, and then the kernel ends everything in its pid namespace: a power cut.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fs::{self, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, sethostname, setsid};
use serde::{Deserialize, Serialize};

use super::error::{LabError, Result};
use super::state::RUN_ROOT;

/// Where the node's first process tells the lab about itself, on the node's own `/run`.
pub const STATUS_PATH: &str = "/run/lab-node.json";
const RESTART_DELAY: Duration = Duration::from_millis(300);
/// A service that ended this soon this many times in a row is started less often.
const QUICK_END: Duration = Duration::from_secs(1);
const QUICK_ENDS_MAX: u32 = 10;
const CRASH_LOOP_DELAY: Duration = Duration::from_secs(3);
/// Where a service finds programs.
const SERVICE_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

#[derive(Debug, Serialize, Deserialize)]
pub struct InitSpec {
    pub hostname: String,
    /// Directories and files laid over others: (source, target).
    pub binds: Vec<(PathBuf, PathBuf)>,
    pub services: Vec<ServiceSpec>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ServiceSpec {
    pub name: String,
    pub command: Vec<String>,
    pub log: PathBuf,
}

/// What [`STATUS_PATH`] holds: the node is ready once it is there.
#[derive(Debug, Default, Clone, PartialEq, Serialize, Deserialize)]
pub struct NodeStatus {
    pub services: BTreeMap<String, ServiceStatus>,
}

#[derive(Debug, Default, Clone, PartialEq, Serialize, Deserialize)]
pub struct ServiceStatus {
    /// Number inside the node; none while it waits to be started again.
    pub pid: Option<i32>,
    pub restarts: u64,
    pub last_end: Option<String>,
}

/// Runs the node for as long as it has power.
pub fn run(spec_path: &Path) -> Result<Infallible> {
    let text = fs::read_to_string(spec_path).map_err(LabError::io("read", spec_path))?;
    let spec: InitSpec =
        serde_json::from_str(&text).map_err(|e| LabError::Corrupt { path: spec_path.into(), reason: e.to_string() })?;
    if std::process::id() != 1 {
        let reason = "it is started by the lab as the first process of a node, never by hand".into();
        return Err(LabError::Invalid { what: "command", value: "node-init".into(), reason });
    }
    // Fails only if it leads a session already.
    let _ = setsid();
    sethostname(&spec.hostname).map_err(LabError::system("set the host name"))?;
    arrange_mounts(&spec.binds)?;
    supervise(&spec.services)
}

fn mount_at(
    source: Option<&Path>,
    target: &Path,
    kind: Option<&str>,
    flags: MsFlags,
    data: Option<&str>,
) -> Result<()> {
    mount(source, target, kind, flags, data).map_err(LabError::system(format!("mount {}", target.display())))
}

fn arrange_mounts(binds: &[(PathBuf, PathBuf)]) -> Result<()> {
    mount_at(None, Path::new("/"), None, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None)?;
    let fresh = |kind: &str, target: &str, data| {
        mount_at(Some(Path::new(kind)), Path::new(target), Some(kind), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, data)
    };
    fresh("proc", "/proc", None)?;
    detach_foreign_mounts();
    for (source, target) in binds {
        fs::create_dir_all(target.parent().unwrap_or(target)).map_err(LabError::io("create", target))?;
        if source.is_dir() && !target.exists() {
            fs::create_dir_all(target).map_err(LabError::io("create", target))?;
        }
        mount_at(Some(source), target, None, MsFlags::MS_BIND, None)?;
    }
    // Lost with power, as everywhere; libvirt's and our sockets, pid files and journals live here.
    fresh("tmpfs", "/run", Some("mode=755"))?;
    for dir in ["/run/lock", "/run/libvirt", "/run/virt-shadow", "/run/sysfs-aside"] {
        fs::create_dir(dir).map_err(LabError::io("create", Path::new(dir)))?;
    }
    fresh("tmpfs", "/dev/shm", Some("mode=1777"))?;
    // A sysfs shows the network of the namespace it was mounted in; the control groups under it stay as they are.
    let (cgroup, aside) = (Path::new("/sys/fs/cgroup"), Path::new("/run/sysfs-aside"));
    let moved = mount(Some(cgroup), aside, None::<&str>, MsFlags::MS_MOVE, None::<&str>).is_ok();
    fresh("sysfs", "/sys", None)?;
    if moved {
        mount_at(Some(aside), cgroup, None, MsFlags::MS_MOVE, None)?;
    }
    Ok(())
}

/// Lets go of mounts inherited from outside that would keep namespaces of other nodes alive.
fn detach_foreign_mounts() {
    let Ok(mounts) = fs::read_to_string("/proc/self/mountinfo") else { return };
    let targets: Vec<_> = mounts.lines().filter_map(|l| l.split(' ').nth(4)).collect();
    for target in targets.into_iter().rev() {
        if target.starts_with("/run/netns") || target.starts_with(RUN_ROOT) {
            // One that is gone already, with its parent, is fine.
            let _ = umount2(target, MntFlags::MNT_DETACH);
        }
    }
}

struct Service {
    spec: ServiceSpec,
    status: ServiceStatus,
    started: Instant,
    due: Option<Instant>,
    quick_ends: u32,
}

fn supervise(specs: &[ServiceSpec]) -> Result<Infallible> {
    let mut child_ended = SigSet::empty();
    child_ended.add(Signal::SIGCHLD);
    child_ended.thread_block().map_err(LabError::system("block SIGCHLD"))?;
    let signals = SignalFd::with_flags(&child_ended, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
        .map_err(LabError::system("watch for SIGCHLD"))?;
    let now = Instant::now();
    let start = |spec: &ServiceSpec| {
        let status = ServiceStatus::default();
        Service { spec: spec.clone(), status, started: now, due: Some(now), quick_ends: 0 }
    };
    let mut services: Vec<_> = specs.iter().map(start).collect();
    let mut told = None;
    loop {
        for service in &mut services {
            service.start_if_due();
        }
        let status =
            NodeStatus { services: services.iter().map(|s| (s.spec.name.clone(), s.status.clone())).collect() };
        if told.as_ref() != Some(&status) {
            tell(&status)?;
            told = Some(status);
        }
        let due = services.iter().filter_map(|s| s.due).min();
        let timeout = due.map_or(PollTimeout::NONE, |due| {
            let wait = due.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX)
        });
        // Interrupted or timed out: the loop looks at everything anyway.
        let _ = poll(&mut [PollFd::new(signals.as_fd(), PollFlags::POLLIN)], timeout);
        while let Ok(Some(_)) = signals.read_signal() {}
        while let Some((pid, end)) = reap() {
            if let Some(service) = services.iter_mut().find(|s| s.status.pid == Some(pid.as_raw())) {
                service.ended(end);
            }
        }
    }
}

/// One child that ended, of our own or left to us by its parent.
fn reap() -> Option<(Pid, String)> {
    match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
        Ok(WaitStatus::Exited(pid, code)) => Some((pid, format!("exit code {code}"))),
        Ok(WaitStatus::Signaled(pid, signal, _)) => Some((pid, signal.as_str().into())),
        _ => None,
    }
}

fn tell(status: &NodeStatus) -> Result<()> {
    let (path, new) = (Path::new(STATUS_PATH), Path::new("/run/lab-node.new"));
    let text = serde_json::to_vec(status)
        .map_err(|e| LabError::Corrupt { path: STATUS_PATH.into(), reason: e.to_string() })?;
    fs::write(new, text).map_err(LabError::io("write", new))?;
    fs::rename(new, path).map_err(LabError::io("replace", path))
}

impl Service {
    fn start_if_due(&mut self) {
        if self.due.is_none_or(|due| due > Instant::now()) {
            return;
        }
        self.due = None;
        self.started = Instant::now();
        match self.spawn() {
            Ok(pid) => self.status.pid = Some(pid),
            Err(error) => self.ended(error.to_string()),
        }
    }

    fn spawn(&self) -> Result<i32> {
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.spec.log)
            .map_err(LabError::io("open", &self.spec.log))?;
        let errors = log.try_clone().map_err(LabError::io("open", &self.spec.log))?;
        let (program, arguments) = self.spec.command.split_first().ok_or_else(|| LabError::Invalid {
            what: "service",
            value: self.spec.name.clone(),
            reason: "has no command".into(),
        })?;
        let child = Command::new(program)
            .args(arguments)
            // As under an init system, whatever this lab was raised from.
            .env_remove("LD_LIBRARY_PATH")
            .env("PATH", SERVICE_PATH)
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors)
            .process_group(0)
            .spawn()
            .map_err(LabError::system(format!("start {program}")))?;
        // Reaped with all others by `reap`.
        Ok(child.id() as i32)
    }

    fn ended(&mut self, end: String) {
        let now = Instant::now();
        self.quick_ends = if now - self.started < QUICK_END { self.quick_ends + 1 } else { 0 };
        let delay = if self.quick_ends < QUICK_ENDS_MAX { RESTART_DELAY } else { CRASH_LOOP_DELAY };
        self.due = Some(now + delay);
        self.status.pid = None;
        self.status.restarts += 1;
        eprintln!("{} ended: {end}; starting it again in {} ms", self.spec.name, delay.as_millis());
        self.status.last_end = Some(end);
    }
}
