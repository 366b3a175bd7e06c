//! What holding a guest's output costs its clients: ping, requests, bulk TCP; unprotected, with cuts alone, with the gate.
//! Then, how long they hear nothing when a part of it fails.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use super::{Bench, Row, answers_per_s, percentile, silence};
use crate::api::types::{Consistency, ConsistencyMode};
use crate::lab::client::GUEST_PORT;
use crate::lab::error::{LabError, Result};
use crate::lab::fleet::Fleet;
use crate::lab::state::CLIENT;
use crate::lab::{GuestOptions, Lab, StartedGuest};

const INTERVAL: Duration = Duration::from_millis(50);
const PINGS: usize = 300;
const PING_EVERY: Duration = Duration::from_millis(10);
const MEASURE_FOR: Duration = Duration::from_secs(5);
const WATCH_EVERY: Duration = Duration::from_millis(5);
/// Looks at what bounds a transfer.
const LOOK_EVERY: Duration = Duration::from_secs(1);
const CONNECTIONS: usize = 50;
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// Asked for at a time.
const BULK_BYTES: u64 = 8 << 20;
/// A guest that does something besides: 1,000 pages a second.
const WORKLOAD: &str = "dirty:1000";
/// Unless another is asked for. A guest with less has a smaller receive window, which then bounds what is sent to it.
const MEMORY_MIB: u32 = 1024;
/// The same. With QEMU's usual 256 the ring is full at many cuts, and QEMU drops the frame that waits for room when it stops the guest.
const RX_QUEUE: u32 = 1024;

/// How a client finds the guest.
struct Seen {
    ping_ms: Vec<f64>,
    one_connection: f64,
    fifty_connections: f64,
    from_guest_mbit: f64,
    to_guest_mbit: f64,
    window: Window,
}

/// What bounds a transfer to the guest, as the client's kernel sees it; zeroes where it does not tell.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Window {
    /// What the guest lets the client send without an acknowledgement, which Linux bounds by the guest's memory.
    bytes: f64,
    /// How long acknowledgements take.
    ack_ms: f64,
}

impl Window {
    /// Of a socket, in the words of ss(8).
    fn in_ss(text: &str) -> Option<Self> {
        let field = |name: &str| text.split_ascii_whitespace().find_map(|word| word.strip_prefix(name));
        let ack_ms = field("rtt:")?.split('/').next()?.parse().ok()?;
        Some(Self { bytes: field("snd_wnd:")?.parse().ok()?, ack_ms })
    }

    /// A window for each time that its acknowledgement takes; with none known, no bound.
    fn mbit(&self) -> f64 {
        if self.ack_ms > 0.0 { self.bytes * 8.0 / 1e3 / self.ack_ms } else { f64::INFINITY }
    }
}

impl Seen {
    fn ping_mean(&self) -> f64 {
        self.ping_ms.iter().sum::<f64>() / self.ping_ms.len().max(1) as f64
    }
}

/// The guest that is measured, if QEMU and the lab take it.
pub(super) fn guest(memory_mib: Option<u32>, rx_queue: Option<u32>) -> Result<GuestOptions> {
    let options = GuestOptions {
        memory_mib: memory_mib.unwrap_or(MEMORY_MIB),
        workload: WORKLOAD.parse().map_err(LabError::Product)?,
        balloon: false,
        rx_queue: rx_queue.or(Some(RX_QUEUE)),
        ..GuestOptions::new("web", "host1")
    };
    options.check().map(|()| options)
}

pub(super) fn run(bench: &Bench, options: &GuestOptions) -> Result<()> {
    let lab = bench.lab(2)?;
    let fleet = Fleet::of(&lab)?;
    fleet.wait_hosts(2, Duration::from_secs(30))?;
    let guest = lab.guest(options, true)?;
    let row = Row::new("the guest's memory", options.memory_mib.into(), "MiB");
    bench.print(&row.beside("frames in its receive ring", options.rx_queue.unwrap_or_default().into()));
    bench.say("unprotected")?;
    let alone = measure(bench, &lab, &guest)?;
    fleet.enable("web", "host1", 1, INTERVAL)?;
    fleet.wait_protected("web", Duration::from_secs(60))?;
    bench.say("with cuts every 50 ms and no gate")?;
    let cuts = measure(bench, &lab, &guest)?;
    let consistency = Consistency { mode: ConsistencyMode::OutputCommit, ..Consistency::default() };
    fleet.enable_with("web", "host1", 1, INTERVAL, consistency)?;
    let holding = |view: &crate::api::types::GuestView| view.capture.output.gate == "holding";
    fleet.wait("web", "output held", Duration::from_secs(60), holding)?;
    bench.say("with output-commit")?;
    let gated = measure(bench, &lab, &guest)?;
    let view = fleet.info("web")?;
    let client = lab.watch(guest.ip, WATCH_EVERY)?;
    show(bench, &alone, &cuts, &gated);
    let output = view.capture.output;
    bench.print(&Row::new("frames waited in the gate, p50", output.hold_us.p50 as f64 / 1e3, "ms"));
    bench.print(&Row::new("frames waited in the gate, p99", output.hold_us.p99 as f64 / 1e3, "ms"));
    bench.print(&Row::new("times output left uncommitted", output.opened_total as f64, "times"));
    let pause = view.capture.pause_us;
    let row = Row::new("pause of a cut, p50", pause.p50 as f64 / 1e3, "ms");
    bench.print(&row.beside("ms p99", pause.p99 as f64 / 1e3));
    let stage = silence::Stage { lab: &lab, fleet: &fleet, guest: "web", client: &client };
    silence::run(bench, &stage)?;
    silence::after_power_cuts(bench, &stage, guest.ip)
}

fn show(bench: &Bench, alone: &Seen, cuts: &Seen, gated: &Seen) {
    let beside = |name: &str, value: f64, unit, cuts: f64, alone: f64| {
        Row::new(name, value, unit).beside(format!("unprotected; {cuts:.2} with cuts alone"), alone)
    };
    let ping = |pick: &dyn Fn(&Seen) -> f64, name: &str| beside(name, pick(gated), "ms", pick(cuts), pick(alone));
    let p99 = |seen: &Seen| percentile(&seen.ping_ms, 99);
    bench.print(&ping(&|seen| percentile(&seen.ping_ms, 0), "ping min"));
    bench.print(&ping(&|seen| seen.ping_mean(), "ping mean"));
    bench.print(&ping(&p99, "ping p99"));
    bench.print(&ping(&|seen| percentile(&seen.ping_ms, 100), "ping max"));
    let mean = gated.ping_mean() - alone.ping_mean();
    bench.print(&Row::new("added to a ping on average", mean, "ms").at_most(4.0));
    bench.print(&Row::new("added to a ping at p99", p99(gated) - p99(alone), "ms").at_most(10.0));
    let row = beside("requests, one connection", gated.one_connection, "/s", cuts.one_connection, alone.one_connection);
    bench.print(&row.at_least(250.0));
    let fifty = (gated.fifty_connections, cuts.fifty_connections, alone.fifty_connections);
    bench.print(&beside("requests, fifty connections", fifty.0, "/s", fifty.1, fifty.2).at_least(2000.0));
    for (name, pick) in [
        ("bulk TCP from the guest", (|seen| seen.from_guest_mbit) as fn(&Seen) -> f64),
        ("bulk TCP to the guest", |seen| seen.to_guest_mbit),
    ] {
        bench.print(&beside(name, pick(gated), "Mbit/s", pick(cuts), pick(alone)));
        let share = pick(gated) / pick(alone) * 100.0;
        bench.print(&Row::new(format!("{name}, of unprotected"), share, "%").at_least(25.0));
    }
    let window = gated.window;
    if window.ack_ms > 0.0 {
        let row = Row::new("its receive window allows at most", window.mbit(), "Mbit/s");
        let of = format!("ms until it is acknowledged, {:.0} KB", window.bytes / 1e3);
        bench.print(&row.beside(of, window.ack_ms));
        let share = window.mbit().min(alone.to_guest_mbit) / alone.to_guest_mbit * 100.0;
        bench.print(&Row::new("its receive window, of unprotected", share, "%"));
    }
}

fn measure(bench: &Bench, lab: &Lab, guest: &StartedGuest) -> Result<Seen> {
    bench.sleep(Duration::from_secs(1))?;
    let mut ping = lab.ping_from_client(guest.ip)?;
    let mut ping_ms = Vec::new();
    for _ in 0..PINGS {
        if let Some(took) = ping.echo(Duration::from_secs(1))? {
            ping_ms.push(took.as_secs_f64() * 1e3);
        }
        std::thread::sleep(PING_EVERY);
    }
    bench.check_interrupt()?;
    let (one_connection, fifty_connections) = (requests(lab, guest, 1)?, requests(lab, guest, CONNECTIONS)?);
    let (from_guest_mbit, _) = bulk(lab, guest, receive)?;
    let (to_guest_mbit, window) = bulk(lab, guest, send)?;
    Ok(Seen { ping_ms, one_connection, fifty_connections, from_guest_mbit, to_guest_mbit, window })
}

/// Requests a second on so many connections, each of which waits for its answers.
fn requests(lab: &Lab, guest: &StartedGuest, connections: usize) -> Result<f64> {
    let failed = LabError::system::<std::io::Error>;
    let mut clients = (0..connections).map(|_| lab.guest_client(guest.ip)).collect::<Result<Vec<_>>>()?;
    clients
        .iter_mut()
        .try_for_each(|client| client.set_timeout(Some(ANSWER_WITHIN)))
        .map_err(failed("ask the guest"))?;
    answers_per_s(clients, MEASURE_FOR, |client| client.status().map(drop)).map_err(failed("ask the guest"))
}

/// Megabits a second of a transfer that is repeated for a while, and the mean of what bounded it.
fn bulk(lab: &Lab, guest: &StartedGuest, transfer: fn(&mut TcpStream) -> std::io::Result<()>) -> Result<(f64, Window)> {
    let mut stream = lab.connect_from_client(guest.ip, GUEST_PORT)?;
    let limit = LabError::system::<std::io::Error>;
    stream.set_read_timeout(Some(ANSWER_WITHIN)).map_err(limit("set a time limit"))?;
    stream.set_write_timeout(Some(ANSWER_WITHIN)).map_err(limit("set a time limit"))?;
    let port = stream.local_addr().map_err(limit("find the client's port"))?.port();
    let (began, mut bytes, mut windows) = (Instant::now(), 0, Vec::new());
    while began.elapsed() < MEASURE_FOR {
        transfer(&mut stream).map_err(limit("transfer"))?;
        bytes += BULK_BYTES;
        // Windows grow at the beginning.
        if began.elapsed() > LOOK_EVERY * (windows.len() as u32 + 1) {
            let shown = lab.exec(CLIENT, &["ss", "-tinH", "sport", "=", &format!(":{port}")])?;
            windows.push(Window::in_ss(&String::from_utf8_lossy(&shown.stdout)).unwrap_or_default());
        }
    }
    let mbit = bytes as f64 * 8.0 / 1e6 / began.elapsed().as_secs_f64();
    let mean = |of: fn(&Window) -> f64| windows.iter().map(of).sum::<f64>() / windows.len().max(1) as f64;
    Ok((mbit, Window { bytes: mean(|window| window.bytes), ack_ms: mean(|window| window.ack_ms) }))
}

fn receive(stream: &mut TcpStream) -> std::io::Result<()> {
    stream.write_all(format!("send {BULK_BYTES}\n").as_bytes())?;
    read_exactly(stream, BULK_BYTES)
}

fn send(stream: &mut TcpStream) -> std::io::Result<()> {
    stream.write_all(format!("take {BULK_BYTES}\n").as_bytes())?;
    let block = vec![0x5a; 64 << 10];
    for _ in 0..BULK_BYTES / block.len() as u64 {
        stream.write_all(&block)?;
    }
    read_exactly(stream, "taken\n".len() as u64)
}

fn read_exactly(stream: &mut TcpStream, bytes: u64) -> std::io::Result<()> {
    match std::io::copy(&mut stream.take(bytes), &mut std::io::sink())? {
        read if read == bytes => Ok(()),
        _ => Err(std::io::ErrorKind::UnexpectedEof.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guests_that_nobody_could_start_are_refused() {
        let default = guest(None, None).unwrap();
        assert_eq!((default.memory_mib, default.rx_queue), (MEMORY_MIB, Some(RX_QUEUE)));
        assert!(guest(Some(100), None).unwrap_err().to_string().contains("144 MiB or more"));
        assert!(guest(Some(256), Some(300)).unwrap_err().to_string().contains("256, 512 or 1024"));
        guest(Some(256), Some(256)).unwrap();
    }

    #[test]
    fn a_window_is_read_from_what_ss_shows() {
        let shown = "ESTAB 0 0 10.77.0.3:33333 10.77.100.1:7000\n\t cubic wscale:7,7 rto:206 rtt:5/1.25 mss:1448 \
                     minrtt:0.3 snd_wnd:800000";
        let window = Window::in_ss(shown).unwrap();
        assert_eq!(window, Window { bytes: 800_000.0, ack_ms: 5.0 });
        assert_eq!(window.mbit(), 1_280.0);
        assert_eq!(Window::in_ss("cubic rtt:5/1.25"), None);
        assert_eq!(Window::default().mbit(), f64::INFINITY);
    }
}
