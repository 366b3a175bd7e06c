//! Forecasters behind one small interface.

pub mod gbdt;
pub mod linear;
pub mod naive;

use crate::history::History;
use crate::quantiles::Quantiles;

/// One way to forecast a series.
///
/// `forecast` may look at samples `..=origin` only and at what `fit` and `advance` left behind.
pub trait Model {
    /// Short name for tables.
    fn name(&self) -> &'static str;

    /// Learns from samples `..end`, forgetting what it had learnt before.
    fn fit(&mut self, history: &History, end: usize);

    /// Takes notice of sample `index`; called once for each, in order, for all samples after a fit's `end`.
    fn advance(&mut self, _history: &History, _index: usize) {}

    /// Quantiles for `out.len()` steps after `origin`; they need not be sorted.
    fn forecast(&self, history: &History, origin: usize, out: &mut [Quantiles]);

    /// Heap bytes held.
    fn bytes(&self) -> usize;
}
