//! One primary's connection: messages in on one thread, bytes out on another.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};

use vmsync::message::{RefuseCode, SourceBody, SourceMessage, TargetBody};
use vmsync::target::ConnId;
use vmsync::units::{Epoch, Term};
use vmsync::wire::{Decoder, encode};

use super::Shadows;
use super::slot::Slot;
use crate::api::control::GuestRecord;
use crate::capture::priority::Brisk;
use crate::transport::PeerIdentity;
use crate::transport::stream::{Closer, ReadHalf, Stream, WriteHalf};

/// A new connection must say whom it is for within this time.
const HELLO_WITHIN: Duration = Duration::from_secs(10);
/// A primary that takes no answer for this long loses the connection.
const WRITE_WITHIN: Duration = Duration::from_secs(3);
/// Messages queued towards a primary; hashes are paced by it, everything else is small.
const QUEUED_MESSAGES: usize = 1024;

/// What a slot keeps of a connection: a way to answer.
pub(super) struct Answers {
    queue: SyncSender<Arc<[u8]>>,
    queued: Arc<AtomicUsize>,
    closer: Closer,
}

impl Answers {
    /// Queues bytes; a primary that does not take its answers loses the connection.
    pub(super) fn send(&self, bytes: Arc<[u8]>) {
        match self.queue.try_send(bytes) {
            Ok(()) => drop(self.queued.fetch_add(1, Ordering::Relaxed)),
            Err(TrySendError::Disconnected(_)) => {}
            Err(TrySendError::Full(_)) => {
                tracing::warn!("a primary does not take its answers; closing the connection");
                self.closer.shutdown(Shutdown::Both);
            }
        }
    }

    /// Whether a lot of answers is still waiting to leave: whoever makes many should wait.
    pub(super) fn is_busy(&self) -> bool {
        self.queued.load(Ordering::Relaxed) > QUEUED_MESSAGES / 2
    }

    /// Ends reading at once; the writer sends what is queued, then ends the stream.
    pub(super) fn close(&self) {
        self.closer.shutdown(Shutdown::Read);
    }
}

/// Who is at the other end.
struct Peer {
    from: SocketAddr,
    identity: PeerIdentity,
}

/// Serves one connection until it ends.
pub(super) fn serve(shadows: &Arc<Shadows>, socket: TcpStream, from: SocketAddr, number: u64) {
    let conn = ConnId(number);
    let stream = match Stream::accept(&shadows.shared.security, socket) {
        Ok(stream) => stream,
        // A witness only wanted to know whether this host answers.
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return,
        Err(error) => {
            tracing::warn!(%from, %error, "sync port: no connection");
            return;
        }
    };
    let identity = stream.peer();
    let (reading, writing, closer) = match stream.split(Some(WRITE_WITHIN)) {
        Ok(halves) => halves,
        Err(error) => {
            tracing::debug!(%from, %error, "connection ended at once");
            return;
        }
    };
    let (queue, received) = sync_channel(QUEUED_MESSAGES);
    let queued = Arc::new(AtomicUsize::new(0));
    let waiting = Arc::clone(&queued);
    let writer =
        std::thread::Builder::new().name("shadow-writer".into()).spawn(move || write_all(writing, &received, &waiting));
    if writer.is_err() {
        return;
    }
    let answers = Answers { queue, queued, closer };
    let peer = Peer { from, identity };
    if let Some(slot) = read_all(shadows, reading, &peer, conn, answers) {
        slot.disconnected(conn);
    }
}

fn write_all(mut stream: WriteHalf, received: &Receiver<Arc<[u8]>>, waiting: &AtomicUsize) {
    let mut brisk = Brisk::for_all_there_is();
    while let Ok(bytes) = received.recv() {
        brisk.look(true);
        waiting.fetch_sub(1, Ordering::Relaxed);
        if stream.write_all(&bytes).is_err() {
            break;
        }
    }
    stream.finish();
}

/// Reads until the end; the slot that the connection belonged to.
fn read_all(
    shadows: &Arc<Shadows>,
    mut stream: ReadHalf,
    peer: &Peer,
    conn: ConnId,
    answers: Answers,
) -> Option<Arc<Slot>> {
    let mut decoder = Decoder::<SourceBody>::new();
    let mut buffer = vec![0u8; 256 << 10];
    let mut slot: Option<Arc<Slot>> = None;
    let mut answers = Some(answers);
    let greeted_by = Instant::now() + HELLO_WITHIN;
    let _ = stream.set_timeout(Some(HELLO_WITHIN));
    let mut brisk = Brisk::for_all_there_is();
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return slot,
            Ok(read) => decoder.push(&buffer[..read]),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(_) => return slot,
        }
        loop {
            brisk.look(true);
            match (decoder.next(), &slot) {
                (Ok(Some(message)), Some(slot)) => slot.received(conn, message),
                (Ok(Some(message)), None) => {
                    let found = find_slot(shadows, &message, peer);
                    match (found, answers.take()) {
                        (Ok(found), Some(answers)) => {
                            let _ = stream.set_timeout(None);
                            found.connected(conn, answers);
                            found.received(conn, message);
                            slot = Some(found);
                        }
                        (Err(refusal), Some(answers)) => {
                            answers.send(refusal);
                            return None;
                        }
                        (_, None) => return None,
                    }
                }
                (Ok(None), _) => break,
                (Err(error), Some(slot)) => {
                    slot.unreadable(conn, error);
                    return Some(Arc::clone(slot));
                }
                (Err(error), None) => {
                    tracing::warn!(from = %peer.from, %error, "not a primary; closing the connection");
                    if let Some(answers) = answers {
                        answers.send(refusal(RefuseCode::Protocol, Term::default(), &error.to_string()));
                    }
                    return None;
                }
            }
        }
        if slot.is_none() && Instant::now() > greeted_by {
            return None;
        }
    }
}

fn find_slot(shadows: &Arc<Shadows>, message: &SourceMessage, peer: &Peer) -> Result<Arc<Slot>, Arc<[u8]>> {
    let SourceBody::Hello(hello) = &message.body else {
        return Err(refusal(RefuseCode::Protocol, message.term, "the first message must be Hello"));
    };
    let uuid = hello.guest.to_string();
    if let Err(reason) = may_write(shadows, &uuid, message.term.get(), &hello.source_host, peer) {
        tracing::warn!(from = %peer.from, guest = hello.domain, reason, "a shadow's stream is refused");
        return Err(refusal(RefuseCode::Protocol, message.term, &reason));
    }
    shadows.slot(&uuid).ok_or_else(|| {
        // A former primary must learn that the guest runs here by now, or that another term is known.
        if let Some(known) = shadows.known_term(&uuid).filter(|known| *known > message.term.get()) {
            let text = format!("{} knows term {known} of guest {}", shadows.shared.host, hello.domain);
            return refusal_knowing(RefuseCode::StaleTerm, message.term, &text, Term::new(known));
        }
        tracing::debug!(from = %peer.from, uuid, "no shadow of this guest is kept here");
        let text = format!("{} does not keep a shadow of guest {}", shadows.shared.host, hello.domain);
        refusal(RefuseCode::UnknownGuest, message.term, &text)
    })
}

/// Only its primary's host writes a shadow, and only as itself. A stream of an older term passes: it is told so.
fn may_write(shadows: &Shadows, uuid: &str, term: u64, host: &str, peer: &Peer) -> Result<(), String> {
    peer.identity.speaks_for(host)?;
    match shadows.records.get(uuid) {
        Some(GuestRecord { primary: Some(primary), term: known, .. }) if term >= known && primary != host => {
            Err(format!("{host} is not the primary of this guest, {primary} is"))
        }
        _ => Ok(()),
    }
}

fn refusal(code: RefuseCode, term: Term, text: &str) -> Arc<[u8]> {
    refusal_knowing(code, term, text, Term::default())
}

fn refusal_knowing(code: RefuseCode, term: Term, text: &str, known_term: Term) -> Arc<[u8]> {
    encode(term, Epoch::NONE, &TargetBody::Refuse { code, text: text.into(), known_term }).bytes
}
