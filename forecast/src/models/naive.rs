//! Last value and seasonal naive, each with the quantiles of its own residuals.

use super::{Input, Model, Sample};
use crate::codec::{Reader, Writer};
use crate::error::DecodeError;
use crate::history::History;
use crate::quantiles::{LEVELS, MEDIAN, Quantiles, quantile_of_sorted};

/// Residuals come from at most this many seasons.
const SEASONS: usize = 14;

/// What a naive forecaster repeats.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repeat {
    /// The newest value.
    Last,
    /// The value one season before the target.
    Season,
    /// The profile of earlier seasons at the target, plus a share of how far the newest sample is off it.
    Profile,
}

/// Repeats a value, with the residuals' quantiles around it.
#[derive(Debug, Clone)]
pub struct Naive {
    repeat: Repeat,
    /// Residual quantiles a step.
    residuals: Vec<Quantiles>,
    /// [`Repeat::Profile`]: share of the present deviation that is left, a step.
    carry: Vec<f64>,
}

impl Naive {
    pub fn new(repeat: Repeat, horizon: usize) -> Self {
        Self { repeat, residuals: vec![[0.0; LEVELS.len()]; horizon], carry: vec![0.0; horizon] }
    }

    fn point(&self, history: &History, origin: usize, step: usize) -> Option<f64> {
        let last = history.values()[origin];
        match self.repeat {
            Repeat::Last => Some(last),
            Repeat::Season => history.value((origin + step) as isize - history.shape().season as isize),
            Repeat::Profile => {
                let (here, there) = (history.profile(origin)?, history.profile(origin + step)?);
                Some(there + self.carry[step - 1] * (last - here))
            }
        }
    }

    /// Least-squares share of today's deviation from the profile that is still there `step` steps later.
    fn carried(history: &History, start: usize, end: usize, step: usize) -> f64 {
        let (mut product, mut square) = (0.0, 0.0);
        for t in start..end.saturating_sub(step) {
            if let (Some(a), Some(b)) = (history.profile(t), history.profile(t + step)) {
                let (x, y) = (history.values()[t] - a, history.values()[t + step] - b);
                product += x * y;
                square += x * x;
            }
        }
        if square > 0.0 { (product / square).clamp(-1.0, 1.0) } else { 0.0 }
    }
}

impl Model for Naive {
    fn name(&self) -> &'static str {
        match self.repeat {
            Repeat::Last => "last",
            Repeat::Season => "seasonal",
            Repeat::Profile => "profile",
        }
    }

    fn learn(&mut self, sample: &Sample, _slice: usize) -> bool {
        let (history, end) = (sample.history, sample.end);
        let season = history.shape().season;
        let start = end.saturating_sub(SEASONS * season);
        for step in 1..=self.residuals.len() {
            self.carry[step - 1] = Self::carried(history, start, end, step);
            let mut residuals: Vec<f64> = (start..end.saturating_sub(step))
                .filter(|t| history.is_measured(t + step))
                .filter_map(|t| self.point(history, t, step).map(|p| history.values()[t + step] - p))
                .collect();
            residuals.sort_unstable_by(f64::total_cmp);
            let row = &mut self.residuals[step - 1];
            for (value, level) in row.iter_mut().zip(LEVELS) {
                *value = quantile_of_sorted(&residuals, level);
            }
            if self.repeat == Repeat::Last {
                row[MEDIAN] = 0.0;
            }
        }
        true
    }

    fn forecast(&self, input: &Input, out: &mut [Quantiles]) {
        let last = input.history.values()[input.origin];
        for (step, (row, residuals)) in out.iter_mut().zip(&self.residuals).enumerate() {
            let point = self.point(input.history, input.origin, step + 1).unwrap_or(last);
            *row = residuals.map(|r| point + r);
        }
    }

    fn bytes(&self) -> usize {
        size_of::<Quantiles>() * self.residuals.capacity() + 8 * self.carry.capacity()
    }
}

impl Naive {
    pub(crate) fn encode(&self, out: &mut Writer) {
        for (residuals, &carry) in self.residuals.iter().zip(&self.carry) {
            out.f64s(residuals);
            out.f64(carry);
        }
    }

    pub(crate) fn decode(repeat: Repeat, horizon: usize, from: &mut Reader) -> Result<Self, DecodeError> {
        let mut model = Self::new(repeat, horizon);
        for step in 0..horizon {
            model.residuals[step] = from.f64_array("residuals")?;
            model.carry[step] = from.f64("carry")?;
        }
        Ok(model)
    }
}
