//! The state record: what a shadow's agent needs to go on after a restart.
//!
//! ```text
//! offset  size  field (little-endian)
//!      0     4  magic "VSHS"
//!      4     2  version
//!      6     1  1 if this shadow was promoted
//!      7     1  image: 0 none, 1 present, 2 committed
//!      8    16  guest UUID
//!     24     8  highest term known
//!     32     4  length of the layout (0 without an image), then the layout
//!               committed only: u64 lineage, u64 term, u64 epoch, u32 length and encoded device state
//!               u64 xxh3-64 of everything before
//! ```

use xxhash_rust::xxh3::xxh3_64;

use crate::bytes::{Put, Reader, Truncated};
use crate::device_state::{DeviceState, DeviceStateError};
use crate::journal::Commit;
use crate::layout::{LayoutError, RamLayout};
use crate::units::{Epoch, GuestUuid, Lineage, Term};

/// Version of the record's layout.
pub const STATE_VERSION: u16 = 1;

const MAGIC: [u8; 4] = *b"VSHS";

/// See the module's description.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateRecord {
    pub guest: GuestUuid,
    pub term: Term,
    pub promoted: bool,
    pub image: Option<ImageRecord>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageRecord {
    pub layout: RamLayout,
    /// The epoch that the image holds once the journal is replayed, and its device state.
    pub committed: Option<(Commit, DeviceState)>,
}

/// Why bytes are no state record. There is no commit then: the shadow needs a new first copy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    #[error("state record is not one of virt-shadow's, is cut short or damaged")]
    Damaged,
    #[error("state record has version {0}; this build reads {STATE_VERSION}")]
    Version(u16),
    #[error("state record belongs to guest {0}")]
    OtherGuest(GuestUuid),
    #[error("state record: {0}")]
    Layout(#[from] LayoutError),
    #[error("state record: {0}")]
    DeviceState(#[from] DeviceStateError),
}

impl From<Truncated> for StateError {
    fn from(Truncated: Truncated) -> Self {
        Self::Damaged
    }
}

impl StateRecord {
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend_from_slice(&MAGIC);
        out.put_u16(STATE_VERSION);
        out.put_u8(u8::from(self.promoted));
        out.put_u8(match &self.image {
            None => 0,
            Some(ImageRecord { committed: None, .. }) => 1,
            Some(ImageRecord { committed: Some(_), .. }) => 2,
        });
        out.extend_from_slice(self.guest.as_bytes());
        out.put_u64(self.term.get());
        let layout = self.image.as_ref().map(|image| image.layout.encode()).unwrap_or_default();
        out.put_u32(layout.len() as u32); // a layout has at most 1024 blocks
        out.extend_from_slice(&layout);
        if let Some((commit, state)) = self.image.as_ref().and_then(|image| image.committed.as_ref()) {
            out.put_u64(commit.lineage.get());
            out.put_u64(commit.term.get());
            out.put_u64(commit.epoch.get());
            let mut encoded = Vec::new();
            // Raw: this is written with every epoch. Its length was checked when it came in.
            let fits = state.encode_raw(&mut encoded);
            debug_assert!(fits.is_ok());
            out.put_u32(encoded.len() as u32);
            out.extend_from_slice(&encoded);
        }
        out.put_u64(xxh3_64(&out));
        out
    }

    /// Reads the record of `guest`; trusts nothing.
    pub fn decode(bytes: &[u8], guest: GuestUuid) -> Result<Self, StateError> {
        let (rest, checksum) = bytes.split_last_chunk::<8>().ok_or(StateError::Damaged)?;
        let mut reader = Reader::new(rest);
        if reader.array::<4>()? != MAGIC {
            return Err(StateError::Damaged);
        }
        let version = reader.u16()?;
        if version != STATE_VERSION {
            return Err(StateError::Version(version));
        }
        if xxh3_64(rest) != u64::from_le_bytes(*checksum) {
            return Err(StateError::Damaged);
        }
        let (promoted, image_kind) = (reader.u8()? != 0, reader.u8()?);
        let found = GuestUuid::from_bytes(reader.array()?);
        if found != guest {
            return Err(StateError::OtherGuest(found));
        }
        let term = Term::new(reader.u64()?);
        let layout_len = reader.u32()? as usize;
        let layout = reader.take(layout_len)?;
        let image = match image_kind {
            0 => None,
            1 => Some(ImageRecord { layout: RamLayout::decode(layout)?, committed: None }),
            2 => {
                let committed = Some(decode_committed(&mut reader)?);
                Some(ImageRecord { layout: RamLayout::decode(layout)?, committed })
            }
            _ => return Err(StateError::Damaged),
        };
        if !reader.rest().is_empty() {
            return Err(StateError::Damaged);
        }
        Ok(Self { guest, term, promoted, image })
    }
}

fn decode_committed(reader: &mut Reader<'_>) -> Result<(Commit, DeviceState), StateError> {
    let commit = Commit {
        lineage: Lineage::new(reader.u64()?),
        term: Term::new(reader.u64()?),
        epoch: Epoch::new(reader.u64()?),
    };
    let len = reader.u32()? as usize;
    Ok((commit, DeviceState::decode(reader.take(len)?, None)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::RamBlock;

    fn records() -> Vec<StateRecord> {
        let guest = GuestUuid::from_bytes([9; 16]);
        let layout = RamLayout::new(vec![RamBlock { name: "pc.ram".into(), len_bytes: 8192 }]).unwrap();
        let commit = Commit { lineage: Lineage::new(1), term: Term::new(2), epoch: Epoch::new(3) };
        let state = DeviceState { running: true, bytes: vec![1, 2, 3].into() };
        [None, Some(None), Some(Some((commit, state)))]
            .into_iter()
            .map(|committed| StateRecord {
                guest,
                term: Term::new(4),
                promoted: committed.is_none(),
                image: committed.map(|committed| ImageRecord { layout: layout.clone(), committed }),
            })
            .collect()
    }

    #[test]
    fn records_round_trip_and_damage_is_found() {
        for record in records() {
            let bytes = record.encode();
            assert_eq!(StateRecord::decode(&bytes, record.guest).as_ref(), Ok(&record));
            assert!(StateRecord::decode(&bytes, GuestUuid::from_bytes([8; 16])).is_err());
            for len in 0..bytes.len() {
                assert!(StateRecord::decode(&bytes[..len], record.guest).is_err());
            }
            for bit in 0..bytes.len() * 8 {
                let mut damaged = bytes.clone();
                damaged[bit / 8] ^= 1 << (bit % 8);
                assert!(StateRecord::decode(&damaged, record.guest).is_err(), "bit {bit}");
            }
        }
    }
}
