//! Where to look for a better host: among those that hold shadows of the same size, and anywhere in reach.
//!
//! Shadows of similar size from different racks share one reserve, so a host that has one of them already is the best
//! guess there is.

use super::board::View;
use super::problem::{NONE, Shadow};
use super::rng::Rng;

/// How far the next of similar size may be in the order of sizes.
const NEIGHBOURHOOD: u32 = 48;

/// A host that may suit shadow `id`: in `room` if that is not `NONE`, else anywhere in its reach. It may turn out to be
/// none, or one that a rule forbids.
pub(super) fn guess(view: &View<'_>, id: u32, room: u32, rng: &mut Rng) -> u32 {
    let shadow = &view.problem.shadows[id as usize];
    if shadow.promotes && rng.next() & 1 == 0 {
        let host = alike(view, id, rng);
        if host != NONE && view.holds(host) && (room == NONE || view.problem.sites[host as usize].room == room) {
            return host;
        }
    }
    if room != NONE {
        let hosts = &view.problem.rooms[room as usize].hosts;
        return hosts.start + rng.below(hosts.len() as u32);
    }
    anywhere(view, shadow, rng)
}

/// Host of a shadow of similar size of the same room's guests.
fn alike(view: &View<'_>, id: u32, rng: &mut Rng) -> u32 {
    let problem = view.problem;
    let rank = problem.size_rank[id as usize];
    let random = rng.next();
    let distance = 1 + ((random >> 32) as u32 & 0xffff) * NEIGHBOURHOOD / 0x1_0000;
    let other = if random & 1 == 0 { rank.wrapping_sub(distance) } else { rank + distance };
    match problem.by_size.get(other as usize) {
        Some(&other) => view.at(other),
        None => NONE,
    }
}

/// Host of a shadow just placed that is a little larger.
pub(super) fn just_placed(view: &View<'_>, id: u32, rng: &mut Rng) -> u32 {
    let problem = view.problem;
    let distance = 1 + rng.below(NEIGHBOURHOOD);
    match problem.by_size.get(problem.size_rank[id as usize].wrapping_sub(distance) as usize) {
        Some(&other) => view.at(other),
        None => NONE,
    }
}

/// A host of the room, the region or anywhere, as far as the latency bound and what has to differ may allow.
pub(super) fn anywhere(view: &View<'_>, shadow: &Shadow, rng: &mut Rng) -> u32 {
    let problem = view.problem;
    let primary = &problem.sites[shadow.primary as usize];
    let weights = [4 * u32::from(shadow.reach[0]), 2 * u32::from(shadow.reach[1]), u32::from(shadow.reach[2])];
    let sum = weights.iter().sum();
    if sum == 0 {
        return NONE;
    }
    let drawn = rng.below(sum);
    if drawn < weights[0] {
        let hosts = &problem.rooms[primary.room as usize].hosts;
        hosts.start + rng.below(hosts.len() as u32)
    } else if drawn < weights[0] + weights[1] {
        let hosts = &problem.regions[primary.region as usize].hosts;
        hosts[rng.below(hosts.len() as u32) as usize]
    } else {
        rng.below(problem.sites.len() as u32)
    }
}
