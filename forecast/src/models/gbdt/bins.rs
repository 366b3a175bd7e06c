//! Features as small integers: at most [`BINS`] classes each, of about equal counts; class 0 means unknown.

use crate::codec::{Reader, Writer};
use crate::error::DecodeError;
use crate::features::{ORIGIN_FEATURES, ROW_FEATURES, Row};

/// Classes a feature, class 0 (unknown) included.
pub const BINS: usize = 64;

/// Rows of a block.
pub const LANES: usize = 16;
/// Binned rows side by side, `[feature][row]`: all are compared with a bound at once.
pub type Block = [[i16; LANES]; ROW_FEATURES];

/// Upper bounds of each feature's classes 1, 2, ...
#[derive(Debug, Clone, Default)]
pub struct Bins {
    bounds: Vec<Vec<f32>>,
}

impl Bins {
    /// Cuts every feature at quantiles of `rows`.
    pub fn of(rows: &[Row]) -> Self {
        const SAMPLE: usize = 6000;
        let stride = rows.len().div_ceil(SAMPLE).max(1);
        let bounds = (0..ROW_FEATURES)
            .map(|feature| {
                let mut values: Vec<f32> =
                    rows.iter().step_by(stride).map(|r| r[feature]).filter(|v| !v.is_nan()).collect();
                values.sort_unstable_by(f32::total_cmp);
                let last = values.len().saturating_sub(1);
                let mut cuts: Vec<f32> =
                    (1..BINS - 1).filter_map(|k| values.get(last * k / (BINS - 1)).copied()).collect();
                cuts.dedup();
                cuts
            })
            .collect();
        Self { bounds }
    }

    /// The rows of one origin, binned: its own features are the same in all.
    pub fn blocks(&self, rows: &[Row]) -> Vec<Block> {
        let mut origin = [0; ORIGIN_FEATURES];
        if let Some(row) = rows.first() {
            for ((out, &value), bounds) in origin.iter_mut().zip(row).zip(&self.bounds) {
                *out = i16::from(class(bounds, value));
            }
        }
        let block = |rows: &[Row]| {
            let mut block = [[0; LANES]; ROW_FEATURES];
            for (column, class) in block.iter_mut().zip(origin) {
                *column = [class; LANES];
            }
            for (feature, (column, bounds)) in block.iter_mut().zip(&self.bounds).enumerate().skip(ORIGIN_FEATURES) {
                for (out, row) in column.iter_mut().zip(rows) {
                    *out = i16::from(class(bounds, row[feature]));
                }
            }
            block
        };
        rows.chunks(LANES).map(block).collect()
    }

    /// All rows, a column a feature.
    pub fn columns(&self, rows: &[Row]) -> Vec<Vec<u8>> {
        self.bounds
            .iter()
            .enumerate()
            .map(|(feature, bounds)| rows.iter().map(|r| class(bounds, r[feature])).collect())
            .collect()
    }

    pub(super) fn encode(&self, out: &mut Writer) {
        out.count(self.bounds.len());
        self.bounds.iter().for_each(|b| out.f32s(b));
    }

    pub(super) fn decode(from: &mut Reader) -> Result<Self, DecodeError> {
        let count = from.count(4, "binned features")?;
        if count != 0 && count != ROW_FEATURES {
            return Err(from.range("binned features"));
        }
        let bounds = (0..count).map(|_| from.f32s("bin bounds")).collect::<Result<Vec<_>, _>>()?;
        if bounds.iter().any(|b| b.len() > BINS - 2 || !b.is_sorted()) {
            return Err(from.range("bin bounds"));
        }
        Ok(Self { bounds })
    }

    pub fn bytes(&self) -> usize {
        self.bounds.iter().map(|b| 4 * b.capacity()).sum()
    }
}

/// 0 for unknown, else 1 plus the number of bounds below `value`; at most `BINS - 1`.
fn class(bounds: &[f32], value: f32) -> u8 {
    if value.is_nan() { 0 } else { 1 + bounds.partition_point(|&b| b < value) as u8 }
}
