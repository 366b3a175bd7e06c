//! Of every host why it was taken for a shadow or why not.

use std::fmt;

use super::board::Board;
use super::problem::{NONE, Problem};
use super::refusal::{Objection, objections};
use crate::instance::{Instance, Plan};

/// What is to be said of one host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    Chosen,
    /// It would do, and everything would cost so many milli-points more (fewer, if negative: then something else, such
    /// as the budget of moves, spoke against it).
    Possible {
        more: i64,
    },
    /// In the order in which rules are asked.
    Barred(Vec<Objection>),
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Chosen => f.write_str("chosen"),
            Self::Possible { more } if *more < 0 => write!(f, "possible, cheaper by {} points", -more / 1000),
            Self::Possible { more } => write!(f, "possible, dearer by {} points", more / 1000),
            Self::Barred(objections) => {
                for (i, objection) in objections.iter().enumerate() {
                    let reason = objection.reason.describe();
                    write!(f, "{}{reason}", if i == 0 { "" } else { ", " })?;
                    if objection.lacks > 0 {
                        write!(f, " (lacks {} {})", objection.lacks, objection.reason.unit())?;
                    }
                }
                Ok(())
            }
        }
    }
}

/// A verdict for each host in the instance's order on copy `copy` of guest `guest`, everything else being as in `plan`,
/// which the checker has accepted. None: there is no such copy, or the plan is not one of this instance.
pub fn explain(instance: &Instance, plan: &Plan, guest: usize, copy: usize) -> Option<Vec<Verdict>> {
    if plan.fits(instance).is_err() || copy >= instance.vms.get(guest)?.copies.len() {
        return None;
    }
    let problem = Problem::new(instance);
    let mut board = Board::new(&problem);
    let mut view = board.whole(&problem);
    let mut asked = NONE;
    for (number, &original) in problem.guests.iter().enumerate() {
        let hosts = &plan.place[original as usize];
        for (k, id) in problem.shadows_of(number as u32).enumerate() {
            if (original as usize, k) == (guest, copy) {
                asked = id;
            } else if let Ok(host) = usize::try_from(hosts[k]) {
                view.put(id, problem.internal[host]);
            }
        }
    }
    let chosen = usize::try_from(plan.place[guest][copy]).ok().map(|host| problem.internal[host]);
    let price_there = chosen.and_then(|host| view.price(asked, NONE, host)).unwrap_or(0);
    let verdict = |&host: &u32| match view.price(asked, NONE, host) {
        Some(_) if chosen == Some(host) => Verdict::Chosen,
        Some(price) => Verdict::Possible { more: price - price_there },
        None => Verdict::Barred(objections(&view, asked, host)),
    };
    Some(problem.internal.iter().map(verdict).collect())
}
