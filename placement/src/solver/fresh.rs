//! A plan from nothing, and the improvement of one.

use super::anneal::{Schedule, anneal};
use super::board::{Board, View};
use super::problem::{NONE, Problem, SMALL};
use super::rng::Rng;
use super::{Options, Stage, Workers, greedy, workers};

/// Hosts looked at for each shadow of a first plan.
const TRIES: u32 = 24;
/// Up to this many shadows more runs fit into a second.
const TINY: usize = 600;

pub(super) fn plan(
    problem: &Problem<'_>,
    board: &mut Board,
    options: &Options,
    workers: &dyn Workers,
    watch: &mut dyn FnMut(Stage),
) {
    let left = first(problem, board, options.seed, workers);
    let mut view = board.whole(problem);
    let left = greedy::place(&mut view, &left, 2 * TRIES, &mut Rng::of(options.seed, 1 << 32));
    greedy::place_anywhere(&mut view, &left);
    let (objective, unplaced) = board.total(problem);
    watch(Stage::First { objective, unplaced });
    let all: Vec<u32> = (0..problem.shadows.len() as u32).collect();
    improve(problem, board, &all, &vec![false; all.len()], options, workers, watch);
}

/// Every zone places what may stand in the room of its primary. Gives back the rest.
fn first(problem: &Problem<'_>, board: &mut Board, seed: u64, workers: &dyn Workers) -> Vec<u32> {
    let zone_of = zone_of_hosts(problem);
    let mut orders = vec![Vec::new(); problem.zones.len()];
    let mut rest = Vec::new();
    for &id in &problem.by_size {
        let shadow = &problem.shadows[id as usize];
        if shadow.reach[0] {
            orders[zone_of[shadow.primary as usize]].push(id);
        } else {
            rest.push(id);
        }
    }
    let views: Vec<_> = board.zones(problem).into_iter().zip(orders).enumerate().collect();
    let left = workers::map(workers, views, |(zone, (mut view, order))| {
        greedy::place(&mut view, &order, TRIES, &mut Rng::of(seed, zone as u64))
    });
    let mut left = left.concat();
    left.append(&mut rest);
    left
}

/// Moves `free` about, and what is not `pinned` out of their way.
pub(super) fn improve(
    problem: &Problem<'_>,
    board: &mut Board,
    free: &[u32],
    pinned: &[bool],
    options: &Options,
    workers: &dyn Workers,
    watch: &mut dyn FnMut(Stage),
) {
    let view = board.whole(problem);
    let free: Vec<u32> = free.iter().copied().filter(|&id| view.at(id) != NONE || has_any_host(&view, id)).collect();
    if free.is_empty() || options.moves == Some(0) {
        return;
    }
    if problem.shadows.len() <= SMALL {
        together(problem, board, &free, pinned, options, workers);
        let (objective, unplaced) = board.total(problem);
        watch(Stage::Improved { objective, unplaced });
    } else {
        by_zones(problem, board, &free, pinned, options, workers, watch);
    }
}

/// Whether any host would take the shadow if it were empty.
pub(super) fn has_any_host(view: &View<'_>, id: u32) -> bool {
    let shadow = &view.problem.shadows[id as usize];
    view.hosts().any(|host| view.allowed(shadow, host) && view.empty(host).adding(view.problem, shadow).is_some())
}

/// What a placed shadow costs on average: the measure of temperatures.
pub(super) fn price_of_a_shadow(problem: &Problem<'_>, board: &Board) -> f64 {
    let (objective, unplaced) = board.total(problem);
    let out = |(id, shadow)| if board.at(id as u32) == NONE { View::left_out(shadow) } else { 0 };
    let left_out: i64 = problem.shadows.iter().enumerate().map(out).sum();
    let placed = (problem.shadows.len() - unplaced).max(1);
    ((objective - left_out) as f64 / placed as f64).max(1.0)
}

/// Improves several copies of the plan from other seeds and keeps the best. While many shadows have no host every
/// other one begins hot enough to exchange those.
fn together(
    problem: &Problem<'_>,
    board: &mut Board,
    free: &[u32],
    pinned: &[bool],
    options: &Options,
    workers: &dyn Workers,
) {
    let n = problem.shadows.len();
    let runs = if n <= TINY { 6 } else { 2 };
    let enough = match n {
        _ if n <= TINY / 4 => 1_500_000,
        _ if n <= TINY => 3_000_000,
        _ => 4_600_000,
    };
    let moves = options.moves.unwrap_or(enough) / runs;
    let soft = price_of_a_shadow(problem, board);
    let start = board.snapshot();
    let short = many_out(board, free);
    let pushes = match n {
        _ if short => 200,
        0..=TINY => 128,
        _ => 64,
    };
    let fine = Schedule { moves, hot: soft, cold: 0.01 * soft, tries: 6, pushes, rescues: 32, bias: 1.0 };
    let hard = free.iter().map(|&id| View::left_out(&problem.shadows[id as usize])).sum::<i64>() / free.len() as i64;
    let bold = Schedule { moves: moves * 3 / 10, hot: (0.2 * hard as f64).max(soft), cold: soft, bias: 0.0, ..fine };
    let results = workers::map(workers, (0..runs).collect(), |run| {
        let mut board = Board::new(problem);
        let mut view = board.whole(problem);
        for (id, &host) in start.iter().enumerate() {
            if host != NONE {
                view.put(id as u32, host);
            }
        }
        let mut rng = Rng::of(options.seed, (2 << 32) + run);
        let mut fine = fine;
        if short && run % 2 == 1 {
            anneal(&mut view, free, pinned, bold, &mut rng);
            fine.moves -= bold.moves;
        }
        anneal(&mut view, free, pinned, fine, &mut rng);
        let out: Vec<u32> = free.iter().copied().filter(|&id| view.at(id) == NONE).collect();
        greedy::place_anywhere(&mut view, &out);
        board
    });
    let best = results.into_iter().enumerate().min_by_key(|(run, board)| (board.total(problem).0, *run));
    if let Some((_, best)) = best
        && best.total(problem).0 < board.total(problem).0
    {
        *board = best;
    }
}

/// Rounds of improvement: each zone for itself, then what may change rooms, serially.
fn by_zones(
    problem: &Problem<'_>,
    board: &mut Board,
    free: &[u32],
    pinned: &[bool],
    options: &Options,
    workers: &dyn Workers,
    watch: &mut dyn FnMut(Stage),
) {
    const ROUNDS: u32 = 4;
    let count = free.len() as u64;
    let moves = options.moves.unwrap_or((80 * count).min(1_800_000).max(10 * count)) / u64::from(ROUNDS);
    let soft = price_of_a_shadow(problem, board);
    // Little time does not suffice to cool down from far.
    let hot = if moves * u64::from(ROUNDS) >= 60 * count { 0.5 } else { 0.25 } * soft;
    let cooling = (0.02 * soft / hot).powf(1.0 / f64::from(ROUNDS));
    let reaches_far = |&id: &u32| problem.shadows[id as usize].reach[1] || problem.shadows[id as usize].reach[2];
    let roaming: Vec<u32> = free.iter().copied().filter(reaches_far).collect();
    let zone_of = zone_of_hosts(problem);
    // Where many have no host, it is by pushes that they get one.
    let pushes = if many_out(board, free) { 128 } else { 16 };
    for round in 0..ROUNDS {
        let hot = hot * cooling.powi(round as i32);
        let schedule = |moves| Schedule { moves, hot, cold: hot * cooling, tries: 8, pushes, rescues: 32, bias: 1.0 };
        let rng = |part: u64| Rng::of(options.seed, u64::from(3 + round) << 32 | part);
        let movable = by_zone(problem, board, free, &zone_of);
        let views: Vec<_> = board.zones(problem).into_iter().zip(movable).enumerate().collect();
        workers::map(workers, views, |(zone, (mut view, movable)): (usize, (View<'_>, Vec<u32>))| {
            let schedule = schedule(moves * movable.len() as u64 / count);
            anneal(&mut view, &movable, pinned, schedule, &mut rng(zone as u64));
        });
        anneal(&mut board.whole(problem), &roaming, pinned, schedule(moves / 8), &mut rng(1 << 31));
        let (objective, unplaced) = board.total(problem);
        watch(Stage::Improved { objective, unplaced });
    }
}

/// Whether more than a few have no host.
fn many_out(board: &Board, free: &[u32]) -> bool {
    free.iter().filter(|&&id| board.at(id) == NONE).count() > free.len() / 200
}

fn zone_of_hosts(problem: &Problem<'_>) -> Vec<usize> {
    let mut zone_of = Vec::with_capacity(problem.sites.len());
    for (zone, range) in problem.zones.iter().enumerate() {
        zone_of.resize(range.hosts.end as usize, zone);
    }
    zone_of
}

/// What each zone may move: what stands in it, and what stands nowhere while its primary is there.
fn by_zone(problem: &Problem<'_>, board: &Board, free: &[u32], zone_of: &[usize]) -> Vec<Vec<u32>> {
    let mut movable = vec![Vec::new(); problem.zones.len()];
    for &id in free {
        let at = board.at(id);
        let shadow = &problem.shadows[id as usize];
        let host = if at != NONE { at } else { shadow.primary };
        if at != NONE || shadow.reach[0] {
            movable[zone_of[host as usize]].push(id);
        }
    }
    movable
}
