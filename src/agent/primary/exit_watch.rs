//! Tells at once when a QEMU process ends, and whether it was killed or ended by itself.
//!
//! libvirt tells the reason too, but some 200 ms later, when it has tidied up. A QEMU that is asked to end (destroy,
//! save, revert, shutdown) exits with 0; one that dies by a signal or with another code was not asked. Since Linux
//! 6.15 the kernel tells that of any process through its pidfd (PIDFD_GET_INFO, include/uapi/linux/pidfd.h).
//!
//! A process counts as ended only when its memory is given back, which takes longer the more of it there is. Its vCPU
//! threads end at once: they are watched as well (PIDFD_THREAD, Linux 6.9), and the first that died tells.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::hypervisor::process::pidfd_open;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// With code 0: as QEMU does when it is asked to end.
    Clean,
    /// By a signal or with another code.
    Died {
        /// As `waitpid` has it.
        status: i32,
    },
    /// This kernel does not tell, or whoever has to has not reaped the process yet.
    Unknown,
}

const PIDFD_GET_INFO: libc::c_ulong = 0xc040_ff0b;
const PIDFD_INFO_EXIT: u64 = 1 << 3;
const PIDFD_THREAD: u32 = libc::O_EXCL as u32;
/// vCPUs watched; the first few die as soon as all others.
const MAX_THREADS: usize = 4;
/// How long the parent of a QEMU may take to reap it.
const REAPED_WITHIN: Duration = Duration::from_millis(50);

/// First version of `struct pidfd_info`, 64 bytes.
#[repr(C)]
#[derive(Default)]
struct PidfdInfo {
    mask: u64,
    cgroup_id: u64,
    ids: [u32; 11],
    exit_code: i32,
}

/// Threads that QEMU named as vCPUs, such as `CPU 0/KVM`.
fn vcpu_threads(pid: i32) -> Vec<i32> {
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    tasks
        .flatten()
        .filter(|task| std::fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name.starts_with("CPU ")))
        .filter_map(|task| task.file_name().to_str()?.parse().ok())
        .take(MAX_THREADS)
        .collect()
}

/// How it ended; `None` if cancelled. The last of `watched` is the process itself.
fn wait_for_exit(mut watched: Vec<OwnedFd>, cancelled: &EventFd) -> Option<Exit> {
    loop {
        let pollfd = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        let mut polled: Vec<_> = watched.iter().map(|fd| pollfd(fd.as_raw_fd())).collect();
        polled.push(pollfd(cancelled.as_fd().as_raw_fd()));
        // SAFETY: the array is live and its length is passed.
        let ready = unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, -1) };
        if ready < 0 {
            continue; // interrupted
        }
        let (cancel, processes) = polled.split_last()?;
        if cancel.revents != 0 {
            return None;
        }
        let ended = processes.iter().position(|polled| polled.revents != 0)?;
        let exit = exit_of(&watched[ended]);
        if ended + 1 == watched.len() || matches!(exit, Exit::Died { .. }) {
            return Some(exit);
        }
        // A vCPU that was unplugged, or the first of all to end in order: the process will tell.
        watched.remove(ended);
    }
}

fn exit_of(pidfd: &OwnedFd) -> Exit {
    let give_up_at = Instant::now() + REAPED_WITHIN;
    loop {
        let mut info = PidfdInfo { mask: PIDFD_INFO_EXIT, ..PidfdInfo::default() };
        // SAFETY: the request is defined for this structure, which is alive for the call.
        let result = unsafe { libc::ioctl(pidfd.as_raw_fd(), PIDFD_GET_INFO, &raw mut info) };
        let told = result == 0 && info.mask & PIDFD_INFO_EXIT != 0;
        match info.exit_code {
            0 if told => return Exit::Clean,
            status if told => return Exit::Died { status },
            _ if Instant::now() > give_up_at => return Exit::Unknown,
            _ => std::thread::sleep(Duration::from_micros(300)),
        }
    }
}

/// Watches one process until dropped.
pub struct ExitWatch {
    cancel: Arc<EventFd>,
}

impl ExitWatch {
    /// Calls `exited` once, on a thread of its own, when `pid` has ended. The caller has made sure that `pid` still
    /// names the process it means after this returned.
    pub fn start(pid: i32, exited: impl FnOnce(Exit) + Send + 'static) -> io::Result<Self> {
        let process = pidfd_open(pid, 0)?;
        // Without them (an older kernel, a thread that has just ended) the process alone tells, if later.
        let mut watched: Vec<OwnedFd> =
            vcpu_threads(pid).into_iter().filter_map(|thread| pidfd_open(thread, PIDFD_THREAD).ok()).collect();
        watched.push(process);
        let cancel = Arc::new(EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC)?);
        let cancelled = Arc::clone(&cancel);
        std::thread::Builder::new().name("exit-watch".into()).spawn(move || {
            if let Some(exit) = wait_for_exit(watched, &cancelled) {
                exited(exit);
            }
        })?;
        Ok(Self { cancel })
    }
}

impl Drop for ExitWatch {
    fn drop(&mut self) {
        let _ = self.cancel.write(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn the_kernels_structure_has_its_size() {
        assert_eq!(size_of::<PidfdInfo>(), 64);
    }

    #[test]
    fn an_exit_is_told_once_and_a_dropped_watch_is_silent() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let (sender, receiver) = channel();
        let quiet = sender.clone();
        let dropped = ExitWatch::start(child.id() as i32, move |_| quiet.send(Exit::Unknown).unwrap()).unwrap();
        drop(dropped);
        let _watch = ExitWatch::start(child.id() as i32, move |exit| sender.send(exit).unwrap()).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        // A kernel older than 6.15 cannot tell.
        let exit = receiver.recv_timeout(Duration::from_secs(5)).unwrap();
        assert!(matches!(exit, Exit::Died { status: libc::SIGKILL } | Exit::Unknown), "{exit:?}");
        assert!(receiver.recv_timeout(Duration::from_millis(100)).is_err());
    }
}
