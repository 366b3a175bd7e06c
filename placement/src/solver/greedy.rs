//! A first plan: one shadow after the other, the largest first, each to the cheapest of some likely hosts.

use super::board::View;
use super::candidates;
use super::problem::NONE;
use super::rng::Rng;

/// Places what of `order` is nowhere yet and finds a host within `tries` guesses. In a view of a zone only rooms of
/// primaries are looked at. The others keep their place in the list that is given back.
pub(super) fn place(view: &mut View<'_>, order: &[u32], tries: u32, rng: &mut Rng) -> Vec<u32> {
    let mut left = Vec::new();
    for &id in order {
        if view.at(id) != NONE {
            continue;
        }
        let problem = view.problem;
        let shadow = &problem.shadows[id as usize];
        let room = if view.is_whole() { NONE } else { problem.sites[shadow.primary as usize].room };
        let mut best = None;
        for i in 0..tries {
            let host = if shadow.promotes && i < tries / 2 {
                candidates::just_placed(view, id, rng)
            } else if room != NONE {
                candidates::guess(view, id, room, rng)
            } else {
                candidates::anywhere(view, shadow, rng)
            };
            if host == NONE || !view.holds(host) || (room != NONE && problem.sites[host as usize].room != room) {
                continue;
            }
            if let Some(price) = view.price(id, NONE, host) {
                best = best.min(Some((price, host))).or(Some((price, host)));
            }
        }
        match best {
            Some((_, host)) => _ = view.put(id, host),
            None => left.push(id),
        }
    }
    left
}

/// Places each of `ids` on the cheapest of all hosts, if there is any. What is left fits nowhere as things stand; as
/// placing only takes room away, one pass suffices.
pub(super) fn place_anywhere(view: &mut View<'_>, ids: &[u32]) -> Vec<u32> {
    let mut left = Vec::new();
    for &id in ids {
        let best = view.hosts().filter_map(|host| Some((view.price(id, NONE, host)?, host))).min();
        match best {
            Some((_, host)) => _ = view.put(id, host),
            None => left.push(id),
        }
    }
    left
}
