//! Processes beside the agent that live on when it is stopped or killed: this executable again, with a word that says
//! what it is to be and a seqpacket socket to the agent.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use super::priority;

/// Where it finds its socket.
const SOCKET_FD: RawFd = 3;

/// Second argument of a companion that shall prefer no thread, as its agent does not.
const USUAL_PRIORITY: &str = "usual-priority";

/// Starts `command` with `word` as its first argument. Returns the agent's end of the socket.
pub fn start(mut command: Command, word: &str) -> io::Result<(OwnedFd, Child)> {
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
    let theirs_raw = theirs.as_raw_fd();
    // A group of its own: Ctrl-C in a terminal reaches the agent first, which then ends it in order.
    command.arg(word).args((!priority::is_allowed()).then_some(USUAL_PRIORITY)).process_group(0);
    // SAFETY: only async-signal-safe calls between fork and exec.
    unsafe {
        command.pre_exec(move || {
            let result = match theirs_raw == SOCKET_FD {
                true => libc::fcntl(SOCKET_FD, libc::F_SETFD, 0),
                false => libc::dup2(theirs_raw, SOCKET_FD),
            };
            if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
        });
    }
    let child = command.spawn()?;
    Ok((ours, child))
}

/// In such a process, once: its end of the socket; `name` is what `ps` shows.
pub fn socket(name: &CStr) -> OwnedFd {
    // SAFETY: the agent passed its socket as this descriptor; nothing else in this process uses it.
    let socket = unsafe { OwnedFd::from_raw_fd(SOCKET_FD) };
    // SAFETY: prctl with an integer and a string that outlives the call.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
    let _ = fcntl(&socket, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC));
    if std::env::args_os().nth(2).is_some_and(|word| word == USUAL_PRIORITY) {
        priority::forbid();
    }
    socket
}
