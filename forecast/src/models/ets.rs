//! Exponential smoothing: level, damped trend, additive season and an autoregressive error, each following the newest
//! sample; ETS(A,Ad,A) with AR(1). Robust: an outlier counts as a few usual errors, unless it is one of several in a row
//! on the same side: then the level has shifted, and follows at once.
//!
//! A sample updates it in constant time, so it follows level shifts between two learnings. Its smoothing weights are
//! those of a small grid that did best on the history.

use super::{Input, Model, Sample};
use crate::codec::{Reader, Writer};
use crate::error::DecodeError;
use crate::features::View;
use crate::history::History;
use crate::quantiles::{LEVEL_COUNT, LEVELS, Quantiles, quantile_of_sorted};

const LEVEL_RATES: [f64; 5] = [0.02, 0.08, 0.25, 0.55, 0.9];
const TREND_RATES: [f64; 2] = [0.0, 0.05];
const SEASON_RATES: [f64; 3] = [0.0, 0.1, 0.3];
const CARRIES: [f64; 2] = [0.0, 0.6];
/// Share of the trend that is left a step later.
const DAMPING: f64 = 0.9;
/// Samples that the grid is tried on.
const TRIED: usize = 4096;
/// An error counts at most this often the usual one.
const OUTLIER: f64 = 4.0;
/// So many outliers in a row on one side are a shift of the level.
const SHIFT: i32 = 3;
/// Weight of the newest error in the usual one.
const USUAL_RATE: f64 = 0.02;

#[derive(Debug, Clone, Copy, PartialEq)]
struct Rates {
    level: f64,
    /// Share of the level's correction that the trend takes.
    trend: f64,
    season: f64,
    /// Share of the last error that is left a step later.
    carry: f64,
}

/// See the module's text.
#[derive(Debug, Clone)]
pub struct Ets {
    rates: Rates,
    level: f64,
    trend: f64,
    error: f64,
    usual: f64,
    /// Outliers in a row, below 0 where they are low.
    outliers: i32,
    /// Deviation of each phase from the level.
    season: Vec<f64>,
    residuals: Vec<Quantiles>,
    ready: bool,
}

impl Ets {
    pub fn new(horizon: usize, season: usize) -> Self {
        Self {
            rates: Rates { level: LEVEL_RATES[2], trend: 0.0, season: 0.0, carry: 0.0 },
            level: 0.0,
            trend: 0.0,
            error: 0.0,
            usual: 0.0,
            outliers: 0,
            season: vec![0.0; season],
            residuals: vec![[0.0; LEVEL_COUNT]; horizon],
            ready: false,
        }
    }

    /// Starts at sample `first` from the mean deviations of the season after it.
    fn start(&mut self, history: &History, first: usize, rates: Rates) {
        let season = self.season.len();
        let values = history.values();
        let count = (values.len() - first).min(2 * season);
        let mean = values[first..first + count].iter().sum::<f64>() / count.max(1) as f64;
        self.season.fill(0.0);
        if rates.season > 0.0 && count >= season {
            let mut counts = vec![0u32; season];
            for index in first..first + count {
                self.season[history.phase(index)] += values[index] - mean;
                counts[history.phase(index)] += 1;
            }
            self.season.iter_mut().zip(counts).for_each(|(s, n)| *s /= f64::from(n.max(1)));
        }
        self.rates = rates;
        self.level = values[first] - self.season[history.phase(first)];
        (self.trend, self.error, self.usual, self.outliers) = (0.0, 0.0, 0.0, 0);
    }

    fn update(&mut self, value: f64, phase: usize) {
        let expected = self.level + DAMPING * self.trend + self.season[phase];
        let carried = self.rates.carry * self.error;
        let miss = value - expected - carried;
        let size = miss.abs();
        let most = if self.usual > 0.0 { OUTLIER * self.usual } else { f64::INFINITY };
        let bounded = miss.clamp(-most, most);
        self.outliers = match (bounded == miss, miss > 0.0) {
            (true, _) => 0,
            (false, true) => self.outliers.max(0) + 1,
            (false, false) => self.outliers.min(0) - 1,
        };
        self.usual =
            if self.usual > 0.0 { self.usual + USUAL_RATE * (size.min(10.0 * self.usual) - self.usual) } else { size };
        if self.outliers.abs() >= SHIFT {
            (self.level, self.error, self.outliers) = (value - self.season[phase], 0.0, 0);
            return;
        }
        let correction = self.rates.level * bounded;
        self.trend = DAMPING * self.trend + self.rates.trend * correction;
        self.level += self.trend + correction;
        self.season[phase] += self.rates.season * (1.0 - self.rates.level) * bounded;
        self.error = value - self.level - self.season[phase];
    }

    /// `step` (1-based) steps ahead, where the target has `phase`.
    fn ahead(&self, step: usize, phase: usize) -> f64 {
        let trend = DAMPING * (1.0 - DAMPING.powi(step as i32)) / (1.0 - DAMPING);
        self.level + trend * self.trend + self.season[phase] + self.rates.carry.powi(step as i32) * self.error
    }

    /// Mean absolute error of `rates` at the nearest, a middle and the farthest step.
    fn loss(&mut self, history: &History, first: usize, end: usize, rates: Rates) -> f64 {
        let horizon = self.residuals.len();
        let steps = [1, horizon.div_ceil(2), horizon];
        let warm = first + (end - first) / 4;
        self.start(history, first, rates);
        let mut sum = 0.0;
        for t in first + 1..end {
            self.update(history.values()[t], history.phase(t));
            if t >= warm && t + horizon < end {
                for step in steps {
                    sum += (history.values()[t + step] - self.ahead(step, history.phase(t + step))).abs();
                }
            }
        }
        sum
    }
}

impl Model for Ets {
    fn name(&self) -> &'static str {
        "ets"
    }

    fn learn(&mut self, sample: &Sample, slice: usize) -> bool {
        let (history, end) = (sample.history, sample.end);
        let horizon = self.residuals.len();
        let first = end.saturating_sub(TRIED);
        if slice == 0 {
            self.ready = false;
            if end < 4 * horizon + 8 {
                return true;
            }
            let mut best = (f64::INFINITY, self.rates);
            for level in LEVEL_RATES {
                for trend in TREND_RATES {
                    for season in SEASON_RATES {
                        for carry in CARRIES {
                            let rates = Rates { level, trend, season, carry };
                            let loss = self.loss(history, first, end, rates);
                            if loss < best.0 {
                                best = (loss, rates);
                            }
                        }
                    }
                }
            }
            self.rates = best.1;
            return false;
        }
        self.start(history, first, self.rates);
        let warm = first + (end - first) / 4;
        let mut residuals: Vec<Vec<f64>> = vec![Vec::with_capacity(end - warm); horizon];
        for t in first + 1..end {
            self.update(history.values()[t], history.phase(t));
            if t >= warm {
                for step in (1..=horizon).take_while(|step| t + step < end) {
                    let miss = history.values()[t + step] - self.ahead(step, history.phase(t + step));
                    residuals[step - 1].push(miss);
                }
            }
        }
        for (row, residuals) in self.residuals.iter_mut().zip(&mut residuals) {
            residuals.sort_unstable_by(f64::total_cmp);
            *row = LEVELS.map(|level| quantile_of_sorted(residuals, level));
        }
        self.ready = true;
        true
    }

    fn advance(&mut self, history: &History, _view: &View, index: usize) {
        if self.ready && history.is_measured(index) {
            self.update(history.values()[index], history.phase(index));
        }
    }

    fn forecast(&self, input: &Input, out: &mut [Quantiles]) {
        let last = input.history.values()[input.origin];
        for (index, (out, residuals)) in out.iter_mut().zip(&self.residuals).enumerate() {
            let phase = input.history.phase(input.origin + index + 1);
            let point = if self.ready { self.ahead(index + 1, phase) } else { last };
            *out = residuals.map(|r| point + r);
        }
    }

    fn bytes(&self) -> usize {
        8 * self.season.capacity() + size_of::<Quantiles>() * self.residuals.capacity()
    }
}

impl Ets {
    pub(crate) fn encode(&self, out: &mut Writer) {
        out.u8(u8::from(self.ready));
        let Rates { level, trend, season, carry } = self.rates;
        for value in [level, trend, season, carry, self.level, self.trend, self.error, self.usual] {
            out.f64(value);
        }
        out.u32(self.outliers as u32);
        self.season.iter().for_each(|&v| out.f64(v));
        self.residuals.iter().for_each(|r| out.f64s(r));
    }

    pub(crate) fn decode(horizon: usize, season: usize, from: &mut Reader) -> Result<Self, DecodeError> {
        let mut model = Self::new(horizon, season);
        model.ready = from.u8("whether smoothing is ready")? != 0;
        let mut next = || from.f64("smoothing");
        model.rates = Rates { level: next()?, trend: next()?, season: next()?, carry: next()? };
        (model.level, model.trend, model.error, model.usual) = (next()?, next()?, next()?, next()?);
        model.outliers = from.u32("smoothing")? as i32;
        if [model.rates.level, model.rates.season, model.rates.carry].iter().any(|r| !(0.0..=1.0).contains(r))
            || model.outliers.unsigned_abs() >= SHIFT.unsigned_abs()
        {
            return Err(from.range("smoothing rates"));
        }
        for value in &mut model.season {
            *value = from.f64("season")?;
        }
        for row in &mut model.residuals {
            *row = from.f64_array("residuals")?;
        }
        Ok(model)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ShapeError;
    use crate::history::Shape;

    #[test]
    fn a_season_on_a_level_that_shifted_is_followed() -> Result<(), ShapeError> {
        let mut history = History::new(Shape::new(3600, 24, 6)?);
        let value = |i: usize| f64::from([10, 20, 40, 15][i % 4]) + if i >= 450 { 100.0 } else { 0.0 };
        (0..500).for_each(|i| history.push(Some(value(i))));
        let mut ets = Ets::new(6, 24);
        for season in [0.0, 0.1] {
            ets.start(&history, 0, Rates { level: 0.25, trend: 0.0, season, carry: 0.0 });
            (1..500).for_each(|t| ets.update(history.values()[t], history.phase(t)));
        }
        for (step, expected) in [110.0, 120.0, 140.0, 115.0].into_iter().enumerate() {
            let ahead = ets.ahead(step + 1, history.phase(500 + step));
            assert!((ahead - expected).abs() < 3.0, "{ahead} for {expected}");
        }
        Ok(())
    }

    #[test]
    fn one_outlier_counts_little_and_several_in_a_row_are_a_shift() {
        let mut ets = Ets::new(6, 24);
        ets.rates = Rates { level: 0.1, trend: 0.0, season: 0.0, carry: 0.0 };
        (0..200).for_each(|i| ets.update(50.0 + f64::from(i % 3), 0));
        let before = ets.level;
        ets.update(500.0, 0);
        assert!((ets.level - before).abs() < 2.0, "{before} to {}", ets.level);
        ets.update(51.0, 0);
        (0..3).for_each(|i| ets.update(100.0 + f64::from(i % 3), 0));
        assert!((ets.level - 101.0).abs() < 2.0, "{before} to {}", ets.level);
    }
}
