//! Byte strings that change a little from cut to cut: device state.
//!
//! ```text
//! encoding 0  as they are
//!          1  one zstd block
//!          2  changes against the former string, which has the same length: u32 length of the runs, runs, data
//!          3  the same, as one zstd block
//!          4  one zstd block with the former string as its dictionary, for strings of different lengths
//! ```
//! Runs are described in [`super::diff`]. Whether both sides mean the same former string is for their callers to
//! check.

use zstd::bulk::{Compressor, Decompressor};

use super::diff::{Difference, compare, take_runs};
use crate::bytes::{Put, Reader};

/// The string as it is.
pub const RAW: u8 = 0;
const ZSTD: u8 = 1;
const CHANGES: u8 = 2;
const CHANGES_ZSTD: u8 = 3;
const WITH_FORMER: u8 = 4;

const LEVEL: i32 = 1;
/// Changes are worth it up to this part of the string.
const CHANGES_AT_MOST: usize = 4;
/// Shorter ones are not worth zstd's own header.
const WORTH_PACKING_BYTES: usize = 64;
/// Bytes that start a zstd dictionary of another kind than plain contents.
const DICTIONARY_MAGIC: [u8; 4] = 0xec30_a437_u32.to_le_bytes();

/// Appends the encoded string to `out`; returns its encoding.
pub fn encode(bytes: &[u8], former: Option<&[u8]>, out: &mut Vec<u8>) -> u8 {
    if let Some(former) = former
        && former.len() == bytes.len()
        && let Some(encoding) = encode_changes(bytes, former, out)
    {
        return encoding;
    }
    let with_former = former.filter(|f| is_dictionary(f)).and_then(|former| pack(bytes, former));
    let (packed, encoding) = match with_former {
        Some(packed) => (Some(packed), WITH_FORMER),
        None => (pack(bytes, &[]), ZSTD),
    };
    match packed.filter(|packed| packed.len() < bytes.len()) {
        Some(packed) => {
            out.extend_from_slice(&packed);
            encoding
        }
        None => {
            out.extend_from_slice(bytes);
            RAW
        }
    }
}

/// Whether the encoding can only be read by who has the former string.
pub fn needs_former(encoding: u8) -> bool {
    matches!(encoding, CHANGES | CHANGES_ZSTD | WITH_FORMER)
}

fn encode_changes(bytes: &[u8], former: &[u8], out: &mut Vec<u8>) -> Option<u8> {
    let (mut runs, mut data) = (Vec::new(), Vec::new());
    if compare(former, bytes, bytes.len() / CHANGES_AT_MOST, &mut runs, &mut data) == Difference::Dense {
        return None;
    }
    let mut changes = Vec::with_capacity(4 + runs.len() + data.len());
    changes.put_u32(runs.len() as u32); // at most a part of a string of less than 4 GiB
    changes.extend_from_slice(&runs);
    changes.extend_from_slice(&data);
    let worth = changes.len() >= WORTH_PACKING_BYTES;
    match worth.then(|| pack(&changes, &[])).flatten().filter(|packed| packed.len() < changes.len()) {
        Some(packed) => {
            out.extend_from_slice(&packed);
            Some(CHANGES_ZSTD)
        }
        None => {
            out.extend_from_slice(&changes);
            Some(CHANGES)
        }
    }
}

/// Decodes a string of `len` bytes, for which the caller has a limit.
pub fn decode(encoding: u8, bytes: &[u8], former: Option<&[u8]>, len: usize) -> Result<Vec<u8>, BlobError> {
    let former = || former.ok_or(BlobError::NoFormer);
    let decoded = match encoding {
        RAW => bytes.to_vec(),
        ZSTD => unpack(bytes, &[], len)?,
        CHANGES => decode_changes(bytes, former()?, len)?,
        CHANGES_ZSTD => {
            let changes = unpack(bytes, &[], 4 + len / CHANGES_AT_MOST)?;
            decode_changes(&changes, former()?, len)?
        }
        WITH_FORMER => {
            let former = former()?;
            if !is_dictionary(former) {
                return Err(BlobError::NoFormer);
            }
            unpack(bytes, former, len)?
        }
        other => return Err(BlobError::UnknownEncoding(other)),
    };
    if decoded.len() != len {
        return Err(BlobError::Length { expected: len, found: decoded.len() });
    }
    Ok(decoded)
}

fn decode_changes(changes: &[u8], former: &[u8], len: usize) -> Result<Vec<u8>, BlobError> {
    if former.len() != len {
        return Err(BlobError::Length { expected: len, found: former.len() });
    }
    let mut decoded = former.to_vec();
    let mut reader = Reader::new(changes);
    let runs = reader.u32().ok().and_then(|runs| reader.take(runs as usize).ok()).ok_or(BlobError::Changes)?;
    if runs.is_empty() && reader.rest().is_empty() {
        return Ok(decoded);
    }
    let (mut runs, mut data) = (runs, reader.rest());
    let patch = take_runs(&mut runs, &mut data, len, |_| ()).ok_or(BlobError::Changes)?;
    if !runs.is_empty() || !data.is_empty() {
        return Err(BlobError::Changes);
    }
    patch.apply(&mut decoded);
    Ok(decoded)
}

/// Why bytes are not an encoded string.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BlobError {
    #[error("it has the unknown encoding {0}")]
    UnknownEncoding(u8),
    #[error("it was made from a former one that is not here")]
    NoFormer,
    #[error("it should be {expected} bytes but is {found}")]
    Length { expected: usize, found: usize },
    #[error("its changes do not add up")]
    Changes,
    #[error("it is not a zstd block: {0}")]
    Zstd(String),
}

/// zstd takes any bytes for a dictionary's plain contents, unless they are empty or begin like a dictionary of its own.
fn is_dictionary(former: &[u8]) -> bool {
    former.len() >= 8 && former[..4] != DICTIONARY_MAGIC
}

fn pack(bytes: &[u8], dictionary: &[u8]) -> Option<Vec<u8>> {
    Compressor::with_dictionary(LEVEL, dictionary).ok()?.compress(bytes).ok()
}

fn unpack(bytes: &[u8], dictionary: &[u8], capacity: usize) -> Result<Vec<u8>, BlobError> {
    let zstd_error = |error: std::io::Error| BlobError::Zstd(error.to_string());
    // A block may claim less than the capacity, which is then not allocated; a wrong claim is an error.
    let capacity = Decompressor::upper_bound(bytes).unwrap_or(capacity).min(capacity);
    Decompressor::with_dictionary(dictionary).and_then(|mut d| d.decompress(bytes, capacity)).map_err(zstd_error)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn noise(len: usize, seed: u32) -> Vec<u8> {
        let mut state = seed;
        let next = |_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        (0..len).map(next).collect()
    }

    fn round_trip(bytes: &[u8], former: Option<&[u8]>) -> (u8, usize) {
        let mut out = Vec::new();
        let encoding = encode(bytes, former, &mut out);
        assert_eq!(decode(encoding, &out, former, bytes.len()).unwrap(), bytes);
        assert!(out.len() <= bytes.len().max(4));
        (encoding, out.len())
    }

    #[test]
    fn each_kind_of_change_has_its_encoding() {
        let former = noise(30_001, 1);
        let mut little = former.clone();
        little[30_000] ^= 1;
        little[5] ^= 1;
        let mut more = former.clone();
        more[2000..4000].fill(7);
        let mut longer = former.clone();
        longer.splice(9000..9000, [1, 2, 3]);
        assert_eq!(round_trip(&former, Some(&former)), (CHANGES, 4));
        assert_eq!(round_trip(&little, Some(&former)).0, CHANGES);
        assert_eq!(round_trip(&more, Some(&former)).0, CHANGES_ZSTD);
        let (encoding, len) = round_trip(&longer, Some(&former));
        assert!(encoding == WITH_FORMER && len < 200, "{len}");
        assert_eq!(round_trip(&noise(30_001, 2), Some(&former)).0, RAW);
        assert_eq!(round_trip(&[7; 500], None).0, ZSTD);
        assert_eq!(round_trip(&[], Some(&former)).0, RAW);
        assert_eq!(round_trip(&former[..3], None).0, RAW);
        let magic = [&DICTIONARY_MAGIC[..], &[0; 100]].concat();
        assert_eq!(round_trip(&[7; 500], Some(&magic)).0, ZSTD);
    }

    proptest! {
        #[test]
        fn what_goes_in_comes_out(
            len in 0usize..300, former_len in 0usize..300, changes in prop::collection::vec((0usize..300, any::<u8>()), 0..20),
        ) {
            let former = noise(former_len, 3);
            let mut bytes = noise(len, 3);
            for (at, byte) in changes {
                bytes.get_mut(at).into_iter().for_each(|b| *b = byte);
            }
            round_trip(&bytes, Some(&former));
            round_trip(&bytes, None);
        }

        #[test]
        fn noise_is_an_error_or_a_string_but_never_a_panic(
            encoding in 0u8..6, bytes in prop::collection::vec(any::<u8>(), 0..60), len in 0usize..300,
        ) {
            if let Ok(decoded) = decode(encoding, &bytes, Some(&noise(200, 1)), len) {
                prop_assert_eq!(decoded.len(), len);
            }
        }
    }
}
