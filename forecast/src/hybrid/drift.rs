//! Has the series changed, so that what was learnt is worth less? A two-sided test on the surprise of each sample.

use crate::codec::{Reader, Writer};
use crate::error::DecodeError;
use crate::quantiles::{LEVEL_COUNT, LEVELS, MEDIAN, Quantiles, probability_below};

/// Surprise per sample that is let pass.
const SLACK: f64 = 0.25;
/// Accumulated surprise that counts as a change.
const THRESHOLD: f64 = 10.0;

/// Cumulated sums (Page) of where samples fall in the distribution forecast for them a step or a few ahead: too high, too low,
/// or too often outside. Places in the distribution, not distances, so that a skewed series is no surprise.
#[derive(Debug, Clone, Default)]
pub struct Drift {
    above: f64,
    below: f64,
    scatter: f64,
    /// Changes found so far.
    changes: u64,
}

impl Drift {
    /// Takes notice of a sample and of what had been forecast for it.
    pub fn mature(&mut self, issued: &Quantiles, actual: f64) {
        let place = if actual == issued[MEDIAN] { 0.0 } else { 2.0 * probability_below(issued, actual) - 1.0 };
        self.above = (self.above + place - SLACK).max(0.0);
        self.below = (self.below - place - SLACK).max(0.0);
        let outside = if actual < issued[1] || actual > issued[LEVEL_COUNT - 2] { 1.0 } else { 0.0 };
        let usual = 1.0 - (LEVELS[LEVEL_COUNT - 2] - LEVELS[1]);
        self.scatter = (self.scatter + outside - 2.0 * usual).max(0.0);
        if self.above.max(self.below).max(self.scatter) > THRESHOLD {
            *self = Self { changes: self.changes + 1, ..Self::default() };
        }
    }

    /// Changes found so far.
    pub fn changes(&self) -> u64 {
        self.changes
    }

    pub(super) fn encode(&self, out: &mut Writer) {
        for value in [self.above, self.below, self.scatter] {
            out.f64(value);
        }
        out.u64(self.changes);
    }

    pub(super) fn decode(from: &mut Reader) -> Result<Self, DecodeError> {
        Ok(Self {
            above: from.f64("drift")?,
            below: from.f64("drift")?,
            scatter: from.f64("drift")?,
            changes: from.u64("drift")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    /// Changes found in `count` samples of mean `shift` and deviation `width`, forecast as standard normal.
    fn changes(count: usize, shift: f64, width: f64) -> u64 {
        let standard = [-1.645, -1.282, -0.674, 0.0, 0.674, 1.282, 1.645];
        let (mut drift, mut random) = (Drift::default(), Random::new(5));
        (0..count).for_each(|_| drift.mature(&standard, shift + width * random.normal()));
        drift.changes()
    }

    #[test]
    fn a_shift_and_a_wider_scatter_are_found_soon_and_calm_series_stay_calm() {
        assert!(changes(5000, 0.0, 1.0) <= 1, "{}", changes(5000, 0.0, 1.0));
        assert!(changes(30, 1.5, 1.0) >= 1);
        assert!(changes(30, -1.5, 1.0) >= 1);
        assert!(changes(80, 0.0, 3.0) >= 1);
    }
}
