//! Serves one disk's copy to QEMU's mirror job: one socket, one connection, one thread.
//!
//! ```text
//! Waiting --QEMU connects--> Serving --end of the stream, error, shut down by the guard--> Ended
//! ```
//! Only the QEMU of the guest may connect. The thread reads one request at a time and nothing ahead, so that what waits
//! in the socket is what nobody works on (see [`super::line`]).
//!
//! A write is answered before it is made: the guest waits for the answer, and nobody has a use for the copy before the next
//! cut, which waits until it is made ([`Server::is_settled`]). One that fails then ends the mirror, as if it had been
//! refused, before any cut can take the copy for whole.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{MsgFlags, getsockopt, recv, sockopt::PeerCredentials};

use super::copy::DiskCopy;
use super::line::{STUCK_AFTER, waiting_bytes};
use super::proto::{self, Command, Errno, Negotiated, Request};
use crate::capture::guard::{Guard, Slot};

/// How long a cut waits for a write that was answered. None should be left by then: QEMU flushes when it stops the guest, and
/// a flush comes after the writes before it.
const SETTLED_WITHIN: Duration = Duration::from_millis(200);

/// State of a server's only connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    Waiting,
    Serving,
    /// And why.
    Ended(String),
}

/// Handle of a server; dropped, it ends.
pub struct Server {
    shared: Arc<Shared>,
    path: PathBuf,
}

struct Shared {
    copy: Arc<DiskCopy>,
    name: String,
    state: Mutex<State>,
    connection: Mutex<Option<Connection>>,
    /// What the guard looks at; see [`super::line`].
    progress: File,
    counted: Mutex<u64>,
    /// A write was answered and is not made yet.
    owed: Mutex<bool>,
    paid: Condvar,
    guard: Mutex<Arc<Guard>>,
}

struct Connection {
    socket: UnixStream,
    /// Of the guard that watches it.
    watched: Option<Slot>,
}

impl Server {
    /// Listens at `path` for a process of user `uid` whose number is `allowed`.
    pub fn start(
        path: &Path,
        uid: u32,
        allowed: impl Fn(i32) -> bool + Send + 'static,
        name: &str,
        copy: Arc<DiskCopy>,
        guard: Arc<Guard>,
    ) -> io::Result<Self> {
        let _ = fs::remove_file(path);
        let listener = UnixListener::bind(path)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
        std::os::unix::fs::chown(path, Some(uid), None)?;
        let shared = Arc::new(Shared {
            copy,
            name: name.to_owned(),
            state: Mutex::new(State::Waiting),
            connection: Mutex::new(None),
            progress: File::from(memfd_create(c"virt-shadow-progress", MFdFlags::MFD_CLOEXEC)?),
            counted: Mutex::new(0),
            owed: Mutex::new(false),
            paid: Condvar::new(),
            guard: Mutex::new(guard),
        });
        shared.count()?;
        shared.count()?;
        let server = Self { shared: Arc::clone(&shared), path: path.to_owned() };
        std::thread::Builder::new().name("disk-server".into()).spawn(move || {
            let outcome = shared.accept(&listener, allowed).and_then(|socket| shared.serve(socket));
            let reason = outcome.map_or_else(|error| error.to_string(), |()| "QEMU closed the connection".into());
            shared.end(reason);
        })?;
        Ok(server)
    }

    pub fn state(&self) -> State {
        lock(&self.shared.state).clone()
    }

    /// Whether every write that QEMU was told to be done is in the copy, and QEMU has no reason to have stopped mirroring:
    /// asked while the guest is stopped.
    pub fn is_settled(&self) -> bool {
        if !self.shared.wait_paid(SETTLED_WITHIN) {
            return false;
        }
        if *lock(&self.shared.state) != State::Serving || *lock(&self.shared.counted) % 2 == 1 {
            return false;
        }
        let connection = lock(&self.shared.connection);
        let Some(connection) = connection.as_ref() else { return false };
        let events = libc::POLLIN | libc::POLLRDHUP;
        let mut polled = libc::pollfd { fd: connection.socket.as_raw_fd(), events, revents: 0 };
        // SAFETY: one live element; returns at once.
        unsafe { libc::poll(&mut polled, 1, 0) == 0 }
    }

    /// Has the connection watched by another guard, after the former one was lost.
    pub fn set_guard(&self, guard: &Arc<Guard>) {
        *lock(&self.shared.guard) = Arc::clone(guard);
        if let Some(connection) = lock(&self.shared.connection).as_mut() {
            connection.watched = self.shared.watch(guard, &connection.socket);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.end("no longer wanted".into());
        // Wakes the thread if it still waits for QEMU.
        let _ = UnixStream::connect(&self.path);
        let _ = fs::remove_file(&self.path);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits for a request's head and leaves it in the socket.
fn peek_head(socket: &UnixStream) -> io::Result<[u8; proto::REQUEST_BYTES]> {
    let mut head = [0; proto::REQUEST_BYTES];
    loop {
        match recv(socket.as_raw_fd(), &mut head, MsgFlags::MSG_PEEK | MsgFlags::MSG_WAITALL) {
            Ok(peeked) if peeked == head.len() => return Ok(head),
            // A signal, in the middle of it too, or the end.
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) if waiting_bytes(socket)? < head.len() && is_at_end(socket) => {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn is_at_end(socket: &UnixStream) -> bool {
    let mut polled = libc::pollfd { fd: socket.as_raw_fd(), events: libc::POLLRDHUP, revents: 0 };
    // SAFETY: one live element; returns at once.
    unsafe { libc::poll(&mut polled, 1, 0) != 0 }
}

impl Shared {
    fn end(&self, reason: String) {
        {
            let mut state = lock(&self.state);
            if !matches!(*state, State::Ended(_)) {
                *state = State::Ended(reason);
            }
        }
        if let Some(connection) = lock(&self.connection).take() {
            let _ = connection.socket.shutdown(Shutdown::Both);
            if let Some(slot) = connection.watched {
                let _ = lock(&self.guard).unwatch(slot);
            }
        }
    }

    fn is_ended(&self) -> bool {
        matches!(*lock(&self.state), State::Ended(_))
    }

    /// A request is begun, or answered.
    fn count(&self) -> io::Result<()> {
        let mut counted = lock(&self.counted);
        *counted += 1;
        self.progress.write_all_at(&counted.to_ne_bytes(), 0)
    }

    fn set_owed(&self, owed: bool) {
        *lock(&self.owed) = owed;
        if !owed {
            self.paid.notify_all();
        }
    }

    fn wait_paid(&self, within: Duration) -> bool {
        let waited = self.paid.wait_timeout_while(lock(&self.owed), within, |owed| *owed);
        !*waited.unwrap_or_else(PoisonError::into_inner).0
    }

    fn accept(&self, listener: &UnixListener, allowed: impl Fn(i32) -> bool) -> io::Result<UnixStream> {
        loop {
            let (socket, _) = listener.accept()?;
            if self.is_ended() {
                return Err(io::Error::other("no longer wanted"));
            }
            let from = getsockopt(&socket, PeerCredentials)?.pid();
            if allowed(from) {
                return Ok(socket);
            }
            tracing::warn!(from, "a process that is not the guest's QEMU wanted to write its disk's copy");
        }
    }

    fn watch(&self, guard: &Guard, socket: &UnixStream) -> Option<Slot> {
        match guard.watch_line(socket, &self.progress) {
            Ok(slot) => Some(slot),
            Err(error) => {
                tracing::error!(%error, "the guard does not watch a disk's connection");
                None
            }
        }
    }

    fn serve(&self, mut socket: UnixStream) -> io::Result<()> {
        let watched = self.watch(&lock(&self.guard).clone(), &socket);
        *lock(&self.connection) = Some(Connection { socket: socket.try_clone()?, watched });
        if !self.negotiate(&mut socket)? {
            return Ok(());
        }
        {
            let mut state = lock(&self.state);
            if *state != State::Waiting {
                return Ok(());
            }
            *state = State::Serving;
        }
        let (mut buffer, mut before) = (Vec::new(), Duration::ZERO);
        loop {
            let head = peek_head(&socket)?;
            let begun = Instant::now();
            let answered = self.answer(&mut socket, &head, &mut buffer);
            // What is answered is made afterwards: the next request may find the connection shut down for that.
            let took = begun.elapsed();
            let longest = before.max(took);
            match answered {
                Ok(true) => before = took,
                Ok(false) => return Ok(()),
                Err(error) if longest >= STUCK_AFTER => {
                    let ms = longest.as_millis();
                    let reason = format!("writing took {ms} ms, and the guard lets the guest go on before: {error}");
                    return Err(io::Error::other(reason));
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// One request; false: it was the last one.
    fn answer(
        &self,
        socket: &mut UnixStream,
        head: &[u8; proto::REQUEST_BYTES],
        buffer: &mut Vec<u8>,
    ) -> io::Result<bool> {
        let request = proto::request(head).map_err(io::Error::other)?;
        if request.command == Command::Disconnect {
            return Ok(false);
        }
        // Begun before it is taken from the socket: at no moment is it neither waiting nor under way.
        self.count()?;
        let payload = if request.command == Command::Write { request.len as usize } else { 0 };
        buffer.resize(head.len() + payload, 0);
        socket.read_exact(buffer)?;
        if request.changes() && request.refusal(self.copy.len()).is_none() {
            self.set_owed(true);
            socket.write_all(&request.reply(None))?;
            self.count()?;
            let made = self.perform(&request, buffer);
            if let Err((_, reason)) = &made {
                self.end_serving(reason.clone());
            }
            self.set_owed(false);
            return made.map(|()| true).map_err(|(_, reason)| io::Error::other(reason));
        }
        let outcome = self.perform(&request, buffer);
        self.count()?;
        // The job ends with the first error: say why before QEMU knows, so that no cut takes the copy for whole.
        if let Err((errno, reason)) = outcome {
            self.end_serving(reason);
            return socket.write_all(&request.reply(Some(errno))).map(|()| false);
        }
        socket.write_all(&request.reply(None))?;
        if request.command == Command::Read {
            socket.write_all(&buffer[head.len()..])?;
        }
        Ok(true)
    }

    /// Unlike [`Shared::end`] it leaves the connection open for an answer.
    fn end_serving(&self, reason: String) {
        *lock(&self.state) = State::Ended(reason);
    }

    fn negotiate(&self, socket: &mut UnixStream) -> io::Result<bool> {
        socket.write_all(&proto::greeting())?;
        let mut flags = [0; 4];
        socket.read_exact(&mut flags)?;
        let no_zeroes = proto::client_flags(flags).map_err(io::Error::other)?;
        for _ in 0..proto::MAX_OPTIONS {
            let mut head = [0; proto::OPTION_HEAD_BYTES];
            socket.read_exact(&mut head)?;
            let (option, len) = proto::option_head(&head).map_err(io::Error::other)?;
            let mut data = vec![0; len as usize];
            socket.read_exact(&mut data)?;
            match proto::negotiate(option, &data, &self.name, self.copy.len(), no_zeroes) {
                Negotiated::Reply(bytes) => socket.write_all(&bytes)?,
                Negotiated::Transmission(bytes) => return socket.write_all(&bytes).map(|()| true),
                Negotiated::End(bytes) => return socket.write_all(&bytes).map(|()| false),
            }
        }
        Err(io::Error::other("too many options"))
    }

    /// `buffer`: the request's head, then what is to be written; or what was read.
    fn perform(&self, request: &Request, buffer: &mut Vec<u8>) -> Result<(), (Errno, String)> {
        if let Some(errno) = request.refusal(self.copy.len()) {
            return Err((errno, format!("QEMU asked for something it may not: {request:?}")));
        }
        let done = match request.command {
            Command::Read => {
                buffer.resize(proto::REQUEST_BYTES + request.len as usize, 0);
                self.copy.read(request.offset, &mut buffer[proto::REQUEST_BYTES..])
            }
            Command::Write => self.copy.write(request.offset, &buffer[proto::REQUEST_BYTES..]),
            Command::Trim | Command::WriteZeroes => self.copy.zero(request.offset, request.len.into()),
            // A copy here is worth nothing after a power cut: nothing of it needs to be flushed.
            Command::Flush | Command::Disconnect | Command::Other(_) => Ok(()),
        };
        done.map_err(|error| {
            let full = matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
            let errno = if full { Errno::NoSpace } else { Errno::Io };
            (errno, format!("{}: {error}", self.copy.path().display()))
        })
    }
}
