//! The sync protocol's messages as bytes: header, checksum, incremental decoder. Bodies are in [`crate::message`].
//!
//! ```text
//! offset  size  field (little-endian)
//!      0     4  magic "VSHW"
//!      4     2  protocol version; magic and version stay where they are in all versions
//!      6     1  kind of the body
//!      7     1  0
//!      8     8  term of the sender's primaryship (source), or the highest known (target)
//!     16     8  epoch the body belongs to, or the last one cut; 0: none
//!     24     4  length of the body
//!     28     4  0
//!     32     8  xxh3-64 of the body, seeded with the xxh3-64 of bytes 0..32
//!     40        body
//! ```
//! TLS below protects against people; the checksum finds faults of memory, of programs and of us, on the way from
//! one process's buffers to the other's, and names each message in the chain that a `Commit` seals.

use std::marker::PhantomData;
use std::sync::Arc;

use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use crate::bytes::{Put, Reader, Truncated};
use crate::layout::LayoutError;
use crate::units::{Epoch, Term};

/// Version of the sync protocol that this build speaks; both sides must speak the same.
pub const PROTOCOL_VERSION: u16 = 3;
/// Bytes before the body of every message.
pub const HEADER_BYTES: usize = 40;

const MAGIC: [u8; 4] = *b"VSHW";
const CHECKSUM_AT: usize = 32;

/// A message and what its header says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message<B> {
    pub term: Term,
    pub epoch: Epoch,
    /// As in the header; part of the chain that a `Commit` seals.
    pub checksum: u64,
    pub body: B,
}

/// A message ready to be sent, to one peer or to many.
#[derive(Debug, Clone)]
pub struct Encoded {
    pub bytes: Arc<[u8]>,
    pub checksum: u64,
}

/// Why a byte stream is not a stream of messages. The connection it came from is of no more use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    #[error("what came is not the virt-shadow sync protocol (it begins with {0:02x?}): check the address and port")]
    NotOurs([u8; 4]),
    #[error("this side speaks protocol {ours}, the other {theirs}: run the same version of virtshadowd on both hosts")]
    Version { ours: u16, theirs: u16 },
    #[error("unknown message kind {0}")]
    UnknownKind(u8),
    #[error("message of kind {kind} claims {len} bytes; at most {max} are allowed")]
    TooLong { kind: u8, len: usize, max: usize },
    #[error("message of kind {kind} was damaged on the way (checksum)")]
    Checksum { kind: u8 },
    #[error("message of kind {kind}: {what}")]
    Body { kind: u8, what: &'static str },
    #[error("the other side's RAM layout: {0}")]
    Layout(#[from] LayoutError),
}

/// Bodies of the messages of one direction. Implemented by [`crate::message::SourceBody`] and
/// [`crate::message::TargetBody`].
pub trait Body: Sized {
    /// Longest body of this kind, bytes; `None` for a kind that this direction does not have.
    fn max_len(kind: u8) -> Option<usize>;
    /// Parses a body of a kind for which `max_len` is not `None`.
    fn read(kind: u8, bytes: &[u8]) -> Result<Self, WireError>;
    /// Appends the body to `out` and returns its kind.
    fn write(&self, out: &mut Vec<u8>) -> u8;
}

/// Encodes one message.
pub fn encode<B: Body>(term: Term, epoch: Epoch, body: &B) -> Encoded {
    encode_with(term, epoch, |out| body.write(out))
}

/// Encodes one message whose body `write` appends; `write` returns its kind.
pub(crate) fn encode_with(term: Term, epoch: Epoch, write: impl FnOnce(&mut Vec<u8>) -> u8) -> Encoded {
    let mut out = vec![0; HEADER_BYTES];
    let kind = write(&mut out);
    let len = (out.len() - HEADER_BYTES) as u32; // every kind's longest body is far below 4 GiB
    let mut header = Vec::with_capacity(HEADER_BYTES);
    header.extend_from_slice(&MAGIC);
    header.put_u16(PROTOCOL_VERSION);
    header.put_u8(kind);
    header.put_u8(0);
    header.put_u64(term.get());
    header.put_u64(epoch.get());
    header.put_u32(len);
    header.put_u32(0);
    let checksum = xxh3_64_with_seed(&out[HEADER_BYTES..], xxh3_64(&header));
    header.put_u64(checksum);
    out[..HEADER_BYTES].copy_from_slice(&header);
    Encoded { bytes: out.into(), checksum }
}

/// Chains the checksums of the messages between two commits, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Chain {
    /// Messages so far.
    pub count: u32,
    pub checksum: u64,
}

impl Chain {
    /// Adds the message with that checksum.
    pub fn add(&mut self, checksum: u64) {
        self.count = self.count.saturating_add(1);
        self.checksum = xxh3_64_with_seed(&checksum.to_le_bytes(), self.checksum);
    }
}

/// Turns received bytes into messages. Holds one incomplete message at most, if its driver takes messages out with
/// [`next`](Self::next) until there is none after each [`push`](Self::push).
#[derive(Debug)]
pub struct Decoder<B> {
    buffer: Vec<u8>,
    /// Bytes at the front of `buffer` that were taken out.
    taken: usize,
    body: PhantomData<fn() -> B>,
}

impl<B> Default for Decoder<B> {
    fn default() -> Self {
        Self { buffer: Vec::new(), taken: 0, body: PhantomData }
    }
}

impl<B: Body> Decoder<B> {
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds what was received.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.taken > 0 {
            self.buffer.drain(..self.taken);
            self.taken = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// Bytes held for the message that is not complete yet.
    pub fn held_bytes(&self) -> usize {
        self.buffer.len() - self.taken
    }

    /// The next complete message; `Ok(None)`: more bytes are needed. After an error the stream cannot go on.
    #[allow(clippy::should_implement_trait)] // an iterator's None would mean "ended"
    pub fn next(&mut self) -> Result<Option<Message<B>>, WireError> {
        let bytes = &self.buffer[self.taken..];
        let Some(header) = parse_header::<B>(bytes)? else { return Ok(None) };
        let Some(body) = bytes.get(HEADER_BYTES..HEADER_BYTES + header.len) else { return Ok(None) };
        let seed = xxh3_64(&bytes[..CHECKSUM_AT]);
        if xxh3_64_with_seed(body, seed) != header.checksum {
            return Err(WireError::Checksum { kind: header.kind });
        }
        let body = B::read(header.kind, body)?;
        self.taken += HEADER_BYTES + header.len;
        Ok(Some(Message { term: header.term, epoch: header.epoch, checksum: header.checksum, body }))
    }
}

struct Header {
    kind: u8,
    term: Term,
    epoch: Epoch,
    len: usize,
    checksum: u64,
}

/// Checks as much of the header as is there, so that garbage is found at its first bytes and a length is never
/// waited for that would not be accepted.
fn parse_header<B: Body>(bytes: &[u8]) -> Result<Option<Header>, WireError> {
    if let Some(magic) = bytes.first_chunk::<4>()
        && *magic != MAGIC
    {
        return Err(WireError::NotOurs(*magic));
    }
    if let Some([.., low, high]) = bytes.first_chunk::<6>() {
        let theirs = u16::from_le_bytes([*low, *high]);
        if theirs != PROTOCOL_VERSION {
            return Err(WireError::Version { ours: PROTOCOL_VERSION, theirs });
        }
    }
    if bytes.len() < HEADER_BYTES {
        return Ok(None);
    }
    let kind = bytes[6];
    let fields = |Truncated| WireError::Body { kind, what: "header is cut short" };
    let mut reader = Reader::new(&bytes[8..HEADER_BYTES]);
    let (term, epoch) = (reader.u64().map_err(fields)?, reader.u64().map_err(fields)?);
    let len = reader.u32().map_err(fields)? as usize;
    let reserved = reader.u32().map_err(fields)?;
    let checksum = reader.u64().map_err(fields)?;
    let max = B::max_len(kind).ok_or(WireError::UnknownKind(kind))?;
    if len > max {
        return Err(WireError::TooLong { kind, len, max });
    }
    if reserved != 0 || bytes[7] != 0 {
        return Err(WireError::Body { kind, what: "reserved header bytes are not 0" });
    }
    Ok(Some(Header { kind, term: Term::new(term), epoch: Epoch::new(epoch), len, checksum }))
}
