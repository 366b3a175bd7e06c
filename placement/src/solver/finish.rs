//! The end of a plan: what still fits is placed, and what is left out is told why.

use std::cmp::Reverse;

use super::board::{Board, View};
use super::problem::{NONE, Problem};
use super::refusal::{self, Refusal};
use super::{Outcome, Stage, Workers, greedy, workers};
use crate::instance::Plan;

/// Most looks at a host that are spent on reasons: all shadows that are left out, unless a large fleet has no room at
/// all. Those that matter most come first.
const MAX_LOOKS: usize = 1 << 29;
/// Shadows explained by one task.
const BATCH: usize = 32;

pub(super) fn plan(
    problem: &Problem<'_>,
    board: &mut Board,
    workers: &dyn Workers,
    watch: &mut dyn FnMut(Stage),
) -> Outcome {
    let mut out: Vec<u32> = (0..problem.shadows.len() as u32).filter(|&id| board.at(id) == NONE).collect();
    out.sort_by_key(|&id| (Reverse(View::left_out(&problem.shadows[id as usize])), id));
    let out = greedy::place_anywhere(&mut board.whole(problem), &out);
    let (objective, unplaced) = board.total(problem);
    watch(Stage::Placed { objective, unplaced });
    let explained = out.len().min(MAX_LOOKS / problem.sites.len().max(1));
    let view = board.whole(problem);
    let batches = out[..explained].chunks(BATCH).collect();
    let refusals = workers::map(workers, batches, |ids: &[u32]| -> Vec<Refusal> {
        ids.iter().map(|&id| refusal::explain(&view, id)).collect()
    });
    let refusals = refusals.concat();
    Outcome { plan: written(problem, board, &refusals), refusals, objective, unplaced }
}

fn written(problem: &Problem<'_>, board: &Board, refusals: &[Refusal]) -> Plan {
    let mut plan = Plan { place: vec![Vec::new(); problem.guests.len()], ..Plan::default() };
    for (guest, &original) in problem.guests.iter().enumerate() {
        let hosts = problem.shadows_of(guest as u32).map(|id| match board.at(id) {
            NONE => -1,
            host => i64::from(problem.original[host as usize]),
        });
        plan.place[original as usize] = hosts.collect();
    }
    for refusal in refusals {
        let counts = refusal.counts.iter().map(|(reason, &hosts)| (reason.name().to_owned(), hosts)).collect();
        plan.reasons.insert(format!("{}:{}", refusal.guest, refusal.copy), counts);
    }
    plan
}
