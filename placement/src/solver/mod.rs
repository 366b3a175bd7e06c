//! Chooses hosts for all shadows of an [`Instance`].
//!
//! ```text
//! nothing stands yet:  greedy, zone by zone -> greedy, the rest -> annealing -> what still fits -> reasons
//! shadows stand:       keep what may stay -> greedy for the others -> annealing of those -> what still fits -> reasons
//! ```
//!
//! Deterministic: the same instance and options give the same plan on any number of workers. Budgets are in moves.

use crate::instance::{Instance, Plan};

mod anneal;
mod board;
mod candidates;
mod explain;
mod finish;
mod fresh;
mod greedy;
mod load;
mod problem;
mod refusal;
mod replan;
mod rng;
mod stay;
mod strain;
mod workers;

#[cfg(test)]
mod tests;

pub use explain::{Verdict, explain};
pub use refusal::{Crowded, Fix, Objection, Reason, Refusal};
pub use workers::{OneByOne, Task, Workers};

use board::Board;
use problem::Problem;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Moves to try, in all. None: as many as the size asks for; 0: the first plan is the last.
    pub moves: Option<u64>,
    pub seed: u64,
    /// Shadows that may stay where they stand are left there even if another one then finds no host.
    pub keep: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { moves: None, seed: 1, keep: false }
    }
}

/// How far the planner is. `objective` is in milli-points, `unplaced` counts shadows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// The instance is laid out.
    Ready,
    /// There is a valid plan.
    First {
        objective: i64,
        unplaced: usize,
    },
    Improved {
        objective: i64,
        unplaced: usize,
    },
    /// Nothing more fits; reasons follow.
    Placed {
        objective: i64,
        unplaced: usize,
    },
}

/// A plan, and why it leaves out what it leaves out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    pub plan: Plan,
    /// The costliest first.
    pub refusals: Vec<Refusal>,
    /// Milli-points.
    pub objective: i64,
    /// Shadows left out.
    pub unplaced: usize,
}

/// Plans `instance`, which has been validated. `watch` is told of each stage as it is reached.
pub fn solve(instance: &Instance, options: &Options, workers: &dyn Workers, watch: &mut dyn FnMut(Stage)) -> Outcome {
    let problem = Problem::new(instance);
    let mut board = Board::new(&problem);
    watch(Stage::Ready);
    if instance.is_replan() {
        replan::plan(&problem, &mut board, options, workers, watch);
    } else {
        fresh::plan(&problem, &mut board, options, workers, watch);
    }
    finish::plan(&problem, &mut board, workers, watch)
}
