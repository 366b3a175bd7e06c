//! What agent and gate say to each other, and the streams of frames.
//!
//! Orders and news are JSON, one a message of a seqpacket socket; both ends are the same program. Frames go as QEMU's
//! filter-redirector has them: be32 length, be32 length of the vnet header, then so many bytes of header and packet. A
//! length of 0 is a mark, which the agent writes into the capture stream itself: its number stands for the second.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde::{Deserialize, Serialize};
use vmsync::output::Mark;

const HEAD_BYTES: usize = 8;
/// The largest that QEMU takes, and some room: NET_BUFSIZE, 4096 + 65536.
const MAX_FRAME_BYTES: usize = 72 << 10;
const MAX_MESSAGE_BYTES: usize = 4096;
/// Descriptors that come with a message.
const MAX_FDS: usize = 2;

/// What the agent tells the gate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// One more NIC; its capture and release sockets come with it. `after`: the last mark before it.
    Nic {
        after: u32,
    },
    Set(Setting),
    Hold,
    Open,
    Release(u32),
    /// Answered with [`Word::Here`].
    Ping(u64),
    /// Let everything go, and end when it has gone. Nothing more will come.
    End,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setting {
    /// No frame is held longer; none: frames wait for their release, whatever happens.
    pub age_ms: Option<u64>,
}

/// What the gate tells the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Word {
    /// Output waits that came after that mark.
    Waits(u32),
    /// It opened by itself: a frame was too old, or (`unheard`) the agent had said nothing for too long.
    Opened {
        unheard: bool,
    },
    Here(u64),
    Figures(Figures),
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Figures {
    pub held_frames: u64,
    pub held_bytes: u64,
    pub released_total: u64,
    /// Of these, all but bare acknowledgements.
    pub data_total: u64,
    pub dropped_total: u64,
    /// Microseconds: p50, p99, max of the newest frames.
    pub hold_us: [u64; 3],
}

pub fn send<T: Serialize>(socket: BorrowedFd<'_>, message: &T, fds: &[RawFd]) -> io::Result<()> {
    let text = serde_json::to_vec(message).map_err(io::Error::other)?;
    let rights = [ControlMessage::ScmRights(fds)];
    let control = if fds.is_empty() { &[][..] } else { &rights[..] };
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    sendmsg::<()>(socket.as_raw_fd(), &[io::IoSlice::new(&text)], control, flags, None)?;
    Ok(())
}

/// The next message, if there is one. `UnexpectedEof`: the other side is gone.
pub fn receive<T: for<'a> Deserialize<'a>>(socket: BorrowedFd<'_>) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let mut bytes = [0u8; MAX_MESSAGE_BYTES];
    let mut control = nix::cmsg_space!([RawFd; MAX_FDS]);
    let mut fds = Vec::new();
    let length = {
        let mut parts = [io::IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
        let received = match recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags) {
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => return Ok(None),
            received => received?,
        };
        for message in received.cmsgs().map_err(io::Error::from)? {
            if let ControlMessageOwned::ScmRights(raw) = message {
                // SAFETY: the kernel has just made these descriptors for us; nobody else owns them.
                fds.extend(raw.into_iter().map(|raw| unsafe { OwnedFd::from_raw_fd(raw) }));
            }
        }
        received.bytes
    };
    match length {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        length => Ok(Some((serde_json::from_slice(&bytes[..length]).map_err(io::Error::other)?, fds))),
    }
}

/// Bytes of a mark in the capture stream.
pub fn mark_bytes(mark: Mark) -> [u8; HEAD_BYTES] {
    (u64::from(mark.get())).to_be_bytes()
}

/// What stands in a capture stream.
#[derive(Debug, PartialEq, Eq)]
pub enum Item {
    /// With its head, as it goes into the release stream.
    Frame(Box<[u8]>),
    Mark(Mark),
}

/// Takes a capture stream apart, whatever the pieces it comes in.
#[derive(Default)]
pub struct Splitter {
    /// The beginning of an item whose rest has not come.
    rest: Vec<u8>,
}

#[derive(Debug, thiserror::Error)]
#[error("a frame of {0} bytes in the capture stream")]
pub struct BadFrame(usize);

impl Splitter {
    /// Hands every item that `bytes` completes to `take`.
    pub fn feed(&mut self, mut bytes: &[u8], mut take: impl FnMut(Item)) -> Result<(), BadFrame> {
        while !self.rest.is_empty() && !bytes.is_empty() {
            let wanted = if self.rest.len() < HEAD_BYTES { HEAD_BYTES } else { whole_bytes(&self.rest)? };
            let (now, later) = bytes.split_at(bytes.len().min(wanted - self.rest.len()));
            self.rest.extend_from_slice(now);
            bytes = later;
            if self.rest.len() >= HEAD_BYTES && self.rest.len() == whole_bytes(&self.rest)? {
                take(item(&self.rest));
                self.rest.clear();
            }
        }
        while bytes.len() >= HEAD_BYTES {
            let whole = whole_bytes(bytes)?;
            if bytes.len() < whole {
                break;
            }
            take(item(&bytes[..whole]));
            bytes = &bytes[whole..];
        }
        self.rest.extend_from_slice(bytes);
        Ok(())
    }
}

/// The Ethernet frame in a [`Item::Frame`].
pub fn ethernet(frame: &[u8]) -> &[u8] {
    let header_bytes = frame.get(4..HEAD_BYTES).map_or(0, be32) as usize;
    frame.get(HEAD_BYTES + header_bytes..).unwrap_or_default()
}

fn be32(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0, |value, byte| value << 8 | u32::from(*byte))
}

/// Length of the item that begins with this head.
fn whole_bytes(head: &[u8]) -> Result<usize, BadFrame> {
    let bytes = be32(&head[..4]) as usize;
    if bytes <= MAX_FRAME_BYTES { Ok(HEAD_BYTES + bytes) } else { Err(BadFrame(bytes)) }
}

fn item(bytes: &[u8]) -> Item {
    match bytes.len() {
        HEAD_BYTES => Item::Mark(Mark::new(be32(&bytes[4..]))),
        _ => Item::Frame(bytes.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_taken_apart_in_whatever_pieces_it_comes() {
        let frame = |fill: u8, bytes: usize| {
            let mut frame = vec![0, 0, (bytes >> 8) as u8, bytes as u8, 0, 0, 0, 12];
            frame.resize(8 + bytes, fill);
            frame
        };
        let stream = [&frame(1, 60)[..], &mark_bytes(Mark::new(7)), &frame(2, 1), &frame(3, 1514)].concat();
        let expected = [
            Item::Frame(frame(1, 60).into()),
            Item::Mark(Mark::new(7)),
            Item::Frame(frame(2, 1).into()),
            Item::Frame(frame(3, 1514).into()),
        ];
        for piece in (1..80).chain([stream.len()]) {
            let (mut splitter, mut items) = (Splitter::default(), Vec::new());
            stream.chunks(piece).for_each(|bytes| splitter.feed(bytes, |item| items.push(item)).unwrap());
            assert_eq!(items, expected, "in pieces of {piece}");
        }
        assert_eq!(ethernet(&frame(3, 60)), [3; 48]);
        assert_eq!(ethernet(&frame(3, 11)), [] as [u8; 0], "a header that is longer than all of it");
        assert_eq!(ethernet(&[0xff; 8]), [] as [u8; 0]);
        assert!(Splitter::default().feed(&[0xff; 8], drop).is_err());
        let mut splitter = Splitter::default();
        splitter.feed(&[0xff; 3], drop).unwrap();
        assert!(splitter.feed(&[0xff; 9], drop).is_err());
    }
}
