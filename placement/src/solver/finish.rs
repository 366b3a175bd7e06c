//! The end of a plan: what still fits is placed, and what is left out is told why.

use super::board::{Board, View};
use super::problem::{NONE, Problem};
use super::{Stage, Workers, greedy};
use crate::instance::Plan;

pub(super) fn plan(
    problem: &Problem<'_>,
    board: &mut Board,
    _workers: &dyn Workers,
    watch: &mut dyn FnMut(Stage),
) -> Plan {
    let mut out: Vec<u32> = (0..problem.shadows.len() as u32).filter(|&id| board.at(id) == NONE).collect();
    out.sort_by_key(|&id| (std::cmp::Reverse(View::left_out(&problem.shadows[id as usize])), id));
    let mut view = board.whole(problem);
    greedy::place_anywhere(&mut view, &out);
    let (objective, unplaced) = board.total(problem);
    watch(Stage::Final { objective, unplaced });
    let mut plan = Plan { place: vec![Vec::new(); problem.guests.len()], ..Plan::default() };
    for (guest, &original) in problem.guests.iter().enumerate() {
        let hosts = problem.shadows_of(guest as u32).map(|id| match board.at(id) {
            NONE => -1,
            host => i64::from(problem.original[host as usize]),
        });
        plan.place[original as usize] = hosts.collect();
    }
    plan
}
