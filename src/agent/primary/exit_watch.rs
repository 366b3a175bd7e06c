//! Tells at once when a QEMU process ends, however it ends.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use nix::sys::eventfd::{EfdFlags, EventFd};

/// Watches one process until dropped.
pub struct ExitWatch {
    cancel: Arc<EventFd>,
}

impl ExitWatch {
    /// Calls `exited` once, on a thread of its own, when `pid` has ended. The caller has made sure that `pid` still
    /// names the process it means after this returned.
    pub fn start(pid: i32, exited: impl FnOnce() + Send + 'static) -> io::Result<Self> {
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
                    exited();
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
    use std::time::Duration;

    #[test]
    fn an_exit_is_told_once_and_a_dropped_watch_is_silent() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let (sender, receiver) = channel();
        let quiet = sender.clone();
        let dropped = ExitWatch::start(child.id() as i32, move || quiet.send("dropped").unwrap()).unwrap();
        drop(dropped);
        let _watch = ExitWatch::start(child.id() as i32, move || sender.send("exited").unwrap()).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(receiver.recv_timeout(Duration::from_secs(5)).unwrap(), "exited");
        assert!(receiver.recv_timeout(Duration::from_millis(100)).is_err());
    }
}
