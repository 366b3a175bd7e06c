//! Frames on their way to a guest: seen where the host hands them to the guest's tap, and handed to another one.
//!
//! Packet sockets see them as they pass; nothing is in their way, and whatever goes wrong here is of no matter to the guest.
//! Each frame is kept with the header in front of it by which the kernel tells what a sender left undone (checksums,
//! segments): [`HEADER_BYTES`], then the frame.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Domain, SockFilter, Socket, Type};
use vmsync::inbound::{MAX_FRAME_BYTES, MAX_SENT_BYTES, MAX_SENT_FRAMES};

use super::{link_address, parse_mac};
use crate::capture::priority::Brisk;

/// `struct virtio_net_hdr`.
const HEADER_BYTES: usize = 10;
const ETHERNET_BYTES: usize = 14;
const IPV4: u16 = libc::ETH_P_IP as u16;
const IPV6: u16 = libc::ETH_P_IPV6 as u16;
/// For frames that nobody has read yet.
const SOCKET_BYTES: usize = 256 << 10;
/// Read and not taken by whoever is told of them; more are not sent.
const WAITING_BYTES: usize = MAX_SENT_BYTES as usize;
const FRAMES_AT_ONCE: usize = 64;
/// Between two looks: frames that come together are told of together.
const PAUSE: Duration = Duration::from_micros(300);
const STOP_WITHIN_MS: u16 = 100;

/// Watches the taps of one guest. Dropped, it ends.
pub struct Capture {
    stop: Arc<AtomicBool>,
    seen: Seen,
}

/// Frames that nobody has taken yet.
#[derive(Debug, Clone, Default)]
struct Seen(Arc<Mutex<Vec<Vec<u8>>>>);

impl Seen {
    fn lock(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Adds what there is room for; true: there were none.
    fn add(&self, frames: Vec<Vec<u8>>) -> bool {
        let mut seen = self.lock();
        let were_none = seen.is_empty();
        let room = MAX_SENT_FRAMES.saturating_sub(seen.len());
        let mut bytes: usize = seen.iter().map(Vec::len).sum();
        seen.extend(frames.into_iter().take(room).take_while(|frame| {
            bytes += frame.len();
            bytes <= WAITING_BYTES
        }));
        were_none && !seen.is_empty()
    }

    fn take(&self) -> Vec<Vec<u8>> {
        std::mem::take(&mut *self.lock())
    }
}

impl Capture {
    /// `nics`: address of the guest's side, and the host's device. Devices that are no taps are left out. `tell` is called on
    /// a thread of its own when there are frames to be taken, and not again before they are: whoever is told has other
    /// things to do.
    pub fn start<'a>(
        nics: impl Iterator<Item = (&'a str, &'a str)>,
        tell: impl Fn() + Send + 'static,
    ) -> io::Result<Self> {
        let taps = nics.filter(|(_, device)| is_tap(device));
        let sockets = taps.map(|(mac, device)| listen(mac, device)).collect::<io::Result<Vec<_>>>()?;
        let (stop, seen) = (Arc::new(AtomicBool::new(false)), Seen::default());
        let capture = Self { stop: Arc::clone(&stop), seen: seen.clone() };
        if !sockets.is_empty() {
            let run = move || watch(sockets, &stop, &seen, &tell);
            std::thread::Builder::new().name("inbound".into()).spawn(run)?;
        }
        Ok(capture)
    }

    /// The frames that came since, in their order.
    pub fn take(&self) -> Vec<Vec<u8>> {
        self.seen.take()
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Of other devices what is sent there leaves to the network, and what comes for the guest is not seen.
fn is_tap(device: &str) -> bool {
    !device.contains('/') && Path::new("/sys/class/net").join(device).join("tun_flags").exists()
}

fn watch(mut sockets: Vec<Socket>, stop: &AtomicBool, seen: &Seen, tell: &impl Fn()) {
    let mut buffer = vec![0; MAX_FRAME_BYTES];
    // A frame that is told of after the host's end is lost.
    let mut brisk = Brisk::this_thread();
    while !sockets.is_empty() && !stop.load(Ordering::Relaxed) {
        brisk.look(true);
        let mut polled: Vec<PollFd<'_>> =
            sockets.iter().map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN)).collect();
        match poll(&mut polled, PollTimeout::from(STOP_WITHIN_MS)) {
            Ok(0) | Err(nix::errno::Errno::EINTR) => continue,
            Ok(_) => {}
            Err(error) => return tracing::warn!(%error, "frames for a guest are no longer seen"),
        }
        let mut frames = Vec::new();
        sockets.retain(|socket| match read_some(socket, &mut buffer, &mut frames) {
            Ok(()) => true,
            Err(error) => {
                // As when it was unplugged.
                tracing::info!(%error, "frames for an interface are no longer seen");
                false
            }
        });
        if seen.add(frames) {
            tell();
        }
        std::thread::sleep(PAUSE);
    }
}

fn read_some(mut socket: &Socket, buffer: &mut [u8], frames: &mut Vec<Vec<u8>>) -> io::Result<()> {
    for _ in 0..FRAMES_AT_ONCE {
        match socket.read(buffer) {
            Ok(len) if len >= HEADER_BYTES + ETHERNET_BYTES => frames.push(buffer[..len].to_vec()),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            // One that the header cannot tell of.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EINTR)) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn packet_socket() -> io::Result<Socket> {
    let socket = Socket::new(Domain::PACKET, Type::RAW, None)?;
    let on: libc::c_int = 1;
    // SAFETY: the option's value is a live int, and its length is said.
    let outcome = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_VNET_HDR,
            (&raw const on).cast(),
            size_of_val(&on) as libc::socklen_t,
        )
    };
    if outcome == 0 { Ok(socket) } else { Err(io::Error::last_os_error()) }
}

/// A socket that sees TCP and UDP for that address.
fn listen(mac: &str, device: &str) -> io::Result<Socket> {
    let mac = parse_mac(mac).ok_or(io::ErrorKind::InvalidInput)?;
    let socket = packet_socket()?;
    // Before it is bound nothing comes.
    socket.attach_filter(&filter(mac))?;
    let _ = socket.set_recv_buffer_size(SOCKET_BYTES);
    socket.set_nonblocking(true)?;
    socket.bind(&link_address(device, libc::ETH_P_ALL as u16)?)?;
    Ok(socket)
}

/// What passes to the guest, for this address only, TCP and UDP over IP, without a VLAN's tag (which would be lost), and not
/// longer than is kept.
fn filter([a, b, c, d, e, f]: [u8; 6]) -> [SockFilter; 20] {
    // Classic BPF: load word, half, byte at an offset; load length; jump if equal, if greater, always; return.
    let [ldw, ldh, ldb, length, jeq, jgt, ja, ret]: [u16; 8] = [0x20, 0x28, 0x30, 0x80, 0x15, 0x25, 0x05, 0x06];
    // What the kernel tells of a packet, from there on: its direction, whether it has a tag.
    const ABOUT: u32 = -0x1000i32 as u32;
    const TO_DEVICE: u32 = 4;
    let op = SockFilter::new;
    let (high, low) = (u32::from_be_bytes([a, b, c, d]), u32::from(u16::from_be_bytes([e, f])));
    [
        op(ldw, 0, 0, ABOUT + 4),
        op(jeq, 0, 16, TO_DEVICE),
        op(ldw, 0, 0, ABOUT + 48),
        op(jeq, 0, 14, 0),
        op(length, 0, 0, 0),
        op(jgt, 12, 0, (MAX_FRAME_BYTES - HEADER_BYTES) as u32),
        op(ldw, 0, 0, 0),
        op(jeq, 0, 10, high),
        op(ldh, 0, 0, 4),
        op(jeq, 0, 8, low),
        op(ldh, 0, 0, 12),
        op(jeq, 0, 2, IPV4.into()),
        op(ldb, 0, 0, 23),
        op(ja, 0, 0, 2),
        op(jeq, 0, 3, IPV6.into()),
        op(ldb, 0, 0, 20),
        op(jeq, 2, 0, libc::IPPROTO_TCP as u32),
        op(jeq, 1, 0, libc::IPPROTO_UDP as u32),
        op(ret, 0, 0, 0),
        op(ret, 0, 0, u32::MAX),
    ]
}

/// What became of frames that were to be replayed.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    pub replayed: usize,
    /// Why others were not, the first of them.
    pub problem: Option<String>,
}

/// Hands frames to the guest whose taps these are, in order; `nics` as for [`Capture::start`].
pub fn replay<'a>(nics: impl Iterator<Item = (&'a str, &'a str)>, frames: &[Vec<u8>]) -> Outcome {
    let mut outcome = Outcome::default();
    let socket = match packet_socket() {
        Ok(socket) => socket,
        Err(error) => return Outcome { problem: Some(error.to_string()), ..outcome },
    };
    let taps: BTreeMap<[u8; 6], &str> = nics
        .filter(|(_, device)| is_tap(device))
        .filter_map(|(mac, device)| parse_mac(mac).map(|mac| (mac, device)))
        .collect();
    for frame in frames {
        match send(&socket, &taps, frame) {
            Ok(()) => outcome.replayed += 1,
            Err(error) => drop(outcome.problem.get_or_insert(error.to_string())),
        }
    }
    outcome
}

fn send(socket: &Socket, taps: &BTreeMap<[u8; 6], &str>, frame: &[u8]) -> io::Result<()> {
    let (to, protocol) = addressed(frame).ok_or_else(|| io::Error::other("it is no frame of IP"))?;
    let device = taps.get(&to).ok_or_else(|| io::Error::other("no tap of the guest has its address"))?;
    socket.send_to(frame, &link_address(device, protocol)?).map(drop)
}

/// Whom it is for, and its EtherType.
fn addressed(frame: &[u8]) -> Option<([u8; 6], u16)> {
    let ethernet = frame.get(HEADER_BYTES..HEADER_BYTES + ETHERNET_BYTES)?;
    let to = ethernet[..6].try_into().ok()?;
    let protocol = u16::from_be_bytes([ethernet[12], ethernet[13]]);
    matches!(protocol, IPV4 | IPV6).then_some((to, protocol))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_frames_for_the_guests_own_taps_are_sent() {
        let mut frame = vec![0; HEADER_BYTES + 60];
        frame[HEADER_BYTES..HEADER_BYTES + 6].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
        assert_eq!(addressed(&frame), None);
        frame[HEADER_BYTES + 12] = 8;
        assert_eq!(addressed(&frame), Some(([2, 0, 0, 0, 0, 1], IPV4)));
        (0..HEADER_BYTES + ETHERNET_BYTES).for_each(|len| assert_eq!(addressed(&frame[..len]), None));
        assert!(!is_tap("lo") && !is_tap("no-such-device") && !is_tap("../net/lo"));
        assert_eq!(replay([("02:00:00:00:00:01", "lo")].into_iter(), &[frame]).replayed, 0);
    }
}
