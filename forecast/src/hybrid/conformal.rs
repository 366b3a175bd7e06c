//! Online conformal calibration: keeps each quantile's share of misses where it belongs, whatever drifts.

use crate::quantiles::{LEVEL_COUNT, LEVELS, MEDIAN, Quantiles, make_rising};

/// How fast the calibration follows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ConformalParams {
    /// Step of the logarithm of a half-width for a miss, at the start and in the long run.
    pub first_rate: f64,
    pub rate: f64,
    /// Share of what is learnt at one step ahead that its neighbours take too.
    pub pooled: f64,
}

impl Default for ConformalParams {
    fn default() -> Self {
        Self { first_rate: 0.02, rate: 0.006, pooled: 0.9 }
    }
}

/// For every step ahead and level a factor on the distance from the median.
#[derive(Debug, Clone)]
pub struct Conformal {
    params: ConformalParams,
    /// Logarithm of the factor, `[step][level]`.
    log_factor: Vec<[f64; LEVEL_COUNT]>,
    common: [f64; LEVEL_COUNT],
    matured: u64,
}

impl Conformal {
    pub fn new(horizon: usize, params: ConformalParams) -> Self {
        Self { params, log_factor: vec![[0.0; LEVEL_COUNT]; horizon], common: [0.0; LEVEL_COUNT], matured: 0 }
    }

    /// Widens or narrows a forecast; sorts it.
    pub fn apply(&self, steps: &mut [Quantiles]) {
        for (step, q) in steps.iter_mut().enumerate() {
            make_rising(q);
            let median = q[MEDIAN];
            for level in 0..LEVEL_COUNT {
                if level != MEDIAN {
                    q[level] = median + (q[level] - median) * self.factor(step, level);
                }
            }
            make_rising(q);
        }
    }

    fn factor(&self, step: usize, level: usize) -> f64 {
        (self.log_factor[step][level] + self.common[level]).clamp(-3.0, 3.0).exp()
    }

    /// Takes notice of what came `step` (0-based) steps after a calibrated forecast.
    pub fn mature(&mut self, issued: &Quantiles, step: usize, actual: f64) {
        self.matured += u64::from(step == 0);
        let rate = (self.params.first_rate / (1.0 + self.matured as f64 / 20.0)).max(self.params.rate);
        let horizon = self.log_factor.len() as f64;
        for level in (0..LEVEL_COUNT).filter(|&l| l != MEDIAN) {
            let tau = LEVELS[level];
            let outer = if level > MEDIAN { 1.0 - tau } else { tau };
            let missed = if level > MEDIAN { actual > issued[level] } else { actual < issued[level] };
            let push = rate * ((f64::from(u8::from(missed)) - outer) / (outer * (1.0 - outer)).sqrt());
            self.log_factor[step][level] += (1.0 - self.params.pooled) * push;
            self.common[level] += self.params.pooled * push / horizon;
        }
    }
}
