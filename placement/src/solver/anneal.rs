//! Simulated annealing: shadows move, change places and push others away; what makes a plan dearer is accepted the less
//! the colder it gets. Its length is counted in moves, its chance comes from a seed.

use std::cmp::Reverse;

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
    /// How many of 256 moves are for a shadow that is nowhere, while there is any.
    pub(super) rescues: u32,
    /// Only shadows move of which a host of their own would cost at least this many temperatures: large ones settle first.
    pub(super) bias: f64,
}

/// Moves between two looks at the temperature.
const STRETCH: u64 = 256;
/// So many of the largest may always move.
const FEW: usize = 16;

/// Improves where `movable` stand; others move only if `pushes` may push them, which those in `pinned` never are.
pub(super) fn anneal(view: &mut View<'_>, movable: &[u32], pinned: &[bool], schedule: Schedule, rng: &mut Rng) {
    if movable.is_empty() {
        return;
    }
    let problem = view.problem;
    let patience = Patience::new();
    let out = movable.iter().copied().filter(|&id| view.at(id) == NONE).collect();
    let mut walk = Walk { view, pinned, tries: schedule.tries, rng, out };
    let stretches = schedule.moves.div_ceil(STRETCH).max(1);
    let cooling = (schedule.cold / schedule.hot).powf(1.0 / stretches as f64);
    let mut temperature = schedule.hot;
    let scale = |id: u32| problem.shadows[id as usize].scale;
    let mut movable = movable.to_vec();
    movable.sort_unstable_by_key(|&id| (Reverse(scale(id)), id));
    for _ in 0..stretches {
        let large = movable.partition_point(|&id| scale(id) as f64 >= temperature * schedule.bias);
        let movable = &movable[..large.max(FEW).min(movable.len())];
        for _ in 0..STRETCH {
            if !walk.out.is_empty() && walk.rng.below(256) < schedule.rescues {
                let patience = patience.draw(walk.rng, temperature);
                walk.rescue(patience);
                continue;
            }
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

/// Most shadows that one move pushes away.
const MAX_PUSHED: usize = 3;

struct Pushed {
    /// What has been saved by taking everything from where it was.
    saved: i64,
    gone: [(u32, u32); MAX_PUSHED],
    count: usize,
}

struct Walk<'w, 'a> {
    view: &'w mut View<'a>,
    pinned: &'w [bool],
    tries: u32,
    rng: &'w mut Rng,
    /// All that is nowhere, and some that no longer is.
    out: Vec<u32>,
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

    /// Tries to find a place for one that has none.
    fn rescue(&mut self, patience: i64) {
        let at = self.rng.below(self.out.len() as u32) as usize;
        let id = self.out[at];
        if self.view.at(id) != NONE {
            self.out.swap_remove(at);
            return;
        }
        self.push(id, patience);
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

    /// Puts `id` on a host from where, or from whose rack, up to [`MAX_PUSHED`] others are pushed away: each to the best
    /// of some hosts, that of `id` among them, or out.
    fn push(&mut self, id: u32, patience: i64) {
        let problem = self.view.problem;
        let shadow = &problem.shadows[id as usize];
        let from = self.view.at(id);
        let room = self.room(id, from);
        let host = candidates::guess(self.view, id, room, self.rng);
        if host == NONE || host == from || !self.view.allowed(shadow, host) {
            return;
        }
        let Some(first) = self.victim(id, host) else { return };
        let (saved, link) = self.relief(id, from);
        let (first_saved, first_link) = self.relief(first, self.view.at(first));
        let least = shadow.least + problem.shadows[first as usize].least;
        if least - saved - link - first_saved - first_link > patience {
            return;
        }
        self.view.take(id);
        let mut pushed = Pushed { saved: saved + link, gone: [(NONE, NONE); MAX_PUSHED], count: 0 };
        self.evict(first, &mut pushed);
        let price = loop {
            let price = self.view.price(id, NONE, host);
            if price.is_some() || pushed.count == MAX_PUSHED {
                break price;
            }
            let Some(next) = self.victim(id, host) else { break None };
            self.evict(next, &mut pushed);
        };
        if let Some(price) = price {
            self.view.put(id, host);
            if self.resettle(&pushed, from, price - pushed.saved, patience) {
                for &(other, _) in &pushed.gone[..pushed.count] {
                    if self.view.at(other) == NONE {
                        self.out.push(other);
                    }
                }
                return;
            }
            self.view.take(id);
        }
        for &(other, host) in pushed.gone[..pushed.count].iter().rev() {
            self.view.put(other, host);
        }
        if from != NONE {
            self.view.put(id, from);
        }
    }

    /// A shadow that is in the way of `id` on `host`: a copy of its own guest that is too near, one of its group, one of
    /// the rack if the host itself has room, or else any of that host.
    fn victim(&mut self, id: u32, host: u32) -> Option<u32> {
        let problem = self.view.problem;
        let shadow = &problem.shadows[id as usize];
        let victim = if let Some(sibling) = self.view.sibling_near(id, shadow, host) {
            sibling
        } else if self.view.group_there(shadow, host) {
            let of_group = |&other: &u32| problem.shadows[other as usize].group == shadow.group;
            self.view.load(host).shadows.iter().copied().find(|other| of_group(other))?
        } else {
            let mut on = host;
            if self.view.load(host).adding(problem, shadow).is_some() {
                let hosts = &problem.racks[problem.sites[host as usize].rack as usize].hosts;
                on = hosts.start + self.rng.below(hosts.len() as u32);
            }
            let there = &self.view.load(on).shadows;
            if there.is_empty() {
                return None;
            }
            there[self.rng.below(there.len() as u32) as usize]
        };
        (victim != id && !self.pinned[victim as usize] && self.view.holds(self.view.at(victim))).then_some(victim)
    }

    fn evict(&mut self, id: u32, pushed: &mut Pushed) {
        let host = self.view.at(id);
        let (saved, link) = self.relief(id, host);
        self.view.take(id);
        pushed.saved += saved + link;
        pushed.gone[pushed.count] = (id, host);
        pushed.count += 1;
    }

    /// Finds a place for all that were pushed away. If everything is then dearer than `patience` allows, they are
    /// nowhere again and false is returned.
    fn resettle(&mut self, pushed: &Pushed, from: u32, mut worse: i64, patience: i64) -> bool {
        let gone = &pushed.gone[..pushed.count];
        for (done, &(other, lost)) in gone.iter().enumerate() {
            if let Some((price, refuge)) = self.refuge(other, from, lost) {
                worse += price;
                if refuge != NONE {
                    self.view.put(other, refuge);
                }
                let least = |&(id, _): &(u32, u32)| self.view.problem.shadows[id as usize].least;
                let rest: i64 = gone[done + 1..].iter().map(least).sum();
                if worse + rest <= patience {
                    continue;
                }
            }
            for &(other, _) in &gone[..=done] {
                self.view.take(other);
            }
            return false;
        }
        true
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
