//! Gradient boosting with quantile loss: histogram trees whose leaves hold all levels at once.
//!
//! One tree serves every level of [`LEVELS`]: a split is chosen for the sum of the levels' gains, a leaf holds for each
//! level the quantile of the residuals in it. Rows of all steps ahead are stacked, the step is a feature. The target is
//! what a linear model leaves, in units of its usual size at that step.

mod bins;
mod boost;

pub use boost::{Booster, Params};

use super::Model;
use super::linear::Linear;
use crate::features::{ROW_FEATURES, Row, View};
use crate::history::History;
use crate::quantiles::{LEVEL_COUNT, LEVELS, Quantiles};
use bins::Bins;

/// What the trees' target is relative to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Base {
    /// The newest value.
    Last,
    /// The median of a linear model.
    Linear,
}

/// See the module's text.
#[derive(Debug, Clone)]
pub struct Gbdt {
    horizon: usize,
    base: Base,
    params: Params,
    linear: Linear,
    view: Option<View>,
    bins: Bins,
    booster: Booster,
    /// Usual size of the target a step.
    units: Vec<f32>,
}

impl Gbdt {
    pub fn new(horizon: usize, base: Base, params: Params) -> Self {
        Self {
            horizon,
            base,
            params,
            linear: Linear::new(horizon),
            view: None,
            bins: Bins::default(),
            booster: Booster::default(),
            units: Vec::new(),
        }
    }

    fn reference(&self, row: &Row, step: usize) -> f32 {
        match self.base {
            Base::Last => 0.0,
            Base::Linear => self.linear.median(row, step) as f32,
        }
    }
}

impl Model for Gbdt {
    fn name(&self) -> &'static str {
        match self.base {
            Base::Last => "gbdt",
            Base::Linear => "gbdt-linear",
        }
    }

    fn fit(&mut self, history: &History, end: usize) {
        let season = history.shape().season;
        let start = if end > 3 * season { season } else { end / 4 };
        self.view = None;
        if end < start + self.horizon + 100 {
            return;
        }
        if self.base == Base::Linear {
            self.linear.fit(history, end);
        }
        let view = View::of(history, end);
        let z = |i: usize| view.scale.scaled(history.values()[i]);
        let available = (end - start) * self.horizon;
        let mut random = Random::new(self.params.seed ^ end as u64);
        let share = self.params.rows as f64 / available as f64;
        let (mut rows, mut targets, mut steps) = (Vec::new(), Vec::new(), Vec::new());
        let mut row = [0.0; ROW_FEATURES];
        for t in start..end - 1 {
            view.origin(history, t, &mut row);
            for step in 1..=self.horizon.min(end - 1 - t) {
                if random.unit() < share && history.is_measured(t + step) {
                    view.target(history, t, step, &mut row);
                    targets.push(z(t + step) - z(t) - self.reference(&row, step));
                    rows.push(row);
                    steps.push(step as u8);
                }
            }
        }
        self.units = unit_by_step(&targets, &steps, self.horizon);
        for (target, &step) in targets.iter_mut().zip(&steps) {
            *target /= self.units[usize::from(step) - 1];
        }
        self.bins = Bins::of(&rows);
        let columns = self.bins.columns(&rows);
        let groups: Vec<usize> = steps.iter().map(|&s| usize::from(s) - 1).collect();
        self.booster = Booster::fit(&columns, &targets, &groups, self.horizon, &self.params);
        self.view = Some(view);
    }

    fn forecast(&self, history: &History, origin: usize, out: &mut [Quantiles]) {
        let last = history.values()[origin];
        let Some(view) = self.view else {
            out.fill([last; LEVEL_COUNT]);
            return;
        };
        let mut row = [0.0; ROW_FEATURES];
        view.origin(history, origin, &mut row);
        for (index, out) in out.iter_mut().enumerate().take(self.horizon) {
            view.target(history, origin, index + 1, &mut row);
            let binned = self.bins.row(&row);
            let values = self.booster.predict(&binned, index);
            let reference = self.reference(&row, index + 1);
            for (out, value) in out.iter_mut().zip(values) {
                *out = last + view.scale.unit * f64::from(reference + value * self.units[index]);
            }
        }
    }

    fn bytes(&self) -> usize {
        self.linear.bytes() + self.bins.bytes() + self.booster.bytes() + 4 * self.units.capacity()
    }
}

/// Mean absolute target a step, never 0.
fn unit_by_step(targets: &[f32], steps: &[u8], horizon: usize) -> Vec<f32> {
    let (mut sums, mut counts) = (vec![0.0f64; horizon], vec![0usize; horizon]);
    for (target, &step) in targets.iter().zip(steps) {
        sums[usize::from(step) - 1] += f64::from(target.abs());
        counts[usize::from(step) - 1] += 1;
    }
    sums.iter().zip(counts).map(|(s, n)| ((s / n.max(1) as f64) as f32).max(1e-6)).collect()
}

/// SplitMix64: a named, seeded source, the same on every machine.
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in 0..1.
    pub(crate) fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

const _: () = assert!(LEVELS.len() == LEVEL_COUNT);
