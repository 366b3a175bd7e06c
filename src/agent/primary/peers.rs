//! Connections of one protected guest to its shadows' hosts: one reader and one writer thread each, connecting
//! again for as long as the shadow is wanted.

use std::io::{BufWriter, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vmsync::message::{TargetBody, TargetMessage};
use vmsync::wire::{Decoder, WireError};

use crate::capture::priority::Brisk;
use crate::transport::Security;
use crate::transport::stream::{Closer, ReadHalf, Stream, WriteHalf};

const BACKOFF_MIN: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_millis(1_000);
/// More is not worth waiting for.
const TOGETHER_BYTES: usize = 64 << 10;

#[derive(Debug)]
pub enum PeerEvent {
    Connected,
    Received(TargetMessage),
    /// What the other side sends is no message of ours.
    Unreadable(WireError),
    /// That many more bytes were handed to the kernel.
    Written(u64),
    Lost(String),
}

/// Called on the connection's threads; must not block.
pub type PeerSink = Arc<dyn Fn(PeerEvent) + Send + Sync>;

/// A shadow's host we keep a connection to. Dropped, the connection ends.
pub struct PeerLink {
    shared: Arc<Shared>,
}

struct Shared {
    wanted: AtomicBool,
    /// Somebody waits for what passes: see [`Brisk`].
    hurries: Arc<AtomicBool>,
    connection: Mutex<Option<Connection>>,
}

struct Connection {
    closer: Closer,
    outgoing: Sender<Arc<[u8]>>,
}

impl PeerLink {
    pub fn start(
        security: &Security,
        host: &str,
        addr: SocketAddr,
        hurries: Arc<AtomicBool>,
        sink: PeerSink,
    ) -> std::io::Result<Self> {
        let shared = Arc::new(Shared { wanted: AtomicBool::new(true), hurries, connection: Mutex::new(None) });
        let (of_thread, host, security) = (Arc::clone(&shared), host.to_owned(), security.clone());
        std::thread::Builder::new()
            .name(format!("peer-{host}"))
            .spawn(move || keep_connected(&of_thread, &security, &host, addr, &sink))?;
        Ok(Self { shared })
    }

    /// Queues bytes. The queue is bounded by whoever counts [`PeerEvent::Written`]. Nothing happens while the
    /// connection is down: `Lost` has been or will be told.
    pub fn send(&self, bytes: Arc<[u8]>) {
        if let Some(connection) = self.shared.connection().as_ref() {
            let _ = connection.outgoing.send(bytes);
        }
    }

    /// Ends the present connection; a new one is opened.
    pub fn reset(&self) {
        if let Some(connection) = self.shared.connection().as_ref() {
            connection.closer.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for PeerLink {
    fn drop(&mut self) {
        self.shared.wanted.store(false, Ordering::Release);
        self.reset();
    }
}

impl Shared {
    fn connection(&self) -> std::sync::MutexGuard<'_, Option<Connection>> {
        self.connection.lock().unwrap_or_else(|p| p.into_inner())
    }

    fn wanted(&self) -> bool {
        self.wanted.load(Ordering::Acquire)
    }
}

fn keep_connected(shared: &Arc<Shared>, security: &Security, host: &str, addr: SocketAddr, sink: &PeerSink) {
    let mut backoff = BACKOFF_MIN;
    let mut reported = String::new();
    while shared.wanted() {
        let reason = match Stream::connect(security, addr, host) {
            Ok(stream) => {
                backoff = BACKOFF_MIN;
                tracing::info!(host, %addr, "connected");
                run_connection(shared, stream, sink)
            }
            Err(error) => format!("cannot connect to {host} ({addr}): {error}"),
        };
        if !shared.wanted() {
            break;
        }
        if reason != reported {
            tracing::warn!(host, reason, "no connection to a shadow's host");
            reported.clone_from(&reason);
        }
        sink(PeerEvent::Lost(reason));
        std::thread::sleep(backoff);
        backoff = (backoff * 2).min(BACKOFF_MAX);
    }
}

/// Serves one connection until it ends; why it ended.
fn run_connection(shared: &Arc<Shared>, stream: Stream, sink: &PeerSink) -> String {
    let (reading, writing, closer) = match stream.split(None) {
        Ok(halves) => halves,
        Err(error) => return format!("cannot use the connection: {error}"),
    };
    let (outgoing, queued) = channel();
    let (writer_sink, hurries) = (Arc::clone(sink), Arc::clone(&shared.hurries));
    let writer = std::thread::Builder::new().name("peer-writer".into()).spawn(move || {
        write_all(writing, &queued, &hurries, &writer_sink);
    });
    let Ok(writer) = writer else { return "cannot start a thread".into() };
    *shared.connection() = Some(Connection { closer, outgoing });
    if shared.wanted() {
        sink(PeerEvent::Connected);
    }
    let reason = read_all(reading, &shared.hurries, sink);
    // Dropping the queue's sender ends the writer; shutting the socket down ends a write that waits.
    if let Some(connection) = shared.connection().take() {
        connection.closer.shutdown(Shutdown::Both);
    }
    let _ = writer.join();
    reason
}

fn read_all(mut stream: ReadHalf, hurries: &AtomicBool, sink: &PeerSink) -> String {
    let mut decoder = Decoder::<TargetBody>::new();
    let mut buffer = vec![0u8; 64 << 10];
    let mut brisk = Brisk::this_thread();
    loop {
        brisk.look(hurries.load(Ordering::Relaxed));
        match stream.read(&mut buffer) {
            Ok(0) => return "the connection was closed".into(),
            Ok(read) => decoder.push(&buffer[..read]),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return format!("the connection broke: {error}"),
        }
        loop {
            match decoder.next() {
                Ok(Some(message)) => sink(PeerEvent::Received(message)),
                Ok(None) => break,
                Err(error) => {
                    let reason = format!("the shadow's host sent something wrong: {error}");
                    sink(PeerEvent::Unreadable(error));
                    return reason;
                }
            }
        }
    }
}

/// What an epoch is made of leaves together: each small write costs both hosts more than its bytes.
fn write_all(stream: WriteHalf, queued: &Receiver<Arc<[u8]>>, hurries: &AtomicBool, sink: &PeerSink) {
    let mut brisk = Brisk::this_thread();
    let mut stream = BufWriter::with_capacity(TOGETHER_BYTES, stream);
    while let Ok(first) = queued.recv() {
        brisk.look(hurries.load(Ordering::Relaxed));
        match write_with_more(&mut stream, first, queued) {
            Ok(written) => sink(PeerEvent::Written(written)),
            Err(_) => {
                // The reader tells the reason; ending the socket makes it look. What is left unwritten stays so.
                let (stream, _) = stream.into_parts();
                return stream.shutdown(Shutdown::Both);
            }
        }
    }
}

/// Writes these bytes, and what else is queued already; how many bytes that was.
fn write_with_more(
    stream: &mut BufWriter<WriteHalf>,
    first: Arc<[u8]>,
    queued: &Receiver<Arc<[u8]>>,
) -> std::io::Result<u64> {
    let mut written = 0;
    let mut next = Some(first);
    while let Some(bytes) = next {
        stream.write_all(&bytes)?;
        written += bytes.len();
        next = if written < TOGETHER_BYTES { queued.try_recv().ok() } else { None };
    }
    stream.flush()?;
    Ok(written as u64)
}
