//! What kind of frame the guest sends, told from its headers alone.

const VLAN_TAGS: [u16; 2] = [0x8100, 0x88a8];
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const TCP: u8 = 6;
const TCP_BYTES: usize = 20;
/// FIN, SYN, RST, ACK.
const FLAGS_THAT_MATTER: u8 = 0b1_0111;
const ACK: u8 = 0b1_0000;

/// Whether an Ethernet frame is a TCP segment that brings nothing but an acknowledgement: the guest receives, and the
/// sender waits for this to send more. Of what is not understood (fragments, extension headers, cut short) it is not said.
pub fn is_bare_ack(frame: &[u8]) -> bool {
    bare_ack(frame).unwrap_or(false)
}

fn bare_ack(frame: &[u8]) -> Option<bool> {
    let mut rest = frame.get(12..)?;
    for _ in 0..VLAN_TAGS.len() {
        if VLAN_TAGS.contains(&be16(rest, 0)?) {
            rest = &rest[4..];
        }
    }
    let (kind, packet) = (be16(rest, 0)?, rest.get(2..)?);
    let (tcp, tcp_bytes) = match kind {
        IPV4 => {
            let header_bytes = usize::from(packet.first()? & 0xf) * 4;
            // More fragments, or an offset.
            let whole = be16(packet, 6)? & 0x3fff == 0;
            if !whole || *packet.get(9)? != TCP || header_bytes < 20 {
                return None;
            }
            (packet.get(header_bytes..)?, usize::from(be16(packet, 2)?).checked_sub(header_bytes)?)
        }
        IPV6 if *packet.get(6)? == TCP => (packet.get(40..)?, usize::from(be16(packet, 4)?)),
        _ => return None,
    };
    let header_bytes = usize::from(*tcp.get(12)? >> 4) * 4;
    let flags = tcp.get(13)? & FLAGS_THAT_MATTER;
    Some(header_bytes >= TCP_BYTES && tcp_bytes == header_bytes && flags == ACK)
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2).and_then(|two| Some(u16::from_be_bytes(two.try_into().ok()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ethernet, tags, IP, TCP with timestamps, payload; padded as a network card may.
    fn segment(tags: usize, ip: u16, flags: u8, payload: usize) -> Vec<u8> {
        let mut frame = vec![2; 12];
        (0..tags).for_each(|tag| frame.extend([[0x81, 0, 0, 7], [0x88, 0xa8, 0, 9]][tag]));
        frame.extend(ip.to_be_bytes());
        let tcp_bytes = (32 + payload) as u16;
        if ip == IPV4 {
            frame.extend([0x46, 0]);
            frame.extend((24 + tcp_bytes).to_be_bytes());
            frame.extend([0, 1, 0x40, 0, 64, TCP]);
            frame.resize(frame.len() + 14, 0);
        } else {
            frame.extend([0x60, 0, 0, 0]);
            frame.extend(tcp_bytes.to_be_bytes());
            frame.extend([TCP, 64]);
            frame.resize(frame.len() + 32, 0);
        }
        frame.resize(frame.len() + 12, 0);
        frame.extend([8 << 4, flags]);
        frame.resize(frame.len() + 18 + payload, 0);
        frame.resize(frame.len() + 6, 0);
        frame
    }

    #[test]
    fn acknowledgements_without_payload_are_told_from_all_else() {
        for ip in [IPV4, IPV6] {
            for tags in 0..3 {
                assert!(is_bare_ack(&segment(tags, ip, ACK, 0)), "{ip:x}, {tags} tags");
                assert!(!is_bare_ack(&segment(tags, ip, ACK, 1)));
                assert!(!is_bare_ack(&segment(tags, ip, ACK | 0b1000, 1_448)));
            }
            for other in [ACK | 1, ACK | 2, ACK | 4, 2, 4, 0] {
                assert!(!is_bare_ack(&segment(0, ip, other, 0)), "flags {other:b}");
            }
        }
    }

    #[test]
    fn of_what_is_cut_short_or_strange_nothing_is_said() {
        let whole = segment(0, IPV4, ACK, 0);
        (0..14 + 24 + 14).for_each(|len| assert!(!is_bare_ack(&whole[..len]), "{len} bytes"));
        let changed = |at: usize, byte: u8| {
            let mut frame = whole.clone();
            frame[at] = byte;
            is_bare_ack(&frame)
        };
        assert!(!changed(13, 6), "ARP");
        assert!(!changed(14 + 9, 17), "UDP");
        assert!(!changed(14 + 6, 0x20) && !changed(14 + 7, 1), "fragments");
        assert!(!changed(14, 0x40) && !changed(14 + 24 + 12, 0x40), "headers shorter than they can be");
        // Nothing panics.
        for at in 0..whole.len() {
            (0..=255).for_each(|byte| {
                changed(at, byte);
            });
        }
    }
}
