//! Who may speak with whom: real sockets on loopback, certificates of a lab's authority.

mod api;

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use api::{Daemon, FakeAgent};
use virt_shadow::config::{TlsConfig, Transport};
use virt_shadow::lab::pki::{self, Authority};
use virt_shadow::transport::stream::Stream;
use virt_shadow::transport::{PeerName, Security};

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// Certificates of our own authority for two hosts, and of a strange one for the first.
struct Pki {
    dir: PathBuf,
}

impl Pki {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("virt-shadow-pki-{name}-{}", std::process::id()));
        let (ours, strange) = (Authority::new("ours").unwrap(), Authority::new("strange").unwrap());
        for host in ["h1", "h2", "manager"] {
            ours.issue(host, LOOPBACK, &dir.join(host)).unwrap();
        }
        strange.issue("h1", LOOPBACK, &dir.join("stranger")).unwrap();
        Self { dir }
    }

    fn config(&self, of: &str) -> TlsConfig {
        pki::config(&self.dir.join(of))
    }

    fn security(&self, of: &str) -> Security {
        Security::load(Transport::Tls, &self.config(of)).unwrap()
    }
}

impl Drop for Pki {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// Accepts one connection as `security` and sends back what it reads, until the end; then whether it heard all of it.
fn echo(security: Security, speaks_for: &'static str) -> (SocketAddr, std::thread::JoinHandle<Result<u64, String>>) {
    let listener = TcpListener::bind((LOOPBACK, 0)).unwrap();
    let addr = listener.local_addr().unwrap();
    let serving = std::thread::spawn(move || {
        let (socket, _) = listener.accept().unwrap();
        let stream = Stream::accept(&security, socket).map_err(|error| error.to_string())?;
        stream.peer().speaks_for(speaks_for)?;
        let (mut reading, mut writing, _closer) = stream.split(None).unwrap();
        let (mut buffer, mut heard) = (vec![0; 100_000], 0);
        loop {
            match reading.read(&mut buffer) {
                Ok(0) => break,
                Ok(read) => {
                    heard += read as u64;
                    writing.write_all(&buffer[..read]).map_err(|error| error.to_string())?;
                }
                Err(error) => return Err(error.to_string()),
            }
        }
        writing.finish();
        Ok(heard)
    });
    (addr, serving)
}

#[test]
fn both_directions_carry_much_at_the_same_time_and_end_in_order() {
    let pki = Pki::new("echo");
    for (client, server) in [(pki.security("h1"), pki.security("h2")), (Security::Plain, Security::Plain)] {
        let (addr, serving) = echo(server, "h1");
        let stream = Stream::connect(&client, addr, "h2").unwrap();
        let (mut reading, mut writing, _closer) = stream.split(None).unwrap();
        let sent: Vec<u8> = (0..8_000_000_u32).map(|n| (n ^ (n >> 9)) as u8).collect();
        let to_send = sent.clone();
        let writer = std::thread::spawn(move || {
            // Sizes around those of records and buffers.
            let mut rest = &to_send[..];
            for size in [1, 16_383, 16_384, 16_385, 65_536, 70_000].iter().cycle() {
                let (now, later) = rest.split_at((*size).min(rest.len()));
                writing.write_all(now).unwrap();
                rest = later;
                if rest.is_empty() {
                    break;
                }
            }
            writing
        });
        let mut received = vec![0; sent.len()];
        reading.read_exact(&mut received).unwrap();
        assert!(received == sent);
        writer.join().unwrap().finish();
        assert_eq!(serving.join().unwrap().unwrap(), sent.len() as u64);
    }
}

#[test]
fn a_connection_that_is_cut_does_not_look_like_one_that_ended() {
    let pki = Pki::new("cut");
    let (addr, serving) = echo(pki.security("h2"), "h1");
    let stream = Stream::connect(&pki.security("h1"), addr, "h2").unwrap();
    let (_reading, mut writing, closer) = stream.split(None).unwrap();
    writing.write_all(b"half a mess").unwrap();
    closer.shutdown(std::net::Shutdown::Both);
    let error = serving.join().unwrap().unwrap_err();
    assert!(error.contains("without sending TLS close_notify"), "{error}");
}

#[test]
fn strangers_and_other_hosts_are_refused_by_both_sides() {
    let pki = Pki::new("refusals");
    let connect = |client: &str, addr, to| Stream::connect(&pki.security(client), addr, to).map(drop);

    let (addr, serving) = echo(pki.security("h2"), "h1");
    let error = connect("h1", addr, "manager").unwrap_err().to_string();
    assert!(error.contains("not valid for name"), "another host than the one we meant: {error}");
    assert!(serving.join().unwrap().is_err());

    let (addr, serving) = echo(pki.security("stranger"), "h1");
    let error = connect("h2", addr, "h1").unwrap_err().to_string();
    assert!(error.contains("UnknownIssuer"), "{error}");
    assert!(serving.join().unwrap().is_err());

    // With TLS 1.3 the client may think it is in before the server has looked at its certificate.
    let (addr, serving) = echo(pki.security("h2"), "h1");
    let intruder = TlsConfig { ca: pki.config("h1").ca, ..pki.config("stranger") };
    let _ = Stream::connect(&Security::load(Transport::Tls, &intruder).unwrap(), addr, "h2");
    let error = serving.join().unwrap().unwrap_err();
    assert!(error.contains("UnknownIssuer"), "{error}");

    let (addr, serving) = echo(pki.security("h2"), "h1");
    connect("manager", addr, "h2").unwrap();
    let error = serving.join().unwrap().unwrap_err();
    assert!(error.contains("not one of host h1"), "{error}");

    let (addr, serving) = echo(pki.security("h2"), "h1");
    let mut plain = TcpStream::connect(addr).unwrap();
    plain.write_all(&[0; 4096]).unwrap();
    assert!(serving.join().unwrap().is_err());
    let mut answer = Vec::new();
    let _ = plain.read_to_end(&mut answer);
    assert!(answer.len() < 64, "an alert at most");
}

#[test]
fn what_is_missing_or_wrong_is_named_with_the_remedy_and_nothing_of_a_key() {
    let pki = Pki::new("files");
    let load = |config: &TlsConfig| Security::load(Transport::Tls, config).unwrap_err().to_string();
    let good = pki.config("h1");
    let missing = load(&TlsConfig { ca: pki.dir.join("nowhere.pem"), ..good.clone() });
    assert!(missing.contains("nowhere.pem") && missing.contains("plain-tcp"), "{missing}");
    let swapped = load(&TlsConfig { client_cert: good.client_key.clone(), ..good.clone() });
    assert!(swapped.contains("client certificate") && swapped.contains("PEM"), "{swapped}");
    let other = load(&TlsConfig { server_key: pki.config("h2").server_key, ..good.clone() });
    assert!(other.contains("host.pem"), "{other}");
    let garbage = pki.dir.join("garbage.key");
    std::fs::write(&garbage, "-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n").unwrap();
    let garbage = load(&TlsConfig { client_key: garbage, ..good });
    assert!(garbage.contains("garbage.key") && !garbage.contains("c2VjcmV0"), "{garbage}");
    assert_eq!(Security::load(Transport::PlainTcp, &pki.config("nobody")).unwrap().name(), "plain-tcp");
    assert_eq!(format!("{:?}", pki.security("h1")), "tls");
}

/// The manager believes an agent only as the host whose certificate it shows; an agent its manager likewise.
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_speaks_only_for_its_own_host() {
    let pki = Pki::new("manager");
    let dir = pki.dir.join("state");
    let daemon = Daemon::start_as(Path::new(&dir), (LOOPBACK, 0).into(), pki.security("manager")).await;
    let to = daemon.control;
    let name = |text: &str| PeerName::Name(text.to_owned());
    let honest = FakeAgent::start_as("h1", "r1", to, pki.security("h1"), name("manager"));
    let mut connected = honest.link().connected();
    tokio::time::timeout(Duration::from_secs(10), connected.wait_for(|up| *up)).await.unwrap().unwrap();
    let by_address = FakeAgent::start_as("h2", "r2", to, pki.security("h2"), PeerName::Address(LOOPBACK));
    let mut connected = by_address.link().connected();
    tokio::time::timeout(Duration::from_secs(10), connected.wait_for(|up| *up)).await.unwrap().unwrap();
    for (host, security, manager) in [
        ("h3", pki.security("h2"), "manager"),
        ("h1", pki.security("stranger"), "manager"),
        ("h4", Security::Plain, "manager"),
        ("h2", pki.security("h2"), "h1"),
    ] {
        let refused = FakeAgent::start_as(host, "r3", to, security, name(manager));
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert!(!*refused.link().connected().borrow(), "{host} {manager}");
    }
}
