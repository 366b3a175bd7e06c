//! The socket through which a waiting shadow gets its device state.
//!
//! ```text
//! agent: our end ──stream, then SHUT_WR──> QEMU: read end, given to `migrate-incoming fd:` when the shadow is armed
//!            `── a copy of our end stays in QEMU (`getfd`)
//! ```
//! Armed means: QEMU reads the socket already and will start the guest by itself when the state is loaded, so no
//! monitor command is left to do when it counts. The copy of our end in QEMU keeps the socket open when this agent
//! dies; without it QEMU would see an end of the stream, and one QEMU can take one stream only. A restarted agent
//! takes its end back from there.

use std::fs;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde_json::json;

use crate::hypervisor::process::{QemuProcess, pidfd_open};
use crate::hypervisor::{Domain, HypervisorError};

/// Names under which QEMU's monitor keeps the two descriptors.
const READ_END: &str = "virt-shadow-in";
const KEPT_END: &str = "virt-shadow-keep";
/// A QEMU that takes nothing for this long will not take the rest either.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);
/// First bytes of what QEMU saves: magic `QEVM`, version 3.
const STREAM_HEAD: [u8; 8] = *b"QEVM\0\0\0\x03";
/// QEMU's mark of the configuration section.
const CONFIGURATION: u8 = 7;
/// An empty description of the state (mark, be32 length): what QEMU waits for, or for an end of the file, once it has
/// read all devices. With it the stream is complete by itself, so that one write hands over all of it or nothing.
const NO_DESCRIPTION: [u8; 5] = [6, 0, 0, 0, 0];

#[derive(Debug)]
pub(super) struct Feed {
    socket: UnixStream,
    inode: u64,
}

impl Feed {
    /// Arms the waiting shadow. It starts the guest when loaded, unless [`disarm_start`] is called.
    pub(super) fn arm(domain: &Domain) -> Result<Self, FeedError> {
        let (ours, theirs) = UnixStream::pair().map_err(system("make a socket pair"))?;
        let feed = Self::new(ours)?;
        give(domain, READ_END, theirs.as_fd())?;
        give(domain, KEPT_END, feed.socket.as_fd())?;
        let uri = format!("fd:{READ_END}");
        // QEMU 9.1 and newer can be told not to exit when a load fails; then the reason can be asked for.
        let wished = json!({"uri": uri, "exit-on-error": false});
        match domain.qmp_call("migrate-incoming", wished) {
            Err(HypervisorError::Monitor { desc, .. }) if desc.contains("exit-on-error") => {
                domain.qmp_call("migrate-incoming", json!({"uri": uri}))?;
            }
            other => drop(other?),
        }
        arm_start(domain)?;
        Ok(feed)
    }

    /// Takes our end of an armed socket back from QEMU.
    pub(super) fn retake(process: QemuProcess, inode: u64) -> Result<Self, FeedError> {
        let wanted = format!("socket:[{inode}]");
        let folder = format!("/proc/{}/fd", process.pid);
        for entry in fs::read_dir(folder).map_err(system("read QEMU's list of descriptors"))?.flatten() {
            let is_it = fs::read_link(entry.path()).is_ok_and(|link| link.as_os_str() == wanted.as_str());
            let number = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok());
            if let (true, Some(number)) = (is_it, number) {
                let fd = take_descriptor(process.pid, number).map_err(system("take a descriptor from QEMU"))?;
                return Self::new(UnixStream::from(fd));
            }
        }
        Err(FeedError::Gone)
    }

    fn new(socket: UnixStream) -> Result<Self, FeedError> {
        // CLOEXEC is set by the standard library and by pidfd_getfd alike.
        socket.set_write_timeout(Some(WRITE_TIMEOUT)).map_err(system("set a time limit"))?;
        let fd = socket.as_fd().try_clone_to_owned().map_err(system("look at the socket"))?;
        let inode = fs::File::from(fd).metadata().map_err(system("look at the socket"))?.ino();
        Ok(Self { socket, inode })
    }

    pub(super) fn inode(&self) -> u64 {
        self.inode
    }

    /// Writes the whole stream and closes it for QEMU, whoever else holds a copy of this end.
    pub(super) fn send(mut self, stream: &[u8]) -> io::Result<()> {
        enlarge_buffer(&self.socket, stream.len());
        self.socket.write_all(stream)?;
        self.socket.shutdown(Shutdown::Write)
    }
}

#[derive(Debug, thiserror::Error)]
pub(super) enum FeedError {
    #[error(transparent)]
    Hypervisor(#[from] HypervisorError),
    #[error("cannot {0}: {1}")]
    System(&'static str, io::Error),
    #[error("QEMU no longer holds the socket")]
    Gone,
}

fn system(action: &'static str) -> impl Fn(io::Error) -> FeedError {
    move |error| FeedError::System(action, error)
}

/// Makes the load start the guest. Before the load `cont` starts nothing, it only sets what comes after.
pub(super) fn arm_start(domain: &Domain) -> Result<(), HypervisorError> {
    domain.qmp_call("cont", serde_json::Value::Null).map(drop)
}

/// Makes the load leave the guest paused.
pub(super) fn disarm_start(domain: &Domain) -> Result<(), HypervisorError> {
    domain.qmp_call("stop", serde_json::Value::Null).map(drop)
}

/// Has QEMU forget the copy of our end; of no matter if that fails.
pub(super) fn forget_kept_end(domain: &Domain) {
    if let Err(error) = domain.qmp_call("closefd", json!({"fdname": KEPT_END})) {
        tracing::debug!(domain = domain.name(), %error, "QEMU keeps an unused socket");
    }
}

fn give(domain: &Domain, name: &str, fd: BorrowedFd<'_>) -> Result<(), HypervisorError> {
    let command = json!({"execute": "getfd", "arguments": {"fdname": name}}).to_string();
    domain.qmp_with_files(&command, &[fd]).map(drop)
}

/// Name of the machine type as QEMU resolved it, which an incoming stream must name.
pub(super) fn machine_type(domain: &Domain) -> Result<String, HypervisorError> {
    let reply = domain.qmp_call("qom-get", json!({"path": "/machine", "property": "type"}))?;
    let name = reply.as_str().and_then(|name| name.strip_suffix("-machine"));
    name.map(str::to_owned).ok_or_else(|| HypervisorError::MonitorReply {
        domain: domain.name().to_owned(),
        command: "qom-get".to_owned(),
        reason: format!("the machine's type is {reply}"),
    })
}

/// Makes an incoming stream of what `xen-save-devices-state` wrote: the same with the name of the machine type after
/// its head (one byte 07, length as be32, name), and [`NO_DESCRIPTION`] at its end.
pub(super) fn incoming_stream(saved: &[u8], machine: &str) -> Result<Vec<u8>, String> {
    let Some((head, rest)) = saved.split_first_chunk::<8>() else {
        return Err(format!("it has {} bytes only", saved.len()));
    };
    if *head != STREAM_HEAD {
        return Err(format!("it begins with {head:02x?} and not with QEMU's mark and version 3"));
    }
    let length = u32::try_from(machine.len()).map_err(|_| "the machine type's name is too long".to_owned())?;
    let mut stream = Vec::with_capacity(saved.len() + 5 + machine.len() + NO_DESCRIPTION.len());
    stream.extend_from_slice(head);
    // A QEMU that writes the section itself needs no second one.
    if rest.first() != Some(&CONFIGURATION) {
        stream.push(CONFIGURATION);
        stream.extend_from_slice(&length.to_be_bytes());
        stream.extend_from_slice(machine.as_bytes());
    }
    stream.extend_from_slice(rest);
    stream.extend_from_slice(&NO_DESCRIPTION);
    Ok(stream)
}

/// Lets the whole stream fit into the socket, so that writing does not wait for QEMU's reading.
fn enlarge_buffer(socket: &UnixStream, len: usize) {
    // The kernel counts its own bookkeeping in.
    let size = len.saturating_mul(2).max(1 << 18);
    if nix::sys::socket::setsockopt(socket, nix::sys::socket::sockopt::SndBufForce, &size).is_err() {
        // Without CAP_NET_ADMIN: as much as the system allows.
        let _ = socket2::SockRef::from(socket).set_send_buffer_size(size);
    }
}

/// A copy of another process's descriptor (pidfd_getfd).
fn take_descriptor(pid: i32, fd: i32) -> io::Result<OwnedFd> {
    let pidfd = pidfd_open(pid, 0)?;
    // SAFETY: plain system call without pointers; the result is checked.
    let taken = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) };
    match i32::try_from(taken) {
        // SAFETY: the kernel just returned this descriptor and nobody else knows it.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn the_machine_type_follows_the_head() {
        let mut saved = STREAM_HEAD.to_vec();
        saved.extend_from_slice(b"\x04rest");
        let stream = incoming_stream(&saved, "pc-q35-10.0").unwrap();
        assert_eq!(stream, b"QEVM\0\0\0\x03\x07\0\0\0\x0bpc-q35-10.0\x04rest\x06\0\0\0\0");
        let head_is_there = incoming_stream(&stream, "pc-q35-10.0").unwrap();
        assert_eq!(head_is_there[..stream.len()], stream, "a section that is there stays alone");
        assert!(incoming_stream(b"QEVM", "x").unwrap_err().contains("4 bytes"));
        assert!(incoming_stream(b"QEVM\0\0\0\x02rest", "x").unwrap_err().contains("version 3"));
    }

    #[test]
    fn a_long_stream_does_not_wait_for_its_reader_and_ends_for_good() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let copy = ours.try_clone().unwrap();
        let feed = Feed::new(ours).unwrap();
        let stream = vec![7; 1 << 20];
        feed.send(&stream).unwrap();
        let mut received = Vec::new();
        // Ends although a copy of the other end is still open.
        theirs.read_to_end(&mut received).unwrap();
        assert_eq!(received.len(), stream.len());
        drop(copy);
    }

    #[test]
    fn our_end_can_be_taken_back() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let feed = Feed::new(ours).unwrap();
        let own = QemuProcess { pid: std::process::id() as i32, start_ticks: 0 };
        let again = Feed::retake(own, feed.inode()).unwrap();
        assert_eq!(again.inode(), feed.inode());
        drop(feed);
        again.send(b"state").unwrap();
        let mut received = String::new();
        theirs.read_to_string(&mut received).unwrap();
        assert_eq!(received, "state");
        assert!(matches!(Feed::retake(own, u64::MAX), Err(FeedError::Gone)));
    }
}
