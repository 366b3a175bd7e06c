//! One tree: how it is grown from binned rows and walked.

use super::bins::{BINS, Block, LANES};
use super::boost::Params;
use crate::codec::{Reader, Writer};
use crate::error::DecodeError;
use crate::features::ROW_FEATURES;
use crate::quantiles::{LEVEL_COUNT, LEVELS};

/// One value a level.
pub(super) type Leaf = [f32; LEVEL_COUNT];
/// Sum of gradients a level, and the count of rows last.
pub(super) type Cell = [f32; LEVEL_COUNT + 1];

/// A leaf is a bit of a `u16`.
pub(super) const MOST_LEAVES: usize = 16;

#[derive(Debug, Clone, Copy)]
struct Node {
    feature: u8,
    /// Classes up to this one go left.
    class: u8,
    /// Leaves below its left child, by their order from left to right: not reached by who goes right.
    left_leaves: u16,
    /// Index of the left and the right child; a leaf is `!index` into the leaves.
    children: [i32; 2],
}

#[derive(Debug, Clone, Default)]
pub(super) struct Tree {
    nodes: Vec<Node>,
    leaves: Vec<Leaf>,
    /// Index of each leaf, from left to right.
    order: [u8; MOST_LEAVES],
}

impl Tree {
    /// `None` where nodes and leaves are not those of one tree of at most [`MOST_LEAVES`] leaves.
    fn new(nodes: Vec<Node>, leaves: Vec<Leaf>) -> Option<Self> {
        if leaves.len() > MOST_LEAVES || leaves.len() != nodes.len() + 1 {
            return None;
        }
        let mut tree = Self { nodes, leaves, order: [0; MOST_LEAVES] };
        if tree.nodes.is_empty() {
            return Some(tree);
        }
        let (mut met, mut found) = (0u16, 0);
        tree.put_in_order(0, &mut met, &mut found)?;
        (found == tree.leaves.len()).then_some(tree)
    }

    /// Numbers the leaves below node `at` from left to right, and returns them. `None` if a leaf or a node is met twice.
    fn put_in_order(&mut self, at: usize, met: &mut u16, found: &mut usize) -> Option<u16> {
        let bit = 1u16 << at;
        if *met & bit != 0 {
            return None;
        }
        *met |= bit;
        let mut below = [0u16; 2];
        for (side, below) in below.iter_mut().enumerate() {
            let child = self.nodes[at].children[side];
            *below = if child >= 0 {
                self.put_in_order(child as usize, met, found)?
            } else {
                let leaf = !child as usize;
                if self.order[..*found].iter().any(|&known| usize::from(known) == leaf) {
                    return None;
                }
                self.order[*found] = leaf as u8;
                *found += 1;
                1 << (*found - 1)
            };
        }
        self.nodes[at].left_leaves = below[0];
        Some(below[0] | below[1])
    }

    /// The leaf of one row, by the class of each feature.
    pub(super) fn leaf_of(&self, class: impl Fn(usize) -> u8) -> &Leaf {
        let mut at = if self.nodes.is_empty() { !0i32 } else { 0 };
        while at >= 0 {
            let node = &self.nodes[at as usize];
            // By index, not by branch: which way it goes cannot be guessed.
            at = node.children[usize::from(class(usize::from(node.feature)) > node.class)];
        }
        &self.leaves[!at as usize]
    }
}

pub(super) struct Grown {
    nodes: Vec<Node>,
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
        while open.len() < self.params.leaves.min(MOST_LEAVES) {
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
            nodes.push(Node { feature: split.feature as u8, class: split.class, left_leaves: 0, children: [0; 2] });
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

impl Grown {
    /// The tree, with the value of each range of rows.
    pub(super) fn with_leaves(self, value: impl Fn(std::ops::Range<usize>) -> Leaf) -> Tree {
        let leaves = self.ranges.into_iter().map(value).collect();
        let nothing = || Tree { leaves: vec![Leaf::default()], ..Tree::default() };
        Tree::new(self.nodes, leaves).unwrap_or_else(nothing)
    }
}

impl Tree {
    /// Adds to each row's sum the value of its leaf. All rows of a block at once, without a branch: every node strikes
    /// the leaves that a row cannot reach, and the leftmost that is left is its own.
    pub(super) fn add_to(&self, sums: &mut [Leaf], rows: &Block) {
        let mut left = [u16::MAX; LANES];
        for node in &self.nodes {
            let (class, strike) = (i16::from(node.class), node.left_leaves);
            for (left, &own) in left.iter_mut().zip(&rows[usize::from(node.feature)]) {
                *left &= !(if own > class { strike } else { 0 });
            }
        }
        for (sum, left) in sums.iter_mut().zip(left) {
            let leaf = usize::from(self.order[left.trailing_zeros() as usize % MOST_LEAVES]);
            for (s, v) in sum.iter_mut().zip(&self.leaves[leaf]) {
                *s += v;
            }
        }
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
        if count >= MOST_LEAVES {
            return Err(from.range("tree nodes"));
        }
        let (mut nodes, mut leaves) = (Vec::with_capacity(count), Vec::with_capacity(count + 1));
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
            nodes.push(Node { feature, class, left_leaves: 0, children: [left, right] });
        }
        for _ in 0..=count {
            let mut leaf = [0.0; LEVEL_COUNT];
            for value in &mut leaf {
                *value = from.f32("leaf")?;
            }
            leaves.push(leaf);
        }
        Self::new(nodes, leaves).ok_or_else(|| from.range("tree node"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    fn node(feature: u8, class: u8, children: [i32; 2]) -> Node {
        Node { feature, class, left_leaves: 0, children }
    }

    fn leaves(count: u8) -> Vec<Leaf> {
        (0..count).map(|k| [f32::from(k) + 0.5; LEVEL_COUNT]).collect()
    }

    #[test]
    fn a_block_of_rows_reaches_the_leaves_that_each_row_walks_to() {
        let (mut random, mut reached) = (Random::new(3), [false; MOST_LEAVES]);
        for leaf_count in 1..=MOST_LEAVES {
            // Any leaf of the tree so far is split, so that their numbers follow no order.
            let mut nodes: Vec<Node> = Vec::new();
            for at in 0..leaf_count - 1 {
                let split = (random.unit() * (at + 1) as f64) as i32;
                for child in nodes.iter_mut().flat_map(|n| &mut n.children).filter(|c| **c == !split) {
                    *child = at as i32;
                }
                let (feature, class) = ((random.unit() * 4.0) as u8, (random.unit() * 64.0) as u8);
                nodes.push(node(feature, class, [!split, !(at as i32 + 1)]));
            }
            let tree = Tree::new(nodes, leaves(leaf_count as u8)).expect("a tree");
            for _ in 0..20 {
                let mut rows: Block = [[0; LANES]; ROW_FEATURES];
                rows.iter_mut().take(4).flatten().for_each(|class| *class = (random.unit() * 64.0) as i16);
                let mut sums = [[0.0; LEVEL_COUNT]; LANES];
                tree.add_to(&mut sums, &rows);
                for (row, sum) in sums.iter().enumerate() {
                    assert_eq!(sum, tree.leaf_of(|feature| rows[feature][row] as u8));
                    reached[sum[0] as usize] = true;
                }
            }
        }
        assert!(reached.iter().filter(|r| **r).count() > MOST_LEAVES / 2);
    }

    #[test]
    fn what_is_no_tree_is_refused() {
        let shared_leaf = vec![node(0, 1, [1, !0]), node(0, 1, [!1, !1])];
        let shared_node = vec![node(0, 1, [1, 1]), node(0, 1, [!0, !1])];
        assert!(Tree::new(shared_leaf, leaves(3)).is_none());
        assert!(Tree::new(shared_node, leaves(3)).is_none());
        assert!(Tree::new(Vec::new(), leaves(2)).is_none());
        assert!(Tree::new(vec![node(0, 1, [!1, !0])], leaves(2)).is_some());
    }
}
