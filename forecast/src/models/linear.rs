//! Linear location and scale: for every step ahead a robust ridge regression on the features for the median, a second
//! one for the size of its errors, and the quantiles of the standardised errors.

use super::solve::{dot, ridge};
use super::{Input, Model, Sample};
use crate::codec::{Reader, Writer};
use crate::error::DecodeError;
use crate::features::{ORIGIN_FEATURES, ROW_FEATURES, Row, column};
use crate::quantiles::{LEVELS, Quantiles, quantile_of_sorted};

/// Daily and hourly harmonics, a sine and a cosine each.
const DAILY: usize = 4;
const HOURLY: usize = 2;
/// Features that are quantities.
const QUANTITIES: usize = ROW_FEATURES - column::CATEGORIES;
/// Inputs of the regression: quantities, harmonics and a constant.
pub const INPUTS: usize = QUANTITIES + 2 * (DAILY + HOURLY) + 1;
/// Standardised inputs are clipped here, so that no outlier pulls a forecast out of the world.
const CLIP: f64 = 6.0;
/// Rounds of reweighting towards the least absolute error.
const ROUNDS: usize = 3;
/// Ridge penalty a row, for the median and for the size of errors.
const RIDGE: f64 = 2e-3;
const SCALE_RIDGE: f64 = 2e-2;
/// Fewer rows than this teach nothing.
const LEAST_ROWS: usize = 2 * INPUTS;

/// What it sees of a row.
pub type Inputs = [f64; INPUTS];

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
    centre: Inputs,
    width: Inputs,
    steps: Vec<Step>,
}

impl Linear {
    pub fn new(horizon: usize) -> Self {
        Self { horizon, centre: [0.0; INPUTS], width: [1.0; INPUTS], steps: Vec::new() }
    }

    /// What it sees of the rows of one origin.
    pub fn inputs(&self, rows: &[Row]) -> Vec<Inputs> {
        rows.iter().map(|row| self.standardised(&raw(row))).collect()
    }

    /// Medians a step for one origin, in units of the view and relative to the newest value.
    pub fn medians(&self, inputs: &[Inputs]) -> Vec<f32> {
        let median = |(step, x): (usize, &Inputs)| self.steps.get(step).map_or(0.0, |s| dot(&s.location, x) as f32);
        inputs.iter().enumerate().map(median).collect()
    }

    /// The median `step` (0-based) steps ahead.
    pub fn median(&self, row: &Row, step: usize) -> f32 {
        self.steps.get(step).map_or(0.0, |s| dot(&s.location, &self.standardised(&raw(row))) as f32)
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

    fn learn(&mut self, sample: &Sample, slice: usize) -> bool {
        if slice == 0 {
            self.steps.clear();
        }
        let Some(rows) = sample.rows.get(slice).filter(|r| r.len() >= LEAST_ROWS) else {
            self.steps.clear();
            return true;
        };
        let raws: Vec<Inputs> = rows.iter().map(raw).collect();
        if slice == 0 {
            self.learn_standards(&raws);
        }
        let kept = || (0..rows.len()).filter(|k| sample.history.is_measured(sample.first + k + slice + 1));
        let x: Vec<Inputs> = kept().map(|k| self.standardised(&raws[k])).collect();
        let target = |k: usize| sample.scaled(sample.first + k + slice + 1) - sample.scaled(sample.first + k);
        let y: Vec<f64> = kept().map(|k| f64::from(target(k))).collect();
        if x.len() < LEAST_ROWS {
            self.steps.clear();
            return true;
        }
        self.steps.push(fit_step(&x, &y));
        self.steps.len() == self.horizon
    }

    fn forecast(&self, input: &Input, out: &mut [Quantiles]) {
        let last = input.history.values()[input.origin];
        out.fill([last; LEVELS.len()]);
        for ((out, step), x) in out.iter_mut().zip(&self.steps).zip(input.inputs) {
            let median = dot(&step.location, x);
            let scale = dot(&step.scale, x).clamp(step.scale_bounds.0, step.scale_bounds.1).exp();
            *out = step.residuals.map(|r| last + input.view.scale.unit * (median + scale * r));
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
    let quantities = row[..ORIGIN_FEATURES].iter().chain(&row[ORIGIN_FEATURES + column::CATEGORIES..]);
    for (x, &v) in x.iter_mut().zip(quantities) {
        *x = f64::from(v);
    }
    let mut at = QUANTITIES;
    let mut wave = |phase: f32, count: usize| {
        for k in 1..=count {
            let (sine, cosine) = (std::f64::consts::TAU * k as f64 * f64::from(phase)).sin_cos();
            x[at] = sine;
            x[at + 1] = cosine;
            at += 2;
        }
    };
    wave(row[column::PHASE], DAILY);
    wave(row[column::HOUR_PHASE], HOURLY);
    x
}

impl Linear {
    pub(crate) fn encode(&self, out: &mut Writer) {
        out.f64s(&self.centre);
        out.f64s(&self.width);
        out.count(self.steps.len());
        for step in &self.steps {
            out.f64s(&step.location);
            out.f64s(&step.scale);
            out.f64(step.scale_bounds.0);
            out.f64(step.scale_bounds.1);
            out.f64s(&step.residuals);
        }
    }

    pub(crate) fn decode(horizon: usize, from: &mut Reader) -> Result<Self, DecodeError> {
        let mut model = Self::new(horizon);
        model.centre = from.f64_array("centres")?;
        model.width = from.f64_array("widths")?;
        let count = from.count(size_of::<Step>(), "linear steps")?;
        if count != 0 && count != horizon {
            return Err(from.range("linear steps"));
        }
        for _ in 0..count {
            let step = Step {
                location: from.f64_array("location weights")?,
                scale: from.f64_array("scale weights")?,
                scale_bounds: (from.f64("scale bound")?, from.f64("scale bound")?),
                residuals: from.f64_array("residuals")?,
            };
            if step.scale_bounds.0 > step.scale_bounds.1 {
                return Err(from.range("scale bounds"));
            }
            model.steps.push(step);
        }
        Ok(model)
    }
}
