//! Boosting of trees with one value a level in every leaf.

use super::Random;
use super::bins::{BINS, BinnedRow};
use crate::quantiles::{LEVEL_COUNT, LEVELS};

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

type Leaf = [f32; LEVEL_COUNT];
/// Sum of gradients a level, and the count of rows last.
type Cell = [f32; LEVEL_COUNT + 1];

#[derive(Debug, Clone, Copy)]
struct Node {
    feature: u8,
    /// Classes up to this one go left.
    class: u8,
    /// Index of the children; a leaf is `!index` into the leaves.
    left: i32,
    right: i32,
}

#[derive(Debug, Clone, Default)]
struct Tree {
    nodes: Vec<Node>,
    leaves: Vec<Leaf>,
}

impl Tree {
    fn leaf_of(&self, class: impl Fn(usize) -> u8) -> usize {
        let mut at = 0i32;
        if self.nodes.is_empty() {
            return 0;
        }
        while at >= 0 {
            let node = &self.nodes[at as usize];
            at = if class(usize::from(node.feature)) <= node.class { node.left } else { node.right };
        }
        !at as usize
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
    /// Learns `targets` from binned `columns`; `groups` (< `group_count`) start from their own quantiles.
    pub fn fit(columns: &[Vec<u8>], targets: &[f32], groups: &[usize], group_count: usize, params: &Params) -> Self {
        let mut random = Random::new(params.seed);
        let start = group_quantiles(targets, groups, group_count);
        let mut predicted: Vec<Leaf> = groups.iter().map(|&g| start[g]).collect();
        let mut gradients = vec![[0.0f32; LEVEL_COUNT + 1]; targets.len()];
        let useful: Vec<usize> =
            (0..columns.len()).filter(|&f| columns[f].iter().any(|&c| c != columns[f][0])).collect();
        let mut trees = Vec::with_capacity(params.trees);
        for _ in 0..params.trees {
            for ((gradient, predicted), &target) in gradients.iter_mut().zip(&predicted).zip(targets) {
                for level in 0..LEVEL_COUNT {
                    let tau = LEVELS[level] as f32;
                    gradient[level] = if target > predicted[level] { tau } else { tau - 1.0 };
                }
                gradient[LEVEL_COUNT] = 1.0;
            }
            let mut rows: Vec<u32> = (0..targets.len() as u32).filter(|_| random.unit() < params.row_share).collect();
            let features: Vec<usize> =
                useful.iter().copied().filter(|_| random.unit() < params.feature_share).collect();
            let grown = Grower { columns, gradients: &gradients, features: &features, params }.grow(&mut rows);
            let mut tree = Tree { nodes: grown.nodes, leaves: Vec::with_capacity(grown.ranges.len()) };
            for range in grown.ranges {
                tree.leaves.push(leaf_values(&rows[range], targets, &predicted, params.rate));
            }
            for (row, predicted) in predicted.iter_mut().enumerate() {
                let leaf = &tree.leaves[tree.leaf_of(|f| columns[f][row])];
                for (p, v) in predicted.iter_mut().zip(leaf) {
                    *p += v;
                }
            }
            trees.push(tree);
        }
        Self { start, trees }
    }

    /// Values of all levels for a binned row of `group`.
    pub fn predict(&self, row: &BinnedRow, group: usize) -> Leaf {
        let mut sum = self.start.get(group).copied().unwrap_or_default();
        for tree in &self.trees {
            let leaf = &tree.leaves[tree.leaf_of(|f| row[f])];
            for (s, v) in sum.iter_mut().zip(leaf) {
                *s += v;
            }
        }
        sum
    }

    pub fn bytes(&self) -> usize {
        let tree = |t: &Tree| size_of::<Node>() * t.nodes.capacity() + size_of::<Leaf>() * t.leaves.capacity();
        self.trees.iter().map(tree).sum::<usize>() + size_of::<Leaf>() * self.start.capacity()
    }
}

fn group_quantiles(targets: &[f32], groups: &[usize], count: usize) -> Vec<Leaf> {
    (0..count)
        .map(|group| {
            let mut own: Vec<f64> =
                targets.iter().zip(groups).filter(|(_, g)| **g == group).map(|(t, _)| f64::from(*t)).collect();
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
    for level in 0..LEVEL_COUNT {
        for (residual, &row) in residuals.iter_mut().zip(rows) {
            *residual = targets[row as usize] - predicted[row as usize][level];
        }
        let at = (LEVELS[level] * (rows.len() - 1) as f64).round() as usize;
        let (_, value, _) = residuals.select_nth_unstable_by(at, f32::total_cmp);
        out[level] = rate * *value;
    }
    out
}

struct Grown {
    nodes: Vec<Node>,
    /// Range of rows a leaf, after partitioning.
    ranges: Vec<std::ops::Range<usize>>,
}

struct Grower<'a> {
    columns: &'a [Vec<u8>],
    gradients: &'a [Cell],
    features: &'a [usize],
    params: &'a Params,
}

/// A node that may still be split.
struct Open {
    range: std::ops::Range<usize>,
    histogram: Vec<[Cell; BINS]>,
    best: Option<Split>,
    /// Where its index is written in its parent: node and side.
    parent: Option<(usize, bool)>,
}

#[derive(Clone, Copy)]
struct Split {
    gain: f32,
    feature: usize,
    class: u8,
}

impl Grower<'_> {
    /// Splits the leaf of greatest gain until none is worth it; `rows` end up sorted by leaf.
    fn grow(&self, rows: &mut [u32]) -> Grown {
        let mut nodes: Vec<Node> = Vec::new();
        let mut open = vec![self.open(rows, 0..rows.len(), None, None)];
        while open.len() < self.params.leaves {
            let best = (0..open.len())
                .filter(|&i| open[i].best.is_some())
                .max_by(|&a, &b| gain(&open[a]).total_cmp(&gain(&open[b])).then(b.cmp(&a)));
            let Some(index) = best else { break };
            let node = open.swap_remove(index);
            let Some(split) = node.best else { break };
            let column = &self.columns[split.feature];
            let middle =
                node.range.start + partition(&mut rows[node.range.clone()], |r| column[r as usize] <= split.class);
            let at = nodes.len();
            nodes.push(Node { feature: split.feature as u8, class: split.class, left: 0, right: 0 });
            if let Some((parent, left)) = node.parent {
                if left { nodes[parent].left = at as i32 } else { nodes[parent].right = at as i32 }
            }
            let (left, right) = (node.range.start..middle, middle..node.range.end);
            let left_is_small = left.len() <= right.len();
            let (small, large) = if left_is_small { (left, right) } else { (right, left) };
            let small = self.open(rows, small, Some((at, left_is_small)), None);
            let mut rest = node.histogram;
            for (rest, part) in rest.iter_mut().zip(&small.histogram) {
                for (rest, part) in rest.iter_mut().zip(part) {
                    for (rest, part) in rest.iter_mut().zip(part) {
                        *rest -= part;
                    }
                }
            }
            let large = self.open(rows, large, Some((at, !left_is_small)), Some(rest));
            open.push(small);
            open.push(large);
        }
        let mut ranges = Vec::with_capacity(open.len());
        for (leaf, node) in open.into_iter().enumerate() {
            if let Some((parent, left)) = node.parent {
                let index = !(leaf as i32);
                if left { nodes[parent].left = index } else { nodes[parent].right = index }
            }
            ranges.push(node.range);
        }
        Grown { nodes, ranges }
    }

    fn open(
        &self,
        rows: &[u32],
        range: std::ops::Range<usize>,
        parent: Option<(usize, bool)>,
        histogram: Option<Vec<[Cell; BINS]>>,
    ) -> Open {
        let histogram = histogram.unwrap_or_else(|| self.histogram(&rows[range.clone()]));
        let best = if range.len() >= 2 * self.params.leaf_rows { self.best_split(&histogram) } else { None };
        Open { range, histogram, best, parent }
    }

    fn histogram(&self, rows: &[u32]) -> Vec<[Cell; BINS]> {
        let gradients: Vec<Cell> = rows.iter().map(|&r| self.gradients[r as usize]).collect();
        self.features
            .iter()
            .map(|&feature| {
                let column = &self.columns[feature];
                let mut cells = [[0.0f32; LEVEL_COUNT + 1]; BINS];
                for (gradient, &row) in gradients.iter().zip(rows) {
                    let cell = &mut cells[usize::from(column[row as usize]) % BINS];
                    for (c, g) in cell.iter_mut().zip(gradient) {
                        *c += g;
                    }
                }
                cells
            })
            .collect()
    }

    fn best_split(&self, histogram: &[[Cell; BINS]]) -> Option<Split> {
        let mut total = [0.0f32; LEVEL_COUNT + 1];
        for cell in histogram.first()? {
            add(&mut total, cell);
        }
        let least = self.params.leaf_rows as f32;
        let parent = score(&total);
        let mut best: Option<Split> = None;
        for (cells, &feature) in histogram.iter().zip(self.features) {
            let mut left = [0.0f32; LEVEL_COUNT + 1];
            for (class, cell) in cells.iter().enumerate().take(BINS - 1) {
                if cell[LEVEL_COUNT] == 0.0 {
                    continue;
                }
                add(&mut left, cell);
                let mut right = total;
                for (r, l) in right.iter_mut().zip(&left) {
                    *r -= l;
                }
                if left[LEVEL_COUNT] < least || right[LEVEL_COUNT] < least {
                    continue;
                }
                let gain = score(&left) + score(&right) - parent;
                if gain > best.map_or(1e-3, |b| b.gain) {
                    best = Some(Split { gain, feature, class: class as u8 });
                }
            }
        }
        best
    }
}

fn gain(node: &Open) -> f32 {
    node.best.map_or(0.0, |s| s.gain)
}

fn add(sum: &mut Cell, cell: &Cell) {
    for (s, c) in sum.iter_mut().zip(cell) {
        *s += c;
    }
}

/// Sum of squared gradient sums over the count, each level in units of its gradients' variance.
fn score(cell: &Cell) -> f32 {
    let mut sum = 0.0;
    for (level, value) in cell.iter().enumerate().take(LEVEL_COUNT) {
        let tau = LEVELS[level] as f32;
        sum += value * value / (tau * (1.0 - tau));
    }
    sum / cell[LEVEL_COUNT].max(1.0)
}

/// Moves rows that satisfy `left` to the front, keeping order; returns their count.
fn partition(rows: &mut [u32], left: impl Fn(u32) -> bool) -> usize {
    let (mut kept, mut moved) = (0, Vec::with_capacity(rows.len()));
    for at in 0..rows.len() {
        let row = rows[at];
        if left(row) {
            rows[kept] = row;
            kept += 1;
        } else {
            moved.push(row);
        }
    }
    rows[kept..].copy_from_slice(&moved);
    kept
}
