//! A plan after a change: what may stay stays, the rest is placed, and others move only where that gives a place to a
//! shadow that would have none.

use super::anneal::{Schedule, anneal};
use super::board::{Board, View};
use super::load::Load;
use super::problem::{NONE, Problem};
use super::rng::Rng;
use super::{Options, Stage, Workers, fresh, greedy};

const TRIES: u32 = 64;
/// Most evictions from one host of which all combinations are tried.
const MAX_CHOICE: usize = 3;

pub(super) fn plan(
    problem: &Problem<'_>,
    board: &mut Board,
    options: &Options,
    workers: &dyn Workers,
    watch: &mut dyn FnMut(Stage),
) {
    let mut view = board.whole(problem);
    keep(&mut view);
    let free: Vec<u32> = problem.by_size.iter().copied().filter(|&id| view.at(id) == NONE).collect();
    let mut kept = vec![true; problem.shadows.len()];
    for &id in &free {
        kept[id as usize] = false;
    }
    let mut rng = Rng::of(options.seed, 1 << 40);
    let left = greedy::place(&mut view, &free, TRIES, &mut rng);
    let out = greedy::place_anywhere(&mut view, &left);
    let (objective, unplaced) = board.total(problem);
    watch(Stage::First { objective, unplaced });
    if free.len() > problem.shadows.len() / 4 {
        fresh::improve(problem, board, &free, &kept, options, workers, watch);
    } else {
        settle(problem, board, &free, &kept, options);
    }
    if !out.is_empty() {
        rescue(problem, board, &out, options);
    }
}

/// Leaves every shadow where it stands if it may stay there; where not all can, as many as can.
fn keep(view: &mut View<'_>) {
    let problem = view.problem;
    let mut refused = Vec::new();
    for (id, shadow) in problem.shadows.iter().enumerate() {
        let host = shadow.current;
        if host == NONE {
            continue;
        }
        let id = id as u32;
        if view.price(id, NONE, host).is_some() {
            view.put(id, host);
        } else if view.allowed(shadow, host) && view.load(host).adding(problem, shadow).is_none() {
            refused.push((host, id));
        }
    }
    refused.sort_unstable();
    for on_host in refused.chunk_by(|a, b| a.0 == b.0) {
        let ids: Vec<u32> = on_host.iter().map(|&(_, id)| id).collect();
        exchange(view, on_host[0].0, &ids);
    }
}

/// Evicts others from `host` if then more of `refused` can stay, or if less memory has to move.
fn exchange(view: &mut View<'_>, host: u32, refused: &[u32]) {
    let problem = view.problem;
    let mut all = view.load(host).shadows.clone();
    all.sort_unstable();
    let kept = all.clone();
    all.extend(refused);
    let churn = |id: u32| problem.shadows[id as usize].churn;
    let mut choice = Choice { problem, empty: view.empty(host), all: &all, best: None };
    let now: i64 = refused.iter().map(|&id| churn(id)).sum();
    for evictions in 1..=refused.len().min(MAX_CHOICE) {
        choice.search(&mut Vec::new(), 0, evictions, 0);
        if choice.best.is_some() {
            break;
        }
    }
    let Some((cost, evicted)) = choice.best else { return };
    if evicted.len() == refused.len() && cost >= now {
        return;
    }
    for &id in &kept {
        if evicted.contains(&id) {
            view.take(id);
        }
    }
    for &id in refused {
        // Links and siblings may still forbid it: then it has to move, as before.
        if !evicted.contains(&id) && view.price(id, NONE, host).is_some() {
            view.put(id, host);
        }
    }
    for &id in &kept {
        if view.at(id) == NONE && view.price(id, NONE, host).is_some() {
            view.put(id, host);
        }
    }
}

struct Choice<'c, 'a> {
    problem: &'c Problem<'a>,
    empty: Load,
    all: &'c [u32],
    /// Memory moved, as its price, and who is evicted.
    best: Option<(i64, Vec<u32>)>,
}

impl Choice<'_, '_> {
    /// Tries all sets of `more` further evictions from `all[from..]`.
    fn search(&mut self, evicted: &mut Vec<u32>, from: usize, more: usize, cost: i64) {
        if self.best.as_ref().is_some_and(|(least, _)| cost >= *least) {
            return;
        }
        if more == 0 {
            if self.fits_without(evicted) {
                self.best = Some((cost, evicted.clone()));
            }
            return;
        }
        for at in from..self.all.len() {
            let id = self.all[at];
            evicted.push(id);
            self.search(evicted, at + 1, more - 1, cost + self.problem.shadows[id as usize].churn);
            evicted.pop();
        }
    }

    fn fits_without(&self, evicted: &[u32]) -> bool {
        let mut load = self.empty.clone();
        self.all.iter().filter(|id| !evicted.contains(id)).all(|&id| {
            let shadow = &self.problem.shadows[id as usize];
            match load.adding(self.problem, shadow) {
                Some(change) => {
                    load.add(self.problem, id, shadow, change);
                    true
                }
                None => false,
            }
        })
    }
}

/// Improves where the shadows that had to be placed stand; no other moves.
fn settle(problem: &Problem<'_>, board: &mut Board, free: &[u32], kept: &[bool], options: &Options) {
    let soft = fresh::price_of_a_shadow(problem, board);
    let moves = options.moves.unwrap_or((25 * free.len() as u64).clamp(20_000, 250_000));
    let schedule = Schedule { moves, hot: 0.2 * soft, cold: 0.01 * soft, tries: 6, pushes: 32, rescues: 32, bias: 1.0 };
    anneal(&mut board.whole(problem), free, kept, schedule, &mut Rng::of(options.seed, 2 << 40));
}

/// Lets those that still have no place push away others, which then move. What has been placed is kept in place by
/// its price of moving.
fn rescue(problem: &Problem<'_>, board: &mut Board, out: &[u32], options: &Options) {
    let mut view = board.whole(problem);
    let out: Vec<u32> =
        out.iter().copied().filter(|&id| view.at(id) == NONE && fresh::has_any_host(&view, id)).collect();
    if out.is_empty() {
        return;
    }
    let none = vec![false; problem.shadows.len()];
    let moves = options.moves.unwrap_or((2_000 * out.len() as u64).min(200_000));
    let schedule = Schedule { moves, hot: 1_000.0, cold: 100.0, tries: 16, pushes: 256, rescues: 256, bias: 0.0 };
    anneal(&mut view, &out, &none, schedule, &mut Rng::of(options.seed, 3 << 40));
}
