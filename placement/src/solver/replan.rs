//! A plan after a change: what may stay stays, the rest is placed, and others move only where that gives a place to a
//! shadow that would have none.

use super::anneal::{Schedule, anneal};
use super::board::{Board, View};
use super::problem::{NONE, Problem};
use super::rng::Rng;
use super::{Options, Stage, Workers, fresh, greedy, stay};

const TRIES: u32 = 64;

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
    if !out.is_empty() && !options.keep {
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

/// Chooses anew who stays on `host`: as many as possible of those that stand there and of `refused`.
fn exchange(view: &mut View<'_>, host: u32, refused: &[u32]) {
    let kept = view.load(host).shadows.clone();
    let mut all = [&kept[..], refused].concat();
    all.sort_unstable();
    let stay = stay::choose(view.problem, view.empty(host), &all);
    let moved = |ids: &[u32], stays: bool| -> Vec<u32> {
        ids.iter().copied().filter(|id| stay.binary_search(id).is_ok() == stays).collect()
    };
    let (leave, come) = (moved(&kept, false), moved(refused, true));
    if come.is_empty() {
        return;
    }
    for &id in &leave {
        view.take(id);
    }
    // Links, siblings and groups may forbid that one comes, and leave room for one that has left.
    for id in come.into_iter().chain(leave) {
        if view.price(id, NONE, host).is_some() {
            view.put(id, host);
        }
    }
}

/// Improves where the shadows that had to be placed stand; no other moves.
fn settle(problem: &Problem<'_>, board: &mut Board, free: &[u32], kept: &[bool], options: &Options) {
    let soft = fresh::price_of_a_shadow(problem, board);
    let moves = options.moves.unwrap_or((15 * free.len() as u64).clamp(5_000, 100_000));
    let schedule = Schedule { moves, hot: 0.2 * soft, cold: 0.01 * soft, tries: 6, pushes: 32, rescues: 32, bias: 1.0 };
    anneal(&mut board.whole(problem), free, kept, schedule, &mut Rng::of(options.seed, 2 << 40));
}

/// Lets those that still have no place push away others, which then move. What has been placed is kept in place by
/// its price of moving.
fn rescue(problem: &Problem<'_>, board: &mut Board, out: &[u32], options: &Options) {
    // What is well is not moved for the sake of the next loss.
    let mut view = board.whole(problem).strict();
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
