//! Tells the network where a promoted guest is now.
//!
//! QEMU announces a guest by itself after an incoming load, through the guest's own taps; it is asked to repeat that.
//! In addition a RARP frame with the guest's address as its source is sent on the host's bridge at once, so that the
//! switches learn the new port even before QEMU's timer comes round.

use std::io;
use std::time::Instant;

use serde_json::json;
use socket2::{Domain as SocketDomain, Protocol, Socket, Type};

use crate::hypervisor::Domain;
use crate::hypervisor::xml::{Interface, InterfaceLink};
use crate::packet::{link_address, parse_mac};

const ETHERTYPE_RARP: u16 = 0x8035;
/// Shortest Ethernet frame without its checksum.
const FRAME_BYTES: usize = 60;
const BROADCAST: [u8; 6] = [0xff; 6];

/// Announces all `interfaces` of a running guest. Returns what did not work, for the log; nothing of it is fatal.
pub(super) fn announce(domain: &Domain, interfaces: &[Interface]) -> Vec<String> {
    let began = Instant::now();
    let mut problems = Vec::new();
    for interface in interfaces {
        let device = match &interface.link {
            InterfaceLink::Bridge(device) | InterfaceLink::Direct(device) => device,
            InterfaceLink::Other(_) => continue,
        };
        let sent = match parse_mac(&interface.mac) {
            Some(mac) => send_rarp(device, mac).map_err(|error| error.to_string()),
            None => Err("its address cannot be understood".into()),
        };
        if let Err(reason) = sent {
            problems.push(format!("interface {} was not announced on {device}: {reason}", interface.mac));
        }
    }
    // Milliseconds: the first repetition after `initial`, each further one `step` later, up to `max`.
    let rhythm = json!({"initial": 20, "max": 200, "rounds": 5, "step": 40});
    if let Err(error) = domain.qmp_call("announce-self", rhythm) {
        problems.push(format!("QEMU does not repeat the announcement: {error}"));
    }
    tracing::debug!(domain = domain.name(), took_us = began.elapsed().as_micros() as u64, "announced");
    problems
}

fn send_rarp(device: &str, mac: [u8; 6]) -> io::Result<()> {
    let protocol = Protocol::from(i32::from(ETHERTYPE_RARP.to_be()));
    let socket = Socket::new(SocketDomain::PACKET, Type::RAW, Some(protocol))?;
    socket.send_to(&rarp_frame(mac), &link_address(device, ETHERTYPE_RARP)?).map(drop)
}

/// "Who knows my IP address?", asked by `mac` about itself: nobody answers, every switch learns.
fn rarp_frame(mac: [u8; 6]) -> [u8; FRAME_BYTES] {
    let mut frame = [0; FRAME_BYTES];
    let mut at = 0;
    let mut put = |bytes: &[u8]| {
        frame[at..at + bytes.len()].copy_from_slice(bytes);
        at += bytes.len();
    };
    put(&BROADCAST);
    put(&mac);
    put(&ETHERTYPE_RARP.to_be_bytes());
    put(&1u16.to_be_bytes()); // Ethernet
    put(&0x0800u16.to_be_bytes()); // IPv4
    put(&[6, 4]); // lengths of the two kinds of address
    put(&3u16.to_be_bytes()); // reverse request
    put(&mac);
    put(&[0; 4]);
    put(&mac);
    put(&[0; 4]);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_frame_is_a_reverse_request_of_the_guest_about_itself() {
        let mac = parse_mac("52:54:00:aa:00:02").unwrap();
        let frame = rarp_frame(mac);
        assert_eq!(frame[..14], [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x52, 0x54, 0, 0xaa, 0, 2, 0x80, 0x35]);
        assert_eq!(frame[14..22], [0, 1, 8, 0, 6, 4, 0, 3]);
        assert_eq!((&frame[22..28], &frame[32..38]), (&mac[..], &mac[..]));
        assert!(frame[38..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn a_missing_device_is_an_error() {
        assert!(send_rarp("no-such-device", [2; 6]).is_err());
    }
}
