//! Weights of the experts, learnt online from their matured losses, for every step ahead and level.

use crate::quantiles::{LEVEL_COUNT, LEVELS, Quantiles};

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
        Self { rate: 0.3, memory: 0.998, pooled: 0.7 }
    }
}

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
        let mut own = [[0.0; LEVEL_COUNT]; 1];
        for level in 0..LEVEL_COUNT {
            let weights = &self.weights[self.cell(step, level)];
            own[0][level] = weights.iter().zip(panel).map(|(w, p)| w * p[step][level]).sum();
        }
        let spread: f64 = panel.iter().map(|p| (p[step][3] - actual).abs()).sum::<f64>() / self.experts as f64;
        let size = &mut self.size[step];
        *size = if *size == 0.0 { spread } else { *size + 0.01 * (spread - *size) };
        let unit = size.max(1e-300);
        for level in 0..LEVEL_COUNT {
            let tau = LEVELS[level];
            let value = own[0][level];
            let gradient = if actual < value { 1.0 - tau } else { -tau };
            let cell = self.cell(step, level);
            for (regret, p) in self.regret[cell].iter_mut().zip(panel) {
                let gain = (gradient * (value - p[step][level]) / unit).clamp(-5.0, 5.0);
                *regret = self.params.memory * *regret + gain;
            }
        }
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
                let scores: Vec<f64> = self.regret[cell.clone()]
                    .iter()
                    .zip(&pooled[level * k..])
                    .map(|(own, all)| self.params.rate * ((1.0 - share) * own + share * all))
                    .collect();
                let best = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let total: f64 = scores.iter().map(|s| (s - best).exp()).sum();
                for (w, s) in self.weights[cell].iter_mut().zip(&scores) {
                    *w = (s - best).exp() / total;
                }
            }
        }
    }

    /// Mean weight of each expert over steps and levels.
    pub fn mean_weights(&self) -> Vec<f64> {
        let cells = (self.horizon * LEVEL_COUNT) as f64;
        (0..self.experts).map(|k| self.weights.iter().skip(k).step_by(self.experts).sum::<f64>() / cells).collect()
    }
}
