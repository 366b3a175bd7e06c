//! What a source and a target say to each other; [`crate::wire`] has the header.
//!
//! ```text
//! source                                  target
//!   Hello       --------------------------->      makes or finds the image, then:
//!               <--------------------------- Welcome (what its image holds) | Refuse
//!   HashRequest --------------------------->      only if the image may still hold useful pages
//!               <--------------------------- Hashes ..., HashesEnd
//!   Pages ...   --------------------------->      staged (or applied, before the first commit)
//!   DeviceState --------------------------->
//!   Commit      --------------------------->      verified, made durable:
//!               <--------------------------- Ack
//!   VerifyRequest ------------------------->      right behind a Commit
//!               <--------------------------- Hashes ..., HashesEnd
//!   Inbound ... --------------------------->      kept in memory until a commit covers them
//!   InboundCovered ------------------------>      right before that Commit
//!   Ping        --------------------------->
//!               <--------------------------- Pong
//!               <--------------------------- GaveUp (staging limit reached: the old commit is gone)
//! ```
//! Between two commits later `Pages` override earlier ones; pages of an epoch and pages read while the guest ran
//! look the same. All fields are little-endian; a text is a u16 length and UTF-8.

use crate::bytes::{Put, Reader, Truncated};
use crate::codec::MAX_FRAME_BYTES;
use crate::device_state::MAX_ENCODED_BYTES;
use crate::hashes::HashSeed;
use crate::inbound;
use crate::layout::{MAX_BLOCKS, MAX_NAME_BYTES, RamLayout};
use crate::units::{BlockIndex, Epoch, GuestUuid, Lineage, PageAddr, PageIndex, Term};
use crate::wire::{Body, Chain, Message, WireError};

/// Longest description in a [`Hello`], bytes.
pub const MAX_DESCRIPTION_BYTES: usize = 1 << 20;
/// Most hashes in one [`TargetBody::Hashes`].
pub const MAX_HASHES: usize = 8192;
/// Longest text in a message, bytes; longer ones are cut.
pub const MAX_TEXT_BYTES: usize = 4096;

/// From source to target.
pub type SourceMessage = Message<SourceBody>;
/// From target to source.
pub type TargetMessage = Message<TargetBody>;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceBody {
    Hello(Box<Hello>),
    /// An encoded page frame ([`crate::codec::frame`]).
    Pages(Vec<u8>),
    /// Encoded device state ([`crate::device_state`]).
    DeviceState(Vec<u8>),
    /// Ends the header's epoch: how many `Pages` and `DeviceState` messages came since the last commit (or since
    /// the Welcome), and the chain of their checksums.
    Commit(Chain),
    HashRequest {
        seed: HashSeed,
    },
    /// Asks for the hashes of all pages and of the device state as of the header's epoch, just committed.
    VerifyRequest {
        seed: HashSeed,
    },
    /// Frames on their way to the guest, in order, in the driver's form; see [`crate::inbound`]. Not part of any epoch.
    Inbound(Vec<Vec<u8>>),
    /// The epoch whose Commit comes next covers all `Inbound` frames but the newest so many.
    InboundCovered {
        all_but: u32,
    },
    Ping,
}

/// Opens a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    pub lineage: Lineage,
    pub guest: GuestUuid,
    /// Domain name, for people and for the shadow's domain.
    pub domain: String,
    /// Host name of the primary.
    pub source_host: String,
    pub layout: RamLayout,
    /// What the driver needs to make the shadow's domain (domain XML and the like); at most
    /// [`MAX_DESCRIPTION_BYTES`], opaque here.
    pub description: Vec<u8>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetBody {
    Welcome(ImageState),
    /// The header's epoch is committed.
    Ack,
    /// Hashes of neighbouring pages from `start` on; 0 for one that could not be read.
    Hashes {
        start: PageAddr,
        hashes: Vec<u64>,
    },
    /// All hashes were sent (header's epoch: that of the `VerifyRequest`, 0 for a `HashRequest`).
    HashesEnd {
        /// False if the target had to stop half-way; what was sent is right nevertheless.
        complete: bool,
        device_state_hash: u64,
    },
    Refuse {
        code: RefuseCode,
        text: String,
        known_term: Term,
    },
    Pong,
    /// The staging limit was reached: the commit that the shadow had is given up, it now receives a new first copy.
    GaveUp,
}

/// What a shadow's image holds when a session begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageState {
    /// Fresh: all pages are zero.
    Zero,
    /// Some former contents of the guest; worth comparing hashes, not promotable.
    Present,
    /// Exactly this epoch.
    Committed { lineage: Lineage, epoch: Epoch },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum RefuseCode {
    /// The other side speaks another protocol version.
    Version,
    /// The target knows a higher term: the sender is no longer primary.
    StaleTerm,
    /// This shadow was promoted, with `known_term`.
    Promoted,
    /// The target does not keep a shadow of this guest.
    UnknownGuest,
    /// The shadow's domain or memory could not be made.
    CannotPrepare,
    /// The source broke the protocol.
    Protocol,
    /// Changes came that were made against other contents than the target has. All pages must be compared.
    OutOfStep,
    /// A code of a later version.
    Other(u8),
}

mod kind {
    pub(super) const HELLO: u8 = 1;
    pub(super) const PAGES: u8 = 2;
    pub(super) const DEVICE_STATE: u8 = 3;
    pub(super) const COMMIT: u8 = 4;
    pub(super) const HASH_REQUEST: u8 = 5;
    pub(super) const VERIFY_REQUEST: u8 = 6;
    pub(super) const PING: u8 = 7;
    pub(super) const INBOUND: u8 = 8;
    pub(super) const INBOUND_COVERED: u8 = 9;
    pub(super) const WELCOME: u8 = 64;
    pub(super) const ACK: u8 = 65;
    pub(super) const HASHES: u8 = 66;
    pub(super) const HASHES_END: u8 = 67;
    pub(super) const REFUSE: u8 = 68;
    pub(super) const PONG: u8 = 69;
    pub(super) const GAVE_UP: u8 = 70;
}

pub(crate) const KIND_PAGES: u8 = kind::PAGES;
pub(crate) const KIND_DEVICE_STATE: u8 = kind::DEVICE_STATE;
pub(crate) const KIND_INBOUND: u8 = kind::INBOUND;

const MAX_LAYOUT_BYTES: usize = 2 + MAX_BLOCKS * (2 + MAX_NAME_BYTES + 8);
const MAX_HELLO_BYTES: usize = 8 + 16 + 2 * (2 + MAX_TEXT_BYTES) + 4 + MAX_LAYOUT_BYTES + 4 + MAX_DESCRIPTION_BYTES;

impl Body for SourceBody {
    fn max_len(kind: u8) -> Option<usize> {
        Some(match kind {
            kind::HELLO => MAX_HELLO_BYTES,
            kind::PAGES => MAX_FRAME_BYTES,
            kind::DEVICE_STATE => MAX_ENCODED_BYTES,
            kind::COMMIT => 12,
            kind::HASH_REQUEST | kind::VERIFY_REQUEST => 8,
            kind::INBOUND => inbound::MAX_BODY_BYTES,
            kind::INBOUND_COVERED => 4,
            kind::PING => 0,
            _ => return None,
        })
    }

    fn read(kind: u8, bytes: &[u8]) -> Result<Self, WireError> {
        read_whole(kind, bytes, |r| {
            Ok(match kind {
                kind::HELLO => Self::Hello(Box::new(read_hello(r)?)),
                kind::PAGES => Self::Pages(read_rest(r)?),
                kind::DEVICE_STATE => Self::DeviceState(read_rest(r)?),
                kind::COMMIT => Self::Commit(Chain { count: r.u32()?, checksum: r.u64()? }),
                kind::HASH_REQUEST => Self::HashRequest { seed: HashSeed::new(r.u64()?) },
                kind::VERIFY_REQUEST => Self::VerifyRequest { seed: HashSeed::new(r.u64()?) },
                kind::INBOUND => Self::Inbound(inbound::read(r).map_err(|what| WireError::Body { kind, what })?),
                kind::INBOUND_COVERED => Self::InboundCovered { all_but: r.u32()? },
                kind::PING => Self::Ping,
                other => return Err(WireError::UnknownKind(other).into()),
            })
        })
    }

    fn write(&self, out: &mut Vec<u8>) -> u8 {
        match self {
            Self::Hello(hello) => {
                out.put_u64(hello.lineage.get());
                out.extend_from_slice(hello.guest.as_bytes());
                out.put_text(short(&hello.domain));
                out.put_text(short(&hello.source_host));
                let layout = hello.layout.encode();
                out.put_u32(layout.len() as u32); // at most MAX_LAYOUT_BYTES
                out.extend_from_slice(&layout);
                out.put_u32(hello.description.len() as u32); // checked when the source was made
                out.extend_from_slice(&hello.description);
                kind::HELLO
            }
            Self::Pages(frame) => {
                out.extend_from_slice(frame);
                kind::PAGES
            }
            Self::DeviceState(state) => {
                out.extend_from_slice(state);
                kind::DEVICE_STATE
            }
            Self::Commit(chain) => {
                out.put_u32(chain.count);
                out.put_u64(chain.checksum);
                kind::COMMIT
            }
            Self::HashRequest { seed } => {
                out.put_u64(seed.get());
                kind::HASH_REQUEST
            }
            Self::VerifyRequest { seed } => {
                out.put_u64(seed.get());
                kind::VERIFY_REQUEST
            }
            Self::Inbound(frames) => {
                inbound::write(frames, out);
                kind::INBOUND
            }
            Self::InboundCovered { all_but } => {
                out.put_u32(*all_but);
                kind::INBOUND_COVERED
            }
            Self::Ping => kind::PING,
        }
    }
}

impl Body for TargetBody {
    fn max_len(kind: u8) -> Option<usize> {
        Some(match kind {
            kind::WELCOME => 17,
            kind::HASHES => 6 + 8 * MAX_HASHES,
            kind::HASHES_END => 9,
            kind::REFUSE => 1 + 8 + 2 + MAX_TEXT_BYTES,
            kind::ACK | kind::PONG | kind::GAVE_UP => 0,
            _ => return None,
        })
    }

    fn read(kind: u8, bytes: &[u8]) -> Result<Self, WireError> {
        read_whole(kind, bytes, |r| {
            Ok(match kind {
                kind::WELCOME => Self::Welcome(read_image_state(r)?),
                kind::ACK => Self::Ack,
                kind::HASHES => {
                    let start = PageAddr { page: PageIndex::new(r.u32()?), block: BlockIndex::new(r.u16()?) };
                    let mut hashes = Vec::with_capacity(r.rest().len() / 8);
                    while !r.rest().is_empty() {
                        hashes.push(r.u64()?);
                    }
                    Self::Hashes { start, hashes }
                }
                kind::HASHES_END => Self::HashesEnd { complete: r.u8()? != 0, device_state_hash: r.u64()? },
                kind::REFUSE => Self::Refuse {
                    code: RefuseCode::from_u8(r.u8()?),
                    known_term: Term::new(r.u64()?),
                    text: r.text()?,
                },
                kind::PONG => Self::Pong,
                kind::GAVE_UP => Self::GaveUp,
                other => return Err(WireError::UnknownKind(other).into()),
            })
        })
    }

    fn write(&self, out: &mut Vec<u8>) -> u8 {
        match self {
            Self::Welcome(state) => {
                let (tag, lineage, epoch) = match state {
                    ImageState::Zero => (0, 0, 0),
                    ImageState::Present => (1, 0, 0),
                    ImageState::Committed { lineage, epoch } => (2, lineage.get(), epoch.get()),
                };
                out.put_u8(tag);
                out.put_u64(lineage);
                out.put_u64(epoch);
                kind::WELCOME
            }
            Self::Ack => kind::ACK,
            Self::Hashes { start, hashes } => {
                out.put_u32(start.page.get());
                out.put_u16(start.block.get());
                hashes.iter().for_each(|hash| out.put_u64(*hash));
                kind::HASHES
            }
            Self::HashesEnd { complete, device_state_hash } => {
                out.put_u8(u8::from(*complete));
                out.put_u64(*device_state_hash);
                kind::HASHES_END
            }
            Self::Refuse { code, text, known_term } => {
                out.put_u8(code.to_u8());
                out.put_u64(known_term.get());
                out.put_text(short(text));
                kind::REFUSE
            }
            Self::Pong => kind::PONG,
            Self::GaveUp => kind::GAVE_UP,
        }
    }
}

impl RefuseCode {
    fn to_u8(self) -> u8 {
        match self {
            Self::Version => 1,
            Self::StaleTerm => 2,
            Self::Promoted => 3,
            Self::UnknownGuest => 4,
            Self::CannotPrepare => 5,
            Self::Protocol => 6,
            Self::OutOfStep => 7,
            Self::Other(code) => code,
        }
    }

    fn from_u8(code: u8) -> Self {
        match code {
            1 => Self::Version,
            2 => Self::StaleTerm,
            3 => Self::Promoted,
            4 => Self::UnknownGuest,
            5 => Self::CannotPrepare,
            6 => Self::Protocol,
            7 => Self::OutOfStep,
            other => Self::Other(other),
        }
    }
}

/// A body that is shorter than its fields, or wrong in another way.
enum BodyError {
    Truncated,
    Wire(WireError),
}

impl From<Truncated> for BodyError {
    fn from(Truncated: Truncated) -> Self {
        Self::Truncated
    }
}

impl From<WireError> for BodyError {
    fn from(error: WireError) -> Self {
        Self::Wire(error)
    }
}

fn read_whole<'a, T>(
    kind: u8,
    bytes: &'a [u8],
    read: impl FnOnce(&mut Reader<'a>) -> Result<T, BodyError>,
) -> Result<T, WireError> {
    let mut reader = Reader::new(bytes);
    match read(&mut reader) {
        Ok(_) if !reader.rest().is_empty() => Err(WireError::Body { kind, what: "body has bytes left over" }),
        Ok(value) => Ok(value),
        Err(BodyError::Truncated) => Err(WireError::Body { kind, what: "body is cut short" }),
        Err(BodyError::Wire(error)) => Err(error),
    }
}

fn read_rest(reader: &mut Reader<'_>) -> Result<Vec<u8>, BodyError> {
    Ok(reader.take(reader.rest().len())?.to_vec())
}

fn read_hello(r: &mut Reader<'_>) -> Result<Hello, BodyError> {
    let lineage = Lineage::new(r.u64()?);
    let guest = GuestUuid::from_bytes(r.array()?);
    let (domain, source_host) = (r.text()?, r.text()?);
    let layout_len = r.u32()? as usize;
    let layout = RamLayout::decode(r.take(layout_len)?).map_err(WireError::Layout)?;
    let description_len = r.u32()? as usize;
    if description_len > MAX_DESCRIPTION_BYTES {
        return Err(WireError::Body { kind: kind::HELLO, what: "description is too long" }.into());
    }
    let description = r.take(description_len)?.to_vec();
    Ok(Hello { lineage, guest, domain, source_host, layout, description })
}

fn read_image_state(r: &mut Reader<'_>) -> Result<ImageState, BodyError> {
    let (tag, lineage, epoch) = (r.u8()?, Lineage::new(r.u64()?), Epoch::new(r.u64()?));
    match tag {
        0 => Ok(ImageState::Zero),
        1 => Ok(ImageState::Present),
        2 => Ok(ImageState::Committed { lineage, epoch }),
        _ => Err(WireError::Body { kind: kind::WELCOME, what: "unknown image state" }.into()),
    }
}

fn short(text: &str) -> &str {
    let mut len = text.len().min(MAX_TEXT_BYTES);
    while !text.is_char_boundary(len) {
        len -= 1;
    }
    &text[..len]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::layout::RamBlock;
    use crate::wire::{Decoder, HEADER_BYTES, encode};

    fn hello() -> Hello {
        let blocks = vec![RamBlock { name: "pc.ram".into(), len_bytes: 8192 }];
        Hello {
            lineage: Lineage::new(77),
            guest: GuestUuid::from_bytes([3; 16]),
            domain: "gu\u{e9}st".into(),
            source_host: "h1".into(),
            layout: RamLayout::new(blocks).unwrap(),
            description: b"{}".to_vec(),
        }
    }

    fn source_bodies() -> Vec<SourceBody> {
        vec![
            SourceBody::Hello(Box::new(hello())),
            SourceBody::Pages(vec![1, 2, 3]),
            SourceBody::DeviceState(vec![]),
            SourceBody::Commit(Chain { count: 3, checksum: 9 }),
            SourceBody::HashRequest { seed: HashSeed::new(5) },
            SourceBody::VerifyRequest { seed: HashSeed::new(6) },
            SourceBody::Inbound(vec![vec![4; 60], vec![5]]),
            SourceBody::InboundCovered { all_but: 1 },
            SourceBody::Ping,
        ]
    }

    fn target_bodies() -> Vec<TargetBody> {
        vec![
            TargetBody::Welcome(ImageState::Zero),
            TargetBody::Welcome(ImageState::Present),
            TargetBody::Welcome(ImageState::Committed { lineage: Lineage::new(1), epoch: Epoch::new(2) }),
            TargetBody::Ack,
            TargetBody::Hashes { start: PageAddr::new(1, 2), hashes: vec![3, 4] },
            TargetBody::HashesEnd { complete: true, device_state_hash: 8 },
            TargetBody::Refuse { code: RefuseCode::StaleTerm, text: "no".into(), known_term: Term::new(4) },
            TargetBody::Pong,
            TargetBody::GaveUp,
        ]
    }

    fn stream<B: Body>(bodies: &[B]) -> Vec<u8> {
        bodies.iter().flat_map(|b| encode(Term::new(3), Epoch::new(9), b).bytes.to_vec()).collect()
    }

    fn round_trip<B: Body + PartialEq + std::fmt::Debug>(bodies: &[B], chunk: usize) {
        let mut decoder = Decoder::<B>::new();
        let mut found = Vec::new();
        for bytes in stream(bodies).chunks(chunk) {
            decoder.push(bytes);
            while let Some(message) = decoder.next().unwrap() {
                assert_eq!((message.term, message.epoch), (Term::new(3), Epoch::new(9)));
                found.push(message.body);
            }
        }
        assert_eq!(found, bodies);
        assert_eq!(decoder.held_bytes(), 0);
    }

    #[test]
    fn all_messages_round_trip_in_any_pieces() {
        for chunk in [1, 3, 39, 40, 41, 1000, 1 << 20] {
            round_trip(&source_bodies(), chunk);
            round_trip(&target_bodies(), chunk);
        }
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let check = |bytes: Vec<u8>, decode: &dyn Fn(&[u8]) -> bool| {
            for bit in 0..bytes.len() * 8 {
                let mut damaged = bytes.clone();
                damaged[bit / 8] ^= 1 << (bit % 8);
                assert!(!decode(&damaged), "bit {bit}");
            }
        };
        fn decodes<B: Body>(bytes: &[u8]) -> bool {
            let mut decoder = Decoder::<B>::new();
            decoder.push(bytes);
            matches!(decoder.next(), Ok(Some(_)))
        }
        source_bodies().iter().for_each(|b| check(stream(std::slice::from_ref(b)), &decodes::<SourceBody>));
        target_bodies().iter().for_each(|b| check(stream(std::slice::from_ref(b)), &decodes::<TargetBody>));
    }

    #[test]
    fn strangers_and_other_versions_are_told_apart_at_once() {
        let first_error = |bytes: &[u8]| {
            let mut decoder = Decoder::<SourceBody>::new();
            decoder.push(bytes);
            decoder.next().unwrap_err()
        };
        assert_eq!(first_error(b"GET / HTTP"), WireError::NotOurs(*b"GET "));
        let mut bytes = stream(&[SourceBody::Ping]);
        bytes[4] = 1;
        let error = first_error(&bytes[..6]);
        assert_eq!(error, WireError::Version { ours: 3, theirs: 1 });
        assert!(error.to_string().contains("this side speaks protocol 3, the other 1"));
        let wrong_way = stream(&[TargetBody::Pong]);
        assert_eq!(first_error(&wrong_way), WireError::UnknownKind(kind::PONG));
        let mut long = stream(&[SourceBody::Ping]);
        long[24..28].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(first_error(&long), WireError::TooLong { .. }), "before anything is waited for");
    }

    #[test]
    fn texts_are_cut_at_their_limit() {
        let text = "\u{20ac}".repeat(3000);
        let body = TargetBody::Refuse { code: RefuseCode::Protocol, text: text.clone(), known_term: Term::new(1) };
        let mut decoder = Decoder::<TargetBody>::new();
        decoder.push(&stream(&[body]));
        let Some(Message { body: TargetBody::Refuse { text: found, .. }, .. }) = decoder.next().unwrap() else {
            panic!("not a refusal")
        };
        assert!(found.len() <= MAX_TEXT_BYTES && text.starts_with(&found) && !found.is_empty());
    }

    proptest! {
        #[test]
        fn noise_behind_a_good_header_never_panics(kind: u8, body in prop::collection::vec(any::<u8>(), 0..300)) {
            let encoded = crate::wire::encode_with(Term::new(1), Epoch::NONE, |out| {
                out.extend_from_slice(&body);
                kind
            });
            prop_assert_eq!(encoded.bytes.len(), HEADER_BYTES + body.len());
            let mut source = Decoder::<SourceBody>::new();
            source.push(&encoded.bytes);
            let _ = source.next();
            let mut target = Decoder::<TargetBody>::new();
            target.push(&encoded.bytes);
            let _ = target.next();
        }
    }
}
