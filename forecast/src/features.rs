//! What models see of a history at one origin, for one step ahead.
//!
//! A row is the features of the origin (lags, levels, spreads), then those of the target slot (calendar, what earlier
//! seasons, weeks and periods had there). All values are in units of the fitted [`Scale`]; NaN where unknown.

use crate::codec::{Reader, Writer};
use crate::error::DecodeError;
use crate::history::History;

/// Features of the origin.
pub const ORIGIN_FEATURES: usize = 26;
/// Features of the target slot.
pub const TARGET_FEATURES: usize = 25;
/// Features a row.
pub const ROW_FEATURES: usize = ORIGIN_FEATURES + TARGET_FEATURES;

/// One row, origin features first.
pub type Row = [f32; ROW_FEATURES];

/// Position of features that a linear model also uses by name.
pub mod column {
    use super::ORIGIN_FEATURES as T;
    /// Newest value.
    pub const LAST: usize = 0;
    /// Steps ahead.
    pub const STEP: usize = T;
    /// Phase of the season, 0..1.
    pub const PHASE: usize = T + 1;
    /// Phase of the hour, 0..1.
    pub const HOUR_PHASE: usize = T + 2;
    /// Day of the week.
    pub const WEEKDAY: usize = T + 3;
    /// Phase of the detected period, 0..1.
    pub const PERIOD_PHASE: usize = T + 4;
    /// Kind of the event that covers the target plus 1; 0 without one.
    pub const EVENT_KIND: usize = T + 5;
    /// Target features up to here are categories, not quantities.
    pub const CATEGORIES: usize = 6;
    /// What earlier seasons say about the target.
    pub const PROFILE: usize = T + 6;
    /// The value one season before the target.
    pub const YESTERDAY: usize = T + 9;
    /// The value one week before the target.
    pub const WEEK: usize = T + 16;
    /// The value one detected period before the target.
    pub const PERIOD: usize = T + 21;
    /// Effect of the event that covers the target.
    pub const EVENT_EFFECT: usize = T + 23;
}

/// Position and size of a series' values, by which models see it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scale {
    pub location: f64,
    pub unit: f64,
    /// The 90th percentile: a value above it is a burst.
    pub high: f64,
}

/// Bound of scaled values.
const LIMIT: f64 = 1e4;

impl Scale {
    /// Median and a robust deviation of `values`; a constant series gets unit 1.
    pub fn of(values: &[f64]) -> Self {
        let mut sorted = values.to_vec();
        sorted.sort_unstable_by(f64::total_cmp);
        let at = |q| crate::quantiles::quantile_of_sorted(&sorted, q);
        let location = at(0.5);
        let deviation = values.iter().map(|v| (v - location).abs()).sum::<f64>() / values.len().max(1) as f64;
        let spread = (at(0.9) - at(0.1)) / 2.0;
        let unit = if spread > deviation * 0.2 { 0.5 * (spread + deviation) } else { deviation };
        let unit = if unit > location.abs() * 1e-12 && unit > 0.0 { unit } else { 1.0 };
        Self { location, unit, high: at(0.9) }
    }

    /// `value` in scaled units.
    pub fn scaled(&self, value: f64) -> f32 {
        ((value - self.location) / self.unit).clamp(-LIMIT, LIMIT) as f32
    }
}

/// Length of the strongest period shorter than the season, found in the autocorrelation; `None` without one.
pub fn strongest_period(values: &[f64], season: usize) -> Option<usize> {
    const SAMPLES: usize = 4096;
    const LEAST_CORRELATION: f64 = 0.2;
    let values = &values[values.len().saturating_sub(SAMPLES)..];
    let longest = (season - 1).min(values.len() / 4);
    if longest < 4 {
        return None;
    }
    let scale = Scale::of(values);
    // Bounded, so that one burst does not decide.
    let z: Vec<f32> = values.iter().map(|&v| scale.scaled(v).clamp(-4.0, 4.0)).collect();
    let mean = z.iter().sum::<f32>() / z.len() as f32;
    let correlation = |lag: usize| -> f64 {
        z[lag..].iter().zip(&z).map(|(a, b)| f64::from((a - mean) * (b - mean))).sum::<f64>() / (z.len() - lag) as f64
    };
    let variance = correlation(0);
    if variance <= 0.0 {
        return None;
    }
    let all: Vec<f64> = (1..=longest + 1).map(|lag| correlation(lag) / variance).collect();
    let mut best = None;
    for lag in 2..=longest {
        let here = all[lag - 1];
        let peak = here > all[lag - 2] && here >= all[lag];
        if peak && here > best.map_or(LEAST_CORRELATION, |(_, c)| c + 0.03) {
            best = Some((lag, here));
        }
    }
    best.map(|(lag, _)| lag)
}

/// What is fixed for all rows of a fit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct View {
    pub scale: Scale,
    /// Period found by [`strongest_period`].
    pub period: Option<usize>,
}

impl View {
    pub fn of(history: &History, end: usize) -> Self {
        let values = &history.values()[..end.min(history.len())];
        Self { scale: Scale::of(values), period: strongest_period(values, history.shape().season) }
    }

    fn effect(&self, effect: f64) -> f32 {
        (effect / self.scale.unit).clamp(-LIMIT, LIMIT) as f32
    }

    /// Rows of all steps after `origin`.
    pub fn rows(&self, history: &History, origin: usize) -> Vec<Row> {
        let mut row = [0.0; ROW_FEATURES];
        self.origin(history, origin, &mut row);
        (1..=history.shape().horizon)
            .map(|step| {
                self.target(history, origin, step, &mut row);
                row
            })
            .collect()
    }

    /// The part of a row that depends on the origin only. Looks at samples `..=origin`.
    pub fn origin(&self, history: &History, origin: usize, row: &mut Row) {
        let z = |i: isize| history.value(i).map_or(f32::NAN, |v| self.scale.scaled(v));
        let t = origin as isize;
        let season = history.shape().season as isize;
        let mut put = Cursor { row, at: 0 };
        for lag in [0, 1, 2, 3, 4, 5, 7, 11] {
            put.next(z(t - lag));
        }
        let values = &history.values()[..=origin];
        let last = |n: usize| &values[values.len().saturating_sub(n)..];
        let mean = |n: usize| {
            let part = last(n);
            self.scale.scaled(part.iter().sum::<f64>() / part.len() as f64)
        };
        let means = [mean(3), mean(6), mean(12), mean(36)];
        means.into_iter().for_each(|m| put.next(m));
        put.next(self.scale.scaled(history.slow(origin)));
        let moves = |n: usize| {
            let part = last(n + 1);
            let sum: f64 = part.windows(2).map(|w| (w[1] - w[0]).abs()).sum();
            (sum / self.scale.unit / part.len().max(2) as f64).min(LIMIT) as f32
        };
        put.next(moves(6));
        put.next(moves(36));
        let bounds =
            |n: usize| last(n).iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), &v| (l.min(v), h.max(v)));
        let (low, high) = bounds(12);
        put.next(self.scale.scaled(low));
        put.next(self.scale.scaled(high));
        put.next(self.scale.scaled(bounds(36).1));
        let season_bound = season as usize;
        let quiet = values.iter().rev().take(season_bound).position(|&v| v > self.scale.high);
        put.next(quiet.unwrap_or(season_bound) as f32);
        let busy = values.iter().rev().take(season_bound).position(|&v| v <= self.scale.high);
        put.next(busy.unwrap_or(season_bound) as f32);
        // How far recent samples were off the profile.
        let off = |n: usize| {
            let (mut sum, mut count) = (0.0, 0);
            for (i, value) in values.iter().enumerate().skip((origin + 1).saturating_sub(n)) {
                if let Some(profile) = history.profile(i) {
                    sum += value - profile;
                    count += 1;
                }
            }
            if count == 0 { f32::NAN } else { (sum / f64::from(count) / self.scale.unit).clamp(-LIMIT, LIMIT) as f32 }
        };
        put.next(off(1));
        put.next(off(6));
        put.next(off(36));
        put.next(z(t) - z(t - season));
        let before: f32 = (0..3).map(|k| z(t - k - season)).sum::<f32>() / 3.0;
        put.next(means[0] - before);
        put.next(history.event_effect(origin, origin).map_or(0.0, |(_, effect)| self.effect(effect)));
        debug_assert_eq!(put.at, ORIGIN_FEATURES);
    }

    /// The part that depends on the target slot, `step` steps ahead (1-based). Looks at samples `..=origin`.
    pub fn target(&self, history: &History, origin: usize, step: usize, row: &mut Row) {
        let shape = history.shape();
        let season = shape.season as isize;
        let slot = origin + step;
        let t = origin as isize;
        let i = slot as isize;
        let known =
            |i: isize| if i <= t { history.value(i).map_or(f32::NAN, |v| self.scale.scaled(v)) } else { f32::NAN };
        let mut put = Cursor { row, at: ORIGIN_FEATURES };
        put.next(step as f32);
        put.next(history.phase(slot) as f32 / season as f32);
        let hour = shape.hour();
        let absolute = (history.dropped() + slot as u64) as usize;
        put.next(if hour > 0 { (absolute % hour) as f32 / hour as f32 } else { 0.0 });
        put.next(history.weekday(slot) as f32);
        put.next(self.period.map_or(0.0, |p| (absolute % p) as f32 / p as f32));
        let event = history.event_effect(origin, slot);
        put.next(event.map_or(0.0, |(e, _)| f32::from(e.kind) + 1.0));
        // A profile beyond the newest sample's season is not known yet.
        let profile = |i: usize| if i <= origin + shape.season { history.profile(i) } else { None };
        let expected = profile(slot).map_or(f32::NAN, |v| self.scale.scaled(v));
        put.next(expected);
        let spread = if slot <= origin + shape.season { history.spread(slot) } else { None };
        put.next(spread.map_or(f32::NAN, |v| (v / self.scale.unit).min(LIMIT) as f32));
        put.next(expected - profile(origin).map_or(f32::NAN, |v| self.scale.scaled(v)));
        let around = |n: isize, reach: isize| {
            let (mut sum, mut count, mut high, mut low) = (0.0, 0, f32::NEG_INFINITY, f32::INFINITY);
            for j in i - n - reach..=i - n + reach {
                let v = known(j);
                if !v.is_nan() {
                    sum += v;
                    count += 1;
                    high = high.max(v);
                    low = low.min(v);
                }
            }
            if count == 0 { [f32::NAN; 3] } else { [sum / count as f32, low, high] }
        };
        let yesterday = known(i - season);
        put.next(yesterday);
        let [mean, low, high] = around(season, 2);
        put.next(mean);
        put.next(low);
        put.next(high);
        put.next(yesterday - known(t - season));
        put.next(known(i - 2 * season));
        put.next(around(2 * season, 2)[0]);
        put.next(known(i - 7 * season));
        put.next(around(7 * season, 2)[0]);
        put.next(known(i - 7 * season) - known(t - 7 * season));
        let back = |period: usize, times: usize| {
            let period = period.max(1);
            known(i - (step.div_ceil(period) * period + (times - 1) * period) as isize)
        };
        if hour > 0 {
            put.next(back(hour, 1));
            put.next(back(hour, 2));
        } else {
            put.next(f32::NAN);
            put.next(f32::NAN);
        }
        put.next(self.period.map_or(f32::NAN, |p| back(p, 1)));
        put.next(self.period.map_or(f32::NAN, |p| back(p, 2)));
        put.next(event.map_or(0.0, |(_, effect)| self.effect(effect)));
        let start = event.map_or(0, |(e, _)| history.dropped() + slot as u64 - e.start);
        put.next(start.min(1 << 20) as f32);
        debug_assert_eq!(put.at, ROW_FEATURES);
    }
}

struct Cursor<'a> {
    row: &'a mut Row,
    at: usize,
}

impl Cursor<'_> {
    fn next(&mut self, value: f32) {
        self.row[self.at] = value;
        self.at += 1;
    }
}

impl View {
    pub(crate) fn encode(&self, out: &mut Writer) {
        for value in [self.scale.location, self.scale.unit, self.scale.high] {
            out.f64(value);
        }
        out.count(self.period.unwrap_or(0));
    }

    pub(crate) fn decode(from: &mut Reader) -> Result<Self, DecodeError> {
        let (location, unit, high) = (from.f64("location")?, from.f64("unit")?, from.f64("high")?);
        if unit <= 0.0 {
            return Err(from.range("unit"));
        }
        let period = Some(from.u32("period")? as usize).filter(|&p| p > 0);
        Ok(Self { scale: Scale { location, unit, high }, period })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ShapeError;
    use crate::history::Shape;

    fn history(count: usize, value: impl Fn(usize) -> f64) -> Result<History, ShapeError> {
        let mut history = History::new(Shape::new(300, 288, 12)?);
        (0..count).for_each(|i| history.push(Some(value(i))));
        Ok(history)
    }

    #[test]
    fn the_period_of_a_job_that_runs_every_half_hour_is_found() {
        let burst = |i: usize| if i % 6 == 2 { 80.0 } else { 5.0 + (i * 31 % 7) as f64 };
        let values: Vec<f64> = (0..1500).map(burst).collect();
        assert_eq!(strongest_period(&values, 288), Some(6));
        let noise: Vec<f64> = (0..1500).map(|i: usize| (i * i * 7919 % 104_729) as f64).collect();
        assert_eq!(strongest_period(&noise, 288), None);
        assert_eq!(strongest_period(&[1.0; 500], 288), None);
    }

    #[test]
    fn columns_are_where_their_names_say() -> Result<(), ShapeError> {
        let mut history = history(2500, |i| i as f64)?;
        let origin = 2499;
        history.schedule(crate::events::Event { start: 2505, length: 3, kind: 4, size: Some(1.5) });
        let view = View { scale: Scale { location: 0.0, unit: 1.0, high: 1e9 }, period: Some(10) };
        let row = view.rows(&history, origin)[6];
        let target = 2506.0;
        assert_eq!(row[column::LAST], 2499.0);
        assert_eq!(row[column::STEP], 7.0);
        assert_eq!(row[column::PROFILE], history.profile(2506).unwrap_or(0.0) as f32);
        assert_eq!(row[column::YESTERDAY], target - 288.0);
        assert_eq!(row[column::WEEK], target - 7.0 * 288.0);
        assert_eq!(row[column::PERIOD], target - 10.0);
        assert_eq!((row[column::EVENT_KIND], row[column::EVENT_EFFECT], row[ROW_FEATURES - 1]), (5.0, 1.5, 1.0));
        Ok(())
    }

    #[test]
    fn no_feature_looks_past_the_origin() -> Result<(), ShapeError> {
        let view = View { scale: Scale { location: 0.0, unit: 1.0, high: 20.0 }, period: Some(7) };
        let (known, other) =
            (history(900, |i| (i % 29) as f64)?, history(900, |i| if i > 650 { -7e5 } else { (i % 29) as f64 })?);
        let bits = |h: &History, t| view.rows(h, t).iter().flatten().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&known, 650), bits(&other, 650));
        assert_ne!(bits(&known, 651), bits(&other, 651));
        Ok(())
    }
}
