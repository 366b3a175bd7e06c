//! Simulated annealing: shadows move, change places and push others away; what makes a plan dearer is accepted the less
//! the colder it gets. Its length is counted in moves, its chance comes from a seed.

use super::board::View;
use super::candidates;
use super::problem::NONE;
use super::rng::{Patience, Rng};

#[derive(Clone, Copy, Debug)]
pub(super) struct Schedule {
    pub(super) moves: u64,
    /// Temperature at the start and the end, milli-points.
    pub(super) hot: f64,
    pub(super) cold: f64,
    /// Hosts looked at for one move.
    pub(super) tries: u32,
    /// How many of 256 moves push another shadow away.
    pub(super) pushes: u32,
}

/// Moves between two looks at the temperature.
const STRETCH: u64 = 256;

/// Improves where `movable` stand; others move only if `pushes` may push them, which those in `pinned` never are.
pub(super) fn anneal(view: &mut View<'_>, movable: &[u32], pinned: &[bool], schedule: Schedule, rng: &mut Rng) {
    if movable.is_empty() {
        return;
    }
    let patience = Patience::new();
    let mut walk = Walk { view, pinned, tries: schedule.tries, rng };
    let stretches = schedule.moves.div_ceil(STRETCH).max(1);
    let cooling = (schedule.cold / schedule.hot).powf(1.0 / stretches as f64);
    let mut temperature = schedule.hot;
    for _ in 0..stretches {
        for _ in 0..STRETCH {
            let id = movable[walk.rng.below(movable.len() as u32) as usize];
            let patience = patience.draw(walk.rng, temperature);
            if walk.rng.below(256) < schedule.pushes {
                walk.push(id, patience);
            } else {
                walk.relocate(id, patience);
            }
        }
        temperature *= cooling;
    }
}

struct Walk<'w, 'a> {
    view: &'w mut View<'a>,
    pinned: &'w [bool],
    tries: u32,
    rng: &'w mut Rng,
}

impl Walk<'_, '_> {
    /// The room a view of a zone keeps the shadow in; `NONE`: it may go anywhere.
    fn room(&self, id: u32, from: u32) -> u32 {
        if self.view.is_whole() {
            return NONE;
        }
        let host = if from == NONE { self.view.problem.shadows[id as usize].primary } else { from };
        self.view.problem.sites[host as usize].room
    }

    /// What is saved by taking the shadow from `from`, and on the link of that rack.
    fn relief(&self, id: u32, from: u32) -> (i64, i64) {
        let shadow = &self.view.problem.shadows[id as usize];
        if from == NONE { (View::left_out(shadow), 0) } else { self.view.relief(shadow, from) }
    }

    /// Moves `id` to the best of some hosts if that costs at most `patience`.
    fn relocate(&mut self, id: u32, patience: i64) {
        let problem = self.view.problem;
        let from = self.view.at(id);
        let (saved, link) = self.relief(id, from);
        if problem.shadows[id as usize].least - saved - link.max(0) > patience {
            return;
        }
        let room = self.room(id, from);
        let mut best: Option<(i64, u32)> = None;
        for _ in 0..self.tries {
            let host = candidates::guess(self.view, id, room, self.rng);
            if host == NONE || host == from {
                continue;
            }
            let Some(price) = self.view.price(id, from, host) else { continue };
            let same_rack = from != NONE && problem.sites[from as usize].rack == problem.sites[host as usize].rack;
            let worse = price - saved - if same_rack { 0 } else { link };
            if best.is_none_or(|(least, _)| worse < least) {
                best = Some((worse, host));
            }
        }
        if let Some((worse, host)) = best
            && worse <= patience
        {
            self.view.take(id);
            self.view.put(id, host);
        }
    }

    /// Puts `id` on a host in the place of another shadow, which goes to the best of some hosts, `from` among them, or
    /// is left out.
    fn push(&mut self, id: u32, patience: i64) {
        let problem = self.view.problem;
        let shadow = &problem.shadows[id as usize];
        let from = self.view.at(id);
        let room = self.room(id, from);
        let host = candidates::guess(self.view, id, room, self.rng);
        if host == NONE || host == from || !self.view.allowed(shadow, host) {
            return;
        }
        let there = &self.view.load(host).shadows;
        if there.is_empty() {
            return;
        }
        let other = there[self.rng.below(there.len() as u32) as usize];
        if self.pinned[other as usize] || problem.shadows[other as usize].guest == shadow.guest {
            return;
        }
        let (saved, link) = self.relief(id, from);
        let (other_saved, other_link) = self.relief(other, host);
        let least = shadow.least + problem.shadows[other as usize].least;
        if least - saved - link - other_saved - other_link > patience {
            return;
        }
        self.view.take(id);
        // What the first leaves may change what the other saves, if they share a rack.
        let (other_saved, other_link) = self.relief(other, host);
        self.view.take(other);
        let saved = saved + link + other_saved + other_link;
        if let Some(price) = self.view.price(id, NONE, host) {
            self.view.put(id, host);
            match self.refuge(other, from, host) {
                Some((more, refuge)) if price + more - saved <= patience => {
                    if refuge != NONE {
                        self.view.put(other, refuge);
                    }
                    return;
                }
                _ => self.view.take(id),
            }
        }
        self.view.put(other, host);
        if from != NONE {
            self.view.put(id, from);
        }
    }

    /// The cheapest of some hosts for a shadow that has just lost its place on `lost`; `NONE`: none, at a price.
    fn refuge(&mut self, id: u32, from: u32, lost: u32) -> Option<(i64, u32)> {
        let problem = self.view.problem;
        let shadow = &problem.shadows[id as usize];
        let room = if self.view.is_whole() { NONE } else { problem.sites[lost as usize].room };
        let may_leave = room == NONE || problem.sites[shadow.primary as usize].room == room;
        let mut best = may_leave.then(|| (View::left_out(shadow), NONE));
        for i in 0..self.tries {
            let host = if i == 0 { from } else { candidates::guess(self.view, id, room, self.rng) };
            if host == NONE || host == lost || (room != NONE && problem.sites[host as usize].room != room) {
                continue;
            }
            if let Some(price) = self.view.price(id, NONE, host)
                && best.is_none_or(|(least, _)| price < least)
            {
                best = Some((price, host));
            }
        }
        best
    }
}
