//! The promise that the hybrid is never worse than the last value for long.

use crate::codec::{Reader, Writer};
use crate::error::DecodeError;
use crate::quantiles::{LEVEL_COUNT, LEVELS, Quantiles, pinball};

/// Share of the loss that is remembered, a matured step: with 12 steps a sample, half is forgotten in 12 samples.
const MEMORY: f64 = 0.995;
/// The last value takes over between these ratios of the mix's recent loss to its own.
const START: f64 = 0.98;
const FULL: f64 = 1.2;
/// Share of the losses remembered when the series has changed.
const KEPT_AFTER_CHANGE: f64 = 0.1;

/// Compares recent losses of the mix with those of the last value and moves over to it while that is better.
#[derive(Debug, Clone, Default)]
pub struct Guard {
    mix: f64,
    naive: f64,
}

impl Guard {
    /// Share of the last-value forecast at present.
    pub fn share(&self) -> f64 {
        if self.naive <= 0.0 {
            return 0.0;
        }
        ((self.mix / self.naive - START) / (FULL - START)).clamp(0.0, 1.0)
    }

    /// The mix, or what of the last value's forecast is due in its place.
    pub fn apply(&self, mix: &[Quantiles], naive: &[Quantiles]) -> Vec<Quantiles> {
        let share = self.share();
        let blend = |(mix, naive): (&Quantiles, &Quantiles)| {
            let mut out = *mix;
            if share > 0.0 {
                out.iter_mut().zip(naive).for_each(|(m, n)| *m += share * (n - *m));
            }
            out
        };
        mix.iter().zip(naive).map(blend).collect()
    }

    /// Takes notice of what came.
    pub fn mature(&mut self, mix: &Quantiles, naive: &Quantiles, actual: f64) {
        let loss = |q: &Quantiles| (0..LEVEL_COUNT).map(|l| pinball(LEVELS[l], q[l], actual)).sum::<f64>();
        self.mix = MEMORY * self.mix + loss(mix);
        self.naive = MEMORY * self.naive + loss(naive);
    }

    /// The series has changed: losses from before count little.
    pub(super) fn forget(&mut self) {
        self.mix *= KEPT_AFTER_CHANGE;
        self.naive *= KEPT_AFTER_CHANGE;
    }

    pub(super) fn encode(&self, out: &mut Writer) {
        out.f64(self.mix);
        out.f64(self.naive);
    }

    pub(super) fn decode(from: &mut Reader) -> Result<Self, DecodeError> {
        Ok(Self { mix: from.f64("guard")?, naive: from.f64("guard")? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mix_that_fails_gives_way_and_gets_another_chance() {
        let mut guard = Guard::default();
        let (good, bad) = ([10.0; LEVEL_COUNT], [90.0; LEVEL_COUNT]);
        (0..50).for_each(|_| guard.mature(&bad, &good, 11.0));
        assert_eq!(guard.apply(&[bad], &[good]), [good]);
        (0..2000).for_each(|_| guard.mature(&good, &bad, 11.0));
        assert_eq!(guard.apply(&[good], &[bad]), [good]);
    }
}
