//! What the guard process knows of one connection between QEMU and the agent's server: whether it gets on.
//!
//! The agent keeps a number in a small file in memory: it grows with every request that is begun and every one that is
//! answered, and is odd in between. A line on which something waits (bytes nobody has read, or a request under way)
//! while the number stays the same is stuck, whatever the reason: the agent is stopped, or its disk does not answer.
//! Shut down, QEMU gives the mirror up and the guest's write completes.

use std::fs::File;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// How often lines are looked at.
pub const LOOK_EVERY: Duration = Duration::from_millis(100);
/// A line that does not get on for so long is shut down: with the look before, at most 0.7 s, and 0.8 s were promised.
pub const STUCK_AFTER: Duration = Duration::from_millis(600);

#[derive(Debug)]
pub struct Line {
    socket: UnixStream,
    progress: File,
    seen: u64,
    since: Instant,
}

impl Line {
    pub fn new(socket: OwnedFd, progress: OwnedFd) -> Self {
        Self { socket: socket.into(), progress: progress.into(), seen: 0, since: Instant::now() }
    }

    /// Shuts the line down if it is stuck; true: it is of no more interest.
    pub fn look(&mut self, now: Instant) -> bool {
        let mut bytes = [0; 8];
        let progress = self.progress.read_exact_at(&mut bytes, 0).map_or(0, |()| u64::from_ne_bytes(bytes));
        let waits = progress % 2 == 1 || waiting_bytes(&self.socket).unwrap_or(0) > 0;
        if !waits || progress != self.seen {
            (self.seen, self.since) = (progress, now);
            return false;
        }
        if now.saturating_duration_since(self.since) < STUCK_AFTER {
            return false;
        }
        let _ = self.socket.shutdown(Shutdown::Both);
        true
    }
}

/// Bytes that wait to be read from a socket or pipe.
pub fn waiting_bytes(end: &impl AsRawFd) -> io::Result<usize> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int, which is alive for the call.
    match unsafe { libc::ioctl(end.as_raw_fd(), libc::FIONREAD, &mut bytes) } {
        0 => Ok(bytes.max(0) as usize),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn only_a_line_that_does_not_get_on_is_shut_down() {
        let (mut qemu, agent) = UnixStream::pair().unwrap();
        let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
        let progress = File::from(nix::sys::memfd::memfd_create(c"progress", flags).unwrap());
        let set = |value: u64| progress.write_all_at(&value.to_ne_bytes(), 0).unwrap();
        set(2);
        let mut line = Line::new(agent.try_clone().unwrap().into(), progress.try_clone().unwrap().into());
        let start = Instant::now();
        let after = |ms| start + Duration::from_millis(ms);
        assert!(!line.look(after(0)) && !line.look(after(5_000)), "quiet is not stuck");
        set(3);
        assert!(!line.look(after(5_100)));
        set(5);
        assert!(!line.look(after(5_900)), "slow is not stuck");
        set(6);
        qemu.write_all(b"request").unwrap();
        assert!(!line.look(after(6_000)) && !line.look(after(6_500)));
        assert!(line.look(after(6_600)), "nobody read the request");
        assert_eq!(qemu.read(&mut [0; 8]).unwrap(), 0, "QEMU is told");
    }
}
