//! Boosting of trees with one value a level in every leaf.

use super::bins::{Block, LANES};
use super::tree::{Cell, Grower, Leaf, Tree};
use crate::codec::{Reader, Writer};
use crate::error::DecodeError;
use crate::quantiles::{LEVEL_COUNT, LEVELS};
use crate::random::Random;

/// What a fit may spend and how cautious it is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Params {
    pub trees: usize,
    pub leaves: usize,
    pub rate: f32,
    /// Fewest rows in a leaf.
    pub leaf_rows: usize,
    /// Rows sampled from the history.
    pub rows: usize,
    /// Share of rows a tree sees.
    pub row_share: f64,
    /// Share of features a tree sees.
    pub feature_share: f64,
    pub seed: u64,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            trees: 120,
            leaves: 16,
            rate: 0.08,
            leaf_rows: 60,
            rows: 16_000,
            row_share: 0.6,
            feature_share: 0.5,
            seed: 1,
        }
    }
}

/// A fitted ensemble.
#[derive(Debug, Clone, Default)]
pub struct Booster {
    /// Quantiles of the target a group (step ahead), before any tree.
    start: Vec<Leaf>,
    trees: Vec<Tree>,
}

impl Booster {
    /// Values of all levels for `count` binned rows, one of each group, in blocks. Tree by tree, each of which is then
    /// read once a block.
    pub fn predict(&self, blocks: &[Block], count: usize) -> Vec<Leaf> {
        let mut sums: Vec<Leaf> = (0..count).map(|g| self.start.get(g).copied().unwrap_or_default()).collect();
        for (sums, rows) in sums.chunks_mut(LANES).zip(blocks) {
            self.trees.iter().for_each(|tree| tree.add_to(sums, rows));
        }
        sums
    }

    pub fn bytes(&self) -> usize {
        self.trees.iter().map(Tree::bytes).sum::<usize>() + size_of::<Leaf>() * self.start.capacity()
    }

    pub(super) fn encode(&self, out: &mut Writer) {
        out.count(self.start.len());
        self.start.iter().flatten().for_each(|&v| out.f32(v));
        out.count(self.trees.len());
        self.trees.iter().for_each(|t| t.encode(out));
    }

    pub(super) fn decode(groups: usize, from: &mut Reader) -> Result<Self, DecodeError> {
        let count = from.count(4 * LEVEL_COUNT, "first leaves")?;
        if count != 0 && count != groups {
            return Err(from.range("first leaves"));
        }
        let mut start = vec![[0.0; LEVEL_COUNT]; count];
        for value in start.iter_mut().flatten() {
            *value = from.f32("first leaf")?;
        }
        let count = from.count(4, "trees")?;
        let trees = (0..count).map(|_| Tree::decode(from)).collect::<Result<_, _>>()?;
        Ok(Self { start, trees })
    }
}

/// Boosting under way: what is kept between two trees.
#[derive(Debug, Clone)]
pub(super) struct Boosting {
    columns: Vec<Vec<u8>>,
    targets: Vec<f32>,
    /// Features with more than one class.
    useful: Vec<usize>,
    predicted: Vec<Leaf>,
    gradients: Vec<Cell>,
    random: Random,
    booster: Booster,
}

impl Boosting {
    /// Will learn `targets` from binned `columns`; `groups` (below `group_count`) start from their own quantiles.
    pub(super) fn new(
        columns: Vec<Vec<u8>>,
        targets: Vec<f32>,
        groups: Vec<u8>,
        group_count: usize,
        params: &Params,
    ) -> Self {
        let start = group_quantiles(&targets, &groups, group_count);
        let predicted = groups.iter().map(|&g| start[usize::from(g)]).collect();
        let useful = (0..columns.len()).filter(|&f| columns[f].iter().any(|&c| c != columns[f][0])).collect();
        Self {
            gradients: vec![[0.0; LEVEL_COUNT + 1]; targets.len()],
            columns,
            targets,
            useful,
            predicted,
            random: Random::new(params.seed),
            booster: Booster { start, trees: Vec::with_capacity(params.trees) },
        }
    }

    /// Grows one more tree; true when there are enough.
    pub(super) fn grow(&mut self, params: &Params) -> bool {
        for ((gradient, predicted), &target) in self.gradients.iter_mut().zip(&self.predicted).zip(&self.targets) {
            for ((gradient, predicted), tau) in gradient.iter_mut().zip(predicted).zip(LEVELS) {
                *gradient = if target > *predicted { tau as f32 } else { tau as f32 - 1.0 };
            }
            gradient[LEVEL_COUNT] = 1.0;
        }
        let count = self.targets.len() as u32;
        let mut rows: Vec<u32> = (0..count).filter(|_| self.random.unit() < params.row_share).collect();
        let features: Vec<usize> =
            self.useful.iter().copied().filter(|_| self.random.unit() < params.feature_share).collect();
        let grower = Grower { columns: &self.columns, gradients: &self.gradients, features: &features, params };
        let grown = grower.grow(&mut rows);
        let tree = grown.with_leaves(|r| leaf_values(&rows[r], &self.targets, &self.predicted, params.rate));
        for (row, predicted) in self.predicted.iter_mut().enumerate() {
            let leaf = tree.leaf_of(|f| self.columns[f][row]);
            for (p, v) in predicted.iter_mut().zip(leaf) {
                *p += v;
            }
        }
        self.booster.trees.push(tree);
        self.booster.trees.len() >= params.trees
    }

    pub(super) fn finish(self) -> Booster {
        self.booster
    }
}

fn group_quantiles(targets: &[f32], groups: &[u8], count: usize) -> Vec<Leaf> {
    (0..count)
        .map(|group| {
            let mut own: Vec<f64> = targets
                .iter()
                .zip(groups)
                .filter(|(_, g)| usize::from(**g) == group)
                .map(|(t, _)| f64::from(*t))
                .collect();
            own.sort_unstable_by(f64::total_cmp);
            LEVELS.map(|level| crate::quantiles::quantile_of_sorted(&own, level) as f32)
        })
        .collect()
}

/// For every level the residuals' quantile, shrunk by `rate`.
fn leaf_values(rows: &[u32], targets: &[f32], predicted: &[Leaf], rate: f32) -> Leaf {
    let mut out = [0.0; LEVEL_COUNT];
    if rows.is_empty() {
        return out;
    }
    let mut residuals = vec![0.0f32; rows.len()];
    for (level, out) in out.iter_mut().enumerate() {
        for (residual, &row) in residuals.iter_mut().zip(rows) {
            *residual = targets[row as usize] - predicted[row as usize][level];
        }
        let at = (LEVELS[level] * (rows.len() - 1) as f64).round() as usize;
        let (_, value, _) = residuals.select_nth_unstable_by(at, f32::total_cmp);
        *out = rate * *value;
    }
    out
}
