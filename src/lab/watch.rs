//! A client that never stops asking: what a guest's user sees of a failover, to the millisecond.
//!
//! It asks on one connection, a number every few milliseconds. When no answer comes for a while it opens more
//! connections beside it, one after the other, and goes on with whichever is answered first. So the silence it sees is
//! the guest's, not that of a timer of TCP. The old connection is kept beside the new one for as long as it may come
//! back, and is gone back to when it does: lost is only a connection that failed.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::Serialize;
use socket2::{Domain, Socket, Type};

use super::client::{GUEST_PORT, GuestReply};
use super::error::{LabError, Result};
use super::namespace;

/// No answer for so long: open another connection, and again every [`ATTEMPT_EVERY`].
const STALLED: Duration = Duration::from_millis(30);
const ATTEMPT_EVERY: Duration = Duration::from_millis(10);
/// Unanswered connections are given up after this; the old one later, whose TCP waits longer with each retransmission.
const ATTEMPT_AGE_MAX: Duration = Duration::from_secs(2);
const KEPT_AGE_MAX: Duration = Duration::from_secs(15);
const CONNECTIONS_MAX: usize = 256;
/// Answers remembered one by one: two hours at 200 a second. Later ones are only counted.
const ANSWERS_MAX: usize = 1_500_000;
const REPLY_LEN_MAX: usize = 512;

/// What the client saw so far.
#[derive(Debug, Clone, Default, Serialize)]
pub struct WatchReport {
    pub requests: u64,
    pub answers: u64,
    /// Connections that had been answered, and then ended or were silent for 15 s.
    pub connections_lost: u64,
    /// The longest time between two answers, milliseconds.
    pub longest_silence_ms: f64,
    /// Boot identifiers seen; more than one: the guest was started anew.
    pub boots: BTreeSet<String>,
    /// The guest's own count of faults in its memory, the highest seen.
    pub guest_errors: u64,
    /// Times that the guest's counter was lower than one it had told before, and the most that it lost.
    pub went_back: u64,
    pub lost_counter_max: u64,
}

#[derive(Default)]
struct Seen {
    report: WatchReport,
    answered: Vec<Instant>,
    last: Option<(Instant, u64)>,
}

/// A client asking from its own thread, until dropped.
pub struct ClientWatch {
    seen: Arc<Mutex<Seen>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl ClientWatch {
    /// Starts asking the guest at `ip` from the network namespace `netns`, every `interval`.
    pub(super) fn start(netns: PathBuf, ip: Ipv4Addr, interval: Duration) -> Result<Self> {
        let (seen, stop) = (Arc::<Mutex<Seen>>::default(), Arc::<AtomicBool>::default());
        let worker = Worker {
            addr: (ip, GUEST_PORT).into(),
            interval,
            seen: seen.clone(),
            stop: stop.clone(),
            connections: Vec::new(),
            next: 0,
            last_attempt: None,
            last_answer: Instant::now(),
        };
        let thread = std::thread::Builder::new()
            .name("client-watch".into())
            .spawn(move || {
                if let Err(error) = namespace::enter(&netns, || worker.run()) {
                    eprintln!("client of {ip}: {error}");
                }
            })
            .map_err(LabError::system("start the client's thread"))?;
        Ok(Self { seen, stop, thread: Some(thread) })
    }

    pub fn report(&self) -> WatchReport {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).report.clone()
    }

    /// How long after `moment` the first answer came; `None` while there is none.
    pub fn first_answer_after(&self, moment: Instant) -> Option<Duration> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let index = seen.answered.partition_point(|at| *at <= moment);
        seen.answered.get(index).map(|at| *at - moment)
    }

    /// The longest time without an answer within a span of time, its ends included.
    pub fn longest_silence(&self, from: Instant, to: Instant) -> Duration {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let within = seen.answered.iter().copied().filter(|at| (from..to).contains(at));
        let mut last = from;
        let mut longest = Duration::ZERO;
        for at in within.chain([to]) {
            longest = longest.max(at.saturating_duration_since(last));
            last = at;
        }
        longest
    }

    /// Waits for an answer to come after `moment`.
    pub fn wait_answer_after(&self, moment: Instant, timeout: Duration) -> Option<Duration> {
        let begin = Instant::now();
        loop {
            match self.first_answer_after(moment) {
                None if begin.elapsed() < timeout => std::thread::sleep(Duration::from_millis(2)),
                found => return found,
            }
        }
    }
}

impl Drop for ClientWatch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic there was told on standard error.
            let _ = thread.join();
        }
    }
}

struct Connection {
    socket: Socket,
    opened: Instant,
    connected: bool,
    /// When the request that is out was sent.
    asked: Option<Instant>,
    /// The first one that was answered, or one that took its place when it was lost.
    established: bool,
    reply: Vec<u8>,
}

struct Worker {
    addr: SocketAddr,
    interval: Duration,
    seen: Arc<Mutex<Seen>>,
    stop: Arc<AtomicBool>,
    /// The first one is in use, the others try to take its place.
    connections: Vec<Connection>,
    next: u64,
    last_attempt: Option<Instant>,
    last_answer: Instant,
}

impl Worker {
    fn run(mut self) {
        let tick = self.interval.min(ATTEMPT_EVERY).max(Duration::from_millis(1));
        while !self.stop.load(Ordering::Relaxed) {
            let now = Instant::now();
            self.give_up(now);
            let stalled = self.connections.is_empty() || now - self.last_answer > STALLED;
            let due = self.last_attempt.is_none_or(|at| now - at >= ATTEMPT_EVERY);
            if stalled && due && self.connections.len() < CONNECTIONS_MAX {
                self.last_attempt = Some(now);
                // Refused or unreachable right away: the next attempt may do better.
                self.connections.extend(open(self.addr));
            }
            self.ask();
            self.wait(tick);
            self.listen();
        }
    }

    fn give_up(&mut self, now: Instant) {
        let age_max = |c: &Connection| if c.established { KEPT_AGE_MAX } else { ATTEMPT_AGE_MAX };
        for index in (0..self.connections.len()).rev() {
            let connection = &self.connections[index];
            let waiting_since = match connection.connected {
                true => connection.asked,
                false => Some(connection.opened),
            };
            if waiting_since.is_some_and(|since| now - since > age_max(connection)) {
                self.remove(index);
            }
        }
    }

    fn remove(&mut self, index: usize) {
        if self.connections.remove(index).established {
            self.seen.lock().unwrap_or_else(PoisonError::into_inner).report.connections_lost += 1;
        }
    }

    /// Sends the next number wherever none is out: at once on a new connection, at its time on the one in use.
    fn ask(&mut self) {
        let now = Instant::now();
        for index in (0..self.connections.len()).rev() {
            let connection = &mut self.connections[index];
            let due = index > 0 || now - self.last_answer >= self.interval || connection.opened > self.last_answer;
            if !connection.connected || connection.asked.is_some() || !due {
                continue;
            }
            self.next += 1;
            match connection.socket.write_all(format!("{}\n", self.next).as_bytes()) {
                Ok(()) => {
                    connection.asked = Some(now);
                    self.seen.lock().unwrap_or_else(PoisonError::into_inner).report.requests += 1;
                }
                Err(_) => self.remove(index),
            }
        }
    }

    fn wait(&self, tick: Duration) {
        let flags = |c: &Connection| if c.connected { PollFlags::POLLIN } else { PollFlags::POLLOUT };
        let mut fds: Vec<_> = self.connections.iter().map(|c| PollFd::new(c.socket.as_fd(), flags(c))).collect();
        // Whatever it returns, all connections are looked at next.
        let _ = poll(&mut fds, PollTimeout::try_from(tick).unwrap_or(PollTimeout::ZERO));
    }

    fn listen(&mut self) {
        let mut answered = Vec::new();
        let mut index = 0;
        while index < self.connections.len() {
            match self.connections[index].progress() {
                Ok(None) => index += 1,
                Ok(Some(reply)) => {
                    self.note(reply);
                    answered.push(index);
                    index += 1;
                }
                Err(_) => self.remove(index),
            }
        }
        let established = self.connections.iter().position(|c| c.established);
        // The old one, if it is among those that were answered: they have all shown that the guest is there.
        let Some(winner) = answered.iter().copied().find(|i| Some(*i) == established).or(answered.first().copied())
        else {
            return;
        };
        self.connections.swap(0, winner);
        let old_waits = established.is_some_and(|old| old != winner);
        self.connections[0].established |= !old_waits;
        let mut index = 0;
        self.connections.retain(|c| {
            index += 1;
            index == 1 || c.established
        });
    }

    fn note(&mut self, reply: GuestReply) {
        let now = Instant::now();
        self.last_answer = now;
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let seen = &mut *seen;
        let report = &mut seen.report;
        report.answers += 1;
        report.guest_errors = report.guest_errors.max(reply.errors);
        if let Some((at, counter)) = seen.last {
            report.longest_silence_ms = report.longest_silence_ms.max((now - at).as_secs_f64() * 1e3);
            if report.boots.contains(&reply.boot) && reply.counter < counter {
                report.went_back += 1;
                report.lost_counter_max = report.lost_counter_max.max(counter - reply.counter);
            }
        }
        report.boots.insert(reply.boot);
        seen.last = Some((now, reply.counter));
        if seen.answered.len() < ANSWERS_MAX {
            seen.answered.push(now);
        }
    }
}

fn open(addr: SocketAddr) -> std::io::Result<Connection> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), None)?;
    socket.set_tcp_nodelay(true)?;
    match socket.connect(&addr.into()) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
        _ => Ok(Connection {
            socket,
            opened: Instant::now(),
            connected: false,
            asked: None,
            established: false,
            reply: Vec::new(),
        }),
    }
}

impl Connection {
    /// Completes the connect or reads what has come; a whole reply, if there is one.
    fn progress(&mut self) -> std::io::Result<Option<GuestReply>> {
        if !self.connected {
            if let Some(error) = self.socket.take_error()? {
                return Err(error);
            }
            self.connected = self.socket.peer_addr().is_ok();
            return Ok(None);
        }
        let mut buffer = [0; REPLY_LEN_MAX];
        match self.socket.read(&mut buffer) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(count) => self.reply.extend_from_slice(&buffer[..count]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error),
        }
        match self.reply.iter().position(|b| *b == b'\n') {
            None if self.reply.len() > REPLY_LEN_MAX => Err(ErrorKind::InvalidData.into()),
            None => Ok(None),
            Some(end) => {
                let line = String::from_utf8_lossy(&self.reply[..end]).into_owned();
                self.reply.drain(..=end);
                self.asked = None;
                GuestReply::parse(&line).map(Some).ok_or_else(|| ErrorKind::InvalidData.into())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch(answered: Vec<Instant>) -> ClientWatch {
        let seen = Arc::new(Mutex::new(Seen { answered, ..Seen::default() }));
        ClientWatch { seen, stop: Arc::default(), thread: None }
    }

    #[test]
    fn silences_are_measured_up_to_both_ends_of_the_span() {
        let zero = Instant::now();
        let at = |ms| zero + Duration::from_millis(ms);
        let watch = watch(vec![at(5), at(10), at(90), at(95)]);
        assert_eq!(watch.first_answer_after(at(10)), Some(Duration::from_millis(80)));
        assert_eq!(watch.first_answer_after(at(95)), None);
        assert_eq!(watch.longest_silence(at(0), at(100)), Duration::from_millis(80));
        assert_eq!(watch.longest_silence(at(91), at(200)), Duration::from_millis(105));
        assert_eq!(watch.longest_silence(at(20), at(40)), Duration::from_millis(20));
    }
}
