//! Talking to a guest's workload from the client's place in the lab.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Error, ErrorKind, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

use super::error::{LabError, Result};
use super::namespace;

/// Port of the workload in every guest.
pub const GUEST_PORT: u16 = 7000;

/// Connects from inside a network namespace; the stream works in any thread.
pub fn connect_in(netns: &Path, addr: SocketAddr, timeout: Duration) -> Result<TcpStream> {
    let stream = namespace::enter(netns, || TcpStream::connect_timeout(&addr, timeout))?
        .map_err(LabError::system(format!("connect to {addr} from {}", netns.display())))?;
    stream.set_nodelay(true).map_err(LabError::system("set TCP_NODELAY"))?;
    // What Linux comes with, whatever this machine was set to: figures are compared with other machines'.
    if let Err(error) = socket2::SockRef::from(&stream).set_tcp_congestion(b"cubic") {
        tracing::debug!(%error, "a client keeps this machine's congestion control");
    }
    Ok(stream)
}

/// What a workload answers to a number.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct GuestReply {
    pub number: u64,
    /// Everything done so far; it goes back only if the guest lost what it had done.
    pub counter: u64,
    pub checks: u64,
    /// Faults found in memory or CPU state: anything but 0 is corruption.
    pub errors: u64,
    /// Random at each boot of the guest.
    pub boot: String,
    /// Units of CPU work.
    pub work: u64,
    /// By the guest's own monotonic clock, which stands still while the guest is stopped.
    pub uptime_ms: u64,
    /// Pages written.
    pub dirty: u64,
    /// Records that are on the guest's disk for good.
    pub records: u64,
}

impl GuestReply {
    pub(super) fn parse(line: &str) -> Option<Self> {
        let (number, rest) = line.trim().split_once(' ')?;
        let fields: BTreeMap<_, _> = rest.split(' ').filter_map(|f| f.split_once('=')).collect();
        let value = |name: &str| fields.get(name)?.parse().ok();
        Some(Self {
            number: number.parse().ok()?,
            counter: value("counter")?,
            checks: value("checks")?,
            errors: value("errors")?,
            boot: fields.get("boot")?.to_string(),
            work: value("work")?,
            uptime_ms: value("uptime_ms")?,
            dirty: value("dirty")?,
            records: value("records")?,
        })
    }
}

/// What a guest says of the fsync'd records on its disk, all of which it has just read and found right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskRecords {
    /// Written and synced before they were checked.
    pub durable: u64,
    pub checked: u64,
    /// Found when the guest was booted.
    pub recovered: u64,
}

impl DiskRecords {
    fn parse(line: &str) -> Option<Self> {
        let fields: BTreeMap<_, _> =
            line.strip_prefix("records ok ")?.split(' ').filter_map(|f| f.split_once('=')).collect();
        let value = |name: &str| fields.get(name)?.parse::<u64>().ok();
        let records = Self { durable: value("durable")?, checked: value("checked")?, recovered: value("recovered")? };
        (value("errors")? == 0).then_some(records)
    }
}

/// One connection to a workload.
pub struct GuestClient {
    reader: BufReader<TcpStream>,
    next: u64,
}

impl GuestClient {
    pub fn new(stream: TcpStream) -> Self {
        Self { reader: BufReader::new(stream), next: 0 }
    }

    /// The longest to wait for an answer; none at all at first.
    pub fn set_timeout(&mut self, timeout: Option<Duration>) -> std::io::Result<()> {
        self.reader.get_ref().set_read_timeout(timeout)
    }

    /// Sends a line, returns the line that answers it.
    pub fn ask(&mut self, line: &str) -> std::io::Result<String> {
        self.reader.get_mut().write_all(format!("{line}\n").as_bytes())?;
        let mut reply = String::new();
        match self.reader.read_line(&mut reply)? {
            0 => Err(ErrorKind::UnexpectedEof.into()),
            _ => Ok(reply.trim_end().to_owned()),
        }
    }

    /// Sends the next number; an answer to another one is an error.
    pub fn status(&mut self) -> std::io::Result<GuestReply> {
        self.next += 1;
        let line = self.ask(&self.next.to_string())?;
        GuestReply::parse(&line)
            .filter(|r| r.number == self.next)
            .ok_or_else(|| Error::new(ErrorKind::InvalidData, format!("asked for {}, got {line:?}", self.next)))
    }

    /// Has the guest check the records on its disk; `Err` tells what it answered if not "ok".
    pub fn records(&mut self) -> std::io::Result<DiskRecords> {
        let line = self.ask("records")?;
        DiskRecords::parse(&line).ok_or_else(|| Error::new(ErrorKind::InvalidData, line))
    }

    /// Has the guest check all of its memory pattern; `Err` tells what it answered if not "ok".
    pub fn verify(&mut self) -> std::io::Result<String> {
        let line = self.ask("verify")?;
        if line.starts_with("verify ok") { Ok(line) } else { Err(Error::new(ErrorKind::InvalidData, line)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_are_parsed_whole_or_not_at_all() {
        let line = "7 counter=12 checks=3 errors=0 boot=ab work=5 uptime_ms=99 dirty=7 records=5";
        let reply = GuestReply::parse(line).unwrap();
        assert_eq!((reply.number, reply.counter, reply.boot.as_str(), reply.dirty), (7, 12, "ab", 7));
        let records = DiskRecords::parse("records ok durable=7 checked=8 recovered=1 errors=0");
        assert_eq!(records, Some(DiskRecords { durable: 7, checked: 8, recovered: 1 }));
        assert_eq!(DiskRecords::parse("records bad durable=7 checked=0 recovered=1 errors=1"), None);
        assert_eq!(GuestReply::parse("7 counter=12"), None);
        assert_eq!(GuestReply::parse("error: expected"), None);
    }
}
