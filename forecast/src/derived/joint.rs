//! Several variables of one guest or host together: does cpu, memory and network fit at once?
//!
//! Each variable keeps its own forecast; what ties them is the correlation of where their samples fell in those
//! forecasts (a Gaussian copula), followed online.

use crate::codec::{Format, Reader, Writer};
use crate::error::DecodeError;
use crate::quantiles::{Forecast, Quantiles, probability_below, value_at};
use crate::random::Random;

/// Weight of the newest sample in the correlations.
const RATE: f64 = 0.005;
/// Most variables.
pub const MOST_VARIABLES: usize = 16;

const FORMAT: Format = Format { what: "correlations", magic: *b"VSFJ", oldest: 1, newest: 1 };

/// See the module's text.
#[derive(Debug, Clone)]
pub struct Joint {
    variables: usize,
    /// Mean products of normal scores, row by row.
    products: Vec<f64>,
    seen: u64,
}

impl Joint {
    /// `None` for no variable or more than [`MOST_VARIABLES`].
    pub fn new(variables: usize) -> Option<Self> {
        if variables == 0 || variables > MOST_VARIABLES {
            return None;
        }
        let mut products = vec![0.0; variables * variables];
        (0..variables).for_each(|k| products[k * variables + k] = 1.0);
        Some(Self { variables, products, seen: 0 })
    }

    /// Number of variables.
    pub fn variables(&self) -> usize {
        self.variables
    }

    /// Learns from the samples of all variables and the one-step forecasts that were made for them. What is not one of
    /// each a variable, or not finite, teaches nothing.
    pub fn observe(&mut self, forecasts: &[Quantiles], samples: &[f64]) {
        if forecasts.len() != self.variables
            || samples.len() != self.variables
            || samples.iter().any(|s| !s.is_finite())
        {
            return;
        }
        let scores: Vec<f64> =
            forecasts.iter().zip(samples).map(|(q, &s)| normal_score(probability_below(q, s))).collect();
        self.seen += 1;
        let rate = RATE.max(1.0 / (self.seen as f64 + 10.0));
        for (i, a) in scores.iter().enumerate() {
            for (j, b) in scores.iter().enumerate() {
                let product = &mut self.products[i * self.variables + j];
                *product += rate * (a * b - *product);
            }
        }
    }

    /// Correlation of two variables' surprises, -1..1.
    pub fn correlation(&self, a: usize, b: usize) -> f64 {
        let at = |i: usize, j: usize| self.products.get(i * self.variables + j).copied().unwrap_or(0.0);
        if a >= self.variables || b >= self.variables {
            return 0.0;
        }
        if a == b { 1.0 } else { (at(a, b) / (at(a, a) * at(b, b)).sqrt().max(1e-9)).clamp(-0.99, 0.99) }
    }

    /// `count` equally likely outcomes `step` (1-based) steps ahead, one value a variable; empty if a forecast is
    /// missing or too short. The same seed gives the same outcomes.
    pub fn scenarios(&self, forecasts: &[Forecast], step: usize, count: usize, seed: u64) -> Vec<Vec<f64>> {
        let rows: Option<Vec<&Quantiles>> =
            forecasts.iter().map(|f| step.checked_sub(1).and_then(|s| f.steps().get(s))).collect();
        let Some(rows) = rows.filter(|r| r.len() == self.variables) else { return Vec::new() };
        let lower = self.lower();
        let mut random = Random::new(seed);
        (0..count)
            .map(|_| {
                let free: Vec<f64> = (0..self.variables).map(|_| random.normal()).collect();
                rows.iter()
                    .enumerate()
                    .map(|(i, q)| {
                        let score: f64 = (0..=i).map(|j| lower[i * self.variables + j] * free[j]).sum();
                        value_at(q, normal_probability(score))
                    })
                    .collect()
            })
            .collect()
    }

    /// Probability that every variable stays at or below its limit `step` steps ahead, from 2,000 scenarios.
    pub fn probability_all_fit(&self, forecasts: &[Forecast], step: usize, limits: &[f64], seed: u64) -> f64 {
        let all = self.scenarios(forecasts, step, 2000, seed);
        if all.is_empty() || limits.len() != self.variables {
            return 0.0;
        }
        let fit = all.iter().filter(|s| s.iter().zip(limits).all(|(v, l)| v <= l)).count();
        fit as f64 / all.len() as f64
    }

    /// For storage.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Writer::new();
        out.count(self.variables);
        self.products.iter().for_each(|&p| out.f64(p));
        out.u64(self.seen);
        out.seal(FORMAT)
    }

    /// Reads what [`Joint::encode`] wrote.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut from = Reader::open(bytes, FORMAT)?;
        let variables = from.u32("variables")? as usize;
        let mut joint = Self::new(variables).ok_or_else(|| from.range("variables"))?;
        for product in &mut joint.products {
            *product = from.f64("products")?;
        }
        joint.seen = from.u64("seen")?;
        // Scores are within 3, so their products are within 9; those with themselves are not negative.
        let alone = |k: usize| joint.products[k * variables + k] >= 0.0;
        if joint.products.iter().any(|p| p.abs() > 9.0) || !(0..variables).all(alone) || joint.seen > u64::MAX / 2 {
            return Err(from.range("correlations"));
        }
        from.end()?;
        Ok(joint)
    }

    /// Lower Cholesky factor of the correlations; what numbers cannot carry is taken as independent.
    fn lower(&self) -> Vec<f64> {
        let n = self.variables;
        let mut lower = vec![0.0; n * n];
        for i in 0..n {
            for j in 0..=i {
                let known: f64 = (0..j).map(|k| lower[i * n + k] * lower[j * n + k]).sum();
                let left = self.correlation(i, j) - known;
                lower[i * n + j] =
                    if i == j { left.max(1e-6).sqrt() } else { (left / lower[j * n + j]).clamp(-1.0, 1.0) };
            }
        }
        lower
    }
}

/// Standard normal distribution function (Abramowitz and Stegun 7.1.26, error below 1e-6).
fn normal_probability(score: f64) -> f64 {
    let x = score.abs() / std::f64::consts::SQRT_2;
    let t = 1.0 / (1.0 + 0.327_591_1 * x);
    let series =
        t * (0.254_829_592 + t * (-0.284_496_736 + t * (1.421_413_741 + t * (-1.453_152_027 + t * 1.061_405_429))));
    let upper = 0.5 * series * (-x * x).exp();
    if score > 0.0 { 1.0 - upper } else { upper }
}

/// Its inverse, by bisection; bounded to +-3.
fn normal_score(probability: f64) -> f64 {
    let (mut low, mut high) = (-3.0, 3.0);
    for _ in 0..30 {
        let middle = 0.5 * (low + high);
        if normal_probability(middle) < probability { low = middle } else { high = middle }
    }
    0.5 * (low + high)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STANDARD: Quantiles = [-1.645, -1.282, -0.674, 0.0, 0.674, 1.282, 1.645];

    #[test]
    fn variables_that_rise_together_are_less_likely_to_miss_alone() {
        let (mut tied, mut free) = (Joint::new(2), Joint::new(2));
        let mut random = Random::new(8);
        for _ in 0..3000 {
            let (a, b, c) = (random.normal(), random.normal(), random.normal());
            tied.iter_mut().for_each(|j| j.observe(&[STANDARD; 2], &[a, 0.95 * a + 0.31 * b]));
            free.iter_mut().for_each(|j| j.observe(&[STANDARD; 2], &[a, c]));
        }
        let forecasts = [Forecast::new(vec![STANDARD]), Forecast::new(vec![STANDARD])];
        let fit = |joint: &Option<Joint>| {
            joint.as_ref().map_or(0.0, |j| j.probability_all_fit(&forecasts, 1, &[0.674; 2], 1))
        };
        let (together, apart) = (fit(&tied), fit(&free));
        assert!((apart - 0.5625).abs() < 0.05, "{apart}");
        assert!(together > 0.65 && together < 0.76, "{together}");
        assert_eq!(fit(&tied), together);
        let read = tied.as_ref().and_then(|j| Joint::decode(&j.encode()).ok());
        assert_eq!(fit(&read), together);
    }

    #[test]
    fn what_does_not_match_gives_nothing() {
        assert!(Joint::new(0).is_none() && Joint::new(MOST_VARIABLES + 1).is_none());
        let joint = Joint::new(2);
        let short = [Forecast::new(vec![STANDARD])];
        assert!(joint.is_some_and(|j| j.scenarios(&short, 1, 10, 1).is_empty()));
    }
}
