//! Linear location and scale: for every step ahead a robust ridge regression on the features for the median, a second
//! one for the size of its errors, and the quantiles of the standardised errors.

use super::Model;
use crate::features::{ORIGIN_FEATURES, ROW_FEATURES, Row, View, column};
use crate::history::History;
use crate::quantiles::{LEVELS, Quantiles, quantile_of_sorted};

/// Daily and hourly harmonics, a sine and a cosine each.
const HARMONICS: usize = 4 + 2;
/// Features that are categories, not quantities.
const CATEGORIES: usize = 5;
/// Inputs of the regression: quantities, harmonics and a constant.
const INPUTS: usize = ROW_FEATURES - CATEGORIES + 2 * HARMONICS + 1;
/// Rows of a fit; older ones are left out.
const ROWS: usize = 8192;
/// Standardised inputs are clipped here, so that no outlier pulls a forecast out of the world.
const CLIP: f64 = 6.0;
/// Rounds of reweighting towards the least absolute error.
const ROUNDS: usize = 3;
/// Ridge penalty a row.
const RIDGE: f64 = 2e-3;
const SCALE_RIDGE: f64 = 2e-2;

type Inputs = [f64; INPUTS];

#[derive(Debug, Clone)]
struct Step {
    location: Inputs,
    scale: Inputs,
    scale_bounds: (f64, f64),
    residuals: Quantiles,
}

/// See the module's text.
#[derive(Debug, Clone)]
pub struct Linear {
    horizon: usize,
    view: Option<View>,
    centre: Inputs,
    width: Inputs,
    steps: Vec<Step>,
}

impl Linear {
    pub fn new(horizon: usize) -> Self {
        Self { horizon, view: None, centre: [0.0; INPUTS], width: [1.0; INPUTS], steps: Vec::new() }
    }

    /// Median `step` steps after `origin` in scaled units, relative to the newest value; the row must be filled.
    pub fn median(&self, row: &Row, step: usize) -> f64 {
        self.steps.get(step - 1).map_or(0.0, |s| dot(&s.location, &self.standardised(&raw(row))))
    }

    fn standardised(&self, raw: &Inputs) -> Inputs {
        let mut x = [0.0; INPUTS];
        for j in 0..INPUTS - 1 {
            x[j] = if raw[j].is_nan() { 0.0 } else { ((raw[j] - self.centre[j]) * self.width[j]).clamp(-CLIP, CLIP) };
        }
        x[INPUTS - 1] = 1.0;
        x
    }

    fn learn_standards(&mut self, rows: &[Inputs]) {
        for j in 0..INPUTS - 1 {
            let known = || rows.iter().map(|r| r[j]).filter(|v| !v.is_nan());
            let count = known().count().max(1) as f64;
            let mean = known().sum::<f64>() / count;
            let deviation = (known().map(|v| (v - mean) * (v - mean)).sum::<f64>() / count).sqrt();
            self.centre[j] = mean;
            self.width[j] = if deviation > 1e-9 { 1.0 / deviation } else { 0.0 };
        }
    }
}

impl Model for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn fit(&mut self, history: &History, end: usize) {
        self.steps.clear();
        let season = history.shape().season;
        let warm = if end > 3 * season { season } else { end / 4 };
        let start = warm.max(end.saturating_sub(ROWS));
        if end < start + self.horizon + 2 * INPUTS {
            return;
        }
        let view = View::of(history, end);
        self.view = Some(view);
        let z = |i: usize| f64::from(view.scale.scaled(history.values()[i]));
        let origins: Vec<usize> = (start..end - 1).collect();
        let mut rows: Vec<Row> = vec![[0.0; ROW_FEATURES]; origins.len()];
        for (row, &t) in rows.iter_mut().zip(&origins) {
            view.origin(history, t, row);
        }
        for step in 1..=self.horizon {
            let count = end - step - start;
            let raws: Vec<Inputs> = rows[..count]
                .iter_mut()
                .zip(&origins)
                .map(|(row, &t)| {
                    view.target(history, t, step, row);
                    raw(row)
                })
                .collect();
            if step == 1 {
                self.learn_standards(&raws);
            }
            let x: Vec<Inputs> = raws.iter().map(|r| self.standardised(r)).collect();
            let y: Vec<f64> = origins[..count].iter().map(|&t| z(t + step) - z(t)).collect();
            self.steps.push(fit_step(&x, &y));
        }
    }

    fn forecast(&self, history: &History, origin: usize, out: &mut [Quantiles]) {
        let last = history.values()[origin];
        let Some(view) = self.view.filter(|_| !self.steps.is_empty()) else {
            out.fill([last; LEVELS.len()]);
            return;
        };
        let mut row = [0.0; ROW_FEATURES];
        view.origin(history, origin, &mut row);
        for (index, (out, step)) in out.iter_mut().zip(&self.steps).enumerate() {
            view.target(history, origin, index + 1, &mut row);
            let x = self.standardised(&raw(&row));
            let median = dot(&step.location, &x);
            let scale = dot(&step.scale, &x).clamp(step.scale_bounds.0, step.scale_bounds.1).exp();
            *out = step.residuals.map(|r| last + view.scale.unit * (median + scale * r));
        }
    }

    fn bytes(&self) -> usize {
        size_of::<Step>() * self.steps.capacity()
    }
}

fn fit_step(x: &[Inputs], y: &[f64]) -> Step {
    let mut weights = vec![1.0; x.len()];
    let mut location = [0.0; INPUTS];
    let mut residuals = y.to_vec();
    for round in 0..ROUNDS {
        location = ridge(x, y, &weights, RIDGE);
        for ((r, x), y) in residuals.iter_mut().zip(x).zip(y) {
            *r = y - dot(&location, x);
        }
        if round + 1 < ROUNDS {
            let mean = residuals.iter().map(|r| r.abs()).sum::<f64>() / residuals.len() as f64;
            let least = (0.05 * mean).max(1e-6);
            for (w, r) in weights.iter_mut().zip(&residuals) {
                *w = mean.max(1e-6) / r.abs().max(least);
            }
        }
    }
    let mean = residuals.iter().map(|r| r.abs()).sum::<f64>() / residuals.len() as f64;
    let floor = (0.1 * mean).max(1e-6);
    let sizes: Vec<f64> = residuals.iter().map(|r| (r.abs() + floor).ln()).collect();
    weights.fill(1.0);
    let scale = ridge(x, &sizes, &weights, SCALE_RIDGE);
    let mut predicted: Vec<f64> = x.iter().map(|x| dot(&scale, x)).collect();
    let mut standard: Vec<f64> = residuals.iter().zip(&predicted).map(|(r, s)| r / s.exp()).collect();
    standard.sort_unstable_by(f64::total_cmp);
    predicted.sort_unstable_by(f64::total_cmp);
    Step {
        location,
        scale,
        scale_bounds: (quantile_of_sorted(&predicted, 0.005), quantile_of_sorted(&predicted, 0.995)),
        residuals: LEVELS.map(|level| quantile_of_sorted(&standard, level)),
    }
}

fn raw(row: &Row) -> Inputs {
    let mut x = [0.0; INPUTS];
    let last = f64::from(row[column::LAST]);
    let quantities = row[..ORIGIN_FEATURES].iter().chain(&row[ORIGIN_FEATURES + CATEGORIES..]);
    for (x, &v) in x.iter_mut().zip(quantities) {
        *x = f64::from(v);
    }
    let mut at = ROW_FEATURES - CATEGORIES;
    let mut wave = |phase: f32, count: usize| {
        for k in 1..=count {
            let (sine, cosine) = (std::f64::consts::TAU * k as f64 * f64::from(phase)).sin_cos();
            x[at] = sine;
            x[at + 1] = cosine;
            at += 2;
        }
    };
    wave(row[column::PHASE], 4);
    wave(row[column::HOUR_PHASE], 2);
    debug_assert!(last.is_finite());
    x
}

fn dot(a: &Inputs, b: &Inputs) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Weighted ridge regression by the normal equations; the constant (last input) is not penalised.
fn ridge(x: &[Inputs], y: &[f64], weights: &[f64], penalty: f64) -> Inputs {
    let mut gram = vec![[0.0f64; INPUTS]; INPUTS];
    let mut right = [0.0; INPUTS];
    for ((x, &y), &w) in x.iter().zip(y).zip(weights) {
        for j in 0..INPUTS {
            let scaled = w * x[j];
            if scaled == 0.0 {
                continue;
            }
            right[j] += scaled * y;
            for (g, v) in gram[j][..=j].iter_mut().zip(&x[..=j]) {
                *g += scaled * v;
            }
        }
    }
    let total: f64 = weights.iter().sum();
    for j in 0..INPUTS - 1 {
        gram[j][j] += penalty * total + 1e-9;
    }
    gram[INPUTS - 1][INPUTS - 1] += 1e-9;
    cholesky_solve(&mut gram, right)
}

/// Solves `gram * b = right` for a positive definite matrix given by its lower half; a vanishing pivot drops the input.
fn cholesky_solve(gram: &mut [Inputs], right: Inputs) -> Inputs {
    for j in 0..INPUTS {
        for k in 0..j {
            let factor = gram[j][k];
            for i in j..INPUTS {
                gram[i][j] -= gram[i][k] * factor;
            }
        }
        let pivot = gram[j][j];
        let scale = if pivot > 1e-12 { 1.0 / pivot.sqrt() } else { 0.0 };
        for row in gram.iter_mut().skip(j) {
            row[j] *= scale;
        }
    }
    let mut b = right;
    for i in 0..INPUTS {
        for k in 0..i {
            b[i] -= gram[i][k] * b[k];
        }
        b[i] = if gram[i][i] > 0.0 { b[i] / gram[i][i] } else { 0.0 };
    }
    for i in (0..INPUTS).rev() {
        for k in i + 1..INPUTS {
            b[i] -= gram[k][i] * b[k];
        }
        b[i] = if gram[i][i] > 0.0 { b[i] / gram[i][i] } else { 0.0 };
    }
    b
}
