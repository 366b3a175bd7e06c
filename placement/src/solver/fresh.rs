//! A plan from nothing.

use super::anneal::{Schedule, anneal};
use super::board::{Board, View};
use super::problem::{NONE, Problem};
use super::rng::Rng;
use super::{Options, Stage, Workers, greedy, workers};

const GREEDY_TRIES: u32 = 24;
/// Up to this many shadows the plan is improved as a whole, several times over from other seeds.
const SMALL: usize = 6_000;

pub(super) fn plan(
    problem: &Problem<'_>,
    board: &mut Board,
    options: &Options,
    workers: &dyn Workers,
    watch: &mut dyn FnMut(Stage),
) {
    let left = first(problem, board, options.seed, workers);
    let mut view = board.whole(problem);
    let left = greedy::place(&mut view, &left, 2 * GREEDY_TRIES, &mut Rng::of(options.seed, 1 << 32));
    greedy::place_anywhere(&mut view, &left);
    let (objective, unplaced) = board.total(problem);
    watch(Stage::First { objective, unplaced });
    if problem.shadows.len() <= SMALL {
        together(problem, board, options, workers);
    } else {
        by_zones(problem, board, options, workers, watch);
    }
    let (objective, unplaced) = board.total(problem);
    watch(Stage::Improved { objective, unplaced });
}

/// Every zone places what may stand in the room of its primary. Gives back the rest.
fn first(problem: &Problem<'_>, board: &mut Board, seed: u64, workers: &dyn Workers) -> Vec<u32> {
    let mut zone_of_room = vec![usize::MAX; problem.rooms.len()];
    for (zone, range) in problem.zones.iter().enumerate() {
        for site in &problem.sites[range.hosts.start as usize..range.hosts.end as usize] {
            zone_of_room[site.room as usize] = zone;
        }
    }
    let mut orders = vec![Vec::new(); problem.zones.len()];
    let mut rest = Vec::new();
    for &id in &problem.by_size {
        let shadow = &problem.shadows[id as usize];
        if shadow.reach[0] {
            orders[zone_of_room[problem.sites[shadow.primary as usize].room as usize]].push(id);
        } else {
            rest.push(id);
        }
    }
    let views: Vec<_> = board.zones(problem).into_iter().zip(orders).enumerate().collect();
    let left = workers::map(workers, views, |(zone, (mut view, order))| {
        greedy::place(&mut view, &order, GREEDY_TRIES, &mut Rng::of(seed, zone as u64))
    });
    let mut left = left.concat();
    left.append(&mut rest);
    left
}

/// Improves several copies of the plan, keeps the best.
fn together(problem: &Problem<'_>, board: &mut Board, options: &Options, workers: &dyn Workers) {
    let t = |i: usize, default: f64| options.tune.get(i).copied().unwrap_or(default);
    let runs = t(0, 4.0) as u64;
    let moves = options.moves.unwrap_or(1_000_000) / runs;
    let schedule = Schedule { moves, hot: t(1, 60_000.0), cold: t(2, 500.0), tries: t(3, 8.0) as u32, pushes: t(4, 64.0) as u32 };
    let hotter = Schedule { hot: t(5, 1_000_000.0), ..schedule };
    let all: Vec<u32> = (0..problem.shadows.len() as u32).collect();
    let pinned = vec![false; all.len()];
    let start = board.snapshot();
    let results = workers::map(workers, (0..runs).collect(), |run| {
        let mut board = Board::new(problem);
        let mut view = board.whole(problem);
        for (id, &host) in start.iter().enumerate() {
            if host != NONE {
                view.put(id as u32, host);
            }
        }
        let schedule = if run % 2 == 0 { schedule } else { hotter };
        anneal(&mut view, &all, &pinned, schedule, &mut Rng::of(options.seed, (2 << 32) + run));
        let out: Vec<u32> = all.iter().copied().filter(|&id| view.at(id) == NONE).collect();
        greedy::place_anywhere(&mut view, &out);
        board
    });
    let best = results.into_iter().enumerate().min_by_key(|(run, board)| (board.total(problem).0, *run));
    if let Some((_, best)) = best {
        *board = best;
    }
}

fn by_zones(
    problem: &Problem<'_>,
    board: &mut Board,
    options: &Options,
    workers: &dyn Workers,
    watch: &mut dyn FnMut(Stage),
) {
    let t = |i: usize, default: f64| options.tune.get(i).copied().unwrap_or(default);
    let moves = options.moves.unwrap_or(40 * problem.shadows.len() as u64);
    let rounds = t(0, 4.0) as u64;
    let (hot, cold) = (t(1, 40_000.0), t(2, 2_000.0));
    let pinned = vec![false; problem.shadows.len()];
    let step = (cold / hot).powf(1.0 / rounds as f64);
    for round in 0..rounds {
        let hot = hot * step.powi(round as i32);
        let movable = by_zone(problem, board);
        let total = problem.shadows.len() as u64;
        let views: Vec<_> = board.zones(problem).into_iter().zip(movable).enumerate().collect();
        workers::map(workers, views, |(zone, (mut view, movable)): (usize, (View<'_>, Vec<u32>))| {
            let moves = moves / rounds * movable.len() as u64 / total;
            let schedule =
                Schedule { moves, hot, cold: hot * step, tries: t(3, 6.0) as u32, pushes: t(4, 32.0) as u32 };
            anneal(&mut view, &movable, &pinned, schedule, &mut Rng::of(options.seed, (3 + round) << 32 | zone as u64));
        });
        let mut view = board.whole(problem);
        let roaming: Vec<u32> = (0..total as u32)
            .filter(|&id| problem.shadows[id as usize].reach[1] || problem.shadows[id as usize].reach[2])
            .collect();
        let schedule = Schedule {
            moves: moves / rounds / 8,
            hot,
            cold: hot * step,
            tries: t(3, 6.0) as u32,
            pushes: t(4, 32.0) as u32,
        };
        anneal(&mut view, &roaming, &pinned, schedule, &mut Rng::of(options.seed, (3 + round) << 32 | 1 << 31));
        let (objective, unplaced) = board.total(problem);
        watch(Stage::Improved { objective, unplaced });
    }
}

/// What each zone may move: what stands in it, and what stands nowhere while its primary is there.
fn by_zone(problem: &Problem<'_>, board: &Board) -> Vec<Vec<u32>> {
    let mut zone_of = Vec::with_capacity(problem.sites.len());
    for (zone, range) in problem.zones.iter().enumerate() {
        zone_of.resize(range.hosts.end as usize, zone);
    }
    let mut movable = vec![Vec::new(); problem.zones.len()];
    for (id, shadow) in problem.shadows.iter().enumerate() {
        let at = board.at(id as u32);
        let host = if at != NONE { at } else { shadow.primary };
        movable[zone_of[host as usize]].push(id as u32);
    }
    movable
}
