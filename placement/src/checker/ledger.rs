//! What a plan uses of every host and link.

use std::collections::BTreeMap;

use super::{Report, domain, same};
use crate::instance::{Guest, Instance, Level};

/// What one copy takes of a host.
pub struct Demand {
    /// CPU, memory, far memory and VFs of the shadow.
    pub held: [i64; 4],
    /// CPU, memory and VFs that its promotion adds.
    pub more: [i64; 3],
}

/// What copy `k` of `vm` takes of a host.
pub fn demand(instance: &Instance, vm: &Guest, k: usize) -> Demand {
    let tier = &instance.params.tiers[vm.copies[k].tier];
    let up =
        |amount: i64, permille: i64| (amount * permille).div_euclid(1000) + i64::from(amount * permille % 1000 != 0);
    let (cpu, mem) = (up(vm.cpu_milli, tier.cpu_permille), up(vm.memory_mib, tier.memory_permille));
    let vf = if tier.vf == 0 { 0 } else { vm.vfs };
    let more = if k == 0 { [vm.cpu_milli - cpu, vm.memory_mib - mem, vm.vfs - vf] } else { [0; 3] };
    Demand { held: [cpu, mem, up(vm.memory_mib, tier.far_permille), vf], more }
}

#[derive(Clone, Default)]
pub(super) struct HostUse {
    /// CPU, memory, far memory, VFs.
    pub(super) held: [i64; 4],
    pub(super) in_mbit: i64,
    pub(super) out_mbit: i64,
    /// CPU, memory and VFs that the loss of each domain would add.
    promoted: BTreeMap<(Level, u64), [i64; 3]>,
    /// Copies of each anti-affinity group.
    pub(super) groups: BTreeMap<i64, u64>,
}

impl HostUse {
    /// The reserve for CPU, memory and VFs, with `more` in the domains of `with`.
    pub(super) fn reserve(&self, with: &[(Level, u64)], more: &[i64; 3]) -> [i64; 3] {
        let mut reserve = [0; 3];
        for sums in self.promoted.values() {
            for (reserve, sum) in reserve.iter_mut().zip(sums) {
                *reserve = (*reserve).max(*sum);
            }
        }
        for domain in with {
            let there = self.promoted.get(domain).copied().unwrap_or_default();
            for r in 0..3 {
                reserve[r] = reserve[r].max(there[r] + more[r]);
            }
        }
        reserve
    }
}

#[derive(Clone, Copy, Default)]
pub(super) struct LinkUse {
    pub(super) in_mbit: i64,
    pub(super) out_mbit: i64,
}

pub(super) struct Ledger<'a> {
    instance: &'a Instance,
    pub(super) hosts: Vec<HostUse>,
    pub(super) racks: Vec<LinkUse>,
    pub(super) rooms: Vec<LinkUse>,
    pub(super) regions: Vec<LinkUse>,
}

impl<'a> Ledger<'a> {
    pub(super) fn new(instance: &'a Instance) -> Self {
        Self {
            instance,
            hosts: vec![HostUse::default(); instance.hosts.len()],
            racks: vec![LinkUse::default(); instance.racks.len()],
            rooms: vec![LinkUse::default(); instance.rooms.len()],
            regions: vec![LinkUse::default(); instance.regions.len()],
        }
    }

    /// What can fail with the primary, of what has to be survived.
    pub(super) fn survived(&self, primary: usize) -> Vec<(Level, u64)> {
        self.instance.survive.iter().map(|&level| (level, domain(self.instance, level, primary))).collect()
    }

    pub(super) fn add(&mut self, vm: &Guest, k: usize, host: usize) {
        let instance = self.instance;
        let (demand, mbit, primary) = (demand(instance, vm, k), vm.copies[k].mbit, vm.primary);
        let domains = if k == 0 { self.survived(primary) } else { Vec::new() };
        let there = &mut self.hosts[host];
        for (held, more) in there.held.iter_mut().zip(demand.held) {
            *held += more;
        }
        for domain in std::collections::BTreeSet::from_iter(domains) {
            let sums = there.promoted.entry(domain).or_default();
            for (sum, more) in sums.iter_mut().zip(demand.more) {
                *sum += more;
            }
        }
        if vm.group >= 0 {
            *there.groups.entry(vm.group).or_insert(0) += 1;
        }
        there.in_mbit += mbit;
        self.hosts[primary].out_mbit += mbit;
        self.racks[instance.hosts[host].rack].in_mbit += mbit;
        self.racks[instance.hosts[primary].rack].out_mbit += mbit;
        let room = |host: usize| instance.racks[instance.hosts[host].rack].room;
        if !same(instance, Level::Room, host, primary) {
            self.rooms[room(host)].in_mbit += mbit;
            self.rooms[room(primary)].out_mbit += mbit;
        }
        if !same(instance, Level::Region, host, primary) {
            self.regions[instance.rooms[room(host)].region].in_mbit += mbit;
            self.regions[instance.rooms[room(primary)].region].out_mbit += mbit;
        }
    }

    /// Room on every host, and what hosts cost.
    pub(super) fn check_hosts(&self, report: &mut Report) {
        let cost = &self.instance.params.cost;
        for (h, (host, used)) in self.instance.hosts.iter().zip(&self.hosts).enumerate() {
            let reserve = used.reserve(&[], &[0; 3]);
            let [cpu, mem, far, vf] = used.held;
            let (cpu, mem, vf) = (cpu + reserve[0], mem + reserve[1], vf + reserve[2]);
            let limits = [
                ("mem", mem, host.memory_mib),
                ("far", far, host.far_mib),
                ("vf", vf, host.vfs),
                ("cpu", cpu, host.cpu_milli),
                ("bw_host", used.in_mbit, host.in_mbit),
                ("bw_src", used.out_mbit, host.out_mbit),
            ];
            for (rule, used, limit) in limits.into_iter().filter(|(_, used, limit)| used > limit) {
                report.break_rule(rule, || format!("host {h} needs {used} of {limit}"));
            }
            report.terms.mem += host.mem_cost * mem;
            report.terms.far += cost.far * far;
            report.terms.cpu += cost.cpu * cpu;
            let loads = [
                (host.cpu_cap_milli, host.cpu_cap_milli - host.cpu_milli, cpu),
                (host.memory_cap_mib, host.memory_cap_mib - host.memory_mib, mem),
                (host.in_mbit, 0, used.in_mbit),
            ];
            for (cap, before, more) in loads.into_iter().filter(|&(cap, _, _)| cap > 0) {
                let ours = self.phi(before + more, cap) - self.phi(before, cap);
                report.terms.balance += cost.bal_host * ours;
            }
        }
    }

    /// Room on every link, and what the load of racks costs.
    pub(super) fn check_links(&self, report: &mut Report) {
        let instance = self.instance;
        for (k, (rack, used)) in instance.racks.iter().zip(&self.racks).enumerate() {
            if used.in_mbit > rack.in_mbit {
                report.break_rule("bw_rack", || format!("rack {k} takes {} of {}", used.in_mbit, rack.in_mbit));
            }
            if used.out_mbit > rack.out_mbit {
                report.break_rule("bw_src", || format!("rack {k} sends {} of {}", used.out_mbit, rack.out_mbit));
            }
            report.terms.balance += instance.params.cost.bal_rack * self.phi(used.in_mbit, rack.in_mbit);
        }
        let rooms = instance.rooms.iter().map(|room| (room.in_mbit, room.out_mbit)).zip(&self.rooms);
        let regions = instance.regions.iter().map(|region| (region.in_mbit, region.out_mbit)).zip(&self.regions);
        let links = rooms.map(|link| ("bw_room", link)).enumerate();
        for (k, (rule, ((into, out), used))) in links.chain(regions.map(|link| ("bw_region", link)).enumerate()) {
            if used.in_mbit > into || used.out_mbit > out {
                report.break_rule(rule, || {
                    format!("number {k} takes {} of {into}, sends {} of {out}", used.in_mbit, used.out_mbit)
                });
            }
        }
    }

    fn phi(&self, used: i64, cap: i64) -> i64 {
        let permille = -(-1000 * used).div_euclid(cap);
        self.instance.params.cost.bal_knots.iter().map(|&(knot, slope)| slope * 0.max(permille - knot)).sum()
    }
}
