//! Tells at once when a QEMU process ends, and whether it was killed or ended by itself.
//!
//! libvirt tells the reason too, but some 200 ms later, when it has tidied up. A QEMU that is asked to end (destroy,
//! save, revert, shutdown) exits with 0; one that dies by a signal or with another code was not asked. Since Linux
//! 6.15 the kernel tells that of any process through its pidfd (PIDFD_GET_INFO, include/uapi/linux/pidfd.h).

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};

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
        // SAFETY: pidfd_open takes no pointers.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a fresh descriptor that nobody else owns.
        let pidfd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        let cancel = Arc::new(EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC)?);
        let cancelled = Arc::clone(&cancel);
        std::thread::Builder::new().name("exit-watch".into()).spawn(move || {
            let pollfd = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
            let mut polled = [pollfd(pidfd.as_raw_fd()), pollfd(cancelled.as_fd().as_raw_fd())];
            loop {
                // SAFETY: two live elements.
                let ready = unsafe { libc::poll(polled.as_mut_ptr(), 2, -1) };
                if ready < 0 && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                if polled[1].revents == 0 {
                    exited(exit_of(&pidfd));
                }
                return;
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
