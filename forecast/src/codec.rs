//! How histories, models and series are stored: little-endian fields in a checked envelope.
//!
//! ```text
//! 0   4  magic            6   8  length of the payload        14      payload
//! 4   2  format number                                        14+n 8  XXH3 of all before
//! ```
//! A reader checks magic, format, length and checksum before it looks at a field, and every count against the bytes
//! that are left before it reserves memory for it.

use crate::error::DecodeError;
use xxhash_rust::xxh3::xxh3_64;

const HEADER: usize = 14;
const CHECKSUM: usize = 8;

/// A kind of stored thing and the formats of it that can be read.
#[derive(Debug, Clone, Copy)]
pub struct Format {
    pub what: &'static str,
    pub magic: [u8; 4],
    pub oldest: u16,
    pub newest: u16,
}

/// Writes fields of one payload.
#[derive(Debug, Default)]
pub struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn u8(&mut self, value: u8) {
        self.bytes.push(value);
    }

    pub fn u32(&mut self, value: u32) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    pub fn u64(&mut self, value: u64) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    pub fn f32(&mut self, value: f32) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    pub fn f64(&mut self, value: f64) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    /// A count; those of this crate fit 32 bits, and a larger one would be refused on reading.
    pub fn count(&mut self, value: usize) {
        self.u32(u32::try_from(value).unwrap_or(u32::MAX));
    }

    pub fn f32s(&mut self, values: &[f32]) {
        self.count(values.len());
        values.iter().for_each(|&v| self.f32(v));
    }

    pub fn f64s(&mut self, values: &[f64]) {
        self.count(values.len());
        values.iter().for_each(|&v| self.f64(v));
    }

    /// Bytes with their length.
    pub fn blob(&mut self, bytes: &[u8]) {
        self.count(bytes.len());
        self.bytes.extend_from_slice(bytes);
    }

    /// The payload in its envelope.
    pub fn seal(self, format: Format) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER + self.bytes.len() + CHECKSUM);
        out.extend_from_slice(&format.magic);
        out.extend_from_slice(&format.newest.to_le_bytes());
        out.extend_from_slice(&(self.bytes.len() as u64).to_le_bytes());
        out.extend_from_slice(&self.bytes);
        let sum = xxh3_64(&out);
        out.extend_from_slice(&sum.to_le_bytes());
        out
    }
}

/// Reads fields of one payload.
#[derive(Debug)]
pub struct Reader<'a> {
    what: &'static str,
    format: u16,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    /// Opens an envelope: magic, format, length and checksum are right, or it is refused.
    pub fn open(bytes: &'a [u8], format: Format) -> Result<Self, DecodeError> {
        let what = format.what;
        let short = |field| DecodeError::Short { what, field, at: bytes.len() };
        if bytes.get(..4).ok_or_else(|| short("the magic"))? != format.magic {
            return Err(DecodeError::Foreign { what });
        }
        let header = bytes.get(..HEADER).ok_or_else(|| short("the header"))?;
        let found = u16::from_le_bytes([header[4], header[5]]);
        if found < format.oldest || found > format.newest {
            return Err(DecodeError::Format { what, found, oldest: format.oldest, newest: format.newest });
        }
        let mut length = [0; 8];
        length.copy_from_slice(&header[6..HEADER]);
        let length = usize::try_from(u64::from_le_bytes(length)).unwrap_or(usize::MAX);
        let end = length.checked_add(HEADER + CHECKSUM).ok_or_else(|| short("the payload"))?;
        if bytes.len() < end {
            return Err(short("the payload"));
        }
        if bytes.len() > end {
            return Err(DecodeError::Trailing { what, count: bytes.len() - end });
        }
        let (body, sum) = bytes.split_at(end - CHECKSUM);
        if xxh3_64(body).to_le_bytes() != sum {
            return Err(DecodeError::Damaged { what });
        }
        Ok(Self { what, format: found, bytes: &body[HEADER..], at: 0 })
    }

    /// Format number that was found.
    pub fn format(&self) -> u16 {
        self.format
    }

    /// The error that says `field` holds what it may not.
    pub fn range(&self, field: &'static str) -> DecodeError {
        DecodeError::Range { what: self.what, field }
    }

    fn take<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], DecodeError> {
        let part = self.bytes.get(self.at..).and_then(|b| b.first_chunk::<N>());
        let part = part.ok_or(DecodeError::Short { what: self.what, field, at: self.at })?;
        self.at += N;
        Ok(*part)
    }

    pub fn u8(&mut self, field: &'static str) -> Result<u8, DecodeError> {
        Ok(self.take::<1>(field)?[0])
    }

    pub fn u32(&mut self, field: &'static str) -> Result<u32, DecodeError> {
        Ok(u32::from_le_bytes(self.take(field)?))
    }

    pub fn u64(&mut self, field: &'static str) -> Result<u64, DecodeError> {
        Ok(u64::from_le_bytes(self.take(field)?))
    }

    /// A finite number.
    pub fn f32(&mut self, field: &'static str) -> Result<f32, DecodeError> {
        let value = f32::from_le_bytes(self.take(field)?);
        if value.is_finite() { Ok(value) } else { Err(self.range(field)) }
    }

    /// A finite number.
    pub fn f64(&mut self, field: &'static str) -> Result<f64, DecodeError> {
        let value = f64::from_le_bytes(self.take(field)?);
        if value.is_finite() { Ok(value) } else { Err(self.range(field)) }
    }

    /// A number, or NaN for "unknown".
    pub fn f64_or_nan(&mut self, field: &'static str) -> Result<f64, DecodeError> {
        let value = f64::from_le_bytes(self.take(field)?);
        if value.is_infinite() { Err(self.range(field)) } else { Ok(value) }
    }

    /// A count of things of at least `size` bytes each, which must be there.
    pub fn count(&mut self, size: usize, field: &'static str) -> Result<usize, DecodeError> {
        let count = self.u32(field)? as usize;
        let left = self.bytes.len() - self.at;
        if count.saturating_mul(size.max(1)) > left {
            return Err(DecodeError::Short { what: self.what, field, at: self.at });
        }
        Ok(count)
    }

    /// A count that must be `expected`.
    pub fn exactly(&mut self, expected: usize, field: &'static str) -> Result<(), DecodeError> {
        if self.u32(field)? as usize == expected { Ok(()) } else { Err(self.range(field)) }
    }

    pub fn f32s(&mut self, field: &'static str) -> Result<Vec<f32>, DecodeError> {
        let count = self.count(4, field)?;
        (0..count).map(|_| self.f32(field)).collect()
    }

    pub fn f64s(&mut self, field: &'static str) -> Result<Vec<f64>, DecodeError> {
        let count = self.count(8, field)?;
        (0..count).map(|_| self.f64(field)).collect()
    }

    /// Exactly `N` numbers, count included.
    pub fn f64_array<const N: usize>(&mut self, field: &'static str) -> Result<[f64; N], DecodeError> {
        self.exactly(N, field)?;
        let mut out = [0.0; N];
        for value in &mut out {
            *value = self.f64(field)?;
        }
        Ok(out)
    }

    /// Bytes with their length.
    pub fn blob(&mut self, field: &'static str) -> Result<&'a [u8], DecodeError> {
        let count = self.count(1, field)?;
        let part = &self.bytes[self.at..self.at + count];
        self.at += count;
        Ok(part)
    }

    /// Nothing may follow.
    pub fn end(self) -> Result<(), DecodeError> {
        match self.bytes.len() - self.at {
            0 => Ok(()),
            count => Err(DecodeError::Trailing { what: self.what, count }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FORMAT: Format = Format { what: "test", magic: *b"TEST", oldest: 2, newest: 3 };

    fn sealed() -> Vec<u8> {
        let mut writer = Writer::new();
        writer.u32(7);
        writer.f64s(&[1.0, 2.0]);
        writer.seal(FORMAT)
    }

    #[test]
    fn what_is_sealed_is_read_back() -> Result<(), DecodeError> {
        let bytes = sealed();
        let mut reader = Reader::open(&bytes, FORMAT)?;
        assert_eq!((reader.u32("a")?, reader.f64s("b")?), (7, vec![1.0, 2.0]));
        reader.end()
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_refused() {
        let bytes = sealed();
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Reader::open(&bad, FORMAT).is_err(), "bit {bit}");
        }
        for length in 0..bytes.len() {
            assert!(Reader::open(&bytes[..length], FORMAT).is_err(), "cut at {length}");
        }
    }

    #[test]
    fn other_formats_are_named() {
        let newer = Format { oldest: 4, newest: 5, ..FORMAT };
        let refusal = Reader::open(&sealed(), newer).map(|_| ());
        assert_eq!(refusal, Err(DecodeError::Format { what: "test", found: 3, oldest: 4, newest: 5 }));
    }

    #[test]
    fn a_count_larger_than_what_is_left_reserves_nothing() -> Result<(), DecodeError> {
        let mut writer = Writer::new();
        writer.u32(u32::MAX);
        let bytes = writer.seal(FORMAT);
        assert!(matches!(Reader::open(&bytes, FORMAT)?.f64s("b"), Err(DecodeError::Short { .. })));
        Ok(())
    }
}
