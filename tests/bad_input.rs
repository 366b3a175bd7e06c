//! Bad input: orders that cannot be carried out are refused with words that help; what is no order at all, on any
//! socket, ends its own connection and nothing else. The protected guest never notices.

mod support;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::unistd::Pid;
use support::{Bed, GUEST, INTERVAL, Random};
use virt_shadow::api::control::{AgentHello, CONTROL_VERSION, Heartbeat, ToAgent, ToManager};
use virt_shadow::config::Transport;
use virt_shadow::lab::{GuestOptions, LabOptions, MANAGER, QemuUser};
use vmsync::message::SourceBody;
use vmsync::units::{Epoch, Term};
use vmsync::wire::encode;

const CONTROL_PORT: u16 = 7711;
const SYNC_PORT: u16 = 7710;
/// Whoever says nothing is sent away after 5 to 10 s.
const SENT_AWAY_WITHIN: Duration = Duration::from_secs(20);
const SILENCE_MAX_MS: f64 = 2_000.0;

/// A call of the REST API with a body of any bytes. -> status, body
fn rest(bed: &Bed, node: &str, method: &str, path: &str, body: &[u8]) -> (u16, String) {
    let length = body.len();
    let head = format!("{method} {path} HTTP/1.1\r\nHost: l\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n");
    raw(bed, node, &[head.as_bytes(), body].concat())
}

/// Whatever a daemon answers to any bytes; status 0: it just closed.
fn raw(bed: &Bed, node: &str, bytes: &[u8]) -> (u16, String) {
    let mut stream = UnixStream::connect(bed.lab.daemon_socket(node)).unwrap();
    stream.set_read_timeout(Some(SENT_AWAY_WITHIN)).unwrap();
    // It may have heard enough before all was written.
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    let mut buffer = [0; 4096];
    while let Ok(read @ 1..) = stream.read(&mut buffer) {
        answer.extend_from_slice(&buffer[..read]);
    }
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body).to_owned();
    (status, body)
}

#[track_caller]
fn refused(answer: Result<impl std::fmt::Debug, impl std::fmt::Display>, words: &[&str]) {
    let text = answer.expect_err("it was not refused").to_string();
    println!("  {text}");
    words.iter().for_each(|word| assert!(text.contains(word), "{word:?} is not in: {text}"));
}

/// All that could die of bad input.
fn daemons(bed: &Bed) -> Vec<(String, Pid)> {
    let nodes = ["host1", "host2", "host3", MANAGER].map(str::to_owned);
    nodes.into_iter().map(|node| (node.clone(), bed.service(&node, "virtshadowd"))).collect()
}

fn lab(name: &str) -> Bed {
    protected(Bed::raise(name, 3, 2, QemuUser::Root))
}

fn protected(bed: Bed) -> Bed {
    bed.enable();
    bed.wait_protected();
    bed
}

fn ip(bed: &Bed, node: &str) -> Ipv4Addr {
    let status = bed.lab.status().unwrap();
    status.manager.iter().chain(&status.hosts).find(|report| report.name == node).unwrap().ip
}

#[test]
fn orders_that_cannot_be_carried_out_are_refused_with_reason_and_remedy() {
    let _lab = support::one_lab();
    let bed = lab("orders");
    let (began, before) = (Instant::now(), daemons(&bed));
    let fleet = &bed.fleet;

    refused(fleet.enable("nobody", "host1", 1, INTERVAL), &["no domain nobody"]);
    let enable = |body: serde_json::Value| {
        let (status, answer) = rest(&bed, MANAGER, "POST", "/v1/guests", body.to_string().as_bytes());
        if status == 200 { Ok(answer) } else { Err(format!("{status} {answer}")) }
    };
    refused(fleet.enable(GUEST, "host1", 9, INTERVAL), &["9 shadows"]);
    refused(fleet.enable(GUEST, "host1", 3, INTERVAL), &["3 shadows wanted", "2 possible", "rack", "remedy"]);
    refused(fleet.enable(GUEST, "host1", 1, Duration::ZERO), &["interval of 0 ms"]);
    refused(enable(serde_json::json!({"domain": GUEST, "on": ["moon"], "shadows": 2})), &["moon", "unknown"]);
    let itself = serde_json::json!({"domain": GUEST, "on": ["host1"], "shadows": 2});
    refused(enable(itself), &["host1", "in the primary's rack", "--on"]);
    refused(enable(serde_json::json!({"domain": GUEST, "shadow": 2})), &["400", "shadow"]);
    refused(enable(serde_json::json!(["busy"])), &["400"]);

    let idle = GuestOptions { memory_mib: 128, ..GuestOptions::new("still", "host2") };
    bed.lab.guest(&idle, false).unwrap();
    bed.lab.virsh("host2", &["destroy", "still"]).unwrap();
    refused(fleet.enable("still", "host2", 1, INTERVAL), &["not running", "virsh start still"]);
    refused(fleet.disable("still"), &["no protected guest still"]);
    refused(fleet.info("still"), &["no protected guest still", "virt-shadow enable still"]);

    let disk = "dd if=/dev/zero of=/var/lib/libvirt/still.img bs=1M count=4 2>/dev/null && virsh -q attach-disk still \
                /var/lib/libvirt/still.img vda --mode shareable --config && virsh -q start still";
    let output = bed.lab.exec("host2", &["sh", "-c", disk]).unwrap();
    assert!(output.status.success(), "{output:?}");
    refused(fleet.enable("still", "host2", 1, INTERVAL), &["disk vda is shared with other guests", "<shareable/>"]);

    refused(fleet.switchover(GUEST, Some("moon")), &["no shadow on moon", "host2", "host3"]);
    refused(fleet.switchover(GUEST, Some("host1")), &["primary on host1 already"]);
    refused(fleet.promote(GUEST, None, false), &["not counted as gone", "virt-shadow switchover busy", "--force"]);
    refused(fleet.promote("nobody", None, true), &["no protected guest nobody"]);
    refused(fleet.verify("nobody"), &["no protected guest nobody"]);

    for (arguments, words) in [
        (&["enable", "nobody"][..], &["failed to enable", "nobody"][..]),
        (&["disable", "still"], &["still", "virt-shadow list"]),
        (&["switchover", GUEST, "--to", "moon"], &["failed to", "no shadow on moon"]),
        (&["promote", GUEST], &["failed to promote", "--force"]),
        (&["--connect", "/run/nothing.sock", "list"], &["/run/nothing.sock"]),
    ] {
        let (code, out, errors) = bed.cli("host1", arguments);
        assert_eq!((code, out.as_str()), (Some(1), ""), "{arguments:?}: {errors}");
        let lines: Vec<&str> = errors.lines().collect();
        assert!(lines.len() >= 2 && lines.iter().all(|line| line.starts_with("error: ")), "{arguments:?}: {errors}");
        words.iter().for_each(|word| assert!(errors.contains(word), "{word:?} is not in: {errors}"));
    }

    println!("noise, or nothing but TCP, on ports that speak TLS");
    let mut random = Random::from_env();
    for (node, port) in [(MANAGER, CONTROL_PORT), ("host2", SYNC_PORT)] {
        for len in [0, 5, 3_000, 100_000] {
            let noise: Vec<u8> = (0..len).map(|_| random.below(256) as u8).collect();
            let stream = bed.lab.connect_from_client(ip(&bed, node), port).unwrap();
            // An alert at most.
            assert!(sent_away(stream, &noise).len() < 64);
        }
    }

    assert_eq!(daemons(&bed), before, "a daemon died");
    assert_eq!(bed.wait_protected().term, 1);
    bed.assert_equal();
    bed.assert_guest_unharmed();
    assert!(bed.silence_ms(began) < SILENCE_MAX_MS);
}

/// An agent that nobody needs.
struct Stranger(TcpStream);

impl Stranger {
    fn connect(bed: &Bed, control_version: u32) -> Self {
        let stream = bed.lab.connect_from_client(ip(bed, MANAGER), CONTROL_PORT).unwrap();
        stream.set_read_timeout(Some(SENT_AWAY_WITHIN)).unwrap();
        let mut stranger = Self(stream);
        stranger.send(&ToManager::Hello(AgentHello {
            control_version,
            version: "9.9".into(),
            host: "host9".into(),
            rack: "rack9".into(),
            sync_port: SYNC_PORT,
            sync_ip: None,
            tracker: "hash".into(),
            records: Vec::new(),
        }));
        stranger
    }

    fn send(&mut self, message: &ToManager) {
        let text = serde_json::to_vec(message).unwrap();
        self.0.write_all(&[&(text.len() as u32).to_be_bytes()[..], &text].concat()).unwrap();
    }

    fn receive(&mut self) -> ToAgent {
        let mut length = [0; 4];
        self.0.read_exact(&mut length).unwrap();
        let mut text = vec![0; u32::from_be_bytes(length) as usize];
        self.0.read_exact(&mut text).unwrap();
        serde_json::from_slice(&text).unwrap()
    }
}

/// Sends `bytes`, and waits until the other side has closed; what it said before.
fn sent_away(mut stream: TcpStream, bytes: &[u8]) -> Vec<u8> {
    stream.set_read_timeout(Some(SENT_AWAY_WITHIN)).unwrap();
    let _ = stream.write_all(bytes);
    let (mut said, mut buffer) = (Vec::new(), [0; 4096]);
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return said,
            Ok(read) => said.extend_from_slice(&buffer[..read]),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                panic!("still connected after {bytes:?}")
            }
            Err(_) => return said,
        }
    }
}

#[test]
fn garbage_on_every_socket_ends_its_own_connection_only() {
    let _lab = support::one_lab();
    // What lies behind TLS must stand it as well: from a host that was broken into, say.
    let options = LabOptions { transport: Transport::PlainTcp, ..LabOptions::for_test("garbage") };
    let bed = protected(Bed::raise_as(&options, 2));
    let mut random = Random::from_env();
    let (began, before) = (Instant::now(), daemons(&bed));
    let mut noise = |len: usize| (0..len).map(|_| random.below(256) as u8).collect::<Vec<u8>>();

    println!("REST API");
    for node in ["host1", MANAGER] {
        for bytes in [noise(3), noise(10_000), b"GET / HTTP/9.9\r\n\r\n".to_vec(), vec![b'a'; 1 << 20]] {
            let (status, _) = raw(&bed, node, &bytes);
            assert!(status == 0 || (400..500).contains(&status), "{status}");
        }
        let (status, answer) = rest(&bed, node, "POST", "/v1/guests", &vec![b' '; 1 << 20]);
        assert!(status == 0 || (status == 400 && answer.contains("at most")), "{status} {answer}");
        assert_eq!(rest(&bed, node, "POST", "/v1/guests", b"{\"domain\":").0, 400);
        assert_eq!(rest(&bed, node, "POST", "/v1/guests", "[".repeat(50_000).as_bytes()).0, 400);
        assert_eq!(rest(&bed, node, "GET", "/v1/nothing", b"").0, 404);
        assert_eq!(rest(&bed, node, "BREW", "/v1/hosts", b"").0, 405);
        assert_eq!(rest(&bed, node, "GET", "/v1/guests/%ff%00..%2f..", b"").0, 400);
        assert_eq!(rest(&bed, node, "GET", "/v1/guests/..%2f..%2fetc", b"").0, 404);
        assert_eq!(rest(&bed, node, "GET", "/v1/events?since=-1&limit=99999999999999999999", b"").0, 400);
    }

    println!("control port");
    let manager = ip(&bed, MANAGER);
    let control = || bed.lab.connect_from_client(manager, CONTROL_PORT).unwrap();
    let frame = |text: &str| [&(text.len() as u32).to_be_bytes()[..], text.as_bytes()].concat();
    for bytes in [
        noise(3_000),
        vec![0xff; 64],
        frame("{}"),
        frame("{\"type\":\"heartbeat\"}"),
        frame(&"[".repeat(100_000)),
        frame("\u{0}"),
        (u32::MAX).to_be_bytes().to_vec(),
    ] {
        sent_away(control(), &bytes);
    }
    match Stranger::connect(&bed, CONTROL_VERSION + 1).receive() {
        ToAgent::Refused { reason } => {
            println!("  {reason}");
            assert!(reason.contains("run the same virtshadowd on all hosts"), "{reason}");
        }
        other => panic!("{other:?}"),
    }
    // One that is what it says, but has no memory for a shadow.
    let mut stranger = Stranger::connect(&bed, CONTROL_VERSION);
    assert!(matches!(stranger.receive(), ToAgent::Welcome { .. }));
    let heartbeat = Heartbeat { seq: 1, memory_total_mib: 64, memory_free_mib: 64, ..Heartbeat::default() };
    stranger.send(&ToManager::Heartbeat(heartbeat));
    bed.fleet.wait_hosts(4, Duration::from_secs(5)).unwrap();
    refused(
        bed.fleet.enable(GUEST, "host1", 3, INTERVAL),
        &["3 shadows wanted", "without the memory (host9)", "remedy"],
    );
    stranger.0.write_all(&noise(100)).unwrap();
    drop(stranger);

    println!("sync port");
    let sync = || bed.lab.connect_from_client(ip(&bed, "host2"), SYNC_PORT).unwrap();
    let ping = encode(Term::new(7), Epoch::new(7), &SourceBody::Ping).bytes.to_vec();
    let changed = |at: usize, byte: u8| {
        let mut bytes = ping.clone();
        bytes[at] = byte;
        bytes
    };
    // Not ours; another version; an unknown kind; too long; damaged; no Hello first.
    for bytes in [noise(3_000), changed(0, 0), changed(4, 99), changed(6, 250), changed(27, 255), changed(9, 1)] {
        sent_away(sync(), &[bytes, vec![0; 64]].concat());
    }
    let said = sent_away(sync(), &ping);
    assert!(String::from_utf8_lossy(&said).contains("Hello"), "{said:?}");

    println!("those who say nothing, and little, everywhere at once");
    let mut slow: Vec<TcpStream> = (0..40).flat_map(|_| [control(), sync()]).collect();
    let slow_rest: Vec<UnixStream> =
        (0..40).map(|_| UnixStream::connect(bed.lab.daemon_socket("host2")).unwrap()).collect();
    for byte in 0..16u8 {
        for stream in slow.iter_mut().step_by(3) {
            let _ = stream.write_all(&[byte % 2]);
        }
        for mut stream in &slow_rest {
            let _ = stream.write_all(b"G");
        }
        std::thread::sleep(Duration::from_millis(1_000));
        assert!(bed.fleet.info(GUEST).is_ok());
    }
    for stream in slow {
        sent_away(stream, b"");
    }
    for mut stream in slow_rest {
        stream.set_read_timeout(Some(SENT_AWAY_WITHIN)).unwrap();
        let _ = stream.read_to_end(&mut Vec::new());
    }

    assert_eq!(daemons(&bed), before, "a daemon died");
    assert_eq!(bed.wait_protected().term, 1);
    bed.assert_equal();
    bed.assert_guest_unharmed();
    let silence_ms = bed.silence_ms(began);
    println!("longest silence {silence_ms:.1} ms");
    assert!(silence_ms < SILENCE_MAX_MS);
}
