//! Frames on devices of this host: sent, and those on their way to a guest seen.

mod inbound;
#[cfg(test)]
mod taps;

use std::io;

use nix::net::if_::if_nametoindex;
use socket2::SockAddr;

pub use inbound::{Capture, Outcome, replay};

/// A device as the other end of a packet socket; the frames hold their own addresses. `protocol`: an EtherType.
pub fn link_address(device: &str, protocol: u16) -> io::Result<SockAddr> {
    let index = i32::try_from(if_nametoindex(device)?).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    // SAFETY: the storage that `try_init` provides is larger than and aligned for any socket address; a whole
    // sockaddr_ll is written to it and its length returned.
    let ((), address) = unsafe {
        SockAddr::try_init(|storage, len| {
            storage.cast::<libc::sockaddr_ll>().write(libc::sockaddr_ll {
                sll_family: libc::AF_PACKET as u16,
                sll_protocol: protocol.to_be(),
                sll_ifindex: index,
                sll_hatype: 0,
                sll_pkttype: 0,
                sll_halen: 6,
                sll_addr: [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0],
            });
            *len = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
            Ok(())
        })
    }?;
    Ok(address)
}

pub fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|part| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit()))?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    parts.next().is_none().then_some(mac)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_checked() {
        assert_eq!(parse_mac("52:54:00:aa:00:02"), Some([0x52, 0x54, 0, 0xaa, 0, 2]));
        for bad in
            ["", "52:54:00:aa:00", "52:54:00:aa:00:02:03", "52:54:00:aa:00:0g", "5:54:00:aa:00:02", "+1:00:00:00:00:00"]
        {
            assert_eq!(parse_mac(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_missing_device_is_an_error() {
        assert!(link_address("no-such-device", 0x8035).is_err());
    }
}
