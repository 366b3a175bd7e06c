//! The guard: a small process beside the agent that keeps our promise to the guest when the agent cannot.
//!
//! ```text
//! agent --- seqpacket socket --- guard (child of the agent, own process: a SIGSTOP of the agent does not stop it)
//!   Watch{slot, pid} + read end  ->     keeps a copy of the read end of QEMU's pipe
//!   Begin{slot, bound}      ->          from now on QEMU may stand still, waiting for a reader of that pipe; its
//!                                       threads that take the order and write are preferred ([`super::priority`])
//!   Check{slot}             ->  Ended{fired}: the state has been read whole, the guest is about to run
//!   End{slot}               ->  Ended{fired}; the threads run as others do again
//!   Inject{pid, what}       ->  Injected + descriptor     (in a child of its own: a hung ptrace is killed)
//! ```
//! Outside a cut the guard reads every pipe empty: a command that reaches QEMU late, when nobody waits for it any
//! more, must not hold the guest. `Begin` leaves the pipe to the agent; if `End` does not come within the bound, the
//! guard reads again: QEMU finishes its command and starts the guest, and whatever the agent read of that cut is
//! void (`fired`). If the agent dies, the socket closes, the guard ends, and QEMU, with no reader left, gets EPIPE
//! and starts the guest as well.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::process::{Child, Command};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

use super::inject::Target;
use super::{companion, priority};
use crate::disk::line::{LOOK_EVERY, Line};
use crate::hypervisor::process::pidfd_open;

/// An injection takes about half a millisecond; one that takes this long is ended.
const INJECT_WITHIN: Duration = Duration::from_millis(1_500);
/// The guard answers at once; an agent that waits this long replaces it.
const ANSWER_WITHIN: Duration = Duration::from_millis(2_500);
const MAX_SLOTS: usize = 4096;
const MESSAGE_BYTES: usize = 512;
/// Of one pipe in a row, so that a QEMU that never stops writing does not keep the others waiting.
const READS_AT_ONCE: usize = 64;

/// One guest's pipe in the guard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Slot(u32);

#[derive(Debug, thiserror::Error)]
pub enum GuardError {
    #[error("the guard process does not answer: {0}")]
    Lost(#[source] io::Error),
    #[error("{0}")]
    Injection(String),
    #[error("cannot start the guard process: {0}")]
    Start(#[source] io::Error),
}

/// The agent's end.
pub struct Guard {
    inner: Mutex<Inner>,
}

struct Inner {
    socket: OwnedFd,
    child: Child,
    next_slot: u32,
    /// An answer did not come, or not the one that was asked for: later ones would be taken for others.
    out_of_step: bool,
}

impl Inner {
    fn answer(&mut self) -> Result<(Message, String, Option<OwnedFd>), GuardError> {
        let received = receive(&self.socket);
        self.out_of_step |= received.is_err();
        received.map_err(GuardError::Lost)
    }

    fn unexpected(&mut self, what: &str) -> GuardError {
        self.out_of_step = true;
        GuardError::Lost(io::Error::other(format!("its answer is not the one to {what}")))
    }

    fn new_slot(&mut self) -> u32 {
        let slot = self.next_slot;
        self.next_slot = slot.wrapping_add(1);
        slot
    }
}

/// What an injection brought.
#[derive(Debug)]
pub enum Injected {
    Userfaultfd(OwnedFd),
    Pipe { read_end: OwnedFd, path_fd: i32 },
    Closed,
}

#[derive(Debug, Clone, Copy)]
pub enum Injection {
    Userfaultfd,
    Pipe,
    Close(i32),
}

impl Guard {
    /// Starts the guard: this executable again, with the word `guard`; `program` overrides it in tests.
    pub fn start() -> Result<Self, GuardError> {
        Self::start_program(Command::new("/proc/self/exe"))
    }

    pub fn start_program(command: Command) -> Result<Self, GuardError> {
        let (socket, child) = companion::start(command, "guard").map_err(GuardError::Start)?;
        let inner = Inner { socket, child, next_slot: 0, out_of_step: false };
        let within = nix::sys::time::TimeVal::new(ANSWER_WITHIN.as_secs() as _, ANSWER_WITHIN.subsec_micros() as _);
        let guard = Self { inner: Mutex::new(inner) };
        nix::sys::socket::setsockopt(&guard.lock().socket, nix::sys::socket::sockopt::ReceiveTimeout, &within)
            .map_err(|error| GuardError::Start(error.into()))?;
        Ok(guard)
    }

    /// Whether the guard process still runs and answers what it is asked.
    pub fn is_alive(&self) -> bool {
        let mut inner = self.lock();
        !inner.out_of_step && inner.child.try_wait().is_ok_and(|status| status.is_none())
    }

    /// Process number, for logs and tests.
    pub fn pid(&self) -> u32 {
        self.lock().child.id()
    }

    /// Gives the guard a copy of the read end of a pipe that QEMU's process `pid` writes to.
    pub fn watch(&self, read_end: BorrowedFd, pid: i32) -> Result<Slot, GuardError> {
        let mut inner = self.lock();
        let slot = inner.new_slot();
        send(&inner.socket, Message::new(Op::Watch, slot, i64::from(pid)), Some(read_end)).map_err(GuardError::Lost)?;
        Ok(Slot(slot))
    }

    /// Has a disk's connection watched, and shut down if it does not get on; see [`crate::disk::line`].
    pub fn watch_line(&self, socket: impl AsFd, progress: impl AsFd) -> Result<Slot, GuardError> {
        let mut inner = self.lock();
        let slot = inner.new_slot();
        let tell = |op, fd: BorrowedFd| send(&inner.socket, Message::new(op, slot, 0), Some(fd));
        tell(Op::WatchProgress, progress.as_fd()).map_err(GuardError::Lost)?;
        tell(Op::WatchLine, socket.as_fd()).map_err(GuardError::Lost)?;
        Ok(Slot(slot))
    }

    pub fn unwatch(&self, slot: Slot) -> Result<(), GuardError> {
        send(&self.lock().socket, Message::new(Op::Unwatch, slot.0, 0), None).map_err(GuardError::Lost)
    }

    /// From now on, and for at most `bound`, QEMU may wait for us to read its pipe.
    pub fn begin(&self, slot: Slot, bound: Duration) -> Result<(), GuardError> {
        send(&self.lock().socket, Message::new(Op::Begin, slot.0, bound.as_micros() as i64), None)
            .map_err(GuardError::Lost)
    }

    /// True: the guard had to read the pipe; what we read of it is void.
    pub fn has_fired(&self, slot: Slot) -> Result<bool, GuardError> {
        self.ask_whether_fired(Op::Check, slot)
    }

    /// The cut is over. True: the guard had to read the pipe, perhaps after [`Self::has_fired`].
    pub fn end(&self, slot: Slot) -> Result<bool, GuardError> {
        self.ask_whether_fired(Op::End, slot)
    }

    fn ask_whether_fired(&self, op: Op, slot: Slot) -> Result<bool, GuardError> {
        let mut inner = self.lock();
        send(&inner.socket, Message::new(op, slot.0, 0), None).map_err(GuardError::Lost)?;
        let (message, _, _) = inner.answer()?;
        if (message.op, message.slot) != (Op::Ended as u32, slot.0) {
            return Err(inner.unexpected("this cut"));
        }
        Ok(message.value != 0)
    }

    /// Makes process `pid` perform a call, see [`super::inject`].
    pub fn inject(&self, pid: i32, injection: Injection) -> Result<Injected, GuardError> {
        let mut inner = self.lock();
        let (op, value) = match injection {
            Injection::Userfaultfd => (Op::InjectUserfaultfd, 0),
            Injection::Pipe => (Op::InjectPipe, 0),
            Injection::Close(fd) => (Op::InjectClose, i64::from(fd)),
        };
        send(&inner.socket, Message::new(op, pid as u32, value), None).map_err(GuardError::Lost)?;
        let (message, text, fd) = inner.answer()?;
        match message.op {
            op if op == Op::Injected as u32 => {}
            op if op == Op::InjectFailed as u32 => return Err(GuardError::Injection(text)),
            _ => return Err(inner.unexpected("an injection")),
        }
        match (injection, fd) {
            (Injection::Userfaultfd, Some(fd)) => Ok(Injected::Userfaultfd(fd)),
            (Injection::Pipe, Some(read_end)) => Ok(Injected::Pipe { read_end, path_fd: message.value as i32 }),
            (Injection::Close(_), None) => Ok(Injected::Closed),
            _ => Err(inner.unexpected("this injection")),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let inner = self.inner.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner());
        // A stopped guard would never notice that its socket closed. Killing it releases whatever it held.
        let _ = inner.child.kill();
        let _ = inner.child.wait();
    }
}

#[derive(Clone, Copy)]
#[repr(u32)]
enum Op {
    Watch = 1,
    Unwatch,
    Begin,
    End,
    Ended,
    InjectUserfaultfd,
    InjectPipe,
    InjectClose,
    Injected,
    InjectFailed,
    WatchProgress,
    WatchLine,
    Check,
}

/// 16 bytes in host order (both ends are the same program on the same host), then, for failures, a text.
#[derive(Clone, Copy)]
struct Message {
    op: u32,
    slot: u32,
    value: i64,
}

impl Message {
    fn new(op: Op, slot: u32, value: i64) -> Self {
        Self { op: op as u32, slot, value }
    }

    fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&self.op.to_ne_bytes());
        bytes[4..8].copy_from_slice(&self.slot.to_ne_bytes());
        bytes[8..].copy_from_slice(&self.value.to_ne_bytes());
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        Some(Self {
            op: u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?),
            slot: u32::from_ne_bytes(bytes.get(4..8)?.try_into().ok()?),
            value: i64::from_ne_bytes(bytes.get(8..16)?.try_into().ok()?),
        })
    }
}

fn send(socket: &OwnedFd, message: Message, fd: Option<BorrowedFd>) -> io::Result<()> {
    send_text(socket, message, "", fd)
}

fn send_text(socket: &OwnedFd, message: Message, text: &str, fd: Option<BorrowedFd>) -> io::Result<()> {
    let head = message.to_bytes();
    let text = &text.as_bytes()[..text.len().min(MESSAGE_BYTES - head.len())];
    let raw = fd.map(|fd| [fd.as_raw_fd()]);
    let rights = raw.as_ref().map(|fds| [ControlMessage::ScmRights(fds)]);
    let control = rights.as_ref().map_or(&[][..], |r| &r[..]);
    let parts = [io::IoSlice::new(&head), io::IoSlice::new(text)];
    sendmsg::<()>(socket.as_raw_fd(), &parts, control, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

fn receive(socket: &OwnedFd) -> io::Result<(Message, String, Option<OwnedFd>)> {
    loop {
        match receive_with(socket, MsgFlags::empty()) {
            // As when this process was stopped and goes on: the answer is still to come.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            outcome => return outcome,
        }
    }
}

fn receive_with(socket: &OwnedFd, flags: MsgFlags) -> io::Result<(Message, String, Option<OwnedFd>)> {
    let mut bytes = [0u8; MESSAGE_BYTES];
    let mut control = nix::cmsg_space!(RawFd);
    let (length, fd) = {
        let mut parts = [io::IoSliceMut::new(&mut bytes)];
        let flags = flags | MsgFlags::MSG_CMSG_CLOEXEC;
        let received = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags)?;
        let mut fd = None;
        for message in received.cmsgs().map_err(io::Error::from)? {
            if let ControlMessageOwned::ScmRights(fds) = message {
                // SAFETY: the kernel has just made these descriptors for us; nobody else owns them.
                fd = fds.first().map(|raw| unsafe { OwnedFd::from_raw_fd(*raw) });
            }
        }
        (received.bytes, fd)
    };
    if length == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let message = Message::from_bytes(&bytes[..length])
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "short message"))?;
    Ok((message, String::from_utf8_lossy(&bytes[16..length]).into_owned(), fd))
}

/// QEMU's threads that a cut waits for: the one that hears the monitor, and the main thread, whose number is that of the
/// process. Both stay as long as the process.
struct Writer {
    threads: Vec<libc::pid_t>,
    /// Becomes readable when the process ends: its numbers may then be another's.
    process: Option<OwnedFd>,
}

/// What QEMU names its monitors' thread.
const MONITOR_THREAD: &str = "IO mon_iothread";

fn monitor_thread(pid: libc::pid_t) -> Option<libc::pid_t> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).ok()?;
    let named = |thread: &std::fs::DirEntry| {
        std::fs::read_to_string(thread.path().join("comm")).is_ok_and(|name| name.trim_end() == MONITOR_THREAD)
    };
    threads.flatten().find(named)?.file_name().to_str()?.parse().ok()
}

impl Writer {
    fn new(pid: libc::pid_t) -> Self {
        let threads = [Some(pid), monitor_thread(pid)].into_iter().flatten().collect();
        let writer = Self { threads, process: pidfd_open(pid, 0).ok() };
        // An agent that died in the middle of a cut together with its guard.
        writer.usual();
        writer
    }

    fn runs(&self) -> bool {
        let Some(process) = &self.process else { return false };
        let mut polled = libc::pollfd { fd: process.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one live element.
        unsafe { libc::poll(&mut polled, 1, 0) == 0 }
    }

    fn prefer(&self) {
        if self.runs() {
            self.threads.iter().copied().for_each(priority::prefer);
        }
    }

    fn usual(&self) {
        if self.runs() {
            self.threads.iter().copied().for_each(priority::usual);
        }
    }
}

/// However the guard or the watching ends, nothing is left behind.
impl Drop for Writer {
    fn drop(&mut self) {
        self.usual();
    }
}

/// A watched pipe in the guard process.
struct Watched {
    read_end: OwnedFd,
    writer: Writer,
    /// Until when the agent may read the pipe; `None`: we do.
    deadline: Option<Instant>,
    fired: bool,
    /// There may be bytes that we have not read.
    unread: bool,
}

impl Watched {
    fn check_deadline(&mut self, now: Instant) {
        if self.deadline.is_some_and(|deadline| deadline <= now) {
            self.fired = true;
            self.is_ours();
        }
    }

    /// The agent has ended reading it, or must.
    fn is_ours(&mut self) {
        self.deadline = None;
        self.unread = true;
        self.writer.usual();
    }

    fn is_to_be_read(&self) -> bool {
        self.unread && self.deadline.is_none()
    }

    /// Reads and forgets what the pipe holds: QEMU goes on.
    fn discard(&mut self) {
        let mut buffer = [0u8; 65536];
        for _ in 0..READS_AT_ONCE {
            // The read end does not block.
            match nix::unistd::read(&self.read_end, &mut buffer) {
                Ok(read) if read > 0 => {}
                Err(nix::Error::EINTR) => {}
                _ => return self.unread = false,
            }
        }
    }
}

/// The pipes, and what happens in them: between two commands a pipe has no writer, which is told once.
struct Pipes {
    news: Epoll,
    watched: BTreeMap<u32, Watched>,
}

/// Stands for the agent's socket among the pipes' slots.
const FROM_AGENT: u64 = u64::MAX;

impl Pipes {
    fn new(socket: &OwnedFd) -> io::Result<Self> {
        let news = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        news.add(socket, EpollEvent::new(EpollFlags::EPOLLIN, FROM_AGENT))?;
        Ok(Self { news, watched: BTreeMap::new() })
    }

    fn watch(&mut self, slot: u32, read_end: OwnedFd, pid: libc::pid_t) -> io::Result<()> {
        self.unwatch(slot);
        let once = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
        self.news.add(&read_end, EpollEvent::new(once, u64::from(slot)))?;
        let writer = Writer::new(pid);
        self.watched.insert(slot, Watched { read_end, writer, deadline: None, fired: false, unread: true });
        Ok(())
    }

    fn unwatch(&mut self, slot: u32) {
        if let Some(pipe) = self.watched.remove(&slot) {
            // The agent has the same read end: closing ours would not end the news of it.
            let _ = self.news.delete(&pipe.read_end);
        }
    }

    fn discard(&mut self) {
        self.watched.values_mut().filter(|pipe| pipe.is_to_be_read()).for_each(Watched::discard);
    }

    /// Waits until `until` for an order or news of a pipe.
    fn wait(&mut self, until: Option<Instant>) -> io::Result<()> {
        let now = Instant::now();
        let more = self.watched.values().any(Watched::is_to_be_read);
        let timeout_ms = match until.map(|at| at.saturating_duration_since(now).as_millis() as i32 + 1) {
            _ if more => 0,
            None => -1,
            Some(ms) => ms,
        };
        let mut events = [EpollEvent::empty(); 64];
        let timeout = EpollTimeout::try_from(timeout_ms).unwrap_or(EpollTimeout::ZERO);
        let ready = match self.news.wait(&mut events, timeout) {
            Err(nix::Error::EINTR) => 0,
            outcome => outcome?,
        };
        for event in &events[..ready] {
            if let Some(pipe) = u32::try_from(event.data()).ok().and_then(|slot| self.watched.get_mut(&slot)) {
                pipe.unread = true;
            }
        }
        Ok(())
    }
}

/// `virtshadowd guard`: runs until the agent's socket closes.
pub fn main() -> ! {
    // The guard must not outlive a kill of its agent for long, but it is the closing of the socket, not a signal, that tells
    // it: it may be in the middle of a release.
    let socket = companion::socket(c"virtshadow-grd");
    priority::hurry();
    let code = match serve(&socket) {
        Ok(()) => 0,
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => 0,
        Err(error) => {
            eprintln!("virtshadowd guard: {error}");
            1
        }
    };
    std::process::exit(code)
}

fn serve(socket: &OwnedFd) -> io::Result<()> {
    let mut pipes = Pipes::new(socket)?;
    let mut lines = Lines::default();
    loop {
        let now = Instant::now();
        lines.watched.retain(|_, line| !line.look(now));
        pipes.watched.values_mut().for_each(|pipe| pipe.check_deadline(now));
        pipes.discard();
        let deadline = pipes.watched.values().filter_map(|pipe| pipe.deadline).min();
        let look_at = (!lines.watched.is_empty()).then(|| now + LOOK_EVERY);
        pipes.wait([deadline, look_at].into_iter().flatten().min())?;
        // Orders first, all of them: a `Begin` was sent before the bytes that it keeps for the agent.
        loop {
            let (message, fd) = match receive_with(socket, MsgFlags::MSG_DONTWAIT) {
                Ok((message, _, fd)) => (message, fd),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            if let Some(fd) = lines.handle(message, fd) {
                handle(socket, &mut pipes, message, fd)?;
            }
        }
    }
}

/// Connections of disks in the guard process.
#[derive(Default)]
struct Lines {
    watched: BTreeMap<u32, Line>,
    /// What comes before a line's socket.
    progress: BTreeMap<u32, OwnedFd>,
}

impl Lines {
    /// Takes orders about lines; gives back the descriptor of others.
    fn handle(&mut self, message: Message, fd: Option<OwnedFd>) -> Option<Option<OwnedFd>> {
        let slot = message.slot;
        if message.op == Op::WatchProgress as u32 {
            if let Some(fd) = fd.filter(|_| self.watched.len() < MAX_SLOTS) {
                self.progress.insert(slot, fd);
            }
        } else if message.op == Op::WatchLine as u32 {
            if let (Some(socket), Some(progress)) = (fd, self.progress.remove(&slot)) {
                self.watched.insert(slot, Line::new(socket, progress));
            }
        } else {
            if message.op == Op::Unwatch as u32 {
                self.watched.remove(&slot);
            }
            return Some(fd);
        }
        None
    }
}

fn handle(socket: &OwnedFd, pipes: &mut Pipes, message: Message, fd: Option<OwnedFd>) -> io::Result<()> {
    let slot = message.slot;
    let watched = &mut pipes.watched;
    match message.op {
        op if op == Op::Watch as u32 => {
            if let Some(read_end) = fd.filter(|_| watched.len() < MAX_SLOTS) {
                pipes.watch(slot, read_end, message.value as libc::pid_t)?;
            }
        }
        op if op == Op::Unwatch as u32 => pipes.unwatch(slot),
        op if op == Op::Begin as u32 => {
            if let Some(pipe) = watched.get_mut(&slot) {
                pipe.fired = false;
                pipe.writer.prefer();
                pipe.deadline = Some(Instant::now() + Duration::from_micros(message.value.max(0) as u64));
            }
        }
        op if op == Op::Check as u32 => {
            let fired = watched.get(&slot).is_none_or(|pipe| pipe.fired);
            send(socket, Message::new(Op::Ended, slot, i64::from(fired)), None)?;
        }
        op if op == Op::End as u32 => {
            let fired = watched.get_mut(&slot).is_none_or(|pipe| {
                pipe.is_ours();
                std::mem::take(&mut pipe.fired)
            });
            send(socket, Message::new(Op::Ended, slot, i64::from(fired)), None)?;
        }
        op if op == Op::InjectUserfaultfd as u32 || op == Op::InjectPipe as u32 || op == Op::InjectClose as u32 => {
            inject_in_child(socket, watched, message)?;
        }
        _ => {}
    }
    Ok(())
}

/// Runs an injection in a child, which answers the agent itself, and ends it if it hangs; the pipes stay watched.
fn inject_in_child(socket: &OwnedFd, watched: &mut BTreeMap<u32, Watched>, message: Message) -> io::Result<()> {
    // SAFETY: this process has one thread, so the child may do anything after fork.
    let child = unsafe { libc::fork() };
    if child < 0 {
        let text = format!("cannot fork: {}", io::Error::last_os_error());
        return send_text(socket, Message::new(Op::InjectFailed, 0, 0), &text, None);
    }
    if child == 0 {
        let sent = perform(socket, message);
        // SAFETY: ends the child without running the parent's destructors.
        unsafe { libc::_exit(i32::from(sent.is_err())) };
    }
    let deadline = Instant::now() + INJECT_WITHIN;
    loop {
        let mut status = 0;
        // SAFETY: `status` outlives the call.
        let ended = unsafe { libc::waitpid(child, &mut status, libc::WNOHANG) };
        if ended != 0 {
            return Ok(());
        }
        if Instant::now() > deadline {
            // SAFETY: our own child, not yet reaped, so the number is still its.
            unsafe {
                libc::kill(child, libc::SIGKILL);
                libc::waitpid(child, &mut status, 0);
            }
            let text = format!("making process {} call took over {} ms", message.slot, INJECT_WITHIN.as_millis());
            return send_text(socket, Message::new(Op::InjectFailed, 0, 0), &text, None);
        }
        let now = Instant::now();
        for pipe in watched.values_mut() {
            pipe.check_deadline(now);
            // Only those known to be void: a `Begin` may wait in the socket for the others.
            if pipe.fired {
                pipe.discard();
            }
        }
        std::thread::sleep(Duration::from_micros(50));
    }
}

fn perform(socket: &OwnedFd, message: Message) -> io::Result<()> {
    let pid = message.slot as i32;
    let failed = |text: String| send_text(socket, Message::new(Op::InjectFailed, 0, 0), &text, None);
    let target = match Target::open(pid) {
        Ok(target) => target,
        Err(error) => return failed(error.to_string()),
    };
    let outcome = match message.op {
        op if op == Op::InjectUserfaultfd as u32 => target.userfaultfd().map(|fd| (0, Some(fd))),
        op if op == Op::InjectPipe as u32 => target.pipe().map(|pipe| (pipe.path_fd, Some(pipe.read_end))),
        _ => target.close(message.value as i32).map(|()| (0, None)),
    };
    match outcome {
        Ok((value, fd)) => {
            let fd = fd.as_ref().map(AsFd::as_fd);
            send(socket, Message::new(Op::Injected, 0, i64::from(value)), fd)
        }
        Err(error) => failed(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::thread::JoinHandleExt;

    use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    use super::*;

    extern "C" fn nothing(_: libc::c_int) {}

    #[test]
    fn an_interrupted_wait_goes_on_for_its_answer() {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        // SAFETY: the handler does nothing.
        unsafe {
            let action = SigAction::new(SigHandler::Handler(nothing), SaFlags::empty(), SigSet::empty());
            sigaction(Signal::SIGUSR1, &action).unwrap();
        }
        let waiting = std::thread::spawn(move || receive(&ours).map(|(message, _, _)| message.value));
        for _ in 0..20 {
            // SAFETY: the thread has not been joined.
            unsafe { libc::pthread_kill(waiting.as_pthread_t(), libc::SIGUSR1) };
            std::thread::sleep(Duration::from_millis(1));
        }
        send(&theirs, Message::new(Op::Ended, 0, 7), None).unwrap();
        assert_eq!(waiting.join().unwrap().unwrap(), 7);
    }
}
