//! The network block device protocol, as much as QEMU's mirror job needs of it: fixed newstyle negotiation and simple
//! replies. Pure: bytes in, values out; every length is checked before anything is read by it.
//!
//! ```text
//! server: greeting      client: flags, then options      GO or EXPORT_NAME      client: requests, server: replies
//! ```

/// Longest data of an option; names of exports are at most 4,096 bytes in the protocol.
pub const MAX_OPTION_BYTES: u32 = 8192;
/// Options of one negotiation; QEMU sends three.
pub const MAX_OPTIONS: u32 = 64;
/// Longest READ and WRITE.
pub const MAX_TRANSFER_BYTES: u32 = 32 << 20;
pub const OPTION_HEAD_BYTES: usize = 16;
pub const REQUEST_BYTES: usize = 28;

const MAGIC_GREETING: u64 = 0x4e42_444d_4147_4943; // NBDMAGIC
const MAGIC_OPTION: u64 = 0x4948_4156_454f_5054; // IHAVEOPT
const MAGIC_OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const MAGIC_REQUEST: u32 = 0x2560_9513;
const MAGIC_REPLY: u32 = 0x6744_6698;
const FIXED_NEWSTYLE: u16 = 1;
const NO_ZEROES: u16 = 2;
const REP_ACK: u32 = 1;
const REP_SERVER: u32 = 2;
const REP_INFO: u32 = 3;
const REP_ERROR: u32 = 1 << 31;
const INFO_EXPORT: u16 = 0;
const INFO_BLOCK_SIZE: u16 = 3;
/// HAS_FLAGS, SEND_FLUSH, SEND_FUA, SEND_TRIM, SEND_WRITE_ZEROES
const TRANSMISSION_FLAGS: u16 = 1 | 1 << 2 | 1 << 3 | 1 << 5 | 1 << 6;

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ProtoError {
    #[error("the client's flags {0:#x} are unknown")]
    ClientFlags(u32),
    #[error("an option or request does not begin with its magic number")]
    Magic,
    #[error("an option of {0} bytes; at most {MAX_OPTION_BYTES} are read")]
    OptionLength(u32),
    #[error("a write of {0} bytes; at most {MAX_TRANSFER_BYTES} are taken")]
    WriteLength(u32),
}

/// What the server says first.
pub fn greeting() -> [u8; 18] {
    let mut out = [0; 18];
    out[..8].copy_from_slice(&MAGIC_GREETING.to_be_bytes());
    out[8..16].copy_from_slice(&MAGIC_OPTION.to_be_bytes());
    out[16..].copy_from_slice(&(FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes());
    out
}

/// The client's answer to the greeting; true: no zeroes after EXPORT_NAME.
pub fn client_flags(bytes: [u8; 4]) -> Result<bool, ProtoError> {
    let flags = u32::from_be_bytes(bytes);
    if flags & !u32::from(FIXED_NEWSTYLE | NO_ZEROES) != 0 || flags & u32::from(FIXED_NEWSTYLE) == 0 {
        return Err(ProtoError::ClientFlags(flags));
    }
    Ok(flags & u32::from(NO_ZEROES) != 0)
}

/// Head of an option: its number and the length of its data.
pub fn option_head(bytes: &[u8; OPTION_HEAD_BYTES]) -> Result<(u32, u32), ProtoError> {
    if be64(&bytes[..8]) != MAGIC_OPTION {
        return Err(ProtoError::Magic);
    }
    let (option, len) = (be32(&bytes[8..12]), be32(&bytes[12..]));
    if len > MAX_OPTION_BYTES { Err(ProtoError::OptionLength(len)) } else { Ok((option, len)) }
}

/// What an option leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Negotiated {
    /// Send this, and read the next option.
    Reply(Vec<u8>),
    /// Send this; requests follow.
    Transmission(Vec<u8>),
    /// Send this and close.
    End(Vec<u8>),
}

/// Answers one option. There is one export, `name`, of `size` bytes.
pub fn negotiate(option: u32, data: &[u8], name: &str, size: u64, no_zeroes: bool) -> Negotiated {
    const UNSUPPORTED: u32 = REP_ERROR + 1;
    const INVALID: u32 = REP_ERROR + 3;
    const UNKNOWN: u32 = REP_ERROR + 6;
    match option {
        // EXPORT_NAME: there is no way to refuse but to close.
        1 if data == name.as_bytes() => {
            let mut out = Vec::from(size.to_be_bytes());
            out.extend_from_slice(&TRANSMISSION_FLAGS.to_be_bytes());
            out.resize(out.len() + if no_zeroes { 0 } else { 124 }, 0);
            Negotiated::Transmission(out)
        }
        1 => Negotiated::End(Vec::new()),
        // ABORT
        2 => Negotiated::End(option_reply(option, REP_ACK, &[])),
        // LIST
        3 if data.is_empty() => {
            let entry = [&(name.len() as u32).to_be_bytes()[..], name.as_bytes()].concat();
            let mut out = option_reply(option, REP_SERVER, &entry);
            out.extend(option_reply(option, REP_ACK, &[]));
            Negotiated::Reply(out)
        }
        3 => Negotiated::Reply(option_reply(option, INVALID, &[])),
        // INFO, GO
        6 | 7 => match info_request(data) {
            None => Negotiated::Reply(option_reply(option, INVALID, &[])),
            Some((asked, _)) if asked != name.as_bytes() => Negotiated::Reply(option_reply(option, UNKNOWN, &[])),
            Some((_, wants_block_size)) => {
                let mut export = Vec::from(INFO_EXPORT.to_be_bytes());
                export.extend_from_slice(&size.to_be_bytes());
                export.extend_from_slice(&TRANSMISSION_FLAGS.to_be_bytes());
                let mut out = option_reply(option, REP_INFO, &export);
                if wants_block_size {
                    let mut sizes = Vec::from(INFO_BLOCK_SIZE.to_be_bytes());
                    // Any write is taken as it comes; pages are what it is counted in.
                    for size in [1, 4096, MAX_TRANSFER_BYTES] {
                        sizes.extend_from_slice(&size.to_be_bytes());
                    }
                    out.extend(option_reply(option, REP_INFO, &sizes));
                }
                out.extend(option_reply(option, REP_ACK, &[]));
                if option == 7 { Negotiated::Transmission(out) } else { Negotiated::Reply(out) }
            }
        },
        // Structured replies, meta contexts and TLS are not needed to be written to.
        _ => Negotiated::Reply(option_reply(option, UNSUPPORTED, &[])),
    }
}

/// Name, and whether block sizes are asked for; `None` if the lengths do not fit the data.
fn info_request(data: &[u8]) -> Option<(&[u8], bool)> {
    let len = be32(data.get(..4)?) as usize;
    let name = data.get(4..len.checked_add(4)?)?;
    let rest = &data[4 + len..];
    let count = usize::from(be16(rest.get(..2)?));
    let requests = &rest[2..];
    if requests.len() != count * 2 {
        return None;
    }
    Some((name, requests.chunks_exact(2).any(|request| be16(request) == INFO_BLOCK_SIZE)))
}

fn option_reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(20 + data.len());
    out.extend_from_slice(&MAGIC_OPTION_REPLY.to_be_bytes());
    for word in [option, kind, data.len() as u32] {
        out.extend_from_slice(&word.to_be_bytes());
    }
    out.extend_from_slice(data);
    out
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    Read,
    Write,
    Disconnect,
    Flush,
    Trim,
    WriteZeroes,
    /// Answered by an error.
    Other(u16),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    pub command: Command,
    pub handle: u64,
    pub offset: u64,
    pub len: u32,
}

/// Errors of the protocol, which are Linux's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Errno {
    Io = 5,
    Invalid = 22,
    NoSpace = 28,
    NotSupported = 95,
}

/// Reads a request. One that is `Err` leaves the stream unreadable.
pub fn request(bytes: &[u8; REQUEST_BYTES]) -> Result<Request, ProtoError> {
    if be32(&bytes[..4]) != MAGIC_REQUEST {
        return Err(ProtoError::Magic);
    }
    let command = match be16(&bytes[6..8]) {
        0 => Command::Read,
        1 => Command::Write,
        2 => Command::Disconnect,
        3 => Command::Flush,
        4 => Command::Trim,
        6 => Command::WriteZeroes,
        other => Command::Other(other),
    };
    let (handle, offset, len) = (be64(&bytes[8..16]), be64(&bytes[16..24]), be32(&bytes[24..]));
    if command == Command::Write && len > MAX_TRANSFER_BYTES {
        return Err(ProtoError::WriteLength(len));
    }
    Ok(Request { command, handle, offset, len })
}

impl Request {
    /// Why it cannot be carried out on an export of `size` bytes.
    pub fn refusal(&self, size: u64) -> Option<Errno> {
        let end = self.offset.checked_add(self.len.into());
        let inside = end.is_some_and(|end| end <= size);
        match self.command {
            Command::Read if self.len > MAX_TRANSFER_BYTES => Some(Errno::Invalid),
            Command::Write if !inside => Some(Errno::NoSpace),
            Command::Read | Command::Trim | Command::WriteZeroes if !inside => Some(Errno::Invalid),
            Command::Other(_) => Some(Errno::NotSupported),
            _ => None,
        }
    }

    /// Whether it changes the export.
    pub fn changes(&self) -> bool {
        matches!(self.command, Command::Write | Command::Trim | Command::WriteZeroes)
    }

    /// The reply's head; the data of a READ follow it.
    pub fn reply(&self, error: Option<Errno>) -> [u8; 16] {
        let mut out = [0; 16];
        out[..4].copy_from_slice(&MAGIC_REPLY.to_be_bytes());
        out[4..8].copy_from_slice(&error.map_or(0, |error| error as u32).to_be_bytes());
        out[8..].copy_from_slice(&self.handle.to_be_bytes());
        out
    }
}

fn be16(bytes: &[u8]) -> u16 {
    bytes.iter().take(2).fold(0, |value, byte| value << 8 | u16::from(*byte))
}

fn be32(bytes: &[u8]) -> u32 {
    bytes.iter().take(4).fold(0, |value, byte| value << 8 | u32::from(*byte))
}

fn be64(bytes: &[u8]) -> u64 {
    bytes.iter().take(8).fold(0, |value, byte| value << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn go(name: &str, infos: &[u16]) -> Vec<u8> {
        let mut data = Vec::from((name.len() as u32).to_be_bytes());
        data.extend_from_slice(name.as_bytes());
        data.extend_from_slice(&(infos.len() as u16).to_be_bytes());
        infos.iter().for_each(|info| data.extend_from_slice(&info.to_be_bytes()));
        data
    }

    fn bytes_of(command: u16, offset: u64, len: u32) -> [u8; REQUEST_BYTES] {
        let mut out = [0; REQUEST_BYTES];
        out[..4].copy_from_slice(&MAGIC_REQUEST.to_be_bytes());
        out[6..8].copy_from_slice(&command.to_be_bytes());
        out[8..16].copy_from_slice(&7u64.to_be_bytes());
        out[16..24].copy_from_slice(&offset.to_be_bytes());
        out[24..].copy_from_slice(&len.to_be_bytes());
        out
    }

    #[test]
    fn the_export_is_given_by_its_name_only() {
        let answer = |data: &[u8]| negotiate(7, data, "vda", 1 << 20, true);
        let Negotiated::Transmission(bytes) = answer(&go("vda", &[3])) else { panic!("GO is granted") };
        // Export, block sizes, acknowledgement.
        assert_eq!(bytes.len(), 3 * 20 + 12 + 14);
        assert_eq!(be64(&bytes[22..30]), 1 << 20);
        let Negotiated::Reply(bytes) = answer(&go("vdb", &[])) else { panic!("another name is refused") };
        assert_eq!(be32(&bytes[12..16]), REP_ERROR + 6);
        for bad in [&[][..], &[0, 0, 0, 9], &[255; 12], &go("vda", &[3])[..8]] {
            let Negotiated::Reply(bytes) = answer(bad) else { panic!("{bad:?}") };
            assert_eq!(be32(&bytes[12..16]), REP_ERROR + 3);
        }
        assert_eq!(negotiate(1, b"vdb", "vda", 1, true), Negotiated::End(Vec::new()));
        assert!(matches!(negotiate(1, b"vda", "vda", 1, false), Negotiated::Transmission(b) if b.len() == 134));
        assert!(matches!(negotiate(8, &[], "vda", 1, true), Negotiated::Reply(_)));
    }

    #[test]
    fn requests_outside_the_export_are_refused_and_oversized_writes_end_the_stream() {
        let refused = |command, offset, len| request(&bytes_of(command, offset, len)).unwrap().refusal(8192);
        assert_eq!(refused(1, 4096, 4096), None);
        assert_eq!(refused(1, 4097, 4096), Some(Errno::NoSpace));
        assert_eq!(refused(0, u64::MAX, 2), Some(Errno::Invalid));
        assert_eq!(refused(6, 0, u32::MAX), Some(Errno::Invalid));
        assert_eq!(refused(7, 0, 1), Some(Errno::NotSupported));
        assert_eq!(refused(3, u64::MAX, 1), None, "a flush has no range");
        let long = MAX_TRANSFER_BYTES + 1;
        assert_eq!(request(&bytes_of(1, 0, long)), Err(ProtoError::WriteLength(long)));
        assert_eq!(option_head(&[0; 16]), Err(ProtoError::Magic));
        assert!(client_flags([0; 4]).is_err() && client_flags([0, 0, 0, 4]).is_err());
        assert_eq!(client_flags([0, 0, 0, 3]), Ok(true));
    }

    proptest! {
        #[test]
        fn nothing_that_a_client_sends_panics(
            head: [u8; 16], body: [u8; REQUEST_BYTES], option in 0u32..12, data in prop::collection::vec(any::<u8>(), 0..64)
        ) {
            let _ = option_head(&head);
            let _ = request(&body).map(|request| (request.refusal(8192), request.reply(None)));
            let _ = negotiate(option, &data, "vda", 4096, false);
        }
    }
}
