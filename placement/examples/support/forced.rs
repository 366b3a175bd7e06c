//! How many shadows have to move after a change, whoever plans: a lower bound, by rules and demands alone.
//!
//! A shadow whose host may not hold it has to leave. Of the others on a host, look at one resource and at one level of
//! domains that may fail. If `reserve` is what is kept free for promotions there, then of each domain no more can stay
//! than its smallest promotions that fit into `reserve`, and of all no more than the smallest shadows that fit into the
//! rest. The best of all reserves bounds how many stay, the least of all resources and levels is the bound for the host.

use std::collections::BTreeMap;

use placement::checker;
use placement::instance::{HostState, Instance};

/// What a shadow takes of one resource, what its promotion adds, and the domain whose loss causes that.
#[derive(Clone, Copy)]
struct Part {
    held: i64,
    more: i64,
    domain: Option<u64>,
}

/// Least number of moves, as the checker counts them: of shadows that stand on a host that is not down.
pub fn moves(instance: &Instance) -> usize {
    let mut standing = vec![Vec::new(); instance.hosts.len()];
    let mut forced = 0;
    for (guest, vm) in instance.vms.iter().enumerate() {
        for (k, copy) in vm.copies.iter().enumerate() {
            let Ok(host) = usize::try_from(copy.current) else { continue };
            if instance.hosts[host].state == HostState::Down {
                continue;
            }
            match checker::site_rule(instance, vm, copy, host) {
                Some(_) => forced += 1,
                None => standing[host].push((guest, k)),
            }
        }
    }
    for (host, there) in standing.iter().enumerate() {
        forced += there.len() - stay_at_most(instance, host, there);
    }
    forced
}

fn stay_at_most(instance: &Instance, host: usize, there: &[(usize, usize)]) -> usize {
    let free = [instance.hosts[host].cpu_milli, instance.hosts[host].memory_mib, instance.hosts[host].vfs];
    let demands: Vec<_> = there
        .iter()
        .map(|&(guest, k)| {
            let vm = &instance.vms[guest];
            let checker::Demand { held: [cpu, mem, _, vf], more } = checker::demand(instance, vm, k);
            ([cpu, mem, vf], more, (k == 0).then_some(vm.primary))
        })
        .filter(|(held, more, _)| (0..3).all(|r| held[r] + more[r] <= free[r]))
        .collect();
    let mut stay = demands.len();
    for &level in &instance.survive {
        for r in 0..3 {
            let parts = demands.iter().map(|&(held, more, primary)| Part {
                held: held[r],
                more: more[r],
                domain: primary.map(|primary| checker::domain(instance, level, primary)),
            });
            stay = stay.min(fit_at_most(parts.collect(), free[r]));
        }
    }
    stay
}

fn fit_at_most(mut parts: Vec<Part>, free: i64) -> usize {
    let held: i64 = parts.iter().map(|part| part.held).sum();
    parts.sort_by_key(|part| part.more);
    // Of each domain, the reserve at which one more of it can stay.
    let mut sums = BTreeMap::new();
    let mut steps = Vec::with_capacity(parts.len());
    for part in &parts {
        let sum: &mut i64 = sums.entry(part.domain).or_default();
        *sum += part.more;
        steps.push(*sum);
    }
    steps.sort_unstable();
    if steps.last().is_none_or(|reserve| held + reserve <= free) {
        return parts.len();
    }
    parts.sort_by_key(|part| part.held);
    let mut best = 0;
    for (at, &reserve) in steps.iter().enumerate().take_while(|(_, reserve)| **reserve <= free) {
        let mut rest = free - reserve;
        let small = parts.iter().filter(|part| part.more <= reserve);
        let fit = small.take_while(|part| {
            rest -= part.held;
            rest >= 0
        });
        best = best.max(fit.count().min(at + 1));
    }
    best
}
