//! Judges a plan without knowing how it was made.
//!
//! Written from the description of the format alone, with none of the planner's code and none of its shortcuts: plain
//! sums, no caches. A plan is executed only after [`check`] has found nothing.

use std::collections::{BTreeMap, BTreeSet};

use crate::instance::{Copy, Guest, HostState, Instance, Level, Plan, PlanError};

mod audit;
mod ledger;
#[cfg(test)]
mod tests;

pub use audit::{Audit, audit};
pub use ledger::{Demand, demand};

use ledger::Ledger;

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Broken rules by name; empty: the plan may be executed.
    pub violations: BTreeMap<&'static str, u64>,
    /// The first few, for people.
    pub examples: Vec<String>,
    pub terms: Terms,
    pub copies: usize,
    pub unplaced: usize,
    /// Copies that stood on a host that is not down and do not stand there any more.
    pub moved: usize,
}

/// The objective, in milli-points.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Terms {
    pub unplaced: i64,
    pub mem: i64,
    pub far: i64,
    pub cpu: i64,
    pub net: i64,
    pub churn: i64,
    pub balance: i64,
}

impl Report {
    pub fn is_feasible(&self) -> bool {
        self.violations.is_empty()
    }
    pub fn objective(&self) -> i64 {
        let terms = &self.terms;
        terms.unplaced + terms.mem + terms.far + terms.cpu + terms.net + terms.churn + terms.balance
    }

    fn break_rule(&mut self, rule: &'static str, what: impl FnOnce() -> String) {
        *self.violations.entry(rule).or_insert(0) += 1;
        if self.examples.len() < MAX_EXAMPLES {
            self.examples.push(format!("{rule}: {}", what()));
        }
    }
}

const MAX_EXAMPLES: usize = 10;

/// Checks every rule and sums up the objective. The instance has been validated.
pub fn check(instance: &Instance, plan: &Plan) -> Result<Report, PlanError> {
    plan.fits(instance)?;
    let mut report = Report {
        violations: BTreeMap::new(),
        examples: Vec::new(),
        terms: Terms::default(),
        copies: instance.copies(),
        unplaced: 0,
        moved: 0,
    };
    let mut ledger = Ledger::new(instance);
    for (i, (vm, hosts)) in instance.vms.iter().zip(&plan.place).enumerate() {
        check_guest(instance, i, vm, hosts, &mut report);
        for (k, &host) in hosts.iter().enumerate() {
            count_copy(instance, vm, k, host, &mut report);
            if let Ok(host) = usize::try_from(host) {
                ledger.add(vm, k, host);
            }
        }
    }
    check_groups(instance, plan, &mut report);
    ledger.check_hosts(&mut report);
    ledger.check_links(&mut report);
    Ok(report)
}

fn check_guest(instance: &Instance, i: usize, vm: &Guest, hosts: &[i64], report: &mut Report) {
    for (k, &host) in hosts.iter().enumerate() {
        let Ok(host) = usize::try_from(host) else { continue };
        if let Some(rule) = site_rule(instance, vm, &vm.copies[k], host) {
            report.break_rule(rule, || format!("copy {k} of guest {i} on host {host}"));
        }
        for (other, &near) in hosts[..k].iter().enumerate() {
            if usize::try_from(near).is_ok_and(|near| fail_together(instance, host, near)) {
                report.break_rule("sibling", || {
                    format!("copies {other} and {k} of guest {i} on hosts {near} and {host}")
                });
            }
        }
    }
}

/// The costs that belong to one copy alone.
fn count_copy(instance: &Instance, vm: &Guest, k: usize, host: i64, report: &mut Report) {
    let cost = &instance.params.cost;
    let copy = &vm.copies[k];
    if let Ok(current) = usize::try_from(copy.current)
        && host != copy.current
        && instance.hosts[current].state != HostState::Down
    {
        report.moved += 1;
        report.terms.churn += cost.moved * vm.memory_mib;
    }
    let Ok(host) = usize::try_from(host) else {
        report.unplaced += 1;
        let first = if k == 0 { cost.unplaced_first } else { 1 };
        report.terms.unplaced += vm.weight * (cost.unplaced_fixed + cost.unplaced_mem * vm.memory_mib) * first;
        return;
    };
    let per_mbit = if same(instance, Level::Room, host, vm.primary) {
        cost.net_room
    } else if same(instance, Level::Region, host, vm.primary) {
        cost.net_xroom
    } else {
        cost.net_xregion
    };
    report.terms.net += per_mbit * copy.mbit;
}

fn check_groups(instance: &Instance, plan: &Plan, report: &mut Report) {
    let mut members: BTreeMap<i64, Vec<usize>> = BTreeMap::new();
    for (i, vm) in instance.vms.iter().enumerate().filter(|(_, vm)| vm.group >= 0) {
        members.entry(vm.group).or_default().push(i);
    }
    for (group, members) in members {
        let primaries: BTreeSet<i64> = members.iter().map(|&i| instance.vms[i].primary as i64).collect();
        let mut taken = BTreeSet::new();
        for &host in members.iter().flat_map(|&i| &plan.place[i]).filter(|&&host| host >= 0) {
            if primaries.contains(&host) || !taken.insert(host) {
                report.break_rule("group", || format!("two of group {group} on host {host}"));
            }
        }
    }
}

/// Which domain of `level` a host belongs to.
pub fn domain(instance: &Instance, level: Level, host: usize) -> u64 {
    let rack = &instance.racks[instance.hosts[host].rack];
    match level {
        Level::Host => host as u64,
        Level::Rack => instance.hosts[host].rack as u64,
        Level::Switch => u64::from(rack.switch),
        Level::Power => u64::from(rack.power),
        Level::Room => rack.room as u64,
        Level::Region => instance.rooms[rack.room].region as u64,
    }
}

fn same(instance: &Instance, level: Level, a: usize, b: usize) -> bool {
    domain(instance, level, a) == domain(instance, level, b)
}

/// Whether one rack, switch or power domain takes both hosts.
pub fn fail_together(instance: &Instance, a: usize, b: usize) -> bool {
    [Level::Rack, Level::Switch, Level::Power].into_iter().any(|level| same(instance, level, a, b))
}

fn round_trip_us(instance: &Instance, a: usize, b: usize) -> i64 {
    if a == b {
        return 0;
    }
    let rack = |host: usize| &instance.racks[instance.hosts[host].rack];
    let room = |host: usize| &instance.rooms[rack(host).room];
    let region = |host: usize| &instance.regions[room(host).region];
    let mut one_way = 6;
    if !same(instance, Level::Rack, a, b) {
        one_way += rack(a).latency_us + rack(b).latency_us;
    }
    if !same(instance, Level::Room, a, b) {
        one_way += room(a).latency_us + room(b).latency_us;
    }
    if !same(instance, Level::Region, a, b) {
        one_way += region(a).latency_us + region(b).latency_us;
    }
    2 * one_way
}

/// The first rule that bars `copy` from `host` whatever else is placed.
pub fn site_rule(instance: &Instance, vm: &Guest, copy: &Copy, host: usize) -> Option<&'static str> {
    let there = &instance.hosts[host];
    if there.state == HostState::Down {
        Some("down")
    } else if there.state == HostState::Drain && copy.current != host as i64 {
        Some("drain")
    } else if there.generation < vm.generation {
        Some("gen")
    } else if there.labels & vm.need != vm.need || there.labels & vm.avoid != 0 || vm.barred.contains(&host) {
        Some("label")
    } else if fail_together(instance, host, vm.primary) {
        Some("domain")
    } else if same(instance, copy.apart, host, vm.primary) {
        Some("div")
    } else if round_trip_us(instance, host, vm.primary) > copy.latency_us {
        Some("latency")
    } else {
        None
    }
}
