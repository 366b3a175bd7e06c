//! Weights of the experts, learnt online from their matured losses, for every step ahead and level.

use crate::codec::{Reader, Writer};
use crate::error::DecodeError;
use crate::quantiles::{LEVEL_COUNT, LEVELS, MEDIAN, Quantiles};

/// How fast weights follow and how long losses are remembered.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MixParams {
    /// Weight of a unit of regret.
    pub rate: f64,
    /// Share of the regret kept a matured forecast.
    pub memory: f64,
    /// Share of a cell's regret that is taken from its neighbours (steps ahead and levels).
    pub pooled: f64,
}

impl Default for MixParams {
    fn default() -> Self {
        Self { rate: 0.5, memory: 0.998, pooled: 0.8 }
    }
}

/// Weight of the newest error in the usual size of errors.
const SIZE_RATE: f64 = 0.01;
/// Bound of one regret in units of the usual error: no single outlier decides.
const MOST_REGRET: f64 = 5.0;

/// Share of the regrets that is kept when the series has changed.
const KEPT_AFTER_CHANGE: f64 = 0.1;

/// Exponentially weighted experts with the gradient trick: regrets are taken at the mix's own value, so that weights
/// seek the best mix and not only the best expert.
#[derive(Debug, Clone)]
pub struct Mix {
    params: MixParams,
    experts: usize,
    horizon: usize,
    /// Discounted regret, `[step][level][expert]`.
    regret: Vec<f64>,
    /// Usual size of a regret, `[step]`.
    size: Vec<f64>,
    weights: Vec<f64>,
}

impl Mix {
    pub fn new(experts: usize, horizon: usize, params: MixParams) -> Self {
        let cells = horizon * LEVEL_COUNT * experts;
        Self {
            params,
            experts,
            horizon,
            regret: vec![0.0; cells],
            size: vec![0.0; horizon],
            weights: vec![1.0 / experts as f64; cells],
        }
    }

    fn cell(&self, step: usize, level: usize) -> std::ops::Range<usize> {
        let at = (step * LEVEL_COUNT + level) * self.experts;
        at..at + self.experts
    }

    /// The experts' forecasts `panel[expert][step]` as one.
    pub fn combine(&self, panel: &[Vec<Quantiles>]) -> Vec<Quantiles> {
        (0..self.horizon)
            .map(|step| {
                let mut out = [0.0; LEVEL_COUNT];
                for (level, out) in out.iter_mut().enumerate() {
                    let weights = &self.weights[self.cell(step, level)];
                    *out = weights.iter().zip(panel).map(|(w, p)| w * p[step][level]).sum();
                }
                out
            })
            .collect()
    }

    /// Takes notice of what came `step` (0-based) steps after the origin of `panel`.
    pub fn mature(&mut self, panel: &[Vec<Quantiles>], step: usize, actual: f64) {
        let off: f64 = panel.iter().map(|p| (p[step][MEDIAN] - actual).abs()).sum::<f64>() / self.experts as f64;
        let size = &mut self.size[step];
        *size = if *size == 0.0 { off } else { *size + SIZE_RATE * (off - *size) };
        let unit = size.max(f64::MIN_POSITIVE);
        for (level, tau) in LEVELS.into_iter().enumerate() {
            let cell = self.cell(step, level);
            let value: f64 = self.weights[cell.clone()].iter().zip(panel).map(|(w, p)| w * p[step][level]).sum();
            let gradient = if actual < value { 1.0 - tau } else { -tau };
            for (regret, p) in self.regret[cell].iter_mut().zip(panel) {
                let gain = (gradient * (value - p[step][level]) / unit).clamp(-MOST_REGRET, MOST_REGRET);
                *regret = self.params.memory * *regret + gain;
            }
        }
    }

    /// The series has changed: regrets from before count little.
    pub fn forget(&mut self) {
        self.regret.iter_mut().for_each(|r| *r *= KEPT_AFTER_CHANGE);
    }

    /// Recomputes the weights from the regrets.
    pub fn settle(&mut self) {
        let k = self.experts;
        let mut pooled = vec![0.0; LEVEL_COUNT * k];
        for (level, pooled) in pooled.chunks_mut(k).enumerate() {
            for step in 0..self.horizon {
                for (p, r) in pooled.iter_mut().zip(&self.regret[self.cell(step, level)]) {
                    *p += r / self.horizon as f64;
                }
            }
        }
        let share = self.params.pooled;
        for step in 0..self.horizon {
            for level in 0..LEVEL_COUNT {
                let cell = self.cell(step, level);
                let weights = &mut self.weights[cell.clone()];
                let mut best = f64::NEG_INFINITY;
                for ((w, own), all) in weights.iter_mut().zip(&self.regret[cell]).zip(&pooled[level * k..]) {
                    *w = self.params.rate * ((1.0 - share) * own + share * all);
                    best = best.max(*w);
                }
                let mut total = 0.0;
                for w in weights.iter_mut() {
                    // Many of these a sample: single precision is enough for a weight, and far less work.
                    *w = f64::from(((*w - best) as f32).exp());
                    total += *w;
                }
                weights.iter_mut().for_each(|w| *w /= total);
            }
        }
    }

    /// Mean weight of each expert over steps and levels.
    pub fn mean_weights(&self) -> Vec<f64> {
        let cells = (self.horizon * LEVEL_COUNT) as f64;
        (0..self.experts).map(|k| self.weights.iter().skip(k).step_by(self.experts).sum::<f64>() / cells).collect()
    }

    /// Heap bytes held.
    pub fn bytes(&self) -> usize {
        8 * (self.regret.capacity() + self.size.capacity() + self.weights.capacity())
    }

    pub(super) fn encode(&self, out: &mut Writer) {
        out.f64s(&self.regret);
        out.f64s(&self.size);
    }

    /// Reads what was learnt into a mix of the same size.
    pub(super) fn decode(&mut self, from: &mut Reader) -> Result<(), DecodeError> {
        let (regret, size) = (from.f64s("regrets")?, from.f64s("sizes")?);
        if regret.len() != self.regret.len() || size.len() != self.size.len() {
            return Err(from.range("regrets"));
        }
        (self.regret, self.size) = (regret, size);
        self.settle();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn panel(values: [f64; 3]) -> Vec<Vec<Quantiles>> {
        values.map(|v| vec![[v; LEVEL_COUNT]; 2]).to_vec()
    }

    #[test]
    fn the_expert_that_is_right_gets_the_weight_and_loses_it_again() {
        let mut mix = Mix::new(3, 2, MixParams { memory: 0.98, ..MixParams::default() });
        let mut see = |actual: f64| {
            (0..200).for_each(|_| {
                mix.mature(&panel([1.0, 5.0, 9.0]), 0, actual);
                mix.settle();
            });
            mix.combine(&panel([1.0, 5.0, 9.0]))[0][MEDIAN]
        };
        assert!(see(9.0) > 8.0);
        assert!(see(1.0) < 2.0);
    }

    #[test]
    fn weights_seek_the_best_mix_where_no_expert_is_right() {
        let mut mix = Mix::new(3, 2, MixParams::default());
        for i in 0..4000u32 {
            mix.mature(&panel([0.0, 10.0, 10.0]), 0, 4.0 + f64::from(i % 3) - 1.0);
            mix.settle();
        }
        let value = mix.combine(&panel([0.0, 10.0, 10.0]))[0][MEDIAN];
        assert!((value - 4.0).abs() < 1.5, "{value}");
    }
}
