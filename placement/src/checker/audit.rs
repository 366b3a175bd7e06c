//! Whether the shadows that a plan leaves out had to be left out, for the reasons it gives.

use std::collections::BTreeMap;

use super::ledger::{Ledger, demand};
use super::{fail_together, same, site_rule};
use crate::instance::{Instance, Level, Plan, PlanError};

/// What was found of some shadows without a host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Audit {
    pub audited: usize,
    /// Shadows that a host would have taken.
    pub not_maximal: usize,
    /// Shadows of which the plan counts reasons otherwise.
    pub claims_wrong: usize,
    /// Shadows of which the plan gives no reasons.
    pub unexplained: usize,
}

/// Audits up to `limit` of the shadows that `plan` leaves out, evenly spread. The plan has been checked.
pub fn audit(instance: &Instance, plan: &Plan, limit: usize) -> Result<Audit, PlanError> {
    plan.fits(instance)?;
    let mut ledger = Ledger::new(instance);
    let mut out = Vec::new();
    for (i, (vm, hosts)) in instance.vms.iter().zip(&plan.place).enumerate() {
        for (k, &host) in hosts.iter().enumerate() {
            match usize::try_from(host) {
                Ok(host) => ledger.add(vm, k, host),
                Err(_) => out.push((i, k)),
            }
        }
    }
    let mut audit = Audit::default();
    let step = (out.len() / limit.max(1)).max(1);
    for (i, k) in out.into_iter().step_by(step).take(limit) {
        let mut counts: BTreeMap<String, u64> = BTreeMap::new();
        for host in 0..instance.hosts.len() {
            let rule = first_rule(instance, plan, &ledger, i, k, host).unwrap_or("fits");
            *counts.entry(rule.to_owned()).or_insert(0) += 1;
        }
        audit.audited += 1;
        audit.not_maximal += usize::from(counts.contains_key("fits"));
        match plan.reasons.get(&format!("{i}:{k}")) {
            Some(claimed) => {
                let claimed = claimed.iter().filter(|&(_, &hosts)| hosts > 0);
                audit.claims_wrong += usize::from(!claimed.eq(&counts));
            }
            None => audit.unexplained += 1,
        }
    }
    Ok(audit)
}

/// The first rule that bars copy `k` of guest `i`, which is nowhere, from `host`.
fn first_rule(
    instance: &Instance,
    plan: &Plan,
    ledger: &Ledger<'_>,
    i: usize,
    k: usize,
    host: usize,
) -> Option<&'static str> {
    let vm = &instance.vms[i];
    if let Some(rule) = site_rule(instance, vm, &vm.copies[k], host) {
        return Some(rule);
    }
    let near = |&other: &i64| usize::try_from(other).is_ok_and(|other| fail_together(instance, host, other));
    if plan.place[i].iter().any(near) {
        return Some("sibling");
    }
    let used = &ledger.hosts[host];
    let primary_of_group = || instance.vms.iter().any(|other| other.group == vm.group && other.primary == host);
    if vm.group >= 0 && (used.groups.contains_key(&vm.group) || primary_of_group()) {
        return Some("group");
    }
    let demand = demand(instance, vm, k);
    let domains = if k == 0 { ledger.survived(vm.primary) } else { Vec::new() };
    let reserve = used.reserve(&domains, &demand.more);
    let there = &instance.hosts[host];
    let needs = |r: usize| used.held[r] + demand.held[r];
    let mbit = vm.copies[k].mbit;
    let (rack, room) = place_of(instance, host);
    let (from_rack, from_room) = place_of(instance, vm.primary);
    let (region, from_region) = (instance.rooms[room].region, instance.rooms[from_room].region);
    let crosses = |level| !same(instance, level, host, vm.primary);
    let rules = [
        ("mem", needs(1) + reserve[1] > there.memory_mib),
        ("far", needs(2) > there.far_mib),
        ("vf", needs(3) + reserve[2] > there.vfs),
        ("cpu", needs(0) + reserve[0] > there.cpu_milli),
        ("bw_host", used.in_mbit + mbit > there.in_mbit),
        ("bw_rack", ledger.racks[rack].in_mbit + mbit > instance.racks[rack].in_mbit),
        (
            "bw_room",
            crosses(Level::Room)
                && (ledger.rooms[room].in_mbit + mbit > instance.rooms[room].in_mbit
                    || ledger.rooms[from_room].out_mbit + mbit > instance.rooms[from_room].out_mbit),
        ),
        (
            "bw_region",
            crosses(Level::Region)
                && (ledger.regions[region].in_mbit + mbit > instance.regions[region].in_mbit
                    || ledger.regions[from_region].out_mbit + mbit > instance.regions[from_region].out_mbit),
        ),
        (
            "bw_src",
            ledger.hosts[vm.primary].out_mbit + mbit > instance.hosts[vm.primary].out_mbit
                || ledger.racks[from_rack].out_mbit + mbit > instance.racks[from_rack].out_mbit,
        ),
    ];
    rules.into_iter().find(|(_, breaks)| *breaks).map(|(rule, _)| rule)
}

fn place_of(instance: &Instance, host: usize) -> (usize, usize) {
    let rack = instance.hosts[host].rack;
    (rack, instance.racks[rack].room)
}
