//! What a model may look at: the newest samples on a regular grid, with the seasonal profile beside them.
//!
//! Everything stored for slot `i` of the season profile comes from samples one season or more before `i`, so what is
//! known about the next season's slots never depends on anything later than the newest sample.

use crate::codec::{Reader, Writer};
use crate::error::{DecodeError, ShapeError};
use crate::events::{Event, Schedule};

/// Weight of the newest season in the profile.
const PROFILE_RATE: f64 = 0.3;
/// No model looks further ahead.
pub const MAX_HORIZON: usize = 64;
/// Longest season, in samples: a day at one sample in ten seconds.
pub const MAX_SEASON: usize = 8640;
/// Occurrences of a kind of event from which its effect is taken.
pub const OCCURRENCES: usize = 4;
/// Most samples kept.
pub const MAX_CAPACITY: usize = 64 * MAX_SEASON;
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
        if self.capacity < least || self.capacity > MAX_CAPACITY {
            return Err(ShapeError::Capacity { given: self.capacity, least, most: MAX_CAPACITY });
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
    schedule: Schedule,
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
            schedule: Schedule::default(),
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
        } else if sample.is_none() || self.schedule.at(self.dropped + at as u64).is_some() {
            // What an event does is not part of the season.
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
        (start.saturating_add(self.dropped + index as u64) % self.shape.season as u64) as usize
    }

    /// Day of the week of slot `index`, 0..7, counted from the first sample's where the start is unknown.
    pub fn weekday(&self, index: usize) -> usize {
        let since = u128::from(self.dropped + index as u64) * u128::from(self.shape.step_s);
        ((u128::from(self.shape.start_s) + since) / 86_400 % 7) as usize
    }

    /// Makes an event known; it may be past or to come.
    pub fn schedule(&mut self, event: Event) {
        self.schedule.add(event);
    }

    /// Takes an event out of the schedule; false if it was not there.
    pub fn cancel(&mut self, event: &Event) -> bool {
        self.schedule.cancel(event)
    }

    /// The event that covers slot `index`, with the effect its kind had at the same offset in the last [`OCCURRENCES`],
    /// as known at `origin`: in the series' unit, 0 where nothing is known.
    pub fn event_effect(&self, origin: usize, index: usize) -> Option<(Event, f64)> {
        if self.schedule.is_empty() {
            return None;
        }
        let event = *self.schedule.at(self.dropped + index as u64)?;
        let offset = self.dropped + index as u64 - event.start;
        let (mut sum, mut count) = (0.0, 0);
        for past in self.schedule.earlier(event.kind, event.start).take(4 * OCCURRENCES) {
            let Some(deviation) = self.event_deviation(past, offset, origin) else { continue };
            let ratio = match (event.size, past.size) {
                (Some(now), Some(then)) if then != 0.0 => (now / then).clamp(-10.0, 10.0),
                _ => 1.0,
            };
            sum += deviation * ratio;
            count += 1;
            if count == OCCURRENCES {
                break;
            }
        }
        let effect = if count > 0 { sum / count as f64 } else { event.size.unwrap_or(0.0) };
        Some((event, effect.clamp(-MAX_VALUE, MAX_VALUE)))
    }

    /// How far the sample `offset` into a past event was off what would have come without it: the profile, shifted by
    /// how far the samples before the event were off theirs. `None` if that sample is not kept or not yet known.
    fn event_deviation(&self, past: &Event, offset: u64, origin: usize) -> Option<f64> {
        const BEFORE: usize = 6;
        if offset >= u64::from(past.length) {
            return None;
        }
        let start = usize::try_from(past.start.checked_sub(self.dropped)?).ok()?;
        let at = start.checked_add(usize::try_from(offset).ok()?)?;
        if at > origin || at >= self.values.len() || start == 0 {
            return None;
        }
        let before = start.saturating_sub(BEFORE)..start;
        let count = before.len() as f64;
        let level = self.values[before.clone()].iter().sum::<f64>() / count;
        let expected = match self.profile(at) {
            Some(profile) if before.clone().all(|i| self.profile(i).is_some()) => {
                let usual = before.filter_map(|i| self.profile(i)).sum::<f64>() / count;
                level + profile - usual
            }
            _ => level,
        };
        Some(self.values[at] - expected)
    }

    /// Starts with the season profile of a sibling (a guest of the same template), aligned by the time of day. Only an
    /// empty history of the same season and step takes it; false otherwise.
    pub fn adopt_profile(&mut self, sibling: &Self) -> bool {
        let season = self.shape.season;
        if !self.is_empty() || sibling.shape.season != season || sibling.shape.step_s != self.shape.step_s {
            return false;
        }
        let newest = sibling.profile.len() - season;
        for slot in newest..sibling.profile.len() {
            let phase = sibling.phase(slot);
            let here = (phase + season - self.phase(0)) % season;
            self.profile[here] = sibling.profile[slot];
            self.spread[here] = sibling.spread[slot];
        }
        true
    }

    /// Heap bytes held.
    pub fn bytes(&self) -> usize {
        8 * (self.values.capacity() + self.profile.capacity() + self.spread.capacity() + self.slow.capacity())
            + self.measured.capacity()
            + self.schedule.bytes()
    }

    fn drop_oldest(&mut self, count: usize) {
        self.values.drain(..count);
        self.measured.drain(..count);
        self.profile.drain(..count);
        self.spread.drain(..count);
        self.slow.drain(..count);
        self.dropped += count as u64;
    }

    pub(crate) fn encode(&self, out: &mut Writer) {
        let shape = &self.shape;
        out.u32(shape.step_s);
        out.count(shape.season);
        out.count(shape.horizon);
        out.u64(shape.start_s);
        out.count(shape.capacity);
        out.u64(self.dropped);
        out.f64s(&self.values);
        self.measured.iter().for_each(|&m| out.u8(u8::from(m)));
        for values in [&self.profile, &self.spread] {
            values.iter().for_each(|&v| out.f64(v));
        }
        self.slow.iter().for_each(|&v| out.f64(v));
        self.schedule.encode(out);
    }

    pub(crate) fn decode(from: &mut Reader) -> Result<Self, DecodeError> {
        let step_s = from.u32("step")?;
        let season = from.u32("season")? as usize;
        let horizon = from.u32("horizon")? as usize;
        let start_s = from.u64("start")?;
        let capacity = from.u32("capacity")? as usize;
        let shape = Shape { step_s, season, horizon, start_s, capacity }.checked()?;
        let dropped = from.u64("dropped samples")?;
        let values = from.f64s("samples")?;
        if values.len() > capacity + capacity / 8 || dropped > u64::MAX / 4 || start_s > u64::MAX / 4 {
            return Err(from.range("samples"));
        }
        let measured = values.iter().map(|_| from.u8("gaps").map(|m| m != 0)).collect::<Result<_, _>>()?;
        let mut seasonal = |field| (0..values.len() + season).map(|_| from.f64_or_nan(field)).collect::<Result<_, _>>();
        let (profile, spread) = (seasonal("profile")?, seasonal("spread")?);
        let slow = values.iter().map(|_| from.f64("slow level")).collect::<Result<_, _>>()?;
        let schedule = Schedule::decode(from)?;
        Ok(Self { shape, dropped, values, measured, profile, spread, slow, schedule })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history() -> Result<History, ShapeError> {
        Ok(History::new(Shape { capacity: 100, ..Shape::new(60, 10, 3)? }))
    }

    #[test]
    fn the_profile_of_a_slot_comes_from_earlier_seasons_only() -> Result<(), ShapeError> {
        let mut history = history()?;
        for i in 0..25 {
            history.push(Some(f64::from(i % 10)));
        }
        assert_eq!(history.profile(9), None);
        assert_eq!(history.profile(34), Some(4.0));
        assert_eq!(history.profile(35), None);
        Ok(())
    }

    #[test]
    fn gaps_are_carried_forward_and_leading_ones_are_skipped() -> Result<(), ShapeError> {
        let mut history = history()?;
        for sample in [None, Some(f64::NAN), Some(3.0), None, Some(f64::INFINITY), Some(5.0)] {
            history.push(sample);
        }
        assert_eq!(history.values(), [3.0, 3.0, 3.0, 5.0]);
        assert_eq!((history.seen(), history.phase(0)), (6, 2));
        assert!(history.is_measured(0) && !history.is_measured(1));
        Ok(())
    }

    #[test]
    fn a_start_beyond_all_calendars_overflows_nothing() -> Result<(), ShapeError> {
        let mut history = History::new(Shape { start_s: u64::MAX, ..Shape::new(1, 10, 3)? });
        history.push(Some(1.0));
        assert!(history.phase(2000) < 10 && history.weekday(usize::MAX / 2) < 7);
        Ok(())
    }

    #[test]
    fn memory_is_bounded_and_phases_survive_what_is_dropped() -> Result<(), ShapeError> {
        let mut history = history()?;
        for i in 0..1_000u32 {
            history.push(Some(f64::from(i % 10)));
        }
        assert!(history.len() <= 113);
        for index in 0..history.len() {
            assert_eq!(history.values()[index], history.phase(index) as f64);
            assert_eq!(history.profile(index), Some(history.values()[index]));
        }
        Ok(())
    }

    #[test]
    fn an_events_effect_is_learnt_from_the_last_ones_and_leaves_the_profile_alone() -> Result<(), ShapeError> {
        let mut history = history()?;
        for start in [23, 47] {
            history.schedule(Event { start, length: 2, kind: 1, size: Some(2.0) });
        }
        history.schedule(Event { start: 71, length: 2, kind: 1, size: Some(4.0) });
        for i in 0..70u32 {
            let busy = [23, 24, 47, 48].contains(&i);
            history.push(Some(f64::from(i % 10) + if busy { 50.0 } else { 0.0 }));
        }
        let (event, effect) = history.event_effect(69, 72).ok_or(ShapeError::NoStep)?;
        assert_eq!((event.start, effect), (71, 100.0));
        assert_eq!(history.profile(73), Some(3.0));
        assert!(history.cancel(&event) && !history.cancel(&event));
        assert_eq!(history.event_effect(69, 72), None);
        // Before the second event, only the first is known.
        assert_eq!(history.event_effect(30, 47).map(|(_, e)| e), Some(50.0));
        Ok(())
    }

    #[test]
    fn a_sibling_gives_its_profile_by_time_of_day() -> Result<(), ShapeError> {
        let mut old = history()?;
        for i in 0..43u32 {
            old.push(Some(f64::from(i % 10)));
        }
        let mut young = History::new(Shape { start_s: 60 * 4, ..*old.shape() });
        assert!(young.adopt_profile(&old));
        assert_eq!(young.profile(0), Some(4.0));
        assert_eq!(young.profile(7), Some(1.0));
        Ok(())
    }
}
