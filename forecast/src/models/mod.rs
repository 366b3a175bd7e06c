//! Forecasters behind one small interface.

pub mod ets;
pub mod gbdt;
pub mod linear;
pub mod lstm;
pub mod naive;
mod solve;

use crate::features::{Row, View};
use crate::history::History;
use crate::quantiles::Quantiles;

/// What a model forecasts from: the history up to `origin`, seen through a view.
#[derive(Debug, Clone, Copy)]
pub struct Input<'a> {
    pub history: &'a History,
    /// Index of the newest sample that may be used.
    pub origin: usize,
    pub view: &'a View,
    /// One row a step ahead.
    pub rows: &'a [Row],
    /// What the linear model sees of them.
    pub inputs: &'a [linear::Inputs],
    /// The linear model's median a step ahead, in units of the view and relative to the newest value.
    pub linear: &'a [f32],
}

/// What a model learns from: all rows whose target is before `end`.
#[derive(Debug)]
pub struct Sample<'a> {
    pub history: &'a History,
    /// Samples `..end` may be used.
    pub end: usize,
    pub view: &'a View,
    /// Origin of the first row.
    pub first: usize,
    /// Rows by step ahead; `rows[s][k]` has origin `first + k` and target `first + k + s + 1`.
    pub rows: &'a [Vec<Row>],
    /// The linear model's medians, in the order of `rows`; empty while that model learns.
    pub linear: &'a [Vec<f32>],
}

impl Sample<'_> {
    /// Steps ahead.
    pub fn horizon(&self) -> usize {
        self.rows.len()
    }

    /// Sample `index` in units of the view.
    pub fn scaled(&self, index: usize) -> f32 {
        self.view.scale.scaled(self.history.values()[index])
    }
}

/// One way to forecast a series.
///
/// A forecast looks at samples up to its origin only, and at what learning and advancing left behind.
pub trait Model {
    /// Short name for tables.
    fn name(&self) -> &'static str;

    /// Does slice number `slice` of learning anew; true when there is no more. Slice 0 forgets what was learnt, but a
    /// model may start from it. The same sample is given to all slices. A slice takes a few milliseconds.
    fn learn(&mut self, sample: &Sample, slice: usize) -> bool;

    /// Takes notice of sample `index`; called once for each, in order, for all samples after those learnt from.
    fn advance(&mut self, _history: &History, _view: &View, _index: usize) {}

    /// Quantiles for `out.len()` steps after the input's origin; they need not be sorted.
    fn forecast(&self, input: &Input, out: &mut [Quantiles]);

    /// Heap bytes held.
    fn bytes(&self) -> usize;
}
