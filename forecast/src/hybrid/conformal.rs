//! Online conformal calibration: keeps each quantile's share of misses where it belongs, whatever drifts.

use crate::codec::{Reader, Writer};
use crate::error::DecodeError;
use crate::quantiles::{LEVEL_COUNT, LEVELS, MEDIAN, Quantiles, make_rising};

/// How fast the calibration follows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ConformalParams {
    /// Step of the logarithm of a half-width for a miss, at the start.
    pub first_rate: f64,
    /// The same in the long run.
    pub rate: f64,
    /// Share of what is learnt at one step ahead that all steps take.
    pub pooled: f64,
}

impl Default for ConformalParams {
    fn default() -> Self {
        Self { first_rate: 0.02, rate: 0.01, pooled: 0.9 }
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
            for (level, value) in q.iter_mut().enumerate().filter(|(l, _)| *l != MEDIAN) {
                *value = median + (*value - median) * self.factor(step, level);
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

    /// Heap bytes held.
    pub fn bytes(&self) -> usize {
        size_of::<Quantiles>() * self.log_factor.capacity()
    }

    pub(super) fn encode(&self, out: &mut Writer) {
        self.log_factor.iter().for_each(|f| out.f64s(f));
        out.f64s(&self.common);
        out.u64(self.matured);
    }

    /// Reads what was learnt into a calibration of the same size.
    pub(super) fn decode(&mut self, from: &mut Reader) -> Result<(), DecodeError> {
        for factors in &mut self.log_factor {
            *factors = from.f64_array("calibration")?;
        }
        self.common = from.f64_array("calibration")?;
        self.matured = from.u64("calibration")?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    #[test]
    fn coverage_holds_when_the_scatter_doubles() {
        let mut conformal = Conformal::new(1, ConformalParams::default());
        let mut random = Random::new(11);
        let narrow = [-0.5, -0.4, -0.2, 0.0, 0.2, 0.4, 0.5];
        let (mut inside, mut below95, mut counted) = (0, 0, 0);
        for i in 0..12_000 {
            let mut issued = vec![narrow];
            conformal.apply(&mut issued);
            let actual = random.normal() * if i < 6_000 { 1.0 } else { 2.0 };
            if (2_000..6_000).contains(&i) || i > 8_000 {
                counted += 1;
                inside += i32::from(issued[0][1] <= actual && actual <= issued[0][5]);
                below95 += i32::from(actual <= issued[0][6]);
            }
            conformal.mature(&issued[0], 0, actual);
        }
        let share = |n: i32| f64::from(n) / f64::from(counted);
        assert!((share(inside) - 0.8).abs() < 0.02, "{}", share(inside));
        assert!((share(below95) - 0.95).abs() < 0.01, "{}", share(below95));
    }
}
