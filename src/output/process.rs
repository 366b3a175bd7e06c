//! The gate process: takes a guest's frames from QEMU, keeps them as `vmsync::output::Gate` says, gives them back.
//!
//! ```text
//! control (agent) --orders--> +------+ --release streams--> QEMU
//! capture streams (QEMU) ---> | loop |
//!                             +------+ --words--> agent
//! ```
//! It reads what QEMU writes at once, whatever else is the matter: QEMU waits for it with the guest's processor in its
//! hands. When the agent is gone it opens, unless consistency goes first, and passes frames on until QEMU closes the
//! sockets: a new agent takes the filters out and starts a gate of its own.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use nix::sys::socket::MsgFlags;
use vmsync::output::{Fate, Gate, GateLimits, Mark, is_bare_ack};

use super::wire::{self, Figures, Item, Order, Setting, Splitter, Word};
use crate::capture::{companion, priority};

/// Over its life; a gate that has had so many is replaced.
pub(super) const MAX_NICS: usize = 64;
const READ_BYTES: usize = 256 << 10;
/// For QEMU to take; beyond, frames are dropped.
const MAX_UNSENT_BYTES: usize = 64 << 20;
/// Waiting times that the figures are made of.
const SAMPLES: usize = 4096;
/// The time between cuts follows what the figures say of the traffic.
const FIGURES_EVERY: Duration = Duration::from_millis(200);
/// How long after its agent's last word it opens when that has ended: a host that loses power ends both at once, though not in one moment.
const ORPHAN_OPENS_AFTER: Duration = Duration::from_millis(100);
/// An agent that said nothing for so long stands still: it pings several times within that.
const UNHEARD_AFTER: Duration = Duration::from_millis(100);
/// Looks that must have been in vain as well, so far apart: this process itself may have stood still.
const LOOK_EVERY: Duration = Duration::from_millis(20);
const LOOKS: u32 = 3;
/// After [`Order::End`], for QEMU to take the rest.
const END_WITHIN: Duration = Duration::from_millis(500);

struct Nic {
    capture: Option<OwnedFd>,
    release: OwnedFd,
    splitter: Splitter,
    unsent: VecDeque<Box<[u8]>>,
    /// Bytes of the first of them that are sent.
    sent: usize,
    unsent_bytes: usize,
}

struct Process {
    control: Option<OwnedFd>,
    nics: Vec<Nic>,
    gate: Gate<Box<[u8]>>,
    started: Instant,
    age: Option<Duration>,
    orphan_since: Option<Instant>,
    /// When the agent said something last, and how often we have looked in vain since.
    heard_at: Instant,
    looks: u32,
    look_at: Instant,
    /// It opened by itself, and the agent has not been told.
    untold: Option<Word>,
    ends_by: Option<Instant>,
    figures_at: Instant,
    held_for_us: VecDeque<u32>,
    told: Figures,
    lost: u64,
    /// Frames that left after they had waited and were no bare acknowledgements.
    data_total: u64,
}

/// `virtshadowd gate`: runs until nobody needs it.
pub fn main() -> ! {
    let control = companion::socket(c"virtshadow-gate");
    // Signals that are sent to a service as a whole are ignored: the end of the agent is what counts.
    // SAFETY: no handler is installed.
    unsafe {
        libc::signal(libc::SIGTERM, libc::SIG_IGN);
        libc::signal(libc::SIGHUP, libc::SIG_IGN);
        libc::signal(libc::SIGINT, libc::SIG_IGN);
    }
    // A guest's packets wait while we wait for a processor, and QEMU may.
    priority::hurry();
    // The last to be ended when memory is short. Without the right to it, as others.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-900");
    let code = match Process::new(control).run() {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("virtshadowd gate: {error}");
            1
        }
    };
    std::process::exit(code)
}

impl Process {
    fn new(control: OwnedFd) -> Self {
        let now = Instant::now();
        let limits = GateLimits::default();
        Self {
            control: Some(control),
            nics: Vec::new(),
            gate: Gate::new(MAX_NICS, limits),
            started: now,
            age: limits.age,
            orphan_since: None,
            heard_at: now,
            looks: 0,
            look_at: now,
            untold: None,
            ends_by: None,
            figures_at: now + FIGURES_EVERY,
            held_for_us: VecDeque::new(),
            told: Figures::default(),
            lost: 0,
            data_total: 0,
        }
    }

    fn run(mut self) -> io::Result<()> {
        let mut buffer = vec![0; READ_BYTES];
        loop {
            self.timers(Instant::now());
            let idle = self.nics.iter().all(|nic| nic.capture.is_none() && nic.unsent.is_empty());
            if idle && (self.control.is_none() || self.ends_by.is_some()) {
                return Ok(());
            }
            if self.ends_by.is_some_and(|by| Instant::now() >= by) {
                return Ok(());
            }
            let ready = self.wait()?;
            if ready.control {
                self.orders();
            }
            for number in ready.captures {
                self.read(number, &mut buffer)?;
            }
            self.nics.iter_mut().for_each(Nic::write);
        }
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    fn timers(&mut self, now: Instant) {
        if self.gate.opens_at().is_some_and(|at| self.now() >= at) {
            self.open_by_itself(false);
        }
        if self.is_impatient() && now >= self.look_at {
            self.look_at = now + LOOK_EVERY;
            self.looks += 1;
            if now >= self.heard_at + UNHEARD_AFTER && self.looks > LOOKS {
                self.open_by_itself(true);
            }
        }
        // The agent must know, however full its socket was.
        if self.untold.as_ref().is_some_and(|word| self.tell(word)) {
            self.untold = None;
        }
        let orphan = self.orphan_since.is_some_and(|since| now >= since + ORPHAN_OPENS_AFTER);
        if orphan && self.age.is_some() && self.gate.is_holding() {
            self.open();
        }
        if now >= self.figures_at {
            self.figures_at = now + FIGURES_EVERY;
            self.tell_figures();
        }
    }

    /// With availability first, output does not wait for an agent that stands still.
    fn is_impatient(&self) -> bool {
        self.control.is_some() && self.age.is_some() && self.gate.is_holding()
    }

    fn open_by_itself(&mut self, unheard: bool) {
        self.open();
        self.untold = Some(Word::Opened { unheard });
    }

    fn wait(&self) -> io::Result<Ready> {
        let pollfd = |fd: RawFd, events| libc::pollfd { fd, events, revents: 0 };
        // poll(2) passes over negative numbers.
        let fd_of = |fd: &Option<OwnedFd>| fd.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        let mut polled = vec![pollfd(fd_of(&self.control), libc::POLLIN)];
        for nic in &self.nics {
            polled.push(pollfd(fd_of(&nic.capture), libc::POLLIN));
            let release = if nic.unsent.is_empty() { -1 } else { nic.release.as_raw_fd() };
            polled.push(pollfd(release, libc::POLLOUT));
        }
        let now = Instant::now();
        let mut next = self.control.as_ref().map(|_| self.figures_at);
        let opens_at = self.gate.opens_at().map(|at| self.started + at);
        let orphan_at = self.orphan_since.filter(|_| self.gate.is_holding() && self.age.is_some());
        let orphan_opens_at = orphan_at.map(|since| since + ORPHAN_OPENS_AFTER);
        let look_at = self.is_impatient().then_some(self.look_at);
        for at in [opens_at, orphan_opens_at, look_at, self.ends_by].into_iter().flatten() {
            next = Some(next.map_or(at, |next| next.min(at)));
        }
        let timeout_ms = next.map_or(-1, |at| at.saturating_duration_since(now).as_millis() as i32 + 1);
        // SAFETY: the array is live and its length is passed.
        if unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as _, timeout_ms) } < 0 {
            let error = io::Error::last_os_error();
            return if error.kind() == io::ErrorKind::Interrupted { Ok(Ready::default()) } else { Err(error) };
        }
        let captures = polled[1..].chunks(2).enumerate().filter(|(_, nic)| nic[0].revents != 0);
        Ok(Ready { control: polled[0].revents != 0, captures: captures.map(|(number, _)| number).collect() })
    }

    fn orders(&mut self) {
        while let Some(control) = &self.control {
            match wire::receive::<Order>(control.as_fd()) {
                Ok(Some((order, fds))) => {
                    (self.heard_at, self.looks) = (Instant::now(), 0);
                    self.order(order, fds);
                }
                Ok(None) => return,
                Err(_) => {
                    self.control = None;
                    // The end of a large process takes a while: since its last word, not since its socket closed.
                    self.orphan_since = Some(self.heard_at);
                }
            }
        }
    }

    fn order(&mut self, order: Order, mut fds: Vec<OwnedFd>) {
        match order {
            Order::Nic { after } => {
                if let (Some(release), Some(capture)) = (fds.pop(), fds.pop())
                    && self.nics.len() < MAX_NICS
                {
                    // One that is plugged into a guest whose output is held is held from its first frame.
                    self.gate.mark(self.nics.len(), Mark::new(after));
                    self.nics.push(Nic::new(capture, release));
                }
            }
            Order::Set(Setting { age_ms }) => {
                self.age = age_ms.map(Duration::from_millis);
                self.gate.set_limits(GateLimits { age: self.age, ..GateLimits::default() });
            }
            Order::Hold => self.gate.hold(),
            Order::Open => self.open(),
            Order::Release(mark) => {
                let now = self.now();
                let (nics, held_for_us) = (&mut self.nics, &mut self.held_for_us);
                let (mut lost, mut data) = (0, 0);
                self.gate.release(now, Mark::new(mark), |number, frame, held| {
                    if held_for_us.len() >= SAMPLES {
                        held_for_us.pop_front();
                    }
                    held_for_us.push_back(u32::try_from(held.as_micros()).unwrap_or(u32::MAX));
                    data += u64::from(!is_bare_ack(wire::ethernet(&frame)));
                    lost += u64::from(!nics[number].leaves(frame));
                });
                self.lost += lost;
                self.data_total += data;
            }
            Order::Ping(number) => drop(self.tell(&Word::Here(number))),
            Order::End => {
                self.open();
                self.ends_by = Some(Instant::now() + END_WITHIN);
            }
        }
    }

    fn open(&mut self) {
        let nics = &mut self.nics;
        let mut lost = 0;
        self.gate.open(|number, frame| lost += u64::from(!nics[number].leaves(frame)));
        self.lost += lost;
    }

    /// Reads what there is on one capture stream.
    fn read(&mut self, number: usize, buffer: &mut [u8]) -> io::Result<()> {
        let now = self.now();
        let nic = &mut self.nics[number];
        let Some(capture) = &nic.capture else { return Ok(()) };
        let length = match nix::sys::socket::recv(capture.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT) {
            Ok(0) | Err(nix::Error::ECONNRESET) => {
                nic.capture = None;
                return Ok(());
            }
            Ok(length) => length,
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let (gate, mut waits, mut lost) = (&mut self.gate, None, 0);
        let mut splitter = std::mem::take(&mut nic.splitter);
        let outcome = splitter.feed(&buffer[..length], |item| match item {
            Item::Mark(mark) => gate.mark(number, mark),
            Item::Frame(frame) => {
                let bytes = frame.len();
                match gate.frame(now, number, frame, bytes) {
                    Fate::Leaves(frame) => lost += u64::from(!nic.leaves(frame)),
                    Fate::Waits { first_since: Some(mark) } => waits = Some(mark),
                    Fate::Waits { first_since: None } | Fate::Dropped => {}
                }
            }
        });
        nic.splitter = splitter;
        self.lost += lost;
        outcome.map_err(io::Error::other)?;
        if let Some(mark) = waits {
            self.tell(&Word::Waits(mark.get()));
        }
        Ok(())
    }

    /// The agent may be slow to listen; what it misses it does not need to live, and neither do we. False: it was not told,
    /// and may be later.
    fn tell(&self, word: &Word) -> bool {
        let told = |control: &OwnedFd| wire::send(control.as_fd(), word, &[]).is_ok();
        self.control.as_ref().is_none_or(told)
    }

    fn tell_figures(&mut self) {
        let stats = self.gate.stats();
        let mut sorted: Vec<u32> = self.held_for_us.iter().copied().collect();
        sorted.sort_unstable();
        let at = |percent: usize| sorted.get(sorted.len() * percent / 100).or(sorted.last()).copied().unwrap_or(0);
        let figures = Figures {
            held_frames: stats.held_frames as u64,
            held_bytes: stats.held_bytes as u64,
            released_total: stats.released_total,
            data_total: self.data_total,
            dropped_total: stats.dropped_total + self.lost,
            hold_us: [at(50), at(99), at(100)].map(u64::from),
        };
        if figures != self.told {
            self.told = figures;
            self.tell(&Word::Figures(figures));
        }
    }
}

#[derive(Default)]
struct Ready {
    control: bool,
    captures: Vec<usize>,
}

impl Nic {
    fn new(capture: OwnedFd, release: OwnedFd) -> Self {
        Self {
            capture: Some(capture),
            release,
            splitter: Splitter::default(),
            unsent: VecDeque::new(),
            sent: 0,
            unsent_bytes: 0,
        }
    }

    /// Queues a frame for QEMU; false: QEMU takes too little, the frame is lost.
    fn leaves(&mut self, frame: Box<[u8]>) -> bool {
        let fits = self.unsent_bytes + frame.len() <= MAX_UNSENT_BYTES;
        if fits {
            self.unsent_bytes += frame.len();
            self.unsent.push_back(frame);
        }
        fits
    }

    /// Writes as much as QEMU takes.
    fn write(&mut self) {
        const AT_ONCE: usize = 64;
        while !self.unsent.is_empty() {
            let skip = |number: usize| if number == 0 { self.sent } else { 0 };
            let parts: Vec<io::IoSlice<'_>> = (self.unsent.iter().take(AT_ONCE).enumerate())
                .map(|(number, frame)| io::IoSlice::new(&frame[skip(number)..]))
                .collect();
            let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
            let sent = match nix::sys::socket::sendmsg::<()>(self.release.as_raw_fd(), &parts, &[], flags, None) {
                Ok(sent) => sent,
                Err(nix::Error::EAGAIN | nix::Error::EINTR) => return,
                // QEMU is gone, or its filter is.
                Err(_) => {
                    self.unsent.clear();
                    (self.sent, self.unsent_bytes) = (0, 0);
                    return;
                }
            };
            self.sent += sent;
            while let Some(first) = self.unsent.front().filter(|first| first.len() <= self.sent) {
                self.sent -= first.len();
                self.unsent_bytes -= first.len();
                self.unsent.pop_front();
            }
        }
    }
}
