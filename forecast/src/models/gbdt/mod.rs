//! Gradient boosting with quantile loss: histogram trees whose leaves hold all levels at once.
//!
//! One tree serves every level of [`LEVELS`]: a split is chosen for the sum of the levels' gains, a leaf holds for each
//! level the quantile of the residuals in it. Rows of all steps ahead are stacked, the step is a feature. The target is
//! what a linear model leaves, in units of its usual size at that step.

mod bins;
mod boost;
mod tree;

pub use boost::{Booster, Params};

use super::{Input, Model, Sample};
use crate::codec::{Reader, Writer};
use crate::error::DecodeError;
use crate::features::Row;
use crate::quantiles::{LEVEL_COUNT, Quantiles};
use crate::random::Random;
use bins::Bins;
use boost::Boosting;

/// What the trees' target is relative to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Base {
    /// The newest value.
    Last,
    /// The median of the linear model.
    Linear,
}

/// See the module's text.
#[derive(Debug, Clone)]
pub struct Gbdt {
    base: Base,
    params: Params,
    bins: Bins,
    booster: Booster,
    /// Usual size of the target a step; empty before the first fit.
    units: Vec<f32>,
    /// What is under way between two slices of learning.
    learning: Option<Box<Boosting>>,
}

impl Gbdt {
    pub fn new(base: Base, params: Params) -> Self {
        Self { base, params, bins: Bins::default(), booster: Booster::default(), units: Vec::new(), learning: None }
    }

    fn start(&mut self, sample: &Sample) -> bool {
        self.learning = None;
        self.units.clear();
        let available: usize = sample.rows.iter().map(Vec::len).sum();
        let least = 4 * self.params.leaf_rows;
        if available < least {
            return false;
        }
        let mut random = Random::new(self.params.seed);
        let share = self.params.rows as f64 / available as f64;
        let (mut rows, mut targets, mut steps): (Vec<Row>, Vec<f32>, Vec<u8>) = Default::default();
        for k in 0..sample.rows[0].len() {
            let origin = sample.first + k;
            for (step, all) in sample.rows.iter().enumerate() {
                let Some(row) = all.get(k) else { break };
                if random.unit() >= share || !sample.history.is_measured(origin + step + 1) {
                    continue;
                }
                let base = match self.base {
                    Base::Last => 0.0,
                    Base::Linear => sample.linear.get(step).and_then(|l| l.get(k)).copied().unwrap_or(0.0),
                };
                targets.push(sample.scaled(origin + step + 1) - sample.scaled(origin) - base);
                rows.push(*row);
                steps.push(step as u8);
            }
        }
        if rows.len() < least {
            return false;
        }
        self.units = unit_by_step(&targets, &steps, sample.horizon());
        for (target, &step) in targets.iter_mut().zip(&steps) {
            *target /= self.units[usize::from(step)];
        }
        self.bins = Bins::of(&rows);
        let columns = self.bins.columns(&rows);
        self.learning = Some(Box::new(Boosting::new(columns, targets, steps, sample.horizon(), &self.params)));
        true
    }
}

impl Model for Gbdt {
    fn name(&self) -> &'static str {
        match self.base {
            Base::Last => "gbdt",
            Base::Linear => "gbdt-linear",
        }
    }

    fn learn(&mut self, sample: &Sample, slice: usize) -> bool {
        if slice == 0 {
            return !self.start(sample);
        }
        let Some(learning) = &mut self.learning else { return true };
        if !learning.grow(&self.params) {
            return false;
        }
        if let Some(learning) = self.learning.take() {
            self.booster = learning.finish();
        }
        true
    }

    fn forecast(&self, input: &Input, out: &mut [Quantiles]) {
        let last = input.history.values()[input.origin];
        out.fill([last; LEVEL_COUNT]);
        if self.units.is_empty() {
            return;
        }
        let predicted = self.booster.predict(&self.bins.blocks(input.rows), input.rows.len());
        for (step, ((out, &unit), values)) in out.iter_mut().zip(&self.units).zip(predicted).enumerate() {
            let base = match self.base {
                Base::Last => 0.0,
                Base::Linear => input.linear.get(step).copied().unwrap_or(0.0),
            };
            for (out, value) in out.iter_mut().zip(values) {
                *out = last + input.view.scale.unit * f64::from(base + value * unit);
            }
        }
    }

    fn bytes(&self) -> usize {
        self.bins.bytes() + self.booster.bytes() + 4 * self.units.capacity()
    }
}

/// Mean absolute target a step (0-based), never 0.
fn unit_by_step(targets: &[f32], steps: &[u8], horizon: usize) -> Vec<f32> {
    let (mut sums, mut counts) = (vec![0.0f64; horizon], vec![0usize; horizon]);
    for (target, &step) in targets.iter().zip(steps) {
        sums[usize::from(step)] += f64::from(target.abs());
        counts[usize::from(step)] += 1;
    }
    sums.iter().zip(counts).map(|(s, n)| ((s / n.max(1) as f64) as f32).max(1e-6)).collect()
}

impl Gbdt {
    pub(crate) fn encode(&self, out: &mut Writer) {
        out.f32s(&self.units);
        self.bins.encode(out);
        self.booster.encode(out);
    }

    pub(crate) fn decode(base: Base, params: Params, horizon: usize, from: &mut Reader) -> Result<Self, DecodeError> {
        let units = from.f32s("units")?;
        if !units.is_empty() && units.len() != horizon {
            return Err(from.range("units"));
        }
        Ok(Self {
            base,
            params,
            units,
            bins: Bins::decode(from)?,
            booster: Booster::decode(horizon, from)?,
            learning: None,
        })
    }
}
