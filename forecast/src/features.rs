//! What models see of a history at one origin, for one step ahead.
//!
//! A row is the features of the origin (lags, levels, spreads), then those of the target slot (calendar, what earlier
//! seasons, weeks and periods had there). All values are in units of the fitted [`Scale`]; NaN where unknown.

use crate::history::History;

/// Features of the origin.
pub const ORIGIN_FEATURES: usize = 25;
/// Features of the target slot.
pub const TARGET_FEATURES: usize = 22;
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
            for i in (origin + 1).saturating_sub(n)..=origin {
                if let Some(profile) = history.profile(i) {
                    sum += values[i] - profile;
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
