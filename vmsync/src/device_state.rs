//! Device state as it travels and is journaled.
//!
//! ```text
//! offset  size  field (little-endian)
//!      0     1  1 if the guest ran at the cut, 0 if it was paused
//!      1     1  encoding: 0 raw, 1 one zstd block
//!      2     2  0
//!      4     4  length before encoding, at most 16 MiB
//!      8        the bytes that QEMU wrote
//! ```

use std::sync::Arc;

use crate::bytes::{Put, Reader, Truncated};

/// Longest device state, bytes. QEMU writes 13 to 200 KB for usual guests.
pub const MAX_DEVICE_STATE_BYTES: usize = 16 << 20;

pub(crate) const HEAD_BYTES: usize = 8;

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
    #[error("device state should be {expected} bytes but is {found}")]
    Length { expected: usize, found: usize },
    #[error("device state is not a zstd block: {0}")]
    Zstd(String),
}

impl From<Truncated> for DeviceStateError {
    fn from(Truncated: Truncated) -> Self {
        Self::Truncated
    }
}

impl DeviceState {
    /// Appends the encoded form to `out`.
    pub fn encode(&self, zstd_level: i32, out: &mut Vec<u8>) -> Result<(), DeviceStateError> {
        if self.bytes.len() > MAX_DEVICE_STATE_BYTES {
            return Err(DeviceStateError::TooLong(self.bytes.len()));
        }
        let packed = (zstd_level != 0).then(|| zstd::bulk::compress(&self.bytes, zstd_level).ok()).flatten();
        let packed = packed.filter(|p| p.len() < self.bytes.len());
        out.put_u8(u8::from(self.running));
        out.put_u8(u8::from(packed.is_some()));
        out.put_u16(0);
        out.put_u32(self.bytes.len() as u32); // at most MAX_DEVICE_STATE_BYTES
        out.extend_from_slice(packed.as_deref().unwrap_or(&self.bytes));
        Ok(())
    }

    /// Checks and decodes; allocates no more than [`MAX_DEVICE_STATE_BYTES`].
    pub fn decode(bytes: &[u8]) -> Result<Self, DeviceStateError> {
        let mut reader = Reader::new(bytes);
        let (running, encoding) = (reader.u8()?, reader.u8()?);
        if running > 1 || encoding > 1 {
            return Err(DeviceStateError::UnknownValue(running.max(encoding)));
        }
        if let Some(other) = reader.array::<2>()?.into_iter().find(|b| *b != 0) {
            return Err(DeviceStateError::UnknownValue(other));
        }
        let expected = reader.u32()? as usize;
        if expected > MAX_DEVICE_STATE_BYTES {
            return Err(DeviceStateError::TooLong(expected));
        }
        let bytes: Arc<[u8]> = if encoding == 0 {
            reader.rest().into()
        } else {
            zstd::bulk::decompress(reader.rest(), expected).map_err(|e| DeviceStateError::Zstd(e.to_string()))?.into()
        };
        if bytes.len() != expected {
            return Err(DeviceStateError::Length { expected, found: bytes.len() });
        }
        Ok(Self { running: running == 1, bytes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trips_packed_and_raw() {
        let noise: Vec<u8> = (0..5000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        for (bytes, level) in [(vec![7; 100_000], 1), (vec![7; 100], 0), (noise, 1), (vec![], 1)] {
            let state = DeviceState { running: bytes.len() % 3 == 1, bytes: bytes.into() };
            let mut out = Vec::new();
            state.encode(level, &mut out).unwrap();
            assert_eq!(DeviceState::decode(&out).unwrap(), state);
            assert!(out.len() <= state.bytes.len() + HEAD_BYTES);
        }
    }

    #[test]
    fn claims_are_checked() {
        let mut out = Vec::new();
        DeviceState { running: true, bytes: vec![7; 1000].into() }.encode(1, &mut out).unwrap();
        for len in 0..out.len() {
            assert!(DeviceState::decode(&out[..len]).is_err(), "{len}");
        }
        let mut longer = out.clone();
        longer[4..8].copy_from_slice(&2000u32.to_le_bytes());
        assert_eq!(DeviceState::decode(&longer), Err(DeviceStateError::Length { expected: 2000, found: 1000 }));
        longer[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(DeviceState::decode(&longer), Err(DeviceStateError::TooLong(u32::MAX as usize)));
        longer = out;
        longer[4..8].copy_from_slice(&10u32.to_le_bytes());
        assert!(matches!(DeviceState::decode(&longer), Err(DeviceStateError::Zstd(_))));
        let huge = DeviceState { running: true, bytes: vec![0; MAX_DEVICE_STATE_BYTES + 1].into() };
        assert!(huge.encode(1, &mut Vec::new()).is_err());
    }
}
