//! One tree: how it is grown from binned rows and walked.

use super::bins::{BINS, BinnedRow};
use super::boost::Params;
use crate::codec::{Reader, Writer};
use crate::error::DecodeError;
use crate::features::ROW_FEATURES;
use crate::quantiles::{LEVEL_COUNT, LEVELS};

/// One value a level.
pub(super) type Leaf = [f32; LEVEL_COUNT];
/// Sum of gradients a level, and the count of rows last.
pub(super) type Cell = [f32; LEVEL_COUNT + 1];

#[derive(Debug, Clone, Copy)]
pub(super) struct Node {
    feature: u8,
    /// Classes up to this one go left.
    class: u8,
    /// Index of the left and the right child; a leaf is `!index` into the leaves.
    children: [i32; 2],
}

#[derive(Debug, Clone, Default)]
pub(super) struct Tree {
    pub(super) nodes: Vec<Node>,
    pub(super) leaves: Vec<Leaf>,
}

impl Tree {
    pub(super) fn leaf_of(&self, class: impl Fn(usize) -> u8) -> usize {
        let mut at = 0i32;
        if self.nodes.is_empty() {
            return 0;
        }
        while at >= 0 {
            let node = &self.nodes[at as usize];
            // By index, not by branch: which way it goes cannot be guessed.
            at = node.children[usize::from(class(usize::from(node.feature)) > node.class)];
        }
        !at as usize
    }
}

pub(super) struct Grown {
    pub(super) nodes: Vec<Node>,
    /// Range of rows a leaf, after partitioning.
    pub(super) ranges: Vec<std::ops::Range<usize>>,
}

pub(super) struct Grower<'a> {
    pub(super) columns: &'a [Vec<u8>],
    pub(super) gradients: &'a [Cell],
    pub(super) features: &'a [usize],
    pub(super) params: &'a Params,
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
    pub(super) fn grow(&self, rows: &mut [u32]) -> Grown {
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
            nodes.push(Node { feature: split.feature as u8, class: split.class, children: [0; 2] });
            if let Some((parent, left)) = node.parent {
                nodes[parent].children[usize::from(!left)] = at as i32;
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
                nodes[parent].children[usize::from(!left)] = index;
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

impl Tree {
    /// The leaf of a binned row.
    pub(super) fn value(&self, row: &BinnedRow) -> &Leaf {
        &self.leaves[self.leaf_of(|feature| row[feature])]
    }

    pub(super) fn bytes(&self) -> usize {
        size_of::<Node>() * self.nodes.capacity() + size_of::<Leaf>() * self.leaves.capacity()
    }

    pub(super) fn encode(&self, out: &mut Writer) {
        out.count(self.nodes.len());
        for node in &self.nodes {
            out.u8(node.feature);
            out.u8(node.class);
            node.children.iter().for_each(|&c| out.u32(c as u32));
        }
        self.leaves.iter().flatten().for_each(|&v| out.f32(v));
    }

    pub(super) fn decode(from: &mut Reader) -> Result<Self, DecodeError> {
        let count = from.count(10, "tree nodes")?;
        let mut tree = Self::default();
        for at in 0..count {
            let (feature, class) = (from.u8("feature")?, from.u8("class")?);
            let (left, right) = (from.u32("left child")? as i32, from.u32("right child")? as i32);
            // Children come after their parent, so that every walk ends.
            let valid = |child: i32| {
                if child < 0 { !child as usize <= count } else { child as usize > at && (child as usize) < count }
            };
            if usize::from(feature) >= ROW_FEATURES || !valid(left) || !valid(right) {
                return Err(from.range("tree node"));
            }
            tree.nodes.push(Node { feature, class, children: [left, right] });
        }
        for _ in 0..=count {
            let mut leaf = [0.0; LEVEL_COUNT];
            for value in &mut leaf {
                *value = from.f32("leaf")?;
            }
            tree.leaves.push(leaf);
        }
        Ok(tree)
    }
}
