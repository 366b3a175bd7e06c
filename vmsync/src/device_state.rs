//! Device state as it travels and is journaled.
//!
//! ```text
//! offset  size  field (little-endian)
//!      0     1  1 if the guest ran at the cut, 0 if it was paused
//!      1     1  encoding: see crate::codec::blob
//!      2     2  0
//!      4     4  length before encoding, at most 16 MiB
//!               encodings that need the former state only:
//!      8     8  xxh3-64 of the former state
//!     16     8  xxh3-64 of this state
//!  8|24         the bytes that QEMU wrote, encoded
//! ```
//! The former state is the one of the epoch before, as the shadow has it.

use std::sync::Arc;

use xxhash_rust::xxh3::xxh3_64;

use crate::bytes::{Put, Reader, Truncated};
use crate::codec::blob::{self, BlobError};

/// Longest device state, bytes. QEMU writes 13 to 200 KB for usual guests.
pub const MAX_DEVICE_STATE_BYTES: usize = 16 << 20;
/// Longest encoded device state, bytes.
pub const MAX_ENCODED_BYTES: usize = HEAD_BYTES + HASHES_BYTES + MAX_DEVICE_STATE_BYTES;

const HEAD_BYTES: usize = 8;
const HASHES_BYTES: usize = 16;

/// What QEMU wrote at a cut, and whether the guest ran then.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceState {
    /// False if the guest was paused (by an operator, or for a switchover): promote it paused, or as told.
    pub running: bool,
    pub bytes: Arc<[u8]>,
}

/// Why bytes are no device state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeviceStateError {
    #[error("device state is cut short")]
    Truncated,
    #[error("device state of {0} bytes; at most {MAX_DEVICE_STATE_BYTES} are allowed")]
    TooLong(usize),
    #[error("device state has a field with the unknown value {0}")]
    UnknownValue(u8),
    #[error("device state: {0}")]
    Contents(#[from] BlobError),
    #[error("device state was made from a former one that this shadow does not have")]
    OutOfStep,
}

impl From<Truncated> for DeviceStateError {
    fn from(Truncated: Truncated) -> Self {
        Self::Truncated
    }
}

impl DeviceState {
    /// Appends the encoded form to `out`: good for anybody, or only for who has `former`.
    pub fn encode(&self, former: Option<&Self>, out: &mut Vec<u8>) -> Result<(), DeviceStateError> {
        let mut packed = Vec::new();
        let encoding = blob::encode(&self.bytes, former.map(|f| &f.bytes[..]), &mut packed);
        self.put_head(encoding, out)?;
        if let Some(former) = former.filter(|_| blob::needs_former(encoding)) {
            out.put_u64(xxh3_64(&former.bytes));
            out.put_u64(xxh3_64(&self.bytes));
        }
        out.extend_from_slice(&packed);
        Ok(())
    }

    /// Appends the form that takes no time.
    pub fn encode_raw(&self, out: &mut Vec<u8>) -> Result<(), DeviceStateError> {
        self.put_head(blob::RAW, out)?;
        out.extend_from_slice(&self.bytes);
        Ok(())
    }

    /// Checks and decodes; allocates little more than [`MAX_DEVICE_STATE_BYTES`].
    pub fn decode(bytes: &[u8], former: Option<&Self>) -> Result<Self, DeviceStateError> {
        let mut reader = Reader::new(bytes);
        let (running, encoding) = (reader.u8()?, reader.u8()?);
        if running > 1 {
            return Err(DeviceStateError::UnknownValue(running));
        }
        if let Some(other) = reader.array::<2>()?.into_iter().find(|b| *b != 0) {
            return Err(DeviceStateError::UnknownValue(other));
        }
        let len = reader.u32()? as usize;
        if len > MAX_DEVICE_STATE_BYTES {
            return Err(DeviceStateError::TooLong(len));
        }
        let mut checksum = None;
        if blob::needs_former(encoding) {
            let wanted = reader.u64()?;
            checksum = Some(reader.u64()?);
            if former.map(|f| xxh3_64(&f.bytes)) != Some(wanted) {
                return Err(DeviceStateError::OutOfStep);
            }
        }
        let decoded = blob::decode(encoding, reader.rest(), former.map(|f| &f.bytes[..]), len)?;
        if checksum.is_some_and(|checksum| checksum != xxh3_64(&decoded)) {
            return Err(DeviceStateError::OutOfStep);
        }
        Ok(Self { running: running == 1, bytes: decoded.into() })
    }

    fn put_head(&self, encoding: u8, out: &mut Vec<u8>) -> Result<(), DeviceStateError> {
        if self.bytes.len() > MAX_DEVICE_STATE_BYTES {
            return Err(DeviceStateError::TooLong(self.bytes.len()));
        }
        out.put_u8(u8::from(self.running));
        out.put_u8(encoding);
        out.put_u16(0);
        out.put_u32(self.bytes.len() as u32); // at most MAX_DEVICE_STATE_BYTES
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(state: &DeviceState, former: Option<&DeviceState>) -> Vec<u8> {
        let mut out = Vec::new();
        state.encode(former, &mut out).unwrap();
        out
    }

    fn state(bytes: Vec<u8>) -> DeviceState {
        DeviceState { running: bytes.len() % 3 == 1, bytes: bytes.into() }
    }

    fn noise() -> Vec<u8> {
        (0..5000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
    }

    #[test]
    fn round_trips_packed_and_raw() {
        for bytes in [vec![7; 100_000], vec![7; 100], noise(), vec![]] {
            let state = state(bytes);
            let out = encoded(&state, None);
            assert_eq!(DeviceState::decode(&out, None).unwrap(), state);
            assert!(out.len() <= state.bytes.len() + HEAD_BYTES);
            let mut raw = Vec::new();
            state.encode_raw(&mut raw).unwrap();
            assert_eq!(DeviceState::decode(&raw, None).unwrap(), state);
        }
    }

    #[test]
    fn changes_need_the_state_that_they_were_made_from() {
        let former = state(noise());
        let mut bytes = noise();
        bytes[77] ^= 1;
        let (changed, other) = (state(bytes.clone()), state(vec![3; 5000]));
        bytes.insert(100, 3);
        for state in [changed, state(bytes)] {
            let out = encoded(&state, Some(&former));
            assert!(out.len() < 1000, "{}", out.len());
            assert_eq!(DeviceState::decode(&out, Some(&former)).unwrap(), state);
            assert_eq!(DeviceState::decode(&out, Some(&other)), Err(DeviceStateError::OutOfStep));
            assert_eq!(DeviceState::decode(&out, None), Err(DeviceStateError::OutOfStep));
            let damaged = (0..out.len()).filter(|at| {
                let mut damaged = out.clone();
                damaged[*at] ^= 2;
                DeviceState::decode(&damaged, Some(&former)).is_ok_and(|d| d.bytes != state.bytes)
            });
            assert_eq!(damaged.collect::<Vec<_>>(), [0; 0]);
        }
    }

    #[test]
    fn claims_are_checked() {
        let out = encoded(&state(vec![7; 1000]), None);
        let decode = |bytes: &[u8]| DeviceState::decode(bytes, None);
        for len in 0..out.len() {
            assert!(decode(&out[..len]).is_err(), "{len}");
        }
        let mut longer = out.clone();
        longer[4..8].copy_from_slice(&2000u32.to_le_bytes());
        let length = BlobError::Length { expected: 2000, found: 1000 };
        assert_eq!(decode(&longer), Err(DeviceStateError::Contents(length)));
        longer[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(decode(&longer), Err(DeviceStateError::TooLong(u32::MAX as usize)));
        longer[4..8].copy_from_slice(&10u32.to_le_bytes());
        assert!(matches!(decode(&longer), Err(DeviceStateError::Contents(BlobError::Zstd(_)))));
        longer[1] = 9;
        assert_eq!(decode(&longer), Err(DeviceStateError::Contents(BlobError::UnknownEncoding(9))));
        let huge = DeviceState { running: true, bytes: vec![0; MAX_DEVICE_STATE_BYTES + 1].into() };
        assert!(huge.encode(None, &mut Vec::new()).is_err());
    }
}
