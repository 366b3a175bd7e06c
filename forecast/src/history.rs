//! What a model may look at: the newest samples on a regular grid, with the seasonal profile beside them.
//!
//! Everything stored for slot `i` of the season profile comes from samples one season or more before `i`, so what is
//! known about the next season's slots never depends on anything later than the newest sample.

use crate::error::ShapeError;

/// Weight of the newest season in the profile.
const PROFILE_RATE: f64 = 0.3;
/// No model looks further ahead.
pub const MAX_HORIZON: usize = 64;
/// Longest season, in samples: a day at one sample in ten seconds.
pub const MAX_SEASON: usize = 8640;
/// Values are clamped to this size: no counter of a machine gets there, and sums of squares stay finite.
pub const MAX_VALUE: f64 = 1e100;

/// How a series is laid out in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Seconds between samples.
    pub step_s: u32,
    /// Samples a season, usually a day.
    pub season: usize,
    /// Steps ahead to forecast.
    pub horizon: usize,
    /// Seconds since a Monday 00:00 of the first sample; 0 where unknown (phases are then relative).
    pub start_s: u64,
    /// Samples kept.
    pub capacity: usize,
}

impl Shape {
    /// A shape that keeps 35 seasons, at most 16,384 samples but four seasons at least.
    pub fn new(step_s: u32, season: usize, horizon: usize) -> Result<Self, ShapeError> {
        let capacity = (35 * season).min(16_384).max(4 * season).max(1024);
        Self { step_s, season, horizon, start_s: 0, capacity }.checked()
    }

    /// Refuses what no model can work with.
    pub fn checked(self) -> Result<Self, ShapeError> {
        if self.step_s == 0 {
            return Err(ShapeError::NoStep);
        }
        if self.horizon == 0 || self.horizon > MAX_HORIZON {
            return Err(ShapeError::Horizon { given: self.horizon, most: MAX_HORIZON });
        }
        if self.season < 2 || self.season > MAX_SEASON {
            return Err(ShapeError::Season { given: self.season, most: MAX_SEASON });
        }
        let least = 2 * self.season + self.horizon;
        if self.capacity < least || self.capacity > 64 * MAX_SEASON {
            return Err(ShapeError::Capacity { given: self.capacity, least });
        }
        Ok(self)
    }

    /// Samples an hour; 0 where a step is longer than half an hour.
    pub fn hour(&self) -> usize {
        let steps = 3600 / self.step_s as usize;
        if steps < 2 { 0 } else { steps }
    }
}

/// The newest samples of one series. Index 0 is the oldest sample kept.
#[derive(Debug, Clone)]
pub struct History {
    shape: Shape,
    /// Samples dropped before index 0.
    dropped: u64,
    values: Vec<f64>,
    /// Whether the sample was measured (not carried forward).
    measured: Vec<bool>,
    /// Exponentially weighted mean of earlier samples at the same phase; `season` entries longer than `values`.
    profile: Vec<f64>,
    /// The same of absolute deviations from the profile.
    spread: Vec<f64>,
    /// Exponentially weighted mean over about a season.
    slow: Vec<f64>,
}

impl History {
    pub fn new(shape: Shape) -> Self {
        let season = shape.season;
        Self {
            shape,
            dropped: 0,
            values: Vec::new(),
            measured: Vec::new(),
            profile: vec![f64::NAN; season],
            spread: vec![f64::NAN; season],
            slow: Vec::new(),
        }
    }

    /// Appends one sample. A gap (`None`, NaN or infinite) carries the last value forward and is remembered as such.
    pub fn push(&mut self, sample: Option<f64>) {
        let sample = sample.filter(|v| v.is_finite());
        let at = self.values.len();
        let Some(value) = sample.or(self.values.last().copied()) else {
            // Nothing to carry yet: the series begins with its first measured sample.
            self.dropped += 1;
            return;
        };
        let value = value.clamp(-MAX_VALUE, MAX_VALUE);
        self.values.push(value);
        self.measured.push(sample.is_some());
        let (profile, spread) = (self.profile[at], self.spread[at]);
        let (next_profile, next_spread) = if profile.is_nan() {
            (value, f64::NAN)
        } else if sample.is_none() {
            (profile, spread)
        } else {
            let deviation = (value - profile).abs();
            let spread = if spread.is_nan() { deviation } else { spread + PROFILE_RATE * (deviation - spread) };
            (profile + PROFILE_RATE * (value - profile), spread)
        };
        self.profile.push(next_profile);
        self.spread.push(next_spread);
        let rate = 2.0 / (1.0 + self.shape.season.min(at + 1) as f64);
        let slow = self.slow.last().copied().unwrap_or(value);
        self.slow.push(slow + rate * (value - slow));
        if self.values.len() >= self.shape.capacity + self.shape.capacity / 8 {
            self.drop_oldest(self.values.len() - self.shape.capacity);
        }
    }

    /// Samples kept.
    pub fn len(&self) -> usize {
        self.values.len()
    }

    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Samples ever pushed.
    pub fn seen(&self) -> u64 {
        self.dropped + self.values.len() as u64
    }

    /// Samples dropped before index 0.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    pub fn values(&self) -> &[f64] {
        &self.values
    }

    pub fn is_measured(&self, index: usize) -> bool {
        self.measured.get(index).copied().unwrap_or(false)
    }

    /// Sample at `index`, which may be before the oldest kept.
    pub fn value(&self, index: isize) -> Option<f64> {
        usize::try_from(index).ok().and_then(|i| self.values.get(i)).copied()
    }

    /// What earlier seasons say about slot `index`, which may be up to a season after the newest sample.
    pub fn profile(&self, index: usize) -> Option<f64> {
        self.profile.get(index).copied().filter(|v| !v.is_nan())
    }

    /// Mean absolute deviation of earlier seasons from the profile at slot `index`.
    pub fn spread(&self, index: usize) -> Option<f64> {
        self.spread.get(index).copied().filter(|v| !v.is_nan())
    }

    /// Slow level at `index`.
    pub fn slow(&self, index: usize) -> f64 {
        self.slow.get(index).copied().unwrap_or(0.0)
    }

    /// Position of slot `index` in its season.
    pub fn phase(&self, index: usize) -> usize {
        let start = self.shape.start_s / u64::from(self.shape.step_s);
        ((start + self.dropped + index as u64) % self.shape.season as u64) as usize
    }

    /// Day of the week of slot `index`, 0..7, counted from the first sample's where the start is unknown.
    pub fn weekday(&self, index: usize) -> usize {
        let seconds = self.shape.start_s + (self.dropped + index as u64) * u64::from(self.shape.step_s);
        ((seconds / 86_400) % 7) as usize
    }

    /// Heap bytes held.
    pub fn bytes(&self) -> usize {
        8 * (self.values.capacity() + self.profile.capacity() + self.spread.capacity() + self.slow.capacity())
            + self.measured.capacity()
    }

    fn drop_oldest(&mut self, count: usize) {
        self.values.drain(..count);
        self.measured.drain(..count);
        self.profile.drain(..count);
        self.spread.drain(..count);
        self.slow.drain(..count);
        self.dropped += count as u64;
    }
}
