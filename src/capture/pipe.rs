//! QEMU's pipe as the cutter sees it: who opens it, what is in it, how much QEMU may write before it waits.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::eventfd::EventFd;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use vmsync::device_state::MAX_DEVICE_STATE_BYTES;
use vmsync::units::PAGE_SIZE;

use super::tracker::Writer;
use crate::disk::line::waiting_bytes;

/// What an unprivileged pipe may have at most by the kernel's default.
pub(super) const WIDE_PIPE_BYTES: i32 = 1 << 20;

/// QEMU's pipe: our read end, and the number of the descriptor by which QEMU opens its write end for each cut.
pub struct StatePipe {
    pub(super) read_end: File,
    pub(super) path_fd: i32,
}

impl StatePipe {
    /// Sets the pipe to one page, so that QEMU waits for us after the first bytes. QEMU must not be writing to it.
    pub fn new(read_end: OwnedFd, path_fd: i32) -> io::Result<Self> {
        fcntl(&read_end, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        let pipe = Self { read_end: File::from(read_end), path_fd };
        pipe.empty()?;
        pipe.hold(PAGE_SIZE)?;
        Ok(pipe)
    }

    /// Throws away what a cut left whose agent died: no pipe can be narrowed below what it holds, and the next cut
    /// must not take it for its own first bytes.
    pub(super) fn empty(&self) -> io::Result<()> {
        let mut rest = Vec::new();
        self.read_available(MAX_DEVICE_STATE_BYTES, &mut rest)?;
        if !rest.is_empty() {
            tracing::info!(thrown_away = rest.len(), "the pipe held the rest of an earlier cut");
        }
        Ok(())
    }

    /// QEMU waits for us after so many bytes, a power of two pages.
    pub(super) fn hold(&self, bytes: usize) -> io::Result<()> {
        fcntl(&self.read_end, FcntlArg::F_SETPIPE_SZ(bytes as i32)).map(drop).map_err(Into::into)
    }

    /// Reads what is there, up to `most` bytes; how many there were. What goes wrong shows at the next reading.
    fn read_at_most(&self, most: usize, into: &mut Vec<u8>) -> usize {
        let before = into.len();
        into.resize(before + most, 0);
        let mut read = 0;
        while read < most {
            match (&self.read_end).read(&mut into[before + read..]) {
                Ok(more) if more > 0 => read += more,
                _ => break,
            }
        }
        into.truncate(before + read);
        read
    }

    /// Bytes that wait to be read.
    pub(super) fn filled(&self) -> io::Result<usize> {
        waiting_bytes(&self.read_end)
    }

    /// Room for all of a usual state: QEMU need not wait for us page by page once we have what we stopped it for.
    /// Where the kernel gives no more room, it waits as before.
    pub(super) fn widen(&self) {
        let _ = fcntl(&self.read_end, FcntlArg::F_SETPIPE_SZ(WIDE_PIPE_BYTES));
    }

    /// Reads all that is there; true: QEMU has closed its end. Beyond `most` bytes they are thrown away: QEMU must not be
    /// left waiting.
    pub(super) fn read_available(&self, most: usize, into: &mut Vec<u8>) -> io::Result<bool> {
        let mut buffer = [0u8; 16384];
        loop {
            match (&self.read_end).read(&mut buffer) {
                Ok(0) => return Ok(true),
                Ok(_) if into.len() > most => {}
                Ok(read) => into.extend_from_slice(&buffer[..read]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Whether somebody has it open for writing.
    pub(super) fn has_writer(&self) -> bool {
        wait_for(&self.read_end, None).is_ok_and(|(of_pipe, _)| of_pipe & libc::POLLHUP == 0)
    }
}

/// What poll(2) tells of the pipe and of `other`: at once, or, if there is such an other, when there is something to tell.
fn wait_for(pipe: &File, other: Option<&EventFd>) -> io::Result<(i16, i16)> {
    let polled = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    let mut fds = [polled(pipe.as_raw_fd()), polled(other.map_or(-1, AsRawFd::as_raw_fd))];
    let timeout_ms = if other.is_some() { -1 } else { 0 };
    loop {
        // SAFETY: two live elements; one with a negative descriptor is left out.
        if unsafe { libc::poll(fds.as_mut_ptr(), 2, timeout_ms) } >= 0 {
            return Ok((fds[0].revents, fds[1].revents));
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Tells when somebody opens the pipe. Waiting for it by opening it ourselves, as one does with a FIFO, is not possible: what
/// pipe(2) made does not wait for its other end.
pub(super) struct Openings(Inotify);

impl Openings {
    pub(super) fn of(pipe: &StatePipe) -> nix::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        let path = format!("/proc/self/fd/{}", pipe.read_end.as_raw_fd());
        inotify.add_watch(path.as_str(), AddWatchFlags::IN_OPEN)?;
        Ok(Self(inotify))
    }

    /// Whether there were any since this was last asked.
    pub(super) fn take(&self) -> bool {
        let mut any = false;
        while self.0.read_events().is_ok_and(|events| !events.is_empty()) {
            any = true;
        }
        any
    }
}

impl AsFd for Openings {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// QEMU making its state, of a guest that stands still, and what has come of it.
pub(super) struct Writing<'a> {
    pub(super) pipe: &'a StatePipe,
    /// Becomes readable with the monitor's answer, after which there is nothing to wait for.
    pub(super) answered: &'a EventFd,
    pub(super) state: &'a mut Vec<u8>,
    /// Room in the pipe while pages are copied, and what may be read from it before.
    pub(super) room_bytes: usize,
    pub(super) spare_bytes: usize,
    pub(super) waits_since: Option<Instant>,
}

impl Writing<'_> {
    /// QEMU may write a part more.
    pub(super) fn go_on(&mut self) {
        // Where the kernel gives no more room, it waits as before.
        let _ = self.pipe.hold(self.room_bytes);
        self.spare_bytes -= self.pipe.read_at_most(self.spare_bytes, self.state);
    }

    /// For how long QEMU has waited for us.
    pub(super) fn waited(&self) -> Duration {
        self.waits_since.map_or(Duration::ZERO, |since| since.elapsed())
    }
}

impl Writer for Writing<'_> {
    fn waits(&mut self) -> bool {
        if self.waits_since.is_none() && self.pipe.filled().is_ok_and(|filled| filled > 0) {
            self.waits_since = Some(Instant::now());
        }
        self.waits_since.is_some()
    }

    fn wait(&mut self) -> io::Result<()> {
        if !self.waits() {
            let (of_pipe, _) = wait_for(&self.pipe.read_end, Some(self.answered))?;
            if of_pipe & libc::POLLIN == 0 {
                return Err(io::Error::other("QEMU wrote no state"));
            }
            self.waits_since = Some(Instant::now());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::eventfd::EfdFlags;
    use std::io::Write;

    #[test]
    fn what_an_earlier_cut_left_in_the_pipe_is_thrown_away() {
        let (read_end, write_end) = nix::unistd::pipe().unwrap();
        fcntl(&read_end, FcntlArg::F_SETPIPE_SZ(WIDE_PIPE_BYTES)).unwrap();
        File::from(write_end.try_clone().unwrap()).write_all(&vec![7; 3 * PAGE_SIZE]).unwrap();
        let pipe = StatePipe::new(read_end, 0).unwrap();
        let mut byte = [0];
        let nothing = (&pipe.read_end).read(&mut byte).unwrap_err();
        assert_eq!(nothing.kind(), io::ErrorKind::WouldBlock);
        assert_eq!(fcntl(&pipe.read_end, FcntlArg::F_GETPIPE_SZ).unwrap(), PAGE_SIZE as i32);
    }

    fn pipe_and_path() -> (StatePipe, String) {
        let (read_end, _) = nix::unistd::pipe().unwrap();
        let path = format!("/proc/self/fd/{}", read_end.as_raw_fd());
        (StatePipe::new(read_end, 0).unwrap(), path)
    }

    #[test]
    fn each_opening_is_told_and_a_reader_is_no_writer() {
        let (pipe, path) = pipe_and_path();
        let openings = Openings::of(&pipe).unwrap();
        assert!(!openings.take());
        let by = |options: &mut std::fs::OpenOptions| options.open(&path).unwrap();
        for _ in 0..3 {
            drop(by(File::options().read(true)));
            assert!(openings.take() && !pipe.has_writer());
            let writer = by(File::options().write(true));
            assert!(openings.take() && pipe.has_writer());
            assert!(!openings.take(), "told once");
            drop(writer);
            assert!(!openings.take() && !pipe.has_writer());
        }
    }

    #[test]
    fn a_writer_is_waited_for_until_it_has_written_or_cannot_any_more() {
        let (pipe, path) = pipe_and_path();
        let answered = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC).unwrap();
        let wait = |state: &mut Vec<u8>| {
            let (pipe, answered) = (&pipe, &answered);
            let mut writing = Writing { pipe, answered, state, room_bytes: 8192, spare_bytes: 3, waits_since: None };
            assert!(writing.waited().is_zero());
            let waited = writing.wait().is_ok();
            assert_eq!(writing.waits(), waited);
            writing.go_on();
            waited
        };
        let mut state = Vec::new();
        let opened = || File::options().write(true).open(&path).unwrap();
        drop(opened());
        assert!(!wait(&mut state), "it has closed the pipe");
        let mut writer = opened();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(20));
                writer.write_all(b"QEVM").unwrap();
            });
            assert!(wait(&mut state));
        });
        assert_eq!((state.as_slice(), pipe.filled().unwrap()), (&b"QEV"[..], 1));
        pipe.empty().unwrap();
        answered.write(1).unwrap();
        assert!(!wait(&mut state), "the monitor has answered");
    }
}
