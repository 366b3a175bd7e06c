//! Real taps, and the kernel's own TCP as client and as guest, in namespaces of their own: what is seen of what is on its way
//! to a guest, and what a guest makes of that when it is replayed.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::poll::{PollFd, PollFlags, poll};
use nix::sched::{CloneFlags, unshare};
use vmsync::inbound::MAX_FRAME_BYTES;

use super::{Capture, Outcome, replay};

const HOST_MAC: &str = "02:00:00:00:00:01";
const GUEST_MAC: &str = "02:00:00:00:00:02";
const GUEST_MAC_BYTES: [u8; 6] = [2, 0, 0, 0, 0, 2];
/// In front of each frame, which begins with the address that it goes to.
const VNET_HEADER: usize = 10;
const HEADERS_V4: usize = VNET_HEADER + 14 + 20 + 8;
const HEADERS_V6: usize = VNET_HEADER + 14 + 40 + 8;
/// This machine may be busy.
const WITHIN: Duration = Duration::from_secs(30);

/// `struct ifreq`.
#[repr(C)]
struct Request {
    name: [u8; 16],
    flags: libc::c_short,
    rest: [u8; 22],
}

nix::ioctl_write_ptr_bad!(tun_set_interface, 0x4004_54ca, Request);
nix::ioctl_write_int_bad!(tun_set_offload, 0x4004_54d0);

/// Networks, and what `/sys` tells of them, are this thread's own from now on.
fn enter_namespace() {
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("these tests need root");
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
    mount(Some("sysfs"), "/sys", Some("sysfs"), MsFlags::empty(), none).unwrap();
}

fn ip(words: &str) {
    let output = Command::new("ip").args(words.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {words}: {output:?}");
}

/// The end of a tap that a QEMU would have. Segments and checksums are left to whoever reads it.
fn tap(device: &str, mac: &str, addresses: [&str; 2], mtu: u32) -> File {
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun").unwrap();
    let flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    let mut request = Request { name: [0; 16], flags, rest: [0; 22] };
    request.name[..device.len()].copy_from_slice(device.as_bytes());
    // SAFETY: the request is as long as the kernel's ifreq, and lives through the call.
    unsafe { tun_set_interface(file.as_raw_fd(), &request) }.unwrap();
    // SAFETY: a number is all that it takes: checksums, TCP segments of both families.
    unsafe { tun_set_offload(file.as_raw_fd(), 7) }.unwrap();
    ip(&format!("link set dev {device} address {mac} mtu {mtu} up"));
    ip(&format!("address add {}/24 dev {device}", addresses[0]));
    ip(&format!("address add {}/64 dev {device} nodad", addresses[1]));
    file
}

fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(began.elapsed() < WITHIN, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn in_a_thread(run: impl FnOnce() + Send) {
    std::thread::scope(|scope| scope.spawn(run).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

#[test]
fn frames_of_both_families_are_seen_whole_and_long_ones_not_at_all() {
    in_a_thread(|| {
        enter_namespace();
        let tap = tap("tap0", HOST_MAC, ["10.9.0.1", "fd09::1"], 9000);
        for (address, mac) in [("10.9.0.2", GUEST_MAC), ("fd09::2", GUEST_MAC), ("10.9.0.3", "02:00:00:00:00:03")] {
            ip(&format!("neighbor replace {address} lladdr {mac} dev tap0 nud permanent"));
        }
        let nics = || [(GUEST_MAC, "tap0"), (GUEST_MAC, "lo")].into_iter();
        let capture = Capture::start(nics(), || ()).unwrap();
        for (from, to, headers) in [("10.9.0.1", "10.9.0.2", HEADERS_V4), ("fd09::1", "fd09::2", HEADERS_V6)] {
            let socket = UdpSocket::bind((from.parse::<IpAddr>().unwrap(), 0)).unwrap();
            let to = SocketAddr::new(to.parse().unwrap(), 9);
            let most = MAX_FRAME_BYTES - headers;
            let payload = |number: u8, len: usize| vec![number; len];
            let lens = [100, most, most + 1, 8_000, 1, 1_400];
            for (number, len) in (1..).zip(lens) {
                socket.send_to(&payload(number, len), to).unwrap();
                if to.is_ipv4() {
                    socket.send_to(&payload(99, 50), "10.9.0.3:9").unwrap();
                }
            }
            let due: Vec<Vec<u8>> = [(1, 100), (2, most), (5, 1), (6, 1_400)].map(|(n, len)| payload(n, len)).into();
            let mut frames = Vec::new();
            wait_for("frames", || {
                frames.extend(capture.take());
                (frames.len() >= due.len()).then_some(())
            });
            let payloads =
                |frames: &[Vec<u8>]| frames.iter().map(|frame| frame[headers..].to_vec()).collect::<Vec<_>>();
            assert!(payloads(&frames) == due, "{:?}", frames.iter().map(Vec::len).collect::<Vec<_>>());

            // And given to a guest: in that order, as they were.
            let mut buffer = vec![0; 70_000];
            while (&tap).read(&mut buffer).is_ok() {}
            let outcome = replay(nics().take(1), &frames);
            assert_eq!(outcome, Outcome { replayed: due.len(), problem: None });
            let mut given = Vec::new();
            wait_for("replayed frames", || {
                while let Ok(len) = (&tap).read(&mut buffer) {
                    // Others are the kernel's own, about neighbours and groups.
                    if len > headers && buffer[VNET_HEADER..VNET_HEADER + 6] == GUEST_MAC_BYTES {
                        given.push(buffer[..len].to_vec());
                    }
                }
                (given.len() >= due.len()).then_some(())
            });
            assert!(payloads(&given) == due);
            // What was replayed passed the capture, too.
            wait_for("the replay to be seen", || (capture.take().len() >= due.len()).then_some(()));
        }
    });
}

/// What passes between a tap and another, but while the host is dead.
fn forward(ends: [&File; 2], dead: &AtomicBool, stop: &AtomicBool) {
    let mut frame = vec![0; 70_000];
    while !stop.load(Ordering::Relaxed) {
        let mut polled = ends.map(|end| PollFd::new(end.as_fd(), PollFlags::POLLIN));
        let _ = poll(&mut polled, 20u16);
        for (from, to) in [(0, 1), (1, 0)] {
            while let Ok(len) = (&mut &*ends[from]).read(&mut frame) {
                if !dead.load(Ordering::Relaxed) {
                    let _ = (&mut &*ends[to]).write(&frame[..len]);
                }
            }
        }
    }
}

fn holds(frame: &[u8], byte: u8) -> bool {
    frame.windows(50).any(|window| window.iter().all(|b| *b == byte))
}

/// A request of which the middle was too long to be kept: the guest's TCP gets its beginning and its end, and has the client
/// send what is between. What the program in the guest reads has no gap, nothing twice, and no other order.
#[test]
fn a_request_with_a_part_too_long_to_be_kept_reaches_the_guest_whole() {
    in_a_thread(|| {
        enter_namespace();
        let host = tap("tap0", HOST_MAC, ["10.9.0.1", "fd09::1"], 1500);
        let (dead, stop) = (AtomicBool::new(false), AtomicBool::new(false));
        let read: Arc<Mutex<Vec<u8>>> = Arc::default();
        let (up, is_up) = channel();
        std::thread::scope(|scope| {
            let of_guest = Arc::clone(&read);
            scope.spawn(move || {
                enter_namespace();
                let tap = tap("eth0", GUEST_MAC, ["10.9.0.2", "fd09::2"], 1500);
                let listener = TcpListener::bind("[::]:7").unwrap();
                up.send(tap).unwrap();
                for _ in 0..2 {
                    let (mut stream, _) = listener.accept().unwrap();
                    let mut buffer = [0; 4096];
                    while let Ok(len @ 1..) = stream.read(&mut buffer) {
                        of_guest.lock().unwrap().extend_from_slice(&buffer[..len]);
                    }
                }
            });
            let guest = is_up.recv().unwrap();
            let (host, dead, stop) = (&host, &dead, &stop);
            scope.spawn(move || forward([host, &guest], dead, stop));
            for address in ["10.9.0.2:7", "[fd09::2]:7"] {
                request_over_a_hosts_end(address.parse().unwrap(), dead, &read);
            }
            stop.store(true, Ordering::Relaxed);
        });
    });
}

fn request_over_a_hosts_end(guest: SocketAddr, dead: &AtomicBool, read: &Mutex<Vec<u8>>) {
    read.lock().unwrap().clear();
    let nics = || [(GUEST_MAC, "tap0")].into_iter();
    let (mut client, mut sent) = (TcpStream::connect_timeout(&guest, WITHIN).unwrap(), Vec::new());
    client.set_nodelay(true).unwrap();
    let mut send = |byte: u8, len: usize| {
        client.write_all(&vec![byte; len]).unwrap();
        sent.extend(vec![byte; len]);
        sent.clone()
    };
    let has_read = |all: &[u8]| {
        wait_for("what was sent", || (read.lock().unwrap().len() >= all.len()).then_some(()));
        assert!(*read.lock().unwrap() == all, "the guest read something else");
    };
    has_read(&send(b'h', 10));

    let capture = Capture::start(nics(), || ()).unwrap();
    dead.store(true, Ordering::Relaxed);
    send(b'a', 100);
    send(b'b', 9_000);
    let all = send(b'c', 100);
    let mut frames = Vec::new();
    wait_for("its last frame", || {
        frames.extend(capture.take());
        frames.iter().any(|frame| holds(frame, b'c')).then_some(())
    });
    drop(capture);
    let first = |byte| frames.iter().position(|frame| holds(frame, byte)).unwrap();
    assert!(first(b'a') < first(b'c') && frames.iter().all(|frame| frame.len() <= MAX_FRAME_BYTES));
    let kept = frames.iter().flatten().filter(|b| **b == b'b').count();
    assert!(kept < 9_000, "nothing was too long: {kept} bytes of it were kept");

    // The guest goes on, elsewhere.
    dead.store(false, Ordering::Relaxed);
    let began = Instant::now();
    let outcome = replay(nics(), &frames);
    assert_eq!(outcome, Outcome { replayed: frames.len(), problem: None });
    has_read(&all);
    println!("{guest}: {} frames replayed, all read after {:?}", frames.len(), began.elapsed());
    // Once more: as if they had been in the epoch, too.
    assert_eq!(replay(nics(), &frames).replayed, frames.len());
    has_read(&send(b'd', 3_000));
}
