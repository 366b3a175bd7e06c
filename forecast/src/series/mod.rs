//! Samples as they come: irregular, with gaps, several variables, counters that start over; kept within bounds.
//!
//! A [`Series`] is what history keeps of one thing (a guest, a path, a tenant, a request type, a template). Models want
//! a regular grid: [`Series::grid`] makes it.

mod counter;
mod downsample;

pub use counter::Counter;
pub use downsample::{Bucket, downsample};

use std::collections::{BTreeMap, VecDeque};

use crate::codec::{Format, Reader, Writer};
use crate::error::DecodeError;

/// Most variables of a series.
pub const MOST_VARIABLES: usize = 16;
/// Most samples kept.
pub const MOST_SAMPLES: usize = 1 << 20;
/// Most bytes of a tag's name or value.
pub const MOST_TAG_BYTES: usize = 256;
/// Most tags.
pub const MOST_TAGS: usize = 32;
/// Most slots of a grid.
pub const MOST_SLOTS: usize = 1 << 20;

const FORMAT: Format = Format { what: "series", magic: *b"VSFS", oldest: 1, newest: 1 };

/// Why a sample was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Rejected {
    #[error("a sample of {given} variables for a series of {wanted}")]
    Variables { given: usize, wanted: usize },
    #[error("a sample at {at_ms} ms, not after the newest at {newest_ms} ms")]
    NotNewer { at_ms: u64, newest_ms: u64 },
}

/// See the module's text.
#[derive(Debug, Clone, PartialEq)]
pub struct Series {
    variables: usize,
    capacity: usize,
    tags: BTreeMap<String, String>,
    times_ms: VecDeque<u64>,
    /// Row by row; NaN for a variable that is missing.
    values: VecDeque<f64>,
}

impl Series {
    /// Keeps the newest `capacity` samples of `variables`; both are brought within 1 and the limits above.
    pub fn new(variables: usize, capacity: usize) -> Self {
        Self {
            variables: variables.clamp(1, MOST_VARIABLES),
            capacity: capacity.clamp(1, MOST_SAMPLES),
            tags: BTreeMap::new(),
            times_ms: VecDeque::new(),
            values: VecDeque::new(),
        }
    }

    /// Sets a tag (guest, path, tenant, request type, template); false where a limit bars it.
    pub fn tag(&mut self, name: &str, value: &str) -> bool {
        let fits = name.len() <= MOST_TAG_BYTES && value.len() <= MOST_TAG_BYTES;
        let room = self.tags.len() < MOST_TAGS || self.tags.contains_key(name);
        if fits && room {
            self.tags.insert(name.to_owned(), value.to_owned());
        }
        fits && room
    }

    /// Tags by name.
    pub fn tags(&self) -> &BTreeMap<String, String> {
        &self.tags
    }

    /// Appends a sample, one value a variable; `None` and what is not finite are gaps. The oldest is dropped at need.
    pub fn push(&mut self, at_ms: u64, sample: &[Option<f64>]) -> Result<(), Rejected> {
        if sample.len() != self.variables {
            return Err(Rejected::Variables { given: sample.len(), wanted: self.variables });
        }
        if let Some(&newest_ms) = self.times_ms.back().filter(|&&newest| at_ms <= newest) {
            return Err(Rejected::NotNewer { at_ms, newest_ms });
        }
        if self.times_ms.len() == self.capacity {
            self.times_ms.pop_front();
            self.values.drain(..self.variables);
        }
        self.times_ms.push_back(at_ms);
        self.values.extend(sample.iter().map(|v| v.filter(|v| v.is_finite()).unwrap_or(f64::NAN)));
        Ok(())
    }

    pub fn len(&self) -> usize {
        self.times_ms.len()
    }

    pub fn is_empty(&self) -> bool {
        self.times_ms.is_empty()
    }

    /// Samples of one variable, oldest first: time and value.
    pub fn samples(&self, variable: usize) -> impl Iterator<Item = (u64, Option<f64>)> {
        let values = self.values.iter().skip(variable).step_by(self.variables);
        let known = variable < self.variables;
        self.times_ms.iter().copied().zip(values.map(|v| Some(*v).filter(|v| !v.is_nan()))).take_while(move |_| known)
    }

    /// One variable on a regular grid of `step_ms`: slot `k` is the mean of the samples in
    /// `[start_ms + k * step_ms, start_ms + (k + 1) * step_ms)`, `None` where there are none. Ends with the slot of the
    /// newest sample; at most [`MOST_SLOTS`].
    pub fn grid(&self, variable: usize, start_ms: u64, step_ms: u64) -> Vec<Option<f64>> {
        let Some(&newest) = self.times_ms.back().filter(|&&n| n >= start_ms && step_ms > 0) else { return Vec::new() };
        let slots = usize::try_from((newest - start_ms) / step_ms).unwrap_or(MOST_SLOTS).min(MOST_SLOTS - 1) + 1;
        let mut sums = vec![(0.0, 0u32); slots];
        for (at, value) in self.samples(variable) {
            let slot = at.checked_sub(start_ms).and_then(|d| usize::try_from(d / step_ms).ok());
            if let (Some(value), Some((sum, count))) = (value, slot.and_then(|s| sums.get_mut(s))) {
                *sum += value;
                *count += 1;
            }
        }
        sums.into_iter().map(|(sum, count)| (count > 0).then(|| sum / f64::from(count))).collect()
    }

    /// Heap bytes of the samples.
    pub fn bytes(&self) -> usize {
        8 * (self.times_ms.capacity() + self.values.capacity())
    }

    /// For storage.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Writer::new();
        out.count(self.variables);
        out.count(self.capacity);
        out.count(self.tags.len());
        for (name, value) in &self.tags {
            out.blob(name.as_bytes());
            out.blob(value.as_bytes());
        }
        out.count(self.times_ms.len());
        self.times_ms.iter().for_each(|&t| out.u64(t));
        self.values.iter().for_each(|&v| out.f64(v));
        out.seal(FORMAT)
    }

    /// Reads what [`Series::encode`] wrote.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut from = Reader::open(bytes, FORMAT)?;
        let (variables, capacity) = (from.u32("variables")? as usize, from.u32("capacity")? as usize);
        let mut series = Self::new(variables, capacity);
        if (series.variables, series.capacity) != (variables, capacity) {
            return Err(from.range("variables or capacity"));
        }
        for _ in 0..from.count(8, "tags")? {
            let mut text = || std::str::from_utf8(from.blob("a tag").unwrap_or_default()).map(str::to_owned);
            let (name, value) = (text(), text());
            let taken = matches!((&name, &value), (Ok(name), Ok(value)) if series.tag(name, value));
            if !taken {
                return Err(from.range("a tag"));
            }
        }
        let count = from.count(8, "samples")?;
        let times = (0..count).map(|_| from.u64("times")).collect::<Result<VecDeque<_>, _>>()?;
        if count > capacity || times.iter().zip(times.iter().skip(1)).any(|(a, b)| a >= b) {
            return Err(from.range("times"));
        }
        series.times_ms = times;
        series.values = (0..count * variables).map(|_| from.f64_or_nan("values")).collect::<Result<_, _>>()?;
        from.end()?;
        Ok(series)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series() -> Result<Series, Rejected> {
        let mut series = Series::new(2, 4);
        assert!(series.tag("guest", "web-1"));
        for (at, cpu, net) in [
            (0, 1.0, Some(9.0)),
            (900, 3.0, None),
            (2_100, 5.0, Some(f64::NAN)),
            (4_000, 7.0, Some(1.0)),
            (4_500, 9.0, Some(3.0)),
        ] {
            series.push(at, &[Some(cpu), net])?;
        }
        Ok(series)
    }

    #[test]
    fn irregular_samples_become_a_grid_with_gaps() -> Result<(), Rejected> {
        let series = series()?;
        assert_eq!(series.grid(0, 0, 1_000), [Some(3.0), None, Some(5.0), None, Some(8.0)]);
        assert_eq!(series.grid(1, 0, 1_000), [None, None, None, None, Some(2.0)]);
        assert!(series.grid(2, 0, 1_000).iter().all(Option::is_none));
        Ok(())
    }

    #[test]
    fn samples_are_bounded_and_in_order() -> Result<(), Rejected> {
        let mut series = series()?;
        assert_eq!(series.len(), 4);
        assert_eq!(series.push(4_500, &[None, None]), Err(Rejected::NotNewer { at_ms: 4_500, newest_ms: 4_500 }));
        assert_eq!(series.push(9_000, &[None]), Err(Rejected::Variables { given: 1, wanted: 2 }));
        Ok(())
    }

    #[test]
    fn what_is_encoded_is_decoded() -> Result<(), Box<dyn std::error::Error>> {
        let series = series()?;
        let read = Series::decode(&series.encode())?;
        assert_eq!(read.tags(), series.tags());
        assert_eq!(read.encode(), series.encode());
        Ok(())
    }
}
