//! Who stays on a host that has not room for all that stand on it: as many as possible, and then those whose move would
//! cost most.
//!
//! What counts against a shadow is mostly its part in the reserve, so the smallest are taken first, by several measures;
//! then one that stays is given up wherever two others, or a costlier one, fit in its place.

use std::cmp::Reverse;

use super::load::Load;
use super::problem::{Problem, Shadow};

/// Most looks at whether a shadow fits that are spent on improving the choice for one host.
const MAX_LOOKS: usize = 20_000;

/// Those of `all` (ascending) that stay on the host of which `empty` is the load without them; ascending.
pub(super) fn choose(problem: &Problem<'_>, empty: Load, all: &[u32]) -> Vec<u32> {
    let free = empty.free;
    let part = |amount: i64, free: i64| (amount << 20) / free.max(1);
    let whole = |held: i32, more: i32| i64::from(held) + i64::from(more);
    let cpu = |shadow: &Shadow| part(whole(shadow.cpu, shadow.more_cpu), free.cpu);
    let mem = |shadow: &Shadow| part(whole(shadow.mem, shadow.more_mem), free.mem);
    let vf = |shadow: &Shadow| part(whole(shadow.vf, shadow.more_vf), free.vf);
    let measures: [&dyn Fn(&Shadow) -> i64; 4] =
        [&cpu, &mem, &|s| cpu(s).max(mem(s)).max(vf(s)), &|s| cpu(s) + mem(s) + vf(s)];
    let fill = |measure: &&dyn Fn(&Shadow) -> i64| {
        let mut order = all.to_vec();
        order.sort_by_key(|&id| measure(&problem.shadows[id as usize]));
        let mut choice = Choice { problem, load: empty.clone(), out: Vec::new() };
        order.into_iter().for_each(|id| _ = choice.add(id));
        choice
    };
    let best = measures.iter().map(fill).min_by_key(|choice| (choice.out.len(), choice.churn()));
    let Some(mut best) = best else { return Vec::new() };
    best.improve();
    let mut stay = std::mem::take(&mut best.load.shadows);
    stay.sort_unstable();
    stay
}

struct Choice<'c, 'a> {
    problem: &'c Problem<'a>,
    load: Load,
    /// Those that do not stay.
    out: Vec<u32>,
}

impl Choice<'_, '_> {
    fn add(&mut self, id: u32) -> bool {
        let shadow = &self.problem.shadows[id as usize];
        match self.load.adding(self.problem, shadow) {
            Some(change) => self.load.add(self.problem, id, shadow, change),
            None => self.out.push(id),
        }
        self.load.shadows.last() == Some(&id)
    }

    fn remove(&mut self, id: u32) {
        let shadow = &self.problem.shadows[id as usize];
        let change = self.load.removing(self.problem, shadow);
        self.load.remove(self.problem, id, shadow, change);
    }

    /// Price of moving those that do not stay.
    fn churn(&self) -> i64 {
        self.out.iter().map(|&id| self.problem.shadows[id as usize].churn).sum()
    }

    fn improve(&mut self) {
        let mut looks = 0;
        loop {
            let before = (self.out.len(), self.churn());
            let mut stay = self.load.shadows.clone();
            stay.sort_by_key(|&id| (self.problem.shadows[id as usize].churn, id));
            for id in stay {
                looks += self.out.len();
                if self.out.is_empty() || looks > MAX_LOOKS {
                    return;
                }
                self.give_up(id);
            }
            if (self.out.len(), self.churn()) >= before {
                return;
            }
        }
    }

    /// Gives up `id` if that lets more, or costlier ones, stay.
    fn give_up(&mut self, id: u32) {
        let before = (self.out.len(), self.churn());
        self.remove(id);
        let mut others = std::mem::take(&mut self.out);
        others.sort_by_key(|&id| (Reverse(self.problem.shadows[id as usize].churn), id));
        let come: Vec<u32> = others.iter().copied().filter(|&other| self.add(other)).collect();
        self.out.push(id);
        if (self.out.len(), self.churn()) < before {
            return;
        }
        come.into_iter().for_each(|other| self.remove(other));
        self.out = others;
        // It stood there a moment ago.
        self.out.retain(|&other| other != id);
        self.add(id);
    }
}
