//! A stream between two agents, read by one thread and written by another, encrypted or not.
//!
//! ```text
//! reading thread: socket --ciphertext--> [session] --> plaintext      the lock on the session is held for one record's
//! writing thread: plaintext --> [session] --ciphertext--> socket      work, never while the socket is waited for
//! ```

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustls::{ClientConnection, Connection, ServerConnection};

use super::tls::{PeerIdentity, PeerName, Security};
use super::{CONNECT_WITHIN, tune};

/// A peer that has not shaken hands within this time is none.
const HANDSHAKE_WITHIN: Duration = Duration::from_secs(5);
/// Read from the socket at a time: several records.
const CIPHERTEXT_BYTES: usize = 128 << 10;
/// Encrypted under one hold of the lock.
const PLAINTEXT_BYTES: usize = 64 << 10;

/// A connection that is ready for messages.
pub struct Stream {
    socket: TcpStream,
    session: Option<Arc<Mutex<Connection>>>,
}

/// Ends a stream from anywhere.
#[derive(Debug)]
pub struct Closer(TcpStream);

impl Closer {
    pub fn shutdown(&self, how: Shutdown) {
        // It may have ended by itself.
        let _ = self.0.shutdown(how);
    }
}

impl Stream {
    /// Opens a stream to the agent of the host `host` and makes sure that it is that one.
    pub fn connect(security: &Security, addr: SocketAddr, host: &str) -> io::Result<Self> {
        let socket = TcpStream::connect_timeout(&addr, CONNECT_WITHIN)?;
        tune(&socket)?;
        let session = match security {
            Security::Plain => None,
            Security::Tls(credentials) => {
                let name = PeerName::Name(host.to_owned()).server_name()?;
                let session = ClientConnection::new(Arc::clone(&credentials.client), name).map_err(io::Error::other)?;
                Some(session.into())
            }
        };
        Self::shake_hands(socket, session)
    }

    /// Makes a stream of an accepted connection.
    pub fn accept(security: &Security, socket: TcpStream) -> io::Result<Self> {
        tune(&socket)?;
        let session = match security {
            Security::Plain => None,
            Security::Tls(credentials) => {
                Some(ServerConnection::new(Arc::clone(&credentials.server)).map_err(io::Error::other)?.into())
            }
        };
        Self::shake_hands(socket, session)
    }

    fn shake_hands(mut socket: TcpStream, session: Option<Connection>) -> io::Result<Self> {
        let Some(mut session) = session else { return Ok(Self { socket, session: None }) };
        socket.set_read_timeout(Some(HANDSHAKE_WITHIN))?;
        socket.set_write_timeout(Some(HANDSHAKE_WITHIN))?;
        while session.is_handshaking() || session.wants_write() {
            session.complete_io(&mut socket)?;
        }
        socket.set_read_timeout(None)?;
        socket.set_write_timeout(None)?;
        Ok(Self { socket, session: Some(Arc::new(Mutex::new(session))) })
    }

    pub fn peer(&self) -> PeerIdentity {
        match &self.session {
            None => PeerIdentity::Unknown,
            Some(session) => PeerIdentity::shown(lock(session).peer_certificates()),
        }
    }

    /// The halves for two threads, and a way to end both. `write_within`: a peer that takes nothing for this long
    /// loses the connection.
    pub fn split(self, write_within: Option<Duration>) -> io::Result<(ReadHalf, WriteHalf, Closer)> {
        self.socket.set_write_timeout(write_within)?;
        let (reading, writing) = (self.socket.try_clone()?, self.socket.try_clone()?);
        let reading = ReadHalf {
            socket: reading,
            session: self.session.clone(),
            ciphertext: Vec::new(),
            unread: 0..0,
            ended: false,
        };
        let writing = WriteHalf { socket: writing, session: self.session, ciphertext: Vec::new() };
        Ok((reading, writing, Closer(self.socket)))
    }
}

fn lock(session: &Mutex<Connection>) -> MutexGuard<'_, Connection> {
    session.lock().unwrap_or_else(PoisonError::into_inner)
}

pub struct ReadHalf {
    socket: TcpStream,
    session: Option<Arc<Mutex<Connection>>>,
    ciphertext: Vec<u8>,
    /// What the session has not had yet of what was read from the socket.
    unread: Range<usize>,
    ended: bool,
}

impl ReadHalf {
    /// How long one read may wait; `None`: for ever.
    pub fn set_timeout(&self, within: Option<Duration>) -> io::Result<()> {
        self.socket.set_read_timeout(within)
    }

    /// Gets more from the socket.
    fn fill(&mut self) -> io::Result<()> {
        self.ciphertext.resize(CIPHERTEXT_BYTES, 0);
        let read = self.socket.read(&mut self.ciphertext)?;
        self.unread = 0..read;
        self.ended = read == 0;
        Ok(())
    }
}

impl Read for ReadHalf {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let Some(session) = self.session.clone() else { return self.socket.read(into) };
        loop {
            let mut held = lock(&session);
            match held.reader().read(into) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                outcome => return outcome,
            }
            if !self.unread.is_empty() || self.ended {
                // With nothing left this tells the session of the end, which then tells a clean one from a cut.
                let mut left = &self.ciphertext[self.unread.clone()];
                self.unread.start += held.read_tls(&mut left)?;
                held.process_new_packets().map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
                continue;
            }
            drop(held);
            self.fill()?;
        }
    }
}

pub struct WriteHalf {
    socket: TcpStream,
    session: Option<Arc<Mutex<Connection>>>,
    ciphertext: Vec<u8>,
}

impl WriteHalf {
    pub fn shutdown(&self, how: Shutdown) {
        let _ = self.socket.shutdown(how);
    }

    /// Ends the stream in an orderly way: the peer sees that nothing was cut off.
    pub fn finish(mut self) {
        if let Some(session) = self.session.clone() {
            let mut held = lock(&session);
            held.send_close_notify();
            let _ = drain(&mut held, &mut self.ciphertext);
            drop(held);
            let _ = self.socket.write_all(&self.ciphertext);
        }
        self.shutdown(Shutdown::Both);
    }
}

impl Write for WriteHalf {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        let Some(session) = &self.session else { return self.socket.write(from) };
        let mut held = lock(session);
        let written = held.writer().write(&from[..from.len().min(PLAINTEXT_BYTES)])?;
        drain(&mut held, &mut self.ciphertext)?;
        drop(held);
        // In the order of encryption: only this half writes to the socket.
        let sent = self.socket.write_all(&self.ciphertext);
        self.ciphertext.clear();
        sent.map(|()| written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.socket.flush()
    }
}

fn drain(session: &mut Connection, into: &mut Vec<u8>) -> io::Result<()> {
    while session.wants_write() {
        session.write_tls(into)?;
    }
    Ok(())
}
