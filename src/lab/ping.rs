//! ICMP echo from a node of the lab: what ping(8) does, in microseconds and without a program.

use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, recv, sendto, setsockopt, socket, sockopt,
};

use super::error::{LabError, Result};
use super::namespace;

const ECHO_REQUEST: u8 = 8;
const ECHO_REPLY: u8 = 0;
const HEAD_BYTES: usize = 8;
/// As ping sends.
const PACKET_BYTES: usize = HEAD_BYTES + 56;
/// IPv4 head without options, which a raw socket hands over.
const IP_HEAD_BYTES: usize = 20;

/// Pings one address, one echo at a time.
pub struct Ping {
    socket: OwnedFd,
    to: Ipv4Addr,
    id: u16,
    sequence: u16,
}

impl Ping {
    /// From inside a network namespace; the socket works in any thread.
    pub fn in_namespace(netns: &Path, to: Ipv4Addr) -> Result<Self> {
        let make = || socket(AddressFamily::Inet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Icmp);
        let socket = namespace::enter(netns, make)?.map_err(LabError::system("make an ICMP socket"))?;
        Ok(Self { socket, to, id: std::process::id() as u16, sequence: 0 })
    }

    /// One echo; none: no answer in time.
    pub fn echo(&mut self, within: Duration) -> Result<Option<Duration>> {
        self.sequence = self.sequence.wrapping_add(1);
        let packet = request(self.id, self.sequence);
        let began = Instant::now();
        let to = SockaddrIn::from(std::net::SocketAddrV4::new(self.to, 0));
        sendto(self.socket.as_raw_fd(), &packet, &to, MsgFlags::empty()).map_err(LabError::system("send an echo"))?;
        let mut buffer = [0u8; 1500];
        loop {
            let Some(left) = within.checked_sub(began.elapsed()).filter(|left| !left.is_zero()) else {
                return Ok(None);
            };
            let wait = nix::sys::time::TimeVal::new(left.as_secs() as _, left.subsec_micros().max(1) as _);
            setsockopt(&self.socket, sockopt::ReceiveTimeout, &wait).map_err(LabError::system("set a time limit"))?;
            match recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Ok(length) if is_reply(&buffer[..length], self.id, self.sequence) => return Ok(Some(began.elapsed())),
                Ok(_) | Err(nix::Error::EAGAIN | nix::Error::EINTR) => {}
                Err(error) => return Err(LabError::system("receive an echo")(error)),
            }
        }
    }
}

fn request(id: u16, sequence: u16) -> [u8; PACKET_BYTES] {
    let mut packet = [0u8; PACKET_BYTES];
    packet[0] = ECHO_REQUEST;
    packet[4..6].copy_from_slice(&id.to_be_bytes());
    packet[6..8].copy_from_slice(&sequence.to_be_bytes());
    let mut sum: u32 = packet.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    packet[2..4].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    packet
}

fn is_reply(packet: &[u8], id: u16, sequence: u16) -> bool {
    let Some(icmp) = packet.get(IP_HEAD_BYTES..).filter(|icmp| icmp.len() >= HEAD_BYTES) else { return false };
    icmp[0] == ECHO_REPLY && icmp[4..6] == id.to_be_bytes() && icmp[6..8] == sequence.to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_add_up_and_replies_are_told_from_others() {
        let packet = request(0x1234, 7);
        let sum: u32 = packet.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
        assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff);
        let mut reply = [&[0u8; IP_HEAD_BYTES][..], &packet].concat();
        assert!(!is_reply(&reply, 0x1234, 7), "our own request");
        reply[IP_HEAD_BYTES] = ECHO_REPLY;
        assert!(is_reply(&reply, 0x1234, 7) && !is_reply(&reply, 0x1234, 8) && !is_reply(&reply[..27], 0x1234, 7));
    }
}
